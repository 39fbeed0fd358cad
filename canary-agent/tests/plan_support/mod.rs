//! Configurations to plan for, and the maps as a plan leaves them.

use std::{net::SocketAddr, time::Duration};

use canary_agent::{
    config::model::{
        Agent, Backend, Capacity, Config, Existing, Fallback, Forward, Health, Operators, Port,
        Protocol, Service, Stickiness, Version, XdpMode,
    },
    plan::{Adopted, AdoptedService, DataPlane, NextHop, Tags},
};
use canary_ebpf_common::abi;

/// A configuration of `services`.
pub(crate) fn config(services: Vec<Service>) -> Config {
    Config {
        agent: Agent {
            interfaces: vec!["lo".to_owned()],
            xdp_mode: XdpMode::Auto,
            state_dir: "/nonexistent".into(),
            socket: "/nonexistent/agent.sock".into(),
            bpffs: "/nonexistent/bpf".into(),
            listen: None,
            manage_vips: false,
            operators: Operators::default(),
            nat_ports: 32768..=60999,
            capacity: Capacity {
                services: 8192,
                vips: 16384,
                backends: 16384,
                buckets: 1 << 26,
                flows: 1 << 16,
                samples: 64,
            },
            log: "info".to_owned(),
        },
        services,
        audiences: Vec::new(),
        gates: Vec::new(),
        rollouts: Vec::new(),
    }
}

/// A service whose versions have the backends `(address, weight)`.
pub(crate) fn service(name: &str, versions: &[(&str, &[(&str, u32)])]) -> Service {
    Service {
        name: name.to_owned(),
        vips: vec!["203.0.113.10".parse().unwrap()],
        ports: vec![
            Port { protocol: Protocol::Tcp, port: 443 },
            Port { protocol: Protocol::Udp, port: 443 },
        ],
        forward: Forward::Dsr,
        nat_source: Vec::new(),
        tunnel_source: Vec::new(),
        gue_port: 6080,
        mss: None,
        stickiness: Stickiness::Client,
        control: 0,
        existing: Existing::Pin,
        drain: Some(Duration::from_secs(1000)),
        udp_idle: Duration::from_secs(30),
        quic: false,
        signals: false,
        slow_start: Duration::ZERO,
        fallback: Fallback::Control,
        split: Default::default(),
        routes: Vec::new(),
        routed: false,
        derived: None,
        health: Health::None,
        buckets: 4096,
        hash_key: [name.len() as u64, 7],
        versions: versions
            .iter()
            .map(|(name, backends)| Version {
                name: (*name).to_owned(),
                backends: backends
                    .iter()
                    .map(|(addr, weight)| Backend { addr: addr.parse().unwrap(), weight: *weight })
                    .collect(),
            })
            .collect(),
    }
}

/// The next hop that every backend has here, unless a test says otherwise.
pub(crate) fn hop(addr: SocketAddr) -> NextHop {
    let last = match addr.ip() {
        std::net::IpAddr::V4(ip) => ip.octets()[3],
        std::net::IpAddr::V6(ip) => ip.octets()[15],
    };
    NextHop {
        ifindex: 3,
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [2, 0, 0, 0, 1, last],
        source: match addr {
            SocketAddr::V4(_) => "10.0.0.1".parse().unwrap(),
            SocketAddr::V6(_) => "2001:db8::1".parse().unwrap(),
        },
        tags: Tags::default(),
        mtu: 1500,
        silent: None,
    }
}

/// What another agent would find in the maps after `plane` was applied.
pub(crate) fn maps(plane: &DataPlane) -> Adopted {
    Adopted {
        services: plane
            .services
            .iter()
            .map(|s| AdoptedService {
                id: s.record.id as u16,
                name: s.name.clone(),
                family: s.family,
                versions: (0..abi::MAX_VERSIONS)
                    .map(|n| s.versions.get(n).cloned().unwrap_or_default())
                    .collect(),
                control: s.control,
                first_page: s.record.first_page,
                buckets: s.record.bucket_mask + 1,
                entries: s.entries.to_vec(),
                ledger: s.ledger.to_vec(),
                record: Some(s.record),
                packets: 1,
            })
            .collect(),
        classes: Default::default(),
        backends: plane.backends.iter().map(|(index, b)| (*index, b.record())).collect(),
        panics: Vec::new(),
    }
}
