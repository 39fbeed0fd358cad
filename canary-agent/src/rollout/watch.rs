//! What a step with a gate has seen: counts of windows, and answers of those who were asked.
//!
//! Owns the one verdict that follows from both. Counts are weighed by the gate's sequential
//! test; an answer is good, bad or none, and so many bad ones in a row fail. No answer is not a
//! bad one: whoever is asked may be down while the canary is well.
//!
//! Must not know who is asked, nor how.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    gate::{Changed, Counts, Gate, Progress, SignalProgress, Verdict, Window},
    pool::Pool,
};
use crate::config::model::{self, Probe, Signal, SignalKind};

/// What was counted of two versions in a window: where counts enter a rollout.
///
/// Whoever counts hands one of these, for each service with a rollout, to the loop as
/// [`Event::Counted`](crate::daemon::Event::Counted). All that is said of how sure they are is
/// `complete`.
#[derive(Clone, Debug, PartialEq)]
pub struct Counted {
    /// The service.
    pub service: String,
    /// The version that is watched.
    pub canary: String,
    /// How long the window was.
    pub watched: Duration,
    /// Whether every event was counted.
    pub complete: bool,
    /// What a handshake had to take to be slow, nanoseconds; `u64::MAX` where nobody has said it.
    pub slow_ns: u64,
    /// Connections that were watched, of control and of the canary: the share is theirs.
    pub connections: [u64; 2],
    /// Bad events by signal, of control and of the canary.
    pub events: Vec<(SignalKind, [u64; 2])>,
}

impl Counted {
    /// The canary's part of the connections that were watched of both, as a fraction.
    pub fn share(&self) -> f64 {
        let [control, canary] = self.connections;
        let all = control.saturating_add(canary);
        if all == 0 { 0.0 } else { canary as f64 / all as f64 }
    }
}

/// An answer of somebody who was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// All is well.
    Good(String),
    /// The canary is bad.
    Bad(String),
    /// There is no answer: nothing is known of the canary.
    None(String),
}

impl Answer {
    /// What was said.
    pub fn text(&self) -> &str {
        match self {
            Self::Good(text) | Self::Bad(text) | Self::None(text) => text,
        }
    }

    /// A word for it.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Good(_) => "good",
            Self::Bad(_) => "bad",
            Self::None(_) => "no answer",
        }
    }
}

/// What has been heard of one who is asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heard {
    /// Who, as [`model::ProbeAsk::text`] says.
    pub asked: String,
    /// Good answers.
    pub good: u64,
    /// Bad answers.
    pub bad: u64,
    /// Times without an answer.
    pub unanswered: u64,
    /// Good answers in a row; bad ones are below 0.
    pub row: i64,
    /// So many bad ones came in a row that it has failed.
    pub failed: bool,
    /// The last answer.
    pub last: Option<Answer>,
    /// When, in milliseconds since 1970.
    pub last_unix_ms: u64,
}

/// All that is to be kept of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Milliseconds since it began, without those in which nobody watched.
    pub elapsed_ms: u64,
    /// Of what is counted.
    pub counted: Progress,
    /// The window that is not over yet.
    #[serde(default, skip_serializing_if = "Pool::is_empty")]
    pub pool: Pool,
    /// Of those who are asked, in the order of the configuration.
    pub heard: Vec<Heard>,
    /// The verdict, once there is one.
    pub verdict: Option<Verdict>,
    /// What it goes by, in words.
    pub because: Option<String>,
}

/// A gate that is being watched.
#[derive(Clone, Debug, PartialEq)]
pub struct Watch {
    config: Arc<model::Gate>,
    gate: Gate,
    kept: Kept,
}

