//! What the agent itself costs: how long it takes to steer, its memory and its share of a
//! processor while nothing happens, and how long changes take.
//!
//! With the real binary, in network namespaces of its own, with nobody's packets: what traffic
//! does to these times, the end-to-end tests tell.

use std::{
    fmt::Write as _,
    fs,
    os::unix::net::UnixDatagram,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use canary_agent::api::{model::ChangeReport, panic::PanicReport, reload::ReloadReport};
use canary_tests::{
    agent::{Agent, AgentOptions},
    control::Control,
    loaded::{Loaded, Sizes},
    process::{Memory, Usage},
    server::{HTTP_PORT, Server},
    topology::{Family, Options, Topology},
    wait,
    world::{Service, World},
};
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::counters::{self, Counters};

/// From how many services on tables are small: so many of the usual size are for large hosts.
const MANY: usize = 1_000;
/// Buckets of small tables.
const SMALL: u32 = 4_096;
/// Buckets of the usual ones.
const USUAL: u32 = 65_536;
/// Panics of a service.
const PANICS: usize = 30;
/// How long an agent may take to be ready.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Numbers of services; from 1,000 on, of 4,096 buckets each instead of 65,536
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 4096])]
    services: Vec<usize>,
    /// Seconds for which an agent is left alone before its memory is looked at
    #[arg(long, default_value_t = 15)]
    rest: u64,
    /// Seconds for which it is watched then
    #[arg(long, default_value_t = 30)]
    idle: u64,
    /// Splits, each of which moves buckets
    #[arg(long, default_value_t = 1_000)]
    splits: usize,
    /// Services beside the one whose split changes, each number in turn
    #[arg(long, value_delimiter = ',', default_values_t = [0, 999])]
    beside: Vec<usize>,
    /// Times that everything that is counted is asked for
    #[arg(long, default_value_t = 200)]
    answers: usize,
    /// What is measured
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::ALL)]
    parts: Vec<Part>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Agents while nothing happens
    Resting,
    /// Splits, and panics
    Splits,
    /// Words in the maps
    Writes,
    /// Reloads
    Reloads,
    /// Answers with all that is counted, and packets meanwhile
    Counters,
}

impl Part {
    const ALL: [Self; 5] =
        [Self::Resting, Self::Splits, Self::Writes, Self::Reloads, Self::Counters];
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    services: Vec<Services>,
    splits: Vec<Splits>,
    writes: Vec<Writes>,
    reloads: Vec<Reload>,
    counters: Option<Counters>,
}

/// An agent with so many services.
#[derive(Serialize)]
struct Services {
    services: usize,
    buckets: u32,
    checks: bool,
    /// Until the service manager was told that traffic is steered, milliseconds.
    cold_ms: u64,
    /// The same over what an agent left behind that was killed.
    adopting_ms: u64,
    memory: Memory,
    /// Of one processor.
    idle_percent: f64,
    idle_wakeups_per_second: f64,
}

#[derive(Serialize)]
struct Splits {
    /// Services, of which all but this one have 4,096 buckets.
    services: usize,
    families: usize,
    forward: &'static str,
    calls: usize,
    buckets_moved: u64,
    round_trip: Quantiles,
    in_force: Quantiles,
    /// Of a panic of the service, by the agent.
    panic: Quantiles,
    /// Microseconds of a panic of all services until it was in force.
    panic_of_all_us: u64,
}

/// A plan in which every bucket goes elsewhere, on its way into the maps.
#[derive(Serialize)]
struct Writes {
    buckets: u32,
    rounds: usize,
    entries_per_second: f64,
}

/// Microseconds.
#[derive(Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) max_us: u64,
}

