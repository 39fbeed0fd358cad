//! Verdicts on interfaces: links, drivers, sizes and offloads.

use std::collections::BTreeSet;

use super::{
    Check, Name, Verdict,
    facts::{Device, Facts},
    read,
};
use crate::{
    config::{
        Config,
        model::{Forward, XdpMode},
    },
    datapath,
    resolve::{Seen, Survey},
};

/// `XDP_PACKET_HEADROOM`, `sizeof(struct skb_shared_info)` and an Ethernet header: what a
/// page that holds a frame for a program has no room for beside them.
const BESIDE_A_PACKET: u32 = 256 + 320 + 14;

const NETLINK: &str = "netlink (ip link)";

pub(super) fn checks(config: &Config, facts: &Facts) -> Vec<Check> {
    let survey = match read(&facts.network, Name::Link, NETLINK) {
        Err(check) => return vec![*check],
        Ok(survey) => survey,
    };
    let mut checks = Vec::new();
    for name in &config.agent.interfaces {
        let Some(seen) = survey.links.iter().find(|link| link.name == *name) else {
            checks.push(missing(name, survey));
            continue;
        };
        let interface = Interface { seen, survey, config, facts };
        let device = facts.devices.get(name);
        checks.extend(interface.checks(device).into_iter().map(|check| check.about(name)));
    }
    checks.extend(towards_backends(config, facts, survey));
    checks
}

fn missing(name: &str, survey: &Survey) -> Check {
    let nearest = survey
        .links
        .iter()
        .map(|link| (strsim::jaro_winkler(&link.name, name), &link.name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.8);
    let remedy = match nearest {
        Some((_, nearest)) => format!("did you mean `{nearest}`? set `agent.interfaces`"),
        None => {
            "set `agent.interfaces` to what `ip link` shows; one that comes later is attached then"
                .to_owned()
        }
    };
    Check::failed(Name::Link, "it does not exist", NETLINK).about(name).remedy(remedy)
}

struct Interface<'f> {
    seen: &'f Seen,
    survey: &'f Survey,
    config: &'f Config,
    facts: &'f Facts,
}

