//! Everything to control: with the agent alive, stopped and gone, and with whoever does it
//! killed on the way. New connections go to control and nowhere else, open ones stay, nothing
//! comes back when the agent goes on, and the audit trail knows who it was.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    process::Stdio,
    time::{Duration, Instant},
};

use canary_agent::{
    api::{
        model::{ErrorBody, Event, Events, Status},
        panic::PanicReport,
    },
    failpoint::{self, Failpoint},
};
use canary_ebpf_common::{abi::PAGE_BUCKETS, entry::Entry};
use canary_tests::{
    agent::{Agent, AgentOptions},
    bpf,
    control::Control,
    host,
    server::HTTP_PORT,
    spawn,
    tables::Tables,
    topology::Family,
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::support::{Bench, ECHO, Pool, SHOP, Way, alone, service, version};

/// Clients that ask after it, of each family.
const CLIENTS: std::ops::Range<u32> = 2_000..2_040;

/// Longer than an agent that is alive takes, here and on any machine.
const ALIVE: &[&str] = &["--agent-timeout", "20s"];

pub(crate) fn panic(agent: &Agent<'_>, args: &[&str]) -> PanicReport {
    agent.json(&[&["panic", "--reason", "v2 is bad"], args].concat())
}

/// What an agent does not do any more: steer new connections to the canary.
#[track_caller]
pub(crate) fn assert_all_on_control(bench: &Bench, agent: &Agent<'_>, when: &str) {
    let tables = Tables::open(&agent.folder().join("bpffs/canary"));
    for family in Family::ALL {
        let place = tables.place(SHOP, family);
        let owners = tables.ledger(&place);
        let control = place.versions.iter().position(|name| name == "stable").expect("a slot");
        assert!(owners.iter().all(|one| usize::from(one.owner()) == control), "{when}: {family:?}");
        for (bucket, bits) in tables.entries(&place).into_iter().enumerate() {
            let current = Entry(bits).current();
            let version = usize::from(tables.backend(current).version);
            assert_eq!(version, control, "{when}: {family:?}: bucket {bucket}");
        }
        let astray = bench.connect(family, CLIENTS).open.into_iter().map(|(_, name)| name);
        let astray: Vec<String> = astray.filter(|name| name.starts_with("v2")).collect();
        assert!(astray.is_empty(), "{when}: {family:?}: {astray:?}");
    }
}

/// Connections of both families, some of them on the canary.
#[track_caller]
fn connections(bench: &Bench) -> Pool {
    let mut pool = bench.connect(Family::V4, 0..12);
    pool.open.extend(bench.connect(Family::V6, 0..12).open);
    let on_canary = pool.open.iter().filter(|(_, name)| name.starts_with("v2")).count();
    assert!(on_canary > 0, "nobody is on the canary");
    pool
}

/// What a status says of a panic.
#[track_caller]
pub(crate) fn assert_shown(status: &Status, uid: u32) -> u64 {
    let shown = service(status, SHOP).panic.clone().expect("a panic");
    assert_eq!((shown.uid, shown.reason.as_deref()), (Some(uid), Some("v2 is bad")));
    assert_eq!(version(status, SHOP, "v2").asked_text, "0%");
    assert_eq!(version(status, SHOP, "v2").buckets, 0);
    shown.revision
}

/// Lines of the audit trail that are panics of the shop.
fn trail(agent: &Agent<'_>) -> Vec<Event> {
    let events: Events = agent.json(&["events", "--limit", "1000", "--service", SHOP]);
    events.events.into_iter().filter(|event| event.kind == "panic").collect()
}

/// The agent's process is stopped, and goes on when this is dropped.
struct Stopped(Pid);

impl Stopped {
    #[track_caller]
    fn new(agent: &Agent<'_>) -> Self {
        let pid = Pid::from_raw(agent.pid().expect("it runs").cast_signed());
        kill(pid, Signal::SIGSTOP).expect("to stop it");
        let stat = format!("/proc/{pid}/stat");
        wait::until("the agent to stand still", || {
            let text = fs::read_to_string(&stat).unwrap_or_default();
            let state = text.rsplit(") ").next().unwrap_or_default();
            if state.starts_with('T') { Ok(()) } else { Err(state.to_owned()) }
        });
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Waits until an agent has made what was done to the maps its own.
#[track_caller]
fn wait_adopted(agent: &Agent<'_>) -> Status {
    wait::until("the panic to be adopted", || {
        let status = agent.ready_now()?;
        match service(&status, SHOP).panic.is_some() {
            true => Ok(status),
            false => Err("it is not".to_owned()),
        }
    })
}

fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let mut agent = bench.agent("buckets = 4096");
    bench.wait_answered();
    agent.split(SHOP, "v2", "50%");
    let v2 = |status: &Status| version(status, SHOP, "v2").buckets;
    let half = v2(&agent.status());

    // Alive: a change like any other.
    let mut pool = connections(&bench);
    let report = panic(&agent, &[&[SHOP], ALIVE].concat());
    assert_eq!((report.by.as_str(), report.buckets_moved), ("agent", half), "{test}: {report:?}");
    assert_all_on_control(&bench, &agent, &format!("{test}, alive"));
    pool.assert_where_they_were(&format!("{test}, alive"));
    let revision = assert_shown(&agent.status(), 0);
    assert_eq!(Some(revision), report.revision);
    let shown = agent.cli(&["status", SHOP]);
    assert!(shown.stdout.contains("PANIC: everything to control since"), "{shown:?}");
    assert_eq!(agent.cli(&["undo"]).code, 0, "{test}");
    assert_eq!(v2(&agent.status()), half);
    pool.assert_where_they_were(&format!("{test}, alive and undone"));
    // Of all services: in the maps first, and the agent's own before the command ends.
    let report = panic(&agent, ALIVE);
    assert_eq!((report.by.as_str(), report.buckets_moved), ("maps", half), "{test}: {report:?}");
    assert_eq!(Some(assert_shown(&agent.status(), 0)), report.revision, "{report:?}");
    assert!(report.notes.is_empty(), "{report:?}");
    assert_all_on_control(&bench, &agent, &format!("{test}, all, alive"));
    pool.assert_where_they_were(&format!("{test}, all, alive"));
    assert_eq!(agent.cli(&["undo"]).code, 0, "{test}");
    assert_eq!(v2(&agent.status()), half);

    // Stopped: the maps are written without it; nothing comes back when it goes on.
    let mut more = connections(&bench);
    let stopped = Stopped::new(&agent);
    let dry = panic(&agent, &[SHOP, "--dry-run"]);
    assert_eq!((dry.applied, dry.by.as_str(), dry.buckets_moved), (false, "maps", half));
    let report = panic(&agent, &[SHOP]);
    assert_eq!((report.by.as_str(), report.buckets_moved), ("maps", half), "{test}: {report:?}");
    assert!(report.revision.is_none() && report.maps_us.is_some());
    assert_all_on_control(&bench, &agent, &format!("{test}, stopped"));
    pool.assert_where_they_were(&format!("{test}, stopped"));
    more.assert_where_they_were(&format!("{test}, stopped"));
    // Once more, by somebody who does not know: nothing is left to do, and it says who was first.
    let again = panic(&agent, &[]);
    assert_eq!(again.buckets_moved, 0, "{again:?}");
    assert!(again.notes.iter().any(|note| note.contains("already")), "{again:?}");
    drop(stopped);
    let status = wait_adopted(&agent);
    let revision = assert_shown(&status, 0);
    assert_all_on_control(&bench, &agent, &format!("{test}, going on"));
    let lines = trail(&agent);
    assert_eq!(lines.last().and_then(|line| line.revision), Some(revision), "{lines:?}");
    assert_eq!((lines.len(), lines[2].buckets_moved), (3, half), "{lines:?}");
    pool.assert_where_they_were(&format!("{test}, going on"));
    more.assert_where_they_were(&format!("{test}, going on"));
    // The operator's next change counts.
    agent.split(SHOP, "v2", "10%");
    assert!(service(&agent.status(), SHOP).panic.is_none());
    agent.split(SHOP, "v2", "50%");
    assert_eq!(v2(&agent.status()), half);

    // Gone: the next start adopts it, and undo takes it back.
    agent.stop(Signal::SIGKILL);
    let report = panic(&agent, &[]);
    assert_eq!(report.by, "maps", "{report:?}");
    assert_all_on_control(&bench, &agent, &format!("{test}, gone"));
    let doctor = agent.cli(&["doctor"]);
    assert!(doctor.stdout.contains("a panic has sent services to control"), "{doctor:?}");
    pool.assert_where_they_were(&format!("{test}, gone"));
    agent.run();
    let status = agent.wait_ready();
    assert_shown(&status, 0);
    assert_all_on_control(&bench, &agent, &format!("{test}, started"));
    assert_eq!(trail(&agent).len(), 4, "{test}");
    pool.assert_where_they_were(&format!("{test}, started"));
    assert_eq!(agent.cli(&["undo", SHOP]).code, 0, "{test}");
    assert_eq!(v2(&agent.status()), half);
    pool.assert_where_they_were(&format!("{test}, undone"));
    more.assert_where_they_were(&format!("{test}, undone"));

    // Another start has nothing to adopt any more.
    agent.stop(Signal::SIGTERM);
    agent.run();
    assert_eq!(v2(&agent.wait_ready()), half, "{test}");
    assert_eq!(trail(&agent).len(), 4, "{test}");
}

#[test]
fn a_panic_works_with_the_agent_alive_stopped_and_gone_in_dsr() {
    exercise("a_panic_works_with_the_agent_alive_stopped_and_gone_in_dsr", Way::Dsr);
}

#[test]
fn a_panic_works_with_the_agent_alive_stopped_and_gone_in_nat() {
    exercise("a_panic_works_with_the_agent_alive_stopped_and_gone_in_nat", Way::NatTwoArmed);
}

/// Whoever does it is killed at each of its places, and whoever adopts it, too.
fn killed(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    let services = bench.services("buckets = 4096");
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    let choice = agent.folder().join("failpoint");
    let run = |agent: &mut Agent<'_>| {
        agent.run_with(|command| {
            command.env(failpoint::FILE, &choice);
        });
    };
    run(&mut agent);
    agent.wait_ready();
    bench.wait_answered();
    let mut lines = 0;
    for point in Failpoint::ALL.iter().filter(|point| point.is_of_panic()) {
        let when = format!("{test}, {}", point.name());
        agent.split(SHOP, "v2", "50%");
        let mut pool = connections(&bench);
        agent.stop(Signal::SIGKILL);
        fs::write(&choice, point.name()).expect("a choice");
        let mut command = agent.command(&["panic", SHOP, "--reason", "v2 is bad"]);
        command.env(failpoint::FILE, &choice).stdout(Stdio::null()).stderr(Stdio::null());
        let end = spawn::spawn(command).and_then(|mut child| child.wait()).expect("an end");
        let by_cli = *point != Failpoint::PanicAdopted;
        assert_eq!(end.signal(), by_cli.then_some(9), "{when}: {end}");
        pool.assert_where_they_were(&when);
        run(&mut agent);
        if !by_cli {
            wait::until("the end of the agent", || agent.ended().ok_or_else(String::new));
            agent.stop(Signal::SIGTERM);
            pool.assert_where_they_were(&format!("{when}, at the start"));
            fs::remove_file(&choice).expect("a choice");
            run(&mut agent);
        }
        // It was marked, so it is adopted, however much of it was done.
        let status = agent.wait_ready();
        assert_shown(&status, 0);
        lines += 1;
        assert_eq!(trail(&agent).len(), lines, "{when}");
        assert_all_on_control(&bench, &agent, &format!("{when}, started"));
        pool.assert_where_they_were(&format!("{when}, started"));
        let _ = fs::remove_file(&choice);
    }
    println!("{test}: {lines} places");
    assert!(lines >= 5, "{lines}");
}

#[test]
fn a_panic_that_is_killed_on_its_way_is_brought_to_its_end_in_dsr() {
    killed("a_panic_that_is_killed_on_its_way_is_brought_to_its_end_in_dsr", Way::Dsr);
}

#[test]
fn a_panic_that_is_killed_on_its_way_is_brought_to_its_end_in_nat() {
    killed("a_panic_that_is_killed_on_its_way_is_brought_to_its_end_in_nat", Way::NatTwoArmed);
}

/// An agent that is alive marks a panic first: killed at each place after that, it is in force with
/// the next start, and once in the audit trail.
fn killed_alive(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    let services = bench.services("buckets = 4096");
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    let choice = agent.folder().join("failpoint");
    let run = |agent: &mut Agent<'_>| {
        agent.run_with(|command| {
            command.env(failpoint::FILE, &choice);
        });
    };
    run(&mut agent);
    agent.wait_ready();
    bench.wait_answered();
    let body = format!("{{\"service\": \"{SHOP}\", \"reason\": \"v2 is bad\"}}");
    let (mut died, mut lines) = (0, 0);
    for point in Failpoint::ALL {
        let when = format!("{test}, {}", point.name());
        agent.split(SHOP, "v2", "50%");
        let mut pool = connections(&bench);
        fs::write(&choice, point.name()).expect("a choice");
        let mut control = Control::open(&agent.socket()).expect("a socket");
        let answer = control.ask("POST", "/v1/panic", body.as_bytes());
        lines += 1;
        if answer.is_err() {
            died += 1;
            wait::until("the end of the agent", || agent.ended().ok_or("it runs".to_owned()));
            agent.stop(Signal::SIGTERM);
            pool.assert_where_they_were(&when);
            fs::remove_file(&choice).expect("a choice");
            run(&mut agent);
            assert_shown(&agent.wait_ready(), 0);
        } else {
            fs::remove_file(&choice).expect("a choice");
            assert_shown(&agent.status(), 0);
        }
        assert_eq!(trail(&agent).len(), lines, "{when}");
        assert_all_on_control(&bench, &agent, &when);
        pool.assert_where_they_were(&when);
    }
    println!("{test}: killed at {died} places");
    assert!(died >= 14, "{died}");
}

