//! Clients of audiences, from the configuration to the loaded program: random nested routes
//! are followed as a loop over them would, and connections stay where they are through changes.
//! `CANARY_SEED` makes a run again; `CANARY_ADDRESSES` says how many addresses are asked about.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use canary_agent::plan::Family;
use canary_ebpf_common::{
    abi::{IPPROTO_TCP, IPPROTO_UDP},
    steer::{Segment, TCP_ACK, TCP_SYN},
};
use canary_tests::{
    loaded::Sizes,
    model::{Random, Tuple},
    names::Host,
    planned::{PORT, Planned, Route, Shop, Version, Went},
    world::addr,
};
use ipnet::IpNet;

const AUDIENCES: [&str; 4] = ["a", "b", "c", "d"];
const SPLITS: [&str; 4] = ["{ v1 = \"100%\" }", "{ v2 = \"100%\" }", "{ v3 = \"100%\" }", "{}"];

fn sizes() -> Sizes {
    Sizes { flows: 4096, buckets: 1 << 16, ..Sizes::default() }
}

/// A version for each of the first three audiences, and control for the last.
fn shop(routes: Vec<Route>) -> Shop {
    let version = |(at, name)| Version { name, backends: vec![(at, 1)] };
    let versions = [(1, "stable"), (2, "v1"), (3, "v2"), (4, "v3")].map(version);
    Shop { stickiness: "client", versions: versions.into(), routes, ..Shop::default() }
}

/// A network that is likely to be inside another one, or around it.
fn network(random: &mut Random) -> IpNet {
    let bits = random.bits();
    if random.below(2) == 0 {
        let length = 8 + random.below(25) as u8;
        // Ten bits that differ, where the middle of most prefixes is.
        let addr = Ipv4Addr::from(0x0a00_0000 | (bits as u32 & 0x001f_8038));
        return IpNet::new(addr.into(), length).expect("a length of IPv4").trunc();
    }
    let length = 16 + random.below(113) as u8;
    let addr = 0x2001_0db8_u128 << 96
        | u128::from(bits & 0x3f) << 88
        | u128::from(bits >> 6 & 0x7) << 62
        | u128::from(bits >> 9 & 0x3);
    IpNet::new(Ipv6Addr::from(addr).into(), length).expect("a length of IPv6").trunc()
}

/// An address in one of the networks, at their edges, or somewhere.
fn address(random: &mut Random, networks: &[IpNet]) -> IpAddr {
    let net = networks[random.below(networks.len() as u64) as usize];
    let inside = u128::from(random.bits()) << 64 | u128::from(random.bits());
    match (net, random.below(4)) {
        (IpNet::V4(net), 0) => net.network().into(),
        (IpNet::V4(net), 1) => net.broadcast().into(),
        (IpNet::V4(net), 2) => {
            let last = u32::from(net.broadcast());
            Ipv4Addr::from(last.wrapping_add(1)).into()
        }
        (IpNet::V4(net), _) => {
            Ipv4Addr::from(u32::from(net.network()) | inside as u32 & u32::from(net.hostmask()))
                .into()
        }
        (IpNet::V6(net), 0) => net.network().into(),
        (IpNet::V6(net), 1) => net.broadcast().into(),
        (IpNet::V6(net), 2) => {
            let last = u128::from(net.broadcast());
            Ipv6Addr::from(last.wrapping_add(1)).into()
        }
        (IpNet::V6(net), _) => {
            Ipv6Addr::from(u128::from(net.network()) | inside & u128::from(net.hostmask())).into()
        }
    }
}

fn from(src: IpAddr, port: u16, protocol: u8) -> Tuple {
    let family = Family::of(src);
    Tuple { src, dst: addr(Host::Vip(1), family), src_port: port, dst_port: PORT, protocol }
}

const ACK: Segment = Segment::tcp(TCP_ACK, 1000);

