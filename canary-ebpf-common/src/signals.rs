//! What a watched connection does: which ones are watched, how far one has come, and what of it
//! is bad.
//!
//! The same code runs in the loaded program, in the agent and in the tests. Connections are
//! chosen by a hash of their tuple, with a mask for each version, so that a canary and control
//! that have very different shares can have about as many watched ones.
//!
//! | | both directions seen (`nat`) | the client's alone (`dsr`, tunnels) |
//! | --- | --- | --- |
//! | handshake ends | with the server's SYN-ACK | with the client's first ACK |
//! | connection failed | reset in answer to the SYN, or 3 s | 3 s |
//! | reset by the server | seen | not seen |
//! | brought nothing | by what the client acknowledges | the same |

use crate::{
    abi::{FlowKeyV4, FlowKeyV6, HANDSHAKE_BUCKETS, Sample, outcome},
    hash::{M1, M3},
    steer::{CONFIRM_WINDOW, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};

/// A handshake that is not completed by then has failed, nanoseconds. A SYN is sent again after
/// one second and after three (RFC 6298): two of them have gone unanswered.
pub const FAILED_NS: u64 = 3_000_000_000;
/// So long after its SYN a connection is let go of, nanoseconds: what happens later says little
/// of a release, and entries are few.
pub const WATCHED_NS: u64 = 60_000_000_000;
/// So long after its FIN a client has time to acknowledge what it asked for, nanoseconds.
pub const CLOSED_NS: u64 = 5_000_000_000;

/// [`Sample::state`]: it is known how the connection began.
pub const SAMPLE_BEGUN: u32 = 1 << 0;
/// [`Sample::state`]: its SYN was sent again before that.
pub const SAMPLE_RETRANSMITTED: u32 = 1 << 1;
/// [`Sample::state`]: the client has closed it.
pub const SAMPLE_CLIENT_FIN: u32 = 1 << 2;
/// [`Sample::state`]: the server has.
pub const SAMPLE_SERVER_FIN: u32 = 1 << 3;
/// [`Sample::state`]: [`Sample::first_ack`] is known.
pub const SAMPLE_ACKED: u32 = 1 << 4;
/// [`Sample::state`]: the client has got something from the server.
pub const SAMPLE_SERVED: u32 = 1 << 5;

/// How far from the newest number of its direction a FIN or RST counts, in bytes, to either side
/// (as for translated flows: RFC 5961).
const NEAR: u32 = 64 << 10;
/// How far a packet may be ahead of the newest one before it, in bytes: a lost burst.
const AHEAD: u32 = 16 << 20;

/// A tuple whose connections can be watched.
pub trait Watchable {
    /// Its hash, which has nothing to do with its bucket. Of the client's address and the ports:
    /// which of a service's addresses it has asked is left out.
    fn sampling_hash(&self) -> u32;
}

/// 24 bits of a word, mixed twice, since products of words in a row are in a row.
#[inline(always)]
const fn mixed(word: u64) -> u32 {
    let once = word.wrapping_mul(M1);
    ((once ^ once >> 32).wrapping_mul(M3) >> 40) as u32
}

impl Watchable for FlowKeyV4 {
    #[inline(always)]
    fn sampling_hash(&self) -> u32 {
        mixed(u64::from(self.src_be) << 32 | u64::from(self.ports.word()))
    }
}

impl Watchable for FlowKeyV6 {
    #[inline(always)]
    fn sampling_hash(&self) -> u32 {
        mixed(self.src[0] ^ self.src[1] ^ u64::from(self.ports.word()))
    }
}

/// Whether a connection with this hash is watched.
#[inline(always)]
pub const fn watched(hash: u32, mask: u32) -> bool {
    hash & mask == mask
}

/// The mask of one connection in 2^`halvings`; at most one in 2^[`MOST_HALVINGS`].
pub const fn mask(halvings: u32) -> u32 {
    let halvings = if halvings > MOST_HALVINGS { MOST_HALVINGS } else { halvings };
    (1 << halvings) - 1
}

/// The rarest that is watched: one in a million.
pub const MOST_HALVINGS: u32 = 20;

/// A TCP packet on a connection that is watched.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// When it came, nanoseconds of `CLOCK_MONOTONIC`.
    pub now_ns: u64,
    /// TCP flags.
    pub flags: u32,
    /// Sequence number, host order.
    pub seq: u32,
    /// Acknowledgement number, host order.
    pub ack: u32,
    /// Whether the server has sent it.
    pub from_server: bool,
}

