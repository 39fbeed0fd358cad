//! Clients of audiences: which table of a service steers them, and where their older connections go.
//!
//! `ingress` asks a bitmap, of services that have routes, and for a client that may be in an audience
//! whether its class was looked up a moment ago. If not, or if anything about it has changed lately,
//! the packet is left to `steer_v4` or `steer_v6`, which look its class up; keys lie beside what is
//! known of the packet, since the stack has no room for them.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    macros::map,
    maps::{Array, HashMap, LpmTrie, lpm_trie::Key},
};
use canary_ebpf_common::{
    abi::{
        self, Address, ClassState, FlowKeyV4, NetworkV4, NetworkV6, Reason, SERVICE_FORGETS,
        SERVICE_OF_AUDIENCE, SERVICE_ROUTED, Service, TableKey,
    },
    class::{self, BLOCKS, Class, ClassEntry},
    entry::Entry,
    hash::{bucket, hash_v4, hash_v6},
    headers::Ipv6,
    recent::{self, ClientsV4, ClientsV6, Table, Tables},
    steer::{Segment, Steering},
};

use crate::{arrival::Arrival, forward, maps};

/// Classes of IPv4 clients.
#[map]
static CLASSES_V4: LpmTrie<u32, ClassState> = LpmTrie::with_max_entries(1, 0);
/// Classes of IPv6 clients.
#[map]
static CLASSES_V6: LpmTrie<[u32; 4], ClassState> = LpmTrie::with_max_entries(1, 0);
/// Which blocks of addresses have anybody in a class: a bit each.
#[map]
static CLASS_BLOCKS: Array<u64> = Array::with_max_entries(abi::CLASS_BLOCKS, 0);
/// The tables of services for clients of a class.
#[map]
static CLASS_TABLES: HashMap<TableKey, Service> = HashMap::with_max_entries(1, 0);

/// How often any of the above has changed.
#[map]
static CLASS_CHANGES: Array<u64> = Array::with_max_entries(1, 0);
/// Clients whose class was looked up a moment ago, a part of the map for each CPU. Not pinned:
/// programs that are loaded anew look everybody up again. Can be mapped only because values of such
/// maps begin at a page, and so each at a cache line.
#[map]
static RECENT_V4: Array<ClientsV4> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// The same of IPv6.
#[map]
static RECENT_V6: Array<ClientsV6> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// What steers clients of a class, of what was looked up a moment ago; as above.
#[map]
static RECENT_TABLES: Array<Tables> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Elements of one CPU's part of `RECENT_V4`, less one: a power of two.
#[unsafe(no_mangle)]
static RECENT_V4_MASK: u32 = 0;
/// The same of `RECENT_V6`.
#[unsafe(no_mangle)]
static RECENT_V6_MASK: u32 = 0;
/// The same of `RECENT_TABLES`.
#[unsafe(no_mangle)]
static RECENT_TABLES_MASK: u32 = 0;

/// Whether an IPv4 client of `service` may be in a class.
#[inline(always)]
pub(crate) fn concerns_v4(service: &Service, src_be: u32) -> bool {
    service.flags & SERVICE_ROUTED != 0 && marked(class::block_v4(src_be))
}

/// The same of an IPv6 client, of which the first half of the address is enough.
#[inline(always)]
pub(crate) fn concerns_v6(service: &Service, first: u64) -> bool {
    service.flags & SERVICE_ROUTED != 0 && marked(BLOCKS + class::block_v6([first, 0]))
}

#[inline(always)]
fn marked(block: u32) -> bool {
    CLASS_BLOCKS.get(block / 64).is_some_and(|word| word >> (block % 64) & 1 != 0)
}

/// How often classes have changed, if none is changing just now.
#[inline(always)]
fn changes() -> Option<u64> {
    let changes = CLASS_CHANGES.get_ptr(0)?;
    // Volatile: whoever asks for it does so before anything else is looked up.
    // SAFETY: an element of the map; an integer.
    let changes = unsafe { changes.read_volatile() };
    abi::settled(changes).then_some(changes)
}

/// Where the element of a place is in this CPU's part of a map, `mask` being that of its parts.
#[inline(always)]
fn own(mask: &'static u32, place: u32) -> u32 {
    // SAFETY: an initialised static; volatile as in `maps::nat_ports`.
    let mask = unsafe { core::ptr::from_ref(mask).read_volatile() };
    maps::this_cpu() * (mask + 1) + (place & mask)
}

/// Where this CPU keeps the class of a client.
#[inline(always)]
fn recent_v4(src_be: u32) -> Option<&'static mut ClientsV4> {
    let at = own(&RECENT_V4_MASK, recent::place_v4(src_be));
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { RECENT_V4.get_ptr_mut(at).map(|p| &mut *p) }
}

/// The same of IPv6.
#[inline(always)]
fn recent_v6(src: Address) -> Option<&'static mut ClientsV6> {
    let at = own(&RECENT_V6_MASK, recent::place_v6(src));
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { RECENT_V6.get_ptr_mut(at).map(|p| &mut *p) }
}

