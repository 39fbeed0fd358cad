//! What a program writes: its maps' contents before and after, read from outside, and where the
//! values of each processor lie.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use aya::{
    maps::{MapData, MapType},
    programs::ProgramInfo,
    util::nr_cpus,
};

use crate::{
    bpf,
    floor::{Assembler, LOOKUP, Width},
    loaded::XDP_PASS,
};

/// What is written together, bytes.
pub const CACHE_LINE: u64 = 64;

/// A map that programs use.
pub struct Used {
    /// Its name, as long as the kernel keeps it: 15 bytes.
    pub name: String,
    /// Its kind.
    pub kind: MapType,
    /// The map.
    pub map: MapData,
}

/// Every map that these programs use, pinned or not.
///
/// # Errors
/// When the kernel does not say.
pub fn maps(programs: &[ProgramInfo]) -> Result<Vec<Used>> {
    let mut ids = BTreeSet::new();
    for program in programs {
        ids.extend(program.map_ids()?.context("ids of maps: kernel 4.15")?);
    }
    let used = |id| {
        let map = MapData::from_id(id)?;
        let info = map.info()?;
        let name = info.name_as_str().unwrap_or_default().to_owned();
        Ok(Used { name, kind: info.map_type()?, map })
    };
    ids.into_iter().map(used).collect()
}

/// Contents of maps: by map and key, the value; one after the other of a map that has
/// one for each processor.
pub struct Contents(BTreeMap<(String, Vec<u8>), Vec<u8>>);

/// What has become another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// The map's name.
    pub map: String,
    /// The key.
    pub key: Vec<u8>,
    /// Of a map that has a value for each processor: whose have changed.
    pub cpus: Option<Vec<usize>>,
}

impl Contents {
    /// Reads everything, but for ring buffers, which nothing can be looked up in.
    ///
    /// # Errors
    /// When the kernel refuses to read.
    pub fn read(maps: &[Used]) -> Result<Self> {
        let mut contents = BTreeMap::new();
        for Used { name, kind, map } in maps.iter().filter(|map| map.kind != MapType::RingBuf) {
            let elements =
                bpf::elements(map).with_context(|| format!("reading {name}, a {kind:?}"))?;
            let elements = elements.into_iter().map(|(key, value)| ((name.clone(), key), value));
            contents.extend(elements);
        }
        Ok(Self(contents))
    }

    /// What is another one in `later`, there alone, or gone.
    pub fn changes(&self, later: &Self, maps: &[Used]) -> Vec<Change> {
        let keys: BTreeSet<_> = self.0.keys().chain(later.0.keys()).collect();
        let changed = keys.into_iter().filter(|key| self.0.get(*key) != later.0.get(*key));
        let change = |at: &(String, Vec<u8>)| {
            let per_cpu = maps.iter().any(|map| map.name == at.0 && per_cpu(map.kind));
            let cpus = per_cpu.then(|| {
                let [before, after] = [self, later].map(|contents| contents.0.get(at));
                let (before, after) = before.zip(after).expect("arrays have all their elements");
                let bytes = after.len() / nr_cpus().expect("processors");
                let values = before.chunks(bytes).zip(after.chunks(bytes)).enumerate();
                values.filter(|(_, (before, after))| before != after).map(|(cpu, _)| cpu).collect()
            });
            Change { map: at.0.clone(), key: at.1.clone(), cpus }
        };
        changed.map(change).collect()
    }
}

/// Whether a kind of map has a value for each processor.
pub fn per_cpu(kind: MapType) -> bool {
    matches!(kind, MapType::PerCpuArray | MapType::PerCpuHash | MapType::LruPerCpuHash)
}

/// A program that says where an element of an array lies that has a value for each processor: that of
/// the one which it runs on.
pub struct Where {
    program: OwnedFd,
    /// The index that is asked for, and the answer.
    state: OwnedFd,
}

impl Where {
    /// For this array.
    ///
    /// # Errors
    /// When the kernel refuses map or program.
    pub fn of(array: &MapData) -> io::Result<Self> {
        let state = bpf::create(MapType::Array, 4, 16, 1)?;
        let mut code = Assembler::default();
        code.value(7, state.as_fd());
        code.load(Width::U32, 3, 7, 0);
        code.store(Width::U32, 10, -4, 3);
        code.map(1, array.fd().as_fd());
        code.copy(2, 10);
        code.add(2, -4);
        code.call(LOOKUP);
        code.out_if(0, 0);
        code.store(Width::U64, 7, 8, 0);
        let program = code.out(XDP_PASS)?;
        Ok(Self { program, state })
    }

    /// The address of the element at `index`, on this thread's processor; 0 if there is none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn address(&self, index: u32) -> Result<u64> {
        let mut value = [0; 16];
        value[..4].copy_from_slice(&index.to_ne_bytes());
        bpf::update(self.state.as_fd(), &0_u32.to_ne_bytes(), &value)?;
        bpf::run(self.program.as_fd(), &[0; 64], None, &mut [0; 2048])?;
        bpf::lookup(self.state.as_fd(), &0_u32.to_ne_bytes(), &mut value)?;
        let (_, address) = value.split_at(8);
        Ok(u64::from_ne_bytes(address.try_into()?))
    }
}
