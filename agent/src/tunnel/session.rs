//! What TLS settled for one tunnel. Made once per handshake; every connection that the tunnel carries points at it.

use std::sync::Arc;

use rustls::CommonState;

use super::Wire;
use crate::identity::{Peer, SpiffeId};

/// A tunnel's TLS session.
#[derive(Debug, Clone)]
pub struct Session {
    /// Such as `TLSv1_3`.
    pub version: &'static str,
    /// Such as `TLS13_AES_256_GCM_SHA384`.
    pub cipher: &'static str,
    /// Who the peer says that it is, by whichever name of our trust domain.
    pub peer: Option<SpiffeId>,
    /// Serial numbers of the certificates, this side's and the peer's: lower-case hex, empty where unknown.
    pub own_serial: Arc<str>,
    pub peer_serial: Arc<str>,
    /// Bytes on the wire of the whole tunnel.
    pub wire: Arc<Wire>,
}

impl Session {
    /// Of a finished handshake with `peer`; `own_serial` is of the certificate that this side presented.
    pub(super) fn new(tls: &CommonState, peer: Option<Peer>, own_serial: Arc<str>, wire: &Arc<Wire>) -> Arc<Self> {
        let (peer, peer_serial) = peer.map(|peer| (peer.identity, peer.serial)).unzip();
        Arc::new(Self {
            version: tls.protocol_version().and_then(|version| version.as_str()).unwrap_or_default(),
            cipher: tls.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str()).unwrap_or_default(),
            peer,
            own_serial,
            peer_serial: peer_serial.unwrap_or_default().into(),
            wire: Arc::clone(wire),
        })
    }
}
