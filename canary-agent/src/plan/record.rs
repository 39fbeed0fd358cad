//! Configuration and state → the records that the kernel side reads.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use canary_ebpf_common::{
    abi::{self, ForwardMode, PAGE_BUCKETS, SERVICE_HASH_CONNECTION, SERVICE_QUIC},
    entry::BackendIndex,
};
use ipnet::IpNet;

use super::{BackendPlan, Family, NextHop, Policy, ServicePlan, ServiceState, Table, Tunnel};
use crate::{
    config::model::{Existing, Forward, Mss, Protocol, Service, Stickiness},
    store::Admin,
};

/// The record of a table of `service`.
pub(super) fn service_record(service: &Service, id: u16, first_page: u32) -> abi::Service {
    let (v4, v6) = match service.stickiness {
        Stickiness::Connection | Stickiness::Client => (32, 128),
        Stickiness::Subnet { v4, v6 } => (v4.min(32), v6.min(128)),
    };
    let mode = match service.forward {
        Forward::Nat => ForwardMode::Nat,
        Forward::Dsr => ForwardMode::Dsr,
        Forward::Ipip => ForwardMode::Ipip,
        Forward::Gue => ForwardMode::Gue,
    };
    let whole = match service.stickiness {
        Stickiness::Connection => SERVICE_HASH_CONNECTION,
        Stickiness::Client | Stickiness::Subnet { .. } => 0,
    };
    let Policy { existing, drain_ms, learn_ms, .. } = policy(service);
    let mut flags = mode as u32 | whole;
    let mut set = |bit: u32, on: bool| flags |= if on { bit } else { 0 };
    set(SERVICE_QUIC, service.quic);
    set(abi::SERVICE_SAMPLED, service.signals);
    set(abi::SERVICE_ROUTED, service.routed);
    set(abi::SERVICE_OF_AUDIENCE, service.derived.is_some());
    set(abi::SERVICE_FORGETS, existing == Existing::Move || drain_ms == Some(0));
    set(abi::SERVICE_LEARNS, learn_ms.is_some());
    abi::Service {
        first_page,
        bucket_mask: service.buckets - 1,
        flags,
        id: u32::from(id),
        hash_key: service.hash_key,
        mask_v4_be: u32::MAX.checked_shl(32 - u32::from(v4)).unwrap_or(0).to_be(),
        udp_idle_ms: millis_u32(service.udp_idle),
        mask_v6: mask_v6(v6),
    }
}

/// The first `length` bits, as the two words that loading an address gives.
fn mask_v6(length: u8) -> [u64; 2] {
    let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
    let (high, low) = ((mask >> 64) as u64, mask as u64);
    [u64::from_be(high), u64::from_be(low)]
}

