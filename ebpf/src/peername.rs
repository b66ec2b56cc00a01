//! `getpeername()`: an app that connected to a Service is told the Service's address, whichever pod the kernel chose.
//!
//! Beside the journey, in the context of the app's own system call. It changes nothing but the answer.

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};

use crate::{
    address::{Ip, set_word, set_words},
    lane, maps,
};

/// Verdict of a `cgroup/getpeername` program; there is no other.
const PROCEED: i32 = 1;

#[inline(always)]
pub fn ipv4(ctx: &SockAddrContext) -> i32 {
    if let Some((address, port)) = service(ctx) {
        let [_, _, _, word] = address.words();
        // SAFETY: the kernel gives a valid context, whose address a getpeername program may write.
        unsafe {
            set_word!(ctx.sock_addr, bpf_sock_addr, user_ip4, word);
            set_word!(ctx.sock_addr, bpf_sock_addr, user_port, port);
        }
    }
    PROCEED
}

#[inline(always)]
pub fn ipv6(ctx: &SockAddrContext) -> i32 {
    if let Some((address, port)) = service(ctx) {
        // SAFETY: the kernel gives a valid context, whose address a getpeername program may write.
        unsafe {
            set_words!(ctx.sock_addr, bpf_sock_addr, user_ip6, address.words());
            set_word!(ctx.sock_addr, bpf_sock_addr, user_port, port);
        }
    }
    PROCEED
}

/// What the app connected to, and the port as a context has it.
#[inline(always)]
fn service(ctx: &SockAddrContext) -> Option<(Ip, u32)> {
    // SAFETY: the kernel gives a valid context with a full socket; the storage is this socket's.
    unsafe {
        let asked = maps::asked(lane::socket(ctx));
        if asked.is_null() || (*asked).port == 0 {
            return None;
        }
        Some((Ip::from_place(&raw const (*asked).service), u32::from((*asked).port.to_be())))
    }
}
