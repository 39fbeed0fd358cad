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

/// A packet of the client from `port`.
fn client(loaded: &mut Loaded, port: u16, rest: &str) {
    let packet =
        format!("eth client > us / ip client > vip / {}", rest.replace("PORT", &port.to_string()));
    loaded.run(&parse(&packet).unwrap()).unwrap();
}

/// Opens a connection and confirms it.
fn establish(loaded: &mut Loaded, port: u16) {
    client(loaded, port, "tcp PORT > 80 S seq=1000");
    client(loaded, port, "tcp PORT > 80 A seq=1001");
}

/// Entries that are left when some time has passed.
fn left_after(loaded: &mut Loaded, silence: Duration) -> usize {
    loaded.silence(silence).unwrap();
    loaded.datapath.expire().unwrap();
    loaded.flows_v4.len()
}

#[test]
fn a_half_open_flow_goes_after_ten_seconds_with_both_of_its_entries() {
    let mut loaded = nat();
    client(&mut loaded, 40_000, "tcp PORT > 80 S seq=1000");
    assert_eq!(left_after(&mut loaded, 9 * S), 2);
    assert_eq!(left_after(&mut loaded, 2 * S), 0);
}

/// (How long at most is `datapath::flows`'s own test: no flow can look older than the host.)
#[test]
fn an_established_flow_outlives_any_silence_of_the_host_s_young_life() {
    let mut loaded = nat();
    establish(&mut loaded, 40_000);
    assert_eq!(left_after(&mut loaded, 86_400 * S), 2);
}

#[test]
fn a_flow_that_the_client_closes_goes_after_two_minutes() {
    let mut loaded = nat();
    establish(&mut loaded, 40_000);
    establish(&mut loaded, 40_001);
    client(&mut loaded, 40_000, "tcp PORT > 80 FA seq=1001");
    assert_eq!(left_after(&mut loaded, 119 * S), 4);
    assert_eq!(left_after(&mut loaded, 2 * S), 2, "the open one stays");
}

#[test]
fn a_udp_flow_goes_after_its_services_time() {
    let mut loaded = nat();
    client(&mut loaded, 40_000, "udp PORT > 80 / \"x\"");
    assert_eq!(left_after(&mut loaded, 29 * S), 2);
    assert_eq!(left_after(&mut loaded, 2 * S), 0);
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
fn more_flows_than_one_call_looks_at_go_in_some_calls() {
    let service = Service { mode: "nat".to_owned(), ..Service::default() };
    let world = World { service: vec![service], flows: 60_000, ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}")).unwrap().plane;
    let mut loaded = Loaded::new(&plane, &world.sizes()).unwrap();
    let flows = 9_000;
    for port in 0..flows {
        client(&mut loaded, 20_000 + port, "tcp PORT > 80 S seq=1000");
    }
    let stored = loaded.flows_v4.len();
    assert!(stored > 16_384, "{stored} entries: more than one call looks at");
    let after_one = left_after(&mut loaded, 11 * S);
    assert!(after_one < stored, "a call removes some");
    for _ in 0..10 {
        loaded.datapath.expire().unwrap();
    }
    assert_eq!(loaded.flows_v4.len(), 0);
}
