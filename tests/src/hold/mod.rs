//! Connections that are held open, and what each of them notices.
//!
//! Hundreds of connections of several [`Kind`]s on one thread in the client's
//! namespace. Whatever should not happen to an open connection is a [`Fault`]
//! of its [`Record`]: it breaks, stalls, brings a wrong byte or another
//! server's answer. A stall is [`STALL`] without a byte where one was due, less
//! the time that the client's thread or the server's stood still (see
//! [`crate::pulse`]); what was subtracted is kept too, so that a run can be
//! called not measurable.

mod talk;

use std::{
    cell::Cell,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Semaphore, SemaphorePermit, mpsc, watch},
    task::JoinSet,
    time::MissedTickBehavior,
};

pub use self::talk::FETCH_BYTES;
use crate::{
    model::Random,
    netns::Namespace,
    pulse::Pulse,
    server::{ECHO_PORT, HTTP_PORT, Server, SharedPulse},
    topology::Family,
    wait,
};

/// A connection that should be moving and has no byte for longer has stalled.
pub const STALL: Duration = Duration::from_secs(1);

/// A wait that is shorter needs no look.
const NOTABLE: Duration = Duration::from_millis(200);

/// Time between two looks at the connections that wait for something.
const LOOK: Duration = Duration::from_millis(50);

/// Connections that are being opened at once: with hundreds, SYNs are lost in the
/// queues of the hosts' links before anybody has steered them.
const OPENING_MAX: usize = 16;

/// How long a connection may take to come to its end when it is told to, less the time
/// that the bench stood still.
const ENDING: Duration = Duration::from_secs(5);

/// How long it may take in any case.
const ENDING_MAX: Duration = Duration::from_secs(60);

/// What a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// HTTP requests with pauses between them, on one connection.
    KeepAlive,
    /// An HTTP answer without an end; every byte is checked.
    Download,
    /// HTTP answers of a few hundred kilobytes as fast as they come, with pauses.
    Fetch,
    /// One HTTP request at the beginning and one at the end, nothing in between.
    Idle,
    /// Bytes in both directions whenever either end likes.
    Chatter,
    /// Datagrams and their echoes: a flow in place of a connection.
    Udp,
}

impl Kind {
    /// Port of the service that it talks to.
    pub const fn port(self) -> u16 {
        match self {
            Self::Udp => ECHO_PORT,
            _ => HTTP_PORT,
        }
    }
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Its first answer has not come.
    Opening,
    /// It is open.
    Open,
    /// It has been closed as it should be.
    Closed,
    /// It has ended otherwise.
    Broken,
}

/// What should not have happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// It was reset, closed by the server, or could not be opened.
    Broken,
    /// Nothing came for longer than [`STALL`].
    Stalled,
    /// A byte was wrong.
    Corrupted,
    /// Another server answered.
    Moved,
}

/// Something that should not have happened.
#[derive(Clone, Debug)]
pub struct Fault {
    /// When it was noticed.
    pub at: Instant,
    /// What it is.
    pub cause: Cause,
    /// The same in words.
    pub what: String,
}

/// A connection as it is known.
#[derive(Clone, Debug)]
pub struct Record {
    /// What it does.
    pub kind: Kind,
    /// Its family.
    pub family: Family,
    /// The client's address, and its port once it is open.
    pub from: SocketAddr,
    /// Where to.
    pub to: SocketAddr,
    /// The name of the server that answered first.
    pub server: Option<String>,
    /// Where it stands.
    pub state: State,
    /// When it was asked for; its turn to be opened may have come later.
    pub begun: Instant,
    /// Bytes that came, all of them right.
    pub bytes: u64,
    /// What should not have happened, in the order of time.
    pub faults: Vec<Fault>,
    /// Its longest wait, less what the bench stood still.
    pub longest: Duration,
    /// Waits that would have been stalls had the bench not stood still meanwhile.
    pub excused: Duration,
    /// From the server, and what the server says of the other direction.
    waits: [Option<Wait>; 2],
}

impl Record {
    /// Whether it has been closed, or is broken.
    pub fn ended(&self) -> bool {
        matches!(self.state, State::Closed | State::Broken)
    }

