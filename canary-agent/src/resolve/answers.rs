//! What answers to our own questions say of neighbours' MAC addresses.
//!
//! For a second after a neighbour's entry has changed in any way, the kernel lets no ARP
//! answer replace its MAC address (`locktime` in arp(7)): where two hosts answer for one
//! address, the first is to win. An answer that it passes over for that reason is taken
//! in here, unless the known address answers the same question too.
//!
//! Pure: time is handed in. Must not know of sockets.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::wire::NeighbourKey;

/// How long an answer may be on its way.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// How long another MAC address waits for the known one to speak up. Both get a broadcast
/// at the same time, and the kernel takes the other for good a second later at most.
const OBJECTION_WITHIN: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug)]
struct Claim {
    mac: [u8; 6],
    due: Instant,
}

/// The questions that are open, and answers that say something new.
#[derive(Clone, Debug, Default)]
pub(super) struct Answers {
    asked: HashMap<NeighbourKey, Instant>,
    claims: HashMap<NeighbourKey, Claim>,
}

impl Answers {
    /// Takes note of a question.
    pub(super) fn asked(&mut self, key: NeighbourKey, now: Instant) {
        self.asked.insert(key, now);
    }

    /// Takes in an answer from a neighbour that is `known` by a MAC address.
    pub(super) fn answered(
        &mut self,
        key: NeighbourKey,
        mac: [u8; 6],
        known: [u8; 6],
        now: Instant,
    ) {
        if mac == known {
            // Whatever else answers this question is another host.
            self.asked.remove(&key);
            self.claims.remove(&key);
            return;
        }
        let open = self.asked.get(&key).is_some_and(|asked| now < *asked + ANSWER_WITHIN);
        // No host has a group's address (IEEE 802.3, the lowest bit of the first byte).
        let unicast = mac[0] & 1 == 0 && mac != [0; 6];
        if open && unicast {
            self.claims.entry(key).or_insert(Claim { mac, due: now + OBJECTION_WITHIN });
        }
    }

    /// The neighbours whose MAC address is another one by now.
    pub(super) fn take(&mut self, now: Instant) -> Vec<(NeighbourKey, [u8; 6])> {
        let due = self.claims.extract_if(|_, claim| claim.due <= now);
        due.map(|(key, claim)| (key, claim.mac)).collect()
    }

    /// When the next one is taken.
    pub(super) fn next(&self) -> Option<Instant> {
        self.claims.values().map(|claim| claim.due).min()
    }

    /// Forgets those that are not needed.
    pub(super) fn keep(&mut self, needed: impl Fn(NeighbourKey) -> bool) {
        self.asked.retain(|key, _| needed(*key));
        self.claims.retain(|key, _| needed(*key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const NEW: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const KEY: NeighbourKey =
        NeighbourKey { ifindex: 1, address: std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST) };

    #[test]
    fn a_new_address_is_taken_when_the_known_one_is_silent() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.asked(KEY, now);
        answers.answered(KEY, NEW, OLD, now);
        assert_eq!(answers.next(), Some(now + OBJECTION_WITHIN));
        assert_eq!(answers.take(now), []);
        assert_eq!(answers.take(now + OBJECTION_WITHIN), [(KEY, NEW)]);
        assert_eq!((answers.next(), answers.take(now + ANSWER_WITHIN)), (None, vec![]));
    }

    #[test]
    fn of_two_that_answer_the_known_one_stays() {
        let now = Instant::now();
        for order in [[NEW, OLD], [OLD, NEW]] {
            let mut answers = Answers::default();
            answers.asked(KEY, now);
            order.iter().for_each(|mac| answers.answered(KEY, *mac, OLD, now));
            assert_eq!(answers.take(now + ANSWER_WITHIN), [], "{order:?}");
            // The next question is another matter.
            answers.asked(KEY, now);
            answers.answered(KEY, NEW, OLD, now);
            assert_eq!(answers.take(now + ANSWER_WITHIN), [(KEY, NEW)]);
        }
    }

    #[test]
    fn what_nobody_asked_and_what_no_host_has_is_passed_over() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.answered(KEY, NEW, OLD, now);
        answers.asked(KEY, now);
        answers.answered(KEY, [0xff; 6], OLD, now);
        answers.answered(KEY, [0; 6], OLD, now);
        answers.answered(KEY, NEW, OLD, now + ANSWER_WITHIN);
        answers.keep(|_| true);
        assert_eq!(answers.next(), None);
        answers.answered(KEY, NEW, OLD, now);
        answers.keep(|_| false);
        assert_eq!(answers.next(), None);
    }
}
