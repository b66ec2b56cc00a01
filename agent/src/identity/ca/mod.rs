//! The CA that is built in: answers Istio's `CreateCertificate` for callers with the right token.
//!
//! A request becomes a certificate in `issue` (pure), connections are in `server`. `root` is what signs, `source` and `secret` say
//! where it comes from, `publish` takes its trust bundle to the nodes, and `rotate` puts another in its place.
//! Nothing of a request's extensions is ever copied, and a caller never learns why it was refused.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod issue;
mod publish;
mod root;
pub mod rotate;
mod secret;
mod server;
mod source;

#[cfg(test)]
pub(super) use root::pem;

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

pub use root::{KeyError, KeyProblem};
pub use secret::api_client;
pub use server::Ca;
pub use source::{KeySource, KeyStatus};

use super::TrustDomain;

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
    /// Bearer token that callers must present, read at each call.
    pub token_file: PathBuf,
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
    #[error("the API server can't be asked: {0}")]
    Cluster(String),
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Name(String),
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("TLS settings: {0}")]
    Tls(#[from] rustls::Error),
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
            Self::Serve(_) => "grpc",
        }
    }
}

/// Runs the CA until `shutdown`: [`Ca::bind`], then [`Ca::run`].
///
/// # Errors
/// When it can't start.
pub async fn serve(config: CaConfig, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), CaError> {
    Ca::bind(config).await?.run(shutdown).await
}

#[cfg(test)]
mod tests;
