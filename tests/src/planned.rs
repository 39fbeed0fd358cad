//! The loaded program, fed by the real planner: what an operator does goes in,
//! where packets go comes out.
//!
//! Time is the planner's, and does not pass by itself: [`Planned::pass`] lets it
//! go by, for flow entries as well. (No entry can look older than the host is up.)

use std::{
    collections::HashMap,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use canary_agent::{
    config::{Config, load_str, render},
    datapath::Applied,
    plan::{
        Adopted, AdoptedClasses, AdoptedService, DataPlane, Family, NextHop, Ownership, Planner,
        QUARANTINE_MS, ServicePlan, ServiceState, Start, Tags,
    },
    store::{Admin, ServiceRecord, Split},
};
use canary_ebpf_common::{
    abi::{self, BackendCounters, Flow, FlowKeyV4, FlowKeyV6, IPPROTO_TCP},
    entry::{BackendIndex, Entry},
    hash::bucket,
    steer::{Segment, TCP_ACK, TCP_SYN},
};

use crate::{
    loaded::{ARRIVAL_IFINDEX, Loaded, Sizes, XDP_DROP, XDP_PASS, XDP_TX},
    model::{Tuple, family},
    names::Host,
    world::addr,
};

/// The port of every service and backend here.
pub const PORT: u16 = 80;
/// When a plan begins, milliseconds of the planner's clock.
const BEGIN_MS: u64 = 1_000_000;

/// One version: its name, and number and weight of its backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Its name.
    pub name: &'static str,
    /// Numbers of its backends, and their weights.
    pub backends: Vec<(u16, u32)>,
}

/// A service of both families with the address `vip`, as its configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shop {
    /// `dsr` or `nat`.
    pub forward: &'static str,
    /// `connection`, `client` or `subnet`.
    pub stickiness: &'static str,
    /// `pin` or `move`.
    pub existing: &'static str,
    /// `control` or `none`.
    pub fallback: &'static str,
    /// How long buckets remember; `None` for ever.
    pub drain: Option<Duration>,
    /// Silence after which a UDP flow is new.
    pub udp_idle: Duration,
    /// Number of buckets.
    pub buckets: u32,
    /// Lengths of the prefixes for `subnet`.
    pub prefix: (u8, u8),
    /// Keys of the bucket hash; those of the service's name if there are none.
    pub hash_key: Option<&'static str>,
    /// Its versions, control first.
    pub versions: Vec<Version>,
    /// Its routes, the first one first.
    pub routes: Vec<Route>,
}

/// A route for an audience of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The audience's name.
    pub audience: &'static str,
    /// Its networks.
    pub networks: Vec<String>,
    /// Shares, as in the configuration.
    pub split: &'static str,
}

impl Default for Shop {
    /// `stable` with backends 1 and 2, `v2` with 3 and 4, `dsr`, a drain of 1,000 s.
    fn default() -> Self {
        Self {
            forward: "dsr",
            stickiness: "connection",
            existing: "pin",
            fallback: "control",
            drain: Some(Duration::from_secs(1000)),
            udp_idle: Duration::from_secs(30),
            buckets: 4096,
            prefix: (24, 56),
            hash_key: None,
            versions: vec![
                Version { name: "stable", backends: vec![(1, 1), (2, 1)] },
                Version { name: "v2", backends: vec![(3, 1), (4, 1)] },
            ],
            routes: Vec::new(),
        }
    }
}

impl Shop {
    /// The configuration of an agent with this service alone.
    ///
    /// # Panics
    /// When the agent would refuse it.
    #[track_caller]
    pub fn config(&self) -> Config {
        let text = self.text();
        let loaded = load_str("agent.toml", &text);
        loaded.unwrap_or_else(|errors| panic!("{text}\n{}", render(&errors))).config
    }

    /// The same as it stands in a file.
    pub fn text(&self) -> String {
        self.toml().expect("a string takes everything")
    }

