//! What the loaded program remembers of clients that it has looked up: classes in sets, and tables.
//! That something is remembered is seen where the maps say something else and `CLASS_CHANGES` does
//! not: what is known is still followed. `CANARY_SEED` makes a run again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, lpm_trie::Key};
use canary_agent::{
    config::{Config, load_str, render},
    plan::Family,
};
use canary_ebpf_common::{
    abi::{self, IPPROTO_UDP},
    class::{Class, ClassEntry},
    recent,
    steer::Segment,
};
use canary_tests::{
    loaded::Sizes,
    model::{Random, Tuple},
    names::Host,
    planned::{PORT, Planned, Route, Shop, Version, Went},
    world::addr,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Clients of a set, as `canary_ebpf_common::recent` has them.
const WAYS: [usize; 2] = [8, 3];
type ServiceBytes = [u8; size_of::<abi::Service>()];

fn shop(routes: Vec<Route>) -> Shop {
    let version = |(at, name)| Version { name, backends: vec![(at, 1)] };
    let versions = [(1, "stable"), (2, "v1"), (3, "v2"), (4, "v3")].map(version);
    Shop { stickiness: "client", versions: versions.into(), routes, ..Shop::default() }
}

fn staff() -> Vec<Route> {
    let networks = ["10.0.0.0/8", "2001:db8::/32"].map(str::to_owned).into();
    vec![Route { audience: "staff", networks, split: "{ v1 = \"100%\" }" }]
}

/// The services `shop`, where `staff` have v1, and `store` at another address, where they have v2.
fn shop_and_store() -> Config {
    let text = shop(staff()).text();
    let from = text.find("[[service]]").expect("a service");
    let to = text.find("\n[[audience]]").expect("an audience");
    let vips = |n| (Host::Vip(n).v4().to_string(), Host::Vip(n).v6().to_string());
    let (of_shop, of_store) = (vips(1), vips(2));
    let store = text[from..to]
        .replace("name = \"shop\"", "name = \"store\"")
        .replace("{ v1 = \"100%\" }", "{ v2 = \"100%\" }")
        .replace(&format!("\"{}\"", of_shop.0), &format!("\"{}\"", of_store.0))
        .replace(&format!("\"{}\"", of_shop.1), &format!("\"{}\"", of_store.1));
    let text = format!("{}\n{store}{}", &text[..to], &text[to..]);
    load_str("agent.toml", &text).unwrap_or_else(|e| panic!("{text}\n{}", render(&e))).config
}

/// The program, and the maps of classes behind the agent's back.
struct Looked {
    planned: Planned,
    changes: Array<MapData, u64>,
    v4: LpmTrie<MapData, u32, u64>,
    v6: LpmTrie<MapData, [u32; 4], u64>,
    tables: HashMap<MapData, [u32; 2], ServiceBytes>,
}

impl Looked {
    /// `None` where the test can't run.
    fn new(test: &str, config: Option<&Config>) -> Option<Self> {
        if !canary_tests::host::ready(test) {
            return None;
        }
        // What is known of clients is known to each processor by itself.
        let mut cpus = nix::sched::CpuSet::new();
        cpus.set(nix::sched::sched_getcpu().expect("a processor")).expect("one that there can be");
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).expect("this one");
        let sizes = Sizes { flows: 4096, buckets: 1 << 17, ..Sizes::default() };
        let mut planned = Planned::new(&shop(staff()), &sizes);
        if let Some(config) = config {
            planned.plan(config);
            planned.settle();
        }
        let open = |name: &str| {
            MapData::from_pin(planned.loaded.pins().join("maps").join(name)).expect("a pinned map")
        };
        Some(Self {
            changes: Map::Array(open("CLASS_CHANGES")).try_into().expect("an array"),
            v4: Map::LpmTrie(open("CLASSES_V4")).try_into().expect("a trie"),
            v6: Map::LpmTrie(open("CLASSES_V6")).try_into().expect("a trie"),
            tables: Map::HashMap(open("CLASS_TABLES")).try_into().expect("a hash map"),
            planned,
        })
    }

    /// As if a change had come and gone.
    fn change(&mut self) {
        let changes = self.changes.get(&0, 0).expect("a number");
        assert!(abi::settled(changes), "{changes}");
        self.changes.set(0, changes + 2, 0).expect("a number");
    }

    /// What stands under a network from now on, without a word.
    fn set(&mut self, addr: IpAddr, bits: u32, entry: Option<ClassEntry>) {
        // SAFETY: both are of four bytes; `ClassEntry` is transparent.
        let state = entry.map(|e| u64::from(unsafe { std::mem::transmute::<ClassEntry, u32>(e) }));
        match addr {
            IpAddr::V4(addr) => {
                let key = Key::new(bits, u32::from(addr).to_be());
                match state {
                    Some(state) => self.v4.insert(&key, state, 0).expect("room"),
                    None => self.v4.remove(&key).expect("a network"),
                }
            }
            IpAddr::V6(addr) => {
                let word = |at: usize| (u128::from(addr) >> (96 - 32 * at)) as u32;
                let key = Key::new(bits, std::array::from_fn(|at| word(at).to_be()));
                match state {
                    Some(state) => self.v6.insert(&key, state, 0).expect("room"),
                    None => self.v6.remove(&key).expect("a network"),
                }
            }
        }
    }

    /// Nobody is of the staff any more, and nobody tells the program.
    fn take_staff(&mut self, family: Family) {
        match family {
            Family::V4 => self.set(Ipv4Addr::new(10, 0, 0, 0).into(), 8, None),
            Family::V6 => self.set("2001:db8::".parse().expect("an address"), 32, None),
        }
    }

    /// A service's tables by the number of its class, those of one family.
    fn table(&self, service: u32, class: u32) -> Option<ServiceBytes> {
        self.tables.get(&[service, class], 0).ok()
    }

    fn send_to(&mut self, vip: u16, client: IpAddr) -> u16 {
        let dst = addr(Host::Vip(vip), Family::of(client));
        let (src_port, dst_port) = (1, PORT);
        let tuple = Tuple { src: client, dst, src_port, dst_port, protocol: IPPROTO_UDP };
        match self.planned.send(&tuple, Segment::udp()) {
            Went::To(backend) => backend,
            other => panic!("{client}: {other:?}"),
        }
    }

    fn send(&mut self, client: IpAddr) -> u16 {
        self.send_to(1, client)
    }
}

