//! Watched connections in the loaded program: what each signal takes, in each mode and family;
//! that program and model agree; what is missed; and that the next agent goes on.

use std::{net::IpAddr, time::Duration};

use anyhow::Result;
use aya::maps::{HashMap, Map, MapData};
use canary_agent::{
    config::model::SignalKind,
    daemon::signals::{WatchedService, WatchedVersion, Watcher},
    plan::Family,
    signals::window::ServiceWindow,
};
use canary_ebpf_common::{
    abi::{FlowKeyV4, FlowKeyV6, Sample, address, outcome},
    signals::{self, Seen, Step},
    steer::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};
use canary_tests::{
    host,
    loaded::{FlowKey, Loaded, Sizes, XDP_PASS, XDP_TX},
    model::Random,
    names::Host,
    notation::parse,
    world::{Plane, Service, World, addr},
};

/// The client's first number, and the server's.
const CLIENT: u32 = 1000;
const SERVER: u32 = 7000;

/// The program over one service, and what looks after what is watched of it.
struct Bench {
    loaded: Loaded,
    watcher: Watcher,
    wanted: WatchedService,
    family: Family,
    nat: bool,
    /// The port that the balancer speaks from, once there is one.
    port: Option<u16>,
}

const MODES: [(&str, Family); 6] = [
    ("nat", Family::V4),
    ("nat", Family::V6),
    ("dsr", Family::V4),
    ("dsr", Family::V6),
    ("ipip", Family::V4),
    ("gue", Family::V6),
];

impl Bench {
    fn new(mode: &str, family: Family, samples: u32) -> Self {
        let service = Service { mode: mode.to_owned(), signals: true, ..Service::default() };
        let world = World { service: vec![service], ..World::default() };
        let Plane { plane, ids, .. } =
            world.plane(|name| anyhow::bail!("no interface {name}")).expect("a world");
        let sizes = Sizes { samples, ..world.sizes() };
        let mut loaded = Loaded::new(&plane, &sizes).expect("root, and a program");
        let wanted = WatchedService {
            name: "shop".to_owned(),
            tables: vec![(ids[0][0], false), (ids[0][1], true)],
            versions: vec![WatchedVersion { name: "stable".to_owned(), slot: 0, share: 1.0 }],
            control: "stable".to_owned(),
            per_second: 0.0,
            slow_over: Some(Duration::from_secs(2)),
            compared: None,
            control_of: None,
        };
        let maps = loaded.datapath.signals().expect("the maps");
        let mut watcher = Watcher::new(maps).expect("the maps");
        watcher.want(vec![wanted.clone()]).expect("the maps");
        let mut bench = Self { loaded, watcher, wanted, family, nat: mode == "nat", port: None };
        assert!(!bench.window().complete, "what came before it was not seen");
        bench
    }

    /// Runs a packet of the client's.
    fn client(&mut self, port: u16, flags: &str, seq: u32, ack: u32) {
        let ip = if self.family == Family::V4 { "ip" } else { "ip6" };
        let text = format!(
            "eth client > us / {ip} client > vip / tcp {port} > 80 {flags} seq={seq} ack={ack}"
        );
        let seen = self.loaded.run(&parse(&text).expect("a packet")).expect("a run");
        assert!([XDP_TX, XDP_PASS].contains(&seen.action), "{text}: {}", seen.action);
        if self.nat && seen.action == XDP_TX {
            let at = if self.family == Family::V4 { 14 + 20 } else { 14 + 40 };
            self.port = Some(u16::from_be_bytes([seen.frame[at], seen.frame[at + 1]]));
        }
    }

    /// Runs a packet of the server's on the connection of the client's last packet.
    fn server(&mut self, flags: &str, seq: u32, ack: u32) {
        let ip = if self.family == Family::V4 { "ip" } else { "ip6" };
        let port = self.port.expect("a translated connection");
        let text =
            format!("eth b1 > us / {ip} b1 > nat / tcp 80 > {port} {flags} seq={seq} ack={ack}");
        let seen = self.loaded.run(&parse(&text).expect("a packet")).expect("a run");
        assert_eq!(seen.action, XDP_TX, "{text}");
    }

