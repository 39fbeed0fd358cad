//! The state that the loop owns, and what each event makes of it.
//!
//! Must not know of sockets, signals, netlink or aya: what happens comes in as an
//! [`Event`] with its [`Moment`], what is to be done goes out through [`Kernel`]
//! and [`StateStore`], of which the tests have their own.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use canary_ebpf_common::{
    abi::{BackendCounters, FlowCounters},
    entry::{BackendIndex, Entry},
};

use tokio::sync::mpsc;

use super::{
    Counter, Pulse, Refusal, Request,
    changes::{Control, Notices, reckoned},
    explain,
    interfaces::NO_SUCH_INTERFACE,
    learn::{Asked, Learning},
    members::Book,
    panic::Panics,
    pressure::{Pressure, Reading},
    reload::{LastPackets, TakeBack},
    rollout::Rollouts,
    saving::not_stored,
    signals::{Known, WatchedService},
    status,
    tally::ByBackend,
};
use crate::{
    api::model::{InterfaceStatus, MapStatus},
    config::model::{Audience, Config, Forward},
    datapath::{PanicOrder, Swept},
    failpoint::Failpoint,
    health,
    hooks::Said,
    plan::{
        Adopted, BootMs, BucketSet, DataPlane, InterfaceMacs, News, NextHop, PanicMark, PlanError,
        Planner, ServicePlan, ServiceState, Start, Sweep,
    },
    rollout::watch::Counted,
    store::{ServiceRecord, StateStore, StoreError},
    telemetry::Metrics,
};

/// After this time what the kernel refused is tried again.
const RETRY_MS: u64 = 1_000;
/// So often in a row a plan is made anew because somebody writes the tables meanwhile.
const APPLIES: usize = 8;
/// So often what is not attached is tried again.
const ATTACH_MS: u64 = 5_000;
/// When something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Milliseconds of `CLOCK_BOOTTIME`: what everything is computed from.
    pub boot_ms: BootMs,
    /// Milliseconds since 1970: what people read.
    pub unix_ms: u64,
}

/// The interfaces of the configuration, each with its index if it is there.
pub type LinkStates = BTreeMap<String, Option<u32>>;

/// Something that happens to the agent.
#[derive(Debug)]
pub enum Event {
    /// Somebody asks for something.
    Request {
        /// What.
        request: Request,
        /// When it came.
        arrived: Instant,
    },
    /// The host's routes or neighbours have changed. Addresses that are not named
    /// keep what was known of them.
    NextHops(HashMap<IpAddr, Result<NextHop, String>>),
    /// Backends fail their checks, or pass them again.
    Health(Vec<health::Change>),
    /// Interfaces have come or gone.
    Links(LinkStates),
    /// MAC addresses that frames for this host have, by the interface that they come in by.
    Macs(Arc<BTreeMap<u32, InterfaceMacs>>),
    /// What an operator should know from one part of the agent, in place of what it
    /// said before.
    Alerts(&'static str, Vec<String>),
    /// The sweep that [`Kernel::sweep`] began is done, or why it is not.
    Swept(Result<(), String>),
    /// Somebody who was asked for a rollout has answered.
    Said(Said),
    /// What connections of a service have done was counted for a window.
    Counted(Counted),
    /// A second has passed.
    Tick,
    /// The time has come that the last call of [`State::handle`] gave.
    Wakeup,
}

/// A program on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The interface's index.
    pub ifindex: u32,
    /// `native` or `generic`.
    pub mode: &'static str,
    /// Why it is not what could be wished.
    pub warning: Option<String>,
}

/// Why the program is not on an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The interface does not exist.
    #[error("{}", NO_SUCH_INTERFACE)]
    Missing,
    /// Anything else.
    #[error("{0}")]
    Refused(String),
}

