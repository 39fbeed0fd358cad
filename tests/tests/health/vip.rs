//! `health.via = "vip"`: checks that go the way of the clients' packets.

use std::{collections::BTreeSet, net::SocketAddr};

use canary_agent::api::model::{BackendStatus, Status};
use canary_tests::{
    agent::{Agent, AgentOptions},
    client, host,
    netns::Namespace,
    server::{ECHO_PORT, HTTP_PORT, Server},
    stack,
    topology::{Family, Options, Topology, VIP_V4, VIP_V6},
    wait,
};

use crate::{TIMEOUT, pace};

/// The backend that loses its VIP.
const BARE: &str = "stable-2";

/// The ports of servers that are checked at their own address.
const OWN_PORTS: (u16, u16) = (8080, 8007);

/// Often, and never failed because this machine is busy.
const PATIENT: &str = "interval = \"100ms\", timeout = \"5s\"";

fn service(topology: &Topology, name: &str, port: u16, health: &str, pace: &str) -> String {
    let vips = Family::ALL.map(|family| family.vip().to_string());
    format!(
        "[[service]]\nname = {name:?}\nvip = {vips:?}\nports = \"tcp/{port}\"\nforward = \"dsr\"\n\
         control = \"stable\"\nbuckets = 4096\nhealth = {{ {health}, {pace} }}\n{}\n",
        topology.versions_toml(&Family::ALL, port)
    )
}

/// `http` and `tcp` are checked through the VIP.
fn through_vip(topology: &Topology, pace: &str) -> String {
    service(topology, "http", HTTP_PORT, "type = \"http\", path = \"/\", via = \"vip\"", pace)
        + &service(topology, "tcp", ECHO_PORT, "type = \"tcp\", via = \"vip\"", pace)
}

fn backends<'s>(status: &'s Status, service: &str) -> impl Iterator<Item = &'s BackendStatus> {
    let service = status.services.iter().find(|s| s.name == service).expect("a service");
    service.versions.iter().flat_map(|v| &v.backends)
}

fn is_of(topology: &Topology, backend: &BackendStatus, name: &str) -> bool {
    let host = topology.backends.iter().find(|host| host.name == name).expect("a host");
    host.addrs().contains(&backend.addr.ip())
}

/// Waits until the backends of `services` that are `down` are down with `why`, and all
/// others are up and have passed.
#[track_caller]
fn wait_down(
    agent: &Agent<'_>,
    topology: &Topology,
    services: &[&str],
    down: Option<(&str, &str)>,
) {
    wait::until("the checks", || {
        let status = agent.status();
        for service in services {
            for backend in backends(&status, service) {
                let check = backend.check.clone().unwrap_or_default();
                let message = backend.message.clone().unwrap_or_default();
                let well = match down {
                    Some((name, why)) if is_of(topology, backend, name) => {
                        backend.state == "down" && message.contains(why)
                    }
                    _ => backend.state == "up" && check.passes > 0,
                };
                if !well {
                    return Err(format!("{service}: {backend:?}"));
                }
            }
        }
        assert!(status.alerts.is_empty(), "{:?}", status.alerts);
        Ok(())
    });
}

/// Resets that a host has sent.
fn resets(host: &Namespace) -> Option<u64> {
    stack::counter(host, "Tcp", "OutRsts")
}

/// The servers that 40 clients of a family reach.
#[track_caller]
fn reached(topology: &Topology, family: Family, port: u16) -> BTreeSet<String> {
    let to = SocketAddr::new(family.vip(), port);
    topology.client.run(|| {
        let ask = |n| client::tcp_name(SocketAddr::new(family.client(n), 0), to);
        (0..40).map(|n| ask(n).expect("an answer")).collect()
    })
}

fn bench() -> Topology {
    Topology::new(&Options::one_armed_dsr(&[("stable", 3)]))
}

