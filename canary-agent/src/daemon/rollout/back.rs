//! A share that goes back: whatever is in the way, and whether or not it can be stored.
//!
//! It is in the tables first, then on the disk, and marked in the maps in between. An agent that
//! finds such a mark does the same again, from what is stored.

use std::time::Instant;

use canary_ebpf_common::share::Share;

use super::{ACTION, Made};
use crate::{
    daemon::{Kernel, Moment, State, changes::Thing, state::micros},
    datapath::PanicOrder,
    plan::{GivenBack, PanicMark, Proposal, ServiceState, Undone},
    store::{Change, Commit, Split, StateStore},
};

/// A version whose share an earlier agent has given back, and could not say so.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) version: String,
    pub(super) share: Share,
    pub(super) reason: Option<String>,
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Goes back to a share, whatever is in the way: first in the tables, then on the disk.
    pub(super) fn give_back(&mut self, at: usize, share: Share, now: Moment) {
        let begun = Instant::now();
        let record = self.rollouts.active[at].run.position().clone();
        let Some((service, state)) = self.planner.service(&record.service) else { return };
        let Some(proposal) = back(state, &record.to, share, &self.rollouts.active[at].made) else {
            tracing::error!(rollout = record.name, "the share can't be taken back: this is a bug");
            return;
        };
        if proposal.moved == 0 && proposal.ownership.split == state.ownership().split {
            return;
        }
        // What waits for a confirmation must not come back after it.
        let pending = self.control.pending.iter();
        let waits = pending.filter(|one| Thing::Split(&record.service).is_of(&one.change));
        let settles: Vec<u64> = waits.map(|one| one.revision).collect();
        let reason = record.reason.as_deref();
        let commit = self.commit_of(at, service, &proposal, settles, reason, now);
        // A mark in the maps says so until it is stored.
        let mut commit = commit;
        let state = &self.planner.services()[service];
        let back = state.slot(&record.to).map(|slot| {
            let after = proposal.ownership.split.get(&record.to).copied();
            let buckets = after.unwrap_or(Share::ZERO).buckets(state.config().buckets);
            GivenBack { slot, buckets }
        });
        let order = order_of(&commit.change, back, now);
        commit.change.uid = Some(order.uid);
        let marks = self.kernel.mark_panic(&order).unwrap_or_else(|error| {
            tracing::error!(error, "what is given back can't be marked in the maps");
            Vec::new()
        });
        self.panics.owe(commit, marks);
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
            "the share is {share} again"
        );
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
        self.rollouts.given_back.insert(service_name, Taken { version, share, reason });
        Some(commit)
    }
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
