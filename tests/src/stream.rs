//! Short UDP datagrams at full speed, from many source ports in any order: frames that the kernel
//! makes itself ([`bpf::send_live`]).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use etherparse::PacketBuilder;

use crate::{
    bpf,
    floor::{Assembler, Counter, PRANDOM, Width, widths},
    loaded::XDP_DROP,
};

/// So many source ports at most, from [`FIRST_PORT`] on.
pub const PORTS: u16 = 4096;

/// The lowest source port.
pub const FIRST_PORT: u16 = 16_384;

/// The least bytes of a frame, without the four of its check sequence, which veth has not.
const LEAST_BYTES: usize = 60;

/// A stream's frames but for their source port.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Where they go, and where they come from.
    pub macs: [[u8; 6]; 2],
    /// The sender's address.
    pub from: IpAddr,
    /// The receiver, of the same family.
    pub to: SocketAddr,
}

impl Route {
    /// The frame with the `nth` port, as short as a frame can be.
    ///
    /// # Panics
    /// The addresses are not of one family.
    pub fn frame(&self, nth: u16) -> Vec<u8> {
        // The first byte of the payload, with which no port's checksum is zero.
        let right = |byte: &u8| {
            let sum = u32::from(self.sum(&self.frame_with(0, *byte), FIRST_PORT));
            let mut ports = (0..PORTS).map(|n| u32::from((FIRST_PORT + n).to_be()));
            ports.all(|port| (sum + port) % 0xffff != 0)
        };
        let byte = (0..=u8::MAX).find(right).unwrap_or_default();
        self.frame_with(nth % PORTS, byte)
    }

    fn frame_with(&self, nth: u16, byte: u8) -> Vec<u8> {
        let [to_mac, from_mac] = self.macs;
        let link = PacketBuilder::ethernet2(from_mac, to_mac);
        let packet = match (self.from, self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => link.ipv4(from.octets(), to.octets(), 64),
            (IpAddr::V6(from), IpAddr::V6(to)) => link.ipv6(from.octets(), to.octets(), 64),
            (from, to) => panic!("{from} and {to} are of two families"),
        };
        let packet = packet.udp(FIRST_PORT + nth, self.to.port());
        let mut payload = vec![0; LEAST_BYTES.saturating_sub(packet.size(0)).max(2)];
        payload[0] = byte;
        let mut frame = Vec::new();
        packet.write(&mut frame, &payload).expect("writing to a vector");
        frame
    }

    /// Where the UDP header begins.
    const fn udp_at(&self) -> usize {
        match self.from {
            IpAddr::V4(_) => 34,
            IpAddr::V6(_) => 54,
        }
    }

    /// The sum of all that the checksum is over but the source port, which is `port` (RFC 1071: the
    /// order of bytes does not matter).
    fn sum(&self, frame: &[u8], port: u16) -> u16 {
        let at = self.udp_at() + 6;
        let checksum = u16::from_ne_bytes([frame[at], frame[at + 1]]);
        let sum = u32::from(!checksum) + u32::from(!port.to_be());
        (sum % 0xffff) as u16
    }
}

/// A stream on its way out of an interface.
#[derive(Debug)]
pub struct Stream {
    program: OwnedFd,
    frame: Vec<u8>,
    sent: Counter,
}

impl Stream {
    /// Makes one in this thread's namespace, from so many ports.
    ///
    /// # Errors
    /// When there is no such interface, or the kernel refuses the program.
    ///
    /// # Panics
    /// The number of ports is no power of two, or above [`PORTS`].
    pub fn new(interface: &str, route: &Route, ports: u16) -> io::Result<Self> {
        assert!(ports.is_power_of_two() && ports <= PORTS, "{ports} ports");
        let ifindex = nix::net::if_::if_nametoindex(interface)?;
        let frame = route.frame(0);
        let udp = route.udp_at() as i16;
        let mut code = Assembler::default();
        code.begin(frame.len());
        // Pages come back as their last owner has left them.
        for (width, at) in widths(frame.len()).flat_map(halves) {
            let from = at as usize;
            let mut word = [0; 4];
            let bytes = if matches!(width, Width::U32) { 4 } else { 2 };
            word[..bytes].copy_from_slice(&frame[from..from + bytes]);
            code.set(1, i32::from_ne_bytes(word));
            code.store(width, 6, at, 1);
        }
        code.call(PRANDOM);
        code.and(0, i32::from(ports - 1));
        code.add(0, FIRST_PORT.into());
        code.big_endian_16(0);
        code.store(Width::U16, 6, udp, 0);
        code.add(0, route.sum(&frame, FIRST_PORT).into());
        for _ in 0..2 {
            code.copy(1, 0);
            code.shift_right(1, 16);
            code.and(0, 0xffff);
            code.add_register(0, 1);
        }
        code.xor(0, 0xffff);
        code.store(Width::U16, 6, udp + 6, 0);
        let sent = Counter::new()?;
        sent.count(&mut code);
        code.redirect(ifindex);
        Ok(Self { program: code.out(XDP_DROP)?, frame, sent })
    }

    /// Sends so many frames, on this processor, in this thread's namespace; fewer if a signal comes.
    /// A call takes a while to begin and to end: it waits for all others' RCU readers.
    ///
    /// # Errors
    /// When the kernel refuses: live frames need kernel 5.18.
    pub fn send(&self, frames: u32) -> io::Result<()> {
        match bpf::send_live(self.program(), &self.frame, frames) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            done => done,
        }
    }

    /// Frames that it has sent.
    ///
    /// # Errors
    /// When the kernel refuses to read.
    pub fn sent(&self) -> io::Result<u64> {
        self.sent.read()
    }

    /// The program that fills the frames.
    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }
}

/// A word of 64 bits as two: a register is set to 32 of them at a time.
fn halves((width, at): (Width, i16)) -> impl Iterator<Item = (Width, i16)> {
    let whole = matches!(width, Width::U64);
    let first = if whole { (Width::U32, at) } else { (width, at) };
    std::iter::once(first).chain(whole.then_some((Width::U32, at + 4)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;

    #[test]
    fn every_port_has_a_frame_with_the_right_checksum() {
        for (from, to, kind, bytes) in [
            ("10.1.0.3", "10.1.0.100:7001", "IPv4 UDP", 60),
            ("fd00:1::3", "[fd00:1::100]:7001", "IPv6 UDP", 64),
        ] {
            let route = Route {
                macs: [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]],
                from: from.parse().unwrap(),
                to: to.parse().unwrap(),
            };
            let sum = route.sum(&route.frame(0), FIRST_PORT);
            for nth in 0..PORTS {
                let frame = route.frame(nth);
                assert_eq!(frame.len(), bytes);
                assert_eq!(wire::check(&frame), Ok(Some(kind)), "{nth}");
                let at = route.udp_at();
                assert_eq!(frame[at..at + 2], (FIRST_PORT + nth).to_be_bytes());
                assert_ne!(frame[at + 6..at + 8], [0, 0], "{nth}: no checksum");
                assert_eq!(route.sum(&frame, FIRST_PORT + nth), sum, "{nth}");
            }
        }
    }
}
