//! When to make the kernel use which neighbour, so that all that are needed are
//! known and stay so.
//!
//! Pure: time is handed in. Must not know of sockets.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, Instant},
};

use super::{
    tables::{Standing, Tables},
    wire::NeighbourKey,
};

/// Longest time for which a needed neighbour goes without a look.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// The looks at different neighbours are spread over this much of it.
const SPREAD: Duration = Duration::from_secs(5);
/// A neighbour that does not answer is asked for again after 1, 2, 4, then each 5 seconds;
/// in each of those the kernel itself asks up to three times, a second apart.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
struct Entry {
    due: Instant,
    attempts: u32,
}

/// The needed neighbours and when each is next looked at.
#[derive(Clone, Debug, Default)]
pub(super) struct Care {
    entries: HashMap<NeighbourKey, Entry>,
    schedule: BTreeSet<(Instant, NeighbourKey)>,
}

impl Care {
    /// Replaces the set of needed neighbours. New ones are due at once.
    pub(super) fn want<T>(&mut self, wanted: &HashMap<NeighbourKey, T>, now: Instant) {
        let gone: Vec<_> =
            self.entries.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in gone {
            if let Some(entry) = self.entries.remove(&key) {
                self.schedule.remove(&(entry.due, key));
            }
        }
        for &key in wanted.keys() {
            if !self.entries.contains_key(&key) {
                self.set(key, Entry { due: now, attempts: 0 });
            }
        }
    }

    /// Whether a neighbour is needed.
    pub(super) fn wants(&self, key: NeighbourKey) -> bool {
        self.entries.contains_key(&key)
    }

    /// Takes note that a neighbour's standing went from `before` to `after`.
    pub(super) fn noticed(
        &mut self,
        key: NeighbourKey,
        before: Standing,
        after: Standing,
        now: Instant,
    ) {
        let Some(entry) = self.entries.get(&key).copied() else {
            return;
        };
        match (before, after) {
            // Lost a moment ago: ask at once, before anybody hears of it.
            (Standing::Good | Standing::Aged | Standing::Fixed, Standing::Missing) => {
                self.set(key, Entry { due: now, attempts: 0 });
            }
            (_, Standing::Good | Standing::Fixed) => {
                self.set(key, Entry { due: now + rest(key), attempts: 0 });
            }
            (Standing::Missing, Standing::Aged) => self.set(key, Entry { attempts: 0, ..entry }),
            (_, Standing::Aged | Standing::Missing) => {}
        }
    }

    /// Takes note that a neighbour has answered somebody. One that is not known is asked for at
    /// once: the kernel takes no answer in that it has not asked for.
    pub(super) fn answered(&mut self, key: NeighbourKey, standing: Standing, now: Instant) {
        if standing == Standing::Missing && self.wants(key) {
            self.set(key, Entry { due: now, attempts: 0 });
        }
    }

    /// Takes up to `limit` neighbours that the kernel should be made to use now.
    pub(super) fn take(
        &mut self,
        now: Instant,
        limit: usize,
        tables: &Tables,
    ) -> Vec<NeighbourKey> {
        let mut taken = Vec::new();
        while taken.len() < limit
            && let Some(&(due, key)) = self.schedule.first()
            && due <= now
        {
            let attempts = self.entries.get(&key).map_or(0, |entry| entry.attempts);
            match tables.standing(key) {
                Standing::Fixed | Standing::Good => {
                    self.set(key, Entry { due: now + rest(key), attempts: 0 });
                }
                Standing::Aged => {
                    self.set(key, Entry { due: now + rest(key), attempts: 0 });
                    taken.push(key);
                }
                Standing::Missing => {
                    let pause = RETRY_FIRST.saturating_mul(1 << attempts.min(8)).min(RETRY_MAX);
                    self.set(key, Entry { due: now + pause, attempts: attempts.saturating_add(1) });
                    taken.push(key);
                }
            }
        }
        taken
    }

    /// When the next neighbour is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.schedule.first().map(|(due, _)| *due)
    }

    fn set(&mut self, key: NeighbourKey, entry: Entry) {
        if let Some(before) = self.entries.insert(key, entry) {
            self.schedule.remove(&(before.due, key));
        }
        self.schedule.insert((entry.due, key));
    }
}

