//! An array map's values, mapped into memory: all the time, or for as long as they are used.

use std::{
    ffi::c_void,
    num::NonZeroUsize,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use canary_ebpf_common::{abi::LedgerEntry, entry::Entry};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The values of a `BPF_F_MMAPABLE` array map. Stores are seen by the program
/// at once, without a system call.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<c_void>,
    bytes: NonZeroUsize,
}

// SAFETY: all access is by atomics, and the memory stays mapped until drop.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` of an array map's values.
    pub(super) fn new(map: impl AsFd, bytes: usize) -> nix::Result<Self> {
        Self::part(map, 0, bytes)
    }

    /// Maps `bytes` of an array map's values from `offset` on, a multiple of the system's pages.
    fn part(map: impl AsFd, offset: usize, bytes: usize) -> nix::Result<Self> {
        let bytes = NonZeroUsize::new(bytes).ok_or(nix::errno::Errno::EINVAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                map,
                offset as libc::off_t,
            )?
        };
        Ok(Self { start, bytes })
    }

    /// The values as 32-bit words.
    pub(super) fn words32(&self) -> &[AtomicU32] {
        // SAFETY: mapped, page-aligned, shared with the kernel only through single words.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes.get() / 4) }
    }

    /// The values as 64-bit words.
    pub(super) fn words64(&self) -> &[AtomicU64] {
        // SAFETY: as in `words32`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes.get() / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no slice outlives `self`.
        // Failure would leave the mapping in place, which harms nobody.
        unsafe { _ = munmap(self.start, self.bytes.get()) };
    }
}

/// An array map of pages of which a part is used now and then.
///
/// What is mapped is resident in the agent beside being the kernel's: where there are many
/// tables, that is most of what it would have.
#[derive(Debug)]
pub(super) struct Pages {
    map: OwnedFd,
    page_bytes: usize,
    pages: u32,
}

impl Pages {
    /// A map of so many pages of so many bytes, which are a multiple of the system's pages.
    pub(super) fn new(map: OwnedFd, pages: u32, page_bytes: usize) -> Self {
        Self { map, page_bytes, pages }
    }

    /// How many pages there are.
    pub(super) fn count(&self) -> u32 {
        self.pages
    }

    /// Maps some of the pages.
    ///
    /// # Errors
    /// There are not so many, or the kernel has no room.
    pub(super) fn map(&self, pages: Range<u32>) -> std::io::Result<Mapping> {
        let (first, count) = (pages.start as usize, pages.len());
        Ok(Mapping::part(&self.map, first * self.page_bytes, count * self.page_bytes)?)
    }

    /// Maps all of them.
    ///
    /// # Errors
    /// The kernel has no room.
    pub(super) fn map_all(&self) -> std::io::Result<Mapping> {
        self.map(0..self.pages)
    }
}

/// A word of a mapping that says a `V`.
pub(super) trait Word<V> {
    fn get(&self) -> V;
    fn set(&self, value: V);
}

macro_rules! words {
    ($($word:ty: $value:ty, $of:expr, $raw:expr;)*) => { $(
        impl Word<$value> for $word {
            fn get(&self) -> $value {
                $of(self.load(Ordering::Relaxed))
            }
            fn set(&self, value: $value) {
                self.store($raw(value), Ordering::Release);
            }
        }
    )* };
}

words! {
    AtomicU32: Entry, Entry, |entry: Entry| entry.0;
    AtomicU64: LedgerEntry, LedgerEntry, |entry: LedgerEntry| entry.0;
    AtomicU64: u64, std::convert::identity, std::convert::identity;
}

/// A cache line holds so many of the smallest words.
const LINE: usize = 16;

/// Stores `new` where it differs from `old`, which is what the words hold; without `old` they
/// are read. Before each word, asks whether to `proceed`; returns whether all is done. Calls
/// `changed` with what was and what is, also for some words that stay.
///
/// Line by line: no other is touched than those in which something changes, and there is one
/// branch for each, not one for each word.
pub(super) fn store<W: Word<V>, V: Copy + PartialEq>(
    words: &[W],
    old: Option<&[V]>,
    new: &[V],
    proceed: impl Fn() -> bool,
    mut changed: impl FnMut(V, V),
) -> bool {
    let read: Vec<V>;
    let old = match old {
        Some(old) => old,
        None => {
            read = words.iter().map(W::get).collect();
            &read
        }
    };
    for ((words, old), new) in words.chunks(LINE).zip(old.chunks(LINE)).zip(new.chunks(LINE)) {
        let pairs = || old.iter().zip(new);
        if pairs().fold(false, |differs, (old, new)| differs | (old != new)) {
            for (word, new) in words.iter().zip(new) {
                if !proceed() {
                    return false;
                }
                word.set(*new);
            }
            pairs().for_each(|(old, new)| changed(*old, *new));
        }
    }
    true
}
