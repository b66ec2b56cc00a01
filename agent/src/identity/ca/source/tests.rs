//! What is taken as a signing key, what is not, and what that is told as.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair};
use rustls_pki_types::CertificateDer;
use tempfile::TempDir;

use super::*;
use crate::identity::{
    ca::pem,
    tests::support::{Leaf, TestRoot, trust_domain, within},
};

const DAY: i64 = 86_400;

fn directory() -> TempDir {
    tempfile::Builder::new().prefix("hi-").tempdir().unwrap()
}

fn write(directory: &TempDir, name: &str, text: &str) {
    fs::write(directory.path().join(name), text).unwrap();
}

/// A directory with this root's pair.
fn laid_out(root: &TestRoot) -> TempDir {
    let directory = directory();
    write(&directory, CERTIFICATE, &root.certificate.pem());
    write(&directory, KEY, &root.key.serialize_pem());
    directory
}

fn source(directory: &TempDir) -> KeySource {
    KeySource::Directory(directory.path().to_owned())
}

async fn open(directory: &TempDir) -> Result<Keys, CaError> {
    Keys::open(source(directory), &trust_domain(), None).await
}

fn intermediate(root: &TestRoot, name: &str, valid: (i64, i64)) -> (CertificateDer<'static>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = Leaf { uris: &[], valid, usages: &[], ..Leaf::default() }.params();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (root.sign(&params, &key), key)
}

fn expired_root(name: &str) -> TestRoot {
    let mut root = TestRoot::new(name);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_before = time::OffsetDateTime::now_utc() - time::Duration::days(2);
    params.not_after = time::OffsetDateTime::now_utc() - time::Duration::days(1);
    root.certificate = params.self_signed(&root.key).unwrap();
    root
}

/// Reason, what its one line names, and what makes a directory so.
type BadState = (&'static str, &'static str, Box<dyn Fn(&TempDir)>);

/// Each bad state of a directory.
fn bad_states() -> Vec<BadState> {
    let other = TestRoot::new("other");
    let other_key = other.key.serialize_pem();
    let (cut, cut_key) = intermediate(&other, "cut off", (-60, DAY));
    let (cut, cut_key) = (pem(&cut), cut_key.serialize_pem());
    let leaf = pem(&other.sign(&Leaf::default().params(), &other.key));
    let old = expired_root("old root");
    let (old, old_key) = (old.certificate.pem(), old.key.serialize_pem());
    let wrong_order = format!("{cut}{}", TestRoot::new("stranger").certificate.pem());
    let other_bundle = other.certificate.pem();
    let (key_again, cut_key_again) = (other_key.clone(), cut_key.clone());
    let certificate_again = other.certificate.pem();
    vec![
        ("missing", KEY, Box::new(|at| fs::remove_file(at.path().join(KEY)).unwrap())),
        ("missing", CERTIFICATE, Box::new(|at| fs::remove_file(at.path().join(CERTIFICATE)).unwrap())),
        ("key_mismatch", KEY, Box::new(move |at| write(at, KEY, &other_key))),
        ("key_invalid", KEY, Box::new(|at| write(at, KEY, "no key"))),
        ("certificate_invalid", CERTIFICATE, Box::new(|at| write(at, CERTIFICATE, "no certificate"))),
        (
            "not_a_ca",
            CERTIFICATE,
            Box::new(move |at| {
                write(at, CERTIFICATE, &leaf);
                write(at, KEY, &key_again);
            }),
        ),
        (
            "no_root",
            CERTIFICATE,
            Box::new(move |at| {
                write(at, CERTIFICATE, &cut);
                write(at, KEY, &cut_key);
            }),
        ),
        (
            "chain_broken",
            CERTIFICATE,
            Box::new(move |at| {
                write(at, CERTIFICATE, &wrong_order);
                write(at, KEY, &cut_key_again);
            }),
        ),
        (
            "expired",
            CERTIFICATE,
            Box::new(move |at| {
                write(at, CERTIFICATE, &old);
                write(at, KEY, &old_key);
            }),
        ),
        ("bundle_lacks_root", BUNDLE, Box::new(move |at| write(at, BUNDLE, &other_bundle))),
        ("certificate_invalid", BUNDLE, Box::new(|at| write(at, BUNDLE, "half a bundle"))),
        (
            "unreadable",
            BUNDLE,
            Box::new(move |at| {
                let much = certificate_again.repeat(4_000);
                assert!(much.len() as u64 > limits::BUNDLE_BYTES);
                write(at, BUNDLE, &much);
            }),
        ),
        (
            "unreadable",
            BUNDLE,
            Box::new(|at| {
                let _ = fs::remove_file(at.path().join(BUNDLE));
                fs::create_dir(at.path().join(BUNDLE)).unwrap();
            }),
        ),
    ]
}

