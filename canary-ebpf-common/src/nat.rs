//! Translated flows: two entries each, one for either direction.
//!
//! A forward entry stands under the client's tuple, a reverse entry under the
//! tuple that the backend's answers carry. The reverse entry is stored first:
//! it is what claims the source port.

use crate::{
    abi::{
        Address, BACKEND_MAINT, Backend, Flow, FlowKeyV4, FlowKeyV6, IPPROTO_TCP, Reason, Service,
        flow_state as state,
    },
    entry::BackendIndex,
    quic::Quic,
    steer::{Flows, Inserted, Segment, TCP_FIN, TCP_RST, quic_renews, unfit},
};

/// Source ports that are tried for a new flow before it is refused.
pub const PORT_ATTEMPTS: u32 = 16;

/// A five-tuple of either family.
pub trait TupleKey: Copy {
    /// The tuple of a packet; an IPv4 address lies in the first four bytes.
    fn tuple(src: Address, dst: Address, src_port_be: u16, dst_port_be: u16, protocol: u8) -> Self;
}

impl TupleKey for FlowKeyV4 {
    #[inline(always)]
    fn tuple(src: Address, dst: Address, src_port_be: u16, dst_port_be: u16, protocol: u8) -> Self {
        Self {
            src_be: src[0] as u32,
            dst_be: dst[0] as u32,
            src_port_be,
            dst_port_be,
            protocol: protocol as u32,
        }
    }
}

impl TupleKey for FlowKeyV6 {
    #[inline(always)]
    fn tuple(src: Address, dst: Address, src_port_be: u16, dst_port_be: u16, protocol: u8) -> Self {
        Self {
            src: [src[0], src[1]],
            dst: [dst[0], dst[1]],
            src_port_be,
            dst_port_be,
            protocol: protocol as u32,
        }
    }
}

/// The key under which the other direction of a translated flow stands.
#[inline(always)]
pub fn opposite<K: TupleKey>(flow: &Flow, protocol: u8) -> K {
    K::tuple(flow.dst, flow.src, flow.dst_port_be, flow.src_port_be, protocol)
}

/// What to do with a client's packet of a translated service.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Translate as this entry says.
    Follow(*mut Flow),
    /// Open a flow to the bucket's current backend; an entry that stood under
    /// the tuple has been taken away.
    Open,
    /// Belongs to no flow and opens none.
    NoFlow,
}

