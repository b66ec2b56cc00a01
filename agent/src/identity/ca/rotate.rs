//! A root takes another's place, step by step, and no handshake fails: first everyone trusts the new one, then the CA issues from
//! it, and when nothing of the old one is in use any more, nobody trusts that.
//!
//! Pure: from what is stored and what agents and replicas say to what is to be written. `store` reads and writes, `ask` asks,
//! `agents` and `replicas` understand what they say. A step that was broken off is finished by giving it again; one that was done says so; one that would break traffic is refused.

mod agents;
mod ask;
mod exposition;
mod replicas;
mod store;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

pub use ask::{AGENT_PORT, AskError, Group, Places, REPLICA_PORT};
pub use store::{Store, StoreError};

use self::agents::Seen;
use super::{
    CaError,
    root::{Generated, KeyError, KeyProblem, Material, Part, Root, describe, pem},
    source::{BUNDLE, CERTIFICATE, KEY},
};
use crate::identity::{TrustDomain, roots::parse_bundle};

/// What waits to take over, and what was taken over from: beside `tls.crt`, `tls.key` and `ca.crt`, in the same form.
const NEXT_CERTIFICATE: &str = "next.crt";
const NEXT_KEY: &str = "next.key";
const PREVIOUS_CERTIFICATE: &str = "previous.crt";
const PREVIOUS_KEY: &str = "previous.key";

/// Every name that a rotation reads or writes.
const NAMES: [&str; 7] = [CERTIFICATE, KEY, BUNDLE, NEXT_CERTIFICATE, NEXT_KEY, PREVIOUS_CERTIFICATE, PREVIOUS_KEY];

/// What a store holds: PEM by name, and where that is for people.
#[derive(Debug, Default)]
struct Held {
    place: String,
    parts: BTreeMap<&'static str, Zeroizing<Vec<u8>>>,
}

/// One thing to write, or to take away, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Write {
    name: &'static str,
    bytes: Option<Zeroizing<Vec<u8>>>,
}

/// A step of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A new root is made, and the trust bundle holds it too.
    Prepare,
    /// Certificates are issued from it.
    Switch,
    /// The trust bundle holds it alone.
    Finish,
    /// Everything is as it was before `Prepare`.
    Back,
}

/// How far a rotation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// None is under way.
    Steady,
    /// `Prepare` was broken off.
    Preparing,
    /// A new root is trusted and not used.
    Prepared,
    /// `Switch` or `Back` was broken off.
    Between,
    /// The new root issues, the old one is trusted.
    Switched,
    /// `Finish` was broken off.
    Finishing,
}

impl Phase {
    /// For people and programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Preparing => "preparing",
            Self::Prepared => "prepared",
            Self::Between => "switching",
            Self::Switched => "switched",
            Self::Finishing => "finishing",
        }
    }
}

/// What became of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was done, or had been: what is to be told.
    Done(String),
    /// It would break traffic: why, a line each. Nothing was written by it.
    Refused(Vec<String>),
}

/// Why a rotation can't go on, whatever the agents say.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("no root can be made: {0}")]
    Make(#[from] CaError),
}

/// One root of a rotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootLine {
    pub role: &'static str,
    pub subject: String,
    pub serial: String,
    pub not_after: SystemTime,
}

/// What `heddle ca rotate status` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotationStatus {
    pub phase: Phase,
    pub roots: Vec<RootLine>,
    /// Of each agent: how many of the roots it trusts, and how many certificates it holds of each, or why it can't be asked.
    pub agents: Vec<(String, String)>,
    /// Of each replica of the CA: what it issues from, or why it can't be asked.
    pub replicas: Vec<(String, String)>,
}

/// A root that the operator brings instead of one that is made: PEM of its certificates and of its key.
pub struct Given {
    pub certificate: Vec<u8>,
    pub key: Zeroizing<Vec<u8>>,
}

/// What a store holds, understood.
struct View {
    current: Result<Root, KeyError>,
    next: Option<Root>,
    previous: Option<Root>,
    bundle: Vec<CertificateDer<'static>>,
    phase: Phase,
}

impl Held {
    fn part(&self, name: &'static str) -> Part {
        let content = self.parts.get(name).cloned().ok_or(KeyProblem::Missing);
        Part { place: format!("{name} of {}", self.place), content }
    }

    /// A pair with the bundle that stands beside it; with its own root alone where that is not in the bundle yet, or any more.
    fn root(
        &self,
        (certificate, key): (&'static str, &'static str),
        assemble: impl Fn(&Material) -> Result<Root, KeyError>,
    ) -> Result<Root, KeyError> {
        let material = |bundle| Material { certificate: self.part(certificate), key: self.part(key), bundle };
        let bundle = self.parts.get(BUNDLE).filter(|bytes| !bytes.trim_ascii().is_empty()).map(|_| self.part(BUNDLE));
        match assemble(&material(bundle)) {
            Err(KeyError { problem: KeyProblem::NotInBundle(_), .. }) => assemble(&material(None)),
            other => other,
        }
    }

