//! The reference: a map of every open connection to its backend, and what each bucket has been
//! through. It shares nothing with the steering decision: it says what a client may expect.
//!
//! Where more than one thing is right (a flow that has been silent for just about `udp_idle`,
//! a port that is used again over a connection that was never closed) it takes what it sees
//! and holds the program to it from then on.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use canary_agent::store::Admin;
use canary_tests::{model::Tuple, planned::Went};

/// After so much silence a half-open connection is not counted on any more: its entry goes
/// after 10 s.
const HALF_OPEN_MS: u64 = 8_000;
/// After so much silence a closing connection is not counted on any more.
const CLOSING_MS: u64 = 8_000;

/// What a bucket has been through, as far as anybody outside sees.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bucket {
    /// Where new connections go.
    pub(crate) current: Option<u16>,
    /// Whose it is.
    pub(crate) owner: u8,
    /// Where it went before it moved, as long as that is remembered.
    pub(crate) origin: Option<u16>,
    moved_ms: u64,
    /// Until when UDP flows that nobody knows count as old ones: for `udp_idle` since the first
    /// move.
    learn_until_ms: u64,
    /// Until when they may: a bucket that moves again meanwhile goes on learning.
    learn_may_until_ms: u64,
    /// How often it has begun to be remembered.
    epoch: u32,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It has sent a SYN.
    HalfOpen,
    /// It is open.
    Open,
    /// The client has sent a FIN, or a RST and nothing since.
    Closing,
}

/// A connection or UDP flow that is open.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    /// Its backend, which must stay the same.
    pub(crate) backend: u16,
    /// How far it has come.
    pub(crate) state: State,
    /// Its SYN's sequence number.
    pub(crate) isn: u32,
    /// Bytes that the client has sent.
    pub(crate) sent: u32,
    /// Whether the client has sent a FIN: then it sends no more data.
    pub(crate) finished: bool,
    /// The source port that its packets leave with (`nat`).
    pub(crate) port: u16,
    /// Whether nothing but its own SYN can have made its flow entry: not for one that was opened
    /// over a connection that had never been closed.
    sure: bool,
    seen_ms: u64,
    syn_ms: u64,
    /// Its bucket's epoch when the SYN came, if the bucket was remembered then.
    syn_epoch: Option<u32>,
}

/// What a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// A SYN for a new connection.
    Open { isn: u32 },
    /// The SYN again.
    Resend,
    /// A copy of the SYN, late.
    Duplicate,
    /// Data.
    Data,
    /// A FIN.
    Fin,
    /// A RST.
    Reset,
    /// A FIN or RST that is not the client's, with a number far from its own.
    Blind,
    /// A SYN that is not the client's.
    Forged,
    /// A datagram.
    Datagram,
}

/// What the reference has to know of the service.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) nat: bool,
    pub(crate) moves: bool,
    pub(crate) small: bool,
    pub(crate) drain_ms: Option<u64>,
    pub(crate) idle_ms: u64,
}

/// Every open connection, and where it has to go.
#[derive(Debug)]
pub(crate) struct Reference {
    pub(crate) rules: Rules,
    pub(crate) now_ms: u64,
    /// What real time may add to the silence of flows.
    pub(crate) slack_ms: u64,
    /// By family (0 for IPv4).
    pub(crate) buckets: [Vec<Bucket>; 2],
    pub(crate) open: HashMap<Tuple, Connection>,
    /// Every backend that a tuple has ever been at: entries may be left.
    been: HashMap<Tuple, BTreeSet<u16>>,
    pub(crate) down: BTreeSet<u16>,
    pub(crate) unreachable: BTreeSet<u16>,
    /// Backends that get what is open, and nothing new.
    pub(crate) silent: BTreeSet<u16>,
    /// Backends that operators have taken out: without new connections, or, in maintenance,
    /// without any.
    pub(crate) out: BTreeMap<u16, Admin>,
    /// Backends that were removed, and when.
    removed: HashMap<u16, u64>,
}

/// What the tables say of a bucket after a change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) current: Option<u16>,
    pub(crate) owner: u8,
    pub(crate) tracked: bool,
}

impl Reference {
    pub(crate) fn new(rules: Rules, now_ms: u64) -> Self {
        Self {
            rules,
            now_ms,
            slack_ms: 0,
            buckets: [Vec::new(), Vec::new()],
            open: HashMap::new(),
            been: HashMap::new(),
            down: BTreeSet::new(),
            unreachable: BTreeSet::new(),
            silent: BTreeSet::new(),
            out: BTreeMap::new(),
            removed: HashMap::new(),
        }
    }

