//! Disks that are full, read-only, or hold something else: what is in force stays, changes are
//! refused with the reason, and nothing is deleted.

use std::{
    fs,
    path::{Path, PathBuf},
};

use canary_agent::api::model::ErrorBody;
use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    lacking::Mounts,
    topology::Family,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, Pool, SHOP, Way, version};

/// Room for the state: a few changes, with owners that do not repeat.
const ROOM: u64 = 640 * 1024;

/// Asserts that a split is refused because of the disk, that the one in force stays, and that
/// everything else goes on.
#[track_caller]
fn refused(agent: &Agent<'_>, bench: &Bench, pool: &mut Pool, in_force: &str, says: &str) {
    let before = agent.status();
    for _ in 0..3 {
        let output = agent.cli(&["split", SHOP, "v2=70%", "--json"]);
        let error = output.json::<ErrorBody>().error;
        assert_eq!((output.code, error.code.as_str()), (1, "state_not_stored"), "{error:?}");
        assert!(error.message.contains(says) && error.help.is_some(), "{error:?}");
    }
    for command in [&["undo"][..], &["freeze", "--reason", "x"]] {
        let output = agent.cli(command);
        assert_eq!(output.code, 1, "{command:?}: {output:?}");
    }
    let status = agent.status();
    assert_eq!(status.agent.revision, before.agent.revision);
    assert!(status.agent.frozen.is_none());
    assert_eq!(version(&status, SHOP, "v2").asked_text, in_force);
    assert!(status.alerts.iter().any(|alert| alert.contains(says)), "{:?}", status.alerts);
    pool.assert_where_they_were(says);
    drop(bench.connect(Family::V4, 500..505));
}

#[test]
fn a_full_disk_refuses_changes_and_keeps_what_is_in_force() {
    let test = "a_full_disk_refuses_changes_and_keeps_what_is_in_force";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &bench.services(""));
    let state = agent.folder().join("state");
    fs::create_dir_all(&state).expect("a folder");
    agent.run_with(|command| Mounts::default().small(&state, ROOM).apply(command));
    agent.wait_ready();
    agent.split(SHOP, "v2", "40%");
    let mut pool = bench.connect(Family::V4, 0..10);
    pool.open.extend(bench.connect(Family::V6, 0..10).open);

    // The file system is the agent's alone: it is reached through its process.
    let pid = agent.pid().expect("it runs");
    let inside = PathBuf::from(format!("/proc/{pid}/root{}", state.display()));
    let filler = inside.join("filler");
    let full = fs::write(&filler, vec![1; ROOM as usize]).expect_err("it is full then");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    refused(&agent, &bench, &mut pool, "40%", "full");
    fs::remove_file(&filler).expect("room again");
    agent.split(SHOP, "v2", "41%");
    assert!(agent.status().alerts.is_empty(), "{:?}", agent.status().alerts);

    let mut files = inside.read_dir().expect("a folder").map(|entry| entry.expect("an entry"));
    assert!(!files.any(|file| file.file_name().to_string_lossy().contains("damaged")));
    pool.assert_where_they_were(test);
}

#[test]
fn a_read_only_disk_is_read_and_refuses_changes() {
    let test = "a_read_only_disk_is_read_and_refuses_changes";
    if !host::ready(test) {
        return;
    }
    for end in [Signal::SIGTERM, Signal::SIGKILL] {
        let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
        let mut agent = bench.agent("");
        agent.split(SHOP, "v2", "40%");
        assert_eq!(
            agent
                .cli(&[
                    "backend",
                    "drain",
                    SHOP,
                    &bench.topology.backends[2].addrs()[0].to_string()
                ])
                .code,
            0
        );
        let mut pool = bench.connect(Family::V4, 0..10);
        let revision = agent.status().agent.revision;
        agent.stop(end);
        let state = agent.folder().join("state");
        agent.run_with(|command| Mounts::default().read_only(&state).apply(command));
        let status = agent.wait_ready();
        assert_eq!((status.agent.revision, test), (revision, test), "what is there is read");
        refused(&agent, &bench, &mut pool, "40%", "read");
        agent.stop(end);
        agent.run();
        agent.wait_ready();
        agent.split(SHOP, "v2", "42%");
        assert!(agent.status().alerts.is_empty(), "{:?}", agent.status().alerts);
        assert_eq!(agent.status().agent.revision, revision + 1);
        pool.assert_where_they_were(test);
    }
}

#[test]
fn a_damaged_state_file_is_set_aside_and_the_maps_say_what_is_in_force() {
    let test = "a_damaged_state_file_is_set_aside_and_the_maps_say_what_is_in_force";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let mut agent = bench.agent("");
    agent.split(SHOP, "v2", "40%");
    let mut pool = bench.connect(Family::V4, 0..10);
    let state = agent.folder().join("state");
    let damage = |state: &Path| {
        for file in ["state.db", "state.db-wal"] {
            fs::write(state.join(file), "no database").expect("damage");
        }
    };
    let damaged = |state: &Path| -> Vec<PathBuf> {
        let entries =
            fs::read_dir(state).expect("a folder").map(|entry| entry.expect("one").path());
        let set_aside = |path: &PathBuf| path.to_string_lossy().contains("state.db.damaged-");
        entries
            .filter(|path| set_aside(path) && !path.to_string_lossy().ends_with("-wal"))
            .collect()
    };
    // While nobody has it open, and under a running agent, whose next start finds it.
    for (round, running) in [(1, false), (2, true)] {
        let share = format!("{}%", 40 + round);
        if running {
            damage(&state);
            agent.split(SHOP, "v2", &share);
        }
        agent.stop(Signal::SIGKILL);
        if !running {
            damage(&state);
        }
        pool.assert_where_they_were(test);
        agent.run();
        agent.wait_ready();
        if !running {
            agent.split(SHOP, "v2", &share);
        }
        let status = agent.status();
        assert_eq!(version(&status, SHOP, "v2").asked_text, share, "{test}");
        assert_eq!(damaged(&state).len(), round, "{test}: {:?}", damaged(&state));
        assert!(agent.log().contains("is damaged"), "{test}");
        pool.assert_where_they_were(test);
    }
    // What was taken over from the maps can't be taken back: nobody knows what was before.
    let output = agent.cli(&["undo", "--to", "0", "--json"]);
    assert_eq!(output.code, 1, "{output:?}");
    assert_eq!(output.json::<ErrorBody>().error.code, "configured_since", "{output:?}");
    pool.assert_where_they_were(test);
}
