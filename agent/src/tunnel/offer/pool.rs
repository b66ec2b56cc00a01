//! HTTP/2 connections to peers, shared by the pod's connections to the same workload.
//!
//! Between routing and the wire. Several connections per peer, so that one is never the ceiling; a connection on which streams
//! wait without moving gets no new ones. No lock is held across an await, a burst opens few connections instead of one each, and
//! nobody waits past its own deadline. A connection is used only for the identity pair that it was authenticated for.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::SendRequest};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    counts::{PoolCounts, PoolEnd},
    dialer::Connector,
    error::OfferError,
    request::Connect,
};
use crate::{
    identity::SpiffeId,
    life::limits,
    tunnel::{
        Session,
        frames::{Alarm, Frames, Role},
        http2::{self, Stalls},
        sessions::Listed,
    },
};

/// What a connection was authenticated for. Two keys never share one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The source pod's uid.
    pub pod: Arc<str>,
    pub own: SpiffeId,
    pub source: IpAddr,
    /// The destination's uid: an address may be another pod's soon.
    pub uid: Arc<str>,
    pub peer: SpiffeId,
    pub address: SocketAddr,
}

/// A CONNECT that was answered with 200.
#[derive(Debug)]
pub(crate) struct Opened {
    pub send: SendStream<Bytes>,
    pub receive: RecvStream,
    /// The stream's place on its connection, held while it lives.
    pub slot: Slot,
}

type Peers = Mutex<HashMap<Key, Arc<Peer>>>;

/// The pod's pooled connections.
#[derive(Debug)]
pub(crate) struct Pool<C> {
    connector: C,
    peers: Arc<Peers>,
}

/// Connections to one peer.
#[derive(Debug)]
struct Peer {
    state: Mutex<State>,
    counts: Arc<PoolCounts>,
    /// Told whenever a waiter may have reason to look again.
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    tunnels: Vec<Arc<Tunnel>>,
    connecting: usize,
    waiting: usize,
    /// Failed connection attempts so far, and why the last one failed.
    failures: u64,
    last_failure: Option<OfferError>,
    /// The pool has forgotten this peer: nothing new is kept.
    retired: bool,
}

/// One connection.
#[derive(Debug)]
struct Tunnel {
    send: SendRequest<Bytes>,
    born: Instant,
    streams: AtomicUsize,
    /// Takes no new stream any more.
    closed: AtomicBool,
    /// Had a stream.
    used: AtomicBool,
    /// Why the pool let go of it, where it did.
    left: Arc<OnceLock<PoolEnd>>,
    idle_since: Mutex<Instant>,
    stalls: Stalls,
    session: Option<Arc<Session>>,
}

/// A stream's place on a connection.
#[derive(Debug)]
pub(crate) struct Slot {
    tunnel: Arc<Tunnel>,
    peer: Arc<Peer>,
}

impl Slot {
    pub fn stalls(&self) -> &Stalls {
        &self.tunnel.stalls
    }

    pub fn session(&self) -> Option<&Arc<Session>> {
        self.tunnel.session.as_ref()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.peer.counts.stream_released();
        if self.tunnel.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            *lock(&self.tunnel.idle_since) = Instant::now();
        }
        if self.peer.lock().waiting > 0 {
            self.peer.changed.send_replace(());
        }
    }
}

impl Tunnel {
    fn room(&self) -> bool {
        let cap = self.send.current_max_send_streams().min(limits::STREAMS_PER_CONNECTION as usize);
        self.streams.load(Ordering::Acquire) < cap
    }

    fn usable(&self) -> bool {
        let aged = self.born.elapsed() >= limits::TUNNEL_AGE;
        if aged {
            self.left.get_or_init(|| PoolEnd::Aged);
        }
        !self.closed.load(Ordering::Acquire) && !aged
    }

