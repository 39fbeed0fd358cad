//! What is no service's traffic passes to the host, and through it, bit for bit.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use canary_tests::{
    client::{self, Connection, UdpFlow},
    host,
    server::{ECHO_PORT, HTTP_PORT},
    topology::{BALANCER_V4, BALANCER_V6, CLIENT_V4, CLIENT_V6, Family, VIP_V4, VIP_V6},
    wait, wire,
    wire::Watch,
};
use etherparse::PacketBuilder;
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto,
        setsockopt, socket, sockopt,
    },
    time::TimeVal,
};

use crate::support::{Bench, Way};

/// A port on which no service is.
const SSH_PORT: u16 = 22;

/// Sends an ICMP or ICMPv6 echo request with a body and reads the answer to it.
///
/// Bodies longer than a frame go in fragments, and so does the answer.
fn echo_request(to: IpAddr, body: &[u8], sequence: u16) -> io::Result<()> {
    let (family, protocol, request, reply, header) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0, 20),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129, 0),
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, Some(protocol))?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(3, 0))?;
    let [high, low] = sequence.to_be_bytes();
    let mut message = vec![request, 0, 0, 0, 0x12, 0x34, high, low];
    message.extend_from_slice(body);
    if to.is_ipv4() {
        // The kernel does it for ICMPv6 only.
        let sum = etherparse::checksum::u32_16bit_word::add_slice(0, &message);
        let sum = etherparse::checksum::u32_16bit_word::ones_complement(sum);
        message[2..4].copy_from_slice(&sum.to_ne_bytes());
    }
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty())?;
    let mut buffer = vec![0; 70_000];
    loop {
        // Others' messages come here too.
        let got = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let answer = buffer[..got].get(header..).unwrap_or_default();
        if answer.len() == message.len() && answer[0] == reply && answer[4..8] == message[4..8] {
            return match answer[8..] == message[8..] {
                true => Ok(()),
                false => Err(io::Error::other("other bytes came back")),
            };
        }
    }
}

fn body(bytes: usize) -> Vec<u8> {
    let mut body = vec![0; bytes];
    canary_tests::http::fill(&mut body, 0);
    body
}

#[track_caller]
fn assert_echo(bench: &Bench, to: IpAddr, bytes: usize) {
    let answer = bench.client().run(|| echo_request(to, &body(bytes), 7));
    assert!(answer.is_ok(), "{bytes} bytes to {to}: {answer:?}");
}

/// A server on the balancer itself: greets, and gives back what it gets.
fn greet(listener: &TcpListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(client::TIMEOUT))?;
    stream.write_all(b"SSH-2.0-test\r\n")?;
    let mut buffer = [0; 4096];
    loop {
        match wait::uninterrupted(|| stream.read(&mut buffer))? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

fn hosts_own_tcp(bench: &Bench, at: IpAddr) {
    let addr = SocketAddr::new(at, SSH_PORT);
    let listener = bench.topology.balancer.run(|| TcpListener::bind(addr)).expect("a port");
    std::thread::scope(|scope| {
        let server = scope.spawn(|| greet(&listener));
        let source = match at {
            IpAddr::V4(_) => Family::V4.client(9),
            IpAddr::V6(_) => Family::V6.client(9),
        };
        let source = SocketAddr::new(source, 0);
        let stream = bench.client().run(|| client::connect(source, addr)).expect("a connection");
        // Greeting and all, it is an echo server with a name.
        let name = client::tcp_echo(stream, &body(100_000)).expect("an echo");
        assert_eq!(name, "SSH-2.0-test", "{at}");
        server.join().expect("the server").expect("the server's connection");
    });
}

fn hosts_own_udp(bench: &Bench, at: IpAddr, source: IpAddr) {
    // Any port: a child process that another test is just starting holds a closed socket,
    // and with it a fixed port, until it has become its program.
    let any = SocketAddr::new(at, 0);
    let server = bench.topology.balancer.run(|| UdpSocket::bind(any)).expect("a port");
    let addr = server.local_addr().expect("its address");
    server.set_read_timeout(Some(client::TIMEOUT)).expect("a timeout");
    let from = bench.client().run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(source, 0))?;
        socket.send_to(b"to the host", addr)?;
        socket.local_addr()
    });
    let mut buffer = [0; 64];
    let got = wait::uninterrupted(|| server.recv_from(&mut buffer));
    let (length, seen) = got.expect("a datagram");
    assert_eq!(&buffer[..length], b"to the host");
    assert_eq!(seen, from.expect("sent"), "the sender is unchanged");
}

