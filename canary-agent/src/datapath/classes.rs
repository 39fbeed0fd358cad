//! Classes of clients, in the maps.

use std::collections::BTreeMap;

use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, lpm_trie::Key},
};
use canary_ebpf_common::{
    abi::{self, ClassState, TableKey},
    class::{self, BLOCKS},
    networks::{Labelled, Prefix, Width, Write, difference},
};

use super::{Error, pod, take};
use crate::plan::{AdoptedClasses, ClassPlan};

/// Where classes are.
pub(super) struct ClassMaps {
    v4: LpmTrie<MapData, u32, pod::ClassState>,
    v6: LpmTrie<MapData, [u32; 4], pod::ClassState>,
    blocks: Array<MapData, u64>,
    tables: HashMap<MapData, pod::TableKey, pod::Service>,
    changes: Array<MapData, u64>,
}

impl ClassMaps {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            v4: take(ebpf, "CLASSES_V4")?.try_into()?,
            v6: take(ebpf, "CLASSES_V6")?.try_into()?,
            blocks: take(ebpf, "CLASS_BLOCKS")?.try_into()?,
            tables: take(ebpf, "CLASS_TABLES")?.try_into()?,
            changes: take(ebpf, "CLASS_CHANGES")?.try_into()?,
        })
    }

    /// What the maps hold.
    pub(super) fn read(&self) -> Result<AdoptedClasses, Error> {
        let mut adopted = AdoptedClasses::default();
        for item in self.v4.iter() {
            let (key, pod::ClassState(state)) = item?;
            let (bits, addr_be) = (key.prefix_len(), key.data());
            adopted.networks[0].push((prefix_v4(bits, addr_be), state));
        }
        for item in self.v6.iter() {
            let (key, pod::ClassState(state)) = item?;
            adopted.networks[1].push((prefix_v6(key.prefix_len(), key.data()), state));
        }
        for item in self.tables.iter() {
            let (pod::TableKey(key), pod::Service(record)) = item?;
            adopted.tables.push((key, record));
        }
        adopted.networks.iter_mut().for_each(|networks| networks.sort_unstable());
        adopted.tables.sort_unstable_by_key(|(key, _)| *key);
        Ok(adopted)
    }

    /// Brings the maps from `before`, or whatever they hold, to `desired`. The tables that are
    /// named have to be written by then, and no other may be in use yet that was named `before`.
    ///
    /// Tables first, then networks, so that no client is of a class that has none; and the other
    /// way round what goes.
    pub(super) fn store(
        &mut self,
        before: Option<&ClassPlan>,
        desired: &ClassPlan,
    ) -> Result<usize, Error> {
        if before
            .is_some_and(|before| before.tables == desired.tables && same_networks(before, desired))
        {
            return Ok(0);
        }
        let found = match before {
            Some(_) => None,
            None => {
                let AdoptedClasses { tables, networks: [v4, v6] } = self.read()?;
                Some((tables, [Labelled::found(Width::V4, v4), Labelled::found(Width::V6, v6)]))
            }
        };
        let (tables, old) = match (&found, before) {
            (Some((tables, networks)), _) => (tables, networks.each_ref()),
            (None, Some(before)) => {
                (&before.tables, before.networks.each_ref().map(|networks| &**networks))
            }
            (None, None) => return Ok(0),
        };
        let present: BTreeMap<TableKey, abi::Service> = tables.iter().copied().collect();
        let wanted: BTreeMap<TableKey, abi::Service> = desired.tables.iter().copied().collect();
        let under_way = self.begin()?;
        for (key, record) in &wanted {
            if present.get(key) != Some(record) {
                self.tables.insert(pod::TableKey(*key), pod::Service(*record), 0)?;
            }
        }
        let mut written = 0;
        let old_blocks = blocks(&old);
        let new_blocks = blocks(&desired.networks.each_ref().map(|networks| &**networks));
        // While networks change, a block of either is asked.
        let both: Vec<u64> = old_blocks.iter().zip(&new_blocks).map(|(a, b)| a | b).collect();
        let held = match before {
            Some(_) => old_blocks,
            // What was left half done may be anything.
            None => self.held_blocks()?,
        };
        self.set_blocks(&held, &both)?;
        for (at, old) in old.into_iter().enumerate() {
            // Not even looked through where they are the same.
            if std::ptr::eq(old, &*desired.networks[at]) {
                continue;
            }
            let writes = difference(old, &desired.networks[at]).writes;
            written += writes.len();
            for write in writes {
                match write {
                    Write::Set(prefix, state) => self.set(at == 1, prefix, state)?,
                    Write::Remove(prefix) => self.remove(at == 1, prefix)?,
                }
            }
        }
        self.set_blocks(&both, &new_blocks)?;
        for key in present.keys().filter(|key| !wanted.contains_key(key)) {
            gone(self.tables.remove(&pod::TableKey(*key)))?;
        }
        if all_see_what_is_written() {
            self.changes.set(0, under_way + 1, 0)?;
        }
        Ok(written)
    }

    /// From here on nothing that was looked up before counts, and nothing is kept, until all is
    /// written: if that fails, until it is made up for.
    fn begin(&mut self) -> Result<u64, Error> {
        let changes = self.changes.get(&0, 0)?;
        if !abi::settled(changes) {
            return Ok(changes);
        }
        self.changes.set(0, changes + 1, 0)?;
        Ok(changes + 1)
    }

    fn held_blocks(&self) -> Result<Vec<u64>, Error> {
        let words = (0..abi::CLASS_BLOCKS).map(|at| self.blocks.get(&at, 0));
        Ok(words.collect::<Result<_, _>>()?)
    }

    fn set_blocks(&mut self, held: &[u64], wanted: &[u64]) -> Result<(), Error> {
        for (at, (held, wanted)) in (0..).zip(held.iter().zip(wanted)) {
            if held != wanted {
                self.blocks.set(at, *wanted, 0)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, v6: bool, prefix: Prefix, state: ClassState) -> Result<(), Error> {
        let bits = u32::from(prefix.len());
        match v6 {
            false => self.v4.insert(&Key::new(bits, addr_v4(prefix)), pod::ClassState(state), 0)?,
            true => self.v6.insert(&Key::new(bits, addr_v6(prefix)), pod::ClassState(state), 0)?,
        }
        Ok(())
    }

    fn remove(&mut self, v6: bool, prefix: Prefix) -> Result<(), Error> {
        let bits = u32::from(prefix.len());
        gone(match v6 {
            false => self.v4.remove(&Key::new(bits, addr_v4(prefix))),
            true => self.v6.remove(&Key::new(bits, addr_v6(prefix))),
        })
    }
}

/// Lets no program that finds a change over have looked anything up before it was. x86-64 reads in
/// the order that programs say. Others may not, so those programs that run just now are waited for:
/// the kernel does that by RCU, which they run under. Where that can't be, no class is kept.
fn all_see_what_is_written() -> bool {
    const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
    // SAFETY: no memory is involved.
    cfg!(target_arch = "x86_64")
        || unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } == 0
}