fn a_backend_without_the_vip(test: &str, options: fn(&Topology) -> AgentOptions) {
    if !host::ready(test) {
        return;
    }
    let topology = bench();
    let mut servers: Vec<Option<Server>> =
        Server::start_all(&topology.backends).into_iter().map(Some).collect();
    let (own_http, own_echo) = OWN_PORTS;
    let _own: Vec<Server> =
        topology.backends.iter().map(|host| Server::start_on(host, own_http, own_echo)).collect();
    let through = ["http", "tcp"];
    let own = "type = \"http\", path = \"/\", via = \"backend\"";
    let text = through_vip(&topology, &pace()) + &service(&topology, "own", own_http, own, &pace());
    let agent = Agent::start(&topology, &options(&topology), &text);
    wait_down(&agent, &topology, &["http", "tcp", "own"], None);
    let everybody = BTreeSet::from(["stable-1", BARE, "stable-3"].map(str::to_owned));
    for family in Family::ALL {
        assert_eq!(reached(&topology, family, ECHO_PORT), everybody);
    }

    // It even sends what is not for it on, which comes back here.
    let bare = topology.backends.iter().find(|host| host.name == BARE).expect("it");
    bare.namespace.sysctl("net/ipv4/ip_forward", "1");
    bare.namespace.sysctl("net/ipv6/conf/all/forwarding", "1");
    bare.namespace.ip(&format!("address del {VIP_V4}/32 dev lo\naddress del {VIP_V6}/128 dev lo"));
    let silence = format!(": no connection within {}ms", TIMEOUT.as_millis());
    wait_down(&agent, &topology, &through, Some((BARE, &silence)));
    let status = agent.status();
    for backend in through.iter().flat_map(|name| backends(&status, name)) {
        if is_of(&topology, backend, BARE) {
            let vip = if backend.addr.is_ipv4() { VIP_V4.to_string() } else { VIP_V6.to_string() };
            let message = backend.message.clone().expect("a message");
            assert!(message.contains(&format!("through the VIP {vip}")), "{message}");
            assert_eq!(backend.buckets, 0);
        }
    }
    wait_down(&agent, &topology, &["own"], None);
    let others = BTreeSet::from(["stable-1", "stable-3"].map(str::to_owned));
    for family in Family::ALL {
        assert_eq!(reached(&topology, family, ECHO_PORT), others);
    }

    bare.namespace
        .ip(&format!("address add {VIP_V4}/32 dev lo\naddress add {VIP_V6}/128 dev lo nodad"));
    wait_down(&agent, &topology, &through, None);
    let at = topology.backends.iter().position(|host| host.name == BARE).expect("it");
    servers[at] = None;
    wait_down(&agent, &topology, &through, Some((BARE, ": can't connect: Connection refused")));
    servers[at] = Some(Server::start(&topology.backends[at]));
    wait_down(&agent, &topology, &through, None);
}

#[test]
fn a_backend_without_the_vip_fails_in_native_mode() {
    let test = "a_backend_without_the_vip_fails_in_native_mode";
    a_backend_without_the_vip(test, AgentOptions::native);
}

#[test]
fn a_backend_without_the_vip_fails_in_generic_mode() {
    let test = "a_backend_without_the_vip_fails_in_generic_mode";
    a_backend_without_the_vip(test, AgentOptions::generic);
}

/// Waits until each check of `services` has passed `least` times, none having failed.
#[track_caller]
fn wait_passed(agent: &Agent<'_>, services: &[&str], least: u64) {
    wait::until("many checks", || {
        let status = agent.status();
        let all = services.iter().flat_map(|name| backends(&status, name));
        let checks: Vec<_> = all.map(|b| b.check.clone().unwrap_or_default()).collect();
        assert!(checks.iter().all(|check| check.failures == 0), "{checks:?}");
        let passes = checks.iter().map(|check| check.passes).min().unwrap_or_default();
        if passes >= least { Ok(()) } else { Err(format!("{passes} passes")) }
    });
}

/// A check is over with an answer's head. What the backend sent behind it, before it knew,
/// arrives at a port that was nobody's once, and the host refused it with a reset.
#[test]
fn the_hosts_own_tcp_does_not_answer_what_comes_after_a_check() {
    if !host::ready("the_hosts_own_tcp_does_not_answer_what_comes_after_a_check") {
        return;
    }
    let topology = bench();
    let _servers = Server::start_all(&topology.backends);
    for host in &topology.backends {
        // A packet takes 12 ms, so those of a window come long after the first.
        let slow = "qdisc add dev eth0 root tbf rate 1mbit burst 1600 latency 1s";
        let mut tc = host.namespace.command("tc");
        let done = tc.args(slow.split(' ')).output().expect("tc runs");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    let mut options = AgentOptions::native(&topology);
    options.extra = "manage_vips = false".to_owned();
    let health = "type = \"http\", path = \"/bytes/20000\", via = \"vip\"";
    let agent =
        Agent::start(&topology, &options, &service(&topology, "http", HTTP_PORT, health, PATIENT));
    wait_passed(&agent, &["http"], 3);
    assert_eq!(resets(&topology.balancer), Some(0));
}

#[test]
fn the_hosts_own_tcp_stays_out_of_it() {
    if !host::ready("the_hosts_own_tcp_stays_out_of_it") {
        return;
    }
    // Where the agent does not put the VIP on the host, its answers are not refused as
    // forgeries: they reach the host's TCP.
    for manage_vips in [true, false] {
        // Of its own: a backend that an agent has left in a handshake as it stopped says so
        // once more a second later, and is rightly refused then.
        let topology = bench();
        let servers = Server::start_all(&topology.backends);
        let mut options = AgentOptions::native(&topology);
        options.extra = format!("manage_vips = {manage_vips}");
        let agent = Agent::start(&topology, &options, &through_vip(&topology, PATIENT));
        wait_passed(&agent, &["http", "tcp"], 10);
        assert_eq!(resets(&topology.balancer), Some(0), "with manage_vips = {manage_vips}");
        // A check of TCP alone is not noticed by the server.
        let asked: Vec<u64> = servers.iter().map(Server::requests).collect();
        assert!(asked.iter().all(|requests| *requests >= 20), "both families: {asked:?}");
    }
}
