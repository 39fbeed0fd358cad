//! What `plan` says beforehand of gates that go by what connections do: at the rate of connections
//! and of what happens to them that there is.

use std::time::{Duration, Instant};

use canary_agent::{
    api::rollout::RolloutReport,
    rollout::outlook::{Outlook, Source, StepOutlook},
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    faulty::{Fault, Faulty},
    host,
    server::{HTTP_PORT, Server},
    swarm::Swarm,
    wait,
};

use crate::support::{Bench, SHOP, Way};

const NAME: &str = "shop-v2";

/// New connections a second.
const RATE: u32 = 300;

/// A gate that can decide, one that can't in its time, and one where nobody is left to compare
/// with.
const ROLLOUT: &str = r#"
[[gate]]
name = "l4"
min_duration = "3s"
deadline = "10m"
signals = [
  { name = "connect_failed", tolerate = 1.3, pass_below = 5.0 },
  { name = "slow_handshake", over = "control:p95", tolerate = 2.0, pass_below = 6.0 },
]
[[gate]]
name = "hasty"
min_duration = "1s"
deadline = "2s"
signals = [{ name = "connect_failed", tolerate = 1.3, pass_below = 1.5 }]
[[rollout]]
name = "shop-v2"
service = "shop"
to = "v2"
steps = [
  { split = "1%", gate = "hasty" },
  { split = "50%", gate = "l4" },
  { split = "100%", gate = "l4" },
]
"#;

/// What is usual of a signal, and from where that is known.
#[track_caller]
fn usual(step: &StepOutlook, name: &str) -> (f64, Source) {
    let signal = step.signals.iter().find(|signal| signal.name == name);
    let signal = signal.unwrap_or_else(|| panic!("no {name} in {step:?}"));
    (signal.usual_rate, signal.usual_source)
}

#[test]
fn a_plan_goes_by_the_connections_there_are() {
    if !host::ready("a_plan_goes_by_the_connections_there_are") {
        return;
    }
    let bench = Bench::with_servers(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)], |host| {
        // Not where the service is.
        Server::start_on(host, 1, 2)
    });
    let hosts = bench.topology.backends.iter();
    let _servers: Vec<Faulty> = hosts.map(|host| Faulty::start(host, Fault::None)).collect();
    let config = bench.service(SHOP, HTTP_PORT, &["tcp"], "") + ROLLOUT;
    let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &config);
    let silent = agent.cli(&["plan", NAME]);
    assert_eq!(silent.code, 1, "{silent:?}");
    assert!(silent.stderr.contains("--rate"), "{silent:?}");

    let swarm = Swarm::start(bench.client(), RATE);
    let answered = || {
        let seen = swarm.seen();
        seen.stable + seen.v2 + seen.refused + seen.reset
    };
    // As long as a rate is counted over; the swarm is as quick as the host lets it.
    let (begun, before) = (Instant::now(), answered());
    let known = wait::until_within(wait::patience() * 3, "what is usual", || {
        let asked = agent.cli(&["plan", NAME, "--json"]);
        if asked.code != 0 {
            return Err(format!("{asked:?}"));
        }
        let known: Outlook = asked.json();
        let counted = usual(&known.steps[0], "connect_failed").1 == Source::Counted;
        let long = begun.elapsed() > Duration::from_secs(11);
        if counted && long { Ok(known) } else { Err(format!("{known:?}")) }
    });
    let rate = (answered() - before) as f64 / begun.elapsed().as_secs_f64();
    let counted = known.connections_per_second;
    assert_eq!(known.rate_source, Source::Counted);
    assert!((0.6..1.6).contains(&(counted / rate)), "{counted} a second, sent {rate}");

    let [hasty, half, all] = &known.steps[..] else { panic!("three gates: {known:?}") };
    let (failing, _) = usual(half, "connect_failed");
    // Every two hundredth is refused.
    assert!((0.000_5..0.02).contains(&failing), "{failing}");
    let (slow, source) = usual(half, "slow_handshake");
    assert!((slow - 0.05).abs() < 1e-9 && source == Source::Defined, "{half:?}");
    assert!((half.canary_per_second / counted - 0.5).abs() < 0.01, "{half:?}");
    assert!(half.signals.iter().all(|signal| signal.smallest_fault.is_some()), "{half:?}");
    assert!(half.passes.is_some_and(|passes| passes > 0.5), "{half:?}");
    assert!(half.false_fail.is_some_and(|fails| fails <= 0.05), "{half:?}");
    assert!(hasty.passes.is_some_and(|passes| passes < 0.5), "{hasty:?}");
    assert_eq!(all.passes, None, "{all:?}");
    let warned = |what: &[&str]| {
        let all = |warning: &&String| what.iter().all(|part| warning.contains(part));
        assert!(known.warnings.iter().any(|warning| all(&warning)), "{what:?}: {known:?}");
    };
    warned(&["step 1: gate `hasty`", "by its deadline of 2s", "can't decide"]);
    warned(&["step 1: gate `hasty` finds nothing by `connect_failed` that can be relied on"]);
    warned(&["step 3: gate `l4` has nothing to compare at 100%"]);
    assert!(!known.warnings.iter().any(|warning| warning.contains("step 2")), "{known:?}");

    // At another rate less can be told, and whoever begins is warned as much.
    let fewer: Outlook =
        agent.json(&["plan", NAME, "--rate", "0.5", "--usual", "connect_failed=0.1%"]);
    assert_eq!(
        (fewer.rate_source, usual(&fewer.steps[1], "connect_failed")),
        (Source::Asked, (0.001, Source::Asked))
    );
    assert!(fewer.warnings.iter().any(|warning| warning.contains("step 2")), "{fewer:?}");
    let begins: RolloutReport = agent.json(&["rollout", "start", NAME, "--dry-run"]);
    assert!(begins.warnings.iter().any(|warning| warning.contains("`hasty`")), "{begins:?}");
    let moves = begins.change.expect("what its first share would move");
    assert_eq!((begins.share.as_deref(), moves.buckets_moved), (Some("1%"), 655));
    let shown = agent.cli(&["rollout", "start", NAME, "--dry-run"]);
    assert!(shown.stdout.contains("655 buckets would move"), "{shown:?}");
    assert!(shown.stdout.contains("warning: step 1: gate `hasty`"), "{shown:?}");
}
