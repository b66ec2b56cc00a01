//! What each pod and each peer may use of the agent, and what is used. Pure accounting behind short locks; it does no I/O and
//! never waits.

mod bucket;

pub use bucket::{Bucket, Keyed, Rate};

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::limits;
use crate::identity::SpiffeId;

/// The node's budgets. One per agent; cheap to clone.
#[derive(Debug, Clone)]
pub struct Budget {
    node: Arc<Node>,
}

#[derive(Debug)]
struct Node {
    /// Streams that peers gave up before they were answered, by identity: a peer does not get more by more connections.
    given_up: Mutex<Keyed<SpiffeId>>,
}

impl Budget {
    #[must_use]
    pub fn new() -> Self {
        let given_up = Mutex::new(Keyed::new(limits::H2_GIVEN_UP, limits::H2_GIVEN_UP_PEERS));
        Self { node: Arc::new(Node { given_up }) }
    }

    /// Counts a stream that `peer` gave up before it was answered; false when those are too many.
    #[must_use]
    pub fn give_up(&self, peer: &SpiffeId) -> bool {
        lock(&self.node.given_up).take(peer, Instant::now())
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::new()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
