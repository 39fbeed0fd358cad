//! ICMP and ICMPv6: echo requests to a service's address are answered, and errors about a
//! connection go where the connection's packets go, translated as they are.
//!
//! An error quotes a packet that somebody behind the balancer sent, or the balancer itself in a
//! translated flow. Read backwards it is a packet of the other direction: that one is looked for,
//! and decides. Errors make no entry and keep none alive (RFC 5927: anybody can send them; what
//! a backend makes of a quotation that it did not send is its own matter).
//!
//! Where addresses are translated, the error comes from the address that the other end knows, as
//! all packets do, also one that a router on the way has sent.

use aya_ebpf::{macros::xdp, programs::XdpContext};
use canary_ebpf_common::{
    abi::{
        Flow, FlowKeyV4, FlowKeyV6, IPPROTO_TCP, IPPROTO_UDP, PortPair, Reason, Service, VipKey,
        flow_state,
    },
    answer::{answerable_v4, answerable_v6},
    checksum::Delta,
    entry::BackendIndex,
    extension,
    hash::{bucket, hash_v4, hash_v6},
    headers::{ETH_BYTES, Frame as _, Icmp, Ipv4, Ipv6, Ports, Tcp, Udp},
    icmp::{self, Meaning},
    nat::TupleKey as _,
    steer::{Flows as _, related},
    tunnel::{OUTER_TTL, entropy, folded},
};

use crate::{
    arrival::{self, TRANSPORT_MASK},
    forward,
    maps::{self, FlowsV4, FlowsV6},
    packet::Packet,
    route, tunnel,
};

/// What ICMP has to do with services.
#[xdp]
#[inline(always)]
pub(crate) fn icmp_v4(ctx: XdpContext) -> u32 {
    let packet = Packet::of(ctx.ctx);
    try_v4(&packet).unwrap_or_else(|reason| arrival::leave(&packet, reason))
}

/// The same of ICMPv6.
#[xdp]
#[inline(always)]
pub(crate) fn icmp_v6(ctx: XdpContext) -> u32 {
    let packet = Packet::of(ctx.ctx);
    try_v6(&packet).unwrap_or_else(|reason| arrival::leave(&packet, reason))
}

/// The transport header that is quoted, as far as it is.
struct Quoted {
    offset: usize,
    protocol: u8,
    ports: Ports,
    /// Where the message ends.
    end: usize,
}

impl Quoted {
    /// What is quoted at `offset` of a message that ends at `end`. Eight bytes have to be there
    /// (RFC 792).
    #[inline(always)]
    fn read(packet: &Packet, offset: usize, protocol: u8, end: usize) -> Result<Self, Reason> {
        if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
            return Err(Reason::PassOther);
        }
        // Volatile: or the compiler, which knows that the message ends within the frame, leaves
        // out comparisons that the verifier needs.
        // SAFETY: a reference.
        let end = unsafe { core::ptr::read_volatile(&end) };
        let udp: *mut Udp = packet.at(offset).ok_or(Reason::PassOther)?;
        if offset + size_of::<Udp>() > end {
            return Err(Reason::PassOther);
        }
        // SAFETY: `at` checked the bounds.
        let ports = unsafe { (*udp).ports };
        Ok(Self { offset, protocol, ports, end })
    }

    /// The client's sequence number that a segment acknowledges, if that is quoted.
    #[inline(always)]
    fn acked(&self, packet: &Packet) -> Option<u32> {
        if self.protocol != IPPROTO_TCP || self.offset + size_of::<Tcp>() > self.end {
            return None;
        }
        let tcp: *mut Tcp = packet.at(self.offset)?;
        // SAFETY: `at` checked the bounds.
        Some(u32::from_be(unsafe { (*tcp).ack_be }))
    }

    /// Gives the header the ports that the connection's other side knows; `addresses` is the
    /// change in its pseudo-header. Answers the change of all that it wrote.
    #[inline(always)]
    fn rewrite(&self, packet: &Packet, flow: &Flow, addresses: Delta) -> Result<Delta, Reason> {
        let to = Ports { src_be: flow.dst_port_be, dst_be: flow.src_port_be };
        if self.protocol == IPPROTO_TCP {
            if self.offset + size_of::<Tcp>() <= self.end
                && let Some(tcp) = packet.at::<Tcp>(self.offset)
            {
                // SAFETY: `at` checked the bounds.
                let tcp = unsafe { &mut *tcp };
                let checksum = Some(&mut tcp.checksum);
                return Ok(icmp::requote(&mut tcp.ports, checksum, false, to, addresses));
            }
            let ports: *mut Ports = packet.at(self.offset).ok_or(Reason::PassOther)?;
            // SAFETY: `at` checked the bounds.
            return Ok(icmp::requote(unsafe { &mut *ports }, None, false, to, addresses));
        }
        let udp: *mut Udp = packet.at(self.offset).ok_or(Reason::PassOther)?;
        // SAFETY: `at` checked the bounds.
        let udp = unsafe { &mut *udp };
        Ok(icmp::requote(&mut udp.ports, Some(&mut udp.checksum), true, to, addresses))
    }
}

