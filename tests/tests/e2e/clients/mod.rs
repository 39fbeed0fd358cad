//! Real client programs against real servers, through the agent, with every way of forwarding and
//! both families: what they bring is looked at, and which server it came from.

mod echo;
mod lookup;
mod trace;
mod transfer;
mod web;

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
};

use canary_agent::api::model::Explain;
use canary_tests::{
    agent::Agent,
    binary,
    client::version_of,
    control::Control,
    host,
    netns::Namespace,
    server::{ECHO_PORT, HTTP_PORT, Server},
    spawn, stack,
    topology::{Family, Host},
    wait,
};

use crate::support::{Bench, Way, finish};

/// Versions with their numbers of backends.
const VERSIONS: &[(&str, u8)] = &[("stable", 2), ("v2", 1)];

/// All connections of a client's go to one server, and neither version has all clients.
const KEYS: &str = "stickiness = \"client\"\nsplit = { v2 = \"40%\" }";

/// Port of the bench's own HTTP where it is another server's.
const OTHER_HTTP_PORT: u16 = 8080;

/// How packets reach the backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    NatTwoArmed,
    NatOneArmed,
    Dsr,
    Ipip,
    Gue,
}

impl Mode {
    /// Hosts with the bench's own servers.
    #[track_caller]
    fn bench(self) -> Bench {
        self.bench_with(Server::start)
    }

    /// The same with port 80 left to another HTTP server.
    #[track_caller]
    fn bench_without_http(self) -> Bench {
        self.bench_with(|host| Server::start_on(host, OTHER_HTTP_PORT, ECHO_PORT))
    }

    #[track_caller]
    fn bench_with(self, start: impl FnMut(&Host) -> Server) -> Bench {
        let of = |way| Bench::with_servers(way, VERSIONS, start);
        match self {
            Self::NatTwoArmed => of(Way::NatTwoArmed),
            Self::NatOneArmed => of(Way::NatOneArmed),
            Self::Dsr => of(Way::Dsr),
            Self::Ipip => of(Way::Dsr).wrapping("ipip"),
            Self::Gue => of(Way::Dsr).wrapping("gue"),
        }
    }

    /// The addresses that a server of a host listens on: where packets come to.
    fn served(host: &Host) -> Vec<IpAddr> {
        if host.vips.is_empty() { host.addrs() } else { host.vips.clone() }
    }
}

/// Makes a test of a function for each mode.
macro_rules! in_every_mode {
    ($exercise:ident: $nat:ident, $one_armed:ident, $dsr:ident, $ipip:ident, $gue:ident) => {
        #[test]
        fn $nat() {
            $exercise(stringify!($nat), crate::clients::Mode::NatTwoArmed);
        }

        #[test]
        fn $one_armed() {
            $exercise(stringify!($one_armed), crate::clients::Mode::NatOneArmed);
        }

        #[test]
        fn $dsr() {
            $exercise(stringify!($dsr), crate::clients::Mode::Dsr);
        }

        #[test]
        fn $ipip() {
            $exercise(stringify!($ipip), crate::clients::Mode::Ipip);
        }

        #[test]
        fn $gue() {
            $exercise(stringify!($gue), crate::clients::Mode::Gue);
        }
    };
}
use in_every_mode;

