//! Flow entries that have expired are let go, and no others.

use std::time::Duration;

use canary_tests::{
    loaded::Loaded,
    notation::parse,
    world::{Service, World},
};

const S: Duration = Duration::from_secs(1);

fn loaded(service: Service) -> Loaded {
    let world = World { service: vec![service], ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}")).unwrap().plane;
    Loaded::new(&plane, &world.sizes()).unwrap()
}

fn nat() -> Loaded {
    loaded(Service { mode: "nat".to_owned(), ..Service::default() })
}

/// A packet of the client from `port`. Returns the source port that it got.
fn client(loaded: &mut Loaded, port: u16, rest: &str) -> u16 {
    let packet =
        format!("eth client > us / ip client > vip / {}", rest.replace("PORT", &port.to_string()));
    let frame = loaded.run(&parse(&packet).unwrap()).unwrap().frame;
    u16::from_be_bytes([frame[34], frame[35]])
}

/// A packet of the backend to the source port `nat_port`.
fn server(loaded: &mut Loaded, nat_port: u16, rest: &str) {
    let rest = rest.replace("PORT", &nat_port.to_string());
    loaded.run(&parse(&format!("eth b1 > us / ip b1 > nat / {rest}")).unwrap()).unwrap();
}

/// Opens a connection and brings it to where both sides may speak. Returns its source port.
fn establish(loaded: &mut Loaded, port: u16) -> u16 {
    let nat_port = client(loaded, port, "tcp PORT > 80 S seq=1000");
    server(loaded, nat_port, "tcp 80 > PORT SA seq=5000 ack=1001");
    client(loaded, port, "tcp PORT > 80 A seq=1001 ack=5001");
    nat_port
}

/// Entries that are left when some time has passed.
fn left_after(loaded: &mut Loaded, silence: Duration) -> usize {
    loaded.silence(silence).unwrap();
    loaded.expire().unwrap();
    loaded.flows_v4.len()
}

/// Asserts that both entries of the only flow stay for so long, and go then.
#[track_caller]
fn goes_after(mut loaded: Loaded, limit: Duration) {
    assert_eq!(left_after(&mut loaded, limit - S), 2, "it goes too soon");
    assert_eq!(left_after(&mut loaded, 2 * S), 0, "it stays too long");
}

#[test]
fn syn_sent_goes_after_two_minutes() {
    let mut loaded = nat();
    client(&mut loaded, 40_000, "tcp PORT > 80 S seq=1000");
    goes_after(loaded, 120 * S);
}

#[test]
fn syn_received_goes_after_a_minute() {
    let mut loaded = nat();
    let nat_port = client(&mut loaded, 40_000, "tcp PORT > 80 S seq=1000");
    server(&mut loaded, nat_port, "tcp 80 > PORT SA seq=5000 ack=1001");
    goes_after(loaded, 60 * S);
}

#[test]
fn a_refused_connection_goes_after_ten_seconds() {
    let mut loaded = nat();
    let nat_port = client(&mut loaded, 40_000, "tcp PORT > 80 S seq=1000");
    server(&mut loaded, nat_port, "tcp 80 > PORT RA seq=0 ack=1001");
    goes_after(loaded, 10 * S);
}

/// (How long at most is `datapath::flows`'s own test: no flow can look older than the host.)
#[test]
fn an_established_flow_outlives_any_silence_of_the_host_s_young_life() {
    let mut loaded = nat();
    establish(&mut loaded, 40_000);
    assert_eq!(left_after(&mut loaded, 86_400 * S), 2);
}

#[test]
fn a_flow_that_one_side_closes_goes_after_two_minutes() {
    let mut loaded = nat();
    establish(&mut loaded, 40_000);
    client(&mut loaded, 40_000, "tcp PORT > 80 FA seq=1001 ack=5001");
    goes_after(loaded, 120 * S);
    let mut loaded = nat();
    let nat_port = establish(&mut loaded, 40_000);
    server(&mut loaded, nat_port, "tcp 80 > PORT FA seq=5001 ack=1001");
    client(&mut loaded, 40_000, "tcp PORT > 80 A seq=1001 ack=5002");
    goes_after(loaded, 120 * S);
}

