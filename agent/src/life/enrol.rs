//! Follows the cluster: puts rules in force, names the destinations to capture, and gives each pod of this node a
//! keeper.
//!
//! Order is what makes it safe: rules before destinations, so that no connection meets yesterday's policy; destinations
//! before pods, so that a captured pod sends nothing plain that belongs into the mesh.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    drain::cut,
    keeper::{Keeper, News, Pods, Shared, Wanted, backoff},
    lane::Lane,
    limits,
    readiness::Blocker,
};
use crate::{
    capture::{self, Attached, CaptureError, PodSpec, PodState},
    cluster::{Snapshot, View, Workload},
    identity::SpiffeId,
    tunnel::{self, Connection, Direction},
};

/// What enrolment moves: the stages before it.
pub trait Stages: Clone + Send + Sync + 'static {
    /// Puts the snapshot's rules in force, for new connections and for those that are open.
    fn enforce(&self, snapshot: Arc<Snapshot>) -> impl Future<Output = Result<(), CaptureError>> + Send;
    /// Keeps certificates ready for exactly these workloads.
    fn keep_identities(&self, of: &[Arc<Workload>]);
    fn set_destinations(&self, addresses: HashSet<IpAddr>) -> impl Future<Output = Result<(), CaptureError>> + Send;
    fn attach(&self, pod: PodSpec) -> impl Future<Output = Result<Attached, CaptureError>> + Send;
    fn prove(&self, uid: &str) -> impl Future<Output = PodState> + Send;
    /// Serves the pod's listener until `stop`.
    fn serve(
        &self,
        pod: Arc<Workload>,
        attached: Attached,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send + 'static;
    /// Notes whether the pod's capture is proven. Without proof no connection of it passes the agent by when this is done.
    fn captured(&self, uid: &Arc<str>, proven: bool) -> impl Future<Output = ()> + Send;
    /// Connections that are carried for the pod.
    fn carried(&self, uid: &str) -> usize;
    /// Closes them, and those that pass the agent by; gives how many.
    fn cut(&self, uid: &str) -> impl Future<Output = usize> + Send;
    /// Closes the pod's connections that are older than its enrolment; gives how many.
    fn reset_older(&self, uid: &str) -> impl Future<Output = Result<usize, CaptureError>> + Send;
    /// Takes the kernel's programs and the listener away, and leaves what carried connections need.
    fn release(&self, uid: &str) -> impl Future<Output = Result<(), CaptureError>> + Send;
    fn unlisten(&self, uid: &str) -> impl Future<Output = Result<(), CaptureError>> + Send;
    fn withdraw(&self, uid: &str) -> impl Future<Output = Result<(), CaptureError>> + Send;
    fn reap(&self, keep: &HashSet<Arc<str>>) -> impl Future<Output = Result<Vec<String>, CaptureError>> + Send;
}

/// The stages as they are.
#[derive(Debug, Clone)]
pub struct Journey {
    pub tunnel: tunnel::Context,
    pub lane: Lane<capture::Lane>,
}

impl Stages for Journey {
    async fn enforce(&self, snapshot: Arc<Snapshot>) -> Result<(), CaptureError> {
        let generation = snapshot.generation;
        let (doomed, result) = self.lane.enforce(snapshot).await;
        let carried = tunnel::reconsider(&self.tunnel.registry, &self.tunnel.rules.load());
        let closed = carried + self.lane.end(doomed).await;
        if closed > 0 {
            tracing::info!(closed, generation, "Connections closed due to policy change");
        }
        result
    }

    fn keep_identities(&self, of: &[Arc<Workload>]) {
        let identity = |workload: &Arc<Workload>| {
            SpiffeId::new(self.tunnel.certificates.trust_domain(), &workload.namespace, &workload.service_account)
                .inspect_err(|error| {
                    tracing::warn!(namespace = %workload.namespace, pod = %workload.name, %error, "Pod has no identity");
                })
                .ok()
        };
        self.tunnel.certificates.keep(of.iter().filter_map(identity).collect());
    }

    async fn set_destinations(&self, addresses: HashSet<IpAddr>) -> Result<(), CaptureError> {
        self.tunnel.capture.set_destinations(addresses).await
    }

    async fn attach(&self, pod: PodSpec) -> Result<Attached, CaptureError> {
        self.tunnel.capture.attach(pod).await
    }

    async fn prove(&self, uid: &str) -> PodState {
        self.tunnel.capture.prove(uid).await
    }

