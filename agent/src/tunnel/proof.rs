//! A connection that is asked to prove itself (`heddle proof`): the near agent marks its one CONNECT, and the far agent
//! answers with what it saw of that very connection.
//!
//! Beside the tunnel: a connection that nobody asked about meets one load of a counter. The mark changes nothing about what is
//! decided or carried. What the far side says is another agent's word: it is capped, parsed into these types, and compared with
//! what this side knows.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::{HeaderMap, HeaderValue, header::HeaderName};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::{Connection, Flow, Session};
use crate::{capture::AttachedProgram, life::limits};

/// On the CONNECT: `1`. On its answer: a [`Witness`] as JSON.
pub(super) const HEADER: HeaderName = HeaderName::from_static("x-heddle-proof");

/// What the destination's agent saw of the connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    pub node: String,
    /// `namespace/name` of the pod that it answers for.
    pub pod: String,
    /// Where the tunnel came from.
    pub client: String,
    /// SPIFFE ids and certificates' serial numbers (lower-case hex), the client's as it proved them.
    pub client_identity: String,
    pub client_serial: String,
    pub server_identity: String,
    pub server_serial: String,
    pub tls: String,
    pub cipher: String,
    /// `allowed` or `denied`; empty where it did not come to that.
    pub decision: String,
    /// The policy that decided, `namespace/name`; empty where none did.
    pub policy: String,
    /// Why it was not delivered: stable; empty when it was.
    pub reason: String,
    pub detail: String,
    /// The app accepted it.
    pub delivered: bool,
    /// What captures the pod.
    pub programs: Vec<Program>,
}

/// A kernel program as it hangs on a pod, read back from the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    /// Kernel ids, as `bpftool prog` and `bpftool link` have them.
    pub program: u32,
    pub link: u32,
}

impl From<AttachedProgram> for Program {
    fn from(AttachedProgram { name, program, link }: AttachedProgram) -> Self {
        Self { name: name.to_owned(), program, link }
    }
}

impl Witness {
    /// As a header, if it fits.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        let text = serde_json::to_string(self).ok()?;
        let fits = text.len() <= limits::PROOF_ANSWER && text.is_ascii();
        fits.then(|| HeaderValue::try_from(text).ok())?
    }

    /// From the answer's headers. `None` where the peer says nothing, or nothing that can be believed to be meant so.
    fn read(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(&HEADER).filter(|value| value.len() <= limits::PROOF_ANSWER)?.to_str().ok()?;
        serde_json::from_str(text).ok().filter(Self::is_plain)
    }

    /// No text in it acts on a terminal.
    fn is_plain(&self) -> bool {
        let Self { node, pod, client, client_identity, client_serial, server_identity, server_serial, .. } = self;
        let Self { tls, cipher, decision, policy, reason, detail, programs, .. } = self;
        let first = [node, pod, client, client_identity, client_serial, server_identity, server_serial];
        let texts = first.into_iter().chain([tls, cipher, decision, policy, reason, detail]);
        texts.chain(programs.iter().map(|program| &program.name)).all(|text| !text.chars().any(char::is_control))
    }
}

/// What this agent saw of the connection, the client's side.
#[derive(Debug)]
pub struct Seen {
    pub flow: Flow,
    pub answer: Answer,
    /// `None` where it failed; its byte counts go on.
    pub connection: Option<Arc<Connection>>,
    pub failure: Option<Failure>,
}

/// Why a connection came to nothing.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Stable.
    pub reason: &'static str,
    /// As Istio's `response_flags` label has it: what kind of failure.
    pub flags: &'static str,
    pub detail: String,
}

/// What the destination's side answered: to CONNECT, or as this agent itself.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// HTTP status of CONNECT; `None` where none came.
    pub status: Option<u16>,
    pub witness: Option<Witness>,
    /// The tunnel that CONNECT went over, also where it was refused.
    pub session: Option<Arc<Session>>,
}

/// Who waits for a connection, by its pod's uid and source port.
type Waiting = HashMap<(Arc<str>, u16), oneshot::Sender<Seen>>;

/// Connections that are asked to prove themselves, by their pod's uid and source port.
#[derive(Debug)]
pub struct Proofs {
    expected: AtomicUsize,
    waiting: Mutex<Waiting>,
    answering: Arc<Semaphore>,
}

/// An expected connection; nobody waits for it any more when this is dropped.
#[derive(Debug)]
pub struct Expected {
    proofs: Arc<Proofs>,
    key: (Arc<str>, u16),
    seen: oneshot::Receiver<Seen>,
}

impl Default for Proofs {
    fn default() -> Self {
        Self { expected: AtomicUsize::new(0), waiting: Mutex::default(), answering: Arc::new(Semaphore::new(1)) }
    }
}

impl Proofs {
    /// Expects a connection of a pod from this source port. To be called before the connection is made.
    pub fn expect(self: &Arc<Self>, uid: &Arc<str>, port: u16) -> Expected {
        let (sender, seen) = oneshot::channel();
        let key = (Arc::clone(uid), port);
        self.waiting().insert(key.clone(), sender);
        self.expected.fetch_add(1, Ordering::Release);
        Expected { proofs: Arc::clone(self), key, seen }
    }

