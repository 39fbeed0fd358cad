//! Tables that are sent to control behind an agent's back, and what tells the agent so.
//!
//! Whoever does that counts in `PANICS` before the first word that it writes, and leaves a mark
//! for each table before the first entry. An agent looks at the count before each word that it
//! writes: one that was stopped in the middle of a change stops at the next word when it goes
//! on, and reads the tables anew. Between its look and its store there is one instruction; a
//! word that it stores there is seen to when it has read the tables.
//!
//! It counts once more when it is done, so that whoever has read in between reads again.
//!
//! `flock` on the directory of the maps keeps those apart that write while no agent answers, and
//! the agent from reading what is half written. It is waited for a moment only: a holder that is
//! stopped itself must not keep anybody from stopping a canary.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData};
use canary_ebpf_common::{
    abi::{self, LedgerEntry, PAGE_BUCKETS, PANIC_MOVE, PANIC_REASON_BYTES},
    differing,
    entry::{BackendIndex, Entry},
    ones,
};
use nix::fcntl::{Flock, FlockArg};

use super::{
    Error, apply,
    directory::{directory, pages_of, unpadded},
    flows::FlowTable,
    mapping::{Mapping, Pages},
    pins::Pins,
    pod,
    vips::VipTable,
};
use crate::{
    config::derived,
    failpoint::Failpoint,
    parallel,
    plan::{BootMs, Diverted, GivenBack, NobodyLeft, PanicMark, Panicking},
};

/// 64-bit words of a mark.
const WORDS: usize = size_of::<abi::Panic>() / 8;
/// So long somebody else who writes tables is waited for.
const PATIENCE: Duration = Duration::from_millis(20);
/// So long an agent is waited for that may be putting other maps in the place of these.
const REPLACED: Duration = Duration::from_secs(2);
/// So often a table is looked at again of which somebody else has changed words meanwhile.
const ATTEMPTS: usize = 8;

/// `PANICS`, mapped.
#[derive(Debug)]
pub(super) struct Marks(Mapping);

impl Marks {
    pub(super) const fn new(mapping: Mapping) -> Self {
        Self(mapping)
    }

    /// How many there have been.
    pub(super) fn count(&self) -> u64 {
        self.0.words64()[0].load(Ordering::Acquire)
    }

    /// Counts one more, and returns its number.
    fn counted(&self) -> u64 {
        self.0.words64()[0].fetch_add(1, Ordering::SeqCst) + 1
    }

    fn words(&self, table: u16) -> Option<&[AtomicU64]> {
        let start = (usize::from(table) + 1) * WORDS;
        self.0.words64().get(start..start + WORDS)
    }

    fn read(&self, table: u16) -> Option<abi::Panic> {
        let mut words = [0_u64; WORDS];
        for (to, from) in words.iter_mut().zip(self.words(table)?) {
            *to = from.load(Ordering::Acquire);
        }
        // SAFETY: same size, and every bit pattern is a `Panic`: integers only.
        Some(unsafe { std::mem::transmute::<[u64; WORDS], abi::Panic>(words) })
    }

    /// Writes a mark, its number last.
    fn write(&self, table: u16, mark: &abi::Panic) -> Result<(), Error> {
        let words =
            self.words(table).ok_or(Error::OutOfRange { what: "table", index: table.into() })?;
        // SAFETY: same size, and without padding: no byte is uninitialised.
        let new = unsafe { std::mem::transmute::<abi::Panic, [u64; WORDS]>(*mark) };
        for (word, new) in words.iter().zip(new).skip(2) {
            word.store(new, Ordering::Release);
        }
        words[0].store(mark.number, Ordering::SeqCst);
        Ok(())
    }

