//! What the pools of tunnels do, in numbers, for telemetry.
//!
//! Beside the pool, which adds; nothing decides by it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a pooled connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolEnd {
    /// By the peer, in order.
    Peer,
    /// It broke.
    Broken,
    /// The peer answered no ping.
    Silent,
    /// The peer sent more frames than it may.
    Flood,
    /// No stream for [`crate::life::limits::POOL_IDLE`].
    Idle,
    /// Older than [`crate::life::limits::TUNNEL_AGE`].
    Aged,
    /// The destination's address is another workload's now, or the pod left.
    Retired,
    /// The peer's certificate was revoked.
    Revoked,
}

impl PoolEnd {
    pub const ALL: [Self; 8] =
        [Self::Peer, Self::Broken, Self::Silent, Self::Flood, Self::Idle, Self::Aged, Self::Retired, Self::Revoked];

    /// Stable name: metric label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Broken => "broken",
            Self::Silent => "silent",
            Self::Flood => "h2_flood",
            Self::Idle => "idle",
            Self::Aged => "aged",
            Self::Retired => "retired",
            Self::Revoked => "revoked",
        }
    }
}

/// Counters of all pools of an agent. Connections that failed to open are in the handshakes' and connections' counters.
#[derive(Debug, Default)]
pub struct PoolCounts {
    opened: AtomicU64,
    ended: [AtomicU64; PoolEnd::ALL.len()],
    streams: AtomicU64,
    reused: AtomicU64,
    released: AtomicU64,
}

impl PoolCounts {
    pub(super) fn connection_opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn connection_ended(&self, why: PoolEnd) {
        if let Some(count) = self.ended.get(why as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A stream was placed on a connection that had (`reused`) or had not had one before.
    pub(super) fn stream_placed(&self, reused: bool) {
        let count = if reused { &self.reused } else { &self.streams };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn stream_released(&self) {
        self.released.fetch_add(1, Ordering::Relaxed);
    }

    /// Connections opened so far.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Connections that ended so far for this reason.
    #[must_use]
    pub fn ended(&self, why: PoolEnd) -> u64 {
        self.ended.get(why as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        let ended: u64 = PoolEnd::ALL.into_iter().map(|why| self.ended(why)).sum();
        self.opened().saturating_sub(ended)
    }

    /// Streams placed so far on connections that had none before, and on connections that were used again.
    #[must_use]
    pub fn placed(&self) -> (u64, u64) {
        (self.streams.load(Ordering::Relaxed), self.reused.load(Ordering::Relaxed))
    }

    /// Streams now.
    #[must_use]
    pub fn live(&self) -> u64 {
        // Read first: a stream that ends meanwhile is then counted as live, never as less than none.
        let released = self.released.load(Ordering::Relaxed);
        let (first, reused) = self.placed();
        (first + reused).saturating_sub(released)
    }
}
