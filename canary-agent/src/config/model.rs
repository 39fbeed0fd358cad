//! The validated configuration: what the rest of the agent works with.
//!
//! Values here are consistent: names are unique, references resolve, families
//! meet. Only [`super::load`] makes them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use canary_ebpf_common::share::Share;
use ipnet::IpNet;
use tokio_rustls::rustls::pki_types::CertificateDer;

pub use super::opening::Opening;
use crate::audience::{Networks, expression::Expression};

/// Everything that the configuration files say.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[agent]`.
    pub agent: Agent,
    /// `[[service]]`, in the order of the files.
    pub services: Vec<Service>,
    /// `[[audience]]`, in the order of the files.
    pub audiences: Vec<Audience>,
    /// `[[gate]]`, in the order of the files.
    pub gates: Vec<Gate>,
    /// `[[rollout]]`, in the order of the files.
    pub rollouts: Vec<Arc<Rollout>>,
}

/// `[[audience]]`: a named set of client networks.
#[derive(Clone, Debug, PartialEq)]
pub struct Audience {
    /// Its name.
    pub name: String,
    /// Its networks: those of the configuration, of its file, and those that its MaxMind DB file
    /// answers with, as they were when the configuration was read.
    pub networks: Arc<Networks>,
    /// A file of networks.
    pub file: Option<PathBuf>,
    /// Networks by what is known of them.
    pub mmdb: Option<Mmdb>,
    /// Members may be added while the agent runs.
    pub dynamic: Option<Dynamic>,
}

/// `audience.dynamic`: members with a lifetime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dynamic {
    /// How long one lives that is not renewed, if whoever adds it does not say.
    pub ttl: Duration,
    /// How many there may be.
    pub max: usize,
}

/// `audience.mmdb`: networks by what a MaxMind DB file knows of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Mmdb {
    /// The file.
    pub file: PathBuf,
    /// Which of its records are meant.
    pub filter: Expression,
}

/// Of which service and whose clients a table is that follows from a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Derived {
    /// The service.
    pub service: String,
    /// The audience.
    pub audience: String,
    /// Its shares are the service's own, but for what a rollout gives the audience.
    pub follows: bool,
}

/// Shares by version name, control left out.
pub type SplitOf = BTreeMap<String, Share>;

/// `[[service.route]]`: the split of an audience's clients.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// The audience.
    pub audience: String,
    /// By version name, control left out.
    pub split: BTreeMap<String, Share>,
    /// No `[[service.route]]` says so, but a step of a rollout: it follows the service's split, as
    /// far as the rollout gives the audience no more.
    pub follows: bool,
}

/// `[agent]`: where the agent works and what it may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Agent {
    /// Interfaces that the program is attached to.
    pub interfaces: Vec<String>,
    /// How it is attached.
    pub xdp_mode: XdpMode,
    /// Directory of `state.db`.
    pub state_dir: PathBuf,
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Directory of the pins.
    pub bpffs: PathBuf,
    /// Address of the TCP listener; `None` for `"off"`.
    pub listen: Option<SocketAddr>,
    /// Whether the agent puts the VIPs on an interface.
    pub manage_vips: bool,
    /// Who may change things besides root and the agent's own uid.
    pub operators: Operators,
    /// Source ports for translated flows.
    pub nat_ports: RangeInclusive<u16>,
    /// Sizes of the maps.
    pub capacity: Capacity,
    /// What is logged, in the notation of `RUST_LOG`.
    pub log: String,
}

/// `agent.xdp_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// Native, else generic with a warning.
    Auto,
    /// In the driver, or not at all.
    Native,
    /// In the network stack.
    Generic,
}

/// `agent.operators = { uids = [...], gids = [...] }`; names are resolved when read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operators {
    /// User ids.
    pub uids: Vec<u32>,
    /// Group ids.
    pub gids: Vec<u32>,
}

/// `[agent.capacity]`: what the maps are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Services.
    pub services: u32,
    /// Addresses × ports of all services, for each family.
    pub vips: u32,
    /// Live backends of all services; twice as many records are made, so that
    /// replaced ones have room to drain.
    pub backends: u32,
    /// Buckets of all services, in pages of 4,096.
    pub buckets: u32,
    /// Flow entries for each family (a translated flow takes two).
    pub flows: u32,
    /// Connections that are watched at a time, for each family; 0: none ever.
    pub samples: u32,
}

