//! Rule 16: what changes every client's bucket, and what changes nobody's.

use canary_ebpf_common::abi::IPPROTO_TCP;
use canary_tests::planned::{Shop, Went};

use crate::support::*;

#[test]
fn rule_16_doubling_the_buckets_copies_entries_and_breaks_nothing() {
    let before = Shop::default();
    let twice = Shop { buckets: 2 * before.buckets, ..before.clone() };
    let mut planned = planned(&before);
    planned.split(&[("v2", "25%")]);
    let mut open = Vec::new();
    for family in FAMILIES {
        for tuple in tuples(family, IPPROTO_TCP).take(500) {
            let at = match open.len() % 2 {
                0 => planned.send(&tuple, ack(5000)),
                _ => establish(&mut planned, &tuple, 4990),
            };
            open.push((tuple, at, current(&planned, &tuple) > Went::To(2)));
        }
    }
    planned.restart_from_pins(&twice);
    for family in FAMILIES {
        assert_eq!(planned.table(family).entries.len(), 8192);
    }
    for (tuple, at, v2) in &open {
        assert_eq!(planned.send(tuple, ack(5000)), *at, "{tuple:?}");
        assert_eq!(current(&planned, tuple) > Went::To(2), *v2, "of the same version: {tuple:?}");
    }
}