    fn has(&self, (certificate, key): (&'static str, &'static str)) -> bool {
        self.parts.contains_key(certificate) && self.parts.contains_key(key)
    }

    fn view(&self, now: SystemTime) -> Result<View, KeyError> {
        let (next, previous) = ((NEXT_CERTIFICATE, NEXT_KEY), (PREVIOUS_CERTIFICATE, PREVIOUS_KEY));
        let valid = |material: &Material| Root::assemble(material, now);
        let current = self.root((CERTIFICATE, KEY), valid);
        let next = self.has(next).then(|| self.root(next, valid)).transpose()?;
        // It may have expired before its successor was alone.
        let previous = self.has(previous).then(|| self.root(previous, Root::assemble_old)).transpose()?;
        let bundle = match self.parts.get(BUNDLE).filter(|bytes| !bytes.trim_ascii().is_empty()) {
            Some(bytes) => parse_bundle(bytes)
                .map_err(|error| KeyError::new(self.part(BUNDLE).place, KeyProblem::Certificates(error.to_string())))?,
            None => current.as_ref().ok().and_then(Root::anchor).cloned().into_iter().collect(),
        };
        let trusted = |root: &Root| root.anchor().is_some_and(|anchor| bundle.contains(anchor));
        let phase = match (&next, &previous) {
            (None, None) if self.parts.contains_key(PREVIOUS_CERTIFICATE) => Phase::Finishing,
            (None, None) => Phase::Steady,
            (Some(next), None) if trusted(next) => Phase::Prepared,
            (Some(_), None) => Phase::Preparing,
            (Some(_), Some(_)) => Phase::Between,
            (None, Some(previous)) if trusted(previous) => Phase::Switched,
            (None, Some(_)) => Phase::Finishing,
        };
        Ok(View { current, next, previous, bundle, phase })
    }

    fn copy(&self, from: &'static str, to: &'static str) -> Write {
        Write { name: to, bytes: self.parts.get(from).cloned() }
    }
}

fn put(name: &'static str, bytes: &[u8]) -> Write {
    Write { name, bytes: Some(Zeroizing::new(bytes.to_vec())) }
}

fn take_away(name: &'static str) -> Write {
    Write { name, bytes: None }
}

