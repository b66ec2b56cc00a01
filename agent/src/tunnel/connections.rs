//! The connections that the agent carries right now: what telemetry reports, `heddle connections` lists, drain counts
//! and a policy change closes.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{Proofs, Session, Sessions, Trace, meter::Wire, neighbours::Neighbours, offer::PoolCounts};
use crate::{
    capture::TcpHealth,
    cluster::{Service, Workload},
    identity::SpiffeId,
    life::limits,
    policy::{self, Rulebook},
};

/// Which side of the connection this agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// What protects the connection between the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    MutualTls,
    /// Both pods are on this node: who connects is what the kernel knows of the socket, and no byte leaves the host.
    KernelAttested,
    None,
}

impl Security {
    pub const ALL: [Self; 3] = [Self::MutualTls, Self::KernelAttested, Self::None];

    /// Whether the other side's identity is proven.
    #[must_use]
    pub fn authenticates(self) -> bool {
        self != Self::None
    }
}

/// Everything known of a connection when it starts to carry bytes, or when it failed to.
#[derive(Debug, Clone)]
pub struct Flow {
    pub direction: Direction,
    pub security: Security,
    /// The client's address.
    pub source: SocketAddr,
    /// What the client connected to, as this side sees it: outbound the original destination; inbound podIP:15008 for
    /// HBONE and podIP:port for plaintext.
    pub destination: SocketAddr,
    /// The address inside the tunnel (`:authority`), where there is a tunnel.
    pub hbone_target: Option<SocketAddr>,
    pub source_workload: Option<Arc<Workload>>,
    /// Proven by TLS, or on this node by the pod's own netns.
    pub source_principal: Option<SpiffeId>,
    pub destination_workload: Option<Arc<Workload>>,
    pub destination_principal: Option<SpiffeId>,
    pub destination_service: Option<Arc<Service>>,
    /// This side's span of a connection that the mesh carries from pod to pod; `None` for plaintext.
    pub trace: Option<Trace>,
    /// The TLS session that carries it; `None` for plaintext, and until there is one.
    pub session: Option<Arc<Session>>,
}

impl Flow {
    /// A connection of which only the addresses are known yet.
    #[must_use]
    pub fn new(direction: Direction, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            direction,
            security: Security::None,
            source,
            destination,
            hbone_target: None,
            source_workload: None,
            source_principal: None,
            destination_workload: None,
            destination_principal: None,
            destination_service: None,
            trace: None,
            session: None,
        }
    }
}

/// How a connection ended.
#[derive(Debug, Clone)]
pub enum End {
    /// Both sides closed.
    Complete,
    /// It carried bytes and then broke, or never got so far. `reason` is stable; `response_flags` as in wire.md.
    Failed { reason: &'static str, response_flags: &'static str, detail: String },
    /// Policy said no, at the start or later.
    Denied(policy::Denial),
}

/// A connection that the agent carries.
#[derive(Debug)]
pub struct Connection {
    pub id: u64,
    pub flow: Flow,
    pub opened: Instant,
    /// Bytes from the client towards the app.
    pub sent: AtomicU64,
    /// Bytes from the app towards the client.
    pub received: AtomicU64,
    /// What was asked of policy, for asking again; `None` on the source's side.
    pub request: Option<policy::Request>,
    /// Cancelled to close it at once. Why is in `revoked`.
    pub cancel: CancellationToken,
    /// Set before `cancel` when policy withdrew the permit.
    pub revoked: std::sync::OnceLock<policy::Denial>,
    /// Set before `cancel` when neither side has said anything for too long.
    pub idle: AtomicBool,
    /// Set before `cancel` when the certificate of the peer whose tunnel carries it was revoked.
    pub disowned: AtomicBool,
}

