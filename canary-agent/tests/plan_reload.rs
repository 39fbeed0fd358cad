//! Reloads, as the planner makes them: what a restart would make, and nothing that goes on
//! meanwhile is lost.

mod plan_support;

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use canary_agent::{
    config::model::{Backend, Config, Fallback, Forward, Service, Stickiness, Version},
    plan::{
        Adopted, DataPlane, Family, Hops, PlanError, Planner, Prepared, QUARANTINE_MS,
        ServiceState, Start, Upheaval,
    },
    store::{Admin, ServiceRecord, Split},
};
use canary_ebpf_common::entry::BackendIndex;
use plan_support::{config, hop, maps, service};
use proptest::prelude::*;

const START_MS: u64 = 1_000;

fn hops(config: &Config) -> Hops {
    let backends = config.services.iter().flat_map(|s| &s.versions).flat_map(|v| &v.backends);
    backends.map(|b| (b.addr.ip(), Ok(hop(b.addr)))).collect()
}

fn started(config: &Config) -> Planner {
    let start = Start { config, adopted: Adopted::default(), stored: &[], now_ms: START_MS };
    let mut planner = Planner::begin(start).unwrap().0;
    planner.set_next_hops(&hops(config));
    settle(&mut planner, START_MS);
    planner
}

/// Applies plans until nothing waits; returns the last.
fn settle(planner: &mut Planner, now_ms: u64) -> DataPlane {
    for _ in 0..3 {
        planner.step(now_ms);
        if !planner.applied(now_ms) {
            break;
        }
    }
    planner.plane().clone()
}

fn prepared(planner: &Planner, config: &Config, now_ms: u64) -> Prepared {
    let mut prepared = planner.baseline(config, &HashMap::new(), now_ms).prepare().unwrap();
    prepared.warm(hops(config), now_ms);
    prepared
}

fn reload(planner: &mut Planner, config: &Config, now_ms: u64) -> DataPlane {
    let prepared = prepared(planner, config, now_ms);
    let ready = planner.ready(prepared, now_ms).unwrap();
    planner.install(ready);
    settle(planner, now_ms)
}

fn stored(planner: &Planner) -> Vec<ServiceRecord> {
    planner.services().iter().map(ServiceState::stored_whole).collect()
}

fn split(planner: &mut Planner, name: &str, shares: &[(&str, &str)]) {
    let split: Split = shares.iter().map(|(v, s)| ((*v).to_owned(), s.parse().unwrap())).collect();
    let (at, state) = planner.service(name).unwrap();
    let proposal = state.propose(split).unwrap();
    planner.set_ownership(at, proposal.ownership);
}

fn shop() -> Service {
    service(
        "shop",
        &[
            ("stable", &[("10.0.1.1:443", 1), ("10.0.1.2:443", 2), ("10.0.1.3:443", 1)]),
            ("v2", &[("10.0.2.1:443", 1), ("10.0.2.2:443", 1)]),
        ],
    )
}

fn api() -> Service {
    let mut api = service("api", &[("a", &[("10.0.1.1:443", 1)]), ("b", &[("10.0.3.1:443", 1)])]);
    api.vips = vec!["203.0.113.20".parse().unwrap()];
    api
}

/// Each bucket of each table in words, by addresses in place of indices.
fn steering(plane: &DataPlane) -> BTreeMap<(String, Family), Vec<String>> {
    let addr: HashMap<BackendIndex, SocketAddr> =
        plane.backends.iter().map(|(index, b)| (*index, b.addr)).collect();
    let table = |s: &std::sync::Arc<canary_agent::plan::ServicePlan>| {
        let entry =
            |(e, l): (&canary_ebpf_common::entry::Entry, &canary_ebpf_common::abi::LedgerEntry)| {
                let previous = e.tracked().then(|| addr.get(&e.previous()));
                let owner = &s.versions[usize::from(l.owner())];
                format!(
                    "{:?} {previous:?} {} {owner} {}",
                    addr.get(&e.current()),
                    e.learning(),
                    l.moved_ms()
                )
            };
        let entries = s.entries.iter().zip(s.ledger.iter()).map(entry).collect();
        ((s.name.clone(), s.family), entries)
    };
    plane.services.iter().map(table).collect()
}

/// Every record in words.
fn records(plane: &DataPlane) -> Vec<String> {
    let name: HashMap<u16, &str> =
        plane.services.iter().map(|s| (s.record.id as u16, s.name.as_str())).collect();
    let mut records: Vec<String> = plane
        .backends
        .iter()
        .map(|(_, b)| {
            format!(
                "{} {:?}",
                name[&b.service],
                canary_agent::plan::BackendPlan { service: 0, ..*b }
            )
        })
        .collect();
    records.sort();
    records
}