/// Looks a client's packet up and brings its entry up to date.
#[inline(always)]
pub fn step<K: TupleKey, F: Flows<K>>(
    flows: &F,
    service: &Service,
    key: &K,
    segment: Segment,
) -> Step {
    let pointer = flows.lookup(key);
    let tcp = segment.protocol == IPPROTO_TCP;
    if pointer.is_null() {
        return if tcp && !segment.opens() { Step::NoFlow } else { Step::Open };
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let flow = unsafe { &mut *pointer };
    let now = flows.now_ns();
    let was = flow.state;
    if tcp && !segment.opens() {
        let mut becomes = was & !(state::CLOSING | state::PROVISIONAL);
        if segment.tcp_flags & (TCP_FIN | TCP_RST) != 0 {
            becomes |= state::CLOSING;
        }
        if was != becomes {
            flow.state = becomes;
        }
        flow.last_ns = now;
        return Step::Follow(pointer);
    }
    let backend = BackendIndex::new(flow.backend);
    let flags = flows.backend_flags(backend);
    let reverse: K = opposite(flow, segment.protocol);
    let renew = if tcp {
        // A SYN on a tuple that has a flow: a retransmission, or the tuple is used again.
        let over = state::PROVISIONAL | state::CLOSING;
        flags & BACKEND_MAINT != 0
            || (unfit(flags) && was & state::PROVISIONAL != 0)
            || (flow.syn_seq != segment.seq
                && (was & over != 0 || unfit(flags) || closed_by_server(flows, &reverse)))
    } else {
        flags & BACKEND_MAINT != 0 || {
            let silent_ns = udp_silent_ns(flows, flow, &reverse, now);
            match segment.quic {
                Quic::Initial => quic_renews(flows, service, flow, segment, silent_ns),
                _ if was & state::QUIC != 0 => false,
                _ => silent_ns > service.udp_idle_ns(),
            }
        }
    };
    if !renew {
        // Any packet but an Initial says that the handshake goes on: here no older connection
        // than the flow can be on the tuple, which a forged one would carry off.
        if was & (state::QUIC | state::PROVISIONAL) == state::QUIC | state::PROVISIONAL
            && !matches!(segment.quic, Quic::Initial | Quic::Other)
        {
            flow.state = was & !state::PROVISIONAL;
        }
        flow.last_ns = now;
        return Step::Follow(pointer);
    }
    flows.remove(&reverse);
    flows.remove(key);
    Step::Open
}

/// Whether the server has sent a FIN or RST. The client's side alone does not tell: its last
/// acknowledgement takes its own FIN's mark away.
#[inline(always)]
fn closed_by_server<K, F: Flows<K>>(flows: &F, reverse: &K) -> bool {
    let reverse = flows.lookup(reverse);
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    !reverse.is_null() && unsafe { (*reverse).state } & state::SERVER_CLOSING != 0
}

/// For how long neither direction of a UDP flow has had a packet.
#[inline(always)]
fn udp_silent_ns<K, F: Flows<K>>(flows: &F, flow: &Flow, reverse: &K, now: u64) -> u64 {
    let forward = now.saturating_sub(flow.last_ns);
    if forward <= 1_000_000_000 {
        return 0;
    }
    let reverse = flows.lookup(reverse);
    if reverse.is_null() {
        return forward;
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let reverse = now.saturating_sub(unsafe { (*reverse).last_ns });
    if reverse < forward { reverse } else { forward }
}

/// Marks a backend's packet on its reverse entry.
#[inline(always)]
pub fn returned(flow: &mut Flow, segment: Segment, now: u64) {
    if segment.tcp_flags & (TCP_FIN | TCP_RST) != 0 && flow.state & state::SERVER_CLOSING == 0 {
        flow.state |= state::SERVER_CLOSING;
    }
    flow.last_ns = now;
}

/// The range of source ports for translated flows, host order.
#[derive(Clone, Copy, Debug)]
pub struct PortRange {
    /// The first one.
    pub first: u16,
    /// How many there are.
    pub count: u16,
}

/// A client's side of a new flow.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// The client's address.
    pub addr: Address,
    /// The virtual address.
    pub vip: Address,
    /// The client's port.
    pub port_be: u16,
    /// The service's port.
    pub vip_port_be: u16,
    /// Destination and source MAC address of frames to the client, as in [`Flow::eth`].
    pub eth: [u32; 3],
    /// Interface towards the client.
    pub ifindex: u32,
}

/// A number that the port tried first follows from. The packet's hash is not enough: it is one
/// and the same for all connections of a client, or of a subnet, that sticks to a backend.
#[inline(always)]
const fn first_candidate(client: &Client, hash: u64) -> u32 {
    let [a, b] = client.addr;
    let tuple = hash ^ a ^ b.rotate_left(32) ^ client.port_be as u64;
    // Twice: neighbouring ports are as good as random only then.
    let mixed = tuple.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ mixed >> 32).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
}

