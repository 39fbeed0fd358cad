//! `cargo xtask demo`: a canary release with real traffic, on one machine.
//!
//! A client host, the balancer and five backends in network namespaces; real HTTP
//! servers; the real agent from a configuration file; the split moved with the real
//! command line. Ends with a summary, and with an exit code other than 0 if
//! anything broke. Interrupted at any point it leaves nothing behind.

mod load;
mod rollout;
mod show;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use canary_agent::api::model::Status;
use canary_tests::{
    agent::{Agent, AgentOptions},
    hold::Tally,
    host,
    netns::Namespace,
    server::{HTTP_PORT, Server},
    topology::{Family, Options, Topology, VIP_V4, VIP_V6},
    wait,
};
use clap::{Parser, Subcommand, ValueEnum};

use self::{
    load::Load,
    show::{HeldRow, Live, Row},
};

/// The shares of v2, in this order.
const STEPS: [&str; 6] = ["0%", "1%", "5%", "50%", "100%", "0%"];

/// Steps at whose beginning long connections are opened: all on the old version,
/// and on both.
const HOLD_AT: [usize; 2] = [0, 3];

/// Long connections that are opened each time.
const HELD_EACH: u32 = 30;

/// Time between two looks at the numbers.
const REDRAW: Duration = Duration::from_millis(250);

/// Time between two lines where they can't replace each other.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// The exit code for a host that may not run this (SPEC: not permitted).
const NOT_PERMITTED: u8 = 77;

