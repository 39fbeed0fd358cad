//! The shell around [`State`]: what starts the agent, turns signals, sockets and
//! netlink into events, and runs the loop.
//!
//! The loop has a thread of its own: a slow disk delays no socket, and a hundred
//! clients do not delay the loop.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use canary_ebpf_common::{
    abi::{BackendCounters, FlowCounters},
    entry::BackendIndex,
};
use nix::time::{ClockId, clock_gettime};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};

use super::{
    AttachError, Attachment, Counter, Event, Handle, Kernel, LinkStates, Moment, Refusal, Request,
    State,
    lock::{self, LockError},
    memory,
    notify::Notifier,
    reload::{HostWants, Listening, Reloader},
    signals::{self, Known, SharedKnown, WatchedService, Watcher},
    sweep::{self, Order},
};
use crate::{
    api::{self, Api, ControlSocket, model::MapStatus, reload::ReloadRequest},
    cli::RunOptions,
    config::{self, Config, model::Forward},
    datapath::{self, Datapath, PanicOrder, Reader, Swept},
    doctor::{self, Check},
    health::{self, Prober},
    hooks,
    plan::{Adopted, BootMs, DataPlane, Hops, InterfaceMacs, PanicMark, QUARANTINE_MS, Sweep},
    resolve::{self, Resolver, Unresolved, VipManager},
    store::{SqliteStore, StateStore},
    telemetry::{self, Metrics},
};

/// How long the first plan waits for the host's routes and neighbours.
const FIRST_ANSWER: Duration = Duration::from_secs(3);
/// Requests that may wait for the loop.
const REQUESTS: usize = 256;
/// Reloads that may wait for their turn.
const RELOADS: usize = 16;
/// The nice value that the agent gives itself: well before others, behind what the host's
/// owner has put first.
const NICE: i32 = -10;
/// Exit code for a configuration that can't be used.
const BAD_CONFIG: u8 = 78;
/// Exit code for what the caller has no right to.
const NOT_PERMITTED: u8 = 77;

/// Runs the agent until it is told to stop. What it has brought about stays in
/// the kernel, so that traffic goes on.
///
/// # Errors
/// Whatever keeps it from starting; a [`Refusal`] in it says the exit code.
pub fn run(options: RunOptions) -> anyhow::Result<ExitCode> {
    let RunOptions { config: file, socket_override, replace, rebuild, log_format: _ } = options;
    // Where a daemon is started from says nothing about where it reads again.
    let file = std::path::absolute(&file).unwrap_or(file);
    let loaded = match config::load(&file) {
        Ok(loaded) => loaded,
        Err(diagnostics) => {
            eprint!("{}", config::render(&diagnostics));
            return Ok(ExitCode::from(BAD_CONFIG));
        }
    };
    for warning in &loaded.warnings {
        tracing::warn!("{}", warning.message);
    }
    let mut config = loaded.config;
    if let Some(socket) = &socket_override {
        config.agent.socket.clone_from(socket);
    }
    telemetry::set_log_filter(&config.agent.log);
    let (_state_lock, _pins_lock, made) = locks(&config)?;
    let locked = Instant::now();
    // What is pinned must not change for a release that can't go on from the state.
    if let Some(newer) = SqliteStore::new(&config.agent.state_dir).newer_schema() {
        made.undo();
        return Err(newer.into());
    }
    let doubts = say_doubts(&config);

    let (datapath, adopted) = Datapath::open(datapath::Options {
        bpffs: config.agent.bpffs.clone(),
        capacity: config.agent.capacity,
        // A reload may bring the first service that translates.
        nat_ports: Some(config.agent.nat_ports.clone()),
        xdp_mode: config.agent.xdp_mode,
        replace,
        rebuild,
        rare: true,
    })
    .map_err(|error| {
        made.undo();
        with_remedies(refusal(error), &doubts)
    })?;
    if let Some(handover) = datapath.handover() {
        match handover.lost.is_empty() {
            true => tracing::info!("{handover}"),
            false => tracing::warn!("{handover}"),
        }
    }
    tracing::info!(
        tables = adopted.services.len(),
        backends = adopted.backends.len(),
        "the data plane is open"
    );
    // Audiences that have lost their routes while nobody ran keep their open connections.
    let config = adopted.remembering(&config);
    if adopted.lacks_backends(&config) {
        // New backends get indices that an earlier agent may have freed just before its end.
        let rest = Duration::from_millis(QUARANTINE_MS).saturating_sub(locked.elapsed());
        thread::sleep(rest);
    }
    come_first();
    memory::keep_some();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start a runtime")?;
    let from = (file, socket_override);
    let done = runtime.block_on(serve(Arc::new(config), from, datapath, adopted));
    // Whoever still asks has been given time; a name look-up in progress is not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done.map(|()| ExitCode::SUCCESS).map_err(|error| with_remedies(error, &doubts))
}

