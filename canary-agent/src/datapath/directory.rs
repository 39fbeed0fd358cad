//! Tables as they lie in the maps, by the directory that says which there are.

use std::{ops::Range, sync::atomic::Ordering};

use aya::maps::{Array, MapData};
use canary_ebpf_common::{
    abi::{self, LedgerEntry, PAGE_BUCKETS},
    entry::Entry,
};

use super::{Error, mapping::Pages, pod};
use crate::plan::{AdoptedService, Family};

/// The tables that there are, by their index.
pub(super) fn directory(
    info: &Array<MapData, pod::ServiceInfo>,
) -> Result<Vec<(u16, abi::ServiceInfo)>, Error> {
    let mut found = Vec::new();
    for id in 0..info.len() {
        let pod::ServiceInfo(info) = info.get(&id, 0)?;
        if info.name[0] != 0 {
            found.push((id as u16, info));
        }
    }
    Ok(found)
}

/// The pages of a table, which are there.
pub(super) fn pages_of(info: &abi::ServiceInfo, table: &Pages) -> Result<Range<u32>, Error> {
    let end = info.first_page.saturating_add(info.buckets.div_ceil(PAGE_BUCKETS));
    match end <= table.count() {
        true => Ok(info.first_page..end),
        false => Err(Error::OutOfRange { what: "table page", index: info.first_page }),
    }
}

/// A table as it lies in the maps. Its packets are not counted.
pub(super) fn table_of(
    id: u16,
    info: &abi::ServiceInfo,
    table: &Pages,
    ledger: &Pages,
    record: Option<abi::Service>,
) -> Result<AdoptedService, Error> {
    let pages = pages_of(info, table)?;
    let (table, ledger) = (table.map(pages.clone())?, ledger.map(pages)?);
    let buckets = info.buckets as usize;
    let (entries, ledger) = (&table.words32()[..buckets], &ledger.words64()[..buckets]);
    Ok(AdoptedService {
        id,
        name: unpadded(&info.name),
        family: if info.family == 6 { Family::V6 } else { Family::V4 },
        versions: info.versions.iter().map(|v| unpadded(v)).collect(),
        control: info.control as u8,
        first_page: info.first_page,
        buckets: info.buckets,
        entries: entries.iter().map(|w| Entry(w.load(Ordering::Relaxed))).collect(),
        ledger: ledger.iter().map(|w| LedgerEntry(w.load(Ordering::Relaxed))).collect(),
        record,
        packets: 0,
    })
}

/// A name without the zeros behind it.
pub(super) fn unpadded(name: &[u8]) -> String {
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}
