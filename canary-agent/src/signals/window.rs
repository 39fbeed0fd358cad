//! Windows: what the watched connections of a service have done in a while, one event for each
//! client and signal.
//!
//! Counters say how many connections there were to do anything; the ring buffer says whose were
//! bad. A client that fails thirty times in a window is one event: a gate takes events for
//! independent of each other.

use std::{collections::HashSet, time::Duration};

use canary_ebpf_common::abi::{Address, SignalEvent, VersionSignals, outcome};

use crate::{config::model::SignalKind, rollout::watch::Counted};

/// What a version's watched connections have done in a window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VersionWindow {
    /// Its name.
    pub version: String,
    /// Connections of which it has become known how they began.
    pub watched: u64,
    /// Clients with a bad outcome, in the order of [`SignalKind::ALL`].
    pub events: [u64; outcome::COUNT],
}

/// A window of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceWindow {
    /// The service.
    pub service: String,
    /// How long it was.
    pub length: Duration,
    /// Whether every event was counted, and the whole time watched.
    pub complete: bool,
    /// What a handshake had to take to be slow, nanoseconds, all the time; `u64::MAX` where
    /// nobody has said it.
    pub slow_ns: u64,
    /// Its versions that were watched.
    pub versions: Vec<VersionWindow>,
}

impl ServiceWindow {
    /// What a rollout takes that compares `canary` with the `control` of `others`, which is this
    /// window or another of the same length.
    pub fn compare(&self, others: &Self, control: &str, canary: &str) -> Counted {
        let of = |window: &Self, name: &str| {
            let its = window.versions.iter().find(|version| version.version == name);
            its.map_or((0, [0; outcome::COUNT]), |its| (its.watched, its.events))
        };
        let both = [of(others, control), of(self, canary)];
        let events = SignalKind::ALL.into_iter().enumerate();
        Counted {
            service: self.service.clone(),
            canary: canary.to_owned(),
            watched: self.length,
            // What was slow to one was so to the other.
            complete: self.complete && others.complete && self.slow_ns == others.slow_ns,
            slow_ns: self.slow_ns,
            connections: both.map(|(watched, _)| watched),
            events: events.map(|(at, kind)| (kind, both.map(|(_, events)| events[at]))).collect(),
        }
    }
}

/// Whoever counts as one: an IPv4 address, or an IPv6 network of 64 bits, which one client has all
/// of to choose its addresses from (RFC 8981).
pub fn client(address: Address, v6: bool) -> Address {
    if v6 { [address[0], 0] } else { address }
}

/// The bad outcomes of a version in the window that is under way.
#[derive(Debug, Default)]
pub struct Events {
    seen: HashSet<(usize, Address)>,
    counts: [u64; outcome::COUNT],
}

impl Events {
    /// Takes an event into account.
    pub fn add(&mut self, event: &SignalEvent, v6: bool) {
        let client = client(event.client, v6);
        for (at, count) in self.counts.iter_mut().enumerate() {
            if event.outcomes & 1 << at != 0 && self.seen.insert((at, client)) {
                *count += 1;
            }
        }
    }

    /// Ends the window.
    pub fn take(&mut self) -> [u64; outcome::COUNT] {
        self.seen.clear();
        std::mem::take(&mut self.counts)
    }
}

/// What is between two readings of a version's counters: connections, and whether none was missed.
pub fn between(before: &VersionSignals, after: &VersionSignals) -> (u64, bool) {
    let watched = after.watched.saturating_sub(before.watched);
    (watched, before.full == after.full && before.lost == after.lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(client: Address, outcomes: u32) -> SignalEvent {
        SignalEvent { at_ns: 1, client, outcomes, place: 0 }
    }

    #[test]
    fn the_bits_are_in_the_order_of_the_signals() {
        for (at, kind) in SignalKind::ALL.into_iter().enumerate() {
            let bit = match kind {
                SignalKind::ConnectFailed => outcome::CONNECT_FAILED,
                SignalKind::SynRetransmit => outcome::SYN_RETRANSMIT,
                SignalKind::SlowHandshake => outcome::SLOW_HANDSHAKE,
                SignalKind::ServerReset => outcome::SERVER_RESET,
                SignalKind::ClientReset => outcome::CLIENT_RESET,
                SignalKind::ShortFlow => outcome::SHORT_FLOW,
            };
            assert_eq!(bit, 1 << at, "{}", kind.name());
        }
    }

    #[test]
    fn a_client_is_one_event_in_a_window_and_another_in_the_next() {
        let mut events = Events::default();
        for _ in 0..30 {
            events.add(&event([1, 0], outcome::CONNECT_FAILED | outcome::SYN_RETRANSMIT), false);
        }
        events.add(&event([2, 0], outcome::CONNECT_FAILED), false);
        assert_eq!(events.take(), [2, 1, 0, 0, 0, 0]);
        events.add(&event([1, 0], outcome::CONNECT_FAILED), false);
        assert_eq!(events.take(), [1, 0, 0, 0, 0, 0]);
        assert_eq!(events.take(), [0; 6]);
    }

    #[test]
    fn an_ipv6_network_of_64_bits_is_one_client() {
        let mut events = Events::default();
        events.add(&event([7, 1], outcome::SERVER_RESET), true);
        events.add(&event([7, 2], outcome::SERVER_RESET), true);
        events.add(&event([8, 1], outcome::SERVER_RESET), true);
        assert_eq!(events.take()[3], 2);
    }

    #[test]
    fn counts_are_of_the_two_versions_that_are_compared() {
        let version = |name: &str, watched, failed| VersionWindow {
            version: name.to_owned(),
            watched,
            events: [failed, 0, 0, 0, 0, 0],
        };
        let window = ServiceWindow {
            versions: vec![version("stable", 75, 1), version("v2", 25, 3), version("v3", 900, 9)],
            ..ServiceWindow::default()
        };
        let counted = window.compare(&window, "stable", "v2");
        assert_eq!(counted.connections, [75, 25]);
        assert_eq!(counted.events[0], (SignalKind::ConnectFailed, [1, 3]));
        assert_eq!(window.compare(&window, "stable", "gone").connections, [75, 0]);
        assert_eq!(window.compare(&window, "nobody", "gone").connections, [0, 0]);
        // Control of others, where what was slow was so to both.
        let window = ServiceWindow { complete: true, slow_ns: 9, ..window };
        let others = ServiceWindow { versions: vec![version("stable", 900, 4)], ..window.clone() };
        let both = window.compare(&others, "stable", "v2");
        assert_eq!((both.connections, both.complete), ([900, 25], true));
        assert_eq!(both.events[0], (SignalKind::ConnectFailed, [4, 3]));
        let slower = ServiceWindow { slow_ns: 8, ..others };
        assert!(!window.compare(&slower, "stable", "v2").complete);
    }

    #[test]
    fn what_was_missed_makes_a_window_incomplete() {
        let before = VersionSignals::default();
        let after = VersionSignals { watched: 5, ..before };
        assert_eq!(between(&before, &after), (5, true));
        assert_eq!(between(&before, &VersionSignals { lost: 1, ..after }), (5, false));
        assert_eq!(between(&before, &VersionSignals { full: 1, ..after }), (5, false));
    }
}
