//! Which open connections of the lane the rules no longer allow. Pure.
//!
//! Who is at each end is what the kernel attested when the connection was made, not whose the addresses are by now.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use heddle_common::{Address, Attestation, Tuple};

use crate::{
    cluster::{Snapshot, Workload},
    identity::{SpiffeId, TrustDomain},
    policy::{Denial, Request, Rulebook, decide},
};

/// A connection that is to end, and why.
#[derive(Debug, Clone)]
pub(super) struct Forbidden {
    pub tuple: Tuple,
    pub attestation: Attestation,
    pub denial: Denial,
}

/// Decides each connection again. One between pods of which nobody knows yet (an earlier agent's, before this one has met them) waits;
/// that policies may be missing says nothing against what was allowed before.
pub(super) fn forbidden(
    rules: &Rulebook,
    snapshot: &Snapshot,
    trust_domain: &TrustDomain,
    known: &HashMap<u64, Arc<Workload>>,
    connections: Vec<(Tuple, Attestation)>,
) -> Vec<Forbidden> {
    let record = |id: u64| {
        let last = known.get(&id)?;
        Some(Arc::clone(snapshot.workloads.get(&last.uid).unwrap_or(last)))
    };
    let mut identities: HashMap<u64, Option<SpiffeId>> = HashMap::new();
    let mut decide = |tuple: &Tuple, by: &Attestation| {
        let (source, destination) = (record(by.source)?, record(by.destination)?);
        let identity = || SpiffeId::new(trust_domain, &source.namespace, &source.service_account).ok();
        let request = Request {
            principal: identities.entry(by.source).or_insert_with(identity).clone(),
            source_ip: address(tuple.source),
            destination,
            destination_ip: address(tuple.destination),
            destination_port: tuple.destination_port,
        };
        match decide(rules, &request) {
            Ok(_) | Err(Denial::Incomplete { .. }) => None,
            Err(denial) => Some(denial),
        }
    };
    connections
        .into_iter()
        .filter_map(|(tuple, attestation)| {
            let denial = decide(&tuple, &attestation)?;
            Some(Forbidden { tuple, attestation, denial })
        })
        .collect()
}

fn address(address: Address) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(address.octets)).to_canonical()
}
