//! Changes and other events in words, and as answers have them.

use std::{
    collections::BTreeMap,
    time::{Duration, UNIX_EPOCH},
};

use super::Moment;
use crate::{
    api::model::{self, BackendTold},
    store::{BackendChange, Change, Event, Notice, Split},
};

/// A change in half a sentence: its number, what, by whom and when.
pub(super) fn brief(revision: u64, change: &Change, now: Moment) -> String {
    let who = change.uid.map_or_else(|| "the agent".to_owned(), |uid| format!("uid {uid}"));
    let ago = Duration::from_secs(now.unix_ms.saturating_sub(change.unix_ms) / 1000);
    let ago = humantime::format_duration(ago);
    let why = change.reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
    format!("revision {revision}, {} by {who} {ago} ago{why}", text(change))
}

/// What a change did.
pub(super) fn text(change: &Change) -> String {
    let Change { service, action, before, after, backends, freeze, about, .. } = change;
    let mut parts = Vec::new();
    match action.as_str() {
        "undo" => parts.push(format!("undo of {}", revisions(about))),
        "confirm" => parts.push(format!("confirmation of {}", revisions(about))),
        "initial" => parts.push("first state".to_owned()),
        "adopt" => parts.push("state as found in the maps".to_owned()),
        "reload" if about.is_empty() => parts.push("reload of the configuration".to_owned()),
        "reload" => parts.push(format!("{} taken back", revisions(about))),
        "split" | "backend" | "freeze" | "unfreeze" => {}
        other => parts.push(other.to_owned()),
    }
    if before != after {
        parts.push(shares(before, after));
    } else if action == "split" {
        parts.push("the same shares".to_owned());
    }
    parts.extend(backends.iter().map(|BackendChange { addr, before, after }| {
        format!("{addr} from `{}` to `{}`", before.name(), after.name())
    }));
    if let Some(freeze) = freeze {
        parts.push(if freeze.after.is_some() { "freeze" } else { "unfreeze" }.to_owned());
    }
    let of = if service.is_empty() { String::new() } else { format!("{service}: ") };
    format!("{of}{}", parts.join(", "))
}

/// `v2 5% to 10%`, of all that differ.
fn shares(before: &Split, after: &Split) -> String {
    let names: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let share = |split: &Split, name: &String| {
        split.get(name).map_or_else(|| "0%".to_owned(), ToString::to_string)
    };
    let differ = names.into_iter().filter(|name| before.get(*name) != after.get(*name));
    let each =
        differ.map(|name| format!("{name} {} to {}", share(before, name), share(after, name)));
    each.collect::<Vec<_>>().join(", ")
}

fn revisions(about: &[u64]) -> String {
    let numbers: Vec<String> = about.iter().map(ToString::to_string).collect();
    match &numbers[..] {
        [one] => format!("revision {one}"),
        _ => format!("revisions {}", numbers.join(", ")),
    }
}

/// What a backend was told.
pub(in crate::daemon) fn told(change: &BackendChange) -> BackendTold {
    BackendTold {
        backend: change.addr.to_string(),
        before: change.before.name().to_owned(),
        state: change.after.name().to_owned(),
    }
}

/// A change as answers have it.
pub(super) fn change(id: u64, revision: u64, change: &Change) -> model::Event {
    let written = |split: &Split| -> BTreeMap<String, String> {
        split.iter().map(|(name, share)| (name.clone(), share.to_string())).collect()
    };
    let about_shares = change.before != change.after || change.action == "split";
    let shares = |split: &Split| if about_shares { written(split) } else { BTreeMap::new() };
    model::Event {
        id,
        unix_ms: change.unix_ms,
        time: time(change.unix_ms),
        kind: change.action.clone(),
        service: Some(change.service.clone()).filter(|service| !service.is_empty()),
        revision: Some(revision),
        uid: change.uid,
        user: None,
        reason: change.reason.clone(),
        text: text(change),
        before: shares(&change.before),
        after: shares(&change.after),
        buckets_moved: change.buckets_moved,
        backends: change.backends.iter().map(told).collect(),
        about: change.about.clone(),
        confirm_within_ms: change.confirm_ms,
    }
}

/// An event as answers have it.
pub(super) fn event(event: &Event) -> model::Event {
    match event {
        Event::Change(id, revision, made) => change(*id, *revision, made),
        Event::Notice(id, Notice { unix_ms, kind, service, text }) => model::Event {
            id: *id,
            unix_ms: *unix_ms,
            time: time(*unix_ms),
            kind: kind.clone(),
            service: Some(service.clone()).filter(|service| !service.is_empty()),
            text: text.clone(),
            ..model::Event::default()
        },
    }
}

/// As RFC 3339 writes it, in UTC and to the millisecond.
fn time(unix_ms: u64) -> String {
    // What no calendar has is no time that a host's clock can show.
    let most = Duration::from_secs(253_402_300_799);
    let since = Duration::from_millis(unix_ms).min(most);
    humantime::format_rfc3339_millis(UNIX_EPOCH + since).to_string()
}
