//! What must hold whenever an agent is up, whatever happened to it before.

use std::collections::BTreeMap;

use canary_agent::{
    api::model::{Events, Status},
    store::{SqliteStore, StateStore},
};
use canary_ebpf_common::{
    abi::BACKEND_USABLE,
    compile,
    entry::{BackendIndex, Entry},
};
use canary_tests::{agent::Agent, tables::Tables, topology::Family};

use crate::support::{SHOP, version};

/// The pinned tables of an agent.
#[track_caller]
pub(crate) fn tables(agent: &Agent<'_>) -> Tables {
    Tables::open(&agent.folder().join("bpffs/canary"))
}

/// Asserts that store, maps, status and audit trail say the same, and that every entry is one
/// that packets may meet.
#[track_caller]
pub(crate) fn assert_sound(agent: &Agent<'_>, status: &Status, when: &str) {
    let tables = tables(agent);
    let mut store = SqliteStore::new(&agent.folder().join("state"));
    let snapshot = store.load().expect("the state");
    assert!(store.take_set_aside().is_empty(), "{when}");
    assert_eq!(snapshot.revision, status.agent.revision, "{when}");
    let record = snapshot.services.iter().find(|record| record.name == SHOP).expect("stored");
    let stored = compile::decode_owners(&record.owners).expect("owners");
    let v2 = version(status, SHOP, "v2");
    assert_eq!(record.split["v2"].to_string(), v2.asked_text, "{when}");

    for family in Family::ALL {
        let place = tables.place(SHOP, family);
        let known = &place.versions[..record.slots.len()];
        assert_eq!(known, record.slots, "{when}, {family:?}");
        let owners: Vec<u8> = tables.ledger(&place).iter().map(|entry| entry.owner()).collect();
        assert!(owners == stored, "{when}, {family:?}: the ledger has other owners");
        let owned = owners.iter().filter(|slot| place.versions[usize::from(**slot)] == "v2");
        assert_eq!(owned.count() as u32, v2.buckets, "{when}, {family:?}");
        let mut backends: BTreeMap<u16, (u8, bool)> = BTreeMap::new();
        let mut backend = |index: BackendIndex| {
            *backends.entry(index.get()).or_insert_with(|| {
                let record = tables.backend(index);
                (record.version, record.flags & BACKEND_USABLE != 0)
            })
        };
        let ledger = tables.ledger(&place);
        for (bucket, bits) in tables.entries(&place).into_iter().enumerate() {
            let entry = Entry(bits);
            let (owner, usable) = backend(entry.current());
            assert!(owner == owners[bucket] && usable, "{when}, {family:?}: {bucket}: {entry:?}");
            if entry.tracked() {
                assert!(!entry.previous().is_none(), "{when}, {family:?}: {bucket}: {entry:?}");
                assert_ne!(ledger[bucket].moved_ms(), 0, "{when}, {family:?}: {bucket}");
            }
        }
    }

    let events: Events = agent.json(&["events", "--limit", "1000"]);
    let changes: Vec<_> = events.events.iter().filter(|event| event.revision.is_some()).collect();
    let numbers: Vec<u64> = changes.iter().filter_map(|event| event.revision).collect();
    let first = numbers.first().copied().unwrap_or(1);
    assert_eq!(numbers, (first..=status.agent.revision).collect::<Vec<_>>(), "{when}");
    let last = changes
        .iter()
        .rfind(|event| event.service.as_deref() == Some(SHOP) && event.after.contains_key("v2"));
    assert_eq!(last.map(|event| &event.after["v2"]), Some(&v2.asked_text), "{when}");
}
