//! Everything to control: over the socket, and behind the agent's back.

use canary_agent::{
    api::{
        model::{UndoReport, UndoRequest},
        panic::{PanicReport, PanicRequest},
    },
    config::model::Config,
    daemon::{Event, Peer, Refusal, Request},
    plan::{Adopted, Diverted, PanicMark, Panicking},
    store::{Change, SqliteStore, StateStore},
};
use canary_ebpf_common::entry::{BackendIndex, Entry};

use crate::{
    changes::{confirm, freeze, split},
    plan_support::{maps, service},
    support::{Agent, Shared, agent, shop},
};

const PEER: Peer = Peer { uid: 1000, gid: 1000, pid: None };

/// `shop` in the tests has 4,096 buckets.
const BUCKETS: usize = 4096;

fn ask(agent: &mut Agent, request: PanicRequest) -> Result<PanicReport, Refusal> {
    agent.ask(|reply| Request::Panic { request, peer: PEER, reply })
}

fn of(service: Option<&str>) -> PanicRequest {
    PanicRequest {
        service: service.map(str::to_owned),
        reason: Some("v2 is bad".to_owned()),
        ..PanicRequest::default()
    }
}

fn undo(agent: &mut Agent, request: UndoRequest) -> Result<UndoReport, Refusal> {
    agent.ask(|reply| Request::Undo { request, peer: PEER, reply })
}

fn trail(dir: &tempfile::TempDir) -> Vec<(u64, Change)> {
    SqliteStore::new(dir.path()).changes(0, 1_000).unwrap()
}

fn panics(dir: &tempfile::TempDir) -> Vec<Change> {
    let all = trail(dir).into_iter().map(|(_, change)| change);
    all.filter(|change| change.action == "panic").collect()
}

/// A configuration of two services with a canary each, and one without.
fn two() -> Config {
    let mut config = shop();
    config.services.push(service(
        "mail",
        &[("stable", &[("10.0.1.1:443", 1)]), ("v2", &[("10.0.2.2:443", 1)])],
    ));
    config
}

/// The backends of control of the first service, by index, and all of its entries.
fn entries(agent: &Agent) -> (Vec<BackendIndex>, Vec<Entry>) {
    let plane = agent.host.with(|host| host.plane.clone());
    let table = &plane.services[0];
    let of_control = |b: &&(BackendIndex, canary_agent::plan::BackendPlan)| {
        u32::from(b.1.service) == table.record.id && b.1.version == table.control
    };
    let control = plane.backends.iter().filter(of_control).map(|(index, _)| *index).collect();
    (control, table.entries.to_vec())
}

#[track_caller]
pub(crate) fn assert_all_on_control(agent: &Agent) {
    let (control, entries) = entries(agent);
    assert_eq!(entries.len(), BUCKETS);
    assert!(entries.iter().all(|entry| control.contains(&entry.current())));
    assert!(agent.owners().iter().all(|owner| *owner == 0));
}

/// What the maps hold after somebody has sent a service to control behind the agent's back.
pub(crate) fn behind(
    adopted: Adopted,
    service: &str,
    moves: bool,
    now_ms: u64,
    id: u64,
) -> Adopted {
    let mut adopted = adopted;
    for table in adopted.services.iter_mut().filter(|table| table.name == service) {
        let its = adopted.backends.iter().filter(|(_, b)| b.service == table.id);
        let backends: Vec<_> = its.copied().collect();
        let (control, record) = (table.control, table.record.as_ref());
        let panicking = Panicking { control, record, backends: &backends, moves, now_ms };
        let mut diverted = Diverted::default();
        panicking.divert(&table.entries, &mut diverted).expect("control");
        let recorded = table.ledger.clone();
        panicking.records(&diverted, 0, &recorded, |at, _, new| table.ledger[at] = new);
        table.entries = diverted.entries;
        adopted.panics.push(PanicMark {
            table: table.id,
            service: service.to_owned(),
            number: 7,
            id,
            unix_ms: 1_700_000_123_456,
            uid: 42,
            moves,
            back: None,
            reason: Some("nobody answers".to_owned()),
        });
    }
    assert!(!adopted.panics.is_empty());
    adopted
}

