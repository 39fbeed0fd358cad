//! The store against good files, damaged ones, and disks that fail.

use std::{fs, os::unix::fs::FileExt, path::Path, thread};

use canary_agent::store::{
    Admin, BackendChange, Change, Commit, Deadline, Event, EventQuery, EvidenceLine, KEPT_CHANGES,
    KEPT_LISTS, KEPT_NOTICES, Notice, PlacementRecord, ServiceRecord, SqliteStore, StateStore,
    StoreError, StoredMember, StoredRollout,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

fn commit(service: &str, share: &str, owners: &[u8]) -> Commit {
    let after = [("v2".to_owned(), share.parse().unwrap())].into();
    Commit {
        change: Change {
            unix_ms: 1_700_000_000_000,
            uid: Some(1000),
            service: service.to_owned(),
            action: "split".to_owned(),
            reason: Some("a \"quoted\" reason; with ; and \u{1f680}".to_owned()),
            before: Default::default(),
            after,
            moved: vec![1, 2, 3],
            ..Change::default()
        },
        record: Some(ServiceRecord {
            name: service.to_owned(),
            control: "stable".to_owned(),
            split: [("v2".to_owned(), share.parse().unwrap())].into(),
            slots: vec!["stable".to_owned(), String::new(), "v2".to_owned()],
            owners: owners.to_vec(),
            salt: u64::MAX - 5,
            placements: Some(Vec::new()),
            admins: Default::default(),
        }),
        deadline: None,
        settles: Vec::new(),
    }
}

/// The state that it leads to.
fn record(commit: &mut Commit) -> &mut ServiceRecord {
    commit.record.as_mut().expect("a service")
}

/// Runs `test` in a mount namespace of its own, with `dir` a tmpfs made with `options`.
fn on_tmpfs(dir: &Path, options: &str, test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let run = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS)
                .expect("a private mount namespace: this test needs root");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(Some("none"), dir, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
            test();
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn what_is_committed_is_read_back_by_the_next_process() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("deep/state?100%#");
    let mut store = SqliteStore::new(&state_dir);
    assert_eq!(store.load().unwrap().revision, 0);
    let mut commits = [commit("shop", "5%", &[0, 9, 0]), commit("api", "64/65536", &[7])];
    let addr = "[2001:db8::1]:443".parse().unwrap();
    let change = BackendChange { addr, before: Admin::Ready, after: Admin::Maint };
    commits[1].change.backends = vec![change];
    record(&mut commits[1]).admins =
        [(addr, Admin::Maint), ("10.0.0.1:80".parse().unwrap(), Admin::Drain)].into();
    assert_eq!(store.commit(0, &commits).unwrap(), 2);
    assert_eq!(store.commit(2, &[commit("shop", "0.1%", &[])]).unwrap(), 3);
    drop(store);

    let mut store = SqliteStore::new(&state_dir);
    let snapshot = store.load().unwrap();
    assert_eq!(snapshot.revision, 3);
    let [_, two] = commits.clone().map(|commit| commit.record.unwrap());
    assert_eq!(snapshot.services, [two, commit("shop", "0.1%", &[]).record.unwrap()]);
    assert_eq!(snapshot.services[0].split["v2"].to_string(), "64/65536", "kept as written");
    let trail = store.changes(1, 10).unwrap();
    assert_eq!(trail.iter().map(|(revision, _)| *revision).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(trail[0].1, commits[1].change);
    assert_eq!(store.changes(0, 1).unwrap().len(), 1);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(state_dir.join("state.db")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
}

fn fixture(schema: i64) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/schemas/{schema}.sql"))
}

fn raw(dir: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(dir.join("state.db")).unwrap()
}

/// Every table and index, as the file has them.
fn structure(dir: &Path) -> Vec<(String, String)> {
    let raw = raw(dir);
    let query = "SELECT name, coalesce(sql, '') FROM sqlite_schema ORDER BY name";
    let mut statement = raw.prepare(query).unwrap();
    let rows = statement.query_map((), |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

#[test]
fn a_file_of_each_schema_there_was_is_brought_up_to_date() {
    let fresh = tempfile::tempdir().unwrap();
    SqliteStore::new(fresh.path()).load().unwrap();
    let newest: i64 =
        raw(fresh.path()).query_row("PRAGMA user_version", (), |row| row.get(0)).unwrap();
    assert!(newest >= 4 && !fixture(newest + 1).exists());
    for schema in 1..=newest {
        let text = fs::read_to_string(fixture(schema))
            .unwrap_or_else(|error| panic!("a file of schema {schema} is to be kept: {error}"));
        let dir = tempfile::tempdir().unwrap();
        raw(dir.path()).execute_batch(&text).unwrap();
        let mut store = SqliteStore::new(dir.path());
        let snapshot = store.load().unwrap();
        assert!(store.take_set_aside().is_empty(), "schema {schema}");
        assert_eq!(structure(dir.path()), structure(fresh.path()), "schema {schema}");

        let shop = &snapshot.services[0];
        assert_eq!((shop.name.as_str(), shop.control.as_str()), ("shop", "stable"));
        assert_eq!((&shop.slots[..], shop.salt), (&["stable".to_owned(), "v2".to_owned()][..], 3));
        assert_eq!(shop.owners, [1, 0, 3, 1, 5, 0, 0xf8, 0x1f]);
        let placements = shop.placements.as_ref().unwrap();
        assert_eq!(placements.len(), usize::from(schema >= 2), "schema {schema}");
        let drained = shop.admins.get(&"10.0.1.1:443".parse().unwrap());
        assert_eq!(drained, (schema >= 3).then_some(&Admin::Drain), "schema {schema}");

        let trail = store.changes(0, 99).unwrap();
        assert_eq!(trail[1].1.reason.as_deref(), Some("ticket 7"));
        assert_eq!(trail[1].1.moved, [2, 0, 1, 2, 3, 1, 0]);
        if schema >= 3 {
            let [told] = trail[2].1.backends[..] else { panic!("schema {schema}") };
            assert_eq!((told.before, told.after), (Admin::Ready, Admin::Drain));
        }
        // What there was before events were kept is among them.
        let query = EventQuery { limit: 99, ..EventQuery::default() };
        let events = store.events(&query).unwrap();
        let changes = events.iter().filter(|event| matches!(event, Event::Change(..)));
        assert_eq!(changes.count(), trail.len(), "schema {schema}");
        assert_eq!(*store.watch().borrow(), events.last().unwrap().id());
        if schema >= 4 {
            let [pending] = &snapshot.pending[..] else { panic!("one waits") };
            assert_eq!((pending.revision, pending.deadline.boot_ms), (4, 5_300_000));
            assert_eq!(pending.change.moved, [2, 0, 1, 1, 10]);
            assert_eq!(snapshot.freezes[0].reason, "the night before");
        }
        if schema >= 5 {
            let [rollout] = &snapshot.rollouts[..] else { panic!("one is under way") };
            assert_eq!((rollout.number, rollout.name.as_str()), (Some(1), "shop-v2"));
            assert_eq!(rollout.record, "{\"step\":1}");
            let [counted, asked] = &store.evidence(1).unwrap()[..] else { panic!("two lines") };
            assert_eq!((counted.share, counted.events), (Some(0.05), Some([7, 2])));
            assert_eq!(asked.answer.as_deref(), Some("good: 0.5"));
        }
        if schema >= 6 {
            let [one, other] = &snapshot.members[..] else { panic!("two members") };
            assert_eq!(
                (one.audience.as_str(), one.network.to_string()),
                ("beta", "192.0.2.7/32".into())
            );
            assert_eq!((other.boot_ms, other.unix_ms), (5_500_000, 1_700_000_503_000));
        }
        let next = snapshot.revision + 1;
        let stored = store.commit(snapshot.revision, &[commit("shop", "7%", &[8])]);
        assert_eq!(stored.unwrap(), next, "schema {schema}");
    }
}

#[test]
fn members_are_kept_in_place_of_what_was_kept_of_them_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = SqliteStore::new(dir.path());
    let one = |network: &str, boot_ms| StoredMember {
        audience: "beta".to_owned(),
        network: network.parse().unwrap(),
        boot_ms,
        boot_id: "a-boot".to_owned(),
        unix_ms: u64::MAX >> 12,
    };
    let gone = |network: &str| ("beta".to_owned(), network.parse().unwrap());
    let [a, b] = ["192.0.2.1/32", "2001:db8::/64"];
    store.keep_members(&[one(a, 5), one(b, 6)], &[gone(a)], true).unwrap();
    assert_eq!(store.load().unwrap().members, [one(b, 6)]);
    store.keep_members(&[one(a, 7), one(b, 8)], &[], false).unwrap();
    let other = ("other".to_owned(), a.parse().unwrap());
    store.keep_members(&[], &[other, gone("192.0.2.9/32")], false).unwrap();
    assert_eq!(SqliteStore::new(dir.path()).load().unwrap().members, [one(a, 7), one(b, 8)]);
    raw(dir.path()).execute("UPDATE member SET network = 'somebody'", ()).unwrap_err();
    raw(dir.path())
        .execute("UPDATE member SET network = 'somebody' WHERE boot_ms = 7", ())
        .unwrap();
    let mut damaged = SqliteStore::new(dir.path());
    assert!(damaged.load().unwrap().members.is_empty());
    assert_eq!(damaged.take_set_aside().len(), 1, "a file that says nonsense is set aside");
}

#[test]
fn a_rollout_is_kept_in_place_of_what_was_kept_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = SqliteStore::new(dir.path());
    let stored = |number, name: &str, ended, record: &str| StoredRollout {
        number,
        name: name.to_owned(),
        begun_unix_ms: 5,
        ended_unix_ms: ended,
        record: record.to_owned(),
    };
    let line = |signal: &str| EvidenceLine {
        rollout: 0,
        step: 2,
        unix_ms: 7,
        window_ms: 1_000,
        signal: signal.to_owned(),
        share: Some(0.05),
        events: Some([3, 4]),
        connections: Some(95),
        answer: None,
    };
    let first = store.keep_rollout(&stored(None, "a", None, "1"), &[line("x")], true).unwrap();
    let other = store.keep_rollout(&stored(None, "b", Some(9), "2"), &[], false).unwrap();
    store.keep_rollout(&stored(Some(first), "a", Some(8), "3"), &[line("y")], false).unwrap();
    let again = store.keep_rollout(&stored(None, "a", None, "4"), &[], true).unwrap();
    let mut store = SqliteStore::new(dir.path());
    let current: Vec<String> =
        store.load().unwrap().rollouts.into_iter().map(|one| one.record).collect();
    assert_eq!(current, ["2", "4"], "those under way, and the last of each name");
    let all: Vec<Option<u64>> =
        store.rollouts("a", 9).unwrap().into_iter().map(|one| one.number).collect();
    assert_eq!((all, other), (vec![Some(again), Some(first)], 2));
    let kept = store.evidence(first).unwrap();
    assert_eq!(kept, ["x", "y"].map(|signal| EvidenceLine { rollout: first, ..line(signal) }));
    // Another file, in which the number was never given out.
    let dir = tempfile::tempdir().unwrap();
    let mut store = SqliteStore::new(dir.path());
    assert_eq!(store.keep_rollout(&stored(Some(41), "a", None, "5"), &[], true).unwrap(), 41);
    assert_eq!(store.keep_rollout(&stored(None, "a", None, "6"), &[], true).unwrap(), 42);
}

#[test]
fn events_are_in_the_order_in_which_they_were_stored_and_changes_among_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = SqliteStore::new(dir.path());
    let mut news = store.watch();
    let notice = |service: &str, text: &str, unix_ms| Notice {
        unix_ms,
        kind: "down".to_owned(),
        service: service.to_owned(),
        text: text.to_owned(),
    };
    store.commit(0, &[commit("shop", "5%", &[]), commit("api", "6%", &[])]).unwrap();
    store.record(&[notice("shop", "one", 5), notice("", "two", 1_700_000_000_000)]).unwrap();
    store.commit(2, &[commit("", "7%", &[])]).unwrap();
    assert!(news.has_changed().unwrap() && *news.borrow_and_update() == 5);
    let said = |query: EventQuery, store: &mut SqliteStore| -> Vec<String> {
        let events = store.events(&query).unwrap();
        let one = |event: &Event| match event {
            Event::Change(id, revision, change) => {
                assert!(change.moved.is_empty(), "lists are not shown");
                format!("{id}: revision {revision} {}", change.service)
            }
            Event::Notice(id, notice) => format!("{id}: {}", notice.text),
        };
        events.iter().map(one).collect()
    };
    let all = ["1: revision 1 shop", "2: revision 2 api", "3: one", "4: two", "5: revision 3 "];
    let query = |limit| EventQuery { limit, ..EventQuery::default() };
    assert_eq!(said(query(9), &mut store), all);
    assert_eq!(said(query(2), &mut store), all[3..], "the newest");
    let after = |after, limit| EventQuery { after: Some(after), ..query(limit) };
    assert_eq!(said(after(1, 2), &mut store), all[1..3], "the oldest");
    assert_eq!(said(after(5, 2), &mut store), [""; 0]);
    let of = |service: &str| EventQuery { service: Some(service.to_owned()), ..query(9) };
    assert_eq!(said(of("shop"), &mut store), [all[0], all[2], all[4]], "and changes of all");
    let since = EventQuery { since_unix_ms: Some(6), ..query(9) };
    assert_eq!(said(since, &mut store), [all[0], all[1], all[3], all[4]]);
    // The next process goes on counting.
    let mut store = SqliteStore::new(dir.path());
    store.load().unwrap();
    assert_eq!(*store.watch().borrow(), 5);
}

#[test]
fn the_trail_is_bounded_and_what_is_in_force_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = SqliteStore::new(dir.path());
    let mut first = commit("old", "5%", &[1]);
    first.deadline =
        Some(Deadline { batch: 2, within_ms: 5, boot_ms: 5, boot_id: String::new(), unix_ms: 5 });
    store.commit(0, &[commit("kept", "5%", &[]), first]).unwrap();
    let some = |count: u64| vec![commit("shop", "5%", &[2]); count as usize];
    let mut revision = store.commit(2, &some(KEPT_LISTS)).unwrap();
    let lists = |store: &mut SqliteStore| -> Vec<u64> {
        let trail = store.changes(0, 200_000).unwrap();
        let kept = trail.iter().filter(|(_, change)| !change.moved.is_empty());
        kept.map(|(revision, _)| *revision).collect()
    };
    let kept = lists(&mut store);
    assert_eq!(kept[..2], [2, 3], "what waits for a confirmation keeps its list");
    assert_eq!(*kept.last().unwrap(), revision);
    while revision < KEPT_CHANGES + 200 {
        revision = store.commit(revision, &some(20_000)).unwrap();
    }
    let kept = lists(&mut store);
    assert_eq!(kept.len() as u64, KEPT_LISTS + 1, "{:?}", &kept[..3]);
    let trail = store.changes(0, 200_000).unwrap();
    let (oldest, length) = (&trail[..3], trail.len() as u64);
    assert_eq!((oldest[0].0, oldest[1].0), (1, 2), "services and what waits refer to them");
    assert_eq!((length, oldest[2].0), (KEPT_CHANGES + 2, revision - KEPT_CHANGES + 1));
    assert_eq!(store.load().unwrap().services.len(), 3);

    let notice =
        Notice { unix_ms: 5, kind: "up".to_owned(), service: String::new(), text: String::new() };
    for _ in 0..3 {
        store.record(&vec![notice.clone(); KEPT_NOTICES as usize]).unwrap();
    }
    let count = "SELECT count(*) FROM event WHERE revision IS NULL";
    let count: i64 = raw(dir.path()).query_row(count, (), |row| row.get(0)).unwrap();
    assert_eq!(count as u64, KEPT_NOTICES);
}

