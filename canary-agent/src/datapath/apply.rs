//! Bringing the maps to what is desired, in an order in which no packet meets
//! half a change.

use std::{
    collections::{BTreeMap, HashMap as StdMap, HashSet},
    io,
    sync::{Arc, atomic::Ordering},
};

use aya::{
    maps::{Array, HashMap, MapData, PerCpuArray, PerCpuValues, xdp::DevMapHash},
    util::nr_cpus,
};
use canary_ebpf_common::{
    abi::{self, PAGE_BUCKETS, way},
    entry::{BackendIndex, Entry},
};

use super::{
    Error,
    classes::ClassMaps,
    mapping::{Mapping, Pages, store},
    panic::Marks,
    pod,
    vips::{VipTable, vips},
};
use crate::{
    failpoint::Failpoint,
    parallel,
    plan::{BackendPlan, DataPlane, Family, InterfaceMacs, ServicePlan},
};

/// What an `apply` changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Entries of forwarding tables.
    pub entries: usize,
    /// Backend records.
    pub backends: usize,
    /// Buckets whose tracking ended.
    pub untracked: usize,
    /// Networks of clients whose class became another, or is remembered no more.
    pub networks: usize,
}

/// The maps that the loop writes.
pub(super) struct Maps {
    pub(super) info: Array<MapData, pod::ServiceInfo>,
    pub(super) vips_v4: VipTable,
    pub(super) vips_v6: VipTable,
    pub(super) table: Arc<Pages>,
    pub(super) ledger: Pages,
    pub(super) backends: Mapping,
    pub(super) nat_sources: Array<MapData, abi::Address>,
    pub(super) macs: HashMap<MapData, pod::MacKey, u32>,
    pub(super) first_macs: Array<MapData, u64>,
    pub(super) tagged: Array<MapData, u32>,
    pub(super) counters: PerCpuArray<MapData, pod::BackendCounters>,
    pub(super) tx_ports: DevMapHash<MapData>,
    pub(super) classes: ClassMaps,
    pub(super) marks: Marks,
    /// How often tables had been written behind our back when they were read.
    pub(super) known: u64,
}

/// 64-bit words of a backend record.
const RECORD_WORDS: usize = size_of::<abi::Backend>() / 8;

impl Maps {
    /// The record at `index`, if the map holds so many.
    pub(super) fn backend(&self, index: BackendIndex) -> Option<abi::Backend> {
        record(&self.backends, index)
    }

    /// Stores a record word by word; the MAC address of the next hop and half of our own
    /// change in one store.
    fn store_backend(&self, index: BackendIndex, record: &abi::Backend) -> Result<bool, Error> {
        let start = usize::from(index.get()) * RECORD_WORDS;
        let words = self
            .backends
            .words64()
            .get(start..start + RECORD_WORDS)
            .ok_or(Error::OutOfRange { what: "backend", index: index.get().into() })?;
        // SAFETY: same size, and padding is spelled out: no byte is uninitialised.
        let new = unsafe { std::mem::transmute::<abi::Backend, [u64; RECORD_WORDS]>(*record) };
        let mut stored = false;
        store(words, None, &new, || true, |_, _| stored = true);
        Ok(stored)
    }

    /// Packets that were sent to `backends` altogether.
    pub(super) fn packets(
        &self,
        backends: impl Iterator<Item = BackendIndex>,
    ) -> Result<u64, Error> {
        let mut packets = 0;
        for index in backends {
            let counters = self.counters.get(&index.get().into(), 0)?;
            packets += counters.iter().map(|pod::BackendCounters(one)| one.packets).sum::<u64>();
        }
        Ok(packets)
    }

    /// Number of records that the map holds.
    fn backend_indices(&self) -> u16 {
        indices(&self.backends)
    }

