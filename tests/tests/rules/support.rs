//! What the rules' tests share: segments, clients, and buckets that have moved.

use std::time::Duration;

use canary_agent::plan::Family;
use canary_ebpf_common::{
    abi::{IPPROTO_TCP, flow_state},
    steer::{Segment, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};
use canary_tests::{
    loaded::Sizes,
    model::Tuple,
    planned::{Planned, Shop, Went, tuple},
};

pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
pub(crate) const S: Duration = Duration::from_secs(1);

pub(crate) fn tcp(tcp_flags: u8, seq: u32) -> Segment {
    Segment::tcp(tcp_flags, seq)
}

pub(crate) fn syn(seq: u32) -> Segment {
    tcp(TCP_SYN, seq)
}

pub(crate) fn ack(seq: u32) -> Segment {
    tcp(TCP_ACK, seq)
}

pub(crate) fn data(seq: u32, payload_bytes: u32) -> Segment {
    ack(seq).carrying(payload_bytes)
}

pub(crate) fn fin(seq: u32) -> Segment {
    tcp(TCP_FIN | TCP_ACK, seq)
}

pub(crate) fn rst(seq: u32) -> Segment {
    tcp(TCP_RST, seq)
}

pub(crate) fn udp() -> Segment {
    Segment::udp()
}

/// `shop` over maps of the usual sizes.
pub(crate) fn planned(shop: &Shop) -> Planned {
    Planned::new(shop, &Sizes::default())
}

/// A service that begins with everything at `stable`.
pub(crate) fn shop() -> Planned {
    planned(&Shop::default())
}

/// As [`shop`], after `v2` has got half of the buckets.
pub(crate) fn moved() -> Planned {
    let mut planned = shop();
    planned.split(&[("v2", "50%")]);
    planned
}

/// Client 1's connections to the service, one after the other.
pub(crate) fn tuples(family: Family, protocol: u8) -> impl Iterator<Item = Tuple> {
    (20_000..30_000).map(move |port| tuple(1, family, port, protocol))
}

/// `count` connections whose buckets have moved and are remembered.
#[track_caller]
pub(crate) fn tuples_moved(
    planned: &Planned,
    family: Family,
    protocol: u8,
    count: usize,
) -> Vec<Tuple> {
    let moved = |t: &Tuple| {
        let entry = planned.entry(t);
        entry.tracked() && entry.current() != entry.previous()
    };
    let found: Vec<Tuple> = tuples(family, protocol).filter(moved).take(count).collect();
    assert_eq!(found.len(), count, "too few buckets have moved");
    found
}

/// One such TCP connection.
#[track_caller]
pub(crate) fn one_moved(planned: &Planned, family: Family) -> Tuple {
    tuples_moved(planned, family, IPPROTO_TCP, 1)[0]
}

/// Where new connections of a packet's bucket go.
#[track_caller]
pub(crate) fn current(planned: &Planned, tuple: &Tuple) -> Went {
    planned.current(tuple).map_or(Went::Dropped, Went::To)
}

/// Where connections go that are older than the move of a packet's bucket.
#[track_caller]
pub(crate) fn previous(planned: &Planned, tuple: &Tuple) -> Went {
    let entry = planned.entry(tuple);
    assert!(entry.tracked(), "the bucket has moved");
    planned.number(entry.previous()).map_or(Went::Dropped, Went::To)
}

/// The backend that a packet went to.
#[track_caller]
pub(crate) fn number(went: Went) -> u16 {
    match went {
        Went::To(n) => n,
        other => panic!("{other:?} is no backend"),
    }
}

/// Opens a connection and confirms it, after the server's answer where that is seen; where it
/// went.
#[track_caller]
pub(crate) fn establish(planned: &mut Planned, tuple: &Tuple, seq: u32) -> Went {
    let (went, port) = planned.translated(tuple, syn(seq));
    if planned.flow(tuple).is_some_and(|flow| flow.state & flow_state::NAT != 0) {
        assert!(planned.syn_ack(tuple, number(went), port, seq), "the answer reaches the client");
    }
    assert_eq!(planned.send(tuple, ack(seq.wrapping_add(1))), went, "its first packet follows");
    went
}
