//! An agent's state without a kernel, and what it has done.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, Mutex},
    time::Instant,
};

use canary_agent::{
    api::model::{
        BackendReport, BackendRequest, Backends, ChangeReport, Explain, MapStatus, SplitRequest,
        Status,
    },
    config::model::Config,
    daemon::{
        AttachError, Attachment, Counter, Event, ExplainQuery, Kernel, Moment, Peer, Refusal,
        Request, State,
    },
    datapath::{Census, Counted, PanicOrder, Swept},
    plan::{Adopted, DataPlane, InterfaceMacs, PanicMark, Sweep},
    store::{
        Change, Commit, Event as Stored, EventQuery, EvidenceLine, Notice, Snapshot, SqliteStore,
        StateStore, StoreError, StoredMember, StoredRollout,
    },
    telemetry::Metrics,
};
use canary_ebpf_common::{
    abi::{BackendCounters, FlowCounters},
    entry::BackendIndex,
};
use tokio::sync::{oneshot, watch};

use crate::plan_support::{config, hop, service};

/// What has happened to the recording kernel and store, and what is to go wrong.
#[derive(Default)]
pub(crate) struct Host {
    pub(crate) log: Vec<String>,
    pub(crate) plane: DataPlane,
    pub(crate) refuse_apply: bool,
    pub(crate) refuse_store: bool,
    /// Only where rollouts stand can't be stored.
    pub(crate) refuse_rollouts: bool,
    pub(crate) missing: Vec<String>,
    /// Interfaces that somebody else's program is on.
    pub(crate) refused: Vec<String>,
    pub(crate) packets: HashMap<BackendIndex, u64>,
    pub(crate) connections: HashMap<BackendIndex, u64>,
    /// Buckets of the second version, in each plan that was applied.
    pub(crate) owned: Vec<usize>,
    /// Which start of the host it is.
    pub(crate) boot_id: String,
    /// What counting open connections comes to; without it there is nothing to count.
    pub(crate) census: Option<Census>,
    /// What is being swept.
    pub(crate) sweep: Option<Sweep>,
    /// What was sent to control behind the agent's back; the second is only found when the
    /// maps are written.
    pub(crate) panics: Option<Adopted>,
    pub(crate) panics_at_apply: Option<Adopted>,
    /// Services that were marked, and numbers of marks that are done with.
    pub(crate) marked: Vec<String>,
    pub(crate) marks: Vec<PanicMark>,
    pub(crate) unmarked: Vec<u64>,
    /// Sweeps take as long as the test wants.
    pub(crate) slow_sweeps: bool,
}

#[derive(Clone, Default)]
pub(crate) struct Shared(Arc<Mutex<Host>>);

impl Shared {
    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut Host) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }
}

impl Kernel for Shared {
    fn apply(&mut self, plane: &DataPlane) -> Result<(), String> {
        self.with(|host| {
            if let Some(found) = host.panics_at_apply.take() {
                host.panics = Some(found);
            }
            if host.panics.is_some() {
                return Err("the tables are to be read first".to_owned());
            }
            if host.refuse_apply {
                return Err("the kernel is in a bad mood".to_owned());
            }
            host.log.push("apply".to_owned());
            let ledger = plane.services.first().map(|service| service.ledger.iter());
            let owned = ledger.into_iter().flatten().filter(|entry| entry.owner() == 1).count();
            host.owned.push(owned);
            host.plane = plane.clone();
            Ok(())
        })
    }

    fn attach(&mut self, interface: &str) -> Result<Attachment, AttachError> {
        let interface = interface.to_owned();
        self.with(|host| match () {
            () if host.missing.contains(&interface) => Err(AttachError::Missing),
            () if host.refused.contains(&interface) => {
                Err(AttachError::Refused("another program is on it".to_owned()))
            }
            () => {
                host.log.push(format!("attach {interface}"));
                Ok(Attachment { ifindex: 7, mode: "native", warning: None })
            }
        })
    }

