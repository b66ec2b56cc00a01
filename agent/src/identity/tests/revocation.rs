//! What lists say, and what happens while they can't be used.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose, SerialNumber,
};
use rustls_pki_types::CertificateDer;

use super::support::{Leaf, Mesh, TestRoot, handshake, id, presented, trust, within};
use crate::identity::{
    Certificates, CrlConfig, CrlFailure, TrustConfig, handshake_reason,
    revocation::{Lists, Standing},
    roots::{span, unix_time},
    tls,
    verify::{ExpectedServer, MeshClient, Trust},
};

const HOUR: Duration = Duration::from_secs(3_600);
const SOON: i64 = 3_600;
const SIGNER: [KeyUsagePurpose; 2] = [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];

fn parse(pem: &str, roots: &[&TestRoot]) -> Result<Lists, &'static str> {
    let roots: Vec<_> = roots.iter().map(|root| root.certificate.der().clone()).collect();
    Lists::parse(pem.as_bytes(), &roots).map_err(|fault| fault.reason())
}

/// A leaf of the root, and what may be presented of it.
fn leaf(root: &TestRoot) -> (CertificateDer<'static>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    (root.sign(&Leaf::default().params(), &key), key)
}

fn under(roots: &[&TestRoot], crl: &str) -> Trust {
    let trust = trust(roots);
    trust.revocation.store(Arc::new(Standing::InForce(Arc::new(parse(crl, roots).unwrap()))));
    trust
}

