//! What an earlier agent left behind, and how a service goes on from it.
//!
//! Two memories may exist: the pinned maps, which say what *is*, and the store,
//! which says what *should be*. A change is stored before it is applied, so
//! where they differ the store is newer: its owners win, and the tables are
//! advanced to them from what the maps hold, like after any other change.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use canary_ebpf_common::{
    abi::{self, LedgerEntry, MAX_VERSIONS},
    compile,
    entry::{BackendIndex, Entry},
    share::Share,
};

use super::{
    AdoptedClasses, BootMs, Family, NextHop, PanicMark, Tags,
    ownership::{Ownership, ProposeError, share_of},
};
use crate::{
    config::model::{Backend, Config, Service, Version},
    store::{Admin, Admins, ServiceRecord, Split},
};

/// What the pinned maps of an earlier agent hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adopted {
    /// Tables, by ascending id.
    pub services: Vec<AdoptedService>,
    /// Backend records that are in use, by ascending index.
    pub backends: Vec<(BackendIndex, abi::Backend)>,
    /// Classes of clients.
    pub classes: AdoptedClasses,
    /// What was sent to control since an agent last looked, by table.
    pub panics: Vec<PanicMark>,
}

/// One table of [`Adopted`].
#[derive(Clone, Debug, PartialEq)]
pub struct AdoptedService {
    /// Index into `SERVICE_INFO`.
    pub id: u16,
    /// The service's name.
    pub name: String,
    /// Which of its addresses and backends the table is for.
    pub family: Family,
    /// Names of its versions by slot; empty for a free slot.
    pub versions: Vec<String>,
    /// Slot of the control version.
    pub control: u8,
    /// First page of its table and ledger.
    pub first_page: u32,
    /// Number of buckets.
    pub buckets: u32,
    /// Its forwarding table.
    pub entries: Vec<Entry>,
    /// Its ledger.
    pub ledger: Vec<LedgerEntry>,
    /// The record at its addresses; `None` where it has none.
    pub record: Option<abi::Service>,
    /// Packets that were sent to its backends.
    pub packets: u64,
}

impl Adopted {
    /// `config` with the tables that it does not ask for any more and that connections go by.
    pub fn remembering(&self, config: &Config) -> Config {
        let tables = self.classes.remembered(|id| self.table_name(id));
        config.remembering(tables.iter().map(|(service, audience)| (&**service, &**audience)))
    }

    /// The name of a table's service.
    pub(super) fn table_name(&self, id: u32) -> Option<String> {
        let of = |table: &&AdoptedService| u32::from(table.id) == id;
        self.services.iter().find(of).map(|table| table.name.clone())
    }

    /// Whether something is adopted, and `config` has backends that it lacks.
    ///
    /// They are given indices that an earlier agent may have freed as the last
    /// thing it did: nobody knows any more since when those rest. So
    /// [`super::Planner::begin`] is then to be called no sooner than
    /// [`super::QUARANTINE_MS`] after that agent's end. Packets are steered
    /// meanwhile as before.
    pub fn lacks_backends(&self, config: &Config) -> bool {
        let tables: HashMap<u16, &AdoptedService> =
            self.services.iter().map(|table| (table.id, table)).collect();
        let known: HashSet<(&str, &str, SocketAddr)> = self
            .backends
            .iter()
            .filter_map(|(_, record)| {
                let table = tables.get(&record.service)?;
                let version = table.versions.get(usize::from(record.version))?;
                Some((table.name.as_str(), version.as_str(), record_addr(record)))
            })
            .collect();
        let lacks = |service: &Service| {
            let has = |version: &Version, b: &Backend| {
                known.contains(&(service.name.as_str(), version.name.as_str(), b.addr))
            };
            service.versions.iter().any(|v| v.backends.iter().any(|b| !has(v, b)))
        };
        !self.services.is_empty() && config.services.iter().any(lacks)
    }
}

/// The key whose change gives all clients of a service that has had traffic other buckets, if
/// there is one.
pub(super) fn rehashed(table: &AdoptedService, wanted: &abi::Service) -> Option<&'static str> {
    let old = table.record.filter(|_| table.packets > 0)?;
    let by_connection = |record: &abi::Service| record.flags & abi::SERVICE_HASH_CONNECTION;
    if by_connection(&old) != by_connection(wanted) {
        return Some("stickiness");
    }
    let same_prefix = match table.family {
        Family::V4 => old.mask_v4_be == wanted.mask_v4_be,
        Family::V6 => old.mask_v6 == wanted.mask_v6,
    };
    match (same_prefix, old.hash_key == wanted.hash_key) {
        (false, _) => Some("stickiness` or `prefix"),
        (true, false) => Some("hash_key"),
        (true, true) => None,
    }
}

/// The address that a record holds.
pub(super) fn record_addr(record: &abi::Backend) -> SocketAddr {
    let ip = abi::ip(record.addr, record.flags & abi::BACKEND_V6 != 0);
    SocketAddr::new(ip, u16::from_be(record.port_be))
}

