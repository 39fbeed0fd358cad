//! One service's table for one family: its buckets, its backends and those that
//! are on their way out.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use canary_ebpf_common::{
    Packed,
    abi::LedgerEntry,
    compile::Compiler,
    differing,
    entry::{BackendIndex, Entry},
};

use super::{
    Advance, BootMs, BucketSet, Family, NextHop, Policy, SlowStart, Update,
    compiler::{self, Candidate},
    placements::Placements,
    planner::NOT_ASKED_YET,
    prepare,
    slow_start::{self, Ramp},
};
use crate::{config::model::Fallback, store::Admin};

/// A backend of the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct LiveBackend {
    /// Its record.
    pub index: BackendIndex,
    /// Slot of its version.
    pub slot: u8,
    /// Address and port.
    pub addr: SocketAddr,
    /// Share of the version's buckets relative to the others'.
    pub weight: u32,
    /// Fails its checks.
    pub down: bool,
    /// How to reach it, or why that is not known.
    pub hop: Result<NextHop, String>,
    /// What an operator has told it to be.
    pub admin: Admin,
    /// How much of its share it takes.
    pub slow_start: SlowStart,
}

/// Whether a backend could take new connections, if operators let it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendState {
    /// It could.
    Up,
    /// It fails its checks.
    Down,
    /// The host does not know how to reach it, or has no answer from there any more.
    NoNextHop,
}

impl LiveBackend {
    /// Whether it takes new connections.
    pub fn takes_new(&self) -> bool {
        self.weight > 0 && self.admin == Admin::Ready && self.state() == BackendState::Up
    }

    /// Why it can't be reached; `None` where it can, or nobody has asked yet.
    pub fn why_unreachable(&self) -> Option<String> {
        match &self.hop {
            Ok(NextHop { silent, .. }) => silent.map(|neighbour| {
                format!("{neighbour} does not answer any more; only open connections go there")
            }),
            Err(why) => (why != NOT_ASKED_YET).then(|| why.clone()),
        }
    }

    /// Whether it could take new connections, its weight and operators aside.
    pub fn state(&self) -> BackendState {
        match (&self.hop, self.down) {
            (Err(_) | Ok(NextHop { silent: Some(_), .. }), _) => BackendState::NoNextHop,
            (Ok(_), true) => BackendState::Down,
            (Ok(_), false) => BackendState::Up,
        }
    }
}

/// A backend that is not in the configuration any more, but may still have connections.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Draining {
    pub(super) index: BackendIndex,
    pub(super) slot: u8,
    pub(super) addr: SocketAddr,
    pub(super) down: bool,
    /// Takes no packets at all.
    pub(super) maint: bool,
    pub(super) hop: Result<NextHop, String>,
    /// Until when translated flows may name it; `None` for ever.
    pub(super) until_ms: Option<BootMs>,
    /// Buckets that were tracked when it left: flow entries of theirs may name it.
    pub(super) waiting: Option<BucketSet>,
}

/// A backend that has been removed and may still have connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Its record.
    pub index: BackendIndex,
    /// Slot of its version.
    pub slot: u8,
    /// Address and port.
    pub addr: SocketAddr,
}

/// One service's table for one family.
pub struct Table {
    pub(super) family: Family,
    pub(super) id: u16,
    pub(super) first_page: u32,
    pub(super) entries: Arc<Packed<Entry>>,
    pub(super) ledger: Arc<Packed<LedgerEntry>>,
    pub(super) backends: Vec<LiveBackend>,
    pub(super) draining: Vec<Draining>,
    /// Buckets that may have flow entries of their former life.
    pub(super) unswept: BucketSet,
    /// Those of them that the sweep under way is about.
    pub(super) sweeping: BucketSet,
    pub(super) placements: Placements,
    compiler: Compiler,
    /// What the entries were compiled for last.
    compiled: Option<(Arc<Packed<u8>>, Vec<Candidate>)>,
    /// Buckets that are to be watched before they move.
    preparing: BucketSet,
    /// Not all of them are watched yet.
    unprepared: bool,
    /// Nothing of other versions than control is to be remembered any more.
    pub(super) cut: bool,
    /// When a ramp takes its next step.
    slow_due_ms: Option<BootMs>,
    /// By backend index, how many buckets steer new connections to it.
    counts: Vec<(BackendIndex, u32)>,
    tracked: u32,
    pub(super) next_due_ms: Option<BootMs>,
    pub(super) deferred: bool,
    control_checks_ignored: bool,
    /// Control has backends, and operators have taken all of them out.
    control_taken_out: bool,
    /// Bit *n*: the version in slot *n* has buckets but no backend to give them to.
    fell_back: u16,
}

