//! Splits, owners, placements, rollouts, members and the audit trail, kept over restarts.
//!
//! Owns what is durable and the order of changes: every change has a revision,
//! and a change that was made against another revision is refused. Must not
//! know of the kernel or of what a split means: owners, placements and change lists are
//! opaque bytes here, encoded by the table compiler.

mod json;
mod members;
mod rollouts;
mod rows;
mod schema;
mod sqlite;
mod trail;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use canary_ebpf_common::share::Share;
use tokio::sync::watch;

pub use sqlite::SqliteStore;
pub use trail::{
    BackendChange, Change, Deadline, Event, EventQuery, EvidenceLine, Freeze, FreezeChange,
    KEPT_CHANGES, KEPT_EVIDENCE, KEPT_LISTS, KEPT_NOTICES, KEPT_ROLLOUTS, Notice, Pending,
    StoredRollout,
};

/// A split as it was asked for: shares by version name, control left out.
pub type Split = BTreeMap<String, Share>;

/// What an operator has told a backend to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Admin {
    /// It takes connections.
    #[default]
    Ready,
    /// It takes no new ones, and keeps those that are open.
    Drain,
    /// It takes nothing at all.
    Maint,
}

impl Admin {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ready, Self::Drain, Self::Maint];

    /// The word for it in commands, answers and the store.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Drain => "drain",
            Self::Maint => "maint",
        }
    }

    /// What has that word.
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|admin| admin.name() == word)
    }
}

/// Backends that are not [`Admin::Ready`], of all versions of a service.
pub type Admins = BTreeMap<SocketAddr, Admin>;

/// One service's live state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRecord {
    /// The service's name.
    pub name: String,
    /// The version that gets what no other claims.
    pub control: String,
    /// What was asked for, as written.
    pub split: Split,
    /// Names of versions by slot; empty for a free slot. What the owners refer to.
    pub slots: Vec<String>,
    /// The owner of each bucket, encoded.
    pub owners: Vec<u8>,
    /// Keys the order in which buckets are given out, until the next rollout.
    pub salt: u64,
    /// Backends that operators have taken out.
    pub admins: Admins,
    /// Where the buckets of its versions prefer to be, by version and family. Always there
    /// when loaded; `None` in a commit leaves what is stored.
    pub placements: Option<Vec<PlacementRecord>>,
}

/// Where the buckets of one version prefer to be in the table of one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementRecord {
    /// The version's name.
    pub version: String,
    /// 4 or 6.
    pub family: u8,
    /// The placement, encoded.
    pub placement: Vec<u8>,
}

/// A change together with the state that it leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// For the audit trail.
    pub change: Change,
    /// The service's state from then on; `None` leaves what is stored.
    pub record: Option<ServiceRecord>,
    /// When it is taken back unless somebody confirms it.
    pub deadline: Option<Deadline>,
    /// Revisions that need no confirmation any more, because they were confirmed or
    /// taken back.
    pub settles: Vec<u64>,
}

/// All live state at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Number of the last change; 0 before the first.
    pub revision: u64,
    /// Services by name.
    pub services: Vec<ServiceRecord>,
    /// Changes that are taken back unless they are confirmed, oldest first.
    pub pending: Vec<Pending>,
    /// What may only be changed towards control.
    pub freezes: Vec<Freeze>,
    /// Rollouts that are not over, and the last of each name; the oldest first.
    pub rollouts: Vec<StoredRollout>,
    /// Members of audiences, also those whose time is over.
    pub members: Vec<StoredMember>,
}

/// A member of an audience, and until when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredMember {
    /// The audience.
    pub audience: String,
    /// The member.
    pub network: ipnet::IpNet,
    /// Until then, in milliseconds of `CLOCK_BOOTTIME`.
    pub boot_ms: u64,
    /// Of which start of the host that is.
    pub boot_id: String,
    /// About until then, in milliseconds since 1970: what is left of it counts after the host
    /// was started again.
    pub unix_ms: u64,
}

/// Why state was not read or stored. Nothing was changed by the call.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Somebody else has made a change since.
    #[error("the state is at revision {found}, not {expected}")]
    Stale {
        /// The revision that the caller had seen.
        expected: u64,
        /// The one that is stored.
        found: u64,
    },
    /// It can't be opened, read or written now: the disk is full, the file
    /// system is read-only, something else is in its place.
    #[error("{}: {reason}", path.display())]
    Unavailable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file is no database of this program, or a broken one.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A newer release has written it.
    #[error(
        "{} has schema {found}, and this release knows schemas up to {known}: start the release that wrote it, or move the file away",
        path.display()
    )]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The newest that is known here.
        known: i64,
    },
}

/// Where live state is kept.
///
/// Compare-and-set by revision, so that several agents can share an
/// implementation that is not on this host.
pub trait StateStore: Send {
    /// All that is stored.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read; it is not taken for empty then.
    fn load(&mut self) -> Result<Snapshot, StoreError>;

    /// Stores `commits` in order, all or none, each under a revision of its own,
    /// and returns the last one. When this returns, they are durable.
    ///
    /// # Errors
    /// [`StoreError::Stale`] when the stored revision is not `expected`; others
    /// when it can't be written.
    fn commit(&mut self, expected: u64, commits: &[Commit]) -> Result<u64, StoreError>;

    /// Adds what has happened besides changes. It has no revision, and need not outlive a
    /// failure of power.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be written.
    fn record(&mut self, notices: &[Notice]) -> Result<(), StoreError>;

    /// Keeps where a rollout stands, and what it went by, in place of what was kept of it. With
    /// `durable` it outlives a failure of power when this returns. Returns its number.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be written.
    fn keep_rollout(
        &mut self,
        rollout: &StoredRollout,
        evidence: &[EvidenceLine],
        durable: bool,
    ) -> Result<u64, StoreError>;

    /// Keeps members in place of what was kept of them, and forgets those that are `gone`: all of
    /// it or nothing. With `durable` it outlives a failure of power when this returns.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be written.
    fn keep_members(
        &mut self,
        kept: &[StoredMember],
        gone: &[(String, ipnet::IpNet)],
        durable: bool,
    ) -> Result<(), StoreError>;

    /// Rollouts of a name, the newest first, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read.
    fn rollouts(&mut self, name: &str, limit: usize) -> Result<Vec<StoredRollout>, StoreError>;

    /// What a rollout went by, the oldest first.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read.
    fn evidence(&mut self, rollout: u64) -> Result<Vec<EvidenceLine>, StoreError>;

    /// The audit trail after revision `after`, oldest first, at most `limit` lines.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read.
    fn changes(&mut self, after: u64, limit: usize) -> Result<Vec<(u64, Change)>, StoreError>;

    /// The changes of one service, or of all, before revision `before`: newest first, at
    /// most `limit`.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read.
    fn changes_before(
        &mut self,
        service: Option<&str>,
        before: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Change)>, StoreError>;

    /// Changes and what has happened besides, in the order in which it was stored. Changes
    /// come without their lists of buckets.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read.
    fn events(&mut self, query: &EventQuery) -> Result<Vec<Event>, StoreError>;

    /// The number of the last event. It changes whenever something was stored, by whomever.
    fn watch(&self) -> watch::Receiver<u64>;
}
