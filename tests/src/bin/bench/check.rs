//! Whether packets cost more than they did (`bench --check`): each kind's nanoseconds, as a
//! multiple of the floor's in the same run, against those of `tests/bench-baseline.toml`.
//!
//! Made so that noise does not fail it. A figure is the mean of the middle half of many runs, in
//! which all kinds take turns; of several rounds, and of several loads of the programs, the least
//! counts, since what disturbs a measurement makes it longer. Kinds that seem to have grown are measured again, with the
//! programs loaded anew each time, and have grown if all of that has not brought them back.

use std::{
    collections::BTreeMap, fmt::Write as _, fs, os::fd::AsFd as _, path::PathBuf, process::ExitCode,
};

use anyhow::{Context as _, Result, bail, ensure};
use canary_agent::plan::Family;
use canary_tests::floor::Slowed;
use serde::{Deserialize, Serialize};

use crate::packet::{
    self, Empty, kernel,
    kinds::{self, FLOOR, Kind, Worlds},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Fail if packets cost more than they did, as multiples of what a simple program takes
    #[arg(long)]
    check: bool,
    /// With few loads, which is enough unless something has grown
    #[arg(long, requires = "check")]
    short: bool,
    /// Write down what is measured instead, for later checks
    #[arg(long, requires = "check", conflicts_with = "short")]
    update: bool,
    /// The file that it is written down in
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/bench-baseline.toml"))]
    baseline: PathBuf,
    /// Measure as if each packet cost so many look-ups more: the check has to fail then
    #[arg(long, requires = "check", conflicts_with = "update", default_value_t = 0)]
    slower: u32,
}

/// The file.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Baseline {
    /// Where it was measured.
    processor: String,
    kernel: String,
    /// By how many percent a multiple may have grown.
    growth: u32,
    ipv4: BTreeMap<String, f64>,
    ipv6: BTreeMap<String, f64>,
}

/// The empty program among the kinds, of no family.
fn empty_key() -> (u8, String) {
    (0, "empty".to_owned())
}

/// So often the smallest programs are loaded each time: where they come to lie decides about a fifth
/// of what they take, and every multiple is of theirs.
const COPIES: usize = 5;

/// Nanoseconds of each kind with those of the empty program, the least of all loads.
type Least = BTreeMap<(u8, String), f64>;

/// What is less than that, in multiples of the floor, is no growth: where a program comes to lie in
/// memory makes as much.
const SLACK: f64 = 0.25;

/// Whether a multiple that was `before` is more now than it may be.
fn has_grown(now: f64, before: f64, limit: f64) -> bool {
    now > before * limit && now > before + SLACK
}

/// How much is measured.
struct Effort {
    /// Loads of everything.
    loads: usize,
    /// Rounds, runs of each kind in one, and runs of one kind before it is the next one's turn.
    runs: [usize; 3],
    /// Loads for what seems to have grown, at most.
    retries: usize,
}

const SHORT: Effort = Effort { loads: 3, runs: [1, 1_000, 1_000], retries: 12 };
const LONG: Effort = Effort { loads: 6, runs: [2, 1_000, 1_000], retries: 24 };

fn key(kind: &Kind) -> (u8, String) {
    (if kind.family == Family::V4 { 4 } else { 6 }, kind.name.clone())
}

/// Loads the programs, and measures those kinds that are wanted.
fn load(
    least: &mut Least,
    runs: [usize; 3],
    slower: u32,
    wanted: impl Fn(&(u8, String)) -> bool,
) -> Result<()> {
    // Of one flow's packets a small table is as good as a large one.
    let mut worlds = Worlds::new(1, 1024, 4096)?;
    let mut kinds = worlds.kinds(1)?;
    // One packet of a mixed kind stands for nothing.
    kinds.retain(|kind| !kind.mixed && wanted(&key(kind)));
    let mut all_slowed = Vec::new();
    for kind in kinds.iter_mut().filter(|kind| slower > 0 && kind.name != FLOOR) {
        let slowed = Slowed::new(kind.program.as_fd(), slower)?;
        kind.program = slowed.program()?;
        all_slowed.push(slowed);
    }
    for _ in 0..COPIES {
        kinds.extend(kinds::floors(1)?);
    }
    for _ in 0..COPIES {
        let mut empty = Empty::load()?;
        let (base, nets) = packet::run_once(&mut kinds, &mut empty, &mut worlds.fresh, runs)?;
        let mut note = |key: (u8, String), ns: f64| {
            let before = least.entry(key).or_insert(f64::INFINITY);
            *before = before.min(ns);
        };
        for (kind, net) in kinds.iter().zip(nets) {
            note(key(kind), base.midmean_ns + net.midmean_ns);
        }
        note(empty_key(), base.midmean_ns);
    }
    Ok(())
}

