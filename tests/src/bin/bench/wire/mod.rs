//! Packets a second through veth pairs, and time on processors for each: our program beside the
//! least that programs do, the kernel's forwarding and nftables, each in hosts of its own that are
//! built alike.
//!
//! All stand ready, and take turns: within a round each is measured once, and a figure is the
//! median of the rounds. Packets are counted where they arrive.

mod hosts;
mod live;
mod sockets;
mod table;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use canary_tests::{binary, host, stream::PORTS, topology::Family, wait};
use serde::Serialize;

use crate::{
    cpu::{Look, Spent},
    packet::{kernel, median},
};

/// The exit code for a host that may not run this (SPEC: not permitted).
const NOT_PERMITTED: u8 = 77;

/// What is aimed at: of packets a second of the MAC swap, and of nftables' with frames and with
/// sockets.
const OF_SWAP: f64 = 0.9;
const OF_NFTABLES: f64 = 3.0;
const OF_NFTABLES_SOCKETS: f64 = 1.3;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How often each is measured, the median of which counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// Seconds of a measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Source ports: a power of two, 4,096 at most
    #[arg(long, default_value_t = PORTS)]
    ports: u16,
    /// Datagrams a second where sockets are not to send as many as they can
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1_000..))]
    pace: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a page with the figures and plots of them
    #[arg(long)]
    html: Option<PathBuf>,
}

/// What was measured once.
#[derive(Clone, Copy, Debug)]
struct Sample {
    packets_per_second: f64,
    /// Of all processors together.
    cpu_ns: f64,
    /// Of our threads.
    own_ns: f64,
    /// Of all that were sent, the part that did not arrive.
    lost: f64,
}

impl Sample {
    fn new(packets: u64, spent: &Spent, sent: u64, arrived: u64) -> Self {
        Self {
            packets_per_second: packets as f64 / spent.wall.as_secs_f64(),
            cpu_ns: spent.busy.as_nanos() as f64 / packets.max(1) as f64,
            own_ns: spent.own.as_nanos() as f64 / packets.max(1) as f64,
            lost: 1.0 - arrived as f64 / sent.max(1) as f64,
        }
    }
}

/// The medians of some rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Figures {
    packets_per_second: f64,
    /// The slowest round, and the fastest.
    least: f64,
    most: f64,
    /// Time on all processors for each that arrived, whoever was at work.
    cpu_ns: f64,
    /// Time of the threads that send and receive, with all that comes of it.
    own_ns: f64,
    lost: f64,
}

impl Figures {
    fn of(rounds: &[Sample]) -> Self {
        let all = |field: fn(&Sample) -> f64| rounds.iter().map(field).collect::<Vec<_>>();
        let rates = all(|s| s.packets_per_second);
        Self {
            least: rates.iter().copied().fold(f64::INFINITY, f64::min),
            most: rates.iter().copied().fold(0.0, f64::max),
            packets_per_second: median(rates),
            cpu_ns: median(all(|s| s.cpu_ns)),
            own_ns: median(all(|s| s.own_ns)),
            lost: median(all(|s| s.lost)),
        }
    }
}

/// How much of others' packets a second, or time, each round had; the median.
fn ratio(these: &[Sample], others: &[Sample], field: fn(&Sample) -> f64) -> f64 {
    median(these.iter().zip(others).map(|(one, other)| field(one) / field(other)).collect())
}

/// Frames that the kernel makes.
#[derive(Debug, Serialize)]
struct Row {
    subject: &'static str,
    family: u8,
    /// Processors that send.
    generators: usize,
    #[serde(flatten)]
    figures: Figures,
    /// Packets a second, of those of the MAC swap of the family.
    of_swap: f64,
    /// The same of nftables.
    of_nftables: Option<f64>,
}

