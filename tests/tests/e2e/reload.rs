//! Reloads: what they change is changed, what they should not touch is not, and nobody who
//! is connected notices.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use canary_agent::{
    api::{
        model::{ErrorBody, Events},
        reload::{ReloadReport, ServiceChange},
    },
    datapath,
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    client::Connection,
    control::Control,
    hold::{Cause, Hold, Kind},
    host,
    model::Random,
    server::{ECHO_PORT, HTTP_PORT},
    topology::Family,
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    fresh::{self, Fresh},
    support::{Bench, ECHO, SHOP, Transport, Way, alone, service, settled, version},
};

/// How many connections of each kind are held.
pub(crate) const HELD: &[(Kind, u32)] = &[
    (Kind::KeepAlive, 50),
    (Kind::Download, 20),
    (Kind::Fetch, 10),
    (Kind::Idle, 50),
    (Kind::Chatter, 20),
    (Kind::Udp, 20),
];

/// Above this share of the connections' time that can't be judged a run says nothing.
pub(crate) const UNMEASURED_MAX: f64 = 0.05;

/// How long the agent may take to do what a signal asks for.
fn wait_for_log(agent: &Agent<'_>, line: &str, times: usize) {
    wait::until(line, || {
        let found = agent.log().matches(line).count();
        (found >= times).then_some(()).ok_or_else(|| format!("{found} of {times}"))
    });
}

fn hang_up(agent: &Agent<'_>) {
    let pid = i32::try_from(agent.pid().expect("it runs")).expect("a process id");
    kill(Pid::from_raw(pid), Signal::SIGHUP).expect("a signal");
}

/// A configuration at random: backends and their weights, versions, settings, a service that
/// comes and goes.
fn services(bench: &Bench, random: &mut Random) -> String {
    let health = random.one_of(&[
        "{ type = \"none\" }",
        "{ type = \"tcp\", interval = \"300ms\" }",
        "{ type = \"http\", path = \"/health\", interval = \"250ms\" }",
    ]);
    let drain = random.one_of(&["30m", "20m", "never"]);
    let slow_start = random.one_of(&["0s", "0s", "5s"]);
    let fallback = random.one_of(&["control", "none"]);
    let forward = if bench.way == Way::Dsr { "dsr" } else { "nat" };
    let vips: Vec<String> = Family::ALL.iter().map(|f| f.vip().to_string()).collect();
    let mut text = String::new();
    let mut all =
        vec![(SHOP, HTTP_PORT, "tcp", health), (ECHO, ECHO_PORT, "udp", "{ type = \"none\" }")];
    if random.below(2) == 0 {
        all.push(("more", 9999, "tcp", "{ type = \"none\" }"));
    }
    if random.below(2) == 0 {
        all.reverse();
    }
    for (name, port, protocol, health) in all {
        let other = if name == ECHO { format!(", \"tcp/{port}\"") } else { String::new() };
        // A String takes everything.
        let _ = write!(
            text,
            "[[service]]\nname = {name:?}\nvip = {vips:?}\nports = [\"{protocol}/{port}\"{other}]\n\
             forward = {forward:?}\nhealth = {health}\ndrain = {drain:?}\nslow_start = {slow_start:?}\n\
             fallback = {fallback:?}\n"
        );
        for version in ["stable", "v2"] {
            let hosts: Vec<_> =
                bench.topology.backends.iter().filter(|h| h.version == version).collect();
            let always = random.below(hosts.len() as u64) as usize;
            let some = hosts.iter().enumerate();
            let some: Vec<_> = some
                .filter(|(n, _)| *n == always || random.clone().below(4 + *n as u64) > 0)
                .collect();
            let backends = some.into_iter().flat_map(|(_, host)| {
                let weight = 1 + random.below(3);
                let addr = |family| SocketAddr::new(host.addr(family), port);
                Family::ALL
                    .map(|family| format!("{{ addr = \"{}\", weight = {weight} }}", addr(family)))
            });
            let backends: Vec<String> = backends.collect();
            let _ = writeln!(
                text,
                "[service.versions.{version}]\nbackends = [{}]",
                backends.join(", ")
            );
        }
    }
    text
}

