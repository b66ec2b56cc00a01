//! Keeps [`Pods`] what the API server says: list, then watch; after any failure from the beginning.
//!
//! Nothing that may be out of date is kept: while the watch is down, the API server is asked itself. A watch that is silent may be
//! dead, which shows only after a minute: what it knows is then confirmed, pod by pod (see [`Pods::certain`]).

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use k8s_openapi::api::core::v1;
use kube::{
    Api, Client,
    runtime::{
        watcher,
        watcher::{Config, Event},
    },
};
use tokio::time::{sleep, timeout};

use super::pods::{Index, Pods, read};
use crate::{causes, identity::ca::vitals::Vitals, life::limits};

/// What readiness waits for until they are known.
pub(super) const WAIT: &str = "the API server's list of pods";

pub(super) async fn follow(pods: Arc<Pods>, client: Client, vitals: Vitals) {
    let mut backoff = limits::CA_WATCH_BACKOFF_MIN;
    loop {
        vitals.wait(WAIT);
        let error = watch(&pods, client.clone(), &vitals).await;
        if pods.known() {
            backoff = limits::CA_WATCH_BACKOFF_MIN;
        }
        pods.replace(None);
        vitals.watched(0, false);
        tracing::warn!(reason = "pods_unknown", error, "Pods can't be watched: the API server is asked for each.");
        sleep(backoff.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        backoff = (backoff * 2).min(limits::CA_WATCH_BACKOFF_MAX);
    }
}

/// Until it fails: why.
async fn watch(pods: &Pods, client: Client, vitals: &Vitals) -> String {
    let config = Config::default().timeout(limits::KUBE_WATCH);
    let mut events = pin!(watcher(Api::<v1::Pod>::all(client), config));
    let mut listed = Some(Index::new(Instant::now()));
    loop {
        // A page of a list comes or does not; of a watch the connection's own deadline says whether it lives.
        let patience = if listed.is_some() { limits::CA_LIST } else { Duration::MAX };
        let event = match timeout(patience, events.next()).await {
            Ok(Some(Ok(event))) => event,
            Ok(Some(Err(error))) => return causes::told(&error),
            Ok(None) => return "the watch ended".to_owned(),
            Err(_) => return "no answer".to_owned(),
        };
        match (event, listed.as_mut()) {
            (Event::Init, _) => listed = Some(Index::new(Instant::now())),
            (Event::InitApply(pod), Some(index)) => {
                if let Some(pod) = read(&pod) {
                    index.put(pod);
                }
            }
            (Event::InitDone, _) => {
                pods.replace(listed.take());
                vitals.ready(WAIT);
                tracing::info!(pods = pods.len(), "Pods are known.");
            }
            (Event::Apply(pod) | Event::InitApply(pod), _) => {
                if let Some(pod) = read(&pod) {
                    pods.change(|index| index.put(pod));
                }
            }
            (Event::Delete(pod), _) => {
                if let Some(pod) = read(&pod) {
                    pods.change(|index| index.remove(&pod.namespace, &pod.name));
                }
            }
        }
        if listed.is_none() {
            vitals.watched(pods.len(), true);
        }
    }
}
