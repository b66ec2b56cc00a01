//! What the kernel holds, and the order in which it changes. One owner, under one lock; each call is a few system calls per pair
//! that it touches.
//!
//! After every call each entry is what the engine decides by the rulebook in force for the pods that have its ids. A new rulebook
//! comes into force after everything is gone that it would decide otherwise, and before anything that only it allows is there.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use heddle_common::{LocalEndpoints, Pair, ServicePort, Verdict, verdict};

use super::{
    counters::{Counters, Denied},
    eligible::{Captured, Decision, Ineligible, World},
    kernel::Kernel,
    pairs::{Held, Pairs, Pods, Seen},
    paths::Paths,
    revoke::{self, Forbidden},
    services::services,
};
use crate::{
    capture::{CaptureError, LaneFault, ResidentPod},
    cluster::{Snapshot, Workload},
    identity::TrustDomain,
    life::limits,
    policy::Rulebook,
    tunnel::REFUSED_TARGETS,
};

/// What has happened, since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Connections that came to the agent for want of a verdict.
    pub misses: u64,
    /// Verdicts that found the kernel's table full.
    pub full: u64,
    /// Denials that found no counter, or of a source that has its share.
    pub exhausted: u64,
    /// Verdicts that went because their pairs were forgotten for newer ones.
    pub forgotten: u64,
    /// System calls that failed.
    pub failed: u64,
}

/// A path that somebody is to prove: uids and ids of source and destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unproven {
    pub pods: Pods,
    pub ids: (u64, u64),
}

type Residents = HashMap<Arc<str>, ResidentPod>;

#[derive(Debug)]
pub(super) struct Table<K> {
    kernel: K,
    trust_domain: TrustDomain,
    node: Arc<str>,
    /// In force, with the snapshot that they came from.
    rules: Arc<Rulebook>,
    snapshot: Arc<Snapshot>,
    captured: Captured,
    /// Pods that an earlier agent enrolled, until this one has tried them.
    inherited: Residents,
    paths: Paths,
    pairs: Pairs,
    /// `None` until what an earlier agent left is known.
    counters: Option<Counters>,
    /// Entries that could not be removed.
    stuck: HashMap<Pair, Held>,
    services: Option<HashMap<ServicePort, LocalEndpoints>>,
    /// The last record of each pod by id, for connections that outlive it.
    known: HashMap<u64, Arc<Workload>>,
    untold: Vec<Denied>,
    counts: Counts,
}

/// What is to change of the kernel's table.
#[derive(Debug, Default)]
struct Plan {
    remove: Vec<Seen>,
    insert: Vec<(Seen, Pair, Decision)>,
    /// Pods that would be eligible if their path were proven.
    unproven: Vec<Pods>,
}

/// The world as it is in force; a macro, as it borrows the table's parts and no more.
macro_rules! world {
    ($table:ident, $snapshot:expr, $rules:expr, $residents:expr) => {
        World {
            snapshot: $snapshot,
            rules: $rules,
            trust_domain: &$table.trust_domain,
            residents: $residents,
            captured: &$table.captured,
            paths: &$table.paths,
            identities: RefCell::default(),
        }
    };
}

