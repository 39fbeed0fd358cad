//! A rollout against a world of its own: whatever happens, in whatever order.

mod audiences;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use canary_agent::{
    config::model::{
        Gate, Hooks, KernelSignal, Probe, ProbeAsk, Reaction, Rollout, Signal, SignalKind, Step,
    },
    rollout::{
        drive::{Ask, At, Run, Shares, Slow, Stage, View, Wish},
        gate::Verdict,
        watch::{Answer, Counted},
    },
};
use canary_ebpf_common::share::Share;
use proptest::prelude::*;

const PREPARE_MS: u64 = 7_000;

fn share(text: &str) -> Share {
    text.parse().unwrap()
}

fn gate(rise: u32, fall: u32) -> Arc<Gate> {
    Arc::new(Gate {
        name: "asked".to_owned(),
        alpha: 0.01,
        beta: 0.05,
        min_duration: Duration::from_secs(3),
        deadline: Duration::from_secs(60),
        signals: vec![Signal::Probe(Probe {
            ask: ProbeAsk::Webhook("http://judge/".to_owned()),
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            retries: 0,
            rise,
            fall,
            observe: false,
        })],
    })
}

fn rollout(steps: Vec<Step>) -> Rollout {
    Rollout {
        name: "r".to_owned(),
        service: "shop".to_owned(),
        to: "v2".to_owned(),
        steps,
        on_fail: Reaction::Abort,
        on_inconclusive: Reaction::Hold,
        on_no_data: Reaction::Hold,
        windows: Vec::new(),
        hooks: Hooks::default(),
    }
}

fn step(text: &str, hold: u64) -> Step {
    Step { split: Some(share(text)), hold: Some(Duration::from_secs(hold)), ..Step::default() }
}

/// A step for an audience.
fn only(audience: &str, step: Step) -> Step {
    Step { audience: Some(audience.to_owned()), ..step }
}

fn gated(text: &str) -> Step {
    Step { split: Some(share(text)), gate: Some(gate(2, 3)), ..Step::default() }
}

/// A service, a clock, and whoever is asked.
struct World {
    rollout: Rollout,
    run: Run,
    now: u64,
    share: Share,
    /// What audiences were given, and everyone's share with which that counts.
    given: BTreeMap<String, (Share, Share)>,
    in_force: bool,
    barred: bool,
    learns: bool,
    panicked: bool,
    refuses: bool,
    prepared_since: Option<u64>,
    /// What was wished for, in words.
    log: Vec<String>,
    /// Who is being asked.
    asked: Vec<usize>,
    confirms: u32,
}

impl World {
    fn new(rollout: Rollout) -> Self {
        let now = At { boot_ms: 1_000_000, unix_ms: 1_700_000_000_000 };
        let run = Run::start(&rollout, Share::ZERO, 7, now);
        Self {
            rollout,
            run,
            now: now.boot_ms,
            share: Share::ZERO,
            given: BTreeMap::new(),
            in_force: true,
            barred: false,
            learns: false,
            panicked: false,
            refuses: false,
            prepared_since: None,
            log: Vec::new(),
            asked: Vec::new(),
            confirms: 0,
        }
    }

    fn at(&self) -> At {
        At { boot_ms: self.now, unix_ms: 1_700_000_000_000 + self.now }
    }

    fn view(&self) -> View {
        View {
            share: self.share,
            in_force: self.in_force,
            panicked: self.panicked,
            audiences_panicked: {
                let mut has = self.run.position().audiences.keys();
                has.any(|name| !self.given.contains_key(name))
            },
            learns: self.learns,
            prepared: self.prepared_since.is_some(),
            barred: self.barred.then(|| "the end of the freeze".to_owned()),
        }
    }

    /// What clients of an audience have.
    fn has_of(&self, audience: &str) -> Share {
        let given = self.given.get(audience).filter(|(everyone, _)| *everyone == self.share);
        given.map_or(self.share, |(_, share)| self.share.max(*share))
    }