    fn detach(&mut self, interface: &str) -> Result<(), String> {
        self.with(|host| host.log.push(format!("detach {interface}")));
        Ok(())
    }

    fn clean(&mut self, _: &DataPlane) -> Result<(), String> {
        self.with(|host| host.log.push("clean".to_owned()));
        Ok(())
    }

    fn sweep(&mut self, sweep: Sweep) {
        self.with(|host| {
            assert!(host.sweep.is_none(), "a second sweep at once");
            host.sweep = Some(sweep);
        });
    }

    fn set_macs(&mut self, _: &BTreeMap<u32, InterfaceMacs>) -> Result<(), String> {
        Ok(())
    }

    fn expire(&mut self) {
        self.with(|host| host.log.push("expire".to_owned()));
    }

    fn flows(&self) -> (FlowCounters, Swept) {
        Default::default()
    }

    fn counters(&self, backends: &[BackendIndex]) -> Vec<BackendCounters> {
        let of = |host: &Host, index| host.connections.get(index).copied().unwrap_or(0);
        self.with(|host| {
            let one = |index| BackendCounters {
                connections: of(host, index),
                packets: host.packets.get(index).copied().unwrap_or(0),
                ..Default::default()
            };
            backends.iter().map(one).collect()
        })
    }

    fn reasons(&self) -> Vec<u64> {
        vec![1, 2, 3]
    }

    fn maps(&self) -> Vec<MapStatus> {
        Vec::new()
    }

    fn panics(&mut self) -> Result<Option<Adopted>, String> {
        Ok(self.with(|host| host.panics.take()))
    }

    fn panics_adopted(&mut self, marks: &[PanicMark]) {
        self.with(|host| {
            host.unmarked.extend(marks.iter().map(|mark| mark.number));
            host.marks.retain(|mark| !marks.contains(mark));
        });
    }

    fn mark_panic(&mut self, order: &PanicOrder) -> Result<Vec<PanicMark>, String> {
        let PanicOrder { services, moves, back, reason, uid, id, unix_ms, .. } = order.clone();
        let services = services.unwrap_or_default();
        self.with(|host| {
            host.log.push("mark".to_owned());
            host.marked.extend(services.iter().cloned());
        });
        let mark = |service: String| {
            let reason = reason.clone();
            PanicMark { table: 0, service, number: 1, id, unix_ms, uid, moves, back, reason }
        };
        let marks: Vec<PanicMark> = services.into_iter().map(mark).collect();
        self.with(|host| host.marks.extend(marks.iter().cloned()));
        Ok(marks)
    }

    fn boot_id(&self) -> String {
        self.with(|host| host.boot_id.clone())
    }

    fn counter(&self) -> Option<Counter> {
        let census = self.with(|host| host.census.clone())?;
        Some(Box::new(move |_: &[Counted]| Ok(census)))
    }
}

/// A real store that can be made to fail, and says when it is written.
pub(crate) struct Watched(SqliteStore, Shared);

