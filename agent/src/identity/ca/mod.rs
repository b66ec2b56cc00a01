//! The CA that is built in: answers Istio's `CreateCertificate` for agents, each for what runs on its node.
//!
//! Connections are in `server`, the way of one request in `authority`:
//!
//! 1. `review` (pure): is the token good? Its words come from the API server, asked by `kubernetes`
//! 2. `authorize` (pure): is the caller an agent's pod, and is a pod of the identity on its node?
//! 3. `issue` (pure): is the CSR in order?
//! 4. `admission`: is it one too many, or a key that was signed for somebody else?
//! 5. `issue` signs, with the key from `root`
//!
//! `source` and `secret` say where that key comes from, `publish` takes its trust bundle to the nodes, and `rotate` puts another in
//! its place.
//!
//! Each step takes by value what the one before made, so none can be left out. Nothing of a request's extensions is ever copied,
//! and a caller never learns why it was refused (`opaque`: nor from the gRPC library).

mod admission;
mod authority;
mod authorize;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod issue;
mod kubernetes;
mod opaque;
mod publish;
mod recent;
mod refusal;
mod review;
mod root;
pub mod rotate;
mod secret;
mod server;
mod source;
mod vitals;

#[cfg(test)]
pub(super) use root::pem;

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

pub use root::{KeyError, KeyProblem};
pub use server::Ca;
pub use source::{KeySource, KeyStatus};
pub use vitals::Vitals;

use super::TrustDomain;
use crate::cluster::ClientError;

/// Who may ask for certificates.
#[derive(Debug, Clone)]
pub enum Authorization {
    /// Whoever presents the bearer token in this file, read at each call: for any identity of the trust domain. For a lab.
    Token(PathBuf),
    /// The agents of a Kubernetes cluster, each for what runs on its node.
    Nodes(NodeAuthorization),
}

/// How node authorization is done.
#[derive(Debug, Clone)]
pub struct NodeAuthorization {
    /// The way to the API server; without it that of a pod in the cluster.
    pub kubeconfig: Option<PathBuf>,
    /// Audience that agents' tokens must be for.
    pub audience: String,
    /// Service accounts of agents.
    pub agents: Vec<ServiceAccount>,
    /// A caller that names another cluster (`clusterid`) is refused.
    pub cluster_id: String,
}

/// A Kubernetes service account, written `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    pub namespace: String,
    pub name: String,
}

/// Ten years.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);
/// What a workload's certificate lasts at most unless configured otherwise.
pub const MAX_LIFETIME: Duration = Duration::from_secs(3_600);

#[derive(Debug, Clone)]
pub struct CaConfig {
    /// Port 0 takes a free one.
    pub listen: SocketAddr,
    pub trust_domain: TrustDomain,
    pub root: KeySource,
    /// Where the trust bundle is written (certificates only), for the nodes to read.
    pub publish_root: Option<PathBuf>,
    pub authorization: Authorization,
    /// DNS names and IP addresses of the CA's own TLS certificate.
    pub names: Vec<String>,
    /// A request for longer gets this.
    pub max_lifetime: Duration,
}

/// Why the CA can't run.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("can't listen on {0}: {1}")]
    Listen(SocketAddr, io::Error),
    #[error("can't write {0}: {1}")]
    Publish(PathBuf, io::Error),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("a signing key in a Secret needs an API server: give --kubernetes")]
    NoCluster,
    #[error("no way to the API server: {0}")]
    Cluster(#[from] ClientError),
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Name(String),
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("TLS settings: {0}")]
    Tls(#[from] rustls::Error),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("gRPC: {0}")]
    Serve(#[from] tonic::transport::Error),
}

impl CaError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Listen(..) => "listen",
            Self::Publish(..) => "publish",
            Self::Key(error) => error.reason(),
            Self::NoCluster => "no_cluster",
            Self::Cluster(_) => "cluster",
            Self::Name(_) => "name",
            Self::Certificate(_) => "certificate",
            Self::Tls(_) => "tls",
            Self::Metrics(_) => "metrics",
            Self::Serve(_) => "grpc",
        }
    }
}

#[cfg(test)]
mod tests;
