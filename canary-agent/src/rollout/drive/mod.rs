//! A rollout on its way through its steps.
//!
//! Owns where it is, what it waits for, and what follows from a verdict, from an operator's word
//! and from what somebody else has done to the share. Time comes in with every call: moments of
//! the clock that counts suspended time decide, those of the wall clock are for windows and for
//! people. Time counts as watched only between two looks of the same agent, the share being in
//! force: an agent that was killed, stopped or suspended has seen nothing.
//!
//! An audience that a step names has a share of its own: it is never lower than everyone's, and goes
//! back with it.
//!
//! What is to be done goes out as [`Wish`]es. The only one whose outcome matters is
//! [`Wish::Set`]: [`Run::was_set`] says what became of it. Giving back can't fail.

mod operator;
mod record;
mod shares;

use std::time::Duration;

use canary_ebpf_common::share::Share;

pub use self::{
    record::{Record, Slow, Stage},
    shares::{Ask, Shares},
};
use super::{
    gate::Verdict,
    sample_ratio::{Departure, SampleRatio},
    watch::{Answer, Counted, Watch},
};
use crate::config::model::{Reaction, Rollout, Signal};

/// The agent looks each second. Of a longer gap no more than this has been watched.
const LONGEST_GAP_MS: u64 = 5_000;
/// Before its share is set, a step's buckets are watched for so long.
const PREPARE_MS: u64 = crate::plan::LEARN_MS;
/// What could not be set is tried again after this time.
const RETRY_MS: u64 = 1_000;
/// A hook that has not confirmed is asked again after this time.
const ASK_AGAIN_MS: u64 = 10_000;
/// How far the measured share may be off.
const TOLERATED_DEPARTURE: f64 = 1.05;
/// The risk of holding a rollout of which the share is right.
const DEPARTURE_RISK: f64 = 1e-4;

/// When something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Milliseconds of `CLOCK_BOOTTIME`.
    pub boot_ms: u64,
    /// Milliseconds since 1970.
    pub unix_ms: u64,
}

/// How the service is at that moment.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The asked share of the version.
    pub share: Share,
    /// Whether that is in the tables.
    pub in_force: bool,
    /// A panic has sent the service where it is.
    pub panicked: bool,
    /// A panic has sent clients of an audience to control that had more than everyone.
    pub audiences_panicked: bool,
    /// Whether watching buckets before they move is of any use.
    pub learns: bool,
    /// The buckets of what [`Wish::Prepare`] named are watched.
    pub prepared: bool,
    /// Why no share may be raised.
    pub barred: Option<String>,
}

/// Something that has happened to a rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// `started`, `step`, `passed`, `failed`, `held`, `paused`, `resumed`, `promoted`, `aborted`,
    /// `completed` …
    pub kind: &'static str,
    /// In a sentence.
    pub text: String,
}

/// What a rollout wishes for.
#[derive(Clone, Debug, PartialEq)]
pub enum Wish {
    /// Ask whether a step's share may be set.
    Confirm,
    /// Watch the buckets that would move.
    Prepare(Ask),
    /// Watch them no more.
    Forget,
    /// Set a share.
    Set(Ask),
    /// Go back to shares, whatever is in the way.
    Back(Shares),
    /// Ask one of the gate's.
    Measure(usize),
    /// Say what has happened.
    Tell(Told),
    /// Keep what is known, at once.
    Save,
}

/// Why an operator's word has no effect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unfit(pub String);

/// Whether somebody has confirmed.
#[derive(Clone, Debug, Default, PartialEq)]
enum Confirmed {
    #[default]
    NotAsked,
    Asked,
    Yes,
    /// Not yet, until it is asked again.
    No(u64, String),
}

/// What is done before a step's share is set. Nothing of it survives the agent.
#[derive(Clone, Debug, Default, PartialEq)]
struct Approach {
    confirmed: Confirmed,
    prepares: bool,
    prepared_ms: Option<u64>,
    retry_ms: Option<u64>,
}

/// A rollout.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    record: Record,
    watch: Option<Watch>,
    approach: Approach,
    /// When it last looked.
    looked_ms: Option<u64>,
    /// When each that is asked is to be asked again; `None` while it is being asked.
    measures: Vec<Option<u64>>,
    waits: Option<String>,
    /// Goes up whenever what was asked means nothing any more.
    turn: u64,
}

