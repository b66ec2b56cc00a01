//! What is told of the lane to operators and scrapers.

use std::{collections::HashMap, sync::Arc};

use super::{eligible::asks_for_tls, kernel::LaneFault};
use crate::{capture::ResidentPod, cluster::Workload};

/// The lane at one moment, and what has happened since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The attached pods of the node by uid.
    pub pods: HashMap<Arc<str>, Switch>,
    pub paths: Vec<PathFault>,
    /// Pairs that are remembered, and verdicts that the kernel holds.
    pub pairs: usize,
    pub allowed: usize,
    pub denied: usize,
    /// Connections that came to the agent for want of a verdict, and those of them that were too many to be learnt from.
    pub misses: u64,
    pub unheard: u64,
    /// Verdicts that found the kernel's table full, that found no counter, and that went with forgotten pairs.
    pub full: u64,
    pub exhausted: u64,
    pub forgotten: u64,
    /// System calls that failed.
    pub failed: u64,
}

/// Whether a pod's connections may take the lane: on, or why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Switch {
    On,
    /// `reason` is stable; `detail` is for people.
    Off {
        reason: &'static str,
        detail: String,
    },
}

/// Two pods between which packets could not be shown to go straight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathFault {
    /// `namespace/name`.
    pub from: String,
    pub to: String,
    /// Stable.
    pub reason: &'static str,
    pub detail: String,
}

/// `captured` is as in [`super::eligible::Captured`].
pub(super) fn switch(workload: &Workload, pod: &ResidentPod, captured: Option<&Result<(), LaneFault>>) -> Switch {
    let off = |reason, detail: &str| Switch::Off { reason, detail: detail.to_owned() };
    let fault = |fault: &LaneFault| off(fault.reason(), &fault.to_string());
    match captured {
        _ if asks_for_tls(workload) => off("same_node_mtls", "heddle.dev/same-node asks for mutual TLS"),
        _ if !pod.attestable => fault(&LaneFault::NoNetnsCookie),
        None => off("uncaptured", "the pod's capture is not proven"),
        Some(Err(found)) => fault(found),
        Some(Ok(())) => Switch::On,
    }
}