#[test]
fn everything_goes_to_control_and_one_undo_brings_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), &two(), Shared::default(), Adopted::default());
    agent.split(&[("v2", "20%"), ("v3", "5%")]).unwrap();
    agent.request("mail", &[("v2", "50%")], false).unwrap();
    let (before, owners) = (entries(&agent).1, agent.owners());

    let dry = ask(&mut agent, PanicRequest { dry_run: true, ..of(None) }).unwrap();
    assert!(!dry.applied && dry.buckets_moved > 0 && !dry.backends_touched.is_empty());
    assert_eq!(agent.owners(), owners, "nothing was changed");
    agent.host.with(|host| host.log.clear());
    let report = ask(&mut agent, of(None)).unwrap();
    assert_eq!(agent.host.with(|host| host.log.clone()), ["mark", "apply", "store"]);
    assert_eq!((report.by.as_str(), report.buckets_moved), ("agent", dry.buckets_moved));
    assert_eq!(report.backends_touched, dry.backends_touched);
    assert_all_on_control(&agent);
    let status = agent.status();
    for service in &status.services {
        assert!(service.versions[1..].iter().all(|v| v.asked == 0.0 && v.buckets == 0));
        assert_eq!(service.panic.is_some(), service.name != "api", "{}", service.name);
    }
    let shown = status.services[0].panic.clone().unwrap();
    assert_eq!((shown.uid, shown.reason.as_deref()), (Some(1000), Some("v2 is bad")));
    for (bucket, (now, before)) in entries(&agent).1.iter().zip(&before).enumerate() {
        if now.current() != before.current() {
            let was = if before.tracked() { before.previous() } else { before.current() };
            assert!(now.tracked() && now.previous() == was, "{bucket}: {before:?} {now:?}");
        }
    }
    let changes = panics(&dir);
    let names: Vec<&str> = changes.iter().map(|change| change.service.as_str()).collect();
    assert_eq!(names, ["shop", "mail"], "a service that was all control's has no line");

    let undone = undo(&mut agent, UndoRequest::default()).unwrap();
    assert_eq!(undone.undone.len(), 2, "what one command has done");
    assert_eq!(agent.owners(), owners);
    let status = agent.status();
    assert!(status.services.iter().all(|service| service.panic.is_none()));
    assert_eq!(status.services[2].versions[1].asked_text, "50%");
    // And again, of one alone; the next split ends what is shown.
    ask(&mut agent, of(Some("shop"))).unwrap();
    assert_eq!(undo(&mut agent, UndoRequest::default()).unwrap().undone.len(), 1);
    ask(&mut agent, of(Some("shop"))).unwrap();
    assert!(agent.status().services[0].panic.is_some());
    agent.split(&[("v2", "1%")]).unwrap();
    assert!(agent.status().services[0].panic.is_none());
    let refused = ask(&mut agent, of(Some("shpo"))).unwrap_err();
    assert_eq!(refused.code, "unknown_service");
}

#[test]
fn neither_a_freeze_nor_a_confirmation_is_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    freeze(&mut agent, None, Some("holiday"), None).unwrap();
    ask(&mut agent, of(Some("shop"))).unwrap();
    assert_all_on_control(&agent);
    freeze(&mut agent, None, None, None).unwrap();

    let asked = split(&mut agent, &[("v2", "40%")], "confirm=5m").unwrap();
    let report = ask(&mut agent, of(None)).unwrap();
    assert!(report.notes.iter().any(|n| n.contains("waits for a confirmation no more")));
    assert!(agent.status().pending.is_empty());
    assert_eq!(panics(&dir).last().unwrap().about, [asked.revision]);
    assert_eq!(confirm(&mut agent, None).unwrap_err().code, "nothing_pending");
    agent.wait(400_000);
    assert_all_on_control(&agent);
    // Undone, what was there before is there again, and nothing takes it back.
    undo(&mut agent, UndoRequest::default()).unwrap();
    agent.wait(400_000);
    assert_eq!(agent.status().services[0].versions[1].asked_text, "40%");
}

#[test]
fn a_split_that_is_being_prepared_is_not_made_after_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    let (answer, _) = agent.learn(&[("v2", "50%")]);
    ask(&mut agent, of(None)).unwrap();
    assert_eq!(answer.blocking_recv().unwrap().unwrap_err().code, "superseded");
    agent.wait(10_000);
    assert_all_on_control(&agent);
}

