//! Clients: as many requests as go through, and requests at a pace.
//!
//! At a pace, a request's time begins when it is due, whether or not the client gets to it then: what
//! keeps the client from asking counts as well (no coordinated omission).

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    os::fd::{AsFd as _, OwnedFd},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use canary_tests::{netns::Namespace, topology::Family, wait};
use hdrhistogram::Histogram;
use nix::{
    sys::{
        socket::{setsockopt, sockopt},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    unistd,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, unix::AsyncFd},
    net::{TcpSocket, TcpStream},
    task::{JoinSet, LocalSet},
};

/// Before a window begins that is counted.
pub(crate) const WARM_UP: Duration = Duration::from_millis(300);
/// How long what has begun may take after the last request was made.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest time that is told apart.
const LONGEST: Duration = Duration::from_secs(60);
/// Reasons for failures that are kept.
const REASONS: usize = 3;

/// Asked with it, the server closes first, and has the connection's `TIME_WAIT`.
const LAST: &[u8] = b"GET / HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n";
const NEXT: &[u8] = b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n";

/// Where clients connect to, and from where.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// In turn.
    pub(crate) targets: Vec<SocketAddr>,
    /// Of [`Family::client`], in turn.
    pub(crate) clients: Range<u32>,
    /// Threads, each with a part of the connections.
    pub(crate) threads: usize,
}

impl Plan {
    fn target(&self, nth: u64) -> SocketAddr {
        self.targets[(nth % self.targets.len() as u64) as usize]
    }

    fn client(&self, nth: u64) -> IpAddr {
        let count = u64::from(self.clients.end - self.clients.start);
        Family::V4.client(self.clients.start + (nth % count) as u32)
    }
}

/// What clients saw.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Answers in the window.
    pub(crate) answers: u64,
    /// Of all answers, before and after it too.
    pub(crate) all: u64,
    /// Those of them from the canary.
    pub(crate) canary: u64,
    pub(crate) failed: u64,
    pub(crate) reasons: Vec<String>,
    /// Nanoseconds, of the answers in the window.
    pub(crate) times: Histogram<u64>,
}

impl Seen {
    fn new() -> Result<Self> {
        let longest = u64::try_from(LONGEST.as_nanos())?;
        let mut times = Histogram::new_with_bounds(1_000, longest, 3).context("a histogram")?;
        times.auto(true);
        Ok(Self { answers: 0, all: 0, canary: 0, failed: 0, reasons: Vec::new(), times })
    }

    pub(crate) fn add(&mut self, other: Self) -> Result<()> {
        self.answers += other.answers;
        self.all += other.all;
        self.canary += other.canary;
        self.failed += other.failed;
        self.reasons.extend(other.reasons);
        self.reasons.truncate(REASONS);
        self.times.add(&other.times).context("adding histograms")
    }

    fn note(&mut self, outcome: io::Result<bool>, took: Option<Duration>) {
        match outcome {
            Ok(canary) => {
                self.all += 1;
                self.canary += u64::from(canary);
                if let Some(took) = took {
                    self.answers += 1;
                    let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
                    self.times.saturating_record(ns);
                }
            }
            Err(error) => self.fail(1, error.to_string()),
        }
    }

    fn fail(&mut self, count: u64, reason: String) {
        self.failed += count;
        if self.reasons.len() < REASONS {
            self.reasons.push(reason);
        }
    }

    /// At a quantile, in microseconds.
    pub(crate) fn at_us(&self, quantile: f64) -> f64 {
        self.times.value_at_quantile(quantile) as f64 / 1e3
    }
}

/// What clients do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// So many at a time, each request on a connection of its own.
    Connections(usize),
    /// So many connections, each with one request after the other.
    Requests(usize),
    /// So many connections a second, each with one request.
    Paced(u32),
}

