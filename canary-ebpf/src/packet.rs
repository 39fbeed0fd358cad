//! The packet at hand: its bytes and where it came in.

use aya_ebpf::programs::XdpContext;
use canary_ebpf_common::{
    headers::{ETH_BYTES, ETHERTYPE_IPV4_BE, Eth, Frame, Ipv4, Ipv6, Udp},
    quic::{self, Quic},
};

/// A received frame.
pub(crate) struct Packet {
    start: usize,
    end: usize,
    /// Interface that it came in by.
    pub(crate) ifindex: u32,
}

impl Packet {
    #[inline(always)]
    pub(crate) fn new(ctx: &XdpContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end(), ifindex: ctx.ingress_ifindex() as u32 }
    }

    /// What the UDP datagram in the frame is to QUIC, whose headers' lengths fit.
    #[inline(always)]
    pub(crate) fn quic(&self) -> (Quic, u32) {
        let packed = classify(self.start, self.end);
        (Quic::unpack((packed >> 32) as u8), packed as u32)
    }
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
    let packet = Packet { start, end, ifindex: 0 };
    let (quic, seq) = datagram(&packet).unwrap_or((Quic::Other, 0));
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
    let udp: *mut Udp = packet.at(ETH_BYTES + ip_bytes)?;
    // SAFETY: `at` checked the bounds.
    let length = usize::from(u16::from_be(unsafe { (*udp).length_be }));
    let payload = ETH_BYTES + ip_bytes + size_of::<Udp>();
    Some(quic::classify(packet, payload, length.saturating_sub(size_of::<Udp>())))
}

// SAFETY: `at` compares with the end of the frame in the form that the verifier
// follows; the program does not resize frames.
unsafe impl Frame for Packet {
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
