//! From the shares of a split to whole numbers of buckets.
//!
//! Owns rounding. Must not know which buckets a version has, only how many.

use std::fmt;

use super::MAX_BUCKETS;
use crate::{abi::MAX_VERSIONS, share::Share};

/// How many buckets each version is to own; together all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets {
    control: u8,
    counts: [u32; MAX_VERSIONS],
}

/// The share of one version, control excepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its slot.
    pub slot: u8,
    /// What was asked for it.
    pub share: Share,
    /// Whether this change is about it. A version that nobody changes keeps the number
    /// of buckets it has.
    pub changed: bool,
}

/// Why no split can be made of what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitError {
    /// Not a slot: slots end at `MAX_VERSIONS - 1`.
    UnknownSlot(u8),
    /// A slot is named twice.
    Duplicate(u8),
    /// The control version is given a share: it gets the rest.
    ControlHasShare(u8),
    /// More than there is.
    AboveWhole {
        /// Buckets asked for, as far as they can be told.
        wanted: u64,
        /// Buckets there are.
        buckets: u32,
    },
    /// No buckets, more than [`MAX_BUCKETS`], or fewer than there are versions with a share.
    BucketCount(u64),
}

impl fmt::Display for SplitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownSlot(slot) => write!(f, "slot {slot}: slots end at {}", MAX_VERSIONS - 1),
            Self::Duplicate(slot) => write!(f, "slot {slot} is named twice"),
            Self::ControlHasShare(slot) => {
                write!(f, "slot {slot} is control, which gets what the others leave")
            }
            Self::AboveWhole { wanted, buckets } => {
                write!(f, "the shares are more than the whole: {wanted} of {buckets} buckets")
            }
            Self::BucketCount(count) => write!(f, "{count} buckets are too few or too many"),
        }
    }
}

impl std::error::Error for SplitError {}

impl Targets {
    /// Exactly these numbers of buckets; control and slots not named: the rest, and none.
    ///
    /// # Errors
    ///
    /// Any [`SplitError`].
    pub fn exact(buckets: u32, control: u8, wanted: &[(u8, u32)]) -> Result<Self, SplitError> {
        if buckets == 0 || buckets > MAX_BUCKETS {
            return Err(SplitError::BucketCount(buckets.into()));
        }
        check_slots(control, wanted.iter().map(|&(slot, _)| slot))?;
        let sum: u64 = wanted.iter().map(|&(_, count)| u64::from(count)).sum();
        if sum > u64::from(buckets) {
            return Err(SplitError::AboveWhole { wanted: sum, buckets });
        }
        let mut counts = [0; MAX_VERSIONS];
        for &(slot, count) in wanted {
            counts[usize::from(slot)] = count;
        }
        counts[usize::from(control)] = buckets - sum as u32;
        Ok(Self { control, counts })
    }

    /// Slot of the control version.
    pub fn control(&self) -> u8 {
        self.control
    }

    /// Buckets of each slot.
    pub fn counts(&self) -> &[u32; MAX_VERSIONS] {
        &self.counts
    }

    /// Buckets altogether.
    pub fn buckets(&self) -> u32 {
        self.counts.iter().sum()
    }
}

/// Rounds a whole split. `present` is what each slot owns now ([`super::counts`]);
/// versions that are not named get nothing.
///
/// A changed version's share is rounded alone ([`Share::buckets`]: to the nearest, at least
/// one above 0 %, at most all but one below 100 %), an unchanged version keeps its number,
/// and control gets the rest, at least one bucket if the shares leave anything.
///
/// Where control's share is next to nothing, numbers rounded alone can come to a few buckets
/// too many. Then, until they fit, one bucket is taken from each of: the changed versions
/// that were rounded up, furthest first; the unchanged ones likewise; and, only if shares
/// below one bucket were rounded up to it, again and again from the largest. So every share
/// is exact to one bucket, except beside shares that are smaller than a bucket.
///
/// # Errors
///
/// Any [`SplitError`].
pub fn targets(
    present: &[u32; MAX_VERSIONS],
    control: u8,
    wanted: &[Wanted],
) -> Result<Targets, SplitError> {
    let total: u64 = present.iter().map(|&n| u64::from(n)).sum();
    if total < 2 || total > u64::from(MAX_BUCKETS) {
        return Err(SplitError::BucketCount(total));
    }
    let buckets = total as u32;
    check_slots(control, wanted.iter().map(|w| w.slot))?;

    let mut parts: Vec<Part> = wanted
        .iter()
        .map(|&Wanted { slot, share, changed }| {
            let has = present[usize::from(slot)];
            // What has no bucket, or should have none, is not in force: round it.
            let keeps = !changed && (has == 0) == (share == Share::ZERO);
            Part {
                slot,
                exact: share.fraction() * f64::from(buckets),
                count: if keeps { has } else { share.buckets(buckets) },
                keeps,
            }
        })
        .collect();
    if !Share::fit_together(wanted.iter().map(|w| w.share)) {
        let wanted = parts.iter().map(|p| p.exact.ceil() as u64).sum();
        return Err(SplitError::AboveWhole { wanted, buckets });
    }
    // Does control get a share, if only the smallest that can be written?
    let smallest = "0.000000001%".parse().unwrap_or(Share::ZERO);
    let control_least =
        u64::from(Share::fit_together(wanted.iter().map(|w| w.share).chain([smallest])));

    let sum: u64 = parts.iter().map(|p| u64::from(p.count)).sum();
    let mut excess = (sum + control_least).saturating_sub(total);
    for keeps in [false, true] {
        let mut rounded_up: Vec<&mut Part> = parts
            .iter_mut()
            .filter(|p| p.keeps == keeps && p.count > 1 && f64::from(p.count) > p.exact)
            .collect();
        rounded_up.sort_by(|a, b| b.gained().total_cmp(&a.gained()).then(a.slot.cmp(&b.slot)));
        for part in rounded_up.into_iter().take(excess as usize) {
            part.count -= 1;
            excess -= 1;
        }
    }
    while excess > 0 {
        let largest = parts.iter_mut().filter(|p| p.count > 1);
        let Some(part) = largest.max_by_key(|p| (p.count, std::cmp::Reverse(p.slot))) else {
            return Err(SplitError::BucketCount(total));
        };
        part.count -= 1;
        excess -= 1;
    }
    let counts: Vec<(u8, u32)> = parts.iter().map(|p| (p.slot, p.count)).collect();
    Targets::exact(buckets, control, &counts)
}

struct Part {
    slot: u8,
    /// The share in buckets. A double holds it closely enough: shares have at most nine
    /// decimals, so one that is not whole is further from it than the error.
    exact: f64,
    count: u32,
    keeps: bool,
}

impl Part {
    fn gained(&self) -> f64 {
        f64::from(self.count) - self.exact
    }
}

fn check_slots(control: u8, slots: impl Iterator<Item = u8>) -> Result<(), SplitError> {
    let mut seen = [false; MAX_VERSIONS];
    if usize::from(control) >= MAX_VERSIONS {
        return Err(SplitError::UnknownSlot(control));
    }
    for slot in slots {
        match seen.get_mut(usize::from(slot)) {
            None => return Err(SplitError::UnknownSlot(slot)),
            Some(_) if slot == control => return Err(SplitError::ControlHasShare(slot)),
            Some(seen) if *seen => return Err(SplitError::Duplicate(slot)),
            Some(seen) => *seen = true,
        }
    }
    Ok(())
}
