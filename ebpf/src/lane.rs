//! The kernel lane: which connections to a pod of this node go there without the agent.
//!
//! A part of `connect()`, in the context of the app's own system call. It never lets a connection onto the lane without
//! the policy engine's verdict for this very pair of pods and port, nor one of a socket that is not in the pod's own
//! netns: who connects is what the kernel knows of the socket. Whatever else it can't say yes or no to is the agent's.

use core::mem::offset_of;

use aya_ebpf::{
    EbpfContext,
    bindings::{SO_MARK, bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie},
    programs::SockAddrContext,
};
use heddle_common::{LocalEndpoints, MARK, MARK_MASK, PodCounts, Resident, ServicePort, choice, verdict};

use crate::{
    address::{Ip, set_word, set_words, word, words},
    connect, maps,
};

/// Where a connection to a mesh destination goes.
pub enum Way {
    /// Straight to the pod; the destination is set.
    Lane,
    /// Nowhere: policy says no.
    Denied,
    /// To the agent, with what was chosen of a Service.
    Agent(u16),
}

/// A pod's address and port.
struct Target {
    address: Ip,
    port: u16,
    /// Which endpoint of a Service it is, as the agent would be told.
    choice: u16,
}

/// Forgets what an earlier connect() of this socket left.
#[inline(always)]
pub fn forget(ctx: &SockAddrContext) {
    // SAFETY: the helper takes the context that the kernel gave, whose socket, that of a connect(), is a full one.
    unsafe {
        let _admitted = maps::take_admission(bpf_get_socket_cookie(ctx.as_ptr()));
        let asked = maps::asked(socket(ctx));
        if !asked.is_null() {
            (*asked).port = 0;
        }
    }
}

/// Decides, and prepares the socket for the lane. `v6`: the context is one of IPv6.
#[inline(always)]
pub fn way(ctx: &SockAddrContext, destination: Ip, v6: bool) -> Way {
    // SAFETY: the kernel gives a valid context. The port is in network order, in the lower half of its word.
    let port = u16::from_be(unsafe { word!(ctx.sock_addr, bpf_sock_addr, user_port) } as u16);
    let target = match choose(destination, port) {
        Ok(target) => target,
        Err(choice) => return Way::Agent(choice),
    };
    // SAFETY: the agent replaces entries whole and never changes them in place; integers are copied.
    let Some(&Resident { workload, .. }) = (unsafe { maps::RESIDENTS.get(target.address.address()) }) else {
        return Way::Agent(target.choice);
    };
    if workload == maps::workload() || !is_the_pods(ctx, v6) {
        return Way::Agent(target.choice);
    }
    match maps::verdict(maps::workload(), workload, target.port) {
        Some(found) if found.action == verdict::ALLOW => {}
        Some(found) if found.action == verdict::DENY => {
            maps::count_denial(found.counter);
            maps::count(offset_of!(PodCounts, lane_denied));
            return Way::Denied;
        }
        _ => {
            maps::count(offset_of!(PodCounts, lane_missed));
            return Way::Agent(target.choice);
        }
    }
    if !unmark(ctx) {
        return Way::Agent(target.choice);
    }
    if target.choice != choice::NONE {
        // SAFETY: the kernel gives a valid context; the socket of a connect() is a full one. What the storage holds is this
        // socket's alone, which the caller holds locked.
        unsafe {
            let asked = maps::make_asked(socket(ctx));
            if asked.is_null() {
                return Way::Agent(target.choice);
            }
            (*asked).service = destination.address();
            (*asked).port = port;
        }
        redirect(ctx, &target, v6);
    }
    // SAFETY: the helper takes the context that the kernel gave.
    maps::admit(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
    maps::count(offset_of!(PodCounts, lane));
    Way::Lane
}

/// The pod that is meant: the destination, or an endpoint of the Service that it is. `Err`: what to tell the agent, which
/// chooses.
#[inline(always)]
fn choose(destination: Ip, port: u16) -> Result<Target, u16> {
    let service = ServicePort { address: destination.address(), port, padding: 0 };
    // SAFETY: the agent replaces entries whole and never changes them in place.
    let Some(endpoints) = (unsafe { maps::SERVICES.get(service) }) else {
        return Ok(Target { address: destination, port, choice: choice::NONE });
    };
    if endpoints.total == 0 {
        return Err(choice::NONE);
    }
    // SAFETY: the helper only makes a number.
    let at = unsafe { bpf_get_prandom_u32() } % endpoints.total;
    if at >= endpoints.local {
        return Err(choice::REST);
    }
    let index = at as usize;
    if index >= LocalEndpoints::MAX {
        return Err(choice::NONE);
    }
    let chosen = &endpoints.endpoints[index];
    Ok(Target {
        // SAFETY: a live entry of the map, whose endpoints are aligned to a word.
        address: unsafe { Ip::from_place(&raw const chosen.address) },
        port: chosen.port,
        choice: choice::FIRST_LOCAL + index as u16,
    })
}

/// Whether the socket is one of the pod's netns and, where it is bound, of the pod's address and of no device: the way that was
/// measured is that of the pod's routes. A process of the pod may have made a netns of its own, with any address.
#[inline(always)]
fn is_the_pods(ctx: &SockAddrContext, v6: bool) -> bool {
    let netns = maps::netns();
    // SAFETY: the kernel gives a valid context.
    if netns == 0 || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != netns {
        return false;
    }
    // SAFETY: as above; the socket of a connect() is a full one.
    if unsafe { word!(socket(ctx), bpf_sock, bound_dev_if) } != 0 {
        return false;
    }
    // SAFETY: as above.
    let source = unsafe {
        let socket = socket(ctx);
        if v6 { Ip::v6(words!(socket, bpf_sock, src_ip6)) } else { Ip::v4(word!(socket, bpf_sock, src_ip4)) }
    };
    source.is_unspecified() || maps::is_own(source)
}

/// Takes the mark off that an earlier connect() of this socket set: it would lead to the agent. Any other mark is the app's.
#[inline(always)]
fn unmark(ctx: &SockAddrContext) -> bool {
    // SAFETY: the kernel gives a valid context; the socket of a connect() is a full one.
    let mark = unsafe { word!(socket(ctx), bpf_sock, mark) };
    mark & MARK_MASK != MARK || connect::set(ctx, SO_MARK as i32, 0).is_ok()
}

/// Sends the connection to the endpoint of a Service.
#[inline(always)]
fn redirect(ctx: &SockAddrContext, target: &Target, v6: bool) {
    let [a, b, c, d] = target.address.words();
    // SAFETY: the kernel gives a valid context, whose destination a connect program may write.
    unsafe {
        if v6 {
            set_words!(ctx.sock_addr, bpf_sock_addr, user_ip6, [a, b, c, d]);
        } else {
            set_word!(ctx.sock_addr, bpf_sock_addr, user_ip4, d);
        }
        set_word!(ctx.sock_addr, bpf_sock_addr, user_port, u32::from(target.port.to_be()));
    }
}

/// The socket of a context.
///
/// # Safety
/// The kernel gave the context.
#[inline(always)]
pub unsafe fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the caller's promise.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}
