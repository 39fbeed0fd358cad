//! Reading what the program counts, from any thread.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{IterableMap, Map, MapData, PerCpuArray};
use canary_ebpf_common::{
    abi::{BackendCounters, FlowCounters, Reason},
    entry::BackendIndex,
};

use super::{
    Census, Counted, Error, census,
    flows::FlowTable,
    pins::{Layout, Pins, cpus},
    pod, raw,
    sweep::Swept,
};
use crate::api::model::MapStatus;

/// Counters and sizes. Cheap to clone; reading never disturbs the loop.
#[derive(Clone)]
pub struct Reader {
    inner: Arc<Inner>,
}

struct Inner {
    backends: PerCpuArray<MapData, pod::BackendCounters>,
    reasons: PerCpuArray<MapData, u64>,
    flows_v4: FlowTable<pod::FlowKeyV4>,
    flows_v6: FlowTable<pod::FlowKeyV6>,
    flow_counters: PerCpuArray<MapData, pod::FlowCounters>,
    sizes: Vec<MapStatus>,
    /// Entries in use that the loop keeps count of, by map name.
    used: Mutex<Vec<(&'static str, u64)>>,
    /// What the last pass over the flow tables has found.
    flows: Mutex<Flows>,
}

/// Flows as the last pass over the tables has found them.
#[derive(Clone, Debug, Default)]
struct Flows {
    swept: Swept,
    /// By backend index, connections that are open, where every one has an entry.
    open: Vec<u32>,
}

/// Of so many backends on, counters are read many at a time.
const MANY: usize = 64;
/// So many elements at a time, at most.
const BATCH: usize = 512;

/// What all CPUs have counted.
fn sum<'a>(cpus: impl Iterator<Item = &'a BackendCounters>) -> BackendCounters {
    cpus.fold(BackendCounters::default(), |sum, one| {
        let BackendCounters {
            #[cfg(feature = "next-abi")]
                moved: _,
            packets,
            bytes,
            connections,
            returned_packets,
            returned_bytes,
            no_port,
            exhausted_ns,
        } = one;
        BackendCounters {
            #[cfg(feature = "next-abi")]
            moved: 0,
            packets: sum.packets + packets,
            bytes: sum.bytes + bytes,
            connections: sum.connections + connections,
            returned_packets: sum.returned_packets + returned_packets,
            returned_bytes: sum.returned_bytes + returned_bytes,
            no_port: sum.no_port + no_port,
            exhausted_ns: sum.exhausted_ns.max(*exhausted_ns),
        }
    })
}

impl Reader {
    pub(super) fn open(pins: &Pins, layouts: &[Layout]) -> Result<Self, Error> {
        let map = |name: &str| MapData::from_pin(pins.map(name));
        let mut sizes = Vec::new();
        for layout in layouts {
            let memory_bytes = super::memory_bytes(&pins.map(layout.name));
            sizes.push(MapStatus {
                name: layout.name.to_owned(),
                capacity: u64::from(layout.entries),
                used: None,
                memory_bytes,
            });
        }
        Ok(Self {
            inner: Arc::new(Inner {
                backends: Map::PerCpuArray(map("BACKEND_COUNTERS")?).try_into()?,
                reasons: Map::PerCpuArray(map("REASONS")?).try_into()?,
                flow_counters: Map::PerCpuArray(map("FLOW_COUNTERS")?).try_into()?,
                flows_v4: FlowTable::new(map("FLOWS_V4")?)?,
                flows_v6: FlowTable::new(map("FLOWS_V6")?)?,
                sizes,
                used: Mutex::default(),
                flows: Mutex::default(),
            }),
        })
    }

    /// Counters of `backends`, summed over CPUs, in their order; zeros for an index out of range.
    pub fn backend_counters(&self, backends: &[BackendIndex]) -> Vec<BackendCounters> {
        if backends.len() >= MANY
            && let Some(counters) = self.many_counters(backends)
        {
            return counters;
        }
        let counters = |index: &BackendIndex| {
            let values = self.inner.backends.get(&u32::from(index.get()), 0).ok()?;
            Some(sum(values.iter().map(|pod::BackendCounters(one)| one)))
        };
        backends.iter().map(|index| counters(index).unwrap_or_default()).collect()
    }

