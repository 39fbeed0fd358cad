//! Model + state → desired data plane, as a pure function.
//!
//! Owns what must stay put while everything else changes: ids, pages, backend
//! indices and version slots, and the history of each bucket. Must not know of
//! the kernel, the clock, the disk or the network: times are arguments.
//!
//! A service with addresses of both families has one table for each, since a
//! bucket names one backend. Both follow the same owners, so that a client's
//! version depends on its bucket alone.

mod adopt;
mod advance;
mod alloc;
mod begin;
mod bucket_set;
mod compiler;
mod follow;
mod ownership;
mod panic;
mod placements;
mod planner;
mod prepare;
mod record;
mod reload;
mod routing;
mod slow_start;
mod table;
mod undo;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use canary_ebpf_common::{
    Packed,
    abi::{self, LedgerEntry},
    entry::{BackendIndex, Entry},
    tunnel,
};
use ipnet::IpNet;

use crate::config::model::{Port, Protocol, Service};

pub use adopt::{Adopted, AdoptedService};
pub use advance::{Advance, Advanced, Policy, Update, clear_due_ms};
pub use alloc::QUARANTINE_MS;
pub use bucket_set::BucketSet;
pub use follow::{Raise, Raises};
pub use ownership::{Ownership, Proposal};
pub use panic::{
    Diversion, Diverted, GivenBack, NobodyLeft, PanicMark, Panicking, panic_of_parked,
};
pub use planner::{News, PlanError, Planner, Preview, ServiceState, Start, Step};
pub use prepare::LEARN_MS;
pub use record::tunnel_of;
pub use reload::{Baseline, Hops, Made, Prepared, Ready, Removal, Upheaval};
pub use routing::{AdoptedClasses, ClassChange, ClassPlan, followed};
pub use slow_start::{STEPS as SLOW_START_STEPS, SlowStart};
pub use table::{BackendState, LiveBackend, Removed, Table};
pub use undo::{UndoError, Undone};

/// Milliseconds of `CLOCK_BOOTTIME`, the clock that counts suspended time.
pub type BootMs = u64;

/// An address family: each has tables and VIPs of its own, and, where packets are not wrapped,
/// backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of `addr`.
    pub const fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// Whether a backend at `addr` can have packets to the VIPs of `family`: wrapped, those of either.
pub fn serves(service: &Service, family: Family, addr: IpAddr) -> bool {
    service.forward.wraps() || Family::of(addr) == family
}

/// All that the kernel side should hold. `datapath` brings it about, writing
/// only what differs, in an order in which no packet meets half a change.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataPlane {
    /// Tables, by ascending id. One that is the very same allocation as in the
    /// plan that was applied last has not changed.
    pub services: Vec<Arc<ServicePlan>>,
    /// Backend records by index, ascending; index 0 is never among them.
    pub backends: Vec<(BackendIndex, BackendPlan)>,
    /// Elements of `NAT_SOURCES`.
    pub nat_sources: Vec<IpAddr>,
    /// Classes of clients, and their tables.
    pub classes: ClassPlan,
    /// What flow entries must go once everything above is in force.
    pub sweep: Sweep,
}

/// Flow entries that nobody may look at again.
///
/// A bucket is tracked again, and an index is given out again, only after a sweep
/// that began when the plan was in force ([`Planner::begin_sweep`]) is done
/// ([`Planner::swept`]). A plan that failed keeps what it wanted swept.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sweep {
    /// By table id, buckets that are no longer tracked: entries of theirs that
    /// do not translate addresses.
    pub buckets: Vec<(u16, Vec<u32>)>,
    /// Indices whose records are gone: all entries that name them.
    pub backends: Vec<BackendIndex>,
    /// How many networks have clients whose class before is remembered no more: entries of theirs,
    /// but for those that their bucket is looked up for.
    pub networks: usize,
}

/// One service's records and its table for one family.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePlan {
    /// Its name.
    pub name: String,
    /// Which of the service's addresses and backends this is about.
    pub family: Family,
    /// Its names of versions by slot; empty for a free slot.
    pub versions: Vec<String>,
    /// Slot of the control version.
    pub control: u8,
    /// The record that stands under each of its addresses and ports.
    pub record: abi::Service,
    /// Its addresses of the family.
    pub vips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Forwarding table: one entry a bucket. Shared, so that `datapath` passes
    /// over a service whose table is the very one it wrote last.
    pub entries: Arc<Packed<Entry>>,
    /// Ledger: one entry a bucket.
    pub ledger: Arc<Packed<LedgerEntry>>,
}

/// One backend's record before it has map form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackendPlan {
    /// Address and port.
    pub addr: SocketAddr,
    /// Id of its service.
    pub service: u16,
    /// Slot of its version.
    pub version: u8,
    /// How to reach it; `None` while no next hop is known.
    pub next_hop: Option<NextHop>,
    /// Its first address in `nat_sources`.
    pub nat_first: u16,
    /// How many of them it uses.
    pub nat_count: u8,
    /// Fails its checks.
    pub down: bool,
    /// Takes no new connections because an operator said so.
    pub drain: bool,
    /// Takes no packets at all.
    pub maint: bool,
    /// Since when it has been taking its share little by little, if it is.
    pub slow_since_ms: Option<BootMs>,
    /// Its weight; 0 for one that is not configured any more.
    pub weight: u16,
    /// How packets are wrapped for it, if they are.
    pub tunnel: Option<Tunnel>,
    /// The MSS that SYNs to it announce at most, and its own with `nat`; 0: whatever they have.
    pub mss: u16,
}

