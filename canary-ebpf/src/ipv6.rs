//! IPv6: from the header to a decision, and the header's rewriting.

use canary_ebpf_common::{
    abi::{Flow, FlowKeyV6, IPPROTO_TCP, IPPROTO_UDP, Reason, Service, VipKey, flow_state},
    checksum::Delta,
    entry::{BackendIndex, Entry},
    hash::{bucket, hash_v6},
    headers::{ETH_BYTES, Frame as _, Ipv6},
    nat::{self, Step, TupleKey as _},
    ports::{self, Client},
    steer::{Flows as _, steer},
};

use crate::{
    forward::{self, Transport},
    maps::{self, FlowsV6},
    packet::Packet,
};

#[inline(always)]
pub(crate) fn ingress(packet: &Packet) -> Result<u32, Reason> {
    let ip: *mut Ipv6 = packet.at(ETH_BYTES).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let protocol = ip.next_header;
    // Word by word: the compiler copies a whole address by a call to a loop over bytes.
    let (src, dst) = ([ip.src[0], ip.src[1]], [ip.dst[0], ip.dst[1]]);
    let version = u32::from_be(ip.version_class_flow_be) >> 28;
    if version != 6 || (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP) {
        return Err(Reason::PassOther);
    }
    let transport = Transport::read(packet, ETH_BYTES + size_of::<Ipv6>(), protocol)
        .ok_or(Reason::PassOther)?;
    if forward::may_be_returned(transport.dst_port_be)
        && let Some(action) = returned(packet, ip, &transport)
    {
        return action;
    }
    let vip = VipKey::v6(transport.dst_port_be, protocol);
    let service = maps::service_v6(dst, vip).ok_or(Reason::PassNoService)?;

    if !well_formed(packet, ip, &transport) {
        return Err(Reason::DropMalformed);
    }
    let key = FlowKeyV6::tuple(src, dst, transport.src_port_be, transport.dst_port_be, protocol);
    if forward::translates(service) {
        return translate(packet, ip, &transport, service, &key);
    }
    let (_, entry) = bucket_entry(service, ip, &transport)?;
    // What a payload says costs a look, which few packets need.
    let segment = if entry.tracked() {
        transport.looked_up(packet, service, room(ip))
    } else {
        transport.segment
    };
    let steering = steer(&FlowsV6, service, entry, &key, segment);
    let backend = forward::usable(steering.backend)?;
    forward::count_sent(packet, steering.backend, steering.opens);
    forward::send(packet, &backend.eth, backend.ifindex)
}

/// Bytes that follow the header, in a packet whose lengths fit.
#[inline(always)]
fn room(ip: &Ipv6) -> usize {
    usize::from(u16::from_be(ip.payload_length_be))
}

/// Whether the headers' lengths can be, each within the one around it.
#[inline(always)]
fn well_formed(packet: &Packet, ip: &Ipv6, transport: &Transport) -> bool {
    ETH_BYTES + size_of::<Ipv6>() + room(ip) <= packet.len_bytes()
        && transport.fits(packet, room(ip))
}

/// The packet's hash, and the entry of the bucket that it falls into.
#[inline(always)]
fn bucket_entry(
    service: &Service,
    ip: &Ipv6,
    transport: &Transport,
) -> Result<(u64, Entry), Reason> {
    let hash = hash_v6(
        service,
        [ip.src[0], ip.src[1]],
        [ip.dst[0], ip.dst[1]],
        transport.src_port_be,
        transport.dst_port_be,
        transport.segment.protocol,
    );
    let entry = maps::entry(service, bucket(service, hash)).ok_or(Reason::DropNoBackend)?;
    Ok((hash, entry))
}

