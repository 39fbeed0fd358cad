//! SPEC §4.5: how many buckets move when backends come, go, fail or change weight.
//!
//! Every figure in the module documentation of `compile` is asserted here;
//! `cargo test … --test compile_movement -- --nocapture` prints what is measured.
#![cfg(feature = "user")]

use canary_ebpf_common::compile::{
    Backend, Compiler, Fallback, Input, Targets, Version, apply, initial_owners, plan, quotas,
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

/// The identity that gets each bucket of slot 1; others are `None`.
fn place(owners: &[u8], backends: &[Backend]) -> Vec<Option<u64>> {
    let table = Compiler::new()
        .compile(&Input {
            owners,
            versions: &[Version { slot: 0, backends: &[CONTROL] }, Version { slot: 1, backends }],
            control: 0,
            fallback: Fallback::None,
        })
        .unwrap();
    let of = |t: canary_ebpf_common::compile::Target| backends[usize::from(t.backend)].identity;
    table.targets.into_iter().map(|t| t.filter(|t| t.slot == 1).map(of)).collect()
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

fn moved(before: &[Option<u64>], after: &[Option<u64>]) -> u32 {
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
                let owners = random.owners(owned);
                let all = random.backends(count, heaviest);
                let mut failing = all.clone();
                failing[random.below(count)].healthy = false;
                let must = must(owned, &all, &failing);
                let moved = moved(&place(&owners, &all), &place(&owners, &failing));
                assert_eq!(moved, must, "{owned} buckets, {count} backends, weights to {heaviest}");
            }
        }
    }
}

#[test]
fn one_of_a_hundred_equal_backends_fails_by_the_least_and_leaves_by_more() {
    let mut random = Random(2);
    for _ in 0..10 {
        let owners = random.owners(BUCKETS);
        let all = random.backends(100, 1);
        let mut failing = all.clone();
        failing[random.below(100)].healthy = false;
        let before = place(&owners, &all);
        let down = place(&owners, &failing);
        assert!(moved(&before, &down) <= BUCKETS * 11 / 1000);
        // Once it is out of the configuration too, others move that need not: more than the
        // tenth that SPEC §4.5 allows. Bounds from 40 runs: mean 361 and 873, most 404 and 913.
        let gone: Vec<Backend> = failing.into_iter().filter(|b| b.healthy).collect();
        let without = place(&owners, &gone);
        let (later, at_once) = (moved(&down, &without), moved(&before, &without));
        println!(
            "one of a hundred: {later} more when taken out after a drain; {at_once} if at once"
        );
        assert!(later <= 420, "{later}");
        assert!(at_once <= 930, "{at_once}");
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
        let mut backends = random.backends(count, heaviest);
        let mut before = place(&owners, &backends);
        let mut tally = Tally::default();
        for _ in 0..40 {
            let was = backends.clone();
            // About a tenth are down at a time.
            let mut at = random.below(count);
            if backends.iter().filter(|b| !b.healthy).count() > (count / 10).max(1) {
                at = backends.iter().position(|b| !b.healthy).unwrap_or(at);
            }
            backends[at].healthy = !backends[at].healthy;
            let after = place(&owners, &backends);
            tally.add(must(owned, &was, &backends), moved(&before, &after));
            before = after;
        }
        hold("health", case, &tally);
    }
}

#[test]
fn movement_when_the_configuration_changes() {
    for case in [
        (BUCKETS, 2, 1, 1.02, 1.04),
        (BUCKETS, 5, 10, 1.02, 1.04),
        (BUCKETS, 10, 1, 1.04, 1.06),
        (BUCKETS, 10, 10, 1.04, 1.06),
        (BUCKETS, 30, 1, 1.10, 1.13),
        (BUCKETS, 30, 10, 1.10, 1.18),
        (BUCKETS, 100, 1, 1.36, 1.42),
        (BUCKETS, 100, 10, 1.36, 1.85),
        (3277, 10, 1, 1.13, 1.20),
        (3277, 30, 1, 1.50, 1.65),
        (655, 5, 1, 1.18, 1.28),
        (655, 20, 1, 1.70, 2.00),
        (66, 3, 1, 1.35, 1.90),
        (66, 10, 1, 2.10, 3.30),
    ] {
        let (owned, count, heaviest, ..) = case;
        let mut random = Random(5);
        let owners = random.owners(owned);
        let mut backends = random.backends(count, heaviest);
        let mut before = place(&owners, &backends);
        let mut tally = Tally::default();
        for _ in 0..20 {
            let was = backends.clone();
            change(&mut random, &mut backends, heaviest);
            let after = place(&owners, &backends);
            tally.add(must(owned, &was, &backends), moved(&before, &after));
            before = after;
        }
        hold("configuration", case, &tally);
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
        let (before, after) = (place(&owners, &backends), place(&next, &backends));
        let pairs = before.iter().zip(&after);
        let moving = pairs.filter(|(b, a)| b.is_some() && a.is_some() && a != b).count();
        println!(
            "share {from} to {to}, {count} backends, weights to {heaviest}: {moving} others move"
        );
        assert!(moving <= most);
    }
}
