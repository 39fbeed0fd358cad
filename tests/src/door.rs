//! What becomes of SYNs before a server's listening sockets have them: a part is refused, and the
//! others may come late. Everything else, and all of TCP, is the host's own.
//!
//! By the connection's source port it is told who is refused, so that it depends on no clock and
//! no load: one that is sent again meets the same. Listening sockets drop by a filter what is not
//! for them; a packet socket sees it, answers a part with a reset, and writes what is late to a TUN
//! device when its time has come, with a mark that the filter lets through.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd as _, AsRawFd, FromRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recv,
        sendto, setsockopt, socket, sockopt,
    },
};

use crate::{netns::Namespace, topology::Host};

/// The TUN device's name.
const TUN: &str = "late0";
/// The mark: an urgent pointer, which means nothing without the flag that belongs to it.
const MARK: u16 = 0x1a7e;
const TCP: u8 = 6;
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const RST_ACK: u8 = 0x14;
/// `TUNSETIFF` of `linux/if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// What source ports are multiplied with, modulo 65,536, so that neighbours don't share a fate:
/// odd, so that each product comes once, and near the golden ratio.
const SPREAD: u32 = 40_503;
/// Room for what waits to be looked at, bytes: seconds of it on a host that has no time.
const ROOM: usize = 4 << 20;

/// What becomes of SYNs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Door {
    /// Of 65,536 source ports, so many are refused.
    pub refuses: u16,
    /// The others are let through so late.
    pub late: Option<Duration>,
}

impl Door {
    /// Whether a connection from this port is refused.
    pub const fn refuses(self, source_port: u16) -> bool {
        (source_port as u32 * SPREAD) & 0xffff < self.refuses as u32
    }

    /// Listens where only those are heard whom this lets through.
    ///
    /// # Errors
    /// The address is taken, or the kernel takes no filter.
    pub fn listen(self, addr: SocketAddr) -> io::Result<TcpListener> {
        let listener = TcpListener::bind(addr)?;
        // What a socket's filter sees begins with the TCP header.
        let mut lines = vec![
            // Anything but a SYN is let through.
            load(BYTE, 13),
            and(u32::from(SYN_ACK)),
            unless(u32::from(SYN), ACCEPT),
            load(HALF, 0),
            line(0x24, SPREAD),
            and(0xffff),
            // Jumps if it is at least that.
            Line::Jump { code: 0x35, k: u32::from(self.refuses), to: Where::Next, or: DROP },
        ];
        if self.late.is_some() {
            lines.extend([load(HALF, 18), unless(u32::from(MARK), DROP)]);
        }
        filter(&listener, &lines)?;
        Ok(listener)
    }
}

