//! How small a fault a gate would find, with what chance and in what time.
//!
//! The gate is simulated: its statistic and its thresholds, for bad events that come at constant
//! rates. A run is looked at less and less often, each time later by a twentieth than the time
//! before, so that an hour costs hardly more than a minute, and times are told to that twentieth.
//! The same question has the same answer: the random numbers begin at the same place.
//!
//! Must not know where the rates are from.

use std::time::Duration;

use rand_distr::{Distribution, Poisson};
use rand_pcg::{Pcg64Mcg, rand_core::SeedableRng};

use super::{
    evidence::{AtOneShare, BETTER, WORSE},
    gate::{Gate, saturated},
    pool::ENOUGH,
};

/// Runs of each case: a chance of a half is told to 3.5 %, one of 90 % to 2 %.
const RUNS: usize = 200;
const SEED: u64 = 0x0ca1_7a91;
/// The length of a window where both have connections enough.
const WINDOW_SECONDS: f64 = 1.0;
/// From one look to the next.
const LATER: f64 = 1.05;

/// New connections a second that a gate has something of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    /// Of control.
    pub control: f64,
    /// Of the canary.
    pub canary: f64,
}

impl Traffic {
    /// The canary's part of both, if both have any.
    pub fn share(self) -> Option<f64> {
        let Self { control, canary } = self;
        let has_both = control > 0.0 && canary > 0.0 && (control + canary).is_finite();
        has_both.then(|| canary / (control + canary))
    }
}

/// How often a connection has a bad event of a signal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Of control's connections, a fraction.
    pub usual: f64,
    /// How many times that of the canary's.
    pub ratio: f64,
}

/// How runs have ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ends {
    /// After how many seconds they have failed, in order.
    failed: Vec<f64>,
    /// After how many they have passed.
    passed: Vec<f64>,
    /// How often each deciding signal was waited for when the time was over.
    waited: Vec<usize>,
}

impl Ends {
    /// The part that fails within so many seconds.
    pub fn failed_within(&self, seconds: f64) -> f64 {
        within(&self.failed, seconds)
    }

    /// The part that passes within so many seconds.
    pub fn passed_within(&self, seconds: f64) -> f64 {
        within(&self.passed, seconds)
    }

    /// After how many seconds `part` of all runs have failed; `None` where fewer ever do.
    pub fn part_failed(&self, part: f64) -> Option<f64> {
        after(&self.failed, part * RUNS as f64)
    }

    /// The same of passing.
    pub fn part_passed(&self, part: f64) -> Option<f64> {
        after(&self.passed, part * RUNS as f64)
    }

    /// After how many seconds half of those have failed that do within so many.
    pub fn half_of_failed(&self, within_seconds: f64) -> Option<f64> {
        let failed = self.failed.partition_point(|at| *at <= within_seconds);
        (failed > 0).then(|| self.failed.get((failed - 1) / 2).copied()).flatten()
    }

    /// The deciding signal, by its place among them, that was waited for most often in the end;
    /// `None` if none was.
    pub fn waited_for(&self) -> Option<usize> {
        let all = self.waited.iter().enumerate().filter(|(_, times)| **times > 0);
        all.max_by_key(|(_, times)| **times).map(|(at, _)| at)
    }
}

fn within(seconds: &[f64], limit: f64) -> f64 {
    seconds.partition_point(|at| *at <= limit) as f64 / RUNS as f64
}

fn after(seconds: &[f64], runs: f64) -> Option<f64> {
    seconds.get((runs.ceil() as usize).max(1) - 1).copied()
}

/// A signal that decides.
#[derive(Clone, Debug)]
struct Deciding {
    fail: AtOneShare,
    pass: AtOneShare,
    pass_below: f64,
}

/// What comes of a signal.
#[derive(Clone, Copy, Debug)]
struct Coming {
    /// Bad events a second of control, and of the canary.
    events: [f64; 2],
    /// Nothing can speak for the canary.
    saturated: bool,
}

/// A gate that can be asked what it would make of things.
#[derive(Clone, Debug)]
pub struct Sensitivity {
    traffic: Traffic,
    signals: Vec<Deciding>,
    ln_fail_at: f64,
    ln_pass_at: f64,
    min_seconds: f64,
    deadline_seconds: f64,
}

