//! Why a connection that came in could not be delivered.

use std::sync::Arc;

use super::target::TargetError;
use crate::{
    life::{budget::Refusal, limits},
    policy::Denial,
};

#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("only CONNECT without a protocol is served")]
    Method,
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Denied(#[from] Denial),
    #[error(transparent)]
    Budget(#[from] Refusal),
    #[error("connecting to the app failed: {detail}")]
    App { reason: &'static str, detail: Arc<str> },
    #[error("the app did not accept in time")]
    AppTimeout,
    #[error("the client went away before it was answered")]
    ClientGone,
    #[error("no identity: {detail}")]
    Identity { reason: &'static str, detail: Arc<str> },
    #[error("TLS handshake failed: {detail}")]
    Tls { reason: &'static str, detail: Arc<str> },
    #[error("HTTP/2 handshake failed: {0}")]
    Http2(Arc<str>),
    #[error("no CONNECT came in time")]
    NoConnect,
    #[error("more than {} header fields", limits::HEADER_FIELDS)]
    HeaderFields,
    #[error("the peer breaks HTTP/2: {0}")]
    Protocol(Arc<str>),
    #[error("the peer floods: {0}")]
    Flood(Arc<str>),
}

impl AnswerError {
    /// Stable name: metric label and log key.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Method => "bad_method",
            Self::Target(error) => error.reason(),
            Self::Denied(denial) => denial.reason(),
            Self::Budget(refusal) => refusal.reason(),
            Self::App { reason, .. } | Self::Identity { reason, .. } | Self::Tls { reason, .. } => reason,
            Self::AppTimeout => "app_timeout",
            Self::ClientGone => "client_gone",
            Self::Http2(_) => "h2_handshake",
            Self::NoConnect => "no_connect",
            Self::HeaderFields => "header_fields",
            Self::Protocol(_) => "h2_protocol",
            Self::Flood(_) => "h2_flood",
        }
    }

    /// As Istio's `response_flags` label has it.
    pub fn response_flags(&self) -> &'static str {
        match self {
            Self::Denied(_) => "DENY",
            Self::App { .. } | Self::AppTimeout => "CONNECT",
            Self::Identity { .. } => "IDENTITY_ERROR",
            Self::Tls { .. } => "TLS_FAILURE",
            Self::Http2(_) | Self::NoConnect => "H2_HANDSHAKE_FAILURE",
            Self::Method
            | Self::Target(_)
            | Self::Budget(_)
            | Self::ClientGone
            | Self::HeaderFields
            | Self::Protocol(_)
            | Self::Flood(_) => "-",
        }
    }

    /// The status that CONNECT is answered with.
    pub fn status(&self) -> http::StatusCode {
        match self {
            Self::Method | Self::Target(_) => http::StatusCode::BAD_REQUEST,
            Self::Denied(_) => http::StatusCode::UNAUTHORIZED,
            Self::HeaderFields => http::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            _ => http::StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}
