//! Taking changes back.
//!
//! Going back is a change like any other: it has a revision, a line in the audit trail, and
//! exactly the buckets back that the changes took. It is made from the lists that the audit
//! trail keeps, the newest first, so it stops where the configuration has changed a service's
//! owners: what follows from a file is changed in the file.
//!
//! Without a revision, the last change that an operator (or a rollout) has made is taken back, and what was
//! taken back is not taken back again that way: who types `undo` twice, not knowing whether
//! the first has worked, must not be where he began. `undo --to` goes anywhere.

use std::{collections::BTreeMap, time::Instant};

use canary_ebpf_common::share::Share;
use tokio::sync::oneshot;

use super::{
    Kernel, Moment, Refusal, State, Terms, Thing, changes_split,
    describe::{self, told},
    freeze, unreadable,
};
use crate::{
    api::model::{ServiceUndo, UndoReport, UndoRequest},
    daemon::{
        Peer, backends,
        held::{self, NOT_COUNTED},
        rollout::ACTION as ROLLOUT,
        saving, split,
    },
    plan::{BucketSet, Proposal, UndoError, Undone},
    store::{Admin, BackendChange, Change, Commit, Deadline, KEPT_LISTS, Split, StateStore},
};

/// Changes with their revisions, the newest first.
type Changes = Vec<(u64, Change)>;

/// By service, which buckets of its tables go elsewhere.
type Moved = Vec<(usize, Vec<BucketSet>)>;

/// So many changes are looked at first for the last one.
const FIRST_LOOK: usize = 8;

/// What going back makes of one service.
struct Back {
    at: usize,
    proposal: Proposal,
    told: Vec<BackendChange>,
    /// Revisions that it takes back, newest first.
    about: Vec<u64>,
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Takes changes back, or says what that would do, and answers.
    pub(in crate::daemon) fn undo(
        &mut self,
        request: &UndoRequest,
        peer: Peer,
        (arrived, now): (Instant, Moment),
        reply: oneshot::Sender<Result<UndoReport, Refusal>>,
    ) {
        let (mut report, moved) = match self.take_back(request, peer, arrived, now) {
            Ok(done) => done,
            Err(refusal) => return drop(reply.send(Err(refusal))),
        };
        let counts = moved.iter().all(|(at, _)| self.counts(*at));
        if !counts && report.buckets_moved > 0 {
            report.notes.push(NOT_COUNTED.to_owned());
        }
        let counter = if counts && !moved.is_empty() { self.kernel.counter() } else { None };
        let wanted = moved.into_iter().flat_map(|(at, moved)| self.counted(at, moved)).collect();
        held::answer(reply, report, counter, wanted, |report, census| {
            report.connections_held = Some(census.in_buckets);
        });
    }

    /// The report, and what goes elsewhere.
    fn take_back(
        &mut self,
        request: &UndoRequest,
        peer: Peer,
        arrived: Instant,
        now: Moment,
    ) -> Result<(UndoReport, Moved), Refusal> {
        let UndoRequest { service, to, reason, dry_run, force, if_revision, confirm } = request;
        let service = service.as_deref();
        if let Some(name) = service {
            match self.planner.service(name) {
                None => return Err(split::unknown_service(&self.planner, name)),
                Some((_, state)) if state.follows() => return Err(split::follows(state)),
                Some(_) => {}
            }
        }
        let (confirm, reason) = (confirm.as_deref(), reason.as_deref());
        let terms = Terms { peer, reason, if_revision: *if_revision, confirm };
        let within = self.terms(service, &[], &terms, now)?;
        let mut notes = Vec::new();
        let changes = match to {
            None => {
                let last = self.last_change(service)?;
                self.with_others(service, last)?
            }
            Some(to) => self.changes_since(service, *to, &mut notes)?,
        };
        let backs = self.back(&changes, &mut notes)?;
        for Back { at, proposal, told, about } in &backs {
            let state = &self.planner.services()[*at];
            self.thaw(state, proposal)?;
            if let (Some(_), Some(freeze)) =
                (told.first(), self.control.frozen(&state.config().name))
            {
                return Err(freeze::refused(&state.config().name, freeze));
            }
            let out = told.iter().filter(|one| one.before == Admin::Ready && !force);
            for one in out {
                backends::last_of_version(state, one.addr, one.after)?;
            }
            self.refuse_waiting(*at, proposal, told, about, now)?;
        }
        let mut report = UndoReport {
            undone: changes.iter().map(|(number, one)| describe::change(0, *number, one)).collect(),
            services: backs.iter().map(|back| self.service_undo(back)).collect(),
            notes,
            ..UndoReport::default()
        };
        let moved = self.previews(&backs, &mut report);
        if !dry_run {
            let deadline = self.deadline(within, now);
            report.confirm_within_ms = deadline.as_ref().map(|deadline| deadline.within_ms);
            self.go_back(backs, Some(peer.uid), reason, deadline, now)?;
            self.settle_or_refuse(now)?;
            tracing::info!(
                revision = self.revision,
                uid = peer.uid,
                reason,
                undone = ?changes.iter().map(|(number, _)| number).collect::<Vec<_>>(),
                buckets_moved = report.buckets_moved,
                "changes are taken back"
            );
        }
        report.applied = !dry_run;
        report.revision = self.revision;
        report.took_us = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok((report, moved))
    }

