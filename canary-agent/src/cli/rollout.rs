//! `rollout`: begins, shows and steers rollouts.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant, UNIX_EPOCH},
};

use tokio::time::sleep;

use super::{
    args::{self, RolloutBegun, RolloutTold},
    client::{Client, encoded},
    failure::{Failure, exit},
    plan, print, split,
    text::{self, Align, Table, age, maybe_percent, percent},
    watch,
};
use crate::api::{
    model::{ServiceStatus, Status},
    rollout::{
        EvidenceRow, GateStatus, ProbeStatus, RolloutAudience, RolloutHistory, RolloutReport,
        RolloutRequest, RolloutRun, RolloutStatus, RolloutStep, Rollouts, SignalStatus,
    },
};
use crate::{config::derived, rollout::record};

/// How often a rollout that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Which rollout somebody waits for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Of<'a> {
    Name(&'a str),
    Service(&'a str),
}

/// Does what is asked.
pub(super) async fn run(
    client: &Client,
    asked: args::Rollout,
    json: bool,
) -> Result<ExitCode, Failure> {
    let (action, told, full, waits) = match asked {
        args::Rollout::Status { rollout, watch, wait: limit } => {
            let name = rollout.as_deref();
            let show = async || block(client, name, json).await;
            return match (limit, name) {
                (Some(limit), Some(name)) if !watch => {
                    wait(client, Of::Name(name), limit, json).await
                }
                (Some(limit), Some(name)) => {
                    watch_until(client, Of::Name(name), limit, json, show).await
                }
                _ => {
                    match watch {
                        true => drop(watch::again(json, async || Ok((show().await?, None))).await?),
                        false => print(&show().await?)?,
                    }
                    Ok(ExitCode::from(exit::DONE))
                }
            };
        }
        args::Rollout::Plan(asked) => {
            plan::run(client, asked, json).await?;
            return Ok(ExitCode::from(exit::DONE));
        }
        args::Rollout::History { rollout, evidence: _, csv: true, run, step } => {
            if json {
                return Err(Failure::new(
                    "usage",
                    exit::USAGE,
                    "`--csv` is no JSON: leave one of them out",
                )
                .help("`--evidence --json` has the same windows"));
            }
            recording(client, &rollout, run, step).await?;
            return Ok(ExitCode::from(exit::DONE));
        }
        args::Rollout::History { rollout, evidence, csv: false, .. } => {
            history(client, &rollout, evidence, json).await?;
            return Ok(ExitCode::from(exit::DONE));
        }
        args::Rollout::Start(RolloutBegun { told, wait }) => ("start", told, false, wait),
        args::Rollout::Retry(RolloutBegun { told, wait }) => ("retry", told, false, wait),
        args::Rollout::Pause(told) => ("pause", told, false, None),
        args::Rollout::Resume(told) => ("resume", told, false, None),
        args::Rollout::Promote { told, full } => ("promote", told, full, None),
        args::Rollout::Abort(told) => ("abort", told, false, None),
    };
    let RolloutTold { rollout, reason, dry_run, if_revision } = told;
    let request = RolloutRequest { full, reason, dry_run, if_revision };
    let target = format!("/v1/rollouts/{}/{action}", encoded(&rollout));
    let answer = client.post(&target, &request).await?;
    if let (Some(limit), false) = (waits, dry_run) {
        // What is printed is how it ends.
        if !json {
            let report: RolloutReport = answer.read()?;
            let _ = io::stderr().write_all(plan::warned(&report.warnings).trim_start().as_bytes());
        }
        return wait(client, Of::Name(&rollout), limit, json).await;
    }
    match json {
        true => print(&format!("{}\n", answer.text()))?,
        false => print(&reported(&answer.read()?))?,
    }
    Ok(ExitCode::from(exit::DONE))
}

fn reported(report: &RolloutReport) -> String {
    let RolloutReport { applied, revision, text: what, audience, share, .. } = report;
    let RolloutReport { change, rollout, took_us, warnings, .. } = report;
    let mut out = format!("{}\n", text::plain(what));
    match applied {
        true => {
            let took = Duration::from_micros(*took_us);
            out.push_str(&format!("done after {took:?} (revision {revision})\n\n"));
            out.push_str(&drawn(rollout, None));
        }
        false => match (change, share) {
            (Some(change), _) => out.push_str(&split::reported(change)),
            (None, share) => {
                let whose =
                    audience.as_ref().map_or_else(String::new, |name| format!(" of `{name}`"));
                let would =
                    share.iter().map(|share| format!("`{}` would have {share}{whose}", rollout.to));
                let lines = would.chain(["nothing was changed (--dry-run)".to_owned()]);
                out.extend(lines.map(|line| format!("{}\n", text::plain(&line))));
            }
        },
    }
    out + &plan::warned(warnings)
}

/// What there is to print now: one line of JSON, or drawings.
async fn block(client: &Client, name: Option<&str>, json: bool) -> Result<String, Failure> {
    let status: Status = client.get("/v1/status").await?.read()?;
    let found: Vec<RolloutStatus> = status
        .rollouts
        .iter()
        .filter(|one| name.is_none_or(|name| one.name == name))
        .cloned()
        .collect();
    if let (Some(name), true) = (name, found.is_empty()) {
        return Err(unknown(name));
    }
    if json {
        let line = serde_json::to_string(&Rollouts { rollouts: found });
        return Ok(format!("{}\n", line.unwrap_or_default()));
    }
    if found.is_empty() {
        return Ok("no rollouts are configured\n".to_owned());
    }
    let drawings: Vec<String> = found.iter().map(|one| drawn(one, Some(&status))).collect();
    Ok(drawings.join("\n"))
}

fn unknown(name: &str) -> Failure {
    Failure::new("unknown_rollout", exit::FAILED, format!("there is no rollout `{name}`"))
        .help("`canary-agent rollout status` lists them")
}

/// How the rollout that is meant stands.
async fn standing(client: &Client, of: Of<'_>) -> Result<RolloutStatus, Failure> {
    let Rollouts { rollouts } = client.get("/v1/rollouts").await?.read()?;
    let mut its = rollouts.into_iter().filter(|one| match of {
        Of::Name(name) => one.name == name,
        Of::Service(service) => one.service == service && one.run.is_some(),
    });
    // Of several of a service, the one that was begun last.
    let first = its.next();
    let last = its.fold(first, |last, one| match &last {
        Some(known) if known.begun_unix_ms >= one.begun_unix_ms => last,
        _ => Some(one),
    });
    last.ok_or_else(|| match of {
        Of::Name(name) => unknown(name),
        Of::Service(service) => Failure::new(
            "no_rollout",
            exit::FAILED,
            format!("no rollout of service `{service}` was ever begun"),
        ),
    })
}

/// What whoever waits for it ends with; `None` as long as it goes on.
fn ending(status: &RolloutStatus) -> Option<u8> {
    match status.state.as_str() {
        "completed" => Some(exit::DONE),
        "aborted" => Some(exit::ABORTED),
        "idle" => Some(exit::FAILED),
        _ if status.needs_operator => Some(exit::HELD),
        _ => None,
    }
}

/// Shows it every second until it ends, or needs an operator, or the time is over.
pub(super) async fn watch_until(
    client: &Client,
    of: Of<'_>,
    limit: Duration,
    json: bool,
    show: impl AsyncFn() -> Result<String, Failure>,
) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let now = async || {
        // In this order: what is shown last is how it has ended.
        let code = ending(&standing(client, of).await?);
        Ok::<_, Failure>((show().await?, code))
    };
    let ask = async || {
        let late = begun.elapsed() >= limit;
        match now().await {
            Ok((block, code)) => Ok((block, code.or(late.then_some(exit::FAILED)))),
            Err(failure) if late => Ok((watch::told(&failure, json), Some(failure.exit_code()))),
            Err(failure) => Err(failure),
        }
    };
    let code = watch::again(json, ask).await?;
    Ok(ExitCode::from(code.unwrap_or(exit::DONE)))
}

