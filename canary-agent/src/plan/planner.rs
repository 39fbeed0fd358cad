//! The whole state that a plan follows from, and its way from one plan to the next.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use canary_ebpf_common::{abi::MAX_VERSIONS, compile, entry::BackendIndex};

use super::{
    Adopted, AdoptedService, BootMs, BucketSet, DataPlane, Family, NextHop, Proposal, ServicePlan,
    SlowStart, Sweep,
    adopt::{self, slot},
    alloc::{Ids, Indices, Pages},
    begin::Claims,
    follow::{self, Following, Slots},
    ownership::{Ownership, ProposeError},
    placements::Placements,
    prepare, record,
    routing::Routing,
    table::{Inputs, Table, TableStep},
};
use crate::{
    config::model::{Config, Service},
    parallel,
    store::{Admin, Admins, PlacementRecord, ServiceRecord, Split},
};

/// Said of a backend until the host's routes have been asked.
pub(super) const NOT_ASKED_YET: &str = "its route is being looked up";

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The forwarding table is too small.
    #[error(
        "no room for the forwarding table of service `{service}`: it takes {needed} pages of 4,096 buckets \
         in one run, and {free} are free; raise `agent.capacity.buckets`"
    )]
    Pages {
        /// The service.
        service: String,
        /// Pages that it needs.
        needed: u32,
        /// Pages that are free, though perhaps apart.
        free: u32,
    },
    /// There are more services than records.
    #[error("no room for service `{service}`: raise `agent.capacity.services`")]
    Services {
        /// The service.
        service: String,
    },
    /// There are more backends than records.
    #[error("no room for backend {addr} of service `{service}`: raise `agent.capacity.backends`")]
    Backends {
        /// The service.
        service: String,
        /// The backend.
        addr: SocketAddr,
    },
    /// Every client would have another bucket.
    #[error(
        "service `{service}`: another `{key}` sends every client to another bucket, and open connections \
         with them, and the service has had traffic: set it back, or run `canary-agent detach` before the \
         next start (steering stops meanwhile, and open connections break)"
    )]
    Rehashed {
        /// The service.
        service: String,
        /// The key that has changed.
        key: &'static str,
    },
    /// There are more source addresses than elements.
    #[error(
        "no room for the source addresses of service `{service}`: the lists of `nat_source` up to it have {needed} \
         addresses, and {room} is the most for all services together; name fewer, or let services share a list",
        room = canary_ebpf_common::abi::NAT_SOURCES
    )]
    NatSources {
        /// The service.
        service: String,
        /// Addresses of all lists up to its own, each list once.
        needed: usize,
    },
    /// Clients can't be told apart.
    #[error("{reason}")]
    Classes {
        /// Why.
        reason: String,
    },
    /// Another plan has come first.
    #[error("another reload was made meanwhile: ask again")]
    Overtaken,
    /// The configured split makes no owners.
    #[error("service `{service}`: {reason}")]
    Split {
        /// The service.
        service: String,
        /// Why.
        reason: ProposeError,
    },
}

/// What a planner begins with.
#[derive(Clone, Debug)]
pub struct Start<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// What the pinned maps hold.
    pub adopted: Adopted,
    /// What the store holds; empty where it can't be read.
    pub stored: &'a [ServiceRecord],
    /// When.
    pub now_ms: BootMs,
}

/// Something that beginning has decided and that is not stored yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// Position of the service.
    pub service: usize,
    /// `initial`, `adopt` or `config`.
    pub action: &'static str,
    /// The split before.
    pub before: Split,
    /// Which buckets changed owner, encoded.
    pub moved: Vec<u8>,
}

/// What [`Planner::step`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Whether the plan differs from the one before.
    pub changed: bool,
    /// When the next step is due if nothing else happens.
    pub next_wakeup_ms: Option<BootMs>,
}

