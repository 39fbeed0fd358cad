//! Clients of audiences, from the configuration to the loaded program: random nested routes
//! are followed as a loop over them would, and connections stay where they are through changes.
//! `CANARY_SEED` makes a run again; `CANARY_ADDRESSES` says how many addresses are asked about.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData};
use canary_agent::{audience::Networks, config::model::Dynamic, plan::Family};
use canary_ebpf_common::{
    abi::{self, IPPROTO_TCP, IPPROTO_UDP},
    steer::{Segment, TCP_ACK, TCP_SYN},
};
use canary_tests::{
    asked, bpf,
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
    let wanted = number("CANARY_ADDRESSES", 40_000);
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

/// The backend of a new connection of a client.
fn begins(planned: &mut Planned, family: Family, last: u8, port: u16) -> Went {
    planned.send(&from(client(family, last), port, IPPROTO_TCP), syn(port))
}

#[test]
fn what_the_kernel_refuses_lets_nobody_in() {
    let test = "what_the_kernel_refuses_lets_nobody_in";
    if !canary_tests::host::ready(test) {
        return;
    }
    // Everybody but the excluded gets v1, which is backend 2.
    let routes = |names: &[&'static str], networks: &[[&str; 2]]| -> Vec<Route> {
        let each = names.iter().zip(networks).map(|(audience, networks)| Route {
            audience,
            networks: networks.map(str::to_owned).into(),
            split: "{}",
        });
        each.collect()
    };
    let inner = ["198.51.100.0/25", "2001:db8:aa::/49"];
    let excluded = shop(routes(&["staff"], &[BOTH]));
    // Half of them are of another audience now, and others are excluded besides.
    let other = shop(routes(&["crew", "staff"], &[inner, BOTH]));
    let wider = ["198.51.100.0/23", "2001:db8:aa::/47"];
    let more = shop(routes(&["crew", "staff"], &[inner, wider]));
    let beside = |family| match family {
        Family::V4 => IpAddr::from([198, 51, 101, 1]),
        Family::V6 => "2001:db8:ab::1".parse().expect("an address"),
    };
    let mut planned = Planned::new(&excluded, &sizes());
    planned.split(&[("v1", "100%")]);
    planned.pass(Duration::from_secs(1001));
    planned.pass(Duration::from_secs(2));
    let mut port = 1_000;
    let mut nobody_gets_in = |planned: &mut Planned, when: &str| {
        for family in [Family::V4, Family::V6] {
            for last in [1, 130, 200] {
                port += 1;
                let went = begins(planned, family, last, port);
                assert_eq!(went, Went::To(1), "{when}: {family:?} {last}");
            }
            let outside = from(addr(Host::Client(9), family), port, IPPROTO_TCP);
            assert_eq!(planned.send(&outside, syn(port)), Went::To(2), "{when}");
        }
    };
    nobody_gets_in(&mut planned, "before");

    // The map of classes' tables is full: a class that has no table is nobody's.
    let pins = planned.loaded.pins();
    let open = |name: &str| MapData::from_pin(pins.join("maps").join(name)).expect("a pinned map");
    let mut tables: HashMap<MapData, [u8; 8], [u8; size_of::<abi::Service>()]> =
        Map::HashMap(open("CLASS_TABLES")).try_into().expect("a hash map");
    let mut filling = 0_u64;
    while tables
        .insert((u64::MAX - filling).to_ne_bytes(), [0; size_of::<abi::Service>()], 0)
        .is_ok()
    {
        filling += 1;
    }
    assert!(filling > 8_000, "{filling}");
    planned.plan(&other.config());
    for _ in 0..3 {
        let refused = planned.try_once().expect_err("there is no room");
        assert!(!refused.is_empty(), "{refused}");
        nobody_gets_in(&mut planned, "the tables' map is full");
    }
    let explained = planned.planner.audience(
        planned.planner.plane().classes.class(client(Family::V4, 1)).entry.current(),
        "shop",
    );
    assert_eq!(explained, Some("crew"), "that is what is wanted");
    (0..filling).for_each(|at| tables.remove(&(u64::MAX - at).to_ne_bytes()).expect("a table"));
    planned.settle();
    assert!(planned.in_force().classes.tables.len() > 2, "it is made up for when there is room");
    nobody_gets_in(&mut planned, "there is room again");

    // No network of IPv6 can be written any more: those of IPv4 are, the others stay what they were.
    bpf::freeze(&open("CLASSES_V6")).expect("a kernel that freezes maps");
    planned.plan(&more.config());
    for _ in 0..3 {
        planned.try_once().expect_err("the map is frozen");
        nobody_gets_in(&mut planned, "a family is half written");
        for (family, backend) in [(Family::V4, 1), (Family::V6, 2)] {
            port_of_its_own(&mut planned, beside(family), backend);
        }
    }
    planned.plan(&excluded.config());
    planned.try_once().expect_err("the map is frozen");
    nobody_gets_in(&mut planned, "back, half written");
}

/// A client that is newly excluded is where its class of now or before sends it.
fn port_of_its_own(planned: &mut Planned, client: IpAddr, backend: u16) {
    let port = 20_000 + planned.flows() as u16;
    let went = planned.send(&from(client, port, IPPROTO_TCP), syn(port));
    assert_eq!(went, Went::To(backend), "{client}");
}

#[test]
fn open_connections_go_along_where_they_are_to_move() {
    let test = "open_connections_go_along_where_they_are_to_move";
    if !canary_tests::host::ready(test) {
        return;
    }
    let pinned = Some(Duration::from_secs(1000));
    for (kind, forward, existing, drain) in [
        ("existing = move", "dsr", "move", pinned),
        ("drain = 0s", "dsr", "pin", Some(Duration::ZERO)),
        ("drain = 0s in nat", "nat", "pin", Some(Duration::ZERO)),
    ] {
        let kind_of = |routes| Shop { forward, existing, drain, ..shop(routes) };
        let goes_along = forward == "dsr";
        for family in [Family::V4, Family::V6] {
            let case = format!("{kind} {family:?}");
            let routed = kind_of(staff("{ v1 = \"100%\" }", &BOTH));
            let other = kind_of(vec![Route {
                audience: "crew",
                networks: BOTH.map(str::to_owned).into(),
                split: "{ v2 = \"100%\" }",
            }]);
            let mut planned = Planned::new(&kind_of(Vec::new()), &sizes());
            let open = from(client(family, 1), 1, IPPROTO_TCP);
            let flow = from(client(family, 1), 1, IPPROTO_UDP);
            assert_eq!(planned.send(&open, syn(1)), Went::To(1), "{case}");
            assert_eq!(planned.send(&flow, Segment::udp()), Went::To(1), "{case}");
            let flows = planned.flows();
            for (shop, backend) in [(&routed, 2), (&other, 3), (&kind_of(Vec::new()), 1)] {
                planned.reload(shop);
                let expected = if goes_along { backend } else { 1 };
                assert_eq!(planned.send(&open, later(1)), Went::To(expected), "{case}");
                assert_eq!(planned.send(&flow, Segment::udp()), Went::To(expected), "{case}");
                assert_eq!(planned.flows(), flows, "{case}: nothing is remembered besides");
                let port = 10 + backend;
                let new = from(client(family, 1), port, IPPROTO_TCP);
                assert_eq!(planned.send(&new, syn(port)), Went::To(backend), "{case}: new ones");
                if !goes_along {
                    assert_eq!(planned.send(&new, later(port)), Went::To(backend), "{case}");
                }
                if !goes_along {
                    // Every flow has its own entry there: one change says it all.
                    break;
                }
            }
        }
    }
}

/// A map of `planned` by its pin.
fn pinned(planned: &Planned, name: &str) -> MapData {
    MapData::from_pin(planned.loaded.pins().join("maps").join(name)).expect("a pinned map")
}

/// Keeps the thread on one processor: what is known of clients is known to each by itself.
fn stay_on_one_cpu() {
    let mut cpus = nix::sched::CpuSet::new();
    let cpu = nix::sched::sched_getcpu().expect("a processor");
    cpus.set(cpu).expect("a processor of those that there can be");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).expect("the one it is on");
}

