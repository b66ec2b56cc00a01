//! The only types that kernel and userspace both see.
//!
//! Integers only, explicit padding, layout asserted at compile time in both builds. Any change of a layout, a map's
//! key or value, or a map's name raises [`LAYOUT_VERSION`]: the pins of one version live in a folder of their own, so
//! an agent never reads another version's maps.
//!
//! What the programs rely on the agent for:
//!
//! - **Order of enrolment**: gate and destinations, then routes and rules, then the listener into `LISTENERS`, then
//!   `lookup` and `observe`, then `connect4` and `connect6`, and last the pod's addresses into `RESIDENTS`. With `connect` attached and the slot empty, connections to mesh
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
//!
//! The kernel lane, on which two pods of the node talk without the agent:
//!
//! - **A verdict is a decision of the policy engine**, taken for this pair and this port, and removed before anything that
//!   it rests on changes. Without one the connection goes to the agent.
//! - **An entry of `ATTESTED` by [`attested_by::KERNEL`] is written by `observe`** in the source's cgroup before the SYN
//!   leaves, for a socket of the pod's own netns and address, and leaves when both ends are closed. The agent removes only
//!   those of pods that are withdrawn.
//! - **Workload ids are never used twice** (64 random bits, kept in the pod's record): what an earlier owner of an address
//!   or slot left behind matches nobody.
//!
//! The kubelet's probes:
//!
//! - **`PROBE_PORTS` is what the pods' specs say**: the agent puts a pod's ports in before its addresses go into `RESIDENTS`, and
//!   takes them out with the pod.
//! - **An entry of `ATTESTED` by [`attested_by::KUBELET`]** is written by `kubelet`, in the cgroup that [`Kubelet`] names, before the
//!   SYN leaves, and leaves when the kubelet's socket closes. The agent removes those of pods that are withdrawn, and of a
//!   cgroup that the programs hang on no more.
#![no_std]

use core::mem::{align_of, offset_of, size_of};

/// Version of every layout in this file; part of the bpffs path (`…/v4`).
pub const LAYOUT_VERSION: u32 = 4;

/// Port of the agent's listener in each pod's netns. Nothing may address it directly.
pub const LISTENER_PORT: u16 = 15_001;
/// Port on which a pod receives HBONE.
pub const HBONE_PORT: u16 = 15_008;

/// Mark of sockets whose packets take the pod's local route to `lo`: set by `connect` on captured connections, by the
/// agent on delivery sockets, inherited by the app's accepted sockets (`tcp_fwmark_accept`). Not a security boundary:
/// nothing is exempted or authenticated by it.
///
/// The lower half of the socket's mark; see [`choice`] for the upper one.
pub const MARK: u32 = 0x6865;
/// The part of a packet's mark that the pod's rule looks at.
pub const MARK_MASK: u32 = 0xffff;
/// Upper half of the mark of a captured connection: which endpoints of the Service are meant. The accepted socket inherits
/// it (`tcp_fwmark_accept`).
pub mod choice {
    /// Nothing was chosen: any endpoint.
    pub const NONE: u16 = 0;
    /// Any endpoint that is not in the Service's [`super::LocalEndpoints`].
    pub const REST: u16 = 1;
    /// This one and those above: the endpoint of that index in [`super::LocalEndpoints`], counted from here.
    pub const FIRST_LOCAL: u16 = 2;
}

/// Routing table and rule preference in the pod's netns that send marked packets to `lo`.
pub const ROUTE_TABLE: u32 = 0x6865;
pub const RULE_PREFERENCE: u32 = 30_865;

