//! The lane whole, against a kernel that is a table in memory.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    fake::Fake,
    table::{DENY_ALL, connection, kernel, snapshot, uid},
};
use crate::{
    cluster::Snapshot,
    life::lane::{Denied, Lane, Switch, Told},
    policy::{Denial, Rulebook},
    tunnel::Lane as _,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Notes what it is told, and how many connections the kernel had then.
#[derive(Debug)]
struct Heard {
    kernel: Fake,
    revoked: Mutex<Vec<(u64, usize)>>,
    denied: Mutex<Vec<Denied>>,
}

impl Told for Heard {
    fn denied(&self, denied: &Denied) {
        self.denied.lock().unwrap().push(denied.clone());
    }

    fn revoked(&self, id: u64, denial: &Denial) {
        assert_eq!(denial.reason(), "policy_denied");
        let open = self.kernel.inner().connections.len();
        self.revoked.lock().unwrap().push((id, open));
    }
}

struct World {
    kernel: Fake,
    rules: Arc<ArcSwap<Rulebook>>,
    heard: Arc<Heard>,
    lane: Lane<Fake>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl World {
    async fn start(policies: &[(&str, &str)]) -> Self {
        let kernel = kernel(1_000, 10);
        let rules = Arc::new(ArcSwap::from_pointee(Rulebook::default()));
        let heard = Arc::new(Heard { kernel: kernel.clone(), revoked: Mutex::default(), denied: Mutex::default() });
        let domain = "cluster.local".parse().unwrap();
        let told = Arc::clone(&heard) as Arc<dyn Told>;
        let (lane, misses) = Lane::new(kernel.clone(), Arc::clone(&rules), told, domain, "node-1".into());
        let stop = CancellationToken::new();
        let task = tokio::spawn(lane.clone().follow(misses, stop.clone()));
        let (doomed, result) = lane.enforce(snapshot(policies)).await;
        result.unwrap();
        assert!(doomed.is_empty());
        for id in 1..=4 {
            lane.capture(&uid(id), true).await;
        }
        Self { kernel, rules, heard, lane, stop, task }
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < PATIENCE, "{what}: {:?}", self.lane.report());
            sleep(Duration::from_millis(2)).await;
        }
    }

    fn held(&self) -> usize {
        self.kernel.inner().table.len()
    }

    async fn end(self) -> Arc<Heard> {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap();
        self.heard
    }
}

#[tokio::test]
async fn a_miss_proves_the_path_once_and_gives_the_kernel_a_verdict() {
    let world = World::start(&[]).await;
    world.lane.missed(&uid(1), &uid(2), 80);
    world.until("a verdict", |world| world.held() == 1).await;
    world.lane.missed(&uid(1), &uid(2), 81);
    world.until("another", |world| world.held() == 2).await;
    assert_eq!(world.kernel.inner().proofs, 1);
    let report = world.lane.report().counts;
    assert_eq!((report.pairs, report.allowed, report.denied, report.misses), (2, 2, 0, 2));
    world.end().await;
}

#[tokio::test]
async fn a_crooked_path_and_a_pod_without_link_are_told_of() {
    let world = World::start(&[]).await;
    world
        .kernel
        .inner()
        .crooked
        .extend([(uid(1).to_string(), uid(2).to_string()), (uid(3).to_string(), uid(3).to_string())]);
    world.lane.capture(&uid(3), true).await;
    world.lane.capture(&uid(4), false).await;
    world.lane.missed(&uid(1), &uid(2), 80);
    world.until("the fault", |world| !world.lane.report().paths.is_empty()).await;
    let report = world.lane.report();
    let fault = &report.paths[0];
    assert_eq!((&*fault.from, &*fault.to, fault.reason), ("shop/pod-1", "shop/pod-2", "probe"));
    let reason = |id: u8| match &report.pods[&uid(id)] {
        Switch::On => "",
        Switch::Off { reason, .. } => reason,
    };
    assert_eq!([1, 2, 3, 4].map(reason), ["", "", "probe", "uncaptured"]);
    assert_eq!(world.held(), 0);
    world.end().await;
}

#[tokio::test]
async fn connections_that_a_change_denies_are_told_of_and_then_closed_in_time() {
    let world = World::start(&[]).await;
    world.kernel.inner().connections =
        (0..1_000).map(|client| connection(1, if client % 2 == 0 { 2 } else { 3 }, 80, 10_000 + client)).collect();
    let only_two = "{action: DENY, selector: {matchLabels: {app: two}}, rules: [{}]}";
    let with = snapshot(&[("shop/two", only_two)]);
    let mut next = Snapshot {
        workloads: with.workloads.clone(),
        authorization_policies: with.authorization_policies.clone(),
        ..Snapshot::default()
    };
    let mut two = (*next.workloads[&uid(2)]).clone();
    two.labels.insert("app".into(), "two".into());
    next.workloads.insert(uid(2), Arc::new(two));
    let start = Instant::now();
    let (doomed, result) = world.lane.enforce(Arc::new(next)).await;
    result.unwrap();
    assert_eq!(world.lane.end(doomed).await, 500);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let told = world.heard.revoked.lock().unwrap().clone();
    assert_eq!(told.len(), 500);
    assert!(told.iter().all(|(id, open)| id % 2 == 0 && *open == 1_000), "told before anything was closed");
    assert_eq!(world.kernel.inner().connections.len(), 500);
    assert_eq!(world.lane.cut(&uid(3)).await, 500);
    assert_eq!(world.lane.cut(&uid(3)).await, 0);
    world.end().await;
}

#[tokio::test]
async fn what_the_kernel_denies_is_told_with_its_pair_and_the_rules_in_force_are_everyones() {
    let world = World::start(&[DENY_ALL]).await;
    assert_eq!(world.rules.load().problems().len(), 0);
    world.lane.missed(&uid(1), &uid(2), 80);
    world.until("a verdict", |world| world.held() == 1).await;
    let counter = world.kernel.inner().table.values().next().unwrap().counter;
    world.kernel.inner().denials[counter as usize] += 3;
    let heard = world.end().await;
    let denied = heard.denied.lock().unwrap().clone();
    let told: Vec<_> = denied.iter().map(|one| (&*one.refused.source.uid, one.refused.port, one.connections)).collect();
    assert_eq!(told, [("uid-pod-1", 80, 3)]);
}
