//! Rules about what happens to buckets: 8 to 10, 12, 13 and 15.

use canary_agent::{plan::Family, store::Admin};
use canary_ebpf_common::{
    abi::{Flow, IPPROTO_TCP, IPPROTO_UDP},
    entry::Entry,
};
use canary_tests::{
    loaded::{Sizes, XDP_TX},
    model::Tuple,
    names::Host,
    notation::parse,
    planned::{Planned, Shop, Version, Went},
};

use crate::support::*;

/// Connections that are open before anything moves, and where they are.
fn open_before(planned: &mut Planned) -> Vec<(Tuple, Went)> {
    let mut open = Vec::new();
    for family in FAMILIES {
        for tuple in tuples(family, IPPROTO_TCP).take(200) {
            open.push((tuple, planned.send(&tuple, ack(5000))));
        }
    }
    open
}

#[track_caller]
fn all_stay(planned: &mut Planned, open: &[(Tuple, Went)], when: &str) {
    for (tuple, at) in open {
        assert_eq!(planned.send(tuple, ack(5000)), *at, "{when}: {tuple:?}");
    }
}

#[test]
fn rule_08_previous_stays_through_further_moves_in_whatever_direction() {
    let versions = [("stable", 1), ("v2", 2), ("v3", 3)];
    let versions = versions.map(|(name, n)| Version { name, backends: vec![(n, 1), (n + 3, 2)] });
    let mut planned = planned(&Shop { versions: versions.into(), ..Shop::default() });
    let mut open = open_before(&mut planned);
    let mut next = 0_usize;
    for (v2, v3) in [
        ("50%", "0%"),
        ("50%", "50%"),
        ("1%", "99%"),
        ("100%", "0%"),
        ("5%", "5%"),
        ("0%", "0%"),
        ("30%", "70%"),
    ] {
        planned.split(&[("v2", v2), ("v3", v3)]);
        let when = format!("after {v2} {v3}");
        all_stay(&mut planned, &open, &when);
        for n in [1, 5] {
            planned.down(n, !next.is_multiple_of(2) ^ (n == 1));
            all_stay(&mut planned, &open, &when);
        }
        // Some more that open on the way.
        next += 1;
        for tuple in tuples(Family::V4, IPPROTO_TCP).skip(200 * next).take(50) {
            let at = establish(&mut planned, &tuple, 4990);
            open.push((tuple, at));
        }
        planned.pass(100 * S);
    }
}

#[test]
fn rule_08_a_bucket_is_remembered_until_drain_has_passed_since_its_last_move() {
    let mut planned = shop();
    let mut open = open_before(&mut planned);
    planned.split(&[("v2", "100%")]);
    // Nobody sends anything for most of the drain: an idle connection looks just like none.
    planned.pass(890 * S);
    planned.split(&[("v2", "1%")]);
    assert!(planned.tracked() > 8000, "moved back is still moved");
    // All but a hundredth have moved again.
    open.retain(|(t, _)| matches!(planned.current(t), Some(1 | 2)));
    planned.pass(890 * S);
    all_stay(&mut planned, &open, "890 s after the last move");
    planned.split(&[("v2", "100%")]);
    planned.pass(890 * S);
    all_stay(&mut planned, &open, "890 s after the last move");
    let stayed: Vec<Went> = open.iter().map(|(t, _)| current(&planned, t)).collect();
    planned.pass(111 * S);
    assert_eq!(planned.tracked(), 0);
    for ((tuple, _), current) in open.iter().zip(stayed) {
        assert_eq!(planned.send(tuple, ack(5000)), current);
    }
}

#[test]
fn rule_08_buckets_are_let_go_little_by_little_over_the_last_tenth_of_the_drain() {
    let mut planned = moved();
    let moved = planned.tracked();
    assert!(moved > 4000);
    let begun = planned.now_ms;
    let (mut left, mut steps) = (moved, 0);
    planned.pass_by_steps(1000 * S, |planned| {
        let at = planned.now_ms - begun;
        let now = planned.tracked();
        assert!(now == left || at >= 900_000, "let go {at} ms after the move");
        assert!(left - now < moved / 20, "{} of {moved} at once", left - now);
        steps += u32::from(now < left);
        left = now;
    });
    assert_eq!((left, planned.now_ms - begun), (0, 1_000_000));
    assert!(steps >= 50, "in {steps} steps");
}

