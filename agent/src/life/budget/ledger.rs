//! Who holds how much of one resource: a part is reserved for each pod, the rest is whoever's comes first. Pure.

use std::collections::BTreeMap;

/// A pod's place in the ledger.
pub(super) type Place = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Short {
    /// The pod holds as much as one may.
    Pod,
    /// The pod's reserved part is used up, and so is what is shared.
    Node,
}

/// What there is of the resource.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// All there is for pods' traffic.
    pub total: u64,
    /// What every pod costs by the way, whether it has traffic or not.
    pub per_pod: u64,
    /// Reserved for each pod, as long as all reserved parts together are at most half of the total.
    pub reserve: u64,
    /// The most that one pod may hold.
    pub cap: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    used: u64,
    /// False for a pod that has left and whose connections still end: nothing is reserved for it.
    member: bool,
}

#[derive(Debug)]
pub(super) struct Ledger {
    terms: Terms,
    entries: BTreeMap<Place, Entry>,
    next: Place,
    members: u64,
    /// Sum of what pods hold beyond their reserved parts.
    beyond: u64,
    used: u64,
}

impl Ledger {
    pub fn new(terms: Terms) -> Self {
        Self { terms, entries: BTreeMap::new(), next: 0, members: 0, beyond: 0, used: 0 }
    }

    pub fn join(&mut self) -> Place {
        let place = self.next;
        self.next += 1;
        self.entries.insert(place, Entry { used: 0, member: true });
        self.members += 1;
        self.settle();
        place
    }

    pub fn leave(&mut self, place: Place) {
        if let Some(entry) = self.entries.get_mut(&place)
            && entry.member
        {
            entry.member = false;
            self.members -= 1;
            if entry.used == 0 {
                self.entries.remove(&place);
            }
            self.settle();
        }
    }

    /// Takes `amount` for a pod, all or nothing.
    pub fn take(&mut self, place: Place, amount: u64) -> Result<(), Short> {
        let (reserve, shared) = (self.reserve(), self.shared());
        let Some(entry) = self.entries.get_mut(&place) else { return Err(Short::Pod) };
        let after = entry.used.saturating_add(amount);
        if after > self.terms.cap {
            return Err(Short::Pod);
        }
        let own = if entry.member { reserve } else { 0 };
        let more = after.saturating_sub(own) - entry.used.saturating_sub(own);
        if more > 0 && self.beyond + more > shared {
            return Err(Short::Node);
        }
        entry.used = after;
        self.beyond += more;
        self.used += amount;
        Ok(())
    }

    /// Takes `amount` even where there is none: what is there already has to be counted.
    pub fn overdraw(&mut self, place: Place, amount: u64) {
        let reserve = self.reserve();
        if let Some(entry) = self.entries.get_mut(&place) {
            let own = if entry.member { reserve } else { 0 };
            let after = entry.used.saturating_add(amount);
            self.beyond += after.saturating_sub(own) - entry.used.saturating_sub(own);
            entry.used = after;
            self.used += amount;
        }
    }

    pub fn give(&mut self, place: Place, amount: u64) {
        let reserve = self.reserve();
        let Some(entry) = self.entries.get_mut(&place) else { return };
        let amount = amount.min(entry.used);
        let own = if entry.member { reserve } else { 0 };
        let after = entry.used - amount;
        self.beyond -= entry.used.saturating_sub(own) - after.saturating_sub(own);
        self.used -= amount;
        entry.used = after;
        if !entry.member && after == 0 {
            self.entries.remove(&place);
        }
    }

    pub fn used_by(&self, place: Place) -> u64 {
        self.entries.get(&place).map_or(0, |entry| entry.used)
    }

    pub fn used(&self) -> u64 {
        self.used
    }

    pub fn total(&self) -> u64 {
        self.terms.total
    }

    /// What is reserved for each pod now.
    pub fn reserve(&self) -> u64 {
        self.terms.reserve.min(self.available() / 2 / self.members.max(1))
    }

    /// What is not reserved for anyone.
    pub fn shared(&self) -> u64 {
        self.available().saturating_sub(self.reserve() * self.members)
    }

    fn available(&self) -> u64 {
        self.terms.total.saturating_sub(self.terms.per_pod * self.members)
    }

