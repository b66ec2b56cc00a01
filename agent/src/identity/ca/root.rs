//! The CA's issuing key and the certificates above it: made in memory or loaded, published without the key.

use std::{
    fs, io,
    io::Write,
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SerialNumber, SignatureAlgorithm, SigningKey,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};
use zeroize::Zeroizing;

use super::{CaError, RootSource};
use crate::{
    identity::{
        TrustDomain,
        roots::{hex, is_root, parse_bundle, read_capped, span},
        tls::provider,
    },
    life::limits,
};

/// The issuing key. Its serialised form is wiped when this is dropped.
pub(super) struct IssuingKey(Zeroizing<KeyPair>);

impl PublicKeyData for IssuingKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        PublicKeyData::algorithm(&*self.0)
    }
}

impl SigningKey for IssuingKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

/// What signs.
pub(super) struct Root {
    pub issuer: Issuer<'static, IssuingKey>,
    /// The issuing certificate first, the root last.
    pub chain: Vec<CertificateDer<'static>>,
    /// When the first certificate of the chain expires: nothing issued outlasts it.
    pub not_after: SystemTime,
}

impl Root {
    pub fn new(source: &RootSource, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        match source {
            RootSource::Generate { lifetime } => Self::generate(*lifetime, trust_domain),
            RootSource::Files { certificate, key } => Self::load(certificate, key),
        }
    }

    fn generate(lifetime: Duration, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        let key = Zeroizing::new(KeyPair::generate()?);
        let serial = random_serial()?;
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
        // A name of its own, so that an old and a new root side by side are told apart.
        params.distinguished_name.push(DnType::CommonName, format!("heddle root {}", hex(&serial[..4])));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = OffsetDateTime::from(now - limits::CLOCK_SKEW);
        params.not_after = OffsetDateTime::from(now + lifetime);
        let certificate = params.self_signed(&*key)?;
        Self::with(vec![certificate.der().clone()], key)
    }

    fn load(certificate: &Path, key: &Path) -> Result<Self, CaError> {
        let read = |path: &Path| {
            read_capped(path, limits::BUNDLE_BYTES).map_err(|error| CaError::Read(path.to_owned(), error))
        };
        let chain = parse_bundle(&read(certificate)?)?;
        let pem = Zeroizing::new(read(key)?);
        let text = std::str::from_utf8(&pem).map_err(|_| CaError::KeyMismatch)?;
        Self::with(chain, Zeroizing::new(KeyPair::from_pem(text)?))
    }

    fn with(chain: Vec<CertificateDer<'static>>, key: Zeroizing<KeyPair>) -> Result<Self, CaError> {
        let (Some(issuing), Some(last)) = (chain.first(), chain.last()) else {
            return Err(CaError::NoRoot);
        };
        if !is_root(last) {
            return Err(CaError::NoRoot);
        }
        let fits = X509Certificate::from_der(issuing)
            .is_ok_and(|(_, parsed)| parsed.public_key().raw == key.subject_public_key_info());
        if !fits {
            return Err(CaError::KeyMismatch);
        }
        let not_after = chain.iter().filter_map(|der| span(der)).map(|(_, _, end)| end).min().ok_or(CaError::NoRoot)?;
        let issuer = Issuer::from_ca_cert_der(issuing, IssuingKey(key))?;
        Ok(Self { issuer, chain, not_after })
    }

    /// The certificates above the leaf, PEM, one each.
    pub fn chain_pem(&self) -> impl Iterator<Item = String> {
        self.chain.iter().map(|der| pem(der))
    }

    /// The trust bundle: the root alone.
    pub fn bundle_pem(&self) -> String {
        self.chain.last().map(|der| pem(der)).unwrap_or_default()
    }
}

/// One certificate as PEM (RFC 7468).
pub(in crate::identity) fn pem(der: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()))
}

/// 16 random bytes, positive and not zero (RFC 5280 §4.1.2.2 allows 20).
pub(super) fn random_serial() -> Result<[u8; 16], rustls::Error> {
    let mut serial = [0_u8; 16];
    provider().secure_random.fill(&mut serial).map_err(|_| rustls::Error::FailedToGetRandomBytes)?;
    serial[0] = (serial[0] & 0x7f) | 0x40;
    Ok(serial)
}

/// Writes the bundle beside `path` and renames it, so that no reader sees half of it.
pub(super) fn publish(path: &Path, bundle: &str) -> Result<(), CaError> {
    replace(path, bundle.as_bytes()).map_err(|error| CaError::Publish(path.to_owned(), error))
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let mut file = fs::File::create(&temporary)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written
}
