//! What a connection of its own TCP needs of the host: a packet socket on an interface,
//! and ports that the host's TCP leaves alone.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
    task::AbortHandle,
};

/// Protocol number (RFC 9293).
const TCP: u8 = 6;
/// Packets that may wait for one check: more than a window of 8 KiB can bring.
const QUEUE: usize = 32;
/// A packet that the kernel has put together out of many is at most as large as this.
const PACKET_BYTES_MAX: usize = 65_536;
/// Bytes; room for a thousand packets, each of which may count for a page or two. Answers to
/// 256 checks can come while the reader waits for a processor, and one that is lost is
/// missed for a second.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Packets read before others get their turn: many, as among a thousand checks that wait
/// for them the reader has but one turn.
const AT_A_TIME: usize = 1024;
/// With more VIPs than these the filter lets any source through: it would be long.
const VIPS_MAX: usize = 64;
/// How long a port is held after its connection: what the backend sent before our reset
/// reached it is still on the way.
const LINGER: Duration = Duration::from_secs(1);
/// So many ports are held after their connections; of more, the oldest go.
const LINGERING_MAX: usize = 256;
/// Accepts a packet whole.
const WHOLE: u32 = 0x0004_0000;

// linux/bpf_common.h: classes, sizes, modes and jumps of the classic filter language.
const LOAD_WORD: u16 = 0x20;
const LOAD_BYTE: u16 = 0x30;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

fn step(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

/// Goes on if what was loaded is `k`, else passes over `otherwise` steps.
fn equals(k: u32, otherwise: u8) -> libc::sock_filter {
    libc::sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: otherwise, k }
}

fn words(address: IpAddr) -> Vec<u32> {
    match address {
        IpAddr::V4(v4) => vec![u32::from(v4)],
        IpAddr::V6(v6) => {
            v6.octets().as_chunks::<4>().0.iter().map(|word| u32::from_be_bytes(*word)).collect()
        }
    }
}

/// Goes on behind itself where the address at `offset` is `address`, else `beyond` steps
/// further.
fn address_is(offset: u32, address: IpAddr, beyond: u8) -> Vec<libc::sock_filter> {
    let words = words(address);
    let count = words.len() as u8;
    let steps = (0_u8..).zip(words).flat_map(|(at, word)| {
        [step(LOAD_WORD, offset + 4 * u32::from(at)), equals(word, 2 * (count - 1 - at) + beyond)]
    });
    steps.collect()
}

/// Accepts TCP from one of `vips` to `own`; of packets that begin with the IP header.
fn filter(own: IpAddr, vips: &BTreeSet<IpAddr>) -> Vec<libc::sock_filter> {
    // Offsets of protocol, source and destination (RFC 791, RFC 8200).
    let (protocol, source, destination) = if own.is_ipv4() { (9, 12, 16) } else { (6, 8, 24) };
    let drop = || step(RETURN, 0);
    // Over the accepting step, to the dropping one.
    let mut steps = vec![step(LOAD_BYTE, protocol), equals(TCP.into(), 0)];
    let wanted = address_is(destination, own, 1);
    steps[1].jf = wanted.len() as u8 + 1;
    steps.extend(wanted);
    // A jump over one step leads here or to the drop.
    steps.extend([libc::sock_filter { code: 0x05, jt: 0, jf: 0, k: 1 }, drop()]);
    if vips.len() > VIPS_MAX {
        steps.push(step(RETURN, WHOLE));
        return steps;
    }
    for vip in vips {
        steps.extend(address_is(source, *vip, 1));
        steps.push(step(RETURN, WHOLE));
    }
    steps.push(drop());
    steps
}

fn attach(socket: SockRef<'_>, steps: &[libc::sock_filter]) -> io::Result<()> {
    let steps: Vec<_> =
        steps.iter().map(|step| SockFilter::new(step.code, step.jt, step.jf, step.k)).collect();
    socket.attach_filter(&steps)
}

fn link_address(ifindex: u32, own: IpAddr, to: [u8; 6]) -> io::Result<libc::sockaddr_ll> {
    let ether_type = if own.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 } as u16;
    // SAFETY: `sockaddr_ll` is integers only, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ether_type.to_be();
    address.sll_ifindex = i32::try_from(ifindex).map_err(io::Error::other)?;
    address.sll_halen = 6;
    address.sll_addr[..6].copy_from_slice(&to);
    Ok(address)
}

/// Who waits for packets, by local port.
type Waiting = HashMap<u16, (SocketAddr, mpsc::Sender<Bytes>)>;

