//! The agent ends, in any way, and comes back: traffic does not notice.

use std::{collections::BTreeMap, fs, path::Path};

use canary_agent::{
    api::model::{Explain, Status},
    datapath,
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    binary,
    control::Control,
    host,
    netns::Namespace,
    topology::Family,
    wait,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, ECHO, SHOP, Transport, Way, backends, finish, settled};

/// Clients whose buckets are compared.
const CLIENTS: u32 = 25;

/// Bucket, version and backend of clients of both families, in words.
fn explained(agent: &Agent<'_>) -> Vec<String> {
    let mut control = Control::open(&agent.socket()).expect("the socket");
    let clients = Family::ALL.into_iter().flat_map(|f| (0..CLIENTS).map(move |i| f.client(i)));
    let asked = clients.map(|client| {
        let from = client.to_string().replace(':', "%3A");
        let target = format!("/v1/services/{SHOP}/explain?from={from}");
        let explain: Explain = control.ask("GET", &target, b"").expect("an answer").json();
        let Explain { from, bucket, version, backend, .. } = explain;
        format!("{from} {bucket:?} {version:?} {backend:?}")
    });
    asked.collect()
}

/// Counters of packets, bytes and connections by backend.
fn counters(status: &Status) -> BTreeMap<String, [u64; 3]> {
    let mut counters = BTreeMap::new();
    for name in [SHOP, ECHO] {
        for backend in backends(status, name) {
            let key = format!("{name} {}", backend.addr);
            counters.insert(key, [backend.packets, backend.bytes, backend.connections]);
        }
    }
    counters
}

fn exercise(test: &str, way: Way, keys: &str, clients: u32) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    let mut agent = bench.agent(&format!("stickiness = \"client\"\n{keys}"));
    let mut pool = bench.connect(Family::V4, 0..10);
    agent.split(SHOP, "v2", "40%");
    agent.split(ECHO, "v2", "60%");
    pool.open.extend(bench.connect(Family::V6, 100..110).open);
    let answered = bench.survey(Family::V4, Transport::Tcp, 0..clients, 20_000);
    for (signal, port) in [(Signal::SIGTERM, 21_000), (Signal::SIGKILL, 22_000)] {
        let before = agent.status();
        let places = explained(&agent);
        let end = agent.stop(signal);
        assert_eq!(end.code(), (signal == Signal::SIGTERM).then_some(0), "{signal}: {end}");
        let when = format!("{test}, after {signal}");
        pool.assert_where_they_were(&when);
        let alone = bench.survey(Family::V4, Transport::Tcp, 0..clients, port);
        assert_eq!(alone, answered, "{when}: clients have moved");
        pool.open.extend(bench.connect(Family::V4, 500..505).open);
        agent.run();
        let after = agent.wait_ready();
        let when = format!("{test}, started again after {signal}");
        pool.assert_where_they_were(&when);
        assert_eq!(settled(&after), settled(&before), "{when}");
        assert_eq!(explained(&agent), places, "{when}");
        let then = counters(&before);
        for (key, now) in counters(&after) {
            let back = now.iter().zip(then[&key]).any(|(now, then)| *now < then);
            assert!(!back, "{when}: {key} has gone back from {:?} to {now:?}", then[&key]);
        }
        let again = bench.survey(Family::V4, Transport::Tcp, 0..clients, port + 500);
        assert_eq!(again, answered, "{when}: clients have moved");
    }
    // Undoing after the restarts moves nothing that is open either.
    agent.split(SHOP, "v2", "0");
    pool.assert_where_they_were("at 0");
}

#[test]
fn traffic_goes_on_without_the_agent_in_nat() {
    exercise("traffic_goes_on_without_the_agent_in_nat", Way::NatTwoArmed, "", 200);
}

#[test]
fn traffic_goes_on_without_the_agent_in_dsr() {
    exercise("traffic_goes_on_without_the_agent_in_dsr", Way::Dsr, "", 200);
}

/// The smallest tables: these two run on emulated processors too.
#[test]
fn small_tables_serve_without_the_agent_in_nat() {
    exercise("small_tables_serve_without_the_agent_in_nat", Way::NatTwoArmed, "buckets = 4096", 40);
}

#[test]
fn small_tables_serve_without_the_agent_in_dsr() {
    exercise("small_tables_serve_without_the_agent_in_dsr", Way::Dsr, "buckets = 4096", 40);
}

/// All that an agent may change on a host: addresses, programs, reserved ports.
fn host_state(namespace: &Namespace, interfaces: &[&str]) -> String {
    namespace.run(|| {
        let addresses = nix::ifaddrs::getifaddrs().expect("addresses");
        let mut addresses: Vec<String> = addresses
            .filter_map(|one| Some(format!("{} {}", one.interface_name, one.address?)))
            // Packet counts are part of a link's own entry.
            .filter(|text| text.contains('.') || text.contains(":"))
            .collect();
        addresses.sort();
        let programs: Vec<_> =
            interfaces.iter().map(|one| datapath::program_on(one).expect("a link")).collect();
        let ports = fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports");
        format!("{addresses:#?} {programs:?} {ports:?}")
    })
}