#[track_caller]
fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let _alone = alone();
    let reloads = if std::env::var_os("CANARY_LONG").is_some() { 100 } else { 20 };
    let mut random = Random::from_environment(test);
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::start(&bench.topology, &options, &services(&bench, &mut random));
    agent.split(SHOP, "v2", "40%");
    agent.split(ECHO, "v2", "60%");
    bench.wait_answered();
    let hold = Hold::start(bench.client(), &bench.servers, random.bits());
    let mut next = 0;
    for (kind, count) in HELD {
        for number in 0..*count {
            let family = Family::ALL[(number % 2) as usize];
            hold.open(*kind, family, family.client(next));
            next += 1;
        }
    }
    hold.wait_opened();
    let arrivals = Fresh::some().start(&bench);
    let (mut took, mut busy, mut moved) = (Vec::new(), Vec::new(), 0);
    for number in 0..reloads {
        agent.configure(&options, &services(&bench, &mut random));
        let begun = Instant::now();
        if number % 5 == 4 {
            hang_up(&agent);
            wait_for_log(&agent, "the configuration has been reloaded", number + 1);
        } else {
            let mut control = Control::open(&agent.socket()).expect("the socket");
            let answer =
                control.ask("POST", "/v1/reload", b"{\"force\": true}").expect("an answer");
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            assert_eq!(answer.status, 200, "{text}");
            let report: ReloadReport = answer.json();
            took.push(begun.elapsed());
            busy.push(Duration::from_micros(report.busy_us));
            moved += report.buckets_moved;
        }
        let status = agent.status();
        assert_eq!(version(&status, SHOP, "v2").asked_text, "40%", "{status:#?}");
        assert_eq!(version(&status, ECHO, "v2").asked_text, "60%", "{status:#?}");
        wait::pause_until(begun + Duration::from_millis(random.below(400)));
    }
    let arrivals = arrivals.finish();
    let failed = fresh::failures(&arrivals);
    let made = arrivals.len() - failed.len();
    let unmeasured = hold.unmeasured();
    let records = hold.finish();
    let faults: Vec<_> = records.iter().filter(|record| !record.faults.is_empty()).collect();
    took.sort();
    busy.sort();
    println!(
        "{test}: {reloads} reloads, {moved} buckets moved; {} connections held, {} with faults; {made} new ones, \
         {} failed; a reload took {:.1?} (median; longest {:.1?}), {:.1?} of the loop's time (longest \
         {:.1?}); {:.2} % not measurable",
        records.len(),
        faults.len(),
        failed.len(),
        took[took.len() / 2],
        took[took.len() - 1],
        busy[busy.len() / 2],
        busy[busy.len() - 1],
        unmeasured * 100.0,
    );
    assert!(faults.is_empty(), "{test}: {faults:#?}");
    assert!(failed.is_empty(), "{test}: {failed:#?}");
    assert!(records.iter().all(|r| r.faults.iter().all(|f| f.cause != Cause::Moved)));
    assert!(made > 100 && moved > 65_536, "{test}: {made} new connections, {moved} buckets");
    assert!(
        unmeasured < UNMEASURED_MAX,
        "{test}: not measurable: run it again when less runs here"
    );
}

#[test]
fn nothing_that_is_open_notices_reloads_in_nat() {
    exercise("nothing_that_is_open_notices_reloads_in_nat", Way::NatTwoArmed);
}

#[test]
fn nothing_that_is_open_notices_reloads_in_dsr() {
    exercise("nothing_that_is_open_notices_reloads_in_dsr", Way::Dsr);
}

/// The report of `reload --json` with these options.
#[track_caller]
fn reload(agent: &Agent<'_>, options: &[&str]) -> ReloadReport {
    agent.json(&[&["reload"], options].concat())
}

/// The error of a command that must fail with that code.
#[track_caller]
fn fails(agent: &Agent<'_>, args: &[&str], code: i32) -> ErrorBody {
    let output = agent.cli(&[args, &["--json"]].concat());
    assert_eq!(output.code, code, "{args:?}: {output:?}");
    output.json()
}

fn change<'a>(report: &'a ReloadReport, name: &str) -> &'a ServiceChange {
    let found = report.services.iter().find(|service| service.name == name);
    found.unwrap_or_else(|| panic!("nothing of {name} in {report:#?}"))
}