/// Number `at` of the staff.
fn member(family: Family, at: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(0x0a00_0000 | at).into(),
        Family::V6 => Ipv6Addr::from(0x2001_0db8_00aa << 80 | u128::from(at)).into(),
    }
}

fn place(client: IpAddr) -> u32 {
    match client {
        IpAddr::V4(addr) => recent::place_v4(u32::from(addr).to_be()),
        IpAddr::V6(_) => recent::place_v6(abi::address(client)),
    }
}

/// So many of the staff, all of one set, however many sets there are.
fn of_one_set(family: Family, count: usize) -> Vec<IpAddr> {
    const SETS: u32 = 1 << 14;
    let first = place(member(family, 1)) % SETS;
    let all = (1..1_u32 << 24).map(|at| member(family, at));
    let clients: Vec<IpAddr> = all.filter(|c| place(*c) % SETS == first).take(count).collect();
    assert_eq!(clients.len(), count);
    clients
}

#[test]
fn a_full_set_knows_those_that_came_last() {
    let Some(mut looked) = Looked::new("a_full_set_knows_those_that_came_last", None) else {
        return;
    };
    for (family, ways) in FAMILIES.into_iter().zip(WAYS) {
        let clients = of_one_set(family, ways + 2);
        for client in clients.iter().chain(&clients[2..]) {
            assert_eq!(looked.send(*client), 2, "{client}");
        }
        looked.take_staff(family);
        for client in &clients[2..] {
            assert_eq!(looked.send(*client), 2, "{client} is one of the last {ways}");
        }
        for client in &clients[..2] {
            assert_eq!(looked.send(*client), 1, "{client} has made room");
        }
    }
}

#[test]
fn a_change_empties_sets_and_those_of_tables() {
    let Some(mut looked) = Looked::new("a_change_empties_sets_and_those_of_tables", None) else {
        return;
    };
    for family in FAMILIES {
        let [before, after, other] = of_one_set(family, 3)[..] else { panic!("three") };
        assert_eq!(looked.send(before), 2);
        looked.change();
        // Its set begins anew with this one, or is looked at as it was.
        assert_eq!(looked.send(after), 2);
        looked.take_staff(family);
        assert_eq!(looked.send(after), 2, "{family:?}: it is known");
        assert_eq!(looked.send(before), 1, "{family:?}: what was kept before the change is not");
        looked.change();
        assert_eq!(looked.send(after), 1, "{family:?}");
        assert_eq!(looked.send(other), 1, "{family:?}");
    }
    // The same of a class's table.
    let Some(mut looked) = Looked::new("a_change_empties_sets_and_those_of_tables", None) else {
        return;
    };
    let client = member(Family::V4, 1);
    assert_eq!(looked.send(client), 2);
    let keys: Vec<[u32; 2]> = looked.tables.keys().collect::<Result<_, _>>().expect("keys");
    assert!(!keys.is_empty());
    keys.iter().for_each(|key| looked.tables.remove(key).expect("a table"));
    assert_eq!(looked.send(client), 2, "it is known");
    looked.change();
    assert_eq!(looked.send(client), 1, "its class has no table");
}

