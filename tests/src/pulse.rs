//! How long the bench itself stood still.
//!
//! A client that measures a pause on a connection measures its own scheduling
//! too, and its server's. A pulse beats on the thread that does the work: where
//! a beat comes late, the thread was not running (or had too much to do), and
//! nothing that happened meanwhile can be laid on the network. What the kernel
//! needs to move packets is not subtracted.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Time between two beats.
const BEAT: Duration = Duration::from_millis(10);

/// A beat that is later than this is worth keeping: timers are coarse by a millisecond.
const LATE: Duration = Duration::from_millis(5);

/// Real-time priority of a thread that takes precedence: the lowest is before all that has
/// none. (A nice value would count within the session's group only: sched(7), autogroup.)
const PRECEDENCE: i32 = 1;

/// The pulse of one thread's runtime.
#[derive(Debug, Default)]
pub struct Pulse {
    beats: Mutex<Beats>,
    precede: AtomicBool,
}

#[derive(Debug, Default)]
struct Beats {
    /// When the next beat should come; `None` when none will.
    due: Option<Instant>,
    /// From when a beat was due until it came, where that took longer than [`LATE`].
    late: Vec<(Instant, Instant)>,
}

impl Pulse {
    /// Beats until it is dropped: run it on the runtime that is to be watched.
    pub async fn beat(&self) {
        let _stop = Stop(self);
        loop {
            if self.precede.swap(false, Ordering::Relaxed) {
                precede();
            }
            let due = Instant::now() + BEAT;
            self.lock().due = Some(due);
            tokio::time::sleep_until(due.into()).await;
            let now = Instant::now();
            if now > due + LATE {
                self.lock().late.push((due, now));
            }
        }
    }

    /// Gives the thread precedence over what else runs on the host from its next beat
    /// on: what does not stand still needs no subtraction.
    pub fn take_precedence(&self) {
        self.precede.store(true, Ordering::Relaxed);
    }

    /// For how long between two moments at least one of `pulses` was late.
    pub fn stood_still<'a>(
        pulses: impl IntoIterator<Item = &'a Self>,
        from: Instant,
        to: Instant,
    ) -> Duration {
        let mut pieces = Vec::new();
        for pulse in pulses {
            let beats = pulse.lock();
            // Beats are in the order of time: the ones long ago need no look.
            let first = beats.late.partition_point(|(_, came)| *came <= from);
            let open = beats.due.filter(|due| to > *due + LATE).map(|due| (due, to));
            let late = beats.late[first..].iter().copied().chain(open);
            pieces.extend(late.map(|(due, came)| (due.max(from), came.min(to))));
        }
        pieces.retain(|(start, end)| start < end);
        pieces.sort_unstable();
        let mut total = Duration::ZERO;
        let mut covered = from;
        for (start, end) in pieces {
            total += end.saturating_duration_since(start.max(covered));
            covered = covered.max(end);
        }
        total
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Beats> {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives the calling thread precedence over all that has none. Children do not inherit it.
pub fn precede() {
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    let parameters = libc::sched_param { sched_priority: PRECEDENCE };
    // SAFETY: the pointer is to a value that outlives the call; 0 is the calling thread.
    // Where it is refused, more has to be subtracted.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
}

/// A thread with a pulse and without precedence: how late whatever else runs here is,
/// such as the agent. It ends with its value.
#[derive(Debug)]
pub struct Weather {
    pulse: Arc<Pulse>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Weather {
    /// Starts the thread.
    ///
    /// # Panics
    /// The host has no thread left.
    pub fn start() -> Self {
        let pulse = Arc::new(Pulse::default());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let mine = Arc::clone(&pulse);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
            runtime.expect("no runtime").block_on(async {
                tokio::select! {
                    () = mine.beat() => {}
                    _ = stopped => {}
                }
            });
        });
        Self { pulse, stop: Some(stop), thread: Some(thread) }
    }

    /// For how long between two moments nobody without precedence could count on being run.
    pub fn stood_still(&self, from: Instant, to: Instant) -> Duration {
        Pulse::stood_still([&*self.pulse], from, to)
    }
}

impl Drop for Weather {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It only sleeps.
            let _ = thread.join();
        }
    }
}

/// A runtime that has ended is not late.
struct Stop<'a>(&'a Pulse);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.lock().due = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pulse(start: Instant, late_ms: &[(u64, u64)], due_ms: Option<u64>) -> Pulse {
        let at = |ms| start + Duration::from_millis(ms);
        let late = late_ms.iter().map(|(due, came)| (at(*due), at(*came))).collect();
        let beats = Mutex::new(Beats { due: due_ms.map(at), late });
        Pulse { beats, ..Pulse::default() }
    }

    #[test]
    fn times_at_which_two_threads_stood_still_count_once() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let one = pulse(start, &[(100, 200), (300, 400)], Some(410));
        let two = pulse(start, &[(150, 250), (320, 330)], None);
        let still = |from, to| Pulse::stood_still([&one, &two], at(from), at(to)).as_millis();
        assert_eq!(still(0, 100), 0);
        assert_eq!(still(0, 300), 150);
        assert_eq!(still(120, 240), 120);
        assert_eq!(still(0, 400), 250);
        // The beat that is due and has not come counts as far as it is late now.
        assert_eq!(still(400, 414), 0);
        assert_eq!(still(400, 510), 100);
    }

    #[test]
    fn a_thread_that_is_held_up_is_late() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let pulse = Pulse::default();
        let start = Instant::now();
        runtime.block_on(async {
            let held_up = async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                std::thread::sleep(Duration::from_millis(100));
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            tokio::select! {
                () = pulse.beat() => {}
                () = held_up => {}
            }
        });
        let still = Pulse::stood_still([&pulse], start, Instant::now());
        assert!(still >= Duration::from_millis(85), "{still:?}");
        let over = Instant::now();
        let after = Pulse::stood_still([&pulse], over, over + Duration::from_secs(1));
        assert_eq!(after, Duration::ZERO, "it does not beat any more");
    }
}
