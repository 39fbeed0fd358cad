//! Three hosts in a row, and what stands in the middle: a program, the kernel or nftables.
//!
//! | host | interface | addresses |
//! | --- | --- | --- |
//! | generator | `eth0` | 10.1.0.3, fd00:1::3, and backends that lie on its link: 10.1.*i*.*j*, fd00:1::*i*:*j* |
//! | balancer | `eth0`, `eth1` | 10.1.0.2 and 10.2.0.2, fd00:1::2 and fd00:2::2 |
//! | backends | `eth0` | 10.2.0.3, fd00:2::3, and all backends behind the balancer: 10.2.*i*.*j*, fd00:2::*i*:*j* |
//!
//! There is no switch: what a bridge would cost is no balancer's. Each pair of interfaces has as many
//! queues as there are processors, so that two generators do not share one.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    process::Stdio,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use canary_tests::{
    agent::{Agent, AgentOptions},
    floor,
    netns::Namespace,
    spawn,
    stream::{Route, Stream},
    topology::{BALANCER_V4, BALANCER_V6, CLIENT_V4, CLIENT_V6, Family, VIP_V4, VIP_V6},
    wire::mac,
    xdp_pass::{Offload, attach_program, offload, offloads_off},
};
use nix::net::if_::if_nametoindex;

/// Backends: version and number in it. v2 is the canary, with [`SHARE`] of the connections.
const BACKENDS: [(&str, u8, u8); 3] = [("stable", 1, 1), ("stable", 1, 2), ("v2", 2, 1)];

/// Percent of the connections that go to v2.
const SHARE: u32 = 5;

/// Where nftables and the kernel have packets sent on to.
pub(super) const FORWARDED: Ipv4Addr = Ipv4Addr::new(10, 2, 1, 1);

/// The hosts; all gone on drop.
pub(super) struct Hosts {
    // Programs go before the namespaces that they are attached in.
    links: Vec<OwnedFd>,
    pub(super) generator: Namespace,
    pub(super) balancer: Namespace,
    pub(super) backends: Namespace,
}

/// A service of the agent's.
#[derive(Clone, Copy)]
pub(super) struct Service {
    pub(super) forward: &'static str,
    /// Its UDP port, and the backends'.
    pub(super) port: u16,
    /// Whether the backends lie behind the balancer; else they are on the generator's link.
    pub(super) behind: bool,
}

impl Hosts {
    pub(super) fn new() -> Self {
        let [generator, balancer, backends] =
            ["generator", "balancer", "backends"].map(Namespace::new);
        let queues = std::thread::available_parallelism().map_or(1, usize::from);
        for (near, end) in [(&generator, "eth0"), (&backends, "eth1")] {
            near.ip(&format!(
                "link add eth0 numtxqueues {queues} numrxqueues {queues} type veth \
                 peer name {end} numtxqueues {queues} numrxqueues {queues} netns {}
link set eth0 up",
                balancer.name()
            ));
            balancer.ip(&format!("link set {end} up"));
            offloads_off(near, "eth0");
            offloads_off(&balancer, end);
            own_queues(near, "eth0", queues);
            own_queues(&balancer, end, queues);
        }
        let own = |link: u8| {
            let each = BACKENDS.iter().map(move |(_, i, j)| {
                format!(
                    "\naddress add 10.{link}.{i}.{j}/32 dev eth0\
                     \naddress add fd00:{link}::{i}:{j}/128 dev eth0 nodad"
                )
            });
            each.collect::<String>()
        };
        generator.ip(&format!(
            "address add {CLIENT_V4}/16 dev eth0
address add {CLIENT_V6}/64 dev eth0 nodad
route add {VIP_V4}/32 via {BALANCER_V4}
route add {VIP_V6}/128 via {BALANCER_V6}{}",
            own(1)
        ));
        balancer.sysctl("net/ipv4/ip_forward", "1");
        balancer.sysctl("net/ipv6/conf/all/forwarding", "1");
        balancer.sysctl("net/ipv4/conf/all/send_redirects", "0");
        balancer.ip(&format!(
            "address add {BALANCER_V4}/16 dev eth0
address add {BALANCER_V6}/64 dev eth0 nodad
address add 10.2.0.2/16 dev eth1
address add fd00:2::2/64 dev eth1 nodad"
        ));
        backends.ip(&format!(
            "address add 10.2.0.3/16 dev eth0
address add fd00:2::3/64 dev eth0 nodad
address add {VIP_V4}/32 dev lo
route add default via 10.2.0.2
route add ::/0 via fd00:2::2{}",
            own(2)
        ));
        Self { links: Vec::new(), generator, balancer, backends }
    }