/// SYNs that are looked at; what is kept back goes with it.
#[derive(Debug)]
pub struct Keeper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Does what `door` says to SYNs for `port` of a host, which [`Door::listen`] does not hear.
    ///
    /// # Panics
    /// The host has no TUN devices, or no packet sockets.
    #[track_caller]
    pub fn start(host: &Host, port: u16, door: Door) -> Self {
        let addrs = host.addrs();
        let opened = host.namespace.run(|| {
            let replies = addrs.iter().map(|addr| Ok((*addr, replies_from(*addr)?)));
            let replies = replies.collect::<io::Result<Vec<_>>>()?;
            let tun = door.late.map(|_| tun()).transpose()?;
            Ok::<_, io::Error>((syns()?, replies, tun))
        });
        let (syns, replies, tun) = opened.unwrap_or_else(|error| panic!("{}: {error}", host.name));
        if tun.is_some() {
            let namespace: &Namespace = &host.namespace;
            namespace.ip(&format!("link set {TUN} up"));
            namespace.sysctl("net/ipv4/conf/all/rp_filter", "0");
            namespace.sysctl(&format!("net/ipv4/conf/{TUN}/rp_filter"), "0");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = host.namespace.spawn_thread("door", move || {
            Work { door, port, syns, replies, tun, waiting: VecDeque::new() }.go_on(&stopped);
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Work {
    door: Door,
    port: u16,
    syns: OwnedFd,
    replies: Vec<(IpAddr, OwnedFd)>,
    tun: Option<File>,
    waiting: VecDeque<(Instant, Vec<u8>)>,
}

impl Work {
    fn go_on(mut self, stopped: &AtomicBool) {
        let mut buffer = [0; 2048];
        while !stopped.load(Ordering::Acquire) {
            let now = Instant::now();
            while self.waiting.front().is_some_and(|(due, _)| *due <= now) {
                let (Some((_, packet)), Some(tun)) = (self.waiting.pop_front(), &mut self.tun)
                else {
                    break;
                };
                // What could not be brought is sent again.
                let _ = tun.write(&packet);
            }
            let next = self.waiting.front();
            let rest = next.map_or(Duration::from_millis(50), |(due, _)| *due - now);
            let rest = PollTimeout::try_from(rest.as_millis().max(1) as i32);
            let mut ready = [PollFd::new(self.syns.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut ready, rest.unwrap_or(PollTimeout::ZERO)), Ok(1..)) {
                continue;
            }
            if let Ok(length) = recv(self.syns.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)
                && let Some(syn) = Syn::of(&buffer[..length], self.port)
            {
                self.meet(&syn);
            }
        }
    }

    fn meet(&mut self, syn: &Syn<'_>) {
        if self.door.refuses(syn.source_port()) {
            let reply = self.replies.iter().find(|(addr, _)| *addr == syn.to);
            if let Some((_, socket)) = reply {
                let to = SockaddrStorage::from(SocketAddr::new(syn.from, 0));
                // What could not be sent is asked for again.
                let _ = sendto(socket.as_raw_fd(), &syn.reset(), &to, MsgFlags::empty());
            }
        } else if let Some(late) = self.door.late {
            self.waiting.push_back((Instant::now() + late, syn.marked()));
        }
    }
}

/// A SYN without the mark, from its IP header on.
struct Syn<'a> {
    packet: &'a [u8],
    header: usize,
    from: IpAddr,
    to: IpAddr,
}

impl<'a> Syn<'a> {
    fn of(packet: &'a [u8], port: u16) -> Option<Self> {
        let v4 = |at: usize| {
            let bytes = <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?;
            Some(IpAddr::from(Ipv4Addr::from(bytes)))
        };
        let v6 = |at: usize| {
            let bytes = <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?;
            Some(IpAddr::from(Ipv6Addr::from(bytes)))
        };
        let first = *packet.first()?;
        let (protocol, header, from, to) = match first >> 4 {
            4 => (*packet.get(9)?, usize::from(first & 0xf) * 4, v4(12)?, v4(16)?),
            6 => (*packet.get(6)?, 40, v6(8)?, v6(24)?),
            _ => return None,
        };
        let tcp = packet.get(header..).filter(|tcp| tcp.len() >= 20)?;
        let syn = Self { packet, header, from, to };
        (protocol == TCP && tcp[13] & SYN_ACK == SYN && syn.word(2) == port && syn.word(18) == 0)
            .then_some(syn)
    }

    /// A word of the TCP header.
    fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.packet[self.header + at], self.packet[self.header + at + 1]])
    }

    fn source_port(&self) -> u16 {
        self.word(0)
    }

    /// The packet with the mark.
    fn marked(&self) -> Vec<u8> {
        // RFC 1624: the pointer was 0.
        let sum = !folded(u32::from(!self.word(16)) + u32::from(MARK));
        let mut packet = self.packet.to_vec();
        packet[self.header + 16..self.header + 18].copy_from_slice(&sum.to_be_bytes());
        packet[self.header + 18..self.header + 20].copy_from_slice(&MARK.to_be_bytes());
        packet
    }

    /// What a closed port answers (RFC 9293, 3.10.7.1).
    fn reset(&self) -> [u8; 20] {
        let number = u32::from(self.word(4)) << 16 | u32::from(self.word(6));
        let mut tcp = [0; 20];
        tcp[0..2].copy_from_slice(&self.word(2).to_be_bytes());
        tcp[2..4].copy_from_slice(&self.word(0).to_be_bytes());
        tcp[8..12].copy_from_slice(&number.wrapping_add(1).to_be_bytes());
        tcp[12] = 5 << 4;
        tcp[13] = RST_ACK;
        let addresses = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => words(&from.octets()) + words(&to.octets()),
            (IpAddr::V6(from), IpAddr::V6(to)) => words(&from.octets()) + words(&to.octets()),
            _ => 0,
        };
        let sum = !folded(addresses + u32::from(TCP) + tcp.len() as u32 + words(&tcp));
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }
}

