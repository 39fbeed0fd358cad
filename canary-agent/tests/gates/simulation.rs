//! Rollouts, simulated with the gate itself, and with what others decide by.
//!
//! Every run lasts an hour and is looked at every second. `CANARY_SIMULATIONS` sets how many
//! runs each case has, and has every case of the grid run; `CANARY_SEED` says where the random
//! numbers begin; with `--nocapture` the tables of `docs/gates.md` are printed.

use std::{env, fmt::Write as _, time::Duration};

use canary_agent::{
    config::model::{self, SignalKind::ConnectFailed},
    rollout::gate::{Counts, Gate, Verdict, Window},
};
use rand_distr::{Binomial, Distribution, Poisson};
use rand_pcg::{Pcg64Mcg, rand_core::SeedableRng};

use crate::{
    rivals::{Measured, Rivals},
    verdict::{config, signal},
};

/// Runs of a case, unless `CANARY_SIMULATIONS` says otherwise: seconds in a debug build.
const RUNS: usize = 20;
const SEED: u64 = 0x0ca1_7a91;
const SECONDS: u64 = 3600;
/// New connections a second, of both versions.
pub(crate) const RATE: f64 = 2000.0;
const ALPHA: f64 = 0.01;

/// Chances that a connection fails which is as it should be.
const BASES: [f64; 5] = [0.0001, 0.0005, 0.002, 0.01, 0.05];
/// A canary's parts of the connections.
const SHARES: [f64; 5] = [0.001, 0.01, 0.05, 0.2, 0.5];
/// How many times as often as control a canary fails.
const RATIOS: [f64; 5] = [1.0, 2.0, 3.0, 5.0, 20.0];
/// Of the first two, those of the short form: ends and middle.
const FEW: [usize; 3] = [0, 2, 4];

pub(crate) fn runs() -> usize {
    let runs = env::var("CANARY_SIMULATIONS").ok();
    runs.map_or(RUNS, |runs| runs.parse().expect("CANARY_SIMULATIONS is a number"))
}

/// Whether everything is to be run, which takes minutes.
fn whole() -> bool {
    env::var_os("CANARY_SIMULATIONS").is_some()
}

/// Those of a list that are run.
fn of(all: [f64; 5]) -> Vec<f64> {
    match whole() {
        true => all.to_vec(),
        false => FEW.map(|at| all[at]).to_vec(),
    }
}

pub(crate) fn seed() -> u64 {
    let seed = env::var("CANARY_SEED").ok();
    seed.map_or(SEED, |seed| seed.parse().expect("CANARY_SEED is a number"))
}

