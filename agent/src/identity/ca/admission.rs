//! How much a node may have: the last question before a certificate is signed. Pure but for its memory; time is given.
//!
//! A stolen node asks for what runs on it, and for nothing faster than pods come: new identities have a rate, certificates
//! too, and a public key is signed for one caller and one identity. Each replica of the CA counts by itself.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use super::{authorize::Caller, issue::Examined, recent::Recent, refusal::Refusal};
use crate::{
    identity::SpiffeId,
    life::{budget::Bucket, limits},
};

/// A request that may be signed: its caller may have the identity, its form is right, and it is not one too many.
#[derive(Debug)]
pub(super) struct Approved(Examined);

impl Approved {
    pub fn request(&self) -> &Examined {
        &self.0
    }
}

/// Half of a SHA-256: enough that nobody finds a second text of it.
type Short = [u8; 16];

#[derive(Debug)]
pub(super) struct Admission {
    /// The longest that a certificate lasts: what is older does not matter any more.
    lifetime: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    nodes: Recent<Arc<str>, Node>,
    /// Public keys that were signed, and for which caller and identity.
    keys: Recent<Short, Short>,
}

#[derive(Debug)]
struct Node {
    new: Bucket,
    certificates: Bucket,
    questions: Bucket,
    had: Recent<SpiffeId, ()>,
}

impl Node {
    fn new() -> Self {
        Self {
            new: Bucket::new(limits::CA_NEW_IDENTITIES),
            certificates: Bucket::new(limits::CA_CERTIFICATES_PER_NODE),
            questions: Bucket::new(limits::CA_QUESTIONS_PER_NODE),
            had: Recent::new(limits::CA_IDENTITIES_PER_NODE),
        }
    }
}

impl State {
    fn node(&mut self, node: &Arc<str>, lifetime: Duration, now: Instant) -> Option<&mut Node> {
        self.nodes.entry(node, now + lifetime.max(limits::CA_NODE_MEMORY), now, Node::new)
    }
}

impl Admission {
    pub fn new(lifetime: Duration) -> Self {
        let state = State { nodes: Recent::new(limits::CA_NODES), keys: Recent::new(limits::CA_KEYS) };
        Self { lifetime, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the API server may be asked for a pod on behalf of this node.
    pub fn question(&self, node: &Arc<str>, now: Instant) -> Result<(), Refusal> {
        let free = self.state().node(node, self.lifetime, now).is_some_and(|known| known.questions.take(now));
        if free { Ok(()) } else { Err(Refusal::Questions(node.to_string())) }
    }

    /// Takes what the request costs its node, and notes its key.
    pub fn admit(&self, request: Examined, now: Instant) -> Result<Approved, Refusal> {
        let until = now + self.lifetime;
        let (caller, identity) = (request.authorized().caller(), request.authorized().identity());
        let (key, owner) = (short([request.public_key()]), owner(caller, identity));
        let mut state = self.state();
        if state.keys.get(&key, now).is_some_and(|signed| *signed != owner) {
            return Err(Refusal::Replayed);
        }
        if let Some(name) = caller.node() {
            let too_many = || Refusal::Certificates(name.to_string());
            let node = state.node(name, self.lifetime, now).ok_or_else(too_many)?;
            if !node.certificates.take(now) {
                return Err(too_many());
            }
            if node.had.get(identity, now).is_none() && !node.new.take(now) {
                return Err(Refusal::NewIdentities(name.to_string()));
            }
            node.had.put(identity.clone(), (), until, now);
        }
        state.keys.put(key, owner, until, now);
        drop(state);
        Ok(Approved(request))
    }
}

fn owner(caller: &Caller, identity: &SpiffeId) -> Short {
    // Neither has a NUL.
    short([caller.id().as_bytes(), b"\0", identity.as_str().as_bytes()])
}

fn short<const N: usize>(parts: [&[u8]; N]) -> Short {
    let digest: [u8; 32] = parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(part)).finalize().into();
    let mut short = Short::default();
    short.copy_from_slice(&digest[..16]);
    short
}
