//! Change control: terms, undo, confirmations, freezes, and the log of events.

use std::collections::BTreeMap;

use canary_agent::{
    api::model::{
        BackendRequest, ChangeReport, ConfirmReport, ConfirmRequest, FreezeReport, FreezeRequest,
        SplitRequest, UndoReport, UndoRequest,
    },
    daemon::{Event, EventsAsked, EventsFound, Peer, Refusal, Request},
    health,
    plan::Adopted,
    store::{Change, SqliteStore, StateStore},
};

use crate::{
    plan_support::{config, maps, service},
    support::{Agent, Shared, agent, shop},
};

const PEER: Peer = Peer { uid: 1000, gid: 1000, pid: None };

/// A split of `shop`; `terms` may hold `confirm=TIME`, `if=REVISION` and `dry`.
pub(crate) fn split(
    agent: &mut Agent,
    shares: &[(&str, &str)],
    terms: &str,
) -> Result<ChangeReport, Refusal> {
    split_of(agent, "shop", shares, terms)
}

fn split_of(
    agent: &mut Agent,
    service: &str,
    shares: &[(&str, &str)],
    terms: &str,
) -> Result<ChangeReport, Refusal> {
    let term = |key: &str| terms.split(' ').find_map(|term| term.strip_prefix(key));
    let request = SplitRequest {
        split: shares.iter().map(|(v, s)| ((*v).to_owned(), (*s).to_owned())).collect(),
        reason: Some("because".to_owned()),
        dry_run: terms.contains("dry"),
        if_revision: term("if=").map(|number| number.parse().unwrap()),
        confirm: term("confirm=").map(str::to_owned),
        learn: terms.contains("learn"),
    };
    let service = service.to_owned();
    agent.ask(|reply| Request::Split { service, request, peer: PEER, reply })
}

fn tell(
    agent: &mut Agent,
    backend: &str,
    state: &str,
    confirm: Option<&str>,
) -> Result<u64, Refusal> {
    let request = BackendRequest {
        state: state.to_owned(),
        confirm: confirm.map(str::to_owned),
        ..BackendRequest::default()
    };
    let (service, backend) = ("shop".to_owned(), backend.to_owned());
    let told = agent.ask(|reply| Request::Backend { service, backend, request, peer: PEER, reply });
    told.map(|report| report.revision)
}

fn undo(agent: &mut Agent, request: UndoRequest) -> Result<UndoReport, Refusal> {
    agent.ask(|reply| Request::Undo { request, peer: PEER, reply })
}

fn last() -> UndoRequest {
    UndoRequest::default()
}

fn to(revision: u64) -> UndoRequest {
    UndoRequest { to: Some(revision), ..UndoRequest::default() }
}

pub(crate) fn confirm(agent: &mut Agent, revision: Option<u64>) -> Result<ConfirmReport, Refusal> {
    let request = ConfirmRequest { revision, ..ConfirmRequest::default() };
    agent.ask(|reply| Request::Confirm { request, peer: PEER, reply })
}

pub(crate) fn freeze(
    agent: &mut Agent,
    service: Option<&str>,
    reason: Option<&str>,
    confirm: Option<&str>,
) -> Result<FreezeReport, Refusal> {
    let request = FreezeRequest {
        service: service.map(str::to_owned),
        reason: reason.map(str::to_owned),
        confirm: confirm.map(str::to_owned),
        ..FreezeRequest::default()
    };
    let freezes = reason.is_some();
    agent.ask(|reply| Request::Freeze { request, freezes, peer: PEER, reply })
}

fn events(agent: &mut Agent, asked: EventsAsked) -> EventsFound {
    agent.ask(|reply| Request::Events { asked, reply }).unwrap()
}

fn trail(dir: &tempfile::TempDir) -> Vec<(u64, Change)> {
    SqliteStore::new(dir.path()).changes(0, 1_000).unwrap()
}

/// Asked shares of a service's versions.
fn asked(agent: &mut Agent, service: &str) -> String {
    let status = agent.status();
    let service = status.services.iter().find(|one| one.name == service).unwrap();
    let shares = service.versions.iter().map(|v| format!("{} {}", v.name, v.asked_text));
    shares.collect::<Vec<_>>().join(", ")
}

