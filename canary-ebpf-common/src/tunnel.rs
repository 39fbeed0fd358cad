//! Packets in other packets: IP in IP (RFC 2003, RFC 2473), or IP behind UDP: GUE in its variant 1
//! (draft-ietf-intarea-gue, 2 and 4), which has no header of its own. The first four bits of what
//! follows UDP are an IP version, and tell a receiver which it is.

/// IP protocol number of IPv4 in something (RFC 2003).
pub const IPPROTO_IPV4: u8 = 4;
/// IP protocol number of IPv6 in something (RFC 2473).
pub const IPPROTO_IPV6: u8 = 41;

/// The port that IANA has assigned to GUE.
pub const GUE_PORT: u16 = 6080;

/// DSCP and ECN of a packet that is unwrapped, given both headers' (RFC 6040, 4.2): the inner
/// DSCP, and the stronger congestion mark. `None`: congestion was met by a packet whose sender
/// would not understand the mark, so that it is dropped.
#[inline(always)]
pub const fn unwrapped_tos(outer: u8, inner: u8) -> Option<u8> {
    const NOT_ECT: u8 = 0b00;
    const ECT_1: u8 = 0b01;
    const ECT_0: u8 = 0b10;
    const CE: u8 = 0b11;
    match (inner & CE, outer & CE) {
        (NOT_ECT, CE) => None,
        (NOT_ECT, _) => Some(inner),
        (_, CE) => Some(inner | CE),
        (ECT_0, ECT_1) => Some(inner & !CE | ECT_1),
        _ => Some(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_come_through_as_rfc_6040_has_it() {
        // Its figure 4: rows inner Not-ECT, ECT(0), ECT(1), CE; columns the outer one.
        let marks = [0b00, 0b10, 0b01, 0b11];
        let expected = [
            [Some(0b00), Some(0b00), Some(0b00), None],
            [Some(0b10), Some(0b10), Some(0b01), Some(0b11)],
            [Some(0b01), Some(0b01), Some(0b01), Some(0b11)],
            [Some(0b11); 4],
        ];
        for (inner, row) in marks.iter().zip(expected) {
            for (outer, becomes) in marks.iter().zip(row) {
                let dscp = 0b1011_1000;
                let seen = unwrapped_tos(outer | 0b0100_0100, inner | dscp);
                assert_eq!(seen, becomes.map(|mark| mark | dscp), "{inner:02b} in {outer:02b}");
            }
        }
    }
}
