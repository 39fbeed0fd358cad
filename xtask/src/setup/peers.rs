//! What `bench peers` and `bench wire` compare the agent with: load balancers of Debian's packages.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::{
    apt,
    clients::{install, remove},
    linker, probe,
};
use crate::{progress::Progress, supervise};

/// A program whose package starts no service.
const NFT: [&str; 1] = ["nftables"];

/// These do start one: they are unpacked into the cache, where the benchmark looks for them, and not
/// installed.
const SERVERS: [&str; 3] = ["haproxy", "nginx", "libnginx-mod-stream"];

/// What HAProxy needs of libraries that few hosts have.
const LIBRARIES: [&str; 2] = ["liblua5.3-0", "libopentracing-c-wrapper0"];

/// Where the servers lie below the cache; `tests/src/bin/bench/peers/subjects.rs` has the same path.
const UNPACKED: &str = "peers";

/// Finds or installs what a subcommand of the benchmark needs; says what to do where that can't be. It is
/// no error: the benchmark says what it lacks, and can do without some.
///
/// # Errors
/// The task is interrupted.
pub(crate) fn ensure(subcommand: &str) -> Result<()> {
    let servers = match subcommand {
        "peers" => true,
        "wire" => false,
        _ => return Ok(()),
    };
    let mut progress = Progress::new();
    let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut lacking = Vec::new();
    if probe::find("nft").is_none() && !install(&owned(&NFT), &mut progress) {
        lacking.extend(NFT);
    }
    let folder = linker::cache()?.join(UNPACKED);
    if servers && !works(&folder) {
        let ready = apt::present()
            && unpack(&folder, &mut progress).is_ok()
            && (works(&folder) || install(&owned(&LIBRARIES), &mut progress) && works(&folder));
        if !ready {
            lacking.extend(SERVERS);
        }
    }
    progress.clear();
    supervise::check()?;
    if !lacking.is_empty() {
        eprintln!(
            "setup: the benchmark lacks programs that could not be had from here, of Debian's packages {}",
            lacking.join(", ")
        );
    }
    Ok(())
}

/// Whether they run: what is unpacked may lack a library.
fn works(folder: &Path) -> bool {
    let sbin = folder.join("usr/sbin");
    probe::output(&sbin.join("haproxy"), &["-v"]).is_some()
        && probe::output(&sbin.join("nginx"), &["-v"]).is_some()
        && folder.join("usr/lib/nginx/modules/ngx_stream_module.so").is_file()
}

fn unpack(place: &Path, progress: &mut Progress) -> Result<()> {
    let cache = linker::cache()?;
    let _lock = linker::lock(&cache, progress)?;
    let folder = cache.join("peers-unpacked");
    // What an interrupted run has left.
    remove(&folder)?;
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let all = |progress: &mut Progress| {
        SERVERS.iter().try_for_each(|package| apt::unpack(package, &folder, progress))
    };
    if all(progress).is_err() {
        // Package lists that are missing or out of date.
        apt::update(progress)?;
        all(progress)?;
    }
    remove(place)?;
    // It appears whole, or not at all.
    fs::rename(&folder, place).with_context(|| format!("making {}", place.display()))
}
