//! Map keys and values: the contract between the loaded program and the agent.
//!
//! Integers only, `repr(C)`, padding spelled out, sizes asserted below. A field
//! that ends in `_be` is in network byte order. Whatever changes here changes
//! [`ABI_VERSION`] too: an agent never reinterprets maps of another version.

mod classes;
mod flows;
mod watched;

pub use self::classes::{
    CLASS_BLOCKS, CLASS_NETWORKS, CLASS_TABLES, ClassState, NetworkV4, NetworkV6, TableKey, settled,
};
pub use self::flows::{Flow, FlowKeyV4, FlowKeyV6, PortPair, flow_state};
pub use self::watched::{
    HANDSHAKE_BUCKETS, Sample, Sampling, SignalEvent, VersionSignals, outcome,
};

/// Version of every layout in this module and of the meaning of its flags.
pub const ABI_VERSION: u32 = 7 + NEXT_ABI;

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

/// IP protocol number of ICMP (RFC 792).
pub const IPPROTO_ICMP: u8 = 1;
/// IP protocol number of TCP (RFC 9293).
pub const IPPROTO_TCP: u8 = 6;
/// IP protocol number of ICMPv6 (RFC 4443).
pub const IPPROTO_ICMPV6: u8 = 58;
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

    /// The key of an IPv4 address whatever the port: what stands there says what is served at it,
    /// and is a service's record if that is one only.
    #[inline(always)]
    pub const fn any_v4(addr_be: u32) -> Self {
        Self::v4(addr_be, 0, 0)
    }

    /// The same of an IPv6 address.
    #[inline(always)]
    pub const fn any_v6() -> Self {
        Self::v6(0, 0)
    }

    /// Whether it is the key of an address whatever the port.
    #[inline(always)]
    pub const fn any_port(self) -> bool {
        self.0 >> 32 & 0xff_ffff == 0
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
/// [`Service::flags`]: some of its connections are watched: see [`Sampling`].
pub const SERVICE_SAMPLED: u32 = 1 << 8;
/// [`Service::flags`]: some of its clients have tables of their own: see [`TableKey`].
pub const SERVICE_ROUTED: u32 = 1 << 9;
/// [`Service::flags`]: it is the table of an audience's clients. What may send them elsewhere for
/// want of room must not: see [`crate::class::refuses`].
pub const SERVICE_OF_AUDIENCE: u32 = 1 << 10;
/// [`Service::flags`]: a bucket that moves takes its open connections along. Like the next one, it
/// says nothing to the program: whoever moves buckets while no agent does goes by it.
pub const SERVICE_FORGETS: u32 = 1 << 16;
/// [`Service::flags`]: it has UDP ports, whose flows are learned when a bucket moves.
pub const SERVICE_LEARNS: u32 = 1 << 17;

/// [`Service::flags`], under a key without a port: TCP is served at the address.
pub const SERVICE_TCP: u32 = 1 << 5;
/// [`Service::flags`], under a key without a port: UDP is served at the address.
pub const SERVICE_UDP: u32 = 1 << 6;
/// [`Service::flags`], under a key without a port: by several services.
pub const SERVICE_SEVERAL: u32 = 1 << 7;

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

/// The VLAN tags that a frame gets on its way, in a word of 25 bits.
///
/// Bits 0–11 the outer tag's VLAN, 12–23 the inner one's, 24 whether the outer one is of 802.1ad.
/// A VLAN of 0 stands for no tag; an inner tag is of 802.1Q.
pub mod vlan {
    /// The outer tag is of 802.1ad.
    pub const SERVICE_TAG: u32 = 1 << 24;
    /// The number of a VLAN in a tag.
    pub const ID_MASK: u16 = 0x0fff;

    /// The word of one or two tags, the outer one first.
    #[inline(always)]
    pub const fn word(outer: u16, inner: u16, service_tag: bool) -> u32 {
        let ids = (outer & ID_MASK) as u32 | ((inner & ID_MASK) as u32) << 12;
        ids | if service_tag { SERVICE_TAG } else { 0 }
    }

    /// The outer tag's VLAN.
    #[inline(always)]
    pub const fn outer(word: u32) -> u16 {
        word as u16 & ID_MASK
    }

    /// The inner tag's VLAN.
    #[inline(always)]
    pub const fn inner(word: u32) -> u16 {
        (word >> 12) as u16 & ID_MASK
    }
}

/// Where frames leave by, in one word: an interface's index; or, where they get VLAN tags, the
/// interface's place in `TAGGED` and the [`vlan`] word.
///
/// Bits 0–24 the word, 25–30 the place, 31 that there are tags. No index has that bit.
pub mod way {
    /// There are tags.
    const TAGS: u32 = 1 << 31;
    const PLACE_SHIFT: u32 = 25;
    const VLAN_MASK: u32 = (1 << PLACE_SHIFT) - 1;

    /// Elements of `TAGGED`: interfaces whose clients' frames have tags.
    pub const PLACES: u32 = 64;

    /// The way by the interface at `place`, with the tags of `vlan`.
    #[inline(always)]
    pub const fn tagged(place: u32, vlan: u32) -> u32 {
        TAGS | (place & (PLACES - 1)) << PLACE_SHIFT | vlan & VLAN_MASK
    }

    /// Whether there are tags.
    #[inline(always)]
    pub const fn has_tags(way: u32) -> bool {
        way & TAGS != 0
    }

    /// The interface's place, where there are tags.
    #[inline(always)]
    pub const fn place(way: u32) -> u32 {
        way >> PLACE_SHIFT & (PLACES - 1)
    }

    /// The [`vlan`](super::vlan) word, where there are tags.
    #[inline(always)]
    pub const fn vlan(way: u32) -> u32 {
        way & VLAN_MASK
    }
}

/// Element of `BACKENDS`: one server and how to reach it. Two cache lines, of which `nat` and
/// `dsr` read the first alone.
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
    /// [`vlan`] word of the tags towards it.
    pub vlan: u32,
    /// Since when it has been taking its share little by little: the low 32 bits of
    /// `CLOCK_BOOTTIME` in milliseconds, those of the one before where they are 0; 0 if it is
    /// not. For the next agent only.
    pub slow_since_ms: u32,
    /// Bytes of the largest packet that fits through to it: wrapped, if its service wraps.
    pub inner_mtu: u16,
    /// The MSS that a SYN has at most; 0: whatever it has.
    pub mss: u16,
    /// Tunnels with IPv4 outside: the sum of those words of the outer header that are the same
    /// for every IPv4 packet, then for every IPv6 packet inside
    /// ([`tunnel::outer_sum`](crate::tunnel::outer_sum)).
    pub outer_sum: [u16; 2],
    /// Tunnels: which bits of the source's last four bytes say what flow it is. They are zero
    /// in `source`.
    pub source_mask_be: u32,
    /// `gue`: the port that it takes wrapped packets on.
    pub gue_port_be: u16,
    /// Zero.
    pub pad: u16,
    /// Bytes that the way to it takes (MTU).
    pub mtu: u32,
    /// Zero: the rest of the cache line.
    pub rest: [u64; 5],
}