#[test]
fn what_is_known_of_a_client_holds_until_classes_change() {
    let test = "what_is_known_of_a_client_holds_until_classes_change";
    if !canary_tests::host::ready(test) {
        return;
    }
    stay_on_one_cpu();
    let mut planned = Planned::new(&shop(staff("{ v1 = \"100%\" }", &BOTH)), &sizes());
    let mut changes: Array<MapData, u64> =
        Map::Array(pinned(&planned, "CLASS_CHANGES")).try_into().expect("an array");
    let mut v4: LpmTrie<MapData, u32, u64> =
        Map::LpmTrie(pinned(&planned, "CLASSES_V4")).try_into().expect("a trie");
    let mut v6: LpmTrie<MapData, [u32; 4], u64> =
        Map::LpmTrie(pinned(&planned, "CLASSES_V6")).try_into().expect("a trie");
    let (key_v4, _) = v4.iter().next().expect("a network").expect("a network");
    let (key_v6, _) = v6.iter().next().expect("a network").expect("a network");
    let (is_v4, is_v6) =
        (v4.get(&key_v4, 0).expect("its class"), v6.get(&key_v6, 0).expect("its class"));
    let settled = changes.get(&0, 0).expect("a number");
    assert!(abi::settled(settled), "{settled}");
    for family in [Family::V4, Family::V6] {
        let [known, unknown] = [1, 2].map(|last| from(client(family, last), 1, IPPROTO_UDP));
        let goes = |planned: &mut Planned, tuple: &Tuple, backend: u16, when: &str| {
            for _ in 0..2 {
                let went = planned.send(tuple, Segment::udp());
                assert_eq!(went, Went::To(backend), "{family:?}: {when}");
            }
        };
        goes(&mut planned, &known, 2, "its class is looked up and kept");
        // Nobody tells the program that the network is gone.
        match family {
            Family::V4 => v4.remove(&key_v4).expect("a network"),
            Family::V6 => v6.remove(&key_v6).expect("a network"),
        }
        goes(&mut planned, &known, 2, "it is known");
        goes(&mut planned, &unknown, 1, "it is not");
        changes.set(0, settled + 1, 0).expect("a number");
        goes(&mut planned, &known, 1, "a change is under way");
        match family {
            Family::V4 => v4.insert(&key_v4, is_v4, 0).expect("a network"),
            Family::V6 => v6.insert(&key_v6, is_v6, 0).expect("a network"),
        }
        goes(&mut planned, &known, 2, "nothing is kept meanwhile");
        goes(&mut planned, &unknown, 2, "and what was is not looked at");
        changes.set(0, settled, 0).expect("a number");
        goes(&mut planned, &unknown, 1, "what was kept before says so");
        changes.set(0, settled + 2, 0).expect("a number");
        goes(&mut planned, &unknown, 2, "the change is over");
        changes.set(0, settled, 0).expect("a number");
    }
}

