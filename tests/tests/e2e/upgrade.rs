//! Another build, another capacity, another layout: an agent puts maps and program in the place
//! of those that are pinned while connections are open and new ones come, and is killed at each
//! step of it.

use std::{
    fs,
    os::unix::{fs::FileExt as _, process::ExitStatusExt as _},
    time::{Duration, Instant},
};

use canary_agent::{
    api::model::{Events, Explain, Status},
    datapath,
    failpoint::{self, Failpoint},
};
use canary_ebpf_common::abi::{FlowKeyV4, PortPair};
use canary_tests::{
    agent::{Agent, AgentOptions},
    hold::Hold,
    host,
    loaded::Flows,
    topology::Family,
    wait,
};
use nix::sys::signal::Signal;

use crate::{
    fresh::{self, Fresh},
    panic::{assert_all_on_control, assert_shown, panic},
    reload::{HELD, UNMEASURED_MAX},
    support::{Bench, Pool, SHOP, Way, alone, backends, fill_flows, service, settled, version},
};

/// The agent of another layout.
const NEXT: &str = "canary-agent-next";
/// The agent of this one.
const THIS: &str = "canary-agent";

/// Clients whose connections are looked at, of each family.
const CLIENTS: u32 = 12;

/// Options with these sizes.
fn sized(bench: &Bench, capacity: &str) -> AgentOptions {
    let extra = format!("capacity = {{ {capacity} }}");
    AgentOptions { extra, ..AgentOptions::native(&bench.topology) }
}

/// Packets to the backends of the service, which never become fewer.
fn packets(status: &Status) -> u64 {
    backends(status, SHOP).map(|backend| backend.packets).sum()
}

/// Open connections of both families.
fn pool(bench: &Bench, first: u32) -> Pool {
    let mut pool = bench.connect(Family::V4, first..first + CLIENTS);
    pool.open.extend(bench.connect(Family::V6, first..first + CLIENTS).open);
    pool
}

/// What the newest event of this kind says.
fn told(agent: &Agent<'_>, kind: &str) -> String {
    let events: Events = agent.json(&["events", "--limit", "1000"]);
    let event = events.events.into_iter().rfind(|event| event.kind == kind);
    event.map(|event| event.text).unwrap_or_default()
}

/// Starts the agent with a place to die at, and says whether it has died there.
fn killed_at(agent: &mut Agent<'_>, point: Failpoint, args: &[&str]) -> bool {
    let choice = agent.folder().join("failpoint");
    fs::write(&choice, point.name()).expect("a choice");
    agent.run_with(|command| {
        command.args(args).env(failpoint::FILE, &choice);
    });
    let died = wait::until("the agent or its end", || match agent.ended() {
        Some(_) => Ok(true),
        None => agent.ready_now().map(|_| false),
    });
    let end = agent.stop(Signal::SIGTERM);
    fs::remove_file(&choice).expect("a choice");
    if died {
        assert_eq!(end.signal(), Some(9), "{}: {end}\n{}", point.name(), agent.log());
    }
    died
}

/// What is pinned is one set of maps, of the agent that runs.
#[track_caller]
fn assert_one_set(agent: &Agent<'_>, when: &str) {
    let pins = agent.folder().join("bpffs/canary");
    assert!(!pins.join("next").exists(), "{when}: maps are left beside those in force");
    assert!(!pins.join("maps/UNFINISHED").is_symlink(), "{when}: a switch is left unfinished");
}

#[track_caller]
fn assert_sizes(status: &Status, map: &str, capacity: u64, when: &str) {
    let found = status.maps.iter().find(|one| one.name == map).map(|one| one.capacity);
    assert_eq!(found, Some(capacity), "{when}: {map}");
}