/// What the loop does to the kernel side, and reads there.
pub trait Kernel {
    /// Brings the maps to `plane`. Its sweep comes after it, with [`sweep`](Self::sweep).
    ///
    /// # Errors
    /// What the kernel refused. It is called again, with this plan or a later one.
    fn apply(&mut self, plane: &DataPlane) -> Result<(), String>;
    /// Puts the program on an interface.
    ///
    /// # Errors
    /// [`AttachError`].
    fn attach(&mut self, interface: &str) -> Result<Attachment, AttachError>;
    /// Says which MAC addresses frames for this host have, by the interface that they come in by.
    ///
    /// # Errors
    /// What the kernel refused.
    fn set_macs(&mut self, macs: &BTreeMap<u32, InterfaceMacs>) -> Result<(), String>;
    /// Takes the program off an interface, if it is there.
    ///
    /// # Errors
    /// What the kernel refused.
    fn detach(&mut self, interface: &str) -> Result<(), String>;
    /// Takes away what an earlier agent cleared in the maps and had not swept when it ended, by
    /// the services of `plane`, before that is applied.
    ///
    /// # Errors
    /// What the kernel refused.
    fn clean(&mut self, plane: &DataPlane) -> Result<(), String>;
    /// Begins to take away the flow entries that `sweep` names. [`Event::Swept`] says when that
    /// is done; it is not called again before.
    fn sweep(&mut self, sweep: Sweep);
    /// Lets flow entries go that have expired, when there is time for it.
    fn expire(&mut self);
    /// Has the connections of these services watched, and of no others.
    fn watch(&mut self, _: Vec<WatchedService>) {}
    /// What is known of what is watched.
    fn signals(&self) -> Known {
        Known::default()
    }
    /// What became of flow entries, and what the last pass over them has found.
    fn flows(&self) -> (FlowCounters, Swept);
    /// Counters of backends, in their order.
    fn counters(&self, backends: &[BackendIndex]) -> Vec<BackendCounters>;
    /// Packets by reason, in the order of [`canary_ebpf_common::abi::Reason::ALL`].
    fn reasons(&self) -> Vec<u64>;
    /// Size and use of the maps.
    fn maps(&self) -> Vec<MapStatus>;
    /// What counts open connections; `None` where there is nothing to count.
    fn counter(&self) -> Option<Counter> {
        None
    }
    /// Gives the system back what has been allocated and let go again.
    fn give_memory_back(&mut self) {}
    /// What was sent to control behind our back since the last call, with the tables as they are
    /// by now; `None` for nothing. Until it is called, [`apply`](Self::apply) refuses to write
    /// tables that somebody else has written.
    ///
    /// # Errors
    /// What the kernel refused. It is called again.
    fn panics(&mut self) -> Result<Option<Adopted>, String> {
        Ok(None)
    }
    /// What these marks say is stored.
    fn panics_adopted(&mut self, _: &[PanicMark]) {}
    /// Marks the tables of a service as sent to control, for the next agent. Returns the marks.
    ///
    /// # Errors
    /// What the kernel refused.
    fn mark_panic(&mut self, _: &PanicOrder) -> Result<Vec<PanicMark>, String> {
        Ok(Vec::new())
    }
    /// What tells one start of the host from another.
    fn boot_id(&self) -> String {
        String::new()
    }
}

/// Why the agent can't begin.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The configuration does not fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The state must not be touched.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An interface can't be attached to.
    #[error("interface {interface}: {error}")]
    Attach {
        /// Which.
        interface: String,
        /// Why.
        error: AttachError,
    },
    /// The maps can't be written.
    #[error("the forwarding tables can't be written: {0}")]
    Apply(String),
}