    /// The mark of a table that no agent has made its own.
    fn waiting(&self, table: u16, service: &str) -> Option<PanicMark> {
        let mark = self.read(table)?;
        (mark.number != mark.adopted).then(|| PanicMark {
            table,
            service: service.to_owned(),
            number: mark.number,
            id: mark.id,
            unix_ms: mark.unix_ms,
            uid: mark.uid,
            moves: mark.flags & PANIC_MOVE != 0,
            back: abi::given_back(mark.flags).map(|(slot, buckets)| GivenBack { slot, buckets }),
            reason: Some(unpadded(&mark.reason)).filter(|reason| !reason.is_empty()),
        })
    }

    /// The marks of tables that no agent has made its own; tables by id with their service.
    pub(super) fn all_waiting<'a>(
        &self,
        tables: impl Iterator<Item = (u16, &'a str)>,
    ) -> Vec<PanicMark> {
        tables.filter_map(|(table, service)| self.waiting(table, service)).collect()
    }

    /// An agent has made `marks` its own. One that was written over meanwhile still waits; and these
    /// may be of other maps than these.
    pub(super) fn adopted(&self, marks: &[PanicMark]) {
        for mark in marks {
            if let Some(words) = self.words(mark.table)
                && words[0].load(Ordering::Acquire) == mark.number
            {
                words[1].store(mark.number, Ordering::Release);
            }
        }
    }

    /// A table is gone, and its mark with it.
    pub(super) fn forget(&self, table: u16) {
        if let Some(words) = self.words(table) {
            words[1].store(words[0].load(Ordering::Acquire), Ordering::Release);
        }
    }

    /// Leaves marks; returns the count after it. A mark that waits already stays, but for what
    /// `order` adds to it, if it says that everything has gone to control.
    pub(super) fn leave(&self, order: &PanicOrder, tables: &[u16]) -> Result<u64, Error> {
        let number = self.counted();
        for table in tables {
            let earlier = self.read(*table).filter(|mark| {
                mark.number != mark.adopted && abi::given_back(mark.flags).is_none()
            });
            let mut mark = earlier.unwrap_or_else(|| order.mark());
            mark.number = number;
            mark.flags |= if order.moves { PANIC_MOVE } else { 0 };
            self.write(*table, &mark)?;
        }
        Ok(number)
    }
}

/// Keeps others from writing tables that do so behind an agent's back. `None`: somebody has kept
/// it for too long.
pub(super) fn lock(pins: &Pins, patience: Duration) -> Result<Option<Flock<File>>, Error> {
    let deadline = Instant::now() + patience;
    let mut file = File::open(pins.maps())?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(Some(held)),
            Err((_, _)) if Instant::now() >= deadline => return Ok(None),
            Err((back, _)) => file = back,
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PanicOrder {
    /// The services; `None` for all.
    pub services: Option<BTreeSet<String>>,
    /// Open connections go, too.
    pub moves: bool,
    /// Only this version's share goes back. That is marked, and done by whoever marks it.
    pub back: Option<GivenBack>,
    /// Why.
    pub reason: Option<String>,
    /// Who.
    pub uid: u32,
    /// What the same request is called on the control socket.
    pub id: u64,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The same by the clock that the ledger goes by.
    pub now_ms: BootMs,
    /// Only say what would happen.
    pub dry_run: bool,
}

impl PanicOrder {
    /// Whether it is about a service of that name. What an audience has of a service goes with
    /// that, unless it is about a version's share alone.
    pub(super) fn names(&self, service: &str) -> bool {
        let of = derived::parts(service).filter(|_| self.back.is_none());
        self.services.as_ref().is_none_or(|some| {
            some.contains(service) || of.is_some_and(|(service, _)| some.contains(service))
        })
    }

    fn mark(&self) -> abi::Panic {
        let mut reason = [0; PANIC_REASON_BYTES];
        let text = self.reason.as_deref().unwrap_or_default();
        let end = text.floor_char_boundary(PANIC_REASON_BYTES);
        reason[..end].copy_from_slice(&text.as_bytes()[..end]);
        let (id, unix_ms, uid) = (self.id, self.unix_ms, self.uid);
        let flags = self.back.map_or(0, |back| abi::gives_back(back.slot, back.buckets));
        abi::Panic { number: 0, adopted: 0, id, unix_ms, uid, flags, reason }
    }
}

/// Why a service is not control's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotMoved {
    /// It was left as it is.
    #[error(transparent)]
    NobodyLeft(#[from] NobodyLeft),
    /// A table of it can't be read or written.
    #[error("a table of it can't be used: {0}")]
    Unusable(String),
    /// Some buckets may not have moved.
    #[error("somebody else goes on writing a table of it")]
    Contended,
}

/// What became of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Panicked {
    /// Its name.
    pub service: String,
    /// Its control version.
    pub control: String,
    /// Its versions that had buckets, with how many.
    pub had: Vec<(String, u32)>,
    /// All of its buckets.
    pub buckets: u32,
    /// Buckets whose owner has changed.
    pub moved: u32,
    /// Backends that have lost or gained some.
    pub touched: BTreeSet<SocketAddr>,
    /// Why it was left as it is, or is not wholly control's.
    pub refused: Option<NotMoved>,
    /// An earlier one waits for an agent.
    pub earlier: Option<PanicMark>,
}

