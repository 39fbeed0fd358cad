//! The two netlink sockets: one that asks, one that listens.
//!
//! Owns framing, sequence numbers and the sockets' limits. Must not know what the
//! messages mean. The request multiplexer of the `rtnetlink` crate sends one
//! datagram a round trip and has an unbounded queue behind it; here many requests
//! go in one datagram, and a listener that falls behind learns of it.

use std::{io, os::fd::AsRawFd, time::Duration};

use bytes::BytesMut;
use netlink_packet_route::RouteNetlinkMessage;
use nix::{errno::Errno, sys::socket::sockopt};
use rtnetlink::{
    MulticastGroup,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE,
        NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN, NetlinkBuffer, NetlinkMessage,
    },
    sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};

use super::wire::{self, Message};

/// Requests in one datagram. Each answer may take a page of the receive buffer,
/// whatever its size, and the kernel queues all of them before `sendto` returns.
const REQUESTS_PER_DATAGRAM: usize = 64;
/// Bytes; room for a thousand answers, and for notifications while routes are looked up.
const RECEIVE_BUFFER_LEN: usize = 8 << 20;
/// Bytes; the kernel's datagrams are at most 32 KiB.
const DATAGRAM_LEN: usize = 64 << 10;
/// The kernel answers before `sendto` returns; an answer that takes this long was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A dump during which the table changed may lack entries; it is made again.
const DUMP_ATTEMPTS: usize = 5;

/// What the listener is told of.
const GROUPS: [MulticastGroup; 9] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Nexthop,
];

/// How a request is to be carried out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mode {
    /// Answered with a message or an error.
    Get,
    /// Makes the thing if it is not there; answered with success or an error.
    Create,
    /// As `Create`, and an error if it is there.
    CreateNew,
    /// Changes or removes what is there; answered with success or an error.
    Change,
    /// As `Change`, in place of what it says; answered with success or an error.
    Replace,
}

/// An answer: the message where one was asked for, or the kernel's refusal.
pub(super) type Answer = Result<Option<Message>, Errno>;

fn open() -> io::Result<TokioSocket> {
    let socket = TokioSocket::new(NETLINK_ROUTE)?;
    // SAFETY: the descriptor belongs to `socket`, which outlives the borrow.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    // Beyond rmem_max where we may, else up to it.
    if nix::sys::socket::setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER_LEN).is_err() {
        nix::sys::socket::setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER_LEN)?;
    }
    Ok(socket)
}

/// The socket that asks. Bound to the network namespace of the thread that opened it.
pub(super) struct Requests {
    socket: TokioSocket,
    sequence: u32,
    buffer: BytesMut,
}

impl Requests {
    /// Opens the socket.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = open()?;
        socket.socket_mut().bind_auto()?;
        socket.socket_ref().set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0, buffer: BytesMut::new() })
    }

    /// Sends all requests, many in a datagram, and gives their answers in the same order.
    pub(super) async fn exchange(
        &mut self,
        requests: Vec<(Mode, RouteNetlinkMessage)>,
    ) -> io::Result<Vec<Answer>> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter();
        loop {
            let (first, mut datagram) = (self.sequence.wrapping_add(1), Vec::new());
            let mut count = 0;
            for (mode, message) in requests.by_ref().take(REQUESTS_PER_DATAGRAM) {
                let flags = match mode {
                    Mode::Get => NLM_F_REQUEST,
                    Mode::Create => NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE,
                    Mode::CreateNew => NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
                    Mode::Change => NLM_F_REQUEST | NLM_F_ACK,
                    Mode::Replace => NLM_F_REQUEST | NLM_F_ACK | NLM_F_REPLACE,
                };
                self.append(&mut datagram, message, flags);
                count += 1;
            }
            if count == 0 {
                return Ok(answers);
            }
            self.send(&datagram).await?;
            within(self.collect(first, count, &mut answers)).await?;
        }
    }

    /// Reads a whole table.
    pub(super) async fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<Message>> {
        let mut attempt = 1;
        loop {
            let mut datagram = Vec::new();
            self.append(&mut datagram, message.clone(), NLM_F_REQUEST | NLM_F_DUMP);
            self.send(&datagram).await?;
            let (messages, whole) = within(self.collect_dump()).await?;
            if whole || attempt == DUMP_ATTEMPTS {
                return Ok(messages);
            }
            attempt += 1;
        }
    }

    fn append(&mut self, datagram: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = datagram.len();
        // Messages in a datagram begin at multiples of four bytes.
        datagram.resize(start + message.buffer_len().next_multiple_of(4), 0);
        let end = start + message.buffer_len();
        message.serialize(&mut datagram[start..end]);
    }

    async fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        // What an abandoned exchange left behind is of no use to anyone.
        self.buffer.clear();
        self.socket.send_to(datagram, &SocketAddr::new(0, 0)).await.map(drop)
    }

    async fn collect(
        &mut self,
        first: u32,
        count: usize,
        answers: &mut Vec<Answer>,
    ) -> io::Result<()> {
        let mut slots: Vec<Option<Answer>> = vec![None; count];
        let mut missing = count;
        while missing > 0 {
            receive(&self.socket, &mut self.buffer).await?;
            while let Some(frame) = next_frame(&mut self.buffer) {
                let frame = NetlinkBuffer::new_checked(frame.as_ref()).map_err(io::Error::other)?;
                let place = frame.sequence_number().wrapping_sub(first) as usize;
                let Some(slot) = slots.get_mut(place).filter(|slot| slot.is_none()) else {
                    continue;
                };
                *slot = Some(answer(frame.message_type(), frame.payload())?);
                missing -= 1;
            }
        }
        answers.extend(slots.into_iter().flatten());
        Ok(())
    }

    async fn collect_dump(&mut self) -> io::Result<(Vec<Message>, bool)> {
        let (mut messages, mut whole) = (Vec::new(), true);
        loop {
            receive(&self.socket, &mut self.buffer).await?;
            while let Some(frame) = next_frame(&mut self.buffer) {
                let frame = NetlinkBuffer::new_checked(frame.as_ref()).map_err(io::Error::other)?;
                if frame.sequence_number() != self.sequence {
                    continue;
                }
                whole &= frame.flags() & NLM_F_DUMP_INTR == 0;
                match frame.message_type() {
                    NLMSG_DONE => return Ok((messages, whole)),
                    NLMSG_ERROR => {
                        if let Err(errno) = answer(NLMSG_ERROR, frame.payload())? {
                            return Err(errno.into());
                        }
                    }
                    kind => match wire::decode(kind, frame.payload()) {
                        Ok(message) => messages.push(message),
                        // One entry that can't be read must not hide the others.
                        Err(error) => tracing::warn!(kind, %error, "unreadable netlink entry"),
                    },
                }
            }
        }
    }
}

