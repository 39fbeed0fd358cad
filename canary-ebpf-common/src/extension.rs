//! IPv6 extension headers: from the first of them to the transport header.
//!
//! They are walked within a bound. What lies behind a header that is not known, behind too many,
//! or behind one that says that the packet has not reached its last destination can't be steered.

use crate::{
    abi::{IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP},
    headers::Frame,
};

/// Hop-by-hop options (RFC 8200, 4.3).
pub const HOP_BY_HOP: u8 = 0;
/// Routing (RFC 8200, 4.4).
pub const ROUTING: u8 = 43;
/// Fragment (RFC 8200, 4.5).
pub const FRAGMENT: u8 = 44;
/// Authentication (RFC 4302, 2).
pub const AUTHENTICATION: u8 = 51;
/// Destination options (RFC 8200, 4.6).
pub const DESTINATION: u8 = 60;

/// Most headers that are walked: more than any order that RFC 8200, 4.1 recommends has.
pub const MOST_HEADERS: u32 = 8;
/// Most bytes of all of them together.
pub const MOST_BYTES: usize = 512;

/// The fragment header (RFC 8200, 4.5).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Fragment {
    /// What follows, in the whole packet.
    pub next_header: u8,
    /// Zero.
    pub reserved: u8,
    /// Offset in units of eight bytes, two bits of zero, and whether more follow.
    pub offset_more_be: u16,
    /// Identification.
    pub id_be: u32,
}

impl Fragment {
    /// The bits of the offset.
    pub const OFFSET_MASK_BE: u16 = 0xfff8_u16.to_be();
    /// The bit that says that more fragments follow.
    pub const MORE_BE: u16 = 1_u16.to_be();
}

/// Where the headers lead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transport {
    /// What is there: TCP, UDP or ICMPv6.
    pub protocol: u8,
    /// Where, in bytes from the start of the frame. In a later fragment its payload is there.
    pub offset: usize,
    /// Where the fragment header is; 0 where there is none. An atomic fragment (RFC 6946) has
    /// none: it is a whole packet.
    pub fragment: usize,
}

/// Why they lead nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stray {
    /// To something that is not steered, or can't be seen.
    Unknown,
    /// Beyond the end of the frame.
    Short,
}

/// Walks the headers from the one of type `first` at `start`.
///
/// Before each header `forget` gets where the walk has come and gives it back: in the program, by
/// way of a map, so that the verifier knows no more of it than its type and does not follow each
/// walk that there can be to its end.
///
/// # Errors
/// [`Stray`] where no transport header can be found.
#[inline(always)]
pub fn walk<F: Frame>(
    frame: &F,
    start: usize,
    first: u8,
    mut forget: impl FnMut(Transport) -> Transport,
) -> Result<Transport, Stray> {
    let mut at = Transport { protocol: first, offset: start, fragment: 0 };
    let mut left = MOST_HEADERS;
    while left > 0 {
        left -= 1;
        at = forget(at);
        let protocol = at.protocol;
        if matches!(protocol, IPPROTO_TCP | IPPROTO_UDP | IPPROTO_ICMPV6) {
            return Ok(at);
        }
        // All of them have eight bytes at least.
        let header: *mut [u8; 8] = frame.at(at.offset).ok_or(Stray::Short)?;
        // SAFETY: `at` checked the bounds.
        let [next, length, offset_high, offset_low, ..] = unsafe { *header };
        match protocol {
            // A second one makes no sense.
            FRAGMENT if at.fragment == 0 => {
                let rest_be = u16::from_ne_bytes([offset_high, offset_low])
                    & (Fragment::OFFSET_MASK_BE | Fragment::MORE_BE);
                if rest_be != 0 {
                    at.fragment = at.offset;
                }
                at.protocol = next;
                at.offset += size_of::<Fragment>();
                if rest_be & Fragment::OFFSET_MASK_BE != 0 {
                    return Ok(at);
                }
            }
            HOP_BY_HOP | ROUTING | DESTINATION | AUTHENTICATION => {
                // Hop-by-hop options stand first or nowhere (RFC 8200, 4.1).
                if protocol == HOP_BY_HOP && at.offset != start {
                    return Err(Stray::Unknown);
                }
                // The segments that are left.
                if protocol == ROUTING && offset_low != 0 {
                    return Err(Stray::Unknown);
                }
                // In units of eight bytes without the first, or of four without the first two.
                at.offset += if protocol == AUTHENTICATION {
                    (usize::from(length) + 2) * 4
                } else {
                    (usize::from(length) + 1) * 8
                };
                at.protocol = next;
            }
            _ => return Err(Stray::Unknown),
        }
        if at.offset - start > MOST_BYTES {
            return Err(Stray::Unknown);
        }
    }
    Err(Stray::Unknown)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::headers::Bytes;

    proptest! {
        /// Whatever the bytes are, the walk ends within them.
        #[test]
        fn walks_end_within_their_bounds(
            bytes in proptest::collection::vec(
                prop_oneof![any::<u8>(), Just(0), Just(1), Just(44), Just(43), Just(60), Just(6)],
                0..700,
            ),
            first in prop_oneof![Just(0_u8), Just(43), Just(44), Just(51), Just(60), any::<u8>()],
        ) {
            let frame = Bytes(bytes);
            if let Ok(found) = walk(&frame, 54, first, |at| at) {
                prop_assert!(found.offset <= 54 + MOST_BYTES + 8);
                prop_assert!(found.fragment <= 54 + MOST_BYTES);
            }
        }
    }
}