#[test]
fn the_same_configuration_changes_nothing() {
    let configured = config(vec![shop(), api()]);
    let mut planner = started(&configured);
    split(&mut planner, "shop", &[("v2", "25%")]);
    planner.set_admin(0, "10.0.1.2:443".parse().unwrap(), Admin::Drain);
    planner.set_down(1, "10.0.3.1:443".parse().unwrap(), true);
    let before = settle(&mut planner, 2_000);
    let prepared = prepared(&planner, &configured, 3_000);
    assert_eq!((prepared.made().count(), prepared.removed().len()), (0, 0));
    let ready = planner.ready(prepared, 3_000).unwrap();
    planner.install(ready);
    assert!(settle(&mut planner, 3_000) == before);
}

#[test]
fn what_was_told_meanwhile_is_not_lost() {
    let before = config(vec![shop(), api()]);
    let mut after = before.clone();
    after.services[0].versions[0].backends[0].weight = 5;
    after.services[0].versions[1]
        .backends
        .push(Backend { addr: "10.0.2.9:443".parse().unwrap(), weight: 1 });
    after.services[1].drain = Some(Duration::from_secs(5));

    let told = |planner: &mut Planner| {
        split(planner, "shop", &[("v2", "40%")]);
        let (shop, _) = planner.service("shop").unwrap();
        planner.set_admin(shop, "10.0.1.3:443".parse().unwrap(), Admin::Maint);
        planner.set_down(shop, "10.0.1.2:443".parse().unwrap(), true);
        settle(planner, 2_000)
    };
    let mut early = started(&before);
    told(&mut early);
    let expected = reload(&mut early, &after, 3_000);

    let mut late = started(&before);
    let prepared = prepared(&late, &after, 1_500);
    told(&mut late);
    let ready = late.ready(prepared, 3_000).unwrap();
    late.install(ready);
    let found = settle(&mut late, 3_000);
    assert_eq!(steering(&found), steering(&expected));
    assert_eq!(records(&found), records(&expected));
    assert_eq!(stored(&late), stored(&early));
}

/// 21 % of 4,096 buckets are rounded down, so what is left is more than 79 %.
#[test]
fn what_was_control_asks_for_no_more_than_the_others_leave() {
    let mut shop = shop();
    shop.buckets = 4096;
    shop.versions.push(Version {
        name: "v3".to_owned(),
        backends: vec![Backend { addr: "10.0.4.1:443".parse().unwrap(), weight: 1 }],
    });
    let mut configured = config(vec![shop]);
    let mut planner = started(&configured);
    split(&mut planner, "shop", &[("v2", "21%")]);
    settle(&mut planner, START_MS);
    let owners = planner.service("shop").unwrap().1.ownership().owners.clone();

    configured.services[0].control = 2;
    reload(&mut planner, &configured, START_MS + QUARANTINE_MS);
    let ownership = planner.service("shop").unwrap().1.ownership();
    assert_eq!(ownership.split["stable"].to_string(), "79%");
    assert_eq!(ownership.owners, owners, "nobody moves");

    // The split can be changed on, and the table can grow.
    split(&mut planner, "shop", &[("stable", "79%"), ("v2", "20.9%")]);
    configured.services[0].buckets = 8192;
    reload(&mut planner, &configured, START_MS + 2 * QUARANTINE_MS);
}

/// A host without a store guesses what was asked for from the buckets: 1,366 of 4,096 are 33.35 %
/// and 1,365 are 33.33 %, and three versions that have all of them would ask for more than all.
#[test]
fn shares_that_are_guessed_fit_together() {
    let mut three = shop();
    three.buckets = 4096;
    for (name, addr) in [("v3", "10.0.4.1:443"), ("v4", "10.0.5.1:443")] {
        let backends = vec![Backend { addr: addr.parse().unwrap(), weight: 1 }];
        three.versions.push(Version { name: name.to_owned(), backends });
    }
    let mut configured = config(vec![three]);
    let mut planner = started(&configured);
    let shares = [("v2", "1366/4096"), ("v3", "1365/4096"), ("v4", "1365/4096")];
    split(&mut planner, "shop", &shares);
    settle(&mut planner, START_MS);

    configured.services[0].buckets = 8192;
    let adopted = maps(planner.plane());
    let start = Start { config: &configured, adopted, stored: &[], now_ms: START_MS };
    let grown = Planner::begin(start).unwrap().0;
    let ownership = grown.service("shop").unwrap().1.ownership();
    assert_eq!(ownership.counts()[..4], [0, 2732, 2730, 2730]);
}