impl Panicked {
    /// A service of one table.
    fn of(
        found: &Found<'_>,
        became: Became,
        refused: Option<NotMoved>,
        earlier: Option<PanicMark>,
    ) -> Self {
        let Found { info, name, .. } = found;
        let version =
            |slot: u8| info.versions.get(usize::from(slot)).map_or(String::new(), |v| unpadded(v));
        let mut had: Vec<(String, u32)> =
            became.owned.iter().map(|(slot, count)| (version(*slot), *count)).collect();
        had.sort();
        Self {
            service: name.clone(),
            control: version(u8::try_from(info.control).unwrap_or(u8::MAX)),
            had,
            buckets: info.buckets,
            moved: became.owned.values().sum(),
            touched: became.touched,
            refused: refused.or(became.unfinished),
            earlier,
        }
    }

    /// The same service's table of the other family.
    fn has_another(&mut self, became: Became, earlier: Option<PanicMark>) {
        self.touched.extend(became.touched);
        self.refused = self.refused.take().or(became.unfinished);
        self.earlier = self.earlier.take().or(earlier);
        // Both families have the same owners, unless an agent was stopped between them.
        self.moved = self.moved.max(became.owned.values().sum());
    }
}

/// What it was done to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// By service.
    pub services: Vec<Panicked>,
    /// Flow entries that were taken away.
    pub cut: u64,
    /// From the first look at the tables until all was in force.
    pub took: Duration,
    /// Maps of another layout that an interface may be steered by as well: an agent was ended while
    /// others took their place. They were left as they are.
    pub unread: Option<PathBuf>,
}

/// What became of a table.
#[derive(Debug, Default)]
struct Became {
    /// Buckets whose owner has changed, by version slot before.
    owned: HashMap<u8, u32>,
    /// Backends that have lost or gained some.
    touched: BTreeSet<SocketAddr>,
    /// Backends of other versions than control.
    others: Vec<BackendIndex>,
    /// Why some of it may not be control's.
    unfinished: Option<NotMoved>,
}

/// What a thread works on one table after the other with.
#[derive(Default)]
struct Bench {
    /// As they were found.
    entries: Vec<Entry>,
    /// As they are to be.
    diverted: Diverted,
}

/// A table that the directory names.
struct Found<'a> {
    id: u16,
    info: &'a abi::ServiceInfo,
    /// The service.
    name: String,
}

/// Pinned maps that no agent is asked about: those in force, and those beside them while others take
/// their place. Until that is done, either may be what an interface is steered by.
pub struct Pinned {
    pins: Pins,
    sets: Vec<Set>,
    /// The kernel's numbers of the maps that are written: tells these from others in their place.
    serials: Vec<u32>,
    /// Maps beside them that are not understood.
    unread: Option<PathBuf>,
}

