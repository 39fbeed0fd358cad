//! Figures of the packet path (`cargo xtask bench packet`, `bench flows`, `bench audiences`) and of the agent
//! (`bench control`).
//!
//! What a packet costs over an empty program, by `BPF_PROG_TEST_RUN` with a repeat of one,
//! so that each run starts with the packet as it arrived: median, mean and 99th percentile of
//! many runs, and the least of some rounds. Within a round the programs take turns in blocks, so
//! that noise hits all alike. All of it several times with the programs loaded anew, the median of
//! which counts: where they and their maps come to lie in memory is worth several nanoseconds.

mod audiences;
mod control;

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use canary_agent::plan::Family;
use canary_ebpf_common::{
    abi::Sampling,
    signals::mask,
    steer::{TCP_ACK, TCP_SYN},
};
use canary_tests::{
    bpf,
    loaded::{Loaded, Sizes, XDP_PASS, XDP_TX},
    names::Host,
    notation::parse,
    world::{Service, World},
};
use clap::Parser;
use serde::Serialize;

/// Benchmarks of canary-xdp.
#[derive(Parser)]
#[command(about, long_about = None)]
enum Command {
    /// Nanoseconds a packet, and the program's size
    Packet(Packet),
    /// A table full of flows: its memory, the time of a pass over it, and packets meanwhile
    Flows(Flows),
    /// Packets of clients with routes, and networks on their way into the kernel
    Audiences(audiences::Arguments),
    /// The agent itself: start, memory, idle time, splits and reloads
    Control(control::Arguments),
}

#[derive(clap::Args)]
struct Flows {
    /// Entries of the table, all of which are in use
    #[arg(long, default_value_t = 4_000_000)]
    flows: u32,
}

#[derive(clap::Args)]
struct Packet {
    /// How often the programs are loaded, the median of which counts
    #[arg(long, default_value_t = 5)]
    loads: usize,
    /// Runs of each kind of packet in a round
    #[arg(long, default_value_t = 40_000)]
    runs: usize,
    /// Rounds, the least of which counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Flows where there are many
    #[arg(long, default_value_t = 50_000)]
    flows: usize,
    /// Runs of one kind before it is the next one's turn. The shorter, the more each finds the
    /// others' data in the caches instead of its own: 2,000 shows what a table costs that is cold
    #[arg(long, default_value_t = 50_000)]
    block: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Fills the IPv4 table with half-open flows of a service whose buckets have moved, and sweeps it:
/// first while all may stay, then when all have expired.
fn flows(options: &Flows) -> Result<()> {
    let service = Service {
        backends: vec![1, 2],
        table: "b2 was b1".to_owned(),
        buckets: 65_536,
        ..Service::default()
    };
    let steady = Service {
        vips: vec![Host::Vip(2).name()],
        backends: vec![11, 12],
        buckets: 65_536,
        ..Service::default()
    };
    let world = World { service: vec![service, steady], flows: options.flows, ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}"))?;
    let before = available_bytes()?;
    let mut loaded = Loaded::new(&plane.plane, &world.sizes())?;
    let maps = loaded.datapath.reader().maps();
    let bytes = maps.iter().find(|map| map.name == "FLOWS_V4").map_or(0, |map| map.memory_bytes);
    println!(
        "table of {} entries: {:.1} MB by the kernel's account, {:.1} MB less available for both families",
        options.flows,
        bytes as f64 / 1e6,
        (before.saturating_sub(available_bytes()?)) as f64 / 1e6
    );
    let mut syn = frame(Family::V4, 0, Host::Vip(1), "S seq=1000")?;
    let began = Instant::now();
    for n in 0..options.flows {
        // Source address and port; the program does not look at checksums.
        syn[27..30].copy_from_slice(&n.to_be_bytes()[1..]);
        syn[34..36].copy_from_slice(&(10_000 + (n >> 16) as u16).to_be_bytes());
        ensure!(loaded.time_ns(&syn)? < u32::MAX, "a run");
    }
    println!("filled in {:?}", began.elapsed());
    let data = frame(Family::V4, 0, Host::Vip(2), "A seq=1001")?;
    let mut quiet = Vec::new();
    let (mut latest, mut last) = (Duration::ZERO, Instant::now());
    while quiet.len() < 2_000_000 {
        quiet.push(loaded.time_ns(&data)?);
        latest = latest.max(last.elapsed());
        last = Instant::now();
    }
    println!(
        "no pass under way: gross ns {:?}, the longest gap between two packets {latest:?}",
        figures(&mut quiet)
    );
    for round in ["nothing to remove", "everything to remove"] {
        if round.starts_with("every") {
            std::thread::sleep(Duration::from_secs(11));
        }
        let sweeper = loaded.datapath.sweeper()?;
        let over = Arc::new(AtomicBool::new(false));
        let pass = {
            let over = Arc::clone(&over);
            let mut sweeper = sweeper;
            std::thread::spawn(move || {
                // As the agent's thread. Where it is refused, the figures say so.
                // SAFETY: no memory is involved.
                unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
                let began = Instant::now();
                let swept = sweeper.pass(&[]);
                over.store(true, Ordering::Relaxed);
                (began.elapsed(), swept)
            })
        };
        let mut busy = Vec::new();
        let (mut latest, mut last) = (Duration::ZERO, Instant::now());
        while !over.load(Ordering::Relaxed) {
            busy.push(loaded.time_ns(&data)?);
            latest = latest.max(last.elapsed());
            last = Instant::now();
        }
        let (took, swept) = pass.join().map_err(|_| anyhow::anyhow!("the pass has panicked"))?;
        println!(
            "{round}: a pass took {took:?} ({:?}); {} packets meanwhile, gross ns {:?}, the longest gap between two {latest:?}",
            swept?,
            busy.len(),
            figures(&mut busy),
        );
    }
    Ok(())
}

/// `MemAvailable` of the host, bytes.
fn available_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no MemAvailable")?;
    Ok(kib.trim().parse::<u64>()? * 1024)
}

