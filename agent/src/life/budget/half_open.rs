//! A pod's connections whose peer has not authenticated yet. Pure.
//!
//! An honest handshake takes milliseconds, so when there are too many the one that has waited longest goes, of the address that has
//! most of them: refusing the newest would let a few silent sockets keep everybody out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

#[derive(Debug)]
pub(super) struct HalfOpen<T> {
    next: u64,
    total: usize,
    sources: HashMap<IpAddr, BTreeMap<u64, T>>,
    /// Addresses by how many they have.
    ranks: BTreeSet<(usize, IpAddr)>,
}

impl<T> Default for HalfOpen<T> {
    fn default() -> Self {
        Self { next: 0, total: 0, sources: HashMap::new(), ranks: BTreeSet::new() }
    }
}

impl<T> HalfOpen<T> {
    pub fn len(&self) -> usize {
        self.total
    }

    pub fn enter(&mut self, source: IpAddr, value: T) -> u64 {
        let id = self.next;
        self.next += 1;
        let of_source = self.sources.entry(source).or_default();
        self.ranks.remove(&(of_source.len(), source));
        of_source.insert(id, value);
        self.ranks.insert((of_source.len(), source));
        self.total += 1;
        id
    }

    pub fn leave(&mut self, source: IpAddr, id: u64) -> Option<T> {
        let of_source = self.sources.get_mut(&source)?;
        let value = of_source.remove(&id)?;
        self.ranks.remove(&(of_source.len() + 1, source));
        if of_source.is_empty() {
            self.sources.remove(&source);
        } else {
            self.ranks.insert((of_source.len(), source));
        }
        self.total -= 1;
        Some(value)
    }

    /// Takes out the oldest of the address that has most.
    pub fn evict(&mut self) -> Option<T> {
        let (_, source) = *self.ranks.last()?;
        let id = *self.sources.get(&source)?.keys().next()?;
        self.leave(source, id)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    fn at(host: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, host).into()
    }

    #[test]
    fn the_oldest_of_the_largest_goes() {
        let mut table = HalfOpen::default();
        table.enter(at(2), "modest");
        for name in ["first", "second", "third"] {
            table.enter(at(1), name);
        }
        assert_eq!(table.evict(), Some("first"));
        assert_eq!(table.evict(), Some("second"));
        assert_eq!(table.len(), 2);
    }

    proptest! {
        /// Whatever comes and goes, what is counted is what is there.
        #[test]
        fn counts_agree(steps in prop::collection::vec((0_u8..5, any::<bool>(), 0_usize..20), 0..300)) {
            let mut table = HalfOpen::default();
            let mut there: Vec<(IpAddr, u64)> = Vec::new();
            for (host, enters, at_index) in steps {
                if enters {
                    let id = table.enter(at(host), table.next);
                    there.push((at(host), id));
                } else if host == 0 {
                    let evicted = table.evict();
                    prop_assert_eq!(evicted.is_some(), !there.is_empty());
                    there.retain(|(_, id)| Some(*id) != evicted);
                } else if at_index < there.len() {
                    let (source, id) = there.swap_remove(at_index);
                    prop_assert_eq!(table.leave(source, id), Some(id));
                    prop_assert_eq!(table.leave(source, id), None);
                }
                prop_assert_eq!(table.len(), there.len());
                prop_assert_eq!(table.ranks.iter().map(|(count, _)| count).sum::<usize>(), there.len());
                prop_assert_eq!(table.ranks.len(), table.sources.len());
            }
        }
    }
}
