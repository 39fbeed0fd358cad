//! What was looked up of clients a moment ago: their classes, and the tables that those lead to.
//!
//! Owns how it lies in memory: in sets of a cache line each, since what a packet waits for is memory.
//! A set is of one time, that of a number of `CLASS_CHANGES`: at another it is empty. In a full set
//! what is new takes the place of what was kept first. None of it is read while another writes: each
//! processor has sets of its own.

use crate::{abi::Address, class::Class};

/// IPv4 clients of a set.
const WAYS_V4: usize = 8;
/// IPv6 clients of a set.
const WAYS_V6: usize = 3;
/// Tables of a set.
const TABLE_WAYS: usize = 7;

/// Classes of IPv4 clients: a set of `RECENT_V4`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ClientsV4 {
    changes: u64,
    addrs_be: [u32; WAYS_V4],
    /// One more than the class; 0 where there is nobody.
    classes: [u16; WAYS_V4],
    /// Where the next one is kept.
    next: u64,
}

/// Classes of IPv6 clients: a set of `RECENT_V6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ClientsV6 {
    changes: u64,
    /// The one that was kept last is the first.
    addrs: [Address; WAYS_V6],
    /// As in [`ClientsV4`].
    classes: [u16; WAYS_V6],
    /// Zero.
    pad: u16,
}

/// What steers the clients of a class in a service: a set of `RECENT_TABLES`.
///
/// All classes of a service are in one set. The processor can foresee which of its ways it will
/// be, but not an address that a class has a part in: so it goes on to the table while it still
/// waits for the client's class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tables {
    changes: u64,
    /// The one that was kept last is the first; 0 where there is none.
    ways: [u64; TABLE_WAYS],
}

const _: () = {
    assert!(size_of::<ClientsV4>() == 64);
    assert!(size_of::<ClientsV6>() == 64);
    assert!(size_of::<Tables>() == 64);
};

/// Which table steers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The service's own.
    Own,
    /// That of an audience.
    Other {
        /// Its first page.
        first_page: u32,
        /// As many bits of the hash as say the bucket.
        bucket_bits: u8,
    },
}

/// In the place of the number of bits: [`Table::Own`].
const OWN: u32 = 31;

impl Table {
    /// In 32 bits: buckets are counted in as many, so that pages take 20.
    #[inline(always)]
    const fn word(self) -> u32 {
        match self {
            Self::Own => OWN,
            Self::Other { first_page, bucket_bits } => first_page << 5 | bucket_bits as u32 & 31,
        }
    }

    #[inline(always)]
    const fn of(word: u32) -> Self {
        match word & 31 {
            OWN => Self::Own,
            bits => Self::Other { first_page: word >> 5, bucket_bits: bits as u8 },
        }
    }
}

impl ClientsV4 {
    /// The class of a client, if it is known, `changes` being what `CLASS_CHANGES` says.
    #[inline(always)]
    pub fn class(&self, changes: u64, addr_be: u32) -> Option<Class> {
        let mut found = 0;
        for way in 0..WAYS_V4 {
            let differs = u64::from(self.addrs_be[way] ^ addr_be);
            // Without a branch, which would be foreseen for few clients only.
            let all_ones_if_same = (differs.wrapping_sub(1) as i64 >> 63) as u64;
            found |= all_ones_if_same & u64::from(self.classes[way]);
        }
        known(found, self.changes ^ changes)
    }

    /// Keeps the class of a client that is not known.
    #[inline(always)]
    pub fn keep(&mut self, changes: u64, addr_be: u32, class: Class) {
        if self.changes != changes {
            *self = Self { changes, ..Self::default() };
        }
        let way = self.next as usize % WAYS_V4;
        self.addrs_be[way] = addr_be;
        self.classes[way] = class.get() + 1;
        self.next = self.next.wrapping_add(1);
    }
}

impl ClientsV6 {
    /// The class of a client, if it is known, `changes` being what `CLASS_CHANGES` says.
    #[inline(always)]
    pub fn class(&self, changes: u64, addr: Address) -> Option<Class> {
        let mut found = 0;
        for way in 0..WAYS_V6 {
            let kept = &self.addrs[way];
            let differs = (kept[0] ^ addr[0]) | (kept[1] ^ addr[1]);
            let all_ones_if_other = ((differs | differs.wrapping_neg()) as i64 >> 63) as u64;
            found |= !all_ones_if_other & u64::from(self.classes[way]);
        }
        known(found, self.changes ^ changes)
    }

