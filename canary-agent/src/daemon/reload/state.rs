//! The loop's part of a reload: what it is planned from, and putting it in force.
//!
//! In force means stored and in the maps, with the program on the interfaces; or nothing of
//! it is.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use canary_ebpf_common::{abi::BackendCounters, compile};

use super::report::{self, TrafficByService};
use crate::{
    api::{model::InterfaceStatus, reload::ReloadReport},
    config::model::{Audience, Config, Rollout},
    daemon::{
        AttachError, Attachment, Counter, Kernel, Moment, Peer, Refusal, State,
        changes::{Terms, Thing},
        interfaces::NO_SUCH_INTERFACE,
        saving::refused,
        tally::ByBackend,
    },
    health::Target,
    plan::{Baseline, BootMs, ClassChange, Family, Made, PlanError, Prepared, Removal},
    store::{Change, Commit, Split, StateStore},
};

/// What a reload is planned from.
pub struct Survey {
    /// The configuration with what is remembered of the one before it.
    pub(super) config: Arc<Config>,
    pub(super) baseline: Baseline,
    /// What was seen of the tables of the services that change or go.
    pub(super) traffic: TrafficByService,
    /// Every address that a next hop is followed for.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Services stay, and are in another order.
    pub(super) reordered: bool,
    pub(super) counter: Option<Counter>,
    pub(super) revision: u64,
    /// How long it took the loop.
    pub(super) busy_us: u64,
}

/// A reload that is planned.
pub struct Planned {
    /// The plan.
    pub prepared: Prepared,
    /// What it would change.
    pub report: ReloadReport,
    /// Every address that a next hop is followed for now.
    pub addresses: BTreeSet<IpAddr>,
}

impl Survey {
    /// Plans to go on from `running` with `wanted`, and counts the open connections that this
    /// is about.
    ///
    /// # Errors
    /// When there is no room for what is new.
    pub fn plan(self, running: &Config, wanted: &Config) -> Result<Planned, Refusal> {
        let Self { config: _, baseline, traffic, addresses, reordered, counter, revision, busy_us } =
            self;
        let prepared = baseline.prepare().map_err(|error| no_room(&error))?;
        let asked = report::counted(&prepared);
        let census = counter.filter(|_| !asked.is_empty()).and_then(|count| {
            let counted = count(&asked);
            counted
                .inspect_err(|error| tracing::warn!(error, "open connections can't be counted"))
                .ok()
        });
        let mut report = report::report(running, wanted, &prepared, &traffic, census.as_ref());
        report.differs |= reordered;
        report.revision = revision;
        report.busy_us = busy_us;
        Ok(Planned { prepared, report, addresses })
    }
}

fn no_room(error: &PlanError) -> Refusal {
    Refusal {
        code: "no_room",
        message: format!("the configuration stays as it was: {error}"),
        help: Some(
            "what a reload removes can be used by a later one, a second after it has drained"
                .to_owned(),
        ),
        exit_code: 1,
    }
}

impl std::fmt::Debug for Survey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Survey").field("revision", &self.revision).finish_non_exhaustive()
    }
}

/// What was seen of a table's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Traffic {
    pub(super) family: Family,
    /// Since its backends have had their records.
    pub(super) packets: u64,
    /// Milliseconds since there were fewer; `None` if there are none.
    pub(super) quiet_ms: Option<BootMs>,
}

/// When the packets of each table were last seen to have become more.
#[derive(Debug, Default)]
pub(in crate::daemon) struct LastPackets(HashMap<u16, (u64, BootMs)>);

impl LastPackets {
    fn see(&mut self, table: u16, packets: u64, now_ms: BootMs) -> BootMs {
        let seen = self.0.entry(table).or_insert((packets, now_ms));
        if seen.0 != packets {
            *seen = (packets, now_ms);
        }
        seen.1
    }
}

/// What is to be put in force.
pub struct Order {
    /// The plan.
    pub prepared: Prepared,
    /// `agent.interfaces`.
    pub interfaces: Vec<String>,
    /// `[[rollout]]`.
    pub rollouts: Vec<Arc<Rollout>>,
    /// `[[audience]]`.
    pub audiences: Vec<Audience>,
    /// Who asks; `None` for a signal.
    pub peer: Option<Peer>,
    /// Kept in the audit trail.
    pub reason: Option<String>,
    /// Keys of `[agent]` with other values, in words.
    pub settings: Vec<String>,
    /// Nothing may have changed since.
    pub if_revision: Option<u64>,
    /// How long it waits for a confirmation, as it was written.
    pub confirm: Option<String>,
    /// The reload that it takes back.
    pub takes_back: Option<u64>,
}

