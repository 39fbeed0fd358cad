//! The kinds of packets that are measured, and the programs and worlds that they meet.

use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, bail, ensure};
use canary_agent::{
    config::{load_str, model::XdpMode},
    datapath::{Decap, DecapOptions},
    plan::Family,
};
use canary_ebpf_common::{
    abi::Sampling,
    signals::{MOST_HALVINGS, mask},
    steer::{TCP_ACK, TCP_SYN},
};
use canary_tests::{
    floor,
    loaded::{BpfFs, Loaded, Outcome, Sizes, XDP_PASS, XDP_TX},
    names::Host,
    notation::parse,
    planned::backend_addr,
    world::{Service, World, addr},
};
use serde::Serialize;

use super::numbered;
use crate::audiences;

/// The floor that other kinds are compared with.
pub(crate) const FLOOR: &str = "floor: MAC swap, look-up";
/// The port of every service.
const PORT: u16 = 80;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Numbers of the services of a way to forward: steady; moved; of which 1 in 64 connections is
/// watched, all are, and as good as none is.
struct Mode {
    name: &'static str,
    steady: u16,
    moved: u16,
    part: u16,
    all: u16,
    none: u16,
}

const NAT: Mode = Mode { name: "nat", steady: 2, moved: 12, part: 6, all: 7, none: 14 };
const MODES: [Mode; 4] = [
    Mode { name: "dsr", steady: 1, moved: 3, part: 4, all: 5, none: 13 },
    NAT,
    Mode { name: "ipip", steady: 8, moved: 10, part: 17, all: 18, none: 15 },
    Mode { name: "gue", steady: 9, moved: 11, part: 19, all: 20, none: 16 },
];

/// The number of a dsr service whose backends are in a VLAN.
const IN_VLAN: u16 = 21;

/// A kind of packet to measure.
pub(crate) struct Kind {
    pub(crate) name: String,
    pub(crate) family: Family,
    /// What is sent, in turn.
    pub(crate) frames: Vec<Vec<u8>>,
    /// What the program answers.
    pub(crate) action: u32,
    pub(crate) program: OwnedFd,
    /// Where the two bytes are that make each run's packet another one, of which there is one then.
    pub(crate) number_at: Option<usize>,
    /// What is sent before each, with the same number.
    pub(crate) before: Option<Vec<u8>>,
    /// It makes flow entries in [`Worlds::fresh`], which are taken away.
    pub(crate) opens: bool,
    /// Its frames differ in what is done with them: one alone stands for nothing.
    pub(crate) mixed: bool,
}

/// The loaded programs.
pub(crate) struct Worlds {
    /// With everything in it.
    loaded: Loaded,
    /// Without signals.
    bare: Loaded,
    /// Whose flows come and go.
    pub(crate) fresh: Loaded,
    /// With routes.
    routed: Option<Loaded>,
    decap: (Decap, BpfFs),
}

/// What the kernel has made of a program.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ProgramSize {
    pub(crate) program: String,
    /// Instructions that the verifier has processed.
    pub(crate) verified_insns: Option<u32>,
    /// Instructions after that.
    pub(crate) xlated_insns: Option<u32>,
    pub(crate) jited_bytes: u32,
}

impl Worlds {
    /// Loads them, with room for `flows` flows, and `fresh` ones that come and go, and with services
    /// of so many buckets. Not all kinds
    /// of packets go with many flows: those with routes come along if there is one.
    pub(crate) fn new(flows: usize, fresh: usize, buckets: u32) -> Result<Self> {
        let measured = world(flows, buckets);
        let plane = measured.plane(|name| bail!("no interface {name}"))?;
        let samples = (flows as u32 * 8).max(1024);
        let sizes = Sizes { samples, ..measured.sizes() };
        let mut loaded = Loaded::new(&plane.plane, &sizes)?;
        watch(&mut loaded, &plane.ids)?;
        let bare = Loaded::new(&plane.plane, &Sizes { samples: 0, ..sizes })?;
        let opened = world(fresh, buckets);
        let fresh_plane = opened.plane(|name| bail!("no interface {name}"))?;
        let fresh = Loaded::new(&fresh_plane.plane, &opened.sizes())?;
        let routed = if flows == 1 { Some(routed(buckets)?) } else { None };
        let bpffs = BpfFs::mount();
        let decap = Decap::open(DecapOptions {
            pins: bpffs.pins(),
            addresses: FAMILIES.map(|family| addr(Host::Backend(1), family)).to_vec(),
            senders: FAMILIES.map(|family| addr(Host::Nat, family).into()).to_vec(),
            gue_port: 6080,
            xdp_mode: XdpMode::Auto,
            replace: false,
        })?;
        Ok(Self { loaded, bare, fresh, routed, decap: (decap, bpffs) })
    }

