//! Everything of a service to control at once: what becomes of the plan, and what becomes of
//! tables of which nothing is known but what the maps hold.
//!
//! The second is for when no agent answers. Weights, and what operators and checks have taken
//! out, stand in the backends' records; the same compiler places the buckets that move. What
//! the maps do not hold are the exceptions of the placements and how far a slow start is: the
//! agent that adopts the tables places some buckets anew for them, inside control.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use canary_ebpf_common::{
    Packed,
    abi::{self, ForwardMode, LedgerEntry},
    compile::{self, Backend, Compiler, Fallback, Input, Version},
    differing,
    entry::{BackendIndex, Entry},
    ones,
    share::Share,
};

use super::{
    AdoptedService, BootMs, Ownership, Planner, Policy, Proposal, ServiceState,
    adopt::{self, record_addr},
    advance,
};
use crate::{
    config::model::Existing,
    store::{ServiceRecord, Split},
};

/// What sent a table's buckets to control while no agent answered, and is not adopted yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PanicMark {
    /// Index of the table in `SERVICE_INFO`.
    pub table: u16,
    /// The service.
    pub service: String,
    /// Which panic it is, as the maps count them.
    pub number: u64,
    /// What the same request is called on the control socket.
    pub id: u64,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Who.
    pub uid: u32,
    /// Open connections go, too.
    pub moves: bool,
    /// It was no panic: only a version's share has gone back.
    pub back: Option<GivenBack>,
    /// Why.
    pub reason: Option<String>,
}

/// A version whose share has gone back while that could not be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenBack {
    /// Its slot.
    pub slot: u8,
    /// The buckets that it has any more.
    pub buckets: u32,
}

/// Control has no backend that may take new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("operators have taken out every backend of control, or it has none")]
pub struct NobodyLeft;

/// A table on its way to control.
#[derive(Clone, Copy, Debug)]
pub struct Panicking<'a> {
    /// Slot of the control version.
    pub control: u8,
    /// What the program knows of the service.
    pub record: Option<&'a abi::Service>,
    /// The records of its backends.
    pub backends: &'a [(BackendIndex, abi::Backend)],
    /// Open connections go, too.
    pub moves: bool,
    /// When.
    pub now_ms: BootMs,
}

/// What becomes of a table. May be used again for the next one: then its memory is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diverted {
    /// One entry a bucket.
    pub entries: Vec<Entry>,
    /// Buckets whose new connections go elsewhere.
    pub moved: u32,
    /// Backends that lose or gain some.
    pub touched: BTreeSet<SocketAddr>,
    /// For each bucket the version that the compiler is to give it to: [`moving`] or none.
    owners: Vec<u8>,
}

/// The slot by which the compiler knows the buckets that move: any but that of the others.
const fn moving(control: u8) -> u8 {
    control
}

impl Diverted {
    /// Nothing yet.
    fn begin(&mut self, entries: &[Entry]) {
        self.entries.clear();
        self.entries.extend_from_slice(entries);
        self.owners.clear();
        self.moved = 0;
        self.touched.clear();
    }
}

impl Panicking<'_> {
    /// Whether new connections would get nothing: then the table is left as it is.
    ///
    /// # Errors
    /// [`NobodyLeft`].
    pub fn somebody_left(
        control: u8,
        backends: &[(BackendIndex, abi::Backend)],
    ) -> Result<(), NobodyLeft> {
        candidates(control, backends).map(drop)
    }

    /// The table of these `entries` with all of its buckets control's.
    ///
    /// # Errors
    /// [`NobodyLeft`] if that would leave new connections nothing.
    pub fn divert(&self, entries: &[Entry], diverted: &mut Diverted) -> Result<(), NobodyLeft> {
        let Self { control, record, backends, moves, now_ms: _ } = *self;
        let (indices, candidates) = candidates(control, backends)?;
        let mut of_control = Marked::none();
        let its = backends.iter().filter(|(_, b)| b.version == control);
        its.for_each(|(index, _)| of_control.mark(*index));
        diverted.begin(entries);

        // Only what moves is given out, by itself: what control has stays where it is.
        let (moving, resting) = (moving(control), u8::from(control == 0));
        let owner = |entry: &Entry| if of_control.has(entry.current()) { resting } else { moving };
        diverted.owners.extend(entries.iter().map(owner));
        let owners = &diverted.owners;
        let mut named = Marked::none();
        if owners.contains(&moving) {
            let versions = [
                Version { slot: moving, backends: &candidates, placement: None },
                Version { slot: resting, backends: &[], placement: None },
            ];
            let input = Input { owners, versions: &versions, control, fallback: Fallback::None };
            let name = |target: compile::Target| indices[usize::from(target.backend)];
            let compiled = Compiler::new().compile_into(&input, BackendIndex::NONE, name);
            // Distinct addresses of one version, each above weight 0: always a table.
            let compiled = compiled.map_err(|_| NobodyLeft)?.targets;
            let policy = policy(record);
            for bucket in ones(differing(owners, owners, |owner, _| owner == moving)) {
                let (old, wanted) = (entries[bucket], compiled[bucket]);
                named.mark(old.current());
                named.mark(wanted);
                diverted.entries[bucket] = advance::follow(old, wanted, true, &policy);
                diverted.moved += 1;
            }
        }
        if moves {
            let goes = |entry: &&mut Entry| entry.tracked() && !of_control.has(entry.previous());
            let going = diverted.entries.iter_mut().filter(goes);
            going.for_each(|entry| *entry = Entry::steady(entry.current()));
        }
        let touched = backends.iter().filter(|(index, _)| named.has(*index));
        diverted.touched.extend(touched.map(|(_, record)| record_addr(record)));
        Ok(())
    }

    /// Calls `with` for those buckets, from `first` on, of which the ledger is to say another
    /// thing than what it says, `recorded`: with the bucket and both.
    pub fn records(
        &self,
        diverted: &Diverted,
        first: usize,
        recorded: &[LedgerEntry],
        mut with: impl FnMut(usize, LedgerEntry, LedgerEntry),
    ) {
        let (control, moving) = (self.control, moving(self.control));
        let owners = diverted.owners.get(first..).unwrap_or_default();
        let another =
            |recorded: LedgerEntry, owner| (recorded.owner() != control) | (owner == moving);
        for at in ones(differing(recorded, owners, another)) {
            let moved_ms = if owners[at] == moving { self.now_ms } else { recorded[at].moved_ms() };
            with(first + at, recorded[at], LedgerEntry::new(control, moved_ms));
        }
    }

    /// Backends of other versions: whose connections go where open ones do.
    pub fn others(&self) -> impl Iterator<Item = BackendIndex> {
        let others = self.backends.iter().filter(|(_, b)| b.version != self.control);
        others.map(|(index, _)| *index)
    }
}

