//! What is on the wire as a receiver's interface gets it: checksums verified,
//! frames kept, frames of one's own sent.
//!
//! Packet sockets (packet(7)) see frames behind the interface's XDP program and
//! before the network stack. Senders' offloads are off on the bench
//! ([`crate::xdp_pass::offloads_off`]), so a frame here has the checksums that
//! would stand on a cable.

use std::{
    collections::BTreeMap,
    io, mem,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike as _,
            recvfrom, sendto, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};

use crate::netns::Namespace;

/// Room for what comes while the checker computes.
const BUFFER_BYTES: usize = 64 << 20;

/// How long a reader waits for a frame before it looks whether to stop.
const LOOK_US: i64 = 20_000;

/// Bytes of the largest frame that a socket here reads.
const FRAME_BYTES: usize = 70_000;

/// Errors that a report keeps in full.
const ERRORS_KEPT: usize = 8;

/// `sll_pkttype` of frames that this host sends (linux/if_packet.h).
const PACKET_OUTGOING: u8 = 4;

/// `sll_pkttype` of frames for another host's MAC address.
const PACKET_OTHERHOST: u8 = 3;

/// What a [`Watch`] has seen.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// TCP and UDP frames that were checked, by `IPv4 TCP` and the like.
    pub checked: BTreeMap<&'static str, u64>,
    /// Bytes of the longest of them, with its Ethernet header.
    pub longest_bytes: usize,
    /// The first frames that were wrong, and how.
    pub errors: Vec<String>,
    /// Number of frames that were wrong.
    pub wrong: u64,
    /// Frames for this host, if the watch was to keep them.
    pub frames: Vec<Vec<u8>>,
}

impl Report {
    /// Frames of one kind that were checked.
    pub fn count(&self, kind: &str) -> u64 {
        self.checked.get(kind).copied().unwrap_or_default()
    }

    /// Asserts that no frame was wrong and that there were `least` of a kind.
    ///
    /// # Panics
    /// Otherwise, with the first errors.
    #[track_caller]
    pub fn assert_right(&self, place: &str, kind: &str, least: u64) {
        assert_eq!(self.wrong, 0, "{place}: wrong frames: {:#?}", self.errors);
        let seen = self.count(kind);
        assert!(seen >= least, "{place}: {seen} frames of {kind}, not {least}: {:?}", self.checked);
    }

    fn take(&mut self, frame: &[u8]) {
        match check(frame) {
            Ok(None) => {}
            Ok(Some(kind)) => {
                *self.checked.entry(kind).or_default() += 1;
                self.longest_bytes = self.longest_bytes.max(frame.len());
            }
            Err(error) => {
                self.wrong += 1;
                if self.errors.len() < ERRORS_KEPT {
                    self.errors.push(error);
                }
            }
        }
    }
}

/// Whether two checksums say the same: in one's complement, all zeros and all ones are
/// both zero, and a receiver accepts either (RFC 1071; Linux sends ones,
/// `CSUM_MANGLED_0`).
const fn same(a: u16, b: u16) -> bool {
    a == b || (a == 0 && b == 0xffff) || (a == 0xffff && b == 0)
}

