//! What services must be together: names, addresses, and what they take of the
//! capacity.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use super::{
    agent::{self, MAX_BACKENDS, MAX_BUCKETS, MAX_SERVICES, MAX_VIPS},
    audience, derived,
    model::Port,
    scalar::nearest,
    service::{MAX_NAME_BYTES, Placed, port_text},
    sink::Sink,
    source::Span,
};

/// Checks all services.
pub(super) fn check(agent: &agent::Placed, services: &[Placed], sink: &mut Sink) {
    names(services, sink);
    capacity(agent, services, sink);
    overlaps(services, sink);
}

/// Reports routes whose audience is not there, and audiences that no route names.
pub(super) fn routes(services: &[Placed], audiences: &[audience::Placed], sink: &mut Sink) {
    let mut routed: HashSet<&str> = HashSet::new();
    let names = || audiences.iter().map(|placed| placed.audience.name.as_str());
    let routes = services.iter().flat_map(|of| of.routes.items.iter().map(move |one| (of, one)));
    for (of, placed) in routes {
        let name = placed.route.audience.as_str();
        routed.insert(name);
        if names().any(|known| known == name) {
            let table = derived::name(&of.service.name, name);
            if table.len() > MAX_NAME_BYTES {
                sink.error(
                    placed.audience,
                    format!(
                        "the names of the service and of the audience have {} bytes together, and \
                         {MAX_NAME_BYTES} is the most with the sign between them",
                        table.len()
                    ),
                );
            }
            continue;
        }
        if placed.route.follows {
            // Said where the rollout names it.
            continue;
        }
        let finding = sink.absent(placed.audience, format!("there is no audience `{name}`"));
        match nearest(name, names()) {
            Some(near) => finding.help(format!("did you mean `{near}`?")),
            None => finding.help(format!("describe it: `[[audience]]`, `name = \"{name}\"`")),
        };
    }
    for placed in audiences {
        let name = placed.audience.name.as_str();
        if !name.is_empty() && !routed.contains(name) {
            sink.warning(
                placed.span,
                format!("no route names the audience `{name}`, and no step of a rollout does"),
            );
        }
    }
}

fn names(services: &[Placed], sink: &mut Sink) {
    let mut seen: HashMap<&str, Span> = HashMap::new();
    for placed in services {
        let Some(span) = placed.name else { continue };
        let name = placed.service.name.as_str();
        if name.is_empty() {
            continue;
        }
        if let Some(first) = seen.get(name) {
            sink.error(span, format!("two services are called `{name}`"))
                .also(*first, "the first is here");
        } else {
            seen.insert(name, span);
        }
    }
}

/// Addresses × ports of one family.
fn vip_keys(placed: &Placed, v4: bool) -> u64 {
    let vips = placed.vips.items.iter().filter(|vip| vip.value.is_ipv4() == v4).count();
    (vips as u64).saturating_mul(placed.ports.items.len() as u64)
}

fn overlaps(services: &[Placed], sink: &mut Sink) {
    let mut seen: HashMap<(IpAddr, Port), (usize, Span)> = HashMap::new();
    let mut room = 2 * u64::from(MAX_VIPS);
    for (index, placed) in services.iter().enumerate() {
        // A few lines can name billions; that they are too many is said already.
        let keys = vip_keys(placed, true).saturating_add(vip_keys(placed, false));
        let Some(left) = room.checked_sub(keys) else {
            return;
        };
        room = left;
        for vip in &placed.vips.items {
            // Ports by the service that had them first.
            let mut shared: Vec<(usize, Span, Vec<String>)> = Vec::new();
            for port in &placed.ports.items {
                let key = (vip.value, port.value);
                match seen.get(&key) {
                    // Twice in one service: said there.
                    Some((other, _)) if *other == index => {}
                    Some((other, first)) => {
                        let text = port_text(port.value);
                        match shared.iter_mut().find(|(o, ..)| o == other) {
                            Some((.., ports)) => ports.push(text),
                            None => shared.push((*other, *first, vec![text])),
                        }
                    }
                    None => {
                        seen.insert(key, (index, vip.span));
                    }
                }
            }
            for (other, first, ports) in shared {
                let name = |index: usize| {
                    services.get(index).map_or("", |placed| placed.service.name.as_str())
                };
                sink.error(
                    vip.span,
                    format!(
                        "services `{}` and `{}` both have {} on {}",
                        name(other),
                        name(index),
                        vip.value,
                        ports.join(", ")
                    ),
                )
                .also(first, format!("`{}` has it here", name(other)));
            }
        }
    }
}

