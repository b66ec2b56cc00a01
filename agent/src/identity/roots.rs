//! The mesh's roots: those in the trust bundle file and those that the CA's last answer ended with.
//!
//! The file is read again when it changes; a broken one is reported and the last good state stays in force.

use std::{
    io::Read,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{CertificateError, OtherError, RootCertStore};
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime, pem::PemObject};
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{revocation::Lists, tls::provider};
use crate::life::limits;

/// Why a set of roots can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootsError {
    #[error("can't read {0}: {1}")]
    File(PathBuf, String),
    #[error("a trust bundle holds PEM certificates: {0}")]
    Pem(String),
    #[error("a trust bundle holds at least one certificate")]
    Empty,
    #[error("certificate {0} of the trust bundle is no CA certificate")]
    NotCa(usize),
    #[error("every certificate of the trust bundle has expired")]
    Expired,
}

impl RootsError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::File(..) => "roots_unreadable",
            Self::Pem(_) | Self::Empty | Self::NotCa(_) => "roots_invalid",
            Self::Expired => "roots_expired",
        }
    }

    /// Every reason, for metrics.
    pub const REASONS: [&str; 3] = ["roots_unreadable", "roots_invalid", "roots_expired"];

    /// What to do about it.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        match self {
            Self::File(..) => "put the CA's root there, readable (heddle ca publishes it with --publish-root)",
            Self::Pem(_) | Self::Empty => "write the CA's roots as PEM (-----BEGIN CERTIFICATE-----), each whole",
            Self::NotCa(_) => {
                "take it out: the bundle holds roots (basic constraint CA:TRUE), never a workload's certificate"
            }
            Self::Expired => "renew the CA's root and write the new one there",
        }
    }
}

/// A trust bundle that can't be used, as people are told of it: one line with the file, what is wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("trust bundle {}: {error}; {}", path.display(), error.fix())]
pub struct BundleError {
    pub path: PathBuf,
    pub error: RootsError,
}

/// What a certificate is presented for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Usage {
    Serving,
    Connecting,
}

/// One root as `heddle certs` and the metrics show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootStatus {
    /// RFC 4514 text of the subject.
    pub subject: String,
    /// Serial number in lower-case hex.
    pub serial: String,
    pub not_after: SystemTime,
}

/// A set of trust anchors, ready to verify with.
#[derive(Debug)]
pub(super) struct Roots {
    certificates: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    /// Subject and key of those that end, and when: an expired root vouches for nobody.
    ends: Vec<(TrustAnchor<'static>, UnixTime)>,
}

impl Roots {
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Self {
        let mut anchors = RootCertStore::empty();
        anchors.add_parsable_certificates(certificates.iter().cloned());
        let ends = certificates.iter().filter_map(|der| {
            let anchor = webpki::anchor_from_trusted_cert(der).ok()?.to_owned();
            Some((anchor, unix_time(span(der)?.2)))
        });
        Self { ends: ends.collect(), anchors: anchors.roots, certificates }
    }

    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Chain, validity and extended key usage of a peer; with `lists`, that neither it nor its issuers are revoked.
    pub fn verify(
        &self,
        usage: Usage,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        lists: Option<&Lists>,
    ) -> Result<(), rustls::Error> {
        let certificate = EndEntityCert::try_from(leaf).map_err(refusal)?;
        let usage = match usage {
            Usage::Serving => KeyUsage::server_auth(),
            Usage::Connecting => KeyUsage::client_auth(),
        };
        let acceptable = |path: &VerifiedPath<'_>| {
            let mut alike = self.ends.iter().filter(|(anchor, _)| anchor == path.anchor()).map(|(_, end)| *end);
            // A root that was renewed with its key has two ends: the later one counts.
            match alike.next().map(|first| alike.fold(first, Ord::max)) {
                Some(end) if end <= now => return Err(webpki::Error::CertExpired { time: now, not_after: end }),
                _ => {}
            }
            lists.map_or(Ok(()), |lists| lists.check(path))
        };
        let algorithms = provider().signature_verification_algorithms.all;
        certificate
            .verify_for_usage(algorithms, &self.anchors, intermediates, now, usage, None, Some(&acceptable))
            .map(drop)
            .map_err(refusal)
    }

    /// Chain, validity and extended key usage of a peer that serves.
    pub fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.verify(Usage::Serving, leaf, intermediates, now, None)
    }

    /// Chain, validity and extended key usage of a peer that connects.
    pub fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.verify(Usage::Connecting, leaf, intermediates, now, None)
    }

    pub fn status(&self) -> Vec<RootStatus> {
        self.certificates
            .iter()
            .filter_map(|der| {
                let (_, certificate) = X509Certificate::from_der(der).ok()?;
                Some(RootStatus {
                    subject: certificate.subject().to_string(),
                    serial: hex(certificate.raw_serial()),
                    not_after: system_time(certificate.validity().not_after.timestamp()),
                })
            })
            .collect()
    }
}

