//! The unwrapping program of a backend: loading, attaching and telling what it has done.
//!
//! It shares nothing with the balancer's programs and maps but the way in which it is attached,
//! and goes on by itself: its links are pinned, and no process has to run.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, LpmTrie, Map, MapData, MapType, PerCpuArray, lpm_trie},
    programs::ProgramInfo,
};
use canary_ebpf_common::{
    abi,
    decap::{OUTCOME_SLOTS, Outcome, Own, own},
};
use ipnet::IpNet;
use nix::net::if_::if_nametoindex;

use super::{
    Attached, AttachedMode, Error, attach,
    kernel::Release,
    links,
    pins::Pins,
    programs::{verify, xdp},
    take,
};
use crate::config::model::XdpMode;

/// The program, as the build made it.
static DECAP: &[u8] = aya::include_bytes_aligned!(env!("CANARY_EBPF_DECAP"));

const PROGRAM: &str = "decap";
const COUNTERS: &str = "DECAP_COUNTERS";

/// Bits of a sender's key before its address.
const FAMILY_BITS: u32 = u64::BITS;

/// What the program is told.
#[derive(Clone, Debug)]
pub struct DecapOptions {
    /// Directory of the pins, on a BPF file system.
    pub pins: PathBuf,
    /// Addresses that wrapped packets are taken at.
    pub addresses: Vec<IpAddr>,
    /// Networks that they are taken from; everybody if there are none.
    pub senders: Vec<IpNet>,
    /// The port of packets in UDP.
    pub gue_port: u16,
    /// How the program is attached.
    pub xdp_mode: XdpMode,
    /// Whether another XDP program on an interface gives way.
    pub replace: bool,
}

/// The loaded program.
pub struct Decap {
    options: DecapOptions,
    pins: Pins,
    ebpf: Ebpf,
}

impl Decap {
    /// Loads the program and tells it what it is to take. Nothing is attached yet.
    ///
    /// # Errors
    /// When the kernel is too old, the BPF file system can't be used, the kernel refuses a map or
    /// the program, or the rights are missing.
    pub fn open(options: DecapOptions) -> Result<Self, Error> {
        Release::running().recent_enough()?;
        let pins = Pins::new(&options.pins);
        let made = pins.prepare()?;
        Self::load(options, pins).inspect_err(|_| made.undo())
    }

    fn load(options: DecapOptions, pins: Pins) -> Result<Self, Error> {
        let counters = pins.map(COUNTERS);
        if counters.exists() && !fits(&counters) {
            // Another release's: what it has counted is no count of this one's.
            fs::remove_file(&counters)?;
        }
        let checked = u32::from(!options.senders.is_empty());
        let mut ebpf = EbpfLoader::new()
            .map_pin_path(COUNTERS, counters)
            .override_global("DECAP_SENDERS_SET", &checked, true)
            .override_global("DECAP_GUE_PORT", &options.gue_port, true)
            .load(DECAP)?;
        let mut addresses: HashMap<_, Own, u32> = take(&mut ebpf, "DECAP_ADDRESSES")?.try_into()?;
        for ip in &options.addresses {
            addresses.insert(key(*ip), 1, 0)?;
        }
        let mut senders: LpmTrie<_, Own, u32> = take(&mut ebpf, "DECAP_SENDERS")?.try_into()?;
        for network in &options.senders {
            let bits = FAMILY_BITS + u32::from(network.prefix_len());
            senders.insert(&lpm_trie::Key::new(bits, key(network.network())), 1, 0)?;
        }
        verify(xdp(&mut ebpf, PROGRAM)?)?;
        Ok(Self { options, pins, ebpf })
    }

    /// Attaches it to an interface, or takes the place of an earlier one there without a packet
    /// passing in between.
    ///
    /// # Errors
    /// When the interface is missing, another program is on it, or the driver refuses.
    pub fn attach(&mut self, interface: &str) -> Result<Attached, Error> {
        let program = xdp(&mut self.ebpf, PROGRAM)?;
        let DecapOptions { xdp_mode, replace, .. } = self.options;
        attach::attach(program, &self.pins, interface, xdp_mode, replace)
    }

    /// What the kernel knows of the program.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub fn info(&mut self) -> Result<ProgramInfo, Error> {
        Ok(xdp(&mut self.ebpf, PROGRAM)?.info()?)
    }

    /// The program, for test runs.
    ///
    /// # Errors
    /// When it is not loaded.
    pub fn program(&mut self) -> Result<BorrowedFd<'_>, Error> {
        Ok(xdp(&mut self.ebpf, PROGRAM)?.fd()?.as_fd())
    }
}

/// An interface that packets are unwrapped on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwrapping {
    /// Its name.
    pub interface: String,
    /// How the program is attached; `None` if it is not, as the interface has gone or another
    /// program has taken its place.
    pub mode: Option<AttachedMode>,
}

/// What is unwrapped where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unwrapped {
    /// The interfaces, in the order of their names.
    pub interfaces: Vec<Unwrapping>,
    /// Packets since the first of them; none of an outcome that is left out.
    pub packets: BTreeMap<u32, u64>,
}

impl Unwrapped {
    /// Packets that something has become of.
    pub fn count(&self, outcome: Outcome) -> u64 {
        self.packets.get(&(outcome as u32)).copied().unwrap_or(0)
    }
}

/// What is unwrapped by what is pinned in a directory.
///
/// # Errors
/// When the pins can't be read.
pub fn unwrapped(directory: &Path) -> Result<Unwrapped, Error> {
    let pins = Pins::new(directory);
    let mut found = Unwrapped::default();
    for interface in attached(directory)? {
        let held = links::pinned(&pins.link(&interface))?;
        let on_it = match if_nametoindex(interface.as_str()) {
            Ok(ifindex) => attach::found_on(ifindex)?,
            Err(_) => None,
        };
        let mode = on_it
            .filter(|on_it| held.is_some_and(|held| held.program == on_it.id))
            .map(|on_it| on_it.mode.unwrap_or(AttachedMode::Generic));
        found.interfaces.push(Unwrapping { interface, mode });
    }
    let counters = pins.map(COUNTERS);
    if counters.exists() && fits(&counters) {
        let counters: PerCpuArray<_, u64> =
            Map::PerCpuArray(MapData::from_pin(counters)?).try_into()?;
        for outcome in Outcome::ALL {
            let count = counters.get(&(*outcome as u32), 0)?.iter().sum();
            found.packets.insert(*outcome as u32, count);
        }
    }
    Ok(found)
}

/// Names of the interfaces whose links are pinned in a directory.
///
/// # Errors
/// When it can't be read.
pub fn attached(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(Pins::new(directory).links()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Takes the program off interfaces; with the last of them, the counters go.
///
/// # Errors
/// When a pin can't be removed; those before it are gone.
pub fn stop_unwrapping(directory: &Path, interfaces: &[String]) -> io::Result<()> {
    let pins = Pins::new(directory);
    for interface in interfaces {
        links::unpin(&pins.link(interface))?;
    }
    if attached(directory)?.is_empty() {
        super::pins::remove_all(directory)?;
    }
    Ok(())
}

/// Whether pinned counters are this build's.
fn fits(pin: &Path) -> bool {
    let info = MapData::from_pin(pin).and_then(|map| map.info());
    info.is_ok_and(|info| {
        info.map_type().is_ok_and(|kind| kind == MapType::PerCpuArray)
            && info.value_size() as usize == size_of::<u64>()
            && info.max_entries() == OUTCOME_SLOTS
    })
}

fn key(ip: IpAddr) -> Own {
    own(ip.is_ipv6(), abi::address(ip))
}