fn refused(bench: &Bench, family: Family) {
    for port in [81, 443] {
        let to = SocketAddr::new(family.vip(), port);
        let error = Connection::open(bench.client(), family.client(3), to).expect_err("refused");
        // Only the host's RST gives that, and at once.
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}");
    }
}

/// Packets through the balancer that are no service's: to a backend's own address.
fn forwarded(bench: &Bench, family: Family) {
    for backend in &bench.topology.backends {
        let http = SocketAddr::new(backend.addr(family), HTTP_PORT);
        let source = family.client(11);
        let mut connection = Connection::open(bench.client(), source, http).expect("a connection");
        assert_eq!(connection.name().expect("a name"), backend.name);
        let bytes = 1_000_000;
        assert_eq!(connection.download(bytes, None, |_| true).expect("a download"), bytes);
        let echo = SocketAddr::new(backend.addr(family), ECHO_PORT);
        let flow =
            UdpFlow::open(bench.client(), SocketAddr::new(source, 0), echo).expect("a socket");
        // 4,000 bytes go and come in fragments.
        for bytes in [1, 1_000, 4_000] {
            assert_eq!(flow.ask(&body(bytes)).expect("an answer"), backend.name, "{bytes}");
        }
        assert_echo(bench, backend.addr(family), 4_000);
    }
}

fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 1), ("v2", 1)]);
    let agent = bench.agent("split = { v2 = \"50%\" }");
    let before = agent.status();
    for family in Family::ALL {
        let (balancer, client): (IpAddr, IpAddr) = match family {
            Family::V4 => (BALANCER_V4.into(), CLIENT_V4.into()),
            Family::V6 => (BALANCER_V6.into(), CLIENT_V6.into()),
        };
        for bytes in [0, 56, 1_000, 4_000] {
            assert_echo(&bench, balancer, bytes);
            assert_echo(&bench, family.vip(), bytes);
        }
        refused(&bench, family);
        for at in [balancer, family.vip()] {
            hosts_own_tcp(&bench, at);
            hosts_own_udp(&bench, at, client);
            hosts_own_udp(&bench, at, family.client(4));
        }
        // Whom the client has forgotten, it asks for again: ARP, neighbour discovery.
        bench.client().ip("neigh flush dev eth0");
        assert_echo(&bench, family.vip(), 56);
        if way == Way::NatTwoArmed {
            forwarded(&bench, family);
        }
    }
    let after = agent.status();
    for (before, after) in before.services.iter().zip(&after.services) {
        for (before, after) in before.versions.iter().zip(&after.versions) {
            assert_eq!(before.connections, after.connections, "none of it was steered");
        }
    }
    for reason in after.reasons.iter().filter(|reason| reason.verdict == "drop") {
        assert_eq!(reason.packets, 0, "{reason:?}");
    }
}

#[test]
fn what_is_no_services_works_as_without_nat() {
    exercise("what_is_no_services_works_as_without_nat", Way::NatTwoArmed);
}

#[test]
fn what_is_no_services_works_as_without_dsr() {
    exercise("what_is_no_services_works_as_without_dsr", Way::Dsr);
}

/// Name of a frame that says it is IPv4 and is too short for it.
const CUT_HEADER: &str = "a cut header";