#[test]
fn a_bad_configuration_is_refused_whole_with_every_error() {
    if !host::ready("a_bad_configuration_is_refused_whole_with_every_error") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)]);
    let agent = bench.agent("");
    agent.split(SHOP, "v2", "30%");
    let mut pool = bench.connect(Family::V4, 0..10);
    let before = settled(&agent.status());
    let good = fs::read_to_string(agent.config()).expect("the configuration");
    let bad = good.replacen("control = \"stable\"", "control = \"stabel\"\ndrian = \"5m\"", 1);
    fs::write(agent.config(), &bad).expect("written");
    for args in [&["diff"][..], &["reload"], &["reload", "--dry-run"], &["reload", "--force"]] {
        let body = fails(&agent, args, 78);
        assert_eq!(body.error.code, "bad_config");
        let lines: Vec<u32> = body.error.diagnostics.iter().map(|d| d.place.line).collect();
        assert_eq!(lines.len(), 2, "{body:?}");
        let text = agent.cli(args);
        assert!(text.stderr.contains("stabel") && text.stderr.contains("drian"), "{text:?}");
        assert!(text.stderr.contains("2 errors") && text.stdout.is_empty(), "{text:?}");
    }
    hang_up(&agent);
    wait::until("the refusal in status", || {
        let alerts = agent.status().alerts;
        let told = alerts.iter().any(|alert| alert.contains("the last reload was refused"));
        told.then_some(()).ok_or_else(|| format!("{alerts:?}"))
    });
    assert_eq!(settled(&agent.status()), before);
    pool.assert_where_they_were("after bad configurations");
    // It never was another one.
    fs::write(agent.config(), &good).expect("written");
    let report = reload(&agent, &[]);
    assert!(report.applied && !report.differs, "{report:?}");
    wait::until("the end of the alert", || {
        let alerts = agent.status().alerts;
        alerts.is_empty().then_some(()).ok_or_else(|| format!("{alerts:?}"))
    });
    fs::remove_file(agent.config()).expect("removed");
    let body = fails(&agent, &["reload"], 78);
    assert!(body.error.diagnostics[0].message.contains("can't read"), "{body:?}");
}

#[test]
fn a_diff_says_what_a_reload_does() {
    if !host::ready("a_diff_says_what_a_reload_does") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 3), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    let echo = bench.service(ECHO, ECHO_PORT, &["tcp", "udp"], "");
    let all = |keys: &str| bench.service(SHOP, HTTP_PORT, &["tcp"], keys) + &echo;
    let agent = Agent::start(&bench.topology, &options, &all(""));
    agent.split(SHOP, "v2", "30%");
    bench.wait_answered();
    let mut pool = bench.connect(Family::V4, 0..20);
    let none = agent.cli(&["diff"]);
    assert_eq!((none.code, none.stdout.contains("would change nothing")), (0, true), "{none:?}");

    let host = bench.topology.backends.iter().find(|h| h.name == "stable-2").expect("a host");
    let addr = |family| SocketAddr::new(host.addr(family), HTTP_PORT).to_string();
    let mut wanted = all("drain = \"5m\"");
    let cut = wanted.find("[[service]]\nname = \"echo\"").expect("two services");
    let (shop, rest) = wanted.split_at(cut);
    let shop = Family::ALL.iter().fold(shop.to_owned(), |text, family| {
        text.replace(&format!("\"{}\", ", addr(*family)), "")
            .replace(&format!(", \"{}\"", addr(*family)), "")
    });
    wanted = shop + rest;
    agent.configure(&options, &wanted);
    let before = settled(&agent.status());
    let said: ReloadReport = agent.json(&["diff"]);
    assert_eq!(settled(&agent.status()), before, "a diff changes nothing");
    let dry = reload(&agent, &["--dry-run"]);
    assert!(!said.applied && said.differs && !dry.applied);
    let shop = change(&said, SHOP);
    assert_eq!((said.services.len(), shop.backends.len()), (1, 2), "{said:#?}");
    assert!(shop.backends.iter().all(|b| b.change == "removed"), "{shop:#?}");
    assert_eq!((shop.settings[0].key.as_str(), shop.settings[0].after.as_str()), ("drain", "5m"));
    // With `nat` all are counted: those of the buckets that move are on that backend.
    let there = pool.open.iter().filter(|(_, name)| *name == host.name).count() as u64;
    assert_eq!(shop.connections_held, Some(there), "{shop:#?}");
    let text = agent.cli(&["diff"]);
    assert!(
        text.stdout.contains("~ service shop") && text.stdout.contains("drain: 30m → 5m"),
        "{text:?}"
    );

    let done = reload(&agent, &["--reason", "stable-2 is to be repaired"]);
    let comparable = |report: &ReloadReport| ReloadReport {
        applied: false,
        took_us: 0,
        busy_us: 0,
        revision: 0,
        ..report.clone()
    };
    assert_eq!(comparable(&done), comparable(&said));
    assert_eq!(comparable(&dry), comparable(&said));
    assert!(done.applied && done.revision > said.revision);
    pool.assert_where_they_were("after its backend was removed");
    let names = bench.connect(Family::V4, 100..160).open;
    assert!(names.iter().all(|(_, name)| *name != host.name), "new connections avoid it");
    let again = reload(&agent, &[]);
    assert!(!again.differs && again.revision == done.revision, "{again:?}");
}

