//! Backends that are really killed: what is open on them fails, and what is new avoids
//! them within the time that the checks are given.

use std::{
    io::{self, BufRead as _, BufReader},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use canary_tests::{
    agent::{Agent, AgentOptions},
    client::{self, Connection},
    host,
    server::{ECHO_PORT, HTTP_PORT, Server},
    topology::{Family, Options, Topology},
    wait,
};

use crate::{DOWN_WITHIN, pace};

/// The backend that is killed: one of two of control.
const VICTIM: &str = "stable-2";

/// A connection that takes longer is none: a lost packet is sent again after a second.
const OPENED_WITHIN: Duration = Duration::from_millis(800);

/// New connections in a row that are well: at the victim's share of a quarter there is
/// no chance that none of them was meant for it.
const WELL: u32 = 200;

#[derive(Clone, Copy, Debug)]
enum Forward {
    Nat,
    Dsr,
}

#[derive(Clone, Copy, Debug)]
enum Death {
    /// Its server ends; the host refuses connections.
    Server,
    /// The whole host is gone, without a word.
    Host,
}

fn services(topology: &Topology, forward: Forward) -> String {
    let (forward, via) = match forward {
        Forward::Nat => ("nat", "backend"),
        Forward::Dsr => ("dsr", "vip"),
    };
    let vips = Family::ALL.map(|family| family.vip().to_string());
    let pace = pace();
    let service = |name: &str, port: u16| {
        format!(
            "[[service]]\nname = {name:?}\nvip = {vips:?}\nports = \"tcp/{port}\"\n\
             forward = {forward:?}\ncontrol = \"stable\"\nbuckets = 4096\n\
             split = {{ v2 = \"50%\" }}\nhealth = {{ type = \"tcp\", via = {via:?}, {pace} }}\n{}\n",
            topology.versions_toml(&Family::ALL, port)
        )
    };
    service("shop", HTTP_PORT) + &service("echo", ECHO_PORT)
}

/// The name of the server that a new connection reaches.
fn reached(to: SocketAddr) -> io::Result<String> {
    let stream = TcpStream::connect_timeout(&to, OPENED_WITHIN)?;
    stream.set_read_timeout(Some(OPENED_WITHIN))?;
    let mut name = String::new();
    BufReader::new(stream).read_line(&mut name)?;
    Ok(name.trim_end().to_owned())
}

/// Opens connections until [`WELL`] in a row are well; returns when the last began that
/// was not, after `killed`.
#[track_caller]
fn last_failure(topology: &Topology, family: Family, killed: Instant) -> Duration {
    let to = SocketAddr::new(family.vip(), ECHO_PORT);
    let (mut well, mut last) = (0, Duration::ZERO);
    wait::until("new connections to avoid the backend", || {
        topology.client.run(|| {
            while well < WELL {
                let begun = killed.elapsed();
                match reached(to) {
                    Ok(name) if !name.is_empty() && name != VICTIM => well += 1,
                    failed => {
                        (well, last) = (0, begun);
                        return Err(format!("{failed:?}"));
                    }
                }
            }
            Ok(last)
        })
    })
}

fn killed(test: &str, forward: Forward, death: Death) {
    if !host::ready(test) {
        return;
    }
    let versions = [("stable", 2), ("v2", 1)];
    let topology = Topology::new(&match forward {
        Forward::Nat => Options::two_armed(&versions),
        Forward::Dsr => Options::one_armed_dsr(&versions),
    });
    let mut servers: Vec<Option<Server>> =
        Server::start_all(&topology.backends).into_iter().map(Some).collect();
    let agent =
        Agent::start(&topology, &AgentOptions::native(&topology), &services(&topology, forward));
    for family in Family::ALL {
        let victim = topology.backends.iter().position(|host| host.name == VICTIM).expect("it");
        let addr = topology.backends[victim].addr(family);
        let state = || {
            let status = agent.status();
            let backends =
                status.services.iter().flat_map(|s| &s.versions).flat_map(|v| &v.backends);
            let states: Vec<_> =
                backends.filter(|b| b.addr.ip() == addr).map(|b| b.state.clone()).collect();
            states
        };
        let wait_state = |state_of_both: &str| {
            wait::until("the checks", || match state() {
                states if states == [state_of_both; 2] => Ok(()),
                states => Err(format!("{states:?}")),
            });
        };
        wait_state("up");
        let open = |index| {
            let to = SocketAddr::new(family.vip(), HTTP_PORT);
            let mut connection = Connection::open_here(family.client(index), to)?;
            let name = connection.name()?;
            Ok((connection, name))
        };
        let opened: io::Result<Vec<_>> = topology.client.run(|| (0..40).map(open).collect());
        let (on_it, elsewhere): (Vec<_>, Vec<_>) =
            opened.expect("connections").into_iter().partition(|(_, name)| name == VICTIM);
        assert!(!on_it.is_empty() && elsewhere.len() > 10, "{} of 40", on_it.len());

        let namespace = &topology.backends[victim].namespace;
        let killed = Instant::now();
        match death {
            Death::Server => servers[victim] = None,
            Death::Host => namespace.ip("link set eth0 down"),
        }
        let avoided = last_failure(&topology, family, killed);
        println!("{test}, {family:?}: the last new connection to it began after {avoided:?}");
        assert!(avoided < DOWN_WITHIN, "{avoided:?}");
        wait_state("down");
        for (mut connection, _) in on_it {
            let stream = connection.stream();
            stream.set_read_timeout(Some(Duration::from_millis(100))).expect("a socket");
            connection.name().expect_err("its server is dead");
        }
        for (mut connection, name) in elsewhere {
            assert_eq!(connection.name().expect("an answer"), name);
        }
        for index in 100..200 {
            let name = topology.client.run(|| {
                let source = SocketAddr::new(family.client(index), 0);
                client::tcp_name(source, SocketAddr::new(family.vip(), ECHO_PORT))
            });
            assert_ne!(name.expect("an answer"), VICTIM);
        }
        match death {
            Death::Server => servers[victim] = Some(Server::start(&topology.backends[victim])),
            Death::Host => {
                let gateway = match forward {
                    Forward::Nat => ["10.2.0.2", "fd00:2::2"],
                    Forward::Dsr => ["10.1.0.3", "fd00:1::3"],
                };
                let host = &topology.backends[victim];
                // IPv6 addresses go with the link, and routes of both families.
                namespace.ip(&format!(
                    "link set eth0 up\naddress replace {}/64 dev eth0 nodad\n\
                     route replace default via {}\nroute replace ::/0 via {}",
                    host.v6, gateway[0], gateway[1]
                ));
            }
        }
    }
}

#[test]
fn new_connections_avoid_a_killed_server_in_nat() {
    killed("new_connections_avoid_a_killed_server_in_nat", Forward::Nat, Death::Server);
}

#[test]
fn new_connections_avoid_a_killed_server_in_dsr() {
    killed("new_connections_avoid_a_killed_server_in_dsr", Forward::Dsr, Death::Server);
}

#[test]
fn new_connections_avoid_a_dead_host_in_nat() {
    killed("new_connections_avoid_a_dead_host_in_nat", Forward::Nat, Death::Host);
}

#[test]
fn new_connections_avoid_a_dead_host_in_dsr() {
    killed("new_connections_avoid_a_dead_host_in_dsr", Forward::Dsr, Death::Host);
}
