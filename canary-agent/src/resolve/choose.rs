//! From a route answer and the tables to a next hop, or to why there is none.
//!
//! Pure. Must not know of sockets or time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia};
use nix::errno::Errno;

use super::{
    Unresolved,
    tables::{Tables, Trouble},
    wire::{Message, NeighbourKey, route_ip},
};
use crate::plan::NextHop;

/// The kernel's answer for one destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Who gets the frame: the gateway, or the destination where it is on the link.
    pub(super) neighbour: NeighbourKey,
    /// The source that the host would use.
    pub(super) source: IpAddr,
    /// Bytes that the route takes, where it says so or the kernel has learnt it.
    pub(super) mtu: Option<u32>,
}

/// Why no route needs to be looked up for an address, if so.
pub(super) fn not_routable(destination: IpAddr) -> Option<Unresolved> {
    match destination {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some(Unresolved::LinkLocal),
        _ if destination.is_multicast() => Some(Unresolved::NotUnicast),
        // The kernel takes "any" for this host.
        _ if destination.is_unspecified() => Some(Unresolved::NotUnicast),
        _ => None,
    }
}

/// Reads the answer to a route lookup.
pub(super) fn route(
    destination: IpAddr,
    answer: Result<Option<Message>, Errno>,
) -> Result<Route, Unresolved> {
    let message = match answer {
        Ok(Some(Message::Route(message))) => message,
        Ok(_) => return Err(Unresolved::Lookup(Errno::EBADMSG)),
        // IPv4 has errors where IPv6 has types of route (net/ipv4/fib_semantics.c, fib_props).
        Err(Errno::ENETUNREACH | Errno::ESRCH) => return Err(Unresolved::NoRoute),
        Err(Errno::EHOSTUNREACH) => return Err(Unresolved::Unreachable),
        Err(Errno::EACCES) => return Err(Unresolved::Prohibited),
        Err(Errno::EINVAL) => return Err(Unresolved::Blackhole),
        Err(errno) => return Err(Unresolved::Lookup(errno)),
    };
    match message.header.kind {
        RouteType::Unicast => unicast(destination, &message),
        RouteType::Local => Err(Unresolved::Local),
        RouteType::BlackHole => Err(Unresolved::Blackhole),
        RouteType::Unreachable => Err(Unresolved::Unreachable),
        RouteType::Prohibit => Err(Unresolved::Prohibited),
        RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast => {
            Err(Unresolved::NotUnicast)
        }
        _ => Err(Unresolved::NoRoute),
    }
}

fn unicast(destination: IpAddr, message: &RouteMessage) -> Result<Route, Unresolved> {
    let (mut ifindex, mut gateway, mut source, mut mtu) = (None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(address) => gateway = route_ip(address),
            // IPv4 by way of an IPv6 gateway (RFC 5549).
            RouteAttribute::Via(RouteVia::Inet(v4)) => gateway = Some(IpAddr::V4(*v4)),
            RouteAttribute::Via(RouteVia::Inet6(v6)) => gateway = Some(IpAddr::V6(*v6)),
            RouteAttribute::PrefSource(address) => source = route_ip(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::EncapType(_) | RouteAttribute::Encap(_) => {
                return Err(Unresolved::Encapsulated);
            }
            _ => {}
        }
    }
    let ifindex = ifindex.ok_or(Unresolved::NoRoute)?;
    let none = match destination {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    Ok(Route {
        neighbour: NeighbourKey { ifindex, address: gateway.unwrap_or(destination) },
        source: source.unwrap_or(none),
        mtu,
    })
}

/// The next hop of a route, or why there is none at present. Of a neighbour that is `silent`
/// it is the last one that is known.
pub(super) fn next_hop(
    route: &Route,
    tables: &Tables,
    silent: impl Fn(NeighbourKey) -> bool,
) -> Result<NextHop, Unresolved> {
    let Route { neighbour: key, source, mtu } = *route;
    let NeighbourKey { ifindex, address: neighbour } = key;
    let link = tables.link(ifindex).ok_or(Unresolved::InterfaceGone { ifindex })?;
    let interface = || link.name.clone();
    let Some(source_mac) = link.mac else {
        return Err(Unresolved::NotEthernet { interface: interface() });
    };
    if !(link.up && link.running) {
        return Err(Unresolved::InterfaceDown { interface: interface() });
    }
    match (tables.mac(key), tables.trouble(key)) {
        (Some(destination_mac), _) => {
            let too_many = || Unresolved::TooManyTags { interface: interface() };
            let (ifindex, tags) = tables.way_down(link).ok_or_else(too_many)?;
            let mtu = mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu));
            let silent = silent(key).then_some(neighbour);
            Ok(NextHop { ifindex, source_mac, destination_mac, source, tags, mtu, silent })
        }
        (None, None) => Err(Unresolved::Resolving { neighbour, interface: interface() }),
        (None, Some(Trouble::Silent)) => {
            Err(Unresolved::Silent { neighbour, interface: interface() })
        }
        (None, Some(Trouble::TableFull)) => {
            Err(Unresolved::TableFull { neighbour, interface: interface() })
        }
    }
}

