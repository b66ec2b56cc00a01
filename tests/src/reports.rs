//! What `lab-peer` says on stdout, one JSON object a line; written by the workload, read by the tests.

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

/// One connection of a client.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connected {
    /// `connect()` succeeded. With Fast Open it says so before the server was asked.
    pub connected: bool,
    /// `refused`, `forbidden` (EPERM), `reset`, `timeout`, `unreachable`, `closed` (ended before what was expected came), or the message.
    pub error: Option<String>,
    /// `connect()` (microseconds).
    pub connect_us: u64,
    /// From the start of `connect()` to the first byte received (microseconds).
    pub first_byte_us: Option<u64>,
    /// From the start of `connect()` to the end of everything (microseconds).
    pub total_us: u64,
    /// The client's own `getsockname()`.
    pub local: Option<SocketAddr>,
    /// The client's own `getpeername()`.
    pub peer: Option<SocketAddr>,
    /// What the server sent.
    pub received: String,
    /// The socket speaks MPTCP (it did not fall back to TCP).
    pub mptcp: bool,
}

impl Connected {
    /// What the `who` server at the other end saw; an error where the connection met one.
    pub fn who(&self) -> anyhow::Result<Who> {
        anyhow::ensure!(self.error.is_none(), "{self:?}");
        Ok(serde_json::from_str(&self.received)?)
    }

    /// Refused, forbidden by the kernel's own hook, reset, or closed without an answer: what a client of a connection that is not let through can meet. A
    /// client that only hangs was not refused.
    #[must_use]
    pub fn was_refused(&self) -> bool {
        matches!(self.error.as_deref(), Some("refused" | "forbidden" | "reset" | "closed"))
    }
}

/// What the `who` server saw of its client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// `--name` of the server process.
    pub name: String,
    /// The server's `getpeername()`.
    pub peer: SocketAddr,
    /// The server's `getsockname()`.
    pub local: SocketAddr,
}

/// The first connection that was carried.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrived {
    /// When its byte came back (microseconds since the epoch).
    pub at_us: u64,
    pub tries: u64,
    /// Its longest try: which, and how long (microseconds).
    pub longest: (u64, u64),
}

/// Many short connections, each verified with one echoed byte.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Churned {
    pub ok: u64,
    pub failed: u64,
    /// Failures by kind, as in [`Connected::error`].
    pub errors: BTreeMap<String, u64>,
    pub seconds: f64,
    /// Connect, byte there, byte back (microseconds).
    pub p50_us: u64,
    pub p99_us: u64,
}

/// Connections to `who` servers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tallied {
    /// How often each server answered.
    pub answers: BTreeMap<String, u64>,
    /// Of these, connections that the server saw with the client's own port: no proxy was between.
    pub direct: BTreeMap<String, u64>,
    /// Failures by kind, as in [`Connected::error`].
    pub errors: BTreeMap<String, u64>,
    /// Connections whose `getpeername()` was not what the client had asked for.
    pub strange_peer: u64,
    /// Connections whose client address at the server was not the client's own.
    pub strange_client: u64,
}

impl Tallied {
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answers.values().sum()
    }

    #[must_use]
    pub fn failed(&self) -> u64 {
        self.errors.values().sum()
    }
}

/// Short connections for a time, as fast as they go.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Storm {
    #[serde(flatten)]
    pub churned: Churned,
    /// Connections that ended in each second.
    pub per_second: Vec<u64>,
}

/// Connections that are held open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Connections that echoed a byte just now.
    pub alive: u64,
    /// Connections that could not be opened or did not echo, since the start.
    pub failed: u64,
    pub errors: BTreeMap<String, u64>,
}

/// Bytes sent to an echo server and received back at the same time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Transferred {
    pub sent: u64,
    pub received: u64,
    pub sent_sha256: String,
    pub received_sha256: String,
    pub seconds: f64,
    pub error: Option<String>,
}

/// One byte there and back on one connection, again and again, or bytes one way as fast as they go.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub count: u64,
    pub seconds: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub error: Option<String>,
}

/// Datagrams to a UDP echo server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagrams {
    pub sent: u64,
    /// Answers that came in time and were right.
    pub echoed: u64,
    pub error: Option<String>,
}

/// What the adversary met when it spoke HBONE.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnelled {
    /// Client side of the TLS handshake came to its end. With TLS 1.3 a server that refuses the client's certificate
    /// says so after that.
    pub handshake: bool,
    /// URI names in the server's certificate.
    pub server_names: Vec<String>,
    /// Status of the CONNECT.
    pub status: Option<u16>,
    /// What came through the tunnel.
    pub received: String,
    pub error: Option<String>,
}

/// What `lab-peer serve` reports while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// All ports listen.
    Ready,
    /// `farewell`: bytes that came after the server had closed its own direction.
    Farewell { received: u64, text: String },
    /// `sink`: a connection ended.
    Sunk { bytes: u64, peer: SocketAddr },
    /// `hbone-server`: a tunnel was opened and carried something.
    Tunnel { authority: String, bytes: u64 },
    /// `script`: what this end of a story met.
    Told { seed: u64, met: String },
    /// `hbone-server`: a handshake failed.
    HandshakeFailed { error: String },
}
