//! Every map and the pod's read-only data, in one table.
//!
//! All maps are pinned by name in the bpffs folder of their layout version, shared by every pod's programs on the node.
//! Their names are [`heddle_common::maps`]; a change of a name, key or value raises `LAYOUT_VERSION`.

use core::{arch::asm, ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::{bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf, SockMap},
};
use heddle_common::{
    Address, Attestation, Destination, EVENTS_BYTES, Lane, LocalEndpoints, MAX_ATTESTED, MAX_DENIALS, MAX_DESTINATIONS,
    MAX_PODS, MAX_RESIDENTS, MAX_SERVICES, MAX_VERDICTS, Pair, Pod, PodCounts, PodGate, Resident, ServicePort, Tuple,
    Verdict, gate,
};

use crate::address::Ip;

/// Addresses that are reached through the mesh. Not preallocated: memory goes with use. What is read of an entry is copied at
/// once, as newer kernels (6.1) may give a removed entry's memory to the next.
#[map]
static DESTINATIONS: HashMap<Address, Destination> = HashMap::pinned(MAX_DESTINATIONS, BPF_F_NO_PREALLOC);

/// Connections that someone vouched for. Not an LRU: an entry leaves by its owner's hand only, never because others
/// came.
#[map]
pub static ATTESTED: HashMap<Tuple, Attestation> = HashMap::pinned(MAX_ATTESTED, BPF_F_NO_PREALLOC);

/// The agent's listener in each pod's netns, by slot. The kernel empties a slot when its listener closes.
#[map]
pub static LISTENERS: SockMap = SockMap::pinned(MAX_PODS, 0);

/// What may change of a pod while its programs stay, by slot.
#[map]
static GATES: Array<PodGate> = Array::pinned(MAX_PODS, 0);

/// Events of each pod, by slot.
#[map]
static COUNTS: PerCpuArray<PodCounts> = PerCpuArray::pinned(MAX_PODS, 0);

/// The enrolled pods of this node, by address.
#[map]
pub static RESIDENTS: HashMap<Address, Resident> = HashMap::pinned(MAX_RESIDENTS, BPF_F_NO_PREALLOC);

/// What the policy engine decided for two pods of this node and a port.
#[map]
static VERDICTS: HashMap<Pair, Verdict> = HashMap::pinned(MAX_VERDICTS, BPF_F_NO_PREALLOC);

/// How often each verdict of denial was applied.
#[map]
static DENIALS: PerCpuArray<u64> = PerCpuArray::pinned(MAX_DENIALS, 0);

/// Ports of Services that have endpoints on this node.
#[map]
pub static SERVICES: HashMap<ServicePort, LocalEndpoints> = HashMap::pinned(MAX_SERVICES, BPF_F_NO_PREALLOC);

/// What is known of a socket on the kernel lane; goes with the socket. The loader pins it.
#[btf_map]
static LANES: SkStorage<Lane> = SkStorage::new();

/// Connections of the kernel lane that have ended.
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(EVENTS_BYTES, 0);

/// The pod of this instance; the loader writes it before the verifier sees it. Without a loader: no slot, no address.
#[unsafe(no_mangle)]
static POD: Pod = Pod {
    slot: u32::MAX,
    addresses_used: 0,
    workload: 0,
    netns: 0,
    addresses: [Address { octets: [0; 16] }; Pod::MAX_ADDRESSES],
};

/// Slot of this instance's pod.
#[inline(always)]
pub fn slot() -> u32 {
    // SAFETY: POD is a valid static; the read is volatile because the loader changes what the compiler saw.
    unsafe { (&raw const POD.slot).read_volatile() }
}

/// Whether the address is one of the pod's own.
#[inline(always)]
pub fn is_own(ip: Ip) -> bool {
    // SAFETY: as in `slot`.
    let used = unsafe { (&raw const POD.addresses_used).read_volatile() };
    let mut index = 0;
    while index < Pod::MAX_ADDRESSES {
        // SAFETY: in bounds of the array, whose addresses are 4-aligned in POD (offset 24, asserted in heddle_common).
        let own = unsafe { (&raw const POD.addresses).cast::<Ip>().add(index).read_volatile() };
        if (index as u32) < used && own == ip {
            return true;
        }
        index += 1;
    }
    false
}

