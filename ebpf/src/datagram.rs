//! UDP, which the mesh does not carry: counts what a pod sends past it, so that nobody takes it for protected.
//!
//! Beside the journey. A connected socket is counted once, in `connect()`; on any other each datagram is, as it has its
//! destination in `sendmsg()`. Nothing is ever refused or changed, and no program runs for a packet.

use core::mem::offset_of;

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use heddle_common::PodCounts;

use crate::{
    address::{Ip, word, words},
    maps,
};

/// Verdict of a `cgroup/sendmsg` program.
const PROCEED: i32 = 1;

#[inline(always)]
pub fn ipv4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context.
    sent(Ip::v4(unsafe { word!(ctx.sock_addr, bpf_sock_addr, user_ip4) }))
}

#[inline(always)]
pub fn ipv6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context.
    sent(Ip::v6(unsafe { words!(ctx.sock_addr, bpf_sock_addr, user_ip6) }))
}

/// Only UDP sockets run this hook, and only for a datagram that names its destination.
#[inline(always)]
fn sent(destination: Ip) -> i32 {
    count(destination, offset_of!(PodCounts, udp_datagrams));
    PROCEED
}

/// A UDP socket was connected.
#[inline(always)]
pub fn connected(destination: Ip) {
    count(destination, offset_of!(PodCounts, udp_connects));
}

#[inline(always)]
fn count(destination: Ip, field: usize) {
    if !destination.is_loopback() && !maps::is_own(destination) {
        maps::count(field);
    }
}
