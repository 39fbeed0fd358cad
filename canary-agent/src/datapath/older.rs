//! Layouts of older releases that this one reads.
//!
//! Each says what differs from the present layout; everything else is as it is now. What is not
//! listed here is never read: see [`super::pins::Found`]. Whoever raises
//! [`ABI_VERSION`](canary_ebpf_common::abi::ABI_VERSION) adds the layout that it was until then,
//! if its maps can be carried over, and a test with that release's objects.

use canary_ebpf_common::abi;

use super::pins::Layout;

/// Makes a present value of an older one, both as bytes.
pub(super) type Convert = fn(&[u8], &mut [u8]);

/// A layout of an older release.
#[derive(Debug)]
pub(super) struct Older {
    version: u32,
    maps: &'static [OlderMap],
}

/// A map that was another one.
#[derive(Debug)]
pub(super) struct OlderMap {
    name: &'static str,
    value_bytes: usize,
    /// Makes a present value of one of then; of a per-CPU map's, one CPU's. `None` where nothing
    /// of it can be carried over: the new map begins empty.
    convert: Option<Convert>,
}

/// What becomes of a map's values.
#[derive(Clone, Copy, Debug)]
pub(super) enum Carry {
    /// They mean the same.
    AsTheyAre,
    /// They are converted.
    Converted(Convert),
    /// They are not carried over.
    Not,
}

impl Older {
    /// Its version.
    pub(super) const fn version(&self) -> u32 {
        self.version
    }

    fn map(&self, name: &str) -> Option<&OlderMap> {
        self.maps.iter().find(|map| map.name == name)
    }

    /// What a map looked like that is `layout` now.
    pub(super) fn layout(&self, layout: &Layout) -> Layout {
        let value_bytes = self.map(layout.name).map_or(layout.value_bytes, |map| map.value_bytes);
        Layout { value_bytes, ..layout.clone() }
    }

    /// Whether a map's values are not what they were.
    pub(super) fn converts(&self, name: &str) -> bool {
        self.map(name).is_some()
    }

    /// What becomes of a map's values.
    pub(super) fn carry(&self, name: &str) -> Carry {
        match self.map(name) {
            None => Carry::AsTheyAre,
            Some(OlderMap { convert: Some(convert), .. }) => Carry::Converted(*convert),
            Some(OlderMap { convert: None, .. }) => Carry::Not,
        }
    }
}

/// The layouts that are read. Until the third, ways had no VLAN tags, and nothing stood under an
/// address without a port. The first had no `PANICS` either, and no weights and memories in flags.
/// All of that is written with the first plan. The third watched no connections and knew no tunnels.
/// The fourth knew no classes of clients, the fifth did not count their changes. Until the sixth another
/// hash chose the connections that are watched.
#[cfg(not(feature = "next-abi"))]
const KNOWN: &[Older] = &[
    Older { version: 1, maps: SHORT_RECORDS },
    Older { version: 2, maps: SHORT_RECORDS },
    Older { version: 3, maps: &[] },
    Older { version: 4, maps: OTHER_SAMPLES },
    Older { version: 5, maps: OTHER_SAMPLES },
    Older { version: 6, maps: OTHER_SAMPLES },
];

/// Nobody would come back to the connections that were watched, and they would count as having failed.
#[cfg_attr(
    feature = "next-abi",
    expect(dead_code, reason = "only the real layout was preceded by it")
)]
const OTHER_SAMPLES: &[OlderMap] = &[
    OlderMap { name: "SAMPLES_V4", value_bytes: size_of::<abi::Sample>(), convert: None },
    OlderMap { name: "SAMPLES_V6", value_bytes: size_of::<abi::Sample>(), convert: None },
];

/// Records of backends were one cache line long.
#[cfg_attr(
    feature = "next-abi",
    expect(dead_code, reason = "only the real layout was preceded by it")
)]
const SHORT_RECORDS: &[OlderMap] =
    &[OlderMap { name: "BACKENDS", value_bytes: SHORT_BYTES, convert: Some(lengthened) }];

const SHORT_BYTES: usize = 64;

/// The same record without tags. What was its last word is on the second line now.
fn lengthened(old: &[u8], new: &mut [u8]) {
    const VLAN: usize = core::mem::offset_of!(abi::Backend, vlan);
    const SLOW_SINCE: usize = core::mem::offset_of!(abi::Backend, slow_since_ms);
    const WORD: usize = size_of::<u32>();
    new.fill(0);
    new[..VLAN].copy_from_slice(&old[..VLAN]);
    new[SLOW_SINCE..SLOW_SINCE + WORD].copy_from_slice(&old[VLAN..VLAN + WORD]);
}

/// The layout that tests upgrade from reads the one of this release.
#[cfg(feature = "next-abi")]
const KNOWN: &[Older] = &[next::PRESENT];

/// The layout of version `version`, if it is read.
pub(super) fn known(version: u32) -> Option<&'static Older> {
    KNOWN.iter().find(|older| older.version() == version)
}

/// What the tests' layout has to know of the real one: see `abi.rs` for what differs.
#[cfg(feature = "next-abi")]
mod next {
    use canary_ebpf_common::abi::{ABI_VERSION, BackendCounters, NEXT_ABI};

    use super::{Older, OlderMap};

    pub(super) const PRESENT: Older = Older {
        version: ABI_VERSION - NEXT_ABI,
        maps: &[OlderMap {
            name: "BACKEND_COUNTERS",
            value_bytes: size_of::<BackendCounters>() - MOVED_BYTES,
            convert: Some(moved),
        }],
    };

    const MOVED_BYTES: usize = 8;

    /// The same counters, behind the field that has come to stand before them.
    fn moved(old: &[u8], new: &mut [u8]) {
        new[MOVED_BYTES..].copy_from_slice(old);
    }
}
