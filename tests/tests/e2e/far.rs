//! A client far behind the balancer.

use std::net::IpAddr;

use canary_tests::{
    netns::Namespace,
    topology::{CLIENT_V4, CLIENT_V6, Family},
};

use crate::support::Bench;

/// Bytes of a packet that the narrow link takes.
const NARROW_MTU: u32 = 1300;

/// A client two routers away, with a link of [`NARROW_MTU`] between them: its own link is wide, so
/// its SYN says nothing of that.
pub(crate) struct Far {
    pub(crate) far: Namespace,
    pub(crate) router: Namespace,
}

impl Far {
    /// Builds it behind the client's host, which is the first router.
    #[track_caller]
    pub(crate) fn new(bench: &Bench) -> Self {
        let near = bench.client();
        let router = Namespace::new("router");
        let far = Namespace::new("far");
        let forwards = |namespace: &Namespace| {
            namespace.sysctl("net/ipv4/ip_forward", "1");
            namespace.sysctl("net/ipv6/conf/all/forwarding", "1");
        };
        forwards(near);
        forwards(&router);
        near.ip(&format!(
            "link add narrow type veth peer name narrow netns {}
link set narrow mtu {NARROW_MTU} up
address add 10.200.0.1/24 dev narrow
address add fd00:c8::1/64 dev narrow nodad
route add 10.200.1.0/24 via 10.200.0.2
",
            router.name()
        ));
        router.ip(&format!(
            "link set narrow mtu {NARROW_MTU} up
address add 10.200.0.2/24 dev narrow
address add fd00:c8::2/64 dev narrow nodad
route add default via 10.200.0.1
route add ::/0 via fd00:c8::1
link add wide type veth peer name wide netns {}
link set wide up
address add 10.200.1.1/24 dev wide
address add fd00:c8:1::1/64 dev wide nodad",
            far.name()
        ));
        near.ip("route add fd00:c8:1::/64 via fd00:c8::2");
        far.ip("link set wide up
address add 10.200.1.2/24 dev wide
address add fd00:c8:1::2/64 dev wide nodad
route add default via 10.200.1.1
route add ::/0 via fd00:c8:1::1");
        bench.topology.balancer.ip(&format!(
            "route add 10.200.0.0/16 via {CLIENT_V4}
route add fd00:c8::/32 via {CLIENT_V6}"
        ));
        Self { far, router }
    }

    /// The hops before the balancer.
    pub(crate) fn way(family: Family) -> [IpAddr; 2] {
        let hops = match family {
            Family::V4 => ["10.200.1.1", "10.200.0.1"],
            Family::V6 => ["fd00:c8:1::1", "fd00:c8::1"],
        };
        hops.map(|hop| hop.parse().expect("an address"))
    }

    /// Its address.
    pub(crate) fn addr(family: Family) -> IpAddr {
        let addr = match family {
            Family::V4 => "10.200.1.2",
            Family::V6 => "fd00:c8:1::2",
        };
        addr.parse().expect("an address")
    }
}
