//! VIPs on interfaces: brought about, kept apart from other people's addresses, and
//! taken away again.
//!
//! An address that is added here carries [`ADDRESS_PROTOCOL`] as its `IFA_PROTO` (Linux
//! 5.18, commit 47f0bd503210), which survives the agent: what is ours needs no list. An
//! address without it is never touched.
//!
//! Owns addresses on interfaces. Must not know of services.

use std::{collections::BTreeSet, io, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{
        AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
    },
};
use nix::errno::Errno;

use super::{
    ResolveError,
    netlink::{Mode, Requests},
    wire::{self, Message},
};

/// The `IFA_PROTO` of addresses that are ours; a recent iproute2 shows it as `proto`.
/// The kernel uses 1 to 3.
pub const ADDRESS_PROTOCOL: u8 = 202;

/// "For ever", as a lifetime of an address.
const LIFETIME_INFINITE: u32 = u32::MAX;

/// An address on an interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Placed {
    /// The address.
    pub address: IpAddr,
    /// The interface's name.
    pub interface: String,
}

/// Why one address is not as it should be. The others are not affected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VipError {
    /// None of the interfaces that it could stand on is there.
    #[error("cannot add {address}: none of the interfaces {interfaces} is there")]
    NoInterface {
        /// The address.
        address: IpAddr,
        /// The names, separated by commas.
        interfaces: String,
    },
    /// The kernel refused to add it.
    #[error("cannot add {address} to {interface}: {errno}{}", hint(*errno, *address))]
    Add {
        /// The address.
        address: IpAddr,
        /// The interface's name.
        interface: String,
        /// The kernel's reason.
        errno: Errno,
    },
    /// The kernel refused to remove it.
    #[error("cannot remove {address} from {interface}: {errno}{}", hint(*errno, *address))]
    Remove {
        /// The address.
        address: IpAddr,
        /// The interface's name.
        interface: String,
        /// The kernel's reason.
        errno: Errno,
    },
}

fn hint(errno: Errno, address: IpAddr) -> &'static str {
    match (errno, address) {
        (Errno::EPERM, _) => "; changing addresses needs CAP_NET_ADMIN",
        (Errno::EACCES, IpAddr::V6(_)) => "; is IPv6 turned off there (disable_ipv6)?",
        _ => "",
    }
}

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VipReport {
    /// Added now.
    pub added: Vec<Placed>,
    /// Ours, and there already.
    pub kept: Vec<Placed>,
    /// There already, added by someone else; left alone.
    pub foreign: Vec<Placed>,
    /// Ours, not wanted there, removed now.
    pub removed: Vec<Placed>,
    /// What could not be done.
    pub errors: Vec<VipError>,
}

/// An address that stands on an interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Present {
    address: IpAddr,
    prefix_len: u8,
    ifindex: u32,
    ours: bool,
}

/// What to do.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    add: Vec<(IpAddr, u32)>,
    remove: Vec<Present>,
    kept: Vec<(IpAddr, u32)>,
    foreign: Vec<(IpAddr, u32)>,
    homeless: Vec<IpAddr>,
}

/// Where a VIP belongs: on the first of the interfaces (in order of configuration, those that
/// are there) that is directly connected to the longest prefix around it, else on the first.
fn place(vip: IpAddr, interfaces: &[u32], present: &[Present]) -> Option<u32> {
    let connected = |ifindex: u32| {
        present
            .iter()
            .filter(|one| !one.ours && one.ifindex == ifindex)
            .filter(|one| one.prefix_len < wire::family_of(vip).1)
            .filter_map(|one| IpNet::new(one.address, one.prefix_len).ok())
            .filter(|net| net.contains(&vip))
            .map(|net| net.prefix_len())
            .max()
    };
    let mut best: Option<(u32, Option<u8>)> = None;
    for &ifindex in interfaces {
        let prefix_len = connected(ifindex);
        if best.is_none_or(|(_, longest)| prefix_len > longest) {
            best = Some((ifindex, prefix_len));
        }
    }
    best.map(|(ifindex, _)| ifindex)
}

/// What brings the wanted VIPs about.
fn plan(vips: &BTreeSet<IpAddr>, interfaces: &[u32], present: &[Present]) -> Plan {
    let mut plan = Plan::default();
    let mut wanted = BTreeSet::new();
    for &vip in vips {
        // Whoever put it there, on whatever interface, decides how it is reached.
        if let Some(other) = present.iter().find(|one| one.address == vip && !one.ours) {
            plan.foreign.push((vip, other.ifindex));
            continue;
        }
        let Some(ifindex) = place(vip, interfaces, present) else {
            plan.homeless.push(vip);
            continue;
        };
        wanted.insert((vip, ifindex));
        if present.iter().any(|one| one.address == vip && one.ifindex == ifindex) {
            plan.kept.push((vip, ifindex));
        } else {
            plan.add.push((vip, ifindex));
        }
    }
    plan.remove = present
        .iter()
        .filter(|one| one.ours && !wanted.contains(&(one.address, one.ifindex)))
        .cloned()
        .collect();
    plan
}

