//! Connections to a VIP on one backend, for `via = "vip"`.
//!
//! With `dsr` a client's packet reaches its backend with the VIP as its destination and
//! the backend's MAC address, and the backend answers in the VIP's name. A check that
//! goes the same way can't be made with the host's own TCP: the VIP is this host's, so
//! a connection to it would end here, and answers in its name are refused as forgeries
//! (martians). So the packets are sent and received with a packet socket ([`tap`]), and
//! the TCP between is `smoltcp`'s, one stack for each connection.
//!
//! Owns those sockets. Must not know what is said on a connection, nor when.
//!
//! With `ipip` and `gue` packets are wrapped for the backend as clients' are.
//!
//! Packets have a hop limit of 1: a backend that lacks the VIP and forwards packets
//! would send them back here, where they were steered to some backend that has it.

mod tap;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    hash::{BuildHasher as _, RandomState},
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use canary_ebpf_common::{abi, tunnel};
use nix::errno::Errno;
use smoltcp::{
    iface::{self, Interface, SocketHandle, SocketSet},
    phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium},
    socket::tcp,
    time::Instant as StackTime,
    wire::{HardwareAddress, IpCidr},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, watch},
    time::{Instant, Sleep, timeout_at},
};

use self::tap::{Port, Tap};
use super::Failure;
use crate::{
    plan::{NextHop, Tunnel},
    resolve::{Unresolved, Update},
};

/// The least that IPv6 demands of every link (RFC 8200, section 5), and enough here.
const PACKET_BYTES: usize = 1280;
/// What may be on the way to us: the head of an answer, or a server's certificates.
const RECEIVE_BYTES: usize = 8192;
const SEND_BYTES: usize = 4096;
/// A packet socket that nobody has used for so long is closed when another is opened.
const IDLE_SECONDS: u64 = 300;

/// Where a check goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    /// The backend.
    pub(super) backend: IpAddr,
    /// How packets are wrapped for it, if they are.
    pub(super) tunnel: Option<Tunnel>,
    /// The address that has to answer, of the same family.
    pub(super) vip: SocketAddr,
}

/// Opens connections. They share a packet socket for each interface and family.
pub(super) struct Direct {
    hops: watch::Receiver<Update>,
    taps: Mutex<HashMap<(u32, IpAddr), Tap>>,
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direct").finish_non_exhaustive()
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(super) enum NoConnection {
    /// By the backend, or on the way to it.
    Backend(Failure),
    /// By nobody until the deadline.
    Late,
    /// By this host.
    Host(Errno),
}

impl Direct {
    /// One that takes the next hops of backends from `hops`.
    pub(super) fn new(hops: watch::Receiver<Update>) -> Self {
        Self { hops, taps: Mutex::default() }
    }

