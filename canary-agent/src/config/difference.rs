//! What two configurations say differently, key by key, in words.
//!
//! Owns which keys a running agent can't change. Backends and versions are not among the
//! settings here: they are compared one by one where a reload is planned.

use std::{collections::BTreeMap, time::Duration};

use canary_ebpf_common::share::Share;

use super::model::{
    Agent, Ask, Capacity, Check, Existing, Fallback, Health, Http, Mss, Port, Protocol, Route,
    Service, Stickiness, Timing, Tls, Via, XdpMode,
};

/// Keys of `[agent]` that only a restart changes: what they are about is opened once, or has a
/// size that can't change. Traffic is steered during a restart.
const RESTART: &[&str] = &[
    "agent.xdp_mode",
    "agent.state_dir",
    "agent.socket",
    "agent.bpffs",
    "agent.nat_ports",
    "agent.capacity.services",
    "agent.capacity.vips",
    "agent.capacity.backends",
    "agent.capacity.buckets",
    "agent.capacity.flows",
    "agent.capacity.samples",
];

/// Shown of what is not to be seen.
const HIDDEN: &str = "(not shown)";

/// A key with another value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The key, as `docs/configuration.md` has it.
    pub key: &'static str,
    /// What it was.
    pub before: String,
    /// What it is in the files.
    pub after: String,
}

impl Difference {
    /// Whether a reload can't bring it about.
    pub fn needs_restart(&self) -> bool {
        RESTART.contains(&self.key)
    }
}

/// The keys of `[agent]` with other values.
pub fn of_agents(before: &Agent, after: &Agent) -> Vec<Difference> {
    differences(agent(before), agent(after))
}

/// The keys of a service with other values, its versions left out.
pub fn of_services(before: &Service, after: &Service) -> Vec<Difference> {
    let mut all = differences(service(before), service(after));
    if before.hash_key != after.hash_key {
        let hidden = || HIDDEN.to_owned();
        all.push(Difference { key: "hash_key", before: hidden(), after: hidden() });
    }
    if before.health != after.health && all.iter().all(|one| one.key != "health") {
        all.push(Difference {
            key: "health.verify",
            before: "the certificates that were read".to_owned(),
            after: "other certificates".to_owned(),
        });
    }
    all
}

type Settings = Vec<(&'static str, String)>;

fn differences(before: Settings, after: Settings) -> Vec<Difference> {
    let pairs = before.into_iter().zip(after);
    pairs
        .filter(|((_, before), (_, after))| before != after)
        .map(|((key, before), (_, after))| Difference { key, before, after })
        .collect()
}

fn agent(agent: &Agent) -> Settings {
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
    } = agent;
    let Capacity { services, vips, backends, buckets, flows, samples } = capacity;
    let mode = match xdp_mode {
        XdpMode::Auto => "auto",
        XdpMode::Native => "native",
        XdpMode::Generic => "generic",
    };
    vec![
        ("agent.interfaces", interfaces.join(", ")),
        ("agent.xdp_mode", mode.to_owned()),
        ("agent.state_dir", state_dir.display().to_string()),
        ("agent.socket", socket.display().to_string()),
        ("agent.bpffs", bpffs.display().to_string()),
        ("agent.listen", listen.map_or_else(|| "off".to_owned(), |address| address.to_string())),
        ("agent.log", log.clone()),
        ("agent.manage_vips", manage_vips.to_string()),
        ("agent.operators.users", listed(&operators.uids)),
        ("agent.operators.groups", listed(&operators.gids)),
        ("agent.nat_ports", format!("{}-{}", nat_ports.start(), nat_ports.end())),
        ("agent.capacity.services", services.to_string()),
        ("agent.capacity.vips", vips.to_string()),
        ("agent.capacity.backends", backends.to_string()),
        ("agent.capacity.buckets", buckets.to_string()),
        ("agent.capacity.flows", flows.to_string()),
        ("agent.capacity.samples", samples.to_string()),
    ]
}

fn service(service: &Service) -> Settings {
    let Service {
        name: _,
        vips,
        ports,
        forward,
        nat_source,
        tunnel_source,
        gue_port,
        mss,
        stickiness,
        control,
        existing,
        drain,
        udp_idle,
        quic,
        signals,
        slow_start,
        fallback,
        split,
        routes,
        routed: _,
        derived: _,
        health,
        buckets,
        hash_key: _,
        versions,
    } = service;
    let mss = match mss {
        None => "none".to_owned(),
        Some(Mss::Auto) => "auto".to_owned(),
        Some(Mss::Most(most)) => most.to_string(),
    };
    let stickiness = match stickiness {
        Stickiness::Connection => "connection".to_owned(),
        Stickiness::Client => "client".to_owned(),
        Stickiness::Subnet { v4, v6 } => format!("subnet, /{v4} and /{v6}"),
    };
    let existing = match existing {
        Existing::Pin => "pin",
        Existing::Move => "move",
    };
    let fallback = match fallback {
        Fallback::Control => "control",
        Fallback::None => "none",
    };
    let shares = |split: &BTreeMap<String, Share>| {
        let words: Vec<String> =
            split.iter().map(|(name, share)| format!("{name}={share}")).collect();
        words.join(" ")
    };
    let route = |route: &Route| match route.follows {
        false if route.split.is_empty() => format!("{}: control alone", route.audience),
        false => format!("{}: {}", route.audience, shares(&route.split)),
        true => format!("{}: as its rollout says", route.audience),
    };
    vec![
        ("vip", listed(vips)),
        ("ports", listed(&ports.iter().map(port).collect::<Vec<_>>())),
        ("forward", forward.name().to_owned()),
        ("nat_source", listed(nat_source)),
        ("tunnel_source", listed(tunnel_source)),
        ("gue_port", gue_port.to_string()),
        ("mss", mss),
        ("stickiness", stickiness),
        ("control", versions[*control].name.clone()),
        ("existing", existing.to_owned()),
        ("drain", drain.map_or_else(|| "never".to_owned(), duration)),
        ("udp_idle", duration(*udp_idle)),
        ("quic", quic.to_string()),
        ("signals", signals.to_string()),
        ("slow_start", duration(*slow_start)),
        ("fallback", fallback.to_owned()),
        ("split", shares(split)),
        ("route", listed(&routes.iter().map(route).collect::<Vec<_>>())),
        ("health", checks(health)),
        ("buckets", buckets.to_string()),
    ]
}

fn port(port: &Port) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{protocol}/{}", port.port)
}

fn checks(health: &Health) -> String {
    let Health::Check(Check { ask, via, timing }) = health else {
        return "none".to_owned();
    };
    let Timing { interval, jitter_percent, timeout, rise, fall } = timing;
    let mut words = Vec::new();
    match ask {
        Ask::Tcp => words.push("tcp".to_owned()),
        Ask::Http(Http { path, expect, host, tls }) => {
            words.push(if tls.is_some() { "https" } else { "http" }.to_owned());
            words.push(path.clone());
            words.push(format!("expects {}", listed(expect)));
            words.extend(host.iter().map(|host| format!("host {host}")));
            if let Some(Tls::Verified(_)) = tls {
                words.push("verified".to_owned());
            }
        }
    }
    if *via == Via::Vip {
        words.push("via the VIP".to_owned());
    }
    words.push(format!("every {} + {jitter_percent}%", duration(*interval)));
    words.push(format!("timeout {}", duration(*timeout)));
    words.push(format!("rise {rise}, fall {fall}"));
    words.join(", ")
}

fn listed<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

fn duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}