/// Has clients at work for a while, in the namespace.
pub(crate) fn run(
    namespace: &Namespace,
    plan: &Arc<Plan>,
    work: Work,
    length: Duration,
) -> Result<Seen> {
    // A window begins when all threads are at work.
    let begin = Instant::now() + WARM_UP;
    let window = begin..begin + length;
    let threads: Vec<_> = (0..plan.threads)
        .map(|thread| {
            let (plan, window) = (Arc::clone(plan), window.clone());
            namespace.spawn_thread("clients", move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                LocalSet::new().block_on(&runtime, at_work(plan, work, thread as u64, window))
            })
        })
        .collect();
    let mut seen = Seen::new()?;
    for thread in threads {
        let of_thread = thread.join().map_err(|_| anyhow::anyhow!("clients have panicked"))?;
        seen.add(of_thread?)?;
    }
    wait::check();
    Ok(seen)
}

type Shared = Rc<RefCell<Seen>>;

/// A thread's part.
async fn at_work(plan: Arc<Plan>, work: Work, thread: u64, window: Range<Instant>) -> Result<Seen> {
    let shared: Shared = Rc::new(RefCell::new(Seen::new()?));
    let mut tasks = JoinSet::new();
    let threads = plan.threads as u64;
    match work {
        Work::Connections(count) | Work::Requests(count) => {
            // Numbers of the parts are of different residues.
            for nth in (thread..count as u64).step_by(plan.threads) {
                let (plan, shared, window) =
                    (Arc::clone(&plan), Rc::clone(&shared), window.clone());
                let first = nth;
                tasks.spawn_local(async move {
                    match work {
                        Work::Requests(_) => requests(&plan, nth, &shared, &window).await,
                        _ => connections(&plan, first, count as u64, &shared, &window).await,
                    }
                });
            }
        }
        Work::Paced(rate) => {
            let interval = Duration::from_secs(1) * plan.threads as u32 / rate;
            let mut timer = Timer::new(window.start, interval)?;
            let total = (window.end - window.start).as_nanos() / interval.as_nanos();
            let mut nth = 0;
            while nth < total as u64 && !wait::interrupted() {
                for _ in 0..timer.expired().await? {
                    let due = window.start + interval * nth as u32;
                    let (plan, shared) = (Arc::clone(&plan), Rc::clone(&shared));
                    let number = nth * threads + thread;
                    tasks.spawn_local(async move {
                        let outcome = connection(&plan, number).await;
                        shared.borrow_mut().note(outcome, Some(due.elapsed()));
                    });
                    nth += 1;
                }
                while tasks.try_join_next().is_some() {}
            }
        }
    }
    let rest = window.end.saturating_duration_since(Instant::now()) + PATIENCE;
    let finished = tokio::time::timeout(rest, async { while tasks.join_next().await.is_some() {} });
    if finished.await.is_err() {
        let reason = format!("no answer within {PATIENCE:?}");
        shared.borrow_mut().fail(tasks.len() as u64, reason);
        tasks.shutdown().await;
    }
    Ok(shared.replace(Seen::new()?))
}

/// One connection after the other until the window ends.
async fn connections(plan: &Plan, first: u64, step: u64, shared: &Shared, window: &Range<Instant>) {
    let mut nth = first;
    loop {
        let began = Instant::now();
        if began >= window.end || wait::interrupted() {
            return;
        }
        let outcome = connection(plan, nth).await;
        let done = Instant::now();
        let took = window.contains(&done).then(|| done - began);
        let failed = outcome.is_err();
        shared.borrow_mut().note(outcome, took);
        nth += step;
        if failed {
            // What fails at once would do nothing else.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// One request after the other on one connection until the window ends.
async fn requests(plan: &Plan, nth: u64, shared: &Shared, window: &Range<Instant>) {
    let outcome = async {
        let mut stream = connect(plan, nth).await?;
        loop {
            let began = Instant::now();
            if began >= window.end || wait::interrupted() {
                return Ok(());
            }
            stream.write_all(NEXT).await?;
            let canary = answer(&mut stream).await?;
            let done = Instant::now();
            shared.borrow_mut().note(Ok(canary), window.contains(&done).then(|| done - began));
        }
    };
    if let Err(error) = outcome.await {
        shared.borrow_mut().note(Err(error), None);
    }
}

/// A connection with one request, until the server has closed it.
async fn connection(plan: &Plan, nth: u64) -> io::Result<bool> {
    let mut stream = connect(plan, nth).await?;
    stream.write_all(LAST).await?;
    let canary = answer(&mut stream).await?;
    match stream.read(&mut [0]).await? {
        0 => Ok(canary),
        _ => Err(io::Error::other("more than an answer")),
    }
}

async fn connect(plan: &Plan, nth: u64) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // The port is chosen when it is known where to.
    setsockopt(&socket.as_fd(), sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(SocketAddr::new(plan.client(nth), 0))?;
    socket.connect(plan.target(nth)).await
}

/// Reads an answer, whose body is the server's name; whether it is the canary's.
async fn answer(stream: &mut TcpStream) -> io::Result<bool> {
    let mut buffer = [0; 1024];
    let mut length = 0;
    loop {
        match stream.read(&mut buffer[length..]).await? {
            0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "no whole answer")),
            more => length += more,
        }
        if let Some(canary) = from_canary(&buffer[..length])? {
            return Ok(canary);
        }
    }
}

/// Whether an answer is the canary's; `None` if it is not whole.
fn from_canary(answer: &[u8]) -> io::Result<Option<bool>> {
    let text = str::from_utf8(answer).map_err(io::Error::other)?;
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Ok(None) };
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(io::Error::other(head.lines().next().unwrap_or_default().to_owned()));
    }
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let length: usize = length.and_then(|n| n.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    match body.len().cmp(&length) {
        std::cmp::Ordering::Less => Ok(None),
        std::cmp::Ordering::Equal => Ok(Some(body.starts_with("v2"))),
        std::cmp::Ordering::Greater => Err(io::Error::other("more than an answer")),
    }
}