/// `[[service]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub vips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// How packets reach the backends.
    pub forward: Forward,
    /// Source addresses for `nat`; empty: that of the interface towards the backend.
    pub nat_source: Vec<IpAddr>,
    /// Source of outer headers, one of each family at most; that of the interface towards the
    /// backend where there is none. The bits behind the prefix say which flow it is.
    pub tunnel_source: Vec<IpNet>,
    /// The backends' port for packets in UDP.
    pub gue_port: u16,
    /// The MSS that SYNs announce at most.
    pub mss: Option<Mss>,
    /// What is hashed into a bucket.
    pub stickiness: Stickiness,
    /// Index of the control version in `versions`.
    pub control: usize,
    /// What a split change does to open connections.
    pub existing: Existing,
    /// How long after its last move a bucket is tracked; `None` for `"never"` ending.
    pub drain: Option<Duration>,
    /// Silence after which a UDP flow is a new one.
    pub udp_idle: Duration,
    /// Whether QUIC is spoken on its UDP ports.
    pub quic: bool,
    /// Whether some of its connections are watched for what they do.
    pub signals: bool,
    /// How long a backend that comes back takes until it has its whole share; zero: none.
    pub slow_start: Duration,
    /// What a version without a usable backend gets.
    pub fallback: Fallback,
    /// Initial split by version name, control left out.
    pub split: BTreeMap<String, Share>,
    /// Other splits by audience: the first one whose audience holds the client counts. Those that
    /// follow from rollouts stand behind all others.
    pub routes: Vec<Route>,
    /// Whether some of its clients have tables of their own: those of routes, or of routes that
    /// are gone and whose connections may be open still.
    pub routed: bool,
    /// What it follows from, if the configuration does not name it: it is then the table of an
    /// audience's clients in another service, whose addresses these are.
    pub derived: Option<Derived>,
    /// How backends are checked.
    pub health: Health,
    /// Number of buckets: a power of two from 4,096 to 1,048,576.
    pub buckets: u32,
    /// Keys of the bucket hash: from `hash_key`, else derived from the name, so
    /// that all hosts with the same configuration agree.
    pub hash_key: [u64; 2],
    /// Its versions, control among them, in the order of the file.
    pub versions: Vec<Version>,
}

/// A port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// 1 to 65,535.
    pub port: u16,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

/// `service.forward`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// Addresses and ports are rewritten; both directions cross the balancer.
    Nat,
    /// Only the MAC address is rewritten.
    Dsr,
    /// The packet is wrapped in an IP packet to the backend.
    Ipip,
    /// The packet is wrapped in a UDP packet to the backend.
    Gue,
}

impl Forward {
    /// The word of the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Dsr => "dsr",
            Self::Ipip => "ipip",
            Self::Gue => "gue",
        }
    }

    /// Whether packets get new addresses and ports; otherwise backends hold the VIP, and answer
    /// clients themselves.
    pub const fn translates(self) -> bool {
        matches!(self, Self::Nat)
    }

    /// Whether packets are wrapped, so that a backend of either family can have them.
    pub const fn wraps(self) -> bool {
        matches!(self, Self::Ipip | Self::Gue)
    }
}

/// `service.mss`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mss {
    /// What fits into a packet on the way to the backend.
    Auto,
    /// At most so much.
    Most(u16),
}

/// `service.stickiness`, with `prefix` for `subnet`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stickiness {
    /// Source and destination address and port, protocol.
    Connection,
    /// Source address.
    Client,
    /// The source's prefix, lengths in bits.
    Subnet {
        /// 0 to 32.
        v4: u8,
        /// 0 to 128.
        v6: u8,
    },
}

/// `service.existing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Open connections stay where they are.
    Pin,
    /// Open connections move with their bucket.
    Move,
}

/// `service.fallback`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// Control's backends take the version's buckets.
    Control,
    /// The version's connections get nothing.
    None,
}

/// `service.health`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Every backend counts as healthy.
    None,
    /// Every backend is checked.
    Check(Check),
}

