//! A SYN flood from forged addresses: what is open stays, and new connections get through.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use canary_agent::api::{model::Status, reload::ReloadReport};
use canary_tests::{
    agent::{Agent, AgentOptions},
    asked,
    client::{Connection, connect_within},
    flood::{Flood, SOURCES, mac_of},
    host,
    server::HTTP_PORT,
    topology::{CLIENT_V4, Family, VIP_V4},
    wait,
};

use crate::support::{Bench, SHOP, Way, version};

/// Connections that are open before it begins.
const OPEN: u32 = 200;

/// How many SYNs of the flood the balancer has to steer: it ends when it has. With `CANARY_FLOOD`
/// it ends when so many have been sent.
const ENOUGH: u64 = 60_000;

/// SYNs that are sent at most for that: the pair of interfaces holds few while the processors
/// are busy, and the others are lost before the balancer.
const MOST: u64 = 5_000_000;

/// Clients that open connections meanwhile, one after the other.
const CLIENTS: u32 = 8;

/// From one new connection of a client to its next.
const PACE: Duration = Duration::from_millis(20);

/// Clients of an audience that is excluded, and as many others.
const EXCLUDED: u32 = 20;

/// SYNs that are sent at most beside them: more than there have to be refused, on any host.
const MOST_BESIDE: u64 = 20_000_000;

/// How long each of these is waited for: who is refused will be so again.
const TRIED: Duration = Duration::from_millis(500);

/// What came of new connections.
#[derive(Clone, Copy, Debug, Default)]
struct Attempts {
    tried: u64,
    failed: u64,
}

fn exercise(test: &str, way: Way, least: f64) {
    if !host::ready(test) {
        return;
    }
    let long = asked::number("CANARY_FLOOD");
    let bench = Bench::new(way, &[("stable", 4)]);
    for backend in &bench.topology.backends {
        // Their SYN-ACKs go out, to nobody.
        if way == Way::Dsr {
            backend.namespace.ip(&format!("route add {SOURCES} via {CLIENT_V4}"));
        }
    }
    let agent = bench.agent("");
    let mut pool = bench.connect(Family::V4, 0..OPEN);
    let to = SocketAddr::new(VIP_V4.into(), HTTP_PORT);
    let balancer = mac_of(&bench.topology.balancer, "eth0").expect("a MAC address");
    let (enough, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let flood = {
        let (enough, over) = (Arc::clone(&enough), Arc::clone(&over));
        let (namespace, interface) = bench.topology.towards_balancer();
        namespace.spawn_thread("flood", move || {
            let began = Instant::now();
            let sent = Flood::new(interface, balancer, VIP_V4, HTTP_PORT).and_then(|flood| {
                flood.send(long.unwrap_or(MOST), || {
                    !wait::interrupted() && !enough.load(Ordering::Relaxed)
                })
            });
            over.store(true, Ordering::Relaxed);
            (sent, began.elapsed())
        })
    };
    let latest = Arc::new(AtomicU64::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let (over, latest) = (Arc::clone(&over), Arc::clone(&latest));
            bench.client().spawn_thread("client", move || {
                let mut attempts = Attempts::default();
                let mut index = 10_000 + n * 100_000;
                while !over.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let source = Family::V4.client(index);
                    let asked = Connection::open_here(source, to).and_then(|mut c| c.name());
                    attempts.tried += 1;
                    attempts.failed += u64::from(asked.is_err());
                    latest.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
                    index += 1;
                    wait::pause_until(began + PACE);
                }
                attempts
            })
        })
        .collect();
    let steered = |status: &Status| -> u64 {
        let backends = crate::support::backends(status, SHOP);
        backends.map(|backend| backend.connections).sum()
    };
    while !over.load(Ordering::Relaxed) {
        pool.assert_where_they_were("during the flood");
        if long.is_none() && steered(&agent.status()) >= ENOUGH {
            enough.store(true, Ordering::Relaxed);
        }
    }
    let (sent, took) = flood.join().expect("the flood's thread");
    let sent = sent.expect("a flood");
    let mut all = Attempts::default();
    for client in clients {
        let Attempts { tried, failed } = client.join().expect("a client's thread");
        (all.tried, all.failed) = (all.tried + tried, all.failed + failed);
    }
    pool.assert_where_they_were("after the flood");
    let status = agent.status();
    let arrived = steered(&status);
    println!(
        "{test}: {sent} SYNs in {took:?} ({:.0} a second), {arrived} connections steered; {all:?}, the slowest took {} ms; {:?}; {:?}",
        sent as f64 / took.as_secs_f64(),
        latest.load(Ordering::Relaxed),
        status.flows,
        status.alerts,
    );
    let reasons: Vec<_> = status.reasons.iter().filter(|r| r.packets > 0).collect();
    println!("{reasons:?}");
    assert!(arrived >= ENOUGH, "{arrived} of {sent} SYNs were steered: it is no flood");
    let succeeded = (all.tried - all.failed) as f64 / all.tried as f64;
    assert!(all.tried > 20 && succeeded >= least, "{succeeded} of the new connections succeeded");
}

