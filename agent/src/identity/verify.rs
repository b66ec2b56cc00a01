//! Is the peer who it must be? Chain, time, usage and SPIFFE id, on both sides of a handshake.
//!
//! Host names play no part. A certificate names its holder by exactly one URI SAN; other kinds of SAN are ignored.

use std::{io, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use super::{
    IdentityError, SpiffeError, SpiffeId, TrustDomain, TrustDomains,
    revocation::Standing,
    roots::{Roots, Usage},
    tls::provider,
};

/// Why a peer's certificate, whose chain is good, is not the one that it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("the certificate can't be parsed")]
    Malformed,
    #[error("the certificate has no URI SAN")]
    NoSpiffeId,
    #[error("the certificate has {0} URI SANs, not one")]
    SeveralSpiffeIds(usize),
    #[error("the certificate's URI SAN is no SPIFFE id of a workload: {0}")]
    BadSpiffeId(SpiffeError),
    #[error("the peer is {presented}, not {expected}")]
    WrongIdentity { expected: SpiffeId, presented: SpiffeId },
    #[error("the peer {presented} is not of trust domain {expected}")]
    TrustDomain { expected: TrustDomain, presented: SpiffeId },
    #[error("it can't be told whether the peer's certificate is revoked ({0})")]
    RevocationUnknown(&'static str),
}

impl PeerError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed => "bad_certificate",
            Self::NoSpiffeId | Self::SeveralSpiffeIds(_) | Self::BadSpiffeId(_) => "bad_spiffe_id",
            Self::WrongIdentity { .. } => "wrong_identity",
            Self::TrustDomain { .. } => "trust_domain",
            Self::RevocationUnknown(_) => "revocation_unknown",
        }
    }
}

impl From<PeerError> for Error {
    fn from(error: PeerError) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// Whose a verified certificate is, and its serial number in lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub identity: SpiffeId,
    pub serial: String,
}

/// What a verified peer certificate (the first of `peer_certificates()` after the handshake) says.
///
/// # Errors
/// When it has not exactly one URI SAN that is a SPIFFE id of ours.
pub fn peer(certificate: &CertificateDer<'_>) -> Result<Peer, IdentityError> {
    let parsed = parse(certificate)?;
    Ok(Peer { identity: name(&parsed)?, serial: super::roots::hex(parsed.raw_serial()) })
}

/// The one SPIFFE id of a certificate.
pub(super) fn spiffe_id(certificate: &CertificateDer<'_>) -> Result<SpiffeId, PeerError> {
    name(&parse(certificate)?)
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PeerError> {
    X509Certificate::from_der(certificate).map(|(_, parsed)| parsed).map_err(|_| PeerError::Malformed)
}

/// X509-SVID §2: exactly one URI SAN.
fn name(parsed: &X509Certificate<'_>) -> Result<SpiffeId, PeerError> {
    let names = parsed.subject_alternative_name().map_err(|_| PeerError::Malformed)?.ok_or(PeerError::NoSpiffeId)?;
    // A name that can't be read may be a second one.
    if names.value.general_names.iter().any(|name| matches!(name, GeneralName::Invalid(..))) {
        return Err(PeerError::Malformed);
    }
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uri = uris.next().ok_or(PeerError::NoSpiffeId)?;
    let others = uris.count();
    if others > 0 {
        return Err(PeerError::SeveralSpiffeIds(others + 1));
    }
    uri.parse().map_err(PeerError::BadSpiffeId)
}

/// What peers are judged by, on both sides. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Trust {
    pub roots: Arc<ArcSwap<Roots>>,
    pub domains: TrustDomains,
    pub revocation: Arc<ArcSwap<Standing>>,
}

