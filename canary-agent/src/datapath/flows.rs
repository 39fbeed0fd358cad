//! The flow tables from outside: walking them in batches, and how long an entry
//! may be silent.

use std::{
    collections::BTreeSet,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData, MapError},
};
use canary_ebpf_common::{
    abi::{
        BACKEND_INDICES, Flow, FlowKeyV4, FlowKeyV6, IPPROTO_TCP, flow_state as state, quic_idle_ns,
    },
    entry::BackendIndex,
    nat::{self, TupleKey as _, opposite},
};

use super::{
    links::bpf,
    pod,
    raw::{BPF_MAP_LOOKUP_BATCH, BatchAttr},
};

/// Silence after which half-open flows of tracked buckets go, nanoseconds; when a table is nearly
/// full, translated ones too.
pub const HALF_OPEN_NS: u64 = 10 * SECOND_NS;
/// Silence after which closing flows go, nanoseconds (`nf_conntrack`'s FIN_WAIT and TIME_WAIT).
pub const CLOSING_NS: u64 = 120 * SECOND_NS;
/// The same when a table is nearly full.
pub const CLOSING_PRESSED_NS: u64 = 30 * SECOND_NS;
/// Silence after which translated flows go whose SYN has not been answered (`nf_conntrack`'s
/// SYN_SENT).
pub const SYN_SENT_NS: u64 = 120 * SECOND_NS;
/// Silence after which translated flows go whose SYN-ACK has not been acknowledged
/// (`nf_conntrack`'s SYN_RECV).
pub const SYN_RECEIVED_NS: u64 = 60 * SECOND_NS;
/// Silence after which translated flows go that were reset (`nf_conntrack`'s CLOSE).
pub const RESET_NS: u64 = 10 * SECOND_NS;
/// Silence after which established translated flows go, nanoseconds (`nf_conntrack`'s five days).
pub const ESTABLISHED_NS: u64 = 432_000 * SECOND_NS;

const SECOND_NS: u64 = 1_000_000_000;

/// Entries that one system call reads.
const BATCH: usize = 1024;

/// Where a walk over a hash map stands: the kernel's token, or the beginning.
pub(super) type Position = Option<u32>;

/// Calls `each` with the entries of a hash map from `position` on, of at most
/// `batches` batches. Entries that come or go meanwhile may be missed. Returns
/// where to go on; `None` at the end.
pub(super) fn walk<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    position: Position,
    batches: usize,
    mut each: impl FnMut(K, V),
) -> io::Result<Position> {
    let mut keys = vec![MaybeUninit::<K>::uninit(); BATCH];
    let mut values = vec![MaybeUninit::<V>::uninit(); BATCH];
    let mut position = position;
    for _ in 0..batches {
        let token = position.unwrap_or_default();
        let mut next = 0_u32;
        let mut attr = BatchAttr {
            in_batch: if position.is_some() { &raw const token as u64 } else { 0 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: BATCH as u32,
            map_fd: map.as_raw_fd() as u32,
            ..BatchAttr::default()
        };
        // Every pointer in `attr` is to memory of the size that the command writes at most (`count`
        // elements), alive during the call.
        let end = match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                Some(libc::EINTR) => continue,
                _ => return Err(error),
            },
        };
        for (key, value) in keys.iter().zip(&values).take(attr.count as usize) {
            // SAFETY: the kernel has written `count` keys and values, and both are Pod.
            each(unsafe { key.assume_init() }, unsafe { value.assume_init() });
        }
        if end {
            return Ok(None);
        }
        position = Some(next);
    }
    Ok(position)
}

/// After how much silence a flow with these [`nat::bits`] is over, nanoseconds; `None` for never.
/// `udp_idle_ns` is its service's; `pressed` says that the table is nearly full.
pub const fn patience_ns(bits: u32, udp_idle_ns: u64, pressed: bool) -> Option<u64> {
    Some(if bits & state::UDP != 0 {
        udp_idle_ns
    } else if bits & state::QUIC != 0 {
        match bits & state::PROVISIONAL {
            0 => quic_idle_ns(udp_idle_ns),
            _ => HALF_OPEN_NS,
        }
    } else if bits & state::NAT == 0 {
        if bits & state::PROVISIONAL != 0 {
            HALF_OPEN_NS
        } else if bits & (state::CLOSING | state::RESET) == 0 {
            // A tracked connection lives as long as its bucket is tracked.
            return None;
        } else if pressed {
            CLOSING_PRESSED_NS
        } else {
            // A RST that somebody forged comes right for its entry as long as its client says
            // something in this time, as a FIN does.
            CLOSING_NS
        }
    } else if bits & (state::RESET | state::SERVER_RESET) != 0 {
        RESET_NS
    } else if nat::half_open(bits) {
        match bits & state::ANSWERED {
            _ if pressed => HALF_OPEN_NS,
            0 => SYN_SENT_NS,
            _ => SYN_RECEIVED_NS,
        }
    } else if bits & (state::CLOSING | state::SERVER_CLOSING) != 0 {
        if pressed { CLOSING_PRESSED_NS } else { CLOSING_NS }
    } else {
        ESTABLISHED_NS
    })
}

