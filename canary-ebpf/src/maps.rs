//! The maps, and the constants that the loader sets.
//!
//! Sizes here are the least that load; the agent sets those of its
//! configuration. Names are those of the pins.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST, xdp_action, xdp_md},
    helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_coarse_ns, bpf_loop},
    macros::map,
    maps::{Array, DevMapHash, HashMap, LruHashMap, PerCpuArray, ProgramArray},
};
use canary_ebpf_common::{
    abi::{
        self, Address, Backend, BackendCounters, FRAGMENT_NS, Flow, FlowCounters, FlowKeyV4,
        FlowKeyV6, FragmentKey, FragmentRoute, IPPROTO_TCP, IPPROTO_UDP, MacKey, Meta,
        PAGE_BUCKETS, Panic, REASON_SLOTS, Reason, ReasonVerdict, Ring, SERVICE_TCP, SERVICE_UDP,
        Service, ServiceInfo, VipKey, VipSlotV4, VipSlotV6,
    },
    entry::{BackendIndex, Entry},
    headers::Frame as _,
    ports::{self, PORT_ATTEMPTS, Pool, PortRange, ROOM_ATTEMPTS, Search},
    steer::{Flows, Inserted},
    vips::slots,
};

use crate::{answer::Quote, arrival::Arrival, packet::Packet};

/// A program that goes on with a packet: index into `PROGRAMS`.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Program {
    /// Sorts packets that are not plain.
    Arrival = 0,
    /// Steers those of IPv4 that are TCP or UDP after all, and opens translated flows.
    SteerV4 = 1,
    /// The same of IPv6.
    SteerV6 = 2,
    /// Fragments after the first.
    Fragment = 3,
    /// Gives frames tags and sends them.
    Tag = 4,
    /// ICMP.
    IcmpV4 = 5,
    /// ICMPv6.
    IcmpV6 = 6,
    /// Takes packets into account whose connections are watched: of IPv4.
    WatchV4 = 7,
    /// The same of IPv6.
    WatchV6 = 8,
    /// Wraps packets for their backends and sends them.
    Wrap = 9,
    /// Turns packets into errors to their senders.
    Tell = 10,
}

/// Elements of `PROGRAMS`.
const PROGRAM_SLOTS: u32 = 16;

