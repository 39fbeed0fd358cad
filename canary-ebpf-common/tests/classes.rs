//! DESIGN §4: no open connection changes its backend while classes change, are removed, come back
//! and expire, whatever the order; and a full flow table opens no door.
#![cfg(feature = "user")]

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use canary_ebpf_common::{
    abi::Service,
    class::{self, Class},
    entry::{BackendIndex, Entry},
    networks::{Classes, Pace, Prefix, Width, flatten},
    steer::{Segment, TCP_ACK, TCP_SYN, model::ModelFlows, steer},
};
use proptest::prelude::*;

const DRAIN_S: u32 = 100;
/// From then on what has not changed may be forgotten.
const SURE_S: u32 = DRAIN_S - DRAIN_S / 10;
const PACE: Pace = Pace { drain_s: Some(DRAIN_S), learn_s: 30 };

#[derive(Clone, Debug)]
enum Event {
    /// Routes: a class by network, the first one counts.
    Routes(Vec<(u8, u8, u16)>),
    /// A client opens a connection.
    Open(u8),
    /// Every open connection sends a packet.
    Talk,
    /// A bucket of a class's table moves to another backend.
    Move(u16, u16),
    Wait(u32),
    Sweep,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let routes = proptest::collection::vec((any::<u8>(), 24_u8..=32, 0_u16..4), 0..5);
    let event = prop_oneof![
        3 => routes.prop_map(Event::Routes),
        6 => any::<u8>().prop_map(Event::Open),
        4 => Just(Event::Talk),
        2 => (0_u16..4, 1_u16..9).prop_map(|(class, to)| Event::Move(class, to)),
        3 => (1_u32..120).prop_map(Event::Wait),
        2 => Just(Event::Sweep),
    ];
    proptest::collection::vec(event, 1..80)
}

fn addr(last: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, last])
}

struct Connection {
    client: u8,
    backend: BackendIndex,
    /// Its client's class has changed since it was opened.
    older: bool,
    /// Until when it must stay where it is; for ever if nothing has moved since it was opened.
    until_s: Option<u32>,
}

impl Connection {
    /// What it is steered by moves. Returns whether it must stay all the same.
    fn moves(&mut self, now_s: u32) -> bool {
        let stays = self.until_s.is_none_or(|until_s| now_s < until_s);
        self.until_s = Some(now_s + SURE_S);
        stays
    }
}

/// A world of one bucket for each class.
struct World {
    classes: Classes,
    tables: BTreeMap<u16, (Entry, u32)>,
    flows: ModelFlows<u32>,
    open: HashMap<u32, Connection>,
    now_s: u32,
}

impl World {
    fn new() -> Self {
        let table = |class| (class, (Entry::steady(BackendIndex::new(class + 1)), 0));
        Self {
            classes: Classes::new(Width::V4),
            tables: (0..4).map(table).collect(),
            flows: ModelFlows::new(1000),
            open: HashMap::new(),
            now_s: 1000,
        }
    }

    fn entry(&self, client: u8) -> Entry {
        let state = self.classes.states().at(addr(client));
        class::entry(state.entry, |class: Class| Some(self.tables[&class.get()].0)).unwrap()
    }

    fn send(&self, key: u32, client: u8, segment: Segment) -> BackendIndex {
        steer(&self.flows, &Service::default(), self.entry(client), &key, segment).backend
    }

    fn step(&mut self) {
        let before: Vec<_> = (0..=u8::MAX).map(|at| self.classes.states().at(addr(at))).collect();
        self.classes.step(self.now_s, PACE);
        let (now_s, states) = (self.now_s, self.classes.states());
        self.open.retain(|_, connection| {
            let now = states.at(addr(connection.client)).entry.current();
            if now == before[usize::from(connection.client)].entry.current() {
                return connection.until_s.is_none_or(|until_s| now_s < until_s);
            }
            connection.older = true;
            connection.moves(now_s)
        });
        // The agent's part: a table that a class before names keeps what it tracks.
        let named: Vec<u16> = self
            .classes
            .states()
            .prefixes()
            .iter()
            .filter(|(_, state)| state.entry.tracked())
            .map(|(_, state)| state.entry.previous().get())
            .collect();
        for (class, (entry, moved_s)) in &mut self.tables {
            let over = self.now_s >= *moved_s + DRAIN_S;
            if entry.tracked() && over && !named.contains(class) {
                *entry = Entry::steady(entry.current());
            }
        }
    }

    fn sweep(&mut self) {
        let swept = self.classes.begin_sweep().to_vec();
        let stays = |client: u8| {
            let host = Prefix::host(addr(client));
            !swept.iter().any(|prefix| prefix.contains(host)) || self.entry(client).tracked()
        };
        let client_of: HashMap<u32, u8> =
            self.open.iter().map(|(key, connection)| (*key, connection.client)).collect();
        let keep: HashMap<u32, bool> =
            client_of.iter().map(|(key, client)| (*key, stays(*client))).collect();
        self.flows.retain(|key, _| keep.get(key).copied().unwrap_or(false));
        if self.classes.swept() {
            self.step();
        }
    }
}

