//! What goes over the socket: the JSON bodies of requests and answers.
//!
//! Names are the contract (other programs read them); shares are fractions of 1.

use std::{borrow::Cow, net::SocketAddr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::Diagnostic;

/// `GET /v1/status`, `status --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The agent itself.
    pub agent: AgentStatus,
    /// Interfaces that the program should be attached to.
    pub interfaces: Vec<InterfaceStatus>,
    /// Services in the order of the configuration.
    pub services: Vec<ServiceStatus>,
    /// Packets passed and dropped by reason, all CPUs and interfaces.
    pub reasons: Vec<ReasonCount>,
    /// Capacity and use of the maps.
    pub maps: Vec<MapStatus>,
    /// What became of flow entries.
    #[serde(default)]
    pub flows: FlowStatus,
    /// What an operator should know, each a sentence.
    pub alerts: Vec<String>,
    /// Changes that are taken back unless they are confirmed, oldest first.
    #[serde(default)]
    pub pending: Vec<PendingStatus>,
    /// Rollouts in the order of the configuration; those that are not configured any more, last.
    #[serde(default)]
    pub rollouts: Vec<super::rollout::RolloutStatus>,
    /// Audiences in the order of the configuration.
    #[serde(default)]
    pub audiences: Vec<AudienceSummary>,
}

/// How large an audience is, and what has become of its members since the agent began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AudienceSummary {
    /// Its name.
    pub name: String,
    /// Networks of the configuration, those beside and inside each other counted once.
    pub networks: usize,
    /// Members with a lifetime.
    pub members: usize,
    /// How many of them there may be; 0 where there are none by configuration.
    pub room: usize,
    /// Members that were added.
    pub added: u64,
    /// Those whose lives were prolonged.
    pub renewed: u64,
    /// Those that were taken out.
    pub removed: u64,
    /// Those whose time was over.
    pub expired: u64,
    /// Requests that were refused.
    pub refused: u64,
}

/// A change of [`Status`] that is taken back unless it is confirmed.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct PendingStatus {
    /// Seconds until then.
    pub left_seconds: f64,
    /// The change.
    #[serde(flatten)]
    pub change: Event,
}

/// Why and since when something may only be changed towards control.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct FreezeStatus {
    /// Why.
    pub reason: String,
    /// Number of the change that said so.
    pub revision: u64,
    /// Since when, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Who said so; absent for the agent itself.
    pub uid: Option<u32>,
}

/// The agent's own part of [`Status`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct AgentStatus {
    /// Version of the build.
    pub version: String,
    /// Version of the map layouts.
    pub abi_version: u32,
    /// Process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_seconds: f64,
    /// Number of the last change to the live state.
    pub revision: u64,
    /// Whether all services may only be changed towards control.
    #[serde(default)]
    pub frozen: Option<FreezeStatus>,
}

/// One interface of [`Status`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// Its index; absent while it does not exist.
    pub ifindex: Option<u32>,
    /// `native`, `generic`, or absent while not attached.
    pub mode: Option<String>,
    /// Why it is not attached, or a warning.
    pub message: Option<String>,
}

/// One service of [`Status`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub vips: Vec<String>,
    /// Its ports, as `tcp/443`.
    pub ports: Vec<String>,
    /// `nat` or `dsr`.
    pub forward: String,
    /// `connection`, `client` or `subnet`.
    pub stickiness: String,
    /// Name of the control version.
    pub control: String,
    /// Number of buckets.
    pub buckets: u32,
    /// Buckets whose connections are looked up after a move.
    pub tracked_buckets: u32,
    /// How its connections are watched; absent where none are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signals: Option<SignalsStatus>,
    /// Versions, control first.
    pub versions: Vec<VersionStatus>,
    /// Whether it, by itself, may only be changed towards control.
    #[serde(default)]
    pub frozen: Option<FreezeStatus>,
    /// The panic that it is where it is by; absent once somebody has set a share.
    #[serde(default)]
    pub panic: Option<super::panic::PanicStatus>,
}

/// One version of [`ServiceStatus`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct VersionStatus {
    /// Its name.
    pub name: String,
    /// The share that was asked for, a fraction of 1.
    pub asked: f64,
    /// The same as it was written, `5%`.
    pub asked_text: String,
    /// The share of buckets it owns, a fraction of 1.
    pub in_force: f64,
    /// The number of buckets it owns.
    pub buckets: u32,
    /// New connections counted since the maps were made.
    pub connections: u64,
    /// Its share of the service's new connections over the last seconds; absent without any.
    pub measured: Option<f64>,
    /// What its watched connections have done; absent where none are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signals: Option<VersionSignalsStatus>,
    /// Its backends in the order of the configuration.
    pub backends: Vec<BackendStatus>,
}