#[test]
fn program_and_trie_follow_the_first_route_that_holds_a_client() {
    let test = "program_and_trie_follow_the_first_route_that_holds_a_client";
    if !canary_tests::host::ready(test) {
        return;
    }
    let mut random = Random::from_environment(test);
    let wanted: usize = std::env::var("CANARY_ADDRESSES")
        .map_or(40_000, |text| text.parse().expect("a number of addresses"));
    let rounds = 20;
    let mut planned = Planned::new(&shop(Vec::new()), &sizes());
    let (mut of_routes, mut asked) = (0, 0);
    for _ in 0..rounds {
        let mut order = [0, 1, 2, 3];
        (1..order.len()).rev().for_each(|at| order.swap(at, random.below(at as u64 + 1) as usize));
        let count = 1 + random.below(30);
        let mut all = Vec::new();
        let routes: Vec<Route> = order
            .iter()
            .map(|at| {
                let mut networks: Vec<IpNet> = (0..count).map(|_| network(&mut random)).collect();
                networks.sort();
                networks.dedup();
                all.extend_from_slice(&networks);
                let networks = networks.iter().map(ToString::to_string).collect();
                Route { audience: AUDIENCES[*at], networks, split: SPLITS[*at] }
            })
            .collect();
        let lists: Vec<Vec<IpNet>> = routes
            .iter()
            .map(|route| route.networks.iter().map(|net| net.parse().expect("a network")).collect())
            .collect();
        planned.begin_anew(&shop(routes.clone()));
        for _ in 0..wanted / rounds {
            let client = address(&mut random, &all);
            if client.is_unspecified() || client == addr(Host::Vip(1), Family::of(client)) {
                continue;
            }
            asked += 1;
            let first = lists.iter().position(|list| list.iter().any(|net| net.contains(&client)));
            of_routes += usize::from(first.is_some());
            let class = planned.in_force().classes.class(client).entry;
            assert!(!class.tracked(), "{client}: nothing has changed");
            let audience = planned.planner.audience(class.current(), "shop");
            let expected = first.map(|at| routes[at].audience);
            assert_eq!(audience, expected, "{client} of {lists:?}");
            let backend = match first.map(|at| order[at]) {
                Some(at) if at < 3 => at as u16 + 2,
                _ => 1,
            };
            let protocol = random.one_of(&[IPPROTO_TCP, IPPROTO_UDP]);
            let segment = if protocol == IPPROTO_TCP { ACK } else { Segment::udp() };
            let went = planned.send(&from(client, 40_000, protocol), segment);
            assert_eq!(went, Went::To(backend), "{client} of {lists:?}");
        }
        assert_eq!(planned.flows(), 0, "nothing has changed");
    }
    assert!(of_routes > asked / 4 && of_routes < asked, "{of_routes} of {asked}");
}

/// A SYN of a client's connection from `port`, and a packet of it later.
fn syn(port: u16) -> Segment {
    Segment::tcp(TCP_SYN, u32::from(port))
}

fn later(port: u16) -> Segment {
    Segment::tcp(TCP_ACK, u32::from(port) + 1)
}

const STAFF: &str = "198.51.100.0/24";

fn staff(split: &'static str, networks: &[&str]) -> Vec<Route> {
    let networks = networks.iter().map(|net| (*net).to_owned()).collect();
    vec![Route { audience: "staff", networks, split }]
}

fn client(family: Family, last: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(198, 51, 100, last).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xaa, 0, 0, 0, 0, last.into()).into(),
    }
}

const BOTH: [&str; 2] = [STAFF, "2001:db8:aa::/48"];

#[test]
fn connections_stay_where_they_are_when_their_clients_class_changes() {
    let test = "connections_stay_where_they_are_when_their_clients_class_changes";
    if !canary_tests::host::ready(test) {
        return;
    }
    for family in [Family::V4, Family::V6] {
        let none = shop(Vec::new());
        let routed = shop(staff("{ v1 = \"100%\" }", &BOTH));
        let elsewhere = shop(staff("{ v1 = \"100%\" }", &["192.0.2.0/24"]));
        let mut planned = Planned::new(&none, &sizes());
        let one = from(client(family, 1), 1, IPPROTO_TCP);
        assert_eq!(planned.send(&one, syn(1)), Went::To(1));
        assert_eq!(planned.flows(), 0);

        // A route comes: what is open stays, what is new goes to the canary and is remembered.
        planned.reload(&routed);
        assert_eq!(planned.send(&one, later(1)), Went::To(1));
        let two = from(client(family, 1), 2, IPPROTO_TCP);
        assert_eq!(planned.send(&two, syn(2)), Went::To(2));
        assert_eq!(planned.send(&two, later(2)), Went::To(2));
        assert_eq!(planned.flows(), 1);
        let outside = from(addr(Host::Client(9), family), 3, IPPROTO_TCP);
        assert_eq!(planned.send(&outside, syn(3)), Went::To(1));
        assert_eq!(planned.flows(), 1, "who is in no audience is not remembered");

        // The network leaves the audience, and an agent is started anew over the maps.
        planned.pass(Duration::from_secs(100));
        planned.reload(&elsewhere);
        planned.restart_from_pins(&elsewhere);
        let three = from(client(family, 1), 4, IPPROTO_TCP);
        assert_eq!(planned.send(&three, syn(4)), Went::To(1));
        for (tuple, port, backend) in [(&one, 1, 1), (&two, 2, 2), (&three, 4, 1)] {
            assert_eq!(planned.send(tuple, later(port)), Went::To(backend), "{tuple:?}");
        }

        // The route goes: the table of the audience stays for what is open.
        planned.reload(&none);
        for (tuple, port, backend) in [(&one, 1, 1), (&two, 2, 2), (&three, 4, 1)] {
            assert_eq!(planned.send(tuple, later(port)), Went::To(backend), "{tuple:?}");
        }
        assert!(planned.planner.service("shop@staff").is_some());

        // The drain is over: nothing is remembered, and nothing is left of the route.
        planned.pass(Duration::from_secs(1001));
        planned.pass(Duration::from_secs(2));
        assert_eq!(planned.flows(), 0);
        assert_eq!(planned.send(&two, later(2)), Went::To(1), "it has outlived its drain");
        planned.reload(&none);
        assert!(planned.planner.service("shop@staff").is_none());
        assert!(planned.in_force().classes.tables.is_empty());
        assert_eq!(
            planned.in_force().classes.networks.iter().map(|n| n.prefixes().len()).sum::<usize>(),
            0
        );
    }
}

