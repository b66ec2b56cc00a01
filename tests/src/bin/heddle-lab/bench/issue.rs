//! A client of the CA that wants as many certificates as it can get: CreateCertificate over HTTP/2, written by hand so that the
//! client costs little. It shares the machine with the CA.

use std::{
    fs,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use heddle_lab::{Lab, TRUST_DOMAIN, agent::Ca};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{net::TcpStream, task::JoinSet};
use tokio_rustls::TlsConnector;

/// Connections, and requests under way on each: as the agents of four nodes that have work.
const CONNECTIONS: usize = 4;
const UNDER_WAY: usize = 8;
/// Requests that are made beforehand, each with a key of its own.
const REQUESTS: usize = 64;
const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// Certificates a second that the lab's CA issues.
pub fn certificates_per_second(lab: &Lab, time: Duration) -> Result<f64> {
    let ca = lab.ca()?;
    let (address, token) = (ca.address, fs::read_to_string(&ca.token)?.trim().to_owned());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&ca.root).context("the CA's root")?)?;
    let requests = requests()?;
    lab.node(1)?.netns.inside(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(ask(address, roots, token, requests, time))
    })
}

/// gRPC messages with requests for one identity.
fn requests() -> Result<Vec<Bytes>> {
    let identity = format!("spiffe://{TRUST_DOMAIN}/ns/bench/sa/issued");
    let mut made = Vec::new();
    for _ in 0..REQUESTS {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        let csr = params.serialize_request(&KeyPair::generate()?)?.pem()?;
        made.push(message(&csr, &identity)?);
    }
    Ok(made)
}

/// IstioCertificateRequest with csr (1), validity_duration (3) and metadata (4), in its gRPC frame.
fn message(csr: &str, identity: &str) -> Result<Bytes> {
    let value = field(3, identity.as_bytes());
    let entry = [field(1, b"ImpersonatedIdentity"), field(2, &value)].concat();
    let hour = [&[3 << 3][..], &varint(3_600)].concat();
    let message = [field(1, csr.as_bytes()), hour, field(4, &field(1, &entry))].concat();
    let length = u32::try_from(message.len())?.to_be_bytes();
    Ok([&[0][..], &length, &message].concat().into())
}

/// A field of bytes (protobuf wire type 2).
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2][..], &varint(bytes.len()), bytes].concat()
}

fn varint(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push(value.to_le_bytes()[0] & 0x7f | 0x80);
        value >>= 7;
    }
    bytes.push(value.to_le_bytes()[0]);
    bytes
}

async fn ask(
    address: SocketAddr,
    roots: RootCertStore,
    token: String,
    requests: Vec<Bytes>,
    time: Duration,
) -> Result<f64> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let requests = Arc::new(requests);
    let mut clients = JoinSet::new();
    let mut drivers = JoinSet::new();
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let stream = connector.connect(ServerName::try_from(Ca::NAME)?, stream).await.context("TLS with the CA")?;
        let (sender, connection) = h2::client::handshake(stream).await?;
        drivers.spawn(connection);
        connections.push(sender);
    }
    let start = Instant::now();
    for (number, sender) in connections.into_iter().enumerate() {
        for lane in 0..UNDER_WAY {
            let (sender, requests, token) = (sender.clone(), Arc::clone(&requests), token.clone());
            let first = number * UNDER_WAY + lane;
            clients.spawn(async move {
                let mut issued = 0_u32;
                for request in requests.iter().cycle().skip(first) {
                    if start.elapsed() >= time {
                        break;
                    }
                    call(sender.clone(), &token, request.clone()).await?;
                    issued += 1;
                }
                Ok::<_, anyhow::Error>(issued)
            });
        }
    }
    let mut issued = 0;
    while let Some(client) = clients.join_next().await {
        issued += client??;
    }
    ensure!(issued > 0, "no certificate was issued");
    Ok(f64::from(issued) / start.elapsed().as_secs_f64())
}

/// One call; anything but a certificate is an error.
async fn call(sender: SendRequest<Bytes>, token: &str, message: Bytes) -> Result<()> {
    let request = http::Request::post(format!("https://{}{PATH}", Ca::NAME))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {token}"))
        .header("clusterid", "Kubernetes")
        .body(())?;
    let (response, mut body) = sender.ready().await?.send_request(request, false)?;
    body.send_data(message, true)?;
    let response = response.await?;
    let mut answer = response.into_body();
    let mut received = 0;
    while let Some(chunk) = answer.data().await {
        let chunk = chunk?;
        received += chunk.len();
        answer.flow_control().release_capacity(chunk.len())?;
    }
    let trailers = answer.trailers().await?;
    let status = trailers.as_ref().and_then(|fields| fields.get("grpc-status"));
    ensure!(status.is_some_and(|status| status == "0") && received > 0, "the CA refused: {trailers:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{field, message, varint};

    #[test]
    fn numbers_and_fields_are_as_protobuf_has_them() -> anyhow::Result<()> {
        assert_eq!((varint(1), varint(150), varint(3_600)), (vec![1], vec![0x96, 1], vec![0x90, 0x1c]));
        assert_eq!(field(2, b"testing"), [&[0x12, 7][..], b"testing"].concat());
        let framed = message("csr", "id")?;
        assert_eq!(framed[..5], [0, 0, 0, 0, 40]);
        assert_eq!(framed.len(), 5 + 40);
        Ok(())
    }
}
