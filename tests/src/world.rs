//! Worlds: which services, backends and tables the program meets in a test,
//! in a form that stands in TOML, and the data plane made from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use canary_agent::{
    config::model::{Port, Protocol},
    plan::{BackendPlan, DataPlane, Family, InterfaceMacs, NextHop, ServicePlan, Tags, Tunnel},
};
use canary_ebpf_common::{
    abi::{self, ForwardMode, LedgerEntry, PAGE_BUCKETS},
    entry::{BackendIndex, Entry},
    tunnel,
};
use serde::Deserialize;

use crate::{
    loaded::{ARRIVAL_IFINDEX, Sizes},
    names::Host,
};

/// Buckets that a packet may fall into, and the backends behind them.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct World {
    /// Its services. Each has tables for both families.
    pub service: Vec<Service>,
    /// Room for flows, of each family.
    pub flows: u32,
    /// First and last source port for translated flows.
    pub nat_ports: (u16, u16),
    /// Whether frames may leave by the interface that packets arrive on.
    pub arrival_sends: bool,
}

impl Default for World {
    fn default() -> Self {
        let sizes = Sizes::default();
        Self {
            service: Vec::new(),
            flows: sizes.flows,
            nat_ports: (*sizes.nat_ports.start(), *sizes.nat_ports.end()),
            arrival_sends: true,
        }
    }
}

/// A service of a [`World`], with as good as everything left to defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Service {
    /// Names of its addresses.
    pub vips: Vec<String>,
    /// `tcp/80` and the like.
    pub ports: Vec<String>,
    /// `dsr`, `nat`, `ipip` or `gue`.
    pub mode: String,
    /// With the latter two, what the backends' addresses are: `v4` or `v6`; else those of the
    /// packet's family.
    pub outer: String,
    /// What the way to the backends takes, in bytes.
    pub mtu: u32,
    /// A network that outer sources are of; else they are `nat`.
    pub tunnel_source: String,
    /// The MSS that SYNs announce at most; 0: whatever they have.
    pub mss: u16,
    /// `connection`, `client` or `subnet` (a /24, a /64).
    pub stickiness: String,
    /// Numbers of its backends; those above 100 are of version 1.
    pub backends: Vec<u16>,
    /// The backends' port.
    pub backend_port: u16,
    /// What the buckets say: see [`table`].
    pub table: String,
    /// Number of buckets.
    pub buckets: u32,
    /// Seconds until a silent UDP flow counts as new.
    pub udp_idle_s: u32,
    /// Whether QUIC is spoken on its UDP ports.
    pub quic: bool,
    /// Whether its connections are watched, if somebody says which ones.
    pub signals: bool,
    /// Interface that the backends are behind; that of arrival if it is empty.
    pub interface: String,
    /// VLAN tags towards the backends: `10`, `10.20` for one inside the other, `ad10.20` where the
    /// outer one is of 802.1ad.
    pub vlan: String,
    /// Names of backends that fail their checks.
    pub down: Vec<String>,
    /// Names of backends in maintenance.
    pub maint: Vec<String>,
    /// Names of backends without a next hop.
    pub unreachable: Vec<String>,
}

impl Default for Service {
    fn default() -> Self {
        Self {
            vips: vec!["vip".to_owned()],
            ports: vec!["tcp/80".to_owned(), "udp/80".to_owned()],
            mode: "dsr".to_owned(),
            outer: String::new(),
            mtu: 1500,
            tunnel_source: String::new(),
            mss: 0,
            stickiness: "connection".to_owned(),
            backends: vec![1],
            backend_port: 80,
            table: "all".to_owned(),
            buckets: PAGE_BUCKETS,
            udp_idle_s: 30,
            quic: false,
            signals: false,
            interface: String::new(),
            vlan: String::new(),
            down: Vec::new(),
            maint: Vec::new(),
            unreachable: Vec::new(),
        }
    }
}

/// A world's data plane, and who is who in it.
#[derive(Clone, Debug)]
pub struct Plane {
    /// What `Datapath::apply` takes.
    pub plane: DataPlane,
    /// Backends' numbers and their indices, those of IPv4 first.
    pub backends: Vec<(u16, Vec<BackendIndex>)>,
    /// For each service of the world, the ids of its two tables.
    pub ids: Vec<[u16; 2]>,
}

impl World {
    /// The map sizes it asks for.
    pub fn sizes(&self) -> Sizes {
        let pages: u32 = self.service.iter().map(|s| 2 * s.buckets).sum();
        let (first, last) = self.nat_ports;
        Sizes {
            flows: self.flows,
            buckets: pages.max(PAGE_BUCKETS),
            nat_ports: first..=last,
            ..Sizes::default()
        }
    }

