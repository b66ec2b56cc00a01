//! `sockops`: vouches for the pod's connections on the kernel lane before their SYN leaves, and tells what became of them.
//!
//! Beside the journey, on every TCP socket of the pod's cgroup; sockets that are not on the lane pass at once. The source's
//! side makes the entry, each side writes its own part of it, and the last to close takes it out. It must never vouch for
//! an address that is not the pod's own, and never let a full table be taken for a good word: then the agent gets the SYN.

use core::{
    arch::asm,
    ffi::c_void,
    mem::{offset_of, size_of},
    ptr,
};

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_ANY, BPF_NOEXIST, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT1, BPF_TCP_FIN_WAIT2,
        BPF_TCP_LAST_ACK, BPF_TCP_SYN_SENT, SO_MARK, bpf_sock, bpf_sock_ops,
    },
    helpers::{bpf_get_socket_cookie, bpf_jiffies64, bpf_ktime_get_ns, bpf_setsockopt, bpf_sock_ops_cb_flags_set},
    programs::SockOpsContext,
};
use heddle_common::{Attestation, EVENTS_BYTES, Ended, MARK, MARK_MASK, PodCounts, Resident, Tuple, attested_by, side};

use crate::{
    address::{self, AF_INET, Ip, word, words},
    maps,
};

/// The only verdict of a `sockops` program.
pub const PROCEED: u32 = 1;

const SOL_SOCKET: i32 = 1;
/// Shift of the smoothed round-trip time that TCP keeps.
const SRTT_SHIFT: u32 = 3;
/// `BPF_RB_AVAIL_DATA`.
const RING_UNREAD: u64 = 0;

#[inline(always)]
pub fn observe(ctx: &SockOpsContext) -> u32 {
    // SAFETY: the kernel gives a valid context.
    let op = unsafe { word!(ctx.ops, bpf_sock_ops, op) };
    match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB => opens(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_STATE_CB => changes(ctx),
        BPF_SOCK_OPS_RTT_CB => progresses(ctx),
        _ => {}
    }
    PROCEED
}

/// A side of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// The connection as its destination sees it.
#[inline(always)]
pub fn tuple(ctx: &SockOpsContext, of: End) -> Tuple {
    let ops = ctx.ops;
    // SAFETY: the kernel gives a valid context. The remote port is in network order, in the upper half of its word on
    // little-endian machines.
    let (local, remote, local_port, remote_port) = unsafe {
        let (local, remote) = if word!(ops, bpf_sock_ops, family) == AF_INET {
            (Ip::v4(word!(ops, bpf_sock_ops, local_ip4)), Ip::v4(word!(ops, bpf_sock_ops, remote_ip4)))
        } else {
            (Ip::v6(words!(ops, bpf_sock_ops, local_ip6)), Ip::v6(words!(ops, bpf_sock_ops, remote_ip6)))
        };
        let remote_port = u16::from_be((word!(ops, bpf_sock_ops, remote_port) >> 16) as u16);
        (local, remote, word!(ops, bpf_sock_ops, local_port) as u16, remote_port)
    };
    let (source, destination, source_port, destination_port) = if of == End::Source {
        (local, remote, local_port, remote_port)
    } else {
        (remote, local, remote_port, local_port)
    };
    Tuple { source: source.address(), destination: destination.address(), source_port, destination_port, padding: 0 }
}

