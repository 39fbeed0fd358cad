//! The way out: outer headers, errors, MSS, tags.

use super::{IP, Model, Onward, Packet, arrive::Transport};
use crate::{
    abi::{Flow, FragmentRoute, Reason, fragment as flags, vlan, way},
    answer::{QUOTED_V4, QUOTED_V6, answerable_v4, answerable_v6},
    checksum::Delta,
    entry::BackendIndex,
    headers::Bytes,
    mss,
    tunnel::{OUTER_TTL, wrapped},
};

/// A way out.
pub(super) struct Way {
    pub(super) eth: [u32; 3],
    pub(super) ifindex: u32,
    pub(super) vlan: u32,
    pub(super) backend: BackendIndex,
    pub(super) returned: bool,
    /// A SYN, whose MSS may have to be lowered.
    pub(super) clamp: bool,
}

/// DSCP of what keeps the network going (RFC 1812, 4.3.2.5).
const INTERNETWORK_CONTROL: u8 = 0xc0;

/// RFC 1071's definition.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for pair in parts.concat().chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

impl Packet {
    /// Puts tags behind the MAC addresses.
    fn put_tags(&mut self, tags: &[u8]) {
        self.bytes.splice(12..12, tags.iter().copied());
    }

    /// The tags that `word` asks for: as they came where the VLANs are the same; the priority is
    /// kept in any case.
    fn wanted(&self, word: u32) -> Vec<u8> {
        if word == 0 {
            return Vec::new();
        }
        if word == self.vlan {
            return self.tags.clone();
        }
        let priority = match self.tags[..] {
            [_, _, first, second, ..] => u16::from_be_bytes([first, second]) & !vlan::ID_MASK,
            _ => 0,
        };
        let outer: u16 = if word & vlan::SERVICE_TAG != 0 { 0x88a8 } else { 0x8100 };
        let mut tags = vec![outer, priority | vlan::outer(word)];
        if vlan::inner(word) != 0 {
            tags.extend([0x8100, priority | vlan::inner(word)]);
        }
        tags.into_iter().flat_map(u16::to_be_bytes).collect()
    }

    /// Lowers the MSS of a SYN.
    fn clamp(&mut self, most: u16) {
        let at = self.transport;
        if most == 0 || !self.holds(at, 20) {
            return;
        }
        let bytes = mss::options_bytes(self.u8(at + 12));
        if bytes == 0 || !self.holds(at + 20, bytes) {
            return;
        }
        let mut options = [0; size_of::<mss::Options>()];
        options[..bytes].copy_from_slice(&self.bytes[at + 20..at + 20 + bytes]);
        if let Some(place) = mss::find(&options, bytes) {
            // From the TCP header on, which is aligned then.
            let segment = Bytes(self.bytes.split_off(at));
            _ = mss::lower(&segment, 0, place, most);
            self.bytes.extend(segment.0);
        }
    }

    /// An error to the sender: its time is over.
    pub(super) fn expired(&mut self) -> Result<Onward, Reason> {
        let kind = if self.v6 { [3, 0] } else { [11, 0] };
        self.tell(kind, 0, Reason::AnswerTtlExpired, Reason::DropTtlExpired)
    }

    /// An error to the sender: it is larger than `mtu`.
    fn too_big(&mut self, mtu: u16) -> Result<Onward, Reason> {
        let kind = if self.v6 { [2, 0] } else { [3, 4] };
        self.tell(kind, mtu, Reason::AnswerTooBig, Reason::DropTooBig)
    }

    fn tell(
        &mut self,
        [kind, code]: [u8; 2],
        mtu: u16,
        told: Reason,
        untold: Reason,
    ) -> Result<Onward, Reason> {
        let (src, dst) = (self.src(), self.dst());
        let answerable = if self.v6 { answerable_v6(src) } else { answerable_v4(src[0] as u32) };
        let most = if self.v6 { QUOTED_V6 } else { QUOTED_V4 } as usize;
        let quoted = (self.end() - IP).min(most);
        if !answerable || !self.holds(IP, quoted) {
            return Err(untold);
        }
        let quote = self.bytes[IP..IP + quoted].to_vec();
        let [high, low] = mtu.to_be_bytes();
        let mut icmp = [kind, code, 0, 0, 0, 0, high, low];
        let length = (icmp.len() + quoted) as u16;
        let header_bytes = if self.v6 { 40 } else { 20 };
        let mut header = Self { v6: self.v6, bytes: vec![0; IP + header_bytes], ..Self::default() };
        let mut pseudo = Vec::new();
        header.set_address(header.src_at(), dst);
        header.set_address(header.dst_at(), src);
        let ttl_at = header.ttl_at();
        header.bytes[ttl_at] = OUTER_TTL;
        if self.v6 {
            header.set_u16(IP, 0x6000 | u16::from(INTERNETWORK_CONTROL) << 4);
            header.set_u16(IP + 4, length);
            header.bytes[IP + 6] = 58;
            pseudo.extend_from_slice(&header.bytes[IP + 8..IP + 40]);
            pseudo.extend(u32::from(length).to_be_bytes());
            pseudo.extend([0, 0, 0, 58]);
        } else {
            header.bytes[IP..IP + 2].copy_from_slice(&[0x45, INTERNETWORK_CONTROL]);
            header.set_u16(IP + 2, length + 20);
            header.set_u16(IP + 6, 0x4000);
            header.bytes[IP + 9] = 1;
            let sum = checksum(&[&header.bytes[IP..]]);
            header.set_u16(IP + 10, sum);
        }
        let sum = checksum(&[&pseudo, &icmp, &quote]);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        header.set_eth(self.way_back());
        header.bytes[12..14].copy_from_slice(&self.bytes[12..14]);
        self.bytes = [&header.bytes[..], &icmp, &quote].concat();
        let tags = std::mem::take(&mut self.tags);
        self.put_tags(&tags);
        Ok(Onward::Tell(told, untold))
    }
}

