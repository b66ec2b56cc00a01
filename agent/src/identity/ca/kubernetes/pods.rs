//! The pods of the cluster as the watch tells of them, by name and by place: what node authorization needs, and no more.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
    time::{Instant, SystemTime},
};

use k8s_openapi::api::core::v1;

use crate::{
    identity::ca::{
        authorize::{Phase, Pod},
        recent::Recent,
    },
    life::limits,
};

/// What is known, while it is the API server's present word; empty otherwise.
#[derive(Debug)]
pub(super) struct Pods {
    index: RwLock<Option<Index>>,
    /// UIDs of pods of which the API server itself said lately, because the watch was silent, that they are as they are known.
    confirmed: Mutex<Recent<Arc<str>, ()>>,
}

impl Pods {
    /// Nothing is known.
    pub fn new() -> Self {
        Self { index: RwLock::default(), confirmed: Mutex::new(Recent::new(limits::CA_PODS_CONFIRMED)) }
    }

    /// A pod, if the watch told of it.
    pub fn named(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        self.index().as_ref()?.named.get(&(namespace.into(), name.into())).cloned()
    }

    /// The pods of a service account on a node that the watch told of.
    pub fn at(&self, node: &str, namespace: &str, account: &str) -> Vec<Arc<Pod>> {
        let place = Place { node: node.into(), namespace: namespace.into(), account: account.into() };
        self.index().as_ref().and_then(|index| index.placed.get(&place)).cloned().unwrap_or_default()
    }

    /// Whether what is known of a pod is known well enough to give an identity: the watch said something lately, or the API
    /// server was asked for this very pod. A watch whose connection is dead says nothing, and tells of no pod that goes.
    pub fn certain(&self, pod: &Pod, now: Instant) -> bool {
        let word = self.index().as_ref().map(|index| index.word);
        word.is_some_and(|word| now.saturating_duration_since(word) < limits::CA_WATCH_WORD)
            || self.confirmed().get(&pod.uid, now).is_some()
    }

    /// The API server says that it is as it is known.
    pub fn confirm(&self, pod: &Pod, now: Instant) {
        self.confirmed().put(Arc::clone(&pod.uid), (), now + limits::CA_WATCH_WORD, now);
    }

    fn index(&self) -> RwLockReadGuard<'_, Option<Index>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn confirmed(&self) -> MutexGuard<'_, Recent<Arc<str>, ()>> {
        self.confirmed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything is known anew; or, for the time being, nothing is.
    pub fn replace(&self, index: Option<Index>) {
        *self.index.write().unwrap_or_else(PoisonError::into_inner) = index;
    }

    /// Changes what is known, by the watch's word; nothing happens while nothing is.
    pub fn change(&self, change: impl FnOnce(&mut Index)) {
        if let Some(index) = self.index.write().unwrap_or_else(PoisonError::into_inner).as_mut() {
            index.word = Instant::now();
            change(index);
        }
    }

    /// Whether the watch is up.
    pub fn known(&self) -> bool {
        self.index().is_some()
    }

    /// How many are known.
    pub fn len(&self) -> usize {
        self.index().as_ref().map_or(0, |index| index.named.len())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Place {
    node: Arc<str>,
    namespace: Arc<str>,
    account: Arc<str>,
}

/// Scheduled pods that have not finished.
#[derive(Debug)]
pub(super) struct Index {
    /// When the API server last said something of a pod.
    word: Instant,
    named: HashMap<(Arc<str>, Arc<str>), Arc<Pod>>,
    placed: HashMap<Place, Vec<Arc<Pod>>>,
}

impl Index {
    /// What is known when a list begins.
    pub fn new(now: Instant) -> Self {
        Self { word: now, named: HashMap::new(), placed: HashMap::new() }
    }

    /// A pod is there, or has changed.
    pub fn put(&mut self, pod: Pod) {
        self.remove(&pod.namespace, &pod.name);
        let of_use = !pod.node.is_empty() && matches!(pod.phase, Phase::Pending | Phase::Running);
        if !of_use || self.named.len() >= limits::CA_PODS {
            return;
        }
        let pod = Arc::new(pod);
        self.placed.entry(place(&pod)).or_default().push(Arc::clone(&pod));
        self.named.insert((Arc::clone(&pod.namespace), Arc::clone(&pod.name)), pod);
    }

    /// A pod is gone.
    pub fn remove(&mut self, namespace: &Arc<str>, name: &Arc<str>) {
        let Some(gone) = self.named.remove(&(Arc::clone(namespace), Arc::clone(name))) else { return };
        let place = place(&gone);
        if let Some(pods) = self.placed.get_mut(&place) {
            pods.retain(|pod| !Arc::ptr_eq(pod, &gone));
            if pods.is_empty() {
                self.placed.remove(&place);
            }
        }
    }
}

fn place(pod: &Pod) -> Place {
    let shared = |text: &Arc<str>| Arc::clone(text);
    Place { node: shared(&pod.node), namespace: shared(&pod.namespace), account: shared(&pod.account) }
}

/// What counts of a pod; `None` without a name, namespace or UID, which the API server always gives.
pub(in crate::identity::ca) fn read(pod: &v1::Pod) -> Option<Pod> {
    let shared = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(Arc::<str>::from);
    let spec = pod.spec.as_ref();
    let status = pod.status.as_ref();
    let account = spec.and_then(|spec| spec.service_account_name.as_deref()).filter(|name| !name.is_empty());
    Some(Pod {
        namespace: shared(&pod.metadata.namespace)?,
        name: shared(&pod.metadata.name)?,
        uid: shared(&pod.metadata.uid)?,
        account: account.unwrap_or("default").into(),
        node: spec.and_then(|spec| spec.node_name.as_deref()).unwrap_or_default().into(),
        phase: Phase::read(status.and_then(|status| status.phase.as_deref())),
        ends: pod.metadata.deletion_timestamp.as_ref().map(|time| SystemTime::from(time.0)),
    })
}
