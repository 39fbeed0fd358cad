//! What becomes of a frame, worked out in user space: action, counted reason and every byte.
//!
//! The rules stand in the modules that the programs share ([`crate::steer`], [`crate::nat`],
//! [`crate::fragment`], [`crate::tunnel`], …); here they are put together once more, over plain
//! slices and maps, for tests to hold the loaded programs against. Written from what the documents
//! say of packets, not for speed: nothing here knows of programs that leave packets to others.
//! Signals and classes of clients have models of their own.

mod arrive;
mod fragments;
mod icmp;
mod send;
mod translate;

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
};

use crate::{
    abi::{
        Address, BACKEND_MAINT, BACKEND_USABLE, Backend, Flow, FlowKeyV4, FlowKeyV6, ForwardMode,
        FragmentKey, FragmentRoute, IPPROTO_TCP, IPPROTO_UDP, PAGE_BUCKETS, Reason, ReasonVerdict,
        SERVICE_TCP, SERVICE_UDP, Service, VipKey,
    },
    entry::{BackendIndex, Entry},
    nat::{self, Step, TupleKey},
    ports::{self, Client, PortRange},
    quic::Quic,
    steer::{Segment, model::ModelFlows, steer},
};

/// What the maps say.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// Interface that frames come in by.
    pub ifindex: u32,
    /// MAC addresses that frames for this host have there.
    pub macs: HashSet<[u8; 6]>,
    /// The way by the interface with tags, their word left out; 0 where flows can't name it.
    pub tagged_way: u32,
    /// Interfaces that packets may leave by.
    pub ways_out: HashSet<u32>,
    /// Services; IPv4 addresses stand in the key.
    pub services: HashMap<(Address, VipKey), Service>,
    /// Pages of forwarding tables, one after the other.
    pub table: Vec<u32>,
    /// Backends by index.
    pub backends: Vec<Backend>,
    /// Source ports for translated flows.
    pub ports: PortRange,
}

impl Tables {
    fn service(&self, v6: bool, addr: Address, port_be: u16, protocol: u8) -> Option<&Service> {
        let key = if v6 {
            (addr, VipKey::v6(port_be, protocol))
        } else {
            ([0; 2], VipKey::v4(addr[0] as u32, port_be, protocol))
        };
        self.services.get(&key)
    }

    /// What is served at an address whatever the port.
    fn any(&self, v6: bool, addr: Address) -> Option<&Service> {
        self.service(v6, addr, 0, 0)
    }

    fn serves(&self, v6: bool, addr: Address, protocol: u8) -> bool {
        self.any(v6, addr).is_some_and(|any| serves(any, protocol))
    }

    fn entry(&self, service: &Service, bucket: u32) -> Result<Entry, Reason> {
        let at = service.first_page as usize * PAGE_BUCKETS as usize + bucket as usize;
        self.table.get(at).map(|word| Entry(*word)).ok_or(Reason::DropNoBackend)
    }

    fn backend(&self, index: BackendIndex) -> Result<&Backend, Reason> {
        self.backends.get(usize::from(index.get())).ok_or(Reason::DropNoBackend)
    }

    fn usable(&self, index: BackendIndex) -> Result<&Backend, Reason> {
        let backend = self.backend(index)?;
        let usable = backend.flags & (BACKEND_USABLE | BACKEND_MAINT) == BACKEND_USABLE;
        if usable { Ok(backend) } else { Err(Reason::DropNoBackend) }
    }

    fn usable_for_flow(&self, index: BackendIndex) -> Result<&Backend, Reason> {
        match self.backend(index)?.flags & BACKEND_MAINT {
            0 => self.usable(index),
            _ => Err(Reason::PassNoFlow),
        }
    }
}

fn serves(any: &Service, protocol: u8) -> bool {
    match protocol {
        IPPROTO_TCP => any.flags & SERVICE_TCP != 0,
        IPPROTO_UDP => any.flags & SERVICE_UDP != 0,
        _ => false,
    }
}

fn translates(service: &Service) -> bool {
    service.flags & ForwardMode::MASK == ForwardMode::Nat as u32
}

/// Whether a service's packets are wrapped, and whether behind UDP.
fn wraps(service: &Service) -> Option<bool> {
    match service.flags & ForwardMode::MASK {
        mode if mode == ForwardMode::Ipip as u32 => Some(false),
        mode if mode == ForwardMode::Gue as u32 => Some(true),
        _ => None,
    }
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It passes to the host, as it came.
    Pass,
    /// It is dropped.
    Drop,
    /// It goes out of this interface.
    Send(u32),
}