/// What webpki says of a certificate, as rustls and the peer are told.
fn refusal(error: webpki::Error) -> rustls::Error {
    use webpki::Error;
    match error {
        Error::BadDer | Error::BadDerTime | Error::TrailingData(_) => CertificateError::BadEncoding,
        Error::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        Error::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        Error::UnknownIssuer => CertificateError::UnknownIssuer,
        Error::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        Error::CertRevoked => CertificateError::Revoked,
        Error::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
    .into()
}

/// What the agent trusts now, shared with every verifier.
#[derive(Debug)]
pub(super) struct TrustBundle {
    path: PathBuf,
    sources: Mutex<Sources>,
    current: Arc<ArcSwap<Roots>>,
}

#[derive(Debug, Default)]
struct Sources {
    bytes: Vec<u8>,
    /// How often the file was seen to hold other roots.
    generation: u64,
    file: Vec<CertificateDer<'static>>,
    answer: Vec<CertificateDer<'static>>,
}

impl TrustBundle {
    pub fn new(path: PathBuf) -> Self {
        Self { path, sources: Mutex::default(), current: Arc::new(ArcSwap::from_pointee(Roots::new(Vec::new()))) }
    }

    pub fn current(&self) -> &Arc<ArcSwap<Roots>> {
        &self.current
    }

    /// An error of [`TrustBundle::reload`], as people are told of it.
    pub fn problem(&self, error: RootsError) -> BundleError {
        BundleError { path: self.path.clone(), error }
    }

    /// Reads the file. Gives how often it was seen to hold other roots than before.
    pub fn reload(&self) -> Result<u64, RootsError> {
        let bytes = read_bundle(&self.path)?;
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.bytes == bytes {
            return Ok(sources.generation);
        }
        let certificates = parse_bundle(&bytes)?;
        let now = SystemTime::now();
        if certificates.iter().all(|der| span(der).is_some_and(|(_, _, end)| end <= now)) {
            return Err(RootsError::Expired);
        }
        sources.generation += u64::from(sources.file != certificates);
        sources.bytes = bytes;
        sources.file = certificates;
        self.publish(&sources);
        Ok(sources.generation)
    }

    /// The bundle file's bytes as last accepted, PEM: what the CA itself is verified with.
    pub fn pem(&self) -> Vec<u8> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).bytes.clone()
    }

    /// The roots of the file alone.
    pub fn of_file(&self) -> Roots {
        Roots::new(self.sources.lock().unwrap_or_else(PoisonError::into_inner).file.clone())
    }

    /// Roots in force if the CA answers with `answer`.
    pub fn with_answer(&self, answer: &[CertificateDer<'static>]) -> Roots {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        Roots::new(union(&sources.file, answer))
    }

    /// The roots of the CA's newest answer take the place of those of the one before.
    pub fn answered(&self, answer: Vec<CertificateDer<'static>>) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.answer != answer {
            sources.answer = answer;
            self.publish(&sources);
        }
    }

    fn publish(&self, sources: &Sources) {
        self.current.store(Arc::new(Roots::new(union(&sources.file, &sources.answer))));
    }
}

fn union(file: &[CertificateDer<'static>], answer: &[CertificateDer<'static>]) -> Vec<CertificateDer<'static>> {
    let mut all = file.to_vec();
    all.extend(answer.iter().filter(|certificate| !file.contains(certificate)).cloned());
    all
}

fn read_bundle(path: &Path) -> Result<Vec<u8>, RootsError> {
    read_capped(path, limits::BUNDLE_BYTES).map_err(|error| RootsError::File(path.to_owned(), error.to_string()))
}

/// A small file, whole; longer than `cap` bytes is an error.
pub(super) fn read_capped(path: &Path, cap: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(cap + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > cap {
        return Err(std::io::Error::other(format!("longer than {cap} bytes")));
    }
    Ok(bytes)
}

/// A certificate's or key's file, whole, wiped when it is dropped; longer than `limits::BUNDLE_BYTES` is an error.
///
/// # Errors
/// When it can't be read.
pub fn read_small(path: &Path) -> std::io::Result<zeroize::Zeroizing<Vec<u8>>> {
    read_capped(path, limits::BUNDLE_BYTES).map(zeroize::Zeroizing::new)
}

/// CA certificates of a PEM file; anything that is none is an error, because a bundle that is half understood is a bundle
/// of whom nobody knows what it trusts.
pub(super) fn parse_bundle(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, RootsError> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| RootsError::Pem(error.to_string()))?;
    if certificates.is_empty() {
        return Err(RootsError::Empty);
    }
    if let Some(at) = certificates.iter().position(|certificate| !is_ca(certificate)) {
        return Err(RootsError::NotCa(at + 1));
    }
    Ok(certificates)
}

fn is_ca(der: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(rest, certificate)| rest.is_empty() && certificate.is_ca())
}

/// Issued by itself, and a CA.
pub(super) fn is_root(der: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| {
        certificate.is_ca() && certificate.subject().as_raw() == certificate.issuer().as_raw()
    })
}

/// Serial number and validity of a certificate.
pub(super) fn span(der: &CertificateDer<'_>) -> Option<(String, SystemTime, SystemTime)> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let validity = certificate.validity();
    Some((
        hex(certificate.raw_serial()),
        system_time(validity.not_before.timestamp()),
        system_time(validity.not_after.timestamp()),
    ))
}

pub(super) fn system_time(seconds: i64) -> SystemTime {
    let since = Duration::from_secs(seconds.unsigned_abs());
    let time =
        if seconds < 0 { SystemTime::UNIX_EPOCH.checked_sub(since) } else { SystemTime::UNIX_EPOCH.checked_add(since) };
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A wall-clock time as the verifiers take it.
pub(super) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}
