//! What the kernel's messages say, in the few words that this module needs.
//!
//! Pure. Must not know of sockets or of what the messages are used for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkFlags, LinkHeader, LinkLayerType, LinkMessage},
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
    route::{RouteAddress, RouteAttribute, RouteMessage},
};
use rtnetlink::packet_core::{DecodeError, NlasIterator, Parseable};

/// `sizeof(struct ifinfomsg)`: the attributes of a link follow it.
const IFINFOMSG_LEN: usize = 16;
/// linux/rtnetlink.h, since 5.3 (commit ab84be7e54fc).
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;

/// One entry of a neighbour table is named by these two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct NeighbourKey {
    pub(super) ifindex: u32,
    pub(super) address: IpAddr,
}

/// A neighbour as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub(super) state: NeighbourState,
    pub(super) mac: Option<[u8; 6]>,
}

/// A link as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LinkRecord {
    pub(super) ifindex: u32,
    pub(super) name: String,
    pub(super) up: bool,
    pub(super) running: bool,
    /// Absent where the link does not carry Ethernet.
    pub(super) mac: Option<[u8; 6]>,
    pub(super) mtu: u32,
    /// The device that it stands on, in this network namespace.
    pub(super) below: Option<u32>,
    /// The bridge or bond that it is a port of.
    pub(super) master: Option<u32>,
    /// Its VLAN, and whether its tags are of 802.1ad.
    pub(super) vlan: Option<(u16, bool)>,
}

/// An address of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct AddressKey {
    pub(super) address: IpAddr,
    pub(super) ifindex: u32,
    pub(super) prefix_len: u8,
}

/// What goes with an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AddressRecord {
    /// `IFA_F_*`.
    pub(super) flags: u32,
    /// `IFA_PROTO`: who added it; 0 when nobody said.
    pub(super) protocol: u8,
}

/// A message from the kernel.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Message {
    Link(LinkRecord),
    LinkGone(u32),
    Neighbour(NeighbourKey, Neighbour),
    NeighbourGone(NeighbourKey),
    Address(AddressKey, AddressRecord),
    AddressGone(AddressKey),
    /// An answer to a route lookup, or a route that came or went.
    Route(Box<RouteMessage>),
    /// A policy rule or a nexthop object came, went or changed.
    RoutingPolicy,
    /// Nothing to do with us.
    Other,
}

/// Reads the message of type `kind`.
pub(super) fn decode(kind: u16, payload: &[u8]) -> Result<Message, DecodeError> {
    match kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => link(kind == libc::RTM_DELLINK, payload),
        libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => {
            Ok(neighbour(kind == libc::RTM_DELNEIGH, &NeighbourMessage::parse(payload)?))
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => {
            Ok(address(kind == libc::RTM_DELADDR, &AddressMessage::parse(payload)?))
        }
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
            Ok(Message::Route(Box::new(RouteMessage::parse(payload)?)))
        }
        libc::RTM_NEWRULE | libc::RTM_DELRULE | RTM_NEWNEXTHOP | RTM_DELNEXTHOP => {
            Ok(Message::RoutingPolicy)
        }
        _ => Ok(Message::Other),
    }
}

/// linux/if_link.h: what is inside `IFLA_LINKINFO`, and for a VLAN inside its data.
const IFLA_VLAN_ID: u16 = 1;
const IFLA_VLAN_PROTOCOL: u16 = 5;
/// linux/if_ether.h.
const ETH_P_8021AD: u16 = 0x88a8;

/// Reads what kind of link it is. Returns whether it stands on another one.
fn link_info(info: &[u8], record: &mut LinkRecord) -> Result<bool, DecodeError> {
    let (mut kind, mut data) = (&[][..], None);
    let attributes: Vec<_> = NlasIterator::new(info).collect::<Result<_, _>>()?;
    for attribute in &attributes {
        match attribute.kind() {
            libc::IFLA_INFO_KIND => {
                kind = attribute.value().split(|byte| *byte == 0).next().unwrap_or_default();
            }
            libc::IFLA_INFO_DATA => data = Some(attribute.value()),
            _ => {}
        }
    }
    if kind != b"vlan" {
        return Ok(matches!(kind, b"macvlan" | b"ipvlan" | b"macvtap" | b"ipvtap"));
    }
    let (mut id, mut service_tag) = (None, false);
    for attribute in NlasIterator::new(data.unwrap_or_default()) {
        let attribute = attribute?;
        match (attribute.kind(), attribute.value().try_into()) {
            (IFLA_VLAN_ID, Ok(value)) => id = Some(u16::from_ne_bytes(value)),
            (IFLA_VLAN_PROTOCOL, Ok(value)) => {
                service_tag = u16::from_be_bytes(value) == ETH_P_8021AD;
            }
            _ => {}
        }
    }
    record.vlan = id.map(|id| (id, service_tag));
    Ok(true)
}

