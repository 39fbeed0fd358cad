//! `[agent]`, which may be spread over the files key by key.
//!
//! Owns its keys, defaults and limits. Must not know of services.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    ops::RangeInclusive,
    path::PathBuf,
};

use super::{
    diagnostic::Severity,
    model::{Agent, Capacity, Operators, XdpMode},
    outside::Outside,
    scalar::{self, Problem, quote},
    sink::Sink,
    source::{At, Span},
    walk::{Fields, List, Node},
};
use crate::telemetry;

/// Most services.
pub(super) const MAX_SERVICES: u32 = 4096;
/// Most addresses × ports, for each family.
pub(super) const MAX_VIPS: u32 = 1 << 16;
/// Most live backends: entries of the forwarding table have 15 bits, and half
/// of the indices are for those that drain.
pub(super) const MAX_BACKENDS: u32 = 1 << 14;
/// Most buckets: full tables of both families for every service.
pub(super) const MAX_BUCKETS: u32 = MAX_SERVICES * 2 * 65_536;
/// Most flow entries, for each family.
pub(super) const MAX_FLOWS: u32 = 4_000_000;

/// Most connections that are watched, for each family.
const MAX_SAMPLES: u32 = 1 << 20;

/// What suits a small host.
const DEFAULT_CAPACITY: Capacity = Capacity {
    services: 256,
    vips: 1024,
    backends: 1024,
    buckets: 1 << 20,
    flows: 131_072,
    samples: 16_384,
};

/// What is logged if nobody says otherwise.
const DEFAULT_LOG: &str = "info";

/// Buckets are given out in pages.
const PAGE: u32 = canary_ebpf_common::abi::PAGE_BUCKETS;
/// First port of unprivileged programs.
const FIRST_NAT_PORT: u16 = 1024;
/// With fewer source ports a handful of clients would use them up.
const MIN_NAT_PORTS: u32 = 1024;
/// Longest path of a Unix socket (`sockaddr_un`, less the final zero).
const MAX_SOCKET_PATH: usize = 107;

/// `[agent]` and what later checks need to point at.
#[derive(Debug)]
pub(super) struct Placed {
    /// The table.
    pub agent: Agent,
    /// Where each key of `[agent.capacity]` that is set has its value.
    pub capacity: BTreeMap<&'static str, Span>,
}