/// Where this CPU keeps what steers the clients of a service's classes.
#[inline(always)]
fn recent_tables(base: &Service) -> Option<&'static mut Tables> {
    let at = own(&RECENT_TABLES_MASK, recent::place_of_tables(base.id));
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { RECENT_TABLES.get_ptr_mut(at).map(|p| &mut *p) }
}

/// The entry that steers a client of `base` whose packet has this hash, where that is known without
/// a search, and by itself says where the packet goes.
#[inline(always)]
pub(crate) fn known_v4(base: &Service, src_be: u32, hash: u64) -> Option<Entry> {
    let changes = changes()?;
    let class = recent_v4(src_be)?.class(changes, src_be)?;
    known(base, class, changes, hash)
}

/// The same of an IPv6 client.
#[inline(always)]
pub(crate) fn known_v6(base: &Service, src: Address, hash: u64) -> Option<Entry> {
    let changes = changes()?;
    let class = recent_v6(src)?.class(changes, src)?;
    known(base, class, changes, hash)
}

#[inline(always)]
fn known(base: &Service, class: Class, changes: u64, hash: u64) -> Option<Entry> {
    match recent_tables(base)?.table(changes, base.id, class)? {
        Table::Own => maps::entry(base.first_page, bucket(base, hash)),
        Table::Other { first_page, bucket_bits } => {
            let bucket = hash as u32 & ((1 << (bucket_bits & 31)) - 1);
            maps::entry(first_page, bucket).filter(|entry| !entry.tracked())
        }
    }
}

/// Whether a client's class is kept: not if it has changed lately, for all that there is to know
/// of its older connections is looked up; nor if classes change just now, as `changes` says of the
/// time before it was looked up. Nor in a service that translates, whose flows are followed whatever
/// their clients' class.
#[inline(always)]
fn keeps(base: &Service, class: ClassEntry, changes: u64) -> bool {
    !class.tracked() && abi::settled(changes) && !forward::translates(base)
}

/// The service that steers a packet with this key to `base`: that one, or the table of its
/// client's class. What is left of the class before is noted for [`with_older`].
#[inline(always)]
pub(crate) fn followed_v4(
    base: &'static Service,
    key: &FlowKeyV4,
) -> Result<&'static Service, Reason> {
    let arrival = maps::arrival().ok_or(Reason::DropNoBackend)?;
    arrival.older = 0;
    if !concerns_v4(base, key.src_be) {
        return Ok(base);
    }
    let changes = changes().unwrap_or(0);
    arrival.class = class_v4(base, key.src_be, changes, arrival);
    // SAFETY: an initialised field. Volatile: see there.
    let class = unsafe { (&raw const arrival.class).read_volatile() };
    if let Some(previous) = previous(base, class, arrival) {
        let FlowKeyV4 { src_be, dst_be, ports, protocol } = *key;
        let (src_port_be, dst_port_be) = (ports.src_be(), ports.dst_be());
        let hash = hash_v4(previous, src_be, dst_be, src_port_be, dst_port_be, protocol as u8);
        note(arrival, class, previous, hash);
    }
    Ok(kept_table(base, class, changes, arrival))
}

/// The same of IPv6.
#[inline(always)]
pub(crate) fn followed_v6(
    base: &'static Service,
    ip: &Ipv6,
    src_port_be: u16,
    dst_port_be: u16,
    protocol: u8,
) -> Result<&'static Service, Reason> {
    let (src, dst) = ([ip.src[0], ip.src[1]], [ip.dst[0], ip.dst[1]]);
    client_v6(base, src, dst, src_port_be, dst_port_be, protocol)
}

/// The same of a client's packet that is not at hand.
#[inline(always)]
pub(crate) fn client_v6(
    base: &'static Service,
    src: Address,
    dst: Address,
    src_port_be: u16,
    dst_port_be: u16,
    protocol: u8,
) -> Result<&'static Service, Reason> {
    let arrival = maps::arrival().ok_or(Reason::DropNoBackend)?;
    arrival.older = 0;
    if !concerns_v6(base, src[0]) {
        return Ok(base);
    }
    let changes = changes().unwrap_or(0);
    arrival.class = class_v6(base, src, changes, arrival);
    // SAFETY: an initialised field. Volatile: see there.
    let class = unsafe { (&raw const arrival.class).read_volatile() };
    if let Some(previous) = previous(base, class, arrival) {
        let hash = hash_v6(previous, src, dst, src_port_be, dst_port_be, protocol);
        note(arrival, class, previous, hash);
    }
    Ok(kept_table(base, class, changes, arrival))
}

/// The class of a client, `changes` being what `CLASS_CHANGES` says, or 0.
#[inline(always)]
fn class_v4(base: &Service, src_be: u32, changes: u64, arrival: &mut Arrival) -> ClassEntry {
    let recent = recent_v4(src_be);
    if let Some(class) = recent.as_ref().and_then(|recent| recent.class(changes, src_be)) {
        return ClassEntry::steady(class);
    }
    arrival.client.bits = 32;
    arrival.client.addr_be[0] = src_be;
    let network: *const NetworkV6 = &raw const arrival.client;
    const _: () = assert!(size_of::<NetworkV4>() == size_of::<Key<u32>>());
    // SAFETY: the shorter key is laid out as the longer one begins.
    let found = CLASSES_V4.get(unsafe { &*network.cast::<Key<u32>>() });
    let class = found.map_or(ClassEntry::default(), |state| state.entry);
    if keeps(base, class, changes)
        && let Some(recent) = recent
    {
        recent.keep(changes, src_be, class.current());
    }
    class
}

