//! Frames and packets as networks make them: VLAN tags, fragments, extension headers.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use canary_agent::api::model::Status;
use canary_tests::{
    agent::{Agent, AgentOptions},
    client::{self, Connection, UdpFlow},
    host, http,
    netns::Namespace,
    server::{ECHO_PORT, HTTP_PORT, Server},
    topology::{CLIENT_V6, Family, Options, VIP_V6},
    wait,
    wire::{self, Watch},
};
use etherparse::PacketBuilder;
use nix::sys::signal::Signal;

use crate::support::{Bench, ECHO, Transport, Way, finish, of_version};

const VERSIONS: [(&str, u8); 2] = [("stable", 2), ("v2", 1)];

/// Bytes of a name and its newline before an echo: `stable-1`.
const NAME: usize = 9;

fn payload(bytes: usize) -> Vec<u8> {
    let mut payload = vec![0; bytes];
    http::fill(&mut payload, 0);
    payload
}

/// Packets that were counted for a reason.
fn counted(status: &Status, reason: &str) -> u64 {
    let found = status.reasons.iter().find(|one| one.reason == reason);
    found.unwrap_or_else(|| panic!("no reason {reason}")).packets
}

/// Nothing was dropped.
#[track_caller]
fn assert_nothing_dropped(status: &Status) {
    for reason in status.reasons.iter().filter(|reason| reason.verdict == "drop") {
        assert_eq!(reason.packets, 0, "{reason:?}");
    }
}

/// Packets to backends that this agent has counted.
fn sent(status: &Status) -> u64 {
    let versions = status.services.iter().flat_map(|service| &service.versions);
    versions.flat_map(|version| &version.backends).map(|backend| backend.packets).sum()
}

/// Every kind of traffic, of both families.
fn traffic(bench: &Bench) {
    for family in Family::ALL {
        for transport in [Transport::Tcp, Transport::Udp] {
            let names = bench.survey(family, transport, 0..40, 20_000);
            let moved = of_version(&names, "v2");
            assert!((1..40).contains(&moved), "{family:?} {transport:?}: {names:?}");
        }
        let to = SocketAddr::new(family.vip(), HTTP_PORT);
        let mut connection =
            Connection::open(bench.client(), family.client(200), to).expect("a connection");
        let bytes = 1_000_000;
        assert_eq!(connection.download(bytes, None, |_| true).expect("a download"), bytes);
        let body = payload(100_000);
        assert_eq!(connection.post("/", &body).expect("an answer"), body);
    }
}

/// Whether the kernel makes a device for a VLAN.
fn makes_vlans() -> bool {
    let namespace = Namespace::new("vlan");
    namespace.ip("link add below type veth peer name other");
    let mut command = namespace.command("ip");
    command.args(["link", "add", "link", "below", "name", "v", "type", "vlan", "id", "7"]);
    finish(command).code == 0
}

fn vlans(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    if !makes_vlans() {
        host::leave_to_vm(test, "the kernel has no VLANs (CONFIG_VLAN_8021Q)");
        return;
    }
    let options = match way {
        Way::Dsr => Options::one_armed_dsr(&VERSIONS),
        Way::NatTwoArmed => Options::two_armed(&VERSIONS),
        Way::NatOneArmed => Options::one_armed_nat(&VERSIONS),
    };
    let bench = Bench::of(way, &options.tagged(), Server::start);
    let mut agent = bench.agent("split = { v2 = \"40%\" }");
    bench.wait_answered();
    let watches: Vec<_> = bench
        .topology
        .backends
        .iter()
        .map(|backend| Watch::checksums(&backend.namespace, "eth0.100.10"))
        .collect();
    traffic(&bench);
    // The next agent finds the way back to clients that have begun under this one.
    let mut pool = bench.connect(Family::V4, 300..310);
    pool.open.extend(bench.connect(Family::V6, 300..310).open);
    agent.stop(Signal::SIGKILL);
    pool.assert_where_they_were("without an agent");
    agent.run();
    agent.wait_ready();
    pool.assert_where_they_were("with another agent");
    let status = agent.status();
    // Four packets at least of each connection, one of each datagram; how many acknowledgements there
    // are of a download is the receiver's affair.
    assert!(sent(&status) >= 2 * 40 * (4 + 1), "the program steers: {status:#?}");
    assert_nothing_dropped(&status);
    for (watch, backend) in watches.into_iter().zip(&bench.topology.backends) {
        let report = watch.finish();
        assert_eq!(report.wrong, 0, "{}: {:#?}", backend.name, report.errors);
    }
}

