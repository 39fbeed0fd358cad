//! Other maps in the place of those that are pinned, under traffic: another capacity, or an
//! older layout that this release reads.
//!
//! The new maps are made and filled beside the old ones, those that can stay are shared, and
//! then the program over them takes its place on one interface after the other. Both steer at
//! the same time for a moment: by the same tables, so that they decide the same, and with the
//! same flows. Where the flow tables stay, they share them. Where those change too, it takes
//! programs that look into both pairs:
//!
//! | on all interfaces, one after the other | stores in | finds in |
//! | --- | --- | --- |
//! | the earlier program | old | old |
//! | the first of both | old | old, then new |
//! | the second of both | new | new, then old |
//! | the program that stays, when all is copied | new | new |
//!
//! Of two programs that follow on each other, each finds what the other stores. Flows are
//! copied when nobody stores any in the old tables. What is pinned changes its place, at once,
//! before the first flow is stored in the new ones: whoever is killed leaves either maps beside
//! those in force that nothing depends on, or a switch that the next start completes.

use std::{io, path::PathBuf};

use aya::{
    Ebpf,
    maps::MapData,
    programs::links::{FdLink, PinnedLink},
    programs::xdp::XdpLink,
};
use canary_ebpf_common::abi::{self, PAGE_BUCKETS};

use super::{
    Error, Options,
    flows::FlowTable,
    mapping::Mapping,
    older::{Carry, Older},
    panic,
    pins::{self, After, Layout, Pins, Readable},
    pod,
    programs::{self, INGRESS_PROGRAM, xdp},
    raw::RawMap,
    vips::{VipTable, Vips},
};
use crate::failpoint::Failpoint;

/// The flow tables, which programs of both sets of maps use at the same time.
const FLOWS: [&str; 2] = ["FLOWS_V4", "FLOWS_V6"];
/// What can't be carried over and need not: keys of flows that may go first when a table is full,
/// and the connections that are watched at this moment.
const BEGIN_EMPTY: [&str; 6] =
    ["SPARE_V4", "SPARE_V6", "SPARE_RINGS", "SAMPLES_V4", "SAMPLES_V6", "SIGNALS"];
/// Copied last, since they go on counting where they are.
const COUNTERS: [&str; 4] = ["BACKEND_COUNTERS", "FLOW_COUNTERS", "SIGNAL_COUNTERS", "REASONS"];

/// What has become of the maps that an earlier agent had pinned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handover {
    /// Why there are other maps now, in a sentence.
    pub why: String,
    /// What was kept.
    pub kept: String,
    /// What was not; empty where everything was.
    pub lost: String,
}

impl Handover {
    /// Nothing of the earlier maps was read.
    pub(super) fn from_the_store(why: &str) -> Self {
        Self {
            why: format!("new maps take the place of those that were pinned: {why}"),
            kept: "shares, owners and placements as they are stored, and connections of buckets \
                   that nothing has moved"
                .to_owned(),
            lost: "connections with an entry in a flow table (of moved buckets, and translated ones), \
                   the times of last moves, counters, and what backends were told if it is not stored"
                .to_owned(),
        }
    }

    /// Everything that this release knows of was carried over.
    pub(super) fn carried_over(found: &Readable, copied: Option<Copied>) -> Self {
        let Readable { older, differing } = found;
        let why = match older {
            Some(older) => format!(
                "maps of layout {} were carried over to {}",
                older.version(),
                abi::ABI_VERSION
            ),
            None => format!("maps of another capacity were made: {}", differing.join(", ")),
        };
        let lost = |older: &Older| {
            // Of what begins empty in any other map nothing is said.
            let said = differing.iter().filter(|name| !BEGIN_EMPTY.contains(name));
            let lost = said.filter(|name| matches!(older.carry(name), Carry::Not));
            lost.copied().collect::<Vec<_>>().join(", ")
        };
        Self {
            why,
            kept: "open connections, tracked buckets, counters".to_owned() + &of(copied),
            lost: [older.map(lost).unwrap_or_default(), without_room(copied)]
                .into_iter()
                .filter(|lost| !lost.is_empty())
                .collect::<Vec<_>>()
                .join("; "),
        }
    }

    /// What an earlier agent had begun was completed.
    pub(super) fn completed(copied: Copied) -> Self {
        Self {
            why: "a switch to other maps was completed, in which an earlier agent was ended"
                .to_owned(),
            kept: "everything that had been carried over".to_owned() + &of(Some(copied)),
            lost: without_room(Some(copied)),
        }
    }
}

