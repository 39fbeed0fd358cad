//! A sequence, through the real planner and the loaded program, and the reference beside them.

use std::time::Instant;

use canary_agent::plan::{Family, QUARANTINE_MS};
use canary_ebpf_common::{
    abi::{IPPROTO_TCP, IPPROTO_UDP},
    steer::{Segment, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};
use canary_tests::{
    loaded::Sizes,
    model::Tuple,
    planned::{Planned, SERVER_SEQ, Shop, Went, tuple},
};

use crate::{
    event::{ALWAYS, CONNECTIONS, DATAGRAMS, Event, Setting},
    reference::{Connection, Reference, Rules, Seen, Sent, State},
};

/// Entries of a flow table that is too small for what is open.
const SMALL: u32 = 6;
/// Entries of one that is large enough.
const LARGE: u32 = 1024;

/// What a sequence came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Packets that went through the program.
    pub(crate) packets: u64,
    /// Connections and UDP flows that were opened.
    pub(crate) opened: u64,
    /// Changes to the service.
    pub(crate) changes: u64,
    /// Packets of open connections whose bucket had moved.
    pub(crate) kept: u64,
    /// Times at which nothing was tracked and no flow entry was there.
    pub(crate) steady: u64,
}

/// Where a sequence went wrong, and how.
#[derive(Clone, Debug)]
pub(crate) struct Difference {
    /// Number of the event.
    pub(crate) at: usize,
    /// What was seen and what would have been right.
    pub(crate) what: String,
}

/// A program that sequences are run through, one after the other.
pub(crate) struct Bench {
    planned: Planned,
    small: bool,
}

impl Bench {
    pub(crate) fn new(setting: &Setting) -> Self {
        let flows = if setting.small { SMALL } else { LARGE };
        let sizes = Sizes { flows, ..Sizes::default() };
        Self { planned: Planned::new(&setting.shop, &sizes), small: setting.small }
    }

    /// Runs a sequence from the beginning.
    ///
    /// # Errors
    /// At the first difference.
    pub(crate) fn run(&mut self, setting: &Setting, events: &[Event]) -> Result<Tally, Difference> {
        assert_eq!(self.small, setting.small, "a bench has one size");
        self.planned.begin_anew(&setting.shop);
        let millis = |d: std::time::Duration| d.as_millis() as u64;
        let rules = Rules {
            nat: setting.shop.forward == "nat",
            moves: setting.shop.existing == "move",
            small: setting.small,
            drain_ms: setting.shop.drain.map(millis),
            idle_ms: millis(setting.shop.udp_idle),
        };
        let mut run = Run {
            reference: Reference::new(rules, self.planned.now_ms),
            planned: &mut self.planned,
            shop: setting.shop.clone(),
            ports: [0; CONNECTIONS as usize],
            tally: Tally::default(),
            begun: Instant::now(),
        };
        run.changed().map_err(|what| Difference { at: 0, what })?;
        for (at, event) in events.iter().enumerate() {
            run.event(*event).map_err(|what| Difference { at, what })?;
        }
        Ok(run.tally)
    }
}

struct Run<'a> {
    planned: &'a mut Planned,
    reference: Reference,
    /// What the configuration says now.
    shop: Shop,
    /// How often each connection has changed its port.
    ports: [u16; CONNECTIONS as usize],
    tally: Tally,
    begun: Instant,
}

