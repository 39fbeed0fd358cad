//! Health checks end to end: the real agent, real servers, real connections.

mod follow;
mod many;
mod vip;

use std::time::Duration;

/// From one check to the next.
const INTERVAL: Duration = Duration::from_millis(200);
/// After which a check has failed.
const TIMEOUT: Duration = Duration::from_millis(150);
/// Failures in a row that take a backend down.
const FALL: u32 = 3;

/// What a loaded machine may add to a time that is asked for.
const SLACK: Duration = Duration::from_secs(1);

/// The longest time after which a backend that fails is down: the checks come at a
/// distance of an interval and up to a tenth of it later.
const DOWN_WITHIN: Duration =
    Duration::from_millis(INTERVAL.as_millis() as u64 * FALL as u64 * 11 / 10)
        .saturating_add(TIMEOUT)
        .saturating_add(SLACK);

/// The keys of `health` that say when.
fn pace() -> String {
    format!(
        "interval = \"{}ms\", timeout = \"{}ms\", rise = 2, fall = {FALL}",
        INTERVAL.as_millis(),
        TIMEOUT.as_millis()
    )
}
