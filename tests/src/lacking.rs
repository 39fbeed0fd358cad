//! Children that find a host which lacks something: a mount, a recent kernel, a
//! system call. Whatever is taken away is gone for the child alone.

use std::{ffi::CString, io, os::unix::process::CommandExt as _, path::Path, process::Command};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

/// `UNAME26` (linux/personality.h): `uname` says 2.6.60 and more.
const UNAME26: libc::c_ulong = 0x002_0000;

/// `BPF_MAP_CREATE` (linux/bpf.h).
pub const BPF_MAP_CREATE: u32 = 0;
/// `BPF_PROG_LOAD`.
pub const BPF_PROG_LOAD: u32 = 5;

/// What changes about a place.
enum Change {
    Unmount,
    Hide,
    ReadOnly,
    /// A file system in memory, of so many bytes at most.
    Small(CString),
}

/// Mounts that only a child sees.
#[derive(Default)]
pub struct Mounts(Vec<(Change, CString)>);

impl Mounts {
    /// Takes away what is mounted at a path, if anything is.
    #[must_use]
    pub fn without(self, path: impl AsRef<Path>) -> Self {
        self.and(Change::Unmount, path.as_ref())
    }

    /// Puts an empty folder over one.
    #[must_use]
    pub fn hidden(self, path: impl AsRef<Path>) -> Self {
        self.and(Change::Hide, path.as_ref())
    }

    /// Makes a path read-only.
    #[must_use]
    pub fn read_only(self, path: impl AsRef<Path>) -> Self {
        self.and(Change::ReadOnly, path.as_ref())
    }

    /// Puts an empty file system over a folder that holds no more than so many bytes.
    #[must_use]
    pub fn small(self, path: impl AsRef<Path>, bytes: u64) -> Self {
        let size = CString::new(format!("size={bytes}")).expect("no NUL");
        self.and(Change::Small(size), path.as_ref())
    }

    fn and(mut self, change: Change, path: &Path) -> Self {
        let path = path.to_str().expect("a path of text");
        self.0.push((change, CString::new(path).expect("a path without NUL")));
        self
    }

    /// Gives the child mounts of its own, with these changes. It does not start where
    /// one of them can't be made.
    pub fn apply(self, command: &mut Command) {
        // SAFETY: plain system calls on what was allocated before the fork.
        unsafe {
            command.pre_exec(move || {
                unshare(CloneFlags::CLONE_NEWNS)?;
                // None of it reaches the host's.
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
                for (change, path) in &self.0 {
                    change.make(path)?;
                }
                Ok(())
            });
        }
    }
}

impl Change {
    fn make(&self, path: &CString) -> io::Result<()> {
        let path = path.as_c_str();
        let (none, bind) = (None::<&str>, MsFlags::MS_BIND);
        match self {
            Self::Unmount => match umount2(path, MntFlags::MNT_DETACH) {
                // Nothing is mounted there.
                Err(Errno::EINVAL) => {}
                done => done?,
            },
            Self::Hide => mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), none)?,
            Self::Small(size) => {
                mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), Some(size.as_c_str()))?;
            }
            Self::ReadOnly => {
                // It need not be a mount of its own.
                mount(Some(path), path, none, bind, none)?;
                let read_only = bind | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                mount(none, path, none, read_only, none)?;
            }
        }
        Ok(())
    }
}

/// Lets the child find a kernel that says it is of the series 2.6.
pub fn recent_kernel(command: &mut Command) {
    // SAFETY: a plain system call.
    unsafe {
        command.pre_exec(|| match libc::personality(UNAME26) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
}

/// Lets one command of bpf(2) fail in the child, with this error.
pub fn bpf_command(command: &mut Command, number: u32, errno: i32) {
    let mut filter = bpf_filter(number, errno);
    // SAFETY: prctl is a plain system call; the closure owns the filter.
    unsafe {
        command.pre_exec(move || install(&mut filter));
    }
}

/// Lets one command of bpf(2) fail in this thread, for as long as it lives.
///
/// # Panics
/// Not root.
#[track_caller]
pub fn bpf_command_here(number: u32, errno: i32) {
    install(&mut bpf_filter(number, errno)).expect("a filter of system calls");
}

fn bpf_filter(number: u32, errno: i32) -> [libc::sock_filter; 6] {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const UNEQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const ANSWER: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let line = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    // `struct seccomp_data`: the number of the system call, and the low half of its
    // first argument.
    let argument = if cfg!(target_endian = "little") { 16 } else { 20 };
    [
        line(LOAD, 0, 0),
        line(UNEQUAL, 3, libc::SYS_bpf as u32),
        line(LOAD, 0, argument),
        line(UNEQUAL, 1, number),
        line(ANSWER, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        line(ANSWER, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

/// Filters this thread's system calls, and those of what it starts.
fn install(filter: &mut [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    let mode = libc::SECCOMP_MODE_FILTER as libc::c_ulong;
    // SAFETY: the kernel copies the filter, which outlives the call.
    match unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
