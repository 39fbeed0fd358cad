//! An array map's values, mapped into memory.

use std::{
    ffi::c_void,
    num::NonZeroUsize,
    os::fd::AsFd,
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
        let bytes = NonZeroUsize::new(bytes).ok_or(nix::errno::Errno::EINVAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                map,
                0,
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
/// are read. Calls `changed` with what was and what is, also for some words that stay.
///
/// Line by line: no other is touched than those in which something changes, and there is one
/// branch for each, not one for each word.
pub(super) fn store<W: Word<V>, V: Copy + PartialEq>(
    words: &[W],
    old: Option<&[V]>,
    new: &[V],
    mut changed: impl FnMut(V, V),
) {
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
            words.iter().zip(new).for_each(|(word, new)| word.set(*new));
            pairs().for_each(|(old, new)| changed(*old, *new));
        }
    }
}