    /// Whether the backend answers for the VIP: the handshake is reset before it is complete.
    pub(super) async fn touch(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<(), NoConnection> {
        let mut connection = self.begin(target, deadline).await?;
        connection.only_touch = true;
        connection.established(deadline).await
    }

    /// A connection to the VIP on the backend.
    pub(super) async fn connect(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<Connection, NoConnection> {
        let mut connection = self.begin(target, deadline).await?;
        connection.established(deadline).await?;
        Ok(connection)
    }

    async fn begin(&self, target: Target, deadline: Instant) -> Result<Connection, NoConnection> {
        let Target { backend, tunnel, vip } = target;
        let hop = self.hop(backend, deadline).await?;
        let tap = self.tap(&hop).map_err(|error| NoConnection::Host(errno(&error)))?;
        let (port, packets) =
            tap.take_port(vip).map_err(|error| NoConnection::Host(errno(&error)))?;
        let outer = tunnel.map(|tunnel| Outer::new(tunnel, backend, &hop));
        Connection::new(port, packets, Route { mac: hop.destination_mac, outer }, vip)
            .ok_or(NoConnection::Host(Errno::EADDRNOTAVAIL))
    }

    /// The next hop of a backend. One that is just being asked for is waited for, as the
    /// host's own TCP would.
    async fn hop(&self, backend: IpAddr, deadline: Instant) -> Result<NextHop, NoConnection> {
        let mut hops = self.hops.clone();
        let settled = hops.wait_for(|update| {
            !matches!(update.hops.get(&backend), None | Some(Err(Unresolved::Resolving { .. })))
        });
        let found = match timeout_at(deadline, settled).await {
            Ok(Ok(update)) => update.hops.get(&backend).cloned(),
            // Nobody looks next hops up any more: the loop has an alert of its own.
            Ok(Err(_)) => return Err(NoConnection::Host(Errno::ENOLINK)),
            Err(_) => self.hops.borrow().hops.get(&backend).cloned(),
        };
        match found.unwrap_or(Err(Unresolved::NoRoute)) {
            Ok(hop) => Ok(hop),
            Err(why) => Err(NoConnection::Backend(Failure::NoNextHop(why.to_string().into()))),
        }
    }

    fn tap(&self, hop: &NextHop) -> io::Result<Tap> {
        let mut taps = self.taps.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (hop.ifindex, hop.source);
        if let Some(tap) = taps.get(&key) {
            return Ok(tap.clone());
        }
        // Those of interfaces that are gone, or of addresses that are no longer ours.
        taps.retain(|_, tap| tap.idle_seconds() < IDLE_SECONDS);
        let tap = Tap::open(hop.ifindex, hop.source)?;
        taps.insert(key, tap.clone());
        Ok(tap)
    }
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)
}

/// What packets to a backend are wrapped in.
#[derive(Debug)]
struct Outer {
    record: abi::Backend,
    gue: bool,
}

impl Outer {
    fn new(tunnel: Tunnel, backend: IpAddr, hop: &NextHop) -> Self {
        let mut record = abi::Backend {
            addr: abi::address(backend),
            source: abi::address(hop.source),
            flags: if backend.is_ipv6() { abi::BACKEND_V6 } else { 0 },
            ..abi::Backend::default()
        };
        tunnel.outside(&mut record);
        Self { record, gue: tunnel.gue_port.is_some() }
    }
}

/// How packets get to a backend.
#[derive(Debug)]
struct Route {
    mac: [u8; 6],
    outer: Option<Outer>,
}

/// The way of packets between the stack and the packet socket.
struct Wire {
    port: Port,
    to: Route,
    arrived: VecDeque<Bytes>,
}

impl phy::Device for Wire {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: StackTime) -> Option<(Arrived, Outgoing<'_>)> {
        let packet = self.arrived.pop_front()?;
        Some((Arrived(packet), Outgoing { tap: self.port.tap(), to: &self.to }))
    }

    fn transmit(&mut self, _: StackTime) -> Option<Outgoing<'_>> {
        Some(Outgoing { tap: self.port.tap(), to: &self.to })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = PACKET_BYTES;
        // What comes has been verified by the interface, or (between virtual machines) has
        // a sum that is not filled in.
        capabilities.checksum = ChecksumCapabilities::default();
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Arrived(Bytes);

impl phy::RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Outgoing<'a> {
    tap: &'a Tap,
    to: &'a Route,
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        let Route { mac, outer } = self.to;
        if let Some(Outer { record, gue }) = outer {
            match tunnel::wrapped(record, *gue, &packet, 0) {
                Some(whole) => packet = whole,
                None => return result,
            }
        }
        // What can't be sent is lost like any other packet, and sent again.
        if let Err(error) = self.tap.send(*mac, &packet) {
            tracing::debug!(%error, "a packet of a health check can't be sent");
        }
        result
    }
}

/// A TCP connection; reset when it is dropped.
pub(super) struct Connection {
    stack: Interface,
    sockets: SocketSet<'static>,
    socket: SocketHandle,
    wire: Wire,
    packets: mpsc::Receiver<Bytes>,
    timer: Pin<Box<Sleep>>,
    began: Instant,
    /// The backend's answer to the SYN is itself answered with a reset.
    only_touch: bool,
    touched: bool,
}

