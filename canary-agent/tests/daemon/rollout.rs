//! Rollouts in the loop: shares, the trail, restarts, and what others do meanwhile.

use std::{sync::Arc, time::Duration};

use canary_agent::{
    api::{
        model::{FreezeRequest, SplitRequest, UndoRequest},
        panic::PanicRequest,
        rollout::{RolloutReport, RolloutRequest, RolloutStatus},
    },
    config::model::{
        Config, Gate, Hooks, KernelSignal, Probe, ProbeAsk, Reaction, Rollout, Signal, SignalKind,
        Step,
    },
    daemon::{Action, Event, Peer, Refusal, Request},
    hooks::{Errand, Said},
    plan::Adopted,
    rollout::watch::{Answer, Counted},
    store::{Change, SqliteStore, StateStore},
};

use crate::{
    changes::freeze,
    plan_support::maps,
    support::{Agent, Shared, shop},
};

const PEER: Peer = Peer { uid: 1000, gid: 1000, pid: None };

pub(crate) fn step(share: &str, hold: u64) -> Step {
    Step {
        split: Some(share.parse().unwrap()),
        hold: Some(Duration::from_secs(hold)),
        ..Step::default()
    }
}

fn gated(share: &str) -> Step {
    let probe = Probe {
        ask: ProbeAsk::Webhook("http://judge/".to_owned()),
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(1),
        retries: 0,
        rise: 2,
        fall: 2,
        observe: false,
    };
    let gate = Gate {
        name: "asked".to_owned(),
        alpha: 0.01,
        beta: 0.05,
        min_duration: Duration::from_secs(2),
        deadline: Duration::from_secs(60),
        signals: vec![Signal::Probe(probe)],
    };
    Step { gate: Some(Arc::new(gate)), ..step(share, 0) }
}

pub(crate) fn with(steps: Vec<Step>) -> Config {
    let mut config = shop();
    let rollout = |name: &str, to: &str, steps: Vec<Step>| {
        Arc::new(Rollout {
            name: name.to_owned(),
            service: "shop".to_owned(),
            to: to.to_owned(),
            steps,
            on_fail: Reaction::Abort,
            on_inconclusive: Reaction::Hold,
            on_no_data: Reaction::Hold,
            windows: Vec::new(),
            hooks: Hooks::default(),
        })
    };
    config.rollouts = vec![
        rollout("shop-v2", "v2", steps),
        rollout("shop-v3", "v3", vec![step("10%", 5), step("100%", 0)]),
    ];
    config
}

pub(crate) fn start(dir: &tempfile::TempDir, config: &Config) -> Agent {
    Agent::start(dir.path(), config, Shared::default(), Adopted::default())
}

/// The agent of a later start, over the maps as this one leaves them.
pub(crate) fn restarted(agent: &Agent, dir: &tempfile::TempDir, config: &Config, ms: u64) -> Agent {
    let (plane, panics) = agent.host.with(|host| (host.plane.clone(), host.marks.clone()));
    let adopted = Adopted { panics, ..maps(&plane) };
    Agent::start_at(dir.path(), config, Shared::default(), adopted, agent.boot_ms + ms)
}

pub(crate) fn tell(
    agent: &mut Agent,
    name: &str,
    action: Action,
) -> Result<RolloutReport, Refusal> {
    let request = RolloutRequest { reason: Some("ticket".to_owned()), ..RolloutRequest::default() };
    let name = name.to_owned();
    agent.ask(|reply| Request::Rollout { name, action, request, peer: PEER, reply })
}

pub(crate) fn status(agent: &mut Agent, name: &str) -> RolloutStatus {
    agent.status().rollouts.into_iter().find(|one| one.name == name).unwrap()
}

fn asked(agent: &mut Agent) -> String {
    let status = agent.status();
    let versions = &status.services[0].versions;
    versions.iter().map(|v| format!("{} {}", v.name, v.asked_text)).collect::<Vec<_>>().join(", ")
}