fn bundle(certificates: &[CertificateDer<'static>]) -> Write {
    put(BUNDLE, certificates.iter().map(pem).collect::<String>().as_bytes())
}

/// What is to be done for a step.
enum Plan {
    Nothing(String),
    Refused(Vec<String>),
    /// Write this; then look again where the step is not over.
    Do {
        writes: Vec<Write>,
        told: String,
        over: bool,
    },
}

impl View {
    fn anchor(root: Option<&Root>) -> Option<&CertificateDer<'static>> {
        root.and_then(Root::anchor)
    }

    /// A key pair that is to take over. Where `Prepare` was broken off, the one that it had stored.
    fn prepare(&self, held: &Held, new: &(Root, Write, Write)) -> Plan {
        let current = match &self.current {
            Ok(current) => current,
            Err(error) => return Plan::Refused(vec![error.to_string()]),
        };
        let (root, mut writes) = match (self.phase, &self.next) {
            (Phase::Steady, _) => (&new.0, vec![new.1.clone(), new.2.clone()]),
            (Phase::Preparing, Some(next)) => (next, Vec::new()),
            (Phase::Prepared, Some(next)) => {
                return Plan::Nothing(format!("prepared before: {} waits to take over", name(next)));
            }
            _ => {
                return Plan::Refused(vec![format!(
                    "another rotation is under way ({}): finish it, or go back, first",
                    self.phase.name()
                )]);
            }
        };
        if root.anchor() == current.anchor() && root.chain.first() == current.chain.first() {
            return Plan::Refused(vec![format!("{} issues already", name(root))]);
        }
        let mut all = self.bundle.clone();
        all.extend(root.anchor().filter(|anchor| !all.contains(anchor)).cloned());
        writes.push(bundle(&all));
        // What an interrupted finish left.
        writes.extend(held.parts.contains_key(PREVIOUS_KEY).then(|| take_away(PREVIOUS_KEY)));
        Plan::Do {
            writes,
            told: format!("prepared: {} is in the trust bundle and waits to take over", name(root)),
            over: true,
        }
    }

    fn switch(&self, held: &Held, seen: &[Seen]) -> Plan {
        let next = match (self.phase, &self.next) {
            (Phase::Prepared | Phase::Between, Some(next)) => next,
            (Phase::Switched | Phase::Finishing, _) => {
                return Plan::Nothing("switched before: certificates are issued from the new root".to_owned());
            }
            _ => {
                return Plan::Refused(vec![
                    "no new root is prepared: `heddle ca rotate prepare` comes first".to_owned(),
                ]);
            }
        };
        if let (Phase::Prepared, Err(error)) = (self.phase, &self.current) {
            return Plan::Refused(vec![error.to_string()]);
        }
        let missing = agents::not_trusting(seen, Self::anchor(Some(next)));
        if !missing.is_empty() {
            return Plan::Refused(missing);
        }
        let keep = self.previous.is_none();
        let mut writes = Vec::new();
        if keep {
            writes.extend([held.copy(KEY, PREVIOUS_KEY), held.copy(CERTIFICATE, PREVIOUS_CERTIFICATE)]);
        }
        writes.extend([held.copy(NEXT_KEY, KEY), held.copy(NEXT_CERTIFICATE, CERTIFICATE)]);
        writes.extend([take_away(NEXT_KEY), take_away(NEXT_CERTIFICATE)]);
        Plan::Do { writes, told: format!("switched: certificates are issued from {}", name(next)), over: true }
    }

    fn finish(&self, seen: &[Seen], replicas: &[replicas::Seen]) -> Plan {
        match self.phase {
            Phase::Steady => return Plan::Nothing("no rotation is under way".to_owned()),
            Phase::Switched | Phase::Finishing => {}
            _ => return Plan::Refused(vec!["not switched: `heddle ca rotate switch` comes first".to_owned()]),
        }
        let current = match &self.current {
            Ok(current) => current,
            Err(error) => return Plan::Refused(vec![error.to_string()]),
        };
        let old = Self::anchor(self.previous.as_ref()).filter(|old| Some(*old) != current.anchor());
        let mut writes = Vec::new();
        if let Some(old) = old {
            let needed = needed(seen, old, replicas, current);
            if !needed.is_empty() {
                return Plan::Refused(needed);
            }
            let left: Vec<_> = self.bundle.iter().filter(|root| *root != old).cloned().collect();
            writes.push(bundle(&left));
        }
        writes.extend([PREVIOUS_KEY, NEXT_KEY, NEXT_CERTIFICATE, PREVIOUS_CERTIFICATE].map(take_away));
        Plan::Do { writes, told: format!("finished: {} alone issues and is trusted", name(current)), over: true }
    }

    fn back(&self, held: &Held, seen: &[Seen], replicas: &[replicas::Seen]) -> Plan {
        match (self.phase, &self.previous, &self.next) {
            (Phase::Switched | Phase::Between, Some(previous), _) => {
                let missing = agents::not_trusting(seen, previous.anchor());
                if !missing.is_empty() {
                    return Plan::Refused(missing);
                }
                let mut writes = Vec::new();
                if self.next.is_none() {
                    writes.extend([held.copy(KEY, NEXT_KEY), held.copy(CERTIFICATE, NEXT_CERTIFICATE)]);
                }
                writes.extend([held.copy(PREVIOUS_KEY, KEY), held.copy(PREVIOUS_CERTIFICATE, CERTIFICATE)]);
                writes.extend([take_away(PREVIOUS_KEY), take_away(PREVIOUS_CERTIFICATE)]);
                let told = format!("certificates are issued from {} again", name(previous));
                Plan::Do { writes, told, over: false }
            }
            (Phase::Prepared | Phase::Preparing, _, Some(next)) => {
                let kept = self.current.as_ref().ok();
                let mut writes = Vec::new();
                if let Some(dropped) = next.anchor().filter(|anchor| Some(*anchor) != kept.and_then(Root::anchor)) {
                    let needed = match kept {
                        Some(kept) => needed(seen, dropped, replicas, kept),
                        None => agents::holding(seen, dropped),
                    };
                    if !needed.is_empty() {
                        return Plan::Refused(needed);
                    }
                    let left: Vec<_> = self.bundle.iter().filter(|root| *root != dropped).cloned().collect();
                    writes.push(bundle(&left));
                }
                writes.extend([take_away(NEXT_KEY), take_away(NEXT_CERTIFICATE)]);
                Plan::Do { writes, told: "gone back: the new root is forgotten".to_owned(), over: true }
            }
            (Phase::Finishing, ..) => Plan::Refused(vec![
                "the old root is out of the trust bundle: give `heddle ca rotate finish` again".to_owned(),
            ]),
            _ => Plan::Nothing("no rotation is under way".to_owned()),
        }
    }
}