impl Interface<'_> {
    fn checks(&self, device: Option<&Device>) -> Vec<Check> {
        let mut checks = vec![self.link(), self.program()];
        let Some(device) = device else { return checks };
        checks.extend([
            self.mode(device),
            self.queues(device),
            self.mtu(device),
            self.lro(device),
            self.gro(device),
            self.tx_checksum(),
            self.vlan(device),
        ]);
        checks
    }

    fn name(&self) -> &str {
        &self.seen.name
    }

    fn link(&self) -> Check {
        let name = self.name();
        if !self.seen.ethernet {
            return Check::failed(Name::Link, "it does not carry Ethernet", NETLINK).remedy(
                "set `agent.interfaces` to the Ethernet interfaces that packets come in on",
            );
        }
        match (self.seen.up, self.seen.running) {
            (true, true) => Check::ok(Name::Link, "up, with a carrier", NETLINK),
            (false, _) => Check::warning(Name::Link, "it is down", NETLINK)
                .remedy(format!("ip link set {name} up")),
            (true, false) => Check::warning(Name::Link, "it is up and has no carrier", NETLINK)
                .remedy("look at the cable, the other end, or the bond below it"),
        }
    }

    /// The program on it that is the agent's own, as native or not.
    fn own(&self) -> Option<bool> {
        let (id, native) = self.seen.program?;
        self.is_own(id).then_some(native)
    }

    fn is_own(&self, id: u32) -> bool {
        let running = self.facts.agent.iter().flat_map(|status| &status.interfaces);
        let by_agent = |one: &crate::api::model::InterfaceStatus| {
            one.name == self.seen.name
                && one.ifindex == Some(self.seen.ifindex)
                && one.mode.is_some()
        };
        self.facts.places.pins.program == Some(id) || running.into_iter().any(by_agent)
    }

    fn program(&self) -> Check {
        let name = Name::Program;
        let evidence = "netlink (ip link), bpf(2)";
        let Some((id, _)) = self.seen.program else {
            return Check::ok(name, "no XDP program is on it", evidence);
        };
        let called = self.facts.programs.get(&id).map_or("of unknown name", String::as_str);
        if self.is_own(id) {
            return Check::ok(
                name,
                format!("the agent's own program is on it: {called} (id {id})"),
                evidence,
            );
        }
        let pinned = self.facts.places.pins.links.iter().any(|link| link == self.name());
        if pinned && self.facts.places.pins.program.is_none() {
            let found =
                format!("program {id} is on it, and whose it is can't be told without CAP_BPF");
            return Check::not_checked(name, found, evidence).remedy("sudo canary-agent doctor");
        }
        Check::failed(name, format!("another XDP program is on it: {called} (id {id})"), evidence).remedy(
            format!(
                "canary-agent run --replace takes its place; or take it off: ip link set {0} xdp off (xdp-loader unload {0} --all, if that made it)",
                self.name()
            ),
        )
    }

    /// Bytes of the largest packet that fits into one buffer.
    fn one_buffer(&self) -> u32 {
        self.facts.kernel.page_bytes.saturating_sub(BESIDE_A_PACKET)
    }

    fn mode(&self, device: &Device) -> Check {
        let name = Name::Mode;
        let driver = device.driver.as_deref().unwrap_or("of unknown name");
        let wanted = self.config.agent.xdp_mode;
        if let Some(native) = self.own() {
            let evidence = "netlink (ip link)";
            return match (native, wanted) {
                (true, _) => Check::ok(name, format!("native, in the driver {driver}"), evidence),
                (false, XdpMode::Generic) => Check::ok(name, "generic, as configured", evidence),
                (false, _) => Check::warning(
                    name,
                    format!("generic, in the network stack, which is slower: the driver {driver} did not take it"),
                    evidence,
                )
                .remedy("canary-agent status says why; set `agent.xdp_mode = \"generic\"` if that is as it should be"),
            };
        }
        let evidence = "netdev netlink (xdp-features), SIOCETHTOOL";
        if wanted == XdpMode::Generic {
            return Check::ok(name, "generic is configured; every driver takes it", evidence);
        }
        let features = match read(&device.xdp, name, evidence) {
            Err(check) => return *check,
            Ok(features) => features,
        };
        match (features.native, wanted) {
            (true, _) => Check::ok(name, format!("the driver {driver} runs programs natively"), evidence),
            (false, XdpMode::Native) => Check::failed(
                name,
                format!("the driver {driver} runs no programs, and `agent.xdp_mode` is native"),
                evidence,
            )
            .remedy("set `agent.xdp_mode = \"auto\"`"),
            (false, _) => Check::warning(
                name,
                format!("the driver {driver} runs no programs: generic mode, which is slower"),
                evidence,
            )
            .remedy("use a device whose driver has native XDP, or set `agent.xdp_mode = \"generic\"` to say that this is as it should be"),
        }
    }

    fn queues(&self, device: &Device) -> Check {
        let name = Name::Queues;
        let evidence = "SIOCETHTOOL (ethtool -l)";
        let (now, most) = match read(&device.queues, name, evidence) {
            Err(check) => return *check,
            Ok(queues) => *queues,
        };
        let cpus = self.facts.kernel.cpus;
        let found = format!("{now} receive queues of {most}, for {cpus} CPUs");
        let useful = most.min(cpus);
        if now < useful {
            return Check::warning(name, format!("{found}: only as many CPUs steer"), evidence)
                .remedy(format!("ethtool -L {0} combined {useful} (or rx {useful})", self.name()));
        }
        Check::ok(name, found, evidence)
    }

    fn mtu(&self, device: &Device) -> Check {
        let name = Name::Mtu;
        let evidence = "netlink (ip link)";
        let (mtu, limit) = (self.seen.mtu, self.one_buffer());
        if mtu <= limit {
            return Check::ok(name, format!("{mtu} bytes, which fit into one buffer"), evidence);
        }
        let parts = datapath::takes_parts();
        let driver_parts = device.xdp.as_ref().is_ok_and(|xdp| xdp.several_parts);
        if self.own() == Some(true) || (parts && driver_parts) {
            return Check::ok(name, format!("{mtu} bytes, in several buffers"), evidence);
        }
        let why = match (parts, driver_parts) {
            (false, true) => {
                "the driver would give the program packets in several buffers, and the program takes one (no xdp.frags)"
            }
            (false, false) => {
                "neither the driver nor the program deals with packets in several buffers (xdp.frags)"
            }
            (true, _) => "the driver gives programs no packets in several buffers (xdp.frags)",
        };
        let found = format!("{mtu} bytes are more than the {limit} of one buffer: {why}");
        let lower = format!("ip link set {} mtu {limit}", self.name());
        match self.config.agent.xdp_mode {
            XdpMode::Generic => {
                Check::warning(name, format!("{found}; in generic mode each such packet is copied"), evidence).remedy(lower)
            }
            XdpMode::Auto => Check::warning(name, format!("{found}; the driver refuses native mode"), evidence)
                .remedy(format!("{lower} (on both ends, and with it those of the network)")),
            XdpMode::Native => Check::failed(name, format!("{found}; the driver refuses native mode"), evidence)
                .remedy(format!("{lower} (on both ends, and with it those of the network), or set `agent.xdp_mode = \"auto\"`")),
        }
    }

    /// Whether its program runs, or will run, in the driver.
    fn native(&self, device: &Device) -> bool {
        let takes = device.xdp.as_ref().map_or(true, |xdp| xdp.native);
        self.own().unwrap_or(self.config.agent.xdp_mode != XdpMode::Generic && takes)
    }

    fn lro(&self, device: &Device) -> Check {
        let evidence = "SIOCETHTOOL (ethtool -k: large-receive-offload)";
        match read(&device.lro, Name::Lro, evidence) {
            Err(check) => *check,
            Ok(false) => Check::ok(Name::Lro, "off", evidence),
            Ok(true) => Check::warning(
                Name::Lro,
                "on: the device merges packets, and merged ones are too large to forward",
                evidence,
            )
            .remedy(format!("ethtool -K {} lro off", self.name())),
        }
    }

    fn gro(&self, device: &Device) -> Check {
        let evidence = "SIOCETHTOOL (ethtool -k: generic-receive-offload)";
        match (read(&device.gro, Name::Gro, evidence), self.native(device)) {
            (Err(check), _) => *check,
            (Ok(false), _) => Check::ok(Name::Gro, "off", evidence),
            (Ok(true), true) => {
                Check::ok(Name::Gro, "on: in native mode the program comes before it", evidence)
            }
            (Ok(true), false) => Check::warning(
                Name::Gro,
                "on: in generic mode the program gets merged packets, which are too large to forward",
                evidence,
            )
            .remedy(format!("ethtool -K {} gro off", self.name())),
        }
    }

    fn tx_checksum(&self) -> Check {
        let name = Name::TxChecksum;
        let evidence = "netlink (ip link), SIOCETHTOOL (ethtool -k: tx-checksumming)";
        if self.seen.kind.as_deref() != Some("veth") {
            return Check::ok(name, "its packets come over a wire, with checksums", evidence);
        }
        if self.seen.lower_elsewhere {
            let found = "its peer is in another network namespace: whether that leaves checksums out can't be seen from here";
            return Check::not_checked(name, found, evidence)
                .remedy("in the peer's namespace: ethtool -K PEER tx off");
        }
        let peer = self.survey.links.iter().find(|link| Some(link.ifindex) == self.seen.lower);
        let Some((peer, device)) =
            peer.and_then(|peer| Some((peer, self.facts.devices.get(&peer.name)?)))
        else {
            return Check::not_checked(name, "its peer can't be seen", evidence)
                .remedy("in the peer's namespace: ethtool -K PEER tx off");
        };
        match read(&device.tx_checksum, name, evidence) {
            Err(check) => *check,
            Ok(false) => {
                Check::ok(name, format!("its peer {} sends checksums", peer.name), evidence)
            }
            Ok(true) => Check::warning(
                name,
                format!(
                    "its peer {} leaves checksums out, and steered packets go on without",
                    peer.name
                ),
                evidence,
            )
            .remedy(format!("ethtool -K {} tx off", peer.name)),
        }
    }

    fn vlan(&self, device: &Device) -> Check {
        let name = Name::Vlan;
        let evidence = "SIOCETHTOOL (ethtool -k: rx-vlan-offload), netlink (ip link)";
        let tagged: Vec<&str> = self
            .survey
            .links
            .iter()
            .filter(|link| {
                link.kind.as_deref() == Some("vlan") && link.lower == Some(self.seen.ifindex)
            })
            .map(|link| link.name.as_str())
            .collect();
        match read(&device.rx_vlan, name, evidence) {
            Err(check) => *check,
            Ok(false) => Check::ok(name, "off: the program sees VLAN tags", evidence),
            Ok(true) if tagged.is_empty() => {
                Check::ok(name, "on, and no VLAN is used on it", evidence)
            }
            Ok(true) => Check::warning(
                name,
                format!(
                    "on: the device hides VLAN tags from the program, and {} is on it",
                    tagged.join(", ")
                ),
                evidence,
            )
            .remedy(format!("ethtool -K {} rxvlan off", self.name())),
        }
    }
}

