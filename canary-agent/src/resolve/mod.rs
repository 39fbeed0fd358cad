//! How this host reaches its backends: routes, neighbours, links and addresses,
//! followed over netlink; and the few things that it sets there: VIPs on interfaces
//! and reserved source ports.
//!
//! Owns the netlink sockets. Must not know of services, versions or health, nor write
//! any map: it tells what is so, `plan` decides what follows. Everything is about the
//! network namespace of the thread that calls [`Resolver::start`],
//! [`VipManager::open`] or [`reserve_ports`]; nothing here enters another.
//!
//! `wire`, `tables`, `choose`, `care`, `answers`, `silence` and the planning half of `vip` are functions
//! of plain values; `netlink`, `verify` and `task` are the shell around them. `survey` looks once, over `ask`.

mod answers;
pub(crate) mod ask;
mod care;
mod choose;
mod netlink;
mod ports;
mod silence;
mod survey;
mod tables;
mod task;
mod verify;
mod vip;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::IpAddr,
    sync::Arc,
};

use nix::errno::Errno;
use tokio::sync::{mpsc, watch};

pub use self::{
    ports::{ParsePortsError, PortSet, PortsError, release_ports, reserve_ports, reserved_ports},
    survey::{Seen, Standing, Survey, Way, survey},
    vip::{ADDRESS_PROTOCOL, Placed, VipError, VipManager, VipReport},
};
use crate::plan::{InterfaceMacs, NextHop};

/// The kernel could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} over netlink: {source}")]
pub struct ResolveError {
    /// What was tried.
    action: &'static str,
    /// Why it failed.
    source: io::Error,
}

/// Why an address has no next hop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// The host has no route to it.
    #[error("no route")]
    NoRoute,
    /// It is an address of this host.
    #[error("routes to this host")]
    Local,
    /// Its route drops packets silently.
    #[error("its route is a blackhole")]
    Blackhole,
    /// Its route says that it can't be reached.
    #[error("its route says unreachable")]
    Unreachable,
    /// Its route forbids it.
    #[error("its route says prohibited")]
    Prohibited,
    /// It is a broadcast, multicast, anycast or unspecified address.
    #[error("not the address of one host")]
    NotUnicast,
    /// It is an IPv6 link-local address, which means nothing without its interface.
    #[error("a link-local address does not say on which interface it is; use a global one")]
    LinkLocal,
    /// Its route wraps packets (MPLS, a tunnel's encapsulation), which the program does not do.
    #[error("its route encapsulates packets")]
    Encapsulated,
    /// The kernel refused to look its route up.
    #[error("the route lookup failed: {0}")]
    Lookup(Errno),
    /// The interface that its route names has just gone.
    #[error("its interface (index {ifindex}) is gone")]
    InterfaceGone {
        /// Index of the interface.
        ifindex: u32,
    },
    /// The interface that its route names is down, or has no carrier.
    #[error("{interface} is down or has no carrier")]
    InterfaceDown {
        /// Name of the interface.
        interface: String,
    },
    /// The interface that its route names does not carry Ethernet.
    #[error("{interface} is not an Ethernet interface")]
    NotEthernet {
        /// Name of the interface.
        interface: String,
    },
    /// The interface that its route names is a VLAN within a VLAN within a VLAN, or of a kind
    /// (802.1ad inside 802.1Q) that the program does not make.
    #[error(
        "{interface} needs VLAN tags that the program does not make: two at most, 802.1ad outside only"
    )]
    TooManyTags {
        /// Name of the interface.
        interface: String,
    },
    /// The neighbour's MAC address has been asked for and may come any moment.
    #[error("the MAC address of {neighbour} on {interface} is being asked for")]
    Resolving {
        /// The gateway, or the address itself where it is on the link.
        neighbour: IpAddr,
        /// Name of the interface.
        interface: String,
    },
    /// The neighbour did not answer the kernel. It is asked again every few seconds.
    #[error("{neighbour} does not answer on {interface}")]
    Silent {
        /// The gateway, or the address itself where it is on the link.
        neighbour: IpAddr,
        /// Name of the interface.
        interface: String,
    },
    /// The kernel's neighbour table is full.
    #[error(
        "no room in the kernel's neighbour table for {neighbour} on {interface}; \
         raise net.ipv4.neigh.default.gc_thresh3 or net.ipv6.neigh.default.gc_thresh3"
    )]
    TableFull {
        /// The gateway, or the address itself where it is on the link.
        neighbour: IpAddr,
        /// Name of the interface.
        interface: String,
    },
}

/// An interface as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index: another one when it has been deleted and made again.
    pub ifindex: u32,
    /// It has been set up (`IFF_UP`).
    pub up: bool,
    /// It can carry packets: up, and has a carrier (`IFF_RUNNING`).
    pub running: bool,
    /// Its MAC address; absent where it does not carry Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Bytes that fit in one packet.
    pub mtu: u32,
}

/// A next hop, or why there is none.
pub type Hop = Result<NextHop, Unresolved>;

