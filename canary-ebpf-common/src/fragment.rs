//! Fragments: what has come of a datagram, and whether more may.
//!
//! The first fragment's way is kept ([`FragmentRoute`]); the others follow it. None may hold bytes
//! that another one had (RFC 5722; RFC 1858, 4; RFC 3128): receivers differ in which of the two
//! they believe.

use crate::abi::{
    FRAGMENT_RANGES, ForwardMode, FragmentRoute, SERVICE_HASH_CONNECTION, SERVICE_SEVERAL, Service,
    fragment as flags,
};

/// The largest end of a datagram, in units of eight bytes, the last of which is not whole.
const MOST_UNITS: u32 = 8192;

/// What of its datagram a fragment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Where it begins, in units of eight bytes.
    pub start: u32,
    /// How many bytes it has.
    pub bytes: u32,
    /// Whether others come after it.
    pub more: bool,
}

impl Stretch {
    /// Where it ends, in units of eight bytes; the last fragment's may be part of one.
    #[inline(always)]
    const fn end(self) -> u32 {
        self.start + self.bytes.div_ceil(8)
    }

    /// Whether there can be such a fragment: it is not empty, ends within the largest datagram,
    /// and is of whole units unless it is the last (RFC 791, 3.2; RFC 8200, 4.5).
    #[inline(always)]
    pub const fn possible(self) -> bool {
        self.bytes != 0
            && self.start * 8 + self.bytes <= u16::MAX as u32
            && (!self.more || self.bytes.is_multiple_of(8))
    }
}

/// Whether the fragments of a service find their way each by itself: no port decides, nothing is
/// translated, and it is the only one at its address. `any` is what stands there without a port.
/// Where their bucket is tracked they do not.
#[inline(always)]
pub const fn alone(any: &Service) -> bool {
    any.flags & (SERVICE_HASH_CONNECTION | SERVICE_SEVERAL) == 0
        && any.flags & ForwardMode::MASK != ForwardMode::Nat as u32
}

/// What becomes of a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It follows the first.
    Follow,
    /// It follows the first, and nothing of the datagram is missing any more.
    Whole,
    /// It holds bytes that have come.
    Overlap,
}

/// A stretch as [`FragmentRoute::seen`] holds it.
#[inline(always)]
const fn packed(start: u32, end: u32) -> u32 {
    start | end << 16
}

/// Begins to follow a datagram whose first fragment is `first`.
#[inline(always)]
pub const fn begin(first: Stretch) -> [u32; FRAGMENT_RANGES] {
    let mut seen = [0; FRAGMENT_RANGES];
    seen[0] = packed(0, first.end());
    seen
}

/// Takes in a later fragment, which is `possible`.
///
/// Stretches that touch become one, so that a datagram in order, or backwards, takes one or two.
/// One that touches none is kept as long as fewer than [`FRAGMENT_RANGES`] are apart; beyond that
/// it follows the first, and overlaps with it are not seen.
#[inline(always)]
pub fn admit(route: &mut FragmentRoute, stretch: Stretch) -> Admission {
    let (mut start, mut end) = (stretch.start, stretch.end());
    let mut free = FRAGMENT_RANGES;
    let mut n = 0;
    while n < FRAGMENT_RANGES {
        let (from, to) = (route.seen[n] & 0xffff, route.seen[n] >> 16);
        if to != 0 && stretch.start < to && from < stretch.end() {
            return Admission::Overlap;
        }
        n += 1;
    }
    n = 0;
    while n < FRAGMENT_RANGES {
        let (from, to) = (route.seen[n] & 0xffff, route.seen[n] >> 16);
        if to == 0 || to == start || from == end {
            if to != 0 {
                start = if from < start { from } else { start };
                end = if to > end { to } else { end };
                route.seen[n] = 0;
            }
            free = n;
        }
        n += 1;
    }
    if free < FRAGMENT_RANGES {
        route.seen[free & (FRAGMENT_RANGES - 1)] = packed(start, end);
    }
    if !stretch.more {
        route.flags |= flags::LAST;
    }
    let others: u32 = {
        let (mut n, mut others) = (0, 0);
        while n < FRAGMENT_RANGES {
            others |= if n == free { 0 } else { route.seen[n] };
            n += 1;
        }
        others
    };
    if start == 0 && others == 0 && free < FRAGMENT_RANGES && route.flags & flags::LAST != 0 {
        return Admission::Whole;
    }
    Admission::Follow
}

const _: () = {
    assert!(FRAGMENT_RANGES.is_power_of_two());
    assert!(MOST_UNITS <= u16::MAX as u32);
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn begun(bytes: u32) -> FragmentRoute {
        let first = Stretch { start: 0, bytes, more: true };
        FragmentRoute { seen: begin(first), ..FragmentRoute::default() }
    }

    #[test]
    fn fragments_in_order_and_backwards_make_a_whole() {
        for backwards in [false, true] {
            let mut route = begun(1480);
            let mut order: Vec<u32> = (1..44).collect();
            if backwards {
                order.reverse();
            }
            for (n, at) in order.iter().enumerate() {
                let stretch = Stretch { start: at * 185, bytes: 1480, more: *at != 43 };
                let whole = n == 42;
                let expected = if whole { Admission::Whole } else { Admission::Follow };
                assert_eq!(admit(&mut route, stretch), expected, "{at} of {order:?}");
            }
        }
    }

    #[test]
    fn bytes_that_have_come_are_not_taken_again() {
        let mut route = begun(1480);
        let second = Stretch { start: 185, bytes: 8, more: true };
        assert_eq!(admit(&mut route, Stretch { start: 184, ..second }), Admission::Overlap);
        assert_eq!(admit(&mut route, second), Admission::Follow);
        assert_eq!(admit(&mut route, second), Admission::Overlap, "a repeated one");
        let far = Stretch { start: 1000, bytes: 3, more: false };
        assert_eq!(admit(&mut route, far), Admission::Follow);
        let across = Stretch { start: 186, bytes: 815 * 8, more: true };
        assert_eq!(admit(&mut route, across), Admission::Overlap);
        let between = Stretch { start: 186, bytes: 814 * 8, more: true };
        assert_eq!(admit(&mut route, between), Admission::Whole);
    }

    #[test]
    fn impossible_fragments() {
        let possible = |start, bytes, more| Stretch { start, bytes, more }.possible();
        assert!(possible(0, 8, true) && possible(185, 3, false) && possible(8191, 7, false));
        assert!(!possible(0, 0, true) && !possible(1, 12, true) && !possible(8191, 8, false));
    }

    proptest! {
        /// Against a map of every unit.
        #[test]
        fn overlaps_are_seen_while_few_stretches_are_apart(
            stretches in proptest::collection::vec((1_u32..60, 1_u32..9), 1..40),
        ) {
            let mut route = begun(8);
            let mut units = [false; 80];
            units[0] = true;
            for (start, length) in stretches {
                let stretch = Stretch { start, bytes: length * 8, more: true };
                let range = start as usize..(start + length) as usize;
                let taken = units[range.clone()].iter().any(|u| *u);
                let islands = |units: &[bool]| units.windows(2).filter(|w| w[0] && !w[1]).count();
                let mut after = units;
                after[range].fill(true);
                if islands(&after) > FRAGMENT_RANGES {
                    break;
                }
                let seen = admit(&mut route, stretch);
                prop_assert_eq!(seen == Admission::Overlap, taken);
                if !taken {
                    units = after;
                }
            }
        }
    }
}
