//! The only types that kernel and userspace both see.
//!
//! Integers only, explicit padding, layout asserted at compile time in both builds. Any change of a layout, a map's
//! key or value, or a map's name raises [`LAYOUT_VERSION`]: the pins of one version live in a folder of their own, so
//! an agent never reads another version's maps.
//!
//! What the programs rely on the agent for:
//!
//! - **Order of enrolment**: gate and destinations, then routes and rules, then the listener into `LISTENERS`, then
//!   `lookup`, then `connect4` and `connect6`. With `connect` attached and the slot empty, connections to mesh
//!   destinations are refused (EPERM), or left plain for a pod with [`gate::OPEN_WHEN_UNATTENDED`].
//! - **Presence is the slot**: an agent serves a pod exactly while a listening socket is in its `LISTENERS` slot. The
//!   kernel empties the slot when the last descriptor of that listener closes, so a crash needs no clean-up and there
//!   is no heartbeat. A hand-over passes the descriptors on, or puts the new listener into the slot before the old one
//!   closes.
//! - **`COUNTS` is for a slot's whole life**: write zeroes for every CPU before a slot is given to another pod.
//! - **`AYA_LOGS` is shared**: the loader pins it beside the other maps (`map_pin_path`), one reader serves all pods.
//! - **Marked packets never leave**: besides the local route, [`ROUTE_TABLE`] holds an `unreachable default` of higher
//!   metric, so that a marked packet which finds no `lo` route is refused and does not fall through to the main table.
//!   A socket that is bound to a device escapes both; `connect` unbinds it, or refuses where the app may not unbind.
//! - **Outbound or not is for the agent to check**: the listener also gets a connection to an address that is neither
//!   the pod's own nor a mesh destination (another interface's). Only a known destination may be dialled, else it
//!   would dial itself.
#![no_std]

use core::mem::{align_of, offset_of, size_of};

/// Version of every layout in this file; part of the bpffs path (`…/v2`).
pub const LAYOUT_VERSION: u32 = 2;

/// Port of the agent's listener in each pod's netns. Nothing may address it directly.
pub const LISTENER_PORT: u16 = 15_001;
/// Port on which a pod receives HBONE.
pub const HBONE_PORT: u16 = 15_008;

/// Mark of sockets whose packets take the pod's local route to `lo`: set by `connect` on captured connections, by the
/// agent on delivery sockets, inherited by the app's accepted sockets (`tcp_fwmark_accept`). Not a security boundary:
/// nothing is exempted or authenticated by it.
pub const MARK: u32 = 0x6865;
/// Routing table and rule preference in the pod's netns that send marked packets to `lo`.
pub const ROUTE_TABLE: u32 = 0x6865;
pub const RULE_PREFERENCE: u32 = 30_865;

/// Most pods that one agent can enrol at a time: slots in [`PodGate`] arrays and in the listener map.
pub const MAX_PODS: u32 = 1_024;
/// Most mesh addresses (pods and Services, each family counted) that a node can know.
pub const MAX_DESTINATIONS: u32 = 262_144;
/// Most connections that may be attested at a time.
pub const MAX_ATTESTED: u32 = 65_536;

/// Names of the pinned maps, the same in the object file, in bpffs and in the agent.
pub mod maps {
    pub const DESTINATIONS: &str = "DESTINATIONS";
    pub const ATTESTED: &str = "ATTESTED";
    pub const LISTENERS: &str = "LISTENERS";
    pub const GATES: &str = "GATES";
    pub const COUNTS: &str = "COUNTS";
    /// Ring of the programs' log records, defined by aya-log-ebpf; not pinned by name in the object.
    pub const LOGS: &str = "AYA_LOGS";
}

/// Names of the programs in the object file; also the names of their pinned links under `pods/<uid>/`.
pub mod programs {
    pub const CONNECT4: &str = "connect4";
    pub const CONNECT6: &str = "connect6";
    pub const LOOKUP: &str = "lookup";
    pub const SENDMSG4: &str = "sendmsg4";
    pub const SENDMSG6: &str = "sendmsg6";
}

/// Names of the read-only globals that make one instance of the programs per pod.
pub mod globals {
    pub const POD: &str = "POD";
    /// Most detailed level that is logged, `u8`, defined by aya-log-ebpf: 0 nothing, 1 error, 2 warn. At 0 the verifier
    /// removes the logging code; without an override everything is logged.
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
}

