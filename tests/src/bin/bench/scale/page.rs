//! The figures as a page of their own, with bars.

use std::fmt::Write as _;

use anyhow::Result;

use super::{Cost, Report, Row, table::times};
use crate::page::{self, Bar, escaped};

pub(super) fn of(report: &Report) -> Result<String> {
    let Report { kernel, load_average, loads, runs, rounds, few, .. } = report;
    let mut page = page::begin("What a packet costs, against what there is")?;
    let load = load_average.map_or_else(|| "unknown".to_owned(), |load| format!("{load:.1}"));
    writeln!(
        page,
        "<p>Nanoseconds over an empty program, the mean of the middle half of runs, on Linux {}, load average \
         {load}: {runs} runs, least of {rounds} rounds, median of {loads} loads. <em>Few</em>: {few} packets in \
         turn, which stay in the caches. <em>All</em>: every client's in turn, scattered. <em>Floor</em> (grey): \
         a program that looks the packet up in a hash map that knows the same packets, and sends it back.</p>",
        escaped(kernel)
    )?;
    let mut grows = "";
    for series in report.series() {
        let [first, ..] = series else { continue };
        if first.grows != grows {
            grows = first.grows;
            writeln!(page, "<h2>{}, IPv{}</h2>", escaped(grows), first.family)?;
        }
        writeln!(page, "<h3>{}</h3>", escaped(&first.packet))?;
        let mut figures = Vec::new();
        for way in ["few", "all"] {
            for row in series {
                let Cost { net, floor } = if way == "few" { row.few } else { row.in_turn };
                for (what, of, class) in [("", net, "bar"), (", floor", floor, "floor")] {
                    let name = format!("{}, {way}{what}", row.number);
                    figures.push((name, of.midmean_ns, class));
                }
            }
        }
        let bars: Vec<_> =
            figures.iter().map(|(name, value, class)| Bar { name, value: *value, class }).collect();
        page::plot(&mut page, &bars, Some(first.few.net.midmean_ns), 1)?;
        table(&mut page, series, first)?;
    }
    page::end(&mut page)?;
    Ok(page)
}

fn table(page: &mut String, series: &[Row], first: &Row) -> Result<()> {
    writeln!(
        page,
        "<div class=\"wide\"><table>\n<tr><th>{}<th>services<th>clients<th>backends each<th>buckets each\
         <th>few: median<th>middle<th>× first<th>floor<th>× first\
         <th>all: median<th>middle<th>× first<th>floor<th>× first</tr>",
        escaped(first.grows)
    )?;
    for row in series {
        let Row { number, services, clients, backends, buckets, few, in_turn, .. } = row;
        write!(page, "<tr><td>{number}<td>{services}<td>{clients}<td>{backends}<td>{buckets}")?;
        for (cost, first) in [(few, &first.few), (in_turn, &first.in_turn)] {
            let Cost { net, floor } = cost;
            let [ours, theirs] = times(cost, first);
            write!(
                page,
                "<td>{:.0}<td>{:.1}<td>{ours:.2}<td>{:.1}<td>{theirs:.2}",
                net.median_ns, net.midmean_ns, floor.midmean_ns
            )?;
        }
        writeln!(page, "</tr>")?;
    }
    writeln!(page, "</table></div>")?;
    Ok(())
}