impl Backend {
    /// Whether its address is IPv6.
    #[inline(always)]
    pub const fn is_v6(&self) -> bool {
        self.flags & BACKEND_V6 != 0
    }
}

/// Key of `MACS`: an interface, and an address that frames for this host may have there. The
/// interface with an address of zeros says that its addresses are known; its value is the [`way`]
/// by it without any tags, 0 where it has no place in `TAGGED`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct MacKey {
    /// Interface that a frame comes in by.
    pub ifindex: u32,
    /// First four bytes of its destination, as they lie in memory.
    pub first: u32,
    /// The last two.
    pub last: u32,
}

/// Elements of `FIRST_MACS`, a power of two: an interface's own address, at the place of its index
/// modulo this. The eight bytes that a frame for it begins with, loaded as one little-endian word
/// and shifted left by 16.
pub const FIRST_MACS: u32 = 256;

/// Key of `FRAGMENTS`: what the fragments of a datagram have in common, as they arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FragmentKey {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Identification.
    pub id_be: u32,
    /// IPv4: the protocol (RFC 791, 3.2). IPv6: 256, since the header that follows may be another
    /// in each fragment (RFC 8200, 4.5).
    pub protocol: u32,
}

/// Value of `FRAGMENTS`: where the first fragment went, for the others to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FragmentRoute {
    /// When the first fragment came, nanoseconds of `CLOCK_MONOTONIC` (coarse).
    pub first_ns: u64,
    /// The source address that it left with.
    pub src: Address,
    /// The destination address that it left with.
    pub dst: Address,
    /// Destination and source MAC address that it left with.
    pub eth: [u32; 3],
    /// Interface that it left by.
    pub ifindex: u32,
    /// [`vlan`] word of the tags that it left with.
    pub vlan: u32,
    /// Backend that it went to or came from.
    pub backend: u16,
    /// [`fragment`] bits.
    pub flags: u16,
    /// What has come of the datagram, in units of eight bytes: start in the low half, end in the
    /// high one; 0 for none.
    pub seen: [u32; FRAGMENT_RANGES],
}