    /// What has become of each program.
    pub(crate) fn sizes(&mut self) -> Result<Vec<ProgramSize>> {
        let mut infos = self.loaded.datapath.programs()?;
        infos.push(self.decap.0.info()?);
        let sizes = infos.iter().map(|info| ProgramSize {
            program: info.name_as_str().unwrap_or_default().to_owned(),
            verified_insns: info.verified_instruction_count(),
            xlated_insns: info.size_translated().map(|bytes| bytes / 8),
            jited_bytes: info.size_jitted(),
        });
        Ok(sizes.collect())
    }

    /// Every kind of packet in `flows` flows, with the entries that it meets made beforehand; of
    /// many flows, those alone for which it makes a difference.
    pub(crate) fn kinds(&mut self, flows: usize) -> Result<Vec<Kind>> {
        let mut kinds = Kinds { kinds: Vec::new(), flows, few: flows == 1 };
        for family in FAMILIES {
            kinds.floors(family)?;
            kinds.plain(family, &self.loaded)?;
            for mode in &MODES {
                if mode.name == NAT.name {
                    kinds.translated(family, &mut self.loaded, &mut self.bare)?;
                } else {
                    kinds.forwarded(family, mode, &mut self.loaded, &self.bare)?;
                }
                if let Some(routed) = &mut self.routed {
                    kinds.routed(family, mode, routed)?;
                }
                if flows == 1 {
                    kinds.fresh(family, mode, &self.fresh)?;
                }
            }
            if flows == 1 {
                kinds.unwrapped(family, &mut self.decap.0)?;
            }
        }
        let Kinds { mut kinds, .. } = kinds;
        for kind in &mut kinds {
            kind.try_once()?;
        }
        self.forget()?;
        Ok(kinds)
    }

    /// Takes the flows away that have come.
    pub(crate) fn forget(&mut self) -> Result<()> {
        self.fresh.flows_v4.clear()?;
        self.fresh.flows_v6.clear()
    }
}

/// The floors, loaded anew.
pub(crate) fn floors(flows: usize) -> Result<Vec<Kind>> {
    let mut kinds = Kinds { kinds: Vec::new(), flows, few: flows == 1 };
    for family in FAMILIES {
        kinds.floors(family)?;
    }
    Ok(kinds.kinds)
}

impl Kind {
    /// Whether the program answers as it should.
    fn try_once(&mut self) -> Result<()> {
        let mut out = vec![0; 2048];
        for at in 0..self.frames.len() {
            for frame in self.before.as_mut().into_iter().chain([&mut self.frames[at]]) {
                if let Some(at) = self.number_at {
                    numbered(frame, at, 0);
                }
                let run = canary_tests::bpf::run(fd(&self.program), frame, None, &mut out)?;
                ensure!(run.action == self.action, "{}: action {}", self.name, run.action);
            }
        }
        Ok(())
    }
}

fn fd(program: &OwnedFd) -> std::os::fd::BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(program)
}

/// The kinds so far.
struct Kinds {
    kinds: Vec<Kind>,
    flows: usize,
    /// Whether there are so few flows that there is room for every kind.
    few: bool,
}

impl Kinds {
    fn add(&mut self, name: &str, family: Family, program: OwnedFd, frames: Vec<Vec<u8>>) {
        self.kinds.push(Kind {
            name: name.to_owned(),
            family,
            frames,
            action: XDP_TX,
            program,
            number_at: None,
            before: None,
            opens: false,
            mixed: false,
        });
    }

    fn answers(&mut self, action: u32) {
        self.kinds.last_mut().expect("a kind").action = action;
    }