/// A set of pinned maps.
struct Set {
    info: Array<MapData, pod::ServiceInfo>,
    records: HashMap<u32, abi::Service>,
    table: Pages,
    ledger: Pages,
    backends: Vec<(BackendIndex, abi::Backend)>,
    marks: Marks,
    pins: Pins,
}

/// What a panic writes.
const WRITTEN: [&str; 3] = ["TABLE", "LEDGER", "PANICS"];

/// The kernel's numbers of the maps of a set that are written; none if there are none.
fn serials(pins: &Pins) -> Vec<u32> {
    let serial = |name: &&str| pins.info(name).ok().map(|info| info.id());
    WRITTEN.iter().filter_map(serial).collect()
}

/// The same of both sets.
fn all_serials(pins: &Pins) -> Vec<u32> {
    [serials(pins), serials(&pins.beside())].concat()
}

impl Pinned {
    /// Opens the maps that are pinned under `bpffs`; `None` if there are none.
    ///
    /// # Errors
    /// When they are another release's, or the rights are missing.
    pub fn open(bpffs: &Path) -> Result<Option<Self>, Error> {
        let pins = Pins::new(bpffs);
        // Not to be found is not the same as not to be looked at.
        match std::fs::symlink_metadata(pins.map("META")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(denied(pins.maps(), error));
            }
            _ => {}
        }
        let (serials, sets) = (all_serials(&pins), vec![Set::open(&pins)?]);
        let mut found = Self { pins, sets, serials, unread: None };
        let beside = found.pins.beside();
        // What goes first when they are done with: without it nothing is steered by them any more.
        if beside.map("BACKENDS").exists() && self::serials(&beside) != self::serials(&found.pins) {
            match Set::open(&beside) {
                Ok(set) => found.sets.push(set),
                // They have been done with since.
                Err(_) if !beside.map("BACKENDS").exists() => {}
                Err(_) => found.unread = Some(beside.maps()),
            }
        }
        Ok(Some(found))
    }

    /// Whether no agent has put others in their place meanwhile.
    pub fn is_in_force(&self) -> bool {
        all_serials(&self.pins) == self.serials
    }

    /// The services that have tables.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn services(&self) -> Result<BTreeSet<String>, Error> {
        let mut names = BTreeSet::new();
        for set in &self.sets {
            names.extend(set.directory()?.iter().map(|(_, info)| unpadded(&info.name)));
        }
        Ok(names)
    }

    /// Sends everything to control that `order` names.
    ///
    /// # Errors
    /// When the maps can't be written. What was done until then is marked.
    pub fn panic(&self, order: &PanicOrder) -> Result<Done, Error> {
        let held = match order.dry_run {
            true => None,
            false => lock(&self.pins, PATIENCE)?,
        };
        let mut done = self.write(order)?;
        if !order.dry_run && held.is_none() {
            // Whoever has kept it so long may have written over it: an agent that fills the maps
            // that it is about to put in force.
            drop(lock(&self.pins, REPLACED)?);
            let again = self.write(order)?;
            done.cut += again.cut;
        }
        Ok(done)
    }

    fn write(&self, order: &PanicOrder) -> Result<Done, Error> {
        let mut all = self.sets.iter().map(|set| set.panic(order));
        let mut done = all.next().transpose()?.unwrap_or_default();
        for other in all {
            let Done { cut, took, services, unread: _ } = other?;
            done.cut += cut;
            done.took += took;
            let known: BTreeSet<String> =
                done.services.iter().map(|one| one.service.clone()).collect();
            done.services.extend(services.into_iter().filter(|one| !known.contains(&one.service)));
        }
        done.unread.clone_from(&self.unread);
        Ok(done)
    }
}

/// How often the tables of a set had been written behind an agent's back by now.
pub(super) fn count(pins: &Pins) -> u64 {
    Set::open(pins).map_or(0, |set| set.marks.count())
}

