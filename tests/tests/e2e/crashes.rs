//! The agent is killed at each place between a request and its effect, and at each again
//! while it starts: what is stored and what is in the maps fit together afterwards, nobody's
//! connection notices, and what waits for a confirmation is still taken back.

use std::{
    collections::BTreeSet, fs, os::unix::process::ExitStatusExt as _, thread, time::Duration,
};

use canary_agent::{
    api::model::{Events, Status},
    failpoint::{self, Failpoint},
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    server::{ECHO_PORT, HTTP_PORT},
    topology::{Family, Host},
    wait,
};
use nix::sys::signal::Signal;

use crate::{
    sound::assert_sound,
    support::{Bench, ECHO, SHOP, Way, version},
};

/// The shares that follow on each other.
const SHARES: [&str; 2] = ["20%", "60%"];

/// Kills an agent at each of `points`, in the middle of a split and in a start after it.
fn exercise(test: &str, way: Way, points: &[Failpoint], keys: &str) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let services = bench.services(&format!("buckets = 4096\n{keys}"));
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    let choice = agent.folder().join("failpoint");
    let run = |agent: &mut Agent<'_>| {
        agent.run_with(|command| {
            command.env(failpoint::FILE, &choice);
        });
    };
    run(&mut agent);
    agent.wait_ready();
    agent.split(SHOP, "v2", SHARES[1]);
    let mut pool = bench.connect(Family::V4, 0..10);
    pool.open.extend(bench.connect(Family::V6, 0..10).open);
    let mut again = 0;
    for (round, point) in points.iter().enumerate() {
        let before = agent.status();
        let (was, asked) = (SHARES[(round + 1) % 2], SHARES[round % 2]);
        assert_eq!(version(&before, SHOP, "v2").asked_text, was);
        fs::write(&choice, point.name()).expect("a choice");
        let output = agent.cli(&["split", SHOP, &format!("v2={asked}")]);
        let when = format!("{test}, {}", point.name());
        if *point != Failpoint::BeforeSweep {
            assert_eq!(output.code, 5, "{when}: whoever asked is told: {output:?}");
        }
        wait::until("the end of the agent", || agent.ended().ok_or_else(|| "it runs".to_owned()));
        let end = agent.stop(Signal::SIGTERM);
        assert_eq!(end.signal(), Some(9), "{when}: {end}");
        pool.assert_where_they_were(&when);
        // Whoever begins now is served, by whatever is in the maps.
        drop(bench.connect(Family::V4, 500..505));

        // The next start may end at the same place.
        run(&mut agent);
        let started = wait::until("the agent or its end", || match agent.ended() {
            Some(_) => Ok(None),
            None => agent.ready_now().map(Some),
        });
        if started.is_none() {
            again += 1;
            let end = agent.stop(Signal::SIGTERM);
            let killed = end.signal();
            assert_eq!(killed, Some(9), "{when}, at the start: {end}");
            pool.assert_where_they_were(&format!("{when}, at the start"));
            fs::remove_file(&choice).expect("a choice");
            run(&mut agent);
        } else {
            fs::remove_file(&choice).expect("a choice");
        }
        let status = agent.wait_ready();
        let durable = *point as usize >= Failpoint::Committed as usize;
        let now = if durable { asked } else { was };
        assert_eq!(version(&status, SHOP, "v2").asked_text, now, "{when}");
        let revision = before.agent.revision + u64::from(durable);
        assert_eq!(status.agent.revision, revision, "{when}");
        assert_sound(&agent, &status, &when);
        pool.assert_where_they_were(&format!("{when}, started again"));
        agent.split(SHOP, "v2", asked);
        assert_sound(&agent, &agent.status(), &format!("{when}, and asked again"));
    }
    println!("{test}: {} places, {again} of them in a start too", points.len());
    pool.assert_where_they_were("in the end");
}

/// Those that a split passes, whatever follows on it.
fn of_a_split() -> Vec<Failpoint> {
    let passed = |point: &Failpoint| *point != Failpoint::BeforeSweep && !point.is_of_panic();
    Failpoint::ALL.iter().copied().filter(passed).collect()
}

#[test]
fn a_kill_at_each_write_leaves_one_split_or_the_other_in_dsr() {
    let test = "a_kill_at_each_write_leaves_one_split_or_the_other_in_dsr";
    exercise(test, Way::Dsr, &of_a_split(), "");
}

