//! The answer to `status`, and the measured shares in it.

use std::collections::VecDeque;

use canary_ebpf_common::{
    abi::{ABI_VERSION, BackendCounters, FlowCounters, Reason, VersionSignals},
    entry::BackendIndex,
};

use super::{
    Kernel, Moment, State,
    changes::{Control, freeze_status},
    explain::protocol_name,
    listing::Listing,
    signals::{Known, ServiceSignals},
    split,
    tally::ByBackend,
};
use crate::{
    api::model::{
        FlowStatus, HandshakeBucket, InterfaceStatus, MapStatus, PendingStatus, ReasonCount,
        ServiceStatus, SignalCount, SignalsStatus, Status, VersionSignalsStatus, VersionStatus,
    },
    config::model::{SignalKind, Stickiness},
    datapath::Swept,
    health::Reports,
    plan::{BootMs, Planner, ServiceState, Table},
    signals::histogram,
    store::StateStore,
};

/// Measured shares are those of the last ten seconds.
const WINDOW_MS: u64 = 10_000;

/// New connections by backend at one moment.
#[derive(Debug)]
struct Sample {
    at_ms: BootMs,
    connections: ByBackend<u64>,
}

/// What measured shares are computed from.
#[derive(Debug, Default)]
pub(super) struct Samples {
    ring: VecDeque<Sample>,
}

impl Samples {
    /// Whether it is time for another sample of `backends` counters: once a second for
    /// a few hundred, less often for more, so that an idle agent stays idle.
    pub(super) fn due(&self, backends: usize, now_ms: BootMs) -> bool {
        let interval = (backends as u64 * 1_000 / 512).clamp(1_000, WINDOW_MS);
        // A tick that comes a little early is still this one.
        self.ring.back().is_none_or(|last| now_ms >= last.at_ms + interval - 100)
    }

    /// Keeps `counters`, and forgets what is older than the window.
    pub(super) fn push(
        &mut self,
        now_ms: BootMs,
        counters: impl Iterator<Item = (BackendIndex, BackendCounters)>,
    ) {
        while self.ring.len() > 1
            && self.ring.get(1).is_some_and(|second| second.at_ms + WINDOW_MS <= now_ms)
        {
            self.ring.pop_front();
        }
        let connections = counters.map(|(index, c)| (index, c.connections)).collect();
        self.ring.push_back(Sample { at_ms: now_ms, connections });
    }

    /// New connections of a backend a second, given its counter now; `None` before there is
    /// a second to go by.
    pub(super) fn per_second(&self, index: BackendIndex, now: u64, now_ms: BootMs) -> Option<f64> {
        let window_ms = now_ms.saturating_sub(self.ring.front()?.at_ms);
        (window_ms >= 1_000).then(|| self.since(index, now) as f64 * 1000.0 / window_ms as f64)
    }

    /// New connections of a backend since the window began, given its counter now.
    fn since(&self, index: BackendIndex, now: u64) -> u64 {
        let then = self.ring.front().and_then(|first| first.connections.get(index));
        now.saturating_sub(then.copied().unwrap_or(if self.ring.is_empty() { now } else { 0 }))
    }
}

/// What a status is made from besides the plan.
pub(super) struct Sources<'a> {
    pub(super) counters: ByBackend<BackendCounters>,
    pub(super) samples: &'a Samples,
    pub(super) checks: &'a Reports,
    pub(super) flows: (FlowCounters, Swept),
    pub(super) signals: Known,
    pub(super) reasons: Vec<u64>,
    pub(super) maps: Vec<MapStatus>,
    pub(super) interfaces: &'a [InterfaceStatus],
    pub(super) control: &'a Control,
    pub(super) pending: Vec<PendingStatus>,
    pub(super) alerts: Vec<String>,
    pub(super) revision: u64,
    pub(super) uptime_ms: u64,
    pub(super) now_ms: BootMs,
}

