//! Stage 1: which version owns each bucket, and the least change that brings a
//! wanted split about.
//!
//! Owns [`Change`], how a change is chosen, applied and taken back. Must not
//! know of backends, weights or health (they never change owners), nor how a
//! share becomes a number of buckets ([`super::targets`]).
//!
//! With three or more versions no function of the split alone moves the least,
//! so owners are state: they are stored, every change is stored, and taking a
//! change back is [`revert`] of exactly that change.

use std::fmt;

use super::{MAX_BUCKETS, Targets, score::mix};
use crate::{abi::MAX_VERSIONS, differing, ones};

/// One bucket that goes from one version to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Change {
    /// The bucket's number.
    pub bucket: u32,
    /// Slot of the version that loses it.
    pub from: u8,
    /// Slot of the version that gets it.
    pub to: u8,
}

/// Why owners and a change, or owners and a split, do not go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnersError {
    /// An owner is no version slot.
    UnknownSlot {
        /// The bucket that names it.
        bucket: u32,
        /// What it names.
        slot: u8,
    },
    /// The split was made for another number of buckets.
    BucketsDiffer {
        /// Buckets that have an owner.
        owners: u32,
        /// Buckets that the split hands out.
        wanted: u32,
    },
    /// There are none, or more than [`MAX_BUCKETS`].
    BucketCount(usize),
    /// A change names a bucket that does not exist.
    NoSuchBucket(u32),
    /// A change expects another owner than the bucket has: it was made for other owners.
    OwnerDiffers {
        /// The bucket.
        bucket: u32,
        /// The owner that the change expects.
        expected: u8,
        /// The owner that it has.
        found: u8,
    },
}

impl fmt::Display for OwnersError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownSlot { bucket, slot } => {
                write!(
                    f,
                    "bucket {bucket} is owned by slot {slot}, and slots end at {}",
                    MAX_VERSIONS - 1
                )
            }
            Self::BucketsDiffer { owners, wanted } => {
                write!(f, "the split is for {wanted} buckets, but {owners} have an owner")
            }
            Self::BucketCount(count) => {
                write!(f, "{count} buckets: not between 1 and {MAX_BUCKETS}")
            }
            Self::NoSuchBucket(bucket) => {
                write!(f, "the change names bucket {bucket}, which does not exist")
            }
            Self::OwnerDiffers { bucket, expected, found } => write!(
                f,
                "the change expects bucket {bucket} to belong to slot {expected}, but slot {found} owns it"
            ),
        }
    }
}

impl std::error::Error for OwnersError {}

/// Owners before any split: `buckets` buckets that all belong to the slot `control`.
pub fn initial_owners(buckets: u32, control: u8) -> Vec<u8> {
    vec![control; buckets as usize]
}

/// How many buckets each slot owns.
///
/// # Errors
///
/// [`OwnersError::UnknownSlot`] if an owner is no slot, [`OwnersError::BucketCount`] if there
/// are none or too many.
pub fn counts(owners: &[u8]) -> Result<[u32; MAX_VERSIONS], OwnersError> {
    if owners.is_empty() || owners.len() > MAX_BUCKETS as usize {
        return Err(OwnersError::BucketCount(owners.len()));
    }
    // Slot by slot, so that sixteen owners are compared at once, until all are counted.
    let mut counts = [0; MAX_VERSIONS];
    let mut counted = 0;
    for (slot, count) in (0_u8..).zip(&mut counts) {
        if counted == owners.len() as u32 {
            break;
        }
        // Each sum fits into its byte.
        let groups = owners.chunks(usize::from(u8::MAX));
        let of_group = |group: &[u8]| group.iter().fold(0_u8, |n, &o| n + u8::from(o == slot));
        *count = groups.map(|group| u32::from(of_group(group))).sum();
        counted += *count;
    }
    if counted < owners.len() as u32 {
        let at = owners.iter().position(|&o| usize::from(o) >= MAX_VERSIONS).unwrap_or_default();
        return Err(OwnersError::UnknownSlot { bucket: at as u32, slot: owners[at] });
    }
    Ok(counts)
}