/// Stretches of a datagram that are told apart while they do not touch.
pub const FRAGMENT_RANGES: usize = 4;
/// Elements of `FRAGMENTS`.
pub const FRAGMENTS: u32 = 8192;
/// For how long the fragments of a datagram follow the first, nanoseconds: as long as Linux waits
/// for them, and no longer than RFC 8200, 4.5 lets it.
pub const FRAGMENT_NS: u64 = 30_000_000_000;

/// [`FragmentRoute::flags`].
pub mod fragment {
    /// Addresses change and the packet is routed.
    pub const TRANSLATED: u16 = 1 << 0;
    /// From a backend to a client.
    pub const RETURNED: u16 = 1 << 1;
    /// The last fragment has come.
    pub const LAST: u16 = 1 << 2;
    /// It passed: no service is meant.
    pub const PASSED: u16 = 1 << 3;
    /// It was wrapped; the first word of [`FragmentRoute::src`](super::FragmentRoute::src) is what
    /// its flow's packets have in common outside.
    pub const WRAPPED: u16 = 1 << 4;
    /// Behind UDP.
    pub const GUE: u16 = 1 << 5;
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
/// [`Panic::flags`]: not everything has gone to control, but a version's share has gone back: see
/// [`given_back`].
const PANIC_PART: u32 = 1 << 1;

/// [`Panic::flags`] of a version, by its slot, that has only so many buckets any more, or fewer.
/// There are fewer than all: 2²⁰ − 1 at most.
pub const fn gives_back(slot: u8, buckets: u32) -> u32 {
    let most = (1 << 20) - 1;
    let buckets = if buckets > most { most } else { buckets };
    PANIC_PART | (slot as u32 & (MAX_VERSIONS as u32 - 1)) << 8 | buckets << 12
}

/// The version's slot, and how many buckets it has any more; `None` where everything has gone to
/// control.
pub const fn given_back(flags: u32) -> Option<(u8, u32)> {
    if flags & PANIC_PART == 0 {
        return None;
    }
    Some(((flags >> 8) as u8 & (MAX_VERSIONS as u8 - 1), flags >> 12))
}

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
        /// Why a packet was passed to the host, dropped or answered: index into `REASONS`.
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

            /// What becomes of such a packet.
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
    /// Is answered by the balancer: with what was asked for, or with an error.
    Answer,
}

impl ReasonVerdict {
    /// The word used in metrics, `status` and the documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Drop => "drop",
            Self::Answer => "answer",
        }
    }
}

