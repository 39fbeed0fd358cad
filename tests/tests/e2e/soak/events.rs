//! What happens to the agent, and what must hold after each of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use canary_agent::api::{
    model::{BackendStatus, ErrorBody, Status},
    reload::ReloadReport,
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    binary,
    control::Control,
    lacking::Mounts,
    model::Random,
    server::{ECHO_PORT, HTTP_PORT},
    topology::Family,
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{CLIENTS, FIRST_CLIENT, SmallDisk, Splits};
use crate::{
    sound::assert_sound,
    support::{Bench, ECHO, SHOP, version},
};

/// An event: how often it happens in the short run and in the whole one, what it is called, and
/// what it does. When it returns an agent is up, whose split has settled.
type Event = (usize, usize, &'static str, fn(&mut Soak<'_>));

/// Whoever adds one finds everything checked after it.
const EVENTS: &[Event] = &[
    (2, 100, "kills", |soak| soak.kill()),
    (2, 20, "upgrades", |soak| soak.upgrade()),
    (2, 100, "reloads", |soak| soak.reload()),
    (1, 1, "stops", |soak| soak.stop()),
    (1, 5, "full disks", |soak| soak.fill_disk()),
    (1, 5, "read-only disks", |soak| soak.forbid_writing()),
    (1, 5, "deleted states", |soak| soak.delete_state()),
    (1, 5, "damaged states", |soak| soak.damage_state()),
];

/// For how long the agent is stopped in the whole run.
const STOPPED: Duration = Duration::from_secs(10);
/// The same in the short one.
const STOPPED_SHORTLY: Duration = Duration::from_secs(2);

/// How long into a change a kill may come: longer than most take.
const INTO_CHANGE_MAX: Duration = Duration::from_millis(6);
/// Longest time that nobody runs after a kill.
const DEAD_MAX: Duration = Duration::from_millis(300);

/// Packets, bytes and connections.
type Counts = [u64; 3];

/// The run's means and where it stands.
pub(super) struct Soak<'a> {
    bench: &'a Bench,
    agent: Agent<'a>,
    /// The builds that it is upgraded between: the one that runs first.
    builds: [PathBuf; 2],
    disk: &'a SmallDisk,
    random: Random,
    pub(super) splits: Splits,
    /// What was asked last of the shop's `v2`, percent.
    asked: u64,
    /// By service, version and backend, what was counted at the last look.
    counted: BTreeMap<(String, String, String), Counts>,
    stopped: Duration,
}

/// Both services, each with other weights and settings at each call, none of which moves a
/// bucket from one version to another.
pub(super) fn services(bench: &Bench, random: &mut Random) -> String {
    let drain = random.one_of(&["30m", "20m", "never"]);
    let weights: Vec<u32> =
        bench.topology.backends.iter().map(|_| 1 + random.below(3) as u32).collect();
    let weight = |host: &canary_tests::topology::Host| {
        let at = bench.topology.backends.iter().position(|one| one.name == host.name)?;
        Some(weights[at])
    };
    let keys = format!(
        "health = {{ type = \"none\" }}\nbuckets = 4096\nstickiness = \"client\"\ndrain = {drain:?}"
    );
    let all = &Family::ALL;
    bench.weighted_service(all, SHOP, HTTP_PORT, &["tcp"], &keys, weight)
        + &bench.weighted_service(all, ECHO, ECHO_PORT, &["tcp", "udp"], &keys, weight)
}

/// The build that is tested, and another one. Where no other was built, the short run goes between
/// two copies of this one.
#[track_caller]
fn builds(agent: &Agent<'_>) -> [PathBuf; 2] {
    let other = binary::other_agent().unwrap_or_else(|| {
        assert!(
            !super::long(),
            "upgrades need another build: `cargo build -p canary-agent` with and without `--release`, or name \
             one in CANARY_OTHER_AGENT"
        );
        let copy = agent.folder().join("canary-agent");
        fs::copy(agent.binary(), &copy).expect("a copy of the program");
        copy
    });
    [agent.binary().to_owned(), other]
}

