//! What good files mean: every key reaches the model, and what is left out has
//! its default.

use std::{path::Path, time::Duration};

use canary_agent::config::{
    load_bytes, load_str,
    model::{
        Agent, Ask, Backend, Capacity, Check, Config, Existing, Fallback, Forward, Gate, Health,
        Http, KernelSignal, Operators, Port, Probe, ProbeAsk, Protocol, Service, Signal,
        SignalKind, Stickiness, Timing, Tls, Version, Via, XdpMode,
    },
    render,
};

use super::support::{AGENT, EXAMPLE, Host, MAIN, SERVICE, good};

fn default_agent(interfaces: &[&str]) -> Agent {
    Agent {
        interfaces: interfaces.iter().map(|&name| name.to_owned()).collect(),
        xdp_mode: XdpMode::Auto,
        state_dir: "/var/lib/canary".into(),
        socket: "/run/canary/agent.sock".into(),
        bpffs: "/sys/fs/bpf/canary".into(),
        listen: Some("127.0.0.1:9109".parse().expect("an address")),
        manage_vips: true,
        operators: Operators::default(),
        nat_ports: 1024..=32_767,
        capacity: Capacity {
            services: 256,
            vips: 1024,
            backends: 1024,
            buckets: 1 << 20,
            flows: 131_072,
            samples: 16_384,
        },
        log: "info".to_owned(),
    }
}

fn backend(addr: &str, weight: u32) -> Backend {
    Backend { addr: addr.parse().expect("an address and port"), weight }
}

fn timing() -> Timing {
    Timing {
        interval: Duration::from_secs(2),
        jitter_percent: 10,
        timeout: Duration::from_secs(1),
        rise: 2,
        fall: 3,
    }
}

fn tcp() -> Health {
    Health::Check(Check { ask: Ask::Tcp, via: Via::Backend, timing: timing() })
}

#[test]
fn the_contracts_example_is_read_whole() {
    let loaded = good(EXAMPLE);
    let warnings: Vec<&str> = loaded.warnings.iter().map(|w| w.message.as_str()).collect();
    assert_eq!(
        warnings,
        [
            "`prefix` is of use with `stickiness = \"subnet\"` only",
            "version `v2` has no IPv6 backend, but service `shop` has an IPv6 address: its IPv6 \
             connections go to control",
        ]
    );
    let port = |protocol| Port { protocol, port: 443 };
    let service = Service {
        name: "shop".into(),
        vips: ["203.0.113.10", "2001:db8::10"].map(|vip| vip.parse().expect("an address")).into(),
        ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
        forward: Forward::Nat,
        nat_source: vec!["10.0.0.1".parse().expect("an address")],
        tunnel_source: Vec::new(),
        gue_port: 6080,
        mss: None,
        stickiness: Stickiness::Client,
        control: 0,
        existing: Existing::Pin,
        drain: Some(Duration::from_secs(1800)),
        udp_idle: Duration::from_secs(30),
        quic: false,
        signals: false,
        slow_start: Duration::ZERO,
        fallback: Fallback::Control,
        split: [("v2".to_owned(), "5%".parse().expect("a share"))].into(),
        routes: Vec::new(),
        routed: false,
        derived: None,
        health: tcp(),
        buckets: 65_536,
        hash_key: DERIVED_FOR_SHOP,
        versions: vec![
            Version {
                name: "stable".into(),
                backends: vec![
                    backend("10.0.1.1:8443", 1),
                    backend("10.0.1.2:8443", 2),
                    backend("[2001:db8:1::1]:8443", 1),
                ],
            },
            Version { name: "v2".into(), backends: vec![backend("10.0.2.1:8443", 1)] },
        ],
    };
    let expected = Config {
        agent: default_agent(&["eth0", "eth1"]),
        services: vec![service],
        audiences: Vec::new(),
        gates: vec![l4()],
        rollouts: Vec::new(),
    };
    assert_eq!(loaded.config, expected);
}

