//! What the agents say at their `/metrics`: which roots they trust, and of which root the certificates that they hold are.
//!
//! An agent that can't be asked, or does not say it, is never taken to agree.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, stream};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, Uri, client::conn::http1};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt, api::ListParams};
use rustls_pki_types::CertificateDer;
use tokio::{net::TcpStream, time::timeout};

use super::RootLine;
use crate::{
    identity::{
        ca::{root::describe, secret::within},
        roots::span,
    },
    life::limits,
};

/// Port of an agent's /metrics unless configured otherwise.
pub const DEFAULT_PORT: u16 = 15020;
/// Label of the agents' pods.
const LABEL: &str = "app.kubernetes.io/name=heddle";
const TRUSTED: &str = "heddle_trust_root_expiry_timestamp_seconds";
const CERTIFICATES: &str = "heddle_certificate_expiry_timestamp_seconds";

/// Which agents there are.
pub enum Agents {
    /// `http://HOST:PORT` of each agent's metrics. None of them: nobody can be asked.
    Listed(Vec<Uri>),
    /// The pods of the agents' DaemonSet, asked at this port.
    Pods { client: Client, namespace: String, port: u16 },
}

/// Why it is not known which agents there are.
#[derive(Debug, thiserror::Error)]
pub enum AgentsError {
    #[error("no agents are given: name them with --agents")]
    None,
    #[error("can't list the agents' pods: {0}")]
    List(kube::Error),
    #[error("there is no agent's pod ({LABEL}) in namespace {0}: name the right one with --agent-namespace")]
    NoPods(String),
}

/// What one agent says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub agent: String,
    pub said: Result<Said, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Said {
    /// Serial numbers of the roots that it trusts.
    trusts: Vec<String>,
    /// Identity and root's serial number of the certificates that it holds; empty where it does not say.
    holds: Vec<(String, String)>,
}

impl Agents {
    /// Whether there is anybody to ask.
    pub(super) fn known(&self) -> bool {
        !matches!(self, Self::Listed(listed) if listed.is_empty())
    }

    /// Asks all of them.
    pub(super) async fn ask(&self) -> Result<Vec<Seen>, AgentsError> {
        let places = self.places().await?;
        let asked = places.into_iter().map(|(agent, place)| async move {
            let said = match place {
                Ok(uri) => ask(&uri).await.and_then(|text| said(&text)),
                Err(why) => Err(why),
            };
            Seen { agent, said }
        });
        Ok(stream::iter(asked).buffered(limits::AGENTS_ASKED).collect().await)
    }

    async fn places(&self) -> Result<Vec<(String, Result<Uri, String>)>, AgentsError> {
        match self {
            Self::Listed(listed) if listed.is_empty() => Err(AgentsError::None),
            Self::Listed(listed) => Ok(listed.iter().map(|uri| (uri.to_string(), Ok(uri.clone()))).collect()),
            Self::Pods { client, namespace, port } => {
                let api = Api::<Pod>::namespaced(client.clone(), namespace);
                let pods = within(api.list(&ListParams::default().labels(LABEL))).await.map_err(AgentsError::List)?;
                let places: Vec<_> = pods.iter().filter_map(|pod| place(pod, *port)).collect();
                if places.is_empty() { Err(AgentsError::NoPods(namespace.clone())) } else { Ok(places) }
            }
        }
    }
}

