//! Fragments: the first one's way is kept, the others follow it.
//!
//! Where no port and no memory decides, a later fragment finds its way by itself, so that any
//! order will do: services that hash the client alone, outside `nat` and of buckets that are not
//! tracked.

use aya_ebpf::{macros::xdp, programs::XdpContext};
use canary_ebpf_common::{
    abi::{
        FlowKeyV4, FragmentKey, FragmentRoute, IPPROTO_TCP, PortPair, Reason, Service,
        fragment as flags,
    },
    entry::BackendIndex,
    extension,
    fragment::{Admission, Stretch, admit, alone, begin},
    hash::{bucket, hash_v4, hash_v6},
    headers::{ETH_BYTES, ETHERTYPE_IPV4_BE, ETHERTYPE_IPV6_BE, Eth, Frame as _, Ipv4, Ipv6, Tcp},
};

use crate::{
    arrival::{self, Arrival, TRANSPORT_MASK},
    forward::{self, Way},
    maps,
    packet::Packet,
    route, tunnel,
};

/// Has fragments after the first follow it.
#[xdp]
#[inline(always)]
pub(crate) fn fragment(ctx: XdpContext) -> u32 {
    let packet = Packet::of(ctx.ctx);
    match try_fragment(&packet) {
        Ok(action) => action,
        Err(reason) => arrival::leave(&packet, reason),
    }
}

/// Whether the packet at hand is a fragment.
#[inline(always)]
pub(crate) fn at_hand() -> bool {
    maps::arrival().is_some_and(|arrival| arrival.fragment != 0)
}

/// Whether there can be such a fragment as that at hand.
#[inline(always)]
pub(crate) fn possible(packet: &Packet, arrival: &Arrival) -> bool {
    stretch(packet, arrival).is_some_and(Stretch::possible)
}

/// What of its datagram the fragment at hand holds.
#[inline(always)]
fn stretch(packet: &Packet, arrival: &Arrival) -> Option<Stretch> {
    if is_v6(packet) { stretch_v6(packet, arrival) } else { stretch_v4(packet) }
}

#[inline(always)]
fn is_v6(packet: &Packet) -> bool {
    // SAFETY: `at` checked the bounds.
    packet.at::<Eth>(0).is_some_and(|eth| unsafe { (*eth).ethertype_be } == ETHERTYPE_IPV6_BE)
}

#[inline(always)]
fn stretch_v4(packet: &Packet) -> Option<Stretch> {
    let ip: *mut Ipv4 = packet.at(ETH_BYTES)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    let fragment = u16::from_be(ip.fragment_be);
    let header_bytes = u32::from(ip.version_ihl & 0xf) * 4;
    Some(Stretch {
        start: u32::from(fragment & 0x1fff),
        bytes: u32::from(u16::from_be(ip.total_length_be)).checked_sub(header_bytes)?,
        more: fragment & 0x2000 != 0,
    })
}

#[inline(always)]
fn stretch_v6(packet: &Packet, arrival: &Arrival) -> Option<Stretch> {
    let ip: *mut Ipv6 = packet.at(ETH_BYTES)?;
    let at = arrival.fragment_at as usize & TRANSPORT_MASK;
    let header: *mut extension::Fragment = packet.at(at)?;
    // SAFETY: `at` checked the bounds.
    let (ip, header) = unsafe { (&*ip, &*header) };
    let end = ETH_BYTES + size_of::<Ipv6>() + usize::from(u16::from_be(ip.payload_length_be));
    let rest = u16::from_be(header.offset_more_be);
    Some(Stretch {
        start: u32::from(rest >> 3),
        bytes: end.checked_sub(at + size_of::<extension::Fragment>())? as u32,
        more: rest & 1 != 0,
    })
}

/// Keeps the way of the packet at hand, if it is a first fragment. It has its last form but for
/// tags.
#[inline(always)]
pub(crate) fn keep(packet: &Packet, arrival: &mut Arrival) -> Option<()> {
    if arrival.fragment == 0 {
        return Some(());
    }
    let stretch = stretch(packet, arrival)?;
    let (src, dst) = addresses(packet)?;
    let Arrival { key, route, .. } = arrival;
    let same = (src[0] ^ key.src[0])
        | (src[1] ^ key.src[1])
        | (dst[0] ^ key.dst[0])
        | (dst[1] ^ key.dst[1]);
    route.src = [src[0], src[1]];
    route.dst = [dst[0], dst[1]];
    let eth: *mut [u32; 3] = packet.at(0)?;
    // SAFETY: `at` checked the bounds.
    route.eth = unsafe { [(*eth)[0], (*eth)[1], (*eth)[2]] };
    route.flags |= if same == 0 { 0 } else { flags::TRANSLATED };
    remember(arrival, stretch)
}

