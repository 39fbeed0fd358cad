//! Asking known neighbours whether they are still there, with the same MAC address.
//!
//! A host that changes its MAC address need not say so (Linux does not, unless
//! `arp_notify` or `ndisc_notify` is set), and the kernel asks only the old address, some
//! time within a minute. So the question that anybody may answer, a broadcast ARP request
//! or a neighbour solicitation to the solicited-node group, is sent from here. The answer
//! goes to the kernel, whose neighbour table changes, which is heard like any change. ARP
//! answers and neighbour advertisements are heard here as well: the kernel does not heed all
//! of the former ([`super::answers`]), and tells nobody of an answer that changes nothing
//! ([`super::silence`]).
//!
//! Owns a packet socket that sends and those that hear answers. Must not know which
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
/// Lets neighbour advertisements through: next header at offset 6, type behind the header.
const ADVERTISEMENTS_ONLY: [SockFilter; 6] = [
    SockFilter::new(0x30, 0, 0, 6),
    SockFilter::new(0x15, 0, 3, ICMPV6 as u32),
    SockFilter::new(0x30, 0, 0, IPV6_LEN as u32),
    SockFilter::new(0x15, 0, 1, NEIGHBOUR_ADVERTISEMENT as u32),
    SockFilter::new(0x06, 0, 0, u32::MAX),
    SockFilter::new(0x06, 0, 0, 0),
];
/// An IPv6 header (RFC 8200), a solicitation (RFC 4861, section 4.3) and one option.
const IPV6_LEN: usize = 40;
const SOLICITATION_LEN: usize = 32;
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// As much as is read of an answer: an advertisement without its options, or an ARP answer.
const ANSWER_LEN: usize = IPV6_LEN + 24;
/// More answers than this wait until others have had their turn.
const ANSWERS_AT_ONCE: usize = 1000;

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
    /// Whom the frame goes to; `None`: everybody.
    pub(super) only: Option<[u8; 6]>,
}

/// What goes over the link: EtherType, destination and payload.
type Frame = (u16, [u8; 6], Vec<u8>);

/// A neighbour has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The interface that it came by.
    pub(super) ifindex: u32,
    /// The neighbour.
    pub(super) neighbour: IpAddr,
    /// Its MAC address; `None` where the kernel heeds what the answer says of it.
    pub(super) mac: Option<[u8; 6]>,
}

/// Who answers, and the MAC address that goes with it as in [`Answer`].
type Said = (IpAddr, Option<[u8; 6]>);

/// A socket that answers come in by, and how they are read.
struct Ear {
    socket: AsyncFd<OwnedFd>,
    read: fn(&[u8]) -> Option<Said>,
}

/// The sockets.
pub(super) struct Verifier {
    socket: OwnedFd,
    arp: Ear,
    advertisements: Ear,
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
        let arp = Ear::open(libc::ETH_P_ARP as u16, &ANSWERS_ONLY, arp_answer)?;
        let advertisements =
            Ear::open(libc::ETH_P_IPV6 as u16, &ADVERTISEMENTS_ONLY, advertisement)?;
        Ok(Self { socket, arp, advertisements })
    }

    /// Waits for an answer. Nothing is lost when the future is dropped.
    pub(super) async fn hear(&self) -> io::Result<Answer> {
        tokio::select! {
            answer = self.arp.hear() => answer,
            answer = self.advertisements.hear() => answer,
        }
    }

    /// The answers that have come already.
    pub(super) fn heard(&self) -> io::Result<Vec<Answer>> {
        let mut answers = Vec::new();
        for ear in [&self.arp, &self.advertisements] {
            while answers.len() < ANSWERS_AT_ONCE
                && let Some(answer) = ear.next()?
            {
                answers.push(answer);
            }
        }
        Ok(answers)
    }

    /// Sends one question. Says whether there was a way to put it.
    pub(super) fn ask(&self, question: &Question) -> io::Result<bool> {
        let Some((ether_type, destination, payload)) = frame(question) else {
            return Ok(false);
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
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(true) }
    }
}

