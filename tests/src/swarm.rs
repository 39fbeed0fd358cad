//! Many clients, each with one short connection, and what became of them.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    client::{Connection, version_of},
    faulty::LATE,
    netns::Namespace,
    server::HTTP_PORT,
    topology::{CLIENTS, Family},
    wait,
};

/// Threads that open connections: each waits for one that is late.
const WORKERS: u32 = 24;

/// What became of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Answered by control.
    pub stable: u64,
    /// Answered by the other version.
    pub v2: u64,
    /// Refused.
    pub refused: u64,
    /// Reset.
    pub reset: u64,
    /// Answered by the other version after a handshake that took too long.
    pub late: u64,
    /// Failed in another way.
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Counts {
    seen: [AtomicU64; 6],
    next: AtomicU32,
    stop: AtomicBool,
}

/// Clients at work; they stop on drop.
#[derive(Debug)]
pub struct Swarm {
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

impl Swarm {
    /// Starts `rate` connections a second.
    pub fn start(client: &Namespace, rate: u32) -> Self {
        let counts = Arc::new(Counts::default());
        let interval = Duration::from_secs(1) * WORKERS / rate.max(1);
        let threads = (0..WORKERS).map(|worker| {
            let counts = Arc::clone(&counts);
            let offset = interval * worker / WORKERS;
            client.spawn_thread(&format!("swarm-{worker}"), move || {
                connect(&counts, interval, Instant::now() + offset);
            })
        });
        Self { threads: threads.collect(), counts }
    }

    /// What became of them so far.
    pub fn seen(&self) -> Seen {
        let [stable, v2, refused, reset, late, failed] =
            self.counts.seen.each_ref().map(|count| count.load(Ordering::Relaxed));
        Seen { stable, v2, refused, reset, late, failed }
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.counts.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn connect(counts: &Counts, interval: Duration, mut next: Instant) {
    // A step that is coprime to the number of addresses visits all of them.
    const STRIDE: u32 = 2_654_435_761;
    while !counts.stop.load(Ordering::Relaxed) && !wait::interrupted() {
        wait::pause_until(next);
        // Where the host is too slow for the rate, the rest is not made up for.
        next = (next + interval).max(Instant::now());
        let number = counts.next.fetch_add(1, Ordering::Relaxed);
        let family = Family::ALL[(number % 2) as usize];
        let source = family.client(number.wrapping_mul(STRIDE) % CLIENTS);
        let to = SocketAddr::new(family.vip(), HTTP_PORT);
        let begun = Instant::now();
        let opened = Connection::open_here(source, to);
        let took = begun.elapsed();
        let count = |at: usize| counts.seen[at].fetch_add(1, Ordering::Relaxed);
        match opened.and_then(|mut opened| opened.name()) {
            Ok(name) if version_of(&name) == "stable" => drop(count(0)),
            Ok(_) => {
                count(1);
                if took >= LATE {
                    count(4);
                }
            }
            Err(error) => drop(count(failure(&error))),
        }
    }
}

fn failure(error: &io::Error) -> usize {
    match error.kind() {
        ErrorKind::ConnectionRefused => 2,
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => 3,
        _ => 5,
    }
}
