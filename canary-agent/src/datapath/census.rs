//! Counting open connections by what the flow tables hold.
//!
//! From any thread, and without a change to anything. Of a table with more than 262,144
//! entries a part is counted and the rest inferred: the kernel's hash spreads entries evenly.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    io,
};

use aya::Pod;
use canary_ebpf_common::{
    abi::{self, Flow, FlowKeyV4, FlowKeyV6, flow_state as state},
    entry::BackendIndex,
    hash, nat,
};

use super::{
    flows::{FlowKey, FlowTable, expired},
    pod,
};
use crate::plan::BucketSet;

/// Batches of a flow table that are looked at.
const BATCHES: usize = 64;

/// What is to be counted of a service's table.
#[derive(Clone, Debug)]
pub struct Counted {
    /// Its record.
    pub record: abi::Service,
    /// Buckets whose connections are counted by themselves.
    pub buckets: BucketSet,
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Open connections that have an entry, by backend.
    pub by_backend: HashMap<BackendIndex, u64>,
    /// Those of the buckets that were asked for.
    pub in_buckets: u64,
    /// The same by table.
    pub by_table: HashMap<u16, u64>,
}

impl Census {
    /// Adds what another table's entries came to.
    pub(super) fn add(&mut self, other: Self) {
        let Self { by_backend, in_buckets, by_table } = other;
        self.in_buckets += in_buckets;
        by_table.into_iter().for_each(|(id, n)| *self.by_table.entry(id).or_default() += n);
        by_backend.into_iter().for_each(|(i, n)| *self.by_backend.entry(i).or_default() += n);
    }
}

/// A flow key that says which bucket its connection is of.
pub(super) trait Key: FlowKey + Pod + Copy {
    /// The tuple, to be compared.
    type Tuple: Eq + Hash;
    /// It.
    fn tuple(&self) -> Self::Tuple;
    /// The bucket of a client's packet with this key.
    fn bucket(&self, service: &abi::Service) -> u32;
}

impl Key for pod::FlowKeyV4 {
    type Tuple = FlowKeyV4;

    fn tuple(&self) -> FlowKeyV4 {
        self.0
    }

    fn bucket(&self, service: &abi::Service) -> u32 {
        let k = self.0;
        let (src_port_be, dst_port_be) = (k.ports.src_be(), k.ports.dst_be());
        let protocol = k.protocol as u8;
        let hash = hash::hash_v4(service, k.src_be, k.dst_be, src_port_be, dst_port_be, protocol);
        hash::bucket(service, hash)
    }
}

impl Key for pod::FlowKeyV6 {
    type Tuple = FlowKeyV6;

    fn tuple(&self) -> FlowKeyV6 {
        self.0
    }

    fn bucket(&self, service: &abi::Service) -> u32 {
        let k = self.0;
        let (src_port_be, dst_port_be) = (k.ports.src_be(), k.ports.dst_be());
        let protocol = k.protocol as u8;
        let hash = hash::hash_v6(service, k.src, k.dst, src_port_be, dst_port_be, protocol);
        hash::bucket(service, hash)
    }
}

/// Counts the open connections of `wanted` (by table id) in a flow table for `capacity` entries.
///
/// A connection counts from its first confirmed packet to the first sign of its end. What a
/// translated one has come to is said by its two entries together.
pub(super) fn count<K: Key>(
    table: &FlowTable<K>,
    capacity: u64,
    wanted: &HashMap<u16, &Counted>,
    now_ns: u64,
) -> io::Result<Census> {
    let mut counts: HashMap<(u16, BackendIndex), [u64; 2]> = HashMap::new();
    let mut not_counted: HashSet<K::Tuple> = HashSet::new();
    let mut closed: Vec<(K::Tuple, (u16, BackendIndex), bool)> = Vec::new();
    let position = table.look(BATCHES, |key: K, pod::Flow(flow): pod::Flow| {
        let Some(Counted { record, buckets }) = wanted.get(&flow.service) else {
            return;
        };
        let (key, reverse) = match flow.state & state::REVERSE != 0 {
            true => (key.opposite(&flow), true),
            false => (key, false),
        };
        let at = (flow.service, BackendIndex::new(flow.backend));
        let asked = || buckets.contains(key.bucket(record));
        if reverse {
            if flow.state & state::SERVER_CLOSING != 0 {
                closed.push((key.tuple(), at, asked()));
            }
        } else if is_over(&flow, record, now_ns) {
            not_counted.insert(key.tuple());
        } else {
            let count = counts.entry(at).or_default();
            *count = [count[0] + 1, count[1] + u64::from(asked())];
        }
    })?;
    for (_, at, asked) in closed.into_iter().filter(|(key, ..)| !not_counted.contains(key)) {
        let count = counts.entry(at).or_default();
        *count = [count[0].saturating_sub(1), count[1].saturating_sub(u64::from(asked))];
    }
    let whole = whole(position, capacity);
    let scaled = |count: u64| (count as f64 * whole).round() as u64;
    let (mut by_table, mut by_backend) = (HashMap::new(), HashMap::new());
    for ((id, index), [all, asked]) in &counts {
        *by_table.entry(*id).or_default() += asked;
        *by_backend.entry(*index).or_default() += all;
    }
    Ok(Census {
        in_buckets: scaled(by_table.values().sum()),
        by_backend: by_backend.into_iter().map(|(index, all)| (index, scaled(all))).collect(),
        by_table: by_table.into_iter().map(|(id, asked)| (id, scaled(asked))).collect(),
    })
}

/// Whether the client's side of a connection says that it is not open: half-open, closing,
/// or a UDP flow that has been silent for too long.
fn is_over(flow: &Flow, service: &abi::Service, now_ns: u64) -> bool {
    let udp = flow.state & state::UDP != 0;
    let udp_idle_ns = u64::from(service.udp_idle_ms) * 1_000_000;
    let bits = nat::bits(flow);
    let ended = state::CLOSING | state::RESET | state::SERVER_RESET;
    // A reset that somebody goes on after is taken back, and the connection counted again.
    nat::opening(bits)
        || bits & ended != 0
        || udp && expired(flow.state, now_ns.saturating_sub(flow.last_ns), udp_idle_ns)
}

/// How many times what was seen the whole table is. The kernel's token is the hash bucket
/// that comes next, of as many as a power of two that holds the capacity
/// (`kernel/bpf/hashtab.c`, `__htab_map_lookup_and_delete_batch`).
fn whole(position: Option<u32>, capacity: u64) -> f64 {
    match position {
        None | Some(0) => 1.0,
        Some(next) => capacity.next_power_of_two().max(u64::from(next)) as f64 / f64::from(next),
    }
}