#[test]
fn a_flow_that_both_sides_have_closed_goes_after_two_minutes() {
    let mut loaded = nat();
    let nat_port = establish(&mut loaded, 40_000);
    client(&mut loaded, 40_000, "tcp PORT > 80 FA seq=1001 ack=5001");
    server(&mut loaded, nat_port, "tcp 80 > PORT FA seq=5001 ack=1002");
    client(&mut loaded, 40_000, "tcp PORT > 80 A seq=1002 ack=5002");
    goes_after(loaded, 120 * S);
}

#[test]
fn a_flow_that_either_side_resets_goes_after_ten_seconds() {
    let mut loaded = nat();
    establish(&mut loaded, 40_000);
    client(&mut loaded, 40_000, "tcp PORT > 80 R seq=1001");
    goes_after(loaded, 10 * S);
    let mut loaded = nat();
    let nat_port = establish(&mut loaded, 40_000);
    server(&mut loaded, nat_port, "tcp 80 > PORT R seq=5001");
    goes_after(loaded, 10 * S);
}

/// RFC 5961, 3: a reset that is not near the sequence numbers in use is a blind one.
#[test]
fn a_blind_reset_or_fin_changes_nothing() {
    for flags in ["R", "RA", "FA", "F"] {
        let mut loaded = nat();
        let nat_port = establish(&mut loaded, 40_000);
        for seq in [1_001 + (1 << 17), 1_001 + (1 << 30), 3_000_000_000_u32] {
            client(&mut loaded, 40_000, &format!("tcp PORT > 80 {flags} seq={seq}"));
            server(&mut loaded, nat_port, &format!("tcp 80 > PORT {flags} seq={}", seq + 4_000));
        }
        assert_eq!(left_after(&mut loaded, 3_600 * S), 2, "{flags}");
    }
}

#[test]
fn whoever_is_still_heard_was_not_reset() {
    let mut loaded = nat();
    let nat_port = establish(&mut loaded, 40_000);
    client(&mut loaded, 40_000, "tcp PORT > 80 R seq=1001");
    server(&mut loaded, nat_port, "tcp 80 > PORT R seq=5001");
    loaded.silence(S).unwrap();
    client(&mut loaded, 40_000, "tcp PORT > 80 A seq=1001 ack=5001");
    server(&mut loaded, nat_port, "tcp 80 > PORT A seq=5001 ack=1001");
    assert_eq!(left_after(&mut loaded, 3_600 * S), 2);
}

#[test]
fn what_a_reset_has_overtaken_keeps_no_flow() {
    let mut loaded = nat();
    let nat_port = establish(&mut loaded, 40_000);
    client(&mut loaded, 40_000, "tcp PORT > 80 R seq=1001");
    client(&mut loaded, 40_000, "tcp PORT > 80 A seq=1001 ack=5001");
    server(&mut loaded, nat_port, "tcp 80 > PORT A seq=5001 ack=1001");
    goes_after(loaded, 10 * S);
}

/// Who forges a client's address sees no SYN-ACK, and must not fill the tables for five days.
#[test]
fn only_who_has_seen_the_syn_ack_establishes_a_flow() {
    let mut loaded = nat();
    client(&mut loaded, 40_000, "tcp PORT > 80 S seq=1000");
    client(&mut loaded, 40_000, "tcp PORT > 80 A seq=1001 ack=5001");
    goes_after(loaded, 120 * S);
    let mut loaded = nat();
    let nat_port = client(&mut loaded, 40_000, "tcp PORT > 80 S seq=1000");
    server(&mut loaded, nat_port, "tcp 80 > PORT SA seq=5000 ack=1001");
    client(&mut loaded, 40_000, "tcp PORT > 80 A seq=1001 ack=4000000000");
    goes_after(loaded, 60 * S);
}

#[test]
fn a_udp_flow_goes_after_its_services_time() {
    let mut loaded = nat();
    client(&mut loaded, 40_000, "udp PORT > 80 / \"x\"");
    goes_after(loaded, 30 * S);
}