/// One service: what it should be and its tables.
pub struct ServiceState {
    pub(super) config: Arc<Service>,
    pub(super) slots: Vec<String>,
    pub(super) control: u8,
    pub(super) ownership: Ownership,
    pub(super) tables: Vec<Table>,
    pub(super) admins: Admins,
    pub(super) dirty: bool,
    /// Counts whatever happens to it, so that a plan made meanwhile can tell.
    pub(super) generation: u64,
    /// When it has been left alone for so long that it may take less memory.
    pub(super) rest_ms: Option<BootMs>,
}

/// A service that nothing has happened to for so long takes less memory until something does.
const REST_MS: u64 = 10_000;

impl ServiceState {
    /// Has it looked at with the next step.
    fn touch(&mut self) {
        self.dirty = true;
        self.generation += 1;
    }

    /// A copy that shares the large tables.
    pub(super) fn copy(&self) -> Self {
        let Self { config, slots, control, ownership, tables, admins, dirty, generation, rest_ms } =
            self;
        Self {
            config: Arc::clone(config),
            slots: slots.clone(),
            control: *control,
            ownership: ownership.clone(),
            tables: tables.iter().map(Table::copy).collect(),
            admins: admins.clone(),
            dirty: *dirty,
            generation: *generation,
            rest_ms: *rest_ms,
        }
    }

    /// Brings its tables to what is desired of them, those of both families at the same time if
    /// it is `alone` in that.
    pub(super) fn step(&mut self, now_ms: BootMs, alone: bool) -> Vec<TableStep> {
        self.dirty = false;
        self.generation += 1;
        // What begins is to be left alone from then on, more often than not.
        let new = self.tables.iter().any(Table::is_new);
        let Self { config, control, ownership, tables, .. } = self;
        let inputs = inputs(config, *control, ownership, now_ms);
        let buckets = if alone { tables.iter().map(|t| t.entries().len()).sum() } else { 0 };
        let steps = parallel::map(tables.iter_mut().collect(), buckets, |t| t.step(&inputs));
        self.rest_ms = Some(now_ms.saturating_add(REST_MS));
        if new {
            self.rest();
        }
        steps
    }

    /// Buckets of all its tables.
    pub fn buckets(&self) -> usize {
        self.tables.iter().map(|table| table.entries().len()).sum()
    }

    /// Takes less memory until the next step that changes something.
    fn rest(&mut self) {
        self.rest_ms = None;
        let before = Arc::clone(&self.ownership.owners);
        if let Some(packed) = before.packed() {
            self.ownership.owners = Arc::new(packed);
        }
        for table in &mut self.tables {
            table.rest(&before, &self.ownership.owners);
        }
    }

