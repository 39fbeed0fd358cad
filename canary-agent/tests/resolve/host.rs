//! VIPs on interfaces and reserved ports.

use std::{
    net::{IpAddr, TcpListener, UdpSocket},
    ops::RangeInclusive,
};

use crate::netns::{Peer, ip, ip_addr, ip_output, isolated, until};
use canary_agent::resolve::{
    Placed, PortSet, Resolver, VipError, VipManager, VipReport, release_ports, reserve_ports,
};

const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Two links: `c0` with 10.0.1.1/24 and 2001:db8:1::1/64, `c1` with the same in net 2.
fn two_links() -> [Peer; 2] {
    let peers = [Peer::new(), Peer::new()];
    peers[0].connect("c0", "p0", 1);
    peers[1].connect("c1", "p1", 2);
    peers
}

fn interfaces() -> [String; 2] {
    ["c0", "c1"].map(str::to_owned)
}

fn on(interface: &str, addresses: &[&str]) -> Vec<Placed> {
    addresses
        .iter()
        .map(|address| Placed { address: ip_addr(address), interface: interface.to_owned() })
        .collect()
}

fn vips(addresses: &[&str]) -> Vec<IpAddr> {
    addresses.iter().map(|address| ip_addr(address)).collect()
}

/// What `ip` says of the addresses of an interface, a line each.
fn addresses_of(interface: &str) -> String {
    ip_output(&format!("-oneline address show dev {interface}"))
}

#[test]
fn vips_are_added_kept_after_a_restart_and_removed() {
    isolated(|| async {
        let _peers = two_links();
        let wanted = ["203.0.113.1", "2001:db8:77::1", "10.0.2.80", "2001:db8:2::80"];
        let report = VipManager::open().unwrap().apply(vips(&wanted), &interfaces()).await.unwrap();
        assert_eq!(report.errors, []);
        let (first, second) = (
            on("c0", &["203.0.113.1", "2001:db8:77::1"]),
            on("c1", &["10.0.2.80", "2001:db8:2::80"]),
        );
        let all = |mut placed: Vec<Placed>| {
            placed.sort();
            placed
        };
        let everywhere = all([first, second].concat());
        assert_eq!(all(report.added), everywhere);
        assert!(addresses_of("c0").contains("203.0.113.1/32"));
        assert!(addresses_of("c1").contains("2001:db8:2::80/128"));

        // Another process: what is ours is known by what the kernel keeps.
        let mut manager = VipManager::open().unwrap();
        let again = manager.apply(vips(&wanted), &interfaces()).await.unwrap();
        assert_eq!(all(again.kept.clone()), everywhere);
        assert_eq!(VipReport { kept: vec![], ..again }, VipReport::default());

        let fewer = manager.apply(vips(&wanted[..1]), &interfaces()).await.unwrap();
        assert_eq!(fewer.removed.len(), 3);
        assert!(!addresses_of("c1").contains("2001:db8:2::80"));
        let none = VipManager::open().unwrap().remove_all(&interfaces()).await.unwrap();
        assert_eq!(none.removed, on("c0", &["203.0.113.1"]));
        assert!(addresses_of("c0").contains("10.0.1.1/24"), "what was there stays");
        assert!(addresses_of("c0").contains("2001:db8:1::1/64"));
    });
}

#[test]
fn addresses_of_others_are_left_alone() {
    isolated(|| async {
        let _peers = two_links();
        ip("address add 203.0.113.1/32 dev c0");
        ip("address add 203.0.113.2/32 dev lo");
        ip("-6 address add 2001:db8:77::1/128 dev c1");
        let mut manager = VipManager::open().unwrap();
        let wanted = vips(&["203.0.113.1", "203.0.113.2", "2001:db8:77::1"]);
        let report = manager.apply(wanted, &interfaces()).await.unwrap();
        assert_eq!(report.foreign.len(), 3);
        assert_eq!(VipReport { foreign: vec![], ..report }, VipReport::default());
        let nothing = manager.apply([], &interfaces()).await.unwrap();
        assert_eq!(nothing, VipReport::default());
        let nothing = manager.remove_all(&interfaces()).await.unwrap();
        assert_eq!(nothing, VipReport::default());
        assert!(addresses_of("c0").contains("203.0.113.1/32"));
        assert!(addresses_of("lo").contains("203.0.113.2/32"));
        assert!(addresses_of("c1").contains("2001:db8:77::1/128"));
    });
}