    /// Counts anew after the reserved part has changed.
    fn settle(&mut self) {
        let reserve = self.reserve();
        let beyond = |entry: &Entry| entry.used.saturating_sub(if entry.member { reserve } else { 0 });
        self.beyond = self.entries.values().map(beyond).sum();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TERMS: Terms = Terms { total: 1_000, per_pod: 10, reserve: 100, cap: 600 };

    #[test]
    fn a_hog_leaves_every_other_pod_its_reserved_part() {
        let mut ledger = Ledger::new(TERMS);
        let hog = ledger.join();
        let others = [ledger.join(), ledger.join()];
        // 970 for traffic, of which 300 are reserved; the hog has its own 100 and the shared 670, up to its cap.
        let taken = (0..2_000).filter(|_| ledger.take(hog, 1).is_ok()).count();
        assert_eq!(taken, 600);
        assert_eq!(ledger.take(hog, 1), Err(Short::Pod));
        for other in others {
            assert!((0..2_000).filter(|_| ledger.take(other, 1).is_ok()).count() >= 100);
        }
        assert_eq!(ledger.used(), 970);
        assert_eq!(ledger.take(others[0], 1), Err(Short::Node));
        ledger.give(hog, 10);
        assert_eq!(ledger.take(others[0], 10), Ok(()));
    }

    #[test]
    fn many_pods_share_half_of_what_there_is_as_reserved_parts() {
        let mut ledger = Ledger::new(Terms { per_pod: 0, ..TERMS });
        let pods: Vec<Place> = (0..50).map(|_| ledger.join()).collect();
        assert_eq!((ledger.reserve(), ledger.shared()), (10, 500));
        for pod in &pods {
            ledger.leave(*pod);
        }
        assert_eq!((ledger.reserve(), ledger.shared(), ledger.entries.len()), (100, 1_000, 0));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Join,
        Leave(usize),
        Take(usize, u64),
        Give(usize, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            1 => Just(Step::Join),
            1 => (0_usize..8).prop_map(Step::Leave),
            6 => (0_usize..8, 1_u64..120).prop_map(|(pod, amount)| Step::Take(pod, amount)),
            4 => (0_usize..8, 1_u64..120).prop_map(|(pod, amount)| Step::Give(pod, amount)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_024))]

        /// Against a count by hand: nothing is lost, no pod exceeds its cap, nothing is taken beyond what is shared, and a
        /// pod below its reserved part is never refused.
        #[test]
        fn the_books_are_right(steps in prop::collection::vec(step(), 1..200)) {
            let mut ledger = Ledger::new(TERMS);
            let mut pods: Vec<(Place, u64)> = Vec::new();
            let mut left: u64 = 0;
            for step in steps {
                match step {
                    Step::Join if pods.len() < 8 => pods.push((ledger.join(), 0)),
                    Step::Leave(at) if at < pods.len() => {
                        let (place, held) = pods.swap_remove(at);
                        ledger.leave(place);
                        left += held;
                        // Its connections end later.
                        ledger.give(place, held);
                        left -= held;
                        prop_assert_eq!(ledger.used_by(place), 0);
                    }
                    Step::Take(at, amount) if at < pods.len() => {
                        let (reserve, shared, beyond) = (ledger.reserve(), ledger.shared(), ledger.beyond);
                        let (place, held) = pods[at];
                        match ledger.take(place, amount) {
                            Ok(()) => {
                                pods[at].1 += amount;
                                prop_assert!(pods[at].1 <= TERMS.cap);
                                prop_assert!(ledger.beyond <= shared.max(beyond));
                            }
                            Err(Short::Pod) => prop_assert!(held + amount > TERMS.cap),
                            Err(Short::Node) => prop_assert!(held + amount > reserve),
                        }
                    }
                    Step::Give(at, amount) if at < pods.len() => {
                        let (place, held) = pods[at];
                        ledger.give(place, amount.min(held));
                        pods[at].1 -= amount.min(held);
                    }
                    _ => {}
                }
                let by_hand: u64 = pods.iter().map(|(_, held)| held).sum::<u64>() + left;
                prop_assert_eq!(ledger.used(), by_hand);
                for (place, held) in &pods {
                    prop_assert_eq!(ledger.used_by(*place), *held);
                }
                let beyond: u64 = pods.iter().map(|(_, held)| held.saturating_sub(ledger.reserve())).sum();
                prop_assert_eq!(ledger.beyond, beyond);
            }
        }
    }
}
