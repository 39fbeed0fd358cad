//! What a gate makes of its signals' evidence.

use std::{sync::Arc, time::Duration};

use canary_agent::{
    config::model::{self, KernelSignal, Probe, ProbeAsk, Signal, SignalKind},
    rollout::{
        gate::{Changed, Counts, Decision, Gate, Name, Progress, Verdict, Window},
        watch::{Counted, Watch},
    },
};
use proptest::prelude::*;

use SignalKind::{ConnectFailed, ServerReset, SlowHandshake};

pub(crate) fn signal(kind: SignalKind, observe: bool) -> Signal {
    let quantile_permille = (kind == SlowHandshake).then_some(950);
    let (tolerate, pass_below) = (1.2, 3.0);
    Signal::Kernel(KernelSignal { kind, quantile_permille, tolerate, pass_below, observe })
}

pub(crate) fn config(signals: Vec<Signal>) -> model::Gate {
    model::Gate {
        name: "l4".to_owned(),
        alpha: 0.01,
        beta: 0.05,
        min_duration: Duration::from_secs(300),
        deadline: Duration::from_secs(3600),
        signals,
    }
}

fn counts(control_events: u64, canary_events: u64) -> Counts {
    Counts { share: 0.05, control_events, canary_events, control_connections: None }
}

/// A gate that is shown one window after the other, each a second long.
struct Shown {
    gate: Gate,
    seconds: u64,
}

impl Shown {
    fn new(signals: Vec<Signal>) -> Self {
        Self { gate: Gate::new(&config(signals)), seconds: 0 }
    }

    fn watch(&mut self, counts: &[(SignalKind, Counts)]) -> Option<Verdict> {
        self.lasting(1, true, counts)
    }

    fn lasting(
        &mut self,
        seconds: u64,
        complete: bool,
        counts: &[(SignalKind, Counts)],
    ) -> Option<Verdict> {
        self.seconds += seconds;
        self.gate.watch(&Window {
            elapsed: Duration::from_secs(self.seconds),
            watched: Duration::from_secs(seconds),
            complete,
            counts,
        })
    }

    fn decision(&self) -> Decision {
        self.gate.progress().decision.expect("decided")
    }
}

#[test]
fn one_that_can_not_decide_says_what_it_has_waited_for() {
    let signals = vec![signal(ConnectFailed, false), signal(ServerReset, false)];
    let observed = signal(SlowHandshake, true);
    let terms = Arc::new(config([signals, vec![observed]].concat()));
    let mut watch = Watch::new(&terms);
    let (connections, events) = ([1_900, 100], vec![(ServerReset, [400, 20])]);
    let window = |at: u64| Counted {
        service: "shop".to_owned(),
        canary: "v2".to_owned(),
        watched: Duration::from_secs(1),
        complete: true,
        slow_ns: at,
        connections,
        events: events.clone(),
    };
    for second in 0..terms.deadline.as_secs() {
        watch.pass_time(1_000);
        watch.count(&window(second));
    }
    assert_eq!(watch.verdict(), Some(Verdict::NoData));
    assert_eq!(
        watch.kept().because.as_deref(),
        Some("connect_failed: 0 on the canary, 0 on control; evidence 0.0 of 3.0 that it is good")
    );
}

/// Half of control is slow, since all have become slower since it was said what slow is. A canary
/// of which all are is twice as bad, and that is less than three times.
#[test]
fn nothing_speaks_for_a_canary_where_much_of_control_is_bad() {
    let window = |control_events, canary_events| {
        let share = 0.5;
        let control_connections = Some(100);
        [(SlowHandshake, Counts { share, control_events, canary_events, control_connections })]
    };
    let mut lenient = signal(SlowHandshake, false);
    if let Signal::Kernel(signal) = &mut lenient {
        signal.tolerate = 2.0;
    }
    let mut shown = Shown::new(vec![lenient]);
    while shown.watch(&window(50, 100)).is_none() {}
    assert_eq!(shown.decision().verdict, Verdict::Inconclusive);
    let seen = shown.gate.progress().signals[0].clone();
    assert_eq!((seen.saturated_windows, seen.pass.ln()), (3_600, 0.0));
    assert!(seen.fail.ln() < 0.0);

    // That it is worse than what is tolerated can still be said.
    let mut shown = Shown::new(vec![signal(SlowHandshake, false)]);
    while shown.watch(&window(50, 100)).is_none() {}
    assert_eq!(shown.decision().verdict, Verdict::Fail);

    // Just below a third there is room for a canary that is three times as bad.
    let mut shown = Shown::new(vec![signal(SlowHandshake, false)]);
    while shown.watch(&window(33, 33)).is_none() {}
    assert_eq!(shown.decision().verdict, Verdict::Pass);
    assert_eq!(shown.gate.progress().signals[0].saturated_windows, 0);
}

