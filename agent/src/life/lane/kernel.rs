//! The kernel's tables, as far as the lane's decisions need them.

use std::collections::HashMap;

use heddle_common::{Attestation, LocalEndpoints, Pair, ServicePort, Tuple, Verdict};

use crate::capture::{self, CaptureError, LaneFault, ResidentPod};

/// What is asked of the kernel. Each call is one system call per entry, unless it says otherwise.
pub trait Kernel: Clone + Send + Sync + std::fmt::Debug + 'static {
    /// The attached pods of the node, with the ids by which the kernel knows them. No system call.
    fn residents(&self) -> Vec<ResidentPod>;
    /// Those that an earlier agent may have left, attached by now or not. Reads bpffs.
    fn pinned(&self) -> Result<Vec<ResidentPod>, CaptureError>;
    /// Every verdict that the kernel holds. Walks the table.
    fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>, CaptureError>;
    /// Writes one; `false` when the table is full.
    fn put_verdict(&self, pair: Pair, verdict: Verdict) -> Result<bool, CaptureError>;
    /// An absent one is fine.
    fn remove_verdict(&self, pair: &Pair) -> Result<(), CaptureError>;
    /// Connections denied so far, by counter. Walks the table.
    fn denials(&self) -> Result<Vec<u64>, CaptureError>;
    /// The same of one counter.
    fn denial(&self, counter: u32) -> Result<u64, CaptureError>;
    /// Makes the table of Services exactly this.
    fn set_services(&self, wanted: &HashMap<ServicePort, LocalEndpoints>) -> Result<(), CaptureError>;
    /// The lane's open connections. Walks the table.
    fn connections(&self) -> Result<Vec<(Tuple, Attestation)>, CaptureError>;
    /// Closes connections at both ends; gives how many.
    fn destroy(&self, doomed: Vec<(Tuple, Attestation)>) -> impl Future<Output = usize> + Send;
    /// Measures whether a pod can take the lane with any other; by uid.
    fn prove_device(&self, uid: &str) -> impl Future<Output = Result<(), LaneFault>> + Send;
    /// Shows that packets from one pod reach the other on this host and as they were sent; by uid.
    fn prove_path(&self, source: &str, destination: &str) -> impl Future<Output = Result<(), LaneFault>> + Send;
}

impl Kernel for capture::Lane {
    fn residents(&self) -> Vec<ResidentPod> {
        Self::residents(self)
    }

    fn pinned(&self) -> Result<Vec<ResidentPod>, CaptureError> {
        Self::pinned(self)
    }

    fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>, CaptureError> {
        Self::verdicts(self)
    }

    fn put_verdict(&self, pair: Pair, verdict: Verdict) -> Result<bool, CaptureError> {
        Self::put_verdict(self, pair, verdict)
    }

    fn remove_verdict(&self, pair: &Pair) -> Result<(), CaptureError> {
        Self::remove_verdict(self, pair)
    }

    fn denials(&self) -> Result<Vec<u64>, CaptureError> {
        Self::denials(self)
    }

    fn denial(&self, counter: u32) -> Result<u64, CaptureError> {
        Self::denial(self, counter)
    }

    fn set_services(&self, wanted: &HashMap<ServicePort, LocalEndpoints>) -> Result<(), CaptureError> {
        Self::set_services(self, wanted)
    }

    fn connections(&self) -> Result<Vec<(Tuple, Attestation)>, CaptureError> {
        Self::connections(self)
    }

    async fn destroy(&self, doomed: Vec<(Tuple, Attestation)>) -> usize {
        Self::destroy(self, &doomed).await
    }

    async fn prove_device(&self, uid: &str) -> Result<(), LaneFault> {
        Self::prove_device(self, uid).await
    }

    async fn prove_path(&self, source: &str, destination: &str) -> Result<(), LaneFault> {
        Self::prove_path(self, source, destination).await
    }
}
