//! What the gates of a rollout would find at a rate of connections, before it begins.
//!
//! Owns which questions are asked of [`sensitivity`](super::sensitivity), and what an operator
//! should be warned of. Must not know where the rates are from, nor who asks.

use std::{collections::HashMap, sync::Arc, time::Duration};

use canary_ebpf_common::share::Share;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    gate::Gate,
    sensitivity::{Ends, Rate, Sensitivity, Traffic},
};
use crate::{
    config::model::{self, Probe, Rollout, Signal, SignalKind},
    signals::choose::halvings,
};

/// A fault counts as found, and a canary as let pass, if that happens with this chance.
const POWER: f64 = 0.9;
/// Faults that are tried, in multiples of what is usual.
const FAULTS: [f64; 10] = [1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0];
/// A longer deadline is looked for up to so many times the present one.
const LONGER: u32 = 100;
/// What is reckoned with where nobody knows what is usual.
const ASSUMED_RATE: f64 = 0.001;

/// What is known beforehand.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// The rollout.
    pub rollout: Arc<Rollout>,
    /// New connections of its service a second.
    pub per_second: f64,
    /// The same of audiences that steps name.
    pub audiences: HashMap<String, f64>,
    /// The parts of them that are neither control's nor the canary's, by version.
    pub others: Vec<f64>,
    /// How many of them may be watched for what they do; `None` for all.
    pub watched_at_most: Option<f64>,
    /// How often each signal is usual, as far as that is known.
    pub usual: HashMap<SignalKind, Usual>,
}

/// How often connections have a bad event that are as they should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usual {
    /// The part of the connections.
    pub rate: f64,
    /// From where that is known.
    pub source: Source,
}

/// From where something is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Who asks has said it.
    Asked,
    /// The agent has counted it.
    Counted,
    /// It is so by definition: `over = "control:p95"` is 5 % of control's.
    Defined,
    /// Nobody knows: a guess.
    Assumed,
}

/// `GET /v1/rollouts/{name}/plan`, `plan --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Outlook {
    /// The rollout.
    pub rollout: String,
    /// The service.
    pub service: String,
    /// The version whose share it moves.
    pub to: String,
    /// New connections a second of the service.
    pub connections_per_second: f64,
    /// From where that is known: `counted` over the last ten seconds, or `asked`.
    pub rate_source: Source,
    /// What happens with at least this chance is what can be relied on, a fraction of 1.
    pub power: f64,
    /// The steps that have a gate.
    pub steps: Vec<StepOutlook>,
    /// What should be another way, in sentences.
    pub warnings: Vec<String>,
}

/// A step with a gate, of an [`Outlook`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StepOutlook {
    /// The step, from 1.
    pub step: u32,
    /// The audience that it is about; absent for everyone.
    #[serde(default)]
    pub audience: Option<String>,
    /// The canary's share then, as written.
    pub share: String,
    /// The gate.
    pub gate: String,
    /// Before that it does not pass.
    pub min_duration_seconds: f64,
    /// Then it decides no more.
    pub deadline_seconds: f64,
    /// New connections of the canary a second.
    pub canary_per_second: f64,
    /// New connections of control a second.
    pub control_per_second: f64,
    /// How many of the canary's are watched for what they do.
    pub canary_watched_per_second: f64,
    /// How many of control's.
    pub control_watched_per_second: f64,
    /// The chance that it lets a canary pass by the deadline that is as good as control; absent if nothing
    /// is counted, or there is nothing to compare.
    pub passes: Option<f64>,
    /// The chance that it fails such a canary.
    pub false_fail: Option<f64>,
    /// After so many seconds half of such canaries have passed, by the deadline or not.
    pub passes_half_after_seconds: Option<f64>,
    /// After so many, a part of `power` of them.
    pub passes_after_seconds: Option<f64>,
    /// What is counted and decides.
    pub signals: Vec<SignalOutlook>,
    /// Who is asked.
    pub probes: Vec<ProbeOutlook>,
}

/// A counted signal of a [`StepOutlook`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SignalOutlook {
    /// Its name.
    pub name: String,
    /// The part of control's connections with a bad event.
    pub usual_rate: f64,
    /// From where that is known.
    pub usual_source: Source,
    /// The smallest of `faults` that is found with a chance of `power`.
    pub smallest_fault: Option<f64>,
    /// What becomes of some faults, the others' signals being as usual.
    pub faults: Vec<FaultOutlook>,
}

