//! Map keys and values: the contract between the loaded program and the agent.
//!
//! Integers only, `repr(C)`, padding spelled out, sizes asserted below. A field
//! that ends in `_be` is in network byte order. Whatever changes here changes
//! [`ABI_VERSION`] too: an agent never reinterprets maps of another version.

/// Version of every layout in this module and of the meaning of its flags.
pub const ABI_VERSION: u32 = 2 + NEXT_ABI;

/// What the layout that only tests have (feature `next-abi`) adds to [`ABI_VERSION`]: they put
/// it and the real one in each other's place. There, [`BackendCounters`] lie elsewhere.
pub const NEXT_ABI: u32 = if cfg!(feature = "next-abi") { 1_000_000 } else { 0 };

/// Buckets in one page of the forwarding table, and of the ledger.
pub const PAGE_BUCKETS: u32 = 4096;
/// Backend records, index 0 (none) included; entries hold 15 bits.
pub const BACKEND_INDICES: u32 = 1 << 15;
/// Elements of `NAT_SOURCES`: addresses of all services, a list that several share once.
pub const NAT_SOURCES: u32 = 4096;
/// Versions in one service, control included.
pub const MAX_VERSIONS: usize = 16;
/// Longest name of a service, in bytes.
pub const SERVICE_NAME_BYTES: usize = 64;
/// Longest name of a version, in bytes.
pub const VERSION_NAME_BYTES: usize = 32;

/// IP protocol number of TCP (RFC 9293).
pub const IPPROTO_TCP: u8 = 6;
/// IP protocol number of UDP (RFC 768).
pub const IPPROTO_UDP: u8 = 17;

/// An address of either family: its bytes in order, as two words in the host's
/// loading order; an IPv4 address fills the first four bytes, the rest is zero.
pub type Address = [u64; 2];

/// An address as map keys and values hold it.
#[cfg(feature = "user")]
pub fn address(ip: std::net::IpAddr) -> Address {
    let mut bytes = [0; 16];
    match ip {
        std::net::IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        std::net::IpAddr::V6(v6) => bytes = v6.octets(),
    }
    let (halves, _) = bytes.as_chunks::<8>();
    [halves[0], halves[1]].map(u64::from_ne_bytes)
}

/// The address that `address` made, of which the family is known otherwise.
#[cfg(feature = "user")]
pub fn ip(address: Address, v6: bool) -> std::net::IpAddr {
    let [[a, b, c, d, rest @ ..], second] = address.map(u64::to_ne_bytes);
    if !v6 {
        return std::net::Ipv4Addr::new(a, b, c, d).into();
    }
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&[a, b, c, d, rest[0], rest[1], rest[2], rest[3]]);
    bytes[8..].copy_from_slice(&second);
    std::net::Ipv6Addr::from(bytes).into()
}

/// What a packet is looked up by besides an IPv6 address: for IPv4 the address is in it.
///
/// Bits 0–31 IPv4 address, 32–47 port, both in network order, 48–55 protocol,
/// 56 always set: 0 marks an empty slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct VipKey(pub u64);

impl VipKey {
    /// The key of an IPv4 address and port.
    #[inline(always)]
    pub const fn v4(addr_be: u32, port_be: u16, protocol: u8) -> Self {
        Self(addr_be as u64 | (port_be as u64) << 32 | (protocol as u64) << 48 | 1 << 56)
    }

    /// The key of a port at an IPv6 address.
    #[inline(always)]
    pub const fn v6(port_be: u16, protocol: u8) -> Self {
        Self::v4(0, port_be, protocol)
    }
}

/// Element of `VIPS_V4`: one cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VipSlotV4 {
    /// Whose slot it is; 0 for nobody's.
    pub key: VipKey,
    /// The service there.
    pub service: Service,
}

/// Element of `VIPS_V6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VipSlotV6 {
    /// Whose slot it is; 0 for nobody's.
    pub key: VipKey,
    /// The service there.
    pub service: Service,
    /// The address.
    pub addr: Address,
}