struct Inner {
    fd: AsyncFd<OwnedFd>,
    ifindex: u32,
    own: IpAddr,
    waiting: Mutex<Waiting>,
    vips: Mutex<BTreeSet<IpAddr>>,
    /// What holds the ports of connections that are over, with their ends, the oldest first.
    lingering: Mutex<VecDeque<(Instant, Socket)>>,
    opened: Instant,
    /// Seconds from `opened` to its last use.
    used: AtomicU64,
}

/// A packet socket on one interface that gets what VIPs answer to one of our addresses.
#[derive(Clone)]
pub(super) struct Tap {
    inner: Arc<Inner>,
    _reader: Arc<Reader>,
}

struct Reader(AbortHandle);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Tap {
    /// Opens it in the network namespace of the calling thread.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) fn open(ifindex: u32, own: IpAddr) -> io::Result<Self> {
        // Nothing is received before there is a filter and a protocol.
        let socket = nix::sys::socket::socket(
            AddressFamily::Packet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        attach(SockRef::from(&socket), &[step(RETURN, 0)])?;
        // Beyond rmem_max where we may, else up to it.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        }
        let address = link_address(ifindex, own, [0; 6])?;
        // SAFETY: the pointer is to a live value of the length that goes with it.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: an `OwnedFd` names the same descriptor for as long as it lives.
        let fd = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        let inner = Arc::new(Inner {
            fd,
            ifindex,
            own,
            waiting: Mutex::default(),
            vips: Mutex::default(),
            lingering: Mutex::default(),
            opened: Instant::now(),
            used: AtomicU64::new(0),
        });
        let reader = tokio::spawn(read(Arc::clone(&inner))).abort_handle();
        Ok(Self { inner, _reader: Arc::new(Reader(reader)) })
    }

    /// Seconds since somebody took a port.
    pub(super) fn idle_seconds(&self) -> u64 {
        let used = self.inner.used.load(Ordering::Relaxed);
        self.inner.opened.elapsed().as_secs().saturating_sub(used)
    }

    /// Takes a port for a connection to `peer`.
    ///
    /// The kernel chooses it, so it is nobody else's and none that is reserved. What holds it
    /// is a listening socket that discards everything: to the host's TCP the answers of a VIP
    /// belong to nobody (or, where the VIP is the host's own address, can't be), and without
    /// it might be answered with a reset.
    pub(super) fn take_port(&self, peer: SocketAddr) -> io::Result<(Port, mpsc::Receiver<Bytes>)> {
        let Inner { own, waiting, vips, opened, used, fd, .. } = &*self.inner;
        used.store(opened.elapsed().as_secs(), Ordering::Relaxed);
        {
            let mut vips = lock(vips);
            if vips.insert(peer.ip()) {
                attach(SockRef::from(fd.get_ref()), &filter(*own, &vips))?;
            }
        }
        let held = Socket::new(Domain::for_address(peer), Type::STREAM, Some(Protocol::TCP))?;
        attach(SockRef::from(&held), &[step(RETURN, 0)])?;
        held.bind(&SocketAddr::new(*own, 0).into())?;
        held.listen(1)?;
        let local = held.local_addr()?.as_socket();
        let local = local.ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?;
        let (send, receive) = mpsc::channel(QUEUE);
        lock(waiting).insert(local.port(), (peer, send));
        Ok((Port { tap: self.clone(), local, held: Some(held) }, receive))
    }