#[test]
fn placements_stay_until_a_commit_brings_others() {
    let placement = |version: &str, family, bytes: &[u8]| PlacementRecord {
        version: version.to_owned(),
        family,
        placement: bytes.to_vec(),
    };
    let with = |service: &str, placements: Option<Vec<PlacementRecord>>| {
        let mut commit = commit(service, "5%", &[0]);
        record(&mut commit).placements = placements;
        commit
    };
    let both = vec![placement("stable", 4, &[3, 1]), placement("stable", 6, &[])];
    let one = vec![placement("v2", 4, &[0; 5000])];
    let dir = tempfile::tempdir().unwrap();
    let mut store = SqliteStore::new(dir.path());
    let commits = [with("shop", Some(both.clone())), with("api", Some(one.clone()))];
    assert_eq!(store.commit(0, &commits).unwrap(), 2);
    // A change of the split alone.
    assert_eq!(store.commit(2, &[with("shop", None)]).unwrap(), 3);
    let placements = |store: &mut SqliteStore| -> Vec<Vec<PlacementRecord>> {
        store.load().unwrap().services.into_iter().map(|s| s.placements.unwrap()).collect()
    };
    assert_eq!(placements(&mut SqliteStore::new(dir.path())), [one.clone(), both]);
    store.commit(3, &[with("shop", Some(one.clone())), with("api", Some(Vec::new()))]).unwrap();
    assert_eq!(placements(&mut store), [Vec::new(), one]);
}