#[derive(Serialize)]
struct Reload {
    services: usize,
    changed: usize,
    took_ms: f64,
    loop_ms: f64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.services.iter().all(|n| (1..=4096).contains(n)), "1 to 4,096 services");
    ensure!(
        arguments.splits > 0 && arguments.idle > 0 && arguments.answers > 0,
        "nothing to measure"
    );
    ensure!(arguments.beside.iter().all(|n| *n < 4_096), "4,096 services at most");
    let topology = Topology::new(&Options::one_armed_nat(&[("stable", 2), ("v2", 1)]));
    let _servers = Server::start_all(&topology.backends);
    let mut report = Report {
        kernel: nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default(),
        services: Vec::new(),
        splits: Vec::new(),
        writes: Vec::new(),
        reloads: Vec::new(),
        counters: None,
    };
    let wanted = |part| arguments.parts.contains(&part);
    for &services in arguments.services.iter().filter(|_| wanted(Part::Resting)) {
        for checks in [false, true] {
            report.services.push(resting(arguments, &topology, services, checks)?);
        }
    }
    for &beside in arguments.beside.iter().filter(|_| wanted(Part::Splits)) {
        for (forward, families) in
            [("dsr", &Family::ALL[..1]), ("dsr", &Family::ALL[..]), ("nat", &Family::ALL[..1])]
        {
            report.splits.push(splits(arguments, &topology, forward, families, beside)?);
        }
    }
    if wanted(Part::Writes) {
        report.writes = [4_096, 65_536, 1 << 20].map(writes).into_iter().collect::<Result<_>>()?;
    }
    if let Some(&most) = arguments.services.iter().max().filter(|_| wanted(Part::Reloads)) {
        report.reloads = reloads(&topology, most)?;
    }
    if wanted(Part::Counters) {
        report.counters = Some(counters::run(&topology, arguments.answers)?);
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

const fn buckets(services: usize) -> u32 {
    if services < MANY { USUAL } else { SMALL }
}

/// Room for so many services, and none to spare.
fn options(topology: &Topology, services: usize) -> AgentOptions {
    let all = services as u64 * u64::from(buckets(services));
    let extra = format!(
        "manage_vips = false\ncapacity = {{ services = {services}, vips = {}, backends = {}, buckets = {all} }}",
        services.max(16),
        (services * 3).max(16),
    );
    AgentOptions { extra, ..AgentOptions::native(topology) }
}

/// That many services with an IPv4 address and two versions each; `weight` is that of the first
/// backends of the first `changed` ones.
fn services(topology: &Topology, services: usize, checks: bool, changes: (usize, u32)) -> String {
    of_size(topology, services, buckets(services), checks, changes)
}

/// The same, with so many buckets each.
fn of_size(
    topology: &Topology,
    services: usize,
    buckets: u32,
    checks: bool,
    (changed, weight): (usize, u32),
) -> String {
    let addr = |version: &str| topology.backend_addrs(version, &Family::ALL[..1], HTTP_PORT);
    let (stable, v2) = (addr("stable"), addr("v2"));
    let health = if checks { "tcp" } else { "none" };
    let mut text = String::new();
    for n in 0..services {
        let weight = if n < changed { weight } else { 1 };
        // A String takes everything.
        let _ = write!(
            text,
            "[[service]]\nname = \"s{n}\"\nvip = \"10.8.{}.{}\"\nports = \"tcp/80\"\nforward = \"nat\"\n\
             buckets = {buckets}\nhealth = {{ type = {health:?} }}\nsplit = {{ v2 = \"5%\" }}\ncontrol = \"stable\"\n\
             [service.versions.stable]\nbackends = [{{ addr = \"{}\", weight = {weight} }}, \"{}\"]\n\
             [service.versions.v2]\nbackends = [\"{}\"]\n",
            n / 256,
            n % 256,
            stable[0],
            stable[1],
            v2[0],
        );
    }
    text
}

/// Starts an agent and returns how long it took until it said that it steers.
pub(crate) fn start(agent: &mut Agent<'_>) -> Result<Duration> {
    let path = agent.folder().join("notify");
    let _ = fs::remove_file(&path);
    let socket = UnixDatagram::bind(&path).context("a socket for the agent's messages")?;
    let began = Instant::now();
    agent.run_with(|command| {
        command.env("NOTIFY_SOCKET", &path);
    });
    let mut message = [0; 4096];
    loop {
        let left = PATIENCE.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left))?;
        let Ok(length) = wait::uninterrupted(|| socket.recv(&mut message)) else {
            anyhow::bail!("the agent is not ready after {:?}:\n{}", began.elapsed(), agent.log());
        };
        if message[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
            return Ok(began.elapsed());
        }
    }
}

