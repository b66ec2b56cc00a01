//! Enrolment against stages that note what they are asked and fail when told to.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, TcpListener},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{sync::watch, task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    capture::{Attached, CaptureError, PodSpec, PodState, ProbeToken},
    cluster::{Place, Snapshot, Unattended, View, Workload},
    life::{
        enrol::{Enrolment, Stages, plan},
        keeper::{Pods, Wanted, backoff},
        limits,
        readiness::Readiness,
    },
};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
struct Inner {
    done: Vec<String>,
    /// How often a step (`attach a`, `destinations`, …) fails before it works.
    fail: HashMap<String, usize>,
    /// Steps that never end.
    hang: HashSet<String>,
    carried: HashMap<String, usize>,
    served: HashSet<String>,
    proven: HashSet<String>,
}

#[derive(Debug, Clone, Default)]
struct Fake(Arc<Mutex<Inner>>);

impl Fake {
    fn done(&self) -> Vec<String> {
        self.0.lock().unwrap().done.clone()
    }

    fn has(&self, step: &str) -> bool {
        self.done().iter().any(|done| done == step)
    }

    fn count(&self, step: &str) -> usize {
        self.done().iter().filter(|done| *done == step).count()
    }

    fn fails(&self, step: &str, times: usize) {
        self.0.lock().unwrap().fail.insert(step.to_owned(), times);
    }

    fn note(&self, step: String) {
        self.0.lock().unwrap().done.push(step);
    }

    async fn step(&self, step: String) -> Result<(), CaptureError> {
        let hangs = self.0.lock().unwrap().hang.contains(&step);
        if hangs {
            std::future::pending::<()>().await;
        }
        let mut inner = self.0.lock().unwrap();
        match inner.fail.get_mut(&step) {
            Some(times) if *times > 0 => {
                *times -= 1;
                inner.done.push(format!("failed {step}"));
                Err(CaptureError::NotAttached("fake".into()))
            }
            _ => {
                inner.done.push(step);
                Ok(())
            }
        }
    }
}

impl Stages for Fake {
    async fn enforce(&self, snapshot: Arc<Snapshot>) -> Result<(), CaptureError> {
        self.step(format!("rules {}", snapshot.generation)).await
    }

    fn keep_identities(&self, of: &[Arc<Workload>]) {
        let mut names: Vec<_> = of.iter().map(|pod| &*pod.service_account).collect();
        names.sort_unstable();
        self.note(format!("identities {}", names.join(",")));
    }

    async fn set_destinations(&self, addresses: HashSet<IpAddr>) -> Result<(), CaptureError> {
        self.step(format!("destinations {}", addresses.len())).await
    }

    async fn attach(&self, pod: PodSpec) -> Result<Attached, CaptureError> {
        self.step(format!("attach {}", pod.uid)).await?;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Ok(Attached { listener, token: ProbeToken([0; 16]) })
    }

    async fn prove(&self, uid: &str) -> PodState {
        match self.step(format!("prove {uid}")).await {
            Ok(()) if self.0.lock().unwrap().served.contains(uid) => PodState::Captured,
            Ok(()) => PodState::Uncaptured { reason: "not_served", detail: String::new() },
            Err(_) => PodState::Uncaptured { reason: "probe", detail: String::new() },
        }
    }

    fn serve(
        &self,
        pod: Arc<Workload>,
        attached: Attached,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send + 'static {
        self.0.lock().unwrap().served.insert(pod.uid.to_string());
        self.note(format!("serve {}", pod.uid));
        let this = self.clone();
        async move {
            stop.cancelled().await;
            drop(attached);
            this.note(format!("stop {}", pod.uid));
        }
    }

    async fn captured(&self, uid: &Arc<str>, proven: bool) {
        let mut inner = self.0.lock().unwrap();
        // Only what changes is of interest.
        let changed = if proven { inner.proven.insert(uid.to_string()) } else { inner.proven.remove(&**uid) };
        if changed {
            inner.done.push(format!("{} {uid}", if proven { "lane" } else { "no lane" }));
        }
    }

