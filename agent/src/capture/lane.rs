//! The kernel lane's tables, as the rest of the agent sees them: pods, verdicts, Services with endpoints on this node,
//! connections and their ends.
//!
//! Beside the journey: what it holds is decided elsewhere and applied by the programs. It never makes a verdict.
#![allow(unsafe_code, reason = "tokio asks for a promise about a descriptor that it watches")]

use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError},
};

use aya::maps::{MapData, RingBuf};
use heddle_common::{
    Attestation, Ended, LocalEndpoints, MAX_DENIALS, Pair, ServicePort, Tuple, Verdict, attested_by, maps, side,
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    CaptureError, LaneFault, destroy, kernel,
    maps::{failed, ignore_absent, tuple},
    path,
    pin::Record,
    pod::Node,
};

/// The kernel's name of an enrolled pod: 64 random bits that no other pod ever gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WorkloadId(pub u64);

impl fmt::Display for WorkloadId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

/// A pod of this node whose programs are attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResidentPod {
    pub uid: Arc<str>,
    pub id: WorkloadId,
    pub slot: u32,
    pub addresses: Vec<IpAddr>,
    /// Whether the kernel can tell the pod's sockets from others: it knows the netns' cookie (Linux 5.14).
    pub attestable: bool,
}

/// The kernel lane of this node. Cheap to clone. Each call is a system call or a few, of about a microsecond, unless it says
/// that it walks a table.
#[derive(Debug, Clone)]
pub struct Lane {
    node: Arc<Node>,
}

impl Lane {
    pub(super) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    /// The attached pods, in no order. No system call.
    #[must_use]
    pub fn residents(&self) -> Vec<ResidentPod> {
        let pods = self.node.pods().into_iter();
        pods.filter_map(|pod| {
            let live = pod.live()?;
            Some(ResidentPod {
                uid: Arc::clone(&pod.uid),
                id: live.workload,
                slot: live.slot,
                addresses: live.spec.addresses.clone(),
                attestable: live.cookie.is_some(),
            })
        })
        .collect()
    }

    /// The pods that are pinned, attached by this agent or not, as they were attached last. Reads bpffs.
    pub fn pinned(&self) -> Result<Vec<ResidentPod>, CaptureError> {
        let path = || self.node.config.bpffs.clone();
        let pods = self.node.pins.pods().map_err(|source| CaptureError::Bpffs { path: path(), source })?;
        let resident = |record: Record| ResidentPod {
            uid: record.uid.into(),
            id: record.workload,
            slot: record.slot,
            addresses: record.addresses,
            // Its programs know; what they can't attest has no verdict.
            attestable: true,
        };
        Ok(pods.into_iter().filter_map(|(_, record)| record.map(resident)).collect())
    }

    /// What the kernel holds. Walks the table.
    pub fn verdicts(&self) -> Result<Vec<(Pair, Verdict)>, CaptureError> {
        self.node.maps.verdicts()
    }

    /// Puts a verdict in, instead of the pair's former one. `false`: the table is full.
    pub fn put_verdict(&self, pair: Pair, verdict: Verdict) -> Result<bool, CaptureError> {
        self.node.maps.put_verdict(pair, verdict)
    }

    /// Takes a verdict out, if there is one.
    pub fn remove_verdict(&self, pair: &Pair) -> Result<(), CaptureError> {
        self.node.maps.remove_verdict(pair)
    }

    /// How often each verdict of denial was applied since the counters were made, by counter. Walks the table.
    pub fn denials(&self) -> Result<Vec<u64>, CaptureError> {
        (0..MAX_DENIALS).map(|counter| self.node.maps.denial(counter)).collect()
    }

    /// How often the denial with this counter was applied since the counters were made.
    pub fn denial(&self, counter: u32) -> Result<u64, CaptureError> {
        self.node.maps.denial(counter)
    }

