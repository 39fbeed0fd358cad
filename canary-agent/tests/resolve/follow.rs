//! Routes, neighbours and links followed.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use crate::netns::{Peer, ip, ip_addr, ip_batch, ip_output, isolated, until};
use canary_agent::{
    plan::{NextHop, Tags},
    resolve::{Hop, Resolver, Unresolved, Update},
};

/// What the contract allows for following a change.
const FOLLOWED: Duration = Duration::from_secs(1);
/// For what the kernel itself takes seconds to notice: three questions, a second apart.
const NOTICED: Duration = Duration::from_secs(8);

const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const NEW_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

/// A peer on the other end of `c0`, with `.2`/`::2` to our `.1`/`::1`.
fn one_link() -> Peer {
    let peer = Peer::new();
    peer.connect("c0", "p0", 1);
    peer
}

fn index_of(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).expect("the interface is there")
}

fn hop(update: &Update, address: &str) -> Option<Hop> {
    update.hops.get(&ip_addr(address)).cloned()
}

fn resolved(update: &Update, address: &str) -> Option<NextHop> {
    hop(update, address).and_then(Result::ok)
}

fn mac_is(address: &'static str, mac: [u8; 6]) -> impl FnMut(&Update) -> bool {
    move |update| resolved(update, address).is_some_and(|hop| hop.destination_mac == mac)
}

#[test]
fn next_hops_on_the_link_have_both_macs_and_the_source() {
    isolated(|| async {
        let _peer = one_link();
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations(["10.0.1.2", "2001:db8:1::2"].map(ip_addr));
        let mut updates = resolver.updates();
        let took = until(&mut updates, "both families", |update| {
            update.hops.len() == 2 && update.hops.values().all(Result::is_ok)
        })
        .await;
        eprintln!("measured: next hops on the link, v4 and v6, from nothing: {took:?}");
        let update = updates.borrow().clone();
        for (address, source) in [("10.0.1.2", "10.0.1.1"), ("2001:db8:1::2", "2001:db8:1::1")] {
            assert_eq!(
                resolved(&update, address),
                Some(NextHop {
                    ifindex: index_of("c0"),
                    source_mac: OUR_MAC,
                    destination_mac: PEER_MAC,
                    source: ip_addr(source),
                    tags: Tags::default(),
                    mtu: 1500,
                    silent: None,
                })
            );
        }
    });
}

#[test]
fn next_hops_behind_a_gateway_are_the_gateways() {
    isolated(|| async {
        let _peer = one_link();
        ip("route add 192.0.2.0/24 via 10.0.1.2");
        ip("route add 198.51.100.0/24 via inet6 2001:db8:1::2");
        ip("-6 route add 2001:db8:99::/48 via 2001:db8:1::2");
        let resolver = Resolver::start().unwrap();
        let all = ["192.0.2.7", "198.51.100.7", "2001:db8:99::7"];
        resolver.set_destinations(all.map(ip_addr));
        let mut updates = resolver.updates();
        until(&mut updates, "all through the gateway", |update| {
            all.iter().all(|one| resolved(update, one).is_some())
        })
        .await;
        for address in all {
            let hop = resolved(&updates.borrow(), address).unwrap();
            assert_eq!((hop.ifindex, hop.destination_mac), (index_of("c0"), PEER_MAC));
            assert_eq!(hop.source.is_ipv4(), ip_addr(address).is_ipv4());
        }
    });
}

#[test]
fn a_new_mac_address_is_followed_within_a_second() {
    isolated(|| async {
        let peer = one_link();
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations(["10.0.1.2", "2001:db8:1::2"].map(ip_addr));
        let mut updates = resolver.updates();
        until(&mut updates, "v4", mac_is("10.0.1.2", PEER_MAC)).await;
        until(&mut updates, "v6", mac_is("2001:db8:1::2", PEER_MAC)).await;

        peer.ip("link set p0 address 02:00:00:00:00:99");
        for (ours, theirs) in [("10.0.1.1", "10.0.1.2"), ("2001:db8:1::1", "2001:db8:1::2")] {
            // Whatever the peer sends is preceded by its own question, with its new address.
            peer.datagram_to(ours);
            let took = until(&mut updates, "the new address", mac_is(theirs, NEW_MAC)).await;
            eprintln!("measured: new MAC address of {theirs} followed: {took:?}");
            assert!(took < FOLLOWED, "{theirs}: {took:?}");
        }
    });
}

