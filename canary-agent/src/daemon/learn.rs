//! `split`, and `split --learn`: a change whose buckets are watched before they move.
//!
//! Nothing is stored before the change itself. If the agent ends meanwhile, whoever asked is
//! told, the split is as it was, and what has been watched is forgotten with its drain. The
//! same goes for one who stops waiting. A split that is made at once takes the place of one
//! that is being prepared: in need, nobody waits.

use std::time::Instant;

use tokio::sync::oneshot;

use super::{
    Kernel, Moment, Peer, Refusal, State,
    held::{self, NOT_COUNTED},
    split,
};
use crate::{
    api::model::{ChangeReport, SplitRequest},
    plan::{BootMs, LEARN_MS},
    store::StateStore,
};

/// A split that somebody has asked for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) service: String,
    pub(super) request: SplitRequest,
    pub(super) peer: Peer,
    pub(super) arrived: Instant,
    pub(super) reply: oneshot::Sender<Result<ChangeReport, Refusal>>,
}

/// One whose buckets are being watched.
#[derive(Debug)]
pub(super) struct Learning {
    /// Position of the service.
    at: usize,
    asked: Asked,
    /// When the buckets move; `None` while not all are watched.
    due_ms: Option<BootMs>,
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Makes a split, prepares it, or says what it would do.
    pub(super) fn ask_split(&mut self, asked: Asked, now: Moment) {
        match self.prepare_split(&asked, now) {
            Err(refusal) => drop(asked.reply.send(Err(refusal))),
            Ok(Some(at)) => self.learning.push(Learning { at, asked, due_ms: None }),
            Ok(None) => {
                let learned_ms = (asked.request.dry_run && self.learns(&asked)).then_some(LEARN_MS);
                self.make_split(asked, learned_ms, now);
            }
        }
    }

    /// Makes the splits that have been prepared for long enough. Returns when the next one
    /// will have been.
    pub(super) fn learned(&mut self, now: Moment) -> Option<BootMs> {
        let mut next: Option<BootMs> = None;
        for mut learning in std::mem::take(&mut self.learning) {
            if learning.asked.reply.is_closed() {
                tracing::info!(
                    service = learning.asked.service,
                    "whoever asked for the split has gone: it is as it was"
                );
                self.planner.prepare(learning.at, None);
                continue;
            }
            let in_force = self.retry_ms.is_none() && self.planner.is_prepared(learning.at);
            if learning.due_ms.is_none() && in_force {
                learning.due_ms = Some(now.boot_ms + LEARN_MS);
            }
            match learning.due_ms {
                Some(due) if due <= now.boot_ms => {
                    self.make_split(learning.asked, Some(LEARN_MS), now);
                }
                due => {
                    next = [next, due].into_iter().flatten().min();
                    self.learning.push(learning);
                }
            }
        }
        next
    }

    /// Finds the services of splits that are being prepared, now that the configuration is
    /// another. Of a service that is gone, nothing will be made.
    pub(super) fn follow_services(&mut self) {
        for mut learning in std::mem::take(&mut self.learning) {
            match self.planner.service(&learning.asked.service) {
                Some((at, _)) => {
                    learning.at = at;
                    self.learning.push(learning);
                }
                None => {
                    let refusal = split::unknown_service(&self.planner, &learning.asked.service);
                    drop(learning.asked.reply.send(Err(refusal)));
                }
            }
        }
    }

    /// Begins to watch what a split would move. `None` if it is to be made at once.
    fn prepare_split(&mut self, asked: &Asked, now: Moment) -> Result<Option<usize>, Refusal> {
        let Asked { service, request, peer, .. } = asked;
        if !request.learn || request.dry_run {
            return Ok(None);
        }
        let (at, proposal) = split::propose(&self.planner, service, request)?;
        self.split_terms(service, request, *peer, now)?;
        self.thaw(&self.planner.services()[at], &proposal)?;
        if self.learning.iter().any(|learning| learning.at == at) {
            return Err(Refusal {
                code: "split_is_prepared",
                message: format!("another split of service `{service}` is being prepared"),
                help: Some(
                    "wait for it, or leave out --learn: the split that is made at once takes its place"
                        .to_owned(),
                ),
                exit_code: 1,
            });
        }
        let watched = self.planner.prepare(at, Some(&proposal.ownership));
        Ok((watched > 0).then_some(at))
    }

    /// Whether somebody's split of a service is being prepared.
    pub(super) fn is_learning(&self, service: usize) -> bool {
        self.learning.iter().any(|learning| learning.at == service)
    }

    /// Whether a split would be prepared.
    fn learns(&self, asked: &Asked) -> bool {
        let found = self.planner.service(&asked.service);
        asked.request.learn && found.is_some_and(|(at, _)| self.planner.learns(at))
    }

    fn make_split(&mut self, asked: Asked, learned_ms: Option<u64>, now: Moment) {
        let Asked { service, request, peer, arrived, reply } = asked;
        let made = self.split(&service, &request, peer, arrived, now);
        let (mut report, moved) = match made {
            Ok(made) => made,
            Err(refusal) => {
                if let (Some((at, _)), Some(_)) = (self.planner.service(&service), learned_ms) {
                    self.planner.prepare(at, None);
                }
                return drop(reply.send(Err(refusal)));
            }
        };
        let moves = report.buckets_moved > 0;
        report.learned_ms = learned_ms.filter(|_| moves);
        let Some((at, _)) = self.planner.service(&service) else {
            return drop(reply.send(Ok(report)));
        };
        if report.applied && moves {
            self.supersede(at);
        }
        if request.learn && moves && learned_ms.is_none() {
            report.notes.push(
                "there was nothing to learn: with `nat` every flow has an entry anyway, and with \
                 `existing = \"move\"` or no drain none is kept"
                    .to_owned(),
            );
        }
        if moves && !self.counts(at) {
            report.notes.push(NOT_COUNTED.to_owned());
        }
        let counter = if moves && self.counts(at) { self.kernel.counter() } else { None };
        let wanted = self.counted(at, moved);
        held::answer(reply, report, counter, wanted, |report, census| {
            report.connections_held = Some(census.in_buckets);
        });
    }

    /// Tells those whose split of a service is being prepared that another one was made.
    pub(super) fn supersede(&mut self, at: usize) {
        let (over, others) =
            std::mem::take(&mut self.learning).into_iter().partition(|learning| learning.at == at);
        self.learning = others;
        let over: Vec<Learning> = over;
        for learning in over {
            let refusal = Refusal {
                code: "superseded",
                message: format!(
                    "another split of service `{}` was made meanwhile, as revision {}; this one was not",
                    learning.asked.service, self.revision
                ),
                help: Some("look at the split and ask again".to_owned()),
                exit_code: 1,
            };
            drop(learning.asked.reply.send(Err(refusal)));
        }
    }
}