    fn carried(&self, uid: &str) -> usize {
        self.0.lock().unwrap().carried.get(uid).copied().unwrap_or_default()
    }

    async fn cut(&self, uid: &str) -> usize {
        let cut = self.0.lock().unwrap().carried.remove(uid).unwrap_or_default();
        if cut > 0 {
            self.note(format!("cut {uid} {cut}"));
        }
        cut
    }

    async fn reset_older(&self, uid: &str) -> Result<usize, CaptureError> {
        self.step(format!("reset {uid}")).await.map(|()| 1)
    }

    async fn release(&self, uid: &str) -> Result<(), CaptureError> {
        self.step(format!("release {uid}")).await.map_err(|_| CaptureError::Probe(std::io::Error::other("on purpose")))
    }

    async fn unlisten(&self, uid: &str) -> Result<(), CaptureError> {
        self.step(format!("unlisten {uid}")).await
    }

    async fn withdraw(&self, uid: &str) -> Result<(), CaptureError> {
        match self.step(format!("withdraw {uid}")).await {
            Ok(()) => Ok(()),
            // `NotAttached` would mean that there is nothing to withdraw.
            Err(_) => Err(CaptureError::Probe(std::io::Error::other("on purpose"))),
        }
    }

    async fn reap(&self, keep: &HashSet<Arc<str>>) -> Result<Vec<String>, CaptureError> {
        let mut keep: Vec<_> = keep.iter().map(|uid| &**uid).collect();
        keep.sort_unstable();
        self.step(format!("reap all but {}", keep.join(","))).await.map(|()| vec![])
    }
}

fn pod(uid: &str) -> Workload {
    Workload {
        uid: uid.into(),
        addresses: vec![IpAddr::from([10, 0, 0, uid.as_bytes()[0]])],
        place: Some(Place { netns: "/netns".into(), cgroup: "/cgroup".into(), ..Place::default() }),
        ..Workload::named("shop", uid)
    }
}

fn snapshot(generation: u64, pods: impl IntoIterator<Item = Workload>) -> Arc<Snapshot> {
    let mut snapshot = Snapshot { generation, ..Snapshot::default() };
    for pod in pods.into_iter().map(Arc::new) {
        for address in &pod.addresses {
            snapshot.by_address.insert(*address, Arc::clone(&pod));
        }
        snapshot.workloads.insert(Arc::clone(&pod.uid), pod);
    }
    Arc::new(snapshot)
}

struct Running {
    fake: Fake,
    pods: Pods,
    readiness: Readiness,
    stop: CancellationToken,
    snapshots: watch::Sender<Arc<Snapshot>>,
    task: JoinHandle<()>,
}

impl Running {
    fn start(fake: &Fake, first: Arc<Snapshot>) -> Self {
        let (snapshots, receiver) = watch::channel(first);
        let (pods, readiness, stop) = (Pods::default(), Readiness::default(), CancellationToken::new());
        let blocker = readiness.block("pass");
        let enrolment = Enrolment::new(fake.clone(), "node-1".into(), pods.clone(), blocker, stop.clone());
        let task = tokio::spawn(enrolment.run(View::new(receiver)));
        Self { fake: fake.clone(), pods, readiness, stop, snapshots, task }
    }

    fn state(&self, uid: &str) -> Option<(bool, &'static str)> {
        self.pods.list().iter().find(|pod| &*pod.uid == uid).map(|pod| (pod.captured(), pod.reason()))
    }

    async fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < PATIENCE, "{what}: {:?} {:?}", self.fake.done(), self.pods.list());
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn end(self) -> Fake {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap();
        self.fake
    }
}

