//! The bench itself: what it builds works, and it leaves nothing behind.
//!
//! Plain routing stands in for the balancer here, so that a failure of the
//! bench is not taken for one of the product.

use std::{
    fs,
    net::SocketAddr,
    os::fd::AsFd as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use canary_agent::plan;
use canary_tests::{
    bpf,
    client::{self, Connection, UdpFlow},
    floor, host,
    loaded::{Loaded, XDP_PASS, XDP_TX},
    names::Host,
    netns::Namespace,
    notation,
    rerun::Rerun,
    server::{ECHO_PORT, HTTP_PORT, Server},
    spawn,
    stream::{FIRST_PORT, PORTS, Route, Stream},
    topology::{Family, Options, Topology},
    wait, wire,
    workdir::Workdir,
    world::{Service, World},
};

/// Every kind of traffic, from a client address, to every backend's own address.
fn exercise(topology: &Topology) {
    let _servers = Server::start_all(&topology.backends);
    for family in Family::ALL {
        for (host, index) in topology.backends.iter().zip(1000..) {
            let source = family.client(index);
            let http = SocketAddr::new(host.addr(family), HTTP_PORT);
            let echo = SocketAddr::new(host.addr(family), ECHO_PORT);

            let mut connection = Connection::open(&topology.client, source, http).unwrap();
            assert_eq!(connection.local_addr().unwrap().ip(), source);
            assert_eq!(connection.name().unwrap(), host.name);
            assert_eq!(connection.download(1_000_000, None, |_| true).unwrap(), 1_000_000);
            assert_eq!(connection.post("/", b"body").unwrap(), b"body");
            // The same connection again: it is kept alive.
            assert_eq!(connection.name().unwrap(), host.name);

            let stream = topology
                .client
                .run(|| client::connect(SocketAddr::new(source, 40_000), echo))
                .unwrap();
            assert_eq!(stream.local_addr().unwrap(), SocketAddr::new(source, 40_000));
            let payload = vec![0x5a; 300_000];
            assert_eq!(client::tcp_echo(stream, &payload).unwrap(), host.name);

            let flow = UdpFlow::open(&topology.client, SocketAddr::new(source, 0), echo).unwrap();
            for payload in [&b""[..], b"x", &[7; 1400]] {
                assert_eq!(flow.ask(payload).unwrap(), host.name);
            }
        }
    }
}

#[test]
fn two_armed_hosts_reach_each_other() {
    if host::ready("two_armed_hosts_reach_each_other") {
        exercise(&Topology::new(&Options::two_armed(&[("stable", 3), ("v2", 2)])));
    }
}

#[test]
fn one_armed_hosts_reach_each_other() {
    if host::ready("one_armed_hosts_reach_each_other") {
        exercise(&Topology::new(&Options::one_armed_dsr(&[("stable", 1), ("v2", 1)])));
    }
}

#[test]
fn a_slowed_download_takes_its_time_and_can_be_left() {
    if !host::ready("a_slowed_download_takes_its_time_and_can_be_left") {
        return;
    }
    let topology = Topology::new(&Options::two_armed(&[("stable", 1)]));
    let _servers = Server::start_all(&topology.backends);
    let to = topology.backend_addrs("stable", &[Family::V4], HTTP_PORT)[0];
    let source = Family::V4.client(5);
    let mut connection = Connection::open(&topology.client, source, to).unwrap();
    let started = std::time::Instant::now();
    connection.download(40_000, Some(100_000), |_| true).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(300));
    let mut pieces = 0;
    let got = connection.download(1 << 40, Some(100_000), |_| {
        pieces += 1;
        pieces < 3
    });
    assert!(got.unwrap() < 1 << 20);
}

#[test]
fn a_closed_port_and_a_stopped_server_are_errors() {
    if !host::ready("a_closed_port_and_a_stopped_server_are_errors") {
        return;
    }
    let topology = Topology::new(&Options::two_armed(&[("stable", 1)]));
    let servers = Server::start_all(&topology.backends);
    let source = Family::V6.client(5);
    let to = topology.backend_addrs("stable", &[Family::V6], HTTP_PORT)[0];
    let mut connection = Connection::open(&topology.client, source, to).unwrap();
    assert_eq!(connection.name().unwrap(), "stable-1");
    assert_eq!(servers[0].requests(), 1);
    drop(servers);
    assert!(connection.name().is_err());
    assert!(Connection::open(&topology.client, source, to).is_err());
}