/// Some of all backends there can be: asked for each bucket of a table.
struct Marked(Vec<bool>);

impl Marked {
    fn none() -> Self {
        Self(vec![false; usize::from(BackendIndex::MAX.get()) + 1])
    }

    fn mark(&mut self, index: BackendIndex) {
        self.0[usize::from(index.get())] = true;
    }

    fn has(&self, index: BackendIndex) -> bool {
        self.0[usize::from(index.get())]
    }
}

/// What moved buckets remember, as the service's record says it.
fn policy(record: Option<&abi::Service>) -> Policy {
    let flag = |bit: u32| record.is_some_and(|record| record.flags & bit != 0);
    let nat = record.is_some_and(|r| r.flags & ForwardMode::MASK == ForwardMode::Nat as u32);
    let forgets = flag(abi::SERVICE_FORGETS);
    Policy {
        tracks: !nat,
        existing: if forgets { Existing::Move } else { Existing::Pin },
        drain_ms: None,
        learn_ms: flag(abi::SERVICE_LEARNS).then_some(0),
    }
}

/// Those of control's backends that take new connections, as the planner would choose them: what
/// operators have taken out stays out; if none of the others passes its checks, all of them are
/// taken, before those that can't be reached.
fn candidates(
    control: u8,
    backends: &[(BackendIndex, abi::Backend)],
) -> Result<(Vec<BackendIndex>, Vec<Backend>), NobodyLeft> {
    let weight = |record: &abi::Backend| record.flags >> abi::BACKEND_WEIGHT_SHIFT;
    let has = |record: &abi::Backend, bit: u32| record.flags & bit != 0;
    let mut known: Vec<(BackendIndex, &abi::Backend)> = backends
        .iter()
        .filter(|(_, b)| b.version == control && weight(b) > 0)
        .filter(|(_, b)| !has(b, abi::BACKEND_DRAIN | abi::BACKEND_MAINT))
        .map(|(index, record)| (*index, record))
        .collect();
    known.sort_unstable_by_key(|(index, _)| *index);
    let up = |b: &abi::Backend| has(b, abi::BACKEND_USABLE) && !has(b, abi::BACKEND_DOWN);
    // One in slow start is not to be overrun where others are at their best.
    let ranks: [&dyn Fn(&abi::Backend) -> bool; 3] =
        [&|b| up(b) && b.slow_since_ms == 0, &up, &|b| has(b, abi::BACKEND_USABLE)];
    let rank = ranks.into_iter().find(|rank| known.iter().any(|(_, b)| rank(b)));
    let chosen = known.into_iter().filter(|(_, b)| rank.is_none_or(|rank| rank(b)));
    let chosen: Vec<(BackendIndex, Backend)> = chosen
        .map(|(index, record)| {
            let identity = compile::identity(&record_addr(record));
            (index, Backend { identity, weight: weight(record), healthy: true })
        })
        .collect();
    if chosen.is_empty() { Err(NobodyLeft) } else { Ok(chosen.into_iter().unzip()) }
}

/// What sending everything to control would make of a service's owners. Which buckets those are
/// is written down when there is time for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diversion {
    /// How many buckets get another owner.
    pub moved: u32,
    /// What it is until then.
    pub before: Ownership,
    /// What it would be.
    pub ownership: Ownership,
}

impl Diversion {
    /// Whether everything is control's already, and nothing else is asked for.
    pub fn is_nothing(&self) -> bool {
        self.moved == 0 && self.before.split == self.ownership.split
    }
}

