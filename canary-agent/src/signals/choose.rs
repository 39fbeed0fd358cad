//! How many of each version's connections are watched.
//!
//! Small versions come first: what is watched of a canary decides how soon a gate knows. The largest,
//! control as a rule, has what they leave, up to [`CONTROL_TIMES`] as much as the next: with that
//! much of it, what is to be compared with is known well, and more would teach a gate little. Each
//! version's part is 1 in a power of two, by the hash of the tuple, so that it is told from a packet
//! alone.

use canary_ebpf_common::signals::MOST_HALVINGS;

/// By how many halvings a part may be off before it is changed: each change costs what is being
/// watched at that moment.
const SLACK: f64 = 0.8;

/// How many times as much of the largest version is watched as of the next, at the most. Against as
/// much of both, a gate needs 0.56 times the canary's connections (the variance of a difference
/// goes with 1 + 1/8 in place of 1 + 1), and with all of control's 0.5 times.
const CONTROL_TIMES: f64 = 8.0;

/// How many times each version's connections are halved; `None` for a version that has none.
///
/// `shares` are the versions' parts of the service's `per_second` new connections, and together
/// at most about `budget` of these are to be watched each second. `present` is what holds now.
///
/// ```
/// use canary_agent::signals::choose::halvings;
/// // A canary of 1 % is watched whole, and of control 8 times as much: 1 in 16.
/// let chosen = halvings(&[0.99, 0.01], 1000.0, 500.0, &[None, None]);
/// assert_eq!(chosen, [Some(4), Some(0)]);
/// // Where there is room for 20 a second, both have half of it.
/// let chosen = halvings(&[0.99, 0.01], 1000.0, 20.0, &[None, None]);
/// assert_eq!(chosen, [Some(7), Some(0)]);
/// ```
pub fn halvings(
    shares: &[f64],
    per_second: f64,
    budget: f64,
    present: &[Option<u32>],
) -> Vec<Option<u32>> {
    // Where nobody knows how many will come, the shares have to do.
    let (wanted, budget) = match per_second > 0.0 {
        true => (shares.iter().map(|share| share * per_second).collect(), budget),
        false => (shares.to_vec(), f64::INFINITY),
    };
    let watched = watched(&wanted, budget);
    let ideal: Vec<Option<f64>> = wanted
        .iter()
        .zip(watched)
        .map(|(all, part)| {
            let most = f64::from(MOST_HALVINGS);
            (*all > 0.0).then(|| (all / part.max(f64::MIN_POSITIVE)).log2().clamp(0.0, most))
        })
        .collect();
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

/// How many of each version's `all` connections are watched: together at most `budget`, nobody more
/// than who is not watched whole, and the largest at most [`CONTROL_TIMES`] as many as the next.
fn watched(all: &[f64], budget: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..all.len()).filter(|at| all[*at] > 0.0).collect();
    order.sort_by(|a, b| all[*a].total_cmp(&all[*b]));
    let mut watched = vec![0.0; all.len()];
    let (mut left, mut next) = (budget, None);
    for (done, at) in order.iter().enumerate() {
        let waiting = order.len() - done;
        let most = match next {
            Some(next) if waiting == 1 => CONTROL_TIMES * next,
            _ => f64::INFINITY,
        };
        watched[*at] = all[*at].min(left / waiting as f64).min(most);
        left -= watched[*at];
        next = Some(watched[*at]);
    }
    watched
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
        assert_eq!(halvings(&[0.75, 0.25], 0.0, 100.0, &[None; 2]), [Some(0), Some(0)]);
        assert_eq!(halvings(&[0.99, 0.01], 0.0, 100.0, &[None; 2]), [Some(4), Some(0)]);
        assert_eq!(halvings(&[1.0, 0.0], 0.0, 100.0, &[None; 2]), [Some(0), None]);
    }

    #[test]
    fn what_nearly_fits_stays() {
        let present = [Some(3), Some(0)];
        assert_eq!(halvings(&[0.985, 0.015], 1000.0, 500.0, &present), present);
        assert_eq!(halvings(&[0.9, 0.1], 1000.0, 500.0, &present), [Some(1), Some(0)]);
    }

    #[test]
    fn a_third_version_with_next_to_nothing_takes_nothing_from_the_canary() {
        let chosen = halvings(&[0.9489, 0.05, 0.0011], 1000.0, 500.0, &[None; 3]);
        assert_eq!(chosen, [Some(1), Some(0), Some(0)]);
    }

    #[test]
    fn versions_of_one_size_share_the_room() {
        let chosen = halvings(&[0.5, 0.25, 0.25], 1000.0, 300.0, &[None; 3]);
        assert_eq!(chosen, [Some(2), Some(1), Some(1)]);
    }

    proptest! {
        #[test]
        fn small_versions_are_watched_whole_and_all_within_the_budget(
            canary in 0.0001_f64..0.9999,
            per_second in 1.0_f64..1e6,
            budget in 10.0_f64..1e4,
        ) {
            let shares = [1.0 - canary, canary];
            let chosen = halvings(&shares, per_second, budget, &[None; 2]);
            let seconds = seconds(&shares, per_second, &chosen);
            let (large, small) = (seconds[0].max(seconds[1]), seconds[0].min(seconds[1]));
            prop_assert!(large <= small * CONTROL_TIMES * 2_f64.sqrt() * 1.01, "{large} and {small} a second");
            prop_assert!(large + small <= budget * 1.5, "{} a second of {budget}", large + small);
            let whole = canary.min(1.0 - canary) * per_second;
            prop_assert!(small >= whole.min(budget / 2.0) * 0.7, "{small} a second of {whole}");
            let again = halvings(&shares, per_second, budget, &chosen);
            prop_assert_eq!(again, chosen);
        }
    }
}