#[test]
fn what_takes_a_restart_or_breaks_connections_is_refused_by_name() {
    if !host::ready("what_takes_a_restart_or_breaks_connections_is_refused_by_name") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)]);
    let options = AgentOptions::native(&bench.topology);
    let agent = bench.agent("");
    bench.wait_answered();
    let mut pool = bench.connect(Family::V4, 0..12);
    let before = settled(&agent.status());

    let more = AgentOptions {
        extra: "capacity = { flows = 4096 }\nnat_ports = \"20000-30000\"".into(),
        ..options.clone()
    };
    agent.configure(&more, &bench.services("drain = \"5m\""));
    let report: ReloadReport = agent.json(&["diff"]);
    assert_eq!(report.needs_restart, ["agent.nat_ports", "agent.capacity.flows"]);
    let body = fails(&agent, &["reload", "--force"], 1);
    assert_eq!(body.error.code, "needs_restart");
    assert!(body.error.message.contains("`agent.capacity.flows` (131072 → 4096)"), "{body:?}");
    assert_eq!(settled(&agent.status()), before, "none of it");

    agent.configure(&options, &bench.services("stickiness = \"client\""));
    let body = fails(&agent, &["reload"], 1);
    assert_eq!(body.error.code, "needs_force");
    assert!(body.error.message.contains("another `stickiness`"), "{body:?}");
    agent.configure(&options, &bench.service(ECHO, ECHO_PORT, &["tcp", "udp"], ""));
    let body = fails(&agent, &["reload"], 1);
    assert!(
        body.error.message.contains("`shop` is removed and has about 12 open connections"),
        "{body:?}"
    );
    assert_eq!(settled(&agent.status()), before, "none of it");
    pool.assert_where_they_were("after what was refused");

    let report = reload(&agent, &["--force"]);
    assert_eq!(change(&report, SHOP).connections_held, Some(12));
    let to = SocketAddr::new(Family::V4.vip(), HTTP_PORT);
    let refused = bench.client().run(|| Connection::open_here(Family::V4.client(500), to));
    assert!(refused.is_err(), "the host has no such server");
    assert!(pool.open.iter_mut().all(|(connection, _)| connection.name().is_err()));
    let status = agent.status();
    assert_eq!(status.services.len(), 1);
    // It comes back with the split that it had, and steers at once.
    agent.configure(&options, &bench.services(""));
    reload(&agent, &[]);
    drop(bench.connect(Family::V4, 600..640));
    drop(bench.connect(Family::V6, 600..640));
}

