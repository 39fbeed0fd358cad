//! IPv6: from the header to a decision, and the header's rewriting.

use core::hint::cold_path;

use canary_ebpf_common::{
    abi::{Flow, FlowKeyV6, IPPROTO_TCP, IPPROTO_UDP, Reason, Service, VipKey, flow_state},
    checksum::Delta,
    entry::{BackendIndex, Entry},
    hash::{bucket, hash_v6},
    headers::{ETH_BYTES, Frame as _, Ipv6},
    nat::{self, Step, TupleKey as _},
    ports::{self, Client},
    steer::{Flows as _, steer},
    tunnel::folded,
};

use crate::{
    answer,
    arrival::{self, TRANSPORT_MASK},
    forward::{self, Transport, Way},
    maps::{self, FlowsV6, Program},
    packet::Packet,
    route, signals, tunnel,
};

#[inline(always)]
pub(crate) fn ingress<const RARE: bool>(packet: &Packet) -> Result<u32, Reason> {
    let ip: *mut Ipv6 = packet.at(ETH_BYTES).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &mut *ip };
    // Word by word: the compiler copies a whole address by a call to a loop over bytes.
    let (src, dst) = ([ip.src[0], ip.src[1]], [ip.dst[0], ip.dst[1]]);
    let version = u32::from_be(ip.version_class_flow_be) >> 28;
    let (protocol, offset) = if RARE {
        let arrival = maps::arrival().ok_or(Reason::PassOther)?;
        (arrival.protocol as u8, arrival.transport as usize & TRANSPORT_MASK)
    } else {
        (ip.next_header, ETH_BYTES + size_of::<Ipv6>())
    };
    if !RARE && (version != 6 || (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP)) {
        cold_path();
        return packet.go_on(Program::Arrival);
    }
    let transport = Transport::read(packet, offset, protocol).ok_or(Reason::PassOther)?;
    forward::note_syn::<RARE>(&transport);
    if forward::may_be_returned(transport.dst_port_be)
        && let Some(action) = returned::<RARE>(packet, ip, &transport)
    {
        return action;
    }
    let vip = VipKey::v6(transport.dst_port_be, protocol);
    let service = maps::service_v6(dst, vip).ok_or(Reason::PassNoService)?;
    let service = if RARE {
        route::followed_v6(service, ip, transport.src_port_be, transport.dst_port_be, protocol)?
    } else {
        service
    };

    if !well_formed::<RARE>(packet, ip, &transport) {
        cold_path();
        return Err(Reason::DropMalformed);
    }
    if (src[0] ^ dst[0]) | (src[1] ^ dst[1]) == 0 {
        cold_path();
        return Err(Reason::DropLand);
    }
    if !transport.segment.possible() {
        cold_path();
        return Err(Reason::DropTcpFlags);
    }
    let key = FlowKeyV6::tuple(src, dst, transport.src_port_be, transport.dst_port_be, protocol);
    signals::note_v6::<RARE>(service, &transport);
    if forward::translates(service) {
        return translate::<RARE>(packet, ip, &transport, service, &key);
    }
    let entry = if !RARE && route::concerns_v6(service, src[0]) {
        cold_path();
        let hash = hashed(service, ip, &transport);
        let Some(entry) = route::known_v6(service, src, hash) else {
            return arrival::steer_there(packet, &transport, Program::SteerV6);
        };
        entry
    } else {
        bucket_entry(service, ip, &transport)?.1
    };
    let entry = route::with_older::<RARE>(entry);
    // What a payload says costs a look, which few packets need.
    let segment = if entry.tracked() {
        transport.looked_up::<RARE>(packet, service, room::<RARE>(ip, &transport))
    } else {
        transport.segment
    };
    route::guard::<RARE>(service, entry, segment);
    let steering = steer(&FlowsV6, service, entry, &key, segment);
    route::admit::<RARE>(steering)?;
    let backend = forward::usable(steering.backend)?;
    if tunnel::wraps(service) {
        cold_path();
        // Before it is wrapped, wherever that is noted.
        let watched = signals::client_v6::<RARE>(packet, service, backend, &transport);
        return tunnel::send::<RARE>(packet, service, steering, &transport, folded(src), watched);
    }
    forward::count_sent::<RARE>(packet, steering.backend, steering.opens);
    let watched = signals::client_v6::<RARE>(packet, service, backend, &transport);
    let clamp = forward::clamp::<RARE>(&transport, backend);
    let way = Way { clamp, ..forward::to(steering.backend, backend) };
    let sent = forward::send::<RARE>(packet, way);
    signals::go_on::<RARE>(packet, watched, sent)
}

