//! Writes into each policy's status whether it is enforced as it is written: done by the one CA replica that holds the Lease, so
//! that agents need no right to write, and nobody writes twice.
//!
//! Two lists a turn, and a write only where something differs. A policy that changed meanwhile is looked at in the next turn.

use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams},
    core::{ApiResource, DynamicObject},
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{config, limits};
use crate::{
    cluster::{self, PolicyKind, Settings},
    policy::{
        Rulebook,
        status::{conditions, faults, qualified},
    },
};

const KINDS: [(PolicyKind, &str); 2] = [
    (PolicyKind::AuthorizationPolicy, "authorizationpolicies"),
    (PolicyKind::PeerAuthentication, "peerauthentications"),
];

/// Why a turn was not whole.
#[derive(Debug, thiserror::Error)]
enum StatusError {
    #[error("no answer within {:?}", limits::KUBE_CALL)]
    Late,
    #[error("{0}")]
    Api(#[from] kube::Error),
}

/// Keeps policies' status up to date while `publishes` says that it is for us to write.
pub async fn follow(client: Client, mut publishes: watch::Receiver<bool>) {
    let mut failing = false;
    loop {
        if publishes.wait_for(|publishes| *publishes).await.is_err() {
            return;
        }
        match turn(&client).await {
            Ok(0) => failing = false,
            Ok(written) => {
                failing = false;
                tracing::info!(written, "Policies' status written.");
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "Policies' status can't be written; trying again.");
                }
                failing = true;
            }
        }
        sleep(limits::POLICY_STATUS_LOOK).await;
        // Nobody says any more whose it is to write; the last word would count for ever.
        if publishes.has_changed().is_err() {
            return;
        }
    }
}

/// Looks at every policy once; how many were written.
async fn turn(client: &Client) -> Result<usize, StatusError> {
    let mut policies = Vec::new();
    for (kind, plural) in KINDS {
        // Where the kind is not installed there is none.
        let Some(resource) = resource(client, kind, plural).await? else { continue };
        for policy in list(&Api::all_with(client.clone(), &resource)).await? {
            policies.push((kind, resource.clone(), policy));
        }
    }
    let snapshot = cluster::policies(
        policies.iter().map(|(kind, _, policy)| (*kind, policy.clone())),
        &Settings { root_namespace: config::ROOT_NAMESPACE.into(), ..Settings::default() },
    );
    let rules = Rulebook::compile(&snapshot);
    let faults = faults(rules.problems());
    let mut written = 0;
    for (kind, resource, policy) in &policies {
        let name: Arc<str> = qualified(policy);
        let problems = faults.get(&(kind.as_str(), &*name)).map(Vec::as_slice).unwrap_or_default();
        let Some(conditions) = conditions(policy, problems, &Timestamp::now().to_string()) else { continue };
        written += usize::from(write(client, resource, policy, &conditions).await?);
    }
    Ok(written)
}

/// The version of the kind that the API server has.
async fn resource(client: &Client, kind: PolicyKind, plural: &str) -> Result<Option<ApiResource>, StatusError> {
    for version in ["v1", "v1beta1"] {
        let resource = ApiResource {
            group: "security.istio.io".to_owned(),
            version: version.to_owned(),
            api_version: format!("security.istio.io/{version}"),
            kind: kind.as_str().to_owned(),
            plural: plural.to_owned(),
        };
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        match within(api.list(&ListParams::default().limit(1))).await {
            Ok(_) => return Ok(Some(resource)),
            Err(StatusError::Api(kube::Error::Api(status))) if status.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

async fn list(api: &Api<DynamicObject>) -> Result<Vec<Value>, StatusError> {
    let mut wanted = ListParams::default().limit(limits::KUBE_PAGE);
    let mut all = Vec::new();
    loop {
        let page = within(api.list(&wanted)).await?;
        let more = page.metadata.continue_.filter(|token| !token.is_empty());
        all.extend(page.items.iter().filter_map(|policy| serde_json::to_value(policy).ok()));
        match more.filter(|_| all.len() < limits::KUBE_OBJECTS) {
            Some(token) => wanted = wanted.continue_token(&token),
            None => return Ok(all),
        }
    }
}

/// With the version that was seen: what was changed meanwhile is not written over. Whether it was written.
async fn write(
    client: &Client,
    resource: &ApiResource,
    policy: &Value,
    conditions: &Value,
) -> Result<bool, StatusError> {
    let text = |field: &str| policy["metadata"][field].as_str().unwrap_or_default();
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), text("namespace"), resource);
    let patch = json!({
        "metadata": {"resourceVersion": text("resourceVersion")},
        "status": {"conditions": conditions},
    });
    match within(api.patch_status(text("name"), &PatchParams::default(), &Patch::Merge(&patch))).await {
        Ok(_) => Ok(true),
        Err(StatusError::Api(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn within<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, StatusError> {
    Ok(timeout(limits::KUBE_CALL, call).await.map_err(|_| StatusError::Late)??)
}

#[cfg(test)]
mod tests;
