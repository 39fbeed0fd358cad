//! Hundreds of connections of every kind are held open while the splits change at
//! random, backends fail their checks, are taken out and put back, weighted, removed and
//! added, and the agent is killed: none may notice.
//!
//! `CANARY_SEED` makes a run again (its changes and pauses; not how the kernel
//! schedules it). `CANARY_LONG` makes it long: every change of the issue in each
//! mode instead of in both together, and three modes more.

mod fleet;
mod history;
mod script;

use std::time::{Duration, Instant};

use canary_tests::{
    agent::{Agent, AgentOptions},
    hold::{Cause, FETCH_BYTES, Hold, Kind, Record},
    host,
    model::Random,
    netns::Namespace,
    nginx::{self, Nginx},
    server::{ECHO_PORT, HEALTH_PATH, HTTP_PORT, Server},
    stack,
    topology::{Family, Host},
};

use self::{
    fleet::Fleet,
    history::History,
    script::{Place, Script},
};
use crate::support::{Bench, ECHO, SHOP, Way, alone};

/// How many connections of each kind are held.
const HELD: &[(Kind, u32)] = &[
    (Kind::KeepAlive, 140),
    (Kind::Download, 90),
    (Kind::Fetch, 10),
    (Kind::Idle, 140),
    (Kind::Chatter, 80),
    (Kind::Udp, 40),
];

/// The same of what nginx can answer.
const HELD_BY_NGINX: &[(Kind, u32)] =
    &[(Kind::KeepAlive, 180), (Kind::Fetch, 80), (Kind::Idle, 200), (Kind::Udp, 40)];

/// Port of the servers' HTTP where nginx has the real one.
const OTHER_HTTP_PORT: u16 = 8080;

/// Above this share of the connections' time that can't be judged, because the
/// test itself stood still, a run says nothing.
const UNMEASURED_MAX: f64 = 0.05;

/// So often checks are made: a failing backend is to be down for many a change.
const CHECKS: &str = "interval = \"200ms\", timeout = \"200ms\", rise = 1, fall = 2";

/// Whether the run is the long one.
fn long() -> bool {
    std::env::var_os("CANARY_LONG").is_some()
}

/// Resets that a host has sent since it was made.
fn resets(host: &Namespace) -> u64 {
    stack::counter(host, "Tcp", "OutRsts").expect("a counter")
}

/// Versions with their numbers of backends.
const VERSIONS: &[(&str, u8)] = &[("stable", 3), ("v2", 2), ("v3", 2)];

#[track_caller]
fn exercise(test: &str, way: Way) {
    exercise_on(test, || Bench::new(way, VERSIONS));
}

#[track_caller]
fn exercise_on(test: &str, bench: impl FnOnce() -> Bench) {
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let bench = bench();
    hold(test, &bench, HELD, &|server, healthy| bench.servers[server].set_healthy(healthy));
}

#[track_caller]
fn exercise_nginx(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let Some(program) = nginx::find() else {
        // It is one server more, not one promise more: no host needs it.
        eprintln!("{test}: left out, as there is no nginx on this host");
        return;
    };
    let _alone = alone();
    let bench = Bench::with_servers(way, VERSIONS, |host| {
        Server::start_on(host, OTHER_HTTP_PORT, ECHO_PORT)
    });
    let start = |host| Nginx::start(&program, host, &[FETCH_BYTES]);
    let all: Vec<Nginx> = bench.topology.backends.iter().map(start).collect();
    hold(test, &bench, HELD_BY_NGINX, &|server, healthy| all[server].set_healthy(healthy));
}

