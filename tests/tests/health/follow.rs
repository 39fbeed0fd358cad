//! New connections follow the checks: real servers that stop and come back, and where the
//! real agent sends real connections meanwhile.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use canary_agent::api::model::{BackendStatus, Status};
use canary_tests::{
    agent::{Agent, AgentOptions},
    client::{self, Connection},
    host,
    server::{ECHO_PORT, HTTP_PORT, Server},
    topology::{Family, Options, Topology, VIP_V4},
    wait,
};
use nix::sys::signal::Signal;

use crate::{DOWN_WITHIN, FALL, pace};

/// `shop` falls back to control, `echo` to nobody, and all of `echo` is on v2.
fn services(topology: &Topology) -> String {
    let common = "forward = \"nat\"\nstickiness = \"client\"\ncontrol = \"stable\"\nbuckets = 4096";
    let pace = pace();
    format!(
        "[[service]]\nname = \"shop\"\nvip = \"{VIP_V4}\"\nports = \"tcp/{HTTP_PORT}\"\n{common}\n\
         split = {{ v2 = \"50%\" }}\nhealth = {{ type = \"http\", path = \"/\", {pace} }}\n{}\n\
         [[service]]\nname = \"echo\"\nvip = \"{VIP_V4}\"\nports = \"tcp/{ECHO_PORT}\"\n{common}\n\
         split = {{ v2 = \"100%\" }}\nfallback = \"none\"\nhealth = {{ type = \"tcp\", {pace} }}\n{}",
        topology.versions_toml(&[Family::V4], HTTP_PORT),
        topology.versions_toml(&[Family::V4], ECHO_PORT),
    )
}

/// A backend of `shop` by its server's name, `stable-2`.
fn backend<'a>(status: &'a Status, name: &str) -> &'a BackendStatus {
    let (version, number) = name.rsplit_once('-').unwrap();
    let versions = &status.services[0].versions;
    let version = versions.iter().find(|v| v.name == version).unwrap();
    &version.backends[number.parse::<usize>().unwrap() - 1]
}

/// Shares and numbers of buckets of all versions of all services.
fn shares(status: &Status) -> Vec<(f64, u32)> {
    let versions = status.services.iter().flat_map(|s| &s.versions);
    versions.map(|v| (v.in_force, v.buckets)).collect()
}

/// States of all backends with their service's and version's.
fn in_state(status: &Status, state: &str) -> usize {
    let versions = status.services.iter().flat_map(|s| &s.versions);
    versions.flat_map(|v| &v.backends).filter(|b| b.state == state).count()
}

/// Waits until so many backends of all services are down and all others up.
#[track_caller]
fn wait_down(agent: &Agent<'_>, down: usize) -> Status {
    wait::until("the checks", || {
        let status = agent.status();
        match (in_state(&status, "down"), in_state(&status, "up")) {
            (n, others) if n == down && others == 10 - down => Ok(status),
            states => Err(format!("{states:?} down and up; {:?}", status.alerts)),
        }
    })
}

