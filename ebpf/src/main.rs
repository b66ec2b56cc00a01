//! The kernel side: one file per hook, named for what it does to traffic.
//!
//! One instance of these programs exists per pod, with the pod's slot and addresses as read-only data, and one of `kubelet` on
//! the kubelet's cgroup. They use UAPI
//! contexts and helpers only, nothing newer than Linux 5.10, so one object serves every kernel on every little-endian
//! architecture. They must never let a mesh connection go on plainly because something failed: what can't be steered is
//! refused.
//!
//! Stable Rust has no BPF target: there this is an empty program, and the agent embeds `ebpf/object/heddle.bpf.o`,
//! which `cargo xtask ebpf` builds.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod address;
#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod datagram;
#[cfg(target_arch = "bpf")]
mod kubelet;
#[cfg(target_arch = "bpf")]
mod lane;
#[cfg(target_arch = "bpf")]
mod lookup;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod observe;
#[cfg(target_arch = "bpf")]
mod peername;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// The entry points: their names are [`heddle_common::programs`].
#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        macros::{cgroup_sock_addr, sk_lookup, sock_ops},
        programs::{SkLookupContext, SockAddrContext, SockOpsContext},
    };

    use crate::{connect, datagram, kubelet, lookup, observe, peername};

    #[cgroup_sock_addr(connect4)]
    pub fn connect4(ctx: SockAddrContext) -> i32 {
        connect::ipv4(&ctx)
    }

    #[cgroup_sock_addr(connect6)]
    pub fn connect6(ctx: SockAddrContext) -> i32 {
        connect::ipv6(&ctx)
    }

    #[cgroup_sock_addr(sendmsg4)]
    pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
        datagram::ipv4(&ctx)
    }

    #[cgroup_sock_addr(sendmsg6)]
    pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
        datagram::ipv6(&ctx)
    }

    #[cgroup_sock_addr(getpeername4)]
    pub fn peername4(ctx: SockAddrContext) -> i32 {
        peername::ipv4(&ctx)
    }

    #[cgroup_sock_addr(getpeername6)]
    pub fn peername6(ctx: SockAddrContext) -> i32 {
        peername::ipv6(&ctx)
    }

    #[sock_ops]
    pub fn observe(ctx: SockOpsContext) -> u32 {
        observe::observe(&ctx)
    }

    #[cgroup_sock_addr(connect4)]
    pub fn kubelet4(ctx: SockAddrContext) -> i32 {
        kubelet::ipv4(&ctx)
    }

    #[cgroup_sock_addr(connect6)]
    pub fn kubelet6(ctx: SockAddrContext) -> i32 {
        kubelet::ipv6(&ctx)
    }

    #[sock_ops]
    pub fn kubelet(ctx: SockOpsContext) -> u32 {
        kubelet::vouch(&ctx)
    }

    #[sk_lookup]
    pub fn lookup(ctx: SkLookupContext) -> u32 {
        lookup::lookup(&ctx)
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        // No panic is reachable in these programs; were one, the verifier would refuse the endless loop.
        loop {}
    }

    /// The kernel gives some helpers only to programs under a GPL-compatible licence; ring buffers and maps are among
    /// them.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}
