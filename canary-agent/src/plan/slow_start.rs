//! Slow start: a backend that comes back takes its share little by little.
//!
//! A ramp is the way from one table to another, from the one without the backend to the
//! one with it: of the buckets in which they differ, more and more are as in the second.
//! No bucket goes another way, so the whole ramp moves just what coming back at once would.
//! Weights are not touched: a table compiled for other weights would move others' buckets.
//!
//! Where all that a version has are backends that come back, there is nobody to take over
//! from, and the first of them have their whole share at once.

use canary_ebpf_common::entry::BackendIndex;

use super::{BootMs, LiveBackend, ownership::mix};

/// In how many steps a backend comes to its whole share.
pub const STEPS: u32 = 32;

/// How much of its share a backend takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowStart {
    /// None: it takes no new connections.
    Away,
    /// More with time, since then.
    Since(BootMs),
    /// All of it.
    Whole,
}

impl SlowStart {
    /// When the ramp began that is under way.
    pub fn since_ms(self) -> Option<BootMs> {
        match self {
            Self::Since(since) => Some(since),
            Self::Away | Self::Whole => None,
        }
    }

    /// How many of [`STEPS`] parts of its share it takes.
    pub fn step(self, duration_ms: u64, now_ms: BootMs) -> u32 {
        match self {
            Self::Away => 0,
            Self::Whole => STEPS,
            Self::Since(since) => {
                let elapsed = now_ms.saturating_sub(since);
                let steps = elapsed.saturating_mul(u64::from(STEPS)).checked_div(duration_ms);
                steps.map_or(STEPS, |steps| steps.clamp(1, u64::from(STEPS)) as u32)
            }
        }
    }

    /// When it takes more.
    fn next_ms(self, duration_ms: u64, now_ms: BootMs) -> Option<BootMs> {
        let step = u64::from(self.step(duration_ms, now_ms));
        let since = self.since_ms()?;
        Some(since + ((step + 1) * duration_ms).div_ceil(u64::from(STEPS)))
    }
}

/// What a record keeps of a ramp's beginning: not 0, and nothing later than it.
pub(super) fn mark(since_ms: BootMs) -> u32 {
    match since_ms as u32 {
        0 => u32::MAX,
        mark => mark,
    }
}

/// When the ramp began of which a record has kept `mark`; 0: there is none. Ramps last a
/// day at most and marks come round in 49: a mark is of the last time that fits.
pub(super) fn marked(mark: u32, now_ms: BootMs) -> Option<BootMs> {
    let elapsed = (now_ms as u32).wrapping_sub(mark);
    (mark != 0).then(|| now_ms.saturating_sub(u64::from(elapsed)))
}

/// Brings the ramps up to date: what has come back begins one, what has gone ends it.
/// Returns whether any has changed, and when the next step is due.
pub(super) fn follow(
    backends: &mut [LiveBackend],
    duration_ms: u64,
    now_ms: BootMs,
) -> (bool, Option<BootMs>) {
    let mut changed = false;
    for backend in &mut *backends {
        let now = match (backend.takes_new(), backend.slow_start) {
            (false, _) => SlowStart::Away,
            (true, SlowStart::Away) if duration_ms > 0 => SlowStart::Since(now_ms),
            (true, ramp) if ramp.step(duration_ms, now_ms) < STEPS && duration_ms > 0 => ramp,
            (true, _) => SlowStart::Whole,
        };
        changed |= now != backend.slow_start;
        backend.slow_start = now;
    }
    // Who comes back first where nobody is has all there is.
    let ramping: Vec<(u8, BootMs)> =
        backends.iter().filter_map(|b| Some((b.slot, b.slow_start.since_ms()?))).collect();
    for slot in ramping.iter().map(|(slot, _)| *slot) {
        let of_slot = |b: &&LiveBackend| b.slot == slot;
        if backends.iter().filter(of_slot).any(|b| b.slow_start == SlowStart::Whole) {
            continue;
        }
        let first = ramping.iter().filter(|(at, _)| *at == slot).map(|(_, since)| *since).min();
        for backend in backends.iter_mut().filter(|b| b.slot == slot) {
            if backend.slow_start.since_ms().is_some_and(|since| Some(since) == first) {
                backend.slow_start = SlowStart::Whole;
                changed = true;
            }
        }
    }
    let next = backends.iter().filter_map(|b| b.slow_start.next_ms(duration_ms, now_ms)).min();
    (changed, next)
}

/// A backend on its way to its whole share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ramp {
    pub(super) index: BackendIndex,
    /// `compile::identity` of its address: what decides which buckets come first.
    pub(super) identity: u64,
    /// Of [`STEPS`].
    pub(super) step: u32,
}

/// Makes of the table `whole`, in which backends on a ramp have all of their share, and the
/// table `without` them, the one in which they have the part that is due.
///
/// Each gets at least one bucket. Its first buckets are the same at every step, and are
/// taken evenly from those that have them in `without`.
pub(super) fn blend(whole: &mut [BackendIndex], without: &[BackendIndex], ramps: &[Ramp]) {
    for ramp in ramps {
        let mut taken: Vec<(BackendIndex, u64, u32)> = (0_u32..)
            .zip(whole.iter().zip(without))
            .filter(|(_, (with, without))| **with == ramp.index && !without.is_none())
            .map(|(bucket, (_, without))| {
                (*without, mix(ramp.identity ^ u64::from(bucket)), bucket)
            })
            .collect();
        taken.sort_unstable();
        // Each of those it takes from gives its first at the same time as the others, its
        // second, and so on: by the middle of each bucket's place among its giver's.
        let mut order: Vec<(u64, u64, u32)> = Vec::with_capacity(taken.len());
        for giver in taken.chunk_by(|a, b| a.0 == b.0) {
            let length = giver.len() as u64;
            order.extend((0_u64..).zip(giver).map(|(nth, (_, hash, bucket))| {
                (((2 * nth + 1) << 32) / (2 * length), *hash, *bucket)
            }));
        }
        order.sort_unstable();
        let due = (order.len() as u64 * u64::from(ramp.step)).div_ceil(u64::from(STEPS));
        for (_, _, bucket) in order.iter().skip(due.max(1) as usize) {
            whole[*bucket as usize] = without[*bucket as usize];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_reads_back_for_as_long_as_a_ramp_can_last() {
        const DAY: u64 = 24 * 60 * 60 * 1000;
        for since in [1, 1_000, u64::from(u32::MAX) - 5, 1 << 32, (7 << 32) + 123] {
            for elapsed in [0, 1, 10, 30_000, DAY] {
                let read = marked(mark(since), since + elapsed).expect("a mark");
                assert!(read.abs_diff(since) <= 1, "{since} + {elapsed}: {read}");
            }
        }
        assert_eq!(marked(0, 5), None);
    }

    #[test]
    fn a_step_is_due_when_the_clock_says_so_and_not_before() {
        for duration in [1, 7, 31, 32, 33, 1_000, 30_000, 86_400_000] {
            let ramp = SlowStart::Since(1_000);
            let (mut now, mut step) = (1_000, 0);
            while ramp.step(duration, now) < STEPS {
                assert!(ramp.step(duration, now) > step, "{duration}: {now} is no step");
                step = ramp.step(duration, now);
                let next = ramp.next_ms(duration, now).expect("a next one");
                assert!(next > now && ramp.step(duration, next - 1) == step, "{duration}: {now}");
                now = next;
            }
            assert_eq!(now, 1_000 + duration);
        }
    }
}
