//! Which class each client is of, and which table of a service a class has.
//!
//! Owns the numbers of classes, and what keeps connections where they are when a client's class
//! changes ([`canary_ebpf_common::networks::Classes`]). Must not know where networks come from.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use canary_ebpf_common::{
    abi::{self, ClassState, TableKey},
    class::{Class, ClassEntry},
    networks::{Classes, Labelled, Pace, Prefix, Width, combine, flatten, union},
};

use ipnet::IpNet;

use super::{BootMs, Family, PlanError, Planner, ServiceState, record};
use crate::{
    audience::{
        Networks,
        members::Present,
        network,
        routes::{self, Numbers, ServiceRoutes},
    },
    config::{
        derived,
        model::{Config, Protocol},
    },
};

/// So many networks that stand in the kernel are gone through in a millisecond, about: members are
/// taken in so seldom that this is a small part of the loop's time.
const NETWORKS_A_MS: usize = 4_000;
/// As often as that at most, milliseconds.
const MEMBERS_MS: BootMs = 50;

/// The families, in the order in which their networks are kept.
const WIDTHS: [Width; 2] = [Width::V4, Width::V6];

/// What the kernel side should hold of clients' classes.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassPlan {
    /// Networks of IPv4, then of IPv6. One that is the very same allocation as in the plan that was
    /// applied last has not changed.
    pub networks: [Arc<Labelled<ClassState>>; 2],
    /// The tables of classes, by ascending key.
    pub tables: Vec<(TableKey, abi::Service)>,
    /// By the id of such a table, that of the service at the addresses.
    pub bases: BTreeMap<u32, u32>,
}

impl Default for ClassPlan {
    fn default() -> Self {
        let nobody = |width| Arc::new(Labelled::new(width, ClassState::default()));
        Self { networks: WIDTHS.map(nobody), tables: Vec::new(), bases: BTreeMap::new() }
    }
}

impl ClassPlan {
    /// The class of a client.
    pub fn class(&self, client: std::net::IpAddr) -> ClassState {
        self.networks[usize::from(client.is_ipv6())].at(client)
    }

    /// What steers clients of `class` in the service with this record.
    pub fn table(&self, base: &abi::Service, class: Class) -> abi::Service {
        let key = TableKey { service: base.id, class: class.get().into() };
        let at = self.tables.binary_search_by_key(&key, |(key, _)| *key);
        at.map_or(*base, |at| self.tables[at].1)
    }
}

/// What the pinned maps hold of classes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdoptedClasses {
    /// Networks of IPv4, then of IPv6.
    pub networks: [Vec<(Prefix, ClassState)>; 2],
    /// The tables of classes.
    pub tables: Vec<(TableKey, abi::Service)>,
}

impl AdoptedClasses {
    /// The tables that clients, and connections from before a change, are steered by: services and
    /// audiences, `name` being that of a table's service.
    pub(super) fn remembered(
        &self,
        name: impl Fn(u32) -> Option<String>,
    ) -> BTreeSet<(String, String)> {
        let entries = self.networks.iter().flatten().map(|(_, state)| state.entry);
        let used: BTreeSet<Class> =
            entries.flat_map(|entry| [entry.current(), entry.previous()]).collect();
        let numbers = self.numbers(name);
        let meanings = numbers.iter().filter(|(class, _)| used.contains(class));
        meanings.flat_map(|(_, meaning)| meaning.clone()).collect()
    }

    /// What the classes mean, `name` being that of a table's service.
    fn numbers(&self, name: impl Fn(u32) -> Option<String>) -> Numbers {
        let mut meanings: BTreeMap<Class, routes::Meaning> = BTreeMap::new();
        for (TableKey { service: _, class }, record) in &self.tables {
            let Some(name) = name(record.id) else { continue };
            let Some((service, audience)) = derived::parts(&name) else { continue };
            let class = Class::new(*class as u16);
            meanings.entry(class).or_default().insert(service.to_owned(), audience.to_owned());
        }
        Numbers::adopted(meanings)
    }
}

/// What classes are compiled from.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Sources {
    audiences: BTreeMap<String, Arc<Networks>>,
    /// Audiences that may have members.
    dynamic: BTreeSet<String>,
    /// Members with a lifetime, by audience, also of those that may have none just now.
    members: MembersOf,
    routes: Vec<ServiceRoutes>,
}

