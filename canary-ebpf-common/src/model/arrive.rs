//! From the frame to the transport header, and from there to a backend.

use std::hash::Hash;

use super::{
    Fragment, IP, Model, Onward, Packet, decide, fragments::stretch, send::Way, translates, wraps,
};
use crate::{
    abi::{
        FlowKeyV4, FlowKeyV6, FragmentKey, FragmentRoute, IPPROTO_ICMP, IPPROTO_ICMPV6,
        IPPROTO_TCP, IPPROTO_UDP, Reason, ReasonVerdict, SERVICE_QUIC, Service, flow_state,
        fragment as flags, vlan,
    },
    entry::BackendIndex,
    extension::{self, Stray},
    fragment::Stretch,
    hash::{bucket, hash_v4, hash_v6},
    headers::{Bytes, Tcp, Udp},
    nat::{self, TupleKey},
    ports::Client,
    quic,
    steer::{Flows as _, Segment, TCP_SYN, model::ModelFlows},
    tunnel::{entropy, folded},
};

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// [`FragmentKey::protocol`] of IPv6.
const ANY_PROTOCOL: u32 = 256;

/// The transport header.
#[derive(Clone, Copy)]
pub(super) struct Transport {
    pub(super) src_port_be: u16,
    pub(super) dst_port_be: u16,
    pub(super) segment: Segment,
    pub(super) ack: u32,
}

impl Transport {
    pub(super) fn is_syn(&self) -> bool {
        self.segment.tcp_flags & TCP_SYN != 0
    }
}

/// Bytes of the transport header, options left out.
const fn header_bytes(protocol: u8) -> usize {
    if protocol == IPPROTO_TCP { size_of::<Tcp>() } else { size_of::<Udp>() }
}

const fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88a8)
}

impl Packet {
    /// The transport header, if the frame holds one.
    fn read(&self) -> Option<Transport> {
        let (at, tcp) = (self.transport, self.protocol == IPPROTO_TCP);
        if !self.holds(at, header_bytes(self.protocol)) {
            return None;
        }
        let word = |at| u32::from(self.u16(at)) << 16 | u32::from(self.u16(at + 2));
        Some(Transport {
            src_port_be: self.raw_u16(at),
            dst_port_be: self.raw_u16(at + 2),
            segment: if tcp {
                Segment::tcp(self.u8(at + 13), word(at + 4))
            } else {
                Segment::udp()
            },
            ack: if tcp { word(at + 8) } else { 0 },
        })
    }

    /// Bytes that IP's headers leave for the transport, where their lengths can be.
    fn room(&self) -> Option<usize> {
        let (end, start) = (self.end(), self.transport);
        if self.v6 {
            return (end <= self.bytes.len()).then_some(end.saturating_sub(start));
        }
        (self.ihl() >= 20 && end >= start && end <= self.bytes.len()).then(|| end - start)
    }

    /// Whether the headers' lengths can be, each within the one around it.
    fn well_formed(&self) -> bool {
        let Some(room) = self.room() else { return false };
        if self.protocol == IPPROTO_TCP {
            let bytes = usize::from(self.u8(self.transport + 12) >> 4) * 4;
            return bytes >= size_of::<Tcp>() && bytes <= room;
        }
        let bytes = usize::from(self.u16(self.transport + 4));
        bytes >= size_of::<Udp>() && (bytes <= room || self.fragment.is_some())
    }

    /// The segment with what its payload says, for flows that are looked up.
    fn looked_up(&self, segment: Segment, service: Option<&Service>) -> Segment {
        if segment.protocol == IPPROTO_TCP {
            let header_bytes = usize::from(self.u8(self.transport + 12) >> 4) * 4;
            let room = self.room().unwrap_or_default();
            return segment.carrying(room.wrapping_sub(header_bytes) as u32);
        }
        match service {
            Some(service) if service.flags & SERVICE_QUIC != 0 => {
                let length = usize::from(self.u16(self.transport + 4)).saturating_sub(8);
                let frame = Bytes(self.bytes.clone());
                let (quic, seq) = quic::classify(&frame, self.transport + 8, length);
                Segment { quic, seq, ..segment }
            }
            _ => segment,
        }
    }