/// All that is known at one moment. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// Each destination's next hop. One that has stopped answering stays, and says so
    /// ([`NextHop::silent`]). [`NextHop::source`] is the source that the host would use
    /// towards it, and the unspecified address where the host has none of that family.
    /// A destination that was added a moment ago is not there yet.
    pub hops: Arc<HashMap<IpAddr, Hop>>,
    /// Each interface of interest by name; `None` for one that is missing.
    pub links: Arc<BTreeMap<String, Option<Link>>>,
    /// MAC addresses that frames for this host have, by the interface of interest that they come in
    /// by.
    pub macs: Arc<BTreeMap<u32, InterfaceMacs>>,
    /// The host's own addresses, each with the index of the interface that has it. VIPs go
    /// with their interface, and IPv6 ones whenever it is set down: apply them again then.
    pub addresses: Arc<BTreeSet<(IpAddr, u32)>>,
    /// Of all neighbours that used to answer nobody does. It is as likely this host or its link,
    /// so next hops stay as they were, until the kernel gives a neighbour up.
    pub nobody_answers: bool,
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wants {
    destinations: Arc<BTreeSet<IpAddr>>,
    interfaces: Arc<BTreeSet<String>>,
}

/// Follows how to reach a set of addresses. The task behind it ends when it is dropped.
///
/// ```no_run
/// use canary_agent::resolve::Resolver;
///
/// # async fn follow() -> Result<(), Box<dyn std::error::Error>> {
/// let resolver = Resolver::start()?;
/// resolver.set_destinations(["10.0.1.1".parse()?, "2001:db8:1::1".parse()?]);
/// resolver.set_interfaces(["eth0".to_owned()]);
/// let mut updates = resolver.updates();
/// while updates.changed().await.is_ok() {
///     for (address, hop) in updates.borrow_and_update().hops.iter() {
///         match hop {
///             Ok(hop) => println!("{address} by interface {}", hop.ifindex),
///             Err(reason) => println!("{address}: {reason}"),
///         }
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Resolver {
    wants: watch::Sender<Wants>,
    signs: mpsc::Sender<Sign>,
    updates: watch::Receiver<Update>,
}

/// What others have seen of a destination.
#[derive(Clone, Copy, Debug)]
enum Sign {
    /// It seems not to be reached.
    Suspect(IpAddr),
    /// It has just been reached.
    Alive(IpAddr),
}

/// More signs than this at a time are dropped: each is asked about in its turn anyway.
const SIGNS_MAX: usize = 1024;

impl Resolver {
    /// Opens the sockets, in the network namespace of the calling thread, and starts the task
    /// on the current tokio runtime.
    ///
    /// # Errors
    /// When a socket can't be had.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start() -> Result<Self, ResolveError> {
        let failed = |source| ResolveError { action: "follow routes and neighbours", source };
        // The listener first: no change falls between reading a table and hearing of it.
        let monitor = netlink::Monitor::open().map_err(failed)?;
        let requests = netlink::Requests::open().map_err(failed)?;
        let (wants, wanted) = watch::channel(Wants::default());
        let (publish, updates) = watch::channel(Update::default());
        let (signs, seen) = mpsc::channel(SIGNS_MAX);
        // Changes that hosts announce are followed without it.
        let verifier = verify::Verifier::open()
            .inspect_err(|error| {
                tracing::warn!(
                    %error,
                    "no packet socket (CAP_NET_RAW): MAC addresses that change without \
                     being announced are followed late, and so are neighbours that die"
                );
            })
            .ok();
        let task = task::Task::new(monitor, requests, wanted, publish, seen, verifier);
        tokio::spawn(task.run());
        Ok(Self { wants, signs, updates })
    }

    /// Replaces the destinations.
    pub fn set_destinations(&self, destinations: impl IntoIterator<Item = IpAddr>) {
        let destinations: BTreeSet<_> = destinations.into_iter().collect();
        self.wants.send_if_modified(|wants| {
            let changed = *wants.destinations != destinations;
            if changed {
                wants.destinations = Arc::new(destinations);
            }
            changed
        });
    }

    /// Replaces the interfaces of interest.
    pub fn set_interfaces(&self, names: impl IntoIterator<Item = String>) {
        let interfaces: BTreeSet<_> = names.into_iter().collect();
        self.wants.send_if_modified(|wants| {
            let changed = *wants.interfaces != interfaces;
            if changed {
                wants.interfaces = Arc::new(interfaces);
            }
            changed
        });
    }

    /// Says that `destination` seems not to be reached, a failed probe for instance: its
    /// neighbour is asked at once whether its MAC address is still the same. With up to 300
    /// neighbours each is asked every 600 ms in any case.
    pub fn suspect(&self, destination: IpAddr) {
        // Dropped when there are too many.
        let _ = self.signs.try_send(Sign::Suspect(destination));
    }

    /// Says that `destination` has just been reached, by a probe that has passed for instance:
    /// its neighbour is not taken for silent, whether it answers questions or not.
    pub fn alive(&self, destination: IpAddr) {
        let _ = self.signs.try_send(Sign::Alive(destination));
    }

    /// What is known, and its changes. A receiver is only woken when something in it differs.
    pub fn updates(&self) -> watch::Receiver<Update> {
        self.updates.clone()
    }
}
