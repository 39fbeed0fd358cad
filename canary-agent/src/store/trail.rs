//! The audit trail, what waits for a confirmation, and what is frozen.

use std::net::SocketAddr;

use super::{Admin, Split};

/// So many changes keep their lists of buckets: `undo` goes back no further.
pub const KEPT_LISTS: u64 = 2_000;

/// So many changes are kept.
pub const KEPT_CHANGES: u64 = 100_000;

/// Of so many events those are kept that are no changes.
pub const KEPT_NOTICES: u64 = 20_000;

/// So many rollouts that are over are kept, of all names together.
pub const KEPT_ROLLOUTS: u64 = 1_000;

/// So many lines of evidence are kept: a day of one signal a second.
pub const KEPT_EVIDENCE: u64 = 100_000;

/// One line of the audit trail.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// When, in milliseconds since 1970. For people: nothing is computed from it.
    pub unix_ms: u64,
    /// Who, as the kernel said; `None` for the agent itself.
    pub uid: Option<u32>,
    /// The service; empty for all of them.
    pub service: String,
    /// `initial`, `adopt`, `config`, `split`, `backend`, `undo`, `confirm`, `freeze`, `unfreeze` …
    pub action: String,
    /// Why, as given.
    pub reason: Option<String>,
    /// The asked split before.
    pub before: Split,
    /// The asked split after.
    pub after: Split,
    /// Which buckets went from whom to whom, encoded: what undo restores. Empty once it has
    /// been forgotten (see [`KEPT_LISTS`]).
    pub moved: Vec<u8>,
    /// How many buckets those were.
    pub buckets_moved: u32,
    /// Names of versions by slot, as `moved` means them; empty where that was not recorded.
    pub slots: Vec<String>,
    /// What keyed the order of buckets before.
    pub salt: Option<u64>,
    /// Backends that were told to be something else.
    pub backends: Vec<BackendChange>,
    /// What became of a freeze.
    pub freeze: Option<FreezeChange>,
    /// Revisions that it took back or confirmed, newest first.
    pub about: Vec<u64>,
    /// Within how many milliseconds it had to be confirmed, if it had to.
    pub confirm_ms: Option<u64>,
}

/// What became of a backend in a [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendChange {
    /// Address and port.
    pub addr: SocketAddr,
    /// What it was.
    pub before: Admin,
    /// What it is since.
    pub after: Admin,
}

/// Reasons of a freeze before and after a [`Change`]; `None` where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreezeChange {
    /// Before.
    pub before: Option<String>,
    /// After.
    pub after: Option<String>,
}

/// Until when a change has to be confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// What was asked for at once is confirmed at once: the same number.
    pub batch: u64,
    /// How long it was to be.
    pub within_ms: u64,
    /// Until then, in milliseconds of `CLOCK_BOOTTIME`.
    pub boot_ms: u64,
    /// Of which start of the host that is.
    pub boot_id: String,
    /// About until then, in milliseconds since 1970: what is left of it counts after the host
    /// was started again.
    pub unix_ms: u64,
}

/// A change that is taken back unless it is confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Its revision.
    pub revision: u64,
    /// Until when.
    pub deadline: Deadline,
    /// What it changed.
    pub change: Change,
}

/// Something that may only be changed towards control.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Freeze {
    /// The service; empty for all of them.
    pub service: String,
    /// Since which revision.
    pub revision: u64,
    /// Since when, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Who said so; `None` for the agent itself.
    pub uid: Option<u32>,
    /// Why.
    pub reason: String,
}

/// Something that has happened and is no change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// `start`, `down`, `up`, `interface`, `alert` …
    pub kind: String,
    /// The service that it is about; empty for none.
    pub service: String,
    /// What, in a sentence.
    pub text: String,
}

/// One line of what has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A change, with its revision.
    Change(u64, u64, Box<Change>),
    /// Anything else.
    Notice(u64, Notice),
}

impl Event {
    /// Its number.
    pub const fn id(&self) -> u64 {
        match self {
            Self::Change(id, ..) | Self::Notice(id, _) => *id,
        }
    }
}

/// Which events are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventQuery {
    /// Those after this number, the oldest first; without it, the newest of all.
    pub after: Option<u64>,
    /// Those since then, in milliseconds since 1970.
    pub since_unix_ms: Option<u64>,
    /// Those of this service, and changes of all.
    pub service: Option<String>,
    /// At most so many.
    pub limit: usize,
}

/// A rollout that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRollout {
    /// Its number; `None` for one that is not stored yet.
    pub number: Option<u64>,
    /// Its name.
    pub name: String,
    /// When it began, in milliseconds since 1970.
    pub begun_unix_ms: u64,
    /// When it ended, if it did.
    pub ended_unix_ms: Option<u64>,
    /// Where it stands, encoded.
    pub record: String,
}

/// What a rollout went by in one window.
#[derive(Clone, Debug, PartialEq)]
pub struct EvidenceLine {
    /// The number of the rollout.
    pub rollout: u64,
    /// The step, from 0.
    pub step: u32,
    /// The end of the window, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The same since its gate began, without the time in which nobody watched.
    pub window_ms: u64,
    /// What was counted, or who was asked.
    pub signal: String,
    /// Counted: the canary's share.
    pub share: Option<f64>,
    /// Counted: bad events of control, and of the canary.
    pub events: Option<[u64; 2]>,
    /// Counted: connections of control that were watched.
    pub connections: Option<u64>,
    /// Asked: what was answered.
    pub answer: Option<String>,
}
