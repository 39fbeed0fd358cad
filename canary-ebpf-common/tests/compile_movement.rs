//! SPEC §4.5: how many buckets move when backends come, go, fail or change weight.
//!
//! Every figure in the module documentation of `compile` is asserted here;
//! `cargo test … --test compile_movement -- --nocapture` prints what is measured.
#![cfg(feature = "user")]

use std::sync::Arc;

use canary_ebpf_common::compile::{
    Backend, Compiler, Fallback, Input, Placement, Targets, Version, apply, encode_placement,
    initial_owners, plan, quotas,
};

const BUCKETS: u32 = 65_536;

/// A small generator of its own: the figures must be the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn backend(&mut self, heaviest: u32) -> Backend {
        Backend {
            identity: self.next(),
            weight: 1 + self.below(heaviest as usize) as u32,
            healthy: true,
        }
    }

    fn backends(&mut self, count: usize, heaviest: u32) -> Vec<Backend> {
        (0..count).map(|_| self.backend(heaviest)).collect()
    }

    /// Owners of which slot 1 has `owned`.
    fn owners(&mut self, owned: u32) -> Vec<u8> {
        let mut owners = initial_owners(BUCKETS, 0);
        let wanted = Targets::exact(BUCKETS, 0, &[(1, owned)]).unwrap();
        let changes = plan(&owners, &wanted, self.next()).unwrap();
        apply(&mut owners, &changes).unwrap();
        owners
    }
}

const CONTROL: Backend = Backend { identity: 1, weight: 1, healthy: true };

/// The version in slot 1: where its buckets prefer to be, and what its backends get now.
struct Canary {
    owners: Vec<u8>,
    placement: Arc<Placement>,
    backends: Vec<Backend>,
}

impl Canary {
    fn new(owners: Vec<u8>, backends: Vec<Backend>) -> Self {
        let placement = Arc::new(Placement::new(&backends, owners.len() as u32).unwrap());
        Self { owners, placement, backends }
    }

    fn owned(&self) -> Vec<u32> {
        (0..).zip(&self.owners).filter(|(_, owner)| **owner == 1).map(|(b, _)| b).collect()
    }

    /// Its configuration becomes `backends`.
    fn configure(&mut self, backends: Vec<Backend>) {
        let owned = self.owned();
        let buckets = self.placement.buckets();
        self.placement = Arc::new(self.placement.follow(&owned, &backends, buckets).unwrap());
        self.backends = backends;
    }

    /// The identity that gets each of its buckets; others are `None`.
    fn table(&self) -> Vec<Option<u64>> {
        let table = Compiler::new()
            .compile(&Input {
                owners: &self.owners,
                versions: &[
                    Version { slot: 0, backends: &[CONTROL], placement: None },
                    Version { slot: 1, backends: &self.backends, placement: Some(&self.placement) },
                ],
                control: 0,
                fallback: Fallback::None,
            })
            .unwrap();
        let of =
            |t: canary_ebpf_common::compile::Target| self.backends[usize::from(t.backend)].identity;
        table.targets.into_iter().map(|t| t.filter(|t| t.slot == 1).map(of)).collect()
    }
}

/// The buckets that must move: by as many do the numbers grow.
fn must(owned: u32, before: &[Backend], after: &[Backend]) -> u32 {
    let count = |set: &[Backend]| {
        let mut set: Vec<Backend> = set.to_vec();
        set.sort_by_key(|b| b.identity);
        let weights: Vec<u32> = set.iter().map(|b| if b.healthy { b.weight } else { 0 }).collect();
        let counts = quotas(owned, &weights);
        set.iter().map(|b| b.identity).zip(counts).collect::<std::collections::HashMap<_, _>>()
    };
    let (before, after) = (count(before), count(after));
    after.iter().map(|(id, n)| n.saturating_sub(before.get(id).copied().unwrap_or(0))).sum()
}

fn differing(before: &[Option<u64>], after: &[Option<u64>]) -> u32 {
    before.iter().zip(after).filter(|(b, a)| b != a).count() as u32
}

#[derive(Default)]
struct Tally {
    must: u32,
    moved: u32,
    worst: f64,
    most_extra: u32,
}

impl Tally {
    fn add(&mut self, must: u32, moved: u32) {
        assert!(moved >= must, "fewer moved than must: {moved} < {must}");
        self.must += must;
        self.moved += moved;
        if must > 0 {
            self.worst = self.worst.max(f64::from(moved) / f64::from(must));
        }
        self.most_extra = self.most_extra.max(moved - must);
    }