/// Each kind's multiple of the floor of its family.
fn multiples(least: &Least) -> Result<Least> {
    let empty = least.get(&empty_key()).context("the empty program")?;
    let of_floor = |((family, name), ns): (&(u8, String), &f64)| {
        let floor = least.get(&(*family, FLOOR.to_owned())).context("the floor")?;
        Ok(((*family, name.clone()), (ns - empty) / (floor - empty)))
    };
    // The floors are no kinds to be compared: the swap alone is too little to be told from nothing.
    let kinds = least.iter().filter(|(key, _)| **key != empty_key() && !key.1.starts_with("floor"));
    kinds.map(of_floor).collect()
}

/// The processor's name.
fn processor() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    // aarch64 has no names, but numbers.
    let name = lines.find(|(key, _)| ["model name", "CPU part"].contains(&key.trim()));
    Ok(name.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned()))
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    ensure!(arguments.check, "`--check` is missing");
    packet::stay()?;
    let began = std::time::Instant::now();
    let Effort { loads, runs, retries } = if arguments.short { SHORT } else { LONG };
    let path = &arguments.baseline;
    let known = fs::read_to_string(path).with_context(|| path.display().to_string());
    let known = known.and_then(|text| Ok(toml::from_str::<Baseline>(&text)?));
    if !arguments.update
        && let Err(error) = known
    {
        bail!("{error:#}");
    }
    let mut least = Least::new();
    for _ in 0..loads {
        load(&mut least, runs, arguments.slower, |_| true)?;
    }
    let growth = known.as_ref().map_or(15, |known| known.growth);
    if arguments.update {
        let multiples = multiples(&least)?;
        let of = |wanted: u8| {
            let rows = multiples.iter().filter(|((family, _), _)| *family == wanted);
            rows.map(|((_, name), ratio)| (name.clone(), (ratio * 1000.0).round() / 1000.0))
                .collect()
        };
        let baseline = Baseline {
            processor: processor()?,
            kernel: kernel(),
            growth,
            ipv4: of(4),
            ipv6: of(6),
        };
        let text = format!(
            "# What kinds of packets cost, as multiples of `{FLOOR}`: `cargo xtask bench --check`\n\
             # compares with it, and writes it with `--update`. It fails beyond `growth` percent more.\n\n{}",
            toml::to_string(&baseline)?
        );
        fs::write(path, text).with_context(|| path.display().to_string())?;
        println!(
            "{} kinds written to {} in {:.0?}",
            multiples.len(),
            path.display(),
            began.elapsed()
        );
        return Ok(ExitCode::SUCCESS);
    }
    let known = known?;
    let here = processor()?;
    if here != known.processor {
        eprintln!(
            "the baseline is of another processor ({}, this is {here}): its multiples may differ",
            known.processor
        );
    }
    let wanted: Least = [(4, &known.ipv4), (6, &known.ipv6)]
        .into_iter()
        .flat_map(|(family, of)| of.iter().map(move |(name, n)| ((family, name.clone()), *n)))
        .collect();
    let limit = f64::from(100 + growth) / 100.0;
    let mut again = 0;
    let found = loop {
        let found = multiples(&least)?;
        let grown: Vec<_> = found
            .iter()
            .filter(|(key, multiple)| {
                wanted.get(*key).is_some_and(|before| has_grown(**multiple, *before, limit))
            })
            .map(|(key, _)| key.clone())
            .collect();
        // Of many at a time, noise is not what they have in common for long.
        let retries = if grown.len() * 4 > found.len() { 3 } else { retries };
        if grown.is_empty() || again >= retries {
            break found;
        }
        again += 1;
        // The floor stays as it is: it had as many loads as the others had.
        load(&mut least, runs, arguments.slower, |key| grown.contains(key))?;
    };
    let (text, bad) = verdict(&found, &wanted, limit)?;
    println!(
        "{text}{} kinds of packets, {loads} loads and {again} more, {:.0?}: {}",
        found.len(),
        began.elapsed(),
        if bad == 0 { "none has grown".to_owned() } else { format!("{bad} are not as they were") }
    );
    Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is said of each kind, those first that have grown most; and how many are not as they