fn of(copied: Option<Copied>) -> String {
    let flows = copied.map_or(0, |copied| copied.flows);
    if flows == 0 { String::new() } else { format!(" ({flows} flow entries copied)") }
}

fn without_room(copied: Option<Copied>) -> String {
    match copied.map_or(0, |copied| copied.no_room) {
        0 => String::new(),
        flows => format!("{flows} flow entries, for which the new table has no room"),
    }
}

/// Whether flows have to be copied from one pair of tables to another.
pub(super) fn moves_flows(found: &Readable) -> bool {
    let kept =
        |name: &str| found.older.is_none_or(|older| matches!(older.carry(name), Carry::AsTheyAre));
    FLOWS.iter().any(|name| found.differs(name)) && FLOWS.iter().all(|name| kept(name))
}

impl std::fmt::Display for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { why, kept, lost } = self;
        write!(f, "{why}; kept: {kept}")?;
        if !lost.is_empty() {
            write!(f, "; not kept: {lost}")?;
        }
        Ok(())
    }
}

/// Flow entries that were copied, and those that found no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) flows: u64,
    pub(super) no_room: u64,
}

/// Puts maps as this build makes them in the place of those in force, and says what was copied.
/// Programs that look into both pairs of flow tables are attached then, if those have changed.
pub(super) fn with_flows(
    options: &Options,
    pins: &Pins,
    layouts: &[Layout],
    found: &Readable,
    seen: &mut u64,
) -> Result<Copied, Error> {
    let beside = pins.beside();
    let flow = |name: &str| FLOWS.contains(&name);
    let mut second = programs::load(options, layouts, |name| beside.map(name), Some(both(pins)))?;
    let mut first = programs::load(
        options,
        layouts,
        |name| if flow(name) { pins.map(name) } else { beside.map(name) },
        Some(both(&beside)),
    )?;
    Failpoint::BesideMade.pass();
    fill(pins, layouts, found)?;
    Failpoint::BesideFilled.pass();
    // Before anything is steered by them.
    panic::catch_up(pins, &beside, seen)?;
    relink(&mut first, pins, Failpoint::FirstLinkPrepared)?;
    Failpoint::LinksPrepared.pass();
    pins.switch(After::CarryOver)?;
    Failpoint::SetsSwitched.pass();
    relink(&mut second, pins, Failpoint::FirstLinkMoved)?;
    Failpoint::LinksMoved.pass();
    copy_flows(&pins.beside(), pins)
}

/// The flow tables of a set of maps.
fn both(pins: &Pins) -> [PathBuf; 2] {
    FLOWS.map(|name| pins.map(name))
}

/// Completes a switch in the middle of which an earlier agent was ended. Says what was copied, if
/// there was one; the program that stays has to be put on the interfaces then, and the pins of
/// the earlier maps removed.
pub(super) fn resume(options: &Options, pins: &Pins) -> Result<Option<Copied>, Error> {
    match pins.unfinished() {
        Some(After::CarryOver) => {}
        Some(After::Forget) => return Ok(Some(Copied::default())),
        None => {
            pins.discard()?;
            return Ok(None);
        }
    }
    let earlier = pins.beside();
    let separate = |name: &str| -> Result<bool, Error> {
        Ok(earlier.map(name).exists() && earlier.info(name)?.id() != pins.info(name)?.id())
    };
    let mut copied = Copied::default();
    if separate(FLOWS[0])? && separate(FLOWS[1])? {
        let same_layout = |name: &str| -> Result<bool, Error> {
            let (old, new) = (earlier.info(name)?, pins.info(name)?);
            Ok((old.key_size(), old.value_size()) == (new.key_size(), new.value_size()))
        };
        if pins.version()? != Some(abi::ABI_VERSION) || !same_layout(FLOWS[0])? {
            return Err(Error::HalfHandedOver { path: pins.maps() });
        }
        // In the sizes that they have: the configuration may have changed again meanwhile.
        let layouts = pinned(pins, &pins::layouts(options))?;
        let mut second =
            programs::load(options, &layouts, |name| pins.map(name), Some(both(&earlier)))?;
        relink(&mut second, pins, Failpoint::FirstLinkMoved)?;
        Failpoint::LinksMoved.pass();
        copied = copy_flows(&earlier, pins)?;
    }
    Ok(Some(copied))
}

