//! Tables of audiences that follow the split of their service, and have more of a version only as far
//! as a rollout gives it to them.
//!
//! What such a table is to be is a function of its service's owners and of what was given: nothing of
//! it is stored, nobody but a rollout can set it, and whatever takes the share of everyone back or
//! gives it back has its effect here, too.

use std::{collections::BTreeMap, sync::Arc};

use canary_ebpf_common::share::Share;

use super::{Ownership, Planner, ServiceState, adopt::slot};

/// What a rollout has given clients of an audience.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raise {
    /// The version.
    pub version: String,
    /// Everyone's share of it by the same rollout: where that is another by now, somebody else has set
    /// it, and what was given counts no more.
    pub everyone: Share,
    /// The audience's.
    pub share: Share,
}

/// What was given, by the names of tables.
pub type Raises = BTreeMap<String, Raise>;

/// What the present owners of tables that follow were made of.
#[derive(Debug, Default)]
pub(super) struct Following {
    pub(super) raises: Raises,
    /// By table: what its service was, and what had been given.
    made_of: BTreeMap<String, (u64, Option<Raise>)>,
}

impl Following {
    /// The configuration is another.
    pub(super) fn forget(&mut self) {
        self.made_of.clear();
    }
}

/// Whose slots owners are in: the names of versions by slot, and that of control.
#[derive(Clone, Copy)]
pub(super) struct Slots<'s> {
    pub(super) names: &'s [String],
    pub(super) control: u8,
}

impl<'s> Slots<'s> {
    pub(super) fn of(state: &'s ServiceState) -> Self {
        Self { names: &state.slots, control: state.control }
    }
}

/// `everyone`, which is in the slots of `theirs`, as owners in those of `own`, with what was given.
pub(super) fn followed(
    everyone: &Ownership,
    theirs: Slots<'_>,
    own: Slots<'_>,
    raise: Option<&Raise>,
) -> Ownership {
    let mut ownership = everyone.clone();
    if (theirs.names, theirs.control) != (own.names, own.control) {
        let name = |at: u8| theirs.names.get(usize::from(at)).map_or("", String::as_str);
        let known: Vec<u8> = (0..=u8::MAX)
            .map(|at| match at == theirs.control {
                true => own.control,
                false => slot(own.names, name(at)).unwrap_or(own.control),
            })
            .collect();
        let owners = everyone.owners.plain();
        let owners: Vec<u8> = owners.iter().map(|owner| known[usize::from(*owner)]).collect();
        ownership.owners = Arc::new(owners.into());
    }
    let Some(Raise { version, everyone: by_then, share }) = raise else { return ownership };
    let has = everyone.split.get(version).copied().unwrap_or(Share::ZERO);
    let there = slot(own.names, version).is_some_and(|slot| slot != own.control);
    if has != *by_then || *share <= has || !there {
        return ownership;
    }
    let others = everyone.split.iter().filter(|(name, _)| *name != version);
    // Another version may have been given more since.
    let share = (*share).min(Share::rest(others.map(|(_, share)| *share))).max(has);
    let mut split = everyone.split.clone();
    split.insert(version.clone(), share);
    match ownership.propose(own.names, own.control, split) {
        Ok(proposal) => proposal.ownership,
        // Rounded, they may be one bucket too many: nothing is better than too much.
        Err(_) => ownership,
    }
}

impl Planner {
    /// What rollouts have given audiences counts from the next step on, in place of what counted
    /// until then. Returns whether that is something else.
    pub fn set_raises(&mut self, raises: Raises) -> bool {
        let others = self.following.raises != raises;
        self.following.raises = raises;
        others
    }

    /// What counts of it.
    pub fn raises(&self) -> &Raises {
        &self.following.raises
    }

    /// What clients of an audience were given counts no more.
    pub fn drop_raise(&mut self, table: &str) {
        self.following.raises.remove(table);
    }

    /// The tables that follow a service.
    pub fn followers(&self, service: usize) -> impl Iterator<Item = usize> + '_ {
        self.with_derived(service).filter(move |at| *at != service && self.services[*at].follows())
    }

    /// What a table that follows its service would have of it with these owners of everyone's, and
    /// this given to it.
    pub fn follower(&self, at: usize, everyone: &Ownership, raise: Option<&Raise>) -> Ownership {
        let state = &self.services[at];
        let base = self.followed_by(state).unwrap_or(state);
        followed(everyone, Slots::of(base), Slots::of(state), raise)
    }

    /// Watches the buckets that would move in tables that follow a service, if everyone's owners were
    /// these.
    pub(super) fn prepare_followers(&mut self, service: usize, everyone: Option<&Ownership>) {
        let followers: Vec<usize> = self.followers(service).collect();
        for at in followers {
            let own = everyone.map(|everyone| {
                let raise = self.raises().get(&self.services[at].config.name);
                // Whoever sets everyone's share says again what counts with it.
                let raise = raise.map(|raise| {
                    let has = everyone.split.get(&raise.version).copied();
                    Raise { everyone: has.unwrap_or(Share::ZERO), ..raise.clone() }
                });
                self.follower(at, everyone, raise.as_ref())
            });
            self.prepare(at, own.as_ref());
        }
    }

    fn followed_by(&self, state: &ServiceState) -> Option<&ServiceState> {
        let of = state.config.derived.as_ref().filter(|of| of.follows)?;
        self.service(&of.service).map(|(_, base)| base)
    }

    /// Brings the owners of tables that follow to what they follow.
    pub(super) fn follow(&mut self) {
        for at in 0..self.services.len() {
            let state = &self.services[at];
            let Some(base) = self.followed_by(state) else { continue };
            let name = &state.config.name;
            let made_of = (base.generation, self.following.raises.get(name).cloned());
            if self.following.made_of.get(name) == Some(&made_of) {
                continue;
            }
            let (name, raise) = (name.clone(), made_of.1.as_ref());
            let ownership = self.follower(at, &base.ownership, raise);
            let other = ownership != self.services[at].ownership;
            self.following.made_of.insert(name, made_of);
            if other {
                self.set_ownership(at, ownership);
            }
        }
    }
}

impl ServiceState {
    /// Whether its split is that of another service, but for what a rollout gives its clients.
    pub fn follows(&self) -> bool {
        self.config.derived.as_ref().is_some_and(|of| of.follows)
    }
}