#[test]
fn a_new_mac_address_that_nobody_announces_is_followed_within_a_second() {
    isolated(|| async {
        let peer = one_link();
        ip("route add 192.0.2.0/24 via 10.0.1.2");
        let resolver = Resolver::start().unwrap();
        let all = ["10.0.1.2", "192.0.2.7", "2001:db8:1::2"];
        resolver.set_destinations(all.map(ip_addr));
        let mut updates = resolver.updates();
        until(&mut updates, "all of them", |update| {
            all.iter().all(|one| resolved(update, one).is_some())
        })
        .await;
        // One after the other: for a second after each, the kernel heeds no ARP answer.
        for last in 1..=5 {
            peer.ip(&format!("link set p0 address 02:00:00:00:01:0{last}"));
            let mac = [2, 0, 0, 0, 1, last];
            let took = until(&mut updates, "the new address", |update| {
                all.iter().all(|one| mac_is(one, mac)(update))
            })
            .await;
            eprintln!("measured: unannounced MAC address followed, v4, gateway and v6: {took:?}");
            assert!(took < FOLLOWED, "{took:?}");
        }
    });
}

#[test]
fn of_two_hosts_with_one_address_the_known_one_stays() {
    isolated(|| async {
        // Both behind one bridge, so that both hear each question.
        let peers = [Peer::new(), Peer::new()];
        ip("link add c0 address 02:00:00:00:00:01 type bridge stp_state 0 forward_delay 0");
        for (n, peer) in (1..).zip(&peers) {
            ip(&format!("link add port{n} type veth peer name p0 address 02:00:00:00:02:0{n}"));
            peer.take("p0");
            peer.ip("address add 10.0.1.2/24 dev p0");
            ip(&format!("link set port{n} master c0 up"));
        }
        ip("address add 10.0.1.1/24 dev c0");
        ip("link set c0 up");
        // In hundredths of a second: the kernel itself heeds no second answer all the while.
        std::fs::write("/proc/sys/net/ipv4/neigh/c0/locktime", "6000").unwrap();
        peers[0].ip("link set p0 up");
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations([ip_addr("10.0.1.2")]);
        let mut updates = resolver.updates();
        let first = [2, 0, 0, 0, 2, 1];
        until(&mut updates, "the first", mac_is("10.0.1.2", first)).await;
        peers[1].ip("link set p0 up");
        // Asked at least twice, and answered by both.
        let changes = tokio::time::timeout(Duration::from_millis(1500), async {
            while updates.changed().await.is_ok() {
                let hop = resolved(&updates.borrow_and_update(), "10.0.1.2");
                assert_eq!(hop.map(|hop| hop.destination_mac), Some(first));
            }
        });
        changes.await.expect_err("the resolver goes on");
    });
}

#[test]
fn our_own_mac_address_is_followed() {
    isolated(|| async {
        let _peer = one_link();
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations([ip_addr("10.0.1.2")]);
        let mut updates = resolver.updates();
        until(&mut updates, "the peer", mac_is("10.0.1.2", PEER_MAC)).await;
        ip("link set c0 address 02:00:00:00:00:99");
        let took = until(&mut updates, "our new address", |update| {
            resolved(update, "10.0.1.2").is_some_and(|hop| hop.source_mac == NEW_MAC)
        })
        .await;
        assert!(took < FOLLOWED, "{took:?}");
    });
}