#[test]
fn what_made_it_impossible_to_tell_is_said() {
    let terms = Arc::new(config(vec![signal(SlowHandshake, false)]));
    let mut watch = Watch::new(&terms);
    let window = Counted {
        service: "shop".to_owned(),
        canary: "v2".to_owned(),
        watched: Duration::from_secs(1),
        complete: true,
        slow_ns: 1,
        connections: [100, 100],
        events: vec![(SlowHandshake, [40, 40])],
    };
    while watch.verdict().is_none() {
        watch.pass_time(1_000);
        watch.count(&window);
    }
    assert_eq!(watch.verdict(), Some(Verdict::Inconclusive));
    let because = watch.kept().because.as_deref().expect("a reason");
    assert!(
        because.ends_with("in 3599 of 3599 windows too much of control was bad to tell"),
        "{because}"
    );
}

#[test]
fn it_fails_at_once_and_stays_failed() {
    let mut shown = Shown::new(vec![signal(ConnectFailed, false), signal(ServerReset, false)]);
    // α is shared by two.
    assert!((shown.gate.ln_fail_at() - 200_f64.ln()).abs() < 1e-12);
    assert_eq!(shown.watch(&[(ConnectFailed, counts(3, 2)), (ServerReset, counts(4, 0))]), None);
    assert_eq!(shown.watch(&[(ConnectFailed, counts(2, 9))]), Some(Verdict::Fail));
    let decision = Decision {
        verdict: Verdict::Fail,
        signal: Some(Name(ConnectFailed)),
        elapsed_ms: 2000,
        windows: 2,
    };
    assert_eq!(shown.decision(), decision);
    for _ in 0..1000 {
        assert_eq!(shown.watch(&[(ConnectFailed, counts(1000, 1))]), Some(Verdict::Fail));
    }
    assert_eq!(shown.decision(), decision);
    // Its evidence is still weighed.
    assert!(shown.gate.progress().signals[0].fail.ln() < 0.0);
}

#[test]
fn it_passes_when_all_have_and_not_before_the_time() {
    let both = vec![signal(ConnectFailed, false), signal(ServerReset, false)];
    let mut shown = Shown::new(both);
    for second in 1..=299 {
        let seen = [(ConnectFailed, counts(20, 1)), (ServerReset, counts(20, 1))];
        assert_eq!(shown.watch(&seen), None, "{second}");
    }
    assert!(shown.gate.progress().signals[0].pass.ln() > shown.gate.ln_pass_at());
    assert_eq!(shown.watch(&[]), Some(Verdict::Pass));
    assert_eq!((shown.decision().elapsed_ms, shown.decision().signal), (300_000, None));

    // One of two is not enough.
    let mut shown = Shown::new(vec![signal(ConnectFailed, false), signal(ServerReset, false)]);
    for _ in 0..3599 {
        assert_eq!(shown.watch(&[(ConnectFailed, counts(20, 1))]), None);
    }
    assert_eq!(shown.watch(&[(ConnectFailed, counts(20, 1))]), Some(Verdict::NoData));
    assert_eq!(shown.decision().signal, Some(Name(ServerReset)));
}

#[test]
fn what_only_observes_takes_no_part() {
    let mut shown = Shown::new(vec![signal(ConnectFailed, false), signal(ServerReset, true)]);
    assert!((shown.gate.ln_fail_at() - 100_f64.ln()).abs() < 1e-12);
    for _ in 0..299 {
        let seen = [(ConnectFailed, counts(20, 1)), (ServerReset, counts(0, 20))];
        assert_eq!(shown.watch(&seen), None);
    }
    assert!(shown.gate.progress().signals[1].fail.ln() > 1000.0);
    assert_eq!(shown.watch(&[]), Some(Verdict::Pass));
}

#[test]
fn at_the_deadline_it_gives_up() {
    let only = || vec![signal(ConnectFailed, false)];
    let mut shown = Shown::new(only());
    for _ in 0..3599 {
        assert_eq!(shown.watch(&[]), None);
    }
    assert_eq!(shown.watch(&[]), Some(Verdict::NoData));

    let mut shown = Shown::new(only());
    assert_eq!(shown.watch(&[(ConnectFailed, counts(1, 0))]), None);
    assert_eq!(shown.lasting(3599, true, &[]), Some(Verdict::Inconclusive));
    assert_eq!(shown.decision().signal, Some(Name(ConnectFailed)));

    // What is seen in a window that begins later changes nothing.
    let mut shown = Shown::new(only());
    assert_eq!(shown.lasting(1, true, &[(ConnectFailed, counts(1, 0))]), None);
    shown.seconds = 3600;
    assert_eq!(shown.watch(&[(ConnectFailed, counts(0, 500))]), Some(Verdict::Inconclusive));
    // But a window that ends there does count.
    let mut shown = Shown::new(only());
    assert_eq!(shown.lasting(3600, true, &[(ConnectFailed, counts(0, 9))]), Some(Verdict::Fail));
}

