//! Storing changes: first what is owed, and all of it where the file is another one.

use std::time::Duration;

use canary_ebpf_common::compile;

use super::{Kernel, Moment, Refusal, State, changes::Terms};
use crate::{
    failpoint::Failpoint,
    plan::News,
    store::{Admin, BackendChange, Change, Commit, FreezeChange, Split, StateStore, StoreError},
};

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Stores what a backend of a service is told to be.
    pub(super) fn store_backend(
        &mut self,
        service: usize,
        told: BackendChange,
        terms: &Terms<'_>,
        within: Option<Duration>,
        now: Moment,
    ) -> Result<(), Refusal> {
        let Commit { change, .. } =
            self.own_commit(service, "backend", Split::new(), Vec::new(), now);
        let state = &self.planner.services()[service];
        let mut record = state.stored(state.ownership());
        let BackendChange { addr, before: _, after } = told;
        match after {
            Admin::Ready => record.admins.remove(&addr),
            out => record.admins.insert(addr, out),
        };
        let deadline = self.deadline(within, now);
        let change = Change {
            before: change.after.clone(),
            uid: Some(terms.peer.uid),
            reason: terms.reason.map(str::to_owned),
            backends: vec![told],
            confirm_ms: deadline.as_ref().map(|deadline| deadline.within_ms),
            ..change
        };
        let what = format!("backend {addr} of service `{}`", record.name);
        let commit = Commit { change, record: Some(record), deadline, settles: Vec::new() };
        self.save(vec![commit], now).map_err(|error| refused(&what, &error))
    }

    /// Stores `commits`, after whatever could not be stored before, and keeps in mind what they
    /// say of confirmations and freezes.
    pub(super) fn save(&mut self, commits: Vec<Commit>, now: Moment) -> Result<(), StoreError> {
        self.store_notices(now);
        let unsaved = std::mem::take(&mut self.unsaved);
        // What is in force already comes first.
        let commits = [self.panics.commits(), commits].concat();
        let earlier = unsaved.iter().map(|news| {
            let News { service, action, before, moved } = news.clone();
            self.own_commit(service, action, before, moved, now)
        });
        let mut all: Vec<Commit> = earlier.chain(commits.iter().cloned()).collect();
        let mut stored = match all.is_empty() {
            true => Ok(self.revision),
            false => self.store.commit(self.revision, &all),
        };
        let another = matches!(stored, Err(StoreError::Stale { .. }));
        if let Err(StoreError::Stale { found, .. }) = stored {
            // Nobody else may write it while we run: the file was replaced, by an operator or
            // because it was damaged. What is in force goes into the new one.
            tracing::warn!(
                found,
                known = self.revision,
                "the state file is another one: storing everything anew"
            );
            all = self.everything(commits, now)?;
            stored = self.store.commit(found, &all);
        }
        match stored {
            Ok(revision) => {
                if another {
                    self.members.is_unknown();
                    self.control.pending.clear();
                }
                let first = revision + 1 - all.len() as u64;
                for (revision, commit) in (first..).zip(all) {
                    self.control.remember(revision, commit);
                }
                self.revision = revision;
                let adopted = self.panics.stored();
                if !adopted.is_empty() {
                    Failpoint::PanicAdopted.pass();
                    self.kernel.panics_adopted(&adopted);
                }
                self.alerts.remove("store");
                Failpoint::BeforePlan.pass();
                Ok(())
            }
            Err(error) => {
                self.unsaved = unsaved;
                self.alerts.insert("store", vec![not_stored(&error)]);
                Err(error)
            }
        }
    }

    /// What goes into a file that is not the one that was known: all that is in force, what
    /// waits for a confirmation, what is frozen, and `commits`. What that file itself says of
    /// confirmations is void; its freezes hold.
    fn everything(&mut self, commits: Vec<Commit>, now: Moment) -> Result<Vec<Commit>, StoreError> {
        let file = self.store.load()?;
        let known = |scope: &str| self.control.freeze_of(scope).is_some();
        let theirs: Vec<_> = file.freezes.into_iter().filter(|f| !known(&f.service)).collect();
        self.control.freezes.extend(theirs);
        let services = self.planner.services().iter().enumerate();
        let own = services
            .filter(|(_, state)| !state.follows())
            .map(|(service, _)| self.own_commit(service, "adopt", Split::new(), Vec::new(), now));
        let settled = |revision: u64| commits.iter().any(|c| c.settles.contains(&revision));
        let pending = self.control.pending.iter().filter(|one| !settled(one.revision)).map(|one| {
            let (change, deadline) = (one.change.clone(), Some(one.deadline.clone()));
            Commit { change, record: None, deadline, settles: Vec::new() }
        });
        let freezes = self.control.freezes.iter().map(|freeze| {
            let after = Some(freeze.reason.clone());
            let change = Change {
                unix_ms: freeze.unix_ms,
                uid: freeze.uid,
                service: freeze.service.clone(),
                action: "freeze".to_owned(),
                reason: after.clone(),
                freeze: Some(FreezeChange { before: None, after }),
                ..Change::default()
            };
            Commit { change, record: None, deadline: None, settles: Vec::new() }
        });
        // Numbers of the file that was known mean nothing in this one.
        let commits = commits.iter().map(|c| Commit { settles: Vec::new(), ..c.clone() });
        let mut all: Vec<Commit> = own.chain(pending).chain(freezes).chain(commits).collect();
        if let Some(first) = all.first_mut() {
            first.settles = file.pending.iter().map(|one| one.revision).collect();
        }
        Ok(all)
    }

    /// A change that the agent makes by itself.
    pub(super) fn own_commit(
        &self,
        service: usize,
        action: &str,
        before: Split,
        moved: Vec<u8>,
        now: Moment,
    ) -> Commit {
        let state = &self.planner.services()[service];
        let ownership = state.ownership();
        Commit {
            change: Change {
                unix_ms: now.unix_ms,
                service: state.config().name.clone(),
                action: action.to_owned(),
                before,
                after: ownership.split.clone(),
                buckets_moved: compile::decode_changes(&moved)
                    .map_or(0, |moved| moved.len() as u32),
                moved,
                slots: state.slots().to_vec(),
                ..Change::default()
            },
            record: (!state.follows()).then(|| state.stored_whole()),
            deadline: None,
            settles: Vec::new(),
        }
    }
}

pub(super) fn not_stored(error: &StoreError) -> String {
    format!("changes can't be stored and are refused: {error}")
}

/// `what` is as it was, because it can't be stored.
pub(super) fn refused(what: &str, error: &StoreError) -> Refusal {
    Refusal {
        code: "state_not_stored",
        message: format!("{what} is as it was: {}", not_stored(error)),
        help: Some("make room for it, or make it writable, and try again".to_owned()),
        exit_code: 1,
    }
}
