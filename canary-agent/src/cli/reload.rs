//! `reload` and `diff`: what the configuration files say by now, and going on with it.

use std::time::Duration;

use super::{
    args,
    client::Client,
    failure::Failure,
    print,
    split::{noted, waits},
    text::{self, counted},
};
use crate::{
    api::reload::{
        AudienceChange, BackendChange, ReloadReport, ReloadRequest, ServiceChange, SettingChange,
        VersionChange,
    },
    config::{self, derived},
};

const TARGET: &str = "/v1/reload";

/// Shows what a reload would change.
pub(super) async fn diff(client: &Client, json: bool) -> Result<(), Failure> {
    ask(client, ReloadRequest { dry_run: true, ..ReloadRequest::default() }, json).await
}

/// Reloads, or shows what that would change.
pub(super) async fn run(client: &Client, reload: args::Reload, json: bool) -> Result<(), Failure> {
    let args::Reload { terms, force } = reload;
    let args::Terms { reason, dry_run, if_revision, confirm } = terms;
    ask(client, ReloadRequest { reason, dry_run, force, if_revision, confirm }, json).await
}

async fn ask(client: &Client, request: ReloadRequest, json: bool) -> Result<(), Failure> {
    let answer = client.post_long(TARGET, &request).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    print(&shown(&answer.read()?))
}

fn shown(report: &ReloadReport) -> String {
    let ReloadReport {
        applied,
        differs,
        revision,
        settings,
        services,
        buckets_moved,
        audiences,
        needs_restart,
        needs_force,
        notes,
        confirm_within_ms,
        warnings,
        took_us,
        busy_us: _,
    } = report;
    let mut out = config::render(warnings);
    let took = Duration::from_micros(*took_us);
    let buckets = counted(*buckets_moved, "bucket");
    out.push_str(&match (applied, differs) {
        (true, true) => {
            format!("reloaded: {buckets} moved; in force after {took:?} (revision {revision})\n")
        }
        (true, false) => "the files say what runs already: nothing to reload\n".to_owned(),
        (false, true) => format!("a reload would change this, and move {buckets}\n"),
        (false, false) => "the files say what runs: a reload would change nothing\n".to_owned(),
    });
    if !settings.is_empty() {
        out.push_str("\n[agent]\n");
        settings.iter().for_each(|setting| out.push_str(&changed_setting(setting)));
    }
    services.iter().for_each(|service| out.push_str(&changed_service(service)));
    if let Some(AudienceChange { networks, addresses_v4, addresses_v6 }) = audiences {
        out.push_str(&format!(
            "\n~ audiences: clients of {} go by another route ({addresses_v4} addresses of IPv4, \
             {addresses_v6} of IPv6)\n",
            counted(*networks as u64, "network"),
        ));
    }
    let mut end = String::new();
    if !needs_restart.is_empty() {
        end.push_str(&format!(
            "refused: only a restart changes {}\n",
            text::plain(&needs_restart.join(", "))
        ));
    }
    if !applied {
        for reason in needs_force {
            end.push_str(&format!("refused without --force: {}\n", text::plain(reason)));
        }
    }
    end.push_str(&noted(notes));
    end.push_str(&waits(*confirm_within_ms));
    if !end.is_empty() {
        out.push('\n');
        out.push_str(&end);
    }
    out
}

fn changed_setting(SettingChange { key, before, after }: &SettingChange) -> String {
    let value = |text: &str| match text {
        "" => "(none)".to_owned(),
        text => text::plain(text),
    };
    format!("  ~ {}: {} → {}\n", text::plain(key), value(before), value(after))
}

fn sign(change: &str) -> char {
    match change {
        "added" => '+',
        "removed" => '-',
        _ => '~',
    }
}

fn changed_service(service: &ServiceChange) -> String {
    let ServiceChange {
        name,
        change,
        settings,
        versions,
        backends,
        buckets_moved,
        backends_touched: _,
        connections_held,
    } = service;
    let mut out = format!("\n{} service {}\n", sign(change), text::plain(name));
    settings.iter().for_each(|setting| out.push_str(&changed_setting(setting)));
    // The table of a route has the versions and backends of its service, where they are shown.
    let of_route = derived::parts(name).is_some();
    for VersionChange { name, change } in versions.iter().filter(|_| !of_route) {
        out.push_str(&format!("  {} version {}\n", sign(change), text::plain(name)));
    }
    let backends = backends.iter().filter(|_| !of_route);
    for BackendChange { version, addr, change, weight_before, weight } in backends {
        let weights = match (weight_before, weight) {
            (Some(before), Some(after)) => format!(", weight {before} → {after}"),
            (None, Some(1)) | (Some(_), None) | (None, None) => String::new(),
            (None, Some(weight)) => format!(", weight {weight}"),
        };
        let (addr, version) = (text::plain(addr), text::plain(version));
        out.push_str(&format!("  {} backend {addr} of {version}{weights}\n", sign(change)));
    }
    if *buckets_moved > 0 {
        out.push_str(&format!("  {} move\n", counted((*buckets_moved).into(), "bucket")));
    }
    if let Some(open) = connections_held {
        out.push_str(&format!("  about {}\n", counted(*open, "open connection")));
    }
    out
}
