//! Whether packets cost more than they did (`bench --check`): each kind's nanoseconds, as a
//! multiple of the floor's in the same run, against those of a baseline. Multiples are a
//! processor's and a kernel's own: on others nothing is compared.
//!
//! Made so that noise does not fail it. A figure is the mean of the middle half of many runs, in
//! which all kinds take turns; of several rounds, and of several loads of the programs, the least
//! counts, since what disturbs a measurement makes it longer. Of the floor and the empty program, which
//! every multiple is of, it is the median of many copies: now and then one lies so well that it takes a
//! quarter less, and everything would seem to have grown. Kinds that do are measured again, with the
//! programs loaded anew each time, and have grown if all of that has not brought them back while
//! nobody else worked on the processors.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    os::fd::AsFd as _,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use canary_agent::plan::Family;
use canary_tests::floor::Slowed;
use serde::{Deserialize, Serialize};

use crate::{
    cpu::Look,
    packet::{
        self, Empty, kernel,
        kinds::{self, FLOOR, Kind, Worlds},
        median,
    },
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
    #[arg(long, default_value = BASELINE)]
    baseline: PathBuf,
    /// Measure as if each packet cost so many look-ups more: the check has to fail then
    #[arg(long, requires = "check", conflicts_with = "update", default_value_t = 0)]
    slower: u32,
}

/// What comes before a run leaves the caches otherwise in a program that is not optimised, so that
/// it measures other multiples.
const BASELINE: &str = if cfg!(debug_assertions) {
    concat!(env!("CARGO_MANIFEST_DIR"), "/bench-baseline-debug.toml")
} else {
    concat!(env!("CARGO_MANIFEST_DIR"), "/bench-baseline.toml")
};

/// The exit code where there is nothing to compare with, or it can't be told.
const SKIPPED: u8 = 3;

/// The file.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Baseline {
    /// Where it was measured.
    processor: String,
    kernel: String,
    /// By how many percent a multiple may have grown.
    growth: u32,
    /// Nanoseconds of the empty program, and of the floor of IPv4 and of IPv6 above that.
    small_ns: [f64; 3],
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

/// A number for each kind.
type ByKind = BTreeMap<(u8, String), f64>;

/// Nanoseconds, with those of the empty program.
#[derive(Default)]
struct Measured {
    /// Of each kind, the least of all loads.
    least: ByKind,
    /// Of the floor of each family, and the empty program: of each copy.
    small: BTreeMap<(u8, String), Vec<f64>>,
}

impl Measured {
    fn note(&mut self, key: (u8, String), ns: f64) {
        if key == empty_key() || key.1.starts_with("floor") {
            self.small.entry(key).or_default().push(ns);
        } else {
            let before = self.least.entry(key).or_insert(f64::INFINITY);
            *before = before.min(ns);
        }
    }

    fn small(&self, key: &(u8, String)) -> Result<f64> {
        let copies = self.small.get(key).with_context(|| format!("{key:?} was not measured"))?;
        Ok(median(copies.clone()))
    }

    /// What [`Baseline::small_ns`] has.
    fn small_ns(&self) -> Result<[f64; 3]> {
        let empty = self.small(&empty_key())?;
        let floor =
            |family| Ok::<_, anyhow::Error>(self.small(&(family, FLOOR.to_owned()))? - empty);
        Ok([empty, floor(4)?, floor(6)?])
    }

    /// Each kind's multiple of the floor of its family.
    fn multiples(&self) -> Result<ByKind> {
        let [empty, v4, v6] = self.small_ns()?;
        let of_floor = |((family, name), ns): (&(u8, String), &f64)| {
            let floor = if *family == 4 { v4 } else { v6 };
            Ok(((*family, name.clone()), (ns - empty) / floor))
        };
        self.least.iter().map(of_floor).collect()
    }
}

/// What is less than that, in multiples of the floor, is no growth: where a program comes to lie in
/// memory makes as much.
const SLACK: f64 = 0.25;

/// Whether a multiple that was `before` is more now than it may be.
fn has_grown(now: f64, before: f64, limit: f64) -> bool {
    now > before * limit && now > before + SLACK
}

