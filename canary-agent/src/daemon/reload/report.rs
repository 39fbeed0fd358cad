//! What a reload would change, in words and numbers.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::Traffic;
use crate::{
    api::reload::{
        AudienceChange, BackendChange, ReloadReport, ServiceChange, SettingChange, VersionChange,
    },
    config::{
        difference::{self, Difference},
        model::{Backend, Config, Existing, Forward, Gate, Rollout, Service},
    },
    daemon::held::NOT_COUNTED,
    datapath::{Census, Counted},
    plan::{BootMs, BucketSet, ClassChange, Family, Made, Prepared, Removal, Upheaval},
    rollout::drive::recipe,
};

/// For so long after its last packet a service counts as having open connections, where they
/// can't be counted.
const QUIET_MS: BootMs = 60_000;

/// What is to be counted of the flow tables for a report.
pub(super) fn counted(prepared: &Prepared) -> Vec<Counted> {
    let nat = |service: &Service| service.forward == Forward::Nat;
    let changed = prepared.made().filter(|made| made.before.as_deref().is_some_and(nat));
    let changed = changed.flat_map(|made| made.records.iter().copied().zip(made.buckets.clone()));
    let removed = prepared.removed().iter().filter(|removal| nat(&removal.config));
    let removed = removed.flat_map(|removal| {
        removal.records.iter().map(|record| (*record, (0..=record.bucket_mask).collect()))
    });
    changed
        .chain(removed)
        .map(|(record, buckets): (_, BucketSet)| Counted { record, buckets })
        .collect()
}

/// Rollouts and gates that come, go or change: one that is under way stands still when its steps
/// do.
fn rollouts(running: &Config, wanted: &Config) -> Vec<SettingChange> {
    let gates = |config: &Config| -> BTreeMap<String, (String, String)> {
        let one = |gate: &Gate| {
            let of = format!("{} signals", gate.signals.len());
            (format!("gate.{}", gate.name), (of, format!("{gate:?}")))
        };
        config.gates.iter().map(one).collect()
    };
    let steps = |config: &Config| -> BTreeMap<String, (String, String)> {
        let one = |rollout: &Arc<Rollout>| {
            (format!("rollout.{}", rollout.name), (recipe(rollout), format!("{rollout:?}")))
        };
        config.rollouts.iter().map(one).collect()
    };
    let mut changes = Vec::new();
    for (before, after) in [(gates(running), gates(wanted)), (steps(running), steps(wanted))] {
        let keys: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        for key in keys {
            let (was, is) = (before.get(key), after.get(key));
            // What is different in them may be nothing that is told of in a line.
            if was.map(|(_, whole)| whole) != is.map(|(_, whole)| whole) {
                let text = |one: Option<&(String, String)>| {
                    one.map_or_else(|| "(none)".to_owned(), |(text, _)| text.clone())
                };
                let (before, after) = (text(was), text(is));
                let after = if before == after { format!("{after} (changed)") } else { after };
                changes.push(SettingChange { key: key.clone(), before, after });
            }
        }
    }
    changes
}

/// What `prepared` would do.
pub(super) fn report(
    running: &Config,
    wanted: &Config,
    prepared: &Prepared,
    traffic: &TrafficByService,
    census: Option<&Census>,
) -> ReloadReport {
    let mut report = ReloadReport::default();
    for one in difference::of_agents(&running.agent, &wanted.agent) {
        if one.needs_restart() {
            report.needs_restart.push(one.key.to_owned());
        }
        report.settings.push(setting(one));
    }
    report.settings.extend(rollouts(running, wanted));
    let of = |name: &str| traffic.get(name).map_or(&[][..], Vec::as_slice);
    for made in prepared.made() {
        let held = census.filter(|_| is_nat(made.before.as_deref())).map(|census| {
            let ids = made.records.iter().map(|record| record.id as u16);
            ids.filter_map(|id| census.by_table.get(&id)).sum()
        });
        let change = changed(made, held);
        notes(made, &change, &mut report.notes);
        upheavals(made, of(&change.name), held, &mut report.needs_force);
        report.buckets_moved += u64::from(change.buckets_moved);
        report.services.push(change);
    }
    for removal in prepared.removed() {
        let held = census.filter(|_| is_nat(Some(&removal.config))).map(|census| {
            let ids = removal.records.iter().map(|record| record.id as u16);
            ids.filter_map(|id| census.by_table.get(&id)).sum()
        });
        let name = &removal.config.name;
        // The table of an audience goes when its connections have had their drain.
        let waited = removal.config.derived.is_some();
        if let Some(why) = in_use(of(name), held).filter(|_| !waited) {
            report.needs_force.push(format!(
                "service `{name}` is removed and {why}: its packets would pass to the host, and its \
                 connections break"
            ));
        }
        report.services.push(removed(removal, held));
    }
    let dsr = |service: &ServiceChange| service.connections_held.is_none();
    if report.services.iter().any(|service| service.buckets_moved > 0 && dsr(service)) {
        report.notes.push(NOT_COUNTED.to_owned());
    }
    report.audiences = prepared.classes().map(|change| {
        let ClassChange { networks, addresses: [v4, v6] } = change;
        AudienceChange { networks, addresses_v4: v4 as u64, addresses_v6: v6.to_string() }
    });
    report.differs = !report.settings.is_empty()
        || !report.services.is_empty()
        || running.audiences != wanted.audiences
        || report.audiences.is_some();
    report
}