#[test]
fn clients_and_backends_in_vlans_are_steered_in_nat() {
    vlans("clients_and_backends_in_vlans_are_steered_in_nat", Way::NatTwoArmed);
}

#[test]
fn clients_and_backends_in_vlans_are_steered_in_dsr() {
    vlans("clients_and_backends_in_vlans_are_steered_in_dsr", Way::Dsr);
}

/// A host's own server at the service's address, which gets datagrams in fragments too.
fn hosts_own(bench: &Bench, family: Family, bytes: usize) {
    let any = SocketAddr::new(family.vip(), 0);
    let server = bench.topology.balancer.run(|| UdpSocket::bind(any)).expect("a port");
    server.set_read_timeout(Some(client::TIMEOUT)).expect("a timeout");
    let to = server.local_addr().expect("its address");
    let sent = payload(bytes);
    bench.client().run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(family.client(7), 0)).expect("a socket");
        socket.send_to(&sent, to).expect("sent");
    });
    let mut buffer = vec![0; 70_000];
    let got = wait::uninterrupted(|| server.recv_from(&mut buffer));
    let (length, _) = got.expect("a datagram");
    assert!(buffer[..length] == sent, "{family:?}: {length} bytes of {bytes}");
}

fn fragments(test: &str, way: Way, keys: &str) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &VERSIONS);
    let mut agent = bench.agent(&format!("split = {{ v2 = \"40%\" }}\n{keys}"));
    bench.wait_answered();
    let before = sent(&agent.status());
    let mut versions = std::collections::BTreeSet::new();
    for family in Family::ALL {
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        for index in 0..20 {
            let source = SocketAddr::new(family.client(index), 0);
            let flow = UdpFlow::open(bench.client(), source, to).expect("a socket");
            let name = flow.ask(&payload(100)).expect("an answer");
            // The answers are in fragments too.
            for bytes in [1_500, 4_000, 65_000 - NAME] {
                let again = flow.ask(&payload(bytes)).expect("an answer in fragments");
                assert_eq!(again, name, "{family:?}, {bytes} bytes");
            }
            versions.insert(client::version_of(&name).to_owned());
        }
        hosts_own(&bench, family, 4_000);
    }
    assert_eq!(versions.len(), 2, "{versions:?}");
    let status = agent.status();
    // 2, 3 and 44 or 45 fragments a flow.
    assert!(sent(&status) - before >= 2 * 20 * (1 + 2 + 3 + 44), "{status:#?}");
    assert_nothing_dropped(&status);
    assert!(counted(&status, "pass_fragment") >= 4, "{:?}", status.reasons);

    // What plain packets do without goes on without an agent too, and with the next one.
    agent.stop(Signal::SIGKILL);
    datagram_in_fragments(&bench, 100);
    agent.run();
    agent.wait_ready();
    datagram_in_fragments(&bench, 200);
    let kept = agent.folder().join("bpffs/canary/programs");
    let kept = std::fs::read_dir(&kept).expect("a folder").count();
    assert_eq!(kept, 1, "what the earlier agent's program went on with is let go");
}

/// One client of each family has an answer in fragments.
fn datagram_in_fragments(bench: &Bench, index: u32) {
    for family in Family::ALL {
        let source = SocketAddr::new(family.client(index), 0);
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        let flow = UdpFlow::open(bench.client(), source, to).expect("a socket");
        flow.ask(&payload(4_000)).expect("an answer in fragments");
    }
}

#[test]
fn datagrams_in_fragments_arrive_in_nat() {
    fragments("datagrams_in_fragments_arrive_in_nat", Way::NatTwoArmed, "");
}

#[test]
fn datagrams_in_fragments_arrive_in_dsr() {
    fragments("datagrams_in_fragments_arrive_in_dsr", Way::Dsr, "");
}

