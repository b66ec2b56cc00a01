//! HBONE by hand: an adversary that presents whatever certificate it is given, or none, and believes any server.

use std::{
    net::{Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use heddle_lab::reports::{Event, Tunnelled};
use rustls_pki_types::CertificateDer;
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use crate::{tell, tls};

const PATIENCE: Duration = Duration::from_secs(10);

pub async fn client(to: SocketAddr, authority: &str, pair: Option<(PathBuf, PathBuf)>, say: &str) -> Tunnelled {
    let mut report = Tunnelled::default();
    let met = timeout(PATIENCE, tunnel(to, authority, pair, say, &mut report)).await;
    report.error = match met {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(_) => Some("timeout".to_owned()),
    };
    report
}

async fn tunnel(
    to: SocketAddr,
    authority: &str,
    pair: Option<(PathBuf, PathBuf)>,
    say: &str,
    report: &mut Tunnelled,
) -> Result<()> {
    let stream = tls::connect(&tls::client_from(pair.as_ref())?, to).await.context("handshake")?;
    report.handshake = true;
    report.server_names =
        stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(uri_names).unwrap_or_default();
    let (h2, connection) = h2::client::handshake(stream).await.context("HTTP/2")?;
    let driver = tokio::spawn(connection);
    let asked = async {
        let mut h2 = h2.ready().await.context("HTTP/2 settings")?;
        let request = http::Request::builder().method(http::Method::CONNECT).uri(authority).body(())?;
        let (response, mut body) = h2.send_request(request, false).context("request")?;
        let response = response.await.context("response")?;
        report.status = Some(response.status().as_u16());
        if response.status() != http::StatusCode::OK {
            return Ok(());
        }
        body.send_data(Bytes::copy_from_slice(say.as_bytes()), true).context("sending")?;
        let (mut incoming, mut received) = (response.into_body(), Vec::new());
        while let Some(chunk) = incoming.data().await {
            let chunk = chunk.context("receiving")?;
            incoming.flow_control().release_capacity(chunk.len())?;
            received.extend_from_slice(&chunk);
        }
        report.received = String::from_utf8_lossy(&received).into_owned();
        Ok::<_, anyhow::Error>(())
    }
    .await;
    driver.abort();
    asked
}

/// SPIFFE ids anywhere in a certificate, read from its bytes: a URI name stands there as plain text.
fn uri_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    const SCHEME: &[u8] = b"spiffe://";
    let bytes = certificate.as_ref();
    let starts = bytes.windows(SCHEME.len()).enumerate().filter(|(_, window)| *window == SCHEME).map(|(at, _)| at);
    starts
        .filter_map(|at| {
            // DER: the length stands in the byte before a name that is shorter than 128 bytes.
            let length = usize::from(*bytes.get(at.checked_sub(1)?)?);
            Some(String::from_utf8_lossy(bytes.get(at..at + length)?).into_owned())
        })
        .collect()
}

/// Accepts any client, answers every CONNECT with 200, echoes and reports what came.
pub async fn server(port: u16, certificate: &Path, key: &Path) -> Result<()> {
    let acceptor = TlsAcceptor::from(tls::server(certificate, key)?);
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
    tell(&Event::Ready)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            match timeout(PATIENCE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    if let Err(error) = tunnels(stream).await {
                        eprintln!("{error:#}");
                    }
                }
                Ok(Err(error)) => report_failure(&error.to_string()),
                Err(_) => report_failure("timeout"),
            }
        });
    }
}

fn report_failure(error: &str) {
    if let Err(error) = tell(&Event::HandshakeFailed { error: error.to_owned() }) {
        eprintln!("{error:#}");
    }
}

async fn tunnels(stream: tokio_rustls::server::TlsStream<TcpStream>) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        tokio::spawn(async move {
            let authority = request.uri().to_string();
            let mut body = respond.send_response(http::Response::new(()), false)?;
            let (mut incoming, mut bytes) = (request.into_body(), 0);
            while let Some(chunk) = incoming.data().await {
                let chunk = chunk?;
                bytes += chunk.len() as u64;
                incoming.flow_control().release_capacity(chunk.len())?;
                body.send_data(chunk, false)?;
            }
            body.send_data(Bytes::new(), true)?;
            tell(&Event::Tunnel { authority, bytes })
        });
    }
    Ok(())
}
