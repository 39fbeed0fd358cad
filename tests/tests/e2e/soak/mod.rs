//! All that may happen to an agent, over and over, under traffic: it is killed, upgraded, reloaded
//! and stopped, its state is deleted, damaged, full and read-only, while connections are held open
//! and new ones come.
//!
//! None of either may break, none may go to a version that the split in force does not send it
//! to, no counter may go back, and after each event the split is the one that the audit trail
//! says. `CANARY_LONG` makes it the whole; `CANARY_SEED` makes a run again.

mod disk;
mod events;
mod splits;

use std::time::{Duration, Instant};

use canary_tests::{
    agent::Agent,
    hold::{Hold, Kind, Record},
    host,
    model::Random,
    topology::Family,
};

use self::{disk::SmallDisk, events::Soak, splits::Splits};
use crate::{
    fresh::{self, Fresh},
    support::{Bench, Way, alone},
};

/// How many connections of each kind are held: 200.
const HELD: &[(Kind, u32)] = &[
    (Kind::KeepAlive, 60),
    (Kind::Download, 30),
    (Kind::Fetch, 10),
    (Kind::Idle, 60),
    (Kind::Chatter, 20),
    (Kind::Udp, 20),
];

/// Clients of new connections, of each family; which bucket each is in is asked beforehand.
const CLIENTS: u32 = 128;
const FIRST_CLIENT: u32 = 10_000;

/// New connections: 500 a second.
const WORKERS: u32 = 8;
const PACE: Duration = Duration::from_millis(16);

/// How long a new connection and its answer may take: a lost SYN is sent again after a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// Above this share of the connections' time that can't be judged a run says nothing.
const UNMEASURED_MAX: f64 = 0.05;

/// Whether the run is the whole one.
fn long() -> bool {
    std::env::var_os("CANARY_LONG").is_some()
}

#[track_caller]
fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let mut random = Random::from_environment(test);
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    let options = events::options(&bench);
    let services = events::services(&bench, &mut random);
    let agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    let disk = SmallDisk::over(&agent.folder().join("state"));
    let mut soak = Soak::start(&bench, agent, &disk, random.clone());
    bench.wait_answered();

    let hold = Hold::start(bench.client(), &bench.servers, random.bits());
    let mut next = 0;
    for (kind, count) in HELD {
        for number in 0..*count {
            let family = Family::ALL[(number % 2) as usize];
            hold.open(*kind, family, family.client(next));
            next += 1;
        }
    }
    hold.wait_opened();
    let fresh = Fresh {
        clients: FIRST_CLIENT..FIRST_CLIENT + CLIENTS,
        workers: WORKERS,
        pace: PACE,
        patience: PATIENCE,
    };
    let begun = Instant::now();
    let arrivals = fresh.start(&bench);
    let happened = soak.run(long());
    let took = begun.elapsed();
    let arrivals = arrivals.finish();
    let failed = fresh::failures(&arrivals);
    let Soak { splits, .. } = soak;
    let astray = splits.astray(&arrivals);
    let canaries = arrivals.iter().filter(|a| a.name.as_ref().is_ok_and(|n| n.starts_with("v2")));
    let canaries = canaries.count();
    let unmeasured = hold.unmeasured();
    let records = hold.finish();
    let faulty: Vec<&Record> = records.iter().filter(|r| !r.faults.is_empty()).collect();
    println!(
        "{test}: {happened} in {:.1} s: {} connections held, {} of them with faults; {} new ones ({:.0} a second), \
         {} failed, {} not by the split in force, of {} splits; {:.2} % not measurable",
        took.as_secs_f64(),
        records.len(),
        faulty.len(),
        arrivals.len(),
        arrivals.len() as f64 / took.as_secs_f64(),
        failed.len(),
        astray.len(),
        splits.len(),
        unmeasured * 100.0,
    );
    assert!(faulty.is_empty(), "{test}: {faulty:#?}");
    assert!(failed.is_empty(), "{test}: {failed:#?}");
    assert!(astray.is_empty(), "{test}: {astray:#?}");
    // Else nothing was tried.
    assert!(arrivals.len() > 500 && splits.len() > 5, "{test}");
    assert!(canaries > 100 && canaries < arrivals.len() - 100, "{test}: {canaries} went to v2");
    assert!(
        unmeasured < UNMEASURED_MAX,
        "{test}: not measurable: run it again when less runs here"
    );
}

#[test]
fn nothing_notices_what_happens_to_the_agent_in_nat() {
    exercise("nothing_notices_what_happens_to_the_agent_in_nat", Way::NatTwoArmed);
}

#[test]
fn nothing_notices_what_happens_to_the_agent_in_dsr() {
    exercise("nothing_notices_what_happens_to_the_agent_in_dsr", Way::Dsr);
}
