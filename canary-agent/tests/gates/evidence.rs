//! The statistic against its definition, against published values, and its properties.

use canary_agent::rollout::evidence::{BETTER, Evidence, WORSE, ln_threshold};
use proptest::prelude::*;

use crate::exact::{self, Row};

fn evidence(null: f64, multiples: [f64; 5], rows: &[Row]) -> Evidence {
    let mut evidence = Evidence::new(null, multiples);
    for (share, control, canary) in rows {
        evidence.add(*share, u64::from(*control), u64::from(*canary));
    }
    evidence
}

/// How far two logarithms may be apart that were summed over `rows`: some units in the last
/// place of what was summed.
fn tolerance(rows: &[Row]) -> f64 {
    let events: f64 = rows.iter().map(|(_, control, canary)| f64::from(control + canary)).sum();
    1e-12 + events * 1e-14
}

fn share() -> impl Strategy<Value = f64> {
    prop_oneof![
        0.000_01..0.999_99_f64,
        prop::sample::select(vec![1e-9, 0.001, 0.05, 0.5, 0.75, 0.999, 1.0 - 1e-12]),
    ]
}

fn rows(most: u32) -> impl Strategy<Value = Vec<Row>> {
    prop::collection::vec((share(), 0..most, 0..most / 4 + 1), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_statistics_are_what_their_definition_says(
        rows in rows(24),
        tolerate in 1.0..5.0_f64,
        pass_below in 1.1..10.0_f64,
    ) {
        for (null, multiples, exactly) in
            [(tolerate, WORSE, exact::worse()), (pass_below, BETTER, exact::better())]
        {
            let ours = evidence(null, multiples, &rows).ln();
            let theirs = exact::ln(&exact::statistic(&exact::of(null), &exactly, &rows));
            prop_assert!(
                (ours - theirs).abs() <= tolerance(&rows),
                "{ours} is not {theirs}, for {null} over {rows:?}"
            );
        }
    }

    #[test]
    fn each_bad_event_speaks_against_its_side(rows in rows(1000), at in share()) {
        for (null, multiples, sign) in [(1.2, WORSE, 1.0), (3.0, BETTER, -1.0)] {
            let before = evidence(null, multiples, &rows);
            let (mut canary, mut control) = (before, before);
            canary.add(at, 0, 1);
            control.add(at, 1, 0);
            let room = tolerance(&rows);
            prop_assert!(sign * (canary.ln() - before.ln()) >= -room);
            prop_assert!(sign * (control.ln() - before.ln()) <= room);
        }
    }

    #[test]
    fn who_is_called_the_canary_makes_no_difference(rows in rows(100), null in 1.0..5.0_f64) {
        let ours = evidence(null, WORSE, &rows);
        let swapped: Vec<Row> = rows.iter().map(|(share, a, b)| (1.0 - share, *b, *a)).collect();
        // One minus a share is rounded, so that the shares are not quite each other's.
        let other = evidence(1.0 / null, WORSE.map(|multiple| 1.0 / multiple), &swapped);
        let room = 1e-6 * (1.0 + ours.ln().abs());
        prop_assert!((ours.ln() - other.ln()).abs() < room, "{} {}", ours.ln(), other.ln());
    }

    #[test]
    fn windows_may_be_joined_while_the_share_stands(rows in rows(100), at in share()) {
        let apart: Vec<Row> = rows.iter().map(|(_, a, b)| (at, *a, *b)).collect();
        let sum = |of: fn(&Row) -> u32| apart.iter().map(of).sum::<u32>();
        let joined = [(at, sum(|row| row.1), sum(|row| row.2))];
        let (apart, joined) = (evidence(1.2, WORSE, &apart).ln(), evidence(1.2, WORSE, &joined).ln());
        prop_assert!((apart - joined).abs() < 1e-9 * (1.0 + apart.abs()));
    }

    #[test]
    fn what_is_kept_goes_on_as_if_nothing_had_happened(rows in rows(1_000_000), at in any::<prop::sample::Index>()) {
        let (first, second) = rows.split_at(at.index(rows.len()));
        let whole = evidence(1.2, WORSE, &rows);
        let kept = serde_json::to_string(&evidence(1.2, WORSE, first)).expect("serialisable");
        let mut again: Evidence = serde_json::from_str(&kept).expect("reads back");
        for (share, control, canary) in second {
            again.add(*share, u64::from(*control), u64::from(*canary));
        }
        prop_assert_eq!(again, whole);
        prop_assert_eq!(again.ln().to_bits(), whole.ln().to_bits());
    }
}

/// For one ratio against another the statistic is Wald's. With θ₀ = 0.01 and θ₁ = 0.1, that
/// is a share of 1 % and a ratio of 11, the NIST/SEMATECH e-Handbook of Statistical Methods
/// (section 6.2.6, sequential sampling) gives k = 1.0414 in decimal logarithms, and lines of
/// slope 0.0397 that begin at −0.939 for α = 0.05, β = 0.1 and at 1.205.
#[test]
fn one_alternative_gives_the_published_plan() {
    let with = |control, canary| {
        let mut evidence = Evidence::new(1.0, [11.0; 5]);
        evidence.add(0.01, control, canary);
        evidence.ln() / std::f64::consts::LN_10
    };
    let k = with(0, 1) - with(1, 0);
    assert!((k - 1.0414).abs() < 5e-5, "{k}");
    let slope = -with(1, 0) / k;
    assert!((slope - 0.0397).abs() < 1e-4, "{slope}");
    let accept = (0.95_f64 / 0.1).log10() / k;
    let reject = (0.9_f64 / 0.05).log10() / k;
    assert!((accept - 0.939).abs() < 5e-4 && (reject - 1.205).abs() < 5e-4);
    // The first number of defects out of 24 and 26 that the plan rejects at.
    for (n, expected) in [(24, 3), (26, 3), (30, 3), (50, 4)] {
        let rejects = (0..=n).find(|x| with(n - x, *x) >= (0.9_f64 / 0.05).log10());
        assert_eq!(rejects, Some(expected), "{n}");
    }
}

/// With a null of 1 and a share of a half, θ₀ is a half and θₖ is r ÷ (r + 1).
#[test]
fn small_cases_come_out_by_hand() {
    let mut evidence = Evidence::new(1.0, [2.0; 5]);
    evidence.add(0.5, 1, 2);
    let by_hand = ((4.0_f64 / 3.0).powi(2) * (2.0 / 3.0)).ln();
    assert!((evidence.ln() - by_hand).abs() < 1e-15, "{}", evidence.ln());
    let mut evidence = Evidence::new(1.0, WORSE);
    evidence.add(0.5, 0, 1);
    let mixed: f64 = [1.5, 2.0, 3.0, 5.0, 10.0].iter().map(|r| 2.0 * r / (r + 1.0) / 5.0).sum();
    assert!((evidence.ln() - mixed.ln()).abs() < 1e-15, "{}", evidence.ln());
}

/// Under the null, E is worth 1 on average, whatever the share: the sum over all outcomes of
/// their probabilities times E, in whole fractions, is exactly that.
#[test]
fn under_the_null_the_statistic_is_worth_one() {
    use num_rational::BigRational;
    use num_traits::{One, Zero};
    let null = exact::fraction(6, 5);
    for share in [0.001, 0.05, 0.5, 0.9] {
        let canarys = exact::of(share) * &null;
        let theta = &canarys / (&canarys + BigRational::one() - exact::of(share));
        let mut mean = BigRational::zero();
        let mut binomial = 1_u64;
        let events = 6_u32;
        for canary in 0..=events {
            let chance = num_traits::Pow::pow(theta.clone(), canary)
                * num_traits::Pow::pow(BigRational::one() - &theta, events - canary)
                * BigRational::from_integer(binomial.into());
            let row = [(share, events - canary, canary)];
            mean += chance * exact::reduced(exact::statistic(&null, &exact::worse(), &row));
            binomial = binomial * u64::from(events - canary) / u64::from(canary + 1);
        }
        assert_eq!(mean, BigRational::one(), "{share}");
    }
}

#[test]
fn nothing_is_learned_where_there_is_nothing_to_compare() {
    let mut evidence = Evidence::new(1.2, WORSE);
    for (share, control, canary) in [
        (0.0, 5, 3),
        (1.0, 0, 1000),
        (1.0, 7, 1000),
        (0.05, 0, 0),
        (f64::NAN, 5, 5),
        (-0.1, 5, 5),
        (1.5, 5, 5),
        (f64::INFINITY, 5, 5),
    ] {
        evidence.add(share, control, canary);
        assert_eq!(evidence.ln().to_bits(), 0.0_f64.to_bits(), "{share}");
    }
}

#[test]
fn extreme_counts_and_shares_stay_numbers() {
    for share in [f64::MIN_POSITIVE, 5e-324, 1e-300, 1e-9, 0.5, 1.0 - f64::EPSILON / 2.0] {
        for (control, canary) in [(0, u64::MAX), (u64::MAX, 0), (u64::MAX, u64::MAX), (1, 1)] {
            for (null, multiples) in [(1.0, WORSE), (100.0, WORSE), (1000.0, BETTER)] {
                let mut evidence = Evidence::new(null, multiples);
                for _ in 0..3 {
                    evidence.add(share, control, canary);
                }
                assert!(evidence.ln().is_finite(), "{share} {control} {canary} {null}");
            }
        }
    }
}

/// A billion windows of one share are one window with their sum: the sums must not have
/// drifted. (Of a billion, every thousandth is added by itself, the others a thousand at once,
/// so that large and small terms alternate.)
#[test]
fn a_billion_windows_lose_nothing() {
    let mut apart = Evidence::new(1.2, WORSE);
    let mut rows: [(u64, u64); 2] = [(0, 0); 2];
    for index in 0..1_000_000_u64 {
        let (share, at) = if index % 2 == 0 { (0.05, 0) } else { (0.001, 1) };
        for (control, canary) in [(3 + index % 5, index % 7 / 6), (3999, 211)] {
            apart.add(share, control, canary);
            rows[at].0 += control;
            rows[at].1 += canary;
        }
    }
    let mut joined = Evidence::new(1.2, WORSE);
    joined.add(0.05, rows[0].0, rows[0].1);
    joined.add(0.001, rows[1].0, rows[1].1);
    let (apart, joined) = (apart.ln(), joined.ln());
    assert!(apart.abs() > 1e6, "{apart}");
    assert!((apart - joined).abs() <= 1e-14 * apart.abs(), "{apart} {joined}");
}

#[test]
fn thresholds_are_logarithms_of_one_over_the_risk() {
    assert!((ln_threshold(0.01) - 100_f64.ln()).abs() < 1e-15);
    assert!((ln_threshold(0.05) - 20_f64.ln()).abs() < 1e-15);
}
