//! An agent's sockets with a scripted loop behind them, and a client that can
//! misbehave.
//!
//! The loop here is not the agent's: it answers requests from a fixed status, so
//! that what is tested is the sockets and the commands alone.

use std::{
    io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use canary_agent::{
    api::{
        self, Api, ControlSocket, Limits,
        audience::{
            AudienceRoute, AudienceStatus, Audiences, ClientReport, ClientRoute, MembersReport,
        },
        model::{
            AgentStatus, AudienceSummary, BackendDetail, BackendReport, BackendRequest,
            BackendStatus, BackendTold, Backends, ChangeReport, CheckStatus, ConfirmReport, Event,
            Events, Explain, FlowStatus, FreezeReport, FreezeStatus, InterfaceStatus, MapStatus,
            PendingStatus, ReasonCount, ServiceStatus, ServiceUndo, ShareChange, SplitRequest,
            Status, UndoReport, UndoRequest, VersionBackends, VersionStatus,
        },
        panic::{PanicReport, PanicRequest, PanicService},
        rollout::{
            EvidenceRow, GateStatus, ProbeStatus, RolloutHistory, RolloutReport, RolloutRequest,
            RolloutRun, RolloutStatus, RolloutStep, SignalStatus,
        },
    },
    config::model::{
        Gate, Hooks, KernelSignal, Operators, Probe, ProbeAsk, Reaction, Rollout, Signal,
        SignalKind, Step,
    },
    daemon::{Action, EventsAsked, EventsFound, Handle, Peer, Prospect, Pulse, Refusal, Request},
    rollout::outlook::{Source, Usual},
    telemetry::Metrics,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

/// A split that was asked for, and by whom.
pub(crate) type Asked = (String, SplitRequest, Peer);

/// A backend that was told something, and by whom.
pub(crate) type Told = (String, BackendRequest, Peer);

/// Sockets in a directory of their own, with a scripted loop behind them.
pub(crate) struct Agent {
    dir: tempfile::TempDir,
    /// Where its TCP listener is.
    pub(crate) tcp: SocketAddr,
    /// Changes who may change things.
    pub(crate) operators: watch::Sender<Operators>,
    /// Splits that reached the loop.
    pub(crate) asked: Arc<Mutex<Vec<Asked>>>,
    /// Backends that were told something.
    pub(crate) told: Arc<Mutex<Vec<Told>>>,
    /// What it counts.
    pub(crate) metrics: Metrics,
    /// The number of the last event.
    pub(crate) happened: watch::Sender<u64>,
    stop: Vec<oneshot::Sender<()>>,
    serving: Vec<JoinHandle<()>>,
}

impl Agent {
    /// Starts serving.
    pub(crate) async fn start(limits: Limits) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        // Other users' commands are to reach the socket.
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).expect("opened");
        let (operators, operators_seen) = watch::channel(Operators::default());
        let (asked, told) = (Arc::default(), Arc::default());
        let (handle, requests) = Handle::channel(64);
        let happened = watch::Sender::new(20);
        let scripted =
            scripted_loop(requests, Arc::clone(&asked), Arc::clone(&told), happened.clone());
        tokio::spawn(scripted);
        let metrics = Metrics::new();
        let api = Api::new(handle, operators_seen, metrics.clone()).with_limits(limits);
        let socket = ControlSocket::bind(&dir.path().join("agent.sock")).expect("a socket");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let tcp = listener.local_addr().expect("its address");
        let (stop_control, control_stopped) = oneshot::channel();
        let (stop_tcp, tcp_stopped) = oneshot::channel();
        let ended = |stopped: oneshot::Receiver<()>| async { stopped.await.unwrap_or_default() };
        let serving = vec![
            tokio::spawn(api::serve_control(socket, api.clone(), ended(control_stopped))),
            tokio::spawn(api::serve_read_only(listener, api, ended(tcp_stopped))),
        ];
        let stop = vec![stop_control, stop_tcp];
        Self { dir, tcp, operators, asked, told, metrics, happened, stop, serving }
    }

    /// Its control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// Its directory.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Stops serving and waits until that is done.
    pub(crate) async fn stop(&mut self) {
        self.stop.clear();
        for serving in self.serving.drain(..) {
            serving.await.expect("no panic");
        }
    }

    /// Sends a request with `connection: close` and reads the answer.
    pub(crate) async fn ask(&self, method: &str, target: &str, body: Option<&str>) -> Answer {
        let mut stream = UnixStream::connect(self.socket()).await.expect("connected");
        let body = body.map_or_else(String::new, |body| {
            format!(
                "content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
        });
        let end = if body.is_empty() { "\r\n" } else { "" };
        let request = format!(
            "{method} {target} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n{body}{end}"
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        Answer::read(&mut stream).await.expect("an answer")
    }

    /// The same over TCP, with that host.
    pub(crate) async fn ask_tcp(&self, method: &str, target: &str, host: &str) -> Answer {
        let mut stream = TcpStream::connect(self.tcp).await.expect("connected");
        let request =
            format!("{method} {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        Answer::read(&mut stream).await.expect("an answer")
    }
}

/// An answer, taken apart.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The status code.
    pub(crate) status: u16,
    /// The head's lines, in lower case.
    pub(crate) head: String,
    /// The body.
    pub(crate) body: String,
}

impl Answer {
    /// Reads until the server closes.
    pub(crate) async fn read(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Self> {
        let mut bytes = Vec::new();
        let read = stream.read_to_end(&mut bytes).await;
        let text = String::from_utf8(bytes).expect("text");
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            read?;
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        };
        let status =
            head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        Ok(Self { status, head: head.to_lowercase(), body: body.to_owned() })
    }

    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The code of an error body, after checking that it is a whole one.
    pub(crate) fn error(&self) -> String {
        let error: api::model::ErrorBody =
            serde_json::from_value(self.json()).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        assert!(self.head.contains("content-type: application/json"), "{self:?}");
        assert!(!error.error.message.is_empty(), "{self:?}");
        assert_ne!(error.error.exit_code, 0, "{self:?}");
        error.error.code
    }
}

/// Answers from a fixed status. The service `stuck` never gets an answer.
async fn scripted_loop(
    mut requests: mpsc::Receiver<Request>,
    asked: Arc<Mutex<Vec<Asked>>>,
    told: Arc<Mutex<Vec<Told>>>,
    happened: watch::Sender<u64>,
) {
    let mut stuck = Vec::new();
    while let Some(request) = requests.recv().await {
        match request {
            Request::Status { reply } => drop(reply.send(status())),
            Request::Pulse { reply } => {
                _ = reply.send(Pulse { in_force: true, interfaces: 1, attached: 1 });
            }
            // Nobody asks for these but whoever makes reloads, which is not here.
            Request::Survey { .. } | Request::Reload { .. } => {}
            Request::Split { service, reply, .. } if service == "stuck" => stuck.push(reply),
            Request::Split { service, request, peer, reply } => {
                let answer = change(&service, &request);
                asked.lock().expect("not poisoned").push((service, request, peer));
                drop(reply.send(answer));
            }
            Request::Backends { service, reply } => {
                let answer =
                    if service == "shop" { Ok(backends()) } else { Err(unknown_service(&service)) };
                drop(reply.send(answer));
            }
            Request::Backend { service, backend, request, peer, reply } => {
                let answer = tell(&service, &backend, &request);
                told.lock().expect("not poisoned").push((backend, request, peer));
                drop(reply.send(answer));
            }
            Request::Explain { service, query, reply } => {
                let answer = if service == "shop" {
                    Ok(Explain {
                        service,
                        from: query.from,
                        to: query.to.unwrap_or_else(|| "203.0.113.10:443".to_owned()),
                        protocol: query.protocol.unwrap_or_else(|| "tcp".to_owned()),
                        audience: None,
                        bucket: Some(1234),
                        version: Some("v2".to_owned()),
                        backend: Some("10.0.2.1:8443".to_owned()),
                        tracked: true,
                        previous: Some("10.0.1.1:8443".to_owned()),
                        why: vec!["bucket 1234 belongs to v2".to_owned()],
                    })
                } else {
                    Err(unknown_service(&service))
                };
                drop(reply.send(answer));
            }
            Request::Audiences { reply } => {
                drop(reply.send(Audiences { audiences: vec![staff()] }));
            }
            Request::Members { audience, request, peer: _, reply } => drop(reply.send(Ok({
                MembersReport {
                    applied: !request.dry_run,
                    audience,
                    added: request.add.len(),
                    removed: request.remove.len(),
                    ttl_seconds: request.ttl.map(|_| 28_800),
                    members: 20_000,
                    room: 30_000,
                    ..MembersReport::default()
                }
            }))),
            Request::Audience { name, reply } => {
                let unknown = || Refusal {
                    code: "unknown_audience",
                    message: format!("there is no audience `{name}`"),
                    help: Some("there are `staff`".to_owned()),
                    exit_code: 1,
                };
                let found = Some(staff()).filter(|staff| staff.name == name);
                drop(reply.send(found.ok_or_else(unknown)));
            }
            Request::Client { address, reply } => {
                drop(reply.send(ClientReport {
                    address: address.to_string(),
                    audiences: Vec::new(),
                    services: vec![ClientRoute {
                        service: "shop".to_owned(),
                        ..ClientRoute::default()
                    }],
                }));
            }
            Request::Undo { request, peer: _, reply } => drop(reply.send(undo(&request))),
            Request::Panic { request, peer: _, reply } => drop(reply.send(panic(&request))),
            Request::Confirm { request, peer: _, reply } => {
                let applied = !request.dry_run;
                let confirmed = vec![event(0, 7)];
                drop(reply.send(Ok(ConfirmReport { applied, revision: 8, confirmed })));
            }
            Request::Freeze { request, freezes, peer: _, reply } => {
                drop(reply.send(Ok(FreezeReport {
                    applied: !request.dry_run,
                    revision: 8,
                    service: request.service,
                    before: Some("the night before".to_owned()),
                    frozen: request.reason.filter(|_| freezes),
                    ..FreezeReport::default()
                })));
            }
            Request::Rollout { name, action, request, peer: _, reply } => {
                drop(reply.send(rollout(&name, action, &request)));
            }
            Request::RolloutHistory { name, evidence, reply } => {
                drop(reply.send(Ok(history(&name, evidence))));
            }
            Request::Prospect { name, reply } => drop(reply.send(prospect(&name))),
            Request::Events { asked, reply } => {
                drop(reply.send(events(&asked, happened.subscribe())));
            }
        }
    }
}

fn staff() -> AudienceStatus {
    AudienceStatus {
        name: "staff".to_owned(),
        networks_v4: 1,
        addresses_v4: 256,
        addresses_v6: "0".to_owned(),
        examples: vec!["198.51.100.0/24".to_owned()],
        routes: vec![AudienceRoute {
            service: "shop".to_owned(),
            place: 1,
            split: "v2=100%".to_owned(),
            table: "shop@staff".to_owned(),
        }],
        ..AudienceStatus::default()
    }
}

/// The event of that number: a split by root.
pub(crate) fn event(id: u64, revision: u64) -> Event {
    Event {
        id,
        unix_ms: 1_700_000_000_000 + id,
        time: "2023-11-14T22:13:20.000Z".to_owned(),
        kind: "split".to_owned(),
        service: Some("shop".to_owned()),
        revision: Some(revision),
        uid: Some(0),
        reason: Some("ticket 7".to_owned()),
        text: "shop: v2 5% to 10%".to_owned(),
        buckets_moved: 3277,
        ..Event::default()
    }
}

fn panic(request: &PanicRequest) -> Result<PanicReport, Refusal> {
    if let Some(service) = request.service.as_ref().filter(|service| *service != "shop") {
        return Err(unknown_service(service));
    }
    let share = |name: &str, before, in_force, asked: &str| ShareChange {
        name: name.to_owned(),
        asked: asked.to_owned(),
        before,
        in_force,
    };
    Ok(PanicReport {
        applied: !request.dry_run,
        by: "agent".to_owned(),
        revision: Some(8),
        services: vec![
            PanicService {
                service: "shop".to_owned(),
                versions: vec![share("stable", 0.95, 1.0, "100%"), share("v2", 0.05, 0.0, "0%")],
                buckets_moved: 3277,
                refused: None,
            },
            PanicService {
                service: "mail".to_owned(),
                refused: Some("service `mail`: nobody is left".to_owned()),
                ..PanicService::default()
            },
        ],
        buckets_moved: 3277,
        connections_held: Some(41),
        took_us: 2150,
        ..PanicReport::default()
    })
}

fn undo(request: &UndoRequest) -> Result<UndoReport, Refusal> {
    if let Some(service) = request.service.as_ref().filter(|service| *service != "shop") {
        return Err(unknown_service(service));
    }
    Ok(UndoReport {
        applied: !request.dry_run,
        revision: 8,
        undone: vec![event(0, 7)],
        services: vec![ServiceUndo {
            service: "shop".to_owned(),
            versions: vec![ShareChange {
                name: "v2".to_owned(),
                asked: "5%".to_owned(),
                before: 0.1,
                in_force: 0.05,
            }],
            buckets_moved: 3277,
            backends: vec![BackendTold {
                backend: "10.0.1.1:8443".to_owned(),
                before: "drain".to_owned(),
                state: "ready".to_owned(),
            }],
        }],
        buckets_moved: 3277,
        connections_held: Some(41),
        notes: vec!["the freeze of revision 6 stays".to_owned()],
        confirm_within_ms: request.confirm.as_ref().map(|_| 300_000),
        took_us: 2150,
        ..UndoReport::default()
    })
}

/// Of the events 1 to as many as there are, those that are asked for.
fn events(asked: &EventsAsked, news: watch::Receiver<u64>) -> Result<EventsFound, Refusal> {
    if let Some(service) = asked.service.as_ref().filter(|service| *service != "shop") {
        return Err(unknown_service(service));
    }
    let (last, limit) = (*news.borrow(), asked.limit.unwrap_or(1_000).min(7));
    let first = asked.after.unwrap_or_else(|| last.saturating_sub(limit as u64)) + 1;
    let events: Vec<Event> = (first..=last).take(limit).map(|id| event(id, id)).collect();
    let more = asked.after.is_some() && events.len() == limit;
    Ok(EventsFound { events: Events { events, last }, more, news })
}

fn unknown_service(service: &str) -> Refusal {
    Refusal {
        code: "unknown_service",
        message: format!("there is no service `{service}`"),
        help: Some("did you mean `shop`?".to_owned()),
        exit_code: 1,
    }
}

fn change(service: &str, request: &SplitRequest) -> Result<ChangeReport, Refusal> {
    if service != "shop" {
        return Err(unknown_service(service));
    }
    if let Some(version) = request.split.keys().find(|version| *version != "v2") {
        return Err(Refusal {
            code: "unknown_version",
            message: format!("`shop` has no version `{version}`"),
            help: None,
            exit_code: 1,
        });
    }
    Ok(ChangeReport {
        applied: !request.dry_run,
        revision: 8,
        service: service.to_owned(),
        versions: vec![
            ShareChange {
                name: "stable".to_owned(),
                asked: "90%".to_owned(),
                before: 0.95,
                in_force: 0.9,
            },
            ShareChange {
                name: "v2".to_owned(),
                asked: "10%".to_owned(),
                before: 0.05,
                in_force: 0.1,
            },
        ],
        buckets_moved: 3277,
        backends_touched: vec!["10.0.1.1:8443".to_owned(), "10.0.2.1:8443".to_owned()],
        connections_held: Some(41),
        connections_per_second: Some(12.5),
        notes: vec!["the buckets have been moved".to_owned()],
        learned_ms: request.learn.then_some(7_000),
        confirm_within_ms: request.confirm.as_ref().map(|_| 300_000),
        took_us: 2150,
    })
}

fn tell(service: &str, backend: &str, request: &BackendRequest) -> Result<BackendReport, Refusal> {
    if service != "shop" {
        return Err(unknown_service(service));
    }
    if backend != "10.0.1.1:8443" && backend != "[2001:db8:1::1]:8443" {
        return Err(Refusal {
            code: "unknown_backend",
            message: format!("service `shop` has no backend `{backend}`"),
            help: None,
            exit_code: 1,
        });
    }
    Ok(BackendReport {
        applied: !request.dry_run,
        revision: 9,
        service: service.to_owned(),
        backend: backend.to_owned(),
        before: "ready".to_owned(),
        state: request.state.clone(),
        buckets_moved: 31_130,
        backends_touched: vec!["10.0.1.1:8443".to_owned(), "10.0.1.2:8443".to_owned()],
        connections_held: Some(17),
        connections_per_second: Some(3.26),
        notes: vec!["its open connections stay".to_owned()],
        confirm_within_ms: None,
        took_us: 2150,
    })
}

/// The backends of the status, one of them drained, one in slow start, and one removed.
fn backends() -> Backends {
    let [shop] = &status().services[..] else { panic!("one service") };
    let mut versions: Vec<VersionBackends> = shop
        .versions
        .iter()
        .map(|version| VersionBackends {
            name: version.name.clone(),
            buckets: version.buckets,
            draining_backends: 0,
            open_connections: None,
            backends: version
                .backends
                .iter()
                .map(|backend| BackendDetail {
                    backend: backend.clone(),
                    open_connections: Some(17),
                    tracked_connections: None,
                })
                .collect(),
        })
        .collect();
    let (stable, v2) = versions.split_at_mut(1);
    (stable[0].draining_backends, stable[0].open_connections) = (2, Some(40));
    stable[0].backends[1].backend.admin = "drain".into();
    stable[0].backends[1].backend.draining_buckets = 123;
    v2[0].backends[0].backend.slow_start = Some(0.25);
    let mut gone = stable[0].backends[0].clone();
    gone.backend = BackendStatus {
        addr: "10.0.1.9:8443".parse().expect("an address"),
        weight: 0,
        state: "removed".into(),
        health: "unknown".into(),
        message: None,
        buckets: 0,
        check: None,
        ..gone.backend
    };
    stable[0].backends.push(gone);
    Backends {
        service: "shop".to_owned(),
        forward: "nat".to_owned(),
        control: "stable".to_owned(),
        revision: 7,
        versions,
    }
}

/// A status with something in every part.
pub(crate) fn status() -> Status {
    let backend = |addr: &str, state: &str, buckets, connections| BackendStatus {
        addr: addr.parse().expect("an address"),
        weight: 1,
        state: state.to_owned().into(),
        message: (state != "up").then(|| "no neighbour answers on eth1".to_owned()),
        buckets,
        packets: connections * 10,
        bytes: connections * 12_000,
        connections,
        no_port: 0,
        check: Some(CheckStatus {
            up: true,
            passes: 1_000,
            failures: 7,
            latency_seconds: Some(0.002),
            last_failure: Some("no connection within 1s".to_owned()),
            ..CheckStatus::default()
        }),
        health: state.to_owned().into(),
        admin: "ready".into(),
        slow_start: None,
        draining_buckets: 0,
    };
    let version = |name: &str, asked: f64, text: &str, buckets: u32, backends| VersionStatus {
        name: name.to_owned(),
        asked,
        asked_text: text.to_owned(),
        in_force: f64::from(buckets) / 65_536.0,
        buckets,
        connections: 100,
        measured: (buckets > 0).then_some(asked),
        signals: None,
        backends,
    };
    let stable = vec![
        backend("10.0.1.1:8443", "up", 62_259, 100),
        backend("[2001:db8:1::1]:8443", "no-next-hop", 0, 0),
    ];
    let shop = ServiceStatus {
        name: "shop".to_owned(),
        vips: vec!["203.0.113.10".to_owned(), "2001:db8::10".to_owned()],
        ports: vec!["tcp/443".to_owned(), "udp/443".to_owned()],
        forward: "nat".to_owned(),
        stickiness: "client".to_owned(),
        control: "stable".to_owned(),
        buckets: 65_536,
        tracked_buckets: 3_277,
        signals: None,
        versions: vec![
            version("stable", 0.95, "95%", 62_259, stable),
            version("v2", 0.05, "5%", 3_277, vec![backend("10.0.2.1:8443", "up", 3_277, 5)]),
        ],
        panic: None,
        frozen: Some(FreezeStatus {
            reason: "the night before".to_owned(),
            revision: 6,
            unix_ms: 1_700_000_000_000,
            uid: Some(1000),
        }),
    };
    Status {
        flows: FlowStatus { stored: 40, let_go: 3, taken_over: 2, untracked: 1, half_open: [6, 4] },
        agent: AgentStatus {
            version: "0.1.0".to_owned(),
            abi_version: 1,
            pid: 4711,
            uptime_seconds: 3_725.5,
            revision: 7,
            frozen: None,
        },
        interfaces: vec![
            InterfaceStatus {
                name: "eth0".to_owned(),
                ifindex: Some(2),
                mode: Some("native".to_owned()),
                message: None,
            },
            InterfaceStatus {
                name: "eth1".to_owned(),
                ifindex: None,
                mode: None,
                message: Some("does not exist".to_owned()),
            },
        ],
        services: vec![shop],
        reasons: vec![
            ReasonCount { reason: "not_ours".to_owned(), verdict: "pass".to_owned(), packets: 12 },
            ReasonCount {
                reason: "bad_ip_length".to_owned(),
                verdict: "drop".to_owned(),
                packets: 3,
            },
        ],
        maps: vec![MapStatus {
            name: "FLOWS_V4".to_owned(),
            capacity: 262_144,
            used: Some(10),
            memory_bytes: 25_165_824,
        }],
        alerts: vec!["eth1 does not exist: the other interfaces work".to_owned()],
        pending: vec![PendingStatus { left_seconds: 61.2, change: event(7, 7) }],
        audiences: vec![AudienceSummary {
            name: "beta".to_owned(),
            networks: 2,
            members: 512,
            room: 100_000,
            expired: 3,
            ..AudienceSummary::default()
        }],
        rollouts: vec![
            under_way(),
            RolloutStatus {
                name: "shop-v3".to_owned(),
                service: "other".to_owned(),
                to: "v3".to_owned(),
                state: "aborted".to_owned(),
                run: Some(3),
                reason: Some("it was too slow".to_owned()),
                ..RolloutStatus::default()
            },
        ],
    }
}

/// A rollout that a gate watches.
fn under_way() -> RolloutStatus {
    let step = |split: &str, state: &str| RolloutStep {
        audience: None,
        split: Some(split.to_owned()),
        hold_seconds: Some(600.0),
        gate: Some("l4".to_owned()),
        pause: false,
        state: state.to_owned(),
    };
    RolloutStatus {
        name: "shop-v2".to_owned(),
        service: "shop".to_owned(),
        to: "v2".to_owned(),
        state: "watching".to_owned(),
        step: Some(2),
        steps: vec![step("1%", "done"), step("5%", "current"), step("100%", "to come")],
        share: Some("5%".to_owned()),
        waits: Some("gate `l4`".to_owned()),
        run: Some(4),
        begun_unix_ms: Some(1_700_000_000_000),
        step_unix_ms: Some(1_700_000_060_000),
        watched_seconds: 61.0,
        left_seconds: Some(539.0),
        gate: Some(GateStatus {
            name: "l4".to_owned(),
            elapsed_seconds: 61.0,
            min_duration_seconds: 300.0,
            deadline_seconds: 3600.0,
            ln_fail_at: 4.605,
            ln_pass_at: 2.996,
            signals: vec![SignalStatus {
                name: "connect_failed".to_owned(),
                control_events: 40,
                canary_events: 3,
                ln_fail: 2.3,
                ln_pass: -0.5,
                ..SignalStatus::default()
            }],
            probes: vec![ProbeStatus {
                kind: "prometheus".to_owned(),
                asked: "up > 1".to_owned(),
                good: 5,
                bad: 1,
                row: -1,
                rise: 2,
                fall: 3,
                last: Some("bad".to_owned()),
                last_text: Some("1.5, above 1".to_owned()),
                ..ProbeStatus::default()
            }],
            ..GateStatus::default()
        }),
        ..RolloutStatus::default()
    }
}

fn unknown_rollout(name: &str) -> Refusal {
    Refusal {
        code: "unknown_rollout",
        message: format!("there is no rollout `{name}`"),
        help: Some("there are `shop-v2`".to_owned()),
        exit_code: 1,
    }
}

fn rollout(name: &str, action: Action, request: &RolloutRequest) -> Result<RolloutReport, Refusal> {
    if name != "shop-v2" {
        return Err(unknown_rollout(name));
    }
    Ok(RolloutReport {
        applied: !request.dry_run,
        revision: 8,
        text: format!("rollout `{name}` at step 2: {}", action.name()),
        audience: None,
        share: (action == Action::Abort).then(|| "0%".to_owned()),
        change: None,
        rollout: under_way(),
        warnings: Vec::new(),
        took_us: 1_500,
    })
}

/// `shop-v2` has 2,000 connections a second, `shop-v3` none, and `asked` needs none.
fn prospect(name: &str) -> Result<Prospect, Refusal> {
    let per_second = match name {
        "shop-v2" => Some(2_000.0),
        "shop-v3" => Some(0.0),
        "asked" => None,
        _ => return Err(unknown_rollout(name)),
    };
    let counted = Signal::Kernel(KernelSignal {
        kind: SignalKind::ConnectFailed,
        quantile_permille: None,
        tolerate: 1.2,
        pass_below: 3.0,
        observe: false,
    });
    let asked = Signal::Probe(Probe {
        ask: ProbeAsk::Command(vec!["/bin/true".to_owned()]),
        interval: Duration::from_secs(10),
        timeout: Duration::from_secs(5),
        retries: 0,
        rise: 2,
        fall: 3,
        observe: false,
    });
    let signals = if name == "asked" { vec![asked] } else { vec![counted] };
    let gate = Gate {
        name: "l4".to_owned(),
        alpha: 0.01,
        beta: 0.05,
        min_duration: Duration::from_secs(300),
        deadline: Duration::from_secs(3600),
        signals,
    };
    let step = |share: &str, gate: Option<Gate>| Step {
        split: Some(share.parse().expect("a share")),
        gate: gate.map(Arc::new),
        ..Step::default()
    };
    let rollout = Rollout {
        name: name.to_owned(),
        service: "shop".to_owned(),
        to: "v2".to_owned(),
        steps: vec![step("0.001%", Some(gate.clone())), step("5%", Some(gate)), step("100%", None)],
        on_fail: Reaction::Abort,
        on_inconclusive: Reaction::Hold,
        on_no_data: Reaction::Hold,
        windows: Vec::new(),
        hooks: Hooks::default(),
    };
    let usual = Usual { rate: 0.002, source: Source::Counted };
    Ok(Prospect {
        rollout: Arc::new(rollout),
        per_second,
        audiences: Default::default(),
        others: Vec::new(),
        watched_at_most: None,
        usual: [(SignalKind::ConnectFailed, usual)].into(),
    })
}

fn history(name: &str, evidence: bool) -> RolloutHistory {
    let row = EvidenceRow {
        step: 1,
        window: 1.0,
        signal: "connect_failed".to_owned(),
        share: Some(0.05),
        control: Some(7),
        canary: Some(2),
        ..EvidenceRow::default()
    };
    let run = RolloutRun {
        run: 3,
        state: "aborted".to_owned(),
        step: 1,
        recipe: "5%; 100%".to_owned(),
        reason: Some("it was too slow".to_owned()),
        begun_unix_ms: 1_700_000_000_000,
        ended_unix_ms: Some(1_700_000_600_000),
        evidence: if evidence { vec![row] } else { Vec::new() },
    };
    RolloutHistory { name: name.to_owned(), runs: vec![run] }
}

/// Limits that do not make a test wait.
pub(crate) fn short() -> Limits {
    Limits {
        head: Duration::from_millis(300),
        body: Duration::from_millis(300),
        request: Duration::from_millis(800),
        write: Duration::from_millis(500),
        stop: Duration::from_millis(500),
        ..Limits::default()
    }
}
