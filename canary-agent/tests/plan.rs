//! The planner over random histories: what is open stays, what is given out is
//! nobody else's, and a restart changes nothing.

mod plan_support;

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use canary_agent::{
    config::model::{Ask, Check, Config, Existing, Forward, Health, Service, Timing, Via},
    plan::{
        Adopted, BackendPlan, DataPlane, Family, NextHop, Planner, QUARANTINE_MS, ServiceState,
        Start, Table, clear_due_ms,
    },
    store::{Admin, ServiceRecord, Split},
};
use canary_ebpf_common::entry::{BackendIndex, Entry};
use plan_support::{config, hop, maps, service};
use proptest::prelude::*;

const POOL: [&str; 8] = [
    "10.0.1.1:80",
    "10.0.1.2:80",
    "10.0.1.3:80",
    "10.0.2.1:80",
    "10.0.2.2:80",
    "10.0.3.1:80",
    "[2001:db8::11]:80",
    "[2001:db8::12]:80",
];

fn begin(config: &Config, adopted: Adopted, stored: &[ServiceRecord], now_ms: u64) -> Planner {
    Planner::begin(Start { config, adopted, stored, now_ms }).unwrap().0
}

fn all_hops(config: &Config) -> HashMap<IpAddr, Result<NextHop, String>> {
    let backends = config.services.iter().flat_map(|s| &s.versions).flat_map(|v| &v.backends);
    backends.map(|b| (b.addr.ip(), Ok(hop(b.addr)))).collect()
}

fn started(config: &Config) -> Planner {
    let mut planner = begin(config, Adopted::default(), &[], 1_000);
    planner.set_next_hops(&all_hops(config));
    planner.step(1_000);
    planner.applied(1_000);
    planner
}

fn stored(planner: &Planner) -> Vec<ServiceRecord> {
    planner.services().iter().map(ServiceState::stored_whole).collect()
}

fn set_split(planner: &mut Planner, service: usize, shares: &[(&str, &str)]) -> bool {
    let split: Split = shares.iter().map(|(v, s)| ((*v).to_owned(), s.parse().unwrap())).collect();
    match planner.services()[service].propose(split) {
        Ok(proposal) => {
            planner.set_ownership(service, proposal.ownership);
            true
        }
        Err(_) => false,
    }
}

fn three() -> Service {
    let mut shop = service(
        "shop",
        &[
            (
                "stable",
                &[
                    ("10.0.1.1:80", 1),
                    ("10.0.1.2:80", 2),
                    ("10.0.1.3:80", 1),
                    ("[2001:db8::11]:80", 1),
                ],
            ),
            ("v2", &[("10.0.2.1:80", 1), ("10.0.2.2:80", 1), ("[2001:db8::12]:80", 1)]),
            ("v3", &[("10.0.3.1:80", 1)]),
        ],
    );
    shop.vips.push("2001:db8::10".parse().unwrap());
    shop
}

#[derive(Clone, Debug)]
enum Event {
    Split(u8, u8),
    Down(u8, bool),
    Hop(u8, bool),
    Wait(u64),
    Restart,
    Backends(u8),
    Reload(u8),
    FailedApply,
    Admin(u8, Admin),
    Prepare(u8, u8),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..=100_u8, 0..=100_u8).prop_map(|(a, b)| Event::Split(a, b)),
        2 => (0..8_u8, any::<bool>()).prop_map(|(n, down)| Event::Down(n, down)),
        2 => (0..8_u8, any::<bool>()).prop_map(|(n, known)| Event::Hop(n, known)),
        4 => (0..1_200_000_u64).prop_map(Event::Wait),
        2 => (0..40_000_u64).prop_map(Event::Wait),
        1 => Just(Event::Restart),
        1 => (0..=255_u8).prop_map(Event::Backends),
        2 => (0..=255_u8).prop_map(Event::Reload),
        1 => Just(Event::FailedApply),
        2 => (0..8_u8, 0..3_usize).prop_map(|(n, admin)| Event::Admin(n, Admin::ALL[admin])),
        1 => (0..=100_u8, 0..=100_u8).prop_map(|(a, b)| Event::Prepare(a, b)),
    ]
}

/// The configuration with only those backends of v2, v3 and stable whose bit is set;
/// the first of stable in each family is always there.
fn with_backends(bits: u8) -> Config {
    let mut shop = three();
    for version in &mut shop.versions {
        version.backends.retain(|b| {
            let n = POOL.iter().position(|a| *a == b.addr.to_string()).unwrap();
            matches!(n, 0 | 6) || bits >> n & 1 != 0
        });
    }
    shop.versions.retain(|v| !v.backends.is_empty());
    shop.slow_start = Duration::from_secs(20);
    config(vec![shop])
}

