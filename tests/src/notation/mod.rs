//! A notation for packets, short enough to be read in a row.
//!
//! ```text
//! eth client > us / ip client > vip ttl=64 / tcp 40000 > 80 S seq=1000 / "hello"
//! ```
//!
//! Layers from the outside in, between ` / `: `eth`, `vlan`, `svlan` (802.1ad), `ip`, `ip6`, the
//! extension headers `hbh`, `route`, `frag`, `auth` and `dst`, `tcp`, `udp`, `icmp`, `icmp6`, `quic`, `"text"`, `hex 0a0b`, `zeros 100`; at the end `pad 6` (bytes
//! behind the IP packet) and `cut 20` (the frame's first bytes only). `same`
//! stands for the rest of the packet that came in, `quoted 28` for its first bytes behind the
//! Ethernet header. Hosts go by the names of
//! [`crate::names`] or by plain addresses. Lengths, checksums, header lengths and
//! protocol numbers are right unless they are given: `csum=bad`, `csum=0x1234`,
//! `len=9`, `len=+1`, `ihl=4`, `offset=4`, `proto=99`, `type=0x0806`.
//!
//! | layer | fields |
//! | --- | --- |
//! | `eth A > B` | `type` |
//! | `vlan N`, `svlan N` | `pcp type`, word `dei` |
//! | `ip A > B` | `ttl id tos frag ihl len proto version csum options`, words `df mf` |
//! | `ip6 A > B` | `hop class flow len next version` |
//! | `hbh`, `route`, `auth`, `dst` | `next len bytes left` (segments left) |
//! | `frag` | `next at id`, word `mf` |
//! | `tcp P > Q FLAGS` | `seq ack win urg offset csum options`, word `short` (its first eight bytes only, as errors may quote it); flags of `FSRPAUEC`, `-` for none |
//! | `udp P > Q` | `len csum` |
//! | `icmp`, `icmp6` | `type code rest csum`; types also `echo reply unreachable toobig exceeded parameter` |
//! | `quic TYPE` | `version dcid dcidlen scid scidlen token width to`, word `greased`; types `initial 0rtt handshake retry short` |
//!
//! A QUIC packet reaches to byte `to` of the datagram's payload: 1,200 for an
//! Initial, else 60. `width` is that of its variable-length integers, in bytes.
//!
//! In a packet that is expected, `$name` stands for a port, a flow label (`flow=$name`), a
//! MAC address or an address that the program chooses: bound where it comes first, the same from
//! then on.

mod build;
mod decode;

use std::collections::HashMap;

pub use self::{
    build::{checksum, frame},
    decode::{decode, hex, hex_difference},
};
use crate::names::Host;

/// What placeholders stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bound {
    /// Ports, in host order.
    pub ports: HashMap<String, u16>,
    /// Flow labels.
    pub labels: HashMap<String, u32>,
    /// Hosts.
    pub hosts: HashMap<String, Host>,
}

/// What a packet's notation may refer to.
#[derive(Debug)]
pub struct Context<'a> {
    /// Placeholders.
    pub bound: &'a mut Bound,
    /// The packet that came in, for `same`.
    pub input: Option<&'a [u8]>,
    /// The packet that was seen, which unbound placeholders are read from.
    pub seen: Option<&'a [u8]>,
}

/// A frame from its notation alone, without placeholders.
///
/// # Errors
/// When it is not well written.
pub fn parse(text: &str) -> anyhow::Result<Vec<u8>> {
    frame(text, &mut Context { bound: &mut Bound::default(), input: None, seen: None })
}