    /// What was given counts with this share of everyone's.
    fn gives_with(&mut self, everyone: Share) {
        self.given.values_mut().for_each(|(with, _)| *with = everyone);
    }

    fn fulfil(&mut self, wishes: Vec<Wish>) -> bool {
        let mut sets = false;
        for wish in wishes {
            match wish {
                Wish::Confirm => self.confirms += 1,
                Wish::Prepare(_) => {
                    sets = true;
                    self.prepared_since = Some(self.now);
                }
                Wish::Forget => self.prepared_since = None,
                Wish::Set(ask) => {
                    sets = true;
                    self.log.push(format!("set {ask}"));
                    let steps = &self.rollout.steps;
                    let of_step = |step: &Step| {
                        (&step.audience, step.split) == (&ask.audience, Some(ask.share))
                    };
                    assert!(steps.iter().any(of_step), "no step says {ask}");
                    let sent_on = self.run.position().sent_on;
                    let Ask { audience, share: to } = ask.clone();
                    let has = audience.as_ref().map_or(self.share, |name| self.has_of(name));
                    assert!(to <= has || !self.barred, "raised while barred");
                    if self.learns && to > has && !sent_on {
                        let since = self.prepared_since.expect("its buckets are watched");
                        assert!(self.now - since >= PREPARE_MS, "moved too soon");
                    }
                    let done = match self.refuses {
                        true => Err("the disk".to_owned()),
                        false => {
                            match audience {
                                Some(name) => drop(self.given.insert(name, (self.share, to))),
                                None => {
                                    self.share = to;
                                    self.gives_with(to);
                                }
                            }
                            self.prepared_since = None;
                            Ok(ask)
                        }
                    };
                    let at = self.at();
                    let rollout = self.rollout.clone();
                    let more = self.run.was_set(&rollout, done, at);
                    self.fulfil(more);
                }
                Wish::Back(to) => {
                    self.log.push(format!("back {to}"));
                    let Shares { everyone, audiences } = to;
                    self.share = everyone;
                    self.given = audiences
                        .into_iter()
                        .map(|(name, share)| (name, (everyone, share)))
                        .collect();
                }
                Wish::Measure(probe) => self.asked.push(probe),
                Wish::Tell(told) => self.log.push(told.kind.to_owned()),
                Wish::Save => {}
            }
        }
        sets
    }

    fn look(&mut self) {
        for _ in 0..20 {
            let (view, at) = (self.view(), self.at());
            let before = (self.run.stage(), self.run.position().step);
            let wishes = self.run.look(&self.rollout, &view, at);
            let sets = self.fulfil(wishes);
            if !sets && before == (self.run.stage(), self.run.position().step) {
                self.sync();
                return;
            }
        }
    }

    /// Lets go of what the rollout has not given any more, as the loop does.
    fn sync(&mut self) {
        let audiences = &self.run.position().audiences;
        self.given.retain(|name, _| audiences.contains_key(name));
    }

    /// Looks every second, as the loop does.
    fn wait(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += 1_000;
            self.look();
        }
    }

    fn answer(&mut self, answer: &Answer) {
        for probe in std::mem::take(&mut self.asked) {
            let at = self.at();
            let wishes = self.run.heard(&self.rollout, probe, answer.clone(), at);
            self.fulfil(wishes);
        }
        self.look();
    }

    /// Another agent, after a while.
    fn restart(&mut self, after: u64) {
        let text = serde_json::to_string(&self.run.record()).unwrap();
        let record = serde_json::from_str(&text).unwrap();
        self.now += after;
        self.asked.clear();
        self.prepared_since = None;
        let (run, wishes) = Run::restore(record, Some(&self.rollout));
        self.run = run;
        self.fulfil(wishes);
        self.look();
    }

    fn step(&self) -> usize {
        self.run.position().step + 1
    }

    fn has(&self, what: &str) -> bool {
        self.log.iter().any(|line| line == what)
    }
}

