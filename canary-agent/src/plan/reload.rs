//! Going on with another configuration without a restart.
//!
//! A service whose configuration has changed goes on as it would under the next agent: by
//! the same rules, from the same two memories (`adopt`), which are here the running plan
//! itself. What has not changed is not touched.
//!
//! Made in three steps, so that whoever owns the planner is not held up by the work:
//! [`Planner::baseline`] copies what is concerned (tables are shared, not copied);
//! [`Baseline::prepare`] and [`Prepared::warm`] plan, on any thread; [`Planner::ready`] and
//! [`Planner::install`] put it in force, and plan anew what has gone on meanwhile.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use canary_ebpf_common::{
    Packed,
    abi::{self, LedgerEntry},
    entry::{BackendIndex, Entry},
};

use super::{
    Adopted, AdoptedService, BootMs, BucketSet, ClassChange, Family, NextHop, PlanError, Planner,
    Preview, SlowStart, Tags,
    adopt::{self, slot},
    alloc::{Ids, Indices, Pages},
    begin::Claims,
    follow::{self, Raises, Slots},
    ownership::Ownership,
    placements::Placements,
    planner::{NOT_ASKED_YET, ServiceState, Vacated, inputs, release_slots, set_service},
    record,
    routing::{Compiled, RoutingBase},
    table::{Draining, LiveBackend, Table, TableStep},
};
use crate::{
    config::model::{Backend, Config, Health, Service, Version},
    parallel,
    store::{ServiceRecord, Split},
};

/// What is known of next hops, by address.
pub type Hops = HashMap<IpAddr, Result<NextHop, String>>;

/// Taken for the next hop of a backend that nobody has asked for yet, while it is only said
/// what would happen.
const ASSUMED: NextHop = NextHop {
    ifindex: 0,
    source_mac: [0; 6],
    destination_mac: [0; 6],
    source: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
    tags: Tags { outer: 0, inner: 0, service: false },
    mtu: 1500,
    silent: None,
};

/// Why connections of a service that stays do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upheaval {
    /// Every client gets another bucket, because of this key.
    Rehash(&'static str),
    /// What is known of open connections is of no use to the new way of forwarding.
    Forward,
    /// It has no address of this family any more.
    Family(Family),
}

/// A service as a plan for another configuration begins with it.
enum Before {
    /// Its configuration is the same.
    Same,
    /// It has another; with what would be stored of the one that it follows.
    Changed(Box<ServiceState>, Option<ServiceRecord>),
    /// There was none, except in an earlier configuration.
    New(Option<ServiceRecord>),
}

/// What planning for a configuration begins with.
pub struct Baseline {
    services: Vec<(Arc<Service>, Before)>,
    removed: Vec<Removal>,
    routing: RoutingBase,
    claims: Claims,
    raises: Raises,
    epoch: u64,
    now_ms: BootMs,
}

/// A service that is not in the configuration any more.
#[derive(Clone, Debug, PartialEq)]
pub struct Removal {
    /// What it was.
    pub config: Arc<Service>,
    /// The records of its tables.
    pub records: Vec<abi::Service>,
}

/// A service with another configuration, or a new one.
pub struct Made {
    /// What it was; `None` for a new one.
    pub before: Option<Arc<Service>>,
    /// The records of its tables before.
    pub records: Vec<abi::Service>,
    /// What breaks connections.
    pub upheavals: Vec<Upheaval>,
    /// What would move, by table as they are after; nothing for a new service.
    pub preview: Preview,
    /// By table before, the buckets that open connections of are about.
    pub buckets: Vec<BucketSet>,
    /// What is to be stored of it.
    pub record: ServiceRecord,
    /// Its split before.
    pub split: Split,
    /// Which buckets change owner, encoded.
    pub moved: Vec<u8>,
    state: ServiceState,
    /// What it was made from, to be made again.
    parked: Option<ServiceRecord>,
    /// The generation that it was made from.
    generation: Option<u64>,
    steps: Option<Vec<TableStep>>,
    vacated: Vec<Vacated>,
    released: Vec<BackendIndex>,
}

