//! Translated flows: two entries each, one for either direction.
//!
//! A forward entry stands under the client's tuple, a reverse entry under the
//! tuple that the backend's answers carry. The reverse entry is stored first:
//! it is what claims the source port.
//!
//! How far a connection has come stands in both entries. Each direction's packets change the
//! bits that are theirs, on their own entry first and on the other one when they change.
//! What a packet may change depends on its numbers, so that nobody who does not see the
//! connection opens, closes or resets it (RFC 5961, RFC 7857 section 2): a flow is open when the
//! client has acknowledged the server's SYN-ACK, and a FIN or RST counts only near the newest
//! sequence number of its direction.

use core::hint::cold_path;

use crate::{
    abi::{
        Address, BACKEND_MAINT, Flow, FlowKeyV4, FlowKeyV6, Forget, IPPROTO_TCP, PortPair, Service,
        flow_state as state, forget,
    },
    entry::BackendIndex,
    ports::Pool,
    quic::Quic,
    steer::{CONFIRM_WINDOW, Flows, Segment, TCP_ACK, TCP_RST, TCP_SYN, heard, quic_renews, unfit},
};

/// The bits that the client's packets set.
const CLIENT_BITS: u32 = state::PROVISIONAL | state::CLOSING | state::RESET;
/// The bits that the server's packets set.
const SERVER_BITS: u32 =
    state::ANSWERED | state::SERVER_OPEN | state::SERVER_CLOSING | state::SERVER_RESET;

/// All that is known of a flow, whichever of its entries is asked.
#[inline(always)]
pub const fn bits(flow: &Flow) -> u32 {
    flow.state | flow.other
}

/// Whether a TCP flow with these [`bits`] is half-open. Not of QUIC: there a Handshake packet says
/// that a connection goes on, and nothing in it could be held against a number that is kept.
#[inline(always)]
pub const fn half_open(bits: u32) -> bool {
    bits & (state::PROVISIONAL | state::SERVER_OPEN | state::QUIC) == state::PROVISIONAL
}

/// Whether a flow with these [`bits`] is still being opened, of TCP or QUIC: it can be spared
/// before any that is open.
#[inline(always)]
pub const fn opening(bits: u32) -> bool {
    let quic = state::PROVISIONAL | state::QUIC;
    half_open(bits) || bits & quic == quic
}

/// Whether a flow with these [`bits`] is closed by both sides, or reset by one.
#[inline(always)]
pub const fn closed(bits: u32) -> bool {
    let both = state::CLOSING | state::SERVER_CLOSING;
    bits & (state::RESET | state::SERVER_RESET) != 0 || bits & both == both
}

/// A five-tuple of either family.
pub trait TupleKey: Copy {
    /// The tuple of a packet; an IPv4 address lies in the first four bytes.
    fn tuple(src: Address, dst: Address, src_port_be: u16, dst_port_be: u16, protocol: u8) -> Self;
    /// Whether it is the tuple of answers to packets that get the addresses and ports of `flow`.
    fn answers(&self, flow: &Flow) -> bool;
}

impl TupleKey for FlowKeyV4 {
    #[inline(always)]
    fn tuple(src: Address, dst: Address, src_port_be: u16, dst_port_be: u16, protocol: u8) -> Self {
        Self {
            src_be: src[0] as u32,
            dst_be: dst[0] as u32,
            ports: PortPair::new(src_port_be, dst_port_be),
            protocol: protocol as u32,
        }
    }

    #[inline(always)]
    fn answers(&self, flow: &Flow) -> bool {
        (self.src_be ^ flow.dst[0] as u32) | (self.dst_be ^ flow.src[0] as u32) == 0
            && self.ports == PortPair::new(flow.dst_port_be, flow.src_port_be)
    }
}

impl TupleKey for FlowKeyV6 {
    #[inline(always)]
    fn tuple(src: Address, dst: Address, src_port_be: u16, dst_port_be: u16, protocol: u8) -> Self {
        Self {
            src: [src[0], src[1]],
            dst: [dst[0], dst[1]],
            ports: PortPair::new(src_port_be, dst_port_be),
            protocol: protocol as u32,
        }
    }

    #[inline(always)]
    fn answers(&self, flow: &Flow) -> bool {
        (self.src[0] ^ flow.dst[0])
            | (self.src[1] ^ flow.dst[1])
            | (self.dst[0] ^ flow.src[0])
            | (self.dst[1] ^ flow.src[1])
            == 0
            && self.ports == PortPair::new(flow.dst_port_be, flow.src_port_be)
    }
}

