//! Backends that are told to be something, and splits that are prepared.

use std::collections::HashMap;

use canary_agent::{
    config::model::{Ask, Check, Config, Fallback, Forward, Health, Timing, Via},
    daemon::Event,
    datapath::Census,
    health::Change as HealthChange,
    plan::Adopted,
    store::{Admin, SqliteStore, StateStore},
};
use canary_ebpf_common::entry::BackendIndex;

use crate::{
    plan_support::maps,
    support::{Agent, Shared, agent, shop},
};

fn index_of(agent: &Agent, addr: &str) -> BackendIndex {
    let addr = addr.parse().unwrap();
    let backends = &agent.state.plane().backends;
    backends.iter().find(|(_, b)| b.addr == addr && b.service == 0).unwrap().0
}

/// Buckets of the shop whose new connections go to `addr`, and those whose old ones stay there.
fn buckets(agent: &Agent, addr: &str) -> (usize, usize) {
    let index = index_of(agent, addr);
    let entries = &agent.state.plane().services[0].entries;
    let current = entries.iter().filter(|e| e.current() == index).count();
    let left = entries.iter().filter(|e| e.tracked() && e.previous() == index);
    (current, left.filter(|e| e.current() != index).count())
}

fn start(dir: &tempfile::TempDir, change: impl FnOnce(&mut Config)) -> Agent {
    let mut config = shop();
    change(&mut config);
    Agent::start(dir.path(), &config, Shared::default(), Adopted::default())
}

#[test]
fn a_drained_backend_gets_nothing_new_and_its_connections_stay_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let before = agent.state.plane().services[0].entries.clone();
    let dry = agent.tell("10.0.1.1:443", "drain --dry-run").unwrap();
    assert_eq!((dry.applied, dry.buckets_moved, dry.revision), (false, 2048, 2));
    assert_eq!(*agent.state.plane().services[0].entries, *before);
    let report = agent.tell("10.0.1.1", "drain").unwrap();
    assert!(report.applied, "an address that one backend has will do");
    assert_eq!((report.buckets_moved, report.revision), (2048, 3));
    assert_eq!((report.before.as_str(), report.state.as_str()), ("ready", "drain"));
    assert_eq!(report.backends_touched, ["10.0.1.1:443", "10.0.1.2:443"]);
    assert_eq!(report.backends_touched, dry.backends_touched);
    assert_eq!(buckets(&agent, "10.0.1.1:443"), (0, 2048));
    let status = agent.status();
    let one = &status.services[0].versions[0].backends[0];
    assert_eq!((&*one.state, &*one.health), ("drain", "up"));
    assert_eq!((&*one.admin, one.draining_buckets), ("drain", 2048));
    let list = agent.listed();
    assert_eq!(list.versions[0].draining_backends, 1);

    // The same again changes nothing and stores nothing.
    let again = agent.tell("10.0.1.1:443", "drain").unwrap();
    assert_eq!((again.buckets_moved, again.revision), (0, 3));

    let trail = SqliteStore::new(dir.path()).changes(2, 10).unwrap();
    let [change] = trail[0].1.backends[..] else { panic!("one backend") };
    assert_eq!(
        (trail.len(), trail[0].1.action.as_str(), trail[0].1.uid),
        (1, "backend", Some(1000))
    );
    assert_eq!((change.before, change.after), (Admin::Ready, Admin::Drain));

    // With the store, and without it: the records say it too.
    let plane = agent.host.with(|host| host.plane.clone());
    for dir in [&dir, &tempfile::tempdir().unwrap()] {
        let mut next = Agent::start(dir.path(), &shop(), Shared::default(), maps(&plane));
        assert!(next.host.with(|host| host.plane.clone()) == plane, "not a bit differs");
        assert_eq!(next.status().services[0].versions[0].backends[0].admin, "drain");
        next.tell("10.0.1.1:443", "ready").unwrap();
        assert_eq!(buckets(&next, "10.0.1.1:443"), (2048, 0));
        let back = next.state.plane().services[0].entries.clone();
        assert!(back.iter().zip(before.iter()).all(|(a, b)| a.current() == b.current()));
    }
}

#[test]
fn maintenance_is_marked_on_the_record_and_taken_away_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let flags = |agent: &Agent| {
        let index = index_of(agent, "10.0.1.2:443");
        let backends = &agent.state.plane().backends;
        let plan = backends.iter().find(|(i, _)| *i == index).unwrap().1;
        (plan.drain, plan.maint)
    };
    assert_eq!(flags(&agent), (false, false));
    let report = agent.tell("10.0.1.2:443", "maint").unwrap();
    assert!(report.notes.iter().any(|note| note.contains("are cut")), "{:?}", report.notes);
    assert_eq!(flags(&agent), (false, true));
    assert_eq!(buckets(&agent, "10.0.1.2:443").0, 0);
    // From maintenance to draining: nothing moves, and the mark goes.
    let report = agent.tell("10.0.1.2:443", "drain").unwrap();
    assert_eq!((report.before.as_str(), report.buckets_moved), ("maint", 0));
    assert_eq!(flags(&agent), (true, false));
    agent.tell("10.0.1.2:443", "ready").unwrap();
    assert_eq!(flags(&agent), (false, false));
    assert_eq!(buckets(&agent, "10.0.1.2:443").0, 2048);
}

