//! Everything that a CA asks the API server for while it does all that it does, held against `deploy/ca/rbac.yaml`: it is allowed to
//! the letter, and nothing more is allowed.

use std::time::Duration;

use k8s_openapi::api::rbac::v1::PolicyRule;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};

use super::{
    HOUR, WEB, api_server,
    apiserver::{Seen, Token, pod},
    named,
    nodes::nodes,
    plain_csr, request,
};
use crate::identity::{
    ca::{Ca, CaConfig, KeySource},
    proto::istio_certificate_service_client::IstioCertificateServiceClient,
    tests::support::within,
};

const OWN: &str = "heddle-system";
const BUNDLE: &str = "heddle-ca-root";
const PATIENCE: Duration = Duration::from_secs(60);

/// A rule and the namespace that it holds in; everywhere where that is empty.
type Rule = (String, PolicyRule);

fn rules() -> Vec<Rule> {
    let text = include_str!("../../../../../deploy/ca/rbac.yaml");
    let mut rules = Vec::new();
    for document in serde_saphyr::from_multiple::<Value>(text).unwrap() {
        let namespace = document["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        for rule in document["rules"].as_array().into_iter().flatten() {
            rules.push((namespace.clone(), serde_json::from_value(rule.clone()).unwrap()));
        }
    }
    rules
}

fn has(list: &Option<Vec<String>>, wanted: &str) -> bool {
    list.as_ref().is_some_and(|list| list.iter().any(|one| one == wanted))
}

/// Whether the rule is one for this request, by this verb and resource.
fn allows((place, rule): &Rule, asked: &Seen) -> bool {
    (place.is_empty() || *place == asked.namespace)
        && rule.verbs.iter().any(|verb| verb == asked.verb)
        && has(&rule.api_groups, &asked.group)
        && has(&rule.resources, &asked.whole_resource())
        && (rule.resource_names.is_none() || has(&rule.resource_names, &asked.name))
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_a_ca_asks_for_is_allowed_and_nothing_else_is() {
    let (api, directory) = api_server().await;
    api.put(pod(OWN, "heddle-a", "agent-1", "heddle", "node-1"));
    api.put(pod("shop", "web-0", "web-0", "web", "node-1"));
    let mesh = |enabled: &str| {
        let metadata = json!({"name": "shop", "labels": {"heddle.dev/mesh": enabled}});
        api.put_as("namespaces", json!({ "metadata": metadata }));
    };
    mesh("enabled");
    let ca = Ca::bind(CaConfig {
        root: KeySource::Secret { namespace: OWN.to_owned(), name: "heddle-ca".to_owned(), lifetime: HOUR },
        ..nodes(&directory)
    })
    .await
    .unwrap();
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.root_pem())).domain_name("ca.test");
    let channel = Channel::from_shared(format!("https://{}", ca.address())).unwrap().tls_config(tls).unwrap();
    let (channel, vitals, stop) = (channel.connect_lazy(), ca.vitals(), CancellationToken::new());
    let running = tokio::spawn(ca.run(stop.clone().cancelled_owned()));
    within(PATIENCE, "the pods", || vitals.waiting_for().is_empty()).await;

    // Requests: what the watch knows, what it does not know, and a caller that it does not know.
    let ask = async |token: &str, identity: &str| {
        let mut asked = tonic::Request::new(request(plain_csr(), named(identity), 60));
        asked.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let mut client = IstioCertificateServiceClient::new(channel.clone());
        client.create_certificate(asked).await.map(drop).map_err(|status| status.code())
    };
    let [known, unknown] = ["heddle-a", "heddle-z"].map(|pod| api.issue(Token::of(OWN, "heddle", pod, "agent-1")));
    ask(&known, WEB).await.unwrap();
    let refused = Err(tonic::Code::Unauthenticated);
    assert_eq!(ask(&known, "spiffe://mesh.test/ns/shop/sa/api").await, refused);
    assert_eq!(ask(&unknown, WEB).await, refused);

    // The trust bundle: made, put right, and taken away again.
    let there = || api.get("configmaps", "shop", BUNDLE);
    within(PATIENCE, "the bundle", || there().is_some() && api.get("configmaps", OWN, BUNDLE).is_some()).await;
    let published = there().unwrap()["data"].clone();
    api.put_as("configmaps", json!({"metadata": {"namespace": "shop", "name": BUNDLE}, "data": {}}));
    within(PATIENCE, "the bundle put right", || there().is_some_and(|map| map["data"] == published)).await;
    mesh("disabled");
    within(PATIENCE, "the bundle gone", || there().is_none()).await;
    stop.cancel();
    running.await.unwrap().unwrap();

    let (rules, asked) = (rules(), api.verbs_seen());
    for asked in &asked {
        assert!(rules.iter().any(|rule| allows(rule, asked)), "deploy/ca/rbac.yaml does not allow {asked:?}");
    }
    for rule in &rules {
        let guarded = ["secrets", "configmaps", "leases"].iter().any(|resource| has(&rule.1.resources, resource));
        let only_makes = rule.1.verbs == ["create"];
        assert!(!guarded || only_makes || rule.1.resource_names.is_some(), "any of them: {rule:?}");
        // What is written into policies' status is asked for beside the server: see `life/policy_status/tests.rs`.
        if rule.1.api_groups.iter().flatten().any(|group| group == "security.istio.io") {
            continue;
        }
        for verb in &rule.1.verbs {
            for resource in rule.1.resources.iter().flatten() {
                let used =
                    |asked: &Seen| allows(rule, asked) && asked.verb == *verb && asked.whole_resource() == *resource;
                assert!(asked.iter().any(used), "nobody needs {verb} of {resource}: {rule:?}");
            }
        }
    }
}