/// Asserts that the steps were done in this order, whatever was between.
fn in_order(fake: &Fake, steps: &[&str]) {
    let done = fake.done();
    let mut from = 0;
    for step in steps {
        let at = done[from..].iter().position(|done| done == step);
        from += at.unwrap_or_else(|| panic!("{step} is not in its place in {done:?}")) + 1;
    }
}

#[tokio::test]
async fn rules_come_before_destinations_destinations_before_pods_and_reaping_last() {
    let running = Running::start(&Fake::default(), snapshot(1, [pod("a"), pod("b")]));
    running.until("ready", |running| running.readiness.waiting_for().is_empty()).await;
    assert_eq!((running.state("a"), running.state("b")), (Some((true, "")), Some((true, ""))));
    for uid in ["a", "b"] {
        let (attach, serve, prove) = (format!("attach {uid}"), format!("serve {uid}"), format!("prove {uid}"));
        in_order(&running.fake, &["rules 1", "destinations 2", &attach, &serve, &prove, "reap all but a,b"]);
    }
    in_order(&running.fake, &["destinations 2", "identities a,b"]);
    running.end().await;
}

#[tokio::test]
async fn one_bad_pod_delays_no_other_and_is_shown_with_its_reason() {
    let fake = Fake::default();
    fake.0.lock().unwrap().hang.insert("attach b".to_owned());
    fake.fails("attach c", usize::MAX);
    let nowhere = Workload { place: None, ..pod("d") };
    let unaddressed = Workload { addresses: vec![], ..pod("e") };
    let running = Running::start(&fake, snapshot(1, [pod("a"), pod("b"), pod("c"), nowhere, unaddressed]));
    running.until("a captured", |running| running.state("a") == Some((true, ""))).await;
    running.until("c shown", |running| running.state("c") == Some((false, "not_attached"))).await;
    running.until("d shown", |running| running.state("d") == Some((false, "place_unknown"))).await;
    running.until("e shown", |running| running.state("e") == Some((false, "no_address"))).await;
    assert_eq!(running.readiness.waiting_for(), ["pass"], "b was not tried to its end yet");
    assert!(!running.fake.done().iter().any(|done| done.starts_with("reap")));
    running.end().await;
}

#[tokio::test]
async fn what_fails_is_tried_again_until_it_works() {
    let fake = Fake::default();
    fake.fails("destinations 1", 1);
    fake.fails("attach a", 1);
    fake.fails("prove a", 1);
    let running = Running::start(&fake, snapshot(1, [pod("a")]));
    running.until("captured", |running| running.state("a") == Some((true, ""))).await;
    in_order(
        &running.fake,
        &["failed destinations 1", "destinations 1", "failed attach a", "attach a", "failed prove a", "prove a"],
    );
    assert_eq!(running.fake.count("attach a"), 2, "what a proof found wanting is put in order before the next");
    running.end().await;
}

#[tokio::test]
async fn older_connections_that_could_not_be_reset_are_reset_after_the_next_proof() {
    let fake = Fake::default();
    fake.fails("reset a", 1);
    let resets = |ready| Workload { ready, reset_on_enrol: true, ..pod("a") };
    let running = Running::start(&fake, snapshot(1, [resets(true)]));
    running.until("refused", |running| running.fake.has("failed reset a")).await;
    running.snapshots.send(snapshot(2, [resets(false)])).unwrap();
    running.until("reset", |running| running.fake.has("reset a")).await;
    in_order(&running.fake, &["failed reset a", "prove a", "reset a"]);
    running.end().await;
}

