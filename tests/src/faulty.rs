//! Servers of a release that has a fault, and of one that is as good as servers are: now and then
//! one of them refuses a connection or resets one, too.
//!
//! They speak as much HTTP as [`crate::client::Connection::name`] needs.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};

use crate::{
    door::{Door, Keeper},
    server::HTTP_PORT,
    topology::Host,
    wait,
};

/// What is wrong with a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// It refuses 3 % of its connections.
    Refuse,
    /// It answers the handshake 80 ms late.
    Slow,
    /// It resets 10 % of its connections.
    Reset,
}

/// How late a slow release answers.
pub const LATE: Duration = Duration::from_millis(80);

/// Of 65,536 connections, so many are refused by a good release (0.5 %), and by one that refuses
/// (3 %).
const GOOD_REFUSES: u16 = 328;
const REFUSES: u16 = 1966;
/// One in so many connections is reset.
const GOOD_RESETS: u64 = 100;
const RESETS: u64 = 10;

/// The server of one host; stopped on drop.
#[derive(Debug)]
pub struct Faulty {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _keeper: Keeper,
}

impl Faulty {
    /// Starts it on [`HTTP_PORT`] of the host's addresses.
    ///
    /// # Panics
    /// The port is taken, or the host lacks what makes it late.
    #[track_caller]
    pub fn start(host: &Host, fault: Fault) -> Self {
        let door = Door {
            refuses: if fault == Fault::Refuse { REFUSES } else { GOOD_REFUSES },
            late: (fault == Fault::Slow).then_some(LATE),
        };
        let keeper = Keeper::start(host, HTTP_PORT, door);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (addrs, name) = (host.addrs(), host.name.clone());
        let listeners: Vec<TcpListener> = host.namespace.run(|| {
            let addrs = addrs.into_iter().map(|addr| SocketAddr::new(addr, HTTP_PORT));
            let listen = |addr: SocketAddr| {
                let listener = door.listen(addr).unwrap_or_else(|error| panic!("{addr}: {error}"));
                listener.set_nonblocking(true).expect("a listener that does not wait");
                listener
            };
            addrs.map(listen).collect()
        });
        let every = if fault == Fault::Reset { RESETS } else { GOOD_RESETS };
        let thread = host.namespace.spawn_thread("faulty", move || {
            serve(&listeners, every, &Arc::from(name), &stopped);
        });
        Self { stop, thread: Some(thread), _keeper: keeper }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listeners: &[TcpListener], every: u64, name: &Arc<str>, stop: &Arc<AtomicBool>) {
    let mut accepted = 0_u64;
    let at_work = Arc::new(AtomicU64::new(0));
    let mut ready: Vec<PollFd<'_>> =
        listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)).collect();
    while !stop.load(Ordering::Acquire) {
        // To look whether it is to stop.
        let _ = poll(&mut ready, PollTimeout::from(50_u8));
        accept(listeners, name, stop, &at_work, every, &mut accepted);
    }
    // Nobody is left in a namespace that goes.
    while at_work.load(Ordering::Acquire) > 0 {
        thread::sleep(Duration::from_millis(5));
    }
}

fn accept(
    listeners: &[TcpListener],
    name: &Arc<str>,
    stop: &Arc<AtomicBool>,
    at_work: &Arc<AtomicU64>,
    every: u64,
    accepted: &mut u64,
) {
    for listener in listeners {
        while let Ok((stream, _)) = listener.accept() {
            *accepted += 1;
            let resets = accepted.is_multiple_of(every);
            let (name, stop, at_work) = (Arc::clone(name), Arc::clone(stop), Arc::clone(at_work));
            at_work.fetch_add(1, Ordering::AcqRel);
            thread::spawn(move || {
                answer(stream, &name, resets, &stop);
                at_work.fetch_sub(1, Ordering::AcqRel);
            });
        }
    }
}

/// Answers until the client closes; or resets the connection when it has been asked.
fn answer(mut stream: TcpStream, name: &str, resets: bool, stop: &AtomicBool) {
    // To look whether it is to stop.
    let limit = Some(Duration::from_millis(100));
    if stream.set_nonblocking(false).is_err() || stream.set_read_timeout(limit).is_err() {
        return;
    }
    let mut asked = Vec::new();
    let mut buffer = [0; 1024];
    while !stop.load(Ordering::Acquire) {
        match wait::uninterrupted(|| stream.read(&mut buffer)) {
            Ok(0) => return,
            Ok(n) => asked.extend_from_slice(&buffer[..n]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                continue;
            }
            Err(_) => return,
        }
        while let Some(end) = asked.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            asked.drain(..end + 4);
            if resets {
                let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                let _ = setsockopt(&stream, sockopt::Linger, &linger);
                return;
            }
            let length = name.len();
            let text = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{name}");
            if stream.write_all(text.as_bytes()).is_err() {
                return;
            }
        }
    }
}
