//! The loaded program and the decision in `canary-ebpf-common` agree: on backend,
//! version and bucket of random packets of every kind, and on every flow entry after
//! each packet of random sequences. `CANARY_SEED` makes a run again.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use canary_agent::plan::{Family, ServicePlan};
use canary_ebpf_common::{
    abi::{Flow, FlowKeyV4, FlowKeyV6, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP},
    entry::{BackendIndex, Entry},
    nat::{self, TupleKey},
    ports::PortRange,
    steer::{Segment, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};
use canary_tests::{
    loaded::{FlowKey, Loaded, Outcome, XDP_DROP, XDP_PASS, XDP_TX},
    model::{Model, Random, Tuple, Verdict, datagram, family},
    names::Host,
    notation::parse,
    world::{Plane, Service, World, addr},
};

/// Tuples in the first test.
const TUPLES: usize = 100_000;
/// Packets in each sequence.
const EVENTS: usize = 10_000;

/// Numbers of a service's backends. Two groups: where buckets lie now, and where they lay.
fn backends(service: usize) -> Vec<u16> {
    (1..=32).map(|n| service as u16 * 40 + n).collect()
}

/// Whether a service speaks QUIC.
const fn quic(service: usize) -> bool {
    service % 2 == 1
}

/// Services of every kind, in tables of 4,096 to 65,536 buckets.
fn services() -> Vec<Service> {
    let kinds = [
        ("dsr", "connection", 4096),
        ("dsr", "client", 65_536),
        ("dsr", "subnet", 16_384),
        ("dsr", "connection", 32_768),
        ("nat", "connection", 8192),
        ("nat", "client", 4096),
        ("nat", "subnet", 65_536),
    ];
    kinds
        .iter()
        .enumerate()
        .map(|(i, (mode, stickiness, buckets))| Service {
            vips: vec![Host::Vip(i as u16 + 1).name()],
            mode: (*mode).to_owned(),
            stickiness: (*stickiness).to_owned(),
            backends: backends(i),
            buckets: *buckets,
            quic: quic(i),
            ..Service::default()
        })
        .collect()
}

fn made(world: &World) -> Plane {
    world.plane(|name| anyhow::bail!("no interface {name}")).expect("a world")
}

fn ports(world: &World) -> PortRange {
    let (first, last) = world.nat_ports;
    PortRange { first, count: last - first + 1 }
}

/// A packet, its frame and the service it is for.
struct Case {
    service: usize,
    tuple: Tuple,
    segment: Segment,
    ttl: u8,
    frame: Vec<u8>,
}

/// The notation's letters for TCP flags.
fn letters(flags: u8) -> String {
    let all = "FSRPAUEC".chars().enumerate();
    let set: String = all.filter(|(bit, _)| flags & 1 << bit != 0).map(|(_, l)| l).collect();
    if set.is_empty() { "-".to_owned() } else { set }
}

/// A client's packet; `payload` is a datagram's, in the notation.
fn frame(
    tuple: &Tuple,
    segment: Segment,
    ack: u32,
    payload: &str,
    ttl: u8,
    options: &str,
    eth: &str,
) -> Vec<u8> {
    let Tuple { src, dst, src_port, dst_port, protocol } = tuple;
    // IPv4's options are in the header, IPv6's in headers of their own.
    let (options, headers) = if src.is_ipv4() { (options, "") } else { ("", options) };
    let ip = if src.is_ipv4() {
        format!("ip {src} > {dst} {options}")
    } else {
        format!("ip6 {src} > {dst}")
    };
    let transport = match *protocol {
        IPPROTO_TCP => {
            format!(
                "tcp {src_port} > {dst_port} {} seq={} ack={ack} / zeros {}",
                letters(segment.tcp_flags),
                segment.seq,
                segment.payload_bytes
            )
        }
        _ => format!("udp {src_port} > {dst_port}{payload}"),
    };
    parse(&format!("eth {eth} / {ip} ttl={ttl} / {headers}{transport}")).expect("a packet")
}

/// A datagram's payload in the notation, and what it is to a service with QUIC or without.
fn random_payload(random: &mut Random, quic: bool) -> (String, Segment) {
    let version = random.one_of(&["1", "1", "1", "0x6b3343cf", "0x6b3343cf", "7"]);
    // Few, so that some come again.
    let dcid = |random: &mut Random| {
        let bytes = random.one_of(&[8, 8, 8, 20, 7, 0, 12]);
        format!("{:02x}", random.below(3)).repeat(bytes)
    };
    let kind = random.one_of(&["initial", "initial", "handshake", "handshake", "0rtt", "retry"]);
    let width = random.one_of(&[2, 2, 4, 8]);
    let greased = random.one_of(&["", "", "greased"]);
    let to = random.one_of(&[100, 1199, 1200, 1200, 1252]);
    let text = match random.below(8) {
        0 => String::new(),
        1 => " / \"garbage\"".to_owned(),
        2 => format!(" / quic short {greased} to={}", random.one_of(&[20, 21, 60, 1300])),
        3 => {
            let dcid = dcid(random);
            format!(
                " / quic initial version={version} dcid={dcid} token=0102 width={width} to=150 \
                 / quic {kind} version={version} dcid={dcid} to={to}",
                to = to.max(300)
            )
        }
        4 => {
            let bytes: Vec<String> =
                (0..random.below(40)).map(|_| format!("{:02x}", random.bits() as u8)).collect();
            format!(" / hex {}", bytes.concat())
        }
        _ => format!(
            " / quic {kind} version={version} {greased} dcid={} scid={} width={width} to={to}",
            dcid(random),
            dcid(random)
        ),
    };
    let plain = Segment::udp();
    let udp = parse(&format!("eth client > us / ip client > vip / udp 1 > 2{text}"));
    let payload = &udp.expect("a packet")[14 + 20 + 8..];
    let segment = if quic { datagram(payload) } else { plain };
    (text, segment)
}

fn random_mac(random: &mut Random) -> String {
    let [a, rest @ .., _, _] = random.bits().to_be_bytes();
    let first = format!("{:02x}", a & 0xfe);
    rest.iter().fold(first, |text, b| format!("{text}:{b:02x}"))
}

fn random_case(random: &mut Random, services: usize) -> Case {
    let service = random.below(services as u64) as usize;
    let vip = Host::Vip(service as u16 + 1);
    let wide = u128::from(random.bits()) << 64 | u128::from(random.bits());
    let src: IpAddr = match random.below(2) {
        0 => IpAddr::from((wide as u32).to_be_bytes()),
        _ => IpAddr::from(wide.to_be_bytes()),
    };
    let protocol = random.one_of(&[IPPROTO_TCP, IPPROTO_TCP, IPPROTO_UDP]);
    let tuple = Tuple {
        src,
        dst: addr(vip, family(src)),
        src_port: random.bits() as u16,
        dst_port: 80,
        protocol,
    };
    let flags = match random.below(3) {
        0 => random.bits() as u8,
        _ => TCP_SYN,
    };
    let (payload, segment) = match protocol {
        IPPROTO_TCP => {
            let seq = random.bits() as u32;
            (String::new(), Segment::tcp(flags, seq).carrying(random.below(3) as u32 * 700))
        }
        _ => random_payload(random, quic(service)),
    };
    let ttl = random.one_of(&[1, 2, 3, 64, 128, 255]);
    let options: &str = match src {
        IpAddr::V4(_) => random.one_of(&["", "", "options=01010101", "options=9404000001010101"]),
        IpAddr::V6(_) => random.one_of(&[
            "",
            "",
            "hbh / dst bytes=24 / ",
            "dst / route bytes=40 / auth bytes=20 / ",
            "frag id=7 / ",
            "hbh bytes=256 / frag id=9 / dst / ",
        ]),
    };
    let tags = random.one_of(&["", "", " / vlan 10", " / svlan 7 pcp=3 / vlan 9"]);
    let eth = format!("{} > us{tags}", random_mac(random));
    let frame = frame(&tuple, segment, 0, &payload, ttl, options, &eth);
    Case { service, tuple, segment, ttl, frame }
}

/// Bucket `b`'s backends in a table that tells 16 groups of buckets apart, by four bits of the
/// number from `shift` on; every third is tracked.
fn digit_table(shift: u32, indices: &[BackendIndex], buckets: u32) -> Vec<Entry> {
    (0..buckets)
        .map(|b| {
            let digit = (b >> shift & 15) as usize;
            match b % 3 {
                0 => Entry::tracking(indices[digit], indices[16 + digit], b % 2 == 0),
                _ => Entry::steady(indices[digit]),
            }
        })
        .collect()
}

/// Where the transport header of a whole IPv6 packet is.
fn transport_of(frame: &[u8]) -> usize {
    let (mut next, mut at) = (frame[20], 14 + 40);
    while !matches!(next, IPPROTO_TCP | IPPROTO_UDP) {
        let length = usize::from(frame[at + 1]);
        let bytes = match next {
            44 => 8,
            51 => (length + 2) * 4,
            _ => (length + 1) * 8,
        };
        (next, at) = (frame[at], at + bytes);
    }
    at
}

/// Whether a frame is an error of the balancer's, which the model calls a drop. It has the tags of
/// the packet that it is about.
fn is_answer(family: Family, seen: &Outcome) -> bool {
    let mut ip = 14;
    while matches!(seen.frame[ip - 2..ip], [0x81, 0x00] | [0x88, 0xa8]) {
        ip += 4;
    }
    let protocol = match family {
        Family::V4 => seen.frame[ip + 9] == IPPROTO_ICMP,
        Family::V6 => seen.frame[ip + 6] == IPPROTO_ICMPV6,
    };
    seen.action == XDP_TX && protocol
}

/// The frame's destination, the source port, and whether they are the model's.
fn agrees(plane: &Plane, family: Family, seen: &Outcome, expected: Verdict) -> Result<(), String> {
    let actual = match seen.action {
        XDP_PASS => "passed".to_owned(),
        XDP_DROP => "dropped".to_owned(),
        XDP_TX => {
            let mac = seen.frame[..6].try_into().expect("six bytes");
            format!("sent to {:?}", Host::with_mac(mac))
        }
        other => format!("action {other}"),
    };
    let wrong = || Err(format!("expected {expected:?}, the program {actual}"));
    match expected {
        Verdict::Pass if seen.action == XDP_PASS => Ok(()),
        Verdict::Drop if seen.action == XDP_DROP || is_answer(family, seen) => Ok(()),
        Verdict::Sent { backend, port, .. } if seen.action == XDP_TX => {
            let mac = seen.frame[..6].try_into().expect("six bytes");
            let Some(Host::Backend(n)) = Host::with_mac(mac) else { return wrong() };
            let slot = usize::from(family == Family::V6);
            let indices = plane.backends.iter().find(|(number, _)| *number == n);
            let at = match family {
                Family::V4 => 14 + usize::from(seen.frame[14] & 0xf) * 4,
                Family::V6 => transport_of(&seen.frame),
            };
            let source = u16::from_be_bytes([seen.frame[at], seen.frame[at + 1]]);
            let same_port = port.is_none_or(|p| p == source);
            if indices.is_some_and(|(_, i)| i[slot] == backend) && same_port {
                Ok(())
            } else {
                wrong()
            }
        }
        _ => wrong(),
    }
}

#[test]
fn random_packets_go_where_the_decision_says() {
    let mut random = Random::from_environment("agreement");
    let world = World { service: services(), flows: 1 << 18, ..World::default() };
    let cases: Vec<_> =
        (0..TUPLES).map(|_| random_case(&mut random, world.service.len())).collect();
    // Four bits of the bucket come to light in each round; where it is not seen, none.
    let mut buckets: Vec<(u32, u32)> = vec![(0, 0); TUPLES];
    let mut sent = 0;
    for shift in [0, 4, 8, 12] {
        let mut plane = made(&world);
        for service in &mut plane.plane.services {
            let indices: Vec<_> = plane
                .plane
                .backends
                .iter()
                .filter(|(_, b)| b.service == service.record.id as u16 && b.addr.port() == 80)
                .map(|(i, _)| *i)
                .collect();
            let service = Arc::make_mut(service);
            service.entries =
                Arc::new(digit_table(shift, &indices, service.record.bucket_mask + 1).into());
        }
        let mut loaded = Loaded::new(&plane.plane, &world.sizes()).expect("root, and a program");
        let v4 = Model::<FlowKeyV4>::new(&plane.plane, world.flows, ports(&world));
        let v6 = Model::<FlowKeyV6>::new(&plane.plane, world.flows, ports(&world));
        for (case, seen_bits) in cases.iter().zip(&mut buckets) {
            let Case { service, tuple, segment, ttl, frame } = case;
            let family = family(tuple.src);
            let [four, six] = plane.ids[*service];
            let plan = |id: u16| -> &Arc<ServicePlan> { &plane.plane.services[usize::from(id)] };
            let (bucket, verdict) = match family {
                Family::V4 => v4.decide(plan(four), tuple, *segment, 0, *ttl),
                Family::V6 => v6.decide(plan(six), tuple, *segment, 0, *ttl),
            };
            let seen = loaded.run(frame).expect("a run");
            if let Err(e) = agrees(&plane, family, &seen, verdict) {
                panic!("bucket {bucket}, {segment:?}, TTL {ttl}, {tuple:?}: {e}");
            }
            if seen.action == XDP_TX && !is_answer(family, &seen) {
                sent += 1;
                let mac = seen.frame[..6].try_into().expect("six bytes");
                let Some(Host::Backend(n)) = Host::with_mac(mac) else { unreachable!() };
                let digit = u32::from(n - 1) % 40 % 16;
                seen_bits.0 |= digit << shift;
                seen_bits.1 |= 15 << shift;
                assert_eq!(
                    seen_bits.0,
                    bucket & seen_bits.1,
                    "the program's bucket of {tuple:?} is another than the hash's"
                );
            }
        }
        let [in_v4, in_v6] = loaded.datapath.reader().flow_entries().expect("flow entries");
        assert_eq!([in_v4, in_v6], [v4.flows.len() as u64, v6.flows.len() as u64]);
    }
    let whole = buckets.iter().filter(|(_, known)| *known == 0xffff).count();
    println!("{sent} packets sent, {whole} buckets known whole");
    assert!(whole > TUPLES / 2, "most packets are sent in each round");
}

/// What happens in a sequence: how likely, out of 100.
fn event(random: &mut Random, tuple: &Tuple, seq: &mut u32, quic: bool) -> (String, Segment) {
    let protocol = tuple.protocol;
    if protocol == IPPROTO_UDP {
        return random_payload(random, quic);
    }
    let (tcp_flags, seq) = match random.below(100) {
        0..20 => (TCP_SYN, *seq),
        20..35 => {
            *seq = random.bits() as u32;
            (TCP_SYN, *seq)
        }
        35..50 => (TCP_ACK, seq.wrapping_add(1 + random.below(70_000) as u32)),
        // What comes after a FIN, and before it.
        50..60 => (TCP_ACK, seq.wrapping_add(random.below(4) as u32)),
        60..70 => (TCP_ACK, random.bits() as u32),
        70..80 => (TCP_FIN | TCP_ACK, seq.wrapping_add(1)),
        80..90 => (TCP_RST, seq.wrapping_add(1)),
        90..95 => (TCP_SYN | TCP_ACK, seq.wrapping_add(1)),
        _ => (random.bits() as u8, seq.wrapping_add(1)),
    };
    let payload_bytes = random.one_of(&[0, 0, 1, 2, 1000]);
    (String::new(), Segment::tcp(tcp_flags, seq).carrying(payload_bytes))
}

/// Fields of an entry that do not depend on the clock or on MAC addresses.
fn comparable(flow: Option<Flow>) -> Option<Flow> {
    flow.map(|f| Flow { last_ns: 0, eth: [0; 3], way: 0, ..f })
}

fn sequence<K>(
    mode: &str,
    quic: bool,
    family: Family,
    flows_of: impl Fn(&Loaded) -> &canary_tests::loaded::Flows<K>,
) where
    K: TupleKey + FlowKey + Eq + std::hash::Hash + std::fmt::Debug,
{
    let mut random = Random::from_environment(&format!("{mode} {family:?} QUIC: {quic}"));
    // Each processor keeps its half-open flows apart; the model has but one.
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0).expect("a processor");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).expect("a processor");
    // Too few entries and ports for all tuples: the table and the ports run out.
    let flows = if mode == "nat" { 80 } else { 40 };
    let tables = [
        "b1 was b1",
        "b2 was b1",
        "b2 was b1 learning",
        "b3 was b1",
        "b1 was b2",
        "b3 was b2 learning",
    ];
    let service = Service {
        mode: mode.to_owned(),
        backends: vec![1, 2, 3],
        table: tables[0].to_owned(),
        quic,
        ..Service::default()
    };
    let mut world =
        World { service: vec![service], flows, nat_ports: (10_000, 10_015), ..World::default() };
    let mut plane = made(&world);
    let mut loaded = Loaded::new(&plane.plane, &world.sizes()).expect("root, and a program");
    let mut model = Model::<K>::new(&plane.plane, flows, ports(&world));
    let tuples: Vec<_> = (0..60)
        .map(|n: u16| Tuple {
            src: addr(Host::Client(1 + n % 7), family),
            dst: addr(Host::Vip(1), family),
            src_port: 40_000 + n,
            dst_port: 80,
            protocol: if n.is_multiple_of(3) { IPPROTO_UDP } else { IPPROTO_TCP },
        })
        .collect();
    let mut seqs: HashMap<Tuple, u32> = HashMap::new();
    let mut seen_kinds: HashMap<&str, u32> = HashMap::new();
    for step in 0..EVENTS {
        if random.below(150) == 0 {
            // The world changes.
            let service = &mut world.service[0];
            match random.below(4) {
                0 => service.table = random.one_of(&tables).to_owned(),
                1 => service.down = vec![random.one_of(&["b1", "b2", "b3", "b9"]).to_owned()],
                2 => service.maint = vec![random.one_of(&["b1", "b2", "b9", "b9"]).to_owned()],
                _ => {
                    // Far from udp_idle's 30 s on either side, whatever the test itself takes, and
                    // so with what ends a QUIC connection's flow.
                    let time = Duration::from_secs(random.one_of(&[20, 20, 20, 170]));
                    loaded.silence(time).expect("flow entries");
                    tuples.iter().for_each(|t| model.silence(t, time.as_nanos() as u64));
                }
            }
            plane = made(&world);
            // Without a sweep: the model has none.
            loaded.datapath.apply(&plane.plane).expect("a plan");
            model.apply(&plane.plane);
        }
        let tuple = random.one_of(&tuples);
        let (payload, segment) =
            event(&mut random, &tuple, seqs.entry(tuple).or_insert(1000), quic);
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("a clock");
        model.flows.clock_ns.set(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64);
        let key: K = tuple.key();
        let place = format!("step {step}, {segment:?}, {tuple:?}, {:?}", world.service[0]);
        let known = model.flows.get(&key);
        // Mostly what the other side has sent last.
        let ack = |to: Option<Flow>| match to {
            Some(flow) if random.clone().below(4) > 0 => flow.next_seq,
            _ => random.clone().bits() as u32,
        };
        let reverse = known.and_then(|f| model.flows.get(&nat::opposite(&f, tuple.protocol)));
        let (ack, answer_ack) = (ack(reverse), ack(known));
        if mode == "nat"
            && random.below(4) == 0
            && let Some(forward) = known
        {
            // The backend answers.
            let packet = Tuple {
                src: plane.plane.backends[usize::from(forward.backend) - 1].1.addr.ip(),
                dst: addr(Host::Nat, family),
                src_port: u16::from_be(forward.dst_port_be),
                dst_port: u16::from_be(forward.src_port_be),
                protocol: tuple.protocol,
            };
            // The program drops what no TCP sends, and takes no notice.
            let possible = segment.possible();
            let answered = !possible || model.answer(&tuple, segment, answer_ack);
            let frame = frame(&packet, segment, answer_ack, &payload, 64, "", "b1 > us");
            let seen = loaded.run(&frame).expect("a run");
            let action = if possible { XDP_TX } else { XDP_DROP };
            assert!(answered && seen.action == action, "{place}: an answer: {}", seen.action);
            if possible {
                assert_eq!(seen.frame[..6], Host::Client(1).mac(), "{place}");
            }
            *seen_kinds.entry("answers").or_default() += 1;
        } else {
            let id = plane.ids[0][usize::from(family == Family::V6)];
            let (_, verdict) =
                model.decide(&plane.plane.services[usize::from(id)], &tuple, segment, ack, 64);
            let frame = frame(&tuple, segment, ack, &payload, 64, "", "client > us");
            let seen = loaded.run(&frame).expect("a run");
            if let Err(e) = agrees(&plane, family, &seen, verdict) {
                panic!("{place}: {e}");
            }
            let kind = match verdict {
                Verdict::Pass => "passed",
                Verdict::Drop => "dropped",
                Verdict::Sent { .. } => "sent",
            };
            *seen_kinds.entry(kind).or_default() += 1;
        }
        let table = flows_of(&loaded);
        let ours = model.flows.get(&key);
        let theirs = table.get(&key).expect("an entry or none");
        assert_eq!(comparable(theirs), comparable(ours), "{place}: the entry differs");
        // The kernel's clock ticks while the model decides.
        let stamp = |key: &K| {
            if let Some(flow) = table.get(key).expect("an entry or none") {
                model.stamp(key, flow.last_ns);
            }
        };
        stamp(&key);
        if mode == "nat"
            && let Some(forward) = ours
        {
            let reverse: K = nat::opposite(&forward, tuple.protocol);
            stamp(&reverse);
            assert_eq!(
                comparable(table.get(&reverse).expect("an entry or none")),
                comparable(model.flows.get(&reverse)),
                "{place}: the reverse entry differs"
            );
        }
        if step % 500 == 0 {
            assert_eq!(table.len(), model.flows.len(), "{place}: entries");
        }
    }
    println!(
        "{mode} {family:?}, QUIC: {quic}: {seen_kinds:?}, {} entries at the end",
        model.flows.len()
    );
    assert!(seen_kinds["sent"] > EVENTS as u32 / 10, "a sequence that shows little");
}

#[test]
fn sequences_leave_the_same_entries_dsr_v4() {
    sequence("dsr", false, Family::V4, |l| &l.flows_v4);
}

#[test]
fn sequences_leave_the_same_entries_dsr_v6() {
    sequence("dsr", false, Family::V6, |l| &l.flows_v6);
}

#[test]
fn sequences_leave_the_same_entries_nat_v4() {
    sequence("nat", false, Family::V4, |l| &l.flows_v4);
}

#[test]
fn sequences_leave_the_same_entries_nat_v6() {
    sequence("nat", false, Family::V6, |l| &l.flows_v6);
}

#[test]
fn sequences_leave_the_same_entries_quic_dsr_v4() {
    sequence("dsr", true, Family::V4, |l| &l.flows_v4);
}

#[test]
fn sequences_leave_the_same_entries_quic_dsr_v6() {
    sequence("dsr", true, Family::V6, |l| &l.flows_v6);
}

#[test]
fn sequences_leave_the_same_entries_quic_nat_v4() {
    sequence("nat", true, Family::V4, |l| &l.flows_v4);
}

#[test]
fn sequences_leave_the_same_entries_quic_nat_v6() {
    sequence("nat", true, Family::V6, |l| &l.flows_v6);
}