#[test]
fn who_is_known_follows_every_change_at_once() {
    let test = "who_is_known_follows_every_change_at_once";
    if !canary_tests::host::ready(test) {
        return;
    }
    let mut random = Random::from_environment(test);
    let rounds = number("CANARY_ROUNDS", 60);
    // Nothing is remembered of a class before, so that whatever is not up to date is seen.
    let kind = |routes| Shop { drain: Some(Duration::ZERO), ..shop(routes) };
    // Tables that are gone rest for a while before others take their pages.
    let sizes = Sizes { buckets: 1 << 17, ..sizes() };
    let mut planned = Planned::new(&kind(Vec::new()), &sizes);
    let nets: Vec<IpNet> = (0..12).map(|_| network(&mut random)).collect();
    let clients: Vec<IpAddr> = (0..60)
        .map(|_| address(&mut random, &nets))
        .filter(|ip| !ip.is_unspecified() && *ip != addr(Host::Vip(1), Family::of(*ip)))
        .collect();
    for round in 0..rounds {
        let first = random.below(4) as usize;
        let routes: Vec<Route> = (0..random.below(5) as usize)
            .map(|at| {
                let mut networks: Vec<IpNet> =
                    (0..1 + random.below(4)).map(|_| random.one_of(&nets)).collect();
                networks.sort();
                networks.dedup();
                let at = (first + at) % 4;
                let networks = networks.iter().map(ToString::to_string).collect();
                Route { audience: AUDIENCES[at], networks, split: SPLITS[at] }
            })
            .collect();
        planned.reload(&kind(routes.clone()));
        planned.pass(Duration::from_secs(2));
        for _ in 0..2 {
            for (port, client) in (1_000..).zip(&clients) {
                let holds = |net: &String| net.parse::<IpNet>().expect("one").contains(client);
                let backend = match routes.iter().find(|route| route.networks.iter().any(holds)) {
                    Some(route) => {
                        match AUDIENCES.iter().position(|name| *name == route.audience) {
                            Some(at) if at < 3 => at as u16 + 2,
                            _ => 1,
                        }
                    }
                    None => 1,
                };
                let went = planned.send(&from(*client, port, IPPROTO_TCP), ACK);
                assert_eq!(went, Went::To(backend), "round {round}: {client} of {routes:?}");
            }
        }
        assert_eq!(planned.flows(), 0, "nothing is remembered");
    }
}