type MembersOf = BTreeMap<String, Arc<Present>>;

impl Sources {
    /// What `config` says, with `members`.
    fn of(config: &Config, members: MembersOf) -> Self {
        let with_routes = config.services.iter().filter(|service| !service.routes.is_empty());
        let routes: Vec<ServiceRoutes> = with_routes
            .map(|service| ServiceRoutes {
                service: service.name.clone(),
                audiences: service.routes.iter().map(|route| route.audience.clone()).collect(),
            })
            .collect();
        let routed = |name: &String| routes.iter().any(|one| one.audiences.contains(name));
        let audiences = config.audiences.iter().filter(|audience| routed(&audience.name));
        let dynamic = audiences.clone().filter(|audience| audience.dynamic.is_some());
        let dynamic = dynamic.map(|one| one.name.clone()).collect();
        let audiences = audiences.map(|one| (one.name.clone(), Arc::clone(&one.networks)));
        Self { audiences: audiences.collect(), dynamic, members, routes }
    }

    /// The members that count.
    fn members(&self) -> impl Iterator<Item = (&str, &Present)> {
        let members = self.members.iter().filter(|(name, _)| self.dynamic.contains(*name));
        members.map(|(name, present)| (name.as_str(), &**present))
    }

    /// The classes of all clients.
    fn classes(&self, width: Width, numbers: &mut Numbers) -> Result<Labelled<Class>, PlanError> {
        let audiences = self.audiences.iter().map(|(name, nets)| (name.as_str(), nets.of(width)));
        let members: Vec<(&str, Vec<Prefix>)> = self
            .members()
            .map(|(name, present)| (name, present.of(width).iter().copied().collect()))
            .collect();
        let members = members.iter().map(|(name, networks)| (*name, networks.as_slice()));
        numbered(width, audiences.chain(members), &self.routes, numbers)
    }

    /// The same of those in `within`, which is sorted and has nothing inside another. Others are
    /// left out.
    fn classes_within(
        &self,
        width: Width,
        within: &[Prefix],
        numbers: &mut Numbers,
    ) -> Result<Labelled<Class>, PlanError> {
        let audiences = self.audiences.iter();
        let audiences =
            audiences.map(|(name, nets)| (name.as_str(), clipped(nets.of(width), within)));
        let members = self.members().map(|(name, present)| (name, present.within(width, within)));
        let parts: Vec<(&str, Vec<Prefix>)> = audiences.chain(members).collect();
        let parts = parts.iter().map(|(name, networks)| (*name, networks.as_slice()));
        numbered(width, parts, &self.routes, numbers)
    }
}

fn numbered<'p>(
    width: Width,
    parts: impl IntoIterator<Item = (&'p str, &'p [Prefix])>,
    routes: &[ServiceRoutes],
    numbers: &mut Numbers,
) -> Result<Labelled<Class>, PlanError> {
    routes::classes(width, parts, routes, numbers)
        .map_err(|reason| PlanError::Classes { reason: reason.to_string() })
}

/// What `networks` and `within` have in common. Both are sorted, and have nothing inside another.
fn clipped(networks: &[Prefix], within: &[Prefix]) -> Vec<Prefix> {
    let mut both = Vec::new();
    for part in within {
        let from = networks.partition_point(|network| network < part);
        if from.checked_sub(1).is_some_and(|before| networks[before].contains(*part)) {
            both.push(*part);
            continue;
        }
        let inside = networks[from..].iter().take_while(|network| part.contains(**network));
        both.extend(inside);
    }
    both
}

/// How many clients an other set of classes concerns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassChange {
    /// Networks that are in another class.
    pub networks: usize,
    /// Addresses in them, by family.
    pub addresses: [u128; 2],
}

/// Classes that are compiled and not in force yet.
pub(super) struct Compiled {
    sources: Sources,
    numbers: Numbers,
    classes: [Labelled<Class>; 2],
    pub(super) change: ClassChange,
}

