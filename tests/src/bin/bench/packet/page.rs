//! The figures as a page of their own, with bars, that needs nothing from elsewhere.

use std::fmt::Write as _;

use anyhow::Result;

use super::{
    Report, Row,
    kinds::{FLOOR, ProgramSize},
    table::{by_packet, many},
};

const STYLE: &str = "\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.bar { fill: #3b7dd8; }
.floor { fill: #8a8f98; }
.line { stroke: #d8663b; stroke-dasharray: 4 3; }
";

/// Places in a plot: where bars begin, how long the longest is, and how high a row is.
const LEFT: f64 = 230.0;
const LONGEST: f64 = 560.0;
const HIGH: f64 = 18.0;

/// Text in a page.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

pub(super) fn of(report: &Report) -> Result<String> {
    let Report { kernel, load_average, loads, runs, rounds, empty, programs, .. } = report;
    let mut page = String::new();
    writeln!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>What a packet costs</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>What a packet costs</h1>"
    )?;
    let load = load_average.map_or_else(|| "unknown".to_owned(), |load| format!("{load:.1}"));
    writeln!(
        page,
        "<p>Nanoseconds over an empty program (which took {:.0}), on Linux {}, load average {load}: \
         {runs} runs, least of {rounds} rounds, median of {loads} loads. <em>Middle</em>: the mean of \
         the middle half of them. <em>× floor</em>: of “{FLOOR}”, a program that \
         looks a connection up in a hash map and sends the packet back.</p>",
        empty.median_ns,
        escaped(kernel)
    )?;
    for family in [4, 6] {
        let rows = by_packet(report, family);
        writeln!(page, "<h2>IPv{family}</h2>")?;
        writeln!(page, "<h3>One flow, or each run its own</h3>")?;
        let few = rows.iter().map(|(row, _)| (*row, row.net.midmean_ns));
        plot(&mut page, &few.collect::<Vec<_>>())?;
        writeln!(page, "<h3>{} flows</h3>", many(report))?;
        let many_flows = rows.iter().filter_map(|(_, many)| *many);
        let bars = many_flows.map(|row| (row, row.net.midmean_ns));
        plot(&mut page, &bars.collect::<Vec<_>>())?;
        table(&mut page, &rows, many(report))?;
    }
    writeln!(
        page,
        "<h2>Programs</h2>\n<div class=\"wide\"><table>\n<tr><th>program<th>instructions that the verifier \
         went through<th>left after it<th>compiled bytes</tr>"
    )?;
    for ProgramSize { program, verified_insns, xlated_insns, jited_bytes } in programs {
        let number = |n: &Option<u32>| n.map_or_else(String::new, |n| n.to_string());
        writeln!(
            page,
            "<tr><td>{}<td>{}<td>{}<td>{jited_bytes}</tr>",
            escaped(program),
            number(verified_insns),
            number(xlated_insns)
        )?;
    }
    writeln!(page, "</table></div>\n</body>\n</html>")?;
    Ok(page)
}

/// A bar for each row, and a line where the floor is.
fn plot(page: &mut String, rows: &[(&Row, f64)]) -> Result<()> {
    let most = rows.iter().map(|(_, ns)| *ns).fold(1.0, f64::max);
    let width = |ns: f64| (ns / most * LONGEST).max(0.0);
    let height = rows.len() as f64 * HIGH;
    writeln!(page, "<svg viewBox=\"0 0 {} {height}\" role=\"img\">", LEFT + LONGEST + 60.0)?;
    for (nth, (row, ns)) in rows.iter().enumerate() {
        let top = nth as f64 * HIGH;
        let class = if row.packet.starts_with("floor") { "floor" } else { "bar" };
        writeln!(
            page,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect class=\"{class}\" x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{ns:.1}</text>",
            LEFT - 8.0,
            top + 13.0,
            escaped(&row.packet),
            top + 2.0,
            width(*ns),
            HIGH - 4.0,
            LEFT + width(*ns) + 6.0,
            top + 13.0
        )?;
    }
    if let Some((_, ns)) = rows.iter().find(|(row, _)| row.packet == FLOOR) {
        let x = LEFT + width(*ns);
        writeln!(
            page,
            "<line class=\"line\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{height}\"/>"
        )?;
    }
    writeln!(page, "</svg>")?;
    Ok(())
}

fn table(page: &mut String, rows: &[(&Row, Option<&Row>)], many: usize) -> Result<()> {
    writeln!(
        page,
        "<div class=\"wide\"><table>\n<tr><th><th colspan=\"5\">one flow, or each run its own\
         <th colspan=\"4\">{many} flows</tr>\n<tr><th>packet<th>median<th>mean<th>p99<th>middle\
         <th>× floor<th>median<th>mean<th>p99<th>× floor</tr>"
    )?;
    for (few, many) in rows {
        write!(
            page,
            "<tr><td>{}<td>{:.0}<td>{:.1}<td>{:.0}<td>{:.1}<td>{:.2}",
            escaped(&few.packet),
            few.net.median_ns,
            few.net.mean_ns,
            few.net.p99_ns,
            few.net.midmean_ns,
            few.of_floor
        )?;
        if let Some(Row { net, of_floor, .. }) = many {
            write!(
                page,
                "<td>{:.0}<td>{:.1}<td>{:.0}<td>{of_floor:.2}",
                net.median_ns, net.mean_ns, net.p99_ns
            )?;
        } else {
            write!(page, "<td colspan=\"4\">")?;
        }
        writeln!(page, "</tr>")?;
    }
    writeln!(page, "</table></div>")?;
    Ok(())
}