fn resting(
    arguments: &Arguments,
    topology: &Topology,
    count: usize,
    checks: bool,
) -> Result<Services> {
    eprintln!("{count} services, {}", if checks { "checked" } else { "not checked" });
    let text = services(topology, count, checks, (0, 1));
    let mut agent = Agent::prepare(&topology.balancer, &options(topology, count), &text);
    let cold = start(&mut agent)?;
    agent.wait_ready();
    agent.stop(Signal::SIGKILL);
    let adopting = start(&mut agent)?;
    agent.wait_ready();
    std::thread::sleep(Duration::from_secs(arguments.rest));
    let pid = agent.pid().context("the agent has ended")?;
    let before = Usage::of(pid)?;
    let began = Instant::now();
    std::thread::sleep(Duration::from_secs(arguments.idle));
    let (after, took) = (Usage::of(pid)?, began.elapsed());
    Ok(Services {
        services: count,
        buckets: buckets(count),
        checks,
        cold_ms: millis(cold),
        adopting_ms: millis(adopting),
        memory: Memory::of(pid)?,
        idle_percent: after.cpu.saturating_sub(before.cpu).as_secs_f64() / took.as_secs_f64() * 1e2,
        idle_wakeups_per_second: after.wakeups.saturating_sub(before.wakeups) as f64
            / took.as_secs_f64(),
    })
}

/// Splits over the socket, one after the other; each is stored and in force when it is answered.
fn splits(
    arguments: &Arguments,
    topology: &Topology,
    forward: &'static str,
    families: &[Family],
    beside: usize,
) -> Result<Splits> {
    const SHARES: [&str; 6] = ["1%", "5%", "50%", "100%", "25%", "0%"];
    eprintln!(
        "{} splits, {forward}, {} families, {beside} services beside",
        arguments.splits,
        families.len()
    );
    let vips: Vec<String> = families.iter().map(|family| family.vip().to_string()).collect();
    let text = format!(
        "[[service]]\nname = \"shop\"\nvip = {vips:?}\nports = \"tcp/{HTTP_PORT}\"\nforward = {forward:?}\n\
         health = {{ type = \"none\" }}\ncontrol = \"stable\"\n{}\n{}",
        topology.versions_toml(families, HTTP_PORT),
        of_size(topology, beside, SMALL, false, (0, 1)),
    );
    let count = beside + 1;
    let extra = format!(
        "manage_vips = false\ncapacity = {{ services = {}, vips = {}, backends = {}, buckets = {} }}",
        count.max(16),
        (count * 2).max(16),
        (count * 3 * families.len()).max(16),
        2 * USUAL as usize + beside * SMALL as usize,
    );
    let options = AgentOptions { extra, ..AgentOptions::native(topology) };
    let mut agent = Agent::prepare(&topology.balancer, &options, &text);
    start(&mut agent)?;
    agent.wait_ready();
    let mut control = Control::open(&agent.socket())?;
    let (mut seen, mut took, mut moved) = (Vec::new(), Vec::new(), 0);
    for share in SHARES.iter().cycle().take(arguments.splits) {
        let body = format!("{{\"split\": {{\"v2\": \"{share}\"}}}}");
        let called = Instant::now();
        let answer = control.ask("PUT", "/v1/services/shop/split", body.as_bytes())?;
        seen.push(called.elapsed());
        ensure!(answer.status == 200, "{}", String::from_utf8_lossy(&answer.body));
        let report: ChangeReport = answer.json();
        ensure!(report.applied && report.buckets_moved > 0, "{report:?}");
        moved += u64::from(report.buckets_moved);
        took.push(Duration::from_micros(report.took_us));
    }
    let mut panics = Vec::new();
    for _ in 0..PANICS {
        let back: ChangeReport = agent.json(&["split", "shop", "v2=50%"]);
        ensure!(back.applied && back.buckets_moved > 0, "{back:?}");
        let report: PanicReport = agent.json(&["panic", "shop"]);
        ensure!(report.applied && report.buckets_moved > 0, "{report:?}");
        panics.push(Duration::from_micros(report.took_us));
    }
    let _: ChangeReport = agent.json(&["split", "shop", "v2=50%"]);
    let of_all: PanicReport = agent.json(&["panic"]);
    ensure!(of_all.services.len() == count, "a panic of {} services", of_all.services.len());
    Ok(Splits {
        services: count,
        panic: quantiles(panics),
        panic_of_all_us: of_all.maps_us.unwrap_or(of_all.took_us),
        families: families.len(),
        forward,
        calls: arguments.splits,
        buckets_moved: moved,
        round_trip: quantiles(seen),
        in_force: quantiles(took),
    })
}