/// Repeats in the maps `to` what has been sent to control in `from` since there were `seen`: while
/// these were filled from those. Whoever did it may be gone, or have been stopped, since.
pub(super) fn catch_up(from: &Pins, to: &Pins, seen: &mut u64) -> Result<(), Error> {
    // What is not understood is nobody's either.
    let Ok(earlier) = Set::open(from) else { return Ok(()) };
    let count = earlier.marks.count();
    if std::mem::replace(seen, count) == count || serials(from) == serials(to) {
        return Ok(());
    }
    let waiting = earlier.waiting()?;
    let set = Set::open(to)?;
    let now_ms = boot_ms()?;
    // A share that has gone back did so before: whoever did it was an agent.
    for mark in waiting.into_iter().filter(|mark| mark.back.is_none()) {
        let PanicMark { service, id, unix_ms, uid, moves, reason, .. } = mark;
        let services = Some([service].into());
        let order = PanicOrder {
            services,
            moves,
            back: None,
            reason,
            uid,
            id,
            unix_ms,
            now_ms,
            dry_run: false,
        };
        set.panic(&order)?;
    }
    // Where both sets share it.
    *seen = earlier.marks.count();
    Ok(())
}

/// Milliseconds of `CLOCK_BOOTTIME`, which the ledger goes by.
fn boot_ms() -> Result<BootMs, Error> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_err(std::io::Error::from)?;
    Ok(Duration::from(now).as_millis() as BootMs)
}

/// The marks that no agent has made its own, where they can be read.
pub(super) fn waiting(pins: &Pins) -> Vec<PanicMark> {
    Set::open(pins).and_then(|set| set.waiting()).unwrap_or_default()
}

impl Set {
    fn waiting(&self) -> Result<Vec<PanicMark>, Error> {
        let directory = self.directory()?;
        let names: Vec<(u16, String)> =
            directory.iter().map(|(id, info)| (*id, unpadded(&info.name))).collect();
        Ok(self.marks.all_waiting(names.iter().map(|(id, name)| (*id, name.as_str()))))
    }