    /// The data plane. `ifindex` says which interface has a name.
    ///
    /// # Errors
    /// When the world is not well written.
    pub fn plane(&self, ifindex: impl Fn(&str) -> Result<u32>) -> Result<Plane> {
        let mut made = Plane { plane: DataPlane::default(), backends: Vec::new(), ids: Vec::new() };
        made.plane.nat_sources = vec![Host::Nat.v4().into(), Host::Nat.v6().into()];
        let mut page = 0;
        for service in &self.service {
            let interface = match service.interface.as_str() {
                "" => ARRIVAL_IFINDEX,
                name => ifindex(name)?,
            };
            let first = made.plane.services.len() as u16;
            for family in [Family::V4, Family::V6] {
                service.add(&mut made, family, interface, page)?;
                page += service.buckets / PAGE_BUCKETS;
            }
            made.ids.push([first, first + 1]);
        }
        if self.arrival_sends {
            // Nobody's backend: it lets frames out by the interface of arrival, as attaching does.
            made.plane.backends.push((
                BackendIndex::new(1000),
                BackendPlan {
                    addr: (Host::Us.v4(), 9).into(),
                    service: 0,
                    version: 0,
                    next_hop: Some(next_hop(
                        ARRIVAL_IFINDEX,
                        Host::Us,
                        Family::V4,
                        Tags::default(),
                        1500,
                    )),
                    nat_first: 0,
                    nat_count: 1,
                    down: false,
                    drain: false,
                    maint: false,
                    slow_since_ms: None,
                    weight: 1,
                    tunnel: None,
                    mss: 0,
                },
            ));
        }
        Ok(made)
    }
}

/// A MAC address of this host's besides that of `us` and `vip9`.
pub const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x77];

/// On which interfaces frames have this host's MAC address: those that packets come in by, unless
/// it is not known there.
pub fn macs(interfaces: impl IntoIterator<Item = u32>) -> BTreeMap<u32, InterfaceMacs> {
    let own = InterfaceMacs {
        own: Host::Us.mac(),
        others: BTreeSet::from([Host::Vip(9).mac(), OTHER_MAC]),
    };
    interfaces.into_iter().map(|ifindex| (ifindex, own.clone())).collect()
}

fn next_hop(ifindex: u32, host: Host, family: Family, tags: Tags, mtu: u32) -> NextHop {
    NextHop {
        ifindex,
        source_mac: Host::Us.mac(),
        destination_mac: host.mac(),
        source: addr(Host::Nat, family),
        tags,
        mtu,
        silent: None,
    }
}

/// A host's address of a family.
pub fn addr(host: Host, family: Family) -> IpAddr {
    match family {
        Family::V4 => host.v4().into(),
        Family::V6 => host.v6().into(),
    }
}

impl Service {
    fn add(&self, made: &mut Plane, family: Family, ifindex: u32, first_page: u32) -> Result<()> {
        let id = made.plane.services.len() as u16;
        let mut indices = Vec::new();
        let tags = self.tags()?;
        let outer = match self.outer.as_str() {
            "" => family,
            "v4" => Family::V4,
            "v6" => Family::V6,
            other => bail!("{other} is no family"),
        };
        for n in &self.backends {
            let host = Host::Backend(*n);
            let name = host.name();
            let index = BackendIndex::new(made.plane.backends.len() as u16 + 1);
            let known = !self.unreachable.contains(&name);
            made.plane.backends.push((
                index,
                BackendPlan {
                    addr: (addr(host, outer), self.backend_port).into(),
                    service: id,
                    version: u8::from(*n > 100),
                    next_hop: known.then(|| next_hop(ifindex, host, outer, tags, self.mtu)),
                    nat_first: if family == Family::V4 { 0 } else { 1 },
                    nat_count: 1,
                    down: self.down.contains(&name),
                    drain: false,
                    maint: self.maint.contains(&name),
                    slow_since_ms: None,
                    weight: 1,
                    tunnel: self.tunnel()?,
                    mss: self.mss,
                },
            ));
            indices.push((name, index));
            match made.backends.iter_mut().find(|(number, _)| number == n) {
                Some((_, all)) => all.push(index),
                None => made.backends.push((*n, vec![index])),
            }
        }
        let vips: Vec<_> = self
            .vips
            .iter()
            .map(|name| match Host::named(name) {
                Some(host) => Ok(addr(host, family)),
                None => bail!("nobody is called {name}"),
            })
            .collect::<Result<_>>()?;
        made.plane.services.push(Arc::new(ServicePlan {
            name: format!("service-{id}"),
            family,
            versions: vec!["stable".to_owned(), "canary".to_owned()],
            control: 0,
            record: abi::Service { first_page, id: id.into(), ..self.record()? },
            vips,
            ports: self.ports.iter().map(|p| port(p)).collect::<Result<_>>()?,
            entries: Arc::new(table(&self.table, &indices, self.buckets)?.into()),
            ledger: Arc::new(vec![LedgerEntry::default(); self.buckets as usize].into()),
        }));
        Ok(())
    }

