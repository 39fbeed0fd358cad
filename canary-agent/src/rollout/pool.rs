//! Windows, put together until they say something of both versions.
//!
//! A window's share is that of its connections, and a bad event may be seen up to a minute after
//! its connection has begun. Where a version has a connection now and then, most of its events
//! would fall into windows in which it has none, and be lost: the canary would look better than
//! it is. When a window is over depends on connections alone, never on events, so that no risk of
//! the gate's is another.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{gate::Name, watch::Counted};
use crate::config::model::SignalKind;

/// So many connections each version has in a window.
pub const ENOUGH: u64 = 10;

/// A window that is not over yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    watched_ms: u64,
    /// Of control and of the canary.
    connections: [u64; 2],
    events: Vec<(Name, [u64; 2])>,
}

impl Pool {
    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.watched_ms == 0 && self.connections == [0, 0] && self.events.is_empty()
    }

    /// Whether there is a bad event of a signal in it.
    pub fn has_events(&self, of: SignalKind) -> bool {
        self.events.iter().any(|(kind, events)| kind.0 == of && *events != [0, 0])
    }

    /// Takes a window in. Gives back all that is in it once that is enough, and a window in which
    /// something was missed at once.
    pub fn add(&mut self, counted: &Counted) -> Option<Counted> {
        if !counted.complete {
            return Some(counted.clone());
        }
        let add = |to: &mut [u64; 2], more: [u64; 2]| {
            for (to, more) in to.iter_mut().zip(more) {
                *to = to.saturating_add(more);
            }
        };
        let watched_ms = u64::try_from(counted.watched.as_millis()).unwrap_or(u64::MAX);
        self.watched_ms = self.watched_ms.saturating_add(watched_ms);
        add(&mut self.connections, counted.connections);
        for (kind, events) in &counted.events {
            match self.events.iter_mut().find(|(Name(known), _)| known == kind) {
                Some((_, known)) => add(known, *events),
                None => self.events.push((Name(*kind), *events)),
            }
        }
        if self.connections.iter().any(|connections| *connections < ENOUGH) {
            return None;
        }
        let Self { watched_ms, connections, events } = std::mem::take(self);
        Some(Counted {
            watched: Duration::from_millis(watched_ms),
            connections,
            events: events.into_iter().map(|(Name(kind), events)| (kind, events)).collect(),
            ..counted.clone()
        })
    }
}