impl Run<'_> {
    fn tuple(&self, c: u8) -> Tuple {
        let family = if c.is_multiple_of(2) { Family::V4 } else { Family::V6 };
        let protocol = if c < CONNECTIONS - DATAGRAMS { IPPROTO_TCP } else { IPPROTO_UDP };
        let port = 10_000 + u16::from(c) * 512 + self.ports[usize::from(c)] % 512;
        tuple(1 + u16::from(c), family, port, protocol)
    }

    fn event(&mut self, event: Event) -> Result<(), String> {
        self.reference.slack_ms = self.begun.elapsed().as_millis() as u64;
        match event {
            Event::Open { c, fresh, seq } => self.open(c, fresh, seq)?,
            Event::Resend { c } => {
                let tuple = self.tuple(c);
                if let Some(isn) = self.state(&tuple, |s| s == State::HalfOpen) {
                    self.tcp(&tuple, Sent::Resend, Segment::tcp(TCP_SYN, isn))?;
                }
            }
            Event::Duplicate { c } => {
                let tuple = self.tuple(c);
                let bucket = self.planned.bucket(&tuple);
                if self.reference.may_duplicate(&tuple, bucket)
                    && let Some(isn) = self.state(&tuple, |s| s == State::Open)
                {
                    self.tcp(&tuple, Sent::Duplicate, Segment::tcp(TCP_SYN, isn))?;
                }
            }
            Event::Data { c, bytes } => self.data(c, u32::from(bytes))?,
            Event::Late { c, bytes } => {
                let tuple = self.tuple(c);
                if let Some(isn) = self.state(&tuple, |s| s != State::HalfOpen) {
                    let sent = self.reference.connection(&tuple).map_or(0, |c| c.sent);
                    let bytes = u32::from(bytes).min(sent);
                    let seq = isn.wrapping_add(1).wrapping_add(sent - bytes);
                    let segment = Segment::tcp(TCP_ACK, seq).carrying(bytes);
                    self.tcp(&tuple, Sent::Data, segment)?;
                }
            }
            Event::Fin { c } => self.close(c, Sent::Fin, TCP_FIN | TCP_ACK)?,
            Event::Reset { c } => self.close(c, Sent::Reset, TCP_RST)?,
            Event::ForgedSyn { c, guess } => {
                let tuple = self.tuple(c);
                if self.reference.may_forge(&tuple)
                    && let Some(isn) = self.state(&tuple, |s| s == State::Open)
                {
                    // Far from what the client has sent and will send.
                    let seq = isn.wrapping_add(1 << 31).wrapping_add(guess);
                    self.tcp(&tuple, Sent::Forged, Segment::tcp(TCP_SYN, seq))?;
                }
            }
            Event::ForgedEnd { c, fin, guess } => {
                let tuple = self.tuple(c);
                if let Some(isn) = self.state(&tuple, |s| s == State::Open) {
                    let seq = isn.wrapping_add(1 << 31).wrapping_add(guess);
                    let flags = if fin { TCP_FIN | TCP_ACK } else { TCP_RST };
                    self.tcp(&tuple, Sent::Blind, Segment::tcp(flags, seq))?;
                }
            }
            Event::Answer { c } => self.answer(c)?,
            Event::Datagram { c } => self.datagram(c)?,
            Event::Everybody { again } => {
                for c in 0..CONNECTIONS {
                    let tuple = self.tuple(c);
                    let Some(connection) = self.reference.connection(&tuple) else { continue };
                    let (state, isn) = (connection.state, connection.isn);
                    if c >= CONNECTIONS - DATAGRAMS {
                        self.datagram(c)?;
                    } else if again && state == State::HalfOpen {
                        self.tcp(&tuple, Sent::Resend, Segment::tcp(TCP_SYN, isn))?;
                    } else {
                        self.data(c, 100)?;
                    }
                }
            }
            Event::Idle { ms } => {
                self.planned.pass(std::time::Duration::from_millis(ms.into()));
                self.changed()?;
            }
            _ => {
                self.change(event);
                self.tally.changes += 1;
                self.changed()?;
            }
        }
        Ok(())
    }

    fn change(&mut self, event: Event) {
        match event {
            Event::Split { v2, v3 } => {
                let (v2, v3) = (format!("{v2}%"), format!("{v3}%"));
                self.planned.split(&[("v2", &v2), ("v3", &v3)]);
            }
            Event::Down { n, down } => self.down(n, down),
            Event::Fails { version, down } => {
                let backends = self.shop.versions[usize::from(version)].backends.clone();
                backends.iter().for_each(|(n, _)| self.down(*n, down));
            }
            Event::Told { n, admin } => {
                if !ALWAYS.contains(&n) && self.is_configured(n) {
                    self.planned.tell(n, admin);
                    self.observe();
                    self.reference.told(n, admin);
                }
            }
            Event::Reachable { n, reachable } => {
                let set = &mut self.reference.unreachable;
                if reachable {
                    set.remove(&n)
                } else {
                    set.insert(n)
                };
                self.reference.silent.remove(&n);
                self.planned.reachable(n, reachable);
            }
            Event::Silent { n } => {
                self.reference.unreachable.remove(&n);
                self.reference.silent.insert(n);
                self.planned.silent(n);
            }
            Event::Weight { n, weight, live } => {
                let weight = if ALWAYS.contains(&n) { weight.max(1) } else { weight };
                let backends = self.shop.versions.iter_mut().flat_map(|v| &mut v.backends);
                backends.filter(|(b, _)| *b == n).for_each(|(_, w)| *w = weight);
                self.reconfigure(live);
            }
            Event::Configured { n, configured, live } => {
                if ALWAYS.contains(&n) {
                    return;
                }
                let version = match n {
                    ..=3 => 0,
                    4..=5 => 1,
                    _ => 2,
                };
                let backends = &mut self.shop.versions[version].backends;
                let there = backends.iter().any(|(b, _)| *b == n);
                if there == configured {
                    return;
                }
                if configured {
                    backends.push((n, 1));
                } else {
                    backends.retain(|(b, _)| *b != n);
                }
                self.reconfigure(live);
                self.reference.now_ms = self.planned.now_ms;
                self.reference.configured(n, configured);
            }
            _ => self.restart(),
        }
    }

    fn is_configured(&self, n: u16) -> bool {
        self.shop.versions.iter().flat_map(|v| &v.backends).any(|(b, _)| *b == n)
    }

    fn down(&mut self, n: u16, down: bool) {
        if !self.is_configured(n) {
            // Nobody checks it.
            return;
        }
        let set = &mut self.reference.down;
        if down {
            set.insert(n)
        } else {
            set.remove(&n)
        };
        self.planned.down(n, down);
        self.observe();
    }

    /// Goes on with what the configuration says now.
    fn reconfigure(&mut self, live: bool) {
        match live {
            true => {
                // What is due by then happens before, and is seen.
                self.planned.pass(std::time::Duration::from_millis(QUARANTINE_MS));
                self.observe();
                self.planned.reload(&self.shop);
                self.recall_checks();
            }
            false => self.restart(),
        }
    }

    /// Nobody really checks here, so what the checks find is told again: a reload begins with up,
    /// and the next agent with down for what fails its checks or did not answer.
    fn recall_checks(&mut self) {
        let configured = self.shop.versions.iter().flat_map(|v| &v.backends);
        for n in configured.map(|(n, _)| *n).collect::<Vec<_>>() {
            self.planned.down(n, self.reference.down.contains(&n));
        }
    }

    fn restart(&mut self) {
        // What is due by then happens before, and is seen.
        self.planned.pass(std::time::Duration::from_millis(QUARANTINE_MS));
        self.observe();
        self.planned.restart(&self.shop);
        self.recall_checks();
    }

    /// Looks at the tables after something may have changed them.
    fn changed(&mut self) -> Result<(), String> {
        self.observe();
        for family in [Family::V4, Family::V6] {
            self.check_table(family)?;
        }
        if !self.reference.rules.nat && self.planned.tracked() == 0 {
            let flows = self.planned.flows();
            if flows > 0 {
                return Err(format!("nothing is tracked, and there are {flows} flow entries"));
            }
            self.tally.steady += 1;
        }
        Ok(())
    }

    fn observe(&mut self) {
        self.reference.now_ms = self.planned.now_ms;
        let mut numbers =
            vec![None; 1 + usize::from(canary_ebpf_common::entry::BackendIndex::MAX.get())];
        for (index, _) in &self.planned.in_force().backends {
            numbers[usize::from(index.get())] = self.planned.number(*index);
        }
        for (at, family) in [Family::V4, Family::V6].into_iter().enumerate() {
            let table = self.planned.table(family);
            let rows = table.entries.iter().zip(table.ledger.iter());
            let seen: Vec<Seen> = rows
                .map(|(entry, record)| Seen {
                    current: numbers[usize::from(entry.current().get())],
                    owner: record.owner(),
                    tracked: entry.tracked(),
                })
                .collect();
            let planned = &self.planned;
            self.reference.observe(at, &seen, |tuple| planned.bucket(tuple));
        }
    }

    /// Whether versions have the shares that were asked for, and backends their weights.
    fn check_table(&self, family: Family) -> Result<(), String> {
        let Reference { out, .. } = &self.reference;
        let service = &self.planned.planner.services()[0];
        let table = self.planned.table(family);
        let buckets = &self.reference.buckets[usize::from(family == Family::V6)];
        let weighted = |name: &str| -> Vec<(u16, u32)> {
            let version = self.shop.versions.iter().find(|v| v.name == name);
            let backends = version.into_iter().flat_map(|v| v.backends.clone());
            backends.filter(|(n, w)| *w > 0 && !out.contains_key(n)).collect()
        };
        let up = |name: &str| -> Vec<(u16, u32)> {
            weighted(name).into_iter().filter(|(n, _)| !self.reference.fails(*n)).collect()
        };
        // If none of control's is healthy, the checks are taken to be wrong.
        let control = self.shop.versions[0].name;
        let away = |n: u16| self.reference.is_away(n);
        let reachable = || weighted(control).into_iter().filter(|(n, _)| !away(*n));
        let of_control = [up(control), reachable().collect(), weighted(control)];
        let of_control = of_control.into_iter().find(|b| !b.is_empty()).unwrap_or_default();
        for (slot, name) in (0_u8..).zip(&table.versions) {
            let own: Vec<&crate::reference::Bucket> =
                buckets.iter().filter(|b| b.owner == slot).collect();
            let total = buckets.len() as f64;
            if name != control && !name.is_empty() {
                let share = service.ownership().split.get(name).map_or(0.0, |s| {
                    s.to_string().trim_end_matches('%').parse::<f64>().unwrap_or(f64::NAN)
                });
                let exact = share * total / 100.0;
                if (own.len() as f64 - exact).abs() > 1.0 {
                    return Err(format!(
                        "{name} has {} buckets of {total}, asked {share} %",
                        own.len()
                    ));
                }
            }
            let (members, exactly) = match (name == control, up(name)) {
                (true, _) => (of_control.clone(), true),
                (false, up) if !up.is_empty() => (up, true),
                (false, _) if self.shop.fallback == "control" => (of_control.clone(), false),
                (false, _) => (Vec::new(), true),
            };
            if let Some(stray) = own.iter().find(|b| match b.current {
                Some(n) => !members.iter().any(|(m, _)| *m == n),
                None => !members.is_empty(),
            }) {
                return Err(format!(
                    "a bucket of {name} goes to {:?}, not to one of {members:?}",
                    stray.current
                ));
            }
            let weights: u32 = members.iter().map(|(_, w)| w).sum();
            for (n, weight) in &members {
                let count = own.iter().filter(|b| b.current == Some(*n)).count() as f64;
                let exact = own.len() as f64 * f64::from(*weight) / f64::from(weights);
                if exactly && (count - exact).abs() > 1.0 {
                    return Err(format!(
                        "backend {n} of {name} has {count} buckets, its weight says {exact}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The initial sequence number of a connection whose state is as `wanted`.
    fn state(&mut self, tuple: &Tuple, wanted: impl Fn(State) -> bool) -> Option<u32> {
        self.reference.connection(tuple).filter(|c| wanted(c.state)).map(|c| c.isn)
    }

    fn open(&mut self, c: u8, fresh: bool, seq: u32) -> Result<(), String> {
        let before = self.tuple(c);
        let mut isn = seq;
        if fresh {
            self.ports[usize::from(c)] += 1;
        } else if let Some(old) = self.reference.open.get(&before) {
            // As RFC 6528 has it: past what the last connection may still have under way.
            isn = old.isn.wrapping_add(1 << 30).wrapping_add(seq & 0xfff_ffff);
        }
        let tuple = self.tuple(c);
        let old = self.reference.open.get(&tuple).cloned();
        self.tally.opened += 1;
        self.tcp(&tuple, Sent::Open { isn }, Segment::tcp(TCP_SYN, isn))?;
        let follows = |old: &Connection| {
            self.planned.flow(&tuple).is_some_and(|flow| flow.syn_seq == old.isn && old.isn != isn)
        };
        if self.reference.rules.nat
            && let Some(old) = old.filter(follows)
        {
            // The server has a connection there, and says with which number it goes on; the
            // client has none, refuses that, and asks again (RFC 9293, 3.10.7.4 and 3.5.2).
            let next = old.isn.wrapping_add(1).wrapping_add(old.sent);
            self.planned.translated(&tuple, Segment::tcp(TCP_RST, next));
            self.tcp(&tuple, Sent::Open { isn }, Segment::tcp(TCP_SYN, isn))?;
        }
        Ok(())
    }

    fn data(&mut self, c: u8, bytes: u32) -> Result<(), String> {
        let tuple = self.tuple(c);
        let Some(connection) = self.reference.connection(&tuple) else { return Ok(()) };
        let next = connection.isn.wrapping_add(1).wrapping_add(connection.sent);
        let segment = if connection.finished {
            // Its FIN has a number, and nothing is sent after that.
            Segment::tcp(TCP_ACK, next.wrapping_add(1))
        } else {
            connection.sent += bytes;
            Segment::tcp(TCP_ACK, next).carrying(bytes)
        };
        self.tcp(&tuple, Sent::Data, segment)
    }

    fn close(&mut self, c: u8, sent: Sent, flags: u8) -> Result<(), String> {
        let tuple = self.tuple(c);
        let Some(connection) = self.reference.connection(&tuple) else { return Ok(()) };
        let seq = connection.isn.wrapping_add(1).wrapping_add(connection.sent);
        self.tcp(&tuple, sent, Segment::tcp(flags, seq))
    }

    fn tcp(&mut self, tuple: &Tuple, sent: Sent, segment: Segment) -> Result<(), String> {
        let seq = segment.seq;
        let (went, port) = self.judged(tuple, sent, segment)?;
        if self.reference.rules.nat
            && matches!(sent, Sent::Open { .. } | Sent::Resend)
            && let Went::To(backend) = went
            && self.planned.flow(tuple).is_some_and(|flow| flow.syn_seq == seq)
        {
            self.answered(tuple, backend, port, |planned| {
                planned.syn_ack(tuple, backend, port, seq)
            })?;
        }
        Ok(())
    }

    fn datagram(&mut self, c: u8) -> Result<(), String> {
        let tuple = self.tuple(c);
        self.tally.opened += u64::from(self.reference.connection(&tuple).is_none());
        let segment = Segment::udp();
        self.judged(&tuple, Sent::Datagram, segment).map(drop)
    }

    /// Where a packet went, and with which source port.
    fn judged(
        &mut self,
        tuple: &Tuple,
        sent: Sent,
        segment: Segment,
    ) -> Result<(Went, u16), String> {
        let went = self.planned.translated(tuple, segment);
        self.tally.packets += 1;
        let bucket = self.planned.bucket(tuple);
        if let Some(connection) = self.reference.open.get(tuple) {
            let moved = self.planned.current(tuple) != Some(connection.backend);
            self.tally.kept += u64::from(moved && went.0 == Went::To(connection.backend));
        }
        self.reference.judge(tuple, bucket, sent, went)?;
        Ok(went)
    }

    fn answer(&mut self, c: u8) -> Result<(), String> {
        let tuple = self.tuple(c);
        let Some(connection) = self.reference.connection(&tuple) else { return Ok(()) };
        let Connection { backend, port, isn, sent, state, .. } = connection.clone();
        self.answered(&tuple, backend, port, |planned| {
            if state == State::HalfOpen {
                return planned.syn_ack(&tuple, backend, port, isn);
            }
            let ack = isn.wrapping_add(1).wrapping_add(sent);
            planned.answer(&tuple, backend, port, Segment::tcp(TCP_ACK, SERVER_SEQ + 1), ack)
        })
    }

    /// Lets a backend answer, which has to reach the client.
    fn answered(
        &mut self,
        tuple: &Tuple,
        backend: u16,
        port: u16,
        answer: impl FnOnce(&mut Planned) -> bool,
    ) -> Result<(), String> {
        self.tally.packets += 1;
        match answer(self.planned) {
            true => Ok(()),
            false => Err(format!(
                "an answer of {backend} from port {port} of {tuple:?} does not reach the client"
            )),
        }
    }
}

impl Tally {
    /// Adds what another sequence came to.
    pub(crate) fn add(&mut self, other: &Self) {
        let Self { packets, opened, changes, kept, steady } = other;
        self.packets += packets;
        self.opened += opened;
        self.changes += changes;
        self.kept += kept;
        self.steady += steady;
    }
}
