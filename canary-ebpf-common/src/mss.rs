//! The MSS that a SYN announces (RFC 9293, 3.7.1), made smaller.

use crate::{
    checksum::Delta,
    headers::{Frame, Tcp},
};

/// How many options are looked at: systems put the MSS first.
const OPTIONS_MAX: usize = 16;
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const MSS: u8 = 2;
/// Bytes of that option.
const MSS_BYTES: u8 = 4;

/// A copy of the options: some room behind the longest list, so that a bounded place is in it.
pub type Options = [u8; 68];

/// Where in a list of `bytes` the MSS stands. Nowhere in one that is not well formed before it.
#[inline(always)]
pub fn find(options: &Options, bytes: usize) -> Option<usize> {
    let mut at = 0_usize;
    for _ in 0..OPTIONS_MAX {
        // Bounded for the verifier, which does not follow sums.
        at &= 0x3f;
        if at + usize::from(MSS_BYTES) > bytes {
            return None;
        }
        match (options[at], options[at + 1]) {
            (END, _) => return None,
            (NO_OPERATION, _) => at += 1,
            (MSS, MSS_BYTES) => return Some(at),
            (_, 0 | 1) => return None,
            (_, bytes) => at += usize::from(bytes),
        }
    }
    None
}

/// Bytes of the options of a TCP header.
#[inline(always)]
pub fn options_bytes(data_offset: u8) -> usize {
    (usize::from(data_offset >> 4) * 4).saturating_sub(size_of::<Tcp>())
}

/// Lowers the MSS that stands `at` in the options of the TCP header at `offset` to `most`, and
/// brings the checksum up to date.
#[inline(always)]
pub fn lower<F: Frame>(frame: &F, offset: usize, at: usize, most: u16) -> Option<()> {
    let option: *mut [u8; 4] = frame.at(offset + size_of::<Tcp>() + at)?;
    // SAFETY: `at` checked the bounds.
    let option = unsafe { &mut *option };
    let old = u16::from_be_bytes([option[2], option[3]]);
    if old <= most {
        return None;
    }
    // The value need not stand at an even place: then its bytes count crosswise.
    let (before, after) = match at & 1 {
        0 => (old.to_be(), most.to_be()),
        _ => (old.to_be().swap_bytes(), most.to_be().swap_bytes()),
    };
    [option[2], option[3]] = most.to_be_bytes();
    let tcp: *mut Tcp = frame.at(offset)?;
    // SAFETY: `at` checked the bounds.
    let tcp = unsafe { &mut *tcp };
    tcp.checksum = Delta::ZERO.replace_half(before, after).apply(tcp.checksum);
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::headers::Bytes;

    fn checksum(bytes: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn segment(options: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0_u8; 20];
        bytes.extend(options);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes[12] = ((bytes.len() / 4) << 4) as u8;
        let sum = checksum(&bytes);
        bytes[16..18].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn clamp(frame: &Bytes, most: u16) -> Option<()> {
        let mut copy = [0; size_of::<Options>()];
        let bytes = options_bytes(*frame.0.get(12)?);
        let options = frame.0.get(20..20 + bytes)?;
        copy[..options.len()].copy_from_slice(options);
        lower(frame, 0, find(&copy, bytes)?, most)
    }

    fn clamped(options: &[u8], most: u16) -> Vec<u8> {
        let frame = Bytes(segment(options));
        clamp(&frame, most);
        assert_eq!(checksum(&frame.0), 0, "{options:?}");
        frame.0[20..].to_vec()
    }

    #[test]
    fn a_larger_mss_is_lowered_wherever_it_stands() {
        assert_eq!(clamped(&[2, 4, 0x05, 0xb4], 1440), [2, 4, 0x05, 0xa0]);
        assert_eq!(clamped(&[1, 2, 4, 0x05, 0xb4, 0, 0, 0], 1440), [1, 2, 4, 0x05, 0xa0, 0, 0, 0]);
        let late = [3, 3, 7, 4, 2, 1, 1, 1, 2, 4, 0xff, 0xff];
        assert_eq!(clamped(&late, 536), [3, 3, 7, 4, 2, 1, 1, 1, 2, 4, 0x02, 0x18]);
        let mut last = vec![1; 12];
        last.extend([2, 4, 9, 9]);
        assert_eq!(clamped(&last, 1000)[12..], [2, 4, 0x03, 0xe8]);
    }

    #[test]
    fn what_is_small_enough_absent_or_not_well_formed_stays() {
        for options in [
            &[][..],
            &[2, 4, 0x05, 0x00],
            &[0, 2, 4, 0x05, 0xb4, 0, 0, 0],
            &[2, 3, 0x05, 0xb4],
            &[8, 0, 2, 4, 0x05, 0xb4, 1, 1],
            &[8, 200, 2, 4, 0x05, 0xb4, 1, 1],
        ] {
            let before = segment(options)[20..].to_vec();
            assert_eq!(clamped(options, 1300), before, "{options:?}");
        }
    }

    proptest! {
        #[test]
        fn checksums_stay_right_and_nothing_else_changes(
            options in prop::collection::vec(any::<u8>(), 0..=40), most in any::<u16>(),
        ) {
            let before = segment(&options);
            let after = clamped(&options, most);
            let differing = before[20..].iter().zip(&after).filter(|(a, b)| a != b).count();
            prop_assert!(differing <= 2);
        }

        #[test]
        fn whatever_comes_is_no_trouble(
            bytes in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            _ = clamp(&Bytes(bytes), 1000);
        }
    }
}