    /// Lets time pass for what is watched.
    fn age(&mut self, time: Duration) {
        let age = |sample: &mut Sample| {
            sample.syn_ns = sample.syn_ns.saturating_sub(time.as_nanos() as u64);
            sample.fin_ns = sample.fin_ns.saturating_sub(time.as_nanos() as u64);
        };
        match self.family {
            Family::V4 => samples::<FlowKeyV4>(&self.loaded, "SAMPLES_V4", age),
            Family::V6 => samples::<FlowKeyV6>(&self.loaded, "SAMPLES_V6", age),
        }
    }

    fn watched(&self) -> usize {
        let mut count = 0;
        match self.family {
            Family::V4 => samples::<FlowKeyV4>(&self.loaded, "SAMPLES_V4", |_| count += 1),
            Family::V6 => samples::<FlowKeyV6>(&self.loaded, "SAMPLES_V6", |_| count += 1),
        }
        count
    }

    fn window(&mut self) -> ServiceWindow {
        self.watcher.turn().expect("the maps");
        self.watcher.known().services.remove(0).window
    }

    /// Ends a window that nothing was missed in; connections that began, and events by signal.
    fn counted(&mut self) -> (u64, [u64; outcome::COUNT]) {
        let window = self.window();
        assert!(window.complete, "{window:?}");
        (window.versions[0].watched, window.versions[0].events)
    }
}

/// Changes every sample of a map.
fn samples<K: FlowKey>(loaded: &Loaded, name: &str, mut change: impl FnMut(&mut Sample)) {
    type Bytes = [u8; size_of::<Sample>()];
    let data = MapData::from_pin(loaded.pins().join("maps").join(name)).expect("the map");
    let mut map: HashMap<_, K::Bytes, Bytes> = Map::HashMap(data).try_into().expect("a hash map");
    let entries: Vec<_> = map.iter().collect::<Result<_, _>>().expect("entries");
    for (key, bytes) in entries {
        // SAFETY: same size, and every bit pattern is a `Sample`: integers only.
        let mut sample = unsafe { std::mem::transmute::<Bytes, Sample>(bytes) };
        change(&mut sample);
        // SAFETY: same size, and no byte is uninitialised.
        let bytes = unsafe { std::mem::transmute::<Sample, Bytes>(sample) };
        map.insert(key, bytes, 0).expect("room");
    }
}

fn only(signals: &[SignalKind]) -> [u64; outcome::COUNT] {
    SignalKind::ALL.map(|kind| u64::from(signals.contains(&kind)))
}