/// What becomes of a fault, of a [`SignalOutlook`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FaultOutlook {
    /// How many times the usual rate the canary has.
    pub ratio: f64,
    /// The part of the canary's connections with a bad event.
    pub rate: f64,
    /// The chance that the gate fails by the deadline.
    pub found: f64,
    /// The chance that it passes.
    pub passed: f64,
    /// After so many seconds half of those are found that are.
    pub after_seconds: Option<f64>,
    /// New connections of the canary in that time.
    pub canary_connections: Option<f64>,
}

/// One who is asked, of a [`StepOutlook`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProbeOutlook {
    /// `prometheus`, `command` or `webhook`.
    pub kind: String,
    /// Who, and what is asked.
    pub asked: String,
    /// Whether it is only shown.
    pub observe: bool,
    /// So many seconds of nothing but good answers let it pass, if each comes at once.
    pub passes_after_seconds: f64,
    /// So many of nothing but bad ones fail it.
    pub fails_after_seconds: f64,
}

/// What is to be expected of a rollout's gates. `goes_on` is asked now and then: `None` once it
/// says no.
pub fn outlook(known: &Known, rate_source: Source, goes_on: impl Fn() -> bool) -> Option<Outlook> {
    reckon(known, rate_source, &FAULTS, goes_on)
}

/// Only its warnings, which are there sooner.
pub fn warnings(known: &Known, goes_on: impl Fn() -> bool) -> Option<Vec<String>> {
    reckon(known, Source::Counted, &[], goes_on).map(|outlook| outlook.warnings)
}

/// The largest fault there can be is always among those that are tried.
fn reckon(
    known: &Known,
    rate_source: Source,
    faults: &[f64],
    goes_on: impl Fn() -> bool,
) -> Option<Outlook> {
    let Known { rollout, per_second, others, .. } = known;
    let mut outlook = Outlook {
        rollout: rollout.name.clone(),
        service: rollout.service.clone(),
        to: rollout.to.clone(),
        connections_per_second: *per_second,
        rate_source,
        power: POWER,
        steps: Vec::new(),
        warnings: Vec::new(),
    };
    // The same gate at the same share has the same to say.
    let mut said: HashMap<(String, Option<String>, String), StepOutlook> = HashMap::new();
    for (at, (number, step)) in (1_u32..).zip(&rollout.steps).enumerate() {
        let Some(gate) = &step.gate else { continue };
        let audience = rollout.audience(at).map(str::to_owned);
        let everyone = rollout.for_everyone(at);
        let own = audience.as_ref().and_then(|name| rollout.for_audiences(at).remove(name));
        let share = own.max(everyone);
        let text = share.map_or_else(|| "0%".to_owned(), |share| share.to_string());
        let key = (gate.name.clone(), audience.clone(), text.clone());
        let before = said.get(&key).cloned();
        let of_step = match before {
            Some(before) => StepOutlook { step: number, ..before },
            None => {
                let of = |share: Option<Share>| {
                    let canary = share.map_or(0.0, |share| share.fraction());
                    let control = (1.0 - canary - others.iter().sum::<f64>()).max(0.0);
                    // What rounding leaves of a whole is no share.
                    (canary, if control < 1e-9 { 0.0 } else { control })
                };
                let (canary, control) = of(share);
                let its = audience
                    .as_ref()
                    .map_or(*per_second, |name| known.audiences.get(name).copied().unwrap_or(0.0));
                let mut traffic = Traffic { control: its * control, canary: its * canary };
                let mut watched = watched(known, its, control, canary);
                if audience.is_some() && control == 0.0 {
                    // Compared with those who are in no audience.
                    let (canary, control) = of(everyone);
                    traffic.control = per_second * control;
                    watched.control = self::watched(known, *per_second, control, canary).control;
                }
                let mut one =
                    Step { known, config: gate, traffic, watched, faults, goes_on: &goes_on };
                let mut found = one.outlook(number, text)?;
                found.audience = audience;
                outlook.warnings.extend(one.warnings(&found));
                said.insert(key, found.clone());
                found
            }
        };
        outlook.steps.push(of_step);
    }
    if outlook.steps.is_empty() {
        outlook.warnings.push(
            "no step has a gate: nothing but an operator would stop a bad release".to_owned(),
        );
    }
    Some(outlook)
}