#[test]
fn rule_08_a_drain_of_never_does_not_end() {
    let mut planned = planned(&Shop { drain: None, ..Shop::default() });
    let open = open_before(&mut planned);
    planned.split(&[("v2", "100%")]);
    for _ in 0..10 {
        planned.pass(365 * 86_400 * S);
    }
    all_stay(&mut planned, &open, "after ten years");
}

#[test]
fn rule_08_what_is_remembered_survives_the_agent() {
    let mut planned = shop();
    let open = open_before(&mut planned);
    planned.split(&[("v2", "50%")]);
    let tuple = tuples_moved(&planned, Family::V6, IPPROTO_TCP, 300)[299];
    let at = establish(&mut planned, &tuple, 1000);
    planned.pass(400 * S);
    planned.restart_from_pins(&Shop::default());
    planned.split(&[("v2", "25%")]);
    all_stay(&mut planned, &open, "after a restart");
    assert_eq!(planned.send(&tuple, ack(1001)), at);
    // Times, too: what has not moved since is let go when it would have been.
    let moved = planned.tracked();
    planned.pass(599 * S);
    let left = planned.tracked();
    assert!(left > 0 && left < moved, "{left} of {moved}");
    planned.pass(401 * S);
    assert_eq!(planned.tracked(), 0);
}

#[test]
fn rule_09_entries_of_a_bucket_are_swept_before_it_is_remembered_again() {
    let mut planned = moved();
    let mut sent = Vec::new();
    for family in FAMILIES {
        let tuple = one_moved(&planned, family);
        sent.push((tuple, establish(&mut planned, &tuple, 1000), previous(&planned, &tuple)));
        let flow = tuples_moved(&planned, family, IPPROTO_UDP, 1)[0];
        planned.send(&flow, udp());
    }
    assert_eq!(planned.flows(), 4);
    planned.pass(1001 * S);
    assert_eq!((planned.tracked(), planned.flows()), (0, 0), "cleared, and swept");
    // Otherwise this would follow what its tuple was a drain ago.
    for (tuple, at, _) in &sent {
        planned.down(number(*at), true);
        assert!(planned.entry(tuple).tracked());
        assert_eq!(planned.send(tuple, ack(900_000)), *at, "where it was all the time");
        planned.down(number(*at), false);
    }
}

#[test]
fn rule_09_a_bucket_waits_for_its_sweep_before_it_moves_again() {
    let mut planned = moved();
    let tuple = one_moved(&planned, Family::V4);
    let at = current(&planned, &tuple);
    planned.now_ms += 1_000_001;
    let now = planned.now_ms;
    // Cleared, but that is not in force when the next change comes.
    assert!(planned.planner.step(now).changed);
    planned.propose(&[("v2", "1%")]);
    planned.planner.step(now);
    let bucket = planned.bucket(&tuple) as usize;
    let wanted = planned.planner.plane().services[0].entries[bucket];
    assert_eq!(planned.number(wanted.current()).map(Went::To), Some(at), "it waits where it is");
    assert!(!wanted.tracked());
    planned.settle();
    assert!(planned.entry(&tuple).tracked(), "and moves when it has been swept");
    assert_eq!(previous(&planned, &tuple), at);
}

#[test]
fn rule_09_a_bucket_waits_for_its_sweep_before_it_is_watched() {
    let mut planned = moved();
    let mut all = tuples(Family::V4, IPPROTO_TCP);
    let tuple = all.find(|t| matches!(planned.current(t), Some(3 | 4))).unwrap();
    establish(&mut planned, &tuple, 1000);
    planned.now_ms += 1_000_001;
    let now = planned.now_ms;
    assert!(planned.planner.step(now).changed);
    let split = [("v2".to_owned(), "1%".parse().unwrap())].into();
    let ownership = planned.planner.services()[0].propose(split).unwrap().ownership;
    planned.planner.prepare(0, Some(&ownership));
    planned.planner.step(now);
    let bucket = planned.bucket(&tuple) as usize;
    assert!(!planned.planner.plane().services[0].entries[bucket].tracked());
    assert!(!planned.planner.is_prepared(0));
    planned.settle();
    assert!(planned.entry(&tuple).tracked() && planned.planner.is_prepared(0));
    assert_eq!(planned.flow(&tuple), None);
}

#[test]
fn rule_09_a_sweep_leaves_what_is_still_looked_at() {
    let mut planned = moved();
    let tuples = tuples_moved(&planned, Family::V4, IPPROTO_TCP, 200);
    for tuple in &tuples {
        establish(&mut planned, tuple, 1000);
    }
    planned.pass(950 * S);
    let left: Vec<_> = tuples.iter().filter(|t| planned.entry(t).tracked()).collect();
    assert!(left.len() > 20 && left.len() < 180, "half way: {}", left.len());
    assert_eq!(planned.flows(), left.len());
    for tuple in left {
        assert_eq!(planned.send(tuple, ack(2000)), current(&planned, tuple));
    }
}