    fn mixed(&mut self) {
        self.kinds.last_mut().expect("a kind").mixed = true;
    }

    fn frames(&self, family: Family, vip: u16, segment: &str) -> Result<Vec<Vec<u8>>> {
        (0..self.flows).map(|i| frame(family, i, Host::Vip(vip), segment)).collect()
    }

    fn floors(&mut self, family: Family) -> Result<()> {
        let frames = self.frames(family, 1, "A seq=1001")?;
        self.add("floor: MAC swap", family, floor::swap()?, frames.clone());
        self.add("floor: MAC swap, outer header", family, floor::wrap(family)?, frames.clone());
        self.add(FLOOR, family, floor::swap_and_look_up(family, &frames)?, frames);
        Ok(())
    }

    fn plain(&mut self, family: Family, loaded: &Loaded) -> Result<()> {
        let frames = (0..self.flows).map(|i| frame(family, i, Host::Us, "A seq=1001"));
        self.add("pass, no service", family, loaded.program()?, frames.collect::<Result<_>>()?);
        self.answers(XDP_PASS);
        if self.few {
            let (ip, icmp) = words(family);
            let text =
                format!("eth client > us / {ip} client > vip / {icmp} rest=0x10001 / \"ping\"");
            self.add("echo request to a VIP", family, loaded.program()?, vec![parse(&text)?]);
        }
        Ok(())
    }

    /// What is sent on as it is, or wrapped.
    fn forwarded(
        &mut self,
        family: Family,
        mode: &Mode,
        loaded: &mut Loaded,
        bare: &Loaded,
    ) -> Result<()> {
        let Mode { name, steady, moved, part, all, none } = *mode;
        let program = || loaded.program();
        let data = self.frames(family, steady, "A seq=1001")?;
        self.add(name, family, program()?, data.clone());
        if name == "dsr" {
            self.add("dsr, no signals", family, bare.program()?, data);
        } else if !self.few {
            return Ok(());
        }
        for vip in [moved, part, all, none] {
            for syn in self.frames(family, vip, "S seq=1000")? {
                sent(loaded, &syn)?;
            }
        }
        let program = || loaded.program();
        let data = self.frames(family, moved, "A seq=1001")?;
        self.add(&format!("{name} tracked, hit"), family, program()?, data);
        // Flows that nobody has opened.
        let strangers = (0..self.flows)
            .map(|i| frame(family, i + 250 * 1000, Host::Vip(moved), "A seq=1001"))
            .collect::<Result<_>>()?;
        self.add(&format!("{name} tracked, miss"), family, program()?, strangers);
        let data = |vip: u16| self.frames(family, vip, "A seq=1001 ack=5001");
        let [part, all, none] = [data(part)?, data(all)?, data(none)?];
        self.add(&format!("{name}, 1 in 64 watched"), family, program()?, part);
        self.mixed();
        self.add(&format!("{name}, watched"), family, program()?, all);
        if !self.few {
            return Ok(());
        }
        self.add(&format!("{name}, not chosen to be watched"), family, program()?, none);
        for (what, tags) in TAGS {
            let tagged = tagged(family, 0, tags, Host::Vip(steady), "A seq=1001")?;
            self.add(&format!("{name}, {what}"), family, program()?, vec![tagged]);
        }
        if name == "dsr" {
            let frame = tagged(family, 0, "vlan 7 / ", Host::Vip(IN_VLAN), "A seq=1001")?;
            self.add("dsr, tagged, backend in a VLAN", family, program()?, vec![frame]);
        }
        let error = vec![icmp_error(family, Host::Vip(steady), 1024)?];
        self.add(&format!("{name}, ICMP too big"), family, program()?, error);
        Ok(())
    }