/// Puts VIPs on interfaces.
pub struct VipManager {
    requests: Requests,
}

impl VipManager {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the socket can't be had.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> Result<Self, ResolveError> {
        let requests = Requests::open().map_err(failed)?;
        Ok(Self { requests })
    }

    /// Brings about that each of `vips` stands on one of `interfaces`, and that no other
    /// address of ours stands anywhere. To be called again when links or addresses change.
    ///
    /// # Errors
    /// When the kernel can't be asked; what concerns one address is in the report.
    pub async fn apply(
        &mut self,
        vips: impl IntoIterator<Item = IpAddr>,
        interfaces: &[String],
    ) -> Result<VipReport, ResolveError> {
        let names = self.names().await.map_err(failed)?;
        let present = self.present().await.map_err(failed)?;
        let there: Vec<u32> = interfaces
            .iter()
            .filter_map(|name| names.iter().find(|(_, other)| other == name))
            .map(|(ifindex, _)| *ifindex)
            .collect();
        let Plan { add, remove, kept, foreign, homeless } =
            plan(&vips.into_iter().collect(), &there, &present);

        let placed = |(address, ifindex): (IpAddr, u32)| Placed {
            address,
            interface: name_of(&names, ifindex),
        };
        let mut report = VipReport {
            kept: kept.into_iter().map(placed).collect(),
            foreign: foreign.into_iter().map(placed).collect(),
            ..VipReport::default()
        };
        report.errors.extend(
            homeless.into_iter().map(|address| VipError::NoInterface {
                address,
                interfaces: interfaces.join(", "),
            }),
        );
        // Added before removed: a VIP that moves to another interface is never away.
        let additions = add
            .iter()
            .map(|&(address, ifindex)| (Mode::CreateNew, new_address(address, ifindex)))
            .collect();
        let answers = self.requests.exchange(additions).await.map_err(failed)?;
        for (one, answer) in add.into_iter().zip(answers) {
            let Placed { address, interface } = placed(one);
            match answer {
                Ok(_) => report.added.push(Placed { address, interface }),
                // Someone was quicker.
                Err(Errno::EEXIST) => report.foreign.push(Placed { address, interface }),
                Err(errno) => report.errors.push(VipError::Add { address, interface, errno }),
            }
        }
        self.remove(remove, &names, &mut report).await.map_err(failed)?;
        Ok(report)
    }

    /// Removes all addresses of ours from `interfaces`.
    ///
    /// # Errors
    /// When the kernel can't be asked; what concerns one address is in the report.
    pub async fn remove_all(&mut self, interfaces: &[String]) -> Result<VipReport, ResolveError> {
        let names = self.names().await.map_err(failed)?;
        let mut present = self.present().await.map_err(failed)?;
        present.retain(|one| one.ours && interfaces.contains(&name_of(&names, one.ifindex)));
        let mut report = VipReport::default();
        self.remove(present, &names, &mut report).await.map_err(failed)?;
        Ok(report)
    }

    async fn remove(
        &mut self,
        addresses: Vec<Present>,
        names: &[(u32, String)],
        report: &mut VipReport,
    ) -> io::Result<()> {
        let removals =
            addresses.iter().map(|present| (Mode::Change, gone_address(present))).collect();
        let answers = self.requests.exchange(removals).await?;
        for (Present { address, ifindex, .. }, answer) in addresses.into_iter().zip(answers) {
            let interface = name_of(names, ifindex);
            match answer {
                // Gone with its interface, or removed by hand.
                Ok(_) | Err(Errno::EADDRNOTAVAIL | Errno::ENODEV) => {
                    report.removed.push(Placed { address, interface });
                }
                Err(errno) => report.errors.push(VipError::Remove { address, interface, errno }),
            }
        }
        Ok(())
    }

    async fn names(&mut self) -> io::Result<Vec<(u32, String)>> {
        let links = self.requests.dump(wire::all_links()).await?;
        Ok(links
            .into_iter()
            .filter_map(|message| match message {
                Message::Link(link) => Some((link.ifindex, link.name)),
                _ => None,
            })
            .collect())
    }

    async fn present(&mut self) -> io::Result<Vec<Present>> {
        let addresses = self.requests.dump(wire::all_addresses()).await?;
        Ok(addresses
            .into_iter()
            .filter_map(|message| match message {
                Message::Address(key, record) => Some(Present {
                    address: key.address,
                    prefix_len: key.prefix_len,
                    ifindex: key.ifindex,
                    ours: record.protocol == ADDRESS_PROTOCOL,
                }),
                _ => None,
            })
            .collect())
    }
}