#[test]
fn windows_that_lost_events_teach_nothing_and_do_not_count_as_watched() {
    let mut shown = Shown::new(vec![signal(ConnectFailed, false)]);
    for _ in 0..400 {
        assert_eq!(shown.lasting(1, false, &[(ConnectFailed, counts(20, 30))]), None);
    }
    let progress = shown.gate.progress();
    assert_eq!((progress.windows, progress.incomplete_windows, progress.watched_ms), (0, 400, 0));
    assert_eq!(progress.signals[0].canary_events, 0);
    // Nor does time in which nobody watched.
    shown.seconds += 1000;
    for _ in 0..299 {
        assert_eq!(shown.watch(&[(ConnectFailed, counts(20, 1))]), None);
    }
    assert_eq!(shown.watch(&[]), Some(Verdict::Pass));
}

#[test]
fn those_who_are_asked_take_nothing_of_alpha() {
    let query = Probe {
        ask: ProbeAsk::Webhook("http://127.0.0.1:9090".to_owned()),
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(1),
        retries: 0,
        rise: 1,
        fall: 1,
        observe: false,
    };
    let gate = Gate::new(&config(vec![signal(ConnectFailed, false), Signal::Probe(query)]));
    assert_eq!(gate.deciding(), 1);
    assert_eq!(gate.signals().len(), 1);
}

#[test]
fn a_gate_that_asks_something_else_begins_again() {
    let one = config(vec![signal(ConnectFailed, false)]);
    let mut gate = Gate::new(&one);
    gate.watch(&Window {
        elapsed: Duration::from_secs(1),
        watched: Duration::from_secs(1),
        complete: true,
        counts: &[(ConnectFailed, counts(3, 1))],
    });
    let kept = gate.progress().clone();
    assert_eq!(Gate::resume(&one, kept.clone()), Ok(gate));
    let mut later = one.clone();
    (later.alpha, later.deadline) = (0.05, Duration::from_secs(7200));
    let resumed = Gate::resume(&later, kept.clone()).expect("risks and times may change");
    assert!((resumed.ln_fail_at() - 20_f64.ln()).abs() < 1e-12);
    assert_eq!(resumed.progress(), &kept);

    let mut other = one.clone();
    if let Signal::Kernel(signal) = &mut other.signals[0] {
        signal.tolerate = 1.3;
    }
    assert_eq!(Gate::resume(&other, kept.clone()), Err(Changed));
    let more = config(vec![signal(ConnectFailed, false), signal(ServerReset, false)]);
    assert_eq!(Gate::resume(&more, kept.clone()), Err(Changed));
    let another = config(vec![signal(ServerReset, false)]);
    assert_eq!(Gate::resume(&another, kept), Err(Changed));
}

fn window() -> impl Strategy<Value = (bool, Vec<(SignalKind, Counts)>)> {
    let kinds = [ConnectFailed, ServerReset, SlowHandshake];
    let some = (0.001..0.6_f64, 0..60_u64, 0..6_u64).prop_map(|(share, control, canary)| Counts {
        share,
        control_events: control,
        canary_events: canary,
        control_connections: Some(100),
    });
    let counted = prop::collection::vec(some, 3);
    let counted = counted.prop_map(move |counts| kinds.into_iter().zip(counts).collect());
    (prop::bool::weighted(0.95), counted)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_restart_in_the_middle_and_the_order_of_signals_change_nothing(
        windows in prop::collection::vec(window(), 1..40),
        restart in any::<prop::sample::Index>(),
        rotation in 0..3_usize,
    ) {
        let kinds = [ConnectFailed, ServerReset, SlowHandshake];
        let signals: Vec<Signal> = kinds.iter().map(|kind| signal(*kind, false)).collect();
        let mut rotated = signals.clone();
        rotated.rotate_left(rotation);
        let restart = restart.index(windows.len());
        let (mut whole, mut parted) = (Shown::new(signals.clone()), Shown::new(signals.clone()));
        let mut other = Shown::new(rotated);
        for (index, (complete, seen)) in windows.iter().enumerate() {
            if index == restart {
                let kept = serde_json::to_string(parted.gate.progress()).expect("serialisable");
                let kept: Progress = serde_json::from_str(&kept).expect("reads back");
                parted.gate = Gate::resume(&config(signals.clone()), kept).expect("the same");
            }
            let mut turned = seen.clone();
            turned.reverse();
            let verdict = whole.lasting(10, *complete, seen);
            prop_assert_eq!(parted.lasting(10, *complete, seen), verdict);
            prop_assert_eq!(other.lasting(10, *complete, &turned), verdict);
        }
        prop_assert_eq!(parted.gate.progress(), whole.gate.progress());
        prop_assert_eq!(other.gate.progress().decision, whole.gate.progress().decision);
        for seen in &whole.gate.progress().signals {
            prop_assert!(other.gate.progress().signals.contains(seen));
        }
    }
}
