//! The host's links, addresses and ways at one moment, looked at once.
//!
//! Nothing is followed, waited for or changed: a neighbour that the kernel does not know
//! stays unknown. Must not know what the answers are held against.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;
use rtnetlink::{
    packet_core::{Emitable, NlasIterator},
    sys::protocols::NETLINK_ROUTE,
};

use super::{
    Hop,
    ask::{Asker, Frame},
    choose,
    tables::Tables,
    vip::ADDRESS_PROTOCOL,
    wire::{self, Message},
};

/// `sizeof(struct ifinfomsg)`.
const IFINFOMSG_LEN: usize = 16;

// linux/if_link.h
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
/// `XDP_ATTACHED_DRV`.
const ATTACHED_NATIVE: u8 = 1;
/// `NLA_TYPE_MASK`: the two highest bits are flags.
const TYPE_MASK: u16 = 0x3fff;

/// A link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// It has been set up.
    pub up: bool,
    /// It has a carrier.
    pub running: bool,
    /// It carries Ethernet.
    pub ethernet: bool,
    /// Bytes that fit in one packet.
    pub mtu: u32,
    /// What it is, where it is no plain device: `veth`, `vlan`, `bridge` …
    pub kind: Option<String>,
    /// The link below it, or its peer.
    pub lower: Option<u32>,
    /// That one is in another network namespace.
    pub lower_elsewhere: bool,
    /// The XDP program on it: its id, and whether the driver runs it.
    pub program: Option<(u32, bool)>,
}

/// An address of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Standing {
    /// The address.
    pub address: IpAddr,
    /// Length of its prefix.
    pub prefix_len: u8,
    /// The interface that has it.
    pub ifindex: u32,
    /// An agent has put it there.
    pub ours: bool,
}

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Every link.
    pub links: Vec<Seen>,
    /// Every address.
    pub addresses: Vec<Standing>,
    /// The next hop of each destination, as far as the kernel knows it at this moment.
    pub hops: BTreeMap<IpAddr, Hop>,
    /// Where frames to each destination leave, whether or not its neighbour is known.
    pub ways: BTreeMap<IpAddr, Way>,
}

/// Where frames to a destination leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    /// The interface that its route names.
    pub named: u32,
    /// The one that they leave by: that below, where the other is a VLAN's.
    pub ifindex: u32,
    /// VLAN tags that they get on the way from one to the other.
    pub tags: u32,
}

impl Survey {
    /// A link by its index.
    pub fn link(&self, ifindex: u32) -> Option<&Seen> {
        self.links.iter().find(|link| link.ifindex == ifindex)
    }

    /// Whether a link is another one, or a VLAN's device on top of it.
    pub fn stands_on(&self, link: &Seen, below: u32) -> bool {
        let mut link = Some(link);
        // A device on itself is none that the kernel makes: the bound is for what can't be.
        for _ in 0..=self.links.len() {
            let Some(one) = link else { return false };
            if one.ifindex == below {
                return true;
            }
            let vlan = one.kind.as_deref() == Some("vlan") && !one.lower_elsewhere;
            link = one.lower.filter(|_| vlan).and_then(|lower| self.link(lower));
        }
        false
    }
}

/// Looks at the network namespace of the calling thread.
///
/// # Errors
/// When the kernel can't be asked.
pub fn survey(destinations: impl IntoIterator<Item = IpAddr>) -> io::Result<Survey> {
    let mut asker = Asker::open(NETLINK_ROUTE)?;
    let frames = asker.dump(libc::RTM_GETLINK, &emitted(&wire::all_links()))?;
    let links = frames.iter().filter_map(|(_, payload)| seen(payload)).collect();
    let mut tables = Tables::default();
    let mut addresses = Vec::new();
    let neighbours = asker.dump(libc::RTM_GETNEIGH, &emitted(&wire::all_neighbours()))?;
    let standing = asker.dump(libc::RTM_GETADDR, &emitted(&wire::all_addresses()))?;
    for message in frames.iter().chain(&neighbours).chain(&standing).filter_map(read) {
        if let Message::Address(key, record) = &message {
            addresses.push(Standing {
                address: key.address,
                prefix_len: key.prefix_len,
                ifindex: key.ifindex,
                ours: record.protocol == ADDRESS_PROTOCOL,
            });
        }
        tables.apply(message);
    }
    addresses.sort();
    let (mut hops, mut ways) = (BTreeMap::new(), BTreeMap::new());
    for destination in destinations.into_iter().collect::<BTreeSet<_>>() {
        if let Some(reason) = choose::not_routable(destination) {
            hops.insert(destination, Err(reason));
            continue;
        }
        let request = emitted(&wire::route_lookup(destination));
        let answer = match asker.get(libc::RTM_GETROUTE, &request) {
            Ok(frame) => Ok(read(&frame)),
            Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
        };
        let hop = choose::route(destination, answer).and_then(|route| {
            ways.insert(destination, way(route.neighbour.ifindex, &tables));
            choose::next_hop(&route, &tables, |_| false)
        });
        hops.insert(destination, hop);
    }
    Ok(Survey { links, addresses, hops, ways })
}