fn l4() -> Gate {
    let kernel = |kind, tolerate, pass_below| KernelSignal {
        kind,
        quantile_permille: (kind == SignalKind::SlowHandshake).then_some(950),
        tolerate,
        pass_below,
        observe: false,
    };
    let reset = KernelSignal { observe: true, ..kernel(SignalKind::ServerReset, 1.5, 3.75) };
    Gate {
        name: "l4".into(),
        alpha: 0.01,
        beta: 0.05,
        min_duration: Duration::from_secs(300),
        deadline: Duration::from_secs(3600),
        signals: vec![
            Signal::Kernel(kernel(SignalKind::ConnectFailed, 1.2, 3.0)),
            Signal::Kernel(kernel(SignalKind::SlowHandshake, 1.2, 1.5)),
            Signal::Kernel(reset),
            Signal::Probe(Probe {
                ask: ProbeAsk::Prometheus {
                    url: "http://127.0.0.1:9090".into(),
                    query: "…".into(),
                    above: 0.01,
                },
                interval: Duration::from_secs(10),
                timeout: Duration::from_secs(5),
                retries: 2,
                rise: 2,
                fall: 3,
                observe: false,
            }),
        ],
    }
}

#[test]
fn what_a_gate_leaves_out_has_its_default() {
    let signals = |text: &str| {
        let text = format!("{AGENT}{SERVICE}[[gate]]\nname = \"g\"\nsignals = {text}");
        good(&text).config.gates.remove(0)
    };
    let gate = signals("{ name = \"slow_handshake\" }");
    let Signal::Kernel(only) = &gate.signals[0] else { panic!("{gate:?}") };
    assert_eq!((gate.alpha, gate.beta), (0.01, 0.05));
    assert_eq!((gate.min_duration.as_secs(), gate.deadline.as_secs()), (300, 3600));
    assert_eq!((only.tolerate, only.pass_below, only.observe), (1.2, 3.0, false));
    assert_eq!(only.quantile_permille, Some(950));
    let gate = signals("[{ name = \"slow_handshake\", over = \"control:p99.9\", tolerate = 2 }]");
    let Signal::Kernel(only) = &gate.signals[0] else { panic!("{gate:?}") };
    assert_eq!((only.quantile_permille, only.pass_below), (Some(999), 5.0));
}

/// Clients stay in their buckets only as long as this does not change.
const DERIVED_FOR_SHOP: [u64; 2] = [0xe805_75b2_df58_91cc, 0x3c66_d278_8a39_b581];

#[test]
fn what_is_left_out_has_its_default() {
    let loaded = good(&format!("{AGENT}{SERVICE}"));
    let service = &loaded.config.services[0];
    assert_eq!(loaded.config.agent, default_agent(&["eth0"]));
    assert_eq!(service.forward, Forward::Nat);
    assert_eq!(service.stickiness, Stickiness::Connection);
    assert_eq!(service.existing, Existing::Pin);
    assert_eq!(service.drain, Some(Duration::from_secs(1800)));
    assert_eq!(service.udp_idle, Duration::from_secs(30));
    assert!(!service.quic);
    assert!(!service.signals);
    assert_eq!(service.slow_start, Duration::ZERO);
    assert_eq!(service.fallback, Fallback::Control);
    assert_eq!(service.health, tcp());
    assert_eq!(service.buckets, 65_536);
    assert!(service.split.is_empty() && service.nat_source.is_empty());
}