    /// Takes a connection that was expected.
    pub(super) fn claim(&self, uid: &Arc<str>, client: SocketAddr) -> Option<Claim> {
        if self.expected.load(Ordering::Acquire) == 0 {
            return None;
        }
        let sender = self.waiting().remove(&(Arc::clone(uid), client.port()))?;
        Some(Claim { sender, answer: Arc::default() })
    }

    /// Leave to read back what captures a pod for a peer that asks, while it is held; none while another does.
    pub(super) fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.answering).try_acquire_owned().ok()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expected {
    /// What became of it; `None` where it ended without a word. It never comes where the connection does not come to the
    /// agent: the caller bounds the time.
    pub async fn seen(&mut self) -> Option<Seen> {
        (&mut self.seen).await.ok()
    }
}

impl Expected {
    /// Whether the connection has come to the agent.
    #[must_use]
    pub fn arrived(&self) -> bool {
        !self.proofs.waiting().contains_key(&self.key)
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.proofs.expected.fetch_sub(1, Ordering::Release);
        self.proofs.waiting().remove(&self.key);
    }
}

/// Where the peer's answer is noted.
pub(super) type Recorder = Arc<Mutex<Answer>>;

/// A connection that was expected, in the hands of the tunnel.
#[derive(Debug)]
pub(super) struct Claim {
    sender: oneshot::Sender<Seen>,
    answer: Recorder,
}

impl Claim {
    pub fn recorder(&self) -> Recorder {
        Arc::clone(&self.answer)
    }

    pub fn tell(self, flow: Flow, connection: Option<Arc<Connection>>, failure: Option<Failure>) {
        let answer = std::mem::take(&mut *lock(&self.answer));
        // Nobody waits any more: then nobody asks.
        let _ = self.sender.send(Seen { flow, answer, connection, failure });
    }
}

fn lock(recorder: &Mutex<Answer>) -> MutexGuard<'_, Answer> {
    recorder.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes what the destination's side saw, where that is this agent itself.
pub(super) fn note(recorder: &Mutex<Answer>, answer: Answer) {
    *lock(recorder) = answer;
}

/// Notes an answer to CONNECT.
pub(super) fn answered(recorder: &Mutex<Answer>, status: u16, headers: &HeaderMap, session: Option<&Arc<Session>>) {
    note(recorder, Answer { status: Some(status), witness: Witness::read(headers), session: session.cloned() });
}

/// What a far agent says is read within its cap, is harmless on a terminal, and says the same when it is written again.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(data) else { return };
    if let Some(witness) = Witness::read(&HeaderMap::from_iter([(HEADER, value)])) {
        assert!(data.len() <= limits::PROOF_ANSWER && witness.is_plain());
        if let Some(header) = witness.header() {
            assert_eq!(Witness::read(&HeaderMap::from_iter([(HEADER, header)])), Some(witness));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn witness() -> Witness {
        Witness {
            pod: "shop/web".into(),
            decision: "denied".into(),
            programs: vec![Program { name: "lookup".into(), program: 7, link: 8 }],
            ..Witness::default()
        }
    }

    fn read(value: &str) -> Option<Witness> {
        Witness::read(&HeaderMap::from_iter([(HEADER, HeaderValue::from_str(value).unwrap())]))
    }

    #[test]
    fn what_the_far_side_saw_comes_over_as_it_was() {
        let header = witness().header().unwrap();
        assert_eq!(read(header.to_str().unwrap()), Some(witness()));
        assert_eq!(Witness::read(&HeaderMap::new()), None, "a peer that is not heddle says nothing");
    }

    #[test]
    fn what_is_no_witness_says_nothing() {
        let text = serde_json::to_string(&witness()).unwrap();
        for wrong in [
            "1",
            "{}",
            "[]",
            "",
            &text[..text.len() - 1],
            &text.replace("\"delivered\":false", "\"delivered\":\"yes\""),
            &text.replace("shop/web", "shop\\u001b[31m"),
            &text.replace("\"lookup\"", "\"a\\nb\""),
            &text.replace("shop/web", &"x".repeat(limits::PROOF_ANSWER)),
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        let long = Witness { detail: "x".repeat(limits::PROOF_ANSWER), ..witness() };
        assert_eq!(long.header(), None);
        let foreign = Witness { detail: "é".into(), ..witness() };
        assert_eq!(foreign.header(), None, "no header can hold it");
    }

    #[tokio::test]
    async fn only_the_expected_connection_is_claimed_and_only_once() {
        let proofs = Arc::new(Proofs::default());
        let (uid, other): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let from = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
        assert!(proofs.claim(&uid, from(7)).is_none());
        let mut expected = proofs.expect(&uid, 7);
        assert!(proofs.claim(&uid, from(8)).is_none() && proofs.claim(&other, from(7)).is_none());
        let claim = proofs.claim(&uid, from(7)).unwrap();
        assert!(proofs.claim(&uid, from(7)).is_none());
        drop(claim);
        assert!(expected.seen().await.is_none(), "it ended without a word");
        drop(expected);
        assert_eq!(proofs.expected.load(Ordering::Acquire), 0);
        let _gone = proofs.expect(&uid, 9);
        drop(_gone);
        assert!(proofs.claim(&uid, from(9)).is_none());
    }
}
