//! A table that is sent to control without an agent: random ones, as they lie in the maps.

use std::collections::BTreeMap;

use canary_agent::plan::{AdoptedService, Diverted, Family, Panicking};
use canary_ebpf_common::{
    abi::{
        self, BACKEND_DOWN, BACKEND_DRAIN, BACKEND_MAINT, BACKEND_USABLE, BACKEND_WEIGHT_SHIFT,
        Backend, ForwardMode, LedgerEntry, SERVICE_FORGETS, SERVICE_LEARNS, Service,
    },
    entry::{BackendIndex, Entry},
};
use proptest::{collection::vec, prelude::*};

const BUCKETS: u32 = 4096;
const NOW_MS: u64 = 9_000_000;

/// A backend: its version, weight and flags, and whether it is in slow start.
type One = (u8, u32, u32, bool);

fn one() -> impl Strategy<Value = One> {
    let flags = prop_oneof![
        6 => Just(BACKEND_USABLE),
        1 => Just(BACKEND_USABLE | BACKEND_DOWN),
        1 => Just(BACKEND_USABLE | BACKEND_DRAIN),
        1 => Just(BACKEND_USABLE | BACKEND_MAINT),
        1 => Just(0),
    ];
    (0_u8..3, prop_oneof![1 => Just(0_u32), 5 => 1_u32..6], flags, prop::bool::weighted(0.1))
}

/// What stands in a bucket: two of the backends, whether it is tracked and learns, the owner.
type Bucket = (usize, usize, bool, bool, u8);

fn records(ones: &[One]) -> Vec<(BackendIndex, Backend)> {
    let record = |(n, &(version, weight, flags, slow)): (u16, &One)| {
        let record = Backend {
            addr: abi::address(std::net::Ipv4Addr::from(0x0a00_0000 + u32::from(n)).into()),
            port_be: 80_u16.to_be(),
            version,
            flags: flags | weight << BACKEND_WEIGHT_SHIFT,
            slow_since_ms: u32::from(slow),
            ..Backend::default()
        };
        (BackendIndex::new(n + 1), record)
    };
    (0..).zip(ones).map(record).collect()
}

fn table(ones: &[One], buckets: &[Bucket], flags: u32) -> AdoptedService {
    let index = |at: usize| BackendIndex::new((at % (ones.len() + 1)) as u16);
    let all = || (0..BUCKETS as usize).map(|bucket| &buckets[bucket % buckets.len()]);
    let entry = |&(current, previous, tracked, learns, _): &Bucket| match tracked {
        true => Entry::tracking(index(current), index(previous), learns),
        false => Entry::steady(index(current)),
    };
    AdoptedService {
        id: 3,
        name: "shop".to_owned(),
        family: Family::V4,
        versions: ["stable", "v2", "v3"].map(str::to_owned).to_vec(),
        control: 0,
        first_page: 0,
        buckets: BUCKETS,
        entries: all().map(entry).collect(),
        ledger: all().map(|bucket| LedgerEntry::new(bucket.4, 77)).collect(),
        record: Some(Service { flags, ..Service::default() }),
        packets: 1,
    }
}

