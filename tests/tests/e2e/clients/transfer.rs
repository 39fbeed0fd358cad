//! iperf3: streams of TCP and UDP in both directions.

use canary_tests::{
    agent::{Agent, AgentOptions},
    netns::Namespace,
    topology::Family,
};
use serde_json::Value;

use super::{
    Came, Client, KEYS, Mode, Running, assert_only, clients, in_every_mode, option, ready, run,
    wait_served,
};

/// Port of iperf3.
const PORT: u16 = 5201;
const SERVICE: &str = "iperf";

/// Bytes of a stream of TCP, far more than what is under way at its end, which its receiver does not
/// count.
const TCP_BYTES: u64 = 10_000_000;

/// Bytes of each socket's buffers, as far as any host allows.
const WINDOW: &str = "200K";

/// Streams of UDP: a datagram's bytes, and how many there are. All of them fit into the smallest
/// queue on their way, so that none is lost where the host has no time for them. The second ones
/// are in fragments; that those must be smaller where they are wrapped, the client knows from its
/// stream of TCP.
const DATAGRAMS: [(u64, u64); 2] = [(1_300, 64), (4_000, 24)];

/// A stream of a client's in a direction, as iperf3 tells of it.
#[track_caller]
fn stream(namespace: &Namespace, family: Family, client: &Client, options: &str) -> Value {
    let line = format!(
        "iperf3 {} --client {} --port {PORT} --bind {} --json {options}",
        option(family),
        family.vip(),
        client.addr
    );
    let said: Value = serde_json::from_str(&run(namespace, &line)).expect("JSON");
    assert_eq!(said.get("error"), None, "{line}: {said}");
    said["end"].clone()
}

#[track_caller]
fn number(of: &Value, path: &str) -> f64 {
    of.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {of}"))
}

#[track_caller]
fn exercise(test: &str, mode: Mode) {
    if !ready(test, &["iperf3"]) {
        return;
    }
    let bench = mode.bench();
    let mut servers = Vec::new();
    for host in &bench.topology.backends {
        // Each bound to its address: it answers datagrams from the one that they came to.
        for addr in Mode::served(host) {
            let line = format!("iperf3 --server --port {PORT} --bind {addr}");
            servers.push(Running::start(host, &line, &[addr], PORT));
        }
    }
    let services = bench.service(SERVICE, PORT, &["tcp", "udp"], KEYS);
    let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &services);
    wait_served(&bench, PORT);
    for family in Family::ALL {
        for client in clients(&bench, &agent, SERVICE, family, 0) {
            let before = Came::to_all(&bench);
            for direction in ["", "--reverse"] {
                let what = format!("{test} {family:?} {} {direction}", client.backend);
                let options = format!("--bytes {TCP_BYTES} --window {WINDOW} {direction}");
                let end = stream(bench.client(), family, &client, &options);
                let sent = number(&end, "/sum_sent/bytes");
                let came = number(&end, "/sum_received/bytes");
                assert!(sent >= TCP_BYTES as f64, "{what}: {end}");
                assert!(came >= 0.9 * TCP_BYTES as f64, "{what}: {end}");
                for (length, count) in DATAGRAMS {
                    let options = format!(
                        "--udp --length {length} --blockcount {count} --bitrate 20M --window \
                         {WINDOW} {direction}"
                    );
                    let end = stream(bench.client(), family, &client, &options);
                    assert!(number(&end, "/sum/packets") >= count as f64, "{what}: {end}");
                    assert!(number(&end, "/sum/lost_packets") == 0.0, "{what} {length}: {end}");
                }
            }
            assert_only(&bench, &before, &client.backend, test);
        }
    }
}

in_every_mode!(exercise:
    iperf3_streams_through_nat,
    iperf3_streams_through_one_armed_nat,
    iperf3_streams_through_dsr,
    iperf3_streams_through_ipip,
    iperf3_streams_through_gue
);