#[test]
fn each_signal_is_counted_in_each_mode_and_family() {
    use SignalKind::*;
    if !host::ready("each_signal_is_counted_in_each_mode_and_family") {
        return;
    }
    for (mode, family) in MODES {
        let name = format!("{mode}, {family:?}");
        let mut b = Bench::new(mode, family, 64);
        let open = |b: &mut Bench, port| {
            b.client(port, "S", CLIENT, 0);
            if b.nat {
                b.server("SA", SERVER, CLIENT + 1);
            }
            b.client(port, "A", CLIENT + 1, SERVER + 1);
        };
        // All is well.
        open(&mut b, 40_000);
        b.client(40_000, "A", CLIENT + 100, SERVER + 500);
        b.client(40_000, "FA", CLIENT + 100, SERVER + 500);
        assert_eq!(b.counted(), (1, only(&[])), "{name}: a good one");
        assert_eq!(b.watched(), 0, "{name}");

        b.client(40_001, "S", CLIENT, 0);
        if b.nat {
            b.server("RA", 0, CLIENT + 1);
        } else {
            assert_eq!(b.counted(), (0, only(&[])), "{name}: nobody knows yet");
            b.age(Duration::from_secs(3));
        }
        assert_eq!(b.counted(), (1, only(&[ConnectFailed])), "{name}: refused");

        b.client(40_002, "S", CLIENT, 0);
        b.client(40_002, "S", CLIENT, 0);
        b.age(Duration::from_secs(3));
        assert_eq!(b.counted(), (1, only(&[ConnectFailed, SynRetransmit])), "{name}: no answer");
        assert_eq!(b.watched(), 0, "{name}");

        b.client(40_003, "S", CLIENT, 0);
        b.age(Duration::from_millis(2100));
        if b.nat {
            b.server("SA", SERVER, CLIENT + 1);
        } else {
            b.client(40_003, "A", CLIENT + 1, SERVER + 1);
        }
        assert_eq!(b.counted(), (1, only(&[SlowHandshake])), "{name}: late");

        open(&mut b, 40_004);
        b.client(40_004, "A", CLIENT + 100, SERVER + 500);
        b.client(40_004, "R", CLIENT + 100, 0);
        assert_eq!(b.counted(), (1, only(&[ClientReset])), "{name}: reset by the client");

        open(&mut b, 40_005);
        b.client(40_005, "FA", CLIENT + 100, SERVER + 2);
        assert_eq!(b.counted(), (1, only(&[])), "{name}: it may still get something");
        b.age(Duration::from_secs(5));
        assert_eq!(b.counted(), (0, only(&[ShortFlow])), "{name}: closed with nothing");

        if b.nat {
            open(&mut b, 40_006);
            b.client(40_006, "A", CLIENT + 100, SERVER + 500);
            b.server("R", SERVER + 500, 0);
            assert_eq!(b.counted(), (1, only(&[ServerReset])), "{name}: reset by the server");
        }

        // Somebody who knows no numbers.
        open(&mut b, 40_007);
        b.client(40_007, "R", CLIENT + 900_000, 0);
        if b.nat {
            b.server("R", SERVER + 900_000, 0);
        }
        assert_eq!(b.counted(), (1, only(&[])), "{name}: a guess");

        // One client's misfortunes are one event.
        for port in 41_000..41_010 {
            b.client(port, "S", CLIENT, 0);
        }
        b.age(Duration::from_secs(3));
        assert_eq!(b.counted(), (10, only(&[ConnectFailed])), "{name}: ten at once");
        let known = b.watcher.known();
        let counters = known.services[0].versions[0].counters;
        let failed = counters.outcomes[0];
        assert_eq!(failed, 12, "{name}: connections");
        let handshakes: u64 = counters.handshakes.iter().sum();
        assert_eq!(handshakes + failed, counters.watched, "{name}");
    }
}

#[test]
fn what_is_missed_makes_the_window_incomplete_and_not_the_next() {
    if !host::ready("what_is_missed_makes_the_window_incomplete_and_not_the_next") {
        return;
    }
    // 16 KiB of the ring buffer hold 409 outcomes.
    let mut b = Bench::new("nat", Family::V4, 64);
    for port in 20_000..20_500 {
        b.client(port, "S", CLIENT, 0);
        b.server("RA", 0, CLIENT + 1);
    }
    let window = b.window();
    assert!(!window.complete, "{window:?}");
    assert_eq!(window.versions[0].watched, 500, "they are counted all the same");
    let lost = b.watcher.known().services[0].versions[0].counters.lost;
    assert!((91..200).contains(&lost), "{lost}");
    assert_eq!(b.counted(), (0, only(&[])), "nothing was missed since");

    for port in 30_000..30_100 {
        b.client(port, "S", CLIENT, 0);
    }
    assert!(b.watched() >= 64, "{} of 64", b.watched());
    let window = b.window();
    assert!(!window.complete, "no room for some connections: {window:?}");
    assert!(b.watcher.known().services[0].versions[0].counters.full > 0);
    assert!(b.counted().1 == only(&[]));
    assert_eq!(b.watcher.known().services[0].incomplete_windows, 3, "the first one, too");
}

#[test]
fn one_in_so_many_is_watched_and_a_change_forgets_what_is_under_way() {
    if !host::ready("one_in_so_many_is_watched_and_a_change_forgets_what_is_under_way") {
        return;
    }
    for (mode, family) in MODES {
        let mut b = Bench::new(mode, family, 4096);
        b.wanted.versions.push(WatchedVersion { name: "v2".to_owned(), slot: 1, share: 0.01 });
        b.wanted.versions[0].share = 0.99;
        b.client(20_000, "S", CLIENT, 0);
        b.watcher.want(vec![b.wanted.clone()]).expect("the maps");
        let halvings = b.watcher.known().services[0].versions[0].halvings;
        assert_eq!(halvings, Some(4), "{mode}, {family:?}: control, eight times as many");
        b.age(Duration::from_secs(3));
        assert_eq!(b.counted(), (0, only(&[])), "whoever was begun before is not judged");
        assert_eq!(b.watched(), 0, "and not kept");
        for port in 20_000..24_000 {
            b.client(port, "S", CLIENT, 0);
        }
        let watched = b.watched();
        assert!(
            (170..330).contains(&watched),
            "{mode}, {family:?}: {watched} of 4000, not about 250"
        );
        b.wanted.versions.clear();
        b.watcher.want(vec![b.wanted.clone()]).expect("the maps");
        for port in 30_000..30_500 {
            b.client(port, "S", CLIENT, 0);
        }
        assert_eq!(b.watched(), watched, "nobody else is watched");
    }
}