#[test]
fn every_key_reaches_the_model() {
    let text = r#"
        [agent]
        interfaces = "lo"
        xdp_mode = "generic"
        state_dir = "/a"
        socket = "/b/s.sock"
        bpffs = "/c"
        listen = "off"
        manage_vips = false
        operators = { users = ["alice", 7], uids = [7], groups = ["ops"], gids = 9 }
        nat_ports = "20000-29999"
log = "warn,canary_agent::health=debug"
        capacity = { services = 1, vips = 3, backends = 3, buckets = 8192, flows = 5, samples = 0 }

        [[service]]
        name = "web.1_a-b"
        vip = "2001:db8::1"
        ports = ["tcp/80", "tcp/443", "udp/443"]
        forward = "dsr"
        quic = true
        signals = true
        stickiness = "subnet"
        prefix = { v6 = 48 }
        control = "old"
        existing = "move"
        drain = "never"
        udp_idle = "1500ms"
        slow_start = "45s"
        fallback = "none"
        split = { v3 = "64/65536" }
        buckets = 4096
        hash_key = "000102030405060708090a0b0c0d0e0f"
        health.type = "https"
        health.path = "/healthz?a=b"
        health.expect = [200, 204]
        health.host = "shop.example"
        health.verify = false
        health.via = "vip"
        health.interval = "200ms"
        health.jitter = "25 %"
        versions.v3.backends = "[2001:db8::a]:80"
        versions.old.backends = [{ addr = "[2001:db8::b]:443", weight = 65535 }, { addr = "[2001:db8::c]:80", weight = 0 }]
    "#;
    let loaded = load_bytes(&[(Path::new(MAIN), text.as_bytes())], &Host)
        .unwrap_or_else(|errors| panic!("{}", render(&errors)));
    assert_eq!(loaded.warnings, []);
    let Agent {
        interfaces,
        xdp_mode,
        state_dir,
        socket,
        bpffs,
        listen,
        manage_vips,
        operators,
        nat_ports,
        capacity,
        log,
    } = loaded.config.agent;
    assert_eq!(interfaces, ["lo"]);
    assert_eq!(xdp_mode, XdpMode::Generic);
    assert_eq!(
        [state_dir, socket, bpffs].map(|p| p.display().to_string()),
        ["/a", "/b/s.sock", "/c"]
    );
    assert_eq!(listen, None);
    assert!(!manage_vips);
    assert_eq!(operators.uids, [7, 1000]);
    assert_eq!(operators.gids, [9, 2000]);
    assert_eq!(nat_ports, 20_000..=29_999);
    assert_eq!(log, "warn,canary_agent::health=debug");
    assert_eq!(
        capacity,
        Capacity { services: 1, vips: 3, backends: 3, buckets: 8192, flows: 5, samples: 0 }
    );
    let service = &loaded.config.services[0];
    assert_eq!(service.forward, Forward::Dsr);
    assert_eq!(service.stickiness, Stickiness::Subnet { v4: 24, v6: 48 });
    assert_eq!(service.existing, Existing::Move);
    assert_eq!(service.drain, None);
    assert_eq!(service.udp_idle, Duration::from_millis(1500));
    assert!(service.quic);
    assert!(service.signals);
    assert_eq!(service.slow_start, Duration::from_secs(45));
    assert_eq!(service.fallback, Fallback::None);
    assert_eq!(service.buckets, 4096);
    assert_eq!(service.hash_key[0], 0x0001_0203_0405_0607);
    assert_eq!(
        service.versions.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(),
        ["v3", "old"],
        "in the order of the file"
    );
    assert_eq!(service.control, 1);
    let interval = Duration::from_millis(200);
    assert_eq!(
        service.health,
        Health::Check(Check {
            ask: Ask::Http(Http {
                path: "/healthz?a=b".into(),
                expect: vec![200, 204],
                host: Some("shop.example".into()),
                tls: Some(Tls::Unverified),
            }),
            via: Via::Vip,
            timing: Timing { interval, jitter_percent: 25, timeout: interval, ..timing() },
        })
    );
}

#[test]
fn all_errors_come_in_one_run_in_the_order_of_their_places() {
    let text = "[agent]\ninterfaces = [\"eth0\", \"eth0\"]\nxdp_mod = 1\n[[service]]\nname = \"a b\"\n\
                vip = \"127.0.0.1\"\nports = [\"443\", 0]\ndrain = 5\nsplit = { v2 = 5, v3 = \"5\" }\n\
                [service.versions.stable]\nbackends = [\"10.0.0.1\"]\n";
    let errors = load_str(MAIN, text).expect_err("it is bad");
    let lines: Vec<u32> = errors.iter().map(|e| e.place.line).collect();
    assert_eq!(lines, [2, 3, 5, 6, 7, 7, 8, 9, 9, 9, 9, 11], "{}", render(&errors));
}