#[test]
fn datagrams_in_fragments_arrive_where_the_client_decides() {
    fragments(
        "datagrams_in_fragments_arrive_where_the_client_decides",
        Way::Dsr,
        "stickiness = \"client\"",
    );
}

/// The fragments of a datagram with `payload` in units of 800 bytes, in order.
fn cut(family: Family, source: SocketAddr, to: [u8; 6], from: [u8; 6], id: u16) -> Vec<Vec<u8>> {
    const UNIT: usize = 800;
    let vip = SocketAddr::new(family.vip(), ECHO_PORT);
    let payload = payload(3_000);
    let link = PacketBuilder::ethernet2(from, to);
    let builder = match (source.ip(), vip.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => link.ipv4(a.octets(), b.octets(), 64),
        (IpAddr::V6(a), IpAddr::V6(b)) => link.ipv6(a.octets(), b.octets(), 64),
        _ => unreachable!("one family"),
    };
    let mut whole = Vec::new();
    builder.udp(source.port(), vip.port()).write(&mut whole, &payload).expect("a packet");
    let header = if family == Family::V4 { 34 } else { 54 };
    let (head, datagram) = whole.split_at(header);
    let last = datagram.len().div_ceil(UNIT) - 1;
    let frame = |(n, part): (usize, &[u8])| {
        let (mut frame, at, more) = (head.to_vec(), (n * UNIT) as u16, n != last);
        match family {
            Family::V4 => {
                frame[16..18].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
                frame[18..20].copy_from_slice(&id.to_be_bytes());
                let offset = (at / 8) | if more { 0x2000 } else { 0 };
                frame[20..22].copy_from_slice(&offset.to_be_bytes());
                let header = etherparse::Ipv4HeaderSlice::from_slice(&frame[14..]).expect("IPv4");
                let sum = header.to_header().calc_header_checksum();
                frame[24..26].copy_from_slice(&sum.to_be_bytes());
            }
            Family::V6 => {
                frame[18..20].copy_from_slice(&(8 + part.len() as u16).to_be_bytes());
                let next = std::mem::replace(&mut frame[20], 44);
                let [high, low] = (at | u16::from(more)).to_be_bytes();
                let [id_high, id_low] = id.to_be_bytes();
                frame.extend([next, 0, high, low, 0, 0, id_high, id_low]);
            }
        }
        frame.extend(part);
        frame
    };
    datagram.chunks(UNIT).enumerate().map(frame).collect()
}