/// A second after the other, as the loop has them, with the wake-ups between.
pub(crate) fn seconds(agent: &mut Agent, seconds: u64) {
    for _ in 0..seconds {
        agent.wait(1_000);
    }
}

pub(crate) fn say(agent: &mut Agent, answer: Answer) {
    let turns = 0..40;
    // Which of its questions it is, the loop knows: another is passed over.
    for turn in turns {
        let said = Said::Measured {
            rollout: "shop-v2".to_owned(),
            turn,
            probe: 0,
            answer: answer.clone(),
        };
        agent.event(Event::Said(said));
    }
}

pub(crate) fn trail(dir: &tempfile::TempDir) -> Vec<(u64, Change)> {
    SqliteStore::new(dir.path()).changes(0, 1_000).unwrap()
}

#[test]
fn a_rollout_goes_through_its_steps_and_leaves_others_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, &with(vec![step("5%", 20), step("50%", 10), step("80%", 0)]));
    agent.split(&[("v3", "10%")]).unwrap();
    let third = |agent: &Agent| -> Vec<usize> {
        let owners = agent.owners();
        (0..owners.len()).filter(|at| owners[*at] == 2).collect()
    };
    let others = third(&agent);
    assert_eq!(status(&mut agent, "shop-v2").state, "idle");
    let begun = tell(&mut agent, "shop-v2", Action::Start).unwrap();
    assert_eq!((begun.applied, begun.rollout.state.as_str()), (true, "entering"));
    assert!(begun.rollout.waits.unwrap().contains("watched"));
    seconds(&mut agent, 6);
    assert_eq!(asked(&mut agent), "stable 90%, v2 0%, v3 10%");
    seconds(&mut agent, 3);
    assert_eq!(asked(&mut agent), "stable 85%, v2 5%, v3 10%");
    seconds(&mut agent, 21);
    assert_eq!(asked(&mut agent), "stable 40%, v2 50%, v3 10%");
    assert_eq!(third(&agent), others, "a version that nobody changes keeps its buckets");
    seconds(&mut agent, 25);
    let over = status(&mut agent, "shop-v2");
    assert_eq!((over.state.as_str(), over.share.as_deref()), ("completed", Some("80%")));
    let trail = trail(&dir);
    let told: Vec<(&str, Option<u32>)> =
        trail.iter().skip(3).map(|(_, one)| (one.action.as_str(), one.uid)).collect();
    assert_eq!(
        told,
        [("rollout start", Some(1000)), ("rollout", None), ("rollout", None), ("rollout", None)]
    );
    assert_eq!(trail[4].1.reason.as_deref(), Some("rollout shop-v2, step 1"));
}

#[test]
fn an_abort_gives_exactly_its_buckets_back_and_is_in_force_without_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let config = with(vec![step("5%", 10), step("50%", 1_000), step("80%", 0)]);
    let mut agent = start(&dir, &config);
    agent.split(&[("v3", "10%")]).unwrap();
    let before = agent.owners();
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    seconds(&mut agent, 30);
    assert_eq!(asked(&mut agent), "stable 40%, v2 50%, v3 10%");
    agent.host.with(|host| host.refuse_store = true);
    let refused = tell(&mut agent, "shop-v2", Action::Pause).unwrap_err();
    assert_eq!(refused.code, "state_not_stored");
    let report = tell(&mut agent, "shop-v2", Action::Abort).unwrap();
    assert_eq!(report.rollout.state, "aborted");
    assert_eq!(agent.owners(), before);
    assert_eq!(asked(&mut agent), "stable 90%, v2 0%, v3 10%");
    assert_eq!(agent.host.with(|host| host.marked.clone()), ["shop"]);
    assert!(!agent.status().alerts.is_empty());
    // What is owed is stored as soon as it can be.
    agent.host.with(|host| host.refuse_store = false);
    seconds(&mut agent, 3);
    let (_, last) = trail(&dir).pop().unwrap();
    assert_eq!((last.action.as_str(), last.uid), ("rollout", Some(1000)));
    assert!(last.after.get("v2").is_none_or(|share| share.fraction() == 0.0));
    let mut agent = restarted(&agent, &dir, &config, 1_000);
    assert_eq!(status(&mut agent, "shop-v2").state, "aborted");
    assert_eq!(agent.owners(), before);
}

