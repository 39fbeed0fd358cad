//! Reads the host. Nothing is changed: what is tried (a socket, a program, a map) is gone
//! when it has been tried, and neighbours are only asked for where there is time.
//!
//! Everything is about the network namespace of the calling thread. `/sys/class/net` is not
//! looked at: it shows the namespace that mounted it.

mod device;
mod files;
mod firewall;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, TcpListener},
    time::Duration,
};

use super::facts::{Facts, Found, Kernel, Places, Rights, Settings};
use crate::{
    api::model::Status,
    config::Config,
    daemon::lock,
    datapath,
    resolve::{self, Resolver, Survey, Unresolved},
};

/// How long neighbours are waited for: the kernel asks one three times, a second apart.
const NEIGHBOURS: Duration = Duration::from_millis(3_500);

/// What became of asking the agent on the socket.
#[derive(Clone, Debug)]
pub enum Asked {
    /// It has answered.
    Answered(Box<Status>),
    /// Somebody listens there who could not be asked, and why.
    Silent(String),
    /// Nobody listens there.
    Nobody,
}

/// How much time there is.
#[derive(Clone, Debug)]
pub enum Depth {
    /// None: what is known at this moment.
    Quick,
    /// Some: the kernel is probed and neighbours are asked.
    Thorough(Asked),
}

/// Reads the host for this configuration.
pub fn collect(config: &Config, depth: Depth) -> Facts {
    let (probed, agent, silent) = match depth {
        Depth::Quick => (false, None, None),
        Depth::Thorough(Asked::Answered(status)) => (true, Some(*status), None),
        Depth::Thorough(Asked::Silent(why)) => (true, None, Some(why)),
        Depth::Thorough(Asked::Nobody) => (true, None, None),
    };
    let alone = probed && agent.is_none() && silent.is_none();
    let options = datapath::Options {
        bpffs: config.agent.bpffs.clone(),
        capacity: config.agent.capacity,
        nat_ports: Some(config.agent.nat_ports.clone()),
        xdp_mode: config.agent.xdp_mode,
        replace: false,
        rebuild: false,
        rare: true,
    };
    let backends: BTreeSet<IpAddr> = config
        .services
        .iter()
        .flat_map(|service| &service.versions)
        .flat_map(|version| &version.backends)
        .map(|backend| backend.addr.ip())
        .collect();
    let mut network = resolve::survey(backends.iter().copied()).map_err(|error| error.to_string());
    let mut answered = BTreeMap::new();
    if let (true, Ok(survey)) = (probed, &mut network) {
        let vips: BTreeSet<IpAddr> = config
            .services
            .iter()
            .flat_map(|service| service.vips.iter().copied())
            .filter(|vip| survey.addresses.iter().all(|one| one.address != *vip))
            .collect();
        answered = ask_neighbours(survey, &backends, &vips);
    }
    let links = network.as_ref().map(|survey| survey.links.as_slice()).unwrap_or_default();
    let programs: Vec<u32> =
        links.iter().filter_map(|link| link.program.map(|(id, _)| id)).collect();
    Facts {
        probed,
        kernel: kernel(&options, probed),
        rights: rights(agent.as_ref()),
        places: places(config, &options, alone),
        holder: if alone {
            lock::held_by(&config.agent.state_dir, &config.agent.bpffs)
        } else {
            None
        },
        devices: devices(config, network.as_ref().ok()),
        programs: datapath::program_names(&programs).into_iter().collect(),
        answered,
        settings: settings(config),
        agent,
        silent,
        network,
    }
}

fn kernel(options: &datapath::Options, probed: bool) -> Kernel {
    let (release, recent) = datapath::release();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Kernel {
        release,
        recent,
        lacks: probed.then(datapath::lacks),
        btf: std::path::Path::new("/sys/kernel/btf/vmlinux").exists(),
        jit: files::number("/proc/sys/net/core/bpf_jit_enable"),
        unprivileged: files::number("/proc/sys/kernel/unprivileged_bpf_disabled"),
        maps_bytes: datapath::maps_bytes(options),
        available_bytes: files::available_bytes(),
        group_bytes: files::group_bytes(),
        cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32),
        page_bytes: nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .map_or(4096, |bytes| bytes as u32),
        clock_kept: files::clock_kept(),
        unix_seconds: now.map_or(0, |since| since.as_secs()),
    }
}

fn rights(agent: Option<&Status>) -> Rights {
    match agent {
        Some(status) => {
            let pid = status.agent.pid;
            Rights {
                whose: format!("/proc/{pid}/status"),
                capabilities: files::capabilities(&pid.to_string()),
            }
        }
        None => Rights {
            whose: "/proc/self/status".to_owned(),
            capabilities: files::capabilities("self"),
        },
    }
}

