//! The kernel's links, neighbours and addresses as last heard.
//!
//! Pure. Must not know of sockets or time.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use netlink_packet_route::neighbour::NeighbourState;

use super::{
    Link,
    wire::{
        self, AddressKey, AddressRecord, LinkRecord, Message, Neighbour, NeighbourKey,
        meaningful_flags, settled,
    },
};
use crate::plan::{InterfaceMacs, Tags};

/// More changed prefixes than this are looked up as if all had changed.
const PREFIXES_MAX: usize = 64;

/// Which route answers may no longer hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Stale {
    /// None.
    #[default]
    Nothing,
    /// Those for destinations inside these.
    Within(Vec<IpNet>),
    /// All.
    All,
}

impl Stale {
    /// Takes in what else is stale.
    pub(super) fn add(&mut self, other: Self) {
        *self = match (std::mem::take(self), other) {
            (Self::All, _) | (_, Self::All) => Self::All,
            (Self::Nothing, one) | (one, Self::Nothing) => one,
            (Self::Within(mut prefixes), Self::Within(more)) => {
                for prefix in more {
                    if !prefixes.contains(&prefix) {
                        prefixes.push(prefix);
                    }
                }
                if prefixes.len() > PREFIXES_MAX { Self::All } else { Self::Within(prefixes) }
            }
        };
    }

    /// Whether any answer for `destinations` may no longer hold.
    pub(super) fn touches(&self, destinations: &BTreeSet<IpAddr>) -> bool {
        match self {
            Self::Nothing => false,
            // Not one by one: a router's host may hear of thousands of routes a second.
            Self::Within(prefixes) => prefixes.iter().any(|prefix| {
                destinations.range(prefix.network()..=prefix.broadcast()).next().is_some()
            }),
            Self::All => !destinations.is_empty(),
        }
    }

    /// Whether the answer for `destination` may no longer hold.
    pub(super) fn covers(&self, destination: IpAddr) -> bool {
        match self {
            Self::Nothing => false,
            Self::Within(prefixes) => prefixes.iter().any(|prefix| prefix.contains(&destination)),
            Self::All => true,
        }
    }
}

/// How far a neighbour can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It does not age; leave it alone: using it would make it age.
    Fixed,
    /// Confirmed lately, or being confirmed.
    Good,
    /// Known, but not confirmed lately.
    Aged,
    /// Not known.
    Missing,
}

/// Why a neighbour is not known, where that has been learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It was asked for and did not answer.
    Silent,
    /// The kernel has no room for another neighbour.
    TableFull,
}

/// What a message changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// Something that is published may have changed.
    pub(super) published: bool,
    /// Route answers that may no longer hold.
    pub(super) stale: Stale,
    /// A neighbour whose state changed, and its standing before.
    pub(super) neighbour: Option<(NeighbourKey, Standing)>,
}

/// The tables.
#[derive(Clone, Debug, Default)]
pub(super) struct Tables {
    links: HashMap<u32, LinkRecord>,
    neighbours: HashMap<NeighbourKey, Neighbour>,
    addresses: BTreeMap<AddressKey, AddressRecord>,
    troubles: HashMap<NeighbourKey, Trouble>,
}

impl Tables {
    /// Tables out of complete dumps; what was learnt about silent neighbours is kept.
    pub(super) fn rebuilt(&self, dumps: impl IntoIterator<Item = Message>) -> Self {
        let mut tables = Self { troubles: self.troubles.clone(), ..Self::default() };
        for message in dumps {
            tables.apply(message);
        }
        tables
    }