/// `layouts` in the sizes that the pinned maps have.
pub(super) fn pinned(pins: &Pins, layouts: &[Layout]) -> Result<Vec<Layout>, Error> {
    let sized = |layout: &Layout| {
        Ok(Layout { entries: pins.info(layout.name)?.max_entries(), ..layout.clone() })
    };
    layouts.iter().map(sized).collect()
}

/// Puts the program on every interface that a pinned link holds, in the place of the one there.
pub(super) fn relink(ebpf: &mut Ebpf, pins: &Pins, first: Failpoint) -> Result<(), Error> {
    programs::keep(ebpf, pins)?;
    let program = xdp(ebpf, INGRESS_PROGRAM)?;
    for name in pins::names(&pins.links())? {
        let link = PinnedLink::from_pin(pins.link(&name)).map(FdLink::from);
        let Ok(link) = link.map_err(drop).and_then(|link| XdpLink::try_from(link).map_err(drop))
        else {
            // Whoever attaches to this interface next says what is wrong.
            continue;
        };
        match program.attach_to_link(link) {
            // Out of the program's keeping: the pin holds the link when the agent ends.
            Ok(id) => drop(program.take_link(id)?),
            // The interface is gone.
            Err(error) => {
                tracing::debug!(interface = name, %error, "the link is not used any more");
                continue;
            }
        }
        first.pass();
    }
    Ok(())
}

/// Waits until no program runs that was there before the call.
fn grace_period() -> bool {
    /// `MEMBARRIER_CMD_GLOBAL` (linux/membarrier.h): the kernel calls `synchronize_rcu`, and
    /// programs run in RCU's read-side critical sections.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) == 0 }
}

/// Copies flows that the new tables do not have. No program stores any in the old ones.
fn copy_flows(old: &Pins, new: &Pins) -> Result<Copied, Error> {
    let table = |pins: &Pins, name| MapData::from_pin(pins.map(name));
    let mut copied = Copied::default();
    // Where it can't be waited for programs that are just ending, another look does it.
    for _ in 0..if grace_period() { 1 } else { 2 } {
        copy::<pod::FlowKeyV4>(table(old, FLOWS[0])?, table(new, FLOWS[0])?, &mut copied)?;
        copy::<pod::FlowKeyV6>(table(old, FLOWS[1])?, table(new, FLOWS[1])?, &mut copied)?;
    }
    Failpoint::FlowsCopied.pass();
    Ok(copied)
}

fn copy<K: aya::Pod + PartialEq>(
    old: MapData,
    new: MapData,
    copied: &mut Copied,
) -> Result<(), Error> {
    let (old, mut new) = (FlowTable::<K>::new(old)?, FlowTable::<K>::new(new)?);
    let copied = std::cell::RefCell::new(copied);
    let carry = |key: K, flow| -> io::Result<()> {
        let mut copied = copied.borrow_mut();
        match new.insert_new(&key, &flow)? {
            Some(true) => copied.flows += 1,
            // A flow of this key has been stored since, or copied before.
            Some(false) => return Ok(()),
            None => {
                copied.no_room += 1;
                return Ok(());
            }
        }
        // Packets find the copy by now; what came since it was read is marked in the old entry.
        if let Some(now) = old.get(&key)
            && now != flow
            && new.get(&key) == Some(flow)
        {
            new.replace(&key, &now)?;
        }
        Ok(())
    };
    let batch_done = || {
        Failpoint::FlowsHalfCopied.pass();
        Ok(())
    };
    Ok(old.walk(carry, batch_done)?)
}

