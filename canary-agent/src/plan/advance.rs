//! How a table follows what is desired of it: the only place that makes and
//! unmakes `tracked`, `previous` and `learning`.
//!
//! A connection that is open stays where it is because of three rules: a bucket
//! remembers where it went *before its first move* and keeps that through any
//! further ones; it forgets only when the drain has passed since its *last*
//! move; and it is not watched again before the flow entries of its former life
//! have been swept.

use std::sync::Arc;

use canary_ebpf_common::{
    abi::LedgerEntry,
    entry::{BackendIndex, Entry},
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

/// What [`advance`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advanced {
    /// Whether entries or ledger changed at all.
    pub changed: bool,
    /// How many buckets steer new connections elsewhere now.
    pub moved: u32,
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

/// Advances a table to `desired` (where new connections should go, by bucket;
/// `None` to leave that as it is) and `owners`, at `now_ms`.
///
/// `unswept` are the buckets that were cleared by plans not applied yet: one of
/// those does not begin to be tracked, so its move waits.
///
/// Lengths that differ are cut to the shortest.
pub fn advance(
    entries: &mut Arc<Vec<Entry>>,
    ledger: &mut Arc<Vec<LedgerEntry>>,
    desired: Option<&[BackendIndex]>,
    owners: &[u8],
    unswept: &BucketSet,
    policy: &Policy,
    now_ms: BootMs,
) -> Advanced {
    let mut done = Advanced::default();
    let mut updates: Vec<(u32, Entry, LedgerEntry)> = Vec::new();
    let rows = entries.iter().zip(ledger.iter()).zip(owners);
    for (bucket, ((&entry, &record), &owner)) in (0_u32..).zip(rows) {
        let wanted = match desired {
            None => entry.current(),
            Some(desired) => match desired.get(bucket as usize) {
                Some(wanted) => *wanted,
                None => break,
            },
        };
        if wanted == entry.current() && record.owner() == owner {
            // Nearly every bucket: nothing moves it, and nothing of it is due.
            let due = due_ms(bucket, entry, record, policy);
            if !entry.tracked() || policy.tracks && due.is_none_or(|due| due > now_ms) {
                if let Some(due) = due {
                    done.next_due_ms = Some(done.next_due_ms.map_or(due, |first| first.min(due)));
                }
                continue;
            }
        }
        let (entry_now, record_now) = if wanted == entry.current() {
            let settled = settle(bucket, entry, record, policy, now_ms);
            (settled, LedgerEntry::new(owner, record.moved_ms()))
        } else {
            let moved = follow(entry, wanted, record.owner() != owner, policy);
            if moved.tracked() && !entry.tracked() && unswept.contains(bucket) {
                done.deferred += 1;
                (entry, record)
            } else {
                done.moved += 1;
                (moved, LedgerEntry::new(owner, now_ms))
            }
        };
        if entry.tracked() && !entry_now.tracked() {
            done.cleared.push(bucket);
        }
        if let Some(due) = due_ms(bucket, entry_now, record_now, policy) {
            done.next_due_ms = Some(done.next_due_ms.map_or(due, |first| first.min(due)));
        }
        if entry_now != entry || record_now != record {
            updates.push((bucket, entry_now, record_now));
        }
    }
    if !updates.is_empty() {
        done.changed = true;
        let entries = Arc::make_mut(entries);
        let ledger = Arc::make_mut(ledger);
        for (bucket, entry, record) in updates {
            entries[bucket as usize] = entry;
            ledger[bucket as usize] = record;
        }
    }
    done
}

/// The entry of a bucket that moves.
fn follow(old: Entry, wanted: BackendIndex, owner_changes: bool, policy: &Policy) -> Entry {
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
