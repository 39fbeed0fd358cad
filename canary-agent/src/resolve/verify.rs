//! Asking known neighbours whether their MAC address is still the same.
//!
//! A host that changes its MAC address need not say so (Linux does not, unless
//! `arp_notify` or `ndisc_notify` is set), and the kernel asks only the old address, some
//! time within a minute. So the question that anybody may answer, a broadcast ARP request
//! or a neighbour solicitation to the solicited-node group, is sent from here. The answer
//! goes to the kernel, whose neighbour table changes, which is heard like any change.
//!
//! Owns a packet socket that only sends. Must not know which neighbours are asked, or when.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType};

const BROADCAST: [u8; 6] = [0xff; 6];
/// RFC 826, for Ethernet and IPv4.
const ARP_LEN: usize = 28;
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

/// The socket.
pub(super) struct Verifier {
    socket: OwnedFd,
}

impl Verifier {
    /// Opens the socket in the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        // Without a protocol nothing is ever received.
        let socket = nix::sys::socket::socket(
            AddressFamily::Packet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        Ok(Self { socket })
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
