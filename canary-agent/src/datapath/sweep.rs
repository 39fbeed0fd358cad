//! Walking the flow tables, beside the loop: what has expired goes, what the plan in force has
//! no use for goes, and what stays is counted.
//!
//! A pass may take seconds where there are millions of entries. It has a thread of its own, which
//! the kernel may let wait, and holds up neither packets nor the loop: entries are read
//! in batches, and the few that are to go are taken away by a program that looks at each of them
//! again, at most [`FORGET_MOST`] at a time.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use canary_ebpf_common::{
    abi::{
        self, FORGET_MOST, FORGET_OFFSET, Flow, Forget, PAGE_BUCKETS, flow_state as state, forget,
    },
    entry::{BackendIndex, Entry},
    hash, nat,
};

use super::{
    Reader,
    flows::{FlowKey, FlowTable, patience_ns},
    mapping::Pages,
    monotonic_ns, pod,
};
use crate::plan::{ClassPlan, followed};

/// `BPF_PROG_TEST_RUN` (linux/bpf.h; kernel 4.12, commit 1cf1cae963c2).
const BPF_PROG_TEST_RUN: libc::c_long = 10;

/// A table is nearly full from this part of it on.
const PRESSED: (u64, u64) = (3, 4);

/// What the plan in force says of flows: services by table id.
#[derive(Debug, Default)]
pub(super) struct Rules {
    pub(super) services: Vec<Option<abi::Service>>,
    /// Classes of clients, which say what table of theirs the program looks at.
    pub(super) classes: ClassPlan,
}

impl Rules {
    /// What the program makes of a client by now whose flow was stored for the service `id`: the
    /// table that it is steered by, unless its class has changed and its flows are looked up anyway.
    fn table(&self, id: u32, client: IpAddr) -> Option<abi::Service> {
        let service = |id: u32| self.services.get(id as usize).and_then(Option::as_ref);
        let base = self.classes.bases.get(&id).and_then(|base| service(*base));
        let base = base.or_else(|| service(id))?;
        match followed(&self.classes, base, client) {
            (_, _, Some(_)) => None,
            (_, table, None) => Some(table),
        }
    }
}

/// The rules in force, which the loop changes and the sweeper reads.
pub(super) type SharedRules = Arc<Mutex<Arc<Rules>>>;

/// What a pass found and did, by family: IPv4, then IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries that stay.
    pub kept: [u64; 2],
    /// Entries that stay and are of half-open connections.
    pub half_open: [u64; 2],
    /// Entries that were removed.
    pub removed: [u64; 2],
}

/// Looks after the flow tables. Independent of the [`Datapath`](super::Datapath) that
/// made it, and for one thread.
pub struct Sweeper {
    v4: Family<pod::FlowKeyV4>,
    v6: Family<pod::FlowKeyV6>,
    rules: SharedRules,
    table: Arc<Pages>,
    reader: Reader,
    /// What the last pass left behind, if that was nothing.
    empty: Option<Empty>,
}

/// Both tables were empty.
#[derive(Clone, Copy, Debug)]
struct Empty {
    /// How many entries had been stored before the pass began.
    stored: u64,
    at_ns: u64,
}

/// Tables that seem to be empty still are looked at all the same after this time.
const EMPTY_NS: u64 = 60_000_000_000;

/// One family's table and what is needed for it.
struct Family<K> {
    flows: FlowTable<K>,
    program: OwnedFd,
    capacity: u64,
    /// The last pass has found the table nearly full.
    pressed: bool,
}

/// Entries on their way out, and open flows by backend.
struct Pass<K> {
    requests: Vec<u8>,
    requested: usize,
    open: Vec<u32>,
    kept: u64,
    half_open: u64,
    removed: u64,
    key: std::marker::PhantomData<K>,
}

impl Sweeper {
    pub(super) fn new(
        tables: (FlowTable<pod::FlowKeyV4>, FlowTable<pod::FlowKeyV6>),
        programs: (OwnedFd, OwnedFd),
        capacity: u32,
        rules: SharedRules,
        table: Arc<Pages>,
        reader: Reader,
    ) -> Self {
        let capacity = u64::from(capacity);
        let ((v4, v6), (forget_v4, forget_v6)) = (tables, programs);
        Self {
            v4: Family { flows: v4, program: forget_v4, capacity, pressed: false },
            v6: Family { flows: v6, program: forget_v6, capacity, pressed: false },
            rules,
            table,
            reader,
            empty: None,
        }
    }

