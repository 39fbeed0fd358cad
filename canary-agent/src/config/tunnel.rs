//! The keys of a `[[service]]` that are about packets in other packets, and about how large
//! packets are.

use std::net::IpAddr;

use canary_ebpf_common::tunnel;
use ipnet::IpNet;

use super::{
    model::{Forward, Mss},
    scalar::{self, Problem, quote},
    sink::Sink,
    versions::family_name,
    walk::{Fields, Node},
};

/// The least that a host has to take (RFC 9293, 3.7.1) is 536; Linux counts options in it as well.
const LEAST_MSS: u32 = 500;
/// What fits into the largest packet.
const MOST_MSS: u32 = 65_495;

/// `gue_port`.
pub(super) fn gue_port(
    fields: &mut Fields<'_>,
    forward: Option<Forward>,
    sink: &mut Sink,
) -> Option<u16> {
    let node = fields.take("gue_port", sink)?;
    if forward.is_some_and(|forward| forward != Forward::Gue) {
        sink.error(node.span, "`gue_port` is of use with `forward = \"gue\"` only");
    }
    node.integer(sink, 1..=u32::from(u16::MAX)).and_then(|port| u16::try_from(port).ok())
}

/// The port without the key.
pub(super) const DEFAULT_GUE_PORT: u16 = tunnel::GUE_PORT;

/// `tunnel_source`: at most one of each family.
pub(super) fn source(
    fields: &mut Fields<'_>,
    forward: Option<Forward>,
    sink: &mut Sink,
) -> Vec<IpNet> {
    let Some(node) = fields.take("tunnel_source", sink) else {
        return Vec::new();
    };
    if forward.is_some_and(|forward| !forward.wraps()) {
        sink.error(
            node.span,
            "`tunnel_source` is of use with `forward = \"ipip\"` or `\"gue\"` only",
        );
    }
    let list = node.list(sink, |item, sink| item.parse(sink, network));
    for v4 in [true, false] {
        let mut family = list.items.iter().filter(|item| item.value.addr().is_ipv4() == v4);
        if let (Some(first), Some(second)) = (family.next(), family.next()) {
            let name = family_name(first.value.addr());
            sink.error(
                second.span,
                format!("`tunnel_source` has more than one {name} source: one is the most"),
            )
            .also(first.span, "the first is here");
        }
    }
    list.values()
}

/// An address, or a network whose addresses are all sources.
fn network(text: &str) -> Result<IpNet, Problem> {
    let Some((address, _)) = text.split_once('/') else {
        return scalar::address(text).map(IpNet::from);
    };
    scalar::address(address)?;
    let network: IpNet = text.parse().map_err(|_| {
        Problem::with(
            format!("{} is no network", quote(text)),
            "write an address, or a network such as \"100.64.0.0/16\"",
        )
    })?;
    if network.addr() != network.network() {
        return Err(Problem::with(
            format!("{} has bits behind its prefix", quote(text)),
            format!("write \"{}\"", network.trunc()),
        ));
    }
    // The program fills the last four bytes.
    if matches!(network.addr(), IpAddr::V6(_)) && network.prefix_len() < 96 {
        return Err(Problem::with(
            format!(
                "{} is too wide: an IPv6 source varies in its last 32 bits at most",
                quote(text)
            ),
            "write a prefix of 96 to 128 bits",
        ));
    }
    if matches!(network.addr(), IpAddr::V4(_)) && network.prefix_len() < 8 {
        return Err(Problem::with(
            format!("{} is too wide", quote(text)),
            "write a prefix of 8 to 32 bits",
        ));
    }
    Ok(network)
}

/// `mss`.
pub(super) fn mss(node: &Node<'_>, sink: &mut Sink) -> Option<Mss> {
    if node.as_str().is_some() {
        return node.choice(sink, &[("auto", Mss::Auto)]);
    }
    let most = node.integer(sink, LEAST_MSS..=MOST_MSS)?;
    u16::try_from(most).ok().map(Mss::Most)
}
