//! Two pods, an address and a port, and the Service that was meant: what connections of the kernel lane share.
//!
//! Made once and kept, so that a connection costs no look-up of names, no label set and no formatting of its own.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, OnceLock},
};

use heddle_common::{Address, Attestation, Tuple};

use super::{Around, ending::Ending, names::Names};
use crate::{
    cluster::Workload,
    identity::{SpiffeId, TrustDomain},
    policy::{self, Rehearsal, Request},
    telemetry::{access_log::Outline, labels::Labels, traffic::Traffic},
    tunnel::{Direction, Flow, Security},
};

/// Both reporters, in the order in which [`Pair`] keeps what is theirs.
pub(super) const REPORTERS: [Direction; 2] = [Direction::Outbound, Direction::Inbound];

/// What makes connections alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// Workload ids.
    source: u64,
    destination: u64,
    source_address: Address,
    address: Address,
    port: u16,
    service: Address,
    service_port: u16,
}

impl Key {
    pub fn of(tuple: &Tuple, attestation: &Attestation) -> Self {
        Self {
            source: attestation.source,
            destination: attestation.destination,
            source_address: tuple.source,
            address: tuple.destination,
            port: tuple.destination_port,
            service: attestation.service,
            service_port: attestation.service_port,
        }
    }
}

#[derive(Debug)]
pub(super) struct Pair {
    /// As each reporter tells them, but for the source's port: that is zero.
    pub flows: [Flow; 2],
    pub labels: [Arc<Labels>; 2],
    /// What policy was asked; `None` where it can't be said who the pods are.
    pub request: Option<Request>,
    /// The dry-run policies that match.
    pub rehearsals: Vec<Rehearsal>,
    /// Of the log's lines, by reporter and plain ending.
    outlines: [[OnceLock<Outline>; Ending::PLAIN]; 2],
}

impl Pair {
    pub fn new(key: &Key, names: &Names, around: &Around, traffic: &Traffic) -> Self {
        let named = |id| names.get(id).cloned();
        let (source, destination) = (named(key.source), named(key.destination));
        let target = SocketAddr::new(ip(&key.address), key.port);
        let asked = (key.service_port != 0).then(|| SocketAddr::new(ip(&key.service), key.service_port));
        let client = SocketAddr::new(ip(&key.source_address), 0);
        let flows = flows(&Ends { client, asked: asked.unwrap_or(target), target, source, destination }, around);
        let labels = [0, 1].map(|reporter: usize| traffic.labels(&flows[reporter]));
        let request = request(&flows[1]);
        let rehearsals = request.as_ref().map(|request| policy::rehearse(&around.rules, request)).unwrap_or_default();
        Self { flows, labels, request, rehearsals, outlines: Default::default() }
    }

    /// The outline of a reporter's line, made by `make` where there is none yet.
    pub fn outline(&self, reporter: usize, ending: usize, make: impl FnOnce() -> Outline) -> Option<&Outline> {
        Some(self.outlines.get(reporter)?.get(ending)?.get_or_init(make))
    }
}

/// The ends of a connection.
pub(super) struct Ends {
    pub client: SocketAddr,
    /// What the client asked for.
    pub asked: SocketAddr,
    /// Where it went.
    pub target: SocketAddr,
    pub source: Option<Arc<Workload>>,
    pub destination: Option<Arc<Workload>>,
}

/// As the source's and the destination's reporter tell it.
pub(super) fn flows(ends: &Ends, around: &Around) -> [Flow; 2] {
    let service = around.snapshot.by_cluster_address.get(&ends.asked.ip());
    let identity = |pod: &Option<Arc<Workload>>| identity(&around.trust_domain, pod.as_deref()?);
    REPORTERS.map(|direction| Flow {
        security: Security::KernelAttested,
        source_workload: ends.source.clone(),
        source_principal: identity(&ends.source),
        destination_workload: ends.destination.clone(),
        destination_principal: identity(&ends.destination),
        destination_service: service.cloned(),
        ..Flow::new(
            direction,
            ends.client,
            match direction {
                Direction::Outbound => ends.asked,
                Direction::Inbound => ends.target,
            },
        )
    })
}

/// What policy is asked about a flow as its destination sees it.
pub(super) fn request(inbound: &Flow) -> Option<Request> {
    Some(Request {
        principal: Some(inbound.source_principal.clone()?),
        source_ip: inbound.source.ip(),
        destination: inbound.destination_workload.clone()?,
        destination_ip: inbound.destination.ip(),
        destination_port: inbound.destination.port(),
    })
}

fn identity(trust_domain: &TrustDomain, pod: &Workload) -> Option<SpiffeId> {
    // Names that make no SPIFFE id have none anywhere: such a pod is never on the lane.
    SpiffeId::new(trust_domain, &pod.namespace, &pod.service_account).ok()
}

pub(super) fn ip(address: &Address) -> IpAddr {
    Ipv6Addr::from(address.octets).to_canonical()
}

/// The client's address and port.
pub(super) fn client(tuple: &Tuple) -> SocketAddr {
    SocketAddr::new(ip(&tuple.source), tuple.source_port)
}
