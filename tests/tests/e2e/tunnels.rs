//! `ipip` and `gue` end to end: the balancer wraps, `canary-agent decap` on each backend unwraps,
//! and servers answer clients directly.

use std::net::SocketAddr;

use canary_tests::{
    agent::{Agent, AgentOptions},
    client::Connection,
    host, http,
    server::{ECHO_PORT, HTTP_PORT},
    topology::{Family, Host},
    wait,
};

use crate::support::{Bench, ECHO, SHOP, Transport, decap, of_version};

/// The balancer, and backends that unwrap.
struct Wrapped {
    bench: Bench,
    forward: &'static str,
}

impl Wrapped {
    #[track_caller]
    fn new(forward: &'static str, versions: &[(&str, u8)]) -> Self {
        Self { bench: Bench::wrapped(forward, versions), forward }
    }

    /// Both services on both families, whose backends go by addresses of `outer`.
    fn services(&self, outer: &[Family], keys: &str) -> String {
        let forward = self.forward;
        let one = |name: &str, port: u16, ports: &str| {
            format!(
                "[[service]]\nname = {name:?}\nvip = [{:?}, {:?}]\nports = {ports}\n\
                 forward = {forward:?}\ncontrol = \"stable\"\nhealth = {{ type = \"none\" }}\n\
                 {keys}\n{}\n",
                Family::V4.vip().to_string(),
                Family::V6.vip().to_string(),
                self.bench.topology.versions_toml(outer, port)
            )
        };
        one(SHOP, HTTP_PORT, &format!("[\"tcp/{HTTP_PORT}\"]"))
            + &one(ECHO, ECHO_PORT, &format!("[\"tcp/{ECHO_PORT}\", \"udp/{ECHO_PORT}\"]"))
    }

    #[track_caller]
    fn agent(&self, services: &str) -> Agent<'_> {
        let topology = &self.bench.topology;
        let agent = Agent::start(topology, &AgentOptions::native(topology), services);
        self.bench.wait_answered();
        agent
    }
}

#[track_caller]
fn serves(test: &str, forward: &'static str) {
    if !host::ready(test) {
        return;
    }
    let wrapped = Wrapped::new(forward, &[("stable", 2), ("v2", 1)]);
    let bench = &wrapped.bench;
    for outer in [&[Family::V4][..], &[Family::V6], &Family::ALL] {
        let services = wrapped.services(outer, "split = { v2 = \"50%\" }");
        let mut agent = wrapped.agent(&services);
        let mut pool = bench.connect(Family::V4, 0..30);
        pool.open.extend(bench.connect(Family::V6, 0..30).open);
        for family in Family::ALL {
            for transport in [Transport::Tcp, Transport::Udp] {
                let names = bench.survey(family, transport, 0..200, 20_000);
                let hits = of_version(&names, "v2");
                let what = format!("{forward}, {outer:?} outside, {family:?} {transport:?} inside");
                assert!((60..140).contains(&hits), "{what}: {hits} of 200 on v2");
            }
        }
        agent.split(SHOP, "v2", "100%");
        agent.split(ECHO, "v2", "100%");
        pool.assert_where_they_were("after the split");
        for family in Family::ALL {
            let names = bench.survey(family, Transport::Tcp, 1_000..1_050, 20_000);
            assert_eq!(of_version(&names, "v2"), 50, "{names:?}");
        }
        agent.stop(nix::sys::signal::Signal::SIGKILL);
        pool.assert_where_they_were("without an agent");
        agent.run();
        agent.wait_ready();
        pool.assert_where_they_were("with the next one");
        agent.split(SHOP, "v2", "0%");
        agent.split(ECHO, "v2", "0%");
        pool.assert_where_they_were("after the way back");
    }
}

#[test]
fn services_are_served_wrapped_in_ip() {
    serves("services_are_served_wrapped_in_ip", "ipip");
}

#[test]
fn services_are_served_wrapped_in_udp() {
    serves("services_are_served_wrapped_in_udp", "gue");
}