    fn ratio(&self) -> f64 {
        f64::from(self.moved) / f64::from(self.must)
    }
}

/// One of: one added, one removed, one with another weight.
fn change(random: &mut Random, backends: &mut Vec<Backend>, heaviest: u32) {
    let at = random.below(backends.len());
    match random.below(3) {
        0 => backends.push(random.backend(heaviest)),
        1 if backends.len() > 2 => drop(backends.remove(at)),
        _ => backends[at].weight = 1 + random.below(heaviest.max(2) as usize) as u32,
    }
}

#[test]
fn one_backend_that_fails_and_comes_back_moves_not_one_bucket_too_many() {
    let mut random = Random(1);
    for owned in [BUCKETS, 32_768, 3277, 655, 66] {
        for count in [2, 3, 5, 10, 30, 100] {
            for heaviest in [1, 10] {
                let all = random.backends(count, heaviest);
                let mut canary = Canary::new(random.owners(owned), all.clone());
                let before = canary.table();
                canary.backends[random.below(count)].healthy = false;
                let must = must(owned, &all, &canary.backends);
                let moved = differing(&before, &canary.table());
                assert_eq!(moved, must, "{owned} buckets, {count} backends, weights to {heaviest}");
            }
        }
    }
}

/// Numbers of buckets that a version has of 65,536: 100 %, 50 %, 5 %, 1 % and 0.1 %.
const SHARES: [u32; 5] = [BUCKETS, 32_768, 3277, 655, 66];

#[test]
fn a_change_of_the_configuration_moves_exactly_the_least() {
    println!("buckets, backends, change: must move; move; would move without a past");
    for owned in SHARES {
        for count in [2, 3, 10, 30, 100] {
            for heaviest in [1, 10] {
                let mut random = Random(5);
                let backends = random.backends(count, heaviest);
                let mut canary = Canary::new(random.owners(owned), backends.clone());
                let mut steps: Vec<(&str, Vec<Backend>)> = vec![
                    ("removal", backends[1..].to_vec()),
                    ("addition", backends.clone()),
                    ("weight doubled", with_weight(&backends, 0, backends[0].weight * 2)),
                    ("weight halved", backends.clone()),
                ];
                let mut next = backends.clone();
                for _ in 0..6 {
                    change(&mut random, &mut next, heaviest);
                    steps.push(("some change", next.clone()));
                }
                for _ in 0..2 {
                    (0..3).for_each(|_| change(&mut random, &mut next, heaviest));
                    steps.push(("three at once", next.clone()));
                }
                steps.push(("all replaced", random.backends(count, heaviest)));
                for (what, next) in steps {
                    let (was, before) = (canary.backends.clone(), canary.table());
                    let least = must(owned, &was, &next);
                    let now = next.clone();
                    canary.configure(next);
                    let moved = differing(&before, &canary.table());
                    if heaviest == 1 && ["removal", "addition", "weight doubled"].contains(&what) {
                        let anew = |backends| Canary::new(canary.owners.clone(), backends).table();
                        let anew = differing(&anew(was), &anew(now));
                        println!(
                            "{owned:>5} {count:>3} {what:<14} {least:>5} {moved:>5} {anew:>5}"
                        );
                    }
                    assert_eq!(moved, least, "{what}: {owned} buckets, {count} backends");
                    if owned == BUCKETS && count == 100 && ["removal", "addition"].contains(&what) {
                        assert!(heaviest > 1 || moved * 1000 <= BUCKETS * 11, "{what}: {moved}");
                    }
                }
            }
        }
    }
}

fn with_weight(backends: &[Backend], at: usize, weight: u32) -> Vec<Backend> {
    let mut backends = backends.to_vec();
    backends[at].weight = weight;
    backends
}

#[test]
fn a_backend_that_drains_and_then_leaves_moves_its_buckets_once() {
    let mut random = Random(2);
    for owned in SHARES {
        for (count, heaviest) in [(3, 1), (10, 1), (30, 1), (100, 1), (10, 10), (100, 10)] {
            let backends = random.backends(count, heaviest);
            let mut canary = Canary::new(random.owners(owned), backends);
            canary.backends[random.below(count)].healthy = false;
            let down = canary.table();
            let gone = canary.backends.iter().copied().filter(|b| b.healthy).collect();
            canary.configure(gone);
            assert_eq!(differing(&down, &canary.table()), 0, "{owned} buckets, {count} backends");
        }
    }
}

