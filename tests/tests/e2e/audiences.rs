//! Audiences: clients of several networks get what their route says, and a change of who is in
//! which breaks no connection.

use std::{fs, net::SocketAddr};

use canary_agent::api::{
    audience::{AudienceStatus, Audiences, ClientReport},
    model::Explain,
    panic::PanicReport,
    reload::ReloadReport,
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    server::{ECHO_PORT, HTTP_PORT},
    stats,
    topology::Family,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, ECHO, SHOP, Transport, Way, of_version};

/// Clients by number, 64 of each of the first two, and where they are.
const STAFF: [&str; 2] = ["10.64.0.0/18", "fd00:9::/42"];
const PRESS: [&str; 2] = ["10.64.64.0/18", "fd00:9:40::/42"];
/// The clients from 128 to 1,023.
const BETA: &str = "# from 128 on\n10.64.128.0/17\n10.65.0.0/16\n10.66.0.0/15\nfd00:9:80::/41\n\
                    fd00:9:100::/40 # a comment\nfd00:9:200::/39\n";

const ROUTES: [(&str, &str); 3] =
    [("press", "{}"), ("staff", "{ v2 = \"100%\" }"), ("beta", "{ v2 = \"50%\" }")];

fn services(bench: &Bench, routes: &[(&str, &str)], audiences: &str) -> String {
    let keys = "stickiness = \"client\"\nbuckets = 4096\nsplit = { v2 = \"10%\" }";
    let routes: String = routes
        .iter()
        .map(|(audience, split)| {
            format!("[[service.route]]\naudience = \"{audience}\"\nsplit = {split}\n")
        })
        .collect();
    bench.service(SHOP, HTTP_PORT, &["tcp"], keys)
        + &routes
        + &bench.service(ECHO, ECHO_PORT, &["tcp", "udp"], keys)
        + &routes
        + audiences
}

fn audience(name: &str, networks: &[&str]) -> String {
    format!("[[audience]]\nname = \"{name}\"\ncidr = {networks:?}\n")
}

const BETA_FILE: &str = "[[audience]]\nname = \"beta\"\nfile = \"beta.cidr\"\n";

fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let audiences = audience("staff", &STAFF) + &audience("press", &PRESS) + BETA_FILE;
    let options = AgentOptions::native(&bench.topology);
    let text = services(&bench, &ROUTES, &audiences);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &text);
    fs::write(agent.folder().join("beta.cidr"), BETA).expect("the file of networks");
    agent.run();
    agent.wait_ready();
    bench.wait_answered();

    for family in Family::ALL {
        for transport in [Transport::Tcp, Transport::Udp] {
            let names = |clients| bench.survey(family, transport, clients, 40_000);
            let case = format!("{family:?} {transport:?}");
            assert_eq!(of_version(&names(0..64), "v2"), 64, "staff, {case}");
            assert_eq!(of_version(&names(64..128), "v2"), 0, "press, {case}");
            let beta = names(128..1024);
            stats::assert_share(&format!("beta, {case}"), of_version(&beta, "v2"), 896, 0.5);
            let rest = names(1024..1424);
            stats::assert_share(&format!("everybody, {case}"), of_version(&rest, "v2"), 400, 0.1);
        }
    }

    // What is said of them is what happens.
    for (client, audience) in
        [(5, Some("staff")), (70, Some("press")), (200, Some("beta")), (2000, None)]
    {
        for family in Family::ALL {
            let from = family.client(client).to_string();
            let explain: Explain = agent.json(&["explain", ECHO, "--from", &from]);
            assert_eq!(explain.audience.as_deref(), audience, "{explain:#?}");
            assert!(!explain.tracked, "nothing has changed: {explain:#?}");
            let names = bench.survey(family, Transport::Tcp, client..client + 1, 41_000);
            let backend = explain.backend.as_deref().expect("a backend");
            assert_eq!(bench.name_of(backend), names[0], "{explain:#?}");
            let report: ClientReport = agent.json(&["audience", "test", &from]);
            assert_eq!(report.audiences.first().map(|one| one.name.as_str()), audience);
            assert_eq!(report.services.len(), 2);
            assert_eq!(report.services[0].audience.as_deref(), audience);
        }
    }
    let list: Audiences = agent.json(&["audience", "list"]);
    let names: Vec<&str> = list.audiences.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["staff", "press", "beta"]);
    let beta: AudienceStatus = agent.json(&["audience", "show", "beta"]);
    assert_eq!((beta.networks_v4, beta.networks_v6), (3, 3));
    assert_eq!(beta.addresses_v4, (1 << 15) + (1 << 16) + (1 << 17));
    assert_eq!(beta.routes.len(), 2);
    assert!(beta.examples.contains(&"10.65.0.0/16".to_owned()), "{beta:#?}");
    let unknown = agent.cli(&["audience", "show", "bete"]);
    assert_eq!(unknown.code, 1, "{unknown:?}");
    assert!(unknown.stderr.contains("did you mean `beta`?"), "{unknown:?}");

    // The share of an audience is set as any other, and does not touch the others.
    agent.split(&format!("{ECHO}@beta"), "v2", "100%");
    let all = bench.survey(Family::V4, Transport::Tcp, 128..328, 42_000);
    assert_eq!(of_version(&all, "v2"), 200);
    assert_eq!(of_version(&bench.survey(Family::V4, Transport::Tcp, 64..128, 42_000), "v2"), 0);

    // A bad file changes nothing, and says where it is wrong.
    fs::write(agent.folder().join("beta.cidr"), "10.64.128.0/17\n10.64.0.1/8\nnobody\n")
        .expect("the file of networks");
    let refused = agent.cli(&["reload"]);
    assert_eq!(refused.code, 78, "{refused:?}");
    assert!(refused.stderr.contains("line 2") && refused.stderr.contains("line 3"), "{refused:?}");
    let still: AudienceStatus = agent.json(&["audience", "show", "beta"]);
    assert_eq!(still, beta_with(&beta, &still));

    // Panic sends audiences to control, too.
    let done: PanicReport = agent.json(&["panic", ECHO]);
    let its: Vec<&str> = done.services.iter().map(|one| one.service.as_str()).collect();
    assert_eq!(its, ["echo", "echo@press", "echo@staff", "echo@beta"]);
    for clients in [0..64, 128..328] {
        let names = bench.survey(Family::V4, Transport::Tcp, clients, 43_000);
        assert_eq!(of_version(&names, "v2"), 0, "{names:?}");
    }
}