    /// Whether a pass would find nothing: the last one has left nothing, and nothing has been
    /// stored since.
    pub fn is_idle(&self) -> bool {
        let recent = |empty: &Empty| {
            monotonic_ns().is_ok_and(|now_ns| now_ns.saturating_sub(empty.at_ns) < EMPTY_NS)
        };
        let nothing_stored = |empty: &Empty| self.reader.flow_counters().stored == empty.stored;
        self.empty.as_ref().is_some_and(|empty| recent(empty) && nothing_stored(empty))
    }

    /// Goes through both tables once. Afterwards there is no entry that was there before and
    /// names a backend of `gone`, nor one of a bucket that was not tracked all the while, whose
    /// client's class has not changed lately, and that does not translate.
    ///
    /// # Errors
    /// When the kernel refuses to walk a table or to run a program. What was found
    /// until then is gone.
    pub fn pass(&mut self, gone: &[BackendIndex]) -> Result<Swept, super::Error> {
        let began = Empty { stored: self.reader.flow_counters().stored, at_ns: monotonic_ns()? };
        self.empty = None;
        let table = self.table.map_all()?;
        let rules = Arc::clone(&self.rules.lock().unwrap_or_else(PoisonError::into_inner));
        let mut names = vec![false; abi::BACKEND_INDICES as usize];
        gone.iter().for_each(|index| names[usize::from(index.get())] = true);
        let looked_up = |service: &abi::Service, client, hash: &dyn Fn(&abi::Service) -> u64| {
            let Some(service) = rules.table(service.id, client) else { return true };
            let hash = hash(&service);
            let service = &service;
            let bucket = hash::bucket(service, hash) as usize;
            let word = service.first_page as usize * PAGE_BUCKETS as usize + bucket;
            let load = std::sync::atomic::Ordering::Acquire;
            table.words32().get(word).is_some_and(|w| Entry(w.load(load)).tracked())
        };
        let mut open = vec![0_u32; abi::BACKEND_INDICES as usize];
        let v4 = self.v4.pass(&rules, &names, &mut open, |service, pod::FlowKeyV4(k)| {
            let (ports, protocol) = ((k.ports.src_be(), k.ports.dst_be()), k.protocol as u8);
            let client = abi::ip([k.src_be.into(), 0], false);
            looked_up(service, client, &|service| {
                hash::hash_v4(service, k.src_be, k.dst_be, ports.0, ports.1, protocol)
            })
        })?;
        let v6 = self.v6.pass(&rules, &names, &mut open, |service, pod::FlowKeyV6(k)| {
            let (ports, protocol) = ((k.ports.src_be(), k.ports.dst_be()), k.protocol as u8);
            looked_up(service, abi::ip(k.src, true), &|service| {
                hash::hash_v6(service, k.src, k.dst, ports.0, ports.1, protocol)
            })
        })?;
        let swept = Swept { kept: [v4.0, v6.0], half_open: [v4.1, v6.1], removed: [v4.2, v6.2] };
        self.reader.set_flows(swept, open);
        self.empty = (swept.kept == [0; 2]).then_some(began);
        Ok(swept)
    }
}

