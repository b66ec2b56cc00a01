//! The lane as the rest of the agent knows it: one lock round the table, and nobody waits for it on a worker of the runtime.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use arc_swap::ArcSwap;
use tokio::{
    sync::mpsc,
    task::{JoinError, spawn_blocking},
    time::timeout,
};

use super::{
    kernel::Kernel,
    pairs::Seen,
    report::{PathFault, Report, switch},
    revoke::Forbidden,
    table::{Table, Unproven},
    told::Told,
};
use crate::{
    capture::{CaptureError, LaneFault},
    cluster::Snapshot,
    identity::TrustDomain,
    life::limits,
    policy::Rulebook,
    telemetry::VerdictCounts,
    tunnel,
};

/// Connections without a verdict, on their way to be learnt from.
pub(super) type Misses = mpsc::Receiver<Seen>;

/// The kernel lane's decisions. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Lane<K: Kernel>(Arc<Inner<K>>);

#[derive(Debug)]
struct Inner<K: Kernel> {
    kernel: K,
    rules: Arc<ArcSwap<Rulebook>>,
    told: Arc<dyn Told>,
    table: Mutex<Table<K>>,
    misses: mpsc::Sender<Seen>,
    /// Misses that found the queue full.
    unheard: AtomicU64,
}

impl<K: Kernel> tunnel::Lane for Lane<K> {
    fn missed(&self, source: &Arc<str>, destination: &Arc<str>, port: u16) {
        let seen = ((Arc::clone(source), Arc::clone(destination)), port);
        if let Err(mpsc::error::TrySendError::Full(_)) = self.0.misses.try_send(seen) {
            self.0.unheard.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<K: Kernel> Lane<K> {
    /// `rules` is where every stage reads the rulebook in force. What is missed comes out at the other end, see
    /// [`Lane::follow`].
    pub fn new(
        kernel: K,
        rules: Arc<ArcSwap<Rulebook>>,
        told: Arc<dyn Told>,
        trust_domain: TrustDomain,
        node: Arc<str>,
    ) -> (Self, Misses) {
        let (misses, heard) = mpsc::channel(limits::LANE_MISSES);
        let table = Mutex::new(Table::new(kernel.clone(), trust_domain, node));
        (Self(Arc::new(Inner { kernel, rules, told, table, misses, unheard: AtomicU64::new(0) })), heard)
    }

    /// Compiles the snapshot's rules and puts them in force, for the kernel first. Gives the lane's open connections that they deny,
    /// for [`Lane::end`], and whether the kernel's tables are as they should be: the rules are in force all the same.
    pub async fn enforce(&self, snapshot: Arc<Snapshot>) -> (Doomed, Result<(), CaptureError>) {
        let rules = Arc::clone(&self.0.rules);
        self.locked(move |table| {
            let compiled = Arc::new(Rulebook::compile(&snapshot));
            let changed = table.change(snapshot, Arc::clone(&compiled), || rules.store(compiled));
            match table.forbidden() {
                Ok(doomed) => (Doomed(doomed), changed),
                Err(error) => (Doomed::default(), changed.and(Err(error))),
            }
        })
        .await
        .unwrap_or_else(|error| (Doomed::default(), Err(error)))
    }

    /// Closes them, and tells why. Gives how many were closed.
    pub async fn end(&self, Doomed(doomed): Doomed) -> usize {
        for one in &doomed {
            self.0.told.revoked(one.attestation.id, &one.denial);
        }
        self.destroy(doomed.into_iter().map(|one| (one.tuple, one.attestation)).collect()).await
    }

    /// Notes whether a pod's capture is proven. Without proof the kernel has no verdict of it when this returns.
    pub async fn capture(&self, uid: &Arc<str>, proven: bool) {
        let proof = if proven { Some(self.prove_device(uid).await) } else { None };
        let uid = Arc::clone(uid);
        let doomed =
            self.locked(move |table| if table.capture(&uid, proof) { table.forbidden() } else { Ok(Vec::new()) });
        match doomed.await {
            Ok(Ok(doomed)) if doomed.is_empty() => {}
            Ok(Ok(doomed)) => {
                let closed = self.end(Doomed(doomed)).await;
                tracing::info!(closed, "Connections of the kernel lane closed that policy does not allow any more");
            }
            Ok(Err(error)) | Err(error) => {
                tracing::error!(reason = error.reason(), %error, "The lane's connections can't be decided again");
            }
        }
    }

    /// Closes every open connection of a pod. Gives how many.
    pub async fn cut(&self, uid: &str) -> usize {
        let uid = Arc::<str>::from(uid);
        let kernel = self.0.kernel.clone();
        let own = self.locked(move |table| {
            let ids: HashSet<u64> = table.ids(&uid);
            let mut own = if ids.is_empty() { Vec::new() } else { kernel.connections()? };
            own.retain(|(_, by)| ids.contains(&by.source) || ids.contains(&by.destination));
            Ok(own)
        });
        match own.await {
            Ok(Ok(own)) => self.destroy(own).await,
            Ok(Err(error)) | Err(error) => {
                tracing::error!(reason = error.reason(), %error, "The lane's connections can't be read");
                0
            }
        }
    }

    async fn destroy(&self, doomed: Vec<(heddle_common::Tuple, heddle_common::Attestation)>) -> usize {
        if doomed.is_empty() {
            return 0;
        }
        let count = doomed.len();
        timeout(limits::LANE_DESTROY, self.0.kernel.destroy(doomed)).await.unwrap_or_else(|_| {
            tracing::error!(
                reason = "timeout",
                count,
                "Connections of the kernel lane could not all be closed in time"
            );
            0
        })
    }

    /// What is known of the lane right now.
    #[must_use]
    pub fn report(&self) -> Report {
        let table = self.0.table.lock().unwrap_or_else(PoisonError::into_inner);
        let (pairs, allowed, denied) = table.sizes();
        let name = |workload: &crate::cluster::Workload| format!("{}/{}", workload.namespace, workload.name);
        let pods = table.pods().into_iter().map(|(pod, workload)| {
            let state = switch(&workload, &pod, table.captured(&pod.uid));
            (pod.uid, state)
        });
        let fault = |(from, to, fault): (Arc<_>, Arc<_>, LaneFault)| PathFault {
            from: name(&from),
            to: name(&to),
            reason: fault.reason(),
            detail: fault.to_string(),
        };
        let counts = table.counts();
        let paths: Vec<_> = table.faults().into_iter().map(fault).collect();
        let counts = VerdictCounts {
            pairs: pairs as u64,
            allowed: allowed as u64,
            denied: denied as u64,
            unproven_paths: paths.len() as u64,
            misses: counts.misses,
            unheard: self.0.unheard.load(Ordering::Relaxed),
            full: counts.full,
            exhausted: counts.exhausted,
            forgotten: counts.forgotten,
            failed: counts.failed,
        };
        Report { pods: pods.collect(), paths, counts }
    }

    pub(super) async fn learn(&self, misses: Vec<Seen>) -> Vec<Unproven> {
        self.locked(move |table| table.learn(&misses, Instant::now())).await.unwrap_or_default()
    }

    pub(super) async fn path(&self, path: Unproven, result: Result<(), LaneFault>) {
        let _stopping = self.locked(move |table| table.path(&path, result, Instant::now())).await;
    }

    pub(super) async fn prove(&self, path: &Unproven) -> Result<(), LaneFault> {
        let proof = self.0.kernel.prove_path(&path.pods.0, &path.pods.1);
        timeout(limits::LANE_PROOF, proof)
            .await
            .unwrap_or_else(|_| Err(LaneFault::Probe(format!("took longer than {:?}", limits::LANE_PROOF))))
    }

    async fn prove_device(&self, uid: &str) -> Result<(), LaneFault> {
        timeout(limits::LANE_PROOF, self.0.kernel.prove_device(uid))
            .await
            .unwrap_or_else(|_| Err(LaneFault::Probe(format!("took longer than {:?}", limits::LANE_PROOF))))
    }

    /// Tells of what the kernel has denied since the last time.
    pub(super) async fn tell(&self) {
        match self.locked(Table::denied).await {
            Ok(Ok(denied)) => denied.iter().for_each(|one| self.0.told.denied(one)),
            Ok(Err(error)) => tracing::warn!(reason = error.reason(), %error, "Denials can't be read"),
            Err(_stopping) => {}
        }
    }

    /// With the lock, on a thread that may wait.
    async fn locked<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Table<K>) -> T + Send + 'static,
    ) -> Result<T, CaptureError> {
        let inner = Arc::clone(&self.0);
        let work = move || work(&mut inner.table.lock().unwrap_or_else(PoisonError::into_inner));
        spawn_blocking(work).await.map_err(|_: JoinError| CaptureError::ShuttingDown)
    }
}

/// Open connections that are to be closed.
#[derive(Debug, Default)]
#[must_use = "they are open until they are ended"]
pub struct Doomed(Vec<Forbidden>);

impl Doomed {
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
