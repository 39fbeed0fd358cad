//! Rules about one packet (`dsr`): 1 to 7, 11 and 12.

use std::{
    cell::Cell,
    sync::atomic::{AtomicUsize, Ordering},
};

use canary_agent::plan::Family;
use canary_ebpf_common::{
    abi::{Flow, FlowKeyV4, IPPROTO_TCP, IPPROTO_UDP, Service, flow_state},
    entry::{BackendIndex, Entry},
    steer::{
        Flows, Inserted, Segment, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, model::ModelFlows, steer,
    },
};
use canary_tests::{
    loaded::Sizes,
    planned::{Planned, Shop, Version, Went, tuple},
};

use crate::support::*;

#[test]
fn rule_01_an_untracked_bucket_steers_to_current_and_neither_reads_nor_writes_state() {
    let mut planned = shop();
    for family in FAMILIES {
        for tuple in tuples(family, IPPROTO_TCP).take(50) {
            let current = current(&planned, &tuple);
            // Somebody's entry, as a sweep under way may have left it.
            let other = if current == Went::To(1) { 2 } else { 1 };
            let index = planned.index(other, family).unwrap();
            let left = Flow { last_ns: 7, backend: index.get(), ..Flow::default() };
            planned.store(&tuple, left);
            for segment in [syn(1000), ack(1001), fin(1001), rst(1002), tcp(TCP_SYN | TCP_ACK, 9)] {
                assert_eq!(planned.send(&tuple, segment), current, "{segment:?}");
            }
            // No TCP sends that.
            assert_eq!(planned.send(&tuple, tcp(0, 5)), Went::Dropped);
            assert_eq!(planned.flow(&tuple), Some(left), "it is not touched");
        }
        for tuple in tuples(family, IPPROTO_UDP).take(50) {
            assert_eq!(planned.send(&tuple, udp()), current(&planned, &tuple));
            assert_eq!(planned.flow(&tuple), None);
        }
    }
    assert_eq!(planned.flows(), 100, "those that were there");
}

#[test]
fn rule_02_a_syn_goes_to_current_and_is_remembered_and_what_is_unknown_goes_to_previous() {
    let mut planned = moved();
    for family in FAMILIES {
        let tuple = one_moved(&planned, family);
        let (new, old) = (current(&planned, &tuple), previous(&planned, &tuple));
        // A SYN with ACK, FIN or RST opens nothing.
        for (flags, there) in [
            (TCP_ACK, old),
            (TCP_RST, old),
            (TCP_FIN | TCP_ACK, old),
            (TCP_SYN | TCP_ACK, old),
            // What no TCP sends goes nowhere.
            (0, Went::Dropped),
            (TCP_FIN, Went::Dropped),
            (TCP_SYN | TCP_FIN, Went::Dropped),
            (TCP_SYN | TCP_RST, Went::Dropped),
        ] {
            let segment = tcp(flags, 5000);
            assert!(!segment.opens(), "flags {flags:#x}");
            assert_eq!(planned.send(&tuple, segment), there, "flags {flags:#x}");
            assert_eq!(planned.flow(&tuple), None, "flags {flags:#x}");
        }
        assert_eq!(establish(&mut planned, &tuple, 1000), new);
        let entry = planned.flow(&tuple).expect("it is remembered");
        assert_eq!(planned.number(BackendIndex::new(entry.backend)).map(Went::To), Some(new));
        assert_eq!(planned.send(&tuple, ack(1001)), new, "its entry is followed");
        assert_eq!(planned.send(&tuple, fin(1001)), new);
    }
    // Wherever the bucket goes next.
    let tuple = one_moved(&planned, Family::V4);
    let new = current(&planned, &tuple);
    planned.down(number(new), true);
    assert_ne!(current(&planned, &tuple), new);
    assert_eq!(planned.send(&tuple, ack(1001)), new);
}

