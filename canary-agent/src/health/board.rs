//! What is known of each target: written by the prober's task, read for status.
//!
//! A lock that nobody holds for long: a check writes one report under it, status
//! copies those of one service.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::{Change, Failure, Outcome};

/// For so long after the last time it is said that this host can't check.
const TROUBLE: Duration = Duration::from_secs(10);

/// What is known of one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Whether it is down.
    pub down: bool,
    /// Since when, as far as this agent knows.
    pub since: Instant,
    /// Checks that passed.
    pub passes: u64,
    /// Checks that failed.
    pub failures: u64,
    /// The last failure, and when it was found out.
    pub last_failure: Option<(Failure, Instant)>,
    /// How long the last check took that passed.
    pub latency: Option<Duration>,
}

impl Report {
    fn new(down: bool, now: Instant) -> Self {
        Self { down, since: now, passes: 0, failures: 0, last_failure: None, latency: None }
    }
}

#[derive(Debug)]
struct Slot {
    report: Report,
    /// What was last told.
    told_down: bool,
    /// It is among the changes.
    queued: bool,
}

#[derive(Debug, Default)]
struct Board {
    services: HashMap<Arc<str>, HashMap<SocketAddr, Slot>>,
    changes: Vec<(Arc<str>, SocketAddr)>,
    trouble: Option<(Errno, Instant)>,
}

/// What is known of all targets. Cheap to clone; clones are about the same targets.
#[derive(Clone, Debug, Default)]
pub struct Reports(Arc<Mutex<Board>>);

impl Reports {
    fn board(&self) -> MutexGuard<'_, Board> {
        // Every change under the lock leaves the board whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of one service, by backend.
    pub fn of_service(&self, service: &str) -> HashMap<SocketAddr, Report> {
        let board = self.board();
        let slots = board.services.get(service).into_iter().flatten();
        slots.map(|(addr, slot)| (*addr, slot.report.clone())).collect()
    }

    /// That of one backend of a service.
    pub fn of_backend(&self, service: &str, addr: SocketAddr) -> Option<Report> {
        Some(self.board().services.get(service)?.get(&addr)?.report.clone())
    }

    /// Why this host could not check a backend a moment ago, if so.
    pub fn trouble(&self) -> Option<Errno> {
        let (errno, at) = self.board().trouble?;
        (at.elapsed() < TROUBLE).then_some(errno)
    }

    /// Begins to know of a target, or goes on if it is known.
    pub(super) fn add(&self, service: &Arc<str>, addr: SocketAddr, down: bool) {
        let mut board = self.board();
        let slots = board.services.entry(Arc::clone(service)).or_default();
        slots.entry(addr).or_insert_with(|| Slot {
            report: Report::new(down, Instant::now()),
            told_down: down,
            queued: false,
        });
    }

    /// Knows no more of a target.
    pub(super) fn remove(&self, service: &str, addr: SocketAddr) {
        let mut board = self.board();
        if let Some(slots) = board.services.get_mut(service) {
            slots.remove(&addr);
            if slots.is_empty() {
                board.services.remove(service);
            }
        }
    }

    /// Takes in what a check came to, and what the backend is since then. Returns whether
    /// there is something to tell that was not there before.
    pub(super) fn record(
        &self,
        service: &Arc<str>,
        addr: SocketAddr,
        outcome: Outcome,
        down: bool,
    ) -> bool {
        let now = Instant::now();
        let mut board = self.board();
        let Board { services, changes, trouble } = &mut *board;
        let Some(slot) = services.get_mut(service).and_then(|slots| slots.get_mut(&addr)) else {
            return false;
        };
        let report = &mut slot.report;
        match outcome {
            Outcome::Passed(latency) => {
                report.passes += 1;
                report.latency = Some(latency);
            }
            Outcome::Failed(failure) => {
                report.failures += 1;
                report.last_failure = Some((failure, now));
            }
            Outcome::NotChecked(errno) => *trouble = Some((errno, now)),
        }
        if report.down != down {
            (report.down, report.since) = (down, now);
        }
        let news = slot.told_down != down && !slot.queued;
        if news {
            slot.queued = true;
            changes.push((Arc::clone(service), addr));
        }
        news
    }

    pub(super) fn has_changes(&self) -> bool {
        !self.board().changes.is_empty()
    }

    /// What has changed since the last time, each backend as it is now.
    pub(super) fn take_changes(&self) -> Vec<Change> {
        let mut board = self.board();
        let Board { services, changes, trouble: _ } = &mut *board;
        let mut news = Vec::new();
        for (service, addr) in changes.drain(..) {
            let Some(slot) = services.get_mut(&service).and_then(|slots| slots.get_mut(&addr))
            else {
                continue;
            };
            slot.queued = false;
            let Report { down, ref last_failure, .. } = slot.report;
            if slot.told_down != down {
                slot.told_down = down;
                let why = last_failure.as_ref().map(|(why, _)| why.clone());
                news.push(Change { service, addr, down, why });
            }
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSED: Outcome = Outcome::Passed(Duration::from_millis(1));
    const FAILED: Outcome = Outcome::Failed(Failure::Closed);

    #[test]
    fn what_flaps_is_told_once_and_what_flaps_back_not_at_all() {
        let (reports, shop) = (Reports::default(), Arc::<str>::from("shop"));
        let addrs: [SocketAddr; 2] = [([10, 0, 0, 1], 80).into(), ([10, 0, 0, 2], 80).into()];
        addrs.iter().for_each(|addr| reports.add(&shop, *addr, false));
        assert!(!reports.record(&shop, addrs[0], FAILED, false), "not down yet");
        for n in 0..1001 {
            let first = reports.record(&shop, addrs[0], FAILED, n % 2 == 0);
            let second = reports.record(&shop, addrs[1], PASSED, n % 2 == 1);
            assert_eq!((first, second), (n == 0, n == 1));
        }
        let changes = reports.take_changes();
        let why = Some(Failure::Closed);
        assert_eq!(changes, [Change { service: shop.clone(), addr: addrs[0], down: true, why }]);
        assert!(!reports.has_changes() && reports.take_changes().is_empty());
        assert!(reports.record(&shop, addrs[0], PASSED, false), "it is news again");
        let report = reports.of_backend("shop", addrs[0]).unwrap();
        assert_eq!((report.passes, report.failures, report.down), (1, 1002, false));
    }

    #[test]
    fn of_what_is_gone_nothing_is_told() {
        let (reports, shop) = (Reports::default(), Arc::<str>::from("shop"));
        let addr: SocketAddr = ([10, 0, 0, 1], 80).into();
        reports.add(&shop, addr, false);
        assert!(reports.record(&shop, addr, FAILED, true));
        reports.remove("shop", addr);
        assert!(reports.take_changes().is_empty());
        assert!(!reports.record(&shop, addr, FAILED, true), "a check that was under way");
        assert!(reports.of_service("shop").is_empty());
    }

    #[test]
    fn a_host_that_can_not_check_says_nothing_about_backends() {
        let (reports, shop) = (Reports::default(), Arc::<str>::from("shop"));
        let addr: SocketAddr = ([10, 0, 0, 1], 80).into();
        reports.add(&shop, addr, true);
        reports.record(&shop, addr, Outcome::NotChecked(Errno::EMFILE), true);
        let report = reports.of_backend("shop", addr).unwrap();
        assert_eq!((report.passes, report.failures, report.last_failure), (0, 0, None));
        assert_eq!(reports.trouble(), Some(Errno::EMFILE));
    }
}
