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

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::{Either, select};
use http_body_util::Empty;
use hyper::{
    Method, Request, Response, Uri,
    body::Incoming,
    client::conn::http1,
    header::{ACCEPT, CONNECTION, HOST, HeaderValue, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use tokio::{
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout_at},
};

use super::{Failure, Outcome};
use crate::config::model::{Health, Timing};

/// An answer's head is at most as large as this (the least that hyper takes) …
const HEAD_BYTES_MAX: usize = 8192;
/// … and has at most so many fields.
const FIELDS_MAX: usize = 100;

/// What identifies the checks in a server's log.
const NAME: &str = concat!("canary-agent/", env!("CARGO_PKG_VERSION"), " (health check)");

/// A check, ready to be carried out any number of times. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    addr: SocketAddr,
    timeout: Duration,
    http: Option<Arc<Http>>,
}

#[derive(Debug)]
struct Http {
    /// `None` for what is not a request target.
    target: Option<Uri>,
    host: HeaderValue,
    expect: Vec<u16>,
}

impl Probe {
    /// That of a backend, with its timing. `None` where there is nothing to check.
    pub(super) fn new(addr: SocketAddr, health: &Health) -> Option<(Self, Timing)> {
        let (timing, http) = match health {
            Health::None => return None,
            Health::Tcp(timing) => (timing, None),
            Health::Http { path, expect, timing } => {
                // An address always is a header value.
                let host = HeaderValue::try_from(addr.to_string()).ok()?;
                let http = Http { target: path.parse().ok(), host, expect: expect.clone() };
                (timing, Some(Arc::new(http)))
            }
        };
        Some((Self { addr, timeout: timing.timeout, http }, *timing))
    }

    /// Carries it out.
    pub(super) async fn run(self) -> Outcome {
        let begun = Instant::now();
        let done = match &self.http {
            None => self.tcp(begun + self.timeout).await,
            Some(http) => self.http(http, begun + self.timeout).await,
        };
        match done {
            Ok(()) => Outcome::Passed(begun.elapsed()),
            Err(Trouble::Backend(failure)) => Outcome::Failed(failure),
            Err(Trouble::Host(errno)) => Outcome::NotChecked(errno),
        }
    }

    async fn tcp(&self, deadline: Instant) -> Result<(), Trouble> {
        let socket = self.socket()?;
        socket2::SockRef::from(&socket).set_tcp_quickack(false).map_err(|e| host(&e))?;
        self.connect(socket, deadline).await.map(drop)
    }

    async fn http(&self, http: &Http, deadline: Instant) -> Result<(), Trouble> {
        let Some(target) = &http.target else {
            return Err(Failure::Path.into());
        };
        let request = Request::builder()
            .method(Method::GET)
            .uri(target.clone())
            .header(HOST, http.host.clone())
            .header(USER_AGENT, HeaderValue::from_static(NAME))
            .header(ACCEPT, HeaderValue::from_static("*/*"))
            .header(CONNECTION, HeaderValue::from_static("close"))
            .body(Empty::<Bytes>::new())
            .map_err(|_| Failure::Path)?;
        let stream = self.connect(self.socket()?, deadline).await?;
        let answer = timeout_at(deadline, exchange(stream, request)).await;
        let status = answer.map_err(|_| Failure::NoAnswer(self.timeout))??.status().as_u16();
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
            Err(_) => Err(Failure::NoConnection(self.timeout).into()),
        }
    }
}

/// Why there is no pass, and whose trouble that is.
#[derive(Clone, Copy, Debug)]
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
    stream: TcpStream,
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
        if let Some(broken) = inner.downcast_ref::<io::Error>()
            && broken.raw_os_error().is_some()
        {
            return Failure::Broken(errno(broken));
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
