//! Verdicts on where the agent keeps things, and on other agents.

use std::collections::BTreeSet;

use super::{
    Check, Name,
    facts::{Facts, Folder},
    read,
};
use crate::{
    config::Config,
    datapath::{Adoptable, PlaceSeen},
};

/// Bytes below which a disk is taken for nearly full: the audit trail at its longest.
const ROOM_BYTES: u64 = 64 << 20;
/// File systems on which SQLite's write-ahead log can't be relied on: other hosts share
/// them, and its index is shared memory (linux/magic.h: NFS, CIFS, SMB2, 9P, FUSE, CEPH, OCFS2).
const SHARED: [u64; 7] =
    [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x6573_5546, 0x00c3_6400, 0x7461_636f];
/// Those that are empty after the next boot: tmpfs, ramfs.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

pub(super) fn checks(config: &Config, facts: &Facts) -> Vec<Check> {
    vec![
        bpffs(&facts.places.bpffs, facts.agent.is_some()),
        pins(facts),
        agent(facts),
        state_dir(&facts.places.state, facts.agent.is_some()),
        socket(config, facts),
        listen(config, facts),
    ]
}

fn bpffs(place: &PlaceSeen, running: bool) -> Check {
    let PlaceSeen { path, existing, on_bpffs, usual, writable } = place;
    let name = Name::Bpffs;
    let evidence = format!("statfs(2), access(2) of {}", path.display());
    if existing.is_none() {
        let found = format!("no part of {} is a directory", path.display());
        return Check::failed(name, found, evidence)
            .remedy("set `agent.bpffs` to a directory on a BPF file system");
    }
    match (on_bpffs, usual, writable) {
        (true, _, Ok(())) => Check::ok(name, format!("{} can hold pins", path.display()), evidence),
        // The agent is another user's, and works.
        (true, _, Err(_)) if running => {
            Check::ok(name, format!("the agent uses {}", path.display()), evidence)
        }
        (true, _, Err(why)) => Check::failed(name, format!("this process can't write: {why}"), evidence)
            .remedy(format!("run it as root, or make {} the agent's own", path.display())),
        (false, true, _) => Check::warning(
            name,
            "there is no BPF file system; a start mounts it, which needs CAP_SYS_ADMIN",
            evidence,
        )
        .remedy("mount -t bpf bpf /sys/fs/bpf"),
        (false, false, _) => {
            Check::failed(name, format!("{} is on no BPF file system", path.display()), evidence)
                .remedy("set `agent.bpffs` to a directory below /sys/fs/bpf, or mount one there: mount -t bpf bpf DIRECTORY")
        }
    }
}

fn pins(facts: &Facts) -> Check {
    let pins = &facts.places.pins;
    let name = Name::Pins;
    let evidence = format!("the pins under {}", facts.places.bpffs.path.display());
    if let Some(path) = &pins.open_to_others {
        let found = format!("{} can be written to by others than its owner", path.display());
        return Check::warning(name, found, evidence)
            .remedy(format!("chmod -R go-w {}", facts.places.bpffs.path.display()));
    }
    if !pins.panics.is_empty() {
        let services: BTreeSet<String> = pins
            .panics
            .iter()
            .map(|mark| {
                let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(mark.unix_ms);
                let at = humantime::format_rfc3339_seconds(at);
                format!("{} by uid {} at {at}", mark.service, mark.uid)
            })
            .collect();
        let services = services.into_iter().collect::<Vec<_>>().join(", ");
        let found = format!(
            "a panic has sent services to control, or a rollout has given its share back, and no agent has put that into the audit trail yet: {services}"
        );
        return Check::warning(name, found, evidence).remedy(if facts.agent.is_some() {
            "canary-agent status: its alerts say what keeps it from being stored"
        } else {
            "systemctl start canary-agent: it adopts that, and keeps it so"
        });
    }
    match &pins.adoptable {
        Adoptable::Yes if pins.maps == 0 => Check::ok(name, "nothing is pinned", evidence),
        Adoptable::Yes => {
            let on = match pins.links.as_slice() {
                [] => "on no interface".to_owned(),
                links => format!("on {}", links.join(", ")),
            };
            let abi = canary_ebpf_common::abi::ABI_VERSION;
            let found = format!(
                "{} maps of layout {abi}, this build's, and the program {on}: a start takes them over",
                pins.maps
            );
            Check::ok(name, found, evidence)
        }
        Adoptable::Unknown(why) => {
            Check::not_checked(name, why.clone(), evidence).remedy("sudo canary-agent doctor")
        }
        Adoptable::CarriedOver => Check::ok(
            name,
            "maps of other sizes or of an older layout: a start carries them over, under traffic",
            evidence,
        ),
        Adoptable::Replaced(why) => Check::warning(
            name,
            format!(
                "{why}: a start makes new maps from the stored state, and connections that have an entry in a flow \
                 table are not kept"
            ),
            evidence,
        )
        .remedy("start the release that made them, if it is still there, and let those connections end first"),
        Adoptable::No(why, help) => {
            let help = help.as_deref().unwrap_or("canary-agent detach (steering stops until the next start)");
            Check::failed(name, why.clone(), evidence).remedy(help)
        }
    }
}

