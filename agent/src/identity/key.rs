//! A workload's private key: ECDSA P-256, made in memory by aws-lc and never anywhere else.
//!
//! It has no serialised form: the request is signed and TLS signs with the one object that it is made as, and aws-lc wipes
//! that when the last certificate that uses it is dropped. It must never be written, logged or copied.

use std::{fmt, sync::Arc};

use aws_lc_rs::{
    error::Unspecified,
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair},
};
use rcgen::{CertificateParams, DistinguishedName, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SignatureAlgorithm};
use rustls::{
    SignatureScheme,
    sign::{Signer, SigningKey, public_key_to_spki},
};
use rustls_pki_types::{SubjectPublicKeyInfoDer, alg_id};

use super::SpiffeId;

const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;

/// A fresh key.
pub(super) struct WorkloadKey(Arc<EcdsaKeyPair>);

impl WorkloadKey {
    pub fn generate() -> Result<Self, Unspecified> {
        Ok(Self(Arc::new(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)?)))
    }

    /// PKCS #10 request, PEM: SHA-256, no subject, one URI SAN, which is critical because the subject is empty
    /// (RFC 5280 §4.2.1.6).
    pub fn request(&self, identity: &SpiffeId) -> Result<String, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        params.serialize_request(self)?.pem()
    }

    /// The key as rustls signs with it: the same object.
    pub fn into_signing_key(self) -> Arc<dyn SigningKey> {
        Arc::new(self)
    }

    /// The private scalar, for a test that looks for it in memory.
    #[cfg(test)]
    pub fn scalar(&self) -> aws_lc_rs::encoding::EcPrivateKeyBin<'static> {
        use aws_lc_rs::encoding::AsBigEndian;
        self.0.private_key().as_be_bytes().unwrap()
    }
}

impl PublicKeyData for WorkloadKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for WorkloadKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature = self.0.sign(&SystemRandom::new(), message).map_err(|_| rcgen::Error::RemoteKeyError)?;
        Ok(signature.as_ref().to_vec())
    }
}

impl SigningKey for WorkloadKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered.contains(&SCHEME).then(|| Box::new(Self(Arc::clone(&self.0))) as Box<dyn Signer>)
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(public_key_to_spki(&alg_id::ECDSA_P256, self.0.public_key()))
    }

    fn algorithm(&self) -> rustls::SignatureAlgorithm {
        rustls::SignatureAlgorithm::ECDSA
    }
}

impl Signer for WorkloadKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let failed = |_| rustls::Error::General("signing failed".to_owned());
        Ok(self.0.sign(&SystemRandom::new(), message).map_err(failed)?.as_ref().to_vec())
    }

    fn scheme(&self) -> SignatureScheme {
        SCHEME
    }
}

impl fmt::Debug for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WorkloadKey(..)")
    }
}