impl Made {
    /// What it is now.
    pub fn after(&self) -> &Service {
        &self.state.config
    }
}

/// Whether nobody has asked yet how to reach a backend.
fn is_unknown(backend: &LiveBackend) -> bool {
    backend.hop.as_ref().err().is_some_and(|why| why == NOT_ASKED_YET)
}

/// A service in the order of the configuration.
enum Next {
    Same(String),
    Made(Box<Made>),
}

/// Whether a route names the clients of a table.
fn has_route(table: &Service, config: &Config) -> bool {
    let Some(of) = table.derived.as_ref().filter(|of| !of.follows) else { return false };
    let base = config.services.iter().find(|service| service.name == of.service);
    base.is_some_and(|base| base.routes.iter().any(|route| route.audience == of.audience))
}

/// A plan for another configuration.
pub struct Prepared {
    services: Vec<Next>,
    classes: Option<Compiled>,
    removed: Vec<Removal>,
    hops: Hops,
    epoch: u64,
}

/// A plan for another configuration that nothing has overtaken.
pub struct Ready {
    prepared: Prepared,
    pages: Pages,
    ids: Ids,
    indices: Indices,
}

impl Planner {
    /// What a plan for `config` begins with. `parked` has what the store knows of services
    /// that are not in the present configuration.
    ///
    /// Not sooner than [`QUARANTINE_MS`](super::QUARANTINE_MS) after the planner has begun:
    /// what an earlier agent freed as the last thing it did rests as well, and nobody knows
    /// any more what that is.
    pub fn baseline(
        &self,
        config: &Config,
        parked: &HashMap<String, ServiceRecord>,
        now_ms: BootMs,
    ) -> Baseline {
        let services = config.services.iter().map(|service| match self.service(&service.name) {
            Some((_, state)) if *state.config == *service && !gets_slot(state) => {
                (Arc::clone(&state.config), Before::Same)
            }
            Some((_, state)) => {
                let mut state = state.copy();
                if state.follows() && has_route(service, config) {
                    // What it followed until now is not what its route says.
                    let split = service.split.clone();
                    if let Ok(proposal) = state.propose(split) {
                        state.ownership = proposal.ownership;
                    }
                }
                let followed = self.followed_record(service, parked);
                (Arc::new(service.clone()), Before::Changed(Box::new(state), followed))
            }
            None => {
                let followed = self.followed_record(service, parked);
                let record = followed.or_else(|| parked.get(&service.name).cloned());
                (Arc::new(service.clone()), Before::New(record))
            }
        });
        let stay: HashSet<&str> = config.services.iter().map(|s| s.name.as_str()).collect();
        let gone = self.services.iter().filter(|state| !stay.contains(state.config.name.as_str()));
        Baseline {
            services: services.collect(),
            removed: gone
                .map(|state| Removal { config: Arc::clone(&state.config), records: records(state) })
                .collect(),
            routing: self.routing.base(config),
            claims: self.claims(),
            raises: self.raises().clone(),
            epoch: self.epoch,
            now_ms,
        }
    }

    /// What would be stored of the service that another one follows.
    fn followed_record(
        &self,
        service: &Service,
        parked: &HashMap<String, ServiceRecord>,
    ) -> Option<ServiceRecord> {
        let of = service.derived.as_ref().filter(|of| of.follows)?;
        let there = self.service(&of.service).map(|(_, state)| state.stored_whole());
        let record = there.or_else(|| parked.get(&of.service).cloned())?;
        Some(ServiceRecord { name: service.name.clone(), ..record })
    }

    fn claims(&self) -> Claims {
        Claims::resume(self.pages.clone(), self.ids.clone(), self.indices.clone())
    }

