//! The thread that looks after the connections that are watched.
//!
//! The loop says what is wanted; the thread chooses how many of each version's connections that
//! are, lets go of those whose time is over, and makes windows of what was seen. It alone writes
//! `SAMPLING`. What is in the maps is gone on with by the next agent.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use canary_ebpf_common::{
    abi::{HANDSHAKE_BUCKETS, Sampling, VersionSignals},
    entry::BackendIndex,
    signals::{MOST_HALVINGS, mask},
};

use tokio::sync::mpsc;

use super::{Event, Kernel, State, rollout::Compared};
use crate::{
    config::model::SignalKind,
    datapath::{self, Signals},
    plan::{BootMs, Family, ServiceState},
    rollout::watch::Counted,
    signals::{
        choose::halvings,
        histogram::quantile,
        whose,
        window::{Events, ServiceWindow, VersionWindow, between},
    },
    store::StateStore,
};

/// The length of a window.
pub const WINDOW: Duration = Duration::from_secs(1);
/// So often the ring buffer is emptied.
const DRAIN: Duration = Duration::from_millis(250);
/// Of the room for watched connections, the part that may begin in a second.
pub(super) const BEGIN_PART: f64 = 8.0;
/// So many handshakes of control's say what is slow, where no rollout has said it.
const HANDSHAKES: u64 = 100;
/// So many connections of control's say what is usual.
const ENOUGH: u64 = 1_000;
/// The part of [`HANDSHAKES`] that is not slow.
const QUICK_PERMILLE: u16 = 950;
/// Handshakes of two of these are recent.
const RECENT: Duration = Duration::from_secs(60);
/// Between changes of how many connections are watched because of the room that they take.
const MORE: Duration = Duration::from_secs(60);
const FEWER: Duration = Duration::from_secs(5);

/// A service whose connections are to be watched.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WatchedService {
    /// Its name.
    pub name: String,
    /// The ids of its tables, and whether they are of IPv6.
    pub tables: Vec<(u16, bool)>,
    /// Its versions.
    pub versions: Vec<WatchedVersion>,
    /// The name of control.
    pub control: String,
    /// Its new connections a second.
    pub per_second: f64,
    /// A handshake that takes longer is slow; `None`: by control's, when there are enough of them.
    pub slow_over: Option<Duration>,
    /// The version that somebody wants to hear of window by window.
    pub compared: Option<String>,
    /// The service whose control it is compared with then; `None` for its own.
    pub control_of: Option<String>,
}

/// A version of a [`WatchedService`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WatchedVersion {
    /// Its name.
    pub name: String,
    /// Its slot.
    pub slot: u8,
    /// Its share of the service's buckets, a fraction.
    pub share: f64,
}

/// What is to be watched of a service. `per_second` says how many new connections a backend has.
fn watched(
    state: &ServiceState,
    per_second: impl Fn(BackendIndex) -> Option<f64>,
) -> WatchedService {
    let config = state.config();
    let owned = state.ownership().counts();
    let slots = (0_u8..).zip(state.slots()).filter(|(_, name)| !name.is_empty());
    let versions = slots.clone().map(|(slot, name)| WatchedVersion {
        name: name.clone(),
        slot,
        share: f64::from(owned[usize::from(slot)]) / f64::from(config.buckets),
    });
    let backends = slots
        .flat_map(|(slot, _)| state.tables().iter().flat_map(move |table| table.indices_of(slot)));
    WatchedService {
        name: config.name.clone(),
        tables: state.tables().iter().map(|t| (t.id(), t.family() == Family::V6)).collect(),
        versions: versions.collect(),
        control: config.versions[config.control].name.clone(),
        per_second: backends.filter_map(per_second).sum(),
        slow_over: None,
        compared: None,
        control_of: None,
    }
}