    pub(super) fn hash(&self, service: &Service, transport: &Transport) -> u64 {
        let (src, dst) = (self.src(), self.dst());
        let Transport { src_port_be: p, dst_port_be: q, segment: Segment { protocol, .. }, .. } =
            *transport;
        if self.v6 {
            hash_v6(service, src, dst, p, q, protocol)
        } else {
            hash_v4(service, src[0] as u32, dst[0] as u32, p, q, protocol)
        }
    }

    /// What differs from flow to flow in outer headers.
    fn entropy(&self, transport: &Transport) -> u32 {
        let src = self.src();
        let addr = if self.v6 { folded(src) } else { src[0] as u32 };
        entropy(addr, transport.src_port_be, transport.dst_port_be)
    }
}

impl Model {
    pub(super) fn arrive(&mut self, packet: &mut Packet) -> Result<Onward, Reason> {
        let own = self.tables.macs.contains(&packet.bytes[..6]);
        if packet.u8(0) & 1 != 0 && !own {
            return Ok(Onward::Pass);
        }
        if !own {
            return Err(Reason::PassOtherHost);
        }
        self.untag(packet)?;
        match packet.u16(IP - 2) {
            IPV4 => self.v4(packet),
            IPV6 => self.v6(packet),
            _ => Err(Reason::PassOther),
        }
    }

    /// Takes off one or two tags that IP is behind.
    fn untag(&self, packet: &mut Packet) -> Result<(), Reason> {
        if !is_tag(packet.u16(12)) {
            return Ok(());
        }
        if !packet.holds(14, 4) {
            return Err(Reason::PassOther);
        }
        let second = is_tag(packet.u16(16));
        if second && !packet.holds(18, 4) {
            return Err(Reason::PassOther);
        }
        let bytes = if second { 8 } else { 4 };
        match packet.u16(12 + bytes) {
            IPV4 | IPV6 => {}
            tag if is_tag(tag) => return Err(Reason::PassTags),
            _ => return Err(Reason::PassOther),
        }
        let id = |at| packet.u16(at) & vlan::ID_MASK;
        let inner = if second { id(18) } else { 0 };
        packet.vlan = vlan::word(id(14), inner, packet.u16(12) == 0x88a8);
        packet.tags = packet.bytes.drain(12..12 + bytes).collect();
        packet.odd = true;
        // A tag without a VLAN says what priority a frame has, and no more.
        if packet.vlan != 0 {
            let way = self.tables.tagged_way;
            packet.way = if way == 0 { 0 } else { way | packet.vlan };
        }
        Ok(())
    }

    fn v4(&mut self, packet: &mut Packet) -> Result<Onward, Reason> {
        if !packet.holds(IP, 20) || packet.u8(IP) >> 4 != 4 {
            return Err(Reason::PassOther);
        }
        packet.protocol = packet.u8(IP + 9);
        packet.transport = IP + packet.ihl();
        let fragment = packet.u16(IP + 6) & 0x3fff;
        if fragment != 0 {
            let served = self.tables.serves(false, packet.dst(), packet.protocol);
            let key = FragmentKey {
                src: packet.src(),
                dst: packet.dst(),
                id_be: u32::from(packet.raw_u16(IP + 4)),
                protocol: packet.protocol.into(),
            };
            packet.fragment = Some(Fragment { key, at: 0, served });
            if fragment & 0x1fff != 0 {
                return self.later_fragment(packet);
            }
            self.first_fragment(packet)?;
        }
        match packet.protocol {
            IPPROTO_TCP | IPPROTO_UDP => self.steered(packet),
            IPPROTO_ICMP if packet.fragment.is_none() => self.icmp_v4(packet),
            _ => Err(Reason::PassOther),
        }
    }