#[test]
fn a_plan_that_another_has_overtaken_is_refused() {
    let before = config(vec![shop()]);
    let after = config(vec![shop(), api()]);
    let mut planner = started(&before);
    let first = prepared(&planner, &after, 2_000);
    reload(&mut planner, &after, 2_000);
    assert_eq!(planner.ready(first, 2_000).err(), Some(PlanError::Overtaken));
}

#[test]
fn a_service_that_goes_is_swept_and_its_room_rests() {
    let mut both = config(vec![shop(), api()]);
    // Room for two tables.
    both.agent.capacity.buckets = 2 * 4096;
    both.agent.capacity.services = 1;
    let alone = Config { services: vec![api()], ..both.clone() };
    let mut planner = started(&both);
    let gone: Vec<BackendIndex> =
        planner.services()[0].tables()[0].backends().iter().map(|b| b.index).collect();
    let prepared = prepared(&planner, &alone, 2_000);
    let ready = planner.ready(prepared, 2_000).unwrap();
    planner.install(ready);
    planner.step(2_000);
    let plane = planner.plane();
    assert_eq!(plane.services.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["api"]);
    assert_eq!(plane.sweep.backends, gone);
    assert!(plane.backends.iter().all(|(index, _)| !gone.contains(index)));
    assert!(planner.service("shop").is_none() && planner.service("api").unwrap().0 == 0);
    // Not in force yet, and then not rested yet: no other gets its place.
    let early = planner.baseline(&both, &HashMap::new(), 2_500).prepare();
    assert!(matches!(early.err(), Some(PlanError::Services { .. } | PlanError::Pages { .. })));
    planner.applied(2_500);
    assert!(planner.baseline(&both, &HashMap::new(), 2_500 + QUARANTINE_MS - 1).prepare().is_err());
    let back = reload(&mut planner, &both, 2_500 + QUARANTINE_MS);
    assert_eq!(back.services.len(), 2);
    assert_eq!(planner.services()[0].config().name, "shop", "in the order of the files");
}

#[test]
fn a_service_that_comes_back_goes_on_with_what_is_stored_of_it() {
    let both = config(vec![shop(), api()]);
    let alone = config(vec![api()]);
    let mut planner = started(&both);
    split(&mut planner, "shop", &[("v2", "30%")]);
    settle(&mut planner, 2_000);
    let record = planner.services()[0].stored_whole();
    reload(&mut planner, &alone, 3_000);
    let parked = HashMap::from([("shop".to_owned(), record.clone())]);
    let mut prepared = planner.baseline(&both, &parked, 9_000).prepare().unwrap();
    prepared.warm(hops(&both), 9_000);
    let ready = planner.ready(prepared, 9_000).unwrap();
    planner.install(ready);
    settle(&mut planner, 9_000);
    assert_eq!(planner.service("shop").unwrap().1.stored_whole(), record);
}

/// Something that is changed about a service.
type Edit = fn(&mut Service);

#[test]
fn another_hash_forgets_what_was_tracked_and_sweeps_it() {
    let before = config(vec![shop()]);
    let changes: [(&str, Edit); 3] = [
        ("stickiness", |s| s.stickiness = Stickiness::Connection),
        ("stickiness` or `prefix", |s| s.stickiness = Stickiness::Subnet { v4: 20, v6: 48 }),
        ("hash_key", |s| s.hash_key = [9, 9]),
    ];
    for (key, change) in changes {
        let mut planner = started(&before);
        split(&mut planner, "shop", &[("v2", "50%")]);
        let tracked = settle(&mut planner, 2_000);
        assert!(tracked.services[0].entries.iter().any(|e| e.tracked()));
        let mut after = before.clone();
        change(&mut after.services[0]);
        let prepared = prepared(&planner, &after, 3_000);
        let made = prepared.made().next().unwrap();
        assert_eq!(made.upheavals, [Upheaval::Rehash(key)]);
        assert_eq!(made.preview.moved[0].len(), 4096, "everybody is somewhere else");
        let ready = planner.ready(prepared, 3_000).unwrap();
        planner.install(ready);
        planner.step(3_000);
        let plane = planner.plane();
        assert!(!plane.services[0].entries.iter().any(|e| e.tracked()), "{key}");
        assert_eq!(plane.sweep.buckets[0].1.len(), 4096, "{key}");
        let owners = |plane: &DataPlane| -> Vec<u8> {
            plane.services[0].ledger.iter().map(|l| l.owner()).collect()
        };
        assert_eq!(owners(plane), owners(&tracked), "{key}: shares stay");
        planner.applied(3_000);
    }
}