/// What the kernel side and its flow table know, and what must hold from one plan to the next.
struct Kernel {
    plane: DataPlane,
    /// Who each index was when it was last in force, and since when it is gone.
    gone: BTreeMap<BackendIndex, ((SocketAddr, u16), u64)>,
    /// By table and bucket, every backend that an open connection of the bucket may be on.
    flows: HashMap<(u32, usize), Vec<SocketAddr>>,
    drain_ms: u64,
}

impl Kernel {
    fn apply(&mut self, next: &DataPlane, now: u64) {
        let old_addr: HashMap<BackendIndex, SocketAddr> =
            self.plane.backends.iter().map(|(i, b)| (*i, b.addr)).collect();
        let addr: HashMap<BackendIndex, SocketAddr> =
            next.backends.iter().map(|(i, b)| (*i, b.addr)).collect();
        for (index, b) in &next.backends {
            if let Some(was) = self.plane.backends.iter().find(|(i, _)| i == index) {
                assert_eq!(
                    (was.1.addr, was.1.service),
                    (b.addr, b.service),
                    "{index:?} is somebody else at once"
                );
            } else if let Some(((was, _), since)) = self.gone.get(index) {
                assert!(
                    *was == b.addr || now >= since + QUARANTINE_MS,
                    "{index:?} is used again too early"
                );
            }
        }
        for (index, b) in &self.plane.backends {
            if !addr.contains_key(index) {
                assert!(next.sweep.backends.contains(index), "{index:?} goes without a sweep");
                self.gone.insert(*index, ((b.addr, b.service), now));
            }
        }
        for table in &next.services {
            let id = table.record.id;
            let swept: Vec<u32> = next
                .sweep
                .buckets
                .iter()
                .filter(|(t, _)| u32::from(*t) == id)
                .flat_map(|(_, b)| b.clone())
                .collect();
            let before = self.plane.services.iter().find(|t| t.record.id == id);
            for (bucket, entry) in table.entries.iter().enumerate() {
                for index in [Some(entry.current()), entry.tracked().then(|| entry.previous())]
                    .into_iter()
                    .flatten()
                {
                    assert!(
                        index.is_none() || addr.contains_key(&index),
                        "bucket {bucket} names {index:?}, which is not there"
                    );
                }
                let old = before.map_or(Entry::default(), |t| t.entries[bucket]);
                let moved_ms = before.map_or(0, |t| t.ledger[bucket].moved_ms());
                let moves = old.current() != entry.current();
                // Nobody's connection is on a backend in maintenance.
                let passed_over = |index| {
                    let maintained = |(i, b): &(_, BackendPlan)| *i == index && b.maint;
                    entry.previous() == entry.current() && next.backends.iter().any(maintained)
                };
                match (old.tracked(), entry.tracked()) {
                    (true, true) => assert!(
                        old.previous() == entry.previous() || passed_over(old.previous()),
                        "`previous` changes while tracked"
                    ),
                    (true, false) => {
                        assert!(!moves, "a bucket moves and forgets at once");
                        assert!(
                            now >= moved_ms + self.drain_ms * 9 / 10,
                            "forgotten at {now}, moved at {moved_ms}"
                        );
                        assert!(swept.contains(&(bucket as u32)), "cleared without a sweep");
                        self.flows.remove(&(id, bucket));
                    }
                    (false, true) => assert!(
                        // One that does not move is being watched before it does.
                        (entry.previous() == old.current() || passed_over(old.current()))
                            && !swept.contains(&(bucket as u32))
                    ),
                    (false, false) => assert!(
                        !moves || old.current().is_none(),
                        "a bucket moves and nobody remembers"
                    ),
                }
                if entry.tracked() {
                    let due =
                        clear_due_ms(bucket as u32, table.ledger[bucket].moved_ms(), self.drain_ms);
                    assert!(now < due || moves, "still tracked {} ms after it was due", now - due);
                    // Connections are opened on `current` all the time; flow entries hold them.
                    let open = self.flows.entry((id, bucket)).or_default();
                    open.extend(
                        [old_addr.get(&old.current()), addr.get(&entry.current())]
                            .into_iter()
                            .flatten(),
                    );
                    open.sort();
                    open.dedup();
                    for server in open.iter() {
                        assert!(
                            addr.values().any(|a| a == server),
                            "{server} is gone while bucket {bucket} may have connections on it"
                        );
                    }
                }
            }
        }
        self.plane = next.clone();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn open_connections_stay_through_any_history(events in prop::collection::vec(event(), 1..25)) {
        let mut configured = with_backends(0xff);
        let mut hops = all_hops(&configured);
        let mut now = 1_000;
        let mut begun = now;
        let mut planner = started(&configured);
        let mut kernel = Kernel { plane: planner.plane().clone(), gone: BTreeMap::new(), flows: HashMap::new(), drain_ms: 1_000_000 };
        let mut fail = false;
        for event in events {
            now += 10;
            match event {
                Event::Split(a, b) => {
                    let (a, b) = (format!("{a}%"), format!("{b}%"));
                    let v3 = configured.services[0].versions.iter().any(|v| v.name == "v3");
                    let v2 = configured.services[0].versions.iter().any(|v| v.name == "v2");
                    let mut shares = Vec::new();
                    if v2 { shares.push(("v2", a.as_str())); }
                    if v3 { shares.push(("v3", b.as_str())); }
                    set_split(&mut planner, 0, &shares);
                }
                Event::Prepare(a, b) => {
                    let split: Split = [("v2", a), ("v3", b)]
                        .into_iter()
                        .map(|(v, s)| (v.to_owned(), format!("{s}%").parse().unwrap()))
                        .collect();
                    if let Ok(proposal) = planner.services()[0].propose(split) {
                        planner.prepare(0, Some(&proposal.ownership));
                    }
                }
                Event::Admin(n, admin) => {
                    let addr: SocketAddr = POOL[usize::from(n)].parse().unwrap();
                    let versions = &configured.services[0].versions;
                    if versions.iter().any(|v| v.backends.iter().any(|b| b.addr == addr)) {
                        planner.set_admin(0, addr, admin);
                    }
                }
                Event::Down(n, down) => planner.set_down(0, POOL[usize::from(n)].parse().unwrap(), down),
                Event::Hop(n, known) => {
                    let addr: SocketAddr = POOL[usize::from(n)].parse().unwrap();
                    hops.insert(addr.ip(), if known { Ok(hop(addr)) } else { Err("no route".to_owned()) });
                    planner.set_next_hops(&hops);
                }
                Event::Wait(ms) => now += ms,
                Event::FailedApply => fail = true,
                Event::Restart => {
                    begun = now;
                    // An agent that starts finds what is in force, not what a failed plan wanted.
                    planner = begin(&configured, maps(&kernel.plane), &stored(&planner), now);
                    planner.set_next_hops(&hops);
                }
                Event::Reload(bits) => {
                    configured = with_backends(bits);
                    now = now.max(begun + QUARANTINE_MS);
                    let baseline = planner.baseline(&configured, &HashMap::new(), now);
                    let mut prepared = baseline.prepare().unwrap();
                    if bits & 1 != 0 {
                        // Something else happens meanwhile, or not.
                        now += 5;
                        planner.step(now);
                    }
                    prepared.warm(hops.clone(), now);
                    let ready = planner.ready(prepared, now).unwrap();
                    planner.install(ready);
                }
                Event::Backends(bits) => {
                    configured = with_backends(bits);
                    if maps(&kernel.plane).lacks_backends(&configured) {
                        now += QUARANTINE_MS;
                    }
                    begun = now;
                    planner = begin(&configured, maps(&kernel.plane), &stored(&planner), now);
                    planner.set_next_hops(&hops);
                }
            }
            for _ in 0..3 {
                planner.step(now);
                if std::mem::take(&mut fail) {
                    // Whatever happens next happens to a plan that is not in force.
                    break;
                }
                kernel.apply(planner.plane(), now);
                if !planner.applied(now) {
                    break;
                }
            }
            for state in planner.services() {
                for table in state.tables() {
                    let owners: Vec<u8> = table.ledger().iter().map(|l| l.owner()).collect();
                    prop_assert_eq!(&owners, &state.ownership().owners.to_vec(), "the ledger says who owns what");
                }
            }
            if now % 3 == 0 {
                let before = planner.plane().clone();
                planner.rest(now + 60_000);
                prop_assert!(*planner.plane() == before, "rest changes nothing");
            }
        }
    }

    #[test]
    fn a_restart_changes_nothing(splits in prop::collection::vec((0..=50_u8, 0..=50_u8), 1..5), wait in 0..2_000_000_u64) {
        let configured = config(vec![three(), service("api", &[("a", &[("10.0.1.1:80", 1)]), ("b", &[("10.0.2.1:80", 3)])])]);
        let mut planner = started(&configured);
        let mut now = 1_000;
        for (a, b) in splits {
            now += wait;
            set_split(&mut planner, 0, &[("v2", &format!("{a}%")), ("v3", &format!("{b}%"))]);
            set_split(&mut planner, 1, &[("b", &format!("{b}%"))]);
            planner.step(now);
            planner.applied(now);
        }
        let expected = planner.plane().clone();
        // Nothing is known of routes yet: what the records say must do.
        let (mut again, news) = Planner::begin(Start { config: &configured, adopted: maps(&expected), stored: &stored(&planner), now_ms: now }).unwrap();
        prop_assert_eq!(news, vec![]);
        again.step(now);
        prop_assert!(again.plane() == &expected, "with the store");
        let mut without = begin(&configured, maps(&expected), &[], now);
        without.step(now);
        for (a, b) in without.plane().services.iter().zip(&expected.services) {
            prop_assert_eq!(&a.entries, &b.entries, "without the store");
        }
        for (a, b) in without.services().iter().zip(planner.services()) {
            prop_assert_eq!(a.ownership().counts(), b.ownership().counts());
            let asked = |s: &Split| s.iter().map(|(n, s)| (n.clone(), s.buckets(4096))).filter(|(_, n)| *n > 0).collect::<Vec<_>>();
            prop_assert_eq!(asked(&a.ownership().split), asked(&b.ownership().split));
        }
    }
}

#[test]
fn a_crash_between_store_and_maps_is_made_good_without_a_jump() {
    let configured = config(vec![three()]);
    let mut planner = started(&configured);
    let in_maps = planner.plane().clone();
    assert!(set_split(&mut planner, 0, &[("v2", "25%")]));
    // Stored, and killed before the maps were written.
    let mut next = begin(&configured, maps(&in_maps), &stored(&planner), 5_000);
    next.step(5_000);
    planner.step(5_000);
    assert_eq!(next.plane().services, planner.plane().services);
    let moved = next.plane().services[0].entries.iter().filter(|e| e.tracked()).count();
    assert!((1024..1500).contains(&moved), "{moved}");
}

#[test]
fn a_service_with_two_families_has_a_table_for_each_and_one_owner_a_bucket() {
    let mut planner = started(&config(vec![three()]));
    set_split(&mut planner, 0, &[("v2", "50%"), ("v3", "10%")]);
    planner.step(2_000);
    let [v4, v6] = &planner.plane().services[..] else { panic!("two tables") };
    assert_eq!((v4.family, v6.family), (Family::V4, Family::V6));
    assert!(v4.record.id != v6.record.id && v4.record.first_page != v6.record.first_page);
    assert_eq!((v4.vips.len(), v6.vips.len()), (1, 1));
    let owners = |t: &canary_agent::plan::ServicePlan| {
        t.ledger.iter().map(|l| l.owner()).collect::<Vec<_>>()
    };
    assert_eq!(owners(v4), owners(v6));
    let addr: HashMap<_, _> = planner.plane().backends.iter().map(|(i, b)| (*i, b.addr)).collect();
    assert!(v4.entries.iter().all(|e| addr[&e.current()].is_ipv4()));
    assert!(v6.entries.iter().all(|e| addr[&e.current()].is_ipv6()));
    // v3 has no IPv6 backend: its share of IPv6 clients is served by control.
    assert!(planner.services()[0].tables()[1].fell_back(2));
}

#[test]
fn a_backend_without_a_next_hop_gets_no_new_connections() {
    let configured = config(vec![three()]);
    let mut planner = started(&configured);
    let before = planner.plane().services[0].entries.clone();
    planner.set_next_hops(&[("10.0.1.2".parse().unwrap(), Err("no route".to_owned()))].into());
    assert!(planner.step(2_000).changed);
    let gone = planner.plane().backends.iter().find(|(_, b)| b.next_hop.is_none()).unwrap();
    assert_eq!(gone.1.addr, "10.0.1.2:80".parse().unwrap());
    let after = &planner.plane().services[0].entries;
    for (old, new) in before.iter().zip(after.iter()) {
        match old.current() == gone.0 {
            true => assert!(new.current() != gone.0 && new.tracked() && new.previous() == gone.0),
            false => assert_eq!(old, new, "buckets of others stay"),
        }
    }
    // All of control unreachable: there is no better place, so nothing is made worse.
    let none =
        all_hops(&configured).into_keys().map(|ip| (ip, Err("no route".to_owned()))).collect();
    planner.set_next_hops(&none);
    planner.step(3_000);
    assert!(planner.plane().services[0].entries.iter().all(|e| !e.current().is_none()));
    assert!(planner.services()[0].tables()[0].control_checks_ignored());
}

#[test]
fn a_backend_whose_neighbour_is_silent_keeps_what_is_open_and_gets_nothing_new() {
    let mut shop = three();
    let second = Duration::from_secs(1);
    let timing = Timing { interval: second, timeout: second, rise: 1, fall: 1, jitter_percent: 0 };
    shop.health = Health::Check(Check { ask: Ask::Tcp, via: Via::Backend, timing });
    let configured = config(vec![shop]);
    let mut planner = started(&configured);
    let at: SocketAddr = "10.0.1.2:80".parse().unwrap();
    let before = planner.plane().services[0].entries.clone();
    let record = |planner: &Planner| {
        let (index, plan) = planner.plane().backends.iter().find(|(_, b)| b.addr == at).unwrap();
        (*index, *plan)
    };
    let (index, well) = record(&planner);
    let silent = NextHop { silent: Some(at.ip()), ..hop(at) };
    planner.set_next_hops(&[(at.ip(), Ok(silent))].into());
    assert!(planner.step(2_000).changed);
    let (_, now) = record(&planner);
    assert_eq!(now.next_hop.unwrap().destination_mac, well.next_hop.unwrap().destination_mac);
    assert!(now.down && !well.down);
    let after = planner.plane().services[0].entries.clone();
    for (old, new) in before.iter().zip(after.iter()) {
        match old.current() == index {
            true => assert!(new.current() != index && new.tracked() && new.previous() == index),
            false => assert_eq!(old, new, "buckets of others stay"),
        }
    }
    // Under the next agent it is down until its checks say otherwise.
    planner.applied(2_000);
    let (mut next, _) = restarted(&configured, &planner, 3_000);
    assert!(record(&next).1.down && next.plane().services[0].entries == after);
    next.set_down(0, at, false);
    next.step(4_000);
    assert!(!record(&next).1.down);
    planner.set_next_hops(&[(at.ip(), Ok(hop(at)))].into());
    planner.step(3_000);
    assert_eq!(record(&planner).1, well);
}

#[test]
fn translated_services_are_not_tracked_and_their_backends_linger() {
    let mut shop = three();
    shop.forward = Forward::Nat;
    let mut planner = started(&config(vec![shop.clone()]));
    set_split(&mut planner, 0, &[("v2", "50%")]);
    planner.step(2_000);
    planner.applied(2_000);
    assert!(planner.plane().services.iter().all(|s| s.entries.iter().all(|e| !e.tracked())));
    assert_eq!(planner.plane().nat_sources.len(), 2);
    let records = planner.plane().backends.len();
    shop.versions[1].backends.remove(0);
    let mut next = begin(&config(vec![shop]), maps(planner.plane()), &stored(&planner), 3_000);
    let step = next.step(3_000);
    assert_eq!(next.plane().backends.len(), records, "flows still name it");
    assert_eq!(step.next_wakeup_ms, Some(1_003_000));
    next.step(1_003_000);
    assert_eq!(next.plane().backends.len(), records - 1);
    assert_eq!(next.plane().sweep.backends.len(), 1);
}

#[test]
fn existing_move_lets_connections_go_with_their_buckets() {
    let mut shop = three();
    shop.existing = Existing::Move;
    let mut planner = started(&config(vec![shop]));
    let tracked_of = |before: &DataPlane, after: &DataPlane, changed: bool| {
        let (before, after) = (&before.services[0], &after.services[0]);
        let ledgers = before.ledger.iter().zip(after.ledger.iter());
        let rows = ledgers.zip(after.entries.iter());
        rows.filter(|((old, new), e)| (old.owner() != new.owner()) == changed && e.tracked())
            .count()
    };
    let before = planner.plane().clone();
    set_split(&mut planner, 0, &[("v2", "50%")]);
    planner.step(2_000);
    planner.applied(2_000);
    assert_eq!(tracked_of(&before, planner.plane(), true), 0);
    // Health is no split change: connections of a backend that fails its checks stay.
    let before = planner.plane().clone();
    planner.set_down(0, "10.0.2.1:80".parse().unwrap(), true);
    planner.step(3_000);
    planner.applied(3_000);
    assert!(tracked_of(&before, planner.plane(), false) > 0);
    let before = planner.plane().clone();
    set_split(&mut planner, 0, &[("v2", "0%")]);
    planner.step(4_000);
    assert_eq!(tracked_of(&before, planner.plane(), true), 0);
    assert!(!planner.plane().sweep.buckets.is_empty());
}

#[test]
fn udp_is_learned_for_udp_idle_and_drains_end_little_by_little() {
    let mut planner = started(&config(vec![three()]));
    set_split(&mut planner, 0, &[("v2", "50%")]);
    let step = planner.step(10_000);
    let tracked =
        |p: &Planner| p.plane().services[0].entries.iter().filter(|e| e.tracked()).count();
    let learning =
        |p: &Planner| p.plane().services[0].entries.iter().filter(|e| e.learning()).count();
    let moved = tracked(&planner);
    assert!(moved > 2000 && learning(&planner) == moved);
    assert_eq!(step.next_wakeup_ms, Some(40_000));
    assert!(!planner.step(39_999).changed);
    let step = planner.step(40_000);
    assert!(step.changed && learning(&planner) == 0 && tracked(&planner) == moved);
    let first = step.next_wakeup_ms.unwrap();
    assert!((10_000 + 900_000..10_000 + 902_000).contains(&first), "{first}");
    let mut most = 0;
    let mut now = first;
    let mut wakeups = 0;
    while tracked(&planner) > 0 {
        let before = tracked(&planner);
        let step = planner.step(now);
        planner.applied(now);
        most = most.max(before - tracked(&planner));
        wakeups += 1;
        let Some(next) = step.next_wakeup_ms else {
            break;
        };
        assert!(next > now);
        now = next;
    }
    assert_eq!((tracked(&planner), now), (0, 10_000 + 1_000_000));
    assert!(wakeups >= 100 && most < moved / 20, "{most} of {moved} in one of {wakeups} steps");
}

#[test]
fn a_removed_backend_drains_and_its_index_rests_before_another_gets_it() {
    let full = config(vec![three()]);
    let mut planner = started(&full);
    let index_of = |p: &Planner, addr: &str| {
        let addr: SocketAddr = addr.parse().unwrap();
        p.plane().backends.iter().find(|(_, b)| b.addr == addr).map(|(i, _)| *i)
    };
    let index = index_of(&planner, "10.0.1.3:80").unwrap();
    planner.step(2_000);
    let mut less = three();
    less.versions[0].backends.retain(|b| b.addr.to_string() != "10.0.1.3:80");
    let less = config(vec![less]);
    let mut next = begin(&less, maps(planner.plane()), &stored(&planner), 5_000);
    next.step(5_000);
    next.applied(5_000);
    assert_eq!(index_of(&next, "10.0.1.3:80"), Some(index), "its connections stay");
    assert!(next.plane().services[0].entries.iter().all(|e| e.current() != index));
    next.step(5_000 + 899_000);
    assert_eq!(index_of(&next, "10.0.1.3:80"), Some(index));
    next.step(5_000 + 1_000_000);
    assert_eq!(index_of(&next, "10.0.1.3:80"), None);
    assert_eq!(next.plane().sweep.backends, [index]);
}

/// A service whose control has `count` backends of either family, and v2 four.
fn many(count: u8, buckets: u32) -> Service {
    let addr = |version: u8, n: u8, v6: bool| match v6 {
        true => format!("[2001:db8:{version}::{n:x}]:80"),
        false => format!("10.0.{version}.{n}:80"),
    };
    let list = |version: u8, count: u8| -> Vec<(String, u32)> {
        [false, true]
            .iter()
            .flat_map(|v6| (1..=count).map(move |n| (addr(version, n, *v6), 1)))
            .collect()
    };
    let (stable, v2) = (list(1, count), list(2, 4));
    let borrowed = |list: &'static [(String, u32)]| -> Vec<(&str, u32)> {
        list.iter().map(|(addr, weight)| (addr.as_str(), *weight)).collect()
    };
    let (stable, v2) = (borrowed(stable.leak()), borrowed(v2.leak()));
    let mut many = service("many", &[("stable", &stable), ("v2", &v2)]);
    many.vips.push("2001:db8::10".parse().unwrap());
    many.buckets = buckets;
    many
}

