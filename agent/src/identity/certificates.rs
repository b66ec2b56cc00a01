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

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    BundleError, CaClientConfig, CrlConfig, CrlStatus, FetchError, IssuerStatus, PeerError, RootStatus, SpiffeId,
    TrustDomain, roots::unix_time, rotation::Shared,
};

/// Whom to trust beside the bundle's word.
#[derive(Debug, Clone, Default)]
pub struct TrustConfig {
    /// Trust domains that mean ours.
    pub aliases: Vec<TrustDomain>,
    /// `None` asks for no revocation.
    pub crl: Option<CrlConfig>,
}

/// What is wrong with what peers are verified with.
#[derive(Debug, Clone, Default)]
pub struct TrustReport {
    /// The bundle's file; its last good state stays in force.
    pub bundle: Option<BundleError>,
    /// `None` where no list was asked for.
    pub crl: Option<CrlStatus>,
}

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
    /// When the first certificate of its chain ends: it is not used any more from then on.
    pub usable_until: Option<SystemTime>,
    /// The intermediates on the way to the root, the issuer first.
    pub intermediates: Vec<IssuerStatus>,
    pub root: Option<IssuerStatus>,
    /// When it came from the CA.
    pub received: Option<SystemTime>,
    /// Last failure to fetch or renew, empty when the last try worked; its stable name, and when it was.
    pub last_error: String,
    pub last_reason: &'static str,
    pub failed: Option<SystemTime>,
    /// When it is fetched or renewed next, if nothing changes until then.
    pub next_try: Option<SystemTime>,
}

/// Calls to the CA since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FetchCounts {
    pub under_way: usize,
    /// By how they ended: `ok`, or the reason of the error.
    pub ended: Vec<(&'static str, u64)>,
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
        Self::start_with(config, TrustConfig::default())
    }

    /// The same, with other names of the trust domain and revocation lists.
    ///
    /// # Errors
    /// When the CA's address can't be one.
    pub fn start_with(config: CaClientConfig, trust: TrustConfig) -> Result<Self, IdentityError> {
        let stop = CancellationToken::new();
        let guard = Arc::new(stop.clone().drop_guard());
        let shared = Arc::new(Shared::new(config, trust, &stop)?);
        tokio::spawn(super::rotation::run(Arc::clone(&shared), stop));
        Ok(Self { shared, _stop: guard })
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

    /// Calls to the CA.
    #[must_use]
    pub fn fetches(&self) -> FetchCounts {
        self.shared.fetches()
    }

    /// The roots that peers are verified with now.
    #[must_use]
    pub fn roots(&self) -> Vec<RootStatus> {
        self.shared.roots()
    }

    /// What is wrong with what peers are verified with.
    #[must_use]
    pub fn trust(&self) -> TrustReport {
        let crl = self.revocations().map(|status| status.borrow().clone());
        TrustReport { bundle: self.shared.bundle_error(), crl }
    }

    /// How revocation stands, and each change of it; `None` where no list was asked for.
    #[must_use]
    pub fn revocations(&self) -> Option<watch::Receiver<CrlStatus>> {
        self.shared.revocation().map(|revocation| revocation.status())
    }

    /// Whether a peer's chain (the leaf first), whose handshake succeeded at `then`, is revoked by now.
    #[must_use]
    pub fn revoked(&self, chain: &[CertificateDer<'_>], then: SystemTime) -> bool {
        self.shared.trust().revoked(chain, unix_time(then))
    }

    /// Time until the first certificate or root expires, the nearest first; `None` while there is none. Expired is zero.
    #[must_use]
    pub fn nearest_expiry(&self) -> Option<Duration> {
        let now = SystemTime::now();
        let leaves = self.list().into_iter().filter_map(|status| status.usable_until);
        let roots = self.roots().into_iter().map(|root| root.not_after);
        leaves.chain(roots).min().map(|at| at.duration_since(now).unwrap_or_default())
    }
}
