//! What `explain` says, happens.

use std::net::SocketAddr;

use canary_agent::api::model::Explain;
use canary_tests::{client, control::Control, host, server::ECHO_PORT, topology::Family};

use crate::support::{Bench, ECHO, Transport, Way};

/// Clients of each family.
const CLIENTS: u32 = 100;

/// Numbers without a pattern (Steele, Lea and Flood, *Fast splittable
/// pseudorandom number generators*, 2014), the same in each run.
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

fn exercise(test: &str, way: Way, stickiness: &str) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    // A first split: where a bucket has just moved, new UDP flows go where old ones are.
    let keys = format!("stickiness = {stickiness:?}\nsplit = {{ v2 = \"30%\" }}");
    let agent = bench.agent(&keys);
    let mut control = Control::open(&agent.socket()).expect("the socket");
    for family in Family::ALL {
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        for (transport, protocol) in [(Transport::Tcp, "tcp"), (Transport::Udp, "udp")] {
            for seed in 0..u64::from(CLIENTS) {
                let random = mix(seed);
                let client = family.client(random as u32);
                let port = 1_024 + (random >> 32) as u16 % 60_000;
                let source = SocketAddr::new(client, port);
                let target = format!(
                    "/v1/services/{ECHO}/explain?from={}&to={}&protocol={protocol}",
                    encoded(source),
                    encoded(to)
                );
                let answer = control.ask("GET", &target, b"").expect("an answer");
                assert_eq!(answer.status, 200, "{target}");
                let explain: Explain = answer.json();
                let names = bench.ask(std::iter::once(source), transport, to);
                let backend = explain.backend.clone().expect("a backend");
                assert_eq!(bench.name_of(&backend), names[0], "{explain:#?}");
                let version = explain.version.as_deref();
                assert_eq!(version, Some(client::version_of(&names[0])), "{explain:#?}");
            }
        }
    }
    // After a change it holds for new connections, and the command says the same as the socket.
    agent.split(ECHO, "v2", "70%");
    let from = SocketAddr::new(Family::V4.client(5), 40_000).to_string();
    let explain: Explain = agent.json(&["explain", ECHO, "--from", &from, "--protocol", "tcp"]);
    let names = bench.survey(Family::V4, Transport::Tcp, 5..6, 40_000);
    assert_eq!(bench.name_of(&explain.backend.expect("a backend")), names[0]);
}

fn encoded(addr: SocketAddr) -> String {
    addr.to_string().replace(':', "%3A").replace('[', "%5B").replace(']', "%5D")
}

#[test]
fn explain_names_the_backend_that_answers_in_nat() {
    let test = "explain_names_the_backend_that_answers_in_nat";
    exercise(test, Way::NatTwoArmed, "connection");
}

#[test]
fn explain_names_the_backend_that_answers_in_dsr() {
    exercise("explain_names_the_backend_that_answers_in_dsr", Way::Dsr, "client");
}