/// Looks at the host, as far as that takes no time, and says what it is not ready for.
fn say_doubts(config: &Config) -> Vec<Check> {
    let begun = Instant::now();
    let doubts = doctor::doubts(config);
    tracing::debug!(took = ?begun.elapsed(), "the host has been looked at");
    for check in &doubts {
        let name = doctor::name(check.name);
        let Check { about, found, remedy, .. } = check;
        let about = about.as_deref().map(|about| format!(" {about}")).unwrap_or_default();
        let remedy = remedy.as_deref().unwrap_or("canary-agent doctor");
        match check.stops_steering() {
            true => tracing::error!("{name}{about}: {found}; {remedy}"),
            false => tracing::warn!("{name}{about}: {found}; {remedy}"),
        }
    }
    doubts
}

/// An error that names no next step, with those for what this host was not ready for.
fn with_remedies(error: anyhow::Error, doubts: &[Check]) -> anyhow::Error {
    let remedies: Vec<&str> = doubts
        .iter()
        .filter(|check| check.stops_steering())
        .filter_map(|check| check.remedy.as_deref())
        .collect();
    if remedies.is_empty() {
        return error;
    }
    let refusal = match error.downcast::<Refusal>() {
        Ok(refusal) if refusal.help.is_some() => refusal,
        Ok(refusal) => Refusal { help: Some(remedies.join("; ")), ..refusal },
        Err(error) => Refusal {
            code: "not_ready",
            message: format!("{error:#}"),
            help: Some(remedies.join("; ")),
            exit_code: 1,
        },
    };
    refusal.into()
}

/// Puts this thread, and those that it starts, before others on a busy host: a split has to
/// come through, and a check that got no processor would call a good backend down. Whoever
/// has started the agent with a nice value of his own keeps it.
fn come_first() {
    if !matches!(rustix::process::getpriority_process(None), Ok(0)) {
        return;
    }
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::info!(%error, "the agent keeps its nice value of 0: on a busy host, changes and checks may be late");
    }
}

/// Makes sure that an agent can work here, and that no other does; makes the
/// directories of the pins.
fn locks(config: &Config) -> anyhow::Result<(Option<lock::Lock>, lock::Lock, datapath::Made)> {
    let refused = |error: LockError| Refusal {
        code: "already_running",
        message: error.to_string(),
        help: None,
        exit_code: 1,
    };
    datapath::ready(&config.agent.bpffs).map_err(refusal)?;
    let state = match lock::lock_state_dir(&config.agent.state_dir) {
        Ok(lock) => Some(lock),
        Err(error @ LockError::Held { .. }) => return Err(refused(error).into()),
        // A read-only disk must not keep the data plane from starting: the pins are locked too.
        Err(error) => {
            tracing::warn!(%error, "the state directory is not locked");
            None
        }
    };
    let made = datapath::prepare(&config.agent.bpffs).map_err(refusal)?;
    let pins = lock::lock_pins(&config.agent.bpffs).map_err(refused)?;
    Ok((state, pins, made))
}

