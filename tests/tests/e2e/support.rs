//! What the tests here have in common: a balancer of each kind with its services,
//! and many clients at once.

use std::{
    io::{Read as _, Seek as _},
    net::SocketAddr,
    ops::Range,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use canary_agent::api::model::{BackendStatus, ServiceStatus, Status, VersionStatus};
use canary_ebpf_common::abi::{Flow, FlowKeyV4, PortPair, flow_state};
use canary_tests::{
    agent::{Agent, AgentOptions, Output},
    binary,
    client::{self, Connection, UdpFlow},
    loaded::Flows,
    netns::Namespace,
    server::{ECHO_PORT, HTTP_PORT, Server},
    spawn,
    topology::{Family, Host, Options, Topology},
    wait,
    workdir::Workdir,
};
use nix::time::{ClockId, clock_gettime};

/// The HTTP service: TCP on [`HTTP_PORT`].
pub(crate) const SHOP: &str = "shop";

/// The echo service: TCP and UDP on [`ECHO_PORT`].
pub(crate) const ECHO: &str = "echo";

/// How packets reach the backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Translated; the backends behind the balancer.
    NatTwoArmed,
    /// Translated, and out by the interface that packets came in on.
    NatOneArmed,
    /// By MAC address alone.
    Dsr,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Waits until no other test of those that measure times runs here: they would only
/// measure each other.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hosts with their servers, and what the balancer's services are.
pub(crate) struct Bench {
    pub(crate) way: Way,
    forward: &'static str,
    /// Of the programs with which backends unwrap packets.
    pub(crate) pins: Vec<Workdir>,
    // Servers end before their namespaces go.
    pub(crate) servers: Vec<Server>,
    pub(crate) topology: Topology,
}

impl Bench {
    /// Builds the hosts and starts a server on each backend.
    #[track_caller]
    pub(crate) fn new(way: Way, versions: &[(&str, u8)]) -> Self {
        Self::with_servers(way, versions, Server::start)
    }

    /// The same with servers that are started another way.
    #[track_caller]
    pub(crate) fn with_servers(
        way: Way,
        versions: &[(&str, u8)],
        start: impl FnMut(&Host) -> Server,
    ) -> Self {
        let options = match way {
            Way::NatTwoArmed => Options::two_armed(versions),
            Way::NatOneArmed => Options::one_armed_nat(versions),
            Way::Dsr => Options::one_armed_dsr(versions),
        };
        Self::of(way, &options, start)
    }

    /// The same in a topology of one's own.
    #[track_caller]
    pub(crate) fn of(way: Way, options: &Options, start: impl FnMut(&Host) -> Server) -> Self {
        let topology = Topology::new(options);
        let servers = topology.backends.iter().map(start).collect();
        Self { servers, ..Self::on(way, topology) }
    }

    /// The same without servers.
    pub(crate) fn on(way: Way, topology: Topology) -> Self {
        let forward = if way == Way::Dsr { "dsr" } else { "nat" };
        Self { way, forward, pins: Vec::new(), servers: Vec::new(), topology }
    }

    /// As for `dsr`, with packets wrapped for backends that unwrap them: `ipip` or `gue`.
    #[track_caller]
    pub(crate) fn wrapped(forward: &'static str, versions: &[(&str, u8)]) -> Self {
        Self::new(Way::Dsr, versions).wrapping(forward)
    }

    /// Has packets wrapped which would be sent by MAC address alone.
    #[track_caller]
    pub(crate) fn wrapping(mut self, forward: &'static str) -> Self {
        self.forward = forward;
        let hosts = &self.topology.backends;
        self.pins = hosts.iter().map(|_| Workdir::new("decap")).collect();
        let from = ["eth0", "--from", "10.1.0.2", "--from", "fd00:1::2"];
        hosts.iter().zip(&self.pins).for_each(|(host, pins)| decap(host, pins, &from));
        self
    }

    /// Both services on both families; `keys` are more lines of each.
    pub(crate) fn services(&self, keys: &str) -> String {
        self.service(SHOP, HTTP_PORT, &["tcp"], keys)
            + &self.service(ECHO, ECHO_PORT, &["tcp", "udp"], keys)
    }

    /// One service on both families.
    pub(crate) fn service(&self, name: &str, port: u16, protocols: &[&str], keys: &str) -> String {
        self.service_on(&Family::ALL, name, port, protocols, keys)
    }

    /// One service on these families.
    pub(crate) fn service_on(
        &self,
        families: &[Family],
        name: &str,
        port: u16,
        protocols: &[&str],
        keys: &str,
    ) -> String {
        let keys = format!("health = {{ type = \"none\" }}\n{keys}");
        self.service_with(families, name, port, protocols, &keys)
    }

    /// One service on these families, whose `keys` say how it is checked too.
    pub(crate) fn service_with(
        &self,
        families: &[Family],
        name: &str,
        port: u16,
        protocols: &[&str],
        keys: &str,
    ) -> String {
        self.weighted_service(families, name, port, protocols, keys, |_| Some(1))
    }

    /// The same with the weight that each backend is to have; `None` leaves it out.
    pub(crate) fn weighted_service(
        &self,
        families: &[Family],
        name: &str,
        port: u16,
        protocols: &[&str],
        keys: &str,
        weight_of: impl Fn(&Host) -> Option<u32>,
    ) -> String {
        let forward = self.forward;
        let ports: Vec<String> = protocols.iter().map(|one| format!("{one}/{port}")).collect();
        let vips: Vec<String> = families.iter().map(|family| family.vip().to_string()).collect();
        format!(
            "[[service]]\nname = {name:?}\nvip = {vips:?}\nports = {ports:?}\nforward = {forward:?}\n\
             control = \"stable\"\n{keys}\n{}\n",
            self.topology.weighted_versions_toml(families, port, weight_of)
        )
    }

    /// The agent, native, with both services.
    #[track_caller]
    pub(crate) fn agent(&self, keys: &str) -> Agent<'_> {
        Agent::start(&self.topology, &AgentOptions::native(&self.topology), &self.services(keys))
    }

    /// Waits until clients of both families are answered: addresses and neighbours are
    /// settled a moment after the agent is ready, and a SYN that is lost to that waits a second.
    #[track_caller]
    pub(crate) fn wait_answered(&self) {
        const NOBODY_ELSE: u32 = 100_000;
        for family in Family::ALL {
            drop(self.connect(family, NOBODY_ELSE..NOBODY_ELSE + 1));
        }
    }

    /// The client's namespace.
    pub(crate) fn client(&self) -> &Namespace {
        &self.topology.client
    }

    /// The name of the backend with an address.
    #[track_caller]
    pub(crate) fn name_of(&self, addr: &str) -> &str {
        let addr: SocketAddr = addr.parse().expect("an address and port");
        let mut hosts = self.topology.backends.iter();
        let host = hosts.find(|host| host.addrs().contains(&addr.ip()));
        &host.unwrap_or_else(|| panic!("{addr} is no backend")).name
    }

    /// Asks the echo service from many clients at once, one new flow for each
    /// index; answers are the servers' names, in the order of the indexes.
    ///
    /// A client's port is `port`, so that a run can be repeated.
    #[track_caller]
    pub(crate) fn survey(
        &self,
        family: Family,
        transport: Transport,
        clients: Range<u32>,
        port: u16,
    ) -> Vec<String> {
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        self.ask(clients.map(|index| SocketAddr::new(family.client(index), port)), transport, to)
    }

    /// The same from addresses and ports of one's own.
    #[track_caller]
    pub(crate) fn ask(
        &self,
        sources: impl Iterator<Item = SocketAddr>,
        transport: Transport,
        to: SocketAddr,
    ) -> Vec<String> {
        /// More than there are processors: an answer takes a while.
        const WORKERS: usize = 4;
        let sources: Vec<SocketAddr> = sources.collect();
        let one = |source: &SocketAddr| {
            let answer = match transport {
                Transport::Tcp => client::tcp_name(*source, to),
                Transport::Udp => {
                    UdpFlow::open_here(*source, to).and_then(|flow| flow.ask(b"who are you?"))
                }
            };
            answer.unwrap_or_else(|error| panic!("{transport:?} {source} to {to}: {error}"))
        };
        let chunk = sources.len().div_ceil(WORKERS).max(1);
        self.client().run(|| {
            thread::scope(|scope| {
                // Threads are born into the namespace of the one that makes them.
                let workers: Vec<_> = sources
                    .chunks(chunk)
                    .map(|part| scope.spawn(move || part.iter().map(one).collect::<Vec<_>>()))
                    .collect();
                let names = workers.into_iter().flat_map(|worker| {
                    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                });
                names.collect()
            })
        })
    }

    /// Opens keep-alive connections to the HTTP service.
    #[track_caller]
    pub(crate) fn connect(&self, family: Family, clients: Range<u32>) -> Pool {
        let to = SocketAddr::new(family.vip(), HTTP_PORT);
        let mut pool = Pool::default();
        self.client().run(|| {
            for index in clients {
                let source = family.client(index);
                let mut connection = Connection::open_here(source, to)
                    .unwrap_or_else(|error| panic!("{source} to {to}: {error}"));
                let name = connection.name().unwrap_or_else(|error| panic!("{source}: {error}"));
                pool.open.push((connection, name));
            }
        });
        pool
    }
}