/// Interfaces by which packets leave towards backends.
fn towards_backends(config: &Config, facts: &Facts, survey: &Survey) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut all = BTreeSet::new();
    let mut translated = BTreeSet::new();
    for service in &config.services {
        for backend in service.versions.iter().flat_map(|version| &version.backends) {
            let Some(way) = survey.ways.get(&backend.addr.ip()) else { continue };
            all.insert(way.ifindex);
            if service.forward == Forward::Nat {
                translated.insert(way.ifindex);
            }
        }
    }
    let named = |ifindex: &u32| survey.links.iter().find(|link| link.ifindex == *ifindex);
    let configured = |link: &Seen| config.agent.interfaces.contains(&link.name);
    let left_out: Vec<&str> = translated
        .iter()
        .filter_map(named)
        .filter(|link| !configured(link))
        .map(|link| link.name.as_str())
        .collect();
    let evidence = "netlink (ip route get)";
    if !translated.is_empty() {
        checks.push(match left_out.as_slice() {
            [] => Check::ok(Name::NatInterfaces, "every interface towards backends of `nat` is configured", evidence),
            left_out => {
                let mut names = config.agent.interfaces.clone();
                names.extend(left_out.iter().map(ToString::to_string));
                Check::failed(
                    Name::NatInterfaces,
                    format!("{} leads to backends of `nat` and has no program: their answers are not translated back", left_out.join(", ")),
                    evidence,
                )
                .remedy(format!("set `agent.interfaces = {names:?}`"))
            }
        });
    }
    let one_arm = config.agent.interfaces.len() == 1;
    for link in all.iter().filter_map(named) {
        // Packets that go back out by the interface that they came in on are not redirected.
        if one_arm && configured(link) {
            continue;
        }
        let Some(device) = facts.devices.get(&link.name) else { continue };
        checks.push(redirect(link, device).about(link.name.clone()));
    }
    checks
}

