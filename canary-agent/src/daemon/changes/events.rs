//! The log of events: what has happened besides changes is gathered here and stored once a
//! second, so that a hundred backends that go down at once do not keep the loop from them.

use std::time::Duration;

use tokio::sync::watch;

use super::{Kernel, Moment, Refusal, State, describe, unreadable};
use crate::{
    api::model,
    config,
    daemon::split,
    store::{EventQuery, Notice, StateStore},
};

/// Events that wait to be stored. Of more in a second only the number is kept.
const WAITING: usize = 1_000;
/// Most events in an answer.
const AT_ONCE: usize = 1_000;

/// Events that are not stored yet.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Notices {
    waiting: Vec<Notice>,
    left_out: usize,
}

impl Notices {
    /// Adds one.
    pub(in crate::daemon) fn add(
        &mut self,
        now: Moment,
        kind: &str,
        service: &str,
        text: impl Into<String>,
    ) {
        if self.waiting.len() >= WAITING {
            self.left_out += 1;
            return;
        }
        self.waiting.push(Notice {
            unix_ms: now.unix_ms,
            kind: kind.to_owned(),
            service: service.to_owned(),
            text: text.into(),
        });
    }
}

/// Which events somebody asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventsAsked {
    /// Those after this number, the oldest first; without it, the newest of all.
    pub after: Option<u64>,
    /// Those since then: a time as RFC 3339 has it, or a duration until now.
    pub since: Option<String>,
    /// Those of this service, and changes of all.
    pub service: Option<String>,
    /// At most so many.
    pub limit: Option<usize>,
}

/// Events, and what tells when there are more.
#[derive(Debug)]
pub struct EventsFound {
    /// The oldest first.
    pub events: model::Events,
    /// Whether there may be more of them at once.
    pub more: bool,
    /// Changes when something has happened.
    pub news: watch::Receiver<u64>,
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Answers with what has happened.
    pub(in crate::daemon) fn events(
        &mut self,
        asked: &EventsAsked,
        now: Moment,
    ) -> Result<EventsFound, Refusal> {
        let EventsAsked { after, since, service, limit } = asked;
        if let Some(service) = service
            && self.planner.service(service).is_none()
        {
            return Err(split::unknown_service(&self.planner, service));
        }
        let limit = limit.unwrap_or(AT_ONCE).min(AT_ONCE);
        let query = EventQuery {
            after: *after,
            since_unix_ms: since.as_deref().map(|since| moment_of(since, now)).transpose()?,
            service: service.clone(),
            limit,
        };
        self.store_notices(now);
        // Before they are read: what is stored meanwhile is news.
        let news = self.store.watch();
        let events = self.store.events(&query).map_err(|error| unreadable(&error))?;
        let more = after.is_some() && events.len() == limit && limit > 0;
        let last = *news.borrow();
        let events = events.iter().map(describe::event).collect();
        Ok(EventsFound { events: model::Events { events, last }, more, news })
    }

    /// Stores what has happened since the last time.
    pub(in crate::daemon) fn store_notices(&mut self, now: Moment) {
        let Notices { waiting, left_out } = &mut self.notices;
        if waiting.is_empty() {
            return;
        }
        if *left_out > 0 {
            waiting.push(Notice {
                unix_ms: now.unix_ms,
                kind: "events".to_owned(),
                service: String::new(),
                text: format!("{left_out} more events are left out here; the log has them"),
            });
        }
        match self.store.record(waiting) {
            Ok(()) => {
                waiting.clear();
                *left_out = 0;
            }
            Err(error) => {
                tracing::debug!(%error, "events can't be stored");
                // The place of the line about those that are left out is theirs.
                waiting.truncate(WAITING);
            }
        }
    }
}

/// Since when: a time, or a duration until now.
fn moment_of(text: &str, now: Moment) -> Result<u64, Refusal> {
    let millis = |since: Duration| u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    if let Ok(ago) = config::duration(text) {
        return Ok(now.unix_ms.saturating_sub(millis(ago)));
    }
    let time = humantime::parse_rfc3339_weak(text.trim()).ok();
    let since = time.map(|time| time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default());
    since.map(millis).ok_or_else(|| Refusal {
        code: "bad_since",
        message: format!("`{text}` is neither a time nor a duration"),
        help: Some(
            "write `2h` for the last two hours, or a time in UTC such as `2026-01-31 09:00:00`"
                .to_owned(),
        ),
        exit_code: 2,
    })
}
