//! A client of the CA that wants as many certificates as it can get: the stock gRPC library's, generated from the published text. It
//! shares the machine with the CA.

use std::{
    collections::BTreeMap,
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use heddle_lab::{Lab, TRUST_DOMAIN, agent::Ca};
use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use tokio::task::JoinSet;
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig},
};

use self::proto::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient};

/// Messages and client of `agent/proto/citadel.proto`.
mod proto {
    #![allow(clippy::all, clippy::allow_attributes_without_reason, reason = "generated code")]
    tonic::include_proto!("istio.v1.auth");
}

/// Connections, and requests under way on each: as the agents of four nodes that have work.
const CONNECTIONS: usize = 4;
const UNDER_WAY: usize = 8;
/// Requests that are made beforehand, each with a key of its own.
const REQUESTS: usize = 64;

/// Certificates a second that the lab's CA issues.
pub fn certificates_per_second(lab: &Lab, time: Duration) -> Result<f64> {
    let ca = lab.ca()?;
    let token = format!("Bearer {}", fs::read_to_string(&ca.token)?.trim()).parse()?;
    let root = Certificate::from_pem(fs::read(&ca.root).context("the CA's root")?);
    let tls = ClientTlsConfig::new().ca_certificate(root).domain_name(Ca::NAME);
    let address = format!("https://{}", ca.address);
    let requests = requests()?;
    lab.node(1)?.netns.inside(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(ask(&address, &tls, &token, requests, time))
    })
}

/// Requests for one identity.
fn requests() -> Result<Vec<IstioCertificateRequest>> {
    let identity = format!("spiffe://{TRUST_DOMAIN}/ns/bench/sa/issued");
    let value = Value { kind: Some(Kind::StringValue(identity.clone())) };
    let metadata = Struct { fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), value)]) };
    let mut made = Vec::new();
    for _ in 0..REQUESTS {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        let csr = params.serialize_request(&KeyPair::generate()?)?.pem()?;
        made.push(IstioCertificateRequest { csr, validity_duration: 3_600, metadata: Some(metadata.clone()) });
    }
    Ok(made)
}

async fn ask(
    address: &str,
    tls: &ClientTlsConfig,
    token: &MetadataValue<Ascii>,
    requests: Vec<IstioCertificateRequest>,
    time: Duration,
) -> Result<f64> {
    let requests = Arc::new(requests);
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let endpoint = Channel::from_shared(address.to_owned())?.tls_config(tls.clone())?;
        let channel = endpoint.connect().await.context("TLS with the CA")?;
        connections.push(IstioCertificateServiceClient::new(channel));
    }
    let mut clients = JoinSet::new();
    let start = Instant::now();
    for (number, connection) in connections.into_iter().enumerate() {
        for lane in 0..UNDER_WAY {
            let (mut client, requests, token) = (connection.clone(), Arc::clone(&requests), token.clone());
            let first = number * UNDER_WAY + lane;
            clients.spawn(async move {
                let mut issued = 0_u32;
                for request in requests.iter().cycle().skip(first) {
                    if start.elapsed() >= time {
                        break;
                    }
                    let mut request = Request::new(request.clone());
                    request.metadata_mut().insert("authorization", token.clone());
                    request.metadata_mut().insert("clusterid", MetadataValue::from_static("Kubernetes"));
                    let answer = client.create_certificate(request).await.context("the CA refused")?;
                    ensure!(answer.get_ref().cert_chain.len() > 1, "the CA answered with no chain");
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