fn number(name: &str, default: usize) -> usize {
    asked::number(name).map_or(default, |number| number as usize)
}

/// A network of IPv4 of some length, in a part of the world without anybody else.
fn somewhere(random: &mut Random) -> IpNet {
    let length = 22 + random.below(11) as u8;
    let addr = Ipv4Addr::from(0x2000_0000 | random.below(0x5000_0000) as u32);
    IpNet::new(addr.into(), length).expect("a length of IPv4").trunc()
}

#[test]
fn a_year_of_daily_updates_writes_what_differs_and_breaks_nothing() {
    let test = "a_year_of_daily_updates_writes_what_differs_and_breaks_nothing";
    if !canary_tests::host::ready(test) {
        return;
    }
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let (count, days) = (number("CANARY_NETWORKS", 5_000), number("CANARY_DAYS", 10));
    let mut random = Random::from_environment(test);
    let mut networks: Vec<IpNet> = (0..count).map(|_| somewhere(&mut random)).collect();
    let mut config = shop(staff("{ v1 = \"100%\" }", &[STAFF])).config();
    let mut of_day = |networks: &[IpNet]| {
        config.audiences[0].networks = Arc::new(Networks::new(networks.iter().copied()));
        config.clone()
    };
    let mut planned = Planned::new(&shop(staff("{ v1 = \"100%\" }", &[STAFF])), &sizes());
    planned.plan(&of_day(&networks));
    planned.settle();
    planned.pass(DAY);
    planned.pass(DAY);
    let (mut written, mut compiled, mut applied, mut longest) =
        (0, Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let changes = (count / 100).max(1);
    for day in 0..days {
        // Connections of the day: some of them of clients that the update is about.
        let leave: Vec<usize> =
            (0..changes).map(|_| random.below(networks.len() as u64) as usize).collect();
        let come: Vec<IpNet> = (0..changes).map(|_| somewhere(&mut random)).collect();
        let stay = (0..20).map(|_| networks[random.below(networks.len() as u64) as usize]);
        let concerned = leave.iter().take(20).map(|at| networks[*at]);
        let concerned: Vec<IpNet> =
            concerned.chain(come.iter().take(20).copied()).chain(stay).collect();
        let mut open = Vec::new();
        for (port, net) in (1_000..).zip(&concerned) {
            let tuple = from(net.network(), port, IPPROTO_TCP);
            open.push((tuple, port, planned.send(&tuple, syn(port))));
        }
        leave.iter().zip(&come).for_each(|(at, net)| networks[*at] = *net);

        let began = Instant::now();
        planned.plan(&of_day(&networks));
        compiled += began.elapsed();
        let before = planned.in_force().classes.networks[0].prefixes().to_vec();
        let began = Instant::now();
        let touched = planned.try_once().expect("a plan").networks;
        applied += began.elapsed();
        longest = longest.max(began.elapsed());
        // What stands under prefixes that differ, before and after.
        let after = planned.in_force().classes.networks[0].prefixes();
        let (mut old, mut new) = (before.iter().peekable(), after.iter().peekable());
        let mut differ = 0;
        while old.peek().is_some() || new.peek().is_some() {
            match (old.peek(), new.peek()) {
                (Some(a), Some(b)) if a == b => (old.next(), new.next()),
                (Some((a, _)), Some((b, _))) if a == b => {
                    differ += 1;
                    (old.next(), new.next())
                }
                (Some((a, _)), Some((b, _))) if a < b => {
                    differ += 1;
                    (old.next(), None)
                }
                (Some(_), None) => {
                    differ += 1;
                    (old.next(), None)
                }
                _ => {
                    differ += 1;
                    (None, new.next())
                }
            };
        }
        written += touched;
        assert_eq!(touched, differ, "day {day}: the difference, and nothing else");
        assert!(differ <= 6 * changes + 40, "day {day}: {differ} entries for {changes} networks");

        // Nothing breaks, and who is in goes by the route.
        for (tuple, port, went) in &open {
            assert_eq!(planned.send(tuple, later(*port)), *went, "day {day}: {tuple:?}");
        }
        let present = Networks::new(networks.iter().copied());
        for port in 5_000..5_200 {
            let at = random.below(networks.len() as u64) as usize;
            let IpAddr::V4(inside) = networks[at].network() else { continue };
            let beside = random.one_of(&[0, 0x5a11]);
            let client = Ipv4Addr::from(u32::from(inside) ^ beside);
            let backend = if present.find(client.into()).is_some() { 2 } else { 1 };
            let tuple = from(client.into(), port, IPPROTO_TCP);
            assert_eq!(planned.send(&tuple, syn(port)), Went::To(backend), "day {day}: {client}");
        }
        planned.settle();
        planned.pass(DAY);
        planned.pass(Duration::from_secs(2));
    }
    let each = u32::try_from(days.max(1)).expect("days");
    println!(
        "{test}: {days} days, {changes} of {count} networks a day: planned in {:?}, taken over and \
         written in {:?} (the longest {longest:?}), {} entries a day",
        compiled / each,
        applied / each,
        written / days.max(1)
    );
}

#[test]
fn a_member_among_many_networks_is_written_alone() {
    let test = "a_member_among_many_networks_is_written_alone";
    if !canary_tests::host::ready(test) {
        return;
    }
    let count = number("CANARY_NETWORKS", 5_000);
    let mut random = Random::from_environment(test);
    let networks: Vec<IpNet> = (0..count).map(|_| somewhere(&mut random)).collect();
    let base = shop(staff("{ v1 = \"100%\" }", &[STAFF]));
    let mut config = base.config();
    config.audiences[0].networks = Arc::new(Networks::new(networks));
    config.audiences[0].dynamic = Some(Dynamic { ttl: Duration::from_secs(1), max: 1_000 });
    let mut planned = Planned::new(&base, &sizes());
    planned.plan(&config);
    planned.settle();
    planned.pass(Duration::from_secs(1001));
    planned.pass(Duration::from_secs(2));
    let (mut longest, mut all) = (Duration::ZERO, Duration::ZERO);
    for last in 1..=20 {
        let member: IpNet = IpNet::from(IpAddr::from([203, 0, 114, last * 2]));
        let tuple = from(member.addr(), 1, IPPROTO_TCP);
        assert_eq!(planned.send(&tuple, syn(1)), Went::To(1));
        planned.pass(Duration::from_secs(1));
        let began = Instant::now();
        planned.planner.change_members("staff", &[member], &[]).expect("few classes");
        let written = planned.try_once().expect("a plan").networks;
        (longest, all) = (longest.max(began.elapsed()), all + began.elapsed());
        assert_eq!(written, 1, "{member}");
        assert_eq!(planned.send(&tuple, later(1)), Went::To(1), "it is open");
        let new = from(member.addr(), 2, IPPROTO_TCP);
        assert_eq!(planned.send(&new, syn(2)), Went::To(2));
    }
    println!("{test}: {count} networks, a member in {:?} (the longest {longest:?})", all / 20);
}