/// By table, the address that each bucket steers new connections to.
fn addresses(planner: &Planner) -> Vec<Vec<Option<SocketAddr>>> {
    let by_index: HashMap<BackendIndex, SocketAddr> =
        planner.plane().backends.iter().map(|(index, b)| (*index, b.addr)).collect();
    let of = |e: &Entry| by_index.get(&e.current()).copied();
    planner.plane().services.iter().map(|s| s.entries.iter().map(of).collect()).collect()
}

/// The planner of the next start, stepped, and what it wants stored.
fn restarted(config: &Config, before: &Planner, now_ms: u64) -> (Planner, Vec<&'static str>) {
    let adopted = maps(before.plane());
    let stored = stored(before);
    let (mut next, news) =
        Planner::begin(Start { config, adopted, stored: &stored, now_ms }).unwrap();
    next.set_next_hops(&all_hops(config));
    next.step(now_ms);
    next.applied(now_ms);
    (next, news.into_iter().map(|news| news.action).collect())
}

#[test]
fn backends_that_come_go_or_change_weight_move_only_the_buckets_that_must() {
    let buckets = 16_384;
    let mut now = 10_000;
    let mut planner = started(&config(vec![many(12, buckets)]));
    assert!(set_split(&mut planner, 0, &[("v2", "30%")]));
    planner.step(2_000);
    planner.applied(2_000);
    let v2 = planner.services()[0].ownership().counts()[1];
    let control = buckets - v2;
    let weigh = |service: &mut Service, addrs: &[&str], weight| {
        let backends = service.versions.iter_mut().flat_map(|v| &mut v.backends);
        backends
            .filter(|b| addrs.contains(&b.addr.to_string().as_str()))
            .for_each(|b| b.weight = weight);
    };
    let one = ["10.0.1.3:80", "[2001:db8:1::3]:80"];
    let mut less = many(12, buckets);
    less.versions[0].backends.retain(|b| !one.contains(&b.addr.to_string().as_str()));
    let mut heavy = many(12, buckets);
    weigh(&mut heavy, &one, 2);
    let mut of_v2 = heavy.clone();
    of_v2.versions[1].backends.retain(|b| !b.addr.to_string().contains("2.4:80"));
    for (what, service, least) in [
        ("nothing", many(12, buckets), [0, 0]),
        ("removal", less, [control / 12; 2]),
        ("addition", many(12, buckets), [control / 12; 2]),
        ("weight", heavy, [2 * control / 13 - control / 12; 2]),
        ("removal from v2, of one family", of_v2, [v2 / 4, 0]),
        ("several", many(13, buckets), [v2 / 4, 0]),
    ] {
        let before = addresses(&planner);
        let configured = config(vec![service]);
        let (next, news) = restarted(&configured, &planner, now);
        let after = addresses(&next);
        for ((before, after), least) in before.iter().zip(&after).zip(least) {
            let moved = before.iter().zip(after).filter(|(b, a)| b != a).count() as u32;
            match what {
                "several" => assert!(moved > 0, "{what}"),
                _ => assert!(moved.abs_diff(least) <= 1, "{what}: {moved}, not {least}"),
            }
        }
        assert_eq!(news, if what == "nothing" { vec![] } else { vec!["config"] }, "{what}");
        now += 10_000;
        let (again, news) = restarted(&configured, &next, now);
        assert!(addresses(&again) == after && news.is_empty(), "{what}, and again: {news:?}");
        // A host without maps, or with nothing but the state of another, gets the same.
        let mut copy = begin(&configured, Adopted::default(), &stored(&next), now);
        copy.set_next_hops(&all_hops(&configured));
        copy.step(now);
        assert_eq!(addresses(&copy), after, "{what}, on another host");
        planner = again;
        now += 10_000;
    }
}