fn good() -> Answer {
    Answer::Good("fine".to_owned())
}

fn bad() -> Answer {
    Answer::Bad("worse".to_owned())
}

fn none() -> Answer {
    Answer::None("timeout".to_owned())
}

#[test]
fn steps_follow_one_another_in_their_time() {
    let mut world = World::new(rollout(vec![step("1%", 10), step("50%", 20), step("100%", 5)]));
    world.look();
    assert_eq!((world.share, world.step()), (share("1%"), 1));
    world.wait(9);
    assert_eq!(world.step(), 1);
    world.wait(1);
    assert_eq!((world.share, world.step()), (share("50%"), 2));
    world.wait(20);
    assert_eq!(world.share, share("100%"));
    assert_eq!(world.run.stage(), Stage::Watching);
    world.wait(5);
    assert_eq!(world.run.stage(), Stage::Completed);
    assert_eq!(world.log.iter().filter(|line| line.starts_with("set")).count(), 3);
}

#[test]
fn buckets_are_watched_in_time_so_that_a_step_lasts_as_long_as_it_says() {
    let mut world = World::new(rollout(vec![step("1%", 10), step("100%", 0)]));
    world.learns = true;
    world.look();
    assert_eq!(world.share, Share::ZERO);
    world.wait(7);
    assert_eq!(world.share, share("1%"));
    world.wait(2);
    assert_eq!(world.prepared_since, None);
    world.wait(8);
    assert_eq!((world.share, world.run.stage()), (share("100%"), Stage::Completed));
}

#[test]
fn time_without_an_agent_is_not_healthy_time() {
    let mut world = World::new(rollout(vec![step("1%", 30), step("100%", 0)]));
    world.look();
    world.wait(10);
    world.restart(3_600_000);
    assert_eq!(world.step(), 1);
    world.wait(19);
    assert_eq!(world.step(), 1);
    world.wait(2);
    assert_eq!(world.run.stage(), Stage::Completed);
    // Stopped, or suspended, and not started anew.
    let mut world = World::new(rollout(vec![step("1%", 30), step("100%", 0)]));
    world.look();
    world.now += 3_600_000;
    world.look();
    assert!(world.run.position().watched_ms <= 5_000);
    // The share is not in the tables.
    world.in_force = false;
    world.wait(100);
    assert_eq!(world.step(), 1);
}

#[test]
fn a_share_that_an_earlier_agent_has_set_without_saying_so_is_its_own() {
    let mut world = World::new(rollout(vec![step("5%", 10), step("100%", 0)]));
    assert_eq!(world.run.stage(), Stage::Entering);
    world.share = share("5%");
    world.restart(1_000);
    assert_eq!((world.step(), world.run.stage()), (1, Stage::Watching));
    assert!(!world.has("set 5%") && !world.has("paused"));
    world.wait(11);
    assert_eq!(world.run.stage(), Stage::Completed);
}

#[test]
fn a_failed_gate_gives_everything_back_at_once() {
    let mut world = World::new(rollout(vec![step("1%", 0), gated("50%"), step("100%", 0)]));
    world.look();
    assert_eq!(world.share, share("50%"));
    for round in 0..3 {
        world.wait(1);
        assert_eq!(world.run.stage(), Stage::Watching, "{round}");
        world.answer(&bad());
    }
    assert_eq!((world.share, world.run.stage()), (Share::ZERO, Stage::Aborted));
    assert!(world.has("back 0%") && world.has("aborted"));
    let before = world.log.len();
    world.wait(60);
    assert_eq!(world.log.len(), before);
    assert!(world.run.position().reason.as_ref().unwrap().contains("3 bad answers in a row"));
}

