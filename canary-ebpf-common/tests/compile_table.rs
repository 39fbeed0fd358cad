//! SPEC §4.5 and §4.6: weights to one bucket, health, fallback, and the same table on every host.
#![cfg(feature = "user")]

use std::{sync::Arc, time::Duration};

use canary_ebpf_common::compile::{
    Backend, BackendsError, Compiler, DecodeError, Fallback, Input, InputError, Output, Placement,
    Target, Targets, Version, apply, counts, decode_placement, encode_placement, identity,
    initial_owners, plan, quotas,
};
use nix::time::{ClockId, clock_gettime};
use proptest::prelude::*;

fn backend(version: u8, host: u8, weight: u32, healthy: bool) -> Backend {
    let addr = format!("10.0.{version}.{host}:8443").parse().unwrap();
    Backend { identity: identity(&addr), weight, healthy }
}

fn owners_with(buckets: u32, wanted: &[(u8, u32)], salt: u64) -> Vec<u8> {
    let mut owners = initial_owners(buckets, 0);
    let changes = plan(&owners, &Targets::exact(buckets, 0, wanted).unwrap(), salt).unwrap();
    apply(&mut owners, &changes).unwrap();
    owners
}

/// Slot *i* has `fleet[i]`; control is slot 0.
fn compile_with(
    compiler: &mut Compiler,
    owners: &[u8],
    fleet: &[Vec<Backend>],
    fallback: Fallback,
) -> Output {
    let versions: Vec<Version<'_>> = fleet
        .iter()
        .zip(0..)
        .map(|(backends, slot)| Version { slot, backends, placement: None })
        .collect();
    compiler.compile(&Input { owners, versions: &versions, control: 0, fallback }).unwrap()
}

/// The same with placements that have a past.
fn compile_placed(
    compiler: &mut Compiler,
    owners: &[u8],
    fleet: &[Vec<Backend>],
    placements: &[Arc<Placement>],
    fallback: Fallback,
) -> Output {
    let versions: Vec<Version<'_>> = (0..)
        .zip(fleet.iter().zip(placements))
        .map(|(slot, (backends, placement))| Version { slot, backends, placement: Some(placement) })
        .collect();
    compiler.compile(&Input { owners, versions: &versions, control: 0, fallback }).unwrap()
}

fn compile(owners: &[u8], fleet: &[Vec<Backend>], fallback: Fallback) -> Output {
    compile_with(&mut Compiler::new(), owners, fleet, fallback)
}

fn fleet(healthy: [[bool; 3]; 3]) -> Vec<Vec<Backend>> {
    let version = |(v, h): (usize, [bool; 3])| {
        h.into_iter().zip(1..).map(|(healthy, host)| backend(v as u8, host, 1, healthy)).collect()
    };
    healthy.into_iter().enumerate().map(version).collect()
}

const UP: [bool; 3] = [true; 3];
const DOWN: [bool; 3] = [false; 3];

#[test]
fn a_version_without_a_healthy_backend_falls_back_and_moves_nobody_else() {
    let owners = owners_with(4096, &[(1, 400), (2, 700)], 1);
    let before = compile(&owners, &fleet([UP, UP, UP]), Fallback::Control);
    assert_eq!((before.fell_back, before.control_checks_ignored), (0, false));
    let one = compile(&owners, &fleet([UP, DOWN, UP]), Fallback::Control);
    let both = compile(&owners, &fleet([UP, DOWN, DOWN]), Fallback::Control);
    let none = compile(&owners, &fleet([UP, DOWN, UP]), Fallback::None);
    assert_eq!((one.fell_back, both.fell_back, none.fell_back), (0b10, 0b110, 0b10));
    let mut on = [0; 3];
    for (bucket, &owner) in owners.iter().enumerate() {
        if owner == 1 {
            let target = one.targets[bucket].unwrap();
            assert_eq!(target.slot, 0);
            on[usize::from(target.backend)] += 1;
            assert_eq!(both.targets[bucket], one.targets[bucket]);
            assert_eq!(none.targets[bucket], None);
        } else {
            assert_eq!(one.targets[bucket], before.targets[bucket]);
            assert_eq!(none.targets[bucket], before.targets[bucket]);
        }
    }
    on.sort_unstable();
    assert_eq!(on, [133, 133, 134]);
}

