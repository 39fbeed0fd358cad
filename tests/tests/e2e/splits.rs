//! The share of connections that a version gets is the one that was asked for.

use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    stats::assert_share,
    topology::Family,
};

use crate::support::{Bench, ECHO, Transport, Way, of_version, service, version};

/// New connections for each share.
const TRIALS: u32 = 4_000;

/// Shares, in the order in which they are set.
const SHARES: [(&str, f64); 7] = [
    ("0", 0.0),
    ("0.1%", 0.001),
    ("1%", 0.01),
    ("5%", 0.05),
    ("50%", 0.5),
    ("99.9%", 0.999),
    ("100%", 1.0),
];

const VERSIONS: [(&str, u8); 2] = [("stable", 3), ("v2", 2)];

/// Connections that `status` has counted for a version.
fn counted(agent: &Agent<'_>, name: &str) -> u64 {
    version(&agent.status(), ECHO, name).connections
}

fn exercise(test: &str, way: Way, family: Family, stickiness: &str) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &VERSIONS);
    let mut options = AgentOptions::native(&bench.topology);
    // Each connection of `nat` takes two entries until it has been closed for a while.
    options.extra = "[agent.capacity]\nflows = 262144".to_owned();
    let services = bench.services(&format!("stickiness = {stickiness:?}"));
    let agent = Agent::start(&bench.topology, &options, &services);
    let mut before: Vec<String> = Vec::new();
    for ((text, share), port) in SHARES.into_iter().zip(20_000..) {
        let report = agent.split(ECHO, "v2", text);
        let status = agent.status();
        let v2 = version(&status, ECHO, "v2");
        let bucket = 1.0 / f64::from(service(&status, ECHO).buckets);
        assert!((v2.in_force - share).abs() <= bucket, "{text}: {} in force", v2.in_force);
        assert!((v2.asked - share).abs() < 1e-9, "{text}: {} asked", v2.asked);
        let stated = report.versions.iter().find(|v| v.name == "v2").expect("v2");
        assert_eq!(stated.in_force, v2.in_force, "{text}");
        assert_eq!(
            f64::from(v2.buckets) / f64::from(service(&status, ECHO).buckets),
            v2.in_force,
            "{text}"
        );
        let counters = ["stable", "v2"].map(|name| version(&status, ECHO, name).connections);

        let names = bench.survey(family, Transport::Tcp, 0..TRIALS, port);
        let hits = of_version(&names, "v2");
        if share == 0.0 || share == 1.0 {
            assert_eq!(hits, share as u64 * u64::from(TRIALS), "{text}");
        }
        assert_share(&format!("{test}, {text}"), hits, u64::from(TRIALS), share);
        println!("{test}: asked {text}, in force {}, {hits} of {TRIALS}", v2.in_force);
        for (name, (counter, seen)) in ["stable", "v2"]
            .into_iter()
            .zip(counters.into_iter().zip([u64::from(TRIALS) - hits, hits]))
        {
            assert_eq!(counted(&agent, name) - counter, seen, "{text}: connections of {name}");
        }
        if stickiness == "client" && !before.is_empty() {
            let left = before
                .iter()
                .zip(&names)
                .filter(|(then, now)| then.starts_with("v2") && !now.starts_with("v2"));
            assert_eq!(left.count(), 0, "{text}: clients that v2 had have left it");
        }
        before = names;
    }
    agent.split(ECHO, "v2", "0");
    let names = bench.survey(family, Transport::Tcp, 0..TRIALS, 20_100);
    assert_eq!(of_version(&names, "v2"), 0, "back at 0");
}

#[test]
fn shares_are_the_asked_ones_by_connection_in_nat() {
    let test = "shares_are_the_asked_ones_by_connection_in_nat";
    exercise(test, Way::NatTwoArmed, Family::V4, "connection");
}

#[test]
fn shares_are_the_asked_ones_by_client_in_dsr() {
    exercise("shares_are_the_asked_ones_by_client_in_dsr", Way::Dsr, Family::V6, "client");
}

#[test]
fn shares_are_the_asked_ones_by_client_in_nat_on_ipv6() {
    let test = "shares_are_the_asked_ones_by_client_in_nat_on_ipv6";
    exercise(test, Way::NatOneArmed, Family::V6, "client");
}

#[test]
fn shares_are_the_asked_ones_by_connection_in_dsr_on_ipv4() {
    let test = "shares_are_the_asked_ones_by_connection_in_dsr_on_ipv4";
    exercise(test, Way::Dsr, Family::V4, "connection");
}

#[test]
fn udp_shares_and_the_measured_share_are_the_asked_ones_in_nat() {
    udp("udp_shares_and_the_measured_share_are_the_asked_ones_in_nat", Way::NatOneArmed);
}

#[test]
fn udp_shares_and_the_measured_share_are_the_asked_ones_in_dsr() {
    udp("udp_shares_and_the_measured_share_are_the_asked_ones_in_dsr", Way::Dsr);
}

fn udp(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &VERSIONS);
    for family in Family::ALL {
        udp_shares(&bench, family);
    }
}

fn udp_shares(bench: &Bench, family: Family) {
    for (text, share) in SHARES {
        // A first split, so that no bucket has moved.
        let text = if share == 0.0 { "0%" } else { text };
        let agent = bench.agent(&format!("split = {{ v2 = {text:?} }}"));
        let names = bench.survey(family, Transport::Udp, 0..TRIALS, 20_000);
        let hits = of_version(&names, "v2");
        assert_share(text, hits, u64::from(TRIALS), share);
        let status = agent.status();
        let v2 = version(&status, ECHO, "v2");
        if bench.way == Way::Dsr {
            // A datagram of an untracked bucket leaves no trace: nobody knows which is a flow's first.
            assert_eq!(v2.connections, 0, "{text}");
            continue;
        }
        // An ask that is repeated is no new flow.
        assert_eq!(v2.connections, hits, "{text}");
        assert_eq!(version(&status, ECHO, "stable").connections, u64::from(TRIALS) - hits);
        // Of the last ten seconds only: all of them, unless the host is slow.
        let measured = v2.measured.expect("a measured share");
        assert_share(&format!("measured at {text}"), hits, u64::from(TRIALS), measured);
        for backend in status.services.iter().flat_map(|s| &s.versions).flat_map(|v| &v.backends) {
            assert_eq!(backend.state, "up", "{backend:?}");
        }
    }
}
