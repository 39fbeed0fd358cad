//! How much a bucket wants a backend: weighted rendezvous hashing.
//!
//! Owns the hashes of the table compiler. Every host of a fleet, x86-64 or aarch64, must
//! compute the same bits, so there are only integers and the basic operations of IEEE 754
//! (`+ − × ÷`, comparison, conversion), which are exact to the last bit everywhere; no
//! `ln` of the platform, no fused multiply-add.
//!
//! Rendezvous hashing: Thaler and Ravishankar, *Using name-based mappings to increase hit
//! rates* (IEEE/ACM ToN 1998). With weights, a bucket wants the backend with the least
//! −ln(1 − v) / weight, v uniform in [0, 1): the first of exponential clocks that run at the
//! rates of the weights, so each wins in proportion to its weight.

use std::net::SocketAddr;

/// Mixes 64 bits so that every input bit reaches every output bit; a bijection.
///
/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
pub(super) const fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// What a backend is known by, on every host: a hash of its address and port.
///
/// An IPv4 address and the same one mapped into IPv6 are one server. The zone of a
/// link-local address does not count: interfaces are numbered differently on every host.
pub fn identity(addr: &SocketAddr) -> u64 {
    let ip = match addr.ip() {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        std::net::IpAddr::V6(v6) => v6,
    };
    let bits = u128::from(ip);
    mix(mix(mix((bits >> 64) as u64) ^ bits as u64) ^ u64::from(addr.port()))
}

/// The hashed form of a bucket's number.
#[derive(Clone, Copy)]
pub(super) struct BucketKey(u64);

impl BucketKey {
    pub(super) fn new(bucket: u32) -> Self {
        Self(mix(u64::from(bucket) ^ 0x6275_636b_6574_7300))
    }
}

/// The hashed form of a backend's identity.
#[derive(Clone, Copy)]
pub(super) struct BackendKey(u64, u64);

impl BackendKey {
    pub(super) fn new(identity: u64) -> Self {
        let first = mix(identity);
        Self(first, mix(first))
    }
}

/// The draw of a pair: uniform over 64 bits. The least wins among equal weights.
///
/// Both keys are well mixed already; one wide multiplication, folded, mixes them with each
/// other (as in wyhash) at a nanosecond a pair.
#[inline(always)]
pub(super) fn draw(bucket: BucketKey, backend: BackendKey) -> u64 {
    let product =
        u128::from(bucket.0 ^ backend.0) * u128::from(bucket.0.rotate_left(32) ^ backend.1);
    product as u64 ^ (product >> 64) as u64
}

/// The draw as v in [0, 1), in steps of 2⁻⁵²: put together as a number in [1, 2), which is
/// quicker than a conversion.
#[inline(always)]
pub(super) fn unit(draw: u64) -> f64 {
    f64::from_bits(1023 << 52 | draw >> 12) - 1.0
}

/// −ln(1 − v) for v in [0, 1), to about one part in 10¹⁵, by the series of the inverse
/// hyperbolic tangent.
pub(super) fn exponential(v: f64) -> f64 {
    use std::f64::consts::{LN_2, SQRT_2};
    let y = 1.0 - v; // exact: v is a multiple of 2⁻⁵²
    let bits = y.to_bits();
    // y = m · 2^e, m in [1, 2); y is normal, at least 2⁻⁵².
    let mut e = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if m > SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    // ln m = 2 artanh s, |s| < 0.172.
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut series = 1.0 / 19.0;
    for denominator in [17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * square + 1.0 / denominator;
    }
    -(f64::from(e) * LN_2 + 2.0 * s * series)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_that_of_the_library_to_a_part_in_a_million_million() {
        let mut worst = 0.0_f64;
        for i in 1..200_000_u64 {
            for v in [unit(mix(i)), unit(mix(i) >> 20), unit(i << 12), 1.0 - unit(i << 12)] {
                let exact = -(-v).ln_1p();
                worst = worst.max((exponential(v) - exact).abs() / exact);
            }
        }
        assert!(worst < 1e-12, "{worst:e}");
        assert_eq!(exponential(0.0), 0.0);
    }

    #[test]
    fn identities_are_those_of_addresses_and_ports() {
        let of = |text: &str| identity(&text.parse().unwrap());
        assert_eq!(of("10.0.0.1:80"), of("[::ffff:10.0.0.1]:80"));
        assert_eq!(of("[fe80::1%2]:80"), of("[fe80::1%3]:80"));
        assert_ne!(of("10.0.0.1:80"), of("10.0.0.1:81"));
        assert_ne!(of("10.0.0.1:80"), of("10.0.0.2:80"));
        assert_ne!(of("[2001:db8::1]:80"), of("[2001:db8:0:1::]:80"));
    }

    #[test]
    fn draws_of_two_backends_are_uniform_and_independent() {
        // Chi-squared over 16 × 16 cells for many pairs of backends: 255 degrees of
        // freedom, so above 400 has a chance of about one in a hundred million.
        for pair in 0..50_u64 {
            let [a, b] = [BackendKey::new(2 * pair), BackendKey::new(2 * pair + 1)];
            let mut cells = [0_u32; 256];
            for bucket in 0..65_536 {
                let key = BucketKey::new(bucket);
                cells[(draw(key, a) >> 60 << 4 | draw(key, b) >> 60) as usize] += 1;
            }
            let chi: f64 = cells.iter().map(|&n| (f64::from(n) - 256.0).powi(2) / 256.0).sum();
            assert!(chi < 400.0, "pair {pair}: {chi}");
        }
    }
}