/// How the connections of a service are watched.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SignalsStatus {
    /// A handshake that takes longer is slow; absent until that is known.
    pub slow_over_seconds: Option<f64>,
    /// Windows in which not every event was counted, since the agent started.
    pub incomplete_windows: u64,
}

/// What the watched connections of a version have done since the maps were made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VersionSignalsStatus {
    /// One connection in so many is watched; absent for none.
    pub one_in: Option<u32>,
    /// Watched connections of which it is known how they began.
    pub watched: u64,
    /// Those of them with a bad outcome, by signal.
    pub signals: Vec<SignalCount>,
    /// Connections that were not watched because there was no room.
    pub not_watched: u64,
    /// Bad outcomes that are counted here, but in no window: they came faster than they were read.
    pub lost: u64,
    /// Half of the handshakes took no longer; absent without any.
    pub handshake_p50_seconds: Option<f64>,
    /// 95 % of them took no longer.
    pub handshake_p95_seconds: Option<f64>,
    /// 99 % of them took no longer.
    pub handshake_p99_seconds: Option<f64>,
    /// Time that all handshakes took together.
    pub handshake_sum_seconds: f64,
    /// Handshakes by time, each counted once.
    pub handshakes: Vec<HandshakeBucket>,
}

/// Connections with a bad outcome.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SignalCount {
    /// `connect_failed` and the like.
    pub signal: String,
    /// How many.
    pub connections: u64,
}

/// Handshakes that took up to so long, and longer than those before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HandshakeBucket {
    /// The longest; absent for what is longer than all others.
    pub upto_seconds: Option<f64>,
    /// How many.
    pub handshakes: u64,
}

/// One backend of [`VersionStatus`].
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BackendStatus {
    /// Address and port.
    #[schema(value_type = String)]
    pub addr: SocketAddr,
    /// Its weight.
    pub weight: u32,
    /// `up`, `down`, `no-next-hop`, `waiting`; `drain` or `maint` where an operator said so;
    /// `removed` for one that is not configured any more.
    #[schema(value_type = String)]
    pub state: Cow<'static, str>,
    /// The same, whatever operators say: `up`, `down`, `no-next-hop`, `unknown`.
    #[schema(value_type = String)]
    pub health: Cow<'static, str>,
    /// Why its health is not `up`.
    pub message: Option<String>,
    /// Buckets that steer new connections to it.
    pub buckets: u32,
    /// Packets sent to it.
    pub packets: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// New connections steered to it.
    pub connections: u64,
    /// Packets of new connections that were refused because no source port was left.
    #[serde(default)]
    pub no_port: u64,
    /// Its health checks; absent where none are made.
    pub check: Option<CheckStatus>,
    /// What an operator has told it to be: `ready`, `drain` or `maint`.
    #[schema(value_type = String)]
    pub admin: Cow<'static, str>,
    /// The part of its share that it takes so far, a fraction of 1; absent unless it is in
    /// slow start.
    pub slow_start: Option<f64>,
    /// Buckets that steer new connections elsewhere and leave the older ones with it.
    pub draining_buckets: u32,
}

/// The health checks of a [`BackendStatus`] since the agent started.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct CheckStatus {
    /// Whether it passes them, by `rise` and `fall`.
    pub up: bool,
    /// Checks that passed.
    pub passes: u64,
    /// Checks that failed.
    pub failures: u64,
    /// Seconds since they last took it down or brought it up, or since they began.
    pub since_seconds: f64,
    /// How long the last one took that passed.
    pub latency_seconds: Option<f64>,
    /// Why the last one failed that did.
    pub last_failure: Option<String>,
    /// Seconds since then.
    pub last_failure_seconds: Option<f64>,
}

/// Packets counted under one reason.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ReasonCount {
    /// The reason's name.
    pub reason: String,
    /// `pass` or `drop`.
    pub verdict: String,
    /// Packets.
    pub packets: u64,
}

/// One map's capacity and use.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct MapStatus {
    /// The map's name.
    pub name: String,
    /// Elements it can hold.
    pub capacity: u64,
    /// Elements in use, where that is known.
    pub used: Option<u64>,
    /// Bytes of kernel memory.
    pub memory_bytes: u64,
}

/// What became of the entries of both flow tables, of [`Status`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct FlowStatus {
    /// Entries that were stored.
    pub stored: u64,
    /// Half-open and closed translated connections that were let go for new ones, the table being
    /// full.
    pub let_go: u64,
    /// Half-open and closed translated connections whose source port a new one has taken.
    pub taken_over: u64,
    /// New connections of moved buckets that went where the older ones go, the table being full:
    /// packets.
    pub untracked: u64,
    /// Entries of half-open connections, IPv4 and IPv6, as of the last look.
    pub half_open: [u64; 2],
}