/// How backends are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What is asked of a backend.
    pub ask: Ask,
    /// Where it is asked.
    pub via: Via,
    /// When and how often.
    pub timing: Timing,
}

/// What a check asks of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A connection is answered.
    Tcp,
    /// A request is answered with an expected status.
    Http(Http),
}

/// A request and what is expected of its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    /// Request target.
    pub path: String,
    /// Acceptable status codes.
    pub expect: Vec<u16>,
    /// The name that is asked for; `None`: the address that is connected to.
    pub host: Option<String>,
    /// How the connection is secured; `None` for plain HTTP.
    pub tls: Option<Tls>,
}

/// What a check demands of the backend's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Nothing.
    Unverified,
    /// That it is in date, for the name that is asked for, and signed by one of these.
    Verified(Arc<[CertificateDer<'static>]>),
}

/// `service.health.via`: the address that a check is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// The backend's own.
    Backend,
    /// The service's, in frames to this backend: as its clients' packets come, with `dsr`.
    Vip,
}

/// When a backend is checked and how often it must pass or fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// From one check to the next.
    pub interval: Duration,
    /// How much later than at equal distances a check may come, in percent of `interval`.
    pub jitter_percent: u8,
    /// After which a check has failed.
    pub timeout: Duration,
    /// Passes in a row that bring a backend up.
    pub rise: u32,
    /// Failures in a row that take it down.
    pub fall: u32,
}

/// `[service.versions.NAME]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Version {
    /// Its name.
    pub name: String,
    /// Its backends, at least one. Control has one for each family of the VIPs; another
    /// version may lack a family if the service falls back to control.
    pub backends: Vec<Backend>,
}

/// One of `service.versions.NAME.backends`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// Address and port.
    pub addr: SocketAddr,
    /// Share of the version's buckets relative to the others'; 0: no new connections.
    pub weight: u32,
}

/// `[[gate]]`: when a rollout's step has passed, and when it has failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    /// Its name.
    pub name: String,
    /// Chance of failing a canary that is no worse than `tolerate`.
    pub alpha: f64,
    /// Chance of passing one that is worse than `pass_below`.
    pub beta: f64,
    /// Before that it does not pass.
    pub min_duration: Duration,
    /// From then on it is decided no more.
    pub deadline: Duration,
    /// What it looks at; at least one of them decides.
    pub signals: Vec<Signal>,
}

/// One of `gate.signals`.
#[derive(Clone, Debug, PartialEq)]
pub enum Signal {
    /// What connections did, counted.
    Kernel(KernelSignal),
    /// What somebody else says.
    Probe(Probe),
}

/// A signal that is counted, and how much more of it the canary may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KernelSignal {
    /// What is counted.
    pub kind: SignalKind,
    /// With `slow_handshake`: the part of control's handshakes that is quicker than its
    /// threshold, in thousandths.
    pub quantile_permille: Option<u16>,
    /// Ratio of the canary's rate to control's up to which it is no worse.
    pub tolerate: f64,
    /// Ratio below which the canary is to be shown to lie.
    pub pass_below: f64,
    /// Whether it is only shown, and never decides.
    pub observe: bool,
}

impl Signal {
    /// Whether it decides by what connections do, compared with control.
    pub const fn decides_by_counts(&self) -> bool {
        matches!(self, Self::Kernel(KernelSignal { observe: false, .. }))
    }
}

/// A question to somebody else, again and again.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Who is asked, and what.
    pub ask: ProbeAsk,
    /// From one question to the next.
    pub interval: Duration,
    /// After which there is no answer.
    pub timeout: Duration,
    /// So often it is asked again at once where there is no answer.
    pub retries: u32,
    /// Good answers in a row that let it pass.
    pub rise: u32,
    /// Bad answers in a row that fail it.
    pub fall: u32,
    /// Whether it is only shown, and never decides.
    pub observe: bool,
}

/// Who is asked, and what a bad answer is.
#[derive(Clone, Debug, PartialEq)]
pub enum ProbeAsk {
    /// A Prometheus server; a value above the limit is bad.
    Prometheus {
        /// Address of the server.
        url: String,
        /// In PromQL.
        query: String,
        /// A value above this one is bad.
        above: f64,
    },
    /// A program; its exit code says.
    Command(Vec<String>),
    /// A server; its status says.
    Webhook(String),
}

