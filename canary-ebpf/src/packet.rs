//! The packet at hand: its bytes and where it came in.

use core::hint::cold_path;

use aya_ebpf::{bindings::xdp_md, helpers::generated::bpf_xdp_load_bytes};
use canary_ebpf_common::{
    abi::Reason,
    headers::{ETH_BYTES, ETHERTYPE_IPV4_BE, Eth, Frame, Ipv4, Ipv6, Tcp, Udp},
    mss,
    quic::{self, Quic},
};

use crate::{
    arrival::TRANSPORT_MASK,
    maps::{self, Program},
};

/// A received frame.
pub(crate) struct Packet {
    start: usize,
    end: usize,
    /// Interface that it came in by.
    pub(crate) ifindex: u32,
    /// What helpers know it by. Whoever has it resized takes a new view of it.
    pub(crate) ctx: *mut xdp_md,
}

impl Packet {
    #[inline(always)]
    pub(crate) fn of(ctx: *mut xdp_md) -> Self {
        // SAFETY: the kernel's own, valid while the program runs.
        let xdp_md { data, data_end, ingress_ifindex, .. } = unsafe { &*ctx };
        Self { start: *data as usize, end: *data_end as usize, ifindex: *ingress_ifindex, ctx }
    }

    /// Where the frame begins and ends: what a function of its own, to which a reference to this
    /// would be one to a place on the stack, makes a view of the frame of.
    #[inline(always)]
    pub(crate) fn bounds(&self) -> (usize, usize) {
        (self.start, self.end)
    }

    /// A view of the frame with these bounds, by which its bytes alone are looked at.
    #[inline(always)]
    pub(crate) fn within(start: usize, end: usize) -> Self {
        Self { start, end, ifindex: 0, ctx: core::ptr::null_mut() }
    }

    /// The way that it came by, which answers go back; 0 where flows can't name it.
    #[inline(always)]
    pub(crate) fn way<const RARE: bool>(&self) -> u32 {
        if RARE { maps::arrival().map_or(0, |arrival| arrival.way) } else { self.ifindex }
    }

    /// Length of the frame in bytes as it came, with its tags.
    #[inline(always)]
    pub(crate) fn arrived_bytes<const RARE: bool>(&self) -> u64 {
        let tags = if RARE { maps::arrival().map_or(0, |arrival| arrival.tag_bytes) } else { 0 };
        self.len_bytes() as u64 + u64::from(tags)
    }

    /// Leaves the packet to another program. Comes back only where there is none.
    #[inline(always)]
    pub(crate) fn go_on(&self, program: Program) -> Result<u32, Reason> {
        maps::tail_call(self.ctx, program);
        Err(Reason::PassOther)
    }

    /// What the UDP datagram in the frame is to QUIC, whose headers' lengths fit.
    #[inline(always)]
    pub(crate) fn quic(&self) -> (Quic, u32) {
        let packed = classify(self.start, self.end);
        (Quic::unpack((packed >> 32) as u8), packed as u32)
    }

    /// The same of the datagram at `offset`.
    #[inline(always)]
    pub(crate) fn quic_at(&self, offset: usize) -> (Quic, u32) {
        let packed = classify_at(self.start, self.end, offset);
        (Quic::unpack((packed >> 32) as u8), packed as u32)
    }

    /// Lowers the MSS that the SYN whose TCP header is at `offset` announces to `most`, if that is
    /// not 0. What can't be found stays as it is.
    #[inline(always)]
    pub(crate) fn clamp(&self, offset: usize, most: u16) {
        if most != 0 {
            _ = lower_mss(self, offset, most);
        }
    }
}

/// `number`, which is from 1 to `mask` + 1, in a form in which the verifier sees that.
#[inline(always)]
pub(crate) fn at_least_one(number: u32, mask: u32) -> u32 {
    bounded(number.wrapping_sub(1), mask) + 1
}