    /// What somebody waits to confirm is only touched by taking it back itself.
    fn refuse_waiting(
        &self,
        at: usize,
        proposal: &Proposal,
        told: &[BackendChange],
        about: &[u64],
        now: Moment,
    ) -> Result<(), Refusal> {
        let state = &self.planner.services()[at];
        let name = state.config().name.as_str();
        let mut things: Vec<Thing<'_>> =
            told.iter().map(|one| Thing::Backend(name, one.addr)).collect();
        if proposal.moved > 0 || proposal.ownership.split != state.ownership().split {
            things.push(Thing::Split(name));
        }
        let others = self.control.pending.iter().filter(|one| !about.contains(&one.revision));
        let mut others = others.filter(|one| things.iter().any(|thing| thing.is_of(&one.change)));
        others.next().map_or(Ok(()), |pending| Err(self.still_waits(pending, now)))
    }

    /// Says what moves, backends included. Returns by service which buckets. Where backends are
    /// told something those count, as they do for who told them so; else those with another owner.
    fn previews(&mut self, backs: &[Back], report: &mut UndoReport) -> Moved {
        let mut touched = std::collections::BTreeSet::new();
        let mut all = Vec::new();
        for (Back { at, proposal, told, .. }, service) in backs.iter().zip(&mut report.services) {
            let told: Vec<_> = told.iter().map(|one| (one.addr, one.after)).collect();
            let preview = self.planner.preview(*at, Some(&proposal.ownership), &told);
            if !told.is_empty() {
                service.buckets_moved = preview.moved.iter().map(BucketSet::len).sum();
            }
            report.buckets_moved += service.buckets_moved;
            touched.extend(preview.touched);
            all.push((*at, preview.moved));
        }
        report.backends_touched = touched.iter().map(ToString::to_string).collect();
        all
    }

    fn service_undo(&self, back: &Back) -> ServiceUndo {
        let Back { at, proposal, told: backends, .. } = back;
        let state = &self.planner.services()[*at];
        let report = split::report(state, state.ownership(), proposal, &[]);
        ServiceUndo {
            service: report.service,
            versions: report.versions,
            buckets_moved: proposal.moved,
            backends: backends.iter().map(told).collect(),
        }
    }

    /// Stores what going back makes of services, and plans it.
    fn go_back(
        &mut self,
        backs: Vec<Back>,
        uid: Option<u32>,
        reason: Option<&str>,
        deadline: Option<Deadline>,
        now: Moment,
    ) -> Result<(), Refusal> {
        let mut names = Vec::new();
        let mut commits = Vec::new();
        for Back { at, proposal, told, about } in &backs {
            let state = &self.planner.services()[*at];
            let mut record = state.stored(&proposal.ownership);
            for BackendChange { addr, after, .. } in told {
                match after {
                    Admin::Ready => record.admins.remove(addr),
                    out => record.admins.insert(*addr, *out),
                };
            }
            let waits = self.control.pending.iter().map(|pending| pending.revision);
            names.push(format!("`{}`", state.config().name));
            commits.push(Commit {
                change: Change {
                    unix_ms: now.unix_ms,
                    uid,
                    service: state.config().name.clone(),
                    action: "undo".to_owned(),
                    reason: reason.map(str::to_owned),
                    before: state.ownership().split.clone(),
                    after: proposal.ownership.split.clone(),
                    moved: proposal.change_list.clone(),
                    buckets_moved: proposal.moved,
                    slots: state.slots().to_vec(),
                    salt: Some(state.ownership().salt),
                    backends: told.clone(),
                    about: about.clone(),
                    confirm_ms: deadline.as_ref().map(|deadline| deadline.within_ms),
                    freeze: None,
                },
                record: Some(record),
                deadline: deadline.clone(),
                settles: waits.filter(|revision| about.contains(revision)).collect(),
            });
        }
        let what = format!("the state of {}", names.join(", "));
        self.save(commits, now).map_err(|error| saving::refused(&what, &error))?;
        for Back { at, proposal, told, .. } in backs {
            self.planner.set_ownership(at, proposal.ownership);
            for BackendChange { addr, after, .. } in told {
                self.planner.set_admin(at, addr, after);
            }
            self.supersede(at);
        }
        Ok(())
    }

