//! What stands between clients and backends: ours, and what else Linux can do it with.
//!
//! Each has hosts and wires of its own, all alike; only what the balancer's host runs differs.

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use canary_tests::{
    agent::{Agent, AgentOptions},
    binary,
    nginx::Nginx,
    server::HTTP_PORT,
    spawn::spawn,
    topology::{BALANCER_V4, Host, Options, Topology, VIP_V4},
    workdir::Workdir,
};
use clap::ValueEnum;
use serde::Serialize;

use super::load::Plan;

/// Where `cargo xtask bench peers` unpacks them below the user's cache, as in
/// `xtask/src/setup/peers.rs`.
const UNPACKED: &str = "canary-xdp/peers/usr";

/// Clients that come from different addresses.
const CLIENTS: u32 = 4_096;
/// The first of those that backends reach past the balancer.
const WAY_AROUND: u32 = 8_192;

/// The balancer's address towards the backends.
const BEHIND: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 2);
/// More of them for `nat_source`: with one, there would be no port left whose last connection a
/// backend has forgotten.
const MORE_SOURCES: u8 = 7;

/// In how many connections one is the canary's.
pub(super) const ONE_IN: u64 = 10;

/// What forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Subject {
    /// The kernel routes to the backend that the client has chosen
    Plain,
    /// Weighted multipath routes to the service's address, which backends hold
    Multipath,
    /// Ours, `nat`
    Nat,
    /// Ours, `dsr`: answers go past the balancer
    Dsr,
    /// Ours, `dsr`, with the balancer as the backends' router: answers go through it as with plain forwarding
    DsrRouted,
    /// Ours, `ipip`: answers go past the balancer
    Ipip,
    /// nftables, destination NAT by a map
    Nftables,
    /// HAProxy, mode tcp
    Haproxy,
    /// nginx, stream with split_clients
    Nginx,
}

impl Subject {
    /// What a row of a table says.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Plain => "plain forwarding",
            Self::Multipath => "weighted multipath routes",
            Self::Nat => "canary-xdp, nat",
            Self::Dsr => "canary-xdp, dsr",
            Self::DsrRouted => "canary-xdp, dsr, routed back",
            Self::Ipip => "canary-xdp, ipip",
            Self::Nftables => "nftables",
            Self::Haproxy => "HAProxy, tcp",
            Self::Nginx => "nginx, stream",
        }
    }

    pub(crate) const fn ours(self) -> bool {
        matches!(self, Self::Nat | Self::Dsr | Self::DsrRouted | Self::Ipip)
    }

    /// Where its clients connect to, and who they are.
    pub(super) fn plan(self, topology: &Topology, threads: usize) -> Plan {
        let at = |host: &Host| SocketAddr::new(host.v4.into(), HTTP_PORT);
        let targets = match self {
            // Here the client chooses, in the same proportion.
            Self::Plain => {
                let [stable, canary] = [0, 1].map(|nth| at(&topology.backends[nth]));
                (1..ONE_IN).map(|_| stable).chain([canary]).collect()
            }
            _ => vec![SocketAddr::new(VIP_V4.into(), HTTP_PORT)],
        };
        let first = if matches!(self, Self::Dsr | Self::Ipip) { WAY_AROUND } else { 0 };
        Plan { targets, clients: first..first + CLIENTS, threads }
    }
}

/// Programs that are compared with, and that serve.
pub(crate) struct Programs {
    nginx: PathBuf,
    stream_module: PathBuf,
    haproxy: PathBuf,
    nft: Option<PathBuf>,
}

impl Programs {
    pub(super) fn find() -> Result<Self> {
        let cache = env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| env::home_dir().map(|home| home.join(".cache")))
            .context("no home directory")?;
        let usr = cache.join(UNPACKED);
        let programs = Self {
            nginx: usr.join("sbin/nginx"),
            stream_module: usr.join("lib/nginx/modules/ngx_stream_module.so"),
            haproxy: usr.join("sbin/haproxy"),
            nft: binary::installed("nft"),
        };
        for path in [&programs.nginx, &programs.stream_module, &programs.haproxy] {
            ensure!(
                path.is_file(),
                "{} is missing: `cargo xtask bench peers` unpacks it where apt may",
                path.display()
            );
        }
        Ok(programs)
    }

    /// What they say of their versions, one a line.
    pub(super) fn versions(&self) -> Vec<String> {
        let said = |program: &Path, option: &str| {
            let output = Command::new(program).arg(option).output().ok()?;
            let text = [output.stdout, output.stderr].concat();
            String::from_utf8_lossy(&text).lines().next().map(str::to_owned)
        };
        let nft = self.nft.as_deref().and_then(|nft| said(nft, "--version"));
        [nft, said(&self.haproxy, "-v"), said(&self.nginx, "-v")].into_iter().flatten().collect()
    }
}

/// Hosts, wires and servers.
pub(crate) struct Bed {
    pub(super) topology: Topology,
    _servers: Vec<Nginx>,
}