#[test]
fn detach_takes_away_what_is_the_agents_and_nothing_else() {
    if !host::ready("detach_takes_away_what_is_the_agents_and_nothing_else") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 1)]);
    let balancer = &bench.topology.balancer;
    // Somebody else's: one VIP, an address of no concern, a reserved port.
    balancer.ip("address add fd00:1::100/128 dev eth0 nodad
address add 10.1.0.77/32 dev eth0");
    balancer.sysctl("net/ipv4/ip_local_reserved_ports", "50000");
    let before = host_state(balancer, bench.topology.interfaces());
    let mut agent = bench.agent("");
    wait::until("the VIPs", || {
        let state = host_state(balancer, bench.topology.interfaces());
        if state.contains("10.1.0.100:0") { Ok(()) } else { Err(state) }
    });
    let bpffs = agent.folder().join("bpffs/canary");
    for pin in ["ingress", "links/eth0", "links/eth1", "maps/TABLE"] {
        assert!(bpffs.join(pin).exists(), "{pin}");
    }
    let refused = agent.cli(&["detach"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("the agent is running"), "{refused:?}");
    drop(bench.connect(Family::V4, 0..5));
    agent.stop(Signal::SIGTERM);
    let running = host_state(balancer, bench.topology.interfaces());
    let dry = agent.cli(&["detach", "--dry-run"]);
    assert_eq!(dry.code, 0, "{dry:?}");
    assert_eq!(host_state(balancer, bench.topology.interfaces()), running, "--dry-run");
    assert!(bpffs.join("maps/TABLE").exists(), "--dry-run");
    drop(bench.connect(Family::V4, 5..10));
    let detached = agent.cli(&["detach"]);
    assert_eq!(detached.code, 0, "{detached:?}");
    assert_eq!(host_state(balancer, bench.topology.interfaces()), before);
    assert!(!bpffs.exists(), "{detached:?}");
    let again = agent.cli(&["detach"]);
    assert_eq!(again.code, 0, "nothing is left, and that is fine: {again:?}");
    // The state stays: the next agent goes on from it.
    agent.run();
    agent.wait_ready();
    drop(bench.connect(Family::V4, 0..5));
}

/// Runs another agent with some of the first one's places, to its end.
#[track_caller]
fn second(bench: &Bench, first: &Agent<'_>, own: &[&str]) -> canary_tests::agent::Output {
    let other = Agent::prepare(
        &bench.topology.balancer,
        &AgentOptions::native(&bench.topology),
        &bench.services(""),
    );
    let read = |path: &Path| fs::read_to_string(path).expect("a configuration");
    let (mine, theirs) = (read(&other.config()), read(&first.config()));
    let line = |text: &str, key: &str| {
        let start = format!("{key} = ");
        text.lines().find(|line| line.starts_with(&start)).expect("the key").to_owned()
    };
    let mut text = mine.clone();
    for key in ["socket", "state_dir", "bpffs"] {
        if !own.contains(&key) {
            text = text.replace(&line(&mine, key), &line(&theirs, key));
        }
    }
    fs::write(other.config(), text).expect("a configuration");
    let mut command = bench.topology.balancer.command(binary::locate("canary-agent"));
    command.arg("--config").arg(other.config()).arg("run");
    finish(command)
}

#[test]
fn a_second_agent_is_refused_and_changes_nothing() {
    if !host::ready("a_second_agent_is_refused_and_changes_nothing") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)]);
    let agent = bench.agent("");
    agent.split(SHOP, "v2", "30%");
    let mut pool = bench.connect(Family::V4, 0..20);
    let state = || {
        let host = host_state(&bench.topology.balancer, bench.topology.interfaces());
        format!("{}{host}", settled(&agent.status()))
    };
    let before = state();
    for (own, names) in [
        (&["socket", "state_dir"][..], "bpffs"),
        (&["socket", "bpffs"], "state_dir"),
        (&["state_dir", "bpffs"], "agent.sock"),
        (&[], "another agent"),
    ] {
        let output = second(&bench, &agent, own);
        assert_eq!(output.code, 1, "with its own {own:?}: {output:?}");
        let told = output.stderr.contains("another agent") && output.stderr.contains(names);
        assert!(told, "with its own {own:?}: {output:?}");
        assert_eq!(state(), before, "with its own {own:?}");
        pool.assert_where_they_were("beside a second agent");
    }
    // With places of its own, it still finds a program on the interfaces.
    let output = second(&bench, &agent, &["socket", "state_dir", "bpffs"]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.stderr.contains("another XDP program"), "{output:?}");
    assert!(output.stderr.contains("--replace"), "{output:?}");
    assert_eq!(state(), before, "with places of its own");
    pool.assert_where_they_were("beside a second agent");
}
