//! Kernels, tools and systems of Debian releases, unpacked into the cache and not installed.
//!
//! apt works with lists and an archive of its own here, below the cache: the host's
//! may be of another release, and stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    progress::Progress,
    setup::{self, linker, probe},
    supervise,
};

/// The package that names a release's newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";

/// What a system has besides the packages that every Debian has.
const ROOT_PACKAGES: [&str; 4] = ["dbus", "iproute2", "systemd", "systemd-sysv"];

/// Lines of a failed run that are shown.
const TAIL_LINES: usize = 20;

/// Where Debian keeps the keys of its archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel with its modules.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    /// `None`: everything that is needed is built in.
    pub(crate) modules: Option<PathBuf>,
}

/// The kernel of a Debian release, from the cache if it is there.
///
/// # Errors
/// It can't be had: apt is missing, or refuses.
pub(crate) fn kernel(suite: &str) -> Result<Kernel> {
    let folder = unpacked(suite, "linux", |apt, progress| {
        let package = apt.depends(KERNEL)?;
        apt.unpack(&package, progress)
    })?;
    let one = |below: &str, prefix: &str| -> Result<PathBuf> {
        let folder = folder.join(below);
        let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
        let mut paths = entries.flatten().map(|entry| entry.path());
        paths
            .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
            .with_context(|| format!("{} has no {prefix}*: remove it", folder.display()))
    };
    Ok(Kernel { image: one("boot", "vmlinuz-")?, modules: Some(one("lib/modules", "")?) })
}

/// A shell and the common commands in one program without libraries.
///
/// # Errors
/// As [`kernel`].
pub(crate) fn busybox() -> Result<PathBuf> {
    let folder =
        unpacked("bookworm", "busybox", |apt, progress| apt.unpack("busybox-static", progress))?;
    Ok(folder.join("bin/busybox"))
}

/// A Debian with systemd, small, and not started yet: the folder of its files.
///
/// # Errors
/// As [`kernel`]; this process is not root's, or mmdebstrap fails.
pub(crate) fn root(suite: &str) -> Result<PathBuf> {
    if !setup::is_root() {
        bail!("a Debian of its own can be made by root only");
    }
    let tool = match probe::find("mmdebstrap") {
        Some(installed) => installed,
        None => {
            unpacked("bookworm", "mmdebstrap", |apt, progress| apt.unpack("mmdebstrap", progress))?
                .join("usr/bin/mmdebstrap")
        }
    };
    unpacked(suite, "root", |apt, progress| {
        progress.step(&format!("mmdebstrap {suite}: less than a minute, once"));
        let folder = apt.folder.join("root");
        // What an interrupted run has left.
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("removing {}", folder.display()))?;
        }
        // As a script, perl finds it also where the cache may not be executed.
        let mut command = Command::new("perl");
        command.arg(&tool).args(["--mode=root", "--variant=minbase", "--format=directory"]);
        if Path::new(KEYRING).is_file() {
            command.arg(format!("--keyring={KEYRING}"));
        }
        command.arg(format!("--include={}", ROOT_PACKAGES.join(",")));
        command.arg(suite).arg(&folder).arg(archive()?);
        run(&mut command, progress)?;
        Ok(folder)
    })
}

/// A folder of the cache, made the first time it is asked for.
fn unpacked(
    suite: &str,
    name: &str,
    make: impl FnOnce(&Apt, &mut Progress) -> Result<PathBuf>,
) -> Result<PathBuf> {
    if suite.is_empty() || !suite.bytes().all(|b| b.is_ascii_lowercase() || b == b'-') {
        bail!("{suite:?} is no name of a Debian release: `bookworm`, for example");
    }
    let cache = linker::cache()?.join("vm");
    let folder = cache.join(format!("{name}-{suite}"));
    if folder.is_dir() {
        return Ok(folder);
    }
    let mut progress = Progress::new();
    let _lock = linker::lock(&cache, &mut progress)?;
    if !folder.is_dir() {
        let apt = Apt::new(&cache, suite, &mut progress)?;
        let made = make(&apt, &mut progress)?;
        // It appears whole, or not at all.
        fs::rename(&made, &folder)
            .with_context(|| format!("moving {} to {}", made.display(), folder.display()))?;
    }
    Ok(folder)
}