/// Most pods that one agent can enrol at a time: slots in [`PodGate`] arrays and in the listener map.
pub const MAX_PODS: u32 = 1_024;
/// Most mesh addresses (pods and Services, each family counted) that a node can know.
pub const MAX_DESTINATIONS: u32 = 262_144;
/// Most connections that may be attested at a time.
pub const MAX_ATTESTED: u32 = 65_536;
/// Most addresses of pods that are enrolled on this node.
pub const MAX_RESIDENTS: u32 = MAX_PODS * Pod::MAX_ADDRESSES as u32;
/// Most pairs of pods and ports with a verdict. What does not fit goes to the agent.
pub const MAX_VERDICTS: u32 = 65_536;
/// Most pairs with a verdict of [`verdict::DENY`]: counters of `DENIALS`.
pub const MAX_DENIALS: u32 = 4_096;
/// Most ports of Services with endpoints on this node that the kernel chooses for.
pub const MAX_SERVICES: u32 = 16_384;
/// Most ports of pods that the kubelet probes, over all pods of the node. What does not fit is not passed.
pub const MAX_PROBE_PORTS: u32 = 16_384;
/// Places of `PROBING`, a power of two: more than probes can be between their connect() and its SYN.
pub const PROBING_PLACES: u32 = 1_024;
/// Bytes of the ring of ended connections, a power of two of pages.
pub const EVENTS_BYTES: u32 = 2 * 1_024 * 1_024;
/// Places of `ADMITTED`, a power of two: sixteen of the 4,096 cookies that a CPU takes in a row. Two CPUs between a connect() and its
/// SYN meet only where their rows fall on the same sixteenth: with 4,096 places one connection in 30,000 lost its own.
pub const ADMITTED_PLACES: u32 = 65_536;
/// Places of `LOOKED`, a power of two. Of two sockets that share one, each look costs the other a look.
pub const LOOKED_PLACES: u32 = 16_384;
/// Time between two looks at the bytes of a connection that goes on, in ticks of the kernel's clock: a tenth of a second
/// where there are 250 a second, and reading it costs nothing.
pub const PROGRESS_JIFFIES: u32 = 25;

/// Names of the pinned maps, the same in the object file, in bpffs and in the agent.
pub mod maps {
    pub const DESTINATIONS: &str = "DESTINATIONS";
    pub const ATTESTED: &str = "ATTESTED";
    pub const LISTENERS: &str = "LISTENERS";
    pub const GATES: &str = "GATES";
    pub const COUNTS: &str = "COUNTS";
    pub const RESIDENTS: &str = "RESIDENTS";
    pub const VERDICTS: &str = "VERDICTS";
    pub const DENIALS: &str = "DENIALS";
    pub const SERVICES: &str = "SERVICES";
    /// When the bytes of a socket on the kernel lane were last looked at, by its cookie.
    pub const LOOKED: &str = "LOOKED";
    /// Cookies of sockets that `connect` let onto the kernel lane.
    pub const ADMITTED: &str = "ADMITTED";
    /// Ports of pods that the kubelet may probe: keys are [`super::ProbePort`].
    pub const PROBE_PORTS: &str = "PROBE_PORTS";
    /// Cookies of the kubelet's sockets that are about to send their SYN to a probe port.
    pub const PROBING: &str = "PROBING";
    /// Socket storage, freed with the socket; not pinned by name in the object.
    pub const ASKED: &str = "ASKED";
    /// Ring of [`super::Ended`].
    pub const EVENTS: &str = "EVENTS";
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
    pub const PEERNAME4: &str = "peername4";
    pub const PEERNAME6: &str = "peername6";
    pub const OBSERVE: &str = "observe";
    /// Those of the kubelet's cgroup; their links are under `kubelet/`.
    pub const KUBELET4: &str = "kubelet4";
    pub const KUBELET6: &str = "kubelet6";
    pub const KUBELET: &str = "kubelet";
}

/// Names of the read-only globals that make one instance of the programs per pod.
pub mod globals {
    pub const POD: &str = "POD";
    pub const KUBELET: &str = "KUBELET";
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

/// Who vouched for a connection: value of the `ATTESTED` map. From `source` on it is the kernel lane's, zero for others; but of
/// the kubelet's, `source` is the id of its cgroup, `destination` the pod, `id` its socket and `destination_state` as on the lane.
///
/// Fields of the source's side are written by the source's program alone, those of the destination's side by the
/// destination's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attestation {
    /// Slot of the pod that the connection is for; an entry of another slot is ignored.
    pub slot: u32,
    /// One of [`attested_by`].
    pub by: u32,
    /// Workload ids of both ends.
    pub source: u64,
    pub destination: u64,
    /// Cookies of the source's and the destination's socket: they tell this connection from another one of the same 4-tuple, and
    /// its sides apart. The second one is zero until the destination took the connection.
    pub id: u64,
    pub peer: u64,
    /// When the SYN left: nanoseconds of CLOCK_MONOTONIC.
    pub opened: u64,
    /// What the app asked for, where that was a Service: then the port is not zero. Else the address means nothing.
    pub service: Address,
    pub service_port: u16,
    pub padding: u16,
    /// Bits of [`side`].
    pub source_state: u32,
    pub destination_state: u32,
    /// Smoothed round-trip time and retransmitted segments, as each side sees them.
    pub source_rtt_us: u32,
    pub destination_rtt_us: u32,
    pub source_retransmissions: u32,
    pub destination_retransmissions: u32,
    /// How many sides have told of their end: each adds one, so that of two at once one sees both.
    pub closed: u32,
    /// Bytes of the app that the other side has acknowledged: client to app (by the source's side), app to client (by the
    /// destination's).
    pub sent: u64,
    pub received: u64,
}