#[test]
fn rule_03_the_flow_map_never_evicts_and_a_syn_without_room_goes_to_previous() {
    let room = 4;
    let sizes = Sizes { flows: room as u32, ..Sizes::default() };
    let mut planned = Planned::new(&Shop::default(), &sizes);
    planned.split(&[("v2", "50%")]);
    for family in FAMILIES {
        let tuples = tuples_moved(&planned, family, IPPROTO_TCP, 400);
        let (first, later) = tuples.split_at(room);
        for tuple in first {
            assert_eq!(establish(&mut planned, tuple, 1000), current(&planned, tuple));
        }
        for tuple in later {
            let old = previous(&planned, tuple);
            assert_eq!(planned.send(tuple, syn(1000)), old, "there is no room");
            assert_eq!(planned.send(tuple, ack(1001)), old, "as its later packets");
            assert_eq!(planned.send(tuple, syn(1000)), old, "and its SYN when it comes again");
        }
        for tuple in first {
            assert_eq!(
                planned.send(tuple, ack(2000)),
                current(&planned, tuple),
                "nobody was evicted"
            );
        }
    }
}

#[test]
fn rule_04_an_entry_is_provisional_until_its_sequence_is_confirmed() {
    let mut planned = moved();
    for family in FAMILIES {
        let tuples = tuples_moved(&planned, family, IPPROTO_TCP, 3);
        let (new, old) = (current(&planned, &tuples[0]), previous(&planned, &tuples[0]));
        // An old connection's tuple, and a SYN that somebody forged: 1000. Of the sequence
        // numbers that it is not confirmed by, those next to the ones that it is.
        assert_eq!(planned.send(&tuples[0], ack(900_000)), old);
        assert_eq!(planned.send(&tuples[0], syn(1000)), new);
        for seq in [1000, 999, 1001 + (64 << 10), 900_000, 0x8000_0000] {
            for flags in [TCP_ACK, TCP_FIN | TCP_ACK, TCP_RST] {
                assert_eq!(planned.send(&tuples[0], tcp(flags, seq)), old, "sequence number {seq}");
            }
        }
        let entry = planned.flow(&tuples[0]).unwrap();
        assert_eq!((entry.state, entry.syn_seq), (flow_state::PROVISIONAL, 1000));
        // The last byte of the window, across the wrap of sequence numbers.
        let isn = u32::MAX - 5;
        let (new, old) = (current(&planned, &tuples[1]), previous(&planned, &tuples[1]));
        assert_eq!(planned.send(&tuples[1], syn(isn)), new);
        assert_eq!(planned.send(&tuples[1], ack(isn.wrapping_add(64 << 10))), new);
        assert_eq!(
            planned.send(&tuples[1], ack(isn.wrapping_add(1 << 30))),
            new,
            "it is confirmed"
        );
        assert_ne!(new, old);
        let (new, old) = (current(&planned, &tuples[2]), previous(&planned, &tuples[2]));
        assert_eq!(planned.send(&tuples[2], syn(isn)), new);
        assert_eq!(planned.send(&tuples[2], ack(isn)), old, "the SYN's own number");
        assert_eq!(planned.send(&tuples[2], ack(isn.wrapping_add(1))), new);
    }
}

/// A service of three backends, all in `v2`'s place once they were `v1`'s, so that a bucket can
/// move twice and each place be told apart.
fn three_places() -> Planned {
    let version = |name, n| Version { name, backends: vec![(n, 1)] };
    let versions = vec![version("stable", 1), version("v2", 2), version("v3", 3)];
    let mut planned = planned(&Shop { versions, ..Shop::default() });
    planned.split(&[("v2", "100%")]);
    planned
}

/// The bucket of each tuple of [`three_places`] moves on to backend 3.
fn moves_on(planned: &mut Planned) {
    planned.split(&[("v2", "0%"), ("v3", "100%")]);
}

#[test]
fn rule_05_a_syn_that_finds_an_entry_follows_it() {
    for family in FAMILIES {
        let mut planned = three_places();
        let tuples = tuples_moved(&planned, family, IPPROTO_TCP, 3);
        assert_eq!(planned.send(&tuples[0], syn(1000)), Went::To(2));
        establish(&mut planned, &tuples[1], 1000);
        establish(&mut planned, &tuples[2], 1000);
        moves_on(&mut planned);
        assert_eq!(planned.send(&tuples[0], syn(1000)), Went::To(2), "a retransmission");
        assert_eq!(planned.send(&tuples[1], syn(1000)), Went::To(2), "one that comes late");
        assert_eq!(planned.send(&tuples[2], syn(700_000)), Went::To(2), "not the client's");
        assert_eq!(planned.send(&tuples[2], ack(1001)), Went::To(2));
        // Down: the connection is not over for that.
        planned.down(2, true);
        assert_eq!(planned.send(&tuples[1], syn(1000)), Went::To(2), "an established one's");
    }
}