/// Fills the maps beside those in force from these.
pub(super) fn fill(pins: &Pins, layouts: &[Layout], found: &Readable) -> Result<(), Error> {
    let beside = pins.beside();
    let mut differing: Vec<&Layout> = layouts.iter().filter(|l| found.differs(l.name)).collect();
    differing.sort_by_key(|layout| COUNTERS.contains(&layout.name));
    for layout in differing {
        let name = layout.name;
        let carry = found.older.map_or(Carry::AsTheyAre, |older| older.carry(name));
        let begins_empty = name == "META" || FLOWS.contains(&name) || BEGIN_EMPTY.contains(&name);
        if begins_empty || matches!(carry, Carry::Not) || !pins.map(name).exists() {
            continue;
        }
        let old = RawMap::open(&pins.map(name))?;
        match name {
            "VIPS_V4" | "VIPS_V6" => {
                let mut vips = Vips::new();
                converted(&old, layout.value_bytes, carry, |_, slot| {
                    vips.extend(super::vips::in_slot(slot));
                    Ok(())
                })?;
                let data = MapData::from_pin(beside.map(name))?;
                let bytes = layout.entries as usize * layout.value_bytes;
                use std::os::fd::AsFd as _;
                let mapping = Mapping::new(data.fd().as_fd(), bytes).map_err(io::Error::from)?;
                let mut table = match name {
                    "VIPS_V4" => VipTable::v4(mapping),
                    _ => VipTable::v6(mapping),
                };
                table.store(&vips)?;
            }
            _ => {
                let new = RawMap::open(&beside.map(name))?;
                converted(&old, new.value_bytes, carry, |key, value| {
                    let index = <[u8; 4]>::try_from(key).map_or(u32::MAX, u32::from_ne_bytes);
                    let beyond =
                        layout.kind != aya::maps::MapType::DevMapHash && index >= new.entries;
                    // They begin with zeros; what is beyond the end is not in use.
                    if beyond || value.iter().all(|byte| *byte == 0) {
                        return Ok(());
                    }
                    Ok(new.set(key, value)?)
                })?;
            }
        }
    }
    Ok(())
}

/// Calls `each` with the keys of a map and what its values are in the present layout.
fn converted(
    old: &RawMap,
    value_bytes: usize,
    carry: Carry,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut converted = vec![0; value_bytes * old.cpus];
    old.each(|key, value| match carry {
        Carry::Converted(convert) => {
            let from = value.chunks_exact(old.value_bytes);
            for (from, to) in from.zip(converted.chunks_exact_mut(value_bytes)) {
                convert(from, to);
            }
            each(key, &converted)
        }
        Carry::AsTheyAre | Carry::Not => each(key, value),
    })
}

/// Refuses sizes that what is in the maps does not fit into.
pub(super) fn enough_room(pins: &Pins, layouts: &[Layout], found: &Readable) -> Result<(), Error> {
    let room = |name: &str| {
        layouts.iter().find(|l| l.name == name).map_or(0, |layout| u64::from(layout.entries))
    };
    let carry = |name| found.older.map_or(Carry::AsTheyAre, |older| older.carry(name));
    let (mut services, mut pages) = (0_u64, 0_u64);
    let info = RawMap::open(&pins.map("SERVICE_INFO"))?;
    converted(&info, size_of::<abi::ServiceInfo>(), carry("SERVICE_INFO"), |key, value| {
        // SAFETY: as long as a `ServiceInfo`, and every bit pattern is one: integers only.
        let info = unsafe { value.as_ptr().cast::<abi::ServiceInfo>().read_unaligned() };
        if info.name[0] != 0 {
            let id = <[u8; 4]>::try_from(key).map_or(0, u32::from_ne_bytes);
            services = services.max(u64::from(id) + 1);
            pages = pages.max(u64::from(info.first_page) + u64::from(info.buckets / PAGE_BUCKETS));
        }
        Ok(())
    })?;
    let mut backends = 0_u64;
    let records = RawMap::open(&pins.map("BACKENDS"))?;
    converted(&records, size_of::<abi::Backend>(), carry("BACKENDS"), |key, value| {
        if value.iter().any(|byte| *byte != 0) {
            backends = <[u8; 4]>::try_from(key).map_or(0, |key| u32::from_ne_bytes(key).into());
        }
        Ok(())
    })?;
    let mut flows = 0;
    if found.differs(FLOWS[0]) && matches!(carry(FLOWS[0]), Carry::AsTheyAre) {
        let table = |name| MapData::from_pin(pins.map(name));
        let v4 = FlowTable::<pod::FlowKeyV4>::new(table(FLOWS[0])?)?.count()?;
        flows = v4.max(FlowTable::<pod::FlowKeyV6>::new(table(FLOWS[1])?)?.count()?);
    }
    // In the maps there are two tables for a service, and two indices for a backend.
    for (key, map, used, needed) in [
        ("services", "SERVICE_INFO", services, services.div_ceil(2)),
        ("buckets", "TABLE", pages, pages * u64::from(PAGE_BUCKETS)),
        ("backends", "BACKENDS", backends + 1, backends.div_ceil(2)),
        ("flows", FLOWS[0], flows, flows),
    ] {
        if used > room(map) {
            return Err(Error::CapacityInUse { key, needed });
        }
    }
    Ok(())
}
