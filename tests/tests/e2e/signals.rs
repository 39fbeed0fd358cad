//! What the agent says of watched connections, against what clients and servers have seen.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use canary_agent::api::model::VersionSignalsStatus;
use canary_tests::{
    agent::{Agent, AgentOptions},
    client,
    control::Control,
    host,
    server::{HTTP_PORT, Server},
    topology::{Family, Host},
    wait,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use crate::support::{Bench, SHOP, Way, service, version};

/// What a server does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Conduct {
    /// Answers with its version's name, and closes after the client.
    Serve,
    /// Does not listen.
    Refuse,
    /// Resets it when it has been asked something.
    Reset,
    /// Closes it.
    Close,
}

const CONDUCTS: [Conduct; 4] = [Conduct::Serve, Conduct::Refuse, Conduct::Reset, Conduct::Close];

/// A server that may misbehave, on all addresses of a host. Stopped on drop.
struct Odd {
    conduct: Arc<AtomicU8>,
    /// SYNs are dropped.
    deaf: Arc<AtomicBool>,
    /// What it does by now: conduct, and whether it is deaf.
    present: Arc<AtomicU8>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Odd {
    fn start(host: &Host) -> Self {
        let shared = || Arc::new(AtomicU8::new(u8::MAX));
        let (conduct, present) = (Arc::new(AtomicU8::new(0)), shared());
        let (deaf, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let its = (conduct.clone(), present.clone(), deaf.clone(), stop.clone());
        let (addrs, name) = (host.addrs(), client::version_of(&host.name).to_owned());
        let thread = host.namespace.spawn_thread("odd", move || {
            let (conduct, present, deaf, stop) = its;
            let mut listeners: Vec<TcpListener> = Vec::new();
            let mut is_deaf = false;
            while !stop.load(Ordering::Acquire) {
                let now = CONDUCTS[usize::from(conduct.load(Ordering::Acquire))];
                if now == Conduct::Refuse {
                    listeners.clear();
                } else if listeners.is_empty() {
                    let listen = |addr: &std::net::IpAddr| {
                        TcpListener::bind(SocketAddr::new(*addr, HTTP_PORT)).expect("the port")
                    };
                    listeners = addrs.iter().map(listen).collect();
                    is_deaf = false;
                }
                if deaf.load(Ordering::Acquire) != is_deaf {
                    is_deaf = !is_deaf;
                    listeners.iter().for_each(|listener| hear(listener, !is_deaf));
                }
                present.store(now as u8 | u8::from(is_deaf) << 7, Ordering::Release);
                let mut ready: Vec<PollFd<'_>> = listeners
                    .iter()
                    .map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN))
                    .collect();
                // To look again whether anything else is wanted.
                let _ = poll(&mut ready, PollTimeout::from(20_u8));
                let which: Vec<bool> = ready.iter().map(|one| one.any() == Some(true)).collect();
                for (listener, _) in listeners.iter().zip(which).filter(|(_, ready)| *ready) {
                    let (stream, _) = listener.accept().expect("a connection");
                    conduct_of(stream, now, &name);
                }
            }
        });
        Self { conduct, deaf, present, stop, thread: Some(thread) }
    }

    /// Has it behave so from now on.
    fn set(&self, conduct: Conduct, deaf: bool) {
        self.conduct.store(conduct as u8, Ordering::Release);
        self.deaf.store(deaf, Ordering::Release);
        let wanted = conduct as u8 | u8::from(deaf) << 7;
        wait::until("the server's conduct", || {
            let present = self.present.load(Ordering::Acquire);
            (present == wanted).then_some(()).ok_or_else(|| format!("{present:#x}"))
        });
    }
}

impl Drop for Odd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Lets a listening socket take SYNs, or drop all of them.
fn hear(listener: &TcpListener, hears: bool) {
    // BPF_RET | BPF_K, 0: nothing of the packet is kept.
    let mut filter = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut filter };
    let option = if hears { libc::SO_DETACH_FILTER } else { libc::SO_ATTACH_FILTER };
    // SAFETY: the program is of the size that is said, and the kernel copies it.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Closes with a reset.
fn reset(stream: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger)
        .expect("an option");
    drop(stream);
}

