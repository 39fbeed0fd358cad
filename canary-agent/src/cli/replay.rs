//! `replay`: what a gate says of windows that were written down.

use std::{
    fs::File,
    io::{self, BufWriter, Read, Write},
    path::Path,
    time::Duration,
};

use serde::Serialize;
use serde_json::Number;

use super::{
    args,
    failure::{Failure, exit},
    text,
};
use crate::{
    api::model::ErrorDetail,
    config::{self, Diagnostic, Place, Severity, model},
    rollout::{
        gate::{Decision, Gate, SignalProgress, Verdict, Window},
        record::{Line, Problem, Reader, Recorded, seconds},
    },
};

/// Runs the gate over the file.
pub(super) fn run(config: &Path, asked: &args::Replay, json: bool) -> Result<(), Failure> {
    let terms = gate(config, &asked.gate)?;
    let gate = Gate::new(&terms);
    if gate.signals().is_empty() {
        let message =
            format!("gate `{}` has no signal that is counted: it can't be replayed", terms.name);
        return Err(Failure::new("failed", exit::FAILED, message)
            .help("recordings are of counts; what Prometheus answers is not in them"));
    }
    let (name, input): (String, Box<dyn Read>) = match asked.file.as_os_str() == "-" {
        true => ("standard input".to_owned(), Box::new(io::stdin().lock())),
        false => {
            let name = asked.file.display().to_string();
            let file = File::open(&asked.file).map_err(|error| unreadable(&name, &error))?;
            (name, Box::new(file))
        }
    };
    let kinds = gate.signals().iter().map(|signal| signal.kind).collect();
    let mut reader = Reader::new(input, kinds);
    let out = BufWriter::new(io::stdout().lock());
    let mut replay = Replay { gate, every: asked.every, begun: None, deciding: None };
    let mut shown: Box<dyn Shown> = match json {
        true => Box::new(List { out, items: Vec::new() }),
        false => Box::new(Table { out }),
    };
    let mut begun = false;
    while let Some(recorded) = reader.next_window().map_err(|error| unreadable(&name, &error))? {
        // The rest is read for what is wrong with it only: what was passed over would count.
        if !reader.problems().is_empty() {
            continue;
        }
        if !begun {
            shown.begin(&terms, &replay.gate)?;
            begun = true;
        }
        replay.watch(&recorded);
        shown.window(&recorded, &replay.gate)?;
    }
    if !reader.problems().is_empty() {
        shown.interrupt()?;
        return Err(wrong(&name, reader.problems()));
    }
    if !begun {
        shown.begin(&terms, &replay.gate)?;
    }
    shown.end(&replay)
}

/// The gate as it is configured; whatever else is in the configuration is not asked for.
fn gate(config: &Path, name: &str) -> Result<model::Gate, Failure> {
    let gates = config::load_gates(config).map_err(|diagnostics| {
        Failure::from(ErrorDetail {
            code: "bad_config".to_owned(),
            message: format!("the gates of {} can't be used", config.display()),
            help: None,
            exit_code: exit::BAD_CONFIG,
            diagnostics,
        })
    })?;
    let names: Vec<String> = gates.iter().map(|gate| format!("`{}`", gate.name)).collect();
    gates.into_iter().find(|gate| gate.name == name).ok_or_else(|| {
        let message = format!("there is no gate `{name}` in {}", config.display());
        let failure = Failure::new("unknown_gate", exit::FAILED, message);
        match names.is_empty() {
            true => failure.help("write one: `[[gate]]`; --config names another file"),
            false => failure.help(format!("it has {}", names.join(", "))),
        }
    })
}

fn unreadable(name: &str, error: &io::Error) -> Failure {
    Failure::new("failed", exit::FAILED, format!("can't read {name}: {error}"))
}

/// Every line that can't be used.
fn wrong(name: &str, problems: &[Problem]) -> Failure {
    let diagnostics = problems.iter().map(|problem| {
        let Problem { line, message, help } = problem;
        Diagnostic {
            severity: Severity::Error,
            message: format!("line {line}: {message}"),
            place: Place {
                file: name.to_owned(),
                line: u32::try_from(*line).unwrap_or(u32::MAX),
                column: 1,
                excerpt: None,
            },
            help: help.clone(),
            related: Vec::new(),
        }
    });
    Failure::from(ErrorDetail {
        code: "bad_recording".to_owned(),
        message: format!("{name} can't be replayed"),
        help: None,
        exit_code: exit::FAILED,
        diagnostics: diagnostics.collect(),
    })
}

