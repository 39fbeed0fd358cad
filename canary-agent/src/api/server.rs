//! Connections: accepted, bounded, timed, ended.
//!
//! Every limit that keeps a client from delaying the agent or other clients is
//! here, but for the size of a body (`extract`). Must not know of routes.

use std::{
    convert::Infallible,
    io,
    net::IpAddr,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::ServiceExt;

use super::{
    Api, ControlSocket,
    deadline::WriteDeadline,
    error::{ApiError, exit},
    peer::Identity,
    rate::{Rate, Rates, Who},
    routes,
    senders::Attributed,
};

/// How much a client may ask of the agent. The defaults suit every host; tests
/// shorten them.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections that are served at a time, on each listener.
    pub connections: usize,
    /// How many of those are kept for peers that may change things: a reader
    /// with many connections does not lock an operator out.
    pub reserved: usize,
    /// Until a request's head is there; also how long a connection may idle.
    pub head: Duration,
    /// Until a request's body is there.
    pub body: Duration,
    /// Until a request is answered, its body included.
    pub request: Duration,
    /// The same for a reload, which reads files and may plan thousands of services.
    pub reload: Duration,
    /// Until an answer is taken.
    pub write: Duration,
    /// Until open connections are cut when the agent stops.
    pub stop: Duration,
    /// How often each user who may only read may ask, and each address on the TCP listener.
    pub readers: Rate,
    /// How often each user who may change things may ask.
    pub operators: Rate,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 128,
            reserved: 16,
            head: Duration::from_secs(5),
            body: Duration::from_secs(5),
            request: Duration::from_secs(10),
            reload: Duration::from_secs(120),
            write: Duration::from_secs(20),
            stop: Duration::from_secs(2),
            readers: Rate { per_second: 100.0, burst: 300.0 },
            operators: Rate { per_second: 2_000.0, burst: 4_000.0 },
        }
    }
}

/// Connections that are told that there are too many, at a time. Those beyond
/// are closed without a word.
const REFUSED_AT_A_TIME: usize = 64;

/// How long a refused connection is kept so that it can read why.
const REFUSAL: Duration = Duration::from_secs(1);

/// Most bytes of a request's head, and of what is read ahead.
const HEAD_BYTES: usize = 32 * 1024;

/// Where a request came from; goes with every request.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// The control socket.
    Control(Arc<Identity>),
    /// The TCP listener, where nothing can be changed.
    ReadOnly(IpAddr),
}

/// Whether the listener has ended; goes with every request, for answers that last.
#[derive(Clone, Debug)]
pub(super) struct Closing(watch::Receiver<bool>);

impl Closing {
    /// Waits until it has.
    pub(super) async fn ended(&mut self) {
        ended(&mut self.0).await;
    }
}

/// Something that connections come from.
pub(super) trait Listen {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
    fn origin(stream: &Self::Stream) -> io::Result<Origin>;
}

impl Listen for ControlSocket {
    type Stream = Attributed;

    async fn accept(&self) -> io::Result<Self::Stream> {
        Ok(Attributed::new(self.accept().await?))
    }

    fn origin(stream: &Self::Stream) -> io::Result<Origin> {
        Ok(Origin::Control(Arc::new(Identity::of(stream.stream(), stream.senders())?)))
    }
}

impl Listen for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<Self::Stream> {
        Ok(self.accept().await?.0)
    }

    fn origin(stream: &Self::Stream) -> io::Result<Origin> {
        Ok(Origin::ReadOnly(stream.peer_addr()?.ip()))
    }
}

/// Serves `router` on `listener` until `stop` is done; open requests are then
/// finished or, after [`Limits::stop`], cut.
pub(super) async fn serve<L: Listen>(
    listener: L,
    router: Router,
    api: Api,
    stop: impl Future<Output = ()>,
) {
    let limits = api.limits;
    let places = Arc::new(Places::new(&limits));
    let rates = Arc::new(Mutex::new(Rates::default()));
    let (closing, closed) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            Some(ended) = tasks.join_next() => {
                report(ended);
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, most often: they come back with time, and
                // `accept` would fail again at once.
                tracing::warn!(%error, "can't accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let origin = match L::origin(&stream) {
            Ok(origin) => origin,
            Err(error) => {
                tracing::warn!(%error, "can't tell who has connected");
                continue;
            }
        };
        let operator = match &origin {
            Origin::Control(identity) => api.may_change(identity),
            Origin::ReadOnly(_) => false,
        };
        match places.take(operator) {
            Place::Served(permit) => {
                let closed = closed.clone();
                let gate = Gate { router: router.clone(), api: api.clone(), rates: rates.clone() };
                tasks.spawn(async move {
                    connection(stream, origin, gate, closed).await;
                    drop(permit);
                });
            }
            Place::Refused(permit) => {
                tasks.spawn(async move {
                    refuse(stream, limits.connections).await;
                    drop(permit);
                });
            }
            Place::None => drop(stream),
        }
    }
    // New clients see at once that nobody is there.
    drop(listener);
    let _ = closing.send(true);
    let ending = async {
        while let Some(ended) = tasks.join_next().await {
            report(ended);
        }
    };
    if timeout(limits.stop, ending).await.is_err() {
        tasks.shutdown().await;
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task has failed: this is a bug");
    }
}

/// The places that connections take up.
struct Places {
    anyone: Arc<Semaphore>,
    operators: Arc<Semaphore>,
    refused: Arc<Semaphore>,
}

/// What a new connection gets.
enum Place {
    Served(OwnedSemaphorePermit),
    Refused(OwnedSemaphorePermit),
    None,
}

