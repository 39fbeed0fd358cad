//! Evidence that a canary does something more often, or less, than control: a sequential
//! test on counts that may be looked at any number of times.
//!
//! Of the bad events of a window, each is the canary's with probability
//! θ(r) = ρr ÷ (ρr + 1 − ρ), where ρ is the canary's share and r the ratio of its rate to
//! control's. How often bad events come at all, and how that changes over the day, cancels
//! out. The statistic is the likelihood ratio of a few ratios against r₀, mixed in equal
//! parts:
//!
//! E = Σₖ wₖ Πₜ (θₜ(rₖ) ÷ θₜ(r₀))^xₜ · ((1 − θₜ(rₖ)) ÷ (1 − θₜ(r₀)))^yₜ
//!
//! with x bad events on the canary and y on control. As long as r is r₀ or on its far side
//! from the rₖ, E is a non-negative supermartingale that begins at 1, and it ever reaches
//! 1 ÷ α with probability at most α (Ville, *Étude critique de la notion de collectif*, 1939).
//! The test is that of Lindon and Malek, *Anytime-valid inference for multinomial count data*
//! (NeurIPS 2022), section 4, with a finite mixture of one-sided alternatives.

use serde::{Deserialize, Serialize};

/// Alternatives in a mixture.
pub const ALTERNATIVES: usize = 5;

/// What a canary is suspected of, in multiples of what is tolerated.
pub const WORSE: [f64; ALTERNATIVES] = [1.5, 2.0, 3.0, 5.0, 10.0];
/// What a canary is hoped for, in multiples of what would be too much.
pub const BETTER: [f64; ALTERNATIVES] = [2.0 / 3.0, 1.0 / 2.0, 1.0 / 3.0, 1.0 / 5.0, 1.0 / 10.0];

/// A statistic, as a sum over the windows so far.
///
/// What is kept has the same size after any number of windows. Events are kept as whole
/// numbers, and what depends on the share in compensated sums, so that nothing is lost in a
/// billion windows. It is written and read back to the same bits.
///
/// ```
/// use canary_agent::rollout::evidence::{Evidence, WORSE};
/// let mut evidence = Evidence::new(1.2, WORSE);
/// assert_eq!(evidence.ln(), 0.0);
/// evidence.add(0.05, 20, 10);
/// assert!(evidence.ln() > 100_f64.ln());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// r₀.
    null_ratio: f64,
    /// The rₖ.
    alternative_ratios: [f64; ALTERNATIVES],
    /// The canary's events in windows in which it had at most half of the traffic.
    canary_events: u64,
    /// Control's events in the others.
    control_events: u64,
    /// For each alternative, what all events together say, whosever they were.
    together: [Sum; ALTERNATIVES],
}

impl Evidence {
    /// No evidence yet that the ratio is `multiples` of `null_ratio` rather than that.
    ///
    /// Both are positive; the multiples are all above 1 (it may be larger), or all below.
    pub fn new(null_ratio: f64, multiples: [f64; ALTERNATIVES]) -> Self {
        Self {
            null_ratio,
            alternative_ratios: multiples.map(|multiple| null_ratio * multiple),
            canary_events: 0,
            control_events: 0,
            together: [Sum::default(); ALTERNATIVES],
        }
    }

    /// Whether it weighs the same question as `other`.
    pub fn asks_as(&self, other: &Self) -> bool {
        self.null_ratio == other.null_ratio && self.alternative_ratios == other.alternative_ratios
    }

    /// Takes the bad events of a window into account.
    ///
    /// `share` is the canary's part of the traffic of both, as a fraction. Where one of them
    /// has none there is nothing to compare, and nothing is learned.
    pub fn add(&mut self, share: f64, control: u64, canary: u64) {
        let has_both = share > 0.0 && share < 1.0;
        let events = u128::from(control) + u128::from(canary);
        if !has_both || events == 0 {
            return;
        }
        // The same sum from either side; the smaller share is the one that loses no digits:
        // where nearly all events are the canary's, its own say next to nothing.
        let mirrored = share > 0.5;
        let (share, null) = match mirrored {
            true => (1.0 - share, 1.0 / self.null_ratio),
            false => (share, self.null_ratio),
        };
        let own = match mirrored {
            true => (&mut self.control_events, control),
            false => (&mut self.canary_events, canary),
        };
        *own.0 = own.0.saturating_add(own.1);
        for (sum, ratio) in self.together.iter_mut().zip(self.alternative_ratios) {
            let alternative = if mirrored { 1.0 / ratio } else { ratio };
            let excess = share * (alternative - null) / (1.0 + share * (null - 1.0));
            sum.add(-(events as f64) * excess.ln_1p());
        }
    }

