//! Where the plan meets the table compiler of `canary-ebpf-common`: backends by
//! index here, by identity there.

use std::net::SocketAddr;

use canary_ebpf_common::{
    compile::{self, Backend, Compiler, Input, Output, Target, Version},
    entry::BackendIndex,
};

use super::{
    placements::Placements,
    slow_start::{self, Ramp},
};
use crate::config::model::Fallback;

/// A backend that buckets may be given to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) index: BackendIndex,
    pub(super) slot: u8,
    pub(super) addr: SocketAddr,
    /// What it is to get now. What it gets for good is in its version's placement.
    pub(super) weight: u32,
    pub(super) usable: bool,
    /// How much of its share it takes, of [`slow_start::STEPS`].
    pub(super) step: u32,
}

impl Candidate {
    /// Its way to its whole share, if it is usable and on it.
    pub(super) fn ramp(&self) -> Option<Ramp> {
        let Self { index, addr, step, .. } = *self;
        (self.usable && (1..slow_start::STEPS).contains(&step)).then(|| Ramp {
            index,
            identity: compile::identity(&addr),
            step,
        })
    }
}

/// Which backend each bucket steers new connections to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    pub(super) backends: Vec<BackendIndex>,
    /// Bit *n*: the version in slot *n* owns buckets and has no usable backend.
    pub(super) fell_back: u16,
}

/// Gives each bucket a backend of its owner.
///
/// A table that can't be compiled gets no backends at all. Health, weights and
/// shares can't bring that about, only a configuration that validation lets by.
pub(super) fn assign(
    compiler: &mut Compiler,
    owners: &[u8],
    control: u8,
    fallback: Fallback,
    placements: &Placements,
    candidates: &[Candidate],
) -> Assignment {
    let mut backends: [Vec<Backend>; 16] = Default::default();
    let mut indices: [Vec<BackendIndex>; 16] = Default::default();
    for candidate in candidates {
        let slot = usize::from(candidate.slot);
        if let (Some(backends), Some(indices)) = (backends.get_mut(slot), indices.get_mut(slot)) {
            backends.push(Backend {
                identity: compile::identity(&candidate.addr),
                weight: candidate.weight,
                healthy: candidate.usable,
            });
            indices.push(candidate.index);
        }
    }
    let versions: Vec<Version<'_>> = (0_u8..)
        .zip(&backends)
        .map(|(slot, backends)| Version { slot, backends, placement: placements.get(slot) })
        .collect();
    let fallback = match fallback {
        Fallback::Control => compile::Fallback::Control,
        Fallback::None => compile::Fallback::None,
    };
    let input = Input { owners, versions: &versions, control, fallback };
    let index = |t: Target| indices[usize::from(t.slot)][usize::from(t.backend)];
    match compiler.compile_into(&input, BackendIndex::NONE, index) {
        Ok(Output { targets: backends, fell_back, control_checks_ignored: _ }) => {
            Assignment { backends, fell_back }
        }
        Err(error) => {
            tracing::error!(%error, "a table can't be compiled");
            Assignment { backends: vec![BackendIndex::NONE; owners.len()], fell_back: u16::MAX }
        }
    }
}
