//! What is known of each pod of this node that should be captured: for the metrics and for `heddle status`.

use std::sync::Arc;

use heddle_common::PodCounts;

use crate::capture::PodState;

/// One enrolled pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReport {
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub state: PodState,
    /// The kernel's counters; zero while the pod has no programs.
    pub counts: PodCounts,
}

impl PodReport {
    #[must_use]
    pub fn captured(&self) -> bool {
        self.state == PodState::Captured
    }

    /// Why it is not captured, stable; empty when it is.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match &self.state {
            PodState::Captured => "",
            PodState::Attached => "unproven",
            PodState::Uncaptured { reason, .. } => reason,
        }
    }

    /// Why it is not captured, for people; empty when it is.
    #[must_use]
    pub fn detail(&self) -> &str {
        match &self.state {
            PodState::Captured => "",
            PodState::Attached => "programs are attached, the proof is under way",
            PodState::Uncaptured { detail, .. } => detail,
        }
    }
}

/// The kernel's counters by name.
#[must_use]
pub fn named(counts: &PodCounts) -> [(&'static str, u64); 15] {
    [
        ("marked", counts.marked),
        ("unmarkable", counts.unmarkable),
        ("captured", counts.captured),
        ("attested", counts.attested),
        ("unattended_dropped", counts.unattended_dropped),
        ("unattended_passed", counts.unattended_passed),
        ("direct", counts.direct),
        ("udp_unprotected_connects", counts.udp_connects),
        ("udp_unprotected_datagrams", counts.udp_datagrams),
        ("lane", counts.lane),
        ("lane_denied", counts.lane_denied),
        ("lane_missed", counts.lane_missed),
        ("lane_full", counts.lane_full),
        ("lane_events_lost", counts.events_lost),
        ("kubelet_probes", counts.probes),
    ]
}
