//! What the tunnel needs of the stages before it.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::{Lane, Observer, Registry};
use crate::{capture, cluster, identity::Certificates, life::budget::Budget, policy::Rulebook};

/// The stages before the tunnel, as handles. One per agent.
#[derive(Debug, Clone)]
pub struct Context {
    pub capture: capture::Handle,
    pub cluster: cluster::View,
    pub certificates: Certificates,
    /// Rules in force. After a change, [`super::reconsider`] decides live connections again.
    pub rules: Arc<ArcSwap<Rulebook>>,
    pub registry: Registry,
    pub observer: Arc<dyn Observer>,
    pub budget: Budget,
    pub lane: Arc<dyn Lane>,
    /// `k8s.cluster.name` in baggage.
    pub cluster_id: Arc<str>,
    pub node: Arc<str>,
}
