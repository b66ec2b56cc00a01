//! What each pod and each peer may use of the agent, and what is used: descriptors, connections, handshakes, buffers.
//!
//! Accounting behind one short lock, taken a few times per connection and never per byte. It does no I/O and never waits; what is
//! refused is refused with a reason, and counted. Every pod has a reserved part that no other can take.

mod bucket;
mod half_open;
mod handshakes;
mod ledger;
mod memory;

pub use bucket::{Bucket, Keyed, Rate};
pub use memory::available as memory_available;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use self::{
    half_open::HalfOpen,
    handshakes::Handshakes,
    ledger::{Ledger, Place, Short, Terms},
};
use super::limits;
use crate::identity::SpiffeId;

/// Why something is refused for want of budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the pod holds {} connections", limits::CONNECTIONS_PER_POD)]
    Pod,
    #[error("the pod's reserved descriptors are used up, and so are those shared by all pods")]
    Node,
    #[error("too many connections that have not authenticated")]
    HalfOpen,
    #[error("more than {} handshakes per second", limits::HANDSHAKES.per_second)]
    Handshake,
    #[error("the pod's buffers are used up, and this connection holds more than its part")]
    Buffer,
}

impl Refusal {
    pub const ALL: [Self; 5] = [Self::Pod, Self::Node, Self::HalfOpen, Self::Handshake, Self::Buffer];

    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Pod => "pod_budget",
            Self::Node => "node_budget",
            Self::HalfOpen => "half_open_budget",
            Self::Handshake => "handshake_budget",
            Self::Buffer => "buffer_budget",
        }
    }
}

impl From<Short> for Refusal {
    fn from(short: Short) -> Self {
        match short {
            Short::Pod => Self::Pod,
            Short::Node => Self::Node,
        }
    }
}

/// What the machine gives the agent.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// RLIMIT_NOFILE (descriptors).
    pub descriptors: u64,
    /// Bytes.
    pub memory: u64,
}

/// The node's budgets. One per agent; cheap to clone.
#[derive(Debug, Clone)]
pub struct Budget {
    node: Arc<Node>,
}

#[derive(Debug)]
struct Node {
    books: Mutex<Books>,
    /// Streams that peers gave up before they were answered, by identity: a peer does not get more by more connections.
    given_up: Mutex<Keyed<SpiffeId>>,
    refused: [AtomicU64; Refusal::ALL.len()],
}

#[derive(Debug)]
struct Books {
    descriptors: Ledger,
    bytes: Ledger,
    /// By place in both ledgers.
    pods: BTreeMap<Place, PodBooks>,
}

#[derive(Debug)]
struct PodBooks {
    uid: Arc<str>,
    connections: usize,
    half_open: HalfOpen<Arc<Slot>>,
    inbound: Handshakes,
    outbound: Bucket,
    /// Connections that hold buffers.
    holding: u64,
}

/// Used and available.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub used: u64,
    pub total: u64,
}

/// How much is used right now.
#[derive(Debug, Clone)]
pub struct Pressure {
    pub descriptors: Share,
    pub bytes: Share,
    pub pods: Vec<PodPressure>,
    /// Refused so far, by reason.
    pub refused: [(&'static str, u64); Refusal::ALL.len()],
}

/// One pod's part of it.
#[derive(Debug, Clone)]
pub struct PodPressure {
    pub uid: Arc<str>,
    pub connections: usize,
    pub half_open: usize,
    pub descriptors: u64,
    pub bytes: u64,
}

impl Budget {
    #[must_use]
    pub fn new(machine: Machine) -> Self {
        // What the agent needs for itself comes off before pods get anything.
        let own = limits::DESCRIPTORS_OWN;
        let traffic = (machine.descriptors / 10 * 9).min(machine.descriptors.saturating_sub(own));
        let descriptors = Ledger::new(Terms {
            total: traffic,
            per_pod: limits::DESCRIPTORS_PER_POD,
            reserve: limits::CONNECTIONS_RESERVED * limits::DESCRIPTORS_PER_CONNECTION,
            cap: u64::MAX,
        });
        let bytes = Ledger::new(Terms {
            total: machine.memory / limits::BUFFERS_OF_MEMORY,
            per_pod: 0,
            reserve: limits::BUFFERS_RESERVED,
            cap: limits::BUFFERS_PER_POD,
        });
        Self {
            node: Arc::new(Node {
                books: Mutex::new(Books { descriptors, bytes, pods: BTreeMap::new() }),
                given_up: Mutex::new(Keyed::new(limits::H2_GIVEN_UP, limits::H2_GIVEN_UP_PEERS)),
                refused: Default::default(),
            }),
        }
    }

    /// Gives a pod its part, for as long as the account or anything taken from it lives.
    #[must_use]
    pub fn enrol(&self, uid: Arc<str>) -> Account {
        let mut books = lock(&self.node.books);
        let place = books.descriptors.join();
        let same = books.bytes.join();
        debug_assert_eq!(place, same, "pods join and leave both ledgers together");
        books.pods.insert(
            place,
            PodBooks {
                uid,
                connections: 0,
                half_open: HalfOpen::default(),
                inbound: Handshakes::new(limits::HANDSHAKES, limits::HANDSHAKE_SOURCES),
                outbound: Bucket::new(limits::HANDSHAKES),
                holding: 0,
            },
        );
        drop(books);
        Account { member: Arc::new(Member { node: Arc::clone(&self.node), place }) }
    }

    /// Counts a stream that `peer` gave up before it was answered; false when those are too many.
    #[must_use]
    pub fn give_up(&self, peer: &SpiffeId) -> bool {
        lock(&self.node.given_up).take(peer, Instant::now())
    }

    #[must_use]
    pub fn pressure(&self) -> Pressure {
        let books = lock(&self.node.books);
        let share = |ledger: &Ledger| Share { used: ledger.used(), total: ledger.total() };
        Pressure {
            descriptors: share(&books.descriptors),
            bytes: share(&books.bytes),
            pods: books
                .pods
                .iter()
                .map(|(place, pod)| PodPressure {
                    uid: Arc::clone(&pod.uid),
                    connections: pod.connections,
                    half_open: pod.half_open.len(),
                    descriptors: books.descriptors.used_by(*place),
                    bytes: books.bytes.used_by(*place),
                })
                .collect(),
            refused: Refusal::ALL.map(|refusal| (refusal.reason(), self.node.count(refusal).load(Ordering::Relaxed))),
        }
    }
}

impl Node {
    fn count(&self, refusal: Refusal) -> &AtomicU64 {
        // `ALL` is in the order of the variants.
        &self.refused[refusal as usize]
    }

    fn refuse(&self, refusal: Refusal) -> Refusal {
        self.count(refusal).fetch_add(1, Ordering::Relaxed);
        refusal
    }
}

/// A pod's part of the budgets. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Account {
    member: Arc<Member>,
}

#[derive(Debug)]
struct Member {
    node: Arc<Node>,
    place: Place,
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut books = lock(&self.node.books);
        books.descriptors.leave(self.place);
        books.bytes.leave(self.place);
        books.pods.remove(&self.place);
    }
}