/// How long a known neighbour is left alone: its own share of the keepalive time, so
/// that neighbours which were resolved together are not all confirmed together.
fn rest(key: NeighbourKey) -> Duration {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    let spread_ms = u64::try_from(SPREAD.as_millis()).unwrap_or(u64::MAX);
    KEEPALIVE - Duration::from_millis(hasher.finish() % spread_ms)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use netlink_packet_route::neighbour::NeighbourState;

    use super::*;
    use crate::resolve::wire::{Message, Neighbour};

    fn key(n: u32) -> NeighbourKey {
        NeighbourKey { ifindex: 1, address: IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n)) }
    }

    fn state(tables: &mut Tables, key: NeighbourKey, state: NeighbourState) {
        tables.apply(Message::Neighbour(key, Neighbour { state, mac: Some([1; 6]) }));
    }

    #[test]
    fn unknown_neighbours_are_asked_for_ever_more_slowly() {
        let (mut care, mut tables, start) = (Care::default(), Tables::default(), Instant::now());
        care.want(&HashMap::from([(key(1), ())]), start);
        let mut asked = Vec::new();
        for second in 0..20 {
            let now = start + Duration::from_secs(second);
            if !care.take(now, 9, &tables).is_empty() {
                asked.push(second);
            }
        }
        assert_eq!(asked, [0, 1, 3, 7, 12, 17]);

        let now = start + Duration::from_secs(20);
        state(&mut tables, key(1), NeighbourState::Reachable);
        care.noticed(key(1), Standing::Missing, Standing::Good, now);
        assert!(care.next().is_some_and(|due| due >= now + KEEPALIVE - SPREAD));
        care.answered(key(1), Standing::Good, now);
        assert_eq!(care.take(now, 9, &tables), [], "it is known");
        tables.apply(Message::NeighbourGone(key(1)));
        care.noticed(key(1), Standing::Good, Standing::Missing, now);
        assert_eq!(care.take(now, 9, &tables), [key(1)], "asked for again at once");
        assert_eq!(care.take(now, 9, &tables), []);
        care.answered(key(1), Standing::Missing, now);
        assert_eq!(care.take(now, 9, &tables), [key(1)], "it is there again");
    }

    #[test]
    fn only_aged_neighbours_are_used_to_keep_them() {
        let (mut care, mut tables, start) = (Care::default(), Tables::default(), Instant::now());
        let states = [NeighbourState::Stale, NeighbourState::Reachable, NeighbourState::Permanent];
        for (n, known) in (1..).zip(states) {
            state(&mut tables, key(n), known);
        }
        care.want(&(1..=3).map(|n| (key(n), ())).collect(), start);
        assert_eq!(care.take(start, 9, &tables), [key(1)]);
        assert_eq!(
            care.take(start + KEEPALIVE - SPREAD - Duration::from_millis(1), 9, &tables),
            []
        );
        assert_eq!(care.take(start + KEEPALIVE, 9, &tables), [key(1)]);
    }

    #[test]
    fn ten_thousand_are_spread_out_and_the_limit_holds() {
        let (mut care, mut tables, start) = (Care::default(), Tables::default(), Instant::now());
        let all: HashMap<_, _> = (0..10_000).map(|n| (key(n), ())).collect();
        for key in all.keys() {
            state(&mut tables, *key, NeighbourState::Stale);
        }
        care.want(&all, start);
        assert_eq!(care.take(start, 100, &tables).len(), 100);
        assert_eq!(care.take(start, usize::MAX, &tables).len(), 9_900);
        let mut busiest = 0;
        for ms in (10_000_u64..=15_000).step_by(100) {
            let now = start + Duration::from_millis(ms);
            busiest = busiest.max(care.take(now, usize::MAX, &tables).len());
        }
        assert!(busiest < 300, "{busiest} in a tenth of a second");
        care.want::<()>(&HashMap::new(), start);
        assert_eq!(care.next(), None);
        assert!(!care.wants(key(1)));
    }
}