/// How a server and a client that judge by `trust` end a handshake with one who presents this.
async fn both(trust: &Trust, chain: &[CertificateDer<'static>], key: &KeyPair) -> [Result<(), &'static str>; 2] {
    let own = || presented(chain.to_vec(), key);
    let expected = id("shop", "web");
    let accepting = Arc::new(tls::server_config(Arc::new(MeshClient { trust: trust.clone() }), own()).unwrap());
    let servers = ExpectedServer { expected, trust: trust.clone() };
    let asking = Arc::new(tls::client_config(Arc::new(servers), own()).unwrap());
    let outcome = handshake(asking, accepting).await;
    [outcome.server, outcome.client].map(|end| end.map(drop).map_err(|error| handshake_reason(&error)))
}

#[tokio::test]
async fn a_revoked_leaf_is_refused_by_both_sides_and_others_are_not() {
    let root = TestRoot::new("root");
    let ((bad, bad_key), (good, good_key)) = (leaf(&root), leaf(&root));
    let trust = under(&[&root], &root.crl(&[&bad], SOON));
    // The client judges first, and tells the server.
    assert_eq!(both(&trust, &[bad], &bad_key).await, [Err("alert_revoked"), Err("revoked")]);
    assert_eq!(both(&trust, &[good], &good_key).await, [Ok(()), Ok(())]);
}

#[tokio::test]
async fn a_revoked_client_is_told_so_by_the_server() {
    let mesh = Mesh::start(HOUR).await;
    let ((bad, bad_key), db) = (leaf(&mesh.root), id("shop", "db"));
    let crl = mesh.path("crl.pem");
    fs::write(&crl, mesh.root.crl(&[&bad], SOON)).unwrap();
    let node = mesh.node_with(asking(&crl, CrlFailure::Refuse), &[&db]);
    let client = ExpectedServer { expected: db.clone(), trust: trust(&[&mesh.root]) };
    let client = Arc::new(tls::client_config(Arc::new(client), presented(vec![bad], &bad_key)).unwrap());
    within(LOOKS, "the lists are in force", || !node.trust().crl.unwrap().refuses).await;
    let outcome = handshake(client, node.server(&db).await.unwrap()).await;
    assert_eq!(handshake_reason(&outcome.server.unwrap_err()), "revoked");
    assert_eq!(handshake_reason(&outcome.client.unwrap_err()), "alert_revoked");
}

#[tokio::test]
async fn a_revoked_intermediate_takes_all_below_it_along() {
    let root = TestRoot::new("root");
    let [bad, good] = ["bad", "good"].map(|name| root.intermediate(name, &SIGNER));
    let ((below_bad, bad_key), (below_good, good_key)) = (leaf(&bad), leaf(&good));
    let trust = under(&[&root], &root.crl(&[bad.certificate.der()], SOON));
    let chain = |leaf: &CertificateDer<'static>, issuer: &TestRoot| [leaf.clone(), issuer.certificate.der().clone()];
    assert_eq!(both(&trust, &chain(&below_bad, &bad), &bad_key).await[1], Err("revoked"));
    assert_eq!(both(&trust, &chain(&below_good, &good), &good_key).await, [Ok(()), Ok(())]);
    let then = unix_time(SystemTime::now());
    assert!(trust.revoked(&chain(&below_bad, &bad), then) && !trust.revoked(&chain(&below_good, &good), then));
}

#[tokio::test]
async fn an_intermediates_list_counts_where_its_certificate_stands_beside_it() {
    let root = TestRoot::new("root");
    let issuing = root.intermediate("issuing", &SIGNER);
    let (bad, bad_key) = leaf(&issuing);
    let crl = issuing.crl(&[&bad], SOON);
    assert_eq!(parse(&crl, &[&root]).err(), Some("crl_untrusted"), "nobody knows who signed it");
    let trust = under(&[&root], &format!("{crl}{}{}", issuing.certificate.pem(), root.crl(&[], SOON)));
    let chain = [bad, issuing.certificate.der().clone()];
    assert_eq!(both(&trust, &chain, &bad_key).await[1], Err("revoked"));
    // A CA that is not ours vouches for no list.
    let foreign = TestRoot::new("foreign").intermediate("issuing", &SIGNER);
    let forged = format!("{}{}", foreign.crl(&[], SOON), foreign.certificate.pem());
    assert_eq!(parse(&forged, &[&root]).err(), Some("crl_untrusted"));
}

#[test]
fn a_list_names_the_roots_that_vouch_for_it() {
    let (root, other) = (TestRoot::new("root"), TestRoot::new("other"));
    let serial = |root: &TestRoot| span(root.certificate.der()).unwrap().0;
    let roots = |pem: &str, ders: &[CertificateDer<'static>]| -> Vec<Vec<String>> {
        let lists = Lists::parse(pem.as_bytes(), ders).unwrap();
        lists.status().into_iter().map(|list| list.roots).collect()
    };
    let ders = [other.certificate.der().clone(), root.certificate.der().clone()];
    let issuing = root.intermediate("issuing", &SIGNER);
    let pem = [issuing.crl(&[], SOON), issuing.certificate.pem(), other.crl(&[], SOON)].concat();
    assert_eq!(roots(&pem, &ders), [[serial(&root)], [serial(&other)]]);
    // Renewed with its key: either certificate will do.
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.serial_number = Some(SerialNumber::from(7));
    let renewed = params.self_signed(&root.key).unwrap().der().clone();
    let ders = [root.certificate.der().clone(), renewed];
    assert_eq!(roots(&root.crl(&[], SOON), &ders), [[serial(&root), "07".to_owned()]]);
}

#[test]
fn a_list_speaks_only_of_what_its_own_key_signed() {
    // As in a rotation where both roots have one name; and the two leaves have one number.
    let [old, new] = [(); 2].map(|()| TestRoot::new("root"));
    let key = KeyPair::generate().unwrap();
    let mut params = Leaf::default().params();
    params.serial_number = Some(rcgen::SerialNumber::from(77));
    let [of_old, of_new] = [&old, &new].map(|root| root.sign(&params, &key));
    let trust = under(&[&old, &new], &(old.crl(&[&of_old], SOON) + &new.crl(&[], SOON)));
    let then = unix_time(SystemTime::now());
    assert!(trust.revoked(std::slice::from_ref(&of_old), then));
    assert!(!trust.revoked(&[of_new], then));
    // A certificate that has ended since is still known for what it was.
    params.not_after = time::OffsetDateTime::now_utc() - time::Duration::seconds(2);
    let ended = old.sign(&params, &key);
    assert!(trust.revoked(&[ended], unix_time(SystemTime::now() - Duration::from_secs(30))));
    // Roots that are gone revoke nobody.
    trust.roots.store(super::support::trust(&[&new]).roots.load_full());
    assert!(!trust.revoked(&[of_old], then));
}

#[test]
fn lists_that_can_t_be_used_say_why() {
    let (root, other) = (TestRoot::new("root"), TestRoot::new("root"));
    let good = root.crl(&[], SOON);
    assert!(parse(&good, &[&root]).is_ok());
    assert_eq!(parse(&good, &[]).err(), Some("crl_without_roots"));
    // The name is right, the key is not.
    assert_eq!(parse(&good, &[&other]).err(), Some("crl_untrusted"));
    assert_eq!(parse(&(good.clone() + &other.crl(&[], SOON)), &[&root]).err(), Some("crl_untrusted"), "one of two");
    // The name and the key are right, but the certificate does not let it sign lists.
    let named = root.intermediate("named", &SIGNER);
    let mute = root.certify("named", &[KeyUsagePurpose::KeyCertSign], &named.key);
    let crl = named.crl(&[], SOON) + &mute.pem();
    assert_eq!(parse(&crl, &[&root]).err(), Some("crl_not_a_signer"));
    for broken in ["", "no pem", &good[..good.len() / 2], &root.certificate.pem()] {
        assert_eq!(parse(broken, &[&root]).err(), Some("crl_invalid"), "{broken:?}");
    }
    let many = good.repeat(crate::life::limits::CRLS + 1);
    assert_eq!(parse(&many, &[&root]).err(), Some("crl_invalid"));
    let old = parse(&root.crl(&[], -60), &[&root]).unwrap();
    assert_eq!(old.expired(SystemTime::now()).map(|fault| fault.reason()), Some("crl_expired"));
    assert_eq!(old.expired(SystemTime::now() - Duration::from_secs(120)), None);
}

fn asking(crl: &Path, failure: CrlFailure) -> TrustConfig {
    TrustConfig { aliases: Vec::new(), crl: Some(CrlConfig { path: crl.to_owned(), failure }) }
}

fn problem(node: &Certificates) -> Option<&'static str> {
    node.trust().crl.unwrap().problem.map(|problem| problem.fault.reason())
}