/// Waits for a rollout to end, or to need an operator.
pub(super) async fn wait(
    client: &Client,
    of: Of<'_>,
    limit: Duration,
    json: bool,
) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    loop {
        let found = match standing(client, of).await {
            Ok(found) => Some(found),
            // An agent that is started anew goes on with it.
            Err(failure) if failure.is_silence() && begun.elapsed() < limit => None,
            Err(failure) => return Err(failure),
        };
        let code = found.as_ref().and_then(ending);
        let over = begun.elapsed() >= limit;
        if let (Some(status), true) = (&found, code.is_some() || over) {
            match json {
                true => {
                    let line = serde_json::to_string(status).unwrap_or_default();
                    print(&format!("{line}\n"))?;
                }
                false => print(&drawn(status, None))?,
            }
        }
        match code {
            Some(code) => return Ok(ExitCode::from(code)),
            None if over => return Ok(ExitCode::from(exit::FAILED)),
            None => sleep(LOOK).await,
        }
    }
}

/// A rollout as people know it: its state, its steps, its shares, its evidence.
pub(super) fn drawn(status: &RolloutStatus, all: Option<&Status>) -> String {
    let RolloutStatus { name, service, to, state, step, steps, waits, reason, run, .. } = status;
    let at = step.map_or_else(String::new, |step| format!(", step {step} of {}", steps.len()));
    let number = run.map_or_else(String::new, |run| format!(" (run {run})"));
    let sign = match state.as_str() {
        "completed" => "✔",
        "aborted" => "✖",
        "held" | "paused" => "‖",
        "idle" => "·",
        _ => "◌",
    };
    let mut out =
        text::plain(&format!("{sign} rollout {name}{number}: {service} to {to}, {state}{at}"));
    out.push('\n');
    for (word, line) in [("waits for", waits), ("because", reason)] {
        if let Some(line) = line {
            out.push_str(&text::plain(&format!("  {word} {line}")));
            out.push('\n');
        }
    }
    out.push_str(&times(status));
    if let Some(found) = all.and_then(|all| all.services.iter().find(|one| one.name == *service)) {
        out.push('\n');
        out.push_str(&shares(found, to));
    }
    for RolloutAudience { audience, share } in &status.audiences {
        let table = derived::name(service, audience);
        let found = all.and_then(|all| all.services.iter().find(|one| one.name == table));
        match found {
            Some(found) => {
                out.push_str(&text::plain(&format!("\n  clients of {audience}")));
                out.push('\n');
                out.push_str(&shares(found, to));
            }
            None => {
                out.push_str(&text::plain(&format!("  {to} has {share} of {audience}")));
                out.push('\n');
            }
        }
    }
    if !steps.is_empty() {
        out.push('\n');
        out.push_str(&drawn_steps(status));
    }
    if let Some(gate) = &status.gate {
        out.push('\n');
        out.push_str(&drawn_gate(gate));
    }
    out
}

