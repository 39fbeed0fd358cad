//! Which version owns each bucket, and what a change of the split makes of it.

use std::sync::Arc;

use canary_ebpf_common::{
    Packed,
    abi::MAX_VERSIONS,
    compile::{self, OwnersError, SplitError, Wanted},
    share::Share,
};

use crate::store::Split;

/// A service's asked split together with what has become of it: owners are
/// state, and can't be computed from the split alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// Shares as they were asked for; control and versions never asked for are left out.
    pub split: Split,
    /// Keys the order in which buckets are given to versions. It stays for as
    /// long as any version but control has a share, so that going back to an
    /// earlier split gives the earlier buckets.
    pub salt: u64,
    /// The version slot that owns each bucket.
    pub owners: Arc<Packed<u8>>,
}

/// An [`Ownership`] that could be the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// What it would be.
    pub ownership: Ownership,
    /// How many buckets get another owner.
    pub moved: u32,
    /// Which, from whom and to whom, encoded.
    pub change_list: Vec<u8>,
}

/// Why nothing can be made of a split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The shares.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// The owners that it should change.
    #[error(transparent)]
    Owners(#[from] OwnersError),
}

impl Ownership {
    /// Everything to control, as a service begins.
    pub(super) fn all_to_control(buckets: u32, control: u8, hash_key: [u64; 2]) -> Self {
        Self {
            split: Split::new(),
            // From the configuration alone: all hosts that begin with the same one give the
            // same clients to the canary.
            salt: mix(hash_key[0] ^ hash_key[1].rotate_left(32)),
            owners: Arc::new(vec![control; buckets as usize].into()),
        }
    }

    /// What setting `split` leads to, with the least number of buckets moved.
    ///
    /// Versions of `split` that `slots` does not name get nothing.
    ///
    /// # Errors
    /// When the shares are more than the whole.
    pub fn propose(
        &self,
        slots: &[String],
        control: u8,
        split: Split,
    ) -> Result<Proposal, ProposeError> {
        let idle = |split: &Split| split.values().all(|share| *share == Share::ZERO);
        let salt = if idle(&self.split) && !idle(&split) {
            // A new rollout: other clients are first this time. From the last salt, not from
            // chance: hosts that have gone through the same rollouts still agree.
            mix(self.salt)
        } else {
            self.salt
        };
        let share = |split: &Split, name: &String| split.get(name).copied().unwrap_or(Share::ZERO);
        let wanted: Vec<Wanted> = (0_u8..)
            .zip(slots)
            .filter(|(slot, name)| *slot != control && !name.is_empty())
            .map(|(slot, name)| Wanted {
                slot,
                share: share(&split, name),
                changed: share(&split, name) != share(&self.split, name),
            })
            .collect();
        let present = self.owners.plain();
        let targets = compile::targets(&counts(&present), control, &wanted)?;
        let changes = compile::plan(&present, &targets, salt)?;
        let owners = match changes.is_empty() {
            true => Arc::clone(&self.owners),
            false => {
                let mut owners = present.into_owned();
                compile::apply(&mut owners, &changes)?;
                Arc::new(owners.into())
            }
        };
        Ok(Proposal {
            moved: changes.len() as u32,
            change_list: compile::encode_changes(&changes),
            ownership: Self { split, salt, owners },
        })
    }

    /// How many buckets each slot owns.
    pub fn counts(&self) -> [u32; MAX_VERSIONS] {
        let Some(tally) = self.owners.tally() else { return counts(&self.owners.plain()) };
        let mut counts = [0; MAX_VERSIONS];
        for (slot, count) in tally {
            if let Some(of_slot) = counts.get_mut(usize::from(*slot)) {
                *of_slot = count as u32;
            }
        }
        counts
    }
}

fn counts(owners: &[u8]) -> [u32; MAX_VERSIONS] {
    compile::counts(owners).unwrap_or_default()
}

/// SplitMix64's step (Steele, Lea, Flood: *Fast splittable pseudorandom number generators*, 2014).
pub(super) fn mix(salt: u64) -> u64 {
    let mut z = salt.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The share that a person would have written for `count` of `total` buckets:
/// the shortest percentage that gives just as many, else the number of buckets.
pub(super) fn share_of(count: u32, total: u32) -> Share {
    let percent = f64::from(count) * 100.0 / f64::from(total);
    let candidates = (0..=3).map(|decimals| format!("{percent:.decimals$}%"));
    candidates
        .filter_map(|text| text.parse::<Share>().ok())
        .find(|share| share.buckets(total) == count)
        .unwrap_or_else(|| Share::of_buckets(count, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_guessed_from_its_buckets() {
        for (text, shown) in [
            ("5%", "5%"),
            ("0.1%", "0.1%"),
            ("12.5%", "12.5%"),
            ("0%", "0%"),
            ("100%", "100%"),
            ("1/65536", "1/65536"),
            ("77/65536", "77/65536"),
        ] {
            let share: Share = text.parse().unwrap();
            let guess = share_of(share.buckets(65_536), 65_536);
            assert_eq!(guess.buckets(65_536), share.buckets(65_536), "{text}");
            assert!(guess.to_string().len() <= shown.len(), "{text}: {guess}");
        }
    }

    #[test]
    fn a_rollout_keeps_its_salt_and_the_next_has_another() {
        let slots = ["stable".to_owned(), "v2".to_owned()];
        let split = |text: &str| Split::from([("v2".to_owned(), text.parse().unwrap())]);
        let at = |from: &Ownership, text| from.propose(&slots, 0, split(text)).unwrap().ownership;
        let none = Ownership::all_to_control(4096, 0, [1, 2]);
        let one = at(&none, "1%");
        assert_ne!(one.salt, none.salt);
        let ten = at(&one, "10%");
        assert_eq!(ten.salt, one.salt);
        assert_eq!(at(&ten, "1%"), one, "going back gives the same buckets");
        let over = at(&ten, "0%");
        assert_eq!((&over.owners, over.salt), (&none.owners, one.salt));
        let again = at(&over, "1%");
        assert_ne!(again.salt, one.salt);
        assert_ne!(again.owners, one.owners);
        assert_eq!(at(&Ownership::all_to_control(4096, 0, [1, 2]), "1%"), one, "on every host");
    }
}