#[track_caller]
fn hold(test: &str, bench: &Bench, held: &[(Kind, u32)], set_healthy: &dyn Fn(usize, bool)) {
    let (changes, kills) = if long() { (300, 10) } else { (150, 5) };
    let random = Random::from_environment(test);
    let health = format!("health = {{ type = \"http\", path = \"{HEALTH_PATH}\", {CHECKS} }}");
    let services = |fleet: &Fleet| {
        let weight = |service| move |host: &Host| fleet.weight(service, host);
        let (all, none) = (&Family::ALL, "health = { type = \"none\" }");
        bench.weighted_service(all, SHOP, HTTP_PORT, &["tcp"], &health, weight(SHOP))
            + &bench.weighted_service(all, ECHO, ECHO_PORT, &["tcp", "udp"], none, weight(ECHO))
    };
    let fleet = Fleet::new(&bench.topology.backends);
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::start(&bench.topology, &options, &services(&fleet));
    bench.wait_answered();
    let hold = Hold::start(bench.client(), &bench.servers, random.clone().bits());
    let started = Instant::now();
    let history = History::new(started, &agent);
    let place = Place { bench, set_healthy, services: &services };
    let mut script = Script::new(place, agent, &hold, history, random, fleet);
    for (kind, count) in held {
        for number in 0..*count {
            script.open(*kind, Family::ALL[(number % 2) as usize]);
        }
    }
    hold.wait_opened();
    let before: u64 = bench.topology.backends.iter().map(|host| resets(&host.namespace)).sum();
    script.note("all connections are open");
    script.run(changes, kills);
    let took = started.elapsed();
    let after: u64 = bench.topology.backends.iter().map(|host| resets(&host.namespace)).sum();
    let unmeasured = hold.unmeasured();
    let made = script.made();
    let Script { history, agent, .. } = script;
    let records = hold.finish();
    let faults = |cause| count(&records, |r| r.faults.iter().any(|f| f.cause == cause));
    let longest = records.iter().map(|r| r.longest).max().unwrap_or_default();
    let bytes: u64 = records.iter().map(|r| r.bytes).sum();
    let elsewhere = history.elsewhere();
    println!(
        "{test}: {} connections, {changes} changes and {kills} kills in {:.1} s: {} broken, {} stalled, \
         {} corrupted, {} moved, {} resets; longest wait {longest:.0?}, {:.1} MB checked, \
         {elsewhere} had their bucket moved, {:.2} % of the time not measurable\n  {made}",
        records.len(),
        took.as_secs_f64(),
        faults(Cause::Broken),
        faults(Cause::Stalled),
        faults(Cause::Corrupted),
        faults(Cause::Moved),
        after - before,
        bytes as f64 / 1e6,
        unmeasured * 100.0,
    );
    if count(&records, |record| !record.faults.is_empty()) > 0 {
        panic!("{test}: {}", history.blame(&agent, &records));
    }
    assert_eq!(after, before, "{test}: backends have sent resets\n{}", history.changes());
    // Else nothing was tried.
    assert!(elsewhere > records.len() / 2, "the buckets of {elsewhere} connections moved");
    assert!(
        unmeasured < UNMEASURED_MAX,
        "{test}: not measurable: for {:.1} % of the connections' time the test itself stood still; \
         run it again when less else runs here",
        unmeasured * 100.0
    );
}

fn count(records: &[Record], is: impl Fn(&Record) -> bool) -> usize {
    records.iter().filter(|record| is(record)).count()
}

/// Shown in the reports in place of moments.
fn seconds(time: Duration) -> String {
    format!("{:7.3} s", time.as_secs_f64())
}

#[test]
fn nothing_that_is_open_notices_changes_and_kills_in_nat() {
    exercise("nothing_that_is_open_notices_changes_and_kills_in_nat", Way::NatTwoArmed);
}

#[test]
fn nothing_that_is_open_notices_changes_and_kills_in_dsr() {
    exercise("nothing_that_is_open_notices_changes_and_kills_in_dsr", Way::Dsr);
}

#[test]
fn nothing_that_is_open_notices_changes_and_kills_in_one_armed_nat() {
    // The same program as two-armed but for the interface that a packet leaves by.
    if long() {
        exercise(
            "nothing_that_is_open_notices_changes_and_kills_in_one_armed_nat",
            Way::NatOneArmed,
        );
    }
}

#[test]
fn nothing_that_is_open_notices_changes_and_kills_in_ipip() {
    // Steered and tracked as `dsr`, but for what is done with a packet at last.
    if long() {
        let test = "nothing_that_is_open_notices_changes_and_kills_in_ipip";
        exercise_on(test, || Bench::wrapped("ipip", VERSIONS));
    }
}

#[test]
fn nothing_that_is_open_notices_changes_and_kills_in_gue() {
    if long() {
        let test = "nothing_that_is_open_notices_changes_and_kills_in_gue";
        exercise_on(test, || Bench::wrapped("gue", VERSIONS));
    }
}

#[test]
fn what_is_open_to_a_real_nginx_notices_neither_in_nat() {
    exercise_nginx("what_is_open_to_a_real_nginx_notices_neither_in_nat", Way::NatTwoArmed);
}

#[test]
fn what_is_open_to_a_real_nginx_notices_neither_in_dsr() {
    exercise_nginx("what_is_open_to_a_real_nginx_notices_neither_in_dsr", Way::Dsr);
}