    fn serve(
        &self,
        pod: Arc<Workload>,
        attached: Attached,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send + 'static {
        tunnel::serve(self.tunnel.clone(), pod, attached, stop)
    }

    async fn captured(&self, uid: &Arc<str>, proven: bool) {
        self.lane.capture(uid, proven).await;
    }

    fn carried(&self, uid: &str) -> usize {
        self.tunnel.registry.live().iter().filter(|connection| is_of(connection, uid)).count()
    }

    async fn cut(&self, uid: &str) -> usize {
        let carried = self.tunnel.registry.live();
        let cut = cut(carried.iter().filter(|connection| is_of(connection, uid)).map(AsRef::as_ref));
        cut + self.lane.cut(uid).await
    }

    async fn reset_older(&self, uid: &str) -> Result<usize, CaptureError> {
        self.tunnel.capture.reset_older(uid).await
    }

    async fn release(&self, uid: &str) -> Result<(), CaptureError> {
        self.tunnel.capture.release(uid).await
    }

    async fn unlisten(&self, uid: &str) -> Result<(), CaptureError> {
        self.tunnel.capture.unlisten(uid).await
    }

    async fn withdraw(&self, uid: &str) -> Result<(), CaptureError> {
        self.tunnel.capture.withdraw(uid).await
    }

    async fn reap(&self, keep: &HashSet<Arc<str>>) -> Result<Vec<String>, CaptureError> {
        self.tunnel.capture.reap(keep).await
    }
}

/// Whether a connection is carried for this pod of the node: its own outbound, or inbound to it.
fn is_of(connection: &Connection, uid: &str) -> bool {
    let flow = &connection.flow;
    let workload = match flow.direction {
        Direction::Outbound => &flow.source_workload,
        Direction::Inbound => &flow.destination_workload,
    };
    workload.as_ref().is_some_and(|workload| &*workload.uid == uid)
}

/// What becomes of each pod of this node, by uid. Pods that are kept and not named here are gone.
pub(super) fn plan(snapshot: &Snapshot, node: &str) -> HashMap<Arc<str>, Wanted> {
    let local = snapshot.workloads.values().filter(|workload| &*workload.node == node && !workload.host_network);
    local
        .map(|workload| {
            let wanted = if workload.enrolled { Wanted::Enrolled } else { Wanted::Leaving };
            (Arc::clone(&workload.uid), wanted(Arc::clone(workload)))
        })
        .collect()
}

#[derive(Debug)]
struct Kept {
    wanted: watch::Sender<Wanted>,
    task: JoinHandle<()>,
}

/// The loop.
#[derive(Debug)]
pub struct Enrolment<S> {
    shared: Shared<S>,
    node: Arc<str>,
    news: mpsc::UnboundedReceiver<News>,
    kept: HashMap<Arc<str>, Kept>,
    /// Pods of the first pass that have not been tried yet; `None` before the first pass.
    untried: Option<HashSet<Arc<str>>>,
    /// Dropped when the first pass is over.
    first_pass: Option<Blocker>,
    reaped: bool,
    failures: u32,
}

impl<S: Stages> Enrolment<S> {
    pub fn new(stages: S, node: Arc<str>, pods: Pods, first_pass: Blocker, stop: CancellationToken) -> Self {
        let (sender, news) = mpsc::unbounded_channel();
        let turns = Arc::new(Semaphore::new(limits::ENROLMENTS));
        let shared = Shared { stages, pods, turns, stop, news: sender };
        Self {
            shared,
            node,
            news,
            kept: HashMap::new(),
            untried: None,
            first_pass: Some(first_pass),
            reaped: false,
            failures: 0,
        }
    }

