//! Random frames through the loaded program and through the model of `canary-ebpf-common`, which
//! have to agree on what becomes of each: the action, every byte that leaves, what is counted and
//! every flow entry.
//!
//! A *life* is a run of frames that begins with empty maps; what came of earlier frames is used to
//! make later ones (answers, errors, fragments, retransmissions). A difference is told as a packet
//! case, with as few frames before it as show it.

mod frames;
mod real;

use std::{
    fmt::Write as _,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData},
    util::nr_cpus,
};
use canary_ebpf_common::{
    abi::{Backend, FRAGMENT_NS, Flow, PAGE_BUCKETS, Reason, VipSlotV4, VipSlotV6},
    model::{Action, Fate, Model, Tables},
    ports::PortRange,
    steer::model::ModelFlows,
};

pub use self::{
    frames::{Corpus, Frames},
    real::record,
};
use crate::{
    bpf,
    cases::world_named,
    loaded::{ARRIVAL_IFINDEX, FlowKey, Flows, Loaded, XDP_DROP, XDP_PASS, XDP_TX},
    model::address,
    names::Host,
    notation::{decode, hex},
    world::{OTHER_MAC, Plane, World},
};

/// Frames of one life.
pub const LIFE: usize = 8192;
/// The world that they meet, of `worlds.toml`.
pub const WORLD: &str = "everything";

/// Program and model over the same maps.
pub struct Pair {
    world: World,
    plane: Plane,
    loaded: Loaded,
    program: OwnedFd,
    reasons: MapData,
    /// Room for a counter of each CPU.
    counter: Vec<u64>,
    out: Vec<u8>,
    model: Model,
    /// Packets by reason as the model has it.
    expected: Vec<u64>,
    born: Instant,
}

/// Why a life ended before its last frame.
#[derive(Debug)]
pub struct Difference {
    /// Number of the frame in its life.
    pub nth: usize,
    /// What differs.
    pub what: String,
    /// All frames of the life until then.
    pub frames: Vec<Vec<u8>>,
}

