//! The figures as a page.

use std::fmt::Write as _;

use anyhow::Result;

use super::{
    super::page::{self, Bar, escaped},
    Report,
    summary::{Goal, Row},
    table::wanted,
};

/// What a bar is as long as.
type Value = fn(&Row) -> f64;

pub(super) fn of(report: &Report) -> Result<String> {
    let Report { kernel, processors, rounds, seconds, connections, pace, .. } = report;
    let mut page = page::begin("What clients get, end to end")?;
    writeln!(
        page,
        "<p>Linux {}, {processors} processors, medians of {rounds} rounds: {connections} connections at a time for \
         {seconds} s, then {pace} new ones a second for {} s. The same clients, wires and servers for all.</p>",
        escaped(kernel),
        seconds * 2
    )?;
    let plots: [(&str, Value, usize); 5] = [
        ("New connections a second", |row| row.connections_per_second, 0),
        ("Requests a second on open connections", |row| row.requests_per_second, 0),
        ("At the pace: 99th percentile from when a request was due, µs", |row| row.p99_us, 0),
        ("At the pace: 99.9th percentile, µs", |row| row.p999_us, 0),
        (
            "At the pace: seconds of processors for a thousand",
            |row| row.cpu_seconds_per_thousand,
            4,
        ),
    ];
    for (title, value, digits) in plots {
        writeln!(page, "<h2>{title}</h2>")?;
        let bars: Vec<_> = report
            .rows
            .iter()
            .map(|row| Bar {
                name: row.subject.title(),
                value: value(row),
                class: if row.subject.ours() { "bar" } else { "floor" },
            })
            .collect();
        page::plot(&mut page, &bars, None, digits)?;
    }
    writeln!(
        page,
        "<div class=\"wide\"><table>\n<tr><th><th>new/s<th>a second of own CPU<th>requests/s<th>their p99 µs<th>p50 µs<th>p99 µs\
         <th>p99.9 µs<th>CPU s/1,000<th>of it own<th>canary %<th>failed<th>others %</tr>"
    )?;
    for row in &report.rows {
        writeln!(
            page,
            "<tr><td>{}<td>{:.0}<td>{:.0}<td>{:.0}<td>{:.0}<td>{:.0}<td>{:.0}<td>{:.0}<td>{:.4}<td>{:.4}<td>{:.2}<td>{}<td>{:.1}</tr>",
            escaped(row.subject.title()),
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
    writeln!(
        page,
        "</table></div>\n<h2>What is aimed at</h2>\n<div class=\"wide\"><table>\n\
         <tr><th>medians of the rounds’ ratios<th>aimed at<th>measured<th>by own CPU<th></tr>"
    )?;
    for goal in &report.goals {
        let Goal { what, measured, reached, .. } = goal;
        let verdict = if *reached { "" } else { "missed" };
        let by_own = goal.by_own.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        writeln!(
            page,
            "<tr><td>{}<td>{}<td>{measured:.2}<td>{by_own}<td>{verdict}</tr>",
            escaped(what),
            wanted(goal)
        )?;
    }
    writeln!(page, "</table></div>")?;
    for line in report.versions.iter().chain(&report.failures) {
        writeln!(page, "<p>{}</p>", escaped(line))?;
    }
    page::end(&mut page)?;
    Ok(page)
}