/// The state, and the two things that it acts on.
pub struct State<S, K> {
    pub(super) planner: Planner,
    /// `[[audience]]`, as it was read last.
    pub(super) audiences: Vec<Audience>,
    /// Members of audiences.
    pub(super) members: Book,
    pub(super) checks: health::Reports,
    pub(super) store: S,
    pub(super) kernel: K,
    pub(super) metrics: Metrics,
    pub(super) revision: u64,
    /// What beginning decided and the store does not know yet.
    pub(super) unsaved: Vec<News>,
    /// What the store knows of services that are not in the configuration.
    pub(super) parked: HashMap<String, ServiceRecord>,
    pub(super) last_packets: LastPackets,
    pub(super) interfaces: Vec<InterfaceStatus>,
    pub(super) links: LinkStates,
    /// What was written of the interfaces' MAC addresses last.
    pub(super) macs: Option<Arc<BTreeMap<u32, InterfaceMacs>>>,
    pub(super) alerts: BTreeMap<&'static str, Vec<String>>,
    pub(super) samples: status::Samples,
    /// Connections of some service are watched.
    pub(super) watches: bool,
    /// Splits that are being prepared.
    pub(super) learning: Vec<Learning>,
    pressure: Pressure,
    /// What was sent to control and is not stored yet.
    pub(super) panics: Panics,
    /// What waits for a confirmation, and what is frozen.
    pub(super) control: Control,
    /// Rollouts under way.
    pub(super) rollouts: Rollouts,
    /// Whom to ask for the earlier configuration.
    pub(super) take_backs: Option<mpsc::Sender<TakeBack>>,
    /// What has happened and is not stored yet.
    pub(super) notices: Notices,
    pub(super) begun_ms: BootMs,
    attach_ms: BootMs,
    /// The present plan is not in force, and is tried again then.
    pub(super) retry_ms: Option<BootMs>,
    /// What the kernel side is sweeping, and what it could not: that is tried again.
    sweep_under_way: Option<Sweep>,
    sweep_failed: Option<Sweep>,
    pub(super) in_force: bool,
    /// Memory has been let go since the last tick.
    pub(super) lets_go: bool,
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// The state as an agent begins with it: what the store says, brought about
    /// from what the maps hold. Neither maps nor interfaces are touched before
    /// [`go`](Self::go).
    ///
    /// # Errors
    /// When the configuration does not fit into the maps, or a newer release has
    /// written the store. Any other failure of the store is an alert: the agent
    /// goes on from what the maps hold, and refuses changes until they can be stored.
    pub fn begin(
        config: &Config,
        mut store: S,
        kernel: K,
        adopted: Adopted,
        metrics: Metrics,
        now: Moment,
    ) -> Result<Self, BeginError> {
        let mut alerts = BTreeMap::new();
        let snapshot = match store.load() {
            Ok(snapshot) => snapshot,
            Err(error @ StoreError::NewerSchema { .. }) => return Err(error.into()),
            Err(error) => {
                tracing::error!(%error, "the state can't be read: going on from what the maps hold");
                alerts.insert("store", vec![not_stored(&error)]);
                Default::default()
            }
        };
        let mut adopted = adopted;
        let mut marks = std::mem::take(&mut adopted.panics);
        let from_the_store = adopted.services.is_empty();
        let (planner, unsaved) = Planner::begin(Start {
            config,
            adopted,
            stored: &snapshot.services,
            now_ms: now.boot_ms,
        })?;
        let rollouts = snapshot.rollouts;
        let parked = snapshot.services.into_iter().filter(|s| planner.service(&s.name).is_none());
        let parked = parked.map(|record| (record.name.clone(), record)).collect();
        let interfaces = config
            .agent
            .interfaces
            .iter()
            .map(|name| InterfaceStatus { name: name.clone(), ..InterfaceStatus::default() })
            .collect();
        let boot_id = kernel.boot_id();
        let members = Book::begin(snapshot.members, &config.audiences, &boot_id, now);
        let mut state = Self {
            planner,
            audiences: config.audiences.clone(),
            members,
            checks: health::Reports::default(),
            store,
            kernel,
            metrics,
            revision: snapshot.revision,
            unsaved,
            parked,
            last_packets: LastPackets::default(),
            interfaces,
            links: LinkStates::new(),
            macs: None,
            alerts,
            samples: status::Samples::default(),
            watches: false,
            learning: Vec::new(),
            control: Control {
                pending: reckoned(snapshot.pending, &boot_id, now),
                freezes: snapshot.freezes,
                panicked: HashMap::new(),
                boot_id,
                retry_ms: None,
                reload_retry_ms: None,
            },
            rollouts: Rollouts::default(),
            take_backs: None,
            notices: Notices::default(),
            begun_ms: now.boot_ms,
            attach_ms: now.boot_ms,
            retry_ms: None,
            pressure: Pressure::default(),
            panics: Panics::default(),
            sweep_under_way: None,
            sweep_failed: None,
            in_force: false,
            // Beginning takes more than what is kept.
            lets_go: true,
        };
        state.begin_members();
        state.begin_raises(&config.rollouts, &rollouts);
        let readable = !state.alerts.contains_key("store");
        if readable {
            state.find_panicked();
        }
        if from_the_store {
            // The maps say it of tables that are set up anew, so that what is open stays.
            marks.retain(|mark| state.parked.contains_key(&mark.service));
        }
        // Before anything of it is in force.
        state.adopt_marks(marks);
        state.forget_unconfirmed_reloads(now);
        if readable && let Err(error) = state.save(Vec::new(), now) {
            tracing::error!(%error, "the state can't be stored: changes are refused");
        }
        let agent = format!("canary-agent {} has started", env!("CARGO_PKG_VERSION"));
        state.notices.add(now, "start", "", agent);
        state.restore_rollouts(&config.rollouts, rollouts, now);
        Ok(state)
    }

