//! Views of packets, over any bytes: parsing, steering, translating, wrapping, answering. The same
//! code is in the programs; here it is looked at with every check that the compiler has.
#![no_main]

use std::cell::RefCell;

use canary_ebpf_common::{
    abi::{
        BACKEND_USABLE, BACKEND_V6, Backend, ForwardMode, IPPROTO_TCP, IPPROTO_UDP, PAGE_BUCKETS,
        SERVICE_HASH_CONNECTION, SERVICE_QUIC, SERVICE_TCP, SERVICE_UDP, Service, VipKey, way,
    },
    entry::{BackendIndex, Entry},
    model::{Action, Model, Tables},
    ports::PortRange,
    tunnel::GUE_PORT,
};
use libfuzzer_sys::fuzz_target;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Frames until everything is forgotten.
const LIFE: u32 = 1000;

/// Service `n`'s addresses.
fn vips(n: u8) -> ([u8; 4], [u8; 16]) {
    let mut v6 = [0; 16];
    (v6[0], v6[1], v6[15]) = (0xfd, 1, n);
    ([10, 1, 0, n], v6)
}

fn halves(bytes: [u8; 16]) -> [u64; 2] {
    let (halves, _) = bytes.as_chunks::<8>();
    [halves[0], halves[1]].map(u64::from_ne_bytes)
}

/// A service of each mode, twice: one that hashes connections, one clients with tracked buckets.
fn model() -> Model {
    let modes = [ForwardMode::Nat, ForwardMode::Dsr, ForwardMode::Ipip, ForwardMode::Gue];
    let mut tables = Tables {
        ifindex: 1,
        macs: [MAC].into(),
        tagged_way: way::tagged(1, 0),
        ways_out: [1].into(),
        ports: PortRange { first: 10_000, count: 1000 },
        backends: vec![Backend::default()],
        ..Tables::default()
    };
    for n in 1..=8_u8 {
        let tracked = n > 4;
        let v6 = n % 2 == 0;
        let mut addr = [0; 16];
        addr[0] = if v6 { 0xfd } else { 10 };
        (addr[3], addr[15]) = (n, n);
        let index = BackendIndex::new(n.into());
        tables.backends.push(Backend {
            ifindex: 1,
            addr: halves(addr),
            source: halves(vips(9).1),
            port_be: 80_u16.to_be(),
            nat_count: 1,
            flags: BACKEND_USABLE | if v6 { BACKEND_V6 } else { 0 },
            inner_mtu: 1400,
            mss: 1300,
            gue_port_be: GUE_PORT.to_be(),
            vlan: u32::from(n == 3),
            ..Backend::default()
        });
        let mode = modes[usize::from(n - 1) % 4];
        let service = Service {
            first_page: u32::from(n - 1),
            bucket_mask: PAGE_BUCKETS - 1,
            flags: mode as u32
                | if tracked { SERVICE_QUIC } else { SERVICE_HASH_CONNECTION }
                | SERVICE_TCP
                | SERVICE_UDP,
            id: n.into(),
            hash_key: [1, 2],
            mask_v4_be: u32::MAX,
            udp_idle_ms: 30_000,
            mask_v6: [u64::MAX; 2],
        };
        let (v4, six) = vips(n);
        let v4_be = u32::from_ne_bytes(v4);
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            let port_be = 80_u16.to_be();
            tables.services.insert(([0; 2], VipKey::v4(v4_be, port_be, protocol)), service);
            tables.services.insert((halves(six), VipKey::v6(port_be, protocol)), service);
        }
        tables.services.insert(([0; 2], VipKey::any_v4(v4_be)), service);
        tables.services.insert((halves(six), VipKey::any_v6()), service);
        let entry = if tracked {
            Entry::tracking(index, BackendIndex::new(1), n % 2 == 0)
        } else {
            Entry::steady(index)
        };
        tables.table.extend([entry.0; PAGE_BUCKETS as usize]);
    }
    Model::new(tables, 4096, &[halves(vips(9).1)])
}

thread_local! {
    static MODEL: RefCell<(u32, Model)> = RefCell::new((0, model()));
}

fuzz_target!(|bytes: &[u8]| {
    // The first byte says which service is meant, the others are the frame.
    let Some((choice, rest)) = bytes.split_first() else { return };
    if rest.len() < 14 {
        return;
    }
    let mut frame = rest.to_vec();
    let (v4, v6) = vips(choice % 10);
    if choice & 0x10 == 0 {
        frame[..6].copy_from_slice(&MAC);
        let place: Option<(usize, &[u8])> = match frame[12..14] {
            [0x08, 0x00] => Some((30, &v4)),
            [0x86, 0xdd] => Some((38, &v6)),
            _ => None,
        };
        if let Some((at, addr)) = place
            && let Some(to) = frame.get_mut(at..at + addr.len())
        {
            to.copy_from_slice(addr);
        }
    }
    MODEL.with_borrow_mut(|(age, all)| {
        *age += 1;
        if *age == LIFE {
            (*age, *all) = (0, model());
        }
        let fate = all.fate(&frame);
        match fate.action {
            Action::Pass => assert_eq!(fate.frame, frame, "what passes is untouched"),
            Action::Drop => assert!(fate.frame.is_empty() && fate.reason.is_some()),
            Action::Send(_) => assert!(fate.frame.len() >= 14),
        }
    });
});