/// The service's share of `to` goes back without a disk, in its second step; then the agent ends.
fn given_back_without_a_disk(config: &Config, dir: &tempfile::TempDir, third: &str) -> Agent {
    let mut agent = start(dir, config);
    agent.split(&[("v3", third)]).unwrap();
    let (errands, _sent) = tokio::sync::mpsc::unbounded_channel();
    agent.state.send_errands_to(errands);
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    seconds(&mut agent, 30);
    assert!(asked(&mut agent).contains("v2 50%"));
    agent.host.with(|host| host.refuse_store = true);
    for _ in 0..3 {
        say(&mut agent, Answer::Bad("worse".to_owned()));
        seconds(&mut agent, 1);
    }
    assert!(
        trail(dir).iter().all(|(_, one)| one.reason.as_ref().is_none_or(|r| !r.contains("worse")))
    );
    agent
}

#[test]
fn what_could_not_be_stored_of_an_abort_is_not_taken_back_by_the_next_agent() {
    for third in ["10%", "0%"] {
        let dir = tempfile::tempdir().unwrap();
        let config = with(vec![step("5%", 10), gated("50%"), step("80%", 0)]);
        let ended = given_back_without_a_disk(&config, &dir, third);
        let owners = ended.owners();
        assert!(!owners.contains(&1), "nothing is left of v2");
        // Whether it comes by the maps as they are, or as they were when the mark was written.
        let mut agent = restarted(&ended, &dir, &config, 1_000);
        assert_eq!(agent.owners(), owners);
        assert!(asked(&mut agent).contains("v2 0%"), "{}", asked(&mut agent));
        let over = status(&mut agent, "shop-v2");
        assert_eq!(over.state, "aborted", "{third}: {over:?}");
        let reason = over.reason.unwrap();
        assert!(reason.contains("worse") && !reason.contains("panic"), "{reason}");
        let (_, last) = trail(&dir).pop().unwrap();
        assert_eq!(last.action, "rollout");
        assert!(last.reason.unwrap().contains("worse"));
        assert!(agent.status().services[0].panic.is_none(), "it was no panic");
        seconds(&mut agent, 60);
        assert_eq!(agent.owners(), owners, "and nobody moves it up again");
        // Once it is stored, the next one need not be told.
        let mut agent = restarted(&agent, &dir, &config, 1_000);
        assert_eq!(
            (agent.owners(), status(&mut agent, "shop-v2").state.as_str()),
            (owners, "aborted")
        );
    }
}

#[test]
fn a_share_that_went_a_step_back_without_a_disk_is_that_of_the_step_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = with(vec![step("5%", 10), gated("50%"), step("80%", 0)]);
    let rollout = Rollout { on_fail: Reaction::StepBack, ..(*config.rollouts[0]).clone() };
    config.rollouts[0] = Arc::new(rollout);
    let ended = given_back_without_a_disk(&config, &dir, "10%");
    let owners = ended.owners();
    let mut agent = restarted(&ended, &dir, &config, 1_000);
    assert_eq!(agent.owners(), owners, "exactly the buckets that it had there");
    assert_eq!(asked(&mut agent), "stable 85%, v2 5%, v3 10%");
    let held = status(&mut agent, "shop-v2");
    assert_eq!((held.state.as_str(), held.step), ("held", Some(1)), "{held:?}");
    assert!(held.reason.unwrap().contains("worse"));
}

