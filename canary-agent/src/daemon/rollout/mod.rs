//! Rollouts under way: what happens to them, and what they wish for, carried out.
//!
//! Where a rollout stands is stored before or after each share that it sets, never together
//! with it: an agent that ends in between finds the share set already and goes on.
//!
//! A share that goes back waits for nobody. That is in force before it is stored; it is owed as
//! after a panic, and marked in the maps until it is stored: the agent after one that ends before
//! finds the mark, and does not bring the share back.

mod ask;
mod back;
mod prospect;
mod raise;
mod status;

use self::back::Taken;
pub use self::{ask::Action, prospect::Prospect};

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use canary_ebpf_common::share::Share;
use tokio::sync::mpsc;

use super::{Kernel, Moment, State, changes::Thing, saving::not_stored};
use crate::{
    config::{
        derived,
        model::{Rollout, Stickiness},
    },
    hooks::{Errand, Said},
    plan::{BootMs, Proposal},
    rollout::{
        drive::{Ask, At, Record, Run, Shares, Slow, Stage, Told, View, Wish},
        watch::Counted,
    },
    store::{Change, Commit, EvidenceLine, Split, StateStore, StoredRollout},
};

/// The `action` of a change that a rollout makes by itself.
pub(super) const ACTION: &str = "rollout";
/// How often what a rollout has seen is kept while nothing else happens.
const KEEP_MS: u64 = 5_000;
/// What could not be kept is kept after this time.
const KEEP_AGAIN_MS: u64 = 1_000;
/// So many lines of evidence wait for a disk that takes them; older ones are let go of.
const OWED_EVIDENCE: usize = 20_000;
/// Wishes lead to others: so often in a row.
const TURNS: usize = 32;
/// So many changes of a service are looked through for those of a rollout.
const LOOKED_AT: usize = 512;
/// Connections just after a change are not yet those of the new share.
const SETTLED_MS: u64 = 2_000;

/// All rollouts that the loop knows.
#[derive(Debug, Default)]
pub(super) struct Rollouts {
    configured: Vec<Arc<Rollout>>,
    active: Vec<Active>,
    /// The last of each name that is over.
    over: BTreeMap<String, (Option<u64>, Record)>,
    errands: Option<mpsc::UnboundedSender<Errand>>,
    /// What marks in the maps have said of services, until their rollouts are taken up.
    given_back: BTreeMap<String, Taken>,
}

/// One that is not over.
#[derive(Debug)]
struct Active {
    number: Option<u64>,
    run: Run,
    /// Something is to be kept, and at what time.
    keep_ms: Option<BootMs>,
    /// Not kept yet.
    evidence: Vec<EvidenceLine>,
    /// The changes that it has made, the oldest first.
    made: Vec<Made>,
    /// New connections of control and of the version, as of the last look.
    connections: Option<[u64; 2]>,
    /// When the share was last set.
    set_ms: BootMs,
    /// The operator who has ended it.
    by: Option<u32>,
}

/// What a rollout compares, for whoever watches connections of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Compared {
    /// The version, where the present step is about these clients.
    pub(super) canary: Option<String>,
    /// A handshake that takes longer is slow.
    pub(super) slow_over: Option<Duration>,
    /// The service whose control it is compared with; `None` for that of the same clients.
    pub(super) control_of: Option<String>,
}

/// A change that a rollout has made.
#[derive(Clone, Debug)]
struct Made {
    revision: u64,
    slots: Vec<String>,
    moved: Vec<u8>,
    before: Split,
    salt: Option<u64>,
}

impl Active {
    fn new(number: Option<u64>, run: Run) -> Self {
        let (evidence, made) = (Vec::new(), Vec::new());
        Self { number, run, keep_ms: None, evidence, made, connections: None, set_ms: 0, by: None }
    }
}

impl Rollouts {
    fn config(&self, name: &str) -> Option<&Arc<Rollout>> {
        self.configured.iter().find(|rollout| rollout.name == name)
    }