    /// Makes sure that `prepared` fits to the present state: what has gone on since is planned
    /// anew. Nothing changes.
    ///
    /// # Errors
    /// When there is no room. Also when another plan was installed since; that one has to be
    /// begun from.
    pub fn ready(&self, mut prepared: Prepared, now_ms: BootMs) -> Result<Ready, PlanError> {
        if prepared.epoch != self.epoch {
            return Err(PlanError::Overtaken);
        }
        let made = prepared.made().map(Made::after);
        record::room_for_nat_sources(made, &self.nat_ranges, self.plane.nat_sources.len())
            .map_err(|(service, needed)| PlanError::NatSources { service, needed })?;
        let mut claims = self.claims();
        claims.pages.settle(now_ms);
        claims.ids.settle(now_ms);
        claims.indices.settle(now_ms);
        let mut late = Vec::new();
        for (at, next) in prepared.services.iter().enumerate() {
            let Next::Made(made) = next else { continue };
            let before = self.service(&made.state.config.name).map(|(_, state)| state);
            let current = before.map(|state| state.generation) == made.generation;
            if !(current && reserve(&mut claims, &made.state, before)) {
                late.push(at);
            }
        }
        for at in late {
            let Next::Made(made) = &mut prepared.services[at] else { continue };
            let before = self.service(&made.state.config.name).map(|(_, state)| state.copy());
            let config = Arc::clone(&made.state.config);
            let parked = made.parked.take();
            let mut again = make(config, before, parked, self.raises(), &mut claims, now_ms)?;
            again.state.set_next_hops(&prepared.hops);
            **made = again;
        }
        if let Some(classes) = prepared.classes.take() {
            prepared.classes = Some(self.routing.renumbered(classes)?);
        }
        let Claims { pages, ids, indices, .. } = claims;
        Ok(Ready { prepared, pages, ids, indices })
    }

    /// Goes on with another configuration, from the next step on.
    pub fn install(&mut self, ready: Ready) {
        let Ready { prepared, pages, ids, indices } = ready;
        (self.pages, self.ids, self.indices) = (pages, ids, indices);
        let changes = prepared.made().next().is_some() || !prepared.removed.is_empty();
        self.backends_changed |= changes;
        self.replaced |= changes;
        let mut before: HashMap<String, ServiceState> = std::mem::take(&mut self.services)
            .into_iter()
            .map(|state| (state.config.name.clone(), state))
            .collect();
        for next in prepared.services {
            let made = match next {
                Next::Same(name) => {
                    self.services.extend(before.remove(&name));
                    continue;
                }
                Next::Made(made) => made,
            };
            let Made { mut state, steps, vacated, released, .. } = *made;
            before.remove(&state.config.name);
            self.released.extend(released);
            self.vacated.extend(vacated);
            if let Some(steps) = steps {
                self.released.extend(steps.into_iter().flat_map(|step| step.released));
                for plan in state.plans() {
                    set_service(&mut self.plane.services, plan);
                }
                release_slots(&mut state);
            }
            self.services.push(state);
        }
        for table in before.values().flat_map(|state| &state.tables) {
            self.released.extend(indices_of(table));
            self.vacated.push(vacated(table));
        }
        let there: HashSet<u32> =
            self.services.iter().flat_map(|s| &s.tables).map(|t| t.id.into()).collect();
        self.plane.services.retain(|plan| there.contains(&plan.record.id));
        let names = self.services.iter().enumerate();
        self.by_name = names.map(|(at, state)| (state.config.name.clone(), at)).collect();
        if let Some(classes) = prepared.classes {
            self.routing.want(classes);
        }
        self.following.forget();
        self.epoch += 1;
    }
}

impl Baseline {
    /// The names of services that the plan is about: those that change and those that go.
    pub fn concerned(&self) -> impl Iterator<Item = &str> {
        let changed = self.services.iter().filter(|(_, before)| !matches!(before, Before::Same));
        let changed = changed.map(|(config, _)| config.name.as_str());
        changed.chain(self.removed.iter().map(|removal| removal.config.name.as_str()))
    }