#[test]
fn a_peer_whose_link_goes_down_is_unresolved_until_it_is_up() {
    isolated(|| async {
        let peer = one_link();
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations([ip_addr("10.0.1.2")]);
        let mut updates = resolver.updates();
        until(&mut updates, "the peer", mac_is("10.0.1.2", PEER_MAC)).await;
        peer.ip("link set p0 down");
        let took = until(&mut updates, "no next hop", |update| {
            hop(update, "10.0.1.2").is_some_and(|hop| hop.is_err())
        })
        .await;
        eprintln!("measured: lost carrier noticed: {took:?}");
        assert!(took < FOLLOWED, "{took:?}");
        until(&mut updates, "the reason", |update| {
            hop(update, "10.0.1.2")
                == Some(Err(Unresolved::InterfaceDown { interface: "c0".to_owned() }))
        })
        .await;
        peer.ip("link set p0 up");
        let took = until(&mut updates, "the peer again", mac_is("10.0.1.2", PEER_MAC)).await;
        eprintln!("measured: carrier back, next hop again: {took:?}");
    });
}

#[test]
fn a_neighbour_that_does_not_answer_is_named_and_found_when_it_comes() {
    isolated(|| async {
        let peer = one_link();
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations([ip_addr("10.0.1.77")]);
        let mut updates = resolver.updates();
        let (neighbour, interface) = (ip_addr("10.0.1.77"), "c0".to_owned());
        let silent = Unresolved::Silent { neighbour, interface };
        let took = until(&mut updates, "silence", |update| {
            hop(update, "10.0.1.77") == Some(Err(silent.clone()))
        })
        .await;
        assert!(took < NOTICED, "{took:?}");
        peer.ip("address add 10.0.1.77/24 dev p0");
        let took = until(&mut updates, "it comes", mac_is("10.0.1.77", PEER_MAC)).await;
        eprintln!("measured: a silent neighbour that comes is found: {took:?}");
        assert!(took < NOTICED, "{took:?}");
    });
}

#[test]
fn a_flush_makes_no_gap_and_permanent_entries_stay_so() {
    isolated(|| async {
        let _peer = one_link();
        ip("neigh add 10.0.1.3 lladdr 02:00:00:00:00:99 dev c0 nud permanent");
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations(["10.0.1.2", "10.0.1.3"].map(ip_addr));
        let mut updates = resolver.updates();
        until(&mut updates, "the permanent one", mac_is("10.0.1.3", NEW_MAC)).await;
        until(&mut updates, "the peer", mac_is("10.0.1.2", PEER_MAC)).await;

        // Asked for again before anybody hears that it was gone.
        ip("neigh flush dev c0");
        ip("neigh replace 10.0.1.3 lladdr 02:00:00:00:00:98 dev c0 nud permanent");
        until(&mut updates, "the changed one", |update| {
            assert!(resolved(update, "10.0.1.2").is_some(), "never without a next hop");
            resolved(update, "10.0.1.3").is_some_and(|hop| hop.destination_mac[5] == 0x98)
        })
        .await;
        let states = ip_output("neigh show 10.0.1.3 dev c0");
        assert!(states.contains("PERMANENT"), "{states}");
    });
}

#[test]
fn routes_that_change_are_followed() {
    isolated(|| async {
        let peers = [Peer::new(), Peer::new()];
        peers[0].connect("c0", "p0", 1);
        peers[1].connect("c1", "p1", 2);
        ip("route add 192.0.2.0/24 via 10.0.1.2");
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations([ip_addr("192.0.2.7")]);
        let mut updates = resolver.updates();
        let by = |name: &str| {
            let ifindex = index_of(name);
            move |update: &Update| {
                resolved(update, "192.0.2.7").is_some_and(|hop| hop.ifindex == ifindex)
            }
        };
        until(&mut updates, "by c0", by("c0")).await;
        ip("route replace 192.0.2.0/24 via 10.0.2.2");
        let took = until(&mut updates, "by c1", by("c1")).await;
        eprintln!("measured: a replaced route followed: {took:?}");
        assert!(took < FOLLOWED, "{took:?}");
        let source = resolved(&updates.borrow(), "192.0.2.7").unwrap().source;
        assert_eq!(source, ip_addr("10.0.2.1"));
        ip("route add 192.0.2.7/32 via 10.0.1.2");
        assert!(until(&mut updates, "the longer prefix", by("c0")).await < FOLLOWED);
        ip("route add default via 10.0.2.2 table 77");
        ip("rule add to 192.0.2.7 lookup 77 priority 100");
        assert!(until(&mut updates, "the policy rule", by("c1")).await < FOLLOWED);
        // The kernel takes the routes of a link that is set down away without a word.
        ip("link set c1 down");
        assert!(until(&mut updates, "what is left", by("c0")).await < FOLLOWED);
    });
}

