//! Fuzzing of what the CA is asked: see [`crate::fuzzing`].

use std::{
    sync::OnceLock,
    time::{Duration, Instant, SystemTime},
};

use prost::Message;
use rustls_pki_types::CertificateDer;

use super::{
    admission::Admission,
    authorize::{self, Authorized, Rules},
    issue, review,
    root::Root,
};
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
    let identity = issue::identity(&request, &domain()).ok()?;
    let examined = issue::examine(&request, Authorized::unasked(identity.clone()), longest).ok()?;
    let admission = Admission::new(longest);
    let approved = match admission.admit(examined, Instant::now()) {
        Ok(approved) => approved,
        Err(refusal) => unreachable!("a first request is one too many: {refusal}"),
    };
    match issue::sign(&whole().1, &approved, SystemTime::now()) {
        Ok(issued) => Some((identity, issued.certificate)),
        Err(refusal) => unreachable!("approved and not signed: {refusal}"),
    }
}

/// Claims of a token that are accepted are of a text in three parts, for our audience, and not over; what the API server says is
/// read or not, and is nobody's good word where it does not say so itself.
pub fn token(data: &[u8]) {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    if let Ok(claims) = review::claims(data, "istio-ca", now) {
        assert!(claims.expires > now);
        assert_eq!(data.iter().filter(|byte| **byte == b'.').count(), 2);
    }
    let rules = Rules { audience: "istio-ca".to_owned(), agents: Vec::new() };
    if let Ok(answer) = std::str::from_utf8(data)
        && let Ok(review) = review::Review::read(answer)
    {
        assert!(authorize::bound(&rules, &review).is_err(), "nobody is an agent");
    }
}
