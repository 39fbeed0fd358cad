//! ICMP and ICMPv6.

use super::{IP, Model, Onward, Packet, send::Way, translates, wraps};
use crate::{
    abi::{
        Address, Flow, FlowKeyV4, FlowKeyV6, IPPROTO_TCP, IPPROTO_UDP, Reason, Service, flow_state,
    },
    answer::{answerable_v4, answerable_v6},
    checksum::Delta,
    entry::BackendIndex,
    extension,
    hash::{bucket, hash_v4, hash_v6},
    headers::Ports,
    icmp::{self, Meaning},
    nat::TupleKey as _,
    steer::related,
    tunnel::{OUTER_TTL, entropy, folded},
};

/// The packet that a message is about.
struct Quote {
    /// Its header.
    at: usize,
    src: Address,
    dst: Address,
    protocol: u8,
    /// Its transport header.
    transport: usize,
    /// Where the message ends.
    end: usize,
}

impl Quote {
    /// The whole TCP header is quoted.
    fn holds_tcp(&self, packet: &Packet) -> bool {
        self.protocol == IPPROTO_TCP
            && self.transport + 20 <= self.end
            && packet.holds(self.transport, 20)
    }

    fn ports(&self, packet: &Packet) -> Ports {
        Ports { src_be: packet.raw_u16(self.transport), dst_be: packet.raw_u16(self.transport + 2) }
    }
}

impl Model {
    pub(super) fn icmp_v4(&mut self, packet: &mut Packet) -> Result<Onward, Reason> {
        let (at, end) = (packet.transport, packet.end());
        if !packet.holds(at, 8) || packet.ihl() < 20 || at + 8 > end || end > packet.bytes.len() {
            return Err(Reason::PassOther);
        }
        match icmp::meaning_v4(packet.u8(at), packet.u8(at + 1)) {
            // Options may say which way an answer has to take (RFC 1122, 3.2.2.6).
            Meaning::Echo if packet.ihl() == 20 && answerable_v4(packet.src()[0] as u32) => {
                self.echo(packet, icmp::ECHO_REPLY_V4)
            }
            Meaning::Error => {
                let quote = quoted_v4(packet, at + 8, end).ok_or(Reason::PassOther)?;
                self.error(packet, &quote)
            }
            _ => Err(Reason::PassOther),
        }
    }

    pub(super) fn icmp_v6(&mut self, packet: &mut Packet) -> Result<Onward, Reason> {
        let (at, end) = (packet.transport, packet.end());
        if !packet.holds(at, 8) || at + 8 > end || end > packet.bytes.len() {
            return Err(Reason::PassOther);
        }
        match icmp::meaning_v6(packet.u8(at), packet.u8(at + 1)) {
            Meaning::Echo if at == IP + 40 && answerable_v6(packet.src()) => {
                self.echo(packet, icmp::ECHO_REPLY_V6)
            }
            Meaning::Error => {
                let quote = quoted_v6(packet, at + 8, end).ok_or(Reason::PassOther)?;
                self.error(packet, &quote)
            }
            _ => Err(Reason::PassOther),
        }
    }

    fn echo(&mut self, packet: &mut Packet, reply: u8) -> Result<Onward, Reason> {
        let (src, dst) = (packet.src(), packet.dst());
        if self.tables.any(packet.v6, dst).is_none() {
            return Err(Reason::PassOther);
        }
        if src == dst {
            return Err(Reason::DropLand);
        }
        let at = packet.transport;
        let before = packet.raw_u16(at);
        packet.bytes[at] = reply;
        let sum =
            Delta::ZERO.replace_half(before, packet.raw_u16(at)).apply(packet.raw_u16(at + 2));
        packet.set_u16(at + 2, u16::from_be(sum));
        packet.set_address(packet.src_at(), dst);
        packet.set_address(packet.dst_at(), src);
        packet.set_ttl(OUTER_TTL, Delta::ZERO);
        let way = Way {
            eth: packet.way_back(),
            ifindex: self.tables.ifindex,
            vlan: packet.vlan,
            backend: BackendIndex::NONE,
            returned: true,
            clamp: false,
        };
        self.send(packet, way)?;
        Ok(Onward::Send(self.tables.ifindex, Some(Reason::AnswerEcho)))
    }