impl ProbeAsk {
    /// What tells it from others, in a line.
    pub fn text(&self) -> String {
        match self {
            Self::Prometheus { query, above, .. } => format!("{query} > {above}"),
            Self::Command(words) => words.join(" "),
            Self::Webhook(url) => url.clone(),
        }
    }

    /// The key of the configuration that makes it one.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Prometheus { .. } => "prometheus",
            Self::Command(_) => "command",
            Self::Webhook(_) => "webhook",
        }
    }
}

/// `[[rollout]]`: steps that move a share over time.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Its name.
    pub name: String,
    /// The service.
    pub service: String,
    /// The version whose share it moves.
    pub to: String,
    /// What it does, one after the other; at least one sets a share.
    pub steps: Vec<Step>,
    /// What it does when a gate fails.
    pub on_fail: Reaction,
    /// What it does when a gate can't decide in time.
    pub on_inconclusive: Reaction,
    /// What it does when a gate has seen nothing to decide by.
    pub on_no_data: Reaction,
    /// When it may set another share by itself; empty for always.
    pub windows: Vec<Opening>,
    /// Whom it asks and tells.
    pub hooks: Hooks,
}

/// One of `rollout.steps`. It is done when all that it says is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Whose share it sets; `None` for everyone's.
    pub audience: Option<String>,
    /// The share that it sets.
    pub split: Option<Share>,
    /// How long it lasts at least.
    pub hold: Option<Duration>,
    /// Whether it waits for an operator.
    pub pause: bool,
    /// What has to pass.
    pub gate: Option<Arc<Gate>>,
}

impl Rollout {
    /// Whose share a step is about: that of the audience that it names, or the share that was set
    /// last before it. `None` for everyone's.
    pub fn audience(&self, step: usize) -> Option<&str> {
        let until = self.steps.iter().take(step + 1);
        until.rev().find(|step| step.split.is_some())?.audience.as_deref()
    }

    /// The share that everyone has from `step` on; `None` before it has one.
    pub fn for_everyone(&self, step: usize) -> Option<Share> {
        let until = self.steps.iter().take(step + 1);
        until.rev().filter(|step| step.audience.is_none()).find_map(|step| step.split)
    }

    /// What audiences have of their own from `step` on, in no order.
    pub fn for_audiences(&self, step: usize) -> BTreeMap<String, Share> {
        let until = self.steps.iter().take(step + 1);
        until.filter_map(|step| Some((step.audience.clone()?, step.split?))).collect()
    }
}

/// What a rollout does about a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// The share goes back to nothing.
    Abort,
    /// It stays where it is, and waits for an operator.
    Hold,
    /// It goes back to the share before, and waits for an operator.
    StepBack,
}

impl Reaction {
    /// As the configuration writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Hold => "hold",
            Self::StepBack => "step-back",
        }
    }
}

/// `rollout.hooks`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hooks {
    /// Asked before each share that it sets.
    pub confirm: Option<String>,
    /// Told of everything that happens.
    pub event: Option<String>,
    /// What calls are signed with.
    pub secret: Option<Secret>,
    /// How long a call may take.
    pub timeout: Duration,
}

/// Something that is not to be seen.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a connection can do that is counted for each version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SignalKind {
    /// No completed handshake in 3 s, or a reset in answer to the SYN.
    ConnectFailed,
    /// Its SYN was sent again.
    SynRetransmit,
    /// Its handshake took longer than a threshold.
    SlowHandshake,
    /// The server reset it.
    ServerReset,
    /// The client reset it.
    ClientReset,
    /// It ended soon after it had begun.
    ShortFlow,
}

impl SignalKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::ConnectFailed,
        Self::SynRetransmit,
        Self::SlowHandshake,
        Self::ServerReset,
        Self::ClientReset,
        Self::ShortFlow,
    ];

    /// As the configuration writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ConnectFailed => "connect_failed",
            Self::SynRetransmit => "syn_retransmit",
            Self::SlowHandshake => "slow_handshake",
            Self::ServerReset => "server_reset",
            Self::ClientReset => "client_reset",
            Self::ShortFlow => "short_flow",
        }
    }
}