/// What is known of a service that is watched.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceSignals {
    /// The service.
    pub service: String,
    /// A handshake that takes longer is slow.
    pub slow_over: Option<Duration>,
    /// Windows in which not every event was counted, since the agent started.
    pub incomplete_windows: u64,
    /// The last window.
    pub window: ServiceWindow,
    /// Its versions.
    pub versions: Vec<KnownVersion>,
}

/// What is known of a version.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KnownVersion {
    /// Its name.
    pub version: String,
    /// One in 2 to the power of this of its connections is watched; `None` for none.
    pub halvings: Option<u32>,
    /// What has been counted since the maps were made.
    pub counters: VersionSignals,
    /// Handshakes of the last minute or two by time.
    pub recent: Handshakes,
}

/// What the thread knows, for whoever asks.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// What is known of the services that are watched.
    pub services: Vec<ServiceSignals>,
    /// What an operator should know.
    pub alerts: Vec<String>,
}

impl Known {
    /// How often a version's watched connections have had each bad outcome, as a part of them;
    /// nothing before there are enough of them, nor of what never happens.
    pub(super) fn usual(&self, service: &str, version: &str) -> Vec<(SignalKind, f64)> {
        let services = self.services.iter().filter(|one| one.service == service);
        let mut versions = services.flat_map(|one| &one.versions);
        let Some(known) = versions.find(|one| one.version == version) else { return Vec::new() };
        let VersionSignals { watched, outcomes, .. } = &known.counters;
        if *watched < ENOUGH {
            return Vec::new();
        }
        let rate = |count: &u64| *count as f64 / *watched as f64;
        let rates = SignalKind::ALL.into_iter().zip(outcomes.iter().map(rate));
        rates.filter(|(_, rate)| *rate > 0.0).collect()
    }

    /// The time that `permille` of a thousand handshakes of a version did not exceed lately; `None`
    /// before there are enough of them.
    pub(super) fn quick(&self, service: &str, version: &str, permille: u16) -> Option<Duration> {
        let service = self.services.iter().find(|one| one.service == service)?;
        let version = service.versions.iter().find(|one| one.version == version)?;
        let enough = version.recent.0.iter().sum::<u64>() >= HANDSHAKES;
        enough.then(|| quantile(&version.recent.0, permille)).flatten()
    }
}

pub(super) type SharedKnown = Arc<Mutex<Known>>;

/// Looks after what is watched.
pub struct Watcher {
    maps: Signals,
    services: Vec<Service>,
    /// By slot of the counters, whose it is; 0 for nobody's.
    slots: Vec<u32>,
    /// Where a packet's place leads: service, version, whether it is IPv6.
    places: HashMap<u32, (usize, usize, bool)>,
    /// How often the number of watched connections has been halved for want of room.
    pressed: u32,
    pressed_since: Instant,
    alerts: Vec<String>,
}

struct Service {
    wanted: WatchedService,
    epoch: u32,
    slow_ns: u64,
    versions: Vec<Version>,
    began: Instant,
    /// Nothing was missed in the present window so far.
    whole: bool,
    incomplete: u64,
    window: ServiceWindow,
}

struct Version {
    slot: Option<u32>,
    halvings: Option<u32>,
    events: Events,
    counters: VersionSignals,
    /// Handshakes as they were counted two marks ago and one mark ago.
    marks: [Handshakes; 2],
    marked: Instant,
}

/// Handshakes by time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshakes(pub [u64; HANDSHAKE_BUCKETS]);

impl Default for Handshakes {
    fn default() -> Self {
        Self([0; HANDSHAKE_BUCKETS])
    }
}

impl Version {
    fn new(slot: Option<u32>, counters: VersionSignals) -> Self {
        let marks = [Handshakes(counters.handshakes); 2];
        let events = Events::default();
        Self { slot, halvings: None, events, counters, marks, marked: Instant::now() }
    }

    /// Handshakes since the mark before the last.
    fn recent(&self) -> Handshakes {
        let [since, _] = &self.marks;
        Handshakes(std::array::from_fn(|at| {
            self.counters.handshakes[at].saturating_sub(since.0[at])
        }))
    }