impl Pair {
    /// Loads the program over the world of random frames.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn new(cases: &Path) -> Result<Self> {
        let world = world_named(cases, WORLD)?;
        let plane = world.plane(|name| anyhow::bail!("no interface {name}"))?;
        let mut loaded = Loaded::new(&plane.plane, &world.sizes())?;
        let program = loaded.datapath.program()?.fd()?.as_fd().try_clone_to_owned()?;
        let reasons = MapData::from_pin(loaded.pins().join("maps/REASONS"))?;
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        let model = model(&world, &plane, &loaded)?;
        Ok(Self {
            world,
            plane,
            loaded,
            program,
            reasons,
            counter: vec![0; cpus],
            out: vec![0; 64 << 10],
            model,
            expected: vec![0; Reason::ALL.len()],
            born: Instant::now(),
        })
    }

    /// Begins a life.
    ///
    /// # Errors
    /// When a map can't be cleared.
    pub fn renew(&mut self) -> Result<()> {
        self.loaded.renew(&self.plane.plane)?;
        self.model = model(&self.world, &self.plane, &self.loaded)?;
        self.expected.fill(0);
        self.born = Instant::now();
        Ok(())
    }

    /// Gives both a frame. Answers how many bytes have come out, if any, or what differs.
    ///
    /// # Errors
    /// When the kernel refuses the frame or a map.
    pub fn meet(&mut self, frame: &[u8]) -> Result<Result<Option<usize>, String>> {
        let fate = self.model.fate(frame);
        let run = bpf::run(self.program.as_fd(), frame, None, &mut self.out)
            .with_context(|| format!("running {}", hex(frame)))?;
        let mut reason = fate.reason;
        let action = match run.action {
            XDP_PASS => Some(Action::Pass),
            XDP_DROP => Some(Action::Drop),
            XDP_TX => Some(Action::Send(ARRIVAL_IFINDEX)),
            _ => None,
        };
        let out = &self.out[..run.len_bytes];
        let untold = fate.untold.is_some() && action == Some(Action::Drop);
        if untold {
            reason = fate.untold;
        } else if action != Some(fate.action) {
            return Ok(Err(format!("the program's action is {}; {}", run.action, told(&fate))));
        } else if fate.action != Action::Drop && out != fate.frame {
            return Ok(Err(format!("the program's frame is\n  {}\n{}", decode(out), told(&fate))));
        }
        if let Some(reason) = reason {
            self.expected[reason as usize] += 1;
            let counted = bpf::per_cpu_sum(&self.reasons, reason as u32, &mut self.counter)?;
            if counted != self.expected[reason as usize] {
                return Ok(Err(format!("the program counts something else; {}", told(&fate))));
            }
        }
        // Whether an error is sent depends on the clock: a sequence must not.
        let out = fate.action != Action::Drop && fate.untold.is_none();
        Ok(Ok(out.then_some(run.len_bytes)))
    }

    /// Whether what was counted and remembered in a life is the model's.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn settle(&mut self) -> Result<Result<(), String>> {
        let reasons = self.loaded.reasons();
        for (reason, (seen, expected)) in Reason::ALL.iter().zip(reasons.iter().zip(&self.expected))
        {
            if seen != expected {
                let name = reason.name();
                return Ok(Err(format!(
                    "{name} is counted {seen} times, and should be {expected}"
                )));
            }
        }
        Ok(same_flows(&self.loaded.flows_v4, &self.model.flows_v4)
            .and_then(|()| same_flows(&self.loaded.flows_v6, &self.model.flows_v6)))
    }

    /// Whether fragments may have been forgotten by their age, which the model does not know.
    fn too_old(&self) -> bool {
        self.born.elapsed() > Duration::from_nanos(FRAGMENT_NS) / 2
    }

    /// A life of `count` frames, and how many of them have come out again.
    ///
    /// # Errors
    /// When the kernel refuses a frame or a map.
    pub fn live(
        &mut self,
        frames: &mut Frames<'_>,
        count: usize,
    ) -> Result<Result<usize, Difference>> {
        let mut sent = 0;
        let mut all = Vec::new();
        self.renew()?;
        for nth in 0..count {
            all.push(frames.next_frame());
            let frame = &all[nth];
            let what = match self.meet(frame)? {
                Ok(out) => {
                    let out = &self.out[..out.unwrap_or(0)];
                    if !out.is_empty() && out != frame {
                        frames.came_out(out);
                        sent += 1;
                    }
                    continue;
                }
                Err(_) if self.too_old() => return Ok(Ok(sent)),
                Err(what) => what,
            };
            return Ok(Err(Difference { nth, what, frames: all }));
        }
        match self.settle()? {
            Err(what) if !self.too_old() => {
                Ok(Err(Difference { nth: count - 1, what, frames: all }))
            }
            _ => Ok(Ok(sent)),
        }
    }

    /// The difference after these frames, if there is one.
    fn repeat(&mut self, frames: &[&[u8]]) -> Result<Option<String>> {
        self.renew()?;
        for frame in frames {
            if let Err(what) = self.meet(frame)? {
                return Ok(Some(what));
            }
        }
        Ok(self.settle()?.err())
    }

    /// A difference as a packet case, with as few frames as still show it.
    ///
    /// # Errors
    /// When the kernel refuses a frame or a map.
    pub fn told(&mut self, difference: &Difference) -> Result<String> {
        let mut left: Vec<&[u8]> = difference.frames.iter().map(Vec::as_slice).collect();
        let mut what = difference.what.clone();
        let mut chunk = left.len();
        while chunk > 0 {
            let mut at = 0;
            while at < left.len() {
                let end = (at + chunk).min(left.len());
                let without: Vec<&[u8]> = left[..at].iter().chain(&left[end..]).copied().collect();
                match self.repeat(&without)? {
                    Some(again) => (left, what) = (without, again),
                    None => at = end,
                }
            }
            chunk /= 2;
        }
        let mut text = format!(
            "{what}\n\nAs a case:\n\n[[case]]\nname = \"\"\nworld = \"{WORLD}\"\nsteps = \"\"\"\n"
        );
        self.renew()?;
        for frame in left {
            let fate = self.model.fate(frame);
            _ = writeln!(text, "# {}\n> hex {}", decode(frame), hex(frame).replace(' ', ""));
            _ = match fate.action {
                Action::Pass => writeln!(text, "< pass"),
                Action::Drop => writeln!(text, "< drop"),
                Action::Send(_) => {
                    writeln!(text, "< tx hex {}", hex(&fate.frame).replace(' ', ""))
                }
            };
            if let Some(reason) = fate.reason {
                _ = writeln!(text, "+ {}", reason.name());
            }
        }
        text.push_str("\"\"\"\n");
        Ok(text)
    }
}

