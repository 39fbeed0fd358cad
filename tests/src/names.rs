//! The cast: names of the hosts that packets in cases go between.
//!
//! `client`, `client2`, …; `vip`, `vip2`, …; backends `b1`, `b2`, …; `nat`, the
//! balancer's address towards backends; `us`, the balancer; `gw`, another
//! router before the clients; `all`, everybody on the link. Each has a MAC
//! address and an address of either family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A MAC address.
pub type Mac = [u8; 6];

/// One of the cast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// A client by its number, from 1.
    Client(u16),
    /// A virtual address by its number, from 1.
    Vip(u16),
    /// A backend by its number, from 1.
    Backend(u16),
    /// The source of translated packets.
    Nat,
    /// The balancer.
    Us,
    /// A second router before the clients.
    Gateway,
    /// Everybody on the link.
    All,
}

impl Host {
    /// Who goes by `name`.
    pub fn named(name: &str) -> Option<Self> {
        let numbered = |prefix: &str| -> Option<u16> {
            match name.strip_prefix(prefix)? {
                "" if prefix != "b" => Some(1),
                digits => digits.parse().ok().filter(|n| *n > 0),
            }
        };
        Some(match name {
            "nat" => Self::Nat,
            "us" => Self::Us,
            "gw" => Self::Gateway,
            "all" => Self::All,
            _ => {
                if let Some(n) = numbered("client") {
                    Self::Client(n)
                } else if let Some(n) = numbered("vip") {
                    Self::Vip(n)
                } else {
                    Self::Backend(numbered("b")?)
                }
            }
        })
    }

    /// Its name.
    pub fn name(self) -> String {
        let numbered = |prefix: &str, n: u16| match n {
            1 => prefix.to_owned(),
            n => format!("{prefix}{n}"),
        };
        match self {
            Self::Client(n) => numbered("client", n),
            Self::Vip(n) => numbered("vip", n),
            Self::Backend(n) => format!("b{n}"),
            Self::Nat => "nat".to_owned(),
            Self::Us => "us".to_owned(),
            Self::Gateway => "gw".to_owned(),
            Self::All => "all".to_owned(),
        }
    }

    /// Its MAC address.
    pub const fn mac(self) -> Mac {
        let (kind, n) = self.numbers();
        let [high, low] = n.to_be_bytes();
        match self {
            Self::All => [0xff; 6],
            _ => [2, 0, 0, kind, high, low],
        }
    }

    /// Its IPv4 address.
    pub const fn v4(self) -> Ipv4Addr {
        let [high, low] = self.numbers().1.to_be_bytes();
        match self {
            Self::Client(_) => Ipv4Addr::new(10, 9, high, low),
            Self::Vip(n) => Ipv4Addr::new(10, 1, 0, 99_u8.wrapping_add(n as u8)),
            Self::Backend(_) => Ipv4Addr::new(10, 2, high.wrapping_add(1), low),
            Self::Nat => Ipv4Addr::new(10, 2, 0, 1),
            Self::Us => Ipv4Addr::new(10, 1, 0, 1),
            Self::Gateway => Ipv4Addr::new(10, 1, 0, 254),
            Self::All => Ipv4Addr::BROADCAST,
        }
    }

    /// Its IPv6 address.
    pub const fn v6(self) -> Ipv6Addr {
        let n = self.numbers().1;
        match self {
            Self::Client(_) => Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, n),
            Self::Vip(_) => Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, n.wrapping_add(0xff)),
            Self::Backend(_) => Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 1, n),
            Self::Nat => Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1),
            Self::Us => Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1),
            Self::Gateway => Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0xfe),
            Self::All => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
        }
    }

    /// A number for its kind and its number within.
    const fn numbers(self) -> (u8, u16) {
        match self {
            Self::Us => (0, 1),
            Self::Gateway => (0, 0xfe),
            Self::Nat => (0, 2),
            Self::All => (0, 0),
            Self::Backend(n) => (1, n),
            Self::Vip(n) => (2, n),
            Self::Client(n) => (9, n),
        }
    }

    /// Who has this MAC address.
    pub fn with_mac(mac: Mac) -> Option<Self> {
        let n = u16::from_be_bytes([mac[4], mac[5]]);
        [
            Self::Us,
            Self::Gateway,
            Self::Nat,
            Self::All,
            Self::Backend(n),
            Self::Vip(n),
            Self::Client(n),
        ]
        .into_iter()
        .find(|host| host.mac() == mac)
    }

    /// Who has this address.
    pub fn with_addr(addr: IpAddr) -> Option<Self> {
        let n = match addr {
            IpAddr::V4(v4) => u16::from_be_bytes([v4.octets()[2], v4.octets()[3]]),
            IpAddr::V6(v6) => v6.segments()[7],
        };
        let mut candidates = vec![Self::Us, Self::Gateway, Self::Nat, Self::All, Self::Client(n)];
        candidates.push(Self::Backend(if addr.is_ipv4() { n.wrapping_sub(0x100) } else { n }));
        candidates.extend((1..=8).map(Self::Vip));
        candidates.into_iter().find(|host| match addr {
            IpAddr::V4(v4) => host.v4() == v4,
            IpAddr::V6(v6) => host.v6() == v6,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_is_found_by_name_and_by_each_address() {
        let cast = [
            "client",
            "client2",
            "client300",
            "vip",
            "vip2",
            "b1",
            "b2",
            "b300",
            "nat",
            "us",
            "gw",
            "all",
        ];
        for name in cast {
            let host = Host::named(name).unwrap();
            assert_eq!(host.name(), name);
            assert_eq!(Host::with_mac(host.mac()), Some(host));
            assert_eq!(Host::with_addr(host.v4().into()), Some(host));
            assert_eq!(Host::with_addr(host.v6().into()), Some(host));
        }
        for nobody in ["", "b", "b0", "bob", "client0", "10.0.0.1"] {
            assert_eq!(Host::named(nobody), None, "{nobody}");
        }
    }
}