fn agent(facts: &Facts) -> Check {
    let name = Name::Agent;
    if let Some(status) = &facts.agent {
        let running = &status.agent;
        let own = env!("CARGO_PKG_VERSION");
        let abi = canary_ebpf_common::abi::ABI_VERSION;
        let found = format!(
            "an agent runs: pid {}, version {}, layout {}",
            running.pid, running.version, running.abi_version
        );
        let evidence = "/v1/status on the control socket";
        if running.version != own || running.abi_version != abi {
            return Check::warning(name, format!("{found}; this is {own}, layout {abi}"), evidence)
                .remedy("systemctl restart canary-agent");
        }
        let alerts = &status.alerts;
        if alerts.is_empty() {
            return Check::ok(name, found, evidence);
        }
        return Check::warning(
            name,
            format!("{found}; its alerts: {}", alerts.join("; ")),
            evidence,
        )
        .remedy("canary-agent status");
    }
    if let Some(why) = &facts.silent {
        let found = format!("somebody listens on the control socket and can't be asked: {why}");
        return Check::not_checked(name, found, "the control socket")
            .remedy("run this as root or as a member of the socket's group");
    }
    match &facts.holder {
        Some((key, who)) => Check::failed(
            name,
            format!(
                "another agent (pid {who}) holds `agent.{key}`, and does not answer on this socket"
            ),
            "flock(2), /proc/locks",
        )
        .remedy(format!(
            "stop it, or give this one an `agent.{key}` and an `agent.socket` of its own"
        )),
        None => {
            Check::ok(name, "no agent runs with this configuration", "the control socket, flock(2)")
        }
    }
}

fn state_dir(folder: &Folder, running: bool) -> Check {
    let Folder { path, existing, writable, free_bytes, file_system, open_to_others } = folder;
    let name = Name::StateDir;
    let evidence = format!("access(2), statfs(2) of {}", existing.display());
    let shown = path.display();
    if let Some(open) = open_to_others {
        return Check::warning(name, format!("{open} can be written to by others than its owner: they could change splits at the next start"), evidence)
            .remedy(format!("chmod -R go-w {shown}"));
    }
    match writable {
        Err(why) if !running => {
            return Check::failed(name, format!("{shown} can't be written to: no change could be kept ({why})"), evidence)
                .remedy(format!("make {shown} the agent's own on a file system that is not read-only, or set `agent.state_dir`"));
        }
        _ => {}
    }
    if SHARED.contains(file_system) {
        return Check::warning(
            name,
            format!("{shown} is on a file system that other hosts share, where SQLite's journal can be lost"),
            evidence,
        )
        .remedy("set `agent.state_dir` to a directory on a local disk");
    }
    if IN_MEMORY.contains(file_system) {
        return Check::warning(
            name,
            format!("{shown} is in memory: splits and the audit trail are gone after a boot"),
            evidence,
        )
        .remedy("set `agent.state_dir` to a directory on a local disk");
    }
    match read(free_bytes, name, &evidence) {
        Err(check) => *check,
        Ok(0) => Check::failed(name, format!("{shown} is full: no change could be kept"), evidence)
            .remedy(format!("free some of what df {shown} shows")),
        Ok(free) if *free < ROOM_BYTES => {
            Check::warning(name, format!("{shown} has {} KiB left", free >> 10), evidence)
                .remedy(format!("free some of what df {shown} shows"))
        }
        Ok(free) => Check::ok(name, format!("{shown} has {} MiB left", free >> 20), evidence),
    }
}

fn socket(config: &Config, facts: &Facts) -> Check {
    let name = Name::Socket;
    let path = config.agent.socket.display();
    let places = &facts.places;
    let evidence = format!("stat(2) of {path}");
    if places.socket_blocked {
        return Check::failed(name, format!("{path} exists and is no socket"), evidence)
            .remedy(format!("rm {path}, or set `agent.socket`"));
    }
    if let Some(open) = &places.socket.open_to_others {
        return Check::warning(
            name,
            format!("{open} can be written to by others than its owner: they could put a socket of theirs in its place"),
            evidence,
        )
        .remedy(format!("chmod go-w {open}"));
    }
    let running = facts.agent.is_some() || facts.silent.is_some();
    if let (Err(why), false) = (&places.socket.writable, running) {
        return Check::failed(name, format!("{path} can't be made: {why}"), evidence)
            .remedy("run it as root, or by the unit in packaging/ (`RuntimeDirectory=`), or set `agent.socket`");
    }
    match &places.socket_file {
        Some((group, mode)) if running => Check::ok(
            name,
            format!(
                "{path}: group {group}, mode {mode:04o}; whoever may open it may read, and `agent.operators` may change things"
            ),
            evidence,
        ),
        _ => Check::ok(
            name,
            format!("{path} can be made; its group will be that of the agent"),
            evidence,
        ),
    }
}

