//! The tables of virtual addresses, in map memory.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use canary_ebpf_common::{
    abi::{self, Address, VipKey},
    vips::Placement,
};

use super::{Error, mapping::Mapping};
use crate::{
    config::model::Protocol,
    plan::{ServicePlan, protocol_number},
};

/// Words of a service's record.
const SERVICE_WORDS: usize = size_of::<abi::Service>() / 8;

/// One family's table.
#[derive(Debug)]
pub(super) struct VipTable {
    mapping: Mapping,
    slot_words: usize,
    placement: Placement,
}

/// What a slot holds.
pub(super) type Vips = HashMap<(Address, VipKey), abi::Service>;

impl VipTable {
    /// The table of IPv4 in `mapping`, with whatever stands there.
    pub(super) fn v4(mapping: Mapping) -> Self {
        Self::found(mapping, size_of::<abi::VipSlotV4>() / 8)
    }

    /// The table of IPv6 in `mapping`, with whatever stands there.
    pub(super) fn v6(mapping: Mapping) -> Self {
        Self::found(mapping, size_of::<abi::VipSlotV6>() / 8)
    }

    fn found(mapping: Mapping, slot_words: usize) -> Self {
        let mut table = Self { mapping, slot_words, placement: Placement::new(0) };
        table.reread();
        table
    }

    /// Looks again at what stands in the table, which somebody else has filled.
    pub(super) fn reread(&mut self) {
        let slots = self.mapping.words64().len() / self.slot_words;
        self.placement = Placement::new((slots as u32).saturating_sub(1));
        for (slot, words) in self.mapping.words64().chunks_exact(self.slot_words).enumerate() {
            let key = VipKey(words[0].load(Ordering::Relaxed));
            if key != VipKey::default() {
                self.placement.found(slot as u32, (slot_address(words), key));
            }
        }
    }

    /// Makes the table hold `wanted` and nothing else: first what is new or
    /// changed, then away with the rest, unless room has to be made first.
    pub(super) fn store(&mut self, wanted: &Vips) -> Result<(), Error> {
        for (key, service) in wanted {
            if let Some(slot) = self.placement.slot(*key) {
                self.write_service(slot, service);
                continue;
            }
            let mut moves = self.placement.insert(*key);
            if moves.is_err() {
                self.remove_all_but(wanted);
                moves = self.placement.insert(*key);
            }
            for step in moves.map_err(|_| Error::VipsFull)? {
                // Somebody who makes room takes along what the old slot says.
                let record = wanted.get(&step.key).copied().or_else(|| self.read(step.key));
                self.write(step.slot, step.key, &record.unwrap_or_default());
            }
        }
        self.remove_all_but(wanted);
        Ok(())
    }

    fn remove_all_but(&mut self, wanted: &Vips) {
        let gone: Vec<_> = self.placement.keys().filter(|k| !wanted.contains_key(k)).collect();
        for key in gone {
            if let Some(slot) = self.placement.remove(key) {
                self.slot(slot)[0].store(0, Ordering::Release);
            }
        }
    }

    fn slot(&self, slot: u32) -> &[AtomicU64] {
        let start = slot as usize * self.slot_words;
        &self.mapping.words64()[start..start + self.slot_words]
    }

    /// Every record that stands under an address and port, by its id.
    pub(super) fn records(&self) -> HashMap<u32, abi::Service> {
        let slots = self.mapping.words64().chunks_exact(self.slot_words);
        let key = |words: &&[AtomicU64]| VipKey(words[0].load(Ordering::Relaxed));
        let used = slots.filter(|words| !matches!(key(words), VipKey(0)) && !key(words).any_port());
        used.map(service_in).map(|record| (record.id, record)).collect()
    }

    /// The record that stands under a key anywhere in the table.
    fn read(&self, key: (Address, VipKey)) -> Option<abi::Service> {
        let words = self
            .mapping
            .words64()
            .chunks_exact(self.slot_words)
            .find(|w| w[0].load(Ordering::Relaxed) == key.1.0 && slot_address(w) == key.0)?;
        Some(service_in(words))
    }

