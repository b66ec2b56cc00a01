//! `connect()`: sends a pod's TCP connection to a mesh destination onto the kernel lane, or marks it, so that the pod's
//! local route brings it to the agent.
//!
//! First on the journey, in the context of the app's own system call. What is no mesh destination is left alone. A mesh
//! connection that can't be marked, or that no agent would answer, is refused with EPERM; it must never go out plainly
//! unless the pod's annotation says so while no agent is there.

use core::{ffi::c_void, mem::offset_of};

use aya_ebpf::{
    EbpfContext,
    bindings::{SO_BINDTODEVICE, SO_MARK, bpf_sock_addr},
    helpers::bpf_setsockopt,
    programs::SockAddrContext,
};
use aya_log_ebpf::warn;
use heddle_common::{MARK, PodCounts, choice};

use crate::{
    address::{self, Ip, word, words},
    datagram,
    lane::{self, Way},
    maps,
};

/// Verdicts of a `cgroup/connect` program.
const PROCEED: i32 = 1;
const REFUSE: i32 = 0;

const SOL_SOCKET: i32 = 1;

#[inline(always)]
pub fn ipv4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context.
    connect(ctx, Ip::v4(unsafe { word!(ctx.sock_addr, bpf_sock_addr, user_ip4) }), false)
}

#[inline(always)]
pub fn ipv6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context.
    connect(ctx, Ip::v6(unsafe { words!(ctx.sock_addr, bpf_sock_addr, user_ip6) }), true)
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, destination: Ip, v6: bool) -> i32 {
    // SAFETY: the kernel gives a valid context.
    let protocol = unsafe { word!(ctx.sock_addr, bpf_sock_addr, protocol) };
    if protocol != address::IPPROTO_TCP && protocol != address::IPPROTO_MPTCP {
        if protocol == address::IPPROTO_UDP {
            datagram::connected(destination);
        }
        return PROCEED;
    }
    lane::forget(ctx);
    if destination.is_loopback() || maps::is_own(destination) || !maps::is_destination(destination) {
        return PROCEED;
    }
    // The subflows of an MPTCP socket are made later, without this hook: they are the agent's.
    let way = if protocol == address::IPPROTO_TCP { lane::way(ctx, destination, v6) } else { Way::Agent(choice::NONE) };
    let choice = match way {
        Way::Lane => return PROCEED,
        Way::Denied => return REFUSE,
        Way::Agent(choice) => choice,
    };
    if !maps::attended() {
        // Marked, it would wait for an answer that never comes: the kernel sends no reset from an address that is not
        // the pod's. So it is refused here, or left alone as an open pod's annotation asks.
        if maps::open_when_unattended() {
            maps::count(offset_of!(PodCounts, unattended_passed));
            return PROCEED;
        }
        maps::count(offset_of!(PodCounts, unattended_dropped));
        return REFUSE;
    }
    match steer(ctx, choice) {
        Ok(()) => {
            maps::count(offset_of!(PodCounts, marked));
            PROCEED
        }
        Err(error) => {
            maps::count(offset_of!(PodCounts, unmarkable));
            let [high, low] = destination.halves();
            report_unmarkable(high, low, error);
            REFUSE
        }
    }
}

/// Makes the local route the socket's only way: a socket that is bound to a device would never match a route to `lo`.
#[inline(always)]
fn steer(ctx: &SockAddrContext, choice: u16) -> Result<(), i64> {
    // SAFETY: the kernel gives a valid context; the socket of a connect() is a full one.
    let bound = unsafe { (*(*ctx.sock_addr).__bindgen_anon_1.sk).bound_dev_if };
    if bound != 0 {
        // An empty name unbinds. Linux 5.10 looks at the name only, later kernels also at its length.
        set(ctx, SO_BINDTODEVICE as i32, 0)?;
    }
    set(ctx, SO_MARK as i32, MARK | u32::from(choice) << 16)
}

/// Sets an option of `SOL_SOCKET`.
#[inline(always)]
pub fn set(ctx: &SockAddrContext, option: i32, mut value: u32) -> Result<(), i64> {
    // SAFETY: `value` lives on this stack for the call.
    match unsafe {
        bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, option, (&raw mut value).cast::<c_void>(), size_of::<u32>() as i32)
    } {
        0 => Ok(()),
        error => Err(error),
    }
}

/// Tells the agent of a refused connection. A function of its own, so that the path of every other connection stays
/// short; a global one by its fixed name, so that the object has no name that depends on where it was built. The
/// verifier checks it by its signature: numbers in, a number out.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn report_unmarkable(high: u64, low: u64, error: i64) -> i32 {
    let destination = Ip::from_halves([high, low]).address();
    warn!((), "slot {}: connect to {:i} refused, it can't be marked: {}", maps::slot(), destination.octets, error);
    0
}
