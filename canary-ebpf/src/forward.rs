//! The way out: counters, MAC addresses, interface, and rewritten ports.

use core::hint::cold_path;

use aya_ebpf::bindings::xdp_action;
use canary_ebpf_common::{
    abi::{
        BACKEND_MAINT, BACKEND_USABLE, Backend, Flow, IPPROTO_TCP, Reason, SERVICE_QUIC, Service,
        way,
    },
    checksum::Delta,
    entry::BackendIndex,
    headers::{Eth, Frame as _, Tcp, Udp},
    nat,
    steer::{Segment, TCP_SYN},
};

use crate::{fragment, maps, packet::Packet, vlan};

/// The transport header: where it is and what it says.
#[derive(Clone, Copy)]
pub(crate) struct Transport {
    pub(crate) src_port_be: u16,
    pub(crate) dst_port_be: u16,
    pub(crate) segment: Segment,
    pub(crate) offset: usize,
}

impl Transport {
    /// Ports of the TCP or UDP header at `offset`, with the fields of TCP that steering needs.
    #[inline(always)]
    pub(crate) fn read(packet: &Packet, offset: usize, protocol: u8) -> Option<Self> {
        if protocol == IPPROTO_TCP {
            let tcp: *mut Tcp = packet.at(offset)?;
            // SAFETY: `at` checked the bounds.
            let tcp = unsafe { &*tcp };
            return Some(Self {
                src_port_be: tcp.ports.src_be,
                dst_port_be: tcp.ports.dst_be,
                segment: Segment::tcp(tcp.flags, u32::from_be(tcp.seq_be)),
                offset,
            });
        }
        let udp: *mut Udp = packet.at(offset)?;
        // SAFETY: `at` checked the bounds.
        let udp = unsafe { &*udp };
        Some(Self {
            src_port_be: udp.ports.src_be,
            dst_port_be: udp.ports.dst_be,
            segment: Segment::udp(),
            offset,
        })
    }

    /// Whether it is a SYN or a SYN-ACK.
    #[inline(always)]
    pub(crate) const fn is_syn(&self) -> bool {
        self.segment.tcp_flags & TCP_SYN != 0
    }

    /// TCP acknowledgement number, host order; 0 for UDP. Read where it is asked for: most packets
    /// do without it.
    #[inline(always)]
    pub(crate) fn ack(&self, packet: &Packet) -> u32 {
        if self.segment.protocol != IPPROTO_TCP {
            return 0;
        }
        // SAFETY: `at` checked the bounds.
        packet.at::<Tcp>(self.offset).map_or(0, |tcp| u32::from_be(unsafe { (*tcp).ack_be }))
    }

    /// What the packet is to steering, with what its payload says where that can matter: for
    /// flows that are looked up. Its lengths fit into `room` bytes.
    #[inline(always)]
    pub(crate) fn looked_up<const RARE: bool>(
        &self,
        packet: &Packet,
        service: &Service,
        room: usize,
    ) -> Segment {
        if self.segment.protocol == IPPROTO_TCP {
            return self.measured(packet, room);
        }
        let mut segment = self.segment;
        if service.flags & SERVICE_QUIC != 0 {
            (segment.quic, segment.seq) =
                if RARE { packet.quic_at(self.offset) } else { packet.quic() };
        }
        segment
    }

    /// What the packet is to steering, with the length of a TCP segment's payload. Its lengths fit
    /// into `room` bytes.
    #[inline(always)]
    pub(crate) fn measured(&self, packet: &Packet, room: usize) -> Segment {
        if self.segment.protocol != IPPROTO_TCP {
            return self.segment;
        }
        let header_bytes = self.tcp_header_bytes(packet).unwrap_or(room);
        self.segment.carrying(room.wrapping_sub(header_bytes) as u32)
    }

    /// Length of the TCP header with its options, as it says itself.
    #[inline(always)]
    fn tcp_header_bytes(&self, packet: &Packet) -> Option<usize> {
        let tcp: *mut Tcp = packet.at(self.offset)?;
        // SAFETY: `at` checked the bounds.
        Some(usize::from(unsafe { (*tcp).data_offset } >> 4) * 4)
    }

