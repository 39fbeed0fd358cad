//! Asking known neighbours whether their MAC address is still the same.
//!
//! A host that changes its MAC address need not say so (Linux does not, unless
//! `arp_notify` or `ndisc_notify` is set), and the kernel asks only the old address, some
//! time within a minute. So the question that anybody may answer, a broadcast ARP request
//! or a neighbour solicitation to the solicited-node group, is sent from here. The answer
//! goes to the kernel, whose neighbour table changes, which is heard like any change. ARP
//! answers are heard here as well: the kernel does not heed all of them
//! ([`super::answers`]).
//!
//! Owns a packet socket that sends and one that hears ARP answers. Must not know which
//! neighbours are asked, or when, nor what follows from an answer.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, LinkAddr, SockFlag, SockType, recvfrom},
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};

const BROADCAST: [u8; 6] = [0xff; 6];
/// RFC 826, for Ethernet and IPv4.
const ARP_LEN: usize = 28;
/// Lets ARP answers through: a link may carry thousands of questions a second. The half
/// word at offset 6 is the operation; the codes are those of linux/bpf_common.h.
const ANSWERS_ONLY: [SockFilter; 4] = [
    SockFilter::new(0x28, 0, 0, 6),
    SockFilter::new(0x15, 0, 1, 2),
    SockFilter::new(0x06, 0, 0, u32::MAX),
    SockFilter::new(0x06, 0, 0, 0),
];
/// An IPv6 header (RFC 8200), a solicitation (RFC 4861, section 4.3) and one option.
const IPV6_LEN: usize = 40;
const SOLICITATION_LEN: usize = 32;
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;

/// Who is asked, and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// The interface.
    pub(super) ifindex: u32,
    /// The neighbour.
    pub(super) neighbour: IpAddr,
    /// Our address towards it, of the same family.
    pub(super) source: IpAddr,
    /// The interface's MAC address.
    pub(super) source_mac: [u8; 6],
}

/// What goes over the link: EtherType, destination and payload.
type Frame = (u16, [u8; 6], Vec<u8>);

/// Says which MAC address a neighbour has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The interface that it came by.
    pub(super) ifindex: u32,
    /// The neighbour.
    pub(super) neighbour: Ipv4Addr,
    /// Its MAC address.
    pub(super) mac: [u8; 6],
}

/// The sockets.
pub(super) struct Verifier {
    socket: OwnedFd,
    answers: AsyncFd<OwnedFd>,
}

impl Verifier {
    /// Opens the sockets in the network namespace of the calling thread.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) fn open() -> io::Result<Self> {
        // Without a protocol nothing is ever received.
        let socket = nix::sys::socket::socket(
            AddressFamily::Packet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        let protocol = Protocol::from(i32::from((libc::ETH_P_ARP as u16).to_be()));
        let answers = Socket::new(Domain::PACKET, Type::DGRAM.nonblocking(), Some(protocol))?;
        answers.attach_filter(&ANSWERS_ONLY)?;
        let answers = OwnedFd::from(answers);
        // SAFETY: an `OwnedFd` names the same descriptor for as long as it lives.
        let answers = unsafe { AsyncFd::register_with_interest(answers, Interest::READABLE)? };
        Ok(Self { socket, answers })
    }

