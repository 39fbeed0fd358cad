//! Owners, changes and placements as bytes, for the store.
//!
//! Owns the three formats. Each begins with a byte that says which it is, so that a later
//! format can stand beside it. Whatever the bytes, decoding ends with a value or an error.
//!
//! Numbers are LEB128 varints of at most 32 bits, in their shortest form.
//!
//! - Owners: `1`, then runs of *slot, length*: five bytes for a table of one version. Or, where
//!   that is shorter, `4`, *buckets, number of slots*, the slots, and as many bits for each
//!   bucket as tell them apart, plane by plane, the first bucket in the lowest bit: 8 KB for two
//!   versions in 65,536 buckets, whatever their shares.
//! - Changes: `2`, then groups of *from, to, number, distances between buckets*. A byte or
//!   two for each change. Or, for ascending changes between two versions where that is shorter,
//!   `5`, *from, to, buckets*, and a bit for each bucket: at most 8 KB for 65,536.
//! - Placement: `3`, *buckets, number of backends*, for each its identity (eight bytes, least
//!   first) and *weight*, then *distance from the last bucket, backend* for each bucket that
//!   prefers another backend than rendezvous hashing says. Some ten bytes for each backend,
//!   and two or three for each such bucket.

use std::fmt;

use super::{Change, MAX_BACKENDS, MAX_BUCKETS, Placement, counts, placement::Weighted};
use crate::{abi::MAX_VERSIONS, differing, ones};

const OWNERS_FORMAT: u8 = 1;
const CHANGES_FORMAT: u8 = 2;
const PLACEMENT_FORMAT: u8 = 3;
const OWNERS_BITS_FORMAT: u8 = 4;
const CHANGES_BITS_FORMAT: u8 = 5;

/// Why bytes are no owners, no changes or no placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The first byte names another format, of a later release or another thing.
    Format {
        /// The format that was expected.
        expected: u8,
        /// What stands there, if anything does.
        found: Option<u8>,
    },
    /// They end in the middle of something.
    Truncated,
    /// A number has more than 32 bits or is not in its shortest form.
    Number,
    /// A version slot beyond the last.
    UnknownSlot(u8),
    /// A run or group of nothing.
    Empty,
    /// More than [`MAX_BUCKETS`] buckets, or a bucket beyond that.
    TooMany,
    /// More than [`MAX_BACKENDS`] backends, not by ascending identity, or one of weight 0.
    Backends,
    /// A bucket prefers a backend beyond the last.
    UnknownBackend(u32),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format { expected, found: Some(found) } => {
                write!(f, "format {found}, where {expected} was expected")
            }
            Self::Format { expected, found: None } => {
                write!(f, "nothing, where format {expected} was expected")
            }
            Self::Truncated => f.write_str("cut short"),
            Self::Number => f.write_str("a number is malformed"),
            Self::UnknownSlot(slot) => write!(f, "slot {slot}: slots end at {}", MAX_VERSIONS - 1),
            Self::Empty => f.write_str("a run of nothing"),
            Self::TooMany => write!(f, "more than {MAX_BUCKETS} buckets"),
            Self::Backends => write!(f, "more than {MAX_BACKENDS} backends, or not in order"),
            Self::UnknownBackend(index) => write!(f, "there is no backend {index}"),
        }
    }
}

impl std::error::Error for DecodeError {}

/// The owner of each bucket, as bytes.
pub fn encode_owners(owners: &[u8]) -> Vec<u8> {
    let Some((&first, after_first)) = owners.split_first() else {
        return vec![OWNERS_FORMAT];
    };
    let run_ends = || differing(owners, after_first, |owner, next| owner != next);
    let is = |slot: u8| differing(owners, owners, move |owner, _| owner == slot);
    let slots: Vec<u8> = counts(owners).map_or_else(
        |_| Vec::new(),
        |counts| (0_u8..).zip(counts).filter(|(_, n)| *n > 0).map(|(slot, _)| slot).collect(),
    );
    let (planes, words) = (planes(slots.len()), owners.len().div_ceil(64));
    let runs: usize = 1 + run_ends().map(|ends| ends.count_ones() as usize).sum::<usize>();
    // A run takes two bytes at least.
    if !slots.is_empty() && runs * 2 > planes * words * 8 + slots.len() + 5 {
        let mut bits = vec![0_u64; planes * words];
        for (number, &slot) in slots.iter().enumerate() {
            for plane in (0..planes).filter(|plane| number >> plane & 1 != 0) {
                let plane = &mut bits[plane * words..][..words];
                plane.iter_mut().zip(is(slot)).for_each(|(word, its)| *word |= its);
            }
        }
        let mut bytes = vec![OWNERS_BITS_FORMAT];
        put(&mut bytes, owners.len() as u32);
        bytes.push(slots.len() as u8);
        bytes.extend(slots);
        bytes.extend(bits.into_iter().flat_map(u64::to_le_bytes));
        return bytes;
    }
    let mut bytes = vec![OWNERS_FORMAT];
    let (mut slot, mut start) = (first, 0);
    for last in ones(run_ends()) {
        bytes.push(slot);
        put(&mut bytes, (last + 1 - start) as u32);
        (slot, start) = (owners[last + 1], last + 1);
    }
    bytes.push(slot);
    put(&mut bytes, (owners.len() - start) as u32);
    bytes
}

