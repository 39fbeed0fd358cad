//! Stage 2: which backend of a version gets each of its buckets.
//!
//! Owns quotas, the placement, and what is remembered to make it fast. Must not know of
//! owners, shares or fallback: it is given buckets and backends.
//!
//! 1. *Quotas.* Each backend's number of buckets is its weight's part of all, by largest
//!    remainder, ties by identity: exact to one bucket.
//! 2. *Base placement*, over all backends of the placement, available or not: bucket after
//!    bucket takes the backend it prefers, if that is below its quota, else the one it wants
//!    most (weighted rendezvous) among those that are.
//! 3. *Settling*, where weights or health differ from the placement's for the time being: with
//!    the quotas that hold now, those that have too much give just that to those that have
//!    too little.
//!
//! So a backend that fails or is drained, alone, moves not one bucket more than it must, and
//! when it comes back everything is as it was. A placement over the available backends alone
//! would shift others too, because quotas change for all.
//!
//! Settling is also how a placement follows its backends: what a drained backend gave is what
//! it gives when it is removed.

use std::sync::Arc;

use super::{
    Placement,
    placement::Weighted,
    score::{BackendKey, BucketKey, draw, exponential, unit},
};
use crate::{Packed, differing, ones};

/// Each backend's number of buckets: `buckets` divided in proportion to `weights`, by
/// largest remainder, the earlier of equal ones first. All zero if all weights are.
pub fn quotas(buckets: u32, weights: &[u32]) -> Vec<u32> {
    let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
    if total == 0 {
        return vec![0; weights.len()];
    }
    let product = |weight: u32| u64::from(buckets) * u64::from(weight);
    let mut quotas: Vec<u32> = weights.iter().map(|&w| (product(w) / total) as u32).collect();
    let missing = (buckets - quotas.iter().sum::<u32>()) as usize;
    if missing > 0 {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        let key = |&i: &usize| (std::cmp::Reverse(product(weights[i]) % total), i);
        order.select_nth_unstable_by_key(missing - 1, key);
        for &i in &order[..missing] {
            quotas[i] += 1;
        }
    }
    quotas
}

/// Backends as the inner loops want them.
pub(super) struct Field {
    keys: Vec<BackendKey>,
    /// 1 / weight.
    inverse: Vec<f64>,
    /// All weights are the same: draws can be compared as they are.
    uniform: bool,
}

impl Field {
    pub(super) fn new(backends: &[Weighted]) -> Self {
        Self {
            keys: backends.iter().map(|b| BackendKey::new(b.identity)).collect(),
            inverse: backends.iter().map(|b| 1.0 / f64::from(b.weight)).collect(),
            uniform: backends.windows(2).all(|pair| pair[0].weight == pair[1].weight),
        }
    }

    /// The backend that a bucket wants most, of all. `bounds` is scratch space.
    pub(super) fn first(&self, bucket: u32, bounds: &mut Vec<f64>) -> usize {
        let key = BucketKey::new(bucket);
        let mut best = Best::new(0);
        if self.uniform {
            for (i, &backend) in self.keys.iter().enumerate() {
                best.offer_draw(i, draw(key, backend));
            }
            return best.index;
        }
        // −ln(1 − v) ≥ v + v²/2: one logarithm, of the backend where that bound is least, and
        // nearly every other is out without one. In eights, so that there is hardly a branch
        // that the processor can't foresee.
        bounds.clear();
        let pairs = self.keys.iter().zip(&self.inverse);
        bounds.extend(pairs.map(|(&backend, &inverse)| {
            let v = unit(draw(key, backend));
            (v + 0.5 * v * v) * inverse
        }));
        let least_bound = least(bounds);
        if let Some(i) = bounds.iter().position(|&bound| bound == least_bound) {
            best.offer_cost(i, draw(key, self.keys[i]), self.inverse[i]);
            bounds[i] = f64::INFINITY;
        }
        for (eight, bounds) in bounds.chunks(8).enumerate() {
            if least(bounds) < best.cost {
                for i in eight * 8..eight * 8 + bounds.len() {
                    best.offer_cost(i, draw(key, self.keys[i]), self.inverse[i]);
                }
            }
        }
        best.index
    }

    /// The backend that a bucket wants most, of `open` ones (not empty).
    fn first_of(&self, bucket: u32, open: &[u16]) -> usize {
        self.best_of(bucket, open).index
    }

    /// What it costs a bucket to be on a backend.
    fn cost(&self, bucket: u32, index: usize) -> f64 {
        let draw = draw(BucketKey::new(bucket), self.keys[index]);
        exponential(unit(draw)) * self.inverse[index]
    }

