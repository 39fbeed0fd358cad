//! Members with a lifetime: addresses that something else vouches for, until it does no more.
//!
//! Times are milliseconds of a clock that neither stops nor jumps; whoever stores members writes
//! down what is left of their lives.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use canary_ebpf_common::networks::{Prefix, Width};
use ipnet::{IpNet, Ipv6Net};

use super::network::{self, NetworkError, prefix};

/// Most members that one request may name.
pub const MAX_BATCH: usize = 10_000;
/// An IPv6 member that is named by its address counts as its network of so many bits: hosts change
/// the rest of their addresses by themselves (RFC 8981).
pub const V6_MEMBER_BITS: u8 = 64;
/// Nobody is a member for longer, unless renewed.
pub const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// Members are people; shorter prefixes, of IPv4 and IPv6, are networks for `cidr`.
const SHORTEST_BITS: [u8; 2] = [16, 32];

/// Why a text names no member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// It is no network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// It is half the world.
    #[error("{0} is too large for a member: networks shorter than /{shortest} belong into `cidr`", shortest = SHORTEST_BITS[usize::from(matches!(.0, IpNet::V6(_)))])]
    TooLarge(IpNet),
}

/// Why members can't be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembersError {
    /// There would be too many.
    #[error(
        "no room for {new} more members: the audience has {present} of at most {room}; nothing has \
         changed"
    )]
    Full {
        /// How many are not members yet.
        new: usize,
        /// How many there are.
        present: usize,
        /// How many there may be.
        room: usize,
    },
    /// Nobody is a member for no time at all, or for ever.
    #[error("nobody is a member for {}: a lifetime is from 1s to 365 days", humantime::format_duration(*.0))]
    Lifetime(Duration),
}

/// What adding did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Added {
    /// Members that were none before.
    pub new: usize,
    /// Members whose lives were prolonged.
    pub renewed: usize,
    /// Members whose lives go on for longer than was asked for: nothing is taken away by adding.
    pub kept: usize,
}

/// The members of one audience.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    until_ms: BTreeMap<IpNet, u64>,
    /// The same by time.
    by_time: BTreeSet<(u64, IpNet)>,
    room: usize,
}

/// Reads a member: a network as it is written, an IPv6 address as its /64. To have one IPv6 address
/// alone, write `/128` behind it.
///
/// ```
/// use canary_agent::audience::members::member;
///
/// assert_eq!(member("2001:db8::1:2").unwrap().to_string(), "2001:db8::/64");
/// assert_eq!(member("2001:db8::1:2/128").unwrap().to_string(), "2001:db8::1:2/128");
/// ```
///
/// # Errors
/// What is wrong with the text.
pub fn member(text: &str) -> Result<IpNet, MemberError> {
    let net = network::parse(text)?;
    let shortest = SHORTEST_BITS[usize::from(matches!(net, IpNet::V6(_)))];
    match net {
        net if net.prefix_len() < shortest => Err(MemberError::TooLarge(net)),
        IpNet::V6(v6) if !text.contains('/') => {
            Ok(Ipv6Net::new_assert(v6.addr(), V6_MEMBER_BITS).trunc().into())
        }
        net => Ok(net),
    }
}

impl Members {
    /// Nobody, with room for `room`.
    pub fn new(room: usize) -> Self {
        Self { until_ms: BTreeMap::new(), by_time: BTreeSet::new(), room }
    }

    /// Changes how many there may be. Nobody goes for it.
    pub fn set_room(&mut self, room: usize) {
        self.room = room;
    }

    /// What adding `nets` until `until_ms` would do.
    pub fn would_add(&self, nets: &BTreeSet<IpNet>, until_ms: u64) -> Added {
        let mut added = Added::default();
        for net in nets {
            match self.until_ms.get(net) {
                None => added.new += 1,
                Some(later) if *later >= until_ms => added.kept += 1,
                Some(_) => added.renewed += 1,
            }
        }
        added
    }

    /// Whether `more` new members would be too many.
    ///
    /// # Errors
    /// They would.
    pub fn has_room(&self, more: usize) -> Result<(), MembersError> {
        let present = self.until_ms.len();
        match more > 0 && present + more > self.room {
            true => Err(MembersError::Full { new: more, present, room: self.room }),
            false => Ok(()),
        }
    }