/// Sends fragments in `order` and says whether their datagram has been answered.
fn answered(bench: &Bench, family: Family, index: u32, order: &[usize]) -> bool {
    let source = SocketAddr::new(family.client(index), 30_000);
    let socket = bench.client().run(|| UdpSocket::bind(source)).expect("a socket");
    let to = wire::mac(&bench.topology.balancer, "eth0");
    let from = wire::mac(bench.client(), "eth0");
    let fragments = cut(family, source, to, from, 1_000 + index as u16);
    for n in order {
        wire::send(bench.client(), "eth0", &fragments[*n]);
    }
    socket.set_read_timeout(Some(client::TIMEOUT)).expect("a timeout");
    let mut buffer = vec![0; 10_000];
    match wait::uninterrupted(|| socket.recv(&mut buffer)) {
        Ok(length) => buffer[..length].ends_with(&payload(3_000)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn fragments_out_of_order_follow_the_first_and_before_it_where_the_client_decides() {
    let test = "fragments_out_of_order_follow_the_first_and_before_it_where_the_client_decides";
    if !host::ready(test) {
        return;
    }
    for keys in ["", "stickiness = \"client\""] {
        let bench = Bench::new(Way::Dsr, &VERSIONS);
        // One service at the address: of several, only the first fragment says which.
        let service = bench.service(ECHO, ECHO_PORT, &["tcp", "udp"], keys);
        let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &service);
        for family in Family::ALL {
            bench.survey(family, Transport::Udp, 0..1, 20_000);
        }
        for (family, index) in Family::ALL.into_iter().zip([10, 20]) {
            assert!(
                answered(&bench, family, index, &[0, 3, 2, 1]),
                "{family:?} {keys}: the first first"
            );
            let early = counted(&agent.status(), "drop_fragment_early");
            let backwards = !keys.is_empty();
            if backwards {
                assert!(answered(&bench, family, index + 1, &[3, 2, 1, 0]), "{family:?} {keys}");
            } else {
                // What comes before it can't be held back, and is dropped.
                assert!(answered(&bench, family, index + 1, &[3, 0, 1, 2, 3]), "{family:?} {keys}");
            }
            let dropped = counted(&agent.status(), "drop_fragment_early") - early;
            assert_eq!(dropped, u64::from(!backwards), "{family:?} {keys}");
        }
    }
}

/// Has a socket's packets carry extension headers of padding: hop-by-hop and destination options.
fn with_options(socket: &impl std::os::fd::AsFd) {
    // linux/in6.h
    const IPV6_HOPOPTS: libc::c_int = 54;
    const IPV6_DSTOPTS: libc::c_int = 59;
    for option in [IPV6_HOPOPTS, IPV6_DSTOPTS] {
        // PadN of six bytes (RFC 8200, 4.2): Linux takes no more than seven for padding.
        let header: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
        // SAFETY: the kernel reads as many bytes as the header has.
        let result = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::IPPROTO_IPV6,
                option,
                header.as_ptr().cast(),
                header.len() as libc::socklen_t,
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }
}

fn extension_headers(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &VERSIONS);
    let agent = bench.agent("split = { v2 = \"40%\" }");
    bench.wait_answered();
    let before = sent(&agent.status());
    let to = SocketAddr::new(VIP_V6.into(), ECHO_PORT);
    let mut watches = Vec::new();
    for backend in &bench.topology.backends {
        watches.push(Watch::frames(&backend.namespace, "eth0"));
    }
    for port in 31_000..31_020 {
        let source = SocketAddr::new(CLIENT_V6.into(), port);
        bench.client().run(|| {
            let socket = UdpSocket::bind(source).expect("a socket");
            with_options(&socket);
            socket.set_read_timeout(Some(client::TIMEOUT)).expect("a timeout");
            let mut buffer = vec![0; 10_000];
            // The second one in fragments, which stand behind the options.
            for bytes in [100, 4_000] {
                socket.send_to(&payload(bytes), to).expect("sent");
                let got = wait::uninterrupted(|| socket.recv_from(&mut buffer));
                let (length, _) = got.expect("an answer");
                assert!(buffer[..length].ends_with(&payload(bytes)), "{bytes} bytes");
            }
            let stream = client::connect(SocketAddr::new(CLIENT_V6.into(), port + 100), to);
            let stream = stream.expect("a connection");
            with_options(&stream);
            client::tcp_echo(stream, &payload(20_000)).expect("an echo");
        });
    }
    let status = agent.status();
    assert!(sent(&status) - before >= 20 * 10, "{status:#?}");
    assert_nothing_dropped(&status);
    // They have arrived with their headers.
    let headers: usize = watches
        .into_iter()
        .flat_map(|watch| watch.finish().frames)
        .filter(|frame| frame.get(12..14) == Some(&[0x86, 0xdd]) && frame.get(20) == Some(&0))
        .filter(|frame| frame[54] == 60 && is_to_service(frame, way, &bench))
        .count();
    assert!(headers >= 20 * 10, "{headers}");
}

/// Whether an IPv6 frame has come by the program: to the service, or translated.
fn is_to_service(frame: &[u8], way: Way, bench: &Bench) -> bool {
    let to = <[u8; 16]>::try_from(&frame[38..54]).ok().map(Ipv6Addr::from);
    match way {
        Way::Dsr => to == Some(VIP_V6),
        Way::NatTwoArmed | Way::NatOneArmed => {
            bench.topology.backends.iter().any(|backend| to == Some(backend.v6))
        }
    }
}

#[test]
fn packets_with_extension_headers_are_steered_in_nat() {
    extension_headers("packets_with_extension_headers_are_steered_in_nat", Way::NatTwoArmed);
}

#[test]
fn packets_with_extension_headers_are_steered_in_dsr() {
    extension_headers("packets_with_extension_headers_are_steered_in_dsr", Way::Dsr);
}
