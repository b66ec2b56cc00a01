//! The way to the CA: TCP, then TLS 1.3 with HTTP/2, and nothing older. The CA's name must be in its certificate, and that must
//! lead to the trust bundle.
//!
//! Beside `client`, whose gRPC library would take TLS 1.2 too as soon as any dependency asks rustls for it.

use std::{
    error::Error as StdError,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use rustls::{AlertDescription, ClientConfig, Error, PeerIncompatible};
use rustls_pki_types::{InvalidDnsNameError, ServerName};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tower_service::Service;

use crate::life::limits;

/// Why there is no way to the CA.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("can't connect")]
    Connect(#[source] Box<dyn StdError + Send + Sync>),
    #[error("TLS 1.3 is needed, which the CA does not speak")]
    Version(#[source] io::Error),
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    #[error("no TLS handshake within {0:?}")]
    Slow(Duration),
    #[error("the CA does not speak HTTP/2")]
    NoHttp2,
}

/// Connects to one CA. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Dial {
    /// With its true scheme, whatever the gRPC library is told.
    address: Uri,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
    tcp: HttpConnector,
}

impl Dial {
    /// `name` is what the CA's certificate must carry, where it is not the host of `address`.
    ///
    /// # Errors
    /// When there is no such name.
    pub fn new(address: Uri, name: Option<&str>, tls: ClientConfig) -> Result<Self, InvalidDnsNameError> {
        let host = address.host().unwrap_or_default();
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let name = ServerName::try_from(name.unwrap_or(host))?.to_owned();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(limits::CONNECT_PEER));
        Ok(Self { address, name, tls: Arc::new(tls), tcp })
    }
}

impl Service<Uri> for Dial {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, DialError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        self.tcp.poll_ready(context).map_err(|error| DialError::Connect(error.into()))
    }

    fn call(&mut self, _told: Uri) -> Self::Future {
        let connecting = self.tcp.call(self.address.clone());
        let (tls, name) = (TlsConnector::from(Arc::clone(&self.tls)), self.name.clone());
        Box::pin(async move {
            let tcp = connecting.await.map_err(|error| DialError::Connect(error.into()))?.into_inner();
            let stream = match timeout(limits::TLS_HANDSHAKE, tls.connect(name, tcp)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) if is_older(&error) => return Err(DialError::Version(error)),
                Ok(Err(error)) => return Err(DialError::Tls(error)),
                Err(_) => return Err(DialError::Slow(limits::TLS_HANDSHAKE)),
            };
            if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
                return Err(DialError::NoHttp2);
            }
            Ok(TokioIo::new(stream))
        })
    }
}

/// The other side refuses our version, or chose another one.
fn is_older(error: &io::Error) -> bool {
    use PeerIncompatible::{ServerDoesNotSupportTls12Or13, ServerTlsVersionIsDisabledByOurConfig};
    matches!(
        error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()),
        Some(
            Error::AlertReceived(AlertDescription::ProtocolVersion)
                | Error::PeerIncompatible(ServerDoesNotSupportTls12Or13 | ServerTlsVersionIsDisabledByOurConfig)
        )
    )
}