    /// Makes `net` a member until `until_ms`, unless it is one for longer.
    pub fn put(&mut self, net: IpNet, until_ms: u64) {
        match self.until_ms.get(&net) {
            Some(later) if *later >= until_ms => return,
            Some(earlier) => drop(self.by_time.remove(&(*earlier, net))),
            None => {}
        }
        self.until_ms.insert(net, until_ms);
        self.by_time.insert((until_ms, net));
    }

    /// Ends a membership. Returns until when it was.
    pub fn remove(&mut self, net: IpNet) -> Option<u64> {
        let until_ms = self.until_ms.remove(&net)?;
        self.by_time.remove(&(until_ms, net));
        Some(until_ms)
    }

    /// Until when `net` itself is a member.
    pub fn until_ms(&self, net: IpNet) -> Option<u64> {
        self.until_ms.get(&net).copied()
    }

    /// Ends the memberships whose time is over by `now_ms`. Returns them.
    pub fn expire(&mut self, now_ms: u64) -> Vec<IpNet> {
        let mut expired = Vec::new();
        while let Some((until_ms, net)) = self.by_time.first().copied()
            && until_ms <= now_ms
        {
            self.by_time.pop_first();
            self.until_ms.remove(&net);
            expired.push(net);
        }
        expired
    }

    /// When the next membership ends.
    pub fn next_ms(&self) -> Option<u64> {
        self.by_time.first().map(|(until_ms, _)| *until_ms)
    }

    /// The members, and when each ends.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, u64)> + '_ {
        self.until_ms.iter().map(|(net, until_ms)| (*net, *until_ms))
    }

    /// The member that an address is, or is in, with the longest life.
    pub fn find(&self, addr: std::net::IpAddr) -> Option<(IpNet, u64)> {
        let around = |length| IpNet::new(addr, length).ok().map(|net| net.trunc());
        let around = (0..=128).map_while(around);
        around.filter_map(|net| Some((net, self.until_ms(net)?))).max_by_key(|(_, until)| *until)
    }

    /// How many there may be.
    pub fn room(&self) -> usize {
        self.room
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.until_ms.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.until_ms.is_empty()
    }
}

/// Who is a member now, for the compiler: networks of both families, which may be inside each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Present([OfFamily; 2]);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct OfFamily {
    prefixes: BTreeSet<Prefix>,
    /// How many there are of each length.
    lengths: BTreeMap<u8, usize>,
}

impl Present {
    /// Those of one family, sorted.
    pub fn of(&self, width: Width) -> &BTreeSet<Prefix> {
        &self.0[width as usize].prefixes
    }

    fn of_mut(&mut self, net: IpNet) -> &mut OfFamily {
        &mut self.0[usize::from(matches!(net, IpNet::V6(_)))]
    }