fn conduct_of(mut stream: TcpStream, conduct: Conduct, name: &str) {
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    let mut byte = [0];
    match conduct {
        Conduct::Serve => {
            // In one piece: a client that closes before it has read the rest would reset.
            let answer = format!("{name}\n");
            if stream.read_exact(&mut byte).is_ok() && stream.write_all(answer.as_bytes()).is_ok() {
                // Until the client has closed, or reset it.
                let _ = wait::uninterrupted(|| stream.read(&mut byte));
            }
        }
        Conduct::Reset => {
            let _ = stream.read_exact(&mut byte);
            reset(stream);
        }
        Conduct::Close | Conduct::Refuse => drop(stream),
    }
}

/// What a client does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Visit {
    /// Asks who it is, and closes.
    Ask,
    /// Asks who it is, and resets the connection.
    AskAndReset,
}

/// What became of clients: connections by version that answered, and errors.
#[derive(Debug, Default, PartialEq, Eq)]
struct Visits {
    stable: u64,
    v2: u64,
    refused: u64,
    reset: u64,
    /// The server closed without a word.
    closed: u64,
}

/// One connection each from so many clients, both families in turn.
fn visit(bench: &Bench, clients: std::ops::Range<u32>, how: Visit) -> Visits {
    let each = |index: u32, visits: &mut Visits| {
        let family = Family::ALL[index as usize % 2];
        let (from, to) = (SocketAddr::new(family.client(index), 0), family.vip());
        let to = SocketAddr::new(to, HTTP_PORT);
        let mut stream = match client::connect(from, to) {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                visits.refused += 1;
                return;
            }
            Err(error) => panic!("{from} to {to}: {error}"),
        };
        stream.write_all(b"?").expect("a byte");
        let mut answer = [0; 16];
        match wait::uninterrupted(|| stream.read(&mut answer)) {
            Ok(0) => visits.closed += 1,
            Ok(n) if answer[..n].starts_with(b"stable") => visits.stable += 1,
            Ok(_) => visits.v2 += 1,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => visits.reset += 1,
            Err(error) => panic!("{from} to {to}: {error}"),
        }
        if how == Visit::AskAndReset {
            reset(stream);
        }
    };
    bench.client().run(|| {
        let mut visits = Visits::default();
        clients.for_each(|index| each(index, &mut visits));
        visits
    })
}

/// What is known of a version.
fn signals(agent: &Agent<'_>, name: &str) -> VersionSignalsStatus {
    version(&agent.status(), SHOP, name).signals.clone().expect("it is watched")
}

/// Connections with a signal.
fn count(known: &VersionSignalsStatus, signal: &str) -> u64 {
    let found = known.signals.iter().find(|one| one.signal == signal);
    found.expect("a signal").connections
}

const ALL: [&str; 6] = [
    "connect_failed",
    "syn_retransmit",
    "slow_handshake",
    "server_reset",
    "client_reset",
    "short_flow",
];

/// Waits until a version has had so many more watched connections and bad outcomes, and no other
/// ones (but slow handshakes, which may happen to anybody).
#[track_caller]
fn wait_for(
    agent: &Agent<'_>,
    name: &str,
    before: &VersionSignalsStatus,
    watched: u64,
    expected: &[(&str, u64)],
) {
    wait::until(&format!("{name}: {watched} watched, {expected:?}"), || {
        let now = signals(agent, name);
        let more = |signal: &str| count(&now, signal) - count(before, signal);
        let seen: Vec<(&str, u64)> = ALL.map(|signal| (signal, more(signal))).to_vec();
        let of =
            |signal: &str| expected.iter().find(|(name, _)| *name == signal).map_or(0, |(_, n)| *n);
        let fits = seen.iter().all(|(signal, n)| *signal == "slow_handshake" || *n == of(signal));
        let began = now.watched - before.watched;
        (fits && began == watched).then_some(()).ok_or_else(|| format!("{began} watched, {seen:?}"))
    });
}

/// Splits, and waits until so many connections of each version are watched.
#[track_caller]
fn split(agent: &Agent<'_>, share: &str, one_in: [u32; 2]) {
    agent.split(SHOP, "v2", share);
    wait::until("a new choice of connections", || {
        let found = ["stable", "v2"].map(|name| signals(agent, name).one_in);
        (found == one_in.map(Some)).then_some(()).ok_or_else(|| format!("{found:?}"))
    });
}