#[test]
fn the_next_agent_goes_on_counting_and_begins_with_an_incomplete_window() {
    if !host::ready("the_next_agent_goes_on_counting_and_begins_with_an_incomplete_window") {
        return;
    }
    for (mode, family) in MODES {
        let mut b = Bench::new(mode, family, 64);
        b.client(40_000, "S", CLIENT, 0);
        b.client(40_001, "S", CLIENT, 0);
        b.age(Duration::from_secs(3));
        b.counted();
        b.client(40_002, "S", CLIENT, 0);
        b.loaded.reopen().expect("the next agent");
        let maps = b.loaded.datapath.signals().expect("the maps");
        b.watcher = Watcher::new(maps).expect("the maps");
        b.wanted.slow_over = None;
        b.watcher.want(vec![b.wanted.clone()]).expect("the maps");
        let known = b.watcher.known();
        assert_eq!(known.services[0].slow_over, Some(Duration::from_secs(2)), "it is kept");
        assert_eq!(known.services[0].versions[0].counters.outcomes[0], 2, "{mode}, {family:?}");
        assert!(!b.window().complete);
        b.age(Duration::from_secs(3));
        let counted = b.counted();
        assert_eq!(counted, (1, only(&[SignalKind::ConnectFailed])), "{mode}, {family:?}");
        assert_eq!(b.watcher.known().services[0].versions[0].counters.outcomes[0], 3);
    }
}