/// Reads only the attributes that are needed: a link message carries dozens that
/// grow with each kernel, and one that can't be read must not hide the link.
fn link(gone: bool, payload: &[u8]) -> Result<Message, DecodeError> {
    let header = LinkHeader::parse(payload)?;
    // A bridge speaks of its ports in the same group, under a family of its own.
    if header.interface_family != AddressFamily::Unspec {
        return Ok(Message::Other);
    }
    if gone {
        return Ok(Message::LinkGone(header.index));
    }
    let ethernet = header.link_layer_type == LinkLayerType::Ether;
    let mut record = LinkRecord {
        ifindex: header.index,
        name: String::new(),
        up: header.flags.contains(LinkFlags::Up),
        running: header.flags.contains(LinkFlags::Running),
        mac: None,
        mtu: 0,
        below: None,
        master: None,
        vlan: None,
    };
    let (mut elsewhere, mut stacked) = (false, false);
    for attribute in NlasIterator::new(payload.get(IFINFOMSG_LEN..).unwrap_or_default()) {
        let attribute = attribute?;
        let value = attribute.value();
        match attribute.kind() {
            libc::IFLA_IFNAME => {
                let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
                record.name = String::from_utf8_lossy(name).into_owned();
            }
            libc::IFLA_ADDRESS if ethernet => record.mac = value.try_into().ok(),
            libc::IFLA_MTU => record.mtu = value.try_into().map_or(0, u32::from_ne_bytes),
            libc::IFLA_LINK => record.below = value.try_into().ok().map(u32::from_ne_bytes),
            libc::IFLA_LINK_NETNSID => elsewhere = true,
            libc::IFLA_MASTER => record.master = value.try_into().ok().map(u32::from_ne_bytes),
            libc::IFLA_LINKINFO => stacked = link_info(value, &mut record)?,
            _ => {}
        }
    }
    // The other end of a veth pair is named there too.
    if elsewhere || !stacked {
        record.below = None;
    }
    Ok(Message::Link(record))
}

fn neighbour(gone: bool, message: &NeighbourMessage) -> Message {
    let header = &message.header;
    // Forwarding databases of bridges have entries too, and proxies are none of our neighbours.
    if header.flags.contains(NeighbourFlags::Proxy) {
        return Message::Other;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::V4(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::V6(*v6));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    let Some(address) = address else {
        return Message::Other;
    };
    let key = NeighbourKey { ifindex: header.ifindex, address };
    if gone {
        Message::NeighbourGone(key)
    } else {
        Message::Neighbour(key, Neighbour { state: header.state, mac })
    }
}

fn address(gone: bool, message: &AddressMessage) -> Message {
    let header = &message.header;
    let (mut address, mut local, mut protocol) = (None, None, 0);
    let mut flags = u32::from(header.flags.bits());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Flags(all) => flags = all.bits(),
            AddressAttribute::Protocol(by) => protocol = u8::from(*by),
            _ => {}
        }
    }
    // On a point-to-point link `Address` is the peer's.
    let Some(address) = local.or(address) else {
        return Message::Other;
    };
    let key = AddressKey { address, ifindex: header.index, prefix_len: header.prefix_len };
    if gone {
        Message::AddressGone(key)
    } else {
        Message::Address(key, AddressRecord { flags, protocol })
    }
}

/// The prefix that a route is for.
pub(super) fn route_prefix(message: &RouteMessage) -> Option<IpNet> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => route_ip(address),
        _ => None,
    });
    let address = address.or(match message.header.address_family {
        AddressFamily::Inet => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        AddressFamily::Inet6 => Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        _ => None,
    })?;
    IpNet::new(address, message.header.destination_prefix_length).ok()
}

