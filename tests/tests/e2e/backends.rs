//! Backends are taken out, put back, weighted, added and removed: nothing that is open
//! breaks, but what is told to.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use canary_agent::api::model::{BackendDetail, BackendReport, Backends, ChangeReport, Explain};
use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    server::HTTP_PORT,
    topology::Family,
    wait,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, ECHO, Pool, SHOP, Transport, Way, service, version};

const VERSIONS: [(&str, u8); 2] = [("stable", 3), ("v2", 2)];

/// Held connections of each family.
const KEPT: u32 = 40;

fn listed(agent: &Agent<'_>) -> Vec<BackendDetail> {
    let list: Backends = agent.json(&["backend", "list", SHOP]);
    list.versions.into_iter().flat_map(|version| version.backends).collect()
}

#[track_caller]
fn find<'a>(list: &'a [BackendDetail], addr: &str) -> &'a BackendDetail {
    list.iter().find(|detail| detail.backend.addr.to_string() == addr).expect("it is listed")
}

/// Tells both addresses of a host something.
#[track_caller]
fn tell(agent: &Agent<'_>, bench: &Bench, name: &str, state: &str) -> Vec<BackendReport> {
    let addrs = addrs_of(bench, name);
    let told = addrs.iter().map(|addr| agent.json(&["backend", state, SHOP, addr]));
    told.collect()
}

/// The addresses of a host in the HTTP service.
fn addrs_of(bench: &Bench, name: &str) -> Vec<String> {
    let host = bench.topology.backends.iter().find(|host| host.name == name).expect("a host");
    Family::ALL.map(|f| SocketAddr::new(host.addr(f), HTTP_PORT).to_string()).to_vec()
}

/// Connections of both families that are held.
fn hold(bench: &Bench, from: u32) -> Pool {
    let mut pool = bench.connect(Family::V4, from..from + KEPT);
    pool.open.extend(bench.connect(Family::V6, from..from + KEPT).open);
    pool
}

/// How many of a pool's connections are on a host.
fn on(pool: &Pool, name: &str) -> usize {
    pool.open.iter().filter(|(_, host)| host == name).count()
}

/// Asserts that no new connection reaches a host.
#[track_caller]
fn assert_avoided(bench: &Bench, from: u32, name: &str, when: &str) {
    assert_eq!(on(&hold(bench, from), name), 0, "{when}: a new connection is on {name}");
}