/// Sends the message along the translated flow that the quoted packet answers.
#[inline(always)]
fn send_along(packet: &Packet, flow: &Flow) -> Result<u32, Reason> {
    let index = BackendIndex::new(flow.backend);
    if flow.state & flow_state::REVERSE != 0 {
        forward::count_returned::<true>(packet, index);
        return forward::send::<true>(packet, forward::back(flow));
    }
    let backend = forward::usable_for_flow(index)?;
    forward::count_sent::<true>(packet, index, false);
    forward::send::<true>(packet, forward::to(index, backend))
}

/// Sends the message to a backend of a service that does not translate, beside its connection's
/// packets.
#[inline(always)]
fn send_to(
    packet: &Packet,
    service: &Service,
    index: BackendIndex,
    entropy: u32,
) -> Result<u32, Reason> {
    if tunnel::wraps(service) {
        return tunnel::carry(packet, index, tunnel::is_gue(service), entropy);
    }
    let backend = forward::usable(index)?;
    forward::count_sent::<true>(packet, index, false);
    forward::send::<true>(packet, forward::to(index, backend))
}

/// Whether the flow's backend takes packets. Asked before anything is written: what it does not
/// take passes as it came.
#[inline(always)]
fn reachable(flow: &Flow) -> Result<(), Reason> {
    if flow.state & flow_state::REVERSE != 0 {
        return Ok(());
    }
    forward::usable_for_flow(BackendIndex::new(flow.backend)).map(|_| ())
}

/// Sends the message, whose addresses have changed places already, back to where it came from.
#[inline(always)]
fn answer(packet: &Packet, reason: Reason) -> Result<u32, Reason> {
    let eth = forward::way_back(packet).ok_or(Reason::PassOther)?;
    let vlan = maps::arrival().map_or(0, |arrival| arrival.vlan);
    maps::count(reason);
    let way = forward::Way {
        eth: &eth,
        ifindex: packet.ifindex,
        vlan,
        backend: BackendIndex::NONE,
        returned: true,
        clamp: 0,
    };
    forward::send::<true>(packet, way)
}

/// Whether the packet, which says that it ends at `end`, holds a message's header at `offset`.
#[inline(always)]
fn well_formed(packet: &Packet, offset: usize, end: usize) -> bool {
    offset + size_of::<Icmp>() <= end && end <= packet.len_bytes()
}

#[inline(always)]
fn try_v4(packet: &Packet) -> Result<u32, Reason> {
    let ip: *mut Ipv4 = packet.at(ETH_BYTES).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let header_bytes = usize::from(ip.version_ihl & 0xf) * 4;
    let end = ETH_BYTES + usize::from(u16::from_be(ip.total_length_be));
    let offset = ETH_BYTES + header_bytes;
    let message: *mut Icmp = packet.at(offset).ok_or(Reason::PassOther)?;
    if header_bytes < size_of::<Ipv4>() || !well_formed(packet, offset, end) {
        return Err(Reason::PassOther);
    }
    // SAFETY: `at` checked the bounds.
    let message = unsafe { &mut *message };
    match icmp::meaning_v4(message.kind, message.code) {
        Meaning::Echo => echo_v4(packet, ip, message),
        Meaning::Error => error_v4(packet, ip, message, offset + size_of::<Icmp>(), end),
        Meaning::Other => Err(Reason::PassOther),
    }
}

/// Options may say which way an answer has to take (RFC 1122, 3.2.2.6): the host sees to those.
#[inline(always)]
fn echo_v4(packet: &Packet, ip: &mut Ipv4, message: &mut Icmp) -> Result<u32, Reason> {
    if ip.version_ihl != 0x45 || !answerable_v4(ip.src_be) || maps::any_v4(ip.dst_be).is_none() {
        return Err(Reason::PassOther);
    }
    if ip.src_be == ip.dst_be {
        return Err(Reason::DropLand);
    }
    let kind = u16::from_ne_bytes([message.kind, message.code]);
    message.kind = icmp::ECHO_REPLY_V4;
    let reply = u16::from_ne_bytes([message.kind, message.code]);
    message.checksum = Delta::ZERO.replace_half(kind, reply).apply(message.checksum);
    (ip.src_be, ip.dst_be) = (ip.dst_be, ip.src_be);
    let before = u16::from_ne_bytes(ip.ttl_protocol);
    let after = u16::from_ne_bytes([OUTER_TTL, ip.ttl_protocol[1]]);
    ip.ttl_protocol = after.to_ne_bytes();
    ip.checksum = Delta::ZERO.replace_half(before, after).apply(ip.checksum);
    answer(packet, Reason::AnswerEcho)
}