#[test]
fn an_ipv6_vip_can_be_used_at_once_and_is_nobodys_source() {
    isolated(|| async {
        let _peers = two_links();
        ip("link set c0 down");
        ip("link set c0 up");
        ip("-6 address add 2001:db8:1::1/64 dev c0 nodad");
        let mut manager = VipManager::open().unwrap();
        let wanted = vips(&["2001:db8:1::80", "10.0.1.80"]);
        let report = manager.apply(wanted, &interfaces()).await.unwrap();
        assert_eq!(report.errors, []);
        for vip in ["2001:db8:1::80", "10.0.1.80"] {
            // A tentative address can't be bound.
            TcpListener::bind((ip_addr(vip), 443)).unwrap();
        }
        for (destination, source) in
            [("[2001:db8:1::2]:9", "2001:db8:1::1"), ("10.0.1.2:9", "10.0.1.1")]
        {
            let any = if source.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(destination).unwrap();
            assert_eq!(socket.local_addr().unwrap().ip(), ip_addr(source));
        }
    });
}

#[test]
fn one_address_that_fails_does_not_stop_the_others() {
    isolated(|| async {
        let _peers = two_links();
        std::fs::write("/proc/sys/net/ipv6/conf/c0/disable_ipv6", "1").unwrap();
        let mut manager = VipManager::open().unwrap();
        let wanted = ["203.0.113.1", "2001:db8:77::1", "2001:db8:2::80"];
        let report = manager.apply(vips(&wanted), &interfaces()).await.unwrap();
        assert_eq!(report.added.len(), 2);
        let [error] = report.errors.as_slice() else { panic!("one error: {report:?}") };
        let text = error.to_string();
        assert!(text.contains("2001:db8:77::1") && text.contains("c0"), "{text}");

        let missing = ["c7".to_owned()];
        let report = manager.apply(vips(&wanted[..1]), &missing).await.unwrap();
        assert!(matches!(report.errors[..], [VipError::NoInterface { .. }]), "{report:?}");
        assert_eq!(report.removed.len(), 2, "on interfaces that are no longer configured");
    });
}

#[test]
fn a_vip_that_goes_with_its_interface_is_seen_and_comes_back() {
    isolated(|| async {
        let _peers = two_links();
        let mut manager = VipManager::open().unwrap();
        let resolver = Resolver::start().unwrap();
        let mut updates = resolver.updates();
        let vip = ip_addr("2001:db8:77::1");
        manager.apply([vip], &interfaces()).await.unwrap();
        let has = move |update: &canary_agent::resolve::Update| {
            update.addresses.iter().any(|(address, _)| *address == vip)
        };
        until(&mut updates, "the VIP", has).await;
        ip("link set c0 down");
        until(&mut updates, "the VIP gone", |update| !has(update)).await;
        ip("link set c0 up");
        let report = manager.apply([vip], &interfaces()).await.unwrap();
        assert_eq!(report.added, on("c0", &["2001:db8:77::1"]));
        until(&mut updates, "the VIP again", has).await;
    });
}

#[test]
fn ports_are_reserved_besides_others_and_released_alone() {
    isolated(|| async {
        let reserved = || std::fs::read_to_string(RESERVED).unwrap().trim().to_owned();
        let range: RangeInclusive<u16> = 40_000..=49_999;
        std::fs::write(RESERVED, "8080,9000-9100,49000-51000").unwrap();
        let added = reserve_ports(&range).unwrap();
        assert_eq!(added, [40_000..=48_999]);
        assert_eq!(reserved(), "8080,9000-9100,40000-51000");
        assert_eq!(reserve_ports(&range).unwrap(), []);
        for part in &added {
            release_ports(part).unwrap();
            release_ports(part).unwrap();
        }
        assert_eq!(reserved(), "8080,9000-9100,49000-51000");
        release_ports(&(0..=u16::MAX)).unwrap();
        assert_eq!(reserved(), "");

        // Longer than a page, and than what a first short read would give.
        let mut scattered = PortSet::default();
        for port in (1..20_000).step_by(2) {
            scattered.insert(&(port..=port));
        }
        for port in scattered.ranges() {
            assert_eq!(port.start(), port.end());
        }
        std::fs::write(RESERVED, format!("{scattered}\n")).unwrap();
        assert_eq!(reserve_ports(&range).unwrap(), std::slice::from_ref(&range));
        release_ports(&range).unwrap();
        assert_eq!(reserve_ports(&(1..=5)).unwrap(), [2..=2, 4..=4]);
    });
}
