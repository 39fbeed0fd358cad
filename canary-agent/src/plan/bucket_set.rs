//! A set of buckets, one bit each.

use canary_ebpf_common::ones;

/// A set of buckets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BucketSet {
    words: Vec<u64>,
    len: u32,
}

impl BucketSet {
    /// How many it holds.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it holds `bucket`.
    pub fn contains(&self, bucket: u32) -> bool {
        self.words.get(bucket as usize / 64).is_some_and(|word| word & bit(bucket) != 0)
    }

    /// Puts `bucket` in.
    pub fn insert(&mut self, bucket: u32) {
        let word = bucket as usize / 64;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        if self.words[word] & bit(bucket) == 0 {
            self.words[word] |= bit(bucket);
            self.len += 1;
        }
    }

    /// Takes `bucket` out.
    pub fn remove(&mut self, bucket: u32) {
        if let Some(word) = self.words.get_mut(bucket as usize / 64)
            && *word & bit(bucket) != 0
        {
            *word &= !bit(bucket);
            self.len -= 1;
        }
    }

    /// Takes everything out and gives the memory back.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// What it holds, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        ones(self.words.iter().copied()).map(|bucket| bucket as u32)
    }

    /// The set of the bits that are set, the lowest of the first word bucket 0.
    pub(super) fn of_bits(words: impl Iterator<Item = u64>) -> Self {
        let words: Vec<u64> = words.collect();
        let len = words.iter().map(|word| word.count_ones()).sum();
        Self { words, len }
    }
}

impl FromIterator<u32> for BucketSet {
    fn from_iter<I: IntoIterator<Item = u32>>(buckets: I) -> Self {
        let mut set = Self::default();
        buckets.into_iter().for_each(|bucket| set.insert(bucket));
        set
    }
}

const fn bit(bucket: u32) -> u64 {
    1 << (bucket % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_put_in_and_not_taken_out() {
        let mut set: BucketSet = [5, 64, 65_535, 5].into_iter().collect();
        assert_eq!(set.len(), 3);
        assert!(set.contains(64) && !set.contains(63) && !set.contains(1 << 20));
        set.remove(64);
        set.remove(64);
        set.remove(1 << 20);
        assert_eq!(set.iter().collect::<Vec<_>>(), [5, 65_535]);
        set.clear();
        assert!(set.is_empty());
    }
}