    fn v6(&mut self, packet: &mut Packet) -> Result<Onward, Reason> {
        packet.v6 = true;
        if !packet.holds(IP, 40) || packet.u8(IP) >> 4 != 6 {
            return Err(Reason::PassOther);
        }
        let first = packet.u8(IP + 6);
        // RFC 2675, 2: a jumbogram's length stands in a hop-by-hop option.
        if first == extension::HOP_BY_HOP && packet.u16(IP + 4) == 0 {
            return Err(Reason::PassExtension);
        }
        let known = matches!(first, 0 | 43 | 44 | 51 | 60);
        let frame = Bytes(packet.bytes.clone());
        let found = match extension::walk(&frame, IP + 40, first, |at| at) {
            Ok(found) => found,
            Err(Stray::Unknown) if known => return Err(Reason::PassExtension),
            Err(_) => return Err(Reason::PassOther),
        };
        packet.odd |= known;
        (packet.protocol, packet.transport) = (found.protocol, found.offset);
        if found.fragment != 0 {
            let served = self.tables.serves(true, packet.dst(), packet.protocol);
            let word = [packet.raw_u16(found.fragment + 4), packet.raw_u16(found.fragment + 6)];
            let key = FragmentKey {
                src: packet.src(),
                dst: packet.dst(),
                id_be: u32::from(word[0]) | u32::from(word[1]) << 16,
                protocol: ANY_PROTOCOL,
            };
            packet.fragment = Some(Fragment { key, at: found.fragment, served });
            if packet.u16(found.fragment + 2) & 0xfff8 != 0 {
                return self.later_fragment(packet);
            }
            self.first_fragment(packet)?;
        }
        match packet.protocol {
            IPPROTO_TCP | IPPROTO_UDP => self.steered(packet),
            IPPROTO_ICMPV6 if packet.fragment.is_none() => self.icmp_v6(packet),
            _ => Err(Reason::PassOther),
        }
    }

    /// Whether there can be such a first fragment, where a service has its protocol.
    fn first_fragment(&self, packet: &Packet) -> Result<(), Reason> {
        if !packet.fragment.as_ref().is_some_and(|fragment| fragment.served) {
            return Ok(());
        }
        let held = packet.end().saturating_sub(packet.transport);
        let steered = matches!(packet.protocol, IPPROTO_TCP | IPPROTO_UDP);
        if steered && held < header_bytes(packet.protocol) {
            return Err(Reason::DropFragmentTiny);
        }
        let possible = stretch(packet).is_some_and(Stretch::possible);
        if possible { Ok(()) } else { Err(Reason::DropMalformed) }
    }

    fn steered(&mut self, packet: &mut Packet) -> Result<Onward, Reason> {
        let onward = self.steer(packet);
        if let (Err(reason), Some(Fragment { key, served: true, .. })) = (&onward, &packet.fragment)
            && matches!(reason.verdict(), ReasonVerdict::Pass)
        {
            // The later ones would not pass by themselves.
            let route = FragmentRoute { flags: flags::PASSED, ..FragmentRoute::default() };
            self.fragments.insert(*key, route);
        }
        onward
    }