/// A kind of packet to measure.
struct Kind {
    name: &'static str,
    family: Family,
    frames: Vec<Vec<u8>>,
    /// What the program answers.
    action: u32,
    /// Each run is a flow that is not known yet; there is one frame, whose client changes.
    new: bool,
    /// By the program without signals.
    bare: bool,
}

/// The frame as the `nth` new client sends it. Checksums stay: the program looks at none.
fn as_client(frame: &mut [u8], family: Family, nth: u32) {
    let (addr, port) = if family == Family::V4 { (28, 34) } else { (36, 54) };
    frame[addr..addr + 2].copy_from_slice(&((nth >> 12) as u16).to_be_bytes());
    frame[port..port + 2].copy_from_slice(&(20_000 + (nth & 0xfff) as u16).to_be_bytes());
}

/// Nanoseconds, net of the empty program's.
#[derive(Clone, Copy, Debug, Serialize)]
struct Figures {
    median_ns: f64,
    mean_ns: f64,
    p99_ns: f64,
}

#[derive(Serialize)]
struct Row {
    packet: &'static str,
    family: u8,
    flows: usize,
    #[serde(flatten)]
    net: Figures,
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    loads: usize,
    runs: usize,
    rounds: usize,
    block: usize,
    empty: Figures,
    rows: Vec<Row>,
    verified_insns: Option<u32>,
    xlated_bytes: Option<u32>,
    jited_bytes: u32,
}