impl<K: aya::Pod + FlowKey> Family<K> {
    fn pass(
        &mut self,
        rules: &Rules,
        gone: &[bool],
        open: &mut Vec<u32>,
        tracked: impl Fn(&abi::Service, &K) -> bool,
    ) -> Result<(u64, u64, u64), super::Error> {
        let Self { flows, program, capacity, pressed } = self;
        let pass = std::cell::RefCell::new(Pass::<K> {
            requests: vec![0; FORGET_OFFSET],
            requested: 0,
            open: std::mem::take(open),
            kept: 0,
            half_open: 0,
            removed: 0,
            key: std::marker::PhantomData,
        });
        let now = std::cell::Cell::new(monotonic_ns()?);
        let walked = flows.walk(
            |key, flow| {
                let mut pass = pass.borrow_mut();
                let service =
                    rules.services.get(usize::from(flow.service)).and_then(Option::as_ref);
                let condition = if gone.get(usize::from(flow.backend)) == Some(&true) {
                    Some((forget::NAMES, 0))
                } else if flow.state & state::NAT == 0
                    && !service.is_some_and(|service| tracked(service, &key))
                {
                    Some((forget::SILENT, 0))
                } else {
                    over(flows, &key, &flow, service, now.get(), *pressed)
                        .map(|other_ns| (forget::SILENT, other_ns))
                };
                match condition {
                    Some((condition, other_ns)) => {
                        pass.request(key, &flow, other_ns, condition);
                        if pass.requested == FORGET_MOST { pass.run(program) } else { Ok(()) }
                    }
                    None => {
                        pass.keep(&flow);
                        Ok(())
                    }
                }
            },
            || {
                now.set(monotonic_ns().map_err(io::Error::other)?);
                // The batch that these are of is not stale yet.
                pass.borrow_mut().run(program)?;
                std::thread::yield_now();
                Ok(())
            },
        );
        let pass = pass.into_inner();
        *open = pass.open;
        walked?;
        *pressed = pass.kept * PRESSED.1 >= *capacity * PRESSED.0;
        Ok((pass.kept, pass.half_open, pass.removed))
    }
}

/// Whether a flow has been silent for too long in both directions: when the other's last packet
/// came, 0 where it has no entry.
fn over<K: aya::Pod + FlowKey>(
    flows: &FlowTable<K>,
    key: &K,
    flow: &Flow,
    service: Option<&abi::Service>,
    now_ns: u64,
    pressed: bool,
) -> Option<u64> {
    let udp_idle_ns = service.map_or(0, |s| u64::from(s.udp_idle_ms) * 1_000_000);
    let expired = |bits: u32, last_ns: u64| {
        patience_ns(bits, udp_idle_ns, pressed)
            .is_some_and(|patience| now_ns.saturating_sub(last_ns) > patience)
    };
    let bits = nat::bits(flow);
    if !expired(bits, flow.last_ns) {
        return None;
    }
    if flow.state & state::NAT == 0 {
        return Some(0);
    }
    match flows.get(&key.opposite(flow)).filter(|other| key.is_opposite_of(other)) {
        Some(other) => expired(bits | nat::bits(&other) & !state::REVERSE, other.last_ns)
            .then_some(other.last_ns),
        None => Some(0),
    }
}

impl<K: aya::Pod> Pass<K> {
    fn keep(&mut self, flow: &Flow) {
        self.kept += 1;
        if nat::opening(nat::bits(flow)) {
            self.half_open += 1;
        } else if flow.state & state::REVERSE == 0
            && let Some(open) = self.open.get_mut(usize::from(flow.backend))
        {
            *open += 1;
        }
    }

    fn request(&mut self, key: K, flow: &Flow, other_ns: u64, condition: u32) {
        let backend = u32::from(flow.backend);
        let forget = Forget { key, last_ns: flow.last_ns, other_ns, backend, condition };
        let start = std::ptr::from_ref(&forget).cast::<u8>();
        // SAFETY: `Forget` is `repr(C)` without padding (the ABI asserts its sizes), and a key
        // that is `Pod` has no byte that is uninitialised.
        let bytes = unsafe { std::slice::from_raw_parts(start, size_of::<Forget<K>>()) };
        self.requests.extend_from_slice(bytes);
        self.requested += 1;
    }

    /// Runs the program on what is requested.
    fn run(&mut self, program: &OwnedFd) -> io::Result<()> {
        if self.requested == 0 {
            return Ok(());
        }
        let removed = run(program, &self.requests)?;
        self.removed += u64::from(removed);
        self.requests.truncate(FORGET_OFFSET);
        self.requested = 0;
        Ok(())
    }
}

/// The part of `union bpf_attr` that `BPF_PROG_TEST_RUN` uses.
#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// Runs an XDP program once on `frame` and returns its answer.
pub(super) fn run(program: &OwnedFd, frame: &[u8]) -> io::Result<u32> {
    let mut attr = TestRunAttr {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat: 1,
        ..TestRunAttr::default()
    };
    // SAFETY: the only pointer is to memory that outlives the call, of the size that is said.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attr, size_of::<TestRunAttr>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(attr.retval) }
}
