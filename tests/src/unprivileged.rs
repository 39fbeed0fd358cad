//! Children that are an ordinary user's with a few capabilities, as a service manager starts
//! them: nothing else in any of their sets, and no way to gain more (capabilities(7)).

use std::{io, os::unix::process::CommandExt as _, process::Command};

/// linux/capability.h
pub const CAP_NET_ADMIN: u8 = 12;
/// linux/capability.h
pub const CAP_NET_RAW: u8 = 13;
/// linux/capability.h
pub const CAP_PERFMON: u8 = 38;
/// linux/capability.h
pub const CAP_BPF: u8 = 39;

/// The last one of Linux 6.
const CAP_LAST: u8 = 40;
/// `_LINUX_CAPABILITY_VERSION_3`
const VERSION: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct`
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`
#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Makes the child `user`'s, of the group of that number, with just these capabilities.
pub fn become_user(command: &mut Command, user: u32, capabilities: &'static [u8]) {
    // SAFETY: plain system calls; nothing is allocated.
    unsafe {
        command.pre_exec(move || drop_all_but(user, capabilities));
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn prctl(option: libc::c_int, a: libc::c_ulong, b: libc::c_ulong) -> io::Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: none of the options used here takes a pointer.
    check(unsafe { libc::prctl(option, a, b, zero, zero) }.into())
}

fn drop_all_but(user: u32, capabilities: &[u8]) -> io::Result<()> {
    for capability in (0..=CAP_LAST).filter(|capability| !capabilities.contains(capability)) {
        prctl(libc::PR_CAPBSET_DROP, capability.into(), 0)?;
    }
    prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
    // SAFETY: no pointer that is followed: the list of groups is empty.
    check(unsafe { libc::setgroups(0, std::ptr::null()) }.into())?;
    // SAFETY: plain numbers.
    check(unsafe { libc::setresgid(user, user, user) }.into())?;
    // SAFETY: plain numbers.
    check(unsafe { libc::setresuid(user, user, user) }.into())?;
    let mask = capabilities.iter().fold(0_u64, |mask, capability| mask | 1 << capability);
    let half = |bits: u32| Data { effective: bits, permitted: bits, inheritable: bits };
    let data = [half(mask as u32), half((mask >> 32) as u32)];
    let header = Header { version: VERSION, pid: 0 };
    // SAFETY: both are of the layout of version 3, and outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    for capability in capabilities {
        prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong,
            (*capability).into(),
        )?;
    }
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
}

/// Makes the calling thread, and no other, of this user, without any rights of root's. The
/// thread can't go back.
///
/// # Panics
/// Not root.
#[track_caller]
pub fn become_user_here(user: u32) {
    // The system call changes one thread; libc's function of that name changes all (nptl(7)).
    // SAFETY: plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
    check(result).expect("another user");
}
