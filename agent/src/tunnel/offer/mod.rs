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

use heddle_common::choice;
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
    answer::{self, Delivered, Refused},
    connections::Carried,
    edge::Edge,
    pod::Pod,
    proof::{Claim, Failure, Recorder},
    relay::{self, Broken, Counters},
};
use crate::{
    cluster::{Snapshot, Workload},
    life::{
        budget::{Account, Held},
        limits,
    },
};

/// What a candidate was reached by.
enum Upstream {
    Tunnel(Opened),
    Local(Delivered),
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
    // Asked only of a connection to a Service that the kernel may have chosen of.
    let chosen = if route.on_lane.is_empty() { choice::NONE } else { pod.edge.chosen(&tcp) };
    match reach(pod, &source, client, &route, chosen, recorder.as_ref(), &mut flow).await {
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
        match route::route(snapshot, &pod.shared.node, source, destination) {
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
    source: &Arc<Workload>,
    client: SocketAddr,
    route: &Route,
    chosen: u16,
    proof: Option<&Recorder>,
    flow: &mut Flow,
) -> Result<Upstream, OfferError> {
    let mut last = OfferError::DestinationUnknown;
    for at in balance::pick(route.candidates.len(), &route.on_lane, chosen, |below| fastrand::usize(..below)) {
        let Some(candidate) = route.candidates.get(at) else { continue };
        // A pod that is not served here yet answers for itself, or not at all.
        let neighbour = match (candidate.transport, &candidate.workload) {
            (Transport::Local, Some(workload)) => {
                pod.shared.registry.neighbours().account(&workload.uid).map(|account| (workload, account))
            }
            _ => None,
        };
        let security = match (candidate.transport, &neighbour) {
            (Transport::Plain, _) => Security::None,
            (_, Some(_)) => Security::KernelAttested,
            (_, None) => Security::MutualTls,
        };
        describe(pod, candidate, security, flow);
        let reached = match (security, neighbour) {
            (Security::KernelAttested, Some((workload, account))) => {
                local(pod, source, client, (candidate.address, workload, &account), proof, flow).await
            }
            (Security::None, _) => {
                plain(pod, source, client, candidate.address).await.map(|(far, held)| Upstream::Plain(far, held))
            }
            _ => tunnel(pod, source, client, candidate, proof, flow).await.map(Upstream::Tunnel),
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

fn describe<E: Edge>(pod: &Pod<E>, candidate: &Candidate, security: Security, flow: &mut Flow) {
    flow.security = security;
    flow.hbone_target = (security == Security::MutualTls).then_some(candidate.address);
    flow.trace = security.authenticates().then(|| Trace::begin(pod.shared.observer.sample()));
    flow.destination_workload.clone_from(&candidate.workload);
    let expected = candidate.workload.as_ref().filter(|_| security.authenticates());
    flow.destination_principal = expected.and_then(|workload| pod.identity(workload).ok());
}

/// To another pod of this node: decided here, as its side would, and handed to its app.
async fn local<E: Edge>(
    pod: &Pod<E>,
    source: &Workload,
    client: SocketAddr,
    (app, destination, account): (SocketAddr, &Arc<Workload>, &Account),
    proof: Option<&Recorder>,
    flow: &Flow,
) -> Result<Upstream, OfferError> {
    if flow.source_principal.is_none() || flow.destination_principal.is_none() {
        return Err(no_identity());
    }
    let from = route::source_address(client.ip(), &source.addresses, app.ip())?;
    let arriving = Flow {
        direction: Direction::Inbound,
        source: SocketAddr::new(from, client.port()),
        destination: app,
        trace: flow.trace.as_ref().map(Trace::child),
        ..flow.clone()
    };
    match answer::local(pod, destination, account, app, arriving, proof).await {
        Ok(delivered) => Ok(Upstream::Local(delivered)),
        Err(Refused::ByPolicy) => Err(OfferError::Denied),
        Err(Refused::Unavailable) => Err(OfferError::Unavailable),
    }
}

fn no_identity() -> OfferError {
    OfferError::Identity { reason: "bad_spiffe_id", detail: "a name that makes no SPIFFE id".into() }
}

async fn tunnel<E: Edge>(
    pod: &Pod<E>,
    source: &Workload,
    client: SocketAddr,
    candidate: &Candidate,
    proof: Option<&Recorder>,
    flow: &mut Flow,
) -> Result<Opened, OfferError> {
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
    // The workload that was meant may go by another name of our trust domain.
    let presented = flow.session.as_ref().and_then(|session| session.peer.as_ref());
    if let Some(presented) = presented.filter(|presented| presented.same_account(&key.peer)) {
        flow.destination_principal = Some(presented.clone());
    }
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
        Upstream::Local(delivered) => return relay_local(tcp, carried, delivered).await,
        Upstream::Plain(far, _held) => relay::direct(tcp, far, &[counters], carried.cancel.cancelled()).await,
    };
    let end = match result {
        Ok(()) => End::Complete,
        Err(Broken::Cancelled) => carried.cancelled(),
        Err(broken) => broke(&broken),
    };
    carried.end(&end);
}

/// App to app; each side has its own record, and what closes one closes both.
async fn relay_local(tcp: TcpStream, near: Carried, delivered: Delivered) {
    let Delivered { tcp: app, carried: mut far, held: _held } = delivered;
    far.open();
    let counters = [&near, &far].map(|side| Counters { from_near: &side.sent, to_near: &side.received });
    let cancelled = async {
        tokio::select! {
            () = near.cancel.cancelled() => {}
            () = far.cancel.cancelled() => {}
        }
    };
    let result = relay::direct(tcp, app, &counters, cancelled).await;
    let (ours, theirs) = match &result {
        Ok(()) => (End::Complete, End::Complete),
        Err(Broken::Cancelled) => (near.cut(&far, "peer_reset"), far.cut(&near, "client_reset")),
        Err(broken) => (broke(broken), answer::ended(&far, &result, false)),
    };
    near.end(&ours);
    far.end(&theirs);
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
