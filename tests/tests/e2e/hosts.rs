//! The hosts around the agent change: interfaces, MAC addresses, routes.

use std::time::{Duration, Instant};

use canary_agent::{
    api::model::{Backends, Events, InterfaceStatus, Status},
    datapath,
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    client::UdpFlow,
    host,
    server::ECHO_PORT,
    topology::{BALANCER_V4, BALANCER_V6, CLIENT_V4, CLIENT_V6, Family},
    wait,
    xdp_pass::{XdpPass, offloads_off},
};

use crate::support::{Bench, ECHO, SHOP, Transport, Way, backends, of_version, version};

/// How fast a changed MAC address is followed.
const FOLLOWED: Duration = Duration::from_secs(1);

/// How often it changes.
const ROUNDS: usize = 3;

fn interface<'a>(status: &'a Status, name: &str) -> &'a InterfaceStatus {
    status.interfaces.iter().find(|one| one.name == name).expect("the interface")
}

#[track_caller]
fn wait_mode(agent: &Agent<'_>, name: &str, mode: Option<&str>) -> InterfaceStatus {
    wait::until(&format!("{name} in mode {mode:?}"), || {
        let found = interface(&agent.status(), name).clone();
        if found.mode.as_deref() == mode { Ok(found) } else { Err(format!("{found:?}")) }
    })
}

#[test]
fn an_interface_is_attached_when_it_appears_and_when_it_comes_back() {
    if !host::ready("an_interface_is_attached_when_it_appears_and_when_it_comes_back") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2)]);
    let balancer = &bench.topology.balancer;
    let mut options = AgentOptions::native(&bench.topology);
    options.interfaces.push("late0".to_owned());
    let mut agent = Agent::prepare(balancer, &options, &bench.services(""));
    agent.run();
    wait::until("the agent", || match agent.cli(&["status", "--json"]) {
        output if output.code == 0 => Ok(()),
        output => Err(format!("{output:?}\n{}", agent.log())),
    });
    let missing = wait_mode(&agent, "late0", None);
    let message = missing.message.expect("a message");
    assert!(message.contains("does not exist"), "{message}");
    wait_mode(&agent, "eth0", Some("native"));
    let mut pool = bench.connect(Family::V4, 0..10);
    let mut last = None;
    for _ in 0..3 {
        balancer.ip("link add late0 type veth peer name late1
link set late0 up
link set late1 up");
        let found = wait_mode(&agent, "late0", Some("native"));
        assert_ne!(found.ifindex, last, "another interface of that name");
        last = found.ifindex;
        let on_it = |name: &str| balancer.run(|| datapath::program_on(name)).expect("a link");
        assert_eq!(on_it("late0"), on_it("eth0"));
        assert!(on_it("late0").is_some());
        balancer.ip("link del late0");
        let gone = wait_mode(&agent, "late0", None);
        assert!(gone.message.is_some_and(|m| m.contains("does not exist")));
        pool.assert_where_they_were("while another interface comes and goes");
    }
}

#[test]
fn the_clients_interface_is_deleted_and_made_again() {
    if !host::ready("the_clients_interface_is_deleted_and_made_again") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2)]);
    let agent = bench.agent("");
    let (client, balancer) = (bench.client(), &bench.topology.balancer);
    let mut pool = bench.connect(Family::V4, 0..5);
    balancer.ip("link del eth0");
    wait_mode(&agent, "eth0", None);
    balancer.ip(&format!("link add eth0 type veth peer name eth0 netns {}", client.name()));
    offloads_off(client, "eth0");
    offloads_off(balancer, "eth0");
    client.ip(&format!(
        "link set eth0 up
address add {CLIENT_V4}/16 dev eth0
address add {CLIENT_V6}/64 dev eth0 nodad
route add default via {BALANCER_V4}
route add ::/0 via {BALANCER_V6}"
    ));
    balancer.ip(&format!(
        "link set eth0 up
address add {BALANCER_V4}/16 dev eth0
address add {BALANCER_V6}/64 dev eth0 nodad
route add 10.64.0.0/10 via {CLIENT_V4}
route add fd00:9::/32 via {CLIENT_V6}"
    ));
    let _pass = XdpPass::attach(client, "eth0");
    wait_mode(&agent, "eth0", Some("native"));
    // Its VIPs come back, and what was open goes on.
    wait::until("a new connection", || {
        let to = std::net::SocketAddr::new(Family::V4.vip(), ECHO_PORT);
        let source = std::net::SocketAddr::new(Family::V4.client(77), 0);
        let name = client.run(|| canary_tests::client::tcp_name(source, to));
        name.map_err(|error| error.to_string())
    });
    pool.assert_where_they_were("by the new interface");
    pool.open.extend(bench.connect(Family::V6, 0..5).open);
    pool.assert_where_they_were("by the new interface");
}

