//! The pairs of pods and ports that have talked, and what the kernel holds of each. Bounded: the one whose last miss is longest
//! ago leaves first, of the same source before any other's, so that a pod that tries every port drives out only itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use heddle_common::Pair;

use super::eligible::Decision;

/// Uids of the source and the destination.
pub(super) type Pods = (Arc<str>, Arc<str>);
/// Pods and the destination's port.
pub(super) type Seen = (Pods, u16);

/// An entry of the kernel's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub pair: Pair,
    pub decision: Decision,
    /// Where the kernel counts, of a denied pair.
    pub counter: u32,
}

#[derive(Debug)]
struct Slot {
    /// Rises with each miss of any pair.
    missed: u64,
    held: Option<Held>,
}

#[derive(Debug)]
pub(super) struct Pairs {
    pods: HashMap<Pods, BTreeMap<u16, Slot>>,
    order: BTreeMap<u64, Seen>,
    of_source: HashMap<Arc<str>, BTreeSet<u64>>,
    next: u64,
    capacity: usize,
    capacity_of_source: usize,
}

impl Pairs {
    /// Room for so many pairs, and for so many of one source.
    pub fn new(capacity: usize, capacity_of_source: usize) -> Self {
        Self {
            pods: HashMap::new(),
            order: BTreeMap::new(),
            of_source: HashMap::new(),
            next: 0,
            capacity,
            capacity_of_source,
        }
    }

    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Notes a miss. Gives what the kernel holds of the pair that had to leave for it.
    #[must_use]
    pub fn miss(&mut self, seen: &Seen) -> Option<Held> {
        let missed = self.next;
        self.next += 1;
        let mut left = None;
        if let Some(slot) = self.pods.get_mut(&seen.0).and_then(|ports| ports.get_mut(&seen.1)) {
            let before = std::mem::replace(&mut slot.missed, missed);
            self.order.remove(&before);
            if let Some(of_source) = self.of_source.get_mut(&seen.0.0) {
                of_source.remove(&before);
            }
        } else {
            let own = self.of_source.get(&seen.0.0).filter(|own| own.len() >= self.capacity_of_source);
            let oldest = match own {
                Some(own) => own.first().copied(),
                None if self.order.len() >= self.capacity => self.order.keys().next().copied(),
                None => None,
            };
            if let Some(oldest) = oldest.and_then(|oldest| self.order.get(&oldest).cloned()) {
                left = self.forget(&oldest);
            }
            self.pods.entry(seen.0.clone()).or_default().insert(seen.1, Slot { missed, held: None });
        }
        self.order.insert(missed, seen.clone());
        self.of_source.entry(Arc::clone(&seen.0.0)).or_default().insert(missed);
        left
    }

    /// Forgets a pair; gives what the kernel holds of it.
    pub fn forget(&mut self, seen: &Seen) -> Option<Held> {
        let ports = self.pods.get_mut(&seen.0)?;
        let slot = ports.remove(&seen.1)?;
        if ports.is_empty() {
            self.pods.remove(&seen.0);
        }
        self.order.remove(&slot.missed);
        if let Some(of_source) = self.of_source.get_mut(&seen.0.0) {
            of_source.remove(&slot.missed);
            if of_source.is_empty() {
                self.of_source.remove(&seen.0.0);
            }
        }
        slot.held
    }

    /// Every two pods that have talked.
    pub fn pods(&self) -> impl Iterator<Item = &Pods> {
        self.pods.keys()
    }

    pub fn contains(&self, pods: &Pods) -> bool {
        self.pods.contains_key(pods)
    }

    /// The ports of two pods, with what the kernel holds of each.
    pub fn ports(&self, pods: &Pods) -> impl Iterator<Item = (u16, Option<&Held>)> {
        self.pods.get(pods).into_iter().flatten().map(|(port, slot)| (*port, slot.held.as_ref()))
    }

    /// Notes what the kernel holds of a pair from now on, if the pair is known; gives what it held.
    pub fn hold(&mut self, (pods, port): &Seen, held: Option<Held>) -> Option<Held> {
        let slot = self.pods.get_mut(pods)?.get_mut(port)?;
        std::mem::replace(&mut slot.held, held)
    }

    /// Everything that the kernel holds.
    pub fn held(&self) -> impl Iterator<Item = &Held> {
        self.pods.values().flatten().filter_map(|(_, slot)| slot.held.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(source: &str, destination: &str, port: u16) -> Seen {
        ((source.into(), destination.into()), port)
    }

    fn held(port: u16) -> Held {
        Held { pair: Pair::new(1, 2, port), decision: Decision::Allow, counter: 0 }
    }

    fn known(pairs: &Pairs) -> Vec<String> {
        let mut known: Vec<_> = pairs
            .pods()
            .flat_map(|pods| pairs.ports(pods).map(move |(port, _)| format!("{}>{}:{port}", pods.0, pods.1)))
            .collect();
        known.sort();
        known
    }

    #[test]
    fn the_pair_whose_last_miss_is_longest_ago_leaves_first_and_takes_its_entry_with_it() {
        let mut pairs = Pairs::new(3, 3);
        for port in [1, 2, 3] {
            assert_eq!(pairs.miss(&seen("a", "b", port)), None);
            assert_eq!(pairs.hold(&seen("a", "b", port), Some(held(port))), None);
        }
        assert_eq!(pairs.miss(&seen("a", "b", 1)), None, "known already");
        assert_eq!(pairs.miss(&seen("c", "b", 1)), Some(held(2)));
        assert_eq!(known(&pairs), ["a>b:1", "a>b:3", "c>b:1"]);
        assert_eq!((pairs.len(), pairs.held().count()), (3, 2));
    }

    #[test]
    fn a_source_that_tries_every_port_drives_out_only_itself() {
        let mut pairs = Pairs::new(10, 2);
        assert_eq!(pairs.miss(&seen("good", "b", 80)), None);
        for port in 0..100 {
            assert_eq!(pairs.miss(&seen("bad", "b", port)), None);
        }
        assert_eq!(known(&pairs), ["bad>b:98", "bad>b:99", "good>b:80"]);
    }

    #[test]
    fn what_is_forgotten_leaves_nothing_behind() {
        let mut pairs = Pairs::new(10, 10);
        for port in 0..5 {
            assert_eq!(pairs.miss(&seen("a", "b", port)), None);
        }
        for port in 0..5 {
            pairs.forget(&seen("a", "b", port));
        }
        assert_eq!(pairs.forget(&seen("a", "b", 1)), None);
        assert_eq!(pairs.hold(&seen("a", "b", 1), Some(held(1))), None);
        assert!(pairs.pods.is_empty() && pairs.order.is_empty() && pairs.of_source.is_empty());
    }
}