/// Verifies a frame's checksums: says what it is, if it is TCP or UDP over IP.
///
/// # Errors
/// Which checksum or length is wrong, and in what frame.
pub fn check(frame: &[u8]) -> Result<Option<&'static str>, String> {
    let wrong = |what: &str| Err(format!("{what} in {frame:02x?}"));
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else {
        return wrong("a header is cut short");
    };
    let fragmented = packet.is_ip_payload_fragmented();
    let addresses = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            if !same(header.calc_header_checksum(), header.header_checksum) {
                return wrong("IPv4 checksum");
            }
            Ok((header.source, header.destination))
        }
        Some(NetSlice::Ipv6(ip)) => Err((ip.header().source(), ip.header().destination())),
        _ => return Ok(None),
    };
    if fragmented {
        return Ok(None);
    }
    match (&packet.transport, addresses) {
        (Some(TransportSlice::Tcp(tcp)), Ok((from, to))) => {
            if !tcp.calc_checksum_ipv4(from, to).is_ok_and(|sum| same(sum, tcp.checksum())) {
                return wrong("TCP checksum");
            }
            Ok(Some("IPv4 TCP"))
        }
        (Some(TransportSlice::Tcp(tcp)), Err((from, to))) => {
            if !tcp.calc_checksum_ipv6(from, to).is_ok_and(|sum| same(sum, tcp.checksum())) {
                return wrong("TCP checksum");
            }
            Ok(Some("IPv6 TCP"))
        }
        (Some(TransportSlice::Udp(udp)), addresses) => {
            let header = udp.to_header();
            let (kind, sum) = match addresses {
                // RFC 768: none was computed. IPv6 must have one (RFC 8200 section 8.1).
                Ok(_) if header.checksum == 0 => return Ok(Some("IPv4 UDP")),
                Ok((from, to)) => {
                    ("IPv4 UDP", header.calc_checksum_ipv4_raw(from, to, udp.payload()))
                }
                Err((from, to)) => {
                    ("IPv6 UDP", header.calc_checksum_ipv6_raw(from, to, udp.payload()))
                }
            };
            // Zero says that there is none; a sum of zero is sent as ones (RFC 768).
            if header.checksum == 0 || !sum.is_ok_and(|sum| same(sum, header.checksum)) {
                return wrong("UDP checksum");
            }
            Ok(Some(kind))
        }
        _ => Ok(None),
    }
}

/// Watches the frames that come in by an interface, until it is asked what it saw.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Report>>,
}

impl Watch {
    /// Verifies the checksums of every TCP and UDP frame for this host.
    ///
    /// # Panics
    /// There is no such interface, or no packet socket.
    #[track_caller]
    pub fn checksums(namespace: &Namespace, interface: &str) -> Self {
        Self::start(namespace, interface, |report, frame| report.take(frame))
    }

    /// Keeps every frame as it came.
    ///
    /// # Panics
    /// There is no such interface, or no packet socket.
    #[track_caller]
    pub fn frames(namespace: &Namespace, interface: &str) -> Self {
        Self::start(namespace, interface, |report, frame| report.frames.push(frame.to_vec()))
    }

    #[track_caller]
    fn start(namespace: &Namespace, interface: &str, take: fn(&mut Report, &[u8])) -> Self {
        let (started, ready) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let interface = interface.to_owned();
        let name = interface.clone();
        let thread = namespace.spawn_thread("watch", move || {
            let opened = open(&interface);
            let failed = opened.as_ref().err().map(ToString::to_string);
            let _ = started.send(failed);
            let mut report = Report::default();
            if let Ok((socket, ifindex)) = opened {
                read(&socket, ifindex, &stopped, |frame| take(&mut report, frame));
            }
            report
        });
        match ready.recv() {
            Ok(None) => Self { stop, thread: Some(thread) },
            other => panic!("can't watch {name}: {other:?}"),
        }
    }

    /// Ends it, when what has come so far is read.
    ///
    /// # Panics
    /// Its thread has.
    #[track_caller]
    pub fn finish(mut self) -> Report {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("it is finished once");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // A test that fails elsewhere has no use for the report.
            let _ = thread.join();
        }
    }
}

fn open(interface: &str) -> io::Result<(OwnedFd, usize)> {
    let ifindex = usize::try_from(if_nametoindex(interface)?).map_err(io::Error::other)?;
    let socket = packet_socket()?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, LOOK_US))?;
    Ok((socket, ifindex))
}

fn packet_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Packet, SockType::Raw, flags, Some(SockProtocol::EthAll))?)
}

/// Reads until `stop`, and then what is still there.
fn read(socket: &OwnedFd, ifindex: usize, stop: &AtomicBool, mut take: impl FnMut(&[u8])) {
    let mut buffer = vec![0; FRAME_BYTES];
    loop {
        // Looked at before reading: what came before the end is read in any case.
        let last = stop.load(Ordering::SeqCst);
        match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((length, Some(from)))
                if from.ifindex() == ifindex
                    && from.pkttype() != PACKET_OUTGOING
                    && from.pkttype() != PACKET_OTHERHOST =>
            {
                take(&buffer[..length]);
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) if last => return,
            Err(_) => {}
        }
    }
}

