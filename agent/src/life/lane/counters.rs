//! The kernel's counters of denied connections: which pair each one is for, and what of its value has been told already. Pure.
//!
//! A counter is given to another pair only after its value was read for the pair that had it. Counters rise for ever; nobody
//! sets them back.

use std::{collections::HashMap, sync::Arc};

use super::eligible::Refused;

/// A denied pair and how many of its connections the kernel refused since this was last told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    pub refused: Arc<Refused>,
    pub connections: u64,
}

/// The pool.
#[derive(Debug)]
pub(super) struct Counters {
    /// What was read last, of each.
    told: Vec<u64>,
    free: Vec<u32>,
    used: HashMap<u32, (u64, Arc<Refused>)>,
    /// Given back, and not read since.
    returned: Vec<(u32, Arc<Refused>)>,
    of_source: HashMap<u64, usize>,
    capacity_of_source: usize,
}

impl Counters {
    /// `values` are what the kernel's counters say now.
    pub fn new(values: Vec<u64>, capacity_of_source: usize) -> Self {
        let count = u32::try_from(values.len()).unwrap_or(u32::MAX);
        Self {
            told: values,
            free: (0..count).rev().collect(),
            used: HashMap::new(),
            returned: Vec::new(),
            of_source: HashMap::new(),
            capacity_of_source,
        }
    }

    /// A counter for a pair of a source (by id), unless all are in use, or the source has its share.
    pub fn take(&mut self, source: u64, refused: &Arc<Refused>) -> Option<u32> {
        if self.of_source.get(&source).is_some_and(|count| *count >= self.capacity_of_source) {
            return None;
        }
        let counter = self.free.pop()?;
        self.note(counter, source, refused);
        Some(counter)
    }

    /// Takes a counter that the kernel's table already uses; `false` when it is another pair's, or is none.
    pub fn adopt(&mut self, counter: u32, source: u64, refused: &Arc<Refused>) -> bool {
        let Some(at) = self.free.iter().position(|free| *free == counter) else { return false };
        self.free.swap_remove(at);
        self.note(counter, source, refused);
        true
    }

    fn note(&mut self, counter: u32, source: u64, refused: &Arc<Refused>) {
        self.used.insert(counter, (source, Arc::clone(refused)));
        *self.of_source.entry(source).or_default() += 1;
    }

    /// Gives a counter back. Its entry must be out of the kernel's table.
    pub fn give_back(&mut self, counter: u32) {
        let Some((source, refused)) = self.used.remove(&counter) else { return };
        if let Some(count) = self.of_source.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.of_source.remove(&source);
            }
        }
        self.returned.push((counter, refused));
    }

    /// Whether there is anything to read.
    pub fn counting(&self) -> bool {
        !self.used.is_empty() || !self.returned.is_empty()
    }

    /// Whether a reading would free some.
    pub fn would_free(&self) -> bool {
        self.free.is_empty() && !self.returned.is_empty()
    }

    /// Takes the kernel's values, and gives what they have risen by, pair by pair. A counter that can't be read now is read the next
    /// time.
    pub fn read(&mut self, mut value: impl FnMut(u32) -> Option<u64>) -> Vec<Denied> {
        let mut denied = Vec::new();
        let told = &mut self.told;
        let mut rise = |counter: u32, refused: &Arc<Refused>| {
            let before = usize::try_from(counter).ok().and_then(|at| told.get_mut(at));
            let (Some(before), Some(now)) = (before, value(counter)) else { return false };
            let connections = now.saturating_sub(*before);
            *before = now;
            if connections > 0 {
                denied.push(Denied { refused: Arc::clone(refused), connections });
            }
            true
        };
        for (counter, (_, refused)) in &self.used {
            rise(*counter, refused);
        }
        let free = &mut self.free;
        self.returned.retain(|(counter, refused)| {
            let read = rise(*counter, refused);
            if read {
                free.push(*counter);
            }
            !read
        });
        denied
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::Workload, policy::Denial};

    fn refused(port: u16) -> Arc<Refused> {
        Arc::new(Refused {
            source: Arc::new(Workload::named("shop", "a")),
            destination: Arc::new(Workload::named("shop", "b")),
            port,
            denial: Denial::NotAllowed,
        })
    }

    fn read(counters: &mut Counters, values: &[u64]) -> Vec<(u16, u64)> {
        told(&counters.read(|counter| values.get(counter as usize).copied()))
    }

    fn told(denied: &[Denied]) -> Vec<(u16, u64)> {
        let mut told: Vec<_> = denied.iter().map(|one| (one.refused.port, one.connections)).collect();
        told.sort_unstable();
        told
    }

    #[test]
    fn each_pair_is_told_what_its_counter_rose_by_and_nothing_twice() {
        let mut counters = Counters::new(vec![7, 100], 2);
        let (one, two) = (counters.take(1, &refused(1)).unwrap(), counters.take(1, &refused(2)).unwrap());
        assert_eq!((one, two), (0, 1));
        assert_eq!(read(&mut counters, &[10, 100]), [(1, 3)]);
        assert_eq!(read(&mut counters, &[10, 105]), [(2, 5)]);
        assert_eq!(read(&mut counters, &[10, 105]), []);
    }

    #[test]
    fn a_counter_is_read_for_its_pair_before_another_gets_it() {
        let mut counters = Counters::new(vec![0], 2);
        let counter = counters.take(1, &refused(1)).unwrap();
        counters.give_back(counter);
        assert_eq!(counters.take(2, &refused(2)), None, "not read yet");
        assert!(counters.would_free());
        assert_eq!(read(&mut counters, &[]), [], "it can't be read now");
        assert_eq!(counters.take(2, &refused(2)), None, "so it is not read yet");
        assert_eq!(read(&mut counters, &[4]), [(1, 4)]);
        assert_eq!(counters.take(2, &refused(2)), Some(counter));
        assert_eq!(read(&mut counters, &[6]), [(2, 2)]);
    }

    #[test]
    fn a_source_has_no_more_than_its_share_and_a_counter_one_pair() {
        let mut counters = Counters::new(vec![0; 10], 2);
        assert!(counters.adopt(3, 1, &refused(1)));
        assert!(!counters.adopt(3, 2, &refused(2)) && !counters.adopt(10, 2, &refused(2)));
        let second = counters.take(1, &refused(2)).unwrap();
        assert_ne!(second, 3);
        assert_eq!(counters.take(1, &refused(3)), None);
        assert!(counters.take(2, &refused(3)).is_some());
        counters.give_back(second);
        assert!(counters.take(1, &refused(3)).is_some());
    }
}