#[test]
fn rule_05_a_syn_replaces_a_provisional_entry_of_a_backend_that_is_down() {
    for family in FAMILIES {
        let mut planned = three_places();
        let tuple = one_moved(&planned, family);
        assert_eq!(planned.send(&tuple, syn(1000)), Went::To(2));
        planned.down(2, true);
        let now = current(&planned, &tuple);
        assert_ne!(now, Went::To(2));
        assert_eq!(planned.send(&tuple, syn(1000)), now);
        assert_eq!(planned.send(&tuple, ack(1001)), now);
    }
}

#[test]
fn rule_05_a_syn_with_another_number_replaces_what_is_provisional_closing_or_down() {
    for family in FAMILIES {
        let mut planned = three_places();
        let tuples = tuples_moved(&planned, family, IPPROTO_TCP, 4);
        assert_eq!(planned.send(&tuples[0], syn(1000)), Went::To(2));
        for tuple in &tuples[1..] {
            establish(&mut planned, tuple, 1000);
        }
        planned.send(&tuples[1], fin(1001));
        planned.send(&tuples[2], rst(1001));
        moves_on(&mut planned);
        for (tuple, what) in tuples.iter().zip(["provisional", "FIN", "RST"]) {
            assert_eq!(planned.send(tuple, syn(700_000)), Went::To(3), "{what}");
            assert_eq!(planned.send(tuple, ack(700_001)), Went::To(3), "{what}");
        }
        planned.down(2, true);
        let now = current(&planned, &tuples[3]);
        assert_ne!(now, Went::To(2));
        assert_eq!(planned.send(&tuples[3], syn(700_000)), now, "down");
        assert_eq!(planned.send(&tuples[3], ack(700_001)), now);
    }
}

#[test]
fn rule_05_a_half_open_connection_leaves_a_backend_that_lost_its_next_hop() {
    for family in FAMILIES {
        let mut planned = three_places();
        let tuple = one_moved(&planned, family);
        assert_eq!(planned.send(&tuple, syn(1000)), Went::To(2));
        planned.reachable(2, false);
        let now = current(&planned, &tuple);
        assert!(now != Went::To(2) && now != Went::Dropped);
        assert_eq!(planned.send(&tuple, syn(1000)), now);
        assert_eq!(planned.send(&tuple, ack(1001)), now);
    }
}

#[test]
fn rule_05_what_was_opened_while_there_was_no_backend_finds_one_later() {
    for family in FAMILIES {
        let mut planned = planned(&Shop { fallback: "none", ..Shop::default() });
        planned.split(&[("v2", "100%")]);
        planned.down(3, true);
        planned.down(4, true);
        let moved = |p: &Planned, protocol| {
            let mut all = tuples(family, protocol);
            all.find(|t| p.entry(t).tracked() && p.current(t).is_none()).unwrap()
        };
        let (stream, flow) = (moved(&planned, IPPROTO_TCP), moved(&planned, IPPROTO_UDP));
        assert_eq!(planned.send(&stream, syn(1000)), Went::Dropped);
        planned.pass(31 * S);
        assert_eq!(planned.send(&flow, udp()), Went::Dropped);
        assert_eq!(planned.send(&stream, syn(1000)), Went::Dropped);
        planned.down(3, false);
        assert_eq!(planned.send(&stream, syn(1000)), Went::To(3));
        assert_eq!(planned.send(&stream, ack(1001)), Went::To(3));
        assert_eq!(planned.send(&flow, udp()), Went::To(3));
    }
}