reasons! {
    /// Not IPv4 or IPv6; not TCP or UDP, and no ICMP that is a service's business.
    PassOther = 0, "pass_other", Pass;
    /// TCP or UDP, but to no service's address and port.
    PassNoService = 1, "pass_no_service", Pass;
    /// A fragment after the first of a datagram that no service is meant by: the first one passed, or no service has its protocol at the address.
    PassFragment = 2, "pass_fragment", Pass;
    /// A header is cut short or its length is impossible.
    DropMalformed = 3, "drop_malformed", Drop;
    /// The bucket's backend has no usable next hop, is in maintenance, or there is none.
    DropNoBackend = 4, "drop_no_backend", Drop;
    /// The flow table is full: a new flow of a translated service, or of a client whose class has just changed.
    DropFlowTableFull = 5, "drop_flow_table_full", Drop;
    /// No free source port towards the backend (translated services).
    DropNoPort = 6, "drop_no_port", Drop;
    /// Belongs to no known flow and opens none, or to one whose backend is in maintenance (translated services): the host answers with a reset.
    PassNoFlow = 7, "pass_no_flow", Pass;
    /// As `answer_ttl_expired`, but no error may be sent: more than 1,000 a second on one CPU, or to no single host.
    DropTtlExpired = 8, "drop_ttl_expired", Drop;
    /// The frame could not be handed to the outgoing interface.
    DropNoInterface = 9, "drop_no_interface", Drop;
    /// Its destination MAC address is neither the interface's nor that of a device on top of it.
    PassOtherHost = 10, "pass_other_host", Pass;
    /// More than two VLAN tags.
    PassTags = 11, "pass_tags", Pass;
    /// What its IPv6 extension headers lead to can't be seen: one that is unknown, more than eight or 512 bytes of them, a routing header with segments left, a jumbogram.
    PassExtension = 12, "pass_extension", Pass;
    /// TCP flags that no TCP sends: SYN with FIN or RST, FIN with RST, none at all, FIN, PSH or URG without ACK.
    DropTcpFlags = 13, "drop_tcp_flags", Drop;
    /// Source and destination address are the same (a land attack).
    DropLand = 14, "drop_land", Drop;
    /// A fragment after the first whose datagram's first one has not come, or too long ago, where that has to decide.
    DropFragmentEarly = 15, "drop_fragment_early", Drop;
    /// A fragment with bytes that another one of its datagram had.
    DropFragmentOverlap = 16, "drop_fragment_overlap", Drop;
    /// A first fragment that does not hold the whole transport header, or a later one that lies over it.
    DropFragmentTiny = 17, "drop_fragment_tiny", Drop;
    /// An echo request to an address with a service: the balancer sends the reply.
    AnswerEcho = 18, "answer_echo", Answer;
    /// Wrapped, it is larger than the way to its backend takes: its sender is told how large it may be.
    AnswerTooBig = 19, "answer_too_big", Answer;
    /// TTL or hop limit ran out where the packet is routed: its sender is told.
    AnswerTtlExpired = 20, "answer_ttl_expired", Answer;
    /// As `answer_too_big`, but no error may be sent: more than 1,000 a second on one CPU, or to no single host.
    DropTooBig = 21, "drop_too_big", Drop;
    /// There is no room in front of the frame for the outer headers, or for an error's.
    DropNoHeadroom = 22, "drop_no_headroom", Drop;
}

/// Elements of `REASONS`: room for those to come, so that it need not be made anew for each.
pub const REASON_SLOTS: u32 = 64;

const _: () = {
    assert!(size_of::<VipSlotV4>() == 64);
    assert!(size_of::<VipSlotV6>() == 80);
    assert!(size_of::<Service>() == 56);
    assert!(size_of::<Backend>() == 128);
    assert!(core::mem::offset_of!(Backend, slow_since_ms) == 64);
    assert!(core::mem::offset_of!(Backend, mtu) == 84);
    assert!(size_of::<FlowKeyV4>() == 16);
    assert!(size_of::<FlowKeyV6>() == 40);
    assert!(size_of::<Flow>() == 80);
    assert!(size_of::<MacKey>() == 12);
    assert!(size_of::<TableKey>() == 8);
    assert!(size_of::<NetworkV4>() == 8);
    assert!(size_of::<NetworkV6>() == 20);
    assert!(size_of::<ClassState>() == 8);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<FragmentRoute>() == 80);
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