#[test]
fn rule_10_the_syn_of_a_bucket_that_is_watched_comes_again_to_where_it_went() {
    for family in FAMILIES {
        let mut planned = shop();
        // Watched, and not moved.
        let mut plane = planned.in_force().clone();
        for service in &mut plane.services {
            let service = std::sync::Arc::make_mut(service);
            let watched =
                service.entries.iter().map(|e| Entry::tracking(e.current(), e.current(), false));
            service.entries = std::sync::Arc::new(watched.collect());
        }
        planned.loaded.datapath.apply(&plane).unwrap();
        let all: Vec<Tuple> = tuples(family, IPPROTO_TCP).take(100).collect();
        let went: Vec<Went> = all.iter().map(|t| planned.send(t, syn(1000))).collect();
        assert_eq!(planned.flows(), 100);
        // The step: everything to the other backend of its version.
        for service in &mut plane.services {
            let service = std::sync::Arc::make_mut(service);
            let indices: Vec<_> = plane
                .backends
                .iter()
                .filter(|(_, b)| b.service == service.record.id as u16)
                .take(2)
                .map(|(i, _)| *i)
                .collect();
            let moved = service.entries.iter().map(|e| {
                let to = if e.current() == indices[0] { indices[1] } else { indices[0] };
                Entry::tracking(to, e.previous(), false)
            });
            service.entries = std::sync::Arc::new(moved.collect());
        }
        planned.loaded.datapath.apply(&plane).unwrap();
        for (tuple, at) in all.iter().zip(went) {
            assert_eq!(planned.send(tuple, syn(1000)), at, "its SYN again");
            assert_eq!(planned.send(tuple, ack(1001)), at);
        }
    }
}

#[test]
fn rule_10_a_step_that_is_prepared_takes_no_retransmitted_syn_along() {
    let mut planned = shop();
    let step = [("v2", "50%")];
    let all: Vec<Tuple> =
        FAMILIES.iter().flat_map(|family| tuples(*family, IPPROTO_TCP).take(200)).collect();
    let before: Vec<Went> = all.iter().map(|t| current(&planned, t)).collect();
    planned.prepare(&step);
    assert!(planned.planner.is_prepared(0) && planned.tracked() > 4000);
    for (tuple, before) in all.iter().zip(&before) {
        assert_eq!(current(&planned, tuple), *before, "nothing has moved");
    }
    planned.pass(6 * S);
    for (tuple, at) in all.iter().zip(&before) {
        assert_eq!(planned.send(tuple, syn(1000)), *at);
    }
    planned.pass(S);
    planned.split(&step);
    let moved = all.iter().zip(&before).filter(|(t, at)| current(&planned, t) != **at).count();
    assert!(moved > 150, "{moved} of {}", all.len());
    for (tuple, at) in all.iter().zip(&before) {
        assert_eq!(planned.send(tuple, syn(1000)), *at, "its SYN again");
        assert_eq!(planned.send(tuple, ack(1001)), *at);
    }
}

#[test]
fn rule_10_what_is_watched_is_not_forgotten_before_it_moves() {
    let drain = Some(5 * S);
    let mut planned = planned(&Shop { drain, ..Shop::default() });
    let step = [("v2", "100%")];
    planned.prepare(&step);
    let all: Vec<Tuple> = tuples(Family::V4, IPPROTO_TCP).take(50).collect();
    let went: Vec<Went> = all.iter().map(|t| planned.send(t, syn(1000))).collect();
    planned.pass_by_steps(7 * S, |_| {});
    planned.split(&step);
    for (tuple, at) in all.iter().zip(went) {
        assert_ne!(current(&planned, tuple), at);
        assert_eq!(planned.send(tuple, syn(1000)), at, "its SYN again");
    }
}