/// The same packets to the program and to the model, both directions or one.
fn sequence(mode: &str, family: Family) {
    let mut random = Random::from_environment(&format!("signals, {mode}, {family:?}"));
    let mut b = Bench::new(mode, family, 64);
    b.wanted.slow_over = Some(Duration::from_secs(3600));
    b.watcher.want(vec![b.wanted.clone()]).expect("the maps");
    assert!(!b.window().complete, "what is slow has changed in it");
    let mut model: Option<Sample> = None;
    let mut totals = [0_u64; outcome::COUNT];
    let (mut began, mut events) = (0, 0);
    let port = 40_000;
    let (mut seq, mut server_seq) = (CLIENT, SERVER);
    let begun = std::time::Instant::now();
    // Under three seconds, so that nothing is said by time: the model has none.
    while events < 3_000 && begun.elapsed() < Duration::from_secs(2) {
        events += 1;
        let from_server = b.nat && b.port.is_some() && random.below(2) == 0;
        let (flags, at, ack) = if from_server {
            let ack = random.one_of(&[seq.wrapping_add(1), seq.wrapping_add(1), 5]);
            match random.below(10) {
                0..3 => (TCP_SYN | TCP_ACK, server_seq, ack),
                3..6 => {
                    server_seq = server_seq.wrapping_add(random.below(2000) as u32);
                    (TCP_ACK, server_seq, ack)
                }
                6..8 => {
                    (TCP_RST | TCP_ACK, server_seq.wrapping_add(random.one_of(&[0, 1 << 20])), ack)
                }
                _ => (TCP_FIN | TCP_ACK, server_seq, ack),
            }
        } else {
            let ack = server_seq.wrapping_add(random.one_of(&[0, 1, 2, 900]));
            match random.below(10) {
                0..3 => {
                    let other = random.bits() as u32;
                    let at = random.one_of(&[seq, seq, CLIENT, other]);
                    // What goes on is what was begun.
                    if model.is_none_or(|sample| sample.state == 0) {
                        seq = at;
                    }
                    (TCP_SYN, at, 0)
                }
                3..7 => (TCP_ACK, seq.wrapping_add(random.below(3000) as u32), ack),
                7..8 => (TCP_RST, seq.wrapping_add(random.one_of(&[1, 1, 1 << 20])), ack),
                _ => (TCP_FIN | TCP_ACK, seq.wrapping_add(1), ack),
            }
        };
        let text: String = "FSRPA"
            .chars()
            .enumerate()
            .filter(|(bit, _)| flags & 1 << bit != 0)
            .map(|(_, letter)| letter)
            .collect();
        let before = reasons(&b.loaded);
        if from_server {
            b.server_if_known(&text, at, ack);
        } else {
            b.client(port, &text, at, ack);
        }
        // What steering knows nothing of is not watched either.
        if reasons(&b.loaded) != before {
            continue;
        }
        let seen = Seen { now_ns: 1, flags: flags.into(), seq: at, ack, from_server };
        let opens = !from_server && signals::opens(seen.flags);
        match &mut model {
            None if opens => model = Some(signals::begin(1, at, 0, 0)),
            None => {}
            Some(sample) => {
                let Step { began: this, outcomes, over, .. } =
                    signals::step(sample, &seen, u64::MAX);
                began += u64::from(this);
                for (at, total) in totals.iter_mut().enumerate() {
                    *total += u64::from(outcomes & 1 << at != 0);
                }
                if over {
                    model = None;
                }
            }
        }
        let mut found = None;
        let look = |sample: &mut Sample| {
            found = Some(Sample { syn_ns: 0, fin_ns: 0, epoch: 0, place: 0, ..*sample });
        };
        match family {
            Family::V4 => samples::<FlowKeyV4>(&b.loaded, "SAMPLES_V4", look),
            Family::V6 => samples::<FlowKeyV6>(&b.loaded, "SAMPLES_V6", look),
        }
        let expected = model.map(|s| Sample { syn_ns: 0, fin_ns: 0, epoch: 0, place: 0, ..s });
        assert_eq!(
            found, expected,
            "event {events}: {text} {at} {ack}, of the server: {from_server}"
        );
    }
    b.window();
    let counters = b.watcher.known().services[0].versions[0].counters;
    assert_eq!((counters.watched, counters.outcomes), (began, totals), "{mode}, {family:?}");
    assert!(began > 20 && totals.iter().filter(|total| **total > 0).count() >= 3, "{totals:?}");
    println!("signals, {mode}, {family:?}: {events} packets, {began} began, {totals:?}");
}

fn reasons(loaded: &Loaded) -> u64 {
    loaded.reasons().iter().sum()
}

impl Bench {
    /// Runs a packet of the server's that may belong to no connection any more.
    fn server_if_known(&mut self, flags: &str, seq: u32, ack: u32) {
        let ip = if self.family == Family::V4 { "ip" } else { "ip6" };
        let Some(port) = self.port else { return };
        let text =
            format!("eth b1 > us / {ip} b1 > nat / tcp 80 > {port} {flags} seq={seq} ack={ack}");
        self.loaded.run(&parse(&text).expect("a packet")).expect("a run");
    }
}

#[test]
fn program_and_model_agree_on_every_sample() {
    if !host::ready("program_and_model_agree_on_every_sample") {
        return;
    }
    for (mode, family) in MODES {
        sequence(mode, family);
    }
}

#[test]
fn the_client_of_an_event_is_the_one_that_sent_the_packets() {
    if !host::ready("the_client_of_an_event_is_the_one_that_sent_the_packets") {
        return;
    }
    for (mode, family) in MODES {
        let b = Bench::new(mode, family, 64);
        let Bench { mut loaded, watcher, .. } = b;
        drop(watcher);
        let mut maps = loaded.datapath.signals().expect("the maps");
        let ip = if family == Family::V4 { "ip" } else { "ip6" };
        for flags in ["S", "R"] {
            let seq = if flags == "S" { CLIENT } else { CLIENT + 1 };
            let text = format!(
                "eth client > us / {ip} client > vip / tcp 40000 > 80 {flags} seq={seq} ack=1"
            );
            loaded.run(&parse(&text).expect("a packet")).expect("a run");
        }
        let mut clients = Vec::new();
        maps.events(|event| clients.push((event.client, event.outcomes)));
        let client: IpAddr = addr(Host::named("client").expect("a client"), family);
        assert_eq!(clients, [(address(client), outcome::CLIENT_RESET)], "{mode}, {family:?}");
    }
}
