//! The client's side: a captured outbound connection goes to the pod that it means, or nowhere.
//!
//! After capture and classification, before the wire. A destination in the mesh is reached in mutual TLS as the very
//! workload that the snapshot names; a failure resets the client, and nothing falls back to plain.

mod balance;
mod counts;
mod dialer;
mod error;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod pool;
mod request;
mod route;

pub use self::counts::{PoolCounts, PoolEnd};
pub(super) use self::{
    dialer::Dialer,
    pool::{Key, Pool},
};

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use self::{
    error::OfferError,
    pool::Opened,
    request::Connect,
    route::{Candidate, Route, Transport},
};
use super::{
    Direction, End, Flow, Security, Trace,
    connections::Carried,
    edge::Edge,
    pod::Pod,
    proof::{Claim, Failure, Recorder},
    relay::{self, Broken, Counters},
};
use crate::{
    cluster::{Snapshot, Workload},
    life::{budget::Held, limits},
};

/// What a candidate was reached by.
enum Upstream {
    Tunnel(Opened),
    Plain(TcpStream, Held),
}

/// Carries one connection of the pod's app from `client` to `destination`, to its end.
pub(super) async fn carry<E: Edge>(pod: &Pod<E>, tcp: TcpStream, client: SocketAddr, destination: SocketAddr) {
    let mut snapshot = pod.shared.cluster.load();
    let source = pod.record(&snapshot);
    let mut flow = Flow {
        source_principal: pod.identity(&source).ok(),
        source_workload: Some(Arc::clone(&source)),
        ..Flow::new(Direction::Outbound, client, destination)
    };
    let proof = pod.shared.registry.proofs().claim(pod.uid(), client);
    let route = match held_route(pod, &mut snapshot, &source, destination).await {
        Ok(route) => route,
        Err(error) => {
            pod.failed(&flow, &failed(&error));
            relay::reset(tcp);
            return disproved(proof, flow, &error);
        }
    };
    flow.destination_service = route.service.clone();
    let recorder = proof.as_ref().map(Claim::recorder);
    match reach(pod, &source, client, &route, recorder.as_ref(), &mut flow).await {
        Ok(upstream) => relay_to(pod, tcp, upstream, flow, proof).await,
        Err(error) => {
            pod.failed(&flow, &failed(&error));
            relay::reset(tcp);
            disproved(proof, flow, &error);
        }
    }
}

/// Tells who asked for it why a connection came to nothing.
fn disproved(proof: Option<Claim>, flow: Flow, error: &OfferError) {
    if let Some(proof) = proof {
        let failure = Failure { reason: error.reason(), flags: error.response_flags(), detail: error.to_string() };
        proof.tell(flow, None, Some(failure));
    }
}

/// The route; held while the snapshot may still be about to learn of the destination.
async fn held_route<E: Edge>(
    pod: &Pod<E>,
    snapshot: &mut Arc<Snapshot>,
    source: &Workload,
    destination: SocketAddr,
) -> Result<Route, OfferError> {
    let deadline = Instant::now() + limits::HOLD;
    let mut view = pod.shared.cluster.clone();
    loop {
        match route::route(snapshot, source, destination) {
            Err(OfferError::DestinationUnknown) => match timeout_at(deadline, view.next()).await {
                Ok(Some(next)) => *snapshot = next,
                Ok(None) | Err(_) => return Err(OfferError::DestinationUnknown),
            },
            known => return known,
        }
    }
}

/// Tries candidates until one is reached; `flow` then tells of that one, or of the last that failed.
async fn reach<E: Edge>(
    pod: &Pod<E>,
    source: &Workload,
    client: SocketAddr,
    route: &Route,
    proof: Option<&Recorder>,
    flow: &mut Flow,
) -> Result<Upstream, OfferError> {
    let mut last = OfferError::DestinationUnknown;
    for at in balance::pick(route.candidates.len(), |below| fastrand::usize(..below)) {
        let Some(candidate) = route.candidates.get(at) else { continue };
        describe(pod, candidate, flow);
        let reached = match candidate.transport {
            Transport::Tunnel => tunnel(pod, source, client, candidate, proof, flow).await.map(Upstream::Tunnel),
            Transport::Plain => {
                plain(pod, source, client, candidate.address).await.map(|(far, held)| Upstream::Plain(far, held))
            }
        };
        match reached {
            Err(error) if error.elsewhere() => {
                tracing::debug!(pod = %pod.uid(), endpoint = %candidate.address, %error, "Endpoint not reached");
                last = error;
            }
            reached => return reached,
        }
    }
    Err(last)
}

