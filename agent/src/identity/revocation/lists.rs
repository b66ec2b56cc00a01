//! Revocation lists as they are in force: read, each shown to be signed by an issuer that we trust, and asked.
//!
//! Pure. A list says something only of certificates that the very key signed which signed the list: two roots of a
//! rotation may have one name. Signatures are checked once, when the lists are read, and not at each handshake.

use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use webpki::{Cert, CertRevocationList, EndEntityCert, OwnedCertRevocationList, VerifiedPath};
use x509_parser::{
    asn1_rs::Any, certificate::X509Certificate, prelude::FromDer, revocation_list::CertificateRevocationList,
};

use super::CrlFault;
use crate::{
    identity::roots::{hex, system_time},
    life::limits,
};

/// One list as `heddle status` and the metrics show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListStatus {
    /// RFC 4514 text of the issuer's name.
    pub issuer: String,
    /// Certificates that it revokes.
    pub revoked: usize,
    pub next_update: SystemTime,
    /// Serial numbers, lower-case hex, of the roots that vouch for it.
    pub roots: Vec<String>,
}

/// Lists that are in force together.
#[derive(Debug)]
pub(in crate::identity) struct Lists {
    lists: Vec<List>,
}

#[derive(Debug)]
struct List {
    /// Contents of the SubjectPublicKeyInfo that signed it.
    key: Vec<u8>,
    content: CertRevocationList<'static>,
    status: ListStatus,
}

/// A certificate that may have signed a list.
struct Issuer<'a> {
    key: Vec<u8>,
    certificate: X509Certificate<'a>,
    /// Serial numbers of the roots that it leads to: of a root its own.
    roots: Vec<String>,
}

impl Lists {
    /// The lists of a PEM file. It may hold certificates too: intermediates that signed lists, themselves signed by `roots`.
    pub fn parse(pem: &[u8], roots: &[CertificateDer<'_>]) -> Result<Self, CrlFault> {
        let invalid = |error: &dyn ToString| CrlFault::Invalid(error.to_string());
        let ders = CertificateRevocationListDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| invalid(&error))?;
        let intermediates =
            CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|error| invalid(&error))?;
        if ders.is_empty() {
            return Err(CrlFault::Invalid("it holds no X509 CRL".to_owned()));
        }
        if ders.len() > limits::CRLS || intermediates.len() > limits::CRLS {
            return Err(CrlFault::Invalid(format!("it holds more than {} lists or certificates", limits::CRLS)));
        }
        if roots.is_empty() {
            return Err(CrlFault::NoRoots);
        }
        let issuers = issuers(roots, &intermediates);
        Ok(Self { lists: ders.iter().map(|der| List::parse(der, &issuers)).collect::<Result<_, _>>()? })
    }

    /// Refuses a path with a certificate that its issuer has revoked.
    pub fn check(&self, path: &VerifiedPath<'_>) -> Result<(), webpki::Error> {
        let leaf: &Cert<'_> = path.end_entity();
        let mut below = leaf;
        // From the leaf's issuer up.
        for issuer in path.intermediate_certificates() {
            self.check_one(below, contents(issuer.subject_public_key_info().as_ref()))?;
            below = issuer;
        }
        self.check_one(below, path.anchor().subject_public_key_info.as_ref())
    }

    fn check_one(&self, certificate: &Cert<'_>, issuer_key: &[u8]) -> Result<(), webpki::Error> {
        for list in self.lists.iter().filter(|list| list.key == issuer_key) {
            if list.content.issuer() == certificate.issuer()
                && list.content.find_serial(certificate.serial())?.is_some()
            {
                return Err(webpki::Error::CertRevoked);
            }
        }
        Ok(())
    }

    /// Whether a certificate of the chain may be revoked, going by its issuer's name and its number: quickly, and never
    /// *no* of one that is.
    pub fn mention(&self, chain: &[CertificateDer<'_>]) -> bool {
        chain.iter().any(|der| {
            let Ok(certificate) = EndEntityCert::try_from(der) else { return false };
            self.lists.iter().any(|list| {
                list.content.issuer() == certificate.issuer()
                    && !matches!(list.content.find_serial(certificate.serial()), Ok(None))
            })
        })
    }

    /// The list that should have been replaced first, if one should.
    pub fn expired(&self, now: SystemTime) -> Option<CrlFault> {
        let old = self.lists.iter().map(|list| &list.status).filter(|status| status.next_update <= now);
        old.min_by_key(|status| status.next_update)
            .map(|status| CrlFault::Expired { issuer: status.issuer.clone(), since: status.next_update })
    }

    pub fn status(&self) -> Vec<ListStatus> {
        self.lists.iter().map(|list| list.status.clone()).collect()
    }
}

