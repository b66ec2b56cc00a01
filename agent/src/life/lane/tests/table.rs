//! The table's edges: what fails, what is full, what is over.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Instant};

use heddle_common::{Address, Attestation, Pair, Tuple, Verdict, attested_by, verdict};

use super::fake::{Fake, Operation};
use crate::{
    capture::{LaneFault, ResidentPod, WorkloadId},
    cluster::{PolicyGap, Snapshot, Workload},
    life::{
        lane::{pairs::Seen, table::Table},
        limits,
    },
    policy::{Denial, Rulebook, tests::authorization},
};

/// Addresses end in the pod's id.
pub fn pod(id: u8) -> Workload {
    Workload { addresses: vec![IpAddr::from([10, 0, 0, id])], ..Workload::named("shop", &format!("pod-{id}")) }
}

pub fn uid(id: u8) -> Arc<str> {
    pod(id).uid
}

pub fn resident(id: u8) -> ResidentPod {
    let Workload { uid, addresses, .. } = pod(id);
    ResidentPod { uid, id: WorkloadId(id.into()), slot: id.into(), addresses, attestable: true }
}

pub fn seen(from: u8, to: u8, port: u16) -> Seen {
    ((uid(from), uid(to)), port)
}

/// Pods 1 to 4, and policies by `namespace/name` and YAML of their specs.
pub fn snapshot(policies: &[(&str, &str)]) -> Arc<Snapshot> {
    Arc::new(Snapshot {
        workloads: (1..=4).map(|id| (uid(id), Arc::new(pod(id)))).collect(),
        authorization_policies: policies.iter().map(|(name, spec)| authorization(name, spec)).collect(),
        root_namespace: "istio-system".into(),
        ..Snapshot::default()
    })
}

pub const DENY_ALL: (&str, &str) = ("shop/deny", "{action: DENY, rules: [{}]}");
const DENY_80: (&str, &str) = ("shop/deny-80", "{action: DENY, rules: [{to: [{operation: {ports: ['80']}}]}]}");

pub fn kernel(capacity: usize, counters: usize) -> Fake {
    let kernel = Fake::new(capacity, counters);
    kernel.inner().residents = (1..=4).map(resident).collect();
    kernel
}

fn table(kernel: &Fake) -> Table<Fake> {
    Table::new(kernel.clone(), "cluster.local".parse().unwrap(), "node-1".into())
}

fn change(table: &mut Table<Fake>, kernel: &Fake, snapshot: Arc<Snapshot>) -> Result<(), &'static str> {
    let rules = Arc::new(Rulebook::compile(&snapshot));
    let in_force = || kernel.inner().done.push(Operation::Rules);
    table.change(snapshot, rules, in_force).map_err(|error| error.reason())
}

/// All pods are captured, and every path that is asked for is straight.
fn learn(table: &mut Table<Fake>, misses: &[Seen]) {
    for id in 1..=4 {
        table.capture(&uid(id), Some(Ok(())));
    }
    for path in table.learn(misses, Instant::now()) {
        table.path(&path, Ok(()), Instant::now());
    }
}

fn started(kernel: &Fake, policies: &[(&str, &str)]) -> Table<Fake> {
    let mut table = table(kernel);
    change(&mut table, kernel, snapshot(policies)).unwrap();
    table
}

fn held(kernel: &Fake) -> Vec<(u64, u64, u16, u32)> {
    let table = kernel.inner().table.clone();
    table.iter().map(|(pair, held)| (pair.source, pair.destination, pair.port, held.action)).collect()
}

#[test]
fn what_a_change_forbids_goes_before_the_rules_come_and_what_it_allows_comes_after() {
    let kernel = kernel(10, 10);
    let mut table = started(&kernel, &[DENY_80]);
    learn(&mut table, &[seen(1, 2, 80), seen(1, 2, 81)]);
    assert_eq!(held(&kernel), [(1, 2, 80, verdict::DENY), (1, 2, 81, verdict::ALLOW)]);
    kernel.inner().done.clear();
    let deny_81 = ("shop/deny-81", "{action: DENY, rules: [{to: [{operation: {ports: ['81']}}]}]}");
    change(&mut table, &kernel, snapshot(&[deny_81])).unwrap();
    let done = kernel.inner().done.clone();
    let (eighty, other) = (Pair::new(1, 2, 80), Pair::new(1, 2, 81));
    assert_eq!(
        done,
        [
            Operation::Remove(eighty),
            Operation::Remove(other),
            Operation::Rules,
            Operation::Put(eighty, Verdict { action: verdict::ALLOW, counter: 0 }),
            Operation::Put(other, Verdict { action: verdict::DENY, counter: 1 }),
        ]
    );
}

