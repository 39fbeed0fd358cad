//! `backend`: shows a service's backends, or tells one what to be.

use std::{net::IpAddr, time::Duration};

use super::{
    args::{Backend, Terms, Told},
    client::{Client, encoded},
    failure::{Failure, exit},
    print,
    split::{held, noted, waits},
    text::{self, Align, Table, counted, percent},
};
use crate::api::model::{BackendDetail, BackendReport, BackendRequest, Backends, VersionBackends};

/// Lists, or tells and says what has moved.
pub(super) async fn run(client: &Client, command: Backend, json: bool) -> Result<(), Failure> {
    let (state, told) = match command {
        Backend::List { service, backend } => {
            return list(client, &service, backend.as_deref(), json).await;
        }
        Backend::Ready(told) => ("ready", told),
        Backend::Drain(told) => ("drain", told),
        Backend::Maint(told) => ("maint", told),
    };
    let Told { service, backend, terms, force } = told;
    let Terms { reason, dry_run, if_revision, confirm } = terms;
    let target = format!("/v1/services/{}/backends/{}", encoded(&service), encoded(&backend));
    let request =
        BackendRequest { state: state.to_owned(), reason, dry_run, force, if_revision, confirm };
    let answer = client.put(&target, &request).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    print(&reported(&answer.read()?))
}

async fn list(
    client: &Client,
    service: &str,
    backend: Option<&str>,
    json: bool,
) -> Result<(), Failure> {
    let answer = client.get(&format!("/v1/services/{}/backends", encoded(service))).await?;
    let Some(wanted) = backend else {
        if json {
            return print(&format!("{}\n", answer.text()));
        }
        return print(&shown(&answer.read()?));
    };
    let mut list: Backends = answer.read()?;
    let is_it = |detail: &BackendDetail| {
        let addr = detail.backend.addr;
        let bare = wanted.trim_start_matches('[').trim_end_matches(']');
        addr.to_string() == wanted || bare.parse::<IpAddr>().is_ok_and(|ip| ip == addr.ip())
    };
    for version in &mut list.versions {
        version.backends.retain(is_it);
    }
    list.versions.retain(|version| !version.backends.is_empty());
    if list.versions.is_empty() {
        let message = format!("service `{service}` has no backend `{wanted}`");
        return Err(Failure::new("unknown_backend", exit::FAILED, message)
            .help(format!("`canary-agent backend list {service}` lists them")));
    }
    if !json {
        return print(&shown(&list));
    }
    let line = serde_json::to_string(&list)
        .map_err(|error| Failure::new("failed", exit::FAILED, error.to_string()))?;
    print(&format!("{line}\n"))
}

fn shown(list: &Backends) -> String {
    let mut table = Table::new([
        ("VERSION", Align::Left),
        ("WEIGHT", Align::Right),
        ("BUCKETS", Align::Right),
        ("LEAVING", Align::Right),
        ("OPEN", Align::Right),
        ("STATE", Align::Left),
        ("HEALTH", Align::Left),
    ]);
    for version in &list.versions {
        let VersionBackends { name, buckets, draining_backends, open_connections, backends } =
            version;
        let role = if *name == list.control { " (control)" } else { "" };
        let leaving: u32 = backends.iter().map(|detail| detail.backend.draining_buckets).sum();
        table.row([
            format!("{name}{role}"),
            String::new(),
            buckets.to_string(),
            leaving.to_string(),
            open_connections.map_or_else(|| "-".to_owned(), |open| open.to_string()),
            match draining_backends {
                0 => String::new(),
                1 => "1 backend still drains".to_owned(),
                count => format!("{count} backends still drain"),
            },
        ]);
        for detail in backends {
            let backend = &detail.backend;
            table.row([
                format!("  {}", backend.addr),
                backend.weight.to_string(),
                backend.buckets.to_string(),
                backend.draining_buckets.to_string(),
                match (detail.open_connections, detail.tracked_connections) {
                    (Some(open), _) => open.to_string(),
                    (None, Some(tracked)) if tracked > 0 => format!(">={tracked}"),
                    (None, _) => "-".to_owned(),
                },
                state(detail),
                health(detail),
            ]);
        }
    }
    let mut out = table.render("");
    if list.forward == "dsr" {
        out.push_str(
            "\nOPEN: with dsr a connection has an entry only if it began in a bucket that has moved\n",
        );
    }
    out
}

fn state(detail: &BackendDetail) -> String {
    let backend = &detail.backend;
    match (&*backend.state, backend.slow_start) {
        ("removed", _) => "removed".to_owned(),
        (_, Some(part)) => format!("{}, slow start at {}", backend.admin, percent(part)),
        (_, None) => backend.admin.to_string(),
    }
}

/// What the checks say, and the host's routes; the last failure also of one that is up.
fn health(detail: &BackendDetail) -> String {
    let backend = &detail.backend;
    let last = backend.check.as_ref().and_then(|check| {
        let ago = text::age(check.last_failure_seconds?);
        Some(format!("last failure {ago} ago: {}", check.last_failure.as_ref()?))
    });
    match (&*backend.health, &backend.message) {
        ("up", _) => last.map_or_else(|| "up".to_owned(), |last| format!("up; {last}")),
        (word, Some(message)) => format!("{word}: {message}"),
        (word, None) => word.to_owned(),
    }
}

fn reported(report: &BackendReport) -> String {
    let BackendReport {
        applied,
        revision,
        service,
        backend,
        before,
        state,
        buckets_moved,
        backends_touched,
        connections_held,
        connections_per_second,
        notes,
        confirm_within_ms,
        took_us,
    } = report;
    let took = Duration::from_micros(*took_us);
    let buckets = counted(u64::from(*buckets_moved), "bucket");
    let mut out = match (applied, before == state) {
        (_, true) => format!("{service}: {backend} is as it was"),
        (true, false) => {
            format!(
                "{service}: {backend} was `{before}` and is `{state}`; {buckets} moved; in force after \
                 {took:?} (revision {revision})"
            )
        }
        (false, false) => {
            format!(
                "{service}: {backend} is `{before}` and would be `{state}`; {buckets} would move"
            )
        }
    };
    out = format!("{}\n", text::plain(&out));
    if !backends_touched.is_empty() {
        let backends = text::plain(&backends_touched.join(", "));
        out.push_str(&format!("backends touched: {backends}\n"));
    }
    let place = if state == "ready" { "in these buckets" } else { "on it" };
    out.push_str(&held(*connections_held, *connections_per_second, place));
    out.push_str(&noted(notes));
    out.push_str(&waits(*confirm_within_ms));
    if !applied {
        out.push_str("nothing was changed (--dry-run)\n");
    }
    out
}