#[test]
fn a_backend_that_leaves_and_comes_back_finds_most_of_its_buckets() {
    for (count, most) in [(3, 300), (10, 260), (30, 260), (100, 100)] {
        let mut random = Random(8);
        let backends = random.backends(count, 1);
        let mut canary = Canary::new(random.owners(BUCKETS), backends.clone());
        let before = canary.table();
        canary.configure(backends[1..].to_vec());
        canary.configure(backends);
        let differ = differing(&before, &canary.table());
        println!("{count} backends, one leaves and comes back: {differ} buckets elsewhere");
        assert!(differ <= most, "{count}: {differ}");
    }
}

#[test]
fn a_split_up_and_back_gives_back_the_table_whatever_came_before() {
    let mut random = Random(9);
    for (count, heaviest) in [(3, 10), (10, 1), (100, 10)] {
        let mut backends = random.backends(count, heaviest);
        let mut canary = Canary::new(random.owners(3277), backends.clone());
        for _ in 0..5 {
            change(&mut random, &mut backends, heaviest);
            canary.configure(backends.clone());
        }
        let (owners, before) = (canary.owners.clone(), canary.table());
        for owned in [32_768, BUCKETS, 655, 3277] {
            let wanted = Targets::exact(BUCKETS, 0, &[(1, owned)]).unwrap();
            let changes = plan(&canary.owners, &wanted, 77).unwrap();
            apply(&mut canary.owners, &changes).unwrap();
        }
        canary.owners = owners;
        assert_eq!(canary.table(), before);
    }
}

#[test]
fn a_table_of_another_size_repeats_the_one_before() {
    for (count, heaviest) in [(3, 1), (10, 10), (100, 1)] {
        let mut random = Random(10);
        let backends = random.backends(count, heaviest);
        let mut canary = Canary::new(random.owners(20_000), backends.clone());
        let before = canary.table();
        let owned = canary.owned();
        canary.owners.extend_from_within(..);
        canary.placement =
            Arc::new(canary.placement.follow(&owned, &backends, 2 * BUCKETS).unwrap());
        let after = canary.table();
        let twice: Vec<Option<u64>> = before.iter().chain(&before).copied().collect();
        // No more than the quotas of twice as many buckets round otherwise.
        let differ = differing(&twice, &after);
        println!("{count} backends, table doubled: {differ} buckets move");
        assert!(differ as usize <= count, "{differ}");

        let owned = canary.owned();
        canary.owners.truncate(BUCKETS as usize);
        canary.placement = Arc::new(canary.placement.follow(&owned, &backends, BUCKETS).unwrap());
        let differ = differing(&after[..BUCKETS as usize], &canary.table());
        println!("{count} backends, table halved: {differ} buckets move");
        assert!(differ as usize <= 2 * count, "{differ}");
    }
}

#[test]
fn a_change_of_the_configuration_while_another_backend_is_down() {
    for case in [
        (BUCKETS, 3, 1, 1.005, 1.01),
        (BUCKETS, 10, 1, 1.02, 1.03),
        (BUCKETS, 30, 1, 1.04, 1.05),
        (BUCKETS, 100, 1, 1.14, 1.18),
        (3277, 10, 1, 1.06, 1.08),
    ] {
        let (owned, count, heaviest, ..) = case;
        let mut random = Random(11);
        let mut tally = Tally::default();
        let mut backends = random.backends(count, heaviest);
        backends[0].healthy = false;
        let mut canary = Canary::new(random.owners(owned), backends.clone());
        for step in 0..10 {
            match step % 2 {
                0 => drop(backends.remove(1)),
                _ => backends.push(random.backend(heaviest)),
            }
            let (was, before) = (canary.backends.clone(), canary.table());
            canary.configure(backends.clone());
            tally.add(must(owned, &was, &backends), differing(&before, &canary.table()));
        }
        hold("configuration, one down", case, &tally);
    }
}

/// Buckets owned, backends, heaviest weight; the mean and the worst ratio that are allowed.
type Case = (u32, usize, u32, f64, f64);

