//! `service.versions`: versions and backends, and what they must be for their service.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use canary_ebpf_common::abi;

use super::{
    model::{Backend, Fallback, Forward, Port},
    scalar::{self, quote},
    sink::Sink,
    source::{At, Span},
    walk::{Entry, List, Node},
};

/// One byte is for the zero at the end.
const MAX_NAME_BYTES: usize = abi::VERSION_NAME_BYTES - 1;
const MAX_WEIGHT: u32 = 65_535;

/// A version as it is written.
#[derive(Debug)]
pub(super) struct Draft {
    /// Its name.
    pub name: At<String>,
    /// Its backends.
    pub backends: List<At<Backend>>,
}

/// What of a service its versions are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around<'s> {
    /// The service in a sentence.
    pub label: &'s str,
    /// Its addresses.
    pub vips: &'s List<At<IpAddr>>,
    /// Its ports.
    pub ports: &'s List<At<Port>>,
    /// How it forwards, if that is known.
    pub forward: Option<Forward>,
    /// What its versions get that have no backend.
    pub fallback: Fallback,
    /// Index of its control version, if that is known.
    pub control: Option<usize>,
    /// Whether its backends are checked with `via = "vip"`.
    pub checked_at_vip: bool,
}

/// `IPv4` or `IPv6`.
pub(super) fn family_name(addr: IpAddr) -> &'static str {
    match addr {
        IpAddr::V4(_) => "IPv4",
        IpAddr::V6(_) => "IPv6",
    }
}

/// Reads `versions` of a service.
pub(super) fn read(node: &Node<'_>, sink: &mut Sink) -> List<Draft> {
    let mut versions = List::default();
    let Some(mut fields) = node.table("service.versions", sink) else {
        versions.complete = false;
        return versions;
    };
    let entries = fields.take_names();
    if let Some(first_beyond) = entries.get(abi::MAX_VERSIONS) {
        sink.error(
            first_beyond.span,
            format!(
                "a service has at most {} versions, this one has {}",
                abi::MAX_VERSIONS,
                entries.len()
            ),
        );
        versions.complete = false;
    }
    for entry in entries.iter().take(abi::MAX_VERSIONS) {
        versions.push(read_version(entry, sink));
    }
    versions
}

fn read_version(entry: &Entry<'_>, sink: &mut Sink) -> Option<Draft> {
    let name = match scalar::name(entry.key, "version", MAX_NAME_BYTES) {
        Ok(name) => Some(name),
        Err(problem) => {
            let finding = sink.error(entry.span, problem.message);
            if let Some(help) = problem.help {
                finding.help(help);
            }
            None
        }
    };
    let shown = quote(entry.key);
    let mut fields = entry
        .node("versions")
        .table(format!("service.versions.{}", name.as_deref().unwrap_or("NAME")), sink)?;
    let backends = match fields.take("backends", sink) {
        Some(node) => {
            let list = node.list(sink, read_backend);
            if list.complete && list.items.is_empty() {
                sink.error(node.span, format!("version {shown} has no backends"));
            }
            list
        }
        None => {
            sink.absent(entry.span, format!("version {shown} has no `backends`"))
                .help("add `backends = [\"ADDRESS:PORT\"]`");
            List { items: Vec::new(), complete: false }
        }
    };
    fields.finish(sink);
    Some(Draft { name: At { value: name?, span: entry.span }, backends })
}

fn read_backend(item: &Node<'_>, sink: &mut Sink) -> Option<Backend> {
    if !item.is_table() {
        if item.as_str().is_none() {
            item.mismatch("strings or tables `{ addr, weight }`", sink);
            return None;
        }
        let addr = item.parse(sink, scalar::backend)?;
        return Some(Backend { addr, weight: 1 });
    }
    let mut fields = item.table("backends", sink)?;
    let addr = match fields.take("addr", sink) {
        Some(node) => node.parse(sink, scalar::backend),
        None => {
            sink.absent(item.span, "this backend has no `addr`");
            None
        }
    };
    let weight = match fields.take("weight", sink) {
        Some(node) => node.integer(sink, 0..=MAX_WEIGHT),
        None => Some(1),
    };
    fields.finish(sink);
    Some(Backend { addr: addr?, weight: weight? })
}

/// Checks the versions of one service against it and against each other.
pub(super) fn check(versions: &List<Draft>, around: &Around<'_>, sink: &mut Sink) {
    let mut all: HashMap<SocketAddr, (&str, Span)> = HashMap::new();
    let vips: HashMap<IpAddr, Span> =
        around.vips.items.iter().map(|vip| (vip.value, vip.span)).collect();
    let ports: HashSet<u16> = around.ports.items.iter().map(|p| p.value.port).collect();
    for (index, version) in versions.items.iter().enumerate() {
        distinct(version, around, sink);
        for backend in &version.backends.items {
            let addr = backend.value.addr;
            match all.get(&addr) {
                Some((other, first)) if *other != version.name.value => {
                    sink.warning(
                        backend.span,
                        format!(
                            "{addr} is a backend of both `{other}` and `{}`: the two can't be told apart on it",
                            version.name.value
                        ),
                    )
                    .also(*first, "it is here first");
                }
                Some(_) => {}
                None => {
                    all.insert(addr, (&version.name.value, backend.span));
                }
            }
            own_address(backend, around.label, &vips, sink);
            if let Some(forward) = around.forward.filter(|forward| !forward.translates())
                && around.ports.complete
            {
                kept_port(backend, around.label, forward, &ports, sink);
            }
        }
        families(version, around, around.control == Some(index), sink);
        let wraps = around.forward.is_some_and(Forward::wraps);
        weights(version, wraps, around.control == Some(index), sink);
    }
}