#[test]
fn a_mark_of_a_service_that_is_gone_takes_only_its_version_back() {
    let dir = tempfile::tempdir().unwrap();
    let config = with(vec![step("5%", 10), gated("50%"), step("80%", 0)]);
    let ended = given_back_without_a_disk(&config, &dir, "10%");
    let owners = ended.owners();
    let mut without = config.clone();
    without.rollouts.clear();
    without.services.retain(|service| service.name != "shop");
    drop(restarted(&ended, &dir, &without, 1_000));
    // It is configured again: as it was left.
    let mut agent = Agent::start(dir.path(), &config, Shared::default(), Adopted::default());
    assert_eq!(agent.owners(), owners);
    assert_eq!(asked(&mut agent), "stable 90%, v2 0%, v3 10%");
}

#[test]
fn an_abort_that_leaves_control_alone_is_marked_in_the_maps_while_the_disk_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, &with(vec![step("50%", 1_000)]));
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    seconds(&mut agent, 10);
    agent.host.with(|host| host.refuse_store = true);
    tell(&mut agent, "shop-v2", Action::Abort).unwrap();
    assert_eq!(asked(&mut agent), "stable 100%, v2 0%, v3 0%");
    assert_eq!(agent.host.with(|host| host.marked.clone()), ["shop"]);
    agent.host.with(|host| host.refuse_store = false);
    seconds(&mut agent, 2);
    assert_eq!(agent.host.with(|host| host.unmarked.clone()), [1], "stored, and done with");
}

#[test]
fn a_gate_that_fails_aborts_and_one_that_passes_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, &with(vec![gated("5%"), gated("50%"), step("100%", 0)]));
    let (errands, mut sent) = tokio::sync::mpsc::unbounded_channel();
    agent.state.send_errands_to(errands);
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    seconds(&mut agent, 9);
    let Ok(Errand::Measure { .. }) = sent.try_recv() else { panic!("somebody is asked") };
    for _ in 0..3 {
        say(&mut agent, Answer::Good("fine".to_owned()));
        seconds(&mut agent, 1);
    }
    assert_eq!(status(&mut agent, "shop-v2").step, Some(2), "it has passed");
    seconds(&mut agent, 9);
    assert_eq!(asked(&mut agent), "stable 50%, v2 50%, v3 0%");
    say(&mut agent, Answer::Bad("worse".to_owned()));
    assert_eq!(asked(&mut agent), "stable 50%, v2 50%, v3 0%");
    seconds(&mut agent, 1);
    say(&mut agent, Answer::Bad("worse".to_owned()));
    assert_eq!(asked(&mut agent), "stable 100%, v2 0%, v3 0%");
    let over = status(&mut agent, "shop-v2");
    assert_eq!(over.state, "aborted");
    assert!(over.reason.unwrap().contains("worse"));
    // What it has come to its end by is still there.
    let states: Vec<&str> = over.steps.iter().map(|step| step.state.as_str()).collect();
    assert_eq!(states, ["done", "ended", "to come"]);
    let gate = over.gate.unwrap();
    assert_eq!((gate.verdict.as_deref(), gate.probes[0].bad), (Some("fail"), 2));
    let history = agent
        .ask(|reply| Request::RolloutHistory { name: "shop-v2".to_owned(), evidence: true, reply })
        .unwrap();
    assert!(history.runs[0].evidence.len() >= 4, "{history:?}");
    // Another begins from the first step.
    tell(&mut agent, "shop-v2", Action::Retry).unwrap();
    assert_eq!(status(&mut agent, "shop-v2").step, Some(1));
}

/// The share that would be set.
fn tried(agent: &mut Agent, action: Action, full: bool) -> Option<String> {
    let request = RolloutRequest { dry_run: true, full, ..RolloutRequest::default() };
    let name = "shop-v2".to_owned();
    let asked = |reply| Request::Rollout { name, action, request, peer: PEER, reply };
    let report: RolloutReport = agent.ask(asked).unwrap();
    assert!(!report.applied);
    report.share
}