fn words(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum()
}

fn folded(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A line of a classic BPF program, whose jumps are told by what they lead to.
enum Line {
    Plain { code: u16, k: u32 },
    Jump { code: u16, k: u32, to: Where, or: Where },
}

#[derive(Clone, Copy)]
enum Where {
    Next,
    /// So many lines on.
    Skip(u8),
    /// The end, where packets are kept.
    Accept,
    /// The end, where they are dropped.
    Drop,
}

const ACCEPT: Where = Where::Accept;
const DROP: Where = Where::Drop;
/// `BPF_LD | BPF_ABS`, by size.
const BYTE: u16 = 0x30;
const HALF: u16 = 0x28;

const fn line(code: u16, k: u32) -> Line {
    Line::Plain { code, k }
}

const fn load(code: u16, at: u32) -> Line {
    line(code, at)
}

const fn and(mask: u32) -> Line {
    line(0x54, mask)
}

/// Goes on if it is equal.
const fn unless(k: u32, or: Where) -> Line {
    Line::Jump { code: 0x15, k, to: Where::Next, or }
}

/// Gives a socket a filter; what comes to its end is kept.
fn filter(socket: &impl AsRawFd, lines: &[Line]) -> io::Result<()> {
    let accept = lines.len();
    let far = |from: usize, to: Where| match to {
        Where::Next => 0,
        Where::Skip(lines) => lines,
        Where::Accept => (accept - from - 1) as u8,
        Where::Drop => (accept - from) as u8,
    };
    let mut code: Vec<libc::sock_filter> = lines
        .iter()
        .enumerate()
        .map(|(at, line)| match *line {
            Line::Plain { code, k } => libc::sock_filter { code, jt: 0, jf: 0, k },
            Line::Jump { code, k, to, or } => {
                libc::sock_filter { code, jt: far(at, to), jf: far(at, or), k }
            }
        })
        .collect();
    for kept in [u32::MAX, 0] {
        code.push(libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: kept });
    }
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    // SAFETY: the program is of the size that is said, and the kernel copies it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A socket that sees SYNs from their IP header on, and nothing else.
fn syns() -> io::Result<OwnedFd> {
    // Nothing comes before it has its filter.
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let is = |k, to, or| Line::Jump { code: 0x15, k, to, or };
    filter(
        &socket,
        &[
            load(BYTE, 0),
            // The version.
            line(0x74, 4),
            is(6, Where::Skip(5), Where::Next),
            unless(4, DROP),
            load(BYTE, 9),
            unless(u32::from(TCP), DROP),
            // X is the length of the header, and the flags are behind that.
            line(0xb1, 0),
            is(0, Where::Skip(4), Where::Skip(4)),
            // IPv6.
            load(BYTE, 6),
            unless(u32::from(TCP), DROP),
            load(BYTE, 40 + 13),
            is(0, Where::Skip(1), Where::Skip(1)),
            // `BPF_LD | BPF_B | BPF_IND`
            line(0x50, 13),
            and(u32::from(SYN_ACK)),
            unless(u32::from(SYN), DROP),
        ],
    )?;
    setsockopt(&socket, sockopt::RcvBufForce, &ROOM)?;
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    from.sll_family = libc::AF_PACKET as u16;
    from.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: the address is of the size that is said.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const from).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// A socket that sends TCP segments from an address, and receives none.
fn replies_from(addr: IpAddr) -> io::Result<OwnedFd> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
    filter(&socket, &[line(0x06, 0)])?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(addr, 0)))?;
    Ok(socket)
}

fn tun() -> io::Result<File> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(TUN.bytes()) {
        *to = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: `request` is what this call takes.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw const request) };
    if result == 0 { Ok(tun) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_of_all_ports_is_refused_that_was_asked_for() {
        for refuses in [0, 1, 328, 1966, u16::MAX] {
            let door = Door { refuses, late: None };
            let refused = (0..=u16::MAX).filter(|port| door.refuses(*port)).count();
            assert_eq!(refused, usize::from(refuses));
        }
        // Also of any few thousand in a row.
        let door = Door { refuses: 1966, late: None };
        for first in (10_000..60_000).step_by(1000) {
            let refused = (first..first + 2000).filter(|port| door.refuses(*port)).count();
            assert!((55..=65).contains(&refused), "{refused} of 2000 from {first} on");
        }
    }
}
