//! From a request to a certificate. Pure but for the random serial.
//!
//! The certificate carries the impersonated identity and nothing that the request asked for beside its public key.

use std::time::{Duration, SystemTime};

use prost_types::value::Kind;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PKCS_ED25519, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

use super::root::{Root, pem, random_serial};
use crate::{
    identity::{IMPERSONATED_IDENTITY, SpiffeError, SpiffeId, TrustDomain, proto::IstioCertificateRequest, roots::hex},
    life::limits,
};

/// Why a request was refused. The caller never sees it; the log does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("no bearer token, or the wrong one")]
    Token,
    #[error("no token can be right: {0}")]
    NoToken(String),
    #[error("no impersonated identity")]
    NoIdentity,
    #[error("the impersonated identity is no SPIFFE id: {0}")]
    BadIdentity(#[from] SpiffeError),
    #[error("{0} is not of our trust domain")]
    TrustDomain(SpiffeId),
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
    #[error("the issuing certificate has expired")]
    Expired,
    #[error("signing failed: {0}")]
    Sign(String),
}

impl Refusal {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Token => "wrong_token",
            Self::NoToken(_) => "token_unreadable",
            Self::NoIdentity => "no_identity",
            Self::BadIdentity(_) => "bad_spiffe_id",
            Self::TrustDomain(_) => "trust_domain",
            Self::TooLarge(_) => "csr_too_large",
            Self::Malformed => "csr_malformed",
            Self::Signature => "csr_signature",
            Self::Key => "csr_key",
            Self::OtherName(_) => "csr_other_name",
            Self::Expired => "issuer_expired",
            Self::Sign(_) => "sign",
        }
    }
}

/// A request that may be signed.
pub(super) struct Approved {
    pub identity: SpiffeId,
    public_key: SubjectPublicKeyInfo,
    lifetime: Duration,
}

/// A certificate, and what to write to the log about it.
pub(super) struct Issued {
    pub certificate: CertificateDer<'static>,
    pub serial: String,
    pub not_after: SystemTime,
}

impl Issued {
    pub fn pem(&self) -> String {
        pem(&self.certificate)
    }
}

/// Everything about a request that can be wrong, but its token.
pub(super) fn examine(
    request: &IstioCertificateRequest,
    trust_domain: &TrustDomain,
    max_lifetime: Duration,
) -> Result<Approved, Refusal> {
    let identity = impersonated(request)?;
    if identity.trust_domain() != trust_domain.as_str() {
        return Err(Refusal::TrustDomain(identity));
    }
    let public_key = public_key(&request.csr, &identity)?;
    let asked = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
    let lifetime = asked.map_or(max_lifetime, |seconds| Duration::from_secs(seconds).min(max_lifetime));
    Ok(Approved { identity, public_key, lifetime })
}

fn impersonated(request: &IstioCertificateRequest) -> Result<SpiffeId, Refusal> {
    let field = request.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY));
    match field.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(text)) => Ok(text.parse()?),
        _ => Err(Refusal::NoIdentity),
    }
}

/// The key of a CSR that proves its possession and asks for no other name.
fn public_key(csr: &str, identity: &SpiffeId) -> Result<SubjectPublicKeyInfo, Refusal> {
    if csr.len() > limits::CSR_BYTES {
        return Err(Refusal::TooLarge(csr.len()));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).map_err(|_| Refusal::Malformed)?;
    let (rest, parsed) = X509CertificationRequest::from_der(&der).map_err(|_| Refusal::Malformed)?;
    if !rest.is_empty() {
        return Err(Refusal::Malformed);
    }
    let key =
        SubjectPublicKeyInfo::from_der(parsed.certification_request_info.subject_pki.raw).map_err(|_| Refusal::Key)?;
    if ![&PKCS_ECDSA_P256_SHA256, &PKCS_ED25519].contains(&key.algorithm()) {
        return Err(Refusal::Key);
    }
    parsed.verify_signature().map_err(|_| Refusal::Signature)?;
    for extension in parsed.requested_extensions().into_iter().flatten() {
        match extension {
            ParsedExtension::SubjectAlternativeName(names) => {
                for name in &names.general_names {
                    if !matches!(name, GeneralName::URI(uri) if *uri == identity.as_str()) {
                        return Err(Refusal::OtherName(name.to_string().chars().take(256).collect()));
                    }
                }
            }
            ParsedExtension::ParseError { .. } => return Err(Refusal::Malformed),
            // Not copied, so of no effect.
            _ => {}
        }
    }
    Ok(key)
}

/// Signs: the URI SAN (critical, there is no subject), digitalSignature, serverAuth and clientAuth, CA:FALSE.
pub(super) fn sign(root: &Root, approved: &Approved, now: SystemTime) -> Result<Issued, Refusal> {
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        vec![SanType::URI(approved.identity.as_str().try_into().map_err(|error: rcgen::Error| sign_error(&error))?)];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    issue(root, params, &approved.public_key, approved.lifetime, now)
}

/// The CA's own TLS certificate.
pub(super) fn sign_server(
    root: &Root,
    names: &[SanType],
    key: &impl PublicKeyData,
    now: SystemTime,
) -> Result<Issued, Refusal> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names.to_vec();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    issue(root, params, key, limits::CA_TLS_LIFETIME, now)
}

fn issue(
    root: &Root,
    mut params: CertificateParams,
    key: &impl PublicKeyData,
    lifetime: Duration,
    now: SystemTime,
) -> Result<Issued, Refusal> {
    if root.not_after <= now {
        return Err(Refusal::Expired);
    }
    let serial = random_serial().map_err(|error| sign_error(&error))?;
    let not_after = root.not_after.min(now + lifetime);
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.not_before = OffsetDateTime::from(now - limits::CLOCK_SKEW.min(lifetime / 10));
    params.not_after = OffsetDateTime::from(not_after);
    let certificate = params.signed_by(key, &root.issuer).map_err(|error| sign_error(&error))?;
    Ok(Issued { certificate: certificate.der().clone(), serial: hex(&serial), not_after })
}

fn sign_error(error: &dyn ToString) -> Refusal {
    Refusal::Sign(error.to_string())
}
