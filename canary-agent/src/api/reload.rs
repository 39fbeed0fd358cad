//! What goes over the socket about a reload and what it would change.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::Diagnostic;

/// `POST /v1/reload`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReloadRequest {
    /// Kept in the audit trail.
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Also where open connections break.
    #[serde(default)]
    pub force: bool,
    /// Only if nothing has changed since this revision.
    #[serde(default)]
    pub if_revision: Option<u64>,
    /// Taken back after this time, such as `5m`, unless it is confirmed.
    #[serde(default)]
    pub confirm: Option<String>,
}

/// The answer to [`ReloadRequest`], asked for or carried out; `diff --json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReloadReport {
    /// Whether it was carried out (not a dry run).
    pub applied: bool,
    /// Whether the files say anything else than what runs (or ran, if it was carried out).
    pub differs: bool,
    /// Number of the last change to the live state.
    pub revision: u64,
    /// Keys of `[agent]` with other values.
    pub settings: Vec<SettingChange>,
    /// Services that come, go or change, in the order of the files; those that go last.
    pub services: Vec<ServiceChange>,
    /// Buckets that steer new connections elsewhere, in all services together.
    pub buckets_moved: u64,
    /// How many clients go by another route, or by none any more; absent where audiences and routes
    /// stay.
    #[serde(default)]
    pub audiences: Option<AudienceChange>,
    /// Keys that only a restart changes: with any of them, a reload is refused.
    pub needs_restart: Vec<String>,
    /// Why the reload is refused without `force`, each a sentence.
    pub needs_force: Vec<String>,
    /// What else there is to know, each a sentence.
    pub notes: Vec<String>,
    /// Milliseconds until it is taken back unless it is confirmed.
    #[serde(default)]
    pub confirm_within_ms: Option<u64>,
    /// What is strange about the files.
    pub warnings: Vec<Diagnostic>,
    /// Microseconds from the request's arrival until it was in force.
    pub took_us: u64,
    /// Microseconds of those in which the agent did nothing else.
    pub busy_us: u64,
}

/// Clients that go by another route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AudienceChange {
    /// In how many networks they are.
    pub networks: usize,
    /// How many IPv4 addresses that is.
    pub addresses_v4: u64,
    /// How many IPv6 addresses that is, in decimal.
    pub addresses_v6: String,
}

/// A key with another value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SettingChange {
    /// The key, as in the files; a service's without `service.`.
    pub key: String,
    /// What runs.
    pub before: String,
    /// What the files say.
    pub after: String,
}

/// A service that comes, goes or changes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServiceChange {
    /// Its name.
    pub name: String,
    /// `added`, `removed` or `changed`.
    pub change: String,
    /// Its keys with other values.
    pub settings: Vec<SettingChange>,
    /// Versions that come or go.
    pub versions: Vec<VersionChange>,
    /// Backends that come, go or get another weight.
    pub backends: Vec<BackendChange>,
    /// Buckets that steer new connections elsewhere.
    pub buckets_moved: u32,
    /// Backends that gain or lose buckets.
    pub backends_touched: Vec<String>,
    /// About how many open connections the change is about: those of the buckets that move, of
    /// a service that goes all. Absent where no entry is kept for them.
    pub connections_held: Option<u64>,
}

/// A version that comes or goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VersionChange {
    /// Its name.
    pub name: String,
    /// `added` or `removed`.
    pub change: String,
}

/// A backend that comes, goes or changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BackendChange {
    /// Its version.
    pub version: String,
    /// Address and port.
    pub addr: String,
    /// `added`, `removed` or `changed`.
    pub change: String,
    /// Its weight before; absent for one that comes.
    pub weight_before: Option<u32>,
    /// Its weight; absent for one that goes.
    pub weight: Option<u32>,
}