/// A backend is checked as clients reach it: wrapped, at the VIP. One that does not unwrap is down,
/// though its server answers.
#[track_caller]
fn checked_at_the_vip(test: &str, forward: &'static str) {
    if !host::ready(test) {
        return;
    }
    let wrapped = Wrapped::new(forward, &[("stable", 2)]);
    let check = "health = { type = \"http\", path = \"/healthz\", via = \"vip\", interval = \"200ms\", \
                 timeout = \"150ms\", rise = 1, fall = 3 }";
    let services = wrapped.services(&Family::ALL, "");
    let services = services.replace("health = { type = \"none\" }", check);
    // The echo service speaks no HTTP.
    let services = services.split("[[service]]").nth(1).map(|shop| format!("[[service]]{shop}"));
    let agent = wrapped.agent(&services.expect("the first service"));
    let states = |of: &Host| -> Vec<String> {
        let status = agent.status();
        let all = status.services.iter().flat_map(|service| &service.versions);
        let backends = all.flat_map(|version| &version.backends);
        let own = backends.filter(|backend| of.addrs().contains(&backend.addr.ip()));
        own.map(|backend| backend.state.to_string()).collect()
    };
    let all_are = |of: &Host, state: &str| {
        wait::until("the checks", || {
            let seen = states(of);
            let ok = seen.len() >= 2 && seen.iter().all(|one| one == state);
            if ok { Ok(()) } else { Err(format!("{forward} {}: {seen:?}", of.name)) }
        });
    };
    let [first, second] = &wrapped.bench.topology.backends[..] else { panic!("two backends") };
    all_are(first, "up");
    all_are(second, "up");
    decap(first, &wrapped.bench.pins[0], &["--detach"]);
    all_are(first, "down");
    let names = wrapped.bench.connect(Family::V4, 200..230);
    assert!(names.open.iter().all(|(_, name)| *name == second.name));
    all_are(second, "up");
}

#[test]
fn backends_behind_ipip_are_checked_at_the_vip() {
    checked_at_the_vip("backends_behind_ipip_are_checked_at_the_vip", "ipip");
}

#[test]
fn backends_behind_gue_are_checked_at_the_vip() {
    checked_at_the_vip("backends_behind_gue_are_checked_at_the_vip", "gue");
}

/// What a client sends in full packets does not fit the same path when it is wrapped: it is told
/// so, and goes on in smaller ones.
#[track_caller]
fn uploads_fit(test: &str, forward: &'static str) {
    if !host::ready(test) {
        return;
    }
    let long = std::env::var_os("CANARY_LONG").is_some();
    let wrapped = Wrapped::new(forward, &[("stable", 2)]);
    let mut whole = vec![0; 100 << 20];
    http::fill(&mut whole, 0);
    for outer in Family::ALL {
        let agent = wrapped.agent(&wrapped.services(&[outer], ""));
        for family in Family::ALL {
            let once = forward == "ipip" && outer == Family::V4 && family == Family::V4;
            let body = if long || once { &whole[..] } else { &whole[..10 << 20] };
            let to = SocketAddr::new(family.vip(), HTTP_PORT);
            let came = wrapped.bench.client().run(|| {
                // Not a client that has been told already.
                let nth = if outer == Family::V4 { 7 } else { 8 };
                Connection::open_here(family.client(nth), to)?.post("/", body)
            });
            let came = came.unwrap_or_else(|e| panic!("{forward} {outer:?} {family:?}: {e}"));
            assert!(came == body, "{forward} {outer:?} {family:?}: other bytes came back");
        }
        let status = agent.status();
        let told = status.reasons.iter().find(|one| one.reason == "answer_too_big");
        println!("{test}: {forward} {outer:?}: {told:?}");
        assert!(told.is_some_and(|one| one.packets > 0), "{:?}", status.reasons);
    }
}

#[test]
fn large_uploads_go_through_ipip_by_path_mtu_discovery() {
    uploads_fit("large_uploads_go_through_ipip_by_path_mtu_discovery", "ipip");
}

#[test]
fn large_uploads_go_through_gue_by_path_mtu_discovery() {
    uploads_fit("large_uploads_go_through_gue_by_path_mtu_discovery", "gue");
}
