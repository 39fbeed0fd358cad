//! Forwarding tables as they lie in the pinned maps: what packets meet, whatever
//! the agent says, and whether one runs at all.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use aya::{
    Pod,
    maps::{Array, Map, MapData},
};
use canary_ebpf_common::{
    abi::{self, BACKEND_V6, Backend, LedgerEntry, PAGE_BUCKETS, ServiceInfo},
    entry::BackendIndex,
};

use crate::topology::Family;

const PAGE: usize = PAGE_BUCKETS as usize;

/// One service's table of one family.
#[derive(Clone, Debug)]
pub struct Place {
    /// Names of its versions by slot; empty for a free slot.
    pub versions: Vec<String>,
    first_page: u32,
    buckets: u32,
}

/// The maps of one agent.
pub struct Tables {
    info: Array<MapData, [u8; size_of::<ServiceInfo>()]>,
    table: Array<MapData, [u32; PAGE]>,
    ledger: Array<MapData, [u64; PAGE]>,
    backends: Array<MapData, [u8; size_of::<Backend>()]>,
}

impl Tables {
    /// Opens the maps pinned under `agent.bpffs`.
    ///
    /// # Panics
    /// They are not there, or have other sizes.
    #[track_caller]
    pub fn open(bpffs: &Path) -> Self {
        let maps = bpffs.join("maps");
        Self {
            info: open(maps.join("SERVICE_INFO")),
            table: open(maps.join("TABLE")),
            ledger: open(maps.join("LEDGER")),
            backends: open(maps.join("BACKENDS")),
        }
    }

    /// Where a service's table of a family lies.
    ///
    /// # Panics
    /// There is none.
    #[track_caller]
    pub fn place(&self, service: &str, family: Family) -> Place {
        let number = match family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        for slot in 0..self.info.len() {
            let bytes = self.info.get(&slot, 0).expect("a slot of SERVICE_INFO");
            // SAFETY: same size, and every bit pattern is a `ServiceInfo`: integers only.
            let info: ServiceInfo = unsafe { std::mem::transmute(bytes) };
            if info.family == number && text(&info.name) == service {
                return Place {
                    versions: info.versions.iter().map(|name| text(name)).collect(),
                    first_page: info.first_page,
                    buckets: info.buckets,
                };
            }
        }
        panic!("no {family:?} table of {service}");
    }

    /// The bits of the `Entry` values of a table, by bucket.
    ///
    /// # Panics
    /// The kernel refuses to read them.
    #[track_caller]
    pub fn entries(&self, place: &Place) -> Vec<u32> {
        pages(&self.table, place)
    }

    /// Owner and last move of each bucket.
    ///
    /// # Panics
    /// The kernel refuses to read them.
    #[track_caller]
    pub fn ledger(&self, place: &Place) -> Vec<LedgerEntry> {
        pages(&self.ledger, place).into_iter().map(LedgerEntry).collect()
    }

    /// The record of a backend.
    ///
    /// # Panics
    /// The kernel refuses to read it.
    #[track_caller]
    pub fn backend(&self, index: BackendIndex) -> Backend {
        let bytes = self.backends.get(&index.get().into(), 0).expect("a slot of BACKENDS");
        // SAFETY: same size, and every bit pattern is a `Backend`: integers only.
        unsafe { std::mem::transmute(bytes) }
    }

    /// The address and port of a backend; `None` for the index that names nobody.
    pub fn addr(&self, index: BackendIndex) -> Option<SocketAddr> {
        let backend = self.backend(index);
        let ip = abi::ip(backend.addr, backend.flags & BACKEND_V6 != 0);
        (!index.is_none()).then(|| SocketAddr::new(ip, u16::from_be(backend.port_be)))
    }
}

#[track_caller]
fn open<V: Pod>(path: PathBuf) -> Array<MapData, V> {
    let map = MapData::from_pin(&path).map(Map::Array);
    let map = map.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Array::try_from(map).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[track_caller]
fn pages<T: Copy>(map: &Array<MapData, [T; PAGE]>, place: &Place) -> Vec<T>
where
    [T; PAGE]: Pod,
{
    let pages = place.first_page..place.first_page + place.buckets.div_ceil(PAGE_BUCKETS);
    let mut all = Vec::with_capacity(place.buckets as usize);
    for page in pages {
        all.extend_from_slice(&map.get(&page, 0).expect("a page of a table"));
    }
    all.truncate(place.buckets as usize);
    all
}

fn text(padded: &[u8]) -> String {
    let end = padded.iter().position(|byte| *byte == 0).unwrap_or(padded.len());
    String::from_utf8_lossy(&padded[..end]).into_owned()
}