    fn error(&mut self, packet: &mut Packet, quote: &Quote) -> Result<Onward, Reason> {
        let Ports { src_be: vip_port_be, dst_be: port_be } = quote.ports(packet);
        let (client, vip, protocol) = (quote.dst, quote.src, quote.protocol);
        let key_v4 = FlowKeyV4::tuple(client, vip, port_be, vip_port_be, protocol);
        let key_v6 = FlowKeyV6::tuple(client, vip, port_be, vip_port_be, protocol);
        if self.tables.ports.count != 0 {
            let flow =
                if packet.v6 { self.flows_v6.get(&key_v6) } else { self.flows_v4.get(&key_v4) };
            if let Some(flow) = flow
                && flow.state & (flow_state::NAT | flow_state::REVERSE) != 0
            {
                return self.error_along(packet, quote, &flow);
            }
        }
        let found = self.tables.service(packet.v6, vip, vip_port_be, protocol);
        let service: Service = *found.ok_or(Reason::PassOther)?;
        if translates(&service) {
            return Err(Reason::PassNoFlow);
        }
        let acked = quote.holds_tcp(packet).then(|| {
            let at = quote.transport + 8;
            u32::from(packet.u16(at)) << 16 | u32::from(packet.u16(at + 2))
        });
        let bucket_entry = |hash| self.tables.entry(&service, bucket(&service, hash));
        let (index, addr) = if packet.v6 {
            let hash = hash_v6(&service, client, vip, port_be, vip_port_be, protocol);
            let entry = bucket_entry(hash)?;
            (related(&self.flows_v6, &service, entry, &key_v6, protocol, acked), folded(client))
        } else {
            let (src_be, dst_be) = (client[0] as u32, vip[0] as u32);
            let hash = hash_v4(&service, src_be, dst_be, port_be, vip_port_be, protocol);
            let entry = bucket_entry(hash)?;
            (related(&self.flows_v4, &service, entry, &key_v4, protocol, acked), src_be)
        };
        if let Some(gue) = wraps(&service) {
            let entropy = entropy(addr, port_be, vip_port_be);
            return self.wrap(packet, index, gue, entropy, None);
        }
        self.tables.usable(index)?;
        let way = self.way_to(index);
        self.send(packet, way)
    }

    /// Along the translated flow that the quoted packet answers.
    fn error_along(
        &mut self,
        packet: &mut Packet,
        quote: &Quote,
        flow: &Flow,
    ) -> Result<Onward, Reason> {
        if packet.ttl() <= 1 {
            return Err(Reason::DropTtlExpired);
        }
        let index = BackendIndex::new(flow.backend);
        let returned = flow.state & flow_state::REVERSE != 0;
        if !returned {
            self.tables.usable_for_flow(index)?;
        }
        let (src, dst) = (flow.src, flow.dst);
        let addresses = Delta::ZERO.replace_address(quote.src, dst).replace_address(quote.dst, src);
        // The transport header that is quoted.
        let to = Ports { src_be: flow.dst_port_be, dst_be: flow.src_port_be };
        let mut ports = quote.ports(packet);
        let udp = quote.protocol == IPPROTO_UDP;
        let at = match udp {
            true => Some(quote.transport + 6),
            false => quote.holds_tcp(packet).then_some(quote.transport + 16),
        };
        let mut sum = at.map(|at| packet.raw_u16(at));
        let mut change = icmp::requote(&mut ports, sum.as_mut(), udp, to, addresses).and(addresses);
        packet.set_u16(quote.transport, u16::from_be(ports.src_be));
        packet.set_u16(quote.transport + 2, u16::from_be(ports.dst_be));
        if let (Some(at), Some(sum)) = (at, sum) {
            packet.set_u16(at, u16::from_be(sum));
        }
        // The IP header that is quoted.
        if packet.v6 {
            packet.set_address(quote.at + 8, dst);
            packet.set_address(quote.at + 24, src);
            change = change.replace_address(packet.src(), src).replace_address(packet.dst(), dst);
        } else {
            packet.set_address(quote.at + 12, dst);
            packet.set_address(quote.at + 16, src);
            let was = packet.raw_u16(quote.at + 10);
            let sum = addresses.apply(was);
            packet.set_u16(quote.at + 10, u16::from_be(sum));
            change = change.replace_half(was, sum);
        }
        let at = packet.transport + 2;
        let sum = change.apply(packet.raw_u16(at));
        packet.set_u16(at, u16::from_be(sum));
        packet.route(src, dst);
        let way = if returned { self.way_back_of(flow) } else { self.way_to(index) };
        self.send(packet, way)
    }
}

fn quoted_v4(packet: &Packet, at: usize, end: usize) -> Option<Quote> {
    if !packet.holds(at, 20) {
        return None;
    }
    let header_bytes = usize::from(packet.u8(at) & 0xf) * 4;
    let (src, dst) = (packet.address(at + 12), packet.address(at + 16));
    // An error goes to who sent what it is about. Later fragments hold no ports.
    if packet.u8(at) >> 4 != 4
        || header_bytes < 20
        || packet.u16(at + 6) & 0x1fff != 0
        || src != packet.dst()
    {
        return None;
    }
    let (protocol, transport) = (packet.u8(at + 9), at + header_bytes);
    whole(packet, Quote { at, src, dst, protocol, transport, end })
}

fn quoted_v6(packet: &Packet, at: usize, end: usize) -> Option<Quote> {
    if !packet.holds(at, 40) {
        return None;
    }
    let (src, dst) = (packet.address(at + 8), packet.address(at + 24));
    if packet.u8(at) >> 4 != 6 || src != packet.dst() {
        return None;
    }
    let (mut protocol, mut transport) = (packet.u8(at + 6), at + 40);
    if protocol == extension::FRAGMENT {
        if !packet.holds(transport, 8) || packet.u16(transport + 2) & 0xfff8 != 0 {
            return None;
        }
        protocol = packet.u8(transport);
        transport += 8;
    }
    whole(packet, Quote { at, src, dst, protocol, transport, end })
}

/// The quotation, if it is of TCP or UDP and holds the eight bytes that have to be there (RFC 792).
fn whole(packet: &Packet, quote: Quote) -> Option<Quote> {
    let steered = matches!(quote.protocol, IPPROTO_TCP | IPPROTO_UDP);
    let held = packet.holds(quote.transport, 8) && quote.transport + 8 <= quote.end;
    (steered && held).then_some(quote)
}
