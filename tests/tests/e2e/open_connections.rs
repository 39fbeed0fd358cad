//! Split changes move no connection that is open.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use canary_tests::{client::Connection, host, server::HTTP_PORT, topology::Family, wait};

use crate::support::{Bench, SHOP, Way, service};

/// Keep-alive connections that are open from the beginning, of each family.
const KEPT: u32 = 20;

/// Downloads that run all the time, of each family.
const DOWNLOADS: u32 = 5;

/// Connections of each family that are opened at each share, and kept.
const NEW: u32 = 5;

/// Bytes a second of a download.
const RATE: u64 = 400_000;

/// A download that runs until it is told to stop.
struct Download {
    bytes: Arc<AtomicU64>,
    thread: JoinHandle<Result<u64, String>>,
}

impl Download {
    fn start(bench: &Bench, family: Family, index: u32, stop: &Arc<AtomicBool>) -> Self {
        let to = SocketAddr::new(family.vip(), HTTP_PORT);
        let source = family.client(index);
        let bytes = Arc::new(AtomicU64::new(0));
        let (counter, stop) = (Arc::clone(&bytes), Arc::clone(stop));
        let thread = bench.client().spawn_thread("download", move || {
            let mut connection = Connection::open_here(source, to).map_err(|e| e.to_string())?;
            let got = connection.download(1 << 40, Some(RATE), |piece| {
                counter.fetch_add(piece, Ordering::Relaxed);
                !stop.load(Ordering::Relaxed)
            });
            got.map_err(|error| format!("{source}: {error}"))
        });
        Self { bytes, thread }
    }
}

#[track_caller]
fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    let agent = bench.agent("");
    let mut pool = bench.connect(Family::V4, 0..KEPT);
    pool.open.extend(bench.connect(Family::V6, 0..KEPT).open);
    assert!(pool.open.iter().all(|(_, name)| name.starts_with("stable")));
    let stop = Arc::new(AtomicBool::new(false));
    let downloads: Vec<Download> = Family::ALL
        .into_iter()
        .flat_map(|family| (1_000..1_000 + DOWNLOADS).map(move |index| (family, index)))
        .map(|(family, index)| Download::start(&bench, family, index, &stop))
        .collect();
    let flowing = |when: &str| {
        let before: Vec<u64> =
            downloads.iter().map(|one| one.bytes.load(Ordering::Relaxed)).collect();
        wait::until(&format!("every download, {when}"), || {
            let still = downloads
                .iter()
                .zip(&before)
                .position(|(one, before)| one.bytes.load(Ordering::Relaxed) <= before + RATE / 20);
            still.map_or(Ok(()), |index| Err(format!("download {index} stands still")))
        });
    };
    flowing("at the start");
    let steps = ["0", "1%", "5%", "50%", "100%", "0", "100%", "50%", "0"];
    let mut next = 2_000;
    for step in steps {
        agent.split(SHOP, "v2", step);
        let when = format!("{test}, at {step}");
        pool.assert_where_they_were(&when);
        flowing(&when);
        for family in Family::ALL {
            let new = bench.connect(family, next..next + NEW).open;
            if step == "0" || step == "100%" {
                let version = if step == "0" { "stable" } else { "v2" };
                let elsewhere = new.iter().find(|(_, name)| !name.starts_with(version));
                assert!(elsewhere.is_none(), "{when}: a new connection is on {elsewhere:?}");
            }
            pool.open.extend(new);
        }
        next += NEW;
        // Now as well for those that have begun at this share.
        pool.assert_where_they_were(&when);
    }
    let tracked = service(&agent.status(), SHOP).tracked_buckets;
    // Translated flows have entries anyway; the others are kept by tracking.
    assert_eq!(tracked > 0, way == Way::Dsr, "{tracked} buckets are tracked");
    stop.store(true, Ordering::Relaxed);
    for download in downloads {
        let got = download.thread.join().expect("a download's thread");
        let got = got.unwrap_or_else(|error| panic!("{test}: a download is broken: {error}"));
        assert!(got > RATE / 20, "{got} bytes");
    }
    pool.assert_where_they_were("at the end");
}

#[test]
fn open_connections_stay_through_split_changes_in_nat() {
    exercise("open_connections_stay_through_split_changes_in_nat", Way::NatTwoArmed);
}

#[test]
fn open_connections_stay_through_split_changes_in_nat_one_armed() {
    exercise("open_connections_stay_through_split_changes_in_nat_one_armed", Way::NatOneArmed);
}

#[test]
fn open_connections_stay_through_split_changes_in_dsr() {
    exercise("open_connections_stay_through_split_changes_in_dsr", Way::Dsr);
}