#[test]
fn an_agent_that_is_killed_in_a_panic_leaves_it_in_force_in_dsr() {
    killed_alive("an_agent_that_is_killed_in_a_panic_leaves_it_in_force_in_dsr", Way::Dsr);
}

#[test]
fn an_agent_that_is_killed_in_a_panic_leaves_it_in_force_in_nat() {
    killed_alive("an_agent_that_is_killed_in_a_panic_leaves_it_in_force_in_nat", Way::NatTwoArmed);
}

/// With `--move`, connections of the canary are reset, and those of control stay.
fn moved(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let agent = bench.agent("buckets = 4096");
    bench.wait_answered();
    for stopped in [false, true] {
        agent.split(SHOP, "v2", "50%");
        let pool = connections(&bench);
        let still = stopped.then(|| Stopped::new(&agent));
        let timeout: &[&str] = if stopped { &[] } else { ALIVE };
        let report = panic(&agent, &[&[SHOP, "--move"], timeout].concat());
        assert_eq!(report.by, if stopped { "maps" } else { "agent" }, "{test}: {report:?}");
        let says = report.notes.iter().any(|note| note.contains("is stopped"));
        assert_eq!(says, stopped, "{test}: {report:?}");
        let (canary, control): (Vec<_>, Vec<_>) =
            pool.open.into_iter().partition(|(_, name)| name.starts_with("v2"));
        for (mut connection, name) in canary {
            let from = connection.local_addr();
            // Of a sweep by the agent, the end is not waited for by whoever asks.
            wait::until("the end of a connection of the canary", || match connection.name() {
                Ok(_) => Err(format!("{from:?} is still with {name}")),
                Err(_) => Ok(()),
            });
        }
        Pool { open: control }.assert_where_they_were(&format!("{test}, stopped: {stopped}"));
        assert_all_on_control(&bench, &agent, test);
        drop(still);
        assert_shown(&wait_adopted(&agent), 0);
        assert_all_on_control(&bench, &agent, test);
    }
}

