//! `explain`: where a client's connections go, and why, in the words of the table
//! that the program reads.

use std::net::{IpAddr, SocketAddr};

use canary_ebpf_common::{
    abi,
    class::{self, ClassEntry},
    hash,
};

use super::{ExplainQuery, Refusal};
use crate::{
    api::model::Explain,
    config::{
        derived,
        model::{Port, Protocol, Stickiness},
    },
    plan::{Family, Planner, Table, followed, protocol_number},
};

/// Answers `query` about `service` from the plan that is in force.
pub(super) fn explain(
    planner: &Planner,
    service: &str,
    query: &ExplainQuery,
) -> Result<Explain, Refusal> {
    let (_, state) =
        planner.service(service).ok_or_else(|| super::split::unknown_service(planner, service))?;
    let config = state.config();
    let (client, client_port) = client(&query.from)?;
    let family = Family::of(client);
    let named = |family| if family == Family::V4 { "IPv4" } else { "IPv6" };
    let table = state.tables().iter().find(|t| t.family() == family).ok_or_else(|| {
        let message =
            format!("service `{service}` has no {} address, and {client} is one", named(family));
        refusal("no_such_family", message, "give a client of the other family")
    })?;
    let protocol = match query.protocol.as_deref() {
        None => None,
        Some("tcp") => Some(Protocol::Tcp),
        Some("udp") => Some(Protocol::Udp),
        Some(other) => {
            let message = format!("`{other}` is no protocol that is steered");
            return Err(refusal("bad_protocol", message, "give `tcp` or `udp`"));
        }
    };
    let to = match &query.to {
        None => None,
        Some(text) => {
            let to: SocketAddr = text.parse().map_err(|_| {
                let message = format!("`{text}` is no address and port");
                refusal("bad_address", message, "write `192.0.2.1:443` or `[2001:db8::1]:443`")
            })?;
            Some(SocketAddr::new(to.ip().to_canonical(), to.port()))
        }
    };
    let fits = |port: &&Port| {
        protocol.is_none_or(|p| port.protocol == p) && to.is_none_or(|to| port.port == to.port())
    };
    let vip = config
        .vips
        .iter()
        .copied()
        .find(|vip| Family::of(*vip) == family && to.is_none_or(|to| to.ip() == *vip));
    let (Some(port), Some(vip)) = (config.ports.iter().find(fits), vip) else {
        let message = format!(
            "{} is not an address and port of service `{service}`{}",
            query.to.as_deref().unwrap_or("that"),
            query.protocol.as_deref().map(|p| format!(" for {p}")).unwrap_or_default()
        );
        let help = format!("`canary-agent status {service}` shows its addresses and ports");
        return Err(refusal("not_of_service", message, &help));
    };
    let to = SocketAddr::new(vip, port.port);

    let mut answer = Explain {
        service: service.to_owned(),
        from: query.from.clone(),
        to: to.to_string(),
        protocol: protocol_name(port.protocol).to_owned(),
        ..Explain::default()
    };
    let record = planner.plane().services.iter().find(|s| s.record.id == u32::from(table.id()));
    let whole = config.stickiness == Stickiness::Connection;
    let (Some(record), false) = (record, whole && client_port.is_none()) else {
        answer.why.push(format!(
            "service `{service}` hashes whole connections, so that the bucket depends on the client's port: \
             give it as `{}`",
            SocketAddr::new(client, 50_000)
        ));
        return Ok(answer);
    };
    let from = SocketAddr::new(client, client_port.unwrap_or(0));
    let classes = &planner.plane().classes;
    let (class, steered_by, before) = followed(classes, &record.record, client);
    let mut own = (state, table);
    if let Some(audience) = planner.audience(class.current(), service) {
        answer.audience = Some(audience.to_owned());
        answer.why.push(format!(
            "audience `{audience}` is that of the first route of service `{service}` that holds {client}"
        ));
        let steered_by = |table: &&Table| u32::from(table.id()) == steered_by.id;
        let its = planner
            .service(&derived::name(service, audience))
            .and_then(|(_, state)| Some((state, state.tables().iter().find(steered_by)?)));
        own = its.unwrap_or(own);
    } else if config.routed {
        answer.why.push(format!("no route of service `{service}` holds {client}"));
    }
    let bucket = bucket(&steered_by, port.protocol, from, to);
    answer.bucket = Some(bucket);
    answer.why.push(format!(
        "{} falls into bucket {bucket} of {}",
        what_is_hashed(config.stickiness, family, from, to),
        config.buckets
    ));
    describe(&mut answer, own.0, own.1, bucket);
    if let Some(before) = before {
        class_before(&mut answer, planner, service, (class, own.1, before), bucket);
    }
    Ok(answer)
}

