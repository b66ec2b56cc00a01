//! Fuzzing of SPIFFE ids, certificates, bundles and the CA's messages: see [`crate::fuzzing`].

use std::{
    path::PathBuf,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use rustls_pki_types::CertificateDer;

use super::{
    SpiffeId, TrustDomain, TrustDomains, answer, ca,
    key::WorkloadKey,
    peer,
    revocation::Lists,
    roots::{Roots, TrustBundle, parse_bundle, unix_time},
};

/// An id that is accepted is made of its parts and nothing else, and is printed as it was written.
pub fn spiffe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(id) = text.parse::<SpiffeId>() else { return };
    assert_eq!(id.to_string(), text);
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_:/".contains(&byte);
    assert!(text.bytes().all(allowed), "{text}");
    let again = id.trust_domain().parse::<TrustDomain>().and_then(|domain| {
        assert!(!id.namespace().is_empty() && !id.service_account().is_empty());
        SpiffeId::new(&domain, id.namespace(), id.service_account())
    });
    assert_eq!(again.as_ref(), Ok(&id));
    assert_eq!(format!("spiffe://{}", id.principal()), text);
    assert_eq!(format!("{}{}", id.trust_domain(), id.path()), id.principal());
    // By another name of our trust domain it is the same, and by a name of somebody else's it is not.
    let other = |domain: &str| {
        let domain = domain.parse().ok()?;
        Some((SpiffeId::new(&domain, id.namespace(), id.service_account()).ok()?, domain))
    };
    let (Ok(own), Some((alias, name)), Some((foreign, _))) =
        (id.trust_domain().parse(), other("alias.test"), other("foreign.test"))
    else {
        return;
    };
    let domains = TrustDomains::new(own, &[name]);
    assert!(domains.same(&id, &alias) && domains.include(&alias) && id.same_account(&alias));
    assert_eq!(domains.same(&id, &foreign), id == foreign);
}

/// A certificate that names somebody holds that name, and none is trusted by roots that did not sign it.
pub fn peer_certificate(data: &[u8]) {
    let der = CertificateDer::from(data);
    if let Ok(id) = peer(&der).map(|peer| peer.identity) {
        let name = id.as_str().as_bytes();
        assert!(data.windows(name.len()).any(|window| window == name), "{id} is not in the certificate");
    }
    static FOREIGN: OnceLock<Roots> = OnceLock::new();
    let roots = FOREIGN.get_or_init(|| Roots::new(vec![ca::fuzzing::root().clone()]));
    let now = unix_time(SystemTime::now());
    assert!(roots.verify_client(&der, &[], now).is_err() && roots.verify_server(&der, &[], now).is_err());
}

/// Lists that are accepted are signed by the root, whose key nobody here has; they revoke nobody whom they don't number.
pub fn revocation_lists(data: &[u8]) {
    let Err(fault) = Lists::parse(data, std::slice::from_ref(ca::fuzzing::root())) else {
        unreachable!("lists that the root has not signed")
    };
    assert!(!fault.reason().is_empty() && !fault.fix().is_empty() && !fault.to_string().is_empty());
    // As DER, too, where libFuzzer finds more than in PEM.
    let printed = pem::encode(&pem::Pem::new("X509 CRL", data));
    assert!(Lists::parse(printed.as_bytes(), std::slice::from_ref(ca::fuzzing::root())).is_err());
}

/// A bundle that is accepted holds CA certificates only, and is the same when it is printed and read again.
pub fn trust_bundle(data: &[u8]) {
    let Ok(certificates) = parse_bundle(data) else { return };
    assert!(!certificates.is_empty());
    let printed: String =
        certificates.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()))).collect();
    assert_eq!(parse_bundle(printed.as_bytes()).ok().as_ref(), Some(&certificates));
    let status = Roots::new(certificates).status();
    assert!(status.iter().all(|root| !format!("{root:?}").is_empty()));
}

/// No answer of a CA makes a certificate for a key that it never saw. Entries of the chain end with a zero byte.
pub fn ca_answer(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let chain: Vec<String> = text.split('\0').map(str::to_owned).collect();
    let (Ok(id), Ok(key)) = ("spiffe://mesh.test/ns/shop/sa/web".parse::<SpiffeId>(), WorkloadKey::generate()) else {
        return;
    };
    let bundle = TrustBundle::new(PathBuf::from("/nonexistent"));
    let judged = answer::check(&chain, &id, key, &bundle, SystemTime::now());
    let error = match judged {
        Ok(_) => unreachable!("a certificate for a key that was made just now"),
        Err(error) => error,
    };
    assert!(!error.reason().is_empty());
}

/// A request that the CA signs gives a certificate for exactly the identity that was asked for, of our trust domain, that
/// verifies, and no CA.
pub fn certificate_request(data: &[u8]) {
    const LONGEST: Duration = Duration::from_secs(3_600);
    let Some((identity, certificate)) = ca::fuzzing::sign(data, LONGEST) else { return };
    assert_eq!(identity.trust_domain(), "mesh.test");
    assert_eq!(peer(&certificate).ok().map(|peer| peer.identity), Some(identity));
    assert!(parse_bundle(pem::encode(&pem::Pem::new("CERTIFICATE", certificate.as_ref())).as_bytes()).is_err());
    let span = super::roots::span(&certificate);
    assert!(span.is_some_and(|(_, _, end)| end <= SystemTime::now() + LONGEST), "it lasts too long");
    let roots = Roots::new(vec![ca::fuzzing::root().clone()]);
    assert!(roots.verify_client(&certificate, &[], unix_time(SystemTime::now())).is_ok());
}

/// A caller's token and the API server's word on it.
pub fn bearer_token(data: &[u8]) {
    ca::fuzzing::token(data);
}