#[test]
fn a_change_that_changes_nothing_leaves_the_kernel_alone() {
    let kernel = kernel(10, 10);
    let mut table = started(&kernel, &[DENY_80]);
    learn(&mut table, &[seen(1, 2, 80), seen(1, 2, 81)]);
    kernel.inner().done.clear();
    change(&mut table, &kernel, snapshot(&[DENY_80])).unwrap();
    learn(&mut table, &[seen(1, 2, 80), seen(1, 2, 81)]);
    assert_eq!(kernel.inner().done, [Operation::Rules]);
}

#[test]
fn what_can_not_be_removed_is_told_and_tried_again() {
    let kernel = kernel(10, 10);
    let mut table = started(&kernel, &[]);
    learn(&mut table, &[seen(1, 2, 80)]);
    kernel.inner().removals_fail = true;
    assert_eq!(change(&mut table, &kernel, snapshot(&[DENY_ALL])), Err("map"));
    assert_eq!(table.counts().failed, 1);
    kernel.inner().removals_fail = false;
    change(&mut table, &kernel, snapshot(&[DENY_ALL])).unwrap();
    assert_eq!(held(&kernel), [(1, 2, 80, verdict::DENY)]);
}

#[test]
fn a_full_table_is_counted_and_asked_once() {
    let kernel = kernel(1, 10);
    let mut table = started(&kernel, &[]);
    learn(&mut table, &[seen(1, 2, 80), seen(1, 2, 81), seen(1, 2, 82)]);
    assert_eq!((held(&kernel).len(), table.counts().full, table.sizes()), (1, 1, (3, 1, 0)));
    kernel.inner().capacity = 10;
    change(&mut table, &kernel, snapshot(&[])).unwrap();
    assert_eq!(held(&kernel).len(), 3);
}

#[test]
fn without_a_counter_the_agent_denies() {
    let kernel = kernel(10, 1);
    let mut table = started(&kernel, &[DENY_80]);
    learn(&mut table, &[seen(1, 2, 80)]);
    learn(&mut table, &[seen(1, 3, 80), seen(1, 3, 81)]);
    assert_eq!((held(&kernel).len(), table.counts().exhausted), (2, 1), "one denied, one allowed");
    // The counter of a pair that is gone is read for it, and serves the other.
    kernel.inner().denials[0] = 5;
    table.capture(&uid(2), None);
    learn(&mut table, &[seen(1, 3, 80)]);
    assert!(held(&kernel).contains(&(1, 3, 80, verdict::DENY)));
    let denied = table.denied().unwrap();
    let told: Vec<_> = denied.iter().map(|one| (&*one.refused.destination.uid, one.connections)).collect();
    assert_eq!(told, [("uid-pod-2", 5)]);
}

#[test]
fn a_pod_that_is_not_proven_any_more_has_no_verdict() {
    let kernel = kernel(10, 10);
    let mut table = started(&kernel, &[]);
    learn(&mut table, &[seen(1, 2, 80), seen(2, 1, 80), seen(3, 4, 80)]);
    table.capture(&uid(2), None);
    assert_eq!(held(&kernel), [(3, 4, 80, verdict::ALLOW)]);
    table.capture(&uid(3), Some(Err(LaneFault::Probe("two ways lead into it".into()))));
    assert_eq!(held(&kernel), []);
    // What was seen is there again with the proof.
    table.capture(&uid(2), Some(Ok(())));
    assert_eq!(held(&kernel), [(1, 2, 80, verdict::ALLOW), (2, 1, 80, verdict::ALLOW)]);
}

