//! `status`: everything the agent knows, as tables.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;

use super::{
    client::{Client, encoded},
    failure::{Failure, exit},
    print, rollout,
    text::{self, Align, Table, age, bytes, maybe_percent, percent},
};
use crate::api::{
    model::{
        AgentStatus, FreezeStatus, PendingStatus, ServiceStatus, SignalsStatus, Status,
        VersionStatus,
    },
    panic::PanicStatus,
};

/// Asks once and prints.
pub(super) async fn run(client: &Client, service: Option<&str>, json: bool) -> Result<(), Failure> {
    print(&block(client, service, json).await?)
}

/// What there is to print now: one line of JSON, or tables.
pub(super) async fn block(
    client: &Client,
    service: Option<&str>,
    json: bool,
) -> Result<String, Failure> {
    let answer = client.get("/v1/status").await?;
    let Some(name) = service else {
        if json {
            return Ok(format!("{}\n", answer.text()));
        }
        return Ok(everything(&answer.read()?));
    };
    let status: Status = answer.read()?;
    let Some(found) = status.services.iter().find(|service| service.name == name) else {
        // The agent knows best how to say that it does not know it.
        let target = format!("/v1/services/{}", encoded(name));
        let _ = client.get(&target).await?;
        let message = format!("there is no service `{name}`");
        return Err(Failure::new("unknown_service", exit::FAILED, message));
    };
    if !json {
        return Ok(one_service(found) + &rollouts_of(&status, name));
    }
    // As it came, so that fields which this build does not know are kept.
    let mut value: Value = answer.read()?;
    if let Some(services) = value["services"].as_array_mut() {
        services.retain(|service| service["name"] == name);
    }
    if let Some(rollouts) = value["rollouts"].as_array_mut() {
        rollouts.retain(|rollout| rollout["service"] == name);
    }
    Ok(format!("{value}\n"))
}

fn everything(status: &Status) -> String {
    let AgentStatus { version, abi_version: _, pid, uptime_seconds, revision, frozen } =
        &status.agent;
    let mut out = format!(
        "canary-agent {}, up {}, pid {pid}, revision {revision}\n",
        text::plain(version),
        age(*uptime_seconds)
    );
    for alert in &status.alerts {
        out.push_str(&format!("ALERT: {}\n", text::plain(alert)));
    }
    out.push_str(&frozen.as_ref().map_or_else(String::new, |freeze| is_frozen("all", freeze)));
    for PendingStatus { left_seconds, change } in &status.pending {
        let what = format!(
            "revision {} ({}) is taken back in {} unless it is confirmed",
            change.revision.unwrap_or_default(),
            change.text,
            age(left_seconds.ceil())
        );
        out.push_str(&format!("WAITS: {}\n", text::plain(&what)));
    }
    for service in &status.services {
        out.push('\n');
        out.push_str(&one_service(service));
        out.push_str(&rollouts_of(status, &service.name));
    }
    if status.services.is_empty() {
        out.push_str("\nno services are configured\n");
    }
    out.push('\n');
    out.push_str(&host(status));
    out
}

/// That something may only be changed towards control.
fn is_frozen(what: &str, freeze: &FreezeStatus) -> String {
    let FreezeStatus { reason, revision, unix_ms: _, uid } = freeze;
    let who = uid.map_or_else(|| "the agent".to_owned(), |uid| format!("uid {uid}"));
    let line = format!("FROZEN: {what}, by {who} since revision {revision}: {reason}");
    format!("{}\n", text::plain(&line))
}

/// That a service is where a panic has sent it.
fn is_panicked(panic: &PanicStatus) -> String {
    let PanicStatus { reason, revision, unix_ms, uid } = panic;
    let who = uid.map_or_else(|| "the agent".to_owned(), |uid| format!("uid {uid}"));
    let since = UNIX_EPOCH + Duration::from_millis(*unix_ms);
    let since = humantime::format_rfc3339_seconds(since);
    let why = reason.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    let line = format!(
        "PANIC: everything to control since {since}, by {who} (revision {revision}), until the next split{why}"
    );
    format!("{}\n", text::plain(&line))
}

