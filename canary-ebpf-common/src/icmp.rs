//! ICMP and ICMPv6: which messages are about connections, and what changes in those.
//!
//! An error quotes the packet that it is about, from its IP header on (RFC 792; RFC 4443, 2.4),
//! which its sender had sent to the other end: read backwards it names the connection.

use crate::{checksum::Delta, headers::Ports};

/// Echo reply of ICMP.
pub const ECHO_REPLY_V4: u8 = 0;
/// Echo request of ICMP.
pub const ECHO_V4: u8 = 8;
/// Echo request of ICMPv6.
pub const ECHO_V6: u8 = 128;
/// Echo reply of ICMPv6.
pub const ECHO_REPLY_V6: u8 = 129;

/// What a message is to a balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// A request to be answered.
    Echo,
    /// An error about a packet, which it quotes.
    Error,
    /// The host's own business.
    Other,
}

/// What an ICMP message of this type and code is. Source quench is ignored (RFC 6633, 3), and
/// redirects are for who sends, not for who is behind a balancer.
#[inline(always)]
pub const fn meaning_v4(kind: u8, code: u8) -> Meaning {
    match kind {
        ECHO_V4 if code == 0 => Meaning::Echo,
        // Unreachable, time exceeded, parameter problem.
        3 | 11 | 12 => Meaning::Error,
        _ => Meaning::Other,
    }
}

/// What an ICMPv6 message of this type and code is.
#[inline(always)]
pub const fn meaning_v6(kind: u8, code: u8) -> Meaning {
    match kind {
        ECHO_V6 if code == 0 => Meaning::Echo,
        // Unreachable, too big, time exceeded, parameter problem.
        1..=4 => Meaning::Error,
        _ => Meaning::Other,
    }
}

/// Gives a quoted transport header other ports and brings its checksum up to date, where the
/// quotation reaches so far; `addresses` is the change in its pseudo-header. Answers the change
/// of all that it wrote.
///
/// `checksum` is the header's field; `optional` says that 0 stands for none (RFC 768).
#[inline(always)]
pub fn requote(
    ports: &mut Ports,
    checksum: Option<&mut u16>,
    optional: bool,
    to: Ports,
    addresses: Delta,
) -> Delta {
    let change =
        Delta::ZERO.replace_half(ports.src_be, to.src_be).replace_half(ports.dst_be, to.dst_be);
    *ports = to;
    let Some(checksum) = checksum else { return change };
    let was = *checksum;
    if optional && was == 0 {
        return change;
    }
    let sum = change.and(addresses).apply(was);
    *checksum = if optional && sum == 0 { 0xffff } else { sum };
    change.replace_half(was, *checksum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_from_the_rest() {
        let errors_v4: Vec<u8> =
            (0..=255).filter(|k| meaning_v4(*k, 0) == Meaning::Error).collect();
        assert_eq!(errors_v4, [3, 11, 12]);
        let errors_v6: Vec<u8> =
            (0..=255).filter(|k| meaning_v6(*k, 0) == Meaning::Error).collect();
        assert_eq!(errors_v6, [1, 2, 3, 4]);
        assert_eq!(meaning_v4(ECHO_V4, 1), Meaning::Other);
        assert_eq!(meaning_v6(ECHO_V6, 1), Meaning::Other);
    }
}
