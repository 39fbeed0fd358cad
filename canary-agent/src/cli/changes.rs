//! `undo`, `confirm`, `freeze` and `unfreeze`.

use std::time::Duration;

use super::{
    args::{self, Terms},
    client::Client,
    failure::Failure,
    print,
    split::{held, noted, shares, touched, waits},
    text::{self, counted},
};
use crate::api::model::{
    BackendTold, ConfirmReport, ConfirmRequest, Event, FreezeReport, FreezeRequest, ServiceUndo,
    UndoReport, UndoRequest,
};

/// Said where nothing was asked for but what would be.
pub(super) const DRY_RUN: &str = "nothing was changed (--dry-run)\n";

/// Takes changes back, and says what became of it.
pub(super) async fn undo(client: &Client, undo: args::Undo, json: bool) -> Result<(), Failure> {
    let args::Undo { service, to, force, terms } = undo;
    let Terms { reason, dry_run, if_revision, confirm } = terms;
    let request = UndoRequest { service, to, reason, dry_run, force, if_revision, confirm };
    let answer = client.post("/v1/undo", &request).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    print(&undone(&answer.read()?))
}

/// Keeps a change.
pub(super) async fn confirm(
    client: &Client,
    confirm: args::Confirm,
    json: bool,
) -> Result<(), Failure> {
    let args::Confirm { revision, reason, dry_run, if_revision } = confirm;
    let request = ConfirmRequest { revision, reason, dry_run, if_revision };
    let answer = client.post("/v1/confirm", &request).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    let ConfirmReport { applied, revision, confirmed } = answer.read()?;
    let mut out = String::new();
    for change in &confirmed {
        let stays = if applied { "stays" } else { "would stay" };
        out.push_str(&format!("{stays}: {}\n", named(change)));
    }
    out.push_str(&match applied {
        true => format!("confirmed (revision {revision})\n"),
        false => DRY_RUN.to_owned(),
    });
    print(&out)
}

/// Freezes, or ends that.
pub(super) async fn freeze(
    client: &Client,
    freeze: args::Freeze,
    freezes: bool,
    json: bool,
) -> Result<(), Failure> {
    let args::Freeze { service, terms } = freeze;
    let Terms { reason, dry_run, if_revision, confirm } = terms;
    let request = FreezeRequest { service, reason, dry_run, if_revision, confirm };
    let route = if freezes { "/v1/freeze" } else { "/v1/unfreeze" };
    let answer = client.post(route, &request).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    let FreezeReport { applied, revision, service, before, frozen, notes, confirm_within_ms } =
        answer.read()?;
    let what = service.map_or_else(|| "all services".to_owned(), |name| format!("service {name}"));
    let would = if applied { "" } else { "would be " };
    let mut line = match (&frozen, &before) {
        (Some(reason), _) => {
            format!("{what}: {would}frozen, only shares may be lowered: {reason}")
        }
        (None, Some(reason)) => format!("{what}: {would}not frozen any more (it was: {reason})"),
        (None, None) => format!("{what}: not frozen"),
    };
    if applied {
        line.push_str(&format!(" (revision {revision})"));
    }
    let mut out = format!("{}\n{}", text::plain(&line), noted(&notes));
    out.push_str(&waits(confirm_within_ms));
    if !applied {
        out.push_str(DRY_RUN);
    }
    print(&out)
}

fn undone(report: &UndoReport) -> String {
    let UndoReport {
        applied,
        revision,
        undone,
        services,
        buckets_moved,
        backends_touched,
        connections_held,
        notes,
        confirm_within_ms,
        took_us,
    } = report;
    let mut out = String::new();
    for change in undone {
        let taken = if *applied { "taken back" } else { "would be taken back" };
        out.push_str(&format!("{taken}: {}\n", named(change)));
    }
    let buckets = counted(u64::from(*buckets_moved), "bucket");
    out.push_str(&match applied {
        true => format!(
            "{buckets} moved; in force after {:?} (revision {revision})\n",
            Duration::from_micros(*took_us)
        ),
        false => format!("{buckets} would move\n"),
    });
    for ServiceUndo { service, versions, buckets_moved: _, backends } in services {
        out.push_str(&format!("\n{}\n{}", text::plain(service), shares(versions)));
        for BackendTold { backend, before, state } in backends {
            let line = format!("  {backend}: `{before}`, then `{state}`");
            out.push_str(&format!("{}\n", text::plain(&line)));
        }
    }
    out.push_str(&touched(backends_touched));
    out.push_str(&held(*connections_held, None, "in these buckets"));
    out.push_str(&noted(notes));
    out.push_str(&waits(*confirm_within_ms));
    if !applied {
        out.push_str(DRY_RUN);
    }
    out
}

/// A change in a line: its number, what, by whom and when.
fn named(change: &Event) -> String {
    let Event { revision, text, uid, user, time, reason, .. } = change;
    let who = match (user, uid) {
        (Some(user), _) => user.clone(),
        (None, Some(uid)) => format!("uid {uid}"),
        (None, None) => "the agent".to_owned(),
    };
    let why = reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
    let number = revision.unwrap_or_default();
    text::plain(&format!("revision {number}, {text}, by {who} at {time}{why}"))
}
