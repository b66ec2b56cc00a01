//! The kernel's table against the engine, through random sequences of everything that can change.
//!
//! After every step each entry must be what the engine decides now for the pods that have its ids, and at the moment when a new rulebook
//! comes into force there must be no entry that it would not produce. Expectations are made from the objects of the test and
//! [`decide`] alone, naively.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use heddle_common::{Pair, Verdict, verdict};
use proptest::{prelude::*, sample::select};

use super::fake::{Fake, Operation};
use crate::{
    capture::{LaneFault, ResidentPod, WorkloadId},
    cluster::{
        PolicyGap, SameNode, Snapshot, Workload,
        kinds::{AuthorizationPolicy, PeerAuthentication},
    },
    identity::{SpiffeId, TrustDomain},
    life::lane::table::Table,
    policy::{
        Denial, Request, Rulebook, decide,
        tests::{
            ROOT,
            property::{authorization, gaps, peer_authentication},
        },
    },
};

const PORTS: [u16; 5] = [80, 8080, 9090, 7, 15_008];
/// Addresses that a pod of a place may have: a later pod has those of an earlier one.
const PLACES: [[&str; 2]; 4] =
    [["10.0.0.1", "fd00::1"], ["10.0.1.1", "fd01::1"], ["10.0.0.2", "fd00::2"], ["10.0.1.2", "fd01::2"]];

