use std::{collections::HashSet, fs, sync::Arc, time::Duration};

use rcgen::KeyPair;
use tokio::time::sleep;

use super::support::{Leaf, Mesh, TestRoot, handshake, id, within};
use crate::identity::{
    Certificates, FetchError, IdentityError, SpiffeId,
    answer::check,
    handshake_reason,
    key::WorkloadKey,
    roots::{TrustBundle, hex},
};

const HOUR: Duration = Duration::from_secs(3_600);

fn serial(node: &Certificates, identity: &SpiffeId) -> String {
    node.list().into_iter().find(|status| status.identity == *identity).map(|status| status.serial).unwrap_or_default()
}

async fn works(node: &Certificates, own: &SpiffeId, peer: &SpiffeId) {
    let outcome = handshake(node.client(own, peer).await.unwrap(), node.server(peer).await.unwrap()).await;
    assert_eq!((outcome.client.unwrap(), outcome.server.unwrap()), (peer.clone(), own.clone()));
}

#[tokio::test]
async fn a_connection_that_is_early_waits_for_its_certificate() {
    let mesh = Mesh::start(HOUR).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[]);
    let early = tokio::spawn({
        let (node, web, db) = (node.clone(), web.clone(), db.clone());
        async move { node.client(&web, &db).await }
    });
    sleep(Duration::from_millis(100)).await;
    assert!(!early.is_finished());
    node.keep(HashSet::from([web.clone()]));
    early.await.unwrap().unwrap();
    let list = node.list();
    assert_eq!(list.len(), 1);
    let status = &list[0];
    let life = status.not_after.unwrap().duration_since(status.not_before.unwrap()).unwrap();
    assert!(life >= HOUR && life <= HOUR + Duration::from_secs(122), "{life:?}");
    assert_eq!((status.serial.len(), status.last_error.as_str()), (32, ""));
    assert_eq!(node.roots().len(), 1);
    assert!(node.nearest_expiry().unwrap() <= HOUR);
}

#[tokio::test]
async fn a_certificate_is_renewed_at_half_life_and_no_handshake_fails() {
    let mesh = Mesh::start(Duration::from_secs(4)).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web, &db]);
    // Taken once: settings live through rotations.
    let (client, server) = (node.client(&web, &db).await.unwrap(), node.server(&db).await.unwrap());
    let mut serials = HashSet::new();
    for _ in 0..32 {
        let outcome = handshake(Arc::clone(&client), Arc::clone(&server)).await;
        outcome.client.unwrap();
        outcome.server.unwrap();
        serials.insert(serial(&node, &web));
        sleep(Duration::from_millis(100)).await;
    }
    assert!((2..=4).contains(&serials.len()), "{} certificates in 3.2 s of 4 s each", serials.len());
}

#[tokio::test]
async fn while_the_ca_is_down_the_old_certificate_serves_and_it_is_renewed_after_its_return() {
    let mut mesh = Mesh::start(Duration::from_secs(8)).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web, &db]);
    works(&node, &web, &db).await;
    let before = serial(&node, &web);
    mesh.stop_ca().await;
    within(Duration::from_secs(6), "a failed renewal is on show", || {
        node.list().iter().any(|status| !status.last_error.is_empty())
    })
    .await;
    works(&node, &web, &db).await;
    assert_eq!(serial(&node, &web), before);
    mesh.start_ca().await;
    within(Duration::from_secs(5), "both are renewed after the CA's return", || {
        serial(&node, &web) != before && node.list().iter().all(|status| status.last_error.is_empty())
    })
    .await;
    works(&node, &web, &db).await;
}

#[tokio::test]
async fn an_expired_certificate_is_never_presented() {
    let mut mesh = Mesh::start(Duration::from_secs(2)).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web, &db]);
    let (client, server) = (node.client(&web, &db).await.unwrap(), node.server(&db).await.unwrap());
    mesh.stop_ca().await;
    within(Duration::from_secs(4), "the certificate expires", || {
        node.list().iter().all(|status| status.not_after.unwrap() <= std::time::SystemTime::now())
    })
    .await;
    let outcome = handshake(client, server).await;
    assert_eq!(handshake_reason(&outcome.server.unwrap_err()), "no_certificate");
    let error = node.server(&db).await.unwrap_err();
    assert_eq!(error.reason(), "certificate_expired", "{error}");
}

#[tokio::test]
async fn an_identity_that_leaves_takes_its_key_with_it() {
    let mesh = Mesh::start(HOUR).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web, &db]);
    let (client, server) = (node.client(&web, &db).await.unwrap(), node.server(&db).await.unwrap());
    let used = handshake(Arc::clone(&client), Arc::clone(&server)).await;
    used.server.unwrap();
    node.keep(HashSet::from([web.clone()]));
    // Also settings that a connection took before have no key any more.
    let outcome = handshake(client, server).await;
    assert_eq!(handshake_reason(&outcome.server.unwrap_err()), "no_certificate");
    assert_eq!(node.list().len(), 1);
    assert!(matches!(node.server(&db).await, Err(IdentityError::NotOurs(_))));
}