    fn idle_for(&self, time: Duration) -> bool {
        self.streams.load(Ordering::Acquire) == 0 && lock(&self.idle_since).elapsed() >= time
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the state says to one that needs a stream.
enum Choice {
    Take { tunnel: Arc<Tunnel>, spread: bool },
    Wait { open: usize },
}

impl State {
    /// Drops what takes no new stream; its streams keep it alive until they end.
    fn prune(&mut self) {
        self.tunnels.retain(|tunnel| tunnel.usable());
    }

    fn choose(&self) -> Choice {
        let total = self.tunnels.len() + self.connecting;
        let free = self.tunnels.iter().filter(|tunnel| tunnel.room() && !tunnel.stalls.congested());
        if let Some(tunnel) = free.min_by_key(|tunnel| tunnel.streams.load(Ordering::Acquire)) {
            let busy = tunnel.streams.load(Ordering::Acquire) >= limits::STREAMS_BEFORE_SPREADING as usize;
            let spread = busy && self.connecting == 0 && total < limits::CONNECTIONS_PER_PEER;
            return Choice::Take { tunnel: Arc::clone(tunnel), spread };
        }
        if total >= limits::CONNECTIONS_PER_PEER_MAX
            && let Some(tunnel) = self.congested()
        {
            return Choice::Take { tunnel, spread: false };
        }
        Choice::Wait { open: self.wanted().saturating_sub(self.connecting) }
    }

    /// How many connections should be under way for those that wait, this one included.
    fn wanted(&self) -> usize {
        let waiting = self.waiting + 1;
        let spread = waiting.div_ceil(limits::STREAMS_BEFORE_SPREADING as usize).min(limits::CONNECTIONS_PER_PEER);
        let needed = waiting.div_ceil(limits::STREAMS_PER_CONNECTION as usize);
        spread.max(needed).min(limits::CONNECTIONS_PER_PEER_MAX.saturating_sub(self.tunnels.len()))
    }

    /// Better than none: the least used connection with room, though it seems stuck.
    fn congested(&self) -> Option<Arc<Tunnel>> {
        let with_room = self.tunnels.iter().filter(|tunnel| tunnel.room());
        with_room.min_by_key(|tunnel| tunnel.streams.load(Ordering::Acquire)).cloned()
    }

    fn empty(&self) -> bool {
        self.tunnels.is_empty() && self.connecting == 0 && self.waiting == 0
    }
}

impl Peer {
    fn new(counts: Arc<PoolCounts>) -> Self {
        Self { state: Mutex::default(), counts, changed: watch::Sender::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Places a stream. To be called with the state locked, so that an idle connection is not closed meanwhile.
    fn place(self: &Arc<Self>, tunnel: Arc<Tunnel>) -> Slot {
        tunnel.streams.fetch_add(1, Ordering::AcqRel);
        self.counts.stream_placed(tunnel.used.swap(true, Ordering::Relaxed));
        Slot { tunnel, peer: Arc::clone(self) }
    }

    fn forget(&self, tunnel: &Arc<Tunnel>) {
        tunnel.closed.store(true, Ordering::Release);
        self.lock().tunnels.retain(|other| !Arc::ptr_eq(other, tunnel));
    }

    /// Lets go of a connection that is idle or too old: it ends when its last stream has.
    fn release(&self, tunnel: &Arc<Tunnel>, idle: Duration) {
        // Under the lock, so that no stream is placed on it meanwhile.
        let mut state = self.lock();
        if tunnel.idle_for(idle) || !tunnel.usable() {
            tunnel.left.get_or_init(|| PoolEnd::Idle);
            tunnel.closed.store(true, Ordering::Release);
            state.tunnels.retain(|other| !Arc::ptr_eq(other, tunnel));
        }
    }

    fn retire(&self) {
        let mut state = self.lock();
        state.retired = true;
        for tunnel in state.tunnels.drain(..) {
            tunnel.left.get_or_init(|| PoolEnd::Retired);
        }
        drop(state);
        self.changed.send_replace(());
    }
}

/// Counts a connection's end, however its task ends.
struct Open {
    counts: Arc<PoolCounts>,
    left: Arc<OnceLock<PoolEnd>>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.counts.connection_ended(self.left.get().copied().unwrap_or(PoolEnd::Peer));
    }
}

/// Counts a waiter while it waits.
struct Waiting<'a>(&'a Peer);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
    }
}

/// Counts a connection attempt while it is under way; one that ends without a word has failed.
struct Connecting {
    peer: Arc<Peer>,
    told: bool,
}

impl Connecting {
    fn finish(mut self, result: Result<Arc<Tunnel>, OfferError>) {
        self.tell(result);
    }

    fn tell(&mut self, result: Result<Arc<Tunnel>, OfferError>) {
        self.told = true;
        let mut state = self.peer.lock();
        state.connecting -= 1;
        match result {
            Ok(tunnel) if state.retired => {
                tunnel.left.get_or_init(|| PoolEnd::Retired);
            }
            Ok(tunnel) => state.tunnels.push(tunnel),
            Err(error) => {
                state.failures += 1;
                state.last_failure = Some(error);
            }
        }
        drop(state);
        self.peer.changed.send_replace(());
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        if !self.told {
            self.tell(Err(OfferError::Cancelled));
        }
    }
}

impl<C: Connector> Pool<C> {
    pub fn new(connector: C) -> Self {
        Self { connector, peers: Arc::default() }
    }

