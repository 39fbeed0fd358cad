//! What audiences cost (`bench audiences`), by family: a packet without routes, one whose block has
//! nobody in an audience, one inside and one beside its networks, whose client's class is known or
//! has to be looked up; and how long it takes to compile and to write networks, all of them and a
//! change of some, as a new file of them makes it.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use canary_agent::{
    audience::Networks,
    config::{Config, load_str},
    plan::{Adopted, DataPlane, Family, NextHop, Planner, Start, Tags},
};
use canary_ebpf_common::{
    abi,
    class::{self, ClassEntry},
};
use canary_tests::{
    loaded::{ARRIVAL_IFINDEX, Loaded, Sizes, XDP_TX},
    model::Random,
    names::Host,
    planned::{Route, Shop},
    world::addr,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::packet::{Empty, figures, kinds::frame};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Networks of the audience, each number in turn
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1_000, 100_000, 1_000_000])]
    networks: Vec<usize>,
    /// Runs of each kind of packet
    #[arg(long, default_value_t = 200_000)]
    runs: usize,
    /// Clients that packets of a kind come from, one after the other
    #[arg(long, default_value_t = 10_000)]
    clients: usize,
    /// Families, each in turn
    #[arg(long, value_delimiter = ',', default_values_t = [4, 6])]
    families: Vec<u8>,
    /// So many changes of 1 % of the networks are made, one after the other
    #[arg(long, default_value_t = 3)]
    changes: usize,
}

/// Part of the addresses is for networks, the rest for who is in none: of IPv4 the first half, of
/// IPv6 some thousand /32s.
pub(crate) fn network(random: &mut Random, family: Family) -> IpNet {
    match family {
        Family::V4 => {
            let length = random.one_of(&[24_u8, 24, 24, 22, 25, 28, 32]);
            let addr = 0x0100_0000 + random.below(0x6f00_0000) as u32;
            Ipv4Net::new(Ipv4Addr::from(addr), length).expect("a length of IPv4").trunc().into()
        }
        Family::V6 => {
            let length = random.one_of(&[48_u8, 48, 48, 44, 56, 64, 128]);
            let top = 0x2400_0000 + random.below(1 << 14);
            let addr = u128::from(top << 32 | random.below(1 << 32)) << 64
                | u128::from(random.below(1 << 32));
            Ipv6Net::new(Ipv6Addr::from(addr), length).expect("a length of IPv6").trunc().into()
        }
    }
}

/// Somebody in a block that nobody of `networks` is in.
pub(crate) fn stranger(random: &mut Random, family: Family, taken: &HashSet<u32>) -> IpAddr {
    loop {
        match family {
            Family::V4 => {
                return Ipv4Addr::from(0x8100_0000 + random.below(0x3f00_0000) as u32).into();
            }
            Family::V6 => {
                let first = (0x2a00_0000 + random.below(1 << 20)) << 32 | random.below(1 << 32);
                if !taken.contains(&class::block_v6([first.to_be(), 0])) {
                    return Ipv6Addr::from(u128::from(first) << 64 | 1).into();
                }
            }
        }
    }
}

/// The blocks of IPv6 that networks are in.
pub(crate) fn blocks(networks: &[IpNet]) -> HashSet<u32> {
    let block = |net: &IpNet| match net {
        IpNet::V6(net) => Some(class::block_v6(abi::address(net.network().into()))),
        IpNet::V4(_) => None,
    };
    networks.iter().filter_map(block).collect()
}

/// A client of a network, and one that is beside it in its block and most likely in nobody's.
fn inside_and_beside(net: &IpNet) -> [IpAddr; 2] {
    match net {
        IpNet::V4(net) => {
            [net.network(), Ipv4Addr::from(u32::from(net.network()) ^ 0x5a11)].map(IpAddr::V4)
        }
        IpNet::V6(net) => {
            let beside = u128::from(net.network()) ^ 0x5a11 << 80;
            [net.network(), Ipv6Addr::from(beside)].map(IpAddr::V6)
        }
    }
}

