//! Desired data plane → maps, links, pins.
//!
//! The only place that knows aya. Whatever is asked of it is brought about by
//! writing what differs, in an order in which no packet meets half a change.
//! It decides nothing: what should be in the maps comes from [`crate::plan`].

mod apply;
mod attach;
mod census;
mod classes;
mod decap;
mod directory;
pub mod flows;
mod handover;
mod kernel;
mod links;
mod look;
mod mapping;
mod older;
mod panic;
mod pins;
mod pod;
mod programs;
mod raw;
mod reader;
mod signals;
mod sweep;
mod vips;

use std::{
    collections::BTreeMap,
    fs, io,
    ops::RangeInclusive,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf, EbpfError,
    maps::{Array, Map, MapData, MapError},
    programs::{ProgramError, ProgramInfo, Xdp},
};
use canary_ebpf_common::abi::{self, ABI_VERSION, Backend, PAGE_BUCKETS};

pub use self::{
    apply::Applied,
    attach::{Attached, AttachedMode},
    census::{Census, Counted},
    decap::{Decap, DecapOptions, Unwrapped, Unwrapping, attached, stop_unwrapping, unwrapped},
    handover::Handover,
    look::{Adoptable, OLDEST, PinsSeen, PlaceSeen},
    look::{lacks, maps_bytes, pinned, place, program_names, release, takes_parts},
    panic::{Done, NotMoved, PanicOrder, Panicked, Pinned},
    pins::Made,
    reader::Reader,
    signals::{Place, Signals},
    sweep::{Sweeper, Swept},
};
use self::{
    apply::Maps,
    directory::{directory, table_of, unpadded},
    flows::FlowTable,
    kernel::{Refused, Release},
    mapping::{Mapping, Pages},
    panic::Marks,
    pins::{After, Found, Layout, Pins, Readable},
    programs::{FORGET_V4, FORGET_V6, INGRESS_PROGRAM, JUDGE_V4, JUDGE_V6, RARE_PROGRAMS, xdp},
    sweep::{Rules, SharedRules},
    vips::VipTable,
};
use crate::{
    config::model::{Capacity, XdpMode},
    failpoint::Failpoint,
    plan::{Adopted, DataPlane, InterfaceMacs, PanicMark},
};

/// So long somebody is waited for who writes tables behind our back.
const PANIC_PATIENCE: Duration = Duration::from_millis(500);
/// What the data plane is made for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the pins, on a BPF file system.
    pub bpffs: PathBuf,
    /// Sizes of the maps.
    pub capacity: Capacity,
    /// Source ports for translated flows; `None` where no service translates.
    pub nat_ports: Option<RangeInclusive<u16>>,
    /// How the program is attached.
    pub xdp_mode: XdpMode,
    /// Whether another XDP program on an interface gives way.
    pub replace: bool,
    /// Whether pinned maps that can't be gone on with give way to new ones, of which nothing
    /// is known but what the store says.
    pub rebuild: bool,
    /// Whether the programs are loaded that go on with what `ingress` does not know at sight. Tests
    /// of the maps do without on an emulated processor, which takes long to verify them.
    #[doc(hidden)]
    pub rare: bool,
}

