//! Watching some of the connections: see `canary_ebpf_common::signals`.
//!
//! A packet of a connection that is watched is sent as any other. Then it is left to `watch_v4` or
//! `watch_v6`, programs of their own. What they need of it is read from the frame once more, by
//! functions of their own which only packets of services that are watched come to: the others
//! carry nothing along for it. `judge_v4` and `judge_v6` are run by the agent itself (`BPF_PROG_TEST_RUN`) on a list of
//! connections whose time is over, and are attached to nothing.

use core::hint::cold_path;

use aya_ebpf::{
    bindings::{BPF_NOEXIST, xdp_action},
    helpers::generated::bpf_ktime_get_ns,
    macros::{map, xdp},
    maps::{Array, HashMap, PerCpuArray, RingBuf},
    programs::XdpContext,
};
use canary_ebpf_common::{
    abi::{
        Address, Backend, FORGET_MOST, FORGET_OFFSET, Flow, FlowKeyV4, FlowKeyV6,
        HANDSHAKE_BUCKETS, IPPROTO_TCP, PortPair, Reason, SERVICE_SAMPLED, Sample, Sampling,
        Service, SignalEvent, VersionSignals, flow_state, outcome,
    },
    entry::BackendIndex,
    headers::{ETH_BYTES, Frame as _, Ipv4, Ipv6, Ports, Tcp},
    nat::{self, TupleKey as _},
    signals::{self, Seen, Step, Watchable},
    steer::Flows as _,
};

use crate::{
    arrival::TRANSPORT_MASK,
    forward::Transport,
    maps::{self, FlowsV4, FlowsV6, Program},
    packet::Packet,
};

/// A packet that is being sent and is to be taken into account then.
#[repr(C)]
struct Pending {
    v6: FlowKeyV6,
    v4: FlowKeyV4,
    /// Its [`Sampling::place`].
    place: u32,
    /// One of [`NOT`] and so on.
    state: u32,
    flags: u32,
    seq: u32,
    ack: u32,
    /// What becomes of the frame.
    action: u32,
    /// See [`opaque`].
    bucket: u32,
    pad: u32,
}

/// [`Pending::state`]: there is none.
const NOT: u32 = 0;
/// [`Pending::state`]: of an IPv4 connection.
const IPV4: u32 = 1 << 0;
/// [`Pending::state`]: of an IPv6 connection.
const IPV6: u32 = 1 << 1;
/// [`Pending::state`]: the server's packets are seen.
const BOTH: u32 = 1 << 2;
/// [`Pending::state`]: this is one of them.
const FROM_SERVER: u32 = 1 << 3;
/// [`Pending::state`]: the frame is to get tags afterwards.
const TAGS: u32 = 1 << 4;
/// [`Pending::state`]: the frame is to be wrapped afterwards.
const WRAP: u32 = 1 << 6;
/// [`Pending::state`]: it is to be taken into account. Where few packets come by, one of a service
/// that is watched is noted without this, until it is known which version it is for.
const ARMED: u32 = 1 << 5;
/// [`Pending::state`]: its connection was chosen before.
const KNOWN: u32 = 1 << 7;

/// Which connections of each version are watched.
#[map]
static SAMPLING: Array<Sampling> = Array::with_max_entries(1, 0);
/// Connections of IPv4 that are watched: never evicted.
#[map]
static SAMPLES_V4: HashMap<FlowKeyV4, Sample> = HashMap::with_max_entries(1, 0);
/// The same of IPv6.
#[map]
static SAMPLES_V6: HashMap<FlowKeyV6, Sample> = HashMap::with_max_entries(1, 0);
/// What they have done, by version.
#[map]
static SIGNAL_COUNTERS: PerCpuArray<VersionSignals> = PerCpuArray::with_max_entries(1, 0);
/// Bad outcomes, with the client.
#[map]
static SIGNALS: RingBuf = RingBuf::with_byte_size(4096, 0);
/// The packet at hand, if its connection is watched.
#[map]
static PENDING: PerCpuArray<Pending> = PerCpuArray::with_max_entries(1, 0);

