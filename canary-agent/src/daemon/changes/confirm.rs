//! Changes that are taken back unless they are confirmed.
//!
//! The deadline is stored with the change, by the clock that counts suspended time. A start of
//! the agent changes nothing about it. A start of the host begins that clock anew: what is left
//! then is what the wall clock says, and at most what there was from the beginning.

use std::time::Duration;

use canary_ebpf_common::compile;

use super::{Kernel, Moment, Refusal, State, Thing, describe};
use crate::{
    api::model::{ConfirmReport, ConfirmRequest, PendingStatus},
    daemon::{Peer, reload::TakeBack, saving},
    plan::BootMs,
    store::{Change, Commit, FreezeChange, Pending, StateStore},
};

/// After this time it is tried again to take back what could not be.
const RETRY_MS: u64 = 1_000;

/// After this time the earlier configuration is asked for again.
const RELOAD_RETRY_MS: u64 = 10_000;

/// Deadlines as this start of the host counts time.
pub(in crate::daemon) fn reckoned(
    mut pending: Vec<Pending>,
    boot_id: &str,
    now: Moment,
) -> Vec<Pending> {
    for Pending { deadline, .. } in &mut pending {
        let of_this_start = deadline.boot_id == boot_id
            // A clock that has gone back is another start's, whatever the name says.
            && deadline.boot_ms <= now.boot_ms.saturating_add(deadline.within_ms);
        if !of_this_start {
            let left = deadline.unix_ms.saturating_sub(now.unix_ms).min(deadline.within_ms);
            deadline.boot_ms = now.boot_ms.saturating_add(left);
            boot_id.clone_into(&mut deadline.boot_id);
        }
    }
    pending
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Keeps what waits for a confirmation.
    pub(in crate::daemon) fn confirm(
        &mut self,
        request: &ConfirmRequest,
        peer: Peer,
        now: Moment,
    ) -> Result<ConfirmReport, Refusal> {
        let ConfirmRequest { revision, reason, dry_run, if_revision } = request;
        let pending = &self.control.pending;
        let found = match revision {
            Some(revision) => pending.iter().find(|one| one.revision == *revision),
            None => pending.last(),
        };
        let Some(batch) = found.map(|one| one.deadline.batch) else {
            return Err(self.not_pending(*revision));
        };
        if revision.is_none() && pending.iter().any(|one| one.deadline.batch != batch) {
            let each = pending.iter().map(|one| describe::brief(one.revision, &one.change, now));
            return Err(Refusal {
                code: "several_pending",
                message: format!(
                    "several changes wait for a confirmation: {}",
                    each.collect::<Vec<_>>().join("; ")
                ),
                help: Some("name one: `canary-agent confirm REVISION`".to_owned()),
                exit_code: 2,
            });
        }
        let mut its: Vec<Pending> =
            pending.iter().filter(|one| one.deadline.batch == batch).cloned().collect();
        its.reverse();
        let service = its[0].change.service.clone();
        if let Some(expected) = if_revision {
            let one = its.iter().all(|one| one.change.service == service) && !service.is_empty();
            self.refuse_stale(one.then_some(service.as_str()), *expected, now)?;
        }
        let numbers: Vec<u64> = its.iter().map(|one| one.revision).collect();
        if !dry_run {
            let change = Change {
                unix_ms: now.unix_ms,
                uid: Some(peer.uid),
                service: if its.len() == 1 { service } else { String::new() },
                action: "confirm".to_owned(),
                reason: reason.clone(),
                about: numbers.clone(),
                ..Change::default()
            };
            let commit = Commit { change, record: None, deadline: None, settles: numbers.clone() };
            self.save(vec![commit], now)
                .map_err(|error| saving::refused("what waits for the confirmation", &error))?;
            tracing::info!(
                revision = self.revision,
                uid = peer.uid,
                reason = reason.as_deref(),
                confirmed = ?numbers,
                "confirmed"
            );
        }
        Ok(ConfirmReport {
            applied: !dry_run,
            revision: self.revision,
            confirmed: its
                .iter()
                .map(|one| describe::change(0, one.revision, &one.change))
                .collect(),
        })
    }

    fn not_pending(&self, revision: Option<u64>) -> Refusal {
        let message = match revision {
            None => "no change waits for a confirmation".to_owned(),
            Some(revision) => format!("revision {revision} waits for no confirmation"),
        };
        let waits: Vec<String> =
            self.control.pending.iter().map(|one| one.revision.to_string()).collect();
        Refusal {
            code: "nothing_pending",
            message,
            help: Some(match waits.is_empty() {
                true => "it was confirmed or taken back already, or made without --confirm: see \
                         `canary-agent events`"
                    .to_owned(),
                false => format!("these do: {}", waits.join(", ")),
            }),
            exit_code: 1,
        }
    }

    /// Takes back what was not confirmed in time. Returns when the next is due.
    pub(in crate::daemon) fn unconfirmed(&mut self, now: Moment) -> Option<BootMs> {
        if self.control.retry_ms.is_some_and(|at| at > now.boot_ms) {
            return self.control.retry_ms;
        }
        self.control.retry_ms = None;
        let of_reload = self.take_reload_back(now);
        let is_due = |one: &&Pending| {
            one.deadline.boot_ms <= now.boot_ms && !Thing::Reload.is_of(&one.change)
        };
        loop {
            // What a panic has ended that is in force, and not stored yet, is over.
            let waits = |one: &&Pending| !self.panics.settles(one.revision);
            let pending = || self.control.pending.iter().filter(waits);
            let Some(due) = pending().find(is_due) else { break };
            let (batch, within) = (due.deadline.batch, due.deadline.within_ms);
            let of_it = pending().filter(|one| one.deadline.batch == batch);
            let mut its: Vec<(u64, Change)> =
                of_it.map(|one| (one.revision, one.change.clone())).collect();
            its.reverse();
            let within = humantime::format_duration(Duration::from_millis(within));
            let reason = format!("not confirmed within {within}");
            match self.take_back_unconfirmed(&its, &reason, now) {
                Ok(()) => {
                    self.alerts.remove("confirm");
                    tracing::warn!(
                        revision = self.revision,
                        undone = ?its.iter().map(|(number, _)| number).collect::<Vec<_>>(),
                        "{reason}: taken back"
                    );
                }
                Err(refusal) => {
                    let numbers: Vec<String> = its.iter().map(|(n, _)| n.to_string()).collect();
                    let alert = format!(
                        "revision {} was {reason}, and can't be taken back: {refusal}",
                        numbers.join(", ")
                    );
                    if self.alerts.insert("confirm", vec![alert.clone()]).is_none() {
                        tracing::error!("{alert}");
                    }
                    self.control.retry_ms = Some(now.boot_ms + RETRY_MS);
                    return self.control.retry_ms;
                }
            }
        }
        let others =
            self.control.pending.iter().filter(|one| {
                !Thing::Reload.is_of(&one.change) && !self.panics.settles(one.revision)
            });
        others.map(|one| one.deadline.boot_ms).chain(of_reload).min()
    }

    /// Asks for the earlier configuration where a reload was not confirmed in time. Returns when
    /// that is due.
    fn take_reload_back(&mut self, now: Moment) -> Option<BootMs> {
        let mut pending = self.control.pending.iter();
        let one = pending.find(|one| Thing::Reload.is_of(&one.change))?;
        let due = one.deadline.boot_ms.max(self.control.reload_retry_ms.unwrap_or(0));
        if due > now.boot_ms {
            return Some(due);
        }
        let within = Duration::from_millis(one.deadline.within_ms);
        let order = TakeBack { revision: one.revision, within };
        // Whoever is asked says how it went.
        if self.take_backs.as_ref().is_none_or(|by| by.try_send(order).is_err()) {
            tracing::warn!(revision = order.revision, "nobody takes the reload back yet");
        }
        self.control.reload_retry_ms = Some(now.boot_ms + RELOAD_RETRY_MS);
        self.control.reload_retry_ms
    }

    /// Of a reload that waited when an earlier agent ended, the earlier configuration is not
    /// known: what the files say counts.
    pub(in crate::daemon) fn forget_unconfirmed_reloads(&mut self, now: Moment) {
        let is_reload = |one: &&Pending| Thing::Reload.is_of(&one.change);
        let over: Vec<u64> =
            self.control.pending.iter().filter(is_reload).map(|one| one.revision).collect();
        if over.is_empty() {
            return;
        }
        let text = format!(
            "the reload of revision {} was not confirmed when the agent ended: the files count, as at any start",
            over[0]
        );
        tracing::warn!("{text}");
        self.notices.add(now, "reload", "", text);
        let commit = Commit {
            change: Change {
                unix_ms: now.unix_ms,
                action: "confirm".to_owned(),
                reason: Some("the agent was started anew, from the files".to_owned()),
                about: over.clone(),
                ..Change::default()
            },
            record: None,
            deadline: None,
            settles: over,
        };
        if let Err(error) = self.save(vec![commit], now) {
            tracing::warn!(%error, "the end of a wait can't be stored");
        }
        self.control.pending.retain(|one| !Thing::Reload.is_of(&one.change));
    }

    /// Ends the waiting for changes that moved nothing: freezes go back to what they were.
    pub(super) fn end_pending(
        &mut self,
        over: &[&(u64, Change)],
        reason: &str,
        now: Moment,
    ) -> Result<(), Refusal> {
        let mut commits = Vec::new();
        for (revision, change) in over {
            let freeze = change.freeze.as_ref().map(|freeze| FreezeChange {
                before: self.control.freeze_of(&change.service).map(|now| now.reason.clone()),
                after: freeze.before.clone(),
            });
            commits.push(Commit {
                change: Change {
                    unix_ms: now.unix_ms,
                    service: change.service.clone(),
                    action: "undo".to_owned(),
                    reason: Some(reason.to_owned()),
                    about: vec![*revision],
                    moved: compile::encode_changes(&[]),
                    freeze,
                    ..Change::default()
                },
                record: None,
                deadline: None,
                settles: vec![*revision],
            });
        }
        self.save(commits, now).map_err(|error| saving::refused("what was not confirmed", &error))
    }

    /// What waits, as the status shows it.
    pub(in crate::daemon) fn pending_status(&self, now: Moment) -> Vec<PendingStatus> {
        let left = |one: &Pending| one.deadline.boot_ms.saturating_sub(now.boot_ms) as f64 / 1e3;
        let of = |one: &Pending| PendingStatus {
            left_seconds: left(one),
            change: describe::change(0, one.revision, &one.change),
        };
        self.control.pending.iter().map(of).collect()
    }
}