/// Bytes that the headers leave for the transport, in a packet whose lengths fit.
#[inline(always)]
fn room<const RARE: bool>(ip: &Ipv6, transport: &Transport) -> usize {
    let payload_bytes = usize::from(u16::from_be(ip.payload_length_be));
    if RARE {
        (ETH_BYTES + size_of::<Ipv6>() + payload_bytes).saturating_sub(transport.offset)
    } else {
        payload_bytes
    }
}

/// Whether the headers' lengths can be, each within the one around it.
#[inline(always)]
fn well_formed<const RARE: bool>(packet: &Packet, ip: &Ipv6, transport: &Transport) -> bool {
    let payload_bytes = usize::from(u16::from_be(ip.payload_length_be));
    ETH_BYTES + size_of::<Ipv6>() + payload_bytes <= packet.len_bytes()
        && transport.fits::<RARE>(packet, room::<RARE>(ip, transport))
}

#[inline(always)]
fn hashed(service: &Service, ip: &Ipv6, transport: &Transport) -> u64 {
    hash_v6(
        service,
        [ip.src[0], ip.src[1]],
        [ip.dst[0], ip.dst[1]],
        transport.src_port_be,
        transport.dst_port_be,
        transport.segment.protocol,
    )
}

/// The packet's hash, and the entry of the bucket that it falls into.
#[inline(always)]
fn bucket_entry(
    service: &Service,
    ip: &Ipv6,
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
    ip: &mut Ipv6,
    transport: &Transport,
    service: &Service,
    key: &FlowKeyV6,
) -> Result<u32, Reason> {
    // Before anything is remembered: a packet that goes nowhere opens no flow.
    if ip.hop_limit <= 1 {
        cold_path();
        return answer::expired::<RARE>(packet, true);
    }
    let segment = transport.looked_up::<RARE>(packet, service, room::<RARE>(ip, transport));
    let (flow, opens) = match nat::step(&FlowsV6, service, key, segment, transport.ack(packet)) {
        Step::NoFlow => {
            cold_path();
            return Err(Reason::PassNoFlow);
        }
        Step::Follow(flow) => (flow, false),
        Step::Open if !RARE => {
            cold_path();
            return arrival::steer_there(packet, transport, Program::SteerV6);
        }
        Step::Open => {
            let (hash, entry) = bucket_entry(service, ip, transport)?;
            let backend = forward::usable(entry.current())?;
            let client = Client {
                addr: [ip.src[0], ip.src[1]],
                vip: [ip.dst[0], ip.dst[1]],
                port_be: transport.src_port_be,
                vip_port_be: transport.dst_port_be,
                eth: forward::way_back(packet).ok_or(Reason::DropMalformed)?,
                way: forward::way_in::<RARE>(packet)?,
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
        forward::follow_client::<RARE, FlowKeyV6, _>(
            packet,
            &FlowsV6,
            flow,
            transport.segment.protocol,
        )?;
    }
    let index = BackendIndex::new(flow.backend);
    let backend = forward::usable_for_flow(index)?;
    // While the frame is still the client's.
    let watched = signals::translated_v6::<RARE>(packet, service, backend, transport, flow);
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
    ip: &mut Ipv6,
    transport: &Transport,
) -> Option<Result<u32, Reason>> {
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
    if !well_formed::<RARE>(packet, ip, transport) {
        cold_path();
        return Some(Err(Reason::DropMalformed));
    }
    if !transport.segment.possible() {
        cold_path();
        return Some(Err(Reason::DropTcpFlags));
    }
    if ip.hop_limit <= 1 {
        cold_path();
        return Some(answer::expired::<RARE>(packet, true));
    }
    let segment = transport.measured(packet, room::<RARE>(ip, transport));
    nat::returned::<FlowKeyV6, _>(&FlowsV6, flow, segment, transport.ack(packet), FlowsV6.now_ns());
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
    let watched = signals::returned_v6(packet, transport, flow);
    let sent = forward::send::<RARE>(packet, way);
    Some(signals::go_on::<RARE>(packet, watched, sent))
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
