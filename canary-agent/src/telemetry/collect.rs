//! A status as metrics.
//!
//! Labels have the words of the contract: `service`, `version`, `backend`, `reason`.

use super::page::{Histogram, Labels, Page, Whole};
use crate::{
    api::{
        model::{
            AudienceSummary, BackendStatus, FlowStatus, ServiceStatus, SignalsStatus, Status,
            VersionStatus,
        },
        rollout::RolloutStatus,
    },
    config::derived,
};

/// The states of a rollout, as its status names them.
const ROLLOUT_STATES: [&str; 7] =
    ["idle", "entering", "watching", "paused", "held", "completed", "aborted"];

/// A family's samples, each with its labels.
type Samples<T> = Vec<(Labels, T)>;

/// Writes all that a status counts.
pub(super) fn collect(page: &mut Page, status: &Status) {
    // Labels of what there is most of are written down once, not for each family.
    let of_services: Samples<_> =
        status.services.iter().map(|service| (of_service(&service.name), service)).collect();
    let of_versions = versions(&of_services);
    agent(page, status);
    services(page, &of_services, &of_versions);
    backends(page, &rows(&of_versions));
    page.counter(
        "canary_packets",
        "Packets on attached interfaces by what was decided and why",
        status.reasons.iter().map(|reason| {
            let labels = Labels::one("verdict", &reason.verdict).with("reason", &reason.reason);
            (labels, reason.packets)
        }),
    );
    signals(page, &of_services, &of_versions);
    maps(page, status);
    flows(page, status);
    audiences(page, &status.audiences);
    rollouts(page, &status.rollouts);
}

fn agent(page: &mut Page, status: &Status) {
    let agent = &status.agent;
    page.gauge(
        "canary_build_info",
        "Always 1; the labels say what is running",
        [(
            Labels::one("version", &agent.version).with("abi", &agent.abi_version.to_string()),
            1_u32,
        )],
    );
    page.number("canary_uptime_seconds", "Seconds since the agent started", agent.uptime_seconds);
    page.number(
        "canary_revision",
        "Number of the last change to the live state",
        agent.revision as f64,
    );
    page.number(
        "canary_alerts",
        "Things an operator should know; status has the sentences",
        status.alerts.len() as f64,
    );
    page.gauge(
        "canary_interface_attached",
        "1 if the program is attached to the interface, in which mode",
        status.interfaces.iter().map(|interface| {
            let mode = interface.mode.as_deref().unwrap_or_default();
            let labels = Labels::one("interface", &interface.name).with("mode", mode);
            (labels, u32::from(interface.mode.is_some()))
        }),
    );
}

fn services(
    page: &mut Page,
    services: &Samples<&ServiceStatus>,
    versions: &Samples<&VersionStatus>,
) {
    let of_service = |value| each::<_, u32>(services, value);
    let of_version = |value| each::<_, f64>(versions, value);
    page.gauge(
        "canary_service_buckets",
        "Buckets of the service",
        of_service(|service| Some(service.buckets)),
    );
    page.gauge(
        "canary_service_tracked_buckets",
        "Buckets whose connections are looked up after a move",
        of_service(|service| Some(service.tracked_buckets)),
    );
    page.gauge(
        "canary_version_share_asked_ratio",
        "Share that was asked for the version",
        of_version(|version| Some(version.asked)),
    );
    page.gauge(
        "canary_version_share_in_force_ratio",
        "Share of the service's buckets that the version owns",
        of_version(|version| Some(version.in_force)),
    );
    page.gauge(
        "canary_version_share_measured_ratio",
        "Share of the service's new connections over the last seconds; absent without any",
        of_version(|version| version.measured),
    );
    page.gauge(
        "canary_version_buckets",
        "Buckets that the version owns",
        of_version(|version| Some(version.buckets.into())),
    );
    page.counter(
        "canary_version_connections",
        "New connections of the version",
        each(versions, |version| Some(version.connections)),
    );
}

/// What is counted of a backend, side by side: each family goes through all of them, and in a status
/// they lie far apart.
#[derive(Debug)]
struct Row {
    packets: u64,
    bytes: u64,
    no_port: u64,
    connections: u64,
    failures: Option<u64>,
    latency_seconds: Option<f64>,
    check_up: Option<bool>,
    up: bool,
    taken_out: bool,
    weight: u32,
    buckets: u32,
    draining_buckets: u32,
}

