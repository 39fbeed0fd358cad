//! The real program, loaded by the real datapath, run on packets of our own
//! with `BPF_PROG_TEST_RUN`. Packets arrive on interface 1, the loopback,
//! unless it is said otherwise.

use std::{
    ops::RangeInclusive,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use anyhow::Result;
use aya::{
    Pod,
    maps::{HashMap, Map, MapData, MapError},
    programs::ProgramInfo,
};
use canary_agent::{
    config::model::{Capacity, XdpMode},
    datapath::{Applied, Datapath, Options, Sweeper, Swept},
    plan::{Adopted, DataPlane},
};
use canary_ebpf_common::{
    abi::{BackendCounters, Flow, FlowKeyV4, FlowKeyV6},
    entry::BackendIndex,
};

use crate::{bpf, workdir::Workdir, world::macs};

/// The maps that hold what a plan says, and those of which nothing is read that was not written
/// before: the keys in the rings of flows to spare.
const POLICY: [&str; 16] = [
    "META",
    "SERVICE_INFO",
    "LEDGER",
    "VIPS_V4",
    "VIPS_V6",
    "TABLE",
    "BACKENDS",
    "BACKEND_COUNTERS",
    "NAT_SOURCES",
    "SPARE_V4",
    "SPARE_V6",
    "MACS",
    "FIRST_MACS",
    "TAGGED",
    "SAMPLING",
    "SIGNALS",
];

/// The interface that packets arrive on in a test run.
pub const ARRIVAL_IFINDEX: u32 = 1;

/// `XDP_ABORTED` (linux/bpf.h).
pub const XDP_ABORTED: u32 = 0;
/// `XDP_DROP`.
pub const XDP_DROP: u32 = 1;
/// `XDP_PASS`.
pub const XDP_PASS: u32 = 2;
/// `XDP_TX`.
pub const XDP_TX: u32 = 3;
/// `XDP_REDIRECT`.
pub const XDP_REDIRECT: u32 = 4;

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

/// A map key of a flow table, and its bytes.
pub trait FlowKey: Copy {
    /// As many bytes as a key has.
    type Bytes: Pod + AsRef<[u8]>;
    /// The key's bytes, in the map's order.
    fn bytes(&self) -> Self::Bytes;
}

macro_rules! flow_key {
    ($($key:ty),+) => {$(
        impl FlowKey for $key {
            type Bytes = [u8; size_of::<$key>()];

            fn bytes(&self) -> Self::Bytes {
                // SAFETY: same size, and padding is spelled out: no byte is uninitialised.
                unsafe { std::mem::transmute::<$key, Self::Bytes>(*self) }
            }
        }
    )+};
}

flow_key!(FlowKeyV4, FlowKeyV6);

/// An entry's bytes as they lie in the map.
type FlowBytes = [u8; size_of::<Flow>()];

/// The entry that map memory holds.
fn flow(bytes: FlowBytes) -> Flow {
    // SAFETY: same size, and every bit pattern is a `Flow`: integers only.
    unsafe { std::mem::transmute::<FlowBytes, Flow>(bytes) }
}

/// What map memory holds of an entry.
fn flow_bytes(flow: Flow) -> FlowBytes {
    // SAFETY: same size, and padding is spelled out: no byte is uninitialised.
    unsafe { std::mem::transmute::<Flow, FlowBytes>(flow) }
}

/// One family's flow table, seen from outside by its pin.
pub struct Flows<K: FlowKey> {
    map: HashMap<MapData, K::Bytes, FlowBytes>,
}

impl<K: FlowKey> Flows<K> {
    /// Opens the table of that name below `agent.bpffs`.
    ///
    /// # Errors
    /// When it is not there, or no hash map.
    pub fn open(pins: &std::path::Path, name: &str) -> Result<Self> {
        let data = MapData::from_pin(pins.join("maps").join(name))?;
        Ok(Self { map: Map::HashMap(data).try_into()? })
    }

    /// The entry of `key`.
    ///
    /// # Errors
    /// When the kernel refuses to look.
    pub fn get(&self, key: &K) -> Result<Option<Flow>> {
        match self.map.get(&key.bytes(), 0) {
            Ok(bytes) => Ok(Some(flow(bytes))),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Changes every entry as `change` says.
    ///
    /// # Errors
    /// When the kernel refuses to read or write.
    pub fn rewrite(&mut self, mut change: impl FnMut(&mut Flow)) -> Result<()> {
        let entries: Vec<_> = self.map.iter().collect::<Result<_, _>>()?;
        for (key, bytes) in entries {
            let mut entry = flow(bytes);
            change(&mut entry);
            self.map.insert(key, flow_bytes(entry), 0)?;
        }
        Ok(())
    }

    /// Stores an entry.
    ///
    /// # Errors
    /// When the kernel refuses, for want of room above all.
    pub fn insert(&mut self, key: &K, entry: Flow) -> Result<()> {
        Ok(self.map.insert(key.bytes(), flow_bytes(entry), 0)?)
    }

    /// Removes every entry.
    ///
    /// # Errors
    /// When the kernel refuses to read or remove.
    pub fn clear(&mut self) -> Result<()> {
        let keys: Vec<_> = self.map.keys().collect::<Result<_, _>>()?;
        for key in keys {
            self.map.remove(&key)?;
        }
        Ok(())
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.map.keys().flatten().count()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How large the maps are made.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sizes {
    /// Entries of each family's flow table.
    pub flows: u32,
    /// Buckets of all services.
    pub buckets: u32,
    /// Connections of each family that are watched at a time.
    pub samples: u32,
    /// Services.
    pub services: u32,
    /// Addresses with a port, of all services.
    pub vips: u32,
    /// Backends of all services.
    pub backends: u32,
    /// Source ports for translated flows.
    pub nat_ports: RangeInclusive<u16>,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            flows: 1024,
            buckets: 64 * 4096,
            samples: 1024,
            services: 64,
            vips: 1024,
            backends: 1024,
            nat_ports: 10_000..=19_999,
        }
    }
}

/// The program, loaded over maps of its own and attached to nothing.
pub struct Loaded {
    /// The datapath that loaded it.
    pub datapath: Datapath,
    /// The flow table of IPv4.
    pub flows_v4: Flows<FlowKeyV4>,
    /// The flow table of IPv6.
    pub flows_v6: Flows<FlowKeyV6>,
    sweeper: Sweeper,
    program: OwnedFd,
    out: Vec<u8>,
    options: Options,
    bpffs: BpfFs,
}

/// The loaded program in another thread's hands.
pub struct Runner {
    program: OwnedFd,
    out: Vec<u8>,
}

impl Runner {
    /// Runs the program on a frame; its answer, one of `XDP_*`.
    ///
    /// # Errors
    /// When the kernel refuses the frame.
    pub fn run(&mut self, frame: &[u8]) -> Result<u32> {
        Ok(bpf::run(self.program.as_fd(), frame, None, &mut self.out)?.action)
    }
}

impl Loaded {
    /// Loads the program over maps of these sizes, and puts `plane` in force.
    ///
    /// # Errors
    /// When the kernel refuses the program, or the plan exceeds the maps.
    pub fn new(plane: &DataPlane, sizes: &Sizes) -> Result<Self> {
        let bpffs = BpfFs::mount();
        let Sizes { flows, buckets, samples, services, vips, backends, ref nat_ports } = *sizes;
        let options = Options {
            bpffs: bpffs.pins(),
            capacity: Capacity { services, vips, backends, buckets, flows, samples },
            nat_ports: Some(nat_ports.clone()),
            xdp_mode: XdpMode::Auto,
            replace: false,
            rebuild: false,
            rare: true,
        };
        let (mut datapath, _) = Datapath::open(options.clone())?;
        datapath.set_macs(&macs([ARRIVAL_IFINDEX]))?;
        datapath.apply(plane)?;
        let program = datapath.program()?.fd()?.as_fd().try_clone_to_owned()?;
        Ok(Self {
            flows_v4: Flows::open(&bpffs.pins(), "FLOWS_V4")?,
            flows_v6: Flows::open(&bpffs.pins(), "FLOWS_V6")?,
            sweeper: datapath.sweeper()?,
            datapath,
            program,
            out: vec![0; 64 << 10],
            options,
            bpffs,
        })
    }

    /// Forgets everything and puts `plane` in force: as if it had just been loaded, but for the
    /// time that a load takes.
    ///
    /// # Errors
    /// When a map can't be cleared, or the plan exceeds the maps.
    pub fn renew(&mut self, plane: &DataPlane) -> Result<()> {
        // Policy goes with the plan, and what is counted of a backend with its record.
        self.datapath.apply(&DataPlane::default())?;
        for map in std::fs::read_dir(self.bpffs.pins().join("maps"))? {
            let map = map?;
            if !POLICY.iter().any(|name| map.file_name() == *name) {
                bpf::clear(&MapData::from_pin(map.path())?)?;
            }
        }
        self.apply(plane).map(drop)
    }

    /// Loads the program anew over the pinned maps, as the next agent does, and gives what
    /// that one adopts.
    ///
    /// # Errors
    /// When the kernel refuses the program, or the pins are not what they were.
    pub fn reopen(&mut self) -> Result<Adopted> {
        let (mut datapath, adopted) = Datapath::open(self.options.clone())?;
        self.program = datapath.program()?.fd()?.as_fd().try_clone_to_owned()?;
        self.sweeper = datapath.sweeper()?;
        self.datapath = datapath;
        Ok(adopted)
    }

    /// Puts another plan in force, and sweeps what it wants swept.
    ///
    /// # Errors
    /// When the plan exceeds the maps.
    pub fn apply(&mut self, plane: &DataPlane) -> Result<Applied> {
        let applied = self.datapath.apply(plane)?;
        self.sweeper.pass(&plane.sweep.backends)?;
        Ok(applied)
    }

    /// Lets expired flow entries go, as the agent does every second.
    ///
    /// # Errors
    /// When the kernel refuses to walk a table.
    pub fn expire(&mut self) -> Result<Swept> {
        Ok(self.sweeper.pass(&[])?)
    }

    /// What looks after the flow tables.
    pub fn sweeper(&mut self) -> &mut Sweeper {
        &mut self.sweeper
    }

    /// Runs the program on a frame.
    ///
    /// # Errors
    /// When the kernel refuses the frame: it takes none under 14 bytes.
    pub fn run(&mut self, frame: &[u8]) -> Result<Outcome> {
        self.run_from(frame, None)
    }

    /// Runs the program on a frame that came in by another interface.
    ///
    /// # Errors
    /// When the kernel refuses the frame, or has no such interface.
    pub fn run_from(&mut self, frame: &[u8], ifindex: Option<u32>) -> Result<Outcome> {
        let bpf::Run { action, len_bytes, duration_ns } =
            bpf::run(self.program.as_fd(), frame, ifindex, &mut self.out)?;
        Ok(Outcome {
            action,
            frame: self.out[..len_bytes].to_vec(),
            duration: Duration::from_nanos(duration_ns.into()),
        })
    }

    /// Another descriptor of the program, which holds it.
    ///
    /// # Errors
    /// When there is no further descriptor.
    pub fn program(&self) -> Result<OwnedFd> {
        Ok(self.program.try_clone()?)
    }

    /// The program, to be run by another thread at the same time.
    ///
    /// # Errors
    /// When there is no further descriptor.
    pub fn runner(&self) -> Result<Runner> {
        Ok(Runner { program: self.program.try_clone()?, out: vec![0; 64 << 10] })
    }

    /// Runs the program on a frame for the time alone, in nanoseconds.
    ///
    /// # Errors
    /// When the kernel refuses the frame.
    pub fn time_ns(&mut self, frame: &[u8]) -> Result<u32> {
        Ok(bpf::run(self.program.as_fd(), frame, None, &mut self.out)?.duration_ns)
    }

    /// What the kernel says of the program.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn info(&mut self) -> Result<ProgramInfo> {
        Ok(self.datapath.program()?.info()?)
    }

    /// Lets time pass for every flow: as if nothing had come for so long.
    ///
    /// # Errors
    /// When a flow table can't be read or written.
    pub fn silence(&mut self, time: Duration) -> Result<()> {
        let age = |flow: &mut Flow| {
            flow.last_ns = flow.last_ns.saturating_sub(time.as_nanos() as u64);
        };
        self.flows_v4.rewrite(age)?;
        self.flows_v6.rewrite(age)
    }

    /// The directory of the pins.
    pub fn pins(&self) -> PathBuf {
        self.bpffs.pins()
    }

    /// Packets by reason, in the order of `Reason::ALL`.
    pub fn reasons(&self) -> Vec<u64> {
        self.datapath.reader().reasons()
    }

    /// Counters of backends, in their order.
    pub fn counters(&self, backends: &[BackendIndex]) -> Vec<BackendCounters> {
        self.datapath.reader().backend_counters(backends)
    }
}
