//! What a veth needs so that the balancer's native XDP works over it.
//!
//! `XDP_TX` and redirects into a veth arrive only if its peer has a program too,
//! and a sender that leaves checksums to the device sends wrong ones, as the
//! program forwards packets as they are.

use std::{
    ffi::CString,
    io, mem,
    os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use crate::netns::Namespace;

/// Generic receive offload (linux/ethtool.h).
const ETHTOOL_SGRO: u32 = 0x2c;
/// Checksums when sending (linux/ethtool.h).
const ETHTOOL_STXCSUM: u32 = 0x17;
/// Several at once, as flags (linux/ethtool.h).
const ETHTOOL_SFLAGS: u32 = 0x26;
/// VLAN tags when sending (linux/ethtool.h).
const ETH_FLAG_TXVLAN: u32 = 1 << 7;

/// `r0 = XDP_PASS; exit`.
const PROGRAM: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];

/// An XDP program that passes everything; detached on drop.
#[derive(Debug)]
pub struct XdpPass {
    _link: OwnedFd,
}

impl XdpPass {
    /// Attaches it in native mode.
    ///
    /// # Panics
    /// There is no such interface, or the kernel refuses.
    #[track_caller]
    pub fn attach(namespace: &Namespace, interface: &str) -> Self {
        let link = namespace
            .run(|| attach(interface))
            .unwrap_or_else(|error| panic!("pass program on {interface}: {error}"));
        // A veth with a program merges what it receives, unless told not to: frames
        // are to be seen as they were sent.
        namespace
            .run(|| ethtool_set(interface, ETHTOOL_SGRO, 0))
            .unwrap_or_else(|error| panic!("merging on {interface}: {error}"));
        Self { _link: link }
    }
}

fn attach(interface: &str) -> io::Result<OwnedFd> {
    let program = load()?;
    link(program.as_fd(), nix::net::if_::if_nametoindex(interface)?)
}

/// Attaches a program in native mode; it is detached when the link is closed.
///
/// # Errors
/// There is no such interface, or the kernel refuses.
pub fn attach_program(
    namespace: &Namespace,
    interface: &str,
    program: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    namespace.run(|| link(program, nix::net::if_::if_nametoindex(interface)?))
}

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes what is
/// missing as zero.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

/// The beginning of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: i32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

fn load() -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: i32 = 5;
    const BPF_PROG_TYPE_XDP: u32 = 6;
    let attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: u32::try_from(PROGRAM.len()).map_err(io::Error::other)?,
        insns: PROGRAM.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
    };
    bpf(BPF_PROG_LOAD, &attr)
}

fn link(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd as _;
    const BPF_LINK_CREATE: i32 = 28;
    const BPF_XDP: u32 = 37;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    let attr = LinkCreate {
        prog_fd: program.as_raw_fd(),
        target_ifindex: ifindex,
        attach_type: BPF_XDP,
        flags: XDP_FLAGS_DRV_MODE,
    };
    bpf(BPF_LINK_CREATE, &attr)
}

/// A `bpf` command that answers with a file descriptor.
fn bpf<T>(command: i32, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is a readable `repr(C)` value of the given size, whose
    // pointers are to statics; the kernel writes nothing for these commands.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Turns off what a veth leaves to hardware that it does not have: checksums and
/// segmentation when sending, merging when receiving.
///
/// # Panics
/// There is no such interface, or the kernel refuses.
#[track_caller]
pub fn offloads_off(namespace: &Namespace, interface: &str) {
    // linux/ethtool.h
    const ETHTOOL_STSO: u32 = 0x1f;
    const ETHTOOL_SGSO: u32 = 0x24;
    namespace
        .run(|| {
            for command in [ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO] {
                ethtool_set(interface, command, 0)?;
            }
            Ok::<_, io::Error>(())
        })
        .unwrap_or_else(|error| panic!("offloads of {interface}: {error}"));
}

/// Turns merging when receiving, or what sending leaves to the device, on or off.
///
/// # Panics
/// There is no such interface, or the kernel refuses.
#[track_caller]
pub fn offload(namespace: &Namespace, interface: &str, which: Offload, on: bool) {
    let (command, value) = match which {
        Offload::Gro => (ETHTOOL_SGRO, on.into()),
        Offload::TxChecksum => (ETHTOOL_STXCSUM, on.into()),
        // The others of these flags are off in a veth.
        Offload::TxVlan => (ETHTOOL_SFLAGS, if on { ETH_FLAG_TXVLAN } else { 0 }),
    };
    namespace
        .run(|| ethtool_set(interface, command, value))
        .unwrap_or_else(|error| panic!("{which:?} of {interface}: {error}"));
}

/// What [`offload`] turns on and off.
#[derive(Clone, Copy, Debug)]
pub enum Offload {
    /// Merging of received packets.
    Gro,
    /// Leaving checksums to the device.
    TxChecksum,
    /// Leaving VLAN tags to the device; off, the device puts those of received frames back too.
    TxVlan,
}

fn ethtool_set(interface: &str, command: u32, value: u32) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    // linux/sockios.h
    const SIOCETHTOOL: u32 = 0x8946;
    /// `struct ethtool_value`.
    #[repr(C)]
    struct EthtoolValue {
        cmd: u32,
        data: u32,
    }
    let mut argument = EthtoolValue { cmd: command, data: value };
    let name = CString::new(interface)?;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let bytes = name.as_bytes_with_nul();
    if bytes.len() > request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut argument).cast();
    // SAFETY: `request` is a whole `ifreq` whose data pointer is to a live
    // `ethtool_value`, as SIOCETHTOOL wants it.
    let result = unsafe {
        libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, std::ptr::from_mut(&mut request))
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
