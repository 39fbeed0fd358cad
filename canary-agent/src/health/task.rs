//! The prober's task: starts what is due, and takes in what comes out.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::{self, JoinError, JoinSet},
    time::{Instant, sleep_until},
};

use super::{
    Checker, Outcome, Pace, Reports, Target,
    direct::Direct,
    probe::{Method, Probe},
};
use crate::{config::model::Health, plan::Tunnel};

/// A target's number. A target that is checked in another way gets another, so that
/// what is left of the old one finds nobody.
type Id = u64;

/// A target and what belongs to it.
struct Entry {
    service: Arc<str>,
    addr: SocketAddr,
    health: Arc<Health>,
    vips: Arc<[IpAddr]>,
    tunnel: Option<Tunnel>,
    probe: Probe,
    checker: Checker,
    pace: Pace,
    interval: Duration,
}

/// A check that is done.
struct Done {
    begun: Instant,
    outcome: Outcome,
}

/// The task's state. Each entry is either in `due` or in `running`.
pub(super) struct Task {
    at_once: usize,
    wanted: watch::Receiver<Arc<Vec<Target>>>,
    reports: Reports,
    tell: watch::Sender<()>,
    on_check: Box<dyn Fn(IpAddr, bool) + Send>,
    direct: Arc<Direct>,
    began: Instant,
    next_id: Id,
    entries: HashMap<Id, Entry>,
    due: BinaryHeap<Reverse<(Instant, Id)>>,
    checks: JoinSet<Done>,
    running: HashMap<task::Id, Id>,
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task").field("entries", &self.entries.len()).finish_non_exhaustive()
    }
}

impl Task {
    pub(super) fn new(
        at_once: usize,
        wanted: watch::Receiver<Arc<Vec<Target>>>,
        reports: Reports,
        tell: watch::Sender<()>,
        on_check: Box<dyn Fn(IpAddr, bool) + Send>,
        direct: Direct,
    ) -> Self {
        Self {
            at_once,
            wanted,
            reports,
            tell,
            on_check,
            direct: Arc::new(direct),
            began: Instant::now(),
            next_id: 0,
            entries: HashMap::new(),
            due: BinaryHeap::new(),
            checks: JoinSet::new(),
            running: HashMap::new(),
        }
    }

    /// Runs until the prober is dropped.
    pub(super) async fn run(mut self) {
        // What was set before the task first ran is seen as a change.
        self.wanted.mark_changed();
        loop {
            let next = self.start_due();
            let timer = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let targets = Arc::clone(&self.wanted.borrow_and_update());
                    self.replace(&targets);
                }
                Some(done) = self.checks.join_next_with_id() => {
                    self.finish(done);
                    while let Some(done) = self.checks.try_join_next_with_id() {
                        self.finish(done);
                    }
                }
                () = timer => {}
            }
        }
    }

    /// Starts what is due, as far as there is room. Returns when to come back; `None` where
    /// something has to end first.
    fn start_due(&mut self) -> Option<Instant> {
        let now = Instant::now();
        while self.checks.len() < self.at_once {
            let Reverse((at, id)) = *self.due.peek()?;
            if at > now {
                return Some(at);
            }
            self.due.pop();
            let Some(entry) = self.entries.get(&id) else {
                continue;
            };
            let probe = entry.probe.clone();
            let check = self.checks.spawn(async move {
                let begun = Instant::now();
                Done { begun, outcome: probe.run().await }
            });
            self.running.insert(check.id(), id);
        }
        None
    }

    fn finish(&mut self, done: Result<(task::Id, Done), JoinError>) {
        let (id, done) = match done {
            Ok((task, done)) => (self.running.remove(&task), Some(done)),
            Err(error) => {
                tracing::error!(%error, "a health check has come to no end");
                (self.running.remove(&error.id()), None)
            }
        };
        let Some((id, entry)) = id.and_then(|id| Some((id, self.entries.get_mut(&id)?))) else {
            return;
        };
        let now = Instant::now();
        let mut earliest = now;
        if let Some(Done { begun, outcome }) = done {
            match outcome {
                Outcome::Passed(_) | Outcome::Failed(_) => {
                    let passed = matches!(outcome, Outcome::Passed(_));
                    entry.checker.observe(passed);
                    (self.on_check)(entry.addr.ip(), passed);
                }
                Outcome::NotChecked(_) => {}
            }
            let down = !entry.checker.is_up();
            if self.reports.record(&entry.service, entry.addr, outcome, down) {
                self.tell.send_replace(());
            }
            // One that began late must not be followed at once: failures in a row are to be
            // so far apart as the interval says, or nearly.
            earliest = earliest.max(begun + entry.interval / 2);
        }
        let next = self.began + entry.pace.next(earliest.duration_since(self.began));
        self.due.push(Reverse((next, id)));
    }

    /// Goes on with other targets.
    fn replace(&mut self, targets: &[Target]) {
        let mut before: HashMap<(Arc<str>, SocketAddr), Id> = self
            .entries
            .iter()
            .map(|(id, entry)| ((Arc::clone(&entry.service), entry.addr), *id))
            .collect();
        let now = Instant::now();
        let mut entries = HashMap::with_capacity(targets.len());
        // What the backends of a service have in common is made once.
        let mut methods: HashMap<*const Health, Option<Arc<Method>>> = HashMap::new();
        for Target { service, addr, health, vips, tunnel, down } in targets {
            let method = methods
                .entry(Arc::as_ptr(health))
                .or_insert_with(|| Method::new(health, &self.direct).map(Arc::new));
            let Some(method) = method else {
                continue;
            };
            let timing = method.timing();
            let key = (Arc::clone(service), *addr);
            let old = before.remove(&key).and_then(|id| Some((id, self.entries.remove(&id)?)));
            let up = match old {
                Some((id, entry))
                    if entry.health == *health
                        && entry.vips == *vips
                        && entry.tunnel == *tunnel =>
                {
                    entries.insert(id, entry);
                    continue;
                }
                Some((_, entry)) => entry.checker.is_up(),
                None if self.reports.of_backend(service, *addr).is_some() => {
                    // Named twice.
                    continue;
                }
                None => !down,
            };
            let pace = Pace::new(service, *addr, timing.interval, timing.jitter_percent);
            let entry = Entry {
                service: Arc::clone(service),
                addr: *addr,
                health: Arc::clone(health),
                vips: Arc::clone(vips),
                tunnel: *tunnel,
                probe: Probe::new(*addr, Arc::clone(vips), *tunnel, Arc::clone(method)),
                checker: Checker::new(timing.rise, timing.fall, up),
                pace,
                interval: timing.interval,
            };
            self.reports.add(service, *addr, !up);
            let first = self.began + pace.next(now.duration_since(self.began));
            self.due.push(Reverse((first, self.next_id)));
            entries.insert(self.next_id, entry);
            self.next_id += 1;
        }
        for (service, addr) in before.into_keys() {
            self.reports.remove(&service, addr);
        }
        self.entries = entries;
        self.due.retain(|Reverse((_, id))| self.entries.contains_key(id));
    }
}