    /// Plans.
    ///
    /// # Errors
    /// When there is no room for what is new.
    pub fn prepare(self) -> Result<Prepared, PlanError> {
        let Self { services, removed, routing, mut claims, raises, epoch, now_ms } = self;
        let classes = routing.compile()?;
        record::configured_nat_sources(services.iter().map(|(config, _)| &**config))
            .map_err(|(service, needed)| PlanError::NatSources { service, needed })?;
        let mut prepared = Vec::with_capacity(services.len());
        for (config, before) in services {
            let (before, parked) = match before {
                Before::Same => {
                    prepared.push(Next::Same(config.name.clone()));
                    continue;
                }
                Before::Changed(state, followed) => (Some(*state), followed),
                Before::New(parked) => (None, parked),
            };
            let made = make(config, before, parked, &raises, &mut claims, now_ms)?;
            prepared.push(Next::Made(Box::new(made)));
        }
        Ok(Prepared { services: prepared, classes, removed, hops: Hops::new(), epoch })
    }
}

impl Prepared {
    /// The services that change or come.
    pub fn made(&self) -> impl Iterator<Item = &Made> {
        self.services.iter().filter_map(|next| match next {
            Next::Same(_) => None,
            Next::Made(made) => Some(&**made),
        })
    }

    /// The services that go.
    pub fn removed(&self) -> &[Removal] {
        &self.removed
    }

    /// How many clients are in other classes, if routes or audiences have changed.
    pub fn classes(&self) -> Option<ClassChange> {
        self.classes.as_ref().map(|classes| classes.change)
    }

    /// Addresses whose next hops nobody has asked for yet.
    pub fn unknown_hops(&self) -> BTreeSet<IpAddr> {
        let of = |made: &Made| -> Vec<IpAddr> {
            let backends = made.state.tables.iter().flat_map(Table::backends);
            backends.filter(|b| is_unknown(b)).map(|b| b.addr.ip()).collect()
        };
        self.made().flat_map(of).collect()
    }

    /// Takes over what has become known of next hops, and compiles the tables.
    pub fn warm(&mut self, hops: Hops, now_ms: BootMs) {
        let made = self.services.iter_mut().filter_map(|next| match next {
            Next::Same(_) => None,
            Next::Made(made) => Some(made),
        });
        let made: Vec<_> = made.collect();
        let buckets = made.iter().map(|made| made.state.buckets()).sum();
        let alone = made.len() == 1;
        parallel::map(made, buckets, |made| {
            made.state.set_next_hops(&hops);
            made.steps = Some(made.state.step(now_ms, alone));
        });
        self.hops = hops;
    }
}

impl Ready {
    /// The services that change or come.
    pub fn made(&self) -> impl Iterator<Item = &Made> {
        self.prepared.made()
    }

    /// The services that go.
    pub fn removed(&self) -> &[Removal] {
        self.prepared.removed()
    }

    /// How many clients are in other classes, if routes or audiences have changed.
    pub fn classes(&self) -> Option<ClassChange> {
        self.prepared.classes()
    }
}

/// Takes the numbers that `made` was given and `before` does not have. `false` if one of them
/// is not free.
fn reserve(claims: &mut Claims, made: &ServiceState, before: Option<&ServiceState>) -> bool {
    let old = || before.iter().flat_map(|state| &state.tables);
    let had: HashSet<BackendIndex> = old().flat_map(indices_of).collect();
    made.tables.iter().all(|table| {
        let pages = record::page_count(&made.config);
        let id = old().any(|o| o.id == table.id) || claims.ids.reserve(table.id);
        let run = old().any(|o| o.first_page == table.first_page)
            || claims.pages.reserve(table.first_page, pages);
        let mut new = indices_of(table).filter(|index| !had.contains(index));
        id && run && new.all(|index| claims.indices.reserve(index))
    })
}