#[tokio::test]
async fn older_connections_are_reset_once_and_only_where_the_pod_asks() {
    let resets = Workload { reset_on_enrol: true, ..pod("a") };
    let running = Running::start(&Fake::default(), snapshot(1, [resets, pod("b")]));
    for uid in ["a", "b"] {
        running.until("captured", |running| running.state(uid) == Some((true, ""))).await;
    }
    running.until("reset", |running| running.fake.has("reset a")).await;
    in_order(&running.fake, &["prove a", "lane a", "reset a"]);
    running
        .snapshots
        .send(snapshot(2, [Workload { ready: false, reset_on_enrol: true, ..pod("a") }, pod("b")]))
        .unwrap();
    running.until("proven again", |running| running.fake.count("prove a") == 2).await;
    assert_eq!((running.fake.count("reset a"), running.fake.count("reset b")), (1, 0));
    running.end().await;
}

#[tokio::test]
async fn rules_that_the_kernel_did_not_take_whole_are_tried_again_and_hold_up_nothing() {
    let fake = Fake::default();
    fake.fails("rules 1", 1);
    let running = Running::start(&fake, snapshot(1, [pod("a")]));
    running.until("captured", |running| running.state("a") == Some((true, ""))).await;
    running.until("again", |running| running.fake.has("rules 1")).await;
    in_order(&running.fake, &["failed rules 1", "destinations 1", "rules 1"]);
    running.end().await;
}

#[tokio::test]
async fn a_pod_whose_proof_fails_loses_the_lane_and_one_of_a_stopping_agent_does_not() {
    let running = Running::start(&Fake::default(), snapshot(1, [pod("a"), pod("b")]));
    for uid in ["a", "b"] {
        running.until("captured", |running| running.state(uid) == Some((true, ""))).await;
    }
    running.fake.fails("prove a", 1);
    // A change of the pod is tried at once.
    running.snapshots.send(snapshot(2, [Workload { ready: false, ..pod("a") }, pod("b")])).unwrap();
    running.until("lost", |running| running.fake.has("no lane a")).await;
    running.until("back", |running| running.fake.count("lane a") == 2).await;
    let fake = running.end().await;
    assert_eq!((fake.count("no lane a"), fake.count("no lane b")), (1, 0));
}

#[tokio::test]
async fn without_destinations_no_pod_is_captured() {
    let fake = Fake::default();
    fake.fails("destinations 1", usize::MAX);
    let running = Running::start(&fake, snapshot(1, [pod("a")]));
    running.until("two tries", |running| running.fake.count("failed destinations 1") > 1).await;
    assert!(!running.fake.has("attach a"));
    assert_eq!(running.readiness.waiting_for(), ["pass"]);
    running.end().await;
}

#[tokio::test]
async fn a_gone_pod_is_cut_and_withdrawn_and_forgotten() {
    let fake = Fake::default();
    fake.fails("withdraw a", 1);
    let running = Running::start(&fake, snapshot(1, [pod("a")]));
    running.until("captured", |running| running.state("a") == Some((true, ""))).await;
    running.fake.0.lock().unwrap().carried.insert("a".to_owned(), 3);
    running.snapshots.send(snapshot(2, [])).unwrap();
    running.until("forgotten", |running| running.state("a").is_none()).await;
    in_order(
        &running.fake,
        &["rules 2", "destinations 0", "no lane a", "stop a", "cut a 3", "failed withdraw a", "withdraw a"],
    );
    running.until("identities dropped", |running| running.fake.has("identities ")).await;
    running.end().await;
}

#[tokio::test]
async fn a_pod_that_leaves_the_mesh_is_released_at_once_and_keeps_its_connections_until_they_end() {
    let fake = Fake::default();
    fake.fails("release a", 1);
    let running = Running::start(&fake, snapshot(1, [pod("a")]));
    running.until("captured", |running| running.state("a") == Some((true, ""))).await;
    running.fake.0.lock().unwrap().carried.insert("a".to_owned(), 1);
    running.snapshots.send(snapshot(2, [Workload { enrolled: false, ..pod("a") }])).unwrap();
    running.until("forgotten", |running| running.state("a").is_none()).await;
    in_order(&running.fake, &["prove a", "lane a", "rules 2", "no lane a", "failed release a", "release a", "stop a"]);
    assert!(!running.fake.has("withdraw a") && !running.fake.has("cut a 1"));
    running.fake.0.lock().unwrap().carried.clear();
    running.until("withdrawn", |running| running.fake.has("withdraw a")).await;
    // And back, the same pod.
    running.snapshots.send(snapshot(3, [pod("a")])).unwrap();
    running.until("captured again", |running| running.state("a") == Some((true, ""))).await;
    assert_eq!(running.fake.count("attach a"), 2);
    running.end().await;
}

