//! Views of packet headers: the layouts, and the one way to get at them.

use crate::{abi::Address, checksum::Delta};

/// A frame's bytes, from the Ethernet header on.
///
/// # Safety
/// A pointer that `at` returns must be valid for reads and writes of a `T`
/// until the frame is resized or sent. It is aligned for `T` only if the IP
/// header is aligned to eight bytes or the target loads and stores unaligned
/// words as they are, as the kernels of x86-64 and aarch64 let BPF programs do.
pub unsafe trait Frame {
    /// A `T` that starts `offset` bytes into the frame, unless it ends sooner.
    fn at<T>(&self, offset: usize) -> Option<*mut T>;
    /// Length of the frame in bytes.
    fn len_bytes(&self) -> usize;
}

/// Length of an untagged Ethernet header in bytes.
pub const ETH_BYTES: usize = 14;
/// EtherType of IPv4, as it is loaded.
pub const ETHERTYPE_IPV4_BE: u16 = 0x0800_u16.to_be();
/// EtherType of IPv6, as it is loaded.
pub const ETHERTYPE_IPV6_BE: u16 = 0x86dd_u16.to_be();

/// EtherType of an 802.1Q tag, as it is loaded.
pub const ETHERTYPE_VLAN_BE: u16 = 0x8100_u16.to_be();
/// EtherType of an 802.1ad tag, as it is loaded.
pub const ETHERTYPE_QINQ_BE: u16 = 0x88a8_u16.to_be();

/// Whether a tag follows the EtherType.
#[inline(always)]
pub const fn is_tag(ethertype_be: u16) -> bool {
    ethertype_be == ETHERTYPE_VLAN_BE || ethertype_be == ETHERTYPE_QINQ_BE
}

/// Ethernet header.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Eth {
    /// Destination, then source.
    pub addresses: [u8; 12],
    /// EtherType.
    pub ethertype_be: u16,
}

/// A VLAN tag without the EtherType before it (IEEE 802.1Q, 9.6).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Tag {
    /// Priority, eligibility to be dropped, and number of the VLAN.
    pub tci_be: u16,
    /// EtherType of what follows.
    pub ethertype_be: u16,
}

/// IPv4 header without options (RFC 791, 3.1).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Ipv4 {
    /// Version and header length in 32-bit words.
    pub version_ihl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Length of header and payload in bytes.
    pub total_length_be: u16,
    /// Identification.
    pub id_be: u16,
    /// Flags and fragment offset.
    pub fragment_be: u16,
    /// TTL and protocol, which the checksum covers as one word.
    pub ttl_protocol: [u8; 2],
    /// Header checksum.
    pub checksum: u16,
    /// Source address.
    pub src_be: u32,
    /// Destination address.
    pub dst_be: u32,
}

impl Ipv4 {
    /// Takes one from the TTL, which is not 0, and says by how much the words that the checksum covers
    /// change, which is always the same (RFC 1141).
    ///
    /// TTL and protocol are written as the one word that they are read as: a word of which half was just
    /// written can't be read before that is in the cache.
    #[inline(always)]
    pub const fn one_hop_less(&mut self) -> Delta {
        const HOP: u16 = u16::from_ne_bytes([1, 0]);
        let ttl_protocol = u16::from_ne_bytes(self.ttl_protocol);
        self.ttl_protocol = ttl_protocol.wrapping_sub(HOP).to_ne_bytes();
        Delta::ZERO.replace_half(HOP, 0)
    }

    /// More-fragments flag and offset: not zero in any fragment.
    pub const FRAGMENT_MASK_BE: u16 = 0x3fff_u16.to_be();
    /// Fragment offset: not zero in any fragment but the first.
    pub const OFFSET_MASK_BE: u16 = 0x1fff_u16.to_be();
    /// "Don't fragment".
    pub const DF_BE: u16 = 0x4000_u16.to_be();

    /// The sum over its words, as [`checksum::of`](crate::checksum::of) takes it.
    #[inline(always)]
    pub const fn sum(&self) -> u64 {
        u16::from_ne_bytes([self.version_ihl, self.tos]) as u64
            + self.total_length_be as u64
            + self.id_be as u64
            + self.fragment_be as u64
            + u16::from_ne_bytes(self.ttl_protocol) as u64
            + self.checksum as u64
            + self.src_be as u64
            + self.dst_be as u64
    }
}

/// Header of an ICMP or ICMPv6 message (RFC 792; RFC 4443, 2.1).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Checksum.
    pub checksum: u16,
    /// What depends on the type.
    pub rest_be: [u16; 2],
}

impl Icmp {
    /// The sum over its words, as [`checksum::of`](crate::checksum::of) takes it.
    #[inline(always)]
    pub const fn sum(&self) -> u64 {
        u16::from_ne_bytes([self.kind, self.code]) as u64
            + self.checksum as u64
            + self.rest_be[0] as u64
            + self.rest_be[1] as u64
    }
}

/// IPv6 header (RFC 8200, 3).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Ipv6 {
    /// Version, traffic class and flow label.
    pub version_class_flow_be: u32,
    /// Length of what follows this header in bytes.
    pub payload_length_be: u16,
    /// Next header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
}

/// Ports, which TCP and UDP have in common.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Ports {
    /// Source port.
    pub src_be: u16,
    /// Destination port.
    pub dst_be: u16,
}

/// UDP header (RFC 768).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Udp {
    /// Ports.
    pub ports: Ports,
    /// Length of header and payload in bytes.
    pub length_be: u16,
    /// Checksum; 0 for none (IPv4).
    pub checksum: u16,
}

/// TCP header without options (RFC 9293, 3.1).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Tcp {
    /// Ports.
    pub ports: Ports,
    /// Sequence number.
    pub seq_be: u32,
    /// Acknowledgement number.
    pub ack_be: u32,
    /// Header length in 32-bit words (high half) and reserved bits.
    pub data_offset: u8,
    /// Flags.
    pub flags: u8,
    /// Window.
    pub window_be: u16,
    /// Checksum.
    pub checksum: u16,
    /// Urgent pointer.
    pub urgent_be: u16,
}

const _: () = {
    assert!(size_of::<Eth>() == ETH_BYTES);
    assert!(size_of::<Ipv4>() == 20);
    assert!(size_of::<Ipv6>() == 40);
    assert!(size_of::<Udp>() == 8);
    assert!(size_of::<Tcp>() == 20);
    assert!(size_of::<Icmp>() == 8);
};

#[cfg(any(test, feature = "user"))]
pub use memory::Bytes;

#[cfg(any(test, feature = "user"))]
mod memory {
    use super::Frame;

    /// A frame in memory of our own.
    #[derive(Clone, Debug, Default)]
    pub struct Bytes(pub Vec<u8>);

    // SAFETY: `at` stays within the vector, which nothing resizes and nobody else reads meanwhile;
    // x86-64 and aarch64 load unaligned words as they are.
    unsafe impl Frame for Bytes {
        fn at<T>(&self, offset: usize) -> Option<*mut T> {
            let inside = offset.checked_add(size_of::<T>())? <= self.0.len();
            // SAFETY: inside the vector.
            inside.then(|| unsafe { self.0.as_ptr().add(offset).cast_mut().cast() })
        }

        fn len_bytes(&self) -> usize {
            self.0.len()
        }
    }
}