/// Which servers new connections of 64 other clients reach.
#[track_caller]
fn reached(topology: &Topology, first: u32) -> BTreeSet<String> {
    let to = SocketAddr::new(VIP_V4.into(), HTTP_PORT);
    let name = |n| Connection::open_here(Family::V4.client(n), to).and_then(|mut c| c.name());
    topology.client.run(|| (first..first + 64).map(|n| name(n).unwrap()).collect())
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

#[test]
fn new_connections_follow_the_checks_and_versions_keep_their_shares() {
    if !host::ready("new_connections_follow_the_checks_and_versions_keep_their_shares") {
        return;
    }
    let topology = Topology::new(&Options::two_armed(&[("stable", 3), ("v2", 2)]));
    let mut servers: Vec<Option<Server>> =
        Server::start_all(&topology.backends).into_iter().map(Some).collect();
    let start = |at: usize| Some(Server::start(&topology.backends[at]));
    let options = AgentOptions::native(&topology);
    let mut agent = Agent::start(&topology, &options, &services(&topology));
    let begun = wait::until("the first checks", || {
        let status = wait_down(&agent, 0);
        let checks = status.services.iter().flat_map(|s| &s.versions).flat_map(|v| &v.backends);
        let passed = checks.filter(|b| b.check.as_ref().is_some_and(|c| c.passes > 0)).count();
        (passed == 10).then_some(status).ok_or(format!("{passed} backends have passed"))
    });
    let everybody = set(["stable-1", "stable-2", "stable-3", "v2-1", "v2-2"]);
    assert_eq!(reached(&topology, 0), everybody);

    // One of three: its version's others take its buckets.
    let stopped = Instant::now();
    servers[1] = None;
    let status = wait_down(&agent, 2);
    let took = stopped.elapsed();
    println!("a stopped server was down after {took:?}");
    assert!(took < DOWN_WITHIN, "{took:?}");
    assert_eq!(reached(&topology, 100), set(["stable-1", "stable-3", "v2-1", "v2-2"]));
    assert_eq!(shares(&status), shares(&begun));
    let (gone, before) = (backend(&status, "stable-2"), backend(&begun, "stable-2"));
    assert!(before.buckets > 0 && gone.buckets == 0);
    assert_eq!(
        gone.message.as_deref(),
        Some("it fails its checks: can't connect: Connection refused")
    );
    assert!(gone.check.as_ref().unwrap().failures >= u64::from(FALL));
    assert_eq!(backend(&status, "v2-1").buckets, backend(&begun, "v2-1").buckets);
    assert!(status.alerts.is_empty(), "{:?}", status.alerts);

    servers[1] = start(1);
    let status = wait_down(&agent, 0);
    assert_eq!(backend(&status, "stable-2").buckets, before.buckets);
    assert_eq!(reached(&topology, 200), everybody);

    // All of v2: `shop` falls back, `echo` does not.
    (servers[3], servers[4]) = (None, None);
    let status = wait_down(&agent, 4);
    assert_eq!(shares(&status), shares(&begun));
    let says = |status: &Status, what: &str| status.alerts.iter().any(|a| a.contains(what));
    assert!(says(&status, "`shop`: version `v2` has no usable IPv4 backend; control takes"));
    assert!(says(
        &status,
        "`echo`: version `v2` has no usable IPv4 backend; its clients get nothing"
    ));
    let control = set(["stable-1", "stable-2", "stable-3"]);
    assert_eq!(reached(&topology, 300), control);
    let echo = SocketAddr::new(VIP_V4.into(), ECHO_PORT);
    let nothing = topology
        .client
        .run(|| std::net::TcpStream::connect_timeout(&echo, Duration::from_millis(500)));
    assert!(nothing.is_err(), "{nothing:?}");

    // A restart: what is down does not come back for a moment.
    agent.stop(Signal::SIGTERM);
    assert_eq!(reached(&topology, 400), control, "traffic goes on without an agent");
    agent.run();
    let first = agent.wait_ready();
    assert_eq!((in_state(&first, "down"), in_state(&first, "up")), (4, 6), "{:?}", first.alerts);
    assert_eq!(reached(&topology, 500), control);
    let status = wait::until("a failure under the new agent", || {
        let status = agent.status();
        assert_eq!(in_state(&status, "down"), 4);
        let check = backend(&status, "v2-1").check.clone().unwrap();
        (check.failures >= u64::from(FALL)).then_some(status).ok_or(format!("{check:?}"))
    });
    assert_eq!(shares(&status), shares(&begun));

    // All of control too: everybody of control is tried.
    servers[..3].iter_mut().for_each(|server| *server = None);
    let status = wait_down(&agent, 10);
    assert!(says(
        &status,
        "`shop`: no IPv4 backend of control `stable` is usable; all of them are tried"
    ));
    let buckets = |name| backend(&status, name).buckets;
    assert!(["stable-1", "stable-2", "stable-3"].iter().all(|name| buckets(name) > 0));
    assert_eq!(shares(&status), shares(&begun));

    servers.iter_mut().enumerate().for_each(|(at, server)| *server = start(at));
    let status = wait_down(&agent, 0);
    assert!(status.alerts.is_empty(), "{:?}", status.alerts);
    assert_eq!(shares(&status), shares(&begun));
    assert_eq!(reached(&topology, 600), everybody);
    let stream =
        topology.client.run(|| client::connect(SocketAddr::new(Family::V4.client(700), 0), echo));
    let server = client::tcp_echo(stream.unwrap(), b"hello").unwrap();
    assert_eq!(client::version_of(&server), "v2");
}
