//! Why a request gets no certificate. The caller never sees it; log and metric do.

use tonic::Status;

use crate::identity::{SpiffeError, SpiffeId};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    // the token
    #[error("no bearer token")]
    NoToken,
    #[error("the wrong bearer token")]
    Token,
    #[error("no token can be right: {0}")]
    TokenUnreadable(String),
    #[error("the token is no service account's: {0}")]
    TokenMalformed(&'static str),
    #[error("the token has expired")]
    TokenExpired,
    #[error("the token is for {presented:?}, not for {expected:?}")]
    TokenAudience { presented: Vec<String>, expected: String },
    #[error("the API server does not know the token: {0}")]
    TokenRejected(String),
    #[error("the token is bound to no pod")]
    TokenUnbound,
    #[error("cluster {0:?} is not ours")]
    Cluster(String),
    // the caller
    #[error("{0:?} is no account of an agent")]
    CallerAccount(String),
    #[error("the caller's pod {0} does not exist")]
    CallerPodGone(String),
    #[error("the caller's pod {pod} has the UID {found}, not {claimed}")]
    CallerPodUid { pod: String, found: String, claimed: String },
    #[error("the caller's pod {pod} runs as {found}, not as {claimed}")]
    CallerPodAccount { pod: String, found: String, claimed: String },
    #[error("the caller's pod {0} {1}")]
    CallerPodEnded(String, &'static str),
    #[error("the caller's token is of node {claimed}, its pod {pod} is on {found:?}")]
    CallerNode { pod: String, found: String, claimed: String },
    // the identity
    #[error("no impersonated identity")]
    NoIdentity,
    #[error("the impersonated identity is no SPIFFE id: {0}")]
    BadIdentity(#[from] SpiffeError),
    #[error("{0} is not of our trust domain")]
    TrustDomain(SpiffeId),
    #[error("no pod of {identity} on node {node}")]
    NotOnNode { identity: SpiffeId, node: String },
    #[error("the pods of {identity} on node {node} have ended: {why}")]
    Ended { identity: SpiffeId, node: String, why: &'static str },
    #[error("node {0} asked for too many pods that nobody knows")]
    Questions(String),
    // the request
    #[error("the request has more than {0} bytes")]
    Oversize(usize),
    #[error("the request can't be read: {0}")]
    Unread(String),
    #[error("the CSR has {0} bytes")]
    TooLarge(usize),
    #[error("the CSR can't be parsed")]
    Malformed,
    #[error("the CSR is not signed by its key")]
    Signature,
    #[error("the CSR's key is neither P-256 nor Ed25519")]
    Key,
    #[error("the CSR asks for {0}, not for the impersonated identity")]
    OtherName(String),
    #[error("the CSR asks for {0} names")]
    Names(usize),
    #[error("the CSR asks for a certificate that signs others")]
    CertificateAuthority,
    #[error("the CSR's key was signed for another caller or identity already")]
    Replayed,
    #[error("node {0} asks for too many new identities")]
    NewIdentities(String),
    #[error("node {0} asks for too many certificates")]
    Certificates(String),
    // ourselves
    #[error("the API server can't be asked: {0}")]
    ApiUnavailable(String),
    #[error(
        "the API server does not let us ask: {0}; give the CA's service account the rights to create tokenreviews and to get, list and watch pods"
    )]
    ApiForbidden(String),
    #[error("the issuing certificate has expired")]
    Expired,
    #[error("signing failed: {0}")]
    Sign(String),
}

impl Refusal {
    /// Stable name: metric label and log key.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::Token => "wrong_token",
            Self::TokenUnreadable(_) => "token_unreadable",
            Self::TokenMalformed(_) => "token_malformed",
            Self::TokenExpired => "token_expired",
            Self::TokenAudience { .. } => "token_audience",
            Self::TokenRejected(_) => "token_rejected",
            Self::TokenUnbound => "token_unbound",
            Self::Cluster(_) => "cluster",
            Self::CallerAccount(_) => "caller_account",
            Self::CallerPodGone(_) => "caller_pod_gone",
            Self::CallerPodUid { .. } => "caller_pod_uid",
            Self::CallerPodAccount { .. } => "caller_pod_account",
            Self::CallerPodEnded(..) => "caller_pod_ended",
            Self::CallerNode { .. } => "caller_node",
            Self::NoIdentity => "no_identity",
            Self::BadIdentity(_) => "bad_spiffe_id",
            Self::TrustDomain(_) => "trust_domain",
            Self::NotOnNode { .. } => "not_on_node",
            Self::Ended { .. } => "pod_ended",
            Self::Questions(_) => "too_many_questions",
            Self::Oversize(_) => "request_too_large",
            Self::Unread(_) => "request_malformed",
            Self::TooLarge(_) => "csr_too_large",
            Self::Malformed => "csr_malformed",
            Self::Signature => "csr_signature",
            Self::Key => "csr_key",
            Self::OtherName(_) => "csr_other_name",
            Self::Names(_) => "csr_names",
            Self::CertificateAuthority => "csr_ca",
            Self::Replayed => "csr_replayed",
            Self::NewIdentities(_) => "too_many_new_identities",
            Self::Certificates(_) => "too_many_certificates",
            Self::ApiUnavailable(_) => "api_unavailable",
            Self::ApiForbidden(_) => "api_forbidden",
            Self::Expired => "issuer_expired",
            Self::Sign(_) => "sign",
        }
    }

    /// It says nothing about the request: another try may well succeed, and the caller may know that.
    pub fn outage(&self) -> bool {
        matches!(self, Self::ApiUnavailable(_) | Self::ApiForbidden(_))
    }

    /// What the caller is told: one of two answers, neither of which says what was wrong with the request.
    pub fn status(&self) -> Status {
        if self.outage() {
            Status::unavailable("try again later")
        } else {
            Status::unauthenticated("request authenticate failure")
        }
    }
}
