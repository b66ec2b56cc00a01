//! What the tunnel tells the kernel lane: that a connection between two pods of this node had to go through the agent.
//!
//! The lane then decides whether the kernel may carry the next one. Telling never waits, and changes nothing for the connection
//! that is told of.

use std::sync::Arc;

/// The kernel lane, as the tunnel knows it.
pub trait Lane: Send + Sync + std::fmt::Debug {
    /// A connection between two enrolled pods of this node (by uid) came to the agent for want of a verdict. `port` is the
    /// destination pod's own, not the Service's.
    fn missed(&self, source: &Arc<str>, destination: &Arc<str>, port: u16);
}

/// No lane: every connection goes through the agent.
impl Lane for () {
    fn missed(&self, _: &Arc<str>, _: &Arc<str>, _: u16) {}
}