    /// What taking `changes` back makes of each service that they were about.
    fn back(
        &self,
        changes: &[(u64, Change)],
        notes: &mut Vec<String>,
    ) -> Result<Vec<Back>, Refusal> {
        let mut by_service: BTreeMap<&str, Vec<&(u64, Change)>> = BTreeMap::new();
        for change in changes {
            by_service.entry(change.1.service.as_str()).or_default().push(change);
        }
        let mut backs = Vec::new();
        for (name, changes) in by_service {
            let Some((at, state)) = self.planner.service(name) else {
                notes.push(format!("service `{name}` is not configured any more: left out"));
                continue;
            };
            if state.follows() {
                notes.push(format!(
                    "`{name}` has what its service has: what its rollout has given more is not for an undo"
                ));
                continue;
            }
            let undone: Vec<Undone<'_>> = changes
                .iter()
                .filter(|(_, change)| changes_split(change) || change.moved.is_empty())
                .filter(|(_, change)| change.action != "backend")
                .map(|(revision, change)| Undone {
                    revision: *revision,
                    slots: &change.slots,
                    moved: &change.moved,
                    before: &change.before,
                    salt: change.salt,
                })
                .collect();
            let proposal =
                state.propose_undo(&undone).map_err(|error| cannot(name, &changes, &error))?;
            let told = self.told_back(at, &changes, notes);
            let ownership = state.ownership();
            if proposal.ownership != *ownership || !told.is_empty() {
                let about = changes.iter().map(|(revision, _)| *revision).collect();
                backs.push(Back { at, proposal, told, about });
            }
        }
        match backs.is_empty() {
            true => Err(nothing("everything is as it was before")),
            false => Ok(backs),
        }
    }

    /// What backends were before `changes`, as far as they are something else now.
    fn told_back(
        &self,
        at: usize,
        changes: &[&(u64, Change)],
        notes: &mut Vec<String>,
    ) -> Vec<BackendChange> {
        let state = &self.planner.services()[at];
        let configured = |addr| {
            let versions = &state.config().versions;
            versions.iter().flat_map(|version| &version.backends).any(|b| b.addr == addr)
        };
        let mut were = BTreeMap::new();
        for one in changes.iter().flat_map(|(_, change)| &change.backends) {
            were.insert(one.addr, one.before);
        }
        let mut told = Vec::new();
        for (addr, after) in were {
            let before = state.admins().get(&addr).copied().unwrap_or_default();
            if !configured(addr) {
                notes.push(format!("{addr} is not configured any more: left out"));
            } else if before != after {
                told.push(BackendChange { addr, before, after });
            }
        }
        told
    }

    /// The last change that an operator has made.
    fn last_change(&mut self, service: Option<&str>) -> Result<(u64, Change), Refusal> {
        let mut barred: BTreeMap<String, (u64, String)> = BTreeMap::new();
        let (mut before, mut look) = (u64::MAX, FIRST_LOOK);
        loop {
            let found = self.store.changes_before(service, before, look);
            let found = found.map_err(|error| unreadable(&error))?;
            let (full, oldest) = (found.len() == look, found.last().map(|(number, _)| *number));
            for (revision, change) in found {
                // What rollouts give audiences ends with them.
                let follows = self.planner.service(&change.service);
                if change.action == ROLLOUT && follows.is_some_and(|(_, state)| state.follows()) {
                    continue;
                }
                match Kind::of(&change) {
                    Kind::Made if barred.contains_key(&change.service) => {
                        let (by, action) = &barred[&change.service];
                        return Err(in_the_way(&change.service, *by, action));
                    }
                    Kind::Made => return Ok((revision, change)),
                    Kind::Undone => return Err(undone_already(service, revision, &change)),
                    Kind::Given | Kind::Begun => {
                        let by = (revision, change.action.clone());
                        barred.entry(change.service).or_insert(by);
                    }
                    Kind::Other => {}
                }
            }
            match oldest {
                Some(oldest) if full && look < KEPT_LISTS as usize => {
                    (before, look) = (oldest, look * 4);
                }
                _ => return Err(nothing("no operator has changed anything")),
            }
        }
    }