#[test]
fn places_operators_addresses_and_checks_follow_a_reload() {
    if !host::ready("places_operators_addresses_and_checks_follow_a_reload") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)]);
    let balancer = &bench.topology.balancer;
    balancer.ip("link add more0 type veth peer name more1\nlink set more0 up\nlink set more1 up");
    let options = AgentOptions::native(&bench.topology);
    let agent = bench.agent("");
    bench.wait_answered();
    let mut pool = bench.connect(Family::V4, 0..5);
    let on = |interface: &str| {
        balancer.run(|| datapath::program_on(interface).expect("a link")).is_some()
    };
    assert!(!on("more0"));
    let other: IpAddr = "10.1.0.101".parse().expect("an address");
    let vips = |keys: &str| {
        bench.services(keys).replace("\"10.1.0.100\", ", "\"10.1.0.100\", \"10.1.0.101\", ")
    };
    let mut interfaces = options.interfaces.clone();
    interfaces.extend(["more0".to_owned(), "later0".to_owned()]);
    let more = AgentOptions {
        interfaces,
        xdp_mode: "native".to_owned(),
        listen: "127.0.0.1:9109".to_owned(),
        extra: "operators = { users = [4321] }".to_owned(),
    };
    agent.configure(&more, &vips("").replace("\"none\"", "\"tcp\", interval = \"100ms\""));
    let report = reload(&agent, &[]);
    let keys: Vec<&str> = report.settings.iter().map(|s| s.key.as_str()).collect();
    assert_eq!(keys, ["agent.interfaces", "agent.listen", "agent.operators.users"]);
    assert!(on("more0"));
    let status = agent.status();
    let later = status.interfaces.iter().find(|i| i.name == "later0").expect("an interface");
    assert!(later.mode.is_none() && later.message.is_some(), "{later:?}");
    wait::until("the new address", || {
        let names = bench.client().run(|| {
            let to = SocketAddr::new(other, HTTP_PORT);
            Connection::open_here(Family::V4.client(700), to).and_then(|mut c| c.name())
        });
        names.map(drop).map_err(|error| error.to_string())
    });
    wait::until("checks", || {
        let status = agent.status();
        let checked = version(&status, SHOP, "stable").backends.iter();
        let passed = |check: &canary_agent::api::model::CheckStatus| check.passes > 0;
        let all = checked.clone().all(|b| b.check.as_ref().is_some_and(passed));
        all.then_some(()).ok_or_else(|| format!("{checked:?}"))
    });
    let served = balancer.run(|| std::net::TcpStream::connect("127.0.0.1:9109"));
    served.expect("the listener");
    balancer.ip("link add later0 type veth peer name later1\nlink set later0 up");
    wait::until("the late interface", || {
        on("later0").then_some(()).ok_or_else(|| "not yet".into())
    });

    agent.configure(&options, &bench.services(""));
    reload(&agent, &[]);
    assert!(!on("more0") && !on("later0") && on("eth0"));
    wait::until("the end of the listener", || {
        let served = balancer.run(|| std::net::TcpStream::connect("127.0.0.1:9109"));
        served.map_or(Ok(()), |_| Err("it is still there".to_owned()))
    });
    wait::until("the end of the address", || {
        let there = balancer.run(|| {
            let addresses = nix::ifaddrs::getifaddrs().expect("addresses");
            let mut all = addresses.filter_map(|one| Some(one.address?.as_sockaddr_in()?.ip()));
            all.any(|ip| IpAddr::V4(ip) == other)
        });
        match there {
            true => Err("it is still there".to_owned()),
            false => Ok(()),
        }
    });
    assert_eq!(service(&agent.status(), SHOP).vips.len(), 2);
    pool.assert_where_they_were("after all of it");
    let names = bench.survey(Family::V4, Transport::Tcp, 0..20, 25_000);
    assert!(names.iter().all(|name| name.starts_with("stable")));
}