impl Account {
    fn books(&self) -> MutexGuard<'_, Books> {
        lock(&self.member.node.books)
    }

    fn refuse(&self, refusal: Refusal) -> Refusal {
        self.member.node.refuse(refusal)
    }

    /// Leave to hold one more connection, of so many descriptors.
    ///
    /// # Errors
    /// [`Refusal::Pod`], [`Refusal::Node`].
    pub fn admit(&self, descriptors: u64) -> Result<Held, Refusal> {
        self.take(1, descriptors)
    }

    /// Leave to hold descriptors that are part of a connection that was admitted, or of a shared tunnel.
    ///
    /// # Errors
    /// [`Refusal::Node`].
    pub fn descriptors(&self, count: u64) -> Result<Held, Refusal> {
        self.take(0, count)
    }

    fn take(&self, connections: usize, descriptors: u64) -> Result<Held, Refusal> {
        let place = self.member.place;
        let mut books = self.books();
        let Books { descriptors: ledger, pods, .. } = &mut *books;
        let Some(pod) = pods.get_mut(&place) else { return Err(Refusal::Pod) };
        if pod.connections + connections > limits::CONNECTIONS_PER_POD {
            return Err(self.refuse(Refusal::Pod));
        }
        ledger.take(place, descriptors).map_err(|short| self.refuse(short.into()))?;
        pod.connections += connections;
        Ok(Held { account: self.clone(), connections, descriptors })
    }

    /// Leave for a connection that has not authenticated yet. Where there are too many, the one that has waited longest, of the
    /// address with most of them, has to go for it.
    ///
    /// # Errors
    /// [`Refusal::Node`] when there is no descriptor, and none of the pod's connections that could go.
    pub fn arrive(&self, source: IpAddr) -> Result<Arriving, Refusal> {
        let place = self.member.place;
        let mut books = self.books();
        let Books { descriptors: ledger, pods, .. } = &mut *books;
        let Some(pod) = pods.get_mut(&place) else { return Err(Refusal::Pod) };
        let cap = limits::HALF_OPEN_PER_POD.min(usize::try_from(ledger.shared() / 2).unwrap_or(usize::MAX));
        let full = pod.half_open.len() >= cap.max(limits::HALF_OPEN_MIN);
        let taken = if full { Err(Short::Pod) } else { ledger.take(place, 1) };
        if taken.is_err() {
            // Its descriptor is ours now.
            let oldest = pod.half_open.evict().ok_or_else(|| self.refuse(Refusal::Node))?;
            oldest.evicted.store(true, Ordering::Release);
            oldest.notify.notify_one();
            self.refuse(Refusal::HalfOpen);
        }
        let slot = Arc::<Slot>::default();
        let id = pod.half_open.enter(source, Arc::clone(&slot));
        Ok(Arriving { account: self.clone(), source, id, slot, left: false })
    }

    /// Whether `source` may begin a handshake now.
    ///
    /// # Errors
    /// [`Refusal::Handshake`].
    pub fn handshake(&self, source: IpAddr) -> Result<(), Refusal> {
        let now = Instant::now();
        let admitted = self.books().pods.get_mut(&self.member.place).is_some_and(|pod| pod.inbound.admit(source, now));
        if admitted { Ok(()) } else { Err(self.refuse(Refusal::Handshake)) }
    }

    /// A handshake of the pod's own: zero when it may begin now, else how long until it may ask again.
    #[must_use]
    pub fn dial(&self) -> Duration {
        let now = Instant::now();
        let mut books = self.books();
        let Some(pod) = books.pods.get_mut(&self.member.place) else { return Duration::ZERO };
        if pod.outbound.take(now) { Duration::ZERO } else { pod.outbound.wait(now) }
    }

    /// Counts a refusal that was decided elsewhere.
    pub fn refused(&self, refusal: Refusal) {
        self.refuse(refusal);
    }

    /// Counts the bytes of one connection's queue.
    #[must_use]
    pub fn buffers(&self) -> Buffers {
        Buffers { account: self.clone(), held: 0 }
    }
}