#[test]
fn without_a_healthy_control_backend_its_checks_are_ignored() {
    let owners = owners_with(4096, &[(1, 400)], 1);
    let healthy = compile(&owners, &fleet([UP, UP, UP]), Fallback::Control);
    let ignored = compile(&owners, &fleet([DOWN, UP, UP]), Fallback::Control);
    assert_eq!(ignored.targets, healthy.targets);
    assert!(ignored.control_checks_ignored);
    // One that is well is enough to believe the checks.
    let one = compile(&owners, &fleet([[false, true, false], UP, UP]), Fallback::Control);
    assert!(!one.control_checks_ignored);
    let on_control = one.targets.iter().flatten().filter(|t| t.slot == 0);
    assert!(on_control.clone().count() == 3696 && on_control.clone().all(|t| t.backend == 1));
    // All down: everything on all of control.
    let all = compile(&owners, &fleet([DOWN, DOWN, DOWN]), Fallback::Control);
    assert!(
        all.control_checks_ignored && all.targets.iter().all(|t| t.is_some_and(|t| t.slot == 0))
    );
}

#[test]
fn control_without_backends_leaves_its_buckets_with_nothing() {
    let owners = owners_with(4096, &[(1, 400)], 1);
    for control in [vec![], vec![backend(0, 1, 0, true)], vec![backend(0, 1, 0, false)]] {
        let table = compile(&owners, &[control, vec![backend(1, 1, 1, true)]], Fallback::Control);
        assert_eq!(table.targets.iter().flatten().count(), 400);
        assert_eq!((table.fell_back, table.control_checks_ignored), (1, false));
    }
}

#[test]
fn more_backends_than_buckets() {
    let owners = owners_with(4096, &[(1, 5)], 1);
    let many: Vec<Backend> =
        (1..=40).map(|host| backend(1, host, 1 + u32::from(host == 7) * 9, true)).collect();
    let table = compile(&owners, &[vec![backend(0, 1, 1, true)], many], Fallback::None);
    let mut on: Vec<u16> =
        table.targets.iter().flatten().filter(|t| t.slot == 1).map(|t| t.backend).collect();
    on.sort_unstable();
    on.dedup();
    assert_eq!(on.len(), 5, "each at most one: {on:?}");
    assert!(on.contains(&6), "the heaviest comes first");
}

#[test]
fn an_input_that_makes_no_table_says_why() {
    let owners = owners_with(4096, &[(1, 5)], 1);
    let backends = [backend(0, 1, 1, true), backend(0, 2, 1, true)];
    let twice = [backends[0], backends[0]];
    let try_it = |versions: &[Version<'_>], control| {
        Compiler::new()
            .compile(&Input { owners: &owners, versions, control, fallback: Fallback::None })
            .unwrap_err()
    };
    let version = |slot| Version { slot, backends: &backends, placement: None };
    assert_eq!(try_it(&[version(0)], 0), InputError::MissingVersion(1));
    assert_eq!(try_it(&[version(1)], 0), InputError::MissingVersion(0));
    assert_eq!(try_it(&[version(0), version(1)], 200), InputError::MissingVersion(200));
    assert_eq!(try_it(&[version(0), version(0)], 0), InputError::DuplicateSlot(0));
    assert_eq!(try_it(&[version(16)], 0), InputError::UnknownSlot(16));
    let duplicate =
        InputError::Backends { slot: 0, error: BackendsError::Duplicate(backends[0].identity) };
    assert_eq!(try_it(&[Version { slot: 0, backends: &twice, placement: None }], 0), duplicate);
}