impl Bed {
    pub(super) fn new(programs: &Programs, queues: usize) -> Self {
        let options = Options {
            vip_on_backends: true,
            merging: true,
            way_around: true,
            queues,
            ..Options::two_armed(&[("stable", 1), ("v2", 1)])
        };
        let topology = Topology::new(&options);
        // The service's address is routed to the balancer, as a router before it would.
        topology.client.ip(&format!("route add {VIP_V4}/32 via {BALANCER_V4}"));
        // Answers come by another way than questions, and the service's address from within.
        for namespace in [&topology.client, &topology.balancer] {
            for which in ["all", "default", "eth0", "eth1"] {
                namespace.sysctl(&format!("net/ipv4/conf/{which}/rp_filter"), "0");
            }
        }
        let servers = topology.backends.iter();
        let servers = servers.map(|host| Nginx::start(&programs.nginx, host, &[])).collect();
        Self { topology, _servers: servers }
    }
}

/// A subject at work; gone on drop.
pub(crate) struct Running<'a> {
    pub(crate) subject: Subject,
    pub(super) bed: &'a Bed,
    pub(super) plan: Arc<Plan>,
    /// Held as long as it is at work.
    _parts: Parts<'a>,
}

#[derive(Default)]
struct Parts<'a> {
    _peer: Option<Peer>,
    _agent: Option<Agent<'a>>,
    _unwrapping: Vec<Workdir>,
}

impl<'a> Running<'a> {
    pub(super) fn start(
        subject: Subject,
        bed: &'a Bed,
        programs: &Programs,
        threads: usize,
    ) -> Result<Self> {
        let topology = &bed.topology;
        let mut parts = Parts::default();
        match subject {
            Subject::Plain => {}
            Subject::Multipath => multipath(topology),
            Subject::Nftables => nftables(topology, programs)?,
            Subject::Haproxy => parts._peer = Some(haproxy(topology, programs)?),
            Subject::Nginx => parts._peer = Some(nginx(topology, programs)?),
            Subject::Nat | Subject::Dsr | Subject::DsrRouted | Subject::Ipip => {
                if subject == Subject::Ipip {
                    let hosts = topology.backends.iter();
                    parts._unwrapping = hosts.map(unwrapping).collect::<Result<_>>()?;
                }
                parts._agent = Some(agent(topology, subject));
            }
        }
        let plan = Arc::new(subject.plan(topology, threads));
        Ok(Self { subject, bed, plan, _parts: parts })
    }
}

