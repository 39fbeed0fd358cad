//! Incremental Internet checksums (RFC 1071, RFC 1624).
//!
//! Sums run over 32-bit words as they lie in memory; since 2³² − 1 is a
//! multiple of 2¹⁶ − 1, folding gives the sum of their 16-bit halves, in either
//! byte order.

/// A one's-complement sum in the making.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta(u64);

impl Delta {
    /// Nothing changed.
    pub const ZERO: Self = Self(0);

    /// With a word that was `old` and is `new`.
    #[inline(always)]
    pub const fn replace(self, old: u32, new: u32) -> Self {
        Self(self.0 + !old as u64 + new as u64)
    }

    /// With an address that was `old` and is `new`.
    #[inline(always)]
    pub const fn replace_address(self, old: [u64; 2], new: [u64; 2]) -> Self {
        self.replace(old[0] as u32, new[0] as u32)
            .replace((old[0] >> 32) as u32, (new[0] >> 32) as u32)
            .replace(old[1] as u32, new[1] as u32)
            .replace((old[1] >> 32) as u32, (new[1] >> 32) as u32)
    }

    /// With a 16-bit word that was `old` and is `new`.
    #[inline(always)]
    pub const fn replace_half(self, old: u16, new: u16) -> Self {
        Self(self.0 + !old as u64 + new as u64)
    }

    /// With the changes of another part.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// `checksum`, a header's stored field, after the changes (RFC 1624, equation 3).
    #[inline(always)]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold(self.0 + !checksum as u64)
    }
}

/// The checksum over words that add up to `sum`.
#[inline(always)]
pub const fn of(sum: u64) -> u16 {
    !fold(sum)
}

/// What an address adds to a sum.
#[inline(always)]
pub const fn address(words: [u64; 2]) -> u64 {
    (words[0] & 0xffff_ffff) + (words[0] >> 32) + (words[1] & 0xffff_ffff) + (words[1] >> 32)
}

/// The 16-bit one's-complement sum that `sum` stands for.
#[inline(always)]
pub(crate) const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071's definition, over 16-bit words.
    fn checksum(words: &[u16]) -> u16 {
        let mut sum: u32 = words.iter().map(|w| u32::from(*w)).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    /// 0 and 0xffff are the same number in one's complement.
    fn same(a: u16, b: u16) -> bool {
        a == b || (a.is_multiple_of(0xffff) && b.is_multiple_of(0xffff))
    }

    proptest! {
        #[test]
        fn replacing_words_equals_summing_anew(
            words in proptest::collection::vec(any::<u16>(), 4..40),
            new in any::<u32>(), half in any::<u16>(),
        ) {
            let before = checksum(&words);
            let mut after = words.clone();
            let old = u32::from(words[0]) | u32::from(words[1]) << 16;
            after[0] = new as u16;
            after[1] = (new >> 16) as u16;
            after[3] = half;
            let delta = Delta::ZERO.replace(old, new).replace_half(words[3], half);
            prop_assert!(same(delta.apply(before), checksum(&after)));
        }
    }

    #[test]
    fn an_unchanged_word_changes_nothing_for_every_checksum() {
        for checksum in 0..=u16::MAX {
            assert!(same(Delta::ZERO.replace(0xdead_beef, 0xdead_beef).apply(checksum), checksum));
        }
    }
}
