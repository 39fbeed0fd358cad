//! The lines of a trace.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};

/// A part of a trace, with the number of its first line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) line: usize,
    pub(super) kind: Kind,
}

/// What a part of a trace is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A packet comes in and something becomes of it.
    Packet { interface: Option<String>, input: String, verdict: Verdict, counted: String },
    /// Time goes by without packets.
    Silence(Duration),
    /// A backend's condition changes.
    Backend { name: String, condition: String },
    /// Buckets move.
    Table(String),
    /// Something that holds of placeholders.
    Check(String),
}

/// What should become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Pass,
    Drop,
    Tx(String),
    Redirect(String),
}

/// The steps of a trace.
pub(super) fn parse(text: &str) -> Result<Vec<Step>> {
    let lines: Vec<_> = text
        .lines()
        .enumerate()
        .map(|(i, l)| (i + 1, l.trim()))
        .filter(|(_, l)| !l.is_empty() && !l.starts_with('#'))
        .collect();
    let mut steps = Vec::new();
    let mut at = 0;
    while let Some(&(line, text)) = lines.get(at) {
        at += 1;
        let (mark, rest) = text.split_at(1);
        let rest = rest.trim();
        if mark != ">" {
            let kind = other(mark, rest).with_context(|| format!("line {line}: {text}"))?;
            steps.push(Step { line, kind });
            continue;
        }
        let mut verdict = None;
        let mut counted = String::new();
        while let Some((_, text)) = lines.get(at) {
            match text.split_at(1) {
                ("<", rest) => verdict = Some(rest.trim()),
                ("+", rest) => counted = rest.trim().to_owned(),
                _ => break,
            }
            at += 1;
        }
        let verdict = verdict.with_context(|| format!("line {line}: what becomes of it?"))?;
        let (input, numbers) = numbers(rest)?;
        for n in numbers {
            let fill = |text: &str| text.replace("{}", &n.to_string());
            let kind = packet(&fill(&input), &fill(verdict), fill(&counted))
                .with_context(|| format!("line {line}"))?;
            steps.push(Step { line, kind });
        }
    }
    Ok(steps)
}

/// A line with `{1..9}` made `{}`, and the numbers.
fn numbers(text: &str) -> Result<(String, Range<u32>)> {
    let Some((before, rest)) = text.split_once('{') else { return Ok((text.to_owned(), 0..1)) };
    let (range, after) = rest.split_once('}').context("`{` without `}`")?;
    Ok((format!("{before}{{}}{after}"), self::range(range)?))
}

/// `1..9`, both ends included.
pub(super) fn range(text: &str) -> Result<Range<u32>> {
    let (first, last) = text.split_once("..").with_context(|| format!("`{text}` is no range"))?;
    Ok(first.parse()?..last.parse::<u32>()? + 1)
}

fn packet(input: &str, verdict: &str, counted: String) -> Result<Kind> {
    let (interface, input) = match input.strip_prefix('@') {
        None => (None, input.to_owned()),
        Some(rest) => {
            let (name, input) = rest.split_once(' ').context("no packet")?;
            (Some(name.to_owned()), input.to_owned())
        }
    };
    let (word, output) = verdict.split_once(' ').unwrap_or((verdict, ""));
    let verdict = match (word, output) {
        ("pass", "") => Verdict::Pass,
        ("drop", "") => Verdict::Drop,
        ("tx", output) => Verdict::Tx(output.to_owned()),
        ("redirect", output) => Verdict::Redirect(output.to_owned()),
        _ => bail!("`{verdict}` can't become of a packet"),
    };
    Ok(Kind::Packet { interface, input, verdict, counted })
}

fn other(mark: &str, rest: &str) -> Result<Kind> {
    Ok(match (mark, rest.split_whitespace().collect::<Vec<_>>()[..].as_ref()) {
        ("!", ["silence", time]) => {
            let seconds = time.strip_suffix('s').context("time is in seconds: `31s`")?;
            Kind::Silence(Duration::from_secs_f64(seconds.parse()?))
        }
        ("!", ["table", ..]) => Kind::Table(rest["table".len()..].trim().to_owned()),
        ("!", [name, condition @ ("up" | "down" | "maint" | "unreachable")]) => {
            Kind::Backend { name: (*name).to_owned(), condition: (*condition).to_owned() }
        }
        ("?", [_, ..]) => Kind::Check(rest.to_owned()),
        _ => bail!("a line is `>`, `<`, `+`, `!` or `?` and something that it can hold"),
    })
}

/// What is counted: how much each counter gains.
pub(super) type Gains = BTreeMap<String, i64>;

/// What a `+` line says that a frame of `len_bytes` is counted as; `host` gives the host
/// that a placeholder stands for.
pub(super) fn gains(
    text: &str,
    len_bytes: usize,
    host: impl Fn(&str) -> Result<String>,
) -> Result<Gains> {
    let mut gains = Gains::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        if let Some(more) = part.strip_prefix("flows=") {
            gains.insert("flows".to_owned(), more.parse()?);
            continue;
        }
        let words: Vec<_> = part.split_whitespace().collect();
        let [name, kinds @ ..] = &words[..] else { bail!("nothing is counted") };
        if kinds.is_empty() {
            ensure!(
                canary_ebpf_common::abi::Reason::ALL.iter().any(|r| r.name() == *name),
                "`{name}` is no reason"
            );
            gains.insert((*name).to_owned(), 1);
            continue;
        }
        let name = host(name)?;
        for kind in kinds {
            let counters: &[(&str, i64)] = match *kind {
                "sent" => &[("packets", 1), ("bytes", len_bytes as i64)],
                "opens" => &[("connections", 1)],
                "returned" => &[("returned_packets", 1), ("returned_bytes", len_bytes as i64)],
                other => bail!("`{other}` is not counted"),
            };
            for (counter, more) in counters {
                gains.insert(format!("{name} {counter}"), *more);
            }
        }
    }
    Ok(gains)
}
