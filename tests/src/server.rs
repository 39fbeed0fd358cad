//! Real servers on the backends: HTTP/1.1, chatter, TCP echo and UDP echo.
//!
//! Every answer names its server, so that a client knows where it was steered:
//!
//! - HTTP on [`HTTP_PORT`], keep-alive: `GET /…` answers with the server's name;
//!   `GET /bytes/N[?rate=BYTES_PER_SECOND]` streams the bytes of
//!   [`crate::http::fill`]; `POST` answers with the body it got; `GET /healthz`
//!   answers 503 while [`Server::set_healthy`] says so. All carry the name in the
//!   header `x-server`. `Upgrade: chatter` makes a connection one of [`crate::chatter`].
//! - TCP echo on [`ECHO_PORT`]: the name and a newline, then every byte back.
//! - UDP echo on [`ECHO_PORT`]: the name, a newline, and the datagram's payload,
//!   from the address that it was sent to.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    task::{Context, Poll, ready},
    thread::JoinHandle,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full};
use hyper::{
    Method, Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    header,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::watch,
    task::JoinSet,
    time::{Instant, Sleep, sleep_until},
};

use crate::{chatter, http::fill, model::Random, pulse::Pulse, topology::Host};

/// Port of the HTTP server.
pub const HTTP_PORT: u16 = 80;

/// Port of the echo servers, TCP and UDP (RFC 862).
pub const ECHO_PORT: u16 = 7;

/// Where health checks ask.
pub const HEALTH_PATH: &str = "/healthz";

/// The header of every answer that holds the server's name.
pub const SERVER_HEADER: &str = "x-server";

/// Bytes of a chunk of `/bytes/N`.
const CHUNK_BYTES: u64 = 16 * 1024;

/// Chunks a second of a slowed `/bytes/N`, so that it flows steadily.
const CHUNKS_PER_SECOND: u64 = 20;

/// The servers of one backend, on all its addresses; stopped on drop.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    stop: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts HTTP on [`HTTP_PORT`] and the echo servers on [`ECHO_PORT`].
    ///
    /// # Panics
    /// A port is taken.
    #[track_caller]
    pub fn start(host: &Host) -> Self {
        Self::start_on(host, HTTP_PORT, ECHO_PORT)
    }

    /// Starts them on other ports.
    ///
    /// # Panics
    /// A port is taken.
    #[track_caller]
    pub fn start_on(host: &Host, http_port: u16, echo_port: u16) -> Self {
        let shared = Arc::new(Shared {
            name: host.name.clone(),
            requests: AtomicU64::new(0),
            unhealthy: AtomicBool::new(false),
            pulse: Pulse::default(),
        });
        let addrs = host.addrs();
        let (stop, stopped) = watch::channel(());
        let (report, started) = mpsc::channel();
        let serving = Arc::clone(&shared);
        let thread = host.namespace.spawn_thread(&host.name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("no runtime");
            runtime.block_on(serve(serving, addrs, http_port, echo_port, stopped, report));
        });
        let server = Self { shared, stop: Some(stop), thread: Some(thread) };
        match started.recv() {
            Ok(Ok(())) => server,
            Ok(Err(error)) => panic!("{}: {error}", server.name()),
            Err(_) => panic!("{}: the server's thread ended", server.name()),
        }
    }

    /// Starts the servers of all hosts.
    ///
    /// # Panics
    /// A port is taken.
    #[track_caller]
    pub fn start_all(hosts: &[Host]) -> Vec<Self> {
        hosts.iter().map(Self::start).collect()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// HTTP requests answered, TCP echo connections and UDP datagrams, together.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Says whether `GET /healthz` is answered with 200 or 503; nothing else changes.
    pub fn set_healthy(&self, healthy: bool) {
        self.shared.unhealthy.store(!healthy, Ordering::Relaxed);
    }

    /// When its thread stood still.
    pub fn pulse(&self) -> SharedPulse {
        SharedPulse(Arc::clone(&self.shared))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A server that panicked has said so; its clients have noticed.
            let _ = thread.join();
        }
    }
}

/// A server's pulse, which outlives the server.
#[derive(Clone, Debug)]
pub struct SharedPulse(Arc<Shared>);

impl std::ops::Deref for SharedPulse {
    type Target = Pulse;

    fn deref(&self) -> &Pulse {
        &self.0.pulse
    }
}

#[derive(Debug)]
struct Shared {
    name: String,
    requests: AtomicU64,
    unhealthy: AtomicBool,
    pulse: Pulse,
}

