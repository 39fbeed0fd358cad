//! How long a split change takes, under traffic.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use canary_agent::api::model::ChangeReport;
use canary_tests::{
    agent::{Agent, AgentOptions},
    client,
    control::Control,
    host,
    server::ECHO_PORT,
    topology::Family,
    wait,
};

use crate::support::{Bench, ECHO, Way};

/// From one new connection to the next: 2,000 a second leave two processors some time.
const PACE: Duration = Duration::from_micros(500);

/// How often the split is set.
///
/// Fewer in a build that is not optimised, in which each takes ten times as long.
const CALLS: usize = if cfg!(debug_assertions) { 100 } else { 1_000 };

/// Each moves buckets.
const SHARES: [&str; 6] = ["1%", "5%", "50%", "100%", "25%", "0%"];

/// What the slowest hundredth may not exceed on any host, however slow and busy; the
/// aim is 5 ms. A build that is not optimised is held to a limit that shows no more
/// than that nothing has got stuck.
const LIMIT: Duration =
    if cfg!(debug_assertions) { Duration::from_millis(500) } else { Duration::from_millis(50) };

fn quantile(sorted: &[Duration], q: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

/// Where files are in memory.
const MEMORY: &str = "/dev/shm";

/// What one row of calls took, sorted.
struct Times {
    seen: Vec<Duration>,
    took: Vec<Duration>,
    connections: u64,
    /// What the agent's loop computed for each call, and waited for a processor.
    computed: Duration,
    waited: Duration,
}

/// Time on and waiting for a processor of the agent's loop (`schedstat`, sched-stats of
/// the kernel's documentation).
fn schedule(agent: &Agent<'_>) -> [u64; 2] {
    let tasks = format!("/proc/{}/task", agent.pid().expect("it runs"));
    let state = std::fs::read_dir(tasks).expect("threads").flatten().find(|task| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "state")
    });
    let path = state.expect("the loop's thread").path().join("schedstat");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mut numbers = text.split_whitespace().map(|word| word.parse().unwrap_or_default());
    [(); 2].map(|()| numbers.next().unwrap_or_default())
}

/// Splits under traffic, one after the other on one connection to the socket.
fn measure(bench: &Bench, agent: &Agent<'_>) -> Times {
    let stop = Arc::new(AtomicBool::new(false));
    let connections = Arc::new(AtomicU64::new(0));
    let traffic = {
        let (stop, connections) = (Arc::clone(&stop), Arc::clone(&connections));
        bench.client().spawn_thread("traffic", move || {
            let to = SocketAddr::new(Family::V4.vip(), ECHO_PORT);
            let start = Instant::now();
            for index in 0.. {
                wait::pause_until(start + PACE * index);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let source = SocketAddr::new(Family::V4.client(index), 0);
                client::tcp_name(source, to).map_err(|error| format!("{source}: {error}"))?;
                connections.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<(), String>(())
        })
    };
    wait::until("traffic", || match connections.load(Ordering::Relaxed) {
        0..100 => Err("it has just begun".to_owned()),
        _ => Ok(()),
    });
    let before = connections.load(Ordering::Relaxed);
    let mut control = Control::open(&agent.socket()).expect("the socket");
    let (mut seen, mut took) = (Vec::new(), Vec::new());
    let start = schedule(agent);
    let target = format!("/v1/services/{ECHO}/split");
    for (call, share) in SHARES.iter().cycle().take(CALLS).enumerate() {
        let body = format!("{{\"split\": {{\"v2\": \"{share}\"}}}}");
        let called = Instant::now();
        let answer = control.ask("PUT", &target, body.as_bytes()).expect("an answer");
        seen.push(called.elapsed());
        assert_eq!(answer.status, 200, "call {call}: {}", String::from_utf8_lossy(&answer.body));
        let report: ChangeReport = answer.json();
        assert!(report.applied && report.buckets_moved > 0, "call {call}: {report:?}");
        took.push(Duration::from_micros(report.took_us));
    }
    let end = schedule(agent);
    let [computed, waited] =
        [0, 1].map(|at| Duration::from_nanos((end[at] - start[at]) / CALLS as u64));
    let during = connections.load(Ordering::Relaxed) - before;
    stop.store(true, Ordering::Relaxed);
    traffic.join().expect("the traffic's thread").expect("no connection fails");
    assert!(during > 0, "there was traffic");
    seen.sort_unstable();
    took.sort_unstable();
    Times { seen, took, connections: during, computed, waited }
}

/// A change is on the disk before it is in force, and how long a disk takes to say
/// so, on a host that others use, says nothing about the agent. So the limit is on
/// an agent whose state is in memory; the other's times are printed beside them.
#[test]
fn a_split_is_in_force_at_once_under_traffic() {
    if !host::ready("a_split_is_in_force_at_once_under_traffic") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 3), ("v2", 2)]);
    let mut slow = Vec::new();
    let runs = [(false, &Family::ALL[..1]), (false, &Family::ALL[..]), (true, &Family::ALL[..])];
    for (in_memory, families) in runs {
        let options = AgentOptions::native(&bench.topology);
        let balancer = &bench.topology.balancer;
        let memory = tempfile::tempdir_in(MEMORY).expect("a folder in memory");
        let mut agent = Agent::prepare(
            balancer,
            &options,
            &bench.service_on(families, ECHO, ECHO_PORT, &["tcp", "udp"], ""),
        );
        if in_memory {
            let state = agent.folder().join("state");
            std::os::unix::fs::symlink(memory.path(), state).expect("a link");
        }
        agent.run();
        agent.wait_ready();
        let Times { seen, took, connections, computed, waited } = measure(&bench, &agent);
        let place = if in_memory { "in memory" } else { "on the host's disk" };
        let place = format!("{place}, families {families:?}");
        println!(
            "{CALLS} splits, state {place}: each {computed:?} of the loop on a processor, \
             {waited:?} waiting for one"
        );
        for (what, times) in [("seen by the client", &seen), ("took_us", &took)] {
            let [p50, p99, max] = [0.5, 0.99, 1.0].map(|q| quantile(times, q));
            println!(
                "{CALLS} splits, state {place}, {what}: p50 {p50:?}, p99 {p99:?}, max {max:?}; \
                 {connections} connections meanwhile"
            );
            if in_memory && p99 > LIMIT {
                slow.push(format!("{what}: p99 is {p99:?}"));
            }
        }
    }
    assert!(slow.is_empty(), "{slow:?}");
}