/// A process on the balancer's host; killed on drop.
struct Peer {
    child: Child,
    _folder: tempfile::TempDir,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Weighted next hops, chosen by addresses and ports (ip-route(8); `fib_multipath_hash_policy` in the
/// kernel's networking/ip-sysctl).
fn multipath(topology: &Topology) {
    topology.balancer.sysctl("net/ipv4/fib_multipath_hash_policy", "1");
    let [stable, canary] = [0, 1].map(|nth| topology.backends[nth].v4);
    topology.balancer.ip(&format!(
        "route add {VIP_V4}/32 nexthop via {stable} weight {} nexthop via {canary} weight 1",
        ONE_IN - 1
    ));
}

/// As the nftables wiki has it under *Load balancing* (round robin with weights by intervals), and nft(8)
/// under *numgen expression*. The answers come back through the balancer, so the source stays.
fn nftables(topology: &Topology, programs: &Programs) -> Result<()> {
    ensure!(programs.nft.is_some(), "nft is missing: apt-get install nftables");
    let [stable, canary] = [0, 1].map(|nth| topology.backends[nth].v4);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("shop.nft");
    let last = ONE_IN - 1;
    fs::write(
        &path,
        format!(
            "table ip shop {{\n  chain prerouting {{\n    type nat hook prerouting priority dstnat;\n\
             \x20   ip daddr {VIP_V4} tcp dport {HTTP_PORT} dnat to numgen inc mod {ONE_IN} map \
             {{ 0-{} : {stable}, {last} : {canary} }}\n  }}\n}}\n",
            last - 1
        ),
    )?;
    let said = topology.balancer.ask(&format!("nft -f {}", path.display()));
    said.map_err(|error| anyhow::anyhow!("nft: {error}"))?;
    Ok(())
}

/// Proxies have connections of their own, to which the host's ports are given: as many as there are, as
/// *Tuning NGINX for Performance* advises.
fn proxy(topology: &Topology) {
    topology.balancer.ip(&format!("address add {VIP_V4}/32 dev eth0"));
    topology.balancer.sysctl("net/ipv4/ip_local_port_range", "1024 65535");
}

/// By HAProxy's *Configuration Manual* (2.6): weights in section 5.2, and `option splice-auto`, which uses
/// the kernel's splicing where it helps. `nbthread` is left alone: one thread a processor. `shards` is for
/// very many threads.
fn haproxy(topology: &Topology, programs: &Programs) -> Result<Peer> {
    proxy(topology);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("haproxy.cfg");
    let [stable, canary] = [0, 1].map(|nth| topology.backends[nth].v4);
    fs::write(
        &path,
        format!(
            "defaults\n    mode tcp\n    option splice-auto\n    timeout connect 5s\n\
             \x20   timeout client 30s\n    timeout server 30s\n\nlisten shop\n    bind {VIP_V4}:{HTTP_PORT}\n\
             \x20   balance roundrobin\n    server stable {stable}:{HTTP_PORT} weight {}\n\
             \x20   server v2 {canary}:{HTTP_PORT} weight 10\n",
            (ONE_IN - 1) * 10
        ),
    )?;
    let mut command = topology.balancer.command(&programs.haproxy);
    // In the foreground: one process, whose end is the end of all.
    command.arg("-db").arg("-f").arg(&path).stdout(Stdio::null());
    let child = spawn(command).context("haproxy")?;
    Ok(Peer { child, _folder: folder })
}

/// By the documentation of ngx_stream_split_clients_module and of the core module: a process for each
/// processor (`worker_processes auto`), each with a socket of its own (`reuseport`).
fn nginx(topology: &Topology, programs: &Programs) -> Result<Peer> {
    proxy(topology);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("nginx.conf");
    let [stable, canary] = [0, 1].map(|nth| topology.backends[nth].v4);
    fs::write(
        &path,
        format!(
            "load_module {};\ndaemon off;\nuser root;\npid {}/nginx.pid;\nworker_processes auto;\n\
             worker_rlimit_nofile 16384;\nevents {{ worker_connections 8192; }}\nstream {{\n\
             \x20 split_clients \"$remote_addr:$remote_port\" $version {{ {}% v2; * stable; }}\n\
             \x20 upstream stable {{ server {stable}:{HTTP_PORT}; }}\n\
             \x20 upstream v2 {{ server {canary}:{HTTP_PORT}; }}\n\
             \x20 server {{ listen {VIP_V4}:{HTTP_PORT} reuseport; proxy_pass $version; }}\n}}\n",
            programs.stream_module.display(),
            folder.path().display(),
            100 / ONE_IN
        ),
    )?;
    // With its workers in a process namespace, which the first one's end is the end of.
    let mut command = topology.balancer.command("unshare");
    command.args(["--fork", "--pid", "--kill-child"]).arg(&programs.nginx);
    command.args(["-e", "stderr", "-c"]).arg(&path).stdout(Stdio::null());
    let child = spawn(command).context("nginx")?;
    Ok(Peer { child, _folder: folder })
}

fn agent(topology: &Topology, subject: Subject) -> Agent<'_> {
    let (forward, more) = match subject {
        Subject::Nat => {
            let more = (0..MORE_SOURCES).map(|nth| Ipv4Addr::new(10, 2, 0, 11 + nth));
            let lines: Vec<_> =
                more.clone().map(|a| format!("address add {a}/32 dev eth1")).collect();
            topology.balancer.ip(&lines.join("\n"));
            let all: Vec<_> = [BEHIND].into_iter().chain(more).map(|a| a.to_string()).collect();
            ("nat", format!("nat_source = {all:?}\n"))
        }
        Subject::Ipip => ("ipip", String::new()),
        _ => ("dsr", String::new()),
    };
    let mut options = AgentOptions::native(topology);
    if subject != Subject::Nat {
        // Only `nat` looks at answers.
        options.interfaces.truncate(1);
    }
    // The address is routed to this host, and need not be on it; room for all of a run's connections.
    options.extra = "manage_vips = false\ncapacity = { flows = 1000000 }".to_owned();
    let [stable, canary] =
        [0, 1].map(|nth| SocketAddr::new(topology.backends[nth].v4.into(), HTTP_PORT));
    let service = format!(
        "[[service]]\nname = \"shop\"\nvip = \"{VIP_V4}\"\nports = \"tcp/{HTTP_PORT}\"\nforward = {forward:?}\n{more}\
         control = \"stable\"\nsplit = {{ v2 = \"{}%\" }}\nhealth = {{ type = \"none\" }}\n\
         [service.versions.stable]\nbackends = [\"{stable}\"]\n\
         [service.versions.v2]\nbackends = [\"{canary}\"]\n",
        100 / ONE_IN
    );
    Agent::start(topology, &options, &service)
}

/// Has a backend unwrap what comes from the balancer; the program goes with the folder.
fn unwrapping(host: &Host) -> Result<Workdir> {
    let workdir = Workdir::new("decap");
    let mut command = host.namespace.command(binary::locate("canary-agent"));
    command.args(["decap", "eth0", "--from", &BEHIND.to_string(), "--pins"]);
    command.arg(workdir.bpffs().join("decap")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = spawn(command)?.wait_with_output()?;
    ensure!(output.status.success(), "decap: {}", String::from_utf8_lossy(&output.stderr));
    Ok(workdir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_named_once() {
        let names: std::collections::HashSet<_> = Subject::value_variants()
            .iter()
            .filter_map(|s| s.to_possible_value())
            .map(|v| v.get_name().to_owned())
            .collect();
        let titles: std::collections::HashSet<_> =
            Subject::value_variants().iter().map(|subject| subject.title()).collect();
        let count = Subject::value_variants().len();
        assert_eq!((names.len(), titles.len()), (count, count));
    }
}
