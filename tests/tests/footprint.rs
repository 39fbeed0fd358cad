//! What packets write: in the steady state nothing that another processor writes or reads.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::AsFd as _,
    sync::LazyLock,
};

use aya::maps::MapType;
use canary_agent::plan::Family;
use canary_tests::{
    bpf,
    footprint::{CACHE_LINE, Change, Contents, Used, Where, maps, per_cpu},
    host,
    loaded::{Loaded, Sizes, XDP_TX},
    names::Host,
    notation,
    planned::{Planned, Route, Shop},
    world::{Service, World},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// Packets in a run.
const PACKETS: u64 = 100;

/// Processors that this process may run on. Asked before any test stays on one: they may share a thread.
fn cpus() -> Vec<usize> {
    static CPUS: LazyLock<Vec<usize>> = LazyLock::new(|| {
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
        (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect()
    });
    CPUS.clone()
}

fn stay_on(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// What packets like this one change, all on one processor.
fn written(loaded: &mut Loaded, maps: &[Used], frame: &[u8]) -> Vec<Change> {
    // The first one may find something to do that the others do not.
    assert_eq!(loaded.run(frame).unwrap().action, XDP_TX);
    let before = Contents::read(maps).unwrap();
    for _ in 0..PACKETS {
        assert_eq!(loaded.run(frame).unwrap().action, XDP_TX);
    }
    before.changes(&Contents::read(maps).unwrap(), maps)
}

/// What is not of the processor `cpu` alone.
fn shared(changes: &[Change], cpu: usize) -> Vec<&Change> {
    changes.iter().filter(|change| change.cpus.as_deref() != Some(&[cpu])).collect()
}

fn counts(changes: &[Change]) -> bool {
    // As long as the kernel keeps the name.
    changes.iter().any(|change| change.map == "BACKEND_COUNTER")
}

fn data(family: Family, vip: u16, segment: &str) -> Vec<u8> {
    let ip = if family == Family::V4 { "ip" } else { "ip6" };
    let vip = Host::Vip(vip).name();
    notation::parse(&format!("eth client > us / {ip} client > {vip} / tcp 40000 > 80 {segment}"))
        .unwrap()
}

#[test]
fn steady_packets_write_what_is_their_own_processors_alone() {
    if !host::ready("steady_packets_write_what_is_their_own_processors_alone") {
        return;
    }
    let modes = ["dsr", "ipip", "gue", "dsr"];
    let services = modes.iter().zip(1..).map(|(mode, vip)| Service {
        vips: vec![Host::Vip(vip).name()],
        mode: (*mode).to_owned(),
        backends: vec![1, 2],
        // The last one's buckets have moved: connections are remembered.
        table: if vip == 4 { "b2 was b1" } else { "all" }.to_owned(),
        ..Service::default()
    });
    let translated =
        Service { vips: vec![Host::Vip(5).name()], mode: "nat".to_owned(), ..Service::default() };
    let world =
        World { service: services.chain([translated]).collect(), flows: 256, ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}")).unwrap();
    let mut loaded = Loaded::new(&plane.plane, &world.sizes()).unwrap();
    let maps = maps(&loaded.datapath.programs().unwrap()).unwrap();
    let unread: Vec<_> = maps.iter().filter(|map| map.kind == MapType::RingBuf).collect();
    assert!(unread.len() == 1 && unread[0].name == "SIGNALS", "one that only agents are told by");

    let cpu = *cpus().last().expect("a processor");
    stay_on(cpu);
    for (family, flows) in [(Family::V4, "FLOWS_V4"), (Family::V6, "FLOWS_V6")] {
        for vip in 1..=3 {
            let changes = written(&mut loaded, &maps, &data(family, vip, "A seq=1001"));
            let mode = modes[usize::from(vip) - 1];
            assert!(counts(&changes), "{mode}, {family:?}: {changes:?}");
            assert_eq!(shared(&changes, cpu), [] as [&Change; 0], "{mode}, {family:?}");
        }
        // An entry of its own, which is nobody else's while its packets come on one processor.
        for (vip, what, most) in [(4, "a moved bucket", 1), (5, "nat", 1)] {
            let syn = data(family, vip, "S seq=1000");
            let opens = written_by_one(&mut loaded, &maps, &syn);
            assert!(
                shared(&opens, cpu).iter().any(|change| change.map == flows),
                "{what}, {family:?}: a SYN is remembered: {opens:?}"
            );
            let changes = written(&mut loaded, &maps, &data(family, vip, "A seq=1001"));
            assert!(counts(&changes), "{what}, {family:?}: {changes:?}");
            let shared = shared(&changes, cpu);
            assert!(
                shared.iter().all(|change| change.map == flows) && shared.len() <= most,
                "{what}, {family:?}: {shared:?}"
            );
        }
    }
}

/// What a single packet changes.
fn written_by_one(loaded: &mut Loaded, maps: &[Used], frame: &[u8]) -> Vec<Change> {
    let before = Contents::read(maps).unwrap();
    assert_eq!(loaded.run(frame).unwrap().action, XDP_TX);
    before.changes(&Contents::read(maps).unwrap(), maps)
}

#[test]
fn a_client_in_an_audience_is_remembered_on_its_processor_alone() {
    if !host::ready("a_client_in_an_audience_is_remembered_on_its_processor_alone") {
        return;
    }
    let networks = [Host::Client(1).v4().to_string(), Host::Client(1).v6().to_string()];
    let route =
        Route { audience: "staff", networks: networks.to_vec(), split: "{ v2 = \"100%\" }" };
    let shop = Shop { stickiness: "client", routes: vec![route], ..Shop::default() };
    let mut planned = Planned::new(&shop, &Sizes::default());
    let loaded = &mut planned.loaded;
    let maps = maps(&loaded.datapath.programs().unwrap()).unwrap();
    let possible = aya::util::nr_cpus().unwrap() as u32;
    // How many elements of a map are each processor's.
    let part = |name: &str| {
        let recent = maps.iter().find(|map| map.name == name).expect("what is kept of clients");
        let info = recent.map.info().unwrap();
        assert_eq!(u64::from(info.value_size()), CACHE_LINE, "{name}");
        let begins = Where::of(&recent.map).unwrap().address(0).unwrap();
        assert!(begins.is_multiple_of(CACHE_LINE), "{name} begins at a cache line: {begins:#x}");
        info.max_entries() / possible
    };
    for cpu in cpus() {
        stay_on(cpu);
        for (family, clients) in [(Family::V4, "RECENT_V4"), (Family::V6, "RECENT_V6")] {
            let frame = data(family, 1, "A seq=1001");
            let first = written_by_one(loaded, &maps, &frame);
            let kept: Vec<_> =
                first.iter().filter(|change| change.map.starts_with("RECENT_")).collect();
            let of_clients = kept.iter().filter(|change| change.map == clients).count();
            assert_eq!(of_clients, 1, "{family:?}: the client is looked up once: {first:?}");
            assert!(kept.len() <= 2, "and what its class leads to: {first:?}");
            for change in kept {
                let place = u32::from_ne_bytes(change.key[..].try_into().unwrap());
                assert_eq!(place / part(&change.map), cpu as u32, "in the processor's own part");
            }
            let later = written(loaded, &maps, &frame);
            assert!(counts(&later), "{later:?}");
            assert_eq!(shared(&later, cpu), [] as [&Change; 0], "{family:?}: later packets");
        }
    }
}

#[test]
fn values_of_two_processors_are_on_no_line_together() {
    if !host::ready("values_of_two_processors_are_on_no_line_together") {
        return;
    }
    let world = World { service: vec![Service::default()], ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}")).unwrap();
    let mut loaded = Loaded::new(&plane.plane, &world.sizes()).unwrap();
    let maps = maps(&loaded.datapath.programs().unwrap()).unwrap();
    let cpus = cpus();
    if cpus.len() < 2 {
        host::skip("values_of_two_processors_are_on_no_line_together", "there is one processor");
        return;
    }
    // Whose line it is.
    let mut lines: BTreeMap<u64, (usize, &str)> = BTreeMap::new();
    let mut counted = BTreeSet::new();
    for Used { name, kind, map } in maps.iter().filter(|map| per_cpu(map.kind)) {
        assert_eq!(*kind, MapType::PerCpuArray, "{name}");
        let (place, info) = (Where::of(map).unwrap(), map.info().unwrap());
        for &cpu in &cpus {
            stay_on(cpu);
            for index in 0..info.max_entries() {
                let address = place.address(index).unwrap();
                assert_ne!(address, 0, "{name}, {index}");
                let last = address + u64::from(info.value_size()) - 1;
                for line in address / CACHE_LINE..=last / CACHE_LINE {
                    let (whose, first) = *lines.entry(line).or_insert((cpu, name));
                    assert_eq!(whose, cpu, "{name} {index} is on a line with {first}");
                }
            }
        }
        counted.insert(name.as_str());
    }
    for name in ["BACKEND_COUNTER", "REASONS", "FLOW_COUNTERS", "ARRIVAL"] {
        assert!(counted.contains(name), "{name} has no value for each processor: {counted:?}");
    }
    // The floor of this check: what is nobody's in particular is found on one line by all.
    let array = bpf::create(MapType::Array, 4, 8, 1).unwrap();
    let array = aya::maps::MapData::from_fd(array.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let place = Where::of(&array).unwrap();
    let addresses: BTreeSet<_> = cpus
        .iter()
        .map(|cpu| {
            stay_on(*cpu);
            place.address(0).unwrap()
        })
        .collect();
    assert_eq!(addresses.len(), 1);
}
