//! What the destination's side saw of a connection that is asked to prove itself, for the answer to its CONNECT.
//!
//! About the asking connection alone, and only for a peer that has proven who it is.

use super::AnswerError;
use crate::{
    policy,
    tunnel::{Flow, Witness, connections::Carried, edge::Edge, pod::Pod},
};

/// Of a connection to the pod `uid`, before it is decided.
pub(super) async fn of<E: Edge>(pod: &Pod<E>, uid: &str, flow: &Flow) -> Witness {
    let identity = |id: &Option<crate::identity::SpiffeId>| id.as_ref().map(ToString::to_string).unwrap_or_default();
    let destination = flow.destination_workload.as_ref();
    let session = flow.session.as_deref();
    // A peer may ask as often as it connects; the kernel is asked for one of them at a time.
    let programs = match pod.shared.registry.proofs().turn() {
        Some(_turn) => pod.edge.programs(uid).await,
        None => Vec::new(),
    };
    Witness {
        node: pod.shared.node.to_string(),
        pod: destination.map(|pod| format!("{}/{}", pod.namespace, pod.name)).unwrap_or_default(),
        client: flow.source.to_string(),
        client_identity: identity(&flow.source_principal),
        client_serial: session.map(|session| session.peer_serial.to_string()).unwrap_or_default(),
        server_identity: identity(&flow.destination_principal),
        server_serial: session.map(|session| session.own_serial.to_string()).unwrap_or_default(),
        tls: session.map(|session| session.version.to_owned()).unwrap_or_default(),
        cipher: session.map(|session| session.cipher.to_owned()).unwrap_or_default(),
        programs,
        ..Witness::default()
    }
}

/// The app has accepted it. The permit is spent by now, so policy is asked once more for the name of what allowed it.
pub(super) fn delivered<E: Edge>(pod: &Pod<E>, carried: &Carried, witness: Witness) -> Witness {
    let decided = carried.request.as_ref().map(|request| policy::decide(&pod.shared.rules.load(), request));
    let policy = match &decided {
        Some(Ok(permit)) => permit.policy().map(ToString::to_string).unwrap_or_default(),
        _ => String::new(),
    };
    Witness { decision: "allowed".into(), policy, delivered: true, ..witness }
}

/// It was refused, by policy or for another reason.
pub(super) fn refused(witness: Witness, error: &AnswerError) -> Witness {
    let (decision, policy) = match error {
        AnswerError::Denied(denial) => ("denied", denial.policy().map(ToString::to_string).unwrap_or_default()),
        // Only what has a permit is delivered.
        AnswerError::App { .. } | AnswerError::AppTimeout => ("allowed", String::new()),
        _ => ("", String::new()),
    };
    let (reason, detail) = (error.reason().into(), error.to_string());
    Witness { decision: decision.into(), policy, reason, detail, ..witness }
}