fn main() -> Result<()> {
    let options = match Command::parse() {
        Command::Packet(options) => options,
        Command::Flows(options) => return flows(&options),
        Command::Audiences(arguments) => return audiences::run(&arguments),
        Command::Control(arguments) => return control::run(&arguments),
    };
    ensure!(
        [options.loads, options.runs, options.rounds, options.flows, options.block]
            .iter()
            .all(|n| *n > 0),
        "nothing to measure"
    );
    let report = measure(&options)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

/// Services with watched connections: by address, the part that is watched, in halvings.
const WATCHED: [(u16, &str, u32); 4] = [(4, "dsr", 6), (5, "dsr", 0), (6, "nat", 6), (7, "nat", 0)];

/// The world that is measured: a service of each mode, one whose buckets have moved, and
/// [`WATCHED`].
fn world(flows: usize) -> World {
    let service = |vip: u16, mode: &str, table: &str| Service {
        vips: vec![Host::Vip(vip).name()],
        mode: mode.to_owned(),
        backends: (1..=4).map(|n| vip * 10 + n).collect(),
        table: table.to_owned(),
        buckets: 65_536,
        ..Service::default()
    };
    let watched =
        WATCHED.map(|(vip, mode, _)| Service { signals: true, ..service(vip, mode, "all") });
    let others = [
        service(1, "dsr", "all"),
        service(2, "nat", "all"),
        service(3, "dsr", "b32 was b31"),
        service(8, "ipip", "all"),
        service(9, "gue", "all"),
    ];
    World {
        service: others.into_iter().chain(watched).collect(),
        // Two entries for a translated flow and one for a tracked one, and room to spare.
        flows: flows as u32 * 8 + 1024,
        nat_ports: (10_000, 59_999),
        ..World::default()
    }
}

/// The frame of flow number `i` to a host.
fn frame(family: Family, i: usize, to: Host, segment: &str) -> Result<Vec<u8>> {
    let ip = if family == Family::V4 { "ip" } else { "ip6" };
    let client = Host::Client(1 + (i % 250) as u16).name();
    let port = 1024 + i / 250;
    parse(&format!("eth client > us / {ip} {client} > {} / tcp {port} > 80 {segment}", to.name()))
}

/// The backend's answer to a frame that the program sent it: the same with its ends swapped.
fn answer(sent: &[u8], family: Family) -> Vec<u8> {
    let mut frame = sent.to_vec();
    let mut swap = |at: usize, bytes: usize| {
        let (left, right) = frame[at..at + 2 * bytes].split_at_mut(bytes);
        left.swap_with_slice(right);
    };
    swap(0, 6);
    match family {
        Family::V4 => {
            swap(26, 4);
            swap(34, 2);
        }
        Family::V6 => {
            swap(22, 16);
            swap(54, 2);
        }
    }
    frame
}

/// The backend's SYN-ACK to a SYN numbered 1000 that the program sent it.
fn syn_ack(sent: &[u8], family: Family) -> Vec<u8> {
    let mut frame = answer(sent, family);
    let tcp = if family == Family::V4 { 34 } else { 54 };
    frame[tcp + 4..tcp + 8].copy_from_slice(&5000_u32.to_be_bytes());
    frame[tcp + 8..tcp + 12].copy_from_slice(&1001_u32.to_be_bytes());
    frame[tcp + 13] = TCP_SYN | TCP_ACK;
    frame
}

/// Says what is watched of [`WATCHED`], whose services have these ids.
fn watch(loaded: &mut Loaded, ids: &[[u16; 2]]) -> Result<()> {
    let mut maps = loaded.datapath.signals()?;
    for (vip, _, halvings) in WATCHED {
        for id in ids[usize::from(vip) - 1] {
            let sampling =
                Sampling { mask: mask(halvings), epoch: 1, whose: 1, ..Sampling::default() };
            maps.set(Sampling::place(id.into(), 0), sampling)?;
        }
    }
    Ok(())
}

/// Opens flows of a translated service. Returns the client's packets on them, and the backend's.
fn translated(
    loaded: &mut Loaded,
    family: Family,
    flows: usize,
    vip: u16,
) -> Result<[Vec<Vec<u8>>; 2]> {
    let frames = |segment: &str| -> Result<Vec<_>> {
        (0..flows).map(|i| frame(family, i, Host::Vip(vip), segment)).collect()
    };
    for syn in frames("S seq=1000")? {
        let sent = loaded.run(&syn)?;
        ensure!(sent.action == XDP_TX, "a flow was refused");
        ensure!(
            loaded.run(&syn_ack(&sent.frame, family))?.action == XDP_TX,
            "an answer was refused"
        );
    }
    let forward = frames("A seq=1001 ack=5001")?;
    let back =
        forward.iter().map(|f| Ok(answer(&loaded.run(f)?.frame, family))).collect::<Result<_>>()?;
    Ok([forward, back])
}

/// The kinds that say what signals cost where nothing is watched, by the program without them.
fn bare_kinds(loaded: &mut Loaded, flows: usize) -> Result<Vec<Kind>> {
    let mut kinds = Vec::new();
    for family in [Family::V4, Family::V6] {
        let mut add = |name, frames| {
            kinds.push(Kind { name, family, frames, action: XDP_TX, new: false, bare: true });
        };
        let dsr = (0..flows).map(|i| frame(family, i, Host::Vip(1), "A seq=1001"));
        add("dsr, no signals", dsr.collect::<Result<_>>()?);
        let [forward, back] = translated(loaded, family, flows, 2)?;
        add("nat to backend, no signals", forward);
        add("nat to client, no signals", back);
    }
    Ok(kinds)
}

/// Every kind of packet in `flows` flows, with the entries that it meets made beforehand.
fn kinds(loaded: &mut Loaded, flows: usize) -> Result<Vec<Kind>> {
    let mut kinds = Vec::new();
    for family in [Family::V4, Family::V6] {
        let frames = |to: Host, segment: &str| -> Result<Vec<_>> {
            (0..flows).map(|i| frame(family, i, to, segment)).collect()
        };
        let mut add = |name, action, frames| {
            kinds.push(Kind { name, family, frames, action, new: false, bare: false });
        };
        add("pass, no service", XDP_PASS, frames(Host::Us, "A seq=1001")?);
        add("dsr", XDP_TX, frames(Host::Vip(1), "A seq=1001")?);
        add("ipip", XDP_TX, frames(Host::Vip(8), "A seq=1001")?);
        add("gue", XDP_TX, frames(Host::Vip(9), "A seq=1001")?);
        for vip in [Host::Vip(3), Host::Vip(4), Host::Vip(5)] {
            for syn in frames(vip, "S seq=1000")? {
                ensure!(loaded.run(&syn)?.action == XDP_TX, "a flow was refused");
            }
        }
        let [forward, back] = translated(loaded, family, flows, 2)?;
        add("nat, to the backend", XDP_TX, forward);
        add("nat, back to the client", XDP_TX, back);
        add("dsr tracked, hit", XDP_TX, frames(Host::Vip(3), "A seq=1001")?);
        add("dsr, 1 in 64 watched", XDP_TX, frames(Host::Vip(4), "A seq=1001 ack=5001")?);
        add("dsr, watched", XDP_TX, frames(Host::Vip(5), "A seq=1001 ack=5001")?);
        let [forward, back] = translated(loaded, family, flows, 6)?;
        add("nat to backend, 1 in 64", XDP_TX, forward);
        add("nat to client, 1 in 64", XDP_TX, back);
        let [forward, back] = translated(loaded, family, flows, 7)?;
        add("nat to backend, watched", XDP_TX, forward);
        add("nat to client, watched", XDP_TX, back);
        // Flows that nobody has opened.
        let strangers: Vec<_> = (0..flows)
            .map(|i| frame(family, i + 250 * 1000, Host::Vip(3), "A seq=1001"))
            .collect::<Result<_>>()?;
        add("dsr tracked, miss", XDP_TX, strangers);
    }
    for kind in &kinds {
        for frame in &kind.frames {
            let action = loaded.run(frame)?.action;
            ensure!(action == kind.action, "{}: action {action}", kind.name);
        }
    }
    Ok(kinds)
}

/// What opens flows: each run another one.
fn openings() -> Result<Vec<Kind>> {
    let mut kinds = Vec::new();
    for family in [Family::V4, Family::V6] {
        for (name, vip) in [("dsr tracked, SYN insert", 3), ("nat, new flow", 2)] {
            let frames = vec![frame(family, 0, Host::Vip(vip), "S seq=1000")?];
            kinds.push(Kind { name, family, frames, action: XDP_TX, new: true, bare: false });
        }
    }
    Ok(kinds)
}

/// Opens `count` flows in tables that are empty before and after. Returns what each took.
fn open(loaded: &mut Loaded, kind: &mut Kind, count: usize) -> Result<Vec<u32>> {
    let sent = |loaded: &Loaded| loaded.reasons().iter().sum::<u64>();
    let before = sent(loaded);
    let frame = kind.frames.first_mut().context("a frame")?;
    let durations = (0..count as u32)
        .map(|nth| {
            as_client(frame, kind.family, nth);
            loaded.time_ns(frame)
        })
        .collect::<Result<_>>()?;
    ensure!(sent(loaded) == before, "{}: some were refused or passed", kind.name);
    let entries = loaded.flows_v4.len() + loaded.flows_v6.len();
    ensure!(entries >= count, "{}: {entries} entries of {count} flows", kind.name);
    loaded.flows_v4.clear()?;
    loaded.flows_v6.clear()?;
    Ok(durations)
}

fn figures(durations: &mut [u32]) -> Figures {
    durations.sort_unstable();
    let at = |part: f64| f64::from(durations[((durations.len() - 1) as f64 * part) as usize]);
    let sum: f64 = durations.iter().map(|d| f64::from(*d)).sum();
    Figures { median_ns: at(0.5), mean_ns: sum / durations.len() as f64, p99_ns: at(0.99) }
}

fn least(rounds: &[Figures]) -> Figures {
    let of = |field: fn(&Figures) -> f64| rounds.iter().map(field).fold(f64::INFINITY, f64::min);
    Figures { median_ns: of(|f| f.median_ns), mean_ns: of(|f| f.mean_ns), p99_ns: of(|f| f.p99_ns) }
}

/// What is in the middle of several loads, for each figure by itself.
fn middle(loads: &[Figures]) -> Figures {
    let of = |field: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = loads.iter().map(field).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Figures { median_ns: of(|f| f.median_ns), mean_ns: of(|f| f.mean_ns), p99_ns: of(|f| f.p99_ns) }
}

/// The empty program.
struct Empty {
    program: OwnedFd,
    frame: Vec<u8>,
    out: Vec<u8>,
}

impl Empty {
    fn time_ns(&mut self) -> Result<u32> {
        Ok(bpf::run(self.program.as_fd(), &self.frame, None, &mut self.out)?.duration_ns)
    }
}

fn measure(options: &Packet) -> Result<Report> {
    let mut report = measure_one_load(options)?;
    let mut empties = vec![report.empty];
    let mut loads: Vec<_> = report.rows.iter().map(|row| vec![row.net]).collect();
    for _ in 1..options.loads {
        let another = measure_one_load(options)?;
        empties.push(another.empty);
        for (loads, row) in loads.iter_mut().zip(another.rows) {
            loads.push(row.net);
        }
    }
    report.empty = middle(&empties);
    for (row, loads) in report.rows.iter_mut().zip(&loads) {
        row.net = middle(loads);
    }
    Ok(report)
}

fn measure_one_load(options: &Packet) -> Result<Report> {
    let measured = world(options.flows);
    let plane = measured.plane(|name| anyhow::bail!("no interface {name}"))?;
    // On one processor: the other's caches are cold.
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
    let mut report = Report {
        kernel: nix::sys::utsname::uname()
            .map(|u| u.release().to_string_lossy().into_owned())
            .unwrap_or_default(),
        loads: options.loads,
        runs: options.runs,
        rounds: options.rounds,
        block: options.block,
        empty: Figures { median_ns: 0.0, mean_ns: 0.0, p99_ns: 0.0 },
        rows: Vec::new(),
        verified_insns: None,
        xlated_bytes: None,
        jited_bytes: 0,
    };
    let mut empties = Vec::new();
    for flows in [1, options.flows] {
        let samples = (flows as u32 * 4).max(1024);
        let sizes = Sizes { samples, ..measured.sizes() };
        let mut loaded = Loaded::new(&plane.plane, &sizes)?;
        watch(&mut loaded, &plane.ids)?;
        let mut bare = Loaded::new(&plane.plane, &Sizes { samples: 0, ..sizes })?;
        let info = loaded.info()?;
        report.verified_insns = info.verified_instruction_count();
        report.xlated_bytes = info.size_translated();
        report.jited_bytes = info.size_jitted();
        let mut kinds = kinds(&mut loaded, flows)?;
        kinds.extend(bare_kinds(&mut bare, flows)?);
        // New flows are opened in tables of their own, and once is enough.
        let opened = world(options.block);
        let empty_plane = opened.plane(|name| anyhow::bail!("no interface {name}"))?;
        let mut fresh = Loaded::new(&empty_plane.plane, &opened.sizes())?;
        if flows == options.flows {
            kinds.extend(openings()?);
        }
        let mut empty = Empty {
            program: bpf::load_empty().context("loading the empty program")?,
            frame: frame(Family::V4, 0, Host::Us, "A")?,
            out: vec![0; 2048],
        };
        let mut rounds = vec![Vec::new(); kinds.len()];
        for _ in 0..options.rounds {
            let mut base = Vec::with_capacity(options.runs);
            let mut durations = vec![Vec::with_capacity(options.runs); kinds.len()];
            while base.len() < options.runs {
                let block = base.len()..options.runs.min(base.len() + options.block);
                for _ in block.clone() {
                    base.push(empty.time_ns()?);
                }
                for (kind, durations) in kinds.iter_mut().zip(&mut durations) {
                    if kind.new {
                        durations.extend(open(&mut fresh, kind, block.len())?);
                        continue;
                    }
                    let program = if kind.bare { &mut bare } else { &mut loaded };
                    for i in block.clone() {
                        durations.push(program.time_ns(&kind.frames[i % kind.frames.len()])?);
                    }
                }
            }
            empties.push(figures(&mut base));
            for (durations, rounds) in durations.iter_mut().zip(&mut rounds) {
                rounds.push(figures(durations));
            }
        }
        for (kind, rounds) in kinds.iter().zip(&rounds) {
            let net = least(rounds);
            report.rows.push(Row {
                packet: kind.name,
                family: if kind.family == Family::V4 { 4 } else { 6 },
                flows: if kind.new { options.block } else { flows },
                net,
            });
        }
    }
    report.empty = least(&empties);
    for Row { net, .. } in &mut report.rows {
        net.median_ns -= report.empty.median_ns;
        net.mean_ns -= report.empty.mean_ns;
        net.p99_ns -= report.empty.p99_ns;
    }
    Ok(report)
}

fn print(report: &Report) {
    let Report {
        kernel,
        loads,
        runs,
        rounds,
        block,
        empty,
        rows,
        verified_insns,
        xlated_bytes,
        jited_bytes,
    } = report;
    println!(
        "net ns a packet over an empty program; kernel {kernel}, {runs} runs in blocks of {block}, least of {rounds} rounds, median of {loads} loads"
    );
    println!(
        "(the empty program: median {:.0}, mean {:.0}, p99 {:.0})\n",
        empty.median_ns, empty.mean_ns, empty.p99_ns
    );
    println!(
        "{:<26} {:<5} {:>7} {:>8} {:>8} {:>8}",
        "packet", "", "flows", "median", "mean", "p99"
    );
    for Row { packet, family, flows, net } in rows {
        println!(
            "{packet:<26} IPv{family:<2} {flows:>7} {:>8.0} {:>8.1} {:>8.0}",
            net.median_ns, net.mean_ns, net.p99_ns
        );
    }
    let or_unknown = |n: &Option<u32>| n.map_or_else(|| "unknown".to_owned(), |n| n.to_string());
    println!(
        "\nprogram: {} instructions verified, {} bytes translated, {jited_bytes} bytes compiled",
        or_unknown(verified_insns),
        or_unknown(xlated_bytes)
    );
}
