//! What each kind of connection says and hears.

use std::{error::Error as _, io, net::SocketAddr, sync::Mutex, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    net::{TcpSocket, TcpStream, UdpSocket},
    sync::SemaphorePermit,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{Cause, Fault, Kind, Line, State, Way};
use crate::{
    chatter::{self, Hear},
    http::first_difference,
    server::SERVER_HEADER,
};

/// How long opening may take: longer than any stall, which it counts as first.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses between requests are from this …
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// … to this.
const PAUSE_MAX: Duration = Duration::from_millis(600);

/// Bytes a second of a download.
const DOWNLOAD_RATE: u64 = 40_000;

/// Length of a download: nobody waits for its end.
const DOWNLOAD_BYTES: u64 = 1 << 40;

/// Length of what is fetched whole.
pub const FETCH_BYTES: u64 = 200_000;

/// After so long a datagram is sent again: it may have been lost.
const UDP_RETRY: Duration = Duration::from_millis(300);

/// Talks until the line is to end or breaks, and writes down which.
pub(super) async fn talk(line: Line) {
    let talked = match line.kind {
        Kind::KeepAlive => keep_asking(&line).await,
        Kind::Download => download(&line).await,
        Kind::Fetch => fetch(&line).await,
        Kind::Idle => idle(&line).await,
        Kind::Chatter => chat(&line).await,
        Kind::Udp => ask_by_datagram(&line).await,
    };
    line.with(|_, record| {
        record.waits = [None; 2];
        record.state = State::Closed;
        if let Err(error) = talked {
            let cause = match error.kind() {
                io::ErrorKind::InvalidData => Cause::Corrupted,
                _ => Cause::Broken,
            };
            let at = std::time::Instant::now();
            record.faults.push(Fault { at, cause, what: error.to_string() });
            record.state = State::Broken;
        }
    });
}

async fn connect(line: &Line) -> io::Result<TcpStream> {
    let socket = match line.source {
        std::net::IpAddr::V4(_) => TcpSocket::new_v4()?,
        std::net::IpAddr::V6(_) => TcpSocket::new_v6()?,
    };
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(SocketAddr::new(line.source, 0))?;
    let stream = timeout(CONNECT_TIMEOUT, socket.connect(line.to)).await??;
    stream.set_nodelay(true)?;
    line.opened_from(stream.local_addr()?);
    Ok(stream)
}

/// An HTTP connection; it ends with its value.
struct Http<'a> {
    line: &'a Line,
    sender: SendRequest<Empty<Bytes>>,
    opening: Option<SemaphorePermit<'a>>,
    driver: JoinSet<hyper::Result<()>>,
}

impl<'a> Http<'a> {
    async fn open(line: &'a Line) -> io::Result<Self> {
        let opening = Some(line.turn().await?);
        line.expect(Way::Down);
        let stream = connect(line).await?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(with_sources)?;
        let mut driver = JoinSet::new();
        driver.spawn(connection.with_upgrades());
        Ok(Self { line, sender, opening, driver })
    }

    /// Sends a request; its answer is waited for.
    async fn send(
        &mut self,
        target: &str,
        upgrade: Option<&str>,
        good: StatusCode,
    ) -> io::Result<Response<Incoming>> {
        let mut request = Request::get(target).header(header::HOST, "shop");
        if let Some(protocol) = upgrade {
            request =
                request.header(header::CONNECTION, "upgrade").header(header::UPGRADE, protocol);
        }
        let request = request.body(Empty::new()).map_err(io::Error::other)?;
        self.line.expect(Way::Down);
        let response = self.sender.send_request(request).await.map_err(with_sources)?;
        if response.status() != good {
            return Err(io::Error::other(format!("status {}", response.status())));
        }
        match response.headers().get(SERVER_HEADER).and_then(|name| name.to_str().ok()) {
            Some(name) => self.line.named(name),
            None => return Err(io::Error::other("the server does not say its name")),
        }
        self.opening = None;
        Ok(response)
    }

    /// Asks who answers.
    async fn ask(&mut self) -> io::Result<()> {
        let response = self.send("/", None, StatusCode::OK).await?;
        let body = response.into_body().collect().await.map_err(with_sources)?.to_bytes();
        self.line.came(Way::Down, body.len() as u64);
        Ok(())
    }

    /// Pauses, shorter when the line is to end: then it returns true. `None` for no limit.
    async fn rest(&mut self, pause: Option<Duration>) -> io::Result<bool> {
        let mut end = self.line.end.clone();
        tokio::select! {
            ended = self.driver.join_next() => Err(match ended {
                Some(Ok(Err(error))) => with_sources(error),
                _ => io::Error::new(io::ErrorKind::UnexpectedEof, "the server has closed it"),
            }),
            () = sleep(pause.unwrap_or(Duration::MAX)) => Ok(false),
            _ = end.wait_for(|end| *end) => Ok(true),
        }
    }
}

async fn keep_asking(line: &Line) -> io::Result<()> {
    let mut random = line.random();
    let mut http = Http::open(line).await?;
    loop {
        http.ask().await?;
        if line.ending() {
            return Ok(());
        }
        http.rest(Some(random.between(PAUSE_MIN, PAUSE_MAX))).await?;
    }
}

