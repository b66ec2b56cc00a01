//! Fuzzing of what the CA is asked: see [`crate::fuzzing`].

use std::{
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use prost::Message;
use rustls_pki_types::CertificateDer;

use super::{issue, root::Root};
use crate::identity::{SpiffeId, TrustDomain, proto::IstioCertificateRequest};

/// The certificate of a root of `mesh.test`, the same in the whole process.
pub fn root() -> &'static CertificateDer<'static> {
    &whole().0
}

fn whole() -> &'static (CertificateDer<'static>, Root) {
    static ROOT: OnceLock<(CertificateDer<'static>, Root)> = OnceLock::new();
    ROOT.get_or_init(|| match Root::generate(Duration::from_secs(86_400), &domain()) {
        Ok(root) => (root.chain.first().cloned().unwrap_or_else(|| unreachable!("a root without certificate")), root),
        Err(error) => unreachable!("a root can be made: {error}"),
    })
}

fn domain() -> TrustDomain {
    "mesh.test".parse().unwrap_or_else(|_| unreachable!("a trust domain"))
}

/// Signs a CreateCertificate message, if it may be signed.
pub fn sign(message: &[u8], longest: Duration) -> Option<(SpiffeId, CertificateDer<'static>)> {
    let request = IstioCertificateRequest::decode(message).ok()?;
    let approved = issue::examine(&request, &domain(), longest).ok()?;
    match issue::sign(&whole().1, &approved, SystemTime::now()) {
        Ok(issued) => Some((approved.identity, issued.certificate)),
        Err(refusal) => unreachable!("approved and not signed: {refusal}"),
    }
}
