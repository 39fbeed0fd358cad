//! Looking at what the kernel offers and at what is pinned, without using either.
//!
//! For `doctor` and the start: nothing here makes, mounts or changes anything, but that the
//! probes load programs and make maps that are gone when they return.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    maps::{MapInfo, MapType},
    programs::{ProgramInfo, ProgramType, loaded_programs},
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use nix::unistd::{AccessFlags, eaccess};

use super::{
    Options, causes, handover,
    kernel::{self, Release},
    panic,
    pins::{self, Found, Pins},
    programs::INGRESS,
};
use crate::plan::PanicMark;

/// The place of the pins.
#[derive(Clone, Debug)]
pub struct PlaceSeen {
    /// `agent.bpffs`.
    pub path: PathBuf,
    /// The longest part of the path that exists.
    pub existing: Option<PathBuf>,
    /// Whether that lies on a BPF file system.
    pub on_bpffs: bool,
    /// Whether the agent mounts one there where it is missing.
    pub usual: bool,
    /// Whether this process may write there.
    pub writable: Result<(), String>,
}

/// What is pinned.
#[derive(Clone, Debug)]
pub struct PinsSeen {
    /// Number of maps.
    pub maps: usize,
    /// Interfaces with a pinned link.
    pub links: Vec<String>,
    /// Id of the pinned program, where this process may look.
    pub program: Option<u32>,
    /// Whether this build and configuration can take them over.
    pub adoptable: Adoptable,
    /// A pin or folder that somebody else than root and its owner may write to.
    pub open_to_others: Option<PathBuf>,
    /// What sent services to control, and no agent has made its own.
    pub panics: Vec<PanicMark>,
}

/// Whether pinned maps can be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adoptable {
    /// They can, or there are none.
    Yes,
    /// What is in them is carried over to others, of this build's layout and these sizes.
    CarriedOver,
    /// They are replaced by others that are made from the stored state, and why.
    Replaced(String),
    /// They can't, why, and what to do.
    No(String, Option<String>),
    /// This process may not look.
    Unknown(String),
}

/// The running kernel's release, and whether it is recent enough.
pub fn release() -> (String, bool) {
    let release = Release::running();
    (release.to_string(), release.recent_enough().is_ok())
}

/// The oldest kernel that will do.
pub const OLDEST: (u32, u32) = kernel::OLDEST;

/// Looks at the place of the pins.
pub fn place(bpffs: &Path) -> PlaceSeen {
    let pins = Pins::new(bpffs);
    let existing = pins.existing().ok().map(Path::to_owned);
    let writable = match &existing {
        Some(existing) => eaccess(existing, AccessFlags::W_OK | AccessFlags::X_OK)
            .map_err(|errno| format!("{}: {}", existing.display(), errno.desc())),
        None => Err("no part of the path is a directory".to_owned()),
    };
    PlaceSeen {
        path: bpffs.to_owned(),
        on_bpffs: existing.as_deref().is_some_and(|path| pins.on_bpffs(path).unwrap_or(false)),
        usual: pins.in_usual_place(),
        existing,
        writable,
    }
}

/// Looks at what is pinned, and holds it against what `options` would make.
pub fn pinned(options: &Options) -> PinsSeen {
    let pins = Pins::new(&options.bpffs);
    let layouts = pins::layouts(options);
    let present: Vec<_> =
        layouts.iter().map(|layout| layout.name).filter(|name| pins.map(name).exists()).collect();
    let names = |folder: PathBuf| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let mut links = names(pins.links());
    links.sort();
    let adoptable = match present.first() {
        None => Adoptable::Yes,
        Some(first) => match MapInfo::from_pin(pins.map(first)) {
            Err(error) if kernel::not_permitted(&error) => Adoptable::Unknown(causes(&error)),
            _ => {
                let found = pins.found(&layouts).and_then(|found| {
                    if let Found::Readable(readable) = &found {
                        handover::enough_room(&pins, &layouts, readable)?;
                    }
                    Ok(found)
                });
                match found {
                    Ok(Found::Nothing | Found::Fitting) => Adoptable::Yes,
                    Ok(Found::Readable(_)) => Adoptable::CarriedOver,
                    Ok(Found::Unreadable(why)) => Adoptable::Replaced(why),
                    Err(error) => Adoptable::No(error.to_string(), error.help()),
                }
            }
        },
    };
    PinsSeen {
        maps: present.len(),
        links,
        program: ProgramInfo::from_pin(pins.program()).ok().map(|program| program.id()),
        adoptable,
        open_to_others: open_to_others(&options.bpffs),
        panics: panic::waiting(&pins),
    }
}

