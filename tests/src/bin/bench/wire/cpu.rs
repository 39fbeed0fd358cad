//! Time of all processors that was not idle.
//!
//! What processors did is sampled by the timer's tick, which misses whoever works between two
//! ticks and hits whoever works at them (Documentation/admin-guide/cpu-load.rst): work in bursts is
//! seen as too little or too much. What they did not is not sampled: the kernel takes the time
//! whenever a processor falls idle and is woken (`get_idle_time` in fs/proc/stat.c, on kernels with
//! `CONFIG_NO_HZ_COMMON`), and says it in ticks of `USER_HZ`, 10 ms of each processor.
//!
//! Beside it, what this process's threads ran, and the kernel's that take over where there is too much
//! for an interrupt: the scheduler knows that to the nanosecond, and others' work is not in it. What
//! comes of a packet that a thread sends is in that thread's time, unless the kernel takes interrupts'
//! out of it (`CONFIG_IRQ_TIME_ACCOUNTING`).

use std::{
    fs,
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use canary_tests::process::Usage;

/// A look at the clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    at: Instant,
    processors: u32,
    /// Of all processors together: idle, waiting for a disk, or taken away by a hypervisor.
    away: Duration,
    /// Of our threads and the kernel's for interrupts.
    own: Duration,
}

impl Look {
    pub(super) fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let at = Instant::now();
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
        let (processors, away) = parsed(&text, ticks as f64)?;
        let mut own = Usage::of(std::process::id())?.cpu;
        for pid in deferred() {
            own += Usage::of(*pid)?.cpu;
        }
        Ok(Self { at, processors, away, own })
    }

    /// Wall time since an earlier look, and time on processors.
    pub(super) fn since(&self, earlier: &Self) -> Spent {
        let wall = self.at - earlier.at;
        let away = self.away.saturating_sub(earlier.away);
        let busy = (wall * self.processors).saturating_sub(away);
        Spent { wall, busy, own: self.own.saturating_sub(earlier.own) }
    }
}

/// The kernel's threads for what interrupts have left.
fn deferred() -> &'static [u32] {
    static PIDS: OnceLock<Vec<u32>> = OnceLock::new();
    PIDS.get_or_init(|| {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let named = processes.filter(|entry| {
            let name = fs::read_to_string(entry.path().join("comm"));
            name.is_ok_and(|name| name.starts_with("ksoftirqd/"))
        });
        named.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    })
}

/// What passed between two looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spent {
    pub(super) wall: Duration,
    pub(super) busy: Duration,
    pub(super) own: Duration,
}

/// How many processors there are, and how long they were away.
fn parsed(text: &str, ticks_per_second: f64) -> Result<(u32, Duration)> {
    let (mut processors, mut ticks) = (0, 0);
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
        processors += 1;
    }
    ensure!(processors > 0, "/proc/stat names no processor");
    Ok((processors, Duration::from_secs_f64(ticks as f64 / ticks_per_second)))
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
        assert_eq!(parsed(TEXT, 100.0).unwrap(), (2, Duration::from_millis(30_570)));
        assert_eq!(parsed(TEXT, 1000.0).unwrap(), (2, Duration::from_millis(3_057)));
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
            own: Duration::from_millis(after_ms / 2),
        };
        let spent = look(1000, 5_700).since(&look(0, 5_000));
        assert_eq!(spent.wall, Duration::from_secs(1));
        assert_eq!(spent.busy, Duration::from_millis(1_300));
        assert_eq!(spent.own, Duration::from_millis(500));
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
        // A thread's time is added up when it is looked at or leaves its processor.
        assert!(spent.own >= wall / 2, "{spent:?} of {wall:?}");
    }
}