    /// Gives a slot to a key: nobody's while it is written, so that no packet
    /// meets one key with another's record.
    fn write(&self, slot: u32, key: (Address, VipKey), service: &abi::Service) {
        let words = self.slot(slot);
        words[0].store(0, Ordering::Release);
        for (word, value) in words[1 + SERVICE_WORDS..].iter().zip(key.0) {
            word.store(value, Ordering::Release);
        }
        self.write_service(slot, service);
        words[0].store(key.1.0, Ordering::Release);
    }

    fn write_service(&self, slot: u32, service: &abi::Service) {
        // SAFETY: same size, and padding is spelled out: no byte is uninitialised.
        let record = unsafe { std::mem::transmute::<abi::Service, [u64; SERVICE_WORDS]>(*service) };
        for (word, value) in self.slot(slot)[1..].iter().zip(record) {
            if word.load(Ordering::Relaxed) != value {
                word.store(value, Ordering::Release);
            }
        }
    }
}

/// The record in a slot.
fn service_in(words: &[AtomicU64]) -> abi::Service {
    let record: [u64; SERVICE_WORDS] =
        std::array::from_fn(|i| words[1 + i].load(Ordering::Relaxed));
    // SAFETY: same size, and every bit pattern is a `Service`: integers only.
    unsafe { std::mem::transmute::<[u64; SERVICE_WORDS], abi::Service>(record) }
}

/// What a slot that was read as bytes holds; nothing if it is nobody's.
pub(super) fn in_slot(bytes: &[u8]) -> Option<((Address, VipKey), abi::Service)> {
    let (words, _) = bytes.as_chunks::<8>();
    let words: Vec<AtomicU64> =
        words.iter().map(|word| AtomicU64::new(u64::from_ne_bytes(*word))).collect();
    let key = VipKey(words.first()?.load(Ordering::Relaxed));
    let whole = words.len() > SERVICE_WORDS && key != VipKey::default();
    whole.then(|| ((slot_address(&words), key), service_in(&words)))
}

/// The address in a slot: zero for IPv4, where it is part of the key.
fn slot_address(words: &[AtomicU64]) -> Address {
    match words.get(1 + SERVICE_WORDS..) {
        Some([a, b]) => [a.load(Ordering::Relaxed), b.load(Ordering::Relaxed)],
        _ => [0; 2],
    }
}

/// Notes in what stands under an address without a port that a service has a protocol there.
fn also(any: Entry<'_, (Address, VipKey), abi::Service>, record: abi::Service, served: u32) {
    let any = any.or_insert(record);
    if any.id != record.id {
        any.flags |= abi::SERVICE_SEVERAL;
    }
    any.flags |= served;
}

/// Addresses and ports of `services` by family, IPv4 first, as the tables hold them.
pub(super) fn vips<'a>(services: impl Iterator<Item = &'a ServicePlan>) -> [Vips; 2] {
    let [mut v4, mut v6] = [Vips::new(), Vips::new()];
    for service in services {
        for vip in &service.vips {
            let addr = abi::address(*vip);
            for port in &service.ports {
                let (protocol, port_be) = (protocol_number(port.protocol), port.port.to_be());
                let served = match port.protocol {
                    Protocol::Tcp => abi::SERVICE_TCP,
                    Protocol::Udp => abi::SERVICE_UDP,
                };
                match vip {
                    IpAddr::V4(_) => {
                        let key = VipKey::v4(addr[0] as u32, port_be, protocol);
                        v4.insert(([0; 2], key), service.record);
                        let any = VipKey::any_v4(addr[0] as u32);
                        also(v4.entry(([0; 2], any)), service.record, served);
                    }
                    IpAddr::V6(_) => {
                        v6.insert((addr, VipKey::v6(port_be, protocol)), service.record);
                        also(v6.entry((addr, VipKey::any_v6())), service.record, served);
                    }
                }
            }
        }
    }
    [v4, v6]
}
