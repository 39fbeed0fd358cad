//! Networks as people write them, and sets of them by family.

use std::net::{IpAddr, Ipv6Addr};

use canary_ebpf_common::networks::{Prefix, Width, union};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Why a text is no network, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// It is nothing of the kind.
    #[error(
        "`{0}` is not a network: write it as `198.51.100.0/24`, `2001:db8::/32` or as an address"
    )]
    NotANetwork(String),
    /// The prefix is longer than an address.
    #[error("`/{length}` is too long: {family} addresses have {bits} bits")]
    TooLong {
        /// As it is written.
        length: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// Bits of an address.
        bits: u8,
    },
    /// Bits are set that the prefix does not cover.
    #[error(
        "`{given}` has bits beyond its prefix: write `{network}`, or `{address}` for that address alone"
    )]
    HostBits {
        /// As it is written.
        given: String,
        /// The network that it is in.
        network: IpNet,
        /// The address.
        address: IpAddr,
    },
    /// An IPv4 address in IPv6's clothes: no packet comes from one.
    #[error(
        "`{given}` is IPv4-mapped, and no packet comes from such an address: write `{network}`"
    )]
    Mapped {
        /// As it is written.
        given: String,
        /// The IPv4 network.
        network: Ipv4Net,
    },
}

/// Longest text that can be a network, in bytes.
const LONGEST: usize = 64;

/// Reads a network, or an address as the network of itself.
///
/// ```
/// use canary_agent::audience::network::parse;
///
/// assert_eq!(parse("198.51.100.7").unwrap().to_string(), "198.51.100.7/32");
/// let error = parse("198.51.100.7/24").unwrap_err().to_string();
/// assert!(error.contains("write `198.51.100.0/24`"), "{error}");
/// ```
///
/// # Errors
/// What is wrong with the text.
pub fn parse(text: &str) -> Result<IpNet, NetworkError> {
    let shown = || text.chars().take(LONGEST).flat_map(char::escape_debug).collect::<String>();
    let not = || NetworkError::NotANetwork(shown());
    if text.len() > LONGEST {
        return Err(not());
    }
    let (addr, length) = match text.split_once('/') {
        Some((addr, length)) => (addr, Some(length)),
        None => (text, None),
    };
    let addr: IpAddr = addr.parse().map_err(|_| not())?;
    let (family, bits) = match addr {
        IpAddr::V4(_) => ("IPv4", 32),
        IpAddr::V6(_) => ("IPv6", 128),
    };
    let length = match length {
        None => bits,
        Some(digits) if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) => {
            return Err(not());
        }
        Some(digits) => match digits.parse::<u8>() {
            Ok(length) if length <= bits => length,
            _ => return Err(NetworkError::TooLong { length: digits.to_owned(), family, bits }),
        },
    };
    let net = IpNet::new(addr, length).map_err(|_| not())?;
    if net.addr() != net.network() {
        return Err(NetworkError::HostBits { given: shown(), network: net.trunc(), address: addr });
    }
    if let IpNet::V6(v6) = net
        && let Some(network) = mapped(v6)
    {
        return Err(NetworkError::Mapped { given: shown(), network });
    }
    Ok(net)
}

/// The IPv4 network that `net` stands for in `::ffff:0:0/96`.
fn mapped(net: Ipv6Net) -> Option<Ipv4Net> {
    let v4: std::net::Ipv4Addr = Ipv6Addr::to_ipv4_mapped(&net.addr())?;
    Ipv4Net::new(v4, net.prefix_len().checked_sub(96)?).ok()
}

/// The prefix of a network.
pub fn prefix(net: IpNet) -> Prefix {
    Prefix::of(net.network(), net.prefix_len())
}

/// The network of a prefix.
pub fn net(prefix: Prefix, width: Width) -> IpNet {
    let length = prefix.len().min(width.bits());
    // The length is that of an address at most.
    IpNet::new_assert(prefix.addr(width), length)
}

/// A set of addresses of both families, in the fewest networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    v4: Vec<Prefix>,
    v6: Vec<Prefix>,
}

