//! iperf3: streams of TCP and UDP in both directions.

use std::thread;

use canary_tests::{
    agent::{Agent, AgentOptions},
    netns::Namespace,
    topology::Family,
    wait,
};
use serde_json::Value;

use super::{
    Came, Client, KEYS, Mode, Running, assert_only, clients, command, in_every_mode, option, ready,
    wait_served,
};
use crate::support::{Bench, finish};

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
    wait::until(&line, || {
        let output = finish(command(namespace, &line));
        let said: Value = output.json();
        match said["error"].as_str() {
            None => Ok(said["end"].clone()),
            // With the end of the stream before.
            Some(error) if error.contains("busy") => Err(error.to_owned()),
            Some(error) => panic!("{line}: {error}: {said}"),
        }
    })
}

#[track_caller]
fn number(of: &Value, path: &str) -> f64 {
    of.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {of}"))
}

/// Changes the split all the time that streams of both families take, which stay where they are and
/// lose nothing.
#[track_caller]
fn split_meanwhile(bench: &Bench, agent: &Agent<'_>, test: &str) {
    // So few that a second of them waits for a server without the time to take them.
    const OPTIONS: &str = "--udp --length 1300 --time 2 --bitrate 800K --window";
    let options = format!("{OPTIONS} {WINDOW}");
    let before = Came::to_all_at_rest(bench);
    let hosts = &bench.topology.backends;
    let came = || -> u64 { hosts.iter().map(|host| Came::to(host).datagrams).sum() };
    let mut changes = 0;
    let on = thread::scope(|scope| {
        let mut on = None;
        let streams = Family::ALL.map(|family| {
            let client = clients(bench, agent, SERVICE, family, 1_000).pop().expect("one on v2");
            on = Some(client.backend.clone());
            let (options, before) = (&options, came());
            let stream = scope.spawn(move || stream(bench.client(), family, &client, options));
            // A stream of UDP has a connection of TCP beside it: both are open by now.
            wait::until("the stream", || {
                if came() > before { Ok(()) } else { Err("no datagram has come".to_owned()) }
            });
            stream
        });
        while streams.iter().any(|stream| !stream.is_finished()) {
            agent.split(SERVICE, "v2", if changes % 2 == 0 { "0%" } else { "100%" });
            changes += 1;
        }
        for stream in streams {
            let end = stream.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert!(number(&end, "/sum/packets") > 0.0, "{test}: {end}");
            assert!(number(&end, "/sum/lost_packets") == 0.0, "{test}: {end}");
        }
        on.expect("a backend")
    });
    assert!(changes >= 2, "{test}: {changes} changes");
    // The only one of its version.
    assert_only(bench, &before, &on, test);
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
            let before = Came::to_all_at_rest(&bench);
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
    split_meanwhile(&bench, &agent, test);
}

in_every_mode!(exercise:
    iperf3_streams_through_nat,
    iperf3_streams_through_one_armed_nat,
    iperf3_streams_through_dsr,
    iperf3_streams_through_ipip,
    iperf3_streams_through_gue
);
