//! Verdicts on the host's network: reverse paths, forwarding, the firewall, reserved ports,
//! and where VIPs stand.

use std::net::IpAddr;

use super::{
    Check, Name,
    facts::{Facts, Found},
    read,
};
use crate::config::{Config, model::Forward};

pub(super) fn checks(config: &Config, facts: &Facts) -> Vec<Check> {
    let translates = config.services.iter().any(|service| service.forward == Forward::Nat);
    let mut checks = vec![rp_filter(config, facts), forwarding(facts), firewall(facts, translates)];
    if translates {
        checks.push(ports(config, facts));
    }
    let mut vips: Vec<IpAddr> =
        config.services.iter().flat_map(|service| service.vips.iter().copied()).collect();
    vips.sort();
    vips.dedup();
    checks.extend(vips.into_iter().map(|vip| self::vip(vip, config, facts).about(vip.to_string())));
    checks
}

fn rp_filter(config: &Config, facts: &Facts) -> Check {
    const EVIDENCE: &str = "/proc/sys/net/ipv4/conf/{all,IF}/rp_filter";
    let name = Name::RpFilter;
    let mut strict = Vec::new();
    for interface in &config.agent.interfaces {
        // One that is missing is said to be so elsewhere.
        let Some(found) = facts.settings.rp_filter.get(interface) else { continue };
        match read(found, name, EVIDENCE) {
            Err(check) => return *check,
            Ok(1) => strict.push(interface.as_str()),
            Ok(_) => {}
        }
    }
    // With one interface, every way back leads by it.
    if strict.is_empty() || config.agent.interfaces.len() < 2 {
        return Check::ok(name, "no packet is dropped for where it came in", EVIDENCE);
    }
    let names = strict.join(", ");
    let remedy: Vec<String> = std::iter::once("all")
        .chain(strict)
        .map(|interface| format!("sysctl -w net.ipv4.conf.{interface}.rp_filter=2"))
        .collect();
    Check::warning(
        name,
        format!(
            "strict on {names}: what passes to the host (answers that match no flow, ICMP, checks of backends) is \
             dropped where the way back leads by another interface; steered packets are not concerned"
        ),
        EVIDENCE,
    )
    .remedy(remedy.join("; "))
}

fn forwarding(facts: &Facts) -> Check {
    const EVIDENCE: &str = "/proc/sys/net/ipv4/ip_forward, /proc/sys/net/ipv6/conf/all/forwarding";
    let word = |found: &Found<u32>| match found {
        Ok(0) => "off".to_owned(),
        Ok(_) => "on".to_owned(),
        Err(why) => format!("unknown ({why})"),
    };
    let (v4, v6) = &facts.settings.forwarding;
    Check::ok(
        Name::Forwarding,
        format!(
            "IPv4 {}, IPv6 {}: steered packets do not need it; other packets between interfaces do",
            word(v4),
            word(v6)
        ),
        EVIDENCE,
    )
}

fn firewall(facts: &Facts, translates: bool) -> Check {
    const EVIDENCE: &str = "nfnetlink (nft list chains), /proc/net/{ip,ip6}_tables_names";
    let name = Name::Firewall;
    let firewall = match read(&facts.settings.firewall, name, EVIDENCE) {
        Err(check) => return check.remedy("sudo canary-agent doctor"),
        Ok(firewall) => firewall,
    };
    let list = |names: &std::collections::BTreeSet<String>| {
        names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
    };
    if translates && !firewall.translates.is_empty() {
        let range = "the range of `agent.nat_ports`";
        return Check::warning(
            name,
            format!(
                "the host translates addresses itself ({}), which does not keep off {range}: its connections to \
                 backends can take a port of a steered one",
                list(&firewall.translates)
            ),
            EVIDENCE,
        )
        .remedy("let the rules translate to other ports (masquerade to :32768-60999), or spare the backends' addresses");
    }
    if !firewall.drops.is_empty() {
        return Check::warning(
            name,
            format!(
                "{} drops what no rule takes: let it take echo to the VIPs, ICMP errors, and the answers to checks of \
                 backends; steered packets do not pass it",
                list(&firewall.drops)
            ),
            EVIDENCE,
        )
        .remedy("nft list ruleset, or iptables-save, shows what it takes");
    }
    let found = match firewall.filters.is_empty() && firewall.translates.is_empty() {
        true => "no firewall".to_owned(),
        false => format!(
            "{}: steered packets do not pass it, in either direction",
            list(&firewall.filters.union(&firewall.translates).cloned().collect())
        ),
    };
    Check::ok(name, found, EVIDENCE)
}