    fn mark(&mut self, now: Instant) {
        if now.saturating_duration_since(self.marked) >= RECENT {
            self.marks = [self.marks[1], Handshakes(self.counters.handshakes)];
            self.marked = now;
        }
    }
}

impl Watcher {
    /// Goes on with what is in the maps. What has happened until now is counted, and in no window.
    ///
    /// # Errors
    /// When the maps can't be read.
    pub fn new(mut maps: Signals) -> Result<Self, datapath::Error> {
        let mut slots = vec![0; maps.slots() as usize];
        if maps.capacity() > 0 {
            for place in 0..maps.places() {
                let Sampling { epoch, slot, whose, .. } = maps.sampling(place)?;
                if let Some(owner) = slots.get_mut(slot as usize).filter(|_| epoch != 0) {
                    *owner = whose;
                }
            }
        }
        maps.events(drop);
        Ok(Self {
            maps,
            services: Vec::new(),
            slots,
            places: HashMap::new(),
            pressed: 0,
            pressed_since: Instant::now(),
            alerts: Vec::new(),
        })
    }

    /// Whether nothing is watched.
    pub fn is_idle(&self) -> bool {
        self.services.is_empty()
    }

    /// Watches these services and no others.
    ///
    /// # Errors
    /// When the maps can't be read or written. Calling it again goes on.
    pub fn want(&mut self, wanted: Vec<WatchedService>) -> Result<(), datapath::Error> {
        self.alerts.clear();
        let wanted = if self.maps.capacity() == 0 { Vec::new() } else { wanted };
        let mut places = HashMap::new();
        for (at, service) in wanted.iter().enumerate() {
            for (of, version) in service.versions.iter().enumerate() {
                for (table, v6) in &service.tables {
                    let place = Sampling::place(u32::from(*table), version.slot);
                    places.insert(place, (at, of, *v6));
                }
            }
        }
        if places != self.places || self.services.is_empty() {
            // What has come by now is of the services as they were.
            self.drain();
            self.let_go(&places)?;
            self.places = places;
        }
        let budget = f64::from(self.maps.capacity()) / BEGIN_PART / wanted.len().max(1) as f64;
        let budget = budget / f64::from(1_u32 << self.pressed.min(MOST_HALVINGS));
        let mut before: Vec<Option<Service>> =
            std::mem::take(&mut self.services).into_iter().map(Some).collect();
        for service in wanted {
            let same = |one: &&mut Option<Service>| {
                one.as_ref().is_some_and(|one| one.wanted.name == service.name)
            };
            let known = before.iter_mut().find(same).and_then(Option::take);
            let service = self.watch(service, known, budget)?;
            self.services.push(service);
        }
        Ok(())
    }

    /// Ends what is watched elsewhere than at `places`, and frees slots that nobody has.
    fn let_go(
        &mut self,
        places: &HashMap<u32, (usize, usize, bool)>,
    ) -> Result<(), datapath::Error> {
        let mut owners = vec![0; self.slots.len()];
        for place in 0..self.maps.places() {
            let found = self.maps.sampling(place)?;
            if found.epoch == 0 {
                continue;
            }
            if !places.contains_key(&place) {
                self.maps.set(place, Sampling::default())?;
            } else if let Some(owner) = owners.get_mut(found.slot as usize) {
                *owner = found.whose;
            }
        }
        self.slots = owners;
        Ok(())
    }

    /// The slot of a version's counters; `None` if there is none left.
    fn slot(&mut self, whose: u32) -> Result<Option<u32>, datapath::Error> {
        if let Some(at) = self.slots.iter().position(|owner| *owner == whose) {
            return Ok(Some(at as u32));
        }
        let Some(at) = self.slots.iter().position(|owner| *owner == 0) else { return Ok(None) };
        self.maps.clear(at as u32)?;
        self.slots[at] = whose;
        Ok(Some(at as u32))
    }

