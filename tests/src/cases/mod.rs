//! Packet cases: traces in TOML files, run through the loaded program.
//!
//! ```toml
//! [[case]]
//! name = "a TCP packet goes on to the backend's MAC address, untouched"
//! world = "dsr"
//! steps = """
//! > eth client > us / ip* client > vip / tcp 40000 > 80 S
//! < tx eth us > b1 / same
//! + b1 sent opens
//! """
//! ```
//!
//! A world is a table of `worlds.toml`; `with` changes it and `service` its
//! first service, for this case. The lines of a trace:
//!
//! - `> PACKET` comes in, in the notation of [`crate::notation`]; `> @lan PACKET`
//!   by the interface `lan`. With `{1..9}` in it, the step is made for each of
//!   these numbers, which `{}` stands for in its other lines.
//! - `< pass`, untouched; `< drop`; `< tx PACKET`; `< redirect PACKET`.
//! - `+` what is counted, and nothing else: reasons by name, `b1 sent` (a packet
//!   and its bytes), `b1 sent opens` (a connection, too), `b1 returned`,
//!   `flows=+2`.
//! - `! silence 31s`, `! b1 down`, `maint`, `unreachable`, `! b1 up`,
//!   `! table b2 was b1`: the world changes, through the real datapath.
//! - `? $a == $b`, `? $a != $b`, `? $p in 10000..10003`: of placeholders.
//!
//! A case with `ip*` stands for one of IPv4 and one of IPv6; `icmp*` in it for ICMP and ICMPv6.

mod run;
mod trace;

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

pub use self::run::Stage;
use crate::{notation, world::World};

/// A case as it stands in its file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// What holds, in a sentence.
    pub name: String,
    /// Where it is written that it has to.
    #[serde(default)]
    pub rfc: Option<String>,
    /// Name of its world.
    pub world: String,
    /// What differs from the world.
    #[serde(default)]
    pub with: toml::Table,
    /// What differs from the world's first service.
    #[serde(default)]
    pub service: toml::Table,
    /// The trace.
    pub steps: String,
    /// For a check of the checker: the case must fail, and say this.
    #[serde(default)]
    pub fails: Option<String>,
}

impl Case {
    /// Whether flows are silent in it for longer than a host may have run: then it comes after
    /// those that need no such host.
    pub fn needs_age(&self) -> bool {
        self.steps.lines().any(|line| line.starts_with("! silence"))
    }

    /// The frames that come in, but for those that depend on what has come out.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let steps = trace::parse(&self.steps).unwrap_or_default();
        let packets = steps.iter().filter_map(|step| match &step.kind {
            trace::Kind::Packet { input, .. } => notation::parse(input).ok(),
            _ => None,
        });
        packets.collect()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseFile {
    case: Vec<Case>,
}

/// The cases of one file, and their worlds.
#[derive(Debug)]
pub struct Suite {
    /// Cases by name: those of both families are two.
    pub cases: Vec<(Case, World)>,
}

impl Suite {
    /// Reads every file of cases in a directory.
    ///
    /// # Errors
    /// When a file can't be read, or says something that is no case.
    pub fn read(directory: &Path) -> Result<Self> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
        };
        let worlds: toml::Table = read(&directory.join("worlds.toml"))?.parse()?;
        let mut paths: Vec<_> = std::fs::read_dir(directory)?
            .map(|entry| entry.map(|e| e.path()))
            .collect::<Result<_, _>>()?;
        paths.retain(|p| p.extension().is_some_and(|e| e == "toml") && !p.ends_with("worlds.toml"));
        paths.sort();
        let mut cases: Vec<(Case, World)> = Vec::new();
        for path in paths {
            let file: CaseFile =
                toml::from_str(&read(&path)?).with_context(|| path.display().to_string())?;
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            for case in file.case {
                let world = world(&worlds, &case).with_context(|| case.name.clone())?;
                for mut case in families(case) {
                    case.name = format!("{stem}: {}", case.name);
                    ensure!(
                        cases.iter().all(|(c, _)| c.name != case.name),
                        "two cases are called {}",
                        case.name
                    );
                    cases.push((case, world.clone()));
                }
            }
        }
        Ok(Self { cases })
    }
}

/// A case of each family for one that stands for both.
fn families(case: Case) -> Vec<Case> {
    if !case.steps.contains(" ip* ") {
        return vec![case];
    }
    [("ip", "icmp"), ("ip6", "icmp6")]
        .into_iter()
        .map(|(ip, icmp)| Case {
            name: format!("{} ({ip})", case.name),
            steps: case
                .steps
                .replace(" ip* ", &format!(" {ip} "))
                .replace(" icmp* ", &format!(" {icmp} ")),
            ..case.clone()
        })
        .collect()
}

/// The world of that name in a directory of cases.
///
/// # Errors
/// When there is none, or it is not well written.
pub fn world_named(directory: &Path, name: &str) -> Result<World> {
    let path = directory.join("worlds.toml");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let worlds: toml::Table = text.parse()?;
    Ok(worlds.get(name).with_context(|| format!("no world `{name}`"))?.clone().try_into()?)
}

/// A case's world.
fn world(worlds: &toml::Table, case: &Case) -> Result<World> {
    let world = worlds.get(&case.world).with_context(|| format!("no world `{}`", case.world))?;
    let mut world = world.as_table().context("a world is a table")?.clone();
    world.extend(case.with.clone());
    if let Some(first) = world
        .get_mut("service")
        .and_then(|s| s.as_array_mut())
        .and_then(|s| s.first_mut())
        .and_then(|s| s.as_table_mut())
    {
        first.extend(case.service.clone());
    }
    Ok(world.try_into()?)
}
