//! Whether connections are split as was asked: a guard of the splitter itself.
//!
//! The same test as a gate's, on connections instead of bad events: where a version gets its
//! share, a connection is its with that probability. Evidence is weighed on both sides at
//! once, each at half of the risk. It may be looked at as often as a gate.
//!
//! It rests on connections that are split independently of each other. Where a client has all
//! its connections in one bucket, a client counts once: give it clients, or a `tolerate` that
//! their number allows.

use serde::{Deserialize, Serialize};

use super::evidence::{ALTERNATIVES, Evidence, ln_threshold};

/// What is looked for, in multiples of what is tolerated: a splitter that is off by a half is
/// found quickly anyhow.
const MORE: [f64; ALTERNATIVES] = [1.05, 1.1, 1.25, 1.5, 2.0];
const FEWER: [f64; ALTERNATIVES] = [1.0 / 1.05, 1.0 / 1.1, 1.0 / 1.25, 1.0 / 1.5, 1.0 / 2.0];

/// How the measured share stands to the asked one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The version gets more than was asked.
    More,
    /// It gets fewer.
    Fewer,
}

/// Connections so far, and what they say about the split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleRatio {
    /// Connections of control, or of all other versions.
    pub control_connections: u64,
    /// Connections of the version that is watched.
    pub canary_connections: u64,
    more: Evidence,
    fewer: Evidence,
}

impl SampleRatio {
    /// A guard that lets the ratio of the versions' connections depart from the asked one by a
    /// factor of `tolerate`, which is at least 1.
    pub fn new(tolerate: f64) -> Self {
        Self {
            control_connections: 0,
            canary_connections: 0,
            more: Evidence::new(tolerate, MORE),
            fewer: Evidence::new(1.0 / tolerate, FEWER),
        }
    }

    /// Takes a window's new connections into account; `share` was asked, as a fraction of
    /// both. Where it was nothing or everything, nothing is learned.
    pub fn add(&mut self, share: f64, control_connections: u64, canary_connections: u64) {
        self.control_connections = self.control_connections.saturating_add(control_connections);
        self.canary_connections = self.canary_connections.saturating_add(canary_connections);
        self.more.add(share, control_connections, canary_connections);
        self.fewer.add(share, control_connections, canary_connections);
    }

    /// The natural logarithms of the evidence that there are more, and fewer, than asked.
    pub fn ln(&self) -> (f64, f64) {
        (self.more.ln(), self.fewer.ln())
    }

    /// Whether the splitter is off, at a risk of `alpha` of saying so of one that is not.
    pub fn departure(&self, alpha: f64) -> Option<Departure> {
        let at = ln_threshold(alpha / 2.0);
        let (more, fewer) = self.ln();
        match (more >= at, fewer >= at) {
            (true, _) if more >= fewer => Some(Departure::More),
            (_, true) => Some(Departure::Fewer),
            (true, false) => Some(Departure::More),
            (false, false) => None,
        }
    }
}
