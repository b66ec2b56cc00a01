//! How the agent ends: it takes no new connections, lets carried ones go on for a while, and cuts what is left.
//!
//! Pins stay: until the next agent serves them, new connections of enrolled pods fail closed.

use std::{collections::HashSet, time::Duration};

use tokio::time::{Instant, sleep};

use super::limits;
use crate::tunnel::{Connection, Registry};

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Connections that ended by themselves.
    pub completed: usize,
    /// Connections that were still carried at the end.
    pub cut: usize,
}

/// The connections that a drain waits for.
pub trait Carried {
    /// Ids of those that live.
    fn live(&self) -> HashSet<u64>;
    /// Closes all of them.
    fn cut(&self);
}

impl Carried for Registry {
    fn live(&self) -> HashSet<u64> {
        Self::live(self).iter().map(|connection| connection.id).collect()
    }

    fn cut(&self) {
        cut(Self::live(self).iter().map(AsRef::as_ref));
    }
}

/// Closes connections at once.
pub(super) fn cut<'a>(connections: impl Iterator<Item = &'a Connection>) -> usize {
    connections.map(|connection| connection.cancel.cancel()).count()
}

/// Waits until nothing is carried, for `grace` at most or until `hurry`, then cuts the rest and waits for it to be told.
pub async fn drain(carried: &impl Carried, grace: Duration, hurry: impl Future<Output = ()>) -> Drained {
    let mut seen = carried.live();
    let wait = async {
        loop {
            let live = carried.live();
            if live.is_empty() {
                return;
            }
            // Streams of tunnels that peers had open may still come.
            seen.extend(live);
            sleep(limits::WATCH_INTERVAL).await;
        }
    };
    tokio::select! {
        () = wait => {}
        () = sleep(grace) => {}
        () = hurry => {}
    }
    let left = carried.live();
    seen.extend(&left);
    if !left.is_empty() {
        carried.cut();
        let deadline = Instant::now() + limits::CUT_WAIT;
        while !carried.live().is_empty() && Instant::now() < deadline {
            sleep(limits::WATCH_INTERVAL).await;
        }
    }
    Drained { completed: seen.len() - left.len(), cut: left.len() }
}
