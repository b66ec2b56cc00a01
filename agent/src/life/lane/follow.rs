//! Learns from misses, proves paths, and tells of the kernel's denials: the lane's own task.

use std::collections::{HashMap, VecDeque};

use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{
    handle::{Lane, Misses},
    kernel::Kernel,
    table::Unproven,
};
use crate::{capture::LaneFault, life::limits};

impl<K: Kernel> Lane<K> {
    /// Runs until `stop`. What the kernel holds stays.
    pub async fn follow(self, mut misses: Misses, stop: CancellationToken) {
        let mut due = interval(limits::LANE_POLL);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut proofs = Proofs::default();
        let mut heard = Vec::with_capacity(limits::LANE_BATCH);
        loop {
            proofs.start(&self);
            tokio::select! {
                () = stop.cancelled() => break,
                count = misses.recv_many(&mut heard, limits::LANE_BATCH) => {
                    if count == 0 {
                        break;
                    }
                    proofs.waiting.extend(self.learn(heard.split_off(0)).await);
                }
                (path, result) = proofs.next() => self.path(path, result).await,
                _ = due.tick() => self.tell().await,
            }
        }
        // Whoever reads the counters next takes what it finds for told.
        self.tell().await;
    }
}

/// Proofs under way, and those that wait for their turn.
#[derive(Debug, Default)]
struct Proofs {
    tasks: JoinSet<Result<(), LaneFault>>,
    paths: HashMap<tokio::task::Id, Unproven>,
    waiting: VecDeque<Unproven>,
}

impl Proofs {
    fn start<K: Kernel>(&mut self, lane: &Lane<K>) {
        while self.tasks.len() < limits::LANE_PROOFS
            && let Some(path) = self.waiting.pop_front()
        {
            let (lane, own) = (lane.clone(), path.clone());
            let task = self.tasks.spawn(async move { lane.prove(&own).await });
            self.paths.insert(task.id(), path);
        }
    }

    /// Waits for the end of one; for ever while there is none.
    async fn next(&mut self) -> (Unproven, Result<(), LaneFault>) {
        loop {
            let (id, result) = match self.tasks.join_next_with_id().await {
                Some(Ok((id, result))) => (id, result),
                Some(Err(error)) => (error.id(), Err(LaneFault::Probe(error.to_string()))),
                None => std::future::pending().await,
            };
            if let Some(path) = self.paths.remove(&id) {
                return (path, result);
            }
        }
    }
}