impl Ear {
    fn open(
        ether_type: u16,
        filter: &[SockFilter],
        read: fn(&[u8]) -> Option<Said>,
    ) -> io::Result<Self> {
        let protocol = Protocol::from(i32::from(ether_type.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM.nonblocking(), Some(protocol))?;
        socket.attach_filter(filter)?;
        let socket = OwnedFd::from(socket);
        // SAFETY: an `OwnedFd` names the same descriptor for as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self { socket, read })
    }

    async fn hear(&self) -> io::Result<Answer> {
        loop {
            let mut ready = self.socket.readable().await?;
            match self.next()? {
                Some(answer) => return Ok(answer),
                None => ready.clear_ready(),
            }
        }
    }

    /// The next answer that has come already.
    fn next(&self) -> io::Result<Option<Answer>> {
        let mut packet = [0; ANSWER_LEN];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut packet) {
                Ok((length, from)) => {
                    let ifindex = from.and_then(|from| u32::try_from(from.ifindex()).ok());
                    let answer = (self.read)(&packet[..length]);
                    if let (Some(ifindex), Some((neighbour, mac))) = (ifindex, answer) {
                        return Ok(Some(Answer { ifindex, neighbour, mac }));
                    }
                }
                Err(Errno::EAGAIN) => return Ok(None),
                // An interface went down.
                Err(Errno::ENETDOWN | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn frame(question: &Question) -> Option<Frame> {
    match (question.neighbour, question.source) {
        (IpAddr::V4(neighbour), IpAddr::V4(source)) => Some((
            libc::ETH_P_ARP as u16,
            question.only.unwrap_or(BROADCAST),
            arp_request(neighbour, source, question.source_mac).to_vec(),
        )),
        // An ARP request may come from nowhere (RFC 5227); such a solicitation may not.
        (IpAddr::V6(neighbour), IpAddr::V6(source)) if !source.is_unspecified() => {
            let [.., a, b, c] = neighbour.octets();
            let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
            group[13..].copy_from_slice(&[a, b, c]);
            let (mac, to) = match question.only {
                Some(mac) => (mac, neighbour),
                // RFC 2464, section 7.
                None => ([0x33, 0x33, 0xff, a, b, c], Ipv6Addr::from(group)),
            };
            let payload = solicitation(neighbour, to, source, question.source_mac);
            Some((libc::ETH_P_IPV6 as u16, mac, payload))
        }
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
fn arp_answer(packet: &[u8]) -> Option<Said> {
    // Ethernet, IPv4, their lengths, reply.
    let rest = packet.strip_prefix(&[0, 1, 8, 0, 6, 4, 0, 2])?;
    let mac = rest.first_chunk::<6>()?;
    let address = rest.get(6..)?.first_chunk::<4>()?;
    Some((Ipv4Addr::from(*address).into(), Some(*mac)))
}

/// Who is advertised (RFC 4861, section 4.4): the kernel heeds all that this one heeds.
fn advertisement(packet: &[u8]) -> Option<Said> {
    let (header, message) = packet.split_at_checked(IPV6_LEN)?;
    let [ICMPV6, 255] = header[6..8] else { return None };
    let [NEIGHBOUR_ADVERTISEMENT, 0, ..] = message else { return None };
    let target = message.get(8..)?.first_chunk::<16>()?;
    Some((Ipv6Addr::from(*target).into(), None))
}

fn solicitation(
    neighbour: Ipv6Addr,
    to: Ipv6Addr,
    source: Ipv6Addr,
    source_mac: [u8; 6],
) -> Vec<u8> {
    let mut packet = vec![0; IPV6_LEN + SOLICITATION_LEN];
    let (header, message) = packet.split_at_mut(IPV6_LEN);
    header[0] = 6 << 4;
    header[5] = SOLICITATION_LEN as u8;
    header[6] = ICMPV6;
    header[7] = 255;
    header[8..24].copy_from_slice(&source.octets());
    header[24..].copy_from_slice(&to.octets());
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
            only: None,
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
        assert_eq!(arp_answer(&packet), Some((Ipv4Addr::new(10, 0, 0, 1).into(), Some(MAC))));
        for length in 0..18 {
            assert_eq!(arp_answer(&packet[..length]), None);
        }
    }

    #[test]
    fn only_advertisements_that_no_router_has_passed_on_are_answers() {
        let (_, _, mut packet) = frame(&question("2001:db8::2", "2001:db8::1")).unwrap();
        assert_eq!(advertisement(&packet), None, "a question");
        packet[40] = NEIGHBOUR_ADVERTISEMENT;
        let neighbour = "2001:db8::2".parse().unwrap();
        assert_eq!(advertisement(&packet), Some((neighbour, None)));
        assert_eq!(advertisement(&packet[..ANSWER_LEN]), Some((neighbour, None)));
        for length in 0..ANSWER_LEN {
            assert_eq!(advertisement(&packet[..length]), None);
        }
        packet[7] = 254;
        assert_eq!(advertisement(&packet), None);
    }

    #[test]
    fn one_neighbour_alone_can_be_asked() {
        let only = Some([4; 6]);
        let (_, to, packet) =
            frame(&Question { only, ..question("10.0.0.2", "10.0.0.1") }).unwrap();
        assert_eq!((to, &packet[24..]), ([4; 6], &[10, 0, 0, 2][..]));
        let (_, to, packet) =
            frame(&Question { only, ..question("2001:db8::2", "2001:db8::1") }).unwrap();
        assert_eq!((to, &packet[24..40]), ([4; 6], &packet[48..64]), "no group");
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
