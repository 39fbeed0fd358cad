//! What was found on the host: plain values, which the verdicts are functions of.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use crate::{
    api::model::Status,
    datapath::{PinsSeen, PlaceSeen},
    resolve::{PortSet, Survey},
};

/// Something that was read, or why it could not be.
pub type Found<T> = Result<T, String>;

/// Everything.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Whether there was time to wait and to probe.
    pub probed: bool,
    /// The kernel.
    pub kernel: Kernel,
    /// What the process that steers may do: the agent's, or else this one.
    pub rights: Rights,
    /// Where the agent keeps things.
    pub places: Places,
    /// The agent that answers on the socket.
    pub agent: Option<Status>,
    /// Why an agent that listens on the socket could not be asked.
    pub silent: Option<String>,
    /// The key of a place that another agent has locked, which does not answer, and its pid.
    pub holder: Option<(&'static str, i32)>,
    /// Links, addresses and ways.
    pub network: Found<Survey>,
    /// What the drivers say, by interface: those of the configuration, those towards
    /// backends, and peers.
    pub devices: BTreeMap<String, Device>,
    /// Names of the XDP programs that are on interfaces, by id.
    pub programs: BTreeMap<u32, String>,
    /// Addresses that neighbours answer for, as far as they were asked.
    pub answered: BTreeMap<IpAddr, [u8; 6]>,
    /// Settings of the network.
    pub settings: Settings,
}

/// The kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// Whether it is recent enough.
    pub recent: bool,
    /// What of BPF it lacks; `None` where it was not probed.
    pub lacks: Option<Found<Vec<String>>>,
    /// Its type information is there.
    pub btf: bool,
    /// `net.core.bpf_jit_enable`.
    pub jit: Found<u32>,
    /// `kernel.unprivileged_bpf_disabled`.
    pub unprivileged: Found<u32>,
    /// Bytes that the maps take.
    pub maps_bytes: u64,
    /// Bytes that are to be had.
    pub available_bytes: Found<u64>,
    /// Bytes that the control group may still take, where it is limited, and its file.
    pub group_bytes: Option<(u64, String)>,
    /// CPUs.
    pub cpus: u32,
    /// Bytes of a page of memory.
    pub page_bytes: u32,
    /// Whether the clock is kept in time by somebody.
    pub clock_kept: Found<bool>,
    /// Seconds since 1970.
    pub unix_seconds: u64,
}

/// A process's rights.
#[derive(Clone, Debug)]
pub struct Rights {
    /// Whose they are.
    pub whose: String,
    /// Effective capabilities, a bit each.
    pub capabilities: Found<u64>,
}

/// Where the agent keeps things.
#[derive(Clone, Debug)]
pub struct Places {
    /// `agent.bpffs`.
    pub bpffs: PlaceSeen,
    /// What is pinned there.
    pub pins: PinsSeen,
    /// `agent.state_dir`.
    pub state: Folder,
    /// The directory of `agent.socket`.
    pub socket: Folder,
    /// The socket's group and mode, where it is there.
    pub socket_file: Option<(String, u32)>,
    /// Whether something that is no socket stands in its place.
    pub socket_blocked: bool,
    /// Whether `agent.listen` can be had; `None` where it was not tried.
    pub listen: Option<Found<()>>,
}

/// A folder that is to be written to.
#[derive(Clone, Debug)]
pub struct Folder {
    /// The folder.
    pub path: PathBuf,
    /// The longest part of its path that exists.
    pub existing: PathBuf,
    /// Whether this process may write there.
    pub writable: Found<()>,
    /// Bytes that are free.
    pub free_bytes: Found<u64>,
    /// Its file system, as `statfs` numbers them.
    pub file_system: u64,
    /// What somebody who is neither root nor its owner may write: a name in it that matters.
    pub open_to_others: Option<String>,
}

/// What a driver says.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its name.
    pub driver: Found<String>,
    /// What it does of XDP.
    pub xdp: Found<Xdp>,
    /// Receive queues: in use, and at most.
    pub queues: Found<(u32, u32)>,
    /// Large receive offload is on.
    pub lro: Found<bool>,
    /// Generic receive offload is on.
    pub gro: Found<bool>,
    /// Checksums of what it sends are left to it.
    pub tx_checksum: Found<bool>,
    /// It takes VLAN tags out of frames.
    pub rx_vlan: Found<bool>,
}

/// What a driver does of XDP (`NETDEV_XDP_ACT_*`, Linux 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xdp {
    /// It runs programs.
    pub native: bool,
    /// It takes frames that other interfaces redirect to it.
    pub redirect_target: bool,
    /// It gives programs frames in several parts.
    pub several_parts: bool,
}

/// Settings of the network.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding`.
    pub forwarding: (Found<u32>, Found<u32>),
    /// `net.ipv4.conf.IF.rp_filter` in force: the greater of the interface's and of `all`'s.
    pub rp_filter: BTreeMap<String, Found<u32>>,
    /// `net.ipv4.conf.IF.arp_ignore` in force.
    pub arp_ignore: BTreeMap<String, Found<u32>>,
    /// `net.ipv4.ip_local_reserved_ports`.
    pub reserved: Found<PortSet>,
    /// Whether this process may change it.
    pub reserved_writable: bool,
    /// Tables and chains of the firewall.
    pub firewall: Found<Firewall>,
}

/// The host's packet filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Chains and tables that filter: `iptables filter`, `nftables inet filter input`.
    pub filters: BTreeSet<String>,
    /// Those that translate.
    pub translates: BTreeSet<String>,
    /// Base chains that drop what no rule takes.
    pub drops: BTreeSet<String>,
}
