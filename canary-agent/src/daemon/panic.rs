//! Everything to control: asked for over the socket, or found in the maps.
//!
//! Who does it without an agent writes the tables by himself and leaves a mark for each. The loop
//! looks for marks before it does anything else, and before it writes a table it reads it anew:
//! so an agent that was stopped in the middle of a change does not take a panic back when it goes
//! on. What is marked is stored like any change, with the uid and the reason of the mark, and
//! the mark is done with only then.
//!
//! A panic does not wait for a disk. It is marked in the maps, put in force, and stored after that,
//! if it must be as soon as that can be: an agent that ends before finds the mark. What the store
//! and the answer need is computed then, too.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use canary_ebpf_common::{Packed, compile};
use tokio::sync::oneshot;

use super::{
    Kernel, Moment, Peer, Refusal, State,
    changes::Thing,
    held::{self, NOT_COUNTED},
    rollout::ACTION as ROLLOUT,
    saving::not_stored,
    split,
    state::{changed, micros, tables_of},
};
use crate::{
    api::panic::{PanicReport, PanicRequest, PanicService},
    datapath::PanicOrder,
    parallel,
    plan::{Adopted, BucketSet, Diversion, PanicMark, panic_of_parked},
    store::{Change, Commit, StateStore},
};

/// So many requests are known again by their name.
const KNOWN_IDS: usize = 64;
/// So many changes of a service are looked through for one that a mark is about.
const LOOKED_AT: usize = 64;

/// What is in force and not stored, and what was done lately.
#[derive(Debug, Default)]
pub(super) struct Panics {
    owed: Vec<Owed>,
    /// Names of requests that were carried out.
    ids: VecDeque<u64>,
}

/// A change that is in force and not stored yet.
#[derive(Clone, Debug)]
struct Owed {
    commit: Commit,
    marks: Vec<PanicMark>,
    /// Owners before and after it, which the commit does not have yet: a panic is not to wait until
    /// they are written down.
    unwritten: Option<[Arc<Packed<u8>>; 2]>,
}

impl Owed {
    /// Writes down what is missing.
    fn complete(&mut self) {
        let Some([before, after]) = self.unwritten.take() else { return };
        let (before, after) = (before.plain(), after.plain());
        self.commit.change.moved = compile::encode_changes(&compile::difference(&before, &after));
        if let Some(record) = &mut self.commit.record {
            record.owners = compile::encode_owners(&after);
        }
    }
}

impl Panics {
    fn know(&mut self, id: Option<u64>) {
        let Some(id) = id else { return };
        if self.ids.len() >= KNOWN_IDS {
            self.ids.pop_front();
        }
        self.ids.push_back(id);
    }

    /// What is to be stored before anything else.
    pub(super) fn commits(&mut self) -> Vec<Commit> {
        let unwritten = self.owed.iter().filter_map(|owed| owed.unwritten.as_ref());
        let buckets = unwritten.map(|[owners, _]| owners.len()).sum();
        parallel::map(self.owed.iter_mut().collect(), buckets, Owed::complete);
        self.owed.iter().map(|owed| owed.commit.clone()).collect()
    }

    /// All of it is stored. Returns the marks that are done with.
    pub(super) fn stored(&mut self) -> Vec<PanicMark> {
        std::mem::take(&mut self.owed).into_iter().flat_map(|owed| owed.marks).collect()
    }

    /// Whether something waits to be stored that ends what waits for a confirmation since
    /// `revision`.
    pub(super) fn settles(&self, revision: u64) -> bool {
        self.owed.iter().any(|owed| owed.commit.settles.contains(&revision))
    }

    /// Whether `marks` are of something that waits to be stored: then they are done with when it
    /// is.
    fn waits_for(&mut self, marks: &[PanicMark]) -> bool {
        let its = |owed: &&mut Owed| {
            let change = &owed.commit.change;
            let of = |mark: &PanicMark| {
                (&mark.service, mark.unix_ms, Some(mark.uid))
                    == (&change.service, change.unix_ms, change.uid)
            };
            marks.iter().any(of)
        };
        let owed = self.owed.iter_mut().find(its);
        owed.map(|owed| owed.marks.extend_from_slice(marks)).is_some()
    }