    fn translated(&mut self, family: Family, loaded: &mut Loaded, bare: &mut Loaded) -> Result<()> {
        let flows = self.flows;
        let both = |kinds: &mut Self, loaded: &mut Loaded, vip: u16, there: &str, back: &str| {
            let opened: Result<Vec<_>> =
                (0..flows).map(|i| open(loaded, family, i, "", Host::Vip(vip))).collect();
            let (forward, answers) = opened?.into_iter().unzip();
            let mixed = there.contains("1 in 64");
            for (name, frames) in [(there, forward), (back, answers)] {
                kinds.add(name, family, loaded.program()?, frames);
                kinds.kinds.last_mut().context("a kind")?.mixed = mixed;
            }
            Ok::<_, anyhow::Error>(())
        };
        both(self, loaded, NAT.steady, "nat, to the backend", "nat, back to the client")?;
        both(self, bare, 2, "nat to backend, no signals", "nat to client, no signals")?;
        both(self, loaded, NAT.part, "nat to backend, 1 in 64", "nat to client, 1 in 64")?;
        both(self, loaded, NAT.all, "nat to backend, watched", "nat to client, watched")?;
        if !self.few {
            return Ok(());
        }
        both(self, loaded, NAT.moved, "nat tracked, to the backend", "nat tracked, to the client")?;
        let names = ["nat to backend, not chosen", "nat to client, not chosen"];
        both(self, loaded, NAT.none, names[0], names[1])?;
        for (nth, (what, tags)) in TAGS.into_iter().enumerate() {
            // Flows of their own: each keeps the tags of its client's last packet.
            let (forward, back) = open(loaded, family, nth + 1, tags, Host::Vip(NAT.steady))?;
            self.add(&format!("nat to backend, {what}"), family, loaded.program()?, vec![forward]);
            self.add(&format!("nat to client, {what}"), family, loaded.program()?, vec![back]);
        }
        let error = vec![icmp_error(family, Host::Vip(NAT.steady), 1024)?];
        self.add("nat, ICMP too big", family, loaded.program()?, error);
        Ok(())
    }

    /// Clients in and beside the networks of an audience.
    fn routed(&mut self, family: Family, mode: &Mode, loaded: &mut Loaded) -> Result<()> {
        // The first client is the audience.
        for (client, place) in [(0, "in an audience"), (1, "beside an audience")] {
            let to = Host::Vip(mode.steady);
            let data = if mode.name == NAT.name {
                open(loaded, family, client, "", to)?.0
            } else {
                frame(family, client, to, "A seq=1001")?
            };
            let name = format!("{}, {place}", mode.name);
            self.add(&name, family, loaded.program()?, vec![data]);
        }
        Ok(())
    }

    /// What leaves something behind: each run another.
    fn fresh(&mut self, family: Family, mode: &Mode, loaded: &Loaded) -> Result<()> {
        let port_at = if family == Family::V4 { 34 } else { 54 };
        let openings = match mode.name {
            "nat" => vec![("nat, new flow", mode.steady), ("nat tracked, new flow", mode.moved)],
            "dsr" => vec![("dsr tracked, SYN insert", mode.moved)],
            "ipip" => vec![("ipip tracked, SYN insert", mode.moved)],
            _ => vec![("gue tracked, SYN insert", mode.moved)],
        };
        for (name, vip) in openings {
            let syn = frame(family, 0, Host::Vip(vip), "S seq=1000")?;
            self.add(name, family, loaded.program()?, vec![syn]);
            let kind = self.kinds.last_mut().context("a kind")?;
            (kind.number_at, kind.opens) = (Some(port_at), true);
        }
        let vip = Host::Vip(mode.steady).name();
        let [first, later] = match family {
            Family::V4 => [
                format!("ip client > {vip} mf / udp 40000 > {PORT} len=108 / zeros 64"),
                format!("ip client > {vip} frag=72 proto=17 mf / zeros 24"),
            ],
            Family::V6 => [
                format!("ip6 client > {vip} / frag mf / udp 40000 > {PORT} len=108 / zeros 64"),
                format!("ip6 client > {vip} / frag mf at=72 next=17 / zeros 24"),
            ],
        };
        let [first, later] = [first, later].map(|ip| parse(&format!("eth client > us / {ip}")));
        let (first, later) = (first?, later?);
        let id_at = if family == Family::V4 { 18 } else { 60 };
        for (what, frame, before) in
            [("first fragment", first.clone(), None), ("later fragment", later, Some(first))]
        {
            let name = format!("{}, {what}", mode.name);
            self.add(&name, family, loaded.program()?, vec![frame]);
            let kind = self.kinds.last_mut().context("a kind")?;
            (kind.number_at, kind.before) = (Some(id_at), before);
        }
        Ok(())
    }

