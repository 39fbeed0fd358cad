//! Watched connections: which ones are, how far each has come, and what is counted of them.

use super::{Address, MAX_VERSIONS};

/// Element of `SAMPLING`, by [`place`](Sampling::place): which of a version's connections are
/// watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Sampling {
    /// Connections are watched whose hash has all of these bits; [`Sampling::NONE`] for none.
    pub mask: u32,
    /// Counts up when what is watched of the service changes: what was begun before that is not
    /// counted, since packets of it may have been missed. 0, as the map is made: nothing is watched.
    pub epoch: u32,
    /// A handshake that takes longer is slow, nanoseconds.
    pub slow_ns: u64,
    /// Element of `SIGNAL_COUNTERS` that it is counted in.
    pub slot: u32,
    /// Of whom this is: a hash of the service's and the version's name, and 0 for nobody. For the
    /// agent only.
    pub whose: u32,
}

/// Nothing is watched.
impl Default for Sampling {
    fn default() -> Self {
        Self { mask: Self::NONE, epoch: 0, slow_ns: u64::MAX, slot: 0, whose: 0 }
    }
}

impl Sampling {
    /// [`Self::mask`] that no connection has: a bit that is in no hash.
    pub const NONE: u32 = 1 << 31;

    /// The element of a version of a service, by their numbers.
    #[inline(always)]
    pub const fn place(service: u32, version: u8) -> u32 {
        service * MAX_VERSIONS as u32 + (version as u32 & (MAX_VERSIONS as u32 - 1))
    }
}

/// Value of `SAMPLES_V4` and `SAMPLES_V6`, under the tuple of the client's packets: a connection
/// that is watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Sample {
    /// When its first SYN came, nanoseconds of `CLOCK_MONOTONIC`.
    pub syn_ns: u64,
    /// When the client's FIN came, likewise.
    pub fin_ns: u64,
    /// The client's newest sequence number, host order; that of its SYN to begin with.
    pub client_seq: u32,
    /// The server's newest sequence number, host order, where its packets are seen.
    pub server_seq: u32,
    /// What the client acknowledges that has got nothing from the server yet.
    pub first_ack: u32,
    /// `SAMPLE_*` bits of [`crate::signals`].
    pub state: u32,
    /// [`Sampling::epoch`] when it began.
    pub epoch: u32,
    /// Its [`Sampling::place`].
    pub place: u32,
}

/// What a watched connection may do that is bad: bits, and the numbers of these in
/// [`VersionSignals::outcomes`].
pub mod outcome {
    /// No completed handshake in 3 s, or a reset in answer to the SYN.
    pub const CONNECT_FAILED: u32 = 1 << 0;
    /// Its SYN was sent again before it was answered.
    pub const SYN_RETRANSMIT: u32 = 1 << 1;
    /// Its handshake took longer than [`Sampling::slow_ns`](super::Sampling::slow_ns).
    pub const SLOW_HANDSHAKE: u32 = 1 << 2;
    /// The server reset it (translated flows only).
    pub const SERVER_RESET: u32 = 1 << 3;
    /// The client reset it.
    pub const CLIENT_RESET: u32 = 1 << 4;
    /// It ended without having brought the client anything.
    pub const SHORT_FLOW: u32 = 1 << 5;
    /// How many there are.
    pub const COUNT: usize = 6;
}

/// Buckets of a histogram of handshake times: see [`crate::signals::bucket`].
pub const HANDSHAKE_BUCKETS: usize = 168;

/// Element of `SIGNAL_COUNTERS` (per CPU): what the watched connections of a version have done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct VersionSignals {
    /// Connections of which it is known how they began: the handshake was completed, or failed.
    pub watched: u64,
    /// Connections by [`outcome`].
    pub outcomes: [u64; outcome::COUNT],
    /// Connections that were not watched because `SAMPLES_V4` or `SAMPLES_V6` was full.
    pub full: u64,
    /// Bad outcomes that `SIGNALS` had no room for.
    pub lost: u64,
    /// Handshakes by time.
    pub handshakes: [u64; HANDSHAKE_BUCKETS],
    /// Time that they took together, nanoseconds.
    pub handshake_ns: u64,
}

impl Default for VersionSignals {
    fn default() -> Self {
        Self {
            watched: 0,
            outcomes: [0; outcome::COUNT],
            full: 0,
            lost: 0,
            handshakes: [0; HANDSHAKE_BUCKETS],
            handshake_ns: 0,
        }
    }
}

/// Bad outcomes of a connection, as they come through the ring buffer `SIGNALS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SignalEvent {
    /// When, nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// The client.
    pub client: Address,
    /// [`outcome`] bits.
    pub outcomes: u32,
    /// Its [`Sampling::place`].
    pub place: u32,
}

const _: () = {
    assert!(size_of::<Sampling>() == 24);
    assert!(size_of::<Sample>() == 40);
    assert!(size_of::<VersionSignals>() == 8 * (10 + HANDSHAKE_BUCKETS));
    assert!(size_of::<SignalEvent>() == 32);
};
