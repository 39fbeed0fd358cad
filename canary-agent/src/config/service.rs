//! `[[service]]`: the keys of one service and what they must be together.
//!
//! Must not know of other services: that is [`super::across`].

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use canary_ebpf_common::{abi, share::Share};

use super::{
    health,
    model::{
        Check, Existing, Fallback, Forward, Health, Port, Protocol, Service, Stickiness, Version,
        Via,
    },
    outside::Outside,
    route,
    scalar::{self, Problem, nearest, quote},
    sink::Sink,
    source::{At, Span},
    tunnel, unsupported,
    versions::{self, Draft},
    walk::{Fields, List, Node},
};

const DEFAULT_CONTROL: &str = "stable";
const DEFAULT_DRAIN: Duration = Duration::from_secs(30 * 60);
const DEFAULT_UDP_IDLE: Duration = Duration::from_secs(30);
const DEFAULT_PREFIX: (u32, u32) = (24, 56);
const DEFAULT_BUCKETS: u32 = 1 << 16;
/// The program's record has 32 bits for the milliseconds since it began: days would do.
const MAX_SLOW_START: Duration = Duration::from_secs(24 * 60 * 60);
const MIN_BUCKETS: u32 = 1 << 12;
const MAX_BUCKETS: u32 = 1 << 20;
/// A backend's record counts its sources in eight bits.
const MAX_NAT_SOURCES: usize = 255;
/// One byte is for the zero at the end.
pub(super) const MAX_NAME_BYTES: usize = abi::SERVICE_NAME_BYTES - 1;

/// A service and what later checks need to point at. Where something could not
/// be read, an error is known and a default stands in.
#[derive(Debug)]
pub(super) struct Placed {
    /// The service.
    pub service: Service,
    /// Where it begins.
    pub span: Span,
    /// Its name, if it has one.
    pub name: Option<Span>,
    /// Its addresses.
    pub vips: List<At<IpAddr>>,
    /// Its ports.
    pub ports: List<At<Port>>,
    /// Where it says that its connections are not to be watched.
    pub unwatched: Option<Span>,
    /// Its routes.
    pub routes: List<route::Placed>,
}

/// `tcp/443`.
pub(super) fn port_text(port: Port) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{protocol}/{}", port.port)
}

