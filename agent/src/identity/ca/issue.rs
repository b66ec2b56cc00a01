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
    cri_attributes::ParsedCriAttribute,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

use super::{
    admission::Approved,
    authorize::Authorized,
    refusal::Refusal,
    root::{Root, pem, random_serial},
};
use crate::{
    identity::{IMPERSONATED_IDENTITY, SpiffeId, TrustDomain, proto::IstioCertificateRequest, roots::hex},
    life::limits,
};

/// A request of an authorized caller whose form is right. Only [`examine`] makes one.
#[derive(Debug)]
pub(super) struct Examined {
    authorized: Authorized,
    public_key: SubjectPublicKeyInfo,
    lifetime: Duration,
}

impl Examined {
    pub fn authorized(&self) -> &Authorized {
        &self.authorized
    }

    /// The public key, DER.
    pub fn public_key(&self) -> &[u8] {
        self.public_key.der_bytes()
    }
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

/// Whom the request is for: somebody of our trust domain, and a request of a size that can be right.
pub(super) fn identity(request: &IstioCertificateRequest, trust_domain: &TrustDomain) -> Result<SpiffeId, Refusal> {
    if request.csr.len() > limits::CSR_BYTES {
        return Err(Refusal::TooLarge(request.csr.len()));
    }
    let field = request.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY));
    let identity: SpiffeId = match field.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(text)) => text.parse()?,
        _ => return Err(Refusal::NoIdentity),
    };
    if identity.trust_domain() != trust_domain.as_str() {
        return Err(Refusal::TrustDomain(identity));
    }
    Ok(identity)
}

/// Everything about the CSR that can be wrong, for a caller that may have the identity.
pub(super) fn examine(
    request: &IstioCertificateRequest,
    authorized: Authorized,
    max_lifetime: Duration,
) -> Result<Examined, Refusal> {
    let public_key = public_key(&request.csr, authorized.identity())?;
    let asked = u64::try_from(request.validity_duration).ok().filter(|seconds| *seconds > 0);
    let lifetime = asked.map_or(max_lifetime, |seconds| Duration::from_secs(seconds).min(max_lifetime));
    Ok(Examined { authorized, public_key, lifetime })
}

/// The key of a CSR that proves its possession and asks for no other name.
fn public_key(csr: &str, identity: &SpiffeId) -> Result<SubjectPublicKeyInfo, Refusal> {
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
    let mut asked = 0;
    for extension in requested_extensions(&parsed) {
        match extension {
            ParsedExtension::SubjectAlternativeName(names) => {
                asked += names.general_names.len();
                for name in &names.general_names {
                    if !matches!(name, GeneralName::URI(uri) if *uri == identity.as_str()) {
                        return Err(Refusal::OtherName(name.to_string().chars().take(256).collect()));
                    }
                }
            }
            // Nothing is copied, so these have no effect: but nobody asks for them in good faith.
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                return Err(Refusal::CertificateAuthority);
            }
            ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() => return Err(Refusal::CertificateAuthority),
            ParsedExtension::ParseError { .. } => return Err(Refusal::Malformed),
            _ => {}
        }
    }
    if asked > 1 {
        return Err(Refusal::Names(asked));
    }
    Ok(key)
}

/// Those of every attribute that asks for any, not of the first alone.
fn requested_extensions<'a>(parsed: &'a X509CertificationRequest<'_>) -> impl Iterator<Item = &'a ParsedExtension<'a>> {
    parsed
        .certification_request_info
        .iter_attributes()
        .flat_map(|attribute| match attribute.parsed_attribute() {
            ParsedCriAttribute::ExtensionRequest(requested) => requested.extensions.as_slice(),
            _ => &[],
        })
        .map(|extension| extension.parsed_extension())
}

/// Signs: the URI SAN (critical, there is no subject), digitalSignature, serverAuth and clientAuth, CA:FALSE.
pub(super) fn sign(root: &Root, approved: &Approved, now: SystemTime) -> Result<Issued, Refusal> {
    let Examined { authorized, public_key, lifetime } = approved.request();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(
        authorized.identity().as_str().try_into().map_err(|error: rcgen::Error| sign_error(&error))?,
    )];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    issue(root, params, public_key, *lifetime, now)
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
