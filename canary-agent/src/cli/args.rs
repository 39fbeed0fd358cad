//! The command line: what can be written.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use canary_ebpf_common::{share::Share, tunnel};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::{config, telemetry::LogFormat};

/// Where the configuration is, if nobody says otherwise.
pub(super) const DEFAULT_CONFIG: &str = "/etc/canary/agent.toml";

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 usage; 3 rollout aborted; 4 rollout held; 5 the daemon can't be reached; \
    77 not permitted; 78 bad configuration. With --json, errors are JSON objects on standard output.";

/// Steers connections to stable and canary backends.
#[derive(Debug, Parser)]
#[command(
    name = "canary-agent",
    version,
    about = "Steers connections to stable and canary backends",
    long_about = "The agent of canary-xdp, an XDP load balancer for canary releases: the daemon \
        (`run`) and the commands that talk to it over its control socket.",
    after_long_help = EXIT_CODES,
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub(super) struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub(super) global: Global,
    /// What to do.
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Options of every command; they may stand before or after it.
#[derive(Args, Debug)]
pub(super) struct Global {
    /// Configuration file; conf.d/*.toml beside it is read too
    #[arg(long, global = true, env = "CANARY_CONFIG", value_name = "FILE", default_value = DEFAULT_CONFIG)]
    pub(super) config: PathBuf,
    /// Control socket [default: agent.socket of the configuration, else /run/canary/agent.sock]
    #[arg(long, global = true, env = "CANARY_SOCKET", value_name = "PATH")]
    pub(super) socket: Option<PathBuf>,
    /// Print JSON, errors too
    #[arg(long, global = true)]
    pub(super) json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the daemon in the foreground
    Run(Run),
    /// Validate the configuration and print every error in it
    Check,
    /// Show what a reload would change
    ///
    /// Reads the configuration files that the daemon was started with, on the daemon's host.
    /// Ends with 0 whether or not anything would change; with 78 if the files are wrong.
    Diff,
    /// Go on with what the configuration files say by now
    ///
    /// All of it or nothing. Splits, what backends have been told, and open connections stay.
    /// SIGHUP does the same.
    Reload(Reload),
    /// Show services, versions, shares and backends
    Status(Status),
    /// Show or set the split of a service
    ///
    /// Without assignments, the split is shown. Versions that are left out keep
    /// their shares; the control version gets what is left.
    Split(Split),
    /// Show a service's backends, or tell one to be ready, to drain or to take nothing
    ///
    /// What a backend is told to be is kept over restarts. It says nothing about its health:
    /// a backend that is ready gets connections when it is up.
    #[command(subcommand)]
    Backend(Backend),
    /// Take the last change back, or all changes since a revision
    ///
    /// Gives back exactly the buckets that the changes took. What was taken back is not taken
    /// back again but with --to.
    Undo(Undo),
    /// Send everything of a service, or of all, to control at once
    ///
    /// Works when the daemon hangs or is gone, through the pinned maps, as root or the daemon's
    /// own user. Open
    /// connections stay where they are unless --move is given. `undo` takes it back.
    Panic(Panic),
    /// Begin a rollout, show it, or tell it something
    ///
    /// A rollout moves a version's share in steps, and goes by gates. One at a time for a service.
    #[command(subcommand)]
    Rollout(Rollout),
    /// Say how small a fault a rollout's gates would find, with what chance and in what time
    ///
    /// At the present rate of connections, or another. Begins nothing. `rollout plan` does the
    /// same.
    Plan(Plan),
    /// Keep a change that was made with --confirm
    Confirm(Confirm),
    /// Let a service, or all of them, be changed towards control only
    ///
    /// Shares may still be lowered, and what waits for a confirmation is still taken back.
    Freeze(Freeze),
    /// End a freeze
    Unfreeze(Freeze),
    /// Show who has changed what, when and why, and what else has happened
    Events(Events),
    /// Show audiences, or which of them a client is in
    #[command(subcommand)]
    Audience(Audience),
    /// Say where a client's connections go, and why
    Explain(Explain),
    /// Run a gate over recorded windows
    ///
    /// For each line, prints the natural logarithms of both statistics and the verdict so far.
    /// Needs no daemon; reads the gates of the configuration, and nothing else of it.
    Replay(Replay),
    /// Say whether this host is ready, and what to do where it is not
    ///
    /// Looks at the kernel, rights, drivers, sizes of packets, offloads, the network's settings,
    /// the ways to the backends and the agent's places. Changes nothing, and needs no daemon.
    /// Ends with 0 if nothing has failed, with 1 otherwise, with 78 if the configuration is wrong.
    Doctor,
    /// Take the program off the interfaces and remove the pins
    ///
    /// Traffic to the services is no longer steered after this. The daemon must
    /// be stopped first: it would attach the program again.
    Detach(Detach),
    /// On a backend: take packets out of those that the balancer has wrapped
    ///
    /// Attaches a program to the interfaces that unwraps packets of `ipip` and `gue` for the
    /// host's network stack, and ends; the program stays. Run again, it takes up what has
    /// changed, without a packet lost. Needs no configuration and no daemon.
    Decap(Decap),
    /// Print a completion script for a shell
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man {
        /// Write one page for each command into this directory instead
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// `run`.
#[derive(Args, Debug)]
pub(super) struct Run {
    /// Take the place of another XDP program on the interfaces
    #[arg(long)]
    pub(super) replace: bool,
    /// Set up new maps where the pinned ones can't be gone on with
    ///
    /// From the stored state, beside the pinned ones, which go on steering until the new ones
    /// take their place. Connections with an entry in a flow table are not kept: those of moved
    /// buckets, and all translated ones. Pinned maps that can be gone on with stay.
    #[arg(long)]
    pub(super) rebuild: bool,
    /// How log lines look; RUST_LOG says which there are
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
}

/// `reload`.
#[derive(Args, Debug)]
pub(super) struct Reload {
    /// On what terms.
    #[command(flatten)]
    pub(super) terms: Terms,
    /// Also where open connections break
    #[arg(long)]
    pub(super) force: bool,
}

/// `status`.
#[derive(Args, Debug)]
pub(super) struct Status {
    /// Only this service
    pub(super) service: Option<String>,
    /// Show it again every second until interrupted
    #[arg(long)]
    pub(super) watch: bool,
    /// Wait for the rollout of this service to end, no longer than this
    ///
    /// Ends with 0 when it is completed, 3 when it was aborted, 4 when it needs an operator, 1
    /// when the time is over.
    #[arg(long, value_name = "DURATION", value_parser = wait, requires = "service")]
    pub(super) wait: Option<Duration>,
}

/// `rollout`.
#[derive(Debug, Subcommand)]
pub(super) enum Rollout {
    /// Begin with the first step
    Start(RolloutBegun),
    /// Show how rollouts stand: steps, shares, what they wait for, and their gates' evidence
    Status {
        /// Only this one
        rollout: Option<String>,
        /// Show it again every second until interrupted
        #[arg(long)]
        watch: bool,
        /// Wait for it to end, no longer than this
        ///
        /// Ends with 0 when it is completed, 3 when it was aborted, 4 when it needs an operator,
        /// 1 when the time is over.
        #[arg(long, value_name = "DURATION", value_parser = wait, requires = "rollout")]
        wait: Option<Duration>,
    },
    /// Stop it where it is; its share stays
    Pause(RolloutTold),
    /// Let it go on: from a pause, or with the step that was held, anew
    Resume(RolloutTold),
    /// Leave out what is left of the step
    Promote {
        /// On what terms.
        #[command(flatten)]
        told: RolloutTold,
        /// Leave out all steps but the last share
        #[arg(long)]
        full: bool,
    },
    /// End it, and take its whole share back; nothing keeps it from that
    Abort(RolloutTold),
    /// Begin again: the step that was held, or the whole that was aborted
    Retry(RolloutBegun),
    /// Say how small a fault its gates would find, with what chance and in what time
    Plan(Plan),
    /// Show the runs of a rollout
    History {
        /// The rollout
        rollout: String,
        /// With every window that they went by
        #[arg(long)]
        evidence: bool,
        /// Only the windows that a gate has counted, as a recording for `replay`
        ///
        /// Of the last run, unless another is asked for, and of its last step that has some.
        /// Windows in which not every event was counted are left out.
        #[arg(long, conflicts_with = "evidence")]
        csv: bool,
        /// With --csv: of this run
        #[arg(long, requires = "csv", value_name = "NUMBER")]
        run: Option<u64>,
        /// With --csv: of this step, from 1
        #[arg(long, requires = "csv", value_name = "NUMBER")]
        step: Option<u32>,
    },
}

/// `plan`.
#[derive(Args, Debug)]
pub(super) struct Plan {
    /// The rollout
    pub(super) rollout: String,
    /// New connections a second of the service [default: as counted over the last ten seconds]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub(super) rate: Option<String>,
    /// How often a signal is usual, as connect_failed=0.2% [default: as counted]; may be
    /// repeated
    #[arg(long, value_name = "SIGNAL=SHARE")]
    pub(super) usual: Vec<String>,
}

/// What a rollout is told.
#[derive(Args, Debug)]
pub(super) struct RolloutTold {
    /// The rollout
    pub(super) rollout: String,
    /// Kept in the audit trail
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Only if the service has not changed since this revision
    #[arg(long, value_name = "REVISION")]
    pub(super) if_revision: Option<u64>,
}

/// What begins a rollout.
#[derive(Args, Debug)]
pub(super) struct RolloutBegun {
    /// Which, and on what terms.
    #[command(flatten)]
    pub(super) told: RolloutTold,
    /// Wait for it to end, no longer than this
    ///
    /// Ends with 0 when it is completed, 3 when it was aborted, 4 when it needs an operator, 1
    /// when the time is over.
    #[arg(long, value_name = "DURATION", value_parser = wait)]
    pub(super) wait: Option<Duration>,
}

/// `split`.
#[derive(Args, Debug)]
pub(super) struct Split {
    /// The service
    pub(super) service: String,
    /// New shares, as v2=5%, v2=64/65536 or v2=0
    #[arg(value_name = "VERSION=SHARE")]
    pub(super) assignments: Vec<Assignment>,
    /// On what terms.
    #[command(flatten)]
    pub(super) terms: Terms,
    /// Watch the buckets for seven seconds before they move, so that a SYN that is sent again
    /// goes where the first one went; ends when they have moved
    #[arg(long, requires = "assignments")]
    pub(super) learn: bool,
}

/// `backend`.
#[derive(Debug, Subcommand)]
pub(super) enum Backend {
    /// Show a service's backends: health, weight, buckets, state and open connections
    List {
        /// The service
        service: String,
        /// Only this one
        backend: Option<String>,
    },
    /// Give a backend new connections again
    Ready(Told),
    /// Give a backend no new connections; those that are open stay
    Drain(Told),
    /// Give a backend nothing at all; its open connections are cut
    Maint(Told),
}

/// What is asked of audiences.
#[derive(Debug, Subcommand)]
pub(super) enum Audience {
    /// Show all audiences, and the services that have routes for them
    List,
    /// Make clients members of an audience for some time, or renew them
    ///
    /// An IPv6 address counts as its /64: hosts change the rest by themselves. To have one address
    /// alone, write /128 behind it. Nobody's time becomes shorter by this. More than 10,000 go in
    /// several requests; each is done whole or not at all.
    Add {
        /// Whom, and on what terms
        #[command(flatten)]
        members: Members,
        /// How long they stay unless they are renewed; as the configuration says if left out
        #[arg(long, visible_alias = "for", value_name = "DURATION")]
        ttl: Option<String>,
    },
    /// End memberships before their time
    Remove {
        /// Whom, and on what terms
        #[command(flatten)]
        members: Members,
    },
    /// Show an audience: where it comes from, how large it is, and a few of its networks
    Show {
        /// The audience
        name: String,
    },
    /// Say which audiences a client is in, and by which route each service takes it
    Test {
        /// The client's address
        address: IpAddr,
    },
}

/// Members of an audience.
#[derive(Args, Debug)]
pub(super) struct Members {
    /// The audience
    pub(super) name: String,
    /// Addresses and networks
    #[arg(value_name = "NETWORK", required_unless_present = "from")]
    pub(super) networks: Vec<String>,
    /// Read more from this file, one a line, `#` before comments; `-` for standard input
    #[arg(long, value_name = "FILE")]
    pub(super) from: Option<PathBuf>,
    /// Kept in the audit trail
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// What a backend is told to be.
#[derive(Args, Debug)]
pub(super) struct Told {
    /// The service
    pub(super) service: String,
    /// The backend
    #[arg(value_name = "ADDRESS[:PORT]")]
    pub(super) backend: String,
    /// On what terms.
    #[command(flatten)]
    pub(super) terms: Terms,
    /// Also where nobody is left to take new connections
    #[arg(long)]
    pub(super) force: bool,
}

/// What every command has that changes something.
#[derive(Args, Debug)]
pub(super) struct Terms {
    /// Kept in the audit trail
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Only if nothing of it has changed since this revision
    #[arg(long, value_name = "REVISION")]
    pub(super) if_revision: Option<u64>,
    /// Take it back after this time, such as 5m, unless `confirm` follows
    #[arg(long, value_name = "DURATION")]
    pub(super) confirm: Option<String>,
}

impl Terms {
    /// Whether any are given.
    pub(super) const fn given(&self) -> bool {
        let Self { reason, dry_run, if_revision, confirm } = self;
        reason.is_some() || *dry_run || if_revision.is_some() || confirm.is_some()
    }
}

/// `undo`.
#[derive(Args, Debug)]
pub(super) struct Undo {
    /// Only changes of this service
    pub(super) service: Option<String>,
    /// Back to the state as of this revision
    #[arg(long, value_name = "REVISION")]
    pub(super) to: Option<u64>,
    /// Also where nobody is left to take new connections
    #[arg(long)]
    pub(super) force: bool,
    /// On what terms.
    #[command(flatten)]
    pub(super) terms: Terms,
}

/// `panic`.
#[derive(Args, Debug)]
pub(super) struct Panic {
    /// Only this service; without it, all of them
    pub(super) service: Option<String>,
    /// Cut the open connections of other versions, too
    #[arg(long = "move")]
    pub(super) moves: bool,
    /// Kept in the audit trail
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    pub(super) dry_run: bool,
    /// How long the daemon has to answer before the pinned maps are written without it
    #[arg(long, value_name = "DURATION", default_value = "25ms", value_parser = humantime::parse_duration)]
    pub(super) agent_timeout: Duration,
}

/// `confirm`.
#[derive(Args, Debug)]
pub(super) struct Confirm {
    /// Which change; may be left out while only one waits
    pub(super) revision: Option<u64>,
    /// Kept in the audit trail
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Only if nothing of it has changed since this revision
    #[arg(long, value_name = "REVISION")]
    pub(super) if_revision: Option<u64>,
}

/// `freeze` and `unfreeze`.
#[derive(Args, Debug)]
pub(super) struct Freeze {
    /// Only this service; without it, all of them
    pub(super) service: Option<String>,
    /// On what terms.
    #[command(flatten)]
    pub(super) terms: Terms,
}

/// `events`.
#[derive(Args, Debug)]
pub(super) struct Events {
    /// Go on with what happens, until interrupted
    #[arg(long, short)]
    pub(super) follow: bool,
    /// Only those of this service, and changes of all
    #[arg(long, value_name = "SERVICE")]
    pub(super) service: Option<String>,
    /// Only those since then: 2h for two hours ago, or a time in UTC
    #[arg(long, value_name = "TIME")]
    pub(super) since: Option<String>,
    /// At most so many, the newest; with --since all of them
    #[arg(long, value_name = "NUMBER", conflicts_with = "since")]
    pub(super) limit: Option<usize>,
}

/// `explain`.
#[derive(Args, Debug)]
pub(super) struct Explain {
    /// The service
    pub(super) service: String,
    /// The client
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = client)]
    pub(super) from: String,
    /// Address and port of the service [default: its first of the client's family]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(super) to: Option<SocketAddr>,
    /// Transport protocol [default: that of the service's first port]
    #[arg(long, value_enum, value_name = "PROTOCOL")]
    pub(super) protocol: Option<Transport>,
}

/// `replay`.
#[derive(Args, Debug)]
pub(super) struct Replay {
    /// Recording: CSV with the header window,signal,share,control,canary[,connections]; - for standard input
    pub(super) file: PathBuf,
    /// The gate
    #[arg(long, value_name = "NAME")]
    pub(super) gate: String,
    /// What one more in `window` lasts: 1s where it is a time in seconds, the length of a
    /// window where windows are counted
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = length)]
    pub(super) every: Duration,
}

