//! Wrapping the frame for its backend, and sending it.

use core::hint::cold_path;

use aya_ebpf::{
    bindings::xdp_md, helpers::generated::bpf_xdp_adjust_head, macros::xdp, programs::XdpContext,
};
use canary_ebpf_common::{
    abi::{Backend, ForwardMode, Reason, Service},
    answer::Trouble,
    entry::BackendIndex,
    headers::{ETH_BYTES, ETHERTYPE_IPV4_BE, ETHERTYPE_IPV6_BE, Eth, Frame as _, Ipv4, Ipv6, Udp},
    steer::Steering,
    tunnel::{self, IPPROTO_IPV4, IPPROTO_IPV6, Inner, entropy},
};

use crate::{
    answer::answer,
    arrival::TRANSPORT_MASK,
    forward::{self, Transport},
    fragment,
    maps::{self, Program},
    packet::Packet,
    signals, vlan,
};

/// Whether a service wraps its packets.
#[inline(always)]
pub(crate) const fn wraps(service: &Service) -> bool {
    let mode = service.flags & ForwardMode::MASK;
    mode == ForwardMode::Ipip as u32 || mode == ForwardMode::Gue as u32
}

/// Whether a service's wrapped packets are behind UDP.
#[inline(always)]
pub(crate) const fn is_gue(service: &Service) -> bool {
    service.flags & ForwardMode::MASK == ForwardMode::Gue as u32
}

/// [`Arrival::wrapping`](crate::arrival::Arrival::wrapping): behind UDP.
const GUE: u32 = 1 << 0;
/// The same: it opens a connection.
const OPENS: u32 = 1 << 1;
/// The same: its sender is not told if it goes nowhere.
const SILENT: u32 = 1 << 2;
/// The same: a SYN.
const SYN: u32 = 1 << 3;

/// Leaves a packet of a service that wraps to the program that carries it to its backend, if it
/// fits: what wraps would have to be verified, and keep room on the stack, wherever a packet is
/// steered. `client` is the client's address in one word.
#[inline(always)]
pub(crate) fn send<const RARE: bool>(
    packet: &Packet,
    service: &Service,
    steering: Steering,
    transport: &Transport,
    client: u32,
    watched: bool,
) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::DropNoBackend)?;
    if !RARE {
        arrival.forget();
    }
    arrival.wrapping = if is_gue(service) { GUE } else { 0 }
        | if steering.opens { OPENS } else { 0 }
        | if transport.is_syn() { SYN } else { 0 };
    arrival.header = transport.offset as u32;
    // What the packet has in common with others of its flow.
    arrival.entropy = entropy(client, transport.src_port_be, transport.dst_port_be);
    arrival.route.backend = steering.backend.get();
    signals::go_on_before_wrapping::<RARE>(packet, watched);
    maps::tail_call(packet.ctx, Program::Wrap);
    Err(Reason::DropNoBackend)
}

/// The same of a packet whose sender is not told if it goes nowhere, beside those of `entropy`: an
/// error, or a fragment after the first (RFC 1122, 3.2.2).
#[inline(always)]
pub(crate) fn carry(
    packet: &Packet,
    index: BackendIndex,
    gue: bool,
    entropy: u32,
) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::DropNoBackend)?;
    arrival.wrapping = if gue { GUE } else { 0 } | SILENT;
    arrival.entropy = entropy;
    arrival.route.backend = index.get();
    maps::tail_call(packet.ctx, Program::Wrap);
    Err(Reason::DropNoBackend)
}

/// Wraps the frame for its backend and sends it.
#[xdp]
#[inline(always)]
pub(crate) fn wrap(ctx: XdpContext) -> u32 {
    match try_wrap(ctx.ctx) {
        Ok(action) => action,
        Err(reason) => maps::count(reason),
    }
}

#[inline(always)]
fn try_wrap(ctx: *mut xdp_md) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::DropNoBackend)?;
    let wrapping = arrival.wrapping;
    let index = BackendIndex::new(arrival.route.backend);
    let backend = forward::usable(index)?;
    let packet = Packet::of(ctx);
    let eth: *mut Eth = packet.at(0).ok_or(Reason::DropMalformed)?;
    // SAFETY: `at` checked the bounds.
    let v6 = unsafe { (*eth).ethertype_be } == ETHERTYPE_IPV6_BE;
    let entropy = arrival.entropy;
    let entering = if v6 {
        enter_v6(&packet, backend.inner_mtu, entropy)
    } else {
        enter_v4(&packet, backend.inner_mtu, entropy)
    };
    let inner = match entering {
        Ok(inner) => inner,
        Err(Reason::DropTtlExpired) if wrapping & SILENT == 0 => {
            return answer(&packet, v6, Trouble::Expired, 0);
        }
        Err(Reason::DropTooBig) if wrapping & SILENT == 0 => {
            return answer(&packet, v6, Trouble::TooBig, backend.inner_mtu);
        }
        Err(reason) => return Err(reason),
    };
    let arrived_bytes = packet.len_bytes() as u64 + u64::from(arrival.tag_bytes);
    forward::count(index, arrived_bytes, wrapping & OPENS != 0);
    if wrapping & SYN != 0 {
        packet.clamp(arrival.header as usize & TRANSPORT_MASK, backend.mss);
    }
    let gue = wrapping & GUE != 0;
    fragment::keep_wrapped(&packet, arrival, gue).ok_or(Reason::DropMalformed)?;
    // What gives it tags would keep the way of the outer packet.
    arrival.fragment = 0;
    let wrapped = match (backend.is_v6(), gue) {
        (false, false) => v4_outside::<false>(ctx, backend, inner),
        (false, true) => v4_outside::<true>(ctx, backend, inner),
        (true, false) => v6_outside::<false>(ctx, backend, inner),
        (true, true) => v6_outside::<true>(ctx, backend, inner),
    }?;
    forward::set_addresses(&wrapped, &backend.eth).ok_or(Reason::DropMalformed)?;
    // The MSS is lowered by now, and what came with it is noted in any case.
    arrival.header = 0;
    let way = forward::to(index, backend);
    if way.vlan != 0 {
        cold_path();
        return vlan::send::<true>(&wrapped, way);
    }
    forward::off(&wrapped, way.ifindex)
}

