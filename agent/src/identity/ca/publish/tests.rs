//! Several replicas of a CA on one API server: one key, one publisher, one trust bundle everywhere.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    api::{core::v1::Secret, rbac::v1::PolicyRule},
    serde_json::{Value, json},
};
use tokio::task::JoinHandle;

use super::{
    stand_in::{ApiServer, Asked},
    *,
};
use crate::identity::{
    ca::{
        CaError, pem,
        source::{BUNDLE, CERTIFICATE, KEY, KeySource},
    },
    tests::support::{TestRoot, trust_domain, within},
};

const OWN: &str = "heddle-system";
const SECRET: &str = "heddle-ca";
const PATIENCE: Duration = Duration::from_secs(30);

fn source() -> KeySource {
    KeySource::Secret { namespace: OWN.to_owned(), name: SECRET.to_owned(), lifetime: Duration::from_secs(86_400) }
}

async fn open(api: &ApiServer) -> Result<Arc<Keys>, CaError> {
    Keys::open(source(), &trust_domain(), Some(&api.client)).await.map(Arc::new)
}

/// A replica: its key, followed and published until it is dropped.
struct Replica {
    keys: Arc<Keys>,
    stop: CancellationToken,
    publishing: Option<JoinHandle<()>>,
}

impl Replica {
    async fn start(api: &ApiServer) -> Self {
        let keys = open(api).await.unwrap();
        let stop = CancellationToken::new();
        let publisher = Publisher::new(Arc::clone(&keys), None, Some((api.client.clone(), OWN))).unwrap();
        let (followed, following) = (Arc::clone(&keys), stop.clone());
        tokio::spawn(async move { followed.follow(following).await });
        let publishing = Some(tokio::spawn(publisher.run(stop.clone())));
        Self { keys, stop, publishing }
    }