/// The agent of a later start, after `ms`, over the maps as this one leaves them.
fn restarted(agent: &Agent, dir: &tempfile::TempDir, ms: u64) -> Agent {
    let plane = agent.host.with(|host| host.plane.clone());
    let host = Shared::default();
    let boot_id = agent.host.with(|host| host.boot_id.clone());
    host.with(|host| host.boot_id = boot_id);
    Agent::start_at(dir.path(), &shop(), host, maps(&plane), agent.boot_ms + ms)
}

#[test]
fn the_last_change_is_taken_back_with_exactly_its_buckets() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    let five = agent.owners();
    agent.split(&[("v2", "50%"), ("v3", "20%")]).unwrap();
    let fifty = agent.owners();

    let dry = undo(&mut agent, UndoRequest { dry_run: true, ..last() }).unwrap();
    assert!(!dry.applied && agent.owners() == fifty);
    let report = undo(&mut agent, UndoRequest { reason: Some("no".to_owned()), ..last() }).unwrap();
    assert_eq!(agent.owners(), five);
    assert_eq!((report.applied, report.revision, report.undone.len()), (true, 5, 1));
    assert_eq!((report.undone[0].revision, report.undone[0].uid), (Some(4), Some(1000)));
    assert_eq!(report.buckets_moved, dry.buckets_moved);
    assert_eq!(
        report.buckets_moved,
        fifty.iter().zip(&five).filter(|(a, b)| a != b).count() as u32
    );
    assert_eq!(report.backends_touched, dry.backends_touched);
    assert_eq!(asked(&mut agent, "shop"), "stable 95%, v2 5%, v3 0%");
    let (_, change) = trail(&dir).pop().unwrap();
    assert_eq!((change.action.as_str(), change.about.as_slice()), ("undo", &[4][..]));
    assert_eq!((change.uid, change.reason.as_deref()), (Some(1000), Some("no")));

    // Who types it twice is told so, and how to get either way.
    let refusal = undo(&mut agent, last()).unwrap_err();
    assert_eq!(refusal.code, "undone_already");
    assert!(refusal.help.unwrap().contains("undo --to 4"), "{}", refusal.message);
    assert_eq!(agent.owners(), five);
    let redone = undo(&mut agent, to(4)).unwrap();
    assert_eq!((agent.owners() == fifty, redone.revision), (true, 6));
    assert_eq!(asked(&mut agent, "shop"), "stable 30%, v2 50%, v3 20%");
    undo(&mut agent, to(2)).unwrap();
    assert_eq!(asked(&mut agent, "shop"), "stable 100%, v2 0%, v3 0%");
    assert!(agent.owners().iter().all(|owner| *owner == 0));
    // As if it had not been: the same clients come first, if it is begun again.
    agent.split(&[("v2", "5%")]).unwrap();
    assert_eq!(agent.owners(), five);
}

#[test]
fn a_sequence_of_changes_is_taken_back_from_anywhere_to_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let state = |agent: &mut Agent| {
        let backends = agent.listed().versions.into_iter().flat_map(|v| v.backends);
        let admins: Vec<String> =
            backends.map(|detail| detail.backend.admin.into_owned()).collect();
        (agent.owners(), asked(agent, "shop"), admins)
    };
    let mut seen = BTreeMap::from([(2, state(&mut agent))]);
    let mut random = 1_u64;
    for step in 0..120_u64 {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let pick = random >> 33;
        let revision = match pick % 5 {
            0 | 1 => {
                let (v2, v3) = (format!("{}%", pick / 5 % 50), format!("{}%", pick / 251 % 50));
                agent.split(&[("v2", &v2), ("v3", &v3)]).map(|report| report.revision)
            }
            2 => {
                let word = ["drain", "maint", "ready"][(pick / 5 % 3) as usize];
                agent.tell("10.0.1.1:443", word).map(|report| report.revision)
            }
            3 => undo(&mut agent, last()).map(|report| report.revision),
            _ => {
                let known: Vec<u64> = seen.keys().copied().collect();
                let back = known[(pick / 5) as usize % known.len()];
                let done = undo(&mut agent, to(back));
                if done.is_ok() {
                    let (here, there) = (state(&mut agent), &seen[&back]);
                    assert!(here == *there, "step {step}: back to {back}");
                }
                done.map(|report| report.revision)
            }
        };
        match revision {
            Ok(revision) => drop(seen.insert(revision, state(&mut agent))),
            Err(refusal) => assert!(
                ["nothing_to_undo", "undone_already"].contains(&refusal.code),
                "step {step}: {refusal:?}"
            ),
        }
        if pick.is_multiple_of(11) {
            let before = state(&mut agent);
            agent = restarted(&agent, &dir, 10);
            assert!(state(&mut agent) == before, "step {step}: over a restart");
        }
    }
    assert!(seen.len() > 60, "{}", seen.len());
}