#[test]
fn no_answer_is_not_a_bad_one() {
    let mut world = World::new(rollout(vec![gated("5%"), step("100%", 0)]));
    world.look();
    for _ in 0..30 {
        world.answer(&none());
        world.wait(1);
    }
    assert_eq!(world.run.stage(), Stage::Watching);
    world.wait(31);
    assert_eq!(world.run.stage(), Stage::Held);
    let why = world.run.position().reason.clone().unwrap();
    assert!(why.contains("nothing to decide by"), "{why}");
    // Tried again, it passes.
    let wishes = world.run.ask_resume(&world.rollout.clone(), world.at()).unwrap();
    world.fulfil(wishes);
    world.asked.clear();
    for _ in 0..5 {
        world.wait(1);
        world.answer(&good());
    }
    assert_eq!((world.share, world.run.stage()), (share("100%"), Stage::Completed));
}

#[test]
fn an_answer_now_good_now_bad_is_inconclusive() {
    let mut one = rollout(vec![gated("5%"), step("100%", 0)]);
    one.on_inconclusive = Reaction::Abort;
    let mut world = World::new(one);
    world.look();
    for round in 0..70 {
        world.wait(1);
        let answer = if round % 2 == 0 { good() } else { bad() };
        world.answer(&answer);
    }
    assert_eq!((world.share, world.run.stage()), (Share::ZERO, Stage::Aborted));
    assert!(world.run.position().reason.as_ref().unwrap().contains("could not decide in time"));
}

/// A gate that goes by what connections do.
fn counting(text: &str) -> Step {
    let signal = Signal::Kernel(KernelSignal {
        kind: SignalKind::ConnectFailed,
        quantile_permille: None,
        tolerate: 1.2,
        pass_below: 3.0,
        observe: false,
    });
    let gate = Gate { signals: vec![signal], ..Gate::clone(&gate(2, 3)) };
    Step { gate: Some(Arc::new(gate)), ..step(text, 0) }
}

#[test]
fn a_gate_that_has_seen_nothing_bad_has_no_data_and_is_reacted_to() {
    for (reaction, stage, left) in [
        (Reaction::Abort, Stage::Aborted, "0%"),
        (Reaction::Hold, Stage::Held, "50%"),
        (Reaction::StepBack, Stage::Held, "5%"),
    ] {
        let mut one = rollout(vec![step("5%", 0), counting("50%"), step("100%", 0)]);
        one.on_no_data = reaction;
        one.on_fail = Reaction::Abort;
        let mut world = World::new(one);
        world.look();
        let counted = Counted {
            service: "shop".to_owned(),
            canary: "v2".to_owned(),
            watched: Duration::from_secs(1),
            complete: true,
            slow_ns: u64::MAX,
            connections: [100, 100],
            events: Vec::new(),
        };
        for _ in 0..61 {
            assert_ne!(world.run.stage(), Stage::Aborted, "nothing was wrong so far");
            world.wait(1);
            if let Some(counted) = world.run.gather(&counted) {
                let (rollout, at) = (world.rollout.clone(), world.at());
                let wishes = world.run.counted(&rollout, &counted, at);
                world.fulfil(wishes);
            }
            if world.run.stage() != Stage::Watching {
                break;
            }
        }
        assert_eq!((world.run.stage(), world.share), (stage, share(left)), "{reaction:?}");
        let why = world.run.position().reason.clone().unwrap();
        assert!(why.contains("has had nothing to decide by"), "{why}");
    }
}

#[test]
fn a_share_that_is_not_the_one_that_was_asked_holds_it() {
    let mut world = World::new(rollout(vec![step("5%", 1_000), step("100%", 0)]));
    world.look();
    // As it should be: nobody stops it.
    for _ in 0..500 {
        let wishes = world.run.split_measured(0.05, 950, 50);
        assert_eq!(wishes, []);
    }
    let mut wishes = Vec::new();
    for _ in 0..500 {
        wishes = world.run.split_measured(0.05, 900, 100);
        if !wishes.is_empty() {
            break;
        }
    }
    world.fulfil(wishes);
    assert_eq!((world.run.stage(), world.share), (Stage::Held, share("5%")));
    let why = world.run.position().reason.clone().unwrap();
    assert!(why.starts_with("`v2` gets more connections than its share"), "{why}");
}

