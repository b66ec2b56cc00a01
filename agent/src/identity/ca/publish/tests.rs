//! Several replicas of a CA on one API server: one key, one publisher, one trust bundle everywhere.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    api::core::v1::Secret,
    serde_json::{Value, json},
};
use tokio::task::JoinHandle;

use super::*;
use crate::{
    cluster::kubernetes::stand_in::{ApiServer, Fault},
    identity::{
        ca::{
            CaError, pem,
            source::{BUNDLE, CERTIFICATE, KEY, KeySource},
            tests::api_server_and_client,
        },
        tests::support::{TestRoot, trust_domain, within},
    },
};

const OWN: &str = "heddle-system";
const SECRET: &str = "heddle-ca";
const PATIENCE: Duration = Duration::from_secs(30);

fn source() -> KeySource {
    KeySource::Secret { namespace: OWN.to_owned(), name: SECRET.to_owned(), lifetime: Duration::from_secs(86_400) }
}

async fn open(client: &kube::Client) -> Result<Arc<Keys>, CaError> {
    Keys::open(source(), &trust_domain(), Some(client)).await.map(Arc::new)
}

/// A replica: its key, followed and published until it is dropped.
struct Replica {
    keys: Arc<Keys>,
    stop: CancellationToken,
    publishing: Option<JoinHandle<()>>,
}