impl Connection {
    /// Begins one. `None` if its ends can't be ends of a connection.
    fn new(port: Port, packets: mpsc::Receiver<Bytes>, to: Route, vip: SocketAddr) -> Option<Self> {
        let local = port.local();
        let began = Instant::now();
        let mut wire = Wire { port, to, arrived: VecDeque::new() };
        let mut config = iface::Config::new(HardwareAddress::Ip);
        // Sequence numbers begin there.
        config.random_seed = RandomState::new().hash_one(local);
        let mut stack = Interface::new(config, &mut wire, StackTime::ZERO);
        let mut room = true;
        // Everything is on the link: the frame's address says to whom it goes.
        stack.update_ip_addrs(|own| room = own.push(IpCidr::new(local.ip().into(), 0)).is_ok());
        let buffer = |length| tcp::SocketBuffer::new(vec![0; length]);
        let mut socket = tcp::Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES));
        socket.set_hop_limit(Some(1));
        socket.set_nagle_enabled(false);
        let connected = socket.connect(stack.context(), vip, local).is_ok();
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let socket = sockets.add(socket);
        let timer = Box::pin(tokio::time::sleep_until(began));
        let (only_touch, touched) = (false, false);
        (room && connected).then_some(Self {
            stack,
            sockets,
            socket,
            wire,
            packets,
            timer,
            began,
            only_touch,
            touched,
        })
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.socket)
    }

    /// Takes in what has come and sends what is due. `context` is woken when there is more.
    fn work(&mut self, context: &mut Context<'_>) {
        while let Poll::Ready(Some(packet)) = self.packets.poll_recv(context) {
            self.wire.arrived.push_back(packet);
        }
        let now = self.now();
        let Self { stack, sockets, wire, .. } = self;
        while stack.poll_ingress_single(now, wire, sockets) != iface::PollIngressSingleResult::None
        {
        }
        if self.only_touch && self.socket().state() == tcp::State::Established {
            self.touched = true;
            self.socket().abort();
        }
        let Self { stack, sockets, wire, .. } = self;
        while stack.poll_egress(now, wire, sockets) != iface::PollResult::None {}
        if let Some(delay) = stack.poll_delay(now, sockets) {
            let delay = std::time::Duration::from_micros(delay.total_micros());
            self.timer.as_mut().reset(Instant::now() + delay);
            if self.timer.as_mut().poll(context).is_ready() {
                // Due already: in the next round, after the others'.
                context.waker().wake_by_ref();
            }
        }
    }

    fn now(&self) -> StackTime {
        let micros = self.began.elapsed().as_micros();
        StackTime::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    /// Waits for the handshake.
    async fn established(&mut self, deadline: Instant) -> Result<(), NoConnection> {
        let handshake = std::future::poll_fn(|context| {
            self.work(context);
            match self.socket().state() {
                _ if self.touched => Poll::Ready(Ok(())),
                tcp::State::SynSent => Poll::Pending,
                tcp::State::Closed => Poll::Ready(Err(Failure::Connect(Errno::ECONNREFUSED))),
                _ => Poll::Ready(Ok(())),
            }
        });
        let done = timeout_at(deadline, handshake).await.map_err(|_| NoConnection::Late)?;
        done.map_err(NoConnection::Backend)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.socket().abort();
        let now = self.now();
        let Self { stack, sockets, wire, .. } = self;
        while stack.poll_egress(now, wire, sockets) != iface::PollResult::None {}
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.work(context);
        let socket = self.socket();
        let read = socket.recv(|data| {
            let length = data.len().min(buffer.remaining());
            buffer.put_slice(&data[..length]);
            (length, length)
        });
        match read {
            Ok(0) => Poll::Pending,
            Ok(_) => {
                // There may be a larger window to tell.
                self.work(context);
                Poll::Ready(Ok(()))
            }
            Err(tcp::RecvError::Finished) => Poll::Ready(Ok(())),
            Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(Errno::ECONNRESET.into())),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.work(context);
        match self.socket().send_slice(data) {
            Ok(0) if !data.is_empty() => Poll::Pending,
            Ok(length) => {
                self.work(context);
                Poll::Ready(Ok(length))
            }
            Err(tcp::SendError::InvalidState) => Poll::Ready(Err(Errno::ECONNRESET.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was written has been sent as far as the backend's window allows.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().close();
        self.work(context);
        Poll::Ready(Ok(()))
    }
}