/// An address out of a route message, if it is one of the two families.
pub(super) fn route_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// Address family and full prefix length of an address.
pub(super) const fn family_of(address: IpAddr) -> (AddressFamily, u8) {
    match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    }
}

/// Asks which way the kernel would send a packet for `destination`.
pub(super) fn route_lookup(destination: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    (message.header.address_family, message.header.destination_prefix_length) =
        family_of(destination);
    message.attributes.push(RouteAttribute::Destination(destination.into()));
    RouteNetlinkMessage::GetRoute(message)
}

/// Makes the kernel use a neighbour, and so resolve or confirm it.
pub(super) fn neighbour_use(key: NeighbourKey) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family_of(key.address).0;
    message.header.ifindex = key.ifindex;
    message.header.state = NeighbourState::None;
    message.header.flags = NeighbourFlags::Use;
    message.attributes.push(NeighbourAttribute::Destination(key.address.into()));
    RouteNetlinkMessage::NewNeighbour(message)
}

/// Tells the kernel that a neighbour has another MAC address.
pub(super) fn neighbour_moved(key: NeighbourKey, mac: [u8; 6]) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family_of(key.address).0;
    message.header.ifindex = key.ifindex;
    message.header.state = NeighbourState::Reachable;
    message.attributes.push(NeighbourAttribute::Destination(key.address.into()));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    RouteNetlinkMessage::NewNeighbour(message)
}

/// Asks for all links.
pub(super) fn all_links() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetLink(LinkMessage::default())
}

/// Asks for all neighbours of both families.
pub(super) fn all_neighbours() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default())
}

/// Asks for all addresses of both families.
pub(super) fn all_addresses() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

/// Flags that change what an address is good for, not those that only tell of its age.
pub(super) const fn meaningful_flags(flags: u32) -> u32 {
    flags
        & (AddressFlags::Tentative.bits()
            | AddressFlags::Dadfailed.bits()
            | AddressFlags::Deprecated.bits()
            | AddressFlags::Secondary.bits())
}

/// Whether an address with these flags has been found to be nobody else's.
pub(super) const fn settled(flags: u32) -> bool {
    flags & (AddressFlags::Tentative.bits() | AddressFlags::Dadfailed.bits()) == 0
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::Emitable;

    use super::*;

    fn emitted(message: &impl Emitable) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    #[test]
    fn a_bridge_port_is_not_a_link_that_went() {
        let mut message = LinkMessage::default();
        message.header.interface_family = AddressFamily::Bridge;
        message.header.index = 7;
        assert_eq!(decode(libc::RTM_DELLINK, &emitted(&message)).unwrap(), Message::Other);
        message.header.interface_family = AddressFamily::Unspec;
        assert_eq!(decode(libc::RTM_DELLINK, &emitted(&message)).unwrap(), Message::LinkGone(7));
    }

    #[test]
    fn truncated_messages_are_errors_not_panics() {
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.family = AddressFamily::Inet;
        neighbour
            .attributes
            .push(NeighbourAttribute::Destination(IpAddr::V4(Ipv4Addr::LOCALHOST).into()));
        let RouteNetlinkMessage::GetRoute(route) = route_lookup(Ipv6Addr::LOCALHOST.into()) else {
            unreachable!("route_lookup makes a GetRoute")
        };
        for bytes in [emitted(&neighbour), emitted(&route), vec![0xff; 64]] {
            for length in 0..bytes.len() {
                for kind in 0..=RTM_DELNEXTHOP {
                    let _ = decode(kind, &bytes[..length]);
                }
            }
        }
    }

    #[test]
    fn a_route_without_destination_is_the_default_route() {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet6;
        assert_eq!(route_prefix(&message), Some("::/0".parse().unwrap()));
        message.header.address_family = AddressFamily::Mpls;
        assert_eq!(route_prefix(&message), None);
    }

    #[test]
    fn the_local_address_of_a_point_to_point_link_is_ours() {
        let mut message = AddressMessage::default();
        let (ours, theirs): (IpAddr, IpAddr) =
            ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        message.attributes = vec![AddressAttribute::Address(theirs), AddressAttribute::Local(ours)];
        let Message::Address(key, _) = address(false, &message) else { panic!("an address") };
        assert_eq!(key.address, ours);
    }
}