#[test]
fn a_service_with_twice_the_buckets_moves_nobody() {
    let small = config(vec![many(12, 4096)]);
    let mut less = many(12, 4096);
    less.versions[0].backends.remove(2);
    let less = config(vec![less]);
    let planner = restarted(&less, &started(&small), 5_000).0;
    let mut large = less;
    large.services[0].buckets = 8192;
    let next = restarted(&large, &planner, 9_000).0;
    for (small, large) in addresses(&planner).iter().zip(addresses(&next)) {
        let moved = (0..8192).filter(|b| small[b % 4096] != large[*b]).count();
        assert!(moved <= 12, "{moved}: no more than quotas round otherwise");
    }
}

#[test]
fn a_placement_that_is_missing_or_can_not_be_read_is_made_anew() {
    let configured = config(vec![many(12, 4096)]);
    let planner = started(&configured);
    let records = stored(&planner);
    for what in ["missing", "of an older release", "unreadable", "for another table"] {
        let mut stored = records.clone();
        let placements = stored[0].placements.as_mut().unwrap();
        match what {
            "missing" => stored[0].placements = None,
            "of an older release" => placements.clear(),
            "unreadable" => placements.iter_mut().for_each(|p| p.placement = vec![9, 9]),
            // It names buckets that nobody owns.
            _ => placements.iter_mut().for_each(|p| p.placement[1..3].fill(0x80)),
        }
        let start = Start {
            config: &configured,
            adopted: maps(planner.plane()),
            stored: &stored,
            now_ms: 5_000,
        };
        let (mut next, news) = Planner::begin(start).unwrap();
        next.step(5_000);
        assert!(next.plane().services == planner.plane().services, "{what}");
        assert_eq!(news.len(), 1, "{what}: it has to be stored");
        assert!(self::stored(&next) == records, "{what}");
    }
}