/// Percent of the processors that others may have while something is found to have grown: caches and
/// memory are theirs, too.
const OTHERS_PERCENT: f64 = 5.0;

/// So long it is waited for the others, if need be, from the beginning on.
const PATIENCE: Duration = Duration::from_secs(180);

/// Whether a machine takes as long for the smallest programs as that of the baseline did, so that the
/// others' multiples can be compared: a processor of the same model may be clocked otherwise, and
/// share its memory with busier neighbours.
fn alike(here: [f64; 3], known: [f64; 3]) -> bool {
    // The floors are a third of the empty program, and as uncertain in nanoseconds.
    let most = [1.1, 1.2, 1.2];
    here.iter()
        .zip(known)
        .zip(most)
        .all(|((here, known), most)| *here < known * most && known < *here * most)
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

/// A baseline is the median of so many short measurements: the least of as many loads together
/// would be less than a short check finds.
const UPDATES: usize = 5;

const SHORT: Effort = Effort { loads: 3, runs: [1, 1_000, 1_000], retries: 48 };
const LONG: Effort = Effort { loads: 6, runs: [2, 1_000, 1_000], retries: 48 };

fn key(kind: &Kind) -> (u8, String) {
    (if kind.family == Family::V4 { 4 } else { 6 }, kind.name.clone())
}

/// Loads the programs, and measures those kinds that are wanted.
fn load(
    measured: &mut Measured,
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
        for (kind, net) in kinds.iter().zip(nets) {
            measured.note(key(kind), base.midmean_ns + net.midmean_ns);
        }
        measured.note(empty_key(), base.midmean_ns);
    }
    Ok(())
}

/// Which processor this is. Names alone are shared by several generations.
fn processor() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    Ok(processor_of(&text))
}

/// The same of what the kernel says of all of them.
fn processor_of(text: &str) -> String {
    let lines = || text.lines().filter_map(|line| line.split_once(':'));
    // aarch64 has no names, but numbers.
    let keys = ["model name", "cpu family", "model", "CPU implementer", "CPU part"];
    let found = keys.iter().filter_map(|wanted| {
        let (key, value) = lines().find(|(key, _)| key.trim() == *wanted)?;
        Some(match key.trim() {
            "model name" => value.trim().to_owned(),
            key => format!("{key} {}", value.trim()),
        })
    });
    let found: Vec<String> = found.collect();
    if found.is_empty() { "unknown".to_owned() } else { found.join(", ") }
}

