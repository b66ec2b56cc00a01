//! Which endpoints of a Service may be chosen now, from one node: the one answer that the kernel's table of Services and the
//! tunnel's routes are both made of. Pure.
//!
//! The order is the Service's own and the same for every client of the node, so that an index means the same to both.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{Distribution, Endpoint, Service, Snapshot, Workload};

/// An endpoint that may be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub address: SocketAddr,
    /// The pod that has the address; `None` for what is no pod.
    pub workload: Option<Arc<Workload>>,
}

/// Why no endpoint may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unavailable {
    /// The Service has no such port.
    NoSuchPort,
    /// No endpoint is ready, or none that may be chosen from this node.
    NoneReady,
}

/// The endpoints that a client on `node` may be given for a port of a Service, each as likely as any other. All are of one
/// family: that of `asked`, the Service's address that the client uses, unless there are only others.
///
/// Kubernetes' rules: ready endpoints that don't terminate; with `internalTrafficPolicy: Local` those of the node or none; with
/// `trafficDistribution` the nearest while there are any (KEP-2086, KEP-4444, KEP-3015).
///
/// # Errors
/// When there is none, and why.
pub fn candidates(
    snapshot: &Snapshot,
    node: &str,
    service: &Service,
    port: u16,
    asked: IpAddr,
) -> Result<Vec<Candidate>, Unavailable> {
    let port = service.ports.iter().find(|known| known.port == port).ok_or(Unavailable::NoSuchPort)?;
    let mut found: Vec<Found> = service
        .endpoints
        .iter()
        .filter_map(|endpoint| {
            let number = *endpoint.ports.get(&port.name)?;
            let workload = snapshot.by_address.get(&endpoint.address);
            // The pod's own record may know of its end before the slice does.
            let ends = endpoint.terminating || workload.is_some_and(|workload| workload.terminating);
            let usable = service.publish_not_ready || (endpoint.ready && !ends);
            usable.then_some(Found { endpoint, number, workload })
        })
        .collect();
    // A dual-stack Service has endpoints of both families; the client asked for one of them.
    keep_any(&mut found, |found| found.endpoint.address.is_ipv4() == asked.is_ipv4());
    if service.local_only {
        found.retain(|found| found.node() == node);
    } else {
        let here = snapshot.localities.get(node).map(|locality| &*locality.zone).unwrap_or_default();
        let same_zone = |found: &Found<'_>| !here.is_empty() && found.zone(snapshot) == here;
        match service.distribution {
            Distribution::Even => {}
            Distribution::SameZone => keep_any(&mut found, same_zone),
            Distribution::SameNode => {
                // What is on the node is in its zone, where that is known.
                keep_any(&mut found, same_zone);
                keep_any(&mut found, |found| found.node() == node);
            }
        }
    }
    if found.is_empty() {
        return Err(Unavailable::NoneReady);
    }
    Ok(found.into_iter().map(Found::candidate).collect())
}

/// Those that the kernel may choose itself, in their order and with their index: the enrolled pods of the node, of the family of
/// `asked`. Exactly what the kernel's table of Services lists, whatever verdicts there are (without one it hands the connection
/// to the agent and says which it has chosen), and what that choice counts in.
pub fn on_lane<'a>(
    candidates: &'a [Candidate],
    node: &'a str,
    asked: IpAddr,
) -> impl Iterator<Item = (usize, &'a Candidate)> + 'a {
    let on_lane = move |candidate: &Candidate| {
        candidate.address.is_ipv4() == asked.is_ipv4()
            && candidate.workload.as_ref().is_some_and(|workload| workload.enrolled && *workload.node == *node)
    };
    candidates.iter().enumerate().filter(move |(_, candidate)| on_lane(candidate))
}

/// An endpoint that is usable, with its port and pod.
struct Found<'a> {
    endpoint: &'a Endpoint,
    number: u16,
    workload: Option<&'a Arc<Workload>>,
}

impl Found<'_> {
    fn node(&self) -> &str {
        let known = Some(&*self.endpoint.node).filter(|node| !node.is_empty());
        known.or(self.workload.map(|workload| &*workload.node)).unwrap_or_default()
    }

    fn zone<'a>(&'a self, snapshot: &'a Snapshot) -> &'a str {
        let known = Some(&*self.endpoint.zone).filter(|zone| !zone.is_empty());
        known.or_else(|| snapshot.localities.get(self.node()).map(|locality| &*locality.zone)).unwrap_or_default()
    }

    fn candidate(self) -> Candidate {
        let address = SocketAddr::new(self.endpoint.address, self.number);
        Candidate { address, workload: self.workload.cloned() }
    }
}

/// Keeps those that are preferred, if there are any.
fn keep_any<T>(all: &mut Vec<T>, preferred: impl Fn(&T) -> bool) {
    if all.iter().any(&preferred) {
        all.retain(preferred);
    }
}

#[cfg(test)]
mod tests;
