//! Is this pod in the mesh? One pure function over labels.
//!
//! Every way of saying *no* wins over every way of saying *yes*; what is said badly is not said.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;

use super::Membership;

/// Label on a namespace or pod: `enabled` or `disabled`.
pub const MESH: &str = "heddle.dev/mesh";
/// Label on a namespace or pod of Istio's ambient mode. Only `none` means something here: `ambient` is for Istio.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Annotation on a pod that has an Istio sidecar.
pub const SIDECAR: &str = "sidecar.istio.io/status";

type Labels = BTreeMap<String, String>;

/// What a [`MESH`] label says. `Unclear` is any value but the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Unsaid,
    Enabled,
    Disabled,
    Unclear,
}

/// The [`MESH`] label of a namespace or pod.
pub fn wish(labels: Option<&Labels>) -> Wish {
    match labels.and_then(|labels| labels.get(MESH)).map(String::as_str) {
        None => Wish::Unsaid,
        Some("enabled") => Wish::Enabled,
        Some("disabled") => Wish::Disabled,
        Some(_) => Wish::Unclear,
    }
}

/// Whether a pod is in the mesh, by its own labels and its namespace's.
pub fn enrolled(pod: &Pod, namespace_labels: Option<&Labels>) -> bool {
    let labels = pod.metadata.labels.as_ref();
    let has_sidecar = pod.metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(SIDECAR));
    if host_network(pod) || has_sidecar || opted_out(labels) || opted_out(namespace_labels) {
        return false;
    }
    wish(labels) == Wish::Enabled || wish(namespace_labels) == Wish::Enabled
}

/// What a namespace's labels say of its pods.
pub fn membership(labels: Option<&Labels>) -> Membership {
    match wish(labels) {
        _ if opted_out(labels) => Membership::OptedOut,
        Wish::Enabled => Membership::Enrolled,
        _ => Membership::Unsaid,
    }
}

fn opted_out(labels: Option<&Labels>) -> bool {
    wish(labels) == Wish::Disabled
        || labels.and_then(|labels| labels.get(DATAPLANE_MODE)).is_some_and(|mode| mode == "none")
}

/// Whether the pod shares its node's network namespace.
pub fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}