impl Run {
    /// One that begins.
    pub fn start(rollout: &Rollout, share: Share, revision: u64, now: At) -> Self {
        let record = Record {
            name: rollout.name.clone(),
            service: rollout.service.clone(),
            to: rollout.to.clone(),
            recipe: recipe(rollout),
            stage: Stage::Entering,
            step: 0,
            shares: [share; 2],
            audiences: Default::default(),
            since_revision: revision,
            begun_unix_ms: now.unix_ms,
            step_unix_ms: now.unix_ms,
            ended_unix_ms: None,
            watched_ms: 0,
            reason: None,
            paused_at: None,
            let_pass: false,
            full: false,
            sent_on: false,
            slow: None,
            evidence: None,
            ratio: None,
        };
        Self::of(record)
    }

    fn of(record: Record) -> Self {
        Self {
            record,
            watch: None,
            approach: Approach::default(),
            looked_ms: None,
            measures: Vec::new(),
            waits: None,
            turn: 0,
        }
    }

    /// What was asked in another turn than this is answered too late.
    pub fn turn(&self) -> u64 {
        self.turn
    }

    /// Whatever was asked means nothing any more.
    fn ask_anew(&mut self) {
        self.approach = Approach::default();
        self.turn += 1;
    }

    /// One that an earlier agent has kept, under the configuration of today.
    pub fn restore(record: Record, rollout: Option<&Rollout>) -> (Self, Vec<Wish>) {
        let mut run = Self::of(record);
        let wishes = match run.record.stage.is_over() {
            true => Vec::new(),
            false => run.reconfigure(rollout),
        };
        (run, wishes)
    }

    /// What is to be kept of it.
    pub fn record(&self) -> Record {
        let evidence = self.watch.as_ref().map(|watch| watch.kept().clone());
        Record { evidence, ..self.record.clone() }
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        self.record.stage
    }

    /// Its present step's gate at work.
    pub fn watch(&self) -> Option<&Watch> {
        self.watch.as_ref()
    }

    /// What it waits for, in a sentence.
    pub fn waits(&self) -> Option<&str> {
        self.waits.as_deref()
    }

    /// All of it but its evidence.
    pub fn position(&self) -> &Record {
        &self.record
    }

    /// The configuration is another, or this is another agent.
    pub fn reconfigure(&mut self, rollout: Option<&Rollout>) -> Vec<Wish> {
        if self.record.stage.is_over() {
            return Vec::new();
        }
        self.ask_anew();
        let same = rollout.filter(|rollout| {
            rollout.service == self.record.service
                && rollout.to == self.record.to
                && recipe(rollout) == self.record.recipe
        });
        let Some(rollout) = same else {
            self.watch = None;
            let why = match rollout {
                Some(_) => "its configuration has changed: `resume` goes on with the new one",
                None => "it is not configured any more: abort it, or bring it back and resume",
            };
            let named = |name: &String| {
                let mut steps = rollout.iter().flat_map(|rollout| &rollout.steps);
                steps.any(|step| step.audience.as_ref() == Some(name))
            };
            let [_, everyone] = self.record.shares;
            let gone: Vec<String> = self
                .record
                .audiences
                .iter()
                .filter(|(name, share)| !named(name) && **share > everyone)
                .map(|(name, share)| format!("`{name}` ({share})"))
                .collect();
            self.record.audiences.retain(|name, _| named(name));
            let why = match gone.is_empty() {
                true => why.to_owned(),
                false => format!(
                    "{why}; no step names {} any more, who have {everyone} like everyone",
                    gone.join(", ")
                ),
            };
            return match self.record.stage {
                Stage::Paused if self.record.reason.as_ref() == Some(&why) => Vec::new(),
                _ => self.pause(why, None),
            };
        };
        let kept = self.watch.take().map(|watch| watch.kept().clone());
        let kept = kept.or_else(|| self.record.evidence.take());
        let gate = rollout.steps.get(self.record.step).and_then(|step| step.gate.as_ref());
        let (Some(gate), Some(kept)) = (gate, kept) else { return Vec::new() };
        match Watch::resume(gate, kept) {
            Ok(watch) => {
                self.set_watch(watch);
                Vec::new()
            }
            Err(changed) => {
                self.set_watch(Watch::new(gate));
                let text = format!("gate `{}`: {changed}", gate.name);
                vec![tell("gate", text), Wish::Save]
            }
        }
    }

