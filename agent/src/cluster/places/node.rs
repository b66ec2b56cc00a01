//! Where the pods of this node are, found among its processes and cgroups by their uid; and what the CNI plugin told of a pod
//! in which nothing runs yet.
//!
//! One thread looks for all pods: when a pod is asked for that is not known, when one is announced, and at a slow poll. What it
//! finds replaces what it found before. It opens nothing of a pod and enters none. Cgroups are told from the root of the hierarchy, in
//! the node's own cgroup namespace: the agent has entered it before there were threads.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io,
    net::IpAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Instant,
};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::{
    Places,
    scan::{self, Found},
};
use crate::{
    cluster::{Place, enrolment::host_network},
    life::limits,
};

/// Annotation of the object that stands for a static pod: kubelet's own uid of it.
pub const STATIC_POD: &str = "kubernetes.io/config.hash";
/// Marks that object.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// What the CNI plugin tells of a pod whose network was just made.
#[derive(Debug)]
pub struct Announcement {
    /// The sandbox container.
    pub container: String,
    /// Opens its netns, for as long as it is announced.
    pub netns: File,
    /// Of that netns.
    pub inode: u64,
    pub addresses: Vec<IpAddr>,
}

/// Places on this node. Cheap to clone; the thread ends with the last of them.
#[derive(Debug, Clone)]
pub struct NodePlaces(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// `spec.nodeName` of the pods that are looked for.
    node: Arc<str>,
    places: RwLock<BTreeMap<String, Place>>,
    announced: Mutex<BTreeMap<String, Announced>>,
    /// A pod was asked for that was not found: it is looked for sooner.
    missing: AtomicBool,
    changes: watch::Sender<u64>,
    wake: SyncSender<()>,
}

#[derive(Debug)]
struct Announced {
    container: String,
    netns: File,
    inode: u64,
    addresses: Vec<IpAddr>,
    since: Instant,
    /// When a process was last seen in it.
    seen: Option<Instant>,
}

impl NodePlaces {
    /// Looks once, and starts the thread that goes on looking. It blocks meanwhile, for some milliseconds.
    ///
    /// # Errors
    /// When there is no thread to be had, or no cgroup v2 hierarchy.
    pub fn start(node: Arc<str>) -> io::Result<Self> {
        let (wake, woken) = sync_channel(1);
        let shared = Arc::new(Shared {
            node,
            places: RwLock::default(),
            announced: Mutex::default(),
            missing: AtomicBool::new(false),
            changes: watch::Sender::new(0),
            wake,
        });
        let (looked, first) = sync_channel(1);
        let weak = Arc::downgrade(&shared);
        let follow = move || {
            let mut scanner = Scanner { proc: "/proc".into(), failed: false };
            let first = scan::mount(&scanner.proc)
                .and_then(|mount| weak.upgrade().map_or(Ok(()), |shared| scanner.look(&shared, &mount)));
            let failed = first.is_err();
            // Nobody waits any more where the start was given up.
            let _ = looked.send(first);
            if !failed {
                scanner.follow(&weak, &woken);
            }
        };
        thread::Builder::new().name("places".into()).spawn(follow)?;
        first.recv().map_err(io::Error::other)??;
        Ok(Self(shared))
    }

    /// A pod's network was made, and nothing runs in it yet. What was announced of it before is replaced.
    pub fn announce(&self, uid: &str, announcement: Announcement) {
        let Announcement { container, netns, inode, addresses } = announcement;
        let mut announced = self.0.announced();
        let fresh = Announced { container, netns, inode, addresses, since: Instant::now(), seen: None };
        announced.insert(uid.to_owned(), fresh);
        while announced.len() > limits::PLACES_ANNOUNCED {
            let oldest = announced.iter().min_by_key(|(_, announced)| announced.since).map(|(uid, _)| uid.clone());
            announced.remove(&oldest.unwrap_or_default());
        }
        drop(announced);
        self.0.wake();
    }

    /// The sandbox `container` of the pod goes; a later one of the same pod stays.
    pub fn forget(&self, uid: &str, container: &str) {
        let mut announced = self.0.announced();
        if announced.get(uid).is_some_and(|announced| announced.container == container) {
            announced.remove(uid);
        }
        drop(announced);
        self.0.wake();
    }
}

impl Places for NodePlaces {
    fn locate(&self, pod: &Pod) -> Option<Place> {
        if pod.spec.as_ref()?.node_name.as_deref() != Some(&self.0.node) {
            return None;
        }
        let place = self.0.places.read().unwrap_or_else(PoisonError::into_inner).get(kubelet_uid(pod)?).cloned();
        if place.is_none() && is_to_be_found(pod) && !self.0.missing.swap(true, Ordering::Relaxed) {
            self.0.wake();
        }
        place
    }

    fn changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.0.changes.subscribe())
    }
}

impl Shared {
    fn announced(&self) -> MutexGuard<'_, BTreeMap<String, Announced>> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full channel wakes the thread just as well.
        let _already_woken = self.wake.try_send(());
    }
}

