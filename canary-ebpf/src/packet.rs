//! The packet at hand: its bytes and where it came in.

use aya_ebpf::programs::XdpContext;
use canary_ebpf_common::headers::Frame;

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
