//! What is sent arrives unchanged, and every frame is right on the wire.

use std::net::{SocketAddr, UdpSocket};

use canary_tests::{
    agent::{Agent, AgentOptions},
    client::{self, Connection, UdpFlow},
    host, http,
    server::{ECHO_PORT, HTTP_PORT},
    topology::Family,
    wait,
    wire::Watch,
};

use crate::support::{Bench, Way};

/// Bytes of the longest IP packet on the links.
const MTU: usize = 1500;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// Bytes of a name and its newline before an echo: `stable-1`.
const NAME: usize = 9;

/// How much a TCP payload has.
const TCP_BYTES: [usize; 4] = [1, 1_000, 100_000, 10_000_000];

fn payload(bytes: usize) -> Vec<u8> {
    let mut payload = vec![0; bytes];
    http::fill(&mut payload, 0);
    payload
}

/// Bytes of the longest UDP payload that is not fragmented.
fn longest(family: Family) -> usize {
    MTU - 8
        - match family {
            Family::V4 => 20,
            Family::V6 => 40,
        }
}

fn tcp(bench: &Bench, family: Family) {
    let echo = SocketAddr::new(family.vip(), ECHO_PORT);
    let http = SocketAddr::new(family.vip(), HTTP_PORT);
    for (bytes, index) in TCP_BYTES.into_iter().zip(100..) {
        let source = family.client(index);
        let stream = bench.client().run(|| client::connect(SocketAddr::new(source, 0), echo));
        let name = stream.and_then(|stream| client::tcp_echo(stream, &payload(bytes)));
        assert!(name.is_ok(), "{family:?}, {bytes} bytes: {name:?}");
    }
    let mut connection =
        Connection::open(bench.client(), family.client(200), http).expect("a connection");
    let bytes = 10_000_000;
    assert_eq!(connection.download(bytes, None, |_| true).expect("a download"), bytes);
    let body = payload(100_000);
    assert_eq!(connection.post("/", &body).expect("an answer"), body);
}

fn udp(bench: &Bench, family: Family) {
    let to = SocketAddr::new(family.vip(), ECHO_PORT);
    let full = longest(family);
    // The answer is longer by the server's name: the longest one fills a frame.
    for (bytes, index) in [1, 2, 3, 64, 511, 1_000, 1_400, full - NAME].into_iter().zip(300..) {
        let source = SocketAddr::new(family.client(index), 0);
        let flow = UdpFlow::open(bench.client(), source, to).expect("a socket");
        let name = flow.ask(&payload(bytes));
        assert!(name.is_ok(), "{family:?}, {bytes} bytes: {name:?}");
        // And again, on the flow that there is.
        assert_eq!(flow.ask(&payload(bytes)).expect("an answer"), name.expect("a name"));
    }
    // One way, as the answer to a request that fills a frame does not fit into one.
    let asked = || bench.servers.iter().map(canary_tests::server::Server::requests).sum::<u64>();
    let before = asked();
    bench.client().run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(family.client(400), 0)).expect("a socket");
        socket.send_to(&payload(full), to).expect("sent");
    });
    wait::until("a datagram that fills a frame", || {
        if asked() > before { Ok(()) } else { Err("it did not arrive".to_owned()) }
    });
}

#[track_caller]
fn exercise(test: &str, way: Way, generic: bool) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2)]);
    let options = match generic {
        false => AgentOptions::native(&bench.topology),
        true => AgentOptions::generic(&bench.topology),
    };
    let agent = Agent::start(&bench.topology, &options, &bench.services(""));
    let mode = if generic { "generic" } else { "native" };
    for interface in agent.status().interfaces {
        assert_eq!(interface.mode.as_deref(), Some(mode), "{interface:?}");
    }
    let mut watches = vec![("client".to_owned(), Watch::checksums(bench.client(), "eth0"))];
    watches.extend(
        bench
            .topology
            .backends
            .iter()
            .map(|backend| (backend.name.clone(), Watch::checksums(&backend.namespace, "eth0"))),
    );
    for family in Family::ALL {
        tcp(&bench, family);
        udp(&bench, family);
    }
    let reports: Vec<_> =
        watches.into_iter().map(|(place, watch)| (place, watch.finish())).collect();
    for (place, report) in &reports {
        assert_eq!(report.wrong, 0, "{place}: {:#?}", report.errors);
    }
    // 30 MB each way take more than 14,000 full frames; readers may miss some.
    let (client, backends) = reports.split_first().expect("the client's");
    for kind in ["IPv4 TCP", "IPv6 TCP"] {
        client.1.assert_right("client", kind, 5_000);
        assert!(backends.iter().map(|(_, r)| r.count(kind)).sum::<u64>() >= 5_000, "{backends:?}");
    }
    for kind in ["IPv4 UDP", "IPv6 UDP"] {
        client.1.assert_right("client", kind, 16);
        assert!(backends.iter().map(|(_, r)| r.count(kind)).sum::<u64>() >= 17, "{backends:?}");
    }
    let longest = |reports: &[(String, canary_tests::wire::Report)]| {
        reports.iter().map(|(_, report)| report.longest_bytes).max()
    };
    assert_eq!(longest(&reports[..1]), Some(ETHERNET + MTU), "client");
    assert_eq!(longest(backends), Some(ETHERNET + MTU), "backends");
    drop(agent);
}

#[test]
fn payloads_arrive_unchanged_in_nat_two_armed_native() {
    let test = "payloads_arrive_unchanged_in_nat_two_armed_native";
    exercise(test, Way::NatTwoArmed, false);
}

#[test]
fn payloads_arrive_unchanged_in_nat_one_armed_native() {
    let test = "payloads_arrive_unchanged_in_nat_one_armed_native";
    exercise(test, Way::NatOneArmed, false);
}

#[test]
fn payloads_arrive_unchanged_in_dsr_native() {
    exercise("payloads_arrive_unchanged_in_dsr_native", Way::Dsr, false);
}

#[test]
fn payloads_arrive_unchanged_in_nat_two_armed_generic() {
    let test = "payloads_arrive_unchanged_in_nat_two_armed_generic";
    exercise(test, Way::NatTwoArmed, true);
}

#[test]
fn payloads_arrive_unchanged_in_dsr_generic() {
    exercise("payloads_arrive_unchanged_in_dsr_generic", Way::Dsr, true);
}