fn times(status: &RolloutStatus) -> String {
    let RolloutStatus { begun_unix_ms, ended_unix_ms, watched_seconds, left_seconds, .. } = status;
    let time = |ms: &u64| {
        humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(*ms)).to_string()
    };
    let mut parts = Vec::new();
    parts.extend(begun_unix_ms.as_ref().map(|ms| format!("begun {}", time(ms))));
    parts.extend(ended_unix_ms.as_ref().map(|ms| format!("ended {}", time(ms))));
    if status.state == "watching" {
        parts.push(format!("this step watched for {}", age(*watched_seconds)));
        parts.extend(left_seconds.map(|left| format!("{} to hold", age(left.ceil()))));
    }
    match parts.is_empty() {
        true => String::new(),
        false => format!("  {}\n", parts.join(", ")),
    }
}

fn shares(service: &ServiceStatus, to: &str) -> String {
    let mut table = Table::new([
        ("VERSION", Align::Left),
        ("ASKED", Align::Right),
        ("IN FORCE", Align::Right),
        ("MEASURED", Align::Right),
        ("CONNECTIONS", Align::Right),
    ]);
    for version in &service.versions {
        let role = match version.name.as_str() {
            name if name == service.control => " (control)",
            name if name == to => " (canary)",
            _ => "",
        };
        table.row([
            format!("{}{role}", version.name),
            version.asked_text.clone(),
            percent(version.in_force),
            maybe_percent(version.measured),
            version.connections.to_string(),
        ]);
    }
    table.render("  ")
}