/// Alternates between two capacities, the agent being killed at each step of it.
fn another_capacity(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let services = bench.services("buckets = 4096");
    let sizes = [(20_000, 64), (30_000, 200)];
    let options = sizes
        .map(|(flows, backends)| sized(&bench, &format!("flows = {flows}, backends = {backends}")));
    let mut agent = Agent::prepare(&bench.topology.balancer, &options[0], &services);
    agent.run();
    agent.wait_ready();
    // Moved buckets, in both ways to forward.
    let mut untracked = pool(&bench, 0);
    agent.split(SHOP, "v2", "50%");
    let mut tracked = pool(&bench, 100);
    let mut died = 0;
    for (round, point) in Failpoint::HANDOVER.iter().enumerate() {
        let when = format!("{test}, {}", point.name());
        let before = agent.status();
        agent.stop(Signal::SIGTERM);
        let to = (round + 1) % 2;
        agent.configure(&options[to], &services);
        died += u32::from(killed_at(&mut agent, *point, &[]));
        untracked.assert_where_they_were(&when);
        tracked.assert_where_they_were(&when);
        // Whoever begins now is served, whichever interface packets come by.
        let mut meanwhile = pool(&bench, 1_000 + 100 * round as u32);
        meanwhile.assert_where_they_were(&when);
        agent.run();
        let status = agent.wait_ready();
        assert_one_set(&agent, &when);
        for pool in [&mut untracked, &mut tracked, &mut meanwhile] {
            pool.assert_where_they_were(&format!("{when}, started again"));
        }
        assert_sizes(&status, "FLOWS_V4", sizes[to].0, &when);
        assert_eq!(version(&status, SHOP, "v2").asked_text, "50%", "{when}");
        assert_eq!(service(&status, SHOP).tracked_buckets, service(&before, SHOP).tracked_buckets);
        assert!(packets(&status) >= packets(&before), "{when}: counters go back");
    }
    assert_eq!(died as usize, Failpoint::HANDOVER.len(), "{test}: not all steps are passed");
    let told = told(&agent, "maps");
    assert!(told.contains("; kept: ") && !told.contains("not kept"), "{told}");
}

#[test]
fn a_kill_at_each_step_to_another_capacity_breaks_nothing_in_nat() {
    another_capacity(
        "a_kill_at_each_step_to_another_capacity_breaks_nothing_in_nat",
        Way::NatTwoArmed,
    );
}

#[test]
fn a_kill_at_each_step_to_another_capacity_breaks_nothing_in_dsr() {
    another_capacity("a_kill_at_each_step_to_another_capacity_breaks_nothing_in_dsr", Way::Dsr);
}

/// An agent is killed while other maps take the place of those that are pinned, and everything is sent
/// to control then: by whichever maps an interface is steered at that moment.
fn panic_in_between(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let services = bench.services("buckets = 4096");
    // All that tables lie in is another.
    let options =
        [(20_000, 64, 1 << 18), (30_000, 200, 1 << 19)].map(|(flows, backends, buckets)| {
            sized(&bench, &format!("flows = {flows}, backends = {backends}, buckets = {buckets}"))
        });
    let mut agent = Agent::prepare(&bench.topology.balancer, &options[0], &services);
    agent.run();
    agent.wait_ready();
    for (round, point) in Failpoint::HANDOVER.iter().enumerate() {
        let when = format!("{test}, {}", point.name());
        agent.split(SHOP, "v2", "50%");
        let mut open = pool(&bench, 100 * round as u32);
        agent.stop(Signal::SIGTERM);
        agent.configure(&options[(round + 1) % 2], &services);
        assert!(killed_at(&mut agent, *point, &[]), "{when}");
        let report = panic(&agent, &[SHOP]);
        assert_eq!(report.by, "maps", "{when}: {report:?}");
        assert_all_on_control(&bench, &agent, &when);
        open.assert_where_they_were(&when);
        agent.run();
        assert_shown(&agent.wait_ready(), 0);
        assert_all_on_control(&bench, &agent, &format!("{when}, started"));
        open.assert_where_they_were(&format!("{when}, started"));
        assert_one_set(&agent, &when);
    }
}