    /// The statistic's natural logarithm.
    pub fn ln(&self) -> f64 {
        let surplus = i128::from(self.canary_events) - i128::from(self.control_events);
        let mut terms = [0.0; ALTERNATIVES];
        for (term, (ratio, sum)) in
            terms.iter_mut().zip(self.alternative_ratios.iter().zip(&self.together))
        {
            *term = surplus as f64 * (ratio / self.null_ratio).ln() + sum.value();
        }
        ln_mean(terms)
    }
}

/// The statistic of counts that have all come at one share, without the windows: what
/// [`Evidence`] says of them, for whoever asks of very many.
///
/// ```
/// use canary_agent::rollout::evidence::{AtOneShare, Evidence, WORSE};
/// let mut evidence = Evidence::new(1.2, WORSE);
/// evidence.add(0.05, 12, 3);
/// evidence.add(0.05, 8, 17);
/// let at_once = AtOneShare::new(1.2, WORSE, 0.05);
/// assert!((at_once.ln(20, 20) - evidence.ln()).abs() < 1e-9);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AtOneShare {
    /// What an event says for each alternative, whosever it is.
    together: [f64; ALTERNATIVES],
    /// What it says besides if it is the canary's.
    canary: [f64; ALTERNATIVES],
}

impl AtOneShare {
    /// As [`Evidence::new`], for the canary's part `share` of the traffic, which is above 0 and
    /// below 1.
    pub fn new(null_ratio: f64, multiples: [f64; ALTERNATIVES], share: f64) -> Self {
        let excess = multiples.map(|multiple| {
            share * null_ratio * (multiple - 1.0) / (1.0 + share * (null_ratio - 1.0))
        });
        Self { together: excess.map(|excess| -excess.ln_1p()), canary: multiples.map(f64::ln) }
    }

    /// The statistic's natural logarithm.
    pub fn ln(&self, control_events: u64, canary_events: u64) -> f64 {
        ln_mean(self.terms(control_events, canary_events))
    }

    /// Whether that is `ln` or more. Mostly without a logarithm: the mean is at most the largest,
    /// and at least its part of that.
    pub fn reaches(&self, ln: f64, control_events: u64, canary_events: u64) -> bool {
        let terms = self.terms(control_events, canary_events);
        let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        largest >= ln && (largest - (ALTERNATIVES as f64).ln() >= ln || ln_mean(terms) >= ln)
    }

    fn terms(&self, control_events: u64, canary_events: u64) -> [f64; ALTERNATIVES] {
        let (all, own) = (control_events as f64 + canary_events as f64, canary_events as f64);
        let mut terms = [0.0; ALTERNATIVES];
        for (term, (together, canary)) in
            terms.iter_mut().zip(self.together.iter().zip(&self.canary))
        {
            *term = all * together + own * canary;
        }
        terms
    }
}

/// The logarithm of the mean of what these are the logarithms of.
fn ln_mean(terms: [f64; ALTERNATIVES]) -> f64 {
    let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scaled: f64 = terms.iter().map(|term| (term - largest).exp()).sum();
    largest + (scaled / ALTERNATIVES as f64).ln()
}

/// The logarithm of what a statistic must reach for a risk of being wrong of `risk`.
pub fn ln_threshold(risk: f64) -> f64 {
    -risk.ln()
}

/// A sum that does not lose what is small beside it (Neumaier, *Rundungsfehleranalyse
/// einiger Verfahren zur Summation endlicher Summen*, 1974).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sum {
    total: f64,
    lost: f64,
}

impl Sum {
    fn add(&mut self, value: f64) {
        let total = self.total + value;
        self.lost += match self.total.abs() >= value.abs() {
            true => (self.total - total) + value,
            false => (value - total) + self.total,
        };
        self.total = total;
    }

    fn value(self) -> f64 {
        self.total + self.lost
    }
}
