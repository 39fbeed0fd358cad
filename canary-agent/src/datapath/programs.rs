//! The programs: loading them over a set of maps, and keeping what the attached ones go on with.

use std::{collections::BTreeSet, fs, io, os::unix::fs::DirBuilderExt as _, path::PathBuf};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapError, ProgramArray},
    programs::{ProgramError, Xdp},
};

use super::{
    Error, Options, links,
    pins::{self, Layout, Pins},
};

/// The programs, as the build made them.
pub(super) static INGRESS: &[u8] = aya::include_bytes_aligned!(env!("CANARY_EBPF_INGRESS"));

/// The program that is attached.
pub(super) const INGRESS_PROGRAM: &str = "ingress";
/// The programs that go on with what it does not know at sight, in the order of their places in
/// `PROGRAMS`.
pub(super) const RARE_PROGRAMS: [&str; 11] = [
    "arrival", "steer_v4", "steer_v6", "fragment", "tag", "icmp_v4", "icmp_v6", "watch_v4",
    "watch_v6", "wrap", "tell",
];
/// The map that they are in. Each set of programs has one of its own, since they go on with maps of
/// their own.
const PROGRAMS_MAP: &str = "PROGRAMS";
/// What was looked up of clients a moment ago.
///
/// Each set of programs has maps of its own for it: a new one looks everybody up again.
struct Recent {
    map: &'static str,
    /// Where programs find the number of one CPU's elements less one.
    mask: &'static str,
    /// Elements, all CPUs' together; 64 bytes each.
    elements: u32,
    /// Least and most of one CPU's.
    least: u32,
    most: u32,
}

/// 1, 2 and 1/8 MB.
const RECENT: [Recent; 3] = [
    Recent {
        map: "RECENT_V4",
        mask: "RECENT_V4_MASK",
        elements: 1 << 14,
        least: 1 << 9,
        most: 1 << 13,
    },
    Recent {
        map: "RECENT_V6",
        mask: "RECENT_V6_MASK",
        elements: 1 << 15,
        least: 1 << 10,
        most: 1 << 14,
    },
    Recent {
        map: "RECENT_TABLES",
        mask: "RECENT_TABLES_MASK",
        elements: 1 << 11,
        least: 1 << 6,
        most: 1 << 8,
    },
];

impl Recent {
    /// Elements of one of so many CPUs: a power of two.
    fn of_cpu(&self, cpus: u32) -> u32 {
        (1 << (self.elements / cpus).max(1).ilog2()).clamp(self.least, self.most)
    }
}

/// The programs that take flow entries away.
pub(super) const FORGET_V4: &str = "forget_v4";
pub(super) const FORGET_V6: &str = "forget_v6";
/// The programs that look again at watched connections.
pub(super) const JUDGE_V4: &str = "judge_v4";
pub(super) const JUDGE_V6: &str = "judge_v6";

