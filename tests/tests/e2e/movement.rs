//! One of a hundred backends comes, goes, fails or is taken out: no bucket moves but its own.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpListener},
};

use canary_agent::api::{
    model::{BackendReport, Status},
    reload::ReloadReport,
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    server::HTTP_PORT,
    topology::{Family, Host, Options, Topology, VIP_V4},
    wait,
};

use crate::{
    sound::tables,
    support::{SHOP, backends},
};

const BACKENDS: u8 = 100;
/// What may move of all buckets; the least is one in a hundred.
const MOST: f64 = 0.011;

/// A backend's address: all of them are the same host's.
fn addr(n: u8) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(10, 32, 0, n).into(), HTTP_PORT)
}

/// What answers a backend's checks as long as it is kept.
#[track_caller]
fn listen(host: &Host, n: u8) -> TcpListener {
    host.namespace.run(|| TcpListener::bind(addr(n))).unwrap_or_else(|e| panic!("{}: {e}", addr(n)))
}

/// The service with these backends.
fn shop(of: impl Iterator<Item = u8>) -> String {
    let addrs: Vec<String> = of.map(|n| addr(n).to_string()).collect();
    format!(
        "[[service]]\nname = {SHOP:?}\nvip = \"{VIP_V4}\"\nports = \"tcp/{HTTP_PORT}\"\n\
         forward = \"nat\"\nhealth = {{ type = \"tcp\", interval = \"1s\", rise = 1, fall = 2 }}\n\
         [service.versions.stable]\nbackends = {addrs:?}\n"
    )
}

/// Where each bucket sends new connections, as packets meet it.
#[track_caller]
fn table(agent: &Agent<'_>) -> Vec<Option<SocketAddr>> {
    let tables = tables(agent);
    let entries = tables.entries(&tables.place(SHOP, Family::V4));
    let mut known = BTreeMap::new();
    let mut of = |bits| {
        let index = canary_ebpf_common::entry::Entry(bits).current();
        *known.entry(index.get()).or_insert_with(|| tables.addr(index))
    };
    entries.into_iter().map(&mut of).collect()
}

/// What the tables were, to see what moves.
struct Watch<'a> {
    agent: &'a Agent<'a>,
    before: Vec<Option<SocketAddr>>,
}

impl<'a> Watch<'a> {
    fn new(agent: &'a Agent<'a>) -> Self {
        Self { agent, before: table(agent) }
    }

    /// Asserts that only the buckets of backend `n` have moved, to it or away from it, and as many
    /// as the agent has `said`.
    #[track_caller]
    fn moved(&mut self, what: &str, n: u8, said: Option<u64>) {
        let after = table(self.agent);
        let all = after.len();
        let pairs = || self.before.iter().zip(&after).filter(|(before, after)| before != after);
        let moved = pairs().count();
        let share = moved as f64 / all as f64;
        println!("{what}: {moved} of {all} buckets moved, {:.2} %", share * 100.0);
        assert!(moved > 0 && share <= MOST, "{what}: {moved} of {all} buckets moved");
        if let Some(said) = said {
            assert_eq!(said, moved as u64, "{what}: what the agent has said");
        }
        let one = Some(addr(n));
        let stray = pairs().find(|(before, after)| **before != one && **after != one);
        assert_eq!(stray, None, "{what}: a bucket that has nothing to do with {}", addr(n));
        self.before = after;
    }
}

/// Waits until the checks of all backends but `down` pass, and `down` has failed its own.
#[track_caller]
fn checked(agent: &Agent<'_>, down: Option<u8>) {
    let down = down.map(addr);
    let as_it_is = |status: &Status| {
        let wrong = backends(status, SHOP).find(|backend| {
            let passes = backend.check.as_ref().is_some_and(|check| check.passes > 0);
            let state = if down == Some(backend.addr) { "down" } else { "up" };
            backend.state != state || !passes
        });
        wrong.map(|backend| format!("{backend:?}"))
    };
    wait::until("every check", || as_it_is(&agent.status()).map_or(Ok(()), Err));
}

#[test]
fn one_of_a_hundred_backends_moves_no_bucket_but_its_own() {
    if !host::ready("one_of_a_hundred_backends_moves_no_bucket_but_its_own") {
        return;
    }
    let topology = Topology::new(&Options::two_armed(&[("stable", 1)]));
    let backend = &topology.backends[0];
    topology.balancer.ip(&format!("route add 10.32.0.0/16 via {}", backend.v4));
    backend.namespace.ip("route add local 10.32.0.0/16 dev lo");
    let mut listeners: BTreeMap<u8, TcpListener> =
        (1..=BACKENDS + 1).map(|n| (n, listen(backend, n))).collect();
    let options = AgentOptions::native(&topology);
    let agent = Agent::start(&topology, &options, &shop(1..=BACKENDS));
    checked(&agent, None);
    let mut watch = Watch::new(&agent);

    let reload = |of: Vec<u8>| {
        agent.configure(&options, &shop(of.into_iter()));
        let would: ReloadReport = agent.json(&["diff"]);
        let did: ReloadReport = agent.json(&["reload"]);
        assert_eq!(would.buckets_moved, did.buckets_moved, "what `diff` has said");
        Some(did.buckets_moved)
    };
    let said = reload((1..=BACKENDS).filter(|n| *n != 37).collect());
    watch.moved("one is removed", 37, said);
    let said = reload((1..=BACKENDS).collect());
    watch.moved("it is added again", 37, said);
    let said = reload((1..=BACKENDS + 1).collect());
    watch.moved("a new one is added", BACKENDS + 1, said);
    let said = reload((1..=BACKENDS).collect());
    watch.moved("it is removed", BACKENDS + 1, said);
    checked(&agent, None);

    drop(listeners.remove(&12));
    checked(&agent, Some(12));
    watch.moved("one fails its checks", 12, None);
    listeners.insert(12, listen(backend, 12));
    checked(&agent, None);
    watch.moved("it passes them again", 12, None);

    for out in ["drain", "maint"] {
        for state in [out, "ready"] {
            let addr = addr(50).to_string();
            let report: BackendReport = agent.json(&["backend", state, SHOP, &addr]);
            watch.moved(&format!("backend {state}"), 50, Some(report.buckets_moved.into()));
        }
    }
}