    /// Follows `view` until the stop, then waits until every pod's listener is given up.
    pub async fn run(mut self, mut view: View) {
        let stop = self.shared.stop.clone();
        let mut snapshot = view.load();
        let mut ended = false;
        let mut retry = self.apply(&snapshot).await;
        while !stop.is_cancelled() {
            let due = async {
                match retry {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                next = view.next(), if !ended => match next {
                    Some(next) => {
                        snapshot = next;
                        retry = self.apply(&snapshot).await;
                    }
                    None => ended = true,
                },
                news = self.news.recv() => {
                    match news {
                        Some(News::Tried(uid)) => {
                            if let Some(untried) = &mut self.untried {
                                untried.remove(&uid);
                            }
                        }
                        Some(News::Ended(uid)) => {
                            self.kept.remove(&uid);
                            // It may have been wanted again in the same moment.
                            self.keep_pods(&snapshot);
                        }
                        None => {}
                    }
                    retry = earliest(retry, self.finish_first_pass().await);
                }
                () = due => retry = self.apply(&snapshot).await,
            }
        }
        for (_, kept) in self.kept.drain() {
            let _how_it_ended = kept.task.await;
        }
    }

    /// Makes everything as the snapshot says; gives when to try again, where something failed.
    async fn apply(&mut self, snapshot: &Arc<Snapshot>) -> Option<Instant> {
        let enforced = self.enforce(snapshot).await;
        let destinations = snapshot.mesh_destinations().collect();
        match timeout(limits::ENROL_STEP, self.shared.stages.set_destinations(destinations)).await {
            Ok(Ok(())) => self.failures = 0,
            failed => {
                let (reason, error) = match failed {
                    Ok(Err(error)) => (error.reason(), error.to_string()),
                    _ => ("timeout", format!("took longer than {:?}", limits::ENROL_STEP)),
                };
                tracing::error!(reason, error, "Destinations can't be set, so no pod is enrolled until they can");
                self.failures += 1;
                return Some(Instant::now() + backoff(self.failures));
            }
        }
        self.keep_pods(snapshot);
        earliest(enforced, self.finish_first_pass().await)
    }

    /// Puts the rules in force; gives when to try again, where the kernel's tables were not brought up to them whole.
    async fn enforce(&self, snapshot: &Arc<Snapshot>) -> Option<Instant> {
        let enforced = timeout(limits::ENROL_STEP, self.shared.stages.enforce(Arc::clone(snapshot))).await;
        let (reason, error) = match enforced {
            Ok(Ok(())) => return None,
            Ok(Err(error)) => (error.reason(), error.to_string()),
            Err(_) => ("timeout", format!("took longer than {:?}", limits::ENROL_STEP)),
        };
        tracing::error!(reason, error, "The kernel lane is not up to the rules in force yet");
        Some(Instant::now() + backoff(1))
    }

    fn keep_pods(&mut self, snapshot: &Snapshot) {
        let mut plan = plan(snapshot, &self.node);
        let staying = plan.values().filter_map(|wanted| match wanted {
            Wanted::Enrolled(pod) => Some(pod),
            Wanted::Leaving(pod) => self.kept.contains_key(&pod.uid).then_some(pod),
            Wanted::Gone => None,
        });
        self.shared.stages.keep_identities(&staying.cloned().collect::<Vec<_>>());
        for (uid, kept) in &self.kept {
            let wanted = plan.remove(uid).unwrap_or(Wanted::Gone);
            kept.wanted.send_if_modified(|before| {
                let changed = *before != wanted;
                *before = wanted;
                changed
            });
        }
        for (uid, wanted) in plan {
            if let Wanted::Enrolled(_) = wanted {
                let (sender, receiver) = watch::channel(wanted);
                let keeper = Keeper::new(self.shared.clone(), Arc::clone(&uid));
                let task = tokio::spawn(keeper.run(receiver));
                self.kept.insert(uid, Kept { wanted: sender, task });
            }
        }
        if self.untried.is_none() {
            self.untried = Some(self.kept.keys().cloned().collect());
        }
    }

    /// Once every pod of the first pass was tried: removes what earlier agents left of pods that are gone, and lets the
    /// agent be ready. Gives when to try again.
    async fn finish_first_pass(&mut self) -> Option<Instant> {
        if self.reaped || !self.untried.as_ref().is_some_and(HashSet::is_empty) {
            return None;
        }
        // No keeper is made while this runs, so nothing new is taken for something old.
        let keep: HashSet<_> = self.kept.keys().cloned().collect();
        let reaped = timeout(limits::ENROL_STEP, self.shared.stages.reap(&keep)).await;
        self.first_pass = None;
        match reaped {
            Ok(Ok(gone)) => {
                self.reaped = true;
                if !gone.is_empty() {
                    tracing::info!(pods = ?gone, "Withdrew pods that went while no agent ran");
                }
                None
            }
            failed => {
                let error = failed.map_or_else(|_| "timeout".to_owned(), |result| format!("{:?}", result.err()));
                tracing::warn!(error, "Pods that went while no agent ran can't be withdrawn yet");
                Some(Instant::now() + limits::ENROL_BACKOFF_MAX)
            }
        }
    }
}

fn earliest(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}
