//! The figures as a page.

use std::fmt::Write as _;

use anyhow::Result;

use super::{
    super::page::{self, Bar, escaped},
    Report, Row,
    kinds::{FLOOR, ProgramSize},
    table::{by_packet, many},
};

pub(super) fn of(report: &Report) -> Result<String> {
    let Report { kernel, load_average, loads, runs, rounds, empty, programs, .. } = report;
    let mut page = page::begin("What a packet costs")?;
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
    writeln!(page, "</table></div>")?;
    page::end(&mut page)?;
    Ok(page)
}

/// A bar for each row, and a line where the floor is.
fn plot(page: &mut String, rows: &[(&Row, f64)]) -> Result<()> {
    let bars: Vec<_> = rows
        .iter()
        .map(|(row, value)| Bar {
            name: &row.packet,
            value: *value,
            class: if row.packet.starts_with("floor") { "floor" } else { "bar" },
        })
        .collect();
    let floor = rows.iter().find(|(row, _)| row.packet == FLOOR).map(|(_, ns)| *ns);
    page::plot(page, &bars, floor, 1)
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
