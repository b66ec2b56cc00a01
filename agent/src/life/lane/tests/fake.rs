//! A kernel that is a table in memory, fails when told to, and notes what it is asked.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard},
};

use heddle_common::{Attestation, LocalEndpoints, Pair, ServicePort, Tuple, Verdict};

use crate::{
    capture::{CaptureError, LaneFault, ResidentPod},
    life::lane::kernel::Kernel,
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    Put(Pair, Verdict),
    Remove(Pair),
    /// A rulebook came into force (noted by the test).
    Rules,
}

#[derive(Debug)]
pub struct Inner {
    pub residents: Vec<ResidentPod>,
    pub pinned: Vec<ResidentPod>,
    pub table: BTreeMap<Pair, Verdict>,
    pub capacity: usize,
    /// One value for each counter that there is.
    pub denials: Vec<u64>,
    pub services: HashMap<ServicePort, LocalEndpoints>,
    pub connections: Vec<(Tuple, Attestation)>,
    pub done: Vec<Operation>,
    /// Paths that are not straight, by uid; from a pod to itself for its device.
    pub crooked: HashSet<(String, String)>,
    pub removals_fail: bool,
    pub proofs: usize,
}

#[derive(Debug, Clone)]
pub struct Fake(Arc<Mutex<Inner>>);

impl Fake {
    pub fn new(capacity: usize, counters: usize) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            residents: Vec::new(),
            pinned: Vec::new(),
            table: BTreeMap::new(),
            capacity,
            denials: vec![0; counters],
            services: HashMap::new(),
            connections: Vec::new(),
            done: Vec::new(),
            crooked: HashSet::new(),
            removals_fail: false,
            proofs: 0,
        })))
    }

    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    fn failing() -> CaptureError {
        CaptureError::Map { map: "VERDICTS", detail: "on purpose".into() }
    }
}

impl Kernel for Fake {
    fn residents(&self) -> Vec<ResidentPod> {
        self.inner().residents.clone()
    }

    fn pinned(&self) -> Result<Vec<ResidentPod>, CaptureError> {
        Ok(self.inner().pinned.clone())
    }

    fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>, CaptureError> {
        Ok(self.inner().table.iter().map(|(pair, verdict)| (*pair, *verdict)).collect())
    }

    fn put_verdict(&self, pair: Pair, verdict: Verdict) -> Result<bool, CaptureError> {
        let mut inner = self.inner();
        inner.done.push(Operation::Put(pair, verdict));
        if inner.table.len() >= inner.capacity && !inner.table.contains_key(&pair) {
            return Ok(false);
        }
        inner.table.insert(pair, verdict);
        Ok(true)
    }

    fn remove_verdict(&self, pair: &Pair) -> Result<(), CaptureError> {
        let mut inner = self.inner();
        inner.done.push(Operation::Remove(*pair));
        if inner.removals_fail {
            return Err(Self::failing());
        }
        inner.table.remove(pair);
        Ok(())
    }

    fn denials(&self) -> Result<Vec<u64>, CaptureError> {
        Ok(self.inner().denials.clone())
    }

    fn denial(&self, counter: u32) -> Result<u64, CaptureError> {
        Ok(self.inner().denials[counter as usize])
    }

    fn set_services(&self, wanted: &HashMap<ServicePort, LocalEndpoints>) -> Result<(), CaptureError> {
        self.inner().services.clone_from(wanted);
        Ok(())
    }

    fn connections(&self) -> Result<Vec<(Tuple, Attestation)>, CaptureError> {
        Ok(self.inner().connections.clone())
    }

    async fn destroy(&self, doomed: Vec<(Tuple, Attestation)>) -> usize {
        let mut inner = self.inner();
        let before = inner.connections.len();
        inner.connections.retain(|(tuple, _)| !doomed.iter().any(|(other, _)| other == tuple));
        before - inner.connections.len()
    }

    async fn prove_device(&self, uid: &str) -> Result<(), LaneFault> {
        match self.inner().crooked.contains(&(uid.to_owned(), uid.to_owned())) {
            true => Err(LaneFault::Probe("no link to this node".into())),
            false => Ok(()),
        }
    }

    async fn prove_path(&self, source: &str, destination: &str) -> Result<(), LaneFault> {
        let mut inner = self.inner();
        inner.proofs += 1;
        match inner.crooked.contains(&(source.to_owned(), destination.to_owned())) {
            true => Err(LaneFault::Probe("not straight".into())),
            false => Ok(()),
        }
    }
}