#[test]
fn everything_goes_away_with_its_value_also_by_a_panic() {
    if !host::ready("everything_goes_away_with_its_value_also_by_a_panic") {
        return;
    }
    let mut seen = Vec::new();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let namespace = Namespace::new("gone");
        let workdir = Workdir::new("gone");
        seen.push(Path::new("/run/netns").join(namespace.name()));
        seen.push(workdir.path().to_path_buf());
        assert!(seen.iter().all(|path| path.exists()));
        std::panic::resume_unwind(Box::new("as a failing test would"));
    }));
    assert!(unwound.is_err());
    for path in seen {
        assert!(!path.exists(), "{} is left", path.display());
    }
}

#[test]
fn a_child_is_in_its_namespace_and_ends_with_its_parent_only() {
    if !host::ready("a_child_is_in_its_namespace_and_ends_with_its_parent_only") {
        return;
    }
    let namespace = Namespace::new("child");
    let mut command = namespace.command("cat");
    command.stdin(Stdio::piped());
    // Started from a thread that ends at once: the child must not end with it.
    let mut child = std::thread::spawn(|| spawn::spawn(command).unwrap()).join().unwrap();
    let inside = fs::read_link(format!("/proc/{}/ns/net", child.id())).unwrap();
    let outside = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(inside, outside);
    assert_eq!(inside, namespace.run(|| fs::read_link("/proc/thread-self/ns/net")).unwrap());
    assert!(child.try_wait().unwrap().is_none());
    drop(child.stdin.take());
    wait::until("cat to end", || match child.try_wait() {
        Ok(Some(_)) => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

#[test]
fn leftovers_of_a_dead_process_are_swept() {
    if !host::ready("leftovers_of_a_dead_process_are_swept") {
        return;
    }
    let mut dead = Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    let name = format!("canary-{}-0-stale", dead.id());
    let added = Command::new("ip").args(["netns", "add", &name]).status().unwrap();
    assert!(added.success());
    let folder = std::env::temp_dir().join(&name);
    fs::create_dir_all(folder.join("bpffs")).unwrap();
    canary_tests::sweep::stale_leftovers();
    assert!(!Path::new("/run/netns").join(&name).exists());
    assert!(!folder.exists());
}

#[test]
fn a_program_that_is_run_again_meets_the_same_packet() {
    if !host::ready("a_program_that_is_run_again_meets_the_same_packet") {
        return;
    }
    const RUNS: u32 = 100;
    let service = |vip: u16, mode: &str| Service {
        vips: vec![Host::Vip(vip).name()],
        mode: mode.to_owned(),
        ..Service::default()
    };
    let services = [service(1, "dsr"), service(2, "nat"), service(3, "ipip"), service(4, "gue")];
    let world = World { service: services.to_vec(), ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}")).unwrap();
    let mut loaded = Loaded::new(&plane.plane, &world.sizes()).unwrap();
    let program = loaded.program().unwrap();
    let indices = &plane.backends[0].1;
    let packets = |loaded: &Loaded| -> u64 {
        loaded.counters(indices).iter().map(|counters| counters.packets).sum()
    };
    for text in [
        "eth client > us / ip client > vip / tcp 40000 > 80 A",
        "eth client > us / svlan 20 / vlan 10 / ip6 client > vip / tcp 40000 > 80 A / \"odd\"",
        "eth client > us / ip client > vip2 / tcp 40000 > 80 S",
        "eth client > us / ip6 client > vip2 / tcp 40000 > 80 S",
        "eth client > us / ip client > vip3 / tcp 40000 > 80 A",
        "eth client > us / ip6 client > vip4 / tcp 40000 > 80 A",
    ] {
        let frame = notation::parse(text).unwrap();
        let once = loaded.run(&frame).unwrap();
        assert_eq!(once.action, XDP_TX, "{text}");
        let before = packets(&loaded);
        let mut rerun = Rerun::new(program.as_fd(), &frame, None).unwrap();
        assert_eq!(rerun.run(RUNS).unwrap().1, XDP_TX, "{text}");
        assert_eq!(rerun.out(), once.frame, "{text}");
        assert_eq!(packets(&loaded) - before, u64::from(RUNS), "{text}");
    }
    // Each is another connection.
    let syn = notation::parse("eth client > us / ip client > vip2 / tcp 40000 > 80 S").unwrap();
    let mut rerun = Rerun::new(program.as_fd(), &syn, Some(34)).unwrap();
    let before = loaded.flows_v4.len();
    rerun.number(2000).unwrap();
    assert_eq!(rerun.run(RUNS).unwrap().1, XDP_TX);
    assert_eq!(loaded.flows_v4.len() - before, 2 * RUNS as usize);
}

#[test]
fn floors_send_back_what_they_know() {
    if !host::ready("floors_send_back_what_they_know") {
        return;
    }
    let mut out = vec![0; 2048];
    for (family, ip) in [(plan::Family::V4, "ip"), (plan::Family::V6, "ip6")] {
        let frame = |port: u16| {
            let text = format!("eth client > us / {ip} client > vip / tcp {port} > 80 A");
            notation::parse(&text).unwrap()
        };
        let known = frame(1024);
        let mut back = known.clone();
        back[..6].copy_from_slice(&Host::Client(1).mac());
        back[6..12].copy_from_slice(&Host::Us.mac());
        let swap = floor::swap().unwrap();
        let look_up = floor::swap_and_look_up(family, std::slice::from_ref(&known)).unwrap();
        for program in [&swap, &look_up] {
            let run = bpf::run(program.as_fd(), &known, None, &mut out).unwrap();
            assert_eq!((run.action, &out[..run.len_bytes]), (XDP_TX, &back[..]));
        }
        let wrap = floor::wrap(family).unwrap();
        let run = bpf::run(wrap.as_fd(), &known, None, &mut out).unwrap();
        let outer = run.len_bytes - known.len();
        assert_eq!((run.action, outer), (XDP_TX, if ip == "ip" { 20 } else { 40 }));
        assert_eq!((&out[..14], &out[14..14 + outer]), (&back[..14], &[0; 40][..outer]));
        assert_eq!(out[14 + outer..run.len_bytes], known[14..]);
        let run = bpf::run(look_up.as_fd(), &frame(1025), None, &mut out).unwrap();
        assert_eq!((run.action, &out[..run.len_bytes]), (XDP_PASS, &frame(1025)[..]));
    }
}

#[test]
fn a_stream_has_frames_of_every_port_each_right_and_a_sink_counts_them() {
    if !host::ready("a_stream_has_frames_of_every_port_each_right_and_a_sink_counts_them") {
        return;
    }
    const XDP_REDIRECT: u32 = 4;
    let sink = floor::Sink::new().unwrap();
    let mut counted = 0;
    for (from, to, kind, port_at) in [
        ("10.1.0.3", "10.1.0.100:7001", "IPv4 UDP", 34),
        ("fd00:1::3", "[fd00:1::100]:7001", "IPv6 UDP", 54),
    ] {
        let macs = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
        let route = Route { macs, from: from.parse().unwrap(), to: to.parse().unwrap() };
        let stream = Stream::new("lo", &route, PORTS).unwrap();
        let room = vec![0xff; route.frame(0).len()];
        let mut out = vec![0; 2048];
        let mut ports = std::collections::BTreeSet::new();
        // Of 4,096 ports, this many random ones leave none out once in a million times.
        for _ in 0..100_000 {
            let run = bpf::run(stream.program(), &room, None, &mut out).unwrap();
            assert_eq!(run.action, XDP_REDIRECT);
            let frame = &out[..run.len_bytes];
            let port = u16::from_be_bytes([frame[port_at], frame[port_at + 1]]);
            if ports.insert(port) {
                assert_eq!(wire::check(frame), Ok(Some(kind)));
                assert_eq!(frame, route.frame(port - FIRST_PORT), "port {port}");
            }
        }
        assert_eq!(ports.len(), usize::from(PORTS));
        assert!(ports.iter().all(|port| (FIRST_PORT..FIRST_PORT + PORTS).contains(port)));
        counted += 1;
        assert_eq!(bpf::run(sink.program(), &route.frame(0), None, &mut out).unwrap().action, 1);
        assert_eq!(sink.count().unwrap(), counted);
    }
    // Neighbours find each other all the same.
    let mut arp = vec![0xff; 42];
    arp[12..14].copy_from_slice(&[8, 6]);
    let mut solicitation = vec![0xff; 78];
    solicitation[12..14].copy_from_slice(&[0x86, 0xdd]);
    solicitation[20] = 58;
    for frame in [arp, solicitation] {
        let run = bpf::run(sink.program(), &frame, None, &mut vec![0; 2048]).unwrap();
        assert_eq!(run.action, XDP_PASS);
    }
    assert_eq!(sink.count().unwrap(), counted);
}
