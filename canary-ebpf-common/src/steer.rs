//! The steering decision: which backend a packet of a service goes to.
//!
//! The same code runs in the loaded program, in `explain` and in the tests.
//! Most packets take the first line of [`steer`]: an untracked bucket's entry
//! is the answer, and nothing is read or written besides.
//!
//! Tracking follows Mendelson et al., *Load balancing with JET* (CoNEXT 2021);
//! the guards against spoofed SYNs follow the reasoning of RFC 5961.

use crate::{
    abi::{
        BACKEND_DOWN, BACKEND_MAINT, BACKEND_USABLE, Flow, IPPROTO_TCP, IPPROTO_UDP, SERVICE_QUIC,
        Service, flow_state as state,
    },
    entry::{BackendIndex, Entry},
    quic::Quic,
};

/// TCP FIN (RFC 9293, 3.1).
pub const TCP_FIN: u8 = 0x01;
/// TCP SYN.
pub const TCP_SYN: u8 = 0x02;
/// TCP RST.
pub const TCP_RST: u8 = 0x04;
/// TCP ACK.
pub const TCP_ACK: u8 = 0x10;

/// How far behind a SYN a packet may be that confirms its flow, in bytes.
pub(crate) const CONFIRM_WINDOW: u32 = 64 << 10;
/// How far from the newest sequence number of its direction a FIN or RST may be, in bytes, to
/// either side. A sender's own number is exact; what it sent before may have been lost on its
/// way here, and an answer to a late packet carries that packet's number.
const CLOSE_WINDOW: u32 = 64 << 10;
/// How far a packet may be ahead of the newest one before it, in bytes: a lost burst.
const ADVANCE_WINDOW: u32 = 16 << 20;
/// For how long after a RST packets may come that were sent before it, in nanoseconds.
const OVERTAKEN_NS: u64 = 1_000_000_000;

/// What steering needs to know of a packet's transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// TCP or UDP.
    pub protocol: u8,
    /// TCP flags; 0 for UDP.
    pub tcp_flags: u8,
    /// TCP sequence number, host order; for UDP what [`crate::quic::classify`] says, else 0.
    pub seq: u32,
    /// Bytes of a TCP segment's payload; 0 for UDP, and where no entry is looked up.
    pub payload_bytes: u32,
    /// What a datagram is of a QUIC connection; [`Quic::Other`] for TCP, for services without
    /// QUIC, and where nothing depends on it.
    pub quic: Quic,
}

impl Segment {
    /// A TCP segment without payload.
    #[inline(always)]
    pub const fn tcp(tcp_flags: u8, seq: u32) -> Self {
        Self { protocol: IPPROTO_TCP, tcp_flags, seq, payload_bytes: 0, quic: Quic::Other }
    }

    /// The same segment with so much payload.
    #[inline(always)]
    pub const fn carrying(self, payload_bytes: u32) -> Self {
        Self { payload_bytes, ..self }
    }

    /// A UDP datagram, of whatever is in it.
    #[inline(always)]
    pub const fn udp() -> Self {
        Self { protocol: IPPROTO_UDP, tcp_flags: 0, seq: 0, payload_bytes: 0, quic: Quic::Other }
    }

    /// Whether the segment opens a TCP connection: SYN without ACK, FIN or RST.
    #[inline(always)]
    pub const fn opens(self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK | TCP_FIN | TCP_RST) == TCP_SYN
    }

    /// Whether a TCP can have sent it. Datagrams are none of its business.
    #[inline(always)]
    pub const fn possible(self) -> bool {
        // Of SYN, FIN and RST one at most; without ACK, SYN or RST. A bit for each combination, and
        // no branch: a verifier follows each.
        const POSSIBLE: u32 = {
            let without_ack = 1 << TCP_SYN | 1 << TCP_RST;
            let ack = 1 | 1 << TCP_FIN | 1 << TCP_SYN | 1 << TCP_RST;
            without_ack | ack << 8
        };
        let others = self.tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST);
        let combination = others | (self.tcp_flags & TCP_ACK) >> 1;
        POSSIBLE >> combination & 1 != 0 || self.protocol != IPPROTO_TCP
    }

    /// The number of what its sender sends next: SYN and FIN count as a byte (RFC 9293, 3.4).
    #[inline(always)]
    pub(crate) const fn next_seq(self) -> u32 {
        let flags = (self.tcp_flags & TCP_FIN) + (self.tcp_flags >> 1 & 1);
        self.seq.wrapping_add(self.payload_bytes).wrapping_add(flags as u32)
    }

    /// Whether the segment comes shortly after the SYN numbered `syn_seq`.
    #[inline(always)]
    pub(crate) const fn follows(self, syn_seq: u32) -> bool {
        self.seq.wrapping_sub(syn_seq).wrapping_sub(1) < CONFIRM_WINDOW
    }
}