#[test]
fn control_without_a_healthy_backend_gets_it_all_the_same_and_without_any_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), &two(), Shared::default(), Adopted::default());
    agent.split(&[("v2", "50%")]).unwrap();
    agent.request("mail", &[("v2", "50%")], false).unwrap();
    agent.tell("10.0.1.1:443", "drain --force").unwrap();
    agent.tell("10.0.1.2:443", "maint --force").unwrap();
    let owners = agent.owners();
    let refused = ask(&mut agent, of(Some("shop"))).unwrap_err();
    assert_eq!(refused.code, "nobody_left");
    assert!(refused.help.unwrap().contains("backend ready"));
    let report = ask(&mut agent, of(None)).unwrap();
    assert!(report.services[0].refused.is_some() && report.services[2].refused.is_none());
    assert_eq!(agent.owners(), owners, "as it was");
    assert_eq!(agent.status().services[2].versions[1].buckets, 0);

    agent.tell("10.0.1.2:443", "ready").unwrap();
    ask(&mut agent, of(Some("shop"))).unwrap();
    assert_all_on_control(&agent);
    let (_, entries) = entries(&agent);
    let places: std::collections::BTreeSet<u16> =
        entries.iter().map(|entry| entry.current().get()).collect();
    assert_eq!(places.len(), 1, "one backend takes new connections");
}

#[test]
fn a_panic_does_not_wait_for_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    agent.host.with(|host| host.refuse_store = true);
    let report = ask(&mut agent, of(Some("shop"))).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("not in the audit trail")));
    assert_all_on_control(&agent);
    assert_eq!(agent.host.with(|host| host.marked.clone()), ["shop"]);
    assert!(agent.split(&[("v2", "1%")]).is_err(), "other changes are refused");
    assert_all_on_control(&agent);
    agent.wait(1_000);
    assert!(panics(&dir).is_empty());
    agent.host.with(|host| host.refuse_store = false);
    agent.wait(1_000);
    let changes = panics(&dir);
    assert_eq!((changes.len(), changes[0].uid), (1, Some(1000)));
    assert_eq!(agent.host.with(|host| host.unmarked.clone()), [1], "the mark is done with");
    agent.wait(1_000);
    assert_eq!(panics(&dir).len(), 1);
    assert!(agent.status().services[0].panic.is_some());
    undo(&mut agent, UndoRequest::default()).unwrap();
    assert_eq!(agent.status().services[0].versions[1].asked_text, "5%");
}

#[test]
fn what_was_done_behind_the_agents_back_is_its_own_before_anything_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "20%")]).unwrap();
    let owners = agent.owners();
    let before = entries(&agent).1;
    let found = behind(maps(agent.state.plane()), "shop", false, agent.boot_ms, 77);
    let theirs = found.services[0].entries.clone();
    agent.host.with(|host| host.panics = Some(found));
    // Whatever comes next: here a split of it, which is then the operator's next change.
    let report = agent.split(&[("v2", "1%")]).unwrap();
    assert_eq!(report.revision, 5);
    let changes = trail(&dir);
    let (_, panic) = &changes[3];
    assert_eq!((panic.action.as_str(), panic.uid), ("panic", Some(42)));
    assert_eq!(panic.unix_ms, 1_700_000_123_456);
    assert_eq!(panic.reason.as_deref(), Some("nobody answers"));
    assert_eq!((panic.before["v2"].to_string(), panic.after["v2"].to_string()).1, "0%");
    assert_eq!(panic.buckets_moved as usize, owners.iter().filter(|o| **o == 1).count());
    assert_eq!(agent.host.with(|host| host.unmarked.clone()), [7]);
    undo(&mut agent, UndoRequest { to: Some(4), ..UndoRequest::default() }).unwrap();
    assert_all_on_control(&agent);
    // Where somebody's connections have been opened meanwhile is kept in mind.
    for (bucket, (now, theirs)) in entries(&agent).1.iter().zip(&theirs).enumerate() {
        let moved = before[bucket].current() != theirs.current();
        assert!(!moved || now.tracked(), "{bucket}");
        assert!(!moved || now.previous() == theirs.previous(), "{bucket}");
    }
    // The same request comes over the socket after all.
    let late = ask(&mut agent, PanicRequest { id: Some(77), ..of(Some("shop")) }).unwrap();
    assert!(late.notes[0].contains("already"));
    assert_eq!(panics(&dir).len(), 1);
    undo(&mut agent, UndoRequest { to: Some(3), ..UndoRequest::default() }).unwrap();
    assert_eq!(agent.owners(), owners);
}

#[test]
fn of_all_services_those_with_nothing_elsewhere_have_no_line() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), &two(), Shared::default(), Adopted::default());
    agent.request("mail", &[("v2", "50%")], false).unwrap();
    let mut found = maps(agent.state.plane());
    for name in ["shop", "api", "mail"] {
        found = behind(found, name, false, agent.boot_ms, 9);
    }
    agent.host.with(|host| host.panics = Some(found));
    agent.event(Event::Tick);
    let names: Vec<String> = panics(&dir).into_iter().map(|change| change.service).collect();
    assert_eq!(names, ["mail"]);
    assert_eq!(agent.host.with(|host| host.unmarked.len()), 3, "every mark is done with");
    assert!(agent.status().services[0].panic.is_none());
    undo(&mut agent, UndoRequest::default()).unwrap();
    assert_eq!(agent.status().services[2].versions[1].asked_text, "50%");
}