#[test]
fn what_would_be_set_is_said_beforehand() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, &with(vec![step("5%", 1_000), step("50%", 0), step("80%", 0)]));
    assert_eq!(tried(&mut agent, Action::Start, false).as_deref(), Some("5%"));
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    seconds(&mut agent, 10);
    let before = (asked(&mut agent), status(&mut agent, "shop-v2"));
    for (action, full, share) in [
        (Action::Promote, false, Some("50%")),
        (Action::Promote, true, Some("80%")),
        (Action::Abort, false, Some("0%")),
        (Action::Pause, false, None),
    ] {
        assert_eq!(tried(&mut agent, action, full).as_deref(), share, "{action:?}");
    }
    assert_eq!((asked(&mut agent), status(&mut agent, "shop-v2")), before);
}

#[test]
fn evidence_that_waits_for_a_disk_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, &with(vec![gated("5%"), step("100%", 0)]));
    let (errands, mut sent) = tokio::sync::mpsc::unbounded_channel();
    agent.state.send_errands_to(errands);
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    seconds(&mut agent, 9);
    let Ok(Errand::Measure { turn, .. }) = sent.try_recv() else { panic!("somebody is asked") };
    agent.host.with(|host| host.refuse_store = true);
    for _ in 0..25_000 {
        let (rollout, answer) = ("shop-v2".to_owned(), Answer::None("nobody is there".to_owned()));
        agent.event(Event::Said(Said::Measured { rollout, turn, probe: 0, answer }));
    }
    seconds(&mut agent, 7);
    agent.host.with(|host| host.refuse_store = false);
    seconds(&mut agent, 2);
    let history = agent
        .ask(|reply| Request::RolloutHistory { name: "shop-v2".to_owned(), evidence: true, reply })
        .unwrap();
    let kept = &history.runs[0].evidence;
    assert_eq!(kept.len(), 20_000);
}

#[test]
fn a_later_agent_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let config = with(vec![step("5%", 30), gated("50%"), step("100%", 0)]);
    let mut agent = start(&dir, &config);
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    seconds(&mut agent, 28);
    let before = status(&mut agent, "shop-v2").watched_seconds;
    assert!((15.0..25.0).contains(&before), "{before}");
    let mut agent = restarted(&agent, &dir, &config, 3_600_000);
    let after = status(&mut agent, "shop-v2");
    assert_eq!((after.state.as_str(), after.step, after.run), ("watching", Some(1), Some(1)));
    assert!(after.watched_seconds <= before && after.watched_seconds >= before - 6.0);
    seconds(&mut agent, 25);
    assert_eq!(asked(&mut agent), "stable 50%, v2 50%, v3 0%");
    say(&mut agent, Answer::Bad("worse".to_owned()));
    seconds(&mut agent, 6);
    // Evidence is kept, too: one more is enough.
    let mut agent = restarted(&agent, &dir, &config, 1_000);
    let gate = status(&mut agent, "shop-v2").gate.unwrap();
    assert_eq!(gate.probes[0].bad, 1);
    say(&mut agent, Answer::Bad("worse".to_owned()));
    assert_eq!(status(&mut agent, "shop-v2").state, "aborted");
    assert_eq!(asked(&mut agent), "stable 100%, v2 0%, v3 0%");
    // The steps are others: somebody has to look.
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    let other = with(vec![step("5%", 30), step("100%", 0)]);
    let mut agent = restarted(&agent, &dir, &other, 1_000);
    let stands = status(&mut agent, "shop-v2");
    assert_eq!((stands.state.as_str(), stands.needs_operator), ("paused", true));
    assert!(stands.reason.unwrap().contains("configuration has changed"));
    tell(&mut agent, "shop-v2", Action::Resume).unwrap();
    assert_eq!(status(&mut agent, "shop-v2").state, "entering");
}