impl<K: Kernel> Table<K> {
    /// Knows nothing, and so allows nothing, until the first [`Table::change`].
    pub fn new(kernel: K, trust_domain: TrustDomain, node: Arc<str>) -> Self {
        Self {
            kernel,
            trust_domain,
            node,
            rules: Arc::default(),
            snapshot: Arc::default(),
            captured: Captured::new(),
            inherited: Residents::new(),
            paths: Paths::default(),
            pairs: Pairs::new(limits::LANE_PAIRS, limits::LANE_PAIRS_PER_SOURCE),
            counters: None,
            stuck: HashMap::new(),
            services: None,
            known: HashMap::new(),
            untold: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// Puts a snapshot and its rules in force by `put_in_force`, with everything that the kernel holds by then decided by them. The
    /// first time it takes over what an earlier agent left.
    ///
    /// # Errors
    /// When a table could not be read or written. The rules are in force all the same; what could not be removed is tried again with
    /// the next change.
    pub fn change(
        &mut self,
        snapshot: Arc<Snapshot>,
        rules: Arc<Rulebook>,
        put_in_force: impl FnOnce(),
    ) -> Result<(), CaptureError> {
        let adopted = if self.counters.is_none() { self.adopt(&snapshot, &rules) } else { Ok(()) };
        self.retain(&snapshot);
        let residents = self.residents();
        self.paths.retain(&residents.values().map(|pod| pod.id.0).collect());
        let plan = self.plan(&residents, &snapshot, &rules, self.pairs.pods());
        self.forget_gone(&snapshot);
        let removed = self.remove(&plan);
        self.rules = rules;
        self.snapshot = snapshot;
        put_in_force();
        self.insert(plan.insert);
        self.meet(&residents);
        adopted.and(removed).and(self.set_services())
    }

    /// Learns from connections that had no verdict. Gives paths that are to be proven.
    pub fn learn(&mut self, misses: &[Seen], now: Instant) -> Vec<Unproven> {
        self.counts.misses += misses.len() as u64;
        let residents = self.residents();
        let mut touched = HashSet::new();
        for seen in misses {
            let (source, destination) = &seen.0;
            let known = residents.contains_key(source) && residents.contains_key(destination);
            if !known || REFUSED_TARGETS.contains(&seen.1) {
                continue;
            }
            let left = self.pairs.miss(seen);
            self.counts.forgotten += u64::from(left.is_some());
            if let Some(left) = left {
                let _stuck = self.drop_entry(left);
            }
            touched.insert(seen.0.clone());
        }
        let plan = self.plan(&residents, &self.snapshot, &self.rules, touched.iter());
        let unproven = plan.unproven.clone();
        self.enact(plan);
        let id = |uid: &Arc<str>| residents.get(uid).map(|pod| pod.id.0);
        let wanted = unproven.into_iter().filter_map(|pods| {
            let ids = (id(&pods.0)?, id(&pods.1)?);
            self.paths.begin(ids, now).then_some(Unproven { pods, ids })
        });
        wanted.collect()
    }

    /// Notes how the proof of a path went.
    pub fn path(&mut self, path: &Unproven, result: Result<(), LaneFault>, now: Instant) {
        self.paths.end(path.ids, result, now);
        if self.pairs.contains(&path.pods) {
            let residents = self.residents();
            let plan = self.plan(&residents, &self.snapshot, &self.rules, std::iter::once(&path.pods));
            self.enact(plan);
        }
    }

    /// Notes whether a pod's capture is proven, and if so whether it can take the lane. Without proof its verdicts are gone when this
    /// returns. `true` when the pod is seen for the first time: an earlier agent may have left connections.
    pub fn capture(&mut self, uid: &Arc<str>, proof: Option<Result<(), LaneFault>>) -> bool {
        let inherited = self.inherited.remove(uid).is_some();
        let changed = match proof {
            Some(able) => {
                self.captured.insert(Arc::clone(uid), able);
                true
            }
            None => self.captured.remove(uid).is_some(),
        };
        if !changed && !inherited {
            return false;
        }
        let residents = self.residents();
        let own: Vec<Pods> = self.pairs.pods().filter(|(from, to)| from == uid || to == uid).cloned().collect();
        let plan = self.plan(&residents, &self.snapshot, &self.rules, own.iter());
        self.enact(plan);
        self.meet(&residents) || inherited
    }

    /// Open connections of the lane that the rules in force deny.
    ///
    /// # Errors
    /// When the kernel's table can't be read.
    pub fn forbidden(&mut self) -> Result<Vec<Forbidden>, CaptureError> {
        let connections = self.kernel.connections()?;
        let residents: HashSet<u64> = self.residents().into_values().map(|pod| pod.id.0).collect();
        let open: HashSet<u64> = connections.iter().flat_map(|(_, by)| [by.source, by.destination]).collect();
        self.known.retain(|id, _| residents.contains(id) || open.contains(id));
        Ok(revoke::forbidden(&self.rules, &self.snapshot, &self.trust_domain, &self.known, connections))
    }

    /// Connections that the kernel has denied since the last time, pair by pair.
    ///
    /// # Errors
    /// When its counters can't be read.
    pub fn denied(&mut self) -> Result<Vec<Denied>, CaptureError> {
        if let Some(counters) = self.counters.as_mut().filter(|counters| counters.counting()) {
            let mut failed = None;
            let denied =
                counters.read(|counter| self.kernel.denial(counter).map_err(|error| failed = Some(error)).ok());
            self.untold.extend(denied);
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Ok(std::mem::take(&mut self.untold))
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How many pairs are remembered, and how many the kernel allows and denies.
    pub fn sizes(&self) -> (usize, usize, usize) {
        let denied = self.pairs.held().filter(|held| matches!(held.decision, Decision::Deny(_))).count();
        (self.pairs.len(), self.pairs.held().count() - denied, denied)
    }

    /// Whether the pod's capture is proven, and whether it can take the lane.
    pub fn captured(&self, uid: &str) -> Option<&Result<(), LaneFault>> {
        self.captured.get(uid)
    }

    /// The pods of the node that the cluster knows, with their records.
    pub fn pods(&self) -> Vec<(ResidentPod, Arc<Workload>)> {
        let record = |pod: ResidentPod| Some((pod.clone(), Arc::clone(self.snapshot.workloads.get(&pod.uid)?)));
        self.kernel.residents().into_iter().filter_map(record).collect()
    }

    /// Every id that the pod has had while there were connections of it.
    pub fn ids(&self, uid: &str) -> HashSet<u64> {
        self.known.iter().filter(|(_, workload)| *workload.uid == *uid).map(|(id, _)| *id).collect()
    }

    /// Paths that could not be proven, with the pods that are still here.
    pub fn faults(&self) -> Vec<(Arc<Workload>, Arc<Workload>, LaneFault)> {
        let pods = |(from, to)| Some((self.known.get(&from)?, self.known.get(&to)?));
        let failed = self.paths.failed();
        failed
            .filter_map(|(ids, fault)| pods(ids).map(|(from, to)| (Arc::clone(from), Arc::clone(to), fault.clone())))
            .collect()
    }

    fn residents(&self) -> Residents {
        let mut residents = self.inherited.clone();
        residents.extend(self.kernel.residents().into_iter().map(|pod| (Arc::clone(&pod.uid), pod)));
        residents
    }

    /// Forgets pods that are gone, and those that an earlier agent enrolled and nobody wants enrolled any more.
    fn retain(&mut self, snapshot: &Snapshot) {
        let enrolled = |uid: &Arc<str>| snapshot.workloads.get(uid).is_some_and(|workload| workload.enrolled);
        let inherited = &mut self.inherited;
        self.captured
            .retain(|uid, _| snapshot.workloads.contains_key(uid) && (enrolled(uid) || !inherited.contains_key(uid)));
        inherited.retain(|uid, _| enrolled(uid));
    }

    /// Keeps the records of the pods that are here. Whether one of them is new.
    fn meet(&mut self, residents: &Residents) -> bool {
        let mut new = false;
        for pod in residents.values() {
            if let Some(workload) = self.snapshot.workloads.get(&pod.uid) {
                new |= self.known.insert(pod.id.0, Arc::clone(workload)).is_none();
            }
        }
        new
    }

    fn plan<'a>(
        &self,
        residents: &Residents,
        snapshot: &Snapshot,
        rules: &Rulebook,
        pods: impl Iterator<Item = &'a Pods>,
    ) -> Plan {
        let world = world!(self, snapshot, rules, residents);
        let mut plan = Plan::default();
        for pods in pods {
            let eligible = world.eligible(&pods.0, &pods.1);
            if matches!(eligible, Err(Ineligible::Path)) {
                plan.unproven.push(pods.clone());
            }
            for (port, held) in self.pairs.ports(pods) {
                let wanted = eligible.as_ref().ok().and_then(|eligible| world.decide(eligible, port));
                let same = |held: &Held| {
                    wanted.as_ref().is_some_and(|(pair, decision)| held.pair == *pair && held.decision == *decision)
                };
                if held.is_some_and(same) {
                    continue;
                }
                let seen = (pods.clone(), port);
                if held.is_some() {
                    plan.remove.push(seen.clone());
                }
                if let Some((pair, decision)) = wanted {
                    plan.insert.push((seen, pair, decision));
                }
            }
        }
        plan
    }

    /// For a change that no new rulebook goes with.
    fn enact(&mut self, plan: Plan) {
        // What sticks was logged, and goes with the next change at the latest.
        let _stuck = self.remove(&plan);
        self.insert(plan.insert);
    }

    fn remove(&mut self, plan: &Plan) -> Result<(), CaptureError> {
        let stuck: Vec<_> = self.stuck.drain().map(|(_, held)| held).collect();
        let mut result = Ok(());
        for held in stuck {
            result = result.and(self.drop_entry(held));
        }
        for seen in &plan.remove {
            if let Some(held) = self.pairs.hold(seen, None) {
                result = result.and(self.drop_entry(held));
            }
        }
        result
    }

    /// Takes an entry out of the kernel's table that is noted nowhere any more.
    fn drop_entry(&mut self, held: Held) -> Result<(), CaptureError> {
        match self.kernel.remove_verdict(&held.pair) {
            Ok(()) => {
                if let (Decision::Deny(_), Some(counters)) = (&held.decision, &mut self.counters) {
                    counters.give_back(held.counter);
                }
                Ok(())
            }
            Err(error) => {
                self.counts.failed += 1;
                tracing::error!(reason = error.reason(), %error, pair = ?held.pair, "A verdict can't be taken back");
                self.stuck.insert(held.pair, held);
                Err(error)
            }
        }
    }

    fn insert(&mut self, wanted: Vec<(Seen, Pair, Decision)>) {
        if self.counters.is_none() {
            return;
        }
        let mut full = false;
        for (seen, pair, decision) in wanted {
            if full || self.stuck.contains_key(&pair) {
                continue;
            }
            let Some(counter) = self.counter_for(pair.source, &decision) else {
                self.counts.exhausted += 1;
                continue;
            };
            let action = match decision {
                Decision::Allow => verdict::ALLOW,
                Decision::Deny(_) => verdict::DENY,
            };
            let held = Held { pair, decision, counter };
            match self.kernel.put_verdict(pair, Verdict { action, counter }) {
                Ok(true) => drop(self.pairs.hold(&seen, Some(held))),
                Ok(false) => {
                    self.counts.full += 1;
                    // The next one would find no room either.
                    full = true;
                    self.return_counter(&held);
                }
                Err(error) => {
                    self.counts.failed += 1;
                    tracing::error!(reason = error.reason(), %error, ?pair, "A verdict can't be given to the kernel");
                    // Nobody can say whether it is there.
                    let _stuck = self.drop_entry(held);
                }
            }
        }
    }

    /// The counter for an entry; 0, which nobody reads, for one that allows. `None` when there is none to be had, or it is not known
    /// yet which are in use.
    fn counter_for(&mut self, source: u64, decision: &Decision) -> Option<u32> {
        let counters = self.counters.as_mut()?;
        let Decision::Deny(refused) = decision else { return Some(0) };
        if counters.would_free() {
            // What can't be read is read by the next look, which says so.
            self.untold.extend(counters.read(|counter| self.kernel.denial(counter).ok()));
        }
        counters.take(source, refused)
    }

    fn return_counter(&mut self, held: &Held) {
        if let (Decision::Deny(_), Some(counters)) = (&held.decision, &mut self.counters) {
            counters.give_back(held.counter);
        }
    }

    /// Forgets pairs of pods that the cluster has no more. Their entries are in the plan already, and so is what it needs of them.
    fn forget_gone(&mut self, snapshot: &Snapshot) {
        let there = |uid: &Arc<str>| snapshot.workloads.contains_key(uid);
        let gone: Vec<Seen> = self
            .pairs
            .pods()
            .filter(|(from, to)| !there(from) || !there(to))
            .flat_map(|pods| self.pairs.ports(pods).map(|(port, _)| (pods.clone(), port)))
            .collect();
        for seen in gone {
            if let Some(held) = self.pairs.forget(&seen) {
                let _stuck = self.drop_entry(held);
            }
        }
    }

    /// Takes over what an earlier agent left in the kernel: what the engine decides alike stays, the rest goes. Its pairs count as seen,
    /// their paths as proven, and their pods as captured until their keepers know better.
    fn adopt(&mut self, snapshot: &Snapshot, rules: &Rulebook) -> Result<(), CaptureError> {
        let left = self.kernel.verdicts()?;
        let mut counters = Counters::new(self.kernel.denials()?, limits::LANE_DENIALS_PER_SOURCE);
        self.inherited = self.kernel.pinned()?.into_iter().map(|pod| (Arc::clone(&pod.uid), pod)).collect();
        let residents = self.residents();
        let by_id: HashMap<u64, &Arc<str>> = residents.values().map(|pod| (pod.id.0, &pod.uid)).collect();
        let pods = |pair: &Pair| {
            let uid = |id| by_id.get(&id).map(|uid| Arc::clone(uid));
            Some((uid(pair.source)?, uid(pair.destination)?))
        };
        for (pair, _) in &left {
            if let Some((source, destination)) = pods(pair) {
                self.captured.extend([(source, Ok(())), (destination, Ok(()))]);
                self.paths.end((pair.source, pair.destination), Ok(()), Instant::now());
            }
        }
        let (mut kept, mut removed) = (0_u64, 0_u64);
        let mut dropped = Vec::new();
        {
            let world = world!(self, snapshot, rules, &residents);
            let mut judged = Vec::with_capacity(left.len());
            for (pair, found) in left {
                let pods = pods(&pair);
                let wanted = pods.as_ref().and_then(|(source, destination)| {
                    world.decide(&world.eligible(source, destination).ok()?, pair.port)
                });
                let decision = wanted.filter(|(own, _)| *own == pair).map(|(_, decision)| decision);
                let decision = decision.filter(|decision| match decision {
                    Decision::Allow => found.action == verdict::ALLOW,
                    Decision::Deny(refused) => {
                        found.action == verdict::DENY && counters.adopt(found.counter, pair.source, refused)
                    }
                });
                judged.push((pair, pods, decision, found.counter));
            }
            for (pair, pods, decision, counter) in judged {
                let seen = pods.map(|pods| (pods, pair.port));
                if let Some(seen) = &seen {
                    dropped.extend(self.pairs.miss(seen));
                }
                match (seen, decision) {
                    (Some(seen), Some(decision)) => {
                        kept += 1;
                        self.pairs.hold(&seen, Some(Held { pair, decision, counter }));
                    }
                    _ => {
                        removed += 1;
                        dropped.push(Held { pair, decision: Decision::Allow, counter: 0 });
                    }
                }
            }
        }
        self.counters = Some(counters);
        if kept + removed > 0 {
            tracing::info!(kept, removed, "Took over the kernel's verdicts");
        }
        let mut result = Ok(());
        for held in dropped {
            result = result.and(self.drop_entry(held));
        }
        result
    }

    fn set_services(&mut self) -> Result<(), CaptureError> {
        let wanted = services(&self.snapshot, &self.node);
        if self.services.as_ref() != Some(&wanted) {
            self.services = None;
            self.kernel.set_services(&wanted)?;
            self.services = Some(wanted);
        }
        Ok(())
    }
}
