//! The agent as a service manager runs it: what it is told, and how little the agent may do.

use std::{
    fs,
    os::unix::{fs::chown, net::UnixDatagram},
    path::Path,
    time::{Duration, Instant},
};

use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    server::HTTP_PORT,
    topology::Family,
    unprivileged::{self, CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, CAP_PERFMON},
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use crate::support::{Bench, SHOP, Way};

/// How often the agent has to say that it is alive, microseconds.
const WATCHDOG_USEC: u64 = 400_000;

/// The user that the agent is; nobody has files of theirs.
const USER: u32 = 54_321;

/// What the unit file grants.
const CAPABILITIES: &[u8] = &[CAP_NET_ADMIN, CAP_NET_RAW, CAP_PERFMON, CAP_BPF];

/// The service manager's end of `NOTIFY_SOCKET`.
struct Manager {
    socket: UnixDatagram,
    seen: Vec<(Instant, String)>,
}

impl Manager {
    fn bind(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
        Self { socket, seen: Vec::new() }
    }

    /// Takes in what has come.
    fn hear(&mut self) {
        let mut bytes = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut bytes) {
            let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
            self.seen.push((Instant::now(), text));
        }
    }

    /// Waits until `line` has been said so many times after the first `from` messages.
    #[track_caller]
    fn wait_for(&mut self, line: &str, from: usize, times: usize) {
        wait::until(line, || {
            self.hear();
            let said = self.count(line, from);
            (said >= times).then_some(()).ok_or_else(|| format!("{:?}", &self.seen[from..]))
        });
    }

    fn count(&self, line: &str, from: usize) -> usize {
        let says = |(_, text): &&(Instant, String)| text.lines().any(|one| one == line);
        self.seen[from..].iter().filter(says).count()
    }
}

fn monotonic_usec() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a clock");
    now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1_000
}

#[test]
fn a_service_manager_hears_of_every_state() {
    if !host::ready("a_service_manager_hears_of_every_state") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)]);
    let balancer = &bench.topology.balancer;
    balancer.ip("link set eth0 name later0");
    let options = AgentOptions {
        interfaces: vec!["eth0".to_owned()],
        ..AgentOptions::native(&bench.topology)
    };
    let mut agent = Agent::prepare(balancer, &options, &bench.services(""));
    let path = agent.folder().join("notify");
    let mut manager = Manager::bind(&path);
    agent.run_with(|command| {
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", WATCHDOG_USEC.to_string());
    });
    // There is nothing to steer on, and so it is not ready.
    manager.wait_for("STATUS=waiting for an interface to steer on", 0, 1);
    assert_eq!(manager.count("READY=1", 0), 0, "{:?}", manager.seen);
    assert_eq!(agent.status().services.len(), 2, "though it answers");
    balancer.ip("link set later0 down\nlink set later0 name eth0\nlink set eth0 up");
    manager.wait_for("READY=1", 0, 1);
    let steered = agent.status().interfaces.iter().all(|one| one.mode.is_some());
    assert!(steered, "ready means that traffic is steered");
    assert_eq!(manager.count("STATUS=steering 2 services", 0), 1, "{:?}", manager.seen);

    let from = manager.seen.len();
    manager.wait_for("WATCHDOG=1", from, 5);
    let beats: Vec<Instant> = manager.seen[from..]
        .iter()
        .filter(|(_, text)| text.contains("WATCHDOG=1"))
        .map(|(at, _)| *at)
        .collect();
    let span = beats[4].duration_since(beats[0]);
    assert!(span >= Duration::from_micros(WATCHDOG_USEC / 2 * 3), "{span:?}: not that often");

    let from = manager.seen.len();
    let pid = Pid::from_raw(i32::try_from(agent.pid().expect("it runs")).expect("an id"));
    let before = monotonic_usec();
    agent.configure(&options, &bench.service(SHOP, HTTP_PORT, &["tcp"], "drain = \"5m\""));
    kill(pid, Signal::SIGHUP).expect("a signal");
    manager.wait_for("READY=1", from, 1);
    let begun = manager.seen[from..].iter().find(|(_, text)| text.contains("RELOADING=1"));
    let begun = &begun.expect("a reload is told").1;
    let at = begun.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
    let at: u64 = at.expect("when it began").parse().expect("a number");
    assert!((before..=monotonic_usec()).contains(&at), "{before} {at}");
    manager.wait_for("STATUS=steering 1 service", from, 1);
    assert_eq!(agent.status().services.len(), 1);

    let from = manager.seen.len();
    fs::write(agent.config(), "nonsense").expect("written");
    kill(pid, Signal::SIGHUP).expect("a signal");
    manager.wait_for("READY=1", from, 1);
    let refused =
        |(_, text): &(Instant, String)| text.starts_with("STATUS=the last reload was refused");
    assert!(manager.seen[from..].iter().any(refused), "{:?}", &manager.seen[from..]);

    let from = manager.seen.len();
    agent.stop(Signal::SIGTERM);
    manager.wait_for("STOPPING=1", from, 1);
}

