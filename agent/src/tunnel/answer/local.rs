//! A connection from another pod of this node, in one crossing: the source's own netns says who connects, policy decides as it
//! would for a tunnel, and the app is connected to at once.
//!
//! After the offering side has chosen the pod. It has the same guarantees as a tunnel's end but for the encryption, which there is
//! no wire for: registered before it is decided, delivered with a permit only, closed by a change of policy.

use std::{net::SocketAddr, sync::Arc};

use tokio::net::TcpStream;

use super::{AnswerError, deliver, failed, permit, witness};
use crate::{
    cluster::Workload,
    life::budget::{Account, Held},
    policy::Request,
    tunnel::{
        Answer, End, Flow,
        connections::Carried,
        edge::Edge,
        pod::Pod,
        proof::{self, Recorder},
    },
};

/// What has come to the app.
#[derive(Debug)]
pub(crate) struct Delivered {
    pub tcp: TcpStream,
    /// The destination's side of it.
    pub carried: Carried,
    pub held: Held,
}

/// Why it has not; what is behind it was told as the destination's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    ByPolicy,
    /// For want of budget, or by the app.
    Unavailable,
}

/// Delivers a connection of `pod` to `destination`, which `account` is charged for. `flow` is the destination's side of it, with
/// the source's identity.
pub(crate) async fn local<E: Edge>(
    pod: &Pod<E>,
    destination: &Arc<Workload>,
    account: &Account,
    app: SocketAddr,
    flow: Flow,
    proof: Option<&Recorder>,
) -> Result<Delivered, Refused> {
    let held = match account.admit(1) {
        Ok(held) => held,
        Err(refusal) => {
            pod.failed(&flow, &failed(&refusal.into()));
            return Err(Refused::Unavailable);
        }
    };
    // Boxed: nearly no connection is asked.
    let seen = match proof {
        Some(recorder) => Some((recorder, Box::new(witness::of(pod, &destination.uid, &flow).await))),
        None => None,
    };
    let client = flow.source;
    let request = Request {
        principal: flow.source_principal.clone(),
        source_ip: client.ip(),
        destination: Arc::clone(destination),
        destination_ip: app.ip(),
        destination_port: app.port(),
    };
    let carried = Carried::register(&pod.shared.registry, &pod.shared.observer, flow, Some(request));
    let delivered = tokio::select! {
        biased;
        () = carried.cancel.cancelled() => match carried.cancelled() {
            End::Denied(denial) => Err(denial.into()),
            end => {
                carried.end(&end);
                return Err(Refused::Unavailable);
            }
        },
        delivered = admit(pod, &carried, destination, client, app) => delivered,
    };
    if let Some((recorder, seen)) = seen {
        let witness = Some(match &delivered {
            Ok(_) => witness::delivered(pod, &carried, *seen),
            Err(error) => witness::refused(*seen, error),
        });
        proof::note(recorder, Answer { witness, ..Answer::default() });
    }
    match delivered {
        Ok(tcp) => Ok(Delivered { tcp, carried, held }),
        Err(error) => {
            carried.end(&failed(&error));
            Err(match error {
                AnswerError::Denied(_) => Refused::ByPolicy,
                _ => Refused::Unavailable,
            })
        }
    }
}

async fn admit<E: Edge>(
    pod: &Pod<E>,
    carried: &Carried,
    destination: &Workload,
    client: SocketAddr,
    app: SocketAddr,
) -> Result<TcpStream, AnswerError> {
    let permit = permit(pod, carried);
    // Allowed or not: the kernel can say either to the next one.
    pod.shared.lane.missed(pod.uid(), &destination.uid, app.port());
    deliver(pod, &destination.uid, permit?, client, app).await
}
