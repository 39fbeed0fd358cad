//! One network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What sets the families apart here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Width {
    /// IPv4: 32 bits.
    V4,
    /// IPv6: 128 bits.
    V6,
}

impl Width {
    /// Bits of an address.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// Length of the networks of which a bitmap says whether any of their addresses has a value.
    ///
    /// No value is given to a whole network of this length that has none in truth: what is written
    /// down shorter would make every packet from there look further.
    pub const fn block_bits(self) -> u8 {
        match self {
            Self::V4 => 16,
            Self::V6 => 32,
        }
    }
}

/// A network: the first `len` bits of its addresses, from the highest bit down.
///
/// Ordered as a walk through a tree meets them: a network comes before those inside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    bits: u128,
    len: u8,
}

impl Prefix {
    /// Every address.
    pub const ALL: Self = Self { bits: 0, len: 0 };

    /// The network of `len` bits that `bits` is in.
    pub const fn new(bits: u128, len: u8) -> Self {
        let len = if len > 128 { 128 } else { len };
        Self { bits: bits & mask(len), len }
    }

    /// The network of `len` bits that `addr` is in; longer than an address is one address.
    pub const fn of(addr: IpAddr, len: u8) -> Self {
        let width = match addr {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        Self::new(bits_of(addr), if len > width { width } else { len })
    }

    /// The one address.
    pub const fn host(addr: IpAddr) -> Self {
        Self::of(addr, 128)
    }

    /// Its first address, as a number whose highest bit is the address's first.
    pub const fn bits(self) -> u128 {
        self.bits
    }

    /// How many bits its addresses share.
    #[expect(clippy::len_without_is_empty, reason = "the length of a prefix, not of a collection")]
    pub const fn len(self) -> u8 {
        self.len
    }

    /// Its first address.
    pub const fn addr(self, width: Width) -> IpAddr {
        match width {
            Width::V4 => IpAddr::V4(Ipv4Addr::from_bits((self.bits >> 96) as u32)),
            Width::V6 => IpAddr::V6(Ipv6Addr::from_bits(self.bits)),
        }
    }

    /// Its last address, as [`bits`](Self::bits).
    pub const fn last(self) -> u128 {
        self.bits | !mask(self.len)
    }

    /// Whether `other` is it, or inside it.
    pub const fn contains(self, other: Self) -> bool {
        other.len >= self.len && (other.bits ^ self.bits) & mask(self.len) == 0
    }

    /// The half of it whose next bit is `one`; itself where there is none.
    pub const fn half(self, one: bool) -> Self {
        if self.len >= 128 {
            return self;
        }
        let bit = if one { 1 << (127 - self.len) } else { 0 };
        Self { bits: self.bits | bit, len: self.len + 1 }
    }

    /// The other half of the network that it is a half of; itself where there is none.
    pub const fn sibling(self) -> Self {
        if self.len == 0 {
            return self;
        }
        Self { bits: self.bits ^ 1 << (128 - self.len), len: self.len }
    }

    /// The longest network that has both in it.
    pub const fn around(self, other: Self) -> Self {
        let shared = (self.bits ^ other.bits).leading_zeros() as u8;
        let shorter = if self.len < other.len { self.len } else { other.len };
        Self::new(self.bits, if shared < shorter { shared } else { shorter })
    }

    /// How many addresses it has, of those of `width`; as many as can be counted, for all of IPv6.
    pub const fn addresses(self, width: Width) -> u128 {
        match width.bits().saturating_sub(self.len) {
            128 => u128::MAX,
            free => 1 << free,
        }
    }
}

/// An address as a number whose highest bit is the address's first.
pub(super) const fn bits_of(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(v4) => (v4.to_bits() as u128) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// Ones in the first `len` bits.
const fn mask(len: u8) -> u128 {
    match 128_u8.saturating_sub(len) {
        128 => 0,
        free => u128::MAX << free,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        let (addr, len) = text.split_once('/').unwrap();
        Prefix::of(addr.parse().unwrap(), len.parse().unwrap())
    }

    #[test]
    fn halves_siblings_and_what_is_around() {
        for (whole, low, high) in [
            ("0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"),
            ("10.0.0.0/8", "10.0.0.0/9", "10.128.0.0/9"),
            ("192.0.2.6/31", "192.0.2.6/32", "192.0.2.7/32"),
            ("2001:db8::/32", "2001:db8::/33", "2001:db8:8000::/33"),
            ("::/0", "::/1", "8000::/1"),
        ] {
            let (whole, low, high) = (prefix(whole), prefix(low), prefix(high));
            assert_eq!((whole.half(false), whole.half(true)), (low, high));
            assert_eq!((low.sibling(), high.sibling()), (high, low));
            assert_eq!(low.around(high), whole);
            assert!(whole.contains(low) && whole.contains(high) && !low.contains(whole));
            assert!(whole < low && low < high);
        }
        assert_eq!(prefix("10.1.2.3/8"), prefix("10.0.0.0/8"));
        assert_eq!(prefix("10.0.0.0/8").around(prefix("10.1.0.0/16")), prefix("10.0.0.0/8"));
    }

    #[test]
    fn addresses_are_counted() {
        for (text, width, count) in [
            ("0.0.0.0/0", Width::V4, 1 << 32),
            ("192.0.2.0/24", Width::V4, 256),
            ("192.0.2.1/32", Width::V4, 1),
            ("2001:db8::/64", Width::V6, 1 << 64),
            ("::/0", Width::V6, u128::MAX),
            ("::1/128", Width::V6, 1),
        ] {
            assert_eq!(prefix(text).addresses(width), count, "{text}");
        }
        assert_eq!(prefix("192.0.2.0/24").last() >> 96, 0xc000_02ff);
    }
}
