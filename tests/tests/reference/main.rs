//! Random sequences through the real planner and the loaded program, held against a reference
//! that is nothing but a map of open connections: none of them ever changes its backend while
//! that lives and its drain lasts; new ones go where owners and weights say; and where nothing
//! is tracked there is no flow entry (`dsr`).
//!
//! A short run by itself. `CANARY_SEQUENCES=10000` runs so many for each kind of world, and
//! `CANARY_SEED` begins with a certain one: a difference prints both, and the shortest sequence
//! that still shows it.

mod event;
mod reference;
mod run;
mod shrink;

use std::time::{Duration, Instant};

use canary_tests::{asked, model::Random};

use crate::{
    event::{Kind, sequence},
    run::{Bench, Tally},
};

/// How long a kind of world is tried unless a number of sequences is asked for.
const SHORT: Duration = Duration::from_secs(15);
/// Sequences of a short run, if they fit into it.
const SHORT_SEQUENCES: u64 = 100;
/// What is added to the seed for the next sequence.
const NEXT: u64 = 0x9e37_79b9_7f4a_7c15;

fn held_to_the_reference(kind: Kind) {
    let asked = asked::number("CANARY_SEQUENCES");
    let base = asked::seed();
    println!("{kind:?}: CANARY_SEED={base}");
    let begun = Instant::now();
    let mut total = Tally::default();
    let mut sequences = 0;
    let mut bench = None;
    while sequences < asked.unwrap_or(SHORT_SEQUENCES)
        && (asked.is_some() || begun.elapsed() < SHORT)
    {
        let seed = base.wrapping_add(NEXT.wrapping_mul(sequences));
        let (setting, events) = sequence(kind, &mut Random::new(seed));
        let bench = bench.get_or_insert_with(|| Bench::new(&setting));
        match bench.run(&setting, &events) {
            Ok(tally) => total.add(&tally),
            Err(difference) => {
                let report = shrink::report(bench, &setting, &events, &difference);
                panic!("{kind:?}: CANARY_SEED={seed} CANARY_SEQUENCES=1\n{report}");
            }
        }
        sequences += 1;
    }
    println!(
        "{kind:?}: {sequences} sequences in {:.1} s: {total:?}",
        begun.elapsed().as_secs_f64()
    );
    assert!(total.kept > 0, "nothing was kept where it was: sequences that show little");
    assert!(kind != Kind::Dsr || total.steady > 0, "never in a steady state");
}

#[test]
fn no_open_connection_changes_backend_dsr() {
    held_to_the_reference(Kind::Dsr);
}

#[test]
fn no_open_connection_changes_backend_dsr_with_a_full_flow_table() {
    held_to_the_reference(Kind::Small);
}

#[test]
fn no_open_connection_changes_backend_nat() {
    held_to_the_reference(Kind::Nat);
}