    /// A backend has left the configuration, or is in it again.
    pub(crate) fn configured(&mut self, n: u16, configured: bool) {
        if configured {
            self.removed.remove(&n);
        } else {
            self.removed.entry(n).or_insert(self.now_ms);
            // What operators have told it is forgotten with it.
            self.out.remove(&n);
        }
    }

    /// An operator has taken a backend out, or back in. In maintenance it loses what is open.
    pub(crate) fn told(&mut self, n: u16, admin: Admin) {
        match admin {
            Admin::Ready => self.out.remove(&n),
            out => self.out.insert(n, out),
        };
        if admin == Admin::Maint {
            self.open.retain(|_, connection| connection.backend != n);
            self.pass_over();
        }
    }

    /// Nothing is open any more where a bucket's origin is in maintenance: what nobody remembers
    /// goes where new connections go from then on.
    fn pass_over(&mut self) {
        let out = &self.out;
        for bucket in self.buckets.iter_mut().flatten() {
            let maintained = |n| out.get(&n) == Some(&Admin::Maint);
            if bucket.origin.is_some_and(maintained) && bucket.current.is_some() {
                bucket.origin = bucket.current;
            }
        }
    }

    /// Whether a backend gets no packets at all.
    fn maintained(&self, n: u16) -> bool {
        self.out.get(&n) == Some(&Admin::Maint)
    }

    /// Takes over where the tables send new connections, and lets go of what may be let go.
    pub(crate) fn observe(
        &mut self,
        family: usize,
        seen: &[Seen],
        bucket_of: impl Fn(&Tuple) -> u32,
    ) {
        let Rules { nat, moves, drain_ms, idle_ms, .. } = self.rules;
        let now = self.now_ms;
        let begins = self.buckets[family].len() != seen.len();
        self.buckets[family].resize(seen.len(), Bucket::default());
        let mut let_go: BTreeSet<u32> = BTreeSet::new();
        for (number, (bucket, seen)) in (0..).zip(self.buckets[family].iter_mut().zip(seen)) {
            let changes_owner = bucket.owner != seen.owner;
            bucket.owner = seen.owner;
            let before = std::mem::replace(&mut bucket.current, seen.current);
            if begins || nat {
                continue;
            }
            if before != seen.current {
                if moves && changes_owner || before.is_none() && bucket.origin.is_none() {
                    bucket.origin = None;
                    let_go.insert(number);
                } else {
                    if bucket.origin.is_none() {
                        bucket.origin = before;
                        bucket.epoch += 1;
                        bucket.learn_until_ms = now + idle_ms;
                        bucket.learn_may_until_ms = now + idle_ms;
                    }
                    if now < bucket.learn_may_until_ms {
                        bucket.learn_may_until_ms = now + idle_ms;
                    }
                    bucket.moved_ms = now;
                }
            } else if let (Some(_), Some(drain)) = (bucket.origin, drain_ms) {
                let over = now >= bucket.moved_ms + drain;
                // In the last tenth it is anybody's guess: there the table is believed.
                let may_be = now >= bucket.moved_ms + drain - drain / 10;
                if over || may_be && !seen.tracked {
                    bucket.origin = None;
                    let_go.insert(number);
                }
            }
        }
        self.pass_over();
        // Translated connections of a removed backend live for its drain.
        let over = |since: &u64| drain_ms.is_some_and(|drain| now >= since + drain - drain / 10);
        if nat && self.removed.values().any(over) {
            let removed = &self.removed;
            self.open.retain(|_, c| !removed.get(&c.backend).is_some_and(over));
        }
        let buckets = &self.buckets[family];
        self.open.retain(|tuple, connection| {
            if usize::from(tuple.src.is_ipv6()) != family {
                return true;
            }
            let number = bucket_of(tuple);
            !let_go.contains(&number)
                || buckets[number as usize].current == Some(connection.backend)
        });
    }

    /// Whether `tuple` is open, and how; what has been silent for too long to be counted on is
    /// forgotten.
    pub(crate) fn connection(&mut self, tuple: &Tuple) -> Option<&mut Connection> {
        let connection = self.open.get(tuple)?;
        let silent_ms = self.now_ms - connection.seen_ms + self.slack_ms;
        let patience_ms = match connection.state {
            State::HalfOpen => HALF_OPEN_MS,
            State::Closing => CLOSING_MS,
            State::Open => u64::MAX,
        };
        if silent_ms > patience_ms {
            self.open.remove(tuple);
            return None;
        }
        self.open.get_mut(tuple)
    }