#[test]
fn undo_says_how_many_buckets_a_backend_gets_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    let drained = agent.tell("10.0.1.1:443", "drain").unwrap();
    assert!(drained.buckets_moved > 1_000, "{drained:?}");
    let dry = undo(&mut agent, UndoRequest { dry_run: true, ..last() }).unwrap();
    let report = undo(&mut agent, last()).unwrap();
    for report in [dry, report] {
        assert_eq!(report.buckets_moved, drained.buckets_moved, "{report:?}");
        assert_eq!(report.services[0].buckets_moved, drained.buckets_moved, "{report:?}");
        assert_eq!(report.backends_touched, drained.backends_touched, "{report:?}");
    }
    // Of a split those that change their owner count, there and back.
    let split = agent.split(&[("v2", "25%")]).unwrap();
    assert_eq!(undo(&mut agent, last()).unwrap().buckets_moved, split.buckets_moved);
}

#[test]
fn undo_takes_back_what_a_backend_was_told_and_only_what_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    agent.tell("10.0.1.1:443", "drain").unwrap();
    agent.tell("10.0.1.2:443", "drain --force").unwrap();
    let report = undo(&mut agent, last()).unwrap();
    let told = &report.services[0].backends[0];
    assert_eq!((told.backend.as_str(), told.before.as_str()), ("10.0.1.2:443", "drain"));
    assert_eq!(asked(&mut agent, "shop"), "stable 95%, v2 5%, v3 0%", "the split is as it was");
    // Backends that come back are told what they were; the last one is not taken out unforced.
    agent.tell("10.0.1.1:443", "ready").unwrap();
    agent.tell("10.0.1.2:443", "drain").unwrap();
    agent.tell("10.0.1.2:443", "ready").unwrap();
    let refusal = undo(&mut agent, to(4)).map(|_| ()).err();
    assert_eq!(refusal, None, "one of two");
    agent.tell("10.0.1.1:443", "ready").unwrap();
    let of_api = UndoRequest { service: Some("api".to_owned()), ..last() };
    assert_eq!(undo(&mut agent, of_api).unwrap_err().code, "nothing_to_undo");
    let unknown = UndoRequest { service: Some("shpo".to_owned()), ..last() };
    assert_eq!(undo(&mut agent, unknown).unwrap_err().code, "unknown_service");
    let revision = agent.status().agent.revision;
    for (request, code) in [
        (to(revision), "nothing_to_undo"),
        (to(revision + 1), "unknown_revision"),
        (UndoRequest { if_revision: Some(3), ..last() }, "stale_revision"),
        (UndoRequest { confirm: Some("5".to_owned()), ..last() }, "bad_confirm"),
    ] {
        assert_eq!(undo(&mut agent, request).unwrap_err().code, code);
    }
}