/// What is to be counted now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// It has become known how the connection began.
    pub began: bool,
    /// How long its handshake took, nanoseconds; 0 if it was not completed now.
    pub handshake_ns: u64,
    /// [`outcome`] bits.
    pub outcomes: u32,
    /// There is nothing more to be learned of it.
    pub over: bool,
}

/// Whether flags are those of a packet that opens a connection.
#[inline(always)]
pub const fn opens(flags: u32) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_FIN | TCP_RST) as u32 == TCP_SYN as u32
}

/// A connection that begins with a SYN of this number.
#[inline(always)]
pub fn begin(now_ns: u64, seq: u32, epoch: u32, place: u32) -> Sample {
    Sample {
        syn_ns: now_ns,
        fin_ns: 0,
        client_seq: seq,
        server_seq: 0,
        first_ack: 0,
        state: 0,
        epoch,
        place,
    }
}

/// Takes a packet into account. `slow_ns` is [`Sampling::slow_ns`].
#[inline(always)]
pub fn step(sample: &mut Sample, seen: &Seen, slow_ns: u64) -> Step {
    let mut step = Step::default();
    let flags = seen.flags;
    let has = |flag: u8| flags & flag as u32 != 0;
    let since_syn = seen.now_ns.saturating_sub(sample.syn_ns);
    let begun = sample.state & SAMPLE_BEGUN != 0;
    if !seen.from_server && opens(flags) {
        let same = seen.seq == sample.client_seq;
        if !begun && same && since_syn < FAILED_NS {
            sample.state |= SAMPLE_RETRANSMITTED;
            return step;
        } else if !begun {
            fail(sample, &mut step);
            if same {
                return step;
            }
        } else if sample.state & (SAMPLE_CLIENT_FIN | SAMPLE_SERVER_FIN) == 0 {
            // A late copy, or somebody who guesses.
            return step;
        } else {
            end(sample, &mut step);
        }
        // The tuple is used again.
        *sample = begin(seen.now_ns, seen.seq, sample.epoch, sample.place);
        step.over = false;
        return step;
    }
    if !begun {
        if since_syn >= FAILED_NS {
            fail(sample, &mut step);
            return step;
        }
        if seen.from_server {
            // It must answer the SYN.
            if !has(TCP_ACK)
                || seen.ack.wrapping_sub(sample.client_seq).wrapping_sub(1) >= CONFIRM_WINDOW
            {
                return step;
            }
            if has(TCP_RST) {
                fail(sample, &mut step);
                return step;
            }
            if !has(TCP_SYN) {
                return step;
            }
            sample.server_seq = seen.seq;
            sample.first_ack = seen.seq.wrapping_add(1);
            sample.state |= SAMPLE_ACKED;
        } else {
            if seen.seq.wrapping_sub(sample.client_seq).wrapping_sub(1) >= CONFIRM_WINDOW {
                return step;
            }
            if has(TCP_RST) {
                // The client has thought better of it.
                sample.state |= SAMPLE_BEGUN;
                step.began = true;
                step.outcomes = retransmitted(sample) | outcome::CLIENT_RESET;
                step.over = true;
                return step;
            }
            if !has(TCP_ACK) {
                return step;
            }
        }
        sample.state |= SAMPLE_BEGUN;
        step.began = true;
        // Of the server's packets that are not seen there is no time to be told.
        step.handshake_ns = since_syn.max(1);
        step.outcomes = retransmitted(sample);
        if step.handshake_ns > slow_ns {
            step.outcomes |= outcome::SLOW_HANDSHAKE;
        }
        if seen.from_server {
            return step;
        }
    }
    if since_syn >= WATCHED_NS {
        step.over = true;
        return step;
    }
    if seen.from_server {
        server(sample, seen, &mut step)
    } else {
        client(sample, seen, &mut step)
    }
    step
}

