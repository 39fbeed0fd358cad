//! The figures as text, and as a page.

use std::fmt::Write as _;

use anyhow::Result;

use super::{Figures, Report, Row, SocketRow, Target, live};
use crate::page::{self, Bar, escaped};

/// Above so many percent of all processors, others' work is in the figures.
const QUIET_PERCENT: f64 = 5.0;

fn ratio(n: Option<f64>) -> String {
    n.map_or_else(|| "-".to_owned(), |n| format!("{n:.2}"))
}

fn described(report: &Report) -> String {
    let Report { kernel, processors, rounds, seconds, ports, others_percent, load_average, .. } =
        report;
    format!(
        "kernel {kernel}, {processors} processors, median of {rounds} rounds of {seconds} s each, {ports} source ports; \
         load average {}, others took {others_percent:.1} % of the processors while nothing was sent",
        load_average.map_or_else(|| "-".to_owned(), |load| format!("{load:.1}"))
    )
}

fn forms(report: &Report) -> Vec<usize> {
    let mut forms: Vec<_> = report.frames.iter().map(|row| row.generators).collect();
    forms.dedup();
    forms
}

fn heading(generators: usize) -> String {
    match generators {
        1 => "frames of 64 bytes, one processor sends".to_owned(),
        _ => format!("frames of 64 bytes, {generators} processors send"),
    }
}

/// What stands above the columns of time on processors.
const EXPLAINED: &str = "CPU ns: of all processors, for each packet that arrives, whoever was at work; \
                         threads: of those that send and receive, with all that comes of it";

fn sockets_heading(report: &Report) -> String {
    format!("UDP of 64 bytes from {} sockets to one; paced: {} a second", report.ports, report.pace)
}

pub(super) fn text(report: &Report) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "{}\n{EXPLAINED}", described(report))?;
    if report.others_percent > QUIET_PERCENT {
        writeln!(text, "others' work is in the time on processors: measure on a quiet machine")?;
    }
    for what in &report.missing {
        writeln!(text, "not measured: {what}")?;
    }
    for generators in forms(report) {
        writeln!(
            text,
            "\n{:<44} {:>10} {:>21} {:>8} {:>8} {:>7} {:>10} {:>10}",
            heading(generators),
            "packets/s",
            "rounds",
            "CPU ns",
            "threads",
            "lost %",
            "× MAC swap",
            "× nftables"
        )?;
        for row in report.frames.iter().filter(|row| row.generators == generators) {
            let Row { subject, family, figures, of_swap, of_nftables, .. } = row;
            let Figures { packets_per_second, least, most, cpu_ns, own_ns, lost } = figures;
            writeln!(
                text,
                "{:<44} {packets_per_second:>10.0} {:>21} {cpu_ns:>8.0} {own_ns:>8.0} {:>7.2} {of_swap:>10.2} {:>10}",
                format!("{subject}, IPv{family}"),
                format!("{least:.0}-{most:.0}"),
                lost * 100.0,
                ratio(*of_nftables)
            )?;
        }
    }
    writeln!(text, "\n{}", sockets_heading(report))?;
    writeln!(
        text,
        "{:<28} {:>10} {:>19} {:>8} {:>8} {:>7} {:>10}  {:>13} {:>8} {:>7} {:>12} {:>8}",
        "",
        "packets/s",
        "rounds",
        "CPU ns",
        "threads",
        "lost %",
        "× nftables",
        "paced: CPU ns",
        "threads",
        "lost %",
        "× forwarding",
        "threads"
    )?;
    for row in &report.sockets {
        let SocketRow { subject, flat_out, paced, of_nftables, .. } = row;
        writeln!(
            text,
            "{subject:<28} {:>10.0} {:>19} {:>8.0} {:>8.0} {:>7.2} {:>10}  {:>13.0} {:>8.0} {:>7.2} {:>12.2} {:>8.2}",
            flat_out.packets_per_second,
            format!("{:.0}-{:.0}", flat_out.least, flat_out.most),
            flat_out.cpu_ns,
            flat_out.own_ns,
            flat_out.lost * 100.0,
            ratio(*of_nftables),
            paced.cpu_ns,
            paced.own_ns,
            paced.lost * 100.0,
            row.cpu_of_forwarding,
            row.own_of_forwarding,
        )?;
    }
    writeln!(text, "\naimed at")?;
    for target in &report.targets {
        writeln!(text, "{}", aim(target))?;
    }
    Ok(text)
}

