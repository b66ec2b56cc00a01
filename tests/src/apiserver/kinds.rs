//! The kinds that the stand-in serves, as discovery names them.

use serde_json::Value;

/// One resource of the API.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// Empty for the core group.
    pub group: &'static str,
    pub versions: &'static [&'static str],
    pub plural: &'static str,
    pub kind: &'static str,
    pub namespaced: bool,
    /// Whether its status is a subresource: then nothing else changes it.
    pub status: bool,
}

const fn kind(
    group: &'static str,
    versions: &'static [&'static str],
    plural: &'static str,
    kind: &'static str,
    namespaced: bool,
    status: bool,
) -> Kind {
    Kind { group, versions, plural, kind, namespaced, status }
}

const V1: &[&str] = &["v1"];

/// Every one.
pub static KINDS: [Kind; 17] = [
    kind("", V1, "namespaces", "Namespace", false, true),
    kind("", V1, "nodes", "Node", false, true),
    kind("", V1, "pods", "Pod", true, true),
    kind("", V1, "services", "Service", true, true),
    kind("", V1, "configmaps", "ConfigMap", true, false),
    kind("", V1, "secrets", "Secret", true, false),
    kind("", V1, "serviceaccounts", "ServiceAccount", true, false),
    kind("", V1, "events", "Event", true, false),
    kind("events.k8s.io", V1, "events", "Event", true, false),
    kind("discovery.k8s.io", V1, "endpointslices", "EndpointSlice", true, false),
    kind("coordination.k8s.io", V1, "leases", "Lease", true, false),
    kind("apps", V1, "daemonsets", "DaemonSet", true, true),
    kind("apps", V1, "deployments", "Deployment", true, true),
    kind("networking.k8s.io", V1, "networkpolicies", "NetworkPolicy", true, false),
    kind("apiextensions.k8s.io", V1, "customresourcedefinitions", "CustomResourceDefinition", false, true),
    kind("security.istio.io", &["v1", "v1beta1"], "authorizationpolicies", "AuthorizationPolicy", true, true),
    kind("security.istio.io", &["v1", "v1beta1"], "peerauthentications", "PeerAuthentication", true, true),
];

/// The kind that an object says it is of.
pub fn of(object: &Value) -> Option<&'static Kind> {
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    let (group, _) = text("apiVersion").split_once('/').unwrap_or(("", text("apiVersion")));
    KINDS.iter().find(|kind| kind.kind == text("kind") && kind.group == group)
}

/// The first kind that is called so in a path; of events those of the core group.
pub fn plural(plural: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.plural == plural)
}

/// What a path of the API names, whether or not the stand-in has it.
#[derive(Debug, Clone, Copy)]
pub struct Named<'a> {
    pub group: &'a str,
    pub version: &'a str,
    pub namespace: &'a str,
    pub plural: &'a str,
    /// Empty for all of them.
    pub name: &'a str,
    pub subresource: &'a str,
}

impl<'a> Named<'a> {
    /// `/api/v1/namespaces/x/pods/y/status` and its like.
    pub fn parse(path: &'a str) -> Option<Self> {
        let mut parts = path.trim_matches('/').split('/');
        let group = match parts.next()? {
            "api" => "",
            "apis" => parts.next()?,
            _ => return None,
        };
        let version = parts.next()?;
        let rest: Vec<&str> = parts.collect();
        let (namespace, rest) = match rest.as_slice() {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() && rest[0] != "status" => (*namespace, rest),
            rest => ("", rest),
        };
        let (plural, name, subresource) = match rest {
            [plural] => (*plural, "", ""),
            [plural, name] => (*plural, *name, ""),
            [plural, name, subresource] => (*plural, *name, *subresource),
            _ => return None,
        };
        Some(Self { group, version, namespace, plural, name, subresource })
    }

    pub fn target(self) -> Option<Target> {
        let ours = |kind: &&Kind| {
            kind.group == self.group && kind.plural == self.plural && kind.versions.contains(&self.version)
        };
        let owned = str::to_owned;
        Some(Target {
            kind: KINDS.iter().find(ours)?,
            version: owned(self.version),
            namespace: owned(self.namespace),
            name: owned(self.name),
            subresource: owned(self.subresource),
        })
    }
}

/// What is asked for, of what the stand-in has.
#[derive(Debug)]
pub struct Target {
    pub kind: &'static Kind,
    pub version: String,
    pub namespace: String,
    /// Empty for all of them.
    pub name: String,
    pub subresource: String,
}

impl Target {
    /// `apiVersion` of what it names.
    pub fn api_version(&self) -> String {
        if self.kind.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.kind.group, self.version) }
    }
}