#[test]
fn another_way_of_forwarding_begins_with_records_of_its_own() {
    let before = config(vec![shop()]);
    let mut after = before.clone();
    after.services[0].forward = Forward::Nat;
    let mut planner = started(&before);
    split(&mut planner, "shop", &[("v2", "50%")]);
    let old = settle(&mut planner, 2_000);
    let prepared = prepared(&planner, &after, 3_000);
    assert_eq!(prepared.made().next().unwrap().upheavals, [Upheaval::Forward]);
    let ready = planner.ready(prepared, 3_000).unwrap();
    planner.install(ready);
    planner.step(3_000);
    let plane = planner.plane();
    let indices = |plane: &DataPlane| plane.backends.iter().map(|(i, _)| *i).collect::<Vec<_>>();
    assert!(indices(plane).iter().all(|index| !indices(&old).contains(index)));
    let mut swept = plane.sweep.backends.clone();
    swept.sort();
    assert_eq!(swept, indices(&old), "no entry of the old way is left");
    let table =
        |plane: &DataPlane| (plane.services[0].record.id, plane.services[0].record.first_page);
    assert_ne!(table(plane), table(&old));
    let shares = |plane: &DataPlane| -> Vec<u8> {
        plane.services[0].ledger.iter().map(|l| l.owner()).collect()
    };
    assert_eq!(shares(plane), shares(&old));
    assert!(plane.services[0].entries.iter().all(|e| !e.current().is_none() && !e.tracked()));
}

#[test]
fn a_version_that_waited_for_a_slot_gets_it_with_a_later_reload() {
    let mut before = config(vec![shop()]);
    let versions = &mut before.services[0].versions;
    let one = |n: u8| Version {
        name: format!("v{n}"),
        backends: vec![Backend { addr: SocketAddr::from(([10, 0, 9, n], 443)), weight: 1 }],
    };
    versions.extend((3..17).map(one));
    assert_eq!(versions.len(), 16);
    let mut planner = started(&before);
    split(&mut planner, "shop", &[("v16", "10%")]);
    settle(&mut planner, 2_000);
    let mut after = before.clone();
    *after.services[0].versions.last_mut().unwrap() = one(17);
    reload(&mut planner, &after, 3_000);
    let slot = |planner: &Planner| planner.services()[0].slot("v17");
    assert_eq!(slot(&planner), None, "connections of v16 are still open");
    reload(&mut planner, &after, 4_000);
    assert_eq!(slot(&planner), None);
    settle(&mut planner, 2_000_000);
    settle(&mut planner, 2_000_001);
    reload(&mut planner, &after, 2_100_000);
    assert!(slot(&planner).is_some());
}

#[test]
fn what_would_move_is_what_moves() {
    let before = config(vec![shop()]);
    let mut after = before.clone();
    let stable = &mut after.services[0].versions[0].backends;
    stable[0].weight = 3;
    stable.remove(1);
    stable.push(Backend { addr: "10.0.1.9:443".parse().unwrap(), weight: 1 });
    let mut planner = started(&before);
    split(&mut planner, "shop", &[("v2", "10%")]);
    let old = steering(&settle(&mut planner, 2_000));
    let said = planner.baseline(&after, &HashMap::new(), 3_000).prepare().unwrap();
    let made = said.made().next().unwrap();
    let (moved, touched) = (made.preview.moved[0].clone(), made.preview.touched.clone());
    let new = steering(&reload(&mut planner, &after, 3_000));
    let current = |words: &String| words.split(' ').next().unwrap().to_owned();
    for (bucket, (old, new)) in (0..).zip(old.values().flatten().zip(new.values().flatten())) {
        assert_eq!(current(old) != current(new), moved.contains(bucket), "bucket {bucket}");
    }
    let touched: Vec<String> = touched.iter().map(ToString::to_string).collect();
    assert_eq!(touched, ["10.0.1.1:443", "10.0.1.2:443", "10.0.1.3:443", "10.0.1.9:443"]);
}