    fn steer(&mut self, packet: &mut Packet) -> Result<Onward, Reason> {
        let transport = packet.read().ok_or(Reason::PassOther)?;
        let ports = self.tables.ports;
        if u16::from_be(transport.dst_port_be).wrapping_sub(ports.first) < ports.count
            && let Some(onward) = self.returned(packet, &transport)
        {
            return onward;
        }
        let (v6, protocol) = (packet.v6, packet.protocol);
        let found = self.tables.service(v6, packet.dst(), transport.dst_port_be, protocol);
        let service = *found.ok_or(Reason::PassNoService)?;
        if !packet.well_formed() {
            return Err(Reason::DropMalformed);
        }
        if packet.src() == packet.dst() {
            return Err(Reason::DropLand);
        }
        if !transport.segment.possible() {
            return Err(Reason::DropTcpFlags);
        }
        if translates(&service) && packet.ttl() <= 1 {
            return packet.expired();
        }
        let hash = packet.hash(&service, &transport);
        let entry = self.tables.entry(&service, bucket(&service, hash))?;
        let segment = packet.looked_up(transport.segment, Some(&service));
        let client = Client {
            addr: packet.src(),
            vip: packet.dst(),
            port_be: transport.src_port_be,
            vip_port_be: transport.dst_port_be,
            eth: packet.way_back(),
            way: packet.way,
        };
        let backend = |index: BackendIndex| self.tables.backend(index).ok();
        let (index, flow) = if v6 {
            let key: FlowKeyV6 = key_of(packet, &transport);
            let flows = &self.flows_v6;
            let ack = transport.ack;
            decide(flows, ports, backend, &service, entry, hash, &key, segment, ack, &client)?
        } else {
            let key: FlowKeyV4 = key_of(packet, &transport);
            let flows = &self.flows_v4;
            let ack = transport.ack;
            decide(flows, ports, backend, &service, entry, hash, &key, segment, ack, &client)?
        };
        if let Some(gue) = wraps(&service) {
            let entropy = packet.entropy(&transport);
            return self.wrap(packet, index, gue, entropy, Some(&transport));
        }
        if let Some(flow) = flow {
            packet.translate(&flow);
        }
        let way = Way { clamp: transport.is_syn(), ..self.way_to(index) };
        self.send(packet, way)
    }

    /// A backend's packet of a translated flow; `None` if it belongs to none.
    fn returned(
        &mut self,
        packet: &mut Packet,
        transport: &Transport,
    ) -> Option<Result<Onward, Reason>> {
        let flow = if packet.v6 {
            let key: FlowKeyV6 = key_of(packet, transport);
            self.flows_v6.get(&key)
        } else {
            let key: FlowKeyV4 = key_of(packet, transport);
            self.flows_v4.get(&key)
        };
        let flow = flow.filter(|flow| flow.state & flow_state::REVERSE != 0)?;
        if !packet.well_formed() {
            return Some(Err(Reason::DropMalformed));
        }
        if !transport.segment.possible() {
            return Some(Err(Reason::DropTcpFlags));
        }
        if packet.ttl() <= 1 {
            return Some(packet.expired());
        }
        let segment = packet.looked_up(transport.segment, None);
        if packet.v6 {
            answered::<FlowKeyV6>(
                &self.flows_v6,
                &key_of(packet, transport),
                segment,
                transport.ack,
            );
        } else {
            answered::<FlowKeyV4>(
                &self.flows_v4,
                &key_of(packet, transport),
                segment,
                transport.ack,
            );
        }
        packet.translate(&flow);
        let index = BackendIndex::new(flow.backend);
        let reachable = packet.odd || self.tables.usable(index).is_ok();
        let way = Way { clamp: transport.is_syn() && reachable, ..self.way_back_of(&flow) };
        Some(self.send(packet, way))
    }
}

/// The key of the packet's flow.
pub(super) fn key_of<K: TupleKey>(packet: &Packet, transport: &Transport) -> K {
    let Transport { src_port_be, dst_port_be, segment: Segment { protocol, .. }, .. } = *transport;
    K::tuple(packet.src(), packet.dst(), src_port_be, dst_port_be, protocol)
}

fn answered<K: TupleKey + Eq + Hash>(flows: &ModelFlows<K>, key: &K, segment: Segment, ack: u32) {
    let flow = flows.lookup(key);
    // SAFETY: it was there a moment ago, so it is an entry of the model's table.
    nat::returned(flows, unsafe { &mut *flow }, segment, ack, flows.now_ns());
}
