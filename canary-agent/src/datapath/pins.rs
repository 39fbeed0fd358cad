//! Where programs, links and maps are pinned, and what stands there already.

use std::{
    fs, io,
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

use super::{Error, Options, links, pod};

/// The default mount point of the BPF file system.
const BPFFS: &str = "/sys/fs/bpf";
/// `f_type` of a BPF file system (`BPF_FS_MAGIC`, linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Paths below `agent.bpffs`.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
}

/// A map as this build makes it.
pub(super) struct Layout {
    /// Name of the map and of its pin.
    pub(super) name: &'static str,
    kind: MapType,
    key_bytes: usize,
    value_bytes: usize,
    flags: u32,
    /// Elements.
    pub(super) entries: u32,
}

const MMAPABLE: u32 = 1 << 10;

/// Every map that is pinned, in the sizes that `options` ask for.
pub(super) fn layouts(options: &Options) -> Vec<Layout> {
    let c = &options.capacity;
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
        layout("REASONS", MapType::PerCpuArray, 4, 8, 0, abi::REASON_SLOTS),
        // The kernel sets BPF_F_RDONLY_PROG on device maps by itself.
        layout("TX_PORTS", MapType::DevMapHash, 4, 8, RDONLY_PROG, TX_PORTS),
    ]
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
/// address finds one of its two slots.
pub(super) const fn vip_slots(vips: u32) -> u32 {
    let slots = vips.saturating_mul(4).next_power_of_two();
    if slots < MAX_VIP_SLOTS { slots } else { MAX_VIP_SLOTS }
}

/// As many as [`canary_ebpf_common::vips::slots`] can tell apart.
const MAX_VIP_SLOTS: u32 = 1 << 20;

/// Elements of `TX_PORTS`.
const TX_PORTS: u32 = 1024;
const RDONLY_PROG: u32 = 1 << 7;

impl Pins {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub(super) fn program(&self) -> PathBuf {
        self.root.join("ingress")
    }

    pub(super) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(super) fn link(&self, interface: &str) -> PathBuf {
        self.links().join(interface)
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Checks that pins can be made, mounting the BPF file system in its usual place
    /// where it is missing. Returns the part of the path that exists.
    pub(super) fn ready(&self) -> Result<&Path, Error> {
        let mut existing = self.existing()?;
        if !self.on_bpffs(existing)? && self.root.starts_with(BPFFS) {
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

    /// The longest part of the path that exists; a directory.
    fn existing(&self) -> Result<&Path, Error> {
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
    fn on_bpffs(&self, path: &Path) -> Result<bool, Error> {
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
            match fs::create_dir(path) {
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

    /// Maps whose pins are there.
    pub(super) fn present(&self, layouts: &[Layout]) -> Vec<&'static str> {
        layouts.iter().map(|l| l.name).filter(|name| self.map(name).exists()).collect()
    }

    /// Removes the pins of all maps but those of these names.
    pub(super) fn remove_but(&self, keep: &[&str]) {
        for entry in fs::read_dir(self.maps()).into_iter().flatten().flatten() {
            if !keep.iter().any(|name| entry.file_name() == *name) {
                // What can't be removed is found, and refused or used, by the next start.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Whether maps of an earlier agent stand here.
    ///
    /// # Errors
    /// When they are not what this build would make: they are never reinterpreted.
    pub(super) fn adoptable(&self, layouts: &[Layout]) -> Result<bool, Error> {
        let present: Vec<_> = layouts.iter().filter(|l| self.map(l.name).exists()).collect();
        if present.is_empty() {
            return Ok(false);
        }
        let differs = |what: String| Error::ForeignPins { path: self.maps(), what };
        for layout in &present {
            let path = self.map(layout.name);
            let info = MapInfo::from_pin(&path)
                .map_err(|e| differs(format!("{} can't be opened: {e}", layout.name)))?;
            let found = (
                info.map_type().ok(),
                info.key_size() as usize,
                info.value_size() as usize,
                info.map_flags(),
            );
            let wanted = (Some(layout.kind), layout.key_bytes, layout.value_bytes, layout.flags);
            if found != wanted {
                return Err(differs(format!(
                    "{} has type, key size, value size and flags {found:?}, this build's has {wanted:?}",
                    layout.name
                )));
            }
            if info.max_entries() != layout.entries {
                return Err(Error::CapacityChanged {
                    map: layout.name,
                    pinned: info.max_entries(),
                    configured: layout.entries,
                });
            }
        }
        let Some(meta) = present.iter().find(|l| l.name == "META") else {
            return Err(differs("META is missing".to_owned()));
        };
        let data = MapData::from_pin(self.map(meta.name))?;
        let meta: Array<_, pod::Meta> = Map::Array(data).try_into()?;
        let version = meta.get(&0, 0)?.0.abi_version;
        // 0: the agent that made them was stopped before it had written anything.
        if version != abi::ABI_VERSION && version != 0 {
            return Err(differs(format!(
                "their layout is version {version}, this build's is {}",
                abi::ABI_VERSION
            )));
        }
        Ok(version != 0)
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
    for directory in [pins.links(), pins.maps(), root.to_owned()] {
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
