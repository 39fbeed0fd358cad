//! Slow start: a backend that comes back takes its share little by little, and moves
//! nothing that it would not have moved at once.

mod plan_support;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use canary_agent::{
    config::model::{Config, Forward, Service},
    plan::{Planner, SLOW_START_STEPS, SlowStart, Start},
    store::Admin,
};
use canary_ebpf_common::entry::BackendIndex;
use plan_support::{config, hop, maps, service};
use proptest::prelude::*;

const SLOW_MS: u64 = 32_000;
const CONTROL: [&str; 5] =
    ["10.0.1.1:80", "10.0.1.2:80", "10.0.1.3:80", "10.0.1.4:80", "10.0.1.5:80"];
const V2: [&str; 2] = ["10.0.2.1:80", "10.0.2.2:80"];

fn shop(weights: &[u32]) -> Service {
    let stable: Vec<(&str, u32)> = CONTROL.iter().copied().zip(weights.iter().copied()).collect();
    let v2: Vec<(&str, u32)> = V2.iter().map(|addr| (*addr, 1)).collect();
    let mut shop = service("shop", &[("stable", &stable), ("v2", &v2)]);
    shop.slow_start = Duration::from_millis(SLOW_MS);
    shop
}

fn resume(config: &Config, old: &Planner, now_ms: u64) -> Planner {
    let stored: Vec<_> = old.services().iter().map(|s| s.stored(s.ownership())).collect();
    let adopted = maps(old.plane());
    let mut planner = Planner::begin(Start { config, adopted, stored: &stored, now_ms }).unwrap().0;
    known(&mut planner, config);
    planner
}

fn known(planner: &mut Planner, config: &Config) {
    let backends = config.services.iter().flat_map(|s| &s.versions).flat_map(|v| &v.backends);
    let hops: HashMap<_, _> = backends.map(|b| (b.addr.ip(), Ok(hop(b.addr)))).collect();
    planner.set_next_hops(&hops);
}

fn started(config: &Config) -> Planner {
    let start = Start { config, adopted: Default::default(), stored: &[], now_ms: 1_000 };
    let mut planner = Planner::begin(start).unwrap().0;
    known(&mut planner, config);
    step(&mut planner, 1_000);
    planner
}