/// Whether a flow with these [`nat::bits`] is over after `silent_ns` of silence.
pub fn expired(bits: u32, silent_ns: u64, udp_idle_ns: u64) -> bool {
    patience_ns(bits, udp_idle_ns, false).is_some_and(|patience_ns| silent_ns > patience_ns)
}

/// A flow key of either family that can find the other direction's.
pub(super) trait FlowKey: Sized {
    /// The key of `flow`'s other direction.
    fn opposite(&self, flow: &Flow) -> Self;
    /// Whether it is the key of `flow`'s other direction.
    fn is_opposite_of(&self, flow: &Flow) -> bool;
}

impl FlowKey for pod::FlowKeyV4 {
    fn opposite(&self, flow: &Flow) -> Self {
        Self(opposite::<FlowKeyV4>(flow, protocol(self.0.protocol)))
    }

    fn is_opposite_of(&self, flow: &Flow) -> bool {
        self.0.answers(flow)
    }
}

impl FlowKey for pod::FlowKeyV6 {
    fn opposite(&self, flow: &Flow) -> Self {
        Self(opposite::<FlowKeyV6>(flow, protocol(self.0.protocol)))
    }

    fn is_opposite_of(&self, flow: &Flow) -> bool {
        self.0.answers(flow)
    }
}

fn protocol(word: u32) -> u8 {
    u8::try_from(word).unwrap_or(IPPROTO_TCP)
}

/// One family's flow table.
#[derive(Debug)]
pub(super) struct FlowTable<K> {
    map: HashMap<MapData, K, pod::Flow>,
    /// The same map: aya has no batch operations and keeps its own descriptor to itself.
    fd: OwnedFd,
}

impl<K: Pod> FlowTable<K> {
    /// The table in `data`, a hash map.
    pub(super) fn new(data: MapData) -> Result<Self, super::Error> {
        let fd = data.fd().as_fd().try_clone_to_owned()?;
        Ok(Self { map: Map::HashMap(data).try_into()?, fd })
    }

    /// The entry of `key`.
    pub(super) fn get(&self, key: &K) -> Option<Flow> {
        self.map.get(key, 0).ok().map(|pod::Flow(flow)| flow)
    }

