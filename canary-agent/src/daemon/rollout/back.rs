//! Shares that go back: whatever is in the way, and whether or not it can be stored.
//!
//! It is in the tables first, then on the disk, and marked in the maps in between. An agent that
//! finds such a mark does the same again, from what is stored.

use std::{collections::BTreeMap, time::Instant};

use canary_ebpf_common::share::Share;

use super::{ACTION, Made};
use crate::{
    config::derived,
    daemon::{Kernel, Moment, State, changes::Thing, state::micros},
    datapath::PanicOrder,
    plan::{GivenBack, Ownership, PanicMark, Proposal, Raise, Raises, ServiceState, Undone},
    rollout::drive::Shares,
    store::{Change, Commit, Split, StateStore},
};

/// A version whose share an earlier agent has given back, and could not say so.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) version: String,
    /// Everyone's.
    pub(super) share: Share,
    /// Those of audiences that have gone back.
    pub(super) audiences: BTreeMap<String, Share>,
    pub(super) reason: Option<String>,
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Goes back to shares, whatever is in the way: first in the tables, then on the disk.
    pub(super) fn give_back(&mut self, at: usize, shares: Shares, now: Moment) {
        let begun = Instant::now();
        let record = self.rollouts.active[at].run.position().clone();
        let Some((service, state)) = self.planner.service(&record.service) else { return };
        let Shares { everyone: share, audiences } = &shares;
        let Some(proposal) = back(state, &record.to, *share, &self.rollouts.active[at].made) else {
            tracing::error!(rollout = record.name, "the share can't be taken back: this is a bug");
            return;
        };
        let present = share_of(&state.ownership().split, &record.to);
        let stays =
            proposal.moved == 0 && share_of(&proposal.ownership.split, &record.to) == present;
        let raises = self.raises_with(&record, *share, audiences);
        let lowered = self.lowered(service, &proposal.ownership, &raises);
        if stays && lowered.is_empty() {
            self.planner.set_raises(raises);
            return;
        }
        // What waits for a confirmation must not come back after it.
        let pending = self.control.pending.iter();
        let waits = pending.filter(|one| Thing::Split(&record.service).is_of(&one.change));
        let settles: Vec<u64> = waits.map(|one| one.revision).collect();
        let reason = record.reason.as_deref();
        let commit = self.commit_of(at, service, &proposal, settles, reason, now);
        let state = &self.planner.services()[service];
        let back = state.slot(&record.to).map(|slot| {
            let after = proposal.ownership.split.get(&record.to).copied();
            let buckets = after.unwrap_or(Share::ZERO).buckets(state.config().buckets);
            GivenBack { slot, buckets }
        });
        if !stays {
            self.owe_back(commit, back, now);
        }
        for (table, after) in lowered {
            let state = &self.planner.services()[table];
            let slot = state.slot(&record.to);
            let back = slot.map(|slot| {
                let buckets = after.counts()[usize::from(slot)];
                GivenBack { slot, buckets }
            });
            let reason = reason.map(|reason| format!("rollout {}: {reason}", record.name));
            let by = self.rollouts.active[at].by;
            let commit = self.line_of(table, &after, reason, by, now);
            self.owe_back(commit, back, now);
        }
        self.planner.set_raises(raises);
        self.rollouts.active[at].set_ms = now.boot_ms;
        self.planner.set_ownership(service, proposal.ownership);
        self.supersede(service);
        self.settle(now);
        let took = begun.elapsed();
        self.metrics.rolled_back(took);
        if let Err(why) = self.store_panics(now) {
            tracing::error!(rollout = record.name, "its share is taken back, and {why}");
        }
        tracing::warn!(
            rollout = record.name,
            service = record.service,
            version = record.to,
            took_us = micros(took),
            "the share is {shares} again"
        );
    }

    /// The tables of audiences that had more than they are left with, and what they are left with.
    fn lowered(
        &self,
        service: usize,
        everyone: &Ownership,
        raises: &Raises,
    ) -> Vec<(usize, Ownership)> {
        let given = |table: &usize| {
            let name = &self.planner.services()[*table].config().name;
            self.planner.raises().contains_key(name)
        };
        let tables = self.planner.followers(service).filter(given);
        let after = tables.map(|table| {
            let raise = raises.get(&self.planner.services()[table].config().name);
            (table, self.planner.follower(table, everyone, raise))
        });
        let goes = |(table, after): &(usize, Ownership)| {
            self.planner.services()[*table].ownership() != after
        };
        after.filter(goes).collect()
    }

    /// Marks in the maps what goes back, until it is stored.
    fn owe_back(&mut self, mut commit: Commit, back: Option<GivenBack>, now: Moment) {
        let order = order_of(&commit.change, back, now);
        commit.change.uid = Some(order.uid);
        let marks = self.kernel.mark_panic(&order).unwrap_or_else(|error| {
            tracing::error!(error, "what is given back can't be marked in the maps");
            Vec::new()
        });
        self.panics.owe(commit, marks);
    }

    /// A mark says that an earlier agent has given a share back, and has ended before that was
    /// stored: does the same again. Returns what is to be stored.
    pub(in crate::daemon) fn adopt_back(
        &mut self,
        service: usize,
        given: GivenBack,
        mark: &PanicMark,
    ) -> Option<Commit> {
        let state = self.planner.services().get(service)?;
        if state.follows() {
            return self.adopt_lowered(service, given, mark);
        }
        let (name, total) = (state.config().name.clone(), state.config().buckets);
        let version = state.slots().get(usize::from(given.slot))?.clone();
        let made = self.changes_of_rollout(&name, 0);
        let state = &self.planner.services()[service];
        let shares = made.iter().rev().map(|one| share_of(&one.before, &version));
        let share = shares.into_iter().find(|share| share.buckets(total) == given.buckets);
        let proposal = share
            .and_then(|share| back(state, &version, share, &made))
            .or_else(|| state.propose_given_back(given))?;
        let (before, after) = (state.ownership(), &proposal.ownership);
        let pending = self.control.pending.iter();
        let waits = pending.filter(|one| Thing::Split(&name).is_of(&one.change));
        let settles: Vec<u64> = waits.map(|one| one.revision).collect();
        let commit = Commit {
            change: Change {
                unix_ms: mark.unix_ms,
                uid: Some(mark.uid),
                service: name.clone(),
                action: ACTION.to_owned(),
                reason: mark.reason.clone(),
                before: before.split.clone(),
                after: after.split.clone(),
                moved: proposal.change_list.clone(),
                buckets_moved: proposal.moved,
                slots: state.slots().to_vec(),
                salt: Some(before.salt),
                about: settles.iter().rev().copied().collect(),
                ..Change::default()
            },
            record: Some(state.stored(after)),
            deadline: None,
            settles,
        };
        let share = share_of(&after.split, &version);
        let (service_name, reason) = (name, mark.reason.clone());
        tracing::warn!(
            service = service_name,
            version,
            reason,
            "an earlier agent has given its share back and could not store that: it is {share}"
        );
        self.planner.set_ownership(service, proposal.ownership);
        self.supersede(service);
        let audiences = BTreeMap::new();
        let taken = Taken { version, share, audiences, reason };
        self.rollouts.given_back.insert(service_name, taken);
        Some(commit)
    }

    /// The same of what an audience had more than everyone. Marks of everyone's come before those.
    fn adopt_lowered(
        &mut self,
        table: usize,
        given: GivenBack,
        mark: &PanicMark,
    ) -> Option<Commit> {
        let state = &self.planner.services()[table];
        let (name, total) = (state.config().name.clone(), state.config().buckets);
        let version = state.slots().get(usize::from(given.slot))?.clone();
        let (base, audience) = derived::parts(&name)?;
        let (_, everyone) = self.planner.service(base)?;
        let has = share_of(&everyone.ownership().split, &version);
        let share = match given.buckets > has.buckets(total) {
            true => self.share_of_steps(base, audience, &version, given.buckets, total),
            false => Share::ZERO,
        };
        let mut raises = self.planner.raises().clone();
        if share == Share::ZERO {
            raises.remove(&name);
        } else {
            let raise = Raise { version: version.clone(), everyone: has, share };
            raises.insert(name.clone(), raise);
        }
        let after = self.planner.follower(table, everyone.ownership(), raises.get(&name));
        let commit = self.line_of(table, &after, mark.reason.clone(), Some(mark.uid), now_of(mark));
        let (base, audience) = (base.to_owned(), audience.to_owned());
        self.planner.set_raises(raises);
        let taken = self.rollouts.given_back.entry(base).or_insert_with(|| Taken {
            version,
            share: has,
            audiences: BTreeMap::new(),
            reason: mark.reason.clone(),
        });
        taken.audiences.insert(audience, share);
        Some(commit)
    }

    /// The share of so many buckets that a step gives an audience.
    fn share_of_steps(
        &self,
        service: &str,
        audience: &str,
        version: &str,
        buckets: u32,
        total: u32,
    ) -> Share {
        let rollouts = self.rollouts.configured.iter();
        let its = rollouts.filter(|one| one.service == service && one.to == version);
        let steps = its.flat_map(|rollout| &rollout.steps);
        let shares = steps.filter(|step| step.audience.as_deref() == Some(audience));
        let mut shares = shares.filter_map(|step| step.split);
        let found = shares.find(|share| share.buckets(total) == buckets);
        found.unwrap_or_else(|| Share::of_buckets(buckets, total))
    }
}