#[inline(always)]
fn error_v4(
    packet: &Packet,
    ip: &mut Ipv4,
    message: &mut Icmp,
    at: usize,
    end: usize,
) -> Result<u32, Reason> {
    let quote: *mut Ipv4 = packet.at(at).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let quote = unsafe { &mut *quote };
    let header_bytes = usize::from(quote.version_ihl & 0xf) * 4;
    // An error goes to who sent what it is about. Later fragments hold no ports.
    if quote.version_ihl >> 4 != 4
        || header_bytes < size_of::<Ipv4>()
        || quote.fragment_be & Ipv4::OFFSET_MASK_BE != 0
        || quote.src_be != ip.dst_be
    {
        return Err(Reason::PassOther);
    }
    let protocol = quote.ttl_protocol[1];
    let quoted = Quoted::read(packet, at + header_bytes, protocol, end)?;
    let Ports { src_be: vip_port_be, dst_be: client_port_be } = quoted.ports;
    let key = FlowKeyV4 {
        src_be: quote.dst_be,
        dst_be: quote.src_be,
        ports: PortPair::new(client_port_be, vip_port_be),
        protocol: u32::from(protocol),
    };
    if maps::nat_ports().count != 0 {
        let flow = FlowsV4.lookup(&key);
        if !flow.is_null() {
            // SAFETY: not null, so valid by the contract of `Flows`.
            let flow = unsafe { &*flow };
            if flow.state & (flow_state::NAT | flow_state::REVERSE) != 0 {
                return translate_v4(packet, ip, message, quote, &quoted, flow);
            }
        }
    }
    let vip = VipKey::v4(quote.src_be, vip_port_be, protocol);
    let service = maps::service_v4(vip).ok_or(Reason::PassOther)?;
    if forward::translates(service) {
        return Err(Reason::PassNoFlow);
    }
    let service = route::followed_v4(service, &key)?;
    let hash = hash_v4(service, key.src_be, key.dst_be, client_port_be, vip_port_be, protocol);
    let entry =
        maps::entry(service.first_page, bucket(service, hash)).ok_or(Reason::DropNoBackend)?;
    let entry = route::with_older::<true>(entry);
    let index = related(&FlowsV4, service, entry, &key, protocol, quoted.acked(packet));
    send_to(packet, service, index, entropy(key.src_be, client_port_be, vip_port_be))
}

#[inline(always)]
fn translate_v4(
    packet: &Packet,
    ip: &mut Ipv4,
    message: &mut Icmp,
    quote: &mut Ipv4,
    quoted: &Quoted,
    flow: &Flow,
) -> Result<u32, Reason> {
    if ip.ttl_protocol[0] <= 1 {
        return Err(Reason::DropTtlExpired);
    }
    reachable(flow)?;
    let (src_be, dst_be) = (flow.src[0] as u32, flow.dst[0] as u32);
    let addresses = Delta::ZERO.replace(quote.src_be, dst_be).replace(quote.dst_be, src_be);
    let change = quoted.rewrite(packet, flow, addresses)?;
    let was = quote.checksum;
    quote.src_be = dst_be;
    quote.dst_be = src_be;
    quote.checksum = addresses.apply(was);
    let change = change.and(addresses).replace_half(was, quote.checksum);
    message.checksum = change.apply(message.checksum);

    let addresses = Delta::ZERO.replace(ip.src_be, src_be).replace(ip.dst_be, dst_be);
    let hop = ip.one_hop_less();
    ip.src_be = src_be;
    ip.dst_be = dst_be;
    ip.checksum = addresses.and(hop).apply(ip.checksum);
    send_along(packet, flow)
}

#[inline(always)]
fn try_v6(packet: &Packet) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::PassOther)?;
    let offset = arrival.transport as usize & TRANSPORT_MASK;
    let ip: *mut Ipv6 = packet.at(ETH_BYTES).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let end = ETH_BYTES + size_of::<Ipv6>() + usize::from(u16::from_be(ip.payload_length_be));
    let message: *mut Icmp = packet.at(offset).ok_or(Reason::PassOther)?;
    if !well_formed(packet, offset, end) {
        return Err(Reason::PassOther);
    }
    // SAFETY: `at` checked the bounds.
    let message = unsafe { &mut *message };
    match icmp::meaning_v6(message.kind, message.code) {
        Meaning::Echo if offset == ETH_BYTES + size_of::<Ipv6>() => echo_v6(packet, ip, message),
        Meaning::Error => error_v6(packet, ip, message, offset + size_of::<Icmp>(), end),
        _ => Err(Reason::PassOther),
    }
}

