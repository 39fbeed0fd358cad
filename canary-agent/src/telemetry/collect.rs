//! A status as metrics.
//!
//! Labels have the words of the contract: `service`, `version`, `backend`, `reason`.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeGaugeValue, EncodeLabel, EncodeLabelSet, EncodeMetric,
        LabelSetEncoder, NoLabelSet,
    },
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

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

/// A status on its way to the page.
#[derive(Debug)]
pub(super) struct StatusCollector(pub(super) Arc<Status>);

/// A family's samples, each with its labels.
type Samples<T> = Vec<(Labels, T)>;

/// A sample's labels in the order they are written.
type Labels = Vec<(&'static str, String)>;

/// The labels of what there is most of. Each sample of a large page with strings of its own took
/// longer than all the rest.
#[derive(Clone, Copy, Debug, Default)]
struct Of<'a> {
    service: &'a str,
    /// Of what an audience has of a service.
    audience: Option<&'a str>,
    version: Option<&'a str>,
    backend: Option<&'a str>,
}

impl<'a> Of<'a> {
    fn service(name: &'a str) -> Self {
        match derived::parts(name) {
            None => Self { service: name, ..Self::default() },
            Some((service, audience)) => {
                Self { service, audience: Some(audience), ..Self::default() }
            }
        }
    }

    fn labels(&self) -> impl Iterator<Item = (&'static str, &'a str)> {
        let Self { service, audience, version, backend } = *self;
        let all = [
            ("service", Some(service)),
            ("audience", audience),
            ("version", version),
            ("backend", backend),
        ];
        all.into_iter().filter_map(|(label, value)| Some((label, value?)))
    }

    /// As labels that others can follow.
    fn to_labels(self) -> Labels {
        self.labels().map(|(label, value)| (label, value.to_owned())).collect()
    }
}

impl EncodeLabelSet for Of<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.labels().try_for_each(|label| label.encode(encoder.encode_label()))
    }
}

impl Collector for StatusCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let status = &*self.0;
        let page = &mut encoder;
        agent(page, status)?;
        services(page, &status.services)?;
        backends(page, &of_backends(&status.services))?;
        counter(
            page,
            "canary_packets",
            "Packets on attached interfaces by what was decided and why",
            status.reasons.iter().map(|reason| {
                let labels =
                    vec![("verdict", reason.verdict.clone()), ("reason", reason.reason.clone())];
                (labels, reason.packets)
            }),
        )?;
        signals(page, &status.services)?;
        maps(page, status)?;
        flows(page, status)?;
        audiences(page, &status.audiences)?;
        rollouts(page, &status.rollouts)
    }
}

fn agent(page: &mut DescriptorEncoder, status: &Status) -> fmt::Result {
    let agent = &status.agent;
    gauge(
        page,
        "canary_build_info",
        "Always 1; the labels say what is running",
        [(vec![("version", agent.version.clone()), ("abi", agent.abi_version.to_string())], 1_u32)],
    )?;
    number(page, "canary_uptime_seconds", "Seconds since the agent started", agent.uptime_seconds)?;
    number(
        page,
        "canary_revision",
        "Number of the last change to the live state",
        agent.revision as f64,
    )?;
    number(
        page,
        "canary_alerts",
        "Things an operator should know; status has the sentences",
        status.alerts.len() as f64,
    )?;
    gauge(
        page,
        "canary_interface_attached",
        "1 if the program is attached to the interface, in which mode",
        status.interfaces.iter().map(|interface| {
            let labels = vec![
                ("interface", interface.name.clone()),
                ("mode", interface.mode.clone().unwrap_or_default()),
            ];
            (labels, u32::from(interface.mode.is_some()))
        }),
    )
}