/// A step whose gate goes by slow handshakes.
fn counted() -> Step {
    let slow = KernelSignal {
        kind: SignalKind::SlowHandshake,
        quantile_permille: Some(950),
        tolerate: 1.2,
        pass_below: 3.0,
        observe: false,
    };
    let gate = Gate { signals: vec![Signal::Kernel(slow)], ..(*gate(2, 3)).clone() };
    Step { gate: Some(Arc::new(gate)), ..step("50%", 0) }
}

/// A second in which half of the connections were the canary's, and so many handshakes slow.
fn window(slow_ns: u64, events: [u64; 2]) -> Counted {
    Counted {
        service: "shop".to_owned(),
        canary: "v2".to_owned(),
        watched: Duration::from_secs(1),
        complete: true,
        slow_ns,
        connections: [500; 2],
        events: vec![(SignalKind::SlowHandshake, events)],
    }
}

impl World {
    /// A window comes; whether it was weighed as a complete one.
    fn count(&mut self, counted: &Counted) -> Option<bool> {
        let weighed = self.run.gather(counted)?;
        let wishes = self.run.counted(&self.rollout, &weighed, self.at());
        self.fulfil(wishes);
        Some(weighed.complete)
    }
}

#[test]
fn a_window_counts_only_where_slow_means_what_the_rollout_has_fixed() {
    let mut world = World::new(rollout(vec![counted(), step("100%", 0)]));
    world.wait(1);
    assert_eq!(world.run.stage(), Stage::Watching);
    assert!(world.run.waits().unwrap().contains("handshakes of control's"), "{:?}", world.run);
    // Nothing is fixed, or something else: forty slow ones of the canary's are no evidence.
    assert_eq!(world.run.slow_wanted(&world.rollout), Some(950));
    assert_eq!(world.count(&window(u64::MAX, [0, 40])), Some(false));
    assert_eq!(world.count(&window(9_000, [0, 40])), Some(false));
    let wishes = world.run.fix_slow(Slow { permille: 950, over_ns: 20_000 });
    world.fulfil(wishes);
    assert_eq!(world.run.slow_wanted(&world.rollout), None);
    assert_eq!(world.count(&window(9_000, [0, 40])), Some(false));
    let evidence = world.run.watch().unwrap().gate().progress().clone();
    assert_eq!((evidence.windows, evidence.incomplete_windows), (0, 3));
    // It holds over a restart.
    world.restart(1_000);
    world.wait(1);
    assert_eq!(world.run.slow_wanted(&world.rollout), None);
    assert_eq!(world.run.stage(), Stage::Watching);
    assert_eq!(world.count(&window(20_000, [0, 40])), Some(true));
    assert_eq!(world.run.stage(), Stage::Aborted, "{:?}", world.run);
    assert_eq!(world.share, Share::ZERO);
    assert_eq!(world.count(&window(20_000, [0, 40])), None);
}

#[test]
fn windows_in_which_something_was_missed_leave_a_gate_undecided() {
    let mut world = World::new(rollout(vec![counted(), step("100%", 0)]));
    world.wait(1);
    let wishes = world.run.fix_slow(Slow { permille: 950, over_ns: 20_000 });
    world.fulfil(wishes);
    for _ in 0..70 {
        let missed = Counted { complete: false, ..window(20_000, [0, 40]) };
        if world.run.stage() == Stage::Watching {
            assert_eq!(world.count(&missed), Some(false));
        }
        world.wait(1);
    }
    assert_eq!(world.run.stage(), Stage::Held, "{:?}", world.run);
    assert_eq!(world.share, share("50%"));
}

