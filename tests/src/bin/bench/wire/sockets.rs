//! Datagrams from real sockets to a real socket: one sender, which gives many sockets' datagrams to
//! the kernel in turn, a receiver, and what stands between.
//!
//! The receiver looks every half millisecond, and reads what has come until then. One that waited
//! would be woken for nearly every datagram by a processor that interrupts the other, which takes
//! longer than all that is compared here.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use canary_tests::{
    stream::{FIRST_PORT, PORTS},
    topology::{CLIENT_V4, VIP_V4},
    wait,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{
    Sample,
    hosts::{At, FORWARDED, Hosts, Service},
    live::{FORWARDING, NFTABLES, REDIRECT},
    stay_on,
};
use crate::cpu::Look;

/// Bytes of a datagram.
const BYTES: usize = 64;

/// Datagrams of one system call of the sender's, all of one socket.
const BURST: usize = 32;

/// Datagrams of one system call of the receiver's.
const READ: usize = 64;

/// How often the receiver looks.
const LOOK: Duration = Duration::from_micros(500);

/// What the receiver's socket holds.
const BUFFER_BYTES: libc::c_int = 8 << 20;

/// So many datagrams come first: a burst of each port.
const WARM: u64 = PORTS as u64 * BURST as u64;

const DSR: Service = Service { forward: "dsr", port: 7001, behind: true };
const NAT: Service = Service { forward: "nat", port: 7002, behind: true };

/// The hosts of all subjects.
pub(super) struct World {
    sockets: u16,
    pub(super) ours: Hosts,
    redirect: Hosts,
    forwarding: Hosts,
    nftables: Option<Hosts>,
}

/// What stands between sender and receiver.
pub(super) struct Subject<'a> {
    pub(super) name: &'static str,
    hosts: &'a Hosts,
    port: u16,
    sockets: u16,
}

impl World {
    pub(super) fn new(with_nftables: bool, sockets: u16) -> Result<Self> {
        // A socket for each port, and some.
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let wanted = u64::from(sockets) + 1024;
        setrlimit(Resource::RLIMIT_NOFILE, soft.max(wanted), hard.max(wanted))
            .context("room for so many sockets")?;
        let hosts = || {
            wait::check();
            let hosts = Hosts::new();
            // Frames that a program sends arrive only where queues are polled: the same for all.
            hosts.poll(At::Backends);
            hosts
        };
        let (ours, mut redirect, forwarding) = (hosts(), hosts(), hosts());
        redirect.redirect()?;
        forwarding.forward();
        let nftables = with_nftables.then(hosts);
        if let Some(nftables) = &nftables {
            nftables.nftables(&[DSR.port])?;
        }
        Ok(Self { sockets, ours, redirect, forwarding, nftables })
    }

    /// What our agent has to be asked for.
    pub(super) const SERVICES: [Service; 2] = [DSR, NAT];

    pub(super) fn subjects(&self) -> Vec<Subject<'_>> {
        let nftables = self.nftables.as_ref().map(|hosts| (NFTABLES, hosts, DSR.port));
        let all = [(FORWARDING, &self.forwarding, DSR.port)].into_iter().chain(nftables).chain([
            (REDIRECT, &self.redirect, DSR.port),
            ("ours, dsr", &self.ours, DSR.port),
            ("ours, nat", &self.ours, NAT.port),
        ]);
        let sockets = self.sockets;
        all.map(|(name, hosts, port)| Subject { name, hosts, port, sockets }).collect()
    }
}

/// Sender and receiver at work, which end with this.
struct Ends {
    over: Arc<AtomicBool>,
    /// Datagrams a second, or 0 for as many as there can be.
    pace: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    sender: Option<JoinHandle<Result<()>>>,
    receiver: Option<JoinHandle<Result<()>>>,
    /// The receiver goes on after the sender has ended.
    deaf: Arc<AtomicBool>,
}

impl Ends {
    fn start(subject: &Subject<'_>) -> Self {
        let flag = || Arc::new(AtomicBool::new(false));
        let number = || Arc::new(AtomicU64::new(0));
        let (over, deaf, pace, sent, received) = (flag(), flag(), number(), number(), number());
        let (port, sockets) = (subject.port, subject.sockets);
        let receiver = {
            let (deaf, received) = (Arc::clone(&deaf), Arc::clone(&received));
            subject.hosts.backends.spawn_thread("receiver", move || receive(port, &deaf, &received))
        };
        let sender = {
            let (over, pace, sent) = (Arc::clone(&over), Arc::clone(&pace), Arc::clone(&sent));
            subject
                .hosts
                .generator
                .spawn_thread("sender", move || send(sockets, port, &over, &pace, &sent))
        };
        let (sender, receiver) = (Some(sender), Some(receiver));
        Self { over, pace, sent, received, sender, receiver, deaf }
    }

    fn end(flag: &AtomicBool, thread: &mut Option<JoinHandle<Result<()>>>) -> Result<()> {
        flag.store(true, Ordering::Relaxed);
        let ended = thread.take().map_or(Ok(Ok(())), JoinHandle::join);
        ended.map_err(|_| anyhow::anyhow!("a socket's thread has panicked"))?
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        // What they would say is said already.
        let _ = Self::end(&self.over, &mut self.sender);
        let _ = Self::end(&self.deaf, &mut self.receiver);
    }
}