/// Whether any service may be watched. Where few packets come by it is asked for each, and the
/// verifier removes all of this if it is 0.
#[unsafe(no_mangle)]
static WATCHING: u32 = 0;

#[inline(always)]
fn watching() -> bool {
    // SAFETY: an initialised static; volatile so that the compiler does not take it for the
    // loader's.
    unsafe { core::ptr::read_volatile(&raw const WATCHING) != 0 }
}

#[inline(always)]
const fn watches(service: &Service) -> bool {
    service.flags & SERVICE_SAMPLED != 0
}

/// The packet at hand.
#[inline(always)]
fn pending() -> Option<&'static mut Pending> {
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { PENDING.get_ptr_mut(0).map(|p| &mut *p) }
}

/// Whether a connection is watched that belongs to a place.
#[inline(always)]
fn chosen(sampling: &Sampling, connection: &impl Watchable) -> bool {
    // As the map is made, nobody has said anything yet.
    signals::watched(connection.sampling_hash(), sampling.mask) && sampling.epoch != 0
}

/// Leaves the packet to the program that takes it into account, if it is `watched`. Nothing of
/// the frame may be looked at afterwards.
#[inline(always)]
pub(crate) fn go_on<const RARE: bool>(
    packet: &Packet,
    watched: bool,
    sent: Result<u32, Reason>,
) -> Result<u32, Reason> {
    let looks = looks::<RARE>(watched);
    if looks
        && let Some(pending) = pending()
        && pending.state & ARMED != 0
    {
        if let Ok(action) = sent {
            pending.action = action;
            leave(packet, pending);
        }
        pending.state = NOT;
    }
    sent
}

/// Whether it is looked whether the packet is taken into account. Where few packets come by, it always
/// is: there is no room to remember it.
#[inline(always)]
fn looks<const RARE: bool>(watched: bool) -> bool {
    let looks = if RARE { watching() } else { watched };
    if looks {
        cold_path();
    }
    looks
}

/// The same of a frame that gets its tags behind that.
#[inline(always)]
pub(crate) fn go_on_before_tags(packet: &Packet) {
    go_on_before(packet, watching(), TAGS);
}

/// The same of a frame that is wrapped behind that.
#[inline(always)]
pub(crate) fn go_on_before_wrapping<const RARE: bool>(packet: &Packet, watched: bool) {
    go_on_before(packet, looks::<RARE>(watched), WRAP);
}

#[inline(always)]
fn go_on_before(packet: &Packet, looks: bool, what: u32) {
    if looks
        && let Some(pending) = pending()
        && pending.state & ARMED != 0
    {
        pending.state |= what;
        leave(packet, pending);
        pending.state = NOT;
    }
}

/// Takes no account of a packet after all, which is not sent.
#[inline(always)]
pub(crate) fn let_go<const RARE: bool>(watched: bool, reason: Reason) -> Result<u32, Reason> {
    if (RARE && watching() || watched)
        && let Some(pending) = pending()
    {
        pending.state = NOT;
    }
    Err(reason)
}

#[inline(always)]
fn leave(packet: &Packet, pending: &Pending) {
    if pending.state & IPV4 != 0 {
        maps::tail_call(packet.ctx, Program::WatchV4);
    } else {
        maps::tail_call(packet.ctx, Program::WatchV6);
    }
}

/// What is done with a frame that has been taken into account.
#[inline(always)]
fn done(packet: &Packet, state: u32, action: u32) -> u32 {
    if state & (TAGS | WRAP) == 0 {
        return action;
    }
    maps::tail_call(packet.ctx, if state & TAGS != 0 { Program::Tag } else { Program::Wrap });
    maps::count(Reason::DropNoInterface)
}

