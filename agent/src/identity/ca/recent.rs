//! What is remembered for a while: a map with a cap whose entries end by themselves. Pure; time is given.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    time::Instant,
};

/// Entries with an end each; where there is no room the one that was written first goes.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
    cap: usize,
    entries: HashMap<K, (Instant, V)>,
    /// Keys in the order in which they were written first.
    order: VecDeque<K>,
}

impl<K: Hash + Eq + Clone, V> Recent<K, V> {
    pub fn new(cap: usize) -> Self {
        Self { cap: cap.max(1), entries: HashMap::new(), order: VecDeque::new() }
    }

    pub fn get(&self, key: &K, now: Instant) -> Option<&V> {
        self.entries.get(key).filter(|(until, _)| now < *until).map(|(_, value)| value)
    }

    /// Writes an entry; one that is there is replaced, its end too.
    pub fn put(&mut self, key: K, value: V, until: Instant, now: Instant) {
        self.forget(now);
        if self.entries.insert(key.clone(), (until, value)).is_none() {
            self.order.push_back(key);
            if self.entries.len() > self.cap {
                self.drop_first();
            }
        }
    }

    /// What is remembered of `key` until `until` from now on; a new one where there is nothing.
    pub fn entry(&mut self, key: &K, until: Instant, now: Instant, new: impl FnOnce() -> V) -> Option<&mut V> {
        match self.entries.get_mut(key) {
            Some((end, _)) if now < *end => *end = until,
            _ => self.put(key.clone(), new(), until, now),
        }
        self.entries.get_mut(key).map(|(_, value)| value)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Drops what has ended and was written first: with one lifetime for all, everything that has ended.
    fn forget(&mut self, now: Instant) {
        while let Some(key) = self.order.front() {
            match self.entries.get(key) {
                Some((until, _)) if now < *until => return,
                _ => self.drop_first(),
            }
        }
    }

    fn drop_first(&mut self) {
        if let Some(key) = self.order.pop_front() {
            self.entries.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LIFE: Duration = Duration::from_secs(10);

    #[test]
    fn an_entry_ends_by_itself_and_leaves_no_trace() {
        let start = Instant::now();
        let mut recent = Recent::new(10);
        recent.put("a", 1, start + LIFE, start);
        recent.put("b", 2, start + LIFE * 2, start);
        let later = start + LIFE;
        assert_eq!(
            (recent.get(&"a", start), recent.get(&"a", later), recent.get(&"b", later)),
            (Some(&1), None, Some(&2))
        );
        recent.put("c", 3, later + LIFE, later);
        assert_eq!(recent.len(), 2);
    }

    #[test]
    fn an_entry_that_is_written_again_lives_on() {
        let start = Instant::now();
        let mut recent = Recent::new(10);
        recent.put("a", 1, start + LIFE, start);
        recent.put("a", 2, start + LIFE * 3, start);
        recent.put("b", 3, start + LIFE * 3, start + LIFE * 2);
        assert_eq!(recent.get(&"a", start + LIFE * 2), Some(&2));
        assert_eq!(recent.len(), 2);
    }

    #[test]
    fn a_full_table_forgets_the_oldest() {
        let start = Instant::now();
        let mut recent = Recent::new(3);
        for key in 0..5 {
            recent.put(key, (), start + LIFE, start);
        }
        assert_eq!(recent.len(), 3);
        let kept: Vec<i32> = (0..5).filter(|key| recent.get(key, start).is_some()).collect();
        assert_eq!(kept, [2, 3, 4]);
    }
}
