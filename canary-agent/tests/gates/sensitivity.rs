//! What is said of a gate before it has seen anything, against the gate itself.

use std::time::Duration;

use canary_agent::{
    config::model::{
        self,
        SignalKind::{ConnectFailed, ServerReset},
    },
    rollout::{
        evidence::{AtOneShare, BETTER, Evidence, WORSE},
        gate::Gate,
        sensitivity::{Ends, Rate, Sensitivity, Traffic},
    },
};
use proptest::prelude::*;

use crate::{
    simulation::{RATE, Second, many, median, runs, usual},
    verdict::{config, signal},
};

const HOUR: f64 = 3600.0;

fn traffic(per_second: f64, share: f64) -> Traffic {
    Traffic { control: per_second * (1.0 - share), canary: per_second * share }
}

fn ends(config: &model::Gate, traffic: Traffic, rates: &[Rate]) -> Ends {
    let sensitivity = Sensitivity::new(&Gate::new(config), traffic).expect("something to compare");
    sensitivity.ends(rates, config.deadline)
}

/// The gate itself, looked at every second, over as many runs as there are.
#[test]
fn it_says_what_the_gate_does() {
    let terms = usual();
    let count = runs().max(60);
    for (stream, (base, share, ratio)) in [
        (0.002, 0.05, 1.0),
        (0.002, 0.05, 2.0),
        (0.002, 0.05, 5.0),
        (0.002, 0.5, 5.0),
        (0.002, 0.01, 3.0),
        (0.0005, 0.05, 2.0),
        (0.01, 0.2, 1.5),
    ]
    .into_iter()
    .enumerate()
    {
        let said = ends(&terms, traffic(RATE, share), &[Rate { usual: base, ratio }]);
        let stream = 700 + stream as u64;
        let mut all = Vec::new();
        for batch in 0..count.div_ceil(runs()) as u64 {
            let world = |_| Second::quiet(share, base, ratio);
            all.extend(many(stream + 100 * batch, &terms, &world, false));
        }
        let of = all.len() as f64;
        let failed: Vec<f64> =
            all.iter().filter_map(|one| one.aborted).map(|(second, _)| second as f64).collect();
        let passed = all.iter().filter(|one| one.passed).count() as f64 / of;
        let case = format!("×{ratio} of {base} at {share}");
        // Four times what chance may do to both.
        let slack = |part: f64| {
            let spread = (part * (1.0 - part)).max(0.02) * (1.0 / of + 1.0 / 200.0);
            4.0 * spread.sqrt()
        };
        let found = failed.len() as f64 / of;
        let (fails, passes) = (said.failed_within(HOUR), said.passed_within(HOUR));
        assert!((fails - found).abs() <= slack(found), "{case}: {fails} fail, of {found}");
        assert!((passes - passed).abs() <= slack(passed), "{case}: {passes} pass, of {passed}");
        if found > 0.3 {
            let (said, seen) = (said.half_of_failed(HOUR), median(failed));
            let (said, seen) = (said.expect("some fail"), seen.expect("some fail"));
            assert!(
                (said / seen - 1.0).abs() < 0.4 || (said - seen).abs() <= 1.0,
                "{case}: after {said} s, of {seen}"
            );
        }
    }
}

#[test]
fn several_signals_are_waited_for_and_share_alpha() {
    let one = config(vec![signal(ConnectFailed, false)]);
    let two = config(vec![signal(ConnectFailed, false), signal(ServerReset, false)]);
    let at = traffic(100.0, 0.1);
    let rate = |usual, ratio| Rate { usual, ratio };
    let alone = ends(&one, at, &[rate(0.01, 1.0)]);
    let both = ends(&two, at, &[rate(0.01, 1.0), rate(0.000_05, 1.0)]);
    assert!(alone.passed_within(HOUR) > 0.9, "{alone:?}");
    assert!(both.passed_within(HOUR) < 0.3, "a rare signal is waited for: {both:?}");
    assert_eq!((alone.waited_for(), both.waited_for()), (None, Some(1)));
    let found = |ends: &Ends| ends.part_failed(0.5).expect("found");
    let (alone, both) = (
        ends(&one, at, &[rate(0.01, 3.0)]),
        ends(&two, at, &[rate(0.01, 3.0), rate(0.000_05, 1.0)]),
    );
    assert!(found(&both) >= found(&alone), "its part of alpha is smaller");
}