/// A packet of the client's on a connection that has begun.
#[inline(always)]
fn client(sample: &mut Sample, seen: &Seen, step: &mut Step) {
    let has = |flag: u8| seen.flags & flag as u32 != 0;
    let ahead = seen.seq.wrapping_sub(sample.client_seq);
    let near = ahead.wrapping_add(NEAR) < 2 * NEAR;
    if has(TCP_RST) {
        if near {
            if sample.state & (SAMPLE_CLIENT_FIN | SAMPLE_SERVER_FIN) == 0 {
                step.outcomes |= outcome::CLIENT_RESET;
            }
            end(sample, step);
        }
        return;
    }
    if ahead >= AHEAD && !near {
        return;
    }
    if ahead < AHEAD {
        sample.client_seq = seen.seq;
    }
    if has(TCP_ACK) {
        if sample.state & SAMPLE_ACKED == 0 {
            sample.first_ack = seen.ack;
            sample.state |= SAMPLE_ACKED;
        }
        // The server's FIN has a number of its own, which may be the one.
        if seen.ack.wrapping_sub(sample.first_ack).wrapping_sub(2) < 1 << 30 {
            sample.state |= SAMPLE_SERVED;
        }
    }
    if has(TCP_FIN) && near {
        if sample.state & SAMPLE_CLIENT_FIN == 0 {
            sample.fin_ns = seen.now_ns;
        }
        sample.state |= SAMPLE_CLIENT_FIN;
    }
    let done = SAMPLE_CLIENT_FIN | SAMPLE_SERVED;
    if sample.state & done == done {
        step.over = true;
    }
}

/// A packet of the server's on a connection that has begun.
#[inline(always)]
fn server(sample: &mut Sample, seen: &Seen, step: &mut Step) {
    let has = |flag: u8| seen.flags & flag as u32 != 0;
    let ahead = seen.seq.wrapping_sub(sample.server_seq);
    let near = ahead.wrapping_add(NEAR) < 2 * NEAR;
    if has(TCP_RST) {
        if near {
            if sample.state & (SAMPLE_CLIENT_FIN | SAMPLE_SERVER_FIN) == 0 {
                step.outcomes |= outcome::SERVER_RESET;
            }
            end(sample, step);
        }
        return;
    }
    if ahead < AHEAD {
        sample.server_seq = seen.seq;
    }
    if has(TCP_FIN) && near {
        sample.state |= SAMPLE_SERVER_FIN;
    }
}

/// What time alone says of a connection.
#[inline(always)]
pub fn elapse(sample: &mut Sample, now_ns: u64) -> Step {
    let mut step = Step::default();
    let since_syn = now_ns.saturating_sub(sample.syn_ns);
    if sample.state & SAMPLE_BEGUN == 0 {
        if since_syn >= FAILED_NS {
            fail(sample, &mut step);
        }
        return step;
    }
    if sample.state & SAMPLE_CLIENT_FIN != 0 && now_ns.saturating_sub(sample.fin_ns) >= CLOSED_NS {
        end(sample, &mut step);
    } else if since_syn >= WATCHED_NS {
        step.over = true;
    }
    step
}

/// Whether [`elapse`] has something to say.
pub const fn due(sample: &Sample, now_ns: u64) -> bool {
    let since_syn = now_ns.saturating_sub(sample.syn_ns);
    if sample.state & SAMPLE_BEGUN == 0 {
        return since_syn >= FAILED_NS;
    }
    let closed = sample.state & SAMPLE_CLIENT_FIN != 0;
    since_syn >= WATCHED_NS || closed && now_ns.saturating_sub(sample.fin_ns) >= CLOSED_NS
}

#[inline(always)]
fn retransmitted(sample: &Sample) -> u32 {
    if sample.state & SAMPLE_RETRANSMITTED != 0 { outcome::SYN_RETRANSMIT } else { 0 }
}

