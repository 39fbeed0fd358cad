//! The control socket and the TCP listener, from the built binary: who may what, how often,
//! and what a crowd costs the others.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use canary_agent::api::model::{ChangeReport, ErrorBody};
use canary_tests::{
    agent::{Agent, AgentOptions},
    control::{Answer, Control},
    host,
    netns::Namespace,
    unprivileged, wait,
};

use crate::support::{Bench, SHOP, Way};

/// Nobody, and an operator.
const NOBODY: u32 = 65_534;
const OPERATOR: u32 = 65_533;

const SPLIT: &str = "/v1/services/shop/split";
const DRY: &[u8] = br#"{"split": {"v2": "5%"}, "dry_run": true}"#;

/// An agent whose socket everybody may open.
fn start(bench: &Bench, listen: Option<SocketAddr>) -> Agent<'_> {
    let mut options = AgentOptions::native(&bench.topology);
    options.extra = format!("operators = {{ uids = [{OPERATOR}] }}");
    if let Some(listen) = listen {
        options.listen = listen.to_string();
    }
    let agent = Agent::start(&bench.topology, &options, &bench.services(""));
    for (path, mode) in [(agent.folder().to_owned(), 0o755), (agent.socket(), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("the mode");
    }
    agent
}

fn bench() -> Bench {
    Bench::new(Way::Dsr, &[("stable", 1), ("v2", 1)])
}

#[track_caller]
fn assert_error(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.status, status, "{}", String::from_utf8_lossy(&answer.body));
    let body: ErrorBody = answer.json();
    assert_eq!(body.error.code, code, "{body:?}");
}

