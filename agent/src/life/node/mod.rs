//! What the agent tells the API server of its node: the startup taint, and events on pods that stay uncaptured.
//!
//! Beside the journey, and only where the API server is the source. Nothing waits for it, and where the API server can't be asked
//! it is tried again, later each time.

mod events;
mod taint;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, sync::Arc, time::Duration};

use kube::Client;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::{keeper::Pods, limits, readiness::Readiness};
use crate::cluster::api_client;
pub use events::fix;
pub use taint::TAINT;

/// Why the API server was not told.
#[derive(Debug, thiserror::Error)]
enum NodeError {
    #[error("{0}")]
    Kube(#[from] kube::Error),
    #[error("it took longer than {:?}", limits::NODE_CALL)]
    Timeout,
}

impl NodeError {
    /// Stable name: log key.
    fn reason(&self) -> &'static str {
        match self {
            Self::Kube(kube::Error::Api(status)) if status.code == 403 => "forbidden",
            Self::Kube(_) => "api_server",
            Self::Timeout => "timeout",
        }
    }
}

/// What is to be told, and by whom.
#[derive(Clone, Debug)]
pub struct Node {
    name: Arc<str>,
    taint: Taint,
}

/// What the agent does with its node's startup taint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Taint {
    /// It is not looked at.
    #[default]
    Left,
    /// Taken off once capture works.
    TakenOff,
    /// The same, and put on again while the agent is not ready or does not run.
    Kept,
}

impl Node {
    #[must_use]
    pub fn new(name: Arc<str>, taint: Taint) -> Self {
        Self { name, taint }
    }

    /// As [`Node::follow`], by the way to the API server that the kubeconfig says.
    pub async fn tell(self, kubeconfig: Option<PathBuf>, readiness: Readiness, pods: Pods, stop: CancellationToken) {
        match api_client(kubeconfig.as_deref()).await {
            Ok(client) => self.follow(client, readiness, pods, stop).await,
            Err(error) => {
                let reason = error.reason();
                tracing::warn!(reason, %error, "Neither the node's taint nor events on pods can be written");
            }
        }
    }

    /// Tells until `stop`; a node that keeps its taint has it when this is done.
    pub async fn follow(self, client: Client, readiness: Readiness, pods: Pods, stop: CancellationToken) {
        tokio::join!(self.follow_taint(&client, &readiness, &stop), self.follow_pods(&client, &pods, &stop),);
    }

    async fn follow_taint(&self, client: &Client, readiness: &Readiness, stop: &CancellationToken) {
        if self.taint == Taint::Left {
            return;
        }
        let kept = self.taint == Taint::Kept;
        let mut due = interval(limits::NODE_LOOK);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut state = taint::State::default();
        let mut tries = Tries::default();
        while stop.run_until_cancelled(due.tick()).await.is_some() {
            let now = Instant::now();
            let ready = readiness.waiting_for().is_empty();
            let Some(wanted) = state.wanted(ready, kept, now).filter(|_| tries.due(now)) else { continue };
            match call(taint::set(client, &self.name, wanted)).await {
                Ok(changed) => {
                    tries = Tries::default();
                    state.is(wanted);
                    if changed {
                        let done = if wanted { "put on" } else { "taken off" };
                        tracing::info!(node = %self.name, taint = TAINT, done, "The node's taint was changed");
                    }
                }
                Err(error) => {
                    let (reason, fix) = (error.reason(), "the agent's role needs get and patch of nodes");
                    tracing::warn!(node = %self.name, taint = TAINT, reason, %error, fix, "The node's taint can't be changed yet");
                    tries.failed(Instant::now());
                }
            }
        }
        if kept && let Err(error) = call(taint::set(client, &self.name, true)).await {
            tracing::warn!(node = %self.name, taint = TAINT, reason = error.reason(), %error, "The taint was not put on");
        }
    }

    async fn follow_pods(&self, client: &Client, pods: &Pods, stop: &CancellationToken) {
        let mut due = interval(limits::NODE_LOOK);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let recorder = events::recorder(client.clone(), &self.name);
        let (mut book, mut tries) = (events::Book::default(), Tries::default());
        while stop.run_until_cancelled(due.tick()).await.is_some() {
            let now = Instant::now();
            for event in book.due(&pods.list(), now.into_std()) {
                if !tries.due(now) {
                    break;
                }
                match call(event.publish(&recorder)).await {
                    Ok(()) => {
                        tries = Tries::default();
                        book.told(&event, now.into_std());
                    }
                    Err(error) => {
                        let (reason, fix) =
                            (error.reason(), "the agent's role needs create and patch of events.events.k8s.io");
                        tracing::warn!(pod = event.pod(), reason, %error, fix, "An event on a pod can't be written yet");
                        tries.failed(Instant::now());
                    }
                }
            }
        }
    }
}

async fn call<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, NodeError> {
    match timeout(limits::NODE_CALL, call).await {
        Ok(result) => result.map_err(NodeError::Kube),
        Err(_) => Err(NodeError::Timeout),
    }
}

/// When to try again after failures.
#[derive(Debug, Default)]
struct Tries {
    failures: u32,
    not_before: Option<Instant>,
}

impl Tries {
    fn due(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|then| now >= then)
    }

    fn failed(&mut self, now: Instant) {
        self.failures += 1;
        self.not_before = Some(now + pause(self.failures));
    }
}

/// Doubled each time, between half of that and all of it.
fn pause(failures: u32) -> Duration {
    super::keeper::backoff(failures)
}
