use std::time::Duration;

use super::*;
use crate::{
    cluster::{api_client, kubernetes::stand_in::ApiServer},
    policy::status::CONDITION,
};

async fn cluster() -> (ApiServer, Client, tempfile::TempDir) {
    let _installed_by_another_test = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let api = ApiServer::start().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    api.write_kubeconfig(&folder.path().join("kubeconfig")).unwrap();
    let client = api_client(Some(&folder.path().join("kubeconfig"))).await.unwrap();
    (api, client, folder)
}

fn policy(kind: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"namespace": "shop", "name": name}, "spec": spec,
    })
}

fn condition(api: &ApiServer, plural: &str, name: &str) -> Value {
    let policy = api.get(plural, "shop", name).unwrap();
    let all = policy["status"]["conditions"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|condition| condition["type"] == CONDITION).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_policy_is_told_what_becomes_of_it_and_then_left_alone() {
    let (api, client, _folder) = cluster().await;
    api.put(policy("AuthorizationPolicy", "good", json!({"rules": [{}]})));
    let paths = json!({"rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]});
    api.put(policy("AuthorizationPolicy", "http", paths.clone()));
    api.put(policy("AuthorizationPolicy", "typo", json!({"acton": "DENY"})));
    api.put(policy("PeerAuthentication", "odd", json!({"mtls": {"mode": "MAYBE"}})));
    for name in ["a", "b", "c"] {
        api.put(policy("PeerAuthentication", name, json!({"mtls": {"mode": "STRICT"}})));
    }
    assert_eq!(turn(&client).await.unwrap(), 7, "more than a page");
    let authorization = |name| condition(&api, "authorizationpolicies", name);
    assert_eq!(authorization("good")["status"], "True");
    for (name, field) in [("http", "spec.rules[0].to[0].operation.paths"), ("typo", "spec.acton")] {
        let condition = authorization(name);
        assert_eq!((&condition["status"], &condition["observedGeneration"]), (&json!("False"), &json!(1)), "{name}");
        assert!(condition["message"].as_str().unwrap().contains(field), "{condition}");
    }
    assert_eq!(condition(&api, "peerauthentications", "odd")["status"], "False");
    let before = api.count("patch", "authorizationpolicies");
    assert_eq!(turn(&client).await.unwrap(), 0);
    assert_eq!(api.count("patch", "authorizationpolicies"), before);
    allowed(&api);

    // Mended: at its new generation. What somebody else says stays.
    let mut mended = api.get("authorizationpolicies", "shop", "http").unwrap();
    mended["spec"] = json!({"rules": [{}]});
    mended["status"]["conditions"].as_array_mut().unwrap().push(json!({"type": "Reconciled", "status": "True"}));
    api.put(mended);
    assert_eq!(turn(&client).await.unwrap(), 1);
    let condition = authorization("http");
    assert_eq!((&condition["status"], &condition["observedGeneration"]), (&json!("True"), &json!(2)));
    let all = api.get("authorizationpolicies", "shop", "http").unwrap()["status"]["conditions"].clone();
    assert_eq!(all[0], json!({"type": "Reconciled", "status": "True"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_changed_meanwhile_is_not_written_over() {
    let (api, client, _folder) = cluster().await;
    api.put(policy("AuthorizationPolicy", "a", json!({})));
    let resource = resource(&client, PolicyKind::AuthorizationPolicy, "authorizationpolicies").await.unwrap().unwrap();
    let seen = list(&Api::all_with(client.clone(), &resource)).await.unwrap().remove(0);
    api.put(policy("AuthorizationPolicy", "a", json!({"action": "DENY"})));
    let conditions = conditions(&seen, &[], "2026-01-01T00:00:00Z").unwrap();
    assert!(!write(&client, &resource, &seen, &conditions).await.unwrap());
    assert_eq!(condition(&api, "authorizationpolicies", "a"), Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn kinds_that_are_not_installed_are_no_error() {
    let (api, client, _folder) = cluster().await;
    for plural in ["authorizationpolicies", "peerauthentications"] {
        api.set_absent(plural, true);
    }
    assert_eq!(turn(&client).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_holds_the_lease_writes() {
    let (api, client, _folder) = cluster().await;
    api.put(policy("AuthorizationPolicy", "a", json!({})));
    let (holds, publishes) = watch::channel(false);
    let following = tokio::spawn(follow(client, publishes));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(api.count("list", "authorizationpolicies"), 0);
    holds.send_replace(true);
    let told = async {
        while condition(&api, "authorizationpolicies", "a").is_null() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(30), told).await.unwrap();
    drop(holds);
    timeout(limits::POLICY_STATUS_LOOK + Duration::from_secs(20), following).await.unwrap().unwrap();
}

/// Everything that was asked is allowed by the CA's ClusterRole.
fn allowed(api: &ApiServer) {
    let text = include_str!("../../../../deploy/ca/rbac.yaml");
    let roles: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
    let rules: Vec<Value> = roles
        .iter()
        .filter(|role| role["kind"] == "ClusterRole")
        .flat_map(|role| role["rules"].as_array().unwrap().clone())
        .collect();
    let has = |list: &Value, wanted: &str| list.as_array().unwrap().iter().any(|one| one == wanted);
    for seen in api.verbs_seen() {
        let resource = seen.whole_resource();
        let fits = |rule: &Value| {
            has(&rule["apiGroups"], &seen.group) && has(&rule["resources"], &resource) && has(&rule["verbs"], seen.verb)
        };
        assert!(rules.iter().any(fits), "deploy/ca/rbac.yaml does not allow {seen:?}");
    }
}