/// Whether a backend with these `BACKEND_*` flags can't take what is being opened: it fails its
/// checks, can't be reached, is in maintenance, or is none at all.
#[inline(always)]
pub(crate) const fn unfit(flags: u32) -> bool {
    flags & (BACKEND_USABLE | BACKEND_DOWN | BACKEND_MAINT) != BACKEND_USABLE
}

/// What became of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The entry is there.
    Stored,
    /// Another one was there first.
    Exists,
    /// The table is full.
    Full,
}

/// The flow table and what else a decision may look at.
///
/// # Safety
/// A non-null pointer that `lookup` returns must be valid for reads and writes
/// of a [`Flow`] until the decision has been made. Others may read and write
/// the same entry meanwhile: each field is loaded and stored at once.
pub unsafe trait Flows<K> {
    /// The entry of `key`, or null.
    fn lookup(&self, key: &K) -> *mut Flow;
    /// Stores `flow` unless `key` has an entry.
    fn insert(&self, key: &K, flow: &Flow) -> Inserted;
    /// Removes the entry of `key`, if there is one.
    fn remove(&self, key: &K);
    /// The `BACKEND_*` flags of a backend.
    fn backend_flags(&self, backend: BackendIndex) -> u32;
    /// Nanoseconds of a monotonic clock; a few milliseconds of coarseness do not matter.
    fn now_ns(&self) -> u64;
    /// Counts a flow of a tracked bucket that the full table could not hold.
    #[inline(always)]
    fn count_untracked(&self) {}
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steering {
    /// The backend.
    pub backend: BackendIndex,
    /// Whether the packet opens a connection, as far as is known.
    pub opens: bool,
}

/// Steers a packet of a service that does not translate addresses.
#[inline(always)]
pub fn steer<K, F: Flows<K>>(
    flows: &F,
    service: &Service,
    entry: Entry,
    key: &K,
    segment: Segment,
) -> Steering {
    if !entry.tracked() {
        return Steering { backend: entry.current(), opens: segment.opens() };
    }
    let steering = if segment.protocol == IPPROTO_TCP {
        steer_tcp(flows, service, entry, key, segment)
    } else if matches!(segment.quic, Quic::Other) {
        steer_udp(flows, service, entry, key)
    } else {
        steer_quic(flows, service, entry, key, segment)
    };
    if flows.backend_flags(steering.backend) & BACKEND_MAINT != 0 {
        return Steering { backend: entry.current(), ..steering };
    }
    steering
}

#[inline(always)]
fn steer_tcp<K, F: Flows<K>>(
    flows: &F,
    service: &Service,
    entry: Entry,
    key: &K,
    segment: Segment,
) -> Steering {
    let (current, previous) = (entry.current(), entry.previous());
    let now = flows.now_ns();
    let mut flow = flows.lookup(key);
    if flow.is_null() && segment.opens() {
        let new = tracked_flow(service, current, state::PROVISIONAL, segment.seq, now);
        match flows.insert(key, &new) {
            Inserted::Stored => return Steering { backend: current, opens: true },
            Inserted::Full => {
                flows.count_untracked();
                return Steering { backend: previous, opens: true };
            }
            Inserted::Exists => flow = flows.lookup(key),
        }
    }
    if flow.is_null() {
        return Steering { backend: previous, opens: false };
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let flow = unsafe { &mut *flow };
    let was = flow.state;
    let backend = BackendIndex::new(flow.backend);
    if segment.opens() {
        let flags = flows.backend_flags(backend);
        let unfit = unfit(flags);
        let provisional = was & state::PROVISIONAL != 0;
        let same = flow.syn_seq == segment.seq;
        let replace = flags & BACKEND_MAINT != 0
            || (unfit && provisional)
            || (!same && (provisional || unfit || was & (state::CLOSING | state::RESET) != 0));
        flow.last_ns = now;
        if !replace {
            return Steering { backend, opens: false };
        }
        flow.backend = current.get();
        flow.syn_seq = segment.seq;
        flow.state = state::PROVISIONAL;
        return Steering { backend: current, opens: true };
    }
    if was & state::PROVISIONAL != 0 {
        if !segment.follows(flow.syn_seq) {
            return Steering { backend: previous, opens: false };
        }
        // What it sends from here on is measured by this packet.
        flow.next_seq = segment.seq;
    }
    let becomes = heard(flow, segment, now, state::CLOSING, state::RESET) & !state::PROVISIONAL;
    if was != becomes {
        flow.state = becomes;
    }
    Steering { backend, opens: false }
}

/// What a packet on an open connection makes of the state of its direction, `fin` and `rst`
/// being the bits for it. Notes in the entry what the direction has got to, and when.
///
/// A FIN ends the direction until something comes that was sent after it, which the sender of
/// a FIN does not do: then the FIN was not its own. Acknowledgements and what is sent again
/// leave the mark, or no connection that has ended would ever be told from an open one.
///
/// After a RST whatever comes says that the sender is still there: who only receives sends
/// nothing but acknowledgements. But for [`OVERTAKEN_NS`] they may have been sent before it; until
/// then only new data revives, and the entry keeps the RST's time.
#[inline(always)]
pub(crate) fn heard(flow: &mut Flow, segment: Segment, now: u64, fin: u32, rst: u32) -> u32 {
    let was = flow.state;
    let near =
        segment.seq.wrapping_sub(flow.next_seq).wrapping_add(CLOSE_WINDOW) < 2 * CLOSE_WINDOW;
    if segment.tcp_flags & TCP_RST != 0 {
        flow.last_ns = now;
        return if near { was | rst } else { was };
    }
    let next_seq = segment.next_seq();
    let ahead = next_seq.wrapping_sub(flow.next_seq).wrapping_sub(1) < ADVANCE_WINDOW;
    if was & rst != 0 && !ahead && now.saturating_sub(flow.last_ns) < OVERTAKEN_NS {
        return was;
    }
    flow.last_ns = now;
    let was = was & !rst;
    if segment.tcp_flags & TCP_FIN != 0 {
        if !near {
            return was;
        }
        flow.next_seq = next_seq;
        return was | fin;
    }
    if ahead {
        flow.next_seq = next_seq;
        return was & !fin;
    }
    was
}

#[inline(always)]
fn steer_udp<K, F: Flows<K>>(flows: &F, service: &Service, entry: Entry, key: &K) -> Steering {
    let passed_over = |backend: BackendIndex| {
        backend.is_none() || flows.backend_flags(backend) & BACKEND_MAINT != 0
    };
    let learned = entry.learning() && !passed_over(entry.previous());
    let target = if learned { entry.previous() } else { entry.current() };
    let now = flows.now_ns();
    let mut flow = flows.lookup(key);
    if flow.is_null() {
        let new = tracked_flow(service, target, state::UDP, 0, now);
        match flows.insert(key, &new) {
            Inserted::Stored => return Steering { backend: target, opens: true },
            Inserted::Full => {
                flows.count_untracked();
                return Steering { backend: entry.previous(), opens: true };
            }
            Inserted::Exists => flow = flows.lookup(key),
        }
        if flow.is_null() {
            return Steering { backend: target, opens: true };
        }
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let flow = unsafe { &mut *flow };
    let silent_ns = now.saturating_sub(flow.last_ns);
    if flow.state & state::QUIC != 0 {
        // Nobody knows what it is. It keeps no entry alive, and takes none away.
        return Steering { backend: BackendIndex::new(flow.backend), opens: false };
    }
    flow.last_ns = now;
    let backend = BackendIndex::new(flow.backend);
    if silent_ns <= service.udp_idle_ns() && !passed_over(backend) {
        return Steering { backend, opens: false };
    }
    flow.backend = target.get();
    Steering { backend: target, opens: true }
}

/// An Initial packet is QUIC's SYN, with these differences from TCP:
///
/// - A Handshake packet confirms an entry, which an open connection does not send, nor who
///   forges or repeats an Initial packet alone. Packets with short headers do not match a
///   provisional entry; long ones do: they belong to the handshake under way.
/// - Another destination connection ID does not say that the tuple is used again: the client has
///   that of its server by then (RFC 9000, 7.2), or of a Retry (17.2.5.2). Nor is a second
///   connection on one tuple told from the first by its later packets. So an entry is followed
///   until its flow is over by silence, or its backend is unfit.
#[inline(always)]
fn steer_quic<K, F: Flows<K>>(
    flows: &F,
    service: &Service,
    entry: Entry,
    key: &K,
    segment: Segment,
) -> Steering {
    let (current, previous) = (entry.current(), entry.previous());
    let opens = matches!(segment.quic, Quic::Initial);
    let opened = state::QUIC | state::PROVISIONAL;
    let now = flows.now_ns();
    let mut flow = flows.lookup(key);
    if flow.is_null() && opens {
        let new = tracked_flow(service, current, opened, segment.seq, now);
        match flows.insert(key, &new) {
            Inserted::Stored => return Steering { backend: current, opens: true },
            Inserted::Full => return Steering { backend: previous, opens: true },
            Inserted::Exists => flow = flows.lookup(key),
        }
    }
    if flow.is_null() {
        return Steering { backend: previous, opens: false };
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let flow = unsafe { &mut *flow };
    let backend = BackendIndex::new(flow.backend);
    let silent_ns = now.saturating_sub(flow.last_ns);
    let was = flow.state;
    if opens {
        if !quic_renews(flows, service, flow, segment, silent_ns) {
            flow.last_ns = now;
            return Steering { backend, opens: false };
        }
        flow.last_ns = now;
        flow.backend = current.get();
        flow.syn_seq = segment.seq;
        flow.state = opened;
        return Steering { backend: current, opens: true };
    }
    // Any datagram makes an entry that is not of QUIC: it must not carry a connection off.
    if was & state::QUIC == 0
        || (was & state::PROVISIONAL != 0 && matches!(segment.quic, Quic::Short))
    {
        return Steering { backend: previous, opens: false };
    }
    if was & state::PROVISIONAL != 0 && matches!(segment.quic, Quic::Handshake) {
        flow.state = was & !state::PROVISIONAL;
    }
    flow.last_ns = now;
    Steering { backend, opens: false }
}

/// Where an ICMP error about a packet to a client goes: to the backend that its connection's
/// packets go to. `acked` is the client's sequence number that the quoted TCP segment
/// acknowledges, where it is quoted. Nothing is remembered, and no entry kept alive by it.
#[inline(always)]
pub fn related<K, F: Flows<K>>(
    flows: &F,
    service: &Service,
    entry: Entry,
    key: &K,
    protocol: u8,
    acked: Option<u32>,
) -> BackendIndex {
    if !entry.tracked() {
        return entry.current();
    }
    let unknown = if protocol == IPPROTO_TCP
        || service.flags & SERVICE_QUIC != 0
        || entry.learning() && !entry.previous().is_none()
    {
        entry.previous()
    } else {
        entry.current()
    };
    let flow = flows.lookup(key);
    let backend = if flow.is_null() {
        unknown
    } else {
        // SAFETY: not null, so valid for this decision by the contract of `Flows`.
        let flow = unsafe { &*flow };
        let known = if flow.state & state::PROVISIONAL != 0 {
            // What is quoted of QUIC does not say whether it is of the handshake.
            flow.state & state::QUIC == 0
                && acked.is_some_and(|seq| Segment::tcp(TCP_ACK, seq).follows(flow.syn_seq))
        } else {
            flow.state & state::UDP == 0
                || flows.now_ns().saturating_sub(flow.last_ns) <= service.udp_idle_ns()
        };
        if known { BackendIndex::new(flow.backend) } else { unknown }
    };
    if flows.backend_flags(backend) & BACKEND_MAINT != 0 {
        return entry.current();
    }
    backend
}

/// Whether an Initial packet opens a connection where `flow` is, after `silent_ns` of silence.
#[inline(always)]
pub(crate) fn quic_renews<K, F: Flows<K>>(
    flows: &F,
    service: &Service,
    flow: &Flow,
    segment: Segment,
    silent_ns: u64,
) -> bool {
    if flow.state & state::QUIC == 0 || silent_ns > service.quic_idle_ns() {
        return true;
    }
    let flags = flows.backend_flags(BackendIndex::new(flow.backend));
    flags & BACKEND_MAINT != 0
        || (unfit(flags) && (flow.state & state::PROVISIONAL != 0 || flow.syn_seq != segment.seq))
}

#[inline(always)]
fn tracked_flow(service: &Service, backend: BackendIndex, state: u32, seq: u32, now: u64) -> Flow {
    // SAFETY: a reference to a constant. The volatile read hides from the compiler that the
    // fields below are zero: it would set them by a call to a loop over bytes.
    let zero = unsafe { core::ptr::read_volatile(&0_u64) };
    let word = zero as u32;
    Flow {
        last_ns: now,
        state,
        syn_seq: seq,
        src: [zero; 2],
        dst: [zero; 2],
        src_port_be: zero as u16,
        dst_port_be: zero as u16,
        backend: backend.get(),
        service: service.id as u16,
        eth: [word; 3],
        way: word,
        next_seq: word,
        other: word,
    }
}

#[cfg(any(test, feature = "user"))]
pub mod model {
    //! A flow table in user space, for tests and `explain`.

    use std::{
        cell::{Cell, RefCell, UnsafeCell},
        collections::HashMap,
        hash::Hash,
    };

    use super::{BACKEND_USABLE, BackendIndex, Flow, Flows, Inserted};
    use crate::{
        abi::{Address, Ring},
        ports::Search,
    };

    /// A flow table over a `HashMap`, with a clock that is set by hand.
    #[derive(Debug, Default)]
    pub struct ModelFlows<K> {
        entries: RefCell<HashMap<K, Box<UnsafeCell<Flow>>>>,
        /// Entries that it can hold.
        pub capacity: Cell<usize>,
        /// What `now_ns` answers.
        pub clock_ns: Cell<u64>,
        /// Flags of backends; others are usable, and nothing else.
        pub flags: RefCell<HashMap<BackendIndex, u32>>,
        /// `NAT_SOURCES`.
        pub sources: RefCell<Vec<Address>>,
        /// Places of the ring of half-open flows.
        pub spare_places: Cell<u64>,
        pub(crate) half_open: RefCell<(Ring, Vec<Option<Box<K>>>)>,
        pub(crate) exhausted: RefCell<HashMap<BackendIndex, u64>>,
        pub(crate) search: UnsafeCell<Search>,
        /// How often an entry was looked up.
        pub lookups: Cell<u64>,
    }

    impl<K: Copy + Eq + Hash> ModelFlows<K> {
        /// An empty table for `capacity` entries.
        pub fn new(capacity: usize) -> Self {
            Self {
                entries: RefCell::new(HashMap::new()),
                capacity: Cell::new(capacity),
                clock_ns: Cell::new(1),
                flags: RefCell::new(HashMap::new()),
                sources: RefCell::new(Vec::new()),
                spare_places: Cell::new(16),
                half_open: RefCell::new((Ring::default(), Vec::new())),
                exhausted: RefCell::new(HashMap::new()),
                search: UnsafeCell::default(),
                lookups: Cell::new(0),
            }
        }

        /// Number of entries.
        pub fn len(&self) -> usize {
            self.entries.borrow().len()
        }

        /// Whether there is no entry.
        pub fn is_empty(&self) -> bool {
            self.len() == 0
        }

        /// Removes the entries of which `keep` does not say otherwise.
        pub fn retain(&self, mut keep: impl FnMut(&K, &Flow) -> bool) {
            // SAFETY: single-threaded (`RefCell`), and no decision is under way here.
            self.entries.borrow_mut().retain(|key, flow| keep(key, unsafe { &*flow.get() }));
        }

        /// A copy of the entry of `key`.
        pub fn get(&self, key: &K) -> Option<Flow> {
            // SAFETY: single-threaded (`RefCell`), and no decision is under way here.
            self.entries.borrow().get(key).map(|flow| unsafe { *flow.get() })
        }
    }

    // SAFETY: boxed entries do not move when the map grows, and `&self` methods
    // that drop one are not called between a lookup and the end of its decision.
    unsafe impl<K: Copy + Eq + Hash> Flows<K> for ModelFlows<K> {
        fn lookup(&self, key: &K) -> *mut Flow {
            self.lookups.set(self.lookups.get() + 1);
            self.entries.borrow().get(key).map_or(std::ptr::null_mut(), |flow| flow.get())
        }

        fn insert(&self, key: &K, flow: &Flow) -> Inserted {
            let mut entries = self.entries.borrow_mut();
            if entries.contains_key(key) {
                return Inserted::Exists;
            }
            if entries.len() >= self.capacity.get() {
                return Inserted::Full;
            }
            entries.insert(*key, Box::new(UnsafeCell::new(*flow)));
            Inserted::Stored
        }

        fn remove(&self, key: &K) {
            self.entries.borrow_mut().remove(key);
        }

        fn backend_flags(&self, backend: BackendIndex) -> u32 {
            self.flags.borrow().get(&backend).copied().unwrap_or(BACKEND_USABLE)
        }

        fn now_ns(&self) -> u64 {
            self.clock_ns.get()
        }
    }
}
