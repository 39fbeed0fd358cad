//! Events: one answer, or an answer that goes on.
//!
//! Owns how a follower is served: he is told in order and without gaps, and costs the loop
//! nothing while nothing happens. Must not know of what events mean.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use futures::{StreamExt, stream};
use nix::unistd::{Uid, User};
use tokio::time::timeout;

use super::{
    Api,
    error::ApiError,
    extract::{EndOfService, Query},
    model::{Event, Events},
    openapi::ServiceErrors,
};
use crate::daemon::{EventsAsked, EventsFound};

/// After this time without an event a follower gets an empty line, so that one who has gone is
/// noticed.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Between two questions of a follower, whatever happens meanwhile.
const PACE: Duration = Duration::from_millis(50);
/// How long the host's users may take to be looked up.
const LOOK_UP: Duration = Duration::from_millis(500);
/// Most names that are kept.
const NAMES: usize = 4_096;

/// Names of users, once looked up. Only what was found is kept.
#[derive(Debug, Default)]
pub(super) struct Users(Mutex<HashMap<u32, String>>);

impl Users {
    /// Puts names to the uids of `events`, as far as this host knows them.
    pub(super) async fn name(self: &Arc<Self>, events: &mut [Event]) {
        let unknown: Vec<u32> = {
            let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let mut uids: Vec<u32> = events.iter().filter_map(|event| event.uid).collect();
            uids.sort_unstable();
            uids.dedup();
            uids.retain(|uid| !names.contains_key(uid));
            uids
        };
        if !unknown.is_empty() {
            let users = Arc::clone(self);
            // A directory service may take its time; the answer does not wait for it.
            let looked_up = tokio::task::spawn_blocking(move || {
                for uid in unknown {
                    if let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) {
                        let mut names = users.0.lock().unwrap_or_else(PoisonError::into_inner);
                        if names.len() < NAMES {
                            names.insert(uid, user.name);
                        }
                    }
                }
            });
            let _ = timeout(LOOK_UP, looked_up).await;
        }
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            event.user = event.uid.and_then(|uid| names.get(&uid).cloned());
        }
    }
}

/// What has happened: changes, and what else there was to see.
///
/// With `follow=true` the answer goes on: an event a line (`application/x-ndjson`), as they
/// happen, and an empty line now and then.
#[utoipa::path(get, path = "/v1/events", tag = "reading",
    params(
        ("service" = Option<String>, Query, description = "Only those of this service, and changes of all."),
        ("since" = Option<String>, Query,
            description = "Only those since then: a time in UTC as RFC 3339 has it, or a duration until now, `2h`."),
        ("after" = Option<u64>, Query,
            description = "Those after the event of this number, the oldest first. Without it, the newest of all."),
        ("limit" = Option<usize>, Query, description = "At most so many; 1,000 at most, and if left out."),
        ("follow" = Option<bool>, Query, description = "Go on with what happens.")),
    responses(
        (status = 200, description = "The oldest first.", body = Events),
        ServiceErrors))]
pub(super) async fn events(
    State(api): State<Api>,
    mut query: Query,
    closing: EndOfService,
) -> Result<Response, ApiError> {
    let follow = number(&mut query, "follow", "`true` or `false`")?.unwrap_or(false);
    let asked = EventsAsked {
        after: number(&mut query, "after", "the number of an event")?,
        since: query.take("since"),
        service: query.take("service"),
        limit: number(&mut query, "limit", "a number of events")?,
    };
    query.finish(&["after", "follow", "limit", "service", "since"])?;
    let mut found = api.handle.events(asked.clone()).await?;
    api.users.name(&mut found.events.events).await;
    if follow {
        return Ok(followed(api, asked, found, closing));
    }
    Ok(Json(found.events).into_response())
}

fn number<T: std::str::FromStr>(
    query: &mut Query,
    key: &str,
    what: &str,
) -> Result<Option<T>, ApiError> {
    let parse = |text: String| {
        text.parse().map_err(|_| {
            ApiError::bad_request("bad_query", format!("`{key}` should be {what}, not `{text}`"))
        })
    };
    query.take(key).map(parse).transpose()
}

/// Where a follower is.
struct Follower {
    api: Api,
    asked: EventsAsked,
    found: EventsFound,
    closing: EndOfService,
    first: bool,
}

/// The answer that goes on.
fn followed(api: Api, asked: EventsAsked, found: EventsFound, closing: EndOfService) -> Response {
    let follower = Follower { api, asked, found, closing, first: true };
    let lines = stream::unfold(follower, |mut follower| async move {
        if follower.first {
            follower.first = false;
        } else {
            follower.next().await?;
        }
        let lines = lines(&follower.found.events.events);
        Some((lines, follower))
    });
    let body = Body::from_stream(lines.map(Ok::<Bytes, std::convert::Infallible>));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// An event a line; an empty one for none.
fn lines(events: &[Event]) -> Bytes {
    let mut lines = Vec::new();
    for event in events {
        // It has a JSON form: its map-like parts have names for keys.
        lines.extend(serde_json::to_vec(event).unwrap_or_default());
        lines.push(b'\n');
    }
    if lines.is_empty() {
        lines.push(b'\n');
    }
    lines.into()
}

impl Follower {
    /// Waits for what has happened since, or for a heartbeat. `None` at the end.
    async fn next(&mut self) -> Option<()> {
        let Events { events, last } = &self.found.events;
        let seen = match events.last() {
            Some(event) if self.found.more => event.id,
            _ => *last,
        };
        if !self.found.more {
            let news = self.found.news.wait_for(|last| *last != seen);
            let waited = tokio::select! {
                waited = timeout(HEARTBEAT, news) => waited,
                () = self.closing.ended() => return None,
            };
            match waited {
                Ok(Ok(_)) => {}
                // The loop has ended.
                Ok(Err(_)) => return None,
                Err(_) => {
                    self.found.events.events.clear();
                    return Some(());
                }
            }
        }
        tokio::time::sleep(PACE).await;
        let last = *self.found.news.borrow();
        // Another file has taken the place of the one that the numbers are from.
        let after = if last < seen { 0 } else { seen };
        let asked =
            EventsAsked { after: Some(after), since: None, limit: None, ..self.asked.clone() };
        self.found = self.api.handle.events(asked).await.ok()?;
        self.api.users.name(&mut self.found.events.events).await;
        Some(())
    }
}
