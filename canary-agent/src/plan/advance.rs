//! How a table follows what is desired of it: the only place that makes and
//! unmakes `tracked`, `previous` and `learning`.
//!
//! A connection that is open stays where it is because of three rules: a bucket
//! remembers where it went *before its first move* and keeps that through any
//! further ones; it forgets only when the drain has passed since its *last*
//! move; and it is not watched again before the flow entries of its former life
//! have been swept.

use canary_ebpf_common::{
    abi::LedgerEntry,
    differing,
    entry::{BackendIndex, Entry},
    ones,
};

use super::{BootMs, BucketSet};
use crate::config::model::Existing;

/// In how many parts a table lets go of its old connections.
const SLICES: u64 = 128;

/// What a service wants done with connections when buckets move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether moved buckets are tracked. Not with `nat`: there every flow has
    /// an entry anyway, which is followed whatever its bucket says.
    pub tracks: bool,
    /// What a change of owner does.
    pub existing: Existing,
    /// How long after its last move a bucket is tracked; `None` for ever.
    pub drain_ms: Option<u64>,
    /// How long after a move flows without a SYN are learned; `None` for a
    /// service without such flows.
    pub learn_ms: Option<u64>,
}

/// A bucket whose entry or ledger changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// Which.
    pub bucket: u32,
    /// Its entry before.
    pub before: Entry,
    /// Its entry now.
    pub after: Entry,
    /// Its ledger now.
    pub record: LedgerEntry,
}

/// What [`Advance::run`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advanced {
    /// What changed, ascending by bucket.
    pub updates: Vec<Update>,
    /// Buckets that were tracked and are not any more.
    pub cleared: Vec<u32>,
    /// Buckets that should have moved but wait for a sweep.
    pub deferred: u32,
    /// When something is due next without any other change.
    pub next_due_ms: Option<BootMs>,
}

/// When `bucket` is forgotten that moved last at `moved_ms`: within the last
/// tenth of the drain, at a time that differs from bucket to bucket.
pub fn clear_due_ms(bucket: u32, moved_ms: BootMs, drain_ms: u64) -> BootMs {
    let tenth = drain_ms / 10;
    // Neighbouring buckets belong to no common client, but to one page: mix them anyway, so
    // that no slice depends on how owners lie in the table.
    let slice = u64::from(bucket.wrapping_mul(0x9e37_79b1) >> 16) % SLICES;
    moved_ms.saturating_add(drain_ms - tenth).saturating_add(tenth * (slice + 1) / SLICES)
}

/// A table as it is, and what it should become. Lengths that differ are cut to the shortest.
#[derive(Clone, Copy, Debug)]
pub struct Advance<'a> {
    /// Its entries.
    pub entries: &'a [Entry],
    /// Its ledger.
    pub ledger: &'a [LedgerEntry],
    /// Where new connections should go, by bucket; `None` to leave that as it is.
    pub desired: Option<&'a [BackendIndex]>,
    /// Who should own each bucket.
    pub owners: &'a [u8],
    /// Who the ledger says owns each bucket, if that is at hand: it is read faster than there.
    pub owned: Option<&'a [u8]>,
    /// Buckets that were cleared by plans not applied yet: one of those does not begin to be
    /// tracked, so its move waits.
    pub unswept: &'a BucketSet,
    /// What the service wants.
    pub policy: &'a Policy,
    /// Nothing of any bucket is due before this, as an earlier call said; `BootMs::MAX` for
    /// never. Until then only the buckets that move are looked at.
    pub quiet_until_ms: BootMs,
    /// When.
    pub now_ms: BootMs,
}

