//! The connections that are watched: which ones, what they have done, and letting them go.
//!
//! All of it is one thread's, which the loop tells what is wanted. It decides nothing: what is to
//! be watched, and what follows from what was seen, is [`crate::signals`]' business.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use aya::{
    Pod,
    maps::{Array, Map, MapData, PerCpuArray, RingBuf},
};
use canary_ebpf_common::{
    abi::{FORGET_MOST, FORGET_OFFSET, Sampling, SignalEvent, VersionSignals},
    signals,
};

use super::{
    Error, flows, monotonic_ns,
    pins::{Pins, signal_slots},
    pod,
    sweep::run,
};

/// Batches of [`flows::walk`] between pauses.
const BATCHES: usize = 1;

/// A version of a table: an element of `SAMPLING`.
pub type Place = u32;

/// The maps of what is watched. For one thread.
pub struct Signals {
    sampling: Array<MapData, pod::Sampling>,
    counters: PerCpuArray<MapData, pod::VersionSignals>,
    ring: RingBuf<MapData>,
    v4: (OwnedFd, OwnedFd),
    v6: (OwnedFd, OwnedFd),
    samples: u32,
}

impl Signals {
    pub(super) fn open(
        pins: &Pins,
        (judge_v4, judge_v6): (OwnedFd, OwnedFd),
        samples: u32,
    ) -> Result<Self, Error> {
        let map = |name: &str| MapData::from_pin(pins.map(name));
        let descriptor = |name: &str| -> Result<OwnedFd, Error> {
            Ok(map(name)?.fd().as_fd().try_clone_to_owned()?)
        };
        Ok(Self {
            sampling: Map::Array(map("SAMPLING")?).try_into()?,
            counters: Map::PerCpuArray(map("SIGNAL_COUNTERS")?).try_into()?,
            ring: Map::RingBuf(map("SIGNALS")?).try_into()?,
            v4: (descriptor("SAMPLES_V4")?, judge_v4),
            v6: (descriptor("SAMPLES_V6")?, judge_v6),
            samples,
        })
    }

    /// Connections that can be watched at a time, of each family; 0 where none ever are.
    pub fn capacity(&self) -> u32 {
        self.samples
    }

    /// Versions that can be watched at a time.
    pub fn slots(&self) -> u32 {
        signal_slots(self.samples)
    }

    /// How many places there are.
    pub fn places(&self) -> Place {
        self.sampling.len()
    }

    /// What is watched at a place.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn sampling(&self, place: Place) -> Result<Sampling, Error> {
        Ok(self.sampling.get(&place, 0)?.0)
    }

    /// Says what is watched at a place.
    ///
    /// # Errors
    /// When the map can't be written.
    pub fn set(&mut self, place: Place, sampling: Sampling) -> Result<(), Error> {
        Ok(self.sampling.set(place, pod::Sampling(sampling), 0)?)
    }

    /// What has been counted in a slot, summed over CPUs.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn counters(&self, slot: u32) -> Result<VersionSignals, Error> {
        let values = self.counters.get(&slot, 0)?;
        Ok(values.iter().fold(VersionSignals::default(), |sum, pod::VersionSignals(one)| {
            let VersionSignals { watched, outcomes, full, lost, handshakes, handshake_ns } = one;
            VersionSignals {
                watched: sum.watched + watched,
                outcomes: std::array::from_fn(|i| sum.outcomes[i] + outcomes[i]),
                full: sum.full + full,
                lost: sum.lost + lost,
                handshakes: std::array::from_fn(|i| sum.handshakes[i] + handshakes[i]),
                handshake_ns: sum.handshake_ns + handshake_ns,
            }
        }))
    }

    /// Lets a slot begin anew, which nothing is counted in at this moment.
    ///
    /// # Errors
    /// When the map can't be written.
    pub fn clear(&mut self, slot: u32) -> Result<(), Error> {
        let cpus = self.counters.get(&slot, 0)?.len();
        let zeros = vec![pod::VersionSignals(VersionSignals::default()); cpus];
        let values = aya::maps::PerCpuValues::try_from(zeros).map_err(Error::Io)?;
        Ok(self.counters.set(slot, values, 0)?)
    }

    /// Calls `each` with the bad outcomes that have come since the last call.
    pub fn events(&mut self, mut each: impl FnMut(SignalEvent)) {
        while let Some(item) = self.ring.next() {
            let Ok(bytes) = <[u8; size_of::<SignalEvent>()]>::try_from(&*item) else { continue };
            // SAFETY: same size, and every bit pattern is a `SignalEvent`: integers only.
            each(unsafe {
                std::mem::transmute::<[u8; size_of::<SignalEvent>()], SignalEvent>(bytes)
            });
        }
    }

    /// Goes through the watched connections once, and has those judged whose time is over.
    /// Returns how many stay, of the fuller family.
    ///
    /// # Errors
    /// When the kernel refuses to walk a map or to run a program.
    pub fn judge(&mut self) -> Result<u64, Error> {
        let v4 = judge::<pod::FlowKeyV4>(&self.v4)?;
        let v6 = judge::<pod::FlowKeyV6>(&self.v6)?;
        Ok(v4.max(v6))
    }
}

/// One family's part of [`Signals::judge`].
fn judge<K: Pod>((map, program): &(OwnedFd, OwnedFd)) -> Result<u64, Error> {
    let mut position = None;
    let mut kept = 0_u64;
    loop {
        let now_ns = monotonic_ns()?;
        let mut due = Vec::new();
        position = flows::walk(map.as_fd(), position, BATCHES, |key: K, pod::Sample(sample)| {
            kept += 1;
            if signals::due(&sample, now_ns) {
                due.push(key);
            }
        })?;
        for keys in due.chunks(FORGET_MOST) {
            kept = kept.saturating_sub(u64::from(run_on(program, keys)?));
        }
        if position.is_none() {
            return Ok(kept);
        }
    }
}

fn run_on<K: Pod>(program: &OwnedFd, keys: &[K]) -> io::Result<u32> {
    let mut frame = vec![0; FORGET_OFFSET];
    // SAFETY: a key that is `Pod` has no byte that is uninitialised.
    let bytes =
        unsafe { std::slice::from_raw_parts(keys.as_ptr().cast::<u8>(), size_of_val(keys)) };
    frame.extend_from_slice(bytes);
    run(program, &frame)
}