fn ports(config: &Config, facts: &Facts) -> Check {
    const EVIDENCE: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
    let name = Name::NatPorts;
    let reserved = match read(&facts.settings.reserved, name, EVIDENCE) {
        Err(check) => return *check,
        Ok(reserved) => reserved,
    };
    let wanted = &config.agent.nat_ports;
    let (first, last) = (wanted.start(), wanted.end());
    if reserved.missing(wanted).is_empty() {
        return Check::ok(
            name,
            format!("{first}-{last} are kept from the host's own connections"),
            EVIDENCE,
        );
    }
    let mut with = reserved.clone();
    with.insert(wanted);
    let remedy = format!("sysctl -w net.ipv4.ip_local_reserved_ports={with}");
    if facts.agent.is_some() {
        return Check::warning(
            name,
            format!("an agent runs, and not all of {first}-{last} are kept from the host: its own connections may take a port of a steered one"),
            EVIDENCE,
        )
        .remedy(remedy);
    }
    match facts.settings.reserved_writable {
        true => Check::ok(name, format!("a start keeps {first}-{last} from the host's own connections"), EVIDENCE),
        false => Check::warning(
            name,
            format!("{first}-{last} are not kept from the host's own connections, and this process may not set that"),
            EVIDENCE,
        )
        .remedy(remedy),
    }
}