/// The connections that a gate gets something of: those that there is room to watch, if
/// there is no room for all.
fn watched(known: &Known, per_second: f64, control: f64, canary: f64) -> Traffic {
    let Known { others, watched_at_most, .. } = known;
    let all = Traffic { control: per_second * control, canary: per_second * canary };
    let Some(budget) = watched_at_most else { return all };
    let shares: Vec<f64> = [control, canary].into_iter().chain(others.iter().copied()).collect();
    let chosen = halvings(&shares, per_second, *budget, &vec![None; shares.len()]);
    let part = |at: usize| {
        let halvings = chosen.get(at).copied().flatten().unwrap_or(0);
        0.5_f64.powi(i32::try_from(halvings).unwrap_or(i32::MAX))
    };
    Traffic { control: all.control * part(0), canary: all.canary * part(1) }
}

/// A gate at a share.
struct Step<'k, F> {
    known: &'k Known,
    config: &'k model::Gate,
    traffic: Traffic,
    watched: Traffic,
    faults: &'k [f64],
    goes_on: &'k F,
}

impl<F: Fn() -> bool> Step<'_, F> {
    fn outlook(&mut self, step: u32, share: String) -> Option<StepOutlook> {
        let gate = Gate::new(self.config);
        let deadline = self.config.deadline.as_secs_f64();
        let mut outlook = StepOutlook {
            step,
            audience: None,
            share,
            gate: self.config.name.clone(),
            min_duration_seconds: self.config.min_duration.as_secs_f64(),
            deadline_seconds: deadline,
            canary_per_second: self.traffic.canary,
            control_per_second: self.traffic.control,
            canary_watched_per_second: self.watched.canary,
            control_watched_per_second: self.watched.control,
            passes: None,
            false_fail: None,
            passes_half_after_seconds: None,
            passes_after_seconds: None,
            signals: Vec::new(),
            probes: probes(self.config).map(probe).collect(),
        };
        let usual: Vec<(SignalKind, Usual)> = gate
            .signals()
            .iter()
            .filter(|signal| !signal.observe)
            .map(|signal| (signal.kind, self.usual(signal)))
            .collect();
        let sensitivity = Sensitivity::new(&gate, self.watched);
        let healthy: Vec<Rate> =
            usual.iter().map(|(_, usual)| Rate { usual: usual.rate, ratio: 1.0 }).collect();
        if let Some(sensitivity) = &sensitivity {
            let until = self.config.deadline.saturating_mul(LONGER);
            let ends = sensitivity.ends(&healthy, until);
            outlook.passes = Some(ends.passed_within(deadline));
            outlook.false_fail = Some(ends.failed_within(deadline));
            outlook.passes_half_after_seconds = ends.part_passed(0.5);
            outlook.passes_after_seconds = ends.part_passed(POWER);
        }
        for (at, (kind, usual)) in usual.iter().enumerate() {
            let mut signal = SignalOutlook {
                name: kind.name().to_owned(),
                usual_rate: usual.rate,
                usual_source: usual.source,
                smallest_fault: None,
                faults: Vec::new(),
            };
            for ratio in self.faults(usual.rate) {
                if !(self.goes_on)() {
                    return None;
                }
                let Some(sensitivity) = &sensitivity else { break };
                let mut rates = healthy.clone();
                rates[at].ratio = ratio;
                let ends = sensitivity.ends(&rates, self.config.deadline);
                signal.faults.push(self.fault(&ends, Rate { usual: usual.rate, ratio }));
            }
            // A larger one is found as well.
            let small = signal.faults.iter().rev().take_while(|fault| fault.found >= POWER).last();
            signal.smallest_fault = small.map(|fault| fault.ratio);
            outlook.signals.push(signal);
        }
        Some(outlook)
    }

    fn faults(&self, usual: f64) -> Vec<f64> {
        // More than all can't be bad.
        let fits = |ratio: &f64| ratio * usual <= 1.0;
        let largest = FAULTS.into_iter().rfind(fits);
        let smaller = self.faults.iter().copied().filter(|ratio| Some(*ratio) < largest);
        smaller.chain(largest).collect()
    }

    fn usual(&self, signal: &model::KernelSignal) -> Usual {
        let defined = signal.quantile_permille.map(|permille| Usual {
            rate: 1.0 - f64::from(permille) / 1000.0,
            source: Source::Defined,
        });
        let known = self.known.usual.get(&signal.kind).copied();
        let asked = known.filter(|usual| usual.source == Source::Asked);
        let assumed = Usual { rate: ASSUMED_RATE, source: Source::Assumed };
        asked.or(defined).or(known).unwrap_or(assumed)
    }

    fn fault(&self, ends: &Ends, Rate { usual, ratio }: Rate) -> FaultOutlook {
        let deadline = self.config.deadline.as_secs_f64();
        let after = ends.half_of_failed(deadline);
        FaultOutlook {
            ratio,
            rate: usual * ratio,
            found: ends.failed_within(deadline),
            passed: ends.passed_within(deadline),
            after_seconds: after,
            canary_connections: after.map(|seconds| (seconds * self.traffic.canary).round()),
        }
    }

    /// What an operator should know before he begins.
    fn warnings(&self, outlook: &StepOutlook) -> Vec<String> {
        let StepOutlook { step, share, gate, passes, signals, .. } = outlook;
        let place = format!("step {step}: gate `{gate}`");
        let deadline = time(self.config.deadline.as_secs_f64());
        let mut warnings = Vec::new();
        let counts = !signals.is_empty();
        if counts && passes.is_none() {
            let who = if self.traffic.canary > 0.0 { "control" } else { &*self.known.rollout.to };
            warnings.push(format!(
                "{place} has nothing to compare at {share}: `{who}` gets no connections then, and it can't decide"
            ));
        }
        if let Some(passes) = passes.filter(|passes| *passes < POWER) {
            let later = match outlook.passes_after_seconds {
                Some(seconds) => format!(
                    "a `deadline` of {} would do for {:.0} % of them",
                    time(seconds),
                    POWER * 100.0
                ),
                None => format!("nor would it in {LONGER} times that"),
            };
            warnings.push(format!(
                "{place} lets a canary that is as good as control pass by its deadline of {deadline} in {:.0} % of \
                 cases only, and can't decide in the others; {later}, or a larger share, or a larger `pass_below`",
                passes * 100.0
            ));
        }
        for signal in signals.iter().filter(|_| passes.is_some()) {
            let SignalOutlook { name, faults, smallest_fault, .. } = signal;
            if smallest_fault.is_none() {
                let found = faults.last().map_or(0.0, |fault| fault.found);
                let largest = faults.last().map_or(1.0, |fault| fault.ratio);
                warnings.push(format!(
                    "{place} finds nothing by `{name}` that can be relied on: \
                     a fault of ×{largest} is found by its deadline of {deadline} in {:.0} % of cases",
                    found * 100.0
                ));
            }
        }
        warnings.extend(undecided(self.config).into_iter().map(|why| format!("{place} {why}")));
        warnings
    }
}