    fn set_watch(&mut self, watch: Watch) {
        self.measures = watch.probes().map(|_| Some(0)).collect();
        self.watch = Some(watch);
    }

    /// Time has passed.
    pub fn look(&mut self, rollout: &Rollout, view: &View, now: At) -> Vec<Wish> {
        let before = self.looked_ms.replace(now.boot_ms);
        let passed = before.map_or(0, |before| now.boot_ms.saturating_sub(before));
        let passed = passed.min(LONGEST_GAP_MS);
        let moving = matches!(self.record.stage, Stage::Entering | Stage::Watching);
        self.waits = None;
        if view.audiences_panicked && !self.record.stage.is_over() {
            return self.panicked(now);
        }
        if !moving {
            return Vec::new();
        }
        let mut wishes = self.disturbed(rollout, view, now);
        if self.record.stage == Stage::Watching {
            if view.in_force {
                self.record.watched_ms = self.record.watched_ms.saturating_add(passed);
                if let Some(watch) = &mut self.watch {
                    watch.pass_time(passed);
                }
            }
            wishes.extend(self.measure(now));
            wishes.extend(self.react(rollout, now));
        }
        if self.record.stage == Stage::Watching {
            wishes.extend(self.go_on(rollout, view, now));
        }
        if self.record.stage == Stage::Entering {
            wishes.extend(self.enter(rollout, view, now));
        }
        wishes
    }

    /// When it is to look again at the latest, if before the next second.
    pub fn due_ms(&self, rollout: &Rollout, now: At) -> Option<u64> {
        let step = rollout.steps.get(self.record.step)?;
        let hold = step.hold.map(millis).filter(|_| self.record.stage == Stage::Watching);
        let left = hold.map(|hold| hold.saturating_sub(self.record.watched_ms));
        let hold_ends = left.filter(|left| *left > 0).map(|left| now.boot_ms + left);
        let prepared = self.approach.prepared_ms.map(|since| since + PREPARE_MS);
        let measure = self.measures.iter().flatten().min().copied();
        let measure = measure.filter(|_| self.record.stage == Stage::Watching);
        let all = [hold_ends, prepared, self.approach.retry_ms, measure];
        all.into_iter().flatten().filter(|at| *at > now.boot_ms).min()
    }

    /// What became of [`Wish::Set`].
    pub fn was_set(&mut self, rollout: &Rollout, done: Result<Ask, String>, now: At) -> Vec<Wish> {
        match done {
            Ok(Ask { audience, share }) => {
                match audience {
                    Some(audience) => drop(self.record.audiences.insert(audience, share)),
                    None => self.record.shares[1] = share,
                }
                if self.next_ask(rollout, self.record.step).is_some() {
                    self.approach.prepares = false;
                    self.approach.prepared_ms = None;
                    return vec![Wish::Save];
                }
                self.begin_watching(rollout, now)
            }
            Err(why) => {
                self.approach.retry_ms = Some(now.boot_ms + RETRY_MS);
                self.waits = Some(why);
                Vec::new()
            }
        }
    }

    /// What a hook has said about the next step.
    pub fn confirmed(&mut self, answer: Result<(), String>, now: At) {
        if self.approach.confirmed == Confirmed::Asked {
            self.approach.confirmed = match answer {
                Ok(()) => Confirmed::Yes,
                Err(why) => Confirmed::No(now.boot_ms + ASK_AGAIN_MS, why),
            };
        }
    }

    /// The part of control's handshakes that is to say what a slow one is, where that is not fixed
    /// yet.
    pub fn slow_wanted(&self, rollout: &Rollout) -> Option<u16> {
        let permille = slow_permille(rollout)?;
        (self.record.slow.is_none_or(|slow| slow.permille != permille)).then_some(permille)
    }

    /// Fixes what a slow handshake is. What was counted by another measure counts no more.
    pub fn fix_slow(&mut self, slow: Slow) -> Vec<Wish> {
        self.record.slow = Some(slow);
        let text = format!(
            "a handshake is slow that takes longer than {}: {} % of control's were quicker",
            humantime::format_duration(Duration::from_nanos(slow.over_ns)),
            f64::from(slow.permille) / 10.0
        );
        vec![tell("threshold", text), Wish::Save]
    }