/// Keeps where the packet at hand is carried to, if it is a first fragment. It has its last form but
/// for what it is wrapped in.
#[inline(always)]
pub(crate) fn keep_wrapped(packet: &Packet, arrival: &mut Arrival, gue: bool) -> Option<()> {
    if arrival.fragment == 0 {
        return Some(());
    }
    let stretch = stretch(packet, arrival)?;
    arrival.route.flags = flags::WRAPPED | if gue { flags::GUE } else { 0 };
    arrival.route.src = [u64::from(arrival.entropy), 0];
    remember(arrival, stretch)
}

/// Keeps the way that is noted for the first fragment of a datagram.
#[inline(always)]
fn remember(arrival: &mut Arrival, stretch: Stretch) -> Option<()> {
    let Arrival { key, route, .. } = arrival;
    let [a, b, c, d] = begin(stretch);
    route.seen = [a, b, c, d];
    maps::keep_fragment(key, route);
    Some(())
}

/// Keeps that the packet at hand passes, if it is a first fragment where later ones would not by
/// themselves.
#[inline(always)]
pub(crate) fn keep_passed() {
    let Some(Arrival { fragment: 1, served: 1, key, route, .. }) = maps::arrival() else { return };
    route.flags = flags::PASSED;
    maps::keep_fragment(key, route);
}

/// Source and destination of the packet.
#[inline(always)]
fn addresses(packet: &Packet) -> Option<([u64; 2], [u64; 2])> {
    if is_v6(packet) {
        let ip: *mut Ipv6 = packet.at(ETH_BYTES)?;
        // SAFETY: `at` checked the bounds.
        let ip = unsafe { &*ip };
        return Some(([ip.src[0], ip.src[1]], [ip.dst[0], ip.dst[1]]));
    }
    let ip: *mut Ipv4 = packet.at(ETH_BYTES)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    Some(([u64::from(ip.src_be), 0], [u64::from(ip.dst_be), 0]))
}

#[inline(always)]
fn try_fragment(packet: &Packet) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::PassFragment)?;
    let eth: *mut Eth = packet.at(0).ok_or(Reason::PassFragment)?;
    // SAFETY: `at` checked the bounds.
    match unsafe { (*eth).ethertype_be } {
        ETHERTYPE_IPV4_BE => v4(packet, arrival),
        ETHERTYPE_IPV6_BE => v6(packet, arrival),
        _ => Err(Reason::PassFragment),
    }
}

/// Whether a fragment lies over the transport header (RFC 3128, 3).
#[inline(always)]
const fn over_header(protocol: u8, stretch: Stretch) -> bool {
    protocol == IPPROTO_TCP && stretch.start * 8 < size_of::<Tcp>() as u32
}

#[inline(always)]
fn v4(packet: &Packet, arrival: &Arrival) -> Result<u32, Reason> {
    let ip: *mut Ipv4 = packet.at(ETH_BYTES).ok_or(Reason::PassFragment)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let protocol = ip.ttl_protocol[1];
    let route = maps::fragment_route(&arrival.key);
    let any = maps::any_v4(ip.dst_be).filter(|any| maps::serves(any, protocol));
    let passed = route.as_ref().is_some_and(|route| route.flags & flags::PASSED != 0);
    if passed || route.is_none() && any.is_none() {
        return Err(Reason::PassFragment);
    }
    let held = stretch_v4(packet).filter(|held| held.possible());
    let total_bytes = usize::from(u16::from_be(ip.total_length_be));
    let held = held.ok_or(Reason::DropMalformed)?;
    if ip.version_ihl & 0xf < 5 || ETH_BYTES + total_bytes > packet.len_bytes() {
        return Err(Reason::DropMalformed);
    }
    if over_header(protocol, held) {
        return Err(Reason::DropFragmentTiny);
    }
    let Some(route) = route else {
        let any = any.ok_or(Reason::PassFragment)?;
        if !alone(any) {
            return Err(Reason::DropFragmentEarly);
        }
        // What is hashed of it is the client alone.
        let key = FlowKeyV4 {
            src_be: ip.src_be,
            dst_be: ip.dst_be,
            ports: PortPair::default(),
            protocol: u32::from(protocol),
        };
        let hash = hash_v4(any, ip.src_be, ip.dst_be, 0, 0, protocol);
        return by_itself(packet, route::followed_v4(any, &key)?, hash);
    };
    let whole;
    if route.flags & flags::TRANSLATED != 0 {
        if ip.ttl_protocol[0] <= 1 {
            return Err(Reason::DropTtlExpired);
        }
        whole = follow(route, held)?;
        let (src_be, dst_be) = (route.src[0] as u32, route.dst[0] as u32);
        ip.checksum = ip
            .one_hop_less()
            .replace(ip.src_be, src_be)
            .replace(ip.dst_be, dst_be)
            .apply(ip.checksum);
        ip.src_be = src_be;
        ip.dst_be = dst_be;
    } else {
        whole = follow(route, held)?;
    }
    send(packet, route, whole.then_some(&arrival.key))
}

