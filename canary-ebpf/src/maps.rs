//! The maps, and the constants that the loader sets.
//!
//! Sizes here are the least that load; the agent sets those of its
//! configuration. Names are those of the pins.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST, xdp_action},
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::map,
    maps::{Array, DevMapHash, HashMap, PerCpuArray},
};
use canary_ebpf_common::{
    abi::{
        Address, Backend, BackendCounters, Flow, FlowKeyV4, FlowKeyV6, Meta, PAGE_BUCKETS,
        REASON_SLOTS, Reason, ReasonVerdict, Service, ServiceInfo, VipKey, VipSlotV4, VipSlotV6,
    },
    entry::{BackendIndex, Entry},
    nat::PortRange,
    steer::{Flows, Inserted},
    vips::slots,
};

/// What the pinned maps are.
#[map]
static META: Array<Meta> = Array::with_max_entries(1, 0);
/// The directory of services.
#[map]
static SERVICE_INFO: Array<ServiceInfo> = Array::with_max_entries(1, 0);
/// Owners and times of last moves, in pages beside those of `TABLE`.
#[map]
static LEDGER: Array<[u64; PAGE_BUCKETS as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

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
/// Traffic by backend index.
#[map]
static BACKEND_COUNTERS: PerCpuArray<BackendCounters> = PerCpuArray::with_max_entries(1, 0);
/// Packets by reason.
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASON_SLOTS, 0);
/// Interfaces that packets may leave by, under their own index.
#[map]
static TX_PORTS: DevMapHash = DevMapHash::with_max_entries(1, 0);

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
    }
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

/// The entry of a service's bucket.
#[inline(always)]
pub(crate) fn entry(service: &Service, bucket: u32) -> Option<Entry> {
    let page = TABLE.get_ptr(service.first_page + bucket / PAGE_BUCKETS)?;
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

/// A source address for translated flows.
#[inline(always)]
pub(crate) fn nat_source(index: u32) -> Option<&'static Address> {
    NAT_SOURCES.get(index)
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

/// The flow table of IPv4.
pub(crate) struct FlowsV4;
/// The flow table of IPv6.
pub(crate) struct FlowsV6;

macro_rules! flow_table {
    ($table:ty, $map:ident, $key:ty) => {
        // SAFETY: elements of a preallocated hash map stay valid memory of the map while
        // the program runs.
        unsafe impl Flows<$key> for $table {
            #[inline(always)]
            fn lookup(&self, key: &$key) -> *mut Flow {
                $map.get_ptr_mut(key).unwrap_or(core::ptr::null_mut())
            }

            #[inline(always)]
            fn insert(&self, key: &$key, flow: &Flow) -> Inserted {
                const EEXIST: i32 = -17;
                match $map.insert(key, flow, u64::from(BPF_NOEXIST)) {
                    Ok(()) => Inserted::Stored,
                    Err(EEXIST) => Inserted::Exists,
                    Err(_) => Inserted::Full,
                }
            }

            #[inline(always)]
            fn remove(&self, key: &$key) {
                // Failure means that it is not there.
                _ = $map.remove(key);
            }

            #[inline(always)]
            fn backend_flags(&self, index: BackendIndex) -> u32 {
                backend(index).map_or(0, |b| b.flags)
            }

            #[inline(always)]
            fn now_ns(&self) -> u64 {
                // SAFETY: the helper has no precondition. Kernel 5.11, commit d05512618056.
                unsafe { bpf_ktime_get_coarse_ns() }
            }
        }
    };
}

flow_table!(FlowsV4, FLOWS_V4, FlowKeyV4);
flow_table!(FlowsV6, FLOWS_V6, FlowKeyV6);
