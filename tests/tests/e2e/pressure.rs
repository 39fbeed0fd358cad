//! Source ports and flow entries that run out: what is open goes on, the rest is refused and
//! counted, and `status` says what to set.

use std::{io, net::SocketAddr};

use canary_tests::{
    agent::{Agent, AgentOptions},
    client::{Connection, connect},
    host,
    server::HTTP_PORT,
    topology::{Family, VIP_V4},
    wait,
};

use crate::support::{Bench, SHOP, Way, backends, service};

/// Source ports of the smallest range that may be configured.
const PORTS: u32 = 1024;

fn vip() -> SocketAddr {
    SocketAddr::new(VIP_V4.into(), HTTP_PORT)
}

/// Opens connections from many clients, and asks on each.
fn open(bench: &Bench, clients: std::ops::Range<u32>) -> Vec<io::Result<Connection>> {
    bench.client().run(|| {
        clients
            .map(|index| {
                let mut connection = Connection::open_here(Family::V4.client(index), vip())?;
                connection.name()?;
                Ok(connection)
            })
            .collect()
    })
}

/// Waits until an alert of the status holds these words.
#[track_caller]
fn said(agent: &Agent<'_>, words: &[&str]) {
    wait::until("an alert", || {
        let alerts = agent.status().alerts;
        match alerts.iter().any(|alert| words.iter().all(|word| alert.contains(word))) {
            true => Ok(()),
            false => Err(format!("{words:?} in none of {alerts:?}")),
        }
    });
}

#[test]
fn source_ports_that_run_out_are_counted_and_other_addresses_are_used() {
    if !host::ready("source ports run out") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 1)]);
    let range = format!("nat_ports = \"20000-{}\"", 20_000 + PORTS - 1);
    let options = AgentOptions { extra: range, ..AgentOptions::native(&bench.topology) };
    let checks = "health = { type = \"tcp\", interval = \"200ms\", timeout = \"1s\" }\n";
    let shop = |keys: &str| {
        let health = "health = { type = \"none\" }\n";
        bench.service_on(&[Family::V4], SHOP, HTTP_PORT, &["tcp"], keys).replace(health, checks)
    };
    let mut agent = Agent::start(&bench.topology, &options, &shop(""));
    let mut held: Vec<Connection> =
        open(&bench, 0..PORTS).into_iter().map(|c| c.expect("a connection")).collect();
    // Not one of them has a port to give up.
    let source = Family::V4.client(50_000);
    let refused = bench.client().run(|| Connection::open_here(source, vip()));
    assert!(refused.is_err(), "there is no port for it");
    let backend = bench.topology.backends[0].addr(Family::V4);
    said(&agent, &["nat_source", "agent.nat_ports", &backend.to_string()]);
    let status = agent.status();
    assert!(backends(&status, SHOP).all(|backend| backend.no_port > 0), "{status:#?}");
    // The host's own connections to the same backend, by hand and by its checks.
    let own = bench.topology.balancer.run(|| {
        (0..200)
            .map(|_| {
                let unspecified = SocketAddr::new([0, 0, 0, 0].into(), 0);
                let stream = connect(unspecified, SocketAddr::new(backend, HTTP_PORT))?;
                let port = stream.local_addr()?.port();
                Connection::from(stream).name()?;
                Ok::<_, io::Error>(port)
            })
            .collect::<io::Result<Vec<u16>>>()
    });
    let own = own.expect("the host's own connections");
    assert!(own.iter().all(|port| !(20_000..20_000 + PORTS as u16).contains(port)), "{own:?}");
    let checks = |agent: &Agent<'_>| {
        let status = agent.status();
        let check = backends(&status, SHOP).next().and_then(|b| b.check.clone()).expect("checks");
        (check.passes, check.failures)
    };
    let before = checks(&agent);
    wait::until("checks that pass", || match checks(&agent) {
        now if now.1 > before.1 => panic!("a check has failed"),
        now if now.0 > before.0 + 3 => Ok(()),
        now => Err(format!("{now:?}")),
    });
    for connection in &mut held {
        connection.name().expect("an open connection");
    }
    // A second address has as many ports again.
    bench.topology.balancer.ip("address add 10.2.0.3/16 dev eth1");
    agent.stop(nix::sys::signal::Signal::SIGTERM);
    agent.configure(&options, &shop("nat_source = [\"10.2.0.2\", \"10.2.0.3\"]\n"));
    agent.run();
    agent.wait_ready();
    let more = open(&bench, 60_000..60_000 + PORTS - 24);
    let failed = more.iter().filter(|c| c.is_err()).count();
    assert_eq!(failed, 0, "there are ports left");
    for connection in &mut held {
        connection.name().expect("an open connection");
    }
}

#[test]
fn a_full_flow_table_refuses_new_translated_connections_and_keeps_the_open_ones() {
    if !host::ready("a full flow table in nat") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2)]);
    let extra = "[agent.capacity]\nflows = 200".to_owned();
    let options = AgentOptions { extra, ..AgentOptions::native(&bench.topology) };
    let agent = Agent::start(&bench.topology, &options, &bench.services(""));
    let mut held: Vec<Connection> =
        open(&bench, 0..100).into_iter().map(|c| c.expect("a connection")).collect();
    let source = Family::V4.client(50_000);
    let refused = bench.client().run(|| Connection::open_here(source, vip()));
    assert!(refused.is_err(), "there is no room for it");
    said(&agent, &["the flow table is full", "refused", "agent.capacity.flows"]);
    said(&agent, &["nearly full", "200 of 200", "agent.capacity.flows"]);
    for connection in &mut held {
        connection.name().expect("an open connection");
    }
    // Whoever leaves makes room.
    drop(held.split_off(50));
    let again = open(&bench, 70_000..70_020);
    assert!(again.iter().all(Result::is_ok), "there is room again");
}

#[test]
fn a_full_flow_table_in_dsr_sends_new_connections_where_the_old_ones_are() {
    if !host::ready("a full flow table in dsr") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let extra = "[agent.capacity]\nflows = 50".to_owned();
    let options = AgentOptions { extra, ..AgentOptions::native(&bench.topology) };
    let agent = Agent::start(&bench.topology, &options, &bench.services(""));
    let mut pool = bench.connect(Family::V4, 0..60);
    agent.split(SHOP, "v2", "100%");
    let moved = bench.connect(Family::V4, 1_000..1_050).open;
    assert!(moved.iter().all(|(_, name)| name.starts_with("v2")), "they are remembered");
    let over = bench.connect(Family::V4, 2_000..2_020).open;
    assert!(over.iter().all(|(_, name)| name.starts_with("stable")), "there is no room for them");
    said(&agent, &["the flow table is full", "older", "agent.capacity.flows"]);
    assert!(agent.status().flows.untracked >= 20);
    assert!(service(&agent.status(), SHOP).tracked_buckets > 0);
    pool.open.extend(moved);
    pool.open.extend(over);
    pool.assert_where_they_were("with a full flow table");
}