    fn tables(&self) -> Tables<'_> {
        let Self { table, ledger, marks, known, .. } = self;
        Tables { table, ledger, marks, known: *known }
    }

    /// Brings the maps from `before` (what was applied last, if anything) to `desired`.
    pub(super) fn apply(
        &mut self,
        before: Option<&DataPlane>,
        desired: &DataPlane,
    ) -> Result<Applied, Error> {
        let DataPlane { services, backends, nat_sources, classes, sweep: _ } = desired;
        let mut applied = Applied::default();
        if before.is_none_or(|b| b.nat_sources != *nat_sources) {
            for (i, source) in nat_sources.iter().enumerate() {
                self.nat_sources.set(i as u32, abi::address(*source), 0)?;
            }
        }
        // A backend goes into maintenance when nothing names it any more for new connections.
        let maintained = self.maintained(backends);
        applied.backends += self.store_backends(before, backends, &maintained)?;
        Failpoint::BackendsWritten.pass();
        let old: StdMap<_, _> =
            before.iter().flat_map(|b| &b.services).map(|s| (s.record.id, s)).collect();
        let pairs = services.iter().map(|service| (old.get(&service.record.id).copied(), service));
        let changed: Vec<(Option<&ServicePlan>, &ServicePlan)> = pairs
            .filter(|(old, service)| old.is_none_or(|old| !Arc::ptr_eq(old, service)))
            .map(|(old, service)| (old.map(|old| &**old), &**service))
            .collect();
        // A few are written before a thread has started.
        let buckets = match changed.len() {
            0..=2 => 0,
            _ => changed.iter().map(|(_, service)| service.entries.len()).sum(),
        };
        let tables = self.tables();
        let store = |(old, service)| tables.store(old, service);
        let stored = parallel::map(changed.clone(), buckets, store);
        for (stored, (old, service)) in stored.into_iter().zip(changed) {
            let Applied { entries, untracked, .. } = stored?;
            applied.entries += entries;
            applied.untracked += untracked;
            if old.is_none_or(|o| info(o) != info(service)) {
                self.info.set(service.record.id, pod::ServiceInfo(info(service)), 0)?;
            }
        }
        // A word that was stored just when somebody else began to write.
        if self.marks.count() != self.known {
            return Err(Error::Interrupted);
        }
        Failpoint::TablesWritten.pass();
        for (index, plan) in backends.iter().filter(|(index, _)| maintained.contains(index)) {
            applied.backends += usize::from(self.store_backend(*index, &plan.record())?);
        }
        let unchanged = before.is_some_and(|b| {
            b.services.len() == services.len()
                && b.services.iter().zip(services).all(|(old, new)| same_address(old, new))
        });
        if !unchanged {
            let [v4, v6] = vips(services.iter().map(|s| &**s));
            self.vips_v4.store(&v4)?;
            self.vips_v6.store(&v6)?;
            Failpoint::AddressesWritten.pass();
        }
        // Of services that are found by now, to tables that are written; and before what is gone.
        applied.networks += self.classes.store(before.map(|b| &b.classes), classes)?;
        // Records that nothing names any more.
        let named: HashSet<_> = backends.iter().map(|(index, _)| *index).collect();
        let gone: Vec<_> = match before {
            Some(b) => b.backends.iter().map(|(i, _)| *i).filter(|i| !named.contains(i)).collect(),
            None => (1..self.backend_indices())
                .map(BackendIndex::new)
                .filter(|i| !named.contains(i))
                .collect(),
        };
        let cleared = applied.backends;
        for index in gone {
            applied.backends += usize::from(self.store_backend(index, &abi::Backend::default())?);
        }
        if applied.backends > cleared {
            Failpoint::RecordsCleared.pass();
        }
        // Whoever reads the directory next must not find pages there that others have by then.
        let ids: HashSet<_> = services.iter().map(|s| s.record.id).collect();
        let listed: Vec<u32> = match before {
            Some(before) => before.services.iter().map(|s| s.record.id).collect(),
            None => (0..self.info.len()).collect(),
        };
        for id in listed.into_iter().filter(|id| !ids.contains(id)) {
            let pod::ServiceInfo(found) = self.info.get(&id, 0)?;
            if found != EMPTY_INFO {
                self.info.set(id, pod::ServiceInfo(EMPTY_INFO), 0)?;
                // What may be listed there next has nothing to do with it.
                self.marks.forget(id as u16);
            }
        }
        Ok(applied)
    }

    /// Backends that the maps do not have in maintenance yet, and should.
    fn maintained(&self, backends: &[(BackendIndex, BackendPlan)]) -> HashSet<BackendIndex> {
        let there = |index| {
            self.backend(index).is_some_and(|record| record.flags & abi::BACKEND_MAINT != 0)
        };
        let wanted = backends.iter().filter(|(_, plan)| plan.maint).map(|(index, _)| *index);
        wanted.filter(|index| !there(*index)).collect()
    }

    /// Stores the records that differ; `maintained` not in maintenance yet.
    fn store_backends(
        &mut self,
        before: Option<&DataPlane>,
        backends: &[(BackendIndex, BackendPlan)],
        maintained: &HashSet<BackendIndex>,
    ) -> Result<usize, Error> {
        let old: StdMap<_, _> = before.iter().flat_map(|b| b.backends.iter().copied()).collect();
        let mut stored = 0;
        for (index, plan) in backends {
            if old.get(index) == Some(plan) {
                continue;
            }
            let record =
                BackendPlan { maint: plan.maint && !maintained.contains(index), ..*plan }.record();
            let present = self
                .backend(*index)
                .ok_or(Error::OutOfRange { what: "backend", index: index.get().into() })?;
            let same_server = (present.addr, present.port_be, present.service, present.version)
                == (record.addr, record.port_be, record.service, record.version);
            if !same_server {
                self.reset_counters(*index)?;
            }
            if let Some(hop) = plan.next_hop {
                self.allow_out(hop.ifindex)?;
            }
            stored += usize::from(self.store_backend(*index, &record)?);
        }
        Ok(stored)
    }

    /// A new server starts counting at zero.
    fn reset_counters(&mut self, index: BackendIndex) -> Result<(), Error> {
        let cpus = nr_cpus().map_err(|(_, e)| Error::Io(e))?;
        let zero = vec![pod::BackendCounters(abi::BackendCounters::default()); cpus];
        let values = PerCpuValues::try_from(zero)?;
        Ok(self.counters.set(index.get().into(), values, 0)?)
    }

    /// Says which MAC addresses frames for this host have. New ones first, so that at no moment
    /// an address is unknown that was known before and is after.
    pub(super) fn set_macs(&mut self, macs: &BTreeMap<u32, InterfaceMacs>) -> Result<(), Error> {
        let mut wanted = HashSet::new();
        for (ifindex, InterfaceMacs { own, others }) in macs {
            for mac in others.iter().chain([own]) {
                wanted.insert(mac_key(*ifindex, *mac));
            }
            // Last: from here on the interface has no other addresses than those.
            for key in wanted.iter().filter(|key| key.ifindex == *ifindex) {
                self.macs.insert(pod::MacKey(*key), 1, 0)?;
            }
            let known = mac_key(*ifindex, [0; 6]);
            wanted.insert(known);
            let way = self.place(*ifindex, macs)?.map_or(0, |place| way::tagged(place, 0));
            self.macs.insert(pod::MacKey(known), way, 0)?;
        }
        let mut first = vec![0_u64; abi::FIRST_MACS as usize];
        for (ifindex, InterfaceMacs { own, .. }) in macs {
            let [a, b, c, d, e, f] = *own;
            let start = u64::from_le_bytes([0, 0, a, b, c, d, e, f]);
            first[(ifindex % abi::FIRST_MACS) as usize] = start;
        }
        for (place, mac) in first.into_iter().enumerate() {
            if self.first_macs.get(&(place as u32), 0)? != mac {
                self.first_macs.set(place as u32, mac, 0)?;
            }
        }
        let there: Vec<_> = self.macs.keys().collect::<Result<_, _>>()?;
        for key in there.into_iter().filter(|pod::MacKey(key)| !wanted.contains(key)) {
            self.macs.remove(&key)?;
        }
        Ok(())
    }

    /// An interface's place in `TAGGED`, which it keeps as long as it is among those of `macs`:
    /// flows name it. `None` if all are taken.
    fn place(
        &mut self,
        ifindex: u32,
        macs: &BTreeMap<u32, InterfaceMacs>,
    ) -> Result<Option<u32>, Error> {
        let mut places = Vec::new();
        for place in 0..way::PLACES {
            places.push(self.tagged.get(&place, 0)?);
        }
        let at = |found: &dyn Fn(u32) -> bool| places.iter().position(|there| found(*there));
        // Flows may still name the place of one that is gone: it goes last.
        let place = at(&|there| there == ifindex)
            .or_else(|| at(&|there| there == 0))
            .or_else(|| at(&|there| !macs.contains_key(&there)));
        let Some(place) = place else { return Ok(None) };
        if places[place] != ifindex {
            self.tagged.set(place as u32, ifindex, 0)?;
        }
        Ok(Some(place as u32))
    }

    /// Lets frames leave by an interface.
    pub(super) fn allow_out(&mut self, ifindex: u32) -> Result<(), Error> {
        if self.tx_ports.get(ifindex, 0).is_err() {
            self.tx_ports.insert(ifindex, ifindex, None, 0).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// What a table is written to.
struct Tables<'a> {
    table: &'a Pages,
    ledger: &'a Pages,
    marks: &'a Marks,
    known: u64,
}

impl Tables<'_> {
    /// Where a service's entries lie in `TABLE`, and its ledger in `LEDGER`: in which pages.
    fn pages(&self, service: &ServicePlan) -> Result<std::ops::Range<u32>, Error> {
        let buckets = service.record.bucket_mask + 1;
        let first = service.record.first_page;
        let end = first.saturating_add(buckets.div_ceil(PAGE_BUCKETS));
        if end > self.table.count() || service.entries.len() != buckets as usize {
            return Err(Error::OutOfRange { what: "table page", index: first });
        }
        Ok(first..end)
    }

    /// Writes ledger and entries of a table where they differ from the `old` ones.
    fn store(&self, old: Option<&ServicePlan>, service: &ServicePlan) -> Result<Applied, Error> {
        let mut applied = Applied::default();
        let pages = self.pages(service)?;
        // What was stored elsewhere says nothing of what these pages hold.
        let there = |old: &&ServicePlan| {
            (old.record.first_page, old.record.bucket_mask)
                == (service.record.first_page, service.record.bucket_mask)
        };
        let stored = old.filter(there);
        let proceed = || self.marks.count() == self.known;
        // The ledger first: an agent that is killed in between finds moves that
        // have not happened yet, and makes them again, never moves without a time.
        let old_ledger = stored.map(|o| &o.ledger);
        if old_ledger.is_none_or(|old| !Arc::ptr_eq(old, &service.ledger)) {
            let mapping = self.ledger.map(pages.clone())?;
            // After the first line of words that differ.
            let mut first = true;
            let half = |_, _| {
                if std::mem::take(&mut first) {
                    Failpoint::LedgerHalfWritten.pass();
                }
            };
            let old = old_ledger.map(|old| old.plain());
            let new = service.ledger.plain();
            if !store(mapping.words64(), old.as_deref(), &new, proceed, half) {
                return Err(Error::Interrupted);
            }
            Failpoint::LedgerWritten.pass();
        }
        let old_entries = stored.map(|o| &o.entries);
        if old_entries.is_none_or(|old| !Arc::ptr_eq(old, &service.entries)) {
            let mapping = self.table.map(pages)?;
            let mut first = true;
            let count = |before: Entry, after: Entry| {
                if std::mem::take(&mut first) {
                    Failpoint::TableHalfWritten.pass();
                }
                applied.untracked += usize::from(before.tracked() && !after.tracked());
                applied.entries += usize::from(before != after);
            };
            let old = old_entries.map(|old| old.plain());
            let new = service.entries.plain();
            if !store(mapping.words32(), old.as_deref(), &new, proceed, count) {
                return Err(Error::Interrupted);
            }
            Failpoint::TableWritten.pass();
        }
        Ok(applied)
    }
}