#[test]
fn stepping_back_is_to_the_share_before_and_waits() {
    let mut one = rollout(vec![step("1%", 0), step("5%", 0), gated("50%"), step("100%", 0)]);
    one.on_fail = Reaction::StepBack;
    let mut world = World::new(one);
    world.look();
    for _ in 0..3 {
        world.wait(1);
        world.answer(&bad());
    }
    assert_eq!((world.share, world.run.stage(), world.step()), (share("5%"), Stage::Held, 2));
    let wishes = world.run.ask_resume(&world.rollout.clone(), world.at()).unwrap();
    world.fulfil(wishes);
    world.look();
    assert_eq!((world.share, world.step()), (share("50%"), 3));
    // There is nothing before the first.
    let mut one = rollout(vec![gated("50%")]);
    one.on_fail = Reaction::StepBack;
    let mut world = World::new(one);
    world.look();
    for _ in 0..3 {
        world.wait(1);
        world.answer(&bad());
    }
    assert_eq!((world.share, world.run.stage()), (Share::ZERO, Stage::Aborted));
}

#[test]
fn a_pause_waits_for_an_operator_and_an_operator_may_send_it_on() {
    let pause = Step { pause: true, ..Step::default() };
    let mut world =
        World::new(rollout(vec![step("5%", 0), pause, step("50%", 100), step("100%", 0)]));
    world.look();
    world.wait(100);
    let rollout = world.rollout.clone();
    assert_eq!((world.share, world.step()), (share("5%"), 2));
    assert!(world.run.asks_operator(&rollout));
    assert!(world.run.waits().unwrap().contains("resume"));
    let wishes = world.run.ask_resume(&rollout, world.at()).unwrap();
    world.fulfil(wishes);
    world.look();
    assert_eq!(world.share, share("50%"));
    assert!(world.run.ask_resume(&rollout, world.at()).is_err());
    let wishes = world.run.ask_pause(None).unwrap();
    world.fulfil(wishes);
    world.wait(200);
    assert_eq!(world.run.position().watched_ms, 0);
    let wishes = world.run.ask_resume(&rollout, world.at()).unwrap();
    world.fulfil(wishes);
    world.wait(50);
    assert_eq!((world.share, world.run.stage()), (share("50%"), Stage::Watching));
    let wishes = world.run.ask_promote(&rollout, false, world.at()).unwrap();
    world.fulfil(wishes);
    world.look();
    assert_eq!((world.share, world.run.stage()), (share("100%"), Stage::Completed));

    let mut world = World::new(rollout.clone());
    world.look();
    let wishes = world.run.ask_promote(&rollout, true, world.at()).unwrap();
    world.fulfil(wishes);
    world.look();
    assert_eq!((world.share, world.run.stage()), (share("100%"), Stage::Completed));
    assert!(world.run.ask_abort(None, world.at()).is_err());
}

#[test]
fn whoever_else_sets_the_share_stops_it_and_a_panic_ends_it() {
    let mut world = World::new(rollout(vec![step("5%", 10), step("100%", 0)]));
    world.look();
    world.share = share("7%");
    world.wait(1);
    assert_eq!(world.run.stage(), Stage::Paused);
    world.wait(100);
    assert_eq!(world.share, share("7%"));
    let wishes = world.run.ask_resume(&world.rollout.clone(), world.at()).unwrap();
    world.fulfil(wishes);
    world.look();
    assert_eq!((world.share, world.run.stage()), (share("5%"), Stage::Watching));
    (world.share, world.panicked) = (Share::ZERO, true);
    world.wait(1);
    assert_eq!(world.run.stage(), Stage::Aborted);
    assert!(!world.has("back 0%"));
}

