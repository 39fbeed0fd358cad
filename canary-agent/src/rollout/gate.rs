//! Several signals' evidence, and one verdict.
//!
//! Owns when a gate fails, passes, or gives up. Evidence goes on being weighed after the
//! verdict, which stays what it is. Must not know what follows from a verdict.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::evidence::{BETTER, Evidence, WORSE, ln_threshold};
use crate::config::model::{self, KernelSignal, Signal, SignalKind};

/// What was counted of one signal in a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counts {
    /// The canary's part of the connections that were watched of both, as a fraction.
    pub share: f64,
    /// Bad events on control.
    pub control_events: u64,
    /// Bad events on the canary.
    pub canary_events: u64,
    /// Connections of control that were watched, where that is known.
    pub control_connections: Option<u64>,
}

impl Counts {
    /// Whether so many of control's connections are bad that a canary of which all are would
    /// still seem better than `pass_below` times control: then nothing speaks for it.
    fn saturated(&self, pass_below: f64) -> bool {
        let Self { control_events, control_connections, .. } = *self;
        control_events > 0
            && control_connections
                .is_some_and(|all| saturated(control_events as f64, all as f64, pass_below))
    }
}

/// Whether `bad` of `all` connections of control leave no room for a canary that is `pass_below`
/// times as bad.
pub(super) fn saturated(bad: f64, all: f64, pass_below: f64) -> bool {
    bad * pass_below >= all
}

/// What was seen in a while.
#[derive(Clone, Copy, Debug)]
pub struct Window<'c> {
    /// From the gate's beginning to the end of the window.
    pub elapsed: Duration,
    /// How much of that was watched for this window: its length.
    pub watched: Duration,
    /// Whether every event was counted. Otherwise nothing is learned, and the time does not
    /// count as watched.
    pub complete: bool,
    /// Counts by signal; a signal that is left out had no event, and one that the gate does
    /// not have is passed over.
    pub counts: &'c [(SignalKind, Counts)],
}

/// What a gate has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The canary is worse than is tolerated.
    Fail,
    /// It is not as bad as `pass_below`.
    Pass,
    /// The deadline came before either could be said.
    Inconclusive,
    /// The deadline came, and no signal that the gate waited for had an event on either side.
    NoData,
}

/// A verdict and how it came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// What it is.
    pub verdict: Verdict,
    /// The signal that failed; of several the one with the most evidence. Or the one that
    /// the gate was still waiting for, that with the least.
    pub signal: Option<Name>,
    /// When, in milliseconds since the gate began.
    pub elapsed_ms: u64,
    /// After how many windows.
    pub windows: u64,
}

/// A signal's name, as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Name(pub SignalKind);

impl From<Name> for String {
    fn from(Name(kind): Name) -> Self {
        kind.name().to_owned()
    }
}

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let kind = SignalKind::ALL.into_iter().find(|kind| kind.name() == name);
        kind.map(Name).ok_or_else(|| format!("there is no signal `{name}`"))
    }
}

/// What has been seen of one signal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalProgress {
    /// Which.
    pub signal: Name,
    /// Bad events on control.
    pub control_events: u64,
    /// Bad events on the canary.
    pub canary_events: u64,
    /// Windows in which so much of control was bad that nothing could speak for the canary.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub saturated_windows: u64,
    /// That the canary is worse than is tolerated.
    pub fail: Evidence,
    /// That it is better than what would be too bad.
    pub pass: Evidence,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde asks for")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What has been seen so far: all that is to be kept of a gate over a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Milliseconds since the gate began, at the end of the last window.
    pub elapsed_ms: u64,
    /// How many of them were watched.
    pub watched_ms: u64,
    /// Windows that something was learned from, without events too.
    pub windows: u64,
    /// Windows in which not every event was counted.
    pub incomplete_windows: u64,
    /// In the order of the configuration.
    pub signals: Vec<SignalProgress>,
    /// The verdict, once there is one.
    pub decision: Option<Decision>,
}

/// What was kept is of a gate that asked something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "its signals, or what is tolerated of one, have changed since its evidence was gathered: \
     it has to begin again"
)]
pub struct Changed;

/// A gate at work.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    alpha: f64,
    beta: f64,
    min_duration: Duration,
    deadline: Duration,
    /// Those that are counted; each has its [`SignalProgress`] at the same index.
    signals: Vec<KernelSignal>,
    progress: Progress,
}

impl Gate {
    /// A gate that has seen nothing yet.
    ///
    /// Of its signals it takes those that are counted: what others are asked is judged answer by
    /// answer ([`watch`](super::watch)).
    pub fn new(config: &model::Gate) -> Self {
        let model::Gate { name: _, alpha, beta, min_duration, deadline, signals } = config;
        let counted = signals.iter().filter_map(|signal| match signal {
            Signal::Kernel(signal) => Some(*signal),
            Signal::Probe(_) => None,
        });
        let signals: Vec<KernelSignal> = counted.collect();
        let begun = signals.iter().map(|signal| SignalProgress {
            signal: Name(signal.kind),
            control_events: 0,
            canary_events: 0,
            saturated_windows: 0,
            fail: Evidence::new(signal.tolerate, WORSE),
            pass: Evidence::new(signal.pass_below, BETTER),
        });
        let progress = Progress {
            elapsed_ms: 0,
            watched_ms: 0,
            windows: 0,
            incomplete_windows: 0,
            signals: begun.collect(),
            decision: None,
        };
        let (alpha, beta) = (*alpha, *beta);
        let (min_duration, deadline) = (*min_duration, *deadline);
        Self { alpha, beta, min_duration, deadline, signals, progress }
    }