impl Watch {
    /// One that has seen nothing yet.
    pub fn new(config: &Arc<model::Gate>) -> Self {
        let gate = Gate::new(config);
        let kept = Kept {
            elapsed_ms: 0,
            counted: gate.progress().clone(),
            pool: Pool::default(),
            heard: probes(config)
                .map(|probe| Heard { asked: probe.ask.text(), ..Heard::default() })
                .collect(),
            verdict: None,
            because: None,
        };
        Self { config: Arc::clone(config), gate, kept }
    }

    /// One with what was kept of it.
    ///
    /// # Errors
    /// The gate asks something else than it did.
    pub fn resume(config: &Arc<model::Gate>, kept: Kept) -> Result<Self, Changed> {
        let asked = probes(config).map(|probe| probe.ask.text());
        if !asked.eq(kept.heard.iter().map(|heard| heard.asked.clone())) {
            return Err(Changed);
        }
        let gate = Gate::resume(config, kept.counted.clone())?;
        Ok(Self { config: Arc::clone(config), gate, kept })
    }

    /// What has been seen.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// What counts are weighed by.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// What it asks.
    pub fn config(&self) -> &model::Gate {
        &self.config
    }

    /// Those who are asked, in their order.
    pub fn probes(&self) -> impl Iterator<Item = &Probe> {
        probes(&self.config)
    }

    /// The verdict, if there is one.
    pub fn verdict(&self) -> Option<Verdict> {
        self.kept.verdict
    }

    /// Time has passed in which it was watched.
    pub fn pass_time(&mut self, passed_ms: u64) -> Option<Verdict> {
        self.kept.elapsed_ms = self.kept.elapsed_ms.saturating_add(passed_ms);
        self.judge()
    }

    /// Puts windows together: what is to be [counted](Self::count) now, if anything is.
    pub fn gather(&mut self, counted: &Counted) -> Option<Counted> {
        self.kept.pool.add(counted)
    }

    /// Takes a window's counts into account.
    pub fn count(&mut self, counted: &Counted) -> Option<Verdict> {
        let Counted { watched, complete, connections, events, .. } = counted;
        let share = counted.share();
        let counts: Vec<(SignalKind, Counts)> = events
            .iter()
            .map(|(kind, [control, canary])| {
                let counts = Counts {
                    share,
                    control_events: *control,
                    canary_events: *canary,
                    control_connections: Some(connections[0]),
                };
                (*kind, counts)
            })
            .collect();
        self.gate.watch(&Window {
            elapsed: Duration::from_millis(self.kept.elapsed_ms),
            watched: *watched,
            complete: *complete,
            counts: &counts,
        });
        self.kept.counted = self.gate.progress().clone();
        self.judge()
    }

    /// Takes an answer into account.
    pub fn hear(&mut self, probe: usize, answer: Answer, unix_ms: u64) -> Option<Verdict> {
        let Some(config) = probes(&self.config).nth(probe) else { return self.verdict() };
        let fall = i64::from(config.fall);
        let Some(heard) = self.kept.heard.get_mut(probe) else { return self.verdict() };
        match &answer {
            Answer::Good(_) => {
                heard.good = heard.good.saturating_add(1);
                heard.row = heard.row.max(0).saturating_add(1);
            }
            Answer::Bad(_) => {
                heard.bad = heard.bad.saturating_add(1);
                heard.row = heard.row.min(0).saturating_sub(1);
            }
            Answer::None(_) => heard.unanswered = heard.unanswered.saturating_add(1),
        }
        heard.failed |= heard.row <= -fall;
        (heard.last, heard.last_unix_ms) = (Some(answer), unix_ms);
        self.judge()
    }