/// Whether the address is reached through the mesh.
#[inline(always)]
pub fn is_destination(ip: Ip) -> bool {
    DESTINATIONS.get_ptr(ip.address()).is_some()
}

/// Id of this instance's pod.
#[inline(always)]
pub fn workload() -> u64 {
    // SAFETY: as in `slot`.
    unsafe { (&raw const POD.workload).read_volatile() }
}

/// Cookie of the pod's netns; zero where nobody knows it.
#[inline(always)]
pub fn netns() -> u64 {
    // SAFETY: as in `slot`.
    unsafe { (&raw const POD.netns).read_volatile() }
}

/// What was decided for a connection to a port of `destination`.
#[inline(always)]
pub fn verdict(source: u64, destination: u64, port: u16) -> Option<Verdict> {
    // SAFETY: the agent replaces entries whole and never changes them in place; two integers are copied.
    unsafe { VERDICTS.get(Pair::new(source, destination, port)) }.copied()
}

/// What is kept of a socket on the kernel lane; null where nothing is.
///
/// # Safety
/// `socket` is a full socket that the kernel gave to the running program.
#[inline(always)]
pub unsafe fn lane(socket: *mut bpf_sock) -> *mut Lane {
    // SAFETY: the caller's promise; LANES is a map.
    unsafe { bpf_sk_storage_get(lanes(), socket.cast(), ptr::null_mut(), 0) }.cast()
}

/// As [`lane`]; made, all zero, where nothing is. Null where there is no memory.
///
/// # Safety
/// As [`lane`].
#[inline(always)]
pub unsafe fn make_lane(socket: *mut bpf_sock) -> *mut Lane {
    // SAFETY: as in `lane`.
    unsafe { bpf_sk_storage_get(lanes(), socket.cast(), ptr::null_mut(), BPF_SK_STORAGE_GET_F_CREATE.into()) }.cast()
}

#[inline(always)]
fn lanes() -> *mut c_void {
    (&raw const LANES).cast_mut().cast()
}

/// Whether the pod asked to be left alone while no agent serves it.
#[inline(always)]
pub fn open_when_unattended() -> bool {
    GATES.get(slot()).is_some_and(|gate| gate.flags & gate::OPEN_WHEN_UNATTENDED != 0)
}

/// Whether an agent's listener is in the pod's slot.
#[inline(always)]
pub fn attended() -> bool {
    let slot = slot();
    // SAFETY: LISTENERS is a map and the key lives on this stack. What a look-up in a sockmap returns is a socket with
    // a reference of its own (Linux 5.8), which is given back at once.
    unsafe {
        let socket: *mut bpf_sock =
            bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast::<c_void>(), (&raw const slot).cast()).cast();
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast());
    }
    true
}

/// Adds one to this pod's counter at the offset `field` of [`PodCounts`].
#[inline(always)]
pub fn count(field: usize) {
    let Some(counts) = COUNTS.get_ptr_mut(slot()) else { return };
    // SAFETY: `field` is the offset of a field, so the place is in this CPU's map value, 8-aligned, and lives as long
    // as the program runs.
    unsafe { add_one(counts.byte_add(field).cast()) }
}

/// Adds one to the counter of a verdict of denial.
#[inline(always)]
pub fn count_denial(counter: u32) {
    if let Some(count) = DENIALS.get_ptr_mut(counter) {
        // SAFETY: a map's value of eight bytes, 8-aligned, that lives as long as the program runs.
        unsafe { add_one(count) }
    }
}

/// One atomic instruction, as a connect() in process context may be interrupted by a look-up on the same CPU; `core` offers
/// no atomic addition for this target.
#[inline(always)]
unsafe fn add_one(place: *mut u64) {
    // SAFETY: the caller's promise that the place is a live, aligned u64.
    unsafe {
        asm!("lock *(u64 *)({place} + 0) += {one}", place = in(reg) place, one = in(reg) 1_u64, options(nostack));
    }
}
