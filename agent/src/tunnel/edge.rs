//! The edge of the tunnel: sockets and certificates, as the stages before it give them.
//!
//! One narrow trait, so that the tunnel runs in a test over loopback with certificates of its own. It adds nothing.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::Arc,
};

use heddle_common::choice;
use rustls_pki_types::CertificateDer;
use tokio::net::TcpStream;

use super::Program;
use crate::{
    capture::{self, CaptureError, Occupied, ResidentPod},
    identity::{self, Certificates, IdentityError, Peer, SpiffeId, TrustDomain},
};

pub(super) trait Edge: Clone + Send + Sync + std::fmt::Debug + 'static {
    /// Held while a captured plaintext connection lives.
    type Occupied: Send;

    fn is_probe(original_destination: SocketAddr, peer: SocketAddr) -> bool;
    fn dial(
        &self,
        uid: &str,
        source: IpAddr,
        destination: SocketAddr,
    ) -> impl Future<Output = Result<TcpStream, CaptureError>> + Send;
    fn deliver(
        &self,
        uid: &str,
        client: IpAddr,
        app: SocketAddr,
    ) -> impl Future<Output = Result<TcpStream, CaptureError>> + Send;
    fn occupy(&self, uid: &str, client: SocketAddr, app: SocketAddr) -> Self::Occupied;
    /// What the kernel chose of the Service that a captured connection was made to: one of [`heddle_common::choice`].
    fn chosen(&self, tcp: &TcpStream) -> u16;
    /// The pod of this node (by uid) whose connection from `client` to the pod's `app` this is, where the kernel vouches for that.
    fn attested(&self, uid: &str, client: SocketAddr, app: SocketAddr) -> Option<Arc<str>>;

    fn trust_domain(&self) -> &TrustDomain;
    fn client(
        &self,
        own: &SpiffeId,
        peer: &SpiffeId,
    ) -> impl Future<Output = Result<Arc<rustls::ClientConfig>, IdentityError>> + Send;
    fn server(&self, own: &SpiffeId) -> impl Future<Output = Result<Arc<rustls::ServerConfig>, IdentityError>> + Send;
    fn peer(certificate: &CertificateDer<'_>) -> Result<Peer, IdentityError>;
    fn handshake_reason(error: &std::io::Error) -> &'static str;
    /// Serial number of the certificate that is presented for `own`: lower-case hex, empty where there is none.
    fn serial(&self, own: &SpiffeId) -> Arc<str>;
    /// What captures the pod, read back from the kernel.
    fn programs(&self, uid: &str) -> impl Future<Output = Vec<Program>> + Send;
}

/// The real edge of this node.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub capture: capture::Handle,
    pub certificates: Certificates,
}

impl Edge for Node {
    type Occupied = Occupied;

    fn is_probe(original_destination: SocketAddr, peer: SocketAddr) -> bool {
        capture::Handle::is_probe(original_destination, peer)
    }

    async fn dial(&self, uid: &str, source: IpAddr, destination: SocketAddr) -> Result<TcpStream, CaptureError> {
        self.capture.dial(uid, source, destination).await
    }

    async fn deliver(&self, uid: &str, client: IpAddr, app: SocketAddr) -> Result<TcpStream, CaptureError> {
        Ok(self.capture.deliver(uid, client, app).await?.stream)
    }

    fn occupy(&self, uid: &str, client: SocketAddr, app: SocketAddr) -> Occupied {
        self.capture.occupy(uid, client, app)
    }

    fn chosen(&self, tcp: &TcpStream) -> u16 {
        // A socket that can't say is broken, and says so when it is used.
        capture::chosen(tcp.as_fd()).unwrap_or(choice::NONE)
    }

    fn attested(&self, uid: &str, client: SocketAddr, app: SocketAddr) -> Option<Arc<str>> {
        let lane = self.capture.lane();
        let attestation = lane.take_attested(client, app)?;
        let residents = lane.residents();
        // What an earlier owner of the address left behind has neither id.
        let meant = |pod: &&ResidentPod| pod.id.0 == attestation.destination && *pod.uid == *uid;
        residents.iter().find(meant)?;
        residents.into_iter().find(|pod| pod.id.0 == attestation.source).map(|source| source.uid)
    }

    fn trust_domain(&self) -> &TrustDomain {
        self.certificates.trust_domain()
    }

    async fn client(&self, own: &SpiffeId, peer: &SpiffeId) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
        self.certificates.client(own, peer).await
    }

    async fn server(&self, own: &SpiffeId) -> Result<Arc<rustls::ServerConfig>, IdentityError> {
        self.certificates.server(own).await
    }

    fn peer(certificate: &CertificateDer<'_>) -> Result<Peer, IdentityError> {
        identity::peer(certificate)
    }

    fn handshake_reason(error: &std::io::Error) -> &'static str {
        identity::handshake_reason(error)
    }

    fn serial(&self, own: &SpiffeId) -> Arc<str> {
        self.certificates.serial(own).into()
    }

    async fn programs(&self, uid: &str) -> Vec<Program> {
        match self.capture.programs(uid).await {
            Ok(programs) => programs.into_iter().map(Program::from).collect(),
            Err(error) => {
                tracing::warn!(pod = uid, reason = error.reason(), %error, "What captures the pod can't be read back");
                Vec::new()
            }
        }
    }
}