impl Networks {
    /// All of `nets`; what is inside another counts once.
    pub fn new(nets: impl IntoIterator<Item = IpNet>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for net in nets {
            match net {
                IpNet::V4(_) => v4.push(prefix(net)),
                IpNet::V6(_) => v6.push(prefix(net)),
            }
        }
        Self { v4: union(v4), v6: union(v6) }
    }

    /// Those of one family, sorted; none is inside another.
    pub fn of(&self, width: Width) -> &[Prefix] {
        match width {
            Width::V4 => &self.v4,
            Width::V6 => &self.v6,
        }
    }

    /// How many networks there are.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Whether it is nobody.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many addresses of one family there are; as many as can be counted, for all of IPv6.
    pub fn addresses(&self, width: Width) -> u128 {
        let count = |prefix: &Prefix| prefix.addresses(width);
        self.of(width).iter().map(count).fold(0, u128::saturating_add)
    }

    /// The network that an address is in.
    pub fn find(&self, addr: IpAddr) -> Option<IpNet> {
        let width = match addr {
            IpAddr::V4(_) => Width::V4,
            IpAddr::V6(_) => Width::V6,
        };
        let (list, host) = (self.of(width), Prefix::host(addr));
        let at = list.partition_point(|prefix| *prefix <= host).checked_sub(1)?;
        let found = list.get(at).copied()?;
        found.contains(host).then(|| net(found, width))
    }

    /// Both together.
    #[must_use]
    pub fn with(mut self, other: Self) -> Self {
        let Self { v4, v6 } = other;
        self.v4.extend(v4);
        self.v6.extend(v6);
        Self { v4: union(self.v4), v6: union(self.v6) }
    }

    /// The networks, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> + '_ {
        let of = |width| self.of(width).iter().map(move |prefix| net(*prefix, width));
        of(Width::V4).chain(of(Width::V6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_as_they_are_written() {
        for (text, expected) in [
            ("198.51.100.0/24", "198.51.100.0/24"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("198.51.100.7", "198.51.100.7/32"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("2001:DB8::1", "2001:db8::1/128"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_network_says_what_to_write() {
        for (text, error) in [
            ("", "is not a network"),
            ("staff", "is not a network"),
            ("198.51.100.0/", "is not a network"),
            ("198.51.100.0/+8", "is not a network"),
            ("198.51.100.0/24/24", "is not a network"),
            ("198.51.100", "is not a network"),
            ("198.51.100.00/24", "is not a network"),
            ("198.51.100.0/33", "`/33` is too long: IPv4 addresses have 32 bits"),
            ("2001:db8::/129", "`/129` is too long: IPv6 addresses have 128 bits"),
            ("2001:db8::/999999999999", "is too long"),
            ("198.51.100.1/24", "write `198.51.100.0/24`, or `198.51.100.1`"),
            ("2001:db8::1/64", "write `2001:db8::/64`"),
            ("::ffff:198.51.100.0/120", "write `198.51.100.0/24`"),
            ("fe80::1%eth0", "is not a network"),
            ("a\u{1b}[31m", "`a\\u{1b}[31m` is not"),
        ] {
            let found = parse(text).expect_err(text).to_string();
            assert!(found.contains(error), "{text}: {found}");
        }
        assert!(parse(&"1".repeat(1 << 20)).unwrap_err().to_string().len() < 300);
    }

    #[test]
    fn a_set_counts_addresses_once_and_finds_them() {
        let nets = ["10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16", "192.0.2.1/32", "2001:db8::/64"];
        let set = Networks::new(nets.map(|text| parse(text).unwrap()));
        let shown: Vec<String> = set.iter().map(|net| net.to_string()).collect();
        assert_eq!(shown, ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/64"]);
        assert_eq!(set.addresses(Width::V4), (1 << 24) + 1);
        assert_eq!(set.addresses(Width::V6), 1 << 64);
        let find = |text: &str| set.find(text.parse().unwrap()).map(|net| net.to_string());
        assert_eq!(find("10.200.1.1").as_deref(), Some("10.0.0.0/8"));
        assert_eq!(find("192.0.2.1").as_deref(), Some("192.0.2.1/32"));
        assert_eq!(find("2001:db8::5").as_deref(), Some("2001:db8::/64"));
        assert_eq!(
            (find("192.0.2.2"), find("9.255.255.255"), find("2001:db9::")),
            (None, None, None)
        );
    }
}