    fn open(pins: &Pins) -> Result<Self, Error> {
        let sizes = pins.understood()?;
        let map = |name: &'static str| MapData::from_pin(pins.map(name));
        let mapped = |name: &'static str| -> Result<Mapping, Error> {
            use std::os::fd::AsFd as _;
            let size = sizes.iter().find(|(found, _)| *found == name).map_or(0, |(_, size)| *size);
            Ok(Mapping::new(map(name)?.fd().as_fd(), size).map_err(std::io::Error::from)?)
        };
        let paged = |name: &'static str, word_bytes: usize| -> Result<Pages, Error> {
            use std::os::fd::AsFd as _;
            let size = sizes.iter().find(|(found, _)| *found == name).map_or(0, |(_, size)| *size);
            let page_bytes = word_bytes * PAGE_BUCKETS as usize;
            let map = map(name)?.fd().as_fd().try_clone_to_owned()?;
            Ok(Pages::new(map, (size / page_bytes) as u32, page_bytes))
        };
        let backends = mapped("BACKENDS")?;
        let mut records = VipTable::v4(mapped("VIPS_V4")?).records();
        records.extend(VipTable::v6(mapped("VIPS_V6")?).records());
        Ok(Self {
            info: Map::Array(map("SERVICE_INFO")?).try_into()?,
            records,
            table: paged("TABLE", 4)?,
            ledger: paged("LEDGER", 8)?,
            backends: by_table(apply::records(&backends)),
            marks: Marks::new(mapped("PANICS")?),
            pins: pins.clone(),
        })
    }

    fn directory(&self) -> Result<Vec<(u16, abi::ServiceInfo)>, Error> {
        directory(&self.info)
    }

    fn panic(&self, order: &PanicOrder) -> Result<Done, Error> {
        let begun = Instant::now();
        let directory = self.directory()?;
        let tables: Vec<Found<'_>> = directory
            .iter()
            .map(|(id, info)| Found { id: *id, info, name: unpadded(&info.name) })
            .filter(|found| order.names(&found.name))
            .collect();
        // In one family of a service nobody may be left: then it stays as it is in both.
        let mut refused: HashMap<&str, NobodyLeft> = HashMap::new();
        for Found { id, info, name } in &tables {
            if let Err(nobody) = Panicking::somebody_left(info.control as u8, self.backends_of(*id))
            {
                refused.insert(name, nobody);
            }
        }
        let goes = |found: &&Found<'_>| !refused.contains_key(&*found.name);
        let ids: Vec<u16> = tables.iter().filter(goes).map(|found| found.id).collect();
        let earlier: Vec<Option<PanicMark>> =
            tables.iter().map(|found| self.marks.waiting(found.id, &found.name)).collect();
        if !order.dry_run {
            self.marks.leave(order, &ids)?;
            Failpoint::PanicMarked.pass();
        }
        let buckets = tables.iter().map(|found| found.info.buckets as usize).sum();
        let became =
            parallel::map_with(tables.iter().collect(), buckets, Bench::default, |bench, found| {
                match goes(&found) {
                    // Others go on where one can't.
                    true => self.send(found, order, bench).unwrap_or_else(|error| Became {
                        unfinished: Some(NotMoved::Unusable(error.to_string())),
                        ..Became::default()
                    }),
                    false => Became::default(),
                }
            });
        if !order.dry_run {
            // For an agent that has begun to read meanwhile: it reads again.
            self.marks.counted();
            Failpoint::PanicWritten.pass();
        }
        let took = begun.elapsed();
        let mut services: Vec<Panicked> = Vec::new();
        let mut listed: HashMap<&str, usize> = HashMap::new();
        let mut others: BTreeSet<BackendIndex> = BTreeSet::new();
        for ((found, became), earlier) in tables.iter().zip(became).zip(earlier) {
            others.extend(&became.others);
            let refused = refused.get(&*found.name).map(|nobody| NotMoved::from(*nobody));
            match listed.get(&*found.name) {
                Some(at) => services[*at].has_another(became, earlier),
                None => {
                    listed.insert(&found.name, services.len());
                    services.push(Panicked::of(found, became, refused, earlier));
                }
            }
        }
        if order.dry_run {
            return Ok(Done { services, took, ..Done::default() });
        }
        let cut = if order.moves { self.cut(&others)? } else { 0 };
        Ok(Done { services, cut, took, unread: None })
    }

    /// The records of a table's backends.
    fn backends_of(&self, table: u16) -> &[(BackendIndex, abi::Backend)] {
        let first = self.backends.partition_point(|(_, b)| b.service < table);
        let its = &self.backends[first..];
        &its[..its.partition_point(|(_, b)| b.service == table)]
    }

    /// Writes a table until all of it is control's, whoever writes beside, or only finds out what
    /// would become of it. Returns what became of it at first.
    fn send(
        &self,
        found: &Found<'_>,
        order: &PanicOrder,
        bench: &mut Bench,
    ) -> Result<Became, Error> {
        let panicking = Panicking {
            control: found.info.control as u8,
            record: self.records.get(&u32::from(found.id)),
            backends: self.backends_of(found.id),
            moves: order.moves,
            now_ms: order.now_ms,
        };
        let pages = pages_of(found.info, &self.table)?;
        let (table, ledger) = (self.table.map(pages.clone())?, self.ledger.map(pages)?);
        let buckets = found.info.buckets as usize;
        let (words, ledger) = (&table.words32()[..buckets], &ledger.words64()[..buckets]);
        let Bench { entries, diverted } = bench;
        let mut became: Option<Became> = None;
        for _ in 0..ATTEMPTS {
            entries.clear();
            entries.extend(words.iter().map(|word| Entry(word.load(Ordering::Relaxed))));
            // Looked at a moment ago; operators ask an agent to take backends out.
            let Ok(()) = panicking.divert(entries, diverted) else { break };
            // As an agent does: a ledger first, so that no bucket has moved without a time.
            let (owned, mut lost) = exchange64(ledger, &panicking, diverted, !order.dry_run);
            let became = became.get_or_insert_with(|| Became {
                owned,
                touched: std::mem::take(&mut diverted.touched),
                others: panicking.others().collect(),
                unfinished: None,
            });
            if !order.dry_run {
                Failpoint::PanicLedgerWritten.pass();
                lost += exchange32(words, entries, &diverted.entries);
            }
            if lost == 0 {
                return Ok(std::mem::take(became));
            }
        }
        let became = became.unwrap_or_default();
        Ok(Became { unfinished: Some(NotMoved::Contended), ..became })
    }

    /// Takes away the flow entries of these backends.
    fn cut(&self, backends: &BTreeSet<BackendIndex>) -> Result<u64, Error> {
        let map = |name| MapData::from_pin(self.pins.map(name));
        let v4 = FlowTable::<pod::FlowKeyV4>::new(map("FLOWS_V4")?)?.cut(backends)?;
        let v6 = FlowTable::<pod::FlowKeyV6>::new(map("FLOWS_V6")?)?.cut(backends)?;
        Ok(v4 + v6)
    }
}