#[test]
fn a_panic_while_maps_are_handed_over_is_in_force_in_nat() {
    panic_in_between("a_panic_while_maps_are_handed_over_is_in_force_in_nat", Way::NatTwoArmed);
}

#[test]
fn a_panic_while_maps_are_handed_over_is_in_force_in_dsr() {
    panic_in_between("a_panic_while_maps_are_handed_over_is_in_force_in_dsr", Way::Dsr);
}

/// The same beside an agent that is at it.
#[test]
fn a_panic_beside_a_handover_is_kept() {
    let test = "a_panic_beside_a_handover_is_kept";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let services = bench.services("buckets = 4096");
    let options = [1 << 18, 1 << 19]
        .map(|buckets| sized(&bench, &format!("flows = {}, buckets = {buckets}", buckets / 10)));
    let mut agent = Agent::prepare(&bench.topology.balancer, &options[0], &services);
    agent.run();
    agent.wait_ready();
    for round in 0..12 {
        let when = format!("{test}, {round}");
        agent.split(SHOP, "v2", "50%");
        agent.stop(Signal::SIGTERM);
        agent.configure(&options[(round + 1) % 2], &services);
        agent.run();
        wait::pause_until(Instant::now() + Duration::from_millis(15 * round as u64));
        let report = panic(&agent, &[SHOP]);
        assert!(report.applied, "{when}: {report:?}");
        wait::until("the panic to be the agent's", || {
            let status = agent.ready_now()?;
            service(&status, SHOP).panic.as_ref().map(drop).ok_or("it is not".to_owned())
        });
        assert_all_on_control(&bench, &agent, &when);
    }
}

/// Alternates between two layouts, the agent being killed at each step of it.
fn another_layout(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let mut agent = bench.agent("buckets = 4096");
    let nat = way != Way::Dsr;
    let mut up = 0;
    let mut down = 0;
    for (round, point) in Failpoint::HANDOVER.iter().enumerate() {
        let when = format!("{test}, {}", point.name());
        let first = 1_000 + 400 * round as u32;
        let mut untracked = pool(&bench, first + 300);
        // To the newer one, which reads this one.
        agent.split(SHOP, "v2", if round % 2 == 0 { "50%" } else { "30%" });
        let mut tracked = pool(&bench, first);
        let before = agent.status();
        agent.stop(Signal::SIGTERM);
        agent.upgrade(NEXT);
        up += u32::from(killed_at(&mut agent, *point, &[]));
        let mut meanwhile = pool(&bench, first + 100);
        agent.run();
        let status = agent.wait_ready();
        assert_one_set(&agent, &when);
        for pool in [&mut untracked, &mut tracked, &mut meanwhile] {
            pool.assert_where_they_were(&format!("{when}, upgraded"));
        }
        assert_ne!(status.agent.abi_version, before.agent.abi_version, "{when}");
        assert!(packets(&status) >= packets(&before), "{when}: counters go back");
        assert_eq!(settled_splits(&status), settled_splits(&before), "{when}");
        let told = told(&agent, "maps");
        assert!(told.contains("carried over") || told.contains("completed"), "{when}: {told}");

        // Those of buckets that the split has not moved.
        untracked.open.retain(|(connection, _)| {
            let from = connection.local_addr().expect("an address").to_string();
            let explained: Explain = agent.json(&["explain", SHOP, "--from", &from]);
            !explained.tracked
        });
        assert!(!untracked.open.is_empty(), "{when}");

        // Back: refused, and nothing is changed by that.
        let newer = agent.status();
        agent.stop(Signal::SIGTERM);
        agent.upgrade(THIS);
        agent.run();
        let end = wait::until("the end of the agent", || agent.ended().ok_or("it runs".to_owned()));
        assert_eq!(end.code(), Some(1), "{when}");
        agent.stop(Signal::SIGTERM);
        let log = agent.log();
        assert!(log.contains("of a newer release") && log.contains("--rebuild"), "{when}: {log}");
        for pool in [&mut untracked, &mut tracked, &mut meanwhile] {
            pool.assert_where_they_were(&format!("{when}, back refused"));
        }
        // Told to, from what is stored.
        down += u32::from(killed_at(&mut agent, *point, &["--rebuild"]));
        if !nat {
            untracked.assert_where_they_were(&format!("{when}, back and killed"));
        }
        // With two interfaces on maps of which neither knows the other's flows, what is translated
        // on the way through both waits for the next start.
        let half = [Failpoint::FirstLinkSwitched, Failpoint::SetsSwitched].contains(point);
        if !(nat && half) {
            drop(pool(&bench, first + 200));
        }
        agent.run_with(|command| {
            command.arg("--rebuild");
        });
        let status = agent.wait_ready();
        assert_one_set(&agent, &when);
        assert_eq!(status.agent.abi_version, before.agent.abi_version, "{when}");
        assert_eq!(settled_splits(&status), settled_splits(&newer), "{when}");
        if !nat {
            untracked.assert_where_they_were(&format!("{when}, back"));
        }
        drop(pool(&bench, first + 350));
    }
    println!("{test}: killed on the way up at {up} steps, on the way back at {down}");
    // Flow tables stay where they are, so there is nothing to be copied.
    assert_eq!((up, down), (7, 7), "{test}");
}

