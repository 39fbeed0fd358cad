//! End to end: what clients get through the balancer, and through what else Linux can do it with.
//!
//! The same clients, wires and servers for all. Subjects take turns in rounds, each time with as many
//! new connections as go through, as many requests on open ones, and new connections at a pace;
//! medians over the rounds count. What fails is counted, and a split that is not the one that was asked.

mod load;
mod page;
mod subjects;
mod summary;
mod table;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use canary_tests::{host, wait};
use clap::ValueEnum as _;
use serde::Serialize;

use self::{
    load::{Seen, Work},
    subjects::{Bed, Programs, Running, Subject},
    summary::{Goal, Row, Turn},
};
use crate::cpu::Look;

/// How long subjects may take until the first answer.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Rounds, the median of which counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each kind of load; twice as many at the pace
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=10))]
    seconds: u64,
    /// What is measured
    #[arg(long, value_delimiter = ',', value_enum)]
    subjects: Vec<Subject>,
    /// Connections at a time
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// New connections a second at the pace
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(10..=50_000))]
    pace: u32,
    /// Queues of each interface; as many as processors unless told
    #[arg(long, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=64))]
    queues: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a page with the figures and plots of them
    #[arg(long)]
    html: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    processors: usize,
    queues: usize,
    versions: Vec<String>,
    rounds: usize,
    seconds: u64,
    connections: usize,
    pace: u32,
    rows: Vec<Row>,
    goals: Vec<Goal>,
    failures: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    ensure!(arguments.rounds > 0 && arguments.connections > 0, "nothing to measure");
    wait::interrupt_on_signals();
    if let Some(reason) = host::obstacle() {
        bail!("{reason}: run it as root");
    }
    match catch_unwind(AssertUnwindSafe(|| measure(arguments))) {
        Ok(report) => show(arguments, &report?),
        Err(panic) if panic.is::<wait::Interrupted>() => {
            eprintln!("bench: interrupted; everything is taken down");
            Ok(ExitCode::from(130))
        }
        // It has said what was wrong.
        Err(_) => Ok(ExitCode::FAILURE),
    }
}

fn show(arguments: &Arguments, report: &Report) -> Result<ExitCode> {
    if let Some(path) = &arguments.html {
        fs::write(path, page::of(report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{}", table::of(report)?);
    }
    // Figures of what does not work are none.
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn measure(arguments: &Arguments) -> Result<Report> {
    let programs = Programs::find()?;
    let subjects = match arguments.subjects.as_slice() {
        [] => Subject::value_variants(),
        chosen => chosen,
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let queues = arguments.queues.unwrap_or(processors);
    eprintln!("setting up {} subjects", subjects.len());
    let beds: Vec<_> = subjects.iter().map(|_| Bed::new(&programs, queues)).collect();
    let mut running = Vec::new();
    for (subject, bed) in subjects.iter().zip(&beds) {
        let started = Running::start(*subject, bed, &programs, processors)?;
        answers(&started)?;
        running.push(started);
    }
    let mut rounds: Vec<_> = subjects.iter().map(|subject| (*subject, Vec::new())).collect();
    let mut failures = Vec::new();
    for round in 0..arguments.rounds {
        for nth in 0..running.len() {
            // Who comes first differs from round to round.
            let at = (nth + round) % running.len();
            eprintln!("round {} of {}: {}", round + 1, arguments.rounds, subjects[at].title());
            let turn = turn(arguments, &running[at], &mut failures)?;
            rounds[at].1.push(turn);
        }
    }
    Ok(Report {
        kernel: super::packet::kernel(),
        processors,
        queues,
        versions: programs.versions(),
        rounds: arguments.rounds,
        seconds: arguments.seconds,
        connections: arguments.connections,
        pace: arguments.pace,
        rows: rounds.iter().map(|(subject, turns)| Row::of(*subject, turns)).collect(),
        goals: summary::goals(&rounds),
        failures,
    })
}

/// Waits until a subject forwards.
fn answers(running: &Running<'_>) -> Result<()> {
    let client = &running.bed.topology.client;
    wait::until_within(PATIENCE, running.subject.title(), || {
        let tried = load::run(client, &running.plan, Work::Connections(4), Duration::ZERO);
        let seen = tried.map_err(|error| error.to_string())?;
        match (seen.all, seen.failed) {
            (1.., 0) => Ok(()),
            _ => Err(seen.reasons.join(", ")),
        }
    });
    Ok(())
}

fn turn(arguments: &Arguments, running: &Running<'_>, failures: &mut Vec<String>) -> Result<Turn> {
    let length = Duration::from_secs(arguments.seconds);
    let load = |work, length| load::run(&running.bed.topology.client, &running.plan, work, length);
    let begin = Look::now()?;
    let connections = load(Work::Connections(arguments.connections), length)?;
    let own = Look::now()?.since(&begin).own.as_secs_f64();
    let requests = load(Work::Requests(arguments.connections), length)?;
    let before = Look::now()?;
    let paced = load(Work::Paced(arguments.pace), length * 2)?;
    let spent = Look::now()?.since(&before);
    let a_second = |seen: &Seen| seen.answers as f64 / length.as_secs_f64();
    let a_thousand = |seconds: f64| seconds / paced.all.max(1) as f64 * 1e3;
    let answers = connections.all + paced.all;
    let canary = connections.canary + paced.canary;
    let turn = Turn {
        connections_per_second: a_second(&connections),
        connections_per_own_second: connections.all as f64 / own,
        requests_per_second: a_second(&requests),
        requests_p99_us: requests.at_us(0.99),
        p50_us: paced.at_us(0.5),
        p99_us: paced.at_us(0.99),
        p999_us: paced.at_us(0.999),
        cpu_seconds: a_thousand(spent.busy.as_secs_f64()),
        own_seconds: a_thousand(spent.own.as_secs_f64()),
        canary_percent: canary as f64 / answers.max(1) as f64 * 1e2,
        answers,
        failed: connections.failed + requests.failed + paced.failed,
        others_percent: spent.others_percent(),
    };
    let title = running.subject.title();
    if turn.failed > 0 {
        let reasons = [connections.reasons, requests.reasons, paced.reasons].concat().join(", ");
        failures.push(format!("{title}: {} failed: {reasons}", turn.failed));
    }
    if !summary::split_holds(&turn) {
        let percent = turn.canary_percent;
        failures.push(format!("{title}: {percent:.2} % went to the canary of {answers}"));
    }
    Ok(turn)
}