impl Shared {
    fn count(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}

async fn serve(
    shared: Arc<Shared>,
    addrs: Vec<IpAddr>,
    http_port: u16,
    echo_port: u16,
    mut stopped: watch::Receiver<()>,
    report: mpsc::Sender<io::Result<()>>,
) {
    let mut tasks = JoinSet::new();
    let started = listen(&shared, &addrs, http_port, echo_port, &mut tasks).await;
    let failed = started.is_err();
    if report.send(started).is_err() || failed {
        return;
    }
    // Dropped when the server is: then the tasks end with their connections.
    tokio::select! {
        _ = stopped.changed() => {}
        () = shared.pulse.beat() => {}
    }
    tasks.shutdown().await;
}

async fn listen(
    shared: &Arc<Shared>,
    addrs: &[IpAddr],
    http_port: u16,
    echo_port: u16,
    tasks: &mut JoinSet<()>,
) -> io::Result<()> {
    // Each address has sockets of its own: a datagram is answered from where it came to.
    for addr in addrs {
        let http = TcpListener::bind(SocketAddr::new(*addr, http_port)).await?;
        let tcp = TcpListener::bind(SocketAddr::new(*addr, echo_port)).await?;
        let udp = UdpSocket::bind(SocketAddr::new(*addr, echo_port)).await?;
        tasks.spawn(accept(http, Arc::clone(shared), http_connection));
        tasks.spawn(accept(tcp, Arc::clone(shared), tcp_echo));
        tasks.spawn(udp_echo(udp, Arc::clone(shared)));
    }
    Ok(())
}

async fn accept<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    shared: Arc<Shared>,
    connection: fn(TcpStream, Arc<Shared>) -> F,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // A client that went away before it was accepted is no concern.
                if let Ok((stream, _)) = accepted {
                    let _ = stream.set_nodelay(true);
                    connections.spawn(connection(stream, Arc::clone(&shared)));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn http_connection(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request| answer(request, Arc::clone(&shared)));
    // What goes wrong on a connection, its client sees.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // Some clients ask at the beginning and at the end, and rest between.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
}

type Answer = Response<Either<Full<Bytes>, Pattern>>;

async fn answer(mut request: Request<Incoming>, shared: Arc<Shared>) -> Result<Answer, Infallible> {
    shared.count();
    if request.headers().get(header::UPGRADE).is_some_and(|to| to == chatter::PROTOCOL) {
        let upgrade = hyper::upgrade::on(&mut request);
        // No two connections of a server chat alike.
        let seed = shared.requests.load(Ordering::Relaxed);
        // It ends with the server's runtime at the latest, as a connection's own task would.
        tokio::spawn(async move {
            if let Ok(stream) = upgrade.await {
                // What goes wrong on a connection, its client sees.
                let _ = chatter::serve(TokioIo::new(stream), Random::new(seed)).await;
            }
        });
        let response = response(&shared, 101)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, chatter::PROTOCOL)
            .body(Either::Left(Full::default()));
        return Ok(response.expect("names are header values"));
    }
    let (parts, body) = request.into_parts();
    let (status, body) = if parts.method == Method::POST {
        match body.collect().await {
            Ok(body) => (200, Either::Left(Full::new(body.to_bytes()))),
            Err(_) => (400, Either::Left(Full::default())),
        }
    } else if let Some(length) = parts.uri.path().strip_prefix("/bytes/") {
        match length.parse() {
            Ok(length) => (200, Either::Right(Pattern::new(length, rate(parts.uri.query())))),
            Err(_) => (400, Either::Left(Full::default())),
        }
    } else if parts.uri.path() == HEALTH_PATH && shared.unhealthy.load(Ordering::Relaxed) {
        (503, Either::Left(Full::default()))
    } else {
        (200, Either::Left(Full::from(shared.name.clone())))
    };
    Ok(response(&shared, status).body(body).expect("names are header values"))
}

fn response(shared: &Shared, status: u16) -> hyper::http::response::Builder {
    Response::builder().status(status).header(SERVER_HEADER, &shared.name)
}

/// Bytes a second in a query `rate=N`.
fn rate(query: Option<&str>) -> Option<u64> {
    query?.strip_prefix("rate=")?.parse().ok().filter(|rate| *rate > 0)
}

/// The body of `/bytes/N`.
struct Pattern {
    offset: u64,
    length: u64,
    chunk: u64,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Pattern {
    fn new(length: u64, rate: Option<u64>) -> Self {
        Self {
            offset: 0,
            length,
            chunk: rate.map_or(CHUNK_BYTES, |rate| (rate / CHUNKS_PER_SECOND).max(1)),
            pause: rate.map(|_| Box::pin(sleep_until(Instant::now()))),
        }
    }
}

impl Body for Pattern {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let left = self.length - self.offset;
        if left == 0 {
            return Poll::Ready(None);
        }
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(context));
            let next = Instant::now() + Duration::from_secs(1) / CHUNKS_PER_SECOND as u32;
            pause.as_mut().reset(next);
        }
        let mut chunk = vec![0; usize::try_from(left.min(self.chunk)).unwrap_or(usize::MAX)];
        fill(&mut chunk, self.offset);
        self.offset += chunk.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(chunk.into()))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.length - self.offset)
    }
}

async fn tcp_echo(mut stream: TcpStream, shared: Arc<Shared>) {
    shared.count();
    let mut buffer = vec![0; 64 * 1024];
    if stream.write_all(format!("{}\n", shared.name).as_bytes()).await.is_err() {
        return;
    }
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

async fn udp_echo(socket: UdpSocket, shared: Arc<Shared>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // Errors here are those of earlier answers: a client that went away.
        if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            shared.count();
            let mut answer = format!("{}\n", shared.name).into_bytes();
            answer.extend_from_slice(&buffer[..length]);
            let _ = socket.send_to(&answer, from).await;
        }
    }
}
