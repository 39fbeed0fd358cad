//! A rollout that goes to an audience first: its clients have the new version while others have not,
//! everyone comes after and includes them, and an abort takes both back at once. No connection
//! notices any of it.

use std::ops::Range;

use canary_agent::api::rollout::{RolloutHistory, RolloutReport, RolloutStatus, Rollouts};
use canary_tests::{
    agent::{Agent, AgentOptions},
    host, stats,
    topology::Family,
    wait,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, Pool, Way, of_version};

const NAME: &str = "shop-v2";

/// Clients by number, 64 of them.
const STAFF: Range<u32> = 0..64;
/// Some of the others.
const OTHERS: Range<u32> = 1024..1424;

const KEYS: &str = r#"
[[audience]]
name = "staff"
cidr = ["10.64.0.0/18", "fd00:9::/42"]
[[gate]]
name = "l4"
deadline = "1h"
signals = [{ name = "connect_failed", tolerate = 1.2, pass_below = 3.0 }]
[[rollout]]
name = "shop-v2"
service = "shop"
to = "v2"
steps = [
  { audience = "staff", split = "100%", gate = "l4" },
  { split = "10%", hold = "1h" },
  { split = "100%" },
]
"#;

/// How many of these clients' new connections v2 gets.
#[track_caller]
fn of_v2(bench: &Bench, clients: Range<u32>) -> u64 {
    let pool = bench.connect(Family::V4, clients);
    let names: Vec<String> = pool.open.into_iter().map(|(_, name)| name).collect();
    of_version(&names, "v2")
}

/// Connections of both families that stay open, of staff and of others.
#[track_caller]
fn open(bench: &Bench, pool: &mut Pool) {
    for family in Family::ALL {
        pool.open.extend(bench.connect(family, 0..8).open);
        pool.open.extend(bench.connect(family, 1024..1044).open);
    }
}

#[track_caller]
fn wait_for(agent: &Agent<'_>, what: &str, holds: impl Fn(&RolloutStatus) -> bool) {
    wait::until(what, || {
        let status = agent.json::<Rollouts>(&["rollout", "status", NAME]).rollouts.remove(0);
        if holds(&status) { Ok(()) } else { Err(format!("{status:?}")) }
    });
}

#[test]
fn staff_comes_first_then_everyone_and_an_abort_takes_both_back() {
    let test = "staff_comes_first_then_everyone_and_an_abort_takes_both_back";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 2)]);
    let services = bench.services("stickiness = \"client\"\nbuckets = 4096") + KEYS;
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::start(&bench.topology, &options, &services);
    bench.wait_answered();
    let mut pool = Pool::default();
    open(&bench, &mut pool);
    assert_eq!((of_v2(&bench, STAFF), of_v2(&bench, OTHERS)), (0, 0));
    let begun: RolloutReport = agent.json(&["rollout", "start", NAME]);
    assert_eq!(begun.rollout.steps[0].audience.as_deref(), Some("staff"));
    let staff = |share: &'static str| {
        move |status: &RolloutStatus| status.audiences.first().is_some_and(|one| one.share == share)
    };
    wait_for(&agent, "staff's share", staff("100%"));
    assert_eq!((of_v2(&bench, STAFF), of_v2(&bench, OTHERS)), (64, 0));
    pool.assert_where_they_were("staff has all");
    open(&bench, &mut pool);
    let drawn = agent.cli(&["rollout", "status", NAME]).stdout;
    assert!(drawn.contains("of staff"), "{drawn}");
    // Its gate has staff's connections on one side and everyone else's on the other.
    wait::until("evidence of both", || {
        of_v2(&bench, 0..16);
        of_v2(&bench, 1024..1044);
        let history: RolloutHistory = agent.json(&["rollout", "history", NAME, "--evidence"]);
        let mut rows = history.runs[0].evidence.iter();
        let both = |share: f64| share > 0.0 && share < 1.0;
        match rows.any(|row| row.step == 1 && row.share.is_some_and(both)) {
            true => Ok(()),
            false => Err(format!("{history:?}")),
        }
    });
    // An agent that is killed in it goes on in it.
    agent.stop(Signal::SIGKILL);
    agent.run();
    agent.wait_ready();
    assert_eq!((of_v2(&bench, STAFF), of_v2(&bench, OTHERS)), (64, 0));

    let _: RolloutReport = agent.json(&["rollout", "promote", NAME]);
    wait_for(&agent, "everyone's share", |status| status.share.as_deref() == Some("10%"));
    wait_for(&agent, "staff's share still", staff("100%"));
    assert_eq!(of_v2(&bench, STAFF), 64);
    stats::assert_share("everyone", of_v2(&bench, OTHERS), 400, 0.1);
    pool.assert_where_they_were("everyone has a tenth");
    open(&bench, &mut pool);

    let over: RolloutReport = agent.json(&["rollout", "abort", NAME, "--reason", "a test"]);
    assert_eq!(over.rollout.state, "aborted");
    assert_eq!((of_v2(&bench, STAFF), of_v2(&bench, OTHERS)), (0, 0));
    pool.assert_where_they_were("aborted");
}