    /// Adds one.
    pub fn insert(&mut self, net: IpNet) {
        let of = self.of_mut(net);
        if of.prefixes.insert(prefix(net)) {
            *of.lengths.entry(net.prefix_len()).or_default() += 1;
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, net: IpNet) {
        let of = self.of_mut(net);
        if of.prefixes.remove(&prefix(net))
            && let Some(count) = of.lengths.get_mut(&net.prefix_len())
        {
            *count -= 1;
            if *count == 0 {
                of.lengths.remove(&net.prefix_len());
            }
        }
    }

    /// What members and the networks of `within` have in common.
    pub fn within(&self, width: Width, within: &[Prefix]) -> Vec<Prefix> {
        let OfFamily { prefixes, lengths } = &self.0[width as usize];
        let mut both = Vec::new();
        for part in within {
            let mut around = lengths.range(..part.len());
            if around.any(|(len, _)| prefixes.contains(&Prefix::new(part.bits(), *len))) {
                both.push(*part);
                continue;
            }
            both.extend(prefixes.range(part..).take_while(|network| part.contains(**network)));
        }
        both
    }
}

/// How long a member lives that is asked for `ttl`.
///
/// # Errors
/// For no time, or for ever.
pub fn lifetime_ms(ttl: Duration) -> Result<u64, MembersError> {
    match ttl {
        ttl if ttl < Duration::from_secs(1) || ttl > LONGEST => Err(MembersError::Lifetime(ttl)),
        ttl => Ok(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
        texts.iter().map(|text| member(text).unwrap()).collect()
    }

    #[test]
    fn members_come_are_renewed_and_go() {
        let mut members = Members::new(3);
        let [a, b] = ["192.0.2.1", "192.0.2.2"];
        let both = nets(&[a, b]);
        assert_eq!(members.would_add(&both, 6000), Added { new: 2, ..Added::default() });
        both.iter().for_each(|net| members.put(*net, 6000));
        let one = *both.first().unwrap();
        let later = Added { renewed: 1, new: 0, kept: 1 };
        members.put(one, 11_000);
        assert_eq!(members.would_add(&both, 9000), later);
        members.put(one, 9000);
        assert_eq!(members.until_ms(one), Some(11_000), "nothing is taken away by adding");
        assert_eq!(members.next_ms(), Some(6000));
        assert!(members.expire(5999).is_empty());
        assert_eq!(members.expire(6000), nets(&[b]).into_iter().collect::<Vec<_>>());
        assert_eq!((members.remove(one), members.remove(one)), (Some(11_000), None));
        assert!(members.is_empty() && members.next_ms().is_none());
    }

    #[test]
    fn there_is_room_for_so_many_and_who_is_there_needs_none() {
        let mut members = Members::new(2);
        nets(&["192.0.2.1", "192.0.2.2"]).into_iter().for_each(|net| members.put(net, 10));
        assert_eq!(members.has_room(0), Ok(()));
        assert_eq!(members.has_room(1), Err(MembersError::Full { new: 1, present: 2, room: 2 }));
        assert_eq!(members.expire(10).len(), 2);
        assert_eq!(members.has_room(2), Ok(()));
        // Fewer are allowed now; nobody goes for it.
        nets(&["192.0.2.1", "192.0.2.2"]).into_iter().for_each(|net| members.put(net, 10));
        members.set_room(1);
        assert_eq!((members.len(), members.has_room(0)), (2, Ok(())));
        assert!(members.has_room(1).is_err());
        for (ttl, fits) in [(0, false), (999, false), (1000, true), (u64::MAX, false)] {
            assert_eq!(lifetime_ms(Duration::from_millis(ttl)).is_ok(), fits, "{ttl}");
        }
    }

    #[test]
    fn an_address_of_ipv6_counts_as_its_network() {
        let of = |text: &str| member(text).map(|net| net.to_string());
        assert_eq!(of("2001:db8::1:2").unwrap(), "2001:db8::/64");
        assert_eq!(of("2001:db8::1:2/128").unwrap(), "2001:db8::1:2/128");
        assert_eq!(of("2001:db8::/56").unwrap(), "2001:db8::/56");
        assert_eq!(of("192.0.2.1").unwrap(), "192.0.2.1/32");
        for (text, why) in [
            ("0.0.0.0/0", "shorter than /16"),
            ("10.0.0.0/15", "shorter than /16"),
            ("2001::/31", "shorter than /32"),
            ("192.0.2.1/24", "bits beyond its prefix"),
            ("beta", "is not a network"),
        ] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    proptest! {
        /// Against a plain list.
        #[test]
        fn nobody_stays_longer_or_goes_sooner(
            steps in proptest::collection::vec((0_u8..16, 0_u64..40, 1_u64..100, any::<bool>()), 1..60)
        ) {
            let (mut members, mut list, mut now) = (Members::new(100), BTreeMap::new(), 0);
            for (last, wait, ttl, remove) in steps {
                now += wait;
                let net = member(&format!("192.0.2.{last}")).unwrap();
                members.expire(now);
                list.retain(|_, until| *until > now);
                if remove {
                    prop_assert_eq!(members.remove(net), list.remove(&net));
                } else {
                    members.put(net, now + ttl);
                    let until = list.entry(net).or_insert(0);
                    *until = (now + ttl).max(*until);
                }
                prop_assert!(members.iter().eq(list.iter().map(|(net, until)| (*net, *until))));
                prop_assert_eq!(members.next_ms(), list.values().min().copied());
            }
        }
    }
}
