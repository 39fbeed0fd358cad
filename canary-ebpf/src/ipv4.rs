//! IPv4: from the header to a decision, and the header's rewriting.

use core::hint::cold_path;

use canary_ebpf_common::{
    abi::{
        Flow, FlowKeyV4, IPPROTO_TCP, IPPROTO_UDP, PortPair, Reason, Service, VipKey, flow_state,
    },
    checksum::Delta,
    entry::{BackendIndex, Entry},
    hash::{bucket, hash_v4},
    headers::{ETH_BYTES, Frame as _, Ipv4},
    nat::{self, Step, TupleKey as _},
    ports::{self, Client},
    steer::{Flows as _, steer},
};

use crate::{
    answer, arrival,
    forward::{self, Transport, Way},
    maps::{self, FlowsV4, Program},
    packet::Packet,
    route, signals, tunnel,
};

#[inline(always)]
pub(crate) fn ingress<const RARE: bool>(packet: &Packet) -> Result<u32, Reason> {
    let ip: *mut Ipv4 = packet.at(ETH_BYTES).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    let protocol = ip.ttl_protocol[1];
    if !RARE
        && (ip.version_ihl >> 4 != 4
            || (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP)
            || ip.fragment_be & Ipv4::FRAGMENT_MASK_BE != 0)
    {
        cold_path();
        return packet.go_on(Program::Arrival);
    }
    let header_bytes = usize::from(ip.version_ihl & 0xf) * 4;
    let transport =
        Transport::read(packet, ETH_BYTES + header_bytes, protocol).ok_or(Reason::PassOther)?;
    forward::note_syn::<RARE>(&transport);
    if forward::may_be_returned(transport.dst_port_be)
        && let Some(action) = returned::<RARE>(packet, ip, &transport)
    {
        return action;
    }
    let vip = VipKey::v4(ip.dst_be, transport.dst_port_be, protocol);
    let service = maps::service_v4(vip).ok_or(Reason::PassNoService)?;

    if !well_formed::<RARE>(packet, ip, &transport) {
        cold_path();
        return Err(Reason::DropMalformed);
    }
    if ip.src_be == ip.dst_be {
        cold_path();
        return Err(Reason::DropLand);
    }
    if !transport.segment.possible() {
        cold_path();
        return Err(Reason::DropTcpFlags);
    }
    let key = FlowKeyV4 {
        src_be: ip.src_be,
        dst_be: ip.dst_be,
        ports: PortPair::new(transport.src_port_be, transport.dst_port_be),
        protocol: u32::from(protocol),
    };
    let service = if RARE { route::followed_v4(service, &key)? } else { service };
    signals::note_v4::<RARE>(service, &transport);
    if forward::translates(service) {
        return translate::<RARE>(packet, ip, &transport, service, &key);
    }
    let entry = if !RARE && route::concerns_v4(service, ip.src_be) {
        cold_path();
        let hash = hashed(service, ip, &transport);
        let Some(entry) = route::known_v4(service, ip.src_be, hash) else {
            return arrival::steer_there(packet, &transport, Program::SteerV4);
        };
        entry
    } else {
        bucket_entry(service, ip, &transport)?.1
    };
    let entry = route::with_older::<RARE>(entry);
    // What a payload says costs a look, which few packets need.
    let segment = if entry.tracked() {
        transport.looked_up::<RARE>(packet, service, room(ip))
    } else {
        transport.segment
    };
    route::guard::<RARE>(service, entry, segment);
    let steering = steer(&FlowsV4, service, entry, &key, segment);
    route::admit::<RARE>(steering)?;
    let backend = forward::usable(steering.backend)?;
    if tunnel::wraps(service) {
        cold_path();
        // Before it is wrapped, wherever that is noted.
        let watched = signals::client_v4::<RARE>(packet, service, backend, &transport);
        return tunnel::send::<RARE>(packet, service, steering, &transport, ip.src_be, watched);
    }
    forward::count_sent::<RARE>(packet, steering.backend, steering.opens);
    let watched = signals::client_v4::<RARE>(packet, service, backend, &transport);
    let clamp = forward::clamp::<RARE>(&transport, backend);
    let way = Way { clamp, ..forward::to(steering.backend, backend) };
    let sent = forward::send::<RARE>(packet, way);
    signals::go_on::<RARE>(packet, watched, sent)
}

/// Bytes that the header leaves for what follows it, in a packet whose lengths fit.
#[inline(always)]
fn room(ip: &Ipv4) -> usize {
    usize::from(u16::from_be(ip.total_length_be))
        .wrapping_sub(usize::from(ip.version_ihl & 0xf) * 4)
}

/// Whether the headers' lengths can be, each within the one around it.
#[inline(always)]
fn well_formed<const RARE: bool>(packet: &Packet, ip: &Ipv4, transport: &Transport) -> bool {
    let header_bytes = usize::from(ip.version_ihl & 0xf) * 4;
    let total_bytes = usize::from(u16::from_be(ip.total_length_be));
    header_bytes >= size_of::<Ipv4>()
        && total_bytes >= header_bytes
        && ETH_BYTES + total_bytes <= packet.len_bytes()
        && transport.fits::<RARE>(packet, total_bytes - header_bytes)
}

#[inline(always)]
fn hashed(service: &Service, ip: &Ipv4, transport: &Transport) -> u64 {
    hash_v4(
        service,
        ip.src_be,
        ip.dst_be,
        transport.src_port_be,
        transport.dst_port_be,
        transport.segment.protocol,
    )
}

