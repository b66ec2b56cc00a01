//! Fuzzing of manifests: see [`crate::fuzzing`].

use std::sync::Arc;

use serde_json::Value;

use super::{Objects, Settings, Snapshot, index, read::read};

/// Any text is read, and indexed. What was read of the policies and printed again is read as the same.
pub fn manifests(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let objects = read(text).objects;
    let printed = print(&objects);
    // What JSON may hold unescaped and YAML may not is no matter of ours.
    if printed.chars().all(|letter| matches!(letter, '\n' | ' '..='~')) {
        let again = read(&printed);
        assert!(again.errors.is_empty(), "{:?} of {printed}", again.errors);
        assert_eq!(again.objects.authorization_policies, objects.authorization_policies);
        assert_eq!(again.objects.peer_authentications, objects.peer_authentications);
    }
    let snapshot = snapshot(text);
    let named = |namespace: &Option<String>, name: &Option<String>| namespace.is_some() && name.is_some();
    assert!(snapshot.authorization_policies.iter().all(|one| named(&one.metadata.namespace, &one.metadata.name)));
    for (uid, workload) in &snapshot.workloads {
        assert!(*uid == workload.uid && !workload.uid.is_empty() && !workload.name.is_empty());
        assert!(!(workload.enrolled && workload.host_network), "hostNetwork pods are never enrolled");
    }
}

/// Policies as one JSON document each.
fn print(objects: &Objects) -> String {
    let policies = objects.authorization_policies.iter().map(|policy| serde_json::to_value(&**policy));
    let peers = objects.peer_authentications.iter().map(|policy| serde_json::to_value(&**policy));
    policies.chain(peers).map(|policy| format!("---\n{}\n", policy.unwrap_or(Value::Null))).collect()
}

/// What the agent would know of a cluster that is this text.
pub fn snapshot(text: &str) -> Snapshot {
    with(&Arc::default(), text)
}

/// What the agent would know of a cluster that is these objects and this text.
pub fn with(objects: &Arc<Objects>, text: &str) -> Snapshot {
    index(&[Arc::clone(objects), Arc::new(read(text).objects)], &Settings::default(), 1)
}

/// What a text holds that is always the same: read once.
pub fn objects(text: &str) -> Arc<Objects> {
    Arc::new(read(text).objects)
}
