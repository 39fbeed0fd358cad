//! The unwrapping program: what it makes of frames (`decap.toml`).

use std::{fs, net::IpAddr, path::Path};

use canary_agent::{
    config::model::XdpMode,
    datapath::{self, Decap, DecapOptions},
};
use canary_ebpf_common::decap::Outcome;
use canary_tests::{
    bpf, host,
    loaded::{XDP_DROP, XDP_PASS},
    names::Host,
    notation,
    workdir::Workdir,
};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    case: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    /// The section that it is from; for the reader.
    #[serde(rename = "rfc")]
    _rfc: Option<String>,
    #[serde(rename = "in")]
    input: String,
    out: Option<String>,
    #[serde(default)]
    action: Action,
    counts: Option<String>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    #[default]
    Pass,
    Drop,
}

fn options(pins: &Path) -> DecapOptions {
    let mut addresses: Vec<IpAddr> = vec!["10.9.0.1".parse().unwrap()];
    addresses.extend([Host::Backend(1).v4().into(), IpAddr::V6(Host::Backend(1).v6())]);
    let senders = ["10.7.0.0/16", "fd00:7::/32", "10.2.0.1/32", "fd00:2::1/128"];
    DecapOptions {
        pins: pins.to_owned(),
        addresses,
        senders: senders.iter().map(|network| network.parse().unwrap()).collect(),
        gue_port: 6080,
        xdp_mode: XdpMode::Auto,
        replace: false,
    }
}

fn counted(pins: &Path) -> Vec<u64> {
    let found = datapath::unwrapped(pins).unwrap();
    Outcome::ALL.iter().map(|outcome| found.count(*outcome)).collect()
}

#[test]
fn frames_become_what_the_cases_say() {
    if !host::ready("frames_become_what_the_cases_say") {
        return;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("decap.toml");
    let Cases { case: cases } = toml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let workdir = Workdir::new("decap");
    let pins = workdir.bpffs().join("decap");
    let mut decap = Decap::open(options(&pins)).unwrap();
    let mut reached = vec![0; Outcome::ALL.len()];
    let mut wrong = Vec::new();
    for Case { name, input, out, action, counts, _rfc } in &cases {
        let frame = notation::parse(input).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let out = out.as_ref().unwrap_or(input);
        let expected = notation::parse(out).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let before = counted(&pins);
        let mut room = vec![0; 2048];
        let run = bpf::run(decap.program().unwrap(), &frame, None, &mut room).unwrap();
        room.truncate(run.len_bytes);
        let action = match action {
            Action::Pass => XDP_PASS,
            Action::Drop => XDP_DROP,
        };
        if run.action != action || (action == XDP_PASS && room != expected) {
            wrong.push(format!(
                "{name}: action {}\n{}",
                run.action,
                notation::hex_difference(&expected, &room)
            ));
        }
        let seen: Vec<&str> = Outcome::ALL
            .iter()
            .zip(counted(&pins).iter().zip(&before))
            .flat_map(|(outcome, (after, before))| {
                std::iter::repeat_n(outcome.name(), (after - before) as usize)
            })
            .collect();
        let expected: Vec<&str> = counts.iter().map(String::as_str).collect();
        if seen != expected {
            wrong.push(format!("{name}: counted {seen:?}, not {expected:?}"));
        }
        for (count, outcome) in reached.iter_mut().zip(Outcome::ALL) {
            *count += u64::from(seen.contains(&outcome.name()));
        }
    }
    println!("decap: {} cases", cases.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (count, outcome) in reached.iter().zip(Outcome::ALL) {
        // Nothing makes the kernel refuse to shorten a frame by headers that are in it.
        let reachable = *outcome != Outcome::DropRefused;
        assert!(*count > 0 || !reachable, "no case is counted as {}", outcome.name());
    }
}

#[test]
fn nobody_is_refused_where_no_senders_are_named() {
    if !host::ready("nobody_is_refused_where_no_senders_are_named") {
        return;
    }
    let workdir = Workdir::new("decap-open");
    let pins = workdir.bpffs().join("decap");
    let mut decap =
        Decap::open(DecapOptions { senders: Vec::new(), gue_port: 5555, ..options(&pins) })
            .unwrap();
    for (text, outcome) in [
        ("eth us > b1 / ip 192.0.2.1 > b1 / ip client > vip / tcp 1 > 2 S", Outcome::Ipip),
        (
            "eth us > b1 / ip 192.0.2.1 > b1 / udp 9 > 5555 csum=0 / ip client > vip / tcp 1 > 2 S",
            Outcome::Gue,
        ),
    ] {
        let frame = notation::parse(text).unwrap();
        let mut room = vec![0; 2048];
        bpf::run(decap.program().unwrap(), &frame, None, &mut room).unwrap();
        assert_eq!(datapath::unwrapped(&pins).unwrap().count(outcome), 1, "{text}");
    }
}
