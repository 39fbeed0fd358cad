//! The store against good files, damaged ones, and disks that fail.

use std::{fs, os::unix::fs::FileExt, path::Path, thread};

use canary_agent::store::{
    Admin, BackendChange, Change, Commit, PlacementRecord, ServiceRecord, SqliteStore, StateStore,
    StoreError,
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
            backend: None,
        },
        record: ServiceRecord {
            name: service.to_owned(),
            control: "stable".to_owned(),
            split: [("v2".to_owned(), share.parse().unwrap())].into(),
            slots: vec!["stable".to_owned(), String::new(), "v2".to_owned()],
            owners: owners.to_vec(),
            salt: u64::MAX - 5,
            placements: Some(Vec::new()),
            admins: Default::default(),
        },
    }
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
    commits[1].change.backend = Some(change);
    commits[1].record.admins =
        [(addr, Admin::Maint), ("10.0.0.1:80".parse().unwrap(), Admin::Drain)].into();
    assert_eq!(store.commit(0, &commits).unwrap(), 2);
    assert_eq!(store.commit(2, &[commit("shop", "0.1%", &[])]).unwrap(), 3);
    drop(store);

    let mut store = SqliteStore::new(&state_dir);
    let snapshot = store.load().unwrap();
    assert_eq!(snapshot.revision, 3);
    assert_eq!(snapshot.services, [commits[1].record.clone(), commit("shop", "0.1%", &[]).record]);
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

/// What release 1 made: its tables, with a service in them.
const SCHEMA_1: &str = "CREATE TABLE change (
        revision INTEGER PRIMARY KEY, unix_ms INTEGER NOT NULL, uid INTEGER, service TEXT NOT NULL,
        action TEXT NOT NULL, reason TEXT, before TEXT NOT NULL, after TEXT NOT NULL,
        moved BLOB NOT NULL
    ) STRICT;
    CREATE TABLE service (
        name TEXT PRIMARY KEY, revision INTEGER NOT NULL REFERENCES change (revision),
        control TEXT NOT NULL, split TEXT NOT NULL, slots TEXT NOT NULL, owners BLOB NOT NULL,
        salt INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    INSERT INTO change VALUES (1, 5, 0, 'shop', 'split', NULL, '{}', '{\"v2\":\"5%\"}', x'0102');
    INSERT INTO service VALUES
        ('shop', 1, 'stable', '{\"v2\":\"5%\"}', '[\"stable\",\"v2\"]', x'07', 3);";

#[test]
fn a_file_of_the_first_schema_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let raw = rusqlite::Connection::open(dir.path().join("state.db")).unwrap();
    raw.execute_batch(SCHEMA_1).unwrap();
    raw.pragma_update(None, "application_id", 0x636e_7279).unwrap();
    raw.pragma_update(None, "user_version", 1).unwrap();
    drop(raw);
    let mut store = SqliteStore::new(dir.path());
    let snapshot = store.load().unwrap();
    assert_eq!((snapshot.revision, &snapshot.services[0].owners[..]), (1, &[7][..]));
    assert!(snapshot.services[0].admins.is_empty());
    assert_eq!(snapshot.services[0].placements, Some(Vec::new()));
    assert_eq!(store.changes(0, 9).unwrap()[0].1.backend, None);
    assert_eq!(store.commit(1, &[commit("shop", "7%", &[8])]).unwrap(), 2);
    assert!(store.take_set_aside().is_empty());
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
        commit.record.placements = placements;
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
