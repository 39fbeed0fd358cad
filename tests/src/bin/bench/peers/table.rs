//! The figures as text.

use std::fmt::Write as _;

use anyhow::Result;

use super::{Report, summary::Goal};

/// Others may have so many percent of the processors, or it is said.
const COMPANY: f64 = 5.0;

pub(super) fn of(report: &Report) -> Result<String> {
    let Report { kernel, processors, rounds, seconds, connections, pace, .. } = report;
    let mut text = String::new();
    writeln!(
        text,
        "kernel {kernel}, {processors} processors; medians of {rounds} rounds; {connections} connections at a time for \
         {seconds} s; then {pace} new ones a second for {} s: time from when a request was due, and seconds of processors \
         for a thousand. Own: by the time of the benchmark's processes and the kernel's",
        seconds * 2
    )?;
    writeln!(
        text,
        "\n{:<28} {:>8} {:>10} {:>10} {:>9} {:>8} {:>8} {:>9} {:>9} {:>9} {:>8} {:>7} {:>8}",
        "",
        "new/s",
        "/own CPU s",
        "requests/s",
        "their p99",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "CPU s/1k",
        "of it own",
        "canary %",
        "failed",
        "others %"
    )?;
    for row in &report.rows {
        writeln!(
            text,
            "{:<28} {:>8.0} {:>10.0} {:>10.0} {:>9.0} {:>8.0} {:>8.0} {:>9.0} {:>9.4} {:>9.4} {:>8.2} {:>7} {:>8.1}",
            row.subject.title(),
            row.connections_per_second,
            row.connections_per_own_second,
            row.requests_per_second,
            row.requests_p99_us,
            row.p50_us,
            row.p99_us,
            row.p999_us,
            row.cpu_seconds_per_thousand,
            row.own_seconds_per_thousand,
            row.canary_percent,
            row.failed,
            row.others_percent
        )?;
    }
    if !report.goals.is_empty() {
        writeln!(text, "\n{:<54} {:>9} {:>9} {:>9}", "aimed at", "", "measured", "by own")?;
    }
    for goal in &report.goals {
        let Goal { what, measured, .. } = goal;
        let verdict = if goal.reached { "" } else { "missed" };
        let by_own = goal.by_own.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        writeln!(text, "{what:<54} {:>9} {measured:>9.2} {by_own:>9} {verdict}", wanted(goal))?;
    }
    writeln!(text, "\n{}", report.versions.join("\n"))?;
    if report.rows.iter().any(|row| row.others_percent > COMPANY) {
        writeln!(
            text,
            "others were at work on this machine (others %): read what is own, or run it again"
        )?;
    }
    for failure in &report.failures {
        writeln!(text, "{failure}")?;
    }
    Ok(text)
}

/// `≥ 1.15`.
pub(super) fn wanted(goal: &Goal) -> String {
    format!("{} {:.2}", if goal.at_least { "≥" } else { "≤" }, goal.wanted)
}