/// The neighbour that has to be known for a route; none while its link can't carry anything.
pub(super) fn needed(route: &Route, tables: &Tables) -> Option<NeighbourKey> {
    let link = tables.link(route.neighbour.ifindex)?;
    (link.up && link.running && link.mac.is_some()).then_some(route.neighbour)
}

/// Whether the kernel can ask for a neighbour on its own account. For IPv6 it does so from a
/// link-local address (net/ipv6/ndisc.c, `ndisc_send_ns`): while the interface has none that
/// is settled, it is silent unless a packet brings another source address with it.
pub(super) fn askable(key: NeighbourKey, tables: &Tables) -> bool {
    key.address.is_ipv4() || tables.link_local(key.ifindex).is_some()
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::{
        neighbour::NeighbourState,
        route::{RouteAddress, RouteLwEnCapType},
    };

    use super::*;
    use crate::{
        plan::Tags,
        resolve::wire::{LinkRecord, Neighbour},
    };

    const DESTINATION: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 0, 9));
    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);

    fn answer(kind: RouteType, attributes: Vec<RouteAttribute>) -> Result<Option<Message>, Errno> {
        let mut message = RouteMessage::default();
        message.header.kind = kind;
        message.attributes = attributes;
        Ok(Some(Message::Route(Box::new(message))))
    }

    fn through_gateway() -> Vec<RouteAttribute> {
        vec![
            RouteAttribute::Oif(3),
            RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY)),
            RouteAttribute::PrefSource(RouteAddress::Inet(SOURCE)),
        ]
    }

    fn link(up: bool, running: bool, mac: Option<[u8; 6]>) -> Message {
        Message::Link(LinkRecord {
            ifindex: 3,
            name: "eth0".to_owned(),
            up,
            running,
            mac,
            mtu: 1500,
            below: None,
            master: None,
            vlan: None,
        })
    }

    #[test]
    fn the_gateway_is_the_neighbour_and_else_the_destination() {
        let found = route(DESTINATION, answer(RouteType::Unicast, through_gateway())).unwrap();
        assert_eq!(found.neighbour, NeighbourKey { ifindex: 3, address: GATEWAY.into() });
        assert_eq!(found.source, IpAddr::V4(SOURCE));

        let on_link = answer(RouteType::Unicast, vec![RouteAttribute::Oif(3)]);
        let found = route(DESTINATION, on_link).unwrap();
        assert_eq!(found.neighbour, NeighbourKey { ifindex: 3, address: DESTINATION });
        assert!(found.source.is_unspecified() && found.source.is_ipv4());

        let v6: Ipv6Addr = "fe80::1".parse().unwrap();
        let via = vec![RouteAttribute::Oif(3), RouteAttribute::Via(RouteVia::Inet6(v6))];
        let found = route(DESTINATION, answer(RouteType::Unicast, via)).unwrap();
        assert_eq!(found.neighbour.address, IpAddr::V6(v6));
    }

    #[test]
    fn routes_that_lead_nowhere_say_why() {
        let cases = [
            (Err(Errno::ENETUNREACH), Unresolved::NoRoute),
            (Err(Errno::EHOSTUNREACH), Unresolved::Unreachable),
            (Err(Errno::EACCES), Unresolved::Prohibited),
            (Err(Errno::EINVAL), Unresolved::Blackhole),
            (Err(Errno::ENOMEM), Unresolved::Lookup(Errno::ENOMEM)),
            (Ok(None), Unresolved::Lookup(Errno::EBADMSG)),
            (answer(RouteType::Local, vec![RouteAttribute::Oif(1)]), Unresolved::Local),
            (answer(RouteType::BlackHole, vec![RouteAttribute::Oif(1)]), Unresolved::Blackhole),
            (answer(RouteType::Unreachable, vec![]), Unresolved::Unreachable),
            (answer(RouteType::Prohibit, vec![]), Unresolved::Prohibited),
            (answer(RouteType::Broadcast, through_gateway()), Unresolved::NotUnicast),
            (answer(RouteType::Unicast, vec![]), Unresolved::NoRoute),
            (
                answer(
                    RouteType::Unicast,
                    vec![RouteAttribute::Oif(3), RouteAttribute::EncapType(RouteLwEnCapType::Mpls)],
                ),
                Unresolved::Encapsulated,
            ),
        ];
        for (answer, expected) in cases {
            assert_eq!(route(DESTINATION, answer), Err(expected));
        }
        assert_eq!(not_routable("fe80::1".parse().unwrap()), Some(Unresolved::LinkLocal));
        assert_eq!(not_routable("224.0.0.1".parse().unwrap()), Some(Unresolved::NotUnicast));
        assert_eq!(not_routable("::".parse().unwrap()), Some(Unresolved::NotUnicast));
        assert_eq!(not_routable(DESTINATION), None);
    }

    #[test]
    fn a_next_hop_needs_link_and_neighbour() {
        let route = route(DESTINATION, answer(RouteType::Unicast, through_gateway())).unwrap();
        let (interface, neighbour) = ("eth0".to_owned(), IpAddr::V4(GATEWAY));
        let mut tables = Tables::default();
        let expect = |tables: &Tables, reason| {
            assert_eq!(next_hop(&route, tables, |_| false), Err(reason));
        };

        expect(&tables, Unresolved::InterfaceGone { ifindex: 3 });
        tables.apply(link(true, true, None));
        expect(&tables, Unresolved::NotEthernet { interface: interface.clone() });
        tables.apply(link(true, false, Some([2; 6])));
        expect(&tables, Unresolved::InterfaceDown { interface: interface.clone() });
        assert_eq!(needed(&route, &tables), None);
        tables.apply(link(true, true, Some([2; 6])));
        expect(&tables, Unresolved::Resolving { neighbour, interface: interface.clone() });
        assert_eq!(needed(&route, &tables), Some(route.neighbour));
        assert!(tables.note_full(route.neighbour));
        expect(&tables, Unresolved::TableFull { neighbour, interface: interface.clone() });

        let known = |state, mac| Message::Neighbour(route.neighbour, Neighbour { state, mac });
        tables.apply(known(NeighbourState::Failed, None));
        expect(&tables, Unresolved::Silent { neighbour, interface });
        tables.apply(known(NeighbourState::Stale, Some([4; 6])));
        assert_eq!(
            next_hop(&route, &tables, |_| false),
            Ok(NextHop {
                ifindex: 3,
                source_mac: [2; 6],
                destination_mac: [4; 6],
                source: SOURCE.into(),
                tags: Tags::default(),
                mtu: 1500,
                silent: None,
            })
        );
        let hop = next_hop(&route, &tables, |key| key == route.neighbour).unwrap();
        assert_eq!((hop.destination_mac, hop.silent), ([4; 6], Some(neighbour)));
    }
}