/// What the pinned maps are.
#[map]
static META: Array<Meta> = Array::with_max_entries(1, 0);
/// The directory of services.
#[map]
static SERVICE_INFO: Array<ServiceInfo> = Array::with_max_entries(1, 0);
/// Owners and times of last moves, in pages beside those of `TABLE`.
#[map]
static LEDGER: Array<[u64; PAGE_BUCKETS as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// What was sent to control while no agent answered.
#[map]
static PANICS: Array<Panic> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Services by IPv4 address and port.
#[map]
static VIPS_V4: Array<VipSlotV4> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Services by IPv6 address and port.
#[map]
static VIPS_V6: Array<VipSlotV6> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Forwarding tables in pages; the agent stores entries through a mapping.
#[map]
static TABLE: Array<[u32; PAGE_BUCKETS as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Backend records by index.
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Source addresses for translated flows.
#[map]
static NAT_SOURCES: Array<Address> = Array::with_max_entries(1, 0);
/// Flows of IPv4: never evicted.
#[map]
static FLOWS_V4: HashMap<FlowKeyV4, Flow> = HashMap::with_max_entries(1, 0);
/// Flows of IPv6: never evicted.
#[map]
static FLOWS_V6: HashMap<FlowKeyV6, Flow> = HashMap::with_max_entries(1, 0);
/// While one pair of flow tables takes the place of another: the other pair. Not pinned here, and
/// looked at by programs that are loaded for that moment only.
#[map]
static OTHER_FLOWS_V4: HashMap<FlowKeyV4, Flow> = HashMap::with_max_entries(1, 0);
/// The same of IPv6.
#[map]
static OTHER_FLOWS_V6: HashMap<FlowKeyV6, Flow> = HashMap::with_max_entries(1, 0);
/// Keys of translated flows of IPv4 that can be spared, half-open or closed when they were put
/// here: a ring for each CPU, one after the other.
#[map]
static SPARE_V4: Array<FlowKeyV4> = Array::with_max_entries(1, 0);
/// The same of IPv6.
#[map]
static SPARE_V6: Array<FlowKeyV6> = Array::with_max_entries(1, 0);
/// Where the rings begin and end: of IPv4, then of IPv6.
#[map]
static SPARE_RINGS: Array<Ring> = Array::with_max_entries(2, 0);
/// The search for a port that is under way.
#[map]
static SEARCH: PerCpuArray<Search> = PerCpuArray::with_max_entries(1, 0);
/// What became of flow entries.
#[map]
static FLOW_COUNTERS: PerCpuArray<FlowCounters> = PerCpuArray::with_max_entries(1, 0);
/// Traffic by backend index.
#[map]
static BACKEND_COUNTERS: PerCpuArray<BackendCounters> = PerCpuArray::with_max_entries(1, 0);
/// What an error quotes of a packet.
#[map]
static QUOTE: PerCpuArray<Quote> = PerCpuArray::with_max_entries(1, 0);
/// When the next error of this CPU would be due at an even pace.
#[map]
static NEXT_ANSWER: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
/// Packets by reason.
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASON_SLOTS, 0);
/// Interfaces that packets may leave by, under their own index.
#[map]
static TX_PORTS: DevMapHash = DevMapHash::with_max_entries(1, 0);

/// What goes on with packets that `ingress` does not know at sight, by [`Program`].
#[map]
static PROGRAMS: ProgramArray = ProgramArray::with_max_entries(PROGRAM_SLOTS, 0);
/// What is known of the packet at hand.
#[map]
static ARRIVAL: PerCpuArray<Arrival> = PerCpuArray::with_max_entries(1, 0);
/// Each interface's own MAC address.
#[map]
static FIRST_MACS: Array<u64> = Array::with_max_entries(abi::FIRST_MACS, 0);
/// Interfaces whose clients' frames have VLAN tags, by the place that ways name.
#[map]
static TAGGED: Array<u32> = Array::with_max_entries(abi::way::PLACES, 0);
/// All of their MAC addresses, and those of devices on top of them.
#[map]
static MACS: HashMap<MacKey, u32> = HashMap::with_max_entries(1, 0);
/// Where datagrams' first fragments went. The oldest go when it is full: nothing else is in it.
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentRoute> = LruHashMap::with_max_entries(1, 0);

/// Slots of `VIPS_V4` and of `VIPS_V6`, less one.
#[unsafe(no_mangle)]
static VIP_MASK: u32 = 0;
/// First source port for translated flows.
#[unsafe(no_mangle)]
static NAT_PORT_FIRST: u16 = 0;
/// Number of them; 0 where no service translates, and the verifier then
/// removes what only translation needs.
#[unsafe(no_mangle)]
static NAT_PORT_COUNT: u16 = 0;

/// Places of one CPU's ring in `SPARE_V4` and in `SPARE_V6`, less one: a power of two.
#[unsafe(no_mangle)]
static SPARE_MASK: u32 = 0;
/// CPUs that there can be.
#[unsafe(no_mangle)]
static CPUS: u32 = 1;

/// Whether flows are in the other pair of tables, too; where it is 0, the verifier removes what
/// looks there.
#[unsafe(no_mangle)]
static HANDING_OVER: u32 = 0;

/// Whether flows are in the other pair of tables, too.
#[inline(always)]
fn handing_over() -> bool {
    // SAFETY: an initialised static; volatile as in `nat_ports`.
    unsafe { core::ptr::read_volatile(&raw const HANDING_OVER) != 0 }
}

/// The range of source ports for translated flows.
#[inline(always)]
pub(crate) fn nat_ports() -> PortRange {
    // Volatile: the compiler must not take the values above for the loader's.
    // SAFETY: both are initialised statics.
    unsafe {
        PortRange {
            first: core::ptr::read_volatile(&raw const NAT_PORT_FIRST),
            count: core::ptr::read_volatile(&raw const NAT_PORT_COUNT),
        }
    }
}

/// Counts a packet under `reason` and says what becomes of it.
#[inline(always)]
pub(crate) fn count(reason: Reason) -> u32 {
    if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's own element, and XDP does not nest.
        unsafe { *counter += 1 };
    }
    match reason.verdict() {
        ReasonVerdict::Pass => xdp_action::XDP_PASS,
        ReasonVerdict::Drop => xdp_action::XDP_DROP,
        ReasonVerdict::Answer => xdp_action::XDP_TX,
    }
}

