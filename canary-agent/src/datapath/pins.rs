//! Where programs, links and maps are pinned, and what stands there already.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use aya::maps::{Array, Map, MapData, MapInfo, MapType};
use canary_ebpf_common::abi::{self, PAGE_BUCKETS};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::statfs::statfs,
    unistd::{AccessFlags, eaccess},
};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{
    Error, Options, links,
    older::{self, Older},
    pod,
};
use crate::{config::model::Capacity, failpoint::Failpoint};

/// The default mount point of the BPF file system.
const BPFFS: &str = "/sys/fs/bpf";
/// `f_type` of a BPF file system (`BPF_FS_MAGIC`, linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// The directory of the maps in force.
const IN_FORCE: &str = "maps";
/// The directory of maps that are being made beside those in force, and after the switch that of
/// the earlier ones until they are done with.
const BESIDE: &str = "next";
/// In the directory of the maps in force: not everything of those in [`BESIDE`] has been carried
/// over yet. Both change places at once, and this tells which are which.
const UNFINISHED: &str = "UNFINISHED";

/// Paths below `agent.bpffs`.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
    /// [`IN_FORCE`] or [`BESIDE`].
    set: &'static str,
}

/// A map as this build makes it.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Name of the map and of its pin.
    pub(super) name: &'static str,
    pub(super) kind: MapType,
    pub(super) key_bytes: usize,
    pub(super) value_bytes: usize,
    pub(super) flags: u32,
    /// Elements.
    pub(super) entries: u32,
}

/// What is pinned already.
#[derive(Debug)]
pub(super) enum Found {
    /// No maps, and no program that is attached.
    Nothing,
    /// Maps as this build makes them.
    Fitting,
    /// Maps that can be carried over to those of this build.
    Readable(Readable),
    /// Maps of which nothing is read, and why.
    Unreadable(String),
}

/// What remains to be done with the earlier maps after a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// What is in their flow tables is carried over.
    CarryOver,
    /// Nothing of them is read.
    Forget,
}

/// Maps of other sizes, or of an older layout that is known.
#[derive(Debug)]
pub(super) struct Readable {
    /// Of which layout, if not of the present one.
    pub(super) older: Option<&'static Older>,
    /// Maps that can't be gone on with as they are.
    pub(super) differing: Vec<&'static str>,
}

impl Readable {
    pub(super) fn differs(&self, name: &str) -> bool {
        self.differing.contains(&name)
    }
}

const MMAPABLE: u32 = 1 << 10;
const NO_PREALLOC: u32 = 1 << 0;
/// Bytes that the kernel keeps with each element of a hash map, about.
const HASH_ELEMENT_BYTES: u64 = 64;

impl Layout {
    /// Bytes that it takes of the kernel's memory, about.
    pub(super) fn bytes(&self) -> u64 {
        let Self { kind, key_bytes, value_bytes, entries, name: _, flags: _ } = self;
        let value = (*value_bytes as u64).next_multiple_of(8);
        let each = match kind {
            MapType::Hash | MapType::LruHash | MapType::DevMapHash => {
                value + (*key_bytes as u64).next_multiple_of(8) + HASH_ELEMENT_BYTES
            }
            MapType::PerCpuArray => value * u64::from(cpus()),
            // It takes memory as it is used.
            MapType::LpmTrie => 0,
            // Its size is said in bytes.
            MapType::RingBuf => 1,
            _ => value,
        };
        each * u64::from(*entries)
    }
}

/// Every map that is pinned, in the sizes that `options` ask for.
pub(super) fn layouts(options: &Options) -> Vec<Layout> {
    layouts_of(&options.capacity)
}

