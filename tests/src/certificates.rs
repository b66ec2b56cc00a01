//! Certificates that the tests mint themselves: the lab's root, and everything that must be refused.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
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
    /// URI names byte for byte, some 100 together at most, in the place of all others.
    pub raw_names: &'a [&'a [u8]],
    pub dns_names: &'a [&'a str],
    /// Validity, from now (negative for the past).
    pub from: Duration,
    pub to: Duration,
}

impl<'a> Wanted<'a> {
    /// Valid now, for an hour.
    #[must_use]
    pub fn valid(names: &'a [&'a str]) -> Self {
        Self { names, raw_names: &[], dns_names: &[], from: Duration::minutes(-1), to: Duration::hours(1) }
    }

    /// Was valid, until a minute ago.
    #[must_use]
    pub fn expired(names: &'a [&'a str]) -> Self {
        Self { from: Duration::hours(-2), to: Duration::minutes(-1), ..Self::valid(names) }
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
        for name in wanted.dns_names {
            params.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
        }
        if !wanted.raw_names.is_empty() {
            params.subject_alt_names.clear();
            // SEQUENCE { [6] IA5String, … }, each shorter than 128 bytes (X.690 §8.1.3.4).
            let mut names = Vec::new();
            for name in wanted.raw_names {
                names.extend([0x86, u8::try_from(name.len())?]);
                names.extend_from_slice(name);
            }
            let length = u8::try_from(names.len()).ok().filter(|length| *length < 128).context("too long")?;
            let names = [&[0x30, length], names.as_slice()].concat();
            params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], names)];
        }
        let key = KeyPair::generate()?;
        let leaf = Leaf { certificate: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
        fs::write(&leaf.certificate, params.signed_by(&key, &self.issuer)?.pem())?;
        write_secret(&leaf.key, &key.serialize_pem())?;
        Ok(leaf)
    }

    /// A revocation list, PEM, of certificates by their serial numbers in hex; to be replaced after `lasts`.
    pub fn crl(&self, serials: &[String], lasts: Duration) -> Result<String> {
        let now = OffsetDateTime::now_utc();
        let revoked = serials.iter().map(|serial| {
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from(bytes(serial)?),
                revocation_time: now,
                reason_code: Some(rcgen::RevocationReason::KeyCompromise),
                invalidity_date: None,
            })
        });
        let list = CertificateRevocationListParams {
            this_update: now - Duration::days(1),
            next_update: now + lasts,
            crl_number: SerialNumber::from(now.unix_timestamp().unsigned_abs()),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect::<Result<_>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer)?.pem()?)
    }
}

/// Writes a file beside `path` and renames it, as every writer of whole files does.
pub fn replace(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, text)?;
    Ok(fs::rename(&beside, path)?)
}

fn bytes(hex: &str) -> Result<Vec<u8>> {
    let pair = |at| hex.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    (0..hex.len()).step_by(2).map(pair).collect::<Option<_>>().with_context(|| format!("{hex:?} is no serial number"))
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