fn refusal(error: datapath::Error) -> anyhow::Error {
    let (code, exit_code) = match &error {
        error if error.not_permitted() => ("not_permitted", NOT_PERMITTED),
        datapath::Error::Bpffs { .. } => ("no_bpffs", 1),
        datapath::Error::OldKernel(_) => ("old_kernel", 1),
        datapath::Error::Refused(_) => ("refused_by_kernel", 1),
        datapath::Error::NewerLayout { .. } => ("newer_release", 1),
        datapath::Error::ForeignPins { .. } | datapath::Error::HalfHandedOver { .. } => {
            ("foreign_pins", 1)
        }
        datapath::Error::CapacityInUse { .. } => ("capacity_in_use", 1),
        _ => ("failed", 1),
    };
    Refusal { code, message: error.to_string(), help: error.help(), exit_code }.into()
}

/// Brings everything up, serves until a signal comes, and winds down.
async fn serve(
    config: Arc<Config>,
    (file, socket_override): (PathBuf, Option<PathBuf>),
    datapath: Datapath,
    adopted: Adopted,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let socket = ControlSocket::bind(&config.agent.socket)?;
    let metrics = Metrics::new();
    let (handle, requests) = Handle::channel(REQUESTS);
    let (reloads, asked) = mpsc::channel(RELOADS);
    let (take_back, take_backs) = mpsc::channel(1);
    let handle = handle.with_reloads(reloads);
    let (events, received) = mpsc::channel(64);

    let mut alerts = Vec::new();
    if config.services.iter().any(|s| s.forward == Forward::Nat)
        && let Err(error) = resolve::reserve_ports(&config.agent.nat_ports)
    {
        alerts.push(format!("the host may use source ports of translated flows: {error}"));
    }
    let listener = match config.agent.listen {
        None => None,
        Some(address) => match TcpListener::bind(address).await {
            Ok(listener) => Some(listener),
            Err(error) => {
                alerts.push(format!("`agent.listen`: nothing is served at {address}: {error}"));
                None
            }
        },
    };

    let mut datapath = datapath;
    let reader = datapath.reader();
    let sweeper = datapath.sweeper().map_err(refusal)?;
    let watcher = datapath.signals().and_then(Watcher::new).map_err(refusal)?;
    let (watches, known) =
        signals::start(watcher, events.clone()).context("can't start the signals' thread")?;
    let orders =
        sweep::start(sweeper, events.clone()).context("can't start the flow tables' thread")?;
    let handover = datapath.handover().map(ToString::to_string);
    let kernel = Live { datapath, reader, orders, watches, known };
    let store = SqliteStore::new(&config.agent.state_dir);
    let mut state = State::begin(&config, store, kernel, adopted, metrics.clone(), moment()?)?;
    if let Some(handover) = handover {
        state.note(moment()?, "maps", handover);
    }
    state.take_reloads_back(take_back);
    let (errands, asked_of_others) = mpsc::unbounded_channel();
    state.send_errands_to(errands);
    let calls = tokio::spawn(hooks::run(asked_of_others, events.clone()));

    let resolver = Arc::new(Resolver::start()?);
    resolver.set_interfaces(config.agent.interfaces.iter().cloned());
    resolver.set_destinations(state.addresses());
    let mut updates = resolver.updates();
    let addresses: BTreeSet<IpAddr> = state.addresses().into_iter().collect();
    let full = |update: &resolve::Update| {
        addresses.iter().all(|ip| {
            !matches!(update.hops.get(ip), None | Some(Err(Unresolved::Resolving { .. })))
        })
    };
    // Not in time: the first plan goes by what is known.
    let _ = tokio::time::timeout(FIRST_ANSWER, updates.wait_for(full)).await;
    let update = updates.borrow_and_update().clone();
    state.handle(Event::Alerts("start", alerts), moment()?);
    state.handle(Event::NextHops(next_hops(&update)), moment()?);
    state.handle(Event::Links(links(&update)), moment()?);
    state.handle(Event::Macs(Arc::clone(&update.macs)), moment()?);
    let wakeup = state.go(moment()?)?;
    let finished = state.kernel().datapath.finish();
    if let Err(error) = finished {
        tracing::warn!(%error, "what is left of earlier maps could not be removed: the next start does it");
    }
    tracing::info!(services = config.services.len(), "steering");

    // What fails a check may have another MAC address by now; what passes one is there.
    let told = Arc::clone(&resolver);
    let checked = move |addr, passed| if passed { told.alive(addr) } else { told.suspect(addr) };
    let prober = Prober::start(health::checks_at_once(), resolver.updates(), checked);
    prober.set_targets(state.targets());
    state.show_checks(prober.reports());

    let (stop, stopping) = watch::channel(false);
    let (running, mut over) = mpsc::channel::<Infallible>(1);
    let loop_thread = {
        let runtime = tokio::runtime::Handle::current();
        thread::Builder::new()
            .name("state".to_owned())
            .spawn(move || {
                // Gone with the thread, however that ends.
                let _running = running;
                runtime.block_on(drive(state, requests, received, wakeup))
            })
            .context("can't start the loop's thread")?
    };
    let checks = tokio::spawn(watch_checks(prober.changes(), events.clone()));
    let (host, host_wanted) = watch::channel(HostWants::of(&config));
    let watcher = tokio::spawn(watch_host(host_wanted, updates, events.clone()));
    let (operators, operators_seen) = watch::channel(config.agent.operators.clone());
    metrics.started();
    let api = Api::new(handle.clone(), operators_seen, metrics.clone());
    let stopped = |mut stopping: watch::Receiver<bool>| async move {
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let control = tokio::spawn(api::serve_control(socket, api.clone(), stopped(stopping.clone())));
    let listening = listener.map(|listener| Listening::start(listener, api.clone()));
    let notifier = Notifier::default();
    let alive = tokio::spawn(notifier.clone().follow(handle.clone(), steering(&config)));
    let repeats = tokio::spawn(telemetry::tell_repeats());
    let reloader = Reloader {
        file,
        socket_override,
        running: config,
        handle: handle.clone(),
        events,
        resolver,
        prober,
        operators,
        host,
        api,
        listening,
        notifier: notifier.clone(),
        metrics,
        earlier: None,
    };
    let reloader = tokio::spawn(reloader.run(asked, take_backs, stopping));

    let failed = loop {
        tokio::select! {
            _ = terminate.recv() => break false,
            _ = interrupt.recv() => break false,
            _ = hangup.recv() => {
                let handle = handle.clone();
                // It says itself how it went.
                tokio::spawn(async move { handle.reload(ReloadRequest::default(), None).await });
            }
            _ = over.recv() => break true,
        }
    };
    tracing::info!("stopping; the data plane stays in place");
    notifier.stopping();
    // Before what they follow goes with the reloader: they would complain of that.
    for task in [watcher, checks, alive, repeats, calls] {
        task.abort();
        let _ = task.await;
    }
    let _ = stop.send(true);
    let _ = control.await;
    let _ = reloader.await;
    // The loop ends when nobody can ask any more.
    drop(handle);
    let ended = tokio::task::spawn_blocking(move || loop_thread.join()).await?;
    match (ended, failed) {
        (Ok(Ok(())), false) => Ok(()),
        (Ok(Ok(())), true) => anyhow::bail!("the state loop has ended by itself"),
        (Ok(Err(error)), _) => Err(error),
        (Err(_), _) => anyhow::bail!("the state loop has panicked"),
    }
}

/// The loop: one event after the other.
async fn drive<S: StateStore, K: Kernel>(
    mut state: State<S, K>,
    mut requests: mpsc::Receiver<Request>,
    mut events: mpsc::Receiver<Event>,
    mut wakeup: Option<BootMs>,
) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let now = moment()?.boot_ms;
        // Rounded up, so that drains that end at about the same time end in one step. The
        // runtime's clock stands still in suspend: ticks make up for that.
        let until =
            wakeup.map(|at| Duration::from_millis(at.saturating_sub(now).next_multiple_of(50)));
        let event = tokio::select! {
            request = requests.recv() => match request {
                Some(request) => Event::Request { request, arrived: Instant::now() },
                None => {
                    state.end(moment()?);
                    return Ok(());
                }
            },
            Some(event) = events.recv() => event,
            _ = ticks.tick() => Event::Tick,
            () = tokio::time::sleep(until.unwrap_or_default()), if until.is_some() => Event::Wakeup,
        };
        wakeup = state.handle(event, moment()?);
    }
}