/// `detach`.
#[derive(Args, Debug)]
pub(super) struct Detach {
    /// Only say what would be removed
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// `decap`.
#[derive(Args, Debug)]
pub(super) struct Decap {
    /// Interfaces that wrapped packets come in by
    #[arg(value_name = "INTERFACE", required_unless_present_any = ["status", "detach"])]
    pub(super) interfaces: Vec<String>,
    /// Take wrapped packets from this network only: the balancers'; may be repeated
    #[arg(long, value_name = "NETWORK", value_parser = network)]
    pub(super) from: Vec<IpNet>,
    /// Take wrapped packets at this address [default: all of the interfaces']; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    pub(super) address: Vec<IpAddr>,
    /// Port of packets in UDP
    #[arg(long, value_name = "PORT", default_value_t = tunnel::GUE_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) gue_port: u16,
    /// How the program is attached: auto takes native where the driver has it
    #[arg(long, value_enum, value_name = "MODE", default_value = "auto")]
    pub(super) xdp_mode: Mode,
    /// Take the place of another XDP program on the interfaces
    #[arg(long)]
    pub(super) replace: bool,
    /// Show where packets are unwrapped, and how many
    #[arg(long, conflicts_with_all = ["detach", "interfaces", "from", "address", "replace"])]
    pub(super) status: bool,
    /// Take the program off these interfaces, or off all
    #[arg(long, conflicts_with_all = ["from", "address", "replace"])]
    pub(super) detach: bool,
    /// Only say what would be done
    #[arg(long, conflicts_with = "status")]
    pub(super) dry_run: bool,
    /// Directory of the pins, on a BPF file system
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/canary-decap")]
    pub(super) pins: PathBuf,
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Mode {
    /// Native where the driver has it, else generic
    Auto,
    /// In the driver
    Native,
    /// In the network stack
    Generic,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

impl Transport {
    /// As the socket's API writes it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// `VERSION=SHARE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    /// The version.
    pub(super) version: String,
    /// Its share as written, a bare `0` as `0%`.
    pub(super) share: String,
}

impl std::str::FromStr for Assignment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((version, share)) = text.split_once('=') else {
            return Err("write VERSION=SHARE, for instance v2=5%".to_owned());
        };
        let (version, share) = (version.trim(), share.trim());
        if version.is_empty() {
            return Err("the version's name is missing before `=`".to_owned());
        }
        // Nothing is nothing in every unit.
        let share = if share == "0" { "0%" } else { share };
        share.parse::<Share>().map_err(|error| error.to_string())?;
        Ok(Self { version: version.to_owned(), share: share.to_owned() })
    }
}

/// How long somebody waits.
fn wait(text: &str) -> Result<Duration, String> {
    config::duration(text)
}

/// The length of a window.
fn length(text: &str) -> Result<Duration, String> {
    match config::duration(text)? {
        Duration::ZERO => Err("a window lasts longer than that".to_owned()),
        length => Ok(length),
    }
}

/// A network, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map_err(|_| "write a network or an address: 10.0.0.0/24, 2001:db8::/64".to_owned())
}