fn drain_and_maint(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &VERSIONS);
    let mut agent = bench.agent("split = { v2 = \"30%\" }");
    let mut pool = hold(&bench, 0);
    let name = "stable-1";
    let held = on(&pool, name);
    assert!(held > 5, "{held} connections on {name}");
    let addrs = addrs_of(&bench, name);

    // What would happen, then what happens.
    let dry: BackendReport = agent.json(&["backend", "drain", SHOP, &addrs[0], "--dry-run"]);
    assert!(!dry.applied && dry.buckets_moved > 10_000, "{dry:?}");
    assert_eq!(version(&agent.status(), SHOP, "stable").backends[0].admin, "ready");
    let reports = tell(&agent, &bench, name, "drain");
    assert_eq!(reports[0].buckets_moved, dry.buckets_moved);
    if way == Way::Dsr {
        assert!(reports.iter().all(|report| report.connections_held.is_none()), "{reports:?}");
    } else {
        let counted: u64 = reports.iter().filter_map(|report| report.connections_held).sum();
        assert_eq!(counted, held as u64, "{reports:?}");
    }
    pool.assert_where_they_were("drained");
    assert_avoided(&bench, 1_000, name, "drained");
    let list = listed(&agent);
    for addr in &addrs {
        let BackendDetail { backend, open_connections, .. } = find(&list, addr);
        assert_eq!((&*backend.state, &*backend.health), ("drain", "up"));
        assert_eq!(backend.buckets, 0);
        match way {
            Way::Dsr => assert!(backend.draining_buckets > 10_000, "{backend:?}"),
            _ => assert!(open_connections.is_some_and(|open| open > 0), "{open_connections:?}"),
        }
    }
    if way != Way::Dsr {
        // Ours, and those that were closed a moment ago at most.
        let open: u64 = list.iter().filter_map(|detail| detail.open_connections).sum();
        let ours = 2 * u64::from(KEPT);
        assert!((ours..=2 * ours).contains(&open), "{open} open");
    }

    // A restart changes nothing.
    agent.stop(Signal::SIGKILL);
    assert_avoided(&bench, 2_000, name, "without the agent");
    agent.run();
    agent.wait_ready();
    pool.assert_where_they_were("after a restart");
    assert_avoided(&bench, 3_000, name, "after a restart");
    assert_eq!(find(&listed(&agent), &addrs[0]).backend.admin, "drain");

    // Back: those that were open before, and those that began meanwhile, stay.
    pool.open.extend(hold(&bench, 4_000).open);
    tell(&agent, &bench, name, "ready");
    pool.assert_where_they_were("ready again");
    let new = hold(&bench, 5_000);
    assert!(on(&new, name) > 5, "{} new connections on {name}", on(&new, name));
    pool.open.extend(new.open);

    // Maintenance cuts its connections and no other.
    tell(&agent, &bench, name, "maint");
    let (cut, rest): (Vec<_>, Vec<_>) = pool.open.into_iter().partition(|(_, host)| host == name);
    assert!(cut.len() > held, "{} connections on {name}", cut.len());
    let mut rest = Pool { open: rest };
    rest.assert_where_they_were("beside maintenance");
    for (mut connection, _) in cut {
        let begun = Instant::now();
        let ended = connection.name();
        let error = ended.expect_err("an open connection of a backend in maintenance");
        assert!(
            matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
            "{error}"
        );
        assert!(begun.elapsed() < Duration::from_secs(2), "it was told at once");
    }
    assert_avoided(&bench, 6_000, name, "in maintenance");
    tell(&agent, &bench, name, "ready");
    rest.assert_where_they_were("after maintenance");
    assert!(on(&hold(&bench, 7_000), name) > 5);
}

#[test]
fn backends_drain_and_go_into_maintenance_in_nat() {
    drain_and_maint("backends_drain_and_go_into_maintenance_in_nat", Way::NatTwoArmed);
}

#[test]
fn backends_drain_and_go_into_maintenance_in_dsr() {
    drain_and_maint("backends_drain_and_go_into_maintenance_in_dsr", Way::Dsr);
}

/// The HTTP service with these backends of control: a host's name and its weight.
fn weighted(bench: &Bench, stable: &[(&str, u32)]) -> String {
    let keys = "health = { type = \"none\" }\nsplit = { v2 = \"30%\" }";
    bench.weighted_service(&Family::ALL, SHOP, HTTP_PORT, &["tcp"], keys, |host| {
        let weight = stable.iter().find(|(name, _)| host.name == *name).map(|(_, weight)| *weight);
        if host.version == "stable" { weight } else { Some(1) }
    })
}