/// FNV-1a over slot and backend of every bucket.
fn hash_of(table: &Output) -> u64 {
    let bytes = table.targets.iter().flat_map(|t| match *t {
        Some(Target { slot, backend }) => [1, slot, backend as u8, (backend >> 8) as u8],
        None => [0; 4],
    });
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Hosts of one fleet must agree: whoever changes what these pin makes a fleet of two
/// releases send a client to two places.
#[test]
fn the_result_for_a_fixed_input_is_pinned() {
    assert_eq!(identity(&"10.0.1.1:8443".parse().unwrap()), 0xab7c_4b2f_22e2_8191, "identity v4");
    assert_eq!(
        identity(&"[2001:db8:1::1]:8443".parse().unwrap()),
        0x6c0e_b080_118b_a488,
        "identity v6"
    );

    let mut owners = owners_with(65_536, &[(1, 3277), (2, 20_000), (3, 66)], 0x5eed);
    let mut hash = owners.iter().fold(0_u64, |h, &o| h.wrapping_mul(31).wrapping_add(o.into()));
    assert_eq!(hash, 0xf261_a724_5c89_93d5, "owners");
    let change =
        plan(&owners, &Targets::exact(65_536, 0, &[(1, 32_768), (2, 10_000)]).unwrap(), 7).unwrap();
    apply(&mut owners, &change).unwrap();
    hash = owners.iter().fold(0_u64, |h, &o| h.wrapping_mul(31).wrapping_add(o.into()));
    assert_eq!(hash, 0x8210_c761_63b1_9fe4, "changed owners");

    let mut fleet = vec![
        (1..=20).map(|host| backend(0, host, 1, true)).collect::<Vec<_>>(),
        (1..=30).map(|host| backend(1, host, u32::from(host) % 7, true)).collect(),
        (1..=3).map(|host| backend(2, host, 1, false)).collect(),
    ];
    assert_eq!(
        hash_of(&compile(&owners, &fleet, Fallback::Control)),
        0x7a87_e08c_4874_d2d5,
        "table"
    );
    fleet[0][3].healthy = false;
    fleet[1][8].healthy = false;
    fleet[1][9].healthy = false;
    assert_eq!(
        hash_of(&compile(&owners, &fleet, Fallback::None)),
        0xad1d_88b3_26ae_d05c,
        "table with failures"
    );
}

#[test]
fn a_placement_after_changes_and_its_bytes_are_pinned() {
    let buckets = 65_536;
    let owners = owners_with(buckets, &[(1, 20_000)], 0x5eed);
    let fleet = |hosts: std::ops::RangeInclusive<u8>, heavy: u8| -> Vec<Vec<Backend>> {
        let weight = |host| 1 + u32::from(host == heavy);
        let list = |v| hosts.clone().map(|host| backend(v, host, weight(host), true)).collect();
        (0..2).map(list).collect()
    };
    let mut now = fleet(1..=20, 0);
    let mut placed: Vec<Arc<Placement>> =
        now.iter().map(|b| Arc::new(Placement::new(b, buckets).unwrap())).collect();
    assert_eq!(encode_placement(&placed[0]).len(), 5 + 20 * 9);
    for next in [fleet(2..=20, 0), fleet(2..=22, 0), fleet(2..=22, 5), fleet(2..=22, 6)] {
        now = next;
        follow(&mut placed, &owners, &now);
    }
    let table = compile_placed(&mut Compiler::new(), &owners, &now, &placed, Fallback::Control);
    assert_eq!(hash_of(&table), 0xd2ce_2416_dee3_6de0, "table");
    let bytes: Vec<Vec<u8>> = placed.iter().map(|p| encode_placement(p)).collect();
    println!("{} and {} bytes", bytes[0].len(), bytes[1].len());
    assert!(bytes.iter().all(|bytes| bytes.len() < 12_000), "two or three for each exception");
    let hash = bytes.concat().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    assert_eq!(hash, 0x5bd3_7ec1_4ec1_fb94, "bytes");
}

#[test]
fn bytes_that_are_no_placement_say_why() {
    use DecodeError::{Backends, Format, Number, TooMany, Truncated, UnknownBackend};
    let of = |identity: u8| [identity, 0, 0, 0, 0, 0, 0, 0];
    let good = [&[3, 16, 2][..], &of(1), &[1], &of(2), &[5], &[3, 1, 0, 0]].concat();
    let placement = decode_placement(&good).unwrap();
    assert_eq!(encode_placement(&placement), good);
    assert_eq!(placement.buckets(), 16);
    for (bytes, error) in [
        (vec![], Format { expected: 3, found: None }),
        (vec![1, 0, 4], Format { expected: 3, found: Some(1) }),
        (vec![3], Truncated),
        (vec![3, 16, 1, 0, 0], Truncated),
        (vec![3, 16, 0xff, 0xff, 0x0f], Backends),
        (vec![3, 0x81, 0x80, 0x40, 0], TooMany),
        (vec![3, 0x80, 0, 0], Number),
        ([&[3, 16, 1][..], &of(1), &[0]].concat(), Backends),
        ([&[3, 16, 2][..], &of(2), &[1], &of(1), &[1]].concat(), Backends),
        ([&[3, 16, 2][..], &of(1), &[1], &of(1), &[1]].concat(), Backends),
        ([&good[..], &[11, 0]].concat(), TooMany),
        ([&good[..], &[0, 2]].concat(), UnknownBackend(2)),
        ([&good[..], &[0]].concat(), Truncated),
        ([&good[..], &[0xff, 0xff, 0xff, 0xff, 0x0f, 0]].concat(), TooMany),
    ] {
        assert_eq!(decode_placement(&bytes), Err(error), "{bytes:?}");
    }
}

/// What must hold of any table.
fn check(
    owners: &[u8],
    fleet: &[Vec<Backend>],
    fallback: Fallback,
    table: &Output,
) -> Result<(), TestCaseError> {
    let counts = counts(owners).unwrap();
    let usable = |b: &&Backend| b.healthy && b.weight > 0;
    let control_ok = fleet[0].iter().any(|b| usable(&b));
    let control_weighs = fleet[0].iter().any(|b| b.weight > 0);
    prop_assert_eq!(table.control_checks_ignored, !control_ok && control_weighs);
    for (slot, backends) in fleet.iter().enumerate() {
        let buckets: Vec<usize> =
            (0..owners.len()).filter(|&b| usize::from(owners[b]) == slot).collect();
        let own = backends.iter().any(|b| usable(&b)) || slot == 0 && control_weighs;
        let source = if own { slot } else { 0 };
        if !own && (fallback == Fallback::None || !control_weighs) {
            prop_assert!(buckets.iter().all(|&b| table.targets[b].is_none()));
            continue;
        }
        let everyone = source == 0 && table.control_checks_ignored;
        let mut sorted: Vec<(usize, &Backend)> = fleet[source].iter().enumerate().collect();
        sorted.sort_by_key(|(_, b)| b.identity);
        let weight = |b: &Backend| if b.healthy || everyone { b.weight } else { 0 };
        let weights: Vec<u32> = sorted.iter().map(|(_, b)| weight(b)).collect();
        let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        let mut has = vec![0_u32; fleet[source].len()];
        for &bucket in &buckets {
            let target = table.targets[bucket];
            prop_assert!(
                target.is_some_and(|t| usize::from(t.slot) == source),
                "{bucket}: {target:?}"
            );
            has[usize::from(target.unwrap().backend)] += 1;
        }
        for ((index, b), quota) in sorted.iter().zip(quotas(counts[slot], &weights)) {
            prop_assert_eq!(has[*index], quota);
            let exact = f64::from(counts[slot]) * f64::from(weight(b)) / total;
            prop_assert!((f64::from(quota) - exact).abs() < 1.0, "{quota} for {exact}");
        }
    }
    Ok(())
}

#[derive(Clone, Debug)]
enum Event {
    Split(Vec<(u8, u32)>, u64),
    Health(usize, usize),
    Weight(usize, usize, u32),
    Add(usize, u8, u32),
    Remove(usize, usize),
    VersionDown(usize),
}

fn events() -> impl Strategy<Value = Event> {
    let (version, host) = (0..3_usize, 0..64_usize);
    prop_oneof![
        (0..2000_u32, 0..2000_u32, 0..3_u64)
            .prop_map(|(a, b, salt)| Event::Split(vec![(1, a), (2, b)], salt)),
        (version.clone(), host.clone()).prop_map(|(v, h)| Event::Health(v, h)),
        (version.clone(), host.clone(), 0..10_u32).prop_map(|(v, h, w)| Event::Weight(v, h, w)),
        (version.clone(), any::<u8>(), 0..10_u32).prop_map(|(v, h, w)| Event::Add(v, h, w)),
        (version.clone(), host).prop_map(|(v, h)| Event::Remove(v, h)),
        version.prop_map(Event::VersionDown),
    ]
}

fn happen(event: &Event, owners: &mut [u8], fleet: &mut [Vec<Backend>]) {
    let at = |list: &[Backend], h: usize| (!list.is_empty()).then(|| h % list.len());
    match *event {
        Event::Split(ref wanted, salt) => {
            let wanted = Targets::exact(owners.len() as u32, 0, wanted).unwrap();
            let changes = plan(owners, &wanted, salt).unwrap();
            apply(owners, &changes).unwrap();
        }
        Event::Health(v, h) => {
            if let Some(i) = at(&fleet[v], h) {
                fleet[v][i].healthy = !fleet[v][i].healthy;
            }
        }
        Event::Weight(v, h, weight) => {
            if let Some(i) = at(&fleet[v], h) {
                fleet[v][i].weight = weight;
            }
        }
        Event::Add(v, host, weight) => {
            let new = backend(v as u8, host, weight, true);
            if fleet[v].iter().all(|b| b.identity != new.identity) {
                fleet[v].push(new);
            }
        }
        Event::Remove(v, h) => {
            if let Some(i) = at(&fleet[v], h) {
                fleet[v].swap_remove(i);
            }
        }
        Event::VersionDown(v) => fleet[v].iter_mut().for_each(|b| b.healthy = false),
    }
}

/// The placements of a fleet that become those of another, as an agent does it when its
/// configuration changes; and as the store gives them back.
fn follow(placements: &mut [Arc<Placement>], owners: &[u8], fleet: &[Vec<Backend>]) {
    for (slot, (placement, backends)) in (0..).zip(placements.iter_mut().zip(fleet)) {
        if !placement.is_of(backends, owners.len() as u32) {
            let owned: Vec<u32> =
                (0..).zip(owners).filter(|(_, o)| **o == slot).map(|(b, _)| b).collect();
            let next = placement.follow(&owned, backends, owners.len() as u32).unwrap();
            let stored = decode_placement(&encode_placement(&next)).unwrap();
            assert_eq!(stored, next);
            *placement = Arc::new(stored);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_make_a_placement_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..60), small in any::<bool>()) {
        let mut bytes = bytes;
        if small && bytes.len() > 2 {
            bytes[0] = 3;
            bytes[2] %= 4;
        }
        if let Ok(placement) = decode_placement(&bytes) {
            prop_assert_eq!(encode_placement(&placement), bytes);
        }
    }

    #[test]
    fn any_sequence_of_changes_keeps_every_rule_on_every_host(
        events in proptest::collection::vec(events(), 1..25),
        fallback in prop_oneof![Just(Fallback::Control), Just(Fallback::None)],
    ) {
        let mut owners = initial_owners(4096, 0);
        let mut fleet: Vec<Vec<Backend>> =
            (0..3).map(|v| (0..5).map(|h| backend(v, h, 1 + u32::from(h % 3), true)).collect()).collect();
        let placements = |fleet: &[Vec<Backend>]| -> Vec<Arc<Placement>> {
            fleet.iter().map(|b| Arc::new(Placement::new(b, 4096).unwrap())).collect()
        };
        let mut placed = placements(&fleet);
        let mut compiler = Compiler::new();
        let mut last = compile(&owners, &fleet, fallback);
        prop_assert_eq!(&compile_placed(&mut compiler, &owners, &fleet, &placed, fallback), &last);
        for event in events {
            let before = (owners.clone(), fleet.clone());
            happen(&event, &mut owners, &mut fleet);
            follow(&mut placed, &owners, &fleet);
            let table = compile_placed(&mut compiler, &owners, &fleet, &placed, fallback);
            check(&owners, &fleet, fallback, &table)?;
            check(&owners, &fleet, fallback, &compile(&owners, &fleet, fallback))?;

            // Another host, which was given the state only now and lists backends otherwise.
            let mut turned = fleet.clone();
            turned.iter_mut().for_each(|list| list.reverse());
            let elsewhere =
                compile_placed(&mut Compiler::new(), &owners, &turned, &placed, fallback);
            let names = |table: &Output, fleet: &[Vec<Backend>]| -> Vec<Option<u64>> {
                let of = |t: Target| fleet[usize::from(t.slot)][usize::from(t.backend)].identity;
                table.targets.iter().map(|t| t.map(of)).collect()
            };
            prop_assert_eq!(names(&table, &fleet), names(&elsewhere, &turned));
            prop_assert_eq!(table.fell_back, elsewhere.fell_back);

            // Backends of one version never move buckets of another that stands on its own.
            if let Event::Health(v, _) | Event::Weight(v, ..) | Event::Add(v, ..) | Event::Remove(v, _) | Event::VersionDown(v) = event {
                let (then, now) = (names(&last, &before.1), names(&table, &fleet));
                for bucket in 0..owners.len() {
                    let slot = usize::from(owners[bucket]);
                    let on_control = table.targets[bucket].is_some_and(|t| usize::from(t.slot) != slot);
                    if slot != v && !(v == 0 && on_control) && table.fell_back >> slot & 1 == 0 {
                        prop_assert_eq!(then[bucket], now[bucket], "bucket {} of {}", bucket, slot);
                    }
                }
            }
            last = table;
        }
    }
}

/// The bounds of DESIGN, three times over: a debug build on a busy machine.
#[test]
fn compiling_is_quick() {
    let fleet: Vec<Vec<Backend>> = (0..2)
        .map(|v| (0..100).map(|h| backend(v, h, 1 + u32::from(h % 10), true)).collect())
        .collect();
    let (before, after) =
        (owners_with(65_536, &[(1, 3277)], 1), owners_with(65_536, &[(1, 3932)], 1));
    let wanted = Targets::exact(65_536, 0, &[(1, 3932)]).unwrap();
    // Time on a processor: how long others keep it is not the compiler's doing.
    let on_processor = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let (mut whole, mut change) = (Duration::MAX, Duration::MAX);
    for _ in 0..5 {
        let mut compiler = Compiler::new();
        let start = on_processor();
        compile_with(&mut compiler, &before, &fleet, Fallback::Control);
        whole = whole.min(on_processor() - start);
        let mut owners = before.clone();
        let start = on_processor();
        let changes = plan(&owners, &wanted, 1).unwrap();
        apply(&mut owners, &changes).unwrap();
        compile_with(&mut compiler, &owners, &fleet, Fallback::Control);
        change = change.min(on_processor() - start);
        assert_eq!(owners, after);
    }
    println!("whole table {whole:?}, split change {change:?}");
    assert!(whole < Duration::from_millis(60), "whole table: {whole:?}");
    assert!(change < Duration::from_millis(6), "split change: {change:?}");
}