fn ack(seq: u32) -> Segment {
    Segment::tcp(TCP_ACK, seq)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn open_connections_stay(events in events()) {
        let mut world = World::new();
        let mut next_key = 0;
        for event in events {
            match event {
                Event::Routes(routes) => {
                    let items = routes
                        .iter()
                        .enumerate()
                        .map(|(at, (last, len, class))| (Prefix::of(addr(*last), *len), (at, *class)))
                        .collect();
                    let first = |so_far: Option<(usize, u16)>, item: (usize, u16)| {
                        Some(so_far.map_or(item, |so_far| so_far.min(item)))
                    };
                    let class = |first: Option<(usize, u16)>| {
                        first.map_or(Class::REST, |(_, class)| Class::new(class))
                    };
                    world.classes.want(flatten(Width::V4, items, None, first, class));
                    world.step();
                }
                Event::Open(client) => {
                    next_key += 1;
                    let backend = world.send(next_key, client, Segment::tcp(TCP_SYN, 100));
                    let connection = Connection { client, backend, older: false, until_s: None };
                    prop_assert_eq!(world.send(next_key, client, ack(101)), backend);
                    // New connections go by the class of now, at once.
                    let class = world.classes.states().at(addr(client)).entry.current();
                    prop_assert_eq!(backend, world.tables[&class.get()].0.current());
                    world.open.insert(next_key, connection);
                }
                Event::Talk => {
                    for (key, c) in &world.open {
                        let backend = world.send(*key, c.client, ack(200));
                        prop_assert_eq!(backend, c.backend, "client {} of {}", c.client, key);
                    }
                }
                Event::Move(class, to) => {
                    let now_s = world.now_s;
                    let (entry, moved_s) = world.tables.get_mut(&class).unwrap();
                    let previous = if entry.tracked() { entry.previous() } else { entry.current() };
                    *entry = Entry::tracking(BackendIndex::new(to), previous, false);
                    *moved_s = now_s;
                    // Older connections are remembered by the class, whatever its table does.
                    let states = world.classes.states();
                    world.open.retain(|_, connection| {
                        let of = states.at(addr(connection.client)).entry.current().get();
                        of != class || connection.older || connection.moves(now_s)
                    });
                }
                Event::Wait(seconds) => {
                    world.now_s += seconds;
                    world.step();
                }
                Event::Sweep => world.sweep(),
            }
        }
    }
}

/// The classes of before are never forgotten early, and always in the end.
#[test]
fn what_is_removed_stays_until_its_drain_ends() {
    let staff = Prefix::of(addr(0), 28);
    let only = |class: u16| flatten(Width::V4, vec![(staff, class)], 0, |_, c| c, Class::new);
    let mut classes = Classes::new(Width::V4);
    classes.want(only(1));
    assert!(classes.step(10, PACE).is_some());
    assert_eq!(classes.used(), [0, 1].map(Class::new).into());
    classes.want(only(0));
    let mut due = classes.step(50, PACE);
    assert_eq!(classes.states().prefixes().len(), 1, "a tombstone");
    let mut steps = 0;
    while let Some(at) = due {
        assert!(at > 50 && steps < 3);
        due = classes.step(at, PACE);
        steps += 1;
        if classes.states().prefixes().is_empty() {
            assert!((50 + SURE_S..=50 + DRAIN_S).contains(&at));
        }
    }
    assert!(classes.states().prefixes().is_empty());
    // It is tracked again only when nothing is remembered of it.
    classes.want(only(2));
    classes.step(500, PACE);
    assert!(classes.waits() && classes.states().prefixes().is_empty());
    assert_eq!(classes.begin_sweep(), [staff]);
    assert!(classes.swept());
    classes.step(500, PACE);
    let state = classes.states().at(addr(3)).entry;
    assert_eq!(
        (state.current(), state.previous(), state.tracked()),
        (Class::new(2), Class::REST, true)
    );
}

/// A client that is excluded now, and was not before, is refused while nothing can be remembered.
#[test]
fn a_full_table_opens_no_door() {
    let (control, canary) = (BackendIndex::new(1), BackendIndex::new(2));
    let entry = Entry::tracking(control, canary, false);
    let flows = ModelFlows::new(0);
    let syn = Segment::tcp(TCP_SYN, 1);
    let steering = steer(&flows, &Service::default(), entry, &1_u32, syn);
    assert_eq!(steering.backend, canary);
    let refuses = |entry, segment, steering| {
        class::remembers(entry, segment) && class::refuses(entry, steering)
    };
    assert!(refuses(entry, syn, steering));
    // Whoever has been there goes on being there.
    let steering = steer(&flows, &Service::default(), entry, &1_u32, ack(9));
    assert!(!refuses(entry, ack(9), steering));
    flows.capacity.set(1);
    let steering = steer(&flows, &Service::default(), entry, &1_u32, syn);
    assert!(steering.backend == control && !refuses(entry, syn, steering));
}
