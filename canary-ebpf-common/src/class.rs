//! Classes: clients that the same routes of all services are meant for.
//!
//! Owns what stands under a client's prefix, how a class becomes a table of a service, the bitmap
//! that spares packets the look, and what steers a client whose class has changed. As with a
//! bucket's move, new connections go by the class of now, older ones by the one before.

use crate::{
    abi::{Address, IPPROTO_UDP},
    entry::{BackendIndex, Entry},
    quic::Quic,
    steer::{Segment, Steering},
};

/// A class; 15 bits. Nobody's routes are meant for [`Class::REST`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Class(u16);

impl Class {
    /// Clients that no route is meant for: each service's own table steers them.
    pub const REST: Self = Self(0);
    /// The largest number of a class.
    pub const MAX: Self = Self(0x7fff);

    /// The class of `raw`, of which only the low 15 bits count.
    #[inline(always)]
    pub const fn new(raw: u16) -> Self {
        Self(raw & Self::MAX.0)
    }

    /// The plain number, below 32,768.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// What stands for it where an [`Entry`] has a backend: a number of as many bits.
    #[inline(always)]
    const fn in_place(self) -> BackendIndex {
        BackendIndex::new(self.0)
    }
}

/// What stands under a client's prefix, as the kernel reads it in a single load.
///
/// The same word as a bucket's [`Entry`], with classes in the place of backends. What is not written
/// down is the class [`Class::REST`], untracked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct ClassEntry(u32);

impl ClassEntry {
    /// `class`, since long ago.
    #[inline(always)]
    pub const fn steady(class: Class) -> Self {
        Self(Entry::steady(class.in_place()).0)
    }

    /// `class` now, `previous` for connections that are older.
    #[inline(always)]
    pub const fn tracking(class: Class, previous: Class, learning: bool) -> Self {
        Self(Entry::tracking(class.in_place(), previous.in_place(), learning).0)
    }

    /// The class of new connections.
    #[inline(always)]
    pub const fn current(self) -> Class {
        Class::new(Entry(self.0).current().get())
    }

    /// The class of those from before its change; meaningful while [`tracked`](Self::tracked).
    #[inline(always)]
    pub const fn previous(self) -> Class {
        Class::new(Entry(self.0).previous().get())
    }

    /// Whether it has changed and connections are looked up.
    #[inline(always)]
    pub const fn tracked(self) -> bool {
        Entry(self.0).tracked()
    }

    /// Whether UDP flows without an entry still go where the class before sends them.
    #[inline(always)]
    pub const fn learning(self) -> bool {
        Entry(self.0).learning()
    }

    /// The same without its time of learning.
    #[inline(always)]
    pub const fn learned(self) -> Self {
        match self.tracked() {
            true => Self::tracking(self.current(), self.previous(), false),
            false => self,
        }
    }
}

/// What is left of the class before for a client whose class has changed, `previous` being its
/// bucket's entry in the table of that class: where connections go that nobody remembers, which
/// are older than the change. While the bucket is tracked itself that is its own `previous`, for
/// they may be older than both changes.
///
/// Names nobody as `current`; see [`with_older`].
#[inline(always)]
pub const fn older(class: ClassEntry, previous: Entry) -> Entry {
    let older = if previous.tracked() { previous.previous() } else { previous.current() };
    Entry::tracking(BackendIndex::NONE, older, class.learning())
}

/// The entry that steers a client, `current` being its bucket's in the table of the class of now.
/// `older` is what [`older`] says, or untracked where the class has not changed. New connections
/// go by the table of now, and are remembered.
#[inline(always)]
pub const fn with_older(current: Entry, older: Entry) -> Entry {
    if !older.tracked() {
        return current;
    }
    // A bucket of the old table without anyone to go to had no connections.
    let previous = if older.previous().is_none() { current.current() } else { older.previous() };
    Entry::tracking(current.current(), previous, older.learning())
}