/// Whether the node has, or will have, processes of the pod in a network namespace of its own.
fn is_to_be_found(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed")) && !host_network(pod)
}

/// The uid by which kubelet names a pod's cgroup.
fn kubelet_uid(pod: &Pod) -> Option<&str> {
    let annotation = |key| pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(key));
    match annotation(MIRROR) {
        Some(hash) => Some(annotation(STATIC_POD).unwrap_or(hash)),
        None => pod.metadata.uid.as_deref(),
    }
}

#[derive(Debug)]
struct Scanner {
    proc: PathBuf,
    /// Whether the last look failed, so that it is told once.
    failed: bool,
}

impl Scanner {
    /// Looks until nobody is there to look for.
    fn follow(&mut self, shared: &Weak<Shared>, woken: &Receiver<()>) {
        loop {
            let Some(missing) = shared.upgrade().map(|shared| shared.missing.load(Ordering::Relaxed)) else { return };
            let pause = if missing { limits::PLACES_POLL_MISSING } else { limits::PLACES_POLL };
            if woken.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
            let Some(shared) = shared.upgrade() else { return };
            // Before it looks: who misses a pod from now on asks again.
            shared.missing.store(false, Ordering::Relaxed);
            let looked = scan::mount(&self.proc).and_then(|mount| self.look(&shared, &mount));
            match looked {
                Ok(()) => self.failed = false,
                Err(error) if !self.failed => {
                    tracing::error!(%error, "Pods of the node can't be looked for: those that are known stay as they are");
                    self.failed = true;
                }
                Err(_) => {}
            }
            drop(shared);
            // News that come meanwhile are one piece of news.
            thread::sleep(limits::PLACES_PAUSE);
        }
    }

    /// One look; tells of what has changed.
    fn look(&self, shared: &Shared, mount: &Path) -> io::Result<()> {
        let (processes, host) = scan::processes(&self.proc)?;
        let told = shared.announced().iter().map(|(uid, announced)| (uid.clone(), announced.inode)).collect();
        let found = scan::choose(&processes, host, &told);
        let empty: HashSet<String> = told.keys().filter(|uid| !found.contains_key(*uid)).cloned().collect();
        let folders = if empty.is_empty() { BTreeMap::new() } else { scan::folders(mount, &empty) };
        let mut announced = shared.announced();
        let now = Instant::now();
        announced.retain(|uid, announced| holds(announced, found.get(uid), now));
        let places = places(&announced, &found, &folders, mount);
        drop(announced);
        let mut known = shared.places.write().unwrap_or_else(PoisonError::into_inner);
        if *known != places {
            tracing::debug!(pods = places.len(), "Pods of the node were found elsewhere");
            *known = places;
            drop(known);
            shared.changes.send_modify(|changes| *changes += 1);
        }
        Ok(())
    }
}

/// Whether what was announced still says something. The plugin says when it does not; where that is lost, that nothing runs there any
/// more is believed only after a while: one look can miss a process whose parent has just ended.
fn holds(announced: &mut Announced, found: Option<&Found>, now: Instant) -> bool {
    if found.is_some_and(|found| found.netns == announced.inode) {
        announced.seen = Some(now);
    }
    match announced.seen {
        Some(seen) => now.duration_since(seen) < limits::PLACES_GONE,
        None => now.duration_since(announced.since) < limits::PLACES_ANNOUNCED_AGE,
    }
}

/// Every pod's place: with a process of it, or as it was announced.
fn places(
    announced: &BTreeMap<String, Announced>,
    found: &BTreeMap<String, Found>,
    folders: &BTreeMap<String, String>,
    mount: &Path,
) -> BTreeMap<String, Place> {
    let cgroup = |folder: &str| mount.join(folder.trim_start_matches('/'));
    let mut places: BTreeMap<String, Place> = BTreeMap::new();
    for (uid, found) in found {
        let place = Place {
            netns: format!("/proc/{}/ns/net", found.pid).into(),
            netns_inode: Some(found.netns),
            cgroup: cgroup(&found.folder),
            addresses: Vec::new(),
        };
        places.insert(uid.clone(), place);
    }
    for (uid, announced) in announced {
        let with_process = found.get(uid).filter(|found| found.netns == announced.inode);
        let netns = match with_process {
            Some(found) => PathBuf::from(format!("/proc/{}/ns/net", found.pid)),
            // The agent's own descriptor: there is no process of the pod to go by.
            None => format!("/proc/{}/fd/{}", std::process::id(), announced.netns.as_raw_fd()).into(),
        };
        // The folder of an earlier sandbox's process is the pod's as well.
        let folder = found.get(uid).map(|found| &found.folder).or_else(|| folders.get(uid));
        let Some(folder) = folder else {
            places.remove(uid);
            continue;
        };
        let (netns_inode, addresses) = (Some(announced.inode), announced.addresses.clone());
        places.insert(uid.clone(), Place { netns, netns_inode, cgroup: cgroup(folder), addresses });
    }
    places
}

#[cfg(test)]
mod tests;