/// Runs `canary-agent decap` on a backend.
#[track_caller]
pub(crate) fn decap(host: &Host, pins: &Workdir, args: &[&str]) {
    let mut command = host.namespace.command(binary::locate("canary-agent"));
    command.arg("decap").args(args).arg("--pins").arg(pins.bpffs().join("decap"));
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = spawn::spawn(command).expect("the command starts");
    let output = child.wait_with_output().expect("the command ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {args:?}: {said}", host.name);
}

/// Connections that are open, each with the server that it began on.
#[derive(Default)]
pub(crate) struct Pool {
    pub(crate) open: Vec<(Connection, String)>,
}

impl Pool {
    /// Asks on every connection, and asserts that the same server answers.
    #[track_caller]
    pub(crate) fn assert_where_they_were(&mut self, when: &str) {
        for (connection, name) in &mut self.open {
            let from = connection.local_addr();
            match connection.name() {
                Ok(now) => assert_eq!(now, *name, "{when}: {from:?} has moved"),
                Err(error) => panic!("{when}: {from:?} to {name} is broken: {error}"),
            }
        }
    }
}

/// Number of servers' names that are of a version.
pub(crate) fn of_version(names: &[String], version: &str) -> u64 {
    names.iter().filter(|name| client::version_of(name) == version).count() as u64
}