impl Model {
    /// The way to a backend.
    pub(super) fn way_to(&self, index: BackendIndex) -> Way {
        let backend = self.tables.backend(index).copied().unwrap_or_default();
        let (eth, ifindex, vlan) = (backend.eth, backend.ifindex, backend.vlan);
        Way { eth, ifindex, vlan, backend: index, returned: false, clamp: false }
    }

    /// The way back to a translated flow's client.
    pub(super) fn way_back_of(&self, flow: &Flow) -> Way {
        let backend = BackendIndex::new(flow.backend);
        let (ifindex, vlan) = match way::has_tags(flow.way) {
            true => (self.tables.ifindex, way::vlan(flow.way)),
            false => (flow.way, 0),
        };
        Way { eth: flow.eth, ifindex, vlan, backend, returned: true, clamp: false }
    }

    /// Sends a frame that is not wrapped.
    pub(super) fn send(&mut self, packet: &mut Packet, way: Way) -> Result<Onward, Reason> {
        packet.set_eth(way.eth);
        if way.clamp {
            packet.clamp(self.tables.backend(way.backend).map_or(0, |b| b.mss));
        }
        let (src, dst) = (packet.src(), packet.dst());
        let translated =
            packet.fragment.as_ref().is_some_and(|f| (f.key.src, f.key.dst) != (src, dst));
        let route = FragmentRoute {
            src,
            dst,
            eth: way.eth,
            ifindex: way.ifindex,
            vlan: way.vlan,
            backend: way.backend.get(),
            flags: if way.returned { flags::RETURNED } else { 0 }
                | if translated { flags::TRANSLATED } else { 0 },
            ..FragmentRoute::default()
        };
        self.keep(packet, route)?;
        let tags = packet.wanted(way.vlan);
        packet.put_tags(&tags);
        Ok(Onward::Send(way.ifindex, None))
    }

    /// Wraps a packet for its backend and sends it. `transport` is that of one whose sender is told
    /// if it goes nowhere.
    pub(super) fn wrap(
        &mut self,
        packet: &mut Packet,
        index: BackendIndex,
        gue: bool,
        entropy: u32,
        transport: Option<&Transport>,
    ) -> Result<Onward, Reason> {
        let backend = *self.tables.usable(index)?;
        if packet.ttl() <= 1 {
            return if transport.is_some() {
                packet.expired()
            } else {
                Err(Reason::DropTtlExpired)
            };
        }
        if packet.end() - IP > usize::from(backend.inner_mtu) {
            return match transport {
                Some(_) => packet.too_big(backend.inner_mtu),
                None => Err(Reason::DropTooBig),
            };
        }
        packet.set_ttl(packet.ttl() - 1, Delta::ZERO);
        if transport.is_some_and(Transport::is_syn) {
            packet.clamp(backend.mss);
        }
        let route = FragmentRoute {
            src: [u64::from(entropy), 0],
            backend: index.get(),
            flags: flags::WRAPPED | if gue { flags::GUE } else { 0 },
            ..FragmentRoute::default()
        };
        self.keep(packet, route)?;
        let end = packet.end();
        let outer =
            wrapped(&backend, gue, &packet.bytes[IP..end], entropy).ok_or(Reason::DropMalformed)?;
        packet.bytes.splice(IP..end, outer);
        let ethertype: u16 = if backend.is_v6() { 0x86dd } else { 0x0800 };
        packet.set_u16(IP - 2, ethertype);
        packet.set_eth(backend.eth);
        let tags = packet.wanted(backend.vlan);
        packet.put_tags(&tags);
        Ok(Onward::Send(backend.ifindex, None))
    }
}
