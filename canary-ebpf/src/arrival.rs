//! Packets that are not plain TCP or UDP over untagged IP: what is the matter with each is found
//! out here, and noted for the program that goes on with it.
//!
//! `ingress` gives up what it does not know at sight by a tail call to `arrival`, so that plain
//! packets pay for nothing of this. What follows is a tail call further, which has the verifier
//! begin afresh: `steer_v4` and `steer_v6` are `ingress` again, with all that `arrival` may have found,
//! and with what opens translated flows, or has to know its client's class, for which `ingress` leaves
//! plain packets to them, too.

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use canary_ebpf_common::{
    abi::{
        FragmentKey, FragmentRoute, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP,
        NetworkV6, Reason, ReasonVerdict, TableKey,
    },
    class::ClassEntry,
    extension::{self, Stray},
    headers::{
        ETH_BYTES, ETHERTYPE_IPV4_BE, ETHERTYPE_IPV6_BE, Eth, Frame as _, Ipv4, Ipv6, Tcp, Udp,
        is_tag,
    },
};

use crate::{
    forward::Transport,
    fragment, ipv4, ipv6,
    maps::{self, Program},
    packet::Packet,
    vlan,
};

/// What was found out about the packet at hand, for the program that goes on with it.
#[repr(C)]
pub(crate) struct Arrival {
    /// The tags that it came with, as they stood in the frame.
    pub(crate) tags: u64,
    /// How many bytes they are.
    pub(crate) tag_bytes: u32,
    /// Their word, as in [`canary_ebpf_common::abi::vlan`].
    pub(crate) vlan: u32,
    /// The way that it came by, as in [`canary_ebpf_common::abi::Flow::way`]; 0 for none.
    pub(crate) way: u32,
    /// IPv6: where the transport header is, or the payload of a later fragment.
    pub(crate) transport: u32,
    /// IPv6: what is there.
    pub(crate) protocol: u32,
    /// 1 in a fragment.
    pub(crate) fragment: u32,
    /// First fragments: 1 if a service has their protocol at the address.
    pub(crate) served: u32,
    /// IPv6: where the fragment header is.
    pub(crate) fragment_at: u32,
    /// Packets that are wrapped: how, as `tunnel` says. Those whose senders are told: of what, as
    /// `answer` says.
    pub(crate) wrapping: u32,
    /// Packets that are wrapped: what differs from flow to flow.
    pub(crate) entropy: u32,
    /// Where the transport header is of packets that are wrapped, and of SYNs whose MSS may have to
    /// be lowered; 0 in other frames that are sent.
    pub(crate) header: u32,
    /// Clients of a class that has changed: the entry of what is older, as `route` says; else 0.
    pub(crate) older: u32,
    /// The entry that it is steered by, if it is refused rather than sent elsewhere for want of room;
    /// else 0.
    pub(crate) guard: u32,
    /// Its client's class as it was found, however that was: for the verifier, whatever is read
    /// here is alike.
    pub(crate) class: ClassEntry,
    /// What classes are looked up by: here, there is room for it.
    pub(crate) client: NetworkV6,
    /// What their tables are looked up by.
    pub(crate) table: TableKey,
    /// What the fragment has in common with others, as it came.
    pub(crate) key: FragmentKey,
    /// Where it goes, if it is a first fragment or gets tags.
    pub(crate) route: FragmentRoute,
}

impl Arrival {
    /// Of a packet that has come by this interface, as long as nothing is found out about it.
    #[inline(always)]
    fn begin(&mut self, ifindex: u32) {
        self.forget();
        self.way = ifindex;
        self.fragment_at = 0;
        self.header = 0;
    }

    /// Of a packet that came plain.
    #[inline(always)]
    pub(crate) fn forget(&mut self) {
        self.tags = 0;
        self.tag_bytes = 0;
        self.vlan = 0;
        self.fragment = 0;
    }
}

/// Largest offset of an IPv6 packet's transport header, and all bits below it.
pub(crate) const TRANSPORT_MASK: usize = 0x3ff;
const _: () = assert!(
    ETH_BYTES + size_of::<Ipv6>() + extension::MOST_BYTES + size_of::<extension::Fragment>()
        <= TRANSPORT_MASK
);

/// Sorts what `ingress` does not know at sight.
#[xdp]
#[inline(always)]
pub(crate) fn arrival(ctx: XdpContext) -> u32 {
    let packet = Packet::of(ctx.ctx);
    match try_arrival(&packet) {
        Ok(action) => action,
        Err(reason) => leave(&packet, reason),
    }
}

