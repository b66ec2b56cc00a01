//! What the CA signs and what it never does.

mod admission;
mod nodes;
mod off_node;
mod rights;

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant, SystemTime},
};

use prost::Message;
use prost_types::{Struct, Value, value::Kind};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType,
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use x509_parser::prelude::*;

use super::{
    Authorization, Ca, CaConfig, KeySource, Vitals,
    admission::{Admission, Approved},
    authorize::Authorized,
    issue::{examine, identity, sign},
    refusal::Refusal,
    root::Root,
};
use crate::{
    // The API server of the lab, and nothing else of it.
    cluster::{api_client, kubernetes::stand_in as apiserver},
    identity::{
        IMPERSONATED_IDENTITY, SpiffeId, TrustDomain,
        key::WorkloadKey,
        proto::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
        tests::support::client_config,
    },
    life::limits,
};

const WEB: &str = "spiffe://mesh.test/ns/shop/sa/web";
const HOUR: Duration = Duration::from_secs(3_600);

/// An API server, and a directory with a `kubeconfig` that leads there.
async fn api_server() -> (apiserver::ApiServer, tempfile::TempDir) {
    // As `heddle ca` does at its start; the tests of a process share it.
    let _ = rustls::crypto::CryptoProvider::install_default(rustls::crypto::aws_lc_rs::default_provider());
    let api = apiserver::ApiServer::start().await.unwrap();
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    api.write_kubeconfig(&directory.path().join("kubeconfig")).unwrap();
    (api, directory)
}

/// An API server, and who asks it.
pub(super) async fn api_server_and_client() -> (apiserver::ApiServer, kube::Client) {
    let (api, directory) = api_server().await;
    let client = api_client(Some(&directory.path().join("kubeconfig"))).await.unwrap();
    (api, client)
}

fn trust_domain() -> TrustDomain {
    "mesh.test".parse().unwrap()
}

fn request(csr: String, identity: Option<Kind>, seconds: i64) -> IstioCertificateRequest {
    let fields = identity.map(|kind| (IMPERSONATED_IDENTITY.to_owned(), Value { kind: Some(kind) }));
    IstioCertificateRequest {
        csr,
        validity_duration: seconds,
        metadata: Some(Struct { fields: BTreeMap::from_iter(fields) }),
    }
}

/// Passes what a caller that may have any identity passes.
fn approve(request: &IstioCertificateRequest, longest: Duration) -> Result<Approved, Refusal> {
    let identity = identity(request, &trust_domain())?;
    let examined = examine(request, Authorized::unasked(identity), longest)?;
    Admission::new(longest).admit(examined, Instant::now())
}

fn named(identity: &str) -> Option<Kind> {
    Some(Kind::StringValue(identity.to_owned()))
}

fn good_csr() -> String {
    WorkloadKey::generate().unwrap().request(&WEB.parse().unwrap()).unwrap()
}

fn csr(change: impl FnOnce(&mut CertificateParams)) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    change(&mut params);
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

