//! `heddle proof A B`: makes one connection from pod A to pod B as A's app would, and says what both sides saw of it.
//!
//! It orders the other stages and concludes; nothing is taken for proven that was not seen on this very connection. It changes
//! nothing: the connection is captured, decided and carried like any other.

mod conclude;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout, timeout_at},
};

use self::conclude::{Facts, conclude};
pub use self::conclude::{Near, Report, Source, Verdict};
use super::limits;
use crate::{
    capture::{self, Caller},
    cluster::{Snapshot, Workload},
    policy::{QuestionError, find_pod},
    telemetry::PodReport,
    tunnel::{Context, Expected, Program},
};

/// As it is asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// `[NAMESPACE/]POD`, of this node.
    pub from: String,
    /// `[NAMESPACE/]POD[:PORT]`, or `service/NAME.NAMESPACE:PORT`.
    pub to: String,
    /// Said on the connection; empty for nothing.
    #[serde(default)]
    pub say: String,
}

/// Why nothing could be tried.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    #[error(transparent)]
    Pod(#[from] QuestionError),
    #[error("pod {pod} is on node {node:?}: ask the agent there")]
    Elsewhere { pod: String, node: Arc<str> },
    #[error("{0:?} is no destination: give NAMESPACE/POD:PORT or service/NAME.NAMESPACE:PORT")]
    Destination(String),
    #[error("no Service {0} with a cluster address is known")]
    NoSuchService(String),
    #[error("no Service names a port of pod {0}: give NAMESPACE/POD:PORT")]
    NoPort(String),
    #[error("the two pods have no address of the same family")]
    Family,
    #[error("--say takes at most {} bytes without line ends", limits::PROOF_SAY)]
    Say,
}

impl ProofError {
    /// Stable name: log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Pod(error) => error.reason(),
            Self::Elsewhere { .. } => "other_node",
            Self::Destination(_) => "bad_destination",
            Self::NoSuchService(_) => "no_such_service",
            Self::NoPort(_) => "no_port",
            Self::Family => "no_common_family",
            Self::Say => "bad_say",
        }
    }
}

/// Where the connection is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    address: SocketAddr,
    /// `namespace/name` of the pod, or `service/name.namespace`.
    name: String,
}

/// Proofs of one agent, one at a time.
#[derive(Debug, Default)]
pub struct Prover {
    turn: Mutex<()>,
}

impl Prover {
    /// Tries, and concludes.
    ///
    /// # Errors
    /// When what is asked names nothing that can be tried. A connection that fails is no error: the report says so.
    pub async fn prove(&self, context: &Context, pods: &[PodReport], request: &Request) -> Result<Report, ProofError> {
        if request.say.len() > limits::PROOF_SAY || request.say.contains(char::is_control) {
            return Err(ProofError::Say);
        }
        let snapshot = context.cluster.load();
        let from = find_pod(&snapshot, &request.from)?;
        if from.node != context.node {
            let pod = format!("{}/{}", from.namespace, from.name);
            return Err(ProofError::Elsewhere { pod, node: Arc::clone(&from.node) });
        }
        let target = target(&snapshot, from, &request.to)?;
        let mesh = snapshot.mesh_destinations().any(|address| address == target.address.ip());
        let mut facts = Facts::new(from, &target.name, target.address, mesh);
        facts.enrolled = from.enrolled;
        facts.capture = pods.iter().find(|pod| pod.uid == from.uid).map(|pod| pod.state.clone());
        self.connect(context, from, target.address, &request.say, &mut facts).await;
        Ok(conclude(facts))
    }