fn hold(what: &str, (owned, count, heaviest, mean, worst): Case, tally: &Tally) {
    let case = format!("{what}: {owned} buckets, {count} backends, weights to {heaviest}");
    println!(
        "{case:<60} mean {:.3} worst {:.3}, at most {} buckets too many",
        tally.ratio(),
        tally.worst,
        tally.most_extra
    );
    assert!(tally.ratio() <= mean && tally.worst <= worst, "{case}");
}

#[test]
fn movement_while_several_fail_and_come_back() {
    for case in [
        (BUCKETS, 10, 1, 1.02, 1.03),
        (BUCKETS, 10, 10, 1.02, 1.06),
        (BUCKETS, 30, 1, 1.07, 1.10),
        (BUCKETS, 100, 1, 1.26, 1.35),
        (BUCKETS, 100, 10, 1.25, 2.00),
        (3277, 10, 1, 1.08, 1.12),
        (3277, 100, 1, 2.50, 3.20),
        (655, 5, 1, 1.04, 1.08),
        (655, 20, 1, 1.40, 1.60),
        (66, 5, 1, 1.10, 1.30),
        (66, 20, 1, 2.00, 2.50),
    ] {
        let (owned, count, heaviest, ..) = case;
        let mut random = Random(4);
        let owners = random.owners(owned);
        let backends = random.backends(count, heaviest);
        let mut canary = Canary::new(owners, backends.clone());
        let mut before = canary.table();
        let mut tally = Tally::default();
        for _ in 0..40 {
            let was = canary.backends.clone();
            let backends = &mut canary.backends;
            // About a tenth are down at a time.
            let mut at = random.below(count);
            if backends.iter().filter(|b| !b.healthy).count() > (count / 10).max(1) {
                at = backends.iter().position(|b| !b.healthy).unwrap_or(at);
            }
            backends[at].healthy = !backends[at].healthy;
            let after = canary.table();
            tally.add(must(owned, &was, &canary.backends), differing(&before, &after));
            before = after;
        }
        hold("health", case, &tally);
    }
}

#[test]
fn a_change_of_share_leaves_most_of_the_version_where_it_is() {
    // From, to, backends, heaviest weight; how many that stay in the version may move.
    for (from, to, count, heaviest, most) in [
        (3277, 3932, 10, 1, 60),
        (3277, 3932, 100, 1, 200),
        (32_768, 33_423, 10, 1, 60),
        (32_768, 33_423, 100, 1, 250),
        (32_768, 33_423, 100, 10, 250),
        (62_259, 61_604, 100, 1, 250),
        (66, 655, 10, 1, 20),
    ] {
        let mut random = Random(6);
        let backends = random.backends(count, heaviest);
        let owners = random.owners(from);
        let wanted = Targets::exact(BUCKETS, 0, &[(1, to)]).unwrap();
        let mut next = owners.clone();
        apply(&mut next, &plan(&owners, &wanted, 99).unwrap()).unwrap();
        for changes in [0, 20] {
            let mut canary = Canary::new(owners.clone(), backends.clone());
            let mut backends = backends.clone();
            for _ in 0..changes {
                change(&mut random, &mut backends, heaviest);
                canary.configure(backends.clone());
            }
            let before = canary.table();
            canary.owners = next.clone();
            let after = canary.table();
            let pairs = before.iter().zip(&after);
            let moving = pairs.filter(|(b, a)| b.is_some() && a.is_some() && a != b).count();
            println!(
                "share {from} to {to}, {count} backends, weights to {heaviest}, {changes} changes before: {moving} others move"
            );
            assert!(moving <= most);
        }
    }
}

#[test]
fn what_is_remembered_stays_small() {
    for (count, heaviest) in [(10, 1), (100, 10)] {
        let mut random = Random(12);
        let mut backends = random.backends(count, heaviest);
        let mut canary = Canary::new(random.owners(BUCKETS), backends.clone());
        for changes in 1..=150 {
            // As many come as go.
            let at = random.below(backends.len());
            match random.below(2) {
                0 if backends.len() <= count => backends.push(random.backend(heaviest)),
                0 => drop(backends.remove(at)),
                _ => backends[at].weight = 1 + random.below(heaviest as usize) as u32,
            }
            canary.configure(backends.clone());
            if [1, 10, 100, 150].contains(&changes) {
                let bytes = encode_placement(&canary.placement).len();
                println!(
                    "{count} backends, weights to {heaviest}, {changes} changes: {bytes} bytes"
                );
            }
        }
    }
}
