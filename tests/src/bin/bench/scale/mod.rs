//! What a packet costs against the size of what the program knows (`bench scale`): services, clients
//! and flows, networks of audiences, backends. One number grows, the others stay.
//!
//! By `BPF_PROG_TEST_RUN` with single runs, as `bench packet`. Packets come in two ways. *Few* of them
//! in turn, so that what they touch stays in the caches, however large the tables are: what grows
//! then is the program's work. And *all in turn*, in an order that no prefetcher knows: then memory
//! decides, for every program. So each figure stands beside the floor's, a look-up in a hash map
//! that knows the same packets, which come in the same order.

mod page;
mod table;
mod worlds;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use canary_agent::plan::Family;
use canary_tests::{bpf, floor, loaded::XDP_TX};
use serde::Serialize;
use std::os::fd::{AsFd as _, OwnedFd};

use self::worlds::{Crowd, Stream, Subject};
use crate::packet::{Empty, Figures, figures, kernel, least, load_average, middle, stay};

/// Buckets of each service where there are many.
const SMALL: u32 = 4_096;
/// Buckets of a service by default.
const USUAL: u32 = 65_536;
/// Backends of a `nat` service: enough source ports for the most flows.
const TRANSLATED: usize = 256;
/// Clients where it is the number of backends that grows.
const OF_BACKENDS: usize = 50_000;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Numbers of services, each in turn, of 4,096 buckets and two backends each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 4_096])]
    services: Vec<usize>,
    /// Numbers of clients, each with a connection: known flows where they are translated
    #[arg(long, value_delimiter = ',', default_values_t = [1, 50_000, 4_000_000])]
    flows: Vec<usize>,
    /// Numbers of networks of an audience, of 10,000 clients in each of which packets come
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1_000, 100_000, 1_000_000])]
    networks: Vec<usize>,
    /// Numbers of backends of a service
    #[arg(long, value_delimiter = ',', default_values_t = [2, 100, 10_000])]
    backends: Vec<usize>,
    /// Families, each in turn
    #[arg(long, value_delimiter = ',', default_values_t = [4, 6])]
    families: Vec<u8>,
    /// Packets where there are few
    #[arg(long, default_value_t = 16)]
    few: usize,
    /// How often everything is loaded, the median of which counts
    #[arg(long, default_value_t = 3)]
    loads: usize,
    /// Runs of each kind of packet in a round
    #[arg(long, default_value_t = 60_000)]
    runs: usize,
    /// Rounds, the least of which counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a page with the figures and plots of them
    #[arg(long)]
    html: Option<PathBuf>,
}

/// Nanoseconds over the empty program, and those of the floor.
#[derive(Clone, Copy, Serialize)]
struct Cost {
    net: Figures,
    floor: Figures,
}

#[derive(Clone, Serialize)]
struct Row {
    /// What grows.
    grows: &'static str,
    packet: String,
    family: u8,
    /// Of what grows.
    number: usize,
    services: usize,
    clients: usize,
    /// Of each service.
    backends: usize,
    /// Of each service.
    buckets: u32,
    networks: usize,
    few: Cost,
    in_turn: Cost,
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    load_average: Option<f64>,
    loads: usize,
    runs: usize,
    rounds: usize,
    /// Packets where there are few.
    few: usize,
    rows: Vec<Row>,
}

impl Row {
    /// Whether they are of one series.
    fn like(&self, other: &Self) -> bool {
        (self.grows, &self.packet, self.family) == (other.grows, &other.packet, other.family)
    }
}

impl Report {
    /// The rows in series, in each of which one number grows.
    fn series(&self) -> impl Iterator<Item = &[Row]> {
        self.rows.chunk_by(Row::like)
    }
}

pub(crate) fn run(options: &Arguments) -> Result<()> {
    let Arguments { services, flows, backends, loads, runs, rounds, few, .. } = options;
    ensure!([*loads, *runs, *rounds, *few].iter().all(|n| *n > 0), "nothing to measure");
    ensure!(services.iter().all(|n| (1..=4_096).contains(n)), "1 to 4,096 services");
    ensure!(flows.iter().all(|n| (1..=4_000_000).contains(n)), "1 to 4,000,000 flows");
    ensure!(backends.iter().all(|n| (1..=16_000).contains(n)), "1 to 16,000 backends");
    stay()?;
    let mut measured = Vec::new();
    for load in 1..=*loads {
        eprintln!("load {load} of {loads}");
        measured.push(measure(options)?);
    }
    let report = Report {
        kernel: kernel(),
        load_average: load_average(),
        loads: *loads,
        runs: *runs,
        rounds: *rounds,
        few: *few,
        rows: of_all(&measured),
    };
    if let Some(path) = &options.html {
        fs::write(path, page::of(&report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table::of(&report)?);
    }
    Ok(())
}

/// What is in the middle of all loads.
fn of_all(loads: &[Vec<Row>]) -> Vec<Row> {
    let row = |(at, first): (usize, &Row)| {
        let the = |figures: fn(&Row) -> Figures| {
            middle(&loads.iter().map(|load| figures(&load[at])).collect::<Vec<_>>())
        };
        Row {
            few: Cost { net: the(|row| row.few.net), floor: the(|row| row.few.floor) },
            in_turn: Cost { net: the(|row| row.in_turn.net), floor: the(|row| row.in_turn.floor) },
            ..first.clone()
        }
    };
    loads.first().into_iter().flatten().enumerate().map(row).collect()
}

/// Every row, of one load.
fn measure(options: &Arguments) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for number in &options.families {
        let family = match number {
            4 => Family::V4,
            6 => Family::V6,
            other => bail!("IPv{other} is no family: 4 and 6 are"),
        };
        let dsr = Crowd { mode: "dsr", services: 1, clients: 1, backends: 2, buckets: USUAL };
        for &services in &options.services {
            let crowd = Crowd { services, clients: services, buckets: SMALL, ..dsr };
            rows.push(of_crowd(options, family, "services", services, crowd)?);
        }
        for mode in ["dsr", "nat"] {
            let backends = if mode == "nat" { TRANSLATED } else { dsr.backends };
            for &clients in &options.flows {
                let crowd = Crowd { mode, clients, backends, ..dsr };
                rows.push(of_crowd(options, family, "flows", clients, crowd)?);
            }
        }
        for &backends in &options.backends {
            let crowd = Crowd { backends, clients: OF_BACKENDS, ..dsr };
            rows.push(of_crowd(options, family, "backends", backends, crowd)?);
        }
        rows.extend(of_networks(options, family)?);
        let (most, crowds) = (
            options.services.iter().max().copied().unwrap_or(1),
            options.flows.iter().max().copied().unwrap_or(1),
        );
        for mode in ["dsr", "nat"] {
            for (services, clients) in [(1, 1), (most, crowds)] {
                let crowd = Crowd { mode, services, clients, backends: 2, buckets: SMALL };
                rows.push(of_crowd(options, family, BOTH, clients, crowd)?);
            }
        }
    }
    Ok(rows)
}

