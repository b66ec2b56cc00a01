//! What revocation does to the agent: it is not ready while lists can't be used, and what a revoked peer has open ends.
//!
//! `identity` reads and judges the lists; `tunnel` knows the sessions.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::readiness::{Blocker, Readiness};
use crate::{
    identity::{Certificates, CrlStatus},
    tunnel::{self, Registry},
};

/// Asks for the chains of peers from now on: to be called before the first connection is taken.
pub(super) fn watch(certificates: &Certificates, registry: &Registry) {
    if certificates.revocations().is_some() {
        let certificates = certificates.clone();
        registry.sessions().watch(Box::new(move |chain, then| certificates.revoked(chain, then)));
    }
}

/// Follows revocation until `stop`. `first` is held until it is known how it stands.
pub(super) async fn follow(
    certificates: Certificates,
    registry: Registry,
    readiness: Readiness,
    first: Blocker,
    stop: CancellationToken,
) {
    let Some(mut changes) = certificates.revocations() else { return };
    let following = async {
        let mut first = Some(first);
        let mut _blocker = None;
        let mut known = 0;
        loop {
            let CrlStatus { generation, problem, .. } = changes.borrow_and_update().clone();
            // The new one before the old one goes: never ready for a moment in between.
            _blocker = problem.map(|problem| readiness.block(problem.to_string()));
            drop(first.take());
            if generation != known {
                known = generation;
                end_revoked(&registry).await;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    let _stopped = stop.run_until_cancelled(following).await;
}

async fn end_revoked(registry: &Registry) {
    let began = Instant::now();
    let registry = registry.clone();
    match tokio::task::spawn_blocking(move || tunnel::disown(&registry)).await {
        Ok((0, _)) => {}
        Ok((sessions, connections)) => {
            tracing::warn!(sessions, connections, took = ?began.elapsed(), "What revoked peers had open was ended.");
        }
        Err(error) => tracing::error!(%error, "What revoked peers have open could not be ended."),
    }
}
