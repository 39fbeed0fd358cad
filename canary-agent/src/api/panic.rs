//! What goes over the socket about a panic.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::model::ShareChange;

/// `POST /v1/panic`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PanicRequest {
    /// The service; without it, all of them.
    #[serde(default)]
    pub service: Option<String>,
    /// Open connections of other versions go, too.
    #[serde(default, rename = "move")]
    pub moves: bool,
    /// Kept in the audit trail.
    #[serde(default)]
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// What the request is called: another one of the same name does nothing more.
    #[serde(default)]
    pub id: Option<u64>,
}

/// The answer to [`PanicRequest`], asked for or carried out; `panic --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct PanicReport {
    /// Whether it was carried out (not a dry run).
    pub applied: bool,
    /// Who has done it: `agent`, or `maps` where the command has written them, because no agent has
    /// answered or because it was about all services. Then an agent adopts and stores it.
    pub by: String,
    /// Number of the last change that it made; absent where no agent has stored it yet.
    pub revision: Option<u64>,
    /// What becomes of services.
    pub services: Vec<PanicService>,
    /// Buckets whose owner changes, of all services.
    pub buckets_moved: u32,
    /// Backends that gain or lose buckets.
    pub backends_touched: Vec<String>,
    /// About how many open connections the buckets hold; absent where no entry is kept for them.
    pub connections_held: Option<u64>,
    /// What else there is to know, in sentences.
    pub notes: Vec<String>,
    /// Microseconds from the request's arrival until it was in force.
    pub took_us: u64,
    /// Microseconds of those for the maps, where the command has written them.
    #[serde(default)]
    pub maps_us: Option<u64>,
}

/// One service of [`PanicReport`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct PanicService {
    /// The service.
    pub service: String,
    /// Versions with their shares after it, control first.
    pub versions: Vec<ShareChange>,
    /// Buckets whose owner changes.
    pub buckets_moved: u32,
    /// Why it is left as it is; absent where it is not.
    pub refused: Option<String>,
}

/// That a service is where a panic has sent it: nobody has set a share since.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PanicStatus {
    /// Why.
    pub reason: Option<String>,
    /// Number of the change.
    pub revision: u64,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Who.
    pub uid: Option<u32>,
}