/// The entry that steers a packet of a client: `table` has the client's bucket's entry by class.
///
/// A tracked class is looked up in two tables even where both are the same: its client may have
/// been of a third one in between, whose connections are remembered.
#[inline(always)]
pub fn entry(class: ClassEntry, mut table: impl FnMut(Class) -> Option<Entry>) -> Option<Entry> {
    let current = table(class.current())?;
    if !class.tracked() {
        return Some(current);
    }
    Some(with_older(current, older(class, table(class.previous())?)))
}

/// Whether a packet that opens something has to be remembered to go where it should, `entry` being
/// that of a tracked class, or of a bucket in the table of an audience. While UDP flows are
/// learned, what is not known may be an open one, and goes by what was.
#[inline(always)]
pub fn remembers(entry: Entry, segment: Segment) -> bool {
    let learned =
        entry.learning() && segment.protocol == IPPROTO_UDP && matches!(segment.quic, Quic::Other);
    entry.tracked() && !learned
}

/// Whether a packet with an entry that [`remembers`] is refused rather than sent as `steering` says.
///
/// A full flow table can't remember a new connection, and what is not remembered goes by the class
/// before, or where the bucket was. That class may be one that sees a
/// version which the one of now must not see: load must open no door, so the connection is refused,
/// and its client tries again.
#[inline(always)]
pub fn refuses(entry: Entry, steering: Steering) -> bool {
    let (current, previous) = (entry.current(), entry.previous());
    steering.opens && steering.backend.get() == previous.get() && current.get() != previous.get()
}

/// Bits of the bitmap of one family.
pub const BLOCKS: u32 = 1 << 16;

/// The bit of an IPv4 client: its /16.
#[inline(always)]
pub const fn block_v4(src_be: u32) -> u32 {
    u32::from_be(src_be) >> 16
}

/// The bit of an IPv6 client: a hash of its /32. Spreads the ones that differ in few bits, as
/// those of one registry do; a collision costs a look, and nothing else.
#[inline(always)]
pub const fn block_v6(src: Address) -> u32 {
    let top = u64::from_be(src[0]) >> 32;
    (top.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_reads_back_and_no_field_touches_another() {
        for current in (0..=0x7fff).step_by(31) {
            for previous in (0..=0x7fff).step_by(127) {
                for learning in [false, true] {
                    let (c, p) = (Class::new(current), Class::new(previous));
                    let entry = ClassEntry::tracking(c, p, learning);
                    assert_eq!(
                        (entry.current(), entry.previous(), entry.tracked(), entry.learning()),
                        (c, p, true, learning)
                    );
                    assert_eq!(entry.learned(), ClassEntry::tracking(c, p, false));
                    let steady = ClassEntry::steady(c);
                    assert_eq!((steady.current(), steady.tracked()), (c, false));
                }
            }
        }
    }

    #[test]
    fn older_connections_go_where_the_table_before_sends_them() {
        let index = BackendIndex::new;
        let class = ClassEntry::tracking(Class::new(1), Class::new(2), false);
        for (before, older) in [
            (Entry::steady(index(7)), 7),
            (Entry::tracking(index(7), index(8), true), 8),
            (Entry::default(), 5),
        ] {
            let table = |class: Class| {
                Some(if class.get() == 1 {
                    Entry::tracking(index(5), index(6), true)
                } else {
                    before
                })
            };
            let expected = Entry::tracking(index(5), index(older), false);
            assert_eq!(entry(class, table), Some(expected));
        }
        assert_eq!(
            entry(ClassEntry::steady(Class::new(3)), |class| Some(Entry::steady(index(
                class.get()
            )))),
            Some(Entry::steady(index(3)))
        );
    }

    #[test]
    fn blocks_of_a_registry_spread() {
        let blocks: std::collections::BTreeSet<u32> = (0..4096_u64)
            .map(|at| block_v6([(0x2a00_0000_0000_0000 | at << 35).to_be(), 0]))
            .collect();
        assert!(blocks.len() > 3900, "{} of 4096", blocks.len());
        assert_eq!(block_v4(0xc633_6401_u32.to_be()), 0xc633);
    }
}
