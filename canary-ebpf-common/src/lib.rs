//! What the XDP programs and the agent share, as pure code.
//!
//! Owns the ABI (map keys and values), the bucket hash, the forwarding-table
//! entry, incremental checksums, outer headers, what unwrapping looks at, the steering decision, what is
//! watched of connections and, with the feature `user`, shares, the table compiler, that of networks and a model of what becomes of frames. Must
//! not know of aya, of the kernel's helpers, of clocks or of the network: everything it needs
//! is an argument.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod abi;
pub mod answer;
pub mod checksum;
pub mod class;
pub mod decap;
pub mod entry;
pub mod extension;
pub mod fragment;
pub mod hash;
pub mod headers;
pub mod icmp;
pub mod mss;
pub mod nat;
pub mod ports;
pub mod quic;
pub mod recent;
pub mod signals;
pub mod steer;
pub mod tunnel;
pub mod vips;

#[cfg(feature = "user")]
pub mod compile;
#[cfg(feature = "user")]
mod differing;
#[cfg(feature = "user")]
pub mod model;
#[cfg(feature = "user")]
pub mod networks;
#[cfg(feature = "user")]
mod packed;
#[cfg(feature = "user")]
pub mod share;
#[cfg(feature = "user")]
pub use differing::{differing, ones};
#[cfg(feature = "user")]
pub use packed::Packed;