/// The same audience with the shares that hold by now.
fn beta_with(before: &AudienceStatus, now: &AudienceStatus) -> AudienceStatus {
    AudienceStatus { routes: now.routes.clone(), ..before.clone() }
}

#[test]
fn audiences_get_what_their_routes_say_in_dsr() {
    exercise("audiences_get_what_their_routes_say_in_dsr", Way::Dsr);
}

#[test]
fn audiences_get_what_their_routes_say_in_nat() {
    exercise("audiences_get_what_their_routes_say_in_nat", Way::NatTwoArmed);
}

fn unbroken(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    let staff = |networks: &[&str]| audience("staff", networks);
    let route = |split| [("staff", split)];
    let mut agent = Agent::start(&bench.topology, &options, &services(&bench, &[], ""));
    bench.wait_answered();
    // Half of them will be in the audience.
    let mut pools: Vec<_> = Family::ALL.map(|family| bench.connect(family, 14..114)).into();
    let mut check = |when: &str, more: Option<(Family, std::ops::Range<u32>)>| {
        for pool in &mut pools {
            pool.assert_where_they_were(when);
        }
        if let Some((family, clients)) = more {
            pools.push(bench.connect(family, clients));
        }
    };
    check("before", None);
    let reload = |agent: &Agent<'_>, text: &str| -> ReloadReport {
        agent.configure(&options, text);
        let diff: ReloadReport = agent.json(&["diff"]);
        let done: ReloadReport = agent.json(&["reload"]);
        assert_eq!(diff.audiences, done.audiences);
        done
    };
    let excluded = services(&bench, &route("{}"), &staff(&STAFF));
    agent.configure(&options, &excluded);
    let told = agent.cli(&["diff"]).stdout;
    assert!(told.contains("route: (none) → staff: control alone"), "{told}");
    assert!(told.contains("+ service echo@staff") && !told.contains("backend"), "{told}");
    let done = reload(&agent, &excluded);
    let change = done.audiences.expect("clients go by another route");
    assert_eq!((change.networks, change.addresses_v4), (2, 1 << 14));
    check("a route came", Some((Family::V4, 200..220)));
    let names = bench.survey(Family::V4, Transport::Tcp, 0..64, 50_000);
    assert_eq!(of_version(&names, "v2"), 0, "new connections go by the route");

    // Other networks, and another route for the same clients before it.
    let routes = [("crew", "{ v2 = \"100%\" }"), ("staff", "{}")];
    let both = staff(&STAFF) + &audience("crew", &["10.64.16.0/20", "fd00:9:10::/44"]);
    reload(&agent, &services(&bench, &routes, &both));
    check("an audience inside another came", Some((Family::V6, 200..220)));
    let names = bench.survey(Family::V6, Transport::Tcp, 16..32, 50_001);
    assert_eq!(of_version(&names, "v2"), 16);
    let explain: Explain =
        agent.json(&["explain", ECHO, "--from", &Family::V4.client(20).to_string()]);
    assert_eq!(explain.audience.as_deref(), Some("crew"));
    assert!(explain.tracked || way != Way::Dsr, "{explain:#?}");

    // A restart in the middle of it.
    agent.stop(Signal::SIGTERM);
    agent.run();
    agent.wait_ready();
    check("a restart", None);

    reload(&agent, &services(&bench, &[], ""));
    check("all routes went", None);
    let crew = bench.survey(Family::V6, Transport::Tcp, 16..32, 50_002);
    assert!(of_version(&crew, "v2") < 16, "new connections go by the service's split");
    agent.stop(Signal::SIGTERM);
    agent.run();
    agent.wait_ready();
    check("a restart without routes", None);
    let to = SocketAddr::new(Family::V4.vip(), ECHO_PORT);
    assert_eq!(
        bench
            .ask([SocketAddr::new(Family::V4.client(3), 50_003)].into_iter(), Transport::Udp, to)
            .len(),
        1
    );
}

#[test]
fn a_change_of_audiences_breaks_no_connection_in_dsr() {
    unbroken("a_change_of_audiences_breaks_no_connection_in_dsr", Way::Dsr);
}

#[test]
fn a_change_of_audiences_breaks_no_connection_in_nat() {
    unbroken("a_change_of_audiences_breaks_no_connection_in_nat", Way::NatTwoArmed);
}