/// Carries a client's packet of a translated service to its backend.
#[inline(always)]
fn translate(
    packet: &Packet,
    ip: &mut Ipv6,
    transport: &Transport,
    service: &Service,
    key: &FlowKeyV6,
) -> Result<u32, Reason> {
    // Before anything is remembered: a packet that goes nowhere opens no flow.
    if ip.hop_limit <= 1 {
        return Err(Reason::DropTtlExpired);
    }
    let segment = transport.looked_up(packet, service, room(ip));
    let (flow, opens) = match nat::step(&FlowsV6, service, key, segment, transport.ack(packet)) {
        Step::NoFlow => return Err(Reason::PassNoFlow),
        Step::Follow(flow) => (flow, false),
        Step::Open => {
            let (hash, entry) = bucket_entry(service, ip, transport)?;
            let backend = forward::usable(entry.current())?;
            let client = Client {
                addr: [ip.src[0], ip.src[1]],
                vip: [ip.dst[0], ip.dst[1]],
                port_be: transport.src_port_be,
                vip_port_be: transport.dst_port_be,
                eth: forward::way_back(packet).ok_or(Reason::DropMalformed)?,
                ifindex: packet.ifindex,
            };
            let opened = ports::open(
                &FlowsV6,
                service,
                entry.current(),
                backend,
                maps::nat_ports(),
                &client,
                key,
                segment,
                hash,
            );
            (forward::count_refused(entry.current(), opened)?, true)
        }
    };
    // SAFETY: `step` and `open` return valid entries.
    let flow = unsafe { &mut *flow };
    if !opens {
        forward::follow_client::<FlowKeyV6, _>(packet, &FlowsV6, flow, transport.segment.protocol)
            .ok_or(Reason::DropMalformed)?;
    }
    let index = BackendIndex::new(flow.backend);
    let backend = forward::usable_for_flow(index)?;
    rewrite(packet, ip, transport, flow)?;
    forward::count_sent(packet, index, opens);
    forward::send(packet, &backend.eth, backend.ifindex)
}

/// Carries a backend's packet of a translated flow to the client; `None` if it belongs to none.
#[inline(always)]
fn returned(packet: &Packet, ip: &mut Ipv6, transport: &Transport) -> Option<Result<u32, Reason>> {
    let key = FlowKeyV6::tuple(
        [ip.src[0], ip.src[1]],
        [ip.dst[0], ip.dst[1]],
        transport.src_port_be,
        transport.dst_port_be,
        transport.segment.protocol,
    );
    let flow = FlowsV6.lookup(&key);
    if flow.is_null() {
        return None;
    }
    // SAFETY: not null, so valid by the contract of `Flows`.
    let flow = unsafe { &mut *flow };
    if flow.state & flow_state::REVERSE == 0 {
        return None;
    }
    if !well_formed(packet, ip, transport) {
        return Some(Err(Reason::DropMalformed));
    }
    if ip.hop_limit <= 1 {
        return Some(Err(Reason::DropTtlExpired));
    }
    let segment = transport.measured(packet, room(ip));
    nat::returned::<FlowKeyV6, _>(&FlowsV6, flow, segment, transport.ack(packet), FlowsV6.now_ns());
    if let Err(reason) = rewrite(packet, ip, transport, flow) {
        return Some(Err(reason));
    }
    forward::count_returned(packet, flow);
    Some(forward::send(packet, &flow.eth, flow.ifindex))
}

/// Gives the packet the addresses and ports of `flow` and takes one from its hop
/// limit, which is above 1.
#[inline(always)]
fn rewrite(
    packet: &Packet,
    ip: &mut Ipv6,
    transport: &Transport,
    flow: &Flow,
) -> Result<(), Reason> {
    let addresses = Delta::ZERO.replace_address(ip.src, flow.src).replace_address(ip.dst, flow.dst);
    transport.rewrite(packet, flow, addresses).ok_or(Reason::DropMalformed)?;
    ip.hop_limit -= 1;
    ip.src = [flow.src[0], flow.src[1]];
    ip.dst = [flow.dst[0], flow.dst[1]];
    Ok(())
}
