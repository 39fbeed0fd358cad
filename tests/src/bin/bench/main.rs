//! Figures of the packet path (`cargo xtask bench packet`, `bench scale`, `bench cores`, `bench flows`, `bench audiences`)
//! and of the agent (`bench control`), of packets a second and of what clients get beside what else there is
//! (`bench wire`, `bench peers`), and whether the packet path has become slower (`bench --check`).

mod audiences;
mod check;
mod control;
mod cores;
mod counters;
mod cpu;
mod flows;
mod packet;
mod page;
mod peers;
mod scale;
mod wire;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Benchmarks of canary-xdp.
#[derive(Parser)]
#[command(about, long_about = None, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Options {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    check: check::Arguments,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Nanoseconds a packet, and the programs' sizes
    Packet(packet::Arguments),
    /// Nanoseconds a packet against the numbers of services, flows, networks and backends
    Scale(scale::Arguments),
    /// Packets on two processors at the same time, against one alone
    Cores(cores::Arguments),
    /// A table full of flows: its memory, the time of a pass over it, and packets meanwhile
    Flows(flows::Flows),
    /// Packets of clients with routes, and networks on their way into the kernel
    Audiences(audiences::Arguments),
    /// Packets a second through veth pairs: ours, the least programs, the kernel's forwarding, nftables
    Wire(wire::Arguments),
    /// The agent itself: start, memory, idle time, splits and reloads
    Control(control::Arguments),
    /// New connections, requests, times and processors, beside nftables, HAProxy and nginx
    Peers(peers::Arguments),
}

fn main() -> Result<ExitCode> {
    let Options { command, check } = Options::parse();
    match command {
        Some(Command::Packet(arguments)) => packet::run(&arguments)?,
        Some(Command::Scale(arguments)) => scale::run(&arguments)?,
        Some(Command::Cores(arguments)) => cores::run(&arguments)?,
        Some(Command::Flows(options)) => flows::run(&options)?,
        Some(Command::Audiences(arguments)) => audiences::run(&arguments)?,
        Some(Command::Wire(arguments)) => return wire::run(&arguments),
        Some(Command::Control(arguments)) => control::run(&arguments)?,
        Some(Command::Peers(arguments)) => return peers::run(&arguments),
        None => return check::run(&check),
    }
    Ok(ExitCode::SUCCESS)
}