    fn at(&self, name: &str) -> Option<usize> {
        self.active.iter().position(|active| active.run.position().name == name)
    }
}

fn at(now: Moment) -> At {
    At { boot_ms: now.boot_ms, unix_ms: now.unix_ms }
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Takes up the rollouts that an earlier agent has left, under the configuration of today.
    pub(super) fn restore_rollouts(
        &mut self,
        configured: &[Arc<Rollout>],
        stored: Vec<StoredRollout>,
        now: Moment,
    ) {
        self.rollouts.configured = configured.to_vec();
        for StoredRollout { number, name, record, .. } in stored {
            let record: Record = match serde_json::from_str(&record) {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!(rollout = name, %error, "where the rollout stands can't be read");
                    let text = format!(
                        "rollout {name}: where it stood can't be read ({error}); the share stays as it is"
                    );
                    self.alerts.entry("rollout").or_default().push(text);
                    continue;
                }
            };
            if record.stage.is_over() {
                self.rollouts.over.insert(name, (number, record));
                continue;
            }
            let service = record.service.clone();
            let since = record.since_revision;
            let config = self.rollouts.config(&name).cloned();
            let to = record.to.clone();
            let (mut run, mut wishes) = Run::restore(record, config.as_deref());
            let taken = self.rollouts.given_back.remove(&service);
            if let Some(Taken { share, audiences, reason, .. }) =
                taken.filter(|taken| taken.version == to)
            {
                let reason = reason.unwrap_or_default();
                let of_it = format!("rollout {name}: ");
                let why = reason.strip_prefix(&of_it).unwrap_or(&reason).to_owned();
                let shares = taken_back(&run, share, audiences);
                wishes = run.was_given_back(config.as_deref(), &shares, why, at(now));
            }
            let mut active = Active::new(number, run);
            active.made = self.changes_of_rollout(&service, since);
            tracing::info!(rollout = name, service, "the rollout goes on where it was");
            self.rollouts.active.push(active);
            self.fulfil(self.rollouts.active.len() - 1, wishes, now);
        }
        self.sync_raises();
    }

    /// The changes of a service that a rollout has made since a revision.
    fn changes_of_rollout(&mut self, service: &str, since: u64) -> Vec<Made> {
        let changes = self.store.changes_before(Some(service), u64::MAX, LOOKED_AT);
        let changes = changes.unwrap_or_default().into_iter();
        let mut made: Vec<Made> = changes
            .take_while(|(revision, _)| *revision > since)
            .filter(|(_, change)| change.action == ACTION)
            .map(|(revision, change)| {
                let Change { slots, moved, before, salt, .. } = change;
                Made { revision, slots, moved, before, salt }
            })
            .collect();
        made.reverse();
        made
    }

    /// Whom to ask and tell.
    pub fn send_errands_to(&mut self, to: mpsc::UnboundedSender<Errand>) {
        self.rollouts.errands = Some(to);
    }

    /// Goes on with other rollouts.
    pub(super) fn reconfigure_rollouts(&mut self, configured: Vec<Arc<Rollout>>, now: Moment) {
        self.rollouts.configured = configured;
        for at in 0..self.rollouts.active.len() {
            let name = self.rollouts.active[at].run.position().name.clone();
            let config = self.rollouts.config(&name).cloned();
            let wishes = self.rollouts.active[at].run.reconfigure(config.as_deref());
            self.fulfil(at, wishes, now);
        }
        self.sync_raises();
    }

    /// Lets every rollout look at how things are, and does what it wishes for. Returns when it
    /// is to look again.
    pub(super) fn drive_rollouts(&mut self, now: Moment) -> Option<BootMs> {
        let mut due: Option<BootMs> = None;
        for at in 0..self.rollouts.active.len() {
            for _ in 0..TURNS {
                if !self.drive(at, now) {
                    break;
                }
            }
            let active = &self.rollouts.active[at];
            let name = &active.run.position().name;
            let next = self
                .rollouts
                .config(name)
                .and_then(|rollout| active.run.due_ms(rollout, self::at(now)));
            due = [due, next, active.keep_ms].into_iter().flatten().min();
        }
        if self.sync_raises() {
            self.settle(now);
        }
        let mut at = 0;
        while at < self.rollouts.active.len() {
            let active = &self.rollouts.active[at];
            match active.run.stage().is_over() && active.keep_ms.is_none() {
                true => {
                    let Active { number, run, .. } = self.rollouts.active.remove(at);
                    let record = run.record();
                    self.rollouts.over.insert(record.name.clone(), (number, record));
                }
                false => at += 1,
            }
        }
        due
    }

    /// One look. Returns whether there may be more to do at once.
    fn drive(&mut self, at: usize, now: Moment) -> bool {
        let active = &self.rollouts.active[at];
        let before = active.run.stage();
        if active.keep_ms.is_some_and(|keep| keep <= now.boot_ms) {
            self.keep_rollout(at, false, now);
        }
        let active = &self.rollouts.active[at];
        if active.run.stage().is_over() {
            return false;
        }
        let name = active.run.position().name.clone();
        let Some(view) = self.view(at) else {
            let why = "its service or its version is not configured any more";
            let wishes = self.rollouts.active[at].run.bereave(why, self::at(now));
            self.fulfil(at, wishes, now);
            return false;
        };
        let Some(rollout) = self.rollouts.config(&name).cloned() else { return false };
        let step = self.rollouts.active[at].run.position().step;
        let wishes = self.rollouts.active[at].run.look(&rollout, &view, self::at(now));
        let sets = self.fulfil(at, wishes, now);
        let active = &mut self.rollouts.active[at];
        if active.run.stage() == Stage::Watching {
            active.keep_ms.get_or_insert(now.boot_ms + KEEP_MS);
        }
        let position = active.run.position();
        sets || (position.step, position.stage) != (step, before)
    }

    /// How a rollout's service is; `None` where there is nothing left to move.
    fn view(&self, at: usize) -> Option<View> {
        let record = self.rollouts.active[at].run.position();
        let (service, state) = self.planner.service(&record.service)?;
        let slot = state.slot(&record.to)?;
        let config = state.config();
        if slot == state.control() || !config.versions.iter().any(|v| v.name == record.to) {
            return None;
        }
        let share = state.ownership().split.get(&record.to).copied().unwrap_or(Share::ZERO);
        let frozen = self
            .control
            .frozen(&record.service)
            .map(|freeze| format!("the end of the freeze ({})", freeze.reason));
        let pending = self.control.pending.iter();
        let mut pending = pending.filter(|one| Thing::Split(&record.service).is_of(&one.change));
        let pending =
            pending.next().map(|one| format!("the confirmation of revision {}", one.revision));
        Some(View {
            share,
            in_force: self.is_in_force(),
            panicked: self.control.panicked.contains_key(&record.service)
                || self.panics.is_owing() && share == Share::ZERO,
            audiences_panicked: self.is_taken_away(record),
            learns: self.planner.learns(service),
            prepared: self.is_in_force()
                && self.planner.is_prepared(service)
                && self.planner.followers(service).all(|at| self.planner.is_prepared(at)),
            barred: frozen.or(pending),
        })
    }

    /// Does what a rollout wishes for. Returns whether it should look at once at what that led to.
    fn fulfil(&mut self, at: usize, wishes: Vec<Wish>, now: Moment) -> bool {
        let mut sets = false;
        for wish in wishes {
            match wish {
                Wish::Confirm => self.ask_to_confirm(at),
                Wish::Prepare(ask) => {
                    sets = true;
                    self.prepare_share(at, &ask);
                    self.settle(now);
                }
                Wish::Forget => self.forget_share(at),
                Wish::Set(ask) => {
                    sets = true;
                    match ask.audience {
                        Some(_) => self.set_audience(at, &ask, now),
                        None => self.set_share(at, ask.share, now),
                    }
                }
                Wish::Back(shares) => self.give_back(at, shares, now),
                Wish::Measure(probe) => self.measure(at, probe),
                Wish::Tell(told) => self.tell(at, &told, now),
                Wish::Save => drop(self.keep_rollout(at, true, now)),
            }
        }
        sets
    }

    /// Writes down where a rollout stands. Returns whether that is done.
    fn keep_rollout(&mut self, at: usize, durable: bool, now: Moment) -> bool {
        let active = &self.rollouts.active[at];
        let record = active.run.record();
        let Ok(text) = serde_json::to_string(&record) else { return false };
        let stored = StoredRollout {
            number: active.number,
            name: record.name,
            begun_unix_ms: record.begun_unix_ms,
            ended_unix_ms: record.ended_unix_ms,
            record: text,
        };
        let kept = self.store.keep_rollout(&stored, &active.evidence, durable);
        let active = &mut self.rollouts.active[at];
        match kept {
            Ok(number) => {
                active.number = Some(number);
                active.evidence.clear();
                active.keep_ms = None;
                self.alerts.remove("rollout");
                true
            }
            Err(error) => {
                active.keep_ms = Some(now.boot_ms + KEEP_AGAIN_MS);
                // A disk may be full for days.
                let above = active.evidence.len().saturating_sub(OWED_EVIDENCE);
                active.evidence.drain(..above);
                let alert = format!(
                    "rollout {}: where it stands can't be kept, and a restart would go on from before: {error}",
                    stored.name
                );
                if self.alerts.insert("rollout", vec![alert.clone()]).is_none() {
                    tracing::error!("{alert}");
                }
                false
            }
        }
    }

    /// Says in the log, in the events and to the hook what has happened.
    fn tell(&mut self, at: usize, told: &Told, now: Moment) {
        let Told { kind, text } = told;
        let active = &self.rollouts.active[at];
        let Record { name, service, to, step, .. } = active.run.position();
        match *kind {
            "aborted" | "held" => {
                tracing::warn!(rollout = name, service, version = to, "rollout {kind}: {text}");
            }
            _ => tracing::info!(rollout = name, service, version = to, "rollout {kind}: {text}"),
        }
        self.notices.add(now, "rollout", service, format!("{name} {kind}: {text}"));
        let hooks = self.rollouts.config(name).map(|rollout| rollout.hooks.clone());
        if let (Some(hooks), Some(errands)) = (hooks, &self.rollouts.errands)
            && let Some(url) = &hooks.event
        {
            let body = serde_json::json!({
                "event": kind,
                "text": text,
                "rollout": name,
                "service": service,
                "version": to,
                "step": step + 1,
                "share": active.run.position().shares[1].to_string(),
                "audiences": by_audience(active.run.position()),
                "run": active.number,
                "unix_ms": now.unix_ms,
            });
            let _ = errands.send(Errand::event(url, &hooks, &body));
        }
    }

    fn ask_to_confirm(&mut self, at: usize) {
        let active = &self.rollouts.active[at];
        let record = active.run.position();
        let Some(rollout) = self.rollouts.config(&record.name) else { return };
        let next = record.step + usize::from(record.stage == Stage::Watching);
        let step = rollout.steps.get(next);
        let share = step.and_then(|step| step.split);
        if let (Some(url), Some(errands)) = (&rollout.hooks.confirm, &self.rollouts.errands) {
            let body = serde_json::json!({
                "event": "confirm",
                "rollout": record.name,
                "service": record.service,
                "version": record.to,
                "step": next + 1,
                "share": record.shares[1].to_string(),
                "audiences": by_audience(record),
                "next_share": share.map(|share| share.to_string()),
                "next_audience": step.and_then(|step| step.audience.as_ref()),
                "run": active.number,
            });
            let turn = active.run.turn();
            let _ = errands.send(Errand::confirm(&record.name, turn, url, &rollout.hooks, &body));
        }
    }

    fn measure(&mut self, at: usize, probe: usize) {
        let active = &self.rollouts.active[at];
        let Some(asked) = active.run.watch().and_then(|watch| watch.probes().nth(probe)) else {
            return;
        };
        let record = active.run.position();
        let config = self.rollouts.config(&record.name);
        let share = record.share_of(config.and_then(|config| config.audience(record.step)));
        let about = [
            ("CANARY_ROLLOUT", record.name.clone()),
            ("CANARY_SERVICE", record.service.clone()),
            ("CANARY_VERSION", record.to.clone()),
            ("CANARY_STEP", (record.step + 1).to_string()),
            ("CANARY_SHARE", share.to_string()),
        ];
        if let Some(errands) = &self.rollouts.errands {
            let turn = active.run.turn();
            let _ = errands.send(Errand::measure(&record.name, turn, probe, asked, about));
        }
    }

    /// Somebody who was asked has answered.
    pub(super) fn said(&mut self, said: Said, now: Moment) {
        let Some(at) = self.rollouts.at(said.rollout()) else { return };
        let active = &mut self.rollouts.active[at];
        if active.run.turn() != said.turn() {
            return;
        }
        let name = active.run.position().name.clone();
        let Some(rollout) = self.rollouts.config(&name).cloned() else { return };
        let active = &mut self.rollouts.active[at];
        let wishes = match said {
            Said::Confirmed { answer, .. } => {
                active.run.confirmed(answer, self::at(now));
                Vec::new()
            }
            Said::Measured { probe, answer, .. } => {
                let window_ms = active.run.watch().map_or(0, |watch| watch.kept().elapsed_ms);
                let asked = active.run.watch().and_then(|watch| watch.kept().heard.get(probe));
                active.evidence.push(EvidenceLine {
                    rollout: active.number.unwrap_or_default(),
                    step: u32::try_from(active.run.position().step).unwrap_or(u32::MAX),
                    unix_ms: now.unix_ms,
                    window_ms,
                    signal: asked.map_or_else(String::new, |heard| heard.asked.clone()),
                    share: None,
                    events: None,
                    connections: None,
                    answer: Some(format!("{}: {}", answer.word(), answer.text())),
                });
                active.run.heard(&rollout, probe, answer, self::at(now))
            }
        };
        self.fulfil(at, wishes, now);
    }

    /// Counts of a window have come.
    pub(super) fn counted_window(&mut self, counted: &Counted, now: Moment) {
        for at in 0..self.rollouts.active.len() {
            let active = &mut self.rollouts.active[at];
            let record = active.run.position();
            let Some(rollout) =
                self.rollouts.configured.iter().find(|r| r.name == record.name).cloned()
            else {
                continue;
            };
            let table = table_of(record, &rollout);
            if table != counted.service || record.to != counted.canary {
                continue;
            }
            let step = u32::try_from(record.step).unwrap_or(u32::MAX);
            let Some(counted) = active.run.gather(counted) else { continue };
            if let Some(watch) = active.run.watch() {
                let share = counted.share();
                let window_ms = watch.kept().elapsed_ms;
                let lines = watch.gate().signals().iter().map(|signal| {
                    let events = counted.events.iter().find(|(kind, _)| *kind == signal.kind);
                    EvidenceLine {
                        rollout: active.number.unwrap_or_default(),
                        step,
                        unix_ms: now.unix_ms,
                        window_ms,
                        signal: signal.kind.name().to_owned(),
                        share: Some(share),
                        events: Some(events.map_or([0, 0], |(_, events)| *events)),
                        connections: Some(counted.connections[0]),
                        answer: (!counted.complete).then(|| "incomplete".to_owned()),
                    }
                });
                active.evidence.extend(lines);
            }
            let wishes = active.run.counted(&rollout, &counted, self::at(now));
            self.fulfil(at, wishes, now);
        }
    }

    /// What a service's rollout, or that of an audience's, compares.
    pub(super) fn compared(&self, service: &str) -> Option<Compared> {
        let of = derived::parts(service).map_or(service, |(of, _)| of);
        let mut records = self.rollouts.active.iter().map(|active| active.run.position());
        let record = records.find(|one| one.service == of && !one.stage.is_over())?;
        let slow_over = record.slow.map(|slow| Duration::from_nanos(slow.over_ns));
        let config = self.rollouts.config(&record.name);
        let table = config.map_or_else(|| of.to_owned(), |config| table_of(record, config));
        if table != service {
            return Some(Compared { canary: None, slow_over, control_of: None });
        }
        // Where control gets nothing of the audience, it is that of everyone else.
        let alone = self.planner.service(service).is_some_and(|(_, state)| {
            state.ownership().counts()[usize::from(state.control())] == 0
        });
        let control_of = (alone && table != of).then(|| of.to_owned());
        Some(Compared { canary: Some(record.to.clone()), slow_over, control_of })
    }

    /// Fixes what a slow handshake is to rollouts that go by it, by what control's have taken
    /// lately.
    pub(super) fn fix_slow_handshakes(&mut self, now: Moment) {
        for at in 0..self.rollouts.active.len() {
            let active = &self.rollouts.active[at];
            let record = active.run.position();
            let Some(rollout) = self.rollouts.config(&record.name) else { continue };
            let wanted = active.run.slow_wanted(rollout).filter(|_| !record.stage.is_over());
            let Some(permille) = wanted else { continue };
            let Some((_, state)) = self.planner.service(&record.service) else { continue };
            let control = &state.config().versions[state.config().control].name;
            let known = self.kernel.signals();
            let Some(over) = known.quick(&record.service, control, permille) else { continue };
            let over_ns = u64::try_from(over.as_nanos()).unwrap_or(u64::MAX);
            let wishes = self.rollouts.active[at].run.fix_slow(Slow { permille, over_ns });
            self.fulfil(at, wishes, now);
        }
    }

    /// Holds the measured share against the asked one, once a second.
    pub(super) fn guard_splits(&mut self, now: Moment) {
        for at in 0..self.rollouts.active.len() {
            let active = &self.rollouts.active[at];
            let record = active.run.position();
            let Some(config) = self.rollouts.config(&record.name) else { continue };
            let Some((_, state)) = self.planner.service(&table_of(record, config)) else {
                continue;
            };
            let independent = state.config().stickiness == Stickiness::Connection;
            let watching = active.run.stage() == Stage::Watching;
            if !independent || !watching || now.boot_ms < active.set_ms + SETTLED_MS {
                self.rollouts.active[at].connections = None;
                continue;
            }
            let (Some(canary), control) = (state.slot(&record.to), state.control()) else {
                continue;
            };
            let of = |slot: u8| -> u64 {
                let indices: Vec<_> =
                    state.tables().iter().flat_map(|table| table.indices_of(slot)).collect();
                self.kernel.counters(&indices).iter().map(|one| one.connections).sum()
            };
            let counted = [of(control), of(canary)];
            let owned = state.ownership().counts();
            let [control, canary] = [control, canary].map(|slot| owned[usize::from(slot)]);
            let share = f64::from(canary) / f64::from((control + canary).max(1));
            let active = &mut self.rollouts.active[at];
            let Some(before) = active.connections.replace(counted) else { continue };
            let [control, canary] = [0, 1].map(|one| counted[one].saturating_sub(before[one]));
            let wishes = active.run.split_measured(share, control, canary);
            self.fulfil(at, wishes, now);
        }
    }

    fn prepare_share(&mut self, at: usize, ask: &Ask) {
        if ask.audience.is_some() {
            let record = self.rollouts.active[at].run.position();
            if let Some((table, _, ownership)) = self.asked(record, ask) {
                self.planner.prepare(table, Some(&ownership));
            }
        } else if let Some((service, proposal)) = self.proposed(at, ask.share) {
            self.planner.prepare(service, Some(&proposal.ownership));
        }
    }

    fn forget_share(&mut self, at: usize) {
        let service = &self.rollouts.active[at].run.position().service;
        let Some((service, _)) = self.planner.service(service) else { return };
        if !self.is_learning(service) {
            self.planner.prepare(service, None);
        }
    }

    fn proposed(&self, at: usize, share: Share) -> Option<(usize, Proposal)> {
        let record = self.rollouts.active[at].run.position();
        let (service, state) = self.planner.service(&record.service)?;
        let mut split = state.ownership().split.clone();
        split.insert(record.to.clone(), share);
        let fits = Share::fit_together(split.values().copied());
        fits.then(|| state.propose(split).ok()).flatten().map(|proposal| (service, proposal))
    }

    /// Sets the share of a step, and tells the rollout what became of it.
    fn set_share(&mut self, at: usize, share: Share, now: Moment) {
        let begun = Instant::now();
        let name = self.rollouts.active[at].run.position().name.clone();
        let Some(rollout) = self.rollouts.config(&name).cloned() else { return };
        let done = match self.proposed(at, share) {
            None => Err(format!(
                "room for {share}: the shares of the others leave less, and control what is left"
            )),
            Some((service, proposal)) => {
                let commit = self.commit_of(at, service, &proposal, Vec::new(), None, now);
                self.save(vec![commit.clone()], now)
                    .map(|()| (service, proposal, commit))
                    .map_err(|error| format!("the disk: {}", not_stored(&error)))
            }
        };
        let done = done.map(|(service, proposal, commit)| {
            let Change { slots, moved, before, salt, .. } = commit.change;
            let revision = self.revision;
            self.rollouts.active[at].made.push(Made { revision, slots, moved, before, salt });
            self.rollouts.active[at].set_ms = now.boot_ms;
            self.rollouts.active[at].connections = None;
            let record = self.rollouts.active[at].run.position();
            let raises = self.raises_with(record, share, &record.audiences);
            self.planner.set_raises(raises);
            self.planner.set_ownership(service, proposal.ownership);
            self.supersede(service);
            self.settle(now);
            self.metrics.split_applied(begun.elapsed());
            Ask { audience: None, share }
        });
        let wishes = self.rollouts.active[at].run.was_set(&rollout, done, self::at(now));
        self.fulfil(at, wishes, now);
    }

    /// The line of the audit trail of what a rollout does to its share.
    fn commit_of(
        &self,
        at: usize,
        service: usize,
        proposal: &Proposal,
        settles: Vec<u64>,
        reason: Option<&str>,
        now: Moment,
    ) -> Commit {
        let record = self.rollouts.active[at].run.position();
        let state = &self.planner.services()[service];
        let before = state.ownership();
        let reason = match reason {
            Some(reason) => format!("rollout {}: {reason}", record.name),
            None => format!("rollout {}, step {}", record.name, record.step + 1),
        };
        Commit {
            change: Change {
                unix_ms: now.unix_ms,
                uid: self.rollouts.active[at].by,
                service: record.service.clone(),
                action: ACTION.to_owned(),
                reason: Some(reason),
                before: before.split.clone(),
                after: proposal.ownership.split.clone(),
                moved: proposal.change_list.clone(),
                buckets_moved: proposal.moved,
                slots: state.slots().to_vec(),
                salt: Some(before.salt),
                about: settles.iter().rev().copied().collect(),
                ..Change::default()
            },
            record: Some(state.stored(&proposal.ownership)),
            deadline: None,
            settles,
        }
    }
}

/// The table whose clients a rollout's step is about: those of an audience, or all others.
fn table_of(record: &Record, rollout: &Rollout) -> String {
    match rollout.audience(record.step) {
        Some(audience) => derived::name(&record.service, audience),
        None => record.service.clone(),
    }
}

/// What audiences have of their own, as others are told.
fn by_audience(record: &Record) -> BTreeMap<&str, String> {
    let audiences = record.audiences.iter();
    audiences.map(|(name, share)| (name.as_str(), share.to_string())).collect()
}

/// The shares of a rollout after marks in the maps have said which ones went back.
fn taken_back(run: &Run, everyone: Share, audiences: BTreeMap<String, Share>) -> Shares {
    // All of them are marked that went back; others have what they had.
    let mut left = run.position().audiences.clone();
    left.extend(audiences);
    left.retain(|_, share| *share != Share::ZERO);
    Shares { everyone, audiences: left }
}