/// A CSR that names nobody: its key is all that counts.
fn plain_csr() -> String {
    csr(|_| {})
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[test]
fn every_abuse_is_refused_for_its_reason() {
    let p384 = {
        let params = CertificateParams::default();
        params.serialize_request(&KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap()).unwrap().pem().unwrap()
    };
    let forged = {
        let der = ::pem::parse(good_csr()).unwrap();
        let mut bytes = der.contents().to_vec();
        // Inside the public key.
        let at = bytes.windows(3).position(|window| window == [0x42, 0, 4]).unwrap() + 10;
        bytes[at] ^= 1;
        ::pem::encode(&::pem::Pem::new("CERTIFICATE REQUEST", bytes))
    };
    let trailing = {
        let mut bytes = ::pem::parse(good_csr()).unwrap().contents().to_vec();
        bytes.push(0);
        ::pem::encode(&::pem::Pem::new("CERTIFICATE REQUEST", bytes))
    };
    let huge = format!("{}{}", good_csr(), "x".repeat(limits::CSR_BYTES));
    for (what, request, reason) in [
        ("no identity", request(good_csr(), None, 60), "no_identity"),
        ("identity is no string", request(good_csr(), Some(Kind::BoolValue(true)), 60), "no_identity"),
        ("no metadata", IstioCertificateRequest { csr: good_csr(), ..Default::default() }, "no_identity"),
        ("no SPIFFE id", request(good_csr(), named("web"), 60), "bad_spiffe_id"),
        ("extra path", request(good_csr(), named(&format!("{WEB}/x")), 60), "bad_spiffe_id"),
        ("NUL", request(good_csr(), named(&format!("{WEB}\0")), 60), "bad_spiffe_id"),
        ("foreign", request(good_csr(), named("spiffe://other.test/ns/shop/sa/web"), 60), "trust_domain"),
        ("no CSR", request(String::new(), named(WEB), 60), "csr_malformed"),
        ("no PEM", request("CSR".to_owned(), named(WEB), 60), "csr_malformed"),
        ("trailing byte", request(trailing, named(WEB), 60), "csr_malformed"),
        ("oversize", request(huge, named(WEB), 60), "csr_too_large"),
        ("P-384", request(p384, named(WEB), 60), "csr_key"),
        ("forged", request(forged, named(WEB), 60), "csr_signature"),
        (
            "another URI SAN",
            request(
                csr(|csr| csr.subject_alt_names = vec![uri("spiffe://mesh.test/ns/shop/sa/admin")]),
                named(WEB),
                60,
            ),
            "csr_other_name",
        ),
        (
            "two URI SANs",
            request(
                csr(|csr| csr.subject_alt_names = vec![uri(WEB), uri("spiffe://mesh.test/ns/shop/sa/admin")]),
                named(WEB),
                60,
            ),
            "csr_other_name",
        ),
        (
            "the same SAN twice",
            request(csr(|csr| csr.subject_alt_names = vec![uri(WEB), uri(WEB)]), named(WEB), 60),
            "csr_names",
        ),
        (
            "CA:TRUE",
            request(csr(|csr| csr.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), named(WEB), 60),
            "csr_ca",
        ),
        (
            "keyCertSign",
            request(csr(|csr| csr.key_usages = vec![KeyUsagePurpose::KeyCertSign]), named(WEB), 60),
            "csr_ca",
        ),
        (
            "DNS SAN",
            request(
                csr(|csr| {
                    csr.subject_alt_names = vec![SanType::DnsName("istiod.istio-system.svc".try_into().unwrap())]
                }),
                named(WEB),
                60,
            ),
            "csr_other_name",
        ),
    ] {
        let refusal = approve(&request, HOUR).expect_err(what);
        assert_eq!(refusal.reason(), reason, "{what}: {refusal}");
    }
}

#[test]
fn nothing_of_a_request_but_its_key_reaches_the_certificate() {
    let root = Root::generate(HOUR * 24, &trust_domain()).unwrap();
    let greedy = csr(|csr| {
        csr.distinguished_name.push(DnType::CommonName, "admin");
        csr.subject_alt_names = vec![uri(WEB)];
        csr.key_usages = vec![KeyUsagePurpose::DataEncipherment];
        csr.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    });
    let now = SystemTime::now();
    let approved = approve(&request(greedy.clone(), named(WEB), 600), HOUR).unwrap();
    let issued = sign(&root, &approved, now).unwrap();
    let (_, certificate) = X509Certificate::from_der(&issued.certificate).unwrap();
    let requested = ::pem::parse(&greedy).unwrap();
    let (_, requested) = X509CertificationRequest::from_der(requested.contents()).unwrap();
    assert_eq!(certificate.public_key().raw, requested.certification_request_info.subject_pki.raw);
    assert_eq!(certificate.subject().iter().count(), 0);
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(names.value.general_names, vec![GeneralName::URI(WEB)]);
    let usage = certificate.key_usage().unwrap().unwrap().value;
    assert_eq!(usage.flags, 1, "digitalSignature alone");
    let extended = certificate.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.code_signing && extended.other.is_empty());
    assert!(!certificate.basic_constraints().unwrap().unwrap().value.ca);
    assert!(
        certificate.verify_signature(Some(X509Certificate::from_der(&root.chain[0]).unwrap().1.public_key())).is_ok()
    );
}