fn layouts_of(c: &Capacity) -> Vec<Layout> {
    let pages = c.buckets / PAGE_BUCKETS;
    let vip_slots = vip_slots(c.vips);
    let page = PAGE_BUCKETS as usize;
    let layout = |name, kind, key_bytes, value_bytes, flags, entries| Layout {
        name,
        kind,
        key_bytes,
        value_bytes,
        flags,
        entries,
    };
    // Each service can have a table for either family; index 0 of the backends is none;
    // replaced backends drain beside as many new ones.
    let services = c.services * 2;
    let backends = (c.backends * 2 + 1).min(abi::BACKEND_INDICES);
    vec![
        layout("META", MapType::Array, 4, size_of::<abi::Meta>(), 0, 1),
        layout("SERVICE_INFO", MapType::Array, 4, size_of::<abi::ServiceInfo>(), 0, services),
        layout("PANICS", MapType::Array, 4, size_of::<abi::Panic>(), MMAPABLE, services + 1),
        layout("LEDGER", MapType::Array, 4, 8 * page, MMAPABLE, pages),
        layout("VIPS_V4", MapType::Array, 4, size_of::<abi::VipSlotV4>(), MMAPABLE, vip_slots),
        layout("VIPS_V6", MapType::Array, 4, size_of::<abi::VipSlotV6>(), MMAPABLE, vip_slots),
        layout("TABLE", MapType::Array, 4, 4 * page, MMAPABLE, pages),
        layout("BACKENDS", MapType::Array, 4, size_of::<abi::Backend>(), MMAPABLE, backends),
        layout("NAT_SOURCES", MapType::Array, 4, 16, 0, abi::NAT_SOURCES),
        layout(
            "FLOWS_V4",
            MapType::Hash,
            size_of::<abi::FlowKeyV4>(),
            size_of::<abi::Flow>(),
            0,
            c.flows,
        ),
        layout(
            "FLOWS_V6",
            MapType::Hash,
            size_of::<abi::FlowKeyV6>(),
            size_of::<abi::Flow>(),
            0,
            c.flows,
        ),
        layout(
            "SPARE_V4",
            MapType::Array,
            4,
            size_of::<abi::FlowKeyV4>(),
            0,
            spare_places(c.flows) * cpus(),
        ),
        layout(
            "SPARE_V6",
            MapType::Array,
            4,
            size_of::<abi::FlowKeyV6>(),
            0,
            spare_places(c.flows) * cpus(),
        ),
        layout("SPARE_RINGS", MapType::Array, 4, size_of::<abi::Ring>(), 0, 2 * cpus()),
        layout("FLOW_COUNTERS", MapType::PerCpuArray, 4, size_of::<abi::FlowCounters>(), 0, 1),
        layout(
            "BACKEND_COUNTERS",
            MapType::PerCpuArray,
            4,
            size_of::<abi::BackendCounters>(),
            0,
            backends,
        ),
        layout("TAGGED", MapType::Array, 4, 4, 0, abi::way::PLACES),
        layout(
            "CLASSES_V4",
            MapType::LpmTrie,
            size_of::<abi::NetworkV4>(),
            size_of::<abi::ClassState>(),
            NO_PREALLOC,
            abi::CLASS_NETWORKS,
        ),
        layout(
            "CLASSES_V6",
            MapType::LpmTrie,
            size_of::<abi::NetworkV6>(),
            size_of::<abi::ClassState>(),
            NO_PREALLOC,
            abi::CLASS_NETWORKS,
        ),
        layout("CLASS_BLOCKS", MapType::Array, 4, 8, 0, abi::CLASS_BLOCKS),
        layout(
            "CLASS_TABLES",
            MapType::Hash,
            size_of::<abi::TableKey>(),
            size_of::<abi::Service>(),
            0,
            abi::CLASS_TABLES,
        ),
        layout("CLASS_CHANGES", MapType::Array, 4, 8, 0, 1),
        layout("FIRST_MACS", MapType::Array, 4, 8, 0, abi::FIRST_MACS),
        layout("MACS", MapType::Hash, size_of::<abi::MacKey>(), 4, 0, MACS),
        layout(
            "FRAGMENTS",
            MapType::LruHash,
            size_of::<abi::FragmentKey>(),
            size_of::<abi::FragmentRoute>(),
            0,
            abi::FRAGMENTS,
        ),
        layout(
            "SAMPLING",
            MapType::Array,
            4,
            size_of::<abi::Sampling>(),
            0,
            services * abi::MAX_VERSIONS as u32,
        ),
        layout(
            "SAMPLES_V4",
            MapType::Hash,
            size_of::<abi::FlowKeyV4>(),
            size_of::<abi::Sample>(),
            0,
            c.samples.max(1),
        ),
        layout(
            "SAMPLES_V6",
            MapType::Hash,
            size_of::<abi::FlowKeyV6>(),
            size_of::<abi::Sample>(),
            0,
            c.samples.max(1),
        ),
        layout(
            "SIGNAL_COUNTERS",
            MapType::PerCpuArray,
            4,
            size_of::<abi::VersionSignals>(),
            0,
            signal_slots(c.samples),
        ),
        layout("SIGNALS", MapType::RingBuf, 0, 0, 0, ring_bytes(c.samples)),
        layout("REASONS", MapType::PerCpuArray, 4, 8, 0, abi::REASON_SLOTS),
        // The kernel sets BPF_F_RDONLY_PROG on device maps by itself.
        layout("TX_PORTS", MapType::DevMapHash, 4, 8, RDONLY_PROG, TX_PORTS),
    ]
}

