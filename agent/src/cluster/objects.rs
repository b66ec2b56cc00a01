//! Kubernetes objects as a source has them, before they are indexed.
//!
//! Objects are shared: indexing many files again does not copy what did not change.

use std::sync::Arc;

use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};

use super::{
    InvalidPolicy, PolicyGap,
    kinds::{AuthorizationPolicy, PeerAuthentication},
};

/// Objects of one file, or of one API server. Every object has a name; namespaced ones have a namespace.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    pub namespaces: Vec<Arc<Namespace>>,
    pub nodes: Vec<Arc<Node>>,
    pub pods: Vec<Arc<Pod>>,
    pub services: Vec<Arc<Service>>,
    pub endpoint_slices: Vec<Arc<EndpointSlice>>,
    pub authorization_policies: Vec<Arc<AuthorizationPolicy>>,
    pub peer_authentications: Vec<Arc<PeerAuthentication>>,
    pub invalid_policies: Vec<Arc<InvalidPolicy>>,
    pub policy_gaps: Vec<Arc<PolicyGap>>,
}