#[test]
fn a_certificate_lasts_what_was_asked_for_within_the_cap_and_the_root() {
    let lasts = |asked: i64, cap: Duration, root: Duration| {
        let root = Root::generate(root, &trust_domain()).unwrap();
        let now = SystemTime::now();
        let approved = approve(&request(good_csr(), named(WEB), asked), cap).unwrap();
        let issued = sign(&root, &approved, now).unwrap();
        let (_, certificate) = X509Certificate::from_der(&issued.certificate).unwrap();
        let (validity, now) = (certificate.validity(), now.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs());
        let now = i64::try_from(now).unwrap();
        assert_eq!(certificate.raw_serial().len(), 16);
        (now - validity.not_before.timestamp(), validity.not_after.timestamp() - now)
    };
    let near = |(before, after): (i64, i64), expected: (i64, i64)| {
        assert!(
            (before - expected.0).abs() <= 1 && (after - expected.1).abs() <= 1,
            "{before}, {after}: not {expected:?}"
        );
    };
    near(lasts(1_800, HOUR, HOUR * 99), (120, 1_800));
    near(lasts(86_400, HOUR, HOUR * 99), (120, 3_600));
    near(lasts(0, HOUR, HOUR * 99), (120, 3_600));
    near(lasts(-5, HOUR, HOUR * 99), (120, 3_600));
    near(lasts(i64::MAX, HOUR, HOUR * 99), (120, 3_600));
    near(lasts(100, HOUR, HOUR * 99), (10, 100));
    near(lasts(3_600, HOUR, Duration::from_secs(60)), (120, 60));
}

#[test]
fn an_ed25519_key_is_signed_too() {
    let root = Root::generate(HOUR, &trust_domain()).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&KeyPair::generate_for(&PKCS_ED25519).unwrap()).unwrap().pem().unwrap();
    let approved = approve(&request(csr, named(WEB), 60), HOUR).unwrap();
    sign(&root, &approved, SystemTime::now()).unwrap();
}

struct Running {
    directory: tempfile::TempDir,
    channel: Channel,
    vitals: Vitals,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn config(directory: &tempfile::TempDir) -> CaConfig {
    CaConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        trust_domain: trust_domain(),
        root: KeySource::Memory { lifetime: super::ROOT_LIFETIME },
        publish_root: Some(directory.path().join("root.pem")),
        authorization: Authorization::Token(directory.path().join("token")),
        names: vec!["ca.test".to_owned(), "::1".to_owned()],
        max_lifetime: super::MAX_LIFETIME,
    }
}

async fn running(token: Option<&str>) -> Running {
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    if let Some(token) = token {
        fs::write(directory.path().join("token"), token).unwrap();
    }
    let ca = Ca::bind(config(&directory)).await.unwrap();
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.root_pem())).domain_name("ca.test");
    let endpoint = Channel::from_shared(format!("https://{}", ca.address())).unwrap().tls_config(tls).unwrap();
    let vitals = ca.vitals();
    let task = tokio::spawn(async move { ca.run(std::future::pending()).await.unwrap() });
    Running { directory, channel: endpoint.connect_lazy(), vitals, task }
}

async fn call(
    ca: &Running,
    authorization: &[&str],
    request: IstioCertificateRequest,
) -> Result<Vec<String>, tonic::Status> {
    let mut request = tonic::Request::new(request);
    for value in authorization {
        request.metadata_mut().append("authorization", value.parse().unwrap());
    }
    let mut client = IstioCertificateServiceClient::new(ca.channel.clone());
    client.create_certificate(request).await.map(|answer| answer.into_inner().cert_chain)
}

#[tokio::test]
async fn every_refusal_looks_the_same_to_the_caller() {
    let ca = running(Some("secret\n")).await;
    let good = || request(good_csr(), named(WEB), 60);
    let chain = call(&ca, &["Bearer secret"], good()).await.unwrap();
    let published = fs::read_to_string(ca.directory.path().join("root.pem")).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], published);
    assert!(!published.contains("PRIVATE"));
    let mut seen = std::collections::HashSet::new();
    for (authorization, request) in [
        (&[][..], good()),
        (&["Bearer "], good()),
        (&["Bearer secre"], good()),
        (&["Bearer secrets"], good()),
        (&["secret"], good()),
        (&["Basic secret"], good()),
        (&["Bearer secret", "Bearer secret"], good()),
        (&["Bearer secret"], request(good_csr(), named("spiffe://other.test/ns/shop/sa/web"), 60)),
        (&["Bearer secret"], request("x".to_owned(), named(WEB), 60)),
        (&["Bearer secret"], request(good_csr(), None, 60)),
    ] {
        let status = call(&ca, authorization, request).await.unwrap_err();
        seen.insert((status.code() as i32, status.message().to_owned()));
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(16, "request authenticate failure".to_owned())]);
}

#[tokio::test]
async fn without_a_token_file_nothing_is_signed() {
    for token in [None, Some(""), Some(" \n")] {
        let ca = running(token).await;
        for authorization in ["Bearer ", "Bearer", "Bearer x"] {
            assert!(call(&ca, &[authorization], request(good_csr(), named(WEB), 60)).await.is_err(), "{token:?}");
        }
    }
}