/// The whole status.
pub(super) fn status(planner: &Planner, sources: Sources<'_>) -> Status {
    let services = planner.services().iter().map(|state| service_status(state, &sources)).collect();
    let Sources {
        counters: _,
        samples: _,
        checks,
        flows,
        signals,
        reasons,
        maps,
        interfaces,
        control,
        pending,
        mut alerts,
        revision,
        uptime_ms,
        now_ms: _,
    } = sources;
    alerts.extend(signals.alerts);
    planner.services().iter().for_each(|state| service_alerts(state, &mut alerts));
    if let Some(errno) = checks.trouble() {
        alerts.push(format!(
            "this host can't check its backends, which stay as they are: {}",
            errno.desc()
        ));
    }
    let mut status = Status {
        interfaces: interfaces.to_vec(),
        services,
        reasons: Reason::ALL
            .iter()
            .zip(reasons)
            .map(|(reason, packets)| ReasonCount {
                reason: reason.name().to_owned(),
                verdict: reason.verdict().name().to_owned(),
                packets,
            })
            .collect(),
        maps,
        flows: flow_status(flows),
        alerts,
        pending,
        ..Status::default()
    };
    status.agent.frozen = control.freeze_of("").map(freeze_status);
    status.agent.version = env!("CARGO_PKG_VERSION").to_owned();
    status.agent.abi_version = ABI_VERSION;
    status.agent.pid = std::process::id();
    status.agent.uptime_seconds = uptime_ms as f64 / 1000.0;
    status.agent.revision = revision;
    status
}

fn counter(sources: &Sources<'_>, index: BackendIndex) -> BackendCounters {
    sources.counters.get(index).copied().unwrap_or_default()
}

fn flow_status((counters, swept): (FlowCounters, Swept)) -> FlowStatus {
    let FlowCounters { stored, let_go, taken_over, untracked } = counters;
    FlowStatus { stored, let_go, taken_over, untracked, half_open: swept.half_open }
}

fn service_status(state: &ServiceState, sources: &Sources<'_>) -> ServiceStatus {
    let config = state.config();
    let checks = sources.checks.of_service(&config.name);
    let listed = Listing::new(state, &sources.counters, &checks, sources.now_ms);
    let signals = sources.signals.services.iter().find(|one| one.service == config.name);
    let owned = state.ownership().counts();
    let new_connections: Vec<(u8, u64)> = (0_u8..)
        .zip(state.slots())
        .map(|(slot, _)| {
            let of_slot = state.tables().iter().flat_map(|t| t.indices_of(slot));
            let new = of_slot.map(|i| sources.samples.since(i, counter(sources, i).connections));
            (slot, new.sum())
        })
        .collect();
    let all_new: u64 = new_connections.iter().map(|(_, n)| n).sum();
    let control = &config.versions[config.control];
    let others = config.versions.iter().filter(|v| v.name != control.name);
    let versions = std::iter::once(control).chain(others).map(|version| {
        let slot = state.slot(&version.name);
        let buckets = slot.map_or(0, |slot| owned[usize::from(slot)]);
        let new = slot.map_or(0, |slot| new_connections[usize::from(slot)].1);
        let indices =
            state.tables().iter().flat_map(|t| slot.into_iter().flat_map(|s| t.indices_of(s)));
        VersionStatus {
            name: version.name.clone(),
            asked: split::asked_fraction(state, state.ownership(), &version.name),
            asked_text: split::asked_text(state, state.ownership(), &version.name),
            in_force: f64::from(buckets) / f64::from(config.buckets),
            buckets,
            connections: indices.map(|i| counter(sources, i).connections).sum(),
            measured: (all_new > 0).then(|| new as f64 / all_new as f64),
            signals: signals.and_then(|signals| version_signals(signals, &version.name)),
            backends: listed.configured(version, slot).map(|(status, _)| status).collect(),
        }
    });
    // What follows another is where that one is.
    let followed = config.derived.as_ref().filter(|of| of.follows).map(|of| &of.service);
    ServiceStatus {
        name: config.name.clone(),
        vips: config.vips.iter().map(ToString::to_string).collect(),
        ports: config
            .ports
            .iter()
            .map(|p| format!("{}/{}", protocol_name(p.protocol), p.port))
            .collect(),
        forward: config.forward.name().to_owned(),
        stickiness: match config.stickiness {
            Stickiness::Connection => "connection",
            Stickiness::Client => "client",
            Stickiness::Subnet { .. } => "subnet",
        }
        .to_owned(),
        control: control.name.clone(),
        buckets: config.buckets,
        tracked_buckets: state.tables().iter().map(Table::tracked).sum(),
        signals: signals.map(|signals| SignalsStatus {
            slow_over_seconds: signals.slow_over.map(|slow| slow.as_secs_f64()),
            incomplete_windows: signals.incomplete_windows,
        }),
        versions: versions.collect(),
        frozen: sources.control.freeze_of(&config.name).map(freeze_status),
        panic: sources.control.panicked.get(followed.unwrap_or(&config.name)).cloned(),
    }
}