/// Where an agent's pod is asked; `None` for one that has ended.
fn place(pod: &Pod, port: u16) -> Option<(String, Result<Uri, String>)> {
    let status = pod.status.clone().unwrap_or_default();
    let phase = status.phase.unwrap_or_default();
    if ["Succeeded", "Failed"].contains(&phase.as_str()) {
        return None;
    }
    let address = status.pod_ip.filter(|_| phase == "Running");
    let uri = address.ok_or_else(|| format!("its pod is {phase}")).and_then(|address| {
        let host = if address.contains(':') { format!("[{address}]") } else { address };
        format!("http://{host}:{port}").parse().map_err(|_| "its pod has no address".to_owned())
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
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(DEFAULT_PORT))).await?;
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

/// Reads the two families out of the text exposition.
fn said(text: &str) -> Result<Said, String> {
    let mut said = Said::default();
    for line in text.lines() {
        if let Some(labels) = sample(line, TRUSTED) {
            said.trusts.extend(labels.get("serial").cloned());
        } else if let Some(labels) = sample(line, CERTIFICATES) {
            let label = |name: &str| labels.get(name).cloned().unwrap_or_default();
            said.holds.push((label("identity"), label("root_serial")));
        }
    }
    if said.trusts.is_empty() { Err("does not say which roots it trusts".to_owned()) } else { Ok(said) }
}

/// Labels of a sample of this family.
fn sample(line: &str, family: &str) -> Option<BTreeMap<String, String>> {
    let mut rest = line.strip_prefix(family)?.strip_prefix('{')?;
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if rest.starts_with('}') {
            return Some(labels);
        }
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut letters = after.char_indices();
        let end = loop {
            match letters.next()? {
                (_, '\\') => value.push(match letters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (at, '"') => break at,
                (_, letter) => value.push(letter),
            }
        };
        labels.insert(name.to_owned(), value);
        rest = after.get(end + 1..)?;
    }
}

fn serial(root: &CertificateDer<'_>) -> String {
    span(root).map(|(serial, ..)| serial).unwrap_or_default()
}

/// Agents that are not known to trust this root, a line each.
pub(super) fn not_trusting(seen: &[Seen], root: Option<&CertificateDer<'static>>) -> Vec<String> {
    let Some(root) = root else { return vec!["it has no root".to_owned()] };
    let wanted = serial(root);
    seen.iter()
        .filter_map(|seen| match &seen.said {
            Ok(said) if said.trusts.contains(&wanted) => None,
            Ok(_) => Some(format!("agent {} does not trust {} yet", seen.agent, describe(root))),
            Err(why) => Some(format!("agent {} {why}", seen.agent)),
        })
        .collect()
}

/// Agents that hold certificates of this root, or are not known to hold none, a line each.
pub(super) fn holding(seen: &[Seen], root: &CertificateDer<'static>) -> Vec<String> {
    let unwanted = serial(root);
    let line = |seen: &Seen| match &seen.said {
        Err(why) => Some(format!("agent {} {why}", seen.agent)),
        Ok(said) => {
            let silent = said.holds.iter().filter(|(_, root)| root.is_empty()).count();
            let mut held = said.holds.iter().filter(|(_, root)| *root == unwanted);
            match (held.next(), held.count()) {
                (Some((first, _)), more) => Some(format!(
                    "agent {} holds {} of {}, such as that of {first}; they are renewed at half of their life",
                    seen.agent,
                    certificates(more + 1),
                    describe(root)
                )),
                (None, _) if silent > 0 => {
                    Some(format!("agent {} does not say of which root {} are", seen.agent, certificates(silent)))
                }
                (None, _) => None,
            }
        }
    };
    seen.iter().filter_map(line).collect()
}

fn certificates(count: usize) -> String {
    if count == 1 { "1 certificate".to_owned() } else { format!("{count} certificates") }
}

impl Seen {
    /// For the status: what it trusts and holds of these roots.
    pub fn line(&self, roots: &[RootLine]) -> String {
        let said = match &self.said {
            Ok(said) => said,
            Err(why) => return why.clone(),
        };
        let of = |root: &RootLine| {
            let trusted = if said.trusts.contains(&root.serial) { "trusted" } else { "not trusted" };
            let held = said.holds.iter().filter(|(_, serial)| *serial == root.serial).count();
            format!("{} {trusted}, {} held", root.role, certificates(held))
        };
        roots.iter().map(of).collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::support::TestRoot;

    fn seen(text: &str) -> Vec<Seen> {
        vec![Seen { agent: "a".to_owned(), said: said(text) }]
    }

    #[test]
    fn an_agent_that_does_not_say_it_never_agrees() {
        let root = TestRoot::new("a root").certificate.der().clone();
        let serial = serial(&root);
        let trusts = format!("{TRUSTED}{{subject=\"CN=\\\"x}}\",serial=\"{serial}\"}} 1900000000\n");
        let held =
            |root: &str| format!("{trusts}{CERTIFICATES}{{identity=\"i\",serial=\"1\",root_serial=\"{root}\"}} 9\n");
        assert_eq!(not_trusting(&seen(&trusts), Some(&root)), Vec::<String>::new());
        for text in ["", "# nothing\n", &format!("{TRUSTED}{{serial=\"00\"}} 1\n"), &format!("x{trusts}")] {
            assert_eq!(not_trusting(&seen(text), Some(&root)).len(), 1, "{text}");
        }
        assert_eq!(holding(&seen(&held("00")), &root), Vec::<String>::new());
        for text in [held(&serial), held(""), format!("{trusts}{CERTIFICATES}{{identity=\"i\"}} 9\n"), String::new()] {
            assert_eq!(holding(&seen(&text), &root).len(), 1, "{text}");
        }
        let away = vec![Seen { agent: "a".to_owned(), said: Err("can't be asked".to_owned()) }];
        assert_eq!(not_trusting(&away, Some(&root)).len(), 1);
        assert_eq!(holding(&away, &root).len(), 1);
    }
}