/// One thing that an operator writes into the file.
fn edit(config: &mut Config, what: u8, n: u8) {
    let pool =
        |n: u8| -> SocketAddr { format!("10.0.{}.{}:443", n % 4 + 1, n % 7 + 1).parse().unwrap() };
    if what == 0 {
        match config.services.iter().position(|s| s.name == "api") {
            Some(at) => drop(config.services.remove(at)),
            None => config.services.insert(usize::from(n) % 2, api()),
        }
        return;
    }
    let shop = config.services.iter_mut().find(|s| s.name == "shop").unwrap();
    let version = usize::from(n) % shop.versions.len();
    match what {
        1 => {
            let backends = &mut shop.versions[version].backends;
            let backend = usize::from(n / 7) % backends.len();
            backends[backend].weight = u32::from(n % 4) + 1;
        }
        2 => {
            let addr = pool(n);
            let backends = &mut shop.versions[version].backends;
            if backends.iter().all(|b| b.addr != addr) {
                backends.push(Backend { addr, weight: u32::from(n % 3) + 1 });
            }
        }
        3 => {
            let backends = &mut shop.versions[version].backends;
            if backends.len() > 1 {
                backends.remove(usize::from(n) % backends.len());
            }
        }
        4 => {
            shop.drain =
                [None, Some(Duration::ZERO), Some(Duration::from_secs(50))][usize::from(n) % 3]
        }
        5 => shop.fallback = [Fallback::Control, Fallback::None][usize::from(n) % 2],
        6 => shop.udp_idle = Duration::from_secs(u64::from(n % 50) + 1),
        7 => match shop.versions.iter().position(|v| v.name == "v3") {
            Some(at) if at != shop.control => {
                shop.versions.remove(at);
                shop.control = shop.control.min(at.saturating_sub(1));
            }
            Some(_) => {}
            None => {
                let backends = vec![Backend { addr: pool(n), weight: 1 }];
                shop.versions.push(Version { name: "v3".to_owned(), backends });
            }
        },
        8 => shop.control = version,
        9 => shop.buckets = 8192,
        10 => shop.vips.push(IpAddr::from([203, 0, 113, n])),
        _ => shop.ports[1].port = 8443 + u16::from(n),
    }
}

/// Edits, each a kind and a number; v2's share in percent; milliseconds to wait.
type Step = (Vec<(u8, u8)>, u8, u64);

/// Reloads what `steps` edit, each after a share for v2 and a wait, and holds every reload against
/// an agent that begins anew at that moment.
fn assert_reloads_make_what_restarts_make(steps: &[Step]) {
    let mut configured = config(vec![shop(), api()]);
    let mut now = START_MS;
    let mut planner = started(&configured);
    for &(ref edits, share, wait) in steps {
        now += wait + QUARANTINE_MS;
        settle(&mut planner, now);
        let control = {
            let shop = planner.service("shop").unwrap().1;
            shop.config().versions[shop.config().control].name.clone()
        };
        if control != "v2" {
            split(&mut planner, "shop", &[("v2", &format!("{share}%"))]);
        }
        settle(&mut planner, now);
        now += QUARANTINE_MS;
        // A drain that ends in that second has ended for both: who begins anew doesn't know which
        // buckets a backend that left still waits for, and waits for all that are tracked.
        settle(&mut planner, now);
        edits.iter().for_each(|(what, n)| edit(&mut configured, *what, *n));

        let mut adopted = maps(planner.plane());
        // Services that are not configured rest until the next plan is in force.
        adopted.services.retain(|s| configured.services.iter().any(|c| c.name == s.name));
        let ids: Vec<u16> = adopted.services.iter().map(|s| s.id).collect();
        adopted.backends.retain(|(_, b)| ids.contains(&b.service));
        let known = stored(&planner);
        let start = Start { config: &configured, adopted, stored: &known, now_ms: now };
        let mut restarted = Planner::begin(start).unwrap().0;
        restarted.set_next_hops(&hops(&configured));
        let expected = settle(&mut restarted, now);

        let found = reload(&mut planner, &configured, now);
        assert_eq!(steering(&found), steering(&expected));
        assert_eq!(records(&found), records(&expected));
        assert_eq!(stored(&planner), stored(&restarted));
    }
}

#[test]
fn a_drain_that_ends_as_a_reload_comes_is_no_difference() {
    assert_reloads_make_what_restarts_make(&[(vec![(3, 7)], 1, 0), (vec![(3, 0)], 1, 995_437)]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// The agent that goes on and one that begins anew are the same, bucket for bucket, but for
    /// numbers that nobody sees.
    #[test]
    fn a_reload_makes_what_a_restart_makes(
        steps in prop::collection::vec(
            (prop::collection::vec((0..12_u8, any::<u8>()), 1..4), 0..=60_u8, 0..2_000_000_u64),
            1..5,
        ),
    ) {
        assert_reloads_make_what_restarts_make(&steps);
    }
}
