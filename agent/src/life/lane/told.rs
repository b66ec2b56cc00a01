//! What is told of connections that the agent never carried.

use super::{counters::Denied, eligible::Refused};
use crate::{policy::Denial, telemetry::Telemetry};

/// Who is told.
pub trait Told: Send + Sync + std::fmt::Debug {
    /// The kernel refused connections of a pair.
    fn denied(&self, denied: &Denied);
    /// An open connection (by [`heddle_common::Attestation::id`]) is about to be closed, and why.
    fn revoked(&self, id: u64, denial: &Denial);
}

impl Told for Telemetry {
    fn denied(&self, denied: &Denied) {
        let Refused { source, destination, port, denial } = &*denied.refused;
        self.lane().denied(source, destination, *port, denial, denied.connections);
    }

    fn revoked(&self, id: u64, denial: &Denial) {
        self.lane().revoked(id, denial.clone());
    }
}
