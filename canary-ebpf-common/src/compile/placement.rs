//! Where the buckets of a version prefer to be: the state of stage 2.
//!
//! Owns what is remembered of it from one set of backends to the next. Must not know of
//! owners, health or what backends get for the time being.

use std::{collections::HashMap, fmt, sync::Arc};

use super::{
    Backend, MAX_BACKENDS,
    backends::{Field, Placer, quotas, rebalance},
};

/// A backend as placement sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weighted {
    pub(super) identity: u64,
    /// Above 0.
    pub(super) weight: u32,
}

/// For each bucket of a table the backend that it prefers when the version owns it.
///
/// Of itself that is the backend that the bucket wants most by weighted rendezvous hashing.
/// What is kept are the backends, and the buckets that prefer another one because they were
/// there when the backends changed: none before the first change.
///
/// It depends on neither splits nor health, which are gone through again and again and must
/// lead back to the same table.
#[derive(Clone, PartialEq, Eq)]
pub struct Placement {
    buckets: u32,
    /// In order of identity.
    backends: Vec<Weighted>,
    /// By ascending bucket: the index of the backend.
    exceptions: Vec<(u32, u16)>,
}

/// Why backends have no placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendsError {
    /// More than [`MAX_BACKENDS`].
    TooMany,
    /// Two of them have this identity.
    Duplicate(u64),
}

impl fmt::Display for BackendsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => write!(f, "more than {MAX_BACKENDS} backends"),
            Self::Duplicate(identity) => write!(f, "two backends have identity {identity:016x}"),
        }
    }
}

impl std::error::Error for BackendsError {}

/// The indices of `backends`, by identity.
pub(super) fn order(backends: &[Backend]) -> Result<Vec<u16>, BackendsError> {
    if backends.len() > MAX_BACKENDS {
        return Err(BackendsError::TooMany);
    }
    let identity = |i: &u16| backends[usize::from(*i)].identity;
    let mut order: Vec<u16> = (0..backends.len() as u16).collect();
    order.sort_unstable_by_key(identity);
    match order.windows(2).find(|pair| identity(&pair[0]) == identity(&pair[1])) {
        Some(pair) => Err(BackendsError::Duplicate(identity(&pair[0]))),
        None => Ok(order),
    }
}

impl Placement {
    /// The placement of backends that have no past, in a table of `buckets` buckets.
    /// Health does not enter.
    ///
    /// # Errors
    ///
    /// Any [`BackendsError`].
    pub fn new(backends: &[Backend], buckets: u32) -> Result<Self, BackendsError> {
        let order = order(backends)?;
        let backends = order.into_iter().map(|i| backends[usize::from(i)]);
        let weighted = backends
            .filter(|b| b.weight > 0)
            .map(|Backend { identity, weight, healthy: _ }| Weighted { identity, weight });
        Ok(Self { buckets, backends: weighted.collect(), exceptions: Vec::new() })
    }

    pub(super) fn from_parts(
        buckets: u32,
        backends: Vec<Weighted>,
        exceptions: Vec<(u32, u16)>,
    ) -> Self {
        Self { buckets, backends, exceptions }
    }

    /// Whether a backend of this identity is among its own.
    pub(super) fn has(&self, identity: u64) -> bool {
        self.backends.binary_search_by_key(&identity, |b| b.identity).is_ok()
    }

    pub(super) fn backends(&self) -> &[Weighted] {
        &self.backends
    }

    /// How many buckets the table has.
    pub fn buckets(&self) -> u32 {
        self.buckets
    }

    pub(super) fn exceptions(&self) -> &[(u32, u16)] {
        &self.exceptions
    }

    /// Whether it is one of these backends with these weights, in a table of `buckets` buckets.
    pub fn is_of(&self, backends: &[Backend], buckets: u32) -> bool {
        self.buckets == buckets
            && Self::new(backends, buckets).is_ok_and(|new| new.backends == self.backends)
    }

    /// The placement that follows when the backends become `backends` and the table gets
    /// `buckets` buckets, while the version owns `owned` (ascending) of the present ones.
    ///
    /// Of the buckets owned exactly as many move as must.
    ///
    /// # Errors
    ///
    /// Any [`BackendsError`].
    pub fn follow(
        self: &Arc<Self>,
        owned: &[u32],
        backends: &[Backend],
        buckets: u32,
    ) -> Result<Self, BackendsError> {
        let new = Self::new(backends, buckets)?;
        if new.backends.is_empty() || self.backends.is_empty() {
            return Ok(new);
        }
        let backends = new.backends;
        // Those that leave are called by one index, after the last: all that they have moves.
        let gone = backends.len() as u16;
        let index_of: HashMap<u64, u16> =
            (0..).zip(&backends).map(|(index, b)| (b.identity, index)).collect();
        let renumber = |index: u16| {
            let identity = self.backends[usize::from(index)].identity;
            index_of.get(&identity).copied().unwrap_or(gone)
        };
        let field = Field::new(&backends);

        // A larger table repeats the smaller one: a bucket's number only gains high bits.
        let mut placer = Placer::new(Arc::clone(self));
        let owned: Vec<u32> = owned.iter().copied().filter(|&b| b < self.buckets).collect();
        let before = placer.base(&owned);
        let mut present: Vec<(u32, u16)> = Vec::with_capacity(owned.len());
        for first in (0..buckets).step_by(self.buckets.max(1) as usize) {
            let repeated = owned
                .iter()
                .zip(&before)
                .map(|(&bucket, &index)| (bucket + first, renumber(index)));
            present.extend(repeated.filter(|(bucket, _)| *bucket < buckets));
        }
        let (owned, mut placed): (Vec<u32>, Vec<u16>) = present.into_iter().unzip();
        let mut has = vec![0; backends.len() + 1];
        placed.iter().for_each(|&index| has[usize::from(index)] += 1);
        let weights: Vec<u32> = backends.iter().map(|b| b.weight).collect();
        let mut wants = quotas(owned.len() as u32, &weights);
        wants.push(0);
        rebalance(&field, &owned, &mut placed, &has, &wants);

        // Buckets of other versions keep what they preferred, if it is still there.
        let mut preferred = vec![None; buckets as usize];
        for &(bucket, index) in &self.exceptions {
            if let Some(preferred) = preferred.get_mut(bucket as usize) {
                *preferred = Some(renumber(index)).filter(|&index| index != gone);
            }
        }
        for (&bucket, &index) in owned.iter().zip(&placed) {
            preferred[bucket as usize] = Some(index);
        }
        let mut bounds = Vec::with_capacity(backends.len());
        let exceptions = (0..)
            .zip(preferred)
            .filter_map(|(bucket, preferred)| Some((bucket, preferred?)))
            .filter(|&(bucket, index)| field.first(bucket, &mut bounds) != usize::from(index))
            .collect();
        Ok(Self { buckets, backends, exceptions })
    }
}

impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Placement")
            .field("buckets", &self.buckets)
            .field("backends", &self.backends)
            .field("exceptions", &self.exceptions.len())
            .finish()
    }
}
