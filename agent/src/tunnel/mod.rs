//! HBONE both ways: `offer` carries a captured outbound connection to its destination, `answer` takes one in and, with a
//! permit from policy, delivers it to the app.
//!
//! ```text
//! listen → classify → offer  (route → balance → pool → CONNECT) ┐
//!                   │         (        → to a pod of this node) ┤
//!                   └ answer (TLS → target → policy → deliver)  ┴→ relay
//! ```
//!
//! Between policy and the app or the wire. It never forwards without a [`crate::policy::Permit`] at the destination, and never
//! waits on a peer without a deadline.

mod answer;
mod buffered;
mod classify;
mod connections;
mod context;
mod edge;
mod frames;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hello;
mod http2;
mod lane;
mod listen;
mod meter;
mod neighbours;
mod offer;
mod pod;
mod proof;
mod relay;
mod session;
mod sessions;
mod trace;

#[cfg(test)]
mod tests;

pub(crate) use classify::REFUSED_TARGETS;
pub use connections::{Connection, Direction, End, Flow, Observer, Quiet, Registry, Security, reconsider};
pub use context::Context;
pub use lane::Lane;
pub use meter::Wire;
pub use offer::{PoolCounts, PoolEnd};
pub use proof::{Answer, Expected, Failure, Program, Proofs, Seen, Witness};
pub use session::Session;
pub use sessions::{IsRevoked, Sessions, disown};
pub use trace::Trace;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::{capture::Attached, cluster::Workload};

/// Serves one enrolled pod's listener until `stop` (no new connections from then on; carried ones go on until they end
/// or `Registry` cancels them; peers are asked to open new streams elsewhere).
pub async fn serve(context: Context, pod: Arc<Workload>, attached: Attached, stop: CancellationToken) {
    let _served = Served::tell(&context.observer);
    let edge = edge::Node { capture: context.capture.clone(), certificates: context.certificates.clone() };
    let shared = pod::Shared {
        cluster: context.cluster,
        rules: context.rules,
        registry: context.registry,
        observer: context.observer,
        cluster_id: context.cluster_id,
        budget: context.budget,
        lane: context.lane,
        node: context.node,
    };
    listen::serve(Arc::new(pod::Pod::new(edge, shared, pod, attached.token, stop)), attached.listener).await;
}

/// Tells of a pod that is served, and of its end, however its task ends.
#[derive(Debug)]
struct Served(Arc<dyn Observer>);

impl Served {
    fn tell(observer: &Arc<dyn Observer>) -> Self {
        observer.pod_served();
        Self(Arc::clone(observer))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.0.pod_left();
    }
}
