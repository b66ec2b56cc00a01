//! The small HTTP server behind metrics, readiness and the admin socket.
//!
//! Pods can reach two of its endpoints, so each has its own share of connections, a connection is for one request, and both
//! have deadlines: who holds one open takes it from nobody for long.

use std::sync::Arc;

use axum::{Router, serve::Listener};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;

use super::limits;

/// Endpoints that share [`limits::ADMIN_REQUESTS`].
const ENDPOINTS: usize = 3;

/// Answers connections that `admit` lets in until `stop`; those under way go on within their deadline.
pub(super) async fn serve<L: Listener>(
    mut listener: L,
    router: Router,
    admit: impl Fn(&L::Io) -> bool + Send,
    stop: CancellationToken,
) {
    let budget = Arc::new(Semaphore::new(limits::ADMIN_REQUESTS / ENDPOINTS));
    loop {
        let accepted = async {
            let permit = Arc::clone(&budget).acquire_owned().await.ok()?;
            // Errors of accept are waited out inside.
            Some((permit, listener.accept().await.0))
        };
        let (permit, io) = tokio::select! {
            () = stop.cancelled() => return,
            accepted = accepted => match accepted {
                Some(accepted) => accepted,
                None => return,
            },
        };
        if !admit(&io) {
            continue;
        }
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits::ADMIN_HEAD)
                .keep_alive(false)
                .serve_connection(TokioIo::new(io), service);
            // Whether its client was well is of no interest, and it may say so a thousand times a second.
            let _client_error_or_deadline = timeout(limits::ADMIN_CONNECTION, connection).await;
        });
    }
}
