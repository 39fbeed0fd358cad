//! How long a split change takes, under traffic.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use canary_agent::api::model::ChangeReport;
use canary_tests::{client, control::Control, host, server::ECHO_PORT, topology::Family, wait};

use crate::support::{Bench, ECHO, Way};

const CALLS: usize = 1_000;

/// What nothing may exceed on any host, however slow and busy; the aim is 5 ms.
const LIMIT: Duration = Duration::from_millis(50);

fn quantile(sorted: &[Duration], q: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

#[test]
fn a_split_is_in_force_at_once_under_traffic() {
    if !host::ready("a_split_is_in_force_at_once_under_traffic") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 3), ("v2", 2)]);
    let agent = bench.agent("");
    let stop = Arc::new(AtomicBool::new(false));
    let connections = Arc::new(AtomicU64::new(0));
    let traffic = {
        let (stop, connections) = (Arc::clone(&stop), Arc::clone(&connections));
        bench.client().spawn_thread("traffic", move || {
            let to = std::net::SocketAddr::new(Family::V4.vip(), ECHO_PORT);
            for index in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let source = std::net::SocketAddr::new(Family::V4.client(index), 0);
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
    for (call, share) in
        ["1%", "5%", "50%", "100%", "25%", "0%"].iter().cycle().take(CALLS).enumerate()
    {
        let body = format!("{{\"split\": {{\"v2\": \"{share}\"}}}}");
        let target = format!("/v1/services/{ECHO}/split");
        let called = Instant::now();
        let answer = control.ask("PUT", &target, body.as_bytes()).expect("an answer");
        seen.push(called.elapsed());
        assert_eq!(answer.status, 200, "call {call}: {}", String::from_utf8_lossy(&answer.body));
        let report: ChangeReport = answer.json();
        assert!(report.applied && report.buckets_moved > 0, "call {call}: {report:?}");
        took.push(Duration::from_micros(report.took_us));
    }
    let during = connections.load(Ordering::Relaxed) - before;
    stop.store(true, Ordering::Relaxed);
    traffic.join().expect("the traffic's thread").expect("no connection fails");
    assert!(during > 0, "there was traffic");
    let mut slow = Vec::new();
    for (what, times) in [("seen by the client", &mut seen), ("took_us", &mut took)] {
        times.sort_unstable();
        let (p50, p99) = (quantile(times, 0.5), quantile(times, 0.99));
        let max = quantile(times, 1.0);
        println!(
            "{CALLS} splits, {what}: p50 {p50:?}, p99 {p99:?}, max {max:?}; {during} connections meanwhile"
        );
        if p99 > LIMIT {
            slow.push(format!("{what}: p99 is {p99:?}"));
        }
    }
    assert!(slow.is_empty(), "{slow:?}");
}