impl std::fmt::Debug for VipManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VipManager").finish_non_exhaustive()
    }
}

fn failed(source: io::Error) -> ResolveError {
    ResolveError { action: "manage VIPs", source }
}

fn name_of(names: &[(u32, String)], ifindex: u32) -> String {
    names
        .iter()
        .find(|(index, _)| *index == ifindex)
        .map_or_else(|| format!("interface {ifindex}"), |(_, name)| name.clone())
}

fn address_message(address: IpAddr, prefix_len: u8, ifindex: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = wire::family_of(address).0;
    message.header.prefix_len = prefix_len;
    message.header.scope = AddressScope::Universe;
    message.header.index = ifindex;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

fn new_address(address: IpAddr, ifindex: u32) -> RouteNetlinkMessage {
    let mut message = address_message(address, wire::family_of(address).1, ifindex);
    message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL)));
    if address.is_ipv6() {
        // Usable at once; and deprecated, so that the host does not take it for the source of
        // its own connections (RFC 6724, rule 3), probes of backends among them.
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
        message.attributes.push(AddressAttribute::Flags(flags));
        let mut lifetimes = CacheInfo::default();
        lifetimes.ifa_valid = LIFETIME_INFINITE;
        lifetimes.ifa_preferred = 0;
        message.attributes.push(AddressAttribute::CacheInfo(lifetimes));
    }
    RouteNetlinkMessage::NewAddress(message)
}

fn gone_address(present: &Present) -> RouteNetlinkMessage {
    let Present { address, prefix_len, ifindex, ours: _ } = *present;
    RouteNetlinkMessage::DelAddress(address_message(address, prefix_len, ifindex))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn on(ifindex: u32, net: &str, ours: bool) -> Present {
        let (address, prefix_len) = net.split_once('/').unwrap();
        Present { address: ip(address), prefix_len: prefix_len.parse().unwrap(), ifindex, ours }
    }

    #[test]
    fn a_vip_goes_where_its_prefix_is_and_else_to_the_first_interface() {
        let present = [
            on(1, "127.0.0.1/8", false),
            on(2, "10.0.0.1/8", false),
            on(3, "10.1.0.1/16", false),
            on(4, "10.1.0.2/16", false),
            on(2, "10.1.9.9/32", false),
            on(3, "2001:db8::1/64", false),
        ];
        let cases = [
            ("10.2.0.9", Some(2)),
            ("10.1.0.9", Some(3)),
            ("203.0.113.1", Some(2)),
            ("2001:db8::9", Some(3)),
            ("127.0.0.9", Some(2)),
        ];
        for (vip, expected) in cases {
            assert_eq!(place(ip(vip), &[2, 3, 4], &present), expected, "{vip}");
        }
        assert_eq!(place(ip("10.1.0.9"), &[4, 3], &present), Some(4));
        assert_eq!(place(ip("10.1.0.9"), &[], &present), None);
    }

    #[test]
    fn only_what_is_ours_and_unwanted_is_removed() {
        let present = [
            on(2, "203.0.113.1/32", true),
            on(2, "203.0.113.2/32", true),
            on(1, "203.0.113.3/32", false),
            on(3, "203.0.113.4/32", true),
            on(2, "198.51.100.1/32", false),
        ];
        let vips = ["203.0.113.1", "203.0.113.3", "203.0.113.4", "203.0.113.5"].map(ip);
        assert_eq!(
            plan(&vips.into(), &[2, 3], &present),
            Plan {
                add: vec![(ip("203.0.113.4"), 2), (ip("203.0.113.5"), 2)],
                remove: vec![present[1].clone(), present[3].clone()],
                kept: vec![(ip("203.0.113.1"), 2)],
                foreign: vec![(ip("203.0.113.3"), 1)],
                homeless: vec![],
            }
        );
        let nowhere = plan(&vips.into(), &[], &present);
        assert_eq!(nowhere.homeless.len(), 3);
        assert!(nowhere.add.is_empty());
    }

    #[test]
    fn errors_name_address_and_interface() {
        let error = VipError::Add {
            address: ip("2001:db8::1"),
            interface: "eth0".to_owned(),
            errno: Errno::EACCES,
        };
        let text = error.to_string();
        assert!(text.contains("2001:db8::1") && text.contains("eth0"), "{text}");
        assert!(text.contains("disable_ipv6"), "{text}");
    }
}