impl Trust {
    fn verify(
        &self,
        usage: Usage,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<SpiffeId, Error> {
        let standing = self.revocation.load();
        let lists = match &**standing {
            Standing::Unasked => None,
            Standing::InForce(lists) => Some(&**lists),
            Standing::Unknown(reason) => return Err(PeerError::RevocationUnknown(reason).into()),
        };
        self.roots.load().verify(usage, leaf, intermediates, now, lists)?;
        Ok(spiffe_id(leaf)?)
    }

    /// Whether a chain (the leaf first) that was good at `then` is revoked by now: by itself or by an issuer on its way to a
    /// root.
    pub fn revoked(&self, chain: &[CertificateDer<'_>], then: UnixTime) -> bool {
        let standing = self.revocation.load();
        let (Standing::InForce(lists), Some((leaf, intermediates))) = (&**standing, chain.split_first()) else {
            return false;
        };
        if !lists.mention(chain) {
            return false;
        }
        let roots = self.roots.load();
        // Nothing but the lists may be the reason: roots that are gone revoke nothing.
        let good = |usage, lists| roots.verify(usage, leaf, intermediates, then, lists).is_ok();
        let revoked = |usage| good(usage, None) && !good(usage, Some(lists));
        revoked(Usage::Connecting) || revoked(Usage::Serving)
    }
}

/// How signatures of handshakes are verified, on either side: of TLS 1.3 alone.
macro_rules! tls13_only {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(rustls::PeerIncompatible::SupportedVersionsExtensionRequired.into())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, certificate, signature, &algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            algorithms().supported_schemes()
        }
    };
}

/// Client side: the server must be `expected`, by whichever name of our trust domain, and no other.
#[derive(Debug)]
pub(super) struct ExpectedServer {
    pub expected: SpiffeId,
    pub trust: Trust,
}

impl ServerCertVerifier for ExpectedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let presented = self.trust.verify(Usage::Serving, leaf, intermediates, now)?;
        if !self.trust.domains.same(&presented, &self.expected) {
            return Err(PeerError::WrongIdentity { expected: self.expected.clone(), presented }.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    tls13_only!();
}

/// Server side: the client must be a workload of our trust domain, by any of its names. Which one may do what is policy's to
/// say.
#[derive(Debug)]
pub(super) struct MeshClient {
    pub trust: Trust,
}

impl ClientCertVerifier for MeshClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let presented = self.trust.verify(Usage::Connecting, leaf, intermediates, now)?;
        if !self.trust.domains.include(&presented) {
            return Err(PeerError::TrustDomain { expected: self.trust.domains.own().clone(), presented }.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    tls13_only!();
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    provider().signature_verification_algorithms
}

/// Serial number of a certificate in lower-case hex.
#[must_use]
pub fn serial(certificate: &CertificateDer<'_>) -> Option<String> {
    Some(super::roots::hex(parse(certificate).ok()?.raw_serial()))
}

/// A stable reason for a failed handshake, or for the first read after one: a TLS 1.3 client learns only then that the
/// server refused its certificate (the `alert_…` reasons: what the other side said of us).
#[must_use]
pub fn handshake_reason(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::TimedOut {
        return "timeout";
    }
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(tls) => tls_reason(tls),
        None => "io",
    }
}

pub(super) fn tls_reason(error: &Error) -> &'static str {
    match error {
        Error::NoCertificatesPresented => "no_certificate_presented",
        Error::InvalidCertificate(error) => certificate_reason(error),
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => "not_tls",
        Error::PeerIncompatible(_) => "incompatible",
        Error::PeerMisbehaved(_) => "misbehaved",
        Error::NoApplicationProtocol => "no_h2",
        Error::AlertReceived(alert) => alert_reason(*alert),
        // Our own end has no certificate to serve with.
        Error::General(_) => "no_certificate",
        _ => "other",
    }
}

fn certificate_reason(error: &CertificateError) -> &'static str {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => "not_valid_yet",
        CertificateError::UnknownIssuer | CertificateError::BadSignature => "unknown_issuer",
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => "wrong_purpose",
        CertificateError::Revoked => "revoked",
        CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<PeerError>() {
            Some(error) => error.reason(),
            // webpki gives what it has no name for, among it a CA certificate or a self-signed one as a leaf.
            None => "bad_certificate",
        },
        _ => "bad_certificate",
    }
}

fn alert_reason(alert: AlertDescription) -> &'static str {
    match alert {
        AlertDescription::CertificateExpired => "alert_expired",
        AlertDescription::UnknownCA => "alert_unknown_issuer",
        AlertDescription::CertificateRequired => "alert_no_certificate",
        AlertDescription::CertificateRevoked => "alert_revoked",
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate => "alert_bad_certificate",
        AlertDescription::NoApplicationProtocol => "alert_no_h2",
        _ => "alert_other",
    }
}