    /// The plans of its tables.
    pub(super) fn plans(&self) -> impl Iterator<Item = ServicePlan> + '_ {
        let plan = |table| record::service_plan(&self.config, &self.slots, self.control, table);
        self.tables.iter().map(plan)
    }

    /// Takes over what is known of next hops. Says whether that was news.
    pub(super) fn set_next_hops(
        &mut self,
        hops: &HashMap<IpAddr, Result<NextHop, String>>,
    ) -> bool {
        let mut changed = false;
        for table in &mut self.tables {
            let live = table.backends.iter_mut().map(|b| (b.addr.ip(), &mut b.hop));
            let gone = table.draining.iter_mut().map(|d| (d.addr.ip(), &mut d.hop));
            for (address, hop) in live.chain(gone) {
                if let Some(news) = hops.get(&address)
                    && news != hop
                {
                    *hop = news.clone();
                    changed = true;
                }
            }
        }
        if changed {
            self.touch();
        }
        changed
    }
    /// What the configuration says of it.
    pub fn config(&self) -> &Service {
        &self.config
    }

    /// Names of versions by slot; empty for a free slot.
    pub fn slots(&self) -> &[String] {
        &self.slots
    }

    /// Slot of the control version.
    pub fn control(&self) -> u8 {
        self.control
    }

    /// The slot of a version of the configuration. `None` also for one that has
    /// to wait for a later reload, because versions removed still have all the slots.
    pub fn slot(&self, version: &str) -> Option<u8> {
        let configured = self.config.versions.iter().any(|v| v.name == version);
        slot(&self.slots, version).filter(|_| configured)
    }

    /// Asked split and owners.
    pub fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// Its tables, at most one for each family.
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// What the store should hold of it with other owners, everything else being stored.
    pub fn stored(&self, ownership: &Ownership) -> ServiceRecord {
        let owners = compile::encode_owners(&ownership.owners.plain());
        ServiceRecord { owners, ..self.stored_without_owners(ownership) }
    }

    /// The same, but for the owners, which take their time to be written down.
    pub fn stored_without_owners(&self, ownership: &Ownership) -> ServiceRecord {
        ServiceRecord {
            name: self.config.name.clone(),
            control: self.slots[usize::from(self.control)].clone(),
            split: ownership.split.clone(),
            slots: self.slots.clone(),
            owners: Vec::new(),
            salt: ownership.salt,
            placements: None,
            admins: self.admins.clone(),
        }
    }

    /// All that the store should hold of it.
    pub fn stored_whole(&self) -> ServiceRecord {
        ServiceRecord { placements: Some(self.placement_records()), ..self.stored(&self.ownership) }
    }

    /// In the order in which the store gives them.
    fn placement_records(&self) -> Vec<PlacementRecord> {
        let of = |table: &Table| table.placements.stored(table.family, &self.slots);
        let mut records: Vec<PlacementRecord> = self.tables.iter().flat_map(of).collect();
        records.sort_by(|a, b| (&a.version, a.family).cmp(&(&b.version, b.family)));
        records
    }

    /// Backends that operators have taken out.
    pub fn admins(&self) -> &Admins {
        &self.admins
    }

    /// What setting `split` leads to.
    ///
    /// # Errors
    /// When the shares are more than the whole.
    pub fn propose(&self, split: Split) -> Result<Proposal, ProposeError> {
        self.ownership.propose(&self.slots, self.control, split)
    }
}

/// State → [`DataPlane`]. See the module's documentation for what it owns.
///
/// A step costs what has changed, and a little for each service.
pub struct Planner {
    pub(super) services: Vec<ServiceState>,
    pub(super) by_name: HashMap<String, usize>,
    pub(super) pages: Pages,
    pub(super) ids: Ids,
    pub(super) indices: Indices,
    pub(super) nat_ranges: HashMap<Vec<IpAddr>, u16>,
    pub(super) plane: DataPlane,
    pub(super) routing: Routing,
    /// Indices that nothing names any more but flow entries.
    pub(super) released: Vec<BackendIndex>,
    /// Those of them that the sweep under way is about.
    releasing: Vec<BackendIndex>,
    /// A sweep is under way.
    sweeping: bool,
    /// Backends whose connections are to be cut, though they may have others later.
    pub(super) cutting: Vec<BackendIndex>,
    /// Those of them that the sweep under way is about.
    cut: Vec<BackendIndex>,
    /// What the present plan has no use for any more.
    pub(super) vacated: Vec<Vacated>,
    /// What the plan in force has no use for any more.
    vacating: Vec<Vacated>,
    pub(super) backends_changed: bool,
    /// The plan has become another since the last step.
    pub(super) replaced: bool,
    /// Counts configurations.
    pub(super) epoch: u64,
    /// What tables of audiences are that follow their service.
    pub(super) following: Following,
}

/// Where a table was that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vacated {
    /// Its id, unless another table goes on with it.
    pub(super) id: Option<u16>,
    /// Its first page.
    pub(super) first_page: u32,
}