    /// How much more it costs a bucket to be on its backend than on the best of `open` ones.
    fn regret(&self, bucket: u32, index: usize, open: &[u16]) -> f64 {
        let best = self.best_of(bucket, open);
        self.cost(bucket, index) - self.cost(bucket, best.index)
    }

    fn best_of(&self, bucket: u32, open: &[u16]) -> Best {
        let key = BucketKey::new(bucket);
        let mut best = Best::new(open.first().map_or(0, |&i| i.into()));
        for i in open.iter().map(|&i| usize::from(i)) {
            let draw = draw(key, self.keys[i]);
            if self.uniform {
                best.offer_draw(i, draw);
            } else {
                best.offer_cost(i, draw, self.inverse[i]);
            }
        }
        best
    }
}

/// The least of `values`, without each comparison waiting for the one before.
fn least(values: &[f64]) -> f64 {
    let mut lanes = [f64::INFINITY; 8];
    for eight in values.chunks(8) {
        for (lane, &value) in lanes.iter_mut().zip(eight) {
            *lane = if value < *lane { value } else { *lane };
        }
    }
    lanes.into_iter().fold(f64::INFINITY, |least, lane| if lane < least { lane } else { least })
}

/// The best offer so far; of equal ones the first.
struct Best {
    index: usize,
    draw: u64,
    cost: f64,
}

impl Best {
    /// No offer yet; `first` stands if none is better than the worst there can be.
    fn new(first: usize) -> Self {
        Self { index: first, draw: u64::MAX, cost: f64::INFINITY }
    }

    #[inline(always)]
    fn offer_draw(&mut self, index: usize, draw: u64) {
        if draw < self.draw {
            (self.index, self.draw) = (index, draw);
        }
    }

    #[inline(always)]
    fn offer_cost(&mut self, index: usize, draw: u64, inverse_weight: f64) {
        let v = unit(draw);
        if v * inverse_weight < self.cost {
            let cost = exponential(v) * inverse_weight;
            if cost < self.cost {
                (self.index, self.cost) = (index, cost);
            }
        }
    }
}

const UNKNOWN: u16 = u16::MAX;

/// Backends of one version, at most: an index must fit, and one value is spare.
pub const MAX_BACKENDS: usize = UNKNOWN as usize;

/// Places buckets by one [`Placement`], and remembers each bucket's first choice. What it
/// remembers changes its speed only.
///
/// Memory: two bytes for each bucket of the table; at rest, as many bits as tell its backends apart.
pub(super) struct Placer {
    placement: Arc<Placement>,
    field: Field,
    /// Empty at rest.
    first_choice: Vec<u16>,
    /// The same at rest.
    resting: Option<Packed<u16>>,
}

impl Placer {
    pub(super) fn new(placement: Arc<Placement>) -> Self {
        let mut first_choice = vec![UNKNOWN; placement.buckets() as usize];
        for &(bucket, index) in placement.exceptions() {
            first_choice[bucket as usize] = index;
        }
        Self { field: Field::new(placement.backends()), placement, first_choice, resting: None }
    }

    pub(super) fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    /// Takes less memory until it is used again.
    pub(super) fn rest(&mut self) {
        if self.resting.is_none() {
            let mut resting = Packed::from(std::mem::take(&mut self.first_choice));
            resting.pack();
            self.resting = Some(resting);
        }
    }

    fn wake(&mut self) {
        if let Some(resting) = self.resting.take() {
            self.first_choice = resting.into_vec();
        }
    }

    /// Calls `put` with each of a version's buckets and the index of its backend.
    ///
    /// `weights`: one for each backend, what it is to get now; at least one of them above 0.
    pub(super) fn place(
        &mut self,
        its: &Its<'_>,
        weights: &[u32],
        mut put: impl FnMut(usize, usize),
    ) {
        self.wake();
        let &Its { owners, slot, buckets } = its;
        let unknown = |owner, choice| (owner == slot) & (choice == UNKNOWN);
        let unknown: Vec<u32> =
            ones(differing(owners, &self.first_choice, unknown)).map(|b| b as u32).collect();
        self.choose(&unknown);
        if buckets as usize == owners.len() {
            let wants = quotas(buckets, weights);
            let mut base = self.begin(buckets);
            if base.room.left == wants {
                (0..owners.len()).for_each(|bucket| put(bucket, base.next(bucket)));
                return;
            }
        }
        let of_slot = ones(differing(owners, owners, |owner, _| owner == slot));
        let (mut base, wants) = (self.begin(buckets), quotas(buckets, weights));
        if base.room.left == wants {
            of_slot.for_each(|bucket| put(bucket, base.next(bucket)));
            return;
        }
        let has = base.room.left.clone();
        let buckets: Vec<u32> = of_slot.map(|bucket| bucket as u32).collect();
        let next = |bucket: &u32| base.next(*bucket as usize) as u16;
        let mut placed: Vec<u16> = buckets.iter().map(next).collect();
        rebalance(&self.field, &buckets, &mut placed, &has, &wants);
        let all = buckets.iter().zip(placed);
        all.for_each(|(&bucket, index)| put(bucket as usize, usize::from(index)));
    }