/// Frames of every kind that is not steered, each with a mark of its own.
fn unsteered(from: [u8; 6], to: [u8; 6]) -> Vec<(&'static str, Vec<u8>)> {
    let link = || PacketBuilder::ethernet2(from, to);
    let (client, vip) = (CLIENT_V4.octets(), VIP_V4.octets());
    let (client6, vip6) = (CLIENT_V6.octets(), VIP_V6.octets());
    let v4 = || link().ipv4(client, vip, 17);
    let v6 = || link().ipv6(client6, vip6, 17);
    let mut frames = Vec::new();
    macro_rules! frame {
        ($name:expr, $builder:expr) => {{
            let mut frame = Vec::new();
            $builder.write(&mut frame, concat!("mark: ", $name).as_bytes()).expect("a frame");
            frames.push(($name, frame));
        }};
    }
    frame!("TCP to another port of the VIP", v4().tcp(1_000, 8_080, 1, 1_000).syn());
    frame!("TCP over IPv6 to another port", v6().tcp(1_000, 8_080, 1, 1_000).syn());
    frame!("UDP to another port of the VIP", v4().udp(1_000, 53));
    frame!("UDP over IPv6 to another port", v6().udp(1_000, 53));
    frame!("UDP to a TCP service's port", v4().udp(1_000, HTTP_PORT));
    // The balancer answers those to the VIP itself.
    frame!(
        "ICMP echo request",
        link().ipv4(client, BALANCER_V4.octets(), 17).icmpv4_echo_request(1, 2)
    );
    frame!(
        "ICMPv6 echo request",
        link().ipv6(client6, BALANCER_V6.octets(), 17).icmpv6_echo_request(1, 2)
    );
    frame!(
        "TCP to the service's port of another address",
        link().ipv4(client, BALANCER_V4.octets(), 17).tcp(1_000, HTTP_PORT, 1, 1_000).syn()
    );
    // A later fragment, which has no ports; a first one of which there are more.
    for (name, offset) in [("a later fragment", 0x20b9_u16), ("a first fragment", 0x2000)] {
        let mut frame = Vec::new();
        let builder = link().ipv4(client, BALANCER_V4.octets(), 17).udp(1_000, HTTP_PORT);
        builder.write(&mut frame, name.as_bytes()).expect("a frame");
        frame[20..22].copy_from_slice(&offset.to_be_bytes());
        let sum = etherparse::Ipv4HeaderSlice::from_slice(&frame[14..]).expect("a header");
        let sum = sum.to_header().calc_header_checksum();
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frames.push((name, frame));
    }
    // Not IP at all: an EtherType for experiments (IEEE 802), and one that is too short.
    for (name, bytes) in [
        ("an unknown EtherType", &b"\x88\xb5 mark: unknown"[..]),
        (CUT_HEADER, b"\x08\x00\x45\x00mark"),
    ] {
        frames.push((name, [&to[..], &from, bytes].concat()));
    }
    // GRE over IPv4: neither TCP nor UDP.
    let mut gre = Vec::new();
    let ip = etherparse::Ipv4Header::new(8, 17, etherparse::IpNumber(47), client, vip);
    link()
        .ip(etherparse::IpHeaders::Ipv4(ip.expect("a header"), Default::default()))
        .write(&mut gre, etherparse::IpNumber(47), b"GRE mark")
        .expect("a frame");
    frames.push(("GRE", gre));
    frames
}

#[test]
fn frames_that_are_not_steered_pass_bit_for_bit() {
    if !host::ready("frames_that_are_not_steered_pass_bit_for_bit") {
        return;
    }
    for way in [Way::NatTwoArmed, Way::Dsr] {
        let bench = Bench::new(way, &[("stable", 1)]);
        let agent = bench.agent("");
        let to = wire::mac(&bench.topology.balancer, "eth0");
        let from = wire::mac(bench.client(), "eth0");
        let mut frames = unsteered(from, to);
        if way == Way::Dsr {
            // A switch with netfilter drops what is no IPv4 header itself.
            frames.retain(|(name, _)| *name != CUT_HEADER);
        }
        let watch = Watch::frames(&bench.topology.balancer, "eth0");
        for (_, frame) in &frames {
            wire::send(bench.client(), "eth0", frame);
        }
        // Frames stay in order: behind this answer, all have come.
        wait::until_within(Duration::from_secs(5), "an echo", || {
            let answer = bench.client().run(|| echo_request(BALANCER_V4.into(), b"last", 99));
            answer.map_err(|error| error.to_string())
        });
        let seen = watch.finish().frames;
        for (name, frame) in &frames {
            assert!(seen.contains(frame), "{way:?}: {name} did not pass as it was: {frame:02x?}");
        }
        drop(agent);
    }
}