#[test]
fn what_would_leave_nobody_is_refused_without_force() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "50%")]).unwrap();
    agent.tell("10.0.1.1:443", "drain").unwrap();
    for state in ["drain", "maint", "drain --dry-run"] {
        let refusal = agent.tell("10.0.1.2:443", state).unwrap_err();
        assert_eq!((refusal.code, refusal.exit_code), ("last_backend", 1));
        assert!(refusal.message.contains("last IPv4 backend of control `stable`"), "{refusal}");
        assert!(refusal.help.unwrap().contains("--force"));
    }
    // The last of another version: control takes over, and the answer says so.
    let report = agent.tell("10.0.2.1:443", "drain").unwrap();
    assert!(report.notes.iter().any(|n| n.contains("`stable` takes its new connections")));
    assert_eq!(buckets(&agent, "10.0.1.2:443").0, 4096);
    assert!(agent.status().alerts.iter().any(|a| a.contains("`v2` has no usable")));
    agent.tell("10.0.2.1:443", "ready").unwrap();
    // By force: nobody takes new connections, and everybody is told.
    let report = agent.tell("10.0.1.2:443", "drain --force").unwrap();
    assert!(report.notes.iter().any(|n| n.contains("its new connections get nothing")));
    let entries = agent.state.plane().services[0].entries.clone();
    assert_eq!(entries.iter().filter(|e| e.current().is_none()).count(), 2048);
    assert!(agent.status().alerts.iter().any(|a| a.contains("every IPv4 backend of control")));
    // What takes none already is no loss.
    agent.tell("10.0.1.2:443", "maint").unwrap();
    agent.tell("10.0.1.1:443", "ready").unwrap();
    assert_eq!(buckets(&agent, "10.0.1.1:443").0, 2048);
    assert!(agent.status().alerts.is_empty());
}

#[test]
fn the_last_backend_of_a_version_that_falls_back_to_nobody_needs_force_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, |config| config.services[0].fallback = Fallback::None);
    // Without a bucket it serves nobody.
    agent.tell("10.0.2.1:443", "drain").unwrap();
    agent.tell("10.0.2.1:443", "ready").unwrap();
    agent.split(&[("v2", "50%")]).unwrap();
    let refusal = agent.tell("10.0.2.1:443", "drain").unwrap_err();
    assert!(refusal.message.contains("of version `v2`"), "{refusal}");
    let report = agent.tell("10.0.2.1:443", "drain --force").unwrap();
    assert!(report.notes.iter().any(|n| n.contains("get nothing")), "{:?}", report.notes);
}

#[test]
fn checks_that_fail_bring_no_drained_backend_back() {
    let dir = tempfile::tempdir().unwrap();
    let second = std::time::Duration::from_secs(1);
    let mut agent = start(&dir, |config| {
        let timing =
            Timing { interval: second, timeout: second, rise: 1, fall: 1, jitter_percent: 0 };
        config.services[0].health =
            Health::Check(Check { ask: Ask::Tcp, via: Via::Backend, timing });
    });
    agent.tell("10.0.1.1:443", "drain").unwrap();
    let down = |addr: &str, down| HealthChange {
        service: "shop".into(),
        addr: addr.parse().unwrap(),
        down,
        why: None,
    };
    agent.event(Event::Health(vec![down("10.0.1.2:443", true)]));
    // The checks are taken to be wrong, not the operator.
    assert_eq!(buckets(&agent, "10.0.1.2:443").0, 4096);
    assert!(agent.status().alerts.iter().any(|a| a.contains("all of them are tried")));
    // What is down may be drained as long as another is left to try.
    agent.event(Event::Health(vec![down("10.0.1.1:443", true)]));
    agent.tell("10.0.1.1:443", "ready").unwrap();
    agent.tell("10.0.1.2:443", "drain").unwrap();
    assert_eq!(buckets(&agent, "10.0.1.1:443").0, 4096);
}