/// Loads the programs over the maps that are pinned at the paths of `map`, making those that are
/// missing in the sizes of `layouts`; with `other`, programs that look for flows there too.
pub(super) fn load(
    options: &Options,
    layouts: &[Layout],
    map: impl Fn(&str) -> PathBuf,
    other: Option<[PathBuf; 2]>,
) -> Result<Ebpf, Error> {
    let entries = |name: &str| layouts.iter().find(|l| l.name == name).map_or(1, |l| l.entries);
    let (first, count) = options.nat_ports.as_ref().map_or((0_u16, 0_u16), |r| {
        (*r.start(), r.end().saturating_sub(*r.start()).saturating_add(1))
    });
    let vip_mask = entries("VIPS_V4") - 1;
    let cpus = pins::cpus();
    let spare_mask = (entries("SPARE_V4") / cpus).max(1) - 1;
    let recent_masks = RECENT.each_ref().map(|recent| recent.of_cpu(cpus) - 1);
    let handing_over = u32::from(other.is_some());
    let watching = u32::from(options.capacity.samples > 0);
    let mut loader = EbpfLoader::new();
    for layout in layouts {
        loader
            .map_max_entries(layout.name, layout.entries)
            .map_pin_path(layout.name, map(layout.name));
    }
    if let Some([v4, v6]) = other {
        loader.map_pin_path("OTHER_FLOWS_V4", v4).map_pin_path("OTHER_FLOWS_V6", v6);
    }
    for (recent, mask) in RECENT.iter().zip(&recent_masks) {
        loader.map_max_entries(recent.map, (mask + 1) * cpus).override_global(
            recent.mask,
            mask,
            true,
        );
    }
    loader
        .override_global("VIP_MASK", &vip_mask, true)
        .override_global("SPARE_MASK", &spare_mask, true)
        .override_global("CPUS", &cpus, true)
        .override_global("HANDING_OVER", &handing_over, true)
        .override_global("WATCHING", &watching, true)
        .override_global("NAT_PORT_FIRST", &first, true)
        .override_global("NAT_PORT_COUNT", &count, true);
    let mut ebpf = loader.load(INGRESS)?;
    let rare: &[&str] = if options.rare { &RARE_PROGRAMS } else { &[] };
    for program in [INGRESS_PROGRAM, FORGET_V4, FORGET_V6, JUDGE_V4, JUDGE_V6].iter().chain(rare) {
        verify(xdp(&mut ebpf, program)?)?;
    }
    for (place, name) in rare.iter().enumerate() {
        let program = xdp(&mut ebpf, name)?.fd()?.try_clone()?;
        let map = ebpf
            .map_mut(PROGRAMS_MAP)
            .ok_or(MapError::InvalidName { name: PROGRAMS_MAP.to_owned() })?;
        ProgramArray::try_from(map)?.set(place as u32, &program, 0)?;
    }
    Ok(ebpf)
}

pub(super) fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, Error> {
    let program = ebpf.program_mut(name).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("the object holds no program `{name}`"))
    })?;
    Ok(program.try_into()?)
}

/// How often the kernel is asked to take a program while it is interrupted, as libbpf asks.
const ATTEMPTS: usize = 5;

/// Has the kernel verify and compile a program. A signal for the process meanwhile, or that it is
/// stopped and goes on, ends that early with `EAGAIN` (commit c3494801cd17), which says nothing about the program.
pub(super) fn verify(program: &mut Xdp) -> Result<(), ProgramError> {
    let mut attempts = 1;
    loop {
        match program.load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.kind() == io::ErrorKind::WouldBlock && attempts < ATTEMPTS =>
            {
                attempts += 1;
            }
            done => return done,
        }
    }
}

/// Keeps what `ingress` goes on with as long as it is attached, whether or not an agent runs: the
/// kernel empties `PROGRAMS` when neither a pin nor a descriptor holds it any more. Call it before
/// `ingress` is attached anywhere.
pub(super) fn keep(ebpf: &mut Ebpf, pins: &Pins) -> Result<(), Error> {
    let id = xdp(ebpf, INGRESS_PROGRAM)?.info()?.id();
    let path = pins.programs().join(id.to_string());
    if path.exists() {
        return Ok(());
    }
    let Some(Map::ProgramArray(map)) = ebpf.map(PROGRAMS_MAP) else {
        return Err(Error::from(MapError::InvalidName { name: PROGRAMS_MAP.to_owned() }));
    };
    match fs::DirBuilder::new().mode(0o755).create(pins.programs()) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e.into()),
        _ => {}
    }
    map.pin(&path).map_err(|e| Error::Bpffs { path, reason: e.to_string(), denied: false })
}

/// Lets go of what programs go on with that no pinned link holds any more.
pub(super) fn tidy(pins: &Pins) -> Result<(), Error> {
    let mut attached = BTreeSet::new();
    for name in pins::names(&pins.links())? {
        match links::pinned(&pins.link(&name)) {
            Ok(held) => attached.extend(held.map(|held| held.program.to_string())),
            // It may hold any of them.
            Err(_) => return Ok(()),
        }
    }
    for name in pins::names(&pins.programs())? {
        if !attached.contains(&name) {
            fs::remove_file(pins.programs().join(name))?;
        }
    }
    Ok(())
}