/// `number`, which is at most `mask`, in such a form.
#[inline(always)]
pub(crate) fn bounded(number: u32, mask: u32) -> u32 {
    // Volatile: the compiler must not leave out what it knows to be so.
    // SAFETY: a local variable.
    unsafe { core::ptr::read_volatile(&raw const number) & mask }
}

#[inline(always)]
fn lower_mss(packet: &Packet, offset: usize, most: u16) -> Option<()> {
    let tcp: *mut Tcp = packet.at(offset)?;
    // SAFETY: `at` checked the bounds.
    let bytes = mss::options_bytes(unsafe { (*tcp).data_offset });
    if bytes == 0 {
        return None;
    }
    let count = at_least_one(bytes as u32, 0x3f);
    // SAFETY: this CPU's own room for it, which a quotation needs more of.
    let options = unsafe { &mut *maps::quote()?.as_mut_ptr().cast::<mss::Options>() };
    let (from, to) = (offset + size_of::<Tcp>(), options.as_mut_ptr());
    // SAFETY: there is room for 64 bytes. Kernel 5.18, commit 3f364222d032.
    if unsafe { bpf_xdp_load_bytes(packet.ctx, from as u32, to.cast(), count) } != 0 {
        return None;
    }
    mss::lower(packet, offset, mss::find(options, bytes)?, most)
}

/// A function of its own, which the verifier follows as if it stood where it is called, and which
/// finds the datagram by itself: packets that are none of QUIC's keep nothing at hand for it.
///
/// In the section of all other functions: aya-obj 0.3.0 links functions by their address within
/// their section alone, and takes this one for the callback at the same address.
#[cold]
#[inline(never)]
#[unsafe(link_section = ".text")]
fn classify(start: usize, end: usize) -> u64 {
    let (quic, seq) = datagram(&Packet::within(start, end)).unwrap_or((Quic::Other, 0));
    u64::from(quic as u8) << 32 | u64::from(seq)
}

/// As `classify`, of the datagram at `offset`.
#[cold]
#[inline(never)]
#[unsafe(link_section = ".text")]
fn classify_at(start: usize, end: usize, offset: usize) -> u64 {
    let offset = offset & TRANSPORT_MASK;
    let (quic, seq) = datagram_at(&Packet::within(start, end), offset).unwrap_or((Quic::Other, 0));
    u64::from(quic as u8) << 32 | u64::from(seq)
}

#[inline(always)]
fn datagram(packet: &Packet) -> Option<(Quic, u32)> {
    let eth: *mut Eth = packet.at(0)?;
    // SAFETY: `at` checked the bounds.
    let ip_bytes = match unsafe { (*eth).ethertype_be } {
        ETHERTYPE_IPV4_BE => {
            let ip: *mut Ipv4 = packet.at(ETH_BYTES)?;
            // SAFETY: `at` checked the bounds.
            usize::from(unsafe { (*ip).version_ihl } & 0xf) * 4
        }
        _ => size_of::<Ipv6>(),
    };
    datagram_at(packet, ETH_BYTES + ip_bytes)
}

#[inline(always)]
fn datagram_at(packet: &Packet, offset: usize) -> Option<(Quic, u32)> {
    let udp: *mut Udp = packet.at(offset)?;
    // SAFETY: `at` checked the bounds.
    let length = usize::from(u16::from_be(unsafe { (*udp).length_be }));
    let payload = offset + size_of::<Udp>();
    Some(quic::classify(packet, payload, length.saturating_sub(size_of::<Udp>())))
}

// SAFETY: `at` compares with the end of the frame in the form that the verifier
// follows; after a frame is resized there is a new view of it.
unsafe impl Frame for Packet {
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let pointer = self.start + offset;
        if pointer + size_of::<T>() > self.end {
            cold_path();
            return None;
        }
        Some(pointer as *mut T)
    }

    #[inline(always)]
    fn len_bytes(&self) -> usize {
        self.end - self.start
    }
}