/// `ingress` for IPv4 packets that `arrival` has looked at. Families have programs of their own: the
/// stack has no room for both.
#[xdp]
#[inline(always)]
pub(crate) fn steer_v4(ctx: XdpContext) -> u32 {
    let packet = Packet::of(ctx.ctx);
    steered(&packet, ipv4::ingress::<true>(&packet))
}

/// The same for IPv6.
#[xdp]
#[inline(always)]
pub(crate) fn steer_v6(ctx: XdpContext) -> u32 {
    let packet = Packet::of(ctx.ctx);
    steered(&packet, ipv6::ingress::<true>(&packet))
}

/// Leaves a plain packet to `steer_v4` or `steer_v6`, for what few packets need: the others would
/// pay for it, since it would be in their way and keep room on the stack.
#[inline(always)]
pub(crate) fn steer_there(
    packet: &Packet,
    transport: &Transport,
    program: Program,
) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::PassOther)?;
    arrival.begin(packet.ifindex);
    arrival.transport = transport.offset as u32;
    arrival.protocol = u32::from(transport.segment.protocol);
    packet.go_on(program)
}

#[inline(always)]
fn steered(packet: &Packet, result: Result<u32, Reason>) -> u32 {
    match result {
        Ok(action) => action,
        Err(reason) => {
            if matches!(reason.verdict(), ReasonVerdict::Pass) {
                fragment::keep_passed();
            }
            leave(packet, reason)
        }
    }
}

/// Counts a packet that is not sent, and gives it back its tags if it passes.
#[inline(always)]
pub(crate) fn leave(packet: &Packet, reason: Reason) -> u32 {
    let action = maps::count(reason);
    if matches!(reason.verdict(), ReasonVerdict::Drop) {
        return action;
    }
    match maps::arrival().and_then(|arrival| vlan::restore(packet.ctx, arrival)) {
        Some(()) => action,
        None => xdp_action::XDP_DROP,
    }
}

#[inline(always)]
fn try_arrival(packet: &Packet) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::PassOther)?;
    arrival.begin(packet.ifindex);
    let eth: *mut Eth = packet.at(0).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let (group, mut ethertype_be) = unsafe { ((*eth).addresses[0] & 1, (*eth).ethertype_be) };
    if group != 0 {
        return Ok(xdp_action::XDP_PASS);
    }
    if !maps::for_this_host(packet) {
        return Err(Reason::PassOtherHost);
    }
    if is_tag(ethertype_be) {
        ethertype_be = untag(packet, arrival)?;
        // Where the frame begins has changed.
        return by_type(&Packet::of(packet.ctx), arrival, ethertype_be);
    }
    by_type(packet, arrival, ethertype_be)
}

/// Takes off tags that IP is behind.
#[inline(always)]
fn untag(packet: &Packet, arrival: &mut Arrival) -> Result<u16, Reason> {
    let found = vlan::read(packet, arrival);
    let bytes = arrival.tag_bytes;
    // Nothing has been taken off that would have to be given back.
    arrival.tag_bytes = 0;
    let ethertype_be = found?;
    if ethertype_be != ETHERTYPE_IPV4_BE && ethertype_be != ETHERTYPE_IPV6_BE {
        return Err(Reason::PassOther);
    }
    vlan::pop(packet, bytes).ok_or(Reason::PassOther)?;
    arrival.tag_bytes = bytes;
    // A tag without a VLAN says what priority a frame has, and no more.
    if arrival.vlan != 0 {
        arrival.way = maps::tagged_way(packet.ifindex, arrival.vlan);
    }
    Ok(ethertype_be)
}

#[inline(always)]
fn by_type(packet: &Packet, arrival: &mut Arrival, ethertype_be: u16) -> Result<u32, Reason> {
    match ethertype_be {
        ETHERTYPE_IPV4_BE => v4(packet, arrival),
        ETHERTYPE_IPV6_BE => v6(packet, arrival),
        _ => Err(Reason::PassOther),
    }
}

#[inline(always)]
fn v4(packet: &Packet, arrival: &mut Arrival) -> Result<u32, Reason> {
    let ip: *mut Ipv4 = packet.at(ETH_BYTES).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    if ip.version_ihl >> 4 != 4 {
        return Err(Reason::PassOther);
    }
    let protocol = ip.ttl_protocol[1];
    if ip.fragment_be & Ipv4::FRAGMENT_MASK_BE != 0 {
        arrival.fragment = 1;
        arrival.key.src = [u64::from(ip.src_be), 0];
        arrival.key.dst = [u64::from(ip.dst_be), 0];
        arrival.key.id_be = u32::from(ip.id_be);
        arrival.key.protocol = u32::from(protocol);
        if ip.fragment_be & Ipv4::OFFSET_MASK_BE != 0 {
            return packet.go_on(Program::Fragment);
        }
        let header_bytes = usize::from(ip.version_ihl & 0xf) * 4;
        let held = usize::from(u16::from_be(ip.total_length_be)).saturating_sub(header_bytes);
        let served = maps::serves_v4(ip.dst_be, protocol);
        arrival.served = u32::from(served);
        if too_short(protocol, held) && served {
            return Err(Reason::DropFragmentTiny);
        }
        if served && !fragment::possible(packet, arrival) {
            return Err(Reason::DropMalformed);
        }
    }
    match protocol {
        IPPROTO_TCP | IPPROTO_UDP => packet.go_on(Program::SteerV4),
        // A part of a message says too little.
        IPPROTO_ICMP if arrival.fragment == 0 => packet.go_on(Program::IcmpV4),
        _ => Err(Reason::PassOther),
    }
}