#[test]
fn a_panic_that_moves_open_connections_cuts_those_of_the_canary_in_dsr() {
    moved("a_panic_that_moves_open_connections_cuts_those_of_the_canary_in_dsr", Way::Dsr);
}

#[test]
fn a_panic_that_moves_open_connections_cuts_those_of_the_canary_in_nat() {
    moved("a_panic_that_moves_open_connections_cuts_those_of_the_canary_in_nat", Way::NatTwoArmed);
}

#[test]
fn a_panic_without_an_agent_says_what_it_lacks() {
    let test = "a_panic_without_an_agent_says_what_it_lacks";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 1), ("v2", 1)]);
    let options = AgentOptions::native(&bench.topology);
    let mut agent =
        Agent::prepare(&bench.topology.balancer, &options, &bench.services("buckets = 4096"));
    let nothing = agent.cli(&["panic"]);
    assert_eq!(nothing.code, 5, "{nothing:?}");
    assert!(nothing.stderr.contains("nothing is pinned"), "{nothing:?}");
    agent.run();
    agent.wait_ready();
    agent.split(SHOP, "v2", "50%");
    agent.stop(Signal::SIGKILL);
    let unknown = agent.cli(&["panic", "shpo"]);
    assert_eq!(unknown.code, 1, "{unknown:?}");
    assert!(unknown.stderr.contains("`shop`"), "{unknown:?}");
    // Whoever may read everything but the pins.
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(agent.folder(), open).expect("a folder");
    fs::remove_file(agent.socket()).expect("a socket");
    let mut command = agent.command(&["panic", SHOP]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    canary_tests::unprivileged::become_user(&mut command, 65_534, &[]);
    let denied = spawn::spawn(command).and_then(std::process::Child::wait_with_output);
    let denied = denied.expect("an end");
    assert_eq!(denied.status.code(), Some(77), "{denied:?}");
    let done = panic(&agent, &[SHOP]);
    assert_eq!(done.by, "maps");
    agent.run();
    assert_shown(&agent.wait_ready(), 0);
}