/// What the listener heard.
#[derive(Debug)]
pub(super) enum Heard {
    /// Changes, oldest first.
    Messages(Vec<Message>),
    /// Changes were lost: everything has to be read again.
    Lost,
}

/// The socket that listens. Bound to the network namespace of the thread that opened it.
pub(super) struct Monitor {
    socket: TokioSocket,
    buffer: BytesMut,
}

impl Monitor {
    /// Opens the socket and joins the groups; changes are queued from here on.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = open()?;
        socket.socket_mut().bind_auto()?;
        for group in GROUPS {
            socket.socket_mut().add_membership(group as u32)?;
        }
        Ok(Self { socket, buffer: BytesMut::new() })
    }

    /// Waits for changes. Nothing is lost when the future is dropped.
    pub(super) async fn hear(&mut self) -> io::Result<Heard> {
        match receive(&self.socket, &mut self.buffer).await {
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(Heard::Lost),
            other => other?,
        }
        let mut messages = Vec::new();
        while let Some(frame) = next_frame(&mut self.buffer) {
            let Ok(frame) = NetlinkBuffer::new_checked(frame.as_ref()) else {
                return Ok(Heard::Lost);
            };
            if frame.message_type() == NLMSG_OVERRUN {
                return Ok(Heard::Lost);
            }
            match wire::decode(frame.message_type(), frame.payload()) {
                Ok(Message::Other) => {}
                Ok(message) => messages.push(message),
                Err(error) => {
                    tracing::warn!(kind = frame.message_type(), %error, "unreadable netlink change");
                    return Ok(Heard::Lost);
                }
            }
        }
        Ok(Heard::Messages(messages))
    }
}

/// Reads one datagram of the kernel's; those of other processes are passed over.
async fn receive(socket: &TokioSocket, buffer: &mut BytesMut) -> io::Result<()> {
    loop {
        buffer.clear();
        buffer.reserve(DATAGRAM_LEN);
        match socket.recv_from(buffer).await {
            Ok(sender) if sender.port_number() == 0 => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Splits the next message off a datagram; `None` when nothing whole is left.
fn next_frame(buffer: &mut BytesMut) -> Option<BytesMut> {
    let length = NetlinkBuffer::new_checked(buffer.as_ref()).ok()?.length() as usize;
    let mut frame = buffer.split_to(length.next_multiple_of(4).min(buffer.len()));
    frame.truncate(length);
    Some(frame)
}

fn answer(kind: u16, payload: &[u8]) -> io::Result<Answer> {
    if kind == NLMSG_ERROR {
        let code = payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
        return match code {
            Some(0) => Ok(Ok(None)),
            Some(code) => Ok(Err(Errno::from_raw(code.wrapping_neg()))),
            None => Err(io::ErrorKind::InvalidData.into()),
        };
    }
    Ok(wire::decode(kind, payload).map(Some).map_err(|error| {
        tracing::warn!(kind, %error, "unreadable netlink answer");
        Errno::EBADMSG
    }))
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(ANSWER_TIMEOUT, work).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_split_and_garbage_ends_them() {
        let message = |length: u32| {
            let mut bytes = vec![0_u8; length.next_multiple_of(4) as usize];
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            bytes
        };
        let mut buffer = BytesMut::from(&[message(17), message(16), vec![1, 2, 3]].concat()[..]);
        assert_eq!(next_frame(&mut buffer).map(|frame| frame.len()), Some(17));
        assert_eq!(next_frame(&mut buffer).map(|frame| frame.len()), Some(16));
        assert_eq!(next_frame(&mut buffer), None);
    }

    #[test]
    fn errors_carry_the_kernels_reason() {
        assert_eq!(answer(NLMSG_ERROR, &0_i32.to_ne_bytes()).unwrap(), Ok(None));
        let refusal = answer(NLMSG_ERROR, &(-libc::ENETUNREACH).to_ne_bytes()).unwrap();
        assert_eq!(refusal, Err(Errno::ENETUNREACH));
        assert_eq!(answer(NLMSG_ERROR, &i32::MIN.to_ne_bytes()).unwrap(), Err(Errno::UnknownErrno));
        assert!(answer(NLMSG_ERROR, &[0, 0]).is_err());
    }
}