/// With room for every connection of the whole run: none may be forgotten for want of it.
pub(super) fn options(bench: &Bench) -> AgentOptions {
    let extra = "capacity = { flows = 400000 }".to_owned();
    AgentOptions { extra, ..AgentOptions::native(&bench.topology) }
}

impl<'a> Soak<'a> {
    /// Starts the agent, and makes a first split.
    #[track_caller]
    pub(super) fn start(
        bench: &'a Bench,
        mut agent: Agent<'a>,
        disk: &'a SmallDisk,
        random: Random,
    ) -> Self {
        agent.run();
        agent.wait_ready();
        agent.split(SHOP, "v2", "40%");
        agent.split(ECHO, "v2", "60%");
        let splits = Splits::begin(&agent, FIRST_CLIENT..FIRST_CLIENT + CLIENTS);
        let builds = builds(&agent);
        let mut soak = Self {
            bench,
            agent,
            builds,
            disk,
            random,
            splits,
            asked: 40,
            counted: BTreeMap::new(),
            stopped: STOPPED_SHORTLY,
        };
        soak.look("at the start");
        soak
    }

    /// Lets everything happen in random order, with a split before each event and a look after
    /// it. Says how often what happened.
    #[track_caller]
    pub(super) fn run(&mut self, whole: bool) -> String {
        if whole {
            self.stopped = STOPPED;
        }
        let often = |event: &Event| if whole { event.1 } else { event.0 };
        let mut left: Vec<&Event> =
            EVENTS.iter().flat_map(|event| std::iter::repeat_n(event, often(event))).collect();
        let mut number = 0;
        while !left.is_empty() {
            let (.., name, happen) =
                left.swap_remove(self.random.below(left.len() as u64) as usize);
            self.split();
            happen(self);
            number += 1;
            self.look(&format!("after event {number}, of the {name}"));
        }
        let counts = EVENTS.iter().map(|event| format!("{} {}", often(event), event.2));
        counts.collect::<Vec<_>>().join(", ")
    }

    /// What must hold: store, maps, status and audit trail say the same split, which is the one
    /// that was asked, and nothing that is counted has become less.
    #[track_caller]
    fn look(&mut self, when: &str) {
        let status = self.agent.wait_ready();
        assert_eq!(version(&status, SHOP, "v2").asked_text, percent(self.asked), "{when}");
        assert_eq!(version(&status, ECHO, "v2").asked_text, "60%", "{when}");
        assert_sound(&self.agent, &status, when);
        self.splits.assert_unchanged(&self.agent, when);
        self.count(&status, when);
    }

    #[track_caller]
    fn count(&mut self, status: &Status, when: &str) {
        let mut seen = BTreeSet::new();
        for service in &status.services {
            for version in &service.versions {
                for BackendStatus { addr, packets, bytes, connections, .. } in &version.backends {
                    let key = (service.name.clone(), version.name.clone(), addr.to_string());
                    let now = [*packets, *bytes, *connections];
                    let before = self.counted.get(&key).copied().unwrap_or_default();
                    let less = before.iter().zip(now).any(|(before, now)| now < *before);
                    assert!(!less, "{when}: {key:?} has gone back from {before:?} to {now:?}");
                    self.counted.insert(key.clone(), now);
                    seen.insert(key);
                }
            }
        }
        assert_eq!(seen.len(), self.counted.len(), "{when}: backends are missing in the status");
    }

    /// A share that is another than the present one.
    fn draw(&mut self) -> u64 {
        (self.asked + 1 + self.random.below(100)) % 101
    }

    fn split(&mut self) {
        let (from, share) = (Instant::now(), self.draw());
        self.agent.split(SHOP, "v2", &percent(share));
        self.asked = share;
        self.splits.settled(&self.agent, from);
    }

    /// Asserts that a split is refused because it can't be stored.
    #[track_caller]
    fn assert_refused(&mut self) {
        let share = percent(self.draw());
        let output = self.agent.cli(&["split", SHOP, &format!("v2={share}"), "--json"]);
        assert_eq!(output.code, 1, "{output:?}");
        let error = output.json::<ErrorBody>().error;
        assert_eq!(error.code, "state_not_stored", "{error:?}");
        self.splits.assert_unchanged(&self.agent, "after a refusal");
    }

