//! Where a virtual address stands in `VIPS_V4` or `VIPS_V6`.
//!
//! A cuckoo table (Pagh and Rodler, *Cuckoo hashing*, 2004) over a plain array:
//! a key stands in one of two slots, so that the program reads at most two,
//! without a hash map's call and chain. User space does the work of placing.

use crate::abi::{Address, VipKey};

/// The two slots that a key may stand in, in a table of `mask` + 1 slots
/// (a power of two, at most 2²⁰). For IPv4, `addr` is zero.
#[inline(always)]
pub const fn slots(addr: Address, key: VipKey, mask: u32) -> [u32; 2] {
    let mixed = key.0 ^ addr[0] ^ addr[1].rotate_left(29);
    let h = (mixed ^ mixed >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    [(h >> 44) as u32 & mask, (h >> 24) as u32 & mask]
}

#[cfg(feature = "user")]
pub use placing::{Full, Move, Placement};

#[cfg(feature = "user")]
mod placing {
    use std::collections::HashMap;

    use super::{Address, VipKey, slots};

    /// Who stands where.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Placement {
        mask: u32,
        taken: HashMap<u32, (Address, VipKey)>,
        places: HashMap<(Address, VipKey), u32>,
    }

    /// One step of an insertion: whoever is in the slot afterwards.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Move {
        /// The slot.
        pub slot: u32,
        /// Who stands there from now on.
        pub key: (Address, VipKey),
    }

    /// No arrangement has room for the key.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Full;

    impl Placement {
        /// An empty table of `mask` + 1 slots.
        pub fn new(mask: u32) -> Self {
            Self { mask, taken: HashMap::new(), places: HashMap::new() }
        }

        /// Notes that a key stands in a slot, as a table that was found says.
        pub fn found(&mut self, slot: u32, key: (Address, VipKey)) {
            self.taken.insert(slot, key);
            self.places.insert(key, slot);
        }

        /// The slot of a key.
        pub fn slot(&self, key: (Address, VipKey)) -> Option<u32> {
            self.places.get(&key).copied()
        }

        /// Every key.
        pub fn keys(&self) -> impl Iterator<Item = (Address, VipKey)> {
            self.places.keys().copied()
        }

        /// Finds room for a new key. Carrying out the moves in their order keeps
        /// every key findable: each goes to its other slot before its first is
        /// written over.
        ///
        /// # Errors
        /// [`Full`] when there is no room; nothing has changed then.
        pub fn insert(&mut self, key: (Address, VipKey)) -> Result<Vec<Move>, Full> {
            // Breadth-first over slots: the shortest chain of displacements that ends in
            // an empty one.
            let mut from: HashMap<u32, Option<u32>> = HashMap::new();
            let mut queue: std::collections::VecDeque<u32> = std::collections::VecDeque::new();
            for slot in slots(key.0, key.1, self.mask) {
                if from.insert(slot, None).is_none() {
                    queue.push_back(slot);
                }
            }
            while let Some(slot) = queue.pop_front() {
                let Some(&occupant) = self.taken.get(&slot) else {
                    return Ok(self.displace(&from, slot, key));
                };
                for next in slots(occupant.0, occupant.1, self.mask) {
                    if let std::collections::hash_map::Entry::Vacant(free) = from.entry(next) {
                        free.insert(Some(slot));
                        queue.push_back(next);
                    }
                }
            }
            Err(Full)
        }

        /// Takes a key away and returns the slot that it stood in.
        pub fn remove(&mut self, key: (Address, VipKey)) -> Option<u32> {
            let slot = self.places.remove(&key)?;
            self.taken.remove(&slot);
            Some(slot)
        }

        fn displace(
            &mut self,
            from: &HashMap<u32, Option<u32>>,
            empty: u32,
            key: (Address, VipKey),
        ) -> Vec<Move> {
            let mut moves = Vec::new();
            let mut slot = empty;
            while let Some(Some(previous)) = from.get(&slot).copied() {
                let Some(&occupant) = self.taken.get(&previous) else { break };
                self.found(slot, occupant);
                moves.push(Move { slot, key: occupant });
                slot = previous;
            }
            self.found(slot, key);
            moves.push(Move { slot, key });
            moves
        }
    }
}

#[cfg(all(test, feature = "user"))]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn key(i: u32) -> (Address, VipKey) {
        match i % 2 {
            0 => ([0; 2], VipKey::v4((0x0a00_0000 + i / 2).to_be(), 443_u16.to_be(), 6)),
            _ => (
                [u64::from(0x2001_0db8_u32.to_be()), u64::from(i).to_be()],
                VipKey::v6(443_u16.to_be(), 17),
            ),
        }
    }

    /// Looks a key up in slots as the program does.
    fn find(table: &HashMap<u32, (Address, VipKey)>, k: (Address, VipKey), mask: u32) -> bool {
        slots(k.0, k.1, mask).iter().any(|s| table.get(s) == Some(&k))
    }

    #[test]
    fn a_quarter_full_table_takes_every_key_and_none_is_lost_on_the_way() {
        let mask = 4095;
        let mut placement = Placement::new(mask);
        let mut table = HashMap::new();
        for i in 0..1024 {
            for step in placement.insert(key(i)).unwrap() {
                table.insert(step.slot, step.key);
                for old in 0..i {
                    assert!(find(&table, key(old), mask), "{old} is lost while {i} comes in");
                }
            }
            assert!(find(&table, key(i), mask));
        }
    }

    #[test]
    fn a_full_table_refuses_and_stays_as_it_is() {
        let mut placement = Placement::new(1);
        let mut stored = 0;
        for i in 0..100 {
            let before = placement.clone();
            match placement.insert(key(i)) {
                Ok(_) => stored += 1,
                Err(Full) => assert_eq!(placement, before),
            }
        }
        assert!(stored <= 2);
    }

    #[test]
    fn what_is_removed_leaves_its_slot() {
        let mut placement = Placement::new(63);
        placement.insert(key(1)).unwrap();
        let slot = placement.slot(key(1)).unwrap();
        assert_eq!(placement.remove(key(1)), Some(slot));
        assert_eq!(placement.slot(key(1)), None);
        assert_eq!(placement.keys().count(), 0);
    }
}