/// An IP address, 16 bytes in network order; IPv4 as `::ffff:a.b.c.d`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub octets: [u8; 16],
}

impl Address {
    /// From four octets in network order.
    #[must_use]
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self { octets: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] }
    }

    /// From sixteen octets in network order; a v4-mapped address is the same key as its IPv4 address.
    #[must_use]
    pub const fn v6(octets: [u8; 16]) -> Self {
        Self { octets }
    }
}

/// What is known of a mesh destination: value of the `DESTINATIONS` map. Presence alone means *captured*.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Generation of the agent's destination set that wrote the entry; lets a restarted agent sweep stale entries.
    pub generation: u64,
}

/// A connection as its destination sees it, ports in host order: key of the `ATTESTED` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub source: Address,
    pub destination: Address,
    pub source_port: u16,
    pub destination_port: u16,
    pub padding: u32,
}

/// Who vouched for a connection: value of the `ATTESTED` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attestation {
    /// Slot of the pod that the connection is for; an entry of another slot is ignored.
    pub slot: u32,
    /// One of [`attested_by`].
    pub by: u32,
}

/// Values of [`Attestation::by`].
pub mod attested_by {
    /// Delivery by the agent, after policy.
    pub const AGENT: u32 = 1;
}

/// Read-only data of one pod's programs: the pod's slot and its own addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Index into `LISTENERS`, `GATES` and `COUNTS`.
    pub slot: u32,
    /// How many of `addresses` are used.
    pub addresses_used: u32,
    /// The pod's own addresses.
    pub addresses: [Address; Pod::MAX_ADDRESSES],
}

impl Pod {
    /// `status.podIPs` holds at most one address of each family; the rest is room.
    pub const MAX_ADDRESSES: usize = 4;
}

/// What may change of a pod while its programs stay: value of the `GATES` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodGate {
    /// Bits of [`gate`].
    pub flags: u32,
    pub padding: u32,
}

/// Bits of [`PodGate::flags`].
pub mod gate {
    /// With no agent at the listener, pass instead of drop (`heddle.dev/when-unattended: open`). An outbound connection
    /// that was marked before the agent went is dropped all the same: it is on its way back into the pod.
    pub const OPEN_WHEN_UNATTENDED: u32 = 1;
}

/// Per-CPU counters of one pod: value of the `COUNTS` map. All are events, never reset while the pod is enrolled.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCounts {
    /// connect() calls to a mesh destination that were marked.
    pub marked: u64,
    /// connect() calls to a mesh destination that were refused because they could not be marked.
    pub unmarkable: u64,
    /// Look-ups given to the agent's listener.
    pub captured: u64,
    /// Look-ups of attested connections passed to the app.
    pub attested: u64,
    /// Look-ups dropped and connect() calls refused because no agent serves the listener.
    pub unattended_dropped: u64,
    /// Look-ups and connect() calls passed although no agent serves the listener, as the pod's annotation asks.
    pub unattended_passed: u64,
    /// Look-ups dropped because they addressed the agent's listener port directly.
    pub direct: u64,
    /// UDP sockets connected to a destination outside the pod; what is sent on them is not seen.
    pub udp_connects: u64,
    /// Datagrams sent to a destination outside the pod on UDP sockets that are not connected to it.
    pub udp_datagrams: u64,
}

const _: () = {
    assert!(size_of::<Address>() == 16 && align_of::<Address>() == 1);
    assert!(size_of::<Destination>() == 8);
    assert!(size_of::<Tuple>() == 40 && offset_of!(Tuple, source_port) == 32 && offset_of!(Tuple, padding) == 36);
    assert!(size_of::<Attestation>() == 8);
    assert!(size_of::<Pod>() == 72 && offset_of!(Pod, addresses) == 8);
    assert!(size_of::<PodGate>() == 8);
    assert!(size_of::<PodCounts>() == 72);
};

#[cfg(feature = "userspace")]
mod plain_old_data {
    use super::{Address, Attestation, Destination, Pod, PodCounts, PodGate, Tuple};

    // SAFETY: each is repr(C), made of integers with explicit padding (sizes asserted above), valid for any bit
    // pattern.
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Destination {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Attestation {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Pod {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodGate {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodCounts {}
}