    /// Takes in one change.
    pub(super) fn apply(&mut self, message: Message) -> Effect {
        match message {
            Message::Link(link) => {
                let before = self.links.insert(link.ifindex, link.clone());
                if before.as_ref() == Some(&link) {
                    return Effect::default();
                }
                // The kernel takes IPv4 routes of a link that goes down away without a word.
                let way = |link: &LinkRecord| (link.up, link.running);
                let stale = if before.as_ref().map(way) == Some(way(&link)) {
                    Stale::Nothing
                } else {
                    Stale::All
                };
                Effect { published: true, stale, neighbour: None }
            }
            Message::LinkGone(ifindex) => {
                if self.links.remove(&ifindex).is_none() {
                    return Effect::default();
                }
                self.neighbours.retain(|key, _| key.ifindex != ifindex);
                self.troubles.retain(|key, _| key.ifindex != ifindex);
                self.addresses.retain(|key, _| key.ifindex != ifindex);
                Effect { published: true, stale: Stale::All, neighbour: None }
            }
            Message::Neighbour(key, neighbour) => self.set_neighbour(key, Some(neighbour)),
            Message::NeighbourGone(key) => self.set_neighbour(key, None),
            Message::Address(key, record) => {
                let before = self.addresses.insert(key, record);
                let flags = |record: AddressRecord| meaningful_flags(record.flags);
                Self::address_effect(before.map(flags) != Some(flags(record)))
            }
            Message::AddressGone(key) => {
                Self::address_effect(self.addresses.remove(&key).is_some())
            }
            Message::Route(route) => {
                let stale = wire::route_prefix(&route)
                    .map_or(Stale::All, |prefix| Stale::Within(vec![prefix]));
                Effect { stale, ..Effect::default() }
            }
            Message::RoutingPolicy => Effect { stale: Stale::All, ..Effect::default() },
            Message::Other => Effect::default(),
        }
    }

    fn address_effect(changed: bool) -> Effect {
        // Any address may be the source that the host would use, for any destination.
        let stale = if changed { Stale::All } else { Stale::Nothing };
        Effect { published: changed, stale, neighbour: None }
    }

    fn set_neighbour(&mut self, key: NeighbourKey, after: Option<Neighbour>) -> Effect {
        let (mac_before, standing_before) = (self.mac(key), self.standing(key));
        match after {
            Some(neighbour) => self.neighbours.insert(key, neighbour),
            None => self.neighbours.remove(&key),
        };
        let trouble_before = self.troubles.get(&key).copied();
        if self.mac(key).is_some() {
            self.troubles.remove(&key);
        } else if after.is_some_and(|neighbour| neighbour.state == NeighbourState::Failed) {
            self.troubles.insert(key, Trouble::Silent);
        }
        let published =
            mac_before != self.mac(key) || trouble_before != self.troubles.get(&key).copied();
        Effect { published, stale: Stale::Nothing, neighbour: Some((key, standing_before)) }
    }

    /// Notes that the kernel has no room for a neighbour. True when that is news.
    pub(super) fn note_full(&mut self, key: NeighbourKey) -> bool {
        self.mac(key).is_none()
            && self.troubles.insert(key, Trouble::TableFull) != Some(Trouble::TableFull)
    }

    /// Forgets the troubles of neighbours that nobody asks for any more.
    pub(super) fn keep_troubles(&mut self, mut wanted: impl FnMut(NeighbourKey) -> bool) {
        self.troubles.retain(|key, _| wanted(*key));
    }

    /// A link.
    pub(super) fn link(&self, ifindex: u32) -> Option<&LinkRecord> {
        self.links.get(&ifindex)
    }

    /// A neighbour's MAC address, if it can be used.
    pub(super) fn mac(&self, key: NeighbourKey) -> Option<[u8; 6]> {
        let neighbour = self.neighbours.get(&key)?;
        if self.standing(key) == Standing::Missing { None } else { neighbour.mac }
    }

    /// How far a neighbour can be relied on.
    pub(super) fn standing(&self, key: NeighbourKey) -> Standing {
        use NeighbourState as State;
        match self.neighbours.get(&key).map(|neighbour| neighbour.state) {
            Some(State::Permanent | State::Noarp) => Standing::Fixed,
            Some(State::Reachable | State::Delay | State::Probe) => Standing::Good,
            Some(State::Stale) => Standing::Aged,
            _ => Standing::Missing,
        }
    }

    /// Why a neighbour is not known.
    pub(super) fn trouble(&self, key: NeighbourKey) -> Option<Trouble> {
        self.troubles.get(&key).copied()
    }

    /// The state of each named link; `None` for one that is missing.
    pub(super) fn links_named(&self, names: &BTreeSet<String>) -> BTreeMap<String, Option<Link>> {
        let mut links: BTreeMap<_, _> = names.iter().map(|name| (name.clone(), None)).collect();
        for record in self.links.values() {
            let LinkRecord { ifindex, name, up, running, mac, mtu, .. } = record;
            if let Some(link) = links.get_mut(name) {
                *link = Some(Link {
                    ifindex: *ifindex,
                    up: *up,
                    running: *running,
                    mac: *mac,
                    mtu: *mtu,
                });
            }
        }
        links
    }