fn way(named: u32, tables: &Tables) -> Way {
    match tables.link(named).and_then(|link| tables.way_down(link)) {
        Some((ifindex, tags)) => Way { named, ifindex, tags: tags.count() },
        None => Way { named, ifindex: named, tags: 0 },
    }
}

fn emitted(message: &RouteNetlinkMessage) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn read((kind, payload): &Frame) -> Option<Message> {
    wire::decode(*kind, payload).ok()
}

/// Reads a link message; `None` for one that can't be read.
fn seen(payload: &[u8]) -> Option<Seen> {
    let Ok(Message::Link(record)) = wire::decode(libc::RTM_NEWLINK, payload) else {
        return None;
    };
    let mut seen = Seen {
        ifindex: record.ifindex,
        up: record.up,
        running: record.running,
        ethernet: record.mac.is_some(),
        ..Seen::default()
    };
    for attribute in NlasIterator::new(payload.get(IFINFOMSG_LEN..)?).flatten() {
        let value = attribute.value();
        match attribute.kind() & TYPE_MASK {
            IFLA_IFNAME => seen.name = text(value),
            IFLA_MTU => seen.mtu = number(value)?,
            IFLA_LINK => seen.lower = number(value).filter(|index| *index != 0),
            IFLA_LINK_NETNSID => seen.lower_elsewhere = true,
            IFLA_LINKINFO => {
                let mut parts = NlasIterator::new(value).flatten();
                let kind = parts.find(|part| part.kind() & TYPE_MASK == IFLA_INFO_KIND);
                seen.kind = kind.map(|kind| text(kind.value()));
            }
            IFLA_XDP => seen.program = program(value),
            _ => {}
        }
    }
    Some(seen)
}

fn program(value: &[u8]) -> Option<(u32, bool)> {
    let (mut id, mut native) = (None, false);
    for part in NlasIterator::new(value).flatten() {
        match part.kind() & TYPE_MASK {
            IFLA_XDP_ATTACHED => native = part.value().first() == Some(&ATTACHED_NATIVE),
            IFLA_XDP_PROG_ID => id = number(part.value()).filter(|id| *id != 0),
            _ => {}
        }
    }
    Some((id?, native))
}

fn number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_ne_bytes)
}

fn text(value: &[u8]) -> String {
    let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_link_message_is_read_and_garbage_is_none() {
        let mut payload = vec![0; IFINFOMSG_LEN];
        // ARPHRD_ETHER; index 7; up and running.
        payload[2..4].copy_from_slice(&1_u16.to_ne_bytes());
        payload[4..8].copy_from_slice(&7_i32.to_ne_bytes());
        payload[8..12].copy_from_slice(&0x41_u32.to_ne_bytes());
        payload.extend(attribute(IFLA_IFNAME, b"eth0\0"));
        payload.extend(attribute(1, &[2; 6]));
        payload.extend(attribute(IFLA_MTU, &9000_u32.to_ne_bytes()));
        payload.extend(attribute(IFLA_LINK, &3_u32.to_ne_bytes()));
        payload.extend(attribute(IFLA_LINK_NETNSID, &0_u32.to_ne_bytes()));
        payload.extend(attribute(0x8000 | IFLA_LINKINFO, &attribute(IFLA_INFO_KIND, b"veth\0")));
        let xdp = [
            attribute(IFLA_XDP_ATTACHED, &[ATTACHED_NATIVE]),
            attribute(IFLA_XDP_PROG_ID, &42_u32.to_ne_bytes()),
        ];
        payload.extend(attribute(IFLA_XDP, &xdp.concat()));
        let expected = Seen {
            ifindex: 7,
            name: "eth0".to_owned(),
            up: true,
            running: true,
            ethernet: true,
            mtu: 9000,
            kind: Some("veth".to_owned()),
            lower: Some(3),
            lower_elsewhere: true,
            program: Some((42, true)),
        };
        assert_eq!(seen(&payload), Some(expected));
        for length in 0..payload.len() {
            let _ = seen(&payload[..length]);
        }
        assert_eq!(seen(&[]), None);
    }

    #[test]
    fn the_loopback_is_seen() {
        let here = "127.0.0.1".parse().expect("an address");
        let found = survey([here]).expect("the kernel answers");
        assert!(found.links.iter().any(|link| link.name == "lo" && !link.ethernet));
        assert!(found.addresses.iter().any(|one| one.address == here && !one.ours));
        assert_eq!(found.hops[&here], Err(super::super::Unresolved::Local));
    }
}