impl StateStore for Watched {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        self.0.load()
    }

    fn commit(&mut self, expected: u64, commits: &[Commit]) -> Result<u64, StoreError> {
        if self.1.with(|host| host.refuse_store) {
            let reason = "database or disk is full".to_owned();
            return Err(StoreError::Unavailable { path: "/state.db".into(), reason });
        }
        self.1.with(|host| host.log.push("store".to_owned()));
        self.0.commit(expected, commits)
    }

    fn changes(&mut self, after: u64, limit: usize) -> Result<Vec<(u64, Change)>, StoreError> {
        self.0.changes(after, limit)
    }

    fn record(&mut self, notices: &[Notice]) -> Result<(), StoreError> {
        self.0.record(notices)
    }

    fn keep_rollout(
        &mut self,
        rollout: &StoredRollout,
        evidence: &[EvidenceLine],
        durable: bool,
    ) -> Result<u64, StoreError> {
        if self.1.with(|host| host.refuse_store || host.refuse_rollouts) {
            let reason = "database or disk is full".to_owned();
            return Err(StoreError::Unavailable { path: "/state.db".into(), reason });
        }
        self.0.keep_rollout(rollout, evidence, durable)
    }

    fn keep_members(
        &mut self,
        kept: &[StoredMember],
        gone: &[(String, ipnet::IpNet)],
        durable: bool,
    ) -> Result<(), StoreError> {
        if self.1.with(|host| host.refuse_store) {
            let reason = "database or disk is full".to_owned();
            return Err(StoreError::Unavailable { path: "/state.db".into(), reason });
        }
        self.0.keep_members(kept, gone, durable)
    }

    fn rollouts(&mut self, name: &str, limit: usize) -> Result<Vec<StoredRollout>, StoreError> {
        self.0.rollouts(name, limit)
    }

    fn evidence(&mut self, rollout: u64) -> Result<Vec<EvidenceLine>, StoreError> {
        self.0.evidence(rollout)
    }

    fn changes_before(
        &mut self,
        service: Option<&str>,
        before: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Change)>, StoreError> {
        self.0.changes_before(service, before, limit)
    }

    fn events(&mut self, query: &EventQuery) -> Result<Vec<Stored>, StoreError> {
        self.0.events(query)
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.0.watch()
    }
}

pub(crate) struct Agent {
    pub(crate) state: State<Watched, Shared>,
    pub(crate) host: Shared,
    pub(crate) boot_ms: u64,
    /// When the host was started, by the wall clock.
    pub(crate) unix_ms: u64,
}

impl Agent {
    pub(crate) fn start(dir: &Path, config: &Config, host: Shared, adopted: Adopted) -> Self {
        Self::start_at(dir, config, host, adopted, 5_000)
    }

    pub(crate) fn start_at(
        dir: &Path,
        config: &Config,
        host: Shared,
        adopted: Adopted,
        boot_ms: u64,
    ) -> Self {
        Self::start_with(dir, config, host, adopted, boot_ms, 1_700_000_000_000)
    }

    pub(crate) fn start_with(
        dir: &Path,
        config: &Config,
        host: Shared,
        adopted: Adopted,
        boot_ms: u64,
        unix_ms: u64,
    ) -> Self {
        let store = Watched(SqliteStore::new(dir), host.clone());
        let at = Moment { boot_ms, unix_ms: unix_ms + boot_ms };
        let state = State::begin(config, store, host.clone(), adopted, Metrics::new(), at).unwrap();
        let mut agent = Self { state, host, boot_ms, unix_ms };
        let backends = config.services.iter().flat_map(|s| &s.versions).flat_map(|v| &v.backends);
        let hops = backends.map(|b| (b.addr.ip(), Ok(hop(b.addr)))).collect();
        agent.event(Event::NextHops(hops));
        let at = agent.now();
        agent.state.go(at).unwrap();
        agent.sweep();
        agent
    }

    pub(crate) fn now(&self) -> Moment {
        Moment { boot_ms: self.boot_ms, unix_ms: self.unix_ms + self.boot_ms }
    }

    pub(crate) fn event(&mut self, event: Event) -> Option<u64> {
        let now = self.now();
        let wakeup = self.state.handle(event, now);
        self.sweep().or(wakeup)
    }

    /// Lets sweeps end that have begun, unless they are slow.
    pub(crate) fn sweep(&mut self) -> Option<u64> {
        let now = self.now();
        let mut wakeup = None;
        while self.host.with(|host| !host.slow_sweeps && host.sweep.take().is_some()) {
            wakeup = self.state.handle(Event::Swept(Ok(())), now);
        }
        wakeup
    }

    pub(crate) fn wait(&mut self, ms: u64) {
        self.boot_ms += ms;
        self.event(Event::Tick);
    }