/// Versions that can be watched at a time.
pub(super) fn signal_slots(samples: u32) -> u32 {
    match samples {
        0 => 1,
        _ => (samples / 128).clamp(32, 1024),
    }
}

/// Bytes of the ring buffer of bad outcomes, a power of two and whole pages: 40 bytes each, for as
/// many as there can be connections to have one.
fn ring_bytes(samples: u32) -> u32 {
    (samples.max(1) * 16).next_power_of_two().clamp(1 << 14, 1 << 22)
}

/// Places of one CPU's ring of flows that can be spared, a power of two: all CPUs' together hold about a
/// quarter as many flows as the table holds entries. Translated flows take two each.
pub(super) fn spare_places(flows: u32) -> u32 {
    let each = flows / 4 / cpus();
    (each + 1).next_power_of_two().max(MIN_SPARE)
}

/// CPUs that there can be.
pub(super) fn cpus() -> u32 {
    aya::util::nr_cpus().map_or(1, |cpus| cpus as u32)
}

/// Least places of one CPU's ring.
const MIN_SPARE: u32 = 16;

/// Slots of `VIPS_V4` and of `VIPS_V6`: a quarter full at most, so that every
/// address finds one of its two slots. Each address may take one more than it has ports.
pub(super) const fn vip_slots(vips: u32) -> u32 {
    let slots = vips.saturating_mul(8).next_power_of_two();
    if slots < MAX_VIP_SLOTS { slots } else { MAX_VIP_SLOTS }
}

/// As many as [`canary_ebpf_common::vips::slots`] can tell apart.
const MAX_VIP_SLOTS: u32 = 1 << 20;

/// Elements of `MACS`.
const MACS: u32 = 4096;
/// Elements of `TX_PORTS`.
const TX_PORTS: u32 = 1024;
const RDONLY_PROG: u32 = 1 << 7;