/// How packets reach a backend: the low bits of [`Service::flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ForwardMode {
    /// Source and destination rewritten; both directions cross the balancer.
    Nat = 0,
    /// Only the MAC addresses change.
    Dsr = 1,
    /// Wrapped in IP.
    Ipip = 2,
    /// Wrapped in UDP.
    Gue = 3,
}

impl ForwardMode {
    /// The bits of [`Service::flags`] that hold the mode.
    pub const MASK: u32 = 0x7;
}

/// [`Service::flags`]: the bucket is a hash of the whole connection, not of the source alone.
pub const SERVICE_HASH_CONNECTION: u32 = 1 << 3;
/// [`Service::flags`]: QUIC is spoken on its UDP ports.
pub const SERVICE_QUIC: u32 = 1 << 4;
/// [`Service::flags`]: a bucket that moves takes its open connections along. Like the next one, it
/// says nothing to the program: whoever moves buckets while no agent does goes by it.
pub const SERVICE_FORGETS: u32 = 1 << 16;
/// [`Service::flags`]: it has UDP ports, whose flows are learned when a bucket moves.
pub const SERVICE_LEARNS: u32 = 1 << 17;

/// Value of `VIPS_V4` and `VIPS_V6`: all that steering needs to know of a
/// service. The same record stands under each of its addresses and ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Service {
    /// First page of its forwarding table.
    pub first_page: u32,
    /// Number of buckets less one; the number is a power of two.
    pub bucket_mask: u32,
    /// [`ForwardMode`] and `SERVICE_*` bits.
    pub flags: u32,
    /// Index into `SERVICE_INFO`.
    pub id: u32,
    /// Keys of the bucket hash.
    pub hash_key: [u64; 2],
    /// Which bits of an IPv4 source are hashed.
    pub mask_v4_be: u32,
    /// Milliseconds of silence after which a UDP flow counts as a new one.
    pub udp_idle_ms: u32,
    /// Which bits of an IPv6 source are hashed.
    pub mask_v6: Address,
}

/// Nanoseconds of silence after which the flow of a QUIC connection is over, unless `udp_idle` is
/// longer. How a connection ends is encrypted, and servers have idle timeouts of their own
/// (RFC 9000, 10.1); five minutes are what RFC 4787, REQ-5 recommends for UDP where addresses are
/// translated, so a client's own network has let go of a flow by then.
pub const QUIC_IDLE_NS: u64 = 300_000_000_000;

impl Service {
    /// Nanoseconds of silence after which a UDP flow counts as a new one.
    #[inline(always)]
    pub const fn udp_idle_ns(&self) -> u64 {
        self.udp_idle_ms as u64 * 1_000_000
    }

    /// Nanoseconds of silence after which the flow of a QUIC connection is over.
    #[inline(always)]
    pub const fn quic_idle_ns(&self) -> u64 {
        quic_idle_ns(self.udp_idle_ns())
    }
}

/// Nanoseconds of silence after which the flow of a QUIC connection is over, `udp_idle_ns` being
/// that for other UDP flows.
#[inline(always)]
pub const fn quic_idle_ns(udp_idle_ns: u64) -> u64 {
    if udp_idle_ns > QUIC_IDLE_NS { udp_idle_ns } else { QUIC_IDLE_NS }
}

/// [`Backend::flags`]: the next hop is known; packets can be sent.
pub const BACKEND_USABLE: u32 = 1 << 0;
/// [`Backend::flags`]: the address is IPv6.
pub const BACKEND_V6: u32 = 1 << 1;
/// [`Backend::flags`]: takes no packets at all, not even of open connections.
pub const BACKEND_MAINT: u32 = 1 << 2;
/// [`Backend::flags`]: fails its checks; half-open entries for it may be replaced.
pub const BACKEND_DOWN: u32 = 1 << 3;