impl Replica {
    async fn start(client: &kube::Client) -> Self {
        let keys = open(client).await.unwrap();
        let stop = CancellationToken::new();
        let publisher = Publisher::new(Arc::clone(&keys), None, Some((client.clone(), OWN))).unwrap();
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
    api.put_as("namespaces", json!({"metadata": {"name": name, "labels": labels}}));
}

fn published(api: &ApiServer, namespace: &str) -> Option<String> {
    Some(api.get("configmaps", namespace, config_maps::NAME)?["data"][config_maps::KEY].as_str()?.to_owned())
}

fn secret_of(api: &ApiServer) -> Secret {
    serde_json::from_value(api.get("secrets", OWN, SECRET).unwrap()).unwrap()
}

#[tokio::test]
async fn replicas_that_start_at_once_make_one_key() {
    let (api, client) = api_server_and_client().await;
    let opened = futures::future::join_all((0..8).map(|_| open(&client))).await;
    let chains: Vec<_> = opened.into_iter().map(|keys| keys.unwrap().current().chain.clone()).collect();
    assert!(chains.iter().all(|chain| *chain == chains[0]), "replicas have different roots");
    let secret = secret_of(&api);
    assert_eq!(secret.type_.as_deref(), Some("kubernetes.io/tls"));
    assert_eq!(secret.data.unwrap().keys().collect::<Vec<_>>(), [BUNDLE, CERTIFICATE, KEY]);
}

#[tokio::test]
async fn a_secret_that_makes_no_sense_is_told_and_never_overwritten() {
    let (api, client) = api_server_and_client().await;
    let metadata = json!({"namespace": OWN, "name": SECRET});
    api.put_as("secrets", json!({"metadata": metadata, "data": {"tls.crt": "bm90aGluZw=="}}));
    let before = api.get("secrets", OWN, SECRET);
    let error = open(&client).await.map(drop).unwrap_err();
    assert_eq!(
        error.to_string().split(';').next().unwrap(),
        "tls.crt of Secret heddle-system/heddle-ca: holds no certificates in PEM: none"
    );
    assert_eq!(api.get("secrets", OWN, SECRET), before);
    api.break_down(Some(Fault::Status(500)));
    let error = open(&client).await.map(drop).unwrap_err();
    assert_eq!(error.reason(), "unreadable", "{error}");
    assert!(error.to_string().starts_with("Secret heddle-system/heddle-ca: can't be read"), "{error}");
}

#[tokio::test]
async fn a_changed_secret_is_followed_by_all_and_a_bad_one_by_none() {
    let (api, client) = api_server_and_client().await;
    let replicas = [Replica::start(&client).await, Replica::start(&client).await];
    let first = replicas[0].bundle();
    let good = api.get("secrets", OWN, SECRET).unwrap();
    let mut bad = good.clone();
    bad["data"].as_object_mut().unwrap().remove(KEY);
    api.put(bad);
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
    secret["metadata"] = json!({"namespace": OWN, "name": SECRET});
    api.put(secret);
    for replica in &replicas {
        within(PATIENCE, "the new root in force", || replica.bundle() == pem(next.certificate.der())).await;
        assert_eq!(replica.keys.status().bad, None);
    }
}

#[tokio::test]
async fn enrolled_namespaces_get_the_bundle_from_the_one_that_holds_the_lease() {
    let (api, client) = api_server_and_client().await;
    namespace(&api, "shop", json!({"heddle.dev/mesh": "enabled"}));
    namespace(&api, "left", json!({"heddle.dev/mesh": "disabled"}));
    namespace(&api, "apart", json!({}));
    let mut replicas = [Replica::start(&client).await, Replica::start(&client).await];
    let bundle = replicas[0].bundle();
    let there = |name: &str| published(&api, name).is_some_and(|there| there == bundle);
    within(PATIENCE, "the bundle in both namespaces", || there(OWN) && there("shop")).await;
    assert_eq!((published(&api, "left"), published(&api, "apart")), (None, None));
    let holder = || api.get("leases", OWN, lease::NAME).unwrap()["spec"]["holderIdentity"].as_str().map(str::to_owned);
    let first = holder().unwrap();

    // A namespace that leaves loses it, unless somebody else made it; a pod's own label does for its namespace, where that
    // does not say no.
    let pod = |namespace: &str, name: &str| {
        let metadata = json!({"namespace": namespace, "name": name, "labels": {"heddle.dev/mesh": "enabled"}});
        api.put_as("pods", json!({ "metadata": metadata }));
    };
    let theirs = |namespace: &str| {
        let metadata = json!({"namespace": namespace, "name": config_maps::NAME});
        api.put_as("configmaps", json!({"metadata": metadata, "data": {"root-cert.pem": "mine"}}));
    };
    pod("apart", "alone");
    pod("left", "stubborn");
    theirs("foreign");
    within(PATIENCE, "the bundle beside the one pod", || there("apart")).await;
    assert_eq!(published(&api, "left"), None);
    api.remove("pods", "apart", "alone");
    within(PATIENCE, "the bundle gone with the pod", || published(&api, "apart").is_none()).await;
    namespace(&api, "shop", json!({}));
    within(PATIENCE, "the bundle gone with the label", || published(&api, "shop").is_none()).await;
    assert_eq!(published(&api, "foreign").as_deref(), Some("mine"), "what somebody else made stays");
    namespace(&api, "shop", json!({"heddle.dev/mesh": "enabled"}));
    within(PATIENCE, "the bundle back", || there("shop")).await;

    // What somebody else wrote, or took away, is put right; a namespace that joins gets it.
    theirs("shop");
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
    let third = Replica::start(&client).await;
    namespace(&api, "later", json!({"heddle.dev/mesh": "enabled"}));
    within(limits::LEASE, "the next holder's work", || published(&api, "later") == Some(third.bundle())).await;
    assert!(holder().is_some_and(|holder| holder != first));
}

#[tokio::test]
async fn a_holder_that_dies_without_a_word_is_succeeded_when_its_lease_is_over_and_no_sooner() {
    let (api, client) = api_server_and_client().await;
    let mut first = Replica::start(&client).await;
    let holder = || api.get("leases", OWN, lease::NAME).map(|lease| lease["spec"]["holderIdentity"].clone());
    within(PATIENCE, "a holder", || holder().is_some()).await;
    let dead = holder();
    // As a node that loses its power: nothing is given back.
    first.publishing.take().unwrap().abort();
    let died = Instant::now();
    let second = Replica::start(&client).await;
    namespace(&api, "shop", json!({"heddle.dev/mesh": "enabled"}));
    within(limits::LEASE + PATIENCE, "another holder", || holder() != dead).await;
    let took = died.elapsed();
    println!("taken over {took:?} after the holder died; a Lease is {:?} long", limits::LEASE);
    assert!(took >= limits::LEASE, "{took:?}");
    within(PATIENCE, "the successor's work", || published(&api, "shop") == Some(second.bundle())).await;
}

#[tokio::test]
async fn a_holder_that_comes_back_finds_that_it_is_none() {
    let (_api, client) = api_server_and_client().await;
    let [mut one, mut other] = [(); 2].map(|()| lease::Lease::new(client.clone(), OWN));
    assert!(one.hold().await);
    let stood_still = Instant::now();
    while !other.hold().await {
        assert!(stood_still.elapsed() < limits::LEASE + PATIENCE);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(stood_still.elapsed() >= limits::LEASE);
    assert!(!one.hold().await, "two holders");
    assert!(other.hold().await);
}
