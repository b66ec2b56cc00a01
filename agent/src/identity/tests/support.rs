//! A root whose key the test holds, a CA that issues from it, and handshakes over real TCP.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, CustomExtension,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    ClientConfig, ServerConfig,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;

use arc_swap::ArcSwap;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{
    CaClientConfig, Certificates, SpiffeId, TrustConfig, TrustDomain, TrustDomains,
    ca::{Authorization, Ca, CaConfig, KeySource},
    peer,
    roots::Roots,
    verify::Trust,
};

pub const TOKEN: &str = "a-token";

pub fn id(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new(&trust_domain(), namespace, account).unwrap()
}

pub fn trust_domain() -> TrustDomain {
    "mesh.test".parse().unwrap()
}

/// What trusts these roots, knows no other name, and asks for no revocation.
pub(in crate::identity) fn trust(roots: &[&TestRoot]) -> Trust {
    let certificates = roots.iter().map(|root| root.certificate.der().clone()).collect();
    Trust {
        roots: Arc::new(ArcSwap::from_pointee(Roots::new(certificates))),
        domains: TrustDomains::new(trust_domain(), &[]),
        revocation: Arc::default(),
    }
}

pub struct TestRoot {
    pub key: KeyPair,
    pub certificate: Certificate,
}

/// A leaf in every wrong way.
pub struct Leaf<'a> {
    pub uris: &'a [&'a str],
    pub dns: &'a [&'a str],
    /// URI names that rcgen would not write, in the place of all others; some 100 bytes together at most.
    pub raw_uris: &'a [&'a [u8]],
    /// Seconds from now.
    pub valid: (i64, i64),
    pub usages: &'a [ExtendedKeyUsagePurpose],
}

impl Default for Leaf<'_> {
    fn default() -> Self {
        Self {
            uris: &["spiffe://mesh.test/ns/shop/sa/web"],
            dns: &[],
            raw_uris: &[],
            valid: (-60, 60),
            usages: &[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }
}

impl Leaf<'_> {
    pub fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = self.uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.subject_alt_names.extend(self.dns.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())));
        if !self.raw_uris.is_empty() {
            params.subject_alt_names.clear();
            // SEQUENCE { [6] IA5String, … }, each shorter than 128 bytes (X.690 §8.1.3.4).
            let length = |bytes: &[u8]| u8::try_from(bytes.len()).ok().filter(|length| *length < 128).unwrap();
            let names: Vec<u8> = self.raw_uris.iter().flat_map(|uri| [&[0x86, length(uri)], *uri].concat()).collect();
            let names = [&[0x30, length(&names)], names.as_slice()].concat();
            params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], names)];
        }
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::seconds(self.valid.0);
        params.not_after = now + time::Duration::seconds(self.valid.1);
        params.extended_key_usages = self.usages.to_vec();
        params.is_ca = IsCa::ExplicitNoCa;
        params
    }
}

impl TestRoot {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self { key, certificate }
    }

    pub fn sign(&self, params: &CertificateParams, key: &KeyPair) -> CertificateDer<'static> {
        let issuer = Issuer::from_ca_cert_der(self.certificate.der(), &self.key).unwrap();
        params.signed_by(key, &issuer).unwrap().der().clone()
    }

    pub fn leaf(&self, leaf: &Leaf<'_>) -> Arc<SingleCertAndKey> {
        let key = KeyPair::generate().unwrap();
        presented(vec![self.sign(&leaf.params(), &key)], &key)
    }

    /// A CA below this one.
    pub fn intermediate(&self, name: &str, usages: &[KeyUsagePurpose]) -> Self {
        let key = KeyPair::generate().unwrap();
        Self { certificate: self.certify(name, usages, &key), key }
    }

    /// A CA's certificate for a key.
    pub fn certify(&self, name: &str, usages: &[KeyUsagePurpose], key: &KeyPair) -> Certificate {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = usages.to_vec();
        let issuer = Issuer::from_ca_cert_der(self.certificate.der(), &self.key).unwrap();
        params.signed_by(key, &issuer).unwrap()
    }

    /// A list, PEM, that revokes these certificates and has to be replaced in so many seconds.
    pub fn crl(&self, revoked: &[&CertificateDer<'_>], next_update: i64) -> String {
        let now = time::OffsetDateTime::now_utc();
        let entry = |der: &&CertificateDer<'_>| RevokedCertParams {
            serial_number: SerialNumber::from_slice(X509Certificate::from_der(der).unwrap().1.raw_serial()),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now - time::Duration::days(1),
            next_update: now + time::Duration::seconds(next_update),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        // Whether the issuer may sign lists is for the agent to find.
        let issuer = Issuer::from_ca_cert_der(self.certificate.der(), &self.key).unwrap();
        params.signed_by(&issuer).unwrap().pem().unwrap()
    }
}