/// What a table is stepped with.
pub(super) struct Inputs<'a> {
    pub(super) owners: &'a Arc<Packed<u8>>,
    pub(super) control: u8,
    pub(super) fallback: Fallback,
    pub(super) policy: Policy,
    pub(super) slow_start_ms: u64,
    pub(super) now_ms: BootMs,
}

/// What a step of a table did.
#[derive(Debug, Default)]
pub(super) struct TableStep {
    /// Entries or ledger changed.
    pub(super) changed: bool,
    /// What records say changed.
    pub(super) records_changed: bool,
    /// Indices that nothing refers to any more.
    pub(super) released: Vec<BackendIndex>,
}

impl Table {
    pub(super) fn new(
        family: Family,
        id: u16,
        first_page: u32,
        entries: Packed<Entry>,
        ledger: Packed<LedgerEntry>,
        placements: Placements,
    ) -> Self {
        Self {
            family,
            id,
            first_page,
            entries: Arc::new(entries),
            ledger: Arc::new(ledger),
            backends: Vec::new(),
            draining: Vec::new(),
            unswept: BucketSet::default(),
            sweeping: BucketSet::default(),
            placements,
            compiler: Compiler::new(),
            compiled: None,
            preparing: BucketSet::default(),
            unprepared: false,
            cut: false,
            slow_due_ms: None,
            counts: Vec::new(),
            tracked: 0,
            next_due_ms: None,
            deferred: false,
            control_checks_ignored: false,
            control_taken_out: false,
            fell_back: 0,
        }
    }

    /// The same table with its buckets at `first_page`, and with other placements: what a
    /// changed configuration goes on from. It is compiled anew with its next step.
    ///
    /// `entries` and `ledger` are its own, or those of a table of another size.
    pub(super) fn successor(
        &self,
        first_page: u32,
        entries: Arc<Packed<Entry>>,
        ledger: Arc<Packed<LedgerEntry>>,
        placements: Placements,
    ) -> Self {
        let Self { family, id, ref backends, ref draining, ref preparing, .. } = *self;
        Self {
            family,
            id,
            first_page,
            entries,
            ledger,
            backends: backends.clone(),
            draining: draining.clone(),
            unswept: self.unswept.clone(),
            sweeping: self.sweeping.clone(),
            placements,
            compiler: Compiler::new(),
            compiled: None,
            preparing: preparing.clone(),
            unprepared: self.unprepared,
            cut: self.cut,
            slow_due_ms: None,
            counts: Vec::new(),
            tracked: 0,
            next_due_ms: self.next_due_ms,
            deferred: self.deferred,
            control_checks_ignored: self.control_checks_ignored,
            control_taken_out: self.control_taken_out,
            fell_back: self.fell_back,
        }
    }

    /// A copy that is compiled anew with its next step.
    pub(super) fn copy(&self) -> Self {
        let (entries, ledger) = (Arc::clone(&self.entries), Arc::clone(&self.ledger));
        self.successor(self.first_page, entries, ledger, self.placements.clone())
    }

    /// Index of its service record.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Which of the service's addresses and backends it is about.
    pub fn family(&self) -> Family {
        self.family
    }

    /// One entry a bucket.
    pub fn entries(&self) -> &Packed<Entry> {
        &self.entries
    }

    /// One entry a bucket.
    pub fn ledger(&self) -> &Packed<LedgerEntry> {
        &self.ledger
    }

    /// Its backends, as configured.
    pub fn backends(&self) -> &[LiveBackend] {
        &self.backends
    }

    /// How many buckets are tracked.
    pub fn tracked(&self) -> u32 {
        self.tracked
    }

