//! Children in process groups of their own, and what happens when the task is interrupted.
//!
//! A signal that ends this process must end everything it started. Each child leads
//! a process group; SIGINT, SIGTERM and SIGHUP are taken by one thread, which
//! passes SIGTERM on to the groups, and SIGKILL when they do not follow. The
//! main thread then sees its child end, cleans up and exits with [`Interrupted`].

use std::{
    fmt,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{SigSet, Signal, killpg},
    },
    unistd::Pid,
};

/// How long an interrupted group may clean up before it is killed.
const GRACE: Duration = Duration::from_secs(20);

/// How long a killed group may take to be gone; longer only where nobody reaps orphans.
const DEATH: Duration = Duration::from_secs(2);

/// Groups that are running.
static GROUPS: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// The signal that interrupted the task; 0 for none.
static INTERRUPTED_BY: AtomicI32 = AtomicI32::new(0);

/// The task was ended by a signal.
#[derive(Debug)]
pub(crate) struct Interrupted(i32);

impl Interrupted {
    /// The exit code that shells give for this signal.
    pub(crate) fn exit_code(&self) -> u8 {
        u8::try_from(128 + self.0).unwrap_or(130)
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Signal::try_from(self.0).map_or("a signal", Signal::as_str);
        write!(f, "interrupted by {name}")
    }
}

impl std::error::Error for Interrupted {}

/// Whether a signal has come.
///
/// # Errors
/// [`Interrupted`] if so.
pub(crate) fn check() -> Result<()> {
    match INTERRUPTED_BY.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => bail!(Interrupted(signal)),
    }
}

/// Takes over the signals. Call it first, while there is one thread.
///
/// # Errors
/// The signal mask can't be set.
pub(crate) fn install() -> Result<()> {
    let set = taken();
    set.thread_block().context("blocking signals")?;
    thread::spawn(move || {
        let mut first = true;
        while let Ok(signal) = set.wait() {
            let pass_on = if first {
                INTERRUPTED_BY.store(signal as i32, Ordering::SeqCst);
                thread::spawn(|| {
                    thread::sleep(GRACE);
                    signal_groups(Signal::SIGKILL);
                });
                Signal::SIGTERM
            } else {
                Signal::SIGKILL
            };
            first = false;
            signal_groups(pass_on);
        }
    });
    Ok(())
}

/// The signals that interrupt a task.
fn taken() -> SigSet {
    SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])
}

fn signal_groups(signal: Signal) {
    for group in GROUPS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        // A group that has ended in the meantime needs no signal.
        let _ = killpg(Pid::from_raw(*group), signal);
    }
}

/// A child that leads a registered process group.
struct Group {
    child: Child,
    id: i32,
}

impl Group {
    fn spawn(command: &mut Command) -> Result<Self> {
        check()?;
        let program = command.get_program().to_string_lossy().into_owned();
        // Children inherit the mask, and would not hear the signals either.
        // SAFETY: pthread_sigmask and prctl are async-signal-safe and allocate nothing.
        unsafe {
            command.pre_exec(|| {
                taken().thread_unblock()?;
                // Where this process is killed outright. The main thread forks.
                set_pdeathsig(Signal::SIGTERM)?;
                Ok(())
            });
        }
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        let child =
            command.process_group(0).spawn().with_context(|| format!("starting {program}"))?;
        let id = i32::try_from(child.id()).context("process id out of range")?;
        groups.push(id);
        drop(groups);
        // A signal between the check above and the registration found no group.
        if check().is_err() {
            signal_groups(Signal::SIGTERM);
        }
        Ok(Self { child, id })
    }

    fn wait(mut self) -> Result<ExitStatus> {
        let status = self.child.wait().context("waiting for a child")?;
        check()?;
        Ok(status)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What the child left behind in its group ends with it.
        let _ = killpg(Pid::from_raw(self.id), Signal::SIGKILL);
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).retain(|id| *id != self.id);
        let _ = self.child.wait();
        // Grandchildren end by themselves now; what follows may depend on it.
        let deadline = Instant::now() + DEATH;
        while killpg(Pid::from_raw(self.id), None).is_ok() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs a command with this process's outputs and no input.
///
/// # Errors
/// It can't be started, or the task is interrupted.
pub(crate) fn run(command: &mut Command) -> Result<ExitStatus> {
    Group::spawn(command.stdin(Stdio::null()))?.wait()
}

/// Runs a command and hands over each line of its standard output as it comes.
///
/// # Errors
/// It can't be started, its output can't be read, or the task is interrupted.
pub(crate) fn run_stdout(
    command: &mut Command,
    mut on_line: impl FnMut(&str),
) -> Result<ExitStatus> {
    let mut group = Group::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let stdout = group.child.stdout.take().context("no output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        on_line(&String::from_utf8_lossy(&line.context("reading output")?));
    }
    group.wait()
}

/// The same with a limit, after which the command and all it has started are killed:
/// `None` then.
///
/// # Errors
/// It can't be started, or the task is interrupted.
pub(crate) fn run_stdout_within(
    command: &mut Command,
    limit: Duration,
    mut on_line: impl FnMut(&str),
) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let mut group = Group::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let stdout = group.child.stdout.take().context("no output")?;
    let (sender, lines) = mpsc::channel::<String>();
    forward(stdout, sender);
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => on_line(&line),
            Err(mpsc::RecvTimeoutError::Disconnected) => return group.wait().map(Some),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                check()?;
                return Ok(None);
            }
        }
    }
}

/// Runs a command and hands over each line of both outputs as it comes, or
/// `None` once a second while nothing comes.
///
/// # Errors
/// It can't be started, or the task is interrupted.
pub(crate) fn run_lines(
    command: &mut Command,
    mut on_line: impl FnMut(Option<&str>),
) -> Result<ExitStatus> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut group = Group::spawn(command)?;
    let (sender, lines) = mpsc::channel::<String>();
    if let Some(stdout) = group.child.stdout.take() {
        forward(stdout, sender.clone());
    }
    if let Some(stderr) = group.child.stderr.take() {
        forward(stderr, sender.clone());
    }
    drop(sender);
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(line) => on_line(Some(&line)),
            Err(mpsc::RecvTimeoutError::Timeout) => on_line(None),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    group.wait()
}

fn forward(output: impl std::io::Read + Send + 'static, lines: mpsc::Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
}
