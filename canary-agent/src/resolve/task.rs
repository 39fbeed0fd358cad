//! The resolver's task: hears changes, asks the kernel, publishes what differs.
//!
//! Owns the tables, the route answers and the pace. Must not decide anything about a
//! next hop: that is for `choose` and `care`.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddrV6, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use tokio::sync::{mpsc, watch};

use super::{
    Sign, Unresolved, Update, Wants,
    answers::Answers,
    care::Care,
    choose::{self, Route},
    netlink::{Heard, Mode, Monitor, Requests},
    silence::{Judgement, Silence},
    tables::{Stale, Standing, Tables, Trouble},
    verify::{Answer, Question, Verifier},
    wire::{self, Message, NeighbourKey},
};

/// Changes within this time of the first are published together.
const COALESCE: Duration = Duration::from_millis(20);
/// In one turn this many neighbours are used at most: a thousand a second.
const TURN_SIZE: usize = 100;
const TURN: Duration = Duration::from_millis(100);
/// Looking routes up takes at most a fifth of the time, unless that would delay by more
/// than this.
const ROUTE_PAUSE_MAX: Duration = Duration::from_millis(500);
const DISCARD_PORT: u16 = 9;
/// Known neighbours are asked whether they are still the same all in turn, some each tick:
/// each in every sixth tick while they are few, and never more than 500 a second.
const VERIFY_TICK: Duration = Duration::from_millis(100);
const VERIFY_TICKS_A_ROUND: usize = 6;
const VERIFY_IN_A_TICK_MAX: usize = 50;
/// Those in doubt are asked besides, but never more than so many in a tick.
const DOUBTS_IN_A_TICK_MAX: usize = 200;

/// From one tick to the next with so many neighbours to ask: those that are fewer than ticks in
/// a round don't need each of them.
fn verify_pause(neighbours: usize) -> Duration {
    VERIFY_TICK * (VERIFY_TICKS_A_ROUND / neighbours.clamp(1, VERIFY_TICKS_A_ROUND)) as u32
}

/// After the kernel could not be asked.
const RETRY: Duration = Duration::from_secs(1);

/// The task's state.
pub(super) struct Task {
    monitor: Monitor,
    requests: Requests,
    wants: watch::Receiver<Wants>,
    publish: watch::Sender<Update>,
    wanted: Wants,
    tables: Tables,
    routes: HashMap<IpAddr, Result<Route, Unresolved>>,
    care: Care,
    /// The tables have to be read anew.
    resync: bool,
    /// Route answers that may no longer hold.
    stale: Stale,
    /// When to look routes up at the earliest.
    routes_from: Instant,
    /// When to look up those that had to wait.
    routes_at: Option<Instant>,
    /// When to bring everything up to date.
    settle_at: Option<Instant>,
    /// When the present turn of using neighbours ends, and how many it may still use.
    turn_ends: Instant,
    turn_left: usize,
    /// For neighbours that can only be used by sending to them; opened when first needed.
    discard: Option<UdpSocket>,
    verifier: Option<Verifier>,
    answers: Answers,
    silence: Silence,
    /// When those in doubt may be asked as many again, and how many until then.
    doubts_from: Instant,
    doubts_left: usize,
    /// The needed neighbours, each with our address towards it.
    sources: HashMap<NeighbourKey, IpAddr>,
    /// The same in the order in which they are asked.
    rounds: VecDeque<NeighbourKey>,
    /// What others have seen of destinations.
    signs: mpsc::Receiver<Sign>,
    verify_at: Instant,
}