impl Advance<'_> {
    /// What has to change.
    pub fn run(&self) -> Advanced {
        let Self { entries, ledger, desired, owners, owned, .. } = *self;
        let of = entries.len().min(ledger.len()).min(owners.len());
        let of = desired.map_or(of, |desired| of.min(desired.len()));
        let mut done = Advanced::default();
        if self.now_ms < self.quiet_until_ms {
            done.next_due_ms = (self.quiet_until_ms < BootMs::MAX).then_some(self.quiet_until_ms);
            let (entries, ledger, owners) = (&entries[..of], &ledger[..of], &owners[..of]);
            let another = |record: LedgerEntry, owner| record.owner() != owner;
            let mut moves: Vec<u64> = match owned {
                Some(owned) => differing(owned, owners, |owned, owner| owned != owner).collect(),
                None => differing(ledger, owners, another).collect(),
            };
            if let Some(desired) = desired {
                let elsewhere = |entry: Entry, wanted| entry.current() != wanted;
                let words = moves.iter_mut().zip(differing(entries, desired, elsewhere));
                words.for_each(|(moves, elsewhere)| *moves |= elsewhere);
            }
            ones(moves.into_iter()).for_each(|bucket| self.bucket(bucket, &mut done));
        } else {
            (0..of).for_each(|bucket| self.bucket(bucket, &mut done));
        }
        done
    }

    #[inline]
    fn bucket(&self, at: usize, done: &mut Advanced) {
        let Self { entries, ledger, desired, owners, unswept, policy, now_ms, .. } = *self;
        let (before, recorded, owner, bucket) = (entries[at], ledger[at], owners[at], at as u32);
        let wanted = desired.map_or(before.current(), |desired| desired[at]);
        let (after, record) = if wanted == before.current() {
            let settled = settle(bucket, before, recorded, policy, now_ms);
            (settled, LedgerEntry::new(owner, recorded.moved_ms()))
        } else {
            let moved = follow(before, wanted, recorded.owner() != owner, policy);
            if moved.tracked() && !before.tracked() && unswept.contains(bucket) {
                done.deferred += 1;
                (before, recorded)
            } else {
                (moved, LedgerEntry::new(owner, now_ms))
            }
        };
        if before.tracked() && !after.tracked() {
            done.cleared.push(bucket);
        }
        if let Some(due) = due_ms(bucket, after, record, policy) {
            done.next_due_ms = Some(done.next_due_ms.map_or(due, |first| first.min(due)));
        }
        if after != before || record != recorded {
            done.updates.push(Update { bucket, before, after, record });
        }
    }
}

/// The entry of a bucket that moves.
pub(super) fn follow(
    old: Entry,
    wanted: BackendIndex,
    owner_changes: bool,
    policy: &Policy,
) -> Entry {
    let lets_go = policy.existing == Existing::Move && owner_changes;
    if !policy.tracks || lets_go || policy.drain_ms == Some(0) {
        Entry::steady(wanted)
    } else if old.tracked() {
        Entry::tracking(wanted, old.previous(), old.learning())
    } else if old.current().is_none() {
        // No connection can have been opened while there was no backend.
        Entry::steady(wanted)
    } else {
        Entry::tracking(wanted, old.current(), policy.learn_ms.is_some())
    }
}

/// The entry of a bucket that stays, when time or policy have gone on.
fn settle(bucket: u32, old: Entry, record: LedgerEntry, policy: &Policy, now: BootMs) -> Entry {
    if !old.tracked() {
        return old;
    }
    let drained =
        policy.drain_ms.is_some_and(|drain| now >= clear_due_ms(bucket, record.moved_ms(), drain));
    if drained || !policy.tracks {
        return Entry::steady(old.current());
    }
    let learned =
        policy.learn_ms.is_none_or(|learn| now >= record.moved_ms().saturating_add(learn));
    Entry::tracking(old.current(), old.previous(), old.learning() && !learned)
}

/// When `entry` changes by itself.
fn due_ms(bucket: u32, entry: Entry, record: LedgerEntry, policy: &Policy) -> Option<BootMs> {
    if !entry.tracked() {
        return None;
    }
    let cleared = policy.drain_ms.map(|drain| clear_due_ms(bucket, record.moved_ms(), drain));
    let learned = match policy.learn_ms {
        Some(learn) if entry.learning() => Some(record.moved_ms().saturating_add(learn)),
        _ => None,
    };
    match (cleared, learned) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