#[tokio::test]
async fn a_bad_state_names_file_and_fix_and_leaves_the_last_good_one_in_force() {
    for (reason, file, spoil) in bad_states() {
        let root = TestRoot::new("good root");
        let directory = laid_out(&root);
        let keys = open(&directory).await.unwrap();
        let before = keys.current();
        spoil(&directory);
        let look = |keys: &Keys| keys.offer(&source(&directory).read().unwrap(), Whole::Perhaps, SystemTime::now());
        look(&keys);
        assert_eq!(keys.status().bad, None, "{reason}: one look may see half of a change");
        look(&keys);
        look(&keys);
        let status = keys.status();
        let bad = status.bad.unwrap();
        let line = bad.to_string();
        assert_eq!(bad.reason(), reason, "{line}");
        assert!(line.starts_with(&directory.path().join(file).display().to_string()), "{line}");
        assert!(line.contains("; ") && !line.contains('\n'), "{line}");
        assert_eq!(status.errors.into_iter().collect::<Vec<_>>(), [(reason, 1)], "told once");
        assert!(before.same(&keys.current()), "{reason}");
        // At a start there is no last good state.
        let error = open(&directory).await.map(drop).unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        // Mended, it is in force again and nothing is wrong any more.
        let _ = fs::remove_dir(directory.path().join(BUNDLE));
        let _ = fs::remove_file(directory.path().join(BUNDLE));
        let next = TestRoot::new("next root");
        write(&directory, CERTIFICATE, &next.certificate.pem());
        write(&directory, KEY, &next.key.serialize_pem());
        look(&keys);
        assert_eq!(keys.status().bad, None, "{reason}");
        assert_eq!(keys.current().anchor(), Some(next.certificate.der()), "{reason}");
    }
}

#[tokio::test]
async fn a_key_that_expires_in_force_is_told_though_nothing_changed() {
    let root = TestRoot::new("a root");
    let directory = laid_out(&root);
    let (short, key) = intermediate(&root, "short", (-60, 600));
    write(&directory, CERTIFICATE, &pem(&short));
    write(&directory, KEY, &key.serialize_pem());
    write(&directory, BUNDLE, &root.certificate.pem());
    let keys = open(&directory).await.unwrap();
    let look = |at| keys.offer(&source(&directory).read().unwrap(), Whole::Yes, at);
    look(SystemTime::now());
    assert_eq!(keys.status().bad, None);
    look(SystemTime::now() + Duration::from_secs(700));
    assert_eq!(keys.status().bad.unwrap().reason(), "expired");
}

#[tokio::test]
async fn the_layout_of_cert_manager_is_understood() {
    let root = TestRoot::new("company root");
    let (upper, upper_key) = intermediate(&root, "upper", (-60, DAY));
    let lower_key = KeyPair::generate().unwrap();
    let lower = {
        let mut params = Leaf { uris: &[], valid: (-60, DAY), usages: &[], ..Leaf::default() }.params();
        params.distinguished_name.push(DnType::CommonName, "lower");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = rcgen::Issuer::from_ca_cert_der(&upper, &upper_key).unwrap();
        params.signed_by(&lower_key, &issuer).unwrap().der().clone()
    };
    let directory = directory();
    // The chain without its root, and the root beside it.
    write(&directory, CERTIFICATE, &format!("{}{}", pem(&lower), pem(&upper)));
    write(&directory, KEY, &lower_key.serialize_pem());
    write(&directory, BUNDLE, &root.certificate.pem());
    let keys = open(&directory).await.unwrap();
    assert_eq!(keys.current().chain, [lower.clone(), upper.clone(), root.certificate.der().clone()]);
    assert_eq!(keys.current().bundle(), [root.certificate.der().clone()]);
    // An intermediate in the bundle completes the chain and is no root to trust.
    write(&directory, CERTIFICATE, &pem(&lower));
    write(&directory, BUNDLE, &format!("{}{}", pem(&upper), root.certificate.pem()));
    let keys = open(&directory).await.unwrap();
    assert_eq!(keys.current().chain.len(), 3);
    assert_eq!(keys.current().bundle(), [root.certificate.der().clone()]);
    // A self-signed issuer with an empty ca.crt.
    let root = TestRoot::new("own root");
    let directory = laid_out(&root);
    write(&directory, BUNDLE, "\n");
    let keys = open(&directory).await.unwrap();
    assert_eq!(keys.current().bundle_pem(), pem(root.certificate.der()));
}

#[tokio::test]
async fn several_roots_are_trusted_and_an_expired_one_is_left_out() {
    let (root, second, old) = (TestRoot::new("first"), TestRoot::new("second"), expired_root("old"));
    let directory = laid_out(&root);
    let all: String = [&root, &second, &old, &root].map(|root| root.certificate.pem()).concat();
    write(&directory, BUNDLE, &all);
    let keys = open(&directory).await.unwrap();
    assert_eq!(keys.current().bundle(), [root.certificate.der().clone(), second.certificate.der().clone()]);
    assert_eq!(keys.status().roots.len(), 2);
}

#[tokio::test]
async fn a_changed_directory_is_followed() {
    let directory = laid_out(&TestRoot::new("first"));
    let keys = Arc::new(open(&directory).await.unwrap());
    let stop = CancellationToken::new();
    let following = tokio::spawn({
        let (keys, stop) = (Arc::clone(&keys), stop.clone());
        async move { keys.follow(stop).await }
    });
    let mut changes = keys.changes();
    let second = TestRoot::new("second");
    write(&directory, CERTIFICATE, &second.certificate.pem());
    write(&directory, KEY, &second.key.serialize_pem());
    let followed = || keys.current().anchor() == Some(second.certificate.der());
    within(limits::KEY_LOOK * 10, "the second root in force", followed).await;
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    stop.cancel();
    following.await.unwrap();
}