/// The packet's hash, and the entry of the bucket that it falls into.
#[inline(always)]
fn bucket_entry(
    service: &Service,
    ip: &Ipv4,
    transport: &Transport,
) -> Result<(u64, Entry), Reason> {
    let hash = hashed(service, ip, transport);
    let bucket = bucket(service, hash);
    let entry = maps::entry(service.first_page, bucket).ok_or(Reason::DropNoBackend)?;
    Ok((hash, entry))
}

/// Carries a client's packet of a translated service to its backend.
#[inline(always)]
fn translate<const RARE: bool>(
    packet: &Packet,
    ip: &mut Ipv4,
    transport: &Transport,
    service: &Service,
    key: &FlowKeyV4,
) -> Result<u32, Reason> {
    // Before anything is remembered: a packet that goes nowhere opens no flow.
    if ip.ttl_protocol[0] <= 1 {
        cold_path();
        return answer::expired::<RARE>(packet, false);
    }
    let segment = transport.looked_up::<RARE>(packet, service, room(ip));
    let (flow, opens) = match nat::step(&FlowsV4, service, key, segment, transport.ack(packet)) {
        Step::NoFlow => {
            cold_path();
            return Err(Reason::PassNoFlow);
        }
        Step::Follow(flow) => (flow, false),
        Step::Open if !RARE => {
            cold_path();
            return arrival::steer_there(packet, transport, Program::SteerV4);
        }
        Step::Open => {
            let (hash, entry) = bucket_entry(service, ip, transport)?;
            let backend = forward::usable(entry.current())?;
            let client = Client {
                addr: [u64::from(ip.src_be), 0],
                vip: [u64::from(ip.dst_be), 0],
                port_be: transport.src_port_be,
                vip_port_be: transport.dst_port_be,
                eth: forward::way_back(packet).ok_or(Reason::DropMalformed)?,
                way: forward::way_in::<RARE>(packet)?,
            };
            let opened = ports::open(
                &FlowsV4,
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
        forward::follow_client::<RARE, FlowKeyV4, _>(
            packet,
            &FlowsV4,
            flow,
            transport.segment.protocol,
        )?;
    }
    let index = BackendIndex::new(flow.backend);
    let backend = forward::usable_for_flow(index)?;
    // While the frame is still the client's.
    let watched = signals::translated_v4::<RARE>(packet, service, backend, transport, flow);
    if let Err(reason) = rewrite(packet, ip, transport, flow) {
        cold_path();
        return signals::let_go::<RARE>(watched, reason);
    }
    forward::count_sent::<RARE>(packet, index, opens);
    let clamp = forward::clamp::<RARE>(transport, backend);
    let way = Way { clamp, ..forward::to(index, backend) };
    let sent = forward::send::<RARE>(packet, way);
    signals::go_on::<RARE>(packet, watched, sent)
}

/// Carries a backend's packet of a translated flow to the client; `None` if it belongs to none.
#[inline(always)]
fn returned<const RARE: bool>(
    packet: &Packet,
    ip: &mut Ipv4,
    transport: &Transport,
) -> Option<Result<u32, Reason>> {
    let key = FlowKeyV4::tuple(
        [u64::from(ip.src_be), 0],
        [u64::from(ip.dst_be), 0],
        transport.src_port_be,
        transport.dst_port_be,
        transport.segment.protocol,
    );
    let flow = FlowsV4.lookup(&key);
    if flow.is_null() {
        return None;
    }
    // SAFETY: not null, so valid by the contract of `Flows`.
    let flow = unsafe { &mut *flow };
    if flow.state & flow_state::REVERSE == 0 {
        return None;
    }
    if !well_formed::<RARE>(packet, ip, transport) {
        cold_path();
        return Some(Err(Reason::DropMalformed));
    }
    if !transport.segment.possible() {
        cold_path();
        return Some(Err(Reason::DropTcpFlags));
    }
    if ip.ttl_protocol[0] <= 1 {
        cold_path();
        return Some(answer::expired::<RARE>(packet, false));
    }
    let segment = transport.measured(packet, room(ip));
    nat::returned::<FlowKeyV4, _>(&FlowsV4, flow, segment, transport.ack(packet), FlowsV4.now_ns());
    if let Err(reason) = rewrite(packet, ip, transport, flow) {
        cold_path();
        return Some(Err(reason));
    }
    let index = BackendIndex::new(flow.backend);
    forward::count_returned::<RARE>(packet, index);
    let mut way = forward::back(flow);
    if !RARE
        && transport.is_syn()
        && let Ok(backend) = forward::usable(index)
    {
        cold_path();
        way.clamp = forward::clamp::<RARE>(transport, backend);
    }
    let watched = signals::returned_v4(packet, transport, flow);
    let sent = forward::send::<RARE>(packet, way);
    Some(signals::go_on::<RARE>(packet, watched, sent))
}

/// Gives the packet the addresses and ports of `flow` and takes one from its TTL,
/// which is above 1.
#[inline(always)]
fn rewrite(
    packet: &Packet,
    ip: &mut Ipv4,
    transport: &Transport,
    flow: &Flow,
) -> Result<(), Reason> {
    let (src_be, dst_be) = (flow.src[0] as u32, flow.dst[0] as u32);
    let addresses = Delta::ZERO.replace(ip.src_be, src_be).replace(ip.dst_be, dst_be);
    transport.rewrite(packet, flow, addresses).ok_or(Reason::DropMalformed)?;
    let hop = ip.one_hop_less();
    ip.src_be = src_be;
    ip.dst_be = dst_be;
    ip.checksum = addresses.and(hop).apply(ip.checksum);
    Ok(())
}