#[test]
fn a_change_against_another_revision_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (mut first, mut second) = (SqliteStore::new(dir.path()), SqliteStore::new(dir.path()));
    assert_eq!(first.commit(0, &[commit("shop", "5%", &[])]).unwrap(), 1);
    match second.commit(0, &[commit("shop", "50%", &[])]) {
        Err(StoreError::Stale { expected: 0, found: 1 }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(second.load().unwrap().services[0].split["v2"].to_string(), "5%");
}

#[test]
fn a_damaged_file_is_set_aside_and_never_deleted() {
    for damage in ["garbage", "torn page", "foreign", "not a split"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let mut store = SqliteStore::new(dir.path());
        for n in 0..40 {
            store.commit(n, &[commit(&format!("service-{n}"), "5%", &[0x5a; 2000])]).unwrap();
        }
        drop(store);
        match damage {
            "garbage" => {
                fs::write(&path, b"this is not a database, it only looks like a file").unwrap()
            }
            "torn page" => {
                let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                for page in 1..20 {
                    file.write_all_at(&[0xff; 1000], page * 4096).unwrap();
                }
            }
            "foreign" => {
                fs::remove_file(&path).unwrap();
                let other = rusqlite::Connection::open(&path).unwrap();
                other.execute_batch("CREATE TABLE recipes (name TEXT)").unwrap();
            }
            _ => {
                let raw = rusqlite::Connection::open(&path).unwrap();
                raw.execute("UPDATE service SET split = '{\"v2\":\"lots\"}'", ()).unwrap();
            }
        }
        let bytes = fs::read(&path).unwrap();

        let mut store = SqliteStore::new(dir.path());
        assert_eq!(store.load().unwrap(), Default::default(), "{damage}");
        let aside = store.take_set_aside();
        assert_eq!(aside.len(), 1, "{damage}");
        assert!(aside[0].to_string_lossy().contains("state.db.damaged-"), "{damage}");
        assert_eq!(fs::read(&aside[0]).unwrap().len(), bytes.len(), "{damage}");
        assert_eq!(store.commit(0, &[commit("shop", "5%", &[])]).unwrap(), 1, "{damage}");
        assert!(store.take_set_aside().is_empty());
    }
}

#[test]
fn a_newer_schema_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    SqliteStore::new(dir.path()).commit(0, &[commit("shop", "5%", &[])]).unwrap();
    let path = dir.path().join("state.db");
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let mut store = SqliteStore::new(dir.path());
    match store.load() {
        Err(StoreError::NewerSchema { found: 99, known: 1..99, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(path.exists() && store.take_set_aside().is_empty());
}

#[test]
fn something_else_in_its_place_is_an_error_until_it_goes_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    fs::create_dir(&path).unwrap();
    let mut store = SqliteStore::new(dir.path());
    for _ in 0..2 {
        match store.commit(0, &[commit("shop", "5%", &[])]) {
            Err(StoreError::Unavailable { reason, .. }) => {
                assert!(reason.contains("directory"), "{reason}")
            }
            other => panic!("{other:?}"),
        }
    }
    fs::remove_dir(&path).unwrap();
    assert_eq!(store.commit(0, &[commit("shop", "5%", &[])]).unwrap(), 1);
}

#[test]
fn a_full_disk_refuses_changes_and_keeps_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    on_tmpfs(dir.path(), "size=512k", || {
        let mut store = SqliteStore::new(dir.path());
        assert_eq!(store.commit(0, &[commit("shop", "5%", &[])]).unwrap(), 1);
        let filler = dir.path().join("filler");
        let full = fs::write(&filler, vec![1; 1 << 20]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        // Larger than the slack in the last page of the log.
        let large = commit("shop", "50%", &[7; 100_000]);
        for _ in 0..3 {
            match store.commit(1, std::slice::from_ref(&large)) {
                Err(StoreError::Unavailable { reason, .. }) => {
                    assert!(reason.contains("full"), "{reason}")
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(store.load().unwrap().services[0].split["v2"].to_string(), "5%");
        fs::remove_file(&filler).unwrap();
        assert_eq!(store.commit(1, &[large]).unwrap(), 2);
    });
}

#[test]
fn a_read_only_disk_is_still_read() {
    let dir = tempfile::tempdir().unwrap();
    on_tmpfs(dir.path(), "size=1m", || {
        let mut store = SqliteStore::new(dir.path());
        store.commit(0, &[commit("shop", "5%", &[])]).unwrap();
        drop(store);
        let none = None::<&str>;
        mount(none, dir.path(), none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none).unwrap();
        let mut store = SqliteStore::new(dir.path());
        assert_eq!(store.load().unwrap().revision, 1);
        match store.commit(1, &[commit("shop", "50%", &[])]) {
            Err(StoreError::Unavailable { .. }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(store.load().unwrap().services[0].split["v2"].to_string(), "5%");
    });
}