/// How a service goes on with `config`.
fn make(
    config: Arc<Service>,
    before: Option<ServiceState>,
    parked: Option<ServiceRecord>,
    raises: &Raises,
    claims: &mut Claims,
    now_ms: BootMs,
) -> Result<Made, PlanError> {
    let follows = config.derived.as_ref().is_some_and(|of| of.follows);
    let stored = before.as_ref().map(ServiceState::stored_whole);
    let known = match follows {
        true => parked.as_ref().or(stored.as_ref()),
        false => stored.as_ref().or(parked.as_ref()),
    };
    let slots = before.as_ref().map(slots_of);
    let mut beginning = adopt::begin(&config, slots.as_ref(), known)
        .map_err(|reason| PlanError::Split { service: config.name.clone(), reason })?;
    let (split, moved) = match beginning.news.take() {
        Some((_, split, moved)) => (split, moved),
        None => {
            let nothing = canary_ebpf_common::compile::encode_changes(&[]);
            (beginning.ownership.split.clone(), nothing)
        }
    };
    let control_name = &config.versions[config.control].name;
    let control = slot(&beginning.slots, control_name).unwrap_or(0);
    if follows {
        // By now in its own slots.
        let own = Slots { names: &beginning.slots, control };
        let raise = raises.get(&config.name);
        beginning.ownership = follow::followed(&beginning.ownership, own, own, raise);
    }
    let mut state = ServiceState {
        control,
        slots: beginning.slots,
        ownership: beginning.ownership,
        tables: Vec::new(),
        admins: adopt::admins(&config, known, std::iter::empty()),
        dirty: true,
        generation: before.as_ref().map_or(0, |state| state.generation),
        rest_ms: None,
        config,
    };
    let mut made = Change { before: before.as_ref(), vacated: Vec::new(), released: Vec::new() };
    for family in [Family::V4, Family::V6] {
        if state.config.vips.iter().any(|vip| Family::of(*vip) == family) {
            let placements = Placements::begin(&state.config, family, &state.slots, known);
            let table = made.table(&state, family, placements, claims, now_ms)?;
            state.tables.push(table);
        }
    }
    let Change { mut vacated, mut released, .. } = made;
    let old = || before.iter().flat_map(|state| &state.tables);
    for gone in old().filter(|old| !state.tables.iter().any(|table| table.id == old.id)) {
        released.extend(indices_of(gone));
        vacated.push(self::vacated(gone));
    }
    claims.missing_backends(&mut state, now_ms)?;
    let upheavals = before.as_ref().map(|before| upheavals(before, &state)).unwrap_or_default();
    let rehashed = upheavals.iter().any(|one| matches!(one, Upheaval::Rehash(_)));
    let mut preview = match &before {
        Some(_) => preview(&mut state, now_ms),
        None => Preview::default(),
    };
    if rehashed {
        preview.moved = state.tables.iter().map(|_| (0..state.config.buckets).collect()).collect();
    }
    let buckets = old().map(|old| {
        let length = old.entries.len() as u32;
        let at = state.tables.iter().position(|table| table.id == old.id);
        match at.and_then(|at| preview.moved.get(at)).filter(|_| !rehashed) {
            // Of a larger table, each bucket is one of the smaller.
            Some(moved) => moved.iter().map(|bucket| bucket % length).collect(),
            None => (0..length).collect(),
        }
    });
    Ok(Made {
        buckets: buckets.collect(),
        records: before.as_ref().map(records).unwrap_or_default(),
        upheavals,
        preview,
        record: state.stored_whole(),
        split,
        moved,
        generation: before.as_ref().map(|state| state.generation),
        before: before.map(|state| state.config),
        state,
        parked,
        steps: None,
        vacated,
        released,
    })
}

/// What becomes of the tables of a service.
struct Change<'a> {
    before: Option<&'a ServiceState>,
    vacated: Vec<Vacated>,
    released: Vec<BackendIndex>,
}

