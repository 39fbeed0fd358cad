//! Owners, changes and placements as bytes, for the store.
//!
//! Owns the three formats. Each begins with a byte that says which it is, so that a later
//! format can stand beside it. Whatever the bytes, decoding ends with a value or an error.
//!
//! Numbers are LEB128 varints of at most 32 bits, in their shortest form.
//!
//! - Owners: `1`, then runs of *slot, length*. At most two bytes for each run: five bytes
//!   for a table of one version, 13 KB for 5 % of 65,536, 64 KB at the very worst realistic
//!   split (two versions, half each).
//! - Changes: `2`, then groups of *from, to, number, distances between buckets*. A byte or
//!   two for each change.
//! - Placement: `3`, *buckets, number of backends*, for each its identity (eight bytes, least
//!   first) and *weight*, then *distance from the last bucket, backend* for each bucket that
//!   prefers another backend than rendezvous hashing says. Some ten bytes for each backend,
//!   and two or three for each such bucket.

use std::fmt;

use super::{Change, MAX_BACKENDS, MAX_BUCKETS, Placement, placement::Weighted};
use crate::abi::MAX_VERSIONS;

const OWNERS_FORMAT: u8 = 1;
const CHANGES_FORMAT: u8 = 2;
const PLACEMENT_FORMAT: u8 = 3;

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
    let mut bytes = vec![OWNERS_FORMAT];
    for run in owners.chunk_by(|a, b| a == b) {
        bytes.push(run[0]);
        put(&mut bytes, run.len() as u32);
    }
    bytes
}

/// The owners that [`encode_owners`] wrote.
///
/// # Errors
///
/// Any [`DecodeError`].
pub fn decode_owners(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
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

/// A list of changes as bytes. Any order is kept; that of [`super::plan`] is the shortest.
pub fn encode_changes(changes: &[Change]) -> Vec<u8> {
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