impl BackendPlan {
    /// The record in map form.
    pub fn record(&self) -> abi::Backend {
        let Self { addr, service, version, next_hop, nat_first, nat_count, .. } = *self;
        let Self { down, drain, maint, slow_since_ms, weight, tunnel, mss, .. } = *self;
        let mut flags = u32::from(weight) << abi::BACKEND_WEIGHT_SHIFT;
        let mut set = |bit: u32, on: bool| flags |= if on { bit } else { 0 };
        set(abi::BACKEND_USABLE, next_hop.is_some());
        set(abi::BACKEND_V6, addr.is_ipv6());
        set(abi::BACKEND_MAINT, maint);
        set(abi::BACKEND_DOWN, down);
        set(abi::BACKEND_DRAIN, drain);
        let eth = next_hop.map_or([0; 3], |hop| {
            let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (hop.destination_mac, hop.source_mac);
            [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
        });
        let mut record = abi::Backend {
            eth,
            ifindex: next_hop.map_or(0, |hop| hop.ifindex),
            addr: abi::address(addr.ip()),
            source: next_hop.map_or([0; 2], |hop| abi::address(hop.source)),
            port_be: addr.port().to_be(),
            version,
            nat_count,
            nat_first,
            service,
            flags,
            vlan: next_hop.map_or(0, |hop| hop.tags.word()),
            slow_since_ms: slow_since_ms.map_or(0, slow_start::mark),
            inner_mtu: next_hop.map_or(0, |hop| inner_mtu(tunnel, addr.ip(), hop.mtu)),
            mss,
            outer_sum: [0; 2],
            source_mask_be: 0,
            gue_port_be: 0,
            pad: 0,
            mtu: next_hop.map_or(0, |hop| hop.mtu),
            rest: [0; 5],
        };
        if let Some(tunnel) = tunnel {
            tunnel.outside(&mut record);
        }
        record
    }
}

/// MAC addresses that frames for this host have when they come in by an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceMacs {
    /// The interface's own.
    pub own: [u8; 6],
    /// Those of devices on top of it.
    pub others: std::collections::BTreeSet<[u8; 6]>,
}

/// VLAN tags on the way to a next hop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tags {
    /// VLAN of the outer tag; 0 for none.
    pub outer: u16,
    /// VLAN of the inner tag; 0 for none.
    pub inner: u16,
    /// Whether the outer tag is of 802.1ad.
    pub service: bool,
}

impl Tags {
    /// The tags that a word in map form stands for.
    pub const fn of(word: u32) -> Self {
        let service = word & abi::vlan::SERVICE_TAG != 0;
        Self { outer: abi::vlan::outer(word), inner: abi::vlan::inner(word), service }
    }

    /// How many there are.
    pub const fn count(self) -> u32 {
        (self.outer != 0) as u32 + (self.inner != 0) as u32
    }

    /// The word in map form.
    pub const fn word(self) -> u32 {
        abi::vlan::word(self.outer, self.inner, self.service)
    }
}

/// Bytes of the largest packet that fits through to a backend at `addr`, wrapped if it has to be,
/// when the way there takes `mtu`.
pub fn inner_mtu(tunnel: Option<Tunnel>, addr: IpAddr, mtu: u32) -> u16 {
    match tunnel {
        Some(Tunnel { gue_port, .. }) => {
            tunnel::largest_inner_bytes(mtu, addr.is_ipv6(), gue_port.is_some())
        }
        None => u16::try_from(mtu).unwrap_or(u16::MAX),
    }
}

/// Where frames for an address go, as the host's routes and neighbours say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NextHop {
    /// Outgoing interface.
    pub ifindex: u32,
    /// That interface's MAC address.
    pub source_mac: [u8; 6],
    /// The neighbour's MAC address.
    pub destination_mac: [u8; 6],
    /// The source address that the host would use.
    pub source: IpAddr,
    /// VLAN tags on the way, where the host's route leaves by a VLAN's device.
    pub tags: Tags,
    /// Bytes that the way takes: those of the interface, or of the route if it takes less (MTU).
    pub mtu: u32,
    /// The neighbour, if it has stopped answering: then this is for what is open, not for new
    /// connections.
    pub silent: Option<IpAddr>,
}

/// How packets are wrapped for a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The backend's port for packets in UDP; `None`: IP in IP.
    pub gue_port: Option<u16>,
    /// The source of outer headers, whose bits behind the prefix say which flow it is; `None`:
    /// the address that the host would use.
    pub source: Option<IpNet>,
}

impl Tunnel {
    /// Fills in what outer headers have that is the same for every packet, in the record of a
    /// backend that names it and the address that the host would send from.
    pub fn outside(self, record: &mut abi::Backend) {
        if let Some(network) = self.source {
            record.source = abi::address(network.network());
            let bits = network.max_prefix_len() - network.prefix_len();
            let mask = 1_u32.checked_shl(bits.into()).unwrap_or(0).wrapping_sub(1);
            record.source_mask_be = mask.to_be();
        }
        record.gue_port_be = self.gue_port.map_or(0, u16::to_be);
        if !record.is_v6() {
            let [source, addr] = [record.source[0] as u32, record.addr[0] as u32];
            record.outer_sum = [tunnel::IPPROTO_IPV4, tunnel::IPPROTO_IPV6].map(|inner| {
                let protocol = tunnel::outer_protocol(self.gue_port.is_some(), inner);
                tunnel::outer_sum(source, addr, protocol)
            });
        }
    }
}

/// The IP protocol number of a transport.
pub const fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => abi::IPPROTO_TCP,
        Protocol::Udp => abi::IPPROTO_UDP,
    }
}