    fn judge(&mut self) -> Option<Verdict> {
        if self.kept.verdict.is_some() {
            return self.kept.verdict;
        }
        let deciding: Vec<(&Probe, &Heard)> = probes(&self.config)
            .zip(&self.kept.heard)
            .filter(|(probe, _)| !probe.observe)
            .collect();
        let counts = self.gate.deciding() > 0;
        let counted = self.gate.verdict().filter(|_| counts);
        let failed = deciding.iter().find(|(_, heard)| heard.failed);
        let late = self.kept.elapsed_ms >= millis(self.gate.deadline());
        let early = self.kept.elapsed_ms < millis(self.gate.min_duration());
        let waits = deciding.iter().find(|(probe, heard)| heard.row < i64::from(probe.rise));
        let (verdict, because) = match (counted, failed) {
            (Some(Verdict::Fail), _) => (Verdict::Fail, self.counted_because()),
            (_, Some((probe, heard))) => (
                Verdict::Fail,
                format!(
                    "{} `{}`: {} bad answers in a row, the last: {}",
                    probe.ask.kind(),
                    heard.asked,
                    probe.fall,
                    heard.last.as_ref().map_or("", Answer::text)
                ),
            ),
            (None | Some(Verdict::Pass), None)
                if waits.is_none() && !early && (counted.is_some() || !counts) =>
            {
                (Verdict::Pass, "everything that it goes by is good".to_owned())
            }
            _ if late => {
                let silent = deciding.iter().all(|(_, heard)| heard.good + heard.bad == 0);
                let nothing = (counts || !deciding.is_empty())
                    && (!counts || counted == Some(Verdict::NoData) || self.hears_nothing())
                    && silent;
                let verdict = if nothing { Verdict::NoData } else { Verdict::Inconclusive };
                let because = match waits {
                    Some((probe, heard)) => format!(
                        "{} `{}` had not answered well {} times in a row by the deadline{}",
                        probe.ask.kind(),
                        heard.asked,
                        probe.rise,
                        heard.last.as_ref().map_or_else(String::new, |last| {
                            format!("; the last answer: {}", last.text())
                        })
                    ),
                    None => self.counted_because(),
                };
                (verdict, because)
            }
            _ => return None,
        };
        self.kept.verdict = Some(verdict);
        self.kept.because = Some(because);
        self.kept.verdict
    }

    /// Nothing has happened of what it waits for, in the window that is not over either.
    fn hears_nothing(&self) -> bool {
        let pool = &self.kept.pool;
        self.gate.hears_nothing() && !self.gate.waiting().any(|one| pool.has_events(one.signal.0))
    }

    /// What a signal has failed by, or which ones have not let it pass.
    fn counted_because(&self) -> String {
        let progress = self.gate.progress();
        let seen = |seen: &SignalProgress| {
            let SignalProgress { signal, canary_events, control_events, .. } = seen;
            format!(
                "{}: {canary_events} on the canary, {control_events} on control",
                signal.0.name()
            )
        };
        let decision = progress.decision.filter(|decision| decision.verdict == Verdict::Fail);
        let failed = decision.and_then(|decision| decision.signal);
        let failed = progress.signals.iter().find(|one| Some(one.signal) == failed);
        if let Some(failed) = failed {
            return format!(
                "{}; evidence {:.1} of {:.1} that it is worse",
                seen(failed),
                failed.fail.ln(),
                self.gate.ln_fail_at()
            );
        }
        let pass_at = self.gate.ln_pass_at();
        let short = |one: &SignalProgress| {
            let saturated = match one.saturated_windows {
                0 => String::new(),
                windows => format!(
                    "; in {windows} of {} windows too much of control was bad to tell",
                    progress.windows
                ),
            };
            format!(
                "{}; evidence {:.1} of {pass_at:.1} that it is good{saturated}",
                seen(one),
                one.pass.ln()
            )
        };
        let waiting: Vec<String> = self.gate.waiting().map(short).collect();
        match waiting.is_empty() {
            true => "it was not watched for its `min_duration`".to_owned(),
            false => waiting.join("; "),
        }
    }
}

fn probes(config: &model::Gate) -> impl Iterator<Item = &Probe> {
    config.signals.iter().filter_map(|signal| match signal {
        Signal::Probe(probe) => Some(probe),
        Signal::Kernel(_) => None,
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
