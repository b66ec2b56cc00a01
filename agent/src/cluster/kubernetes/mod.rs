//! The API server as the source of truth: watches of seven kinds, trimmed on arrival, indexed like manifests.
//!
//! ```text
//! API server ── follow ──► trim ──► shared (store, batches) ── index ──► Snapshot ── View ──► every other stage
//!                                                                 └── saved: the last good one, on disk
//! ```
//!
//! What is absent is not empty: nothing is published before every kind was listed once, or read from the last good snapshot;
//! after that, what can't be followed stays as it was known last.

mod client;
mod follow;
mod reach;
mod saved;
mod shared;
mod source;
#[cfg(test)]
#[path = "../../../../tests/src/apiserver/mod.rs"]
#[allow(dead_code, reason = "the lab has more use for it than the agent's own tests")]
pub(crate) mod stand_in;
mod store;
mod trim;

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    sync::Arc,
    thread,
};

use serde_json::Value;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::client::{ClientError, api_client};
use self::{shared::Shared, source::Thread, store::Resource};
use super::{Objects, PolicyKind, Problem, Settings, Snapshot, SourceError, View, index, read};

/// Which API server, and for whom.
#[derive(Debug, Clone)]
pub struct ApiServer {
    /// The way to it; without it that of a pod in the cluster.
    pub kubeconfig: Option<PathBuf>,
    /// Where the last good snapshot is kept.
    pub state_dir: PathBuf,
    /// This node's name: of its own pods more is kept.
    pub node: Arc<str>,
    /// The last good snapshot of another cluster is of no use.
    pub cluster_id: Arc<str>,
}

/// The snapshot of a cluster that has nothing but these policies, as the API server tells of them.
pub(crate) fn policies(policies: impl IntoIterator<Item = (PolicyKind, Value)>, settings: &Settings) -> Snapshot {
    let mut objects = Objects::default();
    for (kind, policy) in policies {
        let Value::Object(mut object) = policy else { continue };
        trim::policy(&mut object);
        match read::policy(kind, object) {
            read::Policy::Authorization(policy) => objects.authorization_policies.push(policy),
            read::Policy::Peer(policy) => objects.peer_authentications.push(policy),
            read::Policy::Invalid(policy) => objects.invalid_policies.push(policy),
        }
    }
    index(&[Arc::new(objects)], settings, 1)
}

/// Ends the thread when it is dropped.
#[derive(Debug)]
pub(super) struct Following {
    _stop: DropGuard,
}

/// Follows the API server. Gives the first snapshot when everything is known; until then it holds what `block` gives for each
/// kind that is not.
///
/// # Errors
/// When there is no way to the API server. One that is away is no error: it is waited for.
pub(super) async fn follow<B>(
    config: ApiServer,
    settings: Settings,
    block: impl Fn(&'static str) -> B,
) -> Result<(View, watch::Receiver<Arc<[Problem]>>, Following), SourceError> {
    let mut waits: HashMap<_, _> =
        Resource::ALL.into_iter().map(|resource| (resource, block(resource.wait()))).collect();
    let (first, mut first_snapshot) = oneshot::channel();
    let (problems_sender, problems) = watch::channel(Arc::default());
    let (progress, mut known) = watch::channel(BTreeSet::new());
    let stop = CancellationToken::new();
    let thread = Thread {
        config,
        settings,
        shared: Arc::new(Shared::default()),
        problems: problems_sender,
        first,
        progress,
        stop: stop.clone(),
    };
    let following = Following { _stop: stop.drop_guard() };
    thread::Builder::new().name("apiserver".into()).spawn(move || thread.run()).map_err(SourceError::Thread)?;
    let snapshots = loop {
        tokio::select! {
            first = &mut first_snapshot => break first.map_err(|_| SourceError::Ended)??,
            Ok(()) = known.changed() => {
                let known = known.borrow_and_update();
                waits.retain(|resource, _| !known.contains(resource));
            }
        }
    };
    Ok((View::new(snapshots), problems, following))
}

#[cfg(test)]
mod tests;