impl List {
    fn parse(der: &CertificateRevocationListDer<'_>, issuers: &[Issuer<'_>]) -> Result<Self, CrlFault> {
        // webpki refuses what it does not understand in a list, such as a delta or one of another issuer's certificates.
        let content = OwnedCertRevocationList::from_der(der)
            .map_err(|error| CrlFault::Invalid(format!("a list can't be parsed: {error}")))?;
        let unreadable = || CrlFault::Invalid("a list can't be parsed".to_owned());
        let (_, parsed) = CertificateRevocationList::from_der(der).map_err(|_| unreadable())?;
        let next_update = system_time(parsed.next_update().ok_or_else(unreadable)?.timestamp());
        let issuer = parsed.issuer();
        // A root that was renewed with its key has two certificates.
        let signers: Vec<_> = issuers
            .iter()
            .filter(|candidate| {
                let certificate = &candidate.certificate;
                certificate.subject().as_raw() == issuer.as_raw()
                    && parsed.verify_signature(certificate.public_key()).is_ok()
            })
            .collect();
        let signer = signers.first().ok_or_else(|| CrlFault::Untrusted { issuer: issuer.to_string() })?;
        // RFC 5280 §4.2.1.3; a certificate without key usage may sign anything.
        let usage = signer.certificate.key_usage().map_err(|_| unreadable())?;
        if usage.is_some_and(|usage| !usage.value.crl_sign()) {
            return Err(CrlFault::NotASigner { issuer: issuer.to_string() });
        }
        let status = ListStatus {
            issuer: issuer.to_string(),
            revoked: parsed.iter_revoked_certificates().count(),
            next_update,
            roots: signers.iter().flat_map(|signer| signer.roots.iter().cloned()).collect(),
        };
        Ok(Self { key: signer.key.clone(), content: content.into(), status })
    }
}

/// The roots, and the CA certificates that are signed by one of them or by another of themselves.
fn issuers<'a>(roots: &'a [CertificateDer<'_>], intermediates: &'a [CertificateDer<'_>]) -> Vec<Issuer<'a>> {
    let read = |der: &'a CertificateDer<'_>| {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let key = contents(certificate.public_key().raw).to_vec();
        Some(Issuer { key, certificate, roots: Vec::new() })
    };
    let mut trusted: Vec<Issuer<'a>> = roots.iter().filter_map(read).collect();
    trusted.iter_mut().for_each(|root| root.roots = vec![hex(root.certificate.raw_serial())]);
    let mut waiting: Vec<Issuer<'a>> =
        intermediates.iter().filter_map(read).filter(|issuer| issuer.certificate.is_ca()).collect();
    loop {
        let (mut found, mut rest) = (Vec::new(), Vec::new());
        for mut one in waiting {
            let above = trusted.iter().filter(|issuer| {
                let (below, above) = (&one.certificate, &issuer.certificate);
                below.issuer().as_raw() == above.subject().as_raw()
                    && below.verify_signature(Some(above.public_key())).is_ok()
            });
            one.roots = above.flat_map(|issuer| issuer.roots.iter().cloned()).collect();
            if one.roots.is_empty() { rest.push(one) } else { found.push(one) }
        }
        if found.is_empty() {
            return trusted;
        }
        trusted.extend(found);
        waiting = rest;
    }
}

/// What is inside a DER element; nothing where there is none.
fn contents(der: &[u8]) -> &[u8] {
    Any::from_der(der).map_or(&[], |(_, element)| element.data)
}