fn listen(config: &Config, facts: &Facts) -> Check {
    let name = Name::Listen;
    let Some(address) = config.agent.listen else {
        return Check::ok(name, "no listener is wanted", "agent.listen");
    };
    let evidence = format!("bind(2) of {address}");
    let complaint = |status: &&crate::api::model::Status| {
        status.alerts.iter().find(|alert| alert.starts_with("`agent.listen`")).cloned()
    };
    if let Some(alert) = facts.agent.as_ref().as_ref().and_then(complaint) {
        return Check::failed(name, alert, "the agent's alerts").remedy(format!(
            "ss -ltnp 'sport = {}' shows who has it; set `agent.listen` to another, or \"off\"",
            address.port()
        ));
    }
    match &facts.places.listen {
        None if facts.agent.is_some() => {
            Check::ok(name, format!("the agent listens on {address}"), "the agent's alerts")
        }
        None if facts.silent.is_some() => {
            Check::not_checked(name, "the agent that runs has it, or tells why not", evidence)
        }
        None => Check::not_checked(name, "the start tries it itself", evidence),
        Some(Err(why)) => Check::failed(name, format!("{address} can't be had: {why}"), evidence)
            .remedy(format!("ss -ltnp 'sport = {}' shows who has it; set `agent.listen` to another, or \"off\"", address.port())),
        Some(Ok(())) if !address.ip().is_loopback() => Check::warning(
            name,
            format!("{address} is free; whoever can reach it can read status, clients' placement and metrics"),
            evidence,
        )
        .remedy("set `agent.listen = \"127.0.0.1:9109\"`, or let the firewall say who may reach it"),
        Some(Ok(())) => Check::ok(name, format!("{address} is free"), evidence),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, sample};

    fn verdict(check: &Check) -> Verdict {
        let bad = matches!(check.verdict, Verdict::Warning | Verdict::Failed);
        assert!(!bad || check.remedy.is_some(), "a remedy for what is not good: {check:?}");
        check.verdict
    }

    fn with(change: impl FnOnce(&mut Facts)) -> Facts {
        let mut facts = sample::facts();
        change(&mut facts);
        facts
    }

    #[test]
    fn good_places_are_good() {
        for check in checks(&sample::config(), &sample::facts()) {
            assert_eq!(verdict(&check), Verdict::Ok, "{check:?}");
        }
    }

    #[test]
    fn the_place_of_the_pins() {
        let seen = |on_bpffs, usual, writable: bool, running| {
            let mut place = sample::facts().places.bpffs;
            place.writable = writable.then_some(()).ok_or_else(|| "read-only".to_owned());
            (place.on_bpffs, place.usual) = (on_bpffs, usual);
            verdict(&bpffs(&place, running))
        };
        assert_eq!(seen(true, true, true, false), Verdict::Ok);
        assert_eq!(seen(true, true, false, false), Verdict::Failed);
        assert_eq!(seen(true, true, false, true), Verdict::Ok);
        assert_eq!(seen(false, true, true, false), Verdict::Warning);
        assert_eq!(seen(false, false, true, false), Verdict::Failed);
        let nowhere = PlaceSeen { existing: None, ..sample::facts().places.bpffs };
        assert_eq!(verdict(&bpffs(&nowhere, false)), Verdict::Failed);
    }

    #[test]
    fn pins_of_another_layout_fail_and_open_ones_warn() {
        let adoptable = |adoptable: Adoptable| {
            let facts = with(|f| (f.places.pins.maps, f.places.pins.adoptable) = (17, adoptable));
            verdict(&pins(&facts))
        };
        assert_eq!(adoptable(Adoptable::Yes), Verdict::Ok);
        assert_eq!(adoptable(Adoptable::CarriedOver), Verdict::Ok);
        assert_eq!(adoptable(Adoptable::Replaced("layout 1".to_owned())), Verdict::Warning);
        assert_eq!(adoptable(Adoptable::No("layout 9".to_owned(), None)), Verdict::Failed);
        let facts = with(|f| f.places.pins.adoptable = Adoptable::Unknown("EPERM".to_owned()));
        assert_eq!(verdict(&pins(&facts)), Verdict::NotChecked);
        let facts = with(|f| f.places.pins.open_to_others = Some("/sys/fs/bpf/canary".into()));
        assert_eq!(verdict(&pins(&facts)), Verdict::Warning);
        let facts = with(|f| {
            f.places.pins.maps = 17;
            f.places.pins.panics = vec![crate::plan::PanicMark {
                table: 0,
                service: "shop".to_owned(),
                number: 1,
                id: 1,
                unix_ms: 1_700_000_000_000,
                uid: 42,
                moves: false,
                back: None,
                reason: None,
            }];
        });
        assert_eq!(verdict(&pins(&facts)), Verdict::Warning);
        assert!(pins(&facts).found.contains("shop by uid 42 at 2023-11-14"));
        let facts = with(|f| {
            f.places.pins.maps = 17;
            f.places.pins.links = vec!["eth0".to_owned()];
        });
        assert!(pins(&facts).found.contains("on eth0"));
    }

    #[test]
    fn agents_that_run() {
        let facts = with(|f| f.holder = Some(("state_dir", 7)));
        assert_eq!(verdict(&agent(&facts)), Verdict::Failed);
        let facts = with(|f| f.silent = Some("not permitted".to_owned()));
        assert_eq!(verdict(&agent(&facts)), Verdict::NotChecked);
        let facts = with(|f| f.agent = Some(sample::status()));
        assert_eq!(verdict(&agent(&facts)), Verdict::Ok);
        let facts = with(|f| {
            let mut status = sample::status();
            status.alerts.push("the disk is full".to_owned());
            f.agent = Some(status);
        });
        assert_eq!(verdict(&agent(&facts)), Verdict::Warning);
        let facts = with(|f| {
            let mut status = sample::status();
            status.agent.version = "9.9.9".to_owned();
            f.agent = Some(status);
        });
        assert_eq!(verdict(&agent(&facts)), Verdict::Warning);
    }

    #[test]
    fn the_state_directory() {
        let folder = |change: &dyn Fn(&mut Folder)| {
            let mut folder = sample::facts().places.state;
            change(&mut folder);
            folder
        };
        let read_only = folder(&|f| f.writable = Err("read-only".to_owned()));
        assert_eq!(verdict(&state_dir(&read_only, false)), Verdict::Failed);
        assert_eq!(verdict(&state_dir(&read_only, true)), Verdict::Ok, "the agent is another user");
        let rows: [(u64, u64, Verdict); 5] = [
            (0xef53, 1 << 30, Verdict::Ok),
            (0x6969, 1 << 30, Verdict::Warning),
            (0x0102_1994, 1 << 30, Verdict::Warning),
            (0xef53, 1 << 20, Verdict::Warning),
            (0xef53, 0, Verdict::Failed),
        ];
        for (kind, free, expected) in rows {
            let folder = folder(&|f| (f.file_system, f.free_bytes) = (kind, Ok(free)));
            assert_eq!(verdict(&state_dir(&folder, false)), expected, "{kind:x} {free}");
        }
        let open = folder(&|f| f.open_to_others = Some("state.db".to_owned()));
        assert_eq!(verdict(&state_dir(&open, false)), Verdict::Warning);
    }

    #[test]
    fn the_socket() {
        let config = sample::config();
        let facts = with(|f| f.places.socket_blocked = true);
        assert_eq!(verdict(&socket(&config, &facts)), Verdict::Failed);
        let facts = with(|f| f.places.socket.writable = Err("EACCES".to_owned()));
        assert_eq!(verdict(&socket(&config, &facts)), Verdict::Failed);
        let facts = with(|f| f.places.socket.open_to_others = Some("/run/canary".to_owned()));
        assert_eq!(verdict(&socket(&config, &facts)), Verdict::Warning);
        let facts = with(|f| {
            f.agent = Some(sample::status());
            f.places.socket_file = Some(("ops".to_owned(), 0o660));
        });
        assert!(socket(&config, &facts).found.contains("group ops, mode 0660"));
    }

    #[test]
    fn the_listener() {
        let mut config = sample::config();
        let facts = with(|f| f.places.listen = Some(Err("in use".to_owned())));
        assert_eq!(verdict(&listen(&config, &facts)), Verdict::Failed);
        let facts = with(|f| f.places.listen = None);
        assert_eq!(verdict(&listen(&config, &facts)), Verdict::NotChecked);
        let facts = with(|f| {
            let mut status = sample::status();
            status.alerts.push("`agent.listen`: nothing is served".to_owned());
            (f.agent, f.places.listen) = (Some(status), None);
        });
        assert_eq!(verdict(&listen(&config, &facts)), Verdict::Failed);
        config.agent.listen = Some(([0, 0, 0, 0], 9109).into());
        assert_eq!(verdict(&listen(&config, &sample::facts())), Verdict::Warning);
        config.agent.listen = None;
        assert_eq!(verdict(&listen(&config, &sample::facts())), Verdict::Ok);
    }
}
