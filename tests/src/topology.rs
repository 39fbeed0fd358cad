//! A client, a balancer and backends, wired with veth pairs.
//!
//! Prefixes are the same in every topology, as each lives in namespaces of its own:
//!
//! | what | IPv4 | IPv6 |
//! | --- | --- | --- |
//! | client's and balancer's link | 10.1.0.0/16: balancer .0.2, client .0.3 | fd00:1::/64: `::2`, `::3` |
//! | VIP (the agent puts it on the balancer) | 10.1.0.100 | fd00:1::100 |
//! | link to the backends, two-armed | 10.2.0.0/16, balancer 10.2.0.2 | fd00:2::/64, balancer fd00:2::2 |
//! | backend *j* of version *i*, from 1 | 10.2.*i*.*j* (one-armed 10.1.*i*.*j*) | fd00:2::*i*:*j* (fd00:1::*i*:*j*) |
//! | client addresses | 10.64.0.0/10 | fd00:9::/32 |
//!
//! *Two-armed*: the client on `eth0` of the balancer, the backends behind a switch
//! on `eth1`; the balancer routes. *One-armed*: all on one switch. In both, backends
//! reach the client addresses: through the balancer, or straight through the client's
//! own. The balancer's peers carry a program, so that native XDP works.
//!
//! *Tagged*: the same addresses in VLANs, the client's link in 7 and that to the backends in 10
//! inside 100, on devices of their own (`eth0.7`, `eth1.100.10`). One-armed there is such a link
//! too: the balancer is `::2` on it, and the client, which backends answer straight, `::3`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use crate::{
    netns::Namespace,
    wait,
    xdp_pass::{Offload, XdpPass, offload, offloads_off},
};

/// The service's IPv4 address.
pub const VIP_V4: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 100);

/// The service's IPv6 address.
pub const VIP_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x100);

/// The balancer's address towards the client, IPv4.
pub const BALANCER_V4: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);

/// The balancer's address towards the client, IPv6.
pub const BALANCER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2);

/// The client's own IPv4 address on the link.
pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 3);

/// The client's own IPv6 address on the link.
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 3);

const CLIENTS_V4: &str = "10.64.0.0/10";
const UPPER_CLIENTS_V4: &str = "10.96.0.0/11";
/// The client's address on the backends' switch, where it has one.
const CLIENT_BEHIND: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 3);
const CLIENTS_V6: &str = "fd00:9::/32";

/// Number of different client addresses of a family.
pub const CLIENTS: u32 = 1 << 22;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The service's address.
    pub fn vip(self) -> IpAddr {
        match self {
            Self::V4 => VIP_V4.into(),
            Self::V6 => VIP_V6.into(),
        }
    }

    /// One of the client addresses; `index` is taken modulo [`CLIENTS`].
    ///
    /// Neighbouring indexes lie in different IPv4 /24s and IPv6 /56s: `index`
    /// modulo 16,384 is the /24 (or /48), the rest is the host in it.
    pub fn client(self, index: u32) -> IpAddr {
        let (network, host) = (index & 0x3fff, index >> 14 & 0xff);
        match self {
            Self::V4 => Ipv4Addr::from(0x0a40_0000 | network << 8 | host).into(),
            Self::V6 => {
                let high = 0xfd00_0009_u128 << 96 | u128::from(network) << 80;
                Ipv6Addr::from(high | u128::from(host) << 8 | 1).into()
            }
        }
    }
}

/// How the hosts are wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The backends behind the balancer.
    TwoArmed,
    /// All on one switch.
    OneArmed,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Options {
    /// The wiring.
    pub shape: Shape,
    /// Names of the versions with their number of backends, control first.
    pub versions: Vec<(String, u8)>,
    /// Whether backends hold the VIP on their loopback, for `dsr`.
    pub vip_on_backends: bool,
    /// Whether the links are in VLANs.
    pub tagged: bool,
    /// Two interfaces of this host on one wire, which stand between balancer and switch in place of
    /// a veth pair.
    pub uplink: Option<[String; 2]>,
    /// Whether the balancer's peers take what it redirects to them without a program, as they do where
    /// they merge what they receive (Linux 5.13 and newer).
    pub merging: bool,
    /// Queues of each end of a wire, on which as many processors can receive at a time.
    pub queues: usize,
    /// Whether backends reach the upper half of the client addresses past the balancer, over an `eth1`
    /// of the client's on their switch; two-armed only.
    pub way_around: bool,
}

impl Options {
    /// Two-armed, for `nat`: `versions` are names with numbers of backends.
    pub fn two_armed(versions: &[(&str, u8)]) -> Self {
        Self::new(Shape::TwoArmed, versions, false)
    }