/// What services take of one key of `[agent.capacity]`.
struct Need<'n> {
    key: &'static str,
    /// In a sentence, after a number.
    unit: &'static str,
    capacity: u32,
    limit: u32,
    of: &'n dyn Fn(&Placed) -> u64,
}

fn capacity(agent: &agent::Placed, services: &[Placed], sink: &mut Sink) {
    let capacity = &agent.agent.capacity;
    let tables = |placed: &Placed| {
        let used = |v4| placed.vips.items.iter().any(|vip| vip.value.is_ipv4() == v4);
        u64::from(used(true)) + u64::from(used(false))
    };
    let backends = |placed: &Placed| -> u64 {
        let versions = placed.service.versions.iter();
        let all = versions.map(|version| version.backends.len() as u64).sum::<u64>();
        // Wrapped, either family's packets get to a backend: it has a record in either table.
        if placed.service.forward.wraps() { all * tables(placed) } else { all }
    };
    let buckets = |placed: &Placed| u64::from(placed.service.buckets) * tables(placed);
    // Each route has tables, with records of all backends, beside those of its service.
    let times = |placed: &Placed| 1 + placed.routes.items.len() as u64;
    let needs = [
        Need {
            key: "services",
            unit: "services",
            capacity: capacity.services,
            limit: MAX_SERVICES,
            of: &times,
        },
        Need {
            key: "vips",
            unit: "IPv4 addresses × ports",
            capacity: capacity.vips,
            limit: MAX_VIPS,
            of: &|placed| vip_keys(placed, true),
        },
        Need {
            key: "vips",
            unit: "IPv6 addresses × ports",
            capacity: capacity.vips,
            limit: MAX_VIPS,
            of: &|placed| vip_keys(placed, false),
        },
        Need {
            key: "backends",
            unit: "backends",
            capacity: capacity.backends,
            limit: MAX_BACKENDS,
            of: &|placed| backends(placed).saturating_mul(times(placed)),
        },
        Need {
            key: "buckets",
            unit: "buckets (a table for each family of each service)",
            capacity: capacity.buckets,
            limit: MAX_BUCKETS,
            of: &|placed| buckets(placed).saturating_mul(times(placed)),
        },
    ];
    let routes = || services.iter().flat_map(|placed| &placed.routes.items);
    let also = match (routes().next(), routes().any(|placed| placed.route.follows)) {
        (None, _) => "",
        (_, false) => ", counting each route as one more",
        (_, true) => ", counting each route, and each audience of a rollout, as one more",
    };
    for Need { key, unit, capacity, limit, of } in needs {
        let also = if key == "vips" { "" } else { also };
        let mut total: u64 = 0;
        let mut first_beyond = None;
        for placed in services {
            total = total.saturating_add(of(placed));
            if total > u64::from(capacity) && first_beyond.is_none() {
                first_beyond = Some(placed.span);
            }
        }
        let Some(first_beyond) = first_beyond else {
            continue;
        };
        let span = agent.capacity.get(key).copied().unwrap_or(first_beyond);
        let finding = sink.error(
            span,
            format!(
                "the services need {total} {unit}{also}, but `agent.capacity.{key}` is {capacity}{}",
                match agent.capacity.contains_key(key) {
                    true => "",
                    false => " by default",
                }
            ),
        );
        if span != first_beyond {
            finding.also(first_beyond, "the first service beyond it is here");
        }
        if total <= u64::from(limit) {
            finding.help(format!("set `{key} = {total}` or more in `[agent.capacity]`"));
        } else {
            finding.help(format!("this release has room for {limit} at most"));
        }
    }
}