async fn works(node: &Certificates) -> Result<(), &'static str> {
    let web = id("shop", "web");
    let (client, server) = (node.client(&web, &web).await.unwrap(), node.server(&web).await.unwrap());
    let outcome = handshake(client, server).await;
    outcome.client.map(drop).map_err(|error| handshake_reason(&error))
}

/// Longer than it takes to look at the file twice.
const LOOKS: Duration = Duration::from_secs(5);

#[tokio::test]
async fn lists_that_are_missing_or_broken_stop_new_handshakes_until_they_are_good() {
    let mesh = Mesh::start(HOUR).await;
    let crl = mesh.path("crl.pem");
    let node = mesh.node_with(asking(&crl, CrlFailure::Refuse), &[&id("shop", "web")]);
    within(LOOKS, "the file is missed", || problem(&node) == Some("crl_unreadable")).await;
    assert_eq!(works(&node).await, Err("revocation_unknown"));
    let told = node.trust().crl.unwrap().problem.unwrap().to_string();
    assert!(told.contains("crl.pem") && told.contains("put the file there") && !told.contains('\n'), "{told}");

    fs::write(&crl, mesh.root.crl(&[], SOON)).unwrap();
    within(LOOKS, "it is found", || problem(&node).is_none()).await;
    assert_eq!(works(&node).await, Ok(()));
    let generation = node.trust().crl.unwrap().generation;

    for (what, broken) in [
        ("crl_invalid", "torn".to_owned()),
        ("crl_untrusted", TestRoot::new("test root").crl(&[], SOON)),
        ("crl_expired", mesh.root.crl(&[], -60)),
    ] {
        fs::write(&crl, broken).unwrap();
        within(LOOKS, what, || problem(&node) == Some(what)).await;
        assert_eq!(works(&node).await, Err("revocation_unknown"), "{what}");
    }
    fs::write(&crl, mesh.root.crl(&[], SOON)).unwrap();
    within(LOOKS, "it is mended", || problem(&node).is_none()).await;
    assert_eq!(works(&node).await, Ok(()));
    assert!(node.trust().crl.unwrap().generation > generation);
}

#[tokio::test]
async fn the_last_good_lists_may_stay_in_force_and_say_so() {
    let mesh = Mesh::start(HOUR).await;
    let (crl, (bad, _)) = (mesh.path("crl.pem"), leaf(&mesh.root));
    let node = mesh.node_with(asking(&crl, CrlFailure::LastGood), &[&id("shop", "web")]);
    within(LOOKS, "the file is missed", || problem(&node) == Some("crl_unreadable")).await;
    assert_eq!(works(&node).await, Err("revocation_unknown"), "there is no good one yet");
    fs::write(&crl, mesh.root.crl(&[&bad], SOON)).unwrap();
    within(LOOKS, "it is found", || problem(&node).is_none()).await;
    fs::remove_file(&crl).unwrap();
    within(LOOKS, "it is missed", || problem(&node) == Some("crl_unreadable")).await;
    assert_eq!(works(&node).await, Ok(()));
    assert!(node.revoked(&[bad], SystemTime::now()), "what was revoked stays revoked");
    assert!(!node.trust().crl.unwrap().refuses);
}

#[tokio::test]
async fn a_list_that_becomes_too_old_while_it_lies_there_is_noticed() {
    let mesh = Mesh::start(HOUR).await;
    let crl = mesh.path("crl.pem");
    fs::write(&crl, mesh.root.crl(&[], 4)).unwrap();
    let node = mesh.node_with(asking(&crl, CrlFailure::Refuse), &[&id("shop", "web")]);
    within(LOOKS, "it is good", || problem(&node).is_none()).await;
    within(2 * LOOKS, "it is too old", || problem(&node) == Some("crl_expired")).await;
    assert_eq!(works(&node).await, Err("revocation_unknown"));
}

#[tokio::test]
async fn an_expired_root_vouches_for_nobody() {
    let mut root = TestRoot::new("root");
    let (leaf, key) = leaf(&root);
    assert_eq!(both(&trust(&[&root]), std::slice::from_ref(&leaf), &key).await, [Ok(()), Ok(())]);
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "root");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.not_after = time::OffsetDateTime::now_utc() - time::Duration::minutes(1);
    root.certificate = params.self_signed(&root.key).unwrap();
    assert_eq!(both(&trust(&[&root]), &[leaf], &key).await[1], Err("expired"));
}