/// The least change from `owners` to `wanted`, ordered by bucket.
///
/// As many buckets move as versions grow by, together: a version that shrinks gives
/// only what it has too much, and straight to one that grows. A version whose count
/// stays keeps its buckets.
///
/// Which buckets move follows from `salt`, which puts all buckets in an order. Control
/// gives those that come first in it, any other version those that come last, and when
/// several versions grow, lower slots get the earlier ones and control the last. So
/// within one rollout (one salt) growth is nested, and a version that grew at control's
/// expense and shrinks again gives the last first: 0 → 5 → 50 → 5 % ends with the
/// buckets it had at 5 %. For an exact way back through any sequence there is [`revert`].
///
/// # Errors
///
/// [`OwnersError::BucketCount`], [`OwnersError::UnknownSlot`] or
/// [`OwnersError::BucketsDiffer`] if `owners` are none that `wanted` can be made of.
pub fn plan(owners: &[u8], wanted: &Targets, salt: u64) -> Result<Vec<Change>, OwnersError> {
    let present = counts(owners)?;
    if wanted.buckets() as usize != owners.len() {
        return Err(OwnersError::BucketsDiffer {
            owners: owners.len() as u32,
            wanted: wanted.buckets(),
        });
    }
    let control = usize::from(wanted.control());
    let surplus: [u32; MAX_VERSIONS] =
        std::array::from_fn(|slot| present[slot].saturating_sub(wanted.counts()[slot]));

    // What can leave: the place in the salt's order above, the bucket below.
    let salt = mix(salt);
    let place = |bucket: usize| mix(salt ^ bucket as u64) & !0xffff_ffff | bucket as u64;
    let mut leaving: [Vec<u64>; MAX_VERSIONS] = Default::default();
    for slot in (0..MAX_VERSIONS).filter(|&slot| surplus[slot] > 0) {
        let its = ones(differing(owners, owners, |owner, _| usize::from(owner) == slot));
        leaving[slot].reserve_exact(present[slot] as usize);
        its.for_each(|bucket| leaving[slot].push(place(bucket)));
    }
    let mut pool = Vec::with_capacity(surplus.iter().sum::<u32>() as usize);
    for (slot, keys) in leaving.iter_mut().enumerate() {
        let surplus = surplus[slot] as usize;
        if surplus == keys.len() {
            pool.append(keys);
        } else if slot == control {
            keys.select_nth_unstable(surplus);
            pool.extend_from_slice(&keys[..surplus]);
        } else if surplus > 0 {
            let kept = keys.len() - surplus;
            keys.select_nth_unstable(kept);
            pool.extend_from_slice(&keys[kept..]);
        }
    }

    let growing: Vec<(u8, usize)> = (0..MAX_VERSIONS)
        .filter(|&slot| slot != control)
        .chain([control])
        .map(|slot| (slot as u8, wanted.counts()[slot].saturating_sub(present[slot]) as usize))
        .filter(|&(_, growth)| growth > 0)
        .collect();
    if growing.len() > 1 {
        pool.sort_unstable();
    }
    const STAYS: u8 = u8::MAX;
    let mut next = vec![STAYS; owners.len()];
    let mut rest = &pool[..];
    for (slot, growth) in growing {
        // Both sides sum to the number of buckets, so the pool is as large as all growth.
        let (given, others) = rest.split_at(growth.min(rest.len()));
        for &key in given {
            next[(key & 0xffff_ffff) as usize] = slot;
        }
        rest = others;
    }
    let mut changes = Vec::with_capacity(pool.len());
    ones(differing(owners, &next, |_, to| to != STAYS)).for_each(|bucket| {
        changes.push(Change { bucket: bucket as u32, from: owners[bucket], to: next[bucket] });
    });
    Ok(changes)
}

/// Makes `changes`, in their order.
///
/// # Errors
///
/// [`OwnersError::NoSuchBucket`] or [`OwnersError::OwnerDiffers`] if the changes were made
/// for other owners; `owners` are then as before.
pub fn apply(owners: &mut [u8], changes: &[Change]) -> Result<(), OwnersError> {
    for (done, change) in changes.iter().enumerate() {
        if let Err(error) = turn(owners, change.bucket, change.from, change.to) {
            for change in changes[..done].iter().rev() {
                owners[change.bucket as usize] = change.from;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Takes `changes` back, the last first: the inverse of [`apply`].
///
/// # Errors
///
/// [`OwnersError::NoSuchBucket`] or [`OwnersError::OwnerDiffers`] if the owners are not
/// those that the changes led to; `owners` are then as before.
pub fn revert(owners: &mut [u8], changes: &[Change]) -> Result<(), OwnersError> {
    for (at, change) in changes.iter().enumerate().rev() {
        if let Err(error) = turn(owners, change.bucket, change.to, change.from) {
            for change in &changes[at + 1..] {
                owners[change.bucket as usize] = change.to;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// What turns `before` into `after`, as far as both have the bucket.
pub fn difference(before: &[u8], after: &[u8]) -> Vec<Change> {
    let of = before.len().min(after.len());
    let differ = ones(differing(&before[..of], &after[..of], |from, to| from != to));
    differ.map(|at| Change { bucket: at as u32, from: before[at], to: after[at] }).collect()
}

fn turn(owners: &mut [u8], bucket: u32, from: u8, to: u8) -> Result<(), OwnersError> {
    let owner = owners.get_mut(bucket as usize).ok_or(OwnersError::NoSuchBucket(bucket))?;
    if *owner != from {
        return Err(OwnersError::OwnerDiffers { bucket, expected: from, found: *owner });
    }
    *owner = to;
    Ok(())
}
