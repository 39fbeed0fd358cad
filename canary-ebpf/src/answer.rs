//! Telling a packet's sender why it got no further.

use aya_ebpf::{
    helpers::generated::{
        bpf_csum_diff, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_load_bytes,
    },
    macros::xdp,
    programs::XdpContext,
};
use canary_ebpf_common::{
    abi::{IPPROTO_ICMP, IPPROTO_ICMPV6, Reason},
    answer::{QUOTED_V4, QUOTED_V6, Trouble, answerable_v4, answerable_v6, may_answer},
    checksum,
    headers::{ETH_BYTES, Eth, Frame as _, Icmp, Ipv4, Ipv6},
    tunnel::OUTER_TTL,
};

use crate::{
    forward,
    maps::{self, Program},
    packet::{Packet, at_least_one, bounded},
    vlan,
};

/// The bytes that an error quotes, in words for its checksum, and room for what the verifier takes
/// their number for.
pub(crate) type Quote = [u64; 257];

/// DSCP of what keeps the network going (RFC 1812, 4.3.2.5).
const INTERNETWORK_CONTROL: u8 = 0xc0;

/// Leaves the frame, of which all is noted that came with it, to a program that turns it into an
/// error to its sender, in the name of its destination.
#[inline(always)]
pub(crate) fn answer(packet: &Packet, v6: bool, trouble: Trouble, mtu: u16) -> Result<u32, Reason> {
    let arrival = maps::arrival().ok_or(UNTOLD)?;
    arrival.wrapping = u32::from(mtu) | (trouble as u32) << 16 | u32::from(v6) << 17;
    maps::tail_call(packet.ctx, Program::Tell);
    Err(UNTOLD)
}

/// The same where the packet's TTL or hop limit is over.
#[inline(always)]
pub(crate) fn expired<const RARE: bool>(packet: &Packet, v6: bool) -> Result<u32, Reason> {
    if !RARE && let Some(arrival) = maps::arrival() {
        arrival.forget();
    }
    answer(packet, v6, Trouble::Expired, 0)
}

/// Tells a packet's sender why it got no further.
#[xdp]
#[inline(always)]
pub(crate) fn tell(ctx: XdpContext) -> u32 {
    let Some(arrival) = maps::arrival() else { return maps::count(UNTOLD) };
    let what = arrival.wrapping;
    let (mtu, expired) = (what as u16, what & 1 << 16 != 0);
    let (told, not_told) = match expired {
        true => (Reason::AnswerTtlExpired, Reason::DropTtlExpired),
        false => (Reason::AnswerTooBig, Reason::DropTooBig),
    };
    let packet = Packet::of(ctx.ctx);
    let said = match what & 1 << 17 != 0 {
        true => try_tell_v6(&packet, expired, mtu),
        false => try_tell_v4(&packet, expired, mtu),
    };
    let said = said.and_then(|()| vlan::restore(ctx.ctx, arrival).ok_or(Reason::DropNoHeadroom));
    maps::count(match said {
        Ok(()) => told,
        Err(Reason::DropNoHeadroom) => Reason::DropNoHeadroom,
        Err(_) => not_told,
    })
}

/// What could not be told, whatever the reason.
const UNTOLD: Reason = Reason::DropTooBig;

#[inline(always)]
fn try_tell_v4(packet: &Packet, expired: bool, mtu: u16) -> Result<(), Reason> {
    const BYTES: usize = size_of::<Ipv4>() + size_of::<Icmp>();
    let ip: *mut Ipv4 = packet.at(ETH_BYTES).ok_or(UNTOLD)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    // Nor about a fragment that is not the first (RFC 1122, 3.2.2).
    if ip.fragment_be & Ipv4::OFFSET_MASK_BE != 0 || !answerable_v4(ip.src_be) {
        return Err(UNTOLD);
    }
    let total_bytes = u32::from(u16::from_be(ip.total_length_be));
    let quoted = if total_bytes < QUOTED_V4 { total_bytes } else { QUOTED_V4 };
    let sum = quote(packet, quoted)?;
    let packet = replaced(packet, BYTES, quoted)?;
    let (kind, code) = if expired { (11, 0) } else { (3, 4) };
    put_icmp(&packet, ETH_BYTES + size_of::<Ipv4>(), [kind, code], mtu, u64::from(sum))?;
    let quoted_ip: *mut Ipv4 = packet.at(ETH_BYTES + BYTES).ok_or(UNTOLD)?;
    let ip: *mut Ipv4 = packet.at(ETH_BYTES).ok_or(UNTOLD)?;
    // SAFETY: `at` checked the bounds; the two lie apart.
    let (ip, quoted_ip) = unsafe { (&mut *ip, &*quoted_ip) };
    ip.version_ihl = 0x45;
    ip.tos = INTERNETWORK_CONTROL;
    ip.total_length_be = (BYTES as u16 + quoted as u16).to_be();
    ip.id_be = 0;
    ip.fragment_be = Ipv4::DF_BE;
    ip.ttl_protocol = [OUTER_TTL, IPPROTO_ICMP];
    ip.checksum = 0;
    ip.src_be = quoted_ip.dst_be;
    ip.dst_be = quoted_ip.src_be;
    ip.checksum = checksum::of(ip.sum());
    Ok(())
}