/// What a connection holds; given back when dropped.
#[derive(Debug)]
pub struct Held {
    account: Account,
    connections: usize,
    descriptors: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let place = self.account.member.place;
        let mut books = self.account.books();
        books.descriptors.give(place, self.descriptors);
        if let Some(pod) = books.pods.get_mut(&place) {
            pod.connections = pod.connections.saturating_sub(self.connections);
        }
    }
}

/// What wakes a connection that has to go.
#[derive(Debug, Default)]
struct Slot {
    evicted: AtomicBool,
    notify: Notify,
}

/// A connection that has not authenticated yet.
#[derive(Debug)]
pub struct Arriving {
    account: Account,
    source: IpAddr,
    id: u64,
    slot: Arc<Slot>,
    left: bool,
}

impl Arriving {
    /// Waits until it has to go for another.
    pub async fn evicted(&self) {
        while !self.slot.evicted.load(Ordering::Acquire) {
            self.slot.notify.notified().await;
        }
    }

    /// It has authenticated: from here on it is one of the pod's connections.
    ///
    /// # Errors
    /// [`Refusal::HalfOpen`] when it had to go meanwhile, [`Refusal::Pod`] when the pod has too many.
    pub fn establish(mut self) -> Result<Held, Refusal> {
        let place = self.account.member.place;
        let mut books = self.account.books();
        let Some(pod) = books.pods.get_mut(&place) else { return Err(Refusal::Pod) };
        if pod.connections >= limits::CONNECTIONS_PER_POD {
            drop(books);
            return Err(self.account.refuse(Refusal::Pod));
        }
        let there = pod.half_open.leave(self.source, self.id).is_some();
        if there {
            pod.connections += 1;
        }
        drop(books);
        self.left = true;
        if there {
            Ok(Held { account: self.account.clone(), connections: 1, descriptors: 1 })
        } else {
            Err(Refusal::HalfOpen)
        }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let place = self.account.member.place;
        let mut books = self.account.books();
        let there = books.pods.get_mut(&place).and_then(|pod| pod.half_open.leave(self.source, self.id)).is_some();
        // One that had to go has left its descriptor to another.
        if there {
            books.descriptors.give(place, 1);
        }
    }
}

/// Bytes that one connection has queued, counted in steps while they are many.
#[derive(Debug)]
pub struct Buffers {
    account: Account,
    held: u64,
}

impl Buffers {
    /// `bytes` are queued now. Fewer than before are given back all together, by [`Self::release`].
    ///
    /// # Errors
    /// [`Refusal::Buffer`] when there is no more and the connection has more than an equal part of what the pod has.
    pub fn hold(&mut self, bytes: usize) -> Result<(), Refusal> {
        let bytes = bytes as u64;
        if bytes <= self.held || bytes <= limits::BUFFER_FREE {
            return Ok(());
        }
        let wanted = bytes.next_multiple_of(limits::BUFFER_STEP);
        let more = wanted - self.held;
        let place = self.account.member.place;
        let mut books = self.account.books();
        let Books { bytes: ledger, pods, .. } = &mut *books;
        let Some(pod) = pods.get_mut(&place) else { return Ok(()) };
        if ledger.take(place, more).is_err() {
            let holding = pod.holding + u64::from(self.held == 0);
            let part = ledger.used_by(place).max(ledger.reserve()).min(limits::BUFFERS_PER_POD) / holding.max(1);
            if wanted > part.max(limits::BUFFER_STEP) {
                drop(books);
                return Err(self.account.refuse(Refusal::Buffer));
            }
            ledger.overdraw(place, more);
        }
        pod.holding += u64::from(self.held == 0);
        self.held = wanted;
        Ok(())
    }

    /// Nothing is queued any more.
    pub fn release(&mut self) {
        if self.held == 0 {
            return;
        }
        let place = self.account.member.place;
        let mut books = self.account.books();
        books.bytes.give(place, self.held);
        if let Some(pod) = books.pods.get_mut(&place) {
            pod.holding = pod.holding.saturating_sub(1);
        }
        self.held = 0;
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.release();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
