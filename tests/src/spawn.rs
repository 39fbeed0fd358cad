//! Starting children that end with this process, whichever thread asks for them.

use std::{
    io,
    os::unix::process::CommandExt as _,
    process::{Child, Command},
    sync::{Mutex, OnceLock, PoisonError, mpsc},
    thread,
};

use nix::sys::{prctl, signal::SigSet, signal::Signal};

type Request = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a child that is killed when this process ends, however it ends.
///
/// The kernel sends a parent-death signal when the *thread* that forked ends, so
/// one thread that lives as long as the process does it for all.
///
/// # Errors
/// Those of [`Command::spawn`].
pub fn spawn(mut command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Request>>> = OnceLock::new();
    // SAFETY: prctl, getppid and pthread_sigmask are async-signal-safe and
    // allocate nothing.
    unsafe {
        command.pre_exec(|| {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // This process may have blocked the signals that it takes itself.
            SigSet::all().thread_unblock()?;
            Ok(())
        });
    }
    let (answer, child) = mpsc::channel();
    SPAWNER
        .get_or_init(|| {
            let (sender, requests) = mpsc::channel::<Request>();
            thread::spawn(move || {
                for (mut command, answer) in requests {
                    // The asker waits for the answer below.
                    let _ = answer.send(command.spawn());
                }
            });
            Mutex::new(sender)
        })
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, answer))
        .map_err(io::Error::other)?;
    child.recv().map_err(io::Error::other)?
}
