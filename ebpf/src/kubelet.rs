//! The kubelet's probes: vouches for the kubelet's connections to probe ports of enrolled pods before their SYN leaves.
//!
//! Beside the journey, on the kubelet's own cgroup. It must never vouch for a task of a cgroup below it, for another netns than
//! the host's, nor for a port that no probe of the pod's spec names; and what it vouched for goes with the socket.
//! It refuses nothing: a connection that it does not know is what it would be without heddle, one of nobody.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_ANY, BPF_NOEXIST, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE, bpf_sock_addr, bpf_sock_ops,
    },
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns,
        bpf_sock_ops_cb_flags_set,
    },
    programs::{SockAddrContext, SockOpsContext},
};
use heddle_common::{Attestation, Resident, Tuple, attested_by};

use crate::{
    address::{self, Ip, word, words},
    maps,
    observe::{End, PROCEED, tuple},
};

#[inline(always)]
pub fn ipv4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context.
    connect(ctx, Ip::v4(unsafe { word!(ctx.sock_addr, bpf_sock_addr, user_ip4) }));
    PROCEED as i32
}

#[inline(always)]
pub fn ipv6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context.
    connect(ctx, Ip::v6(unsafe { words!(ctx.sock_addr, bpf_sock_addr, user_ip6) }));
    PROCEED as i32
}

/// Notes a socket that the kubelet itself connects to a probe port. Who connects is asked here, in the context of its system
/// call: `sockops` can't tell.
#[inline(always)]
fn connect(ctx: &SockAddrContext, destination: Ip) {
    // SAFETY: the kernel gives a valid context. The port is in network order, in the lower half of its word.
    let (protocol, port) = unsafe {
        let port = word!(ctx.sock_addr, bpf_sock_addr, user_port);
        (word!(ctx.sock_addr, bpf_sock_addr, protocol), u16::from_be(port as u16))
    };
    if protocol != address::IPPROTO_TCP {
        return;
    }
    // SAFETY: the helper takes the context that the kernel gave.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // An earlier connect() of this socket may have left it there.
    let _earlier = maps::take_probe(cookie);
    let (cgroup, netns) = maps::kubelet();
    // SAFETY: the helper takes nothing.
    if cgroup == 0 || unsafe { bpf_get_current_cgroup_id() } != cgroup {
        return;
    }
    // SAFETY: the helper takes the context that the kernel gave.
    if netns != 0 && unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != netns {
        return;
    }
    // SAFETY: the agent replaces entries whole and never changes them in place; integers are copied.
    let Some(&Resident { workload, .. }) = (unsafe { maps::RESIDENTS.get(destination.address()) }) else { return };
    if maps::is_probe_port(workload, port) {
        maps::probe(cookie);
    }
}

#[inline(always)]
pub fn vouch(ctx: &SockOpsContext) -> u32 {
    // SAFETY: the kernel gives a valid context.
    match unsafe { word!(ctx.ops, bpf_sock_ops, op) } {
        BPF_SOCK_OPS_TCP_CONNECT_CB => opens(ctx),
        BPF_SOCK_OPS_STATE_CB => changes(ctx),
        _ => {}
    }
    PROCEED
}

/// The kubelet's socket is about to send its SYN: vouches for it.
#[inline(always)]
fn opens(ctx: &SockOpsContext) {
    // SAFETY: the helper takes the context that the kernel gave.
    let id = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if !maps::take_probe(id) {
        return;
    }
    let tuple = tuple(ctx, End::Source);
    // SAFETY: the agent replaces entries whole and never changes them in place; integers are copied.
    let Some(&Resident { workload, slot, .. }) = (unsafe { maps::RESIDENTS.get(tuple.destination) }) else { return };
    // No pod's address is the host's: whoever connects from one is not to be told from that pod.
    if maps::RESIDENTS.get_ptr(tuple.source).is_some() || !maps::is_probe_port(workload, tuple.destination_port) {
        return;
    }
    // What is vouched for must not outlive the socket, so without this callback nothing is.
    // SAFETY: the kernel gives a valid context.
    let told = unsafe {
        let flags = word!(ctx.ops, bpf_sock_ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
        bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32)
    };
    if told != 0 {
        return;
    }
    let (cgroup, _) = maps::kubelet();
    // SAFETY: the helper takes nothing.
    let opened = unsafe { bpf_ktime_get_ns() };
    let mut attestation = Attestation::by_agent(slot);
    attestation.by = attested_by::KUBELET;
    attestation.source = cgroup;
    attestation.destination = workload;
    attestation.id = id;
    attestation.opened = opened;
    attest(&tuple, &attestation);
}

/// Makes the entry. One of an earlier socket of the kubelet's is over, as the kernel gave the port to this one; anybody else's stays.
#[inline(always)]
fn attest(tuple: &Tuple, attestation: &Attestation) {
    if maps::ATTESTED.insert(tuple, attestation, u64::from(BPF_NOEXIST)).is_ok() {
        return;
    }
    let Some(earlier) = maps::ATTESTED.get_ptr(tuple) else { return };
    // SAFETY: a live entry of the map.
    if unsafe { (*earlier).by } == attested_by::KUBELET {
        // Where there is no room, the probe is a connection of nobody.
        let _no_room = maps::ATTESTED.insert(tuple, attestation, u64::from(BPF_ANY));
    }
}

/// The kubelet's socket goes on to another state: only its end is of interest.
#[inline(always)]
fn changes(ctx: &SockOpsContext) {
    // SAFETY: the kernel gives a valid context, with the old and the new state.
    let [_, new, ..] = unsafe { words!(ctx.ops, bpf_sock_ops, __bindgen_anon_1) };
    if new != BPF_TCP_CLOSE {
        return;
    }
    let tuple = tuple(ctx, End::Source);
    let Some(entry) = maps::ATTESTED.get_ptr(tuple) else { return };
    // SAFETY: the helper takes the context that the kernel gave; a live entry of the map.
    if unsafe { (*entry).by == attested_by::KUBELET && (*entry).id == bpf_get_socket_cookie(ctx.as_ptr()) } {
        let _gone_already = maps::ATTESTED.remove(tuple);
    }
}