    /// What is to be weighed by now, and told: windows put together, where somebody weighs them. One
    /// in which another handshake was slow than in this rollout is not complete.
    pub fn gather(&mut self, counted: &Counted) -> Option<Counted> {
        let watch = self.watch.as_mut().filter(|_| self.record.stage == Stage::Watching)?;
        let by_slow = watch.gate().signals().iter().any(|s| s.quantile_permille.is_some());
        let fixed = self.record.slow.is_some_and(|slow| slow.over_ns == counted.slow_ns);
        let complete = counted.complete && (fixed || !by_slow);
        watch.gather(&Counted { complete, ..counted.clone() })
    }

    /// Counts of a window have come, as [`Self::gather`] has left them.
    pub fn counted(&mut self, rollout: &Rollout, counted: &Counted, now: At) -> Vec<Wish> {
        let Some(watch) = self.watch.as_mut().filter(|_| self.record.stage == Stage::Watching)
        else {
            return Vec::new();
        };
        watch.count(counted);
        self.react(rollout, now)
    }

    /// One of the gate's has answered.
    pub fn heard(&mut self, rollout: &Rollout, probe: usize, answer: Answer, now: At) -> Vec<Wish> {
        let Some(watch) = &mut self.watch else { return Vec::new() };
        let Some(interval) = watch.probes().nth(probe).map(|probe| probe.interval) else {
            return Vec::new();
        };
        if let Some(measure) = self.measures.get_mut(probe) {
            *measure = Some(now.boot_ms + millis(interval));
        }
        if self.record.stage != Stage::Watching {
            return Vec::new();
        }
        watch.hear(probe, answer, now.unix_ms);
        self.react(rollout, now)
    }

    /// New connections of control and of the version have been counted, the share being in force.
    pub fn split_measured(&mut self, share: f64, control: u64, canary: u64) -> Vec<Wish> {
        if self.record.stage != Stage::Watching {
            return Vec::new();
        }
        let ratio = self.record.ratio.get_or_insert_with(|| SampleRatio::new(TOLERATED_DEPARTURE));
        ratio.add(share, control, canary);
        let Some(departure) = ratio.departure(DEPARTURE_RISK) else { return Vec::new() };
        let more = if departure == Departure::More { "more" } else { "fewer" };
        let (canary, control) = (ratio.canary_connections, ratio.control_connections);
        let why = format!(
            "`{}` gets {more} connections than its share: {canary} of {} in this step",
            self.record.to,
            canary.saturating_add(control)
        );
        self.hold(why)
    }

    /// Whether somebody else has set the share.
    fn disturbed(&mut self, rollout: &Rollout, view: &View, now: At) -> Vec<Wish> {
        let [_, mine] = self.record.shares;
        if view.share == mine {
            return Vec::new();
        }
        // An agent that has ended in between has set it, and could not say so any more.
        if self.record.enters_with(rollout, view.share) {
            self.record.shares[1] = view.share;
            return Vec::new();
        }
        if view.panicked {
            return self.panicked(now);
        }
        let mut why = format!(
            "the share of `{}` was set to {} by somebody else (it was {mine}): `resume` sets it to that of the step",
            self.record.to, view.share
        );
        let had: Vec<String> = std::mem::take(&mut self.record.audiences)
            .into_iter()
            .filter(|(_, share)| *share > mine)
            .map(|(name, share)| format!("`{name}` ({share})"))
            .collect();
        if !had.is_empty() {
            why.push_str(&format!(", and those of {}, who have what everyone has", had.join(", ")));
        }
        self.record.shares[1] = view.share;
        self.pause(why, None)
    }

    fn panicked(&mut self, now: At) -> Vec<Wish> {
        let why = "a panic has sent everything to control".to_owned();
        self.end(Stage::Aborted, why.clone(), now);
        vec![Wish::Forget, tell("aborted", why), Wish::Save]
    }