#[test]
fn a_pod_whose_sockets_can_not_be_told_has_no_verdict() {
    let kernel = kernel(10, 10);
    kernel.inner().residents[1].attestable = false;
    let mut table = started(&kernel, &[]);
    learn(&mut table, &[seen(1, 2, 80), seen(2, 1, 80), seen(1, 3, 80)]);
    assert_eq!(held(&kernel), [(1, 3, 80, verdict::ALLOW)]);
}

#[test]
fn a_path_that_is_not_straight_is_told_of_and_has_no_verdict() {
    let kernel = kernel(10, 10);
    let mut table = started(&kernel, &[]);
    for id in [1, 2] {
        table.capture(&uid(id), Some(Ok(())));
    }
    let now = Instant::now();
    let asked = table.learn(&[seen(1, 2, 80)], now);
    assert_eq!(asked.len(), 1);
    assert!(table.learn(&[seen(1, 2, 80)], now).is_empty(), "under way");
    table.path(&asked[0], Err(LaneFault::Probe("rewritten".into())), now);
    assert!(table.learn(&[seen(1, 2, 80)], now).is_empty(), "failed a moment ago");
    assert_eq!(held(&kernel), []);
    let faults = table.faults();
    assert_eq!((&*faults[0].0.name, &*faults[0].1.name, faults[0].2.reason()), ("pod-1", "pod-2", "probe"));
    let asked = table.learn(&[seen(1, 2, 80)], now + limits::LANE_PATH_RETRY_MIN);
    table.path(&asked[0], Ok(()), now);
    assert_eq!((held(&kernel).len(), table.faults().len()), (1, 0));
}

#[test]
fn before_the_first_rules_nothing_is_remembered() {
    let kernel = kernel(10, 10);
    let mut table = table(&kernel);
    learn(&mut table, &[seen(1, 2, 80)]);
    assert_eq!(held(&kernel), []);
}

#[test]
fn another_agent_keeps_what_it_decides_alike_and_removes_the_rest() {
    let kernel = kernel(20, 10);
    let mut first = started(&kernel, &[DENY_80]);
    learn(&mut first, &[seen(1, 2, 80), seen(1, 2, 81), seen(2, 3, 80), seen(3, 4, 81)]);
    let counter = kernel.inner().table[&Pair::new(2, 3, 80)].counter;
    kernel.inner().denials[counter as usize] = 7;
    let garbage = [
        (Pair::new(99, 1, 81), Verdict { action: verdict::ALLOW, counter: 0 }),
        (Pair::new(1, 4, 15_008), Verdict { action: verdict::ALLOW, counter: 0 }),
        (Pair::new(1, 4, 82), Verdict { action: 77, counter: 0 }),
        (Pair::new(1, 4, 80), Verdict { action: verdict::DENY, counter: 1_000_000 }),
    ];
    kernel.inner().table.extend(garbage);
    // Not attached by the second agent yet.
    let pinned = std::mem::take(&mut kernel.inner().residents);
    kernel.inner().pinned = pinned;
    kernel.inner().done.clear();
    let mut second = table(&kernel);
    let only_pod_2 = (
        "shop/two",
        "{action: DENY, rules: [{from: [{source: {ipBlocks: [10.0.0.1]}}], to: [{operation: {ports: ['81']}}]}]}",
    );
    change(&mut second, &kernel, snapshot(&[DENY_80, only_pod_2])).unwrap();
    let allow = Verdict { action: verdict::ALLOW, counter: 0 };
    let after: BTreeMap<_, _> = kernel.inner().table.clone();
    assert_eq!(
        after.iter().map(|(pair, held)| ((pair.source, pair.destination, pair.port), held.action)).collect::<Vec<_>>(),
        [
            ((1, 2, 80), verdict::DENY),
            // Allowed before, and denied by what came while no agent ran.
            ((1, 2, 81), verdict::DENY),
            // It was no verdict of an agent's, and the pair counts as seen.
            ((1, 4, 80), verdict::DENY),
            ((1, 4, 82), verdict::ALLOW),
            ((2, 3, 80), verdict::DENY),
            ((3, 4, 81), verdict::ALLOW),
        ]
    );
    assert_eq!(after[&Pair::new(3, 4, 81)], allow);
    let kept = Pair::new(2, 3, 80);
    assert!(
        !kernel
            .inner()
            .done
            .iter()
            .any(|done| matches!(done, Operation::Remove(pair) | Operation::Put(pair, _) if *pair == kept))
    );
    assert_eq!(second.denied().unwrap(), [], "what was denied before is not told again");
    // Nobody could be attached: what stood by an earlier proof goes.
    second.capture(&uid(2), None);
    assert!(held(&kernel).iter().all(|(from, to, ..)| *from != 2 && *to != 2));
}

