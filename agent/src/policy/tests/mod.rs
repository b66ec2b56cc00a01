//! Every sentence of the semantics as a table, and `decide` against a naive model over random policies.

mod authorization;
mod explanation;
mod peer_authentication;
pub mod property;

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{Denial, Request, Rulebook, decide};
use crate::cluster::{
    Snapshot, Workload,
    kinds::{AuthorizationPolicy, PeerAuthentication},
};

pub const ROOT: &str = "istio-system";
pub const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

/// A pod `web` in namespace `shop` with the label `app: web`, as a destination.
pub fn workload(namespace: &str, app: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: format!("uid-{namespace}-{app}").into(),
        addresses: vec!["10.0.0.9".parse().unwrap()],
        labels: [("app".to_owned(), app.to_owned())].into(),
        ..Workload::named(namespace, app)
    })
}

/// A policy from `namespace/name` and the YAML of its spec.
pub fn authorization(name: &str, spec: &str) -> Arc<AuthorizationPolicy> {
    let (namespace, name) = name.split_once('/').unwrap();
    let metadata = ObjectMeta { name: Some(name.into()), namespace: Some(namespace.into()), ..ObjectMeta::default() };
    Arc::new(AuthorizationPolicy { metadata, spec: serde_saphyr::from_str(spec).unwrap() })
}

pub fn peer_authentication(name: &str, spec: &str) -> Arc<PeerAuthentication> {
    let (namespace, name) = name.split_once('/').unwrap();
    let metadata = ObjectMeta { name: Some(name.into()), namespace: Some(namespace.into()), ..ObjectMeta::default() };
    Arc::new(PeerAuthentication { metadata, spec: serde_saphyr::from_str(spec).unwrap() })
}

/// A cluster of pods `web` and `db` in `shop`, and `web` in `bank` and in the root namespace.
pub fn cluster(policies: &[Arc<AuthorizationPolicy>], peers: &[Arc<PeerAuthentication>]) -> Snapshot {
    let pods = [workload("shop", "web"), workload("shop", "db"), workload("bank", "web"), workload(ROOT, "web")];
    Snapshot {
        workloads: pods.into_iter().map(|pod| (Arc::clone(&pod.uid), pod)).collect(),
        authorization_policies: policies.to_vec(),
        peer_authentications: peers.to_vec(),
        root_namespace: ROOT.into(),
        ..Snapshot::default()
    }
}

pub fn rules(policies: &[Arc<AuthorizationPolicy>]) -> Rulebook {
    Rulebook::compile(&cluster(policies, &[]))
}

/// From [`CLIENT`] at 10.0.1.1 to `shop/web` at 10.0.0.9:8080.
pub fn request() -> Request {
    Request {
        principal: Some(CLIENT.parse().unwrap()),
        source_ip: IpAddr::from([10, 0, 1, 1]),
        destination: workload("shop", "web"),
        destination_ip: IpAddr::from([10, 0, 0, 9]),
        destination_port: 8080,
    }
}

/// What a decision comes to: the policy that allowed, or the reason and policy that denied.
pub fn verdict(rules: &Rulebook, request: &Request) -> String {
    let name = |policy: Option<&Arc<str>>| policy.map(|policy| format!(" {policy}")).unwrap_or_default();
    match decide(rules, request) {
        Ok(permit) => format!("allowed{}", name(permit.policy())),
        Err(denial) => format!("{}{}", denial.reason(), name(Denial::policy(&denial))),
    }
}