/// What classes are compiled beside the loop from.
pub(super) struct RoutingBase {
    present: Sources,
    wanted: Sources,
    numbers: Numbers,
    classes: [Arc<Labelled<Class>>; 2],
}

impl RoutingBase {
    /// Compiles, if that leads to anything else than what there is.
    pub(super) fn compile(self) -> Result<Option<Compiled>, PlanError> {
        let Self { present, wanted, numbers, classes } = self;
        if present == wanted {
            return Ok(None);
        }
        let before = classes.each_ref().map(|classes| &**classes);
        compile(wanted, numbers, before).map(Some)
    }
}

fn compile(
    sources: Sources,
    mut numbers: Numbers,
    before: [&Labelled<Class>; 2],
) -> Result<Compiled, PlanError> {
    let mut one = |width| sources.classes(width, &mut numbers);
    let classes = [one(Width::V4)?, one(Width::V6)?];
    room_for_tables(&numbers)?;
    let mut change = ClassChange::default();
    for (at, (before, after)) in before.into_iter().zip(&classes).enumerate() {
        let changed = combine(before, after, |before, after| before != after);
        change.networks += changed.prefixes().iter().filter(|(_, changed)| *changed).count();
        let of = changed.addresses().into_iter().find(|(changed, _)| *changed);
        change.addresses[at] = of.map_or(0, |(_, count)| count);
    }
    Ok(Compiled { sources, numbers, classes, change })
}

fn room_for_tables(numbers: &Numbers) -> Result<(), PlanError> {
    let tables: usize = numbers.iter().map(|(_, meaning)| 2 * meaning.len()).sum();
    if tables > abi::CLASS_TABLES as usize {
        return Err(PlanError::Classes {
            reason: format!(
                "the routes and audiences overlap in so many ways that {tables} tables of services would have \
                 to be found by them, and {} is the most; let audiences overlap less",
                abi::CLASS_TABLES
            ),
        });
    }
    Ok(())
}

/// Classes as they are, and on their way.
pub(super) struct Routing {
    sources: Sources,
    numbers: Numbers,
    wanted: [Arc<Labelled<Class>>; 2],
    networks: [Classes; 2],
    /// Networks whose members have changed since `wanted` was made, and from when on they are
    /// taken in.
    pending: [Vec<Prefix>; 2],
    members_ms: BootMs,
    /// Nobody has a connection from before.
    new: bool,
    /// Tables of classes may have come or gone.
    stale: bool,
    pub(super) plan: ClassPlan,
}

/// What a step of the classes did.
pub(super) struct RoutingStep {
    pub(super) changed: bool,
    pub(super) due_ms: Option<BootMs>,
}

impl Routing {
    /// Goes on from what the maps hold; `name` is that of a table's service. Members come with
    /// [`change_members`](Self::change_members), before the first step.
    pub(super) fn begin(
        config: &Config,
        adopted: AdoptedClasses,
        name: impl Fn(u32) -> Option<String>,
        new: bool,
    ) -> Result<Self, PlanError> {
        let mut numbers = adopted.numbers(name);
        let [v4, v6] = adopted.networks;
        let mut networks =
            [(Width::V4, v4), (Width::V6, v6)].map(|(width, found)| Classes::adopted(width, found));
        numbers.retain(&used(&networks));
        let nobody = WIDTHS.map(|width| Labelled::new(width, Class::REST));
        let compiled = compile(Sources::of(config, MembersOf::new()), numbers, nobody.each_ref())?;
        let Compiled { sources, numbers, classes, change: _ } = compiled;
        for (networks, wanted) in networks.iter_mut().zip(&classes) {
            match new {
                // Nobody has a connection from before.
                true => *networks = Classes::first(wanted.clone()),
                false => networks.want(wanted.clone()),
            }
        }
        let wanted = classes.map(Arc::new);
        let plan = ClassPlan::default();
        let pending = Default::default();
        Ok(Self {
            sources,
            numbers,
            wanted,
            networks,
            pending,
            members_ms: 0,
            new,
            stale: true,
            plan,
        })
    }

    /// The numbers that somebody refers to.
    fn used_numbers(&self) -> Numbers {
        let mut numbers = self.numbers.clone();
        let mut used = used(&self.networks);
        used.extend(self.wanted.iter().flat_map(|w| w.prefixes()).map(|(_, class)| *class));
        numbers.retain(&used);
        numbers
    }

