//! What the loaded program should do, decided in user space by the very code of
//! `canary-ebpf-common`: hash, bucket, `steer` and `nat` over a flow table of the model's own.

use std::{collections::HashMap, hash::Hash, net::IpAddr, sync::Arc, time::Duration};

use canary_agent::plan::{BackendPlan, DataPlane, Family, ServicePlan};
use canary_ebpf_common::{
    abi::{self, Address, Backend, ForwardMode},
    entry::BackendIndex,
    hash::{bucket, hash_v4, hash_v6},
    headers::Frame,
    nat::{self, Step, TupleKey},
    ports::{self, Client, PortRange},
    quic::{self, Quic},
    steer::{Flows as _, Segment, model::ModelFlows, steer},
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

/// A frame's bytes in memory of our own.
struct Bytes<'a>(&'a mut [u8]);

// SAFETY: `at` stays within the slice, which is borrowed mutably; x86-64 and aarch64 load unaligned
// words as they are.
unsafe impl Frame for Bytes<'_> {
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let inside = offset.checked_add(size_of::<T>())? <= self.0.len();
        // SAFETY: inside the slice.
        inside.then(|| unsafe { self.0.as_ptr().add(offset).cast_mut().cast() })
    }

    fn len_bytes(&self) -> usize {
        self.0.len()
    }
}

/// What a datagram with `payload` is to a service with QUIC.
pub fn datagram(payload: &[u8]) -> Segment {
    let mut copy = payload.to_vec();
    let (quic, seq) = quic::classify(&Bytes(&mut copy), 0, payload.len());
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

/// One family's decisions.
pub struct Model<K> {
    /// Its flow table.
    pub flows: ModelFlows<K>,
    /// Source ports for translated flows.
    pub ports: PortRange,
    backends: HashMap<BackendIndex, BackendPlan>,
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
        self.backends = plane.backends.iter().copied().collect();
        *self.flows.sources.borrow_mut() =
            plane.nat_sources.iter().map(|source| address(*source)).collect();
        let flags = |b: &BackendPlan| {
            (if b.next_hop.is_some() { abi::BACKEND_USABLE } else { 0 })
                | (if b.down { abi::BACKEND_DOWN } else { 0 })
                | (if b.maint { abi::BACKEND_MAINT } else { 0 })
        };
        *self.flows.flags.borrow_mut() =
            self.backends.iter().map(|(i, b)| (*i, flags(b))).collect();
    }

    fn usable(&self, index: BackendIndex) -> Option<&BackendPlan> {
        self.backends.get(&index).filter(|b| b.next_hop.is_some() && !b.maint)
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
        if tuple.src == tuple.dst || !segment.possible() {
            return (bucket, Verdict::Drop);
        }
        let entry = service.entries[bucket as usize];
        let key: K = tuple.key();
        let sent = |backend: BackendIndex, port| match self.usable(backend) {
            Some(plan) => Verdict::Sent { backend, version: plan.version, port },
            None => Verdict::Drop,
        };
        if record.flags & ForwardMode::MASK != ForwardMode::Nat as u32 {
            // The program does not look at the payload where nothing depends on it.
            let quic = if entry.tracked() { segment.quic } else { Quic::Other };
            let steering = steer(&self.flows, record, entry, &key, Segment { quic, ..segment });
            return (bucket, sent(steering.backend, None));
        }
        if ttl <= 1 {
            return (bucket, Verdict::Drop);
        }
        let flow = match nat::step(&self.flows, record, &key, segment, ack) {
            Step::NoFlow => return (bucket, Verdict::Pass),
            Step::Follow(flow) => flow,
            Step::Open => {
                let Some(plan) = self.usable(entry.current()) else {
                    return (bucket, Verdict::Drop);
                };
                let backend = Backend {
                    addr: address(plan.addr.ip()),
                    port_be: plan.addr.port().to_be(),
                    nat_first: plan.nat_first,
                    nat_count: plan.nat_count,
                    ..Backend::default()
                };
                let client = Client {
                    addr: address(tuple.src),
                    vip: address(tuple.dst),
                    port_be: tuple.src_port.to_be(),
                    vip_port_be: tuple.dst_port.to_be(),
                    eth: [0; 3],
                    way: 0,
                };
                let opened = ports::open(
                    &self.flows,
                    record,
                    entry.current(),
                    &backend,
                    self.ports,
                    &client,
                    &key,
                    segment,
                    hash,
                );
                match opened {
                    Ok(flow) => flow,
                    Err(_) => return (bucket, Verdict::Drop),
                }
            }
        };
        // SAFETY: `step` and `open` return entries of the model's table, which nothing has changed
        // since.
        let flow = unsafe { &*flow };
        let index = BackendIndex::new(flow.backend);
        if self.backends.get(&index).is_some_and(|backend| backend.maint) {
            return (bucket, Verdict::Pass);
        }
        (bucket, sent(index, Some(u16::from_be(flow.src_port_be))))
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
        let clock = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |d| d.as_nanos() as u64)
        };
        let set = std::env::var("CANARY_SEED").ok().and_then(|s| s.parse().ok());
        let seed = set.unwrap_or_else(clock);
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