/// [`Backend::flags`]: an operator has told it to take no new connections. The table says so
/// already; here it stands for an agent that finds no other memory of it.
pub const BACKEND_DRAIN: u32 = 1 << 4;
/// [`Backend::flags`]: from this bit on, the weight that the configuration gives it; 0 too for one
/// that is not configured any more. For whoever gives out buckets while no agent does.
pub const BACKEND_WEIGHT_SHIFT: u32 = 16;

/// Element of `BACKENDS`: one server and how to reach it. One cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Backend {
    /// Next hop's MAC address, then the outgoing interface's: the first twelve
    /// bytes of the Ethernet header, in words as they lie in memory.
    pub eth: [u32; 3],
    /// Outgoing interface.
    pub ifindex: u32,
    /// The server's address.
    pub addr: Address,
    /// Source of what the balancer makes for this backend when it needs only
    /// one (the outer header of a tunnel).
    pub source: Address,
    /// The server's port.
    pub port_be: u16,
    /// Slot of its version in the service.
    pub version: u8,
    /// How many of `NAT_SOURCES` it uses.
    pub nat_count: u8,
    /// First of its addresses in `NAT_SOURCES`.
    pub nat_first: u16,
    /// `SERVICE_INFO` index of its service.
    pub service: u16,
    /// `BACKEND_*` bits.
    pub flags: u32,
    /// Since when it has been taking its share little by little: the low 32 bits of
    /// `CLOCK_BOOTTIME` in milliseconds, those of the one before where they are 0; 0 if it is
    /// not. For the next agent only.
    pub slow_since_ms: u32,
}

/// Key of `FLOWS_V4`: the five-tuple of a packet as it arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKeyV4 {
    /// Source address.
    pub src_be: u32,
    /// Destination address.
    pub dst_be: u32,
    /// Source port.
    pub src_port_be: u16,
    /// Destination port.
    pub dst_port_be: u16,
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
    /// Source port.
    pub src_port_be: u16,
    /// Destination port.
    pub dst_port_be: u16,
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
    /// Translated flows: interface towards the client.
    pub ifindex: u32,
    /// TCP: number of what comes next in the direction, as far as seen, host order.
    pub next_seq: u32,
    /// Translated flows: [`flow_state`] bits that the other direction's packets have set. Apart,
    /// so that each word has packets of one direction to write it.
    pub other: u32,
}

/// Element of `BACKEND_COUNTERS` (per CPU), by backend index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct BackendCounters {
    /// Zero: all that follows lies elsewhere.
    #[cfg(feature = "next-abi")]
    pub moved: u64,
    /// Packets sent to the backend.
    pub packets: u64,
    /// Bytes of those packets, from the Ethernet header on, as they arrived.
    pub bytes: u64,
    /// Connections: SYNs steered for the first time as far as is known, new
    /// UDP flows where flows are kept.
    pub connections: u64,
    /// Packets from the backend (translated flows only).
    pub returned_packets: u64,
    /// Bytes of those.
    pub returned_bytes: u64,
    /// New flows that were refused because no source port was left (translated flows only).
    pub no_port: u64,
    /// When a search through all source ports last found none, nanoseconds of
    /// `CLOCK_MONOTONIC` (coarse).
    pub exhausted_ns: u64,
}

/// On what condition a flow entry is forgotten: see [`Forget`].
pub mod forget {
    /// No packet has come since: [`Forget::last_ns`](super::Forget::last_ns) and
    /// [`Forget::other_ns`](super::Forget::other_ns) are still those of its entries.
    pub const SILENT: u32 = 0;
    /// It names [`Forget::backend`](super::Forget::backend) still.
    pub const NAMES: u32 = 1;
}

/// What the programs `forget_v4` and `forget_v6` are run on: after [`FORGET_OFFSET`] bytes, one
/// of these for each entry that is to go, at most [`FORGET_MOST`]. The condition is looked at
/// again where no packet can come in between on the same CPU, so that an entry that was revived
/// stays. A translated flow goes with both of its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Forget<K> {
    /// The entry's key.
    pub key: K,
    /// When its last packet came, as it was read.
    pub last_ns: u64,
    /// Translated flows: when the other direction's did; 0 where it has no entry.
    pub other_ns: u64,
    /// The backend that must be named.
    pub backend: u32,
    /// One of [`forget`].
    pub condition: u32,
}

