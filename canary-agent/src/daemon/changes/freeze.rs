//! `freeze` and `unfreeze`: a service, or all of them, may only be changed towards control.
//!
//! Shares may go down and clients back to control, since whoever freezes wants peace, not a
//! canary that can't be stopped. Backends stay as they were told. What waits for a
//! confirmation is still taken back in time: that was promised before.

use std::time::Duration;

use super::{Kernel, Moment, Refusal, State, Terms, Thing};
use crate::{
    api::model::{FreezeReport, FreezeRequest, FreezeStatus},
    daemon::{Peer, saving, split},
    store::{Change, Commit, Freeze, FreezeChange, StateStore},
};

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Freezes or unfreezes, or says what that would do.
    pub(in crate::daemon) fn freeze(
        &mut self,
        request: &FreezeRequest,
        freezes: bool,
        peer: Peer,
        now: Moment,
    ) -> Result<FreezeReport, Refusal> {
        let FreezeRequest { service, reason, dry_run, if_revision, confirm } = request;
        let scope = service.as_deref().unwrap_or_default();
        match self.planner.service(scope) {
            Some((_, state)) if state.follows() => return Err(split::follows(state)),
            None if !scope.is_empty() => {
                return Err(split::unknown_service(&self.planner, scope));
            }
            _ => {}
        }
        let reason = reason.as_deref().map(str::trim).filter(|reason| !reason.is_empty());
        if freezes && reason.is_none() {
            return Err(Refusal {
                code: "bad_reason",
                message: "a freeze needs a reason: others are told it when they are refused"
                    .to_owned(),
                help: Some("say why with --reason".to_owned()),
                exit_code: 2,
            });
        }
        let terms = Terms { peer, reason, if_revision: *if_revision, confirm: confirm.as_deref() };
        let within = self.terms(service.as_deref(), &[Thing::Freeze(scope)], &terms, now)?;
        let before = self.control.freeze_of(scope).map(|freeze| freeze.reason.clone());
        let after = reason.filter(|_| freezes).map(str::to_owned);
        if !freezes && before.is_none() {
            return Err(self.not_frozen(scope));
        }
        let mut report = FreezeReport {
            applied: !dry_run,
            service: service.clone(),
            before: before.clone(),
            frozen: after.clone(),
            notes: self.notes(scope, freezes),
            confirm_within_ms: None,
            revision: self.revision,
        };
        if !dry_run && before != after {
            let commit = self.freeze_commit(scope, FreezeChange { before, after }, within, now);
            let action = if freezes { "freeze" } else { "unfreeze" };
            let change = Change {
                action: action.to_owned(),
                uid: Some(peer.uid),
                reason: reason.map(str::to_owned),
                ..commit.change
            };
            report.confirm_within_ms = change.confirm_ms;
            self.save(vec![Commit { change, ..commit }], now)
                .map_err(|error| saving::refused(&what(scope), &error))?;
            tracing::warn!(
                service = scope,
                revision = self.revision,
                uid = peer.uid,
                reason,
                "{action}"
            );
        }
        report.revision = self.revision;
        Ok(report)
    }

    /// A change of a freeze by the agent itself.
    pub(super) fn freeze_commit(
        &self,
        scope: &str,
        freeze: FreezeChange,
        within: Option<Duration>,
        now: Moment,
    ) -> Commit {
        let deadline = self.deadline(within, now);
        Commit {
            change: Change {
                unix_ms: now.unix_ms,
                service: scope.to_owned(),
                freeze: Some(freeze),
                confirm_ms: deadline.as_ref().map(|deadline| deadline.within_ms),
                ..Change::default()
            },
            record: None,
            deadline,
            settles: Vec::new(),
        }
    }

    fn not_frozen(&self, scope: &str) -> Refusal {
        let help = match (scope.is_empty(), self.control.freeze_of("")) {
            (false, Some(_)) => "all services are: `canary-agent unfreeze` ends that".to_owned(),
            _ => match self.control.freezes.first() {
                Some(freeze) if !freeze.service.is_empty() => {
                    format!("service `{}` is", freeze.service)
                }
                _ => "nothing is".to_owned(),
            },
        };
        Refusal {
            code: "not_frozen",
            message: format!("{} is not frozen", what(scope)),
            help: Some(help),
            exit_code: 1,
        }
    }

    fn notes(&self, scope: &str, freezes: bool) -> Vec<String> {
        let mut notes = Vec::new();
        if !freezes && !scope.is_empty() && self.control.freeze_of("").is_some() {
            notes.push("all services are still frozen".to_owned());
        }
        if !freezes && scope.is_empty() {
            let still = self.control.freezes.iter().filter(|freeze| !freeze.service.is_empty());
            let still: Vec<String> = still.map(|freeze| format!("`{}`", freeze.service)).collect();
            if !still.is_empty() {
                notes.push(format!("frozen by themselves, and still: {}", still.join(", ")));
            }
        }
        let of_it = |service: &str| scope.is_empty() || service == scope;
        if freezes && self.control.pending.iter().any(|one| of_it(&one.change.service)) {
            notes.push("what waits for a confirmation is still taken back in time".to_owned());
        }
        notes
    }
}

fn what(scope: &str) -> String {
    match scope {
        "" => "the agent as a whole".to_owned(),
        service => format!("service `{service}`"),
    }
}

/// Why a change of a service is refused.
pub(in crate::daemon) fn refused(service: &str, freeze: &Freeze) -> Refusal {
    let Freeze { service: scope, reason, uid, .. } = freeze;
    let who = uid.map_or_else(|| "the agent".to_owned(), |uid| format!("uid {uid}"));
    let whole = if scope.is_empty() { " with all others" } else { "" };
    Refusal {
        code: "frozen",
        message: format!(
            "service `{service}` is frozen{whole} by {who}: {reason}; only shares may be lowered, towards control"
        ),
        help: Some(match scope.as_str() {
            "" => "`canary-agent unfreeze` ends that".to_owned(),
            scope => format!("`canary-agent unfreeze {scope}` ends that"),
        }),
        exit_code: 1,
    }
}

/// As the status shows it.
pub(in crate::daemon) fn freeze_status(freeze: &Freeze) -> FreezeStatus {
    let Freeze { service: _, revision, unix_ms, uid, reason } = freeze;
    FreezeStatus { reason: reason.clone(), revision: *revision, unix_ms: *unix_ms, uid: *uid }
}