/// A gate that goes through a recording.
struct Replay {
    gate: Gate,
    /// What one more in `window` lasts.
    every: Duration,
    begun: Option<Begun>,
    /// The window that the verdict came in, and what had been seen by then.
    deciding: Option<(Duration, Decision, Vec<SignalProgress>)>,
}

#[derive(Clone, Copy)]
struct Begun {
    first: Duration,
    elapsed: Duration,
}

impl Replay {
    /// A window's time is that of its end, and the first one lasted as long as one more in
    /// `window` does. Nothing was missed between two windows, only nothing happened.
    fn watch(&mut self, recorded: &Recorded) {
        let Recorded { window, lines } = recorded;
        let begun = *self.begun.get_or_insert(Begun { first: *window, elapsed: Duration::ZERO });
        let since = window.saturating_sub(begun.first).saturating_add(Duration::from_secs(1));
        let nanos = since.as_nanos().saturating_mul(self.every.as_nanos()) / 1_000_000_000;
        let elapsed = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let counts: Vec<_> = lines.iter().map(|line| (line.signal, line.counts)).collect();
        self.gate.watch(&Window {
            elapsed,
            watched: elapsed.saturating_sub(begun.elapsed),
            complete: true,
            counts: &counts,
        });
        self.begun = Some(Begun { elapsed, ..begun });
        let progress = self.gate.progress();
        if self.deciding.is_none() {
            self.deciding =
                progress.decision.map(|decision| (*window, decision, progress.signals.clone()));
        }
    }

    /// What the gate would have said, and when.
    fn summary(&self) -> String {
        let (fail_at, pass_at) = (self.gate.ln_fail_at(), self.gate.ln_pass_at());
        let progress = self.gate.progress();
        let lasted = |ms: u64| humantime::format_duration(Duration::from_millis(ms)).to_string();
        let Some((window, decision, signals)) = &self.deciding else {
            return format!(
                "undecided after {}, {}",
                text::counted(progress.windows, "window"),
                lasted(progress.elapsed_ms)
            );
        };
        let Decision { verdict, signal, elapsed_ms, windows: _ } = decision;
        let when = format!("in window {}, after {}", seconds(*window), lasted(*elapsed_ms));
        let seen = signal.and_then(|name| signals.iter().find(|seen| seen.signal == name));
        let counted = |seen: &SignalProgress| {
            format!(
                "{} on control and {} on the canary",
                text::counted(seen.control_events, "bad event"),
                seen.canary_events
            )
        };
        match (verdict, seen) {
            (Verdict::Fail, Some(seen)) => format!(
                "fails {when}: ln_fail of {} is {:.3}, of {fail_at:.3} that it takes, with {}",
                seen.signal.0.name(),
                seen.fail.ln(),
                counted(seen)
            ),
            (Verdict::NoData, Some(seen)) => format!(
                "no data at the deadline, {when}: {} had no event on either side",
                seen.signal.0.name()
            ),
            (Verdict::Inconclusive, Some(seen)) => format!(
                "inconclusive at the deadline, {when}: ln_pass of {} is {:.3}, of {pass_at:.3} \
                 that it takes, with {}",
                seen.signal.0.name(),
                seen.pass.ln(),
                counted(seen)
            ),
            (Verdict::Inconclusive | Verdict::NoData, None) => {
                format!("inconclusive at the deadline, {when}: it was not watched for long enough")
            }
            (Verdict::Pass, _) => format!("passes {when}"),
            (Verdict::Fail, None) => format!("fails {when}"),
        }
    }
}

/// The verdict so far. A deadline that has passed decides nothing about the canary.
fn word(gate: &Gate) -> &'static str {
    match gate.verdict() {
        Some(Verdict::Fail) => "fail",
        Some(Verdict::Pass) => "pass",
        Some(Verdict::Inconclusive | Verdict::NoData) | None => "undecided",
    }
}

/// How a replay is shown.
trait Shown {
    fn begin(&mut self, terms: &model::Gate, gate: &Gate) -> io::Result<()>;
    fn window(&mut self, recorded: &Recorded, gate: &Gate) -> Result<(), Failure>;
    fn interrupt(&mut self) -> io::Result<()>;
    fn end(&mut self, replay: &Replay) -> Result<(), Failure>;
}

/// For people, as it is read.
struct Table<W> {
    out: W,
}