/// What comes of a panic of all services that does not wholly succeed: by service why not.
#[track_caller]
fn in_part(agent: &Agent<'_>, service: Option<&str>) -> PanicReport {
    let args = ["panic", "--json", "--reason", "v2 is bad"];
    let output = agent.cli(&[&args, service.as_slice()].concat());
    assert_eq!(output.code, 1, "{output:?}");
    let report: PanicReport = output.json();
    assert!(report.applied && report.by == "maps", "{report:?}");
    report
}

/// Whoever can't be sent to control is named, and the others go.
#[test]
fn a_panic_names_what_it_could_not_move_and_moves_the_others() {
    let test = "a_panic_names_what_it_could_not_move_and_moves_the_others";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 1), ("v2", 1)]);
    let mut agent = bench.agent("buckets = 4096");
    bench.wait_answered();
    let refused = |report: &PanicReport, name: &str| {
        let one = report.services.iter().find(|one| one.service == name);
        one.unwrap_or_else(|| panic!("no {name} in {report:?}")).refused.clone()
    };
    let half = |agent: &Agent<'_>| {
        agent.split(SHOP, "v2", "50%");
        agent.split(ECHO, "v2", "50%");
    };

    // A ledger that ends before the tables of the second service.
    half(&agent);
    let mut pool = connections(&bench);
    agent.stop(Signal::SIGKILL);
    let [ledger, kept] =
        ["bpffs/canary/maps/LEDGER", "bpffs/kept"].map(|pin| agent.folder().join(pin));
    fs::hard_link(&ledger, &kept).expect("another pin");
    fs::remove_file(&ledger).expect("a pin");
    bpf::pin_array(&ledger, 8 * PAGE_BUCKETS, 2).expect("a smaller map");
    for service in [None, Some(ECHO)] {
        let report = in_part(&agent, service);
        let why = refused(&report, ECHO).unwrap_or_else(|| panic!("{report:?}"));
        assert!(why.contains(&format!("`{ECHO}`: a table of it can't be used")), "{why}");
        assert!(why.contains("start an agent, or ask again"), "{why}");
        if service.is_none() {
            assert_eq!(refused(&report, SHOP), None, "{report:?}");
        }
    }
    let text = agent.cli(&["panic", ECHO]);
    assert!(text.code == 1 && text.stdout.contains(&format!("\nnot {ECHO}: ")), "{text:?}");
    assert_all_on_control(&bench, &agent, test);
    pool.assert_where_they_were(test);
    // All that was marked is adopted, what could not be written, too.
    fs::rename(&kept, &ledger).expect("the pin");
    agent.run();
    let status = wait_adopted(&agent);
    assert_shown(&status, 0);
    assert_eq!(version(&status, ECHO, "v2").buckets, 0);
    assert_all_on_control(&bench, &agent, test);
    pool.assert_where_they_were(test);

    // Control has nobody left who may take new connections.
    half(&agent);
    let status = agent.status();
    for backend in &version(&status, ECHO, "stable").backends {
        let done = agent.cli(&["backend", "drain", ECHO, &backend.addr.to_string(), "--force"]);
        assert_eq!(done.code, 0, "{done:?}");
    }
    agent.stop(Signal::SIGKILL);
    let report = in_part(&agent, None);
    let why = refused(&report, ECHO).unwrap_or_else(|| panic!("{report:?}"));
    assert!(why.contains("operators have taken out every backend of control"), "{why}");
    assert_eq!(refused(&report, SHOP), None, "{report:?}");
    assert_all_on_control(&bench, &agent, test);
    let alone = agent.cli(&["panic", ECHO, "--json"]);
    assert_eq!(alone.json::<ErrorBody>().error.code, "nobody_left", "{alone:?}");
    assert_eq!(alone.code, 1, "{alone:?}");
    agent.run();
    let status = wait_adopted(&agent);
    assert_eq!(version(&status, ECHO, "v2").asked_text, "50%", "left as it was");
    pool.assert_where_they_were(test);
}