fn places(config: &Config, options: &datapath::Options, listen: bool) -> Places {
    let agent = &config.agent;
    let socket_directory = agent.socket.parent().unwrap_or(&agent.socket);
    let (socket_file, socket_blocked) = files::socket(&agent.socket);
    Places {
        bpffs: datapath::place(&options.bpffs),
        pins: datapath::pinned(options),
        state: files::folder(&agent.state_dir, &["state.db", "state.db-wal"]),
        socket: files::folder(socket_directory, &[]),
        socket_file,
        socket_blocked,
        listen: agent
            .listen
            .filter(|_| listen)
            .map(|address| TcpListener::bind(address).map(drop).map_err(|error| error.to_string())),
    }
}

/// What drivers say of the configured interfaces, of those towards backends, and of peers.
fn devices(config: &Config, survey: Option<&Survey>) -> BTreeMap<String, super::facts::Device> {
    let Some(survey) = survey else { return BTreeMap::new() };
    let towards: BTreeSet<u32> = survey.ways.values().map(|way| way.ifindex).collect();
    let mut wanted: BTreeSet<u32> = survey
        .links
        .iter()
        .filter(|link| {
            towards.contains(&link.ifindex) || config.agent.interfaces.contains(&link.name)
        })
        .map(|link| link.ifindex)
        .collect();
    let peers = survey.links.iter().filter(|link| wanted.contains(&link.ifindex));
    let peers: Vec<u32> =
        peers.filter(|link| !link.lower_elsewhere).filter_map(|link| link.lower).collect();
    wanted.extend(peers);
    let mut reader = device::Reader::open();
    survey
        .links
        .iter()
        .filter(|link| wanted.contains(&link.ifindex))
        .map(|link| (link.name.clone(), reader.read(&link.name, link.ifindex)))
        .collect()
}

fn settings(config: &Config) -> Settings {
    let in_force = |key: &str| -> BTreeMap<String, Found<u32>> {
        let read =
            |interface: &str| files::number(&format!("/proc/sys/net/ipv4/conf/{interface}/{key}"));
        let all = read("all");
        let names = config.agent.interfaces.iter().filter(|name| read(name).is_ok());
        names
            .map(|name| {
                let found = match (&all, read(name)) {
                    (Ok(all), Ok(own)) => Ok(own.max(*all)),
                    (Err(why), _) => Err(why.clone()),
                    (_, Err(why)) => Err(why),
                };
                (name.clone(), found)
            })
            .collect()
    };
    Settings {
        forwarding: (
            files::number("/proc/sys/net/ipv4/ip_forward"),
            files::number("/proc/sys/net/ipv6/conf/all/forwarding"),
        ),
        rp_filter: in_force("rp_filter"),
        arp_ignore: in_force("arp_ignore"),
        reserved: resolve::reserved_ports().map_err(|error| error.to_string()),
        reserved_writable: files::writable("/proc/sys/net/ipv4/ip_local_reserved_ports").is_ok(),
        firewall: firewall::read(),
    }
}

/// Has the kernel ask for the neighbours of backends, and for VIPs that are not here; waits
/// until each has answered or has been given up. Returns who answers for VIPs.
fn ask_neighbours(
    survey: &mut Survey,
    backends: &BTreeSet<IpAddr>,
    vips: &BTreeSet<IpAddr>,
) -> BTreeMap<IpAddr, [u8; 6]> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return BTreeMap::new();
    };
    // A VIP beyond a gateway says nothing: the gateway answers for itself.
    let on_link: BTreeSet<IpAddr> = vips
        .iter()
        .copied()
        .filter(|vip| {
            survey.addresses.iter().any(|one| {
                ipnet::IpNet::new(one.address, one.prefix_len).is_ok_and(|net| net.contains(vip))
            })
        })
        .collect();
    let wanted: BTreeSet<IpAddr> = backends.union(&on_link).copied().collect();
    if wanted.is_empty() {
        return BTreeMap::new();
    }
    let update = runtime.block_on(async {
        let resolver = Resolver::start().ok()?;
        resolver.set_destinations(wanted.iter().copied());
        let mut updates = resolver.updates();
        let settled = |update: &resolve::Update| {
            wanted.iter().all(|ip| {
                !matches!(update.hops.get(ip), None | Some(Err(Unresolved::Resolving { .. })))
            })
        };
        // Not in time: they are as they are.
        let _ = tokio::time::timeout(NEIGHBOURS, updates.wait_for(settled)).await;
        let update = updates.borrow().clone();
        Some(update)
    });
    let Some(update) = update else { return BTreeMap::new() };
    for backend in backends {
        if let Some(hop) = update.hops.get(backend) {
            survey.hops.insert(*backend, hop.clone());
        }
    }
    let answers = on_link.iter().filter_map(|vip| {
        let hop = update.hops.get(vip)?.as_ref().ok()?;
        Some((*vip, hop.destination_mac))
    });
    answers.collect()
}