fn settled_splits(status: &Status) -> Vec<(String, String, u32)> {
    let versions = status.services.iter().flat_map(|s| s.versions.iter().map(move |v| (s, v)));
    let one = |(s, v): (&canary_agent::api::model::ServiceStatus, &_)| {
        let v: &canary_agent::api::model::VersionStatus = v;
        (format!("{} {}", s.name, v.name), v.asked_text.clone(), v.buckets)
    };
    versions.map(one).collect()
}

#[test]
fn a_kill_at_each_step_to_another_layout_and_back_in_nat() {
    another_layout("a_kill_at_each_step_to_another_layout_and_back_in_nat", Way::NatTwoArmed);
}

#[test]
fn a_kill_at_each_step_to_another_layout_and_back_in_dsr() {
    another_layout("a_kill_at_each_step_to_another_layout_and_back_in_dsr", Way::Dsr);
}

/// Goes from one to the next under held connections and new ones, and asserts that nobody has
/// noticed. `change` prepares a start.
fn under_load(
    test: &str,
    way: Way,
    times: u32,
    options: &AgentOptions,
    bench: &Bench,
    mut change: impl FnMut(&mut Agent<'_>, &str, u32),
) {
    assert_eq!(bench.way, way);
    let services = bench.services("");
    let mut agent = Agent::prepare(&bench.topology.balancer, options, &services);
    agent.run();
    agent.wait_ready();
    agent.split(SHOP, "v2", "40%");
    bench.wait_answered();
    let hold = Hold::start(bench.client(), &bench.servers, 1);
    let mut next = 0;
    for (kind, count) in HELD {
        for number in 0..*count {
            let family = Family::ALL[(number % 2) as usize];
            hold.open(*kind, family, family.client(next));
            next += 1;
        }
    }
    hold.wait_opened();
    agent.split(SHOP, "v2", "60%");
    let arrivals = Fresh::some().start(bench);
    let mut took = Vec::new();
    let mut before = agent.status();
    for number in 0..times {
        let signal = if number % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL };
        let interface = bench.topology.interfaces()[0];
        let program = bench.topology.balancer.run(|| datapath::program_on(interface));
        agent.stop(signal);
        change(&mut agent, &services, number);
        let begun = Instant::now();
        agent.run();
        let status = agent.wait_ready();
        took.push(begun.elapsed());
        let replaced = bench.topology.balancer.run(|| datapath::program_on(interface));
        assert_ne!(replaced.expect("a program"), program.expect("a program"), "{test}");
        assert!(packets(&status) >= packets(&before), "{test}: counters go back");
        assert_eq!(version(&status, SHOP, "v2").asked_text, "60%", "{test}");
        before = status;
    }
    let arrivals = arrivals.finish();
    let failed = fresh::failures(&arrivals);
    let made = arrivals.len() - failed.len();
    let unmeasured = hold.unmeasured();
    let records = hold.finish();
    let faults: Vec<_> = records.iter().filter(|record| !record.faults.is_empty()).collect();
    let longest = records.iter().map(|record| record.longest).max().unwrap_or_default();
    took.sort();
    println!(
        "{test}: {times} times, {:.1?} each until ready (median); {} connections held, {} with faults, \
         longest wait {longest:.1?}; {made} new ones, {} failed; {:.2} % not measurable",
        took[took.len() / 2],
        records.len(),
        faults.len(),
        failed.len(),
        unmeasured * 100.0,
    );
    assert!(faults.is_empty(), "{test}: {faults:#?}");
    assert!(failed.is_empty(), "{test}: {failed:#?}");
    assert!(made > 100, "{test}: {made} new connections");
    assert!(
        unmeasured < UNMEASURED_MAX,
        "{test}: not measurable: run it again when less runs here"
    );
}

