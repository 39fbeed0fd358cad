//! Verdicts on the ways to backends.

use std::collections::BTreeSet;

use canary_ebpf_common::tunnel;

use super::{Check, Name, facts::Facts, read};
use crate::{
    config::{
        Config,
        model::{Forward, Service},
    },
    resolve::{Seen, Survey, Unresolved, Way},
};

pub(super) fn checks(config: &Config, facts: &Facts) -> Vec<Check> {
    let survey = match read(&facts.network, Name::Backend, "netlink (ip route get)") {
        Err(check) => return vec![*check],
        Ok(survey) => survey,
    };
    let mut seen = BTreeSet::new();
    let mut checks = Vec::new();
    // Audiences have the backends of their service.
    for service in config.services.iter().filter(|service| service.derived.is_none()) {
        for backend in service.versions.iter().flat_map(|version| &version.backends) {
            let address = backend.addr.ip();
            if seen.insert(address) {
                let Some(hop) = survey.hops.get(&address) else { continue };
                checks.push(next_hop(hop, facts.probed).about(address.to_string()));
            }
        }
        checks.extend(sizes(service, config, survey));
    }
    checks
}

fn next_hop(hop: &crate::resolve::Hop, probed: bool) -> Check {
    const EVIDENCE: &str = "netlink (ip route get, ip neighbour)";
    let name = Name::Backend;
    let reason = match hop {
        Ok(hop) => {
            let [a, b, c, d, e, f] = hop.destination_mac;
            let found = format!("its next hop is {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
            return Check::ok(name, found, EVIDENCE);
        }
        Err(reason) => reason,
    };
    let failed = |remedy: &str| Check::failed(name, reason.to_string(), EVIDENCE).remedy(remedy);
    match reason {
        Unresolved::Resolving { .. } if !probed => {
            Check::not_checked(name, "its MAC address is not known yet, and a start waits for it", EVIDENCE)
        }
        Unresolved::Resolving { .. } | Unresolved::Silent { .. } => {
            Check::warning(name, reason.to_string(), EVIDENCE)
                .remedy("start the host, or look at the network between: ping, ip neighbour, tcpdump -ni IF arp or icmp6")
        }
        Unresolved::NoRoute => failed("ip route add NETWORK via GATEWAY dev IF"),
        Unresolved::Local => failed("a backend can't be an address of this host: set its `addr`"),
        Unresolved::Blackhole | Unresolved::Unreachable | Unresolved::Prohibited => {
            failed("ip route get shows the route that says so: replace it")
        }
        Unresolved::NotUnicast | Unresolved::LinkLocal => failed("set its `addr` to a global unicast address"),
        Unresolved::Encapsulated => failed("give it a route without encapsulation"),
        Unresolved::Lookup(_) => failed("ip route get shows what the kernel says"),
        Unresolved::InterfaceGone { .. } => failed("ip route shows routes by interfaces that are gone"),
        Unresolved::InterfaceDown { interface } => failed(&format!("ip link set {interface} up")),
        Unresolved::NotEthernet { .. } => failed("give it a route by an Ethernet interface"),
        Unresolved::TooManyTags { .. } => failed("give it a route by another interface"),
        Unresolved::TableFull { .. } => failed(
            "sysctl -w net.ipv4.neigh.default.gc_thresh3=16384 net.ipv6.neigh.default.gc_thresh3=16384",
        ),
    }
}

/// Bytes that forwarding adds to a packet: those of the backend that gets the most.
fn added_bytes(service: &Service) -> u32 {
    let gue = match service.forward {
        Forward::Nat | Forward::Dsr => return 0,
        Forward::Ipip => false,
        Forward::Gue => true,
    };
    let mut backends = service.versions.iter().flat_map(|version| &version.backends);
    tunnel::overhead_bytes(backends.any(|backend| backend.addr.is_ipv6()), gue).into()
}

/// Bytes of a VLAN tag.
const TAG_BYTES: u32 = 4;

/// Interfaces towards backends that take less than those that clients' packets come in by.
fn sizes(service: &Service, config: &Config, survey: &Survey) -> Vec<Check> {
    let named = |name: &String| survey.links.iter().find(|link| link.name == *name);
    let towards: BTreeSet<Way> = service
        .versions
        .iter()
        .flat_map(|version| &version.backends)
        .filter_map(|backend| survey.ways.get(&backend.addr.ip()).copied())
        .collect();
    let leads = |link: &&Seen| towards.iter().any(|way| way.ifindex == link.ifindex);
    // Those that lead to backends bring answers; clients may come by any other, or by all.
    let mut clients: Vec<_> = config.agent.interfaces.iter().filter_map(named).collect();
    if !clients.iter().all(&leads) {
        clients.retain(|link| !leads(link));
    }
    let clients = clients.into_iter().map(|link| greeted(service, link, survey));
    let Some(largest) = clients.max_by_key(|link| link.mtu) else { return Vec::new() };
    let added = added_bytes(service);
    let needs = largest.mtu.saturating_add(added);
    let mut checks = Vec::new();
    for way in towards {
        let (Some(named), Some(out)) = (survey.link(way.named), survey.link(way.ifindex)) else {
            continue;
        };
        let about = format!("{} by {}", service.name, named.name);
        let evidence = "netlink (ip link)";
        // Room for one tag is beside the MTU, for the kernel (net/core/dev.c, xdp_ok_fwd_dev) and
        // for drivers.
        let tags = way.tags.saturating_sub(1) * TAG_BYTES;
        let below = needs.saturating_add(tags);
        let (link, takes, wants, why) = if named.mtu < needs {
            (named, named.mtu, needs, String::new())
        } else if out.mtu < below {
            let why = format!(", and {} tags on the way by {}", way.tags, named.name);
            (out, out.mtu.saturating_sub(tags), below, why)
        } else {
            let found = format!("{} bytes, and packets have up to {needs}", named.mtu);
            checks.push(Check::ok(Name::BackendMtu, found, evidence).about(about));
            continue;
        };
        let found = format!(
            "{} takes {} bytes, and packets that come by {} have up to {needs}{why}: larger ones are lost",
            link.name, link.mtu, largest.name
        );
        checks.push(Check::warning(Name::BackendMtu, found, evidence).about(about).remedy(format!(
            "ip link set {} mtu {wants} (and that of the network behind it), or ip link set {} mtu {}",
            link.name,
            largest.name,
            takes.saturating_sub(added)
        )));
    }
    checks
}

/// The device that says how large packets are which come in by `link`: a VLAN's on top of it, if
/// that has the service's address.
fn greeted<'a>(service: &Service, link: &'a Seen, survey: &'a Survey) -> &'a Seen {
    let has = |one: &&Seen| {
        let here = survey.addresses.iter().filter(|standing| standing.ifindex == one.ifindex);
        here.into_iter().any(|standing| service.vips.contains(&standing.address))
    };
    let above = survey.links.iter().filter(|one| survey.stands_on(one, link.ifindex));
    above.filter(has).max_by_key(|one| one.mtu).unwrap_or(link)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::{
        doctor::{Verdict, sample},
        resolve::Standing,
    };

    fn verdict(name: Name, change: impl FnOnce(&mut Config, &mut Facts)) -> Verdict {
        let (mut config, mut facts) = (sample::config(), sample::facts());
        change(&mut config, &mut facts);
        let check = checks(&config, &facts).into_iter().find(|check| check.name == name);
        let check = check.expect("looked at");
        let bad = matches!(check.verdict, Verdict::Warning | Verdict::Failed);
        assert!(!bad || check.remedy.is_some(), "{check:?}");
        check.verdict
    }

    #[test]
    fn good_ways_are_good() {
        for check in checks(&sample::config(), &sample::facts()) {
            assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
        }
    }

    #[test]
    fn each_reason_for_no_next_hop_has_its_verdict() {
        let interface = || "eth1".to_owned();
        let neighbour: IpAddr = "10.0.1.1".parse().expect("an address");
        let resolving = Unresolved::Resolving { neighbour, interface: interface() };
        let cases = [
            (Unresolved::NoRoute, Verdict::Failed),
            (Unresolved::Local, Verdict::Failed),
            (Unresolved::Blackhole, Verdict::Failed),
            (Unresolved::Unreachable, Verdict::Failed),
            (Unresolved::Prohibited, Verdict::Failed),
            (Unresolved::NotUnicast, Verdict::Failed),
            (Unresolved::LinkLocal, Verdict::Failed),
            (Unresolved::Encapsulated, Verdict::Failed),
            (Unresolved::Lookup(nix::errno::Errno::EIO), Verdict::Failed),
            (Unresolved::InterfaceGone { ifindex: 3 }, Verdict::Failed),
            (Unresolved::InterfaceDown { interface: interface() }, Verdict::Failed),
            (Unresolved::NotEthernet { interface: interface() }, Verdict::Failed),
            (Unresolved::TooManyTags { interface: interface() }, Verdict::Failed),
            (Unresolved::TableFull { neighbour, interface: interface() }, Verdict::Failed),
            (resolving.clone(), Verdict::Warning),
            (Unresolved::Silent { neighbour, interface: interface() }, Verdict::Warning),
        ];
        for (reason, expected) in cases {
            let found = verdict(Name::Backend, |_, f| {
                let survey = f.network.as_mut().expect("a survey");
                survey.hops.insert(neighbour, Err(reason.clone()));
            });
            assert_eq!(found, expected, "{reason:?}");
        }
        let quick = verdict(Name::Backend, |_, f| {
            f.probed = false;
            f.network.as_mut().expect("a survey").hops.insert(neighbour, Err(resolving));
        });
        assert_eq!(quick, Verdict::NotChecked);
    }

    #[test]
    fn what_comes_in_must_fit_through_the_way_out() {
        let with = |eth0: u32, eth1: u32| {
            verdict(Name::BackendMtu, |_, f| {
                for link in &mut f.network.as_mut().expect("a survey").links {
                    match link.name.as_str() {
                        "eth0" => link.mtu = eth0,
                        "eth1" => link.mtu = eth1,
                        _ => {}
                    }
                }
            })
        };
        assert_eq!(with(1500, 1500), Verdict::Ok);
        assert_eq!(with(1500, 9000), Verdict::Ok);
        assert_eq!(with(9000, 1500), Verdict::Warning);
    }

    /// What becomes of a way by a VLAN's device of 1,500 bytes on eth1, or by one on that.
    fn tagged(tags: u32, eth0: u32, eth1: u32) -> Check {
        let (config, mut facts) = (sample::config(), sample::facts());
        let survey = facts.network.as_mut().expect("a survey");
        for link in &mut survey.links {
            match link.name.as_str() {
                "eth0" => link.mtu = eth0,
                "eth1" => link.mtu = eth1,
                _ => {}
            }
        }
        survey.links.push(Seen { ifindex: 9, name: "v".into(), mtu: 1500, ..Seen::default() });
        for way in survey.ways.values_mut() {
            *way = Way { named: 9, ifindex: 3, tags };
        }
        let check = checks(&config, &facts).into_iter().find(|one| one.name == Name::BackendMtu);
        check.expect("looked at")
    }

    #[test]
    fn tags_beyond_the_first_must_fit_too() {
        assert_eq!(tagged(1, 1500, 1500).verdict, Verdict::Ok);
        assert_eq!(tagged(2, 1500, 1504).verdict, Verdict::Ok);
        assert_eq!(tagged(2, 1496, 1500).verdict, Verdict::Ok);
        let check = tagged(2, 1500, 1500);
        assert_eq!(check.verdict, Verdict::Warning);
        assert!(check.found.contains("eth1 takes 1500 bytes") && check.found.contains("2 tags"));
        let remedy = check.remedy.expect("what to do");
        assert!(remedy.contains("set eth1 mtu 1504") && remedy.contains("set eth0 mtu 1496"));
        // The VLAN's own device has a limit as well.
        let check = tagged(1, 1504, 1504);
        assert!(check.found.contains("v takes 1500 bytes"), "{check:?}");
    }

    #[test]
    fn clients_in_a_vlan_send_what_its_device_takes() {
        let with = |address: &str| {
            verdict(Name::BackendMtu, |_, facts| {
                let survey = facts.network.as_mut().expect("a survey");
                survey.links.iter_mut().filter(|link| link.name == "eth0").for_each(|link| {
                    link.mtu = 1508;
                });
                survey.links.push(Seen {
                    ifindex: 9,
                    name: "eth0.7".into(),
                    kind: Some("vlan".into()),
                    lower: Some(2),
                    mtu: 1500,
                    ..Seen::default()
                });
                let address = address.parse().expect("an address");
                let standing = Standing { address, prefix_len: 32, ifindex: 9, ours: false };
                survey.addresses.push(standing);
            })
        };
        assert_eq!(with("203.0.113.10"), Verdict::Ok);
        assert_eq!(with("203.0.113.11"), Verdict::Warning);
    }
}