/// Leaves the packet to another program. Comes back only where there is none.
#[inline(always)]
pub(crate) fn tail_call(ctx: *mut xdp_md, program: Program) {
    match program {
        Program::Arrival => jump::<{ Program::Arrival as u32 }>(ctx),
        Program::SteerV4 => jump::<{ Program::SteerV4 as u32 }>(ctx),
        Program::SteerV6 => jump::<{ Program::SteerV6 as u32 }>(ctx),
        Program::Fragment => jump::<{ Program::Fragment as u32 }>(ctx),
        Program::Tag => jump::<{ Program::Tag as u32 }>(ctx),
        Program::IcmpV4 => jump::<{ Program::IcmpV4 as u32 }>(ctx),
        Program::IcmpV6 => jump::<{ Program::IcmpV6 as u32 }>(ctx),
        Program::WatchV4 => jump::<{ Program::WatchV4 as u32 }>(ctx),
        Program::WatchV6 => jump::<{ Program::WatchV6 as u32 }>(ctx),
        Program::Wrap => jump::<{ Program::Wrap as u32 }>(ctx),
        Program::Tell => jump::<{ Program::Tell as u32 }>(ctx),
    }
}

/// `bpf_tail_call` in an instruction of its own for each program. The compiler would let several
/// share one, and then the kernel's can't make a plain jump of it, but looks the program up with
/// each packet: 10 ns.
#[inline(always)]
fn jump<const PLACE: u32>(ctx: *mut xdp_md) {
    // SAFETY: the context that the program was called with, and a map of this object. A helper's
    // arguments are in r1 to r3; it leaves r6 to r9 as they are.
    unsafe {
        core::arch::asm!(
            "r3 = {place}",
            "call 12",
            place = const PLACE,
            inlateout("r1") ctx => _,
            inlateout("r2") &raw const PROGRAMS => _,
            lateout("r0") _,
            out("r3") _,
            lateout("r4") _,
            lateout("r5") _,
        );
    }
}

/// What is known of the packet at hand.
#[inline(always)]
pub(crate) fn arrival() -> Option<&'static mut Arrival> {
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { ARRIVAL.get_ptr_mut(0).map(|p| &mut *p) }
}

/// Whether the frame is for the address that its interface goes by, at first sight.
#[inline(always)]
pub(crate) fn at_first_sight(packet: &Packet) -> bool {
    let Some(start) = packet.at::<u64>(0) else { return false };
    // SAFETY: `at` checked the bounds.
    let destination = unsafe { *start } << 16;
    FIRST_MACS.get(packet.ifindex % abi::FIRST_MACS).is_some_and(|mac| *mac == destination)
}

/// Whether the frame is for this host: for its interface, or a device on top of it.
#[inline(always)]
pub(crate) fn for_this_host(packet: &Packet) -> bool {
    let Some(start) = packet.at::<[u32; 2]>(0) else { return false };
    // SAFETY: `at` checked the bounds.
    let [first, last] = unsafe { *start };
    let key = MacKey { ifindex: packet.ifindex, first, last: last & 0xffff };
    if MACS.get_ptr(&key).is_some() {
        return true;
    }
    // Where they are not known, all are this host's.
    MACS.get_ptr(&MacKey { first: 0, last: 0, ..key }).is_none()
}

/// The way by an interface for frames with the tags of `vlan`; 0 where flows can't name it.
#[inline(always)]
pub(crate) fn tagged_way(ifindex: u32, vlan: u32) -> u32 {
    // SAFETY: an element of a preallocated map; an integer.
    match unsafe { MACS.get(&MacKey { ifindex, ..MacKey::default() }) } {
        Some(way) if *way != 0 => *way | vlan,
        _ => 0,
    }
}

/// The interface at a place of `TAGGED`; 0 for none.
#[inline(always)]
pub(crate) fn tagged_interface(place: u32) -> u32 {
    TAGGED.get(place).map_or(0, |ifindex| *ifindex)
}

/// What is served at an IPv4 address.
#[inline(always)]
pub(crate) fn any_v4(addr_be: u32) -> Option<&'static Service> {
    service_v4(VipKey::any_v4(addr_be))
}

/// What is served at an IPv6 address.
#[inline(always)]
pub(crate) fn any_v6(addr: Address) -> Option<&'static Service> {
    service_v6(addr, VipKey::any_v6())
}