#[inline(always)]
fn fail(sample: &mut Sample, step: &mut Step) {
    sample.state |= SAMPLE_BEGUN;
    step.began = true;
    step.outcomes |= outcome::CONNECT_FAILED | retransmitted(sample);
    step.over = true;
}

#[inline(always)]
fn end(sample: &Sample, step: &mut Step) {
    if sample.state & SAMPLE_SERVED == 0 {
        step.outcomes |= outcome::SHORT_FLOW;
    }
    step.over = true;
}

/// log₂ of the parts into which a histogram cuts each doubling.
const PARTS_LOG2: u32 = 3;
/// log₂ of the least time that is told from none, nanoseconds: 8 µs.
const LEAST_LOG2: u32 = 13;

/// The bucket of a handshake of `ns` nanoseconds. Bucket 0 holds all under 8 µs, the last one all
/// over 15 s; in between, eight to each doubling.
#[inline(always)]
pub const fn bucket(ns: u64) -> u32 {
    let mut exponent = 0;
    // The position of the highest bit, by halves: this target has no instruction for it.
    let mut rest = ns >> LEAST_LOG2;
    if rest == 0 {
        return 0;
    }
    if rest >> 16 != 0 {
        rest >>= 16;
        exponent += 16;
    }
    if rest >> 8 != 0 {
        rest >>= 8;
        exponent += 8;
    }
    if rest >> 4 != 0 {
        rest >>= 4;
        exponent += 4;
    }
    if rest >> 2 != 0 {
        rest >>= 2;
        exponent += 2;
    }
    exponent += (rest >> 1 != 0) as u32;
    let part = (ns >> ((exponent + LEAST_LOG2 - PARTS_LOG2) & 63)) as u32 & ((1 << PARTS_LOG2) - 1);
    let bucket = 1 + (exponent << PARTS_LOG2 | part);
    let last = HANDSHAKE_BUCKETS as u32 - 1;
    if bucket > last { last } else { bucket }
}

/// The shortest time in a bucket, nanoseconds.
#[cfg(any(test, feature = "user"))]
pub fn bucket_from_ns(bucket: u32) -> u64 {
    let Some(at) = bucket.checked_sub(1) else { return 0 };
    let (exponent, part) = (at >> PARTS_LOG2, at & ((1 << PARTS_LOG2) - 1));
    let one = 1_u64 << (exponent + LEAST_LOG2);
    one + (one >> PARTS_LOG2) * u64::from(part)
}