#[tokio::test]
async fn a_pod_that_comes_back_while_it_leaves_is_attached_again() {
    let running = Running::start(&Fake::default(), snapshot(1, [pod("a")]));
    running.until("captured", |running| running.state("a") == Some((true, ""))).await;
    running.fake.0.lock().unwrap().carried.insert("a".to_owned(), 1);
    running.snapshots.send(snapshot(2, [Workload { enrolled: false, ..pod("a") }])).unwrap();
    running.until("forgotten", |running| running.state("a").is_none()).await;
    running.snapshots.send(snapshot(3, [pod("a")])).unwrap();
    running.until("captured again", |running| running.state("a") == Some((true, ""))).await;
    in_order(&running.fake, &["release a", "stop a", "attach a", "serve a", "prove a"]);
    assert!(!running.fake.has("withdraw a") && !running.fake.has("cut a 1"));
    running.end().await;
}

#[tokio::test]
async fn a_changed_pod_is_attached_anew_without_a_gap_and_others_are_left_alone() {
    let running = Running::start(&Fake::default(), snapshot(1, [pod("a"), pod("b")]));
    running.until("ready", |running| running.readiness.waiting_for().is_empty()).await;
    let unready = Workload { ready: false, ..pod("b") };
    running.snapshots.send(snapshot(2, [Workload { when_unattended: Unattended::Open, ..pod("a") }, unready])).unwrap();
    running.until("attached again", |running| running.fake.count("attach a") == 2).await;
    running.until("old one stopped", |running| running.fake.has("stop a")).await;
    in_order(&running.fake, &["serve a", "attach a", "serve a", "stop a"]);
    assert_eq!(running.fake.count("attach b"), 1);
    assert!(!running.fake.has("stop b"));
    running.end().await;
}

#[tokio::test]
async fn a_stop_gives_up_listeners_and_withdraws_nothing() {
    let fake = Fake::default();
    fake.0.lock().unwrap().hang.insert("attach b".to_owned());
    let running = Running::start(&fake, snapshot(1, [pod("a"), pod("b")]));
    running.until("captured", |running| running.state("a") == Some((true, ""))).await;
    let fake = running.end().await;
    in_order(&fake, &["stop a", "unlisten a"]);
    assert!(!fake.done().iter().any(|done| done.starts_with("withdraw")));
}

#[test]
fn only_this_nodes_pods_are_planned_and_those_on_the_hosts_network_never() {
    let elsewhere = Workload { node: "node-2".into(), ..pod("b") };
    let host = Workload { host_network: true, enrolled: false, ..pod("c") };
    let plain = Workload { enrolled: false, ..pod("d") };
    let plan = plan(&snapshot(1, [pod("a"), elsewhere, host, plain]), "node-1");
    assert_eq!(plan.len(), 2);
    assert!(matches!(plan["a"], Wanted::Enrolled(_)) && matches!(plan["d"], Wanted::Leaving(_)));
}

#[test]
fn backoff_doubles_up_to_its_end() {
    for failures in [1, 2, 3, 7, 40, u32::MAX] {
        let whole =
            limits::ENROL_BACKOFF_MIN.saturating_mul(1 << (failures - 1).min(16)).min(limits::ENROL_BACKOFF_MAX);
        for _ in 0..100 {
            assert!((whole / 2..=whole).contains(&backoff(failures)), "{failures}");
        }
    }
}