    /// One-armed, with the VIP on the backends, for `dsr`.
    pub fn one_armed_dsr(versions: &[(&str, u8)]) -> Self {
        Self::new(Shape::OneArmed, versions, true)
    }

    /// One-armed, for `nat` that sends back out the same interface.
    pub fn one_armed_nat(versions: &[(&str, u8)]) -> Self {
        Self::new(Shape::OneArmed, versions, false)
    }

    fn new(shape: Shape, versions: &[(&str, u8)], vip_on_backends: bool) -> Self {
        Self {
            shape,
            versions: versions
                .iter()
                .map(|(name, backends)| ((*name).to_owned(), *backends))
                .collect(),
            vip_on_backends,
            tagged: false,
            uplink: None,
            merging: false,
            queues: 1,
            way_around: false,
        }
    }

    /// The same in VLANs.
    pub fn tagged(self) -> Self {
        Self { tagged: true, ..self }
    }

    /// The same, one-armed, with these interfaces of the host's in place of the balancer's veth pair.
    pub fn with_uplink(self, uplink: [String; 2]) -> Self {
        assert_eq!(self.shape, Shape::OneArmed);
        Self { uplink: Some(uplink), ..self }
    }

    /// What has the client's link's addresses.
    fn towards_client(&self) -> &'static str {
        if self.tagged { "eth0.7" } else { "eth0" }
    }

    /// What has the addresses of the link to the backends on `end`.
    fn towards_backends(&self, end: &str) -> String {
        if self.tagged { format!("{end}.100.10") } else { end.to_owned() }
    }
}

/// One backend host.
#[derive(Debug)]
pub struct Host {
    /// Its version's name.
    pub version: String,
    /// `VERSION-J`, with J from 1.
    pub name: String,
    /// Its namespace; the link is `eth0`.
    pub namespace: Namespace,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// Its addresses besides its own: the VIPs for `dsr`.
    pub vips: Vec<IpAddr>,
}