/// Datagrams from sockets.
#[derive(Debug, Serialize)]
struct SocketRow {
    subject: &'static str,
    /// As many as there can be.
    flat_out: Figures,
    /// At a pace that each of them can keep.
    paced: Figures,
    /// Packets a second.
    of_nftables: Option<f64>,
    /// Time on processors for each, paced.
    cpu_of_forwarding: f64,
    /// The same of the threads' time.
    own_of_forwarding: f64,
}

/// Something that is aimed at.
#[derive(Debug, Serialize)]
struct Target {
    what: String,
    is: f64,
    aimed_at: f64,
    met: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    processors: usize,
    load_average: Option<f64>,
    rounds: u16,
    seconds: f64,
    ports: u16,
    pace: u32,
    /// Percent of all processors that others were busy with while nothing was measured.
    others_percent: f64,
    /// What could not be measured, and why.
    missing: Vec<String>,
    frames: Vec<Row>,
    sockets: Vec<SocketRow>,
    targets: Vec<Target>,
}

pub(crate) fn run(options: &Arguments) -> Result<ExitCode> {
    ensure!(
        (0.05..=60.0).contains(&options.seconds),
        "--seconds: from 0.05 to 60, and the clock's ticks of 10 ms ask for 1"
    );
    ensure!(
        options.ports.is_power_of_two() && options.ports <= PORTS,
        "--ports: a power of two, {PORTS} at most"
    );
    wait::interrupt_on_signals();
    if let Some(reason) = host::obstacle() {
        eprintln!("bench wire: {reason}: run it as root");
        return Ok(ExitCode::from(NOT_PERMITTED));
    }
    match catch_unwind(AssertUnwindSafe(|| measure(options))) {
        Ok(report) => show(options, &report?)?,
        Err(panic) if panic.is::<wait::Interrupted>() => {
            eprintln!("bench wire: interrupted; everything is taken down");
            return Ok(ExitCode::from(130));
        }
        Err(_) => return Ok(ExitCode::FAILURE),
    }
    Ok(ExitCode::SUCCESS)
}