#[test]
fn who_is_meant_is_asked_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, |config| {
        let backends = &mut config.services[0].versions[0].backends;
        let twin = "10.0.1.1:8443".parse().unwrap();
        backends.push(canary_agent::config::model::Backend { addr: twin, weight: 1 });
    });
    for (backend, state, code, exit_code, said) in [
        ("10.0.1.1", "drain", "ambiguous_backend", 2, "`10.0.1.1:443`, `10.0.1.1:8443`"),
        ("10.0.1.3:443", "drain", "unknown_backend", 1, "did you mean"),
        ("nobody", "drain", "unknown_backend", 1, "its backends are `10.0.1.1:443`"),
        ("10.0.1.2:443", "off", "bad_state", 2, "`ready`, `drain` or `maint`"),
        ("", "drain", "unknown_backend", 1, "its backends are"),
    ] {
        let refusal = agent.tell(backend, state).unwrap_err();
        assert_eq!((refusal.code, refusal.exit_code), (code, exit_code), "{refusal:?}");
        assert!(refusal.help.as_ref().unwrap().contains(said), "{refusal:?}");
    }
    assert_eq!(agent.status().agent.revision, 2, "nothing was stored");
}

#[test]
fn what_can_not_be_stored_is_not_done() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.host.with(|host| host.refuse_store = true);
    let refusal = agent.tell("10.0.1.1:443", "drain").unwrap_err();
    assert_eq!(refusal.code, "state_not_stored");
    assert!(refusal.message.contains("10.0.1.1:443"), "{refusal}");
    assert_eq!(buckets(&agent, "10.0.1.1:443"), (2048, 0));
    assert_eq!(agent.status().services[0].versions[0].backends[0].admin, "ready");
}

#[test]
fn a_backend_that_is_removed_is_listed_while_it_drains_and_its_state_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = agent(&dir);
    first.tell("10.0.1.1:443", "drain").unwrap();
    let plane = first.host.with(|host| host.plane.clone());
    let mut less = shop();
    less.services[0].versions[0].backends.remove(0);
    let mut next = Agent::start(dir.path(), &less, Shared::default(), maps(&plane));
    let list = next.listed();
    let states: Vec<_> = list.versions[0].backends.iter().map(|d| &*d.backend.state).collect();
    assert_eq!(states, ["up", "removed"]);
    assert_eq!(list.versions[0].backends[1].backend.draining_buckets, 2048);
    assert_eq!(list.versions[0].draining_backends, 1);
    let refusal = next.tell("10.0.1.1:443", "ready").unwrap_err();
    assert_eq!(refusal.code, "removed_backend");
    assert!(SqliteStore::new(dir.path()).load().unwrap().services[1].admins.is_empty());
    let plane = next.host.with(|host| host.plane.clone());
    let mut again = Agent::start(dir.path(), &shop(), Shared::default(), maps(&plane));
    assert_eq!(again.status().services[0].versions[0].backends[0].admin, "ready");
}

#[test]
fn open_connections_are_counted_where_all_have_entries() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, |config| config.services[0].forward = Forward::Nat);
    let (one, two) = (index_of(&agent, "10.0.1.1:443"), index_of(&agent, "10.0.1.2:443"));
    let census = Census {
        by_backend: HashMap::from([(one, 30), (two, 12)]),
        in_buckets: 5,
        ..Census::default()
    };
    agent.host.with(|host| host.census = Some(census));
    let list = agent.listed();
    let open: Vec<_> = list.versions[0].backends.iter().map(|d| d.open_connections).collect();
    assert_eq!((open, list.versions[0].open_connections), (vec![Some(30), Some(12)], Some(42)));
    assert_eq!(list.versions[1].open_connections, Some(0));
    assert_eq!(agent.split(&[("v2", "5%")]).unwrap().connections_held, Some(5));
    assert_eq!(agent.request("shop", &[("v2", "9%")], true).unwrap().connections_held, Some(5));
    assert_eq!(agent.tell("10.0.1.1:443", "drain").unwrap().connections_held, Some(30));
    assert_eq!(agent.listed().versions[0].draining_backends, 1);
    assert_eq!(agent.tell("10.0.1.1:443", "ready").unwrap().connections_held, Some(5));
}

#[test]
fn with_dsr_the_answer_says_how_many_begin_in_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    assert_eq!(agent.split(&[("v2", "1%")]).unwrap().connections_per_second, None);
    agent.split(&[("v2", "0")]).unwrap();
    agent.wait(1_000);
    for addr in ["10.0.1.1:443", "10.0.1.2:443"] {
        let index = index_of(&agent, addr);
        agent.host.with(|host| *host.connections.entry(index).or_default() += 200);
    }
    agent.boot_ms += 2_000;
    // 200 a second, of which a quarter goes to the buckets that move.
    let report = agent.split(&[("v2", "25%")]).unwrap();
    let rate = report.connections_per_second.unwrap();
    assert!((rate - 50.0).abs() < 3.0, "{rate}");
    assert_eq!(report.connections_held, None);
    assert!(report.notes.iter().any(|note| note.contains("is not known")), "{:?}", report.notes);
    // Where nothing moves there is nothing to say.
    let none = agent.tell("10.0.1.1:443", "ready").unwrap();
    assert_eq!((none.buckets_moved, none.connections_per_second), (0, None));
    assert!(agent.tell("10.0.1.1:443", "drain").unwrap().connections_per_second.is_some());
}