fn describe<E: Edge>(pod: &Pod<E>, candidate: &Candidate, flow: &mut Flow) {
    let tunnel = candidate.transport == Transport::Tunnel;
    flow.security = if tunnel { Security::MutualTls } else { Security::None };
    flow.hbone_target = tunnel.then_some(candidate.address);
    flow.trace = tunnel.then(|| Trace::begin(pod.shared.observer.sample()));
    flow.destination_workload.clone_from(&candidate.workload);
    let expected = candidate.workload.as_ref().filter(|_| tunnel);
    flow.destination_principal = expected.and_then(|workload| pod.identity(workload).ok());
}

async fn tunnel<E: Edge>(
    pod: &Pod<E>,
    source: &Workload,
    client: SocketAddr,
    candidate: &Candidate,
    proof: Option<&Recorder>,
    flow: &mut Flow,
) -> Result<Opened, OfferError> {
    let no_identity =
        || OfferError::Identity { reason: "bad_spiffe_id", detail: "a name that makes no SPIFFE id".into() };
    let key = Key {
        pod: Arc::clone(pod.uid()),
        own: flow.source_principal.clone().ok_or_else(no_identity)?,
        peer: flow.destination_principal.clone().ok_or_else(no_identity)?,
        uid: candidate.workload.as_ref().map(|workload| Arc::clone(&workload.uid)).unwrap_or_default(),
        source: route::source_address(client.ip(), &source.addresses, candidate.address.ip())?,
        address: SocketAddr::new(candidate.address.ip(), super::classify::HBONE_PORT),
    };
    let connect = Connect::new(
        candidate.address,
        client,
        flow.destination_service.as_deref(),
        request::baggage(&pod.shared.cluster_id, source),
        flow.trace.as_ref(),
    )
    .map_err(|_| OfferError::BadRequest)?
    .proving(proof.cloned());
    let opened = pod.pool.open(&key, &connect).await?;
    flow.session = opened.slot.session().cloned();
    Ok(opened)
}

async fn plain<E: Edge>(
    pod: &Pod<E>,
    source: &Workload,
    client: SocketAddr,
    target: SocketAddr,
) -> Result<(TcpStream, Held), OfferError> {
    let held = pod.account.descriptors(1)?;
    let from = route::source_address(client.ip(), &source.addresses, target.ip())?;
    match timeout(limits::CONNECT_PEER, pod.edge.dial(pod.uid(), from, target)).await {
        Ok(Ok(tcp)) => Ok((tcp, held)),
        Ok(Err(error)) => Err(OfferError::Dial { reason: error.reason(), detail: error.to_string().into() }),
        Err(_) => Err(OfferError::DialTimeout),
    }
}

async fn relay_to<E: Edge>(pod: &Pod<E>, tcp: TcpStream, upstream: Upstream, flow: Flow, proof: Option<Claim>) {
    let mut carried = Carried::register(&pod.shared.registry, &pod.shared.observer, flow, None);
    carried.open();
    if let Some(proof) = proof {
        proof.tell(carried.flow.clone(), Some(carried.share()), None);
    }
    let counters = Counters { from_near: &carried.sent, to_near: &carried.received };
    let result = match upstream {
        Upstream::Tunnel(opened) => {
            let stalls = Some(opened.slot.stalls());
            relay::tunnel(tcp, opened.send, opened.receive, counters, pod.account.buffers(), &carried.cancel, stalls)
                .await
        }
        Upstream::Plain(far, _held) => relay::direct(tcp, far, counters, &carried.cancel).await,
    };
    let end = match result {
        Ok(()) => End::Complete,
        Err(Broken::Cancelled) => carried.cancelled(),
        Err(broken) => broke(&broken),
    };
    carried.end(&end);
}

fn broke(broken: &Broken) -> End {
    let (reason, response_flags) = match broken {
        Broken::Near(_) => ("client_reset", "-"),
        Broken::Far(_) | Broken::Reset(_) => ("peer_reset", "-"),
        Broken::Lost(_) => ("tunnel_lost", "CONNECT"),
        Broken::Budget(refusal) => (refusal.reason(), "-"),
        Broken::Cancelled => ("cancelled", "-"),
    };
    End::Failed { reason, response_flags, detail: broken.to_string() }
}

fn failed(error: &OfferError) -> End {
    End::Failed { reason: error.reason(), response_flags: error.response_flags(), detail: error.to_string() }
}