    fn watch(
        &mut self,
        wanted: WatchedService,
        known: Option<Service>,
        budget: f64,
    ) -> Result<Service, datapath::Error> {
        let mut found = Vec::new();
        for version in &wanted.versions {
            let whose = whose(&wanted.name, &version.name);
            let mut its = Vec::new();
            for (table, _) in &wanted.tables {
                its.push(self.maps.sampling(Sampling::place(u32::from(*table), version.slot))?);
            }
            let agree = its.first().copied().filter(|first| {
                first.whose == whose && first.epoch != 0 && its.iter().all(|one| one == first)
            });
            found.push((whose, agree));
        }
        let present: Vec<Option<u32>> = found
            .iter()
            .map(|(_, found)| {
                found.filter(|f| f.mask != Sampling::NONE).map(|f| f.mask.count_ones())
            })
            .collect();
        let shares: Vec<f64> = wanted.versions.iter().map(|version| version.share).collect();
        let chosen = halvings(&shares, wanted.per_second, budget, &present);
        let epochs = found.iter().map(|(_, found)| found.map(|f| f.epoch));
        let epoch = known.as_ref().map(|known| known.epoch).or(epochs.clone().flatten().next());
        let agree = epoch.is_some() && epochs.clone().all(|one| one == epoch) && chosen == present;
        let epoch = match (epoch, agree) {
            (Some(epoch), true) => epoch,
            // Not one that somebody has had who was at this place.
            (epoch, _) => epoch.map_or_else(first_epoch, |epoch| epoch.wrapping_add(1)).max(1),
        };
        let kept_slow = found.iter().find_map(|(_, found)| found.map(|found| found.slow_ns));
        let mut slow_ns = match wanted.slow_over {
            Some(slow) => u64::try_from(slow.as_nanos()).unwrap_or(u64::MAX),
            None => kept_slow.unwrap_or(u64::MAX),
        };
        let mut before: HashMap<String, Version> = HashMap::new();
        let known_slow_ns = known.as_ref().map(|known| known.slow_ns);
        let (began, mut whole, incomplete, window) = match known {
            Some(Service { wanted, versions, began, whole, incomplete, window, .. }) => {
                let names = wanted.versions.into_iter().map(|version| version.name);
                before.extend(names.zip(versions));
                (began, whole, incomplete, window)
            }
            // What came before was not seen.
            None => (Instant::now(), false, 0, ServiceWindow::default()),
        };
        let mut versions = Vec::new();
        for ((version, (whose, _)), halvings) in wanted.versions.iter().zip(&found).zip(&chosen) {
            let slot = self.slot(*whose)?;
            if slot.is_none() {
                self.alerts.push(format!(
                    "connections of service `{}`, version `{}` are not watched: {} versions are, and \
                     that is all there is room for; raise `agent.capacity.samples`",
                    wanted.name,
                    version.name,
                    self.slots.len()
                ));
            }
            let mut this = match before.remove(&version.name) {
                Some(this) if this.slot == slot => this,
                _ => {
                    let counted = slot.map(|slot| self.maps.counters(slot)).transpose()?;
                    Version::new(slot, counted.unwrap_or_default())
                }
            };
            this.halvings = halvings.filter(|_| slot.is_some());
            if version.name == wanted.control && slow_ns == u64::MAX {
                let handshakes = &this.counters.handshakes;
                if handshakes.iter().sum::<u64>() >= HANDSHAKES
                    && let Some(slow) = quantile(handshakes, QUICK_PERMILLE)
                {
                    slow_ns = u64::try_from(slow.as_nanos()).unwrap_or(u64::MAX);
                }
            }
            versions.push(this);
        }
        // What was slow in a window was so all the time, or nothing follows from it.
        whole &= known_slow_ns == Some(slow_ns);
        let service =
            Service { wanted, epoch, slow_ns, versions, began, whole, incomplete, window };
        self.write(&service, agree)?;
        Ok(service)
    }

