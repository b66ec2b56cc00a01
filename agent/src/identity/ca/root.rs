//! What the CA signs with: the issuing key, the certificates above it, and the trust bundle that goes with them.
//!
//! PEM goes in; a [`Root`] that can sign comes out, or a [`KeyError`] that names the place and the fix. The key never leaves it.

mod error;

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SerialNumber, SignatureAlgorithm, SigningKey,
};
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};
use zeroize::Zeroizing;

pub use error::{KeyError, KeyProblem};

use super::CaError;
use crate::{
    identity::{
        RootStatus, RootsError, TrustDomain,
        roots::{Roots, hex, is_root, parse_bundle, span},
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

/// One PEM text of a source, with its name for people. Wiped when it is dropped.
#[derive(Debug)]
pub(super) struct Part {
    /// A path, or the key of a Secret.
    pub place: String,
    pub content: Result<Zeroizing<Vec<u8>>, KeyProblem>,
}

impl Part {
    fn error(&self, problem: KeyProblem) -> KeyError {
        KeyError::new(self.place.clone(), problem)
    }

    fn bytes(&self) -> Result<&[u8], KeyError> {
        self.content.as_ref().map(|bytes| bytes.as_slice()).map_err(|problem| self.error(problem.clone()))
    }

    /// CA certificates, at least one.
    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, KeyError> {
        parse_bundle(self.bytes()?).map_err(|error| {
            self.error(match error {
                RootsError::NotCa(at) => KeyProblem::NotCa(at),
                RootsError::Pem(what) => KeyProblem::Certificates(what),
                RootsError::Empty => KeyProblem::Certificates("none".to_owned()),
                RootsError::Expired => KeyProblem::Certificates(RootsError::Expired.to_string()),
                RootsError::File(_, what) => KeyProblem::Unreadable(what),
            })
        })
    }

    fn key(&self) -> Result<Zeroizing<KeyPair>, KeyError> {
        let text = std::str::from_utf8(self.bytes()?).map_err(|_| self.error(KeyProblem::Key("no text".to_owned())))?;
        let key = KeyPair::from_pem(text).map_err(|error| self.error(KeyProblem::Key(error.to_string())))?;
        Ok(Zeroizing::new(key))
    }
}

/// What a source holds.
#[derive(Debug)]
pub(super) struct Material {
    /// The issuing certificate first, then those above it.
    pub certificate: Part,
    pub key: Part,
    /// Roots to trust; absent, it is the issuing certificate's root alone.
    pub bundle: Option<Part>,
}

impl Material {
    /// Tells two states of a source apart without keeping either.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for part in [Some(&self.certificate), Some(&self.key), self.bundle.as_ref()] {
            match part.map(|part| &part.content) {
                Some(Ok(bytes)) => {
                    hash.update(bytes.len().to_be_bytes());
                    hash.update(bytes.as_slice());
                }
                Some(Err(problem)) => hash.update(problem.to_string()),
                None => hash.update([0]),
            }
        }
        hash.finalize().into()
    }
}

/// What signs.
pub(super) struct Root {
    pub issuer: Issuer<'static, IssuingKey>,
    /// The issuing certificate first, the root last.
    pub chain: Vec<CertificateDer<'static>>,
    /// When the first certificate of the chain expires: nothing issued outlasts it.
    pub not_after: SystemTime,
    /// Every root that the mesh is to trust: that of the chain, and others while one takes another's place.
    bundle: Vec<CertificateDer<'static>>,
}

impl Root {
    /// A new root with a new key.
    pub fn generate(lifetime: Duration, trust_domain: &TrustDomain) -> Result<Self, CaError> {
        let generated = Generated::new(lifetime, trust_domain)?;
        Ok(Self::assemble(&generated.material(), SystemTime::now())?)
    }

    /// What a source holds, if it can be signed with at `now`.
    pub fn assemble(material: &Material, now: SystemTime) -> Result<Self, KeyError> {
        Self::at(material, Some(now))
    }

    /// The same of what may have expired.
    pub fn assemble_old(material: &Material) -> Result<Self, KeyError> {
        Self::at(material, None)
    }

    fn at(material: &Material, now: Option<SystemTime>) -> Result<Self, KeyError> {
        let mut chain = material.certificate.certificates()?;
        let key = material.key.key()?;
        let mut bundle = material.bundle.as_ref().map(Part::certificates).transpose()?;
        let at = |problem| material.certificate.error(problem);
        let fits =
            chain.first().and_then(parsed).is_some_and(|first| first.public_key().raw == key.subject_public_key_info());
        if !fits {
            return Err(material.key.error(KeyProblem::Mismatch(material.certificate.place.clone())));
        }
        if let Some(broken) = chain.windows(2).position(|pair| !matches!(pair, [below, above] if signed(below, above)))
        {
            return Err(at(KeyProblem::Chain(broken + 1)));
        }
        complete(&mut chain, bundle.as_deref().unwrap_or_default()).map_err(at)?;
        if let Some(now) = now {
            chain.iter().try_for_each(|der| lasts(der, now)).map_err(at)?;
        }
        let (Some(issuing), Some(root)) = (chain.first(), chain.last()) else {
            return Err(at(KeyProblem::Certificates("none".to_owned())));
        };
        if let (Some(bundle), Some(part)) = (&mut bundle, &material.bundle) {
            if !bundle.contains(root) {
                return Err(part.error(KeyProblem::NotInBundle(subject(root))));
            }
            bundle.retain(|der| is_root(der) && now.is_none_or(|now| trusted(der, now, &part.place)));
            let mut seen = HashSet::new();
            bundle.retain(|der| seen.insert(der.clone()));
        }
        let bundle = bundle.unwrap_or_else(|| vec![root.clone()]);
        let not_after = chain.iter().filter_map(span).map(|(_, _, end)| end).min();
        let not_after = not_after.ok_or_else(|| at(KeyProblem::Certificates("none".to_owned())))?;
        let issuer = Issuer::from_ca_cert_der(issuing, IssuingKey(key))
            .map_err(|error| at(KeyProblem::Certificates(error.to_string())))?;
        Ok(Self { issuer, chain, not_after, bundle })
    }

