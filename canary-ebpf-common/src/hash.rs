//! The bucket hash: which of a service's buckets a packet falls into.
//!
//! A keyed multiply–xorshift mix. It spreads real tuple patterns evenly (see
//! the tests) and hides the mapping from those who do not know the key; it is
//! no cryptographic hash.

use crate::abi::{Address, SERVICE_HASH_CONNECTION, Service};

pub(crate) const M1: u64 = 0x9e37_79b9_7f4a_7c15;
pub(crate) const M2: u64 = 0xbf58_476d_1ce4_e5b9;
pub(crate) const M3: u64 = 0x94d0_49bb_1331_11eb;

/// All ones where the service hashes whole connections, else zero.
#[inline(always)]
const fn connection_mask(service: &Service) -> u64 {
    if service.flags & SERVICE_HASH_CONNECTION != 0 { u64::MAX } else { 0 }
}

/// Source port, destination port and protocol in one word.
#[inline(always)]
const fn transport_word(src_port_be: u16, dst_port_be: u16, protocol: u8) -> u64 {
    (src_port_be as u64) << 24 | (dst_port_be as u64) << 8 | protocol as u64
}

/// Hash of an IPv4 packet from a client. Its low bits are the bucket.
#[inline(always)]
pub const fn hash_v4(
    service: &Service,
    src_be: u32,
    dst_be: u32,
    src_port_be: u16,
    dst_port_be: u16,
    protocol: u8,
) -> u64 {
    let whole = connection_mask(service);
    let addresses = ((src_be & service.mask_v4_be) as u64) << 32 | dst_be as u64 & whole;
    let transport = transport_word(src_port_be, dst_port_be, protocol) & whole;
    let mut h = (addresses ^ service.hash_key[0]).wrapping_mul(M1);
    h ^= h >> 32;
    h = (h ^ transport ^ service.hash_key[1]).wrapping_mul(M2);
    h ^= h >> 29;
    h = h.wrapping_mul(M3);
    h ^ h >> 32
}

/// Hash of an IPv6 packet from a client. Its low bits are the bucket.
#[inline(always)]
pub const fn hash_v6(
    service: &Service,
    src: Address,
    dst: Address,
    src_port_be: u16,
    dst_port_be: u16,
    protocol: u8,
) -> u64 {
    let whole = connection_mask(service);
    let mut h = ((src[0] & service.mask_v6[0]) ^ service.hash_key[0]).wrapping_mul(M1);
    h ^= h >> 32;
    h = (h ^ (src[1] & service.mask_v6[1]) ^ service.hash_key[1]).wrapping_mul(M2);
    h ^= h >> 29;
    let rest = dst[0]
        ^ dst[1].rotate_left(17)
        ^ transport_word(src_port_be, dst_port_be, protocol).rotate_left(23);
    h = (h ^ (rest & whole)).wrapping_mul(M3);
    h ^= h >> 32;
    h = h.wrapping_mul(M1);
    h ^ h >> 32
}

