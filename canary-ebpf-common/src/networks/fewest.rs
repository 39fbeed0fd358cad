//! A value for every address, in the least number of prefixes.
//!
//! After Draves, King, Venkatachary and Zill, *Constructing optimal IP routing tables* (INFOCOM
//! 1999): from the leaves up, each node of the tree keeps the values that cost least there, those
//! of both halves if they have any in common, else those of either; from the root down, a node
//! whose parent's value is among them needs no prefix. Here the tree has no node where nothing
//! branches, and a node keeps four values at most, which may cost a prefix and never a wrong value.

use std::net::IpAddr;

use super::prefix::{Prefix, Width, bits_of};

/// A value for every address of a family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled<T> {
    width: Width,
    rest: T,
    prefixes: Vec<(Prefix, T)>,
}

impl<T: Copy + Ord> Labelled<T> {
    /// The same value for every address.
    pub const fn new(width: Width, rest: T) -> Self {
        Self { width, rest, prefixes: Vec::new() }
    }

    /// What was found written down, each prefix once: addresses under none have the default.
    pub fn found(width: Width, mut prefixes: Vec<(Prefix, T)>) -> Self
    where
        T: Default,
    {
        prefixes.sort_unstable();
        prefixes.dedup_by_key(|(prefix, _)| *prefix);
        Self { width, rest: T::default(), prefixes }
    }

    /// The prefixes whose longest match gives the value, sorted.
    pub fn prefixes(&self) -> &[(Prefix, T)] {
        &self.prefixes
    }

    /// The value of addresses under no prefix.
    pub const fn rest(&self) -> T {
        self.rest
    }

    /// The family.
    pub const fn width(&self) -> Width {
        self.width
    }

    /// The value of an address of the family, and the prefix that it stands under.
    pub fn find(&self, addr: IpAddr) -> Option<(Prefix, T)> {
        let addr = Prefix::new(bits_of(addr), self.width.bits());
        let mut end = self.prefixes.partition_point(|(prefix, _)| *prefix <= addr);
        loop {
            let (prefix, value) = *self.prefixes[..end].last()?;
            if prefix.contains(addr) {
                return Some((prefix, value));
            }
            // Whatever has the address in it has in it what both have in common with it, too, or
            // stands before: no need to look at what lies beside.
            let around = prefix.around(addr);
            let next = self.prefixes[..end].partition_point(|(prefix, _)| *prefix <= around);
            end = next.min(end - 1);
        }
    }

    /// The value of an address of the family.
    pub fn at(&self, addr: IpAddr) -> T {
        self.find(addr).map_or(self.rest, |(_, value)| value)
    }

    /// The same prefixes with other values, which may take fewer.
    pub fn map(&self, mut value: impl FnMut(Prefix, T) -> T) -> Self {
        let found: Vec<(Prefix, T)> =
            self.prefixes.iter().map(|(prefix, was)| (*prefix, value(*prefix, *was))).collect();
        Self::fewest(self.width, self.rest, &found)
    }

    /// How many addresses have each value but that of the rest, by value.
    pub fn addresses(&self) -> Vec<(T, u128)> {
        let mut counts = std::collections::BTreeMap::new();
        let mut stack: Vec<(Prefix, T)> = Vec::new();
        for (prefix, value) in &self.prefixes {
            while stack.last().is_some_and(|(at, _)| !at.contains(*prefix)) {
                stack.pop();
            }
            let count = prefix.addresses(self.width);
            if let Some((_, around)) = stack.last() {
                let of_it: &mut u128 = counts.entry(*around).or_default();
                *of_it = of_it.saturating_sub(count);
            }
            let of_it = counts.entry(*value).or_default();
            *of_it = of_it.saturating_add(count);
            stack.push((*prefix, *value));
        }
        counts.remove(&self.rest);
        counts.into_iter().collect()
    }

    /// `found` in the least number of prefixes. It is sorted, each prefix once, and says what its
    /// addresses have that are in no longer one.
    pub(super) fn fewest(width: Width, rest: T, found: &[(Prefix, T)]) -> Self {
        let mut values: Vec<T> = found.iter().map(|(_, value)| *value).chain([rest]).collect();
        values.sort_unstable();
        values.dedup();
        let number = |value: &T| values.binary_search(value).map_or(0, |at| at as u32);
        let found: Vec<(Prefix, u32)> =
            found.iter().map(|(prefix, value)| (*prefix, number(value))).collect();
        let rest_number = number(&rest);
        let mut tree = Tree {
            nodes: Vec::with_capacity(found.len()),
            rest: rest_number,
            block_bits: width.block_bits(),
            written: Vec::new(),
        };
        let root = tree.grow(Prefix::ALL, &found, rest_number);
        drop(found);
        tree.write(root, rest_number);
        let mut written = tree.written;
        written.sort_unstable();
        let value = |(prefix, number): (Prefix, u32)| (prefix, values[number as usize]);
        Self { width, rest, prefixes: written.into_iter().map(value).collect() }
    }
}

/// A few values, sorted.
#[derive(Clone, Copy, Debug)]
struct Few {
    values: [u32; 4],
    count: u8,
}