    /// Adds something that has happened to the events.
    pub fn note(&mut self, now: Moment, kind: &'static str, text: String) {
        self.notices.add(now, kind, "", text);
    }

    /// Whom to ask when a reload is not confirmed in time.
    pub(super) fn take_reloads_back(&mut self, by: mpsc::Sender<TakeBack>) {
        self.take_backs = Some(by);
    }

    /// Every address that a next hop is needed for.
    pub fn addresses(&self) -> impl IntoIterator<Item = IpAddr> + use<S, K> {
        self.planner.addresses()
    }

    /// What the maps should hold.
    pub fn plane(&self) -> &DataPlane {
        self.planner.plane()
    }

    /// What the loop acts on.
    pub fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Writes the maps for the first time and puts the program on the interfaces.
    /// Returns when [`Event::Wakeup`] is due.
    ///
    /// # Errors
    /// When the kernel refuses. A missing interface is no error.
    pub fn go(&mut self, now: Moment) -> Result<Option<BootMs>, BeginError> {
        self.in_force = true;
        // What was not confirmed while nobody ran is never in force again.
        let due = [self.unconfirmed(now), self.expire_members(now)].into_iter().flatten().min();
        self.planner.step(now.boot_ms);
        // A bucket may be tracked by the first plan already.
        self.kernel.clean(self.planner.plane()).map_err(BeginError::Apply)?;
        self.retry_ms = Some(now.boot_ms);
        let wakeup = [self.settle(now), due].into_iter().flatten().min();
        if self.retry_ms.is_some() {
            let why = self.alerts.remove("maps").unwrap_or_default();
            return Err(BeginError::Apply(why.concat()));
        }
        for at in 0..self.interfaces.len() {
            self.attach(at, now);
            let interface = &self.interfaces[at];
            let missing = interface.message.as_deref() == Some(NO_SUCH_INTERFACE);
            if interface.mode.is_none() && !missing {
                return Err(BeginError::Attach {
                    interface: interface.name.clone(),
                    error: AttachError::Refused(interface.message.clone().unwrap_or_default()),
                });
            }
        }
        Ok(wakeup)
    }

    /// Takes `event` in, and does what follows. Returns when [`Event::Wakeup`] is due.
    pub fn handle(&mut self, event: Event, now: Moment) -> Option<BootMs> {
        if self.in_force {
            self.adopt_panics(now);
        }
        match event {
            Event::Request { request, arrived } => self.request(request, arrived, now),
            Event::NextHops(hops) => self.next_hops(&hops, now),
            Event::Health(changes) => self.health(changes, now),
            Event::Links(links) => self.links(links, now),
            Event::Macs(macs) => self.macs(macs),
            Event::Alerts(from, alerts) => {
                for alert in alerts
                    .iter()
                    .filter(|a| !self.alerts.get(from).is_some_and(|old| old.contains(a)))
                {
                    tracing::warn!("{alert}");
                    self.notices.add(now, "alert", "", alert);
                }
                self.alerts.insert(from, alerts);
            }
            Event::Swept(result) => self.swept(result, now.boot_ms),
            Event::Said(said) => self.said(said, now),
            Event::Counted(counted) => self.counted_window(&counted, now),
            Event::Tick => self.tick(now),
            Event::Wakeup => {}
        }
        if !self.in_force {
            return None;
        }
        let ends = self.expire_members(now);
        let due = self.unconfirmed(now);
        let mut wakeup = self.settle(now);
        if !self.learning.is_empty() {
            let learned = self.learned(now);
            // What was made just now is due for other things at other times.
            wakeup = [self.settle(now), learned].into_iter().flatten().min();
        }
        let mut rolled = None;
        if self.has_rollouts() {
            rolled = self.drive_rollouts(now);
            wakeup = [self.settle(now), wakeup].into_iter().flatten().min();
        }
        [wakeup, due, rolled, ends].into_iter().flatten().min()
    }

    /// Whether the plan is in the maps.
    pub(super) fn is_in_force(&self) -> bool {
        self.in_force && self.retry_ms.is_none()
    }

