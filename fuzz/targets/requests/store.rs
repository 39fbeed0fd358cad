//! A store that keeps everything in memory, and forgets it with the world.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use canary_agent::store::{
    Change, Commit, Event, EventQuery, EvidenceLine, Notice, Snapshot, StateStore, StoreError,
    StoredMember, StoredRollout,
};
use tokio::sync::watch;

/// What is stored.
pub(crate) struct Memory {
    /// The last revision, for whoever wants to know whether anything was changed.
    pub(crate) revision: Arc<AtomicU64>,
    changes: Vec<(u64, Change)>,
    events: Vec<Event>,
    rollouts: Vec<StoredRollout>,
    last: watch::Sender<u64>,
}

impl Memory {
    pub(crate) fn new(revision: Arc<AtomicU64>) -> Self {
        revision.store(0, Ordering::Relaxed);
        let (changes, events, rollouts) = (Vec::new(), Vec::new(), Vec::new());
        Self { revision, changes, events, rollouts, last: watch::Sender::new(0) }
    }

    fn happened(&mut self, event: impl FnOnce(u64) -> Event) {
        let id = self.events.len() as u64 + 1;
        self.events.push(event(id));
        self.last.send_replace(id);
    }
}

impl StateStore for Memory {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        Ok(Snapshot::default())
    }

    fn commit(&mut self, expected: u64, commits: &[Commit]) -> Result<u64, StoreError> {
        let found = self.revision.load(Ordering::Relaxed);
        if found != expected {
            return Err(StoreError::Stale { expected, found });
        }
        for Commit { change, .. } in commits {
            let revision = self.revision.fetch_add(1, Ordering::Relaxed) + 1;
            self.changes.push((revision, change.clone()));
            self.happened(|id| Event::Change(id, revision, Box::new(change.clone())));
        }
        Ok(self.revision.load(Ordering::Relaxed))
    }

    fn record(&mut self, notices: &[Notice]) -> Result<(), StoreError> {
        for notice in notices {
            self.happened(|id| Event::Notice(id, notice.clone()));
        }
        Ok(())
    }

    fn keep_rollout(
        &mut self,
        rollout: &StoredRollout,
        _evidence: &[EvidenceLine],
        _durable: bool,
    ) -> Result<u64, StoreError> {
        let number = rollout.number.unwrap_or(self.rollouts.len() as u64 + 1);
        let kept = StoredRollout { number: Some(number), ..rollout.clone() };
        match self.rollouts.iter_mut().find(|one| one.number == Some(number)) {
            Some(one) => *one = kept,
            None => self.rollouts.push(kept),
        }
        Ok(number)
    }

    fn keep_members(
        &mut self,
        _kept: &[StoredMember],
        _gone: &[(String, ipnet::IpNet)],
        _durable: bool,
    ) -> Result<(), StoreError> {
        Ok(())
    }

    fn rollouts(&mut self, name: &str, limit: usize) -> Result<Vec<StoredRollout>, StoreError> {
        let named = self.rollouts.iter().rev().filter(|one| one.name == name);
        Ok(named.take(limit).cloned().collect())
    }

    fn evidence(&mut self, _rollout: u64) -> Result<Vec<EvidenceLine>, StoreError> {
        Ok(Vec::new())
    }

    fn changes(&mut self, after: u64, limit: usize) -> Result<Vec<(u64, Change)>, StoreError> {
        let later = self.changes.iter().filter(|(revision, _)| *revision > after);
        Ok(later.take(limit).cloned().collect())
    }

    fn changes_before(
        &mut self,
        service: Option<&str>,
        before: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Change)>, StoreError> {
        let earlier = self.changes.iter().rev().filter(|(revision, change)| {
            *revision < before && service.is_none_or(|name| change.service == name)
        });
        Ok(earlier.take(limit).cloned().collect())
    }

    fn events(&mut self, query: &EventQuery) -> Result<Vec<Event>, StoreError> {
        let after = query.after.unwrap_or(0);
        let wanted = self.events.iter().filter(|event| event.id() > after);
        Ok(wanted.take(query.limit).cloned().collect())
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}
