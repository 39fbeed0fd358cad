//! Preparing a change: its buckets are watched for a while before they move.
//!
//! A SYN that is seen in that time has an entry by which its retransmissions go where it
//! went, although its bucket is elsewhere by then. Seven seconds: a SYN is sent again after
//! one, three and seven (RFC 6298, 2.1 and 5.5).

use canary_ebpf_common::{Packed, abi::LedgerEntry, entry::Entry};

use super::{BootMs, BucketSet, Policy, Update, clear_due_ms};
use crate::config::model::Existing;

/// For how long buckets are watched before they move, milliseconds.
pub const LEARN_MS: u64 = 7_000;

/// Whether watching buckets before they move is of any use.
pub(super) fn helps(policy: &Policy) -> bool {
    policy.tracks && policy.existing == Existing::Pin && policy.drain_ms != Some(0)
}

/// What [`watch`] found to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Watched {
    /// What has to change.
    pub(super) updates: Vec<Update>,
    /// Buckets that can't be watched yet: what is left of their former life has to be swept.
    pub(super) waiting: u32,
    /// When something is due of the others.
    pub(super) next_due_ms: Option<BootMs>,
}

/// Tracks `buckets`, where they are. None is forgotten before it would be had it moved
/// [`LEARN_MS`] from now, however short the drain is.
pub(super) fn watch(
    entries: &Packed<Entry>,
    ledger: &Packed<LedgerEntry>,
    buckets: &BucketSet,
    unswept: &BucketSet,
    policy: &Policy,
    now_ms: BootMs,
) -> Watched {
    let mut done = Watched::default();
    let moves_ms = now_ms.saturating_add(LEARN_MS);
    for bucket in buckets.iter() {
        let at = bucket as usize;
        let (Some(&before), Some(record)) = (entries.get(at), ledger.get(at)) else {
            continue;
        };
        if before.current().is_none() {
            // No connection can be opened there that would have to be remembered.
            continue;
        }
        if !before.tracked() && unswept.contains(bucket) {
            done.waiting += 1;
            continue;
        }
        let after = match before.tracked() {
            true => before,
            false => {
                let learning = policy.learn_ms.is_some();
                Entry::tracking(before.current(), before.current(), learning)
            }
        };
        let record = LedgerEntry::new(record.owner(), moves_ms);
        done.updates.push(Update { bucket, before, after, record });
        let cleared = policy.drain_ms.map(|drain| clear_due_ms(bucket, moves_ms, drain));
        let learned = policy.learn_ms.map(|learn| moves_ms.saturating_add(learn));
        done.next_due_ms = [done.next_due_ms, cleared, learned].into_iter().flatten().min();
    }
    done
}
