//! QUIC: connections that are open stay, new ones follow a change at once.

use std::net::SocketAddr;

use canary_tests::{
    agent::{Agent, AgentOptions},
    client::version_of,
    host,
    topology::{Family, Options, Topology},
};

use crate::{
    quic_peer::{QUIC_PORT, QuicClients, QuicConnection, QuicServer, Trust},
    support::{Bench, Way, service},
};

const SERVICE: &str = "quic";

/// Connections of each family that are opened at each share, and kept.
const NEW: u32 = 5;

/// Bytes of a request: some dozens of packets in each direction.
const PAYLOAD_BYTES: usize = 50_000;

/// Up and down; at the ends everybody who is new has to be on one version.
const SHARES: [&str; 8] = ["0%", "100%", "0%", "100%", "50%", "1%", "100%", "0%"];

#[track_caller]
fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let versions = [("stable", 3), ("v2", 2)];
    let topology = Topology::new(&match way {
        Way::NatTwoArmed => Options::two_armed(&versions),
        Way::NatOneArmed => Options::one_armed_nat(&versions),
        Way::Dsr => Options::one_armed_dsr(&versions),
    });
    let trust = Trust::new();
    let _quic: Vec<_> =
        topology.backends.iter().map(|host| QuicServer::start(host, &trust)).collect();
    let bench = Bench::on(way, topology);
    // `udp_idle` is far longer than the test takes: nobody waits for it.
    let services = bench.service(SERVICE, QUIC_PORT, &["udp"], "quic = true\nudp_idle = \"10m\"");
    let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &services);
    let clients = QuicClients::new(bench.client(), &trust);
    let payload: Vec<u8> = (0..PAYLOAD_BYTES).map(|i| (i * i) as u8).collect();
    let mut open: Vec<(QuicConnection, &str)> = Vec::new();
    for (share, round) in SHARES.into_iter().zip(0..) {
        agent.split(SERVICE, "v2", share);
        for (on, since) in &open {
            match clients.ask(on, &payload) {
                Ok(server) => {
                    assert_eq!(server, on.server, "{test}, at {share}: one of {since} has moved");
                }
                Err(error) => {
                    panic!("{test}, at {share}: one of {since} to {} is broken: {error}", on.server)
                }
            }
        }
        for family in Family::ALL {
            let to = SocketAddr::new(family.vip(), QUIC_PORT);
            for index in round * NEW..(round + 1) * NEW {
                let new = clients.open(SocketAddr::new(family.client(index), 0), to);
                let expected = match share {
                    "0%" => Some("stable"),
                    "100%" => Some("v2"),
                    _ => None,
                };
                let version = version_of(&new.server);
                assert!(
                    expected.is_none_or(|expected| expected == version),
                    "{test}, at {share}: a new connection is on {}",
                    new.server
                );
                open.push((new, share));
            }
        }
    }
    for (on, since) in &open {
        let server = clients.ask(on, &payload);
        assert_eq!(server.as_ref(), Ok(&on.server), "{test}: one of {since}, at the end");
    }
    let status = agent.status();
    let tracked = service(&status, SERVICE).tracked_buckets;
    assert_eq!(tracked > 0, way == Way::Dsr, "{tracked} buckets are tracked");
}

#[test]
fn quic_connections_stay_and_new_ones_follow_at_once_in_dsr() {
    exercise("quic_connections_stay_and_new_ones_follow_at_once_in_dsr", Way::Dsr);
}

#[test]
fn quic_connections_stay_and_new_ones_follow_at_once_in_nat() {
    exercise("quic_connections_stay_and_new_ones_follow_at_once_in_nat", Way::NatTwoArmed);
}

#[test]
fn quic_connections_stay_and_new_ones_follow_at_once_in_nat_one_armed() {
    let test = "quic_connections_stay_and_new_ones_follow_at_once_in_nat_one_armed";
    exercise(test, Way::NatOneArmed);
}
