//! What the watches tell, and when it is worth a snapshot: changes that come together become one, and a policy waits the least.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::Notify,
    time::{sleep_until, timeout_at},
};

use super::store::{Name, Object, Resource, Store};
use crate::{
    cluster::{InForce, ManifestError, Objects, Problem, read::Fault},
    life::limits,
};

/// What problems of this source are told as being in.
const PLACE: &str = "API server";

/// Changes that wait to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Batch {
    first: Instant,
    last: Instant,
    /// A policy, or what policies hold for, is among them.
    urgent: bool,
}

impl Batch {
    /// When it is to be published. `rest` is what the last one cost, and when that was over.
    fn due(&self, rest: Option<(Duration, Instant)>) -> Instant {
        let quiet = if self.urgent { limits::KUBE_QUIET_POLICY } else { limits::KUBE_QUIET };
        let due = (self.last + quiet).min(self.first + limits::KUBE_QUIET_MAX);
        let Some((cost, over)) = rest else { return due };
        // Indexing a large cluster may not take the whole of a core, whoever keeps changing it.
        let share = if self.urgent { 1 } else { limits::KUBE_INDEX_REST };
        due.max(over + (cost * share).min(limits::KUBE_INDEX_REST_MAX))
    }
}

#[derive(Debug, Default)]
struct State {
    store: Store,
    /// Kinds of which everything is known: listed, or read from the last good snapshot.
    known: BTreeSet<Resource>,
    /// Kinds that were listed by this process.
    listed: BTreeSet<Resource>,
    /// Kinds that can't be followed now, and why.
    troubles: BTreeMap<Resource, String>,
    /// Kinds that are not there, and since when.
    absent: BTreeMap<Resource, Instant>,
    /// Objects that make no sense.
    faults: BTreeMap<(Resource, Name), Fault>,
    /// What is wrong with the snapshot on disk.
    saved: Option<String>,
    batch: Option<Batch>,
    /// Problems may be others than were told.
    told: bool,
    /// A watch has failed before everything was listed.
    failed: bool,
}