    /// A change together with those that were made by the same command: of a panic of all
    /// services there is one for each.
    fn with_others(
        &mut self,
        service: Option<&str>,
        last: (u64, Change),
    ) -> Result<Changes, Refusal> {
        let mut all = vec![last];
        if service.is_some() || all[0].1.action != "panic" {
            return Ok(all);
        }
        loop {
            let next = all[all.len() - 1].0;
            let found = self.store.changes_before(None, next, FIRST_LOOK * 8);
            let found = found.map_err(|error| unreadable(&error))?;
            if found.is_empty() {
                return Ok(all);
            }
            for (revision, change) in found {
                let (first, before) = (&all[0].1, all[all.len() - 1].0);
                let same = change.action == "panic"
                    && (change.unix_ms, change.uid) == (first.unix_ms, first.uid)
                    && change.reason == first.reason;
                if !same || revision + 1 != before {
                    return Ok(all);
                }
                all.push((revision, change));
            }
        }
    }

    /// All changes since a revision, the newest first, as far as they can be taken back.
    fn changes_since(
        &mut self,
        service: Option<&str>,
        to: u64,
        notes: &mut Vec<String>,
    ) -> Result<Changes, Refusal> {
        if to >= self.revision {
            let (code, what) = match to == self.revision {
                true => ("nothing_to_undo", "that is where the state is"),
                false => ("unknown_revision", "there is no such revision yet"),
            };
            return Err(Refusal {
                code,
                message: format!(
                    "the state can't go back to revision {to}: {what} (it is at {})",
                    self.revision
                ),
                help: Some("`canary-agent events` lists changes with their revisions".to_owned()),
                exit_code: 1,
            });
        }
        let most = KEPT_LISTS as usize;
        let found = self.store.changes(to, most + 1).map_err(|error| unreadable(&error))?;
        if found.len() > most {
            return Err(Refusal {
                code: "too_far_back",
                message: format!(
                    "revision {to} is too long ago: lists of buckets are kept for {most} changes"
                ),
                help: Some("set the shares with `canary-agent split`".to_owned()),
                exit_code: 1,
            });
        }
        let mut begun: Vec<String> = Vec::new();
        let mut changes = Vec::new();
        for (revision, change) in found.into_iter().rev() {
            let its = |name: &str| change.service.is_empty() || change.service == name;
            if !service.is_none_or(its) || begun.contains(&change.service) {
                continue;
            }
            match Kind::of(&change) {
                Kind::Made | Kind::Undone => changes.push((revision, change)),
                Kind::Given => return Err(in_the_way(&change.service, revision, &change.action)),
                Kind::Begun => {
                    notes.push(format!(
                        "service `{}` has been there since revision {revision} only: it goes back so far",
                        change.service
                    ));
                    begun.push(change.service);
                }
                Kind::Other if change.freeze.is_some() => {
                    notes.push(format!("the {} of revision {revision} stays", change.action));
                }
                Kind::Other => {}
            }
        }
        match changes.is_empty() {
            true => Err(nothing("no operator has changed anything since")),
            false => Ok(changes),
        }
    }

    /// Takes back what has not been confirmed: all of one batch. Where the buckets have moved
    /// since for another reason, its shares are what comes back.
    pub(super) fn take_back_unconfirmed(
        &mut self,
        changes: &[(u64, Change)],
        reason: &str,
        now: Moment,
    ) -> Result<(), Refusal> {
        let mut notes = Vec::new();
        let mut backs = Vec::new();
        // One by one: what one service is in the way of must not keep the others.
        let mut names: Vec<&str> = changes.iter().map(|(_, one)| one.service.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let its: Changes =
                changes.iter().filter(|(_, one)| one.service == name).cloned().collect();
            match self.back(&its, &mut notes) {
                Ok(more) => backs.extend(more),
                Err(refusal) if refusal.code == "nothing_to_undo" => {}
                Err(refusal) => {
                    tracing::warn!(service = name, "{refusal}: going back to its shares instead");
                    backs.extend(self.back_by_share(&its));
                }
            }
        }
        let done: Vec<u64> = backs.iter().flat_map(|back| back.about.clone()).collect();
        if !backs.is_empty() {
            self.go_back(backs, None, Some(reason), None, now)?;
        }
        // What there was nothing to take back of is over all the same.
        let over = changes.iter().filter(|(revision, _)| !done.contains(revision));
        let over: Vec<&(u64, Change)> = over.collect();
        if !over.is_empty() {
            self.end_pending(&over, reason, now)?;
        }
        Ok(())
    }