/// The next hop that a record holds.
pub(super) fn record_hop(record: &abi::Backend) -> Option<NextHop> {
    let [[a, b, c, d], [e, f, g, h], [i, j, k, l]] = record.eth.map(u32::to_ne_bytes);
    (record.flags & abi::BACKEND_USABLE != 0).then(|| NextHop {
        ifindex: record.ifindex,
        destination_mac: [a, b, c, d, e, f],
        source_mac: [g, h, i, j, k, l],
        source: abi::ip(record.source, record.flags & abi::BACKEND_V6 != 0),
        tags: Tags::of(record.vlan),
        mtu: record.mtu,
        silent: None,
    })
}

/// How a service begins under this agent.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Beginning {
    /// Names of versions by slot: those of the configuration, and those that
    /// something in the maps may still refer to.
    pub(super) slots: Vec<String>,
    pub(super) ownership: Ownership,
    /// What has to be stored, if anything: the action, the split before, and
    /// which buckets change owner.
    pub(super) news: Option<(&'static str, Split, Vec<u8>)>,
}

/// Finds out how `service` goes on, from the table in the maps and the record
/// in the store, either of which may be missing.
///
/// # Errors
/// When the configured split is more than the whole.
pub(super) fn begin(
    service: &Service,
    adopted: Option<&AdoptedService>,
    stored: Option<&ServiceRecord>,
) -> Result<Beginning, ProposeError> {
    let control_name = &service.versions[service.control].name;
    let mut slots = match (adopted, stored) {
        (Some(adopted), _) => adopted.versions.clone(),
        (None, Some(stored)) => stored.slots.clone(),
        (None, None) => Vec::new(),
    };
    slots.truncate(MAX_VERSIONS);
    trim_slots(&mut slots);
    let names: Vec<&str> = service.versions.iter().map(|v| v.name.as_str()).collect();
    if adopted.is_none() {
        // Nothing refers to the slots but the owners, which are by name below.
        slots.iter_mut().filter(|name| !names.contains(&name.as_str())).for_each(String::clear);
    }
    // Control first: it must have a slot, whoever waits for one.
    name_slot(&mut slots, control_name);
    names.iter().for_each(|name| name_slot(&mut slots, name));
    let slot_of = |name: &str| slot(&slots, name).filter(|_| names.contains(&name));
    let control = slot(&slots, control_name).unwrap_or(0);

    let stored_owners = stored.and_then(|record| {
        let owners = compile::decode_owners(&record.owners).ok()?;
        let known = |owner: &u8| {
            let name = record.slots.get(usize::from(*owner))?;
            slot_of(name)
        };
        Some(owners.iter().map(|owner| known(owner).unwrap_or(control)).collect::<Vec<u8>>())
    });
    let adopted_owners = adopted.map(|table| {
        let owner = |entry: &LedgerEntry| {
            let name = table.versions.get(usize::from(entry.owner()))?;
            slot_of(name)
        };
        table.ledger.iter().map(|entry| owner(entry).unwrap_or(control)).collect::<Vec<u8>>()
    });
    let from_store = stored_owners.is_some();
    let known = stored_owners.or(adopted_owners).filter(|owners| !owners.is_empty());
    let fresh = Ownership::all_to_control(service.buckets, control, service.hash_key);
    let Some(known) = known else {
        let proposal = fresh.propose(&slots, control, service.split.clone())?;
        return Ok(Beginning {
            slots,
            ownership: proposal.ownership,
            news: Some(("initial", Split::new(), proposal.change_list)),
        });
    };

    // A larger table repeats the smaller one: a bucket's number only gains high bits.
    let owners: Vec<u8> =
        (0..service.buckets as usize).map(|bucket| known[bucket % known.len()]).collect();
    let mut count = [0_u32; 256];
    owners.iter().for_each(|owner| count[usize::from(*owner)] += 1);
    let count_of = |name: &str| slot_of(name).map_or(0, |slot| count[usize::from(slot)]);
    let before = stored.map(|record| record.split.clone()).unwrap_or_default();
    let old_control = match (stored, adopted) {
        (Some(record), _) => record.control.clone(),
        (None, Some(table)) => {
            table.versions.get(usize::from(table.control)).cloned().unwrap_or_default()
        }
        (None, None) => control_name.clone(),
    };
    let mut split = before.clone();
    if !from_store {
        let shares = |share: fn(u32, u32) -> Share| -> Split {
            let of = |name: &&str| ((*name).to_owned(), share(count_of(name), service.buckets));
            names.iter().filter(|name| count_of(name) > 0).map(of).collect()
        };
        split = shares(share_of);
        // Shares that round to these buckets can be too much together.
        if !Share::fit_together(split.values().copied()) {
            split = shares(Share::of_buckets);
        }
    } else if old_control != *control_name && count_of(&old_control) > 0 {
        // Nobody asked for a share of what was control until now: it keeps what it had.
        split.insert(old_control.clone(), Share::rest(before.values().copied()));
    }
    split.retain(|name, _| name != control_name && names.contains(&name.as_str()));

    let start = Ownership {
        split: split.clone(),
        salt: stored.map_or(fresh.salt, |record| record.salt),
        owners: Arc::new(owners.into()),
    };
    // Only a table of another size has to be brought to its shares: as long as the size is
    // the same, nothing but a change of the split may move owners.
    let ownership = match known.len() == service.buckets as usize {
        true => start,
        false => start.propose(&slots, control, split)?.ownership,
    };
    let unchanged = stored.is_some_and(|record| {
        record.split == ownership.split
            && record.control == *control_name
            && record.slots == slots
            && *ownership.owners == known[..]
            && compile::decode_owners(&record.owners)
                .is_ok_and(|owners| *ownership.owners == owners[..])
    });
    let news = (!unchanged).then(|| {
        let action = if from_store { "config" } else { "adopt" };
        (
            action,
            before,
            compile::encode_changes(&compile::difference(&known, &ownership.owners.plain())),
        )
    });
    Ok(Beginning { slots, ownership, news })
}

