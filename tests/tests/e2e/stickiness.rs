//! Who is kept together, and who is spread.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
    server::ECHO_PORT,
    stats::assert_share,
    topology::Family,
};

use crate::support::{Bench, ECHO, Transport, Way, of_version};

/// Connections of the one client.
const CONNECTIONS: u16 = 1_000;

/// A second port of the service, translated to the same backends.
const OTHER_PORT: u16 = 8007;

const VERSIONS: [(&str, u8); 2] = [("stable", 3), ("v2", 2)];

const HALF: &str = "split = { v2 = \"50%\" }";

fn ports(client: IpAddr, ports: std::ops::Range<u16>) -> impl Iterator<Item = SocketAddr> {
    ports.map(move |port| SocketAddr::new(client, port))
}

fn only(names: &[String]) -> Result<&str, HashSet<&String>> {
    let all: HashSet<&String> = names.iter().collect();
    if all.len() == 1 { Ok(&names[0]) } else { Err(all) }
}

#[test]
fn a_client_stays_with_one_backend_on_all_ports_and_vips() {
    if !host::ready("a_client_stays_with_one_backend_on_all_ports_and_vips") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &VERSIONS);
    let others: [IpAddr; 2] = [
        Ipv4Addr::new(10, 1, 0, 101).into(),
        Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x101).into(),
    ];
    let text = bench
        .service(ECHO, ECHO_PORT, &["tcp", "udp"], &format!("{HALF}\nstickiness = \"client\""))
        .replacen("ports = [", &format!("ports = [\"tcp/{OTHER_PORT}\", "), 1)
        .replacen("vip = [", &format!("vip = [\"{}\", \"{}\", ", others[0], others[1]), 1);
    let _agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &text);
    for (family, other) in Family::ALL.into_iter().zip(others) {
        let client = family.client(7);
        let places = [
            (family.vip(), ECHO_PORT),
            (family.vip(), OTHER_PORT),
            (other, ECHO_PORT),
            (other, OTHER_PORT),
        ];
        let mut names = Vec::new();
        for ((vip, port), first) in places.into_iter().zip([20_000, 22_000, 24_000, 26_000]) {
            let sources = ports(client, first..first + CONNECTIONS / 4);
            names.extend(bench.ask(sources, Transport::Tcp, SocketAddr::new(vip, port)));
        }
        assert_eq!(names.len(), usize::from(CONNECTIONS));
        let name = only(&names).expect("one backend").to_owned();
        // UDP is steered together with TCP.
        let to = SocketAddr::new(other, ECHO_PORT);
        let asked = bench.ask(ports(client, 28_000..28_100), Transport::Udp, to);
        assert_eq!(only(&asked), Ok(name.as_str()), "{family:?}");
        // Others are elsewhere, each on one backend.
        let spread = bench.survey(family, Transport::Tcp, 0..200, 30_000);
        assert_eq!(spread.iter().collect::<HashSet<_>>().len(), 5, "{family:?}");
        assert_eq!(bench.survey(family, Transport::Udp, 0..200, 31_000), spread, "{family:?}");
    }
}

#[test]
fn a_client_stays_with_one_backend_in_dsr() {
    if !host::ready("a_client_stays_with_one_backend_in_dsr") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    let _agent = bench.agent(&format!("{HALF}\nstickiness = \"client\""));
    for family in Family::ALL {
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        let sources = ports(family.client(7), 20_000..20_000 + CONNECTIONS);
        let names = bench.ask(sources, Transport::Tcp, to);
        only(&names).expect("one backend");
        let spread = bench.survey(family, Transport::Tcp, 0..200, 30_000);
        assert_eq!(spread.iter().collect::<HashSet<_>>().len(), 5, "{family:?}");
    }
}

#[test]
fn a_subnet_stays_together() {
    if !host::ready("a_subnet_stays_together") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    let _agent = bench.agent(&format!("{HALF}\nstickiness = \"subnet\""));
    let networks = 60_u16;
    for family in Family::ALL {
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        let mut backends = HashSet::new();
        for network in 0..networks {
            let hosts = (0..10_u16).map(|host| {
                let address: IpAddr = match family {
                    Family::V4 => {
                        let [high, low] = network.to_be_bytes();
                        Ipv4Addr::new(10, 64 + high, low, 25 * host as u8 + 1).into()
                    }
                    // The /56 ends in the middle of the fourth group.
                    Family::V6 => {
                        let fourth = (network << 8) | (host * 25);
                        Ipv6Addr::new(0xfd00, 9, 1, fourth, host, 0, 0, 1).into()
                    }
                };
                SocketAddr::new(address, 20_000 + host)
            });
            let names = bench.ask(hosts, Transport::Tcp, to);
            let name = only(&names).unwrap_or_else(|all| panic!("{family:?} {network}: {all:?}"));
            backends.insert(name.to_owned());
        }
        assert_eq!(backends.len(), 5, "{family:?}: {networks} networks are spread");
    }
}

#[test]
fn connections_of_one_client_are_spread() {
    if !host::ready("connections_of_one_client_are_spread") {
        return;
    }
    let bench = Bench::new(Way::NatOneArmed, &VERSIONS);
    let _agent = bench.agent(HALF);
    for family in Family::ALL {
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        let sources = ports(family.client(7), 20_000..20_000 + CONNECTIONS);
        let names = bench.ask(sources, Transport::Tcp, to);
        let hits = of_version(&names, "v2");
        assert_share(&format!("{family:?}"), hits, u64::from(CONNECTIONS), 0.5);
        for backend in &bench.topology.backends {
            let hits = names.iter().filter(|name| **name == backend.name).count() as u64;
            let share = if backend.version == "v2" { 0.25 } else { 0.5 / 3.0 };
            assert_share(&backend.name, hits, u64::from(CONNECTIONS), share);
        }
    }
}