#[test]
fn an_excluded_audience_never_sees_the_canary_for_want_of_room() {
    let test = "an_excluded_audience_never_sees_the_canary_for_want_of_room";
    if !canary_tests::host::ready(test) {
        return;
    }
    for family in [Family::V4, Family::V6] {
        let mut planned =
            Planned::new(&shop(staff("{ v1 = \"100%\" }", &BOTH)), &Sizes { flows: 16, ..sizes() });
        let open = from(client(family, 1), 1, IPPROTO_TCP);
        assert_eq!(planned.send(&open, syn(1)), Went::To(2));
        planned.reload(&shop(staff("{}", &BOTH)));
        // The split of the audience is stored: excluding it is a change of that, or of the route.
        let (at, _) = planned.planner.service("shop@staff").expect("the table of the audience");
        let split = planned.planner.services()[at].propose(Default::default()).expect("no shares");
        planned.planner.set_ownership(at, split.ownership);
        planned.settle();
        let mut seen = Vec::new();
        for port in 10..60 {
            let tuple = from(client(family, port as u8), port, IPPROTO_TCP);
            seen.push(planned.send(&tuple, syn(port)));
        }
        assert!(seen.contains(&Went::To(1)) && seen.contains(&Went::Dropped), "{seen:?}");
        assert!(!seen.contains(&Went::To(2)), "{seen:?}");
        assert_eq!(planned.send(&open, later(1)), Went::To(2));

        // Networks that move from one audience to another are not let in by a full table.
        let out = Route { audience: "out", networks: BOTH.map(str::to_owned).into(), split: "{}" };
        let mut routes = vec![out];
        routes.extend(staff("{ v1 = \"100%\" }", &BOTH));
        let mut planned =
            Planned::new(&shop(staff("{ v1 = \"100%\" }", &BOTH)), &Sizes { flows: 16, ..sizes() });
        assert_eq!(planned.send(&open, syn(1)), Went::To(2));
        planned.reload(&shop(routes));
        let mut seen = Vec::new();
        for port in 10..60 {
            let tuple = from(client(family, port as u8), port, IPPROTO_TCP);
            seen.push(planned.send(&tuple, syn(port)));
        }
        assert!(seen.contains(&Went::To(1)) && seen.contains(&Went::Dropped), "{seen:?}");
        assert!(!seen.contains(&Went::To(2)), "{seen:?}");
        assert_eq!(planned.send(&open, later(1)), Went::To(2), "what is open stays");
        // When nothing has to be remembered any more, load has no say at all.
        planned.pass(Duration::from_secs(1001));
        planned.pass(Duration::from_secs(2));
        for port in 60..120 {
            let tuple = from(client(family, port as u8), port, IPPROTO_TCP);
            assert_eq!(planned.send(&tuple, syn(port)), Went::To(1));
        }
    }
}

#[test]
fn the_few_of_an_audience_are_among_the_few_of_everybody() {
    let test = "the_few_of_an_audience_are_among_the_few_of_everybody";
    if !canary_tests::host::ready(test) {
        return;
    }
    let mut planned = Planned::new(&shop(staff("{}", &BOTH)), &sizes());
    let mut owners = |name: &str, share: &str| {
        let split = [("v1".to_owned(), share.parse().expect("a share"))].into();
        let (at, state) = planned.planner.service(name).expect("a table");
        let proposal = state.propose(split).expect("shares that fit");
        planned.planner.set_ownership(at, proposal.ownership);
        planned.settle();
        let (_, state) = planned.planner.service(name).expect("a table");
        let owners = state.tables()[0].ledger().iter().map(|entry| entry.owner());
        owners.collect::<Vec<u8>>()
    };
    let everybody = owners("shop", "5%");
    assert_eq!(owners("shop@staff", "5%"), everybody, "the same clients");
    let more = owners("shop@staff", "20%");
    let canary = planned.planner.service("shop").and_then(|(_, state)| state.slot("v1"));
    let canary = canary.expect("a version");
    let of = |owners: &[u8]| owners.iter().filter(|owner| **owner == canary).count();
    // Of 4,096 buckets.
    assert!((204..=205).contains(&of(&everybody)) && (819..=820).contains(&of(&more)));
    assert!(everybody.iter().zip(&more).all(|(few, more)| *few != canary || *more == canary));
}