/// Whether a protocol is among what is served at an address.
#[inline(always)]
pub(crate) fn serves(any: &Service, protocol: u8) -> bool {
    match protocol {
        IPPROTO_TCP => any.flags & SERVICE_TCP != 0,
        IPPROTO_UDP => any.flags & SERVICE_UDP != 0,
        _ => false,
    }
}

/// Whether a protocol is served at an IPv4 address.
#[inline(always)]
pub(crate) fn serves_v4(addr_be: u32, protocol: u8) -> bool {
    any_v4(addr_be).is_some_and(|any| serves(any, protocol))
}

/// Whether a protocol is served at an IPv6 address.
#[inline(always)]
pub(crate) fn serves_v6(addr: Address, protocol: u8) -> bool {
    any_v6(addr).is_some_and(|any| serves(any, protocol))
}

/// Where the first fragment of a datagram went, unless that is too long ago.
#[inline(always)]
pub(crate) fn fragment_route(key: &FragmentKey) -> Option<&'static mut FragmentRoute> {
    let route = FRAGMENTS.get_ptr_mut(key)?;
    // SAFETY: an element of a preallocated map, which stays valid memory of it while the program
    // runs; integers only.
    let route = unsafe { &mut *route };
    // SAFETY: the helper has no precondition. Kernel 5.11, commit d05512618056.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    (now.wrapping_sub(route.first_ns) <= FRAGMENT_NS).then_some(route)
}

/// Keeps where the first fragment of a datagram goes.
#[inline(always)]
pub(crate) fn keep_fragment(key: &FragmentKey, route: &mut FragmentRoute) {
    // SAFETY: as above.
    route.first_ns = unsafe { bpf_ktime_get_coarse_ns() };
    // Where there is no room on this CPU, the others will find none.
    _ = FRAGMENTS.insert(key, route, 0);
}

/// Forgets a datagram that is whole.
#[inline(always)]
pub(crate) fn forget_fragment(key: &FragmentKey) {
    _ = FRAGMENTS.remove(key);
}

/// The service at an IPv4 address and port.
#[inline(always)]
pub(crate) fn service_v4(key: VipKey) -> Option<&'static Service> {
    let [first, second] = slots([0; 2], key, vip_mask());
    let slot = VIPS_V4.get(first)?;
    if slot.key == key {
        return Some(&slot.service);
    }
    let slot = VIPS_V4.get(second)?;
    if slot.key == key { Some(&slot.service) } else { None }
}

/// The service at a port of an IPv6 address.
#[inline(always)]
pub(crate) fn service_v6(addr: Address, key: VipKey) -> Option<&'static Service> {
    let [first, second] = slots(addr, key, vip_mask());
    let matches = |slot: &VipSlotV6| {
        (slot.key.0 ^ key.0) | (slot.addr[0] ^ addr[0]) | (slot.addr[1] ^ addr[1]) == 0
    };
    let slot = VIPS_V6.get(first)?;
    if matches(slot) {
        return Some(&slot.service);
    }
    let slot = VIPS_V6.get(second)?;
    if matches(slot) { Some(&slot.service) } else { None }
}

/// Slots of `VIPS_V4` and of `VIPS_V6`, less one.
#[inline(always)]
fn vip_mask() -> u32 {
    // SAFETY: an initialised static; volatile as in `nat_ports`.
    unsafe { core::ptr::read_volatile(&raw const VIP_MASK) }
}

/// The entry of a bucket in the table that begins with a page.
#[inline(always)]
pub(crate) fn entry(first_page: u32, bucket: u32) -> Option<Entry> {
    let page = TABLE.get_ptr(first_page + bucket / PAGE_BUCKETS)?;
    let slot = (bucket % PAGE_BUCKETS) as usize;
    // Volatile: the agent stores concurrently, and the whole entry is read at once.
    // SAFETY: the page is an array of PAGE_BUCKETS words and `slot` is below that.
    Some(Entry(unsafe { page.cast::<u32>().add(slot).read_volatile() }))
}

/// A backend's record.
#[inline(always)]
pub(crate) fn backend(index: BackendIndex) -> Option<&'static Backend> {
    BACKENDS.get(u32::from(index.get()))
}

/// This CPU's counters of a backend.
#[inline(always)]
pub(crate) fn counters(index: BackendIndex) -> Option<&'static mut BackendCounters> {
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { BACKEND_COUNTERS.get_ptr_mut(u32::from(index.get())).map(|p| &mut *p) }
}