fn what_clients_and_servers_see_is_what_is_counted(way: Way) {
    let bench = Bench::with_servers(way, &[("stable", 1), ("v2", 1)], |host| {
        // Not where the service is.
        Server::start_on(host, 1, 2)
    });
    let odd: Vec<Odd> = bench.topology.backends.iter().map(Odd::start).collect();
    let v2 = bench.topology.backends.iter().position(|host| client::version_of(&host.name) == "v2");
    let v2 = &odd[v2.expect("a backend of v2")];
    let keys = "signals = true";
    let config = bench.service(SHOP, HTTP_PORT, &["tcp"], keys);
    let mut agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &config);
    odd.iter().for_each(|server| server.set(Conduct::Serve, false));
    split(&agent, "50%", [1, 1]);
    // Addresses and neighbours are settled a moment after the agent is ready: until then, a SYN
    // may be lost. Afterwards there are enough handshakes to say what is slow, too.
    visit(&bench, 0..300, Visit::Ask);
    wait::until("a threshold", || {
        let status = agent.status();
        let signals = service(&status, SHOP).signals.clone();
        let known = signals.and_then(|signals| signals.slow_over_seconds);
        known.map(drop).ok_or_else(|| format!("{:?}", service(&status, SHOP).signals))
    });

    // All is well, but that what is slow by the healthy ones' measure happens to them, too.
    let (stable_before, v2_before) = (signals(&agent, "stable"), signals(&agent, "v2"));
    let seen = visit(&bench, 1000..1100, Visit::Ask);
    assert_eq!(seen.stable + seen.v2, 100, "{seen:?}");
    for (name, before, n) in [("stable", &stable_before, seen.stable), ("v2", &v2_before, seen.v2)]
    {
        wait::until(name, || {
            let now = signals(&agent, name);
            let bad: u64 = ALL
                .iter()
                .filter(|signal| **signal != "slow_handshake")
                .map(|signal| count(&now, signal) - count(before, signal))
                .sum();
            let began = now.watched - before.watched;
            (bad == 0 && began == n)
                .then_some(())
                .ok_or_else(|| format!("{began}, {bad} bad: {now:?}"))
        });
    }
    // A client that resets.
    let (stable_before, v2_before) = (signals(&agent, "stable"), signals(&agent, "v2"));
    let seen = visit(&bench, 2000..2060, Visit::AskAndReset);
    for (name, before, n) in [("stable", &stable_before, seen.stable), ("v2", &v2_before, seen.v2)]
    {
        wait::until("resets of clients", || {
            let now = signals(&agent, name);
            let resets = count(&now, "client_reset") - count(before, "client_reset");
            (resets == n).then_some(()).ok_or_else(|| format!("{name}: {resets} of {n}"))
        });
    }
    let seen_by_balancer = |n: u64| if way == Way::Dsr { 0 } else { n };

    // v2 resets what it is asked.
    v2.set(Conduct::Reset, false);
    let before = signals(&agent, "v2");
    let seen = visit(&bench, 3000..3060, Visit::Ask);
    assert!(seen.reset > 10 && seen.v2 == 0, "{seen:?}");
    wait::until("resets of the server", || {
        let now = signals(&agent, "v2");
        let resets = count(&now, "server_reset") - count(&before, "server_reset");
        let began = now.watched - before.watched;
        (resets == seen_by_balancer(seen.reset) && began == seen.reset)
            .then_some(())
            .ok_or_else(|| format!("{resets} of {}, {began} watched", seen.reset))
    });

    // v2 closes without a word.
    v2.set(Conduct::Close, false);
    let before = signals(&agent, "v2");
    // The client says nothing, so that nothing is left unread; stable waits for it in vain.
    let seen = visit_silently(&bench, 4000..4040);
    assert!(seen.closed > 5, "{seen:?}");
    wait::until("connections with nothing", || {
        let now = signals(&agent, "v2");
        let short = count(&now, "short_flow") - count(&before, "short_flow");
        (short == seen.closed).then_some(()).ok_or_else(|| format!("{short} of {}", seen.closed))
    });

    // v2 hears no SYN until it was sent again.
    v2.set(Conduct::Serve, true);
    let before = signals(&agent, "v2");
    let late = thread::scope(|scope| {
        let bench = &bench;
        let clients: Vec<_> = (0..8_u32)
            .map(|n| scope.spawn(move || visit(bench, 5000 + n..5001 + n, Visit::Ask)))
            .collect();
        wait::until("SYNs at v2", || {
            let status = agent.status();
            let now = version(&status, SHOP, "v2").connections;
            (now > 0).then_some(()).ok_or_else(|| "none".to_owned())
        });
        // Whoever has not sent one by now is answered at once, and counted as that.
        thread::sleep(Duration::from_millis(300));
        v2.set(Conduct::Serve, false);
        let visits = clients.into_iter().map(|client| client.join().expect("a client"));
        visits.map(|visits| visits.v2).sum::<u64>()
    });
    wait::until("late handshakes", || {
        let now = signals(&agent, "v2");
        let again = count(&now, "syn_retransmit") - count(&before, "syn_retransmit");
        let slow = count(&now, "slow_handshake") - count(&before, "slow_handshake");
        let began = now.watched - before.watched;
        (began == late && again > 0 && slow >= again)
            .then_some(())
            .ok_or_else(|| format!("{began} of {late} watched, {again} sent again, {slow} slow"))
    });

    // 3 % go to a v2 that refuses them: of v2 each connection is watched.
    split(&agent, "3%", [4, 1]);
    v2.set(Conduct::Refuse, false);
    let before = signals(&agent, "v2");
    let stable_before = signals(&agent, "stable");
    let seen = visit(&bench, 6000..6500, Visit::Ask);
    assert!(seen.refused > 0 && seen.v2 == 0, "{seen:?}");
    wait_for(&agent, "v2", &before, seen.refused, &[("connect_failed", seen.refused)]);
    let failed = |known: &VersionSignalsStatus| count(known, "connect_failed");
    assert_eq!(failed(&signals(&agent, "stable")), failed(&stable_before), "{seen:?}");

    // What is counted is kept, and shown to Prometheus.
    let known = signals(&agent, "v2");
    agent.stop(Signal::SIGKILL);
    agent.run();
    agent.wait_ready();
    wait::until("the next agent's counts", || {
        let status = agent.status();
        let now = version(&status, SHOP, "v2").signals.clone();
        match now {
            Some(now) if now.watched == known.watched && now.signals == known.signals => Ok(()),
            now => Err(format!("{now:?}, after {known:?}")),
        }
    });
    let mut control = Control::open(&agent.socket()).expect("the socket");
    let page = control.ask("GET", "/metrics", b"").expect("metrics");
    let page = String::from_utf8_lossy(&page.body).into_owned();
    let line = format!(
        "canary_signal_connections_total{{service=\"shop\",version=\"v2\",signal=\"connect_failed\"}} {}",
        failed(&known)
    );
    assert!(page.contains(&line), "no {line} in {page}");
    let line = "canary_handshake_seconds_count{service=\"shop\",version=\"v2\"}";
    assert!(page.contains(line), "no {line} in {page}");
}

