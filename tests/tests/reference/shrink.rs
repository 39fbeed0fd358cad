//! The shortest sequence that still shows a difference.
//!
//! Zeller and Hildebrandt, *Simplifying and isolating failure-inducing input* (2002): parts are
//! left out, ever smaller ones, as long as any difference remains.

use std::fmt::Write as _;

use crate::{
    event::{Event, Setting},
    run::{Bench, Difference},
};

/// Leaves out of `events` whatever is not needed for `fails` to say a difference. The result
/// has none that could be left out alone.
pub(crate) fn shortest<E: Copy, D>(
    events: &[E],
    found: D,
    mut fails: impl FnMut(&[E]) -> Option<D>,
) -> (Vec<E>, D) {
    let (mut kept, mut found) = (events.to_vec(), found);
    let mut part = kept.len().div_ceil(2);
    while part > 0 {
        let mut shorter = false;
        let mut at = 0;
        while at < kept.len() {
            let end = (at + part).min(kept.len());
            let without = [&kept[..at], &kept[end..]].concat();
            match fails(&without) {
                Some(difference) => {
                    (kept, found, shorter) = (without, difference, true);
                }
                None => at = end,
            }
        }
        // Singles are tried until none can be left out.
        part = match (part, shorter) {
            (1, true) => 1,
            _ => part / 2,
        };
    }
    (kept, found)
}

/// What to tell of a difference.
pub(crate) fn report(
    bench: &mut Bench,
    setting: &Setting,
    events: &[Event],
    found: &Difference,
) -> String {
    let (kept, difference) =
        shortest(&events[..=found.at.min(events.len() - 1)], found.clone(), |events| {
            bench.run(setting, events).err()
        });
    let mut text = format!("{setting:?}\n");
    for (at, event) in kept.iter().enumerate() {
        let mark = if at == difference.at { "  <-" } else { "" };
        let _ = writeln!(text, "  {at}: {event:?}{mark}");
    }
    let _ = writeln!(text, "{}", difference.what);
    let _ = writeln!(text, "(at first, event {} of {}: {})", found.at, events.len(), found.what);
    text
}

#[test]
fn what_remains_is_needed() {
    // A sequence fails if 3 comes before 7, and 9 somewhere.
    let fails = |events: &[u32]| {
        let at = |n| events.iter().position(|e| *e == n);
        (at(3)? < at(7)? && at(9).is_some()).then_some(())
    };
    let events: Vec<u32> = (0..200).map(|n| n % 40).collect();
    let (kept, ()) = shortest(&events, (), fails);
    let mut sorted = kept.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [3, 7, 9]);
    assert!(fails(&kept).is_some());
}