    async fn connect(&self, context: &Context, from: &Arc<Workload>, to: SocketAddr, say: &str, facts: &mut Facts) {
        let deadline = Instant::now() + limits::PROOF;
        let Ok(_turn) = timeout_at(deadline, self.turn.lock()).await else {
            return facts.trouble = Some("another proof is under way".into());
        };
        match context.capture.programs(&from.uid).await {
            Ok(programs) => facts.programs = programs.into_iter().map(Program::from).collect(),
            // What is not attached has none; the pod's state says why.
            Err(error) => tracing::debug!(%error, "A pod that is to prove itself is not attached"),
        }
        if !facts.enrolled || facts.programs.is_empty() {
            return;
        }
        let mut caller = match context.capture.caller(&from.uid, to, say).await {
            Ok(caller) => caller,
            Err(error) => return facts.trouble = Some(format!("no process could be started in the pod: {error}")),
        };
        let mut expected = context.registry.proofs().expect(&from.uid, caller.port());
        let watched = timeout_at(deadline, watch(&mut caller, &mut expected, say, facts)).await;
        facts.arrived = expected.arrived();
        match watched {
            Ok(Ok(())) => {}
            Ok(Err(error)) => facts.trouble = Some(format!("the process in the pod did not say how it went: {error}")),
            Err(_) => facts.trouble = Some(format!("nothing was known after {:?}", limits::PROOF)),
        }
        facts.note_bytes();
        caller.end().await;
    }
}

/// Has the app's stand-in connect, and waits until it is known what became of the connection.
async fn watch(
    caller: &mut Caller,
    expected: &mut Expected,
    say: &str,
    facts: &mut Facts,
) -> Result<(), capture::CaptureError> {
    facts.connected = Some(caller.connect().await?);
    facts.seen = match timeout(limits::PROOF_ARRIVAL, expected.seen()).await {
        Ok(seen) => seen,
        // It is with the agent, which tries to reach the peer as long as that takes.
        Err(_) if expected.arrived() => expected.seen().await,
        // It went past the agent.
        Err(_) => None,
    };
    if !say.is_empty() && facts.connected == Some(Ok(())) {
        caller.heard().await?;
    }
    Ok(())
}

/// Finds the destination, with an address of a family that the source has.
fn target(snapshot: &Snapshot, from: &Workload, text: &str) -> Result<Target, ProofError> {
    let bad = || ProofError::Destination(text.to_owned());
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, Some(port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(bad)?)),
        None => (text, None),
    };
    if name.is_empty() {
        return Err(bad());
    }
    let common = |addresses: &[IpAddr]| {
        let reachable = |address: &&IpAddr| from.addresses.iter().any(|own| own.is_ipv4() == address.is_ipv4());
        addresses.iter().find(reachable).copied().ok_or(ProofError::Family)
    };
    if let Some(service) = name.strip_prefix("service/") {
        let (name, namespace) = service.split_once('.').ok_or_else(bad)?;
        let namespace = namespace.split('.').next().unwrap_or_default();
        let known = snapshot.services.get(format!("{namespace}/{name}").as_str());
        let none = || ProofError::NoSuchService(format!("{name}.{namespace}"));
        let known = known.filter(|service| !service.cluster_addresses.is_empty()).ok_or_else(none)?;
        let port = port.or_else(|| known.ports.first().map(|port| port.port)).ok_or_else(bad)?;
        let address = SocketAddr::new(common(&known.cluster_addresses)?, port);
        return Ok(Target { address, name: format!("service/{name}.{namespace}") });
    }
    let pod = find_pod(snapshot, name)?;
    let name = format!("{}/{}", pod.namespace, pod.name);
    let port = match port.or_else(|| served_port(snapshot, pod)) {
        Some(port) => port,
        None => return Err(ProofError::NoPort(name)),
    };
    let address = SocketAddr::new(common(&pod.addresses)?, port);
    Ok(Target { address, name })
}

/// The first port by which a Service reaches the pod.
fn served_port(snapshot: &Snapshot, pod: &Workload) -> Option<u16> {
    let mut services: Vec<_> = snapshot.services.values().collect();
    services.sort_by_key(|service| (&service.namespace, &service.name));
    services.into_iter().flat_map(|service| &service.endpoints).find_map(|endpoint| {
        let of_pod = pod.addresses.contains(&endpoint.address);
        endpoint.ports.values().next().copied().filter(|_| of_pod)
    })
}