#[test]
fn an_agent_in_the_middle_of_a_change_does_not_take_a_panic_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    let found = behind(maps(agent.state.plane()), "shop", false, agent.boot_ms, 1);
    // It is noticed by the very write of the tables.
    agent.host.with(|host| host.panics_at_apply = Some(found));
    agent.split(&[("v2", "60%")]).unwrap();
    assert_all_on_control(&agent);
    let last = trail(&dir).pop().unwrap().1;
    assert_eq!((last.action.as_str(), last.before["v2"].to_string().as_str()), ("panic", "60%"));
    assert!(agent.status().alerts.is_empty(), "{:?}", agent.status().alerts);
}

#[test]
fn the_next_start_adopts_it_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = agent(&dir);
    first.split(&[("v2", "20%")]).unwrap();
    split(&mut first, &[("v2", "40%")], "confirm=5m").unwrap();
    let owners = first.owners();
    let found = behind(maps(first.state.plane()), "shop", false, first.boot_ms + 5, 3);
    for start in 0..2 {
        // The mark is still there when the first of these was killed before it could say so.
        let at = first.boot_ms + 1_000_000 * (start + 1);
        let host = Shared::default();
        let mut next = Agent::start_at(dir.path(), &shop(), host, found.clone(), at);
        assert_all_on_control(&next);
        assert_eq!(next.host.with(|host| host.unmarked.clone()), [7], "{start}");
        assert_eq!(panics(&dir).len(), 1, "{start}");
        assert!(next.status().services[0].panic.is_some(), "{start}");
        assert!(next.status().pending.is_empty(), "{start}");
        let owned = next.host.with(|host| host.owned.clone());
        assert!(owned.iter().all(|owned| *owned == 0), "never in force again: {owned:?}");
    }
    let at = first.boot_ms + 3_000_000;
    let mut last = Agent::start_at(dir.path(), &shop(), Shared::default(), found, at);
    undo(&mut last, UndoRequest::default()).unwrap();
    assert_eq!(last.owners(), owners);
    assert_eq!(last.status().services[0].versions[1].asked_text, "40%");
}

#[test]
fn a_service_that_is_not_configured_when_it_is_adopted_comes_back_as_control() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Agent::start(dir.path(), &two(), Shared::default(), Adopted::default());
    first.request("mail", &[("v2", "50%")], false).unwrap();
    let found = behind(maps(first.state.plane()), "mail", false, first.boot_ms + 5, 3);
    let at = first.boot_ms + 1_000;
    let next = Agent::start_at(dir.path(), &shop(), Shared::default(), found, at);
    assert_eq!(panics(&dir).len(), 1);
    let plane = next.state.plane().clone();
    drop(next);
    let mut back = Agent::start_at(dir.path(), &two(), Shared::default(), maps(&plane), at + 1_000);
    let mail = back.status().services[2].clone();
    assert_eq!((mail.versions[1].asked_text.as_str(), mail.versions[1].buckets), ("0%", 0));
}

#[test]
fn moving_open_connections_forgets_where_they_are_and_sweeps_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.host.with(|host| host.slow_sweeps = true);
    agent.split(&[("v2", "20%")]).unwrap();
    let (control, before) = entries(&agent);
    let canary: Vec<BackendIndex> = before
        .iter()
        .map(|entry| entry.current())
        .filter(|index| !control.contains(index))
        .collect();
    ask(&mut agent, PanicRequest { moves: true, ..of(None) }).unwrap();
    assert_all_on_control(&agent);
    let (_, now) = entries(&agent);
    let kept = |entry: &&Entry| entry.tracked() && !control.contains(&entry.previous());
    assert_eq!(now.iter().filter(kept).count(), 0);
    let sweep = agent.host.with(|host| host.sweep.clone()).expect("a sweep");
    assert!(sweep.backends.contains(&canary[0]), "{:?}", sweep.backends);
    agent.host.with(|host| host.slow_sweeps = false);
    agent.event(Event::Tick);
    // The canary's records stay: it is configured, and may have a share again.
    agent.split(&[("v2", "20%")]).unwrap();
    assert_eq!(agent.status().services[0].versions[1].buckets, 819);
}
