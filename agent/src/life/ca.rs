//! The life of the CA: its listeners, until a signal. It answers `/metrics` and `/healthz/ready` on an address of their own.

use std::{io, net::SocketAddr};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{http, policy_status, start::EXPOSITION};
use crate::identity::ca::{Ca, CaConfig, CaError, Vitals};

/// Why the CA can't run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("can't listen for metrics on {0}: {1}")]
    Metrics(SocketAddr, io::Error),
    #[error(transparent)]
    Ca(#[from] CaError),
}

impl ServeError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Metrics(..) => "metrics_listen",
            Self::Ca(error) => error.reason(),
        }
    }
}

/// Runs the CA until `shutdown`. Metrics and readiness are answered until it has finished.
///
/// # Errors
/// When it can't start, or breaks.
pub async fn serve(
    config: CaConfig,
    metrics: SocketAddr,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let listener = TcpListener::bind(metrics).await.map_err(|error| ServeError::Metrics(metrics, error))?;
    let ca = Ca::bind(config).await?;
    let stop = CancellationToken::new();
    let serving = tokio::spawn(http::serve(listener, router(ca.vitals()), |_| true, stop.clone()));
    if let Some((client, publishes)) = ca.publishing() {
        let writing = policy_status::follow(client, publishes);
        tokio::spawn(stop.clone().run_until_cancelled_owned(writing));
    }
    let result = ca.run(shutdown).await;
    stop.cancel();
    // It ends at once: connections under way are tasks of their own.
    let _ = serving.await;
    Ok(result?)
}

fn router(vitals: Vitals) -> Router {
    async fn metrics(
        State(vitals): State<Vitals>,
    ) -> Result<([(&'static str, &'static str); 1], String), (StatusCode, String)> {
        let text = vitals.exposition().map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        Ok((EXPOSITION, text))
    }
    async fn ready(State(vitals): State<Vitals>) -> (StatusCode, String) {
        match vitals.waiting_for() {
            waits if waits.is_empty() => (StatusCode::OK, "ready\n".to_owned()),
            waits => (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for {}\n", waits.join("\nwaiting for "))),
        }
    }
    Router::new().route("/metrics", get(metrics)).route("/healthz/ready", get(ready)).with_state(vitals)
}