impl Attestation {
    /// For a connection that the agent delivers.
    #[must_use]
    pub const fn by_agent(slot: u32) -> Self {
        Self {
            slot,
            by: attested_by::AGENT,
            source: 0,
            destination: 0,
            id: 0,
            peer: 0,
            opened: 0,
            service: Address { octets: [0; 16] },
            service_port: 0,
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
        }
    }
}

/// Values of [`Attestation::by`].
pub mod attested_by {
    /// Delivery by the agent, after policy.
    pub const AGENT: u32 = 1;
    /// The source's `observe`, for the kernel lane.
    pub const KERNEL: u32 = 2;
    /// `kubelet`, for a probe.
    pub const KUBELET: u32 = 3;
}

/// Bits of [`Attestation::source_state`] and [`Attestation::destination_state`].
pub mod side {
    /// Its handshake is complete. Of the destination: no other SYN of this 4-tuple is let in.
    pub const ESTABLISHED: u32 = 1;
    /// It has sent its FIN.
    pub const FINISHED: u32 = 2;
    /// Its FIN was acknowledged.
    pub const ACKNOWLEDGED: u32 = 4;
    /// Its socket is closed.
    pub const CLOSED: u32 = 8;
}

/// An enrolled pod of this node: value of the `RESIDENTS` map, by address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    pub workload: u64,
    pub slot: u32,
    pub padding: u32,
}

/// Two pods of this node and a port: key of the `VERDICTS` map. The port in host order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    /// Workload ids.
    pub source: u64,
    pub destination: u64,
    pub port: u16,
    pub padding: [u16; 3],
}

impl Pair {
    #[must_use]
    pub const fn new(source: u64, destination: u64, port: u16) -> Self {
        Self { source, destination, port, padding: [0; 3] }
    }
}

/// What the policy engine decided for a pair: value of the `VERDICTS` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// One of [`verdict`].
    pub action: u32,
    /// Index into `DENIALS` of a denied pair.
    pub counter: u32,
}

/// Values of [`Verdict::action`].
pub mod verdict {
    pub const ALLOW: u32 = 1;
    pub const DENY: u32 = 2;
}

/// A port of a pod that the kubelet probes, in host order: key of the `PROBE_PORTS` map, whose values mean nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProbePort {
    /// Workload id.
    pub workload: u64,
    pub port: u16,
    pub padding: [u16; 3],
}

impl ProbePort {
    #[must_use]
    pub const fn new(workload: u64, port: u16) -> Self {
        Self { workload, port, padding: [0; 3] }
    }
}

/// Read-only data of the kubelet's programs: which tasks and sockets are the kubelet's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kubelet {
    /// Id of its cgroup: a task below it is another's.
    pub cgroup: u64,
    /// Cookie of the host's netns (`SO_NETNS_COOKIE`, Linux 5.14); zero where it can't be had, and then it is not asked for.
    pub netns: u64,
}

/// A port of a Service's cluster address, in host order: key of the `SERVICES` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePort {
    pub address: Address,
    pub port: u16,
    pub padding: u16,
}

/// An endpoint on this node, port in host order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalEndpoint {
    pub address: Address,
    pub port: u16,
    pub padding: u16,
}

