//! What telemetry calls a pod, derived from its labels and owner as Istio derives it.
//!
//! Names are for people and dashboards: nothing may decide by them.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::Pod;

use super::Naming;

/// Characters of the hash in the names of a Deployment's ReplicaSets (`k8s.io/apimachinery/pkg/util/rand`).
const HASH_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Names of a pod.
pub fn name(pod: &Pod) -> Naming {
    let none = BTreeMap::new();
    let labels = pod.metadata.labels.as_ref().unwrap_or(&none);
    let label = |keys: &[&str]| keys.iter().find_map(|key| labels.get(*key)).filter(|value| !value.is_empty()).cloned();

    let (owner, workload_kind) = owner(pod, labels);
    let workload: Arc<str> = label(&["service.istio.io/workload-name"]).unwrap_or(owner).into();
    let canonical = label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    Naming {
        canonical_name: canonical.map_or_else(|| Arc::clone(&workload), Arc::from),
        canonical_revision: revision.as_deref().unwrap_or("latest").into(),
        app: label(&["app", "app.kubernetes.io/name"]).unwrap_or_default().into(),
        version: label(&["version", "app.kubernetes.io/version"]).unwrap_or_default().into(),
        workload,
        workload_kind,
    }
}

/// Name and kind of what owns the pod: a ReplicaSet's Deployment, a Job's CronJob, else the controller itself, else the pod.
fn owner(pod: &Pod, labels: &BTreeMap<String, String>) -> (String, &'static str) {
    let owners = pod.metadata.owner_references.iter().flatten();
    let Some(owner) = owners.into_iter().find(|owner| owner.controller == Some(true)) else {
        return (pod.metadata.name.clone().unwrap_or_default(), "pod");
    };
    match owner.kind.as_str() {
        "ReplicaSet" => match without_hash(&owner.name, labels.get("pod-template-hash")) {
            Some(deployment) => (deployment.to_owned(), "deployment"),
            None => (owner.name.clone(), "pod"),
        },
        "Deployment" => (owner.name.clone(), "deployment"),
        "Job" => match without_schedule(&owner.name) {
            Some(cronjob) => (cronjob.to_owned(), "cronjob"),
            None => (owner.name.clone(), "job"),
        },
        "CronJob" => (owner.name.clone(), "cronjob"),
        _ => (owner.name.clone(), "pod"),
    }
}

/// `web-5d9f7c8b6d` → `web`: the ReplicaSet's name without the hash that its pods' label repeats, or that looks like one.
fn without_hash<'a>(replica_set: &'a str, hash: Option<&String>) -> Option<&'a str> {
    let (deployment, last) = replica_set.rsplit_once('-')?;
    let is_hash = match hash {
        Some(hash) => last == hash,
        None => (6..=10).contains(&last.len()) && last.bytes().all(|b| HASH_ALPHABET.contains(&b)),
    };
    (is_hash && !deployment.is_empty()).then_some(deployment)
}

/// `backup-28391040` → `backup`: a CronJob's Jobs are named for the scheduled minute.
fn without_schedule(job: &str) -> Option<&str> {
    let (cronjob, minute) = job.rsplit_once('-')?;
    let scheduled = (8..=10).contains(&minute.len()) && minute.bytes().all(|b| b.is_ascii_digit());
    (scheduled && !cronjob.is_empty()).then_some(cronjob)
}