#[test]
fn a_split_that_learns_watches_seven_seconds_and_then_moves() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let owners = agent.owners();
    let (mut answer, wakeup) = agent.learn(&[("v2", "25%")]);
    assert!(answer.try_recv().is_err(), "it is not done yet");
    assert_eq!(wakeup, Some(agent.boot_ms + 7_000));
    assert_eq!(agent.owners(), owners);
    let watched: Vec<_> = agent.host.with(|host| {
        let entries = host.plane.services[0].entries.iter().enumerate();
        entries.filter(|(_, e)| e.tracked()).map(|(b, e)| (b, *e)).collect()
    });
    assert!(watched.iter().all(|(_, e)| e.current() == e.previous()));
    assert!((1024..1100).contains(&watched.len()), "{}", watched.len());
    agent.wait(6_999);
    assert!(answer.try_recv().is_err());
    agent.wait(1);
    let report = answer.try_recv().expect("it is done").unwrap();
    assert_eq!((report.buckets_moved, report.learned_ms), (1024, Some(7_000)));
    assert!(report.applied);
    let entries = agent.state.plane().services[0].entries.clone();
    for (bucket, was) in watched {
        let is = entries[bucket];
        assert!(is.current() != was.current() && is.previous() == was.current(), "{bucket}");
    }
    assert_eq!(agent.host.with(|host| host.plane.services.clone()), agent.state.plane().services);
    // What is tried is said.
    let request = agent.request("shop", &[("v2", "26%")], true).unwrap();
    assert_eq!(request.learned_ms, None);
}

#[test]
fn what_comes_between_learning_and_moving_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let owners = agent.owners();
    // A split that is made at once wins.
    let (mut first, _) = agent.learn(&[("v2", "25%")]);
    let (mut second, _) = agent.learn(&[("v2", "30%")]);
    assert_eq!(second.try_recv().unwrap().unwrap_err().code, "split_is_prepared");
    agent.split(&[("v3", "10%")]).unwrap();
    let refusal = first.try_recv().unwrap().unwrap_err();
    assert_eq!(refusal.code, "superseded");
    agent.split(&[("v3", "0")]).unwrap();
    agent.wait(10_000);
    assert_eq!(agent.owners(), owners);
    // Whoever stops waiting has not asked.
    let (gone, _) = agent.learn(&[("v2", "25%")]);
    drop(gone);
    agent.wait(10_000);
    assert_eq!(agent.owners(), owners);
    // A backend may fail meanwhile.
    let (mut answer, _) = agent.learn(&[("v2", "25%")]);
    agent.tell("10.0.1.1:443", "drain").unwrap();
    agent.wait(7_000);
    assert!(answer.try_recv().unwrap().unwrap().applied);
    // Without a disk nothing is done.
    let (mut answer, _) = agent.learn(&[("v2", "35%")]);
    agent.host.with(|host| host.refuse_store = true);
    agent.wait(7_000);
    assert_eq!(answer.try_recv().unwrap().unwrap_err().code, "state_not_stored");
}

#[test]
fn an_agent_that_ends_while_it_learns_has_changed_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = agent(&dir);
    first.split(&[("v3", "10%")]).unwrap();
    let (mut answer, _) = first.learn(&[("v2", "25%")]);
    first.wait(3_000);
    let (owners, plane) = (first.owners(), first.host.with(|host| host.plane.clone()));
    drop(first);
    assert!(answer.try_recv().is_err(), "nobody says that it was done");
    let mut next = Agent::start(dir.path(), &shop(), Shared::default(), maps(&plane));
    assert_eq!(next.owners(), owners);
    assert_eq!(next.status().services[0].versions[1].asked_text, "0%");
    // What was watched is forgotten with its drain, and a new attempt goes through.
    next.boot_ms += 2_000_000;
    next.event(Event::Wakeup);
    assert_eq!(next.status().services[0].tracked_buckets, 0);
    next.split(&[("v2", "25%")]).unwrap();
}

#[test]
fn where_there_is_nothing_to_learn_a_split_is_made_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = start(&dir, |config| config.services[0].forward = Forward::Nat);
    let (mut answer, _) = agent.learn(&[("v2", "25%")]);
    let report = answer.try_recv().unwrap().unwrap();
    assert_eq!((report.applied, report.learned_ms), (true, None));
    assert!(report.notes.iter().any(|n| n.contains("nothing to learn")), "{:?}", report.notes);
    let (mut answer, _) = agent.learn(&[("v2", "25%")]);
    assert_eq!(answer.try_recv().unwrap().unwrap().buckets_moved, 0);
}