/// So many clients in `networks` at random, and beside them, of whom those count that are in no
/// other one.
pub(crate) fn members_and_others(
    random: &mut Random,
    planner: &Planner,
    networks: &[IpNet],
    clients: usize,
) -> [Vec<IpAddr>; 2] {
    let (mut inside, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..clients {
        let net = &networks[random.below(networks.len() as u64) as usize];
        let [within, near] = inside_and_beside(net);
        inside.push(within);
        if planner.plane().classes.class(near).entry == ClassEntry::default() {
            beside.push(near);
        }
    }
    [inside, beside]
}

pub(crate) fn shop(routed: bool) -> Result<Config> {
    let networks = vec!["192.0.2.0/32".to_owned(), "2001:db8:ffff::/128".to_owned()];
    let route = Route { audience: "staff", networks, split: "{ v2 = \"100%\" }" };
    let routes = if routed { vec![route] } else { Vec::new() };
    let text = Shop { stickiness: "client", buckets: 65_536, routes, ..Shop::default() }.text();
    match load_str("agent.toml", &text) {
        Ok(loaded) => Ok(loaded.config),
        Err(errors) => bail!("{}", canary_agent::config::render(&errors)),
    }
}

pub(crate) fn with(config: &Config, networks: &[IpNet]) -> Config {
    let mut config = config.clone();
    config.audiences[0].networks = Arc::new(Networks::new(networks.iter().copied()));
    config
}

pub(crate) fn begun(config: &Config) -> Result<Planner> {
    let start = Start { config, adopted: Adopted::default(), stored: &[], now_ms: 1_000_000 };
    let (mut planner, _) = Planner::begin(start)?;
    let hop = |ip: IpAddr| -> Option<(IpAddr, Result<NextHop, String>)> {
        let host = Host::with_addr(ip)?;
        let hop = NextHop {
            ifindex: ARRIVAL_IFINDEX,
            source_mac: Host::Us.mac(),
            destination_mac: host.mac(),
            source: addr(Host::Nat, Family::of(ip)),
            tags: Tags::default(),
            mtu: 1500,
            silent: None,
        };
        Some((ip, Ok(hop)))
    };
    let hops: HashMap<_, _> = planner.addresses().into_iter().filter_map(hop).collect();
    planner.set_next_hops(&hops);
    Ok(planner)
}

/// Packets from clients in turn: one frame, into which each client's address is written, so that
/// what is in the caches is what the program has looked at.
struct Packets {
    frame: Vec<u8>,
    /// Where the address is in it.
    source: std::ops::Range<usize>,
    /// The addresses, one after the other, in no more bytes than they have.
    clients: Vec<u8>,
}

impl Packets {
    /// From these clients, which are of one family.
    fn new(family: Family, clients: Vec<IpAddr>) -> Result<Self> {
        let source = match family {
            Family::V4 => 26..30,
            Family::V6 => 22..38,
        };
        let octets = |client: &IpAddr| match client {
            IpAddr::V4(addr) => addr.octets().to_vec(),
            IpAddr::V6(addr) => addr.octets().to_vec(),
        };
        let clients = clients.iter().flat_map(octets).collect();
        Ok(Self { frame: frame(family, 0, Host::Vip(1), "A")?, source, clients })
    }

    /// The frame of the client whose turn it is, if there is any.
    fn of(&mut self, turn: usize) -> Option<&[u8]> {
        let bytes = self.source.len();
        let at = turn % (self.clients.len() / bytes).max(1) * bytes;
        self.frame[self.source.clone()].copy_from_slice(self.clients.get(at..at + bytes)?);
        Some(&self.frame)
    }
}

/// Makes a frame without tags one of this client.
pub(crate) fn write_client(frame: &mut [u8], client: IpAddr) {
    match client {
        IpAddr::V4(addr) => frame[26..30].copy_from_slice(&addr.octets()),
        IpAddr::V6(addr) => frame[22..38].copy_from_slice(&addr.octets()),
    }
}

/// What stands in the way of a class that is known: see `abi::settled`.
struct Changes(Array<MapData, u64>);

impl Changes {
    fn of(loaded: &Loaded) -> Result<Self> {
        let pin = loaded.pins().join("maps").join("CLASS_CHANGES");
        Ok(Self(Map::Array(MapData::from_pin(pin)?).try_into()?))
    }

    /// As if a change had come and gone: everybody is looked up again.
    fn come_and_go(&mut self) -> Result<()> {
        let changes = self.0.get(&0, 0)?;
        Ok(self.0.set(0, changes + 2, 0)?)
    }
}

/// Median and mean of many runs over the empty program's, the least of three rounds; if they are
/// `looked_up`, with everybody forgotten before each.
fn net_ns(
    loaded: &mut Loaded,
    packets: &mut Packets,
    runs: usize,
    looked_up: bool,
) -> Result<String> {
    let mut empty = Empty::load()?;
    let Some(first) = packets.of(0) else { return Ok("-".to_owned()) };
    ensure!(loaded.run(first)?.action == XDP_TX, "it is sent to a backend");
    let mut changes = Changes::of(loaded)?;
    let (mut median, mut mean) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..3 {
        let (mut base, mut spent) = (Vec::new(), Vec::new());
        while spent.len() < runs {
            for _ in 0..10_000.min(runs) {
                base.push(empty.time_ns()?);
            }
            for turn in 0..10_000.min(runs) {
                if looked_up {
                    changes.come_and_go()?;
                }
                let frame = packets.of(turn).context("a client")?;
                spent.push(loaded.time_ns(frame)?);
            }
        }
        let (spent, base) = (figures(&mut spent), figures(&mut base));
        median = median.min(spent.median_ns - base.median_ns);
        mean = mean.min(spent.mean_ns - base.mean_ns);
    }
    Ok(format!("{median:.0} / {mean:.0}"))
}

fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).context("resident pages")?.parse()?;
    Ok(pages * 4096)
}

