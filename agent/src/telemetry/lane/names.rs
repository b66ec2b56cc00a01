//! Which pod a workload id of the kernel lane means, also for a while after the pod has left.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use heddle_common::MAX_PODS;

use crate::cluster::{Snapshot, Workload};

/// Pods by workload id.
#[derive(Debug, Default)]
pub(super) struct Names {
    resident: HashMap<u64, Arc<Workload>>,
    /// Pods that have left, and when.
    gone: HashMap<u64, (Arc<Workload>, Instant)>,
}

impl Names {
    /// Takes the enrolled pods, id and uid. A pod that the snapshot has no more keeps the record that it had.
    pub fn learn(&mut self, residents: &[(u64, Arc<str>)], snapshot: &Snapshot, now: Instant) {
        let before = std::mem::take(&mut self.resident);
        for (id, uid) in residents {
            let left = self.gone.remove(id).map(|(workload, _)| workload);
            if let Some(workload) = snapshot.workloads.get(uid).or(before.get(id)).or(left.as_ref()) {
                self.resident.insert(*id, Arc::clone(workload));
            }
        }
        let left = before.into_iter().filter(|(id, _)| !self.resident.contains_key(id));
        self.gone.extend(left.map(|(id, workload)| (id, (workload, now))));
        while self.gone.len() > MAX_PODS as usize {
            let Some(oldest) = self.gone.iter().min_by_key(|(_, (_, left))| *left).map(|(id, _)| *id) else { return };
            self.gone.remove(&oldest);
        }
    }

    /// Forgets pods that left longer ago.
    pub fn forget(&mut self, after: Duration, now: Instant) {
        self.gone.retain(|_, (_, left)| now.saturating_duration_since(*left) < after);
    }

    pub fn get(&self, id: u64) -> Option<&Arc<Workload>> {
        self.resident.get(&id).or_else(|| self.gone.get(&id).map(|(workload, _)| workload))
    }

    /// Whether the pod is enrolled now.
    pub fn is_resident(&self, id: u64) -> bool {
        self.resident.contains_key(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(names: &[&str]) -> Snapshot {
        let pods = names.iter().map(|name| Arc::new(Workload::named("shop", name)));
        Snapshot { workloads: pods.map(|pod| (Arc::clone(&pod.uid), pod)).collect(), ..Snapshot::default() }
    }

    fn name(names: &Names, id: u64) -> Option<&str> {
        names.get(id).map(|workload| &*workload.name)
    }

    #[test]
    fn a_pod_is_known_for_a_while_after_it_has_left() {
        let (mut names, start) = (Names::default(), Instant::now());
        let after = Duration::from_secs(60);
        let residents = [(1, "uid-a".into()), (2, "uid-b".into())];
        names.learn(&residents, &snapshot(&["a", "b"]), start);
        // Out of the cluster first, then off the node.
        names.learn(&residents, &snapshot(&["b"]), start);
        assert_eq!((name(&names, 1), names.is_resident(1)), (Some("a"), true));
        names.learn(&residents[1..], &snapshot(&["b"]), start);
        assert_eq!((name(&names, 1), names.is_resident(1)), (Some("a"), false));
        names.forget(after, start + after / 2);
        assert_eq!((name(&names, 1), name(&names, 2), name(&names, 3)), (Some("a"), Some("b"), None));
        names.forget(after, start + after);
        assert_eq!((name(&names, 1), name(&names, 2)), (None, Some("b")));
    }

    #[test]
    fn pods_that_come_and_go_do_not_pile_up() {
        let (mut names, start) = (Names::default(), Instant::now());
        let last = 2 * u64::from(MAX_PODS);
        for id in 0..=last {
            names.learn(&[(id, "uid-a".into())], &snapshot(&["a"]), start + Duration::from_millis(id));
        }
        assert_eq!(names.gone.len(), MAX_PODS as usize);
        assert_eq!((name(&names, 0), name(&names, last - 1)), (None, Some("a")));
    }
}
