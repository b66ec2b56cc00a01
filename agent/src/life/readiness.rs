//! Whether the agent can do its work, and why not.
//!
//! What must be done first holds a [`Blocker`]; the agent is ready when none is left. A blocker that is forgotten can't
//! be: it ends with its owner, and one whose owner hangs shows its name.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{Router, extract::State, http::StatusCode, routing::get};

/// What the agent waits for. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    waits: Arc<Mutex<Waits>>,
}

#[derive(Debug, Default)]
struct Waits {
    next: u64,
    for_what: BTreeMap<u64, Cow<'static, str>>,
}

/// Keeps the agent from being ready until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it makes the agent ready"]
pub struct Blocker {
    readiness: Readiness,
    id: u64,
}

impl Readiness {
    /// `what` is for people, such as `the first snapshot of the cluster`.
    pub fn block(&self, what: impl Into<Cow<'static, str>>) -> Blocker {
        let mut waits = self.waits();
        let id = waits.next;
        waits.next += 1;
        waits.for_what.insert(id, what.into());
        drop(waits);
        Blocker { readiness: self.clone(), id }
    }

    /// What is waited for, in the order in which it was asked for; empty when the agent is ready.
    #[must_use]
    pub fn waiting_for(&self) -> Vec<Cow<'static, str>> {
        self.waits().for_what.values().cloned().collect()
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        self.readiness.waits().for_what.remove(&self.id);
    }
}

/// `GET /healthz/ready`: 200, or 503 with what is waited for, one a line.
pub fn router(readiness: Readiness) -> Router {
    async fn ready(State(readiness): State<Readiness>) -> (StatusCode, String) {
        match readiness.waiting_for() {
            waits if waits.is_empty() => (StatusCode::OK, "ready\n".to_owned()),
            waits => (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for {}\n", waits.join("\nwaiting for "))),
        }
    }
    Router::new().route("/healthz/ready", get(ready)).with_state(readiness)
}