/// What is changed, control's backends with their weights from then on, and the shares of
/// the three hosts that follow.
type WeightStep = (&'static str, &'static [(&'static str, u32)], [f64; 3]);

fn weights(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &VERSIONS);
    let options = AgentOptions::native(&bench.topology);
    let begin = weighted(&bench, &[("stable-1", 1), ("stable-2", 1)]);
    let mut agent = Agent::start(&bench.topology, &options, &begin);
    let mut pool = hold(&bench, 0);
    let mut from = 1_000;
    // One change at a time: what is held to is what must move because of it.
    let (third, two) = (1.0 / 3.0, 2.0 / 3.0);
    let steps: [WeightStep; 6] = [
        ("another weight", &[("stable-1", 3), ("stable-2", 1)], [0.75, 0.25, 0.0]),
        ("weight 0", &[("stable-1", 0), ("stable-2", 1)], [0.0, 1.0, 0.0]),
        ("weight 1", &[("stable-1", 1), ("stable-2", 1)], [0.5, 0.5, 0.0]),
        ("one added", &[("stable-1", 1), ("stable-2", 1), ("stable-3", 2)], [0.25, 0.25, 0.5]),
        ("one removed", &[("stable-1", 1), ("stable-3", 2)], [third, 0.0, two]),
        ("one more removed", &[("stable-1", 1)], [1.0, 0.0, 0.0]),
    ];
    for (what, stable, shares) in steps {
        let before = places(&agent, &bench);
        agent.configure(&options, &weighted(&bench, stable));
        agent.stop(Signal::SIGTERM);
        agent.run();
        agent.wait_ready();
        let when = format!("{test}: {what}");
        pool.assert_where_they_were(&when);
        let status = agent.status();
        let all = version(&status, SHOP, "stable");
        let mut moved_must = 0.0;
        for (name, share) in ["stable-1", "stable-2", "stable-3"].into_iter().zip(shares) {
            let addr = &addrs_of(&bench, name)[0];
            let buckets = all.backends.iter().find(|b| b.addr.to_string() == *addr);
            let buckets = buckets.map_or(0, |b| b.buckets);
            let wanted = share * f64::from(all.buckets);
            assert!((f64::from(buckets) - wanted).abs() <= 1.0, "{when}: {name} has {buckets}");
            moved_must += (share - before.0[name]).max(0.0);
        }
        let after = places(&agent, &bench);
        let moved = before.1.iter().zip(&after.1).filter(|(a, b)| a != b).count() as f64;
        let all_places = after.1.len() as f64;
        // Clients of control are 70 of 100; a tenth more than must may move, and a sample scatters.
        let limit = (moved_must * 1.1 + 0.08) * 0.7 * all_places;
        println!(
            "{when}: {moved} of {all_places} clients moved, {moved_must:.2} of control's must"
        );
        assert!(moved <= limit, "{when}: {moved} of {all_places} clients moved, more than {limit}");
        for (name, share) in ["stable-1", "stable-2", "stable-3"].into_iter().zip(shares) {
            if share == 0.0 {
                assert_avoided(&bench, from, name, &when);
            }
        }
        from += 1_000;
        pool.open.extend(hold(&bench, from).open);
        from += 1_000;
        pool.assert_where_they_were(&when);
    }
    let gone = find(&listed(&agent), &addrs_of(&bench, "stable-3")[0]).clone();
    assert_eq!((&*gone.backend.state, gone.backend.weight), ("removed", 0));
}

/// Shares of control's hosts, and where some clients' new connections go.
fn places(
    agent: &Agent<'_>,
    bench: &Bench,
) -> (std::collections::HashMap<&'static str, f64>, Vec<String>) {
    let status = agent.status();
    let stable = version(&status, SHOP, "stable");
    let share = |name: &'static str| {
        let addr = &addrs_of(bench, name)[0];
        let it = stable.backends.iter().find(|b| b.addr.to_string() == *addr);
        (name, it.map_or(0.0, |b| f64::from(b.buckets) / f64::from(stable.buckets)))
    };
    let shares = ["stable-1", "stable-2", "stable-3"].map(share).into_iter().collect();
    let mut control = canary_tests::control::Control::open(&agent.socket()).expect("the socket");
    let places = (0..400).map(|n| {
        let from = SocketAddr::new(Family::V4.client(n), 30_000);
        let target = format!("/v1/services/{SHOP}/explain?from={from}");
        let explain: Explain = control.ask("GET", &target, b"").expect("an answer").json();
        explain.backend.unwrap_or_default()
    });
    (shares, places.collect())
}

#[test]
fn weights_change_and_backends_come_and_go_in_nat() {
    weights("weights_change_and_backends_come_and_go_in_nat", Way::NatTwoArmed);
}

#[test]
fn weights_change_and_backends_come_and_go_in_dsr() {
    weights("weights_change_and_backends_come_and_go_in_dsr", Way::Dsr);
}

#[test]
fn a_backend_starts_slowly_also_over_a_restart() {
    if !host::ready("a_backend_starts_slowly_also_over_a_restart") {
        return;
    }
    const SLOW: Duration = Duration::from_secs(6);
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    let mut agent = bench.agent("slow_start = \"6s\"");
    let mut pool = hold(&bench, 0);
    let addr = &addrs_of(&bench, "stable-2")[0];
    let buckets = |agent: &Agent<'_>| {
        let list = listed(agent);
        let backend = &find(&list, addr).backend;
        (backend.buckets, backend.slow_start)
    };
    let (whole, none) = buckets(&agent);
    assert_eq!(none, None, "nobody starts slowly when all start");
    tell(&agent, &bench, "stable-2", "drain");
    assert_eq!(buckets(&agent), (0, None));
    let begun = Instant::now();
    tell(&agent, &bench, "stable-2", "ready");
    let (mut last, mut steps, mut restarted) = (0, 0, false);
    let over = wait::until("its whole share", || {
        let (now, part) = buckets(&agent);
        // Read after the answer: what the agent said is no older than this.
        let elapsed = begun.elapsed();
        assert!(now > 0 && now >= last, "{last} buckets, then {now}");
        let at_most = elapsed.as_secs_f64() / SLOW.as_secs_f64() + 1.0 / 32.0;
        let share = f64::from(now) / f64::from(whole);
        assert!(share <= at_most + 0.01, "{share} after {elapsed:?}");
        steps += u32::from(now != last);
        last = now;
        if !restarted && elapsed > SLOW / 2 {
            restarted = true;
            agent.stop(Signal::SIGKILL);
            agent.run();
            agent.wait_ready();
            pool.assert_where_they_were("restarted in slow start");
        }
        match part {
            None => Ok(begun.elapsed()),
            Some(part) => Err(format!("{now} of {whole} buckets, {part}")),
        }
    });
    assert_eq!(buckets(&agent), (whole, None));
    assert!(over >= SLOW, "over after {over:?}");
    assert!(restarted && steps >= 3, "{steps} steps were seen");
    pool.assert_where_they_were("after slow start");
}