    /// The gate with what was kept of it. Risks and times may have changed meanwhile.
    ///
    /// # Errors
    /// It asks something else than it did.
    pub fn resume(config: &model::Gate, progress: Progress) -> Result<Self, Changed> {
        let fresh = Self::new(config);
        let same = fresh.progress.signals.len() == progress.signals.len()
            && fresh.progress.signals.iter().zip(&progress.signals).all(|(fresh, kept)| {
                fresh.signal == kept.signal
                    && fresh.fail.asks_as(&kept.fail)
                    && fresh.pass.asks_as(&kept.pass)
            });
        match same {
            true => Ok(Self { progress, ..fresh }),
            false => Err(Changed),
        }
    }

    /// What has been seen so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The signals that are counted, in the order of the configuration.
    pub fn signals(&self) -> &[KernelSignal] {
        &self.signals
    }

    /// Before it has been watched for so long it does not pass.
    pub fn min_duration(&self) -> Duration {
        self.min_duration
    }

    /// From then on it decides no more.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// How many signals decide.
    pub fn deciding(&self) -> usize {
        self.signals.iter().filter(|signal| !signal.observe).count()
    }

    /// What a signal's [`SignalProgress::fail`] must reach for the gate to fail: `alpha` is
    /// shared by the deciding signals, so that it holds for all of them together.
    pub fn ln_fail_at(&self) -> f64 {
        ln_threshold(self.alpha / self.deciding().max(1) as f64)
    }

    /// What every deciding signal's [`SignalProgress::pass`] must reach for it to pass.
    pub fn ln_pass_at(&self) -> f64 {
        ln_threshold(self.beta)
    }

    /// The verdict, if there is one by now.
    pub fn verdict(&self) -> Option<Verdict> {
        self.progress.decision.map(|decision| decision.verdict)
    }

    /// Takes a window into account. Windows come in the order of time.
    pub fn watch(&mut self, window: &Window<'_>) -> Option<Verdict> {
        let Window { elapsed, watched, complete, counts } = *window;
        let progress = &mut self.progress;
        progress.elapsed_ms = progress.elapsed_ms.max(millis(elapsed));
        let late = elapsed.saturating_sub(watched) >= self.deadline;
        if late && progress.decision.is_none() {
            // It begins after the time that the gate had.
            self.judge();
        }
        let progress = &mut self.progress;
        if complete {
            progress.windows = progress.windows.saturating_add(1);
            progress.watched_ms = progress.watched_ms.saturating_add(millis(watched));
            for (kind, counts) in counts {
                let mut signals = self.signals.iter().zip(&mut progress.signals);
                if let Some((terms, signal)) = signals.find(|(_, one)| one.signal.0 == *kind) {
                    signal.add(counts, terms.pass_below);
                }
            }
        } else {
            progress.incomplete_windows = progress.incomplete_windows.saturating_add(1);
        }
        if self.progress.decision.is_none() {
            self.judge();
        }
        self.verdict()
    }

    /// The deciding signals that have not let the canary pass.
    pub fn waiting(&self) -> impl Iterator<Item = &SignalProgress> {
        let pass_at = self.ln_pass_at();
        let all = self.signals.iter().zip(&self.progress.signals);
        all.filter(move |(terms, seen)| !terms.observe && seen.pass.ln() < pass_at)
            .map(|(_, seen)| seen)
    }

    /// Whether it waits for signals, and none of them has had an event on either side.
    pub fn hears_nothing(&self) -> bool {
        let mut waiting = self.waiting().peekable();
        waiting.peek().is_some()
            && waiting.all(|seen| seen.control_events == 0 && seen.canary_events == 0)
    }

    fn judge(&mut self) {
        let fail_at = self.ln_fail_at();
        let progress = &self.progress;
        let deciding: Vec<&SignalProgress> = self
            .signals
            .iter()
            .zip(&progress.signals)
            .filter_map(|(terms, seen)| (!terms.observe).then_some(seen))
            .collect();
        let worst = deciding.iter().map(|seen| (seen.fail.ln(), seen.signal));
        let worst = worst.max_by(|(a, _), (b, _)| a.total_cmp(b));
        let waiting = self.waiting().map(|seen| (seen.pass.ln(), seen.signal));
        let least = waiting.min_by(|(a, _), (b, _)| a.total_cmp(b));
        let least = least.map(|(_, signal)| signal);
        let long_enough = progress.watched_ms >= millis(self.min_duration);
        let (verdict, signal) = match worst {
            Some((ln_fail, signal)) if ln_fail >= fail_at => (Verdict::Fail, Some(signal)),
            Some(_) if long_enough && least.is_none() => (Verdict::Pass, None),
            _ if progress.elapsed_ms < millis(self.deadline) => return,
            _ if self.hears_nothing() => (Verdict::NoData, least),
            _ => (Verdict::Inconclusive, least),
        };
        let (elapsed_ms, windows) = (progress.elapsed_ms, progress.windows);
        self.progress.decision = Some(Decision { verdict, signal, elapsed_ms, windows });
    }
}

impl SignalProgress {
    fn add(&mut self, counts: &Counts, pass_below: f64) {
        let Counts { share, control_events, canary_events, .. } = *counts;
        self.control_events = self.control_events.saturating_add(control_events);
        self.canary_events = self.canary_events.saturating_add(canary_events);
        self.fail.add(share, control_events, canary_events);
        if counts.saturated(pass_below) {
            self.saturated_windows = self.saturated_windows.saturating_add(1);
        } else {
            self.pass.add(share, control_events, canary_events);
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