/// Reports backends that a version has twice. What makes a backend is its
/// address and port in `nat`, its address alone where ports are kept.
fn distinct(version: &Draft, around: &Around<'_>, sink: &mut Sink) {
    let mut seen: HashMap<SocketAddr, Span> = HashMap::new();
    for backend in &version.backends.items {
        let addr = backend.value.addr;
        let identity = match around.forward {
            Some(forward) if !forward.translates() => SocketAddr::new(addr.ip(), 0),
            Some(_) | None => addr,
        };
        if let Some(first) = seen.get(&identity) {
            let name = &version.name.value;
            let finding = if identity == addr {
                sink.error(backend.span, format!("{addr} is listed twice in `{name}`"))
            } else {
                let ip = addr.ip();
                sink.error(
                    backend.span,
                    format!(
                        "{ip} is listed twice in `{name}`: `{}` keeps ports, so that one backend has them all",
                        around.forward.map_or("", Forward::name)
                    ),
                )
            };
            finding.also(*first, "it is here first");
        } else {
            seen.insert(identity, backend.span);
        }
    }
}

fn own_address(backend: &At<Backend>, label: &str, vips: &HashMap<IpAddr, Span>, sink: &mut Sink) {
    let addr = backend.value.addr;
    if let Some(vip) = vips.get(&addr.ip()) {
        sink.error(
            backend.span,
            format!("{addr} is an address of {label} itself: its packets would come back"),
        )
        .also(*vip, "the address is here");
    }
}

/// Only `nat` gives a packet another port: otherwise a backend's must be one of the service's.
fn kept_port(
    backend: &At<Backend>,
    label: &str,
    forward: Forward,
    ports: &HashSet<u16>,
    sink: &mut Sink,
) {
    let addr = backend.value.addr;
    if !ports.contains(&addr.port()) {
        sink.error(
            backend.span,
            format!("{addr} has a port that {label} has not: `{}` keeps ports", forward.name()),
        )
        .help("write the service's port, or have it translated with `forward = \"nat\"`");
    }
}

/// Each family has a forwarding table of its own: backends of a family serve
/// the addresses of that family. A version without a backend of one is there
/// like a version without a healthy backend.
fn families(version: &Draft, around: &Around<'_>, is_control: bool, sink: &mut Sink) {
    let Around { label, vips, fallback, .. } = around;
    let Draft { name, backends } = version;
    if !vips.complete || !backends.complete || backends.items.is_empty() {
        return;
    }
    // Wrapped, a packet of either family gets to either.
    if around.forward.is_some_and(Forward::wraps) {
        if around.checked_at_vip {
            checked(version, around, sink);
        }
        return;
    }
    for v4 in [true, false] {
        let vip = vips.items.iter().find(|vip| vip.value.is_ipv4() == v4);
        let backend = backends.items.iter().find(|backend| backend.value.addr.is_ipv4() == v4);
        match (vip, backend) {
            (Some(vip), None) => {
                let family = family_name(vip.value);
                let missing = format!(
                    "version `{}` has no {family} backend, but {label} has an {family} address",
                    name.value
                );
                // A version that is not control can do without where control stands in.
                let finding = if !is_control && *fallback == Fallback::Control {
                    sink.warning(
                        name.span,
                        format!("{missing}: its {family} connections go to control"),
                    )
                } else {
                    sink.error(name.span, missing)
                };
                finding.also(vip.span, "the address is here").help(format!(
                    "add an {family} backend, or give the {family} addresses a service of their own"
                ));
            }
            (None, Some(backend)) => {
                let addr = backend.value.addr;
                let family = family_name(addr.ip());
                sink.error(
                    backend.span,
                    format!("{addr} is {family}, but {label} has no {family} address in `vip`"),
                )
                .help(format!(
                    "add an {family} address to `vip`, or leave the backend out: addresses are not translated between families"
                ));
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
}

/// A check that is wrapped for a backend is of the family that the backend's address is of.
fn checked(version: &Draft, around: &Around<'_>, sink: &mut Sink) {
    let Around { label, vips, .. } = around;
    for v4 in [true, false] {
        let vip = vips.items.iter().any(|vip| vip.value.is_ipv4() == v4);
        let mut backends = version.backends.items.iter();
        let backend = backends.find(|backend| backend.value.addr.is_ipv4() == v4);
        if let (false, Some(backend)) = (vip, backend) {
            let addr = backend.value.addr;
            let family = family_name(addr.ip());
            sink.error(
                backend.span,
                format!(
                    "{addr} can't be checked with `via = \"vip\"`: {label} has no {family} address in `vip`"
                ),
            )
            .help(format!(
                "leave `via` out, and {addr} is checked at its own address; or add an {family} address to `vip`"
            ));
        }
    }
}

/// A version whose backends of a family all have weight 0 takes no connections.
fn weights(version: &Draft, wraps: bool, is_control: bool, sink: &mut Sink) {
    let Draft { name, backends } = version;
    if !backends.complete {
        return;
    }
    for v4 in [true, false] {
        let served = |backend: &&At<Backend>| wraps || backend.value.addr.is_ipv4() == v4;
        let mut family = backends.items.iter().filter(served).peekable();
        let Some(first) = family.peek().copied() else {
            continue;
        };
        if family.any(|backend| backend.value.weight > 0) || wraps && !v4 {
            continue;
        }
        let kind = match wraps {
            true => String::new(),
            false => format!("{} ", family_name(first.value.addr.ip())),
        };
        let message = format!("every {kind}backend of `{}` has weight 0", name.value);
        if is_control {
            sink.error(first.span, format!("{message}: control takes what no other version does"))
                .help("give one of them a weight, or make another version the control");
        } else {
            sink.warning(first.span, format!("{message}: it gets no new connections"));
        }
    }
}