#[test]
fn each_service_has_its_own_table_for_a_client() {
    let test = "each_service_has_its_own_table_for_a_client";
    let Some(mut looked) = Looked::new(test, Some(&shop_and_store())) else { return };
    // Classes have changed with the configuration.
    let long = std::time::Duration::from_secs(1001);
    (0..2).for_each(|_| looked.planned.pass(long));
    assert_eq!(looked.planned.flows(), 0);
    for family in FAMILIES {
        let [one, two] = of_one_set(family, 2)[..] else { panic!("two") };
        let outside: IpAddr = match family {
            Family::V4 => Ipv4Addr::new(192, 0, 2, 9).into(),
            Family::V6 => "2001:db9::9".parse().expect("an address"),
        };
        for _ in 0..3 {
            for (client, backends) in [(one, [2, 3]), (two, [2, 3]), (outside, [1, 1])] {
                assert_eq!([1, 2].map(|vip| looked.send_to(vip, client)), backends, "{client}");
            }
        }
        let third = of_one_set(family, 3)[2];
        assert_eq!(looked.send_to(1, third), 2);
        looked.take_staff(family);
        for client in [one, two, third] {
            let went = [1, 2].map(|vip| looked.send_to(vip, client));
            assert_eq!(went, [2, 3], "{client}: a class is known in every service");
        }
    }
}

#[test]
fn every_bit_of_an_address_counts() {
    let Some(mut looked) = Looked::new("every_bit_of_an_address_counts", None) else { return };
    let base: [IpAddr; 2] =
        [Ipv4Addr::new(10, 9, 8, 7).into(), "2001:db8:aa::7".parse().expect("an address")];
    for client in base {
        let bits = if client.is_ipv4() { 32 } else { 128 };
        // Out of the audience, though all around are in it.
        looked.set(client, bits, Some(ClassEntry::default()));
    }
    // Others of the same set, that is of the same bits where it comes from, in both halves.
    let same_set = of_one_set(Family::V6, 3);
    looked.set(same_set[1], 128, Some(ClassEntry::default()));
    looked.change();
    for _ in 0..2 {
        for (client, last) in base.into_iter().zip([24_u32, 96]) {
            assert_eq!(looked.send(client), 1, "{client}");
            for bit in 0..last {
                let near: IpAddr = match client {
                    IpAddr::V4(a) => Ipv4Addr::from(u32::from(a) ^ 1 << bit).into(),
                    IpAddr::V6(a) => Ipv6Addr::from(u128::from(a) ^ 1 << bit).into(),
                };
                assert_eq!(looked.send(near), 2, "{near}");
            }
        }
        for (client, backend) in same_set.iter().zip([2, 1, 2]) {
            assert_eq!(looked.send(*client), backend, "{client}");
        }
    }
}

#[test]
fn classes_of_every_number_are_known() {
    let Some(mut looked) = Looked::new("classes_of_every_number_are_known", None) else { return };
    let keys: Vec<[u32; 2]> = looked.tables.keys().collect::<Result<_, _>>().expect("keys");
    let numbers = [1, 2, 0xff, 0x100, 0x3fff, 0x4000, 0x7ffe, 0x7fff];
    for family in FAMILIES {
        // The table of the family, which only a client of it has gone by.
        for [service, class] in &keys {
            let table = looked.table(*service, *class).expect("a table");
            for number in numbers {
                looked.tables.insert([*service, number], table, 0).expect("room");
            }
        }
        let clients = of_one_set(family, numbers.len() + 1);
        let bits = if family == Family::V4 { 32 } else { 128 };
        for (client, number) in clients.iter().zip(numbers) {
            let class = ClassEntry::steady(Class::new(number as u16));
            looked.set(*client, bits, Some(class));
        }
        // One that has no table in this service.
        let class = ClassEntry::steady(Class::new(0x7ffd));
        looked.set(clients[numbers.len()], bits, Some(class));
        looked.change();
        for _ in 0..3 {
            for client in &clients[..numbers.len()] {
                assert_eq!(looked.send(*client), 2, "{client}");
            }
            assert_eq!(looked.send(clients[numbers.len()]), 1);
        }
    }
}

