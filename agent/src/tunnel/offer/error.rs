//! Why a captured outbound connection could not be carried.

use std::sync::Arc;

use crate::life::budget::Refusal;

/// Cheap to clone: one failed connection attempt is told to all that waited for it.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum OfferError {
    #[error("nothing is known of the destination")]
    DestinationUnknown,
    #[error("service {0} has no such port")]
    NoSuchPort(Arc<str>),
    #[error("no healthy upstream: service {0} has no ready endpoint")]
    NoHealthyUpstream(Arc<str>),
    #[error("the pod has no address of the destination's family")]
    NoSourceAddress,
    #[error("no identity: {detail}")]
    Identity { reason: &'static str, detail: Arc<str> },
    #[error("connecting failed: {detail}")]
    Dial { reason: &'static str, detail: Arc<str> },
    #[error("connection timed out")]
    DialTimeout,
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008")]
    TunnelTimeout,
    #[error("TLS handshake failed: {detail}")]
    Tls { reason: &'static str, detail: Arc<str> },
    #[error("HTTP/2 handshake failed: {0}")]
    Http2(Arc<str>),
    #[error(transparent)]
    Budget(#[from] Refusal),
    #[error("no tunnel to the peer became free in time")]
    PoolExhausted,
    #[error("the destination is not the pod any more that it was")]
    DestinationReplaced,
    #[error("the peer did not answer CONNECT in time")]
    AnswerTimeout,
    #[error("the tunnel ended before CONNECT was answered: {0}")]
    Lost(Arc<str>),
    #[error("denied by the destination's policy")]
    Denied,
    #[error("the peer refused the request as malformed")]
    BadRequest,
    #[error("the peer could not reach the app")]
    Unavailable,
    #[error("the peer answered {0}")]
    Status(u16),
    #[error("closed by the agent")]
    Cancelled,
}

impl OfferError {
    /// Stable name: metric label and log key.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::DestinationUnknown => "destination_unknown",
            Self::NoSuchPort(_) => "no_such_port",
            Self::NoHealthyUpstream(_) => "no_healthy_upstream",
            Self::NoSourceAddress => "no_source_address",
            Self::Identity { reason, .. } | Self::Dial { reason, .. } | Self::Tls { reason, .. } => reason,
            Self::DialTimeout => "connect_timeout",
            Self::TunnelTimeout => "tunnel_connect_timeout",
            Self::Http2(_) => "h2_handshake",
            Self::Budget(refusal) => refusal.reason(),
            Self::PoolExhausted => "pool_exhausted",
            Self::DestinationReplaced => "destination_replaced",
            Self::AnswerTimeout => "connect_answer_timeout",
            Self::Lost(_) => "tunnel_lost",
            Self::Denied => "denied_by_peer",
            Self::BadRequest => "refused_by_peer",
            Self::Unavailable => "app_unreachable",
            Self::Status(_) => "unexpected_status",
            Self::Cancelled => "cancelled",
        }
    }

    /// As Istio's `response_flags` label has it.
    pub fn response_flags(&self) -> &'static str {
        match self {
            Self::Identity { .. } => "IDENTITY_ERROR",
            Self::Tls { .. } => "TLS_FAILURE",
            Self::Http2(_) => "H2_HANDSHAKE_FAILURE",
            Self::Denied => "DENY",
            Self::TunnelTimeout => "NETWORK_POLICY",
            Self::Cancelled | Self::Budget(_) => "-",
            _ => "CONNECT",
        }
    }

    /// Whether another endpoint may do better. No byte was sent when any of these happens.
    pub fn elsewhere(&self) -> bool {
        matches!(
            self,
            Self::NoSourceAddress
                | Self::Dial { .. }
                | Self::DialTimeout
                | Self::TunnelTimeout
                | Self::Tls { .. }
                | Self::Http2(_)
                | Self::PoolExhausted
                | Self::DestinationReplaced
                | Self::AnswerTimeout
                | Self::Lost(_)
                | Self::Unavailable
        )
    }
}