/// Claims a source port and stores both entries of a new flow.
///
/// `hash` is the packet's hash; with the client's address and port it says which port is
/// tried first.
/// Returns the forward entry, which may be another CPU's for the same flow.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "always inlined; each is a different thing")]
pub fn open<K: TupleKey, F: Flows<K>>(
    flows: &F,
    service: &Service,
    index: BackendIndex,
    backend: &Backend,
    source: Address,
    ports: PortRange,
    client: &Client,
    key: &K,
    segment: Segment,
    hash: u64,
) -> Result<*mut Flow, Reason> {
    let opened = if segment.protocol == IPPROTO_TCP {
        state::NAT | state::PROVISIONAL
    } else if matches!(segment.quic, Quic::Initial) {
        state::NAT | state::QUIC | state::PROVISIONAL
    } else {
        state::NAT | state::UDP
    };
    let mut flow = Flow {
        last_ns: flows.now_ns(),
        state: opened | state::REVERSE,
        syn_seq: segment.seq,
        src: client.vip,
        dst: client.addr,
        src_port_be: client.vip_port_be,
        dst_port_be: client.port_be,
        backend: index.get(),
        service: service.id as u16,
        eth: client.eth,
        ifindex: client.ifindex,
    };
    let mut claimed = 0;
    let mut candidate = first_candidate(client, hash);
    let mut attempt = 0;
    while attempt < PORT_ATTEMPTS {
        // A product's high half instead of a remainder: even, and no division by the range.
        let offset = (((candidate & 0xffff) * ports.count as u32) >> 16) as u16;
        let port_be = ports.first.wrapping_add(offset).to_be();
        let answer = K::tuple(backend.addr, source, backend.port_be, port_be, segment.protocol);
        match flows.insert(&answer, &flow) {
            Inserted::Stored => {
                claimed = port_be;
                break;
            }
            Inserted::Full => return Err(Reason::DropFlowTableFull),
            Inserted::Exists => {}
        }
        candidate = candidate.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15) ^ candidate >> 16;
        attempt += 1;
    }
    if claimed == 0 {
        return Err(Reason::DropNoPort);
    }
    let answer = K::tuple(backend.addr, source, backend.port_be, claimed, segment.protocol);
    // From here on it is the forward entry.
    flow.state = opened;
    flow.src = source;
    flow.dst = backend.addr;
    flow.src_port_be = claimed;
    flow.dst_port_be = backend.port_be;
    let stored = flows.insert(key, &flow);
    if stored != Inserted::Stored {
        flows.remove(&answer);
    }
    let forward = flows.lookup(key);
    if stored == Inserted::Full || forward.is_null() {
        return Err(Reason::DropFlowTableFull);
    }
    Ok(forward)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::steer::{TCP_SYN, model::ModelFlows};

    /// A flow table that counts how often something is to be stored.
    struct Counting {
        flows: ModelFlows<FlowKeyV4>,
        inserts: Cell<u32>,
    }

    // SAFETY: as the table within.
    unsafe impl Flows<FlowKeyV4> for Counting {
        fn lookup(&self, key: &FlowKeyV4) -> *mut Flow {
            self.flows.lookup(key)
        }

        fn insert(&self, key: &FlowKeyV4, flow: &Flow) -> Inserted {
            self.inserts.set(self.inserts.get() + 1);
            self.flows.insert(key, flow)
        }

        fn remove(&self, key: &FlowKeyV4) {
            self.flows.remove(key);
        }

        fn backend_flags(&self, backend: BackendIndex) -> u32 {
            self.flows.backend_flags(backend)
        }

        fn now_ns(&self) -> u64 {
            self.flows.now_ns()
        }
    }

    #[test]
    fn connections_with_one_hash_find_ports_as_quickly_as_with_many() {
        let flows = Counting { flows: ModelFlows::new(1 << 20), inserts: Cell::new(0) };
        let service = Service::default();
        let backend = Backend { addr: [2, 0], port_be: 80, ..Backend::default() };
        let ports = PortRange { first: 10_000, count: 10_000 };
        let opened = 2_000_u16;
        for port in 0..opened {
            let client = Client {
                addr: [1, 0],
                vip: [3, 0],
                port_be: (30_000 + port).to_be(),
                vip_port_be: 80,
                eth: [0; 3],
                ifindex: 1,
            };
            let key = FlowKeyV4::tuple(client.addr, client.vip, client.port_be, 80, IPPROTO_TCP);
            let segment = Segment::tcp(TCP_SYN, 1);
            let index = BackendIndex::new(1);
            open(&flows, &service, index, &backend, [4, 0], ports, &client, &key, segment, 77)
                .unwrap_or_else(|reason| panic!("connection {port}: {}", reason.name()));
        }
        // One insertion for the forward entry and one for each port that is tried: with a fifth
        // of the ports in use at the end, 1.1 of them in the mean.
        let tried = f64::from(flows.inserts.get()) / f64::from(opened) - 1.0;
        assert!(tried < 1.2, "{tried} ports were tried for a connection");
    }
}