    /// What comes wrapped to a backend.
    fn unwrapped(&mut self, family: Family, decap: &mut Decap) -> Result<()> {
        let (ip, _) = words(family);
        for (name, outer) in [("decap, ipip", ""), ("decap, gue", "udp 50000 > 6080 csum=0 / ")] {
            let text = format!(
                "eth us > b1 / {ip} nat > b1 / {outer}{ip} client > vip / tcp 40000 > {PORT} A"
            );
            let program = decap.program()?.try_clone_to_owned()?;
            self.add(name, family, program, vec![parse(&text)?]);
            self.answers(XDP_PASS);
        }
        Ok(())
    }
}

/// The tags that come with a packet.
const TAGS: [(&str, &str); 2] =
    [("tagged", "vlan 10 / "), ("tagged twice", "svlan 20 / vlan 10 / ")];

/// What a family's headers are called in notation.
fn words(family: Family) -> (&'static str, &'static str) {
    if family == Family::V4 { ("ip", "icmp") } else { ("ip6", "icmp6") }
}

/// The world that is measured: the services of [`MODES`], each at an address of its own.
fn world(flows: usize, buckets: u32) -> World {
    let service = |vip: u16, mode: &str, table: &str| Service {
        vips: vec![Host::Vip(vip).name()],
        mode: mode.to_owned(),
        backends: (0..4).map(|n| first_backend(vip) + n).collect(),
        table: table.to_owned(),
        buckets,
        ..Service::default()
    };
    let mut services = Vec::new();
    for Mode { name, steady, moved, part, all, none } in MODES {
        services.push((steady, service(steady, name, "all")));
        let backend = first_backend(moved);
        let table = format!("b{} was b{backend}", backend + 1);
        services.push((moved, service(moved, name, &table)));
        for vip in [part, all, none] {
            services.push((vip, Service { signals: true, ..service(vip, name, "all") }));
        }
    }
    services.push((IN_VLAN, Service { vlan: "10".to_owned(), ..service(IN_VLAN, "dsr", "all") }));
    services.sort_by_key(|(vip, _)| *vip);
    World {
        service: services.into_iter().map(|(_, service)| service).collect(),
        // Two entries for a translated flow and one for a tracked one, and room to spare.
        flows: flows as u32 * 12 + 1024,
        nat_ports: (10_000, 59_999),
        ..World::default()
    }
}

fn first_backend(vip: u16) -> u16 {
    (vip - 1) * 4 + 1
}

/// Says what is watched of services with these ids, those of the first address first.
fn watch(loaded: &mut Loaded, ids: &[[u16; 2]]) -> Result<()> {
    let mut maps = loaded.datapath.signals()?;
    for Mode { part, all, none, .. } in MODES {
        for (vip, halvings) in [(part, 6), (all, 0), (none, MOST_HALVINGS)] {
            for id in ids[usize::from(vip) - 1] {
                let sampling =
                    Sampling { mask: mask(halvings), epoch: 1, whose: 1, ..Sampling::default() };
                maps.set(Sampling::place(id.into(), 0), sampling)?;
            }
        }
    }
    Ok(())
}

/// The steady services as they are configured, with a route for the first client.
fn routed(buckets: u32) -> Result<Loaded> {
    let mut text = String::from("[agent]\ninterfaces = [\"lo\"]\n");
    for Mode { name, steady, .. } in MODES {
        let vips = FAMILIES.map(|family| addr(Host::Vip(steady), family).to_string());
        text += &format!(
            "[[service]]\nname = \"{name}\"\nvip = {vips:?}\nports = [\"tcp/{PORT}\"]\n\
             forward = \"{name}\"\nstickiness = \"client\"\nhealth = {{ type = \"none\" }}\n\
             buckets = {buckets}\n\
             control = \"stable\"\n"
        );
        if name == NAT.name {
            let sources = FAMILIES.map(|family| addr(Host::Nat, family).to_string());
            text += &format!("nat_source = {sources:?}\n");
        }
        for (nth, version) in ["stable", "v2"].into_iter().enumerate() {
            let host = first_backend(steady) + nth as u16;
            let backends = FAMILIES.map(|family| backend_addr(host, family).to_string());
            text += &format!("[service.versions.{version}]\nbackends = {backends:?}\n");
        }
        text += "[[service.route]]\naudience = \"staff\"\nsplit = { v2 = \"100%\" }\n";
    }
    let networks = FAMILIES.map(|family| addr(Host::Client(1), family).to_string());
    text += &format!("[[audience]]\nname = \"staff\"\ncidr = {networks:?}\n");
    let config = match load_str("agent.toml", &text) {
        Ok(loaded) => loaded.config,
        Err(errors) => bail!("{}", canary_agent::config::render(&errors)),
    };
    let mut planner = audiences::begun(&config)?;
    planner.step(1_000_000);
    Loaded::new(planner.plane(), &Sizes { buckets: 16 * buckets, ..Sizes::default() })
}