    /// The MAC addresses that frames for this host have, by the link of those named that they come
    /// in by: its own, those of devices that stand on it, and that of a bridge or bond above it.
    pub(super) fn macs(&self, names: &BTreeSet<String>) -> BTreeMap<u32, InterfaceMacs> {
        let mut macs = BTreeMap::new();
        for record in self.links.values().filter(|record| names.contains(&record.name)) {
            let Some(own) = record.mac else { continue };
            let (mut above, mut others) = (vec![record.ifindex], BTreeSet::new());
            let mut n = 0;
            while let Some(link) = above.get(n).and_then(|ifindex| self.links.get(ifindex)) {
                others.extend(link.mac);
                let master = |other: &LinkRecord| link.master == Some(other.ifindex);
                let on_it = |other: &LinkRecord| other.below == Some(link.ifindex);
                for other in self.links.values().filter(|other| master(other) || on_it(other)) {
                    if !above.contains(&other.ifindex) {
                        above.push(other.ifindex);
                    }
                }
                n += 1;
            }
            others.remove(&own);
            macs.insert(record.ifindex, InterfaceMacs { own, others });
        }
        macs
    }

    /// The device that frames leave by that are routed to a link, and the tags that they get: that
    /// below a VLAN's, or below two. `None` where more tags would be needed.
    pub(super) fn way_down(&self, link: &LinkRecord) -> Option<(u32, Tags)> {
        let mut tags = Tags::default();
        let mut ifindex = link.ifindex;
        let mut link = Some(link);
        while let Some((below, (id, service))) = link.and_then(|l| l.below.zip(l.vlan)) {
            // From the inside out: what was the outer tag is behind the next one.
            if tags.inner != 0 || tags.service || id == 0 {
                return None;
            }
            tags = Tags { outer: id, inner: tags.outer, service };
            ifindex = below;
            link = self.links.get(&below);
        }
        Some((ifindex, tags))
    }

    /// A link's IPv6 link-local address, if it has one that can be used.
    pub(super) fn link_local(&self, ifindex: u32) -> Option<IpAddr> {
        let usable = self.addresses.iter().find(|(key, record)| {
            let link_local =
                matches!(key.address, IpAddr::V6(address) if address.is_unicast_link_local());
            key.ifindex == ifindex && link_local && settled(record.flags)
        });
        usable.map(|(key, _)| key.address)
    }