fn drawn_steps(status: &RolloutStatus) -> String {
    let mut table = Table::new([
        ("", Align::Left),
        ("STEP", Align::Right),
        ("SHARE", Align::Right),
        ("", Align::Left),
    ]);
    for (number, step) in (1_u32..).zip(&status.steps) {
        let RolloutStep { audience, split, hold_seconds, gate, pause, state } = step;
        let sign = match state.as_str() {
            "done" => "✔",
            "current" => "▶",
            "ended" => "✖",
            _ => "",
        };
        let mut does = Vec::new();
        does.extend(audience.as_ref().map(|audience| format!("of {audience}")));
        does.extend(hold_seconds.map(|seconds| {
            format!("hold {}", humantime::format_duration(Duration::from_secs_f64(seconds)))
        }));
        does.extend(gate.as_ref().map(|gate| format!("gate {gate}")));
        does.extend(pause.then(|| "pause".to_owned()));
        table.row([
            sign.to_owned(),
            number.to_string(),
            split.clone().unwrap_or_default(),
            does.join(", "),
        ]);
    }
    table.render("  ")
}

fn drawn_gate(gate: &GateStatus) -> String {
    let GateStatus {
        name,
        elapsed_seconds,
        min_duration_seconds,
        deadline_seconds,
        verdict,
        because,
        ln_fail_at,
        ln_pass_at,
        signals,
        probes,
    } = gate;
    let verdict = verdict.as_deref().unwrap_or("undecided");
    let mut out = format!(
        "  gate {name}: {verdict} after {}; passes after {} at the earliest, decides until {}\n",
        age(*elapsed_seconds),
        age(*min_duration_seconds),
        age(*deadline_seconds)
    );
    if let Some(because) = because {
        out.push_str(&format!("    {because}\n"));
    }
    out = out.lines().map(|line| format!("{}\n", text::plain(line))).collect();
    if !signals.is_empty() {
        let mut table = Table::new([
            ("SIGNAL", Align::Left),
            ("CANARY", Align::Right),
            ("CONTROL", Align::Right),
            ("WORSE", Align::Left),
            ("GOOD", Align::Left),
        ]);
        for signal in signals {
            let SignalStatus { name, observe, control_events, canary_events, ln_fail, ln_pass } =
                signal;
            let shown = if *observe { " (observed)" } else { "" };
            table.row([
                format!("{name}{shown}"),
                canary_events.to_string(),
                control_events.to_string(),
                bar(*ln_fail, *ln_fail_at),
                bar(*ln_pass, *ln_pass_at),
            ]);
        }
        out.push_str(&table.render("    "));
    }
    if !probes.is_empty() {
        let mut table = Table::new([
            ("ASKED", Align::Left),
            ("GOOD", Align::Right),
            ("BAD", Align::Right),
            ("NO ANSWER", Align::Right),
            ("IN A ROW", Align::Left),
            ("LAST", Align::Left),
        ]);
        for probe in probes {
            let ProbeStatus { kind, asked, observe, good, bad, unanswered, row, .. } = probe;
            let shown = if *observe { " (observed)" } else { "" };
            let in_a_row = match *row {
                row if row < 0 => format!("{} bad of {}", -row, probe.fall),
                row => format!("{row} good of {}", probe.rise),
            };
            let last = match (&probe.last, &probe.last_text) {
                (Some(word), Some(said)) => format!("{word}: {said}"),
                _ => String::new(),
            };
            table.row([
                format!("{kind} {asked}{shown}"),
                good.to_string(),
                bad.to_string(),
                unanswered.to_string(),
                in_a_row,
                last,
            ]);
        }
        out.push_str(&table.render("    "));
    }
    out
}

/// Evidence against its threshold.
fn bar(evidence: f64, threshold: f64) -> String {
    const WIDTH: f64 = 10.0;
    let part = (evidence / threshold).clamp(0.0, 1.0);
    let full = (part * WIDTH).floor() as usize;
    let rest = WIDTH as usize - full;
    format!("[{}{}] {evidence:.1} of {threshold:.1}", "#".repeat(full), "·".repeat(rest))
}