    /// Waits for an ARP answer. Nothing is lost when the future is dropped.
    pub(super) async fn hear(&self) -> io::Result<Answer> {
        let mut packet = [0; ARP_LEN];
        loop {
            let mut ready = self.answers.readable().await?;
            let fd = self.answers.as_raw_fd();
            match recvfrom::<LinkAddr>(fd, &mut packet) {
                Ok((length, from)) => {
                    let ifindex = from.and_then(|from| u32::try_from(from.ifindex()).ok());
                    let answer = arp_answer(&packet[..length]);
                    if let (Some(ifindex), Some((neighbour, mac))) = (ifindex, answer) {
                        return Ok(Answer { ifindex, neighbour, mac });
                    }
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                // An interface went down.
                Err(Errno::ENETDOWN | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sends one question.
    pub(super) fn ask(&self, question: &Question) -> io::Result<()> {
        let Some((ether_type, destination, payload)) = frame(question) else {
            return Ok(());
        };
        // SAFETY: `sockaddr_ll` is integers only, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ether_type.to_be();
        address.sll_ifindex = i32::try_from(question.ifindex).map_err(io::Error::other)?;
        address.sll_halen = 6;
        address.sll_addr[..6].copy_from_slice(&destination);
        // SAFETY: both pointers are to live values of the lengths that go with them, and the
        // kernel only reads from them.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                payload.as_ptr().cast(),
                payload.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn frame(question: &Question) -> Option<Frame> {
    match (question.neighbour, question.source) {
        (IpAddr::V4(neighbour), IpAddr::V4(source)) => Some((
            libc::ETH_P_ARP as u16,
            BROADCAST,
            arp_request(neighbour, source, question.source_mac).to_vec(),
        )),
        // An ARP request may come from nowhere (RFC 5227); such a solicitation may not.
        (IpAddr::V6(neighbour), IpAddr::V6(source)) if !source.is_unspecified() => {
            let [.., a, b, c] = neighbour.octets();
            Some((
                libc::ETH_P_IPV6 as u16,
                // RFC 2464, section 7.
                [0x33, 0x33, 0xff, a, b, c],
                solicitation(neighbour, source, question.source_mac),
            ))
        }
        // IPv4 by way of an IPv6 gateway, too: our IPv6 address there is not at hand.
        _ => None,
    }
}

fn arp_request(neighbour: Ipv4Addr, source: Ipv4Addr, source_mac: [u8; 6]) -> [u8; ARP_LEN] {
    let mut packet = [0; ARP_LEN];
    // Ethernet, IPv4, their lengths, request.
    packet[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    packet[8..14].copy_from_slice(&source_mac);
    packet[14..18].copy_from_slice(&source.octets());
    packet[24..28].copy_from_slice(&neighbour.octets());
    packet
}

/// Who answers, with which MAC address (RFC 826); `None` for what is no answer.
fn arp_answer(packet: &[u8]) -> Option<(Ipv4Addr, [u8; 6])> {
    // Ethernet, IPv4, their lengths, reply.
    let rest = packet.strip_prefix(&[0, 1, 8, 0, 6, 4, 0, 2])?;
    let mac = rest.first_chunk::<6>()?;
    let address = rest.get(6..)?.first_chunk::<4>()?;
    Some((Ipv4Addr::from(*address), *mac))
}

fn solicitation(neighbour: Ipv6Addr, source: Ipv6Addr, source_mac: [u8; 6]) -> Vec<u8> {
    let [.., a, b, c] = neighbour.octets();
    let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
    group[13..].copy_from_slice(&[a, b, c]);
    let mut packet = vec![0; IPV6_LEN + SOLICITATION_LEN];
    let (header, message) = packet.split_at_mut(IPV6_LEN);
    header[0] = 6 << 4;
    header[5] = SOLICITATION_LEN as u8;
    header[6] = ICMPV6;
    header[7] = 255;
    header[8..24].copy_from_slice(&source.octets());
    header[24..].copy_from_slice(&group);
    message[0] = NEIGHBOUR_SOLICITATION;
    message[8..24].copy_from_slice(&neighbour.octets());
    // Source link-layer address, in units of eight bytes.
    message[24..26].copy_from_slice(&[1, 1]);
    message[26..].copy_from_slice(&source_mac);
    // RFC 8200, section 8.1: the pseudo-header is both addresses, length and next header.
    let sum =
        checksum(&[&header[8..], &[0, 0, 0, SOLICITATION_LEN as u8, 0, 0, 0, ICMPV6], message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// RFC 1071, over parts of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.as_chunks::<2>().0);
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn question(neighbour: &str, source: &str) -> Question {
        Question {
            ifindex: 1,
            neighbour: neighbour.parse().unwrap(),
            source: source.parse().unwrap(),
            source_mac: MAC,
        }
    }

    #[test]
    fn arp_asks_everybody_in_our_name() {
        let (ether_type, to, packet) = frame(&question("10.0.0.2", "10.0.0.1")).unwrap();
        assert_eq!((ether_type, to), (0x0806, BROADCAST));
        let expected =
            [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2];
        assert_eq!(packet, expected);
        assert_eq!(frame(&question("fe80::1", "10.0.0.1")), None);
        assert_eq!(frame(&question("fe80::1", "::")), None);
    }

    #[test]
    fn only_arp_answers_are_answers() {
        let (_, _, mut packet) = frame(&question("10.0.0.2", "10.0.0.1")).unwrap();
        assert_eq!(arp_answer(&packet), None, "a question");
        packet[7] = 2;
        let expected = (Ipv4Addr::new(10, 0, 0, 1), MAC);
        assert_eq!(arp_answer(&packet), Some(expected));
        for length in 0..18 {
            assert_eq!(arp_answer(&packet[..length]), None);
        }
    }

    #[test]
    fn a_solicitation_goes_to_the_group_and_sums_to_nothing() {
        let (ether_type, to, packet) =
            frame(&question("2001:db8::a:b0c:d0e", "2001:db8::1")).unwrap();
        assert_eq!((ether_type, to), (0x86dd, [0x33, 0x33, 0xff, 0x0c, 0x0d, 0x0e]));
        assert_eq!(packet.len(), IPV6_LEN + SOLICITATION_LEN);
        assert_eq!(packet[7], 255, "receivers check the hop limit");
        let pseudo = [0, 0, 0, SOLICITATION_LEN as u8, 0, 0, 0, ICMPV6];
        assert_eq!(checksum(&[&packet[8..40], &pseudo, &packet[40..]]), 0);
        assert_eq!(packet[24..40], "ff02::1:ff0c:d0e".parse::<Ipv6Addr>().unwrap().octets());
    }
}