fn millis_u32(duration: std::time::Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// How many pages a table of `service` takes.
pub(super) fn page_count(service: &Service) -> u32 {
    service.buckets.div_ceil(PAGE_BUCKETS)
}

/// What `service` wants done with connections when buckets move.
pub(super) fn policy(service: &Service) -> Policy {
    let millis = |d: std::time::Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let udp = service.ports.iter().any(|port| port.protocol == Protocol::Udp);
    Policy {
        tracks: !service.forward.translates(),
        existing: service.existing,
        drain_ms: service.drain.map(millis),
        learn_ms: udp.then(|| millis(service.udp_idle)),
    }
}

/// The plan of a table.
pub(super) fn service_plan(
    config: &Service,
    slots: &[String],
    control: u8,
    table: &Table,
) -> ServicePlan {
    // The table of an audience is found by its clients, not by an address.
    let vips = config.vips.iter().copied().filter(|_| config.derived.is_none());
    let vips = vips.filter(|vip| Family::of(*vip) == table.family);
    ServicePlan {
        name: config.name.clone(),
        family: table.family,
        versions: slots.to_vec(),
        control,
        record: service_record(config, table.id, table.first_page),
        vips: vips.collect(),
        ports: config.ports.clone(),
        entries: Arc::clone(&table.entries),
        ledger: Arc::clone(&table.ledger),
    }
}

/// Every backend's record, by ascending index.
pub(super) fn backend_plans(
    services: &[ServiceState],
    nat_ranges: &mut HashMap<Vec<IpAddr>, u16>,
    nat_sources: &mut Vec<IpAddr>,
) -> Vec<(BackendIndex, BackendPlan)> {
    let mut plans = Vec::new();
    for state in services {
        for table in &state.tables {
            let mut plan = |index, version, addr, hop: &Result<NextHop, String>| {
                let next_hop = hop.as_ref().ok().copied();
                let silent = next_hop.is_some_and(|hop| hop.silent.is_some());
                let tunnel = tunnel_of(&state.config, addr);
                let range = nat_range(&state.config, addr, next_hop, nat_ranges, nat_sources);
                // Without a source of its own it would get somebody else's.
                let next_hop = next_hop.filter(|_| range.is_some());
                let (nat_first, nat_count) = range.unwrap_or((0, 0));
                let plan = BackendPlan {
                    addr,
                    service: table.id,
                    version,
                    next_hop,
                    nat_first,
                    nat_count,
                    // Its half-open connections are as lost as with one that fails its checks.
                    down: silent,
                    drain: false,
                    maint: false,
                    slow_since_ms: None,
                    weight: 0,
                    tunnel,
                    mss: next_hop
                        .map_or(0, |hop| mss(&state.config, table.family, tunnel, addr, hop)),
                };
                (index, plan)
            };
            for b in &table.backends {
                let (index, made) = plan(b.index, b.slot, b.addr, &b.hop);
                let slow_since_ms = b.slow_start.since_ms();
                let (drain, maint) = (b.admin == Admin::Drain, b.admin == Admin::Maint);
                let weight = u16::try_from(b.weight).unwrap_or(u16::MAX);
                plans.push((
                    index,
                    BackendPlan {
                        down: b.down || made.down,
                        drain,
                        maint,
                        slow_since_ms,
                        weight,
                        ..made
                    },
                ));
            }
            for d in &table.draining {
                let (index, made) = plan(d.index, d.slot, d.addr, &d.hop);
                plans.push((
                    index,
                    BackendPlan { down: d.down || made.down, maint: d.maint, ..made },
                ));
            }
        }
    }
    plans.sort_unstable_by_key(|(index, _)| *index);
    plans
}

/// How packets are wrapped for a backend of `service`, if they are.
pub fn tunnel_of(service: &Service, addr: SocketAddr) -> Option<Tunnel> {
    let gue_port = match service.forward {
        Forward::Nat | Forward::Dsr => return None,
        Forward::Ipip => None,
        Forward::Gue => Some(service.gue_port),
    };
    let same_family = |network: &&IpNet| Family::of(network.addr()) == Family::of(addr.ip());
    Some(Tunnel { gue_port, source: service.tunnel_source.iter().find(same_family).copied() })
}

/// The MSS that SYNs of a table of `family` announce at most; 0 where `service` leaves it.
fn mss(
    service: &Service,
    family: Family,
    tunnel: Option<Tunnel>,
    addr: SocketAddr,
    hop: NextHop,
) -> u16 {
    match service.mss {
        None => 0,
        Some(Mss::Most(most)) => most,
        Some(Mss::Auto) => {
            // TCP and the header of the packet that clients send, without options.
            let headers = if family == Family::V4 { 40 } else { 60 };
            super::inner_mtu(tunnel, addr.ip(), hop.mtu).saturating_sub(headers)
        }
    }
}

/// The lists of source addresses that the configuration names, and how many elements they take.
/// Those that follow from routes come on top.
pub(super) fn configured_nat_sources<'a>(
    services: impl Iterator<Item = &'a Service>,
) -> Result<(), (String, usize)> {
    let mut lists = HashSet::new();
    let mut needed = 0;
    for service in services.filter(|service| service.forward == Forward::Nat) {
        for family in [Family::V4, Family::V6] {
            let list = configured(service, family);
            let length = list.len();
            if lists.insert(list) {
                needed += length;
            }
        }
        if needed > abi::NAT_SOURCES as usize {
            return Err((service.name.clone(), needed));
        }
    }
    Ok(())
}

/// Whether the lists of `services` find room beside those of earlier configurations, which stay
/// where they are. If not: the first that does not, and how many elements it would take.
pub(super) fn room_for_nat_sources<'a>(
    services: impl Iterator<Item = &'a Service>,
    ranges: &HashMap<Vec<IpAddr>, u16>,
    used: usize,
) -> Result<(), (String, usize)> {
    let (mut new, mut needed) = (HashSet::new(), used);
    for service in services.filter(|service| service.forward == Forward::Nat) {
        for family in [Family::V4, Family::V6] {
            let list = configured(service, family);
            let length = list.len();
            if !ranges.contains_key(&list) && new.insert(list) {
                needed += length;
            }
        }
        if needed > abi::NAT_SOURCES as usize {
            return Err((service.name.clone(), needed));
        }
    }
    Ok(())
}