/// Ticks finer than the runtime's own, which are of a millisecond.
struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    /// Of this interval, the first at `begin`.
    fn new(begin: Instant, interval: Duration) -> Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).context("a timer")?;
        let first = begin.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let pace = Expiration::IntervalDelayed(
            TimeSpec::from_duration(first),
            TimeSpec::from_duration(interval),
        );
        timer.set(pace, TimerSetTimeFlags::empty()).context("setting a timer")?;
        // SAFETY: an OwnedFd names the same open file for as long as it lives, and is not given away.
        Ok(Self(unsafe { AsyncFd::register(timer.into()) }?))
    }

    /// Waits for a tick; how many there were since the last call.
    async fn expired(&mut self) -> io::Result<u64> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut count = [0; 8];
            let read = ready.try_io(|fd| Ok(unistd::read(fd.get_ref(), &mut count)?));
            match read {
                Ok(read) => {
                    read?;
                    return Ok(u64::from_ne_bytes(count));
                }
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_whole_and_told_apart() {
        let answer = |name: &str| {
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{name}", name.len()).into_bytes()
        };
        let stable = answer("stable-1");
        assert_eq!(from_canary(&stable).unwrap(), Some(false));
        assert_eq!(from_canary(&answer("v2-1")).unwrap(), Some(true));
        for end in 0..stable.len() {
            assert_eq!(from_canary(&stable[..end]).unwrap(), None, "{end}");
        }
        assert!(from_canary(&[&stable[..], b"x"].concat()).is_err());
        assert!(from_canary(b"HTTP/1.1 503 x\r\n\r\n").is_err());
        assert!(from_canary(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }

    #[test]
    fn what_failed_is_no_answer() {
        let mut seen = Seen::new().unwrap();
        seen.note(Ok(true), Some(Duration::from_millis(2)));
        seen.note(Ok(false), None);
        for _ in 0..5 {
            seen.note(Err(io::ErrorKind::ConnectionRefused.into()), None);
        }
        let mut all = Seen::new().unwrap();
        all.add(seen).unwrap();
        assert_eq!((all.answers, all.all, all.canary, all.failed), (1, 2, 1, 5));
        assert_eq!(all.reasons.len(), REASONS);
        let p50 = all.at_us(0.5);
        assert!((1_990.0..2_010.0).contains(&p50), "{p50}");
    }

    #[test]
    fn a_late_client_counts_the_time_since_a_request_was_due() {
        // Ten are due in 10 ms, and the first look at the timer is 50 ms late.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let count = runtime.block_on(async {
            let mut timer = Timer::new(Instant::now(), Duration::from_millis(1)).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            timer.expired().await.unwrap()
        });
        assert!(count >= 50, "{count}");
    }
}