    /// Writes a service's elements. If they are of another epoch, nothing begins in between: a
    /// packet must not meet the mask of one with the number of the other.
    fn write(&mut self, service: &Service, agree: bool) -> Result<(), datapath::Error> {
        let mut elements = Vec::new();
        for (version, this) in service.wanted.versions.iter().zip(&service.versions) {
            let sampling = Sampling {
                mask: this.halvings.map_or(Sampling::NONE, mask),
                epoch: service.epoch,
                slow_ns: service.slow_ns,
                slot: this.slot.unwrap_or(0),
                whose: whose(&service.wanted.name, &version.name),
            };
            for (table, _) in &service.wanted.tables {
                let place = Sampling::place(u32::from(*table), version.slot);
                let found = self.maps.sampling(place)?;
                if found != sampling {
                    elements.push((place, found, sampling));
                }
            }
        }
        if !agree {
            for (place, found, _) in &elements {
                self.maps.set(*place, Sampling { mask: Sampling::NONE, ..*found })?;
            }
            for (place, _, sampling) in &elements {
                self.maps.set(*place, Sampling { mask: Sampling::NONE, ..*sampling })?;
            }
        }
        for (place, _, sampling) in elements {
            self.maps.set(place, sampling)?;
        }
        Ok(())
    }

    /// Empties the ring buffer.
    pub fn drain(&mut self) {
        let Self { maps, services, places, .. } = self;
        maps.events(|event| {
            // Of a place that is not watched any more nobody wants to know.
            if let Some((at, of, v6)) = places.get(&event.place)
                && let Some(version) =
                    services.get_mut(*at).and_then(|service| service.versions.get_mut(*of))
            {
                version.events.add(&event, *v6);
            }
        });
    }

    /// Lets go of connections whose time is over, and ends the window that is under way. Returns what
    /// somebody wants to hear of it.
    ///
    /// # Errors
    /// When the maps can't be read, or the kernel refuses to run a program: the window goes on.
    pub fn turn(&mut self) -> Result<Vec<Counted>, datapath::Error> {
        let watched = self.maps.judge()?;
        self.drain();
        self.press(watched);
        let now = Instant::now();
        let mut windows = Vec::new();
        for service in &mut self.services {
            let mut versions = Vec::new();
            let mut complete = std::mem::replace(&mut service.whole, true);
            for (wanted, version) in service.wanted.versions.iter().zip(&mut service.versions) {
                let Some(slot) = version.slot else { continue };
                let counters = self.maps.counters(slot)?;
                let (watched, whole) = between(&version.counters, &counters);
                version.counters = counters;
                version.mark(now);
                complete &= whole;
                versions.push(VersionWindow {
                    version: wanted.name.clone(),
                    watched,
                    events: version.events.take(),
                });
            }
            let length = now.saturating_duration_since(std::mem::replace(&mut service.began, now));
            service.incomplete += u64::from(!complete);
            let slow_ns = service.slow_ns;
            let name = service.wanted.name.clone();
            service.window = ServiceWindow { service: name, length, complete, slow_ns, versions };
        }
        for Service { wanted, window, .. } in &self.services {
            let WatchedService { compared, control_of, control, .. } = wanted;
            let Some(canary) = compared else { continue };
            let others = control_of.as_ref().unwrap_or(&wanted.name);
            let others = self.services.iter().find(|one| one.wanted.name == *others);
            windows.extend(others.map(|others| window.compare(&others.window, control, canary)));
        }
        Ok(windows)
    }

    /// Fewer connections are watched if they take more than half of the room, and more again if
    /// they take next to none of it.
    fn press(&mut self, watched: u64) {
        let (capacity, since) = (u64::from(self.maps.capacity()), self.pressed_since.elapsed());
        let pressed = if watched * 2 > capacity && since >= FEWER {
            (self.pressed + 1).min(MOST_HALVINGS)
        } else if watched * 16 < capacity && since >= MORE {
            self.pressed.saturating_sub(1)
        } else {
            return;
        };
        if pressed != self.pressed {
            self.pressed = pressed;
            self.pressed_since = Instant::now();
        }
    }

