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
    ADMITTED_PLACES, Address, Asked, Attestation, Destination, EVENTS_BYTES, Kubelet, LOOKED_PLACES, LocalEndpoints,
    MAX_ATTESTED, MAX_DENIALS, MAX_DESTINATIONS, MAX_PODS, MAX_PROBE_PORTS, MAX_RESIDENTS, MAX_SERVICES, MAX_VERDICTS,
    PROBING_PLACES, PROGRESS_JIFFIES, Pair, Pod, PodCounts, PodGate, ProbePort, Resident, ServicePort, Tuple, Verdict,
    gate,
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

/// What the app asked for, where the kernel chose a Service's endpoint; goes with the socket. The loader pins it. To make and
/// free it costs microseconds, so no other socket has one.
#[btf_map]
static ASKED: SkStorage<Asked> = SkStorage::new();

/// Cookies of the sockets that `connect` let onto the kernel lane last: their SYNs leave in the same system call. A place is
/// found by the cookie and overwritten by the next that falls on it, so nothing is ever left behind.
#[map]
static ADMITTED: Array<u64> = Array::pinned(ADMITTED_PLACES, 0);

/// When the bytes of a socket on the kernel lane were last looked at: the lower half of its cookie and of the clock's ticks. A
/// measured round trip is frequent and a look in `ATTESTED` dear, so this tells first whether it is time for one.
#[map]
static LOOKED: Array<u64> = Array::pinned(LOOKED_PLACES, 0);

/// Ports that the kubelet probes, by pod.
#[map]
static PROBE_PORTS: HashMap<ProbePort, u32> = HashMap::pinned(MAX_PROBE_PORTS, BPF_F_NO_PREALLOC);

/// Cookies of the kubelet's sockets between their connect() and its SYN, as `ADMITTED` has those of pods.
#[map]
static PROBING: Array<u64> = Array::pinned(PROBING_PLACES, 0);

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

/// The kubelet of this instance; the loader writes it as it does `POD`. Without a loader: nobody's.
#[unsafe(no_mangle)]
static KUBELET: Kubelet = Kubelet { cgroup: 0, netns: 0 };

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

/// What is kept of a socket that was connected to a Service; null where nothing is.
///
/// # Safety
/// `socket` is a full socket that the kernel gave to the running program.
#[inline(always)]
pub unsafe fn asked(socket: *mut bpf_sock) -> *mut Asked {
    // SAFETY: the caller's promise; ASKED is a map.
    unsafe { bpf_sk_storage_get(storage(), socket.cast(), ptr::null_mut(), 0) }.cast()
}

/// As [`asked`]; made, all zero, where nothing is. Null where there is no memory.
///
/// # Safety
/// As [`asked`].
#[inline(always)]
pub unsafe fn make_asked(socket: *mut bpf_sock) -> *mut Asked {
    // SAFETY: as in `asked`.
    unsafe { bpf_sk_storage_get(storage(), socket.cast(), ptr::null_mut(), BPF_SK_STORAGE_GET_F_CREATE.into()) }.cast()
}

#[inline(always)]
fn storage() -> *mut c_void {
    (&raw const ASKED).cast_mut().cast()
}

/// Notes that this socket was let onto the kernel lane.
#[inline(always)]
pub fn admit(cookie: u64) {
    note(admitted(cookie), cookie);
}

/// Whether this socket was let onto the kernel lane; not any more afterwards.
#[inline(always)]
pub fn take_admission(cookie: u64) -> bool {
    take(admitted(cookie), cookie)
}

#[inline(always)]
fn admitted(cookie: u64) -> Option<*mut u64> {
    ADMITTED.get_ptr_mut(place(cookie) % ADMITTED_PLACES)
}

/// Leaves a socket's cookie in its place. One word, so that whoever reads it has all of it or nothing.
#[inline(always)]
fn note(place: Option<*mut u64>, cookie: u64) {
    if let Some(place) = place {
        // SAFETY: a map's value of eight bytes, 8-aligned, that lives as long as the program runs.
        unsafe { place.write_volatile(cookie) }
    }
}

/// Whether the cookie is in its place; not any more afterwards.
#[inline(always)]
fn take(place: Option<*mut u64>, cookie: u64) -> bool {
    let Some(place) = place else { return false };
    // SAFETY: as in `note`.
    unsafe {
        if place.read_volatile() != cookie {
            return false;
        }
        place.write_volatile(0);
    }
    true
}

/// Where a socket has its place in a small array. Each CPU gives out 4,096 cookies in a row: by their lower bits alone, two CPUs
/// in step would always meet.
#[inline(always)]
fn place(cookie: u64) -> u32 {
    (cookie ^ cookie >> 12) as u32
}

/// Id of the kubelet's cgroup, and the cookie of the host's netns; zero where nobody knows it.
#[inline(always)]
pub fn kubelet() -> (u64, u64) {
    // SAFETY: as in `slot`.
    unsafe { ((&raw const KUBELET.cgroup).read_volatile(), (&raw const KUBELET.netns).read_volatile()) }
}

/// Whether the kubelet probes this port of the pod.
#[inline(always)]
pub fn is_probe_port(workload: u64, port: u16) -> bool {
    PROBE_PORTS.get_ptr(ProbePort::new(workload, port)).is_some()
}

/// Notes that this socket of the kubelet is about to probe.
#[inline(always)]
pub fn probe(cookie: u64) {
    note(probing(cookie), cookie);
}

/// Whether this socket of the kubelet is about to probe; not any more afterwards.
#[inline(always)]
pub fn take_probe(cookie: u64) -> bool {
    take(probing(cookie), cookie)
}

#[inline(always)]
fn probing(cookie: u64) -> Option<*mut u64> {
    PROBING.get_ptr_mut(place(cookie) % PROBING_PLACES)
}

/// Notes that the bytes of this socket are looked at now, in ticks of the kernel's clock.
#[inline(always)]
pub fn look(cookie: u64, now: u32) {
    if let Some(looked) = LOOKED.get_ptr_mut(place(cookie) % LOOKED_PLACES) {
        // SAFETY: as in `note`.
        unsafe { looked.write_volatile(cookie << 32 | u64::from(now)) }
    }
}

/// Whether it is time to look again. Yes, if another socket has taken the place.
#[inline(always)]
pub fn is_to_be_looked_at(cookie: u64, now: u32) -> bool {
    let Some(looked) = LOOKED.get_ptr(place(cookie) % LOOKED_PLACES) else { return true };
    // SAFETY: as in `note`.
    let looked = unsafe { looked.read_volatile() };
    looked >> 32 != cookie & u64::from(u32::MAX) || now.wrapping_sub(looked as u32) >= PROGRESS_JIFFIES
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
