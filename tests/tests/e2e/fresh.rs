//! New connections all the time, and what became of each.

use std::{
    io,
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use canary_tests::{
    client::{self, Connection},
    pulse,
    server::HTTP_PORT,
    topology::Family,
    wait,
};

use crate::support::Bench;

/// The clients' first connections have this port; each that follows has another.
const FIRST_PORT: u16 = 10_000;

/// Which connections are opened, and how fast. Both families take turns.
#[derive(Clone, Debug)]
pub(crate) struct Fresh {
    /// Numbers of the clients; when all have had their turn it begins anew.
    pub(crate) clients: Range<u32>,
    /// Threads: one that waits for an answer opens no other.
    pub(crate) workers: u32,
    /// From one connection of a worker to its next.
    pub(crate) pace: Duration,
    /// How long a new connection and its answer may take.
    pub(crate) patience: Duration,
}

/// A connection that was opened.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) begun: Instant,
    pub(crate) ended: Instant,
    pub(crate) family: Family,
    /// Number of the client.
    pub(crate) client: u32,
    /// The server that answered.
    pub(crate) name: io::Result<String>,
}

/// Workers that open connections until they are told to stop.
pub(crate) struct Arrivals {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<Vec<Arrival>>>,
}

impl Fresh {
    /// Some 300 a second, each of another client. A SYN that is lost is sent again after a second.
    pub(crate) fn some() -> Self {
        Self {
            clients: 10_000..1_000_000,
            workers: 4,
            pace: Duration::from_millis(12),
            patience: Duration::from_secs(3),
        }
    }

    /// Begins to open connections to the HTTP service.
    pub(crate) fn start(self, bench: &Bench) -> Arrivals {
        let stop = Arc::new(AtomicBool::new(false));
        let worker = |worker: u32| {
            let (stopped, fresh) = (Arc::clone(&stop), self.clone());
            bench.client().spawn_thread("fresh", move || {
                pulse::precede();
                fresh.work(worker, &stopped)
            })
        };
        Arrivals { workers: (0..self.workers).map(worker).collect(), stop }
    }

    fn work(&self, worker: u32, stopped: &AtomicBool) -> Vec<Arrival> {
        let Self { clients, workers, pace, patience } = self;
        let mut arrivals = Vec::new();
        for turn in (worker..).step_by(*workers as usize) {
            if stopped.load(Ordering::Relaxed) {
                break;
            }
            let family = Family::ALL[(turn / workers % 2) as usize];
            let client = clients.start + turn % clients.len() as u32;
            // Whoever comes with the address and port of a connection that is remembered yet may
            // be taken for it.
            let port = FIRST_PORT + (turn / clients.len() as u32) as u16;
            let source = SocketAddr::new(family.client(client), port);
            let to = SocketAddr::new(family.vip(), HTTP_PORT);
            let begun = Instant::now();
            let stream = client::connect_within(*patience, source, to);
            let name = stream.and_then(|stream| Connection::from(stream).name());
            arrivals.push(Arrival { begun, ended: Instant::now(), family, client, name });
            wait::pause_until(begun + *pace);
        }
        arrivals
    }
}

impl Arrivals {
    /// Stops, and returns all of them in the order of time.
    pub(crate) fn finish(self) -> Vec<Arrival> {
        self.stop.store(true, Ordering::Relaxed);
        let join = |worker: JoinHandle<Vec<Arrival>>| worker.join().expect("a worker");
        let mut arrivals: Vec<Arrival> = self.workers.into_iter().flat_map(join).collect();
        arrivals.sort_by_key(|arrival| arrival.begun);
        arrivals
    }
}

/// Those that failed, in words.
pub(crate) fn failures(arrivals: &[Arrival]) -> Vec<String> {
    let failed = arrivals.iter().filter_map(|arrival| {
        let Arrival { family, client, name, .. } = arrival;
        Some(format!("{}: {}", family.client(*client), name.as_ref().err()?))
    });
    failed.collect()
}