impl Pins {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), set: IN_FORCE }
    }

    /// The same with the maps beside those in force.
    pub(super) fn beside(&self) -> Self {
        Self { root: self.root.clone(), set: BESIDE }
    }

    pub(super) fn program(&self) -> PathBuf {
        self.root.join("ingress")
    }

    /// Directory of what that program goes on with, and others that are attached, by their ids.
    pub(super) fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }

    pub(super) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(super) fn link(&self, interface: &str) -> PathBuf {
        self.links().join(interface)
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.root.join(self.set)
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Checks that pins can be made, mounting the BPF file system in its usual place
    /// where it is missing. Returns the part of the path that exists.
    pub(super) fn ready(&self) -> Result<&Path, Error> {
        let mut existing = self.existing()?;
        if !self.on_bpffs(existing)? && self.in_usual_place() {
            mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
                .map_err(|e| self.unusable(format!("mounting {BPFFS} failed: {e}"), Some(e)))?;
            tracing::info!("a BPF file system was missing at {BPFFS} and has been mounted");
            // What was below it, if anything, is hidden now.
            existing = self.existing()?;
        }
        if !self.on_bpffs(existing)? {
            return Err(self.unusable("it is not on a BPF file system", None));
        }
        eaccess(existing, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|e| {
            self.unusable(format!("{} can't be written to: {e}", existing.display()), Some(e))
        })?;
        Ok(existing)
    }

    /// Whether the path lies where the BPF file system usually is.
    pub(super) fn in_usual_place(&self) -> bool {
        self.root.starts_with(BPFFS)
    }

    /// The longest part of the path that exists; a directory.
    pub(super) fn existing(&self) -> Result<&Path, Error> {
        let existing = self
            .root
            .ancestors()
            .find(|p| p.exists())
            .ok_or_else(|| self.unusable("no part of the path exists", None))?;
        if !existing.is_dir() {
            let reason = format!("{} is not a directory", existing.display());
            return Err(self.unusable(reason, None));
        }
        Ok(existing)
    }

    /// Whether `path` lies on a BPF file system.
    pub(super) fn on_bpffs(&self, path: &Path) -> Result<bool, Error> {
        let found = statfs(path).map_err(|e| {
            self.unusable(format!("{} can't be looked at: {e}", path.display()), Some(e))
        })?;
        Ok(found.filesystem_type().0 as i64 == BPF_FS_MAGIC)
    }

    fn unusable(&self, reason: impl Into<String>, errno: Option<Errno>) -> Error {
        let denied = matches!(errno, Some(Errno::EPERM | Errno::EACCES));
        Error::Bpffs { path: self.root.clone(), reason: reason.into(), denied }
    }

    /// Makes the directories, where they can be made.
    pub(super) fn prepare(&self) -> Result<Made, Error> {
        let existing = self.ready()?;
        let mut made = Made::default();
        let mut missing: Vec<&Path> =
            self.root.ancestors().take_while(|path| *path != existing).collect();
        missing.reverse();
        let (links, maps) = (self.links(), self.maps());
        missing.extend([links.as_path(), maps.as_path()]);
        for path in missing {
            // Whatever the umask: whoever may write here, steers.
            match fs::DirBuilder::new().mode(0o755).create(path) {
                Ok(()) => made.0.push(path.to_owned()),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => {
                    let errno = e.raw_os_error().map(Errno::from_raw);
                    let reason = format!("making {} failed: {e}", path.display());
                    made.undo();
                    return Err(self.unusable(reason, errno));
                }
            }
        }
        Ok(made)
    }

    /// What stands here, and whether it can be gone on with.
    ///
    /// # Errors
    /// When it is neither what this build would make nor of an older layout: it is never
    /// reinterpreted.
    pub(super) fn found(&self, layouts: &[Layout]) -> Result<Found, Error> {
        let present: Vec<_> = layouts.iter().filter(|l| self.map(l.name).exists()).collect();
        let there = names(&self.maps())?;
        if there.is_empty() {
            return Ok(match names(&self.links())?.is_empty() {
                true => Found::Nothing,
                false => Found::Unreadable("the pins of the maps are gone".to_owned()),
            });
        }
        let Some(version) = self.version()? else {
            return Err(self.foreign("META is missing, which says what the others are"));
        };
        if version > abi::ABI_VERSION {
            return Err(Error::NewerLayout { path: self.maps(), found: version });
        }
        let older = match version == abi::ABI_VERSION {
            true => None,
            false => match older::known(version) {
                None => {
                    return Ok(Found::Unreadable(format!(
                        "they are of layout {version}, which this release does not read"
                    )));
                }
                known => known,
            },
        };
        if older.is_none() {
            if let Some(missing) = layouts.iter().find(|l| !self.map(l.name).exists()) {
                return Err(self.foreign(&format!("{} is missing", missing.name)));
            }
            let ours = |name: &String| layouts.iter().any(|l| l.name == name);
            if let Some(strange) = there.iter().find(|name| !ours(name) && *name != UNFINISHED) {
                return Err(self.foreign(&format!("{strange} is no map of the agent's")));
            }
        }
        let mut differing = Vec::new();
        for layout in &present {
            let wanted = older.map_or_else(|| (*layout).clone(), |older| older.layout(layout));
            let found = self.shaped(&wanted)?;
            let converted = older.is_some_and(|older| older.converts(layout.name));
            if found.max_entries() != layout.entries || converted {
                differing.push(layout.name);
            }
        }
        if older.is_some() {
            // It says which layout this is.
            differing.push("META");
            differing
                .extend(layouts.iter().map(|l| l.name).filter(|name| !self.map(name).exists()));
        }
        match differing.is_empty() {
            true => Ok(Found::Fitting),
            false => Ok(Found::Readable(Readable { older, differing })),
        }
    }

    /// The layout that the maps say they are of; `None` where they don't.
    pub(super) fn version(&self) -> Result<Option<u32>, Error> {
        let path = self.map("META");
        if !path.exists() {
            return Ok(None);
        }
        let info = self.info("META")?;
        let shape = (info.map_type().ok(), info.key_size(), info.value_size() as usize);
        if shape != (Some(MapType::Array), 4, size_of::<abi::Meta>()) {
            return Err(self.foreign("META is another program's"));
        }
        let meta: Array<_, pod::Meta> = Map::Array(MapData::from_pin(path)?).try_into()?;
        Ok(Some(meta.get(&0, 0)?.0.abi_version))
    }

    /// What the kernel says of a pinned map.
    pub(super) fn info(&self, name: &str) -> Result<MapInfo, Error> {
        MapInfo::from_pin(self.map(name)).map_err(|error| {
            let text = error.to_string();
            match Error::from(error) {
                denied @ Error::NotPermitted(_) => denied,
                _ => self.foreign(&format!("{name} can't be opened as a map: {text}")),
            }
        })
    }

    /// What the kernel says of the pinned map of a layout, whatever its size.
    fn shaped(&self, layout: &Layout) -> Result<MapInfo, Error> {
        let found = self.info(layout.name)?;
        let shape = (
            found.map_type().ok(),
            found.key_size() as usize,
            found.value_size() as usize,
            found.map_flags(),
        );
        let expected = (Some(layout.kind), layout.key_bytes, layout.value_bytes, layout.flags);
        if shape != expected {
            return Err(self.foreign(&format!(
                "{} has type, key size, value size and flags {shape:?}, and should have {expected:?}",
                layout.name
            )));
        }
        Ok(found)
    }

    /// That the pinned maps are laid out as this build does it, whatever their sizes. Returns
    /// these, in bytes of all values together.
    ///
    /// # Errors
    /// When they are not.
    pub(super) fn understood(&self) -> Result<Vec<(&'static str, usize)>, Error> {
        match self.version()? {
            Some(abi::ABI_VERSION) => {}
            Some(other) => {
                return Err(self.foreign(&format!(
                    "their layout is version {other}, this release's is {}",
                    abi::ABI_VERSION
                )));
            }
            None => return Err(self.foreign("META is missing, which says what the others are")),
        }
        let size = |layout: &Layout| {
            let info = self.shaped(layout)?;
            Ok((layout.name, info.max_entries() as usize * layout.value_bytes))
        };
        // Sizes are not looked at.
        let any = Capacity { services: 1, vips: 1, backends: 1, buckets: 1, flows: 1, samples: 1 };
        layouts_of(&any).iter().map(size).collect()
    }

    pub(super) fn foreign(&self, what: &str) -> Error {
        Error::ForeignPins { path: self.maps(), what: what.to_owned() }
    }

    /// What is left to be done, if an earlier agent was ended after a switch to other maps.
    pub(super) fn unfinished(&self) -> Option<After> {
        let target = fs::read_link(self.maps().join(UNFINISHED)).ok()?;
        Some(if target == carry_over() { After::CarryOver } else { After::Forget })
    }

    /// Removes maps beside those in force that an earlier agent has not got ready.
    pub(super) fn discard(&self) -> io::Result<()> {
        match self.unfinished() {
            Some(_) => Ok(()),
            None => remove_set(&self.root.join(BESIDE)),
        }
    }

    /// Makes the directory beside the maps in force, with those of them that go on as they are.
    pub(super) fn begin(&self, shared: impl Iterator<Item = &'static str>) -> Result<(), Error> {
        self.discard()?;
        let beside = self.beside();
        fs::DirBuilder::new().mode(0o755).create(beside.maps())?;
        for name in shared {
            fs::hard_link(self.map(name), beside.map(name))?;
        }
        Ok(())
    }

    /// Lets the maps beside those in force take their place, at once. The earlier ones stand
    /// beside them then, until [`finish`](Self::finish).
    pub(super) fn switch(&self, after: After) -> Result<(), Error> {
        let (here, there) = (self.maps(), self.beside().maps());
        let mark = match after {
            After::CarryOver => carry_over(),
            After::Forget => PathBuf::from("/dev/null"),
        };
        std::os::unix::fs::symlink(mark, there.join(UNFINISHED))?;
        // Kernel 5.16, commit 3871cb8cf741.
        renameat_with(CWD, &here, CWD, &there, RenameFlags::EXCHANGE).map_err(io::Error::from)?;
        Ok(())
    }

    /// Removes what stands beside the maps in force after a switch.
    pub(super) fn finish(&self) -> io::Result<()> {
        remove_set(&self.root.join(BESIDE))?;
        Failpoint::EarlierRemoved.pass();
        match fs::remove_file(self.maps().join(UNFINISHED)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// What an unfinished switch is marked with, if flows may have to be carried over.
fn carry_over() -> PathBuf {
    Path::new("..").join(BESIDE)
}

/// Names in a directory; none if it is not there.
pub(super) fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// Removes a directory of maps, if it is there.
fn remove_set(directory: &Path) -> io::Result<()> {
    for (at, name) in names(directory)?.iter().enumerate() {
        if at == 1 {
            Failpoint::EarlierHalfRemoved.pass();
        }
        fs::remove_file(directory.join(name))?;
    }
    match fs::remove_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Directories that were made, in order.
#[derive(Debug, Default)]
#[must_use = "they stay when nothing comes of it"]
pub struct Made(Vec<PathBuf>);

impl Made {
    /// Removes those that nothing was put into.
    pub fn undo(self) {
        for path in self.0.iter().rev() {
            // In use by now: that is what it was made for.
            let _ = fs::remove_dir(path);
        }
    }
}

/// Removes every pin below `root`, links first, and then the directories.
///
/// # Errors
/// When a pin can't be removed; those before it are gone.
pub(super) fn remove_all(root: &Path) -> io::Result<usize> {
    let pins = Pins::new(root);
    let mut removed = 0;
    for directory in
        [pins.links(), pins.programs(), pins.maps(), pins.beside().maps(), root.to_owned()]
    {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        for entry in entries {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                if directory == pins.links() {
                    links::unpin(&entry.path())?;
                } else {
                    fs::remove_file(entry.path())?;
                }
                removed += 1;
            }
        }
        match fs::remove_dir(&directory) {
            Err(e) if e.kind() != io::ErrorKind::DirectoryNotEmpty => return Err(e),
            _ => {}
        }
    }
    Ok(removed)
}