async fn history(client: &Client, name: &str, evidence: bool, json: bool) -> Result<(), Failure> {
    let query = if evidence { "?evidence=true" } else { "" };
    let answer = client.get(&format!("/v1/rollouts/{}/history{query}", encoded(name))).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    let RolloutHistory { name, runs } = answer.read()?;
    if runs.is_empty() {
        return print(&text::plain(&format!("rollout {name} was never begun")).to_string())
            .and_then(|()| print("\n"));
    }
    let mut out = String::new();
    for run in &runs {
        out.push_str(&drawn_run(run));
    }
    print(&out)
}

/// The windows of a run that a gate has counted, as `replay` reads them.
async fn recording(
    client: &Client,
    name: &str,
    run: Option<u64>,
    step: Option<u32>,
) -> Result<(), Failure> {
    let path = format!("/v1/rollouts/{}/history?evidence=true", encoded(name));
    let RolloutHistory { runs, .. } = client.get(&path).await?.read()?;
    let found = match run {
        None => runs.first(),
        Some(number) => runs.iter().find(|one| one.run == number),
    };
    let nothing = |what: String| {
        Failure::new("no_evidence", exit::FAILED, what)
            .help(format!("`canary-agent rollout history {name}` shows its runs"))
    };
    let found = found.ok_or_else(|| match run {
        Some(run) => nothing(format!("rollout `{name}` has no run {run} that is kept")),
        None => nothing(format!("rollout `{name}` was never begun")),
    })?;
    let counted: Vec<&EvidenceRow> =
        found.evidence.iter().filter(|row| row.share.is_some()).collect();
    let step = step.or_else(|| counted.last().map(|row| row.step));
    let mut rows: Vec<&EvidenceRow> =
        counted.into_iter().filter(|row| Some(row.step) == step).collect();
    // A gate that has begun anew has its own windows.
    let fresh = rows.windows(2).rposition(|pair| pair[1].window < pair[0].window);
    rows.drain(..fresh.map_or(0, |at| at + 1));
    rows.retain(|row| row.answer.is_none());
    if rows.is_empty() {
        return Err(nothing(format!("no gate has counted anything in run {} there", found.run)));
    }
    let mut out = format!("{}\n", record::HEADER.join(","));
    for row in rows {
        let EvidenceRow { window, signal, share, control, canary, connections, .. } = row;
        let (share, control) = (share.unwrap_or(0.0), control.unwrap_or(0));
        let canary = canary.unwrap_or(0);
        let connections = connections.map_or_else(String::new, |all| all.to_string());
        out.push_str(&format!("{window},{signal},{share},{control},{canary},{connections}\n"));
    }
    print(&out)
}

fn drawn_run(run: &RolloutRun) -> String {
    let RolloutRun { run, state, step, recipe, reason, begun_unix_ms, ended_unix_ms, evidence } =
        run;
    let time = |ms: u64| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(ms));
    let ended = ended_unix_ms.map_or_else(String::new, |ms| format!(" until {}", time(ms)));
    let why = reason.as_ref().map_or_else(String::new, |why| format!("\n  because {why}"));
    let text = format!(
        "run {run}: {state} at step {step}, from {}{ended}{why}\n  {recipe}",
        time(*begun_unix_ms)
    );
    let mut out: String = text.lines().map(|line| format!("{}\n", text::plain(line))).collect();
    if evidence.is_empty() {
        return out;
    }
    let mut table = Table::new([
        ("STEP", Align::Right),
        ("SECONDS", Align::Right),
        ("SIGNAL", Align::Left),
        ("SHARE", Align::Right),
        ("CONTROL", Align::Right),
        ("CANARY", Align::Right),
        ("ANSWER", Align::Left),
    ]);
    let number = |number: &Option<u64>| number.map_or_else(String::new, |n| n.to_string());
    for row in evidence {
        let EvidenceRow { step, window, signal, share, control, canary, answer, .. } = row;
        table.row([
            step.to_string(),
            format!("{window:.1}"),
            signal.clone(),
            share.map_or_else(String::new, percent),
            number(control),
            number(canary),
            answer.clone().unwrap_or_default(),
        ]);
    }
    out.push_str(&table.render("  "));
    out
}