#[test]
fn an_interface_that_is_deleted_made_again_and_renamed_is_followed() {
    isolated(|| async {
        let resolver = Resolver::start().unwrap();
        resolver.set_interfaces(["c0".to_owned(), "c9".to_owned()]);
        resolver.set_destinations([ip_addr("10.0.1.2")]);
        let mut updates = resolver.updates();
        until(&mut updates, "both missing", |update| {
            update.links.len() == 2 && update.links.values().all(Option::is_none)
        })
        .await;
        let mut indexes = Vec::new();
        for _ in 0..2 {
            let peer = one_link();
            let took = until(&mut updates, "a next hop", mac_is("10.0.1.2", PEER_MAC)).await;
            eprintln!("measured: an interface that appears leads to a next hop: {took:?}");
            until(&mut updates, "the link", |update| {
                update.links["c0"].is_some_and(|link| link.running)
            })
            .await;
            let link = updates.borrow().links["c0"].expect("it is there");
            assert_eq!((link.up, link.mac, link.mtu), (true, Some(OUR_MAC), 1500));
            assert_eq!(link.ifindex, index_of("c0"));
            indexes.push(link.ifindex);
            ip("link del c0");
            let took = until(&mut updates, "no link", |update| {
                update.links["c0"].is_none()
                    && hop(update, "10.0.1.2") == Some(Err(Unresolved::NoRoute))
            })
            .await;
            assert!(took < FOLLOWED, "{took:?}");
            drop(peer);
        }
        assert_ne!(indexes[0], indexes[1]);
        let _peer = one_link();
        ip("link set c0 down");
        ip("link set c0 name c9");
        until(&mut updates, "the new name", |update| {
            update.links["c0"].is_none() && update.links["c9"].is_some_and(|link| !link.up)
        })
        .await;
    });
}

#[test]
fn addresses_without_a_next_hop_say_why() {
    isolated(|| async {
        let _peer = one_link();
        ip("route add blackhole 192.0.2.1");
        ip("route add unreachable 192.0.2.2");
        ip("route add prohibit 192.0.2.3");
        ip("route add 192.0.2.4 dev lo");
        ip("-6 route add blackhole 2001:db8:9::1");
        ip("-6 route add unreachable 2001:db8:9::2");
        ip("-6 route add prohibit 2001:db8:9::3");
        let expected: HashMap<IpAddr, Hop> = [
            ("203.0.113.1", Unresolved::NoRoute),
            ("2001:db8:77::1", Unresolved::NoRoute),
            ("10.0.1.1", Unresolved::Local),
            ("2001:db8:1::1", Unresolved::Local),
            ("127.0.0.1", Unresolved::Local),
            ("10.0.1.255", Unresolved::NotUnicast),
            ("ff02::1", Unresolved::NotUnicast),
            ("fe80::2", Unresolved::LinkLocal),
            ("192.0.2.1", Unresolved::Blackhole),
            ("192.0.2.2", Unresolved::Unreachable),
            ("192.0.2.3", Unresolved::Prohibited),
            ("192.0.2.4", Unresolved::NotEthernet { interface: "lo".to_owned() }),
            ("2001:db8:9::1", Unresolved::Blackhole),
            ("2001:db8:9::2", Unresolved::Unreachable),
            ("2001:db8:9::3", Unresolved::Prohibited),
        ]
        .into_iter()
        .map(|(address, reason)| (ip_addr(address), Err(reason)))
        .collect();
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations(expected.keys().copied());
        let mut updates = resolver.updates();
        until(&mut updates, "all answered", |update| update.hops.len() == expected.len()).await;
        for (address, hop) in updates.borrow().hops.iter() {
            assert_eq!(Some(hop), expected.get(address), "{address}");
        }

        ip("address add 203.0.113.1/32 dev c0");
        let took = until(&mut updates, "an address that became ours", |update| {
            hop(update, "203.0.113.1") == Some(Err(Unresolved::Local))
        })
        .await;
        assert!(took < FOLLOWED, "{took:?}");
    });
}