#[test]
fn rights_are_those_of_who_writes_whoever_connected() {
    if !host::ready("rights_are_those_of_who_writes_whoever_connected") {
        return;
    }
    let bench = bench();
    let agent = start(&bench, None);
    let socket = agent.socket();
    // Each thread is a user of its own.
    let as_user = |user: u32, mut control: Control| {
        thread::scope(|scope| {
            let asked = scope.spawn(move || {
                unprivileged::become_user_here(user);
                let answer = control.ask("PUT", SPLIT, DRY).expect("an answer");
                let read = control.ask("GET", "/v1/health", b"").expect("an answer");
                assert_eq!(read.status, 200, "reading is anybody's who has the connection");
                (answer, control)
            });
            asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    };
    let open = || Control::open(&socket).expect("the socket");
    let mut kept = open();
    assert_eq!(kept.ask("PUT", SPLIT, DRY).expect("an answer").status, 200, "root may");
    // The same connection, kept open, by a process that has become somebody else.
    let (answer, mut kept) = as_user(NOBODY, kept);
    assert_error(&answer, 403, "not_permitted");
    // It stays so: what was written by whom can't be told apart any more.
    assert_error(&kept.ask("PUT", SPLIT, DRY).expect("an answer"), 403, "not_permitted");
    // An operator who was handed root's connection is an operator.
    let (answer, _kept) = as_user(OPERATOR, open());
    assert_eq!(answer.status, 200, "{answer:?}");
    // What was read ahead does not borrow the rights of what comes after it.
    let mut ahead = open();
    let stream = ahead.stream().try_clone().expect("a stream");
    thread::scope(|scope| {
        scope.spawn(move || {
            unprivileged::become_user_here(NOBODY);
            (&stream)
                .write_all(b"PUT /v1/services/shop/split HTTP/1.1\r\nhost: a\r\n")
                .expect("sent");
        });
    });
    let rest = format!("content-length: {}\r\n\r\n", DRY.len());
    ahead.send(&[rest.as_bytes(), DRY].concat()).expect("sent");
    assert_error(&ahead.answer().expect("an answer"), 403, "not_permitted");
    // One who connects as nobody gains nothing by root's writing for him.
    let nobodys = thread::scope(|scope| {
        let socket = &socket;
        let opened = scope.spawn(move || {
            unprivileged::become_user_here(NOBODY);
            Control::open(socket).expect("the socket")
        });
        opened.join().expect("a connection")
    });
    let mut nobodys = nobodys;
    assert_error(&nobodys.ask("PUT", SPLIT, DRY).expect("an answer"), 403, "not_permitted");
}

#[test]
fn a_reader_who_asks_too_often_is_told_to_wait_and_others_are_not() {
    if !host::ready("a_reader_who_asks_too_often_is_told_to_wait_and_others_are_not") {
        return;
    }
    let bench = bench();
    let agent = start(&bench, None);
    let socket = agent.socket();
    let (told, passed) = thread::scope(|scope| {
        let flood = scope.spawn(|| {
            unprivileged::become_user_here(NOBODY);
            let mut control = Control::open(&socket).expect("the socket");
            let (mut told, mut passed) = (0, 0);
            let deadline = Instant::now() + wait::patience();
            while told < 100 && Instant::now() < deadline {
                let answer = control.ask("GET", "/v1/openapi.json", b"").expect("an answer");
                match answer.status {
                    200 => passed += 1,
                    _ => {
                        assert_error(&answer, 429, "too_many_requests");
                        told += 1;
                    }
                }
            }
            (told, passed)
        });
        flood.join().expect("no panic")
    });
    assert_eq!(told, 100, "of {passed} that passed");
    assert!(passed >= 300, "a burst passes: {passed}");
    // Another user's bucket is another.
    assert_eq!(agent.split(SHOP, "v2", "5%").service, SHOP);
}

/// Keeps a connection busy in the way of a crowd until it is told to stop.
fn bother(socket: &Path, slowly: bool, stop: &AtomicBool, answered: &AtomicUsize) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut stream) = UnixStream::connect(socket) else {
            thread::sleep(Duration::from_millis(50));
            continue;
        };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
        let request = b"GET /v1/status HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        if slowly {
            for byte in request {
                if stop.load(Ordering::Relaxed) || stream.write_all(&[*byte]).is_err() {
                    break;
                }
                thread::sleep(Duration::from_millis(100));
            }
        } else if stream.write_all(request).is_ok()
            && stream.read_to_end(&mut Vec::new()).is_ok_and(|read| read > 0)
        {
            answered.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_hundred_clients_do_not_delay_a_split() {
    /// Splits with and without the crowd.
    const CALLS: usize = 40;
    /// Far beyond what it takes, and far below what waiting for a crowd would.
    const MEDIAN: Duration = Duration::from_millis(250);
    if !host::ready("a_hundred_clients_do_not_delay_a_split") {
        return;
    }
    let _alone = crate::support::alone();
    let bench = bench();
    let agent = start(&bench, None);
    let socket = agent.socket();
    let measure = || {
        let mut control = Control::open(&socket).expect("the socket");
        let mut took: Vec<(Duration, Duration)> = (0..CALLS)
            .map(|call| {
                let share = if call % 2 == 0 { "5%" } else { "10%" };
                let body = format!("{{\"split\": {{\"v2\": \"{share}\"}}}}");
                let begun = Instant::now();
                let answer = control.ask("PUT", SPLIT, body.as_bytes()).expect("an answer");
                let seen = begun.elapsed();
                assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
                let report: ChangeReport = answer.json();
                (seen, Duration::from_micros(report.took_us))
            })
            .collect();
        took.sort();
        let seen = took[CALLS / 2].0;
        took.sort_by_key(|(_, in_force)| *in_force);
        (seen, took[CALLS / 2].1)
    };
    let alone = measure();
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let crowded = thread::scope(|scope| {
        for client in 0..100 {
            let (socket, stop, answered) = (&socket, &stop, &answered);
            scope.spawn(move || {
                unprivileged::become_user_here(NOBODY);
                bother(socket, client % 2 == 0, stop, answered);
            });
        }
        wait::until("the crowd", || match answered.load(Ordering::Relaxed) {
            0..200 => Err("it has not begun".to_owned()),
            _ => Ok(()),
        });
        let crowded = measure();
        stop.store(true, Ordering::Relaxed);
        crowded
    });
    println!(
        "median of {CALLS} splits, seen and in force: alone {:?} {:?}; beside 100 clients {:?} {:?} \
         ({} of their requests answered)",
        alone.0,
        alone.1,
        crowded.0,
        crowded.1,
        answered.load(Ordering::Relaxed)
    );
    assert!(crowded.1 < MEDIAN, "in force after {:?}, alone after {:?}", crowded.1, alone.1);
}

/// A request over TCP in the balancer's namespace, and everything of the answer.
#[track_caller]
fn over_tcp(balancer: &Namespace, to: SocketAddr, request: &str) -> String {
    balancer.run(|| {
        let mut stream = TcpStream::connect(to).expect("a connection");
        stream.set_read_timeout(Some(wait::patience())).expect("a time-out");
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    })
}

#[test]
fn the_listener_changes_nothing_and_names_nobody() {
    if !host::ready("the_listener_changes_nothing_and_names_nobody") {
        return;
    }
    let bench = bench();
    let balancer = &bench.topology.balancer;
    let free = balancer.run(|| TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = free.local_addr().expect("its address");
    drop(free);
    let agent = start(&bench, Some(address));
    // Something about people, of each kind.
    let reason = "Ada Lovelace is on holiday";
    assert_eq!(agent.cli(&["split", SHOP, "v2=5%", "--reason", reason, "--confirm", "1h"]).code, 0);
    assert_eq!(agent.cli(&["freeze", "echo", "--reason", reason]).code, 0);
    assert_eq!(agent.cli(&["freeze", "--reason", reason]).code, 0);
    let ask = |method: &str, target: &str, host: &str, more: &str| {
        let request = format!(
            "{method} {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{more}\r\n"
        );
        over_tcp(balancer, address, &request)
    };
    let own = address.to_string();
    for target in ["/v1/status", "/v1/services/shop", "/v1/services/echo", "/metrics", "/"] {
        let answer = ask("GET", target, &own, "origin: https://evil.example\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{target}: {answer}");
        assert!(!answer.contains("Ada"), "{target}: {answer}");
        assert!(!answer.to_lowercase().contains("access-control-"), "{target}: {answer}");
    }
    let status = ask("GET", "/v1/status", &own, "");
    assert!(status.contains("\"frozen\":{"), "that it is frozen is said: {status}");
    for target in ["/v1/events", "/v1/events?limit=1", "/v1/events?follow=true"] {
        let answer = ask("GET", target, &own, "");
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("socket_only"), "{answer}");
        assert!(!answer.contains("Ada"), "{answer}");
    }
    // No other spelling leads there either.
    for target in ["/v1/events/", "//v1/events", "/v1/./events", "/v1/%65vents", "/V1/events"] {
        let answer = ask("GET", target, &own, "");
        assert!(
            !answer.starts_with("HTTP/1.1 200 ") && !answer.contains("Ada"),
            "{target}: {answer}"
        );
    }
    for (method, more) in [
        ("PUT", "content-length: 2\r\n\r\n{}"),
        ("POST", "content-length: 0\r\n"),
        ("DELETE", ""),
        ("OPTIONS", "origin: https://evil.example\r\naccess-control-request-method: PUT\r\n"),
    ] {
        let answer = ask(method, SPLIT, &own, more);
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("read_only"), "{answer}");
        assert!(!answer.to_lowercase().contains("access-control-"), "{answer}");
    }
    for host in ["evil.example", "127.0.0.1.evil.example", ""] {
        let answer = ask("GET", "/v1/status", host, "");
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("bad_host"), "{answer}");
    }
    // On the socket, who may read is told everything.
    let full = agent.cli(&["events"]);
    assert!(full.stdout.contains("Ada"), "{full:?}");
}