/// Clients that say nothing and close when the server has closed, or has said nothing for a while.
fn visit_silently(bench: &Bench, clients: std::ops::Range<u32>) -> Visits {
    let limit = Duration::from_millis(300);
    bench.client().run(|| {
        let mut visits = Visits::default();
        for index in clients {
            let family = Family::ALL[index as usize % 2];
            let from = SocketAddr::new(family.client(index), 0);
            let to = SocketAddr::new(family.vip(), HTTP_PORT);
            let mut stream = client::connect(from, to).expect("a connection");
            stream.set_read_timeout(Some(limit)).expect("a timeout");
            match wait::uninterrupted(|| stream.read(&mut [0; 16])) {
                Ok(0) => visits.closed += 1,
                // Stable waits for its question.
                Err(_) => visits.stable += 1,
                Ok(_) => visits.v2 += 1,
            }
        }
        visits
    })
}

#[test]
fn what_clients_and_servers_see_is_what_is_counted_with_nat() {
    if host::ready("what_clients_and_servers_see_is_what_is_counted_with_nat") {
        what_clients_and_servers_see_is_what_is_counted(Way::NatTwoArmed);
    }
}

#[test]
fn what_clients_and_servers_see_is_what_is_counted_with_dsr() {
    if host::ready("what_clients_and_servers_see_is_what_is_counted_with_dsr") {
        what_clients_and_servers_see_is_what_is_counted(Way::Dsr);
    }
}
