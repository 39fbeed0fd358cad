//! What two processors do at the same time, against one alone (`bench cores`).
//!
//! Each has a thread of its own, with flows of its own, that runs the program some hundred thousand times in
//! a call ([`Rerun`]), and begins each call together with the other one. Counted is the time that a thread
//! had of its processor: what others did there meanwhile is not in it, and neither is the kernel's
//! wait at each call's beginning. Alone and both take turns. The empty program and the floors
//! show what the host takes for itself: shared caches, and processors that are threads of one core.
//!
//! Where others want the processors, too, both threads may not have run at the same time: so there are
//! more calls than count, and those count in which they did so the most. How much that was is said beside: a
//! ratio of processors that hardly ran together says nothing. The kernel waits for some time at each call's
//! beginning, so that short calls don't.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use canary_agent::plan::Family;
use canary_tests::{
    bpf, floor,
    loaded::{Loaded, XDP_PASS, XDP_TX},
    names::Host,
    rerun::{Numbers, Rerun},
    world::{Service, World},
};
use serde::Serialize;

use crate::packet::{
    kernel,
    kinds::{answer, frame, syn_ack},
    load_average, median, stay_on,
};

/// Processors that are measured.
const CPUS: [usize; 2] = [0, 1];
/// The first source port of each processor's client.
const FIRST_PORT: u16 = 1024;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Runs in a call
    #[arg(long, default_value_t = 3_000_000)]
    runs: u32,
    /// Calls alone on each processor and on both, which take turns; the median counts
    #[arg(long, default_value_t = 3)]
    calls: usize,
    /// Flows of each processor: a power of two
    #[arg(long, default_value_t = 64)]
    flows: u32,
    /// Families, each in turn
    #[arg(long, value_delimiter = ',', default_values_t = [4, 6])]
    families: Vec<u8>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Nanoseconds a packet, with the little program that restores the frame.
#[derive(Serialize)]
struct Row {
    packet: &'static str,
    family: u8,
    /// On each processor, while the other has nothing to do.
    alone_ns: [f64; 2],
    /// On each at the same time.
    both_ns: [f64; 2],
    /// How many times as many packets as one alone.
    ratio: f64,
    /// The same without what the empty program takes in its place, where that leaves anything.
    net_ratio: Option<f64>,
    /// The part of the time of both in which both ran.
    together: f64,
    /// It is to show what it costs to share, and no steady state.
    shares: bool,
}

/// What a call took on one processor.
struct Spent {
    began: Instant,
    ended: Instant,
    /// That the thread had of the processor.
    processor: Duration,
}

impl Spent {
    fn ns(&self, runs: u32) -> f64 {
        self.processor.as_nanos() as f64 / f64::from(runs)
    }

    /// The part of its time in which it ran.
    fn busy(&self) -> f64 {
        let all = self.ended.saturating_duration_since(self.began).as_secs_f64();
        (self.processor.as_secs_f64() / all.max(1e-9)).min(1.0)
    }
}

/// The part of the longer one's time in which both ran, if each ran evenly.
fn together(one: &Spent, other: &Spent) -> f64 {
    let (began, ended) = (one.began.max(other.began), one.ended.min(other.ended));
    let longest = [one, other].map(|spent| spent.ended.saturating_duration_since(spent.began));
    let shared = ended.saturating_duration_since(began).as_secs_f64();
    let longest = longest[0].max(longest[1]).as_secs_f64().max(1e-9);
    shared / longest * one.busy() * other.busy()
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    load_average: Option<f64>,
    runs: u32,
    calls: usize,
    flows: u32,
    rows: Vec<Row>,
}

/// A kind of packet on both processors.
struct Kind {
    packet: &'static str,
    program: OwnedFd,
    action: u32,
    /// Each processor's, with the numbers that are its flows.
    packets: [(Vec<u8>, Option<Numbers>); 2],
    shares: bool,
}