/// What watches and publisher share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    news: Notify,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The object to take for what was sent: that itself, or, where it makes no sense, what it was when it last did.
    pub fn judge(&self, resource: Resource, name: &Name, taken: Result<Object, Fault>) -> Option<Object> {
        let mut state = self.state();
        let key = (resource, name.clone());
        match taken {
            Ok(object) => {
                if !state.faults.is_empty() && state.faults.remove(&key).is_some() {
                    state.told = false;
                    self.news.notify_one();
                }
                // That which is there, if it is the same: what is known of it stays known.
                let there = state.store.get(resource, name).filter(|there| **there == object).cloned();
                Some(there.unwrap_or(object))
            }
            Err(fault) => {
                if state.faults.len() < limits::KUBE_FAULTS {
                    state.faults.insert(key, fault);
                }
                state.told = false;
                self.news.notify_one();
                state.store.get(resource, name).cloned()
            }
        }
    }

    pub fn put(&self, resource: Resource, name: Name, object: Object) {
        let mut state = self.state();
        if state.store.put(resource, name, object) {
            self.changed(&mut state, resource);
        }
    }

    pub fn remove(&self, resource: Resource, name: &str) {
        let mut state = self.state();
        state.faults.remove(&(resource, name.into()));
        if state.store.remove(resource, name) {
            self.changed(&mut state, resource);
        }
    }

    /// These are all objects of the kind.
    pub fn replace(&self, resource: Resource, listed: BTreeMap<Name, Object>) {
        let mut state = self.state();
        state.faults.retain(|(of, name), _| *of != resource || listed.contains_key(name));
        let changed = state.store.replace(resource, listed);
        state.absent.remove(&resource);
        state.listed.insert(resource);
        if state.known.insert(resource) || changed {
            self.changed(&mut state, resource);
        }
    }

    /// The kind is watched.
    pub fn well(&self, resource: Resource) {
        let mut state = self.state();
        if state.troubles.remove(&resource).is_some() {
            tracing::info!(resource = resource.name(), "Followed again");
            state.told = false;
            self.news.notify_one();
        }
    }

    /// The kind can't be followed; what is known of it stays in force.
    pub fn failed(&self, resource: Resource, why: String) {
        let mut state = self.state();
        state.failed = true;
        if state.troubles.insert(resource, why.clone()).as_ref() != Some(&why) {
            state.told = false;
        }
        self.news.notify_one();
    }

    /// There is no such kind. Where there are policies of it, that may be a server that has just begun: they hold a while longer.
    pub fn absent(&self, resource: Resource) {
        let mut state = self.state();
        let now = Instant::now();
        let since = *state.absent.entry(resource).or_insert(now);
        state.told = false;
        self.news.notify_one();
        let held = state.store.len(resource) > 0 && now.duration_since(since) < limits::KUBE_ABSENT_HOLD;
        if held {
            state.failed = true;
            return;
        }
        state.troubles.remove(&resource);
        let changed = state.store.replace(resource, BTreeMap::new());
        state.listed.insert(resource);
        if state.known.insert(resource) || changed {
            self.changed(&mut state, resource);
        }
    }

    /// Takes what an earlier agent knew for every kind that is not known yet.
    pub fn recall(&self, objects: Objects) {
        let mut state = self.state();
        let mut recalled = Store::of(objects);
        for resource in Resource::ALL {
            if state.known.insert(resource) {
                state.store.adopt(resource, &mut recalled);
                self.changed(&mut state, resource);
            }
        }
    }

    /// The snapshot on disk can't be read or written, or can again.
    pub fn saved(&self, problem: Option<String>) {
        let mut state = self.state();
        if state.saved != problem {
            state.saved = problem;
            state.told = false;
            self.news.notify_one();
        }
    }

    /// Pods may be found elsewhere.
    pub fn moved(&self) {
        self.changed(&mut self.state(), Resource::Pods);
    }

    fn changed(&self, state: &mut State, resource: Resource) {
        let now = Instant::now();
        let urgent = resource.policy().is_some() || resource == Resource::Namespaces;
        let batch = state.batch.get_or_insert(Batch { first: now, last: now, urgent });
        batch.last = now;
        batch.urgent |= urgent;
        self.news.notify_one();
    }

    /// Kinds of which everything is known.
    pub fn known(&self) -> BTreeSet<Resource> {
        self.state().known.clone()
    }

    /// Whether every kind was listed by this process, and is followed now.
    pub fn in_step(&self) -> bool {
        let state = self.state();
        state.listed.len() == Resource::ALL.len() && state.troubles.is_empty()
    }

    /// Waits until every kind is known; or else until one can't be had, but no longer than `patience`. Whether it is.
    pub async fn complete(&self, patience: Duration, mut progress: impl FnMut(BTreeSet<Resource>)) -> bool {
        let latest = tokio::time::Instant::now() + patience;
        loop {
            let (known, failed) = {
                let state = self.state();
                (state.known.clone(), state.failed)
            };
            let complete = known.len() == Resource::ALL.len();
            progress(known);
            if complete || failed || timeout_at(latest, self.news.notified()).await.is_err() {
                return complete;
            }
        }
    }

    /// Waits until changes are to be published, and takes them. Gives problems that are to be told meanwhile.
    pub async fn next(&self, rest: Option<(Duration, Instant)>) -> News {
        loop {
            let due = {
                let mut state = self.state();
                if !state.told {
                    state.told = true;
                    return News::Problems(problems(&state));
                }
                match state.batch.map(|batch| (batch, batch.due(rest))) {
                    Some((batch, due)) if due <= Instant::now() => {
                        state.batch = None;
                        // Invalid policies are problems too.
                        state.told &= !batch.urgent;
                        return News::Objects { objects: Arc::new(state.store.objects()), urgent: batch.urgent };
                    }
                    Some((_, due)) => Some(due),
                    None => None,
                }
            };
            match due {
                // More may come meanwhile, and change when it is due.
                Some(due) => {
                    tokio::select! {
                        () = sleep_until(due.into()) => {}
                        () = self.news.notified() => {}
                    }
                }
                None => self.news.notified().await,
            }
        }
    }
}

/// What the publisher is to do.
#[derive(Debug)]
pub(super) enum News {
    Problems(Vec<Problem>),
    Objects { objects: Arc<Objects>, urgent: bool },
}

fn problems(state: &State) -> Vec<Problem> {
    let problem = |error, in_force| Problem { file: PathBuf::from(PLACE), error, in_force };
    let mut problems = Vec::new();
    for (resource, message) in &state.troubles {
        let error = ManifestError::NotFollowed { kind: resource.name(), message: message.clone() };
        problems.push(problem(error, InForce::LastGood));
    }
    for resource in state.absent.keys() {
        let held = state.store.len(*resource);
        problems.push(problem(ManifestError::NoSuchKind { kind: resource.name(), held }, InForce::LastGood));
    }
    for (resource, count) in state.store.overfull() {
        let error = ManifestError::TooManyObjects { kind: resource.name(), count };
        problems.push(problem(error, InForce::Readable));
    }
    for ((resource, name), (field, message)) in &state.faults {
        let (field, message) = (field.clone(), message.clone());
        let error = ManifestError::Served { object: format!("{resource} {name}"), field, message };
        problems.push(problem(error, InForce::LastGood));
    }
    for policy in state.store.invalid() {
        let (field, message) = (policy.field.clone(), policy.message.clone());
        problems
            .push(problem(ManifestError::ServedPolicy { object: policy.object(), field, message }, InForce::Current));
    }
    if let Some(message) = &state.saved {
        problems.push(problem(ManifestError::Saved(message.clone()), InForce::Current));
    }
    problems
}

#[cfg(test)]
mod tests;
