//! Finding the few among many without a branch for each.
//!
//! Whether a bucket moves is as good as chance. Asked one by one, the processor would foresee
//! many answers wrongly, which costs more than all the rest: so they are asked in groups of
//! sixty-four, without a branch, and only a yes is looked at.

/// Where `a` and `b` differ in the sense of `differ`: one bit for each pair, the first the
/// lowest of the first word, as far as both reach.
///
/// `differ` has to do without branches: then a group of pairs takes a few vector instructions.
#[inline]
pub fn differing<A: Copy, B: Copy>(
    a: &[A],
    b: &[B],
    differ: impl Fn(A, B) -> bool,
) -> impl Iterator<Item = u64> {
    a.chunks(GROUP).zip(b.chunks(GROUP)).map(move |(a, b)| {
        let mut answers = [0_u8; GROUP];
        for ((answer, a), b) in answers.iter_mut().zip(a).zip(b) {
            *answer = u8::from(differ(*a, *b));
        }
        bits(&answers)
    })
}

/// The numbers of the bits of `words` that are set, ascending.
#[inline]
pub fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = usize> {
    words.zip((0..).step_by(GROUP)).flat_map(|(word, start)| Bits(word).map(move |n| start + n))
}

const GROUP: usize = 64;

/// Sixty-four bytes of 0 or 1 as bits, the first the lowest.
#[inline]
fn bits(answers: &[u8; GROUP]) -> u64 {
    // Byte *i* of eight is bit 8*i*; times 2^(7*k* + 7) for the *k* of 7 − *i* it is bit 56 + *i*,
    // and no two products meet.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let (eights, _) = answers.as_chunks::<8>();
    let gathered = eights.iter().map(|eight| u64::from_le_bytes(*eight).wrapping_mul(GATHER) >> 56);
    gathered.zip(0..).fold(0, |bits, (eight, n)| bits | eight << (8 * n))
}

/// The numbers of the bits that are set.
struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let first = self.0.trailing_zeros() as usize;
        (self.0 != 0).then(|| {
            self.0 &= self.0 - 1;
            first
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_a_filter_finds() {
        for of in [0, 1, 63, 64, 65, 1000] {
            for step in [1, 2, 63, 64, 65] {
                let a: Vec<usize> = (0..of).collect();
                let is = |n: usize| n % step == step - 1;
                let expected: Vec<usize> = (0..of).filter(|n| is(*n)).collect();
                let found: Vec<usize> = ones(differing(&a, &a, |n, _| is(n))).collect();
                assert_eq!(found, expected, "{of} {step}");
            }
        }
        assert_eq!(differing(&[1, 2, 3], &[0, 2], |a, b| a != b).collect::<Vec<_>>(), [1]);
    }
}