    /// How many buckets steer new connections to `index`.
    pub fn buckets_of(&self, index: BackendIndex) -> u32 {
        let at = self.counts.binary_search_by_key(&index, |(index, _)| *index);
        at.map_or(0, |at| self.counts[at].1)
    }

    /// How many buckets steer new connections to each backend that has any, by index.
    pub fn bucket_counts(&self) -> &[(BackendIndex, u32)] {
        &self.counts
    }

    /// Whether control's backends are all used although none passes its checks.
    pub fn control_checks_ignored(&self) -> bool {
        self.control_checks_ignored
    }

    /// Whether operators have taken out all that control has: its new connections get nothing.
    pub fn control_taken_out(&self) -> bool {
        self.control_taken_out
    }

    /// Backends that are removed, and may still have connections.
    pub fn removed(&self) -> impl Iterator<Item = Removed> + '_ {
        let gone = self.draining.iter();
        gone.map(|d| Removed { index: d.index, slot: d.slot, addr: d.addr })
    }

    /// By backend index, how many buckets steer new connections elsewhere and still
    /// leave the older ones with it.
    pub fn leaving(&self) -> HashMap<BackendIndex, u32> {
        let mut leaving = HashMap::new();
        if self.tracked == 0 {
            return leaving;
        }
        let left = self.entries.iter().filter(|e| e.tracked() && e.previous() != e.current());
        left.for_each(|e| *leaving.entry(e.previous()).or_default() += 1);
        leaving
    }

    /// Whether the version in `slot` owns buckets but has no backend to give them to.
    pub fn fell_back(&self, slot: u8) -> bool {
        self.fell_back >> slot & 1 != 0
    }

    /// Records of a version, those that are on their way out included.
    pub fn indices_of(&self, slot: u8) -> impl Iterator<Item = BackendIndex> + '_ {
        let live = self.backends.iter().filter(move |b| b.slot == slot).map(|b| b.index);
        live.chain(self.draining.iter().filter(move |d| d.slot == slot).map(|d| d.index))
    }

    /// The address of the backend at `index`, on its way out or not.
    pub fn addr(&self, index: BackendIndex) -> Option<SocketAddr> {
        let live = self.backends.iter().map(|b| (b.index, b.addr));
        let gone = self.draining.iter().map(|d| (d.index, d.addr));
        live.chain(gone).find(|(at, _)| *at == index).map(|(_, addr)| addr)
    }

    /// The buckets of which `other` says by `current` something else than the entries, and the
    /// backends that they go from or come to.
    pub fn moved<B: Copy>(
        &self,
        other: &[B],
        current: impl Fn(B) -> BackendIndex,
    ) -> (BucketSet, BTreeSet<SocketAddr>) {
        let entries = self.entries.plain();
        let differs = |entry: Entry, other| entry.current() != current(other);
        let moved = BucketSet::of_bits(differing(&entries, other, differs));
        let mut named = vec![false; usize::from(BackendIndex::MAX.get()) + 1];
        for at in moved.iter().map(|bucket| bucket as usize) {
            named[usize::from(entries[at].current().get())] = true;
            named[usize::from(current(other[at]).get())] = true;
        }
        let indices = (0..).zip(named).filter(|(_, named)| *named);
        let touched = indices.filter_map(|(index, _)| self.addr(BackendIndex::new(index)));
        (moved, touched.collect())
    }

    /// Every address that frames go to.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let live = self.backends.iter().map(|b| b.addr.ip());
        live.chain(self.draining.iter().map(|d| d.addr.ip()))
    }

    /// Where new connections would go with `inputs`, were the backends `backends`.
    pub(super) fn desired(
        &mut self,
        inputs: &Inputs<'_>,
        backends: &[LiveBackend],
    ) -> compiler::Assignment {
        let candidates = candidates(backends, inputs);
        let Inputs { control, fallback, .. } = *inputs;
        let owners = inputs.owners.plain();
        let placements = &self.placements;
        let compiler = &mut self.compiler;
        let mut assign = |candidates: &[Candidate]| {
            compiler::assign(compiler, &owners, control, fallback, placements, candidates)
        };
        let mut whole = assign(&candidates);
        let ramps: Vec<Ramp> = candidates.iter().filter_map(Candidate::ramp).collect();
        if !ramps.is_empty() {
            let settled: Vec<Candidate> = candidates
                .iter()
                .map(|c| Candidate { usable: c.usable && c.ramp().is_none(), ..*c })
                .collect();
            let without = assign(&settled);
            slow_start::blend(&mut whole.backends, &without.backends, &ramps);
        }
        whole
    }

    /// Watches `buckets` from the next step on, where they are, until they move or this is
    /// called again.
    pub(super) fn prepare(&mut self, buckets: BucketSet) {
        self.unprepared = !buckets.is_empty();
        self.preparing = buckets;
    }

    /// Whether all buckets that [`prepare`](Self::prepare) was told of are watched.
    pub(super) fn is_prepared(&self) -> bool {
        !self.unprepared
    }

    /// Brings the table to what is desired of it now.
    pub(super) fn step(&mut self, inputs: &Inputs<'_>) -> TableStep {
        let mut done = TableStep::default();
        let due = |at: Option<BootMs>| at.is_some_and(|at| at <= inputs.now_ms);
        let (ramped, slow_due_ms) =
            slow_start::follow(&mut self.backends, inputs.slow_start_ms, inputs.now_ms);
        (done.records_changed, self.slow_due_ms) = (ramped, slow_due_ms);
        let candidates = candidates(&self.backends, inputs);
        let current = self.compiled.as_ref().is_some_and(|(owners, compiled)| {
            Arc::ptr_eq(owners, inputs.owners) && *compiled == candidates
        });
        if !current || self.deferred || due(self.next_due_ms) {
            let assignment = (!current || self.deferred).then(|| {
                let backends = std::mem::take(&mut self.backends);
                let assignment = self.desired(inputs, &backends);
                self.backends = backends;
                assignment
            });
            if let Some(assignment) = &assignment {
                let of_control =
                    || self.backends.iter().filter(|b| b.slot == inputs.control && b.weight > 0);
                self.control_taken_out = of_control().all(|b| b.admin != Admin::Ready);
                self.control_checks_ignored =
                    !self.control_taken_out && !of_control().any(LiveBackend::takes_new);
                self.fell_back = assignment.fell_back;
            }
            let quiet_until_ms = match &self.compiled {
                Some(_) => self.next_due_ms.unwrap_or(BootMs::MAX),
                None => 0,
            };
            // What waits for a sweep has its old owner in the ledger still.
            let owned = match &self.compiled {
                Some((owned, _)) if !self.deferred => Some(owned.plain()),
                _ => None,
            };
            let advanced = Advance {
                entries: &self.entries.plain(),
                ledger: &self.ledger.plain(),
                desired: assignment.as_ref().map(|a| &a.backends[..]),
                owners: &inputs.owners.plain(),
                owned: owned.as_deref(),
                unswept: &self.unswept,
                policy: &inputs.policy,
                quiet_until_ms,
                now_ms: inputs.now_ms,
            }
            .run();
            done.changed = !advanced.updates.is_empty();
            self.update(&advanced.updates);
            self.next_due_ms = advanced.next_due_ms;
            self.deferred = advanced.deferred > 0;
            self.compiled = Some((Arc::clone(inputs.owners), candidates));
            self.cleared(advanced.cleared);
        }
        done.changed |= std::mem::take(&mut self.cut) && self.let_go_but(inputs.control);
        done.changed |= self.pass_over();
        if self.unprepared {
            let watched = prepare::watch(
                &self.entries,
                &self.ledger,
                &self.preparing,
                &self.unswept,
                &inputs.policy,
                inputs.now_ms,
            );
            self.unprepared = watched.waiting > 0;
            self.next_due_ms = [self.next_due_ms, watched.next_due_ms].into_iter().flatten().min();
            done.changed |= !watched.updates.is_empty();
            self.update(&watched.updates);
        }
        self.release(inputs, &mut done);
        done
    }

    /// Buckets that were tracked and are not any more have to be swept.
    fn cleared(&mut self, buckets: Vec<u32>) {
        for bucket in buckets {
            self.unswept.insert(bucket);
            for draining in &mut self.draining {
                draining.waiting.iter_mut().for_each(|waiting| waiting.remove(bucket));
            }
        }
    }

    /// Goes on from other entries, which somebody else has written.
    pub(super) fn goes_on_with(&mut self, entries: Vec<Entry>, ledger: Vec<LedgerEntry>) {
        let pairs = || (0..).zip(self.entries.iter().zip(&entries));
        let forgotten: Vec<u32> = pairs()
            .filter(|(_, (old, new))| old.tracked() && !new.tracked())
            .map(|(bucket, _)| bucket)
            .collect();
        let tracked: Vec<u32> =
            pairs().filter(|(_, (_, new))| new.tracked()).map(|(bucket, _)| bucket).collect();
        self.cleared(forgotten);
        tracked.into_iter().for_each(|bucket| self.unswept.remove(bucket));
        (self.entries, self.ledger) = (Arc::new(entries.into()), Arc::new(ledger.into()));
        self.compiled = None;
        self.counts.clear();
    }

    /// Forgets where older connections go that are not control's.
    fn let_go_but(&mut self, control: u8) -> bool {
        let live = self.backends.iter().filter(|b| b.slot == control).map(|b| b.index);
        let gone = self.draining.iter().filter(|d| d.slot == control).map(|d| d.index);
        let kept: BTreeSet<BackendIndex> = live.chain(gone).collect();
        let updates: Vec<Update> = (0..)
            .zip(self.entries.iter().zip(self.ledger.iter()))
            .filter(|(_, (entry, _))| entry.tracked() && !kept.contains(&entry.previous()))
            .map(|(bucket, (&before, &record))| Update {
                bucket,
                before,
                after: Entry::steady(before.current()),
                record,
            })
            .collect();
        self.update(&updates);
        self.cleared(updates.iter().map(|update| update.bucket).collect());
        !updates.is_empty()
    }

    /// Where `previous` is a backend in maintenance, nobody's connection is there any more, and
    /// what finds no entry goes to `current`. So it does after further moves and when that
    /// backend is back: a connection without an entry (there may be no room for one) stays.
    fn pass_over(&mut self) -> bool {
        let live = self.backends.iter().filter(|b| b.admin == Admin::Maint).map(|b| b.index);
        let gone = self.draining.iter().filter(|d| d.maint).map(|d| d.index);
        let maintained: BTreeSet<BackendIndex> = live.chain(gone).collect();
        if maintained.is_empty() {
            return false;
        }
        let stale = |entry: &Entry| {
            entry.tracked()
                && entry.previous() != entry.current()
                && !entry.current().is_none()
                && maintained.contains(&entry.previous())
        };
        let updates: Vec<Update> = (0..)
            .zip(self.entries.iter().zip(self.ledger.iter()))
            .filter(|(_, (entry, _))| stale(entry))
            .map(|(bucket, (&before, &record))| {
                let current = before.current();
                let after = Entry::tracking(current, current, before.learning());
                Update { bucket, before, after, record }
            })
            .collect();
        self.update(&updates);
        !updates.is_empty()
    }

    /// What of a backend that left is still referred to, and what is not any more.
    fn release(&mut self, inputs: &Inputs<'_>, done: &mut TableStep) {
        if self.draining.is_empty() {
            return;
        }
        let tracked = || -> BucketSet {
            let entries = (0..).zip(self.entries.iter());
            entries.filter(|(_, e)| e.tracked()).map(|(bucket, _)| bucket).collect()
        };
        for draining in self.draining.iter_mut().filter(|d| d.waiting.is_none()) {
            draining.waiting = Some(tracked());
        }
        let entries = &self.entries;
        let names = |index: BackendIndex| {
            entries.iter().any(|e| e.current() == index || e.tracked() && e.previous() == index)
        };
        self.draining.retain(|draining| {
            let flows = !inputs.policy.tracks
                && draining.until_ms.is_none_or(|until| inputs.now_ms < until);
            let waits = draining.waiting.as_ref().is_some_and(|waiting| !waiting.is_empty());
            let stays = flows || waits || names(draining.index);
            if flows && let Some(until) = draining.until_ms {
                self.next_due_ms = Some(self.next_due_ms.map_or(until, |first| first.min(until)));
            }
            if !stays {
                done.released.push(draining.index);
            }
            stays
        });
    }

    /// Takes less memory until it changes again, which nobody can tell but by time. The owners
    /// that were `before` are by now the same as `owners`.
    pub(super) fn rest(&mut self, before: &Arc<Packed<u8>>, owners: &Arc<Packed<u8>>) {
        if let Some((compiled, _)) = &mut self.compiled
            && Arc::ptr_eq(compiled, before)
        {
            *compiled = Arc::clone(owners);
        }
        if let Some(packed) = self.entries.packed() {
            self.entries = Arc::new(packed);
        }
        if let Some(packed) = self.ledger.packed() {
            self.ledger = Arc::new(packed);
        }
        self.compiler.rest();
    }

    /// Whether it has not made a step yet.
    pub(super) fn is_new(&self) -> bool {
        self.compiled.is_none()
    }

    /// When something is due of it without any other change.
    pub(super) fn due_ms(&self) -> Option<BootMs> {
        [self.next_due_ms, self.slow_due_ms].into_iter().flatten().min()
    }

    /// Takes `updates` over, into the entries, the ledger and what is counted of them.
    fn update(&mut self, updates: &[Update]) {
        if self.counts.is_empty() {
            self.tracked = self.entries.iter().map(|e| u32::from(e.tracked())).sum();
            let mut counts = vec![0_u32; usize::from(BackendIndex::MAX.get()) + 1];
            let current = self.entries.iter().map(|entry| entry.current().get());
            current.for_each(|index| counts[usize::from(index)] += 1);
            self.counts = nonzero(counts);
        }
        if updates.is_empty() {
            return;
        }
        let entries = Arc::make_mut(&mut self.entries).plain_mut();
        let ledger = Arc::make_mut(&mut self.ledger).plain_mut();
        let mut counts = vec![0_u32; usize::from(BackendIndex::MAX.get()) + 1];
        self.counts.iter().for_each(|(index, count)| counts[usize::from(index.get())] = *count);
        for &Update { bucket, before, after, record } in updates {
            entries[bucket as usize] = after;
            ledger[bucket as usize] = record;
            self.tracked += u32::from(after.tracked());
            self.tracked -= u32::from(before.tracked());
            counts[usize::from(before.current().get())] -= 1;
            counts[usize::from(after.current().get())] += 1;
        }
        self.counts = nonzero(counts);
    }
}