impl<W: Write> Shown for Table<W> {
    fn begin(&mut self, terms: &model::Gate, gate: &Gate) -> io::Result<()> {
        let model::Gate { name, alpha, beta, min_duration, deadline, signals } = terms;
        writeln!(
            self.out,
            "gate {name}\n  fails when ln_fail of a deciding signal reaches {:.3} (alpha {alpha} \
             over {})\n  passes when ln_pass of each reaches {:.3} (beta {beta}), from {} on\n  \
             is inconclusive after {}",
            gate.ln_fail_at(),
            text::counted(gate.deciding() as u64, "signal"),
            gate.ln_pass_at(),
            humantime::format_duration(*min_duration),
            humantime::format_duration(*deadline),
        )?;
        for signal in gate.signals() {
            let model::KernelSignal { kind, tolerate, pass_below, observe, .. } = signal;
            let only = if *observe { ", only observed" } else { "" };
            writeln!(
                self.out,
                "  {}: tolerate {tolerate}, pass_below {pass_below}{only}",
                kind.name()
            )?;
        }
        let asked = signals.len() - gate.signals().len();
        if asked > 0 {
            writeln!(self.out, "  {} not replayed", queries(asked))?;
        }
        writeln!(
            self.out,
            "\n{:>12}  {:<14}  {:>9}  {:>9}  {:>9}  {:>10}  {:>10}  VERDICT",
            "WINDOW", "SIGNAL", "SHARE", "CONTROL", "CANARY", "LN_FAIL", "LN_PASS"
        )
    }

    fn window(&mut self, recorded: &Recorded, gate: &Gate) -> Result<(), Failure> {
        for line in &recorded.lines {
            let (ln_fail, ln_pass) = statistics(line, gate);
            writeln!(
                self.out,
                "{:>12}  {:<14}  {:>9}  {:>9}  {:>9}  {ln_fail:>10.4}  {ln_pass:>10.4}  {}",
                seconds(recorded.window),
                line.signal.name(),
                text::percent(line.counts.share),
                line.counts.control_events,
                line.counts.canary_events,
                word(gate),
            )?;
        }
        Ok(())
    }

    fn interrupt(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn end(&mut self, replay: &Replay) -> Result<(), Failure> {
        writeln!(self.out, "\n{}", replay.summary())?;
        self.out.flush()?;
        Ok(())
    }
}

/// `1 query` or `3 queries`.
fn queries(count: usize) -> String {
    match count {
        1 => "1 query of Prometheus is".to_owned(),
        _ => format!("{count} queries of Prometheus are"),
    }
}

/// A line, for programs.
#[derive(Serialize)]
struct Item<'i> {
    window: &'i Number,
    signal: &'i str,
    ln_fail: f64,
    ln_pass: f64,
    verdict: &'i str,
}

fn no_json(error: &serde_json::Error) -> Failure {
    Failure::new("failed", exit::FAILED, format!("can't write JSON: {error}"))
}

/// For programs, when all of it is known to be good.
struct List<W> {
    out: W,
    items: Vec<u8>,
}

impl<W: Write> Shown for List<W> {
    fn begin(&mut self, _terms: &model::Gate, _gate: &Gate) -> io::Result<()> {
        Ok(())
    }

    fn window(&mut self, recorded: &Recorded, gate: &Gate) -> Result<(), Failure> {
        let window: Number = match recorded.window.subsec_nanos() {
            0 => recorded.window.as_secs().into(),
            _ => seconds(recorded.window).parse().map_err(|error| no_json(&error))?,
        };
        for line in &recorded.lines {
            let (ln_fail, ln_pass) = statistics(line, gate);
            let item = Item {
                window: &window,
                signal: line.signal.name(),
                ln_fail,
                ln_pass,
                verdict: word(gate),
            };
            self.items.push(if self.items.is_empty() { b'[' } else { b',' });
            serde_json::to_writer(&mut self.items, &item).map_err(|error| no_json(&error))?;
        }
        Ok(())
    }

    fn interrupt(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn end(&mut self, _replay: &Replay) -> Result<(), Failure> {
        if self.items.is_empty() {
            self.items.push(b'[');
        }
        self.items.extend_from_slice(b"]\n");
        self.out.write_all(&self.items)?;
        self.out.flush()?;
        Ok(())
    }
}

/// Both statistics of a line's signal, after its window.
fn statistics(line: &Line, gate: &Gate) -> (f64, f64) {
    let seen = gate.progress().signals.iter().find(|seen| seen.signal.0 == line.signal);
    seen.map_or((0.0, 0.0), |seen| (seen.fail.ln(), seen.pass.ln()))
}