pub fn self_signed(leaf: &Leaf<'_>) -> Arc<SingleCertAndKey> {
    let key = KeyPair::generate().unwrap();
    let certificate = leaf.params().self_signed(&key).unwrap();
    presented(vec![certificate.der().clone()], &key)
}

/// A chain, the leaf first, and the leaf's key.
pub fn presented(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Arc<SingleCertAndKey> {
    let der = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let signing = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&der).unwrap();
    Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, signing)))
}

/// What asks the CA at an address, with `root.pem` and `token` in this directory.
pub fn client_config(address: SocketAddr, directory: &Path, lifetime: Duration) -> CaClientConfig {
    CaClientConfig {
        address: format!("https://{address}"),
        server_name: None,
        root_certificate: directory.join("root.pem"),
        token_file: directory.join("token"),
        cluster_id: "Kubernetes".to_owned(),
        cert_signer: None,
        headers: Vec::new(),
        trust_domain: trust_domain(),
        lifetime,
    }
}

/// A directory with a root, a token, and a CA that can be stopped and started again at its address.
pub struct Mesh {
    pub directory: TempDir,
    pub root: TestRoot,
    pub lifetime: Duration,
    pub address: SocketAddr,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl Mesh {
    pub async fn start(lifetime: Duration) -> Self {
        let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
        fs::write(directory.path().join("token"), format!("{TOKEN}\n")).unwrap();
        let mut mesh = Self {
            directory,
            root: TestRoot::new("test root"),
            lifetime,
            address: "127.0.0.1:0".parse().unwrap(),
            running: None,
        };
        mesh.start_ca().await;
        mesh
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn ca_config(&self) -> CaConfig {
        fs::write(self.path("ca.pem"), self.root.certificate.pem()).unwrap();
        fs::write(self.path("ca.key"), self.root.key.serialize_pem()).unwrap();
        CaConfig {
            listen: self.address,
            trust_domain: trust_domain(),
            root: KeySource::Files { certificate: self.path("ca.pem"), key: self.path("ca.key"), bundle: None },
            publish_root: Some(self.path("root.pem")),
            authorization: Authorization::Token(self.path("token")),
            names: vec!["localhost".to_owned(), "127.0.0.1".to_owned()],
            max_lifetime: self.lifetime,
        }
    }

    pub async fn start_ca(&mut self) {
        let ca = Ca::bind(self.ca_config()).await.unwrap();
        self.address = ca.address();
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { ca.run(stop.cancelled_owned()).await.unwrap() }
        });
        self.running = Some((stop, task));
    }

    pub async fn stop_ca(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        stop.cancel();
        task.await.unwrap();
    }

    pub fn client_config(&self) -> CaClientConfig {
        client_config(self.address, self.directory.path(), Duration::from_secs(24 * 3_600))
    }

    pub fn node(&self, identities: &[&SpiffeId]) -> Certificates {
        self.node_with(TrustConfig::default(), identities)
    }

    pub fn node_with(&self, trust: TrustConfig, identities: &[&SpiffeId]) -> Certificates {
        let certificates = Certificates::start_with(self.client_config(), trust).unwrap();
        certificates.keep(identities.iter().map(|identity| (*identity).clone()).collect());
        certificates
    }
}

/// What each side saw of the other: its SPIFFE id, or why not. The server sends one byte after the handshake, because a
/// TLS 1.3 client learns only then that it was refused.
pub struct Outcome {
    pub client: io::Result<SpiffeId>,
    pub server: io::Result<SpiffeId>,
}

pub async fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = async {
        let (stream, _) = listener.accept().await?;
        let mut stream = TlsAcceptor::from(server).accept(stream).await?;
        let identity = identity(stream.get_ref().1.peer_certificates());
        stream.write_all(b"x").await?;
        stream.shutdown().await?;
        Ok(identity)
    };
    let connecting = async {
        let stream = TcpStream::connect(address).await?;
        let mut stream = TlsConnector::from(client).connect(ServerName::from(address.ip()), stream).await?;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
        let identity = identity(stream.get_ref().1.peer_certificates());
        let mut byte = [0];
        stream.read_exact(&mut byte).await?;
        Ok(identity)
    };
    let both = async { tokio::join!(connecting, serving) };
    let (client, server) = tokio::time::timeout(Duration::from_secs(5), both).await.expect("the handshake hangs");
    Outcome { client, server }
}

fn identity(certificates: Option<&[CertificateDer<'static>]>) -> SpiffeId {
    peer(&certificates.unwrap()[0]).unwrap().identity
}

/// Polls until `claim` holds; panics with `what` when it does not within `limit`.
pub async fn within(limit: Duration, what: &str, mut claim: impl FnMut() -> bool) {
    let start = SystemTime::now();
    while !claim() {
        assert!(start.elapsed().unwrap() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
