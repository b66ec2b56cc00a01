//! What is told of the lane to operators and scrapers.

use std::{collections::HashMap, sync::Arc};

use super::eligible::asks_for_tls;
use crate::{
    capture::{LaneFault, ResidentPod},
    cluster::Workload,
    telemetry::VerdictCounts,
};

/// The lane at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The attached pods of the node by uid.
    pub pods: HashMap<Arc<str>, Switch>,
    pub paths: Vec<PathFault>,
    pub counts: VerdictCounts,
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