impl ServiceState {
    /// Everything to control. No share but that of others changes, and of those none is left.
    pub fn propose_panic(&self) -> Diversion {
        let Ownership { split, salt, owners } = &self.ownership;
        let none = split.keys().map(|name| (name.clone(), Share::ZERO)).collect::<Split>();
        let control = self.control;
        let moved = owners.plain().iter().map(|owner| u32::from(*owner != control)).sum();
        let after = match moved {
            0 => Arc::clone(owners),
            _ => Arc::new(Packed::of_one(control, owners.len())),
        };
        let ownership = Ownership { split: none, salt: *salt, owners: after };
        Diversion { moved, before: self.ownership.clone(), ownership }
    }

    /// A version's buckets to control, all but so many, where nobody knows any better which.
    pub fn propose_given_back(&self, back: GivenBack) -> Option<Proposal> {
        let name = self.slots.get(usize::from(back.slot)).filter(|name| !name.is_empty())?;
        let mut split = self.ownership.split.clone();
        let share = match back.buckets {
            0 => Share::ZERO,
            buckets => Share::of_buckets(buckets, self.config.buckets),
        };
        split.insert(name.clone(), share);
        self.propose(split).ok()
    }

    /// Whether new connections would get nothing if control had everything, in one table at
    /// least.
    pub fn control_taken_out(&self) -> bool {
        self.tables.iter().any(|table| {
            let mut of_control = table.backends.iter().filter(|b| b.slot == self.control);
            !of_control.any(|b| b.weight > 0 && b.admin == crate::store::Admin::Ready)
        })
    }
}

/// Everything to control, or all of the version that has given its share `back`, of a service that
/// is not configured now: for when it comes back.
pub fn panic_of_parked(
    record: &ServiceRecord,
    back: Option<GivenBack>,
) -> Option<(ServiceRecord, Vec<u8>, u32)> {
    let control = u8::try_from(record.slots.iter().position(|s| *s == record.control)?).ok()?;
    let owners = compile::decode_owners(&record.owners).ok()?;
    let goes = |slot: u8| back.is_none_or(|back| back.slot == slot);
    let after: Vec<u8> =
        owners.iter().map(|owner| if goes(*owner) { control } else { *owner }).collect();
    let changes = compile::difference(&owners, &after);
    let mut split = record.split.clone();
    for (name, share) in &mut split {
        let slot = record.slots.iter().position(|slot| slot == name);
        if slot.and_then(|slot| u8::try_from(slot).ok()).is_none_or(goes) {
            *share = Share::ZERO;
        }
    }
    let record = ServiceRecord {
        split,
        owners: compile::encode_owners(&after),
        placements: None,
        ..record.clone()
    };
    Some((record, compile::encode_changes(&changes), changes.len() as u32))
}

impl Planner {
    /// Puts what [`ServiceState::propose_panic`] proposed in force, from the next step on, and
    /// whatever else the buckets wait for. `moves`: open connections of other versions go, too.
    pub fn panic(&mut self, service: usize, ownership: Ownership, moves: bool) {
        let Some(state) = self.services.get_mut(service) else {
            return;
        };
        let control = state.control;
        for table in &mut state.tables {
            // A bucket that is still to be swept moves all the same. What may be found there
            // then is the entry of a flow that has been let go of and has come again, with the
            // same ports, within that time.
            if !table.unswept.is_empty() {
                let owners = state.ownership.owners.plain();
                let others = |bucket: &u32| owners[*bucket as usize] != control;
                let others: Vec<u32> = table.unswept.iter().filter(others).collect();
                others.into_iter().for_each(|bucket| table.unswept.remove(bucket));
            }
            if moves {
                let live = table.backends.iter().map(|b| (b.index, b.slot));
                let gone = table.draining.iter().map(|d| (d.index, d.slot));
                let others = live.chain(gone).filter(|(_, slot)| *slot != control);
                self.cutting.extend(others.map(|(index, _)| index));
                table.cut = true;
            }
        }
        for at in self.with_derived(service) {
            let table = self.services[at].config.name.clone();
            self.drop_raise(&table);
        }
        self.set_ownership(service, ownership);
    }

    /// Goes on from what the maps hold by now of these tables: somebody else has written them.
    pub fn resync(&mut self, found: &[AdoptedService], now_ms: BootMs) {
        for state in &mut self.services {
            for table in &mut state.tables {
                let its = |f: &&AdoptedService| f.id == table.id && f.name == state.config.name;
                let Some(found) = found.iter().find(its) else { continue };
                state.generation += 1;
                state.dirty = true;
                let length = table.entries.len();
                if found.first_page != table.first_page || found.entries.len() != length {
                    // A reload was about to put it elsewhere: what it goes on from is there.
                    continue;
                }
                let (entries, ledger) = adopt::sanitised(
                    found,
                    length as u32,
                    &state.slots,
                    state.control,
                    |index| {
                        table.backends.iter().any(|b| b.index == index)
                            || table.draining.iter().any(|d| d.index == index)
                    },
                    now_ms,
                );
                table.goes_on_with(entries, ledger);
            }
        }
    }
}