fn is_nat(service: Option<&Service>) -> bool {
    service.is_some_and(|service| service.forward == Forward::Nat)
}

fn setting(Difference { key, before, after }: Difference) -> SettingChange {
    SettingChange { key: key.to_owned(), before, after }
}

fn changed(made: &Made, held: Option<u64>) -> ServiceChange {
    let after = made.after();
    let (change, settings) = match &made.before {
        Some(before) => ("changed", difference::of_services(before, after)),
        None => ("added", Vec::new()),
    };
    let (versions, backends) = members(made.before.as_deref(), Some(after));
    let moved = made.preview.moved.iter().map(BucketSet::len).sum();
    ServiceChange {
        name: after.name.clone(),
        change: change.to_owned(),
        settings: settings.into_iter().map(setting).collect(),
        versions,
        backends,
        buckets_moved: moved,
        backends_touched: made.preview.touched.iter().map(ToString::to_string).collect(),
        connections_held: held.filter(|_| moved > 0 || !made.upheavals.is_empty()),
    }
}

fn removed(removal: &Removal, held: Option<u64>) -> ServiceChange {
    let (versions, backends) = members(Some(&removal.config), None);
    ServiceChange {
        name: removal.config.name.clone(),
        change: "removed".to_owned(),
        versions,
        backends,
        connections_held: held,
        ..ServiceChange::default()
    }
}

/// Versions and backends that come, go or change, by name and address.
fn members(
    before: Option<&Service>,
    after: Option<&Service>,
) -> (Vec<VersionChange>, Vec<BackendChange>) {
    let names = |service: Option<&Service>| -> Vec<String> {
        service.iter().flat_map(|s| &s.versions).map(|v| v.name.clone()).collect()
    };
    let (old, new) = (names(before), names(after));
    let version = |name: &String, change: &str| VersionChange {
        name: name.clone(),
        change: change.to_owned(),
    };
    let added = new.iter().filter(|name| !old.contains(name)).map(|name| version(name, "added"));
    let gone = old.iter().filter(|name| !new.contains(name)).map(|name| version(name, "removed"));
    let versions = added.chain(gone).collect();
    // In the order of the files; a BTreeMap of versions and addresses would be another.
    let backends = |service: Option<&Service>| -> Vec<(String, Backend)> {
        let versions = service.iter().flat_map(|s| &s.versions);
        versions.flat_map(|v| v.backends.iter().map(|b| (v.name.clone(), *b))).collect()
    };
    let weights = |list: &[(String, Backend)]| -> HashMap<(String, std::net::SocketAddr), u32> {
        list.iter().map(|(version, b)| ((version.clone(), b.addr), b.weight)).collect()
    };
    let (old, new) = (backends(before), backends(after));
    let (had, has) = (weights(&old), weights(&new));
    let one = |(version, b): &(String, Backend)| {
        let key = (version.clone(), b.addr);
        let (before, after) = (had.get(&key).copied(), has.get(&key).copied());
        let change = match (before, after) {
            (None, _) => "added",
            (_, None) => "removed",
            _ => "changed",
        };
        BackendChange {
            version: version.clone(),
            addr: b.addr.to_string(),
            change: change.to_owned(),
            weight_before: before,
            weight: after,
        }
    };
    let differs = |change: &BackendChange| change.weight_before != change.weight;
    let gone = old.iter().filter(|(version, b)| !has.contains_key(&(version.clone(), b.addr)));
    (versions, new.iter().chain(gone).map(one).filter(differs).collect())
}

