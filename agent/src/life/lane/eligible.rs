//! Whether two pods may take the lane at all, and what policy says of a port between them. Pure.

use std::{cell::RefCell, collections::HashMap, net::IpAddr, sync::Arc};

use heddle_common::Pair;

use super::paths::Paths;
use crate::{
    capture::{LaneFault, ResidentPod},
    cluster::{SameNode, Snapshot, Workload},
    identity::{SpiffeId, TrustDomain},
    policy::{self, Denial, Ends, Rulebook, Verdict},
    tunnel::REFUSED_TARGETS,
};

/// What the kernel is to remember of a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    Allow,
    Deny(Arc<Refused>),
}

/// Everything that is told of a denied connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub source: Arc<Workload>,
    pub destination: Arc<Workload>,
    pub port: u16,
    pub denial: Denial,
}

/// Uids of pods whose capture is proven, and whether they can take the lane with any other.
pub(super) type Captured = HashMap<Arc<str>, Result<(), LaneFault>>;

/// All that decisions rest on, at one moment.
#[derive(Debug)]
pub(super) struct World<'a> {
    pub snapshot: &'a Snapshot,
    pub rules: &'a Rulebook,
    pub trust_domain: &'a TrustDomain,
    /// Pods of the node by uid.
    pub residents: &'a HashMap<Arc<str>, ResidentPod>,
    pub captured: &'a Captured,
    pub paths: &'a Paths,
    /// An identity is made once for many pairs.
    pub identities: RefCell<HashMap<Arc<str>, Option<SpiffeId>>>,
}

/// Why two pods can't take the lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ineligible {
    /// One of them is not enrolled, captured and able to, or asks for mutual TLS.
    Pods,
    /// Nobody has shown yet that packets go straight from one to the other.
    Path,
}

/// Two pods that may take the lane, with the addresses that may be used between them.
#[derive(Debug)]
pub(super) struct Eligible<'a> {
    source: &'a Arc<Workload>,
    destination: &'a Arc<Workload>,
    principal: SpiffeId,
    /// Ids of the source and the destination.
    ids: (u64, u64),
    from: Vec<IpAddr>,
    to: Vec<IpAddr>,
}

impl<'a> World<'a> {
    /// The pods by uid, if they may take the lane.
    pub fn eligible(&self, source: &Arc<str>, destination: &Arc<str>) -> Result<Eligible<'a>, Ineligible> {
        let (Some((source, from)), Some((destination, to))) = (self.end(source), self.end(destination)) else {
            return Err(Ineligible::Pods);
        };
        if source.uid == destination.uid {
            return Err(Ineligible::Pods);
        }
        let principal = self.identity(source).ok_or(Ineligible::Pods)?;
        let ids = (from.id.0, to.id.0);
        if !self.paths.proven(ids) {
            return Err(Ineligible::Path);
        }
        Ok(Eligible {
            from: addresses(source, from),
            to: addresses(destination, to),
            source,
            destination,
            principal,
            ids,
        })
    }

    /// A pod of the node that may take the lane with others.
    fn end(&self, uid: &Arc<str>) -> Option<(&'a Arc<Workload>, &'a ResidentPod)> {
        let workload = self.snapshot.workloads.get(uid).filter(|workload| may(workload))?;
        let resident = self.residents.get(uid).filter(|resident| resident.attestable)?;
        matches!(self.captured.get(uid), Some(Ok(()))).then_some((workload, resident))
    }

    fn identity(&self, workload: &Workload) -> Option<SpiffeId> {
        let mut known = self.identities.borrow_mut();
        let make = || SpiffeId::new(self.trust_domain, &workload.namespace, &workload.service_account).ok();
        known.entry(Arc::clone(&workload.uid)).or_insert_with(make).clone()
    }

    /// What the kernel is to remember of a port between them, if anything.
    pub fn decide(&self, pods: &Eligible<'_>, port: u16) -> Option<(Pair, Decision)> {
        if REFUSED_TARGETS.contains(&port) {
            return None;
        }
        let Eligible { source, destination, principal, ids, from, to } = pods;
        let decision = match policy::verdict(self.rules, &Ends { principal, from, destination, to }, port) {
            Verdict::Allow => Decision::Allow,
            Verdict::Deny(denial) => Decision::Deny(Arc::new(Refused {
                source: Arc::clone(source),
                destination: Arc::clone(destination),
                port,
                denial,
            })),
            Verdict::Unsaid => return None,
        };
        Some((Pair::new(ids.0, ids.1, port), decision))
    }
}

/// Whether the cluster wants the lane for the pod.
pub(super) fn may(workload: &Workload) -> bool {
    workload.enrolled && !asks_for_tls(workload)
}

/// Whether the pod's same-node traffic is to go through mutual TLS.
pub(super) fn asks_for_tls(workload: &Workload) -> bool {
    workload.same_node == SameNode::Mtls
}

/// Where the two disagree a change of addresses is under way: either may be used.
fn addresses(workload: &Workload, resident: &ResidentPod) -> Vec<IpAddr> {
    let mut addresses = workload.addresses.clone();
    addresses.extend(resident.addresses.iter().filter(|address| !workload.addresses.contains(address)));
    addresses
}
