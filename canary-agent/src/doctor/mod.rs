//! Whether this host is ready for an agent: what was found, and what follows.
//!
//! `collect` is the shell: it reads the host and changes nothing. Everything else here is a
//! function of [`Facts`] and of the configuration: a [`Check`] is a verdict with its
//! evidence and what to do. Must not know of how either is printed.

mod backends;
mod collect;
pub mod facts;
mod interfaces;
mod kernel;
mod network;
mod places;

use serde::{Deserialize, Serialize};

pub use self::{
    collect::{Asked, Depth, collect},
    facts::Facts,
};
use crate::config::{Config, Diagnostic};

/// What is looked at. The names are the contract of `doctor --json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Name {
    /// Errors and warnings of the files.
    #[serde(rename = "configuration")]
    Configuration,
    /// The kernel's release.
    #[serde(rename = "kernel.release")]
    KernelRelease,
    /// Program type, kinds of maps and helpers.
    #[serde(rename = "kernel.bpf")]
    KernelBpf,
    /// Whether programs are compiled.
    #[serde(rename = "kernel.jit")]
    KernelJit,
    /// The kernel's type information.
    #[serde(rename = "kernel.btf")]
    KernelBtf,
    /// Whether ordinary users may load programs.
    #[serde(rename = "kernel.unprivileged_bpf")]
    KernelUnprivileged,
    /// Whether the maps find room.
    #[serde(rename = "kernel.memory")]
    KernelMemory,
    /// Capabilities.
    #[serde(rename = "capabilities")]
    Capabilities,
    /// Where pins go.
    #[serde(rename = "bpffs")]
    Bpffs,
    /// Pins that are there.
    #[serde(rename = "pins")]
    Pins,
    /// Agents that run.
    #[serde(rename = "agent")]
    Agent,
    /// Where the state is kept.
    #[serde(rename = "state_dir")]
    StateDir,
    /// The control socket.
    #[serde(rename = "socket")]
    Socket,
    /// The TCP listener.
    #[serde(rename = "listen")]
    Listen,
    /// The clock.
    #[serde(rename = "clock")]
    Clock,
    /// An interface is there and can carry packets.
    #[serde(rename = "interface.link")]
    Link,
    /// Where its program runs.
    #[serde(rename = "interface.mode")]
    Mode,
    /// Other programs on it.
    #[serde(rename = "interface.program")]
    Program,
    /// Queues.
    #[serde(rename = "interface.queues")]
    Queues,
    /// The size of its packets.
    #[serde(rename = "interface.mtu")]
    Mtu,
    /// Large receive offload.
    #[serde(rename = "interface.lro")]
    Lro,
    /// Generic receive offload.
    #[serde(rename = "interface.gro")]
    Gro,
    /// Checksums that a peer leaves out.
    #[serde(rename = "interface.tx_checksum")]
    TxChecksum,
    /// VLAN tags that are taken out.
    #[serde(rename = "interface.vlan")]
    Vlan,
    /// Whether packets can leave by it.
    #[serde(rename = "interface.redirect")]
    Redirect,
    /// Interfaces towards backends that are not in the configuration.
    #[serde(rename = "nat.interfaces")]
    NatInterfaces,
    /// Source ports that are kept from the host.
    #[serde(rename = "nat.ports")]
    NatPorts,
    /// Reverse path filtering.
    #[serde(rename = "network.rp_filter")]
    RpFilter,
    /// Forwarding.
    #[serde(rename = "network.forwarding")]
    Forwarding,
    /// The host's packet filter.
    #[serde(rename = "network.firewall")]
    Firewall,
    /// Where a VIP stands.
    #[serde(rename = "vip")]
    Vip,
    /// The way to a backend.
    #[serde(rename = "backend")]
    Backend,
    /// The size of packets on the way to a backend.
    #[serde(rename = "backend.mtu")]
    BackendMtu,
}

impl Name {
    /// All of them, in the order of a report.
    pub const ALL: [Self; 33] = [
        Self::Configuration,
        Self::KernelRelease,
        Self::KernelBpf,
        Self::KernelJit,
        Self::KernelBtf,
        Self::KernelUnprivileged,
        Self::KernelMemory,
        Self::Capabilities,
        Self::Bpffs,
        Self::Pins,
        Self::Agent,
        Self::StateDir,
        Self::Socket,
        Self::Listen,
        Self::Clock,
        Self::Link,
        Self::Mode,
        Self::Program,
        Self::Queues,
        Self::Mtu,
        Self::Lro,
        Self::Gro,
        Self::TxChecksum,
        Self::Vlan,
        Self::Redirect,
        Self::NatInterfaces,
        Self::NatPorts,
        Self::RpFilter,
        Self::Forwarding,
        Self::Firewall,
        Self::Vip,
        Self::Backend,
        Self::BackendMtu,
    ];

    /// Whether nothing can be steered where this has failed.
    pub const fn stops_steering(self) -> bool {
        matches!(
            self,
            Self::KernelRelease
                | Self::KernelBpf
                | Self::KernelMemory
                | Self::Capabilities
                | Self::Bpffs
                | Self::Pins
                | Self::Agent
                | Self::Mode
                | Self::Program
        )
    }
}