/// What else an operator should know of a change.
fn notes(made: &Made, change: &ServiceChange, notes: &mut Vec<String>) {
    let after = made.after();
    let Some(before) = &made.before else { return };
    let name = &after.name;
    if change.settings.iter().any(|one| one.key == "split") {
        notes.push(format!(
            "service `{name}`: `split` counts for a new service only; the split in force stays, and \
             `canary-agent split` changes it"
        ));
    }
    let gone: Vec<String> = change
        .versions
        .iter()
        .filter(|version| version.change == "removed")
        .map(|version| format!("`{}`", version.name))
        .collect();
    if !gone.is_empty() {
        let control = &after.versions[after.control].name;
        notes.push(format!(
            "service `{name}`: `{control}` takes the new connections of {}",
            gone.join(", ")
        ));
    }
    let addresses = |service: &Service| -> Vec<(std::net::IpAddr, crate::config::model::Port)> {
        let ports = || service.ports.iter().copied();
        service.vips.iter().flat_map(|vip| ports().map(|port| (*vip, port))).collect()
    };
    let has = addresses(after);
    let lost = addresses(before).into_iter().filter(|address| !has.contains(address)).count();
    if lost > 0 {
        notes.push(format!(
            "service `{name}`: connections to addresses and ports that it loses break"
        ));
    }
    if after.existing == Existing::Move && change.buckets_moved > 0 {
        notes.push(format!("service `{name}`: with `existing = \"move\"` open connections of versions that lose buckets move too"));
    }
}

/// What breaks connections of a service that has any.
fn upheavals(made: &Made, traffic: &[Traffic], held: Option<u64>, reasons: &mut Vec<String>) {
    let name = &made.after().name;
    let packets: u64 = traffic.iter().map(|one| one.packets).sum();
    for upheaval in &made.upheavals {
        match upheaval {
            // As at a start: it does not matter how long ago.
            _ if packets == 0 => {}
            Upheaval::Rehash(key) => {
                let stays = is_nat(made.before.as_deref()) && is_nat(Some(made.after()));
                let whom = match *key {
                    "buckets" => "fewer `buckets` give clients another one".to_owned(),
                    key => format!("another `{key}` gives every client another bucket"),
                };
                let open = match stays {
                    true => "their open connections stay",
                    false => "their open connections move with them and break",
                };
                let of = made.after().buckets;
                reasons.push(format!(
                    "service `{name}` has had traffic: {whom} (of {of}); {open}{}",
                    connections(held)
                ));
            }
            Upheaval::Forward => reasons.push(format!(
                "service `{name}` has had traffic: another `forward` breaks its open connections{}",
                connections(held)
            )),
            Upheaval::Family(family) => {
                let of_family: Vec<Traffic> =
                    traffic.iter().filter(|one| one.family == *family).copied().collect();
                let word = match family {
                    Family::V4 => "IPv4",
                    Family::V6 => "IPv6",
                };
                if let Some(why) = in_use(&of_family, None) {
                    reasons.push(format!(
                        "service `{name}` loses its last {word} address and {why}: connections to it break"
                    ));
                }
            }
        }
    }
}

fn connections(held: Option<u64>) -> String {
    match held {
        Some(1) => " (about 1 is open)".to_owned(),
        Some(held) => format!(" (about {held} are open)"),
        None => String::new(),
    }
}

/// Why a service, or a part of it, may have open connections, if it may.
fn in_use(traffic: &[Traffic], held: Option<u64>) -> Option<String> {
    match held {
        Some(0) => None,
        Some(1) => Some("has about 1 open connection".to_owned()),
        Some(held) => Some(format!("has about {held} open connections")),
        None => {
            let quiet = traffic.iter().filter_map(|one| one.quiet_ms).min()?;
            (quiet < QUIET_MS).then(|| {
                let seconds = quiet.div_ceil(1_000);
                format!("has had packets within the last {seconds} s")
            })
        }
    }
}

/// By service, what was seen of its tables.
pub(super) type TrafficByService = BTreeMap<String, Vec<Traffic>>;