    fn toml(&self) -> Result<String, std::fmt::Error> {
        let Self { forward, stickiness, existing, fallback, .. } = self;
        let mut text = String::from("[agent]\ninterfaces = [\"lo\"]\n\n[[service]]\n");
        writeln!(text, "name = \"shop\"\nports = [\"tcp/{PORT}\", \"udp/{PORT}\"]")?;
        writeln!(text, "vip = [\"{}\", \"{}\"]", Host::Vip(1).v4(), Host::Vip(1).v6())?;
        writeln!(text, "forward = \"{forward}\"\nstickiness = \"{stickiness}\"")?;
        writeln!(text, "fallback = \"{fallback}\"\nbuckets = {}", self.buckets)?;
        writeln!(
            text,
            "udp_idle = \"{}s\"\ncontrol = \"{}\"",
            self.udp_idle.as_secs(),
            self.versions[0].name
        )?;
        match self.drain {
            Some(drain) => writeln!(text, "drain = \"{}s\"", drain.as_secs())?,
            None => writeln!(text, "drain = \"never\"")?,
        }
        if let Some(key) = self.hash_key {
            writeln!(text, "hash_key = \"{key}\"")?;
        }
        if *stickiness == "subnet" {
            let (v4, v6) = self.prefix;
            writeln!(text, "prefix = {{ v4 = {v4}, v6 = {v6} }}")?;
        }
        if *forward == "nat" {
            writeln!(text, "nat_source = [\"{}\", \"{}\"]", Host::Nat.v4(), Host::Nat.v6())?;
        } else {
            writeln!(text, "existing = \"{existing}\"")?;
        }
        // Checks are made by nobody here; without the key what is set down would be up again.
        writeln!(text, "health = {{ type = \"tcp\" }}")?;
        for Version { name, backends } in &self.versions {
            writeln!(text, "\n[service.versions.{name}]\nbackends = [")?;
            for (n, weight) in backends {
                for family in [Family::V4, Family::V6] {
                    let addr = backend_addr(*n, family);
                    writeln!(text, "  {{ addr = \"{addr}\", weight = {weight} }},")?;
                }
            }
            writeln!(text, "]")?;
        }
        for Route { audience, split, networks: _ } in &self.routes {
            writeln!(text, "\n[[service.route]]\naudience = \"{audience}\"\nsplit = {split}")?;
        }
        for Route { audience, networks, split: _ } in &self.routes {
            writeln!(text, "\n[[audience]]\nname = \"{audience}\"\ncidr = {networks:?}")?;
        }
        Ok(text)
    }
}