#[inline(always)]
fn try_tell_v6(packet: &Packet, expired: bool, mtu: u16) -> Result<(), Reason> {
    const BYTES: usize = size_of::<Ipv6>() + size_of::<Icmp>();
    let ip: *mut Ipv6 = packet.at(ETH_BYTES).ok_or(UNTOLD)?;
    // SAFETY: `at` checked the bounds.
    let ip = unsafe { &*ip };
    if !answerable_v6([ip.src[0], ip.src[1]]) {
        return Err(UNTOLD);
    }
    let total_bytes = u32::from(u16::from_be(ip.payload_length_be)) + size_of::<Ipv6>() as u32;
    let quoted = if total_bytes < QUOTED_V6 { total_bytes } else { QUOTED_V6 };
    let sum = quote(packet, quoted)?;
    let packet = replaced(packet, BYTES, quoted)?;
    let quoted_ip: *mut Ipv6 = packet.at(ETH_BYTES + BYTES).ok_or(UNTOLD)?;
    let ip: *mut Ipv6 = packet.at(ETH_BYTES).ok_or(UNTOLD)?;
    // SAFETY: `at` checked the bounds; the two lie apart.
    let (ip, quoted_ip) = unsafe { (&mut *ip, &*quoted_ip) };
    let payload = size_of::<Icmp>() as u16 + quoted as u16;
    ip.version_class_flow_be = (6 << 28 | u32::from(INTERNETWORK_CONTROL) << 20).to_be();
    ip.payload_length_be = payload.to_be();
    ip.next_header = IPPROTO_ICMPV6;
    ip.hop_limit = OUTER_TTL;
    ip.src = [quoted_ip.dst[0], quoted_ip.dst[1]];
    ip.dst = [quoted_ip.src[0], quoted_ip.src[1]];
    // With the pseudo-header (RFC 8200, 8.1).
    let sum = u64::from(sum)
        + checksum::address([ip.src[0], ip.src[1]])
        + checksum::address([ip.dst[0], ip.dst[1]])
        + u64::from(payload.to_be())
        + u64::from(u16::from(IPPROTO_ICMPV6).to_be());
    let kind = if expired { 3 } else { 2 };
    put_icmp(&packet, ETH_BYTES + size_of::<Ipv6>(), [kind, 0], mtu, sum)
}

/// Writes the ICMP header at `offset`, `sum` being that over all else that its checksum covers.
#[inline(always)]
fn put_icmp(
    packet: &Packet,
    offset: usize,
    [kind, code]: [u8; 2],
    mtu: u16,
    sum: u64,
) -> Result<(), Reason> {
    let icmp: *mut Icmp = packet.at(offset).ok_or(UNTOLD)?;
    // SAFETY: `at` checked the bounds.
    let icmp = unsafe { &mut *icmp };
    (icmp.kind, icmp.code, icmp.checksum) = (kind, code, 0);
    icmp.rest_be = [0, mtu.to_be()];
    icmp.checksum = checksum::of(sum + icmp.sum());
    Ok(())
}

/// The sum over the first `bytes` of the packet, if there may be one more error now.
#[inline(always)]
fn quote(packet: &Packet, bytes: u32) -> Result<u32, Reason> {
    let words = maps::quote().ok_or(UNTOLD)?.as_mut_ptr();
    if bytes == 0
        || bytes > QUOTED_V6
        || !may_answer(maps::next_answer_ns().ok_or(UNTOLD)?, maps::now_ns())
    {
        return Err(UNTOLD);
    }
    let count = at_least_one(bytes, 0x7ff);
    // SAFETY: as many bytes as there is room for at most. Kernel 5.18, commit 3f364222d032.
    if unsafe { bpf_xdp_load_bytes(packet.ctx, ETH_BYTES as u32, words.cast(), count) } != 0 {
        return Err(UNTOLD);
    }
    // What is left of the last word counts as zero.
    // SAFETY: there is room behind the longest that could be.
    unsafe { words.cast::<u8>().add(count as usize).cast::<u32>().write_unaligned(0) };
    // The helper takes 512 bytes at a time, before kernel 6.13.
    let mut sum = 0;
    for part in 0..3 {
        let left = (bytes + 3 & !3).saturating_sub(part * 512);
        let length = bounded(if left < 512 { left } else { 512 }, 0x3ff);
        // SAFETY: not beyond the bytes that were loaded, and those up to the end of their word.
        sum = unsafe {
            let from = words.cast::<u32>().add(part as usize * 128);
            bpf_csum_diff(core::ptr::null_mut(), 0, from, length, sum as u32)
        };
    }
    Ok(sum as u32)
}

/// The frame with `bytes` of room between its Ethernet header, whose addresses have changed
/// places, and the first `quoted` of the packet; nothing is behind them.
#[inline(always)]
fn replaced(packet: &Packet, bytes: usize, quoted: u32) -> Result<Packet, Reason> {
    let ctx = packet.ctx;
    let cut = ETH_BYTES as i32 + quoted as i32 - packet.len_bytes() as i32;
    // SAFETY: `ctx` is this program's own; pointers into the frame are not used any more.
    if unsafe { bpf_xdp_adjust_head(ctx, -(bytes as i32)) } != 0 {
        return Err(Reason::DropNoHeadroom);
    }
    // SAFETY: as above.
    if unsafe { bpf_xdp_adjust_tail(ctx, cut) } != 0 {
        return Err(UNTOLD);
    }
    let packet = Packet::of(ctx);
    let old: *mut Eth = packet.at(bytes).ok_or(UNTOLD)?;
    let new: *mut [u32; 3] = packet.at(0).ok_or(UNTOLD)?;
    let eth: *mut Eth = packet.at(0).ok_or(UNTOLD)?;
    // SAFETY: `at` checked the bounds; old and new header lie apart.
    unsafe {
        let [a, b, c] = *old.cast::<[u32; 3]>();
        *new = forward::swapped([a, b, c]);
        (*eth).ethertype_be = (*old).ethertype_be;
    }
    Ok(packet)
}
