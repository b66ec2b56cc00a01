//! Connections over TLS, which can be ended from outside.

use std::{
    io,
    net::{Shutdown, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::serve::Listener;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Open connections.
#[derive(Debug, Clone, Default)]
pub struct Connections(Arc<Mutex<Vec<std::net::TcpStream>>>);

impl Connections {
    pub fn drop_all(&self) {
        for connection in self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // One that the other side has ended is ended.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    fn add(&self, connection: std::net::TcpStream) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // An ended one has no peer any more.
        all.retain(|one| one.peer_addr().is_ok());
        all.push(connection);
    }
}

/// Its certificate in PEM, its connections, and what axum serves.
pub fn listen(listener: std::net::TcpListener) -> io::Result<(String, Connections, Encrypted)> {
    let address = listener.local_addr()?;
    let key = KeyPair::generate().map_err(io::Error::other)?;
    let params = CertificateParams::new(vec![address.ip().to_string()]).map_err(io::Error::other)?;
    let certificate = params.self_signed(&key).map_err(io::Error::other)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let secret = PrivateKeyDer::try_from(key.serialize_der()).map_err(io::Error::other)?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], secret))
        .map_err(io::Error::other)?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let connections = Connections::default();
    let (sender, accepted) = mpsc::channel(16);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let task = tokio::spawn(accept(listener, acceptor, connections.clone(), sender));
    Ok((certificate.pem(), connections, Encrypted { address, accepted, task }))
}

/// Shakes hands with each in a task of its own: one that says nothing holds up no other.
async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: Connections,
    to: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (acceptor, connections, to) = (acceptor.clone(), connections.clone(), to.clone());
        tokio::spawn(async move {
            let Ok(second) = twin(&stream) else { return };
            connections.add(second);
            if let Ok(Ok(stream)) = timeout(HANDSHAKE, acceptor.accept(stream)).await {
                // At the end nobody takes it any more.
                let _ = to.send((stream, peer)).await;
            }
        });
    }
}

fn twin(stream: &TcpStream) -> io::Result<std::net::TcpStream> {
    use std::os::fd::AsFd;
    stream.as_fd().try_clone_to_owned().map(std::net::TcpStream::from)
}

/// A listener whose connections are TLS.
#[derive(Debug)]
pub struct Encrypted {
    address: SocketAddr,
    accepted: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    task: JoinHandle<()>,
}

impl Drop for Encrypted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener for Encrypted {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.accepted.recv().await {
            Some(accepted) => accepted,
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}