    /// The addresses of this host and the interfaces that have them.
    pub(super) fn host_addresses(&self) -> BTreeSet<(IpAddr, u32)> {
        self.addresses.keys().map(|key| (key.address, key.ifindex)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> NeighbourKey {
        NeighbourKey { ifindex: 3, address: "10.0.0.2".parse().unwrap() }
    }

    fn neighbour(state: NeighbourState, mac: Option<[u8; 6]>) -> Message {
        Message::Neighbour(key(), Neighbour { state, mac })
    }

    fn link(up: bool, name: &str) -> Message {
        Message::Link(LinkRecord {
            ifindex: 3,
            name: name.to_owned(),
            up,
            running: up,
            mac: Some([2; 6]),
            mtu: 1500,
            below: None,
            master: None,
            vlan: None,
        })
    }

    #[test]
    fn ageing_is_not_news_and_a_new_mac_is() {
        let mut tables = Tables::default();
        assert!(tables.apply(neighbour(NeighbourState::Reachable, Some([1; 6]))).published);
        for state in [NeighbourState::Stale, NeighbourState::Delay, NeighbourState::Probe] {
            assert!(!tables.apply(neighbour(state, Some([1; 6]))).published);
            assert_eq!(tables.mac(key()), Some([1; 6]));
        }
        assert!(tables.apply(neighbour(NeighbourState::Reachable, Some([9; 6]))).published);
        assert_eq!(tables.mac(key()), Some([9; 6]));
    }

    #[test]
    fn a_silent_neighbour_stays_silent_while_asked_again() {
        let mut tables = Tables::default();
        tables.apply(neighbour(NeighbourState::Reachable, Some([1; 6])));
        // A failed entry may keep the address that no longer answers.
        assert!(tables.apply(neighbour(NeighbourState::Failed, Some([1; 6]))).published);
        assert_eq!((tables.mac(key()), tables.trouble(key())), (None, Some(Trouble::Silent)));
        assert!(!tables.apply(neighbour(NeighbourState::Incomplete, None)).published);
        assert!(!tables.apply(Message::NeighbourGone(key())).published);
        assert_eq!(tables.trouble(key()), Some(Trouble::Silent));
        assert!(tables.apply(neighbour(NeighbourState::Reachable, Some([1; 6]))).published);
        assert_eq!(tables.trouble(key()), None);
    }

    #[test]
    fn links_are_known_by_their_present_name() {
        let mut tables = Tables::default();
        let names = BTreeSet::from(["eth0".to_owned(), "eth1".to_owned()]);
        assert_eq!(tables.apply(link(true, "eth0")).stale, Stale::All);
        assert_eq!(tables.apply(link(true, "eth0")), Effect::default());
        assert_eq!(tables.links_named(&names)["eth0"].map(|link| link.ifindex), Some(3));
        let renamed = tables.apply(link(true, "eth1"));
        assert_eq!((renamed.published, renamed.stale), (true, Stale::Nothing));
        assert_eq!(tables.links_named(&names)["eth0"], None);
        assert!(tables.links_named(&names)["eth1"].is_some());
        assert_eq!(tables.apply(link(false, "eth1")).stale, Stale::All);
        tables.apply(neighbour(NeighbourState::Permanent, Some([1; 6])));
        assert!(tables.apply(Message::LinkGone(3)).published);
        assert_eq!(tables.mac(key()), None);
        assert_eq!(tables.links_named(&names)["eth1"], None);
    }

    #[test]
    fn an_address_that_is_merely_renewed_is_not_news() {
        let mut tables = Tables::default();
        let key =
            AddressKey { address: "2001:db8::1".parse().unwrap(), ifindex: 3, prefix_len: 64 };
        let address = |flags| Message::Address(key, AddressRecord { flags, protocol: 0 });
        assert!(tables.apply(address(0x40)).published);
        assert!(tables.apply(address(0)).published, "no longer tentative");
        assert_eq!(tables.apply(address(0x80)), Effect::default());
        assert_eq!(tables.host_addresses(), BTreeSet::from([(key.address, 3)]));
        assert_eq!(tables.apply(Message::AddressGone(key)).stale, Stale::All);
    }

    #[test]
    fn a_tentative_link_local_address_is_none_yet() {
        let mut tables = Tables::default();
        let key = AddressKey { address: "fe80::1".parse().unwrap(), ifindex: 3, prefix_len: 64 };
        for (flags, settled) in [(0x40, false), (0x80, true), (0x48, false)] {
            tables.apply(Message::Address(key, AddressRecord { flags, protocol: 0 }));
            assert_eq!(tables.link_local(3), settled.then_some(key.address));
            assert_eq!(tables.link_local(4), None);
        }
    }

    #[test]
    fn stale_prefixes_add_up_to_all() {
        let prefix = |n: u32| IpNet::new(std::net::Ipv4Addr::from(n << 8).into(), 24).unwrap();
        let mut stale = Stale::default();
        for n in 0..PREFIXES_MAX as u32 {
            stale.add(Stale::Within(vec![prefix(n)]));
            stale.add(Stale::Within(vec![prefix(0)]));
        }
        assert!(stale.covers("0.0.5.1".parse().unwrap()));
        assert!(!stale.covers("10.0.0.1".parse().unwrap()) && !stale.covers("::".parse().unwrap()));
        let some = BTreeSet::from(["10.0.0.1", "::1"].map(|text| text.parse().unwrap()));
        assert!(!stale.touches(&some));
        stale.add(Stale::Within(vec!["10.0.0.0/31".parse().unwrap()]));
        assert!(stale.touches(&some) && !stale.touches(&BTreeSet::new()));
        stale.add(Stale::Within(vec![prefix(PREFIXES_MAX as u32)]));
        assert_eq!(stale, Stale::All);
        stale.add(Stale::Nothing);
        assert!(stale.covers("::".parse().unwrap()));
    }
}
