//! What is said of backends, in `status` and in `backend list`.

use std::{collections::HashMap, net::SocketAddr};

use canary_ebpf_common::{abi::BackendCounters, entry::BackendIndex};

use super::tally::ByBackend;
use crate::{
    api::model::{BackendDetail, BackendStatus, Backends, CheckStatus, VersionBackends},
    config::model::{Backend, Version},
    datapath::Census,
    health::Report,
    plan::{BackendState, BootMs, LiveBackend, Removed, SLOW_START_STEPS, ServiceState, Table},
    store::Admin,
};

/// What is said of a service's backends is made from.
pub(super) struct Listing<'a> {
    state: &'a ServiceState,
    counters: &'a ByBackend<BackendCounters>,
    checks: &'a HashMap<SocketAddr, Report>,
    /// By table, how many buckets each backend has left and still has connections of.
    leaving: Vec<HashMap<BackendIndex, u32>>,
    now_ms: BootMs,
}

/// A row, and the records that it is about: one in each table that can name the backend.
type Row = (BackendStatus, Vec<BackendIndex>);

impl<'a> Listing<'a> {
    pub(super) fn new(
        state: &'a ServiceState,
        counters: &'a ByBackend<BackendCounters>,
        checks: &'a HashMap<SocketAddr, Report>,
        now_ms: BootMs,
    ) -> Self {
        let leaving = state.tables().iter().map(|table| match table.tracked() {
            0 => HashMap::new(),
            _ => table.leaving(),
        });
        Self { state, counters, checks, leaving: leaving.collect(), now_ms }
    }

    /// The backends of a version that are configured, in that order.
    pub(super) fn configured(
        &self,
        version: &'a Version,
        slot: Option<u8>,
    ) -> impl Iterator<Item = Row> {
        version.backends.iter().map(move |backend| self.one(backend, slot))
    }

    /// Those that are configured no more and are remembered.
    fn removed(&self, slot: Option<u8>) -> impl Iterator<Item = Row> {
        let tables = self.state.tables().iter().enumerate();
        tables
            .flat_map(|(at, table)| table.removed().map(move |gone| (at, gone)))
            .filter(move |(_, gone)| Some(gone.slot) == slot)
            .map(|(at, gone)| (self.gone(at, gone), vec![gone.index]))
    }

    fn one(&self, backend: &Backend, slot: Option<u8>) -> Row {
        let of_table = |(at, table): (usize, &'a Table)| {
            let mut backends = table.backends().iter();
            let live = backends.find(|b| Some(b.slot) == slot && b.addr == backend.addr)?;
            Some((at, table, live))
        };
        let found: Vec<_> = self.state.tables().iter().enumerate().filter_map(of_table).collect();
        let report = self.checks.get(&backend.addr);
        let waiting = BackendStatus {
            addr: backend.addr,
            weight: backend.weight,
            state: "waiting".into(),
            health: "unknown".into(),
            message: Some("its version waits for a free slot".to_owned()),
            buckets: 0,
            packets: 0,
            bytes: 0,
            connections: 0,
            no_port: 0,
            check: report.map(check_status),
            admin: Admin::Ready.name().into(),
            slow_start: None,
            draining_buckets: 0,
        };
        let Some((_, _, live)) = found.first().copied() else {
            return (waiting, Vec::new());
        };
        let (health, message) = health(live, report);
        let word = if live.admin == Admin::Ready { health } else { live.admin.name() };
        let duration_ms = self.state.config().slow_start.as_millis() as u64;
        let status = BackendStatus {
            state: word.into(),
            health: health.into(),
            message,
            buckets: found.iter().map(|(_, table, live)| table.buckets_of(live.index)).sum(),
            admin: live.admin.name().into(),
            slow_start: live.slow_start.since_ms().map(|_| {
                let step = live.slow_start.step(duration_ms, self.now_ms);
                f64::from(step) / f64::from(SLOW_START_STEPS)
            }),
            draining_buckets: found
                .iter()
                .map(|(at, _, live)| self.draining(*at, live.index))
                .sum(),
            ..waiting
        };
        let indices: Vec<_> = found.iter().map(|(_, _, live)| live.index).collect();
        (indices.iter().fold(status, |status, index| self.counted(status, *index)), indices)
    }

    fn gone(&self, at: usize, gone: Removed) -> BackendStatus {
        let status = BackendStatus {
            addr: gone.addr,
            weight: 0,
            state: "removed".into(),
            health: "unknown".into(),
            message: Some("it is not configured any more, and drains".to_owned()),
            buckets: self.state.tables()[at].buckets_of(gone.index),
            packets: 0,
            bytes: 0,
            connections: 0,
            no_port: 0,
            check: None,
            admin: Admin::Ready.name().into(),
            slow_start: None,
            draining_buckets: self.draining(at, gone.index),
        };
        self.counted(status, gone.index)
    }