/// Whether a test can run: this host has the bench, and these programs.
///
/// # Panics
/// It can't, and `CI` is set.
#[track_caller]
fn ready(test: &str, programs: &[&str]) -> bool {
    if !host::ready(test) {
        return false;
    }
    let missing: Vec<&str> =
        programs.iter().copied().filter(|one| binary::installed(one).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    host::skip(test, &lacking(&missing.join(", ")));
    false
}

fn lacking(what: &str) -> String {
    format!("this host lacks {what}: `cargo xtask setup` gets it, or says how")
}

/// A client and the server that the agent says it has.
#[derive(Debug)]
struct Client {
    addr: IpAddr,
    backend: String,
}

/// A client of a family for each version, the first of them from `first` on: as `explain` says.
#[track_caller]
fn clients(
    bench: &Bench,
    agent: &Agent<'_>,
    service: &str,
    family: Family,
    first: u32,
) -> Vec<Client> {
    /// So many on one version alone would be no split.
    const MOST: u32 = 100;
    let mut control = Control::open(&agent.socket()).expect("the socket");
    let mut explained = (first..first + MOST).map(|index| {
        let addr = family.client(index);
        let target = format!("/v1/services/{service}/explain?from={}", percent(addr));
        let answer = control.ask("GET", &target, b"").expect("an answer");
        assert_eq!(answer.status, 200, "{target}: {}", String::from_utf8_lossy(&answer.body));
        let backend = answer.json::<Explain>().backend.expect("a backend");
        Client { addr, backend: bench.name_of(&backend).to_owned() }
    });
    let mut of = |version: &str| {
        let found = explained.find(|client| version_of(&client.backend) == version);
        found.unwrap_or_else(|| panic!("{service} {family:?}: nobody is on {version}"))
    };
    VERSIONS.iter().map(|(version, _)| of(version)).collect()
}

/// An address as a part of a query.
fn percent(addr: IpAddr) -> String {
    addr.to_string().replace(':', "%3A")
}

/// An address as a part of a URL.
fn in_url(addr: IpAddr) -> String {
    match addr {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

/// The option that many programs have for a family.
fn option(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

/// A program with its arguments, divided by spaces, in a namespace.
fn command(namespace: &Namespace, line: &str) -> Command {
    let mut words = line.split_whitespace();
    let name = words.next().expect("a program");
    let program = binary::installed(name).unwrap_or_else(|| panic!("{name} is not installed"));
    let mut command = namespace.command(program);
    command.args(words).env("LC_ALL", "C");
    command
}

/// Runs such a line to its end, which must be a good one; what it has printed.
#[track_caller]
fn run(namespace: &Namespace, line: &str) -> String {
    let output = finish(command(namespace, line));
    assert_eq!(output.code, 0, "{line}:\n{}{}", output.stdout, output.stderr);
    output.stdout
}

/// A server's process; killed on drop.
struct Running(Child);

impl Running {
    /// Starts it on a host and waits until it listens on a port of these addresses.
    #[track_caller]
    fn start(host: &Host, line: &str, addrs: &[IpAddr], port: u16) -> Self {
        let mut command = command(&host.namespace, line);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let running = Self(spawn::spawn(command).unwrap_or_else(|error| panic!("{line}: {error}")));
        wait::until(line, || {
            let all = || addrs.iter().try_for_each(|addr| connects(SocketAddr::new(*addr, port)));
            host.namespace.run(all)
        });
        running
    }
}

fn connects(to: SocketAddr) -> Result<(), String> {
    TcpStream::connect(to).map(drop).map_err(|error| format!("{to}: {error}"))
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until clients of both families reach a server through a service.
#[track_caller]
fn wait_served(bench: &Bench, port: u16) {
    for family in Family::ALL {
        wait::until("a server", || {
            bench.client().run(|| connects(SocketAddr::new(family.vip(), port)))
        });
    }
}

/// What a host's stack has counted since it was made, of segments of TCP and datagrams of UDP that
/// came to it, whoever they were for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Came {
    segments: u64,
    datagrams: u64,
}

impl Came {
    #[track_caller]
    fn to(host: &Host) -> Self {
        let host = &host.namespace;
        let udp = ["InDatagrams", "NoPorts", "InErrors"]
            .map(|name| stack::counter(host, "Udp", name).expect("a counter"));
        let udp6 = ["Udp6InDatagrams", "Udp6NoPorts", "Udp6InErrors"]
            .map(|name| stack::counter_v6(host, name));
        Self {
            // Of both families.
            segments: stack::counter(host, "Tcp", "InSegs").expect("a counter"),
            datagrams: udp.iter().chain(&udp6).sum(),
        }
    }

    /// At each backend, in order, when the last segments of earlier connections have come.
    #[track_caller]
    fn to_all_at_rest(bench: &Bench) -> Vec<Self> {
        let hosts = &bench.topology.backends;
        for host in hosts {
            wait::until("the end of earlier connections", || {
                match stack::open_sockets(&host.namespace, None) {
                    0 => Ok(()),
                    open => Err(format!("{}: {open} are open", host.name)),
                }
            });
        }
        hosts.iter().map(Self::to).collect()
    }
}

/// Asserts that since `before` only one backend has got anything.
#[track_caller]
fn assert_only(bench: &Bench, before: &[Came], backend: &str, what: &str) {
    for (host, before) in bench.topology.backends.iter().zip(before) {
        let now = Came::to(host);
        if host.name == backend {
            assert_ne!(now, *before, "{what}: {backend} has got nothing");
        } else {
            assert_eq!(now, *before, "{what}: what is {backend}'s has come to {} too", host.name);
        }
    }
}