/// What is gone already need not go.
fn gone(removed: Result<(), MapError>) -> Result<(), Error> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => Ok(other?),
    }
}

fn same_networks(a: &ClassPlan, b: &ClassPlan) -> bool {
    a.networks.iter().zip(&b.networks).all(|(a, b)| std::sync::Arc::ptr_eq(a, b))
}

fn addr_v4(prefix: Prefix) -> u32 {
    ((prefix.bits() >> 96) as u32).to_be()
}

fn addr_v6(prefix: Prefix) -> [u32; 4] {
    std::array::from_fn(|at| ((prefix.bits() >> (96 - 32 * at)) as u32).to_be())
}

fn prefix_v4(bits: u32, addr_be: u32) -> Prefix {
    Prefix::new(u128::from(u32::from_be(addr_be)) << 96, bits.min(32) as u8)
}

fn prefix_v6(bits: u32, addr_be: [u32; 4]) -> Prefix {
    let mut addr = 0_u128;
    for word in addr_be {
        addr = addr << 32 | u128::from(u32::from_be(word));
    }
    Prefix::new(addr, bits.min(128) as u8)
}

/// The bitmap of blocks that have anybody in a class, of IPv4 and then of IPv6.
fn blocks(networks: &[&Labelled<ClassState>; 2]) -> Vec<u64> {
    let mut words = vec![0; abi::CLASS_BLOCKS as usize];
    let mut mark = |block: u32| words[block as usize / 64] |= 1 << (block % 64);
    for (prefix, _) in networks[0].prefixes() {
        let first = (prefix.bits() >> 112) as u32;
        let count = 1_u32 << 16_u8.saturating_sub(prefix.len());
        (first..first + count).for_each(&mut mark);
    }
    for (prefix, _) in networks[1].prefixes() {
        let free = 32_u8.saturating_sub(prefix.len());
        // What is shorter has as many /32s as there are bits, or more: hardly one is spared.
        if free >= 16 {
            (0..BLOCKS).for_each(|block| mark(BLOCKS + block));
            continue;
        }
        for at in 0..1_u128 << free {
            let addr = prefix.bits() | at << 96;
            let first = ((addr >> 64) as u64).to_be();
            mark(BLOCKS + class::block_v6([first, 0]));
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn keys_read_back() {
        for text in ["198.51.100.0", "0.0.0.0", "255.255.255.255"] {
            let prefix = Prefix::of(text.parse::<IpAddr>().unwrap(), 24);
            assert_eq!(prefix_v4(24, addr_v4(prefix)), prefix, "{text}");
        }
        for text in ["2001:db8:aa::", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"] {
            let prefix = Prefix::of(text.parse::<IpAddr>().unwrap(), 61);
            assert_eq!(prefix_v6(61, addr_v6(prefix)), prefix, "{text}");
        }
    }
}