/// A kernel's series: the first two numbers of its release.
fn series(release: &str) -> String {
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    ensure!(arguments.check, "`--check` is missing");
    packet::stay()?;
    let began = Instant::now();
    let Effort { loads, runs, retries } = if arguments.short { SHORT } else { LONG };
    let path = &arguments.baseline;
    let known = fs::read_to_string(path).with_context(|| path.display().to_string());
    let known = known.and_then(|text| Ok(toml::from_str::<Baseline>(&text)?));
    if !arguments.update {
        let known = known.as_ref().map_err(|error| anyhow!("{error:#}"))?;
        let (processor, release) = (processor()?, kernel());
        if processor != known.processor || series(&release) != series(&known.kernel) {
            println!(
                "skipped: the baseline is of another machine ({}, Linux {}; this is {processor}, \
                 Linux {release}); `cargo xtask bench --check --update --baseline FILE` writes one of this, and \
                 `--check --baseline FILE` compares with it",
                known.processor, known.kernel
            );
            return Ok(ExitCode::from(SKIPPED));
        }
    }
    let measure = |loads: usize, runs: [usize; 3]| {
        let mut measured = Measured::default();
        for _ in 0..loads {
            load(&mut measured, runs, arguments.slower, |_| true)?;
        }
        Ok::<_, anyhow::Error>(measured)
    };
    if arguments.update {
        let growth = known.as_ref().map_or(15, |known| known.growth);
        let all: Vec<_> =
            (0..UPDATES).map(|_| measure(SHORT.loads, SHORT.runs)).collect::<Result<_>>()?;
        let baseline = baseline(&all, growth)?;
        let text = format!(
            "# What kinds of packets cost, as multiples of `{FLOOR}`: `cargo xtask bench --check`\n\
             # compares with it, and writes it with `--update`. It fails beyond `growth` percent more.\n\n{}",
            toml::to_string(&baseline)?
        );
        fs::write(path, text).with_context(|| path.display().to_string())?;
        println!(
            "{} kinds written to {} in {:.0?}",
            baseline.ipv4.len() + baseline.ipv6.len(),
            path.display(),
            began.elapsed()
        );
        return Ok(ExitCode::SUCCESS);
    }
    let mut measured = measure(loads, runs)?;
    let known = known?;
    let wanted: ByKind = [(4, &known.ipv4), (6, &known.ipv6)]
        .into_iter()
        .flat_map(|(family, of)| of.iter().map(move |(name, n)| ((family, name.clone()), *n)))
        .collect();
    let limit = f64::from(100 + known.growth) / 100.0;
    let (mut quiet, mut disturbed) = (0, 0);
    let (found, told) = loop {
        let found = measured.multiples()?;
        let grown: Vec<_> = found
            .iter()
            .filter(|(key, multiple)| {
                wanted.get(*key).is_some_and(|before| has_grown(**multiple, *before, limit))
            })
            .map(|(key, _)| key.clone())
            .collect();
        // Of many at a time, noise is not what they have in common for long.
        let retries = if grown.len() * 4 > found.len() { 3 } else { retries };
        if grown.is_empty() || quiet >= retries {
            break (found, true);
        } else if began.elapsed() > PATIENCE {
            break (found, false);
        }
        let before = Look::now()?;
        load(&mut measured, runs, arguments.slower, |key| grown.contains(key))?;
        let spent = Look::now()?.since(&before);
        match spent.others_percent() + spent.stolen_percent() > OTHERS_PERCENT {
            true => disturbed += 1,
            false => quiet += 1,
        }
    };
    let (text, bad) = verdict(&found, &wanted, limit)?;
    let small_ns = measured.small_ns()?;
    let skipped = |why: &str| {
        (format!("skipped: {bad} are not as they were, {why}"), ExitCode::from(SKIPPED))
    };
    let (said, code) = match bad {
        0 => ("none has grown".to_owned(), ExitCode::SUCCESS),
        _ if !told => skipped("while others worked on the processors"),
        _ if !alike(small_ns, known.small_ns) => {
            skipped("on a machine on which the empty program and the floors take another time, too")
        }
        bad => (format!("{bad} are not as they were"), ExitCode::FAILURE),
    };
    println!(
        "{text}the empty program took {:.1} ns (the baseline's {:.1}), the floors {:.1} and {:.1} more \
         ({:.1}, {:.1})\n{} kinds of packets, {loads} loads and {quiet} more, {disturbed} beside others' \
         work, {:.0?}: {said}",
        small_ns[0],
        known.small_ns[0],
        small_ns[1],
        small_ns[2],
        known.small_ns[1],
        known.small_ns[2],
        found.len(),
        began.elapsed()
    );
    Ok(code)
}

/// What several measurements have in common.
fn baseline(all: &[Measured], growth: u32) -> Result<Baseline> {
    let small: Vec<_> = all.iter().map(Measured::small_ns).collect::<Result<_>>()?;
    let multiples: Vec<_> = all.iter().map(Measured::multiples).collect::<Result<_>>()?;
    let mut kinds = [BTreeMap::new(), BTreeMap::new()];
    for key @ (family, name) in multiples.iter().flat_map(ByKind::keys) {
        let of_kind = multiples.iter().filter_map(|one| one.get(key)).copied();
        let ratio = median(of_kind.collect());
        let rounded = (ratio * 1000.0).round() / 1000.0;
        kinds[usize::from(*family == 6)].insert(name.clone(), rounded);
    }
    let [ipv4, ipv6] = kinds;
    let small_ns = std::array::from_fn(|at| {
        let ns = median(small.iter().map(|one| one[at]).collect());
        (ns * 10.0).round() / 10.0
    });
    Ok(Baseline { processor: processor()?, kernel: kernel(), growth, small_ns, ipv4, ipv6 })
}

