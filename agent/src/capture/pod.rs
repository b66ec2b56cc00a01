//! What this process holds of each pod, and of the node.
//!
//! Pure bookkeeping: slots, states, who holds which listener. The kernel is read and changed elsewhere.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::Read,
    net::{IpAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use heddle_common::MAX_PODS;

use super::{
    CaptureConfig, CaptureError, PodSpec, PodState, ProbeToken, WorkloadId,
    destinations::Destinations,
    load::{Cgroup, Object, ProgramIds},
    maps::Maps,
    netns::{Home, Netns},
    pin::Pins,
    ports::{Occupancy, Rotation},
};

/// Capture on this node.
#[derive(Debug)]
pub struct Node {
    pub config: CaptureConfig,
    pub home: Home,
    pub pins: Pins,
    pub object: Object,
    pub maps: Maps,
    pub destinations: Mutex<Destinations>,
    pods: RwLock<HashMap<Arc<str>, Arc<Pod>>>,
    slots: Mutex<Slots>,
}

impl Node {
    pub fn new(config: CaptureConfig, home: Home, pins: Pins, object: Object, maps: Maps, slots: Slots) -> Self {
        Self {
            config,
            home,
            pins,
            object,
            maps,
            destinations: Mutex::default(),
            pods: RwLock::default(),
            slots: Mutex::new(slots),
        }
    }

    #[must_use]
    pub fn pod(&self, uid: &str) -> Option<Arc<Pod>> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    pub fn pod_or_new(&self, spec: &PodSpec) -> std::io::Result<Arc<Pod>> {
        if let Some(pod) = self.pod(&spec.uid) {
            return Ok(pod);
        }
        let fresh = Arc::new(Pod::new(spec)?);
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(pods.entry(Arc::clone(&spec.uid)).or_insert(fresh)))
    }

    #[must_use]
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub fn forget(&self, uid: &str) {
        self.pods.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    pub fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod with what is attached of it.
    pub fn live(&self, uid: &str) -> Result<(Arc<Pod>, Arc<Live>), CaptureError> {
        let found = self.pod(uid).and_then(|pod| pod.live().map(|live| (pod, live)));
        found.ok_or_else(|| CaptureError::NotAttached(Arc::from(uid)))
    }
}

/// A pod that someone asked to enrol.
#[derive(Debug)]
pub struct Pod {
    pub uid: Arc<str>,
    /// One change or proof of this pod at a time.
    pub turn: tokio::sync::Mutex<()>,
    pub token: ProbeToken,
    pub occupancy: Arc<Occupancy>,
    inner: RwLock<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: Arc<str>,
    state: PodState,
    live: Option<Arc<Live>>,
    listener: Option<Arc<TcpListener>>,
    /// Cookies of sockets that were connected before the pod was enrolled.
    older: HashSet<u64>,
}

/// A pod whose programs are attached. Replaced whole when the pod changes.
#[derive(Debug)]
pub struct Live {
    pub spec: PodSpec,
    pub slot: u32,
    pub workload: WorkloadId,
    /// Cookie of the netns; `None` where the kernel has none to tell, and then the pod is not on the kernel lane.
    pub cookie: Option<u64>,
    pub netns: Arc<Netns>,
    pub cgroup: Arc<Cgroup>,
    pub programs: ProgramIds,
    pub ports: Rotation,
}

impl Live {
    #[must_use]
    pub fn owns(&self, address: IpAddr) -> bool {
        self.spec.addresses.contains(&address)
    }
}

impl Pod {
    fn new(spec: &PodSpec) -> std::io::Result<Self> {
        Ok(Self {
            uid: Arc::clone(&spec.uid),
            turn: tokio::sync::Mutex::new(()),
            token: ProbeToken(random()?),
            occupancy: Arc::default(),
            inner: RwLock::new(Inner {
                name: Arc::clone(&spec.name),
                state: PodState::Attached,
                live: None,
                listener: None,
                older: HashSet::new(),
            }),
        })
    }

    fn read<T>(&self, get: impl FnOnce(&Inner) -> T) -> T {
        get(&self.inner.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<T>(&self, set: impl FnOnce(&mut Inner) -> T) -> T {
        set(&mut self.inner.write().unwrap_or_else(PoisonError::into_inner))
    }

    #[must_use]
    pub fn name(&self) -> Arc<str> {
        self.read(|inner| Arc::clone(&inner.name))
    }

    #[must_use]
    pub fn state(&self) -> PodState {
        self.read(|inner| inner.state.clone())
    }

    pub fn set_state(&self, state: PodState) {
        self.change(|inner| inner.state = state);
    }

    #[must_use]
    pub fn live(&self) -> Option<Arc<Live>> {
        self.read(|inner| inner.live.clone())
    }

    #[must_use]
    pub fn listener(&self) -> Option<Arc<TcpListener>> {
        self.read(|inner| inner.listener.clone())
    }

    /// Gives the agent's own hold on the listener up; it closes with the last one.
    pub fn drop_listener(&self) {
        self.change(|inner| inner.listener = None);
    }

    #[must_use]
    pub fn older(&self) -> HashSet<u64> {
        self.read(|inner| inner.older.clone())
    }

    pub fn set_older(&self, older: HashSet<u64>) {
        self.change(|inner| inner.older = older);
    }

    /// Forgets those that are not to be kept.
    pub fn forget_older(&self, keep: impl Fn(&u64) -> bool) {
        self.change(|inner| inner.older.retain(|cookie| keep(cookie)));
    }

    pub fn set_live(&self, live: Live, listener: Arc<TcpListener>) {
        self.change(|inner| {
            inner.name = Arc::clone(&live.spec.name);
            inner.live = Some(Arc::new(live));
            inner.listener = Some(listener);
            inner.state = PodState::Attached;
        });
    }

    pub fn clear(&self) {
        self.change(|inner| {
            inner.live = None;
            inner.listener = None;
            inner.older.clear();
        });
    }
}

/// Bytes that nobody can guess and that come no second time.
pub fn random<const BYTES: usize>() -> std::io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Which pod has which slot.
#[derive(Debug, Default)]
pub struct Slots(BTreeMap<u32, Arc<str>>);

impl Slots {
    /// The pod's slot if it is its own or free, else the lowest free one. And whether it is new to the pod.
    pub fn take(&mut self, uid: &Arc<str>, wanted: Option<u32>) -> Result<(u32, bool), CaptureError> {
        if let Some(slot) = wanted.filter(|slot| *slot < MAX_PODS) {
            let holder = self.0.entry(slot).or_insert_with(|| Arc::clone(uid));
            if holder == uid {
                return Ok((slot, false));
            }
        }
        let free = (0..MAX_PODS).find(|slot| !self.0.contains_key(slot)).ok_or(CaptureError::SlotsFull(MAX_PODS))?;
        self.0.insert(free, Arc::clone(uid));
        Ok((free, true))
    }

    pub fn release(&mut self, uid: &str) {
        self.0.retain(|_, holder| &**holder != uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_has_one_pod_and_a_recorded_slot_stays_with_its_pod() {
        let mut slots = Slots::default();
        let (a, b, c): (Arc<str>, Arc<str>, Arc<str>) = ("a".into(), "b".into(), "c".into());
        assert_eq!(slots.take(&a, Some(0)).unwrap(), (0, false));
        assert_eq!(slots.take(&b, None).unwrap(), (1, true));
        assert_eq!(slots.take(&c, Some(0)).unwrap(), (2, true));
        assert_eq!(slots.take(&a, Some(0)).unwrap(), (0, false));
        slots.release("b");
        assert_eq!(slots.take(&b, Some(9_999)).unwrap(), (1, true));
    }

    #[test]
    fn a_node_without_a_free_slot_says_so() {
        let mut slots = Slots::default();
        for index in 0..MAX_PODS {
            slots.take(&Arc::from(index.to_string()), None).unwrap();
        }
        assert_eq!(slots.take(&Arc::from("one more"), None).unwrap_err().reason(), "slots_full");
    }
}