fn one_service(service: &ServiceStatus) -> String {
    let ServiceStatus {
        name,
        vips,
        ports,
        forward,
        stickiness,
        control,
        buckets,
        tracked_buckets,
        signals,
        versions,
        frozen,
        panic,
    } = service;
    let head = format!(
        "{name}  {}  {}  {forward}, by {stickiness}, {buckets} buckets, {tracked_buckets} tracked",
        vips.join(" "),
        ports.join(" ")
    );
    let mut out = format!("{}\n", text::plain(&head));
    out.push_str(&frozen.as_ref().map_or_else(String::new, |freeze| is_frozen(name, freeze)));
    out.push_str(&panic.as_ref().map_or_else(String::new, is_panicked));
    let mut table = Table::new([
        ("VERSION", Align::Left),
        ("ASKED", Align::Right),
        ("IN FORCE", Align::Right),
        ("MEASURED", Align::Right),
        ("BUCKETS", Align::Right),
        ("CONNECTIONS", Align::Right),
        ("WEIGHT", Align::Right),
        ("STATE", Align::Left),
    ]);
    for version in versions {
        let role = if version.name == *control { " (control)" } else { "" };
        table.row([
            format!("{}{role}", version.name),
            version.asked_text.clone(),
            percent(version.in_force),
            maybe_percent(version.measured),
            version.buckets.to_string(),
            version.connections.to_string(),
        ]);
        for backend in &version.backends {
            let message = backend.message.as_ref();
            let message = message.map_or_else(String::new, |message| format!(": {message}"));
            table.row([
                format!("  {}", backend.addr),
                String::new(),
                String::new(),
                String::new(),
                backend.buckets.to_string(),
                backend.connections.to_string(),
                backend.weight.to_string(),
                format!("{}{message}", backend.state),
            ]);
        }
    }
    out.push_str(&table.render("  "));
    if let Some(signals) = signals {
        out.push_str(&watched(signals, versions));
    }
    out
}

/// The rollouts of a service that were ever begun.
fn rollouts_of(status: &Status, service: &str) -> String {
    let begun = status.rollouts.iter().filter(|one| one.service == service && one.run.is_some());
    begun.map(|one| format!("\n{}", rollout::drawn(one, Some(status)))).collect()
}

/// What watched connections have done, by version.
fn watched(signals: &SignalsStatus, versions: &[VersionStatus]) -> String {
    let SignalsStatus { slow_over_seconds, incomplete_windows } = signals;
    let mut table = Table::new([
        ("WATCHED", Align::Left),
        ("ONE IN", Align::Right),
        ("CONNECTIONS", Align::Right),
        ("FAILED", Align::Right),
        ("SYN AGAIN", Align::Right),
        ("SLOW", Align::Right),
        ("SERVER RST", Align::Right),
        ("CLIENT RST", Align::Right),
        ("SHORT", Align::Right),
        ("HANDSHAKE P50", Align::Right),
        ("P95", Align::Right),
        ("P99", Align::Right),
    ]);
    for version in versions {
        let Some(known) = &version.signals else { continue };
        let one_in = known.one_in.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let mut row = vec![version.name.clone(), one_in, known.watched.to_string()];
        row.extend(known.signals.iter().map(|signal| signal.connections.to_string()));
        row.extend(
            [known.handshake_p50_seconds, known.handshake_p95_seconds, known.handshake_p99_seconds]
                .map(|time| time.map_or_else(|| "-".to_owned(), millis)),
        );
        table.row(row);
    }
    let mut out = table.render("  ");
    if let Some(slow) = slow_over_seconds {
        out.push_str(&format!("  slow: a handshake over {}\n", millis(*slow)));
    }
    if *incomplete_windows > 0 {
        out.push_str(&format!("  windows in which something was missed: {incomplete_windows}\n"));
    }
    out
}

fn millis(seconds: f64) -> String {
    format!("{:.3} ms", seconds * 1000.0)
}

/// Interfaces, packets by reason and maps.
fn host(status: &Status) -> String {
    let mut interfaces =
        Table::new([("INTERFACE", Align::Left), ("MODE", Align::Left), ("", Align::Left)]);
    for interface in &status.interfaces {
        let mode = interface.mode.clone();
        interfaces.row([
            interface.name.clone(),
            mode.unwrap_or_else(|| "not attached".to_owned()),
            interface.message.clone().unwrap_or_default(),
        ]);
    }
    let mut reasons =
        Table::new([("REASON", Align::Left), ("VERDICT", Align::Left), ("PACKETS", Align::Right)]);
    let counted = status.reasons.iter().filter(|reason| reason.packets > 0);
    for reason in counted.clone() {
        reasons.row([reason.reason.clone(), reason.verdict.clone(), reason.packets.to_string()]);
    }
    let mut maps = Table::new([
        ("MAP", Align::Left),
        ("USED", Align::Right),
        ("CAPACITY", Align::Right),
        ("MEMORY", Align::Right),
    ]);
    for map in &status.maps {
        maps.row([
            map.name.clone(),
            map.used.map_or_else(|| "-".to_owned(), |used| used.to_string()),
            map.capacity.to_string(),
            bytes(map.memory_bytes),
        ]);
    }
    let mut parts = vec![interfaces.render("")];
    if counted.count() > 0 {
        parts.push(reasons.render(""));
    }
    if !status.maps.is_empty() {
        parts.push(maps.render(""));
        let all = status.maps.iter().map(|map| map.memory_bytes).sum();
        parts.push(format!("memory of all maps: {}\n", bytes(all)));
    }
    parts.join("\n")
}