#[test]
fn rule_12_drain_takes_no_new_connections_and_maintenance_none_at_all() {
    let mut planned = shop();
    let open = open_before(&mut planned);
    assert!(open.iter().any(|(_, at)| *at == Went::To(2)));
    planned.tell(2, Admin::Drain);
    all_stay(&mut planned, &open, "drained");
    let fresh = |skip: usize| -> Vec<Tuple> {
        let of = |family| tuples(family, IPPROTO_TCP).skip(skip).take(100);
        FAMILIES.into_iter().flat_map(of).collect()
    };
    for tuple in fresh(1000) {
        assert_eq!(establish(&mut planned, &tuple, 1000), Went::To(1));
    }
    planned.tell(2, Admin::Maint);
    for (tuple, _) in &open {
        assert_eq!(planned.send(tuple, ack(5000)), Went::To(1));
    }
    planned.tell(2, Admin::Ready);
    let back =
        fresh(2000).iter().filter(|t| establish(&mut planned, t, 1000) == Went::To(2)).count();
    assert!(back > 50, "{back} of 200");
}

#[test]
fn rule_12_what_finds_no_room_beside_maintenance_stays_where_it_opened() {
    let versions = [("stable", 1), ("v2", 2), ("v3", 3)];
    let versions = versions.map(|(name, n)| Version { name, backends: vec![(n, 1)] });
    let shop = Shop { versions: versions.into(), ..Shop::default() };
    let mut planned = Planned::new(&shop, &Sizes { flows: 1, ..Sizes::default() });
    planned.split(&[("v2", "100%")]);
    planned.split(&[("v3", "100%"), ("v2", "0%")]);
    for family in FAMILIES {
        let all = tuples_moved(&planned, family, IPPROTO_TCP, 21);
        establish(&mut planned, &all[0], 1000);
    }
    // Every bucket's `previous`.
    planned.tell(1, Admin::Maint);
    let mut open = Vec::new();
    for family in FAMILIES {
        for tuple in tuples(family, IPPROTO_TCP).skip(100).take(20) {
            assert_eq!(establish(&mut planned, &tuple, 1000), Went::To(3), "there is no room");
            open.push((tuple, Went::To(3)));
        }
    }
    planned.split(&[("v2", "100%"), ("v3", "0%")]);
    all_stay(&mut planned, &open, "after a split");
    planned.tell(1, Admin::Ready);
    all_stay(&mut planned, &open, "with the backend back");
    planned.split(&[("v2", "0%")]);
    all_stay(&mut planned, &open, "with everything at it again");
}

#[test]
fn rule_12_a_removed_backend_drains_before_its_index_is_somebody_elses() {
    let full = Shop::default();
    let mut less = full.clone();
    less.versions[0].backends.pop();
    let mut planned = planned(&full);
    let open = open_before(&mut planned);
    assert!(open.iter().any(|(_, at)| *at == Went::To(2)));
    planned.restart(&less);
    let index = planned.index(2, Family::V4).expect("it is there as long as it drains");
    for family in FAMILIES {
        assert!(
            tuples(family, IPPROTO_TCP).take(500).all(|t| current(&planned, &t) != Went::To(2))
        );
    }
    planned.pass(890 * S);
    all_stay(&mut planned, &open, "while it drains");
    planned.pass(111 * S);
    assert_eq!(planned.index(2, Family::V4), None);
    let gone: Vec<_> = open.iter().filter(|(_, at)| *at == Went::To(2)).collect();
    for (tuple, _) in gone {
        assert_eq!(planned.send(tuple, ack(5000)), Went::To(1));
    }
    let mut other = less.clone();
    other.versions[0].backends.push((9, 1));
    planned.restart(&other);
    // A second and more after the last trace of it: the restart takes as long.
    assert_eq!(planned.index(9, Family::V4), Some(index), "the lowest that is free");
}

#[test]
fn rule_12_a_backend_of_weight_0_keeps_what_is_open_and_gets_nothing_new() {
    let full = Shop::default();
    let mut drained = full.clone();
    drained.versions[0].backends[1].1 = 0;
    let mut planned = planned(&full);
    let open = open_before(&mut planned);
    planned.restart(&drained);
    all_stay(&mut planned, &open, "drained");
    for family in FAMILIES {
        for tuple in tuples(family, IPPROTO_TCP).skip(1000).take(200) {
            assert_eq!(establish(&mut planned, &tuple, 1000), Went::To(1));
        }
    }
}

