//! `detach`: the program off the interfaces, the pins removed.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::{
    args,
    client::Client,
    failure::{Failure, exit},
    print,
    settings::{self, Unreadable},
    wait_for,
};
use crate::{
    config::{self, Config, model::Forward},
    datapath,
    resolve::{self, VipManager},
};

/// Where pins are, if the configuration does not say.
const DEFAULT_BPFFS: &str = "/sys/fs/bpf/canary";

/// Removes what is pinned, unless a daemon runs, and says what it was.
pub(super) fn run(
    config: &Path,
    client: &Client,
    dry_run: bool,
    json: bool,
) -> Result<(), Failure> {
    let bpffs = bpffs(config)?;
    if !nix::unistd::geteuid().is_root() {
        let message = "detaching needs root";
        return Err(Failure::new("not_permitted", exit::NOT_PERMITTED, message)
            .help("run this command as root"));
    }
    if !dry_run {
        refuse_while_running(client)?;
    }
    let mut pins = Vec::new();
    collect(&bpffs, &mut pins).map_err(|error| {
        let message = format!("can't read {}: {error}", bpffs.display());
        Failure::new("failed", exit::FAILED, message)
    })?;
    pins.sort();
    let mut removed = Removed { pins, vips: Vec::new() };
    if !dry_run {
        let attached = interfaces(&bpffs);
        if bpffs.exists() {
            datapath::detach(&bpffs).map_err(|error| {
                let message = format!("can't remove the pins under {}: {error}", bpffs.display());
                Failure::new("failed", exit::FAILED, message)
            })?;
        }
        removed.vips = give_back(config, attached)?;
    }
    print(&report(&bpffs, &removed, dry_run, json))
}

/// What was taken away.
struct Removed {
    pins: Vec<PathBuf>,
    /// Addresses with their interfaces.
    vips: Vec<String>,
}

/// Interfaces that the program is attached to, as the pinned links are named.
fn interfaces(bpffs: &Path) -> BTreeSet<String> {
    let links = fs::read_dir(bpffs.join("links")).into_iter().flatten().flatten();
    links.map(|link| link.file_name().to_string_lossy().into_owned()).collect()
}

/// Gives the host back what the agent had of it: VIPs that it added, reserved ports.
fn give_back(config: &Path, mut interfaces: BTreeSet<String>) -> Result<Vec<String>, Failure> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Failure::new("failed", exit::FAILED, format!("{what}: {error}"))
    };
    // A configuration with errors still has pins to remove; it just tells no more.
    if let Ok(loaded) = config::load(config) {
        let Config { agent, services, audiences: _, gates: _, rollouts: _ } = loaded.config;
        interfaces.extend(agent.interfaces);
        if services.iter().any(|service| service.forward == Forward::Nat) {
            resolve::release_ports(&agent.nat_ports)
                .map_err(|error| failed("can't release the reserved ports", &error))?;
        }
    }
    let interfaces: Vec<String> = interfaces.into_iter().collect();
    let report = wait_for(async {
        let mut vips = VipManager::open().map_err(|error| failed("can't ask for VIPs", &error))?;
        vips.remove_all(&interfaces).await.map_err(|error| failed("can't remove VIPs", &error))
    })?;
    if let Some(error) = report.errors.first() {
        return Err(failed("can't remove a VIP", error));
    }
    Ok(report.removed.iter().map(|vip| format!("{} on {}", vip.address, vip.interface)).collect())
}

/// The directory of the pins. A configuration that can't be read is no reason to
/// guess: the default may be another agent's.
pub(super) fn bpffs(config: &Path) -> Result<PathBuf, Failure> {
    match settings::agent_path(config, "bpffs") {
        Ok(bpffs) => Ok(bpffs.unwrap_or_else(|| PathBuf::from(DEFAULT_BPFFS))),
        Err(Unreadable { missing: true, .. }) if config == Path::new(args::DEFAULT_CONFIG) => {
            Ok(PathBuf::from(DEFAULT_BPFFS))
        }
        Err(error) => {
            let message = format!("can't tell where the pins are: {error}");
            Err(Failure::new("bad_config", exit::BAD_CONFIG, message)
                .help("name the agent's configuration with --config, or mend it"))
        }
    }
}

fn refuse_while_running(client: &Client) -> Result<(), Failure> {
    if !wait_for(async { Ok(client.is_anybody_there().await) })? {
        return Ok(());
    }
    let socket = client.socket().display();
    let message = format!("the agent is running: it listens on {socket}");
    Err(Failure::new("agent_running", exit::FAILED, message)
        .help("stop the daemon first: it would attach the program again"))
}

/// Everything under `directory` that is no directory; nothing if there is none.
fn collect(directory: &Path, pins: &mut Vec<PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), pins)?;
        } else {
            pins.push(entry.path());
        }
    }
    Ok(())
}

fn report(bpffs: &Path, removed: &Removed, dry_run: bool, json: bool) -> String {
    let Removed { pins, vips } = removed;
    let names: Vec<String> = pins.iter().map(|pin| pin.display().to_string()).collect();
    if json {
        return format!("{}\n", json!({"applied": !dry_run, "pins": names, "vips": vips}));
    }
    if names.is_empty() && vips.is_empty() {
        return format!("nothing is pinned under {}\n", bpffs.display());
    }
    let lines: String = names.iter().chain(vips).map(|name| format!("  {name}\n")).collect();
    if dry_run {
        format!("would be removed:\n{lines}nothing was changed (--dry-run)\n")
    } else {
        format!("removed:\n{lines}")
    }
}
