//! A host where all is well, for the tests: `eth0` towards the clients, `eth1` towards the
//! backends.

use std::{collections::BTreeMap, net::IpAddr};

use super::facts::{Device, Facts, Firewall, Folder, Kernel, Places, Rights, Settings, Xdp};
use crate::{
    api::model::{AgentStatus, InterfaceStatus, Status},
    config::{self, Config},
    datapath::{Adoptable, PinsSeen, PlaceSeen},
    plan::NextHop,
    resolve::{Seen, Survey, Way},
};

/// A configuration with one service of `nat`.
pub(super) fn config() -> Config {
    let text = r#"
        [agent]
        interfaces = ["eth0", "eth1"]

        [[service]]
        name = "shop"
        vip = ["203.0.113.10"]
        ports = ["tcp/443"]

        [service.versions.stable]
        backends = ["10.0.1.1:8443"]
    "#;
    config::load_str("agent.toml", text).expect("it is good").config
}

/// What an agent says that runs well.
pub(super) fn status() -> Status {
    Status {
        agent: AgentStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            abi_version: canary_ebpf_common::abi::ABI_VERSION,
            pid: 77,
            ..AgentStatus::default()
        },
        interfaces: vec![InterfaceStatus {
            name: "eth0".to_owned(),
            ifindex: Some(2),
            mode: Some("native".to_owned()),
            message: None,
        }],
        ..Status::default()
    }
}

/// What is found there, before an agent runs.
pub(super) fn facts() -> Facts {
    let backend: IpAddr = "10.0.1.1".parse().expect("an address");
    let link = |ifindex, name: &str| Seen {
        ifindex,
        name: name.to_owned(),
        up: true,
        running: true,
        ethernet: name != "lo",
        mtu: 1500,
        ..Seen::default()
    };
    let hop = NextHop {
        ifindex: 3,
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [2, 0, 0, 0, 0, 2],
        source: "10.0.1.254".parse().expect("an address"),
        mtu: 1500,
        tags: Default::default(),
        silent: None,
    };
    let device = Device {
        driver: Ok("ice".to_owned()),
        xdp: Ok(Xdp { native: true, redirect_target: true, several_parts: true }),
        queues: Ok((4, 8)),
        lro: Ok(false),
        gro: Ok(false),
        tx_checksum: Ok(true),
        rx_vlan: Ok(false),
    };
    let folder = |path: &str| Folder {
        path: path.into(),
        existing: path.into(),
        writable: Ok(()),
        free_bytes: Ok(1 << 30),
        file_system: 0xef53,
        open_to_others: None,
    };
    Facts {
        probed: true,
        kernel: Kernel {
            release: "6.1.0-30-amd64".to_owned(),
            recent: true,
            lacks: Some(Ok(Vec::new())),
            btf: true,
            jit: Ok(1),
            unprivileged: Ok(2),
            maps_bytes: 64 << 20,
            available_bytes: Ok(4 << 30),
            group_bytes: None,
            cpus: 4,
            page_bytes: 4096,
            clock_kept: Ok(true),
            unix_seconds: 1_800_000_000,
        },
        rights: Rights { whose: "this process".to_owned(), capabilities: Ok(u64::MAX) },
        places: Places {
            bpffs: PlaceSeen {
                path: "/sys/fs/bpf/canary".into(),
                existing: Some("/sys/fs/bpf".into()),
                on_bpffs: true,
                usual: true,
                writable: Ok(()),
            },
            pins: PinsSeen {
                maps: 0,
                links: Vec::new(),
                program: None,
                adoptable: Adoptable::Yes,
                open_to_others: None,
                panics: Vec::new(),
            },
            state: folder("/var/lib/canary"),
            socket: folder("/run/canary"),
            socket_file: None,
            socket_blocked: false,
            listen: Some(Ok(())),
        },
        agent: None,
        silent: None,
        holder: None,
        network: Ok(Survey {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1")],
            addresses: Vec::new(),
            hops: BTreeMap::from([(backend, Ok(hop))]),
            ways: BTreeMap::from([(backend, Way { named: 3, ifindex: 3, tags: 0 })]),
        }),
        devices: BTreeMap::from([("eth0".to_owned(), device.clone()), ("eth1".to_owned(), device)]),
        programs: BTreeMap::new(),
        answered: BTreeMap::new(),
        settings: Settings {
            forwarding: (Ok(1), Ok(0)),
            rp_filter: BTreeMap::new(),
            arp_ignore: BTreeMap::new(),
            reserved: Ok("1024-32767".parse().expect("ports")),
            reserved_writable: true,
            firewall: Ok(Firewall::default()),
        },
    }
}