/// What is said of each kind, those first that have grown most; and how many are not as they
/// should be.
fn verdict(found: &ByKind, wanted: &ByKind, limit: f64) -> Result<(String, usize)> {
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

    fn by_kind<const N: usize>(rows: [(&str, f64); N]) -> ByKind {
        rows.into_iter().map(|(name, n)| ((4, name.to_owned()), n)).collect()
    }

    #[test]
    fn multiples_are_of_the_floor_of_the_family() {
        let mut measured = Measured::default();
        let v4 = |name: &str| (4, name.to_owned());
        for (key, ns) in [
            (empty_key(), 100.0),
            (empty_key(), 100.0),
            (empty_key(), 160.0),
            // One that lies well, and one that was disturbed.
            (v4(FLOOR), 103.0),
            (v4(FLOOR), 110.0),
            (v4(FLOOR), 150.0),
            (v4("dsr"), 115.0),
            (v4("dsr"), 140.0),
            ((6, FLOOR.to_owned()), 120.0),
            ((6, "dsr".to_owned()), 115.0),
        ] {
            measured.note(key, ns);
        }
        let multiples = measured.multiples().unwrap();
        assert_eq!(multiples[&v4("dsr")], 1.5);
        assert_eq!(multiples[&(6, "dsr".to_owned())], 0.75);
        assert_eq!(multiples.len(), 2, "neither floors nor the empty program are compared");
        measured.small.remove(&(6, FLOOR.to_owned()));
        assert!(measured.multiples().is_err(), "there is no floor");
    }

    #[test]
    fn a_baseline_is_the_median_of_measurements() {
        let of = |dsr: f64| {
            let mut one = Measured::default();
            one.note(empty_key(), 80.0);
            for family in [4, 6] {
                one.note((family, FLOOR.to_owned()), 100.0);
                one.note((family, "dsr".to_owned()), 80.0 + dsr);
            }
            one
        };
        let found = baseline(&[of(10.0), of(30.0), of(20.0)], 15).unwrap();
        assert_eq!((found.ipv4["dsr"], found.ipv6["dsr"]), (1.0, 1.0));
        assert_eq!((found.small_ns, found.growth), ([80.0, 20.0, 20.0], 15));
    }

    #[test]
    fn machines_are_alike_that_take_as_long_for_the_smallest_programs() {
        let known = [80.0, 27.0, 30.0];
        assert!(alike(known, known) && alike([74.0, 23.0, 35.0], known));
        for other in
            [[59.0, 27.0, 30.0], [90.0, 27.0, 30.0], [80.0, 20.0, 30.0], [80.0, 27.0, 38.0]]
        {
            assert!(!alike(other, known) && !alike(known, other), "{other:?}");
        }
    }

    #[test]
    fn processors_are_known_by_more_than_their_name() {
        let text = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\
                    processor\t: 1\ncpu family\t: 26\n";
        assert_eq!(processor_of(text), "AMD EPYC, cpu family 25, model 17");
        let text = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n";
        assert_eq!(processor_of(text), "CPU implementer 0x41, CPU part 0xd0c");
        assert_eq!(processor_of(""), "unknown");
        assert_eq!(series("6.18.44-fc-v595"), "6.18");
    }

    #[test]
    fn growth_and_kinds_that_come_or_go_are_bad() {
        let wanted = by_kind([("dsr", 1.0), ("nat", 2.0)]);
        let bad = |found: ByKind| verdict(&found, &wanted, 1.15).unwrap().1;
        assert_eq!(bad(by_kind([("dsr", 1.24), ("nat", 2.29)])), 0);
        assert_eq!(bad(by_kind([("dsr", 1.26), ("nat", 2.0)])), 1);
        assert_eq!(bad(by_kind([("dsr", 1.0), ("nat", 2.31)])), 1);
        let (small, more) = (by_kind([("dsr", 0.01)]), by_kind([("dsr", 0.2)]));
        assert_eq!(verdict(&more, &small, 1.15).unwrap().1, 0, "that is nothing");
        assert_eq!(bad(by_kind([("dsr", 1.0)])), 1, "nat is not measured any more");
        assert_eq!(bad(by_kind([("dsr", 1.0), ("nat", 2.0), ("gue", 1.0)])), 1);
    }
}