impl Connection {
    /// Bytes so far, client to app and app to client.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

/// What telemetry does with connections; `tunnel` only tells.
pub trait Observer: Send + Sync + std::fmt::Debug {
    /// A connection starts to carry bytes. Live byte counts are read from the [`Registry`].
    fn opened(&self, connection: &Connection);
    /// It ended; counted bytes are final.
    fn closed(&self, connection: &Connection, end: &End);
    /// It ended before it carried a byte (no `opened` was told).
    fn failed(&self, flow: &Flow, end: &End);
    /// A TLS handshake: `Ok` or the stable reason.
    fn handshake(&self, direction: Direction, result: Result<(), &'static str>);
    /// A dry-run policy matched a connection that asked to come in.
    fn rehearsed(&self, _connection: &Connection, _rehearsal: &policy::Rehearsal) {}
    /// Whether a trace that begins now is to be exported.
    fn sample(&self) -> bool {
        false
    }
    /// A pod's listener is served from now on.
    fn pod_served(&self) {}
    /// It is no more.
    fn pod_left(&self) {}
    /// A tunnel's TCP connection is there. Its live byte counts are read from the [`Wire`].
    fn wire_opened(&self, _wire: &Arc<Wire>) {}
    /// How TCP gets on, once in a while; `None` where the kernel does not say.
    fn wire_health(&self, _wire: &Wire, _health: Option<TcpHealth>) {}
    /// It is gone; counted bytes are final.
    fn wire_closed(&self, _wire: &Wire, _health: Option<TcpHealth>) {}
}

/// All live connections. Cheap to clone; each stage sees the same set.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    inner: Arc<Inner>,
}

/// Parts of the registry, so that connections that open and close at once seldom meet on one lock.
const SHARDS: usize = 16;

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    pool: Arc<PoolCounts>,
    proofs: Arc<Proofs>,
    neighbours: Arc<Neighbours>,
    sessions: Arc<Sessions>,
    shards: [Mutex<HashMap<u64, Arc<Connection>>>; SHARDS],
}

impl Registry {
    /// Live connections, in no order.
    #[must_use]
    pub fn live(&self) -> Vec<Arc<Connection>> {
        let mut live = Vec::new();
        for shard in &self.inner.shards {
            live.extend(shard.lock().unwrap_or_else(PoisonError::into_inner).values().cloned());
        }
        live
    }

