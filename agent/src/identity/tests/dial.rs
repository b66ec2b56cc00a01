//! The way to the CA: TLS 1.3 with HTTP/2, or none, and the reason is told.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ProtocolVersion, ServerConfig, SupportedProtocolVersion,
    version::{TLS12, TLS13},
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_rustls::TlsAcceptor;

use super::support::{TestRoot, client_config, id, presented, within};
use crate::identity::Certificates;

/// What takes TLS connections and does nothing with them.
struct Silent {
    directory: tempfile::TempDir,
    address: SocketAddr,
    /// Versions of those that came about.
    agreed: mpsc::UnboundedReceiver<Option<ProtocolVersion>>,
    task: JoinHandle<()>,
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serving(versions: &[&'static SupportedProtocolVersion], alpn: &[&[u8]]) -> Silent {
    let directory = tempfile::Builder::new().prefix("hi-").tempdir().unwrap();
    let (root, key) = (TestRoot::new("the root"), KeyPair::generate().unwrap());
    let leaf = root.sign(&CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap(), &key);
    std::fs::write(directory.path().join("root.pem"), root.certificate.pem()).unwrap();
    std::fs::write(directory.path().join("token"), "a token").unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(presented(vec![leaf], &key));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, acceptor) = (listener.local_addr().unwrap(), TlsAcceptor::from(Arc::new(config)));
    let (agrees, agreed) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(stream).await {
                let _ = agrees.send(stream.get_ref().1.protocol_version());
            }
        }
    });
    Silent { directory, address, agreed, task }
}

/// The first error of a node that asks this for a certificate.
async fn error(ca: &Silent) -> String {
    let web = id("shop", "web");
    let node = Certificates::start(client_config(ca.address, ca.directory.path(), Duration::from_secs(60))).unwrap();
    node.keep([web].into());
    let error = || node.list().iter().map(|status| status.last_error.clone()).collect::<String>();
    within(Duration::from_secs(20), "an error", || !error().is_empty()).await;
    error()
}

#[tokio::test]
async fn a_ca_that_speaks_tls_1_2_alone_is_refused_and_the_reason_told() {
    let mut ca = serving(&[&TLS12], &[b"h2"]).await;
    let error = error(&ca).await;
    assert!(error.starts_with("CA unreachable") && error.contains("TLS 1.3 is needed"), "{error}");
    assert!(ca.agreed.try_recv().is_err(), "nothing was agreed on");
}

#[tokio::test]
async fn a_ca_that_speaks_both_is_spoken_to_in_tls_1_3() {
    let mut ca = serving(&[&TLS12, &TLS13], &[b"h2"]).await;
    error(&ca).await;
    assert_eq!(ca.agreed.recv().await, Some(Some(ProtocolVersion::TLSv1_3)));
}

#[tokio::test]
async fn a_server_without_http_2_is_told_of_as_such() {
    let ca = serving(&[&TLS13], &[]).await;
    let error = error(&ca).await;
    assert!(error.contains("does not speak HTTP/2"), "{error}");
}
