//! The figures as text.

use std::fmt::Write as _;

use anyhow::Result;

use super::{Cost, Report, Row};

/// How many times as much as where the series begins, by the mean of the middle half.
pub(super) fn times(cost: &Cost, first: &Cost) -> [f64; 2] {
    [cost.net.midmean_ns / first.net.midmean_ns, cost.floor.midmean_ns / first.floor.midmean_ns]
}

pub(super) fn of(report: &Report) -> Result<String> {
    let mut text = String::new();
    let Report { kernel, load_average, loads, runs, rounds, few, .. } = report;
    let load = load_average.map_or_else(|| "-".to_owned(), |load| format!("{load:.1}"));
    writeln!(
        text,
        "net ns a packet over an empty program, median and mean of the middle half; kernel {kernel}, {runs} runs, \
         least of {rounds} rounds, median of {loads} loads; load average {load}\n\
         few: {few} packets in turn, which stay in the caches; all: every client's in turn, scattered\n\
         floor: MAC swap after a look-up in a hash map that knows the same packets, in the same order\n\
         ×: of the first row of its kind, by the mean of the middle half"
    )?;
    let mut grows = "";
    for series in report.series() {
        let [first, ..] = series else { continue };
        if first.grows != grows {
            grows = first.grows;
            writeln!(
                text,
                "\n{:<28} {:>9}  {:^40}  {:^40}\n{:<28} {:>9}  {}  {}",
                format!("{grows}, IPv{}", first.family),
                "",
                "few packets",
                "all in turn",
                "",
                "",
                HEADINGS,
                HEADINGS
            )?;
        }
        for row in series {
            let Row { packet, number, few, in_turn, .. } = row;
            writeln!(
                text,
                "{packet:<28} {number:>9}  {}  {}",
                cells(few, &first.few),
                cells(in_turn, &first.in_turn)
            )?;
        }
    }
    Ok(text)
}

const HEADINGS: &str = "   ns    mid      ×   floor    mid      ×";

fn cells(cost: &Cost, first: &Cost) -> String {
    let Cost { net, floor } = cost;
    let [ours, theirs] = times(cost, first);
    format!(
        "{:>5.0} {:>6.1} {ours:>6.2} {:>7.0} {:>6.1} {theirs:>6.2}",
        net.median_ns, net.midmean_ns, floor.median_ns, floor.midmean_ns
    )
}
