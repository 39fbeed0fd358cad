//! Flow tables: what a connection is found by, and where each of its directions goes.

use super::Address;

/// Source and destination port, each in network order, as they lie in a TCP or UDP header: one word,
/// since the kernel hashes keys by words. A word that was just written as two halves can't be read before
/// both are in the cache, some 5 ns later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PortPair(u32);

impl PortPair {
    /// Bits by which the source port is shifted, and the destination port.
    const SHIFTS: [u32; 2] = if cfg!(target_endian = "little") { [0, 16] } else { [16, 0] };

    /// These two.
    #[inline(always)]
    pub const fn new(src_be: u16, dst_be: u16) -> Self {
        Self((src_be as u32) << Self::SHIFTS[0] | (dst_be as u32) << Self::SHIFTS[1])
    }

    /// Source port.
    #[inline(always)]
    pub const fn src_be(self) -> u16 {
        (self.0 >> Self::SHIFTS[0]) as u16
    }

    /// Destination port.
    #[inline(always)]
    pub const fn dst_be(self) -> u16 {
        (self.0 >> Self::SHIFTS[1]) as u16
    }

    /// Both, as they lie in the packet.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0
    }
}

/// Key of `FLOWS_V4`: the five-tuple of a packet as it arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKeyV4 {
    /// Source address.
    pub src_be: u32,
    /// Destination address.
    pub dst_be: u32,
    /// Its ports.
    pub ports: PortPair,
    /// TCP or UDP.
    pub protocol: u32,
}

/// Key of `FLOWS_V6`: the five-tuple of a packet as it arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKeyV6 {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Its ports.
    pub ports: PortPair,
    /// TCP or UDP.
    pub protocol: u32,
}

/// [`Flow::state`]: what the entry is and how far its connection has come.
pub mod flow_state {
    /// The direction backend → client of a translated flow; other entries are client → backend.
    pub const REVERSE: u32 = 1 << 0;
    /// Half-open: only the SYN has been seen, and no packet within 64 KiB after it. Translated
    /// flows: the client has not acknowledged the server's SYN-ACK yet. Of a QUIC connection: no
    /// Handshake packet.
    pub const PROVISIONAL: u32 = 1 << 1;
    /// A FIN of the client was seen, and nothing beyond it since.
    pub const CLOSING: u32 = 1 << 2;
    /// A UDP flow, not of QUIC.
    pub const UDP: u32 = 1 << 3;
    /// A FIN of the server was seen, and nothing beyond it since (translated flows only).
    pub const SERVER_CLOSING: u32 = 1 << 4;
    /// The entry translates addresses: it must outlive its bucket's drain.
    pub const NAT: u32 = 1 << 5;
    /// A QUIC connection's flow.
    pub const QUIC: u32 = 1 << 6;
    /// The server's SYN-ACK was seen (translated flows only).
    pub const ANSWERED: u32 = 1 << 8;
    /// A RST of the client was seen and nothing of it since.
    pub const RESET: u32 = 1 << 9;
    /// A RST of the server was seen and nothing of it since (translated flows only).
    pub const SERVER_RESET: u32 = 1 << 10;
    /// The server has gone on after its SYN-ACK: the connection is open (translated flows only).
    pub const SERVER_OPEN: u32 = 1 << 11;
    /// The connection is watched (translated flows only): it has, or had, a [`Sample`](crate::abi::Sample).
    pub const SAMPLED: u32 = 1 << 12;
}

/// Value of `FLOWS_V4` and `FLOWS_V6`: where one direction of a flow goes.
///
/// A forward entry (client → VIP) names a backend and, when it translates, the
/// addresses and ports the packet gets. A reverse entry (backend → translated
/// source) names the client and the way back that the client's last packet
/// came by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Flow {
    /// When the last packet came, nanoseconds of `CLOCK_MONOTONIC` (coarse).
    pub last_ns: u64,
    /// [`flow_state`] bits.
    pub state: u32,
    /// Sequence number of the direction's SYN, host order; of a QUIC connection, a number that
    /// follows from the destination connection ID of the Initial packet that opened it.
    pub syn_seq: u32,
    /// The packet's new source address.
    pub src: Address,
    /// The packet's new destination address.
    pub dst: Address,
    /// The packet's new source port.
    pub src_port_be: u16,
    /// The packet's new destination port.
    pub dst_port_be: u16,
    /// Backend that the flow belongs to.
    pub backend: u16,
    /// `SERVICE_INFO` index of its service.
    pub service: u16,
    /// Translated flows: destination and source MAC address towards the client, the first
    /// twelve bytes of the Ethernet header in words as they lie in memory.
    pub eth: [u32; 3],
    /// Translated flows: the [`way`](super::way) towards the client.
    pub way: u32,
    /// TCP: number of what comes next in the direction, as far as seen, host order.
    pub next_seq: u32,
    /// Translated flows: [`flow_state`] bits that the other direction's packets have set. Apart,
    /// so that each word has packets of one direction to write it.
    pub other: u32,
}
