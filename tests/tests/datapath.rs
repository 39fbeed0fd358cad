//! The datapath against the kernel: pins, adoption, attaching.

use std::{fs, process::Command, sync::Arc, thread};

use aya::{
    maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use canary_agent::{
    config::model::{Capacity, XdpMode},
    datapath::{self, AttachedMode, Datapath, Error, Options},
    plan::{Adopted, DataPlane},
};
use canary_ebpf_common::{
    abi::{
        ABI_VERSION, Backend, BackendCounters, Flow, FlowKeyV4, LedgerEntry, PAGE_BUCKETS,
        PortPair, Sample,
    },
    entry::{BackendIndex, Entry},
};
use canary_tests::{
    bpf, lacking,
    loaded::{BpfFs, Flows},
    wait,
    workdir::Workdir,
    world::{Service, World},
};
use nix::sys::utsname::uname;

fn options(bpffs: &BpfFs) -> Options {
    Options {
        bpffs: bpffs.pins(),
        capacity: Capacity {
            services: 8,
            vips: 64,
            backends: 64,
            buckets: 8 * PAGE_BUCKETS,
            flows: 1024,
            samples: 64,
        },
        nat_ports: Some(10_000..=19_999),
        xdp_mode: XdpMode::Auto,
        replace: false,
        rebuild: false,
        // What these tests are about is maps, pins and links. An emulated processor takes ten times as
        // long with the programs that go on after `ingress`; two tests load them there, too.
        rare: !wait::emulated(),
    }
}

/// The same with every program, on any processor.
fn options_of_all(bpffs: &BpfFs) -> Options {
    Options { rare: true, ..options(bpffs) }
}

fn world(services: Vec<Service>) -> DataPlane {
    let world = World { service: services, arrival_sends: false, ..World::default() };
    world.plane(|name| anyhow::bail!("no interface {name}")).unwrap().plane
}

/// Two services, each with a table for either family.
fn two_services() -> DataPlane {
    world(vec![
        Service { backends: vec![1, 2], ..Service::default() },
        Service {
            vips: vec!["vip2".to_owned()],
            mode: "nat".to_owned(),
            backends: vec![3],
            ..Service::default()
        },
    ])
}

fn open_error(options: Options) -> Error {
    match Datapath::open(options) {
        Ok(_) => panic!("it opened"),
        Err(error) => error,
    }
}

#[test]
fn a_second_agent_finds_what_the_first_has_written() {
    let bpffs = BpfFs::mount();
    let mut wanted = two_services();
    let service = Arc::make_mut(&mut wanted.services[0]);
    let tracked = Entry::tracking(BackendIndex::new(1), BackendIndex::new(2), true);
    Arc::make_mut(&mut service.entries)[77] = tracked;
    Arc::make_mut(&mut service.ledger)[77] = LedgerEntry::new(3, 123_456);
    let (mut first, adopted) = Datapath::open(options_of_all(&bpffs)).unwrap();
    assert_eq!(adopted.services, []);
    first.apply(&wanted).unwrap();
    drop(first);

    let (mut second, adopted) = Datapath::open(options_of_all(&bpffs)).unwrap();
    assert_eq!(adopted.services.len(), 4);
    for (found, wanted) in adopted.services.iter().zip(&wanted.services) {
        assert_eq!(found.name, wanted.name);
        assert_eq!(u32::from(found.id), wanted.record.id);
        assert_eq!(found.first_page, wanted.record.first_page);
        assert_eq!(*wanted.entries, found.entries[..]);
        assert_eq!(*wanted.ledger, found.ledger[..]);
        assert_eq!(found.family, wanted.family);
        assert_eq!(found.versions[0], wanted.versions[0]);
    }
    let mut written: Vec<_> =
        wanted.backends.iter().map(|(index, plan)| (*index, plan.record())).collect();
    written.sort_by_key(|(index, _)| *index);
    assert_eq!(adopted.backends, written);
    let applied = second.apply(&wanted).unwrap();
    assert_eq!((applied.entries, applied.backends), (0, 0), "the same plan writes nothing");
}

#[test]
fn what_the_plan_leaves_out_is_taken_away() {
    let bpffs = BpfFs::mount();
    let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    let both = two_services();
    datapath.apply(&both).unwrap();
    let mut one = both.clone();
    one.services.truncate(2);
    one.backends.retain(|(_, b)| b.service < 2);
    datapath.apply(&one).unwrap();
    drop(datapath);
    let (_, adopted) = Datapath::open(options(&bpffs)).unwrap();
    assert_eq!(adopted.services.len(), 2);
    assert_eq!(adopted.backends.len(), 4);
}

/// The pins of one set of maps are there, and no others.
#[track_caller]
#[test]
fn counters_of_many_backends_are_those_of_each() {
    const WORDS: usize = size_of::<BackendCounters>() / 8;
    let bpffs = BpfFs::mount();
    let mut options = options(&bpffs);
    options.capacity.backends = 1000;
    let (datapath, _) = Datapath::open(options).unwrap();
    let pin = bpffs.pins().join("maps").join("BACKEND_COUNTERS");
    let map = Map::PerCpuArray(MapData::from_pin(pin).unwrap());
    let mut map: PerCpuArray<_, [u64; WORDS]> = map.try_into().unwrap();
    let cpus = nr_cpus().unwrap() as u64;
    for index in 0..map.len() {
        let of_cpu =
            |cpu| std::array::from_fn(|word| u64::from(index) << 20 | cpu << 8 | word as u64);
        let values = PerCpuValues::try_from((0..cpus).map(of_cpu).collect::<Vec<_>>()).unwrap();
        map.set(index, values, 0).unwrap();
    }
    // In no order, some twice, and some that are not there.
    let last = map.len() as u16 - 1;
    let mut wanted: Vec<_> = (1..=last).rev().step_by(3).chain([1, 700, 700, last]).collect();
    wanted.extend([last + 1, last + 400, BackendIndex::MAX.get()]);
    let wanted: Vec<_> = wanted.into_iter().map(BackendIndex::new).collect();
    let reader = datapath.reader();
    let all = reader.backend_counters(&wanted);
    let each: Vec<_> = wanted.chunks(1).flat_map(|one| reader.backend_counters(one)).collect();
    assert_eq!(all, each);
    let packets = |index: u64| cpus * (index << 20) + ((0..cpus).sum::<u64>() << 8);
    assert_eq!(all[0].packets, packets(last.into()));
    assert_eq!(all[wanted.len() - 3..], [BackendCounters::default(); 3], "not there");
    assert_eq!(reader.backend_counters(&wanted[..100]), all[..100]);
}

fn assert_one_set(bpffs: &BpfFs) {
    assert!(!bpffs.pins().join("next").exists(), "maps are left beside those in force");
    assert!(!bpffs.pins().join("maps/UNFINISHED").is_symlink(), "a switch is left unfinished");
}

/// Overwrites what the pinned maps say of their layout.
fn say_layout(bpffs: &BpfFs, version: u32) {
    let map = Map::Array(MapData::from_pin(bpffs.pins().join("maps/META")).unwrap());
    let mut meta: Array<_, u64> = map.try_into().unwrap();
    meta.set(0, u64::from(version), 0).unwrap();
}

#[test]
fn maps_of_other_sizes_take_over_what_the_pinned_ones_hold() {
    let bpffs = BpfFs::mount();
    let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    let mut wanted = two_services();
    let service = Arc::make_mut(&mut wanted.services[0]);
    let tracked = Entry::tracking(BackendIndex::new(1), BackendIndex::new(2), true);
    Arc::make_mut(&mut service.entries)[77] = tracked;
    Arc::make_mut(&mut service.ledger)[77] = LedgerEntry::new(3, 123_456);
    datapath.apply(&wanted).unwrap();
    drop(datapath);
    let (_, before) = Datapath::open(options(&bpffs)).unwrap();
    type Change = fn(&mut Capacity);
    // With flow tables that stay, and with others. An emulated processor takes long for each program.
    let sizes: [Change; 2] = [
        |c| {
            (c.vips, c.backends, c.services) = (1000, 200, 40);
            c.buckets *= 2;
        },
        |c| c.flows = 5000,
    ];
    for (number, change) in sizes.iter().enumerate() {
        let mut other = options(&bpffs);
        change(&mut other.capacity);
        let (mut datapath, adopted) = Datapath::open(other).unwrap();
        let handover = datapath.handover().unwrap_or_else(|| panic!("{number}: it stayed"));
        assert_eq!(handover.lost, "", "{number}");
        assert_eq!(adopted, before, "{number}");
        let applied = datapath.apply(&wanted).unwrap();
        assert_eq!((applied.entries, applied.backends), (0, 0), "{number}: all of it is there");
        datapath.finish().unwrap();
        assert_one_set(&bpffs);
    }
}

const INNER_MTU: usize = std::mem::offset_of!(Backend, inner_mtu);
const MTU: usize = std::mem::offset_of!(Backend, mtu);

/// Takes the maps away that came with a layout, and says that the others are of the one before.
fn without(bpffs: &BpfFs, names: &[&str], version: u32) {
    for name in names {
        fs::remove_file(bpffs.pins().join("maps").join(name)).unwrap();
    }
    say_layout(bpffs, version);
}

/// Gives the pinned maps the form of layout 6: other connections were watched.
fn as_layout_6(bpffs: &BpfFs) {
    say_layout(bpffs, 6);
}

/// Gives the pinned maps the form of layout 5: changes of classes were not counted.
fn as_layout_5(bpffs: &BpfFs) {
    as_layout_6(bpffs);
    without(bpffs, &["CLASS_CHANGES"], 5);
}

/// Gives the pinned maps the form of layout 4: there were no classes of clients.
fn as_layout_4(bpffs: &BpfFs) {
    as_layout_5(bpffs);
    without(bpffs, &["CLASSES_V4", "CLASSES_V6", "CLASS_BLOCKS", "CLASS_TABLES"], 4);
}

/// Gives the pinned maps the form of layout 3: no connection was watched, and no record of a backend
/// said how large packets to it may be.
fn as_layout_3(bpffs: &BpfFs) {
    const RECORD: usize = size_of::<Backend>();
    as_layout_4(bpffs);
    let pin = bpffs.pins().join("maps").join("BACKENDS");
    let records = Map::Array(MapData::from_pin(pin).unwrap());
    let mut records: Array<_, [u8; RECORD]> = records.try_into().unwrap();
    for index in 0..records.len() {
        let mut record = records.get(&index, 0).unwrap();
        record[INNER_MTU..INNER_MTU + 2].fill(0);
        record[MTU..MTU + 4].fill(0);
        records.set(index, record, 0).unwrap();
    }
    without(bpffs, &["SAMPLING", "SAMPLES_V4", "SAMPLES_V6", "SIGNAL_COUNTERS", "SIGNALS"], 3);
}

/// Gives the pinned maps the form of layout 2: records of backends of one cache line, whose last word
/// is on the second line now, and none of the maps that came with layout 3.
fn as_layout_2(bpffs: &BpfFs) {
    const RECORD: usize = size_of::<Backend>();
    const SLOW_SINCE: usize = std::mem::offset_of!(Backend, slow_since_ms);
    as_layout_3(bpffs);
    let maps = bpffs.pins().join("maps");
    let array = |name: &str| Map::Array(MapData::from_pin(maps.join(name)).unwrap());
    let records: Array<_, [u8; RECORD]> = array("BACKENDS").try_into().unwrap();
    let records: Vec<_> = records.iter().map(Result::unwrap).collect();
    fs::remove_file(maps.join("BACKENDS")).unwrap();
    bpf::pin_array(&maps.join("BACKENDS"), 64, records.len() as u32).unwrap();
    let mut short: Array<_, [u8; 64]> = array("BACKENDS").try_into().unwrap();
    for (index, record) in records.iter().enumerate() {
        let mut old = [0; 64];
        old[..60].copy_from_slice(&record[..60]);
        old[60..].copy_from_slice(&record[SLOW_SINCE..SLOW_SINCE + 4]);
        short.set(index as u32, old, 0).unwrap();
    }
    without(bpffs, &["TAGGED", "FIRST_MACS", "MACS", "FRAGMENTS"], 2);
}

#[test]
fn maps_of_older_layouts_are_carried_over_with_their_flows() {
    carried_over(2, as_layout_2);
    carried_over(3, as_layout_3);
    carried_over(4, as_layout_4);
    carried_over(5, as_layout_5);
    carried_over(6, as_layout_6);
}

/// A release that can't go on with what the last one has pinned breaks every translated connection.
#[test]
fn the_layout_before_this_one_is_read() {
    let bpffs = BpfFs::mount();
    drop(Datapath::open(options(&bpffs)).unwrap());
    say_layout(&bpffs, ABI_VERSION - 1);
    let (datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    let handover = datapath.handover().expect("other maps");
    assert!(handover.why.contains("were carried over"), "{handover}");
}

/// The connections of IPv4 that are watched.
fn samples(bpffs: &BpfFs) -> HashMap<MapData, [u8; KEY], [u8; size_of::<Sample>()]> {
    let pin = bpffs.pins().join("maps").join("SAMPLES_V4");
    Map::HashMap(MapData::from_pin(pin).unwrap()).try_into().unwrap()
}

const KEY: usize = size_of::<FlowKeyV4>();

fn carried_over(layout: u32, make_older: fn(&BpfFs)) {
    let bpffs = BpfFs::mount();
    let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    let mut wanted = two_services();
    for (number, (_, backend)) in wanted.backends.iter_mut().enumerate() {
        (backend.weight, backend.down) = (number as u16 + 1, number == 1);
        backend.slow_since_ms = (number == 0).then_some(123_456_789);
    }
    datapath.apply(&wanted).unwrap();
    drop(datapath);
    let (_, mut before) = Datapath::open(options(&bpffs)).unwrap();
    let key = FlowKeyV4 { src_be: 1, dst_be: 2, ports: PortPair::new(3, 4), protocol: 6 };
    let flow = Flow { backend: 1, way: 7, eth: [1, 2, 3], ..Flow::default() };
    let flows = || Flows::<FlowKeyV4>::open(&bpffs.pins(), "FLOWS_V4").unwrap();
    flows().insert(&key, flow).unwrap();
    samples(&bpffs).insert([1; KEY], [0; size_of::<Sample>()], 0).unwrap();
    make_older(&bpffs);

    let (mut datapath, adopted) = Datapath::open(options(&bpffs)).unwrap();
    let handover = datapath.handover().expect("other maps").clone();
    let told = format!("layout {layout} were carried over to {ABI_VERSION}");
    assert!(handover.why.contains(&told), "{handover}");
    assert_eq!(handover.lost, "");
    // Until the fourth layout, records said nothing of sizes, and are written anew.
    let says_sizes = layout >= 4;
    for (_, record) in before.backends.iter_mut().filter(|_| !says_sizes) {
        (record.inner_mtu, record.mtu) = (0, 0);
    }
    assert!(adopted == before, "other than what was there");
    let applied = datapath.apply(&wanted).unwrap();
    let written = if says_sizes { 0 } else { wanted.backends.len() };
    assert_eq!((applied.entries, applied.backends), (0, written), "all else is there");
    datapath.finish().unwrap();
    assert_one_set(&bpffs);
    assert_eq!(flows().get(&key).unwrap(), Some(flow));
    // Until the sixth layout, nobody would come back to it.
    assert_eq!(samples(&bpffs).keys().count(), 0);
}

#[test]
fn sizes_that_what_is_there_does_not_fit_into_are_refused() {
    let bpffs = BpfFs::mount();
    let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    datapath.apply(&two_services()).unwrap();
    drop(datapath);
    type Change = fn(&mut Capacity);
    let sizes: [(&str, Change, &str); 3] = [
        ("backends", |c| c.backends = 1, "`agent.capacity.backends`"),
        ("services", |c| c.services = 1, "`agent.capacity.services`"),
        ("buckets", |c| c.buckets = PAGE_BUCKETS, "`agent.capacity.buckets`"),
    ];
    for (name, change, said) in sizes {
        let mut other = options(&bpffs);
        change(&mut other.capacity);
        let error = open_error(other.clone());
        assert!(matches!(error, Error::CapacityInUse { key, .. } if key == name), "{error}");
        assert!(error.to_string().contains(said), "{error}");
        assert!(error.help().is_some_and(|help| help.contains("--rebuild")), "{error}");
        assert_one_set(&bpffs);
        let (_, adopted) = Datapath::open(options(&bpffs)).unwrap();
        assert_eq!(adopted.services.len(), 4, "{name}");
    }
}

#[test]
fn a_map_of_another_layout_is_never_opened_for_use() {
    let bpffs = BpfFs::mount();
    drop(Datapath::open(options(&bpffs)).unwrap());
    // Somebody else's map under one of our names.
    let maps = bpffs.pins().join("maps");
    fs::remove_file(maps.join("BACKENDS")).unwrap();
    fs::hard_link(maps.join("NAT_SOURCES"), maps.join("BACKENDS")).unwrap();
    let error = open_error(options(&bpffs));
    assert!(matches!(error, Error::ForeignPins { .. }), "{error}");
    assert!(error.to_string().contains("BACKENDS"), "{error}");
    let help = error.help().unwrap();
    assert!(help.contains("canary-agent detach") && help.contains("--rebuild"), "{help}");
    assert!(maps.join("BACKENDS").exists(), "it stays");
}

#[test]
fn pins_that_are_incomplete_or_not_ours_are_named_and_stay() {
    let bpffs = BpfFs::mount();
    drop(Datapath::open(options(&bpffs)).unwrap());
    let maps = bpffs.pins().join("maps");
    let kept = bpffs.pins().join("kept");
    for (name, said) in [("TABLE", "TABLE is missing"), ("META", "META is missing")] {
        fs::rename(maps.join(name), &kept).unwrap();
        let error = open_error(options(&bpffs));
        assert!(error.to_string().contains(said), "{error}");
        assert!(!maps.join(name).exists(), "nothing takes its place unasked");
        fs::rename(&kept, maps.join(name)).unwrap();
    }
    fs::hard_link(maps.join("META"), maps.join("STRANGE")).unwrap();
    let error = open_error(options(&bpffs));
    assert!(error.to_string().contains("STRANGE is no map of the agent's"), "{error}");
    fs::remove_file(maps.join("STRANGE")).unwrap();
    let (datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    assert_eq!(datapath.handover(), None);
}

#[test]
fn maps_of_a_newer_release_stay_unless_told_otherwise() {
    let bpffs = BpfFs::mount();
    let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    datapath.apply(&two_services()).unwrap();
    drop(datapath);
    say_layout(&bpffs, ABI_VERSION + 1);
    let error = open_error(options(&bpffs));
    assert!(
        matches!(error, Error::NewerLayout { found, .. } if found == ABI_VERSION + 1),
        "{error}"
    );
    assert!(error.help().is_some_and(|help| help.contains("--rebuild")), "{error}");
    assert_one_set(&bpffs);

    let told = Options { rebuild: true, ..options(&bpffs) };
    let (mut datapath, adopted) = Datapath::open(told.clone()).unwrap();
    assert_eq!(adopted, Adopted::default(), "nothing of them is read");
    let handover = datapath.handover().unwrap().to_string();
    assert!(handover.contains("not kept: connections with an entry"), "{handover}");
    // Those in force stay until there is something in the new ones.
    assert!(bpffs.pins().join("next/META").exists());
    datapath.apply(&two_services()).unwrap();
    datapath.finish().unwrap();
    assert_one_set(&bpffs);
    drop(datapath);
    let (datapath, adopted) = Datapath::open(told).unwrap();
    assert_eq!((datapath.handover(), adopted.services.len()), (None, 4), "they fit by now");
}

#[test]
fn maps_of_a_layout_that_is_not_read_any_more_give_way() {
    let bpffs = BpfFs::mount();
    let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    datapath.apply(&two_services()).unwrap();
    drop(datapath);
    // No release has ever written it.
    say_layout(&bpffs, 0);
    let (mut datapath, adopted) = Datapath::open(options(&bpffs)).unwrap();
    assert_eq!(adopted, Adopted::default());
    assert!(datapath.handover().unwrap().why.contains("layout 0"), "{:?}", datapath.handover());
    datapath.apply(&two_services()).unwrap();
    datapath.finish().unwrap();
    assert_one_set(&bpffs);
    drop(datapath);
    assert_eq!(Datapath::open(options(&bpffs)).unwrap().1.services.len(), 4);
}

#[test]
fn a_directory_outside_the_bpf_file_system_is_refused_with_what_to_do() {
    let bpffs = BpfFs::mount();
    let mut elsewhere = options(&bpffs);
    let directory = Workdir::new("no-bpffs");
    elsewhere.bpffs = directory.path().join("pins");
    let error = open_error(elsewhere);
    assert!(error.help().is_some_and(|help| help.contains("mount -t bpf")), "{error}");
    assert!(!directory.path().join("pins").exists());
}

#[test]
fn a_program_that_the_kernel_refuses_is_named_and_leaves_no_pin() {
    let bpffs = BpfFs::mount();
    // aya tries out what the kernel can do by loading programs: before the filter.
    let _ = aya::features();
    let refused = |options| {
        let thread = thread::spawn(|| {
            lacking::bpf_command_here(lacking::BPF_PROG_LOAD, libc::EINVAL);
            open_error(options)
        });
        thread.join().unwrap()
    };
    let error = refused(options(&bpffs));
    assert!(matches!(error, Error::Refused(_)), "{error}");
    let release = uname().unwrap().release().to_string_lossy().into_owned();
    for said in ["program `ingress`", "os error 22", &release] {
        assert!(error.to_string().contains(said), "{error}");
    }
    assert!(error.help().is_some_and(|help| help.contains("6.1")), "{error}");
    assert!(!bpffs.pins().exists(), "something is left");

    // What was there before stays.
    let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
    datapath.apply(&two_services()).unwrap();
    drop(datapath);
    refused(options(&bpffs));
    let (_, adopted) = Datapath::open(options(&bpffs)).unwrap();
    assert_eq!(adopted.services.len(), 4);
}

#[test]
fn the_tables_of_addresses_refuse_more_than_they_hold() {
    let bpffs = BpfFs::mount();
    let mut small = options(&bpffs);
    small.capacity.vips = 1;
    let (mut datapath, _) = Datapath::open(small).unwrap();
    let ports = |count: u16| (1..=count).map(|port| format!("tcp/{port}")).collect();
    let plane = |count| world(vec![Service { ports: ports(count), ..Service::default() }]);
    let error = datapath.apply(&plane(8)).unwrap_err();
    assert!(matches!(error, Error::VipsFull), "{error}");
    datapath.apply(&plane(1)).expect("a plan that fits repairs it");
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Runs `body` in a network namespace of its own that holds a pair `near`–`far`.
fn with_veth(body: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        ip("link add near type veth peer name far");
        ip("link set near up");
        body();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_pinned_link_is_taken_over_by_the_next_agent() {
    with_veth(|| {
        let bpffs = BpfFs::mount();
        let (mut first, _) = Datapath::open(options_of_all(&bpffs)).unwrap();
        let attached = first.attach("near").unwrap();
        assert_eq!(attached.mode, AttachedMode::Native);
        assert_eq!(first.attached_interfaces().unwrap(), ["near"]);
        let id = first.program().unwrap().info().unwrap().id();
        drop(first);
        assert_eq!(datapath::program_on("near").unwrap(), Some(id), "it outlives the agent");
        let (mut second, _) = Datapath::open(options_of_all(&bpffs)).unwrap();
        second.attach("near").unwrap();
        let new = second.program().unwrap().info().unwrap().id();
        assert_ne!(new, id);
        assert_eq!(datapath::program_on("near").unwrap(), Some(new));
        drop(second);
        let removed = datapath::detach(&bpffs.pins()).unwrap();
        assert!(removed > 2);
        assert_eq!(datapath::program_on("near").unwrap(), None);
        assert!(!bpffs.pins().exists());
    });
}

#[test]
fn what_is_no_link_where_one_is_pinned_is_named_and_stays() {
    with_veth(|| {
        let bpffs = BpfFs::mount();
        let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
        let (link, map) = (bpffs.pins().join("links/near"), bpffs.pins().join("maps/META"));
        fs::hard_link(map, &link).unwrap();
        let error = datapath.attach("near").unwrap_err();
        assert!(error.to_string().contains("links/near is no XDP link"), "{error}");
        assert!(link.exists());
        fs::remove_file(&link).unwrap();
        datapath.attach("near").unwrap();
    });
}

#[test]
fn an_interface_that_was_made_again_is_attached_again() {
    with_veth(|| {
        let bpffs = BpfFs::mount();
        let (mut datapath, _) = Datapath::open(options(&bpffs)).unwrap();
        datapath.attach("near").unwrap();
        ip("link del near");
        let error = datapath.attach("near").unwrap_err();
        assert!(matches!(error, Error::NoInterface { .. }), "{error}");
        ip("link add near type veth peer name far");
        datapath.attach("near").unwrap();
        let id = datapath.program().unwrap().info().unwrap().id();
        assert_eq!(datapath::program_on("near").unwrap(), Some(id));
    });
}

#[test]
fn another_program_on_the_interface_is_named_and_gives_way_only_when_told() {
    with_veth(|| {
        let theirs = BpfFs::mount();
        let (mut other, _) = Datapath::open(options(&theirs)).unwrap();
        other.attach("near").unwrap();
        let ours = BpfFs::mount();
        let (mut datapath, _) = Datapath::open(options(&ours)).unwrap();
        let error = datapath.attach("near").unwrap_err();
        assert!(matches!(&error, Error::OtherProgram { name, .. } if name == "ingress"), "{error}");
        assert!(error.to_string().contains("--replace"), "{error}");
        let mut replacing = options(&ours);
        replacing.replace = true;
        drop(datapath);
        let (mut datapath, _) = Datapath::open(replacing).unwrap();
        datapath.attach("near").unwrap();
        let id = datapath.program().unwrap().info().unwrap().id();
        assert_eq!(datapath::program_on("near").unwrap(), Some(id));
    });
}

#[test]
fn generic_mode_is_attached_when_asked() {
    with_veth(|| {
        let bpffs = BpfFs::mount();
        let mut generic = options(&bpffs);
        generic.xdp_mode = XdpMode::Generic;
        let (mut datapath, _) = Datapath::open(generic).unwrap();
        assert_eq!(datapath.attach("near").unwrap().mode, AttachedMode::Generic);
        drop(datapath);
        // Asked for native now: the link of the other mode makes room.
        let mut native = options(&bpffs);
        native.xdp_mode = XdpMode::Native;
        let (mut datapath, _) = Datapath::open(native).unwrap();
        assert_eq!(datapath.attach("near").unwrap().mode, AttachedMode::Native);
    });
}
