//! One question to the kernel over netlink, asked and answered before anything else goes on.
//!
//! For whoever looks once and follows nothing. Owns framing. Must not know what the messages
//! mean.

use std::{io, time::Duration};

use rtnetlink::{
    packet_core::{
        NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NetlinkBuffer,
        NetlinkHeader,
    },
    sys::{Socket, SocketAddr},
};

/// `sizeof(struct nlmsghdr)`.
const HEADER_LEN: usize = 16;
/// The kernel answers before `sendto` returns; whatever takes this long was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// A message's type and what it carries.
pub(crate) type Frame = (u16, Vec<u8>);

/// A socket that asks, in the network namespace of the thread that opened it.
pub(crate) struct Asker {
    socket: Socket,
    sequence: u32,
}

impl Asker {
    /// Opens one of a netlink family (`NETLINK_ROUTE` and so on).
    ///
    /// # Errors
    /// The kernel has no such family, or no socket is left.
    pub(crate) fn open(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let timeout = nix::sys::time::TimeVal::new(ANSWER_TIMEOUT.as_secs() as i64, 0);
        nix::sys::socket::setsockopt(
            &as_fd(&socket),
            nix::sys::socket::sockopt::ReceiveTimeout,
            &timeout,
        )?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for one thing.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn get(&mut self, kind: u16, payload: &[u8]) -> io::Result<Frame> {
        self.send(kind, NLM_F_REQUEST, payload)?;
        loop {
            let (mut frames, _) = self.receive()?;
            if let Some(frame) = frames.pop() {
                return Ok(frame);
            }
        }
    }

    /// Asks for all of a table.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn dump(&mut self, kind: u16, payload: &[u8]) -> io::Result<Vec<Frame>> {
        self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, payload)?;
        let mut all = Vec::new();
        loop {
            let (frames, done) = self.receive()?;
            all.extend(frames);
            if done {
                return Ok(all);
            }
        }
    }

    fn send(&mut self, kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.length = (HEADER_LEN + payload.len()) as u32;
        header.message_type = kind;
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut bytes = vec![0; HEADER_LEN];
        rtnetlink::packet_core::Emitable::emit(&header, &mut bytes);
        bytes.extend_from_slice(payload);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// The messages of one datagram, and whether the last of them has come.
    fn receive(&mut self) -> io::Result<(Vec<Frame>, bool)> {
        let (datagram, _) = self.socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        let mut frames = Vec::new();
        while let Ok(frame) = NetlinkBuffer::new_checked(rest) {
            let length = (frame.length() as usize).next_multiple_of(4).min(rest.len());
            if frame.sequence_number() == self.sequence {
                match frame.message_type() {
                    NLMSG_DONE => return Ok((frames, true)),
                    NLMSG_ERROR => return Err(refusal(frame.payload())),
                    NLMSG_NOOP => {}
                    kind => frames.push((kind, frame.payload().to_vec())),
                }
            }
            rest = &rest[length..];
        }
        Ok((frames, false))
    }
}

fn as_fd(socket: &Socket) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::AsRawFd as _;
    // SAFETY: the descriptor belongs to `socket`, which outlives the borrow.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

fn refusal(payload: &[u8]) -> io::Error {
    match payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(code) if code < 0 => io::Error::from_raw_os_error(code.wrapping_neg()),
        _ => io::ErrorKind::InvalidData.into(),
    }
}