    /// Whether a copy of the SYN that comes now can't be taken for a new one: its bucket was
    /// watched when it came first, or has not moved since. (Otherwise it is what rule 10 is
    /// about, and the reference does not send it.)
    pub(crate) fn may_duplicate(&mut self, tuple: &Tuple, number: u32) -> bool {
        let family = usize::from(tuple.src.is_ipv6());
        let (nat, small) = (self.rules.nat, self.rules.small);
        let bucket = self.buckets[family][number as usize].clone();
        let Some(c) = self.connection(tuple).map(|c| c.clone()) else { return false };
        c.state == State::Open
            && !small
            && !self.fails(c.backend)
            && (nat
                || c.syn_epoch == Some(bucket.epoch) && bucket.origin.is_some()
                || c.syn_epoch.is_none() && bucket.moved_ms < c.syn_ms)
    }

    /// Whether nothing new is to go to a backend: it fails its checks, or has no next hop.
    pub(crate) fn fails(&self, n: u16) -> bool {
        self.down.contains(&n) || self.is_away(n)
    }

    /// Whether a backend has no next hop, or one that does not answer.
    pub(crate) fn is_away(&self, n: u16) -> bool {
        self.unreachable.contains(&n) || self.silent.contains(&n)
    }

    /// Whether a forged SYN can't be told from a port that is used again.
    pub(crate) fn may_forge(&mut self, tuple: &Tuple) -> bool {
        let known = self.connection(tuple).map(|c| (c.state, c.backend));
        known.is_some_and(|(state, backend)| state == State::Open && !self.fails(backend))
    }

    /// Holds what a packet became against what it should.
    ///
    /// # Errors
    /// What would have been right.
    pub(crate) fn judge(
        &mut self,
        tuple: &Tuple,
        number: u32,
        sent: Sent,
        went: (Went, u16),
    ) -> Result<(), String> {
        let (went, port) = went;
        let known = self.connection(tuple).map(|c| c.clone());
        let bucket = self.buckets[usize::from(tuple.src.is_ipv6())][number as usize].clone();
        let fresh = !self.been.contains_key(tuple);
        let allowed = match sent {
            Sent::Datagram => self.datagram(tuple, &bucket, known.as_ref()),
            _ => self.segment(tuple, &bucket, sent, known.as_ref()),
        };
        // What would go to a backend in maintenance goes where new connections do.
        let allowed: Vec<Option<u16>> = allowed
            .into_iter()
            .map(|n| if n.is_some_and(|n| self.maintained(n)) { bucket.current } else { n })
            .collect();
        let becomes = |n: &Option<u16>| match n {
            Some(n) if !self.unreachable.contains(n) => Went::To(*n),
            _ => Went::Dropped,
        };
        let Some(at) = allowed.iter().find(|n| becomes(n) == went) else {
            let right: Vec<String> = allowed.iter().map(|n| format!("{:?}", becomes(n))).collect();
            return Err(format!(
                "{sent:?} went {went:?} instead of {}; fresh: {fresh}, connection: {known:?}, bucket {number}: {bucket:?}",
                right.join(" or ")
            ));
        };
        let meant: BTreeSet<u16> =
            allowed.iter().filter(|n| becomes(n) == went).filter_map(|n| *n).collect();
        let opens = matches!(sent, Sent::Open { .. } | Sent::Resend | Sent::Datagram);
        let at = if opens && went == Went::Dropped && meant.len() > 1 {
            // It went nowhere, which does not tell to whom it would have gone: nobody has answered
            // it, and an entry may be left that names any of them.
            self.been.entry(*tuple).or_default().extend(meant);
            None
        } else {
            *at
        };
        self.remember(tuple, &bucket, sent, known, at, went, port, fresh);
        Ok(())
    }

    /// Where a UDP packet may go.
    fn datagram(
        &self,
        tuple: &Tuple,
        bucket: &Bucket,
        known: Option<&Connection>,
    ) -> Vec<Option<u16>> {
        let Rules { nat, idle_ms, .. } = self.rules;
        let remembered = !nat && bucket.origin.is_some();
        let new = match remembered {
            true if self.now_ms < bucket.learn_until_ms => vec![bucket.origin],
            true if self.now_ms < bucket.learn_may_until_ms => vec![bucket.current, bucket.origin],
            _ => vec![bucket.current],
        };
        match known {
            None => {
                // Entries of former flows of the tuple are older than `udp_idle`, or were let go
                // of: those may be followed no more, and nobody counts on it.
                let mut allowed = new;
                allowed.extend(self.been.get(tuple).into_iter().flatten().map(|n| Some(*n)));
                allowed
            }
            Some(flow) => {
                let silent_ms = self.now_ms - flow.seen_ms;
                if silent_ms + 500 + self.slack_ms < idle_ms {
                    vec![Some(flow.backend)]
                } else if silent_ms > idle_ms {
                    new
                } else {
                    [vec![Some(flow.backend)], new].concat()
                }
            }
        }
    }