/// Where the first [`Forget`] lies: behind an Ethernet header, and aligned.
pub const FORGET_OFFSET: usize = 16;
/// Most of them in one run: what fits into a page with what the kernel keeps there.
pub const FORGET_MOST: usize = 48;

/// Element of `FLOW_COUNTERS` (per CPU): what became of entries of both flow tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FlowCounters {
    /// Entries that were stored.
    pub stored: u64,
    /// Half-open and closed translated flows that made room in a full table.
    pub let_go: u64,
    /// Half-open and closed translated flows whose source port a new flow has taken.
    pub taken_over: u64,
    /// New flows of tracked buckets that a full table could not hold: they went where the
    /// bucket's older connections go.
    pub untracked: u64,
}

/// Element of `SPARE_RINGS`, by CPU, those of IPv4 first: where the CPU's part of `SPARE_V4`
/// or `SPARE_V6` begins and ends. Counts up; the place is the count modulo the size. A cache
/// line, since other CPUs have theirs beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Ring {
    /// Where the next one goes.
    pub head: u64,
    /// The oldest one.
    pub tail: u64,
    /// Zero.
    pub pad: [u64; 6],
}

/// Element of `SERVICE_INFO`: the directory of what is in the maps, so that
/// they can be understood without the agent that wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceInfo {
    /// Its name, padded with zeros; all zero for a free slot.
    pub name: [u8; SERVICE_NAME_BYTES],
    /// Names of its versions by slot, padded with zeros.
    pub versions: [[u8; VERSION_NAME_BYTES]; MAX_VERSIONS],
    /// First page of its table and ledger.
    pub first_page: u32,
    /// Number of buckets.
    pub buckets: u32,
    /// Slot of the control version.
    pub control: u32,
    /// 4 or 6: a service with addresses of both families has a table for each.
    pub family: u32,
}

/// Element of `META`: what the pinned maps are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Meta {
    /// [`ABI_VERSION`] of who made the maps.
    pub abi_version: u32,
    /// Zero.
    pub pad: u32,
}

/// Element of `PANICS`: what sent a table's buckets to control behind the agent's back. That of a
/// table is the one after its `SERVICE_INFO` index.
///
/// Element 0 is nobody's: its `number` counts whoever writes tables while an agent may be alive,
/// before the first word is written. An agent that finds another count there than it knows has to
/// read the tables anew before it writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Panic {
    /// Which it is, by that count; 0 for none. Written after all else.
    pub number: u64,
    /// The number that an agent has made its own: it is done with if that is [`Self::number`].
    pub adopted: u64,
    /// What the same request is called on the control socket.
    pub id: u64,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Who.
    pub uid: u32,
    /// `PANIC_*` bits.
    pub flags: u32,
    /// Why, padded with zeros; all zero if nobody said.
    pub reason: [u8; PANIC_REASON_BYTES],
}

/// Longest reason that [`Panic`] holds, in bytes.
pub const PANIC_REASON_BYTES: usize = 216;
/// [`Panic::flags`]: open connections go, too.
pub const PANIC_MOVE: u32 = 1 << 0;

/// One bucket of the ledger: who owns it and when it last moved.
///
/// Bits 0–7 the owner's version slot, 8–63 milliseconds of `CLOCK_BOOTTIME` of
/// the last move, 0 for never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct LedgerEntry(pub u64);

impl LedgerEntry {
    /// `owner` since `moved_ms` of `CLOCK_BOOTTIME`; 0 for a bucket that never moved.
    pub const fn new(owner: u8, moved_ms: u64) -> Self {
        Self(owner as u64 | moved_ms << 8)
    }

    /// The owner's version slot.
    pub const fn owner(self) -> u8 {
        self.0 as u8
    }