#[test]
fn going_back_of_one_service_leaves_the_others_and_of_all_is_one_change_each() {
    let two = config(vec![
        service("shop", &[("stable", &[("10.0.1.1:443", 1)]), ("v2", &[("10.0.2.1:443", 1)])]),
        service("api", &[("stable", &[("10.0.1.1:443", 1)]), ("v2", &[("10.0.2.1:443", 1)])]),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), &two, Shared::default(), Adopted::default());
    split_of(&mut agent, "shop", &[("v2", "5%")], "").unwrap();
    split_of(&mut agent, "api", &[("v2", "6%")], "").unwrap();
    split_of(&mut agent, "shop", &[("v2", "7%")], "").unwrap();
    split_of(&mut agent, "api", &[("v2", "8%")], "").unwrap();
    let of_shop = UndoRequest { service: Some("shop".to_owned()), ..last() };
    let report = undo(&mut agent, of_shop).unwrap();
    assert_eq!(report.undone[0].revision, Some(5));
    assert_eq!(asked(&mut agent, "shop"), "stable 95%, v2 5%");
    assert_eq!(asked(&mut agent, "api"), "stable 92%, v2 8%");
    let confirmed = UndoRequest { confirm: Some("1m".to_owned()), ..to(2) };
    let report = undo(&mut agent, confirmed).unwrap();
    assert_eq!((report.revision, report.services.len(), report.undone.len()), (9, 2, 5));
    assert_eq!(asked(&mut agent, "api"), "stable 100%, v2 0%");
    // Both wait together, and come back together.
    assert_eq!(agent.status().pending.len(), 2);
    agent.wait(60_000);
    assert_eq!(asked(&mut agent, "shop"), "stable 95%, v2 5%");
    assert_eq!(asked(&mut agent, "api"), "stable 92%, v2 8%");
    undo(&mut agent, UndoRequest { confirm: Some("1m".to_owned()), ..to(2) }).unwrap();
    let report = confirm(&mut agent, None).unwrap();
    assert_eq!(report.confirmed.len(), 2);
    agent.wait(120_000);
    assert_eq!(asked(&mut agent, "shop"), "stable 100%, v2 0%");
}

#[test]
fn what_the_configuration_has_changed_is_in_the_way_of_an_undo() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%"), ("v3", "10%")]).unwrap();
    agent.split(&[("v2", "20%")]).unwrap();
    let plane = agent.host.with(|host| host.plane.clone());
    // v3 is not configured any more: its buckets are control's.
    let mut less = shop();
    less.services[0].versions.retain(|version| version.name != "v3");
    let mut agent = Agent::start(dir.path(), &less, Shared::default(), maps(&plane));
    assert_eq!(asked(&mut agent, "shop"), "stable 80%, v2 20%");
    for request in [last(), to(3)] {
        let refusal = undo(&mut agent, request).unwrap_err();
        assert_eq!(refusal.code, "configured_since");
        assert!(refusal.help.unwrap().contains("--to 5"), "{}", refusal.message);
    }
    // What came after it can be taken back.
    agent.split(&[("v2", "30%")]).unwrap();
    undo(&mut agent, last()).unwrap();
    assert_eq!(asked(&mut agent, "shop"), "stable 80%, v2 20%");
}

#[test]
fn a_version_that_has_come_back_gets_its_buckets_back_whatever_its_slot_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v3", "10%")]).unwrap();
    let ten = agent.owners();
    agent.split(&[("v3", "0")]).unwrap();
    // Without v3 until nobody remembers it, then with v4 in its slot, and v3 again.
    let mut less = shop();
    less.services[0].versions.retain(|version| version.name != "v3");
    let plane = agent.host.with(|host| host.plane.clone());
    let mut agent =
        Agent::start_at(dir.path(), &less, Shared::default(), maps(&plane), agent.boot_ms + 10);
    for _ in 0..5 {
        agent.wait(86_400_000);
    }
    agent.split(&[("v2", "1%")]).unwrap();
    assert!(!agent.state.plane().services[0].versions.contains(&"v3".to_owned()));
    let mut more = shop();
    let v3 = more.services[0].versions.pop().unwrap();
    let mut v4 = v3.clone();
    v4.name = "v4".to_owned();
    v4.backends[0].addr = "10.0.4.1:443".parse().unwrap();
    more.services[0].versions.extend([v4, v3]);
    let plane = agent.host.with(|host| host.plane.clone());
    let mut agent =
        Agent::start_at(dir.path(), &more, Shared::default(), maps(&plane), agent.boot_ms + 10);
    let slots = agent.state.plane().services[0].versions.clone();
    let slot = |name: &str| slots.iter().position(|one| one == name).unwrap() as u8;
    assert_eq!((slot("v4"), slot("v3")), (2, 3));
    undo(&mut agent, to(3)).unwrap();
    assert_eq!(asked(&mut agent, "shop"), "stable 90%, v2 0%, v4 0%, v3 10%");
    let back: Vec<u8> = ten.iter().map(|owner| if *owner == 2 { 3 } else { *owner }).collect();
    assert_eq!(agent.owners(), back);
}

