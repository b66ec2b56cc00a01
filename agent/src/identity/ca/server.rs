//! The CA's listener: TLS with a certificate of its own, bounded connections, one gRPC method.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use rcgen::{KeyPair, SanType};
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{DnsName, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, Server, TcpConnectInfo};
use zeroize::Zeroizing;

use super::{
    Authorization, CaConfig, CaError, authority::Authority, issue::sign_server, opaque::Opaque, publish::Publisher,
    refusal::Refusal, root::Root, source::Keys, vitals::Vitals,
};
use crate::{
    cluster::api_client,
    identity::{
        proto::istio_certificate_service_server::IstioCertificateServiceServer, tls::provider, verify::handshake_reason,
    },
    life::limits,
};

/// A CA that listens.
pub struct Ca {
    listener: TcpListener,
    address: SocketAddr,
    authority: Arc<Authority>,
    publisher: Publisher,
    tls: TlsAcceptor,
    vitals: Vitals,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Ca {
    /// Makes or loads the root, listens, then publishes the trust bundle: who reads it can connect.
    ///
    /// # Errors
    /// When the root, a name, the address or the way to the API server can't be used.
    pub async fn bind(config: CaConfig) -> Result<Self, CaError> {
        let client = match &config.authorization {
            Authorization::Nodes(nodes) => Some(api_client(nodes.kubeconfig.as_deref()).await?),
            Authorization::Token(_) => None,
        };
        let keys = Arc::new(Keys::open(config.root.clone(), &config.trust_domain, client.as_ref()).await?);
        let own = OwnTls::new(Arc::clone(&keys), &config.names)?;
        let mut tls = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(own));
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let listen = |error| CaError::Listen(config.listen, error);
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let cluster = client.as_ref().map(|client| (client.clone(), client.default_namespace()));
        let publisher = Publisher::new(Arc::clone(&keys), config.publish_root.clone(), cluster)?;
        let vitals = Vitals::new(Arc::clone(&keys))?;
        let authority = Arc::new(Authority::new(keys, config, client, vitals.clone())?);
        Ok(Self { listener, address, authority, publisher, tls: TlsAcceptor::from(Arc::new(tls)), vitals })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The trust bundle, PEM.
    #[must_use]
    pub fn root_pem(&self) -> String {
        self.authority.keys().current().bundle_pem()
    }

    /// The way to the API server, and whether this replica is the one that writes there; `None` without an API server.
    #[must_use]
    pub fn publishing(&self) -> Option<(kube::Client, watch::Receiver<bool>)> {
        self.publisher.publishing()
    }

    /// What it tells of itself, now and while it runs.
    #[must_use]
    pub fn vitals(&self) -> Vitals {
        self.vitals.clone()
    }

    /// Answers until `shutdown`, then finishes what is under way within `limits::CA_DRAIN`.
    ///
    /// # Errors
    /// When the server breaks.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), CaError> {
        tracing::info!(address = %self.address, trust_domain = %self.authority.trust_domain(), "CA listens.");
        let stop = CancellationToken::new();
        let _ends = stop.clone().drop_guard();
        self.authority.follow(stop.clone());
        let (sender, receiver) = mpsc::channel(1);
        let accept = tokio::spawn(accept(self.listener, self.tls, sender, stop.clone()));
        let keys = Arc::clone(self.authority.keys());
        let following = stop.clone();
        tokio::spawn(async move { keys.follow(following).await });
        let publishing = tokio::spawn(self.publisher.run(stop.clone()));
        let service = IstioCertificateServiceServer::from_arc(Arc::clone(&self.authority))
            .max_decoding_message_size(limits::CA_REQUEST_BYTES)
            .max_encoding_message_size(limits::CA_ANSWER_BYTES);
        let service = Opaque { inner: service, authority: self.authority };
        let serving = Server::builder()
            .timeout(limits::CA_REQUEST)
            .max_concurrent_streams(limits::CA_STREAMS)
            .http2_max_header_list_size(limits::HEADER_LIST)
            .http2_keepalive_interval(Some(limits::PING_INTERVAL))
            .http2_keepalive_timeout(Some(limits::PING_TIMEOUT))
            .add_service(service)
            .serve_with_incoming_shutdown(
                ReceiverStream::new(receiver).map(Ok::<_, io::Error>),
                stop.clone().cancelled_owned(),
            );
        tokio::pin!(serving);
        let result = tokio::select! {
            result = &mut serving => result,
            () = shutdown => {
                stop.cancel();
                // Who still talks after that is cut.
                tokio::time::timeout(limits::CA_DRAIN, serving).await.unwrap_or(Ok(()))
            }
        };
        stop.cancel();
        accept.abort();
        // What it has under way has its own deadline.
        drop(publishing.await);
        Ok(result?)
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, ready: mpsc::Sender<Admitted>, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(limits::CA_CONNECTIONS));
    let mut pause = limits::ACCEPT_PAUSE_MIN;
    while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = limits::ACCEPT_PAUSE_MIN;
                tokio::spawn(admit(stream, peer, tls.clone(), permit, ready.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "Accept failed.");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(limits::ACCEPT_PAUSE_MAX);
            }
        }
    }
}

