//! Whether this host can run the bench: root, and a kernel with namespaces, veth and bridges.

use std::{io::Write as _, sync::OnceLock};

use nix::unistd::geteuid;

use crate::sweep;

/// A file that xtask names; each skipped test adds a line.
const SKIP_LOG: &str = "CANARY_SKIP_LOG";
/// Set in the virtual machine of `cargo xtask vm`.
const VM: &str = "CANARY_VM";

/// Why the bench can't run here, if so; sweeps stale leftovers the first time.
pub fn obstacle() -> Option<&'static str> {
    static OBSTACLE: OnceLock<Option<&'static str>> = OnceLock::new();
    *OBSTACLE.get_or_init(|| {
        if !geteuid().is_root() {
            return Some("network namespaces and XDP need root");
        }
        sweep::stale_leftovers();
        None
    })
}

/// Whether to go on with a test that needs the bench: `if !host::ready("name") { return; }`.
///
/// # Panics
/// The bench can't run, and `CI` is set: there, a skipped test is a failure.
#[track_caller]
pub fn ready(test: &str) -> bool {
    let Some(reason) = obstacle() else {
        return true;
    };
    skip(test, reason);
    false
}

/// Says that a test can't run on this host.
///
/// # Panics
/// `CI` is set: there, a skipped test is a failure.
#[track_caller]
pub fn skip(test: &str, reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "skipped: {test}: {reason}");
    note(test, reason);
}

/// Says that a test can't run on this kernel, and is left to that of the virtual machine, where
/// `cargo xtask test` runs it.
///
/// # Panics
/// This is that machine.
#[track_caller]
pub fn leave_to_vm(test: &str, reason: &str) {
    assert!(!in_vm(), "skipped: {test}: {reason}");
    note(test, reason);
}

/// Whether this is the machine that tests of other kernels are made one for, with nothing on it
/// that is anybody's.
pub fn in_vm() -> bool {
    std::env::var_os(VM).is_some()
}

fn note(test: &str, reason: &str) {
    let line = format!("skipped: {test}: {reason}");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os(SKIP_LOG) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(path);
        // One write, so that lines of tests that run at once stay whole.
        if let Ok(mut log) = log {
            let _ = log.write_all(format!("{line}\n").as_bytes());
        }
    }
}