/// Sends the frame out of another interface.
#[inline(always)]
pub(crate) fn redirect(ifindex: u32) -> Result<u32, Reason> {
    TX_PORTS.redirect(ifindex, 0).map_err(|_| Reason::DropNoInterface)
}

/// This CPU's room for what an error quotes.
#[inline(always)]
pub(crate) fn quote() -> Option<&'static mut Quote> {
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { QUOTE.get_ptr_mut(0).map(|p| &mut *p) }
}

/// When the next error of this CPU would be due at an even pace.
#[inline(always)]
pub(crate) fn next_answer_ns() -> Option<&'static mut u64> {
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { NEXT_ANSWER.get_ptr_mut(0).map(|p| &mut *p) }
}

/// Nanoseconds of `CLOCK_MONOTONIC` (coarse).
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper has no precondition. Kernel 5.11, commit d05512618056.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// This CPU's counters of flow entries.
#[inline(always)]
fn flow_counters() -> Option<&'static mut FlowCounters> {
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { FLOW_COUNTERS.get_ptr_mut(0).map(|p| &mut *p) }
}

/// A CPU's ring of a family, and how many places it has. Only that CPU puts keys in; that two may
/// take the same one out at once harms nobody.
#[inline(always)]
fn ring(family: u32, cpu: u32) -> Option<(&'static mut Ring, u64)> {
    // SAFETY: initialised statics; volatile as in `nat_ports`.
    let (mask, cpus) = unsafe {
        (core::ptr::read_volatile(&raw const SPARE_MASK), core::ptr::read_volatile(&raw const CPUS))
    };
    // SAFETY: an element of the map; integers only.
    let ring = unsafe { SPARE_RINGS.get_ptr_mut(family * cpus + cpu).map(|p| &mut *p) }?;
    Some((ring, u64::from(mask) + 1))
}

/// Where in `SPARE_V4` and `SPARE_V6` a place of a CPU's ring is.
#[inline(always)]
fn ring_place(cpu: u32, at: u64, size: u64) -> u32 {
    cpu * size as u32 + (at & (size - 1)) as u32
}

/// The CPU that this runs on.
#[inline(always)]
pub(crate) fn this_cpu() -> u32 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_get_smp_processor_id() }
}

/// The CPU whose spare flows are looked at: this one first, then all in turn.
#[inline(always)]
fn spare_cpu(attempt: u32) -> u32 {
    let cpu = this_cpu();
    if attempt < ROOM_ATTEMPTS / 2 {
        return cpu;
    }
    // SAFETY: an initialised static; volatile as in `nat_ports`.
    let cpus = unsafe { core::ptr::read_volatile(&raw const CPUS) };
    (cpu + attempt).checked_rem(cpus).unwrap_or(cpu)
}

/// This CPU's search for a port.
#[inline(always)]
fn search() -> Option<&'static mut Search> {
    // SAFETY: this CPU's own element, and XDP does not nest.
    unsafe { SEARCH.get_ptr_mut(0).map(|p| &mut *p) }
}

/// Calls `step` so many times, or until it answers with other than 0.
#[inline(always)]
fn repeat(times: u32, step: unsafe extern "C" fn(u32, *mut c_void) -> i64) {
    // SAFETY: the callback has the signature that the helper calls, and looks at no context.
    // Kernel 5.17, commit e6f2dd0f8067.
    unsafe { bpf_loop(times, step as *mut c_void, core::ptr::null_mut(), 0) };
}

/// The flow table of IPv4.
pub(crate) struct FlowsV4;
/// The flow table of IPv6.
pub(crate) struct FlowsV6;

