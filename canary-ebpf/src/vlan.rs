//! VLAN tags: off the frame when it comes in, back on it when it goes.
//!
//! The rest of the program knows no tags. A frame that passes gets back what it had, bit for bit;
//! one that is sent gets those of the way that it takes.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    helpers::generated::bpf_xdp_adjust_head,
    macros::xdp,
    programs::XdpContext,
};
use canary_ebpf_common::{
    abi::{Reason, fragment as flags, vlan},
    entry::BackendIndex,
    headers::{ETH_BYTES, ETHERTYPE_QINQ_BE, ETHERTYPE_VLAN_BE, Eth, Frame as _, Tag, is_tag},
};

use crate::{
    arrival::{Arrival, TRANSPORT_MASK},
    forward::Way,
    fragment,
    maps::{self, Program},
    packet::Packet,
    signals,
};

/// Bytes of one tag.
const TAG_BYTES: u32 = size_of::<Tag>() as u32;
/// Where tags begin: behind the MAC addresses.
const TAGS_AT: usize = 12;

/// The type of what is behind the frame's tags, of which there are one or two.
#[inline(always)]
pub(crate) fn read(packet: &Packet, arrival: &mut Arrival) -> Result<u16, Reason> {
    let outer: *mut [u32; 1] = packet.at(TAGS_AT).ok_or(Reason::PassOther)?;
    let tag: *mut Tag = packet.at(ETH_BYTES).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let (first, tag) = unsafe { ((*outer)[0], *tag) };
    let service_tag = first as u16 == ETHERTYPE_QINQ_BE;
    let id = |tci_be: u16| u16::from_be(tci_be) & vlan::ID_MASK;
    if !is_tag(tag.ethertype_be) {
        arrival.tags = u64::from(first);
        arrival.tag_bytes = TAG_BYTES;
        arrival.vlan = vlan::word(id(tag.tci_be), 0, service_tag);
        return Ok(tag.ethertype_be);
    }
    let inner: *mut Tag = packet.at(ETH_BYTES + TAG_BYTES as usize).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let inner = unsafe { *inner };
    if is_tag(inner.ethertype_be) {
        return Err(Reason::PassTags);
    }
    let second = u64::from(tag.ethertype_be) | u64::from(inner.tci_be) << 16;
    arrival.tags = u64::from(first) | second << 32;
    arrival.tag_bytes = 2 * TAG_BYTES;
    arrival.vlan = vlan::word(id(tag.tci_be), id(inner.tci_be), service_tag);
    Ok(inner.ethertype_be)
}

/// Takes the tags that `read` found off the frame.
#[inline(always)]
pub(crate) fn pop(packet: &Packet, bytes: u32) -> Option<()> {
    let from: *mut [u32; 3] = packet.at(0)?;
    let at = if bytes == TAG_BYTES { TAG_BYTES } else { 2 * TAG_BYTES };
    let to: *mut [u32; 3] = packet.at(at as usize)?;
    // SAFETY: `at` checked the bounds; all is read before any is written.
    unsafe {
        let [a, b, c] = *from;
        *to = [a, b, c];
    }
    // SAFETY: the context that the program was called with.
    (unsafe { bpf_xdp_adjust_head(packet.ctx, at as i32) } == 0).then_some(())
}

/// The tags, as they stand in the frame, that `word` asks for, and how many bytes they are. They
/// are kept as they came where the VLANs are the same; the priority of the outer one is kept in
/// any case.
#[inline(always)]
fn wanted(word: u32, arrival: &Arrival) -> (u64, u32) {
    if word == arrival.vlan {
        return (arrival.tags, arrival.tag_bytes);
    }
    if word == 0 {
        return (0, 0);
    }
    let priority = u16::from_be((arrival.tags >> 16) as u16) & !vlan::ID_MASK;
    let tci = |id: u16| u64::from((priority | id).to_be()) << 16;
    let protocol =
        if word & vlan::SERVICE_TAG != 0 { ETHERTYPE_QINQ_BE } else { ETHERTYPE_VLAN_BE };
    let outer = u64::from(protocol) | tci(vlan::outer(word));
    if vlan::inner(word) == 0 {
        return (outer, TAG_BYTES);
    }
    (outer | (u64::from(ETHERTYPE_VLAN_BE) | tci(vlan::inner(word))) << 32, 2 * TAG_BYTES)
}