/// Why the data plane could not be brought about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pins' directory can't be used.
    #[error("{path} can't hold pins: {reason}", path = path.display())]
    Bpffs {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
        /// Whether the caller lacks the rights.
        denied: bool,
    },
    /// The kernel is older than what the programs are made for.
    #[error(
        "this host runs Linux {0}, and {major}.{minor} or newer is needed",
        major = kernel::OLDEST.0, minor = kernel::OLDEST.1
    )]
    OldKernel(Release),
    /// The kernel did not take a map or a program.
    #[error("{0}")]
    Refused(Box<Refused>),
    /// The pinned maps are not what this build would make.
    #[error(
        "the maps pinned at {path} can't be gone on with: {what}; traffic goes on by the program that is \
         attached",
        path = path.display()
    )]
    ForeignPins {
        /// Directory of the maps.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A newer release has made the pinned maps.
    #[error(
        "the maps pinned at {path} are of a newer release (layout {found}, and this release reads up to \
         {ABI_VERSION}); traffic goes on by the program that is attached",
        path = path.display()
    )]
    NewerLayout {
        /// Directory of the maps.
        path: PathBuf,
        /// Their layout.
        found: u32,
    },
    /// Another release was ended while it put its maps in the place of others.
    #[error(
        "another release was ended while it put the maps at {path} in the place of others; traffic goes \
         on by what is attached",
        path = path.display()
    )]
    HalfHandedOver {
        /// Directory of the maps.
        path: PathBuf,
    },
    /// What is in the maps does not fit into the sizes that are asked for.
    #[error(
        "`agent.capacity.{key}` is too small for what is in the pinned maps, which takes {needed}; nothing \
         was changed, and traffic goes on"
    )]
    CapacityInUse {
        /// The key.
        key: &'static str,
        /// What it would have to be.
        needed: u64,
    },
    /// The interface is not there.
    #[error("interface {interface} does not exist")]
    NoInterface {
        /// Its name.
        interface: String,
    },
    /// Somebody else's program is on the interface.
    #[error(
        "interface {interface} has another XDP program on it: {name} (id {id}); `canary-agent run --replace` \
         takes its place"
    )]
    OtherProgram {
        /// The interface.
        interface: String,
        /// The program's id.
        id: u32,
        /// The program's name.
        name: String,
    },
    /// The program could not be attached.
    #[error("attaching to {interface} failed: {reason}")]
    Attach {
        /// The interface.
        interface: String,
        /// Why.
        reason: String,
    },
    /// The plan names something that the maps have no room for.
    #[error("{what} {index} is beyond the maps' capacity")]
    OutOfRange {
        /// Kind of thing.
        what: &'static str,
        /// Its number.
        index: u32,
    },
    /// An address found no slot.
    #[error("the table of virtual addresses is full: raise `agent.capacity.vips`")]
    VipsFull,
    /// The kernel may not be asked.
    #[error("loading BPF programs needs root or CAP_BPF and CAP_NET_ADMIN: {0}")]
    NotPermitted(String),
    /// Loading failed.
    #[error("loading the XDP program failed: {}", causes(.0))]
    Load(#[source] Box<EbpfError>),
    /// The kernel refused the program.
    #[error("the XDP program could not be used: {}", causes(.0))]
    Program(#[source] Box<ProgramError>),
    /// Tables were written behind our back, and have to be read anew.
    #[error("`canary-agent panic` writes the tables: they are read anew first")]
    Interrupted,
    /// A map could not be read or written.
    #[error("a BPF map could not be used: {}", causes(.0))]
    Map(#[source] Box<MapError>),
    /// Anything that the system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Error {
    /// Whether the caller lacks the rights.
    pub fn not_permitted(&self) -> bool {
        matches!(self, Self::NotPermitted(_) | Self::Bpffs { denied: true, .. })
    }

    /// Whether it is about the pinned maps, so that new ones could do without them.
    fn about_pinned_maps(&self) -> bool {
        matches!(
            self,
            Self::ForeignPins { .. }
                | Self::NewerLayout { .. }
                | Self::HalfHandedOver { .. }
                | Self::CapacityInUse { .. }
        )
    }

    /// The next step, where the message does not say it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::Bpffs { denied: true, .. } => {
                "run it as root; or, as root, `mount -t bpf bpf /sys/fs/bpf` and make the directory that \
                 `agent.bpffs` names the agent's own"
                    .to_owned()
            }
            Self::Bpffs { denied: false, .. } => {
                "mount a BPF file system (`mount -t bpf bpf /sys/fs/bpf`) and set `agent.bpffs` to a \
                 directory in it"
                    .to_owned()
            }
            Self::NotPermitted(_) => {
                "run it as root, or give it CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON".to_owned()
            }
            Self::OldKernel(_) => "boot a newer kernel; nothing was changed".to_owned(),
            Self::Refused(refused) => refused.help(),
            Self::NewerLayout { .. } => format!(
                "start the newer release again; or {REBUILD}, which is the way back to this one"
            ),
            Self::HalfHandedOver { .. } => {
                format!("start that release once more, which completes it; or {REBUILD}")
            }
            Self::CapacityInUse { key, needed } => {
                format!("set `agent.capacity.{key}` to {needed} or more; or {REBUILD}")
            }
            Self::ForeignPins { .. } => format!(
                "{REBUILD}; or run `canary-agent detach`, which removes them and ends steering until the \
                 next start"
            ),
            _ => return None,
        })
    }
}

/// The way out where pinned maps can't be gone on with.
const REBUILD: &str = "start once with `canary-agent run --rebuild`: it sets up new maps beside these, \
                       from the stored state, and switches to them under traffic (connections that \
                       have an entry in a flow table, which all translated ones have, are not kept)";