    /// What classes for `config` are compiled from.
    pub(super) fn base(&self, config: &Config) -> RoutingBase {
        RoutingBase {
            present: self.sources.clone(),
            wanted: Sources::of(config, self.sources.members.clone()),
            numbers: self.used_numbers(),
            classes: self.wanted.clone(),
        }
    }

    /// Makes sure that `compiled` fits to the numbers that have been given out since it was begun.
    pub(super) fn renumbered(&self, compiled: Compiled) -> Result<Compiled, PlanError> {
        if let Some(numbers) = self.numbers.with(&compiled.numbers) {
            return Ok(Compiled { numbers, ..compiled });
        }
        let before = self.wanted.each_ref().map(|classes| &**classes);
        compile(compiled.sources, self.used_numbers(), before)
    }

    /// Goes on with other classes from the next step on.
    pub(super) fn want(&mut self, compiled: Compiled) {
        let Compiled { sources, numbers, classes, change: _ } = compiled;
        let present = std::mem::take(&mut self.sources.members);
        (self.sources, self.numbers) = (sources, numbers);
        let known = std::mem::replace(&mut self.sources.members, present);
        self.pending = Default::default();
        // What has come and gone since it was begun.
        let nobody = Arc::default();
        for (name, present) in &self.sources.members {
            let known = known.get(name).unwrap_or(&nobody);
            if !Arc::ptr_eq(known, present) {
                for (width, pending) in WIDTHS.into_iter().zip(&mut self.pending) {
                    pending.extend(known.of(width).symmetric_difference(present.of(width)));
                }
            }
        }
        self.go_on_with(classes);
    }

    fn go_on_with(&mut self, classes: [Labelled<Class>; 2]) {
        self.stale = true;
        self.wanted = classes.map(Arc::new);
        for (networks, wanted) in self.networks.iter_mut().zip(&self.wanted) {
            match self.new {
                true => *networks = Classes::first((**wanted).clone()),
                false => networks.want((**wanted).clone()),
            }
        }
    }

    /// Adds members to an audience, and takes others out. They count from one of the next steps on.
    ///
    /// # Errors
    /// They would make too many classes: nothing has changed then.
    pub(super) fn change_members(
        &mut self,
        audience: &str,
        added: &[IpNet],
        removed: &[IpNet],
    ) -> Result<(), PlanError> {
        self.put_members(audience, added, removed);
        if !self.sources.dynamic.contains(audience) {
            return Ok(());
        }
        let mut changed = self.pending.clone();
        for net in added.iter().chain(removed) {
            changed[usize::from(matches!(net, IpNet::V6(_)))].push(network::prefix(*net));
        }
        let changed = changed.map(union);
        // Numbers that nobody has any more are given out again only where there are no others.
        let numbers = self
            .numbered(&changed, self.numbers.clone())
            .or_else(|_| self.numbered(&changed, self.used_numbers()));
        match numbers {
            Ok(numbers) => {
                self.stale |= numbers != self.numbers;
                self.numbers = numbers;
                self.pending = changed;
                Ok(())
            }
            Err(error) => {
                self.put_members(audience, removed, added);
                Err(error)
            }
        }
    }

    fn put_members(&mut self, audience: &str, added: &[IpNet], removed: &[IpNet]) {
        let present = self.sources.members.entry(audience.to_owned()).or_default();
        let present = Arc::make_mut(present);
        added.iter().for_each(|net| present.insert(*net));
        removed.iter().for_each(|net| present.remove(*net));
    }

    /// `numbers` with those that clients in `changed` need.
    fn numbered(
        &self,
        changed: &[Vec<Prefix>; 2],
        mut numbers: Numbers,
    ) -> Result<Numbers, PlanError> {
        for (width, changed) in WIDTHS.into_iter().zip(changed) {
            self.sources.classes_within(width, changed, &mut numbers)?;
        }
        room_for_tables(&numbers)?;
        Ok(numbers)
    }