    /// The same with as few calls as will do; `None` if the kernel refuses one.
    fn many_counters(&self, backends: &[BackendIndex]) -> Option<Vec<BackendCounters>> {
        let mut counters = vec![BackendCounters::default(); backends.len()];
        // By index, each with its place in the answer.
        let mut wanted: Vec<_> = backends.iter().map(|index| index.get()).zip(0..).collect();
        wanted.sort_unstable();
        let cpus = cpus() as usize;
        let mut values = vec![pod::BackendCounters(BackendCounters::default()); BATCH * cpus];
        let map = IterableMap::<u32, _>::map(&self.inner.backends);
        let mut left = &wanted[..];
        while let [(first, _), ..] = left {
            // What lies within reach of one call, whatever lies in between.
            let reach = left.partition_point(|(index, _)| usize::from(index - first) < BATCH);
            let (now, later) = left.split_at(reach);
            let count = now.last().map_or(0, |(last, _)| usize::from(last - first) + 1);
            let values = &mut values[..count * cpus];
            let found = raw::elements(map, (*first).into(), values).ok()?;
            for (index, at) in now {
                let nth = usize::from(index - first);
                if nth < found {
                    let of_cpus: &[pod::BackendCounters] = &values[nth * cpus..][..cpus];
                    counters[*at] = sum(of_cpus.iter().map(|pod::BackendCounters(one)| one));
                }
            }
            left = later;
        }
        Some(counters)
    }

    /// Packets by reason, in the order of [`Reason::ALL`].
    pub fn reasons(&self) -> Vec<u64> {
        Reason::ALL
            .iter()
            .map(|reason| {
                self.inner.reasons.get(&(*reason as u32), 0).map_or(0, |values| values.iter().sum())
            })
            .collect()
    }

    /// Size and use of every map.
    pub fn maps(&self) -> Vec<MapStatus> {
        let used = self.inner.used.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut maps = self.inner.sizes.clone();
        for map in &mut maps {
            map.used = used.iter().find(|(name, _)| *name == map.name).map(|(_, used)| *used);
        }
        maps
    }

    /// Number of flow entries of both families, by walking them.
    ///
    /// # Errors
    /// When the kernel refuses to walk the map.
    pub fn flow_entries(&self) -> std::io::Result<[u64; 2]> {
        Ok([self.inner.flows_v4.count()?, self.inner.flows_v6.count()?])
    }

    /// Counts the open connections that have an entry, of tables and buckets of theirs.
    ///
    /// # Errors
    /// When the kernel refuses to walk a flow table.
    pub fn census(&self, wanted: &[Counted]) -> std::io::Result<Census> {
        let wanted: HashMap<u16, &Counted> =
            wanted.iter().map(|counted| (counted.record.id as u16, counted)).collect();
        let capacity = |name: &str| {
            self.inner.sizes.iter().find(|map| map.name == name).map_or(0, |map| map.capacity)
        };
        let now_ns = super::monotonic_ns().map_err(std::io::Error::other)?;
        let Inner { flows_v4, flows_v6, .. } = &*self.inner;
        let mut census = census::count(flows_v4, capacity("FLOWS_V4"), &wanted, now_ns)?;
        census.add(census::count(flows_v6, capacity("FLOWS_V6"), &wanted, now_ns)?);
        Ok(census)
    }

    /// What became of flow entries, summed over CPUs.
    pub fn flow_counters(&self) -> FlowCounters {
        let Ok(values) = self.inner.flow_counters.get(&0, 0) else {
            return FlowCounters::default();
        };
        values.iter().fold(FlowCounters::default(), |sum, pod::FlowCounters(one)| {
            let FlowCounters { stored, let_go, taken_over, untracked } = one;
            FlowCounters {
                stored: sum.stored + stored,
                let_go: sum.let_go + let_go,
                taken_over: sum.taken_over + taken_over,
                untracked: sum.untracked + untracked,
            }
        })
    }

    /// What the last pass over the flow tables has found.
    pub fn swept(&self) -> Swept {
        self.inner.flows.lock().unwrap_or_else(PoisonError::into_inner).swept
    }

    /// Entries of open flows to a backend, as the last pass over the flow tables has found them.
    /// Of a translated flow one of the two counts.
    pub fn open_flows(&self, backend: BackendIndex) -> u32 {
        let flows = self.inner.flows.lock().unwrap_or_else(PoisonError::into_inner);
        flows.open.get(usize::from(backend.get())).copied().unwrap_or(0)
    }

    pub(super) fn set_flows(&self, swept: Swept, open: Vec<u32>) {
        self.set_used(vec![("FLOWS_V4", swept.kept[0]), ("FLOWS_V6", swept.kept[1])]);
        let mut flows = self.inner.flows.lock().unwrap_or_else(PoisonError::into_inner);
        *flows = Flows { swept, open };
    }

    pub(super) fn set_used(&self, used: Vec<(&'static str, u64)>) {
        let mut kept = self.inner.used.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, count) in used {
            match kept.iter_mut().find(|(n, _)| *n == name) {
                Some(slot) => slot.1 = count,
                None => kept.push((name, count)),
            }
        }
    }
}
