//! What the loaded program should do with a packet that is described, decided in user space by
//! `canary-ebpf-common` over a data plane. What becomes of a frame's bytes: [`mod@model`] there.

use std::{collections::HashMap, hash::Hash, net::IpAddr, sync::Arc, time::Duration};

use canary_agent::plan::{BackendPlan, DataPlane, Family, ServicePlan};
use canary_ebpf_common::{
    abi::{self, Address, Backend, ForwardMode, ReasonVerdict},
    entry::BackendIndex,
    hash::{bucket, hash_v4, hash_v6},
    headers::Bytes,
    model,
    nat::{self, TupleKey},
    ports::{Client, PortRange},
    quic,
    steer::{Flows as _, Segment, model::ModelFlows},
};

/// An address as map keys and values hold it.
pub fn address(addr: IpAddr) -> Address {
    let mut bytes = [0; 16];
    match addr {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes = v6.octets(),
    }
    let (halves, _) = bytes.as_chunks::<8>();
    [halves[0], halves[1]].map(u64::from_ne_bytes)
}

/// Who a client's packet is from and to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// The client's address.
    pub src: IpAddr,
    /// The virtual address.
    pub dst: IpAddr,
    /// The client's port, host order.
    pub src_port: u16,
    /// The service's port, host order.
    pub dst_port: u16,
    /// TCP or UDP.
    pub protocol: u8,
}

impl Tuple {
    /// The key of its flow entry.
    pub fn key<K: TupleKey>(&self) -> K {
        let Self { src, dst, src_port, dst_port, protocol } = *self;
        K::tuple(address(src), address(dst), src_port.to_be(), dst_port.to_be(), protocol)
    }

    /// Its hash for a service.
    pub fn hash(&self, service: &abi::Service) -> u64 {
        let Self { src, dst, src_port, dst_port, protocol } = *self;
        let (a, b) = (address(src), address(dst));
        let (p, q) = (src_port.to_be(), dst_port.to_be());
        match src {
            IpAddr::V4(_) => hash_v4(service, a[0] as u32, b[0] as u32, p, q, protocol),
            IpAddr::V6(_) => hash_v6(service, a, b, p, q, protocol),
        }
    }
}

/// What a datagram with `payload` is to a service with QUIC.
pub fn datagram(payload: &[u8]) -> Segment {
    let (quic, seq) = quic::classify(&Bytes(payload.to_vec()), 0, payload.len());
    Segment { seq, quic, ..Segment::udp() }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes to the host.
    Pass,
    /// It is dropped.
    Drop,
    /// It is sent to a backend.
    Sent {
        /// The backend.
        backend: BackendIndex,
        /// Its version.
        version: u8,
        /// The source port that it got, host order, if it is translated.
        port: Option<u16>,
    },
}

/// What the program knows of a backend, as far as decisions depend on it.
fn record(plan: &BackendPlan) -> Backend {
    Backend {
        addr: address(plan.addr.ip()),
        port_be: plan.addr.port().to_be(),
        version: plan.version,
        nat_first: plan.nat_first,
        nat_count: plan.nat_count,
        flags: (if plan.next_hop.is_some() { abi::BACKEND_USABLE } else { 0 })
            | (if plan.down { abi::BACKEND_DOWN } else { 0 })
            | (if plan.maint { abi::BACKEND_MAINT } else { 0 }),
        ..Backend::default()
    }
}

/// One family's decisions.
pub struct Model<K> {
    /// Its flow table.
    pub flows: ModelFlows<K>,
    /// Source ports for translated flows.
    pub ports: PortRange,
    backends: HashMap<BackendIndex, Backend>,
}

impl<K: TupleKey + Eq + Hash> Model<K> {
    /// A model of a data plane with room for `flows` entries.
    pub fn new(plane: &DataPlane, flows: u32, ports: PortRange) -> Self {
        let flows = ModelFlows::new(flows as usize);
        let mut model = Self { flows, ports, backends: HashMap::new() };
        model.apply(plane);
        model
    }

