//! Rule 16: what changes every client's bucket, and what changes nobody's.

use canary_ebpf_common::abi::IPPROTO_TCP;
use canary_tests::planned::Shop;

use crate::support::*;

#[test]
fn rule_16_doubling_the_buckets_copies_entries_and_moves_nothing() {
    let before = Shop::default();
    let twice = Shop { buckets: 2 * before.buckets, ..before.clone() };
    let mut planned = planned(&before);
    planned.split(&[("v2", "25%")]);
    let mut open = Vec::new();
    for family in FAMILIES {
        for tuple in tuples(family, IPPROTO_TCP).take(500) {
            let new = current(&planned, &tuple);
            let at = match open.len() % 2 {
                0 => planned.send(&tuple, ack(5000)),
                _ => establish(&mut planned, &tuple, 4990),
            };
            open.push((tuple, at, new));
        }
    }
    planned.restart_from_pins(&twice);
    for family in FAMILIES {
        assert_eq!(planned.table(family).entries.len(), 8192);
    }
    for (tuple, at, new) in &open {
        assert_eq!(planned.send(tuple, ack(5000)), *at, "{tuple:?}");
        assert_eq!(current(&planned, tuple), *new, "new ones, too: {tuple:?}");
    }
}

#[test]
fn rule_16_what_gives_every_client_another_bucket_is_refused_on_a_service_with_traffic() {
    let before = Shop { stickiness: "subnet", ..Shop::default() };
    let with = |change: fn(&mut Shop)| {
        let mut shop = before.clone();
        change(&mut shop);
        shop
    };
    let changes = [
        (with(|s| s.stickiness = "connection"), "stickiness"),
        (with(|s| s.stickiness = "client"), "stickiness"),
        (with(|s| s.prefix.0 = 16), "prefix"),
        (with(|s| s.prefix.1 = 48), "prefix"),
        (with(|s| s.hash_key = Some("000102030405060708090a0b0c0d0e0f")), "hash_key"),
    ];
    let mut planned = planned(&before);
    for (shop, key) in &changes {
        assert_eq!(planned.refused(shop), None, "{key}: nobody has come yet");
    }
    for family in FAMILIES {
        let tuple = tuples(family, IPPROTO_TCP).next().unwrap();
        let at = planned.send(&tuple, syn(1000));
        assert_eq!(planned.send(&tuple, ack(1001)), at);
    }
    for (shop, key) in &changes {
        let said = planned.refused(shop).unwrap_or_else(|| panic!("{key}: not refused"));
        assert!(said.contains(key) && said.contains("`shop`") && said.contains("detach"), "{said}");
    }
    assert_eq!(planned.refused(&before), None);
    assert_eq!(planned.refused(&Shop { buckets: 8192, ..before }), None);
}