impl Host {
    /// Its address in a family.
    pub fn addr(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// Every address that it answers on.
    pub fn addrs(&self) -> Vec<IpAddr> {
        let mut addrs = vec![self.v4.into(), self.v6.into()];
        addrs.extend(&self.vips);
        addrs
    }
}

/// Hosts and their wires; all gone on drop.
#[derive(Debug)]
pub struct Topology {
    /// The wiring.
    pub shape: Shape,
    /// The client host; the link is `eth0`.
    pub client: Namespace,
    /// The balancer; `eth0`, and `eth1` towards the backends if two-armed.
    pub balancer: Namespace,
    /// The backends, version by version.
    pub backends: Vec<Host>,
    // Programs go before the namespaces that they are attached in.
    _programs: Vec<XdpPass>,
    switch: Namespace,
}

impl Topology {
    /// Builds it and waits until every link is up.
    ///
    /// # Panics
    /// The host can't: see [`crate::host::ready`].
    #[track_caller]
    pub fn new(options: &Options) -> Self {
        let two_armed = options.shape == Shape::TwoArmed;
        let queues = options.queues;
        let client = Namespace::new("client");
        let balancer = Namespace::new("balancer");
        let switch = Namespace::new("switch");
        // A switch has no address of its own, and learns instead of asking.
        switch.sysctl("net/ipv6/conf/default/disable_ipv6", "1");
        switch.ip("link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link set br0 up");
        // Nor has it a firewall, whatever else runs on this kernel.
        if Path::new("/proc/sys/net/bridge").exists() {
            switch.sysctl("net/bridge/bridge-nf-call-iptables", "0");
            switch.sysctl("net/bridge/bridge-nf-call-ip6tables", "0");
            switch.sysctl("net/bridge/bridge-nf-call-arptables", "0");
        }

        // Veth pairs' ends.
        let mut ends: Vec<(&Namespace, String)> = Vec::new();
        if two_armed {
            wire(queues, &client, "eth0", &balancer, "eth0");
            wire(queues, &balancer, "eth1", &switch, "balancer");
            ends.push((&balancer, "eth1".into()));
        } else {
            wire(queues, &client, "eth0", &switch, "client");
            match &options.uplink {
                Some([ours, theirs]) => {
                    balancer.take_in(ours, "eth0");
                    switch.take_in(theirs, "balancer");
                }
                None => wire(queues, &balancer, "eth0", &switch, "balancer"),
            }
            ends.push((&switch, "client".into()));
        }
        if options.way_around {
            assert!(two_armed, "one-armed, backends reach all clients so");
            wire(queues, &client, "eth1", &switch, "client");
            ends.push((&client, "eth1".into()));
            ends.push((&switch, "client".into()));
        }
        ends.push((&client, "eth0".into()));
        let uplink = [(&balancer, "eth0".to_owned()), (&switch, "balancer".to_owned())];
        if options.uplink.is_none() {
            ends.extend(uplink.clone());
        }
        if options.tagged {
            tag(&client, "eth0", &[7]);
            tag(&balancer, "eth0", &[7]);
            if two_armed {
                tag(&balancer, "eth1", &[100, 10]);
            } else {
                tag(&client, "eth0", &[100, 10]);
                tag(&balancer, "eth0", &[100, 10]);
            }
        }
        if options.tagged && !two_armed {
            let link = options.towards_backends("eth0");
            client.ip(&format!(
                "address add 10.2.0.3/16 dev {link}
address add fd00:2::3/64 dev {link} nodad"
            ));
        }
        let link = options.towards_client();
        client.ip(&format!(
            "address add {CLIENT_V4}/16 dev {link}
address add {CLIENT_V6}/64 dev {link} nodad
route add local {CLIENTS_V4} dev lo
route add local {CLIENTS_V6} dev lo
route add default via {BALANCER_V4}
route add ::/0 via {BALANCER_V6}"
        ));
        // `bind` to an address of a local IPv6 route.
        client.sysctl("net/ipv6/ip_nonlocal_bind", "1");
        set_up_balancer(&balancer, options);

        let backends: Vec<Host> = make_backends(options);
        for host in &backends {
            wire(queues, &host.namespace, "eth0", &switch, &port(&host.name));
            if options.tagged {
                tag(&host.namespace, "eth0", &[100, 10]);
            }
            set_up_backend(host, options);
        }
        for host in &backends {
            ends.push((&host.namespace, "eth0".into()));
            ends.push((&switch, port(&host.name)));
        }
        let mtu = if options.tagged { MTU + 4 * 2 } else { MTU };
        let ports: Vec<String> = ends
            .iter()
            .chain(uplink.iter().filter(|_| options.uplink.is_some()))
            .filter(|(namespace, _)| std::ptr::eq(*namespace, &raw const switch))
            .map(|(_, interface)| format!("link set {interface} mtu {mtu} master br0"))
            .collect();
        switch.ip(&ports.join("\n"));
        for (namespace, interface) in &ends {
            offloads_off(namespace, interface);
        }
        if options.way_around {
            // The address belongs to no network of its own: the client's way to backends stays.
            client.ip(&format!("address add {CLIENT_BEHIND}/32 dev eth1"));
        }
        let mut programs = Vec::new();
        let mut take_redirects = |namespace, interface| match options.merging {
            true => offload(namespace, interface, Offload::Gro, true),
            false => programs.push(XdpPass::attach(namespace, interface)),
        };
        if options.uplink.is_none() {
            take_redirects(&switch, "balancer");
        }
        if two_armed {
            take_redirects(&client, "eth0");
        }
        for (namespace, interface) in ends.iter().chain(&uplink) {
            wait::until("a link", || running(namespace, interface));
        }
        Self { shape: options.shape, client, balancer, backends, _programs: programs, switch }
    }

    /// The other end of the balancer's `eth0`: what leaves by it comes in there.
    pub fn towards_balancer(&self) -> (&Namespace, &'static str) {
        match self.shape {
            Shape::TwoArmed => (&self.client, "eth0"),
            Shape::OneArmed => (&self.switch, "balancer"),
        }
    }

    /// The balancer's interfaces that a program belongs on.
    pub fn interfaces(&self) -> &'static [&'static str] {
        match self.shape {
            Shape::TwoArmed => &["eth0", "eth1"],
            Shape::OneArmed => &["eth0"],
        }
    }

    /// What netem does (tc-netem(8)) to packets from clients to the balancer, and to those that clients
    /// get. Both are where no XDP program sends past it.
    ///
    /// # Panics
    /// The kernel has no netem, or `tc` is missing.
    #[track_caller]
    pub fn impair(&self, netem: &str) {
        for (namespace, interface) in self.impaired() {
            let words = format!("tc qdisc replace dev {interface} root netem {netem}");
            namespace.ask(&words).unwrap_or_else(|error| panic!("{words}: {error}"));
        }
    }