fn configured(service: &Service, family: Family) -> Vec<IpAddr> {
    service.nat_source.iter().copied().filter(|ip| Family::of(*ip) == family).collect()
}

/// Where in `NAT_SOURCES` a backend's addresses lie, put there if they are new.
/// What lies there stays: records that are in force refer to it. `None` if there is no room, or
/// no address.
fn nat_range(
    service: &Service,
    addr: SocketAddr,
    next_hop: Option<NextHop>,
    ranges: &mut HashMap<Vec<IpAddr>, u16>,
    sources: &mut Vec<IpAddr>,
) -> Option<(u16, u8)> {
    if service.forward != Forward::Nat {
        return Some((0, 0));
    }
    let family = Family::of(addr.ip());
    let mut wanted = configured(service, family);
    if wanted.is_empty() {
        let source = next_hop.map(|hop| hop.source);
        wanted.extend(source.filter(|ip| !ip.is_unspecified() && Family::of(*ip) == family));
    }
    wanted.truncate(usize::from(u8::MAX));
    let count = u8::try_from(wanted.len()).ok().filter(|count| *count > 0)?;
    if let Some(first) = ranges.get(&wanted) {
        return Some((*first, count));
    }
    if sources.len() + wanted.len() > abi::NAT_SOURCES as usize {
        return None;
    }
    let first = u16::try_from(sources.len()).ok()?;
    sources.extend(&wanted);
    ranges.insert(wanted, first);
    Some((first, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_addresses_beyond_the_map_are_given_to_nobody() {
        let (mut ranges, mut sources) = (HashMap::new(), Vec::new());
        let mut service = Service {
            name: "shop".to_owned(),
            vips: Vec::new(),
            ports: Vec::new(),
            forward: Forward::Nat,
            nat_source: Vec::new(),
            tunnel_source: Vec::new(),
            gue_port: 6080,
            mss: None,
            stickiness: Stickiness::Client,
            control: 0,
            existing: Existing::Pin,
            drain: None,
            udp_idle: std::time::Duration::from_secs(30),
            quic: false,
            signals: false,
            slow_start: std::time::Duration::ZERO,
            fallback: crate::config::model::Fallback::Control,
            split: Default::default(),
            routes: Vec::new(),
            routed: false,
            derived: None,
            health: crate::config::model::Health::None,
            buckets: 4096,
            hash_key: [0; 2],
            versions: Vec::new(),
        };
        let backend = "10.0.0.1:80".parse().unwrap();
        let list = |n: u32| (0..128).map(|i| std::net::Ipv4Addr::from(n << 8 | i).into()).collect();
        for n in 1..=32 {
            service.nat_source = list(n);
            let range = nat_range(&service, backend, None, &mut ranges, &mut sources);
            assert_eq!(range, Some((n as u16 * 128 - 128, 128)));
        }
        service.nat_source = list(33);
        assert_eq!(nat_range(&service, backend, None, &mut ranges, &mut sources), None);
        assert_eq!(sources.len(), 4096);
        service.nat_source = list(7);
        assert_eq!(nat_range(&service, backend, None, &mut ranges, &mut sources), Some((768, 128)));
        let services: Vec<_> =
            (1..=33).map(|n| Service { nat_source: list(n), ..service.clone() }).collect();
        assert_eq!(configured_nat_sources(services[..32].iter()), Ok(()));
        assert_eq!(configured_nat_sources(services.iter()), Err(("shop".to_owned(), 33 * 128)));
    }

    #[test]
    fn masks_cover_the_first_bits_of_an_address_as_it_is_loaded() {
        let masked = |address: u128, length| {
            let bytes = address.to_be_bytes();
            let [high, low] = mask_v6(length);
            let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
            let out = [word(0) & high, word(8) & low].map(u64::to_ne_bytes).concat();
            u128::from_be_bytes(std::array::from_fn(|i| out[i]))
        };
        for length in [0, 1, 7, 48, 56, 63, 64, 65, 127, 128] {
            let expected = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            assert_eq!(masked(u128::MAX, length), expected, "/{length}");
        }
    }
}