fn aim(Target { what, is, aimed_at, met }: &Target) -> String {
    let met = if *met { "met   " } else { "missed" };
    format!("{met} {what}: {is:.2} ({aimed_at})")
}

/// What a subject's bar looks like.
fn class(subject: &str) -> &'static str {
    if subject.starts_with("ours") { "bar" } else { "floor" }
}

pub(super) fn page(report: &Report) -> Result<String> {
    let mut page = page::begin("Packets a second through veth pairs")?;
    writeln!(
        page,
        "<p>{}. Packets are counted where they arrive. {}.</p>",
        escaped(&described(report)),
        escaped(EXPLAINED)
    )?;
    for what in &report.missing {
        writeln!(page, "<p>Not measured: {}.</p>", escaped(what))?;
    }
    for generators in forms(report) {
        writeln!(page, "<h2>{}</h2>", escaped(&heading(generators)))?;
        let rows = || report.frames.iter().filter(|row| row.generators == generators);
        let name = |row: &Row| format!("{}, IPv{}", row.subject, row.family);
        let names: Vec<_> = rows().map(name).collect();
        let bars = rows().zip(&names).map(|(row, name)| Bar {
            name,
            value: row.figures.packets_per_second,
            class: class(row.subject),
        });
        let swap = rows().find(|row| row.subject == live::SWAP);
        page::plot(
            &mut page,
            &bars.collect::<Vec<_>>(),
            swap.map(|row| row.figures.packets_per_second),
            0,
        )?;
        writeln!(
            page,
            "<div class=\"wide\"><table>\n<tr><th><th>packets/s<th>least<th>most<th>CPU ns<th>threads<th>lost %\
             <th>× MAC swap<th>× nftables</tr>"
        )?;
        for (row, name) in rows().zip(&names) {
            let Figures { packets_per_second, least, most, cpu_ns, own_ns, lost } = row.figures;
            writeln!(
                page,
                "<tr><td>{}<td>{packets_per_second:.0}<td>{least:.0}<td>{most:.0}<td>{cpu_ns:.0}\
                 <td>{own_ns:.0}<td>{:.2}<td>{:.2}<td>{}</tr>",
                escaped(name),
                lost * 100.0,
                row.of_swap,
                ratio(row.of_nftables)
            )?;
        }
        writeln!(page, "</table></div>")?;
    }
    writeln!(page, "<h2>{}</h2>", escaped(&sockets_heading(report)))?;
    let bars = report.sockets.iter().map(|row| Bar {
        name: row.subject,
        value: row.flat_out.packets_per_second,
        class: class(row.subject),
    });
    page::plot(&mut page, &bars.collect::<Vec<_>>(), None, 0)?;
    writeln!(
        page,
        "<div class=\"wide\"><table>\n<tr><th><th>packets/s<th>least<th>most<th>CPU ns<th>threads<th>lost %\
         <th>× nftables<th>paced: CPU ns<th>threads<th>lost %<th>× forwarding<th>threads</tr>"
    )?;
    for row in &report.sockets {
        let SocketRow { subject, flat_out, paced, of_nftables, .. } = row;
        let Figures { packets_per_second, least, most, cpu_ns, own_ns, lost } = flat_out;
        writeln!(
            page,
            "<tr><td>{}<td>{packets_per_second:.0}<td>{least:.0}<td>{most:.0}<td>{cpu_ns:.0}\
             <td>{own_ns:.0}<td>{:.2}<td>{}<td>{:.0}<td>{:.0}<td>{:.2}<td>{:.2}<td>{:.2}</tr>",
            escaped(subject),
            lost * 100.0,
            ratio(*of_nftables),
            paced.cpu_ns,
            paced.own_ns,
            paced.lost * 100.0,
            row.cpu_of_forwarding,
            row.own_of_forwarding
        )?;
    }
    writeln!(page, "</table></div>\n<h2>Aimed at</h2>\n<ul>")?;
    for target in &report.targets {
        writeln!(page, "<li>{}</li>", escaped(&aim(target)))?;
    }
    writeln!(page, "</ul>")?;
    page::end(&mut page)?;
    Ok(page)
}
