//! One call to the CA: a fresh key, a request for one identity, and a distrustful look at the answer.
//!
//! Source: the Istio CA API (`istio.v1.auth.IstioCertificateService`). What it answers is used only if it chains to the
//! mesh's roots and carries exactly the identity asked for and the key just made.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use prost_types::{Struct, Value, value::Kind};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use zeroize::Zeroizing;

use super::{
    IMPERSONATED_IDENTITY, PeerError, SpiffeId, TrustDomain,
    key::WorkloadKey,
    proto::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
    roots::{RootsError, TrustBundle, is_root, read_capped, span, unix_time},
    verify::{spiffe_id, tls_reason},
};
use crate::life::limits;

/// Where the CA is and who we are to it.
#[derive(Debug, Clone)]
pub struct CaClientConfig {
    /// `https://host:port`.
    pub address: String,
    /// Name that the CA's TLS certificate must carry, where it is not the address's host.
    pub server_name: Option<String>,
    /// Trust bundle, PEM: verifies the CA and the mesh's peers. Read again when it changes; may appear later.
    pub root_certificate: PathBuf,
    /// Bearer token, read at each call.
    pub token_file: PathBuf,
    /// Sent as `clusterid`.
    pub cluster_id: String,
    pub trust_domain: TrustDomain,
    /// Lifetime asked for.
    pub lifetime: Duration,
}

/// Why a fetch gave no certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    #[error("{0:?} is no https:// address of a CA: {1}")]
    Address(String, String),
    #[error(transparent)]
    Roots(#[from] RootsError),
    #[error("can't read token {0}: {1}")]
    Token(PathBuf, String),
    #[error("can't make a key: {0}")]
    Key(String),
    #[error("fetch broke off: {0}")]
    Internal(String),
    #[error("CA unreachable: {0}")]
    Unreachable(String),
    #[error("CA did not answer within {0:?}")]
    Timeout(Duration),
    #[error("CA refused: {0}")]
    Refused(String),
    #[error("CA's answer holds no certificate chain: {0}")]
    Chain(String),
    #[error("CA's answer does not verify to the mesh's roots ({0})")]
    Untrusted(&'static str),
    #[error("CA's answer is for someone else: {0}")]
    Identity(#[from] PeerError),
    #[error("CA's answer is for another key")]
    OtherKey,
}

impl FetchError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Address(..) => "ca_address",
            Self::Roots(error) => error.reason(),
            Self::Token(..) => "token_unreadable",
            Self::Key(_) => "key",
            Self::Internal(_) => "internal",
            Self::Unreachable(_) => "ca_unreachable",
            Self::Timeout(_) => "ca_timeout",
            Self::Refused(_) => "ca_refused",
            Self::Chain(_) => "answer_malformed",
            Self::Untrusted(_) => "answer_untrusted",
            Self::Identity(_) => "answer_wrong_identity",
            Self::OtherKey => "answer_wrong_key",
        }
    }

    /// It says something of the way to the CA, not of this identity.
    pub(super) fn unreachable(&self) -> bool {
        matches!(self, Self::Roots(_) | Self::Token(..) | Self::Unreachable(_) | Self::Timeout(_))
    }
}

/// A certificate with its key, checked.
#[derive(Debug)]
pub(super) struct Held {
    pub certified: Arc<CertifiedKey>,
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Held {
    pub fn valid(&self, now: SystemTime) -> bool {
        now < self.not_after
    }
}

pub(super) struct CaClient {
    config: CaClientConfig,
    bundle: Arc<TrustBundle>,
    /// The open channel and the bundle that it verifies the CA with.
    channel: Mutex<Option<(Vec<u8>, Channel)>>,
}

impl CaClient {
    /// # Errors
    /// When the address is none.
    pub fn new(config: CaClientConfig, bundle: Arc<TrustBundle>) -> Result<Self, FetchError> {
        let client = Self { config, bundle, channel: Mutex::default() };
        client.endpoint()?;
        Ok(client)
    }

    /// A new key and its certificate; the roots that came with it are in force afterwards.
    pub async fn fetch(&self, identity: &SpiffeId) -> Result<Held, FetchError> {
        match tokio::time::timeout(limits::FETCH, self.call(identity)).await {
            Ok(result) => result,
            Err(_) => {
                self.hang_up();
                Err(FetchError::Timeout(limits::FETCH))
            }
        }
    }

    async fn call(&self, identity: &SpiffeId) -> Result<Held, FetchError> {
        let key = WorkloadKey::generate().map_err(|error| FetchError::Key(error.to_string()))?;
        let csr = key.request(identity).map_err(|error| FetchError::Key(error.to_string()))?;
        let mut client = IstioCertificateServiceClient::new(self.channel()?)
            .max_decoding_message_size(limits::CA_ANSWER_BYTES)
            .max_encoding_message_size(limits::CA_REQUEST_BYTES);
        let answer = client.create_certificate(self.request(identity, csr)?).await.map_err(|status| {
            let error = refusal(&status);
            if error.unreachable() {
                self.hang_up();
            }
            error
        })?;
        let (held, roots) = check(&answer.into_inner().cert_chain, identity, key, &self.bundle, SystemTime::now())?;
        self.bundle.answered(roots);
        Ok(held)
    }

