//! A connection to the control socket that knows who has written to it.
//!
//! `SO_PEERCRED` says who has connected. Whoever has the descriptor may write: a child, a
//! process that was handed it, or the one that connected, under another uid by then. With
//! `SO_PASSCRED` the kernel says with each piece who has written it. A connection remembers
//! all who did, and may what all of them may: what is read ahead of a request can't borrow
//! the rights of what comes after it.

use std::{
    io::{self, IoSliceMut},
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

/// More than this many have written: nobody may change anything any more.
const MOST: usize = 16;

/// Who has written to a connection: real uid, gid and pid.
#[derive(Clone, Debug, Default)]
pub(super) struct Senders(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    senders: Vec<Sender>,
    too_many: bool,
}

/// One that has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sender {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) pid: i32,
}

impl Senders {
    /// Notes that somebody has written.
    pub(super) fn add(&self, sender: Sender) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.senders.contains(&sender) {
            if seen.senders.len() < MOST {
                seen.senders.push(sender);
            } else {
                seen.too_many = true;
            }
        }
    }

    /// Whether all who have written may.
    pub(super) fn all(&self, may: impl Fn(Sender) -> bool) -> bool {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        !seen.too_many && seen.senders.iter().all(|sender| may(*sender))
    }
}

/// The connection.
#[derive(Debug)]
pub(super) struct Attributed {
    stream: UnixStream,
    senders: Senders,
}

impl Attributed {
    /// A stream that was accepted on a socket with `SO_PASSCRED`, which it inherits.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, senders: Senders::default() }
    }

    /// The stream.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Those who have written to it, as they become known.
    pub(super) fn senders(&self) -> Senders {
        self.senders.clone()
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // Room for credentials alone: descriptors that are sent along are closed by the kernel.
        let mut control = nix::cmsg_space!(UnixCredentials);
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message =
            recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        let mut told = false;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmCredentials(by) = part {
                told = true;
                self.senders.add(Sender { uid: by.uid(), gid: by.gid(), pid: by.pid() });
            }
        }
        if message.bytes > 0 && !told {
            return Err(io::Error::other("the kernel does not say who has written"));
        }
        Ok(message.bytes)
    }
}

impl AsyncRead for Attributed {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            let into = buffer.initialize_unfilled();
            match self.stream.try_io(Interest::READABLE, || self.receive(into)) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Attributed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    // Else a long answer would be copied behind its head before it is written.
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_may_what_all_of_its_senders_may() {
        let senders = Senders::default();
        let root = Sender { uid: 0, gid: 0, pid: 1 };
        assert!(senders.all(|_| false), "nobody has asked for anything");
        senders.add(root);
        assert!(senders.all(|sender| sender.uid == 0));
        senders.add(Sender { uid: 7, ..root });
        senders.add(root);
        assert!(!senders.all(|sender| sender.uid == 0), "it stays so");
        let many = Senders::default();
        (0..=MOST as i32).for_each(|pid| many.add(Sender { pid, ..root }));
        assert!(!many.all(|_| true));
    }
}