fn step(planner: &mut Planner, now: u64) -> Option<u64> {
    for _ in 0..3 {
        let wakeup = planner.step(now).next_wakeup_ms;
        if !planner.applied(now) {
            return wakeup;
        }
    }
    panic!("there is always something to be done");
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn index(planner: &Planner, text: &str) -> BackendIndex {
    let found = planner.plane().backends.iter().find(|(_, b)| b.addr == addr(text));
    found.expect("a backend").0
}

fn currents(planner: &Planner) -> Vec<BackendIndex> {
    planner.plane().services[0].entries.iter().map(|e| e.current()).collect()
}

fn count(planner: &Planner, text: &str) -> usize {
    let index = index(planner, text);
    currents(planner).iter().filter(|current| **current == index).count()
}

fn ramp(planner: &Planner, text: &str) -> SlowStart {
    let backends = planner.services()[0].tables()[0].backends();
    backends.iter().find(|b| b.addr == addr(text)).expect("a backend").slow_start
}

#[test]
fn nobody_ramps_in_a_table_that_is_new() {
    let planner = started(&config(vec![shop(&[1; 5])]));
    for backend in CONTROL.iter().chain(&V2) {
        assert_eq!(ramp(&planner, backend), SlowStart::Whole, "{backend}");
    }
}

/// Takes a backend out, or puts it back.
type Away = fn(&mut Planner, bool);

#[test]
fn a_backend_ramps_whatever_it_comes_back_from() {
    let configured = config(vec![shop(&[1; 5])]);
    let it = CONTROL[1];
    let away: [(&str, Away); 4] = [
        ("its checks", |p, away| p.set_down(0, addr(CONTROL[1]), away)),
        ("its next hop", |p, away| {
            let hop = if away { Err("no route".to_owned()) } else { Ok(hop(addr(CONTROL[1]))) };
            p.set_next_hops(&HashMap::from([(addr(CONTROL[1]).ip(), hop)]));
        }),
        ("a drain", |p, away| {
            p.set_admin(0, addr(CONTROL[1]), if away { Admin::Drain } else { Admin::Ready });
        }),
        ("maintenance", |p, away| {
            p.set_admin(0, addr(CONTROL[1]), if away { Admin::Maint } else { Admin::Ready });
        }),
    ];
    for (what, set) in away {
        let mut planner = started(&configured);
        let whole = currents(&planner);
        set(&mut planner, true);
        step(&mut planner, 2_000);
        assert_eq!((count(&planner, it), ramp(&planner, it)), (0, SlowStart::Away), "{what}");
        set(&mut planner, false);
        assert_eq!(step(&mut planner, 3_000), Some(5_000), "{what}: the second step");
        assert_eq!(ramp(&planner, it), SlowStart::Since(3_000), "{what}");
        let first = count(&planner, it);
        assert!((1..=819_usize.div_ceil(32)).contains(&first), "{what}: {first}");
        step(&mut planner, 3_000 + SLOW_MS / 2);
        let half = count(&planner, it);
        assert!(half.abs_diff(410) <= 1, "{what}: {half}");
        step(&mut planner, 3_000 + SLOW_MS);
        assert_eq!((currents(&planner), ramp(&planner, it)), (whole, SlowStart::Whole), "{what}");
    }
}

#[test]
fn a_backend_that_is_added_ramps_and_a_restart_in_between_goes_on() {
    let mut less = shop(&[1; 5]);
    less.versions[0].backends.truncate(4);
    let old = started(&config(vec![less]));
    let configured = config(vec![shop(&[1; 5])]);
    let mut planner = resume(&configured, &old, 10_000);
    step(&mut planner, 10_000);
    assert_eq!(ramp(&planner, CONTROL[4]), SlowStart::Since(10_000));
    assert_eq!(ramp(&planner, CONTROL[0]), SlowStart::Whole);
    step(&mut planner, 20_000);
    let (there, plane) = (currents(&planner), planner.plane().clone());
    let mut next = resume(&configured, &planner, 20_500);
    step(&mut next, 20_500);
    assert_eq!((currents(&next), ramp(&next, CONTROL[4])), (there, SlowStart::Since(10_000)));
    assert_eq!(next.plane().backends, plane.backends);
    for planner in [&mut planner, &mut next] {
        step(planner, 30_000);
    }
    assert_eq!(currents(&next), currents(&planner));
    step(&mut next, 42_000);
    assert_eq!(ramp(&next, CONTROL[4]), SlowStart::Whole);
}

#[test]
fn who_comes_back_where_nobody_is_takes_all_at_once() {
    let mut planner = started(&config(vec![shop(&[1; 5])]));
    let split = [("v2".to_owned(), "50%".parse().unwrap())].into();
    let proposal = planner.services()[0].propose(split).unwrap();
    planner.set_ownership(0, proposal.ownership);
    V2.iter().for_each(|backend| planner.set_down(0, addr(backend), true));
    step(&mut planner, 2_000);
    assert_eq!(V2.map(|backend| count(&planner, backend)), [0, 0], "control has them");
    planner.set_down(0, addr(V2[0]), false);
    step(&mut planner, 3_000);
    assert_eq!((count(&planner, V2[0]), ramp(&planner, V2[0])), (2048, SlowStart::Whole));
    planner.set_down(0, addr(V2[1]), false);
    step(&mut planner, 4_000);
    assert_eq!(V2.map(|backend| count(&planner, backend)), [2016, 32]);
    // The one that was whole goes: the other must not stay behind.
    planner.set_down(0, addr(V2[0]), true);
    step(&mut planner, 5_000);
    assert_eq!((count(&planner, V2[1]), ramp(&planner, V2[1])), (2048, SlowStart::Whole));
}

#[test]
fn translated_services_ramp_too_and_none_does_without_a_slow_start() {
    let mut nat = shop(&[1; 5]);
    nat.forward = Forward::Nat;
    let mut at_once = shop(&[1; 5]);
    at_once.slow_start = Duration::ZERO;
    for (service, expected) in [(nat, 26), (at_once, 819)] {
        let mut planner = started(&config(vec![service]));
        planner.set_down(0, addr(CONTROL[1]), true);
        step(&mut planner, 2_000);
        planner.set_down(0, addr(CONTROL[1]), false);
        step(&mut planner, 3_000);
        assert!(count(&planner, CONTROL[1]).abs_diff(expected) <= 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// One backend comes back, at times that the agent may be late for, and with restarts.
    #[test]
    fn a_ramp_moves_each_bucket_once_and_only_to_who_comes_back(
        weights in prop::collection::vec(1..20_u32, 5),
        it in 0..5_usize,
        late in prop::collection::vec((0..3_000_u64, any::<bool>()), 80),
    ) {
        let configured = config(vec![shop(&weights)]);
        let mut planner = started(&configured);
        let whole = currents(&planner);
        let backend = CONTROL[it];
        planner.set_down(0, addr(backend), true);
        step(&mut planner, 2_000);
        let without = currents(&planner);
        planner.set_down(0, addr(backend), false);
        let index = index(&planner, backend);
        let share = whole.iter().filter(|current| **current == index).count();
        let (mut now, mut moved, mut before) = (10_000, HashSet::new(), without.clone());
        for (late, restart) in late {
            if restart && moved.len() < share && !moved.is_empty() {
                planner = resume(&configured, &planner, now);
            }
            let wakeup = step(&mut planner, now);
            let after = currents(&planner);
            for (bucket, (a, b)) in before.iter().zip(&after).enumerate().filter(|(_, (a, b))| a != b) {
                prop_assert_eq!(*b, index, "bucket {} goes from {:?} to another", bucket, a);
                prop_assert!(moved.insert(bucket), "bucket {} moves twice", bucket);
            }
            prop_assert!(!moved.is_empty(), "no bucket after the first step");
            let steps = ((now - 10_000) * u64::from(SLOW_START_STEPS) / SLOW_MS).clamp(1, SLOW_START_STEPS.into());
            let due = (share as u64 * steps).div_ceil(SLOW_START_STEPS.into());
            prop_assert_eq!(moved.len() as u64, due.max(1), "at {}", now);
            // Each gives its part. All are rounded at one threshold, so their sum may be off by
            // half a bucket for each of them, and the threshold by that part of the whole.
            let of = |table: &[BackendIndex], which| table.iter().filter(|i| **i == which).count() as f64;
            let gives = |other: &BackendIndex| of(&without, *other) - of(&whole, *other);
            let others = planner.services()[0].tables()[0].bucket_counts().iter().map(|(other, _)| *other);
            let givers: Vec<BackendIndex> =
                others.filter(|other| *other != index && gives(other) > 0.0).collect();
            let (due, of_all) = (due as f64, share as f64);
            for giver in &givers {
                let (gave, all) = (of(&without, *giver) - of(&after, *giver), gives(giver));
                let room = 0.5 + givers.len() as f64 / 2.0 * all / of_all;
                prop_assert!((gave - all * due / of_all).abs() <= room + 1e-9, "{gave} of {all}, {due} of {of_all}");
            }
            before = after;
            match wakeup.filter(|_| moved.len() < share) {
                Some(next) => now = next.max(now + 1).min(10_000 + SLOW_MS) + late,
                None => break,
            }
        }
        prop_assert_eq!(before, whole);
    }

    /// Any of them come and go, in any order: whoever takes new connections has a bucket, and
    /// when all is quiet for long enough everything is as it was.
    #[test]
    fn whatever_comes_and_goes_nobody_is_left_out_in_the_end(
        events in prop::collection::vec((0..5_usize, any::<bool>(), 0..20_000_u64), 1..20),
    ) {
        let configured = config(vec![shop(&[3, 1, 4, 1, 5])]);
        let mut planner = started(&configured);
        let whole = currents(&planner);
        let mut now = 2_000;
        for (it, down, wait) in events {
            planner.set_down(0, addr(CONTROL[it]), down);
            step(&mut planner, now);
            let table = &planner.services()[0].tables()[0];
            for backend in table.backends().iter().filter(|b| b.slot == 0) {
                let buckets = table.buckets_of(backend.index);
                let all_down = table.backends().iter().filter(|b| b.slot == 0).all(|b| b.down);
                prop_assert_eq!(buckets > 0, backend.takes_new() || all_down, "{:?}", backend);
            }
            now += wait;
        }
        CONTROL.iter().for_each(|backend| planner.set_down(0, addr(backend), false));
        step(&mut planner, now);
        step(&mut planner, now + SLOW_MS);
        prop_assert_eq!(currents(&planner), whole);
    }
}