    /// Where a TCP packet may go.
    fn segment(
        &self,
        tuple: &Tuple,
        bucket: &Bucket,
        sent: Sent,
        known: Option<&Connection>,
    ) -> Vec<Option<u16>> {
        let small = self.rules.small;
        let been = || self.been.get(tuple).into_iter().flatten().map(|n| Some(*n));
        let fails = |n: u16| self.fails(n);
        let mut allowed = match (sent, known) {
            (Sent::Open { .. }, None) => {
                let mut allowed = vec![bucket.current];
                allowed.extend(been());
                allowed
            }
            (Sent::Open { .. }, Some(c)) if self.over(c) => vec![bucket.current],
            (Sent::Open { .. }, Some(_)) => {
                let mut allowed = vec![bucket.current];
                allowed.extend(been());
                allowed
            }
            (Sent::Resend, Some(c)) => {
                let watched = c.syn_epoch == Some(bucket.epoch) && bucket.origin.is_some();
                if fails(c.backend) || !watched && !self.rules.nat {
                    vec![bucket.current]
                } else {
                    vec![Some(c.backend)]
                }
            }
            (Sent::Forged, Some(c)) => vec![Some(c.backend), bucket.current],
            (_, Some(c)) => vec![Some(c.backend)],
            (_, None) => vec![bucket.current, bucket.origin],
        };
        if small && matches!(sent, Sent::Open { .. } | Sent::Resend | Sent::Forged) {
            // No room: it goes where the bucket's old connections are.
            allowed.extend(bucket.origin.map(Some));
            allowed.push(bucket.current);
        }
        allowed
    }

    /// Whether a connection is over when another SYN comes: a half-open or closing one is. But
    /// where the entry may be of a connection that was never closed before it, what it sends has
    /// other numbers than that one's, and its end is taken for a forged one; with `nat` the server
    /// has told both by then.
    fn over(&self, c: &Connection) -> bool {
        match c.state {
            State::Open => false,
            State::HalfOpen => c.sure,
            State::Closing => c.sure || self.rules.nat,
        }
    }

    /// Takes over what a packet has changed.
    #[expect(clippy::too_many_arguments, reason = "what is known of one packet")]
    fn remember(
        &mut self,
        tuple: &Tuple,
        bucket: &Bucket,
        sent: Sent,
        known: Option<Connection>,
        at: Option<u16>,
        went: Went,
        port: u16,
        fresh: bool,
    ) {
        let now = self.now_ms;
        if matches!(sent, Sent::Forged | Sent::Blind) {
            return;
        }
        // A translated packet that is dropped opens nothing.
        let opens = matches!(sent, Sent::Open { .. } | Sent::Resend | Sent::Datagram);
        // Nor does one of an open connection end it; but a SYN that comes again takes the flow
        // of one that is half open away from a backend that can't be reached.
        let stays = !opens && known.as_ref().is_some_and(|c| at == Some(c.backend));
        let Some(backend) = at.filter(|_| went != Went::Dropped || !self.rules.nat || stays) else {
            if opens {
                self.open.remove(tuple);
            }
            return;
        };
        if opens {
            self.been.entry(*tuple).or_default().insert(backend);
        }
        // A packet that is dropped leaves with no port of ours.
        let port = match (&known, went) {
            (Some(c), Went::Dropped) => c.port,
            _ => port,
        };
        let epoch = bucket.origin.is_some().then_some(bucket.epoch);
        let sure = fresh || known.as_ref().is_some_and(|c| self.over(c));
        let new = |isn| Connection {
            sure,
            backend,
            state: State::HalfOpen,
            isn,
            sent: 0,
            finished: false,
            port,
            seen_ms: now,
            syn_ms: now,
            syn_epoch: epoch,
        };
        let next = match (sent, known) {
            (Sent::Open { isn }, _) => new(isn),
            (Sent::Resend, Some(c)) if c.backend == backend => {
                Connection { seen_ms: now, port, ..c }
            }
            (Sent::Resend, Some(c)) => new(c.isn),
            (Sent::Datagram, _) => Connection { state: State::Open, ..new(0) },
            (Sent::Duplicate, Some(c)) => Connection { seen_ms: now, ..c },
            // What comes after its FIN acknowledges, and does not take it back.
            (Sent::Data, Some(c)) => {
                let state = if c.finished { State::Closing } else { State::Open };
                Connection { state, seen_ms: now, port, ..c }
            }
            (Sent::Fin | Sent::Reset, Some(c)) => {
                let finished = c.finished || sent == Sent::Fin;
                Connection { state: State::Closing, finished, seen_ms: now, port, ..c }
            }
            (_, None) | (Sent::Forged | Sent::Blind, _) => return,
        };
        self.open.insert(*tuple, next);
    }
}