impl Planner {
    /// Takes over what the maps hold and goes on from what is stored.
    ///
    /// # Errors
    /// When the configuration does not fit into `agent.capacity`.
    pub fn begin(start: Start<'_>) -> Result<(Self, Vec<News>), PlanError> {
        let Start { config, mut adopted, stored, now_ms } = start;
        let classes = std::mem::take(&mut adopted.classes);
        let named = |id: u32| adopted.table_name(id);
        let routing = Routing::begin(config, classes, named, adopted.services.is_empty())?;
        record::configured_nat_sources(config.services.iter())
            .map_err(|(service, needed)| PlanError::NatSources { service, needed })?;
        let mut claims = Claims::new(config);
        let kept = claims.take_over(config, &adopted);
        let stored: HashMap<&str, &ServiceRecord> =
            stored.iter().map(|record| (record.name.as_str(), record)).collect();
        let mut services = Vec::with_capacity(config.services.len());
        let mut news = Vec::new();
        for service in &config.services {
            let tables: Vec<(Family, &AdoptedService)> =
                kept.iter().filter(|(_, table)| table.name == service.name).copied().collect();
            for (_, table) in &tables {
                let wanted = record::service_record(service, table.id, table.first_page);
                if let Some(key) = adopt::rehashed(table, &wanted) {
                    return Err(PlanError::Rehashed { service: service.name.clone(), key });
                }
            }
            let base = service.derived.as_ref().and_then(|of| {
                services.iter().find(|state: &&ServiceState| state.config.name == of.service)
            });
            let follows = service.derived.as_ref().filter(|of| of.follows);
            // What follows another goes on from what is stored of that one.
            let its = follows.map_or(&service.name, |of| &of.service);
            let record = stored.get(its.as_str()).copied();
            let mut beginning = adopt::begin(service, tables.first().map(|(_, t)| *t), record)
                .map_err(|reason| PlanError::Split { service: service.name.clone(), reason })?;
            let records = adopted
                .backends
                .iter()
                .map(|(_, backend)| backend)
                .filter(|backend| tables.iter().any(|(_, table)| table.id == backend.service));
            let admins = adopt::admins(service, record, records);
            // What is told to a backend of a service is told to it everywhere.
            let admins = base.map_or(admins, |state| state.admins.clone());
            let control_name = &service.versions[service.control].name;
            let control = slot(&beginning.slots, control_name).unwrap_or(0);
            if let (Some(base), Some(_)) = (base, follows) {
                let own = Slots { names: &beginning.slots, control };
                beginning.ownership = follow::followed(&base.ownership, Slots::of(base), own, None);
            }
            let mut state = ServiceState {
                config: Arc::new(service.clone()),
                control,
                slots: beginning.slots,
                ownership: beginning.ownership,
                tables: Vec::new(),
                admins,
                dirty: true,
                generation: 0,
                rest_ms: None,
            };
            for family in [Family::V4, Family::V6] {
                if service.vips.iter().any(|vip| Family::of(*vip) == family) {
                    let old = tables.iter().find(|(f, _)| *f == family).map(|(_, table)| *table);
                    let placements = Placements::begin(service, family, &state.slots, record);
                    let table = claims.table(&state, family, old, &adopted, placements, now_ms)?;
                    state.tables.push(table);
                }
            }
            let placed = record.and_then(|record| record.placements.as_ref());
            let other_backends = || {
                let moved = compile::encode_changes(&[]);
                let forgotten = record.is_some_and(|record| record.admins != state.admins);
                (forgotten || placed != Some(&state.placement_records()))
                    .then(|| ("config", state.ownership.split.clone(), moved))
            };
            if follows.is_none()
                && let Some((action, before, moved)) = beginning.news.or_else(other_backends)
            {
                news.push(News { service: services.len(), action, before, moved });
            }
            services.push(state);
        }
        // Records that nobody goes on with are removed, swept and rest before they are used again.
        let orphans: Vec<BackendIndex> = adopted
            .backends
            .iter()
            .map(|(index, _)| *index)
            .filter(|index| !claims.taken.contains(index))
            .collect();
        for state in &mut services {
            claims.missing_backends(state, now_ms)?;
        }
        let by_name =
            services.iter().enumerate().map(|(n, s)| (s.config.name.clone(), n)).collect();
        let planner = Self {
            services,
            by_name,
            pages: claims.pages,
            ids: claims.ids,
            indices: claims.indices,
            nat_ranges: HashMap::new(),
            plane: DataPlane::default(),
            routing,
            released: orphans,
            releasing: Vec::new(),
            sweeping: false,
            cutting: Vec::new(),
            cut: Vec::new(),
            vacated: claims.vacated,
            vacating: Vec::new(),
            backends_changed: true,
            replaced: false,
            epoch: 0,
            following: Following::default(),
        };
        Ok((planner, news))
    }