    fn bundle(&self) -> String {
        self.keys.current().bundle_pem()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn namespace(api: &ApiServer, name: &str, labels: Value) {
    api.put("namespaces", "", json!({"metadata": {"name": name, "labels": labels}}));
}

fn published(api: &ApiServer, namespace: &str) -> Option<String> {
    Some(api.get("configmaps", namespace, config_maps::NAME)?["data"][config_maps::KEY].as_str()?.to_owned())
}

fn secret_of(api: &ApiServer) -> Secret {
    serde_json::from_value(api.get("secrets", OWN, SECRET).unwrap()).unwrap()
}

#[tokio::test]
async fn replicas_that_start_at_once_make_one_key() {
    let api = ApiServer::start().await;
    let opened = futures::future::join_all((0..8).map(|_| open(&api))).await;
    let chains: Vec<_> = opened.into_iter().map(|keys| keys.unwrap().current().chain.clone()).collect();
    assert!(chains.iter().all(|chain| *chain == chains[0]), "replicas have different roots");
    let secret = secret_of(&api);
    assert_eq!(secret.type_.as_deref(), Some("kubernetes.io/tls"));
    assert_eq!(secret.data.unwrap().keys().collect::<Vec<_>>(), [BUNDLE, CERTIFICATE, KEY]);
}

#[tokio::test]
async fn a_secret_that_makes_no_sense_is_told_and_never_overwritten() {
    let api = ApiServer::start().await;
    api.put("secrets", OWN, json!({"metadata": {"name": SECRET}, "data": {"tls.crt": "bm90aGluZw=="}}));
    let before = api.get("secrets", OWN, SECRET);
    let error = open(&api).await.map(drop).unwrap_err();
    assert_eq!(
        error.to_string().split(';').next().unwrap(),
        "tls.crt of Secret heddle-system/heddle-ca: holds no certificates in PEM: none"
    );
    assert_eq!(api.get("secrets", OWN, SECRET), before);
    api.break_down(true);
    let error = open(&api).await.map(drop).unwrap_err();
    assert_eq!(error.reason(), "unreadable", "{error}");
    assert!(error.to_string().starts_with("Secret heddle-system/heddle-ca: can't be read"), "{error}");
}

#[tokio::test]
async fn a_changed_secret_is_followed_by_all_and_a_bad_one_by_none() {
    let api = ApiServer::start().await;
    let replicas = [Replica::start(&api).await, Replica::start(&api).await];
    let first = replicas[0].bundle();
    let good = api.get("secrets", OWN, SECRET).unwrap();
    let mut bad = good.clone();
    bad["data"].as_object_mut().unwrap().remove(KEY);
    api.put("secrets", OWN, bad);
    for replica in &replicas {
        within(PATIENCE, "the bad Secret noticed", || replica.keys.status().bad.is_some()).await;
        let bad = replica.keys.status().bad.unwrap().to_string();
        assert!(bad.starts_with("tls.key of Secret heddle-system/heddle-ca: is missing; "), "{bad}");
        assert_eq!(replica.bundle(), first);
    }
    api.remove("secrets", OWN, SECRET);
    for replica in &replicas {
        let gone = || replica.keys.status().bad.is_some_and(|bad| bad.place.starts_with(CERTIFICATE));
        within(PATIENCE, "the Secret's end noticed", gone).await;
        assert_eq!(replica.bundle(), first);
    }
    let next = TestRoot::new("next root");
    let data = [(CERTIFICATE, next.certificate.pem()), (KEY, next.key.serialize_pem())]
        .map(|(key, text)| (key.to_owned(), k8s_openapi::ByteString(text.into_bytes())));
    let secret = Secret { data: Some(data.into()), ..Secret::default() };
    let mut secret = serde_json::to_value(secret).unwrap();
    secret["metadata"]["name"] = json!(SECRET);
    api.put("secrets", OWN, secret);
    for replica in &replicas {
        within(PATIENCE, "the new root in force", || replica.bundle() == pem(next.certificate.der())).await;
        assert_eq!(replica.keys.status().bad, None);
    }
}

#[tokio::test]
async fn enrolled_namespaces_get_the_bundle_from_the_one_that_holds_the_lease() {
    let api = ApiServer::start().await;
    namespace(&api, "shop", json!({"heddle.dev/mesh": "enabled"}));
    namespace(&api, "left", json!({"heddle.dev/mesh": "disabled"}));
    namespace(&api, "apart", json!({}));
    let mut replicas = [Replica::start(&api).await, Replica::start(&api).await];
    let bundle = replicas[0].bundle();
    let there = |name: &str| published(&api, name).is_some_and(|there| there == bundle);
    within(PATIENCE, "the bundle in both namespaces", || there(OWN) && there("shop")).await;
    assert_eq!((published(&api, "left"), published(&api, "apart")), (None, None));
    let holder = || api.get("leases", OWN, lease::NAME).unwrap()["spec"]["holderIdentity"].as_str().map(str::to_owned);
    let first = holder().unwrap();

    // What somebody else wrote, or took away, is put right; a namespace that joins gets it.
    api.put("configmaps", "shop", json!({"metadata": {"name": config_maps::NAME}, "data": {"root-cert.pem": "mine"}}));
    api.remove("configmaps", OWN, config_maps::NAME);
    namespace(&api, "late", json!({"heddle.dev/mesh": "enabled"}));
    within(PATIENCE, "the bundle put right", || there(OWN) && there("shop") && there("late")).await;
    assert_eq!(holder().unwrap(), first, "the Lease stays where it is");

    // Nothing is written while nothing differs.
    let version =
        |name: &str| api.get("configmaps", name, config_maps::NAME).unwrap()["metadata"]["resourceVersion"].clone();
    let before = version("shop");
    tokio::time::sleep(limits::CONFIG_MAP_LOOK + Duration::from_secs(3)).await;
    assert_eq!(version("shop"), before);

    // The holder ends, and gives the Lease back: the other takes over well before the Lease would have ended.
    for replica in &mut replicas {
        replica.stop.cancel();
        replica.publishing.take().unwrap().await.unwrap();
    }
    assert_eq!(holder(), None);
    let third = Replica::start(&api).await;
    namespace(&api, "later", json!({"heddle.dev/mesh": "enabled"}));
    within(limits::LEASE, "the next holder's work", || published(&api, "later") == Some(third.bundle())).await;
    assert!(holder().is_some_and(|holder| holder != first));
    allowed_by_the_manifests(&api);
}

/// Everything that was asked is allowed by `deploy/ca/rbac.yaml`, to the letter.
fn allowed_by_the_manifests(api: &ApiServer) {
    let text = include_str!("../../../../../deploy/ca/rbac.yaml");
    let mut rules: Vec<(String, PolicyRule)> = Vec::new();
    for document in serde_saphyr::from_multiple::<Value>(text).unwrap() {
        let namespace = document["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        for rule in document["rules"].as_array().into_iter().flatten() {
            rules.push((namespace.clone(), serde_json::from_value(rule.clone()).unwrap()));
        }
    }
    let has = |list: &Option<Vec<String>>, wanted: &str| {
        list.as_ref().is_some_and(|list| list.iter().any(|one| one == wanted))
    };
    for asked in api.asked() {
        let Asked { verb, group, resource, namespace, name } = &asked;
        let allowed = rules.iter().any(|(place, rule)| {
            let named = rule.resource_names.is_none() || has(&rule.resource_names, name);
            (place.is_empty() || place == namespace)
                && rule.verbs.iter().any(|one| one == verb)
                && has(&rule.api_groups, group)
                && has(&rule.resources, resource)
                && named
        });
        assert!(allowed, "the CA asks for what deploy/ca/rbac.yaml does not allow: {asked:?}");
    }
    for (_, rule) in &rules {
        assert!(!rule.verbs.iter().any(|verb| verb == "*") && !has(&rule.resources, "*"), "{rule:?}");
        let guarded = ["secrets", "configmaps", "leases"].iter().any(|resource| has(&rule.resources, resource));
        let only_makes = rule.verbs == ["create"];
        assert!(!guarded || only_makes || rule.resource_names.is_some(), "any of them: {rule:?}");
    }
}
