//! DESIGN §4: flattened routes against a first-match loop, the least number of prefixes against
//! all there can be, and the way from one set to another, step by step.
#![cfg(feature = "user")]

use std::net::IpAddr;

use canary_ebpf_common::networks::{
    Labelled, Prefix, Width, Write, combine, difference, flatten, union,
};
use proptest::prelude::*;

/// The one that counts, by the definition of a route: the first whose networks have the address.
fn first_match(items: &[(Prefix, u8)], addr: IpAddr) -> u8 {
    let host = Prefix::host(addr);
    let holds = |route: &u8| items.iter().any(|(net, of)| of == route && net.contains(host));
    (0..u8::MAX).find(holds).unwrap_or(u8::MAX)
}

fn compiled(width: Width, items: &[(Prefix, u8)]) -> Labelled<u8> {
    flatten(width, items.to_vec(), u8::MAX, |first, route| first.min(route), |first| first)
}

/// Prefixes near one another, so that they nest, overlap and stand side by side.
fn prefixes(width: Width) -> impl Strategy<Value = Prefix> {
    let bits = width.bits();
    (any::<u128>(), 0..=bits, prop_oneof![Just(0), Just(bits / 4), Just(bits / 2), Just(bits - 6)])
        .prop_map(move |(raw, len, base)| {
            // A base that all of its kind share, and six free bits behind it.
            let free = (raw >> 122) << (122 - base.min(122));
            Prefix::new(free, len.clamp(0, base + 6))
        })
}

fn width() -> impl Strategy<Value = Width> {
    prop_oneof![Just(Width::V4), Just(Width::V6)]
}

fn routes() -> impl Strategy<Value = (Width, Vec<(Prefix, u8)>)> {
    width().prop_flat_map(|width| {
        (Just(width), proptest::collection::vec((prefixes(width), 0_u8..5), 0..40))
    })
}

/// Addresses in and at the edges of the prefixes.
fn probes(width: Width, items: impl IntoIterator<Item = Prefix>) -> Vec<IpAddr> {
    let addr = |bits: u128| Prefix::new(bits, width.bits()).addr(width);
    let one = 1_u128 << (128 - width.bits());
    let around = |prefix: Prefix| {
        let (first, last) = (prefix.bits(), prefix.last());
        [first, last, first.wrapping_sub(one), last.wrapping_add(one), first + (last - first) / 3]
    };
    items.into_iter().flat_map(around).chain([0, u128::MAX]).map(addr).collect()
}