fn services(page: &mut DescriptorEncoder, services: &[ServiceStatus]) -> fmt::Result {
    let of_service = |value: fn(&ServiceStatus) -> u32| {
        services.iter().map(move |service| (Of::service(&service.name), value(service)))
    };
    let of_version = |value: fn(&VersionStatus) -> Option<f64>| {
        versions(services).filter_map(move |(of, version)| Some((of, value(version)?)))
    };
    gauge(
        page,
        "canary_service_buckets",
        "Buckets of the service",
        of_service(|service| service.buckets),
    )?;
    gauge(
        page,
        "canary_service_tracked_buckets",
        "Buckets whose connections are looked up after a move",
        of_service(|service| service.tracked_buckets),
    )?;
    gauge(
        page,
        "canary_version_share_asked_ratio",
        "Share that was asked for the version",
        of_version(|version| Some(version.asked)),
    )?;
    gauge(
        page,
        "canary_version_share_in_force_ratio",
        "Share of the service's buckets that the version owns",
        of_version(|version| Some(version.in_force)),
    )?;
    gauge(
        page,
        "canary_version_share_measured_ratio",
        "Share of the service's new connections over the last seconds; absent without any",
        of_version(|version| version.measured),
    )?;
    gauge(
        page,
        "canary_version_buckets",
        "Buckets that the version owns",
        of_version(|version| Some(version.buckets.into())),
    )?;
    counter(
        page,
        "canary_version_connections",
        "New connections of the version",
        versions(services).map(|(of, version)| (of, version.connections)),
    )
}

/// Every backend with its labels, but for its address, and that as text.
fn of_backends(services: &[ServiceStatus]) -> Vec<(Of<'_>, String, &BackendStatus)> {
    versions(services)
        .flat_map(|(of, version)| {
            version.backends.iter().map(move |backend| (of, backend.addr.to_string(), backend))
        })
        .collect()
}

/// One value of each backend, where there is one.
fn each_backend<'a, T>(
    backends: &'a [(Of<'a>, String, &'a BackendStatus)],
    value: fn(&BackendStatus) -> Option<T>,
) -> impl Iterator<Item = (Of<'a>, T)> {
    backends.iter().filter_map(move |(of, addr, backend)| {
        Some((Of { backend: Some(addr), ..*of }, value(backend)?))
    })
}