/// Nothing but the earlier maps knows of it when new ones take their place.
#[test]
fn a_panic_that_no_agent_has_seen_outlives_new_maps() {
    let test = "a_panic_that_no_agent_has_seen_outlives_new_maps";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::start(&bench.topology, &options, &bench.services("buckets = 4096"));
    bench.wait_answered();
    agent.split(SHOP, "v2", "50%");
    let mut open = connections(&bench);
    agent.stop(Signal::SIGKILL);
    let done = panic(&agent, &[SHOP]);
    assert_eq!(done.by, "maps", "{done:?}");
    // No room for what is in the maps: a service has a table for each family.
    let smaller = AgentOptions { extra: "capacity = { services = 1 }".to_owned(), ..options };
    let only = bench.service(SHOP, HTTP_PORT, &["tcp"], "buckets = 4096");
    agent.configure(&smaller, &only);
    agent.run();
    let end = wait::until("the end of the agent", || agent.ended().ok_or("it runs".to_owned()));
    assert_eq!(end.code(), Some(1), "{}", agent.log());
    agent.stop(Signal::SIGTERM);
    agent.run_with(|command| {
        command.arg("--rebuild");
    });
    agent.wait_ready();
    let status = wait_adopted(&agent);
    assert_shown(&status, 0);
    let log = agent.log();
    assert!(log.contains("--rebuild") && log.contains("adopted"), "{log}");
    assert_all_on_control(&bench, &agent, test);
    open.assert_where_they_were(test);
    let events: Events = agent.json(&["events"]);
    let panics = events.events.iter().filter(|event| event.kind == "panic").count();
    assert_eq!(panics, 1, "{events:?}");
}