/// The frame of flow number `i` to a host.
pub(crate) fn frame(family: Family, i: usize, to: Host, segment: &str) -> Result<Vec<u8>> {
    tagged(family, i, "", to, segment)
}

/// The same with tags.
fn tagged(family: Family, i: usize, tags: &str, to: Host, segment: &str) -> Result<Vec<u8>> {
    let (ip, _) = words(family);
    let client = Host::Client(1 + (i % 250) as u16).name();
    let port = 1024 + i / 250;
    let to = to.name();
    parse(&format!("eth client > us / {tags}{ip} {client} > {to} / tcp {port} > {PORT} {segment}"))
}

/// A router's word that a packet of a service to its first client, who has that port, was too big.
fn icmp_error(family: Family, vip: Host, port: u16) -> Result<Vec<u8>> {
    let (ip, icmp) = words(family);
    let code = if family == Family::V4 { "code=4 " } else { "" };
    let vip = vip.name();
    parse(&format!(
        "eth gw > us / {ip} gw > {vip} / {icmp} type=toobig {code}rest=1400 / \
         {ip} {vip} > client / tcp {PORT} > {port} A"
    ))
}

/// Sends a frame that the program has to send on.
fn sent(loaded: &mut Loaded, frame: &[u8]) -> Result<Outcome> {
    let outcome = loaded.run(frame)?;
    ensure!(outcome.action == XDP_TX, "a flow was refused: action {}", outcome.action);
    Ok(outcome)
}

/// Opens a flow of a translated service, whose client's packets have these tags. Returns the
/// client's packet on it, and the backend's.
fn open(
    loaded: &mut Loaded,
    family: Family,
    i: usize,
    tags: &str,
    to: Host,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let syn = tagged(family, i, tags, to, "S seq=1000")?;
    let there = sent(loaded, &syn)?;
    sent(loaded, &syn_ack(&there.frame, family))?;
    let forward = tagged(family, i, tags, to, "A seq=1001 ack=5001")?;
    let back = answer(&sent(loaded, &forward)?.frame, family);
    Ok((forward, back))
}

/// The backend's answer to a frame that the program sent it: the same with its ends swapped.
pub(crate) fn answer(sent: &[u8], family: Family) -> Vec<u8> {
    let mut frame = sent.to_vec();
    let mut swap = |at: usize, bytes: usize| {
        let (left, right) = frame[at..at + 2 * bytes].split_at_mut(bytes);
        left.swap_with_slice(right);
    };
    swap(0, 6);
    match family {
        Family::V4 => {
            swap(26, 4);
            swap(34, 2);
        }
        Family::V6 => {
            swap(22, 16);
            swap(54, 2);
        }
    }
    frame
}

/// The backend's SYN-ACK to a SYN numbered 1000 that the program sent it.
pub(crate) fn syn_ack(sent: &[u8], family: Family) -> Vec<u8> {
    let mut frame = answer(sent, family);
    let tcp = if family == Family::V4 { 34 } else { 54 };
    frame[tcp + 4..tcp + 8].copy_from_slice(&5000_u32.to_be_bytes());
    frame[tcp + 8..tcp + 12].copy_from_slice(&1001_u32.to_be_bytes());
    frame[tcp + 13] = TCP_SYN | TCP_ACK;
    frame
}
