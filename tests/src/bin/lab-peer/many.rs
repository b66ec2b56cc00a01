//! One who signs for as many identities as it likes, and says something else in every field of every request.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use heddle_lab::hostile::Scanned;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet, time::timeout};
use tokio_rustls::client::TlsStream;

use crate::{
    dial::kind,
    frames::{self, END_HEADERS, GOAWAY, HEADERS, RST_STREAM, SETTINGS, frame},
    tls::{self, Pair},
};

/// Handshakes at a time.
const AT_A_TIME: usize = 16;
/// Tries of one identity: an agent that lets so many handshakes a second through lets the next one through later.
const TRIES: u32 = 40;

/// One request of each of `count` identities, to the tunnels of `to` in turn.
pub async fn run(to: &[SocketAddr], port: u16, root: &(PathBuf, PathBuf), count: usize) -> Result<Scanned> {
    let issuer = Arc::new(issuer(&root.0, &root.1)?);
    let mut report = Scanned::default();
    let (mut asking, mut numbers) = (JoinSet::new(), 0..count);
    loop {
        while asking.len() < AT_A_TIME {
            let Some(number) = numbers.next() else { break };
            let (issuer, to) = (Arc::clone(&issuer), to[number % to.len()]);
            asking.spawn(async move {
                let config = tls::client(Some(mint(&issuer, number)?))?;
                let mut last = io::Error::from(io::ErrorKind::NotConnected);
                for _ in 0..TRIES {
                    match timeout(Duration::from_secs(10), ask(&config, to, port, number)).await {
                        Ok(Ok(status)) => return Ok(status.to_string()),
                        Ok(Err(error)) => last = error,
                        Err(_) => last = io::ErrorKind::TimedOut.into(),
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Ok::<_, anyhow::Error>(kind(&last))
            });
        }
        let Some(asked) = asking.join_next().await else { return Ok(report) };
        *report.met.entry(asked??).or_default() += 1;
    }
}

fn issuer(certificate: &Path, key: &Path) -> Result<Issuer<'static, KeyPair>> {
    let key = KeyPair::from_pem(&fs::read_to_string(key)?)?;
    Ok(Issuer::from_ca_cert_pem(&fs::read_to_string(certificate)?, key)?)
}

fn mint(issuer: &Issuer<'static, KeyPair>, number: usize) -> Result<Pair> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = time::OffsetDateTime::now_utc() - time::Duration::minutes(1);
    params.not_after = time::OffsetDateTime::now_utc() + time::Duration::hours(1);
    let name = format!("spiffe://{}/ns/tenant-{number}/sa/account-{number}", heddle_lab::TRUST_DOMAIN);
    params.subject_alt_names.push(SanType::URI(name.as_str().try_into()?));
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    Ok((vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))))
}

/// One CONNECT on a new connection; its status.
pub async fn request(stream: &mut TlsStream<TcpStream>, fields: &[(&str, &str)]) -> io::Result<u16> {
    let mut out = frames::PREFACE.to_vec();
    frame(&mut out, SETTINGS, 0, 0, &[]);
    frame(&mut out, HEADERS, END_HEADERS, 1, &frames::block(fields));
    stream.write_all(&out).await?;
    loop {
        let frame = frames::read(stream).await?;
        match frame.kind {
            HEADERS => return frames::status(&frame.payload).ok_or_else(|| io::Error::other("no status")),
            RST_STREAM => return Err(io::Error::other("stream reset")),
            GOAWAY => return Err(io::Error::other("goaway")),
            _ => {}
        }
    }
}

async fn ask(config: &Arc<rustls::ClientConfig>, to: SocketAddr, port: u16, number: usize) -> io::Result<u16> {
    let mut stream = tls::connect(config, to).await?;
    let authority = SocketAddr::new(to.ip(), port).to_string();
    let (forwarded, baggage, trace) = (
        format!("for=\"203.0.113.{}:{number}\";host=service-{number}.made-up.svc.cluster.local", number % 256),
        format!(
            "k8s.cluster.name=c{number},k8s.namespace.name=n{number},service.name=s{number},service.version={number}"
        ),
        format!("00-{number:032x}-{number:016x}-01"),
    );
    let fields = [
        (":method", "CONNECT"),
        (":authority", authority.as_str()),
        ("forwarded", &forwarded),
        ("baggage", &baggage),
        ("traceparent", &trace),
    ];
    request(&mut stream, &fields).await
}