/// Who needs a root that is to go, a line each: replicas that do not issue from `stays`, agents with certificates or lists of it.
fn needed(seen: &[Seen], goes: &CertificateDer<'static>, replicas: &[replicas::Seen], stays: &Root) -> Vec<String> {
    let mut lines = replicas::not_issuing_from(replicas, stays);
    lines.extend(agents::holding(seen, goes));
    lines.extend(agents::listing(seen, goes));
    lines
}

/// A root as it is spoken of: subject and serial number.
fn name(root: &Root) -> String {
    root.anchor().map(describe).unwrap_or_default()
}

/// A rotation of the key in one store.
pub struct Rotation {
    pub store: Store,
    pub agents: Group,
    /// Of the CA.
    pub replicas: Group,
    pub trust_domain: TrustDomain,
    /// Of a root that is made.
    pub lifetime: Duration,
    pub given: Option<Given>,
}

impl Rotation {
    /// Takes one step, or says why that would break traffic.
    ///
    /// # Errors
    /// When store, key or agents can't be read or written.
    pub async fn step(&self, step: Step) -> Result<Outcome, RotateError> {
        let mut told = Vec::new();
        loop {
            let now = SystemTime::now();
            let stored = self.store.read().await?;
            let view = stored.held.view(now)?;
            let plan = match step {
                Step::Prepare => view.prepare(&stored.held, &self.successor(now)?),
                Step::Switch => view.switch(&stored.held, &self.agents.ask(agents::said).await?),
                Step::Finish => view.finish(&self.agents.ask(agents::said).await?, &self.issuing().await?),
                Step::Back => view.back(&stored.held, &self.agents.ask(agents::said).await?, &self.issuing().await?),
            };
            match plan {
                Plan::Nothing(line) if told.is_empty() => return Ok(Outcome::Done(line)),
                Plan::Nothing(_) => return Ok(Outcome::Done(told.join("\n"))),
                Plan::Refused(mut lines) => {
                    told.append(&mut lines);
                    return Ok(Outcome::Refused(told));
                }
                Plan::Do { writes, told: line, over } => {
                    self.store.write(stored, writes).await?;
                    told.push(line);
                    if over {
                        return Ok(Outcome::Done(told.join("\n")));
                    }
                }
            }
        }
    }

    async fn issuing(&self) -> Result<Vec<replicas::Seen>, AskError> {
        self.replicas.ask(replicas::said).await
    }

    /// The pair that `Prepare` stores, in the order in which it is written.
    fn successor(&self, now: SystemTime) -> Result<(Root, Write, Write), RotateError> {
        let (certificate, key) = match &self.given {
            Some(given) => (Zeroizing::new(given.certificate.clone()), given.key.clone()),
            None => {
                let made = Generated::new(self.lifetime, &self.trust_domain)?;
                (Zeroizing::new(made.certificate.into_bytes()), Zeroizing::new(made.key.as_bytes().to_vec()))
            }
        };
        let place = if self.given.is_some() { "the new root that was given" } else { "the new root" };
        let part = |bytes: &Zeroizing<Vec<u8>>| Part { place: place.to_owned(), content: Ok(bytes.clone()) };
        let root = Root::assemble(&Material { certificate: part(&certificate), key: part(&key), bundle: None }, now)?;
        let writes = (put(NEXT_KEY, &key), put(NEXT_CERTIFICATE, &certificate));
        Ok((root, writes.0, writes.1))
    }

    /// How far it is, and what the agents say of it.
    ///
    /// # Errors
    /// When store, key or agents can't be read.
    pub async fn status(&self) -> Result<RotationStatus, RotateError> {
        let stored = self.store.read().await?;
        let view = stored.held.view(SystemTime::now())?;
        let current = view.current?;
        let mut roots = Vec::new();
        let mut add = |role, der: &CertificateDer<'static>| {
            roots.extend(Root::status_of(der).map(|root| RootLine {
                role,
                subject: root.subject,
                serial: root.serial,
                not_after: root.not_after,
            }));
        };
        let [issuing, next, previous] = [Some(&current), view.next.as_ref(), view.previous.as_ref()].map(View::anchor);
        for (role, anchor) in [("issuing", issuing), ("next", next), ("previous", previous)] {
            if let Some(anchor) = anchor {
                add(role, anchor);
            }
        }
        for root in view.bundle.iter().filter(|root| ![issuing, next, previous].contains(&Some(*root))) {
            add("trusted", root);
        }
        let seen = if self.agents.known() { self.agents.ask(agents::said).await? } else { Vec::new() };
        let agents = seen.iter().map(|seen| (seen.who.clone(), seen.line(&roots))).collect();
        let seen = if self.replicas.known() { self.issuing().await? } else { Vec::new() };
        let replicas = seen.iter().map(|seen| (seen.who.clone(), seen.line())).collect();
        Ok(RotationStatus { phase: view.phase, roots, agents, replicas })
    }
}

#[cfg(test)]
mod tests;
