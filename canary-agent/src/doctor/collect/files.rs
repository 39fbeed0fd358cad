//! What files say: `/proc`, and the places that the agent uses.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::{
    sys::statfs::statfs,
    unistd::{AccessFlags, Gid, Group, eaccess},
};

use crate::doctor::facts::{Folder, Found};

/// Where groups of processes are, in the second version of their interface.
const CGROUPS: &str = "/sys/fs/cgroup";

fn text(path: &str) -> Found<String> {
    fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

/// A file that holds a number.
pub(super) fn number(path: &str) -> Found<u32> {
    let text = text(path)?;
    text.trim().parse().map_err(|_| format!("{path}: `{}` is no number", text.trim()))
}

/// Whether this process may write to something that exists.
pub(super) fn writable(path: impl AsRef<Path>) -> Found<()> {
    let path = path.as_ref();
    eaccess(path, AccessFlags::W_OK)
        .map_err(|errno| format!("{}: {}", path.display(), errno.desc()))
}

/// Memory that is to be had.
pub(super) fn available_bytes() -> Found<u64> {
    let text = text("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| "/proc/meminfo has no MemAvailable".to_owned())
}

/// The least that the process's control groups have left, where they are limited.
pub(super) fn group_bytes() -> Option<(u64, String)> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut least: Option<(u64, String)> = None;
    let own = Path::new(CGROUPS).join(own);
    for folder in own.ancestors().take_while(|folder| folder.starts_with(CGROUPS)) {
        let read = |name: &str| -> Option<u64> {
            fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
        };
        // `max` is no number, and no limit.
        let (Some(most), Some(now)) = (read("memory.max"), read("memory.current")) else {
            continue;
        };
        let left = most.saturating_sub(now);
        if least.as_ref().is_none_or(|(other, _)| left < *other) {
            least = Some((left, folder.join("memory.max").display().to_string()));
        }
    }
    least
}

/// Effective capabilities of a process, by the name of its folder in `/proc`.
pub(super) fn capabilities(process: &str) -> Found<u64> {
    let path = format!("/proc/{process}/status");
    let text = text(&path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|line| u64::from_str_radix(line.trim(), 16).ok())
        .ok_or_else(|| format!("{path} has no CapEff"))
}

/// Whether somebody keeps the clock in time.
pub(super) fn clock_kept() -> Found<bool> {
    // SAFETY: all-zero bytes are a valid `timex`, which asks for nothing to be changed.
    let mut asked: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `asked` is a whole `timex` that outlives the call.
    match unsafe { libc::adjtimex(&raw mut asked) } {
        -1 => Err(format!("adjtimex: {}", std::io::Error::last_os_error())),
        state => Ok(state != libc::TIME_ERROR),
    }
}

/// Looks at a folder and at files in it that matter.
pub(super) fn folder(path: &Path, files: &[&str]) -> Folder {
    let existing = path.ancestors().find(|part| part.exists()).unwrap_or(Path::new("/"));
    let space = statfs(existing);
    let mut looked_at: Vec<PathBuf> = Vec::new();
    if existing == path {
        looked_at.push(path.to_owned());
        looked_at.extend(files.iter().map(|file| path.join(file)));
    }
    Folder {
        path: path.to_owned(),
        existing: existing.to_owned(),
        writable: eaccess(existing, AccessFlags::W_OK | AccessFlags::X_OK)
            .map_err(|errno| format!("{}: {}", existing.display(), errno.desc())),
        free_bytes: space
            .map(|space| space.blocks_available() * space.block_size() as u64)
            .map_err(|errno| errno.to_string()),
        file_system: space.map_or(0, |space| space.filesystem_type().0 as u64),
        open_to_others: looked_at
            .into_iter()
            .find(|path| open_to_others(path))
            .map(|path| path.display().to_string()),
    }
}

/// Whether a file or folder can be written to by everybody, or by a group other than its
/// owner's own. In a folder like `/tmp` (sticky) nobody can replace what is another's.
fn open_to_others(path: &Path) -> bool {
    const STICKY: u32 = 0o1000;
    fs::symlink_metadata(path).is_ok_and(|found| {
        let mode = found.mode();
        !found.is_symlink() && mode & 0o022 != 0 && !(found.is_dir() && mode & STICKY != 0)
    })
}

/// The group and mode of a socket that is there; whether something else is in its place.
pub(super) fn socket(path: &Path) -> (Option<(String, u32)>, bool) {
    let Ok(found) = fs::symlink_metadata(path) else { return (None, false) };
    if !found.file_type().is_socket() {
        return (None, true);
    }
    let group = Group::from_gid(Gid::from_raw(found.gid())).ok().flatten();
    let group = group.map_or_else(|| found.gid().to_string(), |group| group.name);
    (Some((group, found.mode() & 0o7777)), false)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn this_process_and_its_host_are_read() {
        assert!(available_bytes().expect("it is there") > 0);
        assert!(capabilities("self").is_ok());
        assert!(capabilities("none").is_err());
        assert!(clock_kept().is_ok());
        assert!(number("/proc/self/status").is_err());
        assert!(number("/proc/sys/kernel/pid_max").is_ok());
    }

    #[test]
    fn a_folder_that_is_not_there_is_looked_at_where_it_would_be() {
        let dir = tempfile::tempdir().expect("a folder");
        let deep = dir.path().join("a/b");
        let found = folder(&deep, &["state.db"]);
        assert_eq!((found.path.as_path(), found.existing.as_path()), (deep.as_path(), dir.path()));
        assert_eq!(found.writable, Ok(()));
        assert!(found.free_bytes.expect("it has room") > 0);
        assert_eq!(found.open_to_others, None);
    }

    #[test]
    fn what_others_may_write_to_is_found() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("state.db");
        fs::write(&file, "").expect("written");
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
        };
        let look = || folder(dir.path(), &["state.db"]).open_to_others;
        mode(&file, 0o640);
        assert_eq!(look(), None);
        mode(&file, 0o666);
        assert_eq!(look(), Some(file.display().to_string()));
        mode(dir.path(), 0o777);
        assert_eq!(look(), Some(dir.path().display().to_string()));
        mode(dir.path(), 0o1777);
        assert_eq!(look(), Some(file.display().to_string()), "a sticky folder guards its entries");
    }

    #[test]
    fn only_a_socket_is_one() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("agent.sock");
        assert_eq!(socket(&path), (None, false));
        fs::write(&path, "").expect("written");
        assert_eq!(socket(&path), (None, true));
        fs::remove_file(&path).expect("removed");
        let _listener = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        assert!(socket(&path).0.is_some());
    }
}