#[test]
fn a_kill_at_each_write_leaves_one_split_or_the_other_in_nat() {
    let test = "a_kill_at_each_write_leaves_one_split_or_the_other_in_nat";
    exercise(test, Way::NatTwoArmed, &of_a_split(), "");
}

#[test]
fn a_kill_at_each_write_of_a_first_start_is_repaired_by_the_next() {
    let test = "a_kill_at_each_write_of_a_first_start_is_repaired_by_the_next";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let services = bench.services("buckets = 4096\nsplit = { v2 = \"20%\" }");
    let options = AgentOptions::native(&bench.topology);
    let mut passed = 0;
    let all = || [Failpoint::ALL, Failpoint::OTHER].into_iter().flatten();
    for point in all().filter(|point| !point.is_of_panic()) {
        let when = format!("{test}, {}", point.name());
        let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
        let choice = agent.folder().join("failpoint");
        fs::write(&choice, point.name()).expect("a choice");
        agent.run_with(|command| {
            command.env(failpoint::FILE, &choice);
        });
        // A start has events, which are stored within a second.
        let late = *point == Failpoint::NoticesWritten;
        let started = wait::until("the agent or its end", || match agent.ended() {
            Some(_) => Ok(None),
            None if late => Err("it runs".to_owned()),
            None => agent.ready_now().map(Some),
        });
        if started.is_none() {
            passed += 1;
            let end = agent.stop(Signal::SIGTERM);
            assert_eq!(end.signal(), Some(9), "{when}: {end}");
            agent.run();
        }
        let status = agent.wait_ready();
        assert_eq!(version(&status, SHOP, "v2").asked_text, "20%", "{when}");
        assert_sound(&agent, &status, &when);
        drop(bench.connect(Family::V4, 0..5));
    }
    println!("{test}: a start passes {passed} of {} places", all().count());
    assert!(passed > 10, "{passed}");
}

/// A service comes and goes, and another one's weights change: the next start finds what the files
/// say, whatever of it was done.
#[test]
fn a_kill_at_each_write_of_a_reload_is_repaired_by_the_next_start() {
    let test = "a_kill_at_each_write_of_a_reload_is_repaired_by_the_next_start";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let keys = "buckets = 4096\nhealth = { type = \"none\" }";
    let services = |round: usize| {
        let first = &bench.topology.backends[0].name;
        let weight = |host: &Host| Some(if host.name == *first { 1 + round as u32 } else { 1 });
        let all = &Family::ALL;
        let shop = bench.weighted_service(all, SHOP, HTTP_PORT, &["tcp"], keys, weight);
        match round % 2 {
            0 => shop,
            _ => shop + &bench.service_with(all, ECHO, ECHO_PORT, &["tcp"], keys),
        }
    };
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services(0));
    let choice = agent.folder().join("failpoint");
    let run = |agent: &mut Agent<'_>| {
        agent.run_with(|command| {
            command.env(failpoint::FILE, &choice);
        });
    };
    run(&mut agent);
    agent.wait_ready();
    agent.split(SHOP, "v2", "40%");
    let mut pool = bench.connect(Family::V4, 0..10);
    pool.open.extend(bench.connect(Family::V6, 0..10).open);
    let points = [
        Failpoint::BeforeCommit,
        Failpoint::Committed,
        Failpoint::BackendsWritten,
        Failpoint::LedgerHalfWritten,
        Failpoint::TableHalfWritten,
        Failpoint::TablesWritten,
        Failpoint::AddressesWritten,
        Failpoint::RecordsCleared,
        Failpoint::InForce,
    ];
    let mut passed = BTreeSet::new();
    // Each with a service that comes, and with one that goes.
    for round in 1..=2 * points.len() {
        let point = points[(round - 1) / 2];
        let when = format!("{test}, round {round}, {}", point.name());
        agent.configure(&options, &services(round));
        fs::write(&choice, point.name()).expect("a choice");
        let output = agent.cli(&["reload", "--json"]);
        if output.code == 5 {
            passed.insert(point.name());
            let ended = || agent.ended().ok_or("it runs".to_owned());
            wait::until("the end of the agent", ended);
            assert_eq!(agent.stop(Signal::SIGTERM).signal(), Some(9), "{when}");
            pool.assert_where_they_were(&when);
            drop(bench.connect(Family::V4, 500..505));
            fs::remove_file(&choice).expect("a choice");
            run(&mut agent);
        } else {
            assert_eq!(output.code, 0, "{when}: {output:?}");
            fs::remove_file(&choice).expect("a choice");
        }
        let status = agent.wait_ready();
        assert_eq!(status.services.len(), 1 + round % 2, "{when}");
        let stable = &version(&status, SHOP, "stable").backends;
        assert!(stable.iter().any(|one| one.weight as usize == 1 + round), "{when}: {stable:?}");
        assert_eq!(version(&status, SHOP, "v2").asked_text, "40%", "{when}");
        assert_sound(&agent, &status, &when);
        pool.assert_where_they_were(&format!("{when}, started again"));
    }
    println!("{test}: killed at {passed:?}");
    assert_eq!(passed.len(), points.len(), "{passed:?}");
}

