//! Clients with addresses of their choice, over blocking sockets of the client's namespace.

use std::{
    io::{self, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect as connect_socket,
    setsockopt, socket, sockopt,
};

use crate::{
    http::{self, Head},
    netns::Namespace,
    wait,
};

/// How long a connection, an answer or a pause within one may take.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// How long a UDP client waits before it asks again.
const UDP_RETRY: Duration = Duration::from_millis(500);

/// How often a UDP client asks.
const UDP_ATTEMPTS: u32 = 6;

/// Opens a TCP connection from a source address; port 0 leaves the port to the kernel.
///
/// Call it on a thread in the namespace ([`Namespace::run`]), or use
/// [`Connection::open`].
///
/// # Errors
/// Those of `bind` and `connect`; `WouldBlock` or `EINPROGRESS` after [`TIMEOUT`], more on an
/// emulated processor.
pub fn connect(source: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    connect_within(TIMEOUT * wait::slowness(), source, to)
}

/// The same with another limit, which holds for the connection's reads and writes too.
///
/// # Errors
/// Those of `bind` and `connect`; `WouldBlock` or `EINPROGRESS` after `limit`.
pub fn connect_within(
    limit: Duration,
    source: SocketAddr,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let fd: OwnedFd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // With a source address but no port, the kernel chooses the port by the
    // whole tuple: tens of thousands for each address.
    setsockopt(&fd, sockopt::IpBindAddressNoPort, &(source.port() == 0))?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    let timeout = nix::sys::time::TimeVal::new(
        i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        i64::from(limit.subsec_micros()),
    );
    // `connect` heeds the send timeout (socket(7)).
    setsockopt(&fd, sockopt::SendTimeout, &timeout)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &timeout)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(source))?;
    let to = SockaddrStorage::from(to);
    wait::uninterrupted(|| Ok(connect_socket(fd.as_raw_fd(), &to)?))?;
    let stream = TcpStream::from(fd);
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A keep-alive HTTP connection.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Opens one from a client address in the client's namespace.
    ///
    /// # Errors
    /// Those of [`connect`].
    pub fn open(client: &Namespace, source: IpAddr, to: SocketAddr) -> io::Result<Self> {
        client.run(|| Self::open_here(source, to))
    }

    /// The same on a thread that is in the namespace already.
    ///
    /// # Errors
    /// Those of [`connect`].
    pub fn open_here(source: IpAddr, to: SocketAddr) -> io::Result<Self> {
        connect(SocketAddr::new(source, 0), to).map(Self::from)
    }

    /// The client's own address and port.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.stream.get_ref().local_addr()
    }

    /// The connection's socket.
    pub fn stream(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    /// Asks for the name of the server.
    ///
    /// # Errors
    /// The connection's, or an answer that is no name.
    pub fn name(&mut self) -> io::Result<String> {
        String::from_utf8(self.get("/")?).map_err(io::Error::other)
    }

    /// `GET`s a small body.
    ///
    /// # Errors
    /// The connection's, or a status that is not 200.
    pub fn get(&mut self, target: &str) -> io::Result<Vec<u8>> {
        http::send(self.stream.get_ref(), target, None)?;
        self.body()
    }

    /// `POST`s a body and returns the one that comes back.
    ///
    /// Bodies larger than the socket buffers of both ends are sent while the
    /// server reads; it answers when it has the whole.
    ///
    /// # Errors
    /// The connection's, or a status that is not 200.
    pub fn post(&mut self, target: &str, body: &[u8]) -> io::Result<Vec<u8>> {
        http::send(self.stream.get_ref(), target, Some(body))?;
        self.body()
    }

    fn body(&mut self) -> io::Result<Vec<u8>> {
        let head = self.head()?;
        let mut body = vec![0; usize::try_from(head.length).map_err(io::Error::other)?];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }

    fn head(&mut self) -> io::Result<Head> {
        let head = http::read_head(&mut self.stream)?;
        if head.status == 200 {
            Ok(head)
        } else {
            Err(io::Error::other(format!("status {}", head.status)))
        }
    }

    /// Downloads `/bytes/N` and checks every byte; `progress` gets the length of each
    /// piece and says whether to go on.
    ///
    /// Returns the number of bytes that came.
    ///
    /// # Errors
    /// The connection's; `InvalidData` at the first wrong byte.
    pub fn download(
        &mut self,
        bytes: u64,
        rate: Option<u64>,
        mut progress: impl FnMut(u64) -> bool,
    ) -> io::Result<u64> {
        let target = match rate {
            Some(rate) => format!("/bytes/{bytes}?rate={rate}"),
            None => format!("/bytes/{bytes}"),
        };
        http::send(self.stream.get_ref(), &target, None)?;
        let length = self.head()?.length;
        if length != bytes {
            return Err(io::Error::other(format!("{length} bytes instead of {bytes}")));
        }
        let mut buffer = vec![0; 64 * 1024];
        let mut offset = 0;
        while offset < bytes {
            let want =
                usize::try_from(bytes - offset).map_or(buffer.len(), |left| left.min(buffer.len()));
            let got = wait::uninterrupted(|| self.stream.read(&mut buffer[..want]))?;
            if got == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("closed after {offset} of {bytes} bytes"),
                ));
            }
            if let Some(at) = http::first_difference(&buffer[..got], offset) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("wrong byte at {at} of {bytes}"),
                ));
            }
            offset += got as u64;
            if !progress(got as u64) {
                break;
            }
        }
        Ok(offset)
    }
}

