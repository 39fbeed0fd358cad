//! traceroute: to a service's address, and past the balancer to a host behind it.

use std::net::IpAddr;

use canary_tests::{
    netns::Namespace,
    server::HTTP_PORT,
    topology::{BALANCER_V4, BALANCER_V6, Family},
};

use super::{Mode, in_every_mode, option, ready, run, wait_served};
use crate::{far::Far, support::Bench};

/// What a probe is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    /// A datagram to a port that is nobody's.
    Udp,
    /// An echo request.
    Icmp,
    /// A SYN to the service's port.
    Tcp,
    /// A datagram to the service's port.
    UdpToService,
}

impl Probe {
    const ALL: [Self; 4] = [Self::Udp, Self::Icmp, Self::Tcp, Self::UdpToService];

    fn options(self) -> &'static str {
        match self {
            Self::Udp => "",
            Self::Icmp => "--icmp",
            Self::Tcp => "--tcp --port=80",
            Self::UdpToService => "--udp --port=7",
        }
    }
}

/// The hops on the way, as traceroute prints them.
#[track_caller]
fn trace(from: &Namespace, family: Family, probe: Probe, to: IpAddr) -> Vec<String> {
    let (family, options) = (option(family), probe.options());
    let line = format!("traceroute {family} -n --queries=1 --wait=3 --max-hops=8 {options} {to}");
    let said = run(from, &line);
    let hops = said.lines().skip(1).map(|line| line.split_whitespace().nth(1));
    hops.map(|hop| hop.unwrap_or_default().to_owned()).collect()
}

fn balancer(family: Family) -> IpAddr {
    match family {
        Family::V4 => BALANCER_V4.into(),
        Family::V6 => BALANCER_V6.into(),
    }
}

/// Has all hosts send as many errors as they are asked for, and the way to the first backend lead
/// over the balancer, also where it is on the same switch.
#[track_caller]
fn prepare(bench: &Bench, far: &Far) {
    let behind = &bench.topology.backends[0];
    for namespace in [&far.router, bench.client(), &bench.topology.balancer, &behind.namespace] {
        namespace.sysctl("net/ipv4/icmp_ratelimit", "0");
        namespace.sysctl("net/ipv6/icmp/ratelimit", "0");
    }
    bench.client().ip(&format!(
        "route replace {}/32 via {BALANCER_V4}\nroute replace {}/128 via {BALANCER_V6}",
        behind.v4, behind.v6
    ));
}

#[track_caller]
fn exercise(test: &str, mode: Mode) {
    if !ready(test, &["traceroute"]) {
        return;
    }
    let bench = mode.bench();
    let far = Far::new(&bench);
    prepare(&bench, &far);
    let all = || Family::ALL.into_iter().flat_map(|family| Probe::ALL.map(|probe| (family, probe)));
    let behind = &bench.topology.backends[0];
    let past = |family, probe| trace(&far.far, family, probe, behind.addr(family));
    let without: Vec<_> = all().map(|(family, probe)| past(family, probe)).collect();
    let _agent = bench.agent("");
    wait_served(&bench, HTTP_PORT);
    for ((family, probe), without) in all().zip(without) {
        let what = format!("{test} {family:?} {probe:?}");
        let way = Far::way(family).map(|hop| hop.to_string());
        let hops = trace(&far.far, family, probe, family.vip());
        let mut expected = way.to_vec();
        // Where packets are routed on, the balancer is a hop of the service's address by itself.
        let steered = matches!(probe, Probe::Tcp | Probe::UdpToService);
        let ends = if steered && mode != Mode::Dsr { 2 } else { 1 };
        expected.extend(std::iter::repeat_n(family.vip().to_string(), ends));
        assert_eq!(hops, expected, "{what} to the service");
        let mut expected = way.to_vec();
        expected.extend([balancer(family).to_string(), behind.addr(family).to_string()]);
        assert_eq!(without, expected, "{what} without an agent");
        assert_eq!(past(family, probe), expected, "{what} past the agent");
    }
}

in_every_mode!(exercise:
    traceroute_shows_the_way_in_nat,
    traceroute_shows_the_way_in_one_armed_nat,
    traceroute_shows_the_way_in_dsr,
    traceroute_shows_the_way_in_ipip,
    traceroute_shows_the_way_in_gue
);
