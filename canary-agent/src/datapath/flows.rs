//! The flow tables from outside: walking them in batches, and letting expired
//! entries go.

use std::{
    collections::HashSet,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use canary_ebpf_common::{
    abi::{Flow, FlowKeyV4, FlowKeyV6, IPPROTO_TCP, flow_state as state, quic_idle_ns},
    nat::opposite,
};

use super::pod;

/// Silence after which half-open flows go, nanoseconds.
pub const HALF_OPEN_NS: u64 = 10_000_000_000;
/// Silence after which closing flows go, nanoseconds (`nf_conntrack`'s time-wait).
pub const CLOSING_NS: u64 = 120_000_000_000;
/// Silence after which established translated flows go, nanoseconds (`nf_conntrack`'s five days).
pub const ESTABLISHED_NS: u64 = 432_000_000_000_000;

/// Entries that one system call reads.
const BATCH: usize = 4096;

/// `BPF_MAP_LOOKUP_BATCH` (linux/bpf.h; kernel 5.6, commit cb4d03ab499d).
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// The part of `union bpf_attr` that batch commands use.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Where a walk over a hash map stands: the kernel's token, or the beginning.
type Position = Option<u32>;

/// Calls `each` with the entries of a hash map from `position` on, of at most
/// `batches` batches. Entries that come or go meanwhile may be missed. Returns
/// where to go on; `None` at the end.
fn walk<K: Pod, V: Pod>(
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
        // SAFETY: every pointer in `attr` is to memory of the size that the command
        // writes at most (`count` elements), alive during the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                &raw mut attr,
                size_of::<BatchAttr>(),
            )
        };
        let end = if result == 0 {
            false
        } else {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                Some(libc::EINTR) => continue,
                _ => return Err(error),
            }
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

/// What a sweep found and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries that stay.
    pub kept: u64,
    /// Entries that were removed.
    pub removed: u64,
}

/// Whether an entry with this state is over after `silent_ns` of silence;
/// `udp_idle_ns` is its service's.
pub fn expired(flow_state: u32, silent_ns: u64, udp_idle_ns: u64) -> bool {
    let limit = if flow_state & state::UDP != 0 {
        udp_idle_ns
    } else if flow_state & state::PROVISIONAL != 0 {
        HALF_OPEN_NS
    } else if flow_state & (state::CLOSING | state::SERVER_CLOSING) != 0 {
        CLOSING_NS
    } else if flow_state & state::QUIC != 0 {
        quic_idle_ns(udp_idle_ns)
    } else if flow_state & state::NAT != 0 {
        ESTABLISHED_NS
    } else {
        // A tracked connection lives as long as its bucket is tracked.
        return false;
    };
    silent_ns > limit
}

/// How much of a table a sweep looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// All of it.
    Whole,
    /// So many batches, from where the last such sweep ended.
    Batches(usize),
}

/// Lets expired entries of one flow table go, and those of backends that are
/// `gone`, and those that do not translate and of which `unwanted` says so.
/// Returns what a complete pass has found, when one is complete.
pub(super) fn sweep<K>(
    table: &mut FlowTable<K>,
    extent: Extent,
    now_ns: u64,
    gone: &HashSet<u16>,
    udp_idle_ns: impl Fn(u16) -> u64,
    unwanted: impl Fn(&K, &Flow) -> bool,
) -> io::Result<Option<Swept>>
where
    K: Pod + FlowKey,
{
    let FlowTable { map, fd, position, pass } = table;
    let (from, batches) = match extent {
        Extent::Whole => (None, usize::MAX),
        Extent::Batches(batches) => (*position, batches),
    };
    let mut swept = if from.is_some() { *pass } else { Swept::default() };
    let mut candidates: Vec<(K, Flow)> = Vec::new();
    let next = walk(fd.as_fd(), from, batches, |key: K, pod::Flow(flow)| {
        let over =
            expired(flow.state, now_ns.saturating_sub(flow.last_ns), udp_idle_ns(flow.service))
                || gone.contains(&flow.backend)
                || (flow.state & state::NAT == 0 && unwanted(&key, &flow));
        if over {
            candidates.push((key, flow));
        } else {
            swept.kept += 1;
        }
    })?;
    for (key, flow) in candidates {
        if flow.state & state::NAT != 0
            && !gone.contains(&flow.backend)
            && !both_over(map, &key, now_ns, &udp_idle_ns)
        {
            swept.kept += 1;
            continue;
        }
        // It may have gone by itself.
        if map.remove(&key).is_ok() {
            swept.removed += 1;
        }
    }
    (*position, *pass) = (next, swept);
    Ok(next.is_none().then_some(swept))
}

