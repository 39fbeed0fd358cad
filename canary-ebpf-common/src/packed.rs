//! Long lists of few different values, in little memory.
//!
//! What a bucket says is one of few things: some backends, some versions, some times of a move.
//! A list that nobody is about to change keeps each thing once, and for each place as many bits
//! as tell them apart. Nothing is lost by it.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    hash::Hash,
    ops::{Index, IndexMut},
};

/// A list of values: in plain form to work on, or packed to be kept.
///
/// ```
/// use canary_ebpf_common::Packed;
/// let mut list: Packed<u64> = (0..4096).map(|n| n % 3).collect();
/// list.pack();
/// assert!(list.bytes() < 4096 && list[4] == 1);
/// list.plain_mut()[4] = 7;
/// assert_eq!(list.plain()[3..6], [0, 7, 2]);
/// ```
#[derive(Clone)]
pub struct Packed<T>(Form<T>);

#[derive(Clone)]
enum Form<T> {
    Plain(Vec<T>),
    Packed {
        /// Each value once.
        values: Vec<T>,
        /// Which of them it is, place after place, `1 << log_bits` bits each; no word where
        /// there is but one value.
        words: Vec<u64>,
        log_bits: u32,
        len: usize,
    },
}

/// With more different values than that, nothing is gained.
const MOST_VALUES: usize = 1 << 16;
/// So many values are looked through faster than hashed.
const FEW: usize = 16;

impl<T> Packed<T> {
    /// A list of one value, so many times.
    pub fn of_one(value: T, len: usize) -> Self {
        Self(Form::Packed { values: vec![value], words: Vec::new(), log_bits: 0, len })
    }

    /// How many values it holds.
    pub fn len(&self) -> usize {
        match &self.0 {
            Form::Plain(values) => values.len(),
            Form::Packed { len, .. } => *len,
        }
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is in the form in which it is kept.
    pub fn is_packed(&self) -> bool {
        matches!(self.0, Form::Packed { .. })
    }

    /// How much memory it takes, bytes.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Form::Plain(values) => values.capacity() * size_of::<T>(),
            Form::Packed { values, words, .. } => {
                values.capacity() * size_of::<T>() + words.capacity() * 8
            }
        }
    }

    /// The value at a place.
    #[inline]
    pub fn get(&self, at: usize) -> Option<&T> {
        match &self.0 {
            Form::Plain(values) => values.get(at),
            Form::Packed { values, words, log_bits, len } => {
                (at < *len).then(|| &values[code(words, *log_bits, at)])
            }
        }
    }

    /// How often each value is in it, each once, as far as that is known without a look at every
    /// place: `None` in plain form.
    pub fn tally(&self) -> Option<impl Iterator<Item = (&T, usize)>> {
        let Form::Packed { values, words, log_bits, len } = &self.0 else { return None };
        let (log_bits, len, mut left) = (*log_bits, *len, *len);
        Some(values.iter().enumerate().map(move |(code, value)| {
            // The last one has what the others leave.
            let last = code + 1 == values.len();
            let count = if last { left } else { times(words, log_bits, len, code) };
            left -= count;
            (value, count)
        }))
    }

    /// All values, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &T> + '_ {
        (0..self.len()).filter_map(|at| self.get(at))
    }
}

/// Which value is at a place.
#[inline]
fn code(words: &[u64], log_bits: u32, at: usize) -> usize {
    if words.is_empty() {
        return 0;
    }
    // A word holds a whole number of codes.
    let (bits, in_word) = (1 << log_bits, at & ((64 >> log_bits) - 1));
    (words[at >> (6 - log_bits)] >> (in_word << log_bits)) as usize & ((1 << bits) - 1)
}