/// Sends a frame out of an interface, just as it is.
///
/// # Panics
/// There is no such interface, or the kernel refuses.
#[track_caller]
pub fn send(namespace: &Namespace, interface: &str, frame: &[u8]) {
    namespace
        .run(|| {
            let to = link_address(if_nametoindex(interface)?)?;
            let socket = packet_socket()?;
            sendto(socket.as_raw_fd(), frame, &to, MsgFlags::empty())?;
            Ok::<_, io::Error>(())
        })
        .unwrap_or_else(|error| panic!("sending a frame by {interface}: {error}"));
}

fn link_address(ifindex: u32) -> io::Result<LinkAddr> {
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut addr: libc::sockaddr_ll = unsafe { mem::zeroed() };
    addr.sll_family = libc::AF_PACKET as u16;
    addr.sll_ifindex = ifindex.cast_signed();
    let length = u32::try_from(size_of_val(&addr)).map_err(io::Error::other)?;
    // SAFETY: `addr` is a whole `sockaddr_ll` of that length with its family set.
    let addr = unsafe { LinkAddr::from_raw((&raw const addr).cast(), Some(length)) };
    addr.ok_or_else(|| io::Error::other("no link address"))
}

/// The MAC address of an interface.
///
/// # Panics
/// There is no such interface.
#[track_caller]
pub fn mac(namespace: &Namespace, interface: &str) -> [u8; 6] {
    let found = namespace.run(|| {
        let mut all = nix::ifaddrs::getifaddrs().ok()?;
        let link = all.find_map(|entry| {
            let link = *entry.address.as_ref()?.as_link_addr()?;
            (entry.interface_name == interface).then_some(link)
        });
        link?.addr()
    });
    found.unwrap_or_else(|| panic!("{interface} has no MAC address"))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn frame(v6: bool, tcp: bool) -> Vec<u8> {
        let link = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let ip = match v6 {
            false => link.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64),
            true => link.ipv6([1; 16], [2; 16], 64),
        };
        let mut frame = Vec::new();
        let written = match tcp {
            true => ip.tcp(7, 8, 9, 10).write(&mut frame, b"payload"),
            false => ip.udp(7, 8).write(&mut frame, b"payload"),
        };
        written.unwrap();
        frame
    }

    #[test]
    fn right_frames_are_told_apart_and_a_changed_byte_is_found() {
        for (v6, tcp, kind) in [
            (false, true, "IPv4 TCP"),
            (false, false, "IPv4 UDP"),
            (true, true, "IPv6 TCP"),
            (true, false, "IPv6 UDP"),
        ] {
            let mut frame = frame(v6, tcp);
            assert_eq!(check(&frame), Ok(Some(kind)));
            // Every byte behind the MAC addresses and the flow label counts.
            for at in [26, 33, frame.len() - 1] {
                frame[at] ^= 0x10;
                assert!(check(&frame).is_err(), "{kind}, byte {at}");
                frame[at] ^= 0x10;
            }
        }
        assert_eq!(check(&[0; 60]), Ok(None));
    }

    #[test]
    fn both_zeros_are_right_but_for_a_udp_checksum_that_is_missing() {
        // The urgent pointer, which means nothing here, makes the sum zero.
        let mut tcp = frame(true, true);
        let at = 14 + 40;
        let left = u16::from_be_bytes([tcp[at + 16], tcp[at + 17]]);
        tcp[at + 18..at + 20].copy_from_slice(&left.to_be_bytes());
        for sum in [0_u16, 0xffff] {
            tcp[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
            assert_eq!(check(&tcp), Ok(Some("IPv6 TCP")), "{sum:#06x}");
        }
        tcp[at + 17] ^= 1;
        assert!(check(&tcp).is_err());
        let mut udp = frame(true, false);
        udp[at + 6..at + 8].fill(0);
        assert!(check(&udp).is_err(), "IPv6 has no datagrams without a checksum");
    }
}
