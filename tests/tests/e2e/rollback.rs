//! From a verdict to the tables, whatever is in the way: hooks that hang, a Prometheus that does
//! not answer, a disk that is full, an agent that has just begun.

use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use canary_agent::api::rollout::{RolloutReport, RolloutStatus, Rollouts};
use canary_ebpf_common::entry::{BackendIndex, Entry};
use canary_tests::{
    agent::{Agent, AgentOptions},
    caller::Called,
    host,
    lacking::Mounts,
    server::HTTP_PORT,
    tables::{Place, Tables},
    topology::Family,
    wait,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, SHOP, Way, alone};

const NAME: &str = "shop-v2";

/// Room for the state: what all rounds store, and the 4 MiB that SQLite's log grows to before it is
/// written back.
const ROOM: u64 = 16 << 20;

/// What is in the way, beside hooks, Prometheus and a command that never answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// Nothing else.
    Silence,
    /// Nothing can be stored.
    FullDisk,
    /// The agent has just begun.
    Start,
}

/// One answer of the judge is the verdict. Whoever else is asked, and the hook, never answers.
fn rollout(judge: &Called, silent: &Called) -> String {
    let (judge, silent) = (judge.url(), silent.url());
    format!(
        "[[gate]]\nname = \"asked\"\nmin_duration = \"50m\"\nsignals = [\n\
         {{ webhook = \"{judge}/judge\", interval = \"100ms\", timeout = \"1s\", retries = 0, fall = 1 }},\n\
         {{ prometheus = {silent:?}, query = \"up\", above = 1, interval = \"100ms\", timeout = \"1m\" }},\n\
         {{ command = [\"/bin/sleep\", \"600\"], interval = \"100ms\", timeout = \"1m\" }}]\n\
         [[rollout]]\nname = {NAME:?}\nservice = {SHOP:?}\nto = \"v2\"\n\
         steps = [{{ split = \"50%\", gate = \"asked\" }}, {{ split = \"100%\" }}]\n\
         hooks = {{ event = \"{silent}/events\", timeout = \"1m\" }}\n"
    )
}

#[track_caller]
fn state(agent: &Agent<'_>) -> RolloutStatus {
    agent.json::<Rollouts>(&["rollout", "status", NAME]).rollouts.remove(0)
}

/// Both tables of the service, as the program reads them.
struct Seen {
    tables: Tables,
    places: Vec<Place>,
    /// Backends of the version.
    of_v2: BTreeSet<u16>,
}

impl Seen {
    /// While the version has a share.
    #[track_caller]
    fn open(agent: &Agent<'_>) -> Self {
        let tables = Tables::open(&agent.folder().join("bpffs/canary"));
        let places: Vec<Place> = Family::ALL.map(|family| tables.place(SHOP, family)).into();
        let mut of_v2 = BTreeSet::new();
        for place in &places {
            let slot = place.versions.iter().position(|name| name == "v2").expect("a slot");
            let used: BTreeSet<u16> = currents(&tables, place).collect();
            let version = |index: &u16| tables.backend(BackendIndex::new(*index)).version;
            of_v2.extend(used.into_iter().filter(|index| usize::from(version(index)) == slot));
        }
        assert!(!of_v2.is_empty());
        Self { tables, places, of_v2 }
    }

    /// Waits until no bucket sends new connections to the version; when that was seen.
    #[track_caller]
    fn wait_gone(&self) -> Instant {
        let limit = Instant::now() + wait::patience();
        loop {
            let mut all = self.places.iter().flat_map(|place| currents(&self.tables, place));
            let has = all.any(|index| self.of_v2.contains(&index));
            let now = Instant::now();
            if !has {
                return now;
            }
            assert!(now < limit, "the share was not taken back");
            // Shorter than what is measured.
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The backends that a table's buckets send new connections to.
fn currents(tables: &Tables, place: &Place) -> impl Iterator<Item = u16> {
    tables.entries(place).into_iter().map(|bits| Entry(bits).current().get())
}

#[test]
fn a_verdict_is_in_the_tables_at_once_whatever_is_in_the_way() {
    let test = "a_verdict_is_in_the_tables_at_once_whatever_is_in_the_way";
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let rounds = if cfg!(debug_assertions) { 2 } else { 20 };
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 2)]);
    let judge = Called::start(&bench.topology.balancer, 200);
    let silent = Called::start(&bench.topology.balancer, 0);
    let services = bench.service(SHOP, HTTP_PORT, &["tcp"], "") + &rollout(&judge, &silent);
    let options = AgentOptions::native(&bench.topology);
    for trouble in [Trouble::Silence, Trouble::FullDisk, Trouble::Start] {
        let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
        let folder = agent.folder().join("state");
        fs::create_dir_all(&folder).expect("a folder");
        let small = |command: &mut Command| Mounts::default().small(&folder, ROOM).apply(command);
        match trouble {
            Trouble::FullDisk => agent.run_with(small),
            Trouble::Silence | Trouble::Start => agent.run(),
        }
        agent.wait_ready();
        let (mut seen, mut inside) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            judge.answer(200);
            let begun: RolloutReport = agent.json(&["rollout", "start", NAME]);
            assert!(begun.applied);
            wait::until("an answer", || {
                let status = state(&agent);
                let good = status.gate.as_ref().is_some_and(|gate| gate.probes[0].good > 0);
                if good { Ok(()) } else { Err(format!("{status:?}")) }
            });
            let tables = Seen::open(&agent);
            let pid = agent.pid().expect("it runs");
            let filler = PathBuf::from(format!("/proc/{pid}/root{}/filler", folder.display()));
            if trouble == Trouble::FullDisk {
                let full = fs::write(&filler, vec![1; ROOM as usize]).expect_err("it is full then");
                assert_eq!(full.kind(), ErrorKind::StorageFull);
            }
            if trouble == Trouble::Start {
                agent.stop(Signal::SIGKILL);
            }
            let before = judge.calls().len();
            judge.answer(417);
            if trouble == Trouble::Start {
                agent.run();
            }
            let gone = tables.wait_gone();
            // One that was answered just before the change was a good one.
            let mut calls = judge.calls().into_iter().skip(before);
            let verdict = calls.find(|call| call.status == 417).expect("the judge was asked");
            seen.push(gone.saturating_duration_since(verdict.answered));
            agent.wait_ready();
            wait::until("the end", || match state(&agent) {
                over if over.state == "aborted" => Ok(()),
                other => Err(format!("{other:?}")),
            });
            inside.push(agent.gave_back_within().expect("a time"));
            if trouble == Trouble::FullDisk {
                fs::remove_file(&filler).expect("a file");
                wait::until("what is owed to be stored", || {
                    let alerts = agent.status().alerts;
                    if alerts.is_empty() { Ok(()) } else { Err(format!("{alerts:?}")) }
                });
            }
        }
        seen.sort();
        inside.sort();
        let (middle, last) = (rounds / 2, rounds - 1);
        println!(
            "{test}: {trouble:?}: from the answer to the tables {:.1?} (most {:.1?}), of it from the verdict {:.1?} (most {:.1?})",
            seen[middle], seen[last], inside[middle], inside[last]
        );
        // Unoptimised builds promise nothing.
        let bound = Duration::from_millis(100);
        assert!(cfg!(debug_assertions) || seen[middle] < bound, "{trouble:?}: {seen:?}");
    }
}