    /// Its share has gone back to this one, and its agent has ended before it could say so.
    pub fn was_given_back(
        &mut self,
        rollout: Option<&Rollout>,
        shares: &Shares,
        why: String,
        now: At,
    ) -> Vec<Wish> {
        if self.record.stage.is_over() {
            return Vec::new();
        }
        self.record.shares[1] = shares.everyone;
        self.record.audiences.clone_from(&shares.audiences);
        if shares.is_nothing() {
            self.end(Stage::Aborted, why.clone(), now);
            return vec![Wish::Forget, tell("aborted", why), Wish::Save];
        }
        if let Some(rollout) = rollout {
            let alike = |step: &usize| {
                let (left, is) = (self.shares_of(rollout, *step), shares);
                !left.is_less_than(is) && !is.is_less_than(&left) && left.everyone == is.everyone
            };
            let set = |step: &usize| rollout.steps[*step].split.is_some();
            let before = 0..self.record.step.min(rollout.steps.len());
            if let Some(step) = before.rev().filter(set).find(alike) {
                self.record.step = step;
            }
        }
        self.hold(why)
    }

    fn pause(&mut self, why: String, paused_at: Option<Stage>) -> Vec<Wish> {
        self.record.stage = Stage::Paused;
        self.record.paused_at = paused_at;
        self.record.reason = Some(why.clone());
        self.ask_anew();
        vec![Wish::Forget, tell("paused", why), Wish::Save]
    }

    fn hold(&mut self, why: String) -> Vec<Wish> {
        self.record.stage = Stage::Held;
        self.record.reason = Some(why.clone());
        self.record.paused_at = None;
        self.ask_anew();
        vec![Wish::Forget, tell("held", why), Wish::Save]
    }

    fn abort(&mut self, why: String, now: At) -> Vec<Wish> {
        self.end(Stage::Aborted, why.clone(), now);
        self.record.shares[1] = Share::ZERO;
        // First of all what counts.
        vec![Wish::Back(Shares::NONE), Wish::Save, Wish::Forget, tell("aborted", why)]
    }

    fn complete(&mut self, now: At) -> Vec<Wish> {
        let [_, share] = self.record.shares;
        let text = format!("`{}` has {share}: its last step is done", self.record.to);
        self.end(Stage::Completed, text.clone(), now);
        vec![Wish::Forget, tell("completed", text), Wish::Save]
    }

    fn end(&mut self, stage: Stage, why: String, now: At) {
        self.record.stage = stage;
        self.record.reason = Some(why);
        self.record.ended_unix_ms = Some(now.unix_ms);
        self.record.paused_at = None;
        // Nobody has more than everyone any more: aborted, it is taken back; completed, everyone has
        // as much.
        self.record.audiences.clear();
        self.ask_anew();
    }

    /// Asks those of the gate's whose time has come.
    fn measure(&mut self, now: At) -> Vec<Wish> {
        let mut wishes = Vec::new();
        for (at, due) in self.measures.iter_mut().enumerate() {
            if due.is_some_and(|due| due <= now.boot_ms) {
                *due = None;
                wishes.push(Wish::Measure(at));
            }
        }
        wishes
    }

    /// Does what follows from the gate's verdict.
    fn react(&mut self, rollout: &Rollout, now: At) -> Vec<Wish> {
        let Some(watch) = self.watch.as_ref().filter(|_| self.record.stage == Stage::Watching)
        else {
            return Vec::new();
        };
        let because = watch.kept().because.clone().unwrap_or_default();
        let gate = watch.config().name.clone();
        let (reaction, how) = match watch.verdict() {
            None | Some(Verdict::Pass) => return Vec::new(),
            Some(Verdict::Fail) => (rollout.on_fail, "has failed"),
            Some(Verdict::Inconclusive) => (rollout.on_inconclusive, "could not decide in time"),
            Some(Verdict::NoData) => (rollout.on_no_data, "has had nothing to decide by"),
        };
        let why = format!("gate `{gate}` of {} {how}: {because}", self.place(rollout));
        match reaction {
            Reaction::Abort => self.abort(why, now),
            Reaction::Hold => self.hold(why),
            Reaction::StepBack => match self.shares_before(rollout) {
                None => self.abort(format!("{why}; there is no step before it"), now),
                Some((step, shares)) => {
                    self.record.step = step;
                    self.record.shares[1] = shares.everyone;
                    self.record.audiences.clone_from(&shares.audiences);
                    let why = format!("{why}; back to {shares}");
                    let mut wishes = vec![Wish::Back(shares)];
                    wishes.extend(self.hold(why));
                    wishes
                }
            },
        }
    }

