//! TLS sessions that go on, of both sides: ended at once when the peer's certificate is revoked.
//!
//! Beside the registry of connections, which several sessions of the same peer carry. Where nobody asks about revocation
//! it keeps nothing; where somebody does, the peer's chain of each session.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use rustls::CommonState;
use rustls_pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;

use super::{Registry, Session};

/// Whether a peer's chain (the leaf first), whose handshake succeeded at that time, is revoked by now.
pub type IsRevoked = dyn Fn(&[CertificateDer<'static>], SystemTime) -> bool + Send + Sync;

/// Sessions that go on, while revocation is asked for.
#[derive(Default)]
pub struct Sessions {
    judge: OnceLock<Box<IsRevoked>>,
    next: AtomicU64,
    live: Mutex<HashMap<u64, Arc<Entry>>>,
    ended: AtomicU64,
    ended_connections: AtomicU64,
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Entry {
    session: Arc<Session>,
    chain: Box<[CertificateDer<'static>]>,
    since: SystemTime,
    revoked: CancellationToken,
}

/// A session's place among those that go on; it leaves with this.
#[derive(Debug)]
pub(super) struct Listed {
    place: Option<(Arc<Sessions>, u64, Arc<Entry>)>,
}

impl Listed {
    /// Returns when the peer's certificate is revoked; never where nobody asks.
    pub async fn revoked(&self) {
        match &self.place {
            Some((_, _, entry)) => entry.revoked.cancelled().await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some((sessions, number, _)) = &self.place {
            sessions.live().remove(number);
        }
    }
}

impl Sessions {
    /// Asks for revocation from now on; sessions from before are not known. Only the first call counts.
    pub fn watch(&self, judge: Box<IsRevoked>) {
        let _asked_already = self.judge.set(judge);
    }

    /// A handshake is done. Lists may have changed since it was verified, so it is judged again once it is listed.
    pub(super) fn enter(self: &Arc<Self>, session: &Arc<Session>, tls: &CommonState) -> Listed {
        let Some(judge) = self.judge.get() else { return Listed { place: None } };
        let chain = tls.peer_certificates().unwrap_or_default().to_vec().into_boxed_slice();
        let entry = Arc::new(Entry {
            session: Arc::clone(session),
            chain,
            since: SystemTime::now(),
            revoked: CancellationToken::new(),
        });
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.live().insert(number, Arc::clone(&entry));
        if judge(&entry.chain, entry.since) {
            self.ended.fetch_add(1, Ordering::Relaxed);
            entry.revoked.cancel();
        }
        Listed { place: Some((Arc::clone(self), number, entry)) }
    }

    /// Sessions and connections that were ended because their peer's certificate was revoked.
    #[must_use]
    pub fn ended(&self) -> (u64, u64) {
        (self.ended.load(Ordering::Relaxed), self.ended_connections.load(Ordering::Relaxed))
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.live().len()
    }

    fn live(&self) -> MutexGuard<'_, HashMap<u64, Arc<Entry>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those whose peer is revoked by now.
    fn revoked(&self) -> Vec<Arc<Entry>> {
        let Some(judge) = self.judge.get() else { return Vec::new() };
        let live: Vec<_> = self.live().values().filter(|entry| !entry.revoked.is_cancelled()).cloned().collect();
        // One peer may have thousands of sessions.
        let mut known: HashMap<&[CertificateDer<'static>], bool> = HashMap::new();
        let mut revoked = Vec::new();
        for entry in &live {
            if *known.entry(&entry.chain).or_insert_with(|| judge(&entry.chain, entry.since)) {
                revoked.push(Arc::clone(entry));
            }
        }
        revoked
    }
}

/// Ends every session whose peer's certificate is revoked by now, and the connections that it carries. Gives how many of
/// both. It computes for a while with thousands of peers, and waits for nothing.
pub fn disown(registry: &Registry) -> (usize, usize) {
    let sessions = registry.sessions();
    let revoked = sessions.revoked();
    if revoked.is_empty() {
        return (0, 0);
    }
    let carriers: HashSet<*const Session> = revoked.iter().map(|entry| Arc::as_ptr(&entry.session)).collect();
    let mut connections = 0;
    // First, so that they are told of as what they are, and not as lost with their session.
    for connection in registry.live() {
        if connection.flow.session.as_ref().is_some_and(|session| carriers.contains(&Arc::as_ptr(session))) {
            connection.disowned.store(true, Ordering::Release);
            connection.cancel.cancel();
            connections += 1;
        }
    }
    revoked.iter().for_each(|entry| entry.revoked.cancel());
    sessions.ended.fetch_add(revoked.len() as u64, Ordering::Relaxed);
    sessions.ended_connections.fetch_add(connections, Ordering::Relaxed);
    (revoked.len(), usize::try_from(connections).unwrap_or(usize::MAX))
}