    /// The base placement of `buckets` (ascending).
    pub(super) fn base(&mut self, buckets: &[u32]) -> Vec<u16> {
        self.wake();
        self.choose(buckets);
        let mut base = self.begin(buckets.len() as u32);
        buckets.iter().map(|bucket| base.next(*bucket as usize) as u16).collect()
    }

    /// Finds the first choice of those of `buckets` of which it is not known.
    fn choose(&mut self, buckets: &[u32]) {
        let mut bounds = Vec::with_capacity(self.placement.backends().len());
        for &bucket in buckets {
            let choice = &mut self.first_choice[bucket as usize];
            if *choice == UNKNOWN {
                *choice = self.field.first(bucket, &mut bounds) as u16;
            }
        }
    }

    /// The base placement of so many buckets, none of which has a place yet.
    fn begin(&self, buckets: u32) -> Base<'_> {
        let weights: Vec<u32> = self.placement.backends().iter().map(|b| b.weight).collect();
        let room = Room::new(quotas(buckets, &weights));
        Base { field: &self.field, first_choice: &self.first_choice, room }
    }
}

/// Those buckets of a table that a version owns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Its<'a> {
    /// The owner of each bucket.
    pub(super) owners: &'a [u8],
    /// The version's slot.
    pub(super) slot: u8,
    /// How many it owns.
    pub(super) buckets: u32,
}

/// A base placement on its way.
struct Base<'a> {
    field: &'a Field,
    first_choice: &'a [u16],
    room: Room,
}

impl Base<'_> {
    /// The backend of the next bucket, whose first choice is known.
    #[inline]
    fn next(&mut self, bucket: usize) -> usize {
        let mut index = usize::from(self.first_choice[bucket]);
        if self.room.left[index] == 0 {
            index = self.field.first_of(bucket as u32, &self.room.open);
        }
        self.room.take(index);
        index
    }
}

/// Moves the least number of buckets that turns what each backend `has` into what it `wants`.
///
/// A backend gives those of its buckets that would rather be on one of those that gain, and
/// each takes the one that it wants most and that has room.
pub(super) fn rebalance(
    field: &Field,
    buckets: &[u32],
    placed: &mut [u16],
    has: &[u32],
    wants: &[u32],
) {
    let mut room = Room::new(has.iter().zip(wants).map(|(h, w)| w.saturating_sub(*h)).collect());
    let gives: Vec<usize> =
        has.iter().zip(wants).map(|(h, w)| h.saturating_sub(*w) as usize).collect();
    let mut free: Vec<usize> = Vec::with_capacity(gives.iter().sum());
    let mut some: Vec<Vec<(f64, usize)>> = vec![Vec::new(); gives.len()];
    for (at, &index) in placed.iter().enumerate() {
        let index = usize::from(index);
        if gives[index] > 0 && wants[index] == 0 {
            free.push(at);
        } else if gives[index] > 0 {
            some[index].push((-field.regret(buckets[at], index, &room.open), at));
        }
    }
    for (mut candidates, gives) in some.into_iter().zip(gives).filter(|(c, _)| !c.is_empty()) {
        candidates
            .select_nth_unstable_by(gives - 1, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        free.extend(candidates[..gives].iter().map(|&(_, at)| at));
    }
    free.sort_unstable();
    for at in free {
        let index = field.first_of(buckets[at], &room.open);
        room.take(index);
        placed[at] = index as u16;
    }
}

/// What each backend may still get.
struct Room {
    left: Vec<u32>,
    /// Those with any left, ascending.
    open: Vec<u16>,
}

impl Room {
    fn new(left: Vec<u32>) -> Self {
        let open = (0..left.len()).filter(|&i| left[i] > 0).map(|i| i as u16).collect();
        Self { left, open }
    }

    fn take(&mut self, index: usize) {
        self.left[index] -= 1;
        if self.left[index] == 0 {
            self.open.retain(|&i| usize::from(i) != index);
        }
    }
}