/// Reads `[agent]` from all its parts; `main` stands for the main file. Where there is
/// `no_service`, there need be no interface either.
pub(super) fn read(
    parts: &[Node<'_>],
    main: Span,
    no_service: bool,
    outside: &dyn Outside,
    sink: &mut Sink,
) -> Placed {
    let span = parts.first().map_or(main, |part| part.span);
    let mut fields = Fields::new("agent", span);
    let mut whole = true;
    for part in parts {
        whole &= part.is_table();
        if part.is_list() {
            sink.error(part.span, "`agent` is one table, not a list").help("write `[agent]`");
        } else {
            fields.merge(part, sink);
        }
    }

    let interfaces = interfaces(&mut fields, whole, no_service, sink);
    let xdp_mode = fields.take("xdp_mode", sink).and_then(|node| {
        node.choice(
            sink,
            &[("auto", XdpMode::Auto), ("native", XdpMode::Native), ("generic", XdpMode::Generic)],
        )
    });
    let state_dir = path(&mut fields, "state_dir", "/var/lib/canary", sink);
    let socket = socket(&mut fields, sink);
    let bpffs = path(&mut fields, "bpffs", "/sys/fs/bpf/canary", sink);
    let listen = match fields.take("listen", sink) {
        Some(node) => node.parse(sink, listen).flatten(),
        None => Some(SocketAddr::from(([127, 0, 0, 1], 9109))),
    };
    let manage_vips = fields.take("manage_vips", sink).and_then(|node| node.boolean(sink));
    let nat_ports = match fields.take("nat_ports", sink) {
        Some(node) => node.parse(sink, nat_ports),
        None => None,
    };
    let log = fields.take("log", sink).and_then(|node| node.parse(sink, log));
    let operators = operators(&mut fields, outside, sink);
    let (capacity, places) = capacity(&mut fields, sink);
    fields.finish(sink);

    Placed {
        agent: Agent {
            interfaces,
            xdp_mode: xdp_mode.unwrap_or(XdpMode::Auto),
            state_dir,
            socket,
            bpffs,
            listen,
            manage_vips: manage_vips.unwrap_or(true),
            operators,
            nat_ports: nat_ports.unwrap_or(FIRST_NAT_PORT..=32_767),
            capacity,
            log: log.unwrap_or_else(|| DEFAULT_LOG.to_owned()),
        },
        capacity: places,
    }
}

fn interfaces(
    fields: &mut Fields<'_>,
    whole: bool,
    no_service: bool,
    sink: &mut Sink,
) -> Vec<String> {
    let span = fields.span;
    let Some(node) = fields.take("interfaces", sink) else {
        // Where some of `[agent]` could not be read, they may be in it.
        if !whole {
            return Vec::new();
        }
        sink.absent_anywhere(Severity::Error, span, "no interface is given").help(
            "name those that the traffic comes in on: `interfaces = [\"eth0\"]` in `[agent]`",
        );
        return Vec::new();
    };
    let list = node.list(sink, |item, sink| item.parse(sink, scalar::interface));
    // A configuration that steers nothing, such as the one that comes with a package, can
    // say so.
    if list.complete && list.items.is_empty() && !no_service {
        sink.error(node.span, "no interface is given")
            .help("name those that the traffic comes in on, such as `[\"eth0\"]`");
    }
    let names = List {
        items: list
            .items
            .iter()
            .map(|item| At { value: item.value.as_str(), span: item.span })
            .collect(),
        complete: list.complete,
    };
    names.distinct(sink, |name| format!("interface `{name}` is named twice"));
    list.items.into_iter().map(|item| item.value).collect()
}

fn path(fields: &mut Fields<'_>, key: &'static str, default: &str, sink: &mut Sink) -> PathBuf {
    fields
        .take(key, sink)
        .and_then(|node| node.parse(sink, |text| absolute(key, text)))
        .unwrap_or_else(|| PathBuf::from(default))
}

fn socket(fields: &mut Fields<'_>, sink: &mut Sink) -> PathBuf {
    let parse = |text: &str| {
        let path = absolute("socket", text)?;
        match text.len() <= MAX_SOCKET_PATH {
            true => Ok(path),
            false => Err(Problem::new(format!(
                "the path of a socket has at most {MAX_SOCKET_PATH} bytes; this one has {}",
                text.len()
            ))),
        }
    };
    fields
        .take("socket", sink)
        .and_then(|node| node.parse(sink, parse))
        .unwrap_or_else(|| PathBuf::from("/run/canary/agent.sock"))
}

/// An absolute path: what a relative one means depends on where a daemon is started.
fn absolute(key: &str, text: &str) -> Result<PathBuf, Problem> {
    if text.contains('\0') {
        return Err(Problem::new(format!("`{key}` has a zero byte, which no path can have")));
    }
    if !text.starts_with('/') {
        return Err(Problem::new(format!("`{key}` must be an absolute path, not {}", quote(text))));
    }
    Ok(PathBuf::from(text))
}

fn listen(text: &str) -> Result<Option<SocketAddr>, Problem> {
    if text == "off" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        Problem::with(
            format!("{} is not an address and port", quote(text)),
            "write it as `127.0.0.1:9109` or `[::1]:9109`, or `off` for no listener",
        )
    })
}

fn log(text: &str) -> Result<String, Problem> {
    let wrong = |reason: String| {
        Problem::with(
            format!("{} says nothing of what to log: {reason}", quote(text)),
            "write a level (`error`, `warn`, `info`, `debug`, `trace`), or several as in \
             `info,canary_agent::health=debug`",
        )
    };
    if text.trim().is_empty() {
        return Err(wrong("it is empty".to_owned()));
    }
    match telemetry::check_log_filter(text) {
        Ok(()) => Ok(text.to_owned()),
        Err(reason) => Err(wrong(reason)),
    }
}

