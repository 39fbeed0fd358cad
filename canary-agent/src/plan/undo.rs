//! Taking changes of a split back: exactly the buckets that they moved.

use std::{collections::BTreeMap, sync::Arc};

use canary_ebpf_common::{
    compile::{self, Change, DecodeError, OwnersError},
    share::Share,
};

use super::{Ownership, Proposal, ServiceState, adopt::slot, ownership::ProposeError};
use crate::store::Split;

/// A stored change that is to be taken back.
#[derive(Clone, Copy, Debug)]
pub struct Undone<'a> {
    /// Its revision.
    pub revision: u64,
    /// Names of versions by slot, as `moved` means them; empty where they are as now.
    pub slots: &'a [String],
    /// The buckets that it moved, encoded.
    pub moved: &'a [u8],
    /// The split before it.
    pub before: &'a Split,
    /// What keyed the order of buckets before it, where that is known.
    pub salt: Option<u64>,
}

/// Why a change can't be taken back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UndoError {
    /// It is so old that its list of buckets is not kept any more.
    #[error("which buckets revision {revision} moved is not kept any more")]
    Forgotten {
        /// Its revision.
        revision: u64,
    },
    /// A version that its buckets belonged to does not exist any more.
    #[error("revision {revision} took from version `{version}`, which is not configured any more")]
    NoVersion {
        /// Its revision.
        revision: u64,
        /// The version.
        version: String,
    },
    /// The list is of no use.
    #[error("the list of buckets of revision {revision} can't be read: {reason}")]
    Unreadable {
        /// Its revision.
        revision: u64,
        /// Why.
        reason: DecodeError,
    },
    /// Buckets have moved since for another reason.
    #[error("its buckets have moved since revision {revision} for another reason: {reason}")]
    Moved {
        /// Its revision.
        revision: u64,
        /// The first difference.
        reason: OwnersError,
    },
    /// The shares would not fit together.
    #[error("{0}")]
    Split(#[from] ProposeError),
}

impl ServiceState {
    /// What taking `changes` back leads to: the newest stands first.
    ///
    /// # Errors
    /// [`UndoError`] when the owners are not those that the changes have led to.
    pub fn propose_undo(&self, changes: &[Undone<'_>]) -> Result<Proposal, UndoError> {
        let present = &self.ownership;
        let mut owners = present.owners.to_vec();
        let (mut split, mut salt) = (present.split.clone(), present.salt);
        for change in changes {
            let Undone { revision, slots, moved, before, salt: salt_before } = *change;
            let moves = self.moves(revision, slots, moved)?;
            compile::revert(&mut owners, &moves)
                .map_err(|reason| UndoError::Moved { revision, reason })?;
            split.clone_from(before);
            salt = salt_before.unwrap_or(salt);
        }
        // A share of nothing does not need its version.
        split.retain(|name, share| *share != Share::ZERO || self.slot(name).is_some());
        if let (Some(gone), Some(oldest)) =
            (split.keys().find(|name| self.slot(name).is_none()), changes.last())
        {
            let (revision, version) = (oldest.revision, gone.clone());
            return Err(UndoError::NoVersion { revision, version });
        }
        let changes = compile::difference(&present.owners.plain(), &owners);
        Ok(Proposal {
            moved: changes.len() as u32,
            change_list: compile::encode_changes(&changes),
            ownership: Ownership { split, salt, owners: Arc::new(owners.into()) },
        })
    }

    /// What comes closest to the split `before`, where its buckets can't be had back.
    ///
    /// # Errors
    /// When the shares are more than the whole.
    pub fn propose_back(&self, before: &Split) -> Result<Proposal, ProposeError> {
        let known = |name: &String| self.slot(name).is_some_and(|slot| slot != self.control);
        let split = before.iter().filter(|(name, _)| known(name));
        self.propose(split.map(|(name, share)| (name.clone(), *share)).collect())
    }

    /// A change's list in the slots of today.
    fn moves(
        &self,
        revision: u64,
        slots: &[String],
        moved: &[u8],
    ) -> Result<Vec<Change>, UndoError> {
        if moved.is_empty() {
            return Err(UndoError::Forgotten { revision });
        }
        let mut moves = compile::decode_changes(moved)
            .map_err(|reason| UndoError::Unreadable { revision, reason })?;
        if slots.is_empty() || slots == self.slots {
            return Ok(moves);
        }
        let mut today: BTreeMap<u8, u8> = BTreeMap::new();
        for change in &mut moves {
            for of in [&mut change.from, &mut change.to] {
                let at = match today.get(of) {
                    Some(at) => *at,
                    None => {
                        let name = slots.get(usize::from(*of)).cloned().unwrap_or_default();
                        let at = slot(&self.slots, &name)
                            .ok_or(UndoError::NoVersion { revision, version: name })?;
                        *today.entry(*of).or_insert(at)
                    }
                };
                *of = at;
            }
        }
        Ok(moves)
    }
}