    /// All services, in the order of the configuration.
    pub fn services(&self) -> &[ServiceState] {
        &self.services
    }

    /// The service of that name, and its position.
    pub fn service(&self, name: &str) -> Option<(usize, &ServiceState)> {
        let at = *self.by_name.get(name)?;
        Some((at, &self.services[at]))
    }

    /// The desired data plane, as of the last [`step`](Self::step).
    pub fn plane(&self) -> &DataPlane {
        &self.plane
    }

    /// Every address that a next hop is needed for.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        let tables = self.services.iter().flat_map(|s| &s.tables);
        tables.flat_map(Table::addresses).collect()
    }

    /// Puts what [`ServiceState::propose`] proposed in force, from the next step on.
    pub fn set_ownership(&mut self, service: usize, ownership: Ownership) {
        if let Some(state) = self.services.get_mut(service) {
            state.ownership = ownership;
            state.touch();
        }
        self.prepare(service, None);
    }

    /// Takes over what an operator has told a backend of a service to be, in all versions.
    pub fn set_admin(&mut self, service: usize, addr: SocketAddr, admin: Admin) {
        for at in self.with_derived(service) {
            self.set_admin_of(at, addr, admin);
        }
    }

    fn set_admin_of(&mut self, service: usize, addr: SocketAddr, admin: Admin) {
        let Some(state) = self.services.get_mut(service) else {
            return;
        };
        match admin {
            Admin::Ready => state.admins.remove(&addr),
            out => state.admins.insert(addr, out),
        };
        for backend in state.tables.iter_mut().flat_map(|t| &mut t.backends) {
            if backend.addr == addr && backend.admin != admin {
                backend.admin = admin;
                self.backends_changed = true;
            }
        }
        state.touch();
    }

    /// Whether watching buckets of a service before they move is of any use.
    pub fn learns(&self, service: usize) -> bool {
        let state = self.services.get(service);
        state.is_some_and(|state| prepare::helps(&record::policy(&state.config)))
    }

    /// Watches the buckets that `ownership` would move, where they are, from the next step
    /// on until the service's owners are set; `None`: watches none any more. Returns how
    /// many, 0 if watching them is of no use.
    ///
    /// What moves after [`LEARN_MS`](super::LEARN_MS) of [`is_prepared`](Self::is_prepared)
    /// takes no retransmitted SYN along.
    pub fn prepare(&mut self, service: usize, ownership: Option<&Ownership>) -> u32 {
        self.prepare_followers(service, ownership);
        let mut moved = match ownership {
            Some(ownership) if self.learns(service) => {
                self.preview(service, Some(ownership), &[]).moved
            }
            _ => Vec::new(),
        };
        let Some(state) = self.services.get_mut(service) else {
            return 0;
        };
        let watched = moved.iter().map(BucketSet::len).sum();
        moved.resize(state.tables.len(), BucketSet::default());
        for (table, moved) in state.tables.iter_mut().zip(moved) {
            state.dirty |= !moved.is_empty();
            table.prepare(moved);
        }
        state.generation += 1;
        watched
    }

    /// Whether all buckets that [`prepare`](Self::prepare) was told of are watched in the
    /// present plan.
    pub fn is_prepared(&self, service: usize) -> bool {
        self.services.get(service).is_some_and(|s| s.tables.iter().all(Table::is_prepared))
    }

    /// Takes over what the host knows about next hops. Backends that `hops` does
    /// not name keep what was known of them.
    pub fn set_next_hops(&mut self, hops: &HashMap<IpAddr, Result<NextHop, String>>) {
        for state in &mut self.services {
            self.backends_changed |= state.set_next_hops(hops);
        }
    }

    /// Takes over whether a backend of a service fails its checks.
    pub fn set_down(&mut self, service: usize, addr: SocketAddr, down: bool) {
        self.set_health(service, &HashMap::from([(addr, down)]));
    }

    /// Takes over which backends of a service fail their checks. Those that `down` does not
    /// name keep what was known of them.
    pub fn set_health(&mut self, service: usize, down: &HashMap<SocketAddr, bool>) {
        for at in self.with_derived(service) {
            self.set_health_of(at, down);
        }
    }

    fn set_health_of(&mut self, service: usize, down: &HashMap<SocketAddr, bool>) {
        let Some(state) = self.services.get_mut(service) else {
            return;
        };
        let mut changed = false;
        for backend in state.tables.iter_mut().flat_map(|t| &mut t.backends) {
            if let Some(down) = down.get(&backend.addr)
                && backend.down != *down
            {
                backend.down = *down;
                changed = true;
            }
        }
        if changed {
            state.touch();
            self.backends_changed = true;
        }
    }

    /// Brings the plan up to date with everything that was set, and with `now_ms`.
    pub fn step(&mut self, now_ms: BootMs) -> Step {
        let mut done = Step { changed: std::mem::take(&mut self.replaced), ..Step::default() };
        self.vacate(now_ms);
        self.follow();
        let is_due = |table: &Table| table.due_ms().is_some_and(|at| at <= now_ms);
        let due: Vec<&mut ServiceState> = self
            .services
            .iter_mut()
            .filter(|state| state.dirty || state.tables.iter().any(is_due))
            .collect();
        for (steps, plans) in step_each(due, now_ms) {
            for stepped in steps {
                self.backends_changed |= stepped.records_changed || !stepped.released.is_empty();
                self.released.extend(stepped.released);
            }
            for plan in plans {
                done.changed |= set_service(&mut self.plane.services, plan);
            }
        }
        if self.backends_changed {
            self.backends_changed = false;
            let backends = record::backend_plans(
                &self.services,
                &mut self.nat_ranges,
                &mut self.plane.nat_sources,
            );
            done.changed |= backends != self.plane.backends;
            self.plane.backends = backends;
        }
        let routed = self.routing.step(&self.services, done.changed, now_ms);
        if routed.changed {
            done.changed = true;
            self.plane.classes = self.routing.plan.clone();
        }
        let sweep = self.unswept();
        done.changed |= sweep != self.plane.sweep;
        self.plane.sweep = sweep;
        let tables = self.services.iter().flat_map(|s| &s.tables);
        done.next_wakeup_ms = tables.filter_map(Table::due_ms).chain(routed.due_ms).min();
        done
    }

    /// Lets services that have been left alone for a while take less memory. Returns whether
    /// any does: what the plan in force holds of them is free when the present one is applied.
    pub fn rest(&mut self, now_ms: BootMs) -> bool {
        let mut rested = false;
        for state in &mut self.services {
            if state.dirty || state.rest_ms.is_none_or(|at| at > now_ms) {
                continue;
            }
            state.rest();
            // The plan stays as it is but for the form: a slot may have become free since.
            for table in &state.tables {
                let id = u32::from(table.id);
                let at = self.plane.services.binary_search_by_key(&id, |s| s.record.id);
                let Ok(at) = at else { continue };
                let (entries, ledger) = (Arc::clone(&table.entries), Arc::clone(&table.ledger));
                let plan = ServicePlan { entries, ledger, ..(*self.plane.services[at]).clone() };
                rested |= set_service(&mut self.plane.services, plan);
            }
        }
        self.replaced |= rested;
        rested
    }

    /// What has not been swept yet.
    fn unswept(&self) -> Sweep {
        let tables = self.services.iter().flat_map(|s| &s.tables);
        Sweep {
            buckets: tables
                .filter(|t| !t.unswept.is_empty())
                .map(|t| (t.id, t.unswept.iter().collect()))
                .collect(),
            backends: self
                .releasing
                .iter()
                .chain(&self.released)
                .chain(&self.cut)
                .chain(&self.cutting)
                .copied()
                .collect(),
            networks: self.routing.unswept(),
        }
    }

    /// Begins a sweep of all that the plan in force, which is the present one, wants swept.
    /// `None` if that is nothing, or another sweep is under way.
    pub fn begin_sweep(&mut self) -> Option<Sweep> {
        self.vacating.append(&mut self.vacated);
        if self.plane.sweep == Sweep::default() || self.sweeping {
            return None;
        }
        self.sweeping = true;
        self.routing.begin_sweep();
        self.releasing = std::mem::take(&mut self.released);
        self.cut = std::mem::take(&mut self.cutting);
        for state in &mut self.services {
            for table in &mut state.tables {
                table.sweeping = table.unswept.clone();
                state.generation += u64::from(!table.sweeping.is_empty());
            }
        }
        Some(self.plane.sweep.clone())
    }

    /// Lets what no packet finds any more rest.
    fn vacate(&mut self, now_ms: BootMs) {
        for Vacated { id, first_page } in self.vacating.drain(..) {
            id.into_iter().for_each(|id| self.ids.release(id, now_ms));
            self.pages.release(first_page, now_ms);
        }
    }

    /// Says that the sweep that was begun is done since `now_ms`. Returns whether another step is
    /// needed at once, for what had to wait for this.
    pub fn swept(&mut self, now_ms: BootMs) -> bool {
        for index in self.releasing.drain(..) {
            self.indices.release(index, now_ms);
        }
        self.cut.clear();
        self.sweeping = false;
        self.vacate(now_ms);
        let mut waiting = self.routing.swept();
        for state in &mut self.services {
            for table in &mut state.tables {
                // What is not swept is not tracked again: it can't have been cleared twice.
                let swept = std::mem::take(&mut table.sweeping);
                if swept == table.unswept {
                    table.unswept.clear();
                } else {
                    swept.iter().for_each(|bucket| table.unswept.remove(bucket));
                }
                state.generation += u64::from(!swept.is_empty());
                if (table.deferred || !table.is_prepared()) && !swept.is_empty() {
                    state.dirty = true;
                    waiting = true;
                }
            }
        }
        self.plane.sweep = self.unswept();
        waiting
    }

    /// Says that the present plan is in force and everything swept that it wants swept, since
    /// `now_ms`. Returns whether another step is needed at once.
    pub fn applied(&mut self, now_ms: BootMs) -> bool {
        let begun = self.begin_sweep().is_some();
        let waiting = self.swept(now_ms);
        begun && waiting
    }

    /// What would move in a service with other owners, or with backends told to be something
    /// else; a backend that comes back with all of its share.
    pub fn preview(
        &mut self,
        service: usize,
        ownership: Option<&Ownership>,
        told: &[(SocketAddr, Admin)],
    ) -> Preview {
        let mut preview = Preview::default();
        let Some(state) = self.services.get_mut(service) else {
            return preview;
        };
        let ServiceState { config, control, ownership: present, tables, .. } = state;
        for table in tables {
            let mut backends = table.backends.clone();
            for one in &mut backends {
                if let Some((_, admin)) = told.iter().find(|(addr, _)| *addr == one.addr) {
                    one.admin = *admin;
                    one.slow_start = SlowStart::Whole;
                }
            }
            let inputs = Inputs {
                owners: &ownership.unwrap_or(present).owners,
                ..inputs(config, *control, present, 0)
            };
            let assignment = table.desired(&inputs, &backends);
            let (moved, touched) = table.moved(&assignment.backends, |index| index);
            preview.touched.extend(touched);
            preview.fell_back |= assignment.fell_back;
            preview.moved.push(moved);
        }
        preview
    }
}