/// The endpoints of a Service's port: value of the `SERVICES` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalEndpoints {
    /// All endpoints that may be chosen now, on any node: each is as likely as any other.
    pub total: u32,
    /// How many of `endpoints` are used: those that the kernel lane may reach.
    pub local: u32,
    pub endpoints: [LocalEndpoint; LocalEndpoints::MAX],
}

impl LocalEndpoints {
    /// A Service's port with more endpoints on one node is left to the agent.
    pub const MAX: usize = 64;
}

/// What the app asked for, where the kernel chose the endpoint of a Service: value of the `ASKED` socket storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    pub service: Address,
    /// In host order. Zero: the socket's last connect() was no such one.
    pub port: u16,
    pub padding: u16,
}

/// A connection of the kernel lane that has ended: record of the `EVENTS` ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pub tuple: Tuple,
    pub attestation: Attestation,
    /// When: nanoseconds of CLOCK_MONOTONIC.
    pub closed: u64,
}

/// Read-only data of one pod's programs: the pod's slot and its own addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Index into `LISTENERS`, `GATES` and `COUNTS`.
    pub slot: u32,
    /// How many of `addresses` are used.
    pub addresses_used: u32,
    /// The pod's id, see [`Resident`].
    pub workload: u64,
    /// Cookie of the pod's netns (`SO_NETNS_COOKIE`, Linux 5.14); zero where it can't be had, and then no connection of the pod
    /// takes the kernel lane.
    pub netns: u64,
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
    /// connect() calls that took the kernel lane.
    pub lane: u64,
    /// connect() calls refused and look-ups reset because a verdict denies them.
    pub lane_denied: u64,
    /// Connections to a pod of this node that went to the agent for want of a verdict, or because thousands of others
    /// came between their connect() and their SYN.
    pub lane_missed: u64,
    /// Connections of the kernel lane that went to the agent because `ATTESTED` was full.
    pub lane_full: u64,
    /// Ends of kernel-lane connections that found no room in `EVENTS`.
    pub events_lost: u64,
    /// Look-ups of the kubelet's connections to probe ports, passed to the app.
    pub probes: u64,
}

const _: () = {
    assert!(size_of::<Address>() == 16 && align_of::<Address>() == 1);
    assert!(size_of::<Destination>() == 8);
    assert!(size_of::<Tuple>() == 40 && offset_of!(Tuple, source_port) == 32 && offset_of!(Tuple, padding) == 36);
    assert!(size_of::<Attestation>() == 112 && offset_of!(Attestation, sent) == 96);
    assert!(size_of::<Resident>() == 16);
    assert!(size_of::<Pair>() == 24 && offset_of!(Pair, padding) == 18);
    assert!(size_of::<Verdict>() == 8);
    assert!(size_of::<ServicePort>() == 20);
    assert!(size_of::<LocalEndpoint>() == 20 && size_of::<LocalEndpoints>() == 8 + 20 * LocalEndpoints::MAX);
    assert!(size_of::<Asked>() == 20);
    assert!(size_of::<Ended>() == 160);
    assert!(size_of::<Pod>() == 88 && offset_of!(Pod, addresses) == 24);
    assert!(size_of::<PodGate>() == 8);
    assert!(size_of::<PodCounts>() == 120);
    assert!(size_of::<ProbePort>() == 16 && offset_of!(ProbePort, padding) == 10);
    assert!(size_of::<Kubelet>() == 16);
};

#[cfg(feature = "userspace")]
mod plain_old_data {
    use super::{
        Address, Asked, Attestation, Destination, Ended, Kubelet, LocalEndpoints, Pair, Pod, PodCounts, PodGate,
        ProbePort, Resident, ServicePort, Tuple, Verdict,
    };

    macro_rules! plain_old_data {
        ($($name:ty),*) => {
            $(
                // SAFETY: repr(C), made of integers with explicit padding (sizes asserted above), valid for any bit pattern.
                unsafe impl aya::Pod for $name {}
            )*
        };
    }
    plain_old_data!(
        Address,
        Asked,
        Attestation,
        Destination,
        Ended,
        Kubelet,
        LocalEndpoints,
        Pair,
        Pod,
        PodCounts,
        PodGate,
        ProbePort,
        Resident,
        ServicePort,
        Tuple,
        Verdict
    );
}
