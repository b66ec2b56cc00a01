//! What policy is asked and what it answers.

use std::{net::IpAddr, sync::Arc};

use crate::{cluster::Workload, identity::SpiffeId};

/// A connection that wants to reach an app on this node. Kept with the connection, so that it can be decided again.
#[derive(Debug, Clone)]
pub struct Request {
    /// The authenticated identity of the peer, proven by TLS or by the kernel; `None` for plaintext.
    pub principal: Option<SpiffeId>,
    /// Source address as the destination sees it.
    pub source_ip: IpAddr,
    /// The workload that would receive it.
    pub destination: Arc<Workload>,
    pub destination_ip: IpAddr,
    /// The pod's port, not 15008.
    pub destination_port: u16,
}

/// Leave to forward one connection. Made only by [`super::decide`].
#[derive(Debug)]
#[must_use = "a permit is what forwarding is for"]
pub struct Permit {
    pub(super) by: Option<Arc<str>>,
}

impl Permit {
    /// The ALLOW policy (`namespace/name`) that let the connection in; `None` where no policy selects the workload.
    #[must_use]
    pub fn policy(&self) -> Option<&Arc<str>> {
        self.by.as_ref()
    }
}

/// Why a connection may not be forwarded. `policy` is `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("explicitly denied by: {policy}")]
    Explicit { policy: Arc<str> },
    #[error("allow policies exist, but none allowed")]
    NotAllowed,
    #[error("mutual TLS is required by: {policy}")]
    PlaintextRefused { policy: Arc<str> },
    #[error("policy can't be enforced, so it denies: {policy}")]
    Unenforceable { policy: Arc<str> },
    /// What may hold policies could not be read since the agent started: nobody knows what they say.
    #[error("policies may be missing, because a manifest can't be read: {source_file}")]
    Incomplete { source_file: Arc<str> },
    /// The workload is not in the snapshot that the rules came from, so nothing is known of what selects it.
    #[error("no policy is known for workload {uid}")]
    UnknownWorkload { uid: Arc<str> },
}

impl Denial {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Explicit { .. } => "policy_denied",
            Self::NotAllowed => "policy_not_allowed",
            Self::PlaintextRefused { .. } => "mtls_required",
            Self::Unenforceable { .. } => "policy_unenforceable",
            Self::Incomplete { .. } => "policies_incomplete",
            Self::UnknownWorkload { .. } => "workload_unknown",
        }
    }

    /// The policy that denied it, where it was one.
    #[must_use]
    pub fn policy(&self) -> Option<&Arc<str>> {
        match self {
            Self::Explicit { policy } | Self::PlaintextRefused { policy } | Self::Unenforceable { policy } => {
                Some(policy)
            }
            Self::NotAllowed | Self::Incomplete { .. } | Self::UnknownWorkload { .. } => None,
        }
    }
}

/// The answer to a [`Request`].
pub type Outcome = Result<Permit, Denial>;
