//! Classes of clients as they change: what keeps open connections where they are.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    fewest::Labelled,
    flatten::{combine, flatten, union},
    prefix::{Prefix, Width},
};
use crate::{
    abi::ClassState as State,
    class::{Class, ClassEntry},
};

/// How long what is remembered of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Seconds after its last change that a prefix remembers its class before; `None` for ever.
    pub drain_s: Option<u32>,
    /// Seconds that UDP flows are learned for.
    pub learn_s: u32,
}

/// The classes of one family's clients.
///
/// What is tracked stays so until its drain has passed since its *last* change, and its class
/// before stays the same through all of them. A client that is tracked no more is tracked again
/// only when the flow table has been swept of what it still remembers of it: until then, changes
/// of its class wait.
#[derive(Clone, Debug)]
pub struct Classes {
    wanted: Labelled<Class>,
    states: Arc<Labelled<State>>,
    /// When the next of them changes by itself, and at what pace that was reckoned.
    due_s: Option<u32>,
    paced: Option<Pace>,
    /// Prefixes that may have flow entries of their former life.
    unswept: Vec<Prefix>,
    /// Those of them that the sweep under way is about.
    sweeping: Vec<Prefix>,
    dirty: bool,
    waits: bool,
}

impl Classes {
    /// Everybody in [`Class::REST`].
    pub fn new(width: Width) -> Self {
        Self::adopted(width, Vec::new())
    }

    /// Goes on from what is in the map.
    pub fn adopted(width: Width, found: Vec<(Prefix, State)>) -> Self {
        let rest = State::default();
        let states = flatten(width, found, rest, |_, state| state, |state| state);
        Self {
            wanted: Labelled::new(width, Class::REST),
            states: Arc::new(states),
            due_s: None,
            paced: None,
            unswept: Vec::new(),
            sweeping: Vec::new(),
            dirty: true,
            waits: false,
        }
    }

    /// Classes of clients who have no connection from before.
    pub fn first(wanted: Labelled<Class>) -> Self {
        let nobody = Labelled::new(wanted.width(), ());
        let steady = |class, ()| State { entry: ClassEntry::steady(class), changed_s: 0 };
        let states = Arc::new(combine(&wanted, &nobody, steady));
        Self { states, dirty: false, ..Self::new(wanted.width()) }.wanting(wanted)
    }

    fn wanting(self, wanted: Labelled<Class>) -> Self {
        Self { wanted, ..self }
    }

    /// What the map should hold: the same allocation as long as nothing changes.
    pub fn states(&self) -> &Arc<Labelled<State>> {
        &self.states
    }

    /// Whether some client's class before is remembered.
    pub fn tracks(&self) -> bool {
        self.states.prefixes().iter().any(|(_, state)| state.entry.tracked())
    }

    /// How many networks may have flow entries of their former life.
    pub fn unswept(&self) -> usize {
        self.unswept.len()
    }

    /// Whether a change waits for a sweep.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Every class that a table is needed for: those of clients, and those of older connections.
    pub fn used(&self) -> BTreeSet<Class> {
        let of =
            |entry: ClassEntry| [Some(entry.current()), entry.tracked().then(|| entry.previous())];
        let entries = self.states.prefixes().iter().map(|(_, state)| state.entry);
        entries.flat_map(of).flatten().chain([Class::REST]).collect()
    }

    /// Which classes clients shall have from the next step on. The family is that of before.
    pub fn want(&mut self, wanted: Labelled<Class>) {
        self.wanted = wanted;
        self.dirty = true;
    }

    /// Brings the states up to `now_s`. Returns when the next step is due if nothing else happens.
    pub fn step(&mut self, now_s: u32, pace: Pace) -> Option<u32> {
        if self.paced != Some(pace) {
            self.paced = Some(pace);
            self.due_s = self.due(pace);
        }
        self.settle(now_s, pace);
        if std::mem::take(&mut self.dirty) {
            let width = self.states.width();
            let held: Vec<(Prefix, bool)> = self.unswept.iter().map(|p| (*p, true)).collect();
            let held = flatten(width, held, false, |_, held| held, |held| held);
            let wanted = combine(&self.wanted, &held, |class, held| (class, held));
            let mut waits = false;
            let states = combine(&self.states, &wanted, |state, (class, held)| {
                let State { entry, .. } = state;
                if entry.current() == class {
                    return state;
                }
                if held {
                    waits = true;
                    return state;
                }
                let previous = if entry.tracked() { entry.previous() } else { entry.current() };
                let entry = ClassEntry::tracking(class, previous, pace.learn_s > 0);
                State { entry, changed_s: now_s }
            });
            self.waits = waits;
            self.go_on_with(states, pace);
        }
        self.due_s
    }

    fn go_on_with(&mut self, states: Labelled<State>, pace: Pace) {
        if *self.states != states {
            self.states = Arc::new(states);
            self.due_s = self.due(pace);
        }
    }

    /// Ends what is over by `now_s`.
    fn settle(&mut self, now_s: u32, pace: Pace) {
        if self.due_s.is_none_or(|at| at > now_s) {
            return;
        }
        let mut ended = Vec::new();
        let states = self.states.map(|prefix, state| {
            if let Some(at) = clears_s(prefix, state, pace)
                && at <= now_s
            {
                ended.push(prefix);
                return State { entry: ClassEntry::steady(state.entry.current()), changed_s: 0 };
            }
            match learned_s(state, pace) {
                Some(at) if at <= now_s => State { entry: state.entry.learned(), ..state },
                _ => state,
            }
        });
        if !ended.is_empty() {
            self.unswept.append(&mut ended);
            self.unswept = union(std::mem::take(&mut self.unswept));
        }
        self.go_on_with(states, pace);
    }

    fn due(&self, pace: Pace) -> Option<u32> {
        let due = |(prefix, state): &(Prefix, State)| {
            let clears = clears_s(*prefix, *state, pace);
            let learned = learned_s(*state, pace);
            clears.into_iter().chain(learned).min()
        };
        self.states.prefixes().iter().filter_map(due).min()
    }

    /// Begins a sweep of the clients that are tracked no more, when the present states are in
    /// force; empty if there are none, or another sweep is under way.
    pub fn begin_sweep(&mut self) -> &[Prefix] {
        if !self.sweeping.is_empty() {
            return &[];
        }
        self.sweeping = self.unswept.clone();
        &self.sweeping
    }

    /// Says that the sweep that was begun is done. Returns whether another step is needed at once.
    pub fn swept(&mut self) -> bool {
        let swept = std::mem::take(&mut self.sweeping);
        // What was added meanwhile is in networks of its own, or around what was swept.
        self.unswept.retain(|prefix| !swept.iter().any(|done| done.contains(*prefix)));
        self.dirty |= self.waits;
        self.waits
    }
}

/// When a prefix forgets its class before: spread over the last tenth of the drain, so that not
/// all connections that have outlived it are let go in the same second.
fn clears_s(prefix: Prefix, state: State, pace: Pace) -> Option<u32> {
    let drain_s = pace.drain_s?;
    if !state.entry.tracked() {
        return None;
    }
    let mixed = (prefix.bits() >> 64) as u64 ^ prefix.bits() as u64 ^ u64::from(prefix.len());
    let early = (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u32 % (drain_s / 10 + 1);
    Some(state.changed_s.saturating_add(drain_s - early))
}

fn learned_s(state: State, pace: Pace) -> Option<u32> {
    state.entry.learning().then(|| state.changed_s.saturating_add(pace.learn_s))
}
