//! How many of each version's connections are watched.
//!
//! A canary and control should have about as many watched connections: more of control's teach
//! a gate little, and take the room. Each version's part is 1 in a power of two, by the hash of the
//! tuple, so that it is told from a packet alone.

use canary_ebpf_common::signals::MOST_HALVINGS;

/// By how many halvings a part may be off before it is changed: each change costs what is being
/// watched at that moment.
const SLACK: f64 = 0.8;

/// How many times each version's connections are halved; `None` for a version that has none.
///
/// `shares` are the versions' parts of the service's `per_second` new connections, and together
/// at most about `budget` of these are to be watched each second. `present` is what holds now.
///
/// ```
/// use canary_agent::signals::choose::halvings;
/// // A canary of 1 % is watched whole, and control 1 in 128.
/// let chosen = halvings(&[0.99, 0.01], 1000.0, 500.0, &[None, None]);
/// assert_eq!(chosen, [Some(7), Some(0)]);
/// ```
pub fn halvings(
    shares: &[f64],
    per_second: f64,
    budget: f64,
    present: &[Option<u32>],
) -> Vec<Option<u32>> {
    let live = shares.iter().filter(|share| **share > 0.0).count().max(1) as f64;
    let least = shares.iter().copied().filter(|share| *share > 0.0).fold(1.0, f64::min);
    // What each of them may have; not more than the least of them has.
    let each = (budget / live).min(least * per_second).max(f64::MIN_POSITIVE);
    let ideal = shares.iter().map(|share| {
        (*share > 0.0)
            .then(|| (share * per_second / each).log2().clamp(0.0, f64::from(MOST_HALVINGS)))
    });
    let ideal: Vec<Option<f64>> = match per_second > 0.0 {
        true => ideal.collect(),
        // Nobody knows how many will come: by their shares alone.
        false => shares
            .iter()
            .map(|share| {
                let most = f64::from(MOST_HALVINGS);
                (*share > 0.0).then(|| (share / least).log2().clamp(0.0, most))
            })
            .collect(),
    };
    let fits = ideal.len() == present.len()
        && ideal.iter().zip(present).all(|(ideal, present)| match (ideal, present) {
            (Some(ideal), Some(present)) => (ideal - f64::from(*present)).abs() <= SLACK,
            (None, None) => true,
            _ => false,
        });
    match fits {
        true => present.to_vec(),
        false => ideal.iter().map(|one| one.map(|halvings| halvings.round() as u32)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(shares: &[f64], per_second: f64, chosen: &[Option<u32>]) -> Vec<f64> {
        let watched = shares.iter().zip(chosen);
        watched
            .filter_map(|(share, chosen)| Some(share * per_second / 2_f64.powi((*chosen)? as i32)))
            .collect()
    }

    #[test]
    fn a_service_without_traffic_goes_by_its_shares() {
        assert_eq!(halvings(&[0.75, 0.25], 0.0, 100.0, &[None; 2]), [Some(2), Some(0)]);
        assert_eq!(halvings(&[1.0, 0.0], 0.0, 100.0, &[None; 2]), [Some(0), None]);
    }

    #[test]
    fn what_nearly_fits_stays() {
        let present = [Some(6), Some(0)];
        assert_eq!(halvings(&[0.985, 0.015], 1000.0, 500.0, &present), present);
        assert_eq!(halvings(&[0.9, 0.1], 1000.0, 500.0, &present), [Some(3), Some(0)]);
    }

    proptest! {
        #[test]
        fn versions_have_about_as_many_and_together_about_the_budget(
            canary in 0.0001_f64..0.9999,
            per_second in 1.0_f64..1e6,
            budget in 10.0_f64..1e4,
        ) {
            let shares = [1.0 - canary, canary];
            let chosen = halvings(&shares, per_second, budget, &[None; 2]);
            let seconds = seconds(&shares, per_second, &chosen);
            let (a, b) = (seconds[0], seconds[1]);
            prop_assert!((a / b).log2().abs() <= 1.01, "{a} and {b} a second");
            prop_assert!(a + b <= budget * 1.5, "{} a second of {budget}", a + b);
            let again = halvings(&shares, per_second, budget, &chosen);
            prop_assert_eq!(again, chosen);
        }
    }
}
