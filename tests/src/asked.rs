//! What the environment asks of a run.

use std::time::UNIX_EPOCH;

/// The number in an environment variable, if it is set.
///
/// # Panics
/// It is no number: another run than the one that was asked for would say nothing.
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

/// Where random numbers begin: at `CANARY_SEED`, else at the clock's time.
pub fn seed() -> u64 {
    let clock = || UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() as u64);
    number("CANARY_SEED").unwrap_or_else(clock)
}