    /// A change is in force, or about to be, and to be stored; `marks` in the maps say so.
    pub(super) fn owe(&mut self, commit: Commit, marks: Vec<PanicMark>) {
        self.owed.push(Owed { commit, marks, unwritten: None });
    }

    /// Whether something of a service waits to be stored.
    fn owes(&self, service: &str) -> bool {
        self.owed.iter().any(|owed| owed.commit.change.service == service)
    }

    /// Whether something waits to be stored.
    pub(super) fn is_owing(&self) -> bool {
        !self.owed.is_empty()
    }
}

/// By whom, when and why.
struct Cause<'a> {
    uid: u32,
    unix_ms: u64,
    reason: Option<&'a str>,
}

/// What a panic is about: by service which buckets of its tables.
type Moved = Vec<(usize, Vec<BucketSet>)>;

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Sends everything to control or says what that would do, and answers.
    pub(super) fn ask_panic(
        &mut self,
        request: &PanicRequest,
        peer: Peer,
        (arrived, now): (Instant, Moment),
        reply: oneshot::Sender<Result<PanicReport, Refusal>>,
    ) {
        let (mut report, moved) = match self.panic(request, peer, arrived, now) {
            Ok(done) => done,
            Err(refusal) => return drop(reply.send(Err(refusal))),
        };
        let counts = moved.iter().all(|(at, _)| self.counts(*at));
        if !counts && report.buckets_moved > 0 {
            report.notes.push(NOT_COUNTED.to_owned());
        }
        // Of connections that are being cut there may be fewer every moment.
        let counts = counts && (request.dry_run || !request.moves);
        let counter = if counts && !moved.is_empty() { self.kernel.counter() } else { None };
        let wanted = moved.into_iter().flat_map(|(at, moved)| self.counted(at, moved)).collect();
        held::answer(reply, report, counter, wanted, |report, census| {
            report.connections_held = Some(census.in_buckets);
        });
    }

    fn panic(
        &mut self,
        request: &PanicRequest,
        peer: Peer,
        arrived: Instant,
        now: Moment,
    ) -> Result<(PanicReport, Moved), Refusal> {
        let PanicRequest { service, moves, reason, dry_run, id } = request;
        let mut report = PanicReport {
            applied: !dry_run,
            by: "agent".to_owned(),
            revision: Some(self.revision),
            ..PanicReport::default()
        };
        if id.is_some_and(|id| self.panics.ids.contains(&id)) {
            report.notes.push("it was carried out already, through the maps".to_owned());
            return Ok((report, Moved::new()));
        }
        let targets: Vec<usize> = match service {
            Some(name) => match self.planner.service(name.as_str()) {
                Some((_, state)) if state.follows() => return Err(split::follows(state)),
                Some((at, _)) => self.planner.with_derived(at).collect(),
                None => return Err(split::unknown_service(&self.planner, name)),
            },
            None => (0..self.planner.services().len()).collect(),
        };
        let (mut sent, mut buckets) = (Vec::new(), 0);
        for at in targets {
            let state = &self.planner.services()[at];
            let name = state.config().name.clone();
            let refused = state
                .control_taken_out()
                .then(|| nobody_left(&name, &state.config().versions[state.config().control].name));
            match refused {
                Some(refusal) if service.is_some() => return Err(refusal),
                Some(refusal) => report.services.push(PanicService {
                    service: name,
                    refused: Some(refusal.message),
                    ..PanicService::default()
                }),
                None => {
                    buckets += state.tables().iter().map(|t| t.entries().len()).sum::<usize>();
                    report.services.push(PanicService { service: name, ..PanicService::default() });
                    sent.push((at, report.services.len() - 1));
                }
            }
        }
        let planner = &self.planner;
        let proposed = parallel::map(sent, buckets, |(at, listed)| {
            (at, listed, planner.services()[at].propose_panic())
        });
        let mut proposals: Vec<(usize, &Diversion)> = Vec::new();
        for (at, listed, diversion) in &proposed {
            report.services[*listed].buckets_moved = diversion.moved;
            report.buckets_moved += diversion.moved;
            if *moves || !diversion.is_nothing() {
                proposals.push((*at, diversion));
            }
        }
        let mut moved = Moved::new();
        let mut touched = BTreeSet::new();
        if *dry_run {
            for (at, diversion) in &proposals {
                let preview = self.planner.preview(*at, Some(&diversion.ownership), &[]);
                touched.extend(preview.touched.iter().map(ToString::to_string));
                moved.push((*at, preview.moved));
            }
        } else {
            let tables: Vec<_> =
                proposals.iter().map(|(at, _)| (*at, tables_of(&self.planner, *at))).collect();
            self.panics.know(*id);
            let asked = Asked { request, peer, id: id.unwrap_or_default() };
            let marked = self.carry_out(proposals, &asked, now, &mut report.notes);
            if !marked {
                self.store_asked(now, &mut report.notes);
            }
            self.settle(now);
            report.took_us = micros(arrived.elapsed());
            if marked {
                self.store_asked(now, &mut report.notes);
            }
            self.in_force_or_refused()?;
            let planner = &self.planner;
            for (at, (names, buckets)) in parallel::map(tables, buckets, |(at, tables)| {
                (at, changed(&planner.services()[at], &tables))
            }) {
                touched.extend(names);
                moved.push((at, buckets));
            }
            tracing::warn!(
                service = service.as_deref().unwrap_or("(all)"),
                revision = self.revision,
                uid = peer.uid,
                reason = reason.as_deref(),
                moves,
                buckets_moved = report.buckets_moved,
                took_us = report.took_us,
                "panic: everything goes to control"
            );
        }
        let planner = &self.planner;
        for (listed, versions) in parallel::map(proposed, buckets, |(at, listed, diversion)| {
            let Diversion { before, ownership, .. } = &diversion;
            (listed, split::shares(&planner.services()[at], before, ownership))
        }) {
            report.services[listed].versions = versions;
        }
        if *moves {
            report.notes.push(MOVES.to_owned());
        }
        report.backends_touched = touched.into_iter().collect();
        report.revision = Some(self.revision);
        if report.took_us == 0 {
            report.took_us = micros(arrived.elapsed());
        }
        Ok((report, moved))
    }

    /// Marks a panic in the maps, to be stored, and plans it. Returns whether it is marked.
    fn carry_out(
        &mut self,
        proposals: Vec<(usize, &Diversion)>,
        asked: &Asked<'_>,
        now: Moment,
        notes: &mut Vec<String>,
    ) -> bool {
        if proposals.is_empty() {
            return true;
        }
        let PanicRequest { reason, moves, .. } = asked.request;
        let name = |(at, _): &(usize, _)| self.planner.services()[*at].config().name.clone();
        let order = PanicOrder {
            services: Some(proposals.iter().map(name).collect()),
            moves: *moves,
            back: None,
            reason: reason.clone(),
            uid: asked.peer.uid,
            id: asked.id,
            unix_ms: now.unix_ms,
            now_ms: now.boot_ms,
            dry_run: false,
        };
        let marks = self.kernel.mark_panic(&order);
        let marked = marks.is_ok();
        let marks = marks.unwrap_or_else(|error| {
            tracing::error!(error, "a panic can't be marked in the maps");
            Vec::new()
        });
        let mut by_service: HashMap<String, Vec<PanicMark>> = HashMap::new();
        for mark in marks {
            by_service.entry(mark.service.clone()).or_default().push(mark);
        }
        let cause = Cause { uid: asked.peer.uid, unix_ms: now.unix_ms, reason: reason.as_deref() };
        for (at, diversion) in proposals {
            let mut owed = self.panic_owed(at, diversion, &cause, notes);
            owed.marks = by_service.remove(&owed.commit.change.service).unwrap_or_default();
            self.panics.owed.push(owed);
            self.planner.panic(at, diversion.ownership.clone(), *moves);
            self.supersede(at);
        }
        marked
    }

    /// Stores what [`carry_out`](Self::carry_out) has left to be, or says that it is not.
    fn store_asked(&mut self, now: Moment, notes: &mut Vec<String>) {
        if let Err(why) = self.store_panics(now) {
            notes.push(format!(
                "it is in force, and not in the audit trail before that can be written: {why}"
            ));
        }
    }

    /// A panic's line in the audit trail. What waited for a confirmation does not any more: it
    /// must not be taken back to something else than control.
    fn panic_owed(
        &self,
        at: usize,
        diversion: &Diversion,
        cause: &Cause<'_>,
        notes: &mut Vec<String>,
    ) -> Owed {
        let Diversion { moved, before, ownership } = diversion;
        let state = &self.planner.services()[at];
        let name = &state.config().name;
        let waits = self.control.pending.iter();
        let waits = waits.filter(|one| Thing::Split(name).is_of(&one.change));
        let settles: Vec<u64> = waits.map(|one| one.revision).collect();
        for revision in &settles {
            notes.push(format!(
                "revision {revision} of service `{name}` waits for a confirmation no more: it is \
                 not taken back by itself, and counts again if this is undone"
            ));
        }
        let commit = Commit {
            change: Change {
                unix_ms: cause.unix_ms,
                uid: Some(cause.uid),
                service: name.clone(),
                action: "panic".to_owned(),
                reason: cause.reason.map(str::to_owned),
                before: before.split.clone(),
                after: ownership.split.clone(),
                buckets_moved: *moved,
                slots: state.slots().to_vec(),
                salt: Some(before.salt),
                about: settles.iter().rev().copied().collect(),
                ..Change::default()
            },
            record: (!state.follows()).then(|| state.stored_without_owners(ownership)),
            deadline: None,
            settles,
        };
        let unwritten = Some([Arc::clone(&before.owners), Arc::clone(&ownership.owners)]);
        Owed { commit, marks: Vec::new(), unwritten }
    }

    /// Makes what was done to the maps behind our back our own. Returns whether there was
    /// anything.
    pub(super) fn adopt_panics(&mut self, now: Moment) -> bool {
        let mut found = match self.kernel.panics() {
            Ok(None) => return false,
            Ok(Some(found)) => found,
            Err(error) => {
                let alert = format!("what `canary-agent panic` has written can't be read: {error}");
                if self.alerts.insert("panic", vec![alert.clone()]).is_none() {
                    tracing::error!("{alert}");
                }
                return false;
            }
        };
        self.alerts.remove("panic");
        let Adopted { services, panics, .. } = &mut found;
        services.retain(|table| panics.iter().any(|mark| mark.table == table.id));
        self.planner.resync(services, now.boot_ms);
        // Whatever was about to be written is planned from what is there now.
        self.retry_ms.get_or_insert(now.boot_ms);
        self.adopt_marks(found.panics);
        // Otherwise with the next change, or in a second.
        let _ = self.store_panics(now);
        true
    }

    /// Plans what marks in the maps say. It is stored with the next change, or by
    /// [`store_panics`](Self::store_panics).
    pub(super) fn adopt_marks(&mut self, marks: Vec<PanicMark>) {
        let mut by_service: BTreeMap<String, Vec<PanicMark>> = BTreeMap::new();
        for mark in marks {
            by_service.entry(mark.service.clone()).or_default().push(mark);
        }
        // One request may be about many of them.
        let known_ids = self.panics.ids.clone();
        for (name, marks) in by_service {
            // Everything to control is more than a share.
            let first = marks.iter().find(|mark| mark.back.is_none()).unwrap_or(&marks[0]).clone();
            let PanicMark { uid, unix_ms, id, back, .. } = first;
            let moves = marks.iter().any(|mark| mark.moves);
            let waits = self.panics.waits_for(&marks);
            let known = waits || known_ids.contains(&id) || self.is_recorded(&name, &first);
            if !self.panics.ids.contains(&id) {
                self.panics.know(Some(id));
            }
            let cause = Cause { uid, unix_ms, reason: first.reason.as_deref() };
            if waits {
                // Our own, and not stored yet.
            } else if known {
                self.kernel.panics_adopted(&marks);
            } else if let (Some(back), Some((at, _))) = (back, self.planner.service(&name)) {
                if let Some(commit) = self.adopt_back(at, back, &first) {
                    self.panics.owe(commit, marks);
                }
                continue;
            } else if let Some((at, state)) = self.planner.service(&name) {
                let diversion = state.propose_panic();
                if !moves && diversion.is_nothing() && !self.panics.owes(&name) {
                    // One of all services, which had nothing elsewhere.
                    self.kernel.panics_adopted(&marks);
                    continue;
                }
                let owed = self.panic_owed(at, &diversion, &cause, &mut Vec::new());
                let buckets_moved = diversion.moved;
                self.panics.owed.push(Owed { marks, ..owed });
                self.planner.panic(at, diversion.ownership, moves);
                self.supersede(at);
                tracing::warn!(
                    service = name,
                    uid,
                    reason = first.reason.as_deref(),
                    buckets_moved,
                    "everything was sent to control while no agent answered: adopted"
                );
                continue;
            } else if let Some(parked) = self.parked.get_mut(&name)
                && let Some((record, moved, buckets_moved)) = panic_of_parked(parked, back)
            {
                let change = Change {
                    unix_ms,
                    uid: Some(uid),
                    service: name.clone(),
                    action: if back.is_some() { ROLLOUT } else { "panic" }.to_owned(),
                    reason: first.reason.clone(),
                    before: parked.split.clone(),
                    after: record.split.clone(),
                    moved,
                    buckets_moved,
                    slots: record.slots.clone(),
                    salt: Some(record.salt),
                    ..Change::default()
                };
                let mut kept = record.clone();
                kept.placements.clone_from(&parked.placements);
                *parked = kept;
                let commit =
                    Commit { change, record: Some(record), deadline: None, settles: Vec::new() };
                self.panics.owe(commit, marks);
                continue;
            } else {
                // Nobody knows the service any more, and nothing of it is kept.
                self.kernel.panics_adopted(&marks);
            }
            if let (true, Some((at, state))) = (moves && known, self.planner.service(&name)) {
                let ownership = state.ownership().clone();
                self.planner.panic(at, ownership, moves);
            }
        }
    }

    /// Stores what is in force and not stored yet.
    ///
    /// # Errors
    /// Why that can't be.
    pub(super) fn store_panics(&mut self, now: Moment) -> Result<(), String> {
        if !self.panics.is_owing() {
            return Ok(());
        }
        self.save(Vec::new(), now).map_err(|error| {
            tracing::error!(%error, "a panic is in force and can't be stored yet");
            not_stored(&error)
        })
    }

    /// Whether a mark's panic stands in the audit trail: an agent ended before it could say so.
    fn is_recorded(&mut self, service: &str, mark: &PanicMark) -> bool {
        let changes = self.store.changes_before(Some(service), u64::MAX, LOOKED_AT);
        changes.unwrap_or_default().iter().any(|(_, change)| {
            (change.action == "panic" || change.action == ROLLOUT)
                && change.unix_ms == mark.unix_ms
                && change.uid == Some(mark.uid)
        })
    }

    /// Finds out which services are where a panic has sent them.
    pub(super) fn find_panicked(&mut self) {
        let idle: Vec<String> = self
            .planner
            .services()
            .iter()
            .filter(|state| {
                let shares = &state.ownership().split;
                let idle = || shares.values().all(|share| share.fraction() == 0.0);
                // What follows has what a rollout says, whatever came after that.
                let given = self.planner.raises().contains_key(&state.config().name);
                given || !state.follows() && !shares.is_empty() && idle()
            })
            .map(|state| state.config().name.clone())
            .collect();
        for name in idle {
            let changes = self.store.changes_before(Some(&name), u64::MAX, LOOKED_AT);
            let of_shares = changes
                .unwrap_or_default()
                .into_iter()
                .find(|(_, change)| change.action == "panic" || Thing::Split(&name).is_of(change));
            if let Some((revision, change)) = of_shares.filter(|(_, c)| c.action == "panic") {
                self.planner.drop_raise(&name);
                self.control.panicked(revision, &change);
            }
        }
    }
}

/// What somebody asks for.
struct Asked<'a> {
    request: &'a PanicRequest,
    peer: Peer,
    id: u64,
}

/// Said of `--move`.
pub(crate) const MOVES: &str = "open connections of other versions are cut: with nat the host resets them, with dsr \
     they reach control's backends, which do";

/// Why nothing is sent to control.
fn nobody_left(service: &str, control: &str) -> Refusal {
    Refusal {
        code: "nobody_left",
        message: format!(
            "service `{service}`: operators have taken out every backend of control `{control}`; new connections would \
             get nothing"
        ),
        help: Some(format!("bring one back first: `canary-agent backend ready {service} ADDRESS`")),
        exit_code: 1,
    }
}