fn show(options: &Arguments, report: &Report) -> Result<()> {
    if let Some(path) = &options.html {
        fs::write(path, table::page(report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{}", table::text(report)?);
    }
    Ok(())
}

/// This thread stays on a processor from now on.
fn stay_on(cpu: usize) -> Result<()> {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(cpu)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
    Ok(())
}

fn measure(options: &Arguments) -> Result<Report> {
    let mut missing = Vec::new();
    let with_nftables = binary::installed("nft").is_some();
    if !with_nftables {
        let what = "nftables: there is no nft (apt-get install --no-install-recommends nftables)";
        eprintln!("bench wire: without {what}");
        missing.push(what.to_owned());
    }
    let window = Duration::from_secs_f64(options.seconds);
    let processors = std::thread::available_parallelism()?.get();
    let world = live::World::new(with_nftables)?;
    let with_sockets = sockets::World::new(with_nftables, options.ports)?;
    let _agents = [
        world.ours.hosts.agent(&live::OURS.map(|(_, service)| service)),
        with_sockets.ours.agent(&sockets::World::SERVICES),
    ];
    let (frames, datagrams) = (world.subjects(options.ports)?, with_sockets.subjects());
    let mut forms = vec![1];
    if processors > 1 {
        forms.push(processors);
    }
    let mut others = Vec::new();
    let mut of_frames = vec![vec![Vec::new(); frames.len()]; forms.len()];
    let mut of_sockets = vec![[Vec::new(), Vec::new()]; datagrams.len()];
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        let before = Look::now()?;
        wait::pause_until(Instant::now() + window.min(Duration::from_millis(500)));
        wait::check();
        others.push(Look::now()?.since(&before).busy_percent());
        for (generators, samples) in forms.iter().zip(&mut of_frames) {
            for (subject, samples) in frames.iter().zip(samples) {
                samples.push(subject.measure(*generators, window)?);
            }
        }
        for (subject, samples) in datagrams.iter().zip(&mut of_sockets) {
            for (pace, samples) in [None, Some(options.pace)].into_iter().zip(samples) {
                samples.push(subject.measure(pace, window)?);
            }
        }
    }
    let rows = forms.iter().zip(&of_frames).flat_map(|(generators, all)| {
        rows(*generators, &frames.iter().map(|s| (s.name, s.family)).collect::<Vec<_>>(), all)
    });
    let rows: Vec<_> = rows.collect();
    let names: Vec<_> = datagrams.iter().map(|subject| subject.name).collect();
    let socket_rows = socket_rows(&names, &of_sockets);
    let load_average = fs::read_to_string("/proc/loadavg").ok();
    Ok(Report {
        kernel: kernel(),
        processors,
        load_average: load_average.and_then(|text| text.split(' ').next()?.parse().ok()),
        rounds: options.rounds,
        seconds: options.seconds,
        ports: options.ports,
        pace: options.pace,
        others_percent: median(others),
        missing,
        targets: targets(&rows, &socket_rows),
        frames: rows,
        sockets: socket_rows,
    })
}

fn rows(
    generators: usize,
    subjects: &[(&'static str, Family)],
    samples: &[Vec<Sample>],
) -> Vec<Row> {
    let of = |name: &str, family: Family| {
        let at = subjects.iter().position(|subject| *subject == (name, family))?;
        Some(samples[at].as_slice())
    };
    let rates = |sample: &Sample| sample.packets_per_second;
    let rows = subjects.iter().zip(samples).map(|((name, family), these)| Row {
        subject: name,
        family: if *family == Family::V4 { 4 } else { 6 },
        generators,
        figures: Figures::of(these),
        of_swap: of(live::SWAP, *family).map_or(f64::NAN, |swap| ratio(these, swap, rates)),
        of_nftables: of(live::NFTABLES, *family).map(|other| ratio(these, other, rates)),
    });
    rows.collect()
}

fn socket_rows(names: &[&'static str], samples: &[[Vec<Sample>; 2]]) -> Vec<SocketRow> {
    let of = |name: &str| names.iter().position(|one| *one == name).map(|at| &samples[at]);
    let of_forwarding = |these: &[Sample], field| {
        of(live::FORWARDING).map_or(f64::NAN, |[_, other]| ratio(these, other, field))
    };
    let rows = names.iter().zip(samples).map(|(name, [flat_out, paced])| SocketRow {
        subject: name,
        flat_out: Figures::of(flat_out),
        paced: Figures::of(paced),
        of_nftables: of(live::NFTABLES)
            .map(|[other, _]| ratio(flat_out, other, |sample| sample.packets_per_second)),
        cpu_of_forwarding: of_forwarding(paced, |sample| sample.cpu_ns),
        own_of_forwarding: of_forwarding(paced, |sample| sample.own_ns),
    });
    rows.collect()
}

fn targets(rows: &[Row], sockets: &[SocketRow]) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut least = |what: String, is: f64, aimed_at: f64| {
        targets.push(Target { what, is, aimed_at, met: is >= aimed_at });
    };
    for row in rows.iter().filter(|row| row.subject.starts_with("ours")) {
        let Row { subject, family, generators, of_swap, of_nftables, .. } = row;
        let whose = format!("{subject}, IPv{family}, {generators} generators");
        least(format!("{whose}: packets a second of the MAC swap's"), *of_swap, OF_SWAP);
        if let Some(is) = of_nftables {
            least(format!("{whose}: packets a second of nftables'"), *is, OF_NFTABLES);
        }
    }
    let ours = || sockets.iter().filter(|row| row.subject.starts_with("ours"));
    for SocketRow { subject, of_nftables, .. } in ours() {
        if let Some(is) = of_nftables {
            let what = format!("{subject}, sockets: packets a second of nftables'");
            least(what, *is, OF_NFTABLES_SOCKETS);
        }
    }
    for SocketRow { subject, cpu_of_forwarding: is, .. } in ours() {
        let what = format!("{subject}, sockets: time on processors of the kernel's forwarding's");
        targets.push(Target { what, is: *is, aimed_at: 1.0, met: *is <= 1.0 });
    }
    targets
}