impl From<&BackendStatus> for Row {
    fn from(backend: &BackendStatus) -> Self {
        let check = backend.check.as_ref();
        Self {
            packets: backend.packets,
            bytes: backend.bytes,
            no_port: backend.no_port,
            connections: backend.connections,
            failures: check.map(|check| check.failures),
            latency_seconds: check.and_then(|check| check.latency_seconds),
            check_up: check.map(|check| check.up),
            up: backend.health == "up",
            taken_out: backend.admin != "ready",
            weight: backend.weight,
            buckets: backend.buckets,
            draining_buckets: backend.draining_buckets,
        }
    }
}

fn backends(page: &mut Page, backends: &Samples<Row>) {
    let counts = |value| each::<_, u64>(backends, value);
    let wholes = |value: fn(&Row) -> Option<u32>| {
        each(backends, value).map(|(labels, value)| (labels, Whole(value)))
    };
    page.counter(
        "canary_backend_packets",
        "Packets sent to the backend",
        counts(|backend| Some(backend.packets)),
    );
    page.counter(
        "canary_backend_bytes",
        "Bytes of those packets",
        counts(|backend| Some(backend.bytes)),
    );
    page.counter(
        "canary_backend_no_port",
        "Packets of new connections that were refused because no source port was left towards the backend",
        counts(|backend| Some(backend.no_port)),
    );
    page.counter(
        "canary_backend_connections",
        "New connections steered to the backend",
        counts(|backend| Some(backend.connections)),
    );
    page.counter(
        "canary_backend_check_failures",
        "Health checks that the backend has failed since the agent started",
        counts(|backend| backend.failures),
    );
    page.gauge(
        "canary_backend_check_up",
        "1 if the backend passes its health checks, whether or not it can be reached otherwise",
        wholes(|backend| backend.check_up.map(u32::from)),
    );
    page.gauge(
        "canary_backend_check_duration_seconds",
        "How long the backend's last health check took that passed",
        each(backends, |backend| backend.latency_seconds),
    );
    page.gauge(
        "canary_backend_up",
        "1 if the backend passes its checks and can be reached",
        wholes(|backend| Some(backend.up.into())),
    );
    page.gauge(
        "canary_backend_weight",
        "Weight of the backend inside its version",
        wholes(|backend| Some(backend.weight)),
    );
    page.gauge(
        "canary_backend_buckets",
        "Buckets that steer new connections to the backend",
        wholes(|backend| Some(backend.buckets)),
    );
    page.gauge(
        "canary_backend_draining_buckets",
        "Buckets that steer new connections elsewhere and leave the older ones with the backend",
        wholes(|backend| Some(backend.draining_buckets)),
    );
    page.gauge(
        "canary_backend_taken_out",
        "1 if an operator has told the backend to drain or to take nothing",
        wholes(|backend| Some(backend.taken_out.into())),
    );
}

fn signals(
    page: &mut Page,
    services: &Samples<&ServiceStatus>,
    versions: &Samples<&VersionStatus>,
) {
    let known = || {
        versions.iter().filter_map(|(labels, version)| Some((labels, version.signals.as_ref()?)))
    };
    page.counter(
        "canary_signal_watched_connections",
        "Connections of the version that were watched, and of which it is known how they began",
        known().map(|(labels, signals)| (labels, signals.watched)),
    );
    page.counter(
        "canary_signal_connections",
        "Watched connections with a bad outcome, by signal",
        known().flat_map(|(labels, signals)| {
            let each = signals.signals.iter();
            each.map(|one| (labels.with("signal", &one.signal), one.connections))
        }),
    );
    page.counter(
        "canary_signal_missed",
        "What was missed of connections that were to be watched: no room for the connection, or for its outcome",
        known().flat_map(|(labels, signals)| {
            [("connections", signals.not_watched), ("outcomes", signals.lost)]
                .map(|(of, count)| (labels.with("missed", of), count))
        }),
    );
    page.gauge(
        "canary_signal_watched_ratio",
        "Part of the version's connections that is watched",
        known().map(|(labels, signals)| {
            (labels, signals.one_in.map_or(0.0, |one_in| 1.0 / f64::from(one_in)))
        }),
    );
    let signals: Samples<&SignalsStatus> = services
        .iter()
        .filter_map(|(labels, service)| Some((labels.clone(), service.signals.as_ref()?)))
        .collect();
    page.gauge(
        "canary_signal_slow_handshake_threshold_seconds",
        "A handshake of the service that takes longer is slow; absent until that is known",
        each(&signals, |signals| signals.slow_over_seconds),
    );
    page.gauge(
        "canary_signal_incomplete_windows",
        "Windows of the service in which not every event was counted, since the agent started",
        each(&signals, |signals| Some(signals.incomplete_windows as f64)),
    );
    page.histogram(
        "canary_handshake_seconds",
        "Handshakes of watched connections by time, from the SYN to the SYN-ACK where both \
         directions are seen, else to the client's first ACK",
        known().map(|(labels, signals)| {
            let each = signals.handshakes.iter();
            let buckets = each.map(|bucket| (bucket.upto_seconds, bucket.handshakes)).collect();
            (labels.clone(), Histogram { sum: signals.handshake_sum_seconds, buckets })
        }),
    );
}