/// What the watched connections of a version have done.
fn version_signals(signals: &ServiceSignals, version: &str) -> Option<VersionSignalsStatus> {
    let known = signals.versions.iter().find(|known| known.version == version)?;
    let VersionSignals { watched, outcomes, full, lost, handshakes, handshake_ns } =
        &known.counters;
    let quantile =
        |permille| histogram::quantile(handshakes, permille).map(|time| time.as_secs_f64());
    Some(VersionSignalsStatus {
        one_in: known.halvings.map(|halvings| 1 << halvings),
        watched: *watched,
        signals: SignalKind::ALL
            .iter()
            .zip(outcomes)
            .map(|(kind, connections)| SignalCount {
                signal: kind.name().to_owned(),
                connections: *connections,
            })
            .collect(),
        not_watched: *full,
        lost: *lost,
        handshake_p50_seconds: quantile(500),
        handshake_p95_seconds: quantile(950),
        handshake_p99_seconds: quantile(990),
        handshake_sum_seconds: *handshake_ns as f64 / 1e9,
        handshakes: histogram::classic(handshakes)
            .into_iter()
            .map(|(upto_seconds, handshakes)| HandshakeBucket {
                upto_seconds: (upto_seconds != f64::MAX).then_some(upto_seconds),
                handshakes,
            })
            .collect(),
    })
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// The status at `now`.
    pub fn status(&self, now: Moment) -> Status {
        let rollouts = self.rollout_statuses();
        let status = status(
            &self.planner,
            Sources {
                counters: self.counters(),
                samples: &self.samples,
                checks: &self.checks,
                flows: self.kernel.flows(),
                signals: self.kernel.signals(),
                reasons: self.kernel.reasons(),
                maps: self.kernel.maps(),
                interfaces: &self.interfaces,
                control: &self.control,
                pending: self.pending_status(now),
                alerts: self.alerts.values().flatten().cloned().collect(),
                revision: self.revision,
                uptime_ms: now.boot_ms.saturating_sub(self.begun_ms),
                now_ms: now.boot_ms,
            },
        );
        Status { rollouts, audiences: self.audience_summaries(), ..status }
    }

    pub(super) fn counters(&self) -> ByBackend<BackendCounters> {
        let indices: Vec<_> = self.planner.plane().backends.iter().map(|(i, _)| *i).collect();
        let counters = self.kernel.counters(&indices);
        indices.into_iter().zip(counters).collect()
    }
}

/// What an operator should know about a service.
fn service_alerts(state: &ServiceState, alerts: &mut Vec<String>) {
    let config = state.config();
    let name = &config.name;
    for table in state.tables() {
        let family = match table.family() {
            crate::plan::Family::V4 => "IPv4",
            crate::plan::Family::V6 => "IPv6",
        };
        if table.control_taken_out() {
            alerts.push(format!(
                "service `{name}`: every {family} backend of control `{}` is in `drain` or `maint`; new \
                 connections get nothing",
                config.versions[config.control].name
            ));
        }
        if table.control_checks_ignored() {
            alerts.push(format!(
                "service `{name}`: no {family} backend of control `{}` is usable; all of them are tried",
                config.versions[config.control].name
            ));
        }
        for version in &config.versions {
            let slot = state.slot(&version.name).filter(|slot| *slot != state.control());
            if slot.is_some_and(|slot| table.fell_back(slot)) {
                let then = match config.fallback {
                    crate::config::model::Fallback::Control => "control takes its clients",
                    crate::config::model::Fallback::None => "its clients get nothing",
                };
                alerts.push(format!(
                    "service `{name}`: version `{}` has no usable {family} backend; {then}",
                    version.name
                ));
            }
        }
    }
    for version in config.versions.iter().filter(|v| state.slot(&v.name).is_none()) {
        alerts.push(format!(
            "service `{name}`: version `{}` has to wait until versions that were removed have drained, and a restart",
            version.name
        ));
    }
}
