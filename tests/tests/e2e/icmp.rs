//! ICMP end to end: what the hosts' own stacks make of the errors that reach them, and echo.

use std::{
    io::{self, ErrorKind},
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use canary_tests::{
    agent::{Agent, AgentOptions},
    client::Connection,
    host,
    netns::Namespace,
    server::HTTP_PORT,
    stack,
    topology::Family,
    wait,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    far::Far,
    support::{Bench, Way},
};

/// A port that nobody listens on.
const CLOSED_PORT: u16 = 7777;

/// Errors that say that a packet is too big which a host has sent.
#[track_caller]
fn too_big_sent(host: &Namespace, family: Family) -> u64 {
    match family {
        Family::V4 => stack::counter(host, "IcmpMsg", "OutType3").unwrap_or(0),
        Family::V6 => stack::counter_v6(host, "Icmp6OutPktTooBigs"),
    }
}

/// A server's packets are too big for a link far behind the balancer; the router there says so to
/// the service's address, and the server whose connection it is hears of it.
#[track_caller]
fn a_narrow_link_is_found(way: Way, test: &str) {
    const BYTES: u64 = 3_000_000;
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 3)]);
    let far = Far::new(&bench);
    let _agent = bench.agent("");
    bench.wait_answered();
    for family in Family::ALL {
        let before = too_big_sent(bench.client(), family);
        let to = SocketAddr::new(family.vip(), HTTP_PORT);
        for nth in 0..4 {
            let came = far.far.run(|| {
                let mut connection = Connection::open_here(Far::addr(family), to)?;
                connection.download(BYTES, None, |_| true)
            });
            let came = came.unwrap_or_else(|error| panic!("{way:?} {family:?} {nth}: {error}"));
            assert_eq!(came, BYTES);
        }
        let errors = too_big_sent(bench.client(), family) - before;
        assert!(errors > 0, "{way:?} {family:?}: no packet was too big");
    }
}

#[test]
fn servers_learn_of_a_narrow_link_far_away_in_nat() {
    a_narrow_link_is_found(Way::NatTwoArmed, "servers_learn_of_a_narrow_link_far_away_in_nat");
}

#[test]
fn servers_learn_of_a_narrow_link_far_away_in_one_armed_nat() {
    a_narrow_link_is_found(
        Way::NatOneArmed,
        "servers_learn_of_a_narrow_link_far_away_in_one_armed_nat",
    );
}

#[test]
fn servers_learn_of_a_narrow_link_far_away_in_dsr() {
    a_narrow_link_is_found(Way::Dsr, "servers_learn_of_a_narrow_link_far_away_in_dsr");
}

/// A backend's host refuses a datagram to a port that nobody has; the client's socket hears of it.
#[test]
fn clients_hear_of_closed_ports_through_translation() {
    if !host::ready("clients_hear_of_closed_ports_through_translation") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2)]);
    let closed = bench.service("closed", CLOSED_PORT, &["udp"], "");
    let services = bench.services("") + &closed;
    let _agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &services);
    bench.wait_answered();
    for family in Family::ALL {
        let to = SocketAddr::new(family.vip(), CLOSED_PORT);
        bench.client().run(|| {
            let socket = UdpSocket::bind(SocketAddr::new(family.client(7), 0)).expect("a socket");
            socket.set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
            socket.connect(to).expect("a route");
            // A host answers so many in a second, and a first one may wait for a neighbour.
            wait::until("the refusal", || {
                // The error may come with the next call, whichever that is.
                let error = socket
                    .send(b"anybody?")
                    .and_then(|_| socket.recv(&mut [0; 16]))
                    .err()
                    .map(|error| error.kind());
                match error {
                    Some(ErrorKind::ConnectionRefused) => Ok(()),
                    other => Err(format!("{family:?}: {other:?}")),
                }
            });
        });
    }
}

/// Sends an echo request to the service's address and reads the reply's payload.
pub(crate) fn ping(from: IpAddr, to: IpAddr, payload: &[u8]) -> io::Result<Vec<u8>> {
    let (domain, protocol, request, reply) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut message = vec![request, 0, 0, 0, 0x12, 0x34, 0, 1];
    message.extend(payload);
    if to.is_ipv4() {
        let sum = canary_tests::notation::checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.send(&message)?;
    loop {
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let got = wait::uninterrupted(|| socket.recv(&mut buffer))?;
        // SAFETY: the kernel has written so many bytes.
        let got: Vec<u8> = buffer[..got].iter().map(|byte| unsafe { byte.assume_init() }).collect();
        // An IPv4 socket of this kind shows the IP header.
        let message = if to.is_ipv4() { &got[usize::from(got[0] & 0xf) * 4..] } else { &got[..] };
        if message[0] == reply && message[4..8] == [0x12, 0x34, 0, 1] {
            return Ok(message[8..].to_vec());
        }
    }
}

#[test]
fn a_services_address_answers_to_echo_requests() {
    if !host::ready("a_services_address_answers_to_echo_requests") {
        return;
    }
    for way in [Way::NatTwoArmed, Way::Dsr] {
        let bench = Bench::new(way, &[("stable", 1)]);
        let agent = bench.agent("");
        bench.wait_answered();
        for family in Family::ALL {
            let payload: Vec<u8> = (0..1200_u16).map(|n| n as u8).collect();
            let answer = bench.client().run(|| ping(family.client(3), family.vip(), &payload));
            assert_eq!(answer.unwrap_or_else(|e| panic!("{way:?} {family:?}: {e}")), payload);
        }
        let status = agent.status();
        let answered = status.reasons.iter().find(|one| one.reason == "answer_echo");
        assert!(answered.is_some_and(|one| one.packets >= 2), "{:?}", status.reasons);
        drop(agent);
    }
}