fn describe(answer: &mut Explain, state: &crate::plan::ServiceState, table: &Table, bucket: u32) {
    let at = bucket as usize;
    let (Some(entry), Some(owner)) = (table.entries().get(at), state.ownership().owners.get(at))
    else {
        return;
    };
    let version = state.slots().get(usize::from(*owner)).cloned().unwrap_or_default();
    let place = match *owner == state.control() {
        true => format!(
            "version `{version}` owns the bucket: it is control, which has what no other claims"
        ),
        false => {
            let share = state.ownership().split.get(&version).copied();
            let asked = share.map(|s| format!(" (asked share {s})")).unwrap_or_default();
            format!("version `{version}` owns the bucket{asked}")
        }
    };
    answer.why.push(place);
    let addr = |index| table.addr(index).map(|addr| addr.to_string());
    answer.backend = addr(entry.current());
    match &answer.backend {
        None => answer.why.push(format!(
            "version `{version}` has no usable backend, and nothing takes its place: new connections are dropped"
        )),
        Some(backend) => {
            if table.fell_back(*owner) && *owner != state.control() {
                answer.why.push(format!(
                    "version `{version}` has no usable backend, so that control's take its buckets"
                ));
            }
            answer.why.push(format!("new connections go to {backend}"));
        }
    }
    answer.version = Some(version);
    answer.tracked = entry.tracked();
    if entry.tracked() {
        answer.previous = addr(entry.previous());
        let previous = answer.previous.clone().unwrap_or_else(|| "nowhere".to_owned());
        answer.why.push(format!(
            "the bucket has moved: connections older than that stay at {previous}, those that came since stay where they went"
        ));
        if entry.learning() {
            let flows = if state.config().quic { "UDP flows without QUIC" } else { "UDP flows" };
            answer.why.push(format!("{flows} are still being learned: new ones go there as well"));
        }
    }
}

/// What is left of the class before for a client whose class has changed: all buckets of the
/// service are the same ones, in whichever table.
fn class_before(
    answer: &mut Explain,
    planner: &Planner,
    service: &str,
    (class, own, before): (ClassEntry, &Table, abi::Service),
    bucket: u32,
) {
    let tables = || planner.services().iter().flat_map(|state| state.tables());
    let earlier = tables().find(|table| u32::from(table.id()) == before.id);
    let at = bucket as usize;
    let entries = (own.entries().get(at), earlier.and_then(|table| table.entries().get(at)));
    let (Some(current), Some(previous)) = entries else { return };
    let entry = class::with_older(*current, class::older(class, *previous));
    let addr = |index| tables().find_map(|table| table.addr(index)).map(|addr| addr.to_string());
    answer.tracked = true;
    answer.previous = addr(entry.previous());
    let was = match planner.audience(class.previous(), service) {
        Some(audience) => format!("was of audience `{audience}`"),
        None => "was of no audience".to_owned(),
    };
    answer.why.push(format!(
        "the client {was} until a while ago: connections older than that stay at {}, those that came since stay where they went",
        answer.previous.as_deref().unwrap_or("nowhere")
    ));
}

/// The bucket of a connection, as the program computes it.
fn bucket(service: &abi::Service, protocol: Protocol, src: SocketAddr, dst: SocketAddr) -> u32 {
    let number = protocol_number(protocol);
    let (src_port_be, dst_port_be) = (src.port().to_be(), dst.port().to_be());
    let hash = match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let word = |ip: std::net::Ipv4Addr| u32::from_ne_bytes(ip.octets());
            hash::hash_v4(service, word(src), word(dst), src_port_be, dst_port_be, number)
        }
        (src, dst) => {
            hash::hash_v6(service, words(src), words(dst), src_port_be, dst_port_be, number)
        }
    };
    hash::bucket(service, hash)
}

fn words(ip: IpAddr) -> abi::Address {
    let bytes = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    std::array::from_fn(|half| u64::from_ne_bytes(std::array::from_fn(|i| bytes[8 * half + i])))
}

fn what_is_hashed(
    stickiness: Stickiness,
    family: Family,
    from: SocketAddr,
    to: SocketAddr,
) -> String {
    match stickiness {
        Stickiness::Connection => format!("the connection from {from} to {to}"),
        Stickiness::Client => format!("client {}", from.ip()),
        Stickiness::Subnet { v4, v6 } => {
            let length = if family == Family::V4 { v4 } else { v6 };
            match ipnet::IpNet::new(from.ip(), length) {
                Ok(net) => format!("network {}", net.trunc()),
                Err(_) => format!("the network of {}", from.ip()),
            }
        }
    }
}

/// `ADDRESS`, `ADDRESS:PORT` or `[ADDRESS]:PORT`.
fn client(text: &str) -> Result<(IpAddr, Option<u16>), Refusal> {
    let text = text.trim();
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok((ip.to_canonical(), None));
    }
    match text.parse::<SocketAddr>() {
        Ok(addr) => Ok((addr.ip().to_canonical(), Some(addr.port()))),
        Err(_) => Err(refusal(
            "bad_address",
            format!("`{text}` is no address"),
            "write `192.0.2.1`, `192.0.2.1:50000` or `[2001:db8::1]:50000`",
        )),
    }
}

/// `tcp` or `udp`.
pub(super) const fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

fn refusal(code: &'static str, message: String, help: &str) -> Refusal {
    Refusal { code, message, help: Some(help.to_owned()), exit_code: 2 }
}