    /// Stores an entry unless `key` has one. Says whether it was stored; `None` if there is no room.
    pub(super) fn insert_new(&mut self, key: &K, flow: &Flow) -> io::Result<Option<bool>> {
        /// `BPF_NOEXIST` (linux/bpf.h).
        const NO_EXIST: u64 = 1;
        match self.store(key, flow, NO_EXIST) {
            Ok(()) => Ok(Some(true)),
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(Some(false)),
            Err(e) if e.raw_os_error() == Some(libc::E2BIG) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Stores an entry in the place of the one that `key` has, if it still has one.
    pub(super) fn replace(&mut self, key: &K, flow: &Flow) -> io::Result<()> {
        /// `BPF_EXIST` (linux/bpf.h).
        const EXIST: u64 = 2;
        match self.store(key, flow, EXIST) {
            Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
            _ => Ok(()),
        }
    }

    fn store(&mut self, key: &K, flow: &Flow, flags: u64) -> io::Result<()> {
        self.map.insert(key, pod::Flow(*flow), flags).map_err(|error| match error {
            MapError::SyscallError(error) => error.io_error,
            error => io::Error::other(error),
        })
    }

    /// Calls `each` with every entry. Those that come or go meanwhile may be missed.
    pub(super) fn walk(
        &self,
        mut each: impl FnMut(K, Flow) -> io::Result<()>,
        mut pause: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut position = None;
        loop {
            let mut failed = Ok(());
            position = walk(self.fd.as_fd(), position, 1, |key, pod::Flow(flow)| {
                if failed.is_ok() {
                    failed = each(key, flow);
                }
            })?;
            failed?;
            pause()?;
            if position.is_none() {
                return Ok(());
            }
        }
    }

    /// Calls `each` with the entries of at most `batches` batches. Returns the kernel's token
    /// of where it stopped; `None` if it has come to the end.
    pub(super) fn look(
        &self,
        batches: usize,
        each: impl FnMut(K, pod::Flow),
    ) -> io::Result<Option<u32>> {
        walk(self.fd.as_fd(), None, batches, each)
    }

    /// Takes away the entries that name one of `backends`, of either direction. Nobody looks
    /// again whether they still do: no new flow goes there.
    pub(super) fn cut(&mut self, backends: &BTreeSet<BackendIndex>) -> Result<u64, super::Error> {
        let mut names = vec![false; BACKEND_INDICES as usize];
        backends.iter().for_each(|index| names[usize::from(index.get())] = true);
        let mut keys = Vec::new();
        self.walk(
            |key, flow| {
                if names.get(usize::from(flow.backend)) == Some(&true) {
                    keys.push(key);
                }
                Ok(())
            },
            || Ok(()),
        )?;
        let mut removed = 0;
        for key in &keys {
            match self.map.remove(key) {
                Ok(()) => removed += 1,
                // It has ended by itself.
                Err(MapError::KeyNotFound | MapError::ElementNotFound) => {}
                Err(MapError::SyscallError(call))
                    if call.io_error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(removed)
    }

    /// Number of entries.
    pub(super) fn count(&self) -> io::Result<u64> {
        let mut count = 0;
        walk(self.fd.as_fd(), None, usize::MAX, |_: K, _: pod::Flow| count += 1)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_has_its_own_patience() {
        const S: u64 = SECOND_NS;
        let nat = |bits| state::NAT | bits;
        let (half, answered) = (state::PROVISIONAL, state::PROVISIONAL | state::ANSWERED);
        let both = state::CLOSING | state::SERVER_CLOSING;
        for (name, bits, calm, pressed) in [
            ("tracked, half-open", half, Some(10 * S), Some(10 * S)),
            ("tracked, closing", state::CLOSING, Some(120 * S), Some(30 * S)),
            ("tracked, reset", state::RESET, Some(120 * S), Some(30 * S)),
            (
                "tracked, reset after a FIN",
                state::CLOSING | state::RESET,
                Some(120 * S),
                Some(30 * S),
            ),
            ("tracked, open", 0, None, None),
            ("tracked UDP", state::UDP, Some(7 * S), Some(7 * S)),
            ("SYN_SENT", nat(half), Some(120 * S), Some(10 * S)),
            ("SYN_RECV", nat(answered), Some(60 * S), Some(10 * S)),
            (
                "opened by the server",
                nat(answered | state::SERVER_OPEN),
                Some(432_000 * S),
                Some(432_000 * S),
            ),
            ("ESTABLISHED", nat(state::ANSWERED), Some(432_000 * S), Some(432_000 * S)),
            ("FIN_WAIT", nat(state::CLOSING), Some(120 * S), Some(30 * S)),
            ("CLOSE_WAIT", nat(state::SERVER_CLOSING), Some(120 * S), Some(30 * S)),
            ("TIME_WAIT", nat(both), Some(120 * S), Some(30 * S)),
            ("CLOSE", nat(state::RESET), Some(10 * S), Some(10 * S)),
            ("CLOSE by the server", nat(both | state::SERVER_RESET), Some(10 * S), Some(10 * S)),
            ("refused", nat(half | state::SERVER_RESET), Some(10 * S), Some(10 * S)),
            ("UDP", nat(state::UDP), Some(7 * S), Some(7 * S)),
            ("QUIC, no answer yet", state::QUIC | half, Some(10 * S), Some(10 * S)),
            ("QUIC", state::QUIC, Some(300 * S), Some(300 * S)),
            ("QUIC, translated", nat(state::QUIC), Some(300 * S), Some(300 * S)),
        ] {
            assert_eq!(patience_ns(bits, 7 * S, false), calm, "{name}");
            assert_eq!(patience_ns(bits, 7 * S, true), pressed, "{name}, nearly full");
        }
        assert_eq!(patience_ns(state::QUIC, 600 * S, false), Some(600 * S), "a long `udp_idle`");
    }
}