/// should be.
fn verdict(found: &Least, wanted: &Least, limit: f64) -> Result<(String, usize)> {
    let mut text = String::new();
    let mut bad = 0;
    let mut rows: Vec<_> = found
        .iter()
        .filter_map(|(key, multiple)| Some((multiple / wanted.get(key)?.max(SLACK), key, multiple)))
        .collect();
    rows.sort_by(|a, b| b.0.total_cmp(&a.0));
    writeln!(text, "{:<34} {:>8} {:>8} {:>8}", "× floor", "was", "is", "change")?;
    for (change, key @ (family, name), multiple) in rows {
        let grown = has_grown(*multiple, wanted[key], limit);
        bad += usize::from(grown);
        writeln!(
            text,
            "{:<34} {:>8.2} {multiple:>8.2} {:>+7.0}%{}",
            format!("IPv{family} {name}"),
            wanted[key],
            (change - 1.0) * 100.0,
            if grown { "  GROWN" } else { "" }
        )?;
    }
    for (family, name) in found.keys().filter(|key| !wanted.contains_key(*key)) {
        bad += 1;
        writeln!(text, "IPv{family} {name} is not in the baseline: --update writes it")?;
    }
    for (family, name) in wanted.keys().filter(|key| !found.contains_key(*key)) {
        bad += 1;
        writeln!(text, "IPv{family} {name} is in the baseline, and is not measured any more")?;
    }
    Ok((text, bad))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn least<const N: usize>(rows: [(&str, f64); N]) -> Least {
        rows.into_iter().map(|(name, n)| ((4, name.to_owned()), n)).collect()
    }

    #[test]
    fn multiples_are_of_the_floor_of_the_family() {
        let mut found = least([(FLOOR, 110.0), ("dsr", 115.0)]);
        found.insert(empty_key(), 100.0);
        found.insert((6, FLOOR.to_owned()), 120.0);
        found.insert((6, "dsr".to_owned()), 115.0);
        let multiples = multiples(&found).unwrap();
        assert_eq!(multiples[&(4, "dsr".to_owned())], 1.5);
        assert_eq!(multiples[&(6, "dsr".to_owned())], 0.75);
        assert_eq!(multiples.len(), 2, "neither floors nor the empty program are compared");
        found.remove(&(6, FLOOR.to_owned()));
        assert!(super::multiples(&found).is_err(), "there is no floor");
    }

    #[test]
    fn growth_and_kinds_that_come_or_go_are_bad() {
        let wanted = least([("dsr", 1.0), ("nat", 2.0)]);
        let bad = |found: Least| verdict(&found, &wanted, 1.15).unwrap().1;
        assert_eq!(bad(least([("dsr", 1.24), ("nat", 2.29)])), 0);
        assert_eq!(bad(least([("dsr", 1.26), ("nat", 2.0)])), 1);
        assert_eq!(bad(least([("dsr", 1.0), ("nat", 2.31)])), 1);
        let (small, more) = (least([("dsr", 0.01)]), least([("dsr", 0.2)]));
        assert_eq!(verdict(&more, &small, 1.15).unwrap().1, 0, "that is nothing");
        assert_eq!(bad(least([("dsr", 1.0)])), 1, "nat is not measured any more");
        assert_eq!(bad(least([("dsr", 1.0), ("nat", 2.0), ("gue", 1.0)])), 1);
    }
}
