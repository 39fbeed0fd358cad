//! BPF links of other programs: finding one and taking it off.
//!
//! aya lists links but lets go only of those that it made.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

// Commands of bpf(2) (linux/bpf.h).
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
/// Kernel 5.8, commit a3b80e107894.
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
/// Kernel 5.8, commit a3b80e107894.
const BPF_LINK_GET_NEXT_ID: libc::c_long = 31;
/// Kernel 5.9, commit 73b11c2ab072.
const BPF_LINK_DETACH: libc::c_long = 34;

/// `BPF_LINK_TYPE_XDP`.
const LINK_TYPE_XDP: u32 = 6;

/// `struct bpf_link_info`, as far as XDP links fill it.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    ifindex: u32,
    rest: [u32; 11],
}

/// Makes one call of bpf(2) with `attr`.
pub(super) fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is as long as is said and alive during the call; what it points to, the
    // callers below keep alive.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Detaches the link that holds `program` on an interface. Says whether there was one.
pub(super) fn detach(program: u32, ifindex: u32) -> io::Result<bool> {
    let mut id = 0_u32;
    loop {
        let mut next = [id, 0, 0];
        match bpf(BPF_LINK_GET_NEXT_ID, &mut next) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
            result => result?,
        };
        id = next[1];
        let fd = match bpf(BPF_LINK_GET_FD_BY_ID, &mut [id, 0, 0]) {
            // It went meanwhile.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => continue,
            result => result?,
        };
        // SAFETY: the kernel has just given this process the descriptor.
        let link = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut info = LinkInfo::default();
        let mut attr = InfoAttr {
            fd: link.as_raw_fd() as u32,
            length: size_of::<LinkInfo>() as u32,
            info: &raw mut info as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
        if info.kind == LINK_TYPE_XDP && info.program == program && info.ifindex == ifindex {
            bpf(BPF_LINK_DETACH, &mut [link.as_raw_fd() as u32])?;
            return Ok(true);
        }
    }
}

/// What a pinned link holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PinnedXdp {
    /// The program's id.
    pub(super) program: u32,
    /// The interface; 0 if it is gone.
    pub(super) ifindex: u32,
}

/// What the link that is pinned at `pin` holds; `None` if that is no XDP link.
pub(super) fn pinned(pin: &Path) -> io::Result<Option<PinnedXdp>> {
    let link = open(pin)?;
    // A map or a program has information as well, which reads like another link's.
    let said = fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd()))?;
    if !said.lines().any(|line| line.starts_with("link_type:")) {
        return Ok(None);
    }
    let mut info = LinkInfo::default();
    let mut attr = InfoAttr {
        fd: link.as_raw_fd() as u32,
        length: size_of::<LinkInfo>() as u32,
        info: &raw mut info as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let LinkInfo { kind, program, ifindex, .. } = info;
    Ok((kind == LINK_TYPE_XDP).then_some(PinnedXdp { program, ifindex }))
}

/// Opens what is pinned at `pin`.
fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = GetAttr { path: path.as_ptr() as u64, ..GetAttr::default() };
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel has just given this process the descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Takes the program of a pinned link off its interface and removes the pin.
///
/// Removing the pin alone would do so too, some time later.
pub(super) fn unpin(pin: &Path) -> io::Result<()> {
    // A pin that can't be opened is removed all the same.
    if let Ok(link) = open(pin) {
        // Fails for a link whose interface is gone, which has nothing to detach.
        _ = bpf(BPF_LINK_DETACH, &mut [link.as_raw_fd() as u32]);
    }
    match fs::remove_file(pin) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The part of `union bpf_attr` that BPF_OBJ_GET uses.
#[repr(C)]
#[derive(Default)]
struct GetAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that BPF_OBJ_GET_INFO_BY_FD uses.
#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}
