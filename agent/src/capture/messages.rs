//! What the kernel's programs have to say (aya-log), in the agent's log.
//!
//! All pods' programs share one ring buffer; one task empties it. Losing a message loses nothing else.
#![allow(unsafe_code, reason = "registering a descriptor with the runtime promises that it stays open")]

use std::os::fd::OwnedFd;

use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

/// Forwards until the runtime ends. The ring buffer is found by way of one program that uses it.
pub async fn forward(program: OwnedFd, id: u32) {
    let logger = match EbpfLogger::init_from_id(id) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!(%error, "messages of the kernel's programs are not read");
            return;
        }
    };
    drop(program);
    // SAFETY: the logger owns the descriptor of its ring buffer, never exchanges it, and lives inside `ready` until the end.
    let mut ready = match unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) } {
        Ok(ready) => ready,
        Err(error) => {
            tracing::warn!(%error, "messages of the kernel's programs are not read");
            return;
        }
    };
    while let Ok(mut guard) = ready.readable_mut().await {
        guard.get_inner_mut().flush();
        guard.clear_ready();
    }
}