fn nat_ports(text: &str) -> Result<RangeInclusive<u16>, Problem> {
    let (first, last) = scalar::port_range(text)?;
    if first > last {
        return Err(Problem::new(format!(
            "`nat_ports` ends before it begins: {first} is above {last}"
        )));
    }
    if first < FIRST_NAT_PORT {
        return Err(Problem::new(format!(
            "`nat_ports` must begin at {FIRST_NAT_PORT} or above, not at {first}: lower ports are the system's"
        )));
    }
    let count = u32::from(last) - u32::from(first) + 1;
    if count < MIN_NAT_PORTS {
        return Err(Problem::new(format!(
            "`nat_ports` must have at least {MIN_NAT_PORTS} ports, not {count}"
        )));
    }
    Ok(first..=last)
}

/// The number of an account's name, if there is such an account.
type Lookup<'f> = &'f dyn Fn(&str) -> Option<u32>;

fn operators(fields: &mut Fields<'_>, outside: &dyn Outside, sink: &mut Sink) -> Operators {
    let mut table = Fields::new("agent.operators", fields.span);
    for node in fields.take_all("operators") {
        table.merge(&node, sink);
    }
    let uid: Lookup<'_> = &|name| outside.uid(name);
    let gid: Lookup<'_> = &|name| outside.gid(name);
    let mut ids = |keys: [&'static str; 2], what: &str, lookup: Lookup<'_>| {
        let mut ids = BTreeSet::new();
        for key in keys {
            let Some(node) = table.take(key, sink) else {
                continue;
            };
            let list = node.list(sink, |item, sink| account(item, what, lookup, sink));
            ids.extend(list.values());
        }
        ids.into_iter().collect()
    };
    let operators = Operators {
        uids: ids(["users", "uids"], "user", uid),
        gids: ids(["groups", "gids"], "group", gid),
    };
    table.finish(sink);
    operators
}

fn account(item: &Node<'_>, what: &str, lookup: Lookup<'_>, sink: &mut Sink) -> Option<u32> {
    let Some(name) = item.as_str() else {
        // The last number means "no one" to the kernel.
        return item.integer(sink, 0..=u32::MAX - 1);
    };
    let found = lookup(name);
    if found.is_none() {
        sink.error(item.span, format!("there is no {what} {} on this host", quote(name)))
            .help(format!("create the {what} first, or write its number without quotes"));
    }
    found
}

fn capacity(fields: &mut Fields<'_>, sink: &mut Sink) -> (Capacity, BTreeMap<&'static str, Span>) {
    let mut table = Fields::new("agent.capacity", fields.span);
    for node in fields.take_all("capacity") {
        table.merge(&node, sink);
    }
    let mut places = BTreeMap::new();
    let mut read = |key: &'static str, range: RangeInclusive<u32>, default| {
        let most = *range.end();
        let Some(node) = table.take(key, sink) else {
            return default;
        };
        places.insert(key, node.span);
        // Nothing is too much for a capacity that is not known.
        let Some(value) = node.integer(sink, range) else {
            return most;
        };
        if key == "buckets" && value % PAGE != 0 {
            sink.error(node.span, format!("`buckets` must be a multiple of {PAGE}, not {value}"))
                .help(format!("the next is {}", value.next_multiple_of(PAGE).min(MAX_BUCKETS)));
            return most;
        }
        value
    };
    let default = DEFAULT_CAPACITY;
    let capacity = Capacity {
        services: read("services", 1..=MAX_SERVICES, default.services),
        vips: read("vips", 1..=MAX_VIPS, default.vips),
        backends: read("backends", 1..=MAX_BACKENDS, default.backends),
        buckets: read("buckets", PAGE..=MAX_BUCKETS, default.buckets),
        flows: read("flows", 1..=MAX_FLOWS, default.flows),
        samples: read("samples", 0..=MAX_SAMPLES, default.samples),
    };
    table.finish(sink);
    (capacity, places)
}