    /// `10`, `10.20`, `ad10.20`.
    fn tags(&self) -> Result<Tags> {
        let (service, ids) = match self.vlan.strip_prefix("ad") {
            Some(ids) => (true, ids),
            None => (false, self.vlan.as_str()),
        };
        let id = |text: &str| if text.is_empty() { Ok(0) } else { text.parse::<u16>() };
        let (outer, inner) = ids.split_once('.').unwrap_or((ids, ""));
        Ok(Tags { outer: id(outer)?, inner: id(inner)?, service })
    }

    fn tunnel(&self) -> Result<Option<Tunnel>> {
        let gue_port = match self.mode.as_str() {
            "ipip" => None,
            "gue" => Some(tunnel::GUE_PORT),
            _ => return Ok(None),
        };
        let source = match self.tunnel_source.as_str() {
            "" => None,
            network => Some(network.parse()?),
        };
        Ok(Some(Tunnel { gue_port, source }))
    }

    fn record(&self) -> Result<abi::Service> {
        let mode = match self.mode.as_str() {
            "dsr" => ForwardMode::Dsr,
            "nat" => ForwardMode::Nat,
            "ipip" => ForwardMode::Ipip,
            "gue" => ForwardMode::Gue,
            other => bail!("{other} is no mode"),
        };
        let (flags, mask_v4_be, mask_v6) = match self.stickiness.as_str() {
            "connection" => (abi::SERVICE_HASH_CONNECTION, u32::MAX, [u64::MAX; 2]),
            "client" => (0, u32::MAX, [u64::MAX; 2]),
            "subnet" => (0, 0xffff_ff00_u32.to_be(), [u64::MAX, 0]),
            other => bail!("{other} is no stickiness"),
        };
        Ok(abi::Service {
            bucket_mask: self.buckets - 1,
            flags: mode as u32
                | flags
                | if self.quic { abi::SERVICE_QUIC } else { 0 }
                | if self.signals { abi::SERVICE_SAMPLED } else { 0 },
            hash_key: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
            mask_v4_be,
            udp_idle_ms: self.udp_idle_s * 1000,
            mask_v6,
            ..abi::Service::default()
        })
    }
}

/// `tcp/80`.
fn port(text: &str) -> Result<Port> {
    let (protocol, port) = text.split_once('/').with_context(|| format!("{text} is no port"))?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => bail!("{text} is no port"),
    };
    Ok(Port { protocol, port: port.parse()? })
}

/// The entries that `text` stands for: `all` (the backends in turn), `none`,
/// `b2` (all buckets), `b2 was b1` (tracked), `b2 was b1 learning`; `mixed`:
/// every second bucket tracked, every fourth learning, `previous` the next
/// backend after `current`.
///
/// # Errors
/// When it stands for nothing.
pub fn table(text: &str, backends: &[(String, BackendIndex)], buckets: u32) -> Result<Vec<Entry>> {
    let index = |name: &str| match name {
        "none" => Ok(BackendIndex::NONE),
        _ => backends
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, index)| *index)
            .with_context(|| format!("the service has no backend {name}")),
    };
    let words: Vec<_> = text.split_whitespace().collect();
    let turn = |b: u32| backends[b as usize % backends.len()].1;
    Ok(match words[..] {
        ["all"] if !backends.is_empty() => (0..buckets).map(|b| Entry::steady(turn(b))).collect(),
        ["mixed"] if !backends.is_empty() => (0..buckets)
            .map(|b| match b % 4 {
                0 | 2 => Entry::steady(turn(b)),
                rest => Entry::tracking(turn(b), turn(b + 1), rest == 3),
            })
            .collect(),
        [one] => vec![Entry::steady(index(one)?); buckets as usize],
        [current, "was", previous] => {
            vec![Entry::tracking(index(current)?, index(previous)?, false); buckets as usize]
        }
        [current, "was", previous, "learning"] => {
            vec![Entry::tracking(index(current)?, index(previous)?, true); buckets as usize]
        }
        _ => bail!("`{text}` is no table"),
    })
}
