//! What a packet costs over an empty program, beside what the least programs cost that send
//! packets on.
//!
//! By `BPF_PROG_TEST_RUN`, in two ways. *Once*: each run is a call of its own, which starts with
//! the packet as it arrived: median, mean and 99th percentile of many runs, and the least of some
//! rounds. Within a round the programs take turns in blocks, so that noise hits all alike, and all of
//! it is done several times with the programs loaded anew, the median of which counts: where they and
//! their maps come to lie in memory is worth several nanoseconds. *Repeated*: thousands of runs in
//! a call, with the packet restored before each ([`Rerun`]), which is finer than the kernel's
//! clock: the median of some such calls.

pub(crate) mod kinds;
mod page;
mod table;

use std::{
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
};

use anyhow::{Context as _, Result, ensure};
use canary_agent::plan::Family;
use canary_tests::{
    bpf,
    loaded::{Loaded, XDP_PASS},
    names::Host,
    rerun::Rerun,
};
use serde::Serialize;

use self::kinds::{FLOOR, Kind, ProgramSize, Worlds, frame};

/// The first number of a run whose packet has one, a port above those that are reserved.
const FIRST_NUMBER: u16 = 1024;
/// So many packets with a number at a time, at most: there are no more ports.
const MOST_NUMBERS: usize = 50_000;
/// So many flows are opened in a call.
const OPENED: u32 = 512;

#[derive(clap::Args)]
pub(crate) struct Arguments {
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
    /// Also run the packets of one flow many times a call, so many calls: finer than the kernel's clock,
    /// with everything in the caches, and slow, since the kernel waits twice in each call
    #[arg(long, default_value_t = 0)]
    repeated: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a page with the figures and plots of them
    #[arg(long)]
    html: Option<PathBuf>,
}

/// Nanoseconds, net of the empty program's.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) median_ns: f64,
    pub(crate) mean_ns: f64,
    pub(crate) p99_ns: f64,
    /// The mean of the middle half: finer than the clock, and blind to what is rare.
    pub(crate) midmean_ns: f64,
}

#[derive(Serialize)]
struct Row {
    packet: String,
    family: u8,
    flows: usize,
    #[serde(flatten)]
    net: Figures,
    /// In thousands of runs a call, of the first load.
    repeated_ns: Option<f64>,
    /// `midmean_ns` of [`FLOOR`]'s in the same flows.
    of_floor: f64,
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    /// The mean number of processes that wanted a processor in the last minute, at the end.
    load_average: Option<f64>,
    loads: usize,
    runs: usize,
    rounds: usize,
    block: usize,
    empty: Figures,
    rows: Vec<Row>,
    programs: Vec<ProgramSize>,
    /// Of `ingress`.
    verified_insns: Option<u32>,
    xlated_bytes: Option<u32>,
    jited_bytes: u32,
}