/// Follows the host: next hops and links become events, and the VIPs are kept where
/// they belong.
async fn watch_host(
    mut wanted: watch::Receiver<HostWants>,
    mut updates: watch::Receiver<resolve::Update>,
    events: mpsc::Sender<Event>,
) {
    let mut vips: Option<VipManager> = None;
    let mut placed = None;
    loop {
        let update = updates.borrow_and_update().clone();
        let wants = wanted.borrow_and_update().clone();
        if wants.manage_vips && vips.is_none() {
            match VipManager::open() {
                Ok(manager) => vips = Some(manager),
                Err(error) => {
                    let _ = events.send(Event::Alerts("vips", vec![error.to_string()])).await;
                }
            }
        }
        let found = (Arc::clone(&update.links), Arc::clone(&update.addresses), wants.clone());
        if let Some(manager) = vips.as_mut().filter(|_| wants.manage_vips)
            && placed.as_ref() != Some(&found)
        {
            let alerts = place_vips(manager, &wants).await;
            // What failed is tried again with the next change; the rest is as it was seen.
            placed = Some(found);
            if events.send(Event::Alerts("vips", alerts)).await.is_err() {
                return;
            }
        }
        let macs = Event::Macs(Arc::clone(&update.macs));
        let (hops, links) = (Event::NextHops(next_hops(&update)), Event::Links(links(&update)));
        for event in [hops, links, macs, Event::Alerts("neighbours", unanswered(&update))] {
            if events.send(event).await.is_err() {
                return;
            }
        }
        let followed = tokio::select! {
            changed = updates.changed() => changed.is_ok(),
            // Whoever says what is wanted ends before this does.
            Ok(()) = wanted.changed() => true,
        };
        if !followed {
            let lost =
                "routes and neighbours are not followed any more: restart the agent".to_owned();
            let _ = events.send(Event::Alerts("resolver", vec![lost])).await;
            return;
        }
    }
}

