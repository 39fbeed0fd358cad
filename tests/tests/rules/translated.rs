//! Rule 14: `nat`, where every flow has an entry.

use canary_ebpf_common::{
    abi::{IPPROTO_TCP, IPPROTO_UDP, Reason},
    nat::opposite,
};
use canary_tests::{
    loaded::Sizes,
    planned::{Planned, Shop, Went},
};

use crate::support::*;

fn nat(flows: u32) -> Planned {
    let shop = Shop { forward: "nat", ..Shop::default() };
    Planned::new(&shop, &Sizes { flows, ..Sizes::default() })
}

#[test]
fn rule_14_translated_flows_follow_their_entries_regardless_of_bucket_and_drain() {
    let mut planned = nat(1024);
    for family in FAMILIES {
        planned.split(&[("v2", "0%")]);
        let stream: Vec<_> = tuples(family, IPPROTO_TCP).take(40).collect();
        let flow: Vec<_> = tuples(family, IPPROTO_UDP).take(40).collect();
        let streams: Vec<_> = stream.iter().map(|t| establish(&mut planned, t, 1000)).collect();
        let flows: Vec<_> = flow.iter().map(|t| planned.send(t, udp())).collect();
        planned.split(&[("v2", "100%")]);
        assert_eq!(planned.tracked(), 0, "no bucket needs a memory");
        for ((tuple, at), (datagram, to)) in
            stream.iter().zip(&streams).zip(flow.iter().zip(&flows))
        {
            assert!(matches!(planned.current(tuple), Some(3 | 4)));
            assert_eq!(planned.send(tuple, ack(1001)), *at);
            assert_eq!(planned.send(datagram, udp()), *to);
        }
        // Long after the drain. (Silence would end the datagrams' flows, so only the planner's
        // clock goes on.)
        planned.now_ms += 10_000_000;
        planned.settle();
        for (tuple, at) in stream.iter().zip(&streams) {
            assert_eq!(planned.send(tuple, ack(1001)), *at);
        }
        let new = tuples(family, IPPROTO_TCP).nth(100).unwrap();
        assert_eq!(planned.send(&new, ack(7)), Went::Passed, "belongs to no flow");
        assert_eq!(planned.send(&new, syn(7)), current(&planned, &new));
    }
}

#[test]
fn rule_14_a_full_table_refuses_new_translated_flows_and_counts_them() {
    // An odd number: there is room for the first of the fifth flow's entries, not for both.
    let room = 9;
    for family in FAMILIES {
        let mut planned = nat(room);
        let all: Vec<_> = tuples(family, IPPROTO_TCP).take(12).collect();
        let (open, refused) = all.split_at(room as usize / 2);
        let went: Vec<_> = open.iter().map(|t| establish(&mut planned, t, 1000)).collect();
        let count = |p: &Planned| p.loaded.reasons()[Reason::DropFlowTableFull as usize];
        let before = count(&planned);
        for tuple in refused {
            assert_eq!(planned.send(tuple, syn(1000)), Went::Dropped);
            assert_eq!(planned.flow(tuple), None, "half a flow is none");
        }
        assert_eq!(count(&planned) - before, refused.len() as u64);
        for (tuple, at) in open.iter().zip(&went) {
            assert_eq!(planned.send(tuple, ack(1001)), *at, "nobody is put out");
        }
        assert_eq!(planned.flows(), room as usize - 1);
        // Whoever closes makes room, at once.
        planned.send(&open[0], rst(1001));
        assert!(matches!(planned.send(&refused[0], syn(1000)), Went::To(_)));
        assert_eq!(planned.flow(&open[0]), None);
        assert_eq!(planned.flows(), room as usize - 1);
    }
}

#[test]
fn rule_14_half_open_translated_flows_make_room_first() {
    for family in FAMILIES {
        let mut planned = nat(8);
        let all: Vec<_> = tuples(family, IPPROTO_TCP).take(6).collect();
        let at = establish(&mut planned, &all[0], 1000);
        for tuple in &all[1..4] {
            planned.send(tuple, syn(1000));
        }
        for (new, oldest) in [(4, 1), (5, 2)] {
            assert!(matches!(planned.send(&all[new], syn(1000)), Went::To(_)));
            assert_eq!(planned.flow(&all[oldest]), None, "the oldest half-open one has gone");
            assert_eq!(planned.flows(), 8, "both of its entries");
        }
        assert_eq!(planned.send(&all[0], ack(1001)), at, "nothing that is open goes");
        // Those that are left go early, the table being nearly full.
        planned.pass(11 * S);
        planned.pass(S);
        assert_eq!(planned.flows(), 2, "the open one's");
        assert_eq!(planned.send(&all[0], ack(1001)), at);
    }
}

#[test]
fn rule_14_both_directions_of_a_flow_stand_and_go_together() {
    for family in FAMILIES {
        let mut planned = nat(1024);
        let tuple = tuples(family, IPPROTO_TCP).next().unwrap();
        let (went, port) = planned.translated(&tuple, syn(1000));
        let forward = planned.flow(&tuple).unwrap();
        assert_eq!((planned.flows(), u16::from_be(forward.src_port_be)), (2, port));
        let reverse = match family {
            canary_agent::plan::Family::V4 => {
                planned.loaded.flows_v4.get(&opposite(&forward, IPPROTO_TCP))
            }
            canary_agent::plan::Family::V6 => {
                planned.loaded.flows_v6.get(&opposite(&forward, IPPROTO_TCP))
            }
        };
        assert_eq!(reverse.unwrap().map(|r| r.backend), Some(forward.backend));
        assert!(planned.syn_ack(&tuple, number(went), port, 1000));
        planned.pass(59 * S);
        assert_eq!(planned.flows(), 2, "a SYN-ACK may be acknowledged late");
        planned.pass(2 * S);
        assert_eq!(planned.flows(), 0, "half open for too long");
        assert!(!planned.syn_ack(&tuple, number(went), port, 1000));
    }
}

#[test]
fn rule_05_a_half_open_translated_flow_leaves_a_backend_that_lost_its_next_hop() {
    for family in FAMILIES {
        let mut planned = nat(1024);
        let tuple = tuples(family, IPPROTO_TCP).next().unwrap();
        let at = number(planned.send(&tuple, syn(1000)));
        planned.reachable(at, false);
        let now = current(&planned, &tuple);
        assert!(now != Went::To(at) && now != Went::Dropped);
        assert_eq!(planned.send(&tuple, syn(1000)), now);
        assert_eq!(planned.send(&tuple, ack(1001)), now);
    }
}