fn vip(vip: IpAddr, config: &Config, facts: &Facts) -> Check {
    let name = Name::Vip;
    let evidence = "netlink (ip address, ip neighbour)";
    let survey = match read(&facts.network, name, evidence) {
        Err(check) => return *check,
        Ok(survey) => survey,
    };
    if let Some(mac) = facts.answered.get(&vip) {
        let [a, b, c, d, e, f] = mac;
        return Check::warning(
            name,
            format!("another host answers for it: {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
            evidence,
        )
        .remedy("on backends of `dsr`: sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2; take it off any other balancer, unless that is its stand-by");
    }
    let Some(standing) = survey.addresses.iter().find(|one| one.address == vip) else {
        return match config.agent.manage_vips {
            true => Check::ok(name, "on no interface; a start puts it there", evidence),
            false => Check::warning(
                name,
                "on no interface, and `agent.manage_vips` is false: nobody here answers ARP for it, so routers must send its packets to this host by a route",
                evidence,
            )
            .remedy(format!(
                "ip address add {vip}/{} dev {}, or set `agent.manage_vips = true`",
                if vip.is_ipv4() { 32 } else { 128 },
                config.agent.interfaces.first().map_or("IF", String::as_str)
            )),
        };
    };
    let link = survey.links.iter().find(|link| link.ifindex == standing.ifindex);
    let on = link.map_or("?", |link| link.name.as_str());
    let whose = if standing.ours { "the agent's" } else { "somebody else's, and left alone" };
    let evidence = "netlink (ip address), /proc/sys/net/ipv4/conf/{all,IF}/arp_ignore";
    // 1 and 2: only for addresses of the interface that the question came in on; 3: none of
    // local scope; 8: for none (Documentation/networking/ip-sysctl.rst).
    let ignored = config.agent.interfaces.iter().find(|interface| {
        let ignore = facts.settings.arp_ignore.get(*interface);
        match ignore {
            Some(Ok(8)) => true,
            Some(Ok(1 | 2)) => on == "lo",
            _ => false,
        }
    });
    match ignored {
        Some(interface) if vip.is_ipv4() => Check::warning(
            name,
            format!("on {on} ({whose}), and {interface} answers no ARP for it (arp_ignore)"),
            evidence,
        )
        .remedy(format!(
            "sysctl -w net.ipv4.conf.all.arp_ignore=0 net.ipv4.conf.{interface}.arp_ignore=0"
        )),
        _ => Check::ok(name, format!("on {on}, {whose}"), evidence),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

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
    fn a_good_network_is_good() {
        for check in checks(&sample::config(), &sample::facts()) {
            assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
        }
    }

    #[test]
    fn strict_reverse_paths_warn_where_there_are_two() {
        let strict = |c: &mut Config, f: &mut Facts, interfaces: usize| {
            c.agent.interfaces.truncate(interfaces);
            f.settings.rp_filter.insert("eth0".to_owned(), Ok(1));
        };
        assert_eq!(verdict(Name::RpFilter, |c, f| strict(c, f, 2)), Verdict::Warning);
        assert_eq!(verdict(Name::RpFilter, |c, f| strict(c, f, 1)), Verdict::Ok);
        let loose = |_: &mut Config, f: &mut Facts| {
            f.settings.rp_filter.insert("eth0".to_owned(), Ok(2));
        };
        assert_eq!(verdict(Name::RpFilter, loose), Verdict::Ok);
        let unread = |_: &mut Config, f: &mut Facts| {
            f.settings.rp_filter.insert("eth0".to_owned(), Err("no".to_owned()));
        };
        assert_eq!(verdict(Name::RpFilter, unread), Verdict::NotChecked);
    }

    #[test]
    fn firewalls() {
        let set = |name: &str| BTreeSet::from([name.to_owned()]);
        let firewall = |change: &dyn Fn(&mut crate::doctor::facts::Firewall), forward| {
            verdict(Name::Firewall, |c, f| {
                c.services[0].forward = forward;
                change(f.settings.firewall.as_mut().expect("read"));
            })
        };
        assert_eq!(firewall(&|f| f.filters = set("iptables filter"), Forward::Nat), Verdict::Ok);
        let translates: &dyn Fn(&mut _) = &|f: &mut crate::doctor::facts::Firewall| {
            f.translates = set("iptables nat");
        };
        assert_eq!(firewall(translates, Forward::Nat), Verdict::Warning);
        assert_eq!(firewall(translates, Forward::Dsr), Verdict::Ok);
        assert_eq!(
            firewall(&|f| f.drops = set("inet filter input"), Forward::Dsr),
            Verdict::Warning
        );
        let unread = verdict(Name::Firewall, |_, f| f.settings.firewall = Err("EPERM".to_owned()));
        assert_eq!(unread, Verdict::NotChecked);
    }

    #[test]
    fn ports_that_the_host_may_take() {
        let free = |running: bool, writable: bool| {
            verdict(Name::NatPorts, |_, f| {
                f.settings.reserved = Ok("8080".parse().expect("ports"));
                f.settings.reserved_writable = writable;
                f.agent = running.then(sample::status);
            })
        };
        assert_eq!(free(false, true), Verdict::Ok);
        assert_eq!(free(false, false), Verdict::Warning);
        assert_eq!(free(true, true), Verdict::Warning);
    }

    #[test]
    fn where_a_vip_stands() {
        let address: IpAddr = "203.0.113.10".parse().expect("an address");
        assert_eq!(verdict(Name::Vip, |c, _| c.agent.manage_vips = false), Verdict::Warning);
        let elsewhere = |_: &mut Config, f: &mut Facts| {
            f.answered.insert(address, [2; 6]);
        };
        assert_eq!(verdict(Name::Vip, elsewhere), Verdict::Warning);
        let on = |ifindex: u32, ignore: u32| {
            verdict(Name::Vip, |_, f| {
                let survey = f.network.as_mut().expect("a survey");
                survey.addresses.push(Standing { address, prefix_len: 32, ifindex, ours: true });
                f.settings.arp_ignore.insert("eth0".to_owned(), Ok(ignore));
            })
        };
        assert_eq!(on(2, 0), Verdict::Ok);
        assert_eq!(on(2, 1), Verdict::Ok);
        assert_eq!(on(2, 8), Verdict::Warning);
        assert_eq!(on(1, 1), Verdict::Warning, "on lo");
        assert_eq!(on(1, 0), Verdict::Ok);
    }
}
