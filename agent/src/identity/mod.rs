//! Who is it? SPIFFE ids, keys in memory, certificates, the CA client and the CA.
//!
//! Keys never leave memory. Nothing here decides whether a connection is allowed.
//!
//! - [`SpiffeId`] is parsed once and compared by bytes
//! - `verify` decides whether a peer is who it must be, with `roots` as the anchors of trust and `revocation` for what counts
//!   no more
//! - `client` asks the CA for a certificate (`dial` leads to it), `answer` judges what comes, `schedule` says when, `rotation` does it
//! - [`Certificates`] is what the tunnel sees of all that
//! - [`ca`] is the CA that is built in

mod answer;
pub mod ca;
mod certificates;
mod client;
mod dial;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod key;
mod revocation;
mod roots;
mod rotation;
mod schedule;
mod spiffe;
mod tls;
mod verify;

pub use answer::IssuerStatus;
pub use certificates::{CertificateStatus, Certificates, FetchCounts, IdentityError, TrustConfig, TrustReport};
pub use client::{CaClientConfig, CaHeader, CaHeaderError, FetchError};
pub use revocation::{CrlConfig, CrlError, CrlFailure, CrlFault, CrlStatus, ListStatus};
pub use roots::{BundleError, RootStatus, RootsError, read_small};
pub use spiffe::{SpiffeError, SpiffeId, TrustDomain, TrustDomains};
pub use verify::{Peer, PeerError, handshake_reason, peer, serial};

/// Messages and service of `proto/citadel.proto`.
mod proto {
    #![allow(clippy::all, clippy::allow_attributes_without_reason, reason = "generated code")]
    tonic::include_proto!("istio.v1.auth");
}

/// Request metadata key under which a node names the workload that it asks for.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// And the one under which it names the signer that an istiod shall ask.
const CERT_SIGNER: &str = "CertSigner";

#[cfg(test)]
pub(crate) mod tests;