#[test]
fn a_hook_and_a_window_are_waited_for_and_an_abort_is_not() {
    let mut one = rollout(vec![step("5%", 10), step("100%", 0)]);
    one.hooks.confirm = Some("http://ok/".to_owned());
    let mut world = World::new(one);
    world.wait(30);
    assert_eq!((world.share, world.confirms), (Share::ZERO, 1), "it hangs");
    let at = world.at();
    world.run.confirmed(Err("it answers 503".to_owned()), at);
    world.wait(9);
    assert!(world.run.waits().unwrap().contains("503"));
    assert_eq!(world.confirms, 1);
    world.wait(2);
    assert_eq!(world.confirms, 2);
    let at = world.at();
    world.run.confirmed(Ok(()), at);
    world.look();
    assert_eq!(world.share, share("5%"));
    world.wait(20);
    assert_eq!(world.confirms, 3);
    let wishes = world.run.ask_abort(Some("enough"), world.at()).unwrap();
    assert!(matches!(wishes[0], Wish::Back(_)), "first of all");
    world.fulfil(wishes);
    assert_eq!(world.share, Share::ZERO);
}

#[test]
fn what_can_not_be_set_is_tried_again_and_a_freeze_is_waited_for() {
    let mut world = World::new(rollout(vec![step("5%", 0), step("100%", 0)]));
    world.refuses = true;
    world.wait(10);
    assert_eq!(world.share, Share::ZERO);
    assert!(world.log.len() >= 5, "{:?}", world.log);
    world.refuses = false;
    world.barred = true;
    world.wait(10);
    assert_eq!(world.share, Share::ZERO);
    assert!(world.run.waits().unwrap().contains("freeze"));
    world.barred = false;
    world.wait(2);
    assert_eq!(world.run.stage(), Stage::Completed);
}

#[test]
fn another_configuration_stops_it_until_somebody_has_looked() {
    let mut world = World::new(rollout(vec![step("5%", 100), step("100%", 0)]));
    world.look();
    let mut other = world.rollout.clone();
    other.steps[1] = step("50%", 0);
    let wishes = world.run.reconfigure(Some(&other));
    world.rollout = other;
    world.fulfil(wishes);
    assert_eq!(world.run.stage(), Stage::Paused);
    let wishes = world.run.reconfigure(None);
    world.fulfil(wishes);
    let wishes = world.run.ask_resume(&world.rollout.clone(), world.at()).unwrap();
    world.fulfil(wishes);
    world.wait(102);
    assert_eq!((world.share, world.run.stage()), (share("50%"), Stage::Completed));
}

#[derive(Clone, Debug)]
enum Happens {
    Wait(u64),
    Restart(u64),
    Answer(u8),
    Pause,
    Resume,
    Promote,
    Full,
    Abort,
    Elsewhere,
    Panic,
    Bar(bool),
    Refuse(bool),
    InForce(bool),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        6 => (1..20_u64).prop_map(Happens::Wait),
        2 => (0..100_000_u64).prop_map(Happens::Restart),
        8 => (0..3_u8).prop_map(Happens::Answer),
        1 => Just(Happens::Pause),
        2 => Just(Happens::Resume),
        1 => Just(Happens::Promote),
        1 => Just(Happens::Full),
        1 => Just(Happens::Abort),
        1 => Just(Happens::Elsewhere),
        1 => Just(Happens::Panic),
        1 => any::<bool>().prop_map(Happens::Bar),
        1 => any::<bool>().prop_map(Happens::Refuse),
        1 => any::<bool>().prop_map(Happens::InForce),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let shares = prop::sample::select(vec!["0.1%", "5%", "20%", "50%", "100%"]);
    let audiences = prop::sample::select(vec![None, None, Some("staff"), Some("beta")]);
    (prop::option::of(shares), audiences, prop::option::of(0..30_u64), any::<bool>(), 0..4_u8)
        .prop_map(|(split, audience, hold, gated, pause)| Step {
            audience: audience.filter(|_| split.is_some()).map(str::to_owned),
            split: split.map(share),
            hold: hold.map(Duration::from_secs),
            pause: pause == 0,
            gate: gated.then(|| gate(2, 3)),
        })
}

