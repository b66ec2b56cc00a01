//! A distrustful look at what a CA answered: the chain in any form that servers of the API give it, used only if it leads to
//! the mesh's roots and carries exactly the identity asked for and the key just made.
//!
//! Forms: a certificate per entry (istiod, heddle); the leaf with its intermediates in one entry (istio-csr); the roots of a
//! rotation in one entry; no root at all.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    FetchError, PeerError, SpiffeId,
    key::WorkloadKey,
    roots::{TrustBundle, is_root, span, unix_time},
    tls::provider,
    verify::{spiffe_id, tls_reason},
};
use crate::life::limits;

/// A certificate that signs others, as `heddle certs` and the metrics show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerStatus {
    /// RFC 4514 text of the subject.
    pub subject: String,
    /// Serial number in lower-case hex.
    pub serial: String,
    pub not_after: SystemTime,
}

impl IssuerStatus {
    fn of(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let (serial, _, not_after) = span(der)?;
        Some(Self { subject: certificate.subject().to_string(), serial, not_after })
    }
}

/// A certificate with its key, checked.
#[derive(Debug)]
pub(super) struct Held {
    pub certified: Arc<CertifiedKey>,
    pub serial: String,
    pub not_before: SystemTime,
    /// Of the leaf.
    pub not_after: SystemTime,
    /// When the first certificate on the way to the root, or that, ends: peers refuse it from then on.
    pub usable_until: SystemTime,
    /// The intermediates on the way to the root, the leaf's issuer first.
    pub intermediates: Vec<IssuerStatus>,
    pub root: Option<IssuerStatus>,
    pub received: SystemTime,
}

impl Held {
    pub fn valid(&self, now: SystemTime) -> bool {
        now < self.usable_until
    }

    /// How long it lasts by its own dates, whatever the time is here.
    pub fn lifetime(&self) -> Duration {
        self.usable_until.duration_since(self.not_before).unwrap_or_default()
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
    let (intermediates, root) = way(leaf, intermediates, trusted.certificates(), unix_time(now));
    let ends = intermediates.iter().chain(&root).map(|issuer| issuer.not_after);
    let usable_until = ends.fold(not_after, SystemTime::min);
    let certified = CertifiedKey::new(presented, key.into_signing_key());
    certified.keys_match().map_err(|_| FetchError::OtherKey)?;
    let certified = Arc::new(certified);
    let held = Held { certified, serial, not_before, not_after, usable_until, intermediates, root, received: now };
    Ok((held, roots))
}

/// The intermediates that lead from the leaf to a root, and that root. What verified has such a way.
fn way(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &[CertificateDer<'static>],
    now: UnixTime,
) -> (Vec<IssuerStatus>, Option<IssuerStatus>) {
    let algorithms = provider().signature_verification_algorithms.all;
    let found = roots.iter().find_map(|root| {
        let anchors = [anchor_from_trusted_cert(root).ok()?];
        let end = EndEntityCert::try_from(leaf).ok()?;
        let path =
            end.verify_for_usage(algorithms, &anchors, intermediates, now, KeyUsage::server_auth(), None, None).ok()?;
        let used = path.intermediate_certificates().filter_map(|used| IssuerStatus::of(&used.der())).collect();
        Some((used, IssuerStatus::of(root)))
    });
    found.unwrap_or_default()
}

/// What is presented to peers (leaf and intermediates), and the roots at the end.
type Split = (Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>);

fn split(chain: &[String]) -> Result<Split, FetchError> {
    let mut certificates = Vec::new();
    for entry in chain {
        for certificate in CertificateDer::pem_slice_iter(entry.as_bytes()) {
            certificates.push(certificate.map_err(|error| FetchError::Chain(error.to_string()))?);
            if certificates.len() > limits::CHAIN_CERTIFICATES {
                return Err(FetchError::Chain(format!("it has more than {} certificates", limits::CHAIN_CERTIFICATES)));
            }
        }
    }
    let roots = certificates.iter().skip(1).position(is_root).map_or(certificates.len(), |at| at + 1);
    let rest = certificates.split_off(roots.min(certificates.len()));
    Ok((certificates, rest.into_iter().filter(is_root).collect()))
}
