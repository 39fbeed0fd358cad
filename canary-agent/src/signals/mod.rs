//! What connections do, by version: which ones are watched, and what their counts make. Pure.
//!
//! [`choose`] says how many of each version's connections are watched, [`window`] makes windows of
//! what was counted, one event for each client, and [`histogram`] knows handshake times.
//!
//! Must not know of maps or of the time: the daemon's thread reads and writes those.

pub mod choose;
pub mod histogram;
pub mod window;

use crate::config::model::{Forward, SignalKind};

/// Why a signal can't be seen with a way of forwarding; `None` where it is seen.
pub const fn unseen(signal: SignalKind, forward: Forward) -> Option<&'static str> {
    match (signal, forward) {
        (SignalKind::ServerReset, Forward::Dsr | Forward::Ipip | Forward::Gue) => Some(
            "the servers answer past the balancer, which sees no reset of theirs: `server_reset` \
             needs `forward = \"nat\"`",
        ),
        _ => None,
    }
}

/// Of whom an element of `SAMPLING` is: FNV-1a of both names, never 0.
pub fn whose(service: &str, version: &str) -> u32 {
    let bytes = service.bytes().chain([0]).chain(version.bytes());
    let hash = bytes
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash.max(1)
}