/// The value by looking at every prefix.
fn longest(prefixes: &[(Prefix, u8)], addr: IpAddr) -> u8 {
    let host = Prefix::host(addr);
    let holding = prefixes.iter().filter(|(prefix, _)| prefix.contains(host));
    holding.max_by_key(|(prefix, _)| prefix.len()).map_or(u8::MAX, |(_, value)| *value)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_longest_match_is_the_first_route((width, items) in routes()) {
        let flat = compiled(width, &items);
        prop_assert!(flat.prefixes().is_sorted() && flat.prefixes().len() <= 3 * items.len());
        for addr in probes(width, items.iter().map(|(prefix, _)| *prefix)) {
            let expected = first_match(&items, addr);
            prop_assert_eq!(flat.at(addr), expected, "{}", addr);
            prop_assert_eq!(longest(flat.prefixes(), addr), expected, "{}", addr);
        }
    }

    #[test]
    fn no_step_gives_an_address_a_value_of_neither_end(
        (width, old, new) in width().prop_flat_map(|width| {
            let some = || proptest::collection::vec((prefixes(width), 0_u8..3), 0..14);
            (Just(width), some(), some())
        })
    ) {
        let (from, to) = (compiled(width, &old), compiled(width, &new));
        let ends = old.iter().chain(&new).map(|(prefix, _)| *prefix);
        let probes = probes(width, ends);
        let mut now = from.prefixes().to_vec();
        for write in difference(&from, &to).writes {
            match write {
                Write::Set(prefix, value) => {
                    now.retain(|(at, _)| *at != prefix);
                    now.push((prefix, value));
                }
                Write::Remove(prefix) => {
                    let before = now.len();
                    now.retain(|(at, _)| *at != prefix);
                    prop_assert_eq!(now.len() + 1, before, "removed what is not there");
                }
            }
            for addr in &probes {
                let value = longest(&now, *addr);
                prop_assert!(
                    value == from.at(*addr) || value == to.at(*addr),
                    "{addr} has {value} in between, {} before, {} after",
                    from.at(*addr), to.at(*addr)
                );
            }
        }
        now.sort_unstable();
        prop_assert_eq!(&now[..], to.prefixes());
    }

    #[test]
    fn two_functions_together_are_one(
        (width, a, b) in width().prop_flat_map(|width| {
            let some = || proptest::collection::vec((prefixes(width), 0_u8..3), 0..20);
            (Just(width), some(), some())
        })
    ) {
        let (left, right) = (compiled(width, &a), compiled(width, &b));
        let both = combine(&left, &right, |a, b| (a, b));
        for addr in probes(width, a.iter().chain(&b).map(|(prefix, _)| *prefix)) {
            prop_assert_eq!(both.at(addr), (left.at(addr), right.at(addr)));
        }
    }

    #[test]
    fn a_union_has_the_same_addresses_and_nothing_twice((width, items) in routes()) {
        let nets: Vec<Prefix> = items.iter().map(|(prefix, _)| *prefix).collect();
        let united = union(nets.clone());
        for pair in united.windows(2) {
            prop_assert!(pair[0].last() < pair[1].bits());
            prop_assert!(pair[0].sibling() != pair[1]);
        }
        for addr in probes(width, nets.iter().copied()) {
            let host = Prefix::host(addr);
            let holds = |nets: &[Prefix]| nets.iter().any(|net| net.contains(host));
            prop_assert_eq!(holds(&united), holds(&nets));
        }
        // Counted once however often it is listed.
        let single: Vec<(Prefix, u8)> = nets.iter().map(|net| (*net, 0)).collect();
        let counted = compiled(width, &single).addresses();
        let sum = united.iter().fold(0_u128, |sum, net| sum.saturating_add(net.addresses(width)));
        prop_assert_eq!(counted.first().map_or(0, |(_, count)| *count), sum);
    }

    /// All tables of at most as many prefixes as the compiled one less one are tried on a tree of
    /// eight addresses: none of them says the same.
    #[test]
    fn no_smaller_set_of_prefixes_says_the_same(values in proptest::collection::vec(0_u8..3, 8)) {
        let base = 0xc000_0200_u128 << 96;
        let leaf = |at: usize| Prefix::new(base | (at as u128) << 96, 32);
        let items: Vec<(Prefix, u8)> =
            (0..8).map(|at| (leaf(at), values[at])).filter(|(_, value)| *value > 0).collect();
        let flat = flatten(Width::V4, items, 0, |_, value| value, |value| value);
        prop_assert!((0..8).all(|at| flat.at(leaf(at).addr(Width::V4)) == values[at]));
        prop_assert_eq!(flat.prefixes().len(), least(&values, 0));
    }
}

/// The least number of prefixes for `values`, where all have `given` already, by trying all.
fn least(values: &[u8], given: u8) -> usize {
    (0..3)
        .map(|value| {
            let own = usize::from(value != given);
            match values {
                [leaf] if *leaf == value => own,
                [_] => usize::MAX / 4,
                _ => {
                    let (low, high) = values.split_at(values.len() / 2);
                    own + least(low, value) + least(high, value)
                }
            }
        })
        .min()
        .unwrap_or(0)
}

#[test]
fn a_block_without_a_value_stays_without_one() {
    let net = |text: &str, len| Prefix::of(text.parse().unwrap(), len);
    // All of 10.0.0.0/14 but one /16: by number alone, the /14 with a hole would be less.
    let items = vec![(net("10.0.0.0", 16), 1), (net("10.1.0.0", 16), 1), (net("10.2.0.0", 16), 1)];
    let flat = compiled(Width::V4, &items);
    let hole = net("10.3.0.0", 16);
    assert!(flat.prefixes().iter().all(|(prefix, _)| !prefix.contains(hole)));
    assert_eq!(flat.prefixes().len(), 2);
    // Inside a block, and where the hole was asked for, less is less.
    let inside = (0..15).map(|at| (net(&format!("10.0.0.{at}"), 32), 1)).collect::<Vec<_>>();
    assert_eq!(compiled(Width::V4, &inside).prefixes().len(), 2);
    let asked = vec![(net("10.0.0.0", 8), 1), (net("10.3.0.0", 16), 0)];
    assert_eq!(compiled(Width::V4, &asked).prefixes().len(), 2);
}

#[test]
fn a_million_addresses_agree_with_the_loop() {
    let mut state = 7_u64;
    let mut random = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    for width in [Width::V4, Width::V6] {
        let items: Vec<(Prefix, u8)> = (0..24)
            .map(|at| {
                let bits = u128::from(random()) << 96;
                (Prefix::new(bits, (random() % 14) as u8), at % 6)
            })
            .collect();
        let flat = compiled(width, &items);
        for _ in 0..500_000 {
            let addr = Prefix::new(u128::from(random()) << 96, width.bits()).addr(width);
            assert_eq!(flat.at(addr), first_match(&items, addr), "{addr}");
        }
    }
}