/// What the model has come to.
fn told(fate: &Fate) -> String {
    let reason = fate.reason.map_or("nothing", Reason::name);
    let out = if fate.frame.is_empty() { String::new() } else { decode(&fate.frame) };
    format!("the model's action is {:?}, counted: {reason}\n  {out}", fate.action)
}

/// Fields of an entry that do not depend on the clock.
fn comparable(flow: Flow) -> Flow {
    Flow { last_ns: 0, ..flow }
}

fn same_flows<K>(seen: &Flows<K>, expected: &ModelFlows<K>) -> Result<(), String>
where
    K: FlowKey + Copy + Eq + std::hash::Hash + std::fmt::Debug,
{
    let mut wrong = Ok(());
    let mut entries = 0;
    expected.retain(|key, flow| {
        entries += 1;
        let (ours, theirs) = (Some(comparable(*flow)), seen.get(key).ok().flatten());
        if wrong.is_ok() && theirs.map(comparable) != ours {
            wrong = Err(format!("{key:?} has {theirs:?}, and should have {ours:?}"));
        }
        true
    });
    let held = seen.len();
    if wrong.is_ok() && held != entries {
        wrong = Err(format!("there are {held} flow entries, and should be {entries}"));
    }
    wrong
}

/// Opens a pinned map.
fn map(pins: &Path, name: &str) -> Result<MapData> {
    MapData::from_pin(pins.join("maps").join(name)).with_context(|| name.to_owned())
}

/// The elements of a pinned array.
fn elements<V: Pod>(pins: &Path, name: &str) -> Result<Vec<V>> {
    let array: Array<MapData, V> = Map::Array(map(pins, name)?).try_into()?;
    Ok(array.iter().collect::<Result<_, _>>()?)
}

/// A model over the maps that the program has.
fn model(world: &World, plane: &Plane, loaded: &Loaded) -> Result<Model> {
    let pins = &loaded.pins();
    let (first, last) = world.nat_ports;
    let mut tables = Tables {
        ifindex: ARRIVAL_IFINDEX,
        macs: [Host::Us.mac(), Host::Vip(9).mac(), OTHER_MAC].into(),
        ways_out: [ARRIVAL_IFINDEX].into(),
        ports: PortRange { first, count: last - first + 1 },
        ..Tables::default()
    };
    let macs: HashMap<MapData, [u32; 3], u32> = Map::HashMap(map(pins, "MACS")?).try_into()?;
    tables.tagged_way = macs.get(&[ARRIVAL_IFINDEX, 0, 0], 0)?;
    for bytes in elements::<[u8; size_of::<VipSlotV4>()]>(pins, "VIPS_V4")? {
        // SAFETY: same size, and every bit pattern is a slot: integers only.
        let slot: VipSlotV4 = unsafe { std::mem::transmute(bytes) };
        tables.services.insert(([0; 2], slot.key), slot.service);
    }
    for bytes in elements::<[u8; size_of::<VipSlotV6>()]>(pins, "VIPS_V6")? {
        // SAFETY: as above.
        let slot: VipSlotV6 = unsafe { std::mem::transmute(bytes) };
        tables.services.insert((slot.addr, slot.key), slot.service);
    }
    for page in elements::<[u32; PAGE_BUCKETS as usize]>(pins, "TABLE")? {
        tables.table.extend(page);
    }
    for bytes in elements::<[u8; size_of::<Backend>()]>(pins, "BACKENDS")? {
        // SAFETY: as above.
        tables
            .backends
            .push(unsafe { std::mem::transmute::<[u8; size_of::<Backend>()], Backend>(bytes) });
    }
    let sources: Vec<_> = plane.plane.nat_sources.iter().map(|source| address(*source)).collect();
    Ok(Model::new(tables, world.flows as usize, &sources))
}
