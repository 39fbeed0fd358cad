//! Rollouts that go by what connections do: the healthy release reaches all, and each fault is
//! found from nothing but packets.

use std::{fs, ops::Range, time::Instant};

use canary_agent::api::rollout::{EvidenceRow, RolloutHistory, RolloutReport, RolloutStatus};
use canary_tests::{
    agent::{Agent, AgentOptions},
    asked,
    client::version_of,
    faulty::{Fault, Faulty},
    host,
    server::Server,
    swarm::Swarm,
    topology::Family,
    wait,
};
use serde_json::Value;

use crate::support::{Bench, Pool, SHOP, Way, version};

const NAME: &str = "shop-v2";

/// New connections a second.
const RATE: u32 = 400;

/// Both versions have some bad connections, as services do: about one in a hundred. On a busy host
/// up to half of all handshakes may be slower than what was slow before it was.
const ROLLOUT: &str = r#"
[[gate]]
name = "l4"
min_duration = "3s"
deadline = "2m"
signals = [
  { name = "connect_failed", tolerate = 1.3, pass_below = 5.0 },
  { name = "slow_handshake", over = "control:p98", tolerate = 1.2, pass_below = 6.0 },
  { name = "server_reset", tolerate = 1.3, pass_below = 5.0 },
  { name = "client_reset", observe = true },
]
[[rollout]]
name = "shop-v2"
service = "shop"
to = "v2"
steps = [{ split = "50%", gate = "l4" }, { split = "100%" }]
"#;

#[track_caller]
fn open(bench: &Bench, clients: Range<u32>) -> Pool {
    let mut pool = Pool::default();
    for index in clients {
        let family = Family::ALL[index as usize % 2];
        let to = std::net::SocketAddr::new(family.vip(), canary_tests::server::HTTP_PORT);
        // One that is refused or reset is none that is open.
        let opened = bench.client().run(|| {
            let mut connection =
                canary_tests::client::Connection::open_here(family.client(index), to).ok()?;
            let name = connection.name().ok()?;
            Some((connection, name))
        });
        pool.open.extend(opened);
    }
    pool
}

/// How many times each is run.
fn times() -> Option<u32> {
    asked::number("CANARY_ROLLOUTS").map(|times| times as u32)
}