/// How many bits tell `slots` slots apart.
fn planes(slots: usize) -> usize {
    slots.next_power_of_two().trailing_zeros() as usize
}

/// The owners that [`encode_owners`] wrote.
///
/// # Errors
///
/// Any [`DecodeError`].
pub fn decode_owners(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    if bytes.first() == Some(&OWNERS_BITS_FORMAT) {
        return decode_owners_bits(&bytes[1..]);
    }
    let mut rest = after_format(bytes, OWNERS_FORMAT)?;
    let mut owners = Vec::new();
    while !rest.is_empty() {
        let slot = take_slot(&mut rest)?;
        let length = take(&mut rest)? as usize;
        if length == 0 {
            return Err(DecodeError::Empty);
        }
        if length > MAX_BUCKETS as usize - owners.len() {
            return Err(DecodeError::TooMany);
        }
        owners.resize(owners.len() + length, slot);
    }
    Ok(owners)
}

fn decode_owners_bits(mut rest: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let buckets = take_buckets(&mut rest)?;
    let count = take_byte(&mut rest)?;
    let slots: Vec<u8> = (0..count).map(|_| take_slot(&mut rest)).collect::<Result<_, _>>()?;
    let words = words(rest)?;
    let plane = buckets.div_ceil(64);
    if plane == 0 || slots.is_empty() || words.len() != planes(slots.len()) * plane {
        return Err(DecodeError::Truncated);
    }
    let mut numbers = vec![0_u8; buckets];
    for (bit, plane) in words.chunks(plane).enumerate() {
        for (number, at) in numbers.iter_mut().zip(0..) {
            *number |= ((plane[at / 64] >> (at % 64) & 1) as u8) << bit;
        }
    }
    numbers
        .into_iter()
        .map(|number| slots.get(usize::from(number)).copied())
        .collect::<Option<_>>()
        .ok_or(DecodeError::UnknownSlot(count))
}

/// A list of changes as bytes. Any order is kept; that of [`super::plan`] is the shortest.
pub fn encode_changes(changes: &[Change]) -> Vec<u8> {
    if let [first, .., last] = changes {
        let buckets = last.bucket as usize + 1;
        // A change takes a byte at least in the other format.
        let alike =
            |a: &Change, b: &Change| (a.from, a.to) == (b.from, b.to) && a.bucket < b.bucket;
        if changes.len() > buckets.div_ceil(64) * 8 && changes.is_sorted_by(alike) {
            let mut bits = vec![0_u64; buckets.div_ceil(64)];
            for bucket in changes.iter().map(|change| change.bucket as usize) {
                bits[bucket / 64] |= 1 << (bucket % 64);
            }
            let mut bytes = vec![CHANGES_BITS_FORMAT, first.from, first.to];
            put(&mut bytes, buckets as u32);
            bytes.extend(bits.into_iter().flat_map(u64::to_le_bytes));
            return bytes;
        }
    }
    let mut bytes = vec![CHANGES_FORMAT];
    let mut last = 0_u32;
    for group in changes.chunk_by(|a, b| (a.from, a.to) == (b.from, b.to)) {
        bytes.extend([group[0].from, group[0].to]);
        put(&mut bytes, group.len() as u32);
        for change in group {
            // Distances wrap, so that a step back is a (long) step forward.
            put(&mut bytes, change.bucket.wrapping_sub(last));
            last = change.bucket;
        }
    }
    bytes
}

/// The changes that [`encode_changes`] wrote.
///
/// # Errors
///
/// Any [`DecodeError`].
pub fn decode_changes(bytes: &[u8]) -> Result<Vec<Change>, DecodeError> {
    if bytes.first() == Some(&CHANGES_BITS_FORMAT) {
        let mut rest = &bytes[1..];
        let (from, to) = (take_slot(&mut rest)?, take_slot(&mut rest)?);
        let buckets = take_buckets(&mut rest)?;
        let words = words(rest)?;
        if words.len() != buckets.div_ceil(64) {
            return Err(DecodeError::Truncated);
        }
        let change = |bucket| Change { bucket: bucket as u32, from, to };
        let changes: Vec<Change> = ones(words.into_iter()).map(change).collect();
        let beyond = changes.last().is_some_and(|last| last.bucket as usize >= buckets);
        return if beyond { Err(DecodeError::TooMany) } else { Ok(changes) };
    }
    let mut rest = after_format(bytes, CHANGES_FORMAT)?;
    let mut changes = Vec::new();
    let mut bucket = 0_u32;
    while !rest.is_empty() {
        let (from, to) = (take_slot(&mut rest)?, take_slot(&mut rest)?);
        let number = take(&mut rest)? as usize;
        if number == 0 {
            return Err(DecodeError::Empty);
        }
        // Each takes a byte at least: a lying number does not reserve memory.
        if number > rest.len() {
            return Err(DecodeError::Truncated);
        }
        changes.reserve(number);
        for _ in 0..number {
            bucket = bucket.wrapping_add(take(&mut rest)?);
            if bucket >= MAX_BUCKETS {
                return Err(DecodeError::TooMany);
            }
            changes.push(Change { bucket, from, to });
        }
    }
    Ok(changes)
}