    /// The certificates above the leaf, PEM, one each.
    pub fn chain_pem(&self) -> impl Iterator<Item = String> {
        self.chain.iter().map(pem)
    }

    /// The trust bundle: every root, PEM.
    pub fn bundle_pem(&self) -> String {
        self.bundle.iter().map(pem).collect()
    }

    /// The root that issued certificates chain to.
    pub fn anchor(&self) -> Option<&CertificateDer<'static>> {
        self.chain.last()
    }

    /// One root, for people.
    pub fn status_of(der: &CertificateDer<'static>) -> Option<RootStatus> {
        Roots::new(vec![der.clone()]).status().pop()
    }

    /// The roots of the trust bundle, for people and metrics.
    pub fn roots(&self) -> Vec<RootStatus> {
        Roots::new(self.bundle.clone()).status()
    }

    pub fn bundle(&self) -> &[CertificateDer<'static>] {
        &self.bundle
    }

    /// The same certificates and the same trust bundle.
    pub fn same(&self, other: &Self) -> bool {
        self.chain == other.chain && self.bundle == other.bundle
    }
}

/// A root that was just made, PEM.
pub(super) struct Generated {
    pub certificate: String,
    pub key: Zeroizing<String>,
}

impl Generated {
    pub fn new(lifetime: Duration, trust_domain: &TrustDomain) -> Result<Self, CaError> {
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
        let certificate = params.self_signed(&*key)?.pem();
        Ok(Self { certificate, key: Zeroizing::new(key.serialize_pem()) })
    }

    fn material(&self) -> Material {
        let part = |text: &str| Part {
            place: "the root just made".to_owned(),
            content: Ok(Zeroizing::new(text.as_bytes().to_vec())),
        };
        Material { certificate: part(&self.certificate), key: part(&self.key), bundle: None }
    }
}

fn parsed<'a>(der: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    X509Certificate::from_der(der).ok().map(|(_, certificate)| certificate)
}

fn subject(der: &CertificateDer<'_>) -> String {
    parsed(der).map(|certificate| certificate.subject().to_string()).unwrap_or_default()
}

/// Subject and serial number, as a root is spoken of.
pub(super) fn describe(der: &CertificateDer<'_>) -> String {
    let serial = span(der).map(|(serial, ..)| serial).unwrap_or_default();
    format!("root {:?} ({serial})", subject(der))
}

fn signed(below: &CertificateDer<'_>, above: &CertificateDer<'_>) -> bool {
    let (Some(below), Some(above)) = (parsed(below), parsed(above)) else { return false };
    below.issuer().as_raw() == above.subject().as_raw() && below.verify_signature(Some(above.public_key())).is_ok()
}

/// Goes on with certificates of the bundle until the chain ends with a root.
fn complete(chain: &mut Vec<CertificateDer<'static>>, bundle: &[CertificateDer<'static>]) -> Result<(), KeyProblem> {
    while let Some(last) = chain.last()
        && !is_root(last)
    {
        let above = bundle.iter().find(|above| signed(last, above)).cloned();
        match above {
            Some(above) if chain.len() < limits::CHAIN_CERTIFICATES => chain.push(above),
            _ => return Err(KeyProblem::NoRoot(subject(last))),
        }
    }
    Ok(())
}

/// Valid at `now`?
fn lasts(der: &CertificateDer<'_>, now: SystemTime) -> Result<(), KeyProblem> {
    let Some((_, from, to)) = span(der) else { return Err(KeyProblem::Certificates("not to be parsed".to_owned())) };
    let text = |time| humantime::format_rfc3339_seconds(time).to_string();
    if to <= now {
        return Err(KeyProblem::Expired { subject: subject(der), at: text(to) });
    }
    if from > now + limits::CLOCK_SKEW {
        return Err(KeyProblem::NotYet { subject: subject(der), at: text(from) });
    }
    Ok(())
}

/// A root that peers may rely on: of an expired one their verifiers would not notice it.
fn trusted(der: &CertificateDer<'_>, now: SystemTime, place: &str) -> bool {
    let lasts = lasts(der, now);
    if let Err(problem) = &lasts {
        tracing::warn!(place, %problem, "A root is left out of the trust bundle.");
    }
    lasts.is_ok()
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