/// Reads one `[[service]]`.
pub(super) fn read(node: &Node<'_>, outside: &dyn Outside, sink: &mut Sink) -> Option<Placed> {
    let mut fields = node.table("service", sink)?;
    let span = fields.span;

    let name_node = fields.take("name", sink);
    let name = match name_node {
        Some(node) => node.parse(sink, |text| scalar::name(text, "service", MAX_NAME_BYTES)),
        None => {
            sink.absent(span, "this service has no `name`");
            None
        }
    };
    let label = match &name {
        Some(name) => format!("service `{name}`"),
        None => "this service".to_owned(),
    };

    let vips = required_list(&mut fields, "vip", &label, sink, |item, sink| {
        item.parse(sink, scalar::address)
    });
    vips.distinct(sink, |vip| format!("{vip} is listed twice in {label}"));
    let ports = required_list(&mut fields, "ports", &label, sink, |item, sink| {
        item.parse_loose(sink, scalar::port)
    });
    ports.distinct(sink, |port| format!("port `{}` is listed twice in {label}", port_text(port)));

    let forward = forward(&mut fields, sink);
    let nat_source = nat_source(&mut fields, forward, &vips, sink);
    let tunnel_source = tunnel::source(&mut fields, forward, sink);
    let gue_port = tunnel::gue_port(&mut fields, forward, sink);
    let mss = fields.take("mss", sink).and_then(|node| tunnel::mss(&node, sink));
    let stickiness = stickiness(&mut fields, sink);
    let existing = fields.take("existing", sink).and_then(|node| {
        let chosen = node.choice(sink, &[("pin", Existing::Pin), ("move", Existing::Move)]);
        if chosen == Some(Existing::Move) && forward == Some(Forward::Nat) {
            sink.error(
                node.span,
                unsupported::message("existing = \"move\"` with `forward = \"nat\""),
            );
        }
        chosen
    });
    let drain = match fields.take("drain", sink) {
        Some(node) => node.parse_loose(sink, |text| match text {
            "never" => Ok(None),
            _ => scalar::duration(text).map(Some),
        }),
        None => Some(Some(DEFAULT_DRAIN)),
    };
    let udp_idle = fields.take("udp_idle", sink).and_then(|node| node.parse_loose(sink, udp_idle));
    let quic = fields.take("quic", sink).and_then(|node| quic(&node, &ports, &label, sink));
    let signals_node = fields.take("signals", sink);
    let signals = signals_node.and_then(|node| signals(&node, &ports, &label, sink));
    let slow_start =
        fields.take("slow_start", sink).and_then(|node| node.parse_loose(sink, slow_start));
    let fallback = fields.take("fallback", sink).and_then(|node| {
        node.choice(sink, &[("control", Fallback::Control), ("none", Fallback::None)])
    });
    let health =
        fields.take("health", sink).and_then(|node| health::read(&node, forward, outside, sink));
    let buckets = fields.take("buckets", sink).and_then(|node| buckets(&node, sink));
    let hash_key =
        fields.take("hash_key", sink).and_then(|node| node.parse(sink, scalar::hash_key));

    let control_node = fields.take("control", sink);
    let split_node = fields.take("split", sink);
    let route_node = fields.take("route", sink);
    let versions_node = fields.take("versions", sink);
    fields.finish(sink);

    let versions = match versions_node {
        Some(node) => versions::read(&node, sink),
        None => List { items: Vec::new(), complete: true },
    };
    let control = control(control_node, &versions, span, &label, sink);
    versions::check(
        &versions,
        &versions::Around {
            label: &label,
            vips: &vips,
            ports: &ports,
            forward,
            fallback: fallback.unwrap_or(Fallback::Control),
            control,
            checked_at_vip: matches!(&health, Some(Health::Check(Check { via: Via::Vip, .. }))),
        },
        sink,
    );
    let routes = route_node.map_or_else(List::default, |node| {
        let of = |node: &Node<'_>, sink: &mut Sink| split(node, &versions, control, sink);
        route::read(&node, &label, of, sink)
    });
    let split = match split_node {
        Some(node) => split(&node, &versions, control, sink),
        None => BTreeMap::new(),
    };

    let name_text = name.unwrap_or_default();
    Some(Placed {
        unwatched: signals_node.filter(|_| signals == Some(false)).map(|node| node.span),
        service: Service {
            vips: vips.values(),
            ports: ports.values(),
            forward: forward.unwrap_or(Forward::Nat),
            nat_source,
            tunnel_source,
            gue_port: gue_port.unwrap_or(tunnel::DEFAULT_GUE_PORT),
            mss,
            stickiness,
            control: control.unwrap_or(0),
            existing: existing.unwrap_or(Existing::Pin),
            drain: drain.unwrap_or(Some(DEFAULT_DRAIN)),
            udp_idle: udp_idle.unwrap_or(DEFAULT_UDP_IDLE),
            quic: quic.unwrap_or(false),
            signals: signals.unwrap_or(false),
            slow_start: slow_start.unwrap_or_default(),
            fallback: fallback.unwrap_or(Fallback::Control),
            split,
            routes: routes.items.iter().map(|placed| placed.route.clone()).collect(),
            routed: false,
            derived: None,
            health: health.unwrap_or_else(health::default),
            buckets: buckets.unwrap_or(DEFAULT_BUCKETS),
            hash_key: hash_key.unwrap_or_else(|| scalar::derived_hash_key(&name_text)),
            versions: versions
                .items
                .into_iter()
                .map(|draft| Version { name: draft.name.value, backends: draft.backends.values() })
                .collect(),
            name: name_text,
        },
        span,
        name: name_node.map(|node| node.span),
        vips,
        ports,
        routes,
    })
}

