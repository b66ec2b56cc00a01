//! Certificates that the tests mint themselves: the lab's root, and everything that must be refused.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use time::{Duration, OffsetDateTime};

/// A root that signs workload certificates. The lab's CA runs with the root made here, so that a test can sign with it.
#[derive(Debug)]
pub struct Root {
    pub certificate: PathBuf,
    pub key: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A leaf certificate and its key, in files.
#[derive(Debug, Clone)]
pub struct Leaf {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What is to be minted.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// URI names.
    pub names: &'a [&'a str],
    /// Validity, from now (negative for the past).
    pub from: Duration,
    pub to: Duration,
}

impl<'a> Wanted<'a> {
    /// Valid now, for an hour.
    #[must_use]
    pub fn valid(names: &'a [&'a str]) -> Self {
        Self { names, from: Duration::minutes(-1), to: Duration::hours(1) }
    }

    /// Was valid, until a minute ago.
    #[must_use]
    pub fn expired(names: &'a [&'a str]) -> Self {
        Self { names, from: Duration::hours(-2), to: Duration::minutes(-1) }
    }
}

impl Root {
    /// Makes a root for `trust_domain` in `folder/<name>.pem` and `<name>.key`.
    pub fn create(folder: &Path, name: &str, trust_domain: &str) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.distinguished_name.push(DnType::OrganizationName, format!("heddle lab {trust_domain}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
        params.not_before = OffsetDateTime::now_utc() - Duration::days(1);
        params.not_after = OffsetDateTime::now_utc() + Duration::days(30);
        let key_pair = KeyPair::generate()?;
        let root = Self {
            certificate: folder.join(format!("{name}.pem")),
            key: folder.join(format!("{name}.key")),
            issuer: Issuer::new(params.clone(), KeyPair::from_pem(&key_pair.serialize_pem())?),
        };
        fs::write(&root.certificate, params.self_signed(&key_pair)?.pem())?;
        write_secret(&root.key, &key_pair.serialize_pem())?;
        Ok(root)
    }

    /// Signs a leaf into `folder/<name>.pem` and `<name>.key`.
    pub fn sign(&self, folder: &Path, name: &str, wanted: &Wanted<'_>) -> Result<Leaf> {
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = OffsetDateTime::now_utc() + wanted.from;
        params.not_after = OffsetDateTime::now_utc() + wanted.to;
        for name in wanted.names {
            params.subject_alt_names.push(SanType::URI((*name).try_into()?));
        }
        let key = KeyPair::generate()?;
        let leaf = Leaf { certificate: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
        fs::write(&leaf.certificate, params.signed_by(&key, &self.issuer)?.pem())?;
        write_secret(&leaf.key, &key.serialize_pem())?;
        Ok(leaf)
    }
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
