//! Whose share of the version is what: everyone's, and those of audiences that steps name.

use std::collections::BTreeMap;

use canary_ebpf_common::share::Share;

use super::Run;
use crate::config::model::Rollout;

/// A share that is to be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Whose; `None` for everyone's.
    pub audience: Option<String>,
    /// The share.
    pub share: Share,
}

impl std::fmt::Display for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.audience {
            Some(audience) => write!(f, "{} of `{audience}`", self.share),
            None => self.share.fmt(f),
        }
    }
}

/// Shares of everyone and of audiences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Everyone's.
    pub everyone: Share,
    /// Those of audiences that have more.
    pub audiences: BTreeMap<String, Share>,
}

impl Shares {
    /// Nothing for anybody.
    pub const NONE: Self = Self { everyone: Share::ZERO, audiences: BTreeMap::new() };

    /// Whether nobody has anything.
    pub fn is_nothing(&self) -> bool {
        let mut all = self.audiences.values().chain([&self.everyone]);
        all.all(|share| *share == Share::ZERO)
    }

    /// What an audience has.
    fn of(&self, audience: &str) -> Share {
        self.audiences.get(audience).copied().unwrap_or(Share::ZERO).max(self.everyone)
    }

    /// Whether somebody has less than in `other`, and nobody more.
    pub(super) fn is_less_than(&self, other: &Self) -> bool {
        let names = || self.audiences.keys().chain(other.audiences.keys());
        let more =
            self.everyone > other.everyone || names().any(|name| self.of(name) > other.of(name));
        let less =
            self.everyone < other.everyone || names().any(|name| self.of(name) < other.of(name));
        less && !more
    }
}

impl std::fmt::Display for Shares {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.everyone.fmt(f)?;
        let more = self.audiences.iter().filter(|(_, share)| **share > self.everyone);
        more.into_iter().try_for_each(|(name, share)| write!(f, ", `{name}` {share}"))
    }
}

impl Run {
    /// The shares that it has set.
    fn shares(&self) -> Shares {
        let [_, everyone] = self.record.shares;
        Shares { everyone, audiences: self.record.audiences.clone() }
    }

    /// The shares that a step leaves behind.
    pub(super) fn shares_of(&self, rollout: &Rollout, step: usize) -> Shares {
        let [before, _] = self.record.shares;
        let everyone = rollout.for_everyone(step).unwrap_or(before);
        Shares { everyone, audiences: rollout.for_audiences(step) }
    }

    /// The next share that has to be set for a step: those of audiences first, which have more.
    pub fn next_ask(&self, rollout: &Rollout, step: usize) -> Option<Ask> {
        let [_, mine] = self.record.shares;
        let its = rollout.steps.get(step)?;
        let everyone = its.split.filter(|_| its.audience.is_none());
        let least = everyone.unwrap_or(mine);
        let audiences = rollout.for_audiences(step);
        let other = |(audience, share): (String, Share)| {
            let has = self.record.audiences.get(&audience).copied().unwrap_or(Share::ZERO);
            let differs = has.max(least) != share.max(least);
            differs.then_some(Ask { audience: Some(audience), share })
        };
        let everyone = everyone.filter(|share| *share != mine);
        let everyone = everyone.map(|share| Ask { audience: None, share });
        audiences.into_iter().find_map(other).or(everyone)
    }

    /// The last step before this one that has set smaller shares, and those.
    pub(super) fn shares_before(&self, rollout: &Rollout) -> Option<(usize, Shares)> {
        let present = self.shares();
        let steps = rollout.steps.iter().enumerate().take(self.record.step);
        let sets = steps.rev().filter(|(_, step)| step.split.is_some());
        let mut shares = sets.map(|(at, _)| (at, self.shares_of(rollout, at)));
        shares.find(|(_, shares)| shares.is_less_than(&present))
    }
}