    fn request(&self, identity: &SpiffeId, csr: String) -> Result<Request<IstioCertificateRequest>, FetchError> {
        let name = Value { kind: Some(Kind::StringValue(identity.as_str().to_owned())) };
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.config.lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct { fields: BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), name)]) }),
        });
        request.metadata_mut().insert("authorization", self.token()?);
        if let Ok(cluster) = self.config.cluster_id.parse::<MetadataValue<Ascii>>() {
            request.metadata_mut().insert("clusterid", cluster);
        }
        Ok(request)
    }

    fn token(&self) -> Result<MetadataValue<Ascii>, FetchError> {
        let error = |what: String| FetchError::Token(self.config.token_file.clone(), what);
        let bytes = Zeroizing::new(
            read_capped(&self.config.token_file, limits::TOKEN_BYTES).map_err(|problem| error(problem.to_string()))?,
        );
        let token = bytes.trim_ascii();
        if token.is_empty() {
            return Err(error("it is empty".to_owned()));
        }
        let header = Zeroizing::new([b"Bearer ", token].concat());
        let mut value = MetadataValue::try_from(header.as_slice()).map_err(|_| error("it is no token".to_owned()))?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn endpoint(&self) -> Result<Endpoint, FetchError> {
        let error = |what: &dyn ToString| FetchError::Address(self.config.address.clone(), what.to_string());
        if !self.config.address.starts_with("https://") {
            return Err(error(&"the scheme"));
        }
        let endpoint = Endpoint::from_shared(self.config.address.clone()).map_err(|problem| error(&problem))?;
        Ok(endpoint
            .connect_timeout(limits::CONNECT_PEER)
            .timeout(limits::FETCH)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(limits::PING_INTERVAL)
            .keep_alive_timeout(limits::PING_TIMEOUT))
    }

    /// The open channel, or a new one if the trust bundle changed since. Connects at its first use.
    fn channel(&self) -> Result<Channel, FetchError> {
        self.bundle.reload()?;
        let pem = self.bundle.pem();
        let mut open = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((verified_with, channel)) = open.as_ref()
            && *verified_with == pem
        {
            return Ok(channel.clone());
        }
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&pem)).timeout(limits::TLS_HANDSHAKE);
        if let Some(name) = &self.config.server_name {
            tls = tls.domain_name(name.clone());
        }
        let endpoint = self
            .endpoint()?
            .tls_config(tls)
            .map_err(|error| FetchError::Address(self.config.address.clone(), error.to_string()))?;
        let channel = endpoint.connect_lazy();
        *open = Some((pem, channel.clone()));
        Ok(channel)
    }

    fn hang_up(&self) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn refusal(status: &Status) -> FetchError {
    let mut text = status.to_string();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::ResourceExhausted => {
            FetchError::Unreachable(text)
        }
        _ => FetchError::Refused(text),
    }
}

/// The answer as a certificate for `identity` with our key, and the roots that it ends with.
pub(super) fn check(
    chain: &[String],
    identity: &SpiffeId,
    key: WorkloadKey,
    bundle: &TrustBundle,
    now: SystemTime,
) -> Result<(Held, Vec<CertificateDer<'static>>), FetchError> {
    let (presented, roots) = split(chain)?;
    let (leaf, intermediates) = presented.split_first().ok_or_else(|| FetchError::Chain("it is empty".to_owned()))?;
    let trusted = bundle.with_answer(&roots);
    let untrusted = |error: rustls::Error| FetchError::Untrusted(tls_reason(&error));
    trusted.verify_server(leaf, intermediates, unix_time(now)).map_err(untrusted)?;
    trusted.verify_client(leaf, intermediates, unix_time(now)).map_err(untrusted)?;
    let presented_id = spiffe_id(leaf)?;
    if presented_id != *identity {
        return Err(PeerError::WrongIdentity { expected: identity.clone(), presented: presented_id }.into());
    }
    let (serial, not_before, not_after) =
        span(leaf).ok_or_else(|| FetchError::Chain("the leaf can't be parsed".to_owned()))?;
    let signing = key.into_signing_key().map_err(|error| FetchError::Key(error.to_string()))?;
    let certified = CertifiedKey::new(presented, signing);
    certified.keys_match().map_err(|_| FetchError::OtherKey)?;
    Ok((Held { certified: Arc::new(certified), serial, not_before, not_after }, roots))
}

/// What is presented to peers (leaf and intermediates), and the roots at the end.
type Split = (Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>);

fn split(chain: &[String]) -> Result<Split, FetchError> {
    let mut certificates = Vec::new();
    for entry in chain {
        for certificate in CertificateDer::pem_slice_iter(entry.as_bytes()) {
            certificates.push(certificate.map_err(|error| FetchError::Chain(error.to_string()))?);
        }
    }
    if certificates.len() > limits::CHAIN_CERTIFICATES {
        return Err(FetchError::Chain(format!("it has {} certificates", certificates.len())));
    }
    let roots = certificates.iter().skip(1).position(is_root).map_or(certificates.len(), |at| at + 1);
    let rest = certificates.split_off(roots.min(certificates.len()));
    Ok((certificates, rest.into_iter().filter(is_root).collect()))
}
