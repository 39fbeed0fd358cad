//! `split`: shows or sets the shares of a service's versions.

use std::{collections::BTreeMap, time::Duration};

use super::{
    args,
    client::{Client, encoded},
    failure::{Failure, exit},
    print,
    text::{self, Align, Table, counted, maybe_percent, percent},
};
use crate::api::model::{ChangeReport, ShareChange, Split, SplitRequest};

/// Shows the split, or sets it and says what has moved.
pub(super) async fn run(client: &Client, split: args::Split, json: bool) -> Result<(), Failure> {
    let args::Split { service, assignments, terms, learn } = split;
    let target = format!("/v1/services/{}/split", encoded(&service));
    if assignments.is_empty() {
        if terms.given() {
            let message = "there is no share to set: the options are those of a change";
            return Err(Failure::new("usage", exit::USAGE, message)
                .help(format!("say which, as in `canary-agent split {service} v2=5%`")));
        }
        let answer = client.get(&target).await?;
        if json {
            return print(&format!("{}\n", answer.text()));
        }
        return print(&shown(&answer.read()?));
    }
    let mut shares = BTreeMap::new();
    for args::Assignment { version, share } in assignments {
        if shares.contains_key(&version) {
            let message = format!("`{version}` is given two shares");
            return Err(Failure::new("usage", exit::USAGE, message));
        }
        shares.insert(version, share);
    }
    let args::Terms { reason, dry_run, if_revision, confirm } = terms;
    let request = SplitRequest { split: shares, reason, dry_run, learn, if_revision, confirm };
    let answer = client.put(&target, &request).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    print(&reported(&answer.read()?))
}

fn shown(split: &Split) -> String {
    let mut table = Table::new([
        ("VERSION", Align::Left),
        ("ASKED", Align::Right),
        ("IN FORCE", Align::Right),
        ("MEASURED", Align::Right),
        ("BUCKETS", Align::Right),
    ]);
    for version in &split.versions {
        let role = if version.name == split.control { " (control)" } else { "" };
        table.row([
            format!("{}{role}", version.name),
            version.asked_text.clone(),
            percent(version.in_force),
            maybe_percent(version.measured),
            version.buckets.to_string(),
        ]);
    }
    table.render("")
}

/// What has moved, or would move.
pub(super) fn reported(report: &ChangeReport) -> String {
    let ChangeReport {
        applied,
        revision,
        service,
        versions,
        buckets_moved,
        backends_touched,
        connections_held,
        connections_per_second,
        notes,
        learned_ms,
        confirm_within_ms,
        took_us,
    } = report;
    let buckets = counted(u64::from(*buckets_moved), "bucket");
    let took = Duration::from_micros(*took_us);
    let mut out = match (applied, *buckets_moved) {
        (true, 0) => format!("{service}: no bucket has moved; in force after {took:?}"),
        (true, _) => format!("{service}: {buckets} moved; in force after {took:?}"),
        (false, 0) => format!("{service}: no bucket would move"),
        (false, _) => format!("{service}: {buckets} would move"),
    };
    if *applied {
        out.push_str(&format!(" (revision {revision})"));
    }
    out = text::plain(&out);
    out.push_str("\n\n");
    out.push_str(&shares(versions));
    out.push_str(&touched(backends_touched));
    if let (Some(ms), false) = (learned_ms, *applied) {
        let time = Duration::from_millis(*ms);
        out.push_str(&format!("they would be watched for {time:?} before\n"));
    }
    if *buckets_moved > 0 {
        out.push_str(&held(*connections_held, *connections_per_second, "in these buckets"));
    }
    out.push_str(&noted(notes));
    out.push_str(&waits(*confirm_within_ms));
    if !applied {
        out.push_str("nothing was changed (--dry-run)\n");
    }
    out
}

/// What becomes of a service's shares.
pub(super) fn shares(versions: &[ShareChange]) -> String {
    let mut table = Table::new([
        ("VERSION", Align::Left),
        ("ASKED", Align::Right),
        ("FROM", Align::Right),
        ("TO", Align::Right),
    ]);
    for ShareChange { name, asked, before, in_force } in versions {
        table.row([name.clone(), asked.clone(), percent(*before), percent(*in_force)]);
    }
    table.render("  ")
}

/// Backends that gain or lose buckets, if there are any.
pub(super) fn touched(backends: &[String]) -> String {
    match backends {
        [] => String::new(),
        some => format!("\nbackends touched: {}\n", text::plain(&some.join(", "))),
    }
}

/// That a change waits for its confirmation.
pub(super) fn waits(confirm_within_ms: Option<u64>) -> String {
    confirm_within_ms.map_or_else(String::new, |ms| {
        let time = humantime::format_duration(Duration::from_millis(ms));
        format!("it is taken back in {time} unless `canary-agent confirm` follows\n")
    })
}

/// How many connections a change is about, as far as that is known.
pub(super) fn held(open: Option<u64>, per_second: Option<f64>, place: &str) -> String {
    let mut out = String::new();
    if let Some(open) = open {
        out.push_str(&format!("about {} {place}\n", counted(open, "open connection")));
    }
    if let Some(rate) = per_second {
        out.push_str(&format!("{rate:.1} new connections a second in the buckets that move\n"));
    }
    out
}

/// What else there is to know, each a line.
pub(super) fn noted(notes: &[String]) -> String {
    notes.iter().map(|note| format!("note: {}\n", text::plain(note))).collect()
}
