//! The demo's clients: new connections from many addresses, and connections
//! that stay open while the split moves.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use canary_tests::{
    client::{Connection, version_of},
    hold::{Hold, Kind, Tally},
    netns::Namespace,
    server::{HTTP_PORT, Server},
    topology::{CLIENTS, Family},
    wait,
};

/// Threads that open new connections.
const WORKERS: u32 = 4;

/// Reasons that are kept to be shown.
const REASONS_MAX: usize = 5;

/// What clients saw during one step.
#[derive(Debug, Default)]
pub(crate) struct StepCount {
    /// Answered requests.
    pub(crate) answered: AtomicU64,
    /// Those that the canary answered.
    pub(crate) canary: AtomicU64,
    /// Requests without an answer.
    pub(crate) errors: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    steps: Vec<StepCount>,
    /// Index of the step that new connections count for; none of them while a
    /// change is under way.
    step: AtomicUsize,
    /// Errors of connections that began during a change.
    other_errors: AtomicU64,
    canary: String,
    next_client: AtomicU32,
    reasons: Mutex<Vec<String>>,
    stop: AtomicBool,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || wait::interrupted()
    }

    fn client(&self, family: Family) -> IpAddr {
        // A step that is coprime to the number of addresses visits all of them.
        const STRIDE: u32 = 2_654_435_761;
        let number = self.next_client.fetch_add(1, Ordering::Relaxed);
        family.client(number.wrapping_mul(STRIDE) % CLIENTS)
    }

    fn blame(&self, reason: String) {
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if reasons.len() < REASONS_MAX {
            reasons.push(reason);
        }
    }
}

/// Clients at work; they stop and close their connections on drop.
pub(crate) struct Load {
    shared: Arc<Shared>,
    held: Hold,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `rate` new connections a second, counted for no step yet.
    pub(crate) fn start(
        client: &Namespace,
        servers: &[Server],
        canary: &str,
        steps: usize,
        rate: u32,
    ) -> Self {
        let shared = Arc::new(Shared {
            steps: (0..steps).map(|_| StepCount::default()).collect(),
            step: AtomicUsize::new(usize::MAX),
            other_errors: AtomicU64::new(0),
            canary: canary.to_owned(),
            next_client: AtomicU32::new(0),
            reasons: Mutex::new(Vec::new()),
            stop: AtomicBool::new(false),
        });
        let interval = Duration::from_secs(1) * WORKERS / rate.max(1);
        let threads = (0..WORKERS)
            .map(|worker| {
                let shared = Arc::clone(&shared);
                client.spawn_thread(&format!("client-{worker}"), move || {
                    new_connections(&shared, interval);
                })
            })
            .collect();
        Self { shared, held: Hold::start(client, servers, 0), threads }
    }

    /// Opens connections that stay: half of them kept alive, half long downloads.
    pub(crate) fn hold(&mut self, connections: u32) {
        for number in 0..connections {
            let family = Family::ALL[(number / 2 % 2) as usize];
            let kind = if number % 2 == 1 { Kind::Download } else { Kind::KeepAlive };
            self.held.open(kind, family, self.shared.client(family));
        }
        self.held.wait_opened();
    }

    /// New connections count for this step from now on; `None` while it changes.
    pub(crate) fn set_step(&self, step: Option<usize>) {
        self.shared.step.store(step.unwrap_or(usize::MAX), Ordering::SeqCst);
    }

    /// What clients saw during a step.
    pub(crate) fn step(&self, index: usize) -> &StepCount {
        &self.shared.steps[index]
    }

    /// What the connections saw that stay open.
    pub(crate) fn held(&self) -> Tally {
        self.held.tally()
    }

    /// Errors of connections that began while a change was under way.
    pub(crate) fn other_errors(&self) -> u64 {
        self.shared.other_errors.load(Ordering::Relaxed)
    }

    /// The first reasons for errors and broken connections.
    pub(crate) fn reasons(&self) -> Vec<String> {
        let mut reasons =
            self.shared.reasons.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for record in self.held.records() {
            let (kind, from) = (record.kind, record.from);
            let faults = record.faults.iter();
            reasons.extend(faults.map(|fault| format!("{kind:?} from {from}: {}", fault.what)));
        }
        reasons.truncate(REASONS_MAX);
        reasons
    }

    /// Ends all clients and closes their connections.
    pub(crate) fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Its connections close when the rest goes: how they end is nobody's concern by now.
        for thread in self.threads.drain(..) {
            // A client that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop();
    }
}

fn vip(family: Family) -> SocketAddr {
    SocketAddr::new(family.vip(), HTTP_PORT)
}

fn new_connections(shared: &Shared, interval: Duration) {
    let mut next = Instant::now();
    let mut family = Family::V4;
    while !shared.stopped() {
        next += interval;
        wait::pause_until(next);
        // Where the host is too slow for the rate, the rest is not made up for.
        next = next.max(Instant::now() - interval);
        family = match family {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        };
        let index = shared.step.load(Ordering::SeqCst);
        let step = shared.steps.get(index);
        let source = shared.client(family);
        match Connection::open_here(source, vip(family)).and_then(|mut opened| opened.name()) {
            Ok(name) => {
                // A change between connecting and the answer: which split
                // decided is not known.
                if let Some(step) = step
                    && shared.step.load(Ordering::SeqCst) == index
                {
                    if version_of(&name) == shared.canary {
                        step.canary.fetch_add(1, Ordering::Relaxed);
                    }
                    step.answered.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(_) if shared.stopped() => return,
            Err(error) => {
                let errors = step.map_or(&shared.other_errors, |step| &step.errors);
                errors.fetch_add(1, Ordering::Relaxed);
                shared.blame(format!("request from {source}: {error}"));
            }
        }
    }
}