/// So that the records of one table stand together.
fn by_table(mut records: Vec<(BackendIndex, abi::Backend)>) -> Vec<(BackendIndex, abi::Backend)> {
    records.sort_by_key(|(index, record)| (record.service, *index));
    records
}

/// Stores what differs, where `old` still stands; returns how many words somebody else has
/// changed.
fn exchange32(words: &[AtomicU32], old: &[Entry], new: &[Entry]) -> usize {
    let mut first = true;
    let mut lost = 0;
    for at in ones(differing(old, new, |old, new| old != new)) {
        let (word, old, new) = (&words[at], old[at].0, new[at].0);
        let stored = word.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed);
        lost += usize::from(stored.is_err());
        if std::mem::take(&mut first) {
            Failpoint::PanicHalfWritten.pass();
        }
    }
    // A store that was under way when the count was raised has landed by now.
    let another =
        |(word, new): (&AtomicU32, &Entry)| usize::from(word.load(Ordering::SeqCst) != new.0);
    lost + words.iter().zip(new).map(another).sum::<usize>()
}

/// So many records are looked at at a time.
const LOOKED_AT: usize = 512;

/// Makes a ledger say that every bucket is control's, if it is to `store` that. Returns how many
/// buckets were whose, by slot, and how many words somebody else has changed meanwhile.
fn exchange64(
    words: &[AtomicU64],
    panicking: &Panicking<'_>,
    diverted: &Diverted,
    store: bool,
) -> (HashMap<u8, u32>, usize) {
    let (mut owned, mut lost) = ([0_u32; 1 << u8::BITS], 0);
    let mut recorded = [LedgerEntry(0); LOOKED_AT];
    for (first, some) in (0..).step_by(LOOKED_AT).zip(words.chunks(LOOKED_AT)) {
        for (to, from) in recorded.iter_mut().zip(some) {
            *to = LedgerEntry(from.load(Ordering::Relaxed));
        }
        panicking.records(diverted, first, &recorded[..some.len()], |at, old, new| {
            owned[usize::from(old.owner())] += 1;
            let stored = |word: &AtomicU64| {
                word.compare_exchange(old.0, new.0, Ordering::SeqCst, Ordering::Relaxed)
            };
            lost += usize::from(store && stored(&words[at]).is_err());
        });
    }
    let others = (0..=u8::MAX).zip(owned);
    let others = others.filter(|(slot, count)| *slot != panicking.control && *count > 0);
    (others.collect(), lost)
}

fn denied(path: PathBuf, error: std::io::Error) -> Error {
    Error::NotPermitted(format!("{}: {error}", path.display()))
}