fn mac_key(ifindex: u32, [a, b, c, d, e, f]: [u8; 6]) -> abi::MacKey {
    let (first, last) = ([a, b, c, d], [e, f]);
    abi::MacKey { ifindex, first: u32::from_ne_bytes(first), last: u16::from_ne_bytes(last).into() }
}

/// The record at `index` of `BACKENDS`, if it holds so many.
fn record(backends: &Mapping, index: BackendIndex) -> Option<abi::Backend> {
    let start = usize::from(index.get()) * RECORD_WORDS;
    let words = backends.words64().get(start..start + RECORD_WORDS)?;
    let mut bytes = [0_u64; RECORD_WORDS];
    for (to, from) in bytes.iter_mut().zip(words) {
        *to = from.load(Ordering::Relaxed);
    }
    // SAFETY: same size, and every bit pattern is a `Backend`: integers only.
    Some(unsafe { std::mem::transmute::<[u64; RECORD_WORDS], abi::Backend>(bytes) })
}

/// Number of records that `BACKENDS` holds.
fn indices(backends: &Mapping) -> u16 {
    let records = backends.words64().len() / RECORD_WORDS;
    records.min(abi::BACKEND_INDICES as usize) as u16
}

/// The records in use, by ascending index.
pub(super) fn records(backends: &Mapping) -> Vec<(BackendIndex, abi::Backend)> {
    let all = (1..indices(backends)).map(BackendIndex::new);
    let found = all.filter_map(|index| Some((index, record(backends, index)?)));
    found.filter(|(_, record)| record.port_be != 0).collect()
}

/// Whether the same packets find the same record.
fn same_address(old: &Arc<ServicePlan>, new: &Arc<ServicePlan>) -> bool {
    Arc::ptr_eq(old, new)
        || (old.vips == new.vips && old.ports == new.ports && old.record == new.record)
}

const EMPTY_INFO: abi::ServiceInfo = abi::ServiceInfo {
    name: [0; abi::SERVICE_NAME_BYTES],
    versions: [[0; abi::VERSION_NAME_BYTES]; abi::MAX_VERSIONS],
    first_page: 0,
    buckets: 0,
    control: 0,
    family: 0,
};

fn info(service: &ServicePlan) -> abi::ServiceInfo {
    let mut info = EMPTY_INFO;
    padded(&mut info.name, &service.name);
    for (slot, name) in info.versions.iter_mut().zip(&service.versions) {
        padded(slot, name);
    }
    info.first_page = service.record.first_page;
    info.buckets = service.record.bucket_mask + 1;
    info.control = service.control.into();
    info.family = match service.family {
        Family::V4 => 4,
        Family::V6 => 6,
    };
    info
}

fn padded(to: &mut [u8], name: &str) {
    let length = name.len().min(to.len());
    to[..length].copy_from_slice(&name.as_bytes()[..length]);
}