/// What a change would do to a service's tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preview {
    /// By table, the buckets whose new connections would go elsewhere.
    pub moved: Vec<BucketSet>,
    /// Backends that would gain or lose buckets.
    pub touched: BTreeSet<SocketAddr>,
    /// Bit *n*: the version in slot *n* would own buckets and have no backend to give them to,
    /// in one table at least.
    pub fell_back: u16,
}

/// What the tables of a service are stepped with.
pub(super) fn inputs<'a>(
    config: &Service,
    control: u8,
    ownership: &'a Ownership,
    now_ms: BootMs,
) -> Inputs<'a> {
    let slow_start_ms = u64::try_from(config.slow_start.as_millis()).unwrap_or(u64::MAX);
    Inputs {
        owners: &ownership.owners,
        control,
        fallback: config.fallback,
        policy: record::policy(config),
        slow_start_ms,
        now_ms,
    }
}

/// Frees the slots of versions that are in nobody's memory any more.
pub(super) fn release_slots(state: &mut ServiceState) {
    let ServiceState { config, slots, ownership, tables, .. } = state;
    let used = |at: u8| {
        ownership.owners.plain().contains(&at)
            || tables.iter().any(|t| t.draining.iter().any(|d| d.slot == at))
    };
    for (at, name) in (0_u8..).zip(slots.iter_mut()) {
        if !name.is_empty() && !config.versions.iter().any(|v| v.name == *name) && !used(at) {
            name.clear();
        }
    }
    adopt::trim_slots(slots);
    debug_assert!(slots.len() <= MAX_VERSIONS);
}

