//! What it costs to ask an agent with as many services and backends as there may be for all that it
//! counts (`bench control`, part `counters`): how long `status` and `/metrics` take, and what packets take
//! meanwhile.
//!
//! The agent and who asks are on one processor, and packets on another: there the attached program is run,
//! on the maps that the agent reads.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader, Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::programs::ProgramInfo;
use canary_agent::plan;
use canary_tests::{
    agent::{Agent, AgentOptions},
    bpf, http,
    loaded::{XDP_REDIRECT, XDP_TX},
    names::Host,
    process::Usage,
    server::HTTP_PORT,
    topology::{Family, Topology},
    wire,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde::Serialize;

use crate::{
    control::{self, Quantiles, quantiles},
    packet::{Figures, figures, kinds::frame, stay_on},
};

/// Services and, of all of them, backends: as many services as there may be.
const SERVICES: usize = 4_096;
const BACKENDS: usize = 10_000;
/// Where packets are run, and where the agent and who asks it are.
const PACKETS: usize = 0;
const ASKED: usize = 1;
/// The TCP listener, in the balancer's namespace.
const LISTEN: &str = "127.0.0.1:9109";
/// How long each answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Serialize)]
pub(crate) struct Counters {
    services: usize,
    backends: usize,
    asked: Vec<Asked>,
    packets: Vec<Packets>,
}

/// How long an answer took.
#[derive(Serialize)]
struct Asked {
    what: &'static str,
    calls: usize,
    bytes: usize,
    took: Quantiles,
    /// Of the agent's processor time, milliseconds for each.
    agent_ms: f64,
}

/// Nanoseconds a packet, with the call's own.
#[derive(Serialize)]
struct Packets {
    while_asked: &'static str,
    gross: Figures,
    /// Answers a second meanwhile.
    answers_per_second: f64,
}

/// What is asked for.
#[derive(Clone, Copy)]
enum Question {
    Status,
    Metrics,
}

impl Question {
    const fn target(self) -> &'static str {
        match self {
            Self::Status => "/v1/status",
            Self::Metrics => "/metrics",
        }
    }
}

/// A connection that is kept.
struct Caller<S>(BufReader<S>);

impl<S: Read + Write> Caller<S> {
    /// Asks, and reads the whole answer. Returns how long it is.
    fn ask(&mut self, question: Question) -> Result<usize> {
        let request = format!("GET {} HTTP/1.1\r\nhost: {LISTEN}\r\n\r\n", question.target());
        self.0.get_mut().write_all(request.as_bytes())?;
        let head = http::read_head(&mut self.0)?;
        ensure!(head.status == 200 && head.length > 0, "an answer with {}", head.status);
        let mut left = usize::try_from(head.length)?;
        while left > 0 {
            let read = self.0.fill_buf()?.len().min(left);
            ensure!(read > 0, "closed within the answer");
            self.0.consume(read);
            left -= read;
        }
        Ok(usize::try_from(head.length)?)
    }
}

pub(crate) fn run(topology: &Topology, calls: usize) -> Result<Counters> {
    eprintln!("answers of {SERVICES} services with {BACKENDS} backends");
    let options = AgentOptions {
        listen: LISTEN.to_owned(),
        extra: format!(
            "manage_vips = false\ncapacity = {{ services = {SERVICES}, vips = {SERVICES}, backends = {BACKENDS}, \
             buckets = {} }}",
            SERVICES * 4_096
        ),
        ..AgentOptions::native(topology)
    };
    let text = services(topology);
    let mut agent = Agent::prepare(&topology.balancer, &options, &text);
    control::start(&mut agent)?;
    agent.wait_ready();
    // What it has allocated to begin with is given back, and its tables packed.
    std::thread::sleep(Duration::from_secs(15));
    let pid = agent.pid().context("the agent has ended")?;
    pin(pid, ASKED)?;
    stay_on(ASKED)?;
    let mut asked = Vec::new();
    let mut time = |what, calls: usize, ask: &mut dyn FnMut() -> Result<usize>| -> Result<()> {
        let mut bytes = ask()?;
        let (before, mut times) = (Usage::of(pid)?, Vec::new());
        for _ in 0..calls {
            let began = Instant::now();
            bytes = ask()?;
            times.push(began.elapsed());
        }
        let spent = Usage::of(pid)?.cpu.saturating_sub(before.cpu);
        let agent_ms = spent.as_secs_f64() * 1e3 / calls as f64;
        asked.push(Asked { what, calls, bytes, took: quantiles(times), agent_ms });
        Ok(())
    };
    let mut socket = over_socket(&agent)?;
    time("/v1/status, socket", calls, &mut || socket.ask(Question::Status))?;
    let mut tcp = over_tcp(topology)?;
    time("/v1/status, listener", calls, &mut || tcp.ask(Question::Status))?;
    time("/metrics", calls, &mut || tcp.ask(Question::Metrics))?;
    for (what, args) in
        [("status --json", &["status", "--json"][..]), ("status, for people", &["status"][..])]
    {
        time(what, calls.div_ceil(4), &mut || {
            let output = agent.cli(args);
            ensure!(output.code == 0, "{}", output.stderr);
            Ok(output.stdout.len())
        })?;
    }
    let packets = packets(&agent, topology)?;
    stay_on(PACKETS)?;
    Ok(Counters { services: SERVICES, backends: BACKENDS, asked, packets })
}