/// The same number, of which neither compiler nor verifier knows anything: kernel 6.1's verifier
/// makes an impossible range of what it knows of a bucket, and refuses the program for it.
#[inline(always)]
fn opaque(bucket: u32) -> u32 {
    let Some(pending) = pending() else { return 0 };
    // SAFETY: both are of one field of a value that is there.
    unsafe {
        core::ptr::write_volatile(&raw mut pending.bucket, bucket);
        core::ptr::read_volatile(&raw const pending.bucket)
    }
}

/// Counts what a step says.
#[inline(always)]
fn report(step: &Step, sampling: &Sampling, place: u32, now_ns: u64, client: Address) {
    if !step.began && step.outcomes == 0 {
        return;
    }
    let Some(counters) = SIGNAL_COUNTERS.get_ptr_mut(sampling.slot) else { return };
    // SAFETY: this CPU's own element, and XDP does not nest.
    let counters = unsafe { &mut *counters };
    counters.watched += u64::from(step.began);
    if step.handshake_ns != 0 {
        counters.handshake_ns += step.handshake_ns;
        let bucket = opaque(signals::bucket(step.handshake_ns)) as usize;
        if bucket < HANDSHAKE_BUCKETS {
            counters.handshakes[bucket] += 1;
        }
    }
    if step.outcomes == 0 {
        return;
    }
    counters.outcomes[0] += u64::from(step.outcomes & outcome::CONNECT_FAILED != 0);
    counters.outcomes[1] += u64::from(step.outcomes & outcome::SYN_RETRANSMIT != 0);
    counters.outcomes[2] += u64::from(step.outcomes & outcome::SLOW_HANDSHAKE != 0);
    counters.outcomes[3] += u64::from(step.outcomes & outcome::SERVER_RESET != 0);
    counters.outcomes[4] += u64::from(step.outcomes & outcome::CLIENT_RESET != 0);
    counters.outcomes[5] += u64::from(step.outcomes & outcome::SHORT_FLOW != 0);
    let event = SignalEvent { at_ns: now_ns, client, outcomes: step.outcomes, place };
    if SIGNALS.output::<SignalEvent>(&event, 0).is_err() {
        counters.lost += 1;
    }
}

/// Whether a client's packet is of a service whose connections may be watched.
#[inline(always)]
fn may_be_watched<const RARE: bool>(service: &Service, transport: &Transport, family: u32) -> bool {
    if RARE {
        return watching() && pending().is_some_and(|pending| pending.state == family);
    }
    watches(service) && transport.segment.protocol == IPPROTO_TCP
}