#[test]
fn others_may_do_what_they_like_and_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let config = with(vec![step("5%", 10), step("50%", 1_000), step("80%", 0)]);
    let mut agent = start(&dir, &config);
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    // One at a time.
    assert_eq!(tell(&mut agent, "shop-v3", Action::Start).unwrap_err().code, "rollout_under_way");
    assert_eq!(tell(&mut agent, "shop-v2", Action::Start).unwrap_err().code, "rollout_under_way");
    assert_eq!(
        tell(&mut agent, "shop-v3", Action::Abort).unwrap_err().code,
        "rollout_not_under_way"
    );
    assert_eq!(tell(&mut agent, "shop-v9", Action::Start).unwrap_err().code, "unknown_rollout");
    seconds(&mut agent, 10);
    // A freeze keeps it from going up, and not from going back.
    freeze(&mut agent, Some("shop"), Some("the night before"), None).unwrap();
    seconds(&mut agent, 40);
    let waits = status(&mut agent, "shop-v2").waits.unwrap();
    assert!(waits.contains("the night before"), "{waits}");
    assert_eq!(asked(&mut agent), "stable 95%, v2 5%, v3 0%");
    freeze(&mut agent, Some("shop"), None, None).unwrap();
    seconds(&mut agent, 9);
    assert_eq!(asked(&mut agent), "stable 50%, v2 50%, v3 0%");
    // Somebody sets its share, and takes that back.
    agent.split(&[("v2", "7%")]).unwrap();
    let stands = status(&mut agent, "shop-v2");
    assert_eq!(stands.state, "paused");
    assert!(stands.reason.unwrap().contains("7%"));
    tell(&mut agent, "shop-v2", Action::Resume).unwrap();
    seconds(&mut agent, 9);
    assert_eq!(asked(&mut agent), "stable 50%, v2 50%, v3 0%");
    let undo = UndoRequest { service: Some("shop".to_owned()), ..UndoRequest::default() };
    agent.ask(|reply| Request::Undo { request: undo, peer: PEER, reply }).unwrap();
    assert_eq!(asked(&mut agent), "stable 93%, v2 7%, v3 0%");
    assert_eq!(status(&mut agent, "shop-v2").state, "paused");
    // A panic ends it.
    tell(&mut agent, "shop-v2", Action::Resume).unwrap();
    seconds(&mut agent, 9);
    let request = PanicRequest { service: Some("shop".to_owned()), ..PanicRequest::default() };
    agent.ask(|reply| Request::Panic { request, peer: PEER, reply }).unwrap();
    let over = status(&mut agent, "shop-v2");
    assert_eq!(over.state, "aborted");
    assert!(over.reason.unwrap().contains("panic"));
    assert_eq!(asked(&mut agent), "stable 100%, v2 0%, v3 0%");
}

#[test]
fn what_could_not_go_on_does_not_begin() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, &with(vec![step("5%", 10), step("100%", 0)]));
    agent.split(&[("v3", "10%")]).unwrap();
    let refused = tell(&mut agent, "shop-v2", Action::Start).unwrap_err();
    assert_eq!(refused.code, "shares_above_whole");
    assert!(refused.message.contains("v3=10%"), "{refused}");
    agent.split(&[("v3", "0"), ("v2", "20%")]).unwrap();
    assert_eq!(tell(&mut agent, "shop-v2", Action::Start).unwrap_err().code, "share_is_larger");
    agent.split(&[("v2", "0")]).unwrap();
    let request = FreezeRequest {
        service: Some("shop".to_owned()),
        reason: Some("no".to_owned()),
        ..FreezeRequest::default()
    };
    agent.ask(|reply| Request::Freeze { request, freezes: true, peer: PEER, reply }).unwrap();
    assert_eq!(tell(&mut agent, "shop-v2", Action::Start).unwrap_err().code, "frozen");
    freeze(&mut agent, Some("shop"), None, None).unwrap();
    let split = [("v2".to_owned(), "1%".to_owned())].into();
    let request = SplitRequest { split, confirm: Some("5m".to_owned()), ..SplitRequest::default() };
    let service = "shop".to_owned();
    agent.ask(|reply| Request::Split { service, request, peer: PEER, reply }).unwrap();
    let refused = tell(&mut agent, "shop-v2", Action::Start).unwrap_err();
    assert_eq!(refused.code, "confirmation_pending");
    assert_eq!(status(&mut agent, "shop-v2").state, "idle");
    assert_eq!(trail(&dir).iter().filter(|(_, one)| one.action.contains("rollout")).count(), 0);
}

