//! Wrapping a packet for its backend: what stands in the outer headers.
//!
//! IP in IP (RFC 2003, RFC 2473), or IP behind UDP: GUE in its variant 1
//! (draft-ietf-intarea-gue, 2 and 4), which has no header of its own. The first four bits of
//! what follows UDP are an IP version, and tell a receiver which it is; Linux's `fou` with
//! `gue`, and with an `ipproto` of its own, takes both. Variant 0 would cost four bytes more
//! to say the same.
//!
//! Outer DSCP and ECN are the inner ones (RFC 6040, 4.1, normal mode; RFC 2983, uniform
//! model); the outer packet is never fragmented (DF). What differs from flow to flow in the
//! outer headers, so that routers and the backend's queues spread flows, is [`entropy`].

use crate::{
    abi::{Backend, IPPROTO_UDP},
    checksum::fold,
    headers::{Ipv4, Ipv6, Ports, Udp},
};

/// IP protocol number of IPv4 in something (RFC 2003).
pub const IPPROTO_IPV4: u8 = 4;
/// IP protocol number of IPv6 in something (RFC 2473).
pub const IPPROTO_IPV6: u8 = 41;

/// The port that IANA has assigned to GUE.
pub const GUE_PORT: u16 = 6080;

/// TTL and hop limit of outer headers (RFC 1700).
pub const OUTER_TTL: u8 = 64;

/// Version and header length.
const VERSION_IHL: u8 = 0x45;
/// The first source port of GUE: dynamic ports (RFC 6335, 6) from here on.
const FIRST_PORT: u16 = 0xc000;

/// What is known of the packet inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inner {
    /// Bytes of the whole packet, header included.
    pub len_bytes: u16,
    /// [`IPPROTO_IPV4`] or [`IPPROTO_IPV6`].
    pub protocol: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// [`entropy`] of its flow.
    pub entropy: u32,
}

/// Bytes that wrapping adds.
#[inline(always)]
pub const fn overhead_bytes(outer_v6: bool, gue: bool) -> u16 {
    let ip = if outer_v6 { size_of::<Ipv6>() } else { size_of::<Ipv4>() };
    (ip + if gue { size_of::<Udp>() } else { 0 }) as u16
}

/// Bytes of the largest packet that still fits a path that takes `mtu` when it is wrapped.
pub const fn largest_inner_bytes(mtu: u32, outer_v6: bool, gue: bool) -> u16 {
    // No IPv4 packet is larger, and no wrapped one may be (RFC 791, 3.1).
    let mtu = if mtu > 0xffff { 0xffff } else { mtu as u16 };
    mtu.saturating_sub(overhead_bytes(outer_v6, gue))
}