/// Follows the health checks. While the loop has no time, changes become one.
async fn watch_checks(mut changes: health::Changes, events: mpsc::Sender<Event>) {
    while let Ok(place) = events.reserve().await {
        let Some(changes) = changes.next().await else {
            let lost = "backends are not checked any more: restart the agent".to_owned();
            place.send(Event::Alerts("health", vec![lost]));
            return;
        };
        place.send(Event::Health(changes));
    }
}

async fn place_vips(manager: &mut VipManager, wants: &HostWants) -> Vec<String> {
    match manager.apply(wants.vips.iter().copied(), &wants.interfaces).await {
        Ok(report) => {
            for placed in &report.added {
                tracing::info!(address = %placed.address, interface = placed.interface, "VIP added");
            }
            for placed in &report.removed {
                tracing::info!(address = %placed.address, interface = placed.interface, "VIP removed");
            }
            report.errors.iter().map(ToString::to_string).collect()
        }
        Err(error) => vec![error.to_string()],
    }
}

/// What the plan is told about next hops. A neighbour that is just being asked for is
/// left out: what was known of it holds until it has not answered.
pub(super) fn next_hops(update: &resolve::Update) -> Hops {
    let hops = update.hops.iter();
    hops.filter(|(_, hop)| !matches!(hop, Err(Unresolved::Resolving { .. })))
        .map(|(address, hop)| (*address, hop.clone().map_err(|why| why.to_string())))
        .collect()
}

/// What to say when next hops are taken to be there without a sign of it.
fn unanswered(update: &resolve::Update) -> Vec<String> {
    let nobody = "no next hop answers ARP or neighbour discovery any more: all are used as they \
                  were. Look whether this host's link and its switch are in order";
    update.nobody_answers.then(|| nobody.to_owned()).into_iter().collect()
}

