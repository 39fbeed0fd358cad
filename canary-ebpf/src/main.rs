//! The XDP programs of canary-xdp.
//!
//! `ingress` is attached to each of the agent's interfaces. It parses a packet,
//! finds its service, hashes it into a bucket, reads one entry and forwards.
//! What is decided lives in `canary-ebpf-common`; here are the maps, the
//! packet's bytes and the way out.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod answer;
mod arrival;
mod forget;
mod forward;
mod fragment;
mod icmp;
mod ipv4;
mod ipv6;
mod maps;
mod packet;
mod route;
mod signals;
mod tunnel;
mod vlan;

use core::hint::cold_path;

use aya_ebpf::{macros::xdp, programs::XdpContext};
use canary_ebpf_common::{
    abi::Reason,
    headers::{ETHERTYPE_IPV4_BE, ETHERTYPE_IPV6_BE, Eth, Frame as _},
};

use crate::{maps::Program, packet::Packet};

/// Steers what belongs to a service and passes everything else untouched.
#[xdp]
#[inline(always)]
pub(crate) fn ingress(ctx: XdpContext) -> u32 {
    let packet = Packet::of(ctx.ctx);
    match try_ingress(&packet) {
        Ok(action) => action,
        Err(reason) => maps::count(reason),
    }
}

#[inline(always)]
fn try_ingress(packet: &Packet) -> Result<u32, Reason> {
    let eth: *mut Eth = packet.at(0).ok_or(Reason::PassOther)?;
    // SAFETY: `at` checked the bounds.
    let ethertype_be = unsafe { (*eth).ethertype_be };
    if !maps::at_first_sight(packet) {
        cold_path();
        return packet.go_on(Program::Arrival);
    }
    match ethertype_be {
        ETHERTYPE_IPV4_BE => ipv4::ingress::<false>(packet),
        ETHERTYPE_IPV6_BE => ipv6::ingress::<false>(packet),
        _ => {
            cold_path();
            packet.go_on(Program::Arrival)
        }
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
