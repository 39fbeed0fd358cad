//! When the allocator gives memory back to the system.
//!
//! A change of a split takes and lets go of a few megabytes. Given back and asked for again each
//! time, they would cost as much as the change itself: the kernel clears every page. So some is
//! kept until the agent is told that it will not be needed for a while.
//!
//! This is about glibc; other allocators go by rules of their own.

/// So much free memory is kept, bytes: what the tables of a large service take twice.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 8 << 20;

/// Keeps some free memory from now on.
pub(super) fn keep_some() {
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: it sets a number of the allocator's. Where it is refused, others hold.
        unsafe {
            libc::mallopt(parameter, KEPT);
        }
    }
}

/// Gives the system back what is free.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing but the allocator's own free memory.
    unsafe {
        libc::malloc_trim(0);
    }
}
