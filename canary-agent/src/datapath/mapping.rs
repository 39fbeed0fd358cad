//! An array map's values, mapped into memory.

use std::{
    ffi::c_void,
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

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

/// Stores what differs of `new` and returns the number of words stored.
pub(super) fn store32(words: &[AtomicU32], new: impl Iterator<Item = u32>) -> usize {
    words
        .iter()
        .zip(new)
        .filter(|(word, value)| {
            let differs = word.load(Ordering::Relaxed) != *value;
            if differs {
                word.store(*value, Ordering::Release);
            }
            differs
        })
        .count()
}

/// Stores what differs of `new` and returns the number of words stored.
pub(super) fn store64(words: &[AtomicU64], new: impl Iterator<Item = u64>) -> usize {
    words
        .iter()
        .zip(new)
        .filter(|(word, value)| {
            let differs = word.load(Ordering::Relaxed) != *value;
            if differs {
                word.store(*value, Ordering::Release);
            }
            differs
        })
        .count()
}