/// Whatever the state file and the pinned maps say, written by whomever.
#[test]
fn state_and_maps_that_say_nonsense_lead_to_no_backend_that_is_not_there() {
    let configured = config(vec![three()]);
    let planner = started(&configured);
    let mut seed = 1_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        seed >> 16
    };
    for round in 0..200 {
        let (mut stored, mut adopted) = (stored(&planner), maps(planner.plane()));
        let record = &mut stored[0];
        if round % 2 == 0 {
            record.owners = (0..random() % 9_000).map(|_| random() as u8).collect();
        }
        if round % 3 == 0 {
            record.slots = (0..random() % 40).map(|n| format!("v{}", n % 5)).collect();
        }
        if round % 5 == 0 {
            record.control = "nobody".to_owned();
        }
        for table in &mut adopted.services {
            if round % 2 == 1 {
                table.entries.iter_mut().for_each(|entry| entry.0 = random() as u32);
                table.ledger.iter_mut().for_each(|entry| entry.0 = random());
            }
            if round % 7 == 0 {
                table.versions.truncate((random() % 3) as usize);
                table.entries.truncate((random() % 4_096) as usize);
            }
        }
        let start = Start { config: &configured, adopted, stored: &stored, now_ms: 5_000 + round };
        // Refused is fine, too.
        let Ok((mut next, _)) = Planner::begin(start) else { continue };
        next.set_next_hops(&all_hops(&configured));
        next.step(5_000 + round);
        let plane = next.plane();
        let known = |index: BackendIndex| {
            index.is_none() || plane.backends.iter().any(|(other, _)| *other == index)
        };
        for entry in plane.services.iter().flat_map(|service| service.entries.iter()) {
            assert!(known(entry.current()), "round {round}: {entry:?}");
            assert!(!entry.tracked() || known(entry.previous()), "round {round}: {entry:?}");
        }
    }
}