#[test]
fn a_change_that_is_not_confirmed_is_taken_back_and_one_that_is_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    let five = agent.owners();
    let report = split(&mut agent, &[("v2", "50%")], "confirm=5m").unwrap();
    assert_eq!(report.confirm_within_ms, Some(300_000));
    let [pending] = &agent.status().pending[..] else { panic!("one waits") };
    assert_eq!((pending.left_seconds, pending.change.revision), (300.0, Some(4)));
    agent.wait(299_999);
    assert_ne!(agent.owners(), five);
    agent.wait(1);
    assert_eq!(agent.owners(), five);
    assert!(agent.status().pending.is_empty());
    let (revision, change) = trail(&dir).pop().unwrap();
    assert_eq!((revision, change.uid, change.about.as_slice()), (5, None, &[4][..]));
    assert!(change.reason.unwrap().contains("not confirmed within 5m"));

    let refusal = confirm(&mut agent, None).unwrap_err();
    assert_eq!(refusal.code, "nothing_pending");
    split(&mut agent, &[("v2", "50%")], "confirm=5m").unwrap();
    let fifty = agent.owners();
    assert_eq!(confirm(&mut agent, Some(5)).unwrap_err().code, "nothing_pending");
    let report = confirm(&mut agent, None).unwrap();
    assert_eq!((report.revision, report.confirmed[0].revision), (7, Some(6)));
    agent.wait(600_000);
    assert_eq!(agent.owners(), fifty);
    // The confirmation is no change that could be taken back: the split is.
    undo(&mut agent, last()).unwrap();
    assert_eq!(agent.owners(), five);
    // A dry run of such a change waits for nothing.
    split(&mut agent, &[("v2", "50%")], "confirm=5m dry").unwrap();
    assert!(agent.status().pending.is_empty());
}

#[test]
fn a_deadline_is_kept_over_restarts_of_the_agent_and_steps_of_the_clock() {
    for (down_ms, left_ms) in [(1_000, 59_000), (60_000, 0), (900_000, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent(&dir);
        agent.split(&[("v2", "5%")]).unwrap();
        let five = agent.owners();
        split(&mut agent, &[("v2", "50%")], "confirm=1m").unwrap();
        let fifty = agent.owners();
        agent.unix_ms = 5; // years ago
        let mut next = restarted(&agent, &dir, down_ms);
        next.unix_ms = 9_000_000_000_000;
        if left_ms > 0 {
            assert_eq!(next.owners(), fifty);
            next.wait(left_ms - 1);
            assert_eq!(next.owners(), fifty);
            next.wait(1);
        }
        assert_eq!(next.owners(), five);
        // Where it was over before, it is not in force for a moment more.
        let owned = next.host.with(|host| host.owned.clone());
        assert_eq!(owned.iter().all(|owned| *owned == 205), left_ms == 0, "{owned:?}");
    }
}

#[test]
fn after_a_start_of_the_host_the_wall_clock_says_what_is_left() {
    // Time since the change by the wall clock, and what is left of a minute.
    for (passed_ms, left_ms) in [(20_000, 40_000), (3_600_000, 0), (-3_600_000, 60_000)] {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent(&dir);
        agent.boot_ms = 90_000_000;
        split(&mut agent, &[("v2", "50%")], "confirm=1m").unwrap();
        let host = Shared::default();
        host.with(|host| host.boot_id = "another".to_owned());
        // The maps are empty: bpffs does not outlive the host.
        let unix_ms = agent.now().unix_ms.strict_add_signed(passed_ms);
        let begun = Agent::start_with(
            dir.path(),
            &shop(),
            host,
            Adopted::default(),
            7_000,
            unix_ms - 7_000,
        );
        let mut next = begun;
        if left_ms > 0 {
            next.wait(left_ms - 1);
            assert!(next.owners().contains(&1), "{passed_ms} ms");
            next.wait(1);
        }
        assert!(!next.owners().contains(&1), "{passed_ms} ms");
    }
}

#[test]
fn while_a_change_waits_the_same_is_not_changed_and_other_things_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    let five = agent.owners();
    split(&mut agent, &[("v2", "50%")], "confirm=5m").unwrap();
    for terms in ["", "dry", "learn", "confirm=1m"] {
        let refusal = split(&mut agent, &[("v3", "1%")], terms).unwrap_err();
        assert_eq!(refusal.code, "confirmation_pending", "{terms}");
        let help = refusal.help.unwrap();
        assert!(help.contains("confirm 4") && help.contains("undo --to 3"), "{help}");
    }
    // A backend is another thing, and waits by itself.
    tell(&mut agent, "10.0.1.1:443", "drain", Some("1m")).unwrap();
    let refusal = tell(&mut agent, "10.0.1.1:443", "maint", None).unwrap_err();
    assert_eq!(refusal.code, "confirmation_pending");
    tell(&mut agent, "10.0.3.1:443", "drain", None).unwrap();
    assert_eq!(confirm(&mut agent, None).unwrap_err().code, "several_pending");
    agent.wait(60_000);
    let admins = |agent: &mut Agent| -> Vec<String> {
        let versions = agent.listed().versions;
        versions
            .into_iter()
            .flat_map(|v| v.backends)
            .map(|b| b.backend.admin.into_owned())
            .collect()
    };
    assert_eq!(admins(&mut agent), ["ready", "ready", "ready", "drain"]);
    assert_ne!(agent.owners(), five);
    // Taking it back is how it is changed.
    undo(&mut agent, to(3)).unwrap();
    assert_eq!(agent.owners(), five);
    assert!(agent.status().pending.is_empty());
    split(&mut agent, &[("v2", "6%")], "").unwrap();
    agent.wait(600_000);
    assert_eq!(asked(&mut agent, "shop"), "stable 94%, v2 6%, v3 0%");
}