async fn admit(
    stream: TcpStream,
    peer: SocketAddr,
    tls: TlsAcceptor,
    permit: OwnedSemaphorePermit,
    ready: mpsc::Sender<Admitted>,
) {
    let handshake = async {
        stream.set_nodelay(true)?;
        tls.accept(stream).await
    };
    let handshake = tokio::time::timeout(limits::TLS_HANDSHAKE, handshake).await;
    match handshake.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        // Gone if the CA stops meanwhile.
        Ok(stream) => drop(ready.send(Admitted { stream, _permit: permit }).await),
        Err(error) => tracing::debug!(%peer, reason = handshake_reason(&error), %error, "TLS handshake failed."),
    }
}

/// A connection with its place among those that the CA holds.
struct Admitted {
    stream: TlsStream<TcpStream>,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Admitted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.get_ref().0.connect_info()
    }
}

impl AsyncRead for Admitted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Admitted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The CA's own TLS certificate, made anew by the handshake that finds it half through its life or of another root.
struct OwnTls {
    keys: Arc<Keys>,
    names: Vec<SanType>,
    current: Mutex<Option<Serving>>,
}

struct Serving {
    renew_at: SystemTime,
    root: Arc<Root>,
    certified: Arc<CertifiedKey>,
}

impl fmt::Debug for OwnTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnTls").field("names", &self.names).finish_non_exhaustive()
    }
}

impl OwnTls {
    fn new(keys: Arc<Keys>, names: &[String]) -> Result<Self, CaError> {
        let names = names.iter().map(|name| subject_name(name)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { keys, names, current: Mutex::default() })
    }

    fn at(&self, now: SystemTime) -> Result<Arc<CertifiedKey>, Refusal> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let root = self.keys.current();
        if let Some(serving) = current.as_ref()
            && now < serving.renew_at
            && serving.root.chain == root.chain
        {
            return Ok(Arc::clone(&serving.certified));
        }
        let failed = |error: &dyn ToString| Refusal::Sign(error.to_string());
        let key = Zeroizing::new(KeyPair::generate().map_err(|error| failed(&error))?);
        let issued = sign_server(&root, &self.names, &*key, now)?;
        let serialised = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialized_der()));
        let signing = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&serialised).map_err(|error| failed(&error))?;
        let mut chain = vec![issued.certificate];
        chain.extend(root.chain.iter().cloned());
        let certified = Arc::new(CertifiedKey::new(chain, signing));
        let half = issued.not_after.duration_since(now).unwrap_or(Duration::ZERO) / 2;
        *current = Some(Serving { renew_at: now + half, root, certified: Arc::clone(&certified) });
        Ok(certified)
    }
}

impl ResolvesServerCert for OwnTls {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.at(SystemTime::now())
            .inspect_err(|error| tracing::error!(reason = error.reason(), %error, "No TLS certificate for the CA."))
            .ok()
    }
}

fn subject_name(name: &str) -> Result<SanType, CaError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let bad = || CaError::Name(name.to_owned());
    DnsName::try_from(name).map_err(|_| bad())?;
    Ok(SanType::DnsName(name.try_into().map_err(|_| bad())?))
}