/// A reload that was not confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::daemon) struct TakeBack {
    /// Its revision.
    pub(in crate::daemon) revision: u64,
    /// Within which time it should have been.
    pub(in crate::daemon) within: Duration,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Order").field("interfaces", &self.interfaces).finish_non_exhaustive()
    }
}

/// What has been put in force.
#[derive(Debug)]
pub struct Reloaded {
    /// Number of the last change to the live state.
    pub revision: u64,
    /// What is to be checked.
    pub targets: Vec<Target>,
    /// Every address that a next hop is needed for.
    pub addresses: BTreeSet<IpAddr>,
    /// Milliseconds until it is taken back unless it is confirmed.
    pub confirm_within_ms: Option<u64>,
    /// It is stored, and the kernel has refused it for now.
    pub not_applied: Option<Refusal>,
    /// For how long the loop did nothing else, microseconds.
    pub busy_us: u64,
}

/// An interface that the program was put on a moment ago.
type Attached = (String, Result<Attachment, AttachError>);

impl<S: StateStore, K: Kernel> State<S, K> {
    /// What planning for `config` begins with.
    ///
    /// # Errors
    /// Something has changed since `if_revision`.
    pub(in crate::daemon) fn survey(
        &mut self,
        config: &Config,
        if_revision: Option<u64>,
        now: Moment,
    ) -> Result<Survey, Refusal> {
        let begun = Instant::now();
        if let Some(expected) = if_revision {
            self.refuse_stale(None, expected, now)?;
        }
        let config = &self.planner.remembering(config);
        let baseline = self.planner.baseline(config, &self.parked, now.boot_ms);
        let before = self.planner.services().iter().map(|s| s.config().name.as_str());
        let wanted: Vec<&str> = config.services.iter().map(|s| s.name.as_str()).collect();
        let there = |name: &&str| self.planner.service(name).is_some();
        let stay = wanted.iter().copied().filter(there);
        let reordered = before.filter(|name| wanted.contains(name)).ne(stay);
        let concerned: Vec<String> = baseline.concerned().map(str::to_owned).collect();
        let mut traffic = TrafficByService::new();
        for name in concerned {
            let seen = self.traffic(&name, now.boot_ms);
            traffic.insert(name, seen);
        }
        Ok(Survey {
            config: Arc::new(config.clone()),
            baseline,
            traffic,
            addresses: self.planner.addresses(),
            reordered,
            counter: self.kernel.counter(),
            revision: self.revision,
            busy_us: micros(begun),
        })
    }

    /// What was seen of a service's tables.
    fn traffic(&mut self, service: &str, now_ms: BootMs) -> Vec<Traffic> {
        let Some((_, state)) = self.planner.service(service) else { return Vec::new() };
        let mut traffic = Vec::new();
        for table in state.tables() {
            let live = table.backends().iter().map(|b| b.index);
            let indices: Vec<_> = live.chain(table.removed().map(|r| r.index)).collect();
            let packets = self.kernel.counters(&indices).iter().map(|one| one.packets).sum();
            let since = self.last_packets.see(table.id(), packets, now_ms);
            let quiet_ms = (packets > 0).then(|| now_ms.saturating_sub(since));
            traffic.push(Traffic { family: table.family(), packets, quiet_ms });
        }
        traffic
    }

    /// Keeps in mind which tables have had packets, by the counters of all backends.
    pub(in crate::daemon) fn note_traffic(
        &mut self,
        counters: &ByBackend<BackendCounters>,
        now_ms: BootMs,
    ) {
        for table in self.planner.services().iter().flat_map(|state| state.tables()) {
            let live = table.backends().iter().map(|b| b.index);
            let indices = live.chain(table.removed().map(|r| r.index));
            let packets = indices.filter_map(|i| counters.get(i)).map(|one| one.packets).sum();
            self.last_packets.see(table.id(), packets, now_ms);
        }
    }