    /// Whether the header and what it says of its length fit into `room` bytes. A fragment of a
    /// datagram may be shorter than that.
    #[inline(always)]
    pub(crate) fn fits<const RARE: bool>(&self, packet: &Packet, room: usize) -> bool {
        if self.segment.protocol == IPPROTO_TCP {
            let Some(header) = self.tcp_header_bytes(packet) else { return false };
            return header >= size_of::<Tcp>() && header <= room;
        }
        let Some(udp) = packet.at::<Udp>(self.offset) else { return false };
        // SAFETY: `at` checked the bounds.
        let length = usize::from(u16::from_be(unsafe { (*udp).length_be }));
        length >= size_of::<Udp>() && (length <= room || RARE && fragment::at_hand())
    }

    /// Gives the header its new ports and brings its checksum up to date, `addresses`
    /// being the change in the pseudo-header.
    #[inline(always)]
    pub(crate) fn rewrite(&self, packet: &Packet, flow: &Flow, addresses: Delta) -> Option<()> {
        let delta = addresses
            .replace_half(self.src_port_be, flow.src_port_be)
            .replace_half(self.dst_port_be, flow.dst_port_be);
        if self.segment.protocol == IPPROTO_TCP {
            let tcp: *mut Tcp = packet.at(self.offset)?;
            // SAFETY: `at` checked the bounds.
            let tcp = unsafe { &mut *tcp };
            tcp.ports.src_be = flow.src_port_be;
            tcp.ports.dst_be = flow.dst_port_be;
            tcp.checksum = delta.apply(tcp.checksum);
            return Some(());
        }
        let udp: *mut Udp = packet.at(self.offset)?;
        // SAFETY: `at` checked the bounds.
        let udp = unsafe { &mut *udp };
        udp.ports.src_be = flow.src_port_be;
        udp.ports.dst_be = flow.dst_port_be;
        // RFC 768: zero says that there is no checksum, so a sum of zero is sent as ones.
        if udp.checksum != 0 {
            let sum = delta.apply(udp.checksum);
            udp.checksum = if sum == 0 { 0xffff } else { sum };
        }
        Some(())
    }
}

/// The record of a backend that packets may be sent to.
#[inline(always)]
pub(crate) fn usable(index: BackendIndex) -> Result<&'static Backend, Reason> {
    let backend = maps::backend(index).ok_or(Reason::DropNoBackend)?;
    if backend.flags & (BACKEND_USABLE | BACKEND_MAINT) != BACKEND_USABLE {
        cold_path();
        return Err(Reason::DropNoBackend);
    }
    Ok(backend)
}

/// The record of a translated flow's backend. One in maintenance is passed over as if the flow
/// were not known: the host ends the client's connection.
#[inline(always)]
pub(crate) fn usable_for_flow(index: BackendIndex) -> Result<&'static Backend, Reason> {
    let backend = maps::backend(index).ok_or(Reason::DropNoBackend)?;
    match backend.flags & (BACKEND_USABLE | BACKEND_MAINT) {
        BACKEND_USABLE => Ok(backend),
        flags if flags & BACKEND_MAINT != 0 => Err(Reason::PassNoFlow),
        _ => Err(Reason::DropNoBackend),
    }
}

/// Counts a packet to a backend.
#[inline(always)]
pub(crate) fn count_sent<const RARE: bool>(packet: &Packet, index: BackendIndex, opens: bool) {
    count(index, packet.arrived_bytes::<RARE>(), opens);
}

/// The same of one that came as so many bytes.
#[inline(always)]
pub(crate) fn count(index: BackendIndex, arrived_bytes: u64, opens: bool) {
    if let Some(counters) = maps::counters(index) {
        counters.packets += 1;
        counters.bytes += arrived_bytes;
        counters.connections += u64::from(opens);
    }
}