fn follow_mac(test: &str, way: Way, family: Family) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 1)]);
    let agent = bench.agent("");
    let backend = &bench.topology.backends[0];
    let mut pool = bench.connect(family, 0..10);
    let to = std::net::SocketAddr::new(family.vip(), ECHO_PORT);
    let source = std::net::SocketAddr::new(family.client(50), 0);
    let flow = UdpFlow::open(bench.client(), source, to).expect("a socket");
    flow.ask(b"before").expect("an answer");
    let mut outages = Vec::new();
    for round in 1..=ROUNDS {
        let mac = format!("02:00:00:00:be:0{round}");
        backend.namespace.ip(&format!("link set eth0 address {mac}"));
        let changed = Instant::now();
        // Datagrams all the while: the first that is answered ends the outage.
        let outage = wait::until("an answer", || {
            let answer = bench.client().run(|| {
                let socket = std::net::UdpSocket::bind(source_of(family, 60))?;
                socket.set_read_timeout(Some(Duration::from_millis(10)))?;
                socket.send_to(b"now?", to)?;
                let mut buffer = [0; 64];
                socket.recv_from(&mut buffer)
            });
            answer.map(|_| changed.elapsed()).map_err(|error| error.to_string())
        });
        println!("{test}, round {round}: followed after {outage:?}");
        outages.push(outage);
        pool.assert_where_they_were("at the new MAC address");
        let alerts = agent.status().alerts;
        assert!(alerts.is_empty(), "{alerts:?}");
    }
    outages.sort_unstable();
    // A host that is busy with other tests may be late once.
    assert!(outages[ROUNDS / 2] <= FOLLOWED, "{test}: followed after {outages:?}");
}

fn source_of(family: Family, index: u32) -> std::net::SocketAddr {
    std::net::SocketAddr::new(family.client(index), 0)
}

#[test]
fn a_backends_new_mac_address_is_followed_in_nat() {
    let test = "a_backends_new_mac_address_is_followed_in_nat";
    follow_mac(test, Way::NatTwoArmed, Family::V4);
}

#[test]
fn a_backends_new_mac_address_is_followed_in_dsr() {
    follow_mac("a_backends_new_mac_address_is_followed_in_dsr", Way::Dsr, Family::V6);
}

#[test]
fn a_backend_that_is_gone_without_a_word_gets_no_connections_after_a_second() {
    let test = "a_backend_that_is_gone_without_a_word_gets_no_connections_after_a_second";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 3)]);
    let agent = bench.agent("");
    let dead = &bench.topology.backends[1];
    let mut pools = Family::ALL.map(|family| bench.connect(family, 0..20));
    let mut assert_all = |when: &str| {
        pools.iter_mut().for_each(|pool| pool.assert_where_they_were(when));
    };
    let states = || -> Vec<(String, Option<String>)> {
        let status = agent.status();
        let of_dead = |addr: std::net::IpAddr| dead.addrs().contains(&addr);
        let dead = backends(&status, ECHO).filter(|b| of_dead(b.addr.ip()));
        dead.map(|b| (b.state.to_string(), b.message.clone())).collect()
    };
    let wait_state = |wanted: &str| {
        let begun = Instant::now();
        wait::until(wanted, || match states() {
            now if now.iter().all(|(state, _)| state == wanted) => Ok(begun.elapsed()),
            now => Err(format!("{now:?}")),
        })
    };
    // It has answered by either family when a MAC address that nobody announces is followed: one
    // that has never answered may not take such questions at all.
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        dead.namespace.ip(&format!("link set eth0 address 02:00:00:00:de:0{round}"));
        assert_all("at the new MAC address");
        bench.topology.cut_off(dead, true);
        let took = wait_state("no-next-hop");
        println!("{test}: both families after {took:?}");
        times.push(took);
        for (family, first) in [(Family::V4, 1_000), (Family::V6, 2_000)] {
            let names = bench.survey(family, Transport::Tcp, first..first + 60, 20_000);
            assert_eq!(names.len(), 60);
            assert!(!names.contains(&dead.name), "{names:?}");
        }
        let said = states().remove(0).1.unwrap_or_default();
        assert!(said.contains("does not answer any more"), "{said}");
        bench.topology.cut_off(dead, false);
        println!("{test}: back after {:?}", wait_state("up"));
        assert_all("when it is back");
    }
    // In both families, for both services.
    wait::until("the events", || {
        let Events { events, .. } = agent.json(&["events", "--limit", "1000"]);
        let kind = |kind: &str| events.iter().filter(|event| event.kind == kind).count();
        match (kind("unreachable"), kind("reachable")) {
            (gone, back) if gone == ROUNDS * 4 && back == gone => Ok(()),
            numbers => Err(format!("{numbers:?}: {events:?}")),
        }
    });
    times.sort_unstable();
    // A host that is busy with other tests may be late with its questions, which then don't count,
    // and with its answers to ours. The kernel takes 15 s and more.
    let (quickest, slowest) = (times[0], times[ROUNDS - 1]);
    assert!(quickest <= FOLLOWED && slowest < FOLLOWED * 5, "{test}: silent after {times:?}");
}

