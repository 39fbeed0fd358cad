//! The program for backends: takes packets for them out of those that the balancer wrapped.
//!
//! An object of its own: a backend has none of the balancer's maps. What is unwrapped goes to the
//! host's network stack as if it had come so.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action,
    helpers::generated::bpf_xdp_adjust_head,
    macros::{map, xdp},
    maps::{HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
    programs::XdpContext,
};
use canary_ebpf_common::{
    decap::{self, MAX_TAGS, OUTCOME_SLOTS, Outcome, Own, Settings, Wrapped},
    headers::{ETHERTYPE_IPV4_BE, ETHERTYPE_IPV6_BE, Eth, Frame, Tag},
};

/// Addresses that wrapped packets are taken at.
#[map]
static DECAP_ADDRESSES: HashMap<Own, u32> = HashMap::with_max_entries(decap::MAX_ADDRESSES, 0);
/// Networks that they are taken from: the family, then the address.
#[map]
static DECAP_SENDERS: LpmTrie<Own, u32> = LpmTrie::with_max_entries(decap::MAX_SENDERS, 0);
/// Packets by [`Outcome`].
#[map]
static DECAP_COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(OUTCOME_SLOTS, 0);

/// Whether `DECAP_SENDERS` says who may send; otherwise everybody may.
#[unsafe(no_mangle)]
static DECAP_SENDERS_SET: u32 = 0;
/// The port that packets in UDP come to.
#[unsafe(no_mangle)]
static DECAP_GUE_PORT: u16 = 0;

/// Bits of a key of `DECAP_SENDERS`.
const KEY_BITS: u32 = size_of::<Own>() as u32 * 8;

struct Told;

impl Settings for Told {
    #[inline(always)]
    fn is_own(&self, key: &Own) -> bool {
        DECAP_ADDRESSES.get_ptr(key).is_some()
    }

    #[inline(always)]
    fn may_send(&self, key: &Own) -> bool {
        // Volatile: the compiler must not take the value above for the loader's.
        // SAFETY: an initialised static.
        let set = unsafe { core::ptr::read_volatile(&raw const DECAP_SENDERS_SET) } != 0;
        !set || DECAP_SENDERS.get(Key::new(KEY_BITS, *key)).is_some()
    }

    #[inline(always)]
    fn gue_port_be(&self) -> u16 {
        // SAFETY: an initialised static; volatile as above.
        unsafe { core::ptr::read_volatile(&raw const DECAP_GUE_PORT) }.to_be()
    }
}

/// A received frame.
struct Received {
    start: usize,
    end: usize,
}

impl Received {
    #[inline(always)]
    fn new(ctx: &XdpContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end() }
    }
}

// SAFETY: `at` compares with the end of the frame in the form that the verifier follows; after
// the frame is resized there is a new view of it.
unsafe impl Frame for Received {
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let pointer = self.start + offset;
        if pointer + size_of::<T>() > self.end {
            return None;
        }
        Some(pointer as *mut T)
    }

    #[inline(always)]
    fn len_bytes(&self) -> usize {
        self.end - self.start
    }
}

/// Unwraps what is wrapped for this host, and passes everything else untouched.
#[xdp]
pub(crate) fn decap(ctx: XdpContext) -> u32 {
    let outcome = match decap::find(&Received::new(&ctx), &Told) {
        Ok(wrapped) => match unwrap(&ctx, &wrapped) {
            Some(()) => wrapped.outcome,
            None => Outcome::DropRefused,
        },
        Err(left) => match left {
            None => return xdp_action::XDP_PASS,
            Some(outcome) => outcome,
        },
    };
    if let Some(counter) = DECAP_COUNTERS.get_ptr_mut(outcome as u32) {
        // SAFETY: this CPU's own element, and XDP does not nest.
        unsafe { *counter += 1 };
    }
    match outcome {
        Outcome::DropCongestion | Outcome::DropRefused => xdp_action::XDP_DROP,
        _ => xdp_action::XDP_PASS,
    }
}

/// Takes the outer headers away: what is before them moves up to the packet.
#[inline(always)]
fn unwrap(ctx: &XdpContext, wrapped: &Wrapped) -> Option<()> {
    let frame = Received::new(ctx);
    let eth: *mut [u32; 3] = frame.at(0)?;
    // SAFETY: `at` checked the bounds.
    let addresses = unsafe { [(*eth)[0], (*eth)[1], (*eth)[2]] };
    // A tag with the EtherType before it, in one word.
    let mut tags = [0_u32; MAX_TAGS];
    let mut n = 0;
    while n < MAX_TAGS && n < wrapped.tags {
        let tag: *mut u32 = frame.at(TAGS_OFFSET + n * size_of::<Tag>())?;
        // SAFETY: `at` checked the bounds.
        tags[n] = unsafe { *tag };
        n += 1;
    }
    // SAFETY: `ctx` is this program's own; pointers into the frame are not used any more.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, wrapped.outer_bytes as i32) } != 0 {
        return None;
    }
    let frame = Received::new(ctx);
    let eth: *mut [u32; 3] = frame.at(0)?;
    // SAFETY: `at` checked the bounds.
    unsafe { *eth = addresses };
    let mut n = 0;
    while n < MAX_TAGS && n < wrapped.tags {
        let tag: *mut u32 = frame.at(TAGS_OFFSET + n * size_of::<Tag>())?;
        // SAFETY: `at` checked the bounds.
        unsafe { *tag = tags[n] };
        n += 1;
    }
    let ethertype: *mut u16 = frame.at(TAGS_OFFSET + n * size_of::<Tag>())?;
    // SAFETY: `at` checked the bounds.
    unsafe { *ethertype = if wrapped.v6 { ETHERTYPE_IPV6_BE } else { ETHERTYPE_IPV4_BE } };
    Some(())
}

/// Where tags begin: behind the addresses.
const TAGS_OFFSET: usize = core::mem::offset_of!(Eth, ethertype_be);

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