/// An error's causes in one line, without those that repeat what was said.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// The loaded program and its maps.
pub struct Datapath {
    options: Options,
    pins: Pins,
    ebpf: Ebpf,
    maps: Maps,
    rules: SharedRules,
    reader: Reader,
    applied: Option<DataPlane>,
    /// The maps take the place of those in force when they hold the first plan.
    staged: bool,
    handover: Option<Handover>,
}

impl Datapath {
    /// Loads the program over the pinned maps of an earlier agent, or over new ones.
    ///
    /// Maps of other sizes, or of an older layout that is read, are carried over to new ones
    /// first, under traffic. Otherwise nothing is attached yet, and the tables stay as they are
    /// until the first [`apply`](Self::apply).
    ///
    /// # Errors
    /// When the kernel is too old, the BPF file system can't be used, the pins can't be gone
    /// on with, the kernel refuses a map or the program, or the rights are missing. What was
    /// pinned on the way is gone then.
    pub fn open(options: Options) -> Result<(Self, Adopted), Error> {
        Release::running().recent_enough()?;
        let pins = Pins::new(&options.bpffs);
        let made = pins.prepare()?;
        Self::begin(options, &pins).inspect_err(|_| {
            // What can't be removed is found, and removed, by the next start.
            let _ = pins.discard();
            made.undo();
        })
    }

    fn begin(options: Options, pins: &Pins) -> Result<(Self, Adopted), Error> {
        let layouts = pins::layouts(&options);
        let gives_way = |error: &Error| options.rebuild && error.about_pinned_maps();
        let resumed = match handover::resume(&options, pins) {
            Err(error) if gives_way(&error) => Some(handover::Copied::default()),
            resumed => resumed?,
        };
        let found = pins.found(&layouts).and_then(|found| match found {
            Found::Readable(readable) => {
                handover::enough_room(pins, &layouts, &readable)?;
                Ok(Found::Readable(readable))
            }
            found => Ok(found),
        });
        let found = match found {
            Err(error) if gives_way(&error) => Found::Unreadable(error.to_string()),
            found => found?,
        };
        if resumed.is_some() && !matches!(found, Found::Fitting) {
            pins.finish()?;
        }
        match found {
            Found::Fitting => {
                let mut datapath = Self::load(options, pins)?;
                if let Some(copied) = resumed {
                    datapath.take_links()?;
                    pins.finish()?;
                    datapath.handover = Some(Handover::completed(copied));
                }
                let adopted = datapath.read()?;
                Ok((datapath, adopted))
            }
            Found::Nothing => {
                pins.begin([].into_iter())?;
                let mut datapath = Self::load(options, &pins.beside())?;
                pins.switch(After::Forget)?;
                pins.finish()?;
                datapath.pins = pins.clone();
                Ok((datapath, Adopted::default()))
            }
            Found::Readable(readable) => Self::carry_over(options, pins, &layouts, &readable),
            Found::Unreadable(why) => {
                pins.begin([].into_iter())?;
                let mut datapath = Self::load(options, &pins.beside())?;
                datapath.pins = pins.clone();
                datapath.staged = true;
                datapath.handover = Some(Handover::from_the_store(&why));
                Failpoint::BesideMade.pass();
                // Tables may be unreadable or too large, and what sent them to control be known.
                let panics = panic::waiting(pins);
                Ok((datapath, Adopted { panics, ..Adopted::default() }))
            }
        }
    }

    /// Carries what is in the pinned maps over to new ones, puts them in force, and opens them.
    fn carry_over(
        options: Options,
        pins: &Pins,
        layouts: &[Layout],
        found: &Readable,
    ) -> Result<(Self, Adopted), Error> {
        let began = std::time::Instant::now();
        // Whoever writes the earlier tables without an agent looks whether they are still in force.
        let held = panic::lock(pins, PANIC_PATIENCE)?;
        let mut seen = panic::count(pins);
        pins.begin(layouts.iter().map(|l| l.name).filter(|name| !found.differs(name)))?;
        let (mut datapath, copied) = if handover::moves_flows(found) {
            let copied = handover::with_flows(&options, pins, layouts, found, &mut seen)?;
            (Self::load(options, pins)?, Some(copied))
        } else {
            let mut datapath = Self::load(options, &pins.beside())?;
            Failpoint::BesideMade.pass();
            handover::fill(pins, layouts, found)?;
            Failpoint::BesideFilled.pass();
            panic::catch_up(pins, &pins.beside(), &mut seen)?;
            // All of it is there; what flows there are, both share.
            pins.switch(After::Forget)?;
            Failpoint::SetsSwitched.pass();
            datapath.pins = pins.clone();
            (datapath, None)
        };
        datapath.take_links()?;
        panic::catch_up(&pins.beside(), pins, &mut seen)?;
        pins.finish()?;
        datapath.handover = Some(Handover::carried_over(found, copied));
        // They were read before they were filled.
        datapath.maps.vips_v4.reread();
        datapath.maps.vips_v6.reread();
        let adopted = datapath.read()?;
        drop(held);
        tracing::info!(took = ?began.elapsed(), ?copied, "the maps have been carried over");
        Ok((datapath, adopted))
    }