/// Where backend `n` listens.
pub fn backend_addr(n: u16, family: Family) -> SocketAddr {
    SocketAddr::new(addr(Host::Backend(n), family), PORT)
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Went {
    /// To the backend of that number.
    To(u16),
    /// Nowhere.
    Dropped,
    /// To the host.
    Passed,
}

/// A service under the real planner, and the program that its plans are put in force in.
pub struct Planned {
    /// The program.
    pub loaded: Loaded,
    /// The planner.
    pub planner: Planner,
    /// The planner's clock, milliseconds.
    pub now_ms: u64,
    hops: HashMap<IpAddr, Result<NextHop, String>>,
    in_force: DataPlane,
    wakeup_ms: Option<u64>,
    frame: Vec<u8>,
}

impl Planned {
    /// A new agent with `shop`, over maps of these sizes.
    ///
    /// # Panics
    /// When the bench itself fails; so do the others here.
    #[track_caller]
    pub fn new(shop: &Shop, sizes: &Sizes) -> Self {
        let loaded = Loaded::new(&DataPlane::default(), sizes).expect("root, and a program");
        let planner = begun(&shop.config(), Adopted::default(), &[], BEGIN_MS);
        let mut planned = Self {
            loaded,
            planner,
            now_ms: BEGIN_MS,
            hops: HashMap::new(),
            in_force: DataPlane::default(),
            wakeup_ms: None,
            frame: Vec::new(),
        };
        planned.resolve();
        planned.settle();
        planned
    }

    /// Forgets everything, flow entries too, and begins with `shop` anew. The program stays
    /// loaded: what a new [`Planned`] would be, sooner.
    #[track_caller]
    pub fn begin_anew(&mut self, shop: &Shop) {
        self.loaded.flows_v4.clear().expect("a flow table");
        self.loaded.flows_v6.clear().expect("a flow table");
        self.planner = begun(&shop.config(), Adopted::default(), &[], BEGIN_MS);
        self.now_ms = BEGIN_MS;
        self.hops.clear();
        self.resolve();
        self.settle();
    }

    /// The agent ends and another starts with the configuration of `shop`, a second later: it
    /// goes on from what is stored and from what was put in force.
    #[track_caller]
    pub fn restart(&mut self, shop: &Shop) {
        self.pass(Duration::from_millis(QUARANTINE_MS));
        let stored = self.stored();
        let adopted = adopted(&self.in_force);
        self.planner = begun(&shop.config(), adopted, &stored, self.now_ms);
        self.resolve();
        self.settle();
    }

    /// The agent goes on with the configuration of `shop`, without a restart.
    #[track_caller]
    pub fn reload(&mut self, shop: &Shop) {
        self.plan(&shop.config());
        self.settle();
    }

    /// The same without putting it in force.
    #[track_caller]
    pub fn plan(&mut self, config: &Config) {
        let config = self.planner.remembering(config);
        let baseline = self.planner.baseline(&config, &HashMap::new(), self.now_ms);
        let mut prepared = baseline.prepare().unwrap_or_else(|error| panic!("no plan: {error}"));
        for ip in prepared.unknown_hops() {
            self.hops.entry(ip).or_insert_with(|| Ok(next_hop(ip)));
        }
        prepared.warm(self.hops.clone(), self.now_ms);
        let ready = self.planner.ready(prepared, self.now_ms);
        self.planner.install(ready.unwrap_or_else(|error| panic!("no plan: {error}")));
    }

    /// Tries to put in force what is planned, once; says what the kernel has against it.
    ///
    /// # Errors
    /// What the kernel has refused.
    pub fn try_once(&mut self) -> Result<Applied, String> {
        self.wakeup_ms = self.planner.step(self.now_ms).next_wakeup_ms;
        let plane = self.planner.plane().clone();
        let applied = self.loaded.apply(&plane).map_err(|error| format!("{error:#}"))?;
        self.in_force = plane;
        Ok(applied)
    }

    /// As [`restart`](Self::restart), with the program loaded anew over the pinned maps, and
    /// what is adopted read from them.
    #[track_caller]
    pub fn restart_from_pins(&mut self, shop: &Shop) {
        self.pass(Duration::from_millis(QUARANTINE_MS));
        let stored = self.stored();
        let adopted = self.loaded.reopen().expect("the pinned maps");
        self.planner = begun(&shop.config(), adopted, &stored, self.now_ms);
        self.resolve();
        self.settle();
    }

    /// What an agent says that is started with the configuration of `shop` over the pinned maps,
    /// if it refuses; nothing has changed then.
    #[track_caller]
    pub fn refused(&mut self, shop: &Shop) -> Option<String> {
        let stored = self.stored();
        let adopted = self.loaded.reopen().expect("the pinned maps");
        let config = adopted.remembering(&shop.config());
        let start = Start { config: &config, adopted, stored: &stored, now_ms: self.now_ms };
        Planner::begin(start).err().map(|error| error.to_string())
    }

    fn stored(&self) -> Vec<ServiceRecord> {
        self.planner.services().iter().map(ServiceState::stored_whole).collect()
    }

    /// Tells the planner a next hop for every address that it has not been told of.
    fn resolve(&mut self) {
        for ip in self.planner.addresses() {
            self.hops.entry(ip).or_insert_with(|| Ok(next_hop(ip)));
        }
        self.planner.set_next_hops(&self.hops);
    }

    /// Puts what the planner wants in force, and lets expired flow entries go.
    #[track_caller]
    pub fn settle(&mut self) {
        loop {
            self.wakeup_ms = self.planner.step(self.now_ms).next_wakeup_ms;
            self.in_force = self.planner.plane().clone();
            self.loaded.apply(&self.in_force).expect("a plan");
            if !self.planner.applied(self.now_ms) {
                break;
            }
        }
        self.loaded.expire().expect("flow entries");
    }

    /// Sets the split and puts it in force.
    #[track_caller]
    pub fn split(&mut self, shares: &[(&str, &str)]) {
        self.propose(shares);
        self.settle();
    }

    /// Has the buckets watched that a split would move.
    #[track_caller]
    pub fn prepare(&mut self, shares: &[(&str, &str)]) {
        let ownership = self.proposed(shares);
        self.planner.prepare(0, Some(&ownership));
        self.settle();
    }

    /// Sets the split, which is not in force before the next [`settle`](Self::settle).
    #[track_caller]
    pub fn propose(&mut self, shares: &[(&str, &str)]) {
        let ownership = self.proposed(shares);
        self.planner.set_ownership(0, ownership);
    }

    #[track_caller]
    fn proposed(&self, shares: &[(&str, &str)]) -> Ownership {
        let share = |text: &str| text.parse().expect("a share");
        let split: Split = shares.iter().map(|(v, s)| ((*v).to_owned(), share(s))).collect();
        self.planner.services()[0].propose(split).expect("shares up to the whole").ownership
    }

    /// An operator takes a backend out, or back in.
    #[track_caller]
    pub fn tell(&mut self, n: u16, admin: Admin) {
        for family in [Family::V4, Family::V6] {
            self.planner.set_admin(0, backend_addr(n, family), admin);
        }
        self.settle();
    }

    /// A backend fails its checks, or passes them again.
    #[track_caller]
    pub fn down(&mut self, n: u16, down: bool) {
        for family in [Family::V4, Family::V6] {
            self.planner.set_down(0, backend_addr(n, family), down);
        }
        self.settle();
    }

    /// The host finds the way to a backend, or does not any more.
    #[track_caller]
    pub fn reachable(&mut self, n: u16, reachable: bool) {
        let known = |ip| if reachable { Ok(next_hop(ip)) } else { Err("no route".to_owned()) };
        self.hop(n, known);
    }

    /// A backend's neighbour stops answering.
    #[track_caller]
    pub fn silent(&mut self, n: u16) {
        self.hop(n, |ip| Ok(NextHop { silent: Some(ip), ..next_hop(ip) }));
    }

    #[track_caller]
    fn hop(&mut self, n: u16, hop: impl Fn(IpAddr) -> Result<NextHop, String>) {
        for family in [Family::V4, Family::V6] {
            let ip = addr(Host::Backend(n), family);
            self.hops.insert(ip, hop(ip));
        }
        self.planner.set_next_hops(&self.hops);
        self.settle();
    }

    /// Nothing comes for so long; what the planner does by itself meanwhile, it does at the end.
    #[track_caller]
    pub fn pass(&mut self, time: Duration) {
        self.loaded.silence(time).expect("flow entries");
        self.now_ms += time.as_millis() as u64;
        self.settle();
    }

    /// Nothing comes for so long, and the planner does everything at its time. Calls `each`
    /// after every one of its steps.
    #[track_caller]
    pub fn pass_by_steps(&mut self, time: Duration, mut each: impl FnMut(&mut Self)) {
        let end = self.now_ms + time.as_millis() as u64;
        while let Some(at) = self.wakeup_ms.filter(|at| *at <= end) {
            let until = at.saturating_sub(self.now_ms);
            self.pass(Duration::from_millis(until));
            each(self);
            let overdue = self.wakeup_ms.is_some_and(|at| at <= self.now_ms);
            assert!(!overdue, "what was due is due still");
        }
        self.pass(Duration::from_millis(end - self.now_ms));
    }

    /// What is in force.
    pub fn in_force(&self) -> &DataPlane {
        &self.in_force
    }

    /// The table of a family.
    #[track_caller]
    pub fn table(&self, family: Family) -> &Arc<ServicePlan> {
        self.in_force.services.iter().find(|s| s.family == family).expect("a table a family")
    }

    /// The bucket that a packet falls into.
    #[track_caller]
    pub fn bucket(&self, tuple: &Tuple) -> u32 {
        let record = &self.table(family(tuple.src)).record;
        bucket(record, tuple.hash(record))
    }

    /// What is in force for a packet's bucket.
    #[track_caller]
    pub fn entry(&self, tuple: &Tuple) -> Entry {
        self.table(family(tuple.src)).entries[self.bucket(tuple) as usize]
    }

    /// The number of the backend at `index`; `None` if nobody is.
    pub fn number(&self, index: BackendIndex) -> Option<u16> {
        let at = self.in_force.backends.binary_search_by_key(&index, |(i, _)| *i).ok()?;
        match Host::with_addr(self.in_force.backends[at].1.addr.ip()) {
            Some(Host::Backend(n)) => Some(n),
            _ => None,
        }
    }

    /// The index of backend `n` for a family.
    pub fn index(&self, n: u16, family: Family) -> Option<BackendIndex> {
        let addr = backend_addr(n, family);
        self.in_force.backends.iter().find(|(_, b)| b.addr == addr).map(|(index, _)| *index)
    }

    /// Where the table sends new connections of a packet's bucket.
    #[track_caller]
    pub fn current(&self, tuple: &Tuple) -> Option<u16> {
        self.number(self.entry(tuple).current())
    }

    /// The flow entry of a client's packet.
    #[track_caller]
    pub fn flow(&self, tuple: &Tuple) -> Option<Flow> {
        match family(tuple.src) {
            Family::V4 => self.loaded.flows_v4.get(&tuple.key::<FlowKeyV4>()),
            Family::V6 => self.loaded.flows_v6.get(&tuple.key::<FlowKeyV6>()),
        }
        .expect("a flow table")
    }

    /// Stores a flow entry, whatever the program makes of it.
    #[track_caller]
    pub fn store(&mut self, tuple: &Tuple, flow: Flow) {
        match family(tuple.src) {
            Family::V4 => self.loaded.flows_v4.insert(&tuple.key::<FlowKeyV4>(), flow),
            Family::V6 => self.loaded.flows_v6.insert(&tuple.key::<FlowKeyV6>(), flow),
        }
        .expect("a flow table");
    }

    /// Flow entries of both families.
    pub fn flows(&self) -> usize {
        self.loaded.flows_v4.len() + self.loaded.flows_v6.len()
    }

    /// Buckets of both families that are tracked.
    pub fn tracked(&self) -> usize {
        let entries = self.in_force.services.iter().flat_map(|s| s.entries.iter());
        entries.filter(|entry| entry.tracked()).count()
    }

    /// Counters of backend `n` for a family.
    #[track_caller]
    pub fn counters(&self, n: u16, family: Family) -> BackendCounters {
        let index = self.index(n, family).expect("a backend in force");
        self.loaded.counters(&[index])[0]
    }

    /// Sends a client's packet through the program.
    #[track_caller]
    pub fn send(&mut self, tuple: &Tuple, segment: Segment) -> Went {
        self.translated(tuple, segment).0
    }

    /// As [`send`](Self::send); with it the source port that the packet left with.
    #[track_caller]
    pub fn translated(&mut self, tuple: &Tuple, segment: Segment) -> (Went, u16) {
        write_frame(&mut self.frame, Host::Client(1), tuple, segment, SERVER_SEQ + 1);
        let seen = self.loaded.run(&self.frame).expect("a run");
        let went = match seen.action {
            XDP_TX => {
                let mac = seen.frame[..6].try_into().expect("six bytes");
                match Host::with_mac(mac) {
                    Some(Host::Backend(n)) => Went::To(n),
                    other => panic!("{tuple:?} {segment:?} went to {other:?}"),
                }
            }
            XDP_DROP => Went::Dropped,
            XDP_PASS => Went::Passed,
            other => panic!("{tuple:?} {segment:?}: action {other}"),
        };
        let at = transport_at(tuple);
        (went, u16::from_be_bytes([seen.frame[at], seen.frame[at + 1]]))
    }

    /// The frame of a client's packet.
    pub fn frame(&self, tuple: &Tuple, segment: Segment) -> Vec<u8> {
        let mut frame = Vec::new();
        write_frame(&mut frame, Host::Client(1), tuple, segment, SERVER_SEQ + 1);
        frame
    }

    /// Sends what backend `n` answers to a translated packet that came from `port`, `ack` being
    /// what it acknowledges; whether it goes to the client.
    #[track_caller]
    pub fn answer(&mut self, tuple: &Tuple, n: u16, port: u16, segment: Segment, ack: u32) -> bool {
        let family = family(tuple.src);
        let answer = Tuple {
            src: addr(Host::Backend(n), family),
            dst: addr(Host::Nat, family),
            src_port: PORT,
            dst_port: port,
            protocol: tuple.protocol,
        };
        write_frame(&mut self.frame, Host::Backend(n), &answer, segment, ack);
        let seen = self.loaded.run(&self.frame).expect("a run");
        let at = transport_at(tuple) + 2;
        seen.action == XDP_TX
            && seen.frame[..6] == Host::Client(1).mac()
            && seen.frame[at..at + 2] == tuple.src_port.to_be_bytes()
    }

    /// Sends backend `n`'s SYN-ACK to the SYN numbered `isn` that came from `port`; whether it
    /// goes to the client.
    #[track_caller]
    pub fn syn_ack(&mut self, tuple: &Tuple, n: u16, port: u16, isn: u32) -> bool {
        let segment = Segment::tcp(TCP_SYN | TCP_ACK, SERVER_SEQ);
        self.answer(tuple, n, port, segment, isn.wrapping_add(1))
    }
}

/// Sequence number of every server's SYN-ACK. A client's packets acknowledge it.
pub const SERVER_SEQ: u32 = 500_000;

/// Client `n`'s connection from `port`.
pub fn tuple(n: u16, family: Family, port: u16, protocol: u8) -> Tuple {
    Tuple {
        src: addr(Host::Client(n), family),
        dst: addr(Host::Vip(1), family),
        src_port: port,
        dst_port: PORT,
        protocol,
    }
}

fn begun(config: &Config, adopted: Adopted, stored: &[ServiceRecord], now_ms: u64) -> Planner {
    let config = &adopted.remembering(config);
    let begun = Planner::begin(Start { config, adopted, stored, now_ms });
    begun.unwrap_or_else(|error| panic!("no plan: {error}")).0
}

fn next_hop(ip: IpAddr) -> NextHop {
    let host = Host::with_addr(ip).unwrap_or_else(|| panic!("nobody has {ip}"));
    NextHop {
        ifindex: ARRIVAL_IFINDEX,
        source_mac: Host::Us.mac(),
        destination_mac: host.mac(),
        source: addr(Host::Nat, family(ip)),
        tags: Tags::default(),
        mtu: 1500,
        silent: None,
    }
}

/// What another agent would find in the maps with `plane` in force.
fn adopted(plane: &DataPlane) -> Adopted {
    let services = plane.services.iter().map(|s| AdoptedService {
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
    });
    Adopted {
        services: services.collect(),
        backends: plane.backends.iter().map(|(index, b)| (*index, b.record())).collect(),
        classes: AdoptedClasses {
            networks: plane.classes.networks.each_ref().map(|one| one.prefixes().to_vec()),
            tables: plane.classes.tables.clone(),
        },
        panics: Vec::new(),
    }
}

/// Where the transport header of a packet lies that [`write_frame`] wrote.
fn transport_at(tuple: &Tuple) -> usize {
    if tuple.src.is_ipv4() { 14 + 20 } else { 14 + 40 }
}

/// Writes the packet's frame. Checksums of transport are left out: the program brings them up
/// to date and never looks whether they are right.
/// `ack` is the acknowledgement number where the segment has one.
fn write_frame(frame: &mut Vec<u8>, from: Host, tuple: &Tuple, segment: Segment, ack: u32) {
    let Tuple { src, dst, src_port, dst_port, protocol } = *tuple;
    let tcp = protocol == IPPROTO_TCP;
    let payload_bytes = u16::try_from(segment.payload_bytes).expect("a packet's payload");
    let transport_bytes: u16 = if tcp { 20 + payload_bytes } else { 8 };
    frame.clear();
    frame.extend(Host::Us.mac());
    frame.extend(from.mac());
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend((20 + transport_bytes).to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(transport_bytes.to_be_bytes());
            frame.extend([protocol, 64]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        _ => panic!("{src} and {dst} are of two families"),
    }
    frame.extend(src_port.to_be_bytes());
    frame.extend(dst_port.to_be_bytes());
    if tcp {
        frame.extend(segment.seq.to_be_bytes());
        let ack = if segment.tcp_flags & TCP_ACK != 0 { ack } else { 0 };
        frame.extend(ack.to_be_bytes());
        frame.extend([0x50, segment.tcp_flags, 0xff, 0xff, 0, 0, 0, 0]);
        frame.resize(frame.len() + usize::from(payload_bytes), 0);
    } else {
        // A sum of its own (RFC 768): IPv6 has no datagrams without.
        frame.extend([0, 8, 0x12, 0x34]);
    }
}