/// The indices that have a count, in their order, with it.
fn nonzero(counts: Vec<u32>) -> Vec<(BackendIndex, u32)> {
    (0..).map(BackendIndex::new).zip(counts).filter(|(_, count)| *count > 0).collect()
}

/// What buckets may be given to.
fn candidates(backends: &[LiveBackend], inputs: &Inputs<'_>) -> Vec<Candidate> {
    let control = inputs.control;
    // What operators have taken out stays out, whatever becomes of the others.
    let of_control =
        || backends.iter().filter(|b| b.slot == control && b.weight > 0 && b.admin == Admin::Ready);
    // Where no backend of control passes its checks, those that can be reached at all
    // still come before those that can't.
    let despite_checks = !of_control().any(LiveBackend::takes_new);
    // The compiler takes all of control's where it may take none.
    let taken_out = of_control().next().is_none();
    let unreachable = of_control().all(|b| b.state() == BackendState::NoNextHop);
    backends
        .iter()
        .map(|b| {
            let despite = b.slot == control && despite_checks;
            Candidate {
                index: b.index,
                slot: b.slot,
                addr: b.addr,
                weight: if taken_out && b.slot == control { 0 } else { b.weight },
                usable: b.admin == Admin::Ready
                    && match b.state() {
                        BackendState::Up => true,
                        BackendState::Down => despite,
                        BackendState::NoNextHop => despite && unreachable,
                    },
                step: b.slow_start.step(inputs.slow_start_ms, inputs.now_ms),
            }
        })
        .collect()
}