/// Leaves the frame to a program that keeps its way if it is a first fragment, lowers a SYN's MSS,
/// gives it its tags and sends it: few frames need that, and it would have to be verified wherever one is sent.
#[inline(always)]
pub(crate) fn send<const RARE: bool>(packet: &Packet, way: Way<'_>) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::DropNoInterface)?;
    if !RARE {
        arrival.forget();
        arrival.header = way.clamp;
    }
    arrival.route.vlan = way.vlan;
    arrival.route.ifindex = way.ifindex;
    arrival.route.backend = way.backend.get();
    arrival.route.flags = if way.returned { flags::RETURNED } else { 0 };
    signals::go_on_before_tags(packet);
    maps::tail_call(packet.ctx, Program::Tag);
    Err(Reason::DropNoInterface)
}

/// Gives a frame its MSS and its tags and sends it.
#[xdp]
#[inline(always)]
pub(crate) fn tag(ctx: XdpContext) -> u32 {
    match try_tag(ctx.ctx) {
        Ok(action) => action,
        Err(reason) => maps::count(reason),
    }
}

#[inline(always)]
fn try_tag(ctx: *mut xdp_md) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(Reason::DropNoInterface)?;
    if arrival.header != 0
        && let Some(backend) = maps::backend(BackendIndex::new(arrival.route.backend))
    {
        Packet::of(ctx).clamp(arrival.header as usize & TRANSPORT_MASK, backend.mss);
    }
    fragment::keep(&Packet::of(ctx), arrival).ok_or(Reason::DropMalformed)?;
    let (vlan, ifindex) = (arrival.route.vlan, arrival.route.ifindex);
    let (tags, bytes) = if vlan == 0 { (0, 0) } else { wanted(vlan, arrival) };
    if bytes != 0 && push(ctx, tags, bytes) != 0 {
        return Err(Reason::DropNoInterface);
    }
    if ifindex == Packet::of(ctx).ifindex {
        return Ok(xdp_action::XDP_TX);
    }
    maps::redirect(ifindex)
}

/// Gives the frame back what it came with.
#[inline(always)]
pub(crate) fn restore(ctx: *mut xdp_md, arrival: &Arrival) -> Option<()> {
    if arrival.tag_bytes == 0 {
        return Some(());
    }
    (push(ctx, arrival.tags, arrival.tag_bytes) == 0).then_some(())
}

/// Puts `bytes` bytes of `tags` behind the MAC addresses. Answers 0 if it could.
///
/// A function of its own: frames without tags keep nothing at hand for it. For the section see
/// `packet::classify`.
#[cold]
#[inline(never)]
#[unsafe(link_section = ".text")]
fn push(ctx: *mut xdp_md, tags: u64, bytes: u32) -> u64 {
    let at = if bytes == TAG_BYTES { TAG_BYTES } else { 2 * TAG_BYTES };
    // SAFETY: the context that the program was called with.
    if unsafe { bpf_xdp_adjust_head(ctx, -(at as i32)) } != 0 {
        return 1;
    }
    let packet = Packet::of(ctx);
    // No more than there is in the shortest frame.
    let (Some(to), Some(from)) = (packet.at::<[u32; 4]>(0), packet.at::<[u32; 3]>(at as usize))
    else {
        return 1;
    };
    // SAFETY: `at` checked the bounds; all is read before any is written.
    unsafe {
        let [a, b, c] = *from;
        *to = [a, b, c, tags as u32];
    }
    if at != TAG_BYTES {
        let Some(inner) = packet.at::<[u32; 1]>(size_of::<[u32; 4]>()) else { return 1 };
        // SAFETY: as above.
        unsafe { *inner = [(tags >> 32) as u32] };
    }
    0
}

const _: () = assert!(TAGS_AT + 2 == size_of::<Eth>());