#[test]
fn rule_06_fin_and_rst_only_mark_an_entry_which_goes_after_120_seconds_of_silence() {
    for family in FAMILIES {
        for (close, mark) in [(fin(1001), flow_state::CLOSING), (rst(1001), flow_state::RESET)] {
            let mut planned = moved();
            let tuples = tuples_moved(&planned, family, IPPROTO_TCP, 2);
            let new: Vec<Went> = tuples.iter().map(|t| current(&planned, t)).collect();
            for tuple in &tuples {
                establish(&mut planned, tuple, 1000);
                planned.send(tuple, close);
                assert_eq!(planned.flow(tuple).expect("it is marked").state, mark);
            }
            planned.pass(110 * S);
            // What the client still has to say: another FIN, another RST.
            assert_eq!(planned.send(&tuples[0], close), new[0], "still there");
            planned.pass(20 * S);
            assert!(planned.flow(&tuples[1]).is_none(), "gone after 120 s of silence");
            assert_eq!(planned.send(&tuples[0], close), new[0], "after 20 s");
            planned.pass(130 * S);
            assert_eq!(planned.flows(), 0, "what is closed does not stay until the drain is over");
        }
    }
}

/// A client that has sent a FIN sends nothing new: it acknowledges, and repeats itself.
#[test]
fn rule_06_what_a_closed_connection_still_sends_takes_no_mark_away() {
    for family in FAMILIES {
        let mut planned = three_places();
        let tuple = one_moved(&planned, family);
        assert_eq!(establish(&mut planned, &tuple, 1000), Went::To(2));
        assert_eq!(planned.send(&tuple, data(1001, 500)), Went::To(2));
        assert_eq!(planned.send(&tuple, fin(1501).carrying(99)), Went::To(2));
        moves_on(&mut planned);
        let after = [
            ("an acknowledgement", ack(1601)),
            ("one that was overtaken", ack(1501)),
            ("the FIN once more", fin(1501).carrying(99)),
            ("its data once more", data(1001, 500)),
            ("a probe", ack(1600)),
            ("a probe with a byte", data(1600, 1)),
        ];
        for (what, segment) in after {
            // Half-closed or not: it goes where the connection is, and keeps its entry.
            planned.pass(110 * S);
            assert_eq!(planned.send(&tuple, segment), Went::To(2), "{what}");
            let state = planned.flow(&tuple).expect(what).state;
            assert_eq!(state, flow_state::CLOSING, "{what}");
        }
        assert_eq!(planned.send(&tuple, syn(700_000)), Went::To(3), "the tuple is used again");
        assert_eq!(planned.send(&tuple, ack(700_001)), Went::To(3));
    }
}

#[test]
fn rule_06_what_comes_after_a_forged_fin_or_rst_revives_the_connection() {
    for family in FAMILIES {
        let mut planned = three_places();
        let tuples = tuples_moved(&planned, family, IPPROTO_TCP, 3);
        for tuple in &tuples {
            assert_eq!(establish(&mut planned, tuple, 1000), Went::To(2));
        }
        planned.send(&tuples[0], fin(1001));
        planned.send(&tuples[0], data(1001, 2));
        planned.send(&tuples[1], rst(1001));
        planned.pass(S);
        planned.send(&tuples[1], ack(1001));
        // As near as they have to be; one more is too far. 1001 comes next.
        for seq in [1001 + (64 << 10), 1000_u32.wrapping_sub(64 << 10)] {
            planned.send(&tuples[2], fin(seq));
            planned.send(&tuples[2], rst(seq));
        }
        moves_on(&mut planned);
        for tuple in &tuples {
            assert_eq!(planned.flow(tuple).expect("it is open").state, 0);
            assert_eq!(planned.send(tuple, syn(700_000)), Went::To(2), "and not used again");
        }
        // Nor does silence end it.
        planned.pass(130 * S);
        for tuple in &tuples {
            assert_eq!(planned.send(tuple, ack(1003)), Went::To(2));
        }
        for seq in [1003 - 1 + (64 << 10), 1003_u32.wrapping_sub(64 << 10)] {
            planned.send(&tuples[0], rst(seq));
            assert_eq!(planned.flow(&tuples[0]).unwrap().state, flow_state::RESET, "{seq}");
            planned.pass(S);
            planned.send(&tuples[0], ack(1003));
        }
    }
}