    /// Keeps the class of a client that is not known.
    #[inline(always)]
    pub fn keep(&mut self, changes: u64, addr: Address, class: Class) {
        if self.changes != changes {
            *self = Self { changes, ..Self::default() };
        }
        // Moved along rather than counted: the verifier sees no limit to a number of three.
        let [first, second, _] = self.addrs;
        self.addrs = [addr, first, second];
        let [first, second, _] = self.classes;
        self.classes = [class.get() + 1, first, second];
    }
}

/// The class that a set has found, if it is of this time.
#[inline(always)]
fn known(found: u64, differs: u64) -> Option<Class> {
    (found != 0 && differs == 0).then(|| Class::new(found as u16 - 1))
}

impl Tables {
    /// The service, and one more than the class.
    #[inline(always)]
    const fn key(service: u32, class: Class) -> u32 {
        service << 16 | (class.get() as u32 + 1)
    }

    /// What steers the clients of `class` in `service`, if it is known.
    #[inline(always)]
    pub fn table(&self, changes: u64, service: u32, class: Class) -> Option<Table> {
        if self.changes != changes {
            return None;
        }
        let key = Self::key(service, class);
        for way in &self.ways {
            if *way as u32 == key {
                return Some(Table::of((*way >> 32) as u32));
            }
        }
        None
    }

    /// Whether that is known.
    #[inline(always)]
    pub fn has(&self, changes: u64, service: u32, class: Class) -> bool {
        let key = Self::key(service, class);
        let mut found = 0;
        for way in &self.ways {
            // Without a branch, each of which the verifier would follow to the program's end.
            found |= u64::from(*way as u32 ^ key).wrapping_sub(1);
        }
        found >> 63 != 0 && self.changes == changes
    }

    /// Keeps what steers the clients of a class, if that is not known.
    #[inline(always)]
    pub fn keep(&mut self, changes: u64, service: u32, class: Class, table: Table) {
        if self.changes != changes {
            *self = Self { changes, ..Self::default() };
        }
        let way = u64::from(table.word()) << 32 | u64::from(Self::key(service, class));
        let [a, b, c, d, e, f, _] = self.ways;
        self.ways = [way, a, b, c, d, e, f];
    }
}

/// Which set of `RECENT_V4` may know a client: a number whose low 24 bits are spread.
#[inline(always)]
pub const fn place_v4(addr_be: u32) -> u32 {
    spread(addr_be as u64)
}

/// The same of `RECENT_V6`.
#[inline(always)]
pub const fn place_v6(addr: Address) -> u32 {
    spread(addr[0] ^ addr[1].rotate_left(32))
}

/// The same of `RECENT_TABLES`, and a service.
#[inline(always)]
pub const fn place_of_tables(service: u32) -> u32 {
    spread(service as u64)
}