    /// Puts a plan for another configuration in force.
    ///
    /// # Errors
    /// What keeps it from being stored, or the program from an interface. Nothing has changed
    /// then.
    pub(in crate::daemon) fn reload(
        &mut self,
        order: Order,
        now: Moment,
    ) -> Result<Reloaded, Refusal> {
        let begun = Instant::now();
        let Order {
            prepared,
            interfaces,
            rollouts,
            audiences,
            peer,
            reason,
            settings,
            if_revision,
            confirm,
            takes_back,
        } = order;
        let terms = Terms {
            peer: peer.unwrap_or(Peer { uid: 0, gid: 0, pid: None }),
            reason: reason.as_deref(),
            if_revision,
            confirm: confirm.as_deref(),
        };
        // What is taken back was promised to be.
        let things = if takes_back.is_some() { &[][..] } else { &[Thing::Reload][..] };
        let within = self.terms(None, things, &terms, now)?;
        let ready = self.planner.ready(prepared, now.boot_ms).map_err(|error| no_room(&error))?;
        if takes_back.is_none() {
            let concerned = ready.made().map(|made| made.record.name.as_str());
            let gone = ready.removed().iter().map(|removal| removal.config.name.as_str());
            // Clients go by another route of all services that have any.
            let routed = self.planner.services().iter().filter(|_| ready.classes().is_some());
            let routed = routed.map(|state| state.config()).filter(|config| config.routed);
            let routed = routed.map(|config| config.name.as_str());
            self.may_be_configured(concerned.chain(gone).chain(routed), now)?;
        }
        let attached = self.attach_new(&interfaces)?;
        let stored = |made: &&Made| made.after().derived.as_ref().is_none_or(|of| !of.follows);
        let changed = ready.made().filter(stored);
        let changed = changed.map(|made| self.change_of(made, peer, reason.as_deref(), now));
        let gone = ready.removed().iter();
        let gone =
            gone.filter_map(|removal| self.removal_of(removal, peer, reason.as_deref(), now));
        let mut commits: Vec<Commit> = changed.chain(gone).collect();
        let deadline = self.deadline(within, now);
        let confirm_within_ms = deadline.as_ref().map(|deadline| deadline.within_ms);
        // Each service has a line of its own; what is not about any of them has this one.
        if !settings.is_empty() || deadline.is_some() || takes_back.is_some() {
            let settles: Vec<u64> = takes_back.into_iter().collect();
            let change = Change {
                unix_ms: now.unix_ms,
                uid: peer.map(|peer| peer.uid),
                action: "reload".to_owned(),
                reason: reason.clone(),
                about: settles.clone(),
                confirm_ms: confirm_within_ms,
                ..Change::default()
            };
            commits.push(Commit { change, record: None, deadline, settles });
        }
        let removed: Vec<String> =
            ready.removed().iter().map(|removal| removal.config.name.clone()).collect();
        let made: Vec<String> = ready.made().map(|made| made.after().name.clone()).collect();
        let records = commits.iter().filter_map(|commit| commit.record.as_ref());
        for record in records.filter(|record| removed.contains(&record.name)) {
            self.parked.insert(record.name.clone(), record.clone());
        }
        if !commits.is_empty()
            && let Err(error) = self.save(commits, now)
        {
            removed.iter().for_each(|name| drop(self.parked.remove(name)));
            self.take_off(attached.into_iter().map(|(name, _)| name));
            return Err(refused("the configuration", &error));
        }
        made.iter().for_each(|name| drop(self.parked.remove(name)));
        self.lets_go = true;
        let unsaved: Vec<_> = std::mem::take(&mut self.unsaved)
            .into_iter()
            .map(|news| (self.planner.services()[news.service].config().name.clone(), news))
            .collect();
        let classes = ready.classes();
        self.planner.install(ready);
        for (name, mut news) in unsaved {
            if let Some((at, _)) = self.planner.service(&name) {
                news.service = at;
                self.unsaved.push(news);
            }
        }
        self.audiences = audiences;
        self.members.resize(&self.audiences);
        if let Some(ClassChange { networks, addresses: [v4, v6] }) = classes {
            let text = format!(
                "clients of {networks} networks go by another route ({v4} addresses of IPv4, {v6} of IPv6)"
            );
            self.notices.add(now, "reload", "", text);
        }
        self.follow_services();
        self.reconfigure_rollouts(rollouts, now);
        for setting in &settings {
            self.notices.add(now, "reload", "", setting.as_str());
        }
        self.control.reload_retry_ms = None;
        let not_applied = self.settle_or_refuse(now).err();
        self.set_interfaces(interfaces, attached);
        let tables = self.planner.services().iter().flat_map(|state| state.tables());
        let ids: BTreeSet<u16> = tables.map(|table| table.id()).collect();
        self.last_packets.0.retain(|id, _| ids.contains(id));
        Ok(Reloaded {
            revision: self.revision,
            targets: self.targets(),
            addresses: self.planner.addresses(),
            confirm_within_ms,
            not_applied,
            busy_us: micros(begun),
        })
    }

