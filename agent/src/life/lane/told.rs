//! What is told of connections that the agent never carried.

use super::counters::Denied;
use crate::policy::Denial;

/// Who is told.
pub trait Told: Send + Sync + std::fmt::Debug {
    /// The kernel refused connections of a pair.
    fn denied(&self, denied: &Denied);
    /// An open connection (by [`heddle_common::Attestation::id`]) is about to be closed, and why.
    fn revoked(&self, id: u64, denial: &Denial);
}
