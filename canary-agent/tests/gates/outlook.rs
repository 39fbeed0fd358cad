//! What is said of a rollout's gates before it begins.

use std::{collections::HashMap, sync::Arc, time::Duration};

use canary_agent::{
    config::model::{
        Gate, Hooks, Probe, ProbeAsk, Reaction, Rollout, Signal,
        SignalKind::{self, ConnectFailed, SlowHandshake},
        Step,
    },
    rollout::outlook::{Known, Outlook, Source, Usual, outlook, warnings},
};

use crate::verdict::{config, signal};

fn gated(share: Option<&str>, gate: &Gate) -> Step {
    let split = share.map(|share| share.parse().expect("a share"));
    Step { split, gate: Some(Arc::new(gate.clone())), ..Step::default() }
}

fn known(steps: Vec<Step>, per_second: f64) -> Known {
    let rollout = Rollout {
        name: "shop-v2".to_owned(),
        service: "shop".to_owned(),
        to: "v2".to_owned(),
        steps,
        on_fail: Reaction::Abort,
        on_inconclusive: Reaction::Hold,
        on_no_data: Reaction::Hold,
        windows: Vec::new(),
        hooks: Hooks::default(),
    };
    Known {
        rollout: Arc::new(rollout),
        per_second,
        audiences: HashMap::new(),
        others: Vec::new(),
        watched_at_most: None,
        usual: HashMap::new(),
    }
}

fn usual(known: &mut Known, kind: SignalKind, rate: f64, source: Source) {
    known.usual.insert(kind, Usual { rate, source });
}

fn said(known: &Known) -> Outlook {
    let said = outlook(known, Source::Counted, || true).expect("nobody stops it");
    assert_eq!(warnings(known, || true).as_ref(), Some(&said.warnings), "the same, sooner");
    said
}

fn l4() -> Gate {
    config(vec![signal(ConnectFailed, false), signal(SlowHandshake, true)])
}

#[test]
fn it_says_how_small_a_fault_is_found_in_what_time() {
    let steps = vec![
        Step { split: Some("0.1%".parse().expect("a share")), ..Step::default() },
        gated(Some("5%"), &l4()),
        // The share is that of the step before.
        gated(None, &l4()),
    ];
    let mut known = known(steps, 2000.0);
    usual(&mut known, ConnectFailed, 0.002, Source::Counted);
    let said = said(&known);
    assert_eq!(said.warnings, Vec::<String>::new());
    let [first, second] = &said.steps[..] else { panic!("{said:?}") };
    assert_eq!((first.step, second.step, second.share.as_str()), (2, 3, "5%"));
    assert_eq!(first.signals, second.signals);
    assert_eq!((first.canary_per_second, first.control_per_second), (100.0, 1900.0));
    assert!(first.passes.expect("compared") > 0.95 && first.false_fail.expect("compared") <= 0.03);
    assert_eq!(first.passes_after_seconds, Some(300.0));
    // What only observes decides nothing.
    let [signal] = &first.signals[..] else { panic!("{first:?}") };
    assert_eq!((signal.name.as_str(), signal.usual_source), ("connect_failed", Source::Counted));
    let smallest = signal.smallest_fault.expect("one");
    assert!((2.0..=2.5).contains(&smallest), "{signal:?}");
    // docs/gates.md: 100 %, 900 connections, 9 s.
    let five = signal.faults.iter().find(|fault| fault.ratio == 5.0).expect("tried");
    assert!(five.found == 1.0 && (0.01 - five.rate).abs() < 1e-12, "{five:?}");
    let connections = five.canary_connections.expect("found");
    assert!((600.0..=1500.0).contains(&connections), "{five:?}");
}

#[test]
fn it_warns_of_a_gate_that_can_not_decide() {
    // A connection a second of the canary, and one bad one of a thousand.
    let rare = known(vec![gated(Some("1%"), &l4()), gated(Some("100%"), &l4())], 100.0);
    let outlook = said(&rare);
    let [slow, blind] = &outlook.warnings[..] else { panic!("{outlook:?}") };
    assert!(
        slow.starts_with("step 1: gate `l4` lets a canary that is as good as control pass by its deadline of 1h in")
            && slow.contains("a `deadline` of")
            && slow.contains("would do for 90 % of them"),
        "{slow}"
    );
    assert_eq!(
        blind,
        "step 2: gate `l4` has nothing to compare at 100%: `control` gets no connections then, and it can't decide"
    );
    assert_eq!(outlook.steps[0].signals[0].usual_source, Source::Assumed);
    assert_eq!((outlook.steps[1].passes, outlook.steps[1].signals[0].smallest_fault), (None, None));
    // With hardly any traffic even the worst fault is not found.
    let outlook = said(&known(vec![gated(Some("1%"), &l4())], 0.01));
    assert!(
        outlook.warnings[1].contains(
            "finds nothing by `connect_failed` that can be relied on: a fault of ×50 is found"
        ),
        "{outlook:?}"
    );
    let outlook = said(&known(vec![Step::default()], 10.0));
    assert_eq!(
        outlook.warnings,
        ["no step has a gate: nothing but an operator would stop a bad release"]
    );
    // Others have all that is left.
    let mut crowded = known(vec![gated(Some("5%"), &l4())], 100.0);
    crowded.others = vec![0.9, 0.05];
    assert!(said(&crowded).warnings[0].contains("`control` gets no connections then"));
    let outlook = said(&known(vec![gated(None, &l4())], 100.0));
    assert!(outlook.warnings[0].contains("`v2` gets no connections then"), "{outlook:?}");
}

