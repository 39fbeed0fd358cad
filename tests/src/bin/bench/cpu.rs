//! Time of all processors that was not idle.
//!
//! What processors did is sampled by the timer's tick, which misses whoever works between two
//! ticks and hits whoever works at them (Documentation/admin-guide/cpu-load.rst): work in bursts is
//! seen as too little or too much. What they did not is not sampled: the kernel takes the time
//! whenever a processor falls idle and is woken (`get_idle_time` in fs/proc/stat.c, on kernels with
//! `CONFIG_NO_HZ_COMMON`), and says it in ticks of `USER_HZ`, 10 ms of each processor.
//!
//! Beside it, what this process, all that it has started, and the kernel's threads ran: the scheduler knows that to
//! the nanosecond, and others' work is not in it. What comes of a packet that a thread sends is in that thread's time,
//! unless the kernel takes interrupts' out of it (`CONFIG_IRQ_TIME_ACCOUNTING`).

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{time::clock_getcpuclockid, unistd::Pid};

/// A look at the clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    at: Instant,
    processors: u32,
    /// Of all processors together: idle, waiting for a disk, or taken away by a hypervisor.
    away: Duration,
    /// The last of these.
    stolen: Duration,
    /// Of our processes and the kernel's threads.
    own: Duration,
}

impl Look {
    pub(crate) fn now() -> Result<Self> {
        let own = own(std::process::id());
        let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let at = Instant::now();
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
        let (processors, away, stolen) = parsed(&text, ticks as f64)?;
        Ok(Self { at, processors, away, stolen, own })
    }

    /// Wall time since an earlier look, and time on processors.
    pub(crate) fn since(&self, earlier: &Self) -> Spent {
        let wall = self.at - earlier.at;
        let all = wall * self.processors;
        let away = self.away.saturating_sub(earlier.away);
        let busy = all.saturating_sub(away);
        let stolen = self.stolen.saturating_sub(earlier.stolen);
        Spent { wall, all, busy, stolen, own: self.own.saturating_sub(earlier.own) }
    }
}

/// What passed between two looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spent {
    pub(crate) wall: Duration,
    /// Of all processors together.
    all: Duration,
    pub(crate) busy: Duration,
    stolen: Duration,
    pub(crate) own: Duration,
}

impl Spent {
    /// Percent of the processors that worked.
    pub(crate) fn busy_percent(&self) -> f64 {
        self.busy.as_secs_f64() / self.all.as_secs_f64() * 1e2
    }

    /// Percent of the processors that worked for others.
    pub(crate) fn others_percent(&self) -> f64 {
        self.busy.saturating_sub(self.own).as_secs_f64() / self.all.as_secs_f64() * 1e2
    }

    /// Percent of the processors that a hypervisor took away.
    pub(crate) fn stolen_percent(&self) -> f64 {
        self.stolen.as_secs_f64() / self.all.as_secs_f64() * 1e2
    }
}

/// How many processors there are, how long they were away, and how long of that they were stolen.
fn parsed(text: &str, ticks_per_second: f64) -> Result<(u32, Duration, Duration)> {
    let (mut processors, mut ticks, mut stolen) = (0, 0, 0);
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(nth) = words.next().and_then(|word| word.strip_prefix("cpu")) else { continue };
        if nth.is_empty() {
            continue;
        }
        // proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal.
        let fields: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
        let field = |at: usize| fields.get(at).copied().context("a short line of /proc/stat");
        ticks += field(3)? + field(4)? + field(7)?;
        stolen += field(7)?;
        processors += 1;
    }
    ensure!(processors > 0, "/proc/stat names no processor");
    let [away, stolen] =
        [ticks, stolen].map(|ticks| Duration::from_secs_f64(ticks as f64 / ticks_per_second));
    Ok((processors, away, stolen))
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

    const TEXT: &str = "\
cpu  2019729 479847 824211 3035442 16187 0 31420 3263 0 0
cpu0 973290 228553 485142 1000 20 0 14970 3 0 0
cpu1 1046438 251293 339068 2000 30 0 16449 4 0 0
intr 81
";

    #[test]
    fn what_is_away_is_summed_over_processors_and_not_over_the_sum() {
        let ms = Duration::from_millis;
        assert_eq!(parsed(TEXT, 100.0).unwrap(), (2, ms(30_570), ms(70)));
        assert_eq!(parsed(TEXT, 1000.0).unwrap(), (2, ms(3_057), ms(7)));
        assert!(parsed("cpu 1 2 3 4 5 6 7 8\n", 100.0).is_err(), "no processor by itself");
        assert!(parsed("cpu0 1 2 3 4 5\n", 100.0).is_err(), "a line that is too short");
    }

    #[test]
    fn busy_is_what_is_left_of_the_wall_time_of_all() {
        let at = Instant::now();
        let look = |after_ms: u64, away_ms: u64| Look {
            at: at + Duration::from_millis(after_ms),
            processors: 2,
            away: Duration::from_millis(away_ms),
            stolen: Duration::from_millis(away_ms / 10),
            own: Duration::from_millis(after_ms / 2),
        };
        let spent = look(1000, 5_700).since(&look(0, 5_000));
        assert_eq!(spent.wall, Duration::from_secs(1));
        assert_eq!(spent.busy, Duration::from_millis(1_300));
        assert_eq!(spent.own, Duration::from_millis(500));
        assert!(
            (spent.busy_percent() - 65.0).abs() < 1e-9
                && (spent.others_percent() - 40.0).abs() < 1e-9
                && (spent.stolen_percent() - 3.5).abs() < 1e-9
        );
        // The ticks' resolution: never less than nothing.
        assert_eq!(look(100, 210).since(&look(0, 0)).busy, Duration::ZERO);
    }

    #[test]
    fn a_thread_that_computes_is_seen() {
        let mut wall = Duration::ZERO;
        let before = Look::now().unwrap();
        let own = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
        let began = own();
        while wall < Duration::from_millis(300) {
            wall = Duration::from(own() - began);
        }
        let spent = Look::now().unwrap().since(&before);
        // Each processor's ticks may be one too many.
        let resolution = Duration::from_millis(10) * before.processors;
        assert!(spent.busy + resolution >= wall, "{spent:?} of {wall:?}");
        assert!(spent.busy <= spent.wall * before.processors);
        assert!(spent.own >= wall, "{spent:?} of {wall:?}");
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
        let before = Look::now().unwrap();
        let spin = || {
            let end = Instant::now() + Duration::from_millis(200);
            while Instant::now() < end {
                std::hint::spin_loop();
            }
        };
        std::thread::spawn(spin).join().unwrap();
        let spent = Look::now().unwrap().since(&before);
        // It may have had to wait for a processor.
        let some = Duration::from_millis(10);
        assert!(spent.own > some && spent.busy > some, "{spent:?}");
    }
}
