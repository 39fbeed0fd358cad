//! `decap`: the unwrapping program on a backend.

use std::{net::IpAddr, path::Path};

use canary_ebpf_common::decap::{MAX_ADDRESSES, MAX_SENDERS, Outcome};
use nix::net::if_::if_nametoindex;
use serde_json::json;

use super::{
    args::{Decap, Mode},
    failure::{Failure, exit},
    print,
    text::{Align, Table},
};
use crate::{
    config::model::XdpMode,
    datapath::{self, Attached, AttachedMode, DecapOptions, Unwrapped},
};

/// Attaches the program, takes it off, or says what it has done.
pub(super) fn run(asked: &Decap, json: bool) -> Result<(), Failure> {
    if !nix::unistd::geteuid().is_root() {
        let message = "unwrapping packets needs root";
        return Err(Failure::new("not_permitted", exit::NOT_PERMITTED, message)
            .help("run this command as root"));
    }
    if asked.status {
        let found = datapath::unwrapped(&asked.pins).map_err(failed)?;
        return print(&shown(&asked.pins, &found, json));
    }
    if asked.detach {
        return detach(asked, json);
    }
    attach(asked, json)
}

fn attach(asked: &Decap, json: bool) -> Result<(), Failure> {
    let Decap { interfaces, from, address, gue_port, xdp_mode, replace, dry_run, pins, .. } = asked;
    for interface in interfaces {
        if if_nametoindex(interface.as_str()).is_err() {
            let message = format!("interface {interface} does not exist; nothing was changed");
            return Err(Failure::new("no_interface", exit::FAILED, message)
                .help("`ip link` lists those that there are"));
        }
    }
    let addresses = match address.is_empty() {
        true => addresses_of(interfaces)?,
        false => address.clone(),
    };
    for (what, count, most) in
        [("--address", addresses.len(), MAX_ADDRESSES), ("--from", from.len(), MAX_SENDERS)]
    {
        if count > most as usize {
            let message = format!("{count} of {what}, and there is room for {most}");
            return Err(Failure::new("usage", exit::USAGE, message));
        }
    }
    let mut warnings = Vec::new();
    if from.is_empty() {
        warnings.push(
            "wrapped packets are taken from everybody: name the balancers' addresses with --from"
                .to_owned(),
        );
    }
    let mut attached = Vec::new();
    if !dry_run {
        let before = datapath::attached(pins)?;
        let mut program = datapath::Decap::open(DecapOptions {
            pins: pins.clone(),
            addresses: addresses.clone(),
            senders: from.clone(),
            gue_port: *gue_port,
            xdp_mode: match xdp_mode {
                Mode::Auto => XdpMode::Auto,
                Mode::Native => XdpMode::Native,
                Mode::Generic => XdpMode::Generic,
            },
            replace: *replace,
        })
        .map_err(failed)?;
        for interface in interfaces {
            match program.attach(interface) {
                Ok(done) => attached.push((interface, done)),
                Err(error) => {
                    // All of them or none: an interface that had it before goes on.
                    let fresh = attached.iter().map(|(name, _)| (*name).clone());
                    let fresh: Vec<String> = fresh.filter(|name| !before.contains(name)).collect();
                    datapath::stop_unwrapping(pins, &fresh)?;
                    return Err(failed(error));
                }
            }
        }
        for (interface, Attached { mode, warning, .. }) in &attached {
            warnings.extend(warning.iter().map(|warning| format!("{interface}: {warning}")));
            if *mode == AttachedMode::Generic {
                warnings.push(format!(
                    "{interface}: in generic mode, what the host has merged before is unwrapped as one \
                     packet: `ethtool -K {interface} gro off`"
                ));
            }
        }
    }
    let texts = |all: &[IpAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (at, senders) = (texts(&addresses), from.iter().map(ToString::to_string));
    let senders: Vec<String> = senders.collect();
    if json {
        let mode = |name: &String| {
            let done = attached.iter().find(|(interface, _)| *interface == name);
            done.map(|(_, done)| done.mode.name())
        };
        let listed = interfaces.iter();
        let listed: Vec<_> = listed.map(|name| json!({"name": name, "mode": mode(name)})).collect();
        let report = json!({
            "applied": !dry_run,
            "interfaces": listed,
            "addresses": at,
            "from": senders,
            "gue_port": gue_port,
            "warnings": warnings,
        });
        return print(&format!("{report}\n"));
    }
    let mut text = String::new();
    match dry_run {
        true => text += &format!("packets would be unwrapped on {}\n", interfaces.join(", ")),
        false => {
            for (interface, done) in &attached {
                text += &format!("unwrapping packets on {interface} ({})\n", done.mode.name());
            }
        }
    }
    let senders = match senders.is_empty() {
        true => "everybody".to_owned(),
        false => senders.join(", "),
    };
    text += &format!("  to {}, of ipip and of gue on port {gue_port}\n", at.join(", "));
    text += &format!("  from {senders}\n");
    for warning in &warnings {
        text += &format!("warning: {warning}\n");
    }
    if *dry_run {
        text += "nothing was changed (--dry-run)\n";
    }
    print(&text)
}

fn detach(asked: &Decap, json: bool) -> Result<(), Failure> {
    let Decap { interfaces, dry_run, pins, .. } = asked;
    let present = datapath::attached(pins)?;
    if let Some(missing) = interfaces.iter().find(|name| !present.contains(name)) {
        let message = format!("no packets are unwrapped on {missing}; nothing was changed");
        return Err(Failure::new("not_attached", exit::FAILED, message)
            .help("`canary-agent decap --status` says where they are"));
    }
    let wanted = if interfaces.is_empty() { &present } else { interfaces };
    if !dry_run {
        datapath::stop_unwrapping(pins, wanted)?;
    }
    if json {
        return print(&format!("{}\n", json!({"applied": !dry_run, "interfaces": wanted})));
    }
    let names = wanted.join(", ");
    print(&match (wanted.is_empty(), dry_run) {
        (true, _) => format!("nothing is pinned under {}\n", pins.display()),
        (false, true) => {
            format!("would be taken off: {names}\nnothing was changed (--dry-run)\n")
        }
        (false, false) => format!("taken off: {names}\n"),
    })
}

/// The addresses of interfaces that others reach them by.
fn addresses_of(interfaces: &[String]) -> Result<Vec<IpAddr>, Failure> {
    let all = nix::ifaddrs::getifaddrs().map_err(|error| {
        let message = format!("can't list the host's addresses: {error}");
        Failure::new("failed", exit::FAILED, message)
    })?;
    let mut found: Vec<IpAddr> = all
        .filter(|entry| interfaces.contains(&entry.interface_name))
        .filter_map(|entry| {
            let address = entry.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .filter(|ip| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .collect();
    found.sort();
    found.dedup();
    if found.is_empty() {
        let names = interfaces.join(", ");
        let message = format!("{names}: no address that packets could come to");
        return Err(Failure::new("no_address", exit::FAILED, message)
            .help("name the addresses that the balancer wraps packets for with --address"));
    }
    Ok(found)
}

fn shown(pins: &Path, found: &Unwrapped, json: bool) -> String {
    let Unwrapped { interfaces, .. } = found;
    if json {
        let listed: Vec<_> = interfaces
            .iter()
            .map(|one| json!({"name": one.interface, "mode": one.mode.map(AttachedMode::name)}))
            .collect();
        let packets: serde_json::Map<String, serde_json::Value> =
            Outcome::ALL.iter().map(|o| (o.name().to_owned(), found.count(*o).into())).collect();
        return format!("{}\n", json!({"interfaces": listed, "packets": packets}));
    }
    if interfaces.is_empty() {
        return format!("nothing is pinned under {}\n", pins.display());
    }
    let mut table = Table::new([("INTERFACE", Align::Left), ("MODE", Align::Left)]);
    for one in interfaces {
        let mode = one.mode.map_or("not attached: run `canary-agent decap` again", |m| m.name());
        table.row([one.interface.clone(), mode.to_owned()]);
    }
    let mut counts = Table::new([("PACKETS", Align::Right), ("", Align::Left)]);
    for outcome in Outcome::ALL {
        counts.row([found.count(*outcome).to_string(), outcome.name().to_owned()]);
    }
    format!("{}\n{}", table.render(""), counts.render(""))
}

impl From<datapath::Error> for Failure {
    fn from(error: datapath::Error) -> Self {
        failed(error)
    }
}

fn failed(error: datapath::Error) -> Failure {
    if let datapath::Error::OtherProgram { interface, id, name } = &error {
        let message =
            format!("interface {interface} has another XDP program on it: {name} (id {id})");
        return Failure::new("other_program", exit::FAILED, message)
            .help("`canary-agent decap --replace` takes its place");
    }
    let code = if error.not_permitted() { exit::NOT_PERMITTED } else { exit::FAILED };
    let word = if error.not_permitted() { "not_permitted" } else { "failed" };
    let failure = Failure::new(word, code, error.to_string());
    match &error {
        datapath::Error::Bpffs { denied: false, .. } => failure.help(
            "mount a BPF file system (`mount -t bpf bpf /sys/fs/bpf`), and name a directory in it with \
             --pins",
        ),
        error => match error.help() {
            Some(help) => failure.help(help),
            None => failure,
        },
    }
}