/// While the kernel looks at a program, a signal, or that the process is stopped and goes on, makes it
/// give up (`EAGAIN`).
#[test]
fn an_agent_that_is_stopped_in_its_start_goes_on() {
    /// As many as an agent puts up with if all of them meet one program.
    const STOPS: u32 = 9;
    if !host::ready("an_agent_that_is_stopped_in_its_start_goes_on") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 1)]);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &bench.services(""));
    let maps = agent.folder().join("bpffs/canary/maps");
    agent.run();
    let pid = Pid::from_raw(i32::try_from(agent.pid().expect("it runs")).expect("an id"));
    wait::until("the maps", || maps.exists().then_some(()).ok_or_else(|| agent.log()));
    for _ in 0..STOPS {
        kill(pid, Signal::SIGSTOP).expect("a signal");
        kill(pid, Signal::SIGCONT).expect("a signal");
        // Less than the kernel looks at the largest program.
        wait::pause_until(Instant::now() + Duration::from_millis(25));
    }
    agent.wait_ready();
    bench.wait_answered();
}

/// A line of the packaged unit.
fn unit(key: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/canary-agent.service");
    let text = fs::read_to_string(path).expect("the unit");
    let start = format!("{key}=");
    let line = text.lines().filter_map(|line| line.strip_prefix(&start)).next_back();
    line.unwrap_or_else(|| panic!("no {key} in the unit")).to_owned()
}

#[test]
fn the_unit_grants_what_is_tried_here_and_no_more() {
    let names = [
        (CAP_NET_ADMIN, "CAP_NET_ADMIN"),
        (CAP_NET_RAW, "CAP_NET_RAW"),
        (CAP_PERFMON, "CAP_PERFMON"),
        (CAP_BPF, "CAP_BPF"),
    ];
    let granted = CAPABILITIES.iter().map(|one| {
        names.iter().find(|(number, _)| number == one).expect("a capability that has a name").1
    });
    let granted = granted.collect::<Vec<_>>().join(" ");
    assert_eq!(unit("AmbientCapabilities"), granted);
    assert_eq!(unit("CapabilityBoundingSet"), granted);
    assert_eq!(unit("NoNewPrivileges"), "yes");
    assert_eq!(unit("Type"), "notify-reload");
}

#[track_caller]
fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 1)]);
    let options = AgentOptions::native(&bench.topology);
    let keys = if way == Way::Dsr { "via = \"vip\"" } else { "via = \"backend\"" };
    let health = format!("health = {{ type = \"tcp\", interval = \"200ms\", {keys} }}");
    let services = bench.service_with(&Family::ALL, SHOP, HTTP_PORT, &["tcp"], &health);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    // What the unit's RuntimeDirectory=, StateDirectory= and tmpfiles.d give it.
    let pins = agent.folder().join("bpffs/canary");
    fs::create_dir(&pins).expect("a folder");
    for folder in [agent.folder(), &pins] {
        chown(folder, Some(USER), Some(USER)).expect("an owner");
    }
    for start in 0..2 {
        agent.run_with(|command| unprivileged::become_user(command, USER, CAPABILITIES));
        agent.wait_ready();
        bench.wait_answered();
        let pid = agent.pid().expect("it runs");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).expect("a field");
            line.split_whitespace().nth(1).expect("a value").to_owned()
        };
        assert_eq!(field("Uid:"), USER.to_string());
        assert_eq!(field("NoNewPrivs:"), "1");
        let mask = CAPABILITIES.iter().fold(0_u64, |mask, one| mask | 1 << one);
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16), Ok(mask), "{set}");
        }
        let mut pool = bench.connect(Family::V4, 0..10);
        pool.open.extend(bench.connect(Family::V6, 0..10).open);
        let (share, drain) = [("100%", "5m"), ("0", "7m")][start];
        agent.split(SHOP, "v2", share);
        agent.configure(
            &options,
            &services.replace(&health, &format!("{health}\ndrain = {drain:?}")),
        );
        let report: canary_agent::api::reload::ReloadReport = agent.json(&["reload"]);
        assert!(report.applied && report.differs, "{report:?}");
        pool.assert_where_they_were("as an ordinary user");
        wait::until("checks", || {
            let status = agent.status();
            let mut all = status.services[0].versions.iter().flat_map(|v| &v.backends);
            let passed = all.all(|b| b.check.as_ref().is_some_and(|check| check.passes > 0));
            passed.then_some(()).ok_or_else(|| format!("{status:#?}"))
        });
        let status = agent.status();
        assert!(status.alerts.is_empty(), "{:?}", status.alerts);
        // A restart adopts what such an agent has pinned.
        agent.stop(Signal::SIGTERM);
        pool.assert_where_they_were("without the agent");
    }
}

#[test]
fn an_ordinary_user_with_a_few_capabilities_steers_in_nat() {
    exercise("an_ordinary_user_with_a_few_capabilities_steers_in_nat", Way::NatTwoArmed);
}

#[test]
fn an_ordinary_user_with_a_few_capabilities_steers_in_dsr() {
    exercise("an_ordinary_user_with_a_few_capabilities_steers_in_dsr", Way::Dsr);
}
