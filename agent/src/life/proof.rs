//! `heddle proof A B`: makes one connection from pod A to pod B as A's app would, and says what both sides saw of it.
//!
//! It orders the other stages and concludes; nothing is taken for proven that was not seen on this very connection. It changes
//! nothing: the connection is captured, decided and carried like any other.

mod conclude;
mod lane;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout, timeout_at},
};

use self::conclude::{Facts, conclude};
pub use self::conclude::{Near, OnLane, Report, Source, Verdict};
use self::{
    conclude::{Kernel, Lane},
    lane::Ahead,
};
use super::limits;
use crate::{
    capture::{Caller, CaptureError},
    cluster::{Snapshot, Workload},
    identity::SpiffeId,
    policy::{self, QuestionError, find_pod},
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
        let ahead = Node { context, from, ahead: self.ahead(context, from, to).await };
        let watched = timeout_at(deadline, watch(&mut caller, &mut expected, say, &ahead, facts)).await;
        facts.arrived = expected.arrived();
        match watched {
            Ok(Ok(())) => {}
            Ok(Err(error)) => facts.trouble = Some(format!("the process in the pod did not say how it went: {error}")),
            Err(_) => facts.trouble = Some(format!("nothing was known after {:?}", limits::PROOF)),
        }
        facts.note_bytes();
        caller.end().await;
    }

    /// What the kernel may do with the connection by itself.
    async fn ahead(&self, context: &Context, from: &Arc<Workload>, to: SocketAddr) -> Option<Ahead> {
        let (kernel, snapshot) = (context.capture.lane(), context.cluster.load());
        let (node, from) = (Arc::clone(&context.node), Arc::clone(from));
        asked(move || Ahead::of(&kernel, &snapshot, &node, &from, to)).await
    }
}

/// Walks a table of the kernel's. What can't be read is not known, and the log says why.
async fn asked<T: Send + 'static>(ask: impl FnOnce() -> Result<Option<T>, CaptureError> + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(known)) => known,
        Ok(Err(error)) => {
            tracing::warn!(reason = error.reason(), %error, "A proof can't read the kernel lane's tables");
            None
        }
        // The runtime ends.
        Err(_) => None,
    }
}

/// This node's kernel, as the proof of one connection asks it.
struct Node<'a> {
    context: &'a Context,
    from: &'a Arc<Workload>,
    ahead: Option<Ahead>,
}

impl Node<'_> {
    /// What the kernel does at this moment with the connection from the source's port.
    async fn carries(&self, port: u16) -> Option<Lane> {
        let (ahead, kernel) = (self.ahead.as_ref()?, self.context.capture.lane());
        let deadline = Instant::now() + limits::PROOF_ARRIVAL;
        let mut found = ahead.carried(&kernel, port)?;
        // The other side's handshake ends a moment after this one's.
        while !found.established && Instant::now() < deadline {
            sleep(limits::WATCH_INTERVAL).await;
            found = ahead.carried(&kernel, port)?;
        }
        let done = if found.established { Kernel::Carries } else { Kernel::LetOut };
        Some(self.lane(done, found.client, found.app, &found.pod).await)
    }

    /// What the kernel did with a connection that came neither to the agent nor, with this error, to the app.
    async fn stopped(&self, port: u16, error: &str) -> Option<Lane> {
        let (ahead, kernel) = (self.ahead.clone()?, self.context.capture.lane());
        // An app can't answer that.
        let by_kernel = error.ends_with(&format!("(os error {})", libc::EPERM));
        let (done, (pod, app)) = asked(move || match ahead.refused(&kernel)? {
            Some(refused) => Ok(Some((Kernel::Refused, refused))),
            None if by_kernel => Ok(None),
            None => Ok(ahead.allowed(&kernel)?.map(|allowed| (Kernel::WouldCarry, allowed))),
        })
        .await?;
        let own = self.from.addresses.iter().find(|own| own.is_ipv4() == app.is_ipv4())?;
        Some(self.lane(done, SocketAddr::new(*own, port), app, &pod).await)
    }

    async fn lane(&self, kernel: Kernel, client: SocketAddr, app: SocketAddr, pod: &Arc<Workload>) -> Lane {
        let trust_domain = self.context.certificates.trust_domain();
        let identity = |of: &Workload| SpiffeId::new(trust_domain, &of.namespace, &of.service_account).ok();
        let request = policy::Request {
            principal: identity(self.from),
            source_ip: client.ip(),
            destination: Arc::clone(pod),
            destination_ip: app.ip(),
            destination_port: app.port(),
        };
        let programs = match self.context.capture.programs(&pod.uid).await {
            Ok(programs) => programs.into_iter().map(Program::from).collect(),
            Err(error) => {
                tracing::debug!(%error, "A pod that a proof reached is attached no more");
                Vec::new()
            }
        };
        let text = |id: Option<SpiffeId>| id.map(|id| id.to_string()).unwrap_or_default();
        Lane {
            kernel,
            client,
            app,
            client_identity: text(request.principal.clone()),
            server_identity: text(identity(pod)),
            pod: format!("{}/{}", pod.namespace, pod.name),
            programs,
            decision: policy::decide(&self.context.rules.load(), &request).map(|permit| permit.policy().cloned()),
        }
    }
}

/// Has the app's stand-in connect, and waits until it is known what became of the connection.
async fn watch(
    caller: &mut Caller,
    expected: &mut Expected,
    say: &str,
    node: &Node<'_>,
    facts: &mut Facts,
) -> Result<(), CaptureError> {
    let connected = caller.connect().await?;
    let (made, error) = (connected.is_ok(), connected.as_ref().err().cloned().unwrap_or_default());
    facts.connected = Some(connected);
    if made && !expected.arrived() {
        facts.lane = node.carries(caller.port()).await;
    }
    if facts.lane.is_none() {
        facts.seen = match timeout(limits::PROOF_ARRIVAL, expected.seen()).await {
            Ok(seen) => seen,
            // It is with the agent, which tries to reach the peer as long as that takes.
            Err(_) if expected.arrived() => expected.seen().await,
            // It went past the agent.
            Err(_) => None,
        };
    }
    if !made && facts.seen.is_none() && !expected.arrived() {
        facts.lane = node.stopped(caller.port(), &error).await;
    }
    if !say.is_empty() && made {
        let heard = caller.heard().await?;
        if heard > 0 {
            facts.note_heard(say.len(), heard);
        }
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