#[test]
fn rule_13_with_existing_move_a_split_takes_connections_along_and_sweeps() {
    let mut planned = planned(&Shop { existing: "move", ..Shop::default() });
    let open = open_before(&mut planned);
    planned.split(&[("v2", "50%")]);
    let mut moved = 0;
    for (tuple, at) in &open {
        let now = current(&planned, tuple);
        // Some buckets of stable have changed their backend, not their owner: those stay.
        let stays = planned.entry(tuple).tracked();
        assert!(!stays || matches!(now, Went::To(1 | 2)));
        assert_eq!(planned.send(tuple, ack(5000)), if stays { *at } else { now });
        moved += usize::from(!stays && now != *at);
    }
    assert!(moved > open.len() / 3, "{moved} of {}", open.len());
    // Health is no split: those stay.
    let tuple = tuples(Family::V4, IPPROTO_TCP).find(|t| planned.current(t) == Some(3)).unwrap();
    planned.down(3, true);
    assert_eq!(planned.send(&tuple, ack(5000)), Went::To(3));
    let mut flows = tuples(Family::V4, IPPROTO_UDP);
    let flow = flows.find(|t| planned.entry(t).tracked() && planned.current(t) == Some(4)).unwrap();
    planned.send(&flow, udp());
    assert_eq!(planned.flows(), 1);
    // Until a split takes their buckets away.
    planned.split(&[("v2", "0%")]);
    assert_eq!(planned.send(&tuple, ack(5000)), current(&planned, &tuple));
    assert!(!planned.entry(&tuple).tracked() && !planned.entry(&flow).tracked(), "cleared");
    assert_eq!(planned.flows(), 0, "and swept");
}

#[test]
fn rule_15_icmp_errors_and_fragments_follow_a_connection_and_make_and_refresh_no_entry() {
    let mut planned = moved();
    for family in FAMILIES {
        let tuple = one_moved(&planned, family);
        let at = establish(&mut planned, &tuple, 1000);
        planned.loaded.silence(5 * S).unwrap();
        let before: Flow = planned.flow(&tuple).unwrap();
        let (flows, port) = (planned.flows(), tuple.src_port);
        let other = port + 1;
        let (errors, fragments) = match family {
            Family::V4 => (
                [
                    format!(
                        "ip client > vip / icmp type=3 code=4 rest=0x000005dc / ip vip > client / tcp 80 > {port} A seq=1"
                    ),
                    format!(
                        "ip client > vip / icmp type=3 code=1 / ip vip > client / tcp 80 > {other} A seq=1"
                    ),
                ],
                [
                    format!("ip client > vip id=7 mf / tcp {port} > 80 A seq=1001 / zeros 84"),
                    "ip client > vip id=7 frag=104 proto=6 / zeros 64".to_owned(),
                ],
            ),
            Family::V6 => (
                [
                    format!(
                        "ip6 client > vip / icmp6 type=2 code=0 rest=0x000005dc / ip6 vip > client / tcp 80 > {port} A seq=1"
                    ),
                    format!(
                        "ip6 client > vip / icmp6 type=1 code=0 / ip6 vip > client / tcp 80 > {other} A seq=1"
                    ),
                ],
                [
                    format!(
                        "ip6 client > vip / frag mf id=7 / tcp {port} > 80 A seq=1001 / zeros 84"
                    ),
                    "ip6 client > vip / frag at=104 id=7 next=6 / zeros 64".to_owned(),
                ],
            ),
        };
        let run = |planned: &mut Planned, packet: &str| {
            planned.loaded.run(&parse(&format!("eth client > us / {packet}")).unwrap()).unwrap()
        };
        let Went::To(backend) = at else { panic!("{at:?}") };
        let older = Tuple { src_port: other, ..tuple };
        let Went::To(unknown) = previous(&planned, &older) else { panic!("{older:?}") };
        assert_ne!(backend, unknown);
        for (packet, expected) in errors.iter().zip([backend, unknown]) {
            let seen = run(&mut planned, packet);
            assert_eq!(seen.action, XDP_TX, "{packet}");
            assert_eq!(seen.frame[..6], Host::Backend(expected).mac(), "{packet}");
            assert_eq!(planned.flow(&tuple), Some(before), "{packet}");
            assert_eq!(planned.flows(), flows, "{packet}");
        }
        // The first fragment is the connection's packet, and the others know no more than its way.
        let [first, later] = fragments;
        for packet in [&first, &later] {
            let kept = planned.flow(&tuple);
            planned.loaded.silence(5 * S).unwrap();
            let silent = planned.flow(&tuple);
            assert_ne!(silent, kept);
            let seen = run(&mut planned, packet);
            assert_eq!(seen.action, XDP_TX, "{packet}");
            assert_eq!(seen.frame[..6], Host::Backend(backend).mac(), "{packet}");
            assert_eq!(planned.flow(&tuple) == silent, packet == &later, "{packet}");
            assert_eq!(planned.flows(), flows, "{packet}");
        }
        assert_eq!(planned.send(&tuple, ack(1001)), at);
    }
}