#[test]
fn a_class_that_has_changed_lately_is_not_kept() {
    let test = "a_class_that_has_changed_lately_is_not_kept";
    if !canary_tests::host::ready(test) {
        return;
    }
    for family in FAMILIES {
        let Some(mut looked) = Looked::new(test, None) else { return };
        let client = member(family, 1);
        let now = looked.tables.keys().next().expect("a table").expect("a table")[1] as u16;
        let changed = ClassEntry::tracking(Class::new(now), Class::REST, false);
        let (network, bits) = match family {
            Family::V4 => (Ipv4Addr::new(10, 0, 0, 0).into(), 8),
            Family::V6 => ("2001:db8::".parse().expect("an address"), 32),
        };
        looked.set(network, bits, Some(changed));
        looked.change();
        for _ in 0..3 {
            looked.send(client);
        }
        // With the same number, all that was kept would count.
        looked.set(network, bits, Some(ClassEntry::default()));
        let other = member(family, 2);
        assert_eq!([looked.send(client), looked.send(other)][1], 1);
        looked.planned.loaded.flows_v4.clear().expect("flows");
        looked.planned.loaded.flows_v6.clear().expect("flows");
        assert_eq!(looked.send(client), 1, "{family:?}: nothing was kept of it");
    }
}

#[test]
fn thousands_of_clients_go_as_a_loop_over_the_networks_says() {
    let test = "thousands_of_clients_go_as_a_loop_over_the_networks_says";
    let Some(mut looked) = Looked::new(test, None) else { return };
    let mut random = Random::from_environment(test);
    // Some in few sets, which they fight for, and some anywhere.
    let mut clients: Vec<IpAddr> = FAMILIES.iter().flat_map(|f| of_one_set(*f, 40)).collect();
    for family in FAMILIES {
        clients.extend((0..2000).map(|_| member(family, random.below(1 << 24) as u32)));
    }
    // Some whose halves undo each other: all are of one set.
    let in_both_halves = |at: u64| -> IpAddr {
        let first = 0x2001_0db8_0000_0000_u64 | at;
        let second = first.to_be().rotate_left(32);
        Ipv6Addr::from(u128::from(first) << 64 | u128::from(u64::from_be(second))).into()
    };
    clients.extend((0..500).map(in_both_halves));
    let of_shop = |key: &[u32; 2], family: Family| {
        looked
            .planned
            .in_force()
            .services
            .iter()
            .any(|plan| plan.family == family && plan.record.id == key[0])
    };
    let keys: Vec<[u32; 2]> = looked.tables.keys().collect::<Result<_, _>>().expect("keys");
    let ids = FAMILIES.map(|family| {
        keys.iter().find(|key| of_shop(key, family)).expect("a table of the family")[0]
    });
    // Classes 1 to 40, with the tables of nobody, as the agent would never have them.
    let table = |looked: &Looked, id: u32| {
        let key = looked.tables.keys().flatten().find(|key| key[0] == id).expect("a table");
        looked.table(key[0], key[1]).expect("a table")
    };
    let tables = ids.map(|id| table(&looked, id));
    let mut has_table = [[false; 41]; 2];
    let mut under: std::collections::HashMap<IpAddr, u16> = std::collections::HashMap::new();
    for family in FAMILIES {
        looked.take_staff(family);
    }
    for round in 0..30 {
        // The agent's way: said before and behind.
        let changes = looked.changes.get(&0, 0).expect("a number");
        looked.changes.set(0, changes + 1, 0).expect("a number");
        for at in 0..2 {
            for class in 1..=40 {
                let key = [ids[at], class];
                has_table[at][class as usize] = random.below(2) == 0;
                if has_table[at][class as usize] {
                    looked.tables.insert(key, tables[at], 0).expect("room");
                } else {
                    _ = looked.tables.remove(&key);
                }
            }
        }
        for _ in 0..300 {
            let client = random.one_of(&clients);
            let class = random.below(41) as u16;
            let bits = if client.is_ipv4() { 32 } else { 128 };
            looked.set(client, bits, Some(ClassEntry::steady(Class::new(class))));
            under.insert(client, class);
        }
        let asked = random.below(2) == 0;
        let ask = |looked: &mut Looked, random: &mut Random, count: usize| {
            for _ in 0..count {
                // Most are of two sets, one of each family.
                let of = if random.below(4) == 0 { clients.len() } else { 80 };
                let client = clients[random.below(of as u64) as usize];
                let class = under.get(&client).copied().unwrap_or(0);
                let at = usize::from(client.is_ipv6());
                let expected = if has_table[at][usize::from(class)] { 2 } else { 1 };
                assert_eq!(looked.send(client), expected, "round {round}: {client} of {class}");
            }
        };
        if asked {
            ask(&mut looked, &mut random, 300);
        }
        looked.changes.set(0, changes + 2, 0).expect("a number");
        ask(&mut looked, &mut random, 3000);
    }
    assert_eq!(looked.planned.flows(), 0, "nothing is tracked");
}
