//! What services are given when an agent starts: the numbers and tables that
//! they had under an earlier one, and new ones for what is new.

use std::{
    collections::{BTreeSet, HashSet},
    net::SocketAddr,
};

use canary_ebpf_common::{
    Packed,
    abi::{BACKEND_DOWN, BACKEND_DRAIN, BACKEND_MAINT, LedgerEntry, PAGE_BUCKETS},
    entry::{BackendIndex, Entry},
};

use super::{
    Adopted, AdoptedService, BootMs, Family, SlowStart,
    adopt::{self, slot},
    alloc::{Ids, Indices, Pages},
    placements::Placements,
    planner::{NOT_ASKED_YET, PlanError, ServiceState, Vacated},
    record,
    slow_start::marked,
    table::{Draining, LiveBackend, Table},
};
use crate::config::model::{Backend, Capacity, Config, Health, Service};

/// What is given out while services begin.
pub(super) struct Claims {
    pub(super) pages: Pages,
    pub(super) ids: Ids,
    pub(super) indices: Indices,
    /// How many more backends may be live.
    live: u32,
    /// Indices of adopted records that are gone on with.
    pub(super) taken: BTreeSet<BackendIndex>,
    /// Where tables are that nobody goes on with.
    pub(super) vacated: Vec<Vacated>,
}

impl Claims {
    /// Nothing is given out yet of what `config` has room for.
    pub(super) fn new(config: &Config) -> Self {
        let Capacity { services, vips: _, backends, buckets, flows: _, samples: _ } =
            config.agent.capacity;
        let highest = u16::try_from(backends.saturating_mul(2)).unwrap_or(u16::MAX);
        Self {
            pages: Pages::new(buckets / PAGE_BUCKETS),
            // A service can have a table for either family.
            ids: Ids::new(services.saturating_mul(2)),
            // Replaced backends drain beside as many new ones.
            indices: Indices::new(highest),
            live: backends,
            taken: BTreeSet::new(),
            vacated: Vec::new(),
        }
    }

    /// Goes on from what a planner has given out. How many backends there may be was seen to
    /// when the configuration was read.
    pub(super) fn resume(pages: Pages, ids: Ids, indices: Indices) -> Self {
        let (taken, vacated) = (BTreeSet::new(), Vec::new());
        Self { pages, ids, indices, live: u32::MAX, taken, vacated }
    }