/// Packets of one connection that leave a host from two processors change places.
#[test]
fn rule_06_what_a_reset_has_overtaken_revives_nothing() {
    const SECOND_NS: u64 = 1_000_000_000;
    let [current, previous] = [1, 2].map(BackendIndex::new);
    let service = Service::default();
    let key = FlowKeyV4::default();
    let flows = ModelFlows::new(1);
    let went = |entry, segment| steer(&flows, &service, entry, &key, segment).backend;
    let state = || flows.get(&key).unwrap().state;
    let entry = Entry::tracking(current, previous, false);
    for segment in [syn(1000), ack(1001), data(1001, 500), rst(1501)] {
        assert_eq!(went(entry, segment), current);
    }
    for _ in 0..3 {
        flows.clock_ns.set(flows.clock_ns.get() + SECOND_NS / 3);
        for late in [ack(1501), data(1001, 500)] {
            assert_eq!(went(entry, late), current);
            assert_eq!(state(), flow_state::RESET);
        }
    }
    // A second later it can't have been overtaken; before, who sends what is new has reset nothing.
    flows.clock_ns.set(flows.clock_ns.get() + SECOND_NS / 2);
    went(entry, ack(1501));
    assert_eq!(state(), 0);
    went(entry, rst(1501));
    went(entry, data(1501, 1));
    assert_eq!(state(), 0);
    went(entry, rst(1502));
    let returned = Entry::tracking(previous, previous, false);
    assert_eq!(went(returned, syn(700_000)), previous, "the tuple is used again");
}

#[test]
fn rule_06_half_open_entries_go_after_ten_seconds_and_established_ones_never() {
    for family in FAMILIES {
        let mut planned = moved();
        let tuples = tuples_moved(&planned, family, IPPROTO_TCP, 2);
        planned.send(&tuples[0], syn(1000));
        let new = establish(&mut planned, &tuples[1], 1000);
        planned.pass(8 * S);
        assert!(planned.flow(&tuples[0]).is_some(), "half open for 8 s");
        planned.pass(3 * S);
        assert!(planned.flow(&tuples[0]).is_none(), "half open for 11 s");
        // As long as its bucket is tracked: 900 of 1,000 s are certain.
        planned.pass(880 * S);
        assert_eq!(planned.send(&tuples[1], ack(1001)), new);
    }
}

/// A flow table in which somebody else stores an entry between a look-up and an insertion.
struct Raced {
    flows: ModelFlows<FlowKeyV4>,
    other: Cell<Option<Flow>>,
    /// Whether that one goes again before it can be looked at.
    vanishes: bool,
}

// SAFETY: as the table within.
unsafe impl Flows<FlowKeyV4> for Raced {
    fn lookup(&self, key: &FlowKeyV4) -> *mut Flow {
        self.flows.lookup(key)
    }

    fn insert(&self, key: &FlowKeyV4, flow: &Flow) -> Inserted {
        if let Some(other) = self.other.take() {
            assert_eq!(self.flows.insert(key, &other), Inserted::Stored);
        }
        let inserted = self.flows.insert(key, flow);
        if inserted == Inserted::Exists && self.vanishes {
            self.flows.remove(key);
        }
        inserted
    }

    fn remove(&self, key: &FlowKeyV4) {
        self.flows.remove(key);
    }

    fn backend_flags(&self, backend: BackendIndex) -> u32 {
        self.flows.backend_flags(backend)
    }

    fn now_ns(&self) -> u64 {
        self.flows.now_ns()
    }
}

#[test]
fn rule_07_when_another_cpu_was_first_its_entry_is_followed() {
    let [current, previous, other] = [1, 2, 3].map(BackendIndex::new);
    let entry = Entry::tracking(current, previous, false);
    let raced = |segment: Segment, state, vanishes| {
        let first =
            Flow { last_ns: 1, backend: other.get(), syn_seq: 1000, state, ..Flow::default() };
        let flows = Raced { flows: ModelFlows::new(9), other: Cell::new(Some(first)), vanishes };
        let service = Service { udp_idle_ms: 30_000, ..Service::default() };
        steer(&flows, &service, entry, &FlowKeyV4::default(), segment).backend
    };
    assert_eq!(raced(syn(1000), flow_state::PROVISIONAL, false), other);
    assert_eq!(raced(udp(), flow_state::UDP, false), other);
    assert_eq!(raced(syn(1000), flow_state::PROVISIONAL, true), previous, "nothing is remembered");
    assert_eq!(raced(udp(), flow_state::UDP, true), current);
}