#[test]
fn what_is_known_of_a_rollout_before_it_begins() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, &with(vec![gated("5%"), step("100%", 0)]));
    agent.split(&[("v3", "10%")]).unwrap();
    let prospect = |agent: &mut Agent, name: &str| {
        let name = name.to_owned();
        agent.ask(|reply| Request::Prospect { name, reply })
    };
    assert_eq!(prospect(&mut agent, "shop-v2").unwrap().per_second, None, "not known yet");
    seconds(&mut agent, 3);
    let known = prospect(&mut agent, "shop-v2").unwrap();
    assert_eq!((known.rollout.name.as_str(), known.per_second), ("shop-v2", Some(0.0)));
    // 60 a second of each of its backends, whichever version they are of.
    let indices: Vec<_> =
        agent.host.with(|host| host.plane.backends.iter().map(|(index, _)| *index).collect());
    for _ in 0..15 {
        agent.host.with(|host| {
            for index in &indices {
                *host.connections.entry(*index).or_default() += 60;
            }
        });
        seconds(&mut agent, 1);
    }
    let per_second = prospect(&mut agent, "shop-v2").unwrap().per_second.unwrap();
    let of_shop: usize =
        agent.status().services[0].versions.iter().map(|version| version.backends.len()).sum();
    let expected = 60.0 * of_shop as f64;
    assert!((per_second / expected - 1.0).abs() < 0.15, "{per_second} of {expected}");
    assert_eq!((known.others, known.watched_at_most), (vec![0.1], None));
    assert!(prospect(&mut agent, "shop-v3").unwrap().others.is_empty());
    assert_eq!(prospect(&mut agent, "shop-v9").unwrap_err().code, "unknown_rollout");
}

#[test]
fn windows_with_few_connections_are_weighed_and_told_together() {
    let dir = tempfile::tempdir().unwrap();
    let signal = Signal::Kernel(KernelSignal {
        kind: SignalKind::ClientReset,
        quantile_permille: None,
        tolerate: 1.2,
        pass_below: 3.0,
        observe: false,
    });
    let asked = gated("5%");
    let gate = Gate { signals: vec![signal], ..Gate::clone(asked.gate.as_ref().unwrap()) };
    let config = with(vec![Step { gate: Some(Arc::new(gate)), ..asked }, step("100%", 0)]);
    let mut agent = start(&dir, &config);
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    seconds(&mut agent, 9);
    let window = |agent: &mut Agent, connections: [u64; 2], events: [u64; 2]| {
        agent.event(Event::Counted(Counted {
            service: "shop".to_owned(),
            canary: "v2".to_owned(),
            watched: Duration::from_secs(1),
            complete: true,
            slow_ns: u64::MAX,
            connections,
            events: vec![(SignalKind::ClientReset, events)],
        }));
        seconds(agent, 1);
    };
    let seen = |agent: &mut Agent| {
        let signal = status(agent, "shop-v2").gate.unwrap().signals.remove(0);
        [signal.control_events, signal.canary_events]
    };
    // A reset comes in a second in which the canary has no connection.
    window(&mut agent, [60, 9], [1, 0]);
    window(&mut agent, [60, 0], [1, 1]);
    assert_eq!(seen(&mut agent), [0, 0], "not over yet");
    window(&mut agent, [60, 1], [0, 0]);
    assert_eq!(seen(&mut agent), [2, 1]);
    let history = agent
        .ask(|reply| Request::RolloutHistory { name: "shop-v2".to_owned(), evidence: true, reply })
        .unwrap();
    let [row] = &history.runs[0].evidence[..] else { panic!("{history:?}") };
    assert_eq!((row.control, row.canary), (Some(2), Some(1)));
    assert!((row.share.unwrap() - 10.0 / 190.0).abs() < 1e-12, "{row:?}");
}