/// How often a code is in the first `len` places, a word at a time.
fn times(words: &[u64], log_bits: u32, len: usize, code: usize) -> usize {
    let bits = 1 << log_bits;
    // The lowest bit of each place, and the code in all of them.
    let lowest = u64::MAX / (u64::MAX >> (64 - bits));
    let everywhere = lowest * code as u64;
    let others = |word: u64| {
        // A place has a bit where it differs, which is brought down to its lowest one.
        let mut differs = word ^ everywhere;
        for by in 0..log_bits {
            differs |= differs >> (1 << by);
        }
        (differs & lowest).count_ones() as usize
    };
    let places = words.len() << (6 - log_bits);
    let same = places - words.iter().map(|word| others(*word)).sum::<usize>();
    // Behind the last one the places are of the first code.
    if code == 0 { same - (places - len) } else { same }
}

impl<T: Copy + Eq + Hash> Packed<T> {
    /// Takes the form in which it is kept, unless that is no smaller.
    pub fn pack(&mut self) {
        if let Some(packed) = self.packed() {
            *self = packed;
        }
    }

    /// The same in the form in which it is kept; `None` if it is already, or gains nothing by it.
    pub fn packed(&self) -> Option<Self> {
        match &self.0 {
            Form::Plain(list) => packed(list).map(Self),
            Form::Packed { .. } => None,
        }
    }

    /// The values in plain form; a copy if it is packed.
    pub fn plain(&self) -> Cow<'_, [T]> {
        match &self.0 {
            Form::Plain(values) => Cow::Borrowed(values),
            Form::Packed { values, words, log_bits, len } => {
                Cow::Owned(unpacked(values, words, *log_bits, *len))
            }
        }
    }

    /// The values in plain form, to be changed.
    pub fn plain_mut(&mut self) -> &mut Vec<T> {
        if let Form::Packed { values, words, log_bits, len } = &self.0 {
            self.0 = Form::Plain(unpacked(values, words, *log_bits, *len));
        }
        match &mut self.0 {
            Form::Plain(values) => values,
            Form::Packed { .. } => unreachable!("it was made plain"),
        }
    }

    /// The values.
    pub fn into_vec(self) -> Vec<T> {
        match self.0 {
            Form::Plain(values) => values,
            Form::Packed { values, words, log_bits, len } => {
                unpacked(&values, &words, log_bits, len)
            }
        }
    }

    /// A copy of the values.
    pub fn to_vec(&self) -> Vec<T> {
        self.plain().into_owned()
    }
}

fn packed<T: Copy + Eq + Hash>(list: &[T]) -> Option<Form<T>> {
    let mut values: Vec<T> = Vec::new();
    let mut codes = HashMap::new();
    let mut all = Vec::with_capacity(list.len());
    for value in list {
        let few = &values[..values.len().min(FEW)];
        let known = match few.iter().position(|known| known == value) {
            Some(at) => Some(at as u16),
            None if values.len() <= FEW => None,
            None => codes.get(value).copied(),
        };
        all.push(match known {
            Some(code) => code,
            None if values.len() == MOST_VALUES => return None,
            None => {
                let code = values.len() as u16;
                values.push(*value);
                codes.insert(*value, code);
                code
            }
        });
    }
    values.shrink_to_fit();
    let bits = usize::BITS - values.len().saturating_sub(1).leading_zeros();
    let log_bits = bits.next_power_of_two().ilog2();
    let a_word = 64 >> log_bits;
    let words: Vec<u64> = match bits {
        0 => Vec::new(),
        _ => all
            .chunks(a_word)
            .map(|codes| {
                let shifts = (0..).step_by(1 << log_bits);
                codes.iter().zip(shifts).fold(0, |word, (code, by)| word | u64::from(*code) << by)
            })
            .collect(),
    };
    let form = Form::Packed { values, words, log_bits, len: list.len() };
    let smaller = Packed(form);
    (smaller.bytes() < size_of_val(list)).then_some(smaller.0)
}

fn unpacked<T: Copy>(values: &[T], words: &[u64], log_bits: u32, len: usize) -> Vec<T> {
    let Some(first) = values.first() else { return Vec::new() };
    if words.is_empty() {
        return vec![*first; len];
    }
    let (mask, a_word) = ((1_u64 << (1 << log_bits)) - 1, 64_usize >> log_bits);
    let mut list = Vec::with_capacity(words.len() * a_word);
    for &word in words {
        let mut word = word;
        list.extend((0..a_word).map(|_| {
            let value = values.get((word & mask) as usize).unwrap_or(first);
            word = word.unbounded_shr(1 << log_bits);
            *value
        }));
    }
    list.truncate(len);
    list
}

