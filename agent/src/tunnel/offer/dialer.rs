//! Makes one authenticated connection to a peer: TCP from the pod's netns, TLS as the pod, to exactly the workload meant.

use std::{future::Future, io, net::SocketAddr, sync::Arc};

use bytes::BytesMut;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{counts::PoolCounts, error::OfferError, pool::Key};
use crate::{
    life::{
        budget::{Account, Refusal},
        limits,
    },
    tunnel::{
        Direction, Observer, Session, Sessions, buffered::Buffered, edge::Edge, meter::Metered, sessions::Listed,
    },
};

/// How the pool gets a connection.
pub(crate) trait Connector: Clone + Send + Sync + 'static {
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    fn connect(&self, key: &Key) -> impl Future<Output = Result<Self::Io, OfferError>> + Send;

    /// What TLS settled, where there is TLS, and its place among the sessions that may be revoked.
    fn session(&self, _io: &Self::Io, _key: &Key) -> Option<(Arc<Session>, Listed)> {
        None
    }

    /// Where the pool counts; for itself alone unless said otherwise.
    fn counts(&self) -> Arc<PoolCounts> {
        Arc::default()
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Dialer<E> {
    pub edge: E,
    pub observer: Arc<dyn Observer>,
    pub counts: Arc<PoolCounts>,
    pub account: Account,
    pub sessions: Arc<Sessions>,
}

impl<E: Edge> Connector for Dialer<E> {
    type Io = TlsStream<Buffered>;

    async fn connect(&self, key: &Key) -> Result<Self::Io, OfferError> {
        // Bounded by `Certificates` itself: it waits for a first certificate as long as limits::HOLD.
        let settings = self
            .edge
            .client(&key.own, &key.peer)
            .await
            .map_err(|error| OfferError::Identity { reason: error.reason(), detail: error.to_string().into() })?;
        self.turn().await?;
        let held = self.account.descriptors(1)?;
        let tcp = match timeout(limits::CONNECT_PEER, self.edge.dial(&key.pod, key.source, key.address)).await {
            Ok(Ok(tcp)) => tcp,
            Ok(Err(error)) => {
                return Err(OfferError::Dial { reason: error.reason(), detail: error.to_string().into() });
            }
            Err(_) => return Err(OfferError::TunnelTimeout),
        };
        let tcp = Metered::new(tcp, Direction::Outbound, Arc::clone(&self.observer));
        let tcp = Buffered::new(tcp, BytesMut::new(), Some(held));
        let (reason, detail) = match timeout(limits::TLS_HANDSHAKE, handshake(settings, tcp, key.address)).await {
            Ok(Ok(tls)) => {
                self.observer.handshake(Direction::Outbound, Ok(()));
                return Ok(tls);
            }
            Ok(Err(error)) => (E::handshake_reason(&error), error.to_string()),
            Err(_) => ("timeout", "the peer did not answer in time".to_owned()),
        };
        self.observer.handshake(Direction::Outbound, Err(reason));
        Err(OfferError::Tls { reason, detail: detail.into() })
    }

    fn session(&self, io: &Self::Io, key: &Key) -> Option<(Arc<Session>, Listed)> {
        let (tcp, tls) = io.get_ref();
        let certificate = tls.peer_certificates().and_then(|chain| chain.first());
        let peer = certificate.and_then(|certificate| E::peer(certificate).ok());
        let session = Session::new(tls, peer, self.edge.serial(&key.own), tcp.wire());
        let listed = self.sessions.enter(&session, tls);
        Some((session, listed))
    }

    fn counts(&self) -> Arc<PoolCounts> {
        Arc::clone(&self.counts)
    }
}

impl<E> Dialer<E> {
    /// Waits until the pod may begin one more handshake.
    async fn turn(&self) -> Result<(), OfferError> {
        let deadline = Instant::now() + limits::CONNECT_PEER;
        loop {
            let wait = self.account.dial();
            if wait.is_zero() {
                return Ok(());
            }
            if Instant::now() + wait > deadline {
                self.account.refused(Refusal::Handshake);
                return Err(Refusal::Handshake.into());
            }
            sleep(wait).await;
        }
    }
}

async fn handshake(
    settings: Arc<rustls::ClientConfig>,
    tcp: Buffered,
    peer: SocketAddr,
) -> io::Result<TlsStream<Buffered>> {
    let mut tls = TlsConnector::from(settings).connect(ServerName::from(peer.ip()), tcp).await?;
    tls.get_mut().1.set_buffer_limit(Some(limits::TLS_WRITE));
    Ok(tls)
}