    /// Sends an IP packet to a MAC address.
    pub(super) fn send(&self, to: [u8; 6], packet: &[u8]) -> io::Result<()> {
        let address = link_address(self.inner.ifindex, self.inner.own, to)?;
        // SAFETY: both pointers are to live values of the lengths that go with them, and the
        // kernel only reads from them.
        let sent = unsafe {
            libc::sendto(
                self.inner.fd.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A local port; free again a while after it is dropped.
pub(super) struct Port {
    tap: Tap,
    local: SocketAddr,
    /// There until it is dropped.
    held: Option<Socket>,
}

impl Port {
    /// The local end.
    pub(super) fn local(&self) -> SocketAddr {
        self.local
    }

    /// Where its packets go out.
    pub(super) fn tap(&self) -> &Tap {
        &self.tap
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        lock(&self.tap.inner.waiting).remove(&self.local.port());
        let mut lingering = lock(&self.tap.inner.lingering);
        let now = Instant::now();
        lingering.extend(self.held.take().map(|held| (now, held)));
        let over = |(end, _): &(Instant, Socket)| now.duration_since(*end) > LINGER;
        while lingering.len() > LINGERING_MAX || lingering.front().is_some_and(over) {
            lingering.pop_front();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands every packet to whom it is for.
async fn read(inner: Arc<Inner>) {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    while let Ok(mut ready) = inner.fd.readable().await {
        for _ in 0..AT_A_TIME {
            let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
            match nix::sys::socket::recv(inner.fd.as_raw_fd(), &mut buffer, flags) {
                Ok(length) => deliver(&inner, &buffer[..length]),
                Err(nix::errno::Errno::EAGAIN) => {
                    ready.clear_ready();
                    break;
                }
                // The interface went down; what comes when it is up again is received.
                Err(_) => {}
            }
        }
        tokio::task::yield_now().await;
    }
}

fn deliver(inner: &Inner, packet: &[u8]) {
    let Some((from, port)) = ends(packet) else {
        return;
    };
    let waiting = lock(&inner.waiting);
    if let Some((peer, send)) = waiting.get(&port)
        && *peer == from
    {
        // One too many is lost like any other packet, and sent again.
        let _ = send.try_send(Bytes::copy_from_slice(packet));
    }
}

/// Source and destination port of a TCP packet without IPv6 extension headers.
fn ends(packet: &[u8]) -> Option<(SocketAddr, u16)> {
    let (source, tcp): (IpAddr, _) = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&TCP) => {
            let header = usize::from(packet[0] & 0xf) * 4;
            (packet.get(12..16)?.first_chunk::<4>().copied()?.into(), packet.get(header..)?)
        }
        6 if packet.get(6) == Some(&TCP) => {
            (packet.get(8..24)?.first_chunk::<16>().copied()?.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(*tcp.get(at..)?.first_chunk()?));
    Some((SocketAddr::new(source, port(0)?), port(2)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a filter says of a packet, by the language's definition.
    fn run(steps: &[libc::sock_filter], packet: &[u8]) -> bool {
        let (mut at, mut value) = (0_usize, 0_u32);
        loop {
            let libc::sock_filter { code, jt, jf, k } = steps[at];
            at += 1;
            let offset = k as usize;
            match code {
                LOAD_BYTE => match packet.get(offset) {
                    Some(byte) => value = u32::from(*byte),
                    None => return false,
                },
                LOAD_WORD => match packet.get(offset..).and_then(|p| p.first_chunk()) {
                    Some(word) => value = u32::from_be_bytes(*word),
                    None => return false,
                },
                JUMP_IF_EQUAL => at += usize::from(if value == k { jt } else { jf }),
                0x05 => at += offset,
                RETURN => return k > 0,
                _ => panic!("{code:#x}"),
            }
        }
    }

    fn packet(source: IpAddr, destination: IpAddr, protocol: u8) -> Vec<u8> {
        let mut packet = vec![0; 60];
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                (packet[0], packet[9]) = (0x45, protocol);
                packet[12..16].copy_from_slice(&source.octets());
                packet[16..20].copy_from_slice(&destination.octets());
                packet[20..24].copy_from_slice(&[1, 187, 0x80, 1]);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                (packet[0], packet[6]) = (0x60, protocol);
                packet[8..24].copy_from_slice(&source.octets());
                packet[24..40].copy_from_slice(&destination.octets());
                packet[40..44].copy_from_slice(&[1, 187, 0x80, 1]);
            }
            _ => panic!("two families"),
        }
        packet
    }

    #[test]
    fn the_filter_lets_tcp_from_vips_to_us_through_and_nothing_else() {
        for (own, vip, other) in
            [("10.0.0.1", "203.0.113.1", "10.0.0.9"), ("fd00::1", "2001:db8::1", "2001:db8::9")]
        {
            let [own, vip, other]: [IpAddr; 3] = [own, vip, other].map(|a| a.parse().unwrap());
            let numbered = |n: u8| match vip {
                IpAddr::V4(_) => IpAddr::from([203, 0, 113, n]),
                IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(n)]),
            };
            for count in [1, 2, VIPS_MAX as u8, VIPS_MAX as u8 + 1] {
                let vips = (1..=count).map(numbered).collect();
                let steps = filter(own, &vips);
                let many = usize::from(count) > VIPS_MAX;
                for n in 1..=count {
                    assert!(run(&steps, &packet(numbered(n), own, TCP)), "{n} of {count}");
                }
                assert_eq!(run(&steps, &packet(numbered(200), own, TCP)), many);
                assert!(!run(&steps, &packet(vip, other, TCP)), "not to us");
                assert!(!run(&steps, &packet(vip, own, 17)), "not TCP");
                assert!(!run(&steps, &[]));
                assert!(steps.len() < 4096, "as long as the kernel takes");
            }
            assert!(!run(&filter(own, &BTreeSet::new()), &packet(vip, own, TCP)));
            let expected = Some((SocketAddr::new(vip, 443), 0x8001));
            assert_eq!(ends(&packet(vip, own, TCP)), expected);
            assert_eq!(ends(&packet(vip, own, 17)), None);
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_no_trouble(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = ends(&bytes);
        }
    }
}