fn required_list<T>(
    fields: &mut Fields<'_>,
    key: &'static str,
    label: &str,
    sink: &mut Sink,
    read: impl FnMut(&Node<'_>, &mut Sink) -> Option<T>,
) -> List<At<T>> {
    let Some(node) = fields.take(key, sink) else {
        sink.absent(fields.span, format!("{label} has no `{key}`"));
        return List { items: Vec::new(), complete: false };
    };
    let mut list = node.list(sink, read);
    if list.complete && list.items.is_empty() {
        sink.error(node.span, format!("`{key}` of {label} is empty"));
        list.complete = false;
    }
    list
}

/// `None`: said what is wrong; checks that depend on it are left out.
fn forward(fields: &mut Fields<'_>, sink: &mut Sink) -> Option<Forward> {
    let Some(node) = fields.take("forward", sink) else {
        return Some(Forward::Nat);
    };
    let all = [Forward::Nat, Forward::Dsr, Forward::Ipip, Forward::Gue];
    node.choice(sink, &all.map(|forward| (forward.name(), forward)))
}

fn nat_source(
    fields: &mut Fields<'_>,
    forward: Option<Forward>,
    vips: &List<At<IpAddr>>,
    sink: &mut Sink,
) -> Vec<IpAddr> {
    let Some(node) = fields.take("nat_source", sink) else {
        return Vec::new();
    };
    if let Some(forward) = forward.filter(|forward| !forward.translates()) {
        sink.error(
            node.span,
            format!(
                "`nat_source` is of use with `forward = \"nat\"` only: `{}` keeps the client's address",
                forward.name()
            ),
        );
    }
    let list = node.list(sink, |item, sink| item.parse(sink, scalar::address));
    list.distinct(sink, |source| format!("{source} is listed twice in `nat_source`"));
    if list.items.len() > MAX_NAT_SOURCES {
        sink.error(
            node.span,
            format!(
                "`nat_source` has {} addresses; {MAX_NAT_SOURCES} is the most",
                list.items.len()
            ),
        );
    }
    let served = |v4| vips.items.iter().any(|vip| vip.value.is_ipv4() == v4);
    for v4 in [true, false] {
        let unused = list.items.iter().find(|item| item.value.is_ipv4() == v4);
        if let Some(unused) = unused
            && vips.complete
            && !served(v4)
        {
            sink.warning(
                unused.span,
                format!(
                    "{} is never used: the service has no {} address",
                    unused.value,
                    versions::family_name(unused.value)
                ),
            );
        }
    }
    list.values()
}

fn stickiness(fields: &mut Fields<'_>, sink: &mut Sink) -> Stickiness {
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Kind {
        Connection,
        Client,
        Subnet,
    }
    let kind = match fields.take("stickiness", sink) {
        Some(node) => node.choice(
            sink,
            &[("connection", Kind::Connection), ("client", Kind::Client), ("subnet", Kind::Subnet)],
        ),
        None => Some(Kind::Connection),
    };
    let (mut v4, mut v6) = DEFAULT_PREFIX;
    if let Some(node) = fields.take("prefix", sink) {
        if matches!(kind, Some(Kind::Connection | Kind::Client)) {
            sink.warning(node.span, "`prefix` is of use with `stickiness = \"subnet\"` only");
        }
        if let Some(mut prefix) = node.table("service.prefix", sink) {
            let mut bits = |key, most, default| {
                prefix
                    .take(key, sink)
                    .and_then(|node| node.integer(sink, 1..=most))
                    .unwrap_or(default)
            };
            (v4, v6) = (bits("v4", 32, v4), bits("v6", 128, v6));
            prefix.finish(sink);
        }
    }
    // Both are at most 128.
    match kind.unwrap_or(Kind::Connection) {
        Kind::Connection => Stickiness::Connection,
        Kind::Client => Stickiness::Client,
        Kind::Subnet => Stickiness::Subnet {
            v4: u8::try_from(v4).unwrap_or(u8::MAX),
            v6: u8::try_from(v6).unwrap_or(u8::MAX),
        },
    }
}

fn udp_idle(text: &str) -> Result<Duration, Problem> {
    let duration = scalar::duration(text)?;
    if duration.is_zero() {
        return Err(Problem::new("`udp_idle` must be longer than 0"));
    }
    // The program counts it in milliseconds of 32 bits.
    if u32::try_from(duration.as_millis()).is_err() {
        return Err(Problem::new(format!("`udp_idle` is at most 49 days, not {}", quote(text))));
    }
    Ok(duration)
}

fn quic(node: &Node<'_>, ports: &List<At<Port>>, label: &str, sink: &mut Sink) -> Option<bool> {
    let quic = node.boolean(sink)?;
    let udp = ports.items.iter().any(|port| port.value.protocol == Protocol::Udp);
    if quic && !udp && ports.complete {
        let finding = sink.error(node.span, format!("`quic` is true, but {label} has no UDP port"));
        match ports.items.first() {
            Some(port) => finding.help(format!(
                "add the port that QUIC is spoken on to `ports`, such as \"udp/{}\"",
                port.value.port
            )),
            None => finding,
        };
    }
    Some(quic)
}

/// Whether connections are watched: those of TCP, which say how they fare.
fn signals(node: &Node<'_>, ports: &List<At<Port>>, label: &str, sink: &mut Sink) -> Option<bool> {
    let signals = node.boolean(sink)?;
    let tcp = ports.items.iter().any(|port| port.value.protocol == Protocol::Tcp);
    if signals && !tcp && ports.complete {
        sink.error(node.span, format!("`signals` is true, but {label} has no TCP port"))
            .help("datagrams say nothing of how their connections fare: leave it out");
        return None;
    }
    Some(signals)
}

fn slow_start(text: &str) -> Result<Duration, Problem> {
    let duration = scalar::duration(text)?;
    if duration > MAX_SLOW_START {
        return Err(Problem::new(format!("`slow_start` is at most a day, not {}", quote(text))));
    }
    Ok(duration)
}

fn buckets(node: &Node<'_>, sink: &mut Sink) -> Option<u32> {
    let buckets = node.integer(sink, MIN_BUCKETS..=MAX_BUCKETS)?;
    if buckets.is_power_of_two() {
        return Some(buckets);
    }
    let above = buckets.next_power_of_two();
    sink.error(node.span, format!("`buckets` must be a power of two, not {buckets}"))
        .help(format!("the nearest are {} and {above}", above / 2));
    None
}

/// Index of the control version.
fn control(
    node: Option<Node<'_>>,
    versions: &List<Draft>,
    span: Span,
    label: &str,
    sink: &mut Sink,
) -> Option<usize> {
    let index = |name: &str| versions.items.iter().position(|v| v.name.value == name);
    let name = match node {
        Some(node) => node.string(sink)?,
        None => DEFAULT_CONTROL,
    };
    if let Some(index) = index(name) {
        return Some(index);
    }
    if !versions.complete {
        return None;
    }
    let names = || versions.items.iter().map(|v| v.name.value.as_str());
    match node {
        _ if versions.items.is_empty() => {
            sink.absent(span, format!("{label} has no version"))
                .help(format!("add `[service.versions.{DEFAULT_CONTROL}]` with its backends"));
        }
        Some(node) => {
            let finding = sink.absent(
                node.span,
                format!("`control` of {label} names no version: {}", quote(name)),
            );
            match nearest(name, names()) {
                Some(near) => finding.help(format!("did you mean \"{near}\"?")),
                None => finding.help(known_versions(versions)),
            };
        }
        None => {
            let first = names().next().unwrap_or(DEFAULT_CONTROL);
            sink.absent(
                span,
                format!(
                    "{label} has no version `{DEFAULT_CONTROL}` and no `control` that names another"
                ),
            )
            .help(format!("say which version is the control, such as `control = \"{first}\"`"));
        }
    }
    None
}

fn known_versions(versions: &List<Draft>) -> String {
    let names: Vec<String> = versions.items.iter().map(|v| format!("`{}`", v.name.value)).collect();
    format!("its versions are {}", names.join(", "))
}

fn split(
    node: &Node<'_>,
    versions: &List<Draft>,
    control: Option<usize>,
    sink: &mut Sink,
) -> BTreeMap<String, Share> {
    let mut split = BTreeMap::new();
    let Some(mut fields) = node.table("service.split", sink) else {
        return split;
    };
    for entry in fields.take_names() {
        let index = versions.items.iter().position(|v| v.name.value == entry.key);
        if index.is_none() && versions.complete {
            let finding =
                sink.absent(entry.span, format!("`split` names no version: {}", quote(entry.key)));
            let names = versions.items.iter().map(|v| v.name.value.as_str());
            match nearest(entry.key, names) {
                Some(near) => finding.help(format!("did you mean `{near}`?")),
                None => finding.help(known_versions(versions)),
            };
        }
        if index.is_some() && index == control {
            sink.error(
                entry.span,
                format!("`split` names the control version, {}", quote(entry.key)),
            )
            .help("control gets what the other versions leave: name those only");
        }
        let share = entry.node("split").parse_loose(sink, |text| {
            text.parse::<Share>().map_err(|error| Problem::new(error.to_string()))
        });
        if let Some(share) = share {
            split.insert(entry.key.to_owned(), share);
        }
    }
    if !Share::fit_together(split.values().copied()) {
        let shares: Vec<String> = split
            .iter()
            .take(abi::MAX_VERSIONS)
            .map(|(name, share)| format!("{name} {share}"))
            .collect();
        sink.error(
            node.span,
            format!("the shares are more than 100% together: {}", shares.join(", ")),
        );
    }
    split
}