/// A canary release with real traffic, in network namespaces on this machine.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask demo", args_conflicts_with_subcommands = true)]
struct Arguments {
    /// Another demo than that of a split that is moved by hand.
    #[command(subcommand)]
    what: Option<What>,
    /// Leave everything running at the end, until Ctrl-C, and print commands to try.
    #[arg(long)]
    keep: bool,
    /// How the balancer sends packets on.
    #[arg(long, value_enum, default_value_t = Forward::Nat)]
    forward: Forward,
    /// What decides about a client's version.
    #[arg(long, value_enum, default_value_t = Stickiness::Connection)]
    stickiness: Stickiness,
    /// Length of a step.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// New connections a second.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    rate: u32,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum What {
    /// A rollout that decides by what connections do.
    Rollout(rollout::Asked),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Forward {
    /// Addresses are translated; the backends lie behind the balancer.
    Nat,
    /// Backends answer directly; all lie on one switch.
    Dsr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stickiness {
    /// Every connection anew.
    Connection,
    /// The client's address.
    Client,
    /// The client's network.
    Subnet,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    wait::interrupt_on_signals();
    if let Some(reason) = host::obstacle() {
        eprintln!("demo: {reason}: run it as root");
        return ExitCode::from(NOT_PERMITTED);
    }
    let demo = || match arguments.what {
        Some(What::Rollout(asked)) => rollout::run(&asked),
        None => run(&arguments),
    };
    match catch_unwind(AssertUnwindSafe(demo)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(panic) if panic.is::<wait::Interrupted>() => {
            eprintln!("\ndemo: interrupted; everything is taken down");
            ExitCode::from(130)
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(arguments: &Arguments) -> bool {
    let versions = [("stable", 3), ("v2", 2)];
    println!("Building a client, a balancer and five backends in network namespaces");
    let topology = Topology::new(&match arguments.forward {
        Forward::Nat => Options::two_armed(&versions),
        Forward::Dsr => Options::one_armed_dsr(&versions),
    });
    wait::check();
    let servers = Server::start_all(&topology.backends);
    println!("Starting canary-agent on the balancer");
    let options = AgentOptions {
        // In the balancer's namespace, so it meets nobody.
        listen: "127.0.0.1:9109".to_owned(),
        ..AgentOptions::native(&topology)
    };
    let agent = Agent::start(&topology, &options, &services(arguments, &topology));

    let mut load = Load::start(&topology.client, &servers, "v2", STEPS.len() + 1, arguments.rate);
    let live = Live::new();
    let mut rows = Vec::new();
    for (index, share) in STEPS.iter().enumerate() {
        rows.push(step(arguments, &agent, &mut load, &live, index, share));
    }
    load.set_step(None);
    let still_open = load.held().open;
    let good = show::summary(&rows, held(&load), still_open, load.other_errors(), &load.reasons());
    if arguments.keep {
        print_commands(&topology, &agent);
        keep(&agent, &load);
    }
    load.stop();
    good
}

/// The configuration after its `[agent]` table.
fn services(arguments: &Arguments, topology: &Topology) -> String {
    let forward = match arguments.forward {
        Forward::Nat => "nat",
        Forward::Dsr => "dsr",
    };
    let stickiness = match arguments.stickiness {
        Stickiness::Connection => "stickiness = \"connection\"",
        Stickiness::Client => "stickiness = \"client\"",
        Stickiness::Subnet => "stickiness = \"subnet\"\nprefix = { v4 = 24, v6 = 56 }",
    };
    format!(
        "[[service]]\nname = \"shop\"\nvip = [\"{VIP_V4}\", \"{VIP_V6}\"]\n\
         ports = [\"tcp/{HTTP_PORT}\"]\nforward = \"{forward}\"\n{stickiness}\n\
         control = \"stable\"\nhealth = {{ type = \"none\" }}\n\n{}",
        topology.versions_toml(&Family::ALL, HTTP_PORT)
    )
}

/// Sets the split and watches it for a while.
fn step(
    arguments: &Arguments,
    agent: &Agent<'_>,
    load: &mut Load,
    live: &Live,
    index: usize,
    share: &str,
) -> Row {
    // Connections that begin during the change may see either split.
    load.set_step(None);
    let report = agent.split("shop", "v2", share);
    let in_force = report
        .versions
        .iter()
        .find(|version| version.name == "v2")
        .map_or(0.0, |version| version.in_force);
    load.set_step(Some(index));
    if HOLD_AT.contains(&index) {
        load.hold(HELD_EACH);
    }

    let started = Instant::now();
    let end = started + Duration::from_secs(arguments.seconds);
    let mut shown = started;
    loop {
        let interval = if live.in_place() { REDRAW } else { PLAIN_INTERVAL };
        shown += interval;
        wait::pause_until(shown.min(end));
        wait::check();
        let row = row(load, index, share, in_force);
        let over = Instant::now() >= end;
        let per_second = row.answered as f64 / started.elapsed().as_secs_f64();
        live.row(&row, per_second, held(load), over);
        if over {
            return row;
        }
    }
}

fn row(load: &Load, index: usize, asked: &str, in_force: f64) -> Row {
    let count = load.step(index);
    // In this order: what is answered in between is at worst not counted as the canary's.
    let canary = count.canary.load(Ordering::SeqCst);
    Row {
        asked: asked.to_owned(),
        in_force,
        answered: count.answered.load(Ordering::SeqCst),
        canary,
        errors: count.errors.load(Ordering::SeqCst),
    }
}

fn held(load: &Load) -> HeldRow {
    let Tally { opened, open, broken, bytes, .. } = load.held();
    HeldRow { opened, open, broken, bytes_checked: bytes }
}

fn print_commands(topology: &Topology, agent: &Agent<'_>) {
    let enter = |namespace: &Namespace| format!("nsenter --net=/run/netns/{}", namespace.name());
    let balancer = enter(&topology.balancer);
    let command =
        format!("{balancer} {} --socket {}", agent.binary().display(), agent.socket().display());
    println!(
        "\nEverything keeps running until Ctrl-C. To try in a second terminal, as root:\n
  # what the agent says
  {command} status --watch
  # a fifth of all new connections to v2, and back
  {command} split shop v2=20%
  {command} split shop v2=0
  # where a client would go, and why
  {command} explain shop --from 10.64.1.1:40000
  # be a client
  {} curl --interface 10.64.1.1 http://{VIP_V4}/
  # metrics and dashboard listen in the balancer's namespace
  {balancer} curl http://127.0.0.1:9109/metrics
  # configuration and log
  less {}/agent.toml {}/agent.log\n",
        enter(&topology.client),
        agent.folder().display(),
        agent.folder().display(),
    );
}

/// Shows what the user does with the split, until interrupted: that is how this ends well.
fn keep(agent: &Agent<'_>, load: &Load) {
    let live = Live::new();
    // The step after the last: counted, and compared with nothing.
    let index = STEPS.len();
    load.set_step(Some(index));
    let mut before = row(load, index, "", 0.0);
    while !wait::interrupted() {
        let looked = Instant::now();
        let interval = if live.in_place() { Duration::from_secs(1) } else { PLAIN_INTERVAL };
        wait::pause_until(looked + interval);
        if wait::interrupted() {
            break;
        }
        let output = agent.cli(&["status", "--json"]);
        // The user may have stopped the agent, to see what happens.
        let (asked, in_force) = if output.code == 0 {
            canary_share(&output.json())
        } else {
            ("no agent".to_owned(), f64::NAN)
        };
        let now = row(load, index, &asked, in_force);
        let recent = Row {
            answered: now.answered - before.answered,
            canary: now.canary.saturating_sub(before.canary),
            ..now.clone()
        };
        let per_second = recent.answered as f64 / looked.elapsed().as_secs_f64();
        live.row(&recent, per_second, held(load), false);
        before = now;
    }
}

/// Asked share and share in force of v2.
fn canary_share(status: &Status) -> (String, f64) {
    status
        .services
        .iter()
        .flat_map(|service| &service.versions)
        .find(|version| version.name == "v2")
        .map_or_else(
            || ("-".to_owned(), 0.0),
            |version| (version.asked_text.clone(), version.in_force),
        )
}
