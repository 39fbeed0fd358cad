//! One check: a connection, and with `http` one request on it.
//!
//! Every connection ends with a reset (`SO_LINGER` 0) rather than in good order.
//! The side that closes first keeps the connection for a minute in `TIME_WAIT`, so
//! ten thousand backends would keep a third of a million; and a backend that dies
//! in the middle would leave a connection that is retried for minutes.
//!
//! With `tcp` the reset is even what answers the backend's SYN-ACK, since the ACK
//! is put off (`TCP_QUICKACK` 0; HAProxy checks in the same way). So the backend's
//! kernel gives its answer, a full backlog still shows as silence, and the server
//! program is never woken: nothing in its log, no slot of it taken. With `http` the
//! head of the answer decides; its body is not waited for.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use futures::future::{Either, select};
use http_body_util::Empty;
use hyper::{
    Method as Verb, Request, Response, Uri,
    body::Incoming,
    client::conn::http1,
    header::{ACCEPT, CONNECTION, HOST, HeaderValue, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout_at},
};
use tokio_rustls::rustls::pki_types::ServerName;

use super::{
    Failure, Outcome,
    direct::{self, Direct, NoConnection},
    secure::{self, Secure},
};
use crate::{
    config::model::{self, Ask, Health, Timing, Via},
    plan::Tunnel,
};

/// An answer's head is at most as large as this (the least that hyper takes) …
const HEAD_BYTES_MAX: usize = 8192;
/// … and has at most so many fields.
const FIELDS_MAX: usize = 100;

/// What identifies the checks in a server's log.
const NAME: &str = concat!("canary-agent/", env!("CARGO_PKG_VERSION"), " (health check)");

/// What the checks of all backends of a service have in common.
#[derive(Debug)]
pub(super) struct Method {
    timing: Timing,
    http: Option<Http>,
    via: Way,
}

/// How a backend is connected to.
#[derive(Debug)]
enum Way {
    /// At its own address, with the host's TCP.
    Backend,
    /// At the service's addresses.
    Vip(Arc<Direct>),
}

#[derive(Debug)]
struct Http {
    /// `None` for what is not a request target.
    target: Option<Uri>,
    /// `None`: the address that is connected to.
    host: Option<Name>,
    expect: Vec<u16>,
    tls: Option<Secure>,
}

#[derive(Clone, Debug)]
struct Name {
    header: HeaderValue,
    server: ServerName<'static>,
}

impl Method {
    /// The method of a service. `None` where there is nothing to check.
    pub(super) fn new(health: &Health, direct: &Arc<Direct>) -> Option<Self> {
        let Health::Check(model::Check { ask, via, timing }) = health else {
            return None;
        };
        let http = match ask {
            Ask::Tcp => None,
            Ask::Http(http) => Some(Http::new(http)?),
        };
        let via = match via {
            Via::Backend => Way::Backend,
            Via::Vip => Way::Vip(Arc::clone(direct)),
        };
        Some(Self { timing: *timing, http, via })
    }

    /// When and how often it is carried out.
    pub(super) fn timing(&self) -> Timing {
        self.timing
    }
}

impl Http {
    fn new(http: &model::Http) -> Option<Self> {
        let model::Http { path, expect, host, tls } = http;
        // The configuration has made sure that a name is one.
        let host = match host {
            Some(host) => Some(Name {
                header: HeaderValue::try_from(host).ok()?,
                server: ServerName::try_from(host.clone()).ok()?,
            }),
            None => None,
        };
        let tls = match tls.as_ref().map(Secure::new).transpose() {
            Ok(tls) => tls,
            Err(error) => {
                tracing::error!(%error, "health checks with TLS can't be had");
                return None;
            }
        };
        Some(Self { target: path.parse().ok(), host, expect: expect.clone(), tls })
    }

    fn name(&self, addr: SocketAddr) -> Result<Name, Failure> {
        if let Some(name) = &self.host {
            return Ok(name.clone());
        }
        let server = ServerName::from(addr.ip());
        // An address always is a header value.
        let header = HeaderValue::try_from(addr.to_string()).map_err(|_| Failure::Path)?;
        Ok(Name { header, server })
    }

    fn request(&self, name: &Name) -> Result<Request<Empty<Bytes>>, Failure> {
        let target = self.target.clone().ok_or(Failure::Path)?;
        Request::builder()
            .method(Verb::GET)
            .uri(target)
            .header(HOST, name.header.clone())
            .header(USER_AGENT, HeaderValue::from_static(NAME))
            .header(ACCEPT, HeaderValue::from_static("*/*"))
            .header(CONNECTION, HeaderValue::from_static("close"))
            .body(Empty::new())
            .map_err(|_| Failure::Path)
    }

    /// Asks on a connection. Returns the status of the answer.
    async fn ask<S: Stream>(
        &self,
        name: Name,
        request: Request<Empty<Bytes>>,
        stream: S,
    ) -> Result<u16, Failure> {
        let answer = match &self.tls {
            None => exchange(stream, request).await?,
            Some(tls) => {
                let secured = tls.connect(name.server, stream).await;
                exchange(secured.map_err(|error| broken(&error))?, request).await?
            }
        };
        Ok(answer.status().as_u16())
    }
}

/// A check, ready to be carried out any number of times. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    addr: SocketAddr,
    vips: Arc<[IpAddr]>,
    tunnel: Option<Tunnel>,
    method: Arc<Method>,
}

impl Probe {
    /// That of a backend, whose service has the addresses `vips` of its family.
    pub(super) fn new(
        addr: SocketAddr,
        vips: Arc<[IpAddr]>,
        tunnel: Option<Tunnel>,
        method: Arc<Method>,
    ) -> Self {
        Self { addr, vips, tunnel, method }
    }