#[inline(always)]
fn echo_v6(packet: &Packet, ip: &mut Ipv6, message: &mut Icmp) -> Result<u32, Reason> {
    let (src, dst) = ([ip.src[0], ip.src[1]], [ip.dst[0], ip.dst[1]]);
    if !answerable_v6(src) || maps::any_v6(dst).is_none() {
        return Err(Reason::PassOther);
    }
    if (src[0] ^ dst[0]) | (src[1] ^ dst[1]) == 0 {
        return Err(Reason::DropLand);
    }
    let kind = u16::from_ne_bytes([message.kind, message.code]);
    message.kind = icmp::ECHO_REPLY_V6;
    let reply = u16::from_ne_bytes([message.kind, message.code]);
    message.checksum = Delta::ZERO.replace_half(kind, reply).apply(message.checksum);
    ip.src = dst;
    ip.dst = src;
    ip.hop_limit = OUTER_TTL;
    answer(packet, Reason::AnswerEcho)
}

#[inline(always)]
fn error_v6(
    packet: &Packet,
    ip: &mut Ipv6,
    message: &mut Icmp,
    at: usize,
    end: usize,
) -> Result<u32, Reason> {
    let quote: *mut Ipv6 = packet.at(at).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let quote = unsafe { &mut *quote };
    let (src, dst) = ([quote.src[0], quote.src[1]], [quote.dst[0], quote.dst[1]]);
    if u32::from_be(quote.version_class_flow_be) >> 28 != 6
        || (src[0] ^ ip.dst[0]) | (src[1] ^ ip.dst[1]) != 0
    {
        return Err(Reason::PassOther);
    }
    let (protocol, offset) = quoted_v6(packet, at, quote.next_header)?;
    let quoted = Quoted::read(packet, offset, protocol, end)?;
    let Ports { src_be: vip_port_be, dst_be: client_port_be } = quoted.ports;
    let key = FlowKeyV6::tuple(dst, src, client_port_be, vip_port_be, protocol);
    if maps::nat_ports().count != 0 {
        let flow = FlowsV6.lookup(&key);
        if !flow.is_null() {
            // SAFETY: not null, so valid by the contract of `Flows`.
            let flow = unsafe { &*flow };
            if flow.state & (flow_state::NAT | flow_state::REVERSE) != 0 {
                return translate_v6(packet, ip, message, quote, &quoted, flow);
            }
        }
    }
    let vip = VipKey::v6(vip_port_be, protocol);
    let service = maps::service_v6(src, vip).ok_or(Reason::PassOther)?;
    if forward::translates(service) {
        return Err(Reason::PassNoFlow);
    }
    let service = route::client_v6(service, dst, src, client_port_be, vip_port_be, protocol)?;
    let hash = hash_v6(service, dst, src, client_port_be, vip_port_be, protocol);
    let entry =
        maps::entry(service.first_page, bucket(service, hash)).ok_or(Reason::DropNoBackend)?;
    let entry = route::with_older::<true>(entry);
    let index = related(&FlowsV6, service, entry, &key, protocol, quoted.acked(packet));
    send_to(packet, service, index, entropy(folded(dst), client_port_be, vip_port_be))
}

/// The transport protocol of the packet that is quoted at `at`, and where its header is. What a
/// server sends has no extension headers but that of a first fragment.
#[inline(always)]
fn quoted_v6(packet: &Packet, at: usize, next_header: u8) -> Result<(u8, usize), Reason> {
    let offset = at + size_of::<Ipv6>();
    if next_header != extension::FRAGMENT {
        return Ok((next_header, offset));
    }
    let header: *mut extension::Fragment = packet.at(offset).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*header };
    if header.offset_more_be & extension::Fragment::OFFSET_MASK_BE != 0 {
        return Err(Reason::PassOther);
    }
    Ok((header.next_header, offset + size_of::<extension::Fragment>()))
}

#[inline(always)]
fn translate_v6(
    packet: &Packet,
    ip: &mut Ipv6,
    message: &mut Icmp,
    quote: &mut Ipv6,
    quoted: &Quoted,
    flow: &Flow,
) -> Result<u32, Reason> {
    if ip.hop_limit <= 1 {
        return Err(Reason::DropTtlExpired);
    }
    reachable(flow)?;
    let (src, dst) = ([flow.src[0], flow.src[1]], [flow.dst[0], flow.dst[1]]);
    let addresses = Delta::ZERO.replace_address(quote.src, dst).replace_address(quote.dst, src);
    let change = quoted.rewrite(packet, flow, addresses)?.and(addresses);
    quote.src = dst;
    quote.dst = src;
    let change = change.replace_address(ip.src, src).replace_address(ip.dst, dst);
    message.checksum = change.apply(message.checksum);
    ip.hop_limit -= 1;
    ip.src = src;
    ip.dst = dst;
    send_along(packet, flow)
}
