//! One call to the CA: a fresh key, and a request for one identity. What comes back is for `answer` to judge.
//!
//! Source: the Istio CA API (`istio.v1.auth.IstioCertificateService`), as heddle's own CA, istiod and cert-manager's istio-csr
//! serve it.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use http::Uri;
use prost_types::{Struct, Value, value::Kind};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataKey, MetadataValue},
    transport::{Channel, Endpoint},
};
use zeroize::Zeroizing;

use super::{
    CERT_SIGNER, IMPERSONATED_IDENTITY, PeerError, SpiffeId, TrustDomain,
    answer::{Held, check},
    dial::Dial,
    key::WorkloadKey,
    proto::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
    roots::{RootsError, TrustBundle, read_capped},
    schedule::Outcome,
    tls::ca_client_config,
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
    /// Sent as `CertSigner` in the request's metadata: which of its signers an istiod shall ask.
    pub cert_signer: Option<String>,
    /// Sent beside our own, such as what a gateway before the CA asks for.
    pub headers: Vec<CaHeader>,
    pub trust_domain: TrustDomain,
    /// Lifetime asked for.
    pub lifetime: Duration,
}

/// A header of each call, from `NAME=VALUE`.
#[derive(Clone, PartialEq, Eq)]
pub struct CaHeader {
    name: MetadataKey<Ascii>,
    value: MetadataValue<Ascii>,
}

/// The value may be a secret.
impl fmt::Debug for CaHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaHeader").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why a text is no header of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CaHeaderError {
    #[error("has no = between name and value")]
    NoValue,
    #[error("has a name that no header has")]
    Name,
    #[error("has a name that heddle or gRPC sets itself")]
    Taken,
    #[error("has a value that no header has")]
    Value,
}

impl FromStr for CaHeader {
    type Err = CaHeaderError;

    fn from_str(text: &str) -> Result<Self, CaHeaderError> {
        const TAKEN: [&str; 6] = ["authorization", "clusterid", "content-type", "te", "user-agent", "host"];
        let (name, value) = text.split_once('=').ok_or(CaHeaderError::NoValue)?;
        let name = MetadataKey::<Ascii>::from_str(name.trim()).map_err(|_| CaHeaderError::Name)?;
        if TAKEN.contains(&name.as_str()) || name.as_str().starts_with("grpc-") {
            return Err(CaHeaderError::Taken);
        }
        let value = Some(value.trim()).filter(|value| value.is_ascii()).ok_or(CaHeaderError::Value)?;
        let mut value = MetadataValue::try_from(value).map_err(|_| CaHeaderError::Value)?;
        value.set_sensitive(true);
        Ok(Self { name, value })
    }
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
    #[error("no pod needs it any more")]
    Abandoned,
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
            Self::Abandoned => "abandoned",
            Self::Unreachable(_) => "ca_unreachable",
            Self::Timeout(_) => "ca_timeout",
            Self::Refused(_) => "ca_refused",
            Self::Chain(_) => "answer_malformed",
            Self::Untrusted(_) => "answer_untrusted",
            Self::Identity(_) => "answer_wrong_identity",
            Self::OtherKey => "answer_wrong_key",
        }
    }

    /// What it means for the next tries.
    pub(super) fn outcome(&self) -> Outcome {
        match self {
            // Of the way to the CA, not of this identity.
            Self::Roots(_) | Self::Token(..) | Self::Unreachable(_) | Self::Timeout(_) => Outcome::Unreachable,
            Self::Chain(_) | Self::Untrusted(_) | Self::Identity(_) | Self::OtherKey => Outcome::Unusable,
            Self::Abandoned => Outcome::Abandoned,
            Self::Address(..) | Self::Key(_) | Self::Internal(_) | Self::Refused(_) => Outcome::Refused,
        }
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
            if error.outcome() == Outcome::Unreachable {
                self.hang_up();
            }
            error
        })?;
        let (held, roots) = check(&answer.into_inner().cert_chain, identity, key, &self.bundle, SystemTime::now())?;
        self.bundle.answered(roots);
        Ok(held)
    }

    fn request(&self, identity: &SpiffeId, csr: String) -> Result<Request<IstioCertificateRequest>, FetchError> {
        let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
        let mut fields = BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), text(identity.as_str()))]);
        fields.extend(self.config.cert_signer.as_deref().map(|signer| (CERT_SIGNER.to_owned(), text(signer))));
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.config.lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct { fields }),
        });
        for CaHeader { name, value } in &self.config.headers {
            request.metadata_mut().append(name.clone(), value.clone());
        }
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

    fn bad_address(&self, what: &dyn ToString) -> FetchError {
        FetchError::Address(self.config.address.clone(), what.to_string())
    }

    /// The address, and what gRPC knows of it: TLS is `dial`'s.
    fn endpoint(&self) -> Result<(Uri, Endpoint), FetchError> {
        let plain = self.config.address.strip_prefix("https://").ok_or_else(|| self.bad_address(&"the scheme"))?;
        let address: Uri = self.config.address.parse().map_err(|problem| self.bad_address(&problem))?;
        let endpoint =
            Endpoint::from_shared(format!("http://{plain}")).map_err(|problem| self.bad_address(&problem))?;
        let endpoint = endpoint
            .origin(address.clone())
            .timeout(limits::FETCH)
            .http2_keep_alive_interval(limits::PING_INTERVAL)
            .keep_alive_timeout(limits::PING_TIMEOUT);
        Ok((address, endpoint))
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
        let (address, endpoint) = self.endpoint()?;
        let tls = ca_client_config(&self.bundle.of_file()).map_err(|error| FetchError::Internal(error.to_string()))?;
        let dial =
            Dial::new(address, self.config.server_name.as_deref(), tls).map_err(|error| self.bad_address(&error))?;
        let channel = endpoint.connect_with_connector_lazy(dial);
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
    // A status with a cause was made here, from a connection that broke: the CA said nothing.
    let ours = source.is_some();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    match status.code() {
        _ if ours => FetchError::Unreachable(text),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::ResourceExhausted => {
            FetchError::Unreachable(text)
        }
        _ => FetchError::Refused(text),
    }
}