/// apt with lists of its own.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Fetches the lists of a release.
    fn new(cache: &Path, suite: &str, progress: &mut Progress) -> Result<Self> {
        let apt = Self { folder: cache.join(format!("apt-{suite}")) };
        for below in ["lists/partial", "archives/partial"] {
            let folder = apt.folder.join(below);
            fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let options = if Path::new(KEYRING).is_file() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        let source = format!("deb {options}{} {suite} main\n", archive()?);
        let path = apt.folder.join("sources.list");
        fs::write(&path, source).with_context(|| format!("writing {}", path.display()))?;
        progress.step(&format!("apt-get update for Debian {suite}"));
        run(apt.command("apt-get").arg("update"), progress)?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let option =
            |key: &str, below: &str| format!("{key}={}", self.folder.join(below).display());
        command
            .current_dir(&self.folder)
            .env("LC_ALL", "C")
            .args(["-o", &option("Dir::Etc::SourceList", "sources.list")])
            .args(["-o", "Dir::Etc::SourceParts=-"])
            .args(["-o", &option("Dir::State::Lists", "lists")])
            .args(["-o", &option("Dir::Cache", ".")])
            .args(["-o", "Acquire::Languages=none"])
            .args(["-o", "APT::Architecture=amd64"]);
        if setup::is_root() {
            // Its own user can't write to this user's cache.
            command.args(["-o", "APT::Sandbox::User=root"]);
        }
        command
    }

    /// The package that a package of no content depends on.
    fn depends(&self, package: &str) -> Result<String> {
        let output = self
            .command("apt-cache")
            .args(["depends", "--important", package])
            .output()
            .context("running apt-cache")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let found = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        found
            .filter(|name| name.starts_with("linux-image-"))
            .map(str::to_owned)
            .with_context(|| format!("{package} names no kernel: {text}"))
    }

    /// Downloads a package and unpacks it into a new folder; call it with the cache locked.
    fn unpack(&self, package: &str, progress: &mut Progress) -> Result<PathBuf> {
        progress.step(&format!("apt-get download {package}"));
        let folder = self.folder.join("unpacked");
        // What an interrupted run has left.
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("removing {}", folder.display()))?;
        }
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let mut download = self.command("apt-get");
        run(download.current_dir(&folder).args(["download", package]), progress)?;
        let archives = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
        let archive = archives
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|ending| ending == "deb"));
        let archive = archive.with_context(|| format!("{package} was not downloaded"))?;
        run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&folder), progress)?;
        fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
        Ok(folder)
    }
}

/// The archive that this host gets Debian's packages from.
fn archive() -> Result<String> {
    let apt_get = probe::find("apt-get").context("apt is missing: give a kernel with --kernel")?;
    let format = "$(ORIGIN) $(COMPONENT) $(REPO_URI)";
    let args = ["indextargets", "--format", format, "Created-By: Packages"];
    let text = probe::output(&apt_get, &args).unwrap_or_default();
    main_archive(&text)
        .map(str::to_owned)
        .context("this host gets no packages from Debian: give a kernel with --kernel")
}

/// Debian's archive itself among the lines `ORIGIN COMPONENT URI`, not that of security updates.
fn main_archive(lines: &str) -> Option<&str> {
    lines
        .lines()
        .filter_map(|line| line.strip_prefix("Debian main "))
        .find(|uri| !uri.trim_end_matches('/').ends_with("security"))
}

fn run(command: &mut Command, progress: &mut Progress) -> Result<()> {
    let mut lines = Vec::new();
    let status = supervise::run_lines(command, |line| {
        if let Some(line) = line {
            progress.detail(line);
            lines.push(line.to_owned());
        }
    })?;
    if !status.success() {
        let program = command.get_program().to_string_lossy();
        let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
        bail!("{program} failed:\n{tail}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_debians_own() {
        let lines = "Other main https://example.org/apt/\n\
                     Debian main https://example.org/debian-security/\n\
                     Debian main https://example.org/debian/\n";
        assert_eq!(main_archive(lines), Some("https://example.org/debian/"));
        assert_eq!(main_archive(""), None);
    }

    #[test]
    fn names_of_releases_are_no_paths() {
        for name in ["", "../x", "Bookworm", "a b"] {
            assert!(kernel(name).is_err(), "{name}");
        }
    }
}