impl<T> Default for Packed<T> {
    fn default() -> Self {
        Self(Form::Plain(Vec::new()))
    }
}

impl<T> From<Vec<T>> for Packed<T> {
    fn from(values: Vec<T>) -> Self {
        Self(Form::Plain(values))
    }
}

impl<T> FromIterator<T> for Packed<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        Self(Form::Plain(values.into_iter().collect()))
    }
}

impl<T> Index<usize> for Packed<T> {
    type Output = T;

    #[inline]
    fn index(&self, at: usize) -> &T {
        match self.get(at) {
            Some(value) => value,
            None => panic!("place {at} of {}", self.len()),
        }
    }
}

impl<T: Copy + Eq + Hash> IndexMut<usize> for Packed<T> {
    fn index_mut(&mut self, at: usize) -> &mut T {
        &mut self.plain_mut()[at]
    }
}

/// The form makes no difference.
impl<T: PartialEq> PartialEq for Packed<T> {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Form::Plain(a), Form::Plain(b)) => a == b,
            _ => self.len() == other.len() && self.iter().eq(other.iter()),
        }
    }
}

impl<T: Eq> Eq for Packed<T> {}

impl<T: PartialEq> PartialEq<[T]> for Packed<T> {
    fn eq(&self, other: &[T]) -> bool {
        self.len() == other.len() && self.iter().eq(other)
    }
}

impl<T: fmt::Debug> fmt::Debug for Packed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many values, of which so many are different.
    fn list(len: usize, different: usize) -> Vec<u64> {
        (0..len).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 7) as u64 % different as u64 + 5).collect()
    }

    #[test]
    fn both_forms_hold_the_same() {
        for len in [0, 1, 2, 63, 64, 65, 4_096, 5_000] {
            for different in [1, 2, 3, 4, 5, 16, 17, 18, 255, 257, 1_000] {
                let plain = list(len, different);
                let mut packed = Packed::from(plain.clone());
                packed.pack();
                let what = format!("{different} in {len}");
                assert_eq!(packed, Packed::from(plain.clone()), "{what}");
                assert_eq!(packed.to_vec(), plain, "{what}");
                assert_eq!(packed, plain[..], "{what}");
                assert!((0..len).all(|at| packed[at] == plain[at]), "{what}");
                assert_eq!((packed.len(), packed.get(len)), (len, None), "{what}");
                for (value, count) in packed.tally().into_iter().flatten() {
                    assert_eq!(count, plain.iter().filter(|v| *v == value).count(), "{what}");
                }
                let all = packed.tally().map(|tally| tally.map(|(_, count)| count).sum::<usize>());
                assert_eq!(all, packed.is_packed().then_some(len), "{what}");
                let mut changed = packed.clone();
                changed.plain_mut().push(9);
                assert_eq!(
                    changed.iter().copied().collect::<Vec<_>>(),
                    [&plain[..], &[9]].concat()
                );
            }
        }
    }

    #[test]
    fn one_value_takes_no_bits() {
        for len in [0, 1, 4_096] {
            let list = Packed::of_one(7_u8, len);
            assert_eq!((list.len(), list.to_vec()), (len, vec![7; len]));
        }
    }

    #[test]
    fn few_values_take_few_bits() {
        let bytes = |different| {
            let mut packed = Packed::from(list(65_536, different));
            packed.pack();
            packed.bytes() - different * size_of::<u64>()
        };
        assert_eq!(
            [1, 2, 3, 9, 17, 257].map(bytes),
            [0, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10]
        );
    }

    #[test]
    fn what_gains_nothing_stays_as_it_is() {
        let mut all: Packed<u64> = (0..70_000).collect();
        all.pack();
        assert!(!all.is_packed() && all[69_999] == 69_999);
        let mut bytes: Packed<u8> = (0..=255).collect();
        bytes.pack();
        assert!(!bytes.is_packed());
    }
}