/// `GET /v1/services/{name}/split`, `split SERVICE --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Split {
    /// The service.
    pub service: String,
    /// Name of the control version: it has what no other version claims.
    pub control: String,
    /// Number of the last change to the live state.
    pub revision: u64,
    /// Number of buckets of the service.
    pub buckets: u32,
    /// Versions with their shares, control first.
    pub versions: Vec<VersionShare>,
}

/// One version of [`Split`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct VersionShare {
    /// Its name.
    pub name: String,
    /// The share that was asked for, a fraction of 1.
    pub asked: f64,
    /// The same as it was written, `5%`.
    pub asked_text: String,
    /// The share of buckets it owns, a fraction of 1.
    pub in_force: f64,
    /// The number of buckets it owns.
    pub buckets: u32,
    /// Its share of the service's new connections over the last seconds; absent without any.
    pub measured: Option<f64>,
}

/// `GET /v1/health`: the loop answers.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`; whatever is not is an error.
    pub status: String,
    /// Version of the build.
    pub version: String,
    /// Seconds since the agent started.
    pub uptime_seconds: f64,
}

/// `GET /v1/services/{name}/backends`, `backend list SERVICE --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Backends {
    /// The service.
    pub service: String,
    /// `nat` or `dsr`.
    pub forward: String,
    /// Name of the control version.
    pub control: String,
    /// Number of the last change to the live state.
    pub revision: u64,
    /// Versions with their backends, control first.
    pub versions: Vec<VersionBackends>,
}

/// One version of [`Backends`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct VersionBackends {
    /// Its name.
    pub name: String,
    /// The number of buckets it owns.
    pub buckets: u32,
    /// Backends that take no new connections and may still have open ones.
    pub draining_backends: u32,
    /// Connections open on its backends; absent where that is not known.
    pub open_connections: Option<u64>,
    /// Its backends in the order of the configuration, then those that were removed and
    /// still drain.
    pub backends: Vec<BackendDetail>,
}

/// One backend of [`VersionBackends`].
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BackendDetail {
    /// What `status` says of it.
    #[serde(flatten)]
    pub backend: BackendStatus,
    /// Connections open on it; absent where that is not known, as with `dsr`.
    pub open_connections: Option<u64>,
    /// `dsr`: how many of its open connections have an entry, because they were opened in a
    /// bucket that had moved; absent where no bucket has.
    pub tracked_connections: Option<u64>,
}

/// `PUT /v1/services/{name}/backends/{backend}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackendRequest {
    /// `ready`, `drain` (no new connections) or `maint` (none at all).
    pub state: String,
    /// Kept in the audit trail.
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Also where nobody is left to take new connections.
    #[serde(default)]
    pub force: bool,
    /// Only if the service has not changed since this revision.
    #[serde(default)]
    pub if_revision: Option<u64>,
    /// Taken back after this time, such as `5m`, unless it is confirmed.
    #[serde(default)]
    pub confirm: Option<String>,
}

/// The answer to [`BackendRequest`], asked for or carried out.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct BackendReport {
    /// Whether it was carried out (not a dry run).
    pub applied: bool,
    /// Number of the change; that of the last one where nothing changed.
    pub revision: u64,
    /// The service.
    pub service: String,
    /// Address and port of the backend.
    pub backend: String,
    /// What it was: `ready`, `drain` or `maint`.
    pub before: String,
    /// What it is now.
    pub state: String,
    /// Buckets that steer new connections elsewhere; with slow start, when it is over.
    pub buckets_moved: u32,
    /// Backends that gain or lose buckets.
    pub backends_touched: Vec<String>,
    /// About how many open connections it is about: `drain` and `maint`, those on the backend;
    /// `ready`, those of the buckets that move. Absent where no entry is kept for them.
    pub connections_held: Option<u64>,
    /// New connections a second in the buckets that move, over the last seconds; absent where
    /// that is not known.
    pub connections_per_second: Option<f64>,
    /// What else there is to know, in sentences.
    pub notes: Vec<String>,
    /// Milliseconds until it is taken back unless it is confirmed.
    #[serde(default)]
    pub confirm_within_ms: Option<u64>,
    /// Microseconds from the request's arrival until the table was in force.
    pub took_us: u64,
}