/// Buckets whose connections may be let go are swept.
#[test]
fn a_kill_before_a_sweep_leaves_the_split_as_it_is() {
    let test = "a_kill_before_a_sweep_leaves_the_split_as_it_is";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let services = bench.services("buckets = 4096\ndrain = \"1s\"");
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    let choice = agent.folder().join("failpoint");
    fs::write(&choice, Failpoint::BeforeSweep.name()).expect("a choice");
    agent.run_with(|command| {
        command.env(failpoint::FILE, &choice);
    });
    agent.wait_ready();
    agent.split(SHOP, "v2", "40%");
    wait::until("the end of the agent", || agent.ended().ok_or_else(|| "it runs".to_owned()));
    agent.stop(Signal::SIGTERM);
    drop(bench.connect(Family::V4, 0..10));
    agent.run();
    let status = agent.wait_ready();
    assert_eq!(version(&status, SHOP, "v2").asked_text, "40%");
    assert_sound(&agent, &status, test);
    wait::until("the end of tracking", || match version_tracked(&agent.status()) {
        0 => Ok(()),
        tracked => Err(format!("{tracked} buckets")),
    });
    assert_sound(&agent, &agent.status(), test);
}

fn version_tracked(status: &Status) -> u32 {
    crate::support::service(status, SHOP).tracked_buckets
}

#[test]
fn what_waits_for_a_confirmation_is_taken_back_whoever_is_killed() {
    let test = "what_waits_for_a_confirmation_is_taken_back_whoever_is_killed";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let mut agent = bench.agent("buckets = 4096");
    agent.split(SHOP, "v2", "20%");
    let mut pool = bench.connect(Family::V4, 0..10);
    let v2 = |status: &Status| version(status, SHOP, "v2").asked_text.clone();
    // Down for a moment, and for longer than there is time.
    for (time, down) in [("4s", Duration::ZERO), ("2s", Duration::from_secs(2))] {
        let output = agent.cli(&["split", SHOP, "v2=60%", "--confirm", time]);
        assert_eq!(output.code, 0, "{output:?}");
        assert!(output.stdout.contains("taken back in"), "{output:?}");
        assert_eq!((v2(&agent.status()).as_str(), agent.status().pending.len()), ("60%", 1));
        agent.stop(Signal::SIGKILL);
        thread::sleep(down);
        agent.run();
        let status = agent.wait_ready();
        if !down.is_zero() {
            assert_eq!(v2(&status), "20%", "{test}: never in force again");
        }
        wait::until("the split to be taken back", || match agent.status() {
            status if status.pending.is_empty() => Ok(()),
            status => Err(format!("{:?}", status.pending)),
        });
        let status = agent.status();
        assert_eq!(v2(&status), "20%", "{test}");
        assert_sound(&agent, &status, test);
        pool.assert_where_they_were(test);
        let events: Events = agent.json(&["events", "--service", SHOP]);
        let undo = events.events.iter().rfind(|event| event.revision.is_some()).expect("one");
        assert_eq!((undo.kind.as_str(), undo.uid), ("undo", None), "{undo:?}");
        assert_eq!(undo.about, [status.agent.revision - 1], "{undo:?}");
    }
    // Confirmed, it stays, over a kill too.
    assert_eq!(agent.cli(&["split", SHOP, "v2=60%", "--confirm", "2s"]).code, 0);
    assert_eq!(agent.cli(&["confirm"]).code, 0);
    assert_eq!(agent.cli(&["confirm"]).code, 1, "nothing waits any more");
    agent.stop(Signal::SIGKILL);
    thread::sleep(Duration::from_secs(2));
    agent.run();
    assert_eq!(v2(&agent.wait_ready()), "60%");
    let undone = agent.cli(&["undo", "--reason", "the end of the test"]);
    assert_eq!(undone.code, 0, "{undone:?}");
    assert_eq!(v2(&agent.status()), "20%");
    assert_sound(&agent, &agent.status(), test);
    pool.assert_where_they_were(test);
}