    /// How many connections live.
    #[must_use]
    pub fn count(&self) -> usize {
        self.inner.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    /// What the pods' pools of tunnels count, all together.
    #[must_use]
    pub fn pool(&self) -> &Arc<PoolCounts> {
        &self.inner.pool
    }

    /// The connections that are asked to prove themselves.
    #[must_use]
    pub fn proofs(&self) -> &Arc<Proofs> {
        &self.inner.proofs
    }

    /// The TLS sessions that may be revoked.
    #[must_use]
    pub fn sessions(&self) -> &Arc<Sessions> {
        &self.inner.sessions
    }

    /// The pods that are served.
    pub(super) fn neighbours(&self) -> &Arc<Neighbours> {
        &self.inner.neighbours
    }

    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        let at = usize::try_from(id).unwrap_or_default() % SHARDS;
        self.inner.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place in the registry. However its task ends, it leaves the registry and the observer is told.
#[derive(Debug)]
pub(super) struct Carried {
    connection: Arc<Connection>,
    registry: Registry,
    observer: Arc<dyn Observer>,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Opening,
    Open,
    Ended,
}

impl Carried {
    pub fn register(
        registry: &Registry,
        observer: &Arc<dyn Observer>,
        flow: Flow,
        request: Option<policy::Request>,
    ) -> Self {
        let id = registry.inner.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id,
            flow,
            opened: Instant::now(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            request,
            cancel: CancellationToken::new(),
            revoked: std::sync::OnceLock::new(),
            idle: AtomicBool::new(false),
            disowned: AtomicBool::new(false),
        });
        registry.shard(id).insert(id, Arc::clone(&connection));
        Self { connection, registry: registry.clone(), observer: Arc::clone(observer), stage: Stage::Opening }
    }

    /// It starts to carry bytes.
    pub fn open(&mut self) {
        if self.stage == Stage::Opening {
            self.stage = Stage::Open;
            self.observer.opened(&self.connection);
        }
    }

    /// For those who look at it while it lives.
    pub fn share(&self) -> Arc<Connection> {
        Arc::clone(&self.connection)
    }

    pub fn end(mut self, end: &End) {
        self.finish(end);
    }

    /// How a connection ends that was cancelled: by policy, or by the agent's own end.
    pub fn cancelled(&self) -> End {
        match self.connection.revoked.get() {
            Some(denial) => End::Denied(denial.clone()),
            None if self.connection.idle.load(Ordering::Acquire) => {
                let detail =
                    format!("no byte in either direction for {}", humantime::format_duration(limits::STREAM_IDLE));
                End::Failed { reason: "idle", response_flags: "-", detail }
            }
            None if self.connection.disowned.load(Ordering::Acquire) => {
                let detail = "the certificate of the peer, or of one of its issuers, was revoked".into();
                End::Failed { reason: "peer_revoked", response_flags: "-", detail }
            }
            None => End::Failed { reason: "cancelled", response_flags: "-", detail: "closed by the agent".into() },
        }
    }

    /// How a connection ends that has two sides here and was cancelled on one of them; `reason` is what the other one calls that.
    pub fn cut(&self, other: &Connection, reason: &'static str) -> End {
        if other.idle.load(Ordering::Acquire) {
            // Neither side says anything when one doesn't.
            self.connection.idle.store(true, Ordering::Release);
        }
        if self.connection.cancel.is_cancelled() || self.connection.idle.load(Ordering::Acquire) {
            return self.cancelled();
        }
        End::Failed { reason, response_flags: "-", detail: "the agent closed the other side of it".into() }
    }

    fn finish(&mut self, end: &End) {
        self.registry.shard(self.connection.id).remove(&self.connection.id);
        match self.stage {
            Stage::Opening => self.observer.failed(&self.connection.flow, end),
            Stage::Open => self.observer.closed(&self.connection, end),
            Stage::Ended => {}
        }
        self.stage = Stage::Ended;
    }
}

impl std::ops::Deref for Carried {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        if self.stage != Stage::Ended {
            let detail = "the connection's task ended before it".into();
            self.finish(&End::Failed { reason: "aborted", response_flags: "-", detail });
        }
    }
}

/// What live connections had carried when they were last looked at, and since when.
///
/// Looking at all of them now and then costs a connection nothing; a timer of its own would cost every one of them memory and
/// wake-ups.
#[derive(Debug, Default)]
pub struct Quiet {
    seen: HashMap<u64, (u64, Instant)>,
}

impl Quiet {
    /// Closes every live connection that has carried nothing for `after`. Gives how many.
    pub fn close(&mut self, registry: &Registry, after: Duration, now: Instant) -> usize {
        let live = registry.live();
        let mut still = HashMap::with_capacity(live.len());
        let mut closed = 0;
        for connection in live {
            let (sent, received) = connection.bytes();
            let carried = sent.wrapping_add(received);
            let since = match self.seen.get(&connection.id) {
                Some((before, since)) if *before == carried => *since,
                _ => now,
            };
            if now.saturating_duration_since(since) >= after {
                connection.idle.store(true, Ordering::Release);
                connection.cancel.cancel();
                closed += 1;
            } else {
                still.insert(connection.id, (carried, since));
            }
        }
        self.seen = still;
        closed
    }
}

/// Decides every live inbound connection again and closes those that are no longer allowed. Gives how many.
///
/// A connection is registered before it is first decided, so a change of the rules meets it either here or there. A file that
/// can't be read says nothing against what was allowed before it came: it stops new connections only.
pub fn reconsider(registry: &Registry, rules: &Rulebook) -> usize {
    let mut closed = 0;
    for connection in registry.live() {
        let Some(request) = &connection.request else { continue };
        if let Err(denial) = policy::decide(rules, request)
            && !matches!(denial, policy::Denial::Incomplete { .. })
            && connection.revoked.set(denial).is_ok()
        {
            connection.cancel.cancel();
            closed += 1;
        }
    }
    closed
}
