//! QUIC as it looks from outside: what a client's datagram says of its connection.
//!
//! Nearly all of QUIC is encrypted. What is left is the long header, which the
//! handshake alone uses (RFC 9000, 17.2; RFC 9369, 3.2), and that a short one is
//! not long. Only the first packet of a datagram is looked at, and behind an
//! Initial the second one: a sender puts packets of the handshake in that order
//! (RFC 9000, 12.2).
//!
//! The fixed bit does not count: endpoints that have agreed on it send either
//! value, a client with a token from an earlier connection even in its Initial
//! packets (RFC 9287, 3.1).

use crate::headers::Frame;

/// Versions whose packet types are known, host order: RFC 9000, 15; RFC 9369, 3.1.
const VERSION_1: u32 = 1;
const VERSION_2: u32 = 0x6b33_43cf;

/// Least payload of a datagram with an Initial packet: servers discard those in shorter ones
/// (RFC 9000, 14.1).
pub const INITIAL_DATAGRAM_BYTES: usize = 1200;
/// Least length of the connection ID that a client chooses for its server (RFC 9000, 7.2).
const FIRST_DCID_BYTES: usize = 8;
/// Greatest length of a connection ID in the versions known (RFC 9000, 17.2).
const CID_BYTES: usize = 20;
/// Least length of a packet with a short header: without a connection ID, packet number and
/// payload reach four bytes before the sample of sixteen that protects the header
/// (RFC 9001, 5.4.2).
const SHORT_PACKET_BYTES: usize = 21;
/// The bit of the first byte that makes a header a long one (RFC 8999, 5).
const LONG: u8 = 0x80;

/// What a client's datagram is to a QUIC service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Quic {
    /// Not QUIC: it is steered as any other datagram.
    #[default]
    Other,
    /// An Initial packet that can be a connection's first: it opens one, unless the tuple
    /// has one.
    Initial,
    /// A Handshake packet, alone or behind an Initial: the client has heard from its server,
    /// and sends no Initial packet any more (RFC 9001, 4.9.1).
    Handshake,
    /// Another long header: 0-RTT; an Initial that can't be a connection's first; a version that
    /// is not known, which a server answers with those that it knows (RFC 9000, 6.1).
    Long,
    /// A short header: the connection is open.
    Short,
}

impl Quic {
    /// The kind with this number.
    #[inline(always)]
    pub const fn unpack(number: u8) -> Self {
        match number {
            1 => Self::Initial,
            2 => Self::Handshake,
            3 => Self::Long,
            4 => Self::Short,
            _ => Self::Other,
        }
    }
}

/// The first bytes of a long header (RFC 8999, 5.1), as far as each lies at one place.
#[derive(Clone, Copy)]
#[repr(C)]
struct LongHeader {
    first: u8,
    version: [u8; 4],
    dcid_bytes: u8,
}

/// Types of packets, as version 1 numbers them.
const INITIAL: u8 = 0;
const HANDSHAKE: u8 = 2;
const RETRY: u8 = 3;

/// What the datagram is whose `payload_bytes` begin `payload` bytes into `frame`, and for
/// [`Quic::Initial`] a number that follows from its destination connection ID.
#[inline(always)]
pub fn classify<F: Frame>(frame: &F, payload: usize, payload_bytes: usize) -> (Quic, u32) {
    if payload_bytes < SHORT_PACKET_BYTES {
        return (Quic::Other, 0);
    }
    let Some(header) = frame.at::<LongHeader>(payload) else { return (Quic::Other, 0) };
    // SAFETY: `at` checked the bounds.
    let header = unsafe { &*header };
    if header.first & LONG == 0 {
        return (Quic::Short, 0);
    }
    let Some(kind) = kind(header) else { return (Quic::Long, 0) };
    let dcid_bytes = usize::from(header.dcid_bytes);
    // Clients send no Retry.
    if kind == RETRY || dcid_bytes > CID_BYTES {
        return (Quic::Other, 0);
    }
    if kind == HANDSHAKE {
        return (Quic::Handshake, 0);
    }
    if kind != INITIAL || payload_bytes < INITIAL_DATAGRAM_BYTES || dcid_bytes < FIRST_DCID_BYTES {
        return (Quic::Long, 0);
    }
    if let Some(next) = behind_initial(frame, payload, dcid_bytes)
        && next + size_of::<LongHeader>() <= payload + payload_bytes
        && let Some(next) = frame.at::<LongHeader>(next)
    {
        // SAFETY: `at` checked the bounds.
        let next = unsafe { &*next };
        if self::kind(next) == Some(HANDSHAKE) {
            return (Quic::Handshake, 0);
        }
    }
    let Some(dcid) = frame.at::<[u8; FIRST_DCID_BYTES]>(payload + size_of::<LongHeader>()) else {
        return (Quic::Other, 0);
    };
    // SAFETY: `at` checked the bounds.
    let dcid = u64::from_le_bytes(unsafe { *dcid });
    (Quic::Initial, (dcid ^ dcid >> 32) as u32)
}

/// The type of a packet with a long header, as version 1 numbers it, in a version that is known.
#[inline(always)]
fn kind(header: &LongHeader) -> Option<u8> {
    let kind = header.first >> 4;
    let kind = match u32::from_be_bytes(header.version) {
        VERSION_1 => kind,
        // Each is one more than in version 1 (RFC 9369, 3.2).
        VERSION_2 => kind.wrapping_sub(1),
        _ => return None,
    };
    if header.first & LONG == 0 { None } else { Some(kind & 3) }
}

/// Where the packet behind the Initial at `at` begins, if its lengths can be read
/// (RFC 9000, 17.2.2).
#[inline(always)]
fn behind_initial<F: Frame>(frame: &F, at: usize, dcid_bytes: usize) -> Option<usize> {
    let at = at + size_of::<LongHeader>() + dcid_bytes;
    // The second byte is there to be checked: the verifier refuses checks of one.
    let scid_bytes = frame.at::<[u8; 2]>(at)?;
    // SAFETY: `at` checked the bounds.
    let scid_bytes = usize::from(unsafe { (*scid_bytes)[0] });
    if scid_bytes > CID_BYTES {
        return None;
    }
    let (at, token_bytes) = length(frame, at + 1 + scid_bytes)?;
    let (at, packet_bytes) = length(frame, at + token_bytes)?;
    Some(at + packet_bytes)
}

/// Where the variable-length integer at `at` ends, and what it says (RFC 9000, 16), if that is
/// below 16,384 and is not written in eight bytes: no datagram needs more.
#[inline(always)]
fn length<F: Frame>(frame: &F, at: usize) -> Option<(usize, usize)> {
    let bytes = frame.at::<[u8; 4]>(at)?;
    // SAFETY: `at` checked the bounds.
    let [a, b, c, d] = unsafe { *bytes };
    let (bytes, high, low) = match a >> 6 {
        0 => (1, 0, a),
        1 => (2, a & 0x3f, b),
        2 if a & 0x3f | b | c & 0xc0 == 0 => (4, c & 0x3f, d),
        _ => return None,
    };
    Some((at + bytes, usize::from(high) << 8 | usize::from(low)))
}