#[test]
fn what_is_usual_is_asked_defined_counted_or_assumed() {
    let gate = config(vec![signal(SlowHandshake, false)]);
    let mut known = known(vec![gated(Some("20%"), &gate)], 500.0);
    let source = |known: &Known| {
        let signal = &said(known).steps[0].signals[0];
        ((signal.usual_rate * 1000.0).round(), signal.usual_source)
    };
    assert_eq!(source(&known), (50.0, Source::Defined));
    usual(&mut known, SlowHandshake, 0.01, Source::Counted);
    assert_eq!(source(&known), (50.0, Source::Defined));
    usual(&mut known, SlowHandshake, 0.2, Source::Asked);
    assert_eq!(source(&known), (200.0, Source::Asked));
    // No more than all of them can be bad.
    let largest = said(&known).steps[0].signals[0].faults.last().map(|fault| fault.ratio);
    assert_eq!(largest, Some(5.0));
}

#[test]
fn those_who_are_asked_take_their_time() {
    let ask = |interval: u64, rise: u32, observe: bool| {
        Signal::Probe(Probe {
            ask: ProbeAsk::Command(vec!["/bin/true".to_owned()]),
            interval: Duration::from_secs(interval),
            timeout: Duration::from_secs(5),
            retries: 0,
            rise,
            fall: 3,
            observe,
        })
    };
    // Without traffic, too.
    let outlook = said(&known(vec![gated(Some("5%"), &config(vec![ask(10, 2, false)]))], 0.0));
    assert_eq!(outlook.warnings, Vec::<String>::new());
    let step = &outlook.steps[0];
    assert_eq!((step.passes, step.signals.len()), (None, 0));
    assert_eq!(step.probes[0].passes_after_seconds, 10.0);
    assert_eq!(step.probes[0].fails_after_seconds, 20.0);
    let late = config(vec![ask(1800, 3, false), ask(3600, 9, true)]);
    let outlook = said(&known(vec![gated(Some("5%"), &late)], 0.0));
    let [rise, fall] = &outlook.warnings[..] else { panic!("{outlook:?}") };
    assert_eq!(
        rise,
        "step 1: gate `l4` can't pass by its deadline of 1h: `rise` = 3 answers of the command, one every 30m, take 1h"
    );
    assert!(fall.contains("can't fail"), "{fall}");
}

#[test]
fn it_ends_when_nobody_waits_any_more() {
    let known = known(vec![gated(Some("5%"), &l4())], 2000.0);
    assert_eq!(outlook(&known, Source::Counted, || false), None);
    assert_eq!(warnings(&known, || false), None);
}

#[test]
fn what_is_not_watched_teaches_nothing() {
    let mut known = known(vec![gated(Some("5%"), &l4())], 2000.0);
    usual(&mut known, ConnectFailed, 0.002, Source::Counted);
    let all = said(&known);
    known.watched_at_most = Some(100.0);
    let some = said(&known);
    let [all, some] = [&all.steps[0], &some.steps[0]];
    assert_eq!((all.canary_watched_per_second, all.control_watched_per_second), (100.0, 1900.0));
    assert_eq!((some.canary_per_second, some.control_per_second), (100.0, 1900.0));
    // Half of the canary's, and about as many of control's.
    assert_eq!((some.canary_watched_per_second, some.control_watched_per_second), (50.0, 59.375));
    let after = |step: &canary_agent::rollout::outlook::StepOutlook| {
        let five = step.signals[0].faults.iter().find(|fault| fault.ratio == 5.0).expect("tried");
        five.canary_connections.expect("found")
    };
    assert!(after(some) > 3.0 * after(all), "{} and {}", after(some), after(all));
}

#[test]
fn a_step_for_an_audience_goes_by_its_connections_and_by_control_of_everyone_where_it_has_none() {
    let staff = |share: &str| Step {
        audience: Some("staff".to_owned()),
        ..gated(Some(share), &config(vec![signal(ConnectFailed, false)]))
    };
    let last = Step { split: Some("100%".parse().expect("a share")), ..Step::default() };
    let mut known = known(vec![staff("25%"), staff("100%"), last], 1_000.0);
    known.audiences.insert("staff".to_owned(), 40.0);
    let said = said(&known);
    let rates = |at: usize| {
        let step = &said.steps[at];
        (step.audience.as_deref(), step.canary_per_second, step.control_per_second)
    };
    assert_eq!(rates(0), (Some("staff"), 10.0, 30.0));
    assert_eq!(rates(1), (Some("staff"), 40.0, 1_000.0));
    assert!(said.steps[1].passes.is_some(), "there is something to compare with");
}