/// The services, with two versions and two backends each, and some with a third one.
fn services(topology: &Topology) -> String {
    let addr = |version: &str| topology.backend_addrs(version, &Family::ALL[..1], HTTP_PORT);
    let (stable, v2) = (addr("stable"), addr("v2"));
    let mut text = String::new();
    for n in 0..SERVICES {
        let stable = if n < BACKENDS - 2 * SERVICES { &stable[..2] } else { &stable[..1] };
        let list: Vec<_> = stable.iter().map(ToString::to_string).collect();
        // A String takes everything.
        let _ = write!(
            text,
            "[[service]]\nname = \"s{n}\"\nvip = \"10.8.{}.{}\"\nports = \"tcp/{HTTP_PORT}\"\nforward = \"dsr\"\n\
             buckets = 4096\nhealth = {{ type = \"none\" }}\nsplit = {{ v2 = \"5%\" }}\ncontrol = \"stable\"\n\
             [service.versions.stable]\nbackends = {list:?}\n\
             [service.versions.v2]\nbackends = [\"{}\"]\n",
            n / 256,
            n % 256,
            v2[0],
        );
    }
    text
}

fn over_socket(agent: &Agent<'_>) -> Result<Caller<UnixStream>> {
    let stream = UnixStream::connect(agent.socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(Caller(BufReader::new(stream)))
}

fn over_tcp(topology: &Topology) -> Result<Caller<TcpStream>> {
    let stream = topology.balancer.run(|| TcpStream::connect(LISTEN))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(Caller(BufReader::new(stream)))
}

/// All threads of a process on one processor, and with them those that they start.
fn pin(pid: u32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let id = thread?.file_name().to_string_lossy().parse()?;
        sched_setaffinity(Pid::from_raw(id), &set)?;
    }
    Ok(())
}

/// Rounds of packets while nobody asks and while each is asked for, which take turns.
const ROUNDS: usize = 5;
/// Packets in a round.
const RUNS: usize = 200_000;

fn packets(agent: &Agent<'_>, topology: &Topology) -> Result<Vec<Packets>> {
    let pin = agent.pins().join("ingress");
    let program = ProgramInfo::from_pin(pin)?.fd()?.as_fd().try_clone_to_owned()?;
    let mut arrival = Arrival::of(topology, program)?;
    let mut rows = Vec::new();
    let (mut quiet, mut status, mut metrics) = (Vec::new(), Vec::new(), Vec::new());
    let (mut asked, mut lasted) = ([0_u64; 2], [Duration::ZERO; 2]);
    for _ in 0..ROUNDS {
        quiet.extend(arrival.run(None)?.0);
        // Anew in each round: the agent closes connections on which nothing comes.
        let mut socket = over_socket(agent)?;
        let (spent, count, took) = arrival.run(Some(&mut || socket.ask(Question::Status)))?;
        status.extend(spent);
        (asked[0], lasted[0]) = (asked[0] + count, lasted[0] + took);
        let mut tcp = over_tcp(topology)?;
        let (spent, count, took) = arrival.run(Some(&mut || tcp.ask(Question::Metrics)))?;
        metrics.extend(spent);
        (asked[1], lasted[1]) = (asked[1] + count, lasted[1] + took);
    }
    let rate = |at: usize| asked[at] as f64 / lasted[at].as_secs_f64();
    for (while_asked, mut spent, answers_per_second) in [
        ("nothing", quiet, 0.0),
        ("/v1/status, one after the other", status, rate(0)),
        ("/metrics, one after the other", metrics, rate(1)),
    ] {
        rows.push(Packets { while_asked, gross: figures(&mut spent), answers_per_second });
    }
    Ok(rows)
}