#[test]
fn a_backend_without_a_route_gets_no_connections_and_status_says_why() {
    if !host::ready("a_backend_without_a_route_gets_no_connections_and_status_says_why") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 1), ("v2", 1)]);
    let mut agent = {
        // Nobody routes there, and nobody answers there.
        let away = "10.9.9.9:7\", \"10.2.200.200:7\", \"";
        let text = bench.services("split = { v2 = \"50%\" }");
        let own = bench.topology.backend_addrs("v2", &[Family::V4], ECHO_PORT)[0].to_string();
        let text = text.replace(&own, &format!("{away}{own}"));
        Agent::prepare(&bench.topology.balancer, &AgentOptions::native(&bench.topology), &text)
    };
    agent.run();
    agent.wait_ready();
    let status = agent.status();
    for addr in ["10.9.9.9:7", "10.2.200.200:7"] {
        let lost = backends(&status, ECHO).find(|b| b.addr.to_string() == addr).expect("it");
        assert_eq!(lost.state, "no-next-hop", "{lost:?}");
        assert!(lost.message.as_ref().is_some_and(|m| !m.is_empty()), "{lost:?}");
        assert_eq!(lost.buckets, 0, "{lost:?}");
        println!("{addr}: {:?}", lost.message);
        let list: Backends = agent.json(&["backend", "list", ECHO, addr]);
        let detail = &list.versions[0].backends[0].backend;
        assert_eq!((&*detail.health, &*detail.admin), ("no-next-hop", "ready"));
        assert_eq!(detail.message, lost.message);
    }
    let names = bench.survey(Family::V4, Transport::Tcp, 0..400, 20_000);
    let hits = of_version(&names, "v2");
    assert!((100..300).contains(&hits), "{hits} of 400 on the reachable backend of v2");
    // A route appears, and the backend is used.
    bench.topology.backends[1].namespace.ip("address add 10.9.9.9/32 dev eth0");
    let server = {
        let backend = &bench.topology.backends[1];
        backend.namespace.run(|| std::net::TcpListener::bind("10.9.9.9:7")).expect("a port")
    };
    bench.topology.balancer.ip("route add 10.9.9.9/32 via 10.2.2.1");
    wait::until("the backend to come up", || {
        let status = agent.status();
        let it = backends(&status, ECHO).find(|b| b.addr.to_string() == "10.9.9.9:7").cloned();
        match it {
            Some(it) if it.state == "up" && it.buckets > 0 && it.message.is_none() => Ok(()),
            it => Err(format!("{it:?}")),
        }
    });
    drop(server);
    // A whole version that can't be reached: control takes its clients, with an alert.
    bench.topology.balancer.ip("route del 10.9.9.9/32 via 10.2.2.1");
    bench.topology.balancer.ip("route add unreachable 10.2.2.1/32");
    wait::until("the fallback", || {
        let status = agent.status();
        let said = status.alerts.iter().any(|a| a.contains("v2") && a.contains("no usable IPv4"));
        if said { Ok(()) } else { Err(format!("{:?}", status.alerts)) }
    });
    let names = bench.survey(Family::V4, Transport::Tcp, 1_000..1_200, 20_000);
    assert_eq!(of_version(&names, "stable"), 200);
    assert_eq!(version(&agent.status(), SHOP, "v2").asked_text, "50%");
}