/// Bytes of the kernel's own memory that it can't take back.
fn kernel_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib =
            line.and_then(|line| line.trim().strip_suffix(" kB")).context("no such memory")?;
        Ok::<u64, anyhow::Error>(kib.trim().parse::<u64>()? * 1024)
    };
    Ok(of("SUnreclaim:")? + of("Percpu:")?)
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let sizes = Sizes { flows: 1024, buckets: 1 << 19, ..Sizes::default() };
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
    for family in &arguments.families {
        let family = match family {
            4 => Family::V4,
            6 => Family::V6,
            other => bail!("IPv{other} is no family: 4 and 6 are"),
        };
        of_family(arguments, family, &sizes)?;
    }
    Ok(())
}

fn of_family(arguments: &Arguments, family: Family, sizes: &Sizes) -> Result<()> {
    let mut random = Random::new(7);
    let runs = arguments.runs;
    let mut planner = begun(&shop(false)?)?;
    planner.step(1_000_000);
    let mut loaded = Loaded::new(planner.plane(), sizes)?;
    let nobody = HashSet::new();
    let outside = (0..arguments.clients).map(|_| stranger(&mut random, family, &nobody));
    let mut outside = Packets::new(family, outside.collect())?;
    println!("net ns, median / mean");
    println!("{family:?}, no routes: {}", net_ns(&mut loaded, &mut outside, runs, false)?);
    drop(loaded);

    let base = shop(true)?;
    for count in &arguments.networks {
        let mut networks: Vec<IpNet> = (0..*count).map(|_| network(&mut random, family)).collect();
        let config = with(&base, &networks);
        let before = resident_bytes()?;
        let began = Instant::now();
        let mut planner = begun(&config)?;
        planner.step(1_000_000);
        let compiled = began.elapsed();
        let mut loaded = Loaded::new(&DataPlane::default(), sizes)?;
        let kernel = kernel_bytes()?;
        let began = Instant::now();
        loaded.datapath.apply(planner.plane())?;
        let applied = began.elapsed();
        planner.applied(1_000_000);
        let at = usize::from(family == Family::V6);
        let prefixes = planner.plane().classes.networks[at].prefixes().len();
        println!(
            "{family:?}, {count} networks: {prefixes} prefixes, planned in {compiled:?}, written in {applied:?}; {:.0} MB \
             more resident, {:.0} MB in the kernel",
            resident_bytes()?.saturating_sub(before) as f64 / 1e6,
            kernel_bytes()?.saturating_sub(kernel) as f64 / 1e6
        );
        let [inside, beside] =
            members_and_others(&mut random, &planner, &networks, arguments.clients);
        let taken = blocks(&networks);
        let outside = (0..arguments.clients).map(|_| stranger(&mut random, family, &taken));
        let mut outside = Packets::new(family, outside.collect())?;
        let mut inside = Packets::new(family, inside)?;
        let mut beside = Packets::new(family, beside)?;
        println!(
            "  block of nobody: {}; in a network: {}, looked up: {}; beside one: {}, looked up: {}",
            net_ns(&mut loaded, &mut outside, runs, false)?,
            net_ns(&mut loaded, &mut inside, runs, false)?,
            net_ns(&mut loaded, &mut inside, runs, true)?,
            net_ns(&mut loaded, &mut beside, runs, false)?,
            net_ns(&mut loaded, &mut beside, runs, true)?,
        );

        let mut now_ms = 1_010_000;
        let (mut compiling, mut installing, mut writing) =
            (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        let mut written = 0;
        for _ in 0..arguments.changes {
            for _ in 0..(count / 100).max(1) {
                let at = random.below(networks.len() as u64) as usize;
                networks[at] = network(&mut random, family);
            }
            let config = with(&base, &networks);
            let began = Instant::now();
            let baseline = planner.baseline(&config, &HashMap::new(), now_ms);
            let prepared = baseline.prepare()?;
            compiling += began.elapsed();
            let began = Instant::now();
            let ready = planner.ready(prepared, now_ms)?;
            planner.install(ready);
            planner.step(now_ms);
            installing += began.elapsed();
            let began = Instant::now();
            written += loaded.datapath.apply(planner.plane())?.networks;
            writing += began.elapsed();
            planner.applied(now_ms);
            now_ms += 3_600_000;
            planner.step(now_ms);
            loaded.datapath.apply(planner.plane())?;
            planner.applied(now_ms);
        }
        let each = u32::try_from(arguments.changes.max(1))?;
        println!(
            "  1 % changed: compiled in {:?}, taken over in {:?}, {} entries written in {:?} (mean of {each})",
            compiling / each,
            installing / each,
            written / arguments.changes.max(1),
            writing / each
        );
    }
    Ok(())
}