    /// Makes the table of Services exactly this. What is in it before and after is never absent in between. Walks the table.
    pub fn set_services(&self, wanted: &HashMap<ServicePort, LocalEndpoints>) -> Result<(), CaptureError> {
        let mut services = self.node.maps.services.lock().unwrap_or_else(PoisonError::into_inner);
        let known: Vec<ServicePort> = services.keys().collect::<Result<_, _>>().map_err(failed(maps::SERVICES))?;
        for service in known.iter().filter(|service| !wanted.contains_key(service)) {
            ignore_absent(services.remove(service)).map_err(failed(maps::SERVICES))?;
        }
        for (service, endpoints) in wanted {
            if services.get(service, 0).ok().as_ref() != Some(endpoints) {
                services.insert(service, endpoints, 0).map_err(failed(maps::SERVICES))?;
            }
        }
        Ok(())
    }

    /// The connections that are on the lane now, or about to be. Walks the table.
    pub fn connections(&self) -> Result<Vec<(Tuple, Attestation)>, CaptureError> {
        let mut all = self.node.maps.all_attested()?;
        all.retain(|(_, attestation)| attestation.by == attested_by::KERNEL);
        Ok(all)
    }

    /// Who the kernel says connects from `client` to the pod's `app`, if it says anything.
    #[must_use]
    pub fn attested(&self, client: SocketAddr, app: SocketAddr) -> Option<Attestation> {
        let attestation = self.node.maps.attested(&tuple(client, app))?;
        (attestation.by == attested_by::KERNEL).then_some(attestation)
    }

    /// The same of a connection that has come to the agent for want of a verdict: it is the agent's from now on, so its entry is
    /// taken out.
    #[must_use]
    pub fn take_attested(&self, client: SocketAddr, app: SocketAddr) -> Option<Attestation> {
        // One whose handshake the app has completed is not this one.
        let waits = |by: &Attestation| by.destination_state & side::ESTABLISHED == 0;
        let attestation = self.attested(client, app).filter(waits)?;
        self.node.maps.let_go(&tuple(client, app));
        Some(attestation)
    }

    /// Closes connections at both ends. Gives how many were open.
    pub async fn destroy(&self, doomed: &[(Tuple, Attestation)]) -> usize {
        destroy::destroy(&self.node, doomed).await
    }

    /// Measures whether connections from one pod to another stay on their links to this node and arrive as they left. Some
    /// milliseconds; seconds where they do not.
    pub async fn prove_path(&self, source: &str, destination: &str) -> Result<(), LaneFault> {
        path::prove(&self.node, source, destination).await
    }

    /// Measures the part of it that is the pod's own.
    pub async fn prove_device(&self, uid: &str) -> Result<(), LaneFault> {
        let (_, live) = self.node.live(uid).map_err(|error| LaneFault::Probe(error.to_string()))?;
        path::measure(&live.netns, &live.spec.addresses).await.map(drop)
    }

    /// The ends of connections. One reader at a time; what nobody reads is there for the next agent.
    pub fn ended(&self) -> Result<EndedRing, CaptureError> {
        let ring = self.node.maps.events()?;
        // SAFETY: the ring owns its descriptor, gives the same one every time, and both go together.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        let ring = ring.map_err(|error| CaptureError::Map { map: maps::EVENTS, detail: error.to_string() })?;
        Ok(EndedRing { ring })
    }

    /// Ends that found no room in the ring, of the pods that are attached. A system call per pod.
    #[must_use]
    pub fn events_lost(&self) -> u64 {
        let lives = self.node.pods().into_iter().filter_map(|pod| pod.live());
        lives.filter_map(|live| self.node.maps.counts(live.slot).ok()).map(|counts| counts.events_lost).sum()
    }
}

/// The reader of the ring of ended connections.
pub struct EndedRing {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl fmt::Debug for EndedRing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("EndedRing").finish_non_exhaustive()
    }
}

/// The records that are there now. No system call.
impl Iterator for EndedRing {
    type Item = Ended;

    fn next(&mut self) -> Option<Ended> {
        loop {
            let item = self.ring.get_mut().next()?;
            if let Some(ended) = kernel::read_record(&item) {
                return Some(ended);
            }
        }
    }
}

impl EndedRing {
    /// Waits until the kernel says that records wait in numbers; it is silent about a few.
    ///
    /// # Errors
    /// When the runtime ends.
    pub async fn readable(&mut self) -> io::Result<()> {
        self.ring.readable_mut().await?.clear_ready();
        Ok(())
    }
}
