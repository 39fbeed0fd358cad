//! Numbers that the kernel side knows things by: table ids, pages, backend
//! indices. Each stays with what it was given to for as long as that lives.

use std::collections::{BTreeMap, BTreeSet};

use canary_ebpf_common::entry::BackendIndex;

use super::BootMs;

/// How long an index rests after the last trace of it is gone from the maps,
/// so that no CPU is still forwarding a packet by what it read before.
pub const QUARANTINE_MS: u64 = 1_000;

/// Runs of pages of the forwarding table, given out first-fit.
#[derive(Clone, Debug)]
pub(super) struct Pages {
    total: u32,
    /// First page → number of pages.
    used: BTreeMap<u32, u32>,
}

impl Pages {
    pub(super) fn new(total: u32) -> Self {
        Self { total, used: BTreeMap::new() }
    }

    /// Takes the lowest free run of `count` pages.
    pub(super) fn take(&mut self, count: u32) -> Option<u32> {
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

    pub(super) fn free(&self) -> u32 {
        self.total - self.used.values().sum::<u32>()
    }
}

/// Table ids, the lowest free one first.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    free: BTreeSet<u16>,
}

impl Ids {
    pub(super) fn new(total: u32) -> Self {
        Self { free: (0..=u16::MAX).take(total as usize).collect() }
    }

    pub(super) fn take(&mut self) -> Option<u16> {
        self.free.pop_first()
    }

    pub(super) fn reserve(&mut self, id: u16) -> bool {
        self.free.remove(&id)
    }
}

/// Backend indices, the lowest free one first.
#[derive(Clone, Debug)]
pub(super) struct Indices {
    free: BTreeSet<BackendIndex>,
    resting: Vec<(BootMs, BackendIndex)>,
}

impl Indices {
    /// Indices up to `highest`; 0 names no backend.
    pub(super) fn new(highest: u16) -> Self {
        let free = (1..=highest.min(BackendIndex::MAX.get())).map(BackendIndex::new).collect();
        Self { free, resting: Vec::new() }
    }

    pub(super) fn take(&mut self, now_ms: BootMs) -> Option<BackendIndex> {
        let free = &mut self.free;
        self.resting.retain(|(until, index)| {
            let rests = now_ms < *until;
            if !rests {
                free.insert(*index);
            }
            rests
        });
        self.free.pop_first()
    }

    pub(super) fn reserve(&mut self, index: BackendIndex) -> bool {
        self.free.remove(&index)
    }

    /// Takes an index back whose last trace was gone from the maps at `now_ms`.
    pub(super) fn release(&mut self, index: BackendIndex, now_ms: BootMs) {
        self.resting.push((now_ms + QUARANTINE_MS, index));
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
        assert_eq!(pages.take(5), None);
        assert_eq!((pages.take(4), pages.take(4), pages.take(4)), (Some(0), Some(12), None));
        assert_eq!(pages.free(), 3);
        assert_eq!((pages.take(2), pages.take(1), pages.take(1)), (Some(17), Some(19), None));
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
