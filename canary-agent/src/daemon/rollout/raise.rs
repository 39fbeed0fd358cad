//! What rollouts give audiences: their tables follow those of their services, and have more of a
//! version only as far as a rollout says.
//!
//! Where a rollout stands says what it has given, and is stored before that is in force. What a panic
//! has taken away is not given again: only a step gives.

use canary_ebpf_common::{compile, share::Share};

use super::ACTION;
use crate::{
    config::{derived, model::Rollout},
    daemon::{Kernel, Moment, State},
    plan::{Ownership, Raise, Raises},
    rollout::drive::{Ask, Record},
    store::{Change, Commit, StateStore, StoredRollout},
};

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Before anything is in force: what rollouts have given under an earlier agent.
    pub(in crate::daemon) fn begin_raises(
        &mut self,
        configured: &[std::sync::Arc<Rollout>],
        stored: &[StoredRollout],
    ) {
        let mut raises = Raises::new();
        for one in stored {
            let Ok(record) = serde_json::from_str::<Record>(&one.record) else { continue };
            let config = configured.iter().find(|rollout| rollout.name == record.name);
            if !record.stage.is_over() {
                raises.extend(self.given(&record, config.map(AsRef::as_ref)));
            }
        }
        self.planner.set_raises(raises);
        self.rollouts.configured = configured.to_vec();
    }

    /// What a rollout that stands so has given.
    fn given(&self, record: &Record, config: Option<&Rollout>) -> Raises {
        let has = self.planner.service(&record.service).map(|(_, state)| {
            let split = &state.ownership().split;
            split.get(&record.to).copied().unwrap_or(Share::ZERO)
        });
        // An agent that has ended in between has set it, and could not say so any more.
        let enters =
            |share: &Share| config.is_some_and(|rollout| record.enters_with(rollout, *share));
        let [_, mine] = record.shares;
        let everyone = has.filter(enters).unwrap_or(mine);
        let raise = |share: &Share| Raise { version: record.to.clone(), everyone, share: *share };
        let given = record.audiences.iter();
        given.map(|(name, share)| (derived::name(&record.service, name), raise(share))).collect()
    }

    /// Lets go of what was given by rollouts that have not given it any more. Returns whether
    /// something is to be brought about.
    pub(in crate::daemon) fn sync_raises(&mut self) -> bool {
        let mut given = Raises::new();
        for active in &self.rollouts.active {
            let record = active.run.position();
            if !record.stage.is_over() {
                let config = self.rollouts.config(&record.name);
                given.extend(self.given(record, config.map(AsRef::as_ref)));
            }
        }
        given.retain(|table, _| self.planner.raises().contains_key(table));
        self.planner.set_raises(given)
    }

    /// Whether somebody has taken away what a rollout has given.
    pub(super) fn is_taken_away(&self, record: &Record) -> bool {
        let raises = self.planner.raises();
        let table = |name: &String| derived::name(&record.service, name);
        record.audiences.keys().any(|name| {
            // Without a table it follows from another configuration.
            let table = table(name);
            self.planner.service(&table).is_some() && !raises.contains_key(&table)
        })
    }

    /// What counts when everyone has `everyone` of a rollout's version, and its audiences these.
    pub(super) fn raises_with<'a>(
        &self,
        record: &Record,
        everyone: Share,
        audiences: impl IntoIterator<Item = (&'a String, &'a Share)>,
    ) -> Raises {
        let mut raises = self.planner.raises().clone();
        raises.retain(|table, _| {
            derived::parts(table).is_none_or(|(service, _)| service != record.service)
        });
        raises.extend(audiences.into_iter().map(|(name, share)| {
            let raise = Raise { version: record.to.clone(), everyone, share: *share };
            (derived::name(&record.service, name), raise)
        }));
        raises
    }

    /// Gives an audience its share, and tells the rollout what became of it.
    pub(super) fn set_audience(&mut self, at: usize, ask: &Ask, now: Moment) {
        let begun = std::time::Instant::now();
        let name = self.rollouts.active[at].run.position().name.clone();
        let Some(rollout) = self.rollouts.config(&name).cloned() else { return };
        let before = self.rollouts.active[at].run.clone();
        let moment = super::at(now);
        let done = self.give(at, ask, now).and_then(|raises| {
            let wishes = self.rollouts.active[at].run.was_set(&rollout, Ok(ask.clone()), moment);
            // What is in force is stored: where it stands says what it has given.
            match self.keep_rollout(at, true, now) {
                true => Ok((raises, wishes)),
                false => Err("the disk: where it stands can't be stored".to_owned()),
            }
        });
        let wishes = match done {
            Ok((raises, wishes)) => {
                self.rollouts.active[at].set_ms = now.boot_ms;
                self.rollouts.active[at].connections = None;
                self.planner.set_raises(raises);
                self.settle(now);
                self.metrics.split_applied(begun.elapsed());
                wishes
            }
            Err(why) => {
                self.rollouts.active[at].run = before;
                self.rollouts.active[at].run.was_set(&rollout, Err(why), moment)
            }
        };
        self.fulfil(at, wishes, now);
    }

    /// Writes down that an audience is given a share. Returns what counts with that.
    fn give(&mut self, at: usize, ask: &Ask, now: Moment) -> Result<Raises, String> {
        let record = self.rollouts.active[at].run.position().clone();
        let Some((table, raises, after)) = self.asked(&record, ask) else {
            return Err(format!("a table for clients of {ask}: reload the configuration"));
        };
        let reason = format!("rollout {}, step {}", record.name, record.step + 1);
        let uid = self.rollouts.active[at].by;
        let commit = self.line_of(table, &after, Some(reason), uid, now);
        self.save(vec![commit], now)
            .map_err(|error| format!("the disk: {}", super::not_stored(&error)))?;
        Ok(raises)
    }

    /// The table of an audience that a share is asked for; what counts with it, and the owners
    /// that it leads to.
    pub(super) fn asked(&self, record: &Record, ask: &Ask) -> Option<(usize, Raises, Ownership)> {
        let audience = ask.audience.as_ref()?;
        let name = derived::name(&record.service, audience);
        let (_, base) = self.planner.service(&record.service)?;
        let (table, state) = self.planner.service(&name)?;
        if !state.follows() || state.slot(&record.to).is_none() {
            return None;
        }
        let everyone = base.ownership().split.get(&record.to).copied().unwrap_or(Share::ZERO);
        let mut audiences = record.audiences.clone();
        audiences.insert(audience.clone(), ask.share);
        let raises = self.raises_with(record, everyone, &audiences);
        let after = self.planner.follower(table, base.ownership(), raises.get(&name));
        Some((table, raises, after))
    }

    /// The line of the audit trail of what becomes of an audience's table. Nothing else is stored of
    /// it.
    pub(super) fn line_of(
        &self,
        table: usize,
        after: &Ownership,
        reason: Option<String>,
        uid: Option<u32>,
        now: Moment,
    ) -> Commit {
        let state = &self.planner.services()[table];
        let before = state.ownership();
        let moved = compile::difference(&before.owners.plain(), &after.owners.plain());
        Commit {
            change: Change {
                unix_ms: now.unix_ms,
                uid,
                service: state.config().name.clone(),
                action: ACTION.to_owned(),
                reason,
                before: before.split.clone(),
                after: after.split.clone(),
                moved: compile::encode_changes(&moved),
                buckets_moved: moved.len() as u32,
                slots: state.slots().to_vec(),
                salt: Some(before.salt),
                ..Change::default()
            },
            record: None,
            deadline: None,
            settles: Vec::new(),
        }
    }
}
