//! Encodings and sums, for every value that there is: proofs rather than samples.

use std::thread;

use canary_ebpf_common::{
    abi::{vlan, way},
    checksum,
    entry::Entry,
    tunnel::unwrapped_tos,
};

/// Holds `check` for each range of `0..end`, a range for each processor.
fn in_parts(end: u64, check: impl Fn(std::ops::Range<u64>) + Sync) {
    let parts = thread::available_parallelism().map_or(1, usize::from) as u64;
    let part = end.div_ceil(parts);
    thread::scope(|scope| {
        for n in 0..parts {
            let range = n * part..((n + 1) * part).min(end);
            scope.spawn(|| check(range));
        }
    });
}

/// What a one's-complement sum is: the remainder of 65,535, of which 0 alone is written 0.
const fn remainder(sum: u64) -> u16 {
    if sum == 0 { 0 } else { ((sum - 1) % 0xffff + 1) as u16 }
}

/// All sums of fewer than 65,537 words. With [`sums_beyond_a_word_are_folded`], RFC 1624's equation 3
/// follows: `!checksum + !old + new` has the remainder of the sum anew.
#[test]
fn every_sum_below_2_32_is_its_remainder() {
    in_parts(1 << 32, |sums| {
        // Counted, not divided: each sum's remainder is the one after that of the sum before.
        let mut expected = remainder(sums.start);
        for sum in sums {
            assert!(checksum::of(sum) == !expected, "{sum}");
            expected = if expected == 0xffff { 1 } else { expected + 1 };
        }
    });
}

/// 2³² is 1 more than a multiple of 65,535, so that the upper half counts like the lower one.
#[test]
fn sums_beyond_a_word_are_folded() {
    let corners = [0, 1, 2, 0x7fff, 0xfffe, 0xffff, 0x1_0000, 0x1_0001, 0xfffe_ffff, 0xffff_ffff];
    for high in (0..=0xffff_u64).chain(corners) {
        for low in corners {
            let sum = high << 32 | low;
            assert_eq!(checksum::of(sum), !remainder(sum), "{sum:#x}");
            assert_eq!(checksum::of(low << 32 | high), !remainder(low << 32 | high));
        }
    }
}

/// Each word that says that it is tracked has one reading, and is written so again: no two entries
/// share a word, and no field reaches into another.
#[test]
fn every_entry_is_written_as_it_is_read() {
    in_parts(1 << 32, |words| {
        for word in words {
            let entry = Entry(word as u32);
            let (current, previous) = (entry.current(), entry.previous());
            assert!(u32::from(current.get()) == entry.0 & 0x7fff);
            assert!(u32::from(previous.get()) == entry.0 >> 15 & 0x7fff);
            if entry.tracked() {
                assert!(Entry::tracking(current, previous, entry.learning()) == entry);
            } else if entry.0 <= 0x7fff {
                assert!(Entry::steady(current) == entry);
            }
        }
    });
}

/// Every combination of tags, in flows by every interface that they can name.
#[test]
fn every_way_is_written_as_it_is_read() {
    for word in 0..1_u32 << 25 {
        let service = word & vlan::SERVICE_TAG != 0;
        assert!(vlan::word(vlan::outer(word), vlan::inner(word), service) == word);
    }
    in_parts(1 << 31, |words| {
        for word in words {
            let way = word as u32 | 1 << 31;
            assert!(way::has_tags(way) && !way::has_tags(word as u32));
            assert!(way::tagged(way::place(way), way::vlan(way)) == way);
        }
    });
}

/// RFC 6040, 4.2, for all 65,536 pairs: the inner DSCP stays, congestion is never taken back, and
/// no mark reaches who would not understand it.
#[test]
fn every_pair_of_marks_comes_through() {
    const CE: u8 = 0b11;
    for outer in 0..=u8::MAX {
        for inner in 0..=u8::MAX {
            let Some(tos) = unwrapped_tos(outer, inner) else {
                assert_eq!((inner & CE, outer & CE), (0, CE), "{outer:#x} around {inner:#x}");
                continue;
            };
            assert_eq!(tos & !CE, inner & !CE, "{outer:#x} around {inner:#x}");
            let marked = tos & CE == CE;
            assert_eq!(marked, inner & CE == CE || outer & CE == CE);
            assert_eq!(tos & CE == 0, inner & CE == 0);
        }
    }
}
