//! Numbers that the kernel side knows things by: table ids, pages, backend
//! indices. Each stays with what it was given to for as long as that lives.

use std::collections::{BTreeMap, BTreeSet};

use canary_ebpf_common::entry::BackendIndex;

use super::BootMs;

/// How long an index rests after the last trace of it is gone from the maps,
/// so that no CPU is still forwarding a packet by what it read before.
pub const QUARANTINE_MS: u64 = 1_000;

/// What has been taken back and is not given out again before it has rested.
#[derive(Clone, Debug)]
struct Resting<T>(Vec<(BootMs, T)>);

impl<T: Copy> Resting<T> {
    /// Begins the rest of something whose last trace was gone from the maps at `now_ms`.
    fn begin(&mut self, it: T, now_ms: BootMs) {
        self.0.push((now_ms + QUARANTINE_MS, it));
    }

    /// Takes out what has rested by `now_ms`.
    fn rested(&mut self, now_ms: BootMs) -> impl Iterator<Item = T> + use<T> {
        let rests = |(until, _): &(BootMs, T)| now_ms < *until;
        let (resting, rested) = std::mem::take(&mut self.0).into_iter().partition(rests);
        self.0 = resting;
        let rested: Vec<_> = rested;
        rested.into_iter().map(|(_, it)| it)
    }
}

impl<T> Default for Resting<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// Runs of pages of the forwarding table, given out first-fit.
#[derive(Clone, Debug)]
pub(super) struct Pages {
    total: u32,
    /// First page → number of pages.
    used: BTreeMap<u32, u32>,
    resting: Resting<u32>,
}

impl Pages {
    pub(super) fn new(total: u32) -> Self {
        Self { total, used: BTreeMap::new(), resting: Resting::default() }
    }

    /// Takes the lowest free run of `count` pages.
    pub(super) fn take(&mut self, count: u32, now_ms: BootMs) -> Option<u32> {
        self.settle(now_ms);
        let mut first = 0_u32;
        for (&start, &length) in &self.used {
            if start - first >= count {
                break;
            }
            first = start + length;
        }
        self.reserve(first, count).then_some(first)
    }

    /// Takes this very run, if it is free.
    pub(super) fn reserve(&mut self, first: u32, count: u32) -> bool {
        let Some(end) = first.checked_add(count).filter(|end| *end <= self.total) else {
            return false;
        };
        let before = self.used.range(..end).next_back();
        if count == 0 || before.is_some_and(|(start, length)| start + length > first) {
            return false;
        }
        self.used.insert(first, count);
        true
    }

    /// Gives out again what has rested by `now_ms`.
    pub(super) fn settle(&mut self, now_ms: BootMs) {
        for first in self.resting.rested(now_ms) {
            self.used.remove(&first);
        }
    }

    /// Takes the run back that begins at `first`, which no packet finds since `now_ms`.
    pub(super) fn release(&mut self, first: u32, now_ms: BootMs) {
        self.resting.begin(first, now_ms);
    }

    pub(super) fn free(&self) -> u32 {
        self.total - self.used.values().sum::<u32>()
    }
}

/// Table ids, the lowest free one first.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    free: BTreeSet<u16>,
    resting: Resting<u16>,
}

impl Ids {
    pub(super) fn new(total: u32) -> Self {
        Self { free: (0..=u16::MAX).take(total as usize).collect(), resting: Resting::default() }
    }

    pub(super) fn take(&mut self, now_ms: BootMs) -> Option<u16> {
        self.settle(now_ms);
        self.free.pop_first()
    }

    pub(super) fn reserve(&mut self, id: u16) -> bool {
        self.free.remove(&id)
    }

    /// Gives out again what has rested by `now_ms`.
    pub(super) fn settle(&mut self, now_ms: BootMs) {
        self.free.extend(self.resting.rested(now_ms));
    }

    /// Takes an id back that no packet finds since `now_ms`.
    pub(super) fn release(&mut self, id: u16, now_ms: BootMs) {
        self.resting.begin(id, now_ms);
    }
}

/// Backend indices, the lowest free one first.
#[derive(Clone, Debug)]
pub(super) struct Indices {
    free: BTreeSet<BackendIndex>,
    resting: Resting<BackendIndex>,
}

impl Indices {
    /// Indices up to `highest`; 0 names no backend.
    pub(super) fn new(highest: u16) -> Self {
        let free = (1..=highest.min(BackendIndex::MAX.get())).map(BackendIndex::new).collect();
        Self { free, resting: Resting::default() }
    }

    pub(super) fn take(&mut self, now_ms: BootMs) -> Option<BackendIndex> {
        self.settle(now_ms);
        self.free.pop_first()
    }

    pub(super) fn reserve(&mut self, index: BackendIndex) -> bool {
        self.free.remove(&index)
    }

    /// Gives out again what has rested by `now_ms`.
    pub(super) fn settle(&mut self, now_ms: BootMs) {
        self.free.extend(self.resting.rested(now_ms));
    }

    /// Takes an index back whose last trace was gone from the maps at `now_ms`.
    pub(super) fn release(&mut self, index: BackendIndex, now_ms: BootMs) {
        self.resting.begin(index, now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_given_out_first_fit_and_never_twice() {
        let mut pages = Pages::new(20);
        assert!(pages.reserve(4, 8) && pages.reserve(16, 1));
        assert!(!pages.reserve(10, 2) && !pages.reserve(3, 2) && !pages.reserve(11, 3));
        assert!(!pages.reserve(18, 3) && !pages.reserve(u32::MAX, 2) && !pages.reserve(17, 0));
        let take = |pages: &mut Pages, count| pages.take(count, 0);
        assert_eq!(take(&mut pages, 5), None);
        assert_eq!([4, 4, 4].map(|n| take(&mut pages, n)), [Some(0), Some(12), None]);
        assert_eq!(pages.free(), 3);
        assert_eq!([2, 1, 1].map(|n| take(&mut pages, n)), [Some(17), Some(19), None]);
    }

    #[test]
    fn pages_and_ids_rest_before_they_are_used_again() {
        let mut pages = Pages::new(4);
        assert_eq!(pages.take(4, 0), Some(0));
        pages.release(0, 10_000);
        assert_eq!((pages.take(1, 10_999), pages.take(2, 11_000)), (None, Some(0)));
        let mut ids = Ids::new(1);
        assert_eq!(ids.take(0), Some(0));
        ids.release(0, 10_000);
        assert_eq!((ids.take(10_999), ids.take(11_000)), (None, Some(0)));
    }

    #[test]
    fn an_index_rests_before_it_is_used_again() {
        let mut indices = Indices::new(9);
        let first = indices.take(0).unwrap();
        assert_eq!(first.get(), 1);
        assert!(indices.reserve(BackendIndex::new(2)) && !indices.reserve(BackendIndex::new(2)));
        indices.release(first, 10_000);
        assert_eq!(indices.take(10_999).unwrap().get(), 3);
        assert_eq!(indices.take(11_000).unwrap(), first);
    }
}