/// What should become of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// The action.
    pub action: Action,
    /// What it is counted under.
    pub reason: Option<Reason>,
    /// The frame as it leaves; empty if it is dropped.
    pub frame: Vec<u8>,
    /// An error to the sender: what is counted instead, and the frame dropped, when too many have
    /// been sent of late.
    pub untold: Option<Reason>,
}

/// How a frame that is not refused goes on.
enum Onward {
    /// To the host, not counted.
    Pass,
    /// Out of an interface, counted or not.
    Send(u32, Option<Reason>),
    /// Back, as an error; or not, for the second reason.
    Tell(Reason, Reason),
}

/// The frame at hand, and what is known of it.
#[derive(Default)]
struct Packet {
    bytes: Vec<u8>,
    /// The tags that it came with.
    tags: Vec<u8>,
    /// Their word, as in [`crate::abi::vlan`].
    vlan: u32,
    /// The way that it came by; 0 for one that flows can't name.
    way: u32,
    v6: bool,
    /// What is behind IP, and where.
    protocol: u8,
    transport: usize,
    /// Not plain TCP or UDP at first sight.
    odd: bool,
    fragment: Option<Fragment>,
}

/// What makes the frame at hand a fragment.
struct Fragment {
    key: FragmentKey,
    /// Where the header is that says so (IPv6).
    at: usize,
    /// Its address has a service of its protocol.
    served: bool,
}

/// Where Ethernet's payload is.
const IP: usize = crate::headers::ETH_BYTES;