/// The same of an IPv6 client.
#[inline(always)]
fn class_v6(base: &Service, src: Address, changes: u64, arrival: &mut Arrival) -> ClassEntry {
    let recent = recent_v6(src);
    if let Some(class) = recent.as_ref().and_then(|recent| recent.class(changes, src)) {
        return ClassEntry::steady(class);
    }
    let [first, second] = [src[0], src[1]];
    arrival.client.bits = 128;
    arrival.client.addr_be[0] = first as u32;
    arrival.client.addr_be[1] = (first >> 32) as u32;
    arrival.client.addr_be[2] = second as u32;
    arrival.client.addr_be[3] = (second >> 32) as u32;
    let network: *const NetworkV6 = &raw const arrival.client;
    const _: () = assert!(size_of::<NetworkV6>() == size_of::<Key<[u32; 4]>>());
    // SAFETY: both are laid out alike.
    let found = CLASSES_V6.get(unsafe { &*network.cast::<Key<[u32; 4]>>() });
    let class = found.map_or(ClassEntry::default(), |state| state.entry);
    if keeps(base, class, changes)
        && let Some(recent) = recent
    {
        recent.keep(changes, src, class.current());
    }
    class
}

/// What steers the clients of a class, which is kept where the class is.
#[inline(always)]
fn kept_table(
    base: &'static Service,
    class: ClassEntry,
    changes: u64,
    arrival: &mut Arrival,
) -> &'static Service {
    let table = table(base, class.current(), arrival);
    if keeps(base, class, changes) {
        keep(base, class.current(), table, changes);
    }
    table
}

/// Keeps what steers the clients of a class.
#[inline(always)]
fn keep(base: &Service, class: Class, table: &Service, changes: u64) {
    let Some(recent) = recent_tables(base) else { return };
    if !recent.has(changes, base.id, class) {
        let table = if table.id == base.id {
            Table::Own
        } else {
            let bucket_bits = table.bucket_mask.count_ones() as u8;
            Table::Other { first_page: table.first_page, bucket_bits }
        };
        recent.keep(changes, base.id, class, table);
    }
}

/// The table of the class before, where connections of its time may be open: translated ones have
/// entries of their own, and some services take open connections along.
#[inline(always)]
fn previous(
    base: &'static Service,
    class: ClassEntry,
    arrival: &mut Arrival,
) -> Option<&'static Service> {
    let looks = class.tracked() && base.flags & SERVICE_FORGETS == 0 && !forward::translates(base);
    looks.then(|| table(base, class.previous(), arrival))
}

#[inline(always)]
fn note(arrival: &mut Arrival, class: ClassEntry, previous: &Service, hash: u64) {
    if let Some(entry) = maps::entry(previous.first_page, bucket(previous, hash)) {
        arrival.older = class::older(class, entry).0;
    }
}

/// What steers clients of `class` in `base`.
#[inline(always)]
fn table(base: &'static Service, class: Class, arrival: &mut Arrival) -> &'static Service {
    arrival.table = TableKey { service: base.id, class: u32::from(class.get()) };
    // SAFETY: an element of a preallocated map, which stays valid memory of it while the program
    // runs; integers only. A key is given to another table only after it has rested.
    unsafe { CLASS_TABLES.get(&arrival.table) }.unwrap_or(base)
}

/// The entry that steers a packet, `current` being its bucket's in the table that
/// [`followed_v4`] or [`followed_v6`] has found.
#[inline(always)]
pub(crate) fn with_older<const RARE: bool>(current: Entry) -> Entry {
    if !RARE {
        return current;
    }
    maps::arrival().map_or(current, |arrival| class::with_older(current, Entry(arrival.older)))
}

/// Notes how a packet with this entry may be steered only if there is room to remember it: see
/// [`admit`]. Beside the packet: the stack has no room for it.
#[inline(always)]
pub(crate) fn guard<const RARE: bool>(service: &Service, entry: Entry, segment: Segment) {
    if RARE && let Some(arrival) = maps::arrival() {
        let of_audience = service.flags & SERVICE_OF_AUDIENCE != 0 || arrival.older != 0;
        let guards = of_audience && class::remembers(entry, segment);
        arrival.guard = if guards { entry.0 } else { 0 };
    }
}

/// Refuses a connection that the full flow table can't hold, and that the class before might give
/// to a version which the one of now must not see.
#[inline(always)]
pub(crate) fn admit<const RARE: bool>(steering: Steering) -> Result<(), Reason> {
    if RARE
        && let Some(arrival) = maps::arrival()
        && class::refuses(Entry(arrival.guard), steering)
    {
        return Err(Reason::DropFlowTableFull);
    }
    Ok(())
}
