//! Keeps one pod of this node captured, served and proven, for as long as it is wanted.
//!
//! One task per pod, so a pod that can't be enrolled delays no other. What it can't prove it shows as uncaptured, and tries
//! again, later each time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{enrol::Stages, limits};
use crate::{
    capture::{CaptureError, PodSpec, PodState},
    cluster::Workload,
    telemetry::PodReport,
};

/// What the cluster wants of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    Enrolled(Arc<Workload>),
    /// It runs on, outside the mesh: what is carried may end first.
    Leaving(Arc<Workload>),
    Gone,
}

/// What a keeper tells the loop that made it.
#[derive(Debug)]
pub(super) enum News {
    /// The first attempt is over, however it went.
    Tried(Arc<str>),
    /// Everything of the pod is withdrawn and the keeper has ended.
    Ended(Arc<str>),
}

/// The state of every pod that should be captured. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Pods {
    table: Arc<Mutex<BTreeMap<Arc<str>, Stated>>>,
    repairs: Arc<AtomicU64>,
}

/// A pod's state, and of what it is the state.
#[derive(Debug, Clone)]
struct Stated {
    report: PodReport,
    /// What was attached.
    of: Option<PodSpec>,
}

impl Pods {
    /// All of them by uid, without the kernel's counters.
    #[must_use]
    pub fn list(&self) -> Vec<PodReport> {
        self.table().values().map(|stated| stated.report.clone()).collect()
    }

    /// How often a pod's capture was found wanting and put in order, of all pods since the start.
    #[must_use]
    pub fn repairs(&self) -> u64 {
        self.repairs.load(Ordering::Relaxed)
    }

    fn repaired(&self, pod: &Workload) {
        self.repairs.fetch_add(1, Ordering::Relaxed);
        tracing::info!(namespace = %pod.namespace, pod = %pod.name, "Pod's capture was found wanting and is in order again");
    }

    /// A pod's state, and where and with which addresses it was attached.
    #[must_use]
    pub fn proof(&self, uid: &str) -> Option<(PodState, Option<PodSpec>)> {
        self.table().get(uid).map(|stated| (stated.report.state.clone(), stated.of.clone()))
    }

    /// `of` is what was attached.
    pub(super) fn set(&self, pod: &Workload, state: PodState, of: Option<&PodSpec>) {
        let report = PodReport {
            uid: Arc::clone(&pod.uid),
            namespace: Arc::clone(&pod.namespace),
            name: Arc::clone(&pod.name),
            state: state.clone(),
            counts: heddle_common::PodCounts::default(),
        };
        let before = self.table().insert(Arc::clone(&pod.uid), Stated { report, of: of.cloned() });
        if before.is_some_and(|before| before.report.state == state) {
            return;
        }
        let (namespace, name) = (&pod.namespace, &pod.name);
        match state {
            PodState::Captured => tracing::info!(%namespace, pod = %name, "Pod is captured"),
            PodState::Uncaptured { reason, detail } => {
                tracing::warn!(%namespace, pod = %name, reason, detail, "Pod is not captured");
            }
            PodState::Attached => {}
        }
    }

