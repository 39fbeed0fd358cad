//! Other addresses and ports.

use super::{IP, Packet};
use crate::{
    abi::{Address, Flow, IPPROTO_TCP},
    checksum::Delta,
};

impl Packet {
    /// The change of both addresses.
    fn addresses(&self, src: Address, dst: Address) -> Delta {
        Delta::ZERO.replace_address(self.src(), src).replace_address(self.dst(), dst)
    }

    /// Gives the packet other addresses and takes one from its TTL.
    pub(super) fn route(&mut self, src: Address, dst: Address) {
        let change = self.addresses(src, dst);
        self.set_address(self.src_at(), src);
        self.set_address(self.dst_at(), dst);
        self.set_ttl(self.ttl() - 1, change);
    }

    /// Sets the TTL, and IPv4's checksum to that and a change of addresses.
    pub(super) fn set_ttl(&mut self, ttl: u8, change: Delta) {
        let at = self.ttl_at();
        if self.v6 {
            self.bytes[at] = ttl;
            return;
        }
        let before = self.raw_u16(at);
        self.bytes[at] = ttl;
        let change = change.replace_half(before, self.raw_u16(at));
        let sum = change.apply(self.raw_u16(IP + 10));
        self.set_u16(IP + 10, u16::from_be(sum));
    }

    /// Gives the packet the addresses and ports of `flow`.
    pub(super) fn translate(&mut self, flow: &Flow) {
        let Flow { src, dst, src_port_be, dst_port_be, .. } = *flow;
        let at = self.transport;
        let change = self
            .addresses(src, dst)
            .replace_half(self.raw_u16(at), src_port_be)
            .replace_half(self.raw_u16(at + 2), dst_port_be);
        self.set_u16(at, u16::from_be(src_port_be));
        self.set_u16(at + 2, u16::from_be(dst_port_be));
        let tcp = self.protocol == IPPROTO_TCP;
        let checksum = if tcp { at + 16 } else { at + 6 };
        let was = self.raw_u16(checksum);
        // RFC 768: zero says that there is no checksum, so a sum of zero is sent as ones.
        if tcp || was != 0 {
            let sum = change.apply(was);
            let sum = if sum == 0 && !tcp { 0xffff } else { sum };
            self.set_u16(checksum, u16::from_be(sum));
        }
        self.route(src, dst);
    }
}