fn redirect(link: &Seen, device: &Device) -> Check {
    let name = Name::Redirect;
    let evidence = "netdev netlink (xdp-features)";
    match read(&device.xdp, name, evidence) {
        Err(check) => *check,
        Ok(xdp) if xdp.redirect_target => {
            Check::ok(name, "it takes packets that other interfaces hand it", evidence)
        }
        Ok(_) if link.kind.as_deref() == Some("veth") => Check::warning(
            name,
            "it takes no packets that other interfaces hand it: no XDP program is on its peer",
            evidence,
        )
        .remedy("put any XDP program that passes on the peer (or turn its generic receive offload on: ethtool -K PEER gro on)"),
        Ok(xdp) if xdp.native => Check::new(
            name,
            Verdict::Ok,
            "it takes packets that other interfaces hand it once a program is on it",
            evidence,
        ),
        Ok(_) => Check::warning(
            name,
            "its driver takes no packets that other interfaces hand it in native mode: they are dropped",
            evidence,
        )
        .remedy("set `agent.xdp_mode = \"generic\"`, or use a device whose driver has ndo_xdp_xmit"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{facts::Xdp, sample};

    /// The verdict of one check of `eth0` after a change to the sample.
    fn eth0(name: Name, change: impl FnOnce(&mut Config, &mut Facts)) -> Verdict {
        about("eth0", name, change)
    }

    fn about(interface: &str, name: Name, change: impl FnOnce(&mut Config, &mut Facts)) -> Verdict {
        let (mut config, mut facts) = (sample::config(), sample::facts());
        change(&mut config, &mut facts);
        let checks = checks(&config, &facts);
        let check = checks
            .iter()
            .find(|one| one.name == name && one.about.as_deref().is_none_or(|a| a == interface))
            .unwrap_or_else(|| panic!("{name:?} of {interface} is not among {checks:#?}"));
        let bad = matches!(check.verdict, Verdict::Warning | Verdict::Failed);
        assert!(!bad || check.remedy.is_some(), "{check:?}");
        check.verdict
    }

    fn link<'f>(facts: &'f mut Facts, name: &str) -> &'f mut Seen {
        let survey = facts.network.as_mut().expect("a survey");
        survey.links.iter_mut().find(|link| link.name == name).expect("the link")
    }

    fn device<'f>(facts: &'f mut Facts, name: &str) -> &'f mut Device {
        facts.devices.get_mut(name).expect("the device")
    }

    const NO_XDP: Xdp = Xdp { native: false, redirect_target: false, several_parts: false };

    #[test]
    fn good_interfaces_are_good() {
        let (config, facts) = (sample::config(), sample::facts());
        for check in checks(&config, &facts) {
            assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
        }
    }

    #[test]
    fn links() {
        use Verdict::{Failed, NotChecked, Ok as Good, Warning};
        assert_eq!(eth0(Name::Link, |_, _| {}), Good);
        assert_eq!(eth0(Name::Link, |_, f| link(f, "eth0").running = false), Warning);
        assert_eq!(eth0(Name::Link, |_, f| link(f, "eth0").up = false), Warning);
        assert_eq!(eth0(Name::Link, |_, f| link(f, "eth0").ethernet = false), Failed);
        assert_eq!(eth0(Name::Link, |_, f| f.network = Err("no".to_owned())), NotChecked);
        assert_eq!(about("eht0", Name::Link, |c, _| c.agent.interfaces[0] = "eht0".into()), Failed);
    }

    #[test]
    fn programs_of_others_are_told_from_ones_own() {
        let with = |id: u32, pinned: Option<u32>, links: &[&str]| {
            eth0(Name::Program, |_, f| {
                link(f, "eth0").program = Some((id, true));
                f.places.pins.program = pinned;
                f.places.pins.links = links.iter().map(ToString::to_string).collect();
            })
        };
        assert_eq!(with(7, Some(7), &["eth0"]), Verdict::Ok);
        assert_eq!(with(7, None, &[]), Verdict::Failed);
        assert_eq!(with(7, Some(8), &["eth0"]), Verdict::Failed);
        assert_eq!(with(7, None, &["eth0"]), Verdict::NotChecked);
        let running = eth0(Name::Program, |_, f| {
            link(f, "eth0").program = Some((7, true));
            f.agent = Some(sample::status());
        });
        assert_eq!(running, Verdict::Ok);
    }

    #[test]
    fn modes() {
        let with = |mode: XdpMode, native: bool| {
            eth0(Name::Mode, |c, f| {
                c.agent.xdp_mode = mode;
                device(f, "eth0").xdp = Ok(Xdp { native, ..NO_XDP });
            })
        };
        assert_eq!(with(XdpMode::Auto, true), Verdict::Ok);
        assert_eq!(with(XdpMode::Auto, false), Verdict::Warning);
        assert_eq!(with(XdpMode::Native, false), Verdict::Failed);
        assert_eq!(with(XdpMode::Generic, false), Verdict::Ok);
        let unknown = eth0(Name::Mode, |_, f| device(f, "eth0").xdp = Err("Linux 6.3".to_owned()));
        assert_eq!(unknown, Verdict::NotChecked);
        let attached = |mode, native| {
            eth0(Name::Mode, |c, f| {
                c.agent.xdp_mode = mode;
                link(f, "eth0").program = Some((7, native));
                f.places.pins.program = Some(7);
            })
        };
        assert_eq!(attached(XdpMode::Auto, true), Verdict::Ok);
        assert_eq!(attached(XdpMode::Auto, false), Verdict::Warning);
        assert_eq!(attached(XdpMode::Generic, false), Verdict::Ok);
    }

    #[test]
    fn queues_and_offloads() {
        let queues =
            |now, most| eth0(Name::Queues, |_, f| device(f, "eth0").queues = Ok((now, most)));
        assert_eq!(queues(1, 1), Verdict::Ok);
        assert_eq!(queues(1, 8), Verdict::Warning);
        assert_eq!(queues(4, 8), Verdict::Ok);
        assert_eq!(eth0(Name::Lro, |_, f| device(f, "eth0").lro = Ok(true)), Verdict::Warning);
        let gro = |mode| {
            eth0(Name::Gro, |c, f| {
                c.agent.xdp_mode = mode;
                device(f, "eth0").gro = Ok(true);
            })
        };
        assert_eq!(gro(XdpMode::Auto), Verdict::Ok);
        assert_eq!(gro(XdpMode::Generic), Verdict::Warning);
        let unsupported = eth0(Name::Gro, |_, f| {
            device(f, "eth0").gro = Ok(true);
            device(f, "eth0").xdp = Ok(NO_XDP);
        });
        assert_eq!(unsupported, Verdict::Warning, "generic is what it will be");
        let unread = eth0(Name::Lro, |_, f| device(f, "eth0").lro = Err("no".to_owned()));
        assert_eq!(unread, Verdict::NotChecked);
    }

    #[test]
    fn jumbo_frames() {
        let with = |mtu, mode, parts| {
            eth0(Name::Mtu, |c, f| {
                c.agent.xdp_mode = mode;
                link(f, "eth0").mtu = mtu;
                device(f, "eth0").xdp = Ok(Xdp { native: true, several_parts: parts, ..NO_XDP });
            })
        };
        assert_eq!(with(1500, XdpMode::Native, false), Verdict::Ok);
        assert_eq!(with(3506, XdpMode::Native, false), Verdict::Ok);
        assert_eq!(with(3507, XdpMode::Native, false), Verdict::Failed);
        assert_eq!(with(9000, XdpMode::Auto, false), Verdict::Warning);
        assert_eq!(with(9000, XdpMode::Generic, false), Verdict::Warning);
        let both = if datapath::takes_parts() { Verdict::Ok } else { Verdict::Warning };
        assert_eq!(with(9000, XdpMode::Auto, true), both);
    }

    #[test]
    fn checksums_that_a_peer_leaves_out() {
        let veth = |f: &mut Facts, elsewhere: bool| {
            let one = link(f, "eth0");
            one.kind = Some("veth".to_owned());
            (one.lower, one.lower_elsewhere) = (Some(3), elsewhere);
        };
        assert_eq!(eth0(Name::TxChecksum, |_, f| veth(f, true)), Verdict::NotChecked);
        let peer = |leaves_out| {
            eth0(Name::TxChecksum, |_, f| {
                veth(f, false);
                device(f, "eth1").tx_checksum = Ok(leaves_out);
            })
        };
        assert_eq!(peer(true), Verdict::Warning);
        assert_eq!(peer(false), Verdict::Ok);
    }

    #[test]
    fn tags_that_are_hidden() {
        let with = |used: bool, hidden: bool| {
            eth0(Name::Vlan, |_, f| {
                device(f, "eth0").rx_vlan = Ok(hidden);
                if used {
                    let survey = f.network.as_mut().expect("a survey");
                    survey.links.push(Seen {
                        ifindex: 9,
                        name: "eth0.7".to_owned(),
                        kind: Some("vlan".to_owned()),
                        lower: Some(2),
                        ..Seen::default()
                    });
                }
            })
        };
        assert_eq!(with(true, true), Verdict::Warning);
        assert_eq!(with(true, false), Verdict::Ok);
        assert_eq!(with(false, true), Verdict::Ok);
    }

    #[test]
    fn interfaces_towards_backends() {
        let left_out = |forward| {
            let (mut config, facts) = (sample::config(), sample::facts());
            config.agent.interfaces = vec!["eth0".to_owned()];
            config.services[0].forward = forward;
            let checks = checks(&config, &facts);
            checks.into_iter().find(|check| check.name == Name::NatInterfaces)
        };
        let check = left_out(Forward::Nat).expect("looked at");
        assert_eq!(check.verdict, Verdict::Failed);
        assert!(check.found.contains("eth1"), "{check:?}");
        assert_eq!(check.remedy.as_deref(), Some("set `agent.interfaces = [\"eth0\", \"eth1\"]`"));
        assert_eq!(left_out(Forward::Dsr), None);
        let target = |veth: bool, xdp| {
            about("eth1", Name::Redirect, |_, f| {
                device(f, "eth1").xdp = Ok(xdp);
                link(f, "eth1").kind = veth.then(|| "veth".to_owned());
            })
        };
        assert_eq!(target(false, NO_XDP), Verdict::Warning);
        assert_eq!(target(false, Xdp { native: true, ..NO_XDP }), Verdict::Ok);
        assert_eq!(target(true, Xdp { native: true, ..NO_XDP }), Verdict::Warning);
        assert_eq!(target(true, Xdp { redirect_target: true, ..NO_XDP }), Verdict::Ok);
    }
}