#[test]
fn what_can_not_be_stored_is_taken_back_as_soon_as_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    split(&mut agent, &[("v2", "50%")], "confirm=1m").unwrap();
    agent.host.with(|host| host.refuse_store = true);
    agent.wait(60_000);
    assert!(agent.owners().contains(&1), "nothing is in force that is not stored");
    let alerts = agent.status().alerts;
    assert!(
        alerts.iter().any(|alert| alert.contains("revision 3 was not confirmed")),
        "{alerts:?}"
    );
    agent.wait(1_000);
    agent.host.with(|host| host.refuse_store = false);
    agent.wait(1_000);
    assert!(!agent.owners().contains(&1));
    assert!(agent.status().alerts.is_empty(), "{:?}", agent.status().alerts);
}

#[test]
fn a_stale_change_is_refused_and_says_who_has_changed_what() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    for (terms, code) in [("if=2", "stale_revision"), ("if=9", "unknown_revision")] {
        for dry in ["", " dry"] {
            let refusal = split(&mut agent, &[("v2", "9%")], &format!("{terms}{dry}")).unwrap_err();
            assert_eq!(refusal.code, code);
            if code == "stale_revision" {
                for part in ["revision 3", "v2 0% to 5%", "uid 1000", "because"] {
                    assert!(refusal.message.contains(part), "{part}: {}", refusal.message);
                }
                assert!(refusal.help.unwrap().contains("--if-revision 3"));
            }
        }
    }
    let report = split(&mut agent, &[("v2", "9%")], "if=3").unwrap();
    assert_eq!(report.revision, 4);
    // What happens to another service makes nothing stale; what happens to all does.
    assert_eq!(split(&mut agent, &[("v2", "8%")], "if=4").unwrap().revision, 5);
    freeze(&mut agent, Some("api"), Some("x"), None).unwrap();
    assert_eq!(split(&mut agent, &[("v2", "7%")], "if=5").unwrap().revision, 7);
    freeze(&mut agent, None, Some("x"), None).unwrap();
    assert_eq!(split(&mut agent, &[("v2", "6%")], "if=7").unwrap_err().code, "stale_revision");
}