pub(crate) fn random(stream: u64) -> Pcg64Mcg {
    // First of all: what fails is to be seen again.
    println!("seed {}, stream {stream}", seed());
    Pcg64Mcg::seed_from_u64(seed() ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

pub(crate) fn binomial(rng: &mut Pcg64Mcg, of: u64, chance: f64) -> u64 {
    Binomial::new(of, chance).expect("a chance").sample(rng)
}

pub(crate) fn poisson(rng: &mut Pcg64Mcg, mean: f64) -> u64 {
    match mean > 0.0 {
        true => Poisson::new(mean).expect("a mean").sample(rng) as u64,
        false => 0,
    }
}

/// What the world does in a second.
pub(crate) struct Second {
    /// The canary's part of the connections.
    share: f64,
    /// Chance that a connection fails, on control.
    base: f64,
    /// How many times that on the canary.
    ratio: f64,
    /// How many times [`RATE`] connections there are.
    traffic: f64,
    /// Bursts a second: one client that fails so many times in it.
    bursts: f64,
    failures_in_burst: u64,
}

impl Second {
    pub(crate) fn quiet(share: f64, base: f64, ratio: f64) -> Self {
        Self { share, base, ratio, traffic: 1.0, bursts: 0.0, failures_in_burst: 1 }
    }

    fn events(&self, rng: &mut Pcg64Mcg) -> (u64, u64) {
        let Self { share, base, ratio, traffic, bursts, failures_in_burst } = *self;
        let control = poisson(rng, RATE * traffic * (1.0 - share) * base);
        let canary = poisson(rng, RATE * traffic * share * (base * ratio).min(1.0));
        let clients = poisson(rng, bursts);
        let on_canary = if clients > 0 { binomial(rng, clients, share) } else { 0 };
        (
            control + (clients - on_canary) * failures_in_burst,
            canary + on_canary * failures_in_burst,
        )
    }
}

/// How one run ended.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ended {
    /// Second of the abort, and the canary's connections by then.
    pub(crate) aborted: Option<(u64, f64)>,
    pub(crate) passed: bool,
    /// Aborts of [`Rivals::NAMES`].
    rivals: [Option<(u64, f64)>; 3],
}

fn simulate(
    terms: &model::Gate,
    world: &dyn Fn(u64) -> Second,
    with_rivals: bool,
    rng: &mut Pcg64Mcg,
) -> Ended {
    let mut gate = Gate::new(terms);
    let mut rivals = Rivals::new(ALPHA);
    let mut ended = Ended::default();
    let mut canary_connections = 0.0;
    for second in 1..=SECONDS {
        let now = world(second);
        let (control_events, canary_events) = now.events(rng);
        let connections = RATE * now.traffic;
        canary_connections += connections * now.share;
        if gate.verdict().is_none() {
            let control_connections = Some((connections * (1.0 - now.share)).round() as u64);
            let counts =
                Counts { share: now.share, control_events, canary_events, control_connections };
            let verdict = gate.watch(&Window {
                elapsed: Duration::from_secs(second),
                watched: Duration::from_secs(1),
                complete: true,
                counts: &[(ConnectFailed, counts)],
            });
            match verdict {
                Some(Verdict::Fail) => ended.aborted = Some((second, canary_connections)),
                Some(Verdict::Pass) => ended.passed = true,
                Some(Verdict::Inconclusive | Verdict::NoData) | None => {}
            }
        }
        if with_rivals {
            let aborts = rivals.watch(&Measured {
                control_connections: connections * (1.0 - now.share),
                canary_connections: connections * now.share,
                control_events,
                canary_events,
            });
            for (ended, aborts) in ended.rivals.iter_mut().zip(aborts) {
                if aborts && ended.is_none() {
                    *ended = Some((second, canary_connections));
                }
            }
        } else if gate.verdict().is_some() {
            break;
        }
    }
    ended
}

pub(crate) fn many(
    stream: u64,
    terms: &model::Gate,
    world: &dyn Fn(u64) -> Second,
    with_rivals: bool,
) -> Vec<Ended> {
    let mut rng = random(stream);
    (0..runs()).map(|_| simulate(terms, world, with_rivals, &mut rng)).collect()
}

/// A gate that can only fail for an hour: one that has passed can't fail any more, which would
/// flatter it.
fn only_failing() -> model::Gate {
    let min_duration = Duration::from_secs(SECONDS - 1);
    model::Gate { min_duration, alpha: ALPHA, ..config(vec![signal(ConnectFailed, false)]) }
}

pub(crate) fn usual() -> model::Gate {
    model::Gate { alpha: ALPHA, ..config(vec![signal(ConnectFailed, false)]) }
}

/// Wilson's interval for a proportion, at 95 %.
fn interval(hits: usize, of: usize) -> (f64, f64) {
    let (hits, of, z) = (hits as f64, of as f64, 1.96_f64);
    let middle = hits + z * z / 2.0;
    let width = z * (hits * (of - hits) / of + z * z / 4.0).sqrt();
    (((middle - width) / (of + z * z)).max(0.0), (middle + width) / (of + z * z))
}

pub(crate) fn percent(fraction: f64) -> String {
    match fraction {
        0.0 => "0 %".to_owned(),
        1.0 => "100 %".to_owned(),
        f if f < 0.01 => format!("{:.2} %", f * 100.0),
        f => format!("{:.1} %", f * 100.0),
    }
}

fn fault(ratio: f64) -> String {
    match ratio {
        1.0 => "none".to_owned(),
        _ => format!("×{ratio}"),
    }
}

/// How often of all, with its interval where there is anything to say.
pub(crate) fn rate(hits: usize, of: usize) -> String {
    let (low, high) = interval(hits, of);
    format!("{} ({} to {})", percent(hits as f64 / of as f64), percent(low), percent(high))
}

pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

pub(crate) fn table(title: &str, head: &str, rows: &str) {
    let columns = head.matches('|').count() - 1;
    println!(
        "\n{title}: {} runs a case, seed {}\n\n{head}\n|{}\n{rows}",
        runs(),
        seed(),
        " --- |".repeat(columns)
    );
}

/// A healthy canary, whatever its share, its traffic and its luck: no more aborts than α.
fn assert_few_aborts(name: &str, aborts: usize, of: usize) {
    assert_rare(&format!("{name}: healthy canaries that failed"), aborts, of, ALPHA);
}

/// No more than a risk allows, unless by a chance of one in a million.
pub(crate) fn assert_rare(what: &str, times: usize, of: usize, risk: f64) {
    // The chance of fewer, if the risk is what it is.
    let fewer: f64 = (0..times)
        .map(|k| {
            let choose: f64 = (0..k).map(|i| ((of - i) as f64 / (i + 1) as f64).ln()).sum();
            (choose + k as f64 * risk.ln() + (of - k) as f64 * (1.0 - risk).ln()).exp()
        })
        .sum();
    assert!(1.0 - fewer > 1e-6, "{what}: {times} of {of}");
}

/// What the world does at a second of a run, by base rate and share.
type World<'a> = &'a dyn Fn(u64, f64, f64) -> Second;

/// How many healthy canaries fail at each base rate, and what else a row of a table has.
fn false_aborts(
    stream: &mut u64,
    name: &str,
    bases: &[f64],
    shares: &[f64],
    world: World<'_>,
) -> String {
    let (terms, mut rows) = (only_failing(), String::new());
    for base in bases {
        let _ = write!(rows, "| {name} | {} |", percent(*base));
        for share in shares {
            *stream += 1;
            let all = many(*stream, &terms, &|second| world(second, *base, *share), false);
            let aborts = all.iter().filter(|ended| ended.aborted.is_some()).count();
            assert_few_aborts(&format!("{name}, {base} at {share}"), aborts, all.len());
            let _ = write!(rows, " {} |", rate(aborts, all.len()));
        }
        rows.push('\n');
    }
    rows
}

/// The share goes up over the hour.
fn ramp(second: u64) -> f64 {
    SHARES[(second * SHARES.len() as u64 / (SECONDS + 1)) as usize]
}

/// How many times the usual, at a second of an hour that stands for a day: a hundred times as much
/// at the most as at the least.
fn swing(second: u64) -> f64 {
    10_f64.powf((second as f64 / SECONDS as f64 * std::f64::consts::TAU).sin())
}

/// A client now and then fails thirty times at once, on whichever side it is: counted so often.
fn bursts(base: f64, share: f64, failures_in_burst: u64) -> Second {
    Second { bursts: 1.0 / 300.0, failures_in_burst, ..Second::quiet(share, base, 1.0) }
}

/// Traffic and base rate swing together.
fn day(second: u64, base: f64, share: f64) -> Second {
    let base = (base * swing(second)).min(1.0);
    Second { traffic: swing(second) / 4.0, ..Second::quiet(share, base, 1.0) }
}

/// Both versions fail as often as this for a minute.
fn outage(second: u64, base: f64, share: f64) -> Second {
    let out = (1200..1260).contains(&second);
    Second::quiet(share, if out { (base * 50.0).min(1.0) } else { base }, 1.0)
}

#[test]
fn healthy_canaries_are_not_aborted_whatever_happens_to_both() {
    let (bases, shares, mut stream) = (of(BASES), of(SHARES), 100);
    let cases: [(&str, World<'_>); 4] = [
        ("nothing", &|_, base, share| Second::quiet(share, base, 1.0)),
        ("one client in 300 s fails 30 times at once", &|_, base, share| bursts(base, share, 1)),
        ("traffic and base rate swing by 100 as over a day", &day),
        ("a minute in which both fail 50 times as often", &outage),
    ];
    let rows: String = cases
        .into_iter()
        .map(|(name, world)| false_aborts(&mut stream, name, &bases, &shares, world))
        .collect();
    let heads: String = shares.iter().map(|share| format!(" {} |", percent(*share))).collect();
    table("False aborts, by share", &format!("| what happens | base rate |{heads}"), &rows);
    // Here the share is no matter of choice.
    let cases: [(&str, World<'_>); 2] = [
        ("nothing else", &|second, base, _| Second::quiet(ramp(second), base, 1.0)),
        ("swings and bursts as above", &|second, base, _| Second {
            bursts: 1.0 / 300.0,
            ..day(second, base, ramp(second))
        }),
    ];
    let rows: String = cases
        .into_iter()
        .map(|(name, world)| false_aborts(&mut stream, name, &bases, &[0.0], world))
        .collect();
    table(
        "False aborts of a share that goes from 0.1 to 1, 5, 20, 50 %",
        "| what happens | base rate | false aborts |",
        &rows,
    );
}

#[test]
fn what_is_tolerated_is_no_fault_and_a_client_counts_once() {
    let base = 0.002;
    let tolerated = |share: f64| move |_: u64| Second::quiet(share, base, 1.2);
    let cases: [(&str, &dyn Fn(u64) -> Second); 4] = [
        ("worse by just what is tolerated, share 0.1 %", &tolerated(0.001)),
        ("worse by just what is tolerated, share 5 %", &tolerated(0.05)),
        ("worse by just what is tolerated, share 50 %", &tolerated(0.5)),
        (
            "base rate 0.01 %, share 5 %, one client in 300 s fails 30 times at once, counted 30 times",
            &|_| bursts(0.0001, 0.05, 30),
        ),
    ];
    let terms = only_failing();
    let mut rows = String::new();
    for (stream, (name, world)) in cases.into_iter().enumerate() {
        let all = many(250 + stream as u64, &terms, world, false);
        let aborts = all.iter().filter(|ended| ended.aborted.is_some()).count();
        let _ = writeln!(rows, "| {name} | {} |", rate(aborts, all.len()));
        if stream + 1 < cases.len() {
            assert_few_aborts(name, aborts, all.len());
        } else {
            // Why a client counts once: the test knows of events that do not cause each other.
            assert!(aborts * 20 > all.len(), "{name}: {aborts} of {}", all.len());
        }
    }
    table("False aborts at a base rate of 0.2 %", "| what | false aborts |", &rows);
}

/// What is to be reached, of a fault that is found after so many connections of the canary and so
/// many seconds.
fn assert_found_soon(
    (base, share, ratio): (f64, f64, f64),
    found: f64,
    connections: f64,
    seconds: f64,
) {
    let case = format!("×{ratio} of {base} at {share}");
    if (base, ratio) == (0.002, 5.0) && share <= 0.05 {
        assert!(found > 0.99 && connections <= 1_500.0, "{case}: {found}, {connections}");
    }
    // In two windows of fewer connections, no test can do it.
    if ratio == 20.0 && base >= 0.002 && share >= 0.05 {
        assert!(found >= 1.0 && seconds <= 2.0, "{case}: {found}, {seconds} s");
    }
}

#[test]
fn faults_are_found_and_how_soon() {
    let mut rows = String::new();
    let mut stream = 300;
    let shares: Vec<f64> = of(SHARES);
    for base in of(BASES) {
        for share in &shares {
            let _ = write!(rows, "| {} | {} |", percent(base), percent(*share));
            for ratio in RATIOS {
                stream += 1;
                if base * ratio >= 1.0 && !whole() {
                    rows.push_str(" |");
                    continue;
                }
                let all = many(stream, &usual(), &|_| Second::quiet(*share, base, ratio), false);
                let part = |count: usize| count as f64 / all.len() as f64;
                let found: Vec<(u64, f64)> = all.iter().filter_map(|ended| ended.aborted).collect();
                let passed = part(all.iter().filter(|ended| ended.passed).count());
                let failed = part(found.len());
                if ratio > 1.0 && found.len() * 2 > all.len() {
                    let seconds = found.iter().map(|(second, _)| *second as f64).collect();
                    let connections = found.iter().map(|(_, connections)| *connections).collect();
                    let seconds = median(seconds).unwrap_or(f64::INFINITY);
                    let connections = median(connections).unwrap_or(f64::INFINITY);
                    assert_found_soon((base, *share, ratio), failed, connections, seconds);
                    let _ =
                        write!(rows, " {}: {connections:.0} in {seconds:.0} s |", percent(failed));
                } else {
                    let _ = write!(rows, " {}, {} passed |", percent(failed), percent(passed));
                }
                if ratio >= 3.0 {
                    let what = format!("×{ratio} of {base} at {share} that passed");
                    let passed = all.iter().filter(|ended| ended.passed).count();
                    assert_rare(&what, passed, all.len(), usual().beta);
                } else if ratio <= 1.0 {
                    assert_few_aborts(&format!("{base} at {share}"), found.len(), all.len());
                }
            }
            rows.push('\n');
        }
    }
    let heads: String = RATIOS.iter().map(|ratio| format!(" {} |", fault(*ratio))).collect();
    table(
        "Faults: how many fail, and where most do the canary's connections and seconds until then (median)",
        &format!("| base rate | share |{heads}"),
        &rows,
    );
}

/// What a look each second costs: the more connections there are in one, the later it is said.
#[test]
fn five_times_as_bad_is_found_on_few_connections() {
    let (base, ratio) = (0.002, 5.0);
    let mut rows = String::new();
    for (stream, traffic) in [(600, 1.0), (610, 0.1)] {
        let _ = write!(rows, "| {:.0} |", RATE * traffic);
        for (at, share) in (0..).zip([0.01, 0.05, 0.2, 0.5]) {
            let world = |_: u64| Second { traffic, ..Second::quiet(share, base, ratio) };
            let mut connections = Vec::new();
            // Ten times as often as other cases: what is asked of it is near.
            for part in 0..10 {
                let all = many(stream * 100 + at * 10 + part, &usual(), &world, false);
                connections.extend(all.iter().map(|ended| {
                    ended.aborted.map_or(f64::INFINITY, |(_, connections)| connections)
                }));
            }
            let median = median(connections).expect("runs");
            // At half and half no test can do with fewer than 2,064 (docs/gates.md). A fifth of
            // 2,000 a second is 400 of the canary's, and the median at the edge of a look.
            if share <= 0.05 || share <= 0.2 && (traffic < 1.0 || whole()) {
                assert!(median <= 1_500.0, "at {share}, {traffic}: {median}");
            }
            let _ = write!(rows, " {median:.0} |");
        }
        rows.push('\n');
    }
    table(
        "×5 of 0.2 %: the canary's connections (median), by connections a second and share",
        "| connections a second | 1 % | 5 % | 20 % | 50 % |",
        &rows,
    );
}

/// Over the same seconds: how many abort of whom, and the canary's connections until then.
fn compared(
    stream: u64,
    world: &dyn Fn(u64) -> Second,
    row: &str,
    rows: &mut String,
) -> [usize; 4] {
    let all = many(stream, &only_failing(), world, true);
    let mut aborts = [0; 4];
    let _ = write!(rows, "| {row} |");
    for (which, aborts) in aborts.iter_mut().enumerate() {
        let aborted = |ended: &Ended| match which {
            0 => ended.aborted,
            rival => ended.rivals[rival - 1],
        };
        let found: Vec<(u64, f64)> = all.iter().filter_map(aborted).collect();
        *aborts = found.len();
        let after = median(found.iter().map(|(_, connections)| *connections).collect());
        let after = after.map_or(String::new(), |after| format!(", {after:.0}"));
        let _ = write!(rows, " {}{after} |", percent(found.len() as f64 / all.len() as f64));
    }
    rows.push('\n');
    aborts
}

#[test]
fn others_fail_healthy_canaries_or_find_less() {
    let share = 0.05;
    let (mut rows, mut stream) = (String::new(), 500);
    let bases = if whole() { BASES.to_vec() } else { vec![0.002] };
    for base in bases {
        for ratio in RATIOS {
            stream += 1;
            let row = format!("{} | {}", percent(base), fault(ratio));
            let world = |_| Second::quiet(share, base, ratio);
            let aborts = compared(stream, &world, &row, &mut rows);
            if ratio <= 1.0 {
                assert_few_aborts("the gate", aborts[0], runs());
            }
            if (base, ratio) == (0.002, 1.0) {
                // Why none of them will do.
                assert!(aborts[1] * 10 > runs() * 9, "the fixed threshold: {aborts:?}");
                assert!(aborts[2] * 20 > runs(), "repeated z-tests: {aborts:?}");
            }
        }
    }
    let base = 0.002;
    let swings: [(&str, &dyn Fn(u64) -> Second); 3] = [
        ("none, as over a day", &|second| day(second, base, share)),
        ("none, an outage of both", &|second| outage(second, base, share)),
        ("none, bursts counted once", &|_| bursts(base, share, 1)),
    ];
    for (what, world) in swings {
        stream += 1;
        let row = format!("{} | {what}", percent(base));
        let aborts = compared(stream, world, &row, &mut rows);
        assert_few_aborts(what, aborts[0], runs());
    }
    let head = Rivals::NAMES.join(" | ");
    table(
        "Aborts, and the canary's connections until then (median), at a share of 5 %",
        &format!("| base rate | fault | gate | {head} |"),
        &rows,
    );
}