macro_rules! flow_table {
    ($table:ident, $map:ident, $other:ident, $key:ty, $spare:ident, $family:literal, $callbacks:ident) => {
        // SAFETY: elements of a preallocated hash map stay valid memory of the map while
        // the program runs.
        unsafe impl Flows<$key> for $table {
            #[inline(always)]
            fn lookup(&self, key: &$key) -> *mut Flow {
                match $map.get_ptr_mut(key) {
                    Some(flow) => flow,
                    None if handing_over() => {
                        $other.get_ptr_mut(key).unwrap_or(core::ptr::null_mut())
                    }
                    None => core::ptr::null_mut(),
                }
            }

            #[inline(always)]
            fn insert(&self, key: &$key, flow: &Flow) -> Inserted {
                const EEXIST: i32 = -17;
                if handing_over() && $other.get_ptr(key).is_some() {
                    return Inserted::Exists;
                }
                match $map.insert(key, flow, u64::from(BPF_NOEXIST)) {
                    Ok(()) => {
                        if let Some(counters) = flow_counters() {
                            counters.stored += 1;
                        }
                        Inserted::Stored
                    }
                    Err(EEXIST) => Inserted::Exists,
                    Err(_) => Inserted::Full,
                }
            }

            #[inline(always)]
            fn remove(&self, key: &$key) {
                // Failure means that it is not there.
                _ = $map.remove(key);
                if handing_over() {
                    _ = $other.remove(key);
                }
            }

            #[inline(always)]
            fn backend_flags(&self, index: BackendIndex) -> u32 {
                backend(index).map_or(0, |b| b.flags)
            }

            #[inline(always)]
            fn now_ns(&self) -> u64 {
                now_ns()
            }

            #[inline(always)]
            fn count_untracked(&self) {
                if let Some(counters) = flow_counters() {
                    counters.untracked += 1;
                }
            }
        }

        mod $callbacks {
            //! What the kernel calls again and again.

            use super::{c_void, ports, search, $table};

            pub(super) unsafe extern "C" fn guess(_: u32, _: *mut c_void) -> i64 {
                i64::from(search().is_none_or(|search| search.guess(&$table)))
            }

            pub(super) unsafe extern "C" fn look(index: u32, _: *mut c_void) -> i64 {
                i64::from(search().is_none_or(|search| search.look(&$table, index)))
            }

            pub(super) unsafe extern "C" fn let_one_go(attempt: u32, _: *mut c_void) -> i64 {
                i64::from(ports::let_one_go(&$table, attempt))
            }
        }

        // SAFETY: elements of an array map stay where they are.
        unsafe impl Pool<$key> for $table {
            #[inline(always)]
            fn source(&self, index: u32) -> Option<Address> {
                NAT_SOURCES.get(index).map(|a| [a[0], a[1]])
            }

            #[inline(always)]
            fn search(&self) -> *mut Search {
                search().map_or(core::ptr::null_mut(), core::ptr::from_mut)
            }

            #[inline(always)]
            fn guess(&self) {
                repeat(PORT_ATTEMPTS, $callbacks::guess);
            }

            #[inline(always)]
            fn scan(&self) {
                repeat(search().map_or(0, |search| search.limit), $callbacks::look);
            }

            #[inline(always)]
            fn make_room(&self) {
                repeat(ROOM_ATTEMPTS, $callbacks::let_one_go);
            }

            #[inline(always)]
            fn keep_spare(&self, key: &$key) {
                let cpu = this_cpu();
                let Some((ring, size)) = ring($family, cpu) else { return };
                let place = ring_place(cpu, ring.push(size), size);
                if let Some(slot) = $spare.get_ptr_mut(place) {
                    // SAFETY: an element of the map.
                    unsafe { *slot = *key };
                }
            }

            #[inline(always)]
            fn oldest_spare(&self, attempt: u32) -> *const $key {
                let cpu = spare_cpu(attempt);
                let Some((ring, size)) = ring($family, cpu) else { return core::ptr::null() };
                let Some(at) = ring.pop() else { return core::ptr::null() };
                $spare.get_ptr(ring_place(cpu, at, size)).unwrap_or(core::ptr::null())
            }

            #[inline(always)]
            fn exhausted_ns(&self, index: BackendIndex) -> u64 {
                counters(index).map_or(0, |c| c.exhausted_ns)
            }

            #[inline(always)]
            fn set_exhausted(&self, index: BackendIndex, now_ns: u64) {
                if let Some(counters) = counters(index) {
                    counters.exhausted_ns = now_ns;
                }
            }

            #[inline(always)]
            fn count_taken_over(&self) {
                if let Some(counters) = flow_counters() {
                    counters.taken_over += 1;
                }
            }

            #[inline(always)]
            fn count_let_go(&self) {
                if let Some(counters) = flow_counters() {
                    counters.let_go += 1;
                }
            }
        }
    };
}

flow_table!(FlowsV4, FLOWS_V4, OTHER_FLOWS_V4, FlowKeyV4, SPARE_V4, 0, callbacks_v4);
flow_table!(FlowsV6, FLOWS_V6, OTHER_FLOWS_V6, FlowKeyV6, SPARE_V6, 1, callbacks_v6);