    /// Carries it out.
    pub(super) async fn run(self) -> Outcome {
        let begun = Instant::now();
        let done = match &self.method.via {
            Way::Backend => self.at_backend().await,
            Way::Vip(direct) => self.at_vips(direct).await,
        };
        match done {
            Ok(()) => Outcome::Passed(begun.elapsed()),
            Err(Trouble::Backend(failure)) => Outcome::Failed(failure),
            Err(Trouble::Host(errno)) => Outcome::NotChecked(errno),
        }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.method.timing.timeout
    }

    async fn at_backend(&self) -> Result<(), Trouble> {
        let deadline = self.deadline();
        let socket = self.socket()?;
        if self.method.http.is_none() {
            socket2::SockRef::from(&socket).set_tcp_quickack(false).map_err(|e| host(&e))?;
            return self.connect(socket, deadline).await.map(drop);
        }
        self.http(self.addr, deadline, self.connect(socket, deadline)).await
    }

    /// At each in turn, so that a backend that is dead costs one timeout.
    async fn at_vips(&self, direct: &Direct) -> Result<(), Trouble> {
        for vip in &*self.vips {
            let to = SocketAddr::new(*vip, self.addr.port());
            self.at_vip(direct, to).await.map_err(|trouble| match trouble {
                Trouble::Backend(failure) => {
                    Failure::ThroughVip { vip: *vip, failure: Arc::new(failure) }.into()
                }
                host @ Trouble::Host(_) => host,
            })?;
        }
        Ok(())
    }

    async fn at_vip(&self, direct: &Direct, to: SocketAddr) -> Result<(), Trouble> {
        let deadline = self.deadline();
        let target = direct::Target { backend: self.addr.ip(), tunnel: self.tunnel, vip: to };
        let trouble = |error| match error {
            NoConnection::Backend(failure) => Trouble::Backend(failure),
            NoConnection::Late => Failure::NoConnection(self.method.timing.timeout).into(),
            NoConnection::Host(errno) => Trouble::Host(errno),
        };
        if self.method.http.is_none() {
            return direct.touch(target, deadline).await.map_err(trouble);
        }
        let connection = async { direct.connect(target, deadline).await.map_err(trouble) };
        self.http(to, deadline, connection).await
    }

    /// Asks `to` on the connection that `connect` makes.
    async fn http<S: Stream>(
        &self,
        to: SocketAddr,
        deadline: Instant,
        connect: impl Future<Output = Result<S, Trouble>>,
    ) -> Result<(), Trouble> {
        let Some(http) = &self.method.http else {
            return Ok(());
        };
        let name = http.name(to)?;
        let request = http.request(&name)?;
        let stream = connect.await?;
        let answer = timeout_at(deadline, http.ask(name, request, stream)).await;
        let status = answer.map_err(|_| Failure::NoAnswer(self.method.timing.timeout))??;
        match http.expect.contains(&status) {
            true => Ok(()),
            false => Err(Failure::Status(status).into()),
        }
    }

    fn socket(&self) -> Result<TcpSocket, Trouble> {
        let socket = match self.addr {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        let socket = socket.map_err(|e| host(&e))?;
        socket.set_zero_linger().map_err(|e| host(&e))?;
        Ok(socket)
    }

    async fn connect(&self, socket: TcpSocket, deadline: Instant) -> Result<TcpStream, Trouble> {
        match timeout_at(deadline, socket.connect(self.addr)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(match errno(&error) {
                errno @ (Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOBUFS
                | Errno::ENOMEM
                | Errno::EAGAIN
                | Errno::EADDRNOTAVAIL) => Trouble::Host(errno),
                errno => Failure::Connect(errno).into(),
            }),
            Err(_) => Err(Failure::NoConnection(self.method.timing.timeout).into()),
        }
    }
}

/// What a request can be sent on.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// Why there is no pass, and whose trouble that is.
#[derive(Clone, Debug)]
enum Trouble {
    Backend(Failure),
    Host(Errno),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Backend(failure)
    }
}

fn host(error: &io::Error) -> Trouble {
    Trouble::Host(errno(error))
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)
}

/// Sends a request and returns the head of the answer. The connection ends with it.
async fn exchange(
    stream: impl Stream,
    request: Request<Empty<Bytes>>,
) -> Result<Response<Incoming>, Failure> {
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(FIELDS_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failure(&error))?;
    let answer = Box::pin(sender.send_request(request));
    // Whichever is first: a connection that has ended may have brought the answer before.
    match select(answer, Box::pin(connection)).await {
        Either::Left((answer, _)) => answer.map_err(|error| failure(&error)),
        Either::Right((ended, answer)) => {
            answer.await.map_err(|error| failure(ended.as_ref().err().unwrap_or(&error)))
        }
    }
}

fn failure(error: &hyper::Error) -> Failure {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return broken(io);
        }
        source = inner.source();
    }
    if error.is_parse_too_large() {
        Failure::TooLarge
    } else if error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
        Failure::Closed
    } else {
        Failure::NotHttp
    }
}

/// What an error on an open connection says.
fn broken(error: &io::Error) -> Failure {
    match (error.raw_os_error(), secure::explained(error)) {
        (Some(errno), _) => Failure::Broken(Errno::from_raw(errno)),
        (None, Some(said)) => Failure::Tls(said.into()),
        // With TLS the end of a connection is an error where nobody has announced it.
        (None, None) => Failure::Closed,
    }
}