#[test]
fn it_never_passes_where_too_much_of_control_is_bad() {
    let terms = usual();
    let healthy = |usual| ends(&terms, traffic(RATE, 0.05), &[Rate { usual, ratio: 1.0 }]);
    let (just, more) = (healthy(0.33), healthy(0.34));
    assert_eq!(just.passed_within(HOUR), 1.0);
    assert_eq!(more.passed_within(HOUR), 0.0);
    assert_eq!(more.waited_for(), Some(0));
}

#[test]
fn nothing_is_said_where_nothing_can_be_compared() {
    let gate = Gate::new(&config(vec![signal(ConnectFailed, false)]));
    for (control, canary) in
        [(0.0, 5.0), (5.0, 0.0), (0.0, 0.0), (f64::NAN, 1.0), (f64::INFINITY, 1.0)]
    {
        assert!(Sensitivity::new(&gate, Traffic { control, canary }).is_none());
    }
    // Without a bad event it neither fails nor passes.
    let silent = ends(
        &config(vec![signal(ConnectFailed, false)]),
        traffic(1e3, 0.1),
        &[Rate { usual: 0.0, ratio: 9.0 }],
    );
    assert_eq!((silent.failed_within(HOUR), silent.passed_within(HOUR)), (0.0, 0.0));
    assert_eq!((silent.part_failed(0.5), silent.half_of_failed(HOUR)), (None, None));
}

#[test]
fn it_passes_not_before_the_time_and_decides_no_later_than_asked() {
    let config = config(vec![signal(ConnectFailed, false)]);
    let healthy = [Rate { usual: 0.05, ratio: 1.0 }];
    let said = ends(&config, traffic(5000.0, 0.2), &healthy);
    assert_eq!(said.part_passed(0.9), Some(300.0));
    assert_eq!(said.passed_within(299.0), 0.0);
    let sensitivity =
        Sensitivity::new(&Gate::new(&config), traffic(1.0, 0.01)).expect("something to compare");
    let rare = [Rate { usual: 0.001, ratio: 1.0 }];
    let short = sensitivity.ends(&rare, config.deadline);
    assert_eq!(short.passed_within(HOUR), 0.0);
    let long = sensitivity.ends(&rare, Duration::from_secs(3600 * 100_000));
    assert!(long.part_passed(0.9).expect("in the end") > HOUR);
}

proptest! {
    #[test]
    fn counts_at_one_share_weigh_the_same_at_once(
        windows in prop::collection::vec((0_u64..200, 0_u64..200), 1..30),
        share in 1e-6_f64..1.0,
        null in 1.0_f64..10.0,
        threshold in 1.0_f64..20.0,
    ) {
        for multiples in [WORSE, BETTER] {
            let mut evidence = Evidence::new(null, multiples);
            let (mut control, mut canary) = (0, 0);
            let at_once = AtOneShare::new(null, multiples, share);
            for (more_control, more_canary) in &windows {
                evidence.add(share, *more_control, *more_canary);
                (control, canary) = (control + more_control, canary + more_canary);
                let ln = at_once.ln(control, canary);
                let off = (ln - evidence.ln()).abs();
                prop_assert!(off <= 1e-8 * (1.0 + evidence.ln().abs()), "{ln} {}", evidence.ln());
                prop_assert_eq!(at_once.reaches(threshold, control, canary), ln >= threshold);
            }
        }
    }
}