    /// What the maps hold, and how often they had been written behind our back by then.
    fn read(&mut self) -> Result<Adopted, Error> {
        // Nobody writes them while they are read; and what comes later is counted.
        let _held = panic::lock(&self.pins, PANIC_PATIENCE)?;
        self.maps.known = self.maps.marks.count();
        read(&self.maps)
    }

    /// Puts the program on every interface that a pinned link holds.
    fn take_links(&mut self) -> Result<(), Error> {
        handover::relink(&mut self.ebpf, &self.pins, Failpoint::FirstLinkSwitched)?;
        Failpoint::LinksSwitched.pass();
        Ok(())
    }

    /// Loads the programs over the pinned maps, making those that are missing.
    fn load(options: Options, pins: &Pins) -> Result<Self, Error> {
        let layouts = pins::layouts(&options);
        let mut ebpf = programs::load(&options, &layouts, |name| pins.map(name), None)?;
        let maps = take_maps(&mut ebpf, &options)?;
        let mut meta: Array<_, pod::Meta> = take(&mut ebpf, "META")?.try_into()?;
        meta.set(0, pod::Meta(abi::Meta { abi_version: ABI_VERSION, pad: 0 }), 0)?;
        let reader = Reader::open(pins, &layouts)?;
        Ok(Self {
            rules: SharedRules::default(),
            options,
            pins: pins.clone(),
            ebpf,
            maps,
            reader,
            applied: None,
            staged: false,
            handover: None,
        })
    }

    /// What has become of the maps of an earlier agent, if they were not gone on with as they
    /// were.
    pub fn handover(&self) -> Option<&Handover> {
        self.handover.as_ref()
    }

    /// Removes what is left of the earlier maps after the program was attached over other ones.
    ///
    /// # Errors
    /// When the kernel refuses the program on an interface that it is on by a pinned link, or a
    /// pin can't be removed.
    pub fn finish(&mut self) -> Result<(), Error> {
        if self.pins.unfinished().is_some() {
            // Also on interfaces that the configuration does not name any more.
            self.take_links()?;
            self.pins.finish()?;
        }
        programs::tidy(&self.pins)
    }

    /// Attaches the program to an interface, or takes the place of an earlier
    /// agent's program there without a packet passing in between.
    ///
    /// # Errors
    /// When the interface is missing, another program is on it, or the driver refuses.
    pub fn attach(&mut self, interface: &str) -> Result<Attached, Error> {
        programs::keep(&mut self.ebpf, &self.pins)?;
        let program = xdp(&mut self.ebpf, INGRESS_PROGRAM)?;
        let Options { xdp_mode, replace, .. } = self.options;
        let attached = attach::attach(program, &self.pins, interface, xdp_mode, replace);
        let attached = attached.or_else(|error| programs::tidy(&self.pins).and(Err(error)))?;
        if self.handover.is_some() {
            Failpoint::FirstLinkSwitched.pass();
        }
        self.maps.allow_out(attached.ifindex)?;
        self.pin_program()?;
        Ok(attached)
    }

    /// Takes the program off an interface that it is not wanted on any more.
    ///
    /// # Errors
    /// When the link's pin can't be removed.
    pub fn detach_interface(&mut self, interface: &str) -> Result<(), Error> {
        Ok(links::unpin(&self.pins.link(interface))?)
    }