#[test]
fn a_frozen_service_only_goes_towards_control() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "20%"), ("v3", "20%")]).unwrap();
    let report = freeze(&mut agent, Some("shop"), Some("the night before"), None).unwrap();
    assert_eq!((report.applied, report.revision), (true, 4));
    for (shares, may) in [
        (vec![("v2", "21%")], false),
        (vec![("v2", "10%"), ("v3", "21%")], false),
        // Of an asked share only: no bucket moves.
        (vec![("v2", "20.00001%")], false),
        (vec![("v2", "10%"), ("v3", "20%")], true),
        (vec![("v2", "0"), ("v3", "0")], true),
    ] {
        for terms in ["dry", "learn dry"] {
            let answer = split(&mut agent, &shares, terms);
            match may {
                true => drop(answer.unwrap()),
                false => {
                    let refusal = answer.unwrap_err();
                    assert_eq!(refusal.code, "frozen", "{shares:?}");
                    assert!(refusal.message.contains("the night before"), "{}", refusal.message);
                    assert!(refusal.help.unwrap().contains("unfreeze shop"));
                }
            }
        }
    }
    assert_eq!(tell(&mut agent, "10.0.1.1:443", "drain", None).unwrap_err().code, "frozen");
    agent.split(&[("v2", "10%")]).unwrap();
    // Going back up is no way towards control; going back down is.
    assert_eq!(undo(&mut agent, last()).unwrap_err().code, "frozen");
    assert_eq!(undo(&mut agent, to(2)).unwrap().revision, 6);
    assert_eq!(asked(&mut agent, "shop"), "stable 100%, v2 0%, v3 0%");

    // It outlives the agent, is shown, and ends when somebody says so.
    let mut agent = restarted(&agent, &dir, 10);
    let frozen = agent.status().services[0].frozen.clone().unwrap();
    assert_eq!(
        (frozen.reason.as_str(), frozen.revision, frozen.uid),
        ("the night before", 4, Some(1000))
    );
    assert!(agent.status().agent.frozen.is_none());
    assert_eq!(split(&mut agent, &[("v2", "1%")], "").unwrap_err().code, "frozen");
    let refusal = freeze(&mut agent, None, None, None).unwrap_err();
    assert_eq!(refusal.code, "not_frozen");
    assert!(refusal.help.unwrap().contains("`shop`"));
    freeze(&mut agent, None, Some("all of it"), None).unwrap();
    freeze(&mut agent, Some("shop"), None, None).unwrap();
    assert_eq!(split(&mut agent, &[("v2", "1%")], "").unwrap_err().code, "frozen", "all are");
    let refusal = freeze(&mut agent, Some("shop"), None, None).unwrap_err();
    assert!(refusal.help.unwrap().contains("`canary-agent unfreeze`"));
    freeze(&mut agent, None, None, None).unwrap();
    split(&mut agent, &[("v2", "1%")], "").unwrap();
    for (request, code) in [
        (FreezeRequest::default(), "bad_reason"),
        (FreezeRequest { reason: Some(" ".to_owned()), ..FreezeRequest::default() }, "bad_reason"),
        (
            FreezeRequest {
                service: Some("shpo".to_owned()),
                reason: Some("x".to_owned()),
                ..FreezeRequest::default()
            },
            "unknown_service",
        ),
    ] {
        let answer =
            agent.ask(|reply| Request::Freeze { request, freezes: true, peer: PEER, reply });
        assert_eq!(answer.unwrap_err().code, code);
    }
}

#[test]
fn a_freeze_for_a_while_ends_by_itself_and_does_not_keep_what_was_promised() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "20%")]).unwrap();
    split(&mut agent, &[("v2", "5%")], "confirm=2m").unwrap();
    freeze(&mut agent, None, Some("an hour of peace"), Some("1m")).unwrap();
    assert_eq!(freeze(&mut agent, None, None, None).unwrap_err().code, "confirmation_pending");
    agent.wait(60_000);
    assert!(agent.status().agent.frozen.is_none());
    freeze(&mut agent, None, Some("peace"), None).unwrap();
    agent.wait(60_000);
    assert_eq!(asked(&mut agent, "shop"), "stable 80%, v2 20%, v3 0%", "taken back all the same");
    // The end of a freeze can wait for a confirmation too.
    freeze(&mut agent, None, None, Some("1m")).unwrap();
    assert!(agent.status().agent.frozen.is_none());
    agent.wait(60_000);
    assert_eq!(agent.status().agent.frozen.unwrap().reason, "peace");
    let actions: Vec<String> = trail(&dir).into_iter().map(|(_, change)| change.action).collect();
    assert_eq!(actions[4..], ["freeze", "undo", "freeze", "undo", "unfreeze", "undo"]);
}