/// A client, `ADDRESS` or `ADDRESS:PORT`; kept as it was written.
fn client(text: &str) -> Result<String, String> {
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let address = bracketed.unwrap_or(text).parse::<IpAddr>();
    let fits = match address {
        Ok(address) => bracketed.is_none() || address.is_ipv6(),
        Err(_) => text.parse::<SocketAddr>().is_ok(),
    };
    if fits {
        Ok(bracketed.unwrap_or(text).to_owned())
    } else {
        Err("write an address, or address and port: 192.0.2.7:40000, [2001:db8::7]:40000"
            .to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_every_command_stand_before_or_after_it() {
        for line in [
            "canary-agent --socket /s --config /c --json status shop",
            "canary-agent status shop --socket /s --config /c --json",
            "canary-agent --socket /s status --json --config /c shop",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).expect(line);
            assert_eq!(cli.global.socket, Some(PathBuf::from("/s")), "{line}");
            assert_eq!(cli.global.config, PathBuf::from("/c"), "{line}");
            assert!(cli.global.json, "{line}");
        }
    }

    #[test]
    fn assignments_are_read() {
        for (text, version, share) in [
            ("v2=5%", "v2", "5%"),
            ("v2=0", "v2", "0%"),
            ("v2=64/65536", "v2", "64/65536"),
            ("v2 = 12.5 %", "v2", "12.5 %"),
        ] {
            let read: Assignment = text.parse().expect(text);
            assert_eq!((read.version.as_str(), read.share.as_str()), (version, share));
        }
        for (text, error) in [
            ("v2", "VERSION=SHARE"),
            ("=5%", "name is missing"),
            ("v2=5", "no unit"),
            ("v2=101%", "more than 100%"),
            ("v2=", "not a share"),
        ] {
            let message = text.parse::<Assignment>().expect_err(text);
            assert!(message.contains(error), "{text}: {message}");
        }
    }

    #[test]
    fn clients_are_addresses_with_or_without_a_port() {
        for (text, read) in [
            ("192.0.2.7", Some("192.0.2.7")),
            ("192.0.2.7:40000", Some("192.0.2.7:40000")),
            ("2001:db8::7", Some("2001:db8::7")),
            ("[2001:db8::7]", Some("2001:db8::7")),
            ("[2001:db8::7]:40000", Some("[2001:db8::7]:40000")),
            ("[192.0.2.7]", None),
            ("192.0.2.7:", None),
            ("192.0.2.7:70000", None),
            ("192.0.2.0/24", None),
            ("host.example", None),
            ("", None),
        ] {
            assert_eq!(client(text).ok().as_deref(), read, "{text}");
        }
    }
}