/// The bucket that a hash falls into.
#[inline(always)]
pub const fn bucket(service: &Service, hash: u64) -> u32 {
    hash as u32 & service.bucket_mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::ForwardMode;

    fn service(flags: u32) -> Service {
        Service {
            bucket_mask: 0xffff,
            flags: flags | ForwardMode::Dsr as u32,
            hash_key: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
            mask_v4_be: u32::MAX,
            mask_v6: [u64::MAX; 2],
            ..Service::default()
        }
    }

    /// χ² of `hashes` over `cells` cells, in standard deviations from its mean.
    fn chi_square_sigmas(hashes: impl Iterator<Item = u64>, cells: usize) -> f64 {
        let mut counts = vec![0_u32; cells];
        let mut n = 0_u32;
        for h in hashes {
            counts[h as usize & (cells - 1)] += 1;
            n += 1;
        }
        let expected = f64::from(n) / cells as f64;
        let chi: f64 = counts.iter().map(|c| (f64::from(*c) - expected).powi(2) / expected).sum();
        let freedom = cells as f64 - 1.0;
        (chi - freedom) / (2.0 * freedom).sqrt()
    }

    fn v6(address: u128) -> [u64; 2] {
        let b = address.to_be_bytes();
        [
            u64::from_ne_bytes(b[..8].try_into().unwrap()),
            u64::from_ne_bytes(b[8..].try_into().unwrap()),
        ]
    }

    #[test]
    fn real_tuple_patterns_spread_evenly() {
        let (c, s) = (service(SERVICE_HASH_CONNECTION), service(0));
        let vip = 0xcb00_710a_u32.to_be();
        let port = 443_u16.to_be();
        let n = 1_000_000_u32;
        let mut seed = 1_u128;
        let mut privacy = Vec::new();
        for _ in 0..n {
            seed = seed.wrapping_mul(0xda94_2042_e4dd_58b5_u128 | 1 << 64).wrapping_add(1);
            privacy.push(0x2001_0db8_0001_0002_u128 << 64 | seed >> 64);
        }
        let patterns: [(&str, Vec<u64>); 7] = [
            (
                "sequential ports of one client",
                (0..60_000_u16).map(|p| hash_v4(&c, 1, vip, (1024 + p).to_be(), port, 6)).collect(),
            ),
            (
                "one /24, 4000 ports each",
                (0..256 * 4000_u32)
                    .map(|i| {
                        hash_v4(
                            &c,
                            (0x0a00_0000 | i & 255).to_be(),
                            vip,
                            ((i >> 8) as u16 + 1024).to_be(),
                            port,
                            6,
                        )
                    })
                    .collect(),
            ),
            (
                "sequential clients",
                (0..n).map(|i| hash_v4(&s, (0x0a00_0000 + i).to_be(), vip, 1, port, 6)).collect(),
            ),
            (
                "one client of each /24",
                (0..n).map(|i| hash_v4(&s, (i << 8 | 1).to_be(), vip, 1, port, 6)).collect(),
            ),
            (
                "IPv6 privacy addresses in one /64",
                privacy.iter().map(|a| hash_v6(&s, v6(*a), v6(1), 1, port, 6)).collect(),
            ),
            (
                "IPv6 sequential /64s",
                (0..n)
                    .map(|i| {
                        hash_v6(
                            &s,
                            v6((0x2001_0db8_u128 << 32 | u128::from(i)) << 64 | 1),
                            v6(1),
                            1,
                            port,
                            6,
                        )
                    })
                    .collect(),
            ),
            (
                "IPv6 sequential ports",
                (0..60_000_u16)
                    .map(|p| hash_v6(&c, v6(7), v6(1), (1024 + p).to_be(), port, 6))
                    .collect(),
            ),
        ];
        for (name, hashes) in patterns {
            for bits in [6, 10, 12] {
                let sigmas = chi_square_sigmas(hashes.iter().copied(), 1 << bits);
                assert!(sigmas < 5.0, "{name}: {bits} bits: {sigmas:.1} sigmas above uniform");
            }
        }
    }

    #[test]
    fn each_input_bit_flips_half_of_the_bucket_bits() {
        let s = service(SERVICE_HASH_CONNECTION);
        for bit in 0..64 {
            let mut flips = 0;
            for i in 0..2_000_u64 {
                let x = i.wrapping_mul(M3);
                let base = hash_v4(&s, x as u32, 9, (x >> 32) as u16, 443, 6);
                let y = x ^ 1 << bit;
                if bit >= 48 {
                    continue;
                }
                let other = hash_v4(&s, y as u32, 9, (y >> 32) as u16, 443, 6);
                flips += ((base ^ other) as u16).count_ones();
            }
            if bit < 48 {
                let mean = f64::from(flips) / 2_000.0;
                assert!((7.0..9.0).contains(&mean), "bit {bit}: {mean} of 16 bucket bits flip");
            }
        }
    }

    #[test]
    fn clients_chosen_to_meet_under_one_key_are_spread_by_another() {
        let known = service(0);
        let [first, second] = known.hash_key;
        let secret = Service { hash_key: [first ^ 0x5bd1_e995, second ^ 0x9e37_79b1], ..known };
        let of = |service: &Service, client: u32| {
            bucket(service, hash_v4(service, client.to_be(), 0, 0, 0, 6))
        };
        // What somebody finds who knows the key: clients of one bucket in 256.
        let meeting: Vec<u32> = (0x0a00_0000_u32..)
            .filter(|client| of(&known, *client) & 0xff == 7)
            .take(4_096)
            .collect();
        let spread = meeting.iter().map(|client| u64::from(of(&secret, *client)));
        let sigmas = chi_square_sigmas(spread, 256);
        assert!(sigmas.abs() < 5.0, "{sigmas} sigmas");
    }

    #[test]
    fn a_client_has_one_bucket_on_all_ports_and_addresses_of_a_family() {
        let s = service(0);
        let h = hash_v4(&s, 5, 1, 2, 3, 6);
        assert_eq!(h, hash_v4(&s, 5, 99, 77, 88, 17));
        let h = hash_v6(&s, [5, 6], [1, 1], 2, 3, 6);
        assert_eq!(h, hash_v6(&s, [5, 6], [9, 8], 77, 88, 17));
    }

    #[test]
    fn doubling_the_buckets_keeps_or_adds_the_old_number() {
        let mut s = service(0);
        for i in 0..1000 {
            let h = hash_v4(&s, i, 0, 0, 0, 6);
            s.bucket_mask = 0xffff;
            let old = bucket(&s, h);
            s.bucket_mask = 0x1_ffff;
            assert_eq!(bucket(&s, h) & 0xffff, old);
        }
    }
}