    fn back_by_share(&self, changes: &[(u64, Change)]) -> Option<Back> {
        let (_, oldest) = changes.last()?;
        let (at, state) = self.planner.service(&oldest.service)?;
        let before: &Split = &oldest.before;
        let proposal = state.propose_back(before).ok()?;
        let all: Vec<&(u64, Change)> = changes.iter().collect();
        let told = self.told_back(at, &all, &mut Vec::new());
        Some(Back {
            at,
            proposal,
            told,
            about: changes.iter().map(|(number, _)| *number).collect(),
        })
    }
}

/// What going back makes of a change in the audit trail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// An operator's: it can be taken back.
    Made,
    /// It took others back.
    Undone,
    /// From the configuration, with effects on shares or buckets: it is in the way.
    Given,
    /// The first of its service: there is nothing before it.
    Begun,
    /// Neither shares nor backends changed by it.
    Other,
}

impl Kind {
    fn of(change: &Change) -> Self {
        match change.action.as_str() {
            "split" | "backend" | "panic" | ROLLOUT => Self::Made,
            "undo" if change.freeze.is_none() => Self::Undone,
            "initial" => Self::Begun,
            "adopt" => Self::Given,
            _ if alters(change) => Self::Given,
            _ => Self::Other,
        }
    }
}

/// Whether something else than an operator's command has moved buckets, altered shares or told
/// backends. A share of nothing that goes with its version is no difference.
fn alters(change: &Change) -> bool {
    let some = |split: &Split| -> Split {
        let shares = split.iter().filter(|(_, share)| **share != Share::ZERO);
        shares.map(|(name, share)| (name.clone(), *share)).collect()
    };
    let shares = some(&change.before) != some(&change.after);
    // A list of nothing is one byte long.
    change.moved.len() > 1 || shares || !change.backends.is_empty()
}

fn nothing(why: &str) -> Refusal {
    Refusal {
        code: "nothing_to_undo",
        message: format!("there is nothing to take back: {why}"),
        help: Some("`canary-agent events` lists changes with their revisions".to_owned()),
        exit_code: 1,
    }
}

/// The last change took others back.
fn undone_already(service: Option<&str>, revision: u64, change: &Change) -> Refusal {
    let only = service.map_or_else(String::new, |name| format!("{name} "));
    Refusal {
        code: "undone_already",
        message: format!(
            "the last change, revision {revision}, is itself an {}",
            describe::text(&Change { service: String::new(), ..change.clone() })
        ),
        help: Some(format!(
            "`canary-agent undo {only}--to {}` brings that back; `canary-agent events` lists revisions to go \
             further back to",
            revision - 1
        )),
        exit_code: 1,
    }
}

/// The configuration has changed it since.
fn in_the_way(service: &str, revision: u64, action: &str) -> Refusal {
    let why = match action {
        "initial" => "the service was begun anew",
        "adopt" => "its state was taken over from the maps, and older changes are not known",
        _ => "the configuration has changed its shares or buckets",
    };
    Refusal {
        code: "configured_since",
        message: format!(
            "service `{service}` can't go back past revision {revision} (`{action}`): {why}"
        ),
        help: Some(format!(
            "go back no further than `canary-agent undo {service} --to {revision}`, or set the shares with \
             `canary-agent split {service}`"
        )),
        exit_code: 1,
    }
}

/// The lists do not fit.
fn cannot(service: &str, changes: &[&(u64, Change)], error: &UndoError) -> Refusal {
    let oldest = changes.last().map(|(_, change)| &change.before);
    let before = oldest.map(|split| {
        let shares = split.iter().map(|(name, share)| format!(" {name}={share}"));
        shares.collect::<String>()
    });
    Refusal {
        code: "undo_impossible",
        message: format!("service `{service}` can't go back: {error}"),
        help: Some(format!(
            "set the shares that it had: `canary-agent split {service}{}`",
            before.unwrap_or_default()
        )),
        exit_code: 1,
    }
}