pub(crate) fn run(options: &Arguments) -> Result<()> {
    let Arguments { runs, calls, flows, families, json } = options;
    ensure!(*runs > 0 && *calls > 0, "nothing to measure");
    ensure!(flows.is_power_of_two() && *flows <= 4_096, "a power of two up to 4,096");
    stay_on(CPUS[1]).context("two processors")?;
    stay_on(CPUS[0])?;
    let mut rows = Vec::new();
    for number in families {
        let family = match number {
            4 => Family::V4,
            6 => Family::V6,
            other => bail!("IPv{other} is no family: 4 and 6 are"),
        };
        let world = world();
        let plane = world.plane(|name| bail!("no interface {name}"))?;
        let mut loaded = Loaded::new(&plane.plane, &world.sizes())?;
        let less = |ns: [f64; 2], empty: [f64; 2]| [ns[0] - empty[0], ns[1] - empty[1]];
        let mut of_empty: Option<[[f64; 2]; 2]> = None;
        for kind in kinds(&mut loaded, family, *flows)? {
            eprintln!("IPv{number}, {}", kind.packet);
            let ([alone_ns, both_ns], together) =
                measure(&kind, *runs, *calls).with_context(|| kind.packet.to_owned())?;
            let nets = of_empty.map(|empty| [less(alone_ns, empty[0]), less(both_ns, empty[1])]);
            let net = nets.filter(|nets| nets.as_flattened().iter().all(|ns| *ns > LEAST_NS));
            of_empty.get_or_insert([alone_ns, both_ns]);
            rows.push(Row {
                packet: kind.packet,
                family: *number,
                alone_ns,
                both_ns,
                ratio: ratio(alone_ns, both_ns),
                net_ratio: net.map(|[alone, both]| ratio(alone, both)),
                together,
                shares: kind.shares,
            });
        }
    }
    let (kernel, load_average) = (kernel(), load_average());
    let report = Report { kernel, load_average, runs: *runs, calls: *calls, flows: *flows, rows };
    if *json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

/// How many packets two processors send on while one alone sends one.
fn ratio(alone_ns: [f64; 2], both_ns: [f64; 2]) -> f64 {
    let rate = |ns: [f64; 2]| 1.0 / ns[0] + 1.0 / ns[1];
    rate(both_ns) / (rate(alone_ns) / 2.0)
}

/// The services that are measured, each with a way to forward of its own.
fn world() -> World {
    let service = |(nth, mode): (u16, &str)| Service {
        vips: vec![Host::Vip(nth + 1).name()],
        ports: vec!["tcp/80".to_owned()],
        mode: mode.to_owned(),
        backends: (1..=4).map(|n| nth * 4 + n).collect(),
        buckets: 65_536,
        ..Service::default()
    };
    let mut services: Vec<_> =
        (0..).zip(["dsr", "ipip", "gue", "nat", "dsr"]).map(service).collect();
    services[4].table = "b18 was b17".to_owned();
    World { service: services, flows: 65_536, ..World::default() }
}

/// Numbers of the services.
const DSR: u16 = 1;
const IPIP: u16 = 2;
const GUE: u16 = 3;
const NAT: u16 = 4;
const TRACKED: u16 = 5;

/// Every kind, with the flows that it meets: the first is the empty program.
fn kinds(loaded: &mut Loaded, family: Family, flows: u32) -> Result<Vec<Kind>> {
    let ports =
        Numbers { at: if family == Family::V4 { 34 } else { 54 }, first: FIRST_PORT, count: flows };
    let steady = |vip: u16, client: usize| -> Result<(Vec<u8>, Option<Numbers>)> {
        let data = frame(family, client, Host::Vip(vip), "A seq=1001 ack=5001")?;
        Ok((data, Some(ports)))
    };
    let of = |packet, program, action, vip: u16, clients: [usize; 2], shares| -> Result<Kind> {
        let packets = [steady(vip, clients[0])?, steady(vip, clients[1])?];
        Ok(Kind { packet, program, action, packets, shares })
    };
    let mut known = Vec::new();
    for client in [0, 1] {
        for number in 0..flows {
            let (mut data, _) = steady(DSR, client)?;
            write(&mut data, ports.at, number);
            known.push(data);
        }
    }
    let look_up = floor::swap_and_look_up(family, &known)?;
    let program = || loaded.program();
    let mut kinds = vec![
        of("empty program", bpf::load_empty()?, XDP_PASS, DSR, [0, 1], false)?,
        of("floor: MAC swap", floor::swap()?, XDP_TX, DSR, [0, 1], false)?,
        of("floor: MAC swap, look-up", look_up, XDP_TX, DSR, [0, 1], false)?,
        of("dsr", program()?, XDP_TX, DSR, [0, 1], false)?,
        of("ipip", program()?, XDP_TX, IPIP, [0, 1], false)?,
        of("gue", program()?, XDP_TX, GUE, [0, 1], false)?,
    ];
    // Opened on the processors that they are used on.
    let mut opened = Vec::new();
    for cpu in CPUS {
        stay_on(cpu)?;
        for vip in [NAT, TRACKED] {
            for number in 0..flows {
                opened.push(open(loaded, family, vip, cpu, ports.at, number)?);
            }
        }
    }
    stay_on(CPUS[0])?;
    // And in turn by one processor: their entries lie side by side.
    for number in 0..flows {
        for client in [2, 3] {
            for vip in [NAT, TRACKED] {
                open(loaded, family, vip, client, ports.at, number)?;
            }
        }
    }
    let program = || loaded.program();
    kinds.extend([
        of("nat, to the backend", program()?, XDP_TX, NAT, [0, 1], false)?,
        of("dsr tracked, hit", program()?, XDP_TX, TRACKED, [0, 1], false)?,
    ]);
    // One flow each: the other ends' ports are in no order.
    let back = [&opened[0], &opened[2 * flows as usize]].map(|(_, back)| (back.clone(), None));
    kinds.push(Kind {
        packet: "nat, back to the client",
        program: program()?,
        action: XDP_TX,
        packets: back.clone(),
        shares: false,
    });
    kinds.extend([
        of("nat, entries side by side", program()?, XDP_TX, NAT, [2, 3], true)?,
        of("tracked, entries side by side", program()?, XDP_TX, TRACKED, [2, 3], true)?,
    ]);
    let (there, _) = opened[0].clone();
    kinds.push(Kind {
        packet: "nat, a direction on each",
        program: program()?,
        action: XDP_TX,
        packets: [(there, None), back[0].clone()],
        shares: true,
    });
    kinds.push(of("nat, the same flows", program()?, XDP_TX, NAT, [0, 0], true)?);
    Ok(kinds)
}

/// Makes it the frame of the flow with this number.
fn write(frame: &mut [u8], at: usize, number: u32) {
    let port = FIRST_PORT + number as u16;
    frame[at..at + 2].copy_from_slice(&port.to_be_bytes());
}

/// Opens a flow. Returns the client's packet on it, and the backend's, if it comes this way.
fn open(
    loaded: &mut Loaded,
    family: Family,
    vip: u16,
    client: usize,
    at: usize,
    number: u32,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut syn = frame(family, client, Host::Vip(vip), "S seq=1000")?;
    let mut data = frame(family, client, Host::Vip(vip), "A seq=1001 ack=5001")?;
    write(&mut syn, at, number);
    write(&mut data, at, number);
    let mut sent = |frame: &[u8]| -> Result<Vec<u8>> {
        let outcome = loaded.run(frame)?;
        ensure!(outcome.action == XDP_TX, "a flow was refused: action {}", outcome.action);
        Ok(outcome.frame)
    };
    let there = sent(&syn)?;
    if vip != NAT {
        sent(&data)?;
        return Ok((data, Vec::new()));
    }
    sent(&syn_ack(&there, family))?;
    let back = answer(&sent(&data)?, family);
    Ok((data, back))
}

/// Less than that over the empty program is noise.
const LEAST_NS: f64 = 5.0;
/// So many times as many calls of both are made as count.
const TRIES: usize = 2;

/// Nanoseconds a packet: alone on each, and both at the same time; and how much they were.
fn measure(kind: &Kind, runs: u32, calls: usize) -> Result<([[f64; 2]; 2], f64)> {
    let reruns = kind
        .packets
        .iter()
        .map(|(frame, numbers)| Ok(Rerun::among(kind.program.as_fd(), frame, *numbers)?));
    let mut reruns: Vec<Rerun> = reruns.collect::<Result<_>>()?;
    let mut alone = [Vec::new(), Vec::new()];
    let mut both = Vec::new();
    // What the first call finds cold, the second does not.
    for call in 0..=calls {
        for at in 0..CPUS.len() {
            let spent = at_once(&mut reruns[at..=at], &CPUS[at..=at], kind.action, runs)?;
            if call > 0 {
                alone[at].extend(spent.iter().map(|spent| spent.ns(runs)));
            }
        }
        for _ in 0..TRIES {
            let spent = at_once(&mut reruns, &CPUS, kind.action, runs)?;
            if let [one, other] = &spent[..]
                && call > 0
            {
                both.push((together(one, other), [one.ns(runs), other.ns(runs)]));
            }
        }
    }
    both.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    both.truncate(calls);
    let of_both = [0, 1].map(|at| median(both.iter().map(|(_, ns)| ns[at]).collect()));
    let together = median(both.iter().map(|(together, _)| *together).collect());
    Ok(([alone.map(median), of_both], together))
}

/// One call on each of these processors, all at the same time.
fn at_once(reruns: &mut [Rerun], cpus: &[usize], action: u32, runs: u32) -> Result<Vec<Spent>> {
    let begin = Arc::new(Barrier::new(cpus.len()));
    thread::scope(|scope| {
        let threads: Vec<_> = reruns
            .iter_mut()
            .zip(cpus)
            .map(|(rerun, cpu)| {
                let begin = Arc::clone(&begin);
                scope.spawn(move || -> Result<Spent> {
                    let stays = stay_on(*cpu);
                    begin.wait();
                    stays?;
                    let began = Instant::now();
                    let (processor, answered) = rerun.run(runs)?;
                    let ended = Instant::now();
                    ensure!(answered == action, "action {answered} in place of {action}");
                    Ok(Spent { began, ended, processor })
                })
            })
            .collect();
        let ended = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a thread has panicked"))?);
        ended.collect()
    })
}

fn print(report: &Report) {
    let Report { kernel, load_average, runs, calls, flows, rows } = report;
    println!(
        "ns a packet on two processors, alone and both at the same time; kernel {kernel}, {runs} runs a call, median \
         of {calls} calls, {flows} flows on each; load average {}",
        load_average.map_or_else(|| "-".to_owned(), |load| format!("{load:.1}"))
    );
    println!(
        "×: packets of both over those of one alone; net: without what the empty program takes"
    );
    println!("together: the part of the time of both in which both ran");
    println!("(*: processors share on purpose, to show what that costs)\n");
    println!("{:<36} {:>15} {:>17} {:>6} {:>6}", "packet", "alone", "both", "×", "net ×");
    for row in rows {
        let Row { packet, family, alone_ns, both_ns, ratio, net_ratio, together, shares } = row;
        let name = format!("IPv{family}, {packet}{}", if *shares { " *" } else { "" });
        println!(
            "{name:<36} {:>7.1} {:>7.1} {:>9.1} {:>7.1} {ratio:>6.2} {:>6} {:>8.0}%",
            alone_ns[0],
            alone_ns[1],
            both_ns[0],
            both_ns[1],
            net_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            together * 100.0
        );
    }
}