macro_rules! family {
    (
        $key:ty, $field:ident, $family:ident, $samples:ident, $flows:ident, $client:expr, $ends:ident, $copy:ident,
        $watch:ident, $note:ident, $look:ident, $from_client:ident, $translated:ident, $returned:ident, $judge:ident
    ) => {
        /// Takes a packet into account that is being sent, and lets it go.
        #[xdp]
        pub(crate) fn $watch(ctx: XdpContext) -> u32 {
            let packet = Packet::of(ctx.ctx);
            let Some(pending) = pending() else { return xdp_action::XDP_DROP };
            let (state, action) = (pending.state, pending.action);
            pending.state = NOT;
            $field::watch(pending, state);
            done(&packet, state, action)
        }

        mod $field {
            //! One family's part.

            use super::*;

            #[inline(always)]
            pub(super) fn watch(pending: &Pending, state: u32) {
                let from_server = state & FROM_SERVER != 0;
                let both = state & BOTH != 0;
                let key = &pending.$field;
                let Pending { place, flags, seq, ack, .. } = *pending;
                let Some(sampling) = SAMPLING.get(place) else { return };
                // SAFETY: the helper has no precondition.
                let now_ns = unsafe { bpf_ktime_get_ns() };
                let opens = !from_server && signals::opens(flags);
                let Some(sample) = $samples.get_ptr_mut(key) else {
                    if opens {
                        const EEXIST: i32 = -17;
                        let new = signals::begin(now_ns, seq, sampling.epoch, place);
                        match $samples.insert(key, &new, u64::from(BPF_NOEXIST)) {
                            Ok(()) | Err(EEXIST) => mark(key, both),
                            Err(_) => full(sampling.slot),
                        }
                    }
                    return;
                };
                // SAFETY: elements of a preallocated hash map stay valid memory of the map while
                // the program runs.
                let sample = unsafe { &mut *sample };
                if opens {
                    mark(key, both);
                }
                if sample.epoch != sampling.epoch || sample.place != place {
                    if opens {
                        *sample = signals::begin(now_ns, seq, sampling.epoch, place);
                    }
                    return;
                }
                let seen = Seen { now_ns, flags, seq, ack, from_server };
                let step = signals::step(sample, &seen, sampling.slow_ns);
                report(&step, sampling, place, now_ns, $client(key));
                if step.over {
                    // Failure means that it is not there.
                    _ = $samples.remove(key);
                }
            }

            /// Marks both entries of a translated flow as watched.
            #[inline(always)]
            fn mark(key: &$key, both: bool) {
                let flow = if both { $flows.lookup(key) } else { return };
                if flow.is_null() {
                    return;
                }
                // SAFETY: not null, so valid by the contract of `Flows`.
                let flow = unsafe { &mut *flow };
                if flow.state & flow_state::SAMPLED != 0 {
                    return;
                }
                flow.state |= flow_state::SAMPLED;
                let reverse = $flows.lookup(&nat::opposite::<$key>(flow, IPPROTO_TCP));
                if !reverse.is_null() {
                    // SAFETY: as above.
                    unsafe { (*reverse).state |= flow_state::SAMPLED };
                }
            }

            /// Whether a client's packet whose TCP header is at `header` is of a connection that is
            /// chosen.
            #[inline(always)]
            pub(super) fn is_chosen(packet: &Packet, header: usize, place: u32) -> bool {
                // Looked up first, since what is read of the packet before has to be put away.
                let Some(sampling) = SAMPLING.get(place) else { return false };
                let (Some(ports), Some((src, dst))) =
                    (packet.at::<PortPair>(header), $ends(packet))
                else {
                    return false;
                };
                // SAFETY: `at` checked the bounds. One word: two halves would be put together.
                let ports = unsafe { *ports };
                let key = <$key>::tuple(src, dst, ports.src_be(), ports.dst_be(), IPPROTO_TCP);
                chosen(sampling, &key)
            }

            /// Notes a packet whose TCP header is at `header`, if its connection is `KNOWN` to be
            /// watched, or chosen.
            #[inline(always)]
            pub(super) fn look(
                packet: &Packet,
                header: usize,
                place: u32,
                state: u32,
            ) -> Option<()> {
                let tcp: *mut Tcp = packet.at(header)?;
                // SAFETY: `at` checked the bounds.
                let tcp = unsafe { &*tcp };
                let Ports { src_be, dst_be } = tcp.ports;
                let (src, dst) = $ends(packet)?;
                let key = if state & FROM_SERVER != 0 {
                    <$key>::tuple(dst, src, dst_be, src_be, IPPROTO_TCP)
                } else {
                    <$key>::tuple(src, dst, src_be, dst_be, IPPROTO_TCP)
                };
                if state & KNOWN == 0 && !chosen(SAMPLING.get(place)?, &key) {
                    return None;
                }
                let pending = pending()?;
                $copy(&mut pending.$field, &key);
                pending.place = place;
                pending.flags = u32::from(tcp.flags);
                pending.seq = u32::from_be(tcp.seq_be);
                pending.ack = u32::from_be(tcp.ack_be);
                pending.state = super::$family | ARMED | state;
                Some(())
            }
        }

        /// A function of its own, which the verifier follows as if it stood where it is called.
        /// For the section see `packet::classify`.
        #[cold]
        #[inline(never)]
        #[unsafe(link_section = ".text")]
        fn $look(start: usize, end: usize, header: usize, place: u32, state: u32) -> u32 {
            let packet = Packet::within(start, end);
            u32::from($field::look(&packet, header & TRANSPORT_MASK, place, state).is_some())
        }

        /// Where few packets come by: notes whether one of a client's is of a service that is
        /// watched. There is no room to keep the service at hand until `client` or `translated`
        /// asks.
        #[inline(always)]
        pub(crate) fn $note<const RARE: bool>(service: &Service, transport: &Transport) {
            if RARE
                && watching()
                && let Some(pending) = pending()
            {
                let tcp = transport.segment.protocol == IPPROTO_TCP;
                pending.state = if watches(service) && tcp { $family } else { NOT };
            }
        }

        /// Whether a client's packet to a backend that answers by another way is watched: then it
        /// is taken into account behind sending it, by `go_on`.
        #[inline(always)]
        pub(crate) fn $from_client<const RARE: bool>(
            packet: &Packet,
            service: &Service,
            backend: &Backend,
            transport: &Transport,
        ) -> bool {
            may_be_watched::<RARE>(service, transport, $family) && {
                cold_path();
                let place = Sampling::place(u32::from(backend.service), backend.version);
                // Most are not: only who is pays for a function of its own. Where few packets come
                // by, there is no room to ask before.
                (RARE || $field::is_chosen(packet, transport.offset, place)) && {
                    let (start, end) = packet.bounds();
                    $look(start, end, transport.offset, place, 0) != 0
                }
            }
        }

        /// The same of a client's packet on a translated flow.
        #[inline(always)]
        pub(crate) fn $translated<const RARE: bool>(
            packet: &Packet,
            service: &Service,
            backend: &Backend,
            transport: &Transport,
            flow: &Flow,
        ) -> bool {
            may_be_watched::<RARE>(service, transport, $family) && {
                cold_path();
                let opens = transport.segment.opens();
                let known = !opens && flow.state & flow_state::SAMPLED != 0;
                (opens || known) && {
                    let place = Sampling::place(u32::from(backend.service), backend.version);
                    let (start, end) = packet.bounds();
                    let state = BOTH | if known { KNOWN } else { 0 };
                    $look(start, end, transport.offset, place, state) != 0
                }
            }
        }

        /// The same of a backend's packet on a translated flow, which has the addresses and ports
        /// that the client knows by now.
        #[inline(always)]
        pub(crate) fn $returned(packet: &Packet, transport: &Transport, flow: &Flow) -> bool {
            if flow.state & flow_state::SAMPLED == 0 || transport.segment.protocol != IPPROTO_TCP {
                return false;
            }
            cold_path();
            let Some(backend) = maps::backend(BackendIndex::new(flow.backend)) else {
                return false;
            };
            let place = Sampling::place(u32::from(flow.service), backend.version);
            let (start, end) = packet.bounds();
            let state = BOTH | FROM_SERVER | KNOWN;
            $look(start, end, transport.offset, place, state) != 0
        }

        /// Looks again at connections whose time is over. Answers with how many are watched no
        /// more.
        #[xdp]
        pub(crate) fn $judge(ctx: XdpContext) -> u32 {
            let packet = Packet::of(ctx.ctx);
            let mut gone = 0;
            let mut n = 0;
            while n < FORGET_MOST {
                let Some(key) = packet.at::<$key>(FORGET_OFFSET + n * size_of::<$key>()) else {
                    break;
                };
                // SAFETY: `at` checked the bounds.
                gone += judge::$watch(unsafe { &*key });
                n += 1;
            }
            gone
        }
    };
}