/// A service of a status.
#[track_caller]
pub(crate) fn service<'a>(status: &'a Status, name: &str) -> &'a ServiceStatus {
    let found = status.services.iter().find(|service| service.name == name);
    found.unwrap_or_else(|| panic!("no service {name} in {status:#?}"))
}

/// A version of a service of a status.
#[track_caller]
pub(crate) fn version<'a>(status: &'a Status, name: &str, version: &str) -> &'a VersionStatus {
    let found = service(status, name).versions.iter().find(|one| one.name == version);
    found.unwrap_or_else(|| panic!("no version {version} in {status:#?}"))
}

/// All backends of a service.
pub(crate) fn backends<'a>(
    status: &'a Status,
    name: &str,
) -> impl Iterator<Item = &'a BackendStatus> {
    service(status, name).versions.iter().flat_map(|version| &version.backends)
}

/// What must not change when a request was refused: revision, splits, interfaces.
pub(crate) fn settled(status: &Status) -> String {
    let services: Vec<String> = status
        .services
        .iter()
        .flat_map(|service| {
            service.versions.iter().map(|one| {
                let backends: Vec<_> =
                    one.backends.iter().map(|b| (b.addr, &b.state, b.buckets)).collect();
                format!("{} {} {} {backends:?}", service.name, one.name, one.asked_text)
            })
        })
        .collect();
    let interfaces: Vec<_> =
        status.interfaces.iter().map(|i| (&i.name, i.ifindex, &i.mode)).collect();
    format!("{} {interfaces:?} {services:#?}", status.agent.revision)
}

/// Runs a command to its end, which must come soon.
#[track_caller]
pub(crate) fn finish(mut command: Command) -> Output {
    let limit = wait::patience();
    let mut files = [(); 2].map(|()| unnamed_file());
    let [out, err] = &files;
    command.stdout(Stdio::from(out.try_clone().expect("a file")));
    command.stderr(Stdio::from(err.try_clone().expect("a file")));
    let mut child = spawn::spawn(command).expect("a process");
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait().expect("a child") {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => break None,
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let [stdout, stderr] = files.each_mut().map(|file| {
        let mut bytes = Vec::new();
        file.rewind().expect("a file");
        file.read_to_end(&mut bytes).expect("a file");
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let Some(status) = status else {
        panic!("it has not ended within {limit:?}:\n{stdout}{stderr}");
    };
    Output { code: status.code().unwrap_or(-1), stdout, stderr }
}

fn unnamed_file() -> std::fs::File {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    memfd_create("output", MFdFlags::MFD_CLOEXEC).expect("a file in memory").into()
}

/// Stores translated flows of nobody's in the pinned table, as of connections that are open.
#[track_caller]
pub(crate) fn fill_flows(agent: &Agent<'_>, flows: u32) {
    let pins = agent.folder().join("bpffs/canary");
    let mut table: Flows<FlowKeyV4> = Flows::open(&pins, "FLOWS_V4").expect("the table");
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a clock");
    let last_ns = now.tv_sec() as u64 * 1_000_000_000;
    let state = flow_state::NAT | flow_state::ANSWERED | flow_state::SERVER_OPEN;
    for n in 0..flows {
        let key = FlowKeyV4 { src_be: n, dst_be: 1, ports: PortPair::new(1, 1), protocol: 6 };
        let flow = Flow { last_ns, state, syn_seq: n, backend: 1, ..Flow::default() };
        table.insert(&key, flow).expect("room for a flow");
    }
}
