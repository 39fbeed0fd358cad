//! When a target is checked: points in time of its own, an interval apart.
//!
//! Point *k* lies at `offset + k · interval`, and up to the jitter later. The offset lies anywhere in the interval and both depend on the target alone. As
//! the points do not depend on when the last check ended, targets never drift
//! together: not after a start, a reload, a stall or an outage.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
    time::Duration,
};

/// The points in time at which a target is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    interval_ns: u64,
    jitter_ns: u64,
    offset_ns: u64,
    seed: u64,
}

impl Pace {
    /// That of a backend of `service`. The same on every start. From one point to the next it
    /// is the interval, give or take `jitter_percent` (at most 100) of it.
    pub fn new(service: &str, addr: SocketAddr, interval: Duration, jitter_percent: u8) -> Self {
        let mut hasher = DefaultHasher::new();
        (service, addr).hash(&mut hasher);
        let seed = hasher.finish();
        let interval_ns = nanoseconds(interval).max(1);
        let jitter_ns = interval_ns / 100 * u64::from(jitter_percent.min(100));
        Self { interval_ns, jitter_ns, offset_ns: fraction(seed, interval_ns), seed }
    }

    /// The first point later than `after`, both as time since the checks began.
    pub fn next(&self, after: Duration) -> Duration {
        let after = nanoseconds(after);
        let whole = after.saturating_sub(self.offset_ns) / self.interval_ns;
        // Point `whole` may be later by its jitter; the next one is in any case.
        let point = Some(self.point(whole)).filter(|point| *point > after);
        Duration::from_nanos(point.unwrap_or_else(|| self.point(whole.saturating_add(1))))
    }

    fn point(&self, number: u64) -> u64 {
        let jitter = fraction(mixed(self.seed ^ mixed(number)), self.jitter_ns);
        let exact = number.saturating_mul(self.interval_ns).saturating_add(self.offset_ns);
        exact.saturating_add(jitter)
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// `whole` times `random` as a fraction of 2⁶⁴.
fn fraction(random: u64, whole: u64) -> u64 {
    let product = u128::from(random) * u128::from(whole);
    u64::try_from(product >> 64).unwrap_or(u64::MAX)
}

/// The finaliser of `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014).
fn mixed(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pace(n: u32, interval: Duration, jitter_percent: u8) -> Pace {
        let addr = SocketAddr::from(((0x0a00_0000 + n).to_be_bytes(), 80));
        Pace::new("shop", addr, interval, jitter_percent)
    }

    proptest! {
        #[test]
        fn from_point_to_point_it_is_the_interval_give_or_take_the_jitter(
            n in any::<u16>(),
            percent in 0_u8..=50,
            interval_ms in 10_u64..3_600_000,
            after_ms in 0_u64..1_000_000_000,
        ) {
            let interval = Duration::from_millis(interval_ms);
            let pace = pace(n.into(), interval, percent);
            let jitter = interval * u32::from(percent) / 100;
            let after = Duration::from_millis(after_ms);
            let first = pace.next(after);
            prop_assert!(first > after);
            let mut last = first;
            for _ in 0..20 {
                let next = pace.next(last);
                prop_assert!(next + jitter >= last + interval && next <= last + interval + jitter);
                last = next;
            }
            // They lie on a grid: chance does not add up.
            let drift = (last - first).abs_diff(interval * 20);
            prop_assert!(drift <= jitter, "{drift:?}");
            prop_assert_eq!(pace.next(first - Duration::from_nanos(1)), first);
        }
    }

    #[test]
    fn times_without_end_do_not_overflow() {
        let pace = pace(1, Duration::MAX, 50);
        assert!(pace.next(Duration::MAX) >= pace.next(Duration::ZERO));
        assert!(
            Pace::new("x", ([1, 2, 3, 4], 5).into(), Duration::ZERO, 10).next(Duration::ZERO)
                > Duration::ZERO
        );
    }

    #[test]
    fn five_thousand_targets_are_spread_evenly_at_all_times() {
        const BIN: Duration = Duration::from_millis(100);
        let interval = Duration::from_secs(2);
        let mut bins = vec![0_u32; 620];
        for n in 0..5_000 {
            let pace = pace(n, interval, 10);
            let mut at = pace.next(Duration::ZERO);
            while let Some(bin) = bins.get_mut((at.as_nanos() / BIN.as_nanos()) as usize) {
                *bin += 1;
                at = pace.next(at);
            }
        }
        // 250 on average; past the first interval, which the jitter makes a little longer.
        let steady = &bins[22..];
        let (least, most) = (steady.iter().min(), steady.iter().max());
        assert!(least > Some(&180) && most < Some(&320), "{least:?} to {most:?}");
        assert!(bins.iter().all(|bin| *bin < 320));
    }
}