/// Holds two threads together, closely: neither goes on before the other has come.
struct Pair(AtomicUsize);

impl Pair {
    fn meet(&self, round: usize) {
        self.0.fetch_add(1, Ordering::SeqCst);
        let mut turns = 0_u32;
        while self.0.load(Ordering::SeqCst) < 2 * (round + 1) {
            turns += 1;
            match turns.is_multiple_of(1000) {
                true => std::thread::yield_now(),
                false => std::hint::spin_loop(),
            }
        }
    }
}

/// Two CPUs look a SYN up at the same time, and both find nothing: it takes chance, and so many
/// rounds that chance is certain where there are two CPUs.
#[test]
fn rule_07_of_two_cpus_with_one_syn_only_one_opens_the_connection() {
    let sizes = Sizes { flows: 1 << 17, ..Sizes::default() };
    let mut planned = Planned::new(&Shop::default(), &sizes);
    planned.split(&[("v2", "100%")]);
    let clients = (1..=10).flat_map(|n| (20_000..30_000).map(move |port| (n, port)));
    let frames: Vec<Vec<u8>> = clients
        .map(|(n, port)| tuple(n, Family::V4, port, IPPROTO_TCP))
        .filter(|t| planned.entry(t).tracked())
        .map(|t| planned.frame(&t, syn(1000)))
        .collect();
    assert!(frames.len() > 50_000);
    let (pair, frames) = (Pair(AtomicUsize::new(0)), &frames);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut runner = planned.loaded.runner().unwrap();
            let pair = &pair;
            scope.spawn(move || {
                for (round, frame) in frames.iter().enumerate() {
                    pair.meet(round);
                    runner.run(frame).unwrap();
                }
            });
        }
    });
    let counters = [3, 4].map(|n| planned.counters(n, Family::V4));
    let packets: u64 = counters.iter().map(|c| c.packets).sum();
    let connections: u64 = counters.iter().map(|c| c.connections).sum();
    assert_eq!(packets, 2 * frames.len() as u64);
    assert_eq!(connections, frames.len() as u64, "an entry was stored over another");
    assert_eq!(planned.loaded.flows_v4.len(), frames.len());
}

#[test]
fn rule_11_udp_is_learned_for_udp_idle_and_new_for_it_after_that() {
    for family in FAMILIES {
        let mut planned = moved();
        let tuples = tuples_moved(&planned, family, IPPROTO_UDP, 3);
        let old: Vec<Went> = tuples.iter().map(|t| previous(&planned, t)).collect();
        let new: Vec<Went> = tuples.iter().map(|t| current(&planned, t)).collect();
        // TCP is in force at once.
        let stream = one_moved(&planned, family);
        assert_eq!(planned.send(&stream, syn(1)), current(&planned, &stream));
        assert_eq!(planned.send(&tuples[0], udp()), old[0], "learning");
        assert!(planned.flow(&tuples[0]).is_some(), "and remembered");
        planned.pass(20 * S);
        assert_eq!(planned.send(&tuples[0], udp()), old[0]);
        planned.pass(11 * S);
        // `udp_idle` is over.
        assert_eq!(planned.send(&tuples[0], udp()), old[0], "it has never been silent for so long");
        assert_eq!(planned.send(&tuples[1], udp()), new[1], "unknown: a new one");
        assert!(planned.flow(&tuples[1]).is_some(), "and remembered");
        // Not to nothing: after that other buckets would be first.
        planned.split(&[("v2", "1%")]);
        assert!((0..3).all(|n| current(&planned, &tuples[n]) == old[n]));
        assert_eq!(planned.send(&tuples[1], udp()), new[1], "it stays through the way back");
        assert_eq!(planned.send(&tuples[2], udp()), old[2]);
        planned.split(&[("v2", "50%")]);
        assert!((0..3).all(|n| current(&planned, &tuples[n]) == new[n]));
        planned.loaded.silence(31 * S).unwrap();
        assert_eq!(
            planned.send(&tuples[0], udp()),
            new[0],
            "silent for longer than `udp_idle`: a new one"
        );
        assert_eq!(planned.send(&tuples[2], udp()), new[2]);
    }
}