/// `PUT /v1/services/{name}/split`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SplitRequest {
    /// Shares as `5%` or `64/65536` by version; versions left out keep theirs.
    pub split: std::collections::BTreeMap<String, String>,
    /// Kept in the audit trail.
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Watch the buckets for seven seconds before they move, so that a retransmitted SYN goes
    /// where the first one went. The answer comes when they have moved.
    #[serde(default)]
    pub learn: bool,
    /// Only if the service has not changed since this revision.
    #[serde(default)]
    pub if_revision: Option<u64>,
    /// Taken back after this time, such as `5m`, unless it is confirmed.
    #[serde(default)]
    pub confirm: Option<String>,
}

/// The answer to a split change, asked for or carried out.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ChangeReport {
    /// Whether it was carried out (not a dry run).
    pub applied: bool,
    /// Number of the change; that of the last one where nothing changed.
    pub revision: u64,
    /// The service.
    pub service: String,
    /// Versions with their shares after the change, control first.
    pub versions: Vec<ShareChange>,
    /// Buckets whose owner changes.
    pub buckets_moved: u32,
    /// Backends that gain or lose buckets.
    pub backends_touched: Vec<String>,
    /// About how many open connections the moved buckets hold; absent where no
    /// entry is kept for them.
    pub connections_held: Option<u64>,
    /// New connections a second in the buckets that move, over the last seconds; absent where
    /// that is not known.
    #[serde(default)]
    pub connections_per_second: Option<f64>,
    /// What else there is to know, in sentences.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Milliseconds for which the buckets were, or would be, watched before they moved;
    /// absent where they move at once.
    #[serde(default)]
    pub learned_ms: Option<u64>,
    /// Milliseconds until it is taken back unless it is confirmed.
    #[serde(default)]
    pub confirm_within_ms: Option<u64>,
    /// Microseconds from the request's arrival until the table was in force.
    pub took_us: u64,
}

/// One version's part of a [`ChangeReport`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ShareChange {
    /// Its name.
    pub name: String,
    /// Asked share as written.
    pub asked: String,
    /// Share of buckets before, a fraction of 1.
    pub before: f64,
    /// Share of buckets after, a fraction of 1.
    pub in_force: f64,
}

/// `POST /v1/undo`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UndoRequest {
    /// Only changes of this service; without it, of all.
    #[serde(default)]
    pub service: Option<String>,
    /// Back to the state as of this revision; without it, the last change alone.
    #[serde(default)]
    pub to: Option<u64>,
    /// Kept in the audit trail.
    #[serde(default)]
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Also where nobody is left to take new connections.
    #[serde(default)]
    pub force: bool,
    /// Only if nothing of it has changed since this revision.
    #[serde(default)]
    pub if_revision: Option<u64>,
    /// Itself taken back after this time, such as `5m`, unless it is confirmed.
    #[serde(default)]
    pub confirm: Option<String>,
}

/// The answer to [`UndoRequest`], asked for or carried out.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct UndoReport {
    /// Whether it was carried out (not a dry run).
    pub applied: bool,
    /// Number of the last change that it made.
    pub revision: u64,
    /// The changes that it takes back, newest first.
    pub undone: Vec<Event>,
    /// What becomes of services.
    pub services: Vec<ServiceUndo>,
    /// Buckets that move, of all services.
    pub buckets_moved: u32,
    /// Backends that gain or lose buckets.
    pub backends_touched: Vec<String>,
    /// About how many open connections the buckets hold that go elsewhere; absent where no
    /// entry is kept for them.
    pub connections_held: Option<u64>,
    /// What else there is to know, in sentences.
    pub notes: Vec<String>,
    /// Milliseconds until it is itself taken back unless it is confirmed.
    pub confirm_within_ms: Option<u64>,
    /// Microseconds from the request's arrival until the tables were in force.
    pub took_us: u64,
}

/// One service of [`UndoReport`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ServiceUndo {
    /// The service.
    pub service: String,
    /// Versions with their shares after it, control first.
    pub versions: Vec<ShareChange>,
    /// Buckets whose owner changes; where a backend is told what it was before, those that steer
    /// new connections elsewhere, as for `backend`.
    pub buckets_moved: u32,
    /// Backends that are told to be something else.
    pub backends: Vec<BackendTold>,
}

/// What a backend was told to be, and was before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackendTold {
    /// Address and port.
    pub backend: String,
    /// What it was: `ready`, `drain` or `maint`.
    pub before: String,
    /// What it is since.
    pub state: String,
}

/// `POST /v1/confirm`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfirmRequest {
    /// Which change; may be left out while only one waits.
    #[serde(default)]
    pub revision: Option<u64>,
    /// Kept in the audit trail.
    #[serde(default)]
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Only if nothing of it has changed since this revision.
    #[serde(default)]
    pub if_revision: Option<u64>,
}