/// The pod's socket is about to send its SYN: vouches for it, if `connect` let it onto the lane.
#[inline(always)]
fn opens(ctx: &SockOpsContext) {
    // SAFETY: the kernel gives a valid context, and with it a full socket or none.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    // An app that connects by TCP_FASTOPEN_CONNECT sends its SYN with the first byte, and may have set marks until then.
    // SAFETY: a full socket of the context.
    if socket.is_null() || unsafe { word!(socket, bpf_sock, mark) } & MARK_MASK == MARK {
        return;
    }
    let tuple = tuple(ctx, End::Source);
    // SAFETY: the agent replaces entries whole and never changes them in place; integers are copied.
    let Some(&Resident { workload, slot, .. }) = (unsafe { maps::RESIDENTS.get(tuple.destination) }) else { return };
    if workload == maps::workload() {
        return;
    }
    // SAFETY: the helper takes the context that the kernel gave.
    let id = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if !maps::take_admission(id) {
        // Thousands of others were let on between the two hooks (TCP_FASTOPEN_CONNECT); or `connect` left an open pod alone for want of an agent, which
        // can't be told apart in here.
        if maps::is_destination(Ip::from_address(tuple.destination)) && !maps::open_when_unattended() {
            maps::count(offset_of!(PodCounts, lane_missed));
            to_the_agent(ctx);
        }
        return;
    }
    // SAFETY: a full socket of the context; the storage is this socket's, which the caller holds locked.
    let (service, service_port) = unsafe {
        let asked = maps::asked(socket);
        if asked.is_null() {
            (Ip::UNSPECIFIED, 0)
        } else {
            (Ip::from_place(&raw const (*asked).service), (*asked).port)
        }
    };
    // SAFETY: the helper takes nothing.
    let opened = unsafe { bpf_ktime_get_ns() };
    let attestation = Attestation {
        slot,
        by: attested_by::KERNEL,
        source: maps::workload(),
        destination: workload,
        id,
        peer: 0,
        opened,
        service: service.address(),
        service_port,
        padding: 0,
        source_state: 0,
        destination_state: 0,
        source_rtt_us: 0,
        destination_rtt_us: 0,
        source_retransmissions: 0,
        destination_retransmissions: 0,
        closed: 0,
        sent: 0,
        received: 0,
    };
    if !maps::is_own(Ip::from_address(tuple.source)) || !attest(&tuple, &attestation) {
        maps::count(offset_of!(PodCounts, lane_full));
        return to_the_agent(ctx);
    }
    watch(ctx, id);
}

/// Makes the entry. Whether there was room for it.
#[inline(always)]
fn attest(tuple: &Tuple, attestation: &Attestation) -> bool {
    if maps::ATTESTED.insert(tuple, attestation, u64::from(BPF_NOEXIST)).is_ok() {
        return true;
    }
    let Some(earlier) = maps::ATTESTED.get_ptr_mut(tuple) else { return false };
    // SAFETY: a live entry of the map. The kernel gave the port to this socket, so the earlier one is over.
    unsafe {
        if (*earlier).by == attested_by::KERNEL {
            finish(tuple, earlier);
        }
    }
    maps::ATTESTED.insert(tuple, attestation, u64::from(BPF_ANY)).is_ok()
}

/// Marks the socket, so that its SYN takes the local route after all: TCP asks for the route again once the mark changed.
#[inline(always)]
fn to_the_agent(ctx: &SockOpsContext) {
    let mut mark = MARK;
    // SAFETY: `mark` lives on this stack for the call. Should it fail, the SYN is not attested, and `lookup` gives it to the
    // destination's agent as what it is: plaintext of nobody.
    let _unattested = unsafe {
        bpf_setsockopt(
            ctx.as_ptr(),
            SOL_SOCKET,
            SO_MARK as i32,
            (&raw mut mark).cast::<c_void>(),
            size_of::<u32>() as i32,
        )
    };
}

/// Asks for the callbacks that tell of progress and end.
#[inline(always)]
fn watch(ctx: &SockOpsContext, cookie: u64) {
    // SAFETY: the kernel gives a valid context; the other helper takes nothing.
    unsafe {
        maps::look(cookie, bpf_jiffies64() as u32);
        let flags =
            word!(ctx.ops, bpf_sock_ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG;
        // It fails for a socket that is none, and then there is nothing to watch.
        let _none = bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32);
    }
}

/// A connection came to the pod and its handshake is complete.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let tuple = tuple(ctx, End::Destination);
    let Some(entry) = maps::ATTESTED.get_ptr_mut(tuple) else { return };
    // SAFETY: the helper takes the context that the kernel gave.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: a live entry of the map; the destination's side writes its own fields alone.
    unsafe {
        if (*entry).by != attested_by::KERNEL || (*entry).destination != maps::workload() {
            // A probe lets one connection in: no other SYN of its 4-tuple.
            if (*entry).by == attested_by::KUBELET && (*entry).destination == maps::workload() {
                (*entry).destination_state = side::ESTABLISHED;
            }
            return;
        }
        (*entry).peer = cookie;
        (*entry).destination_state = side::ESTABLISHED;
    }
    watch(ctx, cookie);
}