    /// Takes in what has become of members, unless that was done a moment ago. Returns when it is
    /// due then.
    fn take_members_in(&mut self, now_ms: BootMs) -> Option<BootMs> {
        if self.pending.iter().all(Vec::is_empty) {
            return None;
        }
        if now_ms < self.members_ms {
            return Some(self.members_ms);
        }
        let size: usize = self.networks.iter().map(|one| one.states().prefixes().len()).sum();
        self.members_ms = now_ms + MEMBERS_MS + (size / NETWORKS_A_MS) as BootMs;
        let mut classes = self.wanted.each_ref().map(|wanted| (**wanted).clone());
        for ((width, classes), pending) in WIDTHS.into_iter().zip(&mut classes).zip(&self.pending) {
            let within = union(pending.clone());
            // Numbers for all of them were given out when they came.
            let inside = self.sources.classes_within(width, &within, &mut self.numbers);
            let Ok(inside) = inside else { return Some(now_ms + 1_000) };
            let within = within.into_iter().map(|prefix| (prefix, true)).collect();
            let within = flatten(width, within, false, |_, within| within, |within| within);
            let inside = combine(&inside, &within, |class, within| (class, within));
            *classes = combine(classes, &inside, |before, (class, within)| match within {
                true => class,
                false => before,
            });
        }
        self.pending = Default::default();
        self.go_on_with(classes);
        None
    }

    /// The tables that clients and their older connections are steered by: services and audiences.
    pub(super) fn remembered(&self) -> BTreeSet<(String, String)> {
        let used = used(&self.networks);
        let meanings = self.numbers.iter().filter(|(class, _)| used.contains(class));
        meanings.flat_map(|(_, meaning)| meaning.clone()).collect()
    }

    /// Whether connections of some clients are remembered because of their class.
    pub(super) fn tracks(&self) -> bool {
        self.networks.iter().any(Classes::tracks)
    }

    /// The audience whose route holds clients of `class` in `service`.
    pub(super) fn audience(&self, class: Class, service: &str) -> Option<&str> {
        self.numbers.audience(class, service)
    }

    /// Brings classes up to `now_ms`, and their tables to those of `services`, if these are others
    /// than they were.
    pub(super) fn step(
        &mut self,
        services: &[ServiceState],
        others: bool,
        now_ms: BootMs,
    ) -> RoutingStep {
        let members_ms = self.take_members_in(now_ms);
        self.new = false;
        let pace = pace(services);
        let now_s = u32::try_from(now_ms / 1000).unwrap_or(u32::MAX);
        let mut due_s: Option<u32> = None;
        let mut changed = false;
        for (networks, plan) in self.networks.iter_mut().zip(&mut self.plan.networks) {
            due_s = [due_s, networks.step(now_s, pace)].into_iter().flatten().min();
            if !Arc::ptr_eq(plan, networks.states()) {
                changed = true;
                *plan = Arc::clone(networks.states());
            }
        }
        if std::mem::take(&mut self.stale) || others {
            let (tables, bases) = self.tables(services);
            changed |= tables != self.plan.tables || bases != self.plan.bases;
            (self.plan.tables, self.plan.bases) = (tables, bases);
        }
        let due_ms = due_s.map(|at| BootMs::from(at) * 1000);
        RoutingStep { changed, due_ms: [due_ms, members_ms].into_iter().flatten().min() }
    }

    fn tables(
        &self,
        services: &[ServiceState],
    ) -> (Vec<(TableKey, abi::Service)>, BTreeMap<u32, u32>) {
        let (mut tables, mut bases) = (Vec::new(), BTreeMap::new());
        if self.numbers.iter().next().is_none() {
            return (tables, bases);
        }
        let by_name: BTreeMap<&str, &ServiceState> =
            services.iter().map(|state| (state.config.name.as_str(), state)).collect();
        for (class, meaning) in self.numbers.iter() {
            for (service, audience) in meaning {
                let own = derived::name(service, audience);
                let (Some(base), Some(own)) =
                    (by_name.get(service.as_str()), by_name.get(own.as_str()))
                else {
                    continue;
                };
                for family in [Family::V4, Family::V6] {
                    let of = |state: &ServiceState| {
                        let table = state.tables.iter().find(|table| table.family == family)?;
                        Some(record::service_record(&state.config, table.id, table.first_page))
                    };
                    let (Some(base), Some(own)) = (of(base), of(own)) else { continue };
                    tables.push((TableKey { service: base.id, class: class.get().into() }, own));
                    bases.insert(own.id, base.id);
                }
            }
        }
        tables.sort_unstable_by_key(|(key, _)| *key);
        (tables, bases)
    }

