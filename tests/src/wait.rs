//! Waiting for a condition, and giving up waiting when the process is interrupted.

use std::{
    io,
    panic::resume_unwind,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};

/// Time between two looks at a condition.
const POLL: Duration = Duration::from_millis(5);

/// How long anything local may take before the bench calls it broken.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How many times slower than a real one a processor is that is emulated; set by whoever
/// makes such a machine.
const SLOWNESS: &str = "CANARY_SLOWNESS";

/// [`PATIENCE`], on this machine. It tells what hangs from what goes on; no promise of
/// the agent's is measured by it.
pub fn patience() -> Duration {
    PATIENCE * slowness()
}

/// Whether the processor is emulated, so that what it does has its price in minutes.
pub fn emulated() -> bool {
    slowness() > 1
}

/// How many times longer what is local may take here.
pub fn slowness() -> u32 {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    *FACTOR.get_or_init(|| {
        let set = std::env::var(SLOWNESS).ok();
        set.map_or(1, |text| text.parse().unwrap_or_else(|_| panic!("{SLOWNESS}={text}")))
    })
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What a thread unwinds with that was interrupted: nothing failed.
#[derive(Clone, Copy, Debug)]
pub struct Interrupted;

/// Makes every present and later wait unwind with [`Interrupted`].
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Turns the signals that end a program into [`interrupt`]; call it before there are threads.
///
/// # Panics
/// Signals can't be blocked.
pub fn interrupt_on_signals() {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().expect("blocking signals");
    thread::spawn(move || {
        while signals.wait().is_ok() {
            interrupt();
        }
    });
}

/// Whether [`interrupt`] was called.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Unwinds with [`Interrupted`] if [`interrupt`] was called, and not already unwinding.
pub fn check() {
    if interrupted() && !thread::panicking() {
        resume_unwind(Box::new(Interrupted));
    }
}

/// Waits until `condition` gives a value.
///
/// # Panics
/// It does not within [`patience`]: with `what` and the condition's last reason.
#[track_caller]
pub fn until<T>(what: &str, condition: impl FnMut() -> Result<T, String>) -> T {
    until_within(patience(), what, condition)
}

/// Waits until `condition` gives a value.
///
/// # Panics
/// It does not within `limit`: with `what` and the condition's last reason.
#[track_caller]
pub fn until_within<T>(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<T, String>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        check();
        match condition() {
            Ok(value) => return value,
            Err(reason) if Instant::now() >= deadline => {
                panic!("waited {limit:?} for {what}: {reason}")
            }
            Err(_) => thread::sleep(POLL),
        }
    }
}

/// Makes a call on a socket that has a time limit, again where it is interrupted: such a call ends with
/// `EINTR` when the process was stopped and goes on, whatever handles signals (signal(7)). Some hosts do that
/// to all of their processes.
///
/// # Errors
/// The call's others.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => check(),
            done => return done,
        }
    }
}

/// Pauses a paced loop, shorter when interrupted.
pub fn pause_until(moment: Instant) {
    const SLICE: Duration = Duration::from_millis(100);
    while !interrupted() {
        let left = moment.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::sleep(left.min(SLICE));
    }
}