/// Where the TCP header is of a SYN on its way to `backend`, or from it, whose MSS is to be lowered;
/// 0 in other packets. Where few packets come by, that is noted with the packet: there is no room
/// to remember it. It is taken back where there is nothing to be lowered to.
#[inline(always)]
pub(crate) fn clamp<const RARE: bool>(transport: &Transport, backend: &Backend) -> u32 {
    if RARE {
        if backend.mss == 0
            && let Some(arrival) = maps::arrival()
        {
            arrival.header = 0;
        }
        return 0;
    }
    if transport.is_syn() && backend.mss != 0 {
        cold_path();
        transport.offset as u32
    } else {
        0
    }
}

/// Notes where the TCP header of a SYN is.
#[inline(always)]
pub(crate) fn note_syn<const RARE: bool>(transport: &Transport) {
    if RARE
        && transport.is_syn()
        && let Some(arrival) = maps::arrival()
    {
        arrival.header = transport.offset as u32;
    }
}

/// Counts a packet from a backend.
#[inline(always)]
pub(crate) fn count_returned<const RARE: bool>(packet: &Packet, index: BackendIndex) {
    if let Some(counters) = maps::counters(index) {
        counters.returned_packets += 1;
        counters.returned_bytes += packet.arrived_bytes::<RARE>();
    }
}

/// The MAC addresses of the frame, destination first, as in [`Flow::eth`].
#[inline(always)]
fn eth(packet: &Packet) -> Option<&mut [u32; 3]> {
    // SAFETY: `at` checked the bounds.
    packet.at::<[u32; 3]>(0).map(|p| unsafe { &mut *p })
}

/// The MAC addresses of an answer to the frame: its source first.
#[inline(always)]
pub(crate) fn way_back(packet: &Packet) -> Option<[u32; 3]> {
    eth(packet).map(|frame| swapped([frame[0], frame[1], frame[2]]))
}

/// Two MAC addresses, with their places exchanged.
#[inline(always)]
pub(crate) const fn swapped([a, b, c]: [u32; 3]) -> [u32; 3] {
    // Six bytes of twelve change places; words are little-endian on this target.
    [b >> 16 | c << 16, c >> 16 | a << 16, a >> 16 | b << 16]
}

/// Gives the frame these MAC addresses, destination first.
#[inline(always)]
pub(crate) fn set_addresses(packet: &Packet, addresses: &[u32; 3]) -> Option<()> {
    let frame = eth(packet)?;
    frame[0] = addresses[0];
    frame[1] = addresses[1];
    frame[2] = addresses[2];
    Some(())
}

/// Gives the frame its EtherType.
#[inline(always)]
pub(crate) fn set_ethertype(packet: &Packet, ethertype_be: u16) -> Option<()> {
    let eth: *mut Eth = packet.at(0)?;
    // SAFETY: `at` checked the bounds.
    unsafe { (*eth).ethertype_be = ethertype_be };
    Some(())
}

/// A way out.
#[derive(Clone, Copy)]
pub(crate) struct Way<'a> {
    /// MAC addresses, destination first.
    pub(crate) eth: &'a [u32; 3],
    /// Outgoing interface.
    pub(crate) ifindex: u32,
    /// [`canary_ebpf_common::abi::vlan`] word of the tags there.
    pub(crate) vlan: u32,
    /// Backend that it leads to, or comes from.
    pub(crate) backend: BackendIndex,
    /// From a backend to a client.
    pub(crate) returned: bool,
    /// [`clamp`] of the packet.
    pub(crate) clamp: u32,
}

/// The way to a backend.
#[inline(always)]
pub(crate) fn to(index: BackendIndex, backend: &Backend) -> Way<'_> {
    let Backend { eth, ifindex, vlan, .. } = backend;
    Way { eth, ifindex: *ifindex, vlan: *vlan, backend: index, returned: false, clamp: 0 }
}

