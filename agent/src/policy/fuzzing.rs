//! Fuzzing of AuthorizationPolicy and PeerAuthentication: see [`crate::fuzzing`].

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use super::{Denial, Effect, Request, Rulebook, decide};
use crate::cluster::{self, Objects, Snapshot, Workload};

/// Pods that the policies may select.
const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: web, labels: {app: web}}
spec: {containers: []}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: bank, uid: db, labels: {app: db}}
spec: {containers: []}
status: {phase: Running, podIP: 10.0.0.2}
";

/// Any policies compile, and every decision stands on something: who is let in was let in by an ALLOW policy that can be
/// enforced, or is selected by none; a policy that can't be enforced only takes away.
pub fn policies(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    static PODS_READ: LazyLock<Arc<Objects>> = LazyLock::new(|| cluster::fuzzing::objects(PODS));
    let whole = cluster::fuzzing::with(&PODS_READ, text);
    let rules = Rulebook::compile(&whole);
    let denying: BTreeSet<&str> = rules
        .problems()
        .iter()
        .filter(|problem| problem.effect == Effect::Denies)
        .map(|problem| &*problem.policy)
        .collect();
    // An object that is there twice, once readable and once not, says two things under one name.
    let twice = whole.invalid_policies.iter().any(|invalid| {
        whole.authorization_policies.iter().any(|policy| {
            policy.metadata.namespace.as_deref() == Some(&*invalid.namespace)
                && policy.metadata.name.as_deref() == Some(&*invalid.name)
        })
    });
    if twice {
        return;
    }
    let enforced = Rulebook::compile(&without(&whole, &denying));
    for workload in whole.workloads.values() {
        for request in requests(workload) {
            match decide(&rules, &request) {
                Ok(permit) => {
                    let by = permit.policy();
                    assert!(by.is_none_or(|by| !denying.contains(&**by)), "{by:?} can't be enforced and allows");
                    assert!(decide(&enforced, &request).is_ok(), "a policy that can't be enforced lets {request:?} in");
                }
                Err(Denial::Unenforceable { policy }) => {
                    assert!(
                        !rules.problems().is_empty() && whole_has(&whole, &policy),
                        "{policy} denies and is unknown"
                    );
                }
                Err(denial) => assert!(denial.policy().is_none_or(|policy| whole_has(&whole, policy)), "{denial}"),
            }
        }
    }
}

/// The cluster without policies of these names.
fn without(snapshot: &Snapshot, names: &BTreeSet<&str>) -> Snapshot {
    let keep = |namespace: &Option<String>, name: &Option<String>| {
        let name = format!("{}/{}", namespace.as_deref().unwrap_or_default(), name.as_deref().unwrap_or_default());
        !names.contains(name.as_str())
    };
    let authorization = snapshot.authorization_policies.iter();
    let invalid = snapshot.invalid_policies.iter();
    Snapshot {
        workloads: snapshot.workloads.clone(),
        authorization_policies: authorization
            .filter(|policy| keep(&policy.metadata.namespace, &policy.metadata.name))
            .cloned()
            .collect(),
        peer_authentications: snapshot.peer_authentications.clone(),
        invalid_policies: invalid
            .filter(|policy| !names.contains(format!("{}/{}", policy.namespace, policy.name).as_str()))
            .cloned()
            .collect(),
        root_namespace: Arc::clone(&snapshot.root_namespace),
        ..Snapshot::default()
    }
}

fn whole_has(snapshot: &Snapshot, wanted: &str) -> bool {
    let Some((namespace, name)) = wanted.split_once('/') else { return false };
    let metadata = snapshot.authorization_policies.iter().map(|policy| &policy.metadata);
    let mut metadata = metadata.chain(snapshot.peer_authentications.iter().map(|policy| &policy.metadata));
    metadata.any(|one| one.namespace.as_deref() == Some(namespace) && one.name.as_deref() == Some(name))
        || snapshot.invalid_policies.iter().any(|policy| *policy.namespace == *namespace && *policy.name == *name)
}

fn requests(destination: &Arc<Workload>) -> impl Iterator<Item = Request> + '_ {
    let principals = [None, Some("spiffe://cluster.local/ns/shop/sa/client"), Some("spiffe://other/ns/bank/sa/web")];
    let sources: [IpAddr; 2] = [[10, 0, 0, 9].into(), [192, 168, 1, 1].into()];
    principals.into_iter().flat_map(move |principal| {
        sources.into_iter().zip([80, 8_080]).map(move |(source_ip, destination_port)| Request {
            principal: principal.and_then(|text| text.parse().ok()),
            source_ip,
            destination: Arc::clone(destination),
            destination_ip: [10, 0, 0, 1].into(),
            destination_port,
        })
    })
}