#[tokio::test]
async fn what_the_grpc_library_can_not_take_is_refused_like_anything_else_and_counted() {
    let ca = running(Some("secret")).await;
    let counted = |reason: &str| {
        let line = format!("heddle_ca_requests_total{{reason=\"{reason}\",result=\"refused\"}} ");
        let text = ca.vitals.exposition().unwrap();
        text.lines().find_map(|one| one.strip_prefix(&line)).map_or(0.0, |value| value.parse::<f64>().unwrap())
    };
    // One byte more than the library takes, and far more.
    let around = request(String::new(), named(WEB), 60).encoded_len() + 3;
    for (number, length) in [limits::CA_REQUEST_BYTES - around + 1, 1 << 20].into_iter().enumerate() {
        let asked = Instant::now();
        let status = call(&ca, &["Bearer secret"], request("x".repeat(length), named(WEB), 60)).await.unwrap_err();
        assert_eq!((status.code() as i32, status.message()), (16, "request authenticate failure"), "{length}");
        assert!(asked.elapsed() >= limits::CA_REFUSAL, "{length}: {:?}", asked.elapsed());
        assert_eq!(counted("request_too_large"), number as f64 + 1.0, "{length}");
    }
    let status = call(&ca, &["Bearer secret"], request("x".repeat(limits::CA_REQUEST_BYTES - around), named(WEB), 60));
    assert_eq!(status.await.unwrap_err().message(), "request authenticate failure");
    assert_eq!((counted("request_too_large"), counted("csr_too_large")), (2.0, 1.0), "one byte less is read");

    // What is no message of ours: a CSR that is no text.
    let mut grpc = tonic::client::Grpc::new(ca.channel.clone());
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/istio.v1.auth.IstioCertificateService/CreateCertificate");
    let codec = tonic_prost::ProstCodec::<Vec<u8>, IstioCertificateRequest>::default();
    let status = grpc.unary(tonic::Request::new(vec![0xff]), path, codec).await.map(drop).unwrap_err();
    assert_eq!((status.code() as i32, status.message()), (16, "request authenticate failure"));
    assert_eq!(counted("request_malformed"), 1.0);
}

#[tokio::test]
async fn a_root_that_can_not_issue_stops_the_ca_at_its_start() {
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let root = crate::identity::tests::support::TestRoot::new("a root");
    fs::write(path("root.crt"), root.certificate.pem()).unwrap();
    fs::write(path("other.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    fs::write(path("root.key"), root.key.serialize_pem()).unwrap();
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = root.sign(&CertificateParams::default(), &leaf_key);
    fs::write(path("leaf.crt"), super::pem(&leaf)).unwrap();
    fs::write(path("leaf.key"), leaf_key.serialize_pem()).unwrap();
    for (certificate, key, reason) in [
        ("root.crt", "other.key", "key_mismatch"),
        ("leaf.crt", "leaf.key", "not_a_ca"),
        ("root.crt", "root.crt", "key_invalid"),
        ("missing", "root.key", "missing"),
    ] {
        let root = KeySource::Files { certificate: path(certificate), key: path(key), bundle: None };
        let error = Ca::bind(CaConfig { root, ..config(&directory) }).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
    }
    let name = CaConfig { names: vec!["not a name".to_owned()], ..config(&directory) };
    assert_eq!(Ca::bind(name).await.unwrap_err().reason(), "name");
}

#[tokio::test]
async fn an_intermediate_issues_with_its_chain() {
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let root = crate::identity::tests::support::TestRoot::new("a root");
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "an intermediate");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let intermediate = root.sign(&params, &key);
    fs::write(path("chain.crt"), format!("{}{}", super::pem(&intermediate), root.certificate.pem())).unwrap();
    fs::write(path("key"), key.serialize_pem()).unwrap();
    fs::write(path("token"), "secret").unwrap();
    let root = KeySource::Files { certificate: path("chain.crt"), key: path("key"), bundle: None };
    let ca = Ca::bind(CaConfig { root, names: vec!["127.0.0.1".to_owned()], ..config(&directory) }).await.unwrap();
    let address = ca.address();
    let task = tokio::spawn(async move { ca.run(std::future::pending()).await.unwrap() });
    let web: SpiffeId = WEB.parse().unwrap();
    let certificates = crate::identity::Certificates::start(client_config(address, directory.path(), HOUR)).unwrap();
    certificates.keep([web.clone()].into());
    let server = certificates.server(&web).await.unwrap();
    let client = certificates.client(&web, &web).await.unwrap();
    let outcome = crate::identity::tests::support::handshake(client, server).await;
    assert_eq!(outcome.server.unwrap(), web);
    task.abort();
}
