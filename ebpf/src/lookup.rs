//! `sk_lookup`: decides, in the pod's netns, which socket answers a new TCP connection.
//!
//! Second on the journey and last before the app: the agent's listener, the app, or nobody. It decides by addresses
//! alone. It must never give the app a connection from outside that nobody vouched for, unless the pod's annotation
//! says so while no agent is there, and never give anybody the listener's own port.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::{
        bpf_sk_lookup,
        sk_action::{SK_DROP, SK_PASS},
    },
    programs::SkLookupContext,
};
use aya_log_ebpf::warn;
use heddle_common::{LISTENER_PORT, PodCounts, Tuple, attested_by, side, verdict};

use crate::{
    address::{self, Ip, word, words},
    maps,
};

const ENOENT: i32 = 2;

#[inline(always)]
pub fn lookup(ctx: &SkLookupContext) -> u32 {
    let raw = ctx.lookup;
    // SAFETY: the kernel gives a valid context.
    if unsafe { word!(raw, bpf_sk_lookup, protocol) } != address::IPPROTO_TCP {
        return SK_PASS;
    }
    // SAFETY: as above.
    let (source, destination) = match unsafe { word!(raw, bpf_sk_lookup, family) } {
        // SAFETY: as above.
        address::AF_INET => unsafe {
            (Ip::v4(word!(raw, bpf_sk_lookup, remote_ip4)), Ip::v4(word!(raw, bpf_sk_lookup, local_ip4)))
        },
        // SAFETY: as above.
        address::AF_INET6 => unsafe {
            (Ip::v6(words!(raw, bpf_sk_lookup, remote_ip6)), Ip::v6(words!(raw, bpf_sk_lookup, local_ip6)))
        },
        _ => return SK_PASS,
    };
    // SAFETY: as above. The source port is in network order, in the lower half of its word; the destination port is in
    // host order.
    let (source_port, destination_port) = unsafe {
        (u16::from_be(word!(raw, bpf_sk_lookup, remote_port) as u16), word!(raw, bpf_sk_lookup, local_port) as u16)
    };

    let loopback = destination.is_loopback();
    let own = maps::is_own(destination);
    if (loopback || own) && destination_port == LISTENER_PORT {
        maps::count(offset_of!(PodCounts, direct));
        return SK_DROP;
    }
    if loopback {
        return SK_PASS;
    }
    if own {
        match attested(&Tuple {
            source: source.address(),
            destination: destination.address(),
            source_port,
            destination_port,
            padding: 0,
        }) {
            Attested::Yes => {
                maps::count(offset_of!(PodCounts, attested));
                return SK_PASS;
            }
            Attested::Denied => {
                maps::count(offset_of!(PodCounts, lane_denied));
                return SK_DROP;
            }
            Attested::Probe => {
                maps::count(offset_of!(PodCounts, probes));
                return SK_PASS;
            }
            Attested::Undecided => {}
            Attested::No if source.is_loopback() || maps::is_own(source) => return SK_PASS,
            Attested::No => {}
        }
    }
    hand_over(ctx, destination, own)
}

/// What is known of a connection to the pod.
enum Attested {
    /// Someone vouched for it, and policy lets it in.
    Yes,
    /// Of a pod of this node that policy does not let in.
    Denied,
    /// The kubelet probes one of the pod's probe ports.
    Probe,
    /// Of a pod of this node, and its verdict is being decided anew: the agent knows who it is.
    Undecided,
    No,
}

/// An entry that a former owner of the address left behind names another slot or workload and counts for nothing; so does
/// that of a connection whose handshake is over.
#[inline(always)]
fn attested(tuple: &Tuple) -> Attested {
    let Some(entry) = maps::ATTESTED.get_ptr(tuple) else { return Attested::No };
    // SAFETY: a live entry of the map; integers are copied.
    let (by, slot, source, destination, state) =
        unsafe { ((*entry).by, (*entry).slot, (*entry).source, (*entry).destination, (*entry).destination_state) };
    match by {
        attested_by::AGENT if slot == maps::slot() => Attested::Yes,
        attested_by::KERNEL if destination == maps::workload() && state & side::ESTABLISHED == 0 => {
            match maps::verdict(source, destination, tuple.destination_port) {
                Some(found) if found.action == verdict::ALLOW => Attested::Yes,
                Some(found) if found.action == verdict::DENY => {
                    maps::count_denial(found.counter);
                    // Told of as denied, it is not to be told of as refused when its socket closes.
                    let _gone_already = maps::ATTESTED.remove(tuple);
                    Attested::Denied
                }
                _ => Attested::Undecided,
            }
        }
        attested_by::KUBELET
            if destination == maps::workload()
                && state & side::ESTABLISHED == 0
                && maps::is_probe_port(destination, tuple.destination_port) =>
        {
            Attested::Probe
        }
        _ => Attested::No,
    }
}

/// Gives the connection to the agent's listener.
#[inline(always)]
fn hand_over(ctx: &SkLookupContext, destination: Ip, inbound: bool) -> u32 {
    match maps::LISTENERS.redirect_sk_lookup(ctx, maps::slot(), 0) {
        Ok(()) => {
            maps::count(offset_of!(PodCounts, captured));
            SK_PASS
        }
        // Only an inbound connection may pass: an outbound one that lost its agent between connect() and here has come
        // back to the pod itself, where a wildcard listener of the app would answer in the destination's name.
        Err(error) if error == -ENOENT && inbound && maps::open_when_unattended() => {
            maps::count(offset_of!(PodCounts, unattended_passed));
            SK_PASS
        }
        Err(error) => {
            maps::count(offset_of!(PodCounts, unattended_dropped));
            if error != -ENOENT {
                warn!(ctx, "slot {}: listener refused for {:i}: {}", maps::slot(), destination.address().octets, error);
            }
            SK_DROP
        }
    }
}