/// Why those who are asked can't decide about a gate in time, however they answer.
pub fn undecided(gate: &model::Gate) -> Vec<String> {
    let deadline = gate.deadline.as_secs_f64();
    let mut why = Vec::new();
    for one in probes(gate).filter(|probe| !probe.observe) {
        let ProbeOutlook { kind, passes_after_seconds, fails_after_seconds, .. } = probe(one);
        let every = humantime::format_duration(one.interval);
        let mut late = |word: &str, does: &str, answers: u32, seconds: f64| {
            if seconds >= deadline {
                why.push(format!(
                    "can't {does} by its deadline of {}: `{word}` = {answers} answers of the {kind}, one every {every}, take {}",
                    time(deadline),
                    time(seconds)
                ));
            }
        };
        late("rise", "pass", one.rise, passes_after_seconds);
        late("fall", "fail", one.fall, fails_after_seconds);
    }
    why
}

fn probes(gate: &model::Gate) -> impl Iterator<Item = &Probe> {
    gate.signals.iter().filter_map(|signal| match signal {
        Signal::Probe(probe) => Some(probe),
        Signal::Kernel(_) => None,
    })
}

fn probe(probe: &Probe) -> ProbeOutlook {
    let Probe { ask, interval, rise, fall, observe, timeout: _, retries: _ } = probe;
    // The first is asked at once.
    let after = |answers: u32| interval.as_secs_f64() * f64::from(answers.saturating_sub(1));
    ProbeOutlook {
        kind: ask.kind().to_owned(),
        asked: ask.text(),
        observe: *observe,
        passes_after_seconds: after(*rise),
        fails_after_seconds: after(*fall),
    }
}

/// Seconds as people say them, to two parts.
fn time(seconds: f64) -> String {
    let seconds = Duration::from_secs_f64(seconds.clamp(0.0, 1e12)).as_secs();
    let rounded = match seconds {
        0..120 => seconds,
        120..7_200 => seconds.div_ceil(60) * 60,
        7_200..172_800 => seconds.div_ceil(3_600) * 3_600,
        _ => seconds.div_ceil(86_400) * 86_400,
    };
    humantime::format_duration(Duration::from_secs(rounded)).to_string()
}
