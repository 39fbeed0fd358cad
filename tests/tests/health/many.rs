//! Thousands of backends: the checks make no storm, and cost little.

use std::{
    fmt::Write as _,
    fs,
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use canary_agent::api::model::BackendStatus;

use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    netns::Namespace,
    server::{ECHO_PORT, Server},
    stack,
    topology::{Options, Topology, VIP_V4},
    wait,
};

const BACKENDS: u32 = 5_000;
/// Long enough for a build that is not optimised on a machine that is busy.
const INTERVAL: Duration = Duration::from_secs(20);
const TIMEOUT: Duration = Duration::from_secs(2);
/// A window in which checks are counted, and how many of them.
const WINDOW: Duration = Duration::from_millis(100);
const WINDOWS: usize = 60;
/// Checks in a window, were they spread evenly.
const EVENLY: u64 = BACKENDS as u64 * WINDOW.as_millis() as u64 / INTERVAL.as_millis() as u64;

/// TCP segments that a host has got.
fn segments(host: &Namespace) -> u64 {
    stack::counter(host, "Tcp", "InSegs").expect("a counter")
}

/// Seconds of processor time that a process has used, and its resident memory in KiB.
fn usage(pid: u32) -> (f64, u64) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let (_, fields) = stat.rsplit_once(')').expect("proc(5)");
    let mut times = fields.split_whitespace().skip(11).map(|field| field.parse::<f64>());
    let mut next = || times.next().expect("a field").expect("a number");
    let ticks = next() + next();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    let resident = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    // USER_HZ is 100 on every architecture that is supported.
    (ticks / 100.0, resident)
}

/// Listens on a port of every address of a namespace, and accepts what comes.
struct Everywhere {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Everywhere {
    fn listen(namespace: &Namespace, port: u16) -> Self {
        let listener = namespace.run(|| TcpListener::bind(("0.0.0.0", port))).expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                while listener.accept().is_ok() {}
                thread::sleep(Duration::from_millis(5));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Everywhere {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// All backends are addresses of one host, which is their next hop.
fn many(test: &str, dsr: bool, health: &str) {
    let port = ECHO_PORT;
    if !host::ready(test) {
        return;
    }
    let versions = [("stable", 1)];
    let topology = Topology::new(&match dsr {
        false => Options::two_armed(&versions),
        true => Options::one_armed_dsr(&versions),
    });
    let backend = &topology.backends[0];
    // Where the VIP is checked, the server on it answers for all.
    let _server = dsr.then(|| Server::start(backend));
    let _everywhere = (!dsr).then(|| Everywhere::listen(&backend.namespace, port));
    topology.balancer.ip(&format!("route add 10.32.0.0/16 via {}", backend.v4));
    backend.namespace.ip("route add local 10.32.0.0/16 dev lo");
    let mut addrs = String::new();
    for n in 0..BACKENDS {
        let _ = write!(addrs, "\"10.32.{}.{}:{port}\", ", n / 250, n % 250 + 1);
    }
    let forward = if dsr { "dsr" } else { "nat" };
    let text = format!(
        "[[service]]\nname = \"many\"\nvip = \"{VIP_V4}\"\nports = \"tcp/{port}\"\n\
         forward = {forward:?}\ncontrol = \"stable\"\nbuckets = 8192\n\
         health = {{ {health}, interval = \"{}ms\", timeout = \"{}ms\" }}\n\
         [service.versions.stable]\nbackends = [{addrs}]\n",
        INTERVAL.as_millis(),
        TIMEOUT.as_millis()
    );
    let mut options = AgentOptions::native(&topology);
    options.extra = format!("[agent.capacity]\nbackends = {BACKENDS}");
    let agent = Agent::start(&topology, &options, &text);
    wait::until_within(INTERVAL * 3, "every backend to be checked", || {
        let status = agent.status();
        let backends = &status.services[0].versions[0].backends;
        let checked =
            |b: &&BackendStatus| b.check.as_ref().is_some_and(|c| c.passes > 0) && b.state == "up";
        match backends.iter().filter(checked).count() {
            n if n == BACKENDS as usize => Ok(()),
            n => Err(format!("{n}; {:?}", backends.iter().find(|b| !checked(b)))),
        }
    });
    let pid = agent.pid().expect("it runs");
    let (begun, before) = (Instant::now(), usage(pid));
    let (mut last, mut counts) = (segments(&backend.namespace), Vec::new());
    for window in 1..=WINDOWS as u32 {
        thread::sleep((WINDOW * window).saturating_sub(begun.elapsed()));
        let now = segments(&backend.namespace);
        counts.push(now - last);
        last = now;
    }
    let (seconds, after) = (begun.elapsed().as_secs_f64(), usage(pid));
    let total: u64 = counts.iter().sum();
    counts.sort_unstable();
    let (median, most) = (counts[WINDOWS / 2], counts[WINDOWS - 1]);
    println!(
        "{test}: {:.0} segments a second; in 100 ms {} at least, {median} in the median, {most} at \
         most; {:.1} % of a processor, {} MiB",
        total as f64 / seconds,
        counts[0],
        (after.0 - before.0) / seconds * 100.0,
        after.1 / 1024
    );
    // At the least a SYN and a reset for each.
    let (evenly, due) = (total / WINDOWS as u64, 2 * EVENLY * WINDOWS as u64);
    assert!(total > due * 9 / 10, "{total} segments in {seconds} s");
    assert!(median > evenly * 2 / 3 && median < evenly * 3 / 2, "{counts:?}");
    // A machine that stalls makes up for it afterwards.
    assert!(counts[WINDOWS * 9 / 10] < evenly * 2, "{counts:?}");
    let status = agent.status();
    let backends = &status.services[0].versions[0].backends;
    assert!(backends.iter().all(|b| b.state == "up"));
    assert!(status.alerts.is_empty(), "{:?}", status.alerts);
}

#[test]
fn five_thousand_backends_checked_by_tcp_make_no_storm() {
    let test = "five_thousand_backends_checked_by_tcp_make_no_storm";
    many(test, false, "type = \"tcp\"");
}

#[test]
fn five_thousand_backends_checked_through_the_vip_make_no_storm() {
    let test = "five_thousand_backends_checked_through_the_vip_make_no_storm";
    many(test, true, "type = \"tcp\", via = \"vip\"");
}
