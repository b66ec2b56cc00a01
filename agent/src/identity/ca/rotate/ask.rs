//! Who is asked before a step, and how: the agents, or the CA's replicas, each at its `/metrics`.
//!
//! One that can't be asked, or does not say what is asked for, is never taken to agree.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, Uri, client::conn::http1};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt, api::ListParams};
use tokio::{net::TcpStream, time::timeout};

use crate::{identity::ca::secret::within, life::limits};

/// Port of an agent's /metrics unless configured otherwise.
pub const AGENT_PORT: u16 = 15020;
/// And of a replica of the CA.
pub const REPLICA_PORT: u16 = 15014;

/// All agents of the mesh, or all replicas of its CA.
pub struct Group {
    kind: Kind,
    places: Places,
}

/// Where they are.
pub enum Places {
    /// `http://HOST:PORT` of the metrics of each. None of them: nobody can be asked.
    Listed(Vec<Uri>),
    /// Their pods, asked at this port.
    Pods { client: Client, namespace: String, port: u16 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Agents,
    Replicas,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Agents => "agent",
            Self::Replicas => "replica of the CA",
        }
    }

    /// Labels of their pods.
    fn labels(self) -> &'static str {
        match self {
            Self::Agents => "app.kubernetes.io/name=heddle,app.kubernetes.io/component=agent",
            Self::Replicas => "app.kubernetes.io/name=heddle,app.kubernetes.io/component=ca",
        }
    }

    /// How they are listed, and where their pods are looked for.
    fn flags(self) -> (&'static str, &'static str) {
        match self {
            Self::Agents => ("--agents", "--agent-namespace"),
            Self::Replicas => ("--replicas", "--ca-namespace"),
        }
    }
}

/// Why it is not known who there is to ask.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("no {name} is given: name each with {flag}")]
    None { name: &'static str, flag: &'static str },
    #[error("can't list the pods of each {name}: {error}")]
    List { name: &'static str, error: kube::Error },
    #[error("there is no pod of a {name} ({labels}) in namespace {namespace}: name the right one with {flag}")]
    NoPods { name: &'static str, labels: &'static str, namespace: String, flag: &'static str },
}

/// What one of them says, or why it says nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer<S> {
    pub who: String,
    pub said: Result<S, String>,
}

impl Group {
    /// The agents.
    #[must_use]
    pub fn agents(places: Places) -> Self {
        Self { kind: Kind::Agents, places }
    }

    /// The CA's replicas.
    #[must_use]
    pub fn replicas(places: Places) -> Self {
        Self { kind: Kind::Replicas, places }
    }

    /// Whether there is anybody to ask.
    pub(super) fn known(&self) -> bool {
        !matches!(&self.places, Places::Listed(listed) if listed.is_empty())
    }

    /// Asks all of them; `read` finds in their metrics what is asked for.
    pub(super) async fn ask<S>(&self, read: impl Fn(&str) -> Result<S, String>) -> Result<Vec<Answer<S>>, AskError> {
        let read = &read;
        let asked = self.places().await?.into_iter().map(|(who, place)| async move {
            let said = match place {
                Ok(uri) => ask(&uri).await.and_then(|text| read(&text)),
                Err(why) => Err(why),
            };
            Answer { who, said }
        });
        Ok(stream::iter(asked).buffered(limits::AGENTS_ASKED).collect().await)
    }

    async fn places(&self) -> Result<Vec<(String, Result<Uri, String>)>, AskError> {
        let (name, labels, flags) = (self.kind.name(), self.kind.labels(), self.kind.flags());
        match &self.places {
            Places::Listed(listed) if listed.is_empty() => Err(AskError::None { name, flag: flags.0 }),
            Places::Listed(listed) => Ok(listed.iter().map(|uri| (uri.to_string(), Ok(uri.clone()))).collect()),
            Places::Pods { client, namespace, port } => {
                let api = Api::<Pod>::namespaced(client.clone(), namespace);
                let pods = within(api.list(&ListParams::default().labels(labels))).await;
                let pods = pods.map_err(|error| AskError::List { name, error })?;
                let places: Vec<_> = pods.iter().filter_map(|pod| place(pod, *port)).collect();
                if places.is_empty() {
                    return Err(AskError::NoPods { name, labels, namespace: namespace.clone(), flag: flags.1 });
                }
                Ok(places)
            }
        }
    }
}

/// Where a pod is asked; `None` for one that has ended.
fn place(pod: &Pod, port: u16) -> Option<(String, Result<Uri, String>)> {
    let status = pod.status.clone().unwrap_or_default();
    let phase = status.phase.unwrap_or_default();
    if ["Succeeded", "Failed"].contains(&phase.as_str()) {
        return None;
    }
    let address = status.pod_ip.filter(|_| phase == "Running");
    let uri = address.ok_or_else(|| format!("can't be asked: its pod is {phase}")).and_then(|address| {
        let host = if address.contains(':') { format!("[{address}]") } else { address };
        format!("http://{host}:{port}").parse().map_err(|_| "can't be asked: its pod has no address".to_owned())
    });
    Some((pod.name_any(), uri))
}

async fn ask(uri: &Uri) -> Result<String, String> {
    let wait: Duration = limits::AGENT_ASK;
    match timeout(wait, fetch(uri)).await {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(error)) => Err(format!("can't be asked: {error}")),
        Err(_) => Err(format!("can't be asked: no answer within {wait:?}")),
    }
}

async fn fetch(uri: &Uri) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let authority = uri.authority().ok_or("no address")?;
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(AGENT_PORT))).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::get("/metrics").header("host", authority.as_str()).body(Empty::<Bytes>::new())?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(format!("/metrics answers {status}").into());
        }
        Ok(Limited::new(response.into_body(), limits::AGENT_METRICS).collect().await?.to_bytes())
    };
    let bytes: Result<Bytes, Box<dyn std::error::Error + Send + Sync>> = answer.await;
    driver.abort();
    Ok(String::from_utf8(bytes?.into())?)
}
