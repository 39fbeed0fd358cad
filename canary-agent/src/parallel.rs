//! The same work on many things, on all processors.

use std::{
    num::NonZeroUsize,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    thread,
};

/// Work on fewer buckets takes no longer than threads take to start.
const WORTH_IT: usize = 1 << 16;

/// What `work` makes of each of `items`, in their order; they are about so many buckets of tables.
pub(crate) fn map<I: Send, T: Send>(
    items: Vec<I>,
    buckets: usize,
    work: impl Fn(I) -> T + Sync,
) -> Vec<T> {
    map_with(items, buckets, || (), |(), item| work(item))
}

/// The same where each thread has something of its own, which `begin` makes: memory that is used
/// again.
pub(crate) fn map_with<I: Send, T: Send, S>(
    items: Vec<I>,
    buckets: usize,
    begin: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I) -> T + Sync,
) -> Vec<T> {
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(items.len());
    if threads < 2 || buckets < WORTH_IT {
        let mut own = begin();
        return items.into_iter().map(|item| work(&mut own, item)).collect();
    }
    let queue = Mutex::new(items.into_iter().enumerate());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let some = || -> Vec<(usize, T)> {
        let mut own = begin();
        std::iter::from_fn(next).map(|(at, item)| (at, work(&mut own, item))).collect()
    };
    let mut made = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(some)).collect();
        let mut made = some();
        for other in others {
            made.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        made
    });
    made.sort_unstable_by_key(|(at, _)| *at);
    made.into_iter().map(|(_, made)| made).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_made_once_and_stays_in_order() {
        for (count, buckets) in
            [(0_u64, 0), (1, WORTH_IT), (2, WORTH_IT), (1_000, 0), (1_000, WORTH_IT)]
        {
            let made = map((0..count).collect(), buckets, |n| n * n);
            assert!(made.into_iter().eq((0..count).map(|n| n * n)), "{count}");
        }
    }
}