    /// Whether a step is done but for its pause.
    fn step_done(&self, hold: Option<Duration>) -> bool {
        let passed = self.watch.as_ref().is_none_or(|watch| watch.verdict() == Some(Verdict::Pass));
        passed && self.record.watched_ms >= hold.map_or(0, millis)
    }

    /// From a step that is done to the next; and what the next one needs, a little before.
    fn go_on(&mut self, rollout: &Rollout, view: &View, now: At) -> Vec<Wish> {
        let Some(step) = rollout.steps.get(self.record.step) else {
            return self.pause("its configuration has fewer steps".to_owned(), None);
        };
        if self.record.full {
            return self.complete(now);
        }
        let left = step.hold.map_or(0, millis).saturating_sub(self.record.watched_ms);
        let lets = !step.pause || self.record.let_pass;
        let passed = self.watch.as_ref().is_none_or(|w| w.verdict() == Some(Verdict::Pass));
        if passed && lets && left <= PREPARE_MS {
            let next = self.record.step + 1;
            let Some(following) = rollout.steps.get(next) else {
                return if left == 0 {
                    self.complete(now)
                } else {
                    self.waits_for(step, left, passed)
                };
            };
            let mut wishes = Vec::new();
            // The share before, which may stand some steps further on, is watched in time.
            if left > 0 {
                if following.split.is_some() {
                    let ask = self.next_ask(rollout, next);
                    wishes.extend(self.approach(rollout, ask, view, now).1);
                }
                wishes.extend(self.waits_for(step, left, passed));
                return wishes;
            }
            self.record.step = next;
            self.record.step_unix_ms = now.unix_ms;
            self.record.stage = Stage::Entering;
            self.record.let_pass = false;
            self.record.reason = None;
            self.watch = None;
            wishes.push(Wish::Save);
            return wishes;
        }
        self.waits_for(step, left, passed)
    }

    fn waits_for(
        &mut self,
        step: &crate::config::model::Step,
        left: u64,
        passed: bool,
    ) -> Vec<Wish> {
        let mut waits = Vec::new();
        if left > 0 {
            let left = Duration::from_secs(left.div_ceil(1_000));
            waits.push(format!("{} more", humantime::format_duration(left)));
        }
        if let (false, Some(gate)) = (passed, &step.gate) {
            let unknown = gate.signals.iter().any(is_slow) && self.record.slow.is_none();
            waits.push(match unknown {
                false => format!("gate `{}`", gate.name),
                true => format!(
                    "gate `{}`, which waits for enough handshakes of control's to say what is slow",
                    gate.name
                ),
            });
        }
        if step.pause && !self.record.let_pass {
            waits.push("an operator's `resume`".to_owned());
        }
        self.waits = Some(waits.join(", and "));
        Vec::new()
    }

    /// Sets a step's share as soon as that may be.
    fn enter(&mut self, rollout: &Rollout, view: &View, now: At) -> Vec<Wish> {
        if self.record.step >= rollout.steps.len() {
            return self.pause("its configuration has fewer steps".to_owned(), None);
        }
        let Some(ask) = self.next_ask(rollout, self.record.step) else {
            return self.begin_watching(rollout, now);
        };
        let (ready, mut wishes) = self.approach(rollout, Some(ask.clone()), view, now);
        if ready {
            wishes.push(Wish::Set(ask));
        }
        wishes
    }