impl From<TcpStream> for Connection {
    fn from(stream: TcpStream) -> Self {
        Self { stream: BufReader::new(stream) }
    }
}

/// Sends bytes to the TCP echo server while reading them back; returns the server's name.
///
/// # Errors
/// The connection's; `InvalidData` if other bytes come back.
pub fn tcp_echo(stream: TcpStream, payload: &[u8]) -> io::Result<String> {
    use std::io::BufRead as _;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let mut name = String::new();
    reader.read_line(&mut name)?;
    std::thread::scope(|scope| {
        let sent = scope.spawn(move || writer.write_all(payload));
        let mut back = vec![0; payload.len()];
        let read = reader.read_exact(&mut back);
        sent.join().map_err(|_| io::Error::other("the sender panicked"))??;
        read?;
        if back != payload {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "other bytes came back"));
        }
        Ok(name.trim_end().to_owned())
    })
}

/// Asks the TCP echo server for its name on a new connection, and resets it: no
/// tuple is left waiting.
///
/// # Errors
/// Those of [`connect`], or a closed connection.
pub fn tcp_name(source: SocketAddr, to: SocketAddr) -> io::Result<String> {
    use std::io::BufRead as _;
    let stream = connect(source, to)?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, sockopt::Linger, &linger)?;
    let mut name = String::new();
    BufReader::new(stream).read_line(&mut name)?;
    match name.strip_suffix('\n') {
        Some(name) => Ok(name.to_owned()),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before the name")),
    }
}

/// A UDP flow: one socket, connected to the service.
#[derive(Debug)]
pub struct UdpFlow {
    socket: UdpSocket,
}

impl UdpFlow {
    /// Opens one from a client address in the client's namespace.
    ///
    /// # Errors
    /// Those of `bind` and `connect`.
    pub fn open(client: &Namespace, source: SocketAddr, to: SocketAddr) -> io::Result<Self> {
        client.run(|| Self::open_here(source, to))
    }

    /// The same on a thread that is in the namespace already.
    ///
    /// # Errors
    /// Those of `bind` and `connect`.
    pub fn open_here(source: SocketAddr, to: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(source)?;
        socket.connect(to)?;
        Ok(Self { socket })
    }

    /// Its own address and port.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Sends a payload until it comes back; returns the server's name.
    ///
    /// # Errors
    /// The socket's; `TimedOut` after six attempts in three seconds, more on an emulated processor;
    /// `InvalidData` if another payload comes back.
    pub fn ask(&self, payload: &[u8]) -> io::Result<String> {
        let mut buffer = vec![0; 64 * 1024];
        for _ in 0..UDP_ATTEMPTS * wait::slowness() {
            self.socket.send(payload)?;
            let deadline = Instant::now() + UDP_RETRY;
            while let Some(left) =
                deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            {
                self.socket.set_read_timeout(Some(left))?;
                let got = match wait::uninterrupted(|| self.socket.recv(&mut buffer)) {
                    Ok(got) => &buffer[..got],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                };
                let invalid =
                    || io::Error::new(io::ErrorKind::InvalidData, "other bytes came back");
                let end = got.iter().position(|byte| *byte == b'\n').ok_or_else(invalid)?;
                if &got[end + 1..] == payload {
                    return Ok(String::from_utf8_lossy(&got[..end]).into_owned());
                }
                // A late answer to an earlier payload of the same flow.
                if got.len() - end - 1 == payload.len() {
                    return Err(invalid());
                }
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "no answer over UDP"))
    }
}

/// The version in a server's name: `v2` of `v2-1`.
pub fn version_of(server: &str) -> &str {
    server.rsplit_once('-').map_or(server, |(version, _)| version)
}