/// The first of a folder and what is in it that its group or everybody may write to.
fn open_to_others(root: &Path) -> Option<PathBuf> {
    const OTHERS: u32 = 0o022;
    let open = |path: &Path| {
        fs::symlink_metadata(path).is_ok_and(|m| !m.is_symlink() && m.mode() & OTHERS != 0)
    };
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        if open(&folder) {
            return Some(folder);
        }
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                _ if open(&entry.path()) => return Some(entry.path()),
                _ => {}
            }
        }
    }
    None
}

/// What this kernel lacks of what the programs need, found out by trying.
///
/// # Errors
/// It can't be tried: the rights are missing, for instance.
pub fn lacks() -> Result<Vec<String>, String> {
    const MAPS: [(MapType, &str); 6] = [
        (MapType::Array, "array"),
        (MapType::PerCpuArray, "per-CPU array"),
        (MapType::Hash, "hash"),
        (MapType::LruHash, "LRU hash"),
        (MapType::ProgramArray, "program array"),
        (MapType::DevMapHash, "device hash"),
    ];
    const HELPERS: [(BpfHelper, &str); 8] = [
        (BpfHelper::BPF_FUNC_map_lookup_elem, "bpf_map_lookup_elem"),
        (BpfHelper::BPF_FUNC_map_update_elem, "bpf_map_update_elem"),
        (BpfHelper::BPF_FUNC_map_delete_elem, "bpf_map_delete_elem"),
        (BpfHelper::BPF_FUNC_tail_call, "bpf_tail_call"),
        (BpfHelper::BPF_FUNC_xdp_adjust_head, "bpf_xdp_adjust_head"),
        (BpfHelper::BPF_FUNC_redirect_map, "bpf_redirect_map"),
        (BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "bpf_ktime_get_coarse_ns"),
        (BpfHelper::BPF_FUNC_loop, "bpf_loop"),
    ];
    let mut lacks = Vec::new();
    if !is_program_supported(ProgramType::Xdp).map_err(|error| causes(&error))? {
        lacks.push("XDP programs".to_owned());
        return Ok(lacks);
    }
    for (kind, name) in MAPS {
        if !is_map_supported(kind).map_err(|error| causes(&error))? {
            lacks.push(format!("{name} maps"));
        }
    }
    for (helper, name) in HELPERS {
        if !is_helper_supported(ProgramType::Xdp, helper).map_err(|error| causes(&error))? {
            lacks.push(format!("the helper {name}"));
        }
    }
    Ok(lacks)
}

/// Names of loaded programs by id; those that this process may not look at are missing.
pub fn program_names(ids: &[u32]) -> Vec<(u32, String)> {
    if ids.is_empty() {
        return Vec::new();
    }
    let wanted = loaded_programs().flatten().filter(|program| ids.contains(&program.id()));
    wanted
        .map(|program| {
            let name = program.name_as_str().filter(|name| !name.is_empty());
            (program.id(), name.unwrap_or("unnamed").to_owned())
        })
        .collect()
}

/// Bytes of kernel memory that the maps take, about: keys, values, and for hash maps what
/// the kernel keeps with each element.
pub fn maps_bytes(options: &Options) -> u64 {
    pins::layouts(options).iter().map(pins::Layout::bytes).sum()
}

/// Whether the program takes frames that lie in several buffers (`xdp.frags`).
pub fn takes_parts() -> bool {
    const SECTION: &[u8] = b"xdp.frags";
    INGRESS.windows(SECTION.len()).any(|bytes| bytes == SECTION)
}