#[derive(Debug, Clone)]
enum Step {
    AddPolicy(Box<AuthorizationPolicy>),
    DropPolicy(usize),
    AddPeer(Box<PeerAuthentication>),
    DropPeer(usize),
    Gaps(Vec<Option<&'static str>>),
    Label(usize, Option<&'static str>),
    Account(usize, &'static str),
    Families(usize, bool, bool),
    SameNode(usize, SameNode),
    Enrolled(usize, bool),
    /// The pod goes; its verdicts too, in whichever order the two are noticed.
    Gone {
        place: usize,
        snapshot_first: bool,
    },
    /// Another pod in its place, or one where there is none.
    Another(usize),
    /// The kernel's record of the pod is brought up to what the cluster says.
    Attach(usize),
    Captured(usize, bool),
    Straight(usize, bool),
    Learn(Vec<(usize, usize, u16)>),
    /// What the proofs of paths that were asked for come to.
    Proofs(bool),
    Capacity(usize),
    /// Another agent, and a policy that came while none ran.
    Restart(Option<Box<AuthorizationPolicy>>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || 0..PLACES.len();
    let miss = (place(), place(), select(PORTS.as_slice()));
    let step = prop_oneof![
        10 => authorization().prop_map(|policy| Step::AddPolicy(Box::new(policy))),
        9 => (0_usize..8).prop_map(Step::DropPolicy),
        2 => peer_authentication().prop_map(|peer| Step::AddPeer(Box::new(peer))),
        1 => (0_usize..8).prop_map(Step::DropPeer),
        3 => gaps().prop_map(Step::Gaps),
        4 => (place(), select(vec![None, Some("web"), Some("db")])).prop_map(|(at, app)| Step::Label(at, app)),
        3 => (place(), select(vec!["web", "db"])).prop_map(|(at, account)| Step::Account(at, account)),
        3 => (place(), any::<bool>(), any::<bool>()).prop_map(|(at, four, six)| Step::Families(at, four, six)),
        3 => (place(), select(vec![SameNode::Kernel, SameNode::Kernel, SameNode::Mtls]))
            .prop_map(|(at, said)| Step::SameNode(at, said)),
        3 => (place(), prop::bool::weighted(0.7)).prop_map(|(at, enrolled)| Step::Enrolled(at, enrolled)),
        3 => (place(), any::<bool>()).prop_map(|(place, snapshot_first)| Step::Gone { place, snapshot_first }),
        6 => place().prop_map(Step::Another),
        6 => place().prop_map(Step::Attach),
        6 => (place(), prop::bool::weighted(0.8)).prop_map(|(at, captured)| Step::Captured(at, captured)),
        2 => (place(), prop::bool::weighted(0.7)).prop_map(|(at, straight)| Step::Straight(at, straight)),
        20 => prop::collection::vec(miss, 1..12).prop_map(Step::Learn),
        8 => prop::bool::weighted(0.8).prop_map(Step::Proofs),
        1 => select(vec![0_usize, 3, 1_000]).prop_map(Step::Capacity),
        3 => prop::option::of(authorization().prop_map(Box::new)).prop_map(Step::Restart),
    ];
    prop::collection::vec(step, 10..60)
}

#[derive(Debug)]
struct Pod {
    workload: Workload,
    id: Option<u64>,
    /// As the kernel's record has them.
    attached: Vec<IpAddr>,
    /// Attached by this agent, not only pinned by an earlier one.
    live: bool,
    straight: bool,
}

/// How often something was seen.
pub type Met = BTreeMap<&'static str, u64>;

struct Test {
    kernel: Fake,
    table: Table<Fake>,
    pods: Vec<Option<Pod>>,
    policies: Vec<AuthorizationPolicy>,
    peers: Vec<PeerAuthentication>,
    gaps: Vec<Option<&'static str>>,
    /// Whether they can take the lane.
    captured: BTreeMap<Arc<str>, bool>,
    inherited: HashSet<Arc<str>>,
    proven: HashSet<(u64, u64)>,
    asked: Vec<super::super::table::Unproven>,
    learnt: BTreeSet<(Arc<str>, Arc<str>, u16)>,
    snapshot: Arc<Snapshot>,
    rules: Arc<Rulebook>,
    made: u64,
    /// Nothing was refused for want of room, so everything that may be there must be.
    roomy: bool,
    met: Met,
}

fn trust_domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

impl Test {
    fn new(counters: usize) -> Self {
        let kernel = Fake::new(1_000, counters);
        let mut test = Self {
            table: Table::new(kernel.clone(), trust_domain(), "node-1".into()),
            kernel,
            pods: Vec::new(),
            policies: Vec::new(),
            peers: Vec::new(),
            gaps: Vec::new(),
            captured: BTreeMap::new(),
            inherited: HashSet::new(),
            proven: HashSet::new(),
            asked: Vec::new(),
            learnt: BTreeSet::new(),
            snapshot: Arc::default(),
            rules: Arc::default(),
            made: 0,
            roomy: counters > 100,
            met: Met::new(),
        };
        test.pods.resize_with(PLACES.len(), || None);
        for at in 0..PLACES.len() {
            test.another(at);
        }
        test.change();
        for at in 0..PLACES.len() {
            test.attach(at);
            test.capture(at, true);
        }
        test.learn(&[(0, 1, 80), (1, 0, 80), (2, 3, 8080), (3, 2, 9090), (0, 3, 80), (2, 1, 8080)]);
        test.proofs(true);
        test
    }

    fn another(&mut self, at: usize) {
        self.made += 1;
        let (namespace, app) = [("shop", "web"), ("bank", "db"), ("shop", "db")][at % 3];
        let workload = Workload {
            uid: format!("pod-{}", self.made).into(),
            addresses: PLACES[at].iter().map(|address| address.parse().unwrap()).collect(),
            labels: [("app".to_owned(), app.to_owned())].into(),
            service_account: app.into(),
            ..Workload::named(namespace, &format!("{app}-{}", self.made))
        };
        self.pods[at] = Some(Pod { workload, id: None, attached: Vec::new(), live: false, straight: true });
    }

    /// Brings the kernel's record of the pod up to date.
    fn attach(&mut self, at: usize) {
        let Some(pod) = self.pods[at].as_mut().filter(|pod| pod.workload.enrolled) else { return };
        if !self.snapshot.workloads.contains_key(&pod.workload.uid) {
            return;
        }
        if pod.id.is_none() {
            self.made += 1;
            pod.id = Some(self.made);
        }
        pod.attached.clone_from(&pod.workload.addresses);
        pod.live = true;
        self.residents();
    }

    fn residents(&mut self) {
        let resident = |(slot, pod): (usize, &Option<Pod>)| {
            let pod = pod.as_ref()?;
            Some(ResidentPod {
                uid: Arc::clone(&pod.workload.uid),
                id: WorkloadId(pod.id?),
                slot: u32::try_from(slot).unwrap(),
                addresses: pod.attached.clone(),
                attestable: true,
            })
        };
        let pinned: Vec<_> = self.pods.iter().enumerate().filter_map(resident).collect();
        let live = |pod: &&ResidentPod| self.by_id(pod.id.0).is_some_and(|pod| pod.live);
        let residents = pinned.iter().filter(live).cloned().collect();
        let mut kernel = self.kernel.inner();
        (kernel.residents, kernel.pinned) = (residents, pinned);
    }

    /// As a keeper tells of it: only of a pod that is attached.
    fn capture(&mut self, at: usize, proven: bool) {
        let Some(pod) = self.pods[at].as_ref().filter(|pod| pod.live || !proven && pod.id.is_some()) else { return };
        let (uid, straight) = (pod.workload.uid.clone(), pod.straight);
        self.tell(&uid, proven.then_some(straight));
    }

    fn tell(&mut self, uid: &Arc<str>, proof: Option<bool>) {
        self.inherited.remove(uid);
        match proof {
            Some(straight) => self.captured.insert(Arc::clone(uid), straight),
            None => self.captured.remove(uid),
        };
        let fault = || LaneFault::Probe("on purpose".into());
        self.table.capture(uid, proof.map(|straight| if straight { Ok(()) } else { Err(fault()) }));
    }

    fn learn(&mut self, misses: &[(usize, usize, u16)]) {
        // Nobody else's connections can come to the agent.
        let known = |pod: &&Pod| pod.live || self.inherited.contains(&pod.workload.uid);
        let uid = |at: usize| self.pods[at].as_ref().filter(known).map(|pod| Arc::clone(&pod.workload.uid));
        let mut seen = Vec::new();
        for (from, to, port) in misses {
            let (Some(from), Some(to)) = (uid(*from), uid(*to)) else { continue };
            self.learnt.insert((Arc::clone(&from), Arc::clone(&to), *port));
            seen.push(((from, to), *port));
        }
        self.asked.extend(self.table.learn(&seen, Instant::now()));
    }

    fn proofs(&mut self, good: bool) {
        for path in std::mem::take(&mut self.asked) {
            let result = if good { Ok(()) } else { Err(LaneFault::Probe("on purpose".into())) };
            if good {
                self.proven.insert(path.ids);
            }
            self.table.path(&path, result, Instant::now());
        }
    }

    /// The cluster as the test has it comes into force.
    fn change(&mut self) {
        let gap = |namespace: &Option<&str>| PolicyGap { source: "f".into(), namespace: namespace.map(Arc::from) };
        let workloads = self.pods.iter().flatten().map(|pod| Arc::new(pod.workload.clone()));
        let snapshot = Arc::new(Snapshot {
            workloads: workloads.map(|workload| (Arc::clone(&workload.uid), workload)).collect(),
            authorization_policies: self.policies.iter().cloned().map(Arc::new).collect(),
            peer_authentications: self.peers.iter().cloned().map(Arc::new).collect(),
            policy_gaps: self.gaps.iter().map(gap).map(Arc::new).collect(),
            root_namespace: ROOT.into(),
            ..Snapshot::default()
        });
        let rules = Arc::new(Rulebook::compile(&snapshot));
        (self.snapshot, self.rules) = (Arc::clone(&snapshot), Arc::clone(&rules));
        let there = |uid: &Arc<str>| snapshot.workloads.contains_key(uid);
        let enrolled = |uid: &Arc<str>| snapshot.workloads.get(uid).is_some_and(|workload| workload.enrolled);
        self.captured.retain(|uid, _| there(uid) && (enrolled(uid) || !self.inherited.contains(uid)));
        self.inherited.retain(enrolled);
        // What was shown of a pod that is not known any more is forgotten.
        let known = |pod: &&Pod| pod.live || self.inherited.contains(&pod.workload.uid);
        let ids: HashSet<u64> = self.pods.iter().flatten().filter(known).filter_map(|pod| pod.id).collect();
        self.proven.retain(|(from, to)| ids.contains(from) && ids.contains(to));
        self.learnt.retain(|(from, to, _)| there(from) && there(to));
        self.kernel.inner().done.clear();
        let mut table = std::mem::replace(&mut self.table, Table::new(self.kernel.clone(), trust_domain(), "".into()));
        let changed = table.change(snapshot, rules, || {
            self.kernel.inner().done.push(Operation::Rules);
            // Everything that is left is right already.
            self.sound("as the rules come into force");
        });
        self.table = table;
        changed.unwrap();
        let inner = self.kernel.inner();
        let at = inner.done.iter().position(|done| *done == Operation::Rules).unwrap();
        let early = inner.done[..at].iter().find(|done| matches!(done, Operation::Put(..)));
        assert_eq!(early, None, "given to the kernel before the rules were in force");
    }

    fn restart(&mut self) {
        self.captured.clear();
        self.proven.clear();
        self.learnt.clear();
        self.asked.clear();
        let left: Vec<_> = self.kernel.inner().table.keys().copied().collect();
        for pair in left {
            let uid =
                |id: u64| self.pods.iter().flatten().find(|pod| pod.id == Some(id)).map(|pod| pod.workload.uid.clone());
            if let (Some(from), Some(to)) = (uid(pair.source), uid(pair.destination)) {
                self.captured.extend([(Arc::clone(&from), true), (Arc::clone(&to), true)]);
                self.proven.insert((pair.source, pair.destination));
                self.learnt.insert((from, to, pair.port));
            }
        }
        for pod in self.pods.iter_mut().flatten() {
            pod.live = false;
        }
        self.residents();
        self.inherited =
            self.pods.iter().flatten().filter(|pod| pod.id.is_some()).map(|pod| pod.workload.uid.clone()).collect();
        self.table = Table::new(self.kernel.clone(), trust_domain(), "node-1".into());
        self.change();
    }

    fn by_id(&self, id: u64) -> Option<&Pod> {
        self.pods.iter().flatten().find(|pod| pod.id == Some(id))
    }

    /// What the engine decides for every connection between two pods, if it is one thing: `None` where it is not, or where the pods may
    /// not take the lane.
    fn expected(&self, from: &Pod, to: &Pod, port: u16) -> Option<Result<(), Denial>> {
        let may = |pod: &Pod| {
            let workload = self.snapshot.workloads.get(&pod.workload.uid)?;
            let on = workload.enrolled && workload.same_node == SameNode::Kernel;
            let addresses: BTreeSet<IpAddr> = workload.addresses.iter().chain(&pod.attached).copied().collect();
            (on && self.captured.get(&pod.workload.uid) == Some(&true)).then(|| (Arc::clone(workload), addresses))
        };
        let ((source, own), (destination, others)) = (may(from)?, may(to)?);
        let allowed_port = ![0, 15_001, 15_006, 15_008].contains(&port);
        if !self.proven.contains(&(from.id?, to.id?)) || from.workload.uid == to.workload.uid || !allowed_port {
            return None;
        }
        let principal = SpiffeId::new(&trust_domain(), &source.namespace, &source.service_account).unwrap();
        let mut answers = Vec::new();
        for source_ip in &own {
            for destination_ip in others.iter().filter(|other| other.is_ipv4() == source_ip.is_ipv4()) {
                let request = Request {
                    principal: Some(principal.clone()),
                    source_ip: *source_ip,
                    destination: Arc::clone(&destination),
                    destination_ip: *destination_ip,
                    destination_port: port,
                };
                answers.push(decide(&self.rules, &request).map(drop));
            }
        }
        let first = answers.first()?.clone();
        let known = !matches!(first, Err(Denial::Incomplete { .. } | Denial::UnknownWorkload { .. }));
        (known && answers.iter().all(|answer| *answer == first)).then_some(first)
    }

    /// Every entry of the kernel's table is what the engine decides now.
    fn sound(&self, when: &str) {
        let table = self.kernel.inner().table.clone();
        for (pair, held) in &table {
            let (from, to) = (self.by_id(pair.source), self.by_id(pair.destination));
            let (Some(from), Some(to)) = (from, to) else { panic!("{when}: nobody has the ids of {pair:?}") };
            let answer = self.expected(from, to, pair.port);
            let right = match &answer {
                None => false,
                Some(Ok(())) => held.action == verdict::ALLOW,
                Some(Err(_)) => held.action == verdict::DENY,
            };
            assert!(right, "{when}: {pair:?} is {held:?} and should be {answer:?}");
        }
    }

    fn check(&mut self) {
        self.sound("after the step");
        let table = self.kernel.inner().table.clone();
        let denied: Vec<(Pair, Verdict)> =
            table.iter().filter(|(_, held)| held.action == verdict::DENY).map(|(pair, held)| (*pair, *held)).collect();
        let counters: BTreeSet<u32> = denied.iter().map(|(_, held)| held.counter).collect();
        assert_eq!(counters.len(), denied.len(), "two pairs with one counter");
        *self.met.entry("allowed").or_default() += (table.len() - denied.len()) as u64;
        *self.met.entry("denied").or_default() += denied.len() as u64;
        // What the kernel counts is told of the right pair, with the policy that denies it now.
        let _before = self.table.denied().unwrap();
        for (_, held) in &denied {
            self.kernel.inner().denials[held.counter as usize] += 2;
        }
        let mut told: Vec<_> = self.table.denied().unwrap();
        assert!(told.iter().all(|one| one.connections == 2));
        for (pair, _) in &denied {
            let (from, to) = (self.by_id(pair.source).unwrap(), self.by_id(pair.destination).unwrap());
            let denial = self.expected(from, to, pair.port).unwrap().unwrap_err();
            let at = told.iter().position(|one| {
                let refused = &one.refused;
                (&refused.source.uid, &refused.destination.uid, refused.port)
                    == (&from.workload.uid, &to.workload.uid, pair.port)
                    && refused.denial == denial
            });
            told.swap_remove(at.unwrap_or_else(|| panic!("{pair:?} was not told of: {told:?}")));
        }
        assert!(told.is_empty(), "{told:?}");
        if self.roomy {
            self.complete(&table);
        }
    }

    /// Every pair that was learnt and may be there is.
    fn complete(&mut self, table: &BTreeMap<Pair, Verdict>) {
        for (from, to, port) in &self.learnt {
            let pod =
                |uid: &Arc<str>| self.pods.iter().flatten().find(|pod| pod.workload.uid == *uid && pod.id.is_some());
            let (Some(from), Some(to)) = (pod(from), pod(to)) else { continue };
            if let (Some(answer), Some(source), Some(destination)) = (self.expected(from, to, *port), from.id, to.id) {
                let pair = Pair::new(source, destination, *port);
                assert!(table.contains_key(&pair), "{pair:?} was learnt, is {answer:?}, and is not there");
                *self.met.entry("complete").or_default() += 1;
            }
        }
    }

    fn step(&mut self, step: Step) {
        let before = self.kernel.inner().table.len();
        let has_entries = before > 0;
        let name = match step {
            Step::AddPolicy(policy) => {
                self.policies.push(*policy);
                self.change();
                "policy added"
            }
            Step::DropPolicy(at) => {
                if !self.policies.is_empty() {
                    self.policies.remove(at % self.policies.len());
                }
                self.change();
                "policy dropped"
            }
            Step::AddPeer(peer) => {
                self.peers.push(*peer);
                self.change();
                "peer authentication"
            }
            Step::DropPeer(at) => {
                if !self.peers.is_empty() {
                    self.peers.remove(at % self.peers.len());
                }
                self.change();
                "peer authentication dropped"
            }
            Step::Gaps(gaps) => {
                self.gaps = gaps;
                self.change();
                "gaps"
            }
            Step::Label(at, app) => {
                self.edit(at, |pod| {
                    pod.labels = app.map(|app| ("app".to_owned(), app.to_owned())).into_iter().collect();
                });
                "label"
            }
            Step::Account(at, account) => {
                self.edit(at, |pod| pod.service_account = account.into());
                "account"
            }
            Step::Families(at, four, six) => {
                let addresses = PLACES[at].iter().map(|text| text.parse::<IpAddr>().unwrap());
                let kept = addresses.filter(|address| if address.is_ipv4() { four || !six } else { six }).collect();
                self.edit(at, |pod| pod.addresses = kept);
                "families"
            }
            Step::SameNode(at, said) => {
                self.edit(at, |pod| pod.same_node = said);
                "same node"
            }
            Step::Enrolled(at, enrolled) => {
                self.edit(at, |pod| pod.enrolled = enrolled);
                "enrolled"
            }
            Step::Gone { place, snapshot_first } => {
                self.gone(place, snapshot_first);
                "gone"
            }
            Step::Another(at) => {
                if self.pods[at].is_some() {
                    self.gone(at, true);
                }
                self.another(at);
                self.change();
                self.attach(at);
                self.capture(at, true);
                "another"
            }
            Step::Attach(at) => {
                self.attach(at);
                self.capture(at, true);
                "attach"
            }
            Step::Captured(at, proven) => {
                self.capture(at, proven);
                "captured"
            }
            Step::Straight(at, straight) => {
                if let Some(pod) = &mut self.pods[at] {
                    pod.straight = straight;
                }
                // Measured with each proof.
                self.capture(at, true);
                "straight"
            }
            Step::Learn(misses) => {
                self.learn(&misses);
                "learn"
            }
            Step::Proofs(good) => {
                self.proofs(good);
                "proofs"
            }
            Step::Capacity(capacity) => {
                self.kernel.inner().capacity = capacity;
                self.roomy = false;
                "capacity"
            }
            Step::Restart(policy) => {
                self.policies.extend(policy.map(|policy| *policy));
                self.restart();
                "restart"
            }
        };
        self.check();
        let after = self.kernel.inner().table.len();
        if has_entries {
            *self.met.entry(name).or_default() += 1;
        }
        *self.met.entry("removed").or_default() += u64::from(after < before);
    }

    fn edit(&mut self, at: usize, edit: impl FnOnce(&mut Workload)) {
        if let Some(pod) = &mut self.pods[at] {
            edit(&mut pod.workload);
            self.change();
        }
    }

    fn gone(&mut self, at: usize, snapshot_first: bool) {
        let Some(pod) = self.pods[at].take() else { return };
        let uid = Arc::clone(&pod.workload.uid);
        if !snapshot_first {
            // It is seen to be uncaptured before the cluster says that it is gone.
            self.pods[at] = Some(pod);
            self.tell(&uid, None);
            self.sound("uncaptured");
            self.pods[at] = None;
        } else {
            // Its programs are attached until its keeper has heard of it.
            let id = pod.id;
            self.change();
            let left =
                self.kernel.inner().table.keys().any(|pair| [pair.source, pair.destination].map(Some).contains(&id));
            assert!(!left, "a verdict of a pod that is gone");
            self.tell(&uid, None);
        }
        self.residents();
        self.change();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_never_holds_what_the_engine_would_not_produce_now(
        counters in select(vec![1_usize, 3, 4_096]),
        steps in steps(),
    ) {
        let mut test = Test::new(counters);
        for step in steps {
            test.step(step);
        }
    }
}

/// The property would hold of a table that stays empty: every step must be met with entries to be wrong.
#[test]
fn random_sequences_meet_every_change_with_verdicts_in_the_table() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let mut met = Met::new();
    for _ in 0..64 {
        let mut test = Test::new(4_096);
        for step in steps().new_tree(&mut runner).unwrap().current() {
            test.step(step);
        }
        for (what, count) in test.met {
            *met.entry(what).or_default() += count;
        }
    }
    let often = ["allowed", "denied", "complete", "removed"].map(|what| (what, 100));
    let rarer = [
        "policy added",
        "policy dropped",
        "peer authentication",
        "gaps",
        "label",
        "account",
        "families",
        "same node",
        "enrolled",
        "gone",
        "another",
        "attach",
        "captured",
        "straight",
        "learn",
        "proofs",
        "capacity",
        "restart",
    ];
    for (what, least) in often.into_iter().chain(rarer.map(|what| (what, 5))) {
        assert!(met.get(what).is_some_and(|count| *count > least), "{what} is too rare: {met:?}");
    }
}