    /// Milliseconds of `CLOCK_BOOTTIME` of the last move; 0 for never.
    pub const fn moved_ms(self) -> u64 {
        self.0 >> 8
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $value:literal, $name:literal, $verdict:ident;)+) => {
        /// Why a packet was passed to the host or dropped: index into `REASONS`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant = $value,)+
        }

        impl Reason {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),+];

            /// The word used in metrics, `status` and the documents.
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)+ }
            }

            /// Whether such a packet is dropped or passed.
            pub const fn verdict(self) -> ReasonVerdict {
                match self { $(Reason::$variant => ReasonVerdict::$verdict,)+ }
            }

            /// What it means, in a sentence.
            pub const fn explanation(self) -> &'static str {
                match self { $(Reason::$variant => concat!($($doc),+),)+ }
            }
        }
    };
}

/// What becomes of a packet that is counted under a [`Reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReasonVerdict {
    /// Goes to the host's network stack untouched.
    Pass,
    /// Goes nowhere.
    Drop,
}

reasons! {
    /// Not IPv4 or IPv6, or not TCP or UDP.
    PassOther = 0, "pass_other", Pass;
    /// TCP or UDP, but to no service's address and port.
    PassNoService = 1, "pass_no_service", Pass;
    /// A fragment: its ports are unknown.
    PassFragment = 2, "pass_fragment", Pass;
    /// A header is cut short or its length is impossible.
    DropMalformed = 3, "drop_malformed", Drop;
    /// The bucket's backend has no usable next hop, is in maintenance, or there is none.
    DropNoBackend = 4, "drop_no_backend", Drop;
    /// The flow table is full (translated services).
    DropFlowTableFull = 5, "drop_flow_table_full", Drop;
    /// No free source port towards the backend (translated services).
    DropNoPort = 6, "drop_no_port", Drop;
    /// Belongs to no known flow and opens none, or to one whose backend is in maintenance (translated services): the host answers with a reset.
    PassNoFlow = 7, "pass_no_flow", Pass;
    /// TTL or hop limit ran out where the packet is routed.
    DropTtlExpired = 8, "drop_ttl_expired", Drop;
    /// The frame could not be handed to the outgoing interface.
    DropNoInterface = 9, "drop_no_interface", Drop;
}

/// Elements of `REASONS`: room for those to come, so that it need not be made anew for each.
pub const REASON_SLOTS: u32 = 64;

const _: () = {
    assert!(size_of::<VipSlotV4>() == 64);
    assert!(size_of::<VipSlotV6>() == 80);
    assert!(size_of::<Service>() == 56);
    assert!(size_of::<Backend>() == 64);
    assert!(size_of::<FlowKeyV4>() == 16);
    assert!(size_of::<FlowKeyV6>() == 40);
    assert!(size_of::<Flow>() == 80);
    assert!(size_of::<BackendCounters>() == 56 + if NEXT_ABI == 0 { 0 } else { 8 });
    assert!(size_of::<FlowCounters>() == 32);
    assert!(size_of::<Ring>() == 64);
    assert!(size_of::<Forget<FlowKeyV4>>() == 40);
    assert!(size_of::<Forget<FlowKeyV6>>() == 64);
    assert!(FORGET_OFFSET + FORGET_MOST * size_of::<Forget<FlowKeyV6>>() <= 3520);
    assert!(size_of::<ServiceInfo>() == 64 + 512 + 16);
    assert!(size_of::<Meta>() == 8);
    assert!(size_of::<LedgerEntry>() == 8);
    assert!(size_of::<Panic>() == 256);
    assert!(Reason::ALL.len() <= REASON_SLOTS as usize);
};

#[cfg(all(test, feature = "user"))]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back() {
        for text in ["0.0.0.0", "203.0.113.10", "::", "2001:db8:1:2:3:4:5:6"] {
            let original: std::net::IpAddr = text.parse().unwrap();
            assert_eq!(ip(address(original), original.is_ipv6()), original);
        }
    }
}
