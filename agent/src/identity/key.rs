//! A workload's private key: ECDSA P-256, made in memory, handed to rustls, wiped.
//!
//! It must never be written, logged or cloned.

use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::sign::SigningKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use super::SpiffeId;

/// A fresh key. Its serialised form is wiped when this is dropped; the key itself lives in aws-lc, which cleanses what it
/// frees.
pub(super) struct WorkloadKey(Zeroizing<KeyPair>);

impl WorkloadKey {
    pub fn generate() -> Result<Self, rcgen::Error> {
        Ok(Self(Zeroizing::new(KeyPair::generate()?)))
    }

    /// PKCS #10 request, PEM: SHA-256, no subject, one URI SAN, which is critical because the subject is empty
    /// (RFC 5280 §4.2.1.6).
    pub fn request(&self, identity: &SpiffeId) -> Result<String, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        params.serialize_request(&*self.0)?.pem()
    }

    /// The key as rustls signs with it. The serialised copy is wiped.
    pub fn into_signing_key(self) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        let serialised = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.0.serialized_der()));
        rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&serialised)
    }
}
