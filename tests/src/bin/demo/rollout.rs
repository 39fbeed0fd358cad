//! `cargo xtask demo rollout`: a release that has a fault, or none, and a rollout that finds out by
//! itself, from nothing but packets.

use std::time::{Duration, Instant};

use canary_agent::api::rollout::{RolloutReport, RolloutStatus, Rollouts};
use canary_tests::{
    agent::{Agent, AgentOptions},
    client::version_of,
    faulty::{Fault, Faulty},
    server::HTTP_PORT,
    swarm::{Seen, Swarm},
    topology::{Family, Options, Topology, VIP_V4, VIP_V6},
    wait,
};
use clap::{Args, ValueEnum};

const NAME: &str = "shop-v2";

/// Rollouts that hang are ended by then.
const LIMIT: Duration = Duration::from_secs(300);

/// Between two looks at how it stands.
const LOOK: Duration = Duration::from_millis(250);

/// So many answers of stable say what is usual, before the rollout begins.
const USUAL: u64 = 500;

/// Servers refuse one connection in two hundred and reset one in a hundred, also those of a good
/// release.
const ROLLOUT: &str = r#"
[[gate]]
name = "l4"
min_duration = "3s"
deadline = "2m"
signals = [
  { name = "connect_failed", tolerate = 1.3, pass_below = 5.0 },
  { name = "slow_handshake", over = "control:p98", tolerate = 1.2, pass_below = 6.0 },
  { name = "server_reset", tolerate = 1.3, pass_below = 5.0 },
]
[[rollout]]
name = "shop-v2"
service = "shop"
to = "v2"
steps = [{ split = "5%", hold = "3s" }, { split = "20%", gate = "l4" }, { split = "50%", gate = "l4" }, { split = "100%" }]
"#;

/// What is asked of the demo.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// What is wrong with v2.
    #[arg(long, value_enum, default_value_t = Wrong::Refuse)]
    fault: Wrong,
    /// New connections a second.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(50..=5_000))]
    rate: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wrong {
    /// It refuses 3 % of its connections.
    Refuse,
    /// It answers the handshake 80 ms late.
    Slow,
    /// It resets one connection in ten.
    Reset,
    /// Nothing: it is as good as stable.
    None,
}

/// Runs it; returns whether it went as it should.
pub(crate) fn run(asked: &Asked) -> bool {
    println!("Building a client, a balancer and four backends in network namespaces");
    let topology = Topology::new(&Options::two_armed(&[("stable", 2), ("v2", 2)]));
    wait::check();
    let fault = match asked.fault {
        Wrong::Refuse => Fault::Refuse,
        Wrong::Slow => Fault::Slow,
        Wrong::Reset => Fault::Reset,
        Wrong::None => Fault::None,
    };
    let servers = topology.backends.iter().map(|host| {
        let of_v2 = version_of(&host.name) == "v2";
        Faulty::start(host, if of_v2 { fault } else { Fault::None })
    });
    let _servers: Vec<Faulty> = servers.collect();
    println!("Starting canary-agent on the balancer");
    let config = format!(
        "[[service]]\nname = \"shop\"\nvip = [\"{VIP_V4}\", \"{VIP_V6}\"]\n\
         ports = [\"tcp/{HTTP_PORT}\"]\nforward = \"nat\"\ncontrol = \"stable\"\n\
         health = {{ type = \"none\" }}\n\n{}\n{ROLLOUT}",
        topology.versions_toml(&Family::ALL, HTTP_PORT)
    );
    let agent = Agent::start(&topology, &AgentOptions::native(&topology), &config);
    let swarm = Swarm::start(&topology.client, asked.rate);
    wait::until("answers of stable", || {
        let seen = swarm.seen();
        (seen.stable >= USUAL).then_some(()).ok_or_else(|| format!("{seen:?}"))
    });
    println!("Starting the rollout: {}\n", wrong(asked.fault));
    let before = swarm.seen();
    let begun = Instant::now();
    let _: RolloutReport = agent.json(&["rollout", "start", NAME]);
    let status = follow(&agent, begun);
    let took = begun.elapsed();
    let after = swarm.seen();
    drop(swarm);
    let back = agent.gave_back_within();
    summary(asked.fault, &status, (took, back), &before, &after)
}

const fn wrong(fault: Wrong) -> &'static str {
    match fault {
        Wrong::Refuse => "v2 refuses 3 % of its connections, stable 0.5 %",
        Wrong::Slow => "v2 answers each handshake 80 ms late",
        Wrong::Reset => "v2 resets one connection in ten, stable one in a hundred",
        Wrong::None => "v2 is as good as stable",
    }
}

/// Follows it to its end, and tells each step.
fn follow(agent: &Agent<'_>, begun: Instant) -> RolloutStatus {
    let mut told = String::new();
    loop {
        wait::check();
        let status = agent.json::<Rollouts>(&["rollout", "status", NAME]).rollouts.remove(0);
        let line = format!(
            "{:<10} step {}, v2 has {}",
            status.state,
            status.step.unwrap_or_default(),
            status.share.as_deref().unwrap_or("-")
        );
        if line != told {
            println!("{:>7.1} s  {line}", begun.elapsed().as_secs_f64());
            told = line;
        }
        let over =
            matches!(status.state.as_str(), "completed" | "aborted") || status.needs_operator;
        if over || begun.elapsed() > LIMIT {
            return status;
        }
        wait::pause_until(Instant::now() + LOOK);
    }
}

/// Says how it went; returns whether it was right.
fn summary(
    fault: Wrong,
    status: &RolloutStatus,
    (took, back): (Duration, Option<Duration>),
    before: &Seen,
    after: &Seen,
) -> bool {
    let hit = match fault {
        Wrong::Refuse => after.refused - before.refused,
        Wrong::Slow => after.late - before.late,
        Wrong::Reset => after.reset - before.reset,
        Wrong::None => 0,
    };
    println!("\nVerdict:      {}", status.state);
    if let Some(reason) = &status.reason {
        println!("Because:      {reason}");
    }
    println!("After:        {:.1} s", took.as_secs_f64());
    if let Some(back) = back {
        println!("In the table: {:.1} ms after the verdict", back.as_secs_f64() * 1000.0);
    }
    println!(
        "Connections:  {} answered by v2, {} by stable",
        after.v2 - before.v2,
        after.stable - before.stable
    );
    let both =
        if matches!(fault, Wrong::Refuse | Wrong::Reset) { ", of both versions" } else { "" };
    println!("Clients hit:  {hit}{both}");
    let expected = if fault == Wrong::None { "completed" } else { "aborted" };
    let good = status.state == expected && after.failed == before.failed;
    if after.failed > before.failed {
        println!("Other errors: {}", after.failed - before.failed);
    }
    println!(
        "\n{}",
        if good { "Result: as it should be." } else { "Result: NOT as it should be." }
    );
    good
}