impl Change<'_> {
    /// The table for `family`: the one that there was, or an empty one.
    fn table(
        &mut self,
        state: &ServiceState,
        family: Family,
        placements: Placements,
        claims: &mut Claims,
        now_ms: BootMs,
    ) -> Result<Table, PlanError> {
        // Of no use to the new way: addresses that were translated, or entries for a few
        // connections only.
        let goes_on = |before: &&ServiceState| before.config.forward == state.config.forward;
        let old = self.before.filter(goes_on).and_then(|before| {
            let table = before.tables.iter().find(|table| table.family == family)?;
            Some((before, table))
        });
        let Some((before, old)) = old else {
            return claims.table(state, family, None, &Adopted::default(), placements, now_ms);
        };
        let config = &state.config;
        let length = old.entries.len();
        let mut first_page = old.first_page;
        if length != config.buckets as usize {
            let needed = record::page_count(config);
            let free = claims.pages.free();
            first_page = claims.pages.take(needed, now_ms).ok_or_else(|| PlanError::Pages {
                service: config.name.clone(),
                needed,
                free,
            })?;
            self.vacated.push(Vacated { id: None, first_page: old.first_page });
        }
        let all = 0..config.buckets;
        let forgets = rehash(&before.config, config).is_some();
        let entry = |bucket: u32| {
            let entry = old.entries[bucket as usize % length];
            if forgets { Entry::steady(entry.current()) } else { entry }
        };
        let record = |bucket: u32| old.ledger[bucket as usize % length];
        let (entries, ledger): (Arc<Packed<Entry>>, Arc<Packed<LedgerEntry>>) =
            match forgets || length != config.buckets as usize {
                true => (
                    Arc::new(all.clone().map(entry).collect()),
                    Arc::new(all.clone().map(record).collect()),
                ),
                false => (Arc::clone(&old.entries), Arc::clone(&old.ledger)),
            };
        let mut table = old.successor(first_page, entries, ledger, placements);
        let repeated = |set: &BucketSet| -> BucketSet {
            all.clone().filter(|bucket| set.contains(bucket % length as u32)).collect()
        };
        if forgets {
            // A flow's entry may be looked for in any bucket now.
            table.unswept = all.clone().collect();
            table.sweeping = BucketSet::default();
            table.prepare(BucketSet::default());
            for gone in &mut table.draining {
                gone.waiting = Some(BucketSet::default());
            }
        } else if length != config.buckets as usize {
            table.unswept = repeated(&table.unswept);
            table.sweeping = repeated(&table.sweeping);
            table.prepare(BucketSet::default());
            for waiting in table.draining.iter_mut().filter_map(|gone| gone.waiting.as_mut()) {
                *waiting = repeated(waiting);
            }
        }
        follow_backends(&mut table, state, now_ms);
        Ok(table)
    }
}

/// Sorts a table's backends by whether the configuration has them. Those that are new to it
/// have no record yet.
fn follow_backends(table: &mut Table, state: &ServiceState, now_ms: BootMs) {
    let config = &state.config;
    let configured = |at: u8, addr: SocketAddr| -> Option<&Backend> {
        let name = state.slots.get(usize::from(at))?;
        let version = config.versions.iter().find(|v| v.name == *name)?;
        version.backends.iter().find(|b| b.addr == addr)
    };
    let checked = config.health != Health::None;
    let admin = |addr| state.admins.get(&addr).copied().unwrap_or_default();
    let drain = record::policy(config).drain_ms;
    let until_ms = drain.map(|drain| now_ms.saturating_add(drain));
    let (mut live, mut draining) = (Vec::new(), Vec::new());
    for b in std::mem::take(&mut table.backends) {
        match configured(b.slot, b.addr) {
            Some(Backend { weight, .. }) => live.push(LiveBackend {
                weight: *weight,
                down: b.down && checked,
                admin: admin(b.addr),
                ..b
            }),
            None => draining.push(Draining {
                index: b.index,
                slot: b.slot,
                addr: b.addr,
                down: b.down,
                maint: b.admin == crate::store::Admin::Maint,
                hop: b.hop,
                until_ms,
                waiting: None,
            }),
        }
    }
    for d in std::mem::take(&mut table.draining) {
        let twice = live.iter().any(|b| (b.slot, b.addr) == (d.slot, d.addr));
        match configured(d.slot, d.addr).filter(|_| !twice) {
            // It comes back: with its record, which open connections still name.
            Some(Backend { weight, .. }) => live.push(LiveBackend {
                index: d.index,
                slot: d.slot,
                addr: d.addr,
                weight: *weight,
                down: d.down && checked,
                hop: d.hop,
                admin: admin(d.addr),
                slow_start: SlowStart::Away,
            }),
            None => draining.push(d),
        }
    }
    (table.backends, table.draining) = (live, draining);
}