proptest! {
    #[test]
    fn whatever_happens_the_rules_hold(
        steps in prop::collection::vec(any_step(), 1..6),
        learns in any::<bool>(),
        reaction in 0..3_usize,
        script in prop::collection::vec(happens(), 1..60),
    ) {
        let mut one = rollout(steps);
        let reactions = [Reaction::Abort, Reaction::Hold, Reaction::StepBack];
        one.on_fail = reactions[reaction];
        one.on_inconclusive = reactions[(reaction + 1) % 3];
        let mut world = World::new(one);
        world.learns = learns;
        world.look();
        for what in script {
            let rollout = world.rollout.clone();
            let (stage, step, watched) =
                (world.run.stage(), world.step(), world.run.position().watched_ms);
            let verdict = world.run.watch().and_then(|watch| watch.verdict());
            let (began, share_before) = (world.now, world.share);
            let at = world.at();
            let mut sent_on = false;
            match what.clone() {
                Happens::Wait(seconds) => world.wait(seconds),
                Happens::Restart(ms) => world.restart(ms),
                Happens::Answer(kind) => {
                    let answers = [good(), bad(), none()];
                    world.answer(&answers[usize::from(kind)]);
                }
                Happens::Pause => { if let Ok(wishes) = world.run.ask_pause(None) { world.fulfil(wishes); } }
                Happens::Resume => { if let Ok(wishes) = world.run.ask_resume(&rollout, at) { world.fulfil(wishes); } }
                Happens::Promote | Happens::Full => {
                    let full = matches!(what, Happens::Full);
                    sent_on = true;
                    if let Ok(wishes) = world.run.ask_promote(&rollout, full, at) { world.fulfil(wishes); }
                }
                Happens::Abort => {
                    if let Ok(wishes) = world.run.ask_abort(None, at) {
                        world.fulfil(wishes);
                        prop_assert_eq!(world.share, Share::ZERO);
                        prop_assert!(world.given.is_empty());
                    }
                }
                Happens::Elsewhere => { world.share = share("33%"); world.look(); }
                Happens::Panic => {
                    (world.share, world.panicked) = (Share::ZERO, true);
                    world.given.clear();
                    world.look();
                    world.panicked = false;
                }
                Happens::Bar(bars) => world.barred = bars,
                Happens::Refuse(refuses) => world.refuses = refuses,
                Happens::InForce(in_force) => world.in_force = in_force,
            }
            let now = world.run.stage();
            // What is over stays over, and touches nothing.
            if stage.is_over() {
                prop_assert_eq!(now, stage);
                if !matches!(what, Happens::Elsewhere | Happens::Panic) {
                    prop_assert_eq!(world.share, share_before);
                }
                continue;
            }
            // An audience has what its steps gave, and everyone's at least.
            let unseen = world.run.position().shares[1] != world.share;
            if now == Stage::Watching && !unseen {
                for (name, own) in rollout.for_audiences(world.step() - 1) {
                    prop_assert!(world.has_of(&name) >= own.max(world.share));
                }
            }
            if matches!(now, Stage::Aborted) {
                prop_assert!(world.has_of("staff") == world.share);
            }
            // Nothing is watched that was not there to be watched.
            if now == Stage::Watching && world.step() == step && stage == now {
                let gained = world.run.position().watched_ms.saturating_sub(watched);
                prop_assert!(gained <= world.now - began);
                if matches!(what, Happens::Restart(_)) {
                    prop_assert_eq!(gained, 0);
                }
            }
            // Nobody goes past a gate that has not passed, unless sent.
            if world.step() > step && !sent_on {
                for at in step..world.step() {
                    let done = &rollout.steps[at - 1];
                    let passed = at == step && verdict == Some(Verdict::Pass);
                    let restarted = matches!(what, Happens::Restart(_));
                    prop_assert!(done.gate.is_none() || !restarted || passed);
                }
            }
            if matches!(now, Stage::Held | Stage::Paused) {
                prop_assert!(world.run.position().reason.is_some());
            }
            // The record says all of it.
            let record = world.run.record();
            let text = serde_json::to_string(&record).unwrap();
            prop_assert_eq!(serde_json::from_str::<canary_agent::rollout::drive::Record>(&text).unwrap(), record);
        }
    }
}