    fn begin_again(&mut self) {
        wait::pause_until(Instant::now() + self.random.between(Duration::ZERO, DEAD_MAX));
        self.agent.run();
        self.agent.wait_ready();
    }

    /// Killed, every second time in the middle of a split; then the split is the one before or
    /// the one asked for.
    fn kill(&mut self) {
        if self.random.below(2) == 0 {
            self.agent.stop(Signal::SIGKILL);
            self.begin_again();
            return;
        }
        let (from, share) = (Instant::now(), self.draw());
        let body = format!("{{\"split\": {{\"v2\": \"{share}%\"}}}}");
        let mut control = Control::open(&self.agent.socket()).expect("the socket");
        let delay = self.random.between(Duration::ZERO, INTO_CHANGE_MAX);
        let answer = std::thread::scope(|scope| {
            let target = format!("/v1/services/{SHOP}/split");
            let asker = scope.spawn(move || control.ask("PUT", &target, body.as_bytes()));
            std::thread::sleep(delay);
            self.agent.stop(Signal::SIGKILL);
            asker.join().expect("the asker")
        });
        self.begin_again();
        let now = version(&self.agent.status(), SHOP, "v2").asked_text.clone();
        if answer.is_ok_and(|answer| answer.status == 200) || now == percent(share) {
            self.asked = share;
        }
        self.splits.settled(&self.agent, from);
    }

    /// Ended as a service manager does it, and started as another build: there and back.
    fn upgrade(&mut self) {
        let before = self.running();
        self.agent.stop(Signal::SIGTERM);
        self.builds.reverse();
        self.agent.upgrade_to(&self.builds[0]);
        self.begin_again();
        let after = self.running();
        assert_eq!(after, fs::canonicalize(&self.builds[0]).expect("the program"));
        assert_ne!(before, after, "it is the same build");
    }

    /// The program that runs.
    fn running(&self) -> PathBuf {
        let pid = self.agent.pid().expect("it runs");
        fs::read_link(format!("/proc/{pid}/exe")).expect("a program")
    }

    /// Another configuration, by the command or by a signal.
    fn reload(&mut self) {
        self.agent.configure(&options(self.bench), &services(self.bench, &mut self.random));
        if self.random.below(5) > 0 {
            let report: ReloadReport = self.agent.json(&["reload"]);
            assert!(report.applied, "{report:?}");
            return;
        }
        let done =
            |agent: &Agent<'_>| agent.log().matches("the configuration has been reloaded").count();
        let before = done(&self.agent);
        self.signal(Signal::SIGHUP);
        wait::until("a reload by SIGHUP", || {
            (done(&self.agent) > before).then_some(()).ok_or_else(|| "not yet".to_owned())
        });
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.agent.pid().expect("it runs")).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("a signal");
    }

    /// Stopped for a while, as by a debugger.
    fn stop(&mut self) {
        self.signal(Signal::SIGSTOP);
        wait::pause_until(Instant::now() + self.stopped);
        self.signal(Signal::SIGCONT);
    }

    fn fill_disk(&mut self) {
        self.disk.fill();
        self.assert_refused();
        self.disk.clear();
        self.split();
    }

    fn forbid_writing(&mut self) {
        self.agent.stop(Signal::SIGKILL);
        let state = self.disk.path();
        self.agent.run_with(|command| Mounts::default().read_only(state).apply(command));
        self.agent.wait_ready();
        self.assert_refused();
        self.agent.stop(Signal::SIGKILL);
        self.begin_again();
    }

    /// The state's files are deleted under a running agent, which goes on with what is in force
    /// and so does the next.
    fn delete_state(&mut self) {
        for file in self.disk.state() {
            // There is no log where nothing has been written since the last start.
            let _ = fs::remove_file(file);
        }
        self.split();
        self.agent.stop(Signal::SIGKILL);
        self.begin_again();
    }

    fn damage_state(&mut self) {
        for file in &self.disk.state()[..2] {
            fs::write(file, "no database").expect("damage");
        }
        self.split();
        self.agent.stop(Signal::SIGKILL);
        self.begin_again();
    }
}

fn percent(share: u64) -> String {
    format!("{share}%")
}