#[test]
fn a_split_that_learns_moves_after_seven_seconds_and_not_if_the_agent_ends() {
    if !host::ready("a_split_that_learns_moves_after_seven_seconds_and_not_if_the_agent_ends") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    let mut agent = bench.agent("");
    let mut pool = hold(&bench, 0);
    let in_force = |agent: &Agent<'_>| version(&agent.status(), SHOP, "v2").in_force;
    let learn = |agent: &Agent<'_>| {
        let mut command = agent.command(&["split", SHOP, "v2=40%", "--learn", "--json"]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        canary_tests::spawn::spawn(command).expect("a process")
    };
    // The agent ends while it watches: the command says so, and nothing is changed.
    let child = learn(&agent);
    wait::until("watched buckets", || match service(&agent.status(), SHOP).tracked_buckets {
        0 => Err("none".to_owned()),
        _ => Ok(()),
    });
    assert_eq!(in_force(&agent), 0.0);
    agent.stop(Signal::SIGKILL);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    pool.assert_where_they_were("without the agent");
    agent.run();
    agent.wait_ready();
    assert_eq!(in_force(&agent), 0.0);
    pool.assert_where_they_were("after the restart");

    let begun = Instant::now();
    let child = learn(&agent);
    let during = bench.survey(Family::V4, Transport::Tcp, 0..50, 20_000);
    assert!(during.iter().all(|name| name.starts_with("stable")), "{during:?}");
    let output = child.wait_with_output().expect("it ends");
    let took = begun.elapsed();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report: ChangeReport = serde_json::from_slice(&output.stdout).expect("a report");
    assert!(report.applied && report.learned_ms == Some(7_000), "{report:?}");
    assert!(took >= Duration::from_secs(7), "{took:?}");
    assert!(report.took_us >= 7_000_000, "{report:?}");
    assert!((in_force(&agent) - 0.4).abs() < 0.001);
    pool.assert_where_they_were("moved");
    let dry: ChangeReport = agent.json(&["split", ECHO, "v2=40%", "--learn", "--dry-run"]);
    assert_eq!((dry.applied, dry.learned_ms), (false, Some(7_000)));
}