/// Steps services, several at the same time. Returns what was done, with their plans.
///
/// A split change takes the compiler about a millisecond for each of 65,536 buckets.
pub(super) fn step_each(
    services: Vec<&mut ServiceState>,
    now_ms: BootMs,
) -> Vec<(Vec<TableStep>, Vec<ServicePlan>)> {
    let buckets = services.iter().map(|state| state.buckets()).sum();
    let alone = services.len() == 1;
    parallel::map(services, buckets, |state| {
        let steps = state.step(now_ms, alone);
        let plans = state.plans().collect();
        release_slots(state);
        (steps, plans)
    })
}

/// Puts a table's plan into its place by id, unless it is there already.
pub(super) fn set_service(services: &mut Vec<Arc<ServicePlan>>, plan: ServicePlan) -> bool {
    match services.binary_search_by_key(&plan.record.id, |s| s.record.id) {
        Ok(at) if same(&services[at], &plan) => false,
        Ok(at) => {
            services[at] = Arc::new(plan);
            true
        }
        Err(at) => {
            services.insert(at, Arc::new(plan));
            true
        }
    }
}

/// Whether two plans of a table say the same, without looking into the tables.
fn same(a: &ServicePlan, b: &ServicePlan) -> bool {
    let ServicePlan { name, family, versions, control, record, vips, ports, entries, ledger } = a;
    Arc::ptr_eq(entries, &b.entries)
        && Arc::ptr_eq(ledger, &b.ledger)
        && (name, family, versions, control) == (&b.name, &b.family, &b.versions, &b.control)
        && (record, vips, ports) == (&b.record, &b.vips, &b.ports)
}