    /// Takes another data plane.
    pub fn apply(&mut self, plane: &DataPlane) {
        self.backends = plane.backends.iter().map(|(i, b)| (*i, record(b))).collect();
        *self.flows.sources.borrow_mut() =
            plane.nat_sources.iter().map(|source| address(*source)).collect();
        *self.flows.flags.borrow_mut() = self.backends.iter().map(|(i, b)| (*i, b.flags)).collect();
    }

    /// The bucket of a client's well-formed packet, and what becomes of it.
    pub fn decide(
        &self,
        service: &Arc<ServicePlan>,
        tuple: &Tuple,
        segment: Segment,
        ack: u32,
        ttl: u8,
    ) -> (u32, Verdict) {
        let record = &service.record;
        let hash = tuple.hash(record);
        let bucket = bucket(record, hash);
        let translated = record.flags & ForwardMode::MASK == ForwardMode::Nat as u32;
        if tuple.src == tuple.dst || !segment.possible() || translated && ttl <= 1 {
            return (bucket, Verdict::Drop);
        }
        let client = Client {
            addr: address(tuple.src),
            vip: address(tuple.dst),
            port_be: tuple.src_port.to_be(),
            vip_port_be: tuple.dst_port.to_be(),
            eth: [0; 3],
            way: 1,
        };
        let decided = model::decide(
            &self.flows,
            self.ports,
            |index| self.backends.get(&index),
            record,
            service.entries[bucket as usize],
            hash,
            &tuple.key(),
            segment,
            ack,
            &client,
        );
        let verdict = match decided {
            Ok((backend, flow)) => Verdict::Sent {
                backend,
                version: self.backends[&backend].version,
                port: flow.map(|flow| u16::from_be(flow.src_port_be)),
            },
            Err(reason) if matches!(reason.verdict(), ReasonVerdict::Pass) => Verdict::Pass,
            Err(_) => Verdict::Drop,
        };
        (bucket, verdict)
    }

    /// Takes a backend's answer on the translated flow of `tuple`. Returns whether there is one.
    pub fn answer(&self, tuple: &Tuple, segment: Segment, ack: u32) -> bool {
        let Some(forward) = self.flows.get(&tuple.key()) else { return false };
        let reverse = self.flows.lookup(&nat::opposite(&forward, tuple.protocol));
        if reverse.is_null() {
            return false;
        }
        // SAFETY: not null, so an entry of the model's table, which nothing has changed since.
        let reverse = unsafe { &mut *reverse };
        nat::returned::<K, _>(&self.flows, reverse, segment, ack, self.flows.now_ns());
        true
    }

    /// Says when an entry's last packet came.
    pub fn stamp(&self, key: &K, last_ns: u64) {
        let flow = self.flows.lookup(key);
        if !flow.is_null() {
            // SAFETY: not null, so an entry of the model's table, which nothing has changed since.
            unsafe { (*flow).last_ns = last_ns };
        }
    }

    /// Sets the last packets of `tuple`'s entries back by `time_ns`.
    pub fn silence(&self, tuple: &Tuple, time_ns: u64) {
        let age = |key: &K| {
            let flow = self.flows.lookup(key);
            if !flow.is_null() {
                // SAFETY: not null, so an entry of the model's table, which nothing has changed
                // since.
                let flow = unsafe { &mut *flow };
                flow.last_ns = flow.last_ns.saturating_sub(time_ns);
            }
        };
        let key: K = tuple.key();
        age(&key);
        if let Some(forward) = self.flows.get(&key)
            && forward.state & abi::flow_state::NAT != 0
        {
            age(&nat::opposite(&forward, tuple.protocol));
        }
    }
}

/// The family of an address.
pub const fn family(addr: IpAddr) -> Family {
    match addr {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// Random numbers that a seed gives again (Steele, Lea and Flood, *SplitMix*, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Those that `seed` gives.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Those of the environment's `CANARY_SEED`, else of the clock's; says which.
    pub fn from_environment(purpose: &str) -> Self {
        let seed = crate::asked::seed();
        println!("{purpose}: CANARY_SEED={seed}");
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.bits() % end
    }

    /// A time from `least` to `most`, whole microseconds.
    pub fn between(&mut self, least: Duration, most: Duration) -> Duration {
        let range = most.saturating_sub(least).as_micros() as u64;
        least + Duration::from_micros(self.below(range + 1))
    }

    /// One of `all`.
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}