    /// Names of interfaces whose links are pinned.
    ///
    /// # Errors
    /// When the directory of the links can't be read.
    pub fn attached_interfaces(&self) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.pins.links())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Keeps the program that runs under its pin, in place of an earlier one.
    fn pin_program(&mut self) -> Result<(), Error> {
        let path = self.pins.program();
        let program = xdp(&mut self.ebpf, INGRESS_PROGRAM)?;
        if path.exists() {
            let pinned = ProgramInfo::from_pin(&path).map(|p| p.id()).ok();
            if pinned == Some(program.info()?.id()) {
                return Ok(());
            }
            fs::remove_file(&path)?;
        }
        program.pin(&path).map_err(|e| Error::Bpffs { path, reason: e.to_string(), denied: false })
    }

    /// Brings the maps to what is desired. Call it with the whole plan: what is
    /// not in it is taken away.
    ///
    /// # Errors
    /// When the plan exceeds the maps, or the kernel refuses a write. Calling it
    /// again with a plan that fits repairs what was left half done.
    pub fn apply(&mut self, desired: &DataPlane) -> Result<Applied, Error> {
        let before = self.applied.take();
        let applied = self.maps.apply(before.as_ref(), desired)?;
        if self.staged {
            Failpoint::BesideFilled.pass();
            // The store knows nothing yet of what was sent to control while no agent answered.
            let (held, mut seen) = (panic::lock(&self.pins, PANIC_PATIENCE)?, 0);
            panic::catch_up(&self.pins, &self.pins.beside(), &mut seen)?;
            self.pins.switch(After::Forget)?;
            self.staged = false;
            Failpoint::SetsSwitched.pass();
            panic::catch_up(&self.pins.beside(), &self.pins, &mut seen)?;
            drop(held);
        }
        self.applied = Some(desired.clone());
        self.reader.set_used(vec![
            ("SERVICE_INFO", desired.services.len() as u64),
            ("BACKENDS", desired.backends.len() as u64),
            ("TABLE", pages(desired)),
            ("LEDGER", pages(desired)),
        ]);
        if before.is_none_or(|b| !same_rules(&b, desired)) {
            self.set_rules(desired);
        }
        Ok(applied)
    }

    /// What has been sent to control behind our back since the last call, with the tables as
    /// they are by now; `None` for nothing.
    ///
    /// # Errors
    /// When the tables can't be read.
    pub fn panics(&mut self) -> Result<Option<Adopted>, Error> {
        if self.maps.marks.count() == self.maps.known {
            return Ok(None);
        }
        // Whoever writes at this moment is done in a few milliseconds.
        self.applied = None;
        self.read().map(Some)
    }

    /// These are stored, and need not be kept in the maps any more.
    pub fn panics_adopted(&self, marks: &[PanicMark]) {
        self.maps.marks.adopted(marks);
    }

    /// Marks tables as sent to control, before that is stored. Returns the marks.
    ///
    /// # Errors
    /// A table that the maps have no room for.
    pub fn mark_panic(&mut self, order: &PanicOrder) -> Result<Vec<PanicMark>, Error> {
        let mut tables: Vec<(u16, String)> = match &self.applied {
            Some(plane) => {
                plane.services.iter().map(|s| (s.record.id as u16, s.name.clone())).collect()
            }
            None => directory(&self.maps.info)?
                .iter()
                .map(|(id, info)| (*id, unpadded(&info.name)))
                .collect(),
        };
        tables.retain(|(_, name)| order.names(name));
        let ids: Vec<u16> = tables.iter().map(|(id, _)| *id).collect();
        let number = self.maps.marks.leave(order, &ids)?;
        // Unless somebody else has counted meanwhile: that is found out before the next word.
        if number == self.maps.known + 1 {
            self.maps.known = number;
        }
        Ok(self.maps.marks.all_waiting(tables.iter().map(|(id, name)| (*id, name.as_str()))))
    }

    /// Takes away the flow entries of buckets that the maps do not have tracked, by the services
    /// of a plan that is about to be applied. An agent that was killed may have left some.
    ///
    /// # Errors
    /// When the kernel refuses to walk the tables or to run the programs.
    pub fn clean(&mut self, desired: &DataPlane) -> Result<Swept, Error> {
        self.set_rules(desired);
        self.sweeper()?.pass(&[])
    }

    fn set_rules(&self, plane: &DataPlane) {
        let mut services = Vec::new();
        for service in &plane.services {
            let id = service.record.id as usize;
            if services.len() <= id {
                services.resize(id + 1, None);
            }
            services[id] = Some(service.record);
        }
        *self.rules.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(Rules { services, classes: plane.classes.clone() });
    }

    /// What looks after the flow tables, for another thread: it goes by the plan that was
    /// applied last.
    ///
    /// # Errors
    /// When the pinned tables can't be opened.
    pub fn sweeper(&mut self) -> Result<Sweeper, Error> {
        let pins = if self.staged { &self.pins.beside() } else { &self.pins };
        let map = |name| MapData::from_pin(pins.map(name));
        let tables = (FlowTable::new(map("FLOWS_V4")?)?, FlowTable::new(map("FLOWS_V6")?)?);
        let mut program = |name| -> Result<_, Error> {
            Ok(xdp(&mut self.ebpf, name)?.fd()?.as_fd().try_clone_to_owned()?)
        };
        let programs = (program(FORGET_V4)?, program(FORGET_V6)?);
        Ok(Sweeper::new(
            tables,
            programs,
            self.options.capacity.flows,
            Arc::clone(&self.rules),
            Arc::clone(&self.maps.table),
            self.reader.clone(),
        ))
    }

    /// Says which MAC addresses frames for this host have, by the interface that they come in by.
    /// On an interface that is not named, all do.
    ///
    /// # Errors
    /// When the kernel refuses a write.
    pub fn set_macs(&mut self, macs: &BTreeMap<u32, InterfaceMacs>) -> Result<(), Error> {
        self.maps.set_macs(macs)
    }

    /// What looks after the connections that are watched, for another thread.
    ///
    /// # Errors
    /// When the pinned maps can't be opened.
    pub fn signals(&mut self) -> Result<Signals, Error> {
        let pins = if self.staged { self.pins.beside() } else { self.pins.clone() };
        let mut program = |name| -> Result<_, Error> {
            Ok(xdp(&mut self.ebpf, name)?.fd()?.as_fd().try_clone_to_owned()?)
        };
        let programs = (program(JUDGE_V4)?, program(JUDGE_V6)?);
        Signals::open(&pins, programs, self.options.capacity.samples)
    }

    /// A way to read counters from any thread.
    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }

    /// What the kernel says of each program that handles packets.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn programs(&mut self) -> Result<Vec<ProgramInfo>, Error> {
        let mut infos = Vec::new();
        for name in [INGRESS_PROGRAM].into_iter().chain(RARE_PROGRAMS) {
            infos.push(xdp(&mut self.ebpf, name)?.info()?);
        }
        Ok(infos)
    }

    /// The loaded program, to run it on packets of one's own.
    ///
    /// # Errors
    /// When the object holds no program of that name and type.
    pub fn program(&mut self) -> Result<&mut Xdp, Error> {
        xdp(&mut self.ebpf, INGRESS_PROGRAM)
    }
}