    /// It should have come to its end by now.
    fn give_up(&mut self) {
        if !self.ended() {
            let what = format!("it has not come to its end within {ENDING:?}");
            self.faults.push(Fault { at: Instant::now(), cause: Cause::Stalled, what });
            self.state = State::Broken;
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    since: Instant,
    /// It is a stall already.
    told: bool,
}

/// Numbers of a [`Hold`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Connections that were opened, or could not be.
    pub opened: u64,
    /// Connections that are open.
    pub open: u64,
    /// Connections that are not any more, or never were.
    pub ended: u64,
    /// Connections with a fault that is no stall.
    pub broken: u64,
    /// Connections that have stalled.
    pub stalled: u64,
    /// Bytes that came and were right.
    pub bytes: u64,
}

impl Tally {
    fn count(&mut self, record: &Record) {
        let stall = |fault: &Fault| fault.cause == Cause::Stalled;
        self.opened += u64::from(record.state != State::Opening);
        self.open += u64::from(record.state == State::Open);
        self.ended += u64::from(record.ended());
        self.broken += u64::from(!record.faults.iter().all(stall));
        self.stalled += u64::from(record.faults.iter().any(stall));
        self.bytes += record.bytes;
    }
}

/// A direction in which something is waited for.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// The server's answer.
    Down,
    /// The server's word that it has what was sent.
    Up,
}

struct Shared {
    seed: u64,
    begun: Instant,
    pulse: Pulse,
    servers: Vec<(String, SharedPulse)>,
    opening: Semaphore,
    connections: Mutex<Vec<Connection>>,
}

struct Connection {
    record: Record,
    end: watch::Sender<bool>,
}

impl Connection {
    fn close(&self) {
        self.end.send_replace(true);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how long the client or a server stood still; any server for none.
    fn stood_still(&self, server: Option<&str>, from: Instant, to: Instant) -> Duration {
        let servers = self.servers.iter().filter(|(name, _)| server.is_none_or(|it| it == name));
        let servers = servers.map(|(_, pulse)| &**pulse);
        Pulse::stood_still(servers.chain([&self.pulse]), from, to)
    }

    /// Judges how long a record has waited by now.
    fn judge(&self, record: &mut Record, way: Way, now: Instant) {
        let Some(Wait { since, told }) = record.waits[way as usize] else {
            return;
        };
        let waited = now.saturating_duration_since(since);
        // Only the longest are worth the look at who stood still, and stalls.
        if waited < NOTABLE || waited <= record.longest.min(STALL) {
            return;
        }
        let still = self.stood_still(record.server.as_deref(), since, now);
        let judged = waited.saturating_sub(still);
        record.longest = record.longest.max(judged);
        if judged > STALL && !told {
            record.waits[way as usize] = Some(Wait { since, told: true });
            let what = match way {
                Way::Down => "no byte came",
                Way::Up => "no byte arrived at the server",
            };
            let what = format!(
                "{what} for {judged:?} (after {still:?} in which the bench stood still were subtracted)"
            );
            record.faults.push(Fault { at: now, cause: Cause::Stalled, what });
        }
    }

    /// The same at the end of a wait.
    fn judge_end(&self, record: &mut Record, way: Way, now: Instant) {
        self.judge(record, way, now);
        if let Some(Wait { since, told: false }) = record.waits[way as usize].take() {
            let waited = now.saturating_duration_since(since);
            if waited > STALL {
                record.excused += waited;
            }
        }
    }

    /// Adds a connection; its task is the caller's to start.
    fn add(self: &Arc<Self>, record: Record, id: usize) -> Line {
        let (end, ended) = watch::channel(false);
        let Record { kind, from, to, .. } = record;
        let mut connections = self.lock();
        assert_eq!(connections.len(), id, "connections come in the order of their numbers");
        connections.push(Connection { record, end });
        Line { shared: Arc::clone(self), id, kind, source: from.ip(), to, end: ended }
    }

    fn take(&self, ask: Ask) {
        let mut connections = self.lock();
        match ask {
            Ask::Open(..) => unreachable!("it needs a task"),
            Ask::Close(id) => connections[id as usize].close(),
            Ask::CloseAll => connections.iter().for_each(Connection::close),
            Ask::GiveUp => connections.iter_mut().for_each(|c| c.record.give_up()),
            // Whoever has stopped waiting for the answer has lost nothing but the answer.
            Ask::Records(reply) => {
                let _ = reply.send(connections.iter().map(|c| c.record.clone()).collect());
            }
            Ask::Tally(reply) => {
                let mut tally = Tally::default();
                connections.iter().for_each(|c| tally.count(&c.record));
                let _ = reply.send(tally);
            }
        }
    }

    /// Looks for connections that wait too long.
    fn look(&self) {
        let mut connections = self.lock();
        let now = Instant::now();
        for connection in &mut *connections {
            self.judge(&mut connection.record, Way::Down, now);
            self.judge(&mut connection.record, Way::Up, now);
        }
    }
}

/// One connection, as its task sees it.
struct Line {
    shared: Arc<Shared>,
    id: usize,
    kind: Kind,
    source: IpAddr,
    to: SocketAddr,
    end: watch::Receiver<bool>,
}

impl Line {
    fn with<T>(&self, f: impl FnOnce(&Shared, &mut Record) -> T) -> T {
        f(&self.shared, &mut self.shared.lock()[self.id].record)
    }