/// Packets of a client's to one service after the other, as they arrive on an interface.
struct Arrival<'a> {
    topology: &'a Topology,
    program: OwnedFd,
    ifindex: u32,
    frame: Vec<u8>,
}

impl<'a> Arrival<'a> {
    fn of(topology: &'a Topology, program: OwnedFd) -> Result<Self> {
        let name = topology.interfaces()[0];
        let ifindex = topology.balancer.run(|| nix::net::if_::if_nametoindex(name))?;
        let mut frame = frame(plan::Family::V4, 0, Host::Vip(1), "A seq=1001")?;
        frame[..6].copy_from_slice(&wire::mac(&topology.balancer, name));
        Ok(Self { topology, program, ifindex, frame })
    }

    /// So many packets, while somebody else asks again and again. Returns what each took, how often
    /// there was an answer, and how long all of it took.
    fn run(
        &mut self,
        ask: Option<&mut (dyn FnMut() -> Result<usize> + Send)>,
    ) -> Result<(Vec<u32>, u64, Duration)> {
        let (over, answers) = (AtomicBool::new(false), AtomicU64::new(0));
        let began = Instant::now();
        let spent = std::thread::scope(|scope| -> Result<Vec<u32>> {
            let (over, answers) = (&over, &answers);
            let asks = ask.map(|ask| {
                scope.spawn(move || -> Result<()> {
                    stay_on(ASKED)?;
                    while !over.load(Ordering::Relaxed) {
                        ask()?;
                        answers.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            });
            let Self { topology, program, ifindex, frame } = self;
            let spent = topology.balancer.run(|| -> Result<Vec<u32>> {
                stay_on(PACKETS)?;
                let mut out = vec![0; 2048];
                let mut spent = Vec::with_capacity(RUNS);
                for nth in 0..RUNS {
                    let service = (nth % 16 * 256) as u32;
                    frame[30..34].copy_from_slice(&(0x0a08_0000 + service).to_be_bytes());
                    let run = bpf::run(program.as_fd(), frame, Some(*ifindex), &mut out)?;
                    ensure!([XDP_TX, XDP_REDIRECT].contains(&run.action), "{}", run.action);
                    spent.push(run.duration_ns);
                }
                Ok(spent)
            });
            over.store(true, Ordering::Relaxed);
            if let Some(asks) = asks {
                asks.join().map_err(|_| anyhow!("who asks has panicked"))??;
            }
            spent
        })?;
        Ok((spent, answers.into_inner(), began.elapsed()))
    }
}

pub(crate) fn print(counters: &Counters) {
    let Counters { services, backends, asked, packets } = counters;
    println!(
        "\n{:<34} {:>8} {:>8} {:>8} {:>9} {:>10}",
        format!("{services} services, {backends} backends"),
        "p50 ms",
        "p99 ms",
        "longest",
        "agent ms",
        "bytes"
    );
    for Asked { what, took, agent_ms, bytes, .. } in asked {
        let ms = |us: u64| us as f64 / 1e3;
        println!(
            "{what:<34} {:>8.1} {:>8.1} {:>8.1} {agent_ms:>9.1} {bytes:>10}",
            ms(took.p50_us),
            ms(took.p99_us),
            ms(took.max_us)
        );
    }
    println!(
        "\n{:<34} {:>8} {:>8} {:>8} {:>8} {:>10}",
        "dsr, gross ns, while asked", "median", "middle", "mean", "p99", "answers/s"
    );
    for Packets { while_asked, gross, answers_per_second } in packets {
        let Figures { median_ns, mean_ns, p99_ns, midmean_ns } = gross;
        println!(
            "{while_asked:<34} {median_ns:>8.0} {midmean_ns:>8.1} {mean_ns:>8.1} {p99_ns:>8.0} {answers_per_second:>10.1}"
        );
    }
}