fn release(test: &str, way: Way, fault: Fault) {
    if !host::ready(test) {
        return;
    }
    // Not where the service is.
    let bench =
        Bench::with_servers(way, &[("stable", 2), ("v2", 2)], |host| Server::start_on(host, 1, 2));
    let _servers: Vec<Faulty> = bench
        .topology
        .backends
        .iter()
        .map(|host| {
            let of_v2 = version_of(&host.name) == "v2";
            Faulty::start(host, if of_v2 { fault } else { Fault::None })
        })
        .collect();
    let signals = if way == Way::Dsr {
        ROLLOUT.replace("  { name = \"server_reset\", tolerate = 1.3, pass_below = 5.0 },\n", "")
    } else {
        ROLLOUT.to_owned()
    };
    let config = bench.service(SHOP, canary_tests::server::HTTP_PORT, &["tcp"], "") + &signals;
    let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &config);
    for run in 1..=times().unwrap_or(1) {
        agent.split(SHOP, "v2", "0");
        let swarm = Swarm::start(bench.client(), RATE);
        wait::until("enough of stable", || {
            let seen = swarm.seen();
            (seen.stable > 300).then_some(()).ok_or_else(|| format!("{seen:?}"))
        });
        let before = swarm.seen();
        let (new, begun) = (version(&agent.status(), SHOP, "v2").connections, Instant::now());
        let start: RolloutReport = agent.json(&["rollout", "start", NAME]);
        assert!(start.applied);
        wait::until("half of the connections", || {
            let seen = swarm.seen();
            (seen.v2 > 20).then_some(()).ok_or_else(|| format!("{seen:?}"))
        });
        let mut pool = open(&bench, 200_000 + run * 100..200_030 + run * 100);
        assert!(pool.open.iter().any(|(_, name)| version_of(name) == "v2"));
        let output = agent.cli(&["rollout", "status", NAME, "--wait", "3m", "--json"]);
        let took = begun.elapsed();
        let after = swarm.seen();
        let status: RolloutStatus = output.json();
        let on_v2 = version(&agent.status(), SHOP, "v2").connections - new;
        let hit = match fault {
            Fault::None => 0,
            Fault::Refuse => after.refused - before.refused,
            Fault::Slow => after.late - before.late,
            Fault::Reset => after.reset - before.reset,
        };
        println!(
            "{test}: {fault:?}: run {run}: {} after {took:.1?}, {on_v2} connections on v2, {hit} hit, in the table {:.1?} \
             after the verdict: {}",
            status.state,
            agent.gave_back_within().unwrap_or_default(),
            status.reason.clone().unwrap_or_default()
        );
        let expected = if fault == Fault::None { 0 } else { 3 };
        let history: RolloutHistory = agent.json(&["rollout", "history", NAME, "--evidence"]);
        assert_eq!(output.code, expected, "{status:?} {after:?} {history:?}\n{}", agent.log());
        let share = if fault == Fault::None { "100%" } else { "0%" };
        assert_eq!(version(&agent.status(), SHOP, "v2").asked_text, share);
        let reason = status.reason.unwrap_or_default();
        let by = match fault {
            Fault::None => "",
            Fault::Refuse => "connect_failed",
            Fault::Slow => "slow_handshake",
            Fault::Reset => "server_reset",
        };
        assert!(reason.contains(by), "{reason}");
        pool.assert_where_they_were(&status.state);
        replayed(&agent, &history, if fault == Fault::None { "pass" } else { "fail" });
        drop(swarm);
    }
}

/// What was kept of the last run says the same when it is looked at again.
fn replayed(agent: &Agent<'_>, history: &RolloutHistory, verdict: &str) {
    let run = history.runs.first().expect("a run");
    let complete = |row: &&EvidenceRow| row.step == 1 && row.answer.is_none();
    assert!(run.evidence.iter().any(|row| complete(&row)), "{run:?}");
    let output = agent.cli(&["rollout", "history", NAME, "--csv"]);
    assert_eq!(output.code, 0, "{output:?}");
    let file = agent.folder().join("recording.csv");
    fs::write(&file, &output.stdout).expect("a file");
    let file = file.display().to_string();
    let lines: Vec<Value> = agent.json(&["replay", &file, "--gate", "l4"]);
    let last = lines.last().expect("a line");
    assert_eq!(last["verdict"], verdict, "{}\n{lines:#?}", output.stdout);
}

#[test]
fn a_healthy_release_reaches_all() {
    release("a_healthy_release_reaches_all", Way::NatTwoArmed, Fault::None);
}

#[test]
fn one_that_refuses_connections_is_taken_back() {
    release("one_that_refuses_connections_is_taken_back", Way::NatTwoArmed, Fault::Refuse);
}

#[test]
fn one_that_answers_late_is_taken_back() {
    release("one_that_answers_late_is_taken_back", Way::NatTwoArmed, Fault::Slow);
}

#[test]
fn one_that_resets_connections_is_taken_back() {
    release("one_that_resets_connections_is_taken_back", Way::NatTwoArmed, Fault::Reset);
}

/// Steps of `dsr` are prepared, which takes seconds: the other faults are taken back with
/// `CANARY_ROLLOUTS`, too.
#[test]
fn one_that_answers_late_is_taken_back_in_dsr() {
    let test = "one_that_answers_late_is_taken_back_in_dsr";
    release(test, Way::Dsr, Fault::Slow);
    if times().is_some() {
        release(test, Way::Dsr, Fault::Refuse);
        release(test, Way::Dsr, Fault::None);
    }
}
