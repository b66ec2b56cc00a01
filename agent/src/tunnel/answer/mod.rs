//! The server's side: what comes to the pod is decided by policy, and only with its permit delivered to the app.
//!
//! After capture, classification and, for the tunnel, mutual TLS. A denied connection never reaches the app's socket.

mod error;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod hbone;
mod local;
mod plaintext;
mod target;
mod witness;

pub(super) use self::{
    hbone::hbone,
    local::{Delivered, Refused, local},
    plaintext::plaintext,
};

use std::{net::SocketAddr, sync::Arc};

use tokio::{net::TcpStream, time::timeout};

use self::error::AnswerError;
use super::{End, connections::Carried, edge::Edge, pod::Pod, relay::Broken};
use crate::{
    cluster::{Service, Snapshot, Workload},
    life::limits,
    policy::{self, Permit},
};

/// Asks policy about a connection that is registered already: a change of the rules from here on meets it there.
fn permit<E: Edge>(pod: &Pod<E>, carried: &Carried) -> Result<Permit, AnswerError> {
    let Some(request) = &carried.request else {
        // Inbound connections are registered with their request; without one there is nothing to allow.
        return Err(AnswerError::Denied(policy::Denial::NotAllowed));
    };
    let rules = pod.shared.rules.load();
    for rehearsal in policy::rehearse(&rules, request) {
        pod.shared.observer.rehearsed(carried, &rehearsal);
    }
    Ok(policy::decide(&rules, request)?)
}

/// A connection to the app of the pod `uid` as `client`'s. It takes the permit: nothing reaches the app without one.
async fn deliver<E: Edge>(
    pod: &Pod<E>,
    uid: &str,
    _permit: Permit,
    client: SocketAddr,
    app: SocketAddr,
) -> Result<TcpStream, AnswerError> {
    match timeout(limits::CONNECT_APP, pod.edge.deliver(uid, client.ip(), app)).await {
        Ok(Ok(tcp)) => Ok(tcp),
        Ok(Err(error)) => Err(AnswerError::App { reason: error.reason(), detail: error.to_string().into() }),
        Err(_) => Err(AnswerError::AppTimeout),
    }
}

/// A connection to the pod's own app, if policy allows it.
async fn admit<E: Edge>(
    pod: &Pod<E>,
    carried: &Carried,
    client: SocketAddr,
    app: SocketAddr,
) -> Result<TcpStream, AnswerError> {
    let permit = permit(pod, carried)?;
    deliver(pod, pod.uid(), permit, client, app).await
}

fn failed(error: &AnswerError) -> End {
    match error {
        AnswerError::Denied(denial) => End::Denied(denial.clone()),
        _ => End::Failed { reason: error.reason(), response_flags: error.response_flags(), detail: error.to_string() },
    }
}

/// How a relay ended; the app's socket is its first end.
pub(super) fn ended(carried: &Carried, result: &Result<(), Broken>, near_is_app: bool) -> End {
    let (reason, response_flags) = match result {
        Ok(()) => return End::Complete,
        Err(Broken::Cancelled) => return carried.cancelled(),
        Err(Broken::Near(_)) if near_is_app => ("app_reset", "-"),
        Err(Broken::Far(_)) if !near_is_app => ("app_reset", "-"),
        Err(Broken::Near(_) | Broken::Far(_) | Broken::Reset(_)) => ("client_reset", "-"),
        Err(Broken::Budget(refusal)) => (refusal.reason(), "-"),
        Err(Broken::Lost(_)) => ("tunnel_lost", "CONNECT"),
    };
    let detail = result.as_ref().err().map(|broken| broken.to_string()).unwrap_or_default();
    End::Failed { reason, response_flags, detail }
}

/// The Service that the client says it meant (`forwarded: …;host=`), if this pod is one of its endpoints: telemetry tells of no
/// Service that a peer made up.
fn meant_service(snapshot: &Snapshot, forwarded: Option<&str>, pod: &Workload) -> Option<Arc<Service>> {
    let host = forwarded?.split(';').find_map(|part| part.trim().strip_prefix("host="))?.trim_matches('"');
    let mut labels = host.splitn(3, '.');
    let (name, namespace) = (labels.next()?, labels.next()?);
    let service = snapshot.services.get(format!("{namespace}/{name}").as_str())?;
    let endpoint = service.endpoints.iter().any(|endpoint| pod.addresses.contains(&endpoint.address));
    (endpoint && *service.hostname == *host).then(|| Arc::clone(service))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        cluster::Endpoint,
        tunnel::tests::{snapshot, workload},
    };

    #[test]
    fn a_service_is_named_only_where_the_pod_is_its_endpoint() {
        let (mine, other) = (workload("mine", &["10.0.0.1"], true), workload("other", &["10.0.0.2"], true));
        let service = Service {
            endpoints: vec![Endpoint {
                address: "10.0.0.1".parse().unwrap(),
                ports: BTreeMap::new(),
                ready: true,
                terminating: false,
                node: "".into(),
                zone: "".into(),
            }],
            ..Service::named("shop", "web")
        };
        let snapshot = snapshot(&[mine.clone(), other.clone()], &[service]);
        let found = |text, pod| meant_service(&snapshot, Some(text), pod).is_some();
        let good = "for=\"10.0.0.9:5\";host=web.shop.svc.cluster.local";
        assert!(found(good, &mine));
        assert!(!found(good, &other));
        assert!(!found("for=\"10.0.0.9:5\";host=web.shop.evil.example", &mine));
        assert!(!found("for=\"10.0.0.9:5\"", &mine));
        assert!(!found("", &mine));
    }
}
