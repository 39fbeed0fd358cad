//! One service's table for one family: its buckets, its backends and those that
//! are on their way out.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use canary_ebpf_common::{
    abi::LedgerEntry,
    compile::Compiler,
    entry::{BackendIndex, Entry},
};

use super::{
    Advance, BootMs, BucketSet, Family, NextHop, Policy, Update,
    compiler::{self, Candidate},
    numbers,
    placements::Placements,
};
use crate::config::model::Fallback;

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
}

/// Whether a backend takes new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendState {
    /// It does.
    Up,
    /// It fails its checks.
    Down,
    /// The host does not know how to reach it.
    NoNextHop,
}

impl LiveBackend {
    /// Whether it takes new connections, its weight aside.
    pub fn state(&self) -> BackendState {
        match (&self.hop, self.down) {
            (Err(_), _) => BackendState::NoNextHop,
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
    pub(super) hop: Result<NextHop, String>,
    /// Until when translated flows may name it; `None` for ever.
    pub(super) until_ms: Option<BootMs>,
    /// Buckets that were tracked when it left: flow entries of theirs may name it.
    pub(super) waiting: Option<BucketSet>,
}

/// One service's table for one family.
pub struct Table {
    pub(super) family: Family,
    pub(super) id: u16,
    pub(super) first_page: u32,
    pub(super) entries: Arc<Vec<Entry>>,
    pub(super) ledger: Arc<Vec<LedgerEntry>>,
    pub(super) backends: Vec<LiveBackend>,
    pub(super) draining: Vec<Draining>,
    /// Buckets cleared by plans that have not been applied yet.
    pub(super) unswept: BucketSet,
    pub(super) placements: Placements,
    compiler: Compiler,
    /// What the entries were compiled for last.
    compiled: Option<(Arc<Vec<u8>>, Vec<Candidate>)>,
    /// By backend index, how many buckets steer new connections to it.
    counts: Vec<(BackendIndex, u32)>,
    tracked: u32,
    pub(super) next_due_ms: Option<BootMs>,
    pub(super) deferred: bool,
    control_checks_ignored: bool,
    /// Bit *n*: the version in slot *n* has buckets but no backend to give them to.
    fell_back: u16,
}

/// What a table is stepped with.
pub(super) struct Inputs<'a> {
    pub(super) owners: &'a Arc<Vec<u8>>,
    pub(super) control: u8,
    pub(super) fallback: Fallback,
    pub(super) policy: Policy,
    pub(super) now_ms: BootMs,
}

/// What a step of a table did.
#[derive(Debug, Default)]
pub(super) struct TableStep {
    /// Entries or ledger changed.
    pub(super) changed: bool,
    /// Indices that nothing refers to any more.
    pub(super) released: Vec<BackendIndex>,
}

impl Table {
    pub(super) fn new(
        family: Family,
        id: u16,
        first_page: u32,
        entries: Vec<Entry>,
        ledger: Vec<LedgerEntry>,
        placements: Placements,
    ) -> Self {
        Self {
            family,
            id,
            first_page,
            entries: entries.into(),
            ledger: ledger.into(),
            backends: Vec::new(),
            draining: Vec::new(),
            unswept: BucketSet::default(),
            placements,
            compiler: Compiler::new(),
            compiled: None,
            counts: Vec::new(),
            tracked: 0,
            next_due_ms: None,
            deferred: false,
            control_checks_ignored: false,
            fell_back: 0,
        }
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
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// One entry a bucket.
    pub fn ledger(&self) -> &[LedgerEntry] {
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

    /// Whether control's backends are all used although none passes its checks.
    pub fn control_checks_ignored(&self) -> bool {
        self.control_checks_ignored
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

    /// The backends that buckets go from or come to where `other` says something else than
    /// the entries.
    pub fn touched(&self, other: impl Fn(usize) -> BackendIndex) -> BTreeSet<SocketAddr> {
        let mut named = vec![false; usize::from(BackendIndex::MAX.get()) + 1];
        let current = |at: usize| self.entries[at].current();
        for at in numbers(self.entries.len(), |at| current(at) != other(at)) {
            named[usize::from(current(at).get())] = true;
            named[usize::from(other(at).get())] = true;
        }
        let indices = (0..).zip(named).filter(|(_, named)| *named);
        indices.filter_map(|(index, _)| self.addr(BackendIndex::new(index))).collect()
    }

    /// Every address that frames go to.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let live = self.backends.iter().map(|b| b.addr.ip());
        live.chain(self.draining.iter().map(|d| d.addr.ip()))
    }

    /// Where new connections would go with `owners`.
    pub(super) fn desired(&mut self, inputs: &Inputs<'_>) -> compiler::Assignment {
        let candidates = self.candidates(inputs.control);
        let Inputs { owners, control, fallback, .. } = *inputs;
        compiler::assign(
            &mut self.compiler,
            owners,
            control,
            fallback,
            &self.placements,
            &candidates,
        )
    }

    fn candidates(&self, control: u8) -> Vec<Candidate> {
        // Where no backend of control passes its checks, those that can be reached at all
        // still come before those that can't.
        let of_control = || self.backends.iter().filter(|b| b.slot == control && b.weight > 0);
        let despite_checks = !of_control().any(|b| b.state() == BackendState::Up);
        self.backends
            .iter()
            .map(|b| Candidate {
                index: b.index,
                slot: b.slot,
                addr: b.addr,
                weight: b.weight,
                usable: match b.state() {
                    BackendState::Up => true,
                    BackendState::Down => b.slot == control && despite_checks,
                    BackendState::NoNextHop => false,
                },
            })
            .collect()
    }

    /// Brings the table to what is desired of it now.
    pub(super) fn step(&mut self, inputs: &Inputs<'_>) -> TableStep {
        let mut done = TableStep::default();
        let due = |at: Option<BootMs>| at.is_some_and(|at| at <= inputs.now_ms);
        let candidates = self.candidates(inputs.control);
        let current = self.compiled.as_ref().is_some_and(|(owners, compiled)| {
            Arc::ptr_eq(owners, inputs.owners) && *compiled == candidates
        });
        if !current || self.deferred || due(self.next_due_ms) {
            let assignment = (!current || self.deferred).then(|| self.desired(inputs));
            if let Some(assignment) = &assignment {
                let up = |b: &LiveBackend| {
                    b.slot == inputs.control && b.weight > 0 && b.state() == BackendState::Up
                };
                self.control_checks_ignored =
                    assignment.control_checks_ignored || !self.backends.iter().any(up);
                self.fell_back = assignment.fell_back;
            }
            let quiet_until_ms = match &self.compiled {
                Some(_) => self.next_due_ms.unwrap_or(BootMs::MAX),
                None => 0,
            };
            let advanced = Advance {
                entries: &self.entries,
                ledger: &self.ledger,
                desired: assignment.as_ref().map(|a| &a.backends[..]),
                owners: inputs.owners,
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
            for bucket in advanced.cleared {
                self.unswept.insert(bucket);
                for draining in &mut self.draining {
                    draining.waiting.iter_mut().for_each(|waiting| waiting.remove(bucket));
                }
            }
        }
        self.release(inputs, &mut done);
        done
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

    /// Takes `updates` over, into the entries, the ledger and what is counted of them.
    fn update(&mut self, updates: &[Update]) {
        if self.counts.is_empty() {
            self.tracked = self.entries.iter().map(|e| u32::from(e.tracked())).sum();
            self.counts = counted(&[], self.entries.iter().map(|e| (e.current(), 1)));
        }
        if updates.is_empty() {
            return;
        }
        let entries = Arc::make_mut(&mut self.entries);
        let ledger = Arc::make_mut(&mut self.ledger);
        for &Update { bucket, before, after, record } in updates {
            entries[bucket as usize] = after;
            ledger[bucket as usize] = record;
            self.tracked += u32::from(after.tracked());
            self.tracked -= u32::from(before.tracked());
        }
        let gives = updates.iter().map(|u| (u.before.current(), u32::MAX));
        let gets = updates.iter().map(|u| (u.after.current(), 1));
        self.counts = counted(&self.counts, gives.chain(gets));
    }
}

/// `counts` with `more` added, wrapping; what comes to nothing is left out.
fn counted(
    counts: &[(BackendIndex, u32)],
    more: impl Iterator<Item = (BackendIndex, u32)> + Clone,
) -> Vec<(BackendIndex, u32)> {
    let all = || counts.iter().copied().chain(more.clone());
    let highest = all().map(|(index, _)| index.get()).max().unwrap_or(0);
    let mut sums = vec![0_u32; usize::from(highest) + 1];
    for (index, count) in all() {
        let sum = &mut sums[usize::from(index.get())];
        *sum = sum.wrapping_add(count);
    }
    (0..).map(BackendIndex::new).zip(sums).filter(|(_, count)| *count > 0).collect()
}