impl Places {
    fn new(limits: &Limits) -> Self {
        let reserved = limits.reserved.min(limits.connections);
        let of = |permits| Arc::new(Semaphore::new(permits));
        Self {
            anyone: of(limits.connections - reserved),
            operators: of(reserved),
            refused: of(REFUSED_AT_A_TIME),
        }
    }

    fn take(&self, operator: bool) -> Place {
        let take = |places: &Arc<Semaphore>| Arc::clone(places).try_acquire_owned().ok();
        let reserved = || operator.then(|| take(&self.operators)).flatten();
        if let Some(permit) = take(&self.anyone).or_else(reserved) {
            return Place::Served(permit);
        }
        take(&self.refused).map_or(Place::None, Place::Refused)
    }
}

/// What a request passes before it is answered.
#[derive(Clone)]
struct Gate {
    router: Router,
    api: Api,
    rates: Arc<Mutex<Rates>>,
}

impl Gate {
    /// Lets a peer ask as often as it may.
    fn pass(&self, origin: &Origin) -> Result<(), ApiError> {
        let limits = self.api.limits;
        let (who, rate) = match origin {
            Origin::Control(identity) if self.api.may_change(identity) => {
                (Who::User(identity.peer.uid), limits.operators)
            }
            Origin::Control(identity) => (Who::User(identity.peer.uid), limits.readers),
            Origin::ReadOnly(address) => (Who::at(*address), limits.readers),
        };
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates.ask(who, rate, Instant::now()).map_err(|wait| {
            ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too_many_requests",
                exit::UNREACHABLE,
                format!("more than {} requests a second", rate.per_second),
            )
            .help(format!("ask again in {} ms", wait.as_millis() + 1))
        })
    }

    /// Answers one request within its time.
    async fn answer(self, origin: Origin, request: Request) -> Result<Response, Infallible> {
        match self.pass(&origin) {
            Ok(()) => answer(self.router, request, self.api.limits).await,
            Err(error) => Ok(error.into_response()),
        }
    }
}

/// Serves one connection to its end.
async fn connection<S>(stream: S, origin: Origin, gate: Gate, mut closed: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = gate.api.limits;
    let closing = Closing(closed.clone());
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(origin.clone());
        request.extensions_mut().insert(closing.clone());
        gate.clone().answer(origin.clone(), request.map(axum::body::Body::new))
    });
    let io = TokioIo::new(WriteDeadline::new(stream, limits.write));
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_buf_size(HEAD_BYTES)
        // A client may close its half once it has asked.
        .half_close(true)
        .serve_connection(io, service);
    let result = tokio::select! {
        result = &mut connection => result,
        () = ended(&mut closed) => {
            std::pin::Pin::new(&mut connection).graceful_shutdown();
            (&mut connection).await
        }
    };
    let Err(error) = result else { return };
    tracing::debug!(%error, "a connection has ended early");
    // The head's timeout has no cause; a deadline for writing has one, and
    // whatever was written after it would stand in the middle of an answer.
    if error.is_timeout() && std::error::Error::source(&error).is_none() {
        let parts = connection.into_parts();
        // Nothing was asked: an idle connection just ends.
        if !parts.read_buf.is_empty() {
            let late = ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "slow_request",
                exit::FAILED,
                format!("the request's head took more than {:?}", limits.head),
            );
            farewell(parts.io.into_inner().into_inner(), &late).await;
        }
    }
}

/// Waits until the listener has ended.
async fn ended(closed: &mut watch::Receiver<bool>) {
    // An error says that the listener's task is gone, which is an end too.
    let _ = closed.wait_for(|closed| *closed).await;
}

/// Answers one request within its time.
async fn answer(router: Router, request: Request, limits: Limits) -> Result<Response, Infallible> {
    let limit = match request.uri().path() {
        routes::RELOAD => limits.reload,
        _ => limits.request,
    };
    match timeout(limit, router.oneshot(request)).await {
        Ok(answered) => answered,
        Err(_) => Ok(ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout",
            exit::UNREACHABLE,
            format!("the agent has not answered within {limit:?}"),
        )
        .help("a change that was asked for may still be carried out: see `canary-agent status`")
        .into_response()),
    }
}

/// Tells a connection that there are too many.
async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(stream: S, connections: usize) {
    let busy = ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "busy",
        exit::UNREACHABLE,
        format!("the agent serves {connections} connections already"),
    )
    .help("try again in a second; close connections that are not in use");
    farewell(stream, &busy).await;
}

/// Writes `error` and closes. What the client still sends is read and dropped
/// for a while: closing a stream with unread bytes would take the answer back.
async fn farewell<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, error: &ApiError) {
    let exchange = async {
        stream.write_all(&error.raw()).await?;
        stream.shutdown().await?;
        let mut sink = [0; 4096];
        while stream.read(&mut sink).await? > 0 {}
        io::Result::Ok(())
    };
    // Whether the client heard it is its own affair.
    let _ = timeout(REFUSAL, exchange).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_have_places_of_their_own() {
        let limits = Limits { connections: 4, reserved: 1, ..Limits::default() };
        let places = Places::new(&limits);
        let readers: Vec<_> = (0..4).map(|_| places.take(false)).collect();
        let served = |places: &[Place]| {
            places.iter().filter(|place| matches!(place, Place::Served(_))).count()
        };
        assert_eq!(served(&readers), 3);
        let operators: Vec<_> = (0..2).map(|_| places.take(true)).collect();
        assert_eq!(served(&operators), 1);
        drop(readers);
        assert!(matches!(places.take(false), Place::Served(_)));
    }
}