/// Bits that differ from flow to flow and are the same for all packets of one.
#[inline(always)]
pub const fn entropy(addr: u32, src_port_be: u16, dst_port_be: u16) -> u32 {
    let ports = (src_port_be as u64) << 16 | dst_port_be as u64;
    // In host order, in which neighbouring addresses differ in the low bits: products carry up.
    let both = (u32::from_be(addr) as u64) << 32 | ports;
    let mixed = (both.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
    mixed ^ mixed >> 16
}

/// A source address in one word, for [`entropy`].
#[inline(always)]
pub const fn folded(addr: [u64; 2]) -> u32 {
    let both = addr[0] ^ addr[1].rotate_left(23);
    both as u32 ^ (both >> 32) as u32
}

/// The one's-complement sum over those words of an outer IPv4 header that are the same in each,
/// `protocol` being what follows it: of source and destination, and of version, TTL and DF.
pub const fn outer_sum(src_be: u32, dst_be: u32, protocol: u8) -> u16 {
    let first = u16::from_ne_bytes([VERSION_IHL, 0]);
    let third = u16::from_ne_bytes([OUTER_TTL, protocol]);
    fold(first as u64 + Ipv4::DF_BE as u64 + third as u64 + src_be as u64 + dst_be as u64)
}

/// The outer IPv4 header of a packet of `len_bytes`, its own header included. `sum` is
/// [`outer_sum`] for the same protocol.
#[inline(always)]
pub const fn outer_v4(
    backend: &Backend,
    sum: u16,
    protocol: u8,
    len_bytes: u16,
    inner: Inner,
) -> Ipv4 {
    // Bits of the source that are the flow's are zero in `source`.
    let bits_be = inner.entropy & backend.source_mask_be;
    let total_length_be = len_bytes.to_be();
    let tos = u16::from_ne_bytes([0, inner.tos]);
    Ipv4 {
        version_ihl: VERSION_IHL,
        tos: inner.tos,
        total_length_be,
        // RFC 6864, 4.1: meaningless where DF is set.
        id_be: 0,
        fragment_be: Ipv4::DF_BE,
        ttl_protocol: [OUTER_TTL, protocol],
        checksum: !fold(sum as u64 + total_length_be as u64 + tos as u64 + bits_be as u64),
        src_be: backend.source[0] as u32 | bits_be,
        dst_be: backend.addr[0] as u32,
    }
}

/// The outer IPv6 header of a packet with `payload_bytes` behind it. The flow label is the
/// flow's (RFC 6438).
#[inline(always)]
pub const fn outer_v6(backend: &Backend, protocol: u8, payload_bytes: u16, inner: Inner) -> Ipv6 {
    let bits_be = (inner.entropy & backend.source_mask_be) as u64;
    let label = inner.entropy & 0xf_ffff;
    Ipv6 {
        version_class_flow_be: (6 << 28 | (inner.tos as u32) << 20 | label).to_be(),
        payload_length_be: payload_bytes.to_be(),
        next_header: protocol,
        hop_limit: OUTER_TTL,
        src: [backend.source[0], backend.source[1] | bits_be << 32],
        dst: [backend.addr[0], backend.addr[1]],
    }
}

/// The outer UDP header. Without a checksum: over IPv4 as is usual (RFC 768), over IPv6 as
/// RFC 6935, 5 allows tunnels; what is inside has its own, over the addresses that count, and a
/// packet that a damaged outer address leads elsewhere is for nobody there. Linux's `fou` takes
/// such packets.
#[inline(always)]
pub const fn outer_udp(backend: &Backend, inner: Inner) -> Udp {
    let src = FIRST_PORT | inner.entropy as u16 & !FIRST_PORT;
    Udp {
        ports: Ports { src_be: src.to_be(), dst_be: backend.gue_port_be },
        length_be: (inner.len_bytes + size_of::<Udp>() as u16).to_be(),
        checksum: 0,
    }
}

/// What follows the outer IP header.
#[inline(always)]
pub const fn outer_protocol(gue: bool, inner: u8) -> u8 {
    if gue { IPPROTO_UDP } else { inner }
}

/// The IP packet `packet` as the program wraps it for `backend`, in IP or behind UDP. `None` for
/// what is no IP packet.
#[cfg(feature = "user")]
pub fn wrapped(backend: &Backend, gue: bool, packet: &[u8], entropy: u32) -> Option<Vec<u8>> {
    /// # Safety
    /// A header: integers without gaps between them.
    unsafe fn bytes<T>(header: &T) -> &[u8] {
        // SAFETY: each of its bytes is an integer's, by the condition above.
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(header).cast(), size_of::<T>()) }
    }
    let len_bytes = u16::try_from(packet.len()).ok()?;
    let (protocol, tos) = match packet {
        [first, tos, ..] if first >> 4 == 4 => (IPPROTO_IPV4, *tos),
        [first, second, ..] if first >> 4 == 6 => (IPPROTO_IPV6, first << 4 | second >> 4),
        _ => return None,
    };
    let inner = Inner { len_bytes, protocol, tos, entropy };
    let total = len_bytes.checked_add(overhead_bytes(backend.is_v6(), gue))?;
    let mut whole = Vec::with_capacity(total.into());
    let outer = outer_protocol(gue, protocol);
    if backend.is_v6() {
        let payload_bytes = total - size_of::<Ipv6>() as u16;
        let header = outer_v6(backend, outer, payload_bytes, inner);
        // SAFETY: a header.
        whole.extend(unsafe { bytes(&header) });
    } else {
        let sum = backend.outer_sum[usize::from(protocol == IPPROTO_IPV6)];
        let header = outer_v4(backend, sum, outer, total, inner);
        // SAFETY: as above.
        whole.extend(unsafe { bytes(&header) });
    }
    if gue {
        let header = outer_udp(backend, inner);
        // SAFETY: as above.
        whole.extend(unsafe { bytes(&header) });
    }
    whole.extend(packet);
    Some(whole)
}

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
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_checksum_of_an_outer_header_is_right(
            source in any::<u32>(), addr in any::<u32>(), prefix in 0..=32_u32,
            len_bytes in 20..=u16::MAX, tos in any::<u8>(), entropy in any::<u32>(), gue in any::<bool>(),
        ) {
            let mask = u32::MAX.checked_shr(prefix).unwrap_or(0).to_be();
            let backend = Backend {
                addr: [addr.into(), 0],
                source: [(source & !mask).into(), 0],
                source_mask_be: mask,
                ..Backend::default()
            };
            let protocol = outer_protocol(gue, IPPROTO_IPV4);
            let inner = Inner { len_bytes, protocol: IPPROTO_IPV4, tos, entropy };
            let base = outer_sum(source & !mask, addr, protocol);
            let header = outer_v4(&backend, base, protocol, len_bytes, inner);
            prop_assert_eq!(fold(header.sum()), 0xffff);
            prop_assert_eq!(header.src_be & !mask, source & !mask);
        }
    }

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

    #[test]
    fn sizes_leave_room_for_the_headers() {
        assert_eq!(largest_inner_bytes(1500, false, false), 1480);
        assert_eq!(largest_inner_bytes(1500, true, false), 1460);
        assert_eq!(largest_inner_bytes(1500, false, true), 1472);
        assert_eq!(largest_inner_bytes(1500, true, true), 1452);
        assert_eq!(largest_inner_bytes(65_536, false, false), 65_515);
        assert_eq!(largest_inner_bytes(10, true, true), 0);
    }

    #[test]
    fn flows_differ() {
        let of = |addr: u32, port: u16| entropy(addr.to_be(), port.to_be(), 443_u16.to_be());
        let different = |all: &mut dyn Iterator<Item = u32>| {
            all.map(|bits| bits & 0x3fff).collect::<std::collections::HashSet<_>>().len()
        };
        let ports = different(&mut (0..1000).map(|n| of(0x0a00_0001, 40_000 + n)));
        let hosts = different(&mut (0..1000).map(|n| of(0x0a00_0001 + n, 40_000)));
        let networks = different(&mut (0..1000).map(|n| of(0x0a00_0001 + (n << 16), 40_000)));
        for count in [ports, hosts, networks] {
            assert!(count > 900, "{ports}, {hosts} and {networks} of 1000 each");
        }
    }
}
