//! Finding a program that cargo has built beside the running test.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// A program of the host's: beside what `PATH` names, where Debian has those of servers.
pub fn installed(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// The path of a workspace program of the same profile as this executable.
///
/// # Panics
/// It is missing, or older than a source that it was made from: cargo builds a
/// package's tests without the programs of the others.
#[track_caller]
pub fn locate(name: &str) -> PathBuf {
    let here = env::current_exe().expect("this executable has no path");
    let mut folder = here.parent().expect("an executable lies in a folder");
    // Tests lie in `deps`, examples in `examples`.
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder = folder.parent().expect("the folder of the profile");
    }
    let path = folder.join(name);
    let Some(built) = modified(&path) else {
        panic!("{} is missing: build it first ({})", path.display(), how(name));
    };
    if let Some(newer) = newer_source(&path.with_extension("d"), built) {
        panic!(
            "{} is older than {}: build it first ({})",
            path.display(),
            newer.display(),
            how(name)
        );
    }
    path
}

/// Another build of `canary-agent` than the one of [`locate`]: the one that `CANARY_OTHER_AGENT`
/// names, or that of the other profile beside this one's; `None` if there is none, or if it is
/// older than its sources.
///
/// # Panics
/// The one that the variable names is missing, or is this one.
#[track_caller]
pub fn other_agent() -> Option<PathBuf> {
    let this = locate("canary-agent");
    let (path, named) = match env::var_os("CANARY_OTHER_AGENT") {
        Some(path) => (PathBuf::from(path), true),
        None => {
            let other = if cfg!(debug_assertions) { "release" } else { "debug" };
            let profiles = this.ancestors().nth(2).expect("a folder of profiles");
            (profiles.join(other).join("canary-agent"), false)
        }
    };
    if !named
        && modified(&path).is_some_and(|t| newer_source(&path.with_extension("d"), t).is_some())
    {
        return None;
    }
    match fs::read(&path) {
        Ok(bytes) => {
            let same = fs::read(&this).is_ok_and(|this| this == bytes);
            assert!(!same, "{} is the build that runs already", path.display());
            Some(path)
        }
        Err(error) => {
            assert!(!named, "{}: {error}", path.display());
            None
        }
    }
}

/// What builds a program.
fn how(name: &str) -> &'static str {
    match name {
        "canary-agent-next" => {
            "cargo build --workspace --exclude canary-ebpf --features canary-agent/next-abi --bin \
             canary-agent-next"
        }
        _ => "cargo build -p canary-agent",
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).ok()
}

/// A source in cargo's dependency file (`PROGRAM: SOURCE …`, spaces escaped) that
/// was changed after the program was built.
fn newer_source(dependencies: &Path, built: SystemTime) -> Option<PathBuf> {
    let text = fs::read_to_string(dependencies).ok()?;
    let (_, sources) = text.split_once(": ")?;
    sources
        .trim_end()
        .replace("\\ ", "\0")
        .split(' ')
        .map(|source| PathBuf::from(source.replace('\0', " ")))
        // Build scripts name folders too, whose time changes with every editor's draft.
        .find(|source| source.is_file() && modified(source).is_some_and(|time| time > built))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_source_that_was_changed_later_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("a source.rs");
        fs::write(&source, "").unwrap();
        let escaped = source.to_string_lossy().replace(' ', "\\ ");
        let dependencies = folder.path().join("program.d");
        fs::write(&dependencies, format!("/x/program: /nonexistent.rs {escaped}\n")).unwrap();
        let time = modified(&source).unwrap();
        assert_eq!(newer_source(&dependencies, time), None);
        let before = time - Duration::from_secs(1);
        assert_eq!(newer_source(&dependencies, before), Some(source));
    }
}
