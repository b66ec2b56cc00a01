//! The certificates that this node holds: fetched before they are needed, renewed at half life, kept until expiry when
//! renewal fails.
//!
//! [`Certificates`] is what the tunnel sees; the work behind it is in `rotation`.

use std::{
    collections::HashSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio_util::sync::{CancellationToken, DropGuard};

use super::{CaClientConfig, FetchError, PeerError, RootStatus, SpiffeId, TrustDomain, rotation::Shared};

/// Why there is no identity, or why a peer's was refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IdentityError {
    #[error("no certificate for {0} yet: {1}")]
    NotYet(SpiffeId, String),
    #[error("the certificate for {0} has expired and could not be renewed: {1}")]
    Expired(SpiffeId, String),
    #[error("{0} is not an identity of this node")]
    NotOurs(SpiffeId),
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error(transparent)]
    Ca(#[from] FetchError),
    #[error("TLS settings: {0}")]
    Tls(#[from] rustls::Error),
}

impl IdentityError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotYet(..) => "no_certificate",
            Self::Expired(..) => "certificate_expired",
            Self::NotOurs(_) => "not_our_identity",
            Self::Peer(error) => error.reason(),
            Self::Ca(error) => error.reason(),
            Self::Tls(_) => "tls_settings",
        }
    }
}

/// One certificate as `heddle certs` and the metrics show it.
#[derive(Debug, Clone)]
pub struct CertificateStatus {
    pub identity: SpiffeId,
    /// Serial number in lower-case hex; empty while there is no certificate.
    pub serial: String,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
    /// Last failure to fetch or renew, empty when the last try worked.
    pub last_error: String,
}

/// Certificates on this node. Cheap to clone; fetching and renewing end with the last clone.
#[derive(Clone)]
pub struct Certificates {
    shared: Arc<Shared>,
    _stop: Arc<DropGuard>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("trust_domain", self.trust_domain()).finish_non_exhaustive()
    }
}

impl Certificates {
    /// Starts with no identity; [`Certificates::keep`] says which. Needs a tokio runtime. Neither the CA nor the trust
    /// bundle need be there yet.
    ///
    /// # Errors
    /// When the CA's address can't be one.
    pub fn start(config: CaClientConfig) -> Result<Self, IdentityError> {
        let shared = Arc::new(Shared::new(config)?);
        let stop = CancellationToken::new();
        tokio::spawn(super::rotation::run(Arc::clone(&shared), stop.clone()));
        Ok(Self { shared, _stop: Arc::new(stop.drop_guard()) })
    }

    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        self.shared.trust_domain()
    }

    /// Makes the set of identities that are kept ready exactly this one: new ones are fetched now, others are forgotten
    /// and their keys dropped. Identities of another trust domain are left out, with a log line.
    pub fn keep(&self, identities: HashSet<SpiffeId>) {
        self.shared.keep(identities);
    }

    /// TLS 1.3 client settings: our certificate for `own`; the server must chain to the mesh's roots and be `peer`.
    /// ALPN `h2`, no resumption, no SNI. Waits for a first certificate up to `limits::HOLD`.
    ///
    /// # Errors
    /// When there is no valid certificate by then.
    pub async fn client(&self, own: &SpiffeId, peer: &SpiffeId) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
        Ok(self.shared.client(&*self.shared.ready(own).await?, peer))
    }

    /// TLS 1.3 server settings for `own`; the client must present a certificate of our trust domain that chains to the
    /// mesh's roots. ALPN `h2`. Waits for a first certificate up to `limits::HOLD`.
    ///
    /// # Errors
    /// When there is no valid certificate by then.
    pub async fn server(&self, own: &SpiffeId) -> Result<Arc<rustls::ServerConfig>, IdentityError> {
        Ok(self.shared.ready(own).await?.server())
    }

    /// Serial number of the certificate that is held for `own`: lower-case hex, empty while there is none.
    #[must_use]
    pub fn serial(&self, own: &SpiffeId) -> String {
        self.shared.serial(own).unwrap_or_default()
    }

    /// Every identity that is kept, by name.
    #[must_use]
    pub fn list(&self) -> Vec<CertificateStatus> {
        self.shared.list()
    }

    /// The roots that peers are verified with now.
    #[must_use]
    pub fn roots(&self) -> Vec<RootStatus> {
        self.shared.roots()
    }

    /// Time until the first certificate or root expires, the nearest first; `None` while there is none. Expired is zero.
    #[must_use]
    pub fn nearest_expiry(&self) -> Option<Duration> {
        let now = SystemTime::now();
        let leaves = self.list().into_iter().filter_map(|status| status.not_after);
        let roots = self.roots().into_iter().map(|root| root.not_after);
        leaves.chain(roots).min().map(|at| at.duration_since(now).unwrap_or_default())
    }
}
