//! The agent's state over a kernel that is not there: begun anew whenever a request has changed it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, LazyLock, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use canary_agent::{
    api::model::MapStatus,
    config::{Config, load_str},
    daemon::{AttachError, Attachment, Event, Kernel, Moment, Request, State},
    datapath::Swept,
    plan::{Adopted, DataPlane, InterfaceMacs, NextHop, Sweep, Tags},
    telemetry::Metrics,
};
use canary_ebpf_common::{
    abi::{BackendCounters, FlowCounters, Reason},
    entry::BackendIndex,
};

use crate::store::Memory;

/// When the world begins.
const BEGIN_MS: u64 = 5_000;
/// The same by the wall clock: a Tuesday.
const UNIX_MS: u64 = 1_700_000_000_000;
/// What is due in this time after a request happens before the next one.
const AHEAD_MS: u64 = 8_000;
/// And at most so often.
const MOST_WAKEUPS: usize = 64;

static CONFIG: LazyLock<Config> = LazyLock::new(|| {
    let text = include_str!("../../seeds/config/whole.toml");
    load_str("agent.toml", text).expect("a good configuration").config
});

/// Takes everything, and has counted nothing. Clones are one kernel.
#[derive(Clone, Default)]
struct Nothing {
    sweep: Arc<Mutex<Option<Sweep>>>,
}

impl Nothing {
    fn sweeping(&self) -> Option<Sweep> {
        self.sweep.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Kernel for Nothing {
    fn apply(&mut self, _: &DataPlane) -> Result<(), String> {
        Ok(())
    }

    fn attach(&mut self, _: &str) -> Result<Attachment, AttachError> {
        Ok(Attachment { ifindex: 7, mode: "native", warning: None })
    }

    fn set_macs(&mut self, _: &BTreeMap<u32, InterfaceMacs>) -> Result<(), String> {
        Ok(())
    }

    fn detach(&mut self, _: &str) -> Result<(), String> {
        Ok(())
    }

    fn clean(&mut self, _: &DataPlane) -> Result<(), String> {
        Ok(())
    }

    fn sweep(&mut self, sweep: Sweep) {
        let before = self.sweep.lock().unwrap_or_else(PoisonError::into_inner).replace(sweep);
        assert!(before.is_none(), "a second sweep at once");
    }

    fn expire(&mut self) {}

    fn flows(&self) -> (FlowCounters, Swept) {
        Default::default()
    }

    fn counters(&self, backends: &[BackendIndex]) -> Vec<BackendCounters> {
        vec![BackendCounters::default(); backends.len()]
    }

    fn reasons(&self) -> Vec<u64> {
        vec![0; Reason::ALL.len()]
    }

    fn maps(&self) -> Vec<MapStatus> {
        Vec::new()
    }
}

/// An agent, its clock, and the number of its last change.
pub(crate) struct World {
    state: State<Memory, Nothing>,
    kernel: Nothing,
    boot_ms: u64,
    revision: Arc<AtomicU64>,
    /// That of the beginning.
    first: u64,
    /// Whether a request has changed something since this was last set to `false`: by itself, not
    /// by what was due after it.
    pub(crate) changed: bool,
    /// Whether something is due that has not happened yet, which the next request brings about.
    behind: bool,
}

impl World {
    pub(crate) fn begin() -> Self {
        let (kernel, revision) = (Nothing::default(), Arc::new(AtomicU64::new(0)));
        let store = Memory::new(Arc::clone(&revision));
        let at = Moment { boot_ms: BEGIN_MS, unix_ms: UNIX_MS };
        let state =
            State::begin(&CONFIG, store, kernel.clone(), Adopted::default(), Metrics::new(), at);
        let state = state.unwrap_or_else(|error| panic!("{error}"));
        let mut world = Self {
            state,
            kernel,
            boot_ms: BEGIN_MS,
            revision,
            first: 0,
            changed: false,
            behind: false,
        };
        let hop = |addr: std::net::IpAddr| NextHop {
            ifindex: 3,
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 1, 1],
            source: if addr.is_ipv4() { [10, 0, 0, 1].into() } else { CONFIG.services[0].vips[1] },
            tags: Tags::default(),
            mtu: 1500,
            silent: None,
        };
        let hops = world.state.addresses().into_iter().map(|addr| (addr, Ok(hop(addr)))).collect();
        world.happens(Event::NextHops(hops));
        let now = world.now();
        world.state.go(now).unwrap_or_else(|error| panic!("{error}"));
        world.happens(Event::Tick);
        world.first = world.revision();
        world
    }

    fn now(&self) -> Moment {
        Moment { boot_ms: self.boot_ms, unix_ms: UNIX_MS + self.boot_ms - BEGIN_MS }
    }

    fn revision(&self) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    /// Whether it is not as it began.
    pub(crate) fn is_used(&self) -> bool {
        self.revision() != self.first || self.boot_ms != BEGIN_MS
    }

    fn happens(&mut self, event: Event) -> Option<u64> {
        let mut due = self.state.handle(event, self.now());
        while self.kernel.sweeping().is_some() {
            due = self.state.handle(Event::Swept(Ok(())), self.now());
        }
        due
    }

    /// Answers a request, and lets happen what is due soon after it.
    pub(crate) fn serve(&mut self, request: Request) {
        let reads = matches!(
            request,
            Request::Status { .. }
                | Request::Pulse { .. }
                | Request::Backends { .. }
                | Request::Explain { .. }
                | Request::Audiences { .. }
                | Request::Audience { .. }
                | Request::Client { .. }
                | Request::RolloutHistory { .. }
                | Request::Prospect { .. }
                | Request::Events { .. }
        );
        let before = self.revision();
        let mut due = self.happens(Event::Request { request, arrived: Instant::now() });
        let changed = self.revision() != before && !self.behind;
        assert!(!(reads && changed), "a question has changed something");
        self.changed |= changed;
        let end = self.boot_ms + AHEAD_MS;
        for _ in 0..MOST_WAKEUPS {
            let Some(next) = due.filter(|next| *next <= end) else { break };
            self.boot_ms = self.boot_ms.max(next);
            due = self.happens(Event::Wakeup);
        }
        self.behind = due.is_some_and(|due| due <= end);
    }
}
