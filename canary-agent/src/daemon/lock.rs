//! One agent for one set of pins, and one for one state directory.
//!
//! Two locks, since either can be shared by mistake without the other: two
//! configurations may name one BPF file system and two state directories. Both
//! are `flock`s: the kernel lets go of them when the agent ends, however it ends.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// The file of a state directory that is locked.
const STATE_LOCK: &str = "agent.lock";

/// A lock that is held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _held: Flock<File>,
}

/// Why a lock is not held.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has it.
    #[error(
        "another agent ({}) works with {}: stop it, or give this one an `agent.{key}` of its own",
        holder(*.pid), path.display()
    )]
    Held {
        /// What is locked.
        path: PathBuf,
        /// The key that sets it.
        key: &'static str,
        /// Who has it, where that is known.
        pid: Option<i32>,
    },
    /// It can't be locked.
    #[error("{} can't be locked: {source}", path.display())]
    Io {
        /// What should be locked.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn holder(pid: Option<i32>) -> String {
    pid.map_or_else(|| "of unknown pid".to_owned(), |pid| format!("pid {pid}"))
}

/// Locks a state directory, by its file `agent.lock`, which holds the pid.
///
/// # Errors
/// [`LockError::Held`] while another agent has it.
pub fn lock_state_dir(dir: &Path) -> Result<Lock, LockError> {
    let path = dir.join(STATE_LOCK);
    let failed = |source| LockError::Io { path: path.clone(), source };
    fs::DirBuilder::new().recursive(true).mode(0o750).create(dir).map_err(failed)?;
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o640)
        .open(&path)
        .map_err(failed)?;
    let mut held = lock(file, &path, "state_dir", |file| {
        let mut text = String::new();
        // The file may be older than its lock's holder, but it writes its pid at once.
        Read::take(file, 32).read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    })?;
    // The pid is a courtesy: a full disk is no reason not to start.
    if let Err(error) = held.set_len(0).and_then(|()| writeln!(held, "{}", std::process::id())) {
        tracing::warn!(file = %path.display(), %error, "the lock file can't be written");
    }
    Ok(Lock { _held: held })
}

/// Who holds a lock on a state directory or a directory of pins, with the key that sets it.
/// Takes no lock itself, which could be in the way of an agent that starts.
pub fn held_by(state_dir: &Path, pins: &Path) -> Option<(&'static str, i32)> {
    let state = state_dir.join(STATE_LOCK);
    [("state_dir", state.as_path()), ("bpffs", pins)]
        .into_iter()
        .find_map(|(key, path)| Some((key, flock_holder(&File::open(path).ok()?)?)))
}

/// Locks the directory of the pins, which exists.
///
/// # Errors
/// [`LockError::Held`] while another agent has it.
pub fn lock_pins(dir: &Path) -> Result<Lock, LockError> {
    let file = File::open(dir).map_err(|source| LockError::Io { path: dir.to_owned(), source })?;
    let held = lock(file, dir, "bpffs", |file| flock_holder(file))?;
    Ok(Lock { _held: held })
}

fn lock(
    file: File,
    path: &Path,
    key: &'static str,
    pid: impl Fn(&mut File) -> Option<i32>,
) -> Result<Flock<File>, LockError> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(mut file, errno)| match errno {
        Errno::EWOULDBLOCK => LockError::Held { path: path.to_owned(), key, pid: pid(&mut file) },
        other => LockError::Io { path: path.to_owned(), source: other.into() },
    })
}

/// Who has a `flock` on the file, as `/proc/locks` says: `1: FLOCK ADVISORY WRITE PID
/// MAJOR:MINOR:INODE 0 EOF`, device numbers in hexadecimal.
fn flock_holder(file: &File) -> Option<i32> {
    let metadata = file.metadata().ok()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let place = format!("{major:02x}:{minor:02x}:{inode}");
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let of_file = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, _, pid, at, ..] if at == place => pid.parse().ok(),
            _ => None,
        }
    };
    // Another pid namespace's processes are listed as 0.
    locks.lines().find_map(of_file).filter(|pid| *pid > 0)
}