fn links(update: &resolve::Update) -> LinkStates {
    update.links.iter().map(|(name, link)| (name.clone(), link.map(|link| link.ifindex))).collect()
}

/// What the service manager shows of an agent that runs.
pub(super) fn steering(config: &Config) -> String {
    match config.services.iter().filter(|service| service.derived.is_none()).count() {
        1 => "steering 1 service".to_owned(),
        services => format!("steering {services} services"),
    }
}

/// Now, on the clocks that the loop goes by.
pub(crate) fn moment() -> anyhow::Result<Moment> {
    let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).context("CLOCK_BOOTTIME can't be read")?;
    let boot = Duration::from(boot);
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    // 0 means "never" in the ledger.
    Ok(Moment { boot_ms: millis(boot).max(1), unix_ms: millis(unix) })
}

/// The kernel side of the host.
struct Live {
    datapath: Datapath,
    reader: Reader,
    orders: std::sync::mpsc::Sender<Order>,
    watches: std::sync::mpsc::Sender<Vec<WatchedService>>,
    known: SharedKnown,
}

impl Kernel for Live {
    fn apply(&mut self, plane: &DataPlane) -> Result<(), String> {
        self.datapath.apply(plane).map(drop).map_err(|error| error.to_string())
    }

    fn attach(&mut self, interface: &str) -> Result<Attachment, AttachError> {
        match self.datapath.attach(interface) {
            Ok(attached) => Ok(Attachment {
                ifindex: attached.ifindex,
                mode: attached.mode.name(),
                warning: attached.warning,
            }),
            Err(datapath::Error::NoInterface { .. }) => Err(AttachError::Missing),
            Err(error) => Err(AttachError::Refused(error.to_string())),
        }
    }

    fn set_macs(&mut self, macs: &BTreeMap<u32, InterfaceMacs>) -> Result<(), String> {
        self.datapath.set_macs(macs).map_err(|error| error.to_string())
    }

    fn detach(&mut self, interface: &str) -> Result<(), String> {
        self.datapath.detach_interface(interface).map_err(|error| error.to_string())
    }

    fn clean(&mut self, plane: &DataPlane) -> Result<(), String> {
        let cleaned = self.datapath.clean(plane).map_err(|error| error.to_string())?;
        tracing::debug!(?cleaned, "flow tables swept");
        Ok(())
    }

    fn sweep(&mut self, sweep: Sweep) {
        // The thread ends after the loop.
        let _ = self.orders.send(Order::Sweep(sweep));
    }

    fn expire(&mut self) {
        let _ = self.orders.send(Order::Expire);
    }

    fn watch(&mut self, wanted: Vec<WatchedService>) {
        // The thread ends after the loop.
        let _ = self.watches.send(wanted);
    }

    fn signals(&self) -> Known {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn flows(&self) -> (FlowCounters, Swept) {
        (self.reader.flow_counters(), self.reader.swept())
    }

    fn counters(&self, backends: &[BackendIndex]) -> Vec<BackendCounters> {
        self.reader.backend_counters(backends)
    }

    fn reasons(&self) -> Vec<u64> {
        self.reader.reasons()
    }

    fn maps(&self) -> Vec<MapStatus> {
        self.reader.maps()
    }

    fn give_memory_back(&mut self) {
        memory::give_back();
    }

    fn panics(&mut self) -> Result<Option<Adopted>, String> {
        self.datapath.panics().map_err(|error| error.to_string())
    }

    fn panics_adopted(&mut self, marks: &[PanicMark]) {
        self.datapath.panics_adopted(marks);
    }

    fn mark_panic(&mut self, order: &PanicOrder) -> Result<Vec<PanicMark>, String> {
        self.datapath.mark_panic(order).map_err(|error| error.to_string())
    }

    fn boot_id(&self) -> String {
        // Without it, deadlines are told from another start's by the clock alone.
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        id.map(|id| id.trim().to_owned()).unwrap_or_default()
    }

    fn counter(&self) -> Option<Counter> {
        let reader = self.reader.clone();
        Some(Box::new(move |wanted| reader.census(wanted).map_err(|error| error.to_string())))
    }
}