#[test]
fn a_udp_flow_on_which_one_side_speaks_stays_with_both_entries() {
    let mut loaded = nat();
    let nat_port = client(&mut loaded, 40_000, "udp PORT > 80 / \"x\"");
    loaded.silence(31 * S).unwrap();
    server(&mut loaded, nat_port, "udp 80 > PORT / \"y\"");
    assert_eq!(left_after(&mut loaded, Duration::ZERO), 2);
}

#[test]
fn a_quic_flow_goes_after_ten_seconds_unanswered_and_after_five_minutes_else() {
    let moved = Service {
        backends: vec![1, 2],
        table: "b2 was b1".to_owned(),
        quic: true,
        ..Service::default()
    };
    let nat = Service { mode: "nat".to_owned(), quic: true, ..Service::default() };
    for (service, entries) in [(moved, 1), (nat, 2)] {
        let mut loaded = loaded(service);
        for port in [40_000, 40_001] {
            client(&mut loaded, port, "udp PORT > 80 / quic initial dcid=0102030405060708");
        }
        client(&mut loaded, 40_000, "udp PORT > 80 / quic handshake dcid=1112131415161718");
        assert_eq!(left_after(&mut loaded, 9 * S), 2 * entries);
        assert_eq!(left_after(&mut loaded, 2 * S), entries, "the unanswered one goes");
        assert_eq!(left_after(&mut loaded, 288 * S), entries);
        assert_eq!(left_after(&mut loaded, 2 * S), 0);
    }
}

#[test]
fn a_tracked_connection_stays_while_its_bucket_is_tracked() {
    let mut loaded = loaded(Service {
        backends: vec![1, 2],
        table: "b2 was b1".to_owned(),
        ..Service::default()
    });
    establish(&mut loaded, 40_000);
    client(&mut loaded, 40_001, "tcp PORT > 80 S seq=1000");
    assert_eq!(left_after(&mut loaded, 30 * 86_400 * S), 1, "only the half-open one goes");
}

#[test]
fn half_open_and_closing_flows_go_sooner_when_the_table_is_nearly_full() {
    let service = Service { mode: "nat".to_owned(), ..Service::default() };
    let world = World { service: vec![service], flows: 40, ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}")).unwrap().plane;
    let mut loaded = Loaded::new(&plane, &world.sizes()).unwrap();
    for port in 40_000..40_013 {
        establish(&mut loaded, port);
    }
    client(&mut loaded, 41_000, "tcp PORT > 80 S seq=1000");
    establish(&mut loaded, 41_001);
    client(&mut loaded, 41_001, "tcp PORT > 80 FA seq=1001 ack=5001");
    assert_eq!(left_after(&mut loaded, Duration::ZERO), 30, "three quarters of the table");
    assert_eq!(left_after(&mut loaded, 11 * S), 28, "the half-open one goes");
    client(&mut loaded, 41_000, "tcp PORT > 80 S seq=1000");
    assert_eq!(left_after(&mut loaded, Duration::ZERO), 30);
    assert_eq!(left_after(&mut loaded, 31 * S), 26, "both go");
}

/// What was read of an entry is old when it is to go.
#[test]
fn an_entry_that_is_revived_is_not_removed() {
    use canary_ebpf_common::{
        abi::{FlowKeyV4, Forget, forget},
        nat,
        steer::{Flows as _, model::ModelFlows},
    };
    let flows = ModelFlows::<FlowKeyV4>::new(4);
    let key = FlowKeyV4 { protocol: 6, src_be: 1, ..FlowKeyV4::default() };
    let flow = canary_ebpf_common::abi::Flow { last_ns: 7, backend: 3, ..Default::default() };
    flows.insert(&key, &flow);
    let mut wanted = Forget { key, last_ns: 6, backend: 4, ..Forget::default() };
    assert_eq!(nat::forget(&flows, &wanted, 6), 0, "a packet has come since");
    wanted.condition = forget::NAMES;
    assert_eq!(nat::forget(&flows, &wanted, 6), 0, "it names another backend by now");
    wanted.backend = 3;
    assert_eq!(nat::forget(&flows, &wanted, 6), 1);
    assert!(flows.is_empty());
}
