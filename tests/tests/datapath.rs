//! The datapath against the kernel: pins, adoption, attaching.

use std::{fs, net::SocketAddr, process::Command, sync::Arc};

use canary_agent::{
    config::model::{Capacity, XdpMode},
    datapath::{self, AttachedMode, Datapath, Error, Options},
    plan::DataPlane,
};
use canary_ebpf_common::{
    abi::{ForwardMode, LedgerEntry},
    entry::{BackendIndex, Entry},
};
use canary_tests::{
    loaded::{BUCKETS, BpfFs, NAT_PORTS, TestService, plane},
    workdir::Workdir,
};

fn options(bpffs: &BpfFs) -> Options {
    Options {
        bpffs: bpffs.pins(),
        capacity: Capacity {
            services: 8,
            vips: 64,
            backends: 64,
            buckets: 8 * BUCKETS,
            flows: 1024,
        },
        nat_ports: Some(NAT_PORTS),
        xdp_mode: XdpMode::Auto,
        replace: false,
    }
}

fn two_services() -> DataPlane {
    let v4: Vec<SocketAddr> = vec!["10.2.1.1:80".parse().unwrap(), "10.2.1.2:80".parse().unwrap()];
    let v6: Vec<SocketAddr> = vec!["[fd00:2::1]:80".parse().unwrap()];
    plane(&[
        TestService::new("10.1.0.100".parse().unwrap(), ForwardMode::Dsr, v4),
        TestService::new("fd00:1::100".parse().unwrap(), ForwardMode::Nat, v6),
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
    let (mut first, adopted) = Datapath::open(options(&bpffs)).unwrap();
    assert_eq!(adopted.services, []);
    first.apply(&wanted).unwrap();
    drop(first);

    let (mut second, adopted) = Datapath::open(options(&bpffs)).unwrap();
    assert_eq!(adopted.services.len(), 2);
    for (found, wanted) in adopted.services.iter().zip(&wanted.services) {
        assert_eq!(found.name, wanted.name);
        assert_eq!(u32::from(found.id), wanted.record.id);
        assert_eq!(found.first_page, wanted.record.first_page);
        assert_eq!(found.entries, *wanted.entries);
        assert_eq!(found.ledger, *wanted.ledger);
        assert_eq!(found.versions[0], "stable");
    }
    let indices: Vec<_> = adopted.backends.iter().map(|(index, _)| index.get()).collect();
    assert_eq!(indices, [1, 2, 3]);
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
    one.services.pop();
    one.backends.retain(|(_, b)| b.service == 0);
    datapath.apply(&one).unwrap();
    drop(datapath);
    let (_, adopted) = Datapath::open(options(&bpffs)).unwrap();
    assert_eq!(adopted.services.len(), 1);
    assert_eq!(adopted.backends.len(), 2);
}

#[test]
fn maps_of_another_size_are_refused_and_stay() {
    let bpffs = BpfFs::mount();
    drop(Datapath::open(options(&bpffs)).unwrap());
    let mut other = options(&bpffs);
    other.capacity.flows = 4096;
    let error = open_error(other);
    assert!(
        matches!(error, Error::CapacityChanged { map: "FLOWS_V4", pinned: 1024, configured: 4096 }),
        "{error}"
    );
    assert!(bpffs.pins().join("maps/FLOWS_V4").exists());
    Datapath::open(options(&bpffs)).unwrap();
}

#[test]
fn a_map_of_another_layout_is_never_opened_for_use() {
    let bpffs = BpfFs::mount();
    drop(Datapath::open(options(&bpffs)).unwrap());
    // Somebody else's map under one of our names.
    let maps = bpffs.pins().join("maps");
    fs::remove_file(maps.join("BACKENDS")).unwrap();
    fs::rename(maps.join("NAT_SOURCES"), maps.join("BACKENDS")).unwrap();
    let error = open_error(options(&bpffs));
    assert!(matches!(error, Error::ForeignPins { .. }), "{error}");
    assert!(error.to_string().contains("BACKENDS"), "{error}");
    assert!(error.to_string().contains("canary-agent detach"), "{error}");
}

#[test]
fn a_directory_outside_the_bpf_file_system_is_refused_with_what_to_do() {
    let bpffs = BpfFs::mount();
    let mut elsewhere = options(&bpffs);
    let directory = Workdir::new("no-bpffs");
    elsewhere.bpffs = directory.path().join("pins");
    let error = open_error(elsewhere);
    assert!(error.to_string().contains("mount -t bpf"), "{error}");
    assert!(!directory.path().join("pins").exists());
}

#[test]
fn the_tables_of_addresses_refuse_more_than_they_hold() {
    let bpffs = BpfFs::mount();
    let mut small = options(&bpffs);
    small.capacity.vips = 1;
    let (mut datapath, _) = Datapath::open(small).unwrap();
    let backend: SocketAddr = "10.2.1.1:80".parse().unwrap();
    let services: Vec<_> = (0..8)
        .map(|i| TestService::new([10, 1, 0, i].into(), ForwardMode::Dsr, vec![backend]))
        .collect();
    let error = datapath.apply(&plane(&services)).unwrap_err();
    assert!(matches!(error, Error::VipsFull), "{error}");
    datapath.apply(&plane(&services[..1])).expect("a plan that fits repairs it");
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Runs `body` in a network namespace of its own that holds a pair `near`–`far`.
fn with_veth(body: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
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
        let (mut first, _) = Datapath::open(options(&bpffs)).unwrap();
        let attached = first.attach("near").unwrap();
        assert_eq!(attached.mode, AttachedMode::Native);
        assert_eq!(first.attached_interfaces().unwrap(), ["near"]);
        let id = first.program().unwrap().info().unwrap().id();
        drop(first);
        assert_eq!(datapath::program_on("near").unwrap(), Some(id), "it outlives the agent");
        let (mut second, _) = Datapath::open(options(&bpffs)).unwrap();
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