#[test]
fn two_thousand_behind_one_gateway_and_silence_when_nothing_changes() {
    isolated(|| async {
        let _peer = one_link();
        ip("route add 172.16.0.0/16 via 10.0.1.2");
        let all: Vec<IpAddr> =
            (0..2_000_u32).map(|n| IpAddr::V4((0xac10_0000 + n).into())).collect();
        let resolver = Resolver::start().unwrap();
        let mut updates = resolver.updates();
        resolver.set_destinations(all.iter().copied());
        let took = until(&mut updates, "all of them", |update| {
            update.hops.len() == all.len() && update.hops.values().all(Result::is_ok)
        })
        .await;
        eprintln!("measured: 2,000 destinations behind one gateway: {took:?}");
        assert!(took < Duration::from_secs(2), "{took:?}");
        let neighbours = ip_output("-4 neigh show dev c0");
        assert_eq!(neighbours.lines().count(), 1, "the gateway only:\n{neighbours}");

        // IPv6's own addresses come to rest a little after their link.
        until(&mut updates, "our link-local address", |update| {
            update.addresses.iter().any(|(address, _)| address.to_string().starts_with("fe80"))
        })
        .await;
        // Nothing that matters: the same set, an ageing neighbour, a route elsewhere.
        resolver.set_destinations(all.iter().copied());
        ip("neigh change 10.0.1.2 lladdr 02:00:00:00:00:02 dev c0 nud stale");
        ip("route add 192.0.2.0/24 via 10.0.1.2");
        let quiet = tokio::time::timeout(Duration::from_millis(500), updates.changed()).await;
        assert!(quiet.is_err(), "an update without a change");

        ip("route add 172.16.7.0/24 via 10.0.1.3");
        let took = until(&mut updates, "a part of them by another gateway", |update| {
            resolved(update, "172.16.7.1").is_none() && resolved(update, "172.16.6.1").is_some()
        })
        .await;
        assert!(took < FOLLOWED, "{took:?}");
        resolver.set_destinations([]);
        until(&mut updates, "none", |update| update.hops.is_empty()).await;
    });
}

#[test]
fn what_was_lost_in_a_storm_is_read_again() {
    isolated(|| async {
        let _peer = one_link();
        ip("route add 192.0.2.0/24 via 10.0.1.2");
        let resolver = Resolver::start().unwrap();
        resolver.set_destinations([ip_addr("192.0.2.7")]);
        let mut updates = resolver.updates();
        until(&mut updates, "the gateway", mac_is("192.0.2.7", PEER_MAC)).await;
        // More changes than the socket holds, while the runtime's only thread is busy here.
        let mut batch = String::new();
        for n in 0..30_000_u32 {
            let [_, high, middle, low] = n.to_be_bytes();
            batch += &format!("route add 172.{}.{middle}.{low}/32 dev c0\n", 16 + high);
        }
        ip_batch(&batch);
        ip("route replace 192.0.2.0/24 via 10.0.1.3");
        ip("neigh add 10.0.1.3 lladdr 02:00:00:00:00:99 dev c0 nud permanent");
        let took = until(&mut updates, "the last change", mac_is("192.0.2.7", NEW_MAC)).await;
        eprintln!("measured: the last of 30,000 changes followed: {took:?}");
        assert!(took < FOLLOWED, "{took:?}");
    });
}