#[tokio::test]
async fn without_the_right_token_there_is_no_certificate() {
    let mesh = Mesh::start(HOUR).await;
    let web = id("shop", "web");
    let mut config = mesh.client_config();
    config.token_file = mesh.path("other-token");
    fs::write(&config.token_file, "another-token").unwrap();
    let node = Certificates::start(config).unwrap();
    node.keep(HashSet::from([web.clone()]));
    within(Duration::from_secs(3), "the refusal is on show", || node.list()[0].last_error.contains("refused")).await;
    assert_eq!(serial(&node, &web), "");
    // The token is read again each time.
    fs::write(mesh.path("other-token"), super::support::TOKEN).unwrap();
    within(Duration::from_secs(4), "the right token works", || !serial(&node, &web).is_empty()).await;
}

#[tokio::test]
async fn a_new_root_renews_every_certificate_that_it_did_not_sign() {
    let mut mesh = Mesh::start(HOUR).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web, &db]);
    works(&node, &web, &db).await;
    let before = [serial(&node, &web), serial(&node, &db)];
    mesh.stop_ca().await;
    mesh.root = TestRoot::new("new root");
    mesh.start_ca().await;
    within(Duration::from_secs(8), "both are renewed", || {
        serial(&node, &web) != before[0] && serial(&node, &db) != before[1]
    })
    .await;
    works(&node, &web, &db).await;
    assert_eq!(node.roots().len(), 1);
    assert_eq!(node.roots()[0].subject, "CN=new root");
}

#[tokio::test]
async fn a_broken_trust_bundle_leaves_the_last_good_one_in_force() {
    let mesh = Mesh::start(HOUR).await;
    let (web, db) = (id("shop", "web"), id("shop", "db"));
    let node = mesh.node(&[&web, &db]);
    works(&node, &web, &db).await;
    let bundle = TrustBundle::new(mesh.path("root.pem"));
    bundle.reload().unwrap();
    let leaf = mesh.root.sign(&Leaf::default().params(), &KeyPair::generate().unwrap());
    for broken in
        ["", "no pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", &super::super::ca::pem(&leaf)]
    {
        fs::write(mesh.path("root.pem"), broken).unwrap();
        assert_eq!(bundle.reload().unwrap_err().reason(), "roots_invalid", "{broken:?}");
        assert_eq!(bundle.current().load().status().len(), 1);
    }
    works(&node, &web, &db).await;
}

/// What a CA that errs or lies may answer.
#[test]
fn an_answer_for_someone_else_is_not_used() {
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    let path = directory.path().join("root.pem");
    let root = TestRoot::new("test root");
    fs::write(&path, root.certificate.pem()).unwrap();
    let bundle = TrustBundle::new(path);
    bundle.reload().unwrap();
    let web = id("shop", "web");
    let now = std::time::SystemTime::now();
    let pem = super::super::ca::pem;
    let root_pem = root.certificate.pem();
    let other = KeyPair::generate().unwrap();
    let reason = |chain: &[String]| {
        let key = WorkloadKey::generate().unwrap();
        check(chain, &web, key, &bundle, now).map(|_| ()).map_err(|error: FetchError| error.reason())
    };
    let signed = |leaf: Leaf<'_>| vec![pem(&root.sign(&leaf.params(), &other)), root_pem.clone()];
    assert_eq!(reason(&signed(Leaf::default())), Err("answer_wrong_key"));
    assert_eq!(
        reason(&signed(Leaf { uris: &["spiffe://mesh.test/ns/shop/sa/admin"], ..Leaf::default() })),
        Err("answer_wrong_identity")
    );
    assert_eq!(reason(&signed(Leaf { valid: (-9, -3), ..Leaf::default() })), Err("answer_untrusted"));
    let foreign = TestRoot::new("foreign").sign(&Leaf::default().params(), &other);
    assert_eq!(reason(&[pem(&foreign), root_pem.clone()]), Err("answer_untrusted"));
    assert_eq!(reason(&[]), Err("answer_malformed"));
    assert_eq!(reason(&["garbage".to_owned()]), Err("answer_malformed"));
    assert_eq!(reason(&vec![root_pem.clone(); 17]), Err("answer_malformed"));
    assert_eq!(hex(&[0, 255]), "00ff");
}

#[tokio::test]
async fn an_address_that_can_not_be_one_is_an_error_at_once() {
    let mesh = Mesh::start(HOUR).await;
    for address in ["", "http://127.0.0.1:1", "127.0.0.1:15012", "https://"] {
        let mut config = mesh.client_config();
        config.address = address.to_owned();
        let error = Certificates::start(config).map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), "ca_address", "{address:?}");
    }
}