/// The way back to the client of a translated flow.
#[inline(always)]
pub(crate) fn back(flow: &Flow) -> Way<'_> {
    let Flow { eth, way, backend, .. } = flow;
    let backend = BackendIndex::new(*backend);
    if !way::has_tags(*way) {
        return Way { eth, ifindex: *way, vlan: 0, backend, returned: true, clamp: 0 };
    }
    cold_path();
    let ifindex = maps::tagged_interface(way::place(*way));
    Way { eth, ifindex, vlan: way::vlan(*way), backend, returned: true, clamp: 0 }
}

/// Sends the frame, which has its last form but for MAC addresses and tags.
#[inline(always)]
pub(crate) fn send<const RARE: bool>(packet: &Packet, way: Way<'_>) -> Result<u32, Reason> {
    set_addresses(packet, way.eth).ok_or(Reason::DropMalformed)?;
    if RARE && fragment::at_hand() {
        return vlan::send::<RARE>(packet, way);
    }
    out::<RARE>(packet, way)
}

/// Sends the frame, which has its last form but for tags and MSS. Nothing of it may be looked at
/// afterwards.
#[inline(always)]
pub(crate) fn out<const RARE: bool>(packet: &Packet, way: Way<'_>) -> Result<u32, Reason> {
    let noted = RARE && maps::arrival().is_some_and(|arrival| arrival.header != 0);
    if way.vlan | way.clamp != 0 || noted {
        cold_path();
        return vlan::send::<RARE>(packet, way);
    }
    off(packet, way.ifindex)
}

/// Sends the frame, which has its last form.
#[inline(always)]
pub(crate) fn off(packet: &Packet, ifindex: u32) -> Result<u32, Reason> {
    if ifindex == packet.ifindex {
        return Ok(xdp_action::XDP_TX);
    }
    maps::redirect(ifindex)
}

/// The way that the packet came by, for a flow to keep.
#[inline(always)]
pub(crate) fn way_in<const RARE: bool>(packet: &Packet) -> Result<u32, Reason> {
    match packet.way::<RARE>() {
        // Answers could not be sent.
        0 => Err(Reason::DropNoInterface),
        way => Ok(way),
    }
}

/// Counts a flow that was refused because no port is left towards its backend.
#[inline(always)]
pub(crate) fn count_refused(
    index: BackendIndex,
    opened: Result<*mut Flow, Reason>,
) -> Result<*mut Flow, Reason> {
    if let (Err(Reason::DropNoPort), Some(counters)) = (opened, maps::counters(index)) {
        counters.no_port += 1;
    }
    opened
}

/// Keeps the way back to the client as its last packet came.
#[inline(always)]
pub(crate) fn follow_client<
    const RARE: bool,
    K: nat::TupleKey,
    F: canary_ebpf_common::steer::Flows<K>,
>(
    packet: &Packet,
    flows: &F,
    flow: &mut Flow,
    protocol: u8,
) -> Result<(), Reason> {
    let way_back = way_back(packet).ok_or(Reason::DropMalformed)?;
    let way = way_in::<RARE>(packet)?;
    let differs = (flow.way ^ way)
        | (flow.eth[0] ^ way_back[0])
        | (flow.eth[1] ^ way_back[1])
        | (flow.eth[2] ^ way_back[2]);
    if differs == 0 {
        return Ok(());
    }
    cold_path();
    flow.way = way;
    flow.eth = way_back;
    let reverse = flows.lookup(&nat::opposite::<K>(flow, protocol));
    if !reverse.is_null() {
        // SAFETY: not null, so valid by the contract of `Flows`.
        unsafe {
            (*reverse).way = way;
            (*reverse).eth = way_back;
        }
    }
    Ok(())
}

/// Whether a packet to `port_be` may be a backend's answer on a translated flow.
#[inline(always)]
pub(crate) fn may_be_returned(port_be: u16) -> bool {
    let ports = maps::nat_ports();
    u16::from_be(port_be).wrapping_sub(ports.first) < ports.count
}

/// Whether a service translates.
#[inline(always)]
pub(crate) const fn translates(service: &Service) -> bool {
    use canary_ebpf_common::abi::ForwardMode;
    service.flags & ForwardMode::MASK == ForwardMode::Nat as u32
}