/// Whether an agent can work here at all: a kernel that is recent enough, and a BPF
/// file system that can be written to. Mounts that file system where it is missing
/// from its usual place; changes nothing else.
///
/// # Errors
/// [`Error::OldKernel`], or [`Error::Bpffs`].
pub fn ready(bpffs: &Path) -> Result<(), Error> {
    Release::running().recent_enough()?;
    Pins::new(bpffs).ready().map(drop)
}

/// Makes the directory of the pins. [`Datapath::open`] does it as well; before it, the
/// directory is there to be locked.
///
/// # Errors
/// [`Error::Bpffs`] where it can't be on a BPF file system.
pub fn prepare(bpffs: &Path) -> Result<Made, Error> {
    Pins::new(bpffs).prepare()
}

/// Takes the program off all interfaces and removes all pins below `bpffs`.
/// Returns how many pins were removed; 0 where there were none.
///
/// # Errors
/// When a pin can't be removed.
pub fn detach(bpffs: &Path) -> io::Result<usize> {
    pins::remove_all(bpffs)
}

/// The id of the XDP program on an interface, whoever attached it.
///
/// # Errors
/// When the interface is missing or the kernel can't be asked.
pub fn program_on(interface: &str) -> io::Result<Option<u32>> {
    let ifindex = nix::net::if_::if_nametoindex(interface)?;
    Ok(attach::found_on(ifindex)?.map(|found| found.id))
}