#[inline(always)]
const fn spread(mixed: u64) -> u32 {
    // What neighbours differ in may be in the upper bits, which a product takes no further down.
    let mixed = (mixed ^ mixed >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ mixed >> 12) >> 40) as u32
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Something that remembers: a set, or the model of one.
    trait Set: Default {
        type Key: Copy + PartialEq + std::fmt::Debug;
        type Value: Copy + PartialEq + std::fmt::Debug;
        const WAYS: usize;
        fn look(&self, changes: u64, key: Self::Key) -> Option<Self::Value>;
        fn store(&mut self, changes: u64, key: Self::Key, value: Self::Value);
    }

    impl Set for ClientsV4 {
        type Key = u32;
        type Value = Class;
        const WAYS: usize = WAYS_V4;
        fn look(&self, changes: u64, key: u32) -> Option<Class> {
            self.class(changes, key)
        }
        fn store(&mut self, changes: u64, key: u32, value: Class) {
            self.keep(changes, key, value);
        }
    }

    impl Set for ClientsV6 {
        type Key = Address;
        type Value = Class;
        const WAYS: usize = WAYS_V6;
        fn look(&self, changes: u64, key: Address) -> Option<Class> {
            self.class(changes, key)
        }
        fn store(&mut self, changes: u64, key: Address, value: Class) {
            self.keep(changes, key, value);
        }
    }

    impl Set for Tables {
        type Key = (u32, Class);
        type Value = Table;
        const WAYS: usize = TABLE_WAYS;
        fn look(&self, changes: u64, (service, class): (u32, Class)) -> Option<Table> {
            let found = self.table(changes, service, class);
            assert_eq!(self.has(changes, service, class), found.is_some());
            found
        }
        fn store(&mut self, changes: u64, (service, class): (u32, Class), value: Table) {
            self.keep(changes, service, class, value);
        }
    }

    /// Asks and keeps in this order, as the program does, beside a list.
    fn as_a_list_would<S: Set>(steps: &[(bool, S::Key, S::Value)]) {
        let (mut set, mut changes) = (S::default(), 1);
        let mut list: VecDeque<(S::Key, S::Value)> = VecDeque::new();
        for (another_time, key, value) in steps {
            if *another_time {
                changes += 2;
                list.clear();
            }
            let expected = list.iter().find(|(kept, _)| kept == key).map(|(_, value)| *value);
            assert_eq!(set.look(changes, *key), expected, "{key:?} among {list:?}");
            assert_eq!(set.look(changes + 1, *key), None);
            if expected.is_none() {
                set.store(changes, *key, *value);
                list.push_back((*key, *value));
                if list.len() > S::WAYS {
                    list.pop_front();
                }
            }
        }
    }

    /// Few different ones, which differ in few bits: those at the ends of words.
    fn bits() -> impl Strategy<Value = u64> {
        prop::sample::select(vec![0, 1, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63, u64::MAX])
    }

    fn addr_be() -> impl Strategy<Value = u32> {
        (bits(), bits()).prop_map(|(a, b)| a as u32 ^ (b >> 32) as u32)
    }

    fn class() -> impl Strategy<Value = Class> {
        prop::sample::select(vec![0, 1, 2, 0xff, 0x100, 0x4000, 0x7ffe, 0x7fff])
            .prop_map(Class::new)
    }

    fn table() -> impl Strategy<Value = Table> {
        let other = (0..1_u32 << 20, 0..=24_u8)
            .prop_map(|(first_page, bucket_bits)| Table::Other { first_page, bucket_bits });
        prop_oneof![Just(Table::Own), other]
    }

    fn steps<K: Strategy, V: Strategy>(
        key: K,
        value: V,
    ) -> impl Strategy<Value = Vec<(bool, K::Value, V::Value)>> {
        prop::collection::vec((prop::bool::weighted(0.02), key, value), 1..200)
    }

    proptest! {
        #[test]
        fn a_set_of_ipv4_clients_is_a_list_of_those_kept_last(
            steps in steps(addr_be(), class())
        ) {
            as_a_list_would::<ClientsV4>(&steps);
        }

        #[test]
        fn a_set_of_ipv6_clients_is_a_list_of_those_kept_last(
            steps in steps((bits(), bits()).prop_map(|(first, second)| [first, second]), class())
        ) {
            as_a_list_would::<ClientsV6>(&steps);
        }

        #[test]
        fn a_set_of_tables_is_a_list_of_those_kept_last(
            steps in steps((prop::sample::select(vec![0_u32, 1, 2, 0x7fff, 0x8000, 0xffff]), class()), table())
        ) {
            as_a_list_would::<Tables>(&steps);
        }
    }

    #[test]
    fn nobody_is_known_where_nothing_was_kept() {
        let rest = Class::REST;
        for changes in [0, 1, u64::MAX] {
            assert_eq!(ClientsV4::default().class(changes, 0), None);
            assert_eq!(ClientsV6::default().class(changes, [0; 2]), None);
            assert_eq!(Tables::default().table(changes, 0, rest), None);
        }
    }

    #[test]
    fn neighbours_spread_over_the_sets() {
        // Of 8,192 sets, each client in a set of its own would be 4,096.
        let sets = |places: &mut dyn Iterator<Item = u32>| {
            places.map(|place| place & 0x1fff).collect::<std::collections::BTreeSet<u32>>().len()
        };
        let v4 = &mut (0..4096_u32).map(|at| place_v4((0xc633_6400 + at).to_be()));
        assert!(sets(v4) > 3000);
        let far = &mut (0..4096_u32).map(|at| place_v4((at << 20).to_be()));
        assert!(sets(far) > 3000);
        let net = 0x2001_0db8_00aa_0000_u64;
        let hosts = &mut (0..4096_u64).map(|at| place_v6([net.to_be(), at.to_be()]));
        assert!(sets(hosts) > 3000);
        let homes = &mut (0..4096_u64).map(|at| place_v6([(net + at).to_be(), 1_u64.to_be()]));
        assert!(sets(homes) > 3000);
    }
}