/// Services and clients grow.
const BOTH: &str = "services and flows";

fn of_crowd(
    options: &Arguments,
    family: Family,
    grows: &'static str,
    number: usize,
    crowd: Crowd,
) -> Result<Row> {
    eprintln!("{family:?}, {grows}: {crowd:?}");
    let Subject { loaded, mut stream } = crowd.subject(family)?;
    let [few, in_turn] = costs(options, family, &loaded.program()?, &mut stream)
        .with_context(|| format!("{crowd:?}"))?;
    Ok(Row {
        grows,
        packet: crowd.mode.to_owned(),
        family: if family == Family::V4 { 4 } else { 6 },
        number,
        services: crowd.services,
        clients: crowd.clients,
        backends: crowd.backends,
        buckets: crowd.buckets,
        networks: 0,
        few,
        in_turn,
    })
}

fn of_networks(options: &Arguments, family: Family) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for &networks in &options.networks {
        eprintln!("{family:?}, {networks} networks");
        let (loaded, streams) = worlds::routed(family, networks)?;
        for (packet, mut stream) in streams {
            let [few, in_turn] = costs(options, family, &loaded.program()?, &mut stream)
                .with_context(|| format!("{packet}, {networks} networks"))?;
            rows.push(Row {
                grows: "networks",
                packet: packet.to_owned(),
                family: if family == Family::V4 { 4 } else { 6 },
                number: networks,
                services: 1,
                clients: stream.len(),
                backends: 2,
                buckets: USUAL,
                networks,
                few,
                in_turn,
            });
        }
    }
    // By packet; the sort leaves the numbers in order.
    rows.sort_by(|a, b| a.packet.cmp(&b.packet));
    Ok(rows)
}

/// What few packets of the stream cost, and all in turn.
fn costs(
    options: &Arguments,
    family: Family,
    program: &OwnedFd,
    stream: &mut Stream,
) -> Result<[Cost; 2]> {
    let mut nth = 0;
    let floor = floor::swap_and_look_up_of(family, stream.len(), |frame| {
        frame.clear();
        frame.extend_from_slice(stream.packet(nth));
        nth += 1;
    })?;
    let mut empty = Empty::load()?;
    let few = stream.len().min(options.few);
    let mut of = |distinct| -> Result<Cost> {
        let [net, floor] = in_blocks(options, [program, &floor], &mut empty, stream, distinct)?;
        Ok(Cost { net, floor })
    };
    let all = of(usize::MAX)?;
    Ok([of(few)?, all])
}

/// Runs of one program before it is the next one's turn.
const BLOCK: usize = 10_000;

/// Programs in turn, over the empty one: the least of some rounds. After so many packets each
/// begins again.
fn in_blocks(
    options: &Arguments,
    programs: [&OwnedFd; 2],
    empty: &mut Empty,
    stream: &mut Stream,
    distinct: usize,
) -> Result<[Figures; 2]> {
    let mut out = vec![0; 2048];
    let mut nth = [0; 2];
    let (mut empties, mut rounds) = (Vec::new(), [Vec::new(), Vec::new()]);
    for _ in 0..options.rounds {
        let mut base = Vec::with_capacity(options.runs);
        let mut spent = [(); 2].map(|()| Vec::with_capacity(options.runs));
        while base.len() < options.runs {
            let block = BLOCK.min(options.runs - base.len());
            for _ in 0..block {
                base.push(empty.time_ns()?);
            }
            for ((program, spent), nth) in programs.iter().zip(&mut spent).zip(&mut nth) {
                for _ in 0..block {
                    let frame = stream.scattered(*nth % distinct);
                    *nth += 1;
                    let run = bpf::run(program.as_fd(), frame, None, &mut out)?;
                    ensure!(run.action == XDP_TX, "a packet is answered with {}", run.action);
                    spent.push(run.duration_ns);
                }
            }
        }
        empties.push(figures(&mut base));
        for (rounds, spent) in rounds.iter_mut().zip(&mut spent) {
            rounds.push(figures(spent));
        }
    }
    let base = least(&empties);
    Ok(rounds.map(|rounds| least(&rounds).over(&base)))
}
