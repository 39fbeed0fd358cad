//! Going on with what the configuration files say by now, without a restart.
//!
//! Everything that takes long is done beside the loop: reading and checking the files,
//! planning, counting connections, finding next hops, compiling tables. The loop is asked
//! twice: for what the plan begins with, and to put it in force. One reload after the other.

mod report;
mod state;

use std::{
    collections::BTreeSet, net::IpAddr, path::PathBuf, sync::Arc, time::Duration, time::Instant,
};

use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

pub(super) use self::state::LastPackets;
pub(super) use self::state::TakeBack;
pub use self::state::{Order, Planned, Reloaded, Survey};
use self::state::{Traffic, with_socket};
use super::{Event, Handle, Peer, Refusal, notify::Notifier, run};
use crate::{
    api::{
        self, Api,
        reload::{ReloadReport, ReloadRequest, SettingChange},
    },
    config::{
        self, Diagnostic, Severity, difference,
        model::{Config, Forward, Operators},
    },
    health::Prober,
    plan::{Hops, QUARANTINE_MS},
    resolve::{self, Resolver, Unresolved, Update},
    telemetry::{self, Metrics},
};

/// How long a reload waits for the next hops of new backends. What is not found by then gets no
/// connections until it is.
const HOPS: Duration = Duration::from_secs(3);

/// Why a reload was not made. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReloadError {
    /// The files are wrong: everything that is, and warnings.
    Config(Vec<Diagnostic>),
    /// Anything else.
    Refused(Refusal),
}

impl From<Refusal> for ReloadError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl std::fmt::Display for ReloadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Config(diagnostics) => {
                let errors = diagnostics.iter().filter(|d| d.severity == Severity::Error);
                let count = errors.clone().count();
                let first = errors.map(|d| {
                    format!("{} ({}:{}:{})", d.message, d.place.file, d.place.line, d.place.column)
                });
                let first = first.take(1).collect::<String>();
                match count {
                    1 => write!(f, "the configuration is wrong: {first}"),
                    _ => write!(f, "the configuration has {count} errors, the first: {first}"),
                }
            }
            Self::Refused(refusal) => refusal.fmt(f),
        }
    }
}

/// Somebody asks for a reload.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) request: ReloadRequest,
    /// `None` for a signal.
    pub(super) peer: Option<Peer>,
    pub(super) arrived: Instant,
    pub(super) reply: oneshot::Sender<Result<ReloadReport, ReloadError>>,
}

/// What there is to do.
enum Next {
    Asked(Asked),
    TakeBack(TakeBack),
}

/// What follows the host, as far as the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostWants {
    pub(super) manage_vips: bool,
    pub(super) vips: Vec<IpAddr>,
    pub(super) interfaces: Vec<String>,
}

impl HostWants {
    pub(super) fn of(config: &Config) -> Self {
        let vips: BTreeSet<IpAddr> =
            config.services.iter().flat_map(|s| s.vips.iter().copied()).collect();
        Self {
            manage_vips: config.agent.manage_vips,
            vips: vips.into_iter().collect(),
            interfaces: config.agent.interfaces.clone(),
        }
    }
}

