//! The figures as text: a table for each family, and one of the programs.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};

use super::{
    Report, Row,
    kinds::{FLOOR, ProgramSize},
};

/// The rows of a family: what was measured in one flow, and in many.
pub(super) fn by_packet(report: &Report, family: u8) -> Vec<(&Row, Option<&Row>)> {
    let of_family = || report.rows.iter().filter(move |row| row.family == family);
    let few = of_family().filter(|row| row.flows == 1);
    few.map(|row| (row, of_family().find(|many| many.flows != 1 && many.packet == row.packet)))
        .collect()
}

/// The flows of the rows with many.
pub(super) fn many(report: &Report) -> usize {
    report.rows.iter().map(|row| row.flows).max().unwrap_or(1)
}

fn number(n: Option<f64>, digits: usize) -> String {
    n.map_or_else(|| "-".to_owned(), |n| format!("{n:.digits$}"))
}

pub(super) fn of(report: &Report) -> Result<String> {
    let mut text = String::new();
    let Report { kernel, load_average, loads, runs, rounds, block, empty, programs, .. } = report;
    writeln!(
        text,
        "net ns a packet over an empty program; kernel {kernel}, {runs} runs in blocks of {block}, least of {rounds} rounds, median of {loads} loads; load average {}",
        number(*load_average, 1),
    )?;
    writeln!(
        text,
        "(the empty program: median {:.0}, mean {:.0}, p99 {:.0})",
        empty.median_ns, empty.mean_ns, empty.p99_ns
    )?;
    writeln!(
        text,
        "rep.: many runs a call (--repeated); × floor: of `{FLOOR}`, by the mean of the middle half of runs"
    )?;
    for family in [4, 6] {
        writeln!(
            text,
            "\n{:<28} {:>40}  {:>32}",
            format!("IPv{family}"),
            "one flow, or each run its own",
            format!("{} flows", many(report))
        )?;
        writeln!(
            text,
            "{:<28} {:>7} {:>7} {:>7} {:>7} {:>8}  {:>7} {:>7} {:>7} {:>8}",
            "packet",
            "median",
            "mean",
            "p99",
            "rep.",
            "× floor",
            "median",
            "mean",
            "p99",
            "× floor"
        )?;
        for (few, many) in by_packet(report, family) {
            write!(
                text,
                "{:<28} {:>7.0} {:>7.1} {:>7.0} {:>7} {:>8.2}",
                few.packet,
                few.net.median_ns,
                few.net.mean_ns,
                few.net.p99_ns,
                number(few.repeated_ns, 1),
                few.of_floor
            )?;
            if let Some(Row { net, of_floor, .. }) = many {
                write!(
                    text,
                    "  {:>7.0} {:>7.1} {:>7.0} {of_floor:>8.2}",
                    net.median_ns, net.mean_ns, net.p99_ns
                )?;
            }
            writeln!(text)?;
        }
    }
    let or_unknown = |n: &Option<u32>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    writeln!(
        text,
        "\n{:<12} {:>20} {:>22} {:>14}",
        "program", "instructions, seen by the verifier", "left after it", "compiled bytes"
    )?;
    for ProgramSize { program, verified_insns, xlated_insns, jited_bytes } in programs {
        writeln!(
            text,
            "{program:<12} {:>34} {:>22} {jited_bytes:>14}",
            or_unknown(verified_insns),
            or_unknown(xlated_insns)
        )?;
    }
    let ingress = programs.first().context("a program")?;
    writeln!(text, "({} is what every packet meets first)", ingress.program)?;
    Ok(text)
}