async fn idle(line: &Line) -> io::Result<()> {
    let mut http = Http::open(line).await?;
    http.ask().await?;
    while !http.rest(None).await? {}
    http.ask().await
}

async fn download(line: &Line) -> io::Result<()> {
    let mut http = Http::open(line).await?;
    let target = format!("/bytes/{DOWNLOAD_BYTES}?rate={DOWNLOAD_RATE}");
    let response = http.send(&target, None, StatusCode::OK).await?;
    read(line, response, DOWNLOAD_BYTES).await
}

async fn fetch(line: &Line) -> io::Result<()> {
    let mut random = line.random();
    let mut http = Http::open(line).await?;
    loop {
        let last = line.ending();
        let response = http.send(&format!("/bytes/{FETCH_BYTES}"), None, StatusCode::OK).await?;
        read(line, response, FETCH_BYTES).await?;
        if last {
            return Ok(());
        }
        http.rest(Some(random.between(PAUSE_MIN, PAUSE_MAX))).await?;
    }
}

/// Reads and checks a body, to its end or until a piece has come since the line is to end.
async fn read(line: &Line, response: Response<Incoming>, length: u64) -> io::Result<()> {
    let mut body = response.into_body();
    let mut offset = 0;
    loop {
        let last = line.ending() && length == DOWNLOAD_BYTES;
        let frame = body.frame().await.transpose().map_err(with_sources)?;
        let Some(data) = frame.and_then(|frame| frame.into_data().ok()) else {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("closed after {offset} of {length} bytes"),
            ));
        };
        if let Some(at) = first_difference(&data, offset) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("wrong byte at {at} of {length}"),
            ));
        }
        offset += data.len() as u64;
        line.came(Way::Down, data.len() as u64);
        if last || offset == length {
            return Ok(());
        }
        line.expect(Way::Down);
    }
}

/// Hears for a line.
struct Ear<'a> {
    line: &'a Line,
    sent: u64,
    received: u64,
    /// How much had been sent when the line was to end.
    last: Option<u64>,
}

impl Hear for Ear<'_> {
    fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
        if self.sent > self.received {
            self.line.expect(Way::Up);
        }
    }

    fn heard(&mut self, bytes: u64, received: u64) {
        self.line.came(Way::Down, bytes);
        self.line.expect(Way::Down);
        if received > self.received {
            self.line.came(Way::Up, 0);
            self.received = received;
            if self.sent > received {
                self.line.expect(Way::Up);
            }
        }
        if self.line.ending() {
            self.last.get_or_insert(self.sent);
        }
    }

    fn enough(&self) -> bool {
        self.last.is_some_and(|last| self.received >= last)
    }
}

async fn chat(line: &Line) -> io::Result<()> {
    let mut http = Http::open(line).await?;
    let response = http.send("/", Some(chatter::PROTOCOL), StatusCode::SWITCHING_PROTOCOLS).await?;
    let upgraded = hyper::upgrade::on(response).await.map_err(with_sources)?;
    let ear = Mutex::new(Ear { line, sent: 0, received: 0, last: None });
    chatter::chat(TokioIo::new(upgraded), line.random(), &ear).await
}

async fn ask_by_datagram(line: &Line) -> io::Result<()> {
    let mut random = line.random();
    let socket = UdpSocket::bind(SocketAddr::new(line.source, 0)).await?;
    socket.connect(line.to).await?;
    line.opened_from(socket.local_addr()?);
    let mut end = line.end.clone();
    let mut buffer = vec![0; 2048];
    for number in 0_u64.. {
        let last = line.ending();
        let mut question = number.to_be_bytes().to_vec();
        question.resize(8 + random.below(1_000) as usize, number as u8);
        line.expect(Way::Down);
        let mut waiting = true;
        while waiting {
            socket.send(&question).await?;
            // Answers to what was sent twice come twice.
            while let Ok(got) = timeout(UDP_RETRY, socket.recv(&mut buffer)).await {
                let got = got?;
                let Some((name, echo)) = split_name(&buffer[..got]) else {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "an answer without a name",
                    ));
                };
                if echo.get(..8).is_some_and(|it| it < &question[..8]) {
                    continue;
                }
                if echo != question {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "another echo"));
                }
                line.came(Way::Down, got as u64);
                line.named(name);
                waiting = false;
                break;
            }
        }
        if last {
            break;
        }
        tokio::select! {
            () = sleep(random.between(PAUSE_MIN, PAUSE_MAX)) => {}
            _ = end.wait_for(|end| *end) => {}
        }
    }
    Ok(())
}

/// The server's name and what it was sent.
fn split_name(answer: &[u8]) -> Option<(&str, &[u8])> {
    let end = answer.iter().position(|byte| *byte == b'\n')?;
    Some((std::str::from_utf8(&answer[..end]).ok()?, &answer[end + 1..]))
}

/// Hyper says what went wrong in the errors behind its own.
fn with_sources(error: hyper::Error) -> io::Error {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    io::Error::other(text)
}
