//! Errors that the balancer itself sends (RFC 792, RFC 4443): what they are, and how many.

/// Why a packet is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Trouble {
    /// It does not fit through: fragmentation needed (RFC 1191, 4), packet too big (RFC 4443, 3.2).
    TooBig = 0,
    /// Its TTL or hop limit has run out: time exceeded.
    Expired = 1,
}

/// Most bytes of an IPv4 packet that an error quotes: the error has 576 then (RFC 1812, 4.3.2.3).
pub const QUOTED_V4: u32 = 576 - 28;
/// Most bytes of an IPv6 packet that an error quotes: the error has 1,280 then (RFC 4443, 2.4).
pub const QUOTED_V6: u32 = 1280 - 48;

/// From one error to the next of the same CPU, in nanoseconds: 1,000 a second, as Linux's
/// `icmp_msgs_per_sec`.
const GAP_NS: u64 = 1_000_000;
/// How many may come at once: as Linux's `icmp_msgs_burst`.
const BURST: u64 = 50;

/// Whether one more error may be sent (RFC 4443, 2.4(f); RFC 1812, 4.3.2.8): a generic cell rate
/// algorithm, whose whole state is `next_ns`, when the next one would be due at an even pace.
#[inline(always)]
pub const fn may_answer(next_ns: &mut u64, now_ns: u64) -> bool {
    let earliest = now_ns.saturating_sub(GAP_NS * BURST);
    let due = if *next_ns > earliest { *next_ns } else { earliest };
    if due > now_ns {
        return false;
    }
    *next_ns = due + GAP_NS;
    true
}

/// Whether an error may be sent to an IPv4 address (RFC 1122, 3.2.2): one host's.
#[inline(always)]
pub const fn answerable_v4(addr_be: u32) -> bool {
    let first = addr_be.to_ne_bytes()[0];
    first != 0 && first != 127 && first < 224
}

/// Whether an error may be sent to an IPv6 address (RFC 4443, 2.4(e)): one host's.
#[inline(always)]
pub const fn answerable_v6(addr: [u64; 2]) -> bool {
    let multicast = addr[0].to_ne_bytes()[0] == 0xff;
    // Unspecified and loopback.
    let nobody = addr[0] == 0 && addr[1] & !1_u64.to_be() == 0;
    !multicast && !nobody
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_out_and_then_a_thousand_a_second() {
        let mut next = 0;
        let begin = 1_000_000_000_000;
        let sent = |next: &mut u64, now| (0..1000).filter(|_| may_answer(next, now)).count();
        assert_eq!(sent(&mut next, begin), 51);
        assert_eq!(sent(&mut next, begin + 10_000_000), 10);
        let all: usize = (1..=1000).map(|ms| sent(&mut next, begin + (10 + ms) * 1_000_000)).sum();
        assert_eq!(all, 1000);
        assert_eq!(sent(&mut next, begin + 100_000_000_000), 51);
    }

    #[test]
    fn errors_go_to_single_hosts() {
        let v4 = |text: &str| {
            let ip: std::net::Ipv4Addr = text.parse().unwrap();
            answerable_v4(u32::from_ne_bytes(ip.octets()))
        };
        assert!(v4("10.0.0.1") && v4("203.0.113.9") && v4("223.255.255.254"));
        assert!(!v4("0.0.0.0") && !v4("127.0.0.1") && !v4("224.0.0.1") && !v4("255.255.255.255"));
        let v6 = |text: &str| {
            let ip: std::net::Ipv6Addr = text.parse().unwrap();
            let octets = ip.octets();
            let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| octets[at + i]));
            answerable_v6([word(0), word(8)])
        };
        assert!(v6("2001:db8::1") && v6("fe80::1") && v6("::2"));
        assert!(!v6("::") && !v6("::1") && !v6("ff02::1"));
    }
}