/// The TCP listener that serves at present.
pub(super) struct Listening {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Listening {
    /// Serves `listener`.
    pub(super) fn start(listener: TcpListener, api: Api) -> Self {
        let (stop, mut stopping) = watch::channel(false);
        let stopped = async move {
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        Self { stop, task: tokio::spawn(api::serve_read_only(listener, api, stopped)) }
    }

    /// Takes no more connections, and waits for those that are open.
    pub(super) async fn end(self) {
        let _ = self.stop.send(true);
        let _ = self.task.await;
    }
}

/// All that goes on with another configuration.
pub(super) struct Reloader {
    pub(super) file: PathBuf,
    pub(super) socket_override: Option<PathBuf>,
    pub(super) running: Arc<Config>,
    pub(super) handle: Handle,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) resolver: Arc<Resolver>,
    pub(super) prober: Prober,
    pub(super) operators: watch::Sender<Operators>,
    pub(super) host: watch::Sender<HostWants>,
    pub(super) api: Api,
    pub(super) listening: Option<Listening>,
    pub(super) notifier: Notifier,
    pub(super) metrics: Metrics,
    /// What ran before a reload that may still be taken back, with that reload's revision.
    pub(super) earlier: Option<(u64, Arc<Config>)>,
}

impl Reloader {
    /// Does what is asked until `stopping`, then ends the TCP listener.
    pub(super) async fn run(
        mut self,
        mut asked: mpsc::Receiver<Asked>,
        mut take_backs: mpsc::Receiver<TakeBack>,
        mut stopping: watch::Receiver<bool>,
    ) {
        // What an earlier agent freed just before its end is not given out yet.
        let rested = tokio::time::sleep(Duration::from_millis(QUARANTINE_MS));
        tokio::select! {
            () = rested => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
        loop {
            let next = tokio::select! {
                asked = asked.recv() => match asked {
                    Some(asked) => Next::Asked(asked),
                    None => break,
                },
                Some(back) = take_backs.recv() => Next::TakeBack(back),
                _ = stopping.wait_for(|stop| *stop) => break,
            };
            let Asked { request, peer, arrived, reply } = match next {
                Next::Asked(asked) => asked,
                Next::TakeBack(back) => {
                    self.take_back(back).await;
                    continue;
                }
            };
            let dry_run = request.dry_run;
            let told = match dry_run {
                true => None,
                false => self.notifier.reloading(),
            };
            let answer = self.reload(request, peer, arrived).await;
            if !dry_run {
                self.tell(&answer, peer).await;
            }
            drop(told);
            // Whoever has stopped waiting for the answer has lost nothing but the answer.
            drop(reply.send(answer));
        }
        if let Some(listening) = self.listening.take() {
            listening.end().await;
        }
    }

    /// Says in the log, in the alerts and to the service manager how a reload went.
    async fn tell(&mut self, answer: &Result<ReloadReport, ReloadError>, peer: Option<Peer>) {
        let uid = peer.map(|peer| peer.uid);
        self.metrics.reloaded(answer.is_ok());
        let mut alerts = Vec::new();
        match answer {
            Ok(report) => {
                let ReloadReport { revision, buckets_moved, took_us, busy_us, .. } = report;
                let services = report.services.len();
                let changed = report.differs;
                tracing::info!(
                    uid,
                    changed,
                    services,
                    revision,
                    buckets_moved,
                    took_us,
                    busy_us,
                    "the configuration has been reloaded"
                );
                self.notifier.status(&run::steering(&self.running));
            }
            Err(error) => {
                tracing::error!(uid, "the configuration was not reloaded: {error}");
                if let ReloadError::Config(diagnostics) = error {
                    for Diagnostic { severity, message, place, .. } in diagnostics {
                        let (file, line, column) = (&place.file, place.line, place.column);
                        let severity = severity.name();
                        tracing::error!(file, line, column, "{severity}: {message}");
                    }
                }
                let alert = format!("the last reload was refused: {error}");
                self.notifier.status(&alert);
                alerts.push(alert);
            }
        }
        let _ = self.events.send(Event::Alerts("reload", alerts)).await;
    }

    async fn reload(
        &mut self,
        request: ReloadRequest,
        peer: Option<Peer>,
        arrived: Instant,
    ) -> Result<ReloadReport, ReloadError> {
        let file = self.file.clone();
        let loaded = beside(move || config::load(&file)).await?.map_err(ReloadError::Config)?;
        let config = with_socket(loaded.config, self.socket_override.as_deref());
        let mut report = self.go_on_with(config, request, peer, arrived, None).await?;
        report.warnings = loaded.warnings;
        Ok(report)
    }

    /// Brings the configuration back that ran before a reload that nobody has confirmed.
    async fn take_back(&mut self, back: TakeBack) {
        let TakeBack { revision, within } = back;
        let earlier = self.earlier.as_ref().filter(|(of, _)| *of == revision);
        let Some(config) = earlier.map(|(_, config)| Arc::clone(config)) else {
            tracing::error!(revision, "what ran before that reload is not known any more");
            return;
        };
        let told = self.notifier.reloading();
        let request = ReloadRequest {
            reason: Some(format!("not confirmed within {}", humantime::format_duration(within))),
            force: true,
            ..ReloadRequest::default()
        };
        let answer = self.go_on_with(config, request, None, Instant::now(), Some(revision)).await;
        self.tell(&answer, None).await;
        drop(told);
    }

    /// Goes on with `config`; `takes_back` is the reload before which it ran.
    async fn go_on_with(
        &mut self,
        config: Arc<Config>,
        request: ReloadRequest,
        peer: Option<Peer>,
        arrived: Instant,
        takes_back: Option<u64>,
    ) -> Result<ReloadReport, ReloadError> {
        let survey = self.handle.survey(config, request.if_revision).await?;
        let config = Arc::clone(&survey.config);
        let (running, wanted) = (Arc::clone(&self.running), Arc::clone(&config));
        let planned = beside(move || survey.plan(&running, &wanted)).await??;
        let Planned { mut prepared, mut report, addresses } = planned;
        let took = |report: &mut ReloadReport| {
            report.took_us = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
        };
        if request.dry_run {
            took(&mut report);
            return Ok(report);
        }
        self.permitted(&report, request.force)?;
        report.applied = true;
        if !report.differs && takes_back.is_none() {
            took(&mut report);
            return Ok(report);
        }
        let listener = self.listener(&config).await?;
        let unknown = prepared.unknown_hops();
        let hops = self.find_hops(&addresses, unknown).await;
        let warmed = beside(move || {
            let now = run::moment()?;
            prepared.warm(hops, now.boot_ms);
            anyhow::Ok(prepared)
        });
        let done = match warmed.await? {
            Ok(prepared) => {
                let interfaces = config.agent.interfaces.clone();
                let in_words = |one: &SettingChange| {
                    let SettingChange { key, before, after } = one;
                    format!("{key}: {before} → {after}")
                };
                let order = Order {
                    prepared,
                    interfaces,
                    rollouts: config.rollouts.clone(),
                    audiences: config.audiences.clone(),
                    peer,
                    reason: request.reason,
                    settings: report.settings.iter().map(in_words).collect(),
                    if_revision: request.if_revision,
                    confirm: request.confirm,
                    takes_back,
                };
                self.handle.put_in_force(order).await
            }
            Err(error) => {
                tracing::error!(%error, "the clock can't be read");
                Err(ended())
            }
        };
        let reloaded = match done {
            Ok(reloaded) => reloaded,
            Err(refusal) => {
                self.resolver.set_destinations(addresses);
                return Err(refusal.into());
            }
        };
        report.revision = reloaded.revision;
        report.confirm_within_ms = reloaded.confirm_within_ms;
        self.earlier = match reloaded.confirm_within_ms {
            Some(_) => Some((reloaded.revision, Arc::clone(&self.running))),
            None => None,
        };
        report.busy_us += reloaded.busy_us;
        took(&mut report);
        let not_applied = reloaded.not_applied.clone();
        self.go_on(config, reloaded, listener, &mut report).await;
        match not_applied {
            Some(refusal) => Err(refusal.into()),
            None => Ok(report),
        }
    }

    /// Refuses what takes a restart, or breaks connections without being told to.
    fn permitted(&self, report: &ReloadReport, force: bool) -> Result<(), Refusal> {
        if !report.needs_restart.is_empty() {
            let keys = report.settings.iter().filter(|s| report.needs_restart.contains(&s.key));
            let keys: Vec<String> =
                keys.map(|one| format!("`{}` ({} → {})", one.key, one.before, one.after)).collect();
            return Err(Refusal {
                code: "needs_restart",
                message: format!("only a restart changes {}", keys.join(", ")),
                help: Some(
                    "restart the agent (traffic is steered meanwhile), or set it back to reload the rest"
                        .to_owned(),
                ),
                exit_code: 1,
            });
        }
        if !force && !report.needs_force.is_empty() {
            return Err(Refusal {
                code: "needs_force",
                message: report.needs_force.join("; "),
                help: Some(
                    "do it all the same with --force; `canary-agent diff` shows all that would change"
                        .to_owned(),
                ),
                exit_code: 1,
            });
        }
        Ok(())
    }

    /// The new TCP listener, if there is to be another. `Some(None)`: none any more.
    async fn listener(&self, config: &Config) -> Result<Option<Option<TcpListener>>, Refusal> {
        let address = config.agent.listen;
        if address == self.running.agent.listen {
            return Ok(None);
        }
        let Some(address) = address else { return Ok(Some(None)) };
        match TcpListener::bind(address).await {
            Ok(listener) => Ok(Some(Some(listener))),
            Err(error) => Err(Refusal {
                code: "not_listening",
                message: format!("`agent.listen`: nothing can be served at {address}: {error}"),
                help: Some("name an address of this host and a port that is free".to_owned()),
                exit_code: 1,
            }),
        }
    }

    /// Waits until it is known how `unknown` are reached, or are not.
    async fn find_hops(&self, known: &BTreeSet<IpAddr>, unknown: BTreeSet<IpAddr>) -> Hops {
        let mut updates = self.resolver.updates();
        if !unknown.is_empty() {
            self.resolver.set_destinations(known.union(&unknown).copied());
            let answered = |update: &Update| {
                unknown.iter().all(|ip| {
                    !matches!(update.hops.get(ip), None | Some(Err(Unresolved::Resolving { .. })))
                })
            };
            // Not in time: the plan goes by what is known.
            let _ = tokio::time::timeout(HOPS, updates.wait_for(answered)).await;
        }
        let update = updates.borrow().clone();
        run::next_hops(&update)
    }

    /// Brings about what is not the loop's.
    async fn go_on(
        &mut self,
        config: Arc<Config>,
        reloaded: Reloaded,
        listener: Option<Option<TcpListener>>,
        report: &mut ReloadReport,
    ) {
        self.resolver.set_destinations(reloaded.addresses);
        self.resolver.set_interfaces(config.agent.interfaces.iter().cloned());
        self.prober.set_targets(reloaded.targets);
        self.operators.send_if_modified(|operators| {
            let changed = *operators != config.agent.operators;
            operators.clone_from(&config.agent.operators);
            changed
        });
        let nat = |config: &Config| config.services.iter().any(|s| s.forward == Forward::Nat);
        if nat(&config)
            && !nat(&self.running)
            && let Err(error) = resolve::reserve_ports(&config.agent.nat_ports)
        {
            report
                .notes
                .push(format!("the host may use source ports of translated flows: {error}"));
        }
        self.host.send_if_modified(|host| {
            let wanted = HostWants::of(&config);
            let changed = *host != wanted;
            *host = wanted;
            changed
        });
        let log = difference::of_agents(&self.running.agent, &config.agent);
        if log.iter().any(|one| one.key == "agent.log")
            && !telemetry::set_log_filter(&config.agent.log)
        {
            report.notes.push("`agent.log`: RUST_LOG is set for the agent, and holds".to_owned());
        }
        if let Some(listener) = listener {
            let before = std::mem::take(&mut self.listening);
            self.listening = listener.map(|listener| Listening::start(listener, self.api.clone()));
            if let Some(before) = before {
                // Whoever reads there still is given time; nobody waits for it.
                tokio::spawn(before.end());
            }
        }
        self.running = config;
    }
}

/// Does `work` on a thread that may take its time.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        tracing::error!(%error, "planning a reload has failed: this is a bug");
        ended()
    })
}

fn ended() -> Refusal {
    Refusal {
        code: "failed",
        message: "the reload could not be planned; nothing has changed".to_owned(),
        help: Some("the agent's log says why".to_owned()),
        exit_code: 1,
    }
}