fn backends(
    page: &mut DescriptorEncoder,
    backends: &[(Of<'_>, String, &BackendStatus)],
) -> fmt::Result {
    let of_backend = |value| each_backend::<u64>(backends, value);
    let as_gauge = |value| of_backend(value).map(|(of, value)| (of, value as f64));
    counter(
        page,
        "canary_backend_packets",
        "Packets sent to the backend",
        of_backend(|backend| Some(backend.packets)),
    )?;
    counter(
        page,
        "canary_backend_bytes",
        "Bytes of those packets",
        of_backend(|backend| Some(backend.bytes)),
    )?;
    counter(
        page,
        "canary_backend_no_port",
        "Packets of new connections that were refused because no source port was left towards the backend",
        of_backend(|backend| Some(backend.no_port)),
    )?;
    counter(
        page,
        "canary_backend_connections",
        "New connections steered to the backend",
        of_backend(|backend| Some(backend.connections)),
    )?;
    counter(
        page,
        "canary_backend_check_failures",
        "Health checks that the backend has failed since the agent started",
        of_backend(|backend| backend.check.as_ref().map(|check| check.failures)),
    )?;
    gauge(
        page,
        "canary_backend_check_up",
        "1 if the backend passes its health checks, whether or not it can be reached otherwise",
        as_gauge(|backend| backend.check.as_ref().map(|check| u64::from(check.up))),
    )?;
    gauge(
        page,
        "canary_backend_check_duration_seconds",
        "How long the backend's last health check took that passed",
        each_backend(backends, |backend| backend.check.as_ref()?.latency_seconds),
    )?;
    gauge(
        page,
        "canary_backend_up",
        "1 if the backend passes its checks and can be reached",
        as_gauge(|backend| Some(u64::from(backend.health == "up"))),
    )?;
    gauge(
        page,
        "canary_backend_weight",
        "Weight of the backend inside its version",
        as_gauge(|backend| Some(backend.weight.into())),
    )?;
    gauge(
        page,
        "canary_backend_buckets",
        "Buckets that steer new connections to the backend",
        as_gauge(|backend| Some(backend.buckets.into())),
    )?;
    gauge(
        page,
        "canary_backend_draining_buckets",
        "Buckets that steer new connections elsewhere and leave the older ones with the backend",
        as_gauge(|backend| Some(backend.draining_buckets.into())),
    )?;
    gauge(
        page,
        "canary_backend_taken_out",
        "1 if an operator has told the backend to drain or to take nothing",
        as_gauge(|backend| Some(u64::from(backend.admin != "ready"))),
    )
}

fn signals(page: &mut DescriptorEncoder, services: &[ServiceStatus]) -> fmt::Result {
    let known = || {
        versions(services)
            .filter_map(|(of, version)| Some((of, version.signals.as_ref()?)))
            .map(|(of, signals)| (of.to_labels(), signals))
    };
    counter(
        page,
        "canary_signal_watched_connections",
        "Connections of the version that were watched, and of which it is known how they began",
        known().map(|(labels, signals)| (labels, signals.watched)),
    )?;
    counter(
        page,
        "canary_signal_connections",
        "Watched connections with a bad outcome, by signal",
        known().flat_map(|(labels, signals)| {
            signals.signals.iter().map(move |one| {
                let mut labels = labels.clone();
                labels.push(("signal", one.signal.clone()));
                (labels, one.connections)
            })
        }),
    )?;
    counter(
        page,
        "canary_signal_missed",
        "What was missed of connections that were to be watched: no room for the connection, or for its outcome",
        known().flat_map(|(labels, signals)| {
            [("connections", signals.not_watched), ("outcomes", signals.lost)].map(|(of, count)| {
                let mut labels = labels.clone();
                labels.push(("missed", of.to_owned()));
                (labels, count)
            })
        }),
    )?;
    gauge(
        page,
        "canary_signal_watched_ratio",
        "Part of the version's connections that is watched",
        known().map(|(labels, signals)| {
            (labels, signals.one_in.map_or(0.0, |one_in| 1.0 / f64::from(one_in)))
        }),
    )?;
    let of_service = |value: fn(&SignalsStatus) -> Option<f64>| -> Samples<f64> {
        let value = |service: &ServiceStatus| value(service.signals.as_ref()?);
        let labels = |service: &ServiceStatus| Of::service(&service.name).to_labels();
        services.iter().filter_map(|s| value(s).map(|value| (labels(s), value))).collect()
    };
    gauge(
        page,
        "canary_signal_slow_handshake_threshold_seconds",
        "A handshake of the service that takes longer is slow; absent until that is known",
        of_service(|signals| signals.slow_over_seconds),
    )?;
    gauge(
        page,
        "canary_signal_incomplete_windows",
        "Windows of the service in which not every event was counted, since the agent started",
        of_service(|signals| Some(signals.incomplete_windows as f64)),
    )?;
    let mut family = page.encode_descriptor(
        "canary_handshake_seconds",
        "Handshakes of watched connections by time, from the SYN to the SYN-ACK where both \
         directions are seen, else to the client's first ACK",
        None,
        MetricType::Histogram,
    )?;
    for (labels, signals) in known() {
        let buckets: Vec<(f64, u64)> = signals
            .handshakes
            .iter()
            .map(|bucket| (bucket.upto_seconds.unwrap_or(f64::INFINITY), bucket.handshakes))
            .collect();
        let all = buckets.iter().map(|(_, count)| count).sum();
        family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
            signals.handshake_sum_seconds,
            all,
            &buckets,
            None,
        )?;
    }
    Ok(())
}

fn maps(page: &mut DescriptorEncoder, status: &Status) -> fmt::Result {
    let of_map = |name: &str| vec![("map", name.to_owned())];
    gauge(
        page,
        "canary_map_capacity_entries",
        "Elements that the map can hold",
        status.maps.iter().map(|map| (of_map(&map.name), map.capacity as f64)),
    )?;
    gauge(
        page,
        "canary_map_used_entries",
        "Elements in use, where that is known",
        status.maps.iter().filter_map(|map| Some((of_map(&map.name), map.used? as f64))),
    )?;
    gauge(
        page,
        "canary_map_memory_bytes",
        "Kernel memory of the map",
        status.maps.iter().map(|map| (of_map(&map.name), map.memory_bytes as f64)),
    )
}

fn flows(page: &mut DescriptorEncoder, status: &Status) -> fmt::Result {
    let FlowStatus { stored, let_go, taken_over, untracked, half_open } = &status.flows;
    counter(
        page,
        "canary_flow_inserts",
        "Flow entries that were stored",
        [(Labels::new(), *stored)],
    )?;
    let reason = |why: &str| vec![("reason", why.to_owned())];
    counter(
        page,
        "canary_flow_evictions",
        "Translated connections, half-open or closed, that made room in a full table or gave their source port to a new one",
        [(reason("table_full"), *let_go), (reason("port"), *taken_over)],
    )?;
    counter(
        page,
        "canary_flow_untracked",
        "New connections of moved buckets that went where older ones go because the flow table was full, in packets",
        [(Labels::new(), *untracked)],
    )?;
    let family = |family: &str| vec![("family", family.to_owned())];
    gauge(
        page,
        "canary_flow_half_open_entries",
        "Flow entries of half-open connections",
        [(family("4"), half_open[0] as f64), (family("6"), half_open[1] as f64)],
    )
}

/// How far rollouts are, and what their gates have seen.
fn rollouts(page: &mut DescriptorEncoder, rollouts: &[RolloutStatus]) -> fmt::Result {
    fn labels(one: &RolloutStatus) -> Labels {
        let RolloutStatus { name, service, to, .. } = one;
        vec![("service", service.clone()), ("version", to.clone()), ("rollout", name.clone())]
    }
    gauge(
        page,
        "canary_rollout_state",
        "1 for the state that the rollout is in",
        rollouts.iter().flat_map(|one| {
            ROLLOUT_STATES.iter().map(|state| {
                let mut labels = labels(one);
                labels.push(("state", (*state).to_owned()));
                (labels, u32::from(one.state == *state))
            })
        }),
    )?;
    let begun = || rollouts.iter().filter(|one| one.run.is_some());
    gauge(
        page,
        "canary_rollout_step",
        "The step that the rollout is at, from 1",
        begun().filter_map(|one| Some((labels(one), one.step?))),
    )?;
    gauge(
        page,
        "canary_rollout_needs_operator",
        "1 if the rollout goes no further before an operator has said something",
        begun().map(|one| (labels(one), u32::from(one.needs_operator))),
    )?;
    let gates = || rollouts.iter().filter_map(|one| Some((labels(one), one.gate.as_ref()?)));
    let with = |labels: &Labels, more: &[(&'static str, &str)]| {
        let more = more.iter().map(|(key, value)| (*key, (*value).to_owned()));
        labels.iter().cloned().chain(more).collect::<Labels>()
    };
    gauge(
        page,
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
    )?;
    gauge(
        page,
        "canary_gate_threshold",
        "What the evidence must reach to fail, or pass",
        gates().flat_map(|(labels, gate)| {
            [("fail", gate.ln_fail_at), ("pass", gate.ln_pass_at)].map(|(side, value)| {
                (with(&labels, &[("gate", &gate.name), ("side", side)]), value)
            })
        }),
    )?;
    gauge(
        page,
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
    )?;
    gauge(
        page,
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
    )
}

fn audiences(page: &mut DescriptorEncoder, audiences: &[AudienceSummary]) -> fmt::Result {
    let of = |one: &AudienceSummary| vec![("audience", one.name.clone())];
    let each = |value: fn(&AudienceSummary) -> usize| -> Samples<f64> {
        audiences.iter().map(|one| (of(one), value(one) as f64)).collect()
    };
    gauge(
        page,
        "canary_audience_networks",
        "Networks of the audience by configuration",
        each(|one| one.networks),
    )?;
    let dynamic = || audiences.iter().filter(|one| one.room > 0);
    let members = |value: fn(&AudienceSummary) -> usize| -> Samples<f64> {
        dynamic().map(|one| (of(one), value(one) as f64)).collect()
    };
    gauge(
        page,
        "canary_audience_members",
        "Members of the audience with a lifetime",
        members(|one| one.members),
    )?;
    gauge(
        page,
        "canary_audience_members_max",
        "Members that the audience may have",
        members(|one| one.room),
    )?;
    counter(
        page,
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
            each.map(|(change, count)| {
                (vec![("audience", one.name.clone()), ("change", change.to_owned())], count)
            })
        }),
    )?;
    counter(
        page,
        "canary_audience_refused_requests",
        "Requests to change members that were refused since the agent began",
        dynamic().map(|one| (of(one), one.refused)),
    )
}

/// Every version with its labels.
fn versions(services: &[ServiceStatus]) -> impl Iterator<Item = (Of<'_>, &VersionStatus)> {
    services.iter().flat_map(|service| {
        let of = Of::service(&service.name);
        service
            .versions
            .iter()
            .map(move |version| (Of { version: Some(&version.name), ..of }, version))
    })
}

fn counter<L: EncodeLabelSet>(
    page: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut family = page.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauge<L: EncodeLabelSet, T: EncodeGaugeValue>(
    page: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, T)>,
) -> fmt::Result {
    let mut family = page.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// A gauge without labels.
fn number(page: &mut DescriptorEncoder, name: &str, help: &str, value: f64) -> fmt::Result {
    let family = page.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value).encode(family)
}
