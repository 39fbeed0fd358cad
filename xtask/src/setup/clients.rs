//! What the tests of real clients run: client programs and servers, of Debian's packages.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{apt, is_root, linker, probe};
use crate::{progress::Progress, supervise};

/// Programs, each with the package that has it. None of these starts a service.
const PROGRAMS: [(&str, &str); 6] = [
    ("curl", "curl"),
    ("iperf3", "iperf3"),
    ("ping", "iputils-ping"),
    ("traceroute", "traceroute"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
];

/// This one does: it is unpacked into the cache, where the tests look for it, and not installed.
const NGINX: &str = "nginx";

/// Where [`NGINX`] lies below the cache; `tests/src/nginx.rs` has the same path.
const UNPACKED: &str = "nginx/usr/sbin/nginx";

/// Finds or installs them; says what to do where that can't be. Nothing but those tests needs
/// them, so it is no error: they say what they lack.
///
/// # Errors
/// The task is interrupted.
pub(crate) fn ensure() -> Result<()> {
    let mut progress = Progress::new();
    let missing = missing();
    let mut lacking = Vec::new();
    if !missing.is_empty() && !install(&missing, &mut progress) {
        lacking.extend(missing);
    }
    if !has_nginx() && !unpacked(&mut progress) {
        lacking.push(NGINX.to_owned());
    }
    progress.clear();
    supervise::check()?;
    if !lacking.is_empty() {
        eprintln!(
            "setup: the tests of real clients lack programs that could not be installed from \
             here:\n  apt-get install --no-install-recommends {}      # as root",
            lacking.join(" ")
        );
    }
    Ok(())
}

fn missing() -> Vec<String> {
    let missing = PROGRAMS.iter().filter(|(program, _)| probe::find(program).is_none());
    missing.map(|(_, package)| (*package).to_owned()).collect()
}

/// Installs packages, if this host may; returns whether they are there.
pub(super) fn install(packages: &[String], progress: &mut Progress) -> bool {
    if !apt::present() || !is_root() {
        return false;
    }
    if apt::without_candidate(packages).is_empty() && apt::install(packages, progress).is_ok() {
        return true;
    }
    // Package lists that are missing or out of date.
    apt::update(progress).and_then(|()| apt::install(packages, progress)).is_ok()
}

fn has_nginx() -> bool {
    probe::find(NGINX).is_some() || linker::cache().is_ok_and(|cache| works(&cache.join(UNPACKED)))
}

/// Whether it runs: what is unpacked may lack a library.
fn works(nginx: &Path) -> bool {
    probe::output(nginx, &["-v"]).is_some()
}

fn unpacked(progress: &mut Progress) -> bool {
    if !apt::present() {
        return false;
    }
    let once = |progress: &mut Progress| unpack(progress).is_ok_and(|program| works(&program));
    once(progress) || (is_root() && apt::update(progress).is_ok() && once(progress))
}

fn unpack(progress: &mut Progress) -> Result<PathBuf> {
    let cache = linker::cache()?;
    let _lock = linker::lock(&cache, progress)?;
    let folder = cache.join("nginx-unpacked");
    // What an interrupted run has left.
    remove(&folder)?;
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    apt::unpack(NGINX, &folder, progress)?;
    let place = cache.join("nginx");
    remove(&place)?;
    // It appears whole, or not at all.
    fs::rename(&folder, &place).with_context(|| format!("making {}", place.display()))?;
    Ok(cache.join(UNPACKED))
}

/// Removes a folder, if it is there.
pub(super) fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    Ok(())
}