impl Sensitivity {
    /// Of `gate` with so many connections; `None` where there is nothing to compare.
    pub fn new(gate: &Gate, traffic: Traffic) -> Option<Self> {
        let share = traffic.share()?;
        let deciding = gate.signals().iter().filter(|signal| !signal.observe);
        let signals: Vec<_> = deciding
            .map(|signal| Deciding {
                fail: AtOneShare::new(signal.tolerate, WORSE, share),
                pass: AtOneShare::new(signal.pass_below, BETTER, share),
                pass_below: signal.pass_below,
            })
            .collect();
        (!signals.is_empty()).then(|| Self {
            traffic,
            signals,
            ln_fail_at: gate.ln_fail_at(),
            ln_pass_at: gate.ln_pass_at(),
            min_seconds: gate.min_duration().as_secs_f64(),
            deadline_seconds: gate.deadline().as_secs_f64(),
        })
    }

    /// How it ends if the deciding signals have these rates, in their order, and it had as long
    /// as `until`, whatever its deadline.
    pub fn ends(&self, rates: &[Rate], until: Duration) -> Ends {
        let looks = self.looks(until.as_secs_f64());
        let coming: Vec<Coming> =
            rates.iter().zip(&self.signals).map(|(rate, one)| self.coming(*rate, one)).collect();
        let mut random = Pcg64Mcg::seed_from_u64(SEED);
        let mut ends = Ends { waited: vec![0; self.signals.len()], ..Ends::default() };
        let mut counts = Vec::new();
        for _ in 0..RUNS {
            self.run(&coming, &looks, &mut counts, &mut random, &mut ends);
        }
        ends.failed.sort_by(f64::total_cmp);
        ends.passed.sort_by(f64::total_cmp);
        ends
    }

    fn coming(&self, rate: Rate, signal: &Deciding) -> Coming {
        let Traffic { control, canary } = self.traffic;
        let events = [control * rate.usual, canary * (rate.usual * rate.ratio).min(1.0)];
        Coming { events, saturated: saturated(rate.usual, 1.0, signal.pass_below) }
    }

    fn looks(&self, until: f64) -> Vec<f64> {
        let Traffic { control, canary } = self.traffic;
        let window = (ENOUGH as f64 / control.min(canary)).max(WINDOW_SECONDS);
        let mut looks = vec![self.min_seconds, self.deadline_seconds.min(until), until];
        let mut at = window;
        while at < until {
            looks.push(at);
            at = (at * LATER).round().max(at + window);
        }
        looks.retain(|at| *at > 0.0 && *at <= until);
        looks.sort_by(f64::total_cmp);
        looks.dedup();
        looks
    }

    fn run(
        &self,
        coming: &[Coming],
        looks: &[f64],
        counts: &mut Vec<[u64; 2]>,
        random: &mut Pcg64Mcg,
        ends: &mut Ends,
    ) {
        counts.clear();
        counts.resize(coming.len(), [0, 0]);
        let mut before = 0.0;
        for seconds in looks {
            let passed = seconds - before;
            before = *seconds;
            let (mut fails, mut waits) = (false, *seconds < self.min_seconds);
            for ((counts, coming), signal) in counts.iter_mut().zip(coming).zip(&self.signals) {
                for (count, rate) in counts.iter_mut().zip(coming.events) {
                    *count = count.saturating_add(poisson(rate * passed, random));
                }
                let [control, canary] = *counts;
                fails = fails || signal.fail.reaches(self.ln_fail_at, control, canary);
                waits = waits || self.waits_for(signal, *coming, [control, canary]);
            }
            if fails {
                return ends.failed.push(*seconds);
            }
            if !waits {
                return ends.passed.push(*seconds);
            }
        }
        for (((waited, counts), coming), signal) in
            ends.waited.iter_mut().zip(counts.iter()).zip(coming).zip(&self.signals)
        {
            *waited += usize::from(self.waits_for(signal, *coming, *counts));
        }
    }

    fn waits_for(&self, signal: &Deciding, coming: Coming, [control, canary]: [u64; 2]) -> bool {
        coming.saturated || !signal.pass.reaches(self.ln_pass_at, control, canary)
    }
}

/// A number of events; none where the mean is not one that can be had.
fn poisson(mean: f64, random: &mut Pcg64Mcg) -> u64 {
    Poisson::new(mean).map_or(0, |poisson| poisson.sample(random) as u64)
}
