//! How often each peer may ask.
//!
//! A token bucket for each uid on the control socket and for each address on the TCP listener.
//! Pure: time is given. Must not know of connections.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

/// How many requests there may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// In a second, for as long as one likes.
    pub per_second: f64,
    /// At once, after a pause.
    pub burst: f64,
}

/// Whoever is counted by himself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Who {
    /// A user of this host.
    User(u32),
    /// An IPv4 address, or the /64 of an IPv6 one.
    Network(IpAddr),
    /// Those for whom there is no room.
    Others,
}

impl Who {
    /// Whoever is at an address. A host has a /64 to itself, so addresses in it are nothing
    /// to count by.
    pub(super) fn at(address: IpAddr) -> Self {
        const NETWORK: u128 = !0 << 64;
        Self::Network(match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & NETWORK).into()),
            v4 => v4,
        })
    }
}

/// Peers that are counted by themselves, at most.
const PEERS: usize = 1_024;

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

/// What is left to each peer.
#[derive(Debug, Default)]
pub(super) struct Rates(HashMap<Who, Bucket>);

impl Rates {
    /// Takes a request of `who` in. `Err` says how long to wait.
    pub(super) fn ask(&mut self, who: Who, rate: Rate, now: Instant) -> Result<(), Duration> {
        let who = self.place(who, rate, now);
        let bucket = self.0.entry(who).or_insert(Bucket { tokens: rate.burst, at: now });
        bucket.tokens = bucket.filled(rate, now);
        bucket.at = now;
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - bucket.tokens) / rate.per_second))
    }

    /// Makes room; those whose buckets are full again need none.
    fn place(&mut self, who: Who, rate: Rate, now: Instant) -> Who {
        if self.0.len() < PEERS || self.0.contains_key(&who) {
            return who;
        }
        self.0.retain(|_, bucket| bucket.filled(rate, now) < rate.burst);
        if self.0.len() < PEERS { who } else { Who::Others }
    }
}

impl Bucket {
    fn filled(&self, rate: Rate, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        (self.tokens + since * rate.per_second).min(rate.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { per_second: 10.0, burst: 3.0 };

    #[test]
    fn a_burst_passes_and_then_as_many_as_the_rate_says() {
        let (mut rates, begun) = (Rates::default(), Instant::now());
        let who = Who::User(7);
        for _ in 0..3 {
            assert_eq!(rates.ask(who, RATE, begun), Ok(()));
        }
        let wait = rates.ask(who, RATE, begun).expect_err("the burst is over");
        assert_eq!(wait.as_millis(), 100);
        assert_eq!(rates.ask(Who::User(8), RATE, begun), Ok(()), "another is not concerned");
        let mut passed = 0;
        for ms in 1..=1_000 {
            passed += u32::from(rates.ask(who, RATE, begun + Duration::from_millis(ms)).is_ok());
        }
        assert!((9..=11).contains(&passed), "{passed} in a second");
        let rested = begun + Duration::from_secs(60);
        let again = (0..10).filter(|_| rates.ask(who, RATE, rested).is_ok()).count();
        assert_eq!(again, 3, "no more than a burst is saved up");
    }

    #[test]
    fn there_is_room_for_so_many_and_the_rest_share_one() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        for uid in 0..PEERS as u32 + 3 {
            assert_eq!(rates.ask(Who::User(uid), RATE, now), Ok(()), "{uid}");
        }
        assert!(rates.ask(Who::User(1_000_000), RATE, now).is_err(), "the others' burst is over");
        assert!(rates.0.len() <= PEERS + 1);
        let later = now + Duration::from_secs(1);
        assert_eq!(rates.ask(Who::User(1_000_000), RATE, later), Ok(()));
        assert!(rates.0.len() <= 2, "those who have not asked since are forgotten");
    }

    #[test]
    fn addresses_of_one_network_are_one_peer() {
        let at = |text: &str| Who::at(text.parse().expect("an address"));
        assert_eq!(at("2001:db8::1"), at("2001:db8::ffff:1"));
        assert_ne!(at("2001:db8::1"), at("2001:db8:0:1::1"));
        assert_ne!(at("192.0.2.1"), at("192.0.2.2"));
        assert_eq!(at("::ffff:192.0.2.1"), at("192.0.2.1"));
    }
}