impl Few {
    const fn one(value: u32) -> Self {
        Self { values: [value, 0, 0, 0], count: 1 }
    }

    fn as_slice(&self) -> &[u32] {
        &self.values[..usize::from(self.count)]
    }

    fn has(&self, value: u32) -> bool {
        self.as_slice().contains(&value)
    }

    /// What both have, else what either has.
    fn meet(&self, other: &Self) -> Self {
        let mut both = Self { values: [0; 4], count: 0 };
        let (mut a, mut b) = (self.as_slice(), other.as_slice());
        for value in a.iter().filter(|value| b.contains(value)) {
            both.add(*value);
        }
        if both.count > 0 {
            return both;
        }
        loop {
            let least = match (a.first(), b.first()) {
                (Some(x), Some(y)) if x < y => &mut a,
                (Some(_), None) => &mut a,
                (_, Some(_)) => &mut b,
                (None, None) => return both,
            };
            let Some((value, others)) = least.split_first() else { return both };
            both.add(*value);
            *least = others;
        }
    }

    fn add(&mut self, value: u32) {
        if let Some(slot) = self.values.get_mut(usize::from(self.count)) {
            *slot = value;
            self.count += 1;
        }
    }
}

const NONE: u32 = u32::MAX;

struct Node {
    prefix: Prefix,
    /// The value of its addresses that are in neither child.
    label: u32,
    few: Few,
    children: [u32; 2],
}

struct Tree {
    nodes: Vec<Node>,
    /// The value of what is not written down.
    rest: u32,
    block_bits: u8,
    written: Vec<(Prefix, u32)>,
}

impl Tree {
    /// The tree of `items`, all of them in `prefix`, whose value it is that `label` says unless the
    /// first one says another. At most 128 deep: each level has a longer prefix.
    fn grow(&mut self, prefix: Prefix, items: &[(Prefix, u32)], label: u32) -> u32 {
        let (label, items) = match items.split_first() {
            Some(((first, own), others)) if *first == prefix => (*own, others),
            _ => (label, items),
        };
        let at = self.nodes.len() as u32;
        self.nodes.push(Node { prefix, label, few: Few::one(label), children: [NONE; 2] });
        if items.is_empty() {
            return at;
        }
        let high = prefix.half(true);
        let (low_items, high_items) =
            items.split_at(items.partition_point(|(item, _)| item.bits() < high.bits()));
        let mut halves = [Few::one(label); 2];
        let mut children = [NONE; 2];
        for (side, items) in [low_items, high_items].into_iter().enumerate() {
            let (Some((first, _)), Some((last, _))) = (items.first(), items.last()) else {
                continue;
            };
            // The first is the shortest of those that it shares its bits with.
            let child = self.grow(first.around(*last), items, label);
            children[side] = child;
            halves[side] = self.lifted(child, prefix.len() + 1, label);
        }
        let few = self.meet(prefix.len(), label, &halves[0], &halves[1]);
        let node = &mut self.nodes[at as usize];
        node.few = few;
        node.children = children;
        at
    }

    /// What costs least at a node of `len` bits whose halves cost least with `low` and `high`.
    fn meet(&self, len: u8, label: u32, low: &Few, high: &Few) -> Few {
        let keeps_rest = len < self.block_bits && label == self.rest;
        if keeps_rest && (low.has(label) || high.has(label)) {
            return Few::one(label);
        }
        low.meet(high)
    }

    /// What costs least at the network of `len` bits around the node `child`, all else in it
    /// having the value `label`.
    fn lifted(&self, child: u32, len: u8, label: u32) -> Few {
        let Node { prefix, few, .. } = &self.nodes[child as usize];
        match prefix.len() - len {
            0 => *few,
            1 => self.meet(len, label, few, &Few::one(label)),
            // The second of them has one half with `label` alone, and the other with it, too.
            _ => Few::one(label),
        }
    }

    /// Writes down what the node `at` needs where addresses have `given` already.
    fn write(&mut self, at: u32, given: u32) {
        let Node { prefix, label, few, children } = &self.nodes[at as usize];
        let (prefix, label, few, children) = (*prefix, *label, *few, *children);
        let given = self.put(prefix, &few, label, given);
        if children == [NONE; 2] {
            return;
        }
        for (side, child) in children.into_iter().enumerate() {
            let half = prefix.half(side == 1);
            if child == NONE {
                self.put(half, &Few::one(label), label, given);
                continue;
            }
            let below = self.nodes[child as usize].prefix;
            let lifted = self.lifted(child, half.len(), label);
            let mut given = given;
            if below.len() > half.len() {
                given = self.put(half, &lifted, label, given);
            }
            if below.len() == half.len() + 1 {
                self.put(below.sibling(), &Few::one(label), label, given);
            }
            self.write(child, given);
        }
    }

    /// Writes a prefix unless `given` will do; returns what its addresses have.
    fn put(&mut self, prefix: Prefix, few: &Few, label: u32, given: u32) -> u32 {
        if few.has(given) {
            return given;
        }
        let value = if few.has(label) { label } else { few.values[0] };
        self.written.push((prefix, value));
        value
    }
}
