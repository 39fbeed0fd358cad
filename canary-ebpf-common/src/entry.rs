//! The forwarding table's entry: 32 bits that say where a bucket's packets go.

/// Index of a backend record. 15 bits; 0 is [`BackendIndex::NONE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BackendIndex(u16);

impl BackendIndex {
    /// The record that is never usable: a bucket that names it gets nothing.
    pub const NONE: Self = Self(0);
    /// The largest index that an entry can hold.
    pub const MAX: Self = Self(0x7fff);

    /// The index of `raw`, of which only the low 15 bits count.
    #[inline(always)]
    pub const fn new(raw: u16) -> Self {
        Self(raw & Self::MAX.0)
    }

    /// The plain number, below 32,768.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Whether this names no backend.
    #[inline(always)]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// One bucket of a forwarding table, as the kernel reads it in a single load.
///
/// Bits 0–14 `current` backend, 15–29 `previous` backend, 30 `tracked`,
/// 31 `learning`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Entry(pub u32);

const TRACKED: u32 = 1 << 30;
const LEARNING: u32 = 1 << 31;

impl Entry {
    /// An entry that steers to `current` and remembers nothing.
    #[inline(always)]
    pub const fn steady(current: BackendIndex) -> Self {
        Self(current.get() as u32)
    }

    /// An entry that steers new connections to `current` and those older than
    /// its last move to `previous`.
    #[inline(always)]
    pub const fn tracking(current: BackendIndex, previous: BackendIndex, learning: bool) -> Self {
        Self(
            current.get() as u32
                | (previous.get() as u32) << 15
                | TRACKED
                | if learning { LEARNING } else { 0 },
        )
    }

    /// Where new connections go.
    #[inline(always)]
    pub const fn current(self) -> BackendIndex {
        BackendIndex::new(self.0 as u16)
    }

    /// Where connections older than the bucket's move go; meaningful while
    /// [`tracked`](Self::tracked).
    #[inline(always)]
    pub const fn previous(self) -> BackendIndex {
        BackendIndex::new((self.0 >> 15) as u16)
    }

    /// Whether the bucket has moved and connections are looked up.
    #[inline(always)]
    pub const fn tracked(self) -> bool {
        self.0 & TRACKED != 0
    }

    /// Whether UDP flows without an entry still go to `previous`.
    #[inline(always)]
    pub const fn learning(self) -> bool {
        self.0 & LEARNING != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_reads_back_and_no_field_touches_another() {
        for current in (0..=0x7fff).step_by(31) {
            for previous in (0..=0x7fff).step_by(127) {
                for learning in [false, true] {
                    let (c, p) = (BackendIndex::new(current), BackendIndex::new(previous));
                    let entry = Entry::tracking(c, p, learning);
                    assert_eq!(
                        (entry.current(), entry.previous(), entry.tracked(), entry.learning()),
                        (c, p, true, learning)
                    );
                    let steady = Entry::steady(c);
                    assert_eq!(
                        (steady.current(), steady.tracked(), steady.learning()),
                        (c, false, false)
                    );
                }
            }
        }
    }
}
