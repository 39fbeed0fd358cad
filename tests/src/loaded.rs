//! The real program, loaded by the real datapath, run on packets of our own
//! with `BPF_PROG_TEST_RUN`. Packets arrive on interface 1, the loopback.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use aya::programs::{TestRun as _, TestRunOptions};
use canary_agent::{
    config::model::{Capacity, Port, Protocol, XdpMode},
    datapath::{Datapath, Options},
    plan::{BackendPlan, DataPlane, Family, NextHop, ServicePlan},
};
use canary_ebpf_common::{
    abi::{self, ForwardMode, LedgerEntry},
    entry::{BackendIndex, Entry},
};

use crate::workdir::Workdir;

/// The interface that packets arrive on in a test run.
pub const ARRIVAL_IFINDEX: u32 = 1;

/// Source ports for translated flows in a loaded program.
pub const NAT_PORTS: RangeInclusive<u16> = 10_000..=19_999;

/// What a packet became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The program's answer, one of `XDP_*`.
    pub action: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// How long the kernel says the program ran.
    pub duration: Duration,
}

/// `XDP_DROP` (linux/bpf.h).
pub const XDP_DROP: u32 = 1;
/// `XDP_PASS`.
pub const XDP_PASS: u32 = 2;
/// `XDP_TX`.
pub const XDP_TX: u32 = 3;
/// `XDP_REDIRECT`.
pub const XDP_REDIRECT: u32 = 4;

/// A BPF file system of one's own, gone with the value.
#[derive(Debug)]
pub struct BpfFs(Workdir);

impl BpfFs {
    /// Mounts one in a new directory.
    pub fn mount() -> Self {
        Self(Workdir::new("loaded"))
    }

    /// A directory in it for one agent's pins.
    pub fn pins(&self) -> PathBuf {
        self.0.bpffs().join("canary")
    }
}

/// A service to load: who is steered where.
#[derive(Clone, Debug)]
pub struct TestService {
    /// Its address.
    pub vip: IpAddr,
    /// Its ports.
    pub ports: Vec<Port>,
    /// How packets reach the backends.
    pub mode: ForwardMode,
    /// Extra bits of `abi::Service::flags`.
    pub flags: u32,
    /// Its backends; buckets go round them in turn.
    pub backends: Vec<SocketAddr>,
    /// Interface that the backends are behind.
    pub ifindex: u32,
}

impl TestService {
    /// A service on TCP and UDP port 80 that hashes whole connections.
    pub fn new(vip: IpAddr, mode: ForwardMode, backends: Vec<SocketAddr>) -> Self {
        let port = |protocol| Port { protocol, port: 80 };
        Self {
            vip,
            ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
            mode,
            flags: abi::SERVICE_HASH_CONNECTION,
            backends,
            ifindex: ARRIVAL_IFINDEX,
        }
    }
}

/// Buckets of a test service: one page.
pub const BUCKETS: u32 = 4096;

/// MAC address of the interface that backends are behind.
pub const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// MAC address of the backend with this index.
pub fn backend_mac(index: BackendIndex) -> [u8; 6] {
    let [high, low] = index.get().to_be_bytes();
    [2, 0, 0, 1, high, low]
}

/// A data plane that holds `services`, in this order of ids and pages.
pub fn plane(services: &[TestService]) -> DataPlane {
    let mut plane = DataPlane::default();
    let mut next = 1;
    for (id, service) in services.iter().enumerate() {
        let first = next;
        let nat_first = plane.nat_sources.len() as u16;
        let source: IpAddr = match service.vip {
            IpAddr::V4(_) => IpAddr::from([10, 2, 0, 1]),
            IpAddr::V6(_) => IpAddr::from([0xfd00, 2, 0, 0, 0, 0, 0, 1]),
        };
        plane.nat_sources.push(source);
        for addr in &service.backends {
            let index = BackendIndex::new(next);
            plane.backends.push((
                index,
                BackendPlan {
                    addr: *addr,
                    service: id as u16,
                    version: 0,
                    next_hop: Some(NextHop {
                        ifindex: service.ifindex,
                        source_mac: OUR_MAC,
                        destination_mac: backend_mac(index),
                        source,
                    }),
                    nat_first,
                    nat_count: 1,
                    down: false,
                    maint: false,
                },
            ));
            next += 1;
        }
        let count = service.backends.len() as u16;
        let entries = (0..BUCKETS as u16)
            .map(|b| match count {
                0 => Entry::default(),
                _ => Entry::steady(BackendIndex::new(first + b % count)),
            })
            .collect();
        plane.services.push(Arc::new(ServicePlan {
            name: format!("service-{id}"),
            family: match service.vip {
                IpAddr::V4(_) => Family::V4,
                IpAddr::V6(_) => Family::V6,
            },
            versions: vec!["stable".to_owned()],
            control: 0,
            record: abi::Service {
                first_page: id as u32,
                bucket_mask: BUCKETS - 1,
                flags: service.mode as u32 | service.flags,
                id: id as u32,
                hash_key: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
                mask_v4_be: u32::MAX,
                udp_idle_ms: 30_000,
                mask_v6: [u64::MAX; 2],
            },
            vips: vec![service.vip],
            ports: service.ports.clone(),
            entries: Arc::new(entries),
            ledger: Arc::new(vec![LedgerEntry::default(); BUCKETS as usize]),
        }));
    }
    plane
}

/// The program, loaded over maps of its own and attached to nothing.
pub struct Loaded {
    /// The datapath that loaded it.
    pub datapath: Datapath,
    _bpffs: BpfFs,
}

impl Loaded {
    /// Loads the program with room for `flows` flow entries, and puts `plane` in force.
    pub fn new(plane: &DataPlane, flows: u32) -> Result<Self> {
        let bpffs = BpfFs::mount();
        let (mut datapath, _) = Datapath::open(Options {
            bpffs: bpffs.pins(),
            capacity: Capacity {
                services: 64,
                vips: 1024,
                backends: 1024,
                buckets: 64 * BUCKETS,
                flows,
            },
            nat_ports: Some(NAT_PORTS),
            xdp_mode: XdpMode::Auto,
            replace: false,
        })?;
        datapath.apply(plane)?;
        Ok(Self { datapath, _bpffs: bpffs })
    }

    /// Runs the program on a frame.
    pub fn run(&mut self, frame: &[u8]) -> Result<Outcome> {
        let mut out = vec![0; frame.len() + 256];
        let result = self.datapath.program()?.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            repeat: 1,
            ..TestRunOptions::default()
        })?;
        out.truncate(result.data_size_out as usize);
        Ok(Outcome { action: result.return_value, frame: out, duration: result.duration })
    }
}