/// Those that take new connections, by the planner's rules.
fn takers(ones: &[One]) -> BTreeMap<BackendIndex, u32> {
    let known = (1_u16..).map(BackendIndex::new).zip(ones);
    let known: Vec<(BackendIndex, &One)> = known
        .filter(|(_, (version, weight, flags, _))| {
            *version == 0 && *weight > 0 && flags & (BACKEND_DRAIN | BACKEND_MAINT) == 0
        })
        .collect();
    let usable = |flags: u32| flags & BACKEND_USABLE != 0;
    let up = |one: &One| usable(one.2) && one.2 & BACKEND_DOWN == 0;
    let ranks: [&dyn Fn(&One) -> bool; 4] =
        [&|one| up(one) && !one.3, &up, &|one| usable(one.2), &|_| true];
    for rank in ranks {
        let some = known.iter().filter(|(_, one)| rank(one));
        let some: BTreeMap<_, _> = some.map(|(index, one)| (*index, one.1)).collect();
        if !some.is_empty() {
            return some;
        }
    }
    BTreeMap::new()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn everything_goes_to_control_and_what_is_open_is_remembered(
        ones in vec(one(), 1..8),
        buckets in vec((0_usize..9, 0_usize..9, any::<bool>(), any::<bool>(), 0_u8..3), 1..200),
        nat in any::<bool>(),
        forgets in prop::bool::weighted(0.2),
        learns in any::<bool>(),
        moves in prop::bool::weighted(0.3),
        split in 0..BUCKETS as usize,
    ) {
        let mode = if nat { ForwardMode::Nat } else { ForwardMode::Dsr };
        let mut flags = mode as u32;
        flags |= if forgets { SERVICE_FORGETS } else { 0 };
        flags |= if learns { SERVICE_LEARNS } else { 0 };
        let (table, backends) = (table(&ones, &buckets, flags), records(&ones));
        let of = |index: BackendIndex| ones.get(usize::from(index.get()).wrapping_sub(1));
        let is_control = |index: BackendIndex| of(index).is_some_and(|one| one.0 == 0);
        let takers = takers(&ones);
        let (control, record) = (table.control, table.record.as_ref());
        let panicking =
            Panicking { control, record, backends: &backends, moves, now_ms: NOW_MS };
        // What was another table's before leaves nothing behind.
        let mut diverted = Diverted::default();
        let _ = panicking.divert(&table.entries[1..], &mut diverted);
        let Ok(()) = panicking.divert(&table.entries, &mut diverted) else {
            prop_assert!(takers.is_empty());
            return Ok(());
        };
        prop_assert!(!takers.is_empty());
        let foreign = panicking.others().count();
        prop_assert_eq!(foreign, ones.iter().filter(|one| one.0 != 0).count());
        let mut ledger = table.ledger.clone();
        let mut foreign = 0;
        let (first, second) = table.ledger.split_at(split);
        for (at, recorded) in [(0, first), (split, second)] {
            panicking.records(&diverted, at, recorded, |bucket, old, new| {
                assert_eq!(old, ledger[bucket]);
                foreign += u32::from(old.owner() != 0);
                ledger[bucket] = new;
            });
        }
        let of_others = table.ledger.iter().filter(|one| one.owner() != 0).count() as u32;
        prop_assert_eq!(foreign, of_others);
        let (entries, moved) = (&diverted.entries, diverted.moved);
        let mut given: BTreeMap<BackendIndex, u32> = BTreeMap::new();
        for bucket in 0..BUCKETS as usize {
            let (old, new) = (table.entries[bucket], entries[bucket]);
            let (before, after) = (table.ledger[bucket], ledger[bucket]);
            prop_assert!(is_control(new.current()));
            prop_assert_eq!(after.owner(), 0);
            if is_control(old.current()) {
                prop_assert_eq!(new.current(), old.current(), "what control has stays");
                prop_assert_eq!(after.moved_ms(), before.moved_ms());
            } else {
                *given.entry(new.current()).or_default() += 1;
                prop_assert_eq!(after.moved_ms(), NOW_MS);
            }
            // Where open connections are found: as for any move, unless they go, too.
            let was = if old.tracked() { old.previous() } else { old.current() };
            let remembered = match is_control(old.current()) {
                true => old.tracked(),
                false => !nat && !forgets && (old.tracked() || !old.current().is_none()),
            };
            let expected = remembered && (!moves || is_control(was));
            prop_assert_eq!(new.tracked(), expected, "{:?} {:?}", old, new);
            if new.tracked() {
                prop_assert_eq!(new.previous(), was);
            }
        }
        prop_assert_eq!(given.values().sum::<u32>(), moved);
        // Weights hold to one bucket among what was given out.
        let total: u32 = takers.values().sum();
        for (index, count) in &given {
            prop_assert!(takers.contains_key(index), "{index:?} takes nothing new");
            let due = f64::from(moved) * f64::from(takers[index]) / f64::from(total);
            prop_assert!((f64::from(*count) - due).abs() <= 1.0, "{index:?}: {count} of {due}");
        }
    }
}