    pub(crate) fn ask<T>(&mut self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> T {
        let (reply, answer) = oneshot::channel();
        self.event(Event::Request { request: request(reply), arrived: Instant::now() });
        // What is counted is answered by another thread.
        answer.blocking_recv().expect("an answer")
    }

    /// Begins a split whose buckets are watched first.
    pub(crate) fn learn(
        &mut self,
        split: &[(&str, &str)],
    ) -> (oneshot::Receiver<Result<ChangeReport, Refusal>>, Option<u64>) {
        let split = split.iter().map(|(v, s)| ((*v).to_owned(), (*s).to_owned())).collect();
        let request = SplitRequest { split, learn: true, ..SplitRequest::default() };
        let peer = Peer { uid: 1000, gid: 1000, pid: None };
        let (reply, answer) = oneshot::channel();
        let request = Request::Split { service: "shop".to_owned(), request, peer, reply };
        let wakeup = self.event(Event::Request { request, arrived: Instant::now() });
        (answer, wakeup)
    }

    pub(crate) fn listed(&mut self) -> Backends {
        let service = "shop".to_owned();
        self.ask(|reply| Request::Backends { service, reply }).unwrap()
    }

    /// `state` may be followed by `--dry-run` and `--force`.
    pub(crate) fn tell(&mut self, backend: &str, state: &str) -> Result<BackendReport, Refusal> {
        let request = BackendRequest {
            state: state.split(' ').next().unwrap().to_owned(),
            reason: Some("because".to_owned()),
            dry_run: state.contains("--dry-run"),
            force: state.contains("--force"),
            ..BackendRequest::default()
        };
        let peer = Peer { uid: 1000, gid: 1000, pid: None };
        let (service, backend) = ("shop".to_owned(), backend.to_owned());
        self.ask(|reply| Request::Backend { service, backend, request, peer, reply })
    }

    pub(crate) fn request(
        &mut self,
        service: &str,
        split: &[(&str, &str)],
        dry_run: bool,
    ) -> Result<ChangeReport, Refusal> {
        let split: BTreeMap<_, _> =
            split.iter().map(|(v, s)| ((*v).to_owned(), (*s).to_owned())).collect();
        let reason = Some("because".to_owned());
        let request = SplitRequest { split, reason, dry_run, ..SplitRequest::default() };
        let peer = Peer { uid: 1000, gid: 1000, pid: None };
        let service = service.to_owned();
        self.ask(|reply| Request::Split { service, request, peer, reply })
    }

    pub(crate) fn split(&mut self, split: &[(&str, &str)]) -> Result<ChangeReport, Refusal> {
        self.request("shop", split, false)
    }

    pub(crate) fn status(&mut self) -> Status {
        self.ask(|reply| Request::Status { reply })
    }

    pub(crate) fn explain(
        &mut self,
        service: &str,
        from: &str,
        to: Option<&str>,
        protocol: Option<&str>,
    ) -> Result<Explain, Refusal> {
        let query = ExplainQuery {
            from: from.to_owned(),
            to: to.map(str::to_owned),
            protocol: protocol.map(str::to_owned),
        };
        let service = service.to_owned();
        self.ask(|reply| Request::Explain { service, query, reply })
    }

    pub(crate) fn owners(&self) -> Vec<u8> {
        self.state.plane().services[0].ledger.iter().map(|l| l.owner()).collect()
    }
}

pub(crate) fn shop() -> Config {
    config(vec![
        service(
            "shop",
            &[
                ("stable", &[("10.0.1.1:443", 1), ("10.0.1.2:443", 1)]),
                ("v2", &[("10.0.2.1:443", 1)]),
                ("v3", &[("10.0.3.1:443", 1)]),
            ],
        ),
        service("api", &[("stable", &[("10.0.1.1:443", 1)])]),
    ])
}

pub(crate) fn agent(dir: &tempfile::TempDir) -> Agent {
    Agent::start(dir.path(), &shop(), Shared::default(), Adopted::default())
}