    /// How many networks wait to be swept.
    pub(super) fn unswept(&self) -> usize {
        self.networks.iter().map(Classes::unswept).sum()
    }

    pub(super) fn begin_sweep(&mut self) {
        for networks in &mut self.networks {
            networks.begin_sweep();
        }
    }

    /// The sweep that was begun is done. Returns whether something has waited for it.
    pub(super) fn swept(&mut self) -> bool {
        let [v4, v6] = &mut self.networks;
        v4.swept() | v6.swept()
    }
}

impl Planner {
    /// Whether connections of some clients are remembered because of their class.
    pub fn tracks_classes(&self) -> bool {
        self.routing.tracks()
    }

    /// The audience whose route holds clients of `class` in `service`.
    pub fn audience(&self, class: Class, service: &str) -> Option<&str> {
        self.routing.audience(class, service)
    }

    /// Adds members to an audience, and takes others out: those that it has not and those that it
    /// has. They count from one of the next steps on.
    ///
    /// # Errors
    /// They would make too many classes of clients: nothing has changed then.
    pub fn change_members(
        &mut self,
        audience: &str,
        added: &[IpNet],
        removed: &[IpNet],
    ) -> Result<(), PlanError> {
        self.routing.change_members(audience, added, removed)
    }

    /// `config` with the tables that it does not ask for any more and that connections go by.
    pub fn remembering(&self, config: &Config) -> Config {
        let tables = self.routing.remembered();
        config.remembering(tables.iter().map(|(service, audience)| (&**service, &**audience)))
    }

    /// A service and the tables of its audiences, which have the same backends.
    pub fn with_derived(&self, service: usize) -> std::ops::Range<usize> {
        let Some(state) = self.services.get(service) else { return 0..0 };
        let its = |one: &&ServiceState| {
            let of = one.config.derived.as_ref();
            of.is_some_and(|of| of.service == state.config.name)
        };
        // They stand behind it.
        let behind = self.services[service + 1..].iter().take_while(its).count();
        service..service + 1 + behind
    }
}

fn used(networks: &[Classes; 2]) -> BTreeSet<Class> {
    networks.iter().flat_map(Classes::used).collect()
}

/// How long changes of classes are remembered: for as long as the service that remembers longest.
fn pace(services: &[ServiceState]) -> Pace {
    let seconds = |d: std::time::Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX);
    let mut pace = Pace { drain_s: Some(0), learn_s: 0 };
    for state in services {
        let config = &state.config;
        // Translated flows have entries of their own, and some services take open connections
        // along: there, too, the tables of before are kept for as long.
        if !config.routed {
            continue;
        }
        pace.drain_s = match (pace.drain_s, config.drain) {
            (Some(longest), Some(drain)) => Some(longest.max(seconds(drain))),
            _ => None,
        };
        if config.ports.iter().any(|port| port.protocol == Protocol::Udp) {
            let idle = config.udp_idle.as_millis().div_ceil(1000);
            pace.learn_s = pace.learn_s.max(u32::try_from(idle).unwrap_or(u32::MAX));
        }
    }
    pace
}

/// What the program makes of a client: its class, and the record of the table that it is steered
/// by with that of the class before, if that counts.
pub fn followed(
    plan: &ClassPlan,
    base: &abi::Service,
    client: std::net::IpAddr,
) -> (ClassEntry, abi::Service, Option<abi::Service>) {
    if base.flags & abi::SERVICE_ROUTED == 0 {
        return (ClassEntry::default(), *base, None);
    }
    let class = plan.class(client).entry;
    let translates = base.flags & abi::ForwardMode::MASK == abi::ForwardMode::Nat as u32;
    let looks = class.tracked() && base.flags & abi::SERVICE_FORGETS == 0 && !translates;
    let before = looks.then(|| plan.table(base, class.previous()));
    (class, plan.table(base, class.current()), before)
}
