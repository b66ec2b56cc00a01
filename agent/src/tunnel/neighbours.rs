//! The pods that this agent serves at this moment, so that a connection between two of them need not leave it.
//!
//! Beside the listeners: a pod is here exactly while its listener is served. It knows who is charged, and decides nothing.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::life::budget::Account;

/// Served pods by uid.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    turns: AtomicU64,
    served: RwLock<HashMap<Arc<str>, (u64, Account)>>,
}

/// A pod's place among them, until it is dropped.
#[derive(Debug)]
pub(super) struct Present {
    neighbours: Arc<Neighbours>,
    uid: Arc<str>,
    turn: u64,
}

impl Neighbours {
    /// The pod is served from now on. A pod that is enrolled again takes the place of its earlier self.
    pub fn enter(self: &Arc<Self>, uid: &Arc<str>, account: &Account) -> Present {
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        served.insert(Arc::clone(uid), (turn, account.clone()));
        Present { neighbours: Arc::clone(self), uid: Arc::clone(uid), turn }
    }

    /// Who is charged for connections to the pod; `None` while it is not served.
    pub fn account(&self, uid: &str) -> Option<Account> {
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
        served.get(uid).map(|(_, account)| account.clone())
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut served = self.neighbours.served.write().unwrap_or_else(PoisonError::into_inner);
        if served.get(&self.uid).is_some_and(|(turn, _)| *turn == self.turn) {
            served.remove(&self.uid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::life::budget::{Budget, Machine};

    #[test]
    fn a_pod_is_there_while_it_is_served_and_its_earlier_self_does_not_take_it_along() {
        let budget = Budget::new(Machine { descriptors: 10_000, memory: 1 << 30 });
        let neighbours = Arc::new(Neighbours::default());
        let uid: Arc<str> = "a".into();
        let first = neighbours.enter(&uid, &budget.enrol(Arc::clone(&uid)));
        assert!(neighbours.account("a").is_some() && neighbours.account("b").is_none());
        let second = neighbours.enter(&uid, &budget.enrol(Arc::clone(&uid)));
        drop(first);
        assert!(neighbours.account("a").is_some());
        drop(second);
        assert!(neighbours.account("a").is_none());
        assert!(budget.pressure().pods.is_empty(), "its part of the budgets is given back");
    }
}