fn maps(page: &mut Page, status: &Status) {
    let of_map = |name: &str| Labels::one("map", name);
    page.gauge(
        "canary_map_capacity_entries",
        "Elements that the map can hold",
        status.maps.iter().map(|map| (of_map(&map.name), map.capacity as f64)),
    );
    page.gauge(
        "canary_map_used_entries",
        "Elements in use, where that is known",
        status.maps.iter().filter_map(|map| Some((of_map(&map.name), map.used? as f64))),
    );
    page.gauge(
        "canary_map_memory_bytes",
        "Kernel memory of the map",
        status.maps.iter().map(|map| (of_map(&map.name), map.memory_bytes as f64)),
    );
}

fn flows(page: &mut Page, status: &Status) {
    let FlowStatus { stored, let_go, taken_over, untracked, half_open } = &status.flows;
    page.counter("canary_flow_inserts", "Flow entries that were stored", [("", *stored)]);
    let reason = |why: &str| Labels::one("reason", why);
    page.counter(
        "canary_flow_evictions",
        "Translated connections, half-open or closed, that made room in a full table or gave their source port to a new one",
        [(reason("table_full"), *let_go), (reason("port"), *taken_over)],
    );
    page.counter(
        "canary_flow_untracked",
        "New connections of moved buckets that went where older ones go because the flow table was full, in packets",
        [("", *untracked)],
    );
    let family = |family: &str| Labels::one("family", family);
    page.gauge(
        "canary_flow_half_open_entries",
        "Flow entries of half-open connections",
        [(family("4"), half_open[0] as f64), (family("6"), half_open[1] as f64)],
    );
}

/// How far rollouts are, and what their gates have seen.
fn rollouts(page: &mut Page, rollouts: &[RolloutStatus]) {
    fn labels(one: &RolloutStatus) -> Labels {
        let RolloutStatus { name, service, to, .. } = one;
        Labels::one("service", service).with("version", to).with("rollout", name)
    }
    page.gauge(
        "canary_rollout_state",
        "1 for the state that the rollout is in",
        rollouts.iter().flat_map(|one| {
            ROLLOUT_STATES
                .iter()
                .map(|state| (labels(one).with("state", state), u32::from(one.state == *state)))
        }),
    );
    let begun = || rollouts.iter().filter(|one| one.run.is_some());
    page.gauge(
        "canary_rollout_step",
        "The step that the rollout is at, from 1",
        begun().filter_map(|one| Some((labels(one), one.step?))),
    );
    page.gauge(
        "canary_rollout_needs_operator",
        "1 if the rollout goes no further before an operator has said something",
        begun().map(|one| (labels(one), u32::from(one.needs_operator))),
    );
    let gates = || rollouts.iter().filter_map(|one| Some((labels(one), one.gate.as_ref()?)));
    let with = |labels: &Labels, more: &[(&str, &str)]| {
        more.iter().fold(labels.clone(), |labels, (name, value)| labels.with(name, value))
    };
    page.gauge(
        "canary_gate_evidence",
        "Natural logarithm of a signal's evidence, that the canary is worse (fail) or good (pass)",
        gates().flat_map(|(labels, gate)| {
            let each = gate.signals.iter().flat_map(|signal| {
                [("fail", signal.ln_fail), ("pass", signal.ln_pass)].map(|(side, value)| {
                    let more = [("gate", &*gate.name), ("signal", &*signal.name), ("side", side)];
                    (with(&labels, &more), value)
                })
            });
            each.collect::<Samples<f64>>()
        }),
    );
    page.gauge(
        "canary_gate_threshold",
        "What the evidence must reach to fail, or pass",
        gates().flat_map(|(labels, gate)| {
            [("fail", gate.ln_fail_at), ("pass", gate.ln_pass_at)].map(|(side, value)| {
                (with(&labels, &[("gate", &gate.name), ("side", side)]), value)
            })
        }),
    );
    page.gauge(
        "canary_gate_events",
        "Bad events that the gate has counted in this step, of the canary and of control",
        gates().flat_map(|(labels, gate)| {
            let each = gate.signals.iter().flat_map(|signal| {
                let sides = [("canary", signal.canary_events), ("control", signal.control_events)];
                sides.map(|(side, value)| {
                    let more = [("gate", &*gate.name), ("signal", &*signal.name), ("side", side)];
                    (with(&labels, &more), value as f64)
                })
            });
            each.collect::<Samples<f64>>()
        }),
    );
    page.gauge(
        "canary_gate_answers",
        "Answers in this step of those whom the gate asks: good, bad, none",
        gates().flat_map(|(labels, gate)| {
            let each = gate.probes.iter().flat_map(|probe| {
                let kinds = [("good", probe.good), ("bad", probe.bad), ("none", probe.unanswered)];
                kinds.map(|(kind, value)| {
                    let more = [
                        ("gate", &*gate.name),
                        ("kind", &*probe.kind),
                        ("asked", &*probe.asked),
                        ("answer", kind),
                    ];
                    (with(&labels, &more), value as f64)
                })
            });
            each.collect::<Samples<f64>>()
        }),
    );
}