/// An IPv4 packet on its way into a tunnel that takes `most` bytes: it is forwarded into it
/// (RFC 2003, 3.1).
#[inline(always)]
fn enter_v4(packet: &Packet, most: u16, entropy: u32) -> Result<Inner, Reason> {
    let ip: *mut Ipv4 = packet.at(ETH_BYTES).ok_or(Reason::DropMalformed)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let len_bytes = u16::from_be(ip.total_length_be);
    if ip.ttl_protocol[0] <= 1 {
        return Err(Reason::DropTtlExpired);
    }
    if len_bytes > most {
        return Err(Reason::DropTooBig);
    }
    ip.checksum = ip.one_hop_less().apply(ip.checksum);
    Ok(Inner { len_bytes, protocol: IPPROTO_IPV4, tos: ip.tos, entropy })
}

/// The same of IPv6 (RFC 2473, 3.1).
#[inline(always)]
fn enter_v6(packet: &Packet, most: u16, entropy: u32) -> Result<Inner, Reason> {
    let ip: *mut Ipv6 = packet.at(ETH_BYTES).ok_or(Reason::DropMalformed)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let payload_bytes = u16::from_be(ip.payload_length_be);
    if ip.hop_limit <= 1 {
        return Err(Reason::DropTtlExpired);
    }
    if payload_bytes > most.saturating_sub(size_of::<Ipv6>() as u16) {
        return Err(Reason::DropTooBig);
    }
    ip.hop_limit -= 1;
    let tos = (u32::from_be(ip.version_class_flow_be) >> 20) as u8;
    let len_bytes = payload_bytes + size_of::<Ipv6>() as u16;
    Ok(Inner { len_bytes, protocol: IPPROTO_IPV6, tos, entropy })
}

/// The frame with `bytes` more in front; what it held is gone for the verifier.
#[inline(always)]
fn grown(ctx: *mut xdp_md, bytes: usize) -> Result<Packet, Reason> {
    // SAFETY: `ctx` is this program's own; pointers into the frame are not used any more.
    if unsafe { bpf_xdp_adjust_head(ctx, -(bytes as i32)) } != 0 {
        return Err(Reason::DropNoHeadroom);
    }
    Ok(Packet::of(ctx))
}

#[inline(always)]
fn put<T>(packet: &Packet, offset: usize, header: T) -> Result<(), Reason> {
    let to: *mut T = packet.at(offset).ok_or(Reason::DropMalformed)?;
    // SAFETY: `at` checked the bounds.
    unsafe { *to = header };
    Ok(())
}

#[inline(always)]
fn v4_outside<const GUE: bool>(
    ctx: *mut xdp_md,
    backend: &Backend,
    inner: Inner,
) -> Result<Packet, Reason> {
    let bytes = tunnel::overhead_bytes(false, GUE);
    let packet = grown(ctx, usize::from(bytes))?;
    forward::set_ethertype(&packet, ETHERTYPE_IPV4_BE).ok_or(Reason::DropMalformed)?;
    let protocol = tunnel::outer_protocol(GUE, inner.protocol);
    let sum = backend.outer_sum[usize::from(inner.protocol == IPPROTO_IPV6)];
    let header = tunnel::outer_v4(backend, sum, protocol, inner.len_bytes + bytes, inner);
    put(&packet, ETH_BYTES, header)?;
    if GUE {
        put(&packet, ETH_BYTES + size_of::<Ipv4>(), tunnel::outer_udp(backend, inner))?;
    }
    Ok(packet)
}

#[inline(always)]
fn v6_outside<const GUE: bool>(
    ctx: *mut xdp_md,
    backend: &Backend,
    inner: Inner,
) -> Result<Packet, Reason> {
    let bytes = usize::from(tunnel::overhead_bytes(true, GUE));
    let packet = grown(ctx, bytes)?;
    forward::set_ethertype(&packet, ETHERTYPE_IPV6_BE).ok_or(Reason::DropMalformed)?;
    let protocol = tunnel::outer_protocol(GUE, inner.protocol);
    let payload_bytes = inner.len_bytes + if GUE { size_of::<Udp>() as u16 } else { 0 };
    put(&packet, ETH_BYTES, tunnel::outer_v6(backend, protocol, payload_bytes, inner))?;
    if GUE {
        put(&packet, ETH_BYTES + size_of::<Ipv6>(), tunnel::outer_udp(backend, inner))?;
    }
    Ok(packet)
}