/// Whether both directions of a translated flow are over, as they are now.
fn both_over<K: Pod + FlowKey>(
    map: &HashMap<MapData, K, pod::Flow>,
    key: &K,
    now_ns: u64,
    udp_idle_ns: impl Fn(u16) -> u64,
) -> bool {
    let Ok(pod::Flow(flow)) = map.get(key, 0) else { return true };
    let over = |f: &Flow, closing: u32| {
        expired(f.state | closing, now_ns.saturating_sub(f.last_ns), udp_idle_ns(f.service))
    };
    let Ok(pod::Flow(other)) = map.get(&key.opposite(&flow), 0) else {
        // Its other half is gone or never came: what is left is of no use.
        return over(&flow, state::PROVISIONAL)
            || now_ns.saturating_sub(flow.last_ns) > HALF_OPEN_NS;
    };
    // A reset or FIN of either side counts for both directions; half-open is what
    // the client's side says.
    let closing = (flow.state | other.state) & (state::CLOSING | state::SERVER_CLOSING);
    let forward = if flow.state & state::REVERSE == 0 { flow.state } else { other.state };
    let strip = |f: &Flow| Flow {
        state: (f.state & !state::PROVISIONAL) | (forward & state::PROVISIONAL),
        ..*f
    };
    over(&strip(&flow), closing) && over(&strip(&other), closing)
}

/// A flow key of either family that can find the other direction's.
pub(super) trait FlowKey: Sized {
    /// The key of `flow`'s other direction.
    fn opposite(&self, flow: &Flow) -> Self;
}

impl FlowKey for pod::FlowKeyV4 {
    fn opposite(&self, flow: &Flow) -> Self {
        Self(opposite::<FlowKeyV4>(flow, protocol(self.0.protocol)))
    }
}

impl FlowKey for pod::FlowKeyV6 {
    fn opposite(&self, flow: &Flow) -> Self {
        Self(opposite::<FlowKeyV6>(flow, protocol(self.0.protocol)))
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
    /// Where the sweep that goes on from call to call stands.
    position: Position,
    /// What it has found so far.
    pass: Swept,
}

impl<K: Pod> FlowTable<K> {
    /// The table in `data`, a hash map.
    pub(super) fn new(data: MapData) -> Result<Self, super::Error> {
        let fd = data.fd().as_fd().try_clone_to_owned()?;
        Ok(Self { map: Map::HashMap(data).try_into()?, fd, position: None, pass: Swept::default() })
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
        const S: u64 = 1_000_000_000;
        for (name, flow_state, silent_ns, over) in [
            ("half-open", state::PROVISIONAL, 11 * S, true),
            ("half-open, young", state::PROVISIONAL, 9 * S, false),
            ("closing", state::CLOSING, 121 * S, true),
            ("closing, young", state::CLOSING, 119 * S, false),
            ("closed by the server", state::NAT | state::SERVER_CLOSING, 121 * S, true),
            ("UDP", state::UDP, 31 * S, true),
            ("UDP, young", state::UDP, 29 * S, false),
            ("QUIC, no answer yet", state::QUIC | state::PROVISIONAL, 11 * S, true),
            ("QUIC, idle", state::QUIC, 299 * S, false),
            ("QUIC, over", state::QUIC, 301 * S, true),
            ("QUIC, translated, over", state::QUIC | state::NAT, 301 * S, true),
            ("tracked and idle for years", 0, u64::MAX, false),
            ("translated and idle for a day", state::NAT, 86_400 * S, false),
            ("translated and idle for six days", state::NAT, 518_400 * S, true),
        ] {
            assert_eq!(expired(flow_state, silent_ns, 30 * S), over, "{name}");
        }
        assert!(!expired(state::QUIC, 599 * S, 600 * S), "QUIC, with a long `udp_idle`");
    }
}