    /// Brings the plan up to date and the maps to the plan.
    pub(super) fn settle(&mut self, now: Moment) -> Option<BootMs> {
        let now_ms = now.boot_ms;
        let mut step = self.planner.step(now_ms);
        let mut wakeup = step.next_wakeup_ms;
        for _ in 0..APPLIES {
            if self.retry_ms.is_none() && !step.changed {
                break;
            }
            Failpoint::BeforeMaps.pass();
            match self.kernel.apply(self.planner.plane()) {
                Ok(()) => {
                    Failpoint::InForce.pass();
                    self.retry_ms = None;
                    if self.alerts.remove("maps").is_some() {
                        tracing::info!("the forwarding tables are in force again");
                    }
                    break;
                }
                // Somebody has sent a service to control: from there it goes on.
                Err(_) if self.adopt_panics(now) => {
                    step = self.planner.step(now_ms);
                    wakeup = step.next_wakeup_ms;
                }
                Err(error) => {
                    self.retry_ms = Some(now_ms + RETRY_MS);
                    let alert = format!("the forwarding tables are not up to date: {error}");
                    if self.alerts.insert("maps", vec![alert.clone()]).is_none() {
                        tracing::error!("{alert}");
                    }
                    break;
                }
            }
        }
        if self.retry_ms.is_none()
            && let Some(sweep) = self.planner.begin_sweep()
        {
            Failpoint::BeforeSweep.pass();
            self.kernel.sweep(sweep.clone());
            self.sweep_under_way = Some(sweep);
        }
        match (wakeup, self.retry_ms) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn look_for_pressure(&mut self, backends: ByBackend<BackendCounters>, now_ms: BootMs) {
        let (flows, swept) = self.kernel.flows();
        let (reasons, maps) = (self.kernel.reasons(), self.kernel.maps());
        let reading = Reading { reasons, flows, swept, maps, backends };
        let services = self.planner.services();
        let addr = |index| {
            services.iter().find_map(|state| {
                let addr = state.tables().iter().find_map(|table| table.addr(index))?;
                Some((state.config().name.clone(), addr))
            })
        };
        let alerts = self.pressure.see(&reading, addr, now_ms);
        let said = self.alerts.get("pressure").map_or(0, Vec::len);
        // Their numbers change from second to second.
        for alert in alerts.iter().skip(said) {
            tracing::warn!("{alert}");
        }
        self.alerts.insert("pressure", alerts);
    }

    /// What had to wait for a sweep goes on.
    fn swept(&mut self, result: Result<(), String>, now_ms: BootMs) {
        let sweep = self.sweep_under_way.take();
        match result {
            Ok(()) => {
                self.alerts.remove("sweep");
                self.planner.swept(now_ms);
            }
            Err(error) => {
                let alert = format!(
                    "flow entries that have expired stay, and buckets wait to be moved: {error}"
                );
                if self.alerts.insert("sweep", vec![alert.clone()]).is_none() {
                    tracing::error!("{alert}");
                }
                self.sweep_failed.clone_from(&sweep);
                self.sweep_under_way = sweep;
            }
        }
    }

    /// Stores what has not been yet, at the end.
    pub(super) fn end(&mut self, now: Moment) {
        self.tell_tallies(now, true);
        self.store_notices(now);
    }

    fn tick(&mut self, now: Moment) {
        let now_ms = now.boot_ms;
        // What was let go is free since the plan was applied that does without it.
        if std::mem::replace(&mut self.lets_go, self.planner.rest(now_ms)) {
            self.kernel.give_memory_back();
        }
        self.tick_members(now);
        self.store_notices(now);
        // What can't be stored yet is tried again with the next.
        let _ = self.store_panics(now);
        self.guard_splits(now);
        let backends = self.planner.plane().backends.len();
        if self.samples.due(backends, now_ms) {
            let counters = self.counters();
            self.note_traffic(&counters, now_ms);
            self.samples.push(now_ms, counters.iter().map(|(index, c)| (index, *c)));
            self.look_for_pressure(counters, now_ms);
        }
        self.fix_slow_handshakes(now);
        self.watch(now_ms);
        let keeps_flows = |s: &ServiceState| {
            s.config().forward == Forward::Nat || s.tables().iter().any(|t| t.tracked() > 0)
        };
        if let Some(sweep) = self.sweep_failed.take() {
            self.kernel.sweep(sweep);
        }
        if self.planner.tracks_classes() || self.planner.services().iter().any(keeps_flows) {
            self.kernel.expire();
        }
        if now_ms < self.attach_ms + ATTACH_MS {
            return;
        }
        self.attach_ms = now_ms;
        for at in 0..self.interfaces.len() {
            let interface = &self.interfaces[at];
            let there = self.links.get(&interface.name).is_some_and(Option::is_some);
            if interface.mode.is_none() && there {
                self.attach(at, now);
            }
        }
    }

    fn request(&mut self, request: Request, arrived: Instant, now: Moment) {
        // Whoever has stopped waiting for the answer has lost nothing but the answer.
        match request {
            Request::Status { reply } => drop(reply.send(self.status(now))),
            Request::Survey { config, if_revision, reply } => {
                drop(reply.send(self.survey(&config, if_revision, now)));
            }
            Request::Reload { order, reply } => drop(reply.send(self.reload(*order, now))),
            Request::Pulse { reply } => drop(reply.send(self.pulse())),
            Request::Explain { service, query, reply } => {
                drop(reply.send(explain::explain(&self.planner, &service, &query)));
            }
            Request::Split { service, request, peer, reply } => {
                self.ask_split(Asked { service, request, peer, arrived, reply }, now);
            }
            Request::Backends { service, reply } => self.list_backends(&service, now, reply),
            Request::Backend { service, backend, request, peer, reply } => {
                self.tell_backend(&service, &backend, &request, (peer, arrived, now), reply);
            }
            Request::Undo { request, peer, reply } => {
                self.undo(&request, peer, (arrived, now), reply);
            }
            Request::Confirm { request, peer, reply } => {
                drop(reply.send(self.confirm(&request, peer, now)));
            }
            Request::Freeze { request, freezes, peer, reply } => {
                drop(reply.send(self.freeze(&request, freezes, peer, now)));
            }
            Request::Panic { request, peer, reply } => {
                self.ask_panic(&request, peer, (arrived, now), reply);
            }
            Request::Rollout { name, action, request, peer, reply } => {
                drop(reply.send(self.ask_rollout(&name, action, &request, peer, (arrived, now))));
            }
            Request::RolloutHistory { name, evidence, reply } => {
                drop(reply.send(self.rollout_history(&name, evidence)));
            }
            Request::Prospect { name, reply } => drop(reply.send(self.prospect(&name, now))),
            Request::Audiences { reply } => drop(reply.send(self.list_audiences(now))),
            Request::Audience { name, reply } => drop(reply.send(self.show_audience(&name, now))),
            Request::Members { audience, request, peer, reply } => {
                let done = self.change_members(&audience, &request, peer, (arrived, now));
                drop(reply.send(done));
            }
            Request::Client { address, reply } => {
                drop(reply.send(self.client_report(address, now)))
            }
            Request::Events { asked, reply } => drop(reply.send(self.events(&asked, now))),
        }
    }

    fn pulse(&self) -> Pulse {
        let attached = self.interfaces.iter().filter(|one| one.mode.is_some()).count();
        Pulse { in_force: self.is_in_force(), interfaces: self.interfaces.len(), attached }
    }

    /// Brings about what was stored.
    pub(super) fn settle_or_refuse(&mut self, now: Moment) -> Result<(), Refusal> {
        self.settle(now);
        self.in_force_or_refused()
    }

    /// Whether what is stored has been brought about.
    pub(super) fn in_force_or_refused(&self) -> Result<(), Refusal> {
        match (self.retry_ms, self.alerts.get("maps")) {
            (Some(_), Some(why)) => Err(Refusal {
                code: "not_applied",
                message: format!(
                    "the change is stored as revision {}, but is not in force: {}",
                    self.revision,
                    why.concat()
                ),
                help: Some(
                    "it is tried again every second; `canary-agent status` says when it is"
                        .to_owned(),
                ),
                exit_code: 1,
            }),
            _ => Ok(()),
        }
    }
}

/// Which backends of a service have gained or lost buckets since it had `tables`, and which
/// buckets those are.
pub(super) fn changed(
    service: &ServiceState,
    tables: &[Arc<ServicePlan>],
) -> (Vec<String>, Vec<BucketSet>) {
    let mut touched = BTreeSet::new();
    let mut moved = Vec::new();
    for (old, table) in tables.iter().zip(service.tables()) {
        let (buckets, backends) = table.moved(&old.entries.plain(), Entry::current);
        touched.extend(backends);
        moved.push(buckets);
    }
    (touched.iter().map(ToString::to_string).collect(), moved)
}

/// The tables of a service in the plan, by family.
pub(super) fn tables_of(planner: &Planner, service: usize) -> Vec<Arc<ServicePlan>> {
    let plans = &planner.plane().services;
    let tables = planner.services()[service].tables().iter();
    let at = tables.map(|table| plans.binary_search_by_key(&table.id().into(), |s| s.record.id));
    at.filter_map(|at| plans.get(at.ok()?).cloned()).collect()
}

/// As answers have it.
pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