/// A flood from within an audience that must not see the canary, whose clients have just become
/// its: there is no room to remember them, and none of them gets in for that.
#[test]
fn a_syn_flood_lets_nobody_of_an_excluded_audience_in() {
    let test = "a SYN flood beside an excluded audience";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    for backend in &bench.topology.backends {
        backend.namespace.ip(&format!("route add {SOURCES} via {CLIENT_V4}"));
    }
    let options = AgentOptions {
        extra: "[agent.capacity]\nflows = 4096\n".to_owned(),
        ..AgentOptions::native(&bench.topology)
    };
    let service = |route: &str| {
        let keys = "buckets = 4096\nsplit = { v2 = \"50%\" }";
        bench.service(SHOP, HTTP_PORT, &["tcp"], keys) + route
    };
    let agent = Agent::start(&bench.topology, &options, &service(""));
    bench.wait_answered();
    let mut pool = bench.connect(Family::V4, 0..OPEN);
    // Of the clients every second one is of it, too.
    let excluded = (0..EXCLUDED).map(|n| Family::V4.client(20_000 + 2 * n).to_string());
    let mut networks: Vec<String> = excluded.collect();
    networks.push(SOURCES.to_owned());
    let route = format!(
        "[[service.route]]\naudience = \"out\"\nsplit = {{}}\n\
         [[audience]]\nname = \"out\"\ncidr = {networks:?}\n"
    );
    agent.configure(&options, &service(&route));
    let _: ReloadReport = agent.json(&["reload"]);

    let to = SocketAddr::new(VIP_V4.into(), HTTP_PORT);
    let balancer = mac_of(&bench.topology.balancer, "eth0").expect("a MAC address");
    let over = Arc::new(AtomicBool::new(false));
    let flood = {
        let over = Arc::clone(&over);
        let (namespace, interface) = bench.topology.towards_balancer();
        namespace.spawn_thread("flood", move || {
            Flood::new(interface, balancer, VIP_V4, HTTP_PORT).and_then(|flood| {
                flood.send(MOST_BESIDE, || !wait::interrupted() && !over.load(Ordering::Relaxed))
            })
        })
    };
    let table = format!("{SHOP}@out");
    let (mut seen, mut refused, mut others) = (0, 0, [0; 2]);
    let full = |status: &Status| -> u64 {
        let reasons = status.reasons.iter().filter(|one| one.reason == "drop_flow_table_full");
        reasons.map(|one| one.packets).sum()
    };
    wait::until("a table that is full, and clients beside it", || {
        for n in 0..EXCLUDED {
            let name = |client: u32| {
                let source = Family::V4.client(client);
                let asked = bench.client().run(move || {
                    let stream = connect_within(TRIED, SocketAddr::new(source, 0), to)?;
                    Connection::from(stream).name()
                });
                asked.ok()
            };
            match name(20_000 + 2 * n) {
                Some(backend) if backend.starts_with("v2") => {
                    panic!("client {n} of an excluded audience has met {backend}")
                }
                Some(_) => seen += 1,
                None => refused += 1,
            }
            if let Some(backend) = name(20_001 + 2 * n) {
                others[usize::from(backend.starts_with("v2"))] += 1;
            }
        }
        let dropped = full(&agent.status());
        match dropped > 1_000 && others.iter().all(|count| *count > 10) {
            true => Ok(()),
            false => Err(format!("{dropped} packets refused, {others:?} others served")),
        }
    });
    over.store(true, Ordering::Relaxed);
    let sent = flood.join().expect("the flood's thread").expect("a flood");
    let status = agent.status();
    let met = version(&status, &table, "v2").connections;
    println!(
        "{test}: {sent} SYNs, {} refused for want of room; of the excluded {seen} were served by \
         control and {refused} not; others: {others:?}",
        full(&status)
    );
    assert_eq!(met, 0, "connections of the audience on the canary");
    pool.assert_where_they_were("after the flood");
}

#[test]
fn a_syn_flood_in_dsr_breaks_nothing_and_lets_new_connections_in() {
    exercise("a SYN flood in dsr", Way::Dsr, 0.99);
}

#[test]
fn a_syn_flood_in_nat_breaks_nothing_and_lets_new_connections_in() {
    exercise("a SYN flood in nat", Way::NatTwoArmed, 0.5);
}