/// A connection of the lane, as one of its sides sees it.
struct Side {
    end: End,
    tuple: Tuple,
    entry: *mut Attestation,
}

/// The connection of the context's socket: there may be another one of the same addresses and ports, before or after it.
#[inline(always)]
fn side(ctx: &SockOpsContext, cookie: u64) -> Option<Side> {
    let tuple = tuple(ctx, End::Source);
    if let Some(entry) = maps::ATTESTED.get_ptr_mut(tuple) {
        // SAFETY: a live entry of the map.
        if unsafe { (*entry).by == attested_by::KERNEL && (*entry).id == cookie } {
            return Some(Side { end: End::Source, tuple, entry });
        }
    }
    let tuple = Tuple {
        source: tuple.destination,
        destination: tuple.source,
        source_port: tuple.destination_port,
        destination_port: tuple.source_port,
        padding: 0,
    };
    let entry = maps::ATTESTED.get_ptr_mut(tuple)?;
    // SAFETY: as above.
    let its = unsafe { (*entry).by == attested_by::KERNEL && (*entry).peer == cookie };
    its.then_some(Side { end: End::Destination, tuple, entry })
}

/// A socket of the lane goes on to another state: only its end is of interest.
#[inline(always)]
fn changes(ctx: &SockOpsContext) {
    // SAFETY: the kernel gives a valid context, with the old and the new state.
    let [old, new, ..] = unsafe { words!(ctx.ops, bpf_sock_ops, __bindgen_anon_1) };
    if new != BPF_TCP_CLOSE {
        return;
    }
    // SAFETY: the helper takes the context that the kernel gave.
    let Some(side) = side(ctx, unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }) else { return };
    // SAFETY: the kernel gives a valid context; the entry is live.
    unsafe {
        let everything = word!(ctx.ops, bpf_sock_ops, snd_una) == word!(ctx.ops, bpf_sock_ops, snd_nxt);
        let state = side::CLOSED
            | match old {
                BPF_TCP_SYN_SENT => 0,
                // The last that is sent is the FIN.
                BPF_TCP_FIN_WAIT2 => side::ESTABLISHED | side::FINISHED | side::ACKNOWLEDGED,
                BPF_TCP_LAST_ACK | BPF_TCP_CLOSING if everything => {
                    side::ESTABLISHED | side::FINISHED | side::ACKNOWLEDGED
                }
                BPF_TCP_LAST_ACK | BPF_TCP_CLOSING | BPF_TCP_FIN_WAIT1 => side::ESTABLISHED | side::FINISHED,
                _ => side::ESTABLISHED,
            };
        tell(ctx, &side, state);
        if is_last(side.entry, side.end) {
            finish(&side.tuple, side.entry);
        }
    }
}

/// A round trip was measured: now and then a look at the bytes.
#[inline(always)]
fn progresses(ctx: &SockOpsContext) {
    // SAFETY: the helpers take the context that the kernel gave, or nothing.
    let (cookie, now) = unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), bpf_jiffies64() as u32) };
    if !maps::is_to_be_looked_at(cookie, now) {
        return;
    }
    // SAFETY: the kernel gives a valid context.
    let state = match unsafe { word!(ctx.ops, bpf_sock_ops, state) } {
        BPF_TCP_SYN_SENT => return,
        BPF_TCP_FIN_WAIT1 | BPF_TCP_LAST_ACK | BPF_TCP_CLOSING => side::ESTABLISHED | side::FINISHED,
        BPF_TCP_FIN_WAIT2 => side::ESTABLISHED | side::FINISHED | side::ACKNOWLEDGED,
        _ => side::ESTABLISHED,
    };
    let Some(side) = side(ctx, cookie) else { return };
    maps::look(cookie, now);
    // SAFETY: the entry is live.
    unsafe { tell(ctx, &side, state) };
}

