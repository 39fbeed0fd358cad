//! Handshake times, in the buckets that the program counts in.

use std::time::Duration;

use canary_ebpf_common::{
    abi::HANDSHAKE_BUCKETS,
    signals::{bucket_from_ns, bucket_ns},
};

/// The time that `permille` of a thousand handshakes don't exceed, as well as the buckets know it
/// (7 %); `None` without any.
pub fn quantile(handshakes: &[u64; HANDSHAKE_BUCKETS], permille: u16) -> Option<Duration> {
    let all: u64 = handshakes.iter().sum();
    let wanted = (u128::from(all) * u128::from(permille.min(1000))).div_ceil(1000).max(1);
    let mut seen = 0_u128;
    for (bucket, count) in (0..).zip(handshakes) {
        seen += u128::from(*count);
        if seen >= wanted {
            return Some(Duration::from_nanos(bucket_ns(bucket)));
        }
    }
    None
}

/// The upper ends of what is shown to others, in seconds: each doubling from 16 µs to 17 s. Buckets
/// of the program end there, so that nothing is counted twice or by guess.
pub fn classic(handshakes: &[u64; HANDSHAKE_BUCKETS]) -> Vec<(f64, u64)> {
    let mut shown: Vec<(f64, u64)> = Vec::new();
    let mut count = 0;
    for (bucket, n) in (0..).zip(handshakes) {
        count += n;
        if bucket % 8 == 0 && bucket > 0 {
            shown.push((bucket_from_ns(bucket + 1) as f64 / 1e9, count));
            count = 0;
        }
    }
    shown.push((f64::MAX, count));
    shown
}

#[cfg(test)]
mod tests {
    use canary_ebpf_common::signals::bucket;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_has_no_quantile_and_one_time_has_all() {
        let mut handshakes = [0; HANDSHAKE_BUCKETS];
        assert_eq!(quantile(&handshakes, 500), None);
        handshakes[bucket(1_000_000) as usize] = 7;
        for permille in [0, 500, 999, 1000] {
            let found = quantile(&handshakes, permille).unwrap().as_secs_f64();
            assert!((found / 0.001 - 1.0).abs() < 0.07, "{found}");
        }
    }

    #[test]
    fn what_is_shown_counts_each_once() {
        let handshakes = [3; HANDSHAKE_BUCKETS];
        let shown = classic(&handshakes);
        assert_eq!(shown.iter().map(|(_, n)| n).sum::<u64>(), 3 * HANDSHAKE_BUCKETS as u64);
        assert!(shown.is_sorted_by(|a, b| a.0 < b.0));
        assert!((shown[0].0 - 16.384e-6).abs() < 1e-12, "{}", shown[0].0);
    }

    proptest! {
        #[test]
        fn a_quantile_is_off_by_less_than_seven_percent(
            mut times in prop::collection::vec(10_000_u64..10_000_000_000, 1..200),
            permille in 1_u16..=1000,
        ) {
            let mut handshakes = [0; HANDSHAKE_BUCKETS];
            times.iter().for_each(|ns| handshakes[bucket(*ns) as usize] += 1);
            times.sort_unstable();
            let rank = (times.len() * usize::from(permille)).div_ceil(1000).max(1) - 1;
            let found = quantile(&handshakes, permille).unwrap().as_nanos() as f64;
            let error = found / times[rank] as f64 - 1.0;
            prop_assert!(error.abs() < 0.07, "{found} for {}", times[rank]);
        }
    }
}