fn audiences(page: &mut Page, audiences: &[AudienceSummary]) {
    let of = |one: &AudienceSummary| Labels::one("audience", &one.name);
    let each = |value: fn(&AudienceSummary) -> usize| -> Samples<f64> {
        audiences.iter().map(|one| (of(one), value(one) as f64)).collect()
    };
    page.gauge(
        "canary_audience_networks",
        "Networks of the audience by configuration",
        each(|one| one.networks),
    );
    let dynamic = || audiences.iter().filter(|one| one.room > 0);
    let members = |value: fn(&AudienceSummary) -> usize| -> Samples<f64> {
        dynamic().map(|one| (of(one), value(one) as f64)).collect()
    };
    page.gauge(
        "canary_audience_members",
        "Members of the audience with a lifetime",
        members(|one| one.members),
    );
    page.gauge(
        "canary_audience_members_max",
        "Members that the audience may have",
        members(|one| one.room),
    );
    page.counter(
        "canary_audience_member_changes",
        "What has become of members since the agent began",
        dynamic().flat_map(|one| {
            let AudienceSummary { added, renewed, removed, expired, .. } = *one;
            let each = [
                ("added", added),
                ("renewed", renewed),
                ("removed", removed),
                ("expired", expired),
            ];
            each.map(|(change, count)| (of(one).with("change", change), count))
        }),
    );
    page.counter(
        "canary_audience_refused_requests",
        "Requests to change members that were refused since the agent began",
        dynamic().map(|one| (of(one), one.refused)),
    );
}

/// One value of each, where there is one.
fn each<T, N>(all: &Samples<T>, value: fn(&T) -> Option<N>) -> impl Iterator<Item = (&Labels, N)> {
    all.iter().filter_map(move |(labels, one)| Some((labels, value(one)?)))
}

/// The labels of a service, or of what an audience has of one.
fn of_service(name: &str) -> Labels {
    match derived::parts(name) {
        None => Labels::one("service", name),
        Some((service, audience)) => Labels::one("service", service).with("audience", audience),
    }
}

/// Every version.
fn versions<'a>(services: &Samples<&'a ServiceStatus>) -> Samples<&'a VersionStatus> {
    let mut all = Vec::new();
    for (labels, service) in services {
        let versions = service.versions.iter();
        all.extend(versions.map(|version| (labels.with("version", &version.name), version)));
    }
    all
}

/// Every backend.
fn rows(versions: &Samples<&VersionStatus>) -> Samples<Row> {
    let mut all = Vec::new();
    for (labels, version) in versions {
        let backends = version.backends.iter();
        all.extend(backends.map(|backend| {
            (labels.with("backend", &backend.addr.to_string()), Row::from(backend))
        }));
    }
    all
}