/// When a mark was made; the clock that does not step plays no part in a line.
fn now_of(mark: &PanicMark) -> Moment {
    Moment { boot_ms: 0, unix_ms: mark.unix_ms }
}

/// What marks in the maps that a share has gone back.
fn order_of(change: &Change, back: Option<GivenBack>, now: Moment) -> PanicOrder {
    PanicOrder {
        services: Some([change.service.clone()].into()),
        moves: false,
        back,
        reason: change.reason.clone(),
        uid: change.uid.unwrap_or_else(|| nix::unistd::geteuid().as_raw()),
        // Another than any before it.
        id: now.unix_ms.rotate_left(20) ^ now.boot_ms,
        unix_ms: now.unix_ms,
        now_ms: now.boot_ms,
        dry_run: false,
    }
}

/// A version's share in a split.
fn share_of(split: &Split, version: &str) -> Share {
    split.get(version).copied().unwrap_or(Share::ZERO)
}

/// What gives the buckets back that took a version from `share` to where it is: exactly those,
/// where nobody else has moved any meanwhile, else as many.
fn back(state: &ServiceState, to: &str, share: Share, made: &[Made]) -> Option<Proposal> {
    let present = state.ownership();
    let of = |split: &Split| share_of(split, to);
    let others = |split: &Split| -> Split {
        let shares = split.iter().filter(|(name, share)| *name != to && **share != Share::ZERO);
        shares.map(|(name, share)| (name.clone(), *share)).collect()
    };
    let mut undone: Vec<Undone<'_>> = Vec::new();
    for one in made.iter().rev() {
        let Made { revision, slots, moved, before, salt } = one;
        undone.push(Undone { revision: *revision, slots, moved, before, salt: *salt });
        if of(before) == share {
            let proposal = state.propose_undo(&undone).ok();
            let exact = proposal.filter(|proposal| {
                let after = &proposal.ownership.split;
                of(after) == share && others(after) == others(&present.split)
            });
            if exact.is_some() {
                return exact;
            }
        }
    }
    let mut split = present.split.clone();
    split.insert(to.to_owned(), share);
    state.propose(split).ok()
}