/// A check's name as it is written.
pub fn name(name: Name) -> String {
    serde_json::to_value(name)
        .ok()
        .and_then(|name| name.as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// What a check has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could, or not in every case.
    Warning,
    /// Something that is configured can't work.
    Failed,
    /// It could not be looked at; `found` says why.
    NotChecked,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: Name,
    /// The interface, VIP or backend that it is about, where there are several.
    pub about: Option<String>,
    /// What it has come to.
    pub verdict: Verdict,
    /// What was found, in a sentence.
    pub found: String,
    /// Where it was read.
    pub evidence: String,
    /// The command or key that mends it.
    pub remedy: Option<String>,
}

impl Check {
    fn new(
        name: Name,
        verdict: Verdict,
        found: impl Into<String>,
        evidence: impl Into<String>,
    ) -> Self {
        let (found, evidence) = (found.into(), evidence.into());
        Self { name, about: None, verdict, found, evidence, remedy: None }
    }

    fn ok(name: Name, found: impl Into<String>, evidence: impl Into<String>) -> Self {
        Self::new(name, Verdict::Ok, found, evidence)
    }

    fn warning(name: Name, found: impl Into<String>, evidence: impl Into<String>) -> Self {
        Self::new(name, Verdict::Warning, found, evidence)
    }

    fn failed(name: Name, found: impl Into<String>, evidence: impl Into<String>) -> Self {
        Self::new(name, Verdict::Failed, found, evidence)
    }

    fn not_checked(name: Name, why: impl Into<String>, evidence: impl Into<String>) -> Self {
        Self::new(name, Verdict::NotChecked, why, evidence)
    }

    /// Whether nothing can be steered because of it.
    pub fn stops_steering(&self) -> bool {
        self.verdict == Verdict::Failed && self.name.stops_steering()
    }

    fn about(mut self, about: impl Into<String>) -> Self {
        self.about = Some(about.into());
        self
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// `doctor --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// No check has failed.
    pub ready: bool,
    /// Version of this program.
    pub version: String,
    /// Process id of the agent that answers on the socket.
    pub agent_pid: Option<u32>,
    /// Every check, in the order of [`Name::ALL`].
    pub checks: Vec<Check>,
}

/// What follows from the facts for a configuration that has no errors.
pub fn examine(config: &Config, warnings: &[Diagnostic], facts: &Facts) -> Report {
    let mut checks = configuration(warnings);
    checks.extend(kernel::checks(facts));
    checks.extend(places::checks(config, facts));
    checks.extend(interfaces::checks(config, facts));
    checks.extend(network::checks(config, facts));
    checks.extend(backends::checks(config, facts));
    // Stable: interfaces, VIPs and backends stay in the order of the configuration.
    checks.sort_by_key(|check| check.name);
    Report {
        ready: checks.iter().all(|check| check.verdict != Verdict::Failed),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        agent_pid: facts.agent.as_ref().map(|status| status.agent.pid),
        checks,
    }
}

/// What is wrong with this host that needs no waiting and no probing, for a start: what
/// keeps the agent from steering first.
pub fn doubts(config: &Config) -> Vec<Check> {
    let facts = collect(config, Depth::Quick);
    let mut checks = examine(config, &[], &facts).checks;
    checks.retain(|check| matches!(check.verdict, Verdict::Warning | Verdict::Failed));
    checks.sort_by_key(|check| !check.stops_steering());
    checks
}

/// The interfaces towards backends of `nat` that the configuration leaves out, as the routes
/// of this host have it; nothing on a host that has not all of its interfaces.
pub fn left_out(config: &Config) -> Option<Check> {
    let facts = collect(config, Depth::Quick);
    let links = &facts.network.as_ref().ok()?.links;
    let there = |name: &String| links.iter().any(|link| link.name == *name);
    let here = config.agent.interfaces.iter().all(there);
    let checks = if here { interfaces::checks(config, &facts) } else { Vec::new() };
    checks
        .into_iter()
        .find(|check| check.name == Name::NatInterfaces && check.verdict == Verdict::Failed)
}

fn configuration(warnings: &[Diagnostic]) -> Vec<Check> {
    const EVIDENCE: &str = "the configuration files";
    if warnings.is_empty() {
        return vec![Check::ok(Name::Configuration, "no errors, no warnings", EVIDENCE)];
    }
    let warning = |one: &Diagnostic| {
        let place = format!("{}:{}:{}", one.place.file, one.place.line, one.place.column);
        let check = Check::warning(Name::Configuration, one.message.clone(), place);
        match &one.help {
            Some(help) => check.remedy(help.clone()),
            None => check.remedy("canary-agent check"),
        }
    };
    warnings.iter().map(warning).collect()
}

/// Shorthand of the verdicts: what was read, or the check that says why not.
fn read<'f, T>(
    found: &'f facts::Found<T>,
    name: Name,
    evidence: &str,
) -> Result<&'f T, Box<Check>> {
    found.as_ref().map_err(|why| Box::new(Check::not_checked(name, why.clone(), evidence)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_in_order_and_all_there() {
        assert!(Name::ALL.is_sorted());
        let last = Name::ALL.len() - 1;
        assert_eq!(Name::BackendMtu as usize, last, "each is listed once");
    }
}

#[cfg(test)]
mod sample;