    /// Attaches a program for as long as the hosts are there.
    pub(super) fn attach(&mut self, at: At, program: BorrowedFd<'_>) -> Result<()> {
        let (namespace, interface) = match at {
            At::Generator => (&self.generator, "eth0"),
            At::Balancer => (&self.balancer, "eth0"),
            At::Backends => (&self.backends, "eth0"),
        };
        let link = attach_program(namespace, interface, program)
            .with_context(|| format!("attaching to {at:?}"))?;
        self.links.push(link);
        Ok(())
    }

    /// Has an interface take frames of other hosts' programs without having one itself: its queues
    /// are polled, as a driver's are.
    pub(super) fn poll(&self, at: At) {
        match at {
            At::Generator => offload(&self.generator, "eth0", Offload::Gro, true),
            At::Balancer => offload(&self.balancer, "eth0", Offload::Gro, true),
            At::Backends => offload(&self.backends, "eth0", Offload::Gro, true),
        }
    }

    /// The kernel sends what is for the service's addresses on to a backend.
    pub(super) fn forward(&self) {
        self.balancer.ip(&format!(
            "route add {VIP_V4}/32 via {FORWARDED} dev eth1
route add {VIP_V6}/128 via fd00:2::1:1 dev eth1"
        ));
    }

    /// The least program that sends on does.
    pub(super) fn redirect(&mut self) -> Result<()> {
        // It sends on what asks for the balancer's address, too.
        let [a, b, c, d, e, f] = mac(&self.balancer, "eth0");
        self.generator.ip(&format!(
            "neighbour replace {BALANCER_V4} nud permanent dev eth0 \
             lladdr {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"
        ));
        let out = self.balancer.run(|| if_nametoindex("eth1"))?;
        let macs = [mac(&self.backends, "eth0"), mac(&self.balancer, "eth1")];
        self.attach(At::Balancer, floor::redirect(out, macs)?.as_fd())
    }