/// Whether `held` bytes do not hold the transport header (RFC 1858, 3; RFC 7112, 5).
#[inline(always)]
fn too_short(protocol: u8, held: usize) -> bool {
    match protocol {
        IPPROTO_TCP => held < size_of::<Tcp>(),
        IPPROTO_UDP => held < size_of::<Udp>(),
        _ => false,
    }
}

#[inline(always)]
fn v6(packet: &Packet, arrival: &mut Arrival) -> Result<u32, Reason> {
    let ip: *mut Ipv6 = packet.at(ETH_BYTES).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    if u32::from_be(ip.version_class_flow_be) >> 28 != 6 {
        return Err(Reason::PassOther);
    }
    let (src, dst) = ([ip.src[0], ip.src[1]], [ip.dst[0], ip.dst[1]]);
    let first = ip.next_header;
    let payload_bytes = usize::from(u16::from_be(ip.payload_length_be));
    // RFC 2675, 2: a jumbogram's length stands in a hop-by-hop option.
    if first == extension::HOP_BY_HOP && payload_bytes == 0 {
        return Err(Reason::PassExtension);
    }
    let start = ETH_BYTES + size_of::<Ipv6>();
    let forget = |at: extension::Transport| {
        arrival.transport = at.offset as u32;
        arrival.protocol = u32::from(at.protocol);
        arrival.fragment_at = at.fragment as u32;
        let arrival: *const Arrival = arrival;
        // SAFETY: fields of a map's element, which nobody else writes. Volatile: or the compiler
        // would know them still.
        unsafe {
            extension::Transport {
                offset: (&raw const (*arrival).transport).read_volatile() as usize & TRANSPORT_MASK,
                protocol: (&raw const (*arrival).protocol).read_volatile() as u8,
                fragment: (&raw const (*arrival).fragment_at).read_volatile() as usize,
            }
        }
    };
    let found = match extension::walk(packet, start, first, forget) {
        Ok(found) => found,
        Err(Stray::Unknown) => return Err(unknown(first)),
        Err(Stray::Short) => return Err(Reason::PassOther),
    };
    arrival.transport = found.offset as u32;
    arrival.protocol = u32::from(found.protocol);
    if found.fragment != 0 {
        let header: *mut extension::Fragment =
            packet.at(found.fragment & TRANSPORT_MASK).ok_or(Reason::PassOther)?;
        // SAFETY: `at` checked the bounds.
        let header = unsafe { &*header };
        arrival.fragment = 1;
        arrival.fragment_at = found.fragment as u32;
        arrival.key.src = src;
        arrival.key.dst = dst;
        arrival.key.id_be = header.id_be;
        arrival.key.protocol = ANY_PROTOCOL;
        if header.offset_more_be & extension::Fragment::OFFSET_MASK_BE != 0 {
            return packet.go_on(Program::Fragment);
        }
        let held = (start + payload_bytes).saturating_sub(found.offset);
        let served = maps::serves_v6(dst, found.protocol);
        arrival.served = u32::from(served);
        if too_short(found.protocol, held) && served {
            return Err(Reason::DropFragmentTiny);
        }
        if served && !fragment::possible(packet, arrival) {
            return Err(Reason::DropMalformed);
        }
    }
    match found.protocol {
        IPPROTO_TCP | IPPROTO_UDP => packet.go_on(Program::SteerV6),
        IPPROTO_ICMPV6 if arrival.fragment == 0 => packet.go_on(Program::IcmpV6),
        _ => Err(Reason::PassOther),
    }
}

/// [`FragmentKey::protocol`] of IPv6.
const ANY_PROTOCOL: u32 = 256;

/// Why what follows an IPv6 header of this type can't be steered.
#[inline(always)]
fn unknown(first: u8) -> Reason {
    use canary_ebpf_common::extension::{
        AUTHENTICATION, DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING,
    };
    match first {
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION => Reason::PassExtension,
        _ => Reason::PassOther,
    }
}
