//! When memory is given back to the system.
//!
//! A change of a split takes and lets go of a few megabytes. Given back and asked for again each
//! time, they would cost as much as the change itself: the kernel clears every page. So some is
//! kept until the agent is told that it will not be needed for a while.
//!
//! What is said of the allocator is about glibc; others go by rules of their own.

use std::{ffi::c_void, ptr::NonNull};

use nix::sys::mman::{MmapAdvise, madvise};

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

/// Gives the system back what is free, and the pages of the program that nothing needs any more:
/// reading configuration and loading programs are a large part of it and are seldom done again.
/// What is run again comes back from the system's file cache, page by page.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing but the allocator's own free memory.
    unsafe {
        libc::malloc_trim(0);
    }
    if let Err(error) = give_code_back() {
        tracing::debug!(%error, "the program's pages stay");
    }
}

fn give_code_back() -> std::io::Result<()> {
    let program = std::env::current_exe()?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let program = program.to_string_lossy();
    for (start, length) in maps.lines().filter_map(|line| code(line, &program)) {
        // SAFETY: nobody writes to these pages, so what comes back is what was there.
        unsafe { madvise(start, length, MmapAdvise::MADV_DONTNEED)? }
    }
    Ok(())
}

/// Where a mapping begins and how long it is, if it holds code of `program` (proc_pid_maps(5)).
fn code(line: &str, program: &str) -> Option<(NonNull<c_void>, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    if fields.next()? != "r-xp" || !line.ends_with(&format!(" {program}")) {
        return None;
    }
    let [start, end] = [start, end].map(|at| usize::from_str_radix(at, 16));
    let (start, end) = (start.ok()?, end.ok()?);
    Some((NonNull::new(start as *mut c_void)?, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_the_program_is_given_back() {
        let found = |line| {
            code(line, "/usr/bin/canary-agent").map(|(at, length)| (at.as_ptr() as usize, length))
        };
        let line = "55d0c0e00000-55d0c1d00000 r-xp 006ed000 fe:00 1234       /usr/bin/canary-agent";
        assert_eq!(found(line), Some((0x55d0_c0e0_0000, 0xf0_0000)));
        for other in [
            "55d0c0e00000-55d0c1d00000 r--p 006ed000 fe:00 1234       /usr/bin/canary-agent",
            "55d0c0e00000-55d0c1d00000 r-xp 006ed000 fe:00 1234       /usr/lib/libc.so.6",
            "55d0c0e00000-55d0c1d00000 r-xp 00000000 00:00 0          [vdso]",
            "55d0c0e00000-55d0c1d00000 rw-p 00000000 00:00 0",
            "",
        ] {
            assert_eq!(found(other), None, "{other}");
        }
        give_code_back().expect("the maps of this process");
        assert_eq!(found(line), Some((0x55d0_c0e0_0000, 0xf0_0000)), "it goes on");
    }
}