/// The answer to [`ConfirmRequest`], asked for or carried out.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ConfirmReport {
    /// Whether it was carried out (not a dry run).
    pub applied: bool,
    /// Number of the change that says so.
    pub revision: u64,
    /// The changes that stay.
    pub confirmed: Vec<Event>,
}

/// `POST /v1/freeze`, `POST /v1/unfreeze`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FreezeRequest {
    /// The service; without it, all of them.
    #[serde(default)]
    pub service: Option<String>,
    /// Shown to whoever is refused a change, and kept in the audit trail; `freeze` needs it.
    #[serde(default)]
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Only if nothing of it has changed since this revision.
    #[serde(default)]
    pub if_revision: Option<u64>,
    /// Taken back after this time, such as `5m`, unless it is confirmed.
    #[serde(default)]
    pub confirm: Option<String>,
}

/// The answer to [`FreezeRequest`], asked for or carried out.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct FreezeReport {
    /// Whether it was carried out (not a dry run).
    pub applied: bool,
    /// Number of the change; that of the last one where nothing changed.
    pub revision: u64,
    /// The service; absent for all of them.
    pub service: Option<String>,
    /// Why it was frozen before; absent where it was not.
    pub before: Option<String>,
    /// Why it is frozen now; absent where it is not.
    pub frozen: Option<String>,
    /// What else there is to know, in sentences.
    pub notes: Vec<String>,
    /// Milliseconds until it is taken back unless it is confirmed.
    pub confirm_within_ms: Option<u64>,
}

/// `GET /v1/events`, `events --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Events {
    /// The oldest first.
    pub events: Vec<Event>,
    /// Number of the last event there is, whatever was asked for.
    pub last: u64,
}

/// Something that has happened: a change, or anything else.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number in the log of events; 0 where it is named outside the log.
    pub id: u64,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The same as RFC 3339 has it, in UTC.
    pub time: String,
    /// `split`, `backend`, `undo`, `panic`, `confirm`, `freeze`, `unfreeze`, and what the agent does by
    /// itself: `initial`, `adopt`, `config`, `start`, `down`, `up`, `interface`, `alert`.
    pub kind: String,
    /// The service; absent where it is about none, or all.
    pub service: Option<String>,
    /// Number of the change; absent for what is none.
    pub revision: Option<u64>,
    /// Who made the change; absent for the agent itself.
    pub uid: Option<u32>,
    /// The name of that user, where this host knows it.
    pub user: Option<String>,
    /// Why, as given.
    pub reason: Option<String>,
    /// What, in a sentence.
    pub text: String,
    /// Asked shares before, as written, where the change was about shares.
    #[serde(default)]
    pub before: std::collections::BTreeMap<String, String>,
    /// Asked shares after it.
    #[serde(default)]
    pub after: std::collections::BTreeMap<String, String>,
    /// Buckets that it moved.
    #[serde(default)]
    pub buckets_moved: u32,
    /// What backends were told to be.
    #[serde(default)]
    pub backends: Vec<BackendTold>,
    /// Revisions that it took back or confirmed.
    #[serde(default)]
    pub about: Vec<u64>,
    /// Within how many milliseconds it had to be confirmed.
    pub confirm_within_ms: Option<u64>,
}

/// `GET /v1/services/{name}/explain?from=ADDRESS[:PORT]&to=ADDRESS:PORT&protocol=tcp`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Explain {
    /// The service.
    pub service: String,
    /// The client, as asked.
    pub from: String,
    /// Address and port of the service that was assumed.
    pub to: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The first audience of a route that holds the client.
    pub audience: Option<String>,
    /// Its bucket; absent where the port matters and was not given.
    pub bucket: Option<u32>,
    /// The version that owns the bucket.
    pub version: Option<String>,
    /// Where a new connection goes.
    pub backend: Option<String>,
    /// Whether the bucket has moved within the drain time.
    pub tracked: bool,
    /// Where connections older than the move go.
    pub previous: Option<String>,
    /// The same in sentences.
    pub why: Vec<String>,
}

/// Every error over the socket, and every error with `--json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// The inside of [`ErrorBody`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// A word for programs: `unknown_service`, `bad_share`, `not_permitted` …
    pub code: String,
    /// The thing and the reason.
    pub message: String,
    /// The next step, where there is one.
    pub help: Option<String>,
    /// The exit code that the command ends with.
    pub exit_code: u8,
    /// `bad_config`: everything that is wrong or strange about the configuration files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub diagnostics: Vec<Diagnostic>,
}