fn another_build(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    under_load(test, way, 20, &options, &bench, |_, _, _| {});
}

#[test]
fn twenty_upgrades_of_one_layout_are_not_noticed_in_nat() {
    another_build("twenty_upgrades_of_one_layout_are_not_noticed_in_nat", Way::NatTwoArmed);
}

#[test]
fn twenty_upgrades_of_one_layout_are_not_noticed_in_dsr() {
    another_build("twenty_upgrades_of_one_layout_are_not_noticed_in_dsr", Way::Dsr);
}

fn capacities(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    let all = ["flows = 50000", "flows = 100000", "flows = 100000, backends = 2000, vips = 200"]
        .map(|capacity| sized(&bench, capacity));
    under_load(test, way, 9, &all[0], &bench, |agent, services, number| {
        agent.configure(&all[(number as usize + 1) % all.len()], services);
    });
}

#[test]
fn other_capacities_are_not_noticed_in_nat() {
    capacities("other_capacities_are_not_noticed_in_nat", Way::NatTwoArmed);
}

#[test]
fn other_capacities_are_not_noticed_in_dsr() {
    capacities("other_capacities_are_not_noticed_in_dsr", Way::Dsr);
}

/// With `CANARY_LONG`, a million flows; the time is what a release build takes.
#[test]
fn a_table_full_of_flows_is_carried_over_and_nobody_notices() {
    let test = "a_table_full_of_flows_is_carried_over_and_nobody_notices";
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let flows = if std::env::var_os("CANARY_LONG").is_some() { 1_000_000 } else { 50_000 };
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 3), ("v2", 2)]);
    let sizes = [flows + 100_000, flows + 200_000];
    let all = sizes.map(|flows| sized(&bench, &format!("flows = {flows}")));
    under_load(test, bench.way, 3, &all[0], &bench, |agent, services, number| {
        if number == 0 {
            fill_flows(agent, flows);
        } else {
            let log = agent.log();
            let copied = log.lines().rfind(|line| line.contains("flow entries copied"));
            let copied = copied.unwrap_or_else(|| panic!("{log}"));
            println!("{test}: {copied}");
            for line in log.lines().filter(|line| line.contains("have been carried over")) {
                println!("{test}: {line}");
            }
            assert!(!copied.contains("no room"), "{copied}");
            let pins = agent.folder().join("bpffs/canary");
            let table: Flows<FlowKeyV4> = Flows::open(&pins, "FLOWS_V4").expect("the table");
            for n in [0, flows / 2, flows - 1] {
                let (src_be, protocol) = (n, 6);
                let key = FlowKeyV4 { src_be, dst_be: 1, ports: PortPair::new(1, 1), protocol };
                let flow = table.get(&key).expect("a table").expect("a flow that was carried over");
                assert_eq!(flow.syn_seq, n);
            }
        }
        agent.configure(&all[(number as usize + 1) % all.len()], services);
    });
}