    /// Random numbers of its own.
    fn random(&self) -> Random {
        Random::new(self.shared.seed ^ (self.id as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Something must come from now on, if it did not have to already.
    fn expect(&self, way: Way) {
        self.with(|_, record| {
            let wait = Wait { since: Instant::now(), told: false };
            record.waits[way as usize].get_or_insert(wait);
        });
    }

    /// Something came.
    fn came(&self, way: Way, bytes: u64) {
        self.with(|shared, record| {
            shared.judge_end(record, way, Instant::now());
            record.bytes += bytes;
        });
    }

    /// Waits for its turn to be opened, which lasts until its first answer.
    async fn turn(&self) -> io::Result<SemaphorePermit<'_>> {
        self.shared.opening.acquire().await.map_err(io::Error::other)
    }

    fn opened_from(&self, from: SocketAddr) {
        self.with(|_, record| record.from = from);
    }

    /// A server says who it is.
    fn named(&self, name: &str) {
        self.with(|_, record| match &record.server {
            None => {
                record.server = Some(name.to_owned());
                record.state = State::Open;
            }
            Some(first) if first != name => {
                let what = format!("it is {first}'s, and {name} answered");
                record.faults.push(Fault { at: Instant::now(), cause: Cause::Moved, what });
            }
            Some(_) => {}
        });
    }

    /// Whether it should come to its end.
    fn ending(&self) -> bool {
        *self.end.borrow()
    }
}

/// What the connections' thread is asked. It alone touches them: a lock that a thread
/// without its precedence held would let it stand still.
enum Ask {
    Open(Box<Record>, u64),
    Close(u64),
    CloseAll,
    /// What is not at its end is to be called broken.
    GiveUp,
    Records(std::sync::mpsc::Sender<Vec<Record>>),
    Tally(std::sync::mpsc::Sender<Tally>),
}

/// Connections that are held open; closed on drop.
pub struct Hold {
    shared: Arc<Shared>,
    /// How many were asked for, which only the owner's thread does.
    opened: Cell<u64>,
    commands: Option<mpsc::UnboundedSender<Ask>>,
    thread: Option<JoinHandle<()>>,
}

impl Hold {
    /// Starts the client's thread. `servers` are those whose standing still counts;
    /// their threads take precedence, as the client's does.
    ///
    /// # Panics
    /// The host has no thread left.
    pub fn start(client: &Namespace, servers: &[Server], seed: u64) -> Self {
        let shared = Arc::new(Shared {
            seed,
            begun: Instant::now(),
            pulse: Pulse::default(),
            servers: servers.iter().map(|one| (one.name().to_owned(), one.pulse())).collect(),
            opening: Semaphore::new(OPENING_MAX),
            connections: Mutex::default(),
        });
        shared.pulse.take_precedence();
        for (_, pulse) in &shared.servers {
            pulse.take_precedence();
        }
        let (commands, asked) = mpsc::unbounded_channel();
        let mine = Arc::clone(&shared);
        let thread = client.spawn_thread("hold", move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("no runtime");
            runtime.block_on(hold(&mine, asked));
        });
        let opened = Cell::new(0);
        Self { shared, opened, commands: Some(commands), thread: Some(thread) }
    }

    fn ask(&self, ask: Ask) {
        if let Some(commands) = &self.commands {
            // The thread ends before its sender only by a panic; then nothing is answered.
            let _ = commands.send(ask);
        }
    }

    #[track_caller]
    fn answer<T>(&self, ask: impl FnOnce(std::sync::mpsc::Sender<T>) -> Ask) -> T {
        let (reply, answer) = std::sync::mpsc::channel();
        self.ask(ask(reply));
        answer.recv().expect("the connections' thread has panicked")
    }

    /// Begins to open a connection; returns its number, counted from 0.
    pub fn open(&self, kind: Kind, family: Family, source: IpAddr) -> u64 {
        let record = Record {
            kind,
            family,
            from: SocketAddr::new(source, 0),
            to: SocketAddr::new(family.vip(), kind.port()),
            server: None,
            state: State::Opening,
            begun: Instant::now(),
            bytes: 0,
            faults: Vec::new(),
            longest: Duration::ZERO,
            excused: Duration::ZERO,
            waits: [None; 2],
        };
        let id = self.opened.replace(self.opened.get() + 1);
        self.ask(Ask::Open(Box::new(record), id));
        id
    }

    /// Tells a connection to come to its end: it asks once more, and closes.
    pub fn close(&self, id: u64) {
        self.ask(Ask::Close(id));
    }

    /// All connections as they are, by number.
    ///
    /// # Panics
    /// Their thread has panicked.
    #[track_caller]
    pub fn records(&self) -> Vec<Record> {
        self.answer(Ask::Records)
    }

    /// Numbers of all of them.
    ///
    /// # Panics
    /// Their thread has panicked.
    #[track_caller]
    pub fn tally(&self) -> Tally {
        self.answer(Ask::Tally)
    }

    /// Waits until no connection is being opened.
    ///
    /// # Panics
    /// That takes too long.
    #[track_caller]
    pub fn wait_opened(&self) {
        wait::until("the connections to be held", || {
            let asked = self.opened.get();
            let Tally { opened, .. } = self.tally();
            (opened == asked).then_some(()).ok_or_else(|| format!("{opened} of {asked}"))
        });
    }

    /// Brings all connections to their end, and returns what became of them.
    ///
    /// # Panics
    /// Their thread has panicked.
    #[track_caller]
    pub fn finish(&self) -> Vec<Record> {
        self.ask(Ask::CloseAll);
        let begun = Instant::now();
        let patient = || {
            let now = Instant::now();
            let taken = now.duration_since(begun);
            let still = self.shared.stood_still(None, begun, now);
            taken.saturating_sub(still) < ENDING && taken < ENDING_MAX && !wait::interrupted()
        };
        while self.tally().ended < self.opened.get() && patient() {
            std::thread::sleep(LOOK);
        }
        self.ask(Ask::GiveUp);
        self.records()
    }

    /// What share of the connections' time can't be judged, because the bench stood still.
    ///
    /// # Panics
    /// Their thread has panicked.
    #[track_caller]
    pub fn unmeasured(&self) -> f64 {
        let records = self.records();
        let excused: Duration = records.iter().map(|record| record.excused).sum();
        let held = self.shared.begun.elapsed() * records.len().max(1) as u32;
        excused.as_secs_f64() / held.as_secs_f64()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so, and its connections never ended.
            let _ = thread.join();
        }
    }
}

async fn hold(shared: &Arc<Shared>, mut asked: mpsc::UnboundedReceiver<Ask>) {
    let mut tasks = JoinSet::new();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let work = async {
        loop {
            tokio::select! {
                ask = asked.recv() => match ask {
                    Some(Ask::Open(record, id)) => {
                        let line = shared.add(*record, id as usize);
                        tasks.spawn(talk::talk(line));
                    }
                    Some(ask) => shared.take(ask),
                    None => break,
                },
                Some(ended) = tasks.join_next() => if let Err(error) = ended {
                    std::panic::resume_unwind(error.into_panic());
                },
                _ = look.tick() => shared.look(),
            }
        }
        tasks.shutdown().await;
    };
    tokio::select! {
        () = work => {}
        () = shared.pulse.beat() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_a_stall_by_the_time_that_nobody_stood_still() {
        let shared = Shared {
            seed: 0,
            begun: Instant::now(),
            pulse: Pulse::default(),
            servers: Vec::new(),
            opening: Semaphore::new(OPENING_MAX),
            connections: Mutex::default(),
        };
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut record = Record {
            kind: Kind::Idle,
            family: Family::V4,
            from: SocketAddr::from(([0; 4], 0)),
            to: SocketAddr::from(([0; 4], 0)),
            server: None,
            state: State::Open,
            begun: now,
            bytes: 0,
            faults: Vec::new(),
            longest: Duration::ZERO,
            excused: Duration::ZERO,
            waits: [Some(Wait { since: now, told: false }), None],
        };
        shared.judge(&mut record, Way::Down, at(900));
        assert!(record.faults.is_empty());
        shared.judge(&mut record, Way::Down, at(1_001));
        shared.judge_end(&mut record, Way::Down, at(2_000));
        assert_eq!(record.faults.len(), 1, "a stall is told once: {:?}", record.faults);
        assert_eq!(record.longest, Duration::from_secs(2));
        shared.judge(&mut record, Way::Down, at(9_000));
        assert_eq!(record.faults.len(), 1, "nothing is waited for");
    }
}