impl Task {
    /// A task that will read everything first.
    pub(super) fn new(
        monitor: Monitor,
        requests: Requests,
        mut wants: watch::Receiver<Wants>,
        publish: watch::Sender<Update>,
        signs: mpsc::Receiver<Sign>,
        verifier: Option<Verifier>,
    ) -> Self {
        let now = Instant::now();
        // What has been asked for before the task first runs is seen as a change.
        wants.mark_changed();
        Self {
            monitor,
            requests,
            wants,
            publish,
            wanted: Wants::default(),
            tables: Tables::default(),
            routes: HashMap::new(),
            care: Care::default(),
            resync: true,
            stale: Stale::All,
            routes_from: now,
            routes_at: None,
            settle_at: Some(now),
            turn_ends: now,
            turn_left: 0,
            discard: None,
            verifier,
            answers: Answers::default(),
            silence: Silence::default(),
            doubts_from: now,
            doubts_left: 0,
            sources: HashMap::new(),
            rounds: VecDeque::new(),
            signs,
            verify_at: now,
        }
    }

    /// Runs until the resolver is dropped.
    pub(super) async fn run(mut self) {
        loop {
            let due = self.due();
            let timer = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.wants.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.wanted = self.wants.borrow_and_update().clone();
                    self.settle_soon(Instant::now());
                }
                Some(sign) = self.signs.recv() => self.take_sign(sign),
                heard = self.monitor.hear() => self.take_in(heard).await,
                answer = answer(self.verifier.as_ref()) => self.take_answer(answer),
                () = timer => {}
            }
            if let Err(error) = self.work().await {
                tracing::warn!(%error, "cannot ask the kernel for routes and neighbours; trying again");
                self.resync = true;
                let later = Instant::now() + RETRY;
                self.settle_at = Some(later);
                (self.turn_ends, self.turn_left) = (later, 0);
            }
        }
    }

    fn due(&self) -> Option<Instant> {
        let turn = self.care.next().map(|due| match self.turn_left {
            0 => due.max(self.turn_ends),
            _ => due,
        });
        let verify = (!self.rounds.is_empty()).then_some(self.verify_at);
        let (moved, judged) = (self.answers.next(), self.silence.next());
        [self.settle_at, self.routes_at, turn, verify, moved, judged].into_iter().flatten().min()
    }

    /// A burst is settled a fixed time after its first change, however long it goes on.
    fn settle_soon(&mut self, now: Instant) {
        self.settle_at.get_or_insert(now + COALESCE);
    }

    async fn take_in(&mut self, heard: io::Result<Heard>) {
        let now = Instant::now();
        match heard {
            Ok(Heard::Messages(messages)) => {
                for message in messages {
                    self.observe(message, now);
                }
            }
            Ok(Heard::Lost) => {
                tracing::info!("netlink changes were lost; reading all tables again");
                self.resync = true;
                self.settle_soon(now);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot hear of netlink changes; reading all tables again");
                self.resync = true;
                self.settle_soon(now);
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    fn observe(&mut self, message: Message, now: Instant) {
        let effect = self.tables.apply(message);
        let published = match effect.neighbour {
            Some((key, before)) if self.care.wants(key) => {
                let after = self.tables.standing(key);
                self.care.noticed(key, before, after, now);
                self.found(key, before, after);
                effect.published
            }
            // Nobody's next hop.
            Some(_) => false,
            None => effect.published,
        };
        let routes = effect.stale.touches(&self.wanted.destinations);
        if routes {
            self.stale.add(effect.stale);
        }
        if published || routes {
            self.settle_soon(now);
        }
    }

    /// A neighbour that the kernel had lost, and has asked for until it answered, is alive.
    fn found(&mut self, key: NeighbourKey, before: Standing, after: Standing) {
        if before == Standing::Missing && after != Standing::Missing {
            self.silence.alive(key);
        }
    }

    async fn work(&mut self) -> io::Result<()> {
        if self.silence.next().is_some_and(|due| due <= Instant::now()) {
            self.judge();
        }
        let now = Instant::now();
        if [self.settle_at, self.routes_at].into_iter().flatten().any(|at| at <= now) {
            (self.settle_at, self.routes_at) = (None, None);
            self.settle().await?;
        }
        let now = Instant::now();
        if self.turn_ends <= now {
            (self.turn_ends, self.turn_left) = (now + TURN, TURN_SIZE);
        }
        if self.turn_left > 0 && self.care.next().is_some_and(|due| due <= now) {
            self.use_neighbours(now).await?;
        }
        if self.verify_at <= now && !self.rounds.is_empty() {
            self.verify_at = now + verify_pause(self.rounds.len());
            self.verify_some();
        }
        self.tell_moves(Instant::now()).await
    }

    async fn settle(&mut self) -> io::Result<()> {
        if self.resync {
            self.read_tables().await?;
        }
        self.look_up_routes().await?;
        let mut needed = HashMap::new();
        for route in self.routes.values().flatten() {
            if let Some(key) = choose::needed(route, &self.tables) {
                needed.entry(key).or_insert(route.source);
            }
        }
        self.care.want(&needed, Instant::now());
        self.tables.keep_troubles(|key| needed.contains_key(&key));
        self.answers.keep(|key| needed.contains_key(&key));
        self.silence.keep(|key| needed.contains_key(&key));
        // Those that stay keep their places, so that a busy host still gets round to all.
        self.rounds.retain(|key| needed.contains_key(key));
        let new = needed.keys().filter(|key| !self.sources.contains_key(*key));
        self.rounds.extend(new);
        self.sources = needed;
        self.publish();
        Ok(())
    }

    async fn read_tables(&mut self) -> io::Result<()> {
        let mut dumps = self.requests.dump(wire::all_links()).await?;
        dumps.extend(self.requests.dump(wire::all_addresses()).await?);
        dumps.extend(self.requests.dump(wire::all_neighbours()).await?);
        let before = std::mem::take(&mut self.tables);
        self.tables = before.rebuilt(dumps);
        let now = Instant::now();
        for route in self.routes.values().flatten() {
            let key = route.neighbour;
            let (before, after) = (before.standing(key), self.tables.standing(key));
            self.care.noticed(key, before, after, now);
            if before == Standing::Missing && after != Standing::Missing {
                self.silence.alive(key);
            }
        }
        self.stale = Stale::All;
        self.resync = false;
        Ok(())
    }

    async fn look_up_routes(&mut self) -> io::Result<()> {
        let wanted = Arc::clone(&self.wanted.destinations);
        self.routes.retain(|destination, _| wanted.contains(destination));
        let start = Instant::now();
        // Destinations that have no answer yet do not wait.
        let again = start >= self.routes_from;
        if !again && self.stale != Stale::Nothing {
            self.routes_at = Some(self.routes_from);
        }
        let stale = if again { std::mem::take(&mut self.stale) } else { Stale::Nothing };
        let destinations: Vec<_> = wanted
            .iter()
            .copied()
            .filter(|&address| stale.covers(address) || !self.routes.contains_key(&address))
            .collect();
        let (fixed, asked): (Vec<_>, Vec<_>) =
            destinations.into_iter().partition(|&address| choose::not_routable(address).is_some());
        for destination in fixed {
            if let Some(reason) = choose::not_routable(destination) {
                self.routes.insert(destination, Err(reason));
            }
        }
        let lookups =
            asked.iter().map(|&address| (Mode::Get, wire::route_lookup(address))).collect();
        let answers = match self.requests.exchange(lookups).await {
            Ok(answers) => answers,
            Err(error) => {
                self.stale.add(stale);
                return Err(error);
            }
        };
        for (destination, answer) in asked.into_iter().zip(answers) {
            self.routes.insert(destination, choose::route(destination, answer));
        }
        let end = Instant::now();
        self.routes_from = end + ((end - start) * 4).min(ROUTE_PAUSE_MAX);
        Ok(())
    }

    async fn use_neighbours(&mut self, now: Instant) -> io::Result<()> {
        let keys = self.care.take(now, self.turn_left, &self.tables);
        self.turn_left = self.turn_left.saturating_sub(keys.len());
        let (keys, sent_to): (Vec<_>, Vec<_>) =
            keys.into_iter().partition(|&key| choose::askable(key, &self.tables));
        for key in sent_to {
            if let Err(error) = self.send_to(key) {
                tracing::debug!(?key, %error, "cannot send to a neighbour");
            }
        }
        let uses = keys.iter().map(|&key| (Mode::Create, wire::neighbour_use(key))).collect();
        let answers = self.requests.exchange(uses).await?;
        for (key, answer) in keys.into_iter().zip(answers) {
            match answer {
                Ok(_) => {}
                Err(Errno::ENOBUFS) => {
                    if self.tables.note_full(key) {
                        self.settle_soon(now);
                    }
                }
                // Its link has gone, or it is just being removed: the change is on its way.
                Err(errno) => tracing::debug!(?key, %errno, "cannot use a neighbour"),
            }
        }
        Ok(())
    }

    /// Sends an empty datagram to the discard port of a neighbour (RFC 863), so that the
    /// kernel asks for it with the datagram's source address.
    fn send_to(&mut self, key: NeighbourKey) -> io::Result<()> {
        let IpAddr::V6(address) = key.address else {
            return Ok(());
        };
        let socket = match &self.discard {
            Some(socket) => socket,
            None => {
                let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
                socket.set_nonblocking(true)?;
                self.discard.insert(socket)
            }
        };
        let scope = if address.is_unicast_link_local() { key.ifindex } else { 0 };
        socket.send_to(&[], SocketAddrV6::new(address, DISCARD_PORT, 0, scope)).map(drop)
    }

    fn verify_some(&mut self) {
        let share = self.rounds.len().div_ceil(VERIFY_TICKS_A_ROUND).min(VERIFY_IN_A_TICK_MAX);
        for _ in 0..share {
            if let Some(key) = self.rounds.pop_front() {
                self.verify(key, false);
                self.rounds.push_back(key);
            }
        }
    }

    fn take_sign(&mut self, sign: Sign) {
        let neighbour = |address| match self.routes.get(&address) {
            Some(Ok(route)) => Some(route.neighbour),
            _ => None,
        };
        match sign {
            Sign::Suspect(address) => {
                if let Some(key) = neighbour(address) {
                    self.verify(key, false);
                }
            }
            Sign::Alive(address) => {
                if let Some(key) = neighbour(address)
                    && self.silence.alive(key)
                {
                    self.settle_soon(Instant::now());
                }
            }
        }
    }

    /// Asks a neighbour, by a question to everybody, and where it is `doubted` by one to itself,
    /// too: not every switch lets groups' frames through at all times.
    fn verify(&mut self, key: NeighbourKey, doubted: bool) {
        let NeighbourKey { ifindex, address: neighbour } = key;
        let (Some(verifier), Some(link)) = (&self.verifier, self.tables.link(ifindex)) else {
            return;
        };
        let (Some(source_mac), Some(&source)) = (link.mac, self.sources.get(&key)) else {
            return;
        };
        let mac = match (self.tables.standing(key), self.tables.trouble(key)) {
            (Standing::Good | Standing::Aged, _) => self.tables.mac(key),
            // The kernel asks for it only now and then.
            (Standing::Missing, Some(Trouble::Silent)) => None,
            (Standing::Fixed | Standing::Missing, _) => return,
        };
        // IPv4 by way of an IPv6 gateway.
        let source = match self.tables.link_local(ifindex) {
            Some(ours) if source.is_ipv4() && neighbour.is_ipv6() => ours,
            _ => source,
        };
        let to_all = Question { ifindex, neighbour, source, source_mac, only: None };
        let to_it =
            doubted.then_some(mac).flatten().map(|mac| Question { only: Some(mac), ..to_all });
        let now = Instant::now();
        let mut asked = true;
        for question in [Some(to_all), to_it].into_iter().flatten() {
            asked &= verifier.ask(&question).unwrap_or_else(|error| {
                tracing::debug!(?question, %error, "cannot ask a neighbour");
                false
            });
        }
        self.answers.asked(key, now);
        // What has not been sent can't be answered.
        if asked && mac.is_some() {
            self.silence.asked(key, now);
        }
    }

    fn take_answer(&mut self, answer: io::Result<Answer>) {
        let now = Instant::now();
        match answer {
            Ok(Answer { ifindex, neighbour, mac }) => {
                let key = NeighbourKey { ifindex, address: neighbour };
                self.care.answered(key, self.tables.standing(key), now);
                if self.silence.answered(key, now) {
                    self.settle_soon(now);
                }
                if let (Some(mac), Some(known)) = (mac, self.tables.mac(key)) {
                    self.answers.answered(key, mac, known, now);
                }
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    "answers of neighbours can't be heard: a MAC address that changes within a \
                     second of another change, and a neighbour that dies, are followed late"
                );
                self.verifier = None;
                self.silence = Silence::default();
                self.settle_soon(now);
            }
        }
    }

    /// Finds out who has stopped answering.
    fn judge(&mut self) {
        // All that has come counts, however late we are.
        while let Ok(sign) = self.signs.try_recv() {
            self.take_sign(sign);
        }
        let heard = self.verifier.as_ref().map_or(Ok(Vec::new()), Verifier::heard);
        match heard {
            Ok(answers) => answers.into_iter().for_each(|answer| self.take_answer(Ok(answer))),
            Err(error) => self.take_answer(Err(error)),
        }
        let now = Instant::now();
        if self.doubts_from <= now {
            (self.doubts_from, self.doubts_left) = (now + VERIFY_TICK, DOUBTS_IN_A_TICK_MAX);
        }
        let Judgement { news, doubted, witnesses } = self.silence.judge(now, self.doubts_left);
        self.doubts_left = self.doubts_left.saturating_sub(doubted.len());
        doubted.into_iter().for_each(|key| self.verify(key, true));
        witnesses.into_iter().for_each(|key| self.verify(key, false));
        if news {
            self.settle_soon(now);
        }
    }

    /// Tells the kernel which neighbours have answered with another MAC address. If its entry
    /// says so by now, that changes nothing.
    async fn tell_moves(&mut self, now: Instant) -> io::Result<()> {
        let moved = self.answers.take(now);
        if moved.is_empty() {
            return Ok(());
        }
        let (keys, messages): (Vec<_>, Vec<_>) = moved
            .into_iter()
            .filter(|(key, mac)| {
                let standing = self.tables.standing(*key);
                matches!(standing, Standing::Good | Standing::Aged)
                    && self.tables.mac(*key) != Some(*mac)
            })
            .map(|(key, mac)| (key, (Mode::Replace, wire::neighbour_moved(key, mac))))
            .unzip();
        let answers = self.requests.exchange(messages).await?;
        for (key, answer) in keys.into_iter().zip(answers) {
            if let Err(errno) = answer {
                // It is just being removed: the change is on its way.
                tracing::debug!(?key, %errno, "a neighbour's entry can't be changed");
            }
        }
        Ok(())
    }

    fn publish(&self) {
        let hops: HashMap<_, _> = self
            .routes
            .iter()
            .map(|(&destination, route)| {
                let hop = match route {
                    Ok(route) => {
                        choose::next_hop(route, &self.tables, |key| self.silence.is_silent(key))
                    }
                    Err(reason) => Err(reason.clone()),
                };
                (destination, hop)
            })
            .collect();
        let links = self.tables.links_named(&self.wanted.interfaces);
        let macs = self.tables.macs(&self.wanted.interfaces);
        let addresses = self.tables.host_addresses();
        self.publish.send_if_modified(|update| {
            let mut changed = false;
            replace(&mut update.hops, hops, &mut changed);
            replace(&mut update.links, links, &mut changed);
            replace(&mut update.macs, macs, &mut changed);
            replace(&mut update.addresses, addresses, &mut changed);
            changed |= update.nobody_answers != self.silence.nobody();
            update.nobody_answers = self.silence.nobody();
            changed
        });
    }
}

async fn answer(verifier: Option<&Verifier>) -> io::Result<Answer> {
    match verifier {
        Some(verifier) => verifier.hear().await,
        None => std::future::pending().await,
    }
}

/// Replaces what differs; what does not stays shared with those who have it.
fn replace<T: PartialEq>(place: &mut Arc<T>, value: T, changed: &mut bool) {
    if **place != value {
        *place = Arc::new(value);
        *changed = true;
    }
}