/// Until new connections go to control, also of a hundred services.
const AIM: Duration = Duration::from_millis(50);

/// Percentiles of what a command takes, and of what the maps take.
#[test]
fn a_panic_is_in_force_at_once() {
    let test = "a_panic_is_in_force_at_once";
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let rounds = if cfg!(debug_assertions) { 5 } else { 30 };
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let one = bench.service(SHOP, 80, &["tcp"], "buckets = 65536");
    let many: String = (0..100)
        .map(|n| {
            let buckets = if cfg!(debug_assertions) { 4096 } else { 65_536 };
            let keys = format!("buckets = {buckets}");
            bench.service_on(&[Family::V4], &format!("s{n:02}"), 10_000 + n, &["tcp"], &keys)
        })
        .collect();
    let room = "[agent.capacity]\nservices = 256\nbackends = 2048\nbuckets = 8388608\nvips = 1024";
    let options = AgentOptions { extra: room.to_owned(), ..AgentOptions::native(&bench.topology) };
    let mut slow = Vec::new();
    for (what, services, names) in [
        ("1 service of 65,536 buckets", one, vec![SHOP.to_owned()]),
        ("100 services", many, (0..100).map(|n| format!("s{n:02}")).collect::<Vec<_>>()),
    ] {
        let mut agent = Agent::start(&bench.topology, &options, &services);
        for state in ["alive", "stopped", "gone"] {
            let (mut whole, mut inside) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                for name in &names {
                    agent.split(name, "v2", "20%");
                }
                let still = (state == "stopped").then(|| Stopped::new(&agent));
                if state == "gone" {
                    agent.stop(Signal::SIGKILL);
                }
                let timeout: &[&str] = if state == "alive" { ALIVE } else { &[] };
                // One is the agent's, all of them are in the maps before it is told.
                let service: &[&str] = if names.len() == 1 { &[SHOP] } else { &[] };
                let begun = Instant::now();
                let report = panic(&agent, &[service, timeout].concat());
                whole.push(begun.elapsed());
                // From when the agent had the request, or the command had begun.
                inside.push(Duration::from_micros(report.took_us));
                assert!(report.buckets_moved > 0, "{test}: {report:?}");
                drop(still);
                if state == "gone" {
                    agent.run();
                    agent.wait_ready();
                }
                wait::until("the panic to be adopted", || {
                    let status = agent.ready_now()?;
                    match status.services.iter().all(|service| service.panic.is_some()) {
                        true => Ok(()),
                        false => Err("it is not".to_owned()),
                    }
                });
            }
            whole.sort();
            inside.sort();
            let (middle, last) = (whole.len() / 2, whole.len() - 1);
            println!(
                "{test}: {what}, {state}: the command {:.1?} (most {:.1?}), of it until in force {:.1?} (most {:.1?})",
                whole[middle], whole[last], inside[middle], inside[last]
            );
            if !cfg!(debug_assertions) && inside[middle] >= AIM {
                slow.push(format!("{what}, {state}: {:?}", inside[middle]));
            }
        }
    }
    assert!(slow.is_empty(), "{test}: {slow:?}");
}