    /// What is known of all that is watched.
    pub fn known(&self) -> Known {
        let of = |service: &Service| ServiceSignals {
            service: service.wanted.name.clone(),
            slow_over: (service.slow_ns != u64::MAX).then(|| Duration::from_nanos(service.slow_ns)),
            incomplete_windows: service.incomplete,
            window: service.window.clone(),
            versions: service
                .wanted
                .versions
                .iter()
                .zip(&service.versions)
                .map(|(wanted, version)| KnownVersion {
                    version: wanted.name.clone(),
                    halvings: version.halvings,
                    counters: version.counters,
                    recent: version.recent(),
                })
                .collect(),
        };
        Known { services: self.services.iter().map(of).collect(), alerts: self.alerts.clone() }
    }
}

/// An epoch that nobody is likely to have had: seconds and parts of the host's time.
fn first_epoch() -> u32 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(1, |now| (now.tv_sec() as u32) << 8 | (now.tv_nsec() as u32 >> 22))
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Says which connections are to be watched, as shares, traffic and rollouts are by now.
    pub(super) fn watch(&mut self, now_ms: BootMs) {
        let wanted: Vec<_> = self
            .planner
            .services()
            .iter()
            .filter(|state| state.config().signals)
            .map(|state| {
                let counter = |index| self.kernel.counters(&[index])[0].connections;
                let wanted =
                    watched(state, |index| self.samples.per_second(index, counter(index), now_ms));
                match self.compared(&wanted.name) {
                    Some(Compared { canary, slow_over, control_of }) => {
                        WatchedService { slow_over, compared: canary, control_of, ..wanted }
                    }
                    None => wanted,
                }
            })
            .collect();
        if !wanted.is_empty() || self.watches {
            self.watches = !wanted.is_empty();
            self.kernel.watch(wanted);
        }
    }
}

/// What the thread is told.
pub(super) type Wanted = Vec<WatchedService>;

/// Starts the thread. It ends when nobody can tell it anything any more.
pub(super) fn start(
    watcher: Watcher,
    events: mpsc::Sender<Event>,
) -> io::Result<(Sender<Wanted>, SharedKnown)> {
    let (wants, received) = channel();
    let known = SharedKnown::default();
    let shared = Arc::clone(&known);
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || look_after(watcher, &received, &events, &shared))?;
    Ok((wants, known))
}

fn look_after(
    mut watcher: Watcher,
    wants: &Receiver<Wanted>,
    events: &mpsc::Sender<Event>,
    known: &SharedKnown,
) {
    let mut window_ends = Instant::now() + WINDOW;
    let mut complained = false;
    loop {
        let wanted = if watcher.is_idle() {
            wants.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            wants.recv_timeout(DRAIN.min(window_ends.saturating_duration_since(Instant::now())))
        };
        let mut result = match wanted {
            Ok(wanted) => watcher.want(wanted),
            Err(RecvTimeoutError::Timeout) => {
                watcher.drain();
                Ok(())
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let now = Instant::now();
        if now >= window_ends {
            let turned = watcher.turn().map(|windows| {
                for window in windows {
                    // The loop may be gone: so is this thread, soon.
                    let _ = events.blocking_send(Event::Counted(window));
                }
            });
            result = result.and(turned);
            // What was missed is missed: windows don't pile up behind a slow one.
            window_ends = (window_ends + WINDOW).max(now);
        }
        let failed = result.is_err();
        if let Err(error) = result
            && !complained
        {
            tracing::warn!(%error, "what connections do can't be counted at the moment");
        }
        complained = failed;
        *known.lock().unwrap_or_else(PoisonError::into_inner) = watcher.known();
    }
}
