//! One enrolled pod, as all of its connections see it.

use std::{net::IpAddr, sync::Arc};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use super::{
    End, Flow, Lane, Observer, Registry,
    edge::Edge,
    offer::{Dialer, Pool},
};
use crate::{
    capture::ProbeToken,
    cluster::{Snapshot, View, Workload},
    identity::{SpiffeError, SpiffeId},
    life::budget::{Account, Budget},
    policy::Rulebook,
};

/// What all pods of the agent share.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub cluster: View,
    pub rules: Arc<ArcSwap<Rulebook>>,
    pub registry: Registry,
    pub observer: Arc<dyn Observer>,
    pub cluster_id: Arc<str>,
    pub budget: Budget,
    pub lane: Arc<dyn Lane>,
    pub node: Arc<str>,
}

#[derive(Debug)]
pub(super) struct Pod<E: Edge> {
    pub edge: E,
    pub shared: Shared,
    pub token: ProbeToken,
    pub stop: CancellationToken,
    pub pool: Pool<Dialer<E>>,
    /// The record with which the pod was enrolled; the snapshot's is preferred.
    enrolled: Arc<Workload>,
    /// Its part of the node's budgets.
    pub account: Account,
}

impl<E: Edge> Pod<E> {
    pub fn new(edge: E, shared: Shared, enrolled: Arc<Workload>, token: ProbeToken, stop: CancellationToken) -> Self {
        let account = shared.budget.enrol(Arc::clone(&enrolled.uid));
        let pool = Pool::new(Dialer {
            edge: edge.clone(),
            account: account.clone(),
            observer: Arc::clone(&shared.observer),
            counts: Arc::clone(shared.registry.pool()),
            sessions: Arc::clone(shared.registry.sessions()),
        });
        Self { edge, shared, token, stop, pool, enrolled, account }
    }

    pub fn uid(&self) -> &Arc<str> {
        &self.enrolled.uid
    }

    /// The pod's record now: labels and identity may have changed since it was enrolled.
    pub fn record(&self, snapshot: &Snapshot) -> Arc<Workload> {
        Arc::clone(snapshot.workloads.get(&self.enrolled.uid).unwrap_or(&self.enrolled))
    }

    /// The identity of any workload of our trust domain.
    pub fn identity(&self, workload: &Workload) -> Result<SpiffeId, SpiffeError> {
        SpiffeId::new(self.edge.trust_domain(), &workload.namespace, &workload.service_account)
    }

    /// Tells of a connection that carried nothing.
    pub fn failed(&self, flow: &Flow, end: &End) {
        self.shared.observer.failed(flow, end);
    }
}

/// The pod that has `address`.
pub(super) fn workload_at(snapshot: &Snapshot, address: IpAddr) -> Option<&Arc<Workload>> {
    snapshot.by_address.get(&address)
}