/// The key under which the other direction of a translated flow stands.
#[inline(always)]
pub fn opposite<K: TupleKey>(flow: &Flow, protocol: u8) -> K {
    K::tuple(flow.dst, flow.src, flow.dst_port_be, flow.src_port_be, protocol)
}

/// What to do with a client's packet of a translated service.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Translate as this entry says.
    Follow(*mut Flow),
    /// Open a flow to the bucket's current backend; an entry that stood under
    /// the tuple has been taken away.
    Open,
    /// Belongs to no flow and opens none.
    NoFlow,
}

/// Looks a client's packet up and brings its entries up to date. `ack` is its acknowledgement
/// number, host order.
#[inline(always)]
pub fn step<K: TupleKey, F: Pool<K>>(
    flows: &F,
    service: &Service,
    key: &K,
    segment: Segment,
    ack: u32,
) -> Step {
    let pointer = flows.lookup(key);
    let tcp = segment.protocol == IPPROTO_TCP;
    if pointer.is_null() {
        return if tcp && !segment.opens() { Step::NoFlow } else { Step::Open };
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let flow = unsafe { &mut *pointer };
    let now = flows.now_ns();
    let was = bits(flow);
    if tcp && !segment.opens() {
        if half_open(was) {
            cold_path();
            confirm::<K, F>(flows, flow, segment, ack, now);
            return Step::Follow(pointer);
        }
        let becomes = heard(flow, segment, now, state::CLOSING, state::RESET) & !state::PROVISIONAL;
        if flow.state != becomes {
            cold_path();
            flow.state = becomes;
            mirror(flows, &opposite(flow, segment.protocol), CLIENT_BITS, becomes);
            if !closed(was) && closed(bits(flow)) {
                flows.keep_spare(key);
            }
        }
        return Step::Follow(pointer);
    }
    let backend = BackendIndex::new(flow.backend);
    let flags = flows.backend_flags(backend);
    let reverse: K = opposite(flow, segment.protocol);
    let renew = if tcp {
        // A SYN on a tuple that has a flow: a retransmission, or the tuple is used again.
        let over = half_open(was)
            || was & (state::CLOSING | state::RESET | state::SERVER_CLOSING | state::SERVER_RESET)
                != 0;
        flags & BACKEND_MAINT != 0
            || (unfit(flags) && half_open(was))
            || (flow.syn_seq != segment.seq && (over || unfit(flags)))
    } else {
        flags & BACKEND_MAINT != 0 || {
            let silent_ns = udp_silent_ns(flows, flow, &reverse, now);
            match segment.quic {
                Quic::Initial => quic_renews(flows, service, flow, segment, silent_ns),
                _ if was & state::QUIC != 0 => false,
                _ => silent_ns > service.udp_idle_ns(),
            }
        }
    };
    if !renew {
        // A TCP client that asks again has reset an answer to an older connection.
        let mut becomes = flow.state & !state::RESET;
        // Any packet but an Initial says that the handshake goes on: here no older connection
        // than the flow can be on the tuple, which a forged one would carry off.
        if was & state::QUIC != 0 && !matches!(segment.quic, Quic::Initial | Quic::Other) {
            becomes &= !state::PROVISIONAL;
        }
        flow.last_ns = now;
        if flow.state != becomes {
            flow.state = becomes;
            mirror(flows, &reverse, CLIENT_BITS, becomes);
        }
        return Step::Follow(pointer);
    }
    flows.remove(&reverse);
    flows.remove(key);
    Step::Open
}

/// A packet of the client's on a flow that is half-open. Only one that acknowledges the server's
/// SYN-ACK opens it: whoever forges the client's address has not seen that.
#[inline(always)]
fn confirm<K: TupleKey, F: Flows<K>>(
    flows: &F,
    flow: &mut Flow,
    segment: Segment,
    ack: u32,
    now: u64,
) {
    if !segment.follows(flow.syn_seq) {
        return;
    }
    let reverse = flows.lookup(&opposite(flow, segment.protocol));
    if reverse.is_null() {
        return;
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let reverse = unsafe { &mut *reverse };
    if segment.tcp_flags & TCP_RST != 0 {
        // A client that has asked for nothing refuses the SYN-ACK so; it acknowledges nothing.
        flow.state |= state::RESET;
    } else if flow.other & state::ANSWERED != 0
        && segment.tcp_flags & TCP_ACK != 0
        && ack.wrapping_sub(reverse.syn_seq).wrapping_sub(1) < CONFIRM_WINDOW
    {
        flow.next_seq = segment.seq;
        flow.state =
            heard(flow, segment, now, state::CLOSING, state::RESET) & !(state::PROVISIONAL);
    } else {
        return;
    }
    reverse.other = flow.state & CLIENT_BITS;
    flow.last_ns = now;
}

/// Tells the other direction's entry what is known of this one.
#[inline(always)]
fn mirror<K, F: Flows<K>>(flows: &F, other: &K, mask: u32, bits: u32) {
    let other = flows.lookup(other);
    if !other.is_null() {
        // SAFETY: not null, so valid for this decision by the contract of `Flows`.
        unsafe { (*other).other = bits & mask };
    }
}

/// Takes an entry away, both of a translated flow, if the condition still holds. Returns how many
/// entries went.
#[inline(always)]
pub fn forget<K: TupleKey, F: Flows<K>>(flows: &F, wanted: &Forget<K>, protocol: u8) -> u32 {
    let flow = flows.lookup(&wanted.key);
    if flow.is_null() {
        return 0;
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let flow = unsafe { &*flow };
    let silent = wanted.condition == forget::SILENT;
    let holds = if silent {
        flow.last_ns == wanted.last_ns
    } else {
        u32::from(flow.backend) == wanted.backend
    };
    if !holds {
        return 0;
    }
    let mut gone = 1;
    if flow.state & state::NAT != 0 {
        let key: K = opposite(flow, protocol);
        let other = flows.lookup(&key);
        // SAFETY: not null where it is read, so valid by the contract of `Flows`.
        if !other.is_null() && wanted.key.answers(unsafe { &*other }) {
            // SAFETY: as above.
            if silent && unsafe { (*other).last_ns } != wanted.other_ns {
                return 0;
            }
            flows.remove(&key);
            gone = 2;
        }
    }
    flows.remove(&wanted.key);
    gone
}

/// For how long neither direction of a UDP flow has had a packet.
#[inline(always)]
fn udp_silent_ns<K, F: Flows<K>>(flows: &F, flow: &Flow, reverse: &K, now: u64) -> u64 {
    let forward = now.saturating_sub(flow.last_ns);
    if forward <= 1_000_000_000 {
        return 0;
    }
    let reverse = flows.lookup(reverse);
    if reverse.is_null() {
        return forward;
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let reverse = now.saturating_sub(unsafe { (*reverse).last_ns });
    if reverse < forward { reverse } else { forward }
}

/// Brings the entries up to date for a backend's packet on the reverse entry `flow`. `ack` is its
/// acknowledgement number, host order.
#[inline(always)]
pub fn returned<K: TupleKey, F: Pool<K>>(
    flows: &F,
    flow: &mut Flow,
    segment: Segment,
    ack: u32,
    now: u64,
) {
    if segment.protocol != IPPROTO_TCP {
        flow.last_ns = now;
        return;
    }
    if half_open(bits(flow)) {
        cold_path();
        answered::<K, F>(flows, flow, segment, ack, now);
        return;
    }
    let was = bits(flow);
    let becomes = heard(flow, segment, now, state::SERVER_CLOSING, state::SERVER_RESET);
    if flow.state != becomes {
        cold_path();
        flow.state = becomes;
        let forward: K = opposite(flow, segment.protocol);
        mirror(flows, &forward, SERVER_BITS, becomes);
        if !closed(was) && closed(bits(flow)) {
            flows.keep_spare(&forward);
        }
    }
}

/// A packet of the server's on a flow that is half-open. It must answer the client's SYN.
#[inline(always)]
fn answered<K: TupleKey, F: Flows<K>>(
    flows: &F,
    flow: &mut Flow,
    segment: Segment,
    ack: u32,
    now: u64,
) {
    let forward = flows.lookup(&opposite::<K>(flow, segment.protocol));
    if forward.is_null() || segment.tcp_flags & TCP_ACK == 0 {
        return;
    }
    // SAFETY: not null, so valid for this decision by the contract of `Flows`.
    let forward = unsafe { &mut *forward };
    if ack.wrapping_sub(forward.syn_seq).wrapping_sub(1) >= CONFIRM_WINDOW {
        return;
    }
    if segment.tcp_flags & TCP_RST != 0 {
        // Refused.
        flow.state |= state::SERVER_RESET;
    } else if segment.tcp_flags & TCP_SYN != 0 {
        // Each time anew: a server that keeps nothing (SYN cookies) may choose another number.
        flow.syn_seq = segment.seq;
        flow.next_seq = segment.next_seq();
        flow.state = (flow.state & !state::SERVER_RESET) | state::ANSWERED;
    } else {
        // It takes the connection for open, so it is.
        flow.next_seq = segment.seq;
        flow.state = heard(flow, segment, now, state::SERVER_CLOSING, state::SERVER_RESET)
            | state::SERVER_OPEN;
    }
    forward.other = flow.state & SERVER_BITS;
    flow.last_ns = now;
}
