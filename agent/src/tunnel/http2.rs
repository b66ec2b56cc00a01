//! HTTP/2 as both sides of the tunnel use it: settings, the ping that finds a dead peer, and how full a connection is.
//!
//! The receive window of a connection is larger than all its streams' together, so no stream that nobody reads can stall
//! another. A peer need not be so kind: [`Stalls`] tells when one is not.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

use crate::life::limits;

pub(super) fn client() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_frame_size(limits::FRAME)
        .max_header_list_size(limits::HEADER_LIST)
        .max_send_buffer_size(limits::SEND_BUFFER)
        .max_concurrent_reset_streams(limits::H2_REMEMBERED_RESETS)
        .max_pending_accept_reset_streams(limits::H2_PENDING_RESETS)
        .max_local_error_reset_streams(Some(limits::H2_ERROR_RESETS))
        .data_frame_budget(limits::H2_DATA_OVERHEAD)
        .initial_max_send_streams(limits::STREAMS_PER_CONNECTION as usize)
        .enable_push(false);
    builder
}

pub(super) fn server() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_frame_size(limits::FRAME)
        .max_header_list_size(limits::HEADER_LIST)
        .max_concurrent_streams(limits::STREAMS_PER_CONNECTION)
        .max_send_buffer_size(limits::SEND_BUFFER)
        .max_concurrent_reset_streams(limits::H2_REMEMBERED_RESETS)
        .max_pending_accept_reset_streams(limits::H2_PENDING_RESETS)
        .max_local_error_reset_streams(Some(limits::H2_ERROR_RESETS))
        .data_frame_budget(limits::H2_DATA_OVERHEAD);
    builder
}

/// Pings the peer; returns when it does not answer in time.
pub(super) async fn until_dead(pings: Option<PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        sleep(limits::PING_INTERVAL).await;
        if !matches!(timeout(limits::PING_TIMEOUT, pings.ping(Ping::opaque())).await, Ok(Ok(_))) {
            return;
        }
    }
}

/// Streams of one connection that wait for room to send.
#[derive(Debug)]
pub(super) struct Stalls {
    base: Instant,
    waiting: AtomicU32,
    /// Milliseconds after `base`: when one last began to wait with no other waiting, or one got room.
    since: AtomicU64,
}

impl Default for Stalls {
    fn default() -> Self {
        Self { base: Instant::now(), waiting: AtomicU32::new(0), since: AtomicU64::new(0) }
    }
}

impl Stalls {
    pub fn begin(&self) -> Stall<'_> {
        if self.waiting.fetch_add(1, Ordering::Relaxed) == 0 {
            self.touch();
        }
        Stall(self)
    }

    /// Streams wait, and none has got room for [`limits::CONGESTED_AFTER`].
    pub fn congested(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
            && self.now().saturating_sub(Duration::from_millis(self.since.load(Ordering::Relaxed)))
                >= limits::CONGESTED_AFTER
    }

    fn now(&self) -> Duration {
        self.base.elapsed()
    }

    fn touch(&self) {
        self.since.store(u64::try_from(self.now().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// One stream's wait.
#[derive(Debug)]
pub(super) struct Stall<'a>(&'a Stalls);

impl Drop for Stall<'_> {
    fn drop(&mut self) {
        self.0.touch();
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