/// The key whose change sends clients to other buckets, if there is one.
fn rehash(old: &Service, new: &Service) -> Option<&'static str> {
    let record = |service| record::service_record(service, 0, 0);
    let (old_record, new_record) = (record(old), record(new));
    let by_connection = |record: &abi::Service| record.flags & abi::SERVICE_HASH_CONNECTION;
    let masks = |record: &abi::Service| (record.mask_v4_be, record.mask_v6);
    if by_connection(&old_record) != by_connection(&new_record) {
        Some("stickiness")
    } else if masks(&old_record) != masks(&new_record) {
        Some("stickiness` or `prefix")
    } else if old.hash_key != new.hash_key {
        Some("hash_key")
    } else if new.buckets < old.buckets {
        Some("buckets")
    } else {
        None
    }
}

fn upheavals(before: &ServiceState, after: &ServiceState) -> Vec<Upheaval> {
    let mut upheavals = Vec::new();
    if before.config.forward != after.config.forward {
        upheavals.push(Upheaval::Forward);
    }
    upheavals.extend(rehash(&before.config, &after.config).map(Upheaval::Rehash));
    let stays = |family| after.tables.iter().any(|table| table.family == family);
    let gone = before.tables.iter().map(|table| table.family).filter(|family| !stays(*family));
    upheavals.extend(gone.map(Upheaval::Family));
    upheavals
}

/// What would move, were the next hops of new backends known, and all of them had their whole
/// share.
fn preview(state: &mut ServiceState, now_ms: BootMs) -> Preview {
    let ServiceState { config, control, ownership, tables, .. } = state;
    let ownership: &Ownership = ownership;
    let mut preview = Preview::default();
    for table in tables {
        let mut backends = table.backends.clone();
        for backend in &mut backends {
            if is_unknown(backend) {
                backend.hop = Ok(ASSUMED);
            }
            if backend.slow_start == SlowStart::Away {
                backend.slow_start = SlowStart::Whole;
            }
        }
        let assignment = table.desired(&inputs(config, *control, ownership, now_ms), &backends);
        let (moved, touched) = table.moved(&assignment.backends, |index| index);
        preview.touched.extend(touched);
        preview.fell_back |= assignment.fell_back;
        preview.moved.push(moved);
    }
    preview
}

/// What a service's table would say of its slots: what [`adopt::begin`] goes by.
fn slots_of(state: &ServiceState) -> AdoptedService {
    AdoptedService {
        id: 0,
        name: state.config.name.clone(),
        family: Family::V4,
        versions: state.slots.clone(),
        control: state.control,
        first_page: 0,
        buckets: 0,
        entries: Vec::new(),
        ledger: Vec::new(),
        record: None,
        packets: 0,
    }
}

/// Whether a version has waited for a slot that is free by now.
fn gets_slot(state: &ServiceState) -> bool {
    let free = state.slots.len() < abi::MAX_VERSIONS || state.slots.iter().any(String::is_empty);
    let waits = |version: &Version| slot(&state.slots, &version.name).is_none();
    free && state.config.versions.iter().any(waits)
}

fn records(state: &ServiceState) -> Vec<abi::Service> {
    let record = |table: &Table| record::service_record(&state.config, table.id, table.first_page);
    state.tables.iter().map(record).collect()
}

fn vacated(table: &Table) -> Vacated {
    Vacated { id: Some(table.id), first_page: table.first_page }
}

/// Every record of a table.
fn indices_of(table: &Table) -> impl Iterator<Item = BackendIndex> + '_ {
    let gone = table.draining.iter().map(|gone| gone.index);
    table.backends.iter().map(|backend| backend.index).chain(gone)
}