/// A placement as bytes.
pub fn encode_placement(placement: &Placement) -> Vec<u8> {
    let mut bytes = vec![PLACEMENT_FORMAT];
    put(&mut bytes, placement.buckets());
    put(&mut bytes, placement.backends().len() as u32);
    for backend in placement.backends() {
        bytes.extend(backend.identity.to_le_bytes());
        put(&mut bytes, backend.weight);
    }
    let mut next = 0;
    for &(bucket, index) in placement.exceptions() {
        put(&mut bytes, bucket - next);
        put(&mut bytes, index.into());
        next = bucket + 1;
    }
    bytes
}

/// The placement that [`encode_placement`] wrote.
///
/// # Errors
///
/// Any [`DecodeError`].
pub fn decode_placement(bytes: &[u8]) -> Result<Placement, DecodeError> {
    let mut rest = after_format(bytes, PLACEMENT_FORMAT)?;
    let buckets = take(&mut rest)?;
    let count = take(&mut rest)?;
    if buckets > MAX_BUCKETS {
        return Err(DecodeError::TooMany);
    }
    if count as usize > MAX_BACKENDS {
        return Err(DecodeError::Backends);
    }
    let mut backends: Vec<Weighted> = Vec::new();
    for _ in 0..count {
        let (identity, others) = rest.split_first_chunk().ok_or(DecodeError::Truncated)?;
        rest = others;
        let backend =
            Weighted { identity: u64::from_le_bytes(*identity), weight: take(&mut rest)? };
        if backend.weight == 0 || backends.last().is_some_and(|b| b.identity >= backend.identity) {
            return Err(DecodeError::Backends);
        }
        backends.push(backend);
    }
    let mut exceptions = Vec::new();
    let mut next = 0_u32;
    while !rest.is_empty() {
        let bucket = next.checked_add(take(&mut rest)?).filter(|&bucket| bucket < buckets);
        let bucket = bucket.ok_or(DecodeError::TooMany)?;
        let index = take(&mut rest)?;
        if index >= count {
            return Err(DecodeError::UnknownBackend(index));
        }
        exceptions.push((bucket, index as u16));
        next = bucket + 1;
    }
    Ok(Placement::from_parts(buckets, backends, exceptions))
}

fn after_format(bytes: &[u8], expected: u8) -> Result<&[u8], DecodeError> {
    match bytes.split_first() {
        Some((&found, rest)) if found == expected => Ok(rest),
        found => Err(DecodeError::Format { expected, found: found.map(|(&f, _)| f) }),
    }
}

fn put(bytes: &mut Vec<u8>, mut number: u32) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take(rest: &mut &[u8]) -> Result<u32, DecodeError> {
    let mut number = 0_u64;
    for shift in (0..35).step_by(7) {
        let byte = take_byte(rest)?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            let shortest = byte != 0 || shift == 0;
            return u32::try_from(number).ok().filter(|_| shortest).ok_or(DecodeError::Number);
        }
    }
    Err(DecodeError::Number)
}

/// A number of buckets.
fn take_buckets(rest: &mut &[u8]) -> Result<usize, DecodeError> {
    match take(rest)? {
        buckets if buckets <= MAX_BUCKETS => Ok(buckets as usize),
        _ => Err(DecodeError::TooMany),
    }
}

/// The rest as words of bits.
fn words(rest: &[u8]) -> Result<Vec<u64>, DecodeError> {
    match rest.as_chunks() {
        (words, []) => Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect()),
        _ => Err(DecodeError::Truncated),
    }
}

fn take_slot(rest: &mut &[u8]) -> Result<u8, DecodeError> {
    match take_byte(rest)? {
        slot if usize::from(slot) < MAX_VERSIONS => Ok(slot),
        slot => Err(DecodeError::UnknownSlot(slot)),
    }
}

fn take_byte(rest: &mut &[u8]) -> Result<u8, DecodeError> {
    let (&byte, others) = rest.split_first().ok_or(DecodeError::Truncated)?;
    *rest = others;
    Ok(byte)
}