/// The connection of these cases.
fn one_tuple() -> Tuple {
    canary_tests::planned::tuple(
        1,
        canary_agent::plan::Family::V4,
        10_000,
        canary_ebpf_common::abi::IPPROTO_TCP,
    )
}

/// A bucket of backend 1 that has moved there from 6, with neither to be reached, and a SYN that
/// went nowhere; then 1 can be reached again.
fn after_a_syn_that_went_nowhere(small: bool) -> (Reference, Tuple) {
    let rules =
        Rules { nat: false, moves: false, small, drain_ms: Some(1_000_000), idle_ms: 30_000 };
    let mut reference = Reference::new(rules, 1_000_000);
    let seen = |n| [Seen { current: Some(n), owner: 0, tracked: true }];
    reference.observe(0, &seen(6), |_| 0);
    reference.observe(0, &seen(1), |_| 0);
    reference.unreachable = BTreeSet::from([1, 6]);
    let tuple = one_tuple();
    reference.judge(&tuple, 0, Sent::Open { isn: 7 }, (Went::Dropped, 0)).expect("nowhere to go");
    reference.unreachable.remove(&1);
    (reference, tuple)
}

#[test]
fn a_syn_without_room_that_went_nowhere_is_held_to_no_backend() {
    // The program has no entry for it, and sends what is unknown where the bucket was before.
    let (mut reference, tuple) = after_a_syn_that_went_nowhere(true);
    reference.judge(&tuple, 0, Sent::Data, (Went::Dropped, 0)).expect("6 can't be reached");
}

#[test]
fn a_syn_with_room_that_went_nowhere_is_held_to_the_only_backend_that_was_meant() {
    let (mut reference, tuple) = after_a_syn_that_went_nowhere(false);
    let difference = reference.judge(&tuple, 0, Sent::Data, (Went::Dropped, 0)).unwrap_err();
    assert!(difference.contains("instead of To(1)"), "{difference}");
    reference.judge(&tuple, 0, Sent::Data, (Went::To(1), 0)).expect("its backend");
}

/// A connection at backend 1 has ended, with its bucket remembered, whose port was used for
/// another that was never closed if `over_another`; then the bucket goes to 7.
fn after_an_end(over_another: bool) -> (Reference, Tuple) {
    let rules = Rules { nat: false, moves: false, small: false, drain_ms: None, idle_ms: 30_000 };
    let mut reference = Reference::new(rules, 1_000_000);
    let seen = |n| [Seen { current: Some(n), owner: 0, tracked: true }];
    reference.observe(0, &seen(6), |_| 0);
    reference.observe(0, &seen(1), |_| 0);
    let tuple = one_tuple();
    let again = over_another.then_some(Sent::Open { isn: 1 << 30 });
    let sent = [Sent::Open { isn: 7 }, Sent::Data].into_iter().chain(again).chain([Sent::Reset]);
    for sent in sent {
        reference.judge(&tuple, 0, sent, (Went::To(1), 0)).expect("its backend");
    }
    reference.observe(0, &seen(7), |_| 0);
    (reference, tuple)
}

#[test]
fn a_port_is_new_again_after_an_end() {
    let (mut reference, tuple) = after_an_end(false);
    let open = Sent::Open { isn: 1 << 31 };
    let difference = reference.judge(&tuple, 0, open, (Went::To(1), 0)).unwrap_err();
    assert!(difference.contains("instead of To(7)"), "{difference}");
    reference.judge(&tuple, 0, open, (Went::To(7), 0)).expect("where new connections go");
}

#[test]
fn a_port_may_be_that_of_a_connection_that_was_never_closed_after_the_end_of_another() {
    // The entry goes by the first one's numbers, and takes the other's RST for a forged one.
    let (mut reference, tuple) = after_an_end(true);
    let open = |isn| Sent::Open { isn };
    reference.judge(&tuple, 0, open(2 << 30), (Went::To(1), 0)).expect("still in use");
    reference.judge(&tuple, 0, Sent::Reset, (Went::To(1), 0)).expect("its backend");
    reference.judge(&tuple, 0, open(3 << 30), (Went::To(1), 0)).expect("in use as before");
    reference.judge(&tuple, 0, open(1), (Went::To(7), 0)).expect("where new connections go");
}