/// Writes a service's tables of both families, all of whose buckets are in turn one backend's and another's.
fn writes(buckets: u32) -> Result<Writes> {
    eprintln!("tables of {buckets} buckets");
    let rounds = if buckets > USUAL { 40 } else { 400 };
    let plane = |table: &str| {
        let backends = vec![1, 2];
        let service = Service { backends, table: table.to_owned(), buckets, ..Service::default() };
        World { service: vec![service], ..World::default() }
            .plane(|name| bail!("no interface {name}"))
            .map(|plane| plane.plane)
    };
    let planes = [plane("b1")?, plane("b2")?];
    let sizes = Sizes { buckets: 2 * buckets, ..Sizes::default() };
    let mut loaded = Loaded::new(&planes[1], &sizes)?;
    let (mut entries, began) = (0, Instant::now());
    for plane in planes.iter().cycle().take(rounds) {
        entries += loaded.datapath.apply(plane)?.entries;
    }
    let took = began.elapsed();
    ensure!(entries == rounds * 2 * buckets as usize, "{entries} entries in {rounds} rounds");
    Ok(Writes { buckets, rounds, entries_per_second: entries as f64 / took.as_secs_f64() })
}

fn reloads(topology: &Topology, count: usize) -> Result<Vec<Reload>> {
    eprintln!("reloads of {count} services");
    let options = options(topology, count);
    let text = |changed, weight| services(topology, count, false, (changed, weight));
    let mut agent = Agent::prepare(&topology.balancer, &options, &text(0, 1));
    start(&mut agent)?;
    agent.wait_ready();
    let mut rows = Vec::new();
    for (changed, weight) in [(0, 1), (1, 2), (count.min(100), 3), (count, 4)] {
        agent.configure(&options, &text(changed, weight));
        let report: ReloadReport = agent.json(&["reload"]);
        ensure!(report.services.len() == changed, "{} have changed", report.services.len());
        rows.push(Reload {
            services: count,
            changed,
            took_ms: report.took_us as f64 / 1e3,
            loop_ms: report.busy_us as f64 / 1e3,
        });
    }
    Ok(rows)
}

pub(crate) fn quantiles(mut times: Vec<Duration>) -> Quantiles {
    times.sort_unstable();
    let at = |q: f64| times[((times.len() - 1) as f64 * q).round() as usize].as_micros() as u64;
    Quantiles { p50_us: at(0.5), p99_us: at(0.99), max_us: at(1.0) }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn print(report: &Report) {
    let Report { kernel, services, splits, writes, reloads, counters } = report;
    println!("kernel {kernel}\n");
    println!(
        "{:>8} {:>8} {:<7} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>9}",
        "services",
        "buckets",
        "checks",
        "cold ms",
        "adopt ms",
        "RSS MB",
        "own MB",
        "maps MB",
        "peak MB",
        "idle %",
        "wakeups/s"
    );
    let mb = |bytes: u64| bytes as f64 / 1e6;
    for row in services {
        let Memory { resident_bytes, anonymous_bytes, maps_bytes, peak_bytes, .. } = row.memory;
        println!(
            "{:>8} {:>8} {:<7} {:>8} {:>9} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>7.2} {:>9.1}",
            row.services,
            row.buckets,
            if row.checks { "on" } else { "off" },
            row.cold_ms,
            row.adopting_ms,
            mb(resident_bytes),
            mb(anonymous_bytes),
            mb(maps_bytes),
            mb(peak_bytes),
            row.idle_percent,
            row.idle_wakeups_per_second,
        );
    }
    println!("\n{:<48} {:>9} {:>9} {:>9}", "splits, ms", "p50", "p99", "longest");
    let ms = |us: u64| us as f64 / 1e3;
    for row in splits {
        let Splits { services, families, forward, .. } = row;
        let of = format!("{services} services, {forward}, {families} families");
        let times =
            [("round trip", &row.round_trip), ("in force", &row.in_force), ("panic", &row.panic)];
        for (what, times) in times {
            let name = format!("{of}, {what}");
            println!(
                "{name:<48} {:>9.2} {:>9.2} {:>9.2}",
                ms(times.p50_us),
                ms(times.p99_us),
                ms(times.max_us)
            );
        }
        println!("{:<48} {:>9.2}", format!("{of}, panic of all"), ms(row.panic_of_all_us));
    }
    for Writes { buckets, entries_per_second, .. } in writes {
        println!(
            "a table of {buckets} buckets, all changed: {:.1} million entries a second",
            entries_per_second / 1e6
        );
    }
    println!("\n{:<30} {:>9} {:>9}", "reloads, ms", "took", "of loop");
    for row in reloads {
        let name = format!("{} of {} services changed", row.changed, row.services);
        println!("{name:<30} {:>9.0} {:>9.0}", row.took_ms, row.loop_ms);
    }
    if let Some(counters) = counters {
        counters::print(counters);
    }
}