impl Subject<'_> {
    /// Sends for a while; so many a second, or as many as there can be.
    pub(super) fn measure(&self, pace: Option<u32>, window: Duration) -> Result<Sample> {
        let mut ends = Ends::start(self);
        let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
        wait::until(self.name, || {
            let ended = |thread: &Option<JoinHandle<_>>| {
                thread.as_ref().is_none_or(JoinHandle::is_finished)
            };
            match count(&ends.received) {
                received if received >= WARM => Ok(Ok(())),
                _ if ended(&ends.sender) || ended(&ends.receiver) => Ok(Err(())),
                received => Err(format!("{received} datagrams of {WARM} have arrived")),
            }
        })
        .or_else(|()| {
            Ends::end(&ends.over, &mut ends.sender)?;
            Ends::end(&ends.deaf, &mut ends.receiver)
        })?;
        ends.pace.store(pace.unwrap_or(0).into(), Ordering::Relaxed);
        let (first, began) = (count(&ends.received), Look::now()?);
        wait::pause_until(Instant::now() + window);
        let (last, ended) = (count(&ends.received), Look::now()?);
        wait::check();
        Ends::end(&ends.over, &mut ends.sender)?;
        let sent = count(&ends.sent);
        let mut all = count(&ends.received);
        // Nothing more for a while, or everything: what is missing is lost.
        let mut quiet = 0;
        wait::until("the last datagrams", || {
            let before = std::mem::replace(&mut all, count(&ends.received));
            quiet = if all == before { quiet + 1 } else { 0 };
            (all == sent || quiet > 10).then_some(()).ok_or_else(|| "more come".to_owned())
        });
        Ends::end(&ends.deaf, &mut ends.receiver)?;
        ensure!(all <= sent, "{}: {all} of {sent} datagrams have arrived", self.name);
        Ok(Sample::new(last - first, &ended.since(&began), sent, all))
    }
}

/// Messages for a system call that takes many: all have the same bytes.
fn messages(count: usize, part: &mut libc::iovec) -> Vec<libc::mmsghdr> {
    // SAFETY: zeroes are a valid `mmsghdr` without address, data and control messages.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = part;
    message.msg_hdr.msg_iovlen = 1;
    vec![message; count]
}

fn send(
    sockets: u16,
    port: u16,
    over: &AtomicBool,
    pace: &AtomicU64,
    sent: &AtomicU64,
) -> Result<()> {
    stay_on(0)?;
    let sockets = (0..sockets).map(|nth| {
        let socket = UdpSocket::bind((CLIENT_V4, FIRST_PORT + nth))?;
        socket.connect((VIP_V4, port))?;
        Ok(socket)
    });
    let sockets: Vec<UdpSocket> = sockets.collect::<io::Result<_>>().context("sockets")?;
    let mut bytes = [0x5a_u8; BYTES];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: BYTES };
    let mut messages = messages(BURST, &mut part);
    let (mut began, mut paced, mut at) = (Instant::now(), 0, 0_u64);
    for socket in sockets.iter().cycle() {
        if over.load(Ordering::Relaxed) || wait::interrupted() {
            break;
        }
        // SAFETY: the messages, and what they point to, outlive the call.
        let done = unsafe {
            libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), BURST as libc::c_uint, 0)
        };
        let done =
            u64::try_from(done).map_err(|_| io::Error::last_os_error()).context("sendmmsg")?;
        sent.fetch_add(done, Ordering::Relaxed);
        let asked = pace.load(Ordering::Relaxed);
        if asked != paced {
            (began, paced, at) = (Instant::now(), asked, 0);
        }
        at += done;
        if paced > 0 {
            let due = began + Duration::from_secs_f64(at as f64 / paced as f64);
            let early = due.saturating_duration_since(Instant::now());
            // As fine as sleeping is worth it.
            if early > Duration::from_micros(500) {
                std::thread::sleep(early);
            }
        }
    }
    Ok(())
}

fn receive(port: u16, over: &AtomicBool, received: &AtomicU64) -> Result<()> {
    let cpus = std::thread::available_parallelism()?.get();
    stay_on(cpus - 1)?;
    let socket = UdpSocket::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
        .with_context(|| format!("the receiver's socket, of {FORWARDED} too"))?;
    nix::sys::socket::setsockopt(
        &socket,
        nix::sys::socket::sockopt::RcvBufForce,
        &(BUFFER_BYTES as usize),
    )?;
    let mut bytes = [0_u8; BYTES];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: BYTES };
    let mut messages = messages(READ, &mut part);
    while !over.load(Ordering::Relaxed) && !wait::interrupted() {
        // SAFETY: the messages, and what they point to, outlive the call.
        let done = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                READ as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        match u64::try_from(done) {
            Ok(done) => received.fetch_add(done, Ordering::Relaxed),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(LOOK);
                    continue;
                }
                error => return Err(error).context("recvmmsg"),
            },
        };
    }
    Ok(())
}