    /// Opens a stream to `key` and waits for the peer's answer to CONNECT. A connection that goes away before it answers
    /// is replaced once: no byte of the app was sent.
    ///
    /// # Errors
    /// Why there is none; within the sum of the deadlines of connecting and answering.
    pub async fn open(&self, key: &Key, connect: &Connect) -> Result<Opened, OfferError> {
        let mut lost = None;
        for _ in 0..limits::STALE_TUNNELS {
            let slot = self.slot(key).await?;
            let send = slot.tunnel.send.clone();
            // Never waits here: a stream beyond the peer's cap would, and none is placed there.
            let sent = match timeout(limits::CONNECT_ANSWER, async { send.ready().await }).await {
                Ok(Ok(mut send)) => send.send_request(connect.request(), false),
                Ok(Err(error)) => Err(error),
                Err(_) => return Err(OfferError::AnswerTimeout),
            };
            let (response, send) = match sent {
                Ok(sent) => sent,
                Err(error) => {
                    // It was on its way out before the request: that costs no try.
                    slot.peer.forget(&slot.tunnel);
                    lost.get_or_insert_with(|| died(&error));
                    continue;
                }
            };
            match timeout(limits::CONNECT_ANSWER, response).await {
                Ok(Ok(response)) => {
                    connect.answered(&response, slot.tunnel.session.as_ref());
                    status(response.status())?;
                    return Ok(Opened { send, receive: response.into_body(), slot });
                }
                Ok(Err(error)) => {
                    let refused = error.reason() == Some(Reason::REFUSED_STREAM);
                    if !refused {
                        slot.peer.forget(&slot.tunnel);
                    }
                    if lost.is_some() || !(refused || error.is_go_away() || error.is_io() || !error.is_reset()) {
                        return Err(died(&error));
                    }
                    lost = Some(died(&error));
                }
                Err(_) => return Err(OfferError::AnswerTimeout),
            }
        }
        Err(lost.unwrap_or(OfferError::PoolExhausted))
    }

    /// Forgets peers that `keep` does not want. Their streams go on; new ones need a new connection.
    pub fn retain(&self, keep: impl Fn(&Key) -> bool) {
        lock(&self.peers).retain(|key, peer| {
            let keep = keep(key);
            if !keep {
                peer.retire();
            }
            keep
        });
    }

    #[cfg(test)]
    pub fn total(&self) -> usize {
        lock(&self.peers).values().map(|peer| peer.lock().tunnels.len()).sum()
    }

    fn peer(&self, key: &Key) -> Arc<Peer> {
        Arc::clone(lock(&self.peers).entry(key.clone()).or_insert_with(|| Arc::new(Peer::new(self.connector.counts()))))
    }

    async fn slot(&self, key: &Key) -> Result<Slot, OfferError> {
        let wait = limits::HOLD + limits::CONNECT_PEER + limits::TLS_HANDSHAKE;
        timeout(wait, self.place(key)).await.unwrap_or(Err(OfferError::PoolExhausted))
    }

    async fn place(&self, key: &Key) -> Result<Slot, OfferError> {
        let peer = self.peer(key);
        let mut failures = None;
        loop {
            let (mut changed, _waiting) = {
                let mut state = peer.lock();
                if state.retired {
                    // Whatever it connects to is thrown away: it would connect again and again.
                    return Err(OfferError::DestinationReplaced);
                }
                state.prune();
                let open = match state.choose() {
                    Choice::Take { tunnel, spread } => {
                        let slot = peer.place(tunnel);
                        if spread {
                            self.connect(key, &peer, &mut state);
                        }
                        return Ok(slot);
                    }
                    Choice::Wait { open } => open,
                };
                let failed = failures.is_some_and(|failures| failures != state.failures) && state.connecting == 0;
                if failed {
                    if let Some(tunnel) = state.congested() {
                        return Ok(peer.place(tunnel));
                    }
                    return Err(state.last_failure.clone().unwrap_or(OfferError::PoolExhausted));
                }
                failures.get_or_insert(state.failures);
                for _ in 0..open {
                    self.connect(key, &peer, &mut state);
                }
                state.waiting += 1;
                (peer.changed.subscribe(), Waiting(&peer))
            };
            // The sender lives in `peer`, so this ends only by a change.
            let _ = changed.changed().await;
        }
    }

    /// Begins one connection, in a task of its own that then drives it.
    fn connect(&self, key: &Key, peer: &Arc<Peer>, state: &mut State) {
        state.connecting += 1;
        let connecting = Connecting { peer: Arc::clone(peer), told: false };
        let (connector, key, peers) = (self.connector.clone(), key.clone(), Arc::downgrade(&self.peers));
        tokio::spawn(async move {
            let peer = Arc::clone(&connecting.peer);
            match establish(&connector, &key).await {
                Ok((tunnel, connection, alarm, listed)) => {
                    let weak = Arc::downgrade(&tunnel);
                    let open = Open { counts: Arc::clone(&peer.counts), left: Arc::clone(&tunnel.left) };
                    open.counts.connection_opened();
                    connecting.finish(Ok(tunnel));
                    drive(connection, &alarm, listed.as_ref(), weak, &peer, &open.left).await;
                }
                Err(error) => connecting.finish(Err(error)),
            }
            if let Some(peers) = peers.upgrade() {
                let mut peers = lock(&peers);
                if peers.get(&key).is_some_and(|there| Arc::ptr_eq(there, &peer) && peer.lock().empty()) {
                    peers.remove(&key);
                }
            }
        });
    }
}

