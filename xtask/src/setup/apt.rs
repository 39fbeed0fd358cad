//! Debian packages: which can be had, and installing them.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::probe;
use crate::{progress::Progress, supervise};

/// How long another package manager may keep its locks.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);

/// Time between two looks at a lock that another package manager holds.
const LOCK_RETRY: Duration = Duration::from_secs(2);

/// Lines of a failed run that are shown.
const TAIL_LINES: usize = 20;

/// Whether this host has apt at all.
pub(crate) fn present() -> bool {
    Path::new("/usr/bin/apt-get").is_file()
}

/// Those of `packages` that the known package lists do not offer.
pub(crate) fn without_candidate(packages: &[String]) -> Vec<String> {
    let known = Command::new("apt-cache")
        .env("LC_ALL", "C")
        .arg("policy")
        .args(packages)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let offered = offered(&known);
    packages.iter().filter(|package| !offered.contains(&package.as_str())).cloned().collect()
}

/// Names of the packages with a candidate in the output of `apt-cache policy`.
fn offered(policy: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut current = None;
    for line in policy.lines() {
        if let Some(name) = line.strip_suffix(':').filter(|name| !name.starts_with(' ')) {
            // Foreign architectures are shown as `name:arch`.
            current = name.split(':').next();
        } else if let Some(version) = line.trim().strip_prefix("Candidate:")
            && version.trim() != "(none)"
        {
            names.extend(current);
        }
    }
    names
}

/// Updates the package lists.
///
/// # Errors
/// apt-get fails for another reason than a lock that is freed in time.
pub(crate) fn update(progress: &mut Progress) -> Result<()> {
    progress.step("apt-get update");
    apt_get(&["update"], progress)
}

/// Installs packages.
///
/// # Errors
/// apt-get fails for another reason than a lock that is freed in time.
pub(crate) fn install(packages: &[String], progress: &mut Progress) -> Result<()> {
    progress.step(&format!("apt-get install {}", packages.join(" ")));
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(packages.iter().map(String::as_str));
    apt_get(&args, progress)
}

/// Downloads a package and unpacks its files into a folder; nothing is installed.
///
/// # Errors
/// It can't be had, or unpacked.
pub(crate) fn unpack(package: &str, folder: &Path, progress: &mut Progress) -> Result<()> {
    progress.step(&format!("apt-get download {package}"));
    apt_get_in(folder, &["download", package], progress)?;
    let files = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut files = files.flatten().map(|entry| entry.path());
    let archive = files.find(|path| path.extension().is_some_and(|ending| ending == "deb"));
    let archive = archive.with_context(|| format!("{package} was not downloaded"))?;
    let name = archive.to_string_lossy().into_owned();
    let (success, lines) = run("dpkg-deb", &["--extract", &name, "."], folder, progress)?;
    if !success {
        bail!("dpkg-deb failed:\n{}", lines.join("\n"));
    }
    fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))
}

fn apt_get(args: &[&str], progress: &mut Progress) -> Result<()> {
    apt_get_in(Path::new("/"), args, progress)
}

fn apt_get_in(folder: &Path, args: &[&str], progress: &mut Progress) -> Result<()> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut repaired = false;
    loop {
        let (success, lines) = run("apt-get", args, folder, progress)?;
        if success {
            return Ok(());
        }
        let said = |text: &str| lines.iter().any(|line| line.contains(text));
        if said("dpkg --configure -a") && !repaired {
            progress.step("an earlier installation was interrupted: dpkg --configure -a");
            repaired = true;
            run("dpkg", &["--configure", "-a"], folder, progress)?;
        } else if (said("Could not get lock") || said("Unable to lock"))
            && Instant::now() < deadline
        {
            progress.detail("waiting for another package manager");
            supervise::check()?;
            thread::sleep(LOCK_RETRY);
        } else {
            let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
            bail!("apt-get {} failed:\n{tail}", args.join(" "));
        }
    }
}

fn run(
    program: &str,
    args: &[&str],
    folder: &Path,
    progress: &mut Progress,
) -> Result<(bool, Vec<String>)> {
    let mut command = Command::new(probe::find(program).context("apt or dpkg is missing")?);
    command
        .current_dir(folder)
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("DEBIAN_PRIORITY", "critical")
        .env("NEEDRESTART_SUSPEND", "1");
    if program == "apt-get" {
        command
            .args(["-o", "Dpkg::Use-Pty=0"])
            .args(["-o", &format!("DPkg::Lock::Timeout={}", LOCK_PATIENCE.as_secs())]);
    }
    command.args(args);
    let mut lines = Vec::new();
    let status = supervise::run_lines(&mut command, |line| match line {
        Some(line) => {
            progress.detail(line);
            lines.push(line.to_owned());
        }
        None => progress.detail(lines.last().map_or("", String::as_str)),
    })?;
    Ok((status.success(), lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_read_from_apt_cache_policy() {
        let text = "\
rustc-web:
  Installed: (none)
  Candidate: 1.96.0+dfsg1-1~deb12u2
  Version table:
     1.96.0+dfsg1-1~deb12u2 500
cargo-web:
  Installed: (none)
  Candidate: (none)
  Version table:
";
        assert_eq!(offered(text), ["rustc-web"]);
        assert!(offered("").is_empty());
    }
}