pub fn connection(from: u8, to: u8, port: u16, client: u16) -> (Tuple, Attestation) {
    let tuple = Tuple {
        source: Address::v4([10, 0, 0, from]),
        destination: Address::v4([10, 0, 0, to]),
        source_port: client,
        destination_port: port,
        padding: 0,
    };
    let by = Attestation {
        by: attested_by::KERNEL,
        source: from.into(),
        destination: to.into(),
        id: client.into(),
        ..Attestation::by_agent(to.into())
    };
    (tuple, by)
}

fn forbidden(table: &mut Table<Fake>) -> Vec<(u16, &'static str)> {
    table.forbidden().unwrap().iter().map(|one| (one.tuple.source_port, one.denial.reason())).collect()
}

#[test]
fn open_connections_are_decided_by_who_was_attested_and_not_by_whose_the_address_is() {
    let kernel = kernel(10, 10);
    let from_one = "{action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/pod-1]}}]}]}";
    let mut table = started(&kernel, &[]);
    // 3's connection comes from an address that is 1's by now.
    let (mut tuple, by) = connection(3, 2, 80, 1_003);
    tuple.source = Address::v4([10, 0, 0, 1]);
    let stranger = connection(77, 2, 80, 1_077);
    kernel.inner().connections = vec![
        connection(1, 2, 80, 1_001),
        connection(1, 2, 81, 1_002),
        (tuple, by),
        connection(2, 1, 80, 1_004),
        stranger,
    ];
    assert_eq!(forbidden(&mut table), []);
    change(&mut table, &kernel, snapshot(&[("shop/one", from_one)])).unwrap();
    assert_eq!(forbidden(&mut table), [(1_001, "policy_denied"), (1_002, "policy_denied")]);
}

#[test]
fn a_file_that_can_not_be_read_cuts_nothing_and_a_pod_that_is_gone_everything() {
    let kernel = kernel(10, 10);
    let mut table = started(&kernel, &[]);
    kernel.inner().connections = vec![connection(1, 2, 80, 1_001), connection(3, 4, 80, 1_002)];
    let mut gap = Snapshot { workloads: snapshot(&[]).workloads.clone(), ..Snapshot::default() };
    gap.policy_gaps = vec![Arc::new(PolicyGap { source: "file".into(), namespace: None })];
    change(&mut table, &kernel, Arc::new(gap)).unwrap();
    assert_eq!(forbidden(&mut table), []);
    let mut without = Snapshot { workloads: snapshot(&[]).workloads.clone(), ..Snapshot::default() };
    without.workloads.remove(&uid(2));
    kernel.inner().residents.retain(|pod| *pod.uid != *uid(2));
    change(&mut table, &kernel, Arc::new(without)).unwrap();
    let doomed = table.forbidden().unwrap();
    assert_eq!(doomed.len(), 1);
    assert_eq!(doomed[0].denial, Denial::UnknownWorkload { uid: uid(2) });
}

#[test]
fn a_pod_that_this_agent_meets_first_may_have_connections_of_an_earlier_one() {
    let kernel = kernel(10, 10);
    kernel.inner().pinned = vec![resident(1), resident(2)];
    kernel.inner().residents = vec![resident(3)];
    let mut table = started(&kernel, &[]);
    assert!(table.capture(&uid(1), Some(Ok(()))), "pinned");
    assert!(!table.capture(&uid(1), Some(Ok(()))));
    assert!(!table.capture(&uid(3), Some(Ok(()))), "met with the first change");
    kernel.inner().residents.push(resident(4));
    assert!(table.capture(&uid(4), Some(Ok(()))));
}
