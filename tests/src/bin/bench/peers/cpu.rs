//! Time that processors worked.
//!
//! What they did not spend idle, of all that passed. The kernel measures idle time; time of work it
//! samples at ticks, which a paced load runs in step with or past. Beside it, what this process, all that
//! it has started and the kernel's threads ran: where others are at work, too, that is what is left to
//! compare. Where they are not, the difference is what interrupts did while nobody ran.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{time::clock_getcpuclockid, unistd::Pid};

/// The kernel's clocks at a moment.
pub(crate) struct Moment {
    at: Instant,
    processors: u32,
    /// Time that they have been idle, or the host of this machine has kept them.
    away: Duration,
    own: Duration,
}

impl Moment {
    pub(crate) fn now() -> Result<Self> {
        let own = own(std::process::id());
        let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let (processors, away) = parse(&text).context("/proc/stat is of another form")?;
        Ok(Self { at: Instant::now(), processors, away, own })
    }

    /// Seconds that processors have worked since.
    pub(crate) fn worked_since(&self, earlier: &Self) -> f64 {
        let all = (self.at - earlier.at).as_secs_f64() * f64::from(self.processors);
        all - (self.away.saturating_sub(earlier.away)).as_secs_f64()
    }

    /// Seconds that this process, what it has started, and the kernel's threads ran since.
    pub(crate) fn own_since(&self, earlier: &Self) -> f64 {
        self.own.saturating_sub(earlier.own).as_secs_f64()
    }

    /// Percent of the processors that went elsewhere since.
    pub(crate) fn others_since(&self, earlier: &Self) -> f64 {
        let all = (self.at - earlier.at).as_secs_f64() * f64::from(self.processors);
        ((self.worked_since(earlier) - self.own_since(earlier)) / all * 1e2).max(0.0)
    }
}

/// Number of processors, and what they were idle or kept away, by `/proc/stat` (proc(5)).
fn parse(text: &str) -> Option<(u32, Duration)> {
    let processors = text.lines().filter(|line| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    });
    let all = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = all.split_whitespace().map_while(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let away = ticks.get(3)? + ticks.get(4)? + ticks.get(7)?;
    // USER_HZ is 100 on every architecture of the agent's.
    Some((u32::try_from(processors.count()).ok()?, Duration::from_millis(away * 10)))
}

/// Time on processors of `own`, what it has started, and the kernel's threads.
fn own(own: u32) -> Duration {
    let mut parents = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The state and the parent follow the name, which may hold anything.
        let parent =
            stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        parents.extend(parent.map(|parent: u32| (pid, parent)));
    }
    let times = parents.keys().filter(|pid| belongs(**pid, own, &parents)).filter_map(|pid| {
        // Of all its threads, those that have ended too; what has gone meanwhile has none.
        let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(*pid).ok()?)).ok()?;
        clock.now().ok().map(Duration::from)
    });
    times.sum()
}

/// Whether a process is `own`, one of those that it has started, or the kernel's.
fn belongs(pid: u32, own: u32, parents: &HashMap<u32, u32>) -> bool {
    // Threads of the kernel are children of kthreadd.
    const KTHREADD: u32 = 2;
    let mut at = pid;
    // As many steps as there are processes, in case one has gone and its number is used again.
    for _ in 0..=parents.len() {
        if at == own || at == KTHREADD {
            return true;
        }
        match parents.get(&at) {
            Some(parent) => at = *parent,
            None => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_waiting_and_stolen_time_is_not_worked() {
        let text = "cpu  10 1 20 300 40 0 5 6 0 0\ncpu0 5 0 10 150 20 0 2 3 0 0\n\
                    cpu1 5 1 10 150 20 0 3 3 0 0\nctxt 1\n";
        assert_eq!(parse(text), Some((2, Duration::from_millis(3460))));
        assert_eq!(parse("ctxt 1\n"), None);
        let at = Instant::now();
        let moment = |ms: u64, away: u64, own: u64| Moment {
            at: at + Duration::from_millis(ms),
            processors: 2,
            away: Duration::from_millis(away),
            own: Duration::from_millis(own),
        };
        let (before, after) = (moment(0, 100, 10), moment(1_000, 1_350, 720));
        assert!((after.worked_since(&before) - 0.75).abs() < 1e-9);
        assert!((after.own_since(&before) - 0.71).abs() < 1e-9);
        assert!((after.others_since(&before) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn what_a_child_starts_belongs_here_and_the_rest_does_not() {
        let parents = HashMap::from([(1, 0), (2, 0), (7, 1), (8, 7), (9, 8), (10, 1), (3, 2)]);
        for pid in [7, 8, 9, 3, 2] {
            assert!(belongs(pid, 7, &parents), "{pid}");
        }
        for pid in [1, 10, 99] {
            assert!(!belongs(pid, 7, &parents), "{pid}");
        }
        // A loop ends.
        assert!(!belongs(1, 9, &HashMap::from([(1, 2222), (2222, 1)])));
    }

    #[test]
    fn work_of_a_thread_that_has_ended_is_seen() {
        let before = Moment::now().unwrap();
        let spin = || {
            let end = Instant::now() + Duration::from_millis(200);
            while Instant::now() < end {
                std::hint::spin_loop();
            }
        };
        std::thread::spawn(spin).join().unwrap();
        let after = Moment::now().unwrap();
        // It may have had to wait for a processor.
        assert!(after.own_since(&before) > 0.01, "{}", after.own_since(&before));
        assert!(after.worked_since(&before) > 0.01, "{}", after.worked_since(&before));
    }
}