#[inline(always)]
fn v6(packet: &Packet, arrival: &Arrival) -> Result<u32, Reason> {
    let ip: *mut Ipv6 = packet.at(ETH_BYTES).ok_or(Reason::PassFragment)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let (src, dst) = ([ip.src[0], ip.src[1]], [ip.dst[0], ip.dst[1]]);
    let protocol = arrival.protocol as u8;
    let route = maps::fragment_route(&arrival.key);
    // Which protocol stands behind options, only the first fragment says.
    let served = |any: &&Service| maps::serves(any, protocol) || protocol == extension::DESTINATION;
    let any = maps::any_v6(dst).filter(served);
    let passed = route.as_ref().is_some_and(|route| route.flags & flags::PASSED != 0);
    if passed || route.is_none() && any.is_none() {
        return Err(Reason::PassFragment);
    }
    let held = stretch_v6(packet, arrival).filter(|held| held.possible());
    let held = held.ok_or(Reason::DropMalformed)?;
    let payload_bytes = usize::from(u16::from_be(ip.payload_length_be));
    if ETH_BYTES + size_of::<Ipv6>() + payload_bytes > packet.len_bytes() {
        return Err(Reason::DropMalformed);
    }
    if over_header(protocol, held) {
        return Err(Reason::DropFragmentTiny);
    }
    let Some(route) = route else {
        let any = any.ok_or(Reason::PassFragment)?;
        if !alone(any) {
            return Err(Reason::DropFragmentEarly);
        }
        let hash = hash_v6(any, src, dst, 0, 0, protocol);
        return by_itself(packet, route::client_v6(any, src, dst, 0, 0, protocol)?, hash);
    };
    let whole;
    if route.flags & flags::TRANSLATED != 0 {
        if ip.hop_limit <= 1 {
            return Err(Reason::DropTtlExpired);
        }
        whole = follow(route, held)?;
        ip.hop_limit -= 1;
        ip.src = [route.src[0], route.src[1]];
        ip.dst = [route.dst[0], route.dst[1]];
    } else {
        whole = follow(route, held)?;
    }
    send(packet, route, whole.then_some(&arrival.key))
}

/// Takes the fragment in as one of its datagram. Returns whether nothing of that is missing now.
#[inline(always)]
fn follow(route: &mut FragmentRoute, held: Stretch) -> Result<bool, Reason> {
    match admit(route, held) {
        Admission::Follow => Ok(false),
        Admission::Whole => Ok(true),
        Admission::Overlap => Err(Reason::DropFragmentOverlap),
    }
}

/// Sends the fragment where the first one went, of which `last` is the key if it is the last.
#[inline(always)]
fn send(packet: &Packet, route: &FragmentRoute, last: Option<&FragmentKey>) -> Result<u32, Reason> {
    let FragmentRoute { ifindex, vlan, flags: how, backend, .. } = *route;
    let index = BackendIndex::new(backend);
    let entropy = route.src[0] as u32;
    let returned = how & flags::RETURNED != 0;
    let wrapped = how & flags::WRAPPED != 0;
    if returned {
        forward::count_returned::<true>(packet, index);
    } else if !wrapped {
        forward::usable(index)?;
        forward::count_sent::<true>(packet, index, false);
    }
    if !wrapped {
        forward::set_addresses(packet, &route.eth).ok_or(Reason::DropMalformed)?;
    }
    if let Some(key) = last {
        // What was read of the route is all that is needed: somebody else may have it now.
        maps::forget_fragment(key);
    }
    if wrapped {
        return carry(packet, index, how & flags::GUE != 0, entropy);
    }
    on(packet, Way { eth: &[0; 3], ifindex, vlan, backend: index, returned, clamp: 0 })
}

/// Sends the fragment where its client's bucket says.
#[inline(always)]
fn by_itself(packet: &Packet, any: &Service, hash: u64) -> Result<u32, Reason> {
    let entry = maps::entry(any.first_page, bucket(any, hash)).ok_or(Reason::DropNoBackend)?;
    let entry = route::with_older::<true>(entry);
    if entry.tracked() {
        return Err(Reason::DropFragmentEarly);
    }
    if tunnel::wraps(any) {
        // Its client's fragments have it in common.
        return carry(packet, entry.current(), tunnel::is_gue(any), hash as u32);
    }
    let backend = forward::usable(entry.current())?;
    forward::count_sent::<true>(packet, entry.current(), false);
    let way = forward::to(entry.current(), backend);
    forward::set_addresses(packet, way.eth).ok_or(Reason::DropMalformed)?;
    on(packet, way)
}

/// Wraps a fragment after the first.
#[inline(always)]
fn carry(packet: &Packet, index: BackendIndex, gue: bool, entropy: u32) -> Result<u32, Reason> {
    if let Some(arrival) = maps::arrival() {
        // As below.
        arrival.fragment = 0;
    }
    tunnel::carry(packet, index, gue, entropy)
}

/// Sends a fragment after the first.
#[inline(always)]
fn on(packet: &Packet, way: Way<'_>) -> Result<u32, Reason> {
    if let Some(arrival) = maps::arrival() {
        // Its way is kept already.
        arrival.fragment = 0;
    }
    forward::out::<true>(packet, way)
}
