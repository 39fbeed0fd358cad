//! What audiences cost (`bench audiences`): a packet without routes, one whose block has nobody in
//! an audience, one beside and one inside its networks; and how long it takes to compile and to
//! write networks, all of them and a change of some, as a new file of them makes it.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use canary_agent::{
    audience::Networks,
    config::{Config, load_str},
    plan::{Adopted, Family, NextHop, Planner, Start, Tags},
};
use canary_tests::{
    bpf,
    loaded::{ARRIVAL_IFINDEX, Loaded, Sizes, XDP_TX},
    model::Random,
    names::Host,
    notation::parse,
    planned::{Route, Shop},
    world::addr,
};
use ipnet::{IpNet, Ipv4Net};

use super::{Empty, figures, frame};

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
    /// So many changes of 1 % of the networks are made, one after the other
    #[arg(long, default_value_t = 3)]
    changes: usize,
}

/// The first half of the addresses is for networks, the rest for who is in none.
fn network(random: &mut Random) -> IpNet {
    let length = random.one_of(&[24_u8, 24, 24, 22, 25, 28, 32]);
    let addr = 0x0100_0000 + random.below(0x6f00_0000) as u32;
    let net = Ipv4Net::new(Ipv4Addr::from(addr), length).expect("a length of IPv4");
    IpNet::from(net.trunc())
}

fn shop(routed: bool) -> Result<Config> {
    let networks = vec!["192.0.2.0/32".to_owned()];
    let route = Route { audience: "staff", networks, split: "{ v2 = \"100%\" }" };
    let routes = if routed { vec![route] } else { Vec::new() };
    let text = Shop { stickiness: "client", buckets: 65_536, routes, ..Shop::default() }.text();
    match load_str("agent.toml", &text) {
        Ok(loaded) => Ok(loaded.config),
        Err(errors) => bail!("{}", canary_agent::config::render(&errors)),
    }
}

fn with(config: &Config, networks: &[IpNet]) -> Config {
    let mut config = config.clone();
    config.audiences[0].networks = Arc::new(Networks::new(networks.iter().copied()));
    config
}

fn begun(config: &Config) -> Result<Planner> {
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

/// Frames from clients that `client` gives.
fn frames(count: usize, mut client: impl FnMut() -> Ipv4Addr) -> Result<Vec<Vec<u8>>> {
    let one = parse(&format!(
        "eth client > us / ip client1 > {} / tcp 4000 > 80 A",
        Host::Vip(1).name()
    ))?;
    let from = |addr: Ipv4Addr| {
        let mut frame = one.clone();
        frame[26..30].copy_from_slice(&addr.octets());
        frame
    };
    Ok((0..count).map(|_| from(client())).collect())
}

/// The median of many runs over the empty program's, the least of three rounds.
fn net_ns(loaded: &mut Loaded, frames: &[Vec<u8>], runs: usize) -> Result<f64> {
    let mut empty = Empty {
        program: bpf::load_empty().context("loading the empty program")?,
        frame: frame(Family::V4, 0, Host::Us, "A")?,
        out: vec![0; 2048],
    };
    ensure!(loaded.run(&frames[0])?.action == XDP_TX, "it is sent to a backend");
    let mut least = f64::INFINITY;
    for _ in 0..3 {
        let (mut base, mut spent) = (Vec::new(), Vec::new());
        while spent.len() < runs {
            for _ in 0..10_000.min(runs) {
                base.push(empty.time_ns()?);
            }
            for at in 0..10_000.min(runs) {
                spent.push(loaded.time_ns(&frames[at % frames.len()])?);
            }
        }
        least = least.min(figures(&mut spent).median_ns - figures(&mut base).median_ns);
    }
    Ok(least)
}

fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).context("resident pages")?.parse()?;
    Ok(pages * 4096)
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut random = Random::new(7);
    let sizes = Sizes { flows: 1024, buckets: 1 << 19, ..Sizes::default() };
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
    let anybody =
        |random: &mut Random| Ipv4Addr::from(0x8100_0000 + random.below(0x3f00_0000) as u32);

    let mut planner = begun(&shop(false)?)?;
    planner.step(1_000_000);
    let mut loaded = Loaded::new(planner.plane(), &sizes)?;
    let outside = frames(arguments.clients, || anybody(&mut random))?;
    println!("no routes: {:.0} ns", net_ns(&mut loaded, &outside, arguments.runs)?);
    drop(loaded);

    let base = shop(true)?;
    for count in &arguments.networks {
        let mut networks: Vec<IpNet> = (0..*count).map(|_| network(&mut random)).collect();
        let config = with(&base, &networks);
        let before = resident_bytes()?;
        let began = Instant::now();
        let mut planner = begun(&config)?;
        planner.step(1_000_000);
        let compiled = began.elapsed();
        let mut loaded = Loaded::new(&canary_agent::plan::DataPlane::default(), &sizes)?;
        let began = Instant::now();
        loaded.datapath.apply(planner.plane())?;
        let applied = began.elapsed();
        planner.applied(1_000_000);
        let prefixes = planner.plane().classes.networks[0].prefixes().len();
        let memory = resident_bytes()?.saturating_sub(before);
        let maps = loaded.datapath.reader().maps();
        let kernel = maps.iter().find(|map| map.name == "CLASSES_V4").map_or(0, |m| m.memory_bytes);
        println!(
            "{count} networks: {prefixes} prefixes, planned in {compiled:?}, written in {applied:?}; {:.0} MB more \
             resident, {:.0} MB in the kernel by its account",
            memory as f64 / 1e6,
            kernel as f64 / 1e6
        );
        let inside = {
            let pick = &networks;
            frames(arguments.clients, || match pick[random.below(pick.len() as u64) as usize] {
                IpNet::V4(net) => net.network(),
                IpNet::V6(_) => Ipv4Addr::UNSPECIFIED,
            })?
        };
        // In a block that somebody is in, and most likely in nobody's network.
        let mut beside = Vec::new();
        let candidates = frames(arguments.clients * 4, || {
            match networks[random.below(networks.len() as u64) as usize] {
                IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) ^ 0x0000_5a11),
                IpNet::V6(_) => Ipv4Addr::UNSPECIFIED,
            }
        })?;
        for frame in candidates {
            let client = Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]);
            let class = planner.plane().classes.class(client.into()).entry;
            if class == Default::default() && beside.len() < arguments.clients {
                beside.push(frame);
            }
        }
        let miss = net_ns(&mut loaded, &outside, arguments.runs)?;
        let hit = net_ns(&mut loaded, &inside, arguments.runs)?;
        let near = match beside.is_empty() {
            true => f64::NAN,
            false => net_ns(&mut loaded, &beside, arguments.runs)?,
        };
        println!(
            "  block of nobody: {miss:.0} ns; in a network: {hit:.0} ns; beside one: {near:.0} ns"
        );

        let mut now_ms = 1_010_000;
        let (mut compiling, mut installing, mut writing) =
            (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        let mut written = 0;
        for _ in 0..arguments.changes {
            for _ in 0..(count / 100).max(1) {
                let at = random.below(networks.len() as u64) as usize;
                networks[at] = network(&mut random);
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