    /// nftables does, as a load balancer with the same shares, the way its wiki has it
    /// (<https://wiki.nftables.org/wiki-nftables/index.php/Load_balancing>): a hash of what tells
    /// connections apart chooses a backend, and connection tracking remembers it.
    pub(super) fn nftables(&self, ports: &[u16]) -> Result<()> {
        use std::io::Write as _;
        let nft = canary_tests::binary::installed("nft").context("nft")?;
        let mut child = spawn::spawn({
            let mut command = self.balancer.command(nft);
            command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
            command
        })?;
        child.stdin.take().context("nft's input")?.write_all(ruleset(ports).as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("nft: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Our agent does, with these services, each with both families' address.
    pub(super) fn agent(&self, services: &[Service]) -> Agent<'_> {
        let options = AgentOptions {
            interfaces: ["eth0", "eth1"].map(str::to_owned).to_vec(),
            xdp_mode: "native".to_owned(),
            listen: "off".to_owned(),
            extra: String::new(),
        };
        let text: String = services.iter().map(Service::toml).collect();
        let mut agent = Agent::prepare(&self.balancer, &options, &text);
        agent.run();
        agent.wait_ready();
        agent
    }

    /// Frames from the generator to a port of the service.
    pub(super) fn route(&self, family: Family, port: u16) -> Route {
        Route {
            macs: [mac(&self.balancer, "eth0"), mac(&self.generator, "eth0")],
            from: match family {
                Family::V4 => CLIENT_V4.into(),
                Family::V6 => CLIENT_V6.into(),
            },
            to: SocketAddr::new(family.vip(), port),
        }
    }

    /// A generator of such frames, from so many ports.
    pub(super) fn stream(&self, family: Family, port: u16, ports: u16) -> Result<Arc<Stream>> {
        let route = self.route(family, port);
        let stream = self.generator.run(|| Stream::new("eth0", &route, ports));
        Ok(Arc::new(stream.context("a generator of frames")?))
    }
}

/// Where a program stands.
#[derive(Clone, Copy, Debug)]
pub(super) enum At {
    Generator,
    Balancer,
    Backends,
}

impl Service {
    fn toml(&self) -> String {
        let Self { forward, port, behind } = *self;
        let link = if behind { 2 } else { 1 };
        let addrs = |version: &str| {
            let of_version = BACKENDS.iter().filter(|(name, ..)| *name == version);
            let both = of_version.flat_map(|(_, i, j)| {
                [format!("10.{link}.{i}.{j}:{port}"), format!("[fd00:{link}::{i}:{j}]:{port}")]
            });
            both.collect::<Vec<_>>()
        };
        let vips: [IpAddr; 2] = [VIP_V4.into(), VIP_V6.into()];
        format!(
            "[[service]]\nname = \"{forward}-{port}\"\nvip = {:?}\nports = [\"udp/{port}\"]\n\
             forward = {forward:?}\ncontrol = \"stable\"\nsplit = {{ v2 = \"{SHARE}%\" }}\n\
             health = {{ type = \"none\" }}\n[service.versions.stable]\nbackends = {:?}\n\
             [service.versions.v2]\nbackends = {:?}\n",
            vips.map(|vip| vip.to_string()),
            addrs("stable"),
            addrs("v2"),
        )
    }
}

/// Has each processor send by a queue of its own. Else the answer to a question for a neighbour, which
/// an agent asks now and then from another processor, may come by the queue of the frames: that
/// processor polls it then, and goes on for as long as it is never empty.
///
/// # Panics
/// The kernel refuses.
fn own_queues(namespace: &Namespace, interface: &str, queues: usize) {
    // The kernel's form of a set of processors: words of 32, the highest first.
    let set = |cpu: usize| format!("{:x}{}", 1_u32 << (cpu % 32), ",00000000".repeat(cpu / 32));
    let lines = (0..queues).map(|nth| {
        format!("echo {} > /sys/class/net/{interface}/queues/tx-{nth}/xps_cpus\n", set(nth))
    });
    let mut command = std::process::Command::new("ip");
    // It has its own interfaces in /sys.
    command.args(["netns", "exec", namespace.name(), "sh", "-e", "-c"]);
    command.arg(lines.collect::<String>()).stderr(Stdio::piped());
    let output = spawn::spawn(command).and_then(std::process::Child::wait_with_output);
    let output = output.unwrap_or_else(|error| panic!("ip netns exec: {error}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The rules of tables that do what the agent's services do.
fn ruleset(ports: &[u16]) -> String {
    let half = SHARE + (100 - SHARE) / 2;
    let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
    let ports = ports.join(", ");
    let of = |family: &str, vip: IpAddr, network: &str, between: char| {
        format!(
            "table {family} nat {{
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    {family} daddr {vip} udp dport {{ {ports} }} dnat to jhash {family} saddr . udp sport mod 100 map {{ \
     0-{} : {network}2{between}1, {SHARE}-{} : {network}1{between}1, {half}-99 : {network}1{between}2 }}
  }}
}}
",
            SHARE - 1,
            half - 1,
        )
    };
    of("ip", VIP_V4.into(), "10.2.", '.') + &of("ip6", VIP_V6.into(), "fd00:2::", ':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_share_all_hundred_parts_out() {
        let rules = ruleset(&[7001]);
        assert!(rules.contains("{ 0-4 : 10.2.2.1, 5-51 : 10.2.1.1, 52-99 : 10.2.1.2 }"), "{rules}");
        assert!(rules.contains("0-4 : fd00:2::2:1, 5-51 : fd00:2::1:1, 52-99 : fd00:2::1:2"));
        assert!(rules.contains("udp dport { 7001 }"), "{rules}");
    }
}