/// Writes this side's part of the entry. `state`: bits of [`side`].
///
/// # Safety
/// The entry is live.
#[inline(always)]
unsafe fn tell(ctx: &SockOpsContext, side: &Side, state: u32) {
    let entry = side.entry;
    // SAFETY: the caller's promise; each side writes its own fields alone. The kernel gives a valid context.
    unsafe {
        let acknowledged = address::load_u64::<{ offset_of!(bpf_sock_ops, bytes_acked) }, _>(ctx.ops);
        // TCP counts SYN and FIN as a byte each; the SYN only of the side that connected.
        let syn = u64::from(side.end == End::Source && state & side::ESTABLISHED != 0);
        let fin = u64::from(state & side::ACKNOWLEDGED != 0);
        let bytes = acknowledged.saturating_sub(syn + fin);
        let rtt = word!(ctx.ops, bpf_sock_ops, srtt_us) >> SRTT_SHIFT;
        let retransmissions = word!(ctx.ops, bpf_sock_ops, total_retrans);
        if side.end == End::Source {
            (*entry).sent = bytes;
            (*entry).source_rtt_us = rtt;
            (*entry).source_retransmissions = retransmissions;
            (*entry).source_state = state;
        } else {
            (*entry).received = bytes;
            (*entry).destination_rtt_us = rtt;
            (*entry).destination_retransmissions = retransmissions;
            (*entry).destination_state = state;
        }
    }
}

/// Notes that this side is closed. Whether nobody will tell any more: both sides are, or it is the source's and the
/// destination never took the connection.
///
/// The sides may close at once, on two processors. Each adds to one number and then reads it, so the one that adds last sees
/// both; two flags of their own could each be read before the other was written, and the entry would stay for ever.
///
/// # Safety
/// `entry` is a live entry of the map.
#[inline(always)]
unsafe fn is_last(entry: *mut Attestation, of: End) -> bool {
    // SAFETY: the caller's promise. Volatile, as the compiler does not see what the addition does.
    unsafe {
        add_one(&raw mut (*entry).closed);
        let both = (&raw const (*entry).closed).read_volatile() >= 2;
        both || of == End::Source && (&raw const (*entry).destination_state).read_volatile() & side::ESTABLISHED == 0
    }
}

/// Adds one to a number that the other side's program may be adding to, too.
///
/// # Safety
/// A live, aligned number.
#[inline(always)]
unsafe fn add_one(place: *mut u32) {
    // SAFETY: the caller's promise; `core` offers no atomic addition for this target.
    unsafe {
        asm!("lock *(u32 *)({place} + 0) += {one}", place = in(reg) place, one = in(reg) 1_u64, options(nostack));
    }
}

/// Copies word by word: left to itself, the compiler copies addresses octet by octet.
///
/// # Safety
/// Both are live, of whole words and aligned to them, and don't overlap.
#[inline(always)]
unsafe fn copy<T>(from: *const T, to: *mut T) {
    let words = size_of::<T>() / size_of::<u32>();
    let mut at = 0;
    while at < words {
        // SAFETY: the caller's promise. Volatile, or the loop would become a call of `memcpy`.
        unsafe { to.cast::<u32>().add(at).write_volatile(from.cast::<u32>().add(at).read_volatile()) };
        at += 1;
    }
}

/// Takes the entry out and tells of it. Of two sides that close at once, the one that takes it out does.
///
/// # Safety
/// `entry` is the live entry of `tuple`.
#[inline(always)]
unsafe fn finish(tuple: &Tuple, entry: *mut Attestation) {
    // SAFETY: the helper takes nothing; the entry is live until it is removed below.
    unsafe {
        let Some(mut record) = maps::EVENTS.reserve::<Ended>(0) else {
            if maps::ATTESTED.remove(tuple).is_ok() {
                maps::count(offset_of!(PodCounts, events_lost));
            }
            return;
        };
        let place = record.as_mut_ptr();
        copy(ptr::from_ref(tuple), &raw mut (*place).tuple);
        copy(entry.cast_const(), &raw mut (*place).attestation);
        (*place).closed = bpf_ktime_get_ns();
        if maps::ATTESTED.remove(tuple).is_err() {
            return record.discard(u64::from(BPF_RB_NO_WAKEUP));
        }
        // The reader comes by itself; it is called only where the ring fills faster than that.
        let crowded = maps::EVENTS.query(RING_UNREAD) > u64::from(EVENTS_BYTES / 4);
        record.submit(u64::from(if crowded { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP }));
    }
}