pub(crate) fn run(options: &Arguments) -> Result<()> {
    ensure!(
        [options.loads, options.runs, options.rounds, options.flows, options.block]
            .iter()
            .all(|n| *n > 0),
        "nothing to measure"
    );
    let report = measure(options)?;
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

/// From now on on one processor: the other's caches are cold.
pub(crate) fn stay() -> Result<()> {
    stay_on(0)
}

/// From now on this thread is on that processor.
pub(crate) fn stay_on(cpu: usize) -> Result<()> {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(cpu)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
    Ok(())
}

/// Writes a packet's number into it. Checksums stay: the programs look at none.
fn numbered(frame: &mut [u8], at: usize, nth: usize) {
    let number = FIRST_NUMBER + nth as u16;
    frame[at..at + 2].copy_from_slice(&number.to_be_bytes());
}

pub(crate) fn figures(durations: &mut [u32]) -> Figures {
    durations.sort_unstable();
    let at = |part: f64| f64::from(durations[((durations.len() - 1) as f64 * part) as usize]);
    let mean = |part: &[u32]| part.iter().map(|d| f64::from(*d)).sum::<f64>() / part.len() as f64;
    let (quarter, count) = (durations.len() / 4, durations.len());
    Figures {
        median_ns: at(0.5),
        mean_ns: mean(durations),
        p99_ns: at(0.99),
        midmean_ns: mean(&durations[quarter..count - quarter]),
    }
}

impl Figures {
    /// Each figure worked out from those of the same name.
    fn each(of: impl Fn(fn(&Self) -> f64) -> f64) -> Self {
        Self {
            median_ns: of(|f| f.median_ns),
            mean_ns: of(|f| f.mean_ns),
            p99_ns: of(|f| f.p99_ns),
            midmean_ns: of(|f| f.midmean_ns),
        }
    }

    pub(crate) fn over(&self, base: &Self) -> Self {
        Self::each(|field| field(self) - field(base))
    }
}

pub(crate) fn least(rounds: &[Figures]) -> Figures {
    Figures::each(|field| rounds.iter().map(field).fold(f64::INFINITY, f64::min))
}

/// What is in the middle of several loads, for each figure by itself.
pub(crate) fn middle(loads: &[Figures]) -> Figures {
    Figures::each(|field| median(loads.iter().map(field).collect()))
}

/// Of some numbers, one at least.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The empty program.
pub(crate) struct Empty {
    pub(crate) program: OwnedFd,
    pub(crate) frame: Vec<u8>,
    pub(crate) out: Vec<u8>,
}

impl Empty {
    pub(crate) fn load() -> Result<Self> {
        Ok(Self {
            program: bpf::load_empty().context("loading the empty program")?,
            frame: frame(Family::V4, 0, Host::Us, "A")?,
            out: vec![0; 2048],
        })
    }

    pub(crate) fn time_ns(&mut self) -> Result<u32> {
        Ok(bpf::run(self.program.as_fd(), &self.frame, None, &mut self.out)?.duration_ns)
    }
}

/// A kind of packet, to be run many times in a call.
struct Repeated {
    subject: Rerun,
    base: Rerun,
    before: Option<Rerun>,
    action: u32,
    numbered: bool,
    opens: bool,
}

impl Repeated {
    /// `None` for a kind of which one packet stands for nothing.
    pub(crate) fn new(kind: &Kind, empty: &OwnedFd) -> Result<Option<Self>> {
        let Kind { frames, program, number_at, before, action, opens, mixed, .. } = kind;
        let Some(frame) = frames.first().filter(|_| !mixed) else { return Ok(None) };
        let before =
            before.as_ref().map(|frame| Rerun::new(program.as_fd(), frame, *number_at)).transpose();
        Ok(Some(Self {
            subject: Rerun::new(program.as_fd(), frame, *number_at)?,
            base: Rerun::new(empty.as_fd(), frame, *number_at)?,
            before: before?,
            action: *action,
            numbered: number_at.is_some(),
            opens: *opens,
        }))
    }

    /// Nanoseconds a packet over the empty program, in one call of so many runs.
    pub(crate) fn net_ns(&mut self, fresh: &mut Loaded, times: u32) -> Result<f64> {
        let times = if self.numbered { times.min(OPENED) } else { times };
        let mut spent = [0.0; 3];
        let runs = [
            (self.before.as_mut(), self.action),
            (Some(&mut self.base), XDP_PASS),
            (Some(&mut self.subject), self.action),
        ];
        for ((rerun, expected), spent) in runs.into_iter().zip(&mut spent) {
            let Some(rerun) = rerun else { continue };
            if self.numbered {
                rerun.number(FIRST_NUMBER)?;
            }
            let (took, action) = rerun.run(times)?;
            ensure!(action == expected, "action {action} in place of {expected}");
            *spent = took.as_nanos() as f64 / f64::from(times);
        }
        if self.opens {
            forget(fresh, times as usize)?;
        }
        Ok(spent[2] - spent[1])
    }
}

/// Takes flows away, of which there have to be so many.
fn forget(fresh: &mut Loaded, count: usize) -> Result<()> {
    let entries = fresh.flows_v4.len() + fresh.flows_v6.len();
    ensure!(entries >= count, "{entries} entries of {count} flows");
    fresh.flows_v4.clear()?;
    fresh.flows_v6.clear()
}

/// Runs packets that are all different. Returns what each took.
fn run_numbered(fresh: &mut Loaded, kind: &mut Kind, count: usize) -> Result<Vec<u32>> {
    let count = count.min(MOST_NUMBERS);
    let sent = |fresh: &Loaded| fresh.reasons().iter().sum::<u64>();
    let counted = sent(fresh);
    let at = kind.number_at.context("a number")?;
    let frame = kind.frames.first_mut().context("a frame")?;
    let mut out = vec![0; 2048];
    let mut durations = Vec::with_capacity(count);
    for nth in 0..count {
        if let Some(before) = &mut kind.before {
            numbered(before, at, nth);
            bpf::run(kind.program.as_fd(), before, None, &mut out)?;
        }
        numbered(frame, at, nth);
        durations.push(bpf::run(kind.program.as_fd(), frame, None, &mut out)?.duration_ns);
    }
    ensure!(sent(fresh) == counted, "{}: some were refused or passed", kind.name);
    if kind.opens {
        forget(fresh, count).with_context(|| kind.name.clone())?;
    }
    Ok(durations)
}

/// What was measured of a kind in one load.
struct Measured {
    packet: String,
    family: Family,
    flows: usize,
    net: Figures,
    repeated_ns: Option<f64>,
}

fn measure(options: &Arguments) -> Result<Report> {
    stay()?;
    let mut empties = Vec::new();
    let mut programs = Vec::new();
    let mut loads: Vec<Vec<Measured>> = Vec::new();
    for load in 0..options.loads {
        let mut measured = Vec::new();
        for flows in [1, options.flows] {
            let mut worlds = Worlds::new(flows, options.block.min(MOST_NUMBERS), 65_536)?;
            programs = worlds.sizes()?;
            let mut kinds = worlds.kinds(flows)?;
            let mut empty = Empty::load()?;
            let Arguments { rounds, runs, block, .. } = *options;
            let (base, nets) =
                run_once(&mut kinds, &mut empty, &mut worlds.fresh, [rounds, runs, block])?;
            empties.push(base);
            let repeated = if flows == 1 && load == 0 && options.repeated > 0 {
                repeat(&kinds, &empty.program, &mut worlds.fresh, options.repeated)?
            } else {
                vec![None; kinds.len()]
            };
            for ((kind, net), repeated_ns) in kinds.into_iter().zip(nets).zip(repeated) {
                let Kind { name: packet, family, .. } = kind;
                measured.push(Measured { packet, family, flows, net, repeated_ns });
            }
        }
        loads.push(measured);
    }
    let mut rows = Vec::new();
    for (at, Measured { packet, family, flows, repeated_ns, .. }) in loads[0].iter().enumerate() {
        let nets: Vec<_> = loads.iter().map(|load| load[at].net).collect();
        rows.push(Row {
            packet: packet.clone(),
            family: if *family == Family::V4 { 4 } else { 6 },
            flows: *flows,
            net: middle(&nets),
            repeated_ns: *repeated_ns,
            of_floor: 0.0,
        });
    }
    compare(&mut rows)?;
    let ingress = programs.first().context("a program")?.clone();
    Ok(Report {
        kernel: kernel(),
        load_average: load_average(),
        loads: options.loads,
        runs: options.runs,
        rounds: options.rounds,
        block: options.block,
        empty: middle(&empties),
        rows,
        programs,
        verified_insns: ingress.verified_insns,
        xlated_bytes: ingress.xlated_insns.map(|insns| insns * 8),
        jited_bytes: ingress.jited_bytes,
    })
}

/// The mean number of processes that wanted a processor in the last minute.
pub(crate) fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// The kernel's release.
pub(crate) fn kernel() -> String {
    nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Says of each row how much it is of the floor's.
fn compare(rows: &mut [Row]) -> Result<()> {
    let floors: Vec<_> = rows
        .iter()
        .filter(|row| row.packet == FLOOR)
        .map(|row| (row.family, row.flows, row.net.midmean_ns))
        .collect();
    for row in rows {
        let (.., floor) = floors
            .iter()
            .find(|(family, flows, ..)| (*family, *flows) == (row.family, row.flows))
            .context("a floor for each family")?;
        row.of_floor = row.net.midmean_ns / floor;
    }
    Ok(())
}

/// Runs in a call.
const REPEATS: u32 = 5_000;

/// Each kind of packet in runs of its own: so many rounds of so many runs, in blocks of so many.
/// Returns the empty program's figures and, over those, each kind's: the least of the rounds.
pub(crate) fn run_once(
    kinds: &mut [Kind],
    empty: &mut Empty,
    fresh: &mut Loaded,
    [rounds, runs, block]: [usize; 3],
) -> Result<(Figures, Vec<Figures>)> {
    let mut out = vec![0; 2048];
    let mut empties = Vec::new();
    let mut of_kinds = vec![Vec::new(); kinds.len()];
    for _ in 0..rounds {
        let mut base = Vec::with_capacity(runs);
        let mut durations = vec![Vec::with_capacity(runs); kinds.len()];
        while base.len() < runs {
            let block = base.len()..runs.min(base.len() + block);
            for _ in block.clone() {
                base.push(empty.time_ns()?);
            }
            for (kind, durations) in kinds.iter_mut().zip(&mut durations) {
                if kind.number_at.is_some() {
                    durations.extend(run_numbered(fresh, kind, block.len())?);
                    continue;
                }
                for i in block.clone() {
                    let frame = &kind.frames[i % kind.frames.len()];
                    let run = bpf::run(kind.program.as_fd(), frame, None, &mut out)?;
                    durations.push(run.duration_ns);
                }
            }
        }
        empties.push(figures(&mut base));
        for (durations, of_kind) in durations.iter_mut().zip(&mut of_kinds) {
            of_kind.push(figures(durations));
        }
    }
    let base = least(&empties);
    let nets = of_kinds.iter().map(|rounds| least(rounds).over(&base)).collect();
    Ok((base, nets))
}

/// The median of so many calls of each kind, which take turns.
fn repeat(
    kinds: &[Kind],
    empty: &OwnedFd,
    fresh: &mut Loaded,
    calls: usize,
) -> Result<Vec<Option<f64>>> {
    let mut repeated = kinds
        .iter()
        .map(|kind| Repeated::new(kind, empty).with_context(|| kind.name.clone()))
        .collect::<Result<Vec<_>>>()?;
    let mut nets = vec![Vec::with_capacity(calls); kinds.len()];
    for _ in 0..calls {
        for ((kind, repeated), nets) in kinds.iter().zip(&mut repeated).zip(&mut nets) {
            let Some(repeated) = repeated else { continue };
            let net = repeated.net_ns(fresh, REPEATS).with_context(|| kind.name.clone())?;
            nets.push(net);
        }
    }
    Ok(nets.into_iter().map(|nets| (!nets.is_empty()).then(|| median(nets))).collect())
}
