//! A backend that is really gone: its connections fail, no others do, and new ones
//! avoid it when its checks have failed `fall` times.
//!
//! The times are those of a host that runs the agent when it has something to do: what
//! a thread of no precedence stood still meanwhile is subtracted.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use canary_tests::{
    agent::{Agent, AgentOptions},
    hold::{Hold, Kind, State},
    host,
    pulse::Weather,
    server::{HEALTH_PATH, HTTP_PORT, Server},
    topology::Family,
    wait,
};

use crate::{
    fresh::{Arrival, Fresh},
    support::{Bench, SHOP, Way, alone},
};

const INTERVAL: Duration = Duration::from_millis(500);
const TIMEOUT: Duration = Duration::from_millis(250);
const FALL: u32 = 3;

/// From one check to the next it is the interval, give or take a tenth.
const JITTER_PERCENT: u32 = 10;

/// Connections that are held, of each family and kind.
const HELD: u32 = 12;

/// Time from one new connection of a worker to the next.
const PROBE: Duration = Duration::from_millis(50);

/// Workers that open them: one that nobody answers takes a while, and two in three are not the
/// victim's.
const WORKERS: u32 = 16;

/// How long a new connection and its answer may take.
const PATIENCE: Duration = Duration::from_millis(400);

/// How a backend goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The server's process ends: the host resets what comes.
    Process,
    /// The host is cut off: nothing comes back any more.
    Host,
}

#[track_caller]
fn exercise(test: &str, way: Way, end: End) {
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let mut bench = Bench::new(way, &[("stable", 3)]);
    let via = if way == Way::Dsr { "vip" } else { "backend" };
    let health = format!(
        "health = {{ type = \"http\", path = \"{HEALTH_PATH}\", via = \"{via}\", interval = \"{}ms\", \
         timeout = \"{}ms\", rise = 2, fall = {FALL} }}",
        INTERVAL.as_millis(),
        TIMEOUT.as_millis()
    );
    let services = bench.service_with(&Family::ALL, SHOP, HTTP_PORT, &["tcp"], &health);
    // The servers go one by one; what the agent borrows stays.
    let running = std::mem::take(&mut bench.servers);
    let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &services);
    bench.wait_answered();
    let hold = Hold::start(bench.client(), &running, 1);
    let mut servers: Vec<Option<Server>> = running.into_iter().map(Some).collect();
    let mut next = 0;
    for family in Family::ALL {
        for kind in [Kind::KeepAlive, Kind::Download, Kind::Chatter, Kind::Idle] {
            for _ in 0..HELD {
                hold.open(kind, family, family.client(next));
                next += 1;
            }
        }
    }
    hold.wait_opened();
    let fresh =
        Fresh { clients: 10_000..1_000_000, workers: WORKERS, pace: PROBE, patience: PATIENCE };
    let probes = fresh.start(&bench);
    wait::until("the first checks", || {
        let status = agent.status();
        let mut backends = status.services[0].versions.iter().flat_map(|v| &v.backends);
        let passed = |check: &canary_agent::api::model::CheckStatus| check.passes > 0;
        let all = backends.all(|b| b.check.as_ref().is_some_and(passed));
        all.then_some(()).ok_or_else(|| "not all have passed".to_owned())
    });

    let victim = &bench.topology.backends[1];
    let weather = Weather::start();
    let ended = Instant::now();
    match end {
        End::Process => servers[1] = None,
        End::Host => victim.namespace.ip("link set eth0 down"),
    }
    let bound = INTERVAL * FALL * (100 + JITTER_PERCENT) / 100 + TIMEOUT;
    // Until the bound has passed for everybody, and some more.
    while ended.elapsed().saturating_sub(weather.stood_still(ended, Instant::now())) < bound * 2 {
        wait::pause_until(Instant::now() + PATIENCE);
    }
    let probes = probes.finish();
    let is_bad = |name: &std::io::Result<String>| name.as_ref().map_or(true, |n| *n == victim.name);
    let early = probes.iter().filter(|probe| probe.begun < ended && probe.name.is_err());
    assert_eq!(early.count(), 0, "{test}: new connections failed before");
    for family in Family::ALL {
        let of_family = || probes.iter().filter(|probe| probe.family == family);
        // Who had to wait for a processor meanwhile says nothing about the backend.
        let waited = |probe: &Arrival| {
            let still = weather.stood_still(probe.begun, probe.begun + PATIENCE);
            probe.name.is_err() && still >= PATIENCE / 4
        };
        let bad = |probe: &&Arrival| probe.begun >= ended && is_bad(&probe.name) && !waited(probe);
        let last =
            of_family().rfind(bad).unwrap_or_else(|| panic!("{test}: {family:?}: nobody noticed"));
        let (at, name) = (last.begun, &last.name);
        let still = weather.stood_still(ended, at);
        let after = at.duration_since(ended).saturating_sub(still);
        let since = of_family().filter(|probe| probe.begun > at).count();
        println!(
            "{test}: {family:?}: the last of the new connections that failed began {after:.2?} after \
             ({name:?}; {still:.2?} of standing still are subtracted), {since} since"
        );
        assert!(after < bound, "{test}: {family:?}: {after:?} of {bound:?}: {name:?}");
        assert!(since > 20, "{test}: {family:?}: only {since} connections since");
    }

    let records = hold.records();
    let mut states: HashMap<(bool, State), usize> = HashMap::new();
    for record in &records {
        let of_victim = record.server.as_deref() == Some(victim.name.as_str());
        *states.entry((of_victim, record.state)).or_default() += 1;
        // A cut-off host's connections wait, which an idle one does not notice.
        let noticed = match end {
            End::Process => record.state == State::Broken,
            End::Host => record.kind == Kind::Idle || !record.faults.is_empty(),
        };
        assert!(!of_victim || noticed, "{test}: it goes on: {record:?}");
        assert!(of_victim || record.faults.is_empty(), "{test}: another's: {record:?}");
    }
    println!("{test}: connections by (the victim's, state): {states:?}");
    assert!(states.keys().any(|(of_victim, _)| *of_victim), "{test}: it had no connection");
}

#[test]
fn a_killed_server_is_avoided_within_fall_times_interval_in_nat() {
    exercise(
        "a_killed_server_is_avoided_within_fall_times_interval_in_nat",
        Way::NatTwoArmed,
        End::Process,
    );
}

#[test]
fn a_killed_server_is_avoided_within_fall_times_interval_in_dsr() {
    exercise(
        "a_killed_server_is_avoided_within_fall_times_interval_in_dsr",
        Way::Dsr,
        End::Process,
    );
}

#[test]
fn a_host_that_is_cut_off_is_avoided_within_fall_times_interval_in_nat() {
    exercise(
        "a_host_that_is_cut_off_is_avoided_within_fall_times_interval_in_nat",
        Way::NatTwoArmed,
        End::Host,
    );
}

#[test]
fn a_host_that_is_cut_off_is_avoided_within_fall_times_interval_in_dsr() {
    exercise(
        "a_host_that_is_cut_off_is_avoided_within_fall_times_interval_in_dsr",
        Way::Dsr,
        End::Host,
    );
}