/// What operators have told the backends of `service` to be: as it is stored, else as the
/// `records` in the maps say. What is not configured any more is forgotten.
pub(super) fn admins<'a>(
    service: &Service,
    stored: Option<&ServiceRecord>,
    records: impl Iterator<Item = &'a abi::Backend>,
) -> Admins {
    let mut admins = match stored {
        Some(record) => record.admins.clone(),
        None => records
            .filter_map(|record| {
                let flag = |bit: u32| record.flags & bit != 0;
                let admin = match (flag(abi::BACKEND_MAINT), flag(abi::BACKEND_DRAIN)) {
                    (true, _) => Admin::Maint,
                    (false, true) => Admin::Drain,
                    (false, false) => return None,
                };
                Some((record_addr(record), admin))
            })
            .collect(),
    };
    let configured: HashSet<SocketAddr> =
        service.versions.iter().flat_map(|v| &v.backends).map(|b| b.addr).collect();
    admins.retain(|addr, admin| *admin != Admin::Ready && configured.contains(addr));
    admins
}

/// The slot of the version `name`.
pub(super) fn slot(slots: &[String], name: &str) -> Option<u8> {
    let at = slots.iter().position(|slot| slot == name && !name.is_empty())?;
    u8::try_from(at).ok()
}

/// Leaves out the free slots at the end: the names in the same slots make the same list, however
/// they came there.
pub(super) fn trim_slots(slots: &mut Vec<String>) {
    slots.truncate(slots.iter().rposition(|name| !name.is_empty()).map_or(0, |last| last + 1));
}

/// Gives `name` a slot, if it has none and one is free.
pub(super) fn name_slot(slots: &mut Vec<String>, name: &str) {
    if slot(slots, name).is_some() {
        return;
    }
    match slots.iter().position(String::is_empty) {
        Some(free) => slots[free] = name.to_owned(),
        None if slots.len() < MAX_VERSIONS => slots.push(name.to_owned()),
        None => {}
    }
}

/// A table's entries and ledger as they go on under this agent: buckets that
/// name no record are empty, owners are called by `slots`, and times are not in
/// the future.
pub(super) fn sanitised(
    table: &AdoptedService,
    buckets: u32,
    slots: &[String],
    control: u8,
    has_record: impl Fn(BackendIndex) -> bool,
    now_ms: BootMs,
) -> (Vec<Entry>, Vec<LedgerEntry>) {
    let translate: Vec<u8> =
        table.versions.iter().map(|name| slot(slots, name).unwrap_or(control)).collect();
    let length = table.entries.len().min(table.ledger.len());
    let at = |bucket: u32| (bucket as usize).checked_rem(length);
    let entry = |bucket| {
        let old = at(bucket).map_or(Entry::default(), |at| table.entries[at]);
        let named = |index: BackendIndex| !index.is_none() && has_record(index);
        match (named(old.current()), old.tracked() && named(old.previous())) {
            (true, true) => old,
            (true, false) => Entry::steady(old.current()),
            (false, true) => Entry::tracking(BackendIndex::NONE, old.previous(), old.learning()),
            (false, false) => Entry::default(),
        }
    };
    let entries: Vec<Entry> = (0..buckets).map(entry).collect();
    let record = |bucket: u32| {
        let old = at(bucket).map_or(LedgerEntry::default(), |at| table.ledger[at]);
        let owner = translate.get(usize::from(old.owner())).copied().unwrap_or(control);
        let moved_ms = match old.moved_ms() {
            // Killed between the two writes of a move, or never moved at all.
            0 if entries[bucket as usize].tracked() => now_ms,
            moved_ms => moved_ms.min(now_ms),
        };
        LedgerEntry::new(owner, moved_ms)
    };
    let ledger = (0..buckets).map(record).collect();
    (entries, ledger)
}