#[test]
fn a_reload_that_nobody_confirms_is_taken_back_and_one_that_is_stays() {
    let test = "a_reload_that_nobody_confirms_is_taken_back_and_one_that_is_stays";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 1)]);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = bench.agent("drain = \"30m\"\nbuckets = 4096");
    bench.wait_answered();
    agent.split(SHOP, "v2", "20%");
    let mut pool = bench.connect(Family::V4, 0..10);
    let served = || bench.topology.balancer.run(|| std::net::TcpStream::connect("127.0.0.1:9109"));
    let other = AgentOptions { listen: "127.0.0.1:9109".to_owned(), ..options.clone() };
    // The backend of v2 is gone in it, and the agent listens.
    let one = bench.service(SHOP, HTTP_PORT, &["tcp"], "buckets = 4096");
    agent.configure(&other, &one);
    let revision = agent.status().agent.revision;
    let stale = fails(&agent, &["reload", "--force", "--if-revision", "1"], 1);
    assert_eq!(stale.error.code, "stale_revision");
    let bad = fails(&agent, &["reload", "--force", "--confirm", "soon"], 2);
    assert_eq!(bad.error.code, "bad_confirm");
    assert_eq!(agent.status().agent.revision, revision, "nothing was changed");
    let now = revision.to_string();
    let report = reload(&agent, &["--force", "--confirm", "3s", "--if-revision", &now]);
    assert_eq!(report.confirm_within_ms, Some(3_000), "{report:?}");
    let status = agent.status();
    assert_eq!((status.services.len(), status.pending.len()), (1, 1));
    agent.configure(&options, &one);
    assert_eq!(fails(&agent, &["reload", "--force"], 1).error.code, "confirmation_pending");
    agent.configure(&other, &one);
    served().expect("the listener");
    wait::until("the earlier configuration", || match agent.status() {
        status if status.services.len() == 2 && status.pending.is_empty() => Ok(()),
        status => Err(format!("{} services, {:?}", status.services.len(), status.pending)),
    });
    wait::until("the end of the listener", || {
        served().map_or(Ok(()), |_| Err("it is still there".to_owned()))
    });
    assert_eq!(version(&agent.status(), SHOP, "v2").asked_text, "20%", "live state stays");
    pool.assert_where_they_were(test);
    let events: Events = agent.json(&["events", "--limit", "1000"]);
    let reloads: Vec<_> = events.events.iter().filter(|event| event.kind == "reload").collect();
    let texts: Vec<&str> = reloads.iter().map(|event| event.text.as_str()).collect();
    assert!(texts.contains(&"agent.listen: off → 127.0.0.1:9109"), "{texts:?}");
    let last = reloads.iter().rfind(|event| event.revision.is_some()).expect("one");
    assert_eq!((&last.about[..], last.uid), (&[report.revision][..], None), "{last:?}");

    // The files still say it. Confirmed, it stays; and a start ends the wait of another.
    reload(&agent, &["--force", "--confirm", "2s"]);
    assert_eq!(agent.cli(&["confirm", "--reason", "it is good"]).code, 0);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(agent.status().services.len(), 1, "confirmed");
    agent.configure(&options, &one);
    let report = reload(&agent, &["--confirm", "10m"]);
    agent.stop(Signal::SIGKILL);
    agent.run();
    let status = agent.wait_ready();
    assert!(status.pending.is_empty() && status.services.len() == 1, "{:?}", status.pending);
    assert!(status.agent.revision > report.revision, "the trail says so");
    pool.assert_where_they_were(test);
}

/// Services of the largest configuration.
const MANY: usize = 4096;

/// That many services with a table each; `weight` is that of the first `changed` ones' first
/// backends.
fn many(forward: &str, changed: usize, weight: u32) -> String {
    let mut text = String::new();
    for n in 0..MANY {
        let (high, low) = (n / 256, n % 256);
        let weight = if n < changed { weight } else { 1 };
        // A String takes everything.
        let _ = write!(
            text,
            "[[service]]\nname = \"s{n}\"\nvip = \"10.8.{high}.{low}\"\nports = \"tcp/80\"\n\
             forward = {forward:?}\nbuckets = 4096\nhealth = {{ type = \"none\" }}\n\
             [service.versions.stable]\nbackends = [{{ addr = \"10.2.1.1:80\", weight = {weight} }}, \
             \"10.2.1.2:80\"]\n"
        );
    }
    text
}

/// How long reloads of 4,096 services take, and how long they keep the agent from anything
/// else. A run by itself: `CANARY_LONG`.
#[test]
fn four_thousand_services_are_reloaded() {
    let test = "four_thousand_services_are_reloaded";
    if std::env::var_os("CANARY_LONG").is_none() || !host::ready(test) {
        return;
    }
    let _alone = alone();
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2)]);
    let extra = "manage_vips = false\ncapacity = { services = 4096, vips = 4096, backends = 8192, \
                 buckets = 16777216 }";
    let options = AgentOptions { extra: extra.to_owned(), ..AgentOptions::native(&bench.topology) };
    let agent = Agent::start(&bench.topology, &options, &many("nat", 0, 1));
    for (what, changed, weight) in
        [("nothing", 0, 1), ("1 service", 1, 2), ("100 services", 100, 3), ("all", MANY, 4)]
    {
        agent.configure(&options, &many("nat", changed, weight));
        let report = reload(&agent, &[]);
        assert_eq!(report.services.len(), changed, "{what}");
        let (took, busy) =
            (Duration::from_micros(report.took_us), Duration::from_micros(report.busy_us));
        println!("{test}: {what}: {took:.1?}, {busy:.1?} of it in the loop");
    }
}