impl Packet {
    fn u8(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    /// A word as it lies in memory.
    fn raw_u16(&self, at: usize) -> u16 {
        self.u16(at).to_be()
    }

    fn holds(&self, at: usize, bytes: usize) -> bool {
        at + bytes <= self.bytes.len()
    }

    fn address(&self, at: usize) -> Address {
        let bytes = &self.bytes;
        if !self.v6 {
            let four: [u8; 4] = bytes[at..at + 4].try_into().expect("four bytes");
            return [u64::from(u32::from_ne_bytes(four)), 0];
        }
        [at, at + 8]
            .map(|at| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes")))
    }

    fn set_address(&mut self, at: usize, addr: Address) {
        if self.v6 {
            self.bytes[at..at + 8].copy_from_slice(&addr[0].to_ne_bytes());
            self.bytes[at + 8..at + 16].copy_from_slice(&addr[1].to_ne_bytes());
        } else {
            self.bytes[at..at + 4].copy_from_slice(&(addr[0] as u32).to_ne_bytes());
        }
    }

    fn src(&self) -> Address {
        self.address(self.src_at())
    }

    fn dst(&self) -> Address {
        self.address(self.dst_at())
    }

    fn src_at(&self) -> usize {
        if self.v6 { IP + 8 } else { IP + 12 }
    }

    fn dst_at(&self) -> usize {
        if self.v6 { IP + 24 } else { IP + 16 }
    }

    /// TTL or hop limit.
    fn ttl(&self) -> u8 {
        self.u8(self.ttl_at())
    }

    fn ttl_at(&self) -> usize {
        if self.v6 { IP + 7 } else { IP + 8 }
    }

    /// Length of IPv4's header, as it says itself.
    fn ihl(&self) -> usize {
        usize::from(self.u8(IP) & 0xf) * 4
    }

    /// Where the packet ends, as it says itself.
    fn end(&self) -> usize {
        if self.v6 {
            IP + 40 + usize::from(self.u16(IP + 4))
        } else {
            IP + usize::from(self.u16(IP + 2))
        }
    }

    /// The first twelve bytes, in words.
    fn eth(&self) -> [u32; 3] {
        [0, 4, 8].map(|at| u32::from_ne_bytes(self.bytes[at..at + 4].try_into().expect("a word")))
    }

    fn set_eth(&mut self, eth: [u32; 3]) {
        for (at, word) in [0, 4, 8].into_iter().zip(eth) {
            self.bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
    }

    /// The MAC addresses of an answer.
    fn way_back(&self) -> [u32; 3] {
        let mut swapped = Self { bytes: self.bytes[..12].to_vec(), ..Self::default() };
        swapped.bytes.rotate_left(6);
        swapped.eth()
    }
}

/// The programs' maps and rules, in user space.
pub struct Model {
    tables: Tables,
    /// Flows of IPv4.
    pub flows_v4: ModelFlows<FlowKeyV4>,
    /// Flows of IPv6.
    pub flows_v6: ModelFlows<FlowKeyV6>,
    /// Where first fragments went.
    pub fragments: HashMap<FragmentKey, FragmentRoute>,
}

impl Model {
    /// Over these tables, with room for `flows` of each family, and `sources` to translate to.
    pub fn new(tables: Tables, flows: usize, sources: &[Address]) -> Self {
        let flags =
            |index: usize, backend: &Backend| (BackendIndex::new(index as u16), backend.flags);
        let all: HashMap<_, _> =
            tables.backends.iter().enumerate().map(|(i, b)| flags(i, b)).collect();
        let mut model = Self {
            tables,
            flows_v4: ModelFlows::new(flows),
            flows_v6: ModelFlows::new(flows),
            fragments: HashMap::new(),
        };
        model.flows_v4.flags.get_mut().clone_from(&all);
        model.flows_v6.flags.get_mut().clone_from(&all);
        model.flows_v4.sources.get_mut().extend(sources);
        model.flows_v6.sources.get_mut().extend(sources);
        model
    }

    /// What becomes of a frame, which Ethernet's header is whole of.
    pub fn fate(&mut self, frame: &[u8]) -> Fate {
        let mut packet =
            Packet { bytes: frame.to_vec(), way: self.tables.ifindex, ..Packet::default() };
        let onward = self.arrive(&mut packet).and_then(|onward| match onward {
            Onward::Send(ifindex, reason) if ifindex != self.tables.ifindex => {
                let known = self.tables.ways_out.contains(&ifindex);
                known.then_some(Onward::Send(ifindex, reason)).ok_or(Reason::DropNoInterface)
            }
            other => Ok(other),
        });
        let passed =
            |reason| Fate { action: Action::Pass, reason, frame: frame.to_vec(), untold: None };
        match onward {
            Ok(Onward::Pass) => passed(None),
            Ok(Onward::Send(ifindex, reason)) => {
                Fate { action: Action::Send(ifindex), reason, frame: packet.bytes, untold: None }
            }
            Ok(Onward::Tell(told, untold)) => Fate {
                action: Action::Send(self.tables.ifindex),
                reason: Some(told),
                frame: packet.bytes,
                untold: Some(untold),
            },
            Err(reason) if matches!(reason.verdict(), ReasonVerdict::Pass) => passed(Some(reason)),
            Err(reason) => {
                Fate { action: Action::Drop, reason: Some(reason), frame: Vec::new(), untold: None }
            }
        }
    }
}

/// Where a client's well-formed packet goes, and its entry if it is translated: the rules of
/// [`steer`] and [`nat`] over a flow table of the model's own.
///
/// # Errors
/// The reason why it goes nowhere.
#[expect(clippy::too_many_arguments, reason = "all that a decision depends on")]
pub fn decide<'a, K: TupleKey + Eq + Hash>(
    flows: &ModelFlows<K>,
    ports: PortRange,
    backend: impl Fn(BackendIndex) -> Option<&'a Backend>,
    service: &Service,
    entry: Entry,
    hash: u64,
    key: &K,
    segment: Segment,
    ack: u32,
    client: &Client,
) -> Result<(BackendIndex, Option<Flow>), Reason> {
    let flags = |index| backend(index).map_or(0, |b| b.flags) & (BACKEND_USABLE | BACKEND_MAINT);
    let usable = |index| match flags(index) {
        BACKEND_USABLE => Ok(index),
        _ => Err(Reason::DropNoBackend),
    };
    if !translates(service) {
        // The program does not look at the payload where nothing depends on it.
        let quic = if entry.tracked() { segment.quic } else { Quic::Other };
        let steering = steer(flows, service, entry, key, Segment { quic, ..segment });
        return Ok((usable(steering.backend)?, None));
    }
    let flow = match nat::step(flows, service, key, segment, ack) {
        Step::NoFlow => return Err(Reason::PassNoFlow),
        Step::Follow(flow) => {
            let way = if client.way == 0 { Err(Reason::DropNoInterface) } else { Ok(client.way) };
            // SAFETY: an entry of the model's table, which nothing has changed since.
            let flow = unsafe { &mut *flow };
            (flow.way, flow.eth) = (way?, client.eth);
            let reverse =
                crate::steer::Flows::lookup(flows, &nat::opposite(flow, segment.protocol));
            if !reverse.is_null() {
                // SAFETY: not null, so an entry of the model's table.
                unsafe { ((*reverse).way, (*reverse).eth) = (client.way, client.eth) };
            }
            *flow
        }
        Step::Open => {
            let index = usable(entry.current())?;
            if client.way == 0 {
                return Err(Reason::DropNoInterface);
            }
            let backend = backend(index).ok_or(Reason::DropNoBackend)?;
            let opened =
                ports::open(flows, service, index, backend, ports, client, key, segment, hash)?;
            // SAFETY: an entry of the model's table, which nothing has changed since.
            unsafe { *opened }
        }
    };
    let index = BackendIndex::new(flow.backend);
    if flags(index) & BACKEND_MAINT != 0 {
        return Err(Reason::PassNoFlow);
    }
    Ok((usable(index)?, Some(flow)))
}
