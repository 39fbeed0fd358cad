//! Takes away what processes left behind that were killed before they could.
//!
//! Namespaces, control groups and work folders are named `canary-PID-N-ROLE`; one whose
//! process is gone is stale. xtask compiles this file too, so it needs `std` only.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where `ip netns` keeps its names.
pub const NETNS_FOLDER: &str = "/run/netns";

/// The process id in `canary-PID-N-ROLE`.
fn owner(name: &str) -> Option<u32> {
    let (pid, rest) = name.strip_prefix("canary-")?.split_once('-')?;
    rest.contains('-').then_some(())?;
    pid.parse().ok()
}

/// Whether a name's process is gone.
fn stale(name: &str) -> bool {
    owner(name).is_some_and(|pid| !alive(pid))
}

/// Whether a process runs: one that only waits to be reaped does not.
fn alive(pid: u32) -> bool {
    // proc(5): the state follows the program's name, which may hold anything.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        !state.starts_with(['Z', 'X'])
    })
}

/// Names in a folder whose process is gone.
fn stale_entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| stale(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .collect()
}

fn quietly(program: &str, args: &[&str]) {
    // Two sweeps at once take away the same things: that one of them fails is fine.
    let _ = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// Removes stale namespaces, control groups, mounts and work folders; returns how many there
/// were.
pub fn stale_leftovers() -> usize {
    let namespaces = stale_entries(Path::new(NETNS_FOLDER));
    for path in &namespaces {
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            quietly("ip", &["netns", "delete", name]);
        }
    }
    let groups = cgroups().map(|root| stale_entries(&root)).unwrap_or_default();
    for group in &groups {
        remove_cgroup(group);
    }
    let folders = stale_entries(&std::env::temp_dir());
    for folder in &folders {
        let mounts = ["bpffs", "state"].map(|name| folder.join(name));
        for mount in mounts.iter().filter(|mount| mounted(mount)) {
            quietly("umount", &["--lazy", &mount.to_string_lossy()]);
        }
        // What is still mounted must not be emptied.
        if !mounts.iter().any(|mount| mounted(mount)) {
            let _ = fs::remove_dir_all(folder);
        }
    }
    namespaces.len() + groups.len() + folders.len()
}

/// Where control groups of version 2 are mounted.
pub fn cgroups() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut lines = mounts.lines().map(|line| line.split(' '));
    lines.find_map(|mut line| {
        let path = line.nth(1)?;
        (line.next()? == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Removes a control group with those in it, which must be empty; returns whether it is gone.
pub fn remove_cgroup(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // Its files are no obstacle: they are the kernel's.
    fs::remove_dir(group).is_ok() || !group.exists()
}

/// Whether something is mounted at a path.
fn mounted(path: &Path) -> bool {
    let path = path.to_string_lossy();
    fs::read_to_string("/proc/self/mounts").is_ok_and(|mounts| {
        mounts.lines().any(|line| line.split(' ').nth(1) == Some(path.as_ref()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_form_with_a_dead_process_are_stale() {
        assert_eq!(owner("canary-12-0-client"), Some(12));
        for name in ["canary-12", "canary-x-0-client", "other-12-0-client", "canary--1-x"] {
            assert_eq!(owner(name), None, "{name}");
        }
        assert!(!stale(&format!("canary-{}-0-client", std::process::id())));
        // Above the largest process id that Linux gives out.
        assert!(stale("canary-4194305-0-client"));
    }
}