    /// What is stored of a service that changes or comes.
    fn change_of(
        &self,
        made: &Made,
        peer: Option<Peer>,
        reason: Option<&str>,
        now: Moment,
    ) -> Commit {
        let new = made.before.is_none() && !self.parked.contains_key(&made.record.name);
        Commit {
            change: Change {
                unix_ms: now.unix_ms,
                uid: peer.map(|peer| peer.uid),
                service: made.record.name.clone(),
                action: if new { "initial" } else { "config" }.to_owned(),
                reason: reason.map(str::to_owned),
                before: made.split.clone(),
                after: made.record.split.clone(),
                buckets_moved: compile::decode_changes(&made.moved)
                    .map_or(0, |moved| moved.len() as u32),
                moved: made.moved.clone(),
                slots: made.record.slots.clone(),
                ..Change::default()
            },
            record: Some(made.record.clone()),
            deadline: None,
            settles: Vec::new(),
        }
    }

    /// What is stored of a service that goes: all of it, should it come back.
    fn removal_of(
        &self,
        removal: &Removal,
        peer: Option<Peer>,
        reason: Option<&str>,
        now: Moment,
    ) -> Option<Commit> {
        let (at, state) = self.planner.service(&removal.config.name)?;
        if state.follows() {
            return None;
        }
        let mut commit = self.own_commit(at, "removed", Split::new(), Vec::new(), now);
        commit.change.before = commit.change.after.clone();
        commit.change.uid = peer.map(|peer| peer.uid);
        commit.change.reason = reason.map(str::to_owned);
        Some(commit)
    }

    /// Puts the program on those of `interfaces` that are new.
    fn attach_new(&mut self, interfaces: &[String]) -> Result<Vec<Attached>, Refusal> {
        let known = |name: &&String| !self.interfaces.iter().any(|one| one.name == **name);
        let new: Vec<String> = interfaces.iter().filter(known).cloned().collect();
        let mut attached: Vec<Attached> = Vec::new();
        for name in new {
            let result = self.kernel.attach(&name);
            if let Err(AttachError::Refused(why)) = &result {
                let message = format!("interface `{name}` can't be attached to: {why}");
                self.take_off(attached.into_iter().map(|(name, _)| name));
                return Err(Refusal {
                    code: "not_attached",
                    message,
                    help: Some(
                        "nothing has changed; take it out of `agent.interfaces`, or mend it"
                            .to_owned(),
                    ),
                    exit_code: 1,
                });
            }
            attached.push((name, result));
        }
        Ok(attached)
    }

    fn take_off(&mut self, interfaces: impl Iterator<Item = String>) {
        for name in interfaces {
            match self.kernel.detach(&name) {
                Ok(()) => tracing::info!(interface = name, "detached"),
                Err(error) => {
                    tracing::error!(interface = name, error, "the program can't be taken off");
                }
            }
        }
    }

    /// Goes on with `wanted` interfaces, of which `attached` are new.
    fn set_interfaces(&mut self, wanted: Vec<String>, attached: Vec<Attached>) {
        let mut new: HashMap<String, Result<Attachment, AttachError>> =
            attached.into_iter().collect();
        let mut before = std::mem::take(&mut self.interfaces);
        for name in wanted {
            if let Some(at) = before.iter().position(|one| one.name == name) {
                self.interfaces.push(before.remove(at));
                continue;
            }
            let mut interface = InterfaceStatus { name, ..InterfaceStatus::default() };
            match new.remove(&interface.name) {
                Some(Ok(Attachment { ifindex, mode, warning })) => {
                    tracing::info!(interface = interface.name, mode, "attached");
                    interface.ifindex = Some(ifindex);
                    interface.mode = Some(mode.to_owned());
                    interface.message = warning;
                }
                _ => interface.message = Some(NO_SUCH_INTERFACE.to_owned()),
            }
            self.interfaces.push(interface);
        }
        self.take_off(before.into_iter().map(|gone| gone.name));
    }
}

fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// The configuration with what the command line has put in its place.
pub(super) fn with_socket(mut config: Config, socket: Option<&std::path::Path>) -> Arc<Config> {
    if let Some(socket) = socket {
        config.agent.socket = socket.to_owned();
    }
    Arc::new(config)
}