#[test]
fn rule_12_a_previous_backend_that_fails_its_checks_keeps_its_open_connections() {
    for family in FAMILIES {
        let mut planned = moved();
        let tuple = one_moved(&planned, family);
        let old = previous(&planned, &tuple);
        planned.down(number(old), true);
        assert_eq!(planned.send(&tuple, ack(5000)), old);
        // And one whose bucket moves for that very reason.
        let mut planned = shop();
        let tuple = tuples(family, IPPROTO_TCP).next().unwrap();
        let at = planned.send(&tuple, ack(5000));
        planned.down(number(at), true);
        assert_ne!(current(&planned, &tuple), at, "no new ones");
        assert_eq!(planned.send(&tuple, ack(5000)), at);
    }
}

/// Puts these backends into maintenance, and no others.
fn maintenance(planned: &mut Planned, backends: &[u16]) {
    let mut plane = planned.in_force().clone();
    let of = |n: &u16| FAMILIES.map(|family| planned.index(*n, family));
    let named: Vec<_> = backends.iter().flat_map(of).flatten().collect();
    for (index, backend) in &mut plane.backends {
        backend.maint = named.contains(index);
    }
    planned.loaded.datapath.apply(&plane).unwrap();
}

#[test]
fn rule_12_entries_and_previous_that_name_a_backend_in_maintenance_are_passed_over() {
    for family in FAMILIES {
        let mut planned = three_places();
        let tuples = tuples_moved(&planned, family, IPPROTO_TCP, 3);
        establish(&mut planned, &tuples[0], 1000);
        planned.send(&tuples[1], syn(1000));
        assert_eq!(planned.send(&tuples[2], ack(5000)), Went::To(1));
        moves_on(&mut planned);
        maintenance(&mut planned, &[2]);
        assert_eq!(planned.send(&tuples[0], ack(1001)), Went::To(3), "its entry is passed over");
        assert_eq!(planned.send(&tuples[1], syn(1000)), Went::To(3), "half open, too");
        maintenance(&mut planned, &[1, 2]);
        assert_eq!(planned.send(&tuples[2], ack(5000)), Went::To(3), "as is `previous`");
        let flow = tuples_moved(&planned, family, IPPROTO_UDP, 1)[0];
        assert_eq!(planned.send(&flow, udp()), Went::To(3), "while it is learned, too");
    }
}

#[test]
fn rule_12_what_opens_past_a_backend_in_maintenance_stays_where_it_opened() {
    for family in FAMILIES {
        let mut planned = three_places();
        let stream = tuples_moved(&planned, family, IPPROTO_TCP, 2);
        let flow = tuples_moved(&planned, family, IPPROTO_UDP, 2);
        establish(&mut planned, &stream[0], 1000);
        planned.send(&stream[1], syn(1000));
        assert_eq!(planned.send(&flow[0], udp()), Went::To(1), "learned");
        moves_on(&mut planned);
        maintenance(&mut planned, &[1, 2]);
        // The client begins again from the same port; the datagram's flow goes on elsewhere.
        assert_eq!(establish(&mut planned, &stream[0], 700_000), Went::To(3));
        assert_eq!(establish(&mut planned, &stream[1], 1000), Went::To(3));
        assert_eq!(planned.send(&flow[0], udp()), Went::To(3));
        assert_eq!(planned.send(&flow[1], udp()), Went::To(3), "while it is learned, too");
        maintenance(&mut planned, &[]);
        for tuple in &stream {
            assert_eq!(planned.send(tuple, ack(2000)), Went::To(3));
        }
        for tuple in &flow {
            assert_eq!(planned.send(tuple, udp()), Went::To(3));
        }
    }
}