#[test]
fn a_state_file_that_is_replaced_gets_what_waits_and_what_is_frozen() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    freeze(&mut agent, Some("api"), Some("peace"), None).unwrap();
    split(&mut agent, &[("v2", "50%")], "confirm=1m").unwrap();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("state.db") {
            std::fs::write(path, b"damaged").unwrap();
        }
    }
    tell(&mut agent, "10.0.1.1:443", "drain", None).unwrap();
    let mut agent = restarted(&agent, &dir, 10);
    assert_eq!(agent.status().services[1].frozen.clone().unwrap().reason, "peace");
    assert_eq!(agent.status().pending.len(), 1);
    agent.wait(60_000);
    assert_eq!(asked(&mut agent, "shop"), "stable 100%, v2 0%, v3 0%");
    assert_eq!(agent.status().services[0].versions[0].backends[0].admin, "drain");
}

#[test]
fn events_tell_of_changes_and_of_what_happens_besides() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "5%")]).unwrap();
    let down = |down| {
        let service = "shop".into();
        let addr = "10.0.2.1:443".parse().unwrap();
        Event::Health(vec![health::Change { service, addr, down, why: None }])
    };
    agent.event(down(true));
    agent.tell("10.0.1.1:443", "drain").unwrap();
    agent.event(down(false));
    let mut found = events(&mut agent, EventsAsked::default());
    let said: Vec<(&str, &str)> =
        found.events.events.iter().map(|e| (e.kind.as_str(), e.text.as_str())).collect();
    let tail = &said[said.len() - 4..];
    assert_eq!(
        tail,
        [
            ("split", "shop: v2 0% to 5%"),
            ("down", "10.0.2.1:443 is down"),
            ("backend", "shop: 10.0.1.1:443 from `ready` to `drain`"),
            ("up", "10.0.2.1:443 is up"),
        ]
    );
    assert!(said.iter().any(|(kind, text)| *kind == "start" && text.contains("has started")));
    let ids: Vec<u64> = found.events.events.iter().map(|event| event.id).collect();
    assert!(ids.is_sorted() && ids.last() == Some(&found.events.last), "{ids:?}");
    let split = &found.events.events[ids.len() - 4];
    assert_eq!((split.uid, split.revision, split.buckets_moved), (Some(1000), Some(3), 205));
    assert_eq!((split.reason.as_deref(), &split.after["v2"][..]), (Some("because"), "5%"));
    assert_eq!(split.time, "2023-11-14T22:13:25.000Z");

    // Whoever follows is told when there is more.
    found.news.mark_unchanged();
    agent.split(&[("v2", "6%")]).unwrap();
    assert!(found.news.has_changed().unwrap());
    let after = EventsAsked { after: Some(found.events.last), ..EventsAsked::default() };
    let more = events(&mut agent, after);
    assert_eq!(more.events.events.len(), 1);
    let of = |service: &str, since: &str| EventsAsked {
        service: (!service.is_empty()).then(|| service.to_owned()),
        since: (!since.is_empty()).then(|| since.to_owned()),
        ..EventsAsked::default()
    };
    let kinds = |found: EventsFound| -> Vec<String> {
        found.events.events.into_iter().map(|event| event.kind).collect()
    };
    assert_eq!(kinds(events(&mut agent, of("api", ""))), ["initial"]);
    agent.boot_ms += 7_200_000;
    assert!(kinds(events(&mut agent, of("", "1h"))).is_empty());
    assert!(!kinds(events(&mut agent, of("", "2023-11-14 22:13:00"))).is_empty());
    for asked in [of("", "yesterday"), of("nope", "")] {
        let refusal = agent.ask(|reply| Request::Events { asked, reply }).unwrap_err();
        assert!(["bad_since", "unknown_service"].contains(&refusal.code), "{refusal:?}");
    }
}