/// Nanoseconds of `CLOCK_MONOTONIC`, which the program stamps flows with.
fn monotonic_ns() -> Result<u64, Error> {
    let now =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_err(io::Error::from)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// Bytes of kernel memory of a pinned map, as its descriptor's `fdinfo` says.
fn memory_bytes(pin: &Path) -> u64 {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    let read = || -> Option<u64> {
        let map = MapData::from_pin(pin).ok()?;
        let fd = map.fd().as_fd().as_raw_fd();
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        text.lines().find_map(|l| l.strip_prefix("memlock:"))?.trim().parse().ok()
    };
    read().unwrap_or(0)
}

/// Whether two plans have the same services under the same ids, and the same classes of clients.
fn same_rules(a: &DataPlane, b: &DataPlane) -> bool {
    let networks = a.classes.networks.iter().zip(&b.classes.networks);
    a.services.iter().map(|s| s.record).eq(b.services.iter().map(|s| s.record))
        && (&a.classes.tables, &a.classes.bases) == (&b.classes.tables, &b.classes.bases)
        && networks.into_iter().all(|(a, b)| Arc::ptr_eq(a, b))
}

fn pages(plane: &DataPlane) -> u64 {
    plane.services.iter().map(|s| u64::from((s.record.bucket_mask + 1) / PAGE_BUCKETS)).sum()
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map, Error> {
    ebpf.take_map(name).ok_or_else(|| {
        Error::Io(io::Error::new(
            io::ErrorKind::NotFound,
            format!("the object holds no map {name}"),
        ))
    })
}

fn take_maps(ebpf: &mut Ebpf, options: &Options) -> Result<Maps, Error> {
    let layouts = pins::layouts(options);
    let mut array = |name: &str| -> Result<(OwnedFd, u32), Error> {
        let entries = layouts.iter().find(|l| l.name == name).map_or(0, |l| l.entries);
        let Map::Array(data) = take(ebpf, name)? else {
            return Err(
                io::Error::new(io::ErrorKind::InvalidData, format!("{name} is no array")).into()
            );
        };
        Ok((data.fd().as_fd().try_clone_to_owned()?, entries))
    };
    let mut paged = |name: &str, word_bytes: usize| -> Result<Pages, Error> {
        let (map, pages) = array(name)?;
        Ok(Pages::new(map, pages, word_bytes * PAGE_BUCKETS as usize))
    };
    let (table, ledger) = (Arc::new(paged("TABLE", 4)?), paged("LEDGER", 8)?);
    let mut mapped = |name: &str, value_bytes: usize| -> Result<Mapping, Error> {
        let (map, entries) = array(name)?;
        Ok(Mapping::new(map, entries as usize * value_bytes).map_err(io::Error::from)?)
    };
    let marks = Marks::new(mapped("PANICS", size_of::<abi::Panic>())?);
    Ok(Maps {
        table,
        ledger,
        backends: mapped("BACKENDS", size_of::<Backend>())?,
        vips_v4: VipTable::v4(mapped("VIPS_V4", size_of::<abi::VipSlotV4>())?),
        vips_v6: VipTable::v6(mapped("VIPS_V6", size_of::<abi::VipSlotV6>())?),
        info: take(ebpf, "SERVICE_INFO")?.try_into()?,
        nat_sources: take(ebpf, "NAT_SOURCES")?.try_into()?,
        macs: take(ebpf, "MACS")?.try_into()?,
        first_macs: take(ebpf, "FIRST_MACS")?.try_into()?,
        tagged: take(ebpf, "TAGGED")?.try_into()?,
        counters: take(ebpf, "BACKEND_COUNTERS")?.try_into()?,
        tx_ports: take(ebpf, "TX_PORTS")?.try_into()?,
        classes: classes::ClassMaps::take(ebpf)?,
        marks,
        known: 0,
    })
}

/// What the maps hold.
fn read(maps: &Maps) -> Result<Adopted, Error> {
    let mut adopted = Adopted { backends: apply::records(&maps.backends), ..Adopted::default() };
    let mut records = maps.vips_v4.records();
    records.extend(maps.vips_v6.records());
    for (id, info) in directory(&maps.info)? {
        let record = records.get(&u32::from(id)).copied();
        let mut table = table_of(id, &info, &maps.table, &maps.ledger, record)?;
        let its = adopted.backends.iter().filter(|(_, b)| b.service == id).map(|(i, _)| *i);
        table.packets = maps.packets(its)?;
        adopted.services.push(table);
    }
    let tables = adopted.services.iter().map(|table| (table.id, table.name.as_str()));
    adopted.classes = maps.classes.read()?;
    adopted.panics = maps.marks.all_waiting(tables);
    Ok(adopted)
}