family!(
    FlowKeyV4,
    v4,
    IPV4,
    SAMPLES_V4,
    FlowsV4,
    |key: &FlowKeyV4| [u64::from(key.src_be), 0],
    ends_v4,
    copy_v4,
    watch_v4,
    note_v4,
    look_v4,
    client_v4,
    translated_v4,
    returned_v4,
    judge_v4
);
family!(
    FlowKeyV6,
    v6,
    IPV6,
    SAMPLES_V6,
    FlowsV6,
    |key: &FlowKeyV6| [key.src[0], key.src[1]],
    ends_v6,
    copy_v6,
    watch_v6,
    note_v6,
    look_v6,
    client_v6,
    translated_v6,
    returned_v6,
    judge_v6
);

/// The addresses of an IPv4 packet, source first.
#[inline(always)]
fn ends_v4(packet: &Packet) -> Option<(Address, Address)> {
    let ip: *mut Ipv4 = packet.at(ETH_BYTES)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    Some(([u64::from(ip.src_be), 0], [u64::from(ip.dst_be), 0]))
}

/// The same of IPv6.
#[inline(always)]
fn ends_v6(packet: &Packet) -> Option<(Address, Address)> {
    let ip: *mut Ipv6 = packet.at(ETH_BYTES)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    Some(([ip.src[0], ip.src[1]], [ip.dst[0], ip.dst[1]]))
}

