//! SPIFFE ids of Kubernetes workloads, parsed once and compared by bytes.
//!
//! The form is `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` and nothing else: no port, no userinfo, no
//! percent encoding, no upper case in the scheme or trust domain, no NUL, no empty part.
//! Source: SPIFFE-ID §2; Kubernetes names are RFC 1123 labels or subdomains.

use std::{fmt, str::FromStr, sync::Arc};

/// Longest id accepted, bytes (SPIFFE-ID §2.3).
pub const MAX_LENGTH: usize = 2_048;
/// Longest trust domain accepted, bytes (SPIFFE-ID §2.1).
const MAX_TRUST_DOMAIN: usize = 255;
/// Longest Kubernetes object name (RFC 1123 subdomain), bytes.
const MAX_NAME: usize = 253;

/// A SPIFFE trust domain: lower-case letters, digits, `.`, `-`, `_`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > MAX_TRUST_DOMAIN || !text.bytes().all(allowed) {
            return Err(SpiffeError::TrustDomain);
        }
        Ok(Self(text.into()))
    }
}

/// Our trust domain, and the names that mean the same while a mesh moves from one to another (Istio's
/// `trustDomainAliases`). Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustDomains {
    own: TrustDomain,
    aliases: Arc<[TrustDomain]>,
}

impl TrustDomains {
    #[must_use]
    pub fn new(own: TrustDomain, aliases: &[TrustDomain]) -> Self {
        Self { own, aliases: aliases.into() }
    }

    #[must_use]
    pub fn own(&self) -> &TrustDomain {
        &self.own
    }

    /// Whether an identity is of our trust domain, by any of its names.
    #[must_use]
    pub fn include(&self, id: &SpiffeId) -> bool {
        let domain = id.trust_domain();
        self.own.as_str() == domain || self.aliases.iter().any(|alias| alias.as_str() == domain)
    }

    /// Whether both are the same identity, by whichever of our names.
    #[must_use]
    pub fn same(&self, one: &SpiffeId, other: &SpiffeId) -> bool {
        one == other || one.same_account(other) && self.include(one) && self.include(other)
    }
}

/// The identity of a workload. Cheap to clone: one shared string and two offsets.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain_end: u16,
    namespace_end: u16,
}

const SCHEME: &str = "spiffe://";
const NAMESPACE: &str = "/ns/";
const SERVICE_ACCOUNT: &str = "/sa/";

impl SpiffeId {
    /// The id of a service account.
    ///
    /// # Errors
    /// When a name is not a Kubernetes name.
    pub fn new(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, SpiffeError> {
        format!("{SCHEME}{trust_domain}{NAMESPACE}{namespace}{SERVICE_ACCOUNT}{service_account}").parse()
    }

    /// The whole id, `spiffe://…`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The id without `spiffe://`, as AuthorizationPolicy writes principals.
    #[must_use]
    pub fn principal(&self) -> &str {
        self.text.get(SCHEME.len()..).unwrap_or_default()
    }

    #[must_use]
    pub fn trust_domain(&self) -> &str {
        self.text.get(SCHEME.len()..usize::from(self.trust_domain_end)).unwrap_or_default()
    }

    /// The part after the trust domain, `/ns/…/sa/…`.
    #[must_use]
    pub fn path(&self) -> &str {
        self.text.get(usize::from(self.trust_domain_end)..).unwrap_or_default()
    }

    /// Whether both are the same service account, whatever their trust domains.
    #[must_use]
    pub fn same_account(&self, other: &Self) -> bool {
        self.path() == other.path()
    }

    #[must_use]
    pub fn namespace(&self) -> &str {
        let start = usize::from(self.trust_domain_end) + NAMESPACE.len();
        self.text.get(start..usize::from(self.namespace_end)).unwrap_or_default()
    }

    #[must_use]
    pub fn service_account(&self) -> &str {
        self.text.get(usize::from(self.namespace_end) + SERVICE_ACCOUNT.len()..).unwrap_or_default()
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        if text.len() > MAX_LENGTH {
            return Err(SpiffeError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeError::Scheme)?;
        let (trust_domain, path) = rest.find('/').map(|at| rest.split_at(at)).ok_or(SpiffeError::Path)?;
        trust_domain.parse::<TrustDomain>()?;
        let names = path.strip_prefix(NAMESPACE).ok_or(SpiffeError::Path)?;
        let (namespace, service_account) = names.split_once(SERVICE_ACCOUNT).ok_or(SpiffeError::Path)?;
        if !kubernetes_name(namespace) || !kubernetes_name(service_account) {
            return Err(SpiffeError::Path);
        }
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let namespace_end = trust_domain_end + NAMESPACE.len() + namespace.len();
        Ok(Self {
            text: text.into(),
            trust_domain_end: u16::try_from(trust_domain_end).map_err(|_| SpiffeError::TooLong)?,
            namespace_end: u16::try_from(namespace_end).map_err(|_| SpiffeError::TooLong)?,
        })
    }
}

/// RFC 1123 subdomain, as Kubernetes names objects.
fn kubernetes_name(name: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = name.as_bytes();
    bytes.len() <= MAX_NAME
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why a text is no SPIFFE id of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    #[error("a SPIFFE id starts with spiffe://")]
    Scheme,
    #[error("a trust domain has only a-z, 0-9, '.', '-', '_' and at most 255 bytes")]
    TrustDomain,
    #[error("the path of a workload's SPIFFE id is /ns/<namespace>/sa/<service account>")]
    Path,
    #[error("a SPIFFE id has at most 2048 bytes")]
    TooLong,
}
