//! Several names of one trust domain.

use std::{sync::Arc, time::Duration};

use super::support::{Leaf, Mesh, TestRoot, handshake, id};
use crate::identity::{SpiffeId, TrustConfig, TrustDomains, handshake_reason, tls, verify::ExpectedServer};

fn domains(aliases: &[&str]) -> TrustDomains {
    let aliases: Vec<_> = aliases.iter().map(|alias| alias.parse().unwrap()).collect();
    TrustDomains::new("new.test".parse().unwrap(), &aliases)
}

fn parse(id: &str) -> SpiffeId {
    id.parse().unwrap()
}

#[test]
fn an_identity_is_the_same_by_whichever_name_of_ours_and_by_no_other() {
    let (ours, alone) = (domains(&["old.test", "older.test"]), domains(&[]));
    let [new, old, other, neighbour] = [
        "spiffe://new.test/ns/shop/sa/web",
        "spiffe://old.test/ns/shop/sa/web",
        "spiffe://other.test/ns/shop/sa/web",
        "spiffe://old.test/ns/shop/sa/web-2",
    ]
    .map(parse);
    assert!(ours.same(&new, &old) && ours.same(&old, &new) && ours.same(&old, &old));
    assert!(!alone.same(&new, &old) && alone.same(&new, &new));
    assert!(!ours.same(&new, &other) && !ours.same(&other, &new) && !ours.same(&new, &neighbour));
    assert!(ours.include(&old) && !ours.include(&other) && !alone.include(&old));
    // The end of a name is no name.
    assert!(!domains(&["test"]).include(&old) && !domains(&["old.test.evil"]).include(&old));
}

#[tokio::test]
async fn peers_of_an_alias_are_accepted_by_both_sides_and_others_by_none() {
    let mesh = Mesh::start(Duration::from_secs(3_600)).await;
    let db = id("shop", "db");
    let trust = TrustConfig { aliases: vec!["old.test".parse().unwrap()], crl: None };
    let (node, plain) = (mesh.node_with(trust, &[&db]), mesh.node(&[&db]));
    let leaf = |uri| mesh.root.leaf(&Leaf { uris: &[uri], ..Leaf::default() });
    let by_hand = |root: &TestRoot, own| {
        let trust = super::support::trust(&[root]);
        Arc::new(tls::client_config(Arc::new(ExpectedServer { expected: id("shop", "db"), trust }), own).unwrap())
    };
    let (old, other) = ("spiffe://old.test/ns/shop/sa/web", "spiffe://other.test/ns/shop/sa/web");
    let knock = async |node: &crate::identity::Certificates, uri| {
        handshake(by_hand(&mesh.root, leaf(uri)), node.server(&db).await.unwrap()).await.server
    };
    assert_eq!(knock(&node, old).await.unwrap(), parse(old), "known by the name that it presents");
    assert_eq!(handshake_reason(&knock(&node, other).await.unwrap_err()), "trust_domain");
    assert_eq!(handshake_reason(&knock(&plain, old).await.unwrap_err()), "trust_domain");

    // The server that is meant may still have its old name, or another workload's new one.
    let serve = |uri| {
        let trust = super::support::trust(&[&mesh.root]);
        Arc::new(tls::server_config(Arc::new(crate::identity::verify::MeshClient { trust }), leaf(uri)).unwrap())
    };
    let reach = async |node: &crate::identity::Certificates, uri| {
        handshake(node.client(&db, &db).await.unwrap(), serve(uri)).await.client
    };
    assert!(reach(&node, "spiffe://old.test/ns/shop/sa/db").await.is_ok());
    for (uri, of) in [
        ("spiffe://old.test/ns/shop/sa/web", &node),
        ("spiffe://other.test/ns/shop/sa/db", &node),
        ("spiffe://old.test/ns/shop/sa/db", &plain),
    ] {
        assert_eq!(handshake_reason(&reach(of, uri).await.unwrap_err()), "wrong_identity", "{uri}");
    }
}
