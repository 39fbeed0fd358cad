//! What all changes have in common: the terms on which they are asked for, who may not make
//! them now, and how they are kept in mind until they are confirmed.
//!
//! Two rules keep what waits for a confirmation apart from what is changed meanwhile: as long
//! as a split waits, the split of that service is not changed but by taking it back, and so
//! with a backend. So what is taken back in the end is what was changed in the beginning.

mod confirm;
mod describe;
mod events;
mod freeze;
mod undo;

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use super::{Kernel, Moment, Peer, Refusal, State};
use crate::{
    api::panic::PanicStatus,
    config::{self, derived},
    plan::{BootMs, Proposal, ServiceState},
    store::{Change, Commit, Deadline, Freeze, Pending, StateStore, StoreError},
};

pub use self::events::{EventsAsked, EventsFound};
pub(super) use self::{
    confirm::reckoned,
    events::Notices,
    freeze::{freeze_status, refused as frozen},
};

/// Changes that a refusal names.
const NAMED: usize = 3;

/// On what terms a change is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms<'a> {
    pub(super) peer: Peer,
    pub(super) reason: Option<&'a str>,
    pub(super) if_revision: Option<u64>,
    pub(super) confirm: Option<&'a str>,
}

/// What a change is about, of which only one at a time waits for a confirmation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thing<'a> {
    Split(&'a str),
    Backend(&'a str, SocketAddr),
    /// The service; empty for all of them.
    Freeze(&'a str),
    /// The configuration.
    Reload,
}

impl Thing<'_> {
    /// Whether a change was about it.
    pub(super) fn is_of(self, change: &Change) -> bool {
        let of = |service: &str| change.service == service;
        match self {
            Self::Split(service) => of(service) && changes_split(change),
            Self::Backend(service, addr) => {
                of(service) && change.backends.iter().any(|told| told.addr == addr)
            }
            Self::Freeze(service) => of(service) && change.freeze.is_some(),
            Self::Reload => change.action == "reload",
        }
    }
}

/// Whether a change moved buckets or altered asked shares. A list of nothing is one byte long.
fn changes_split(change: &Change) -> bool {
    change.moved.len() > 1 || change.before != change.after
}

/// What waits for something, for [`State`].
#[derive(Debug, Default)]
pub(super) struct Control {
    /// Changes that are taken back unless they are confirmed, oldest first.
    pub(super) pending: Vec<Pending>,
    pub(super) freezes: Vec<Freeze>,
    /// By service, the panic that it is where it is by.
    pub(super) panicked: HashMap<String, PanicStatus>,
    /// Which start of the host this is.
    pub(super) boot_id: String,
    /// Taking back could not be stored, and is tried again then.
    pub(super) retry_ms: Option<BootMs>,
    /// When the earlier configuration is asked for again.
    pub(super) reload_retry_ms: Option<BootMs>,
}

impl Control {
    /// The freeze of a service, which its audiences have part in, or of all.
    pub(super) fn frozen(&self, service: &str) -> Option<&Freeze> {
        let of = derived::parts(service).map_or(service, |(of, _)| of);
        let about = |name: &str| name.is_empty() || name == service || name == of;
        self.freezes.iter().find(|freeze| about(&freeze.service))
    }

    /// Takes over what a stored change says of confirmations and freezes.
    pub(super) fn remember(&mut self, revision: u64, commit: Commit) {
        let Commit { change, record: _, deadline, settles } = commit;
        self.pending.retain(|pending| !settles.contains(&pending.revision));
        if change.action == "panic" {
            self.panicked(revision, &change);
        } else if change.action == "split" || changes_split(&change) {
            self.panicked.remove(&change.service);
        }
        if let Some(freeze) = &change.freeze {
            self.freezes.retain(|known| known.service != change.service);
            self.freezes.extend(freeze.after.clone().map(|reason| Freeze {
                service: change.service.clone(),
                revision,
                unix_ms: change.unix_ms,
                uid: change.uid,
                reason,
            }));
        }
        if let Some(deadline) = deadline {
            self.pending.push(Pending { revision, deadline, change });
        }
    }

    /// A service is where a panic has sent it.
    pub(super) fn panicked(&mut self, revision: u64, change: &Change) {
        let Change { unix_ms, uid, ref reason, .. } = *change;
        let status = PanicStatus { reason: reason.clone(), revision, unix_ms, uid };
        self.panicked.insert(change.service.clone(), status);
    }

    /// The freeze of exactly this: a service, or (empty) all.
    pub(super) fn freeze_of(&self, scope: &str) -> Option<&Freeze> {
        self.freezes.iter().find(|freeze| freeze.service == scope)
    }
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Refuses what comes too late, or what something else waits for.
    ///
    /// `service` is what has to be as it was at [`Terms::if_revision`]; `None` for everything.
    /// Returns how long the change waits for a confirmation.
    pub(super) fn terms(
        &mut self,
        service: Option<&str>,
        things: &[Thing<'_>],
        terms: &Terms<'_>,
        now: Moment,
    ) -> Result<Option<Duration>, Refusal> {
        let within = terms.confirm.map(duration).transpose()?;
        if let Some(expected) = terms.if_revision {
            self.refuse_stale(service, expected, now)?;
        }
        let waits = |pending: &&Pending| things.iter().any(|thing| thing.is_of(&pending.change));
        if let Some(pending) = self.control.pending.iter().find(waits) {
            return Err(self.still_waits(pending, now));
        }
        Ok(within)
    }

    /// Refuses another configuration of services that are frozen, or of which a change waits for
    /// a confirmation: taking that back would meet buckets that it does not know.
    pub(super) fn may_be_configured<'a>(
        &self,
        mut services: impl Iterator<Item = &'a str>,
        now: Moment,
    ) -> Result<(), Refusal> {
        services.try_for_each(|service| {
            if let Some(freeze) = self.control.frozen(service) {
                return Err(freeze::refused(service, freeze));
            }
            let mut pending = self.control.pending.iter();
            match pending.find(|pending| pending.change.service == service) {
                Some(pending) => Err(self.still_waits(pending, now)),
                None => Ok(()),
            }
        })
    }

    /// Refuses a change of what has changed since a revision.
    pub(super) fn refuse_stale(
        &mut self,
        service: Option<&str>,
        expected: u64,
        now: Moment,
    ) -> Result<(), Refusal> {
        if expected > self.revision {
            return Err(Refusal {
                code: "unknown_revision",
                message: format!(
                    "there is no revision {expected}: the state is at revision {}",
                    self.revision
                ),
                help: Some("`canary-agent status` says the revision".to_owned()),
                exit_code: 1,
            });
        }
        if expected == self.revision {
            return Ok(());
        }
        let since = self.changed_since(service, expected);
        let since = since.map_err(|error| unreadable(&error))?;
        if since.is_empty() {
            return Ok(());
        }
        let what =
            service.map_or_else(|| "the state".to_owned(), |name| format!("service `{name}`"));
        let mut said: Vec<String> = since
            .iter()
            .take(NAMED)
            .map(|(revision, change)| describe::brief(*revision, change, now))
            .collect();
        if since.len() > NAMED {
            said.push("and others before".to_owned());
        }
        Err(Refusal {
            code: "stale_revision",
            message: format!("{what} has changed since revision {expected}: {}", said.join("; ")),
            help: Some(format!(
                "look at it, and if the change is still wanted, ask with --if-revision {}",
                self.revision
            )),
            exit_code: 1,
        })
    }

    /// What has changed a service (or all of them at once) since a revision: the newest first,
    /// and no more than needed.
    fn changed_since(
        &mut self,
        service: Option<&str>,
        revision: u64,
    ) -> Result<Vec<(u64, Change)>, StoreError> {
        let mut since = self.store.changes_before(service, u64::MAX, NAMED + 1)?;
        if service.is_some() {
            // Of all services at once.
            let of_all = self.store.changes_before(Some(""), u64::MAX, NAMED + 1)?;
            // What a reload has changed of a service is in the service's own line.
            since.extend(of_all.into_iter().filter(|(_, change)| change.action != "reload"));
            since.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        }
        since.retain(|(number, _)| *number > revision);
        Ok(since)
    }

    /// Something else waits for a confirmation.
    fn still_waits(&self, pending: &Pending, now: Moment) -> Refusal {
        let Pending { revision, deadline, change } = pending;
        let left = Duration::from_secs(deadline.boot_ms.saturating_sub(now.boot_ms).div_ceil(1000));
        Refusal {
            code: "confirmation_pending",
            message: format!(
                "{} waits for a confirmation, and is taken back in {}",
                describe::brief(*revision, change, now),
                humantime::format_duration(left)
            ),
            help: Some(match Thing::Reload.is_of(change) {
                true => format!(
                    "keep it with `canary-agent confirm {revision}`; otherwise the earlier configuration comes \
                     back by itself"
                ),
                false => format!(
                    "keep it with `canary-agent confirm {revision}`, or take it back with `canary-agent undo --to {}`",
                    revision - 1
                ),
            }),
            exit_code: 1,
        }
    }

    /// Until when a change that is made now is to be confirmed.
    pub(super) fn deadline(&self, within: Option<Duration>, now: Moment) -> Option<Deadline> {
        let within_ms = u64::try_from(within?.as_millis()).unwrap_or(u64::MAX);
        Some(Deadline {
            batch: self.revision + 1,
            within_ms,
            boot_ms: now.boot_ms.saturating_add(within_ms),
            boot_id: self.control.boot_id.clone(),
            unix_ms: now.unix_ms.saturating_add(within_ms),
        })
    }

    /// Refuses a proposal for a frozen service unless it only gives back to control.
    pub(super) fn thaw(&self, state: &ServiceState, proposal: &Proposal) -> Result<(), Refusal> {
        let service = &state.config().name;
        let Some(freeze) = self.control.frozen(service) else {
            return Ok(());
        };
        match towards_control(state, proposal) {
            true => Ok(()),
            false => Err(freeze::refused(service, freeze)),
        }
    }
}

/// Whether no version but control gains anything, bucket or share.
fn towards_control(state: &ServiceState, proposal: &Proposal) -> bool {
    let (before, after) = (state.ownership(), &proposal.ownership);
    let (had, has) = (before.counts(), after.counts());
    let control = usize::from(state.control());
    let others = || (0..had.len()).filter(|slot| *slot != control);
    let fraction = |split: &crate::store::Split, name: &String| {
        split.get(name).map_or(0.0, |share| share.fraction())
    };
    let shares = after
        .split
        .keys()
        .all(|name| fraction(&after.split, name) <= fraction(&before.split, name));
    // As many as had left: nobody swapped with anybody.
    let lost: u32 = others().map(|slot| had[slot].saturating_sub(has[slot])).sum();
    shares && others().all(|slot| has[slot] <= had[slot]) && proposal.moved == lost
}

/// What was given for a duration.
fn duration(text: &str) -> Result<Duration, Refusal> {
    let bad = |message: String| Refusal {
        code: "bad_confirm",
        message: format!("the time for a confirmation: {message}"),
        help: Some("write it as in the configuration, such as `90s`, `5m` or `1h`".to_owned()),
        exit_code: 2,
    };
    match config::duration(text) {
        Ok(within) if within.is_zero() => Err(bad("there has to be some".to_owned())),
        Ok(within) => Ok(within),
        Err(message) => Err(bad(message)),
    }
}

/// The audit trail can't be read.
fn unreadable(error: &StoreError) -> Refusal {
    Refusal {
        code: "state_not_read",
        message: format!("the audit trail can't be read: {error}"),
        help: Some("nothing has been changed; look at the agent's log".to_owned()),
        exit_code: 1,
    }
}
