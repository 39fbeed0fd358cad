//! What runs out under load, flow entries and source ports, and what to set then.

use std::{collections::HashMap, net::SocketAddr};

use canary_ebpf_common::{
    abi::{BackendCounters, FlowCounters, Reason},
    entry::BackendIndex,
};

use super::tally::ByBackend;
use crate::{api::model::MapStatus, datapath::Swept, plan::BootMs};

/// For so long after it happened last something is said.
const SAY_MS: u64 = 60_000;

/// What is read at one moment.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) reasons: Vec<u64>,
    pub(super) flows: FlowCounters,
    pub(super) swept: Swept,
    pub(super) maps: Vec<MapStatus>,
    pub(super) backends: ByBackend<BackendCounters>,
}

/// A counter that should stand still: since when it has not, and how far it went.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    /// Its value when it stood still last.
    still: u64,
    last: u64,
    moved_ms: Option<BootMs>,
}

impl Watched {
    /// Takes its value now. Returns how far it has moved, if that is worth saying.
    fn see(&mut self, value: u64, first: bool, now_ms: BootMs) -> Option<u64> {
        // What was counted before the agent began is not news, and a new backend begins at 0.
        if first || value < self.last {
            *self = Self { still: value, last: value, moved_ms: None };
        } else if value > self.last {
            self.last = value;
            self.moved_ms = Some(now_ms);
        } else if self.moved_ms.is_some_and(|moved| now_ms > moved + SAY_MS) {
            (self.still, self.moved_ms) = (value, None);
        }
        self.moved_ms.map(|_| self.last - self.still)
    }
}

/// What has run out lately.
#[derive(Debug, Default)]
pub(super) struct Pressure {
    begun: bool,
    refused: Watched,
    untracked: Watched,
    let_go: Watched,
    no_port: HashMap<BackendIndex, Watched>,
}

impl Pressure {
    /// Takes a reading, and returns what an operator should know. `addr` names a backend.
    pub(super) fn see(
        &mut self,
        reading: &Reading,
        addr: impl Fn(BackendIndex) -> Option<(String, SocketAddr)>,
        now_ms: BootMs,
    ) -> Vec<String> {
        let first = !std::mem::replace(&mut self.begun, true);
        let mut alerts = Vec::new();
        for (name, family, half_open) in [
            ("FLOWS_V4", "IPv4", reading.swept.half_open[0]),
            ("FLOWS_V6", "IPv6", reading.swept.half_open[1]),
        ] {
            let Some(map) = reading.maps.iter().find(|map| map.name == name) else { continue };
            let used = map.used.unwrap_or(0);
            if used * 4 >= map.capacity * 3 {
                alerts.push(format!(
                    "the {family} flow table is nearly full: {used} of {} entries are in use, {half_open} of \
                     them by connections that are half-open; raise `agent.capacity.flows`",
                    map.capacity
                ));
            }
        }
        let full = Reason::ALL.iter().position(|reason| *reason == Reason::DropFlowTableFull);
        let refused = full.and_then(|at| reading.reasons.get(at)).copied().unwrap_or(0);
        if let Some(count) = self.refused.see(refused, first, now_ms) {
            alerts.push(format!(
                "the flow table is full: {count} packets of new connections to translated services were \
                 refused; raise `agent.capacity.flows`"
            ));
        }
        if let Some(count) = self.let_go.see(reading.flows.let_go, first, now_ms) {
            alerts.push(format!(
                "the flow table is full: {count} half-open or closed translated connections were let go for new ones; \
                 raise `agent.capacity.flows`, unless it is a SYN flood"
            ));
        }
        if let Some(count) = self.untracked.see(reading.flows.untracked, first, now_ms) {
            alerts.push(format!(
                "the flow table is full: {count} packets of new connections of moved buckets went where the \
                 older ones go; raise `agent.capacity.flows`"
            ));
        }
        let mut no_port: Vec<_> = Vec::new();
        for (index, counters) in reading.backends.iter() {
            let watched = self.no_port.entry(index).or_default();
            if let Some(count) = watched.see(counters.no_port, first, now_ms)
                && let Some((service, addr)) = addr(index)
            {
                no_port.push((service, addr, count));
            }
        }
        self.no_port.retain(|index, _| reading.backends.get(*index).is_some());
        no_port.sort_unstable();
        alerts.extend(no_port.into_iter().map(|(service, addr, count)| {
            format!(
                "service `{service}`: no source port was left towards backend {addr} for {count} packets of new \
                 connections; give the service more addresses in `nat_source`, or widen `agent.nat_ports`"
            )
        }));
        alerts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(refused: u64, no_port: u64, used: u64) -> Reading {
        let mut reasons = vec![0; Reason::ALL.len()];
        reasons[Reason::DropFlowTableFull as usize] = refused;
        let counters = BackendCounters { no_port, ..BackendCounters::default() };
        Reading {
            reasons,
            maps: vec![MapStatus {
                name: "FLOWS_V4".to_owned(),
                capacity: 1000,
                used: Some(used),
                memory_bytes: 0,
            }],
            backends: [(BackendIndex::new(3), counters)].into_iter().collect(),
            ..Reading::default()
        }
    }

    #[test]
    fn what_runs_out_is_said_for_a_minute_with_what_to_set() {
        let mut pressure = Pressure::default();
        let addr = |_| Some(("shop".to_owned(), "10.0.0.1:80".parse().unwrap()));
        let mut at = |now_ms, refused, no_port, used| {
            pressure.see(&reading(refused, no_port, used), addr, now_ms)
        };
        assert_eq!(at(1_000, 7, 5, 10), Vec::<String>::new(), "counted before the agent began");
        let alerts = at(2_000, 9, 6, 750);
        assert_eq!(alerts.len(), 3, "{alerts:?}");
        assert!(alerts[0].contains("750 of 1000") && alerts[0].contains("agent.capacity.flows"));
        assert!(alerts[1].contains("2 packets") && alerts[1].contains("agent.capacity.flows"));
        assert!(alerts[2].contains("10.0.0.1:80") && alerts[2].contains("nat_source"));
        assert_eq!(at(50_000, 9, 6, 10).len(), 2);
        assert_eq!(at(62_001, 9, 6, 10), Vec::<String>::new());
        assert!(at(63_000, 10, 6, 10)[0].contains("1 packets"));
    }
}