#[test]
fn a_bucket_is_not_tracked_again_before_it_has_been_swept() {
    let mut planner = started(&config(vec![three()]));
    set_split(&mut planner, 0, &[("v2", "50%")]);
    planner.step(2_000);
    planner.applied(2_000);
    let in_force = planner.plane().services[0].entries.clone();
    // Everything is cleared, but the plan fails; then everything is to move back.
    planner.step(2_000_000);
    let swept = planner.plane().sweep.clone();
    assert!(swept.buckets[0].1.len() > 2000);
    set_split(&mut planner, 0, &[("v2", "0%")]);
    planner.step(2_000_100);
    let entries = &planner.plane().services[0].entries;
    for (old, new) in in_force.iter().zip(entries.iter()).filter(|(old, _)| old.tracked()) {
        assert_eq!(*new, Entry::steady(old.current()), "it waits");
    }
    assert_eq!(planner.plane().sweep, swept, "what was not swept still is to be");
    assert!(planner.applied(2_000_200), "what waited can go on");
    planner.step(2_000_200);
    let entries = &planner.plane().services[0].entries;
    for (old, new) in in_force.iter().zip(entries.iter()).filter(|(old, _)| old.tracked()) {
        assert!(new.tracked() && new.previous() == old.current());
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |limit: fn(&mut Config)| {
        let mut configured = config(vec![three()]);
        limit(&mut configured);
        let start =
            Start { config: &configured, adopted: Adopted::default(), stored: &[], now_ms: 1 };
        Planner::begin(start).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(refused(|_| ()), "");
    for (limit, key) in [
        ((|c| c.agent.capacity.services = 0) as fn(&mut Config), "agent.capacity.services"),
        (|c| c.agent.capacity.backends = 7, "agent.capacity.backends"),
        (|c| c.agent.capacity.buckets = 4096, "agent.capacity.buckets"),
    ] {
        let message = refused(limit);
        assert!(message.contains("`shop`") && message.contains(key), "{key}: {message}");
    }
    assert_eq!(refused(|c| c.agent.capacity.backends = 8), "");
}

#[test]
fn one_split_among_4096_services_is_quick_and_leaves_the_others_alone() {
    let services: Vec<Service> = (0..4096)
        .map(|n| {
            service(
                &format!("service-{n}"),
                &[
                    ("stable", &[("10.0.1.1:80", 1), ("10.0.1.2:80", 1)]),
                    ("v2", &[("10.0.2.1:80", 1)]),
                ],
            )
        })
        .collect();
    let configured = config(services);
    let mut planner = started(&configured);
    let before = planner.plane().clone();
    let mut best = Duration::MAX;
    for round in 0..20_u64 {
        let clock = Instant::now();
        set_split(&mut planner, 2000, &[("v2", if round % 2 == 0 { "5%" } else { "1%" })]);
        assert!(planner.step(2_000 + round).changed);
        best = best.min(clock.elapsed());
        planner.applied(2_000 + round);
    }
    let same = before
        .services
        .iter()
        .zip(&planner.plane().services)
        .filter(|(a, b)| Arc::ptr_eq(a, b))
        .count();
    assert_eq!(same, 4095);
    println!("one split among 4,096 services: {best:?}");
    assert!(best < Duration::from_millis(if cfg!(debug_assertions) { 25 } else { 5 }), "{best:?}");
}

#[test]
fn a_service_that_is_left_alone_takes_less_memory_and_goes_on_the_same() {
    let mut shop = three();
    shop.buckets = 65_536;
    let config = config(vec![shop]);
    let bytes = |planner: &Planner| -> usize {
        let owners = planner.services()[0].ownership().owners.bytes();
        let table = |table: &Table| table.entries().bytes() + table.ledger().bytes();
        planner.services()[0].tables().iter().map(table).sum::<usize>() + owners
    };
    let [mut planner, mut other] = [(); 2].map(|()| started(&config));
    assert!(bytes(&planner) < 100_000, "{} bytes at the start", bytes(&planner));
    for (round, share) in ["30%", "60%", "0%"].into_iter().enumerate() {
        let now = 10_000 + 100_000 * round as u64;
        for planner in [&mut planner, &mut other] {
            set_split(planner, 0, &[("v2", share)]);
            assert!(planner.step(now).changed);
            planner.applied(now);
            assert!(!planner.rest(now + 9_000), "it may not be over");
        }
        let (busy, tables) = (bytes(&planner), planner.plane().services.len());
        assert!(busy > tables * 65_536 * 12, "{busy} bytes while it changes");
        assert!(planner.rest(now + 10_000));
        assert!(bytes(&planner) < busy / 8, "{} bytes of {busy}", bytes(&planner));
        assert!(!planner.rest(now + 20_000), "it rests already");
        // The plan that is in force holds the other form until this one is applied.
        assert!(planner.step(now + 10_000).changed && !planner.step(now + 10_000).changed);
        assert!(planner.plane() == other.plane(), "{share}");
    }
}
