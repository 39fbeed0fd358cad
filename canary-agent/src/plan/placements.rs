//! Where the buckets of a table's versions prefer to be, from one configuration to the next.

use std::sync::Arc;

use canary_ebpf_common::{
    abi::MAX_VERSIONS,
    compile::{self, Backend, BackendsError, Placement},
};

use super::{Family, adopt::slot, serves};
use crate::{
    config::model::{Service, Version},
    store::{PlacementRecord, ServiceRecord},
};

/// The placements of the versions of one table, by slot.
#[derive(Clone, Debug, Default)]
pub(super) struct Placements([Option<Arc<Placement>>; MAX_VERSIONS]);

impl Placements {
    /// Those that follow from what is stored, now that the configuration is that of `service`;
    /// of what is not stored, those of backends without a past.
    ///
    /// `slots` are the names of versions by slot.
    pub(super) fn begin(
        service: &Service,
        family: Family,
        slots: &[String],
        stored: Option<&ServiceRecord>,
    ) -> Self {
        let mut placements = Self::default();
        let owners = stored.and_then(|record| compile::decode_owners(&record.owners).ok());
        for version in &service.versions {
            let Some(at) = slot(slots, &version.name).map(usize::from) else {
                continue;
            };
            let before = stored.and_then(|record| read(record, &version.name, family));
            let owned = || -> Vec<u32> {
                let old = stored.and_then(|record| slot(&record.slots, &version.name));
                let owners = (0..).zip(owners.iter().flatten());
                owners.filter(|(_, owner)| Some(**owner) == old).map(|(b, _)| b).collect()
            };
            match follow(before, owned, &backends(service, version, family), service.buckets) {
                Ok(placement) => placements.0[at] = Some(placement),
                Err(error) => tracing::error!(
                    service = service.name,
                    version = version.name,
                    %error,
                    "no placement can be made of the backends"
                ),
            }
        }
        placements
    }

    /// That of the version in `slot`, unless nothing is known of it.
    pub(super) fn get(&self, slot: u8) -> Option<&Arc<Placement>> {
        self.0.get(usize::from(slot))?.as_ref()
    }

    /// What the store should hold of them.
    pub(super) fn stored(&self, family: Family, slots: &[String]) -> Vec<PlacementRecord> {
        let named = slots.iter().zip(&self.0).filter(|(name, _)| !name.is_empty());
        let records = named.filter_map(|(name, placement)| {
            Some(PlacementRecord {
                version: name.clone(),
                family: number(family),
                placement: compile::encode_placement(placement.as_ref()?),
            })
        });
        records.collect()
    }
}

fn follow(
    before: Option<Placement>,
    owned: impl FnOnce() -> Vec<u32>,
    backends: &[Backend],
    buckets: u32,
) -> Result<Arc<Placement>, BackendsError> {
    Ok(Arc::new(match before {
        None => Placement::new(backends, buckets)?,
        Some(before) if before.is_of(backends, buckets) => before,
        Some(before) => Arc::new(before).follow(&owned(), backends, buckets)?,
    }))
}

/// The stored placement of a version. One that can't be read counts as none: its buckets are
/// placed anew, and tracked.
fn read(record: &ServiceRecord, version: &str, family: Family) -> Option<Placement> {
    let is = |p: &&PlacementRecord| p.version == version && p.family == number(family);
    let stored = record.placements.iter().flatten().find(is)?;
    match compile::decode_placement(&stored.placement) {
        Ok(placement) => Some(placement),
        Err(error) => {
            tracing::error!(service = record.name, version, %error, "the stored placement can't be read");
            None
        }
    }
}

/// The configured backends of a version that a table of `family` can name.
fn backends(service: &Service, version: &Version, family: Family) -> Vec<Backend> {
    let served = version.backends.iter().filter(|b| serves(service, family, b.addr.ip()));
    served
        .map(|b| Backend { identity: compile::identity(&b.addr), weight: b.weight, healthy: true })
        .collect()
}

const fn number(family: Family) -> u8 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}