    /// Does what comes before a share is set; whether all of it is done.
    fn approach(
        &mut self,
        rollout: &Rollout,
        ask: Option<Ask>,
        view: &View,
        now: At,
    ) -> (bool, Vec<Wish>) {
        let mut wishes = Vec::new();
        let Some(ask) = ask else { return (true, wishes) };
        let raises = ask.share > self.record.share_of(ask.audience.as_deref());
        if let (true, Some(why)) = (raises, &view.barred) {
            self.waits = Some(why.clone());
            return (false, wishes);
        }
        if !self.record.sent_on {
            if let Some(until) = closed(rollout, now.unix_ms) {
                self.waits = Some(until);
                return (false, wishes);
            }
            if rollout.hooks.confirm.is_some() {
                match &self.approach.confirmed {
                    Confirmed::Yes => {}
                    Confirmed::Asked => {
                        self.waits = Some("the answer of its hook".to_owned());
                        return (false, wishes);
                    }
                    Confirmed::No(until, why) if now.boot_ms < *until => {
                        self.waits = Some(format!("its hook, which has not confirmed: {why}"));
                        return (false, wishes);
                    }
                    Confirmed::NotAsked | Confirmed::No(..) => {
                        self.approach.confirmed = Confirmed::Asked;
                        self.waits = Some("the answer of its hook".to_owned());
                        return (false, vec![Wish::Confirm]);
                    }
                }
            }
            if raises && view.learns {
                if !self.approach.prepares {
                    self.approach.prepares = true;
                    self.waits = Some("its buckets, which are watched before they move".to_owned());
                    return (false, vec![Wish::Prepare(ask)]);
                }
                if view.prepared {
                    self.approach.prepared_ms.get_or_insert(now.boot_ms);
                }
                let since = self.approach.prepared_ms;
                if since.is_none_or(|since| now.boot_ms < since + PREPARE_MS) {
                    self.waits = Some("its buckets, which are watched before they move".to_owned());
                    return (false, wishes);
                }
            }
        }
        if self.approach.retry_ms.is_some_and(|retry| now.boot_ms < retry) {
            wishes.clear();
            return (false, wishes);
        }
        (true, wishes)
    }

    fn begin_watching(&mut self, rollout: &Rollout, now: At) -> Vec<Wish> {
        let whose = rollout.audience(self.record.step);
        let share = self.record.share_of(whose);
        let whose = whose.map_or_else(String::new, |audience| format!(" of `{audience}`"));
        self.record.stage = Stage::Watching;
        self.record.step_unix_ms = now.unix_ms;
        self.record.watched_ms = 0;
        self.record.let_pass = false;
        self.record.sent_on = false;
        self.record.reason = None;
        self.record.ratio = None;
        self.record.evidence = None;
        self.ask_anew();
        self.watch = None;
        self.measures.clear();
        let step = rollout.steps.get(self.record.step);
        if let Some(gate) = step.and_then(|step| step.gate.as_ref()).filter(|_| !self.record.full) {
            self.set_watch(Watch::new(gate));
        }
        let text = format!("{}: `{}` has {share}{whose}", self.place(rollout), self.record.to);
        vec![tell("step", text), Wish::Save]
    }
}

fn tell(kind: &'static str, text: String) -> Wish {
    Wish::Tell(Told { kind, text })
}

/// Until when no share is set, if that is so.
fn closed(rollout: &Rollout, unix_ms: u64) -> Option<String> {
    let windows = &rollout.windows;
    if windows.is_empty() || windows.iter().any(|window| window.holds(unix_ms)) {
        return None;
    }
    let next = windows.iter().filter_map(|window| window.next(unix_ms)).min();
    let texts: Vec<&str> = windows.iter().map(|window| window.text.as_str()).collect();
    Some(match next {
        Some(next) => {
            let at = std::time::UNIX_EPOCH + Duration::from_millis(next);
            let at = humantime::format_rfc3339_seconds(at);
            format!("its window, which opens at {at} ({})", texts.join(", "))
        }
        None => format!("its window ({})", texts.join(", ")),
    })
}

fn is_slow(signal: &Signal) -> bool {
    matches!(signal, Signal::Kernel(signal) if signal.quantile_permille.is_some())
}

/// The part of control's handshakes that says what is slow to a rollout, in thousandths.
fn slow_permille(rollout: &Rollout) -> Option<u16> {
    let gates = rollout.steps.iter().filter_map(|step| step.gate.as_ref());
    gates.flat_map(|gate| &gate.signals).find_map(|signal| match signal {
        Signal::Kernel(signal) => signal.quantile_permille,
        Signal::Probe(_) => None,
    })
}

/// What a rollout does, in words.
pub fn recipe(rollout: &Rollout) -> String {
    let steps = rollout.steps.iter().map(|step| {
        let mut words = Vec::new();
        let whose = step.audience.as_ref().map_or_else(String::new, |name| format!(" of {name}"));
        words.extend(step.split.map(|share| format!("{share}{whose}")));
        words.extend(step.hold.map(|hold| format!("hold {}", humantime::format_duration(hold))));
        words.extend(step.gate.as_ref().map(|gate| format!("gate {}", gate.name)));
        words.extend(step.pause.then(|| "pause".to_owned()));
        words.join(", ")
    });
    steps.collect::<Vec<_>>().join("; ")
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