    fn counted(&self, status: BackendStatus, index: BackendIndex) -> BackendStatus {
        let BackendCounters { packets, bytes, connections, no_port, .. } =
            self.counters.get(index).copied().unwrap_or_default();
        BackendStatus {
            packets: status.packets + packets,
            bytes: status.bytes + bytes,
            connections: status.connections + connections,
            no_port: status.no_port + no_port,
            ..status
        }
    }

    fn draining(&self, at: usize, index: BackendIndex) -> u32 {
        self.leaving[at].get(&index).copied().unwrap_or(0)
    }

    /// All of it, with the record of each row.
    pub(super) fn backends(&self, revision: u64) -> (Backends, Vec<Vec<Vec<BackendIndex>>>) {
        let config = self.state.config();
        let control = &config.versions[config.control];
        let owned = self.state.ownership().counts();
        let others = config.versions.iter().filter(|v| v.name != control.name);
        let mut indices = Vec::new();
        let versions = std::iter::once(control).chain(others).map(|version| {
            let slot = self.state.slot(&version.name);
            let rows: Vec<Row> = self.configured(version, slot).chain(self.removed(slot)).collect();
            indices.push(rows.iter().map(|(_, indices)| indices.clone()).collect());
            let details = rows.into_iter().map(|(backend, _)| BackendDetail {
                backend,
                open_connections: None,
                tracked_connections: None,
            });
            VersionBackends {
                name: version.name.clone(),
                buckets: slot.map_or(0, |slot| owned[usize::from(slot)]),
                draining_backends: 0,
                open_connections: None,
                backends: details.collect(),
            }
        });
        let mut list = Backends {
            service: config.name.clone(),
            forward: config.forward.name().to_owned(),
            control: control.name.clone(),
            revision,
            versions: versions.collect(),
        };
        list.versions.iter_mut().for_each(count_draining);
        (list, indices)
    }
}

/// Puts in what was counted: with `nat` all connections, else those that have an entry.
pub(super) fn fill(
    list: &mut Backends,
    indices: &[Vec<Vec<BackendIndex>>],
    census: &Census,
    nat: bool,
) {
    for (version, indices) in list.versions.iter_mut().zip(indices) {
        for (detail, indices) in version.backends.iter_mut().zip(indices) {
            let of = |index| census.by_backend.get(index).copied().unwrap_or(0);
            let count = (!indices.is_empty()).then(|| indices.iter().map(of).sum());
            match nat {
                true => detail.open_connections = count,
                false => detail.tracked_connections = count,
            }
        }
        if nat {
            let open = version.backends.iter().filter_map(|detail| detail.open_connections);
            version.open_connections = Some(open.sum());
        }
        count_draining(version);
    }
}

/// Counts the backends that take no new connections and may still have open ones: by what was
/// counted, else by the buckets that they have left.
fn count_draining(version: &mut VersionBackends) {
    let drains = |detail: &&BackendDetail| {
        let BackendStatus { admin, state, draining_buckets, .. } = &detail.backend;
        let taken_out = state == "removed" || admin == Admin::Drain.name();
        taken_out && detail.open_connections.map_or(*draining_buckets > 0, |open| open > 0)
    };
    version.draining_backends = version.backends.iter().filter(drains).count() as u32;
}

/// The word for what a backend is apart from operators, and why it is not up.
fn health(live: &LiveBackend, report: Option<&Report>) -> (&'static str, Option<String>) {
    match live.state() {
        BackendState::Up => ("up", None),
        BackendState::Down => ("down", Some(why_down(report))),
        BackendState::NoNextHop => {
            ("no-next-hop", live.why_unreachable().or_else(|| live.hop.clone().err()))
        }
    }
}

fn why_down(report: Option<&Report>) -> String {
    match report.and_then(|report| report.last_failure.as_ref()) {
        Some((failure, _)) => format!("it fails its checks: {failure}"),
        None => "it failed its checks before the agent started, and is checked again".to_owned(),
    }
}

fn check_status(report: &Report) -> CheckStatus {
    let Report { down, since, passes, failures, last_failure, latency } = report;
    CheckStatus {
        up: !down,
        passes: *passes,
        failures: *failures,
        since_seconds: since.elapsed().as_secs_f64(),
        latency_seconds: latency.map(|latency| latency.as_secs_f64()),
        last_failure: last_failure.as_ref().map(|(failure, _)| failure.to_string()),
        last_failure_seconds: last_failure.as_ref().map(|(_, at)| at.elapsed().as_secs_f64()),
    }
}