    fn remove(&self, uid: &str) {
        self.table().remove(uid);
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Stated>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all keepers share.
#[derive(Debug, Clone)]
pub(super) struct Shared<S> {
    pub stages: S,
    pub pods: Pods,
    /// One permit for each attach or proof under way.
    pub turns: Arc<Semaphore>,
    pub stop: CancellationToken,
    pub news: mpsc::UnboundedSender<News>,
}

/// A pod's listener that is served.
#[derive(Debug)]
struct Service {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// One pod.
#[derive(Debug)]
pub(super) struct Keeper<S> {
    shared: Shared<S>,
    uid: Arc<str>,
    /// What is attached.
    spec: Option<PodSpec>,
    service: Option<Service>,
    /// Since when the kernel gives it no new connections, while it leaves.
    released: Option<Instant>,
    failures: u32,
    /// Connections that are older than the enrolment were reset, as the pod asks.
    reset: bool,
    /// The last proof failed: what is attached may not be as it should be.
    wanting: bool,
    tried: bool,
}

/// Why a keeper stops waiting.
enum Woken {
    Changed,
    Due,
    ServiceEnded,
    Stop,
}

impl<S: Stages> Keeper<S> {
    pub fn new(shared: Shared<S>, uid: Arc<str>) -> Self {
        Self {
            shared,
            uid,
            spec: None,
            service: None,
            released: None,
            failures: 0,
            reset: false,
            wanting: false,
            tried: false,
        }
    }

    /// Follows `wanted` until the pod is gone and withdrawn, or the agent stops: then it is left pinned.
    pub async fn run(mut self, mut wanted: watch::Receiver<Wanted>) {
        loop {
            let now = wanted.borrow_and_update().clone();
            let stop = self.shared.stop.clone();
            let round = async {
                match now {
                    Wanted::Enrolled(pod) => Some(self.enrol(&pod).await),
                    Wanted::Leaving(_) => self.leave().await,
                    Wanted::Gone => self.withdraw().await,
                }
            };
            // A stop must not wait for a step that hangs; the kernel's state is whole after each of its own steps.
            let pause = tokio::select! {
                pause = round => pause,
                () = stop.cancelled() => Some(Duration::ZERO),
            };
            self.told_try();
            match pause {
                Some(pause) => {
                    if !self.rest(&mut wanted, Instant::now() + pause).await {
                        return self.stop().await;
                    }
                }
                None if wanted.has_changed().unwrap_or(false) => {}
                None => {
                    // The loop makes a new keeper when the pod is wanted again.
                    let _loop_ended = self.shared.news.send(News::Ended(Arc::clone(&self.uid)));
                    return;
                }
            }
        }
    }

    /// Waits until there is something to do; `false` when the agent stops.
    async fn rest(&mut self, wanted: &mut watch::Receiver<Wanted>, mut due: Instant) -> bool {
        loop {
            match self.wait(wanted, due).await {
                Woken::Changed | Woken::Due => return true,
                Woken::Stop => return false,
                Woken::ServiceEnded => {
                    self.service = None;
                    self.failures += 1;
                    due = due.min(Instant::now() + backoff(self.failures));
                    self.shared.stages.captured(&self.uid, false).await;
                    let detail = "nobody serves the pod's listener".to_owned();
                    if let Wanted::Enrolled(pod) = &*wanted.borrow() {
                        self.shared.pods.set(
                            pod,
                            PodState::Uncaptured { reason: "not_served", detail },
                            self.spec.as_ref(),
                        );
                    }
                }
            }
        }
    }

    async fn wait(&mut self, wanted: &mut watch::Receiver<Wanted>, due: Instant) -> Woken {
        let service = async {
            match &mut self.service {
                Some(service) => {
                    let _how_it_ended = (&mut service.task).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.shared.stop.cancelled() => Woken::Stop,
            changed = wanted.changed() => if changed.is_ok() { Woken::Changed } else { Woken::Stop },
            () = service => Woken::ServiceEnded,
            () = sleep_until(due) => Woken::Due,
        }
    }

    /// One round: attach what changed, serve it, prove it. Gives the time until the next.
    async fn enrol(&mut self, pod: &Arc<Workload>) -> Duration {
        let state = self.attempt(pod).await;
        let captured = state == PodState::Captured;
        self.shared.stages.captured(&self.uid, captured).await;
        self.shared.pods.set(pod, state, self.spec.as_ref());
        if captured {
            self.failures = 0;
            if pod.reset_on_enrol && !self.reset {
                // What fails is tried again after the next proof.
                self.reset = self.reset_older(pod).await;
            }
            // Spread, so that the proofs of many pods do not come all at once.
            limits::PROVE_INTERVAL.mul_f64(0.75 + fastrand::f64() / 4.0)
        } else {
            self.failures += 1;
            backoff(self.failures)
        }
    }

    /// Closes the connections that are older than the enrolment: what the app opens again is captured. Whether that is done.
    async fn reset_older(&self, pod: &Workload) -> bool {
        let (namespace, name) = (&pod.namespace, &pod.name);
        match timeout(limits::ENROL_STEP, self.shared.stages.reset_older(&self.uid)).await {
            Ok(Ok(count)) => {
                if count > 0 {
                    tracing::info!(%namespace, pod = %name, count, "Connections older than the enrolment were reset");
                }
                true
            }
            Ok(Err(error)) => {
                tracing::warn!(%namespace, pod = %name, reason = error.reason(), %error, "Older connections can't be reset");
                false
            }
            Err(_) => {
                tracing::warn!(%namespace, pod = %name, reason = "timeout", "Older connections were not reset in time");
                false
            }
        }
    }

    async fn attempt(&mut self, pod: &Arc<Workload>) -> PodState {
        let uncaptured = |reason, detail: String| PodState::Uncaptured { reason, detail };
        let spec = match (spec(pod), &self.spec) {
            (Ok(spec), _) => spec,
            // What is attached stays until something better is known.
            (Err(_), Some(attached)) => attached.clone(),
            (Err((reason, detail)), None) => return uncaptured(reason, detail.to_owned()),
        };
        let turns = Arc::clone(&self.shared.turns);
        let Ok(_turn) = turns.acquire_owned().await else {
            return uncaptured("stopping", "the agent stops".to_owned());
        };
        // Attaching again puts back what is missing of programs, links, rules, routes and switches, and leaves the rest.
        if self.spec.as_ref() != Some(&spec) || self.service.is_none() || self.wanting {
            match timeout(limits::ENROL_STEP, self.shared.stages.attach(spec.clone())).await {
                Err(_) => return uncaptured("timeout", format!("attaching took longer than {:?}", limits::ENROL_STEP)),
                Ok(Err(error)) => return uncaptured(error.reason(), error.to_string()),
                Ok(Ok(attached)) => {
                    if self.service.is_none() {
                        self.shared.pods.set(pod, PodState::Attached, None);
                    }
                    let stop = CancellationToken::new();
                    let task = tokio::spawn(self.shared.stages.serve(Arc::clone(pod), attached, stop.clone()));
                    // The new one accepts before the old one stops: no connection finds nobody.
                    if let Some(old) = self.service.replace(Service { stop, task }) {
                        old.stop.cancel();
                    }
                    self.spec = Some(spec);
                }
            }
        }
        let proof = timeout(limits::ENROL_STEP, self.shared.stages.prove(&self.uid)).await;
        let repaired = std::mem::replace(&mut self.wanting, !matches!(proof, Ok(PodState::Captured))) && !self.wanting;
        if repaired {
            self.shared.pods.repaired(pod);
        }
        match proof {
            Ok(PodState::Attached) => uncaptured("unproven", "the proof gave no result".to_owned()),
            Ok(state) => state,
            Err(_) => uncaptured("timeout", format!("the proof took longer than {:?}", limits::ENROL_STEP)),
        }
    }

    /// One round of a pod that runs on outside the mesh: its new connections are its own at once, those that are carried go
    /// on until they end. Gives the time until the next round, `None` after the last.
    async fn leave(&mut self) -> Option<Duration> {
        let Some(since) = self.released else {
            self.shared.stages.captured(&self.uid, false).await;
            match timeout(limits::ENROL_STEP, self.shared.stages.release(&self.uid)).await {
                Ok(Ok(()) | Err(CaptureError::NotAttached(_))) => {}
                failed => return Some(self.failed("Pod can't be taken out of the mesh yet", failed.ok())),
            }
            self.end_service().await;
            self.spec = None;
            self.released = Some(Instant::now());
            return Some(limits::LEAVE_SETTLE);
        };
        if since.elapsed() < limits::LEAVE_SETTLE {
            return Some(limits::LEAVE_SETTLE);
        }
        if self.shared.stages.carried(&self.uid) > 0 {
            self.shared.pods.remove(&self.uid);
            return Some(limits::LEAVE_LOOK);
        }
        // Connections of the kernel lane are the apps' own, and go on.
        self.take_away().await
    }

    /// Ends the service, closes what is carried, and takes everything away from the pod. Gives the time until the next try,
    /// `None` when it is done.
    async fn withdraw(&mut self) -> Option<Duration> {
        self.shared.stages.captured(&self.uid, false).await;
        self.end_service().await;
        let cut = self.shared.stages.cut(&self.uid).await;
        if cut > 0 {
            tracing::info!(uid = %self.uid, cut, "Connections of a pod that is gone were cut");
            let deadline = Instant::now() + limits::CUT_WAIT;
            while self.shared.stages.carried(&self.uid) > 0 && Instant::now() < deadline {
                sleep(limits::WATCH_INTERVAL).await;
            }
        }
        self.take_away().await
    }

    /// Takes everything away from the pod. As [`Keeper::withdraw`].
    async fn take_away(&mut self) -> Option<Duration> {
        match timeout(limits::ENROL_STEP, self.shared.stages.withdraw(&self.uid)).await {
            Ok(Ok(()) | Err(CaptureError::NotAttached(_))) => {
                self.spec = None;
                self.released = None;
                self.reset = false;
                self.failures = 0;
                self.shared.pods.remove(&self.uid);
                None
            }
            failed => Some(self.failed("Pod can't be withdrawn yet", failed.ok())),
        }
    }

    /// Logs a step that failed, or timed out where there is no result. Gives the pause before the next try.
    fn failed(&mut self, what: &'static str, result: Option<Result<(), CaptureError>>) -> Duration {
        self.failures += 1;
        let (reason, error) = match &result {
            Some(Err(error)) => (error.reason(), error.to_string()),
            _ => ("timeout", format!("took longer than {:?}", limits::ENROL_STEP)),
        };
        tracing::warn!(uid = %self.uid, reason, error, "{what}");
        backoff(self.failures)
    }

    async fn end_service(&mut self) {
        let Some(mut service) = self.service.take() else { return };
        service.stop.cancel();
        if timeout(limits::CUT_WAIT, &mut service.task).await.is_err() {
            tracing::warn!(uid = %self.uid, "Listener did not stop in time");
            service.task.abort();
        }
    }

    /// The agent stops: nobody listens any more, what is pinned stays.
    async fn stop(mut self) {
        self.end_service().await;
        match timeout(limits::CUT_WAIT, self.shared.stages.unlisten(&self.uid)).await {
            Ok(Ok(()) | Err(CaptureError::NotAttached(_))) => {}
            Ok(Err(error)) => {
                tracing::warn!(uid = %self.uid, reason = error.reason(), %error, "Listener can't be given up");
            }
            Err(_) => tracing::warn!(uid = %self.uid, "Listener was not given up in time"),
        }
    }

    fn told_try(&mut self) {
        if !std::mem::replace(&mut self.tried, true) {
            let _loop_ended = self.shared.news.send(News::Tried(Arc::clone(&self.uid)));
        }
    }
}

/// What capture needs to know of a pod, or why it can't be said (reason, detail).
fn spec(pod: &Workload) -> Result<PodSpec, (&'static str, &'static str)> {
    let Some(place) = pod.place.clone() else {
        return Err(("place_unknown", "where the node keeps the pod's netns and cgroup is not known"));
    };
    if pod.addresses.is_empty() {
        return Err(("no_address", "the pod has no address yet"));
    }
    Ok(PodSpec {
        uid: Arc::clone(&pod.uid),
        name: format!("{}/{}", pod.namespace, pod.name).into(),
        addresses: pod.addresses.clone(),
        place,
        when_unattended: pod.when_unattended,
        probes: pod.probes.clone(),
    })
}

/// The pause after so many failures in a row: doubled each time, between half of that and all of it.
pub(super) fn backoff(failures: u32) -> Duration {
    let doubled = limits::ENROL_BACKOFF_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(limits::ENROL_BACKOFF_MAX).mul_f64(0.5 + fastrand::f64() / 2.0)
}