    /// Reserves everything that `adopted` uses, and returns the tables that services of
    /// the configuration go on with.
    ///
    /// What the others use is free when the first plan is in force and has rested: packets to
    /// their addresses may be on their way through their pages until then.
    pub(super) fn take_over<'a>(
        &mut self,
        config: &Config,
        adopted: &'a Adopted,
    ) -> Vec<(Family, &'a AdoptedService)> {
        for (index, _) in &adopted.backends {
            self.indices.reserve(*index);
        }
        let mut kept: Vec<(Family, &AdoptedService)> = Vec::new();
        for table in &adopted.services {
            let pages = table.buckets.div_ceil(PAGE_BUCKETS);
            let sound = self.pages.reserve(table.first_page, pages)
                && self.ids.reserve(table.id)
                && !table.entries.is_empty()
                && !table.ledger.is_empty();
            if !sound {
                continue;
            }
            let (family, first_page) = (table.family, table.first_page);
            let named = |s: &&Service| s.name == table.name;
            let wanted = config.services.iter().find(named).filter(|service| {
                let twice = kept.iter().any(|(f, t)| *f == family && t.name == table.name);
                !twice && service.vips.iter().any(|vip| Family::of(*vip) == family)
            });
            let id = wanted.is_none().then_some(table.id);
            if wanted.is_none_or(|service| service.buckets != table.buckets) {
                self.vacated.push(Vacated { id, first_page });
            }
            if wanted.is_some() {
                kept.push((family, table));
            }
        }
        kept
    }

    /// A table as it begins: from `old`, or empty.
    pub(super) fn table(
        &mut self,
        state: &ServiceState,
        family: Family,
        old: Option<&AdoptedService>,
        adopted: &Adopted,
        placements: Placements,
        now_ms: BootMs,
    ) -> Result<Table, PlanError> {
        let service = &state.config;
        let needed = record::page_count(service);
        let no_pages = |free| PlanError::Pages { service: service.name.clone(), needed, free };
        let Some(old) = old else {
            let id = self
                .ids
                .take(now_ms)
                .ok_or_else(|| PlanError::Services { service: service.name.clone() })?;
            let first_page =
                self.pages.take(needed, now_ms).ok_or_else(|| no_pages(self.pages.free()))?;
            let owners = state.ownership.owners.iter();
            let mut ledger: Packed<_> = owners.map(|owner| LedgerEntry::new(*owner, 0)).collect();
            ledger.pack();
            let entries = Packed::of_one(Entry::default(), service.buckets as usize);
            return Ok(Table::new(family, id, first_page, entries, ledger, placements));
        };
        let first_page = match old.buckets == service.buckets {
            true => old.first_page,
            false => self.pages.take(needed, now_ms).ok_or_else(|| no_pages(self.pages.free()))?,
        };
        let records = || adopted.backends.iter().filter(|(_, b)| b.service == old.id);
        let known: BTreeSet<BackendIndex> = records().map(|(index, _)| *index).collect();
        let (entries, ledger) = adopt::sanitised(
            old,
            service.buckets,
            &state.slots,
            state.control,
            |index| known.contains(&index),
            now_ms,
        );
        // Each is made plain for its own first step, and not all of them at once.
        let (mut entries, mut ledger) = (Packed::from(entries), Packed::from(ledger));
        entries.pack();
        ledger.pack();
        let mut table = Table::new(family, old.id, first_page, entries, ledger, placements);
        for (index, backend) in records() {
            let addr = adopt::record_addr(backend);
            let version = old.versions.get(usize::from(backend.version)).map_or("", String::as_str);
            let slot = slot(&state.slots, version);
            let configured = service
                .versions
                .iter()
                .find(|v| v.name == version)
                .and_then(|v| v.backends.iter().find(|b| b.addr == addr));
            let hop = adopt::record_hop(backend).ok_or_else(|| NOT_ASKED_YET.to_owned());
            let down = backend.flags & BACKEND_DOWN != 0 && service.health != Health::None;
            let maint = backend.flags & BACKEND_MAINT != 0;
            let out = BACKEND_DOWN | BACKEND_DRAIN | BACKEND_MAINT;
            let slow_start = match marked(backend.slow_since_ms, now_ms) {
                _ if hop.is_err() || backend.flags & out != 0 => SlowStart::Away,
                Some(since) => SlowStart::Since(since),
                None => SlowStart::Whole,
            };
            let twice = |at: u8| table.backends.iter().any(|b| b.slot == at && b.addr == addr);
            match (slot, configured) {
                (Some(slot), Some(configured)) if !twice(slot) => {
                    table.backends.push(LiveBackend {
                        index: *index,
                        slot,
                        addr,
                        weight: configured.weight,
                        down,
                        hop,
                        admin: state.admins.get(&addr).copied().unwrap_or_default(),
                        slow_start,
                    })
                }
                (slot, _) => {
                    let drain = record::policy(service).drain_ms;
                    table.draining.push(Draining {
                        index: *index,
                        slot: slot.unwrap_or(state.control),
                        addr,
                        down,
                        maint,
                        hop,
                        until_ms: drain.map(|drain| now_ms.saturating_add(drain)),
                        waiting: None,
                    });
                }
            }
            self.taken.insert(*index);
        }
        Ok(table)
    }

    /// Gives indices to the backends that have none yet, and puts all into the
    /// order of the configuration.
    pub(super) fn missing_backends(
        &mut self,
        state: &mut ServiceState,
        now_ms: BootMs,
    ) -> Result<(), PlanError> {
        let ServiceState { config, slots, tables, admins, .. } = state;
        let full = |addr| PlanError::Backends { service: config.name.clone(), addr };
        for table in tables {
            let mut ordered = Vec::new();
            // In a table that is new there is nobody to take a share from little by little.
            let new = table.backends.is_empty() && table.draining.is_empty();
            // An address is checked once, for all versions that name it.
            let down: HashSet<SocketAddr> =
                table.backends.iter().filter(|b| b.down).map(|b| b.addr).collect();
            for version in &config.versions {
                let Some(slot) = slot(slots, &version.name) else {
                    continue;
                };
                let served = |b: &&Backend| super::serves(config, table.family, b.addr.ip());
                for backend in version.backends.iter().filter(served) {
                    self.live = self.live.checked_sub(1).ok_or_else(|| full(backend.addr))?;
                    let known = |b: &LiveBackend| b.slot == slot && b.addr == backend.addr;
                    ordered.push(match table.backends.iter().position(known) {
                        Some(at) => LiveBackend {
                            down: down.contains(&backend.addr),
                            ..table.backends.swap_remove(at)
                        },
                        None => LiveBackend {
                            index: self.indices.take(now_ms).ok_or_else(|| full(backend.addr))?,
                            slot,
                            addr: backend.addr,
                            weight: backend.weight,
                            down: down.contains(&backend.addr),
                            hop: Err(NOT_ASKED_YET.to_owned()),
                            admin: admins.get(&backend.addr).copied().unwrap_or_default(),
                            slow_start: if new { SlowStart::Whole } else { SlowStart::Away },
                        },
                    });
                }
            }
            table.backends = ordered;
        }
        Ok(())
    }
}