impl<C> Drop for Pool<C> {
    fn drop(&mut self) {
        for peer in lock(&self.peers).values() {
            peer.retire();
        }
    }
}

/// A connection, what moves its frames, what tells that its peer floods, and what tells that it is revoked.
type Driven<C> = (Arc<Tunnel>, h2::client::Connection<Frames<<C as Connector>::Io>, Bytes>, Arc<Alarm>, Option<Listed>);

async fn establish<C: Connector>(connector: &C, key: &Key) -> Result<Driven<C>, OfferError> {
    let io = connector.connect(key).await?;
    let (session, listed) = connector.session(&io, key).unzip();
    let (io, alarm) = Frames::new(io, Role::Client);
    let handshake = timeout(limits::TLS_HANDSHAKE, http2::client().handshake(io)).await;
    let (send, connection) = match handshake {
        Ok(Ok(made)) => made,
        Ok(Err(error)) => return Err(OfferError::Http2(error.to_string().into())),
        Err(_) => return Err(OfferError::Http2("timed out".into())),
    };
    let now = Instant::now();
    let tunnel = Tunnel {
        send,
        born: now,
        streams: AtomicUsize::new(0),
        closed: AtomicBool::new(false),
        used: AtomicBool::new(false),
        left: Arc::default(),
        idle_since: Mutex::new(now),
        stalls: Stalls::default(),
        session,
    };
    Ok((Arc::new(tunnel), connection, alarm, listed))
}

/// Moves a connection's frames until it ends: by the peer, by silence, by the peer's revocation, or by being idle and no longer
/// wanted.
async fn drive<T>(
    mut connection: h2::client::Connection<T, Bytes>,
    alarm: &Alarm,
    listed: Option<&Listed>,
    tunnel: Weak<Tunnel>,
    peer: &Arc<Peer>,
    left: &OnceLock<PoolEnd>,
) where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let pings = connection.ping_pong();
    let ended = tokio::select! {
        biased;
        () = revoked(listed) => {
            left.get_or_init(|| PoolEnd::Revoked);
            Some("the peer's certificate is revoked".to_owned())
        }
        ended = connection => ended.err().map(|error| {
            left.get_or_init(|| PoolEnd::Broken);
            error.to_string()
        }),
        flood = alarm.raised() => {
            left.get_or_init(|| PoolEnd::Flood);
            tracing::warn!(reason = "h2_flood", error = %flood, "Tunnel ended: the peer floods");
            None
        }
        () = http2::until_dead(pings) => {
            left.get_or_init(|| PoolEnd::Silent);
            Some("the peer does not answer pings".to_owned())
        }
        // Never ends: it lets go of the connection, which then ends by itself.
        () = release_when_idle(&tunnel, peer) => None,
    };
    if let Some(tunnel) = tunnel.upgrade() {
        peer.forget(&tunnel);
    }
    if let Some(error) = ended {
        tracing::debug!(%error, "Tunnel ended");
    }
    peer.changed.send_replace(());
}

async fn revoked(listed: Option<&Listed>) {
    match listed {
        Some(listed) => listed.revoked().await,
        None => std::future::pending().await,
    }
}

async fn release_when_idle(tunnel: &Weak<Tunnel>, peer: &Peer) {
    loop {
        sleep(limits::POOL_IDLE / 4).await;
        if let Some(tunnel) = tunnel.upgrade() {
            peer.release(&tunnel, limits::POOL_IDLE);
        }
    }
}

/// What an answer other than 200 means.
fn status(status: http::StatusCode) -> Result<(), OfferError> {
    match status.as_u16() {
        200 => Ok(()),
        400 => Err(OfferError::BadRequest),
        401 => Err(OfferError::Denied),
        503 => Err(OfferError::Unavailable),
        other => Err(OfferError::Status(other)),
    }
}

/// In TLS 1.3 a server refuses our certificate only after our handshake is done: its alert comes as the end of the tunnel.
fn died(error: &h2::Error) -> OfferError {
    let alert =
        error.get_io().and_then(std::io::Error::get_ref).and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match alert {
        Some(alert) => OfferError::Tls { reason: "refused_by_peer", detail: alert.to_string().into() },
        None => OfferError::Lost(error.to_string().into()),
    }
}

#[cfg(test)]
mod tests;
