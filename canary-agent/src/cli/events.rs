//! `events`: who has changed what, when and why, and what else has happened.

use tokio::signal::unix::{SignalKind, signal};

use super::{
    args,
    client::{Client, encoded},
    failure::{Failure, exit},
    print, text,
};
use crate::api::model::{Event, Events};

/// So many are shown if nobody says how many.
const SHOWN: usize = 100;
/// So many are shown before those that follow.
const BEFORE: usize = 10;
/// So many are asked for at once.
const AT_ONCE: usize = 1_000;

/// Shows events, and goes on if asked to.
pub(super) async fn run(client: &Client, asked: args::Events, json: bool) -> Result<(), Failure> {
    let args::Events { follow, service, since, limit } = asked;
    let mut target = "/v1/events?".to_owned();
    if let Some(service) = &service {
        target.push_str(&format!("service={}&", encoded(service)));
    }
    if follow {
        let limit = if since.is_some() { AT_ONCE } else { limit.unwrap_or(BEFORE) };
        if let Some(since) = &since {
            target.push_str(&format!("since={}&", encoded(since)));
        }
        target.push_str(&format!("limit={limit}&follow=true"));
        return followed(client, &target, json).await;
    }
    let Some(since) = since else {
        target.push_str(&format!("limit={}", limit.unwrap_or(SHOWN)));
        let answer = client.get(&target).await?;
        if json {
            return print(&format!("{}\n", answer.text()));
        }
        return print(&shown(&answer.read::<Events>()?.events));
    };
    // All of them, a page after the other.
    target.push_str(&format!("since={}&limit={AT_ONCE}", encoded(&since)));
    let mut all = Events::default();
    loop {
        let after = all.events.last().map_or(0, |event| event.id);
        let Events { events, last } =
            client.get(&format!("{target}&after={after}")).await?.read()?;
        let full = events.len() == AT_ONCE;
        all.last = last;
        if !json {
            print(&shown(&events))?;
        }
        all.events.extend(events);
        if !full {
            break;
        }
        if !json {
            // Only the last is still needed.
            all.events.drain(..all.events.len() - 1);
        }
    }
    if !json {
        return Ok(());
    }
    let line = serde_json::to_string(&all)
        .map_err(|error| Failure::new("failed", exit::FAILED, error.to_string()))?;
    print(&format!("{line}\n"))
}

/// Shows events as they happen, until SIGINT, SIGTERM or the agent's end.
async fn followed(client: &Client, target: &str, json: bool) -> Result<(), Failure> {
    let listen = |kind| {
        signal(kind).map_err(|error| {
            Failure::new("failed", exit::FAILED, format!("can't listen for signals: {error}"))
        })
    };
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let show = |line: &str| {
        if line.is_empty() {
            return Ok(());
        }
        if json {
            return print(&format!("{line}\n"));
        }
        let event: Event = serde_json::from_str(line).map_err(|error| {
            let message = format!("the agent's answer can't be read: {error}");
            Failure::new("bad_answer", exit::FAILED, message)
        })?;
        print(&shown(&[event]))
    };
    tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        ended = client.lines(target, show) => ended,
    }
}

/// An event a line.
fn shown(events: &[Event]) -> String {
    events.iter().map(|event| format!("{}\n", text::plain(&line(event)))).collect()
}

fn line(event: &Event) -> String {
    let Event { time, kind, revision, uid, user, reason, text, buckets_moved, .. } = event;
    let mut line = time.clone();
    if let Some(revision) = revision {
        let who = match (user, uid) {
            (Some(user), _) => user.clone(),
            (None, Some(uid)) => format!("uid {uid}"),
            (None, None) => "agent".to_owned(),
        };
        line.push_str(&format!("  revision {revision}  {who}"));
    }
    line.push_str(&format!("  {kind}  {text}"));
    if *buckets_moved > 0 {
        line.push_str(&format!(", {} moved", text::counted(u64::from(*buckets_moved), "bucket")));
    }
    if let Some(reason) = reason {
        line.push_str(&format!(" ({reason})"));
    }
    line
}