    /// Packets that netem has lost on either way.
    ///
    /// # Panics
    /// `tc` says nothing of it.
    #[track_caller]
    pub fn lost(&self) -> [u64; 2] {
        self.impaired().map(|(namespace, interface)| {
            let words = format!("tc -statistics -json qdisc show dev {interface}");
            let said = namespace.ask(&words).unwrap_or_else(|error| panic!("{words}: {error}"));
            let told: serde_json::Value =
                serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
            told[0]["drops"].as_u64().unwrap_or_else(|| panic!("{interface}: {said}"))
        })
    }

    /// The way to the balancer, and the one to clients.
    fn impaired(&self) -> [(&Namespace, &'static str); 2] {
        match self.shape {
            Shape::TwoArmed => [(&self.client, "eth0"), (&self.switch, "balancer")],
            Shape::OneArmed => [(&self.switch, "balancer"), (&self.switch, "client")],
        }
    }

    /// Takes a backend off the switch, or puts it back on. Everybody's link stays up: it is gone
    /// without a word.
    pub fn cut_off(&self, host: &Host, cut: bool) {
        let master = if cut { "nomaster" } else { "master br0" };
        self.switch.ip(&format!("link set {} {master}", port(&host.name)));
    }

    /// The backends of a version, as `ADDRESS:PORT` of one family or both.
    pub fn backend_addrs(&self, version: &str, families: &[Family], port: u16) -> Vec<SocketAddr> {
        self.backends
            .iter()
            .filter(|host| host.version == version)
            .flat_map(|host| {
                families.iter().map(move |family| SocketAddr::new(host.addr(*family), port))
            })
            .collect()
    }

    /// The `[service.versions.NAME]` tables of a configuration, with every backend.
    pub fn versions_toml(&self, families: &[Family], port: u16) -> String {
        self.weighted_versions_toml(families, port, |_| Some(1))
    }

    /// The same with the weight that each backend is to have; `None` leaves it out.
    pub fn weighted_versions_toml(
        &self,
        families: &[Family],
        port: u16,
        weight_of: impl Fn(&Host) -> Option<u32>,
    ) -> String {
        let mut names: Vec<&str> = self.backends.iter().map(|host| host.version.as_str()).collect();
        names.dedup();
        let mut text = String::new();
        for name in names {
            let hosts = self.backends.iter().filter(|host| host.version == name);
            let backends: Vec<String> = hosts
                .filter_map(|host| weight_of(host).map(|weight| (host, weight)))
                .flat_map(|(host, weight)| {
                    families.iter().map(move |family| {
                        let addr = SocketAddr::new(host.addr(*family), port);
                        match weight {
                            1 => format!("\"{addr}\""),
                            _ => format!("{{ addr = \"{addr}\", weight = {weight} }}"),
                        }
                    })
                })
                .collect();
            text += &format!("[service.versions.{name}]\nbackends = [{}]\n", backends.join(", "));
        }
        text
    }
}

/// The switch's port of a backend: interface names have at most 15 characters.
fn port(host: &str) -> String {
    host.chars().take(15).collect()
}

#[track_caller]
fn wire(queues: usize, a: &Namespace, a_end: &str, b: &Namespace, b_end: &str) {
    // Left alone, a veth uses one, and can have more.
    let queues = match queues {
        1 => String::new(),
        _ => format!("numtxqueues {queues} numrxqueues {queues}"),
    };
    a.ip(&format!(
        "link add {a_end} {queues} type veth peer name {b_end} {queues} netns {}
link set {a_end} up",
        b.name()
    ));
    b.ip(&format!("link set {b_end} up"));
}

/// Bytes of the longest packet.
const MTU: u32 = 1500;

/// Makes devices for VLANs on `end`, one on the other, that write tags into frames themselves.
#[track_caller]
fn tag(namespace: &Namespace, end: &str, vlans: &[u16]) {
    offload(namespace, end, Offload::TxVlan, false);
    // Room for the tags, so that packets may have 1,500 bytes as elsewhere.
    namespace.ip(&format!("link set {end} mtu {}", MTU + 4 * 2));
    let mut below = end.to_owned();
    for (nth, vlan) in vlans.iter().enumerate() {
        let mtu = if nth + 1 == vlans.len() { MTU } else { MTU + 4 };
        let name = format!("{below}.{vlan}");
        namespace.ip(&format!(
            "link add link {below} name {name} type vlan id {vlan}
link set {name} mtu {mtu} up"
        ));
        below = name;
    }
}

fn set_up_balancer(balancer: &Namespace, options: &Options) {
    balancer.sysctl("net/ipv4/ip_forward", "1");
    balancer.sysctl("net/ipv6/conf/all/forwarding", "1");
    let link = options.towards_client();
    // Nobody is told of a shorter way: there is none.
    balancer.sysctl("net/ipv4/conf/all/send_redirects", "0");
    balancer.ip(&format!(
        "address add {BALANCER_V4}/16 dev {link}
address add {BALANCER_V6}/64 dev {link} nodad
route add {CLIENTS_V4} via {CLIENT_V4}
route add {CLIENTS_V6} via {CLIENT_V6}"
    ));
    if options.shape == Shape::TwoArmed || options.tagged {
        let two_armed = options.shape == Shape::TwoArmed;
        let link = options.towards_backends(if two_armed { "eth1" } else { "eth0" });
        balancer.ip(&format!(
            "address add 10.2.0.2/16 dev {link}
address add fd00:2::2/64 dev {link} nodad"
        ));
    }
    if options.tagged {
        // The agent puts addresses on the interfaces that its program is on.
        balancer.ip(&format!(
            "address add {VIP_V4}/32 dev {link}
address add {VIP_V6}/128 dev {link} nodad"
        ));
    }
}

fn make_backends(options: &Options) -> Vec<Host> {
    let link: u16 = match options.shape {
        Shape::OneArmed if !options.tagged => 1,
        Shape::TwoArmed | Shape::OneArmed => 2,
    };
    let mut hosts = Vec::new();
    for ((version, count), i) in options.versions.iter().zip(1_u8..) {
        for j in 1..=*count {
            let name = format!("{version}-{j}");
            hosts.push(Host {
                version: version.clone(),
                namespace: Namespace::new(&name),
                name,
                v4: Ipv4Addr::new(10, u8::try_from(link).unwrap_or(1), i, j),
                v6: Ipv6Addr::new(0xfd00, link, 0, 0, 0, 0, i.into(), j.into()),
                vips: if options.vip_on_backends {
                    vec![VIP_V4.into(), VIP_V6.into()]
                } else {
                    Vec::new()
                },
            });
        }
    }
    hosts
}

fn set_up_backend(host: &Host, options: &Options) {
    let namespace = &host.namespace;
    let link = options.towards_backends("eth0");
    let (router_v4, router_v6) = match options.shape {
        Shape::TwoArmed => ("10.2.0.2".to_owned(), "fd00:2::2".to_owned()),
        Shape::OneArmed if options.tagged => ("10.2.0.3".to_owned(), "fd00:2::3".to_owned()),
        Shape::OneArmed => (CLIENT_V4.to_string(), CLIENT_V6.to_string()),
    };
    namespace.ip(&format!(
        "address add {}/16 dev {link}
address add {}/64 dev {link} nodad
route add default via {router_v4}
route add ::/0 via {router_v6}",
        host.v4, host.v6
    ));
    if options.way_around {
        namespace.ip(&format!("route add {UPPER_CLIENTS_V4} via {CLIENT_BEHIND}"));
    }
    if options.vip_on_backends {
        // The VIP is the balancer's on the wire: nobody else may answer for it.
        namespace.sysctl("net/ipv4/conf/all/arp_ignore", "1");
        namespace.sysctl("net/ipv4/conf/all/arp_announce", "2");
        namespace.ip(&format!(
            "address add {VIP_V4}/32 dev lo
address add {VIP_V6}/128 dev lo nodad"
        ));
    }
}

/// Whether an interface is up and has a carrier.
fn running(namespace: &Namespace, interface: &str) -> Result<(), String> {
    use nix::net::if_::InterfaceFlags;
    let flags = namespace
        .run(|| {
            let found = nix::ifaddrs::getifaddrs()?.find(|entry| entry.interface_name == interface);
            Ok(found.map(|entry| entry.flags))
        })
        .map_err(|error: nix::errno::Errno| error.to_string())?
        .ok_or_else(|| format!("{interface} is not there"))?;
    flags
        .contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING)
        .then_some(())
        .ok_or_else(|| format!("{interface} has the flags {flags:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_addresses_are_all_different_and_in_their_prefix() {
        let mut seen = std::collections::HashSet::new();
        for index in (0..CLIENTS).step_by(97) {
            let IpAddr::V4(v4) = Family::V4.client(index) else { panic!("not IPv4") };
            let IpAddr::V6(v6) = Family::V6.client(index) else { panic!("not IPv6") };
            assert_eq!(u32::from(v4) >> 22, 0x0a40_0000 >> 22, "{v4}");
            assert_eq!(u128::from(v6) >> 96, 0xfd00_0009, "{v6}");
            assert!(seen.insert(v4), "{v4}");
        }
        assert_ne!(Family::V4.client(0), Family::V4.client(1));
        assert_ne!(Family::V4.client(0), Family::V4.client(1 << 14));
    }
}