/// The time that stands for a bucket, nanoseconds: off by less than 7 % from any in it that is
/// over 8 µs and under 15 s.
#[cfg(any(test, feature = "user"))]
pub fn bucket_ns(bucket: u32) -> u64 {
    bucket_from_ns(bucket).midpoint(bucket_from_ns(bucket + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        abi::{PortPair, SERVICE_HASH_CONNECTION, Sampling, Service},
        hash::{bucket as bucket_of, hash_v4, hash_v6},
    };

    const MS: u64 = 1_000_000;
    const SLOW: u64 = 50 * MS;

    /// A packet: who sends it, when (ms), flags, sequence and acknowledgement number.
    type Line = (char, u64, u8, u32, u32);
    /// What happens, with both directions seen and with the client's alone, and what comes of it.
    type Case<'a> = (&'a str, &'a [Line], &'a [Line], u32, u32);

    /// What becomes of a connection whose SYN has the number 1000 and whose server begins at 7000.
    fn play(lines: &[Line]) -> (Sample, Step) {
        let mut sample = begin(0, 1000, 1, 5);
        let mut all = Step::default();
        for (who, at_ms, flags, seq, ack) in lines {
            assert!(!all.over, "{lines:?} goes on after its end");
            let now_ns = at_ms * MS;
            let step = match who {
                't' => elapse(&mut sample, now_ns),
                _ => {
                    let from_server = *who == 's';
                    let flags = u32::from(*flags);
                    let seen = Seen { now_ns, flags, seq: *seq, ack: *ack, from_server };
                    step(&mut sample, &seen, SLOW)
                }
            };
            all.began |= step.began;
            all.handshake_ns += step.handshake_ns;
            all.outcomes |= step.outcomes;
            all.over |= step.over;
        }
        (sample, all)
    }

    const SYN: u8 = TCP_SYN;
    const ACK: u8 = TCP_ACK;
    const SYN_ACK: u8 = TCP_SYN | TCP_ACK;
    const FIN_ACK: u8 = TCP_FIN | TCP_ACK;
    const RST: u8 = TCP_RST;
    const RST_ACK: u8 = TCP_RST | TCP_ACK;

    #[test]
    fn each_signal_in_each_mode() {
        use outcome::*;
        let opened: [Line; 2] = [('s', 1, SYN_ACK, 7000, 1001), ('c', 2, ACK, 1001, 7001)];
        let one_way: [Line; 1] = [('c', 2, ACK, 1001, 7001)];
        let cases: &[Case<'_>] = &[
            ("nothing comes", &[('t', 3000, 0, 0, 0)], &[('t', 3000, 0, 0, 0)], 1, 1),
            ("refused", &[('s', 1, RST_ACK, 0, 1001)], &[('t', 3000, 0, 0, 0)], 1, 1),
            (
                "late by so much that it has failed",
                &[('s', 3001, SYN_ACK, 7000, 1001)],
                &[('c', 3001, ACK, 1001, 7001)],
                CONNECT_FAILED,
                CONNECT_FAILED,
            ),
            (
                "sent again, then slow",
                &[('c', 1000, SYN, 1000, 0), ('s', 1001, SYN_ACK, 7000, 1001)],
                &[('c', 1000, SYN, 1000, 0), ('c', 1002, ACK, 1001, 7001)],
                SYN_RETRANSMIT | SLOW_HANDSHAKE,
                SYN_RETRANSMIT | SLOW_HANDSHAKE,
            ),
            (
                "sent again and failed",
                &[('c', 1000, SYN, 1000, 0), ('t', 3000, 0, 0, 0)],
                &[('c', 1000, SYN, 1000, 0), ('c', 3000, SYN, 1000, 0)],
                SYN_RETRANSMIT | CONNECT_FAILED,
                SYN_RETRANSMIT | CONNECT_FAILED,
            ),
            (
                "the client gives up before",
                &[('c', 5, RST, 1001, 0)],
                &[('c', 5, RST, 1001, 0)],
                CLIENT_RESET,
                CLIENT_RESET,
            ),
            (
                "slow by a little",
                &[('s', 51, SYN_ACK, 7000, 1001)],
                &[('c', 51, ACK, 1001, 7001)],
                SLOW_HANDSHAKE,
                SLOW_HANDSHAKE,
            ),
        ];
        for (name, both, alone, expected_both, expected_alone) in cases {
            for (mode, lines, expected) in
                [(true, both, expected_both), (false, alone, expected_alone)]
            {
                let (_, step) = play(lines);
                assert_eq!(step.outcomes, *expected, "{name}, both directions: {mode}");
                assert!(step.began, "{name}");
            }
        }
        for both in [true, false] {
            let begun: &[Line] = if both { &opened } else { &one_way };
            let after = |more: &[Line]| play(&[begun, more].concat());
            let cases: &[(&str, &[Line], u32, bool)] = &[
                ("open", &[], 0, false),
                (
                    "served and closed by the client",
                    &[('c', 5, ACK, 1101, 7501), ('c', 6, FIN_ACK, 1101, 7501)],
                    0,
                    true,
                ),
                (
                    "closed and served after that",
                    &[('c', 5, FIN_ACK, 1101, 7001), ('c', 9, ACK, 1102, 7501)],
                    0,
                    true,
                ),
                (
                    "closed by the server without a byte",
                    &[('c', 6, FIN_ACK, 1101, 7002), ('t', 5010, 0, 0, 0)],
                    SHORT_FLOW,
                    true,
                ),
                (
                    "reset by the client",
                    &[('c', 5, ACK, 1101, 7501), ('c', 6, RST, 1101, 0)],
                    CLIENT_RESET,
                    true,
                ),
                (
                    "reset by the client, with nothing got",
                    &[('c', 6, RST_ACK, 1001, 7001)],
                    CLIENT_RESET | SHORT_FLOW,
                    true,
                ),
                ("a reset far from where the client is", &[('c', 6, RST, 900_000, 0)], 0, false),
                (
                    "a reset behind its own end",
                    &[('c', 5, FIN_ACK, 1101, 7001), ('c', 6, RST, 1102, 0)],
                    SHORT_FLOW,
                    true,
                ),
                ("watched for long enough", &[('t', 60_000, 0, 0, 0)], 0, true),
                ("a late copy of the SYN", &[('c', 900, SYN, 1000, 0)], 0, false),
            ];
            for (name, more, outcomes, over) in cases {
                let (_, step) = after(more);
                assert_eq!((step.outcomes, step.over), (*outcomes, *over), "{name}, {both}");
                assert_eq!(step.handshake_ns, if both { MS } else { 2 * MS }, "{name}");
            }
        }
        let served = ('c', 5, ACK, 1101, 7501);
        let after = |more: &[Line]| play(&[&opened, more].concat()).1.outcomes;
        assert_eq!(after(&[served, ('s', 9, RST, 7501, 0)]), SERVER_RESET);
        assert_eq!(after(&[('s', 9, RST, 7001, 0)]), SERVER_RESET | SHORT_FLOW);
        assert_eq!(after(&[('s', 9, RST, 9_000_000, 0)]), 0, "a number that nobody knows");
        assert_eq!(after(&[served, ('s', 9, FIN_ACK, 7501, 1101), ('s', 9, RST, 7502, 0)]), 0);
        assert_eq!(after(&[served, ('s', 9, FIN_ACK, 7501, 1101), ('c', 9, RST, 1101, 0)]), 0);
    }

    #[test]
    fn what_does_not_answer_the_syn_begins_nothing() {
        for line in [
            ('s', 1, RST, 0, 0),
            ('s', 1, RST_ACK, 0, 77),
            ('s', 1, SYN_ACK, 7000, 1000),
            ('s', 1, ACK, 7000, 1001),
            ('c', 1, ACK, 1000, 7001),
            ('c', 1, ACK, 900_000, 7001),
            ('c', 1, RST, 900_000, 0),
        ] {
            assert_eq!(play(&[line]).1, Step::default(), "{line:?}");
        }
    }

    #[test]
    fn a_tuple_that_is_used_again_is_another_connection() {
        let (sample, step) = play(&[('c', 100, SYN, 5_000_000, 0)]);
        assert_eq!(step.outcomes, outcome::CONNECT_FAILED);
        assert!(!step.over);
        assert_eq!(sample, begin(100 * MS, 5_000_000, 1, 5));
        // One that is open is not taken over by somebody who guesses.
        let (sample, _) = play(&[('c', 1, ACK, 1001, 7001), ('c', 9, SYN, 5, 0)]);
        assert_eq!(sample.syn_ns, 0);
    }

    #[test]
    fn buckets_are_narrow_and_in_order() {
        let mut last = 0;
        for shift in 0..40 {
            for part in 0..64_u64 {
                let ns = (1 << shift) + (part << shift >> 6);
                let bucket = bucket(ns);
                assert!((bucket as usize) < HANDSHAKE_BUCKETS);
                assert!(bucket >= last, "{ns} ns");
                last = bucket;
                if (1 << 13..15_000_000_000).contains(&ns) {
                    let error = bucket_ns(bucket) as f64 / ns as f64 - 1.0;
                    assert!(error.abs() < 0.07, "{ns} ns: {error}");
                }
            }
        }
        for number in 1..HANDSHAKE_BUCKETS as u32 {
            assert_eq!(bucket(bucket_from_ns(number)), number);
            assert_eq!(bucket(bucket_from_ns(number) - 1), number - 1);
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, HANDSHAKE_BUCKETS as u32 - 1));
    }

    #[test]
    fn masks_take_their_part_of_real_tuples_and_lie_in_each_other() {
        let mut tuples: [(&str, Vec<u32>); 3] =
            [("ports", Vec::new()), ("clients", Vec::new()), ("IPv6 ports", Vec::new())];
        for i in 0..1_u32 << 16 {
            let port_be = (i as u16).to_be();
            let v4 = FlowKeyV4 {
                src_be: 0x0100_000a,
                dst_be: 0x0a71_00cb,
                ports: PortPair::new(port_be, 443_u16.to_be()),
                protocol: 6,
            };
            tuples[0].1.push(v4.sampling_hash());
            let client = FlowKeyV4 {
                src_be: i.to_be(),
                ports: PortPair::new(40_000_u16.to_be(), 443_u16.to_be()),
                ..v4
            };
            tuples[1].1.push(client.sampling_hash());
            let v6 = FlowKeyV6 {
                src: [0x0100_0000_b80d_0120, 7],
                dst: [0x0200_0000_b80d_0120, 9],
                ports: PortPair::new(port_be, 443_u16.to_be()),
                protocol: 6,
            };
            tuples[2].1.push(v6.sampling_hash());
        }
        for (name, hashes) in &tuples {
            for halvings in 0..=10 {
                let taken = hashes.iter().filter(|hash| watched(**hash, mask(halvings))).count();
                let expected = hashes.len() >> halvings;
                let sigma = (expected as f64).sqrt();
                let off = (taken as f64 - expected as f64).abs();
                assert!(off <= 5.0 * sigma, "{name}: {taken} of {expected}");
                let fewer = |hash: &&u32| watched(**hash, mask(halvings + 1));
                assert!(hashes.iter().filter(fewer).all(|hash| watched(*hash, mask(halvings))));
            }
            assert!(hashes.iter().all(|hash| !watched(*hash, Sampling::NONE)), "{name}");
        }
    }

    #[test]
    fn those_that_are_watched_are_in_all_buckets_alike() {
        const CELLS: usize = 256;
        let service = Service {
            bucket_mask: 0xffff,
            flags: SERVICE_HASH_CONNECTION,
            hash_key: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
            mask_v4_be: u32::MAX,
            mask_v6: [u64::MAX; 2],
            ..Service::default()
        };
        let mut buckets = [("IPv4", [0_u32; CELLS]), ("IPv6", [0_u32; CELLS])];
        for i in 0..1_u32 << 20 {
            let dst_port_be = 443_u16.to_be();
            let (client, src_port_be) = ((i >> 10).to_be(), (32_768 + (i & 1_023) as u16).to_be());
            let v4 = FlowKeyV4 {
                src_be: client,
                dst_be: 0x0a71_00cb,
                ports: PortPair::new(src_port_be, dst_port_be),
                protocol: 6,
            };
            let FlowKeyV4 { src_be, dst_be, .. } = v4;
            let hash = hash_v4(&service, src_be, dst_be, src_port_be, dst_port_be, 6);
            let chosen = watched(v4.sampling_hash(), mask(4));
            buckets[0].1[bucket_of(&service, hash) as usize % CELLS] += u32::from(chosen);
            let (src, dst) = ([0x0120_b80d_0120, u64::from(client) << 32], [0x0120_b80d_0120, 9]);
            let v6 = FlowKeyV6 { src, dst, ports: v4.ports, protocol: 6 };
            let hash = hash_v6(&service, src, dst, src_port_be, dst_port_be, 6);
            let chosen = watched(v6.sampling_hash(), mask(4));
            buckets[1].1[bucket_of(&service, hash) as usize % CELLS] += u32::from(chosen);
        }
        for (family, buckets) in buckets {
            let expected = f64::from(1 << 16) / CELLS as f64;
            let chi: f64 =
                buckets.iter().map(|n| (f64::from(*n) - expected).powi(2) / expected).sum();
            let freedom = CELLS as f64 - 1.0;
            let sigmas = (chi - freedom) / (2.0 * freedom).sqrt();
            assert!(sigmas.abs() < 5.0, "{family}: {sigmas:.1} sigmas");
        }
    }
}