#[test]
fn a_capacity_that_is_in_use_is_refused_and_nothing_changes() {
    let test = "a_capacity_that_is_in_use_is_refused_and_nothing_changes";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)]);
    let services = bench.services("buckets = 4096");
    let options = sized(&bench, "flows = 20000");
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    agent.run();
    agent.wait_ready();
    let mut open = pool(&bench, 0);
    let before = settled(&agent.status());
    agent.stop(Signal::SIGTERM);
    agent.configure(&sized(&bench, "flows = 16"), &services);
    agent.run();
    let end = wait::until_within(Duration::from_secs(30), "the end of the agent", || {
        agent.ended().ok_or("it runs".to_owned())
    });
    assert_eq!(end.code(), Some(1));
    agent.stop(Signal::SIGTERM);
    let log = agent.log();
    assert!(log.contains("agent.capacity.flows") && log.contains("too small"), "{log}");
    assert_one_set(&agent, test);
    open.assert_where_they_were(test);
    agent.configure(&options, &services);
    agent.run();
    assert_eq!(settled(&agent.wait_ready()), before);
    open.assert_where_they_were(test);
}

/// Writes into a state file that nobody has open which schema it has.
fn say_schema(agent: &Agent<'_>, schema: u32) {
    /// Where an SQLite file has its `user_version` (the file format's header, 1.3).
    const USER_VERSION: u64 = 60;
    let path = agent.folder().join("state/state.db");
    assert!(!path.with_extension("db-wal").exists(), "the agent has closed it");
    let file = fs::OpenOptions::new().write(true).open(path).expect("the state");
    file.write_all_at(&schema.to_be_bytes(), USER_VERSION).expect("written");
}

#[test]
fn a_state_of_a_newer_release_is_refused_before_anything_pinned_is_touched() {
    let test = "a_state_of_a_newer_release_is_refused_before_anything_pinned_is_touched";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)]);
    let services = bench.services("buckets = 4096");
    let mut agent =
        Agent::prepare(&bench.topology.balancer, &sized(&bench, "flows = 20000"), &services);
    agent.run();
    agent.wait_ready();
    agent.split(SHOP, "v2", "40%");
    let before = settled(&agent.status());
    let mut open = pool(&bench, 0);
    agent.stop(Signal::SIGTERM);
    let file = agent.folder().join("state/state.db");
    let stored = fs::read(&file).expect("the state");
    say_schema(&agent, 9_999);
    let newer = fs::read(&file).expect("the state");
    // Other sizes, which a start would put in force.
    agent.configure(&sized(&bench, "flows = 30000"), &services);
    let interface = bench.topology.interfaces()[0];
    let program = || bench.topology.balancer.run(|| datapath::program_on(interface)).expect("one");
    let attached = program();
    for args in [&[][..], &["--rebuild"]] {
        agent.run_with(|command| {
            command.args(args);
        });
        let end = wait::until("the end of the agent", || agent.ended().ok_or("it runs".to_owned()));
        assert_eq!(end.code(), Some(1), "{args:?}");
        agent.stop(Signal::SIGTERM);
        assert!(agent.log().contains("has schema 9999"), "{args:?}: {}", agent.log());
        assert_eq!(program(), attached, "{args:?}");
        assert_eq!(fs::read(&file).expect("the state"), newer, "{args:?}");
        assert_one_set(&agent, test);
    }
    open.assert_where_they_were(test);
    fs::write(&file, stored).expect("the state");
    agent.run();
    let status = agent.wait_ready();
    assert_eq!(settled(&status), before);
    assert_sizes(&status, "FLOWS_V4", 30_000, test);
    open.assert_where_they_were(test);
}