/// Makes `to` the same as `from`: field by field, a whole key would be copied by a call.
#[inline(always)]
fn copy_v4(to: &mut FlowKeyV4, from: &FlowKeyV4) {
    to.src_be = from.src_be;
    to.dst_be = from.dst_be;
    to.ports = from.ports;
    to.protocol = from.protocol;
}

/// The same of IPv6.
#[inline(always)]
fn copy_v6(to: &mut FlowKeyV6, from: &FlowKeyV6) {
    to.src[0] = from.src[0];
    to.src[1] = from.src[1];
    to.dst[0] = from.dst[0];
    to.dst[1] = from.dst[1];
    to.ports = from.ports;
    to.protocol = from.protocol;
}

/// Counts a connection that there was no room for.
#[inline(always)]
fn full(slot: u32) {
    if let Some(counters) = SIGNAL_COUNTERS.get_ptr_mut(slot) {
        // SAFETY: this CPU's own element, and XDP does not nest.
        unsafe { (*counters).full += 1 };
    }
}

mod judge {
    //! What time says of one connection, by family.

    use super::{
        FlowKeyV4, FlowKeyV6, SAMPLES_V4, SAMPLES_V6, SAMPLING, bpf_ktime_get_ns, report, signals,
    };

    macro_rules! judge {
        ($name:ident, $key:ty, $samples:ident, $client:expr) => {
            #[inline(always)]
            pub(super) fn $name(key: &$key) -> u32 {
                let Some(sample) = $samples.get_ptr_mut(key) else { return 0 };
                // SAFETY: elements of a preallocated hash map stay valid memory of the map while
                // the program runs.
                let sample = unsafe { &mut *sample };
                // SAFETY: the helper has no precondition.
                let now_ns = unsafe { bpf_ktime_get_ns() };
                let sampling = SAMPLING.get(sample.place);
                let over = match sampling {
                    Some(sampling) if sampling.epoch == sample.epoch => {
                        let step = signals::elapse(sample, now_ns);
                        report(&step, sampling, sample.place, now_ns, $client(key));
                        step.over
                    }
                    _ => true,
                };
                if over {
                    // Failure means that it is not there.
                    _ = $samples.remove(key);
                }
                u32::from(over)
            }
        };
    }

    judge!(watch_v4, FlowKeyV4, SAMPLES_V4, |key: &FlowKeyV4| [u64::from(key.src_be), 0]);
    judge!(watch_v6, FlowKeyV6, SAMPLES_V6, |key: &FlowKeyV6| [key.src[0], key.src[1]]);
}
